//! One private layer with random weights, its three parties in one process: for benchmarks and for tests of its cost.

use std::sync::Mutex;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use trefoil::Role;
use trefoil::model::calibrate;
use trefoil::model::prepare::Prepared;
use trefoil::model::secure::{KvCache, SecureModel};
use trefoil::model::{Activation, Arch, ModelConfig, Rope, RopeScaling, Weights};
use trefoil::net::meter::LinkTotals;
use trefoil::plan::cost::Cost;
use trefoil::plan::{F, Plan, plan};
use trefoil::prf::PreparationSeed;
use trefoil::protocol::{embedding, input};
use trefoil::ring::fixed;
use trefoil::session::Scope;
use trefoil::share::Rows;
use trefoil::world::{Keys, Setup, World};

/// A Llama of one layer: `h768` has 12 heads and 2048 MLP columns, `h2048` 16 and 5504.
#[must_use]
pub fn shape(name: &str, context: usize) -> ModelConfig {
    let (hidden_size, num_heads, intermediate_size) = match name {
        "h2048" => (2048, 16, 5504),
        "h768" => (768, 12, 2048),
        _ => (64, 4, 176),
    };
    ModelConfig {
        arch: Arch::Llama,
        hidden_size,
        intermediate_size,
        num_layers: 1,
        num_heads,
        num_kv_heads: num_heads,
        head_dim: hidden_size / num_heads,
        vocab_size: 256,
        max_positions: context + 1,
        rms_norm_eps: 1e-5,
        rope: Rope { theta: 10_000.0, scaling: RopeScaling::None },
        tie_word_embeddings: true,
        qkv_bias: false,
        o_bias: false,
        mlp_bias: false,
        qk_norm: false,
        activation: Activation::Silu,
        bos_id: None,
        eos_ids: Vec::new(),
    }
}

/// The layer, prepared for all three parties.
pub struct Layer {
    config: ModelConfig,
    models: [SecureModel; 3],
    setup: Setup,
}

/// What some passes took.
#[allow(dead_code)] // the tests of cost and the benchmarks each read a part
#[derive(Clone, Debug)]
pub struct Measured {
    /// Wall time from cold until the last pass is done at all parties.
    pub wall: Duration,
    /// Traffic by link: `[from][to]`.
    pub sent: [[LinkTotals; 3]; 3],
    /// Online messages in sequence of the layer in the last pass.
    pub depth: u32,
    /// What the Owner's walk declared, per pass, without the input.
    pub declared: Vec<Cost>,
}

impl Measured {
    /// Online bytes of all links.
    #[must_use]
    pub fn online_bytes(&self) -> u64 {
        self.sent.iter().flatten().map(|l| l.online_bytes).sum()
    }

    /// Run-ahead bytes of all links.
    #[must_use]
    pub fn ahead_bytes(&self) -> u64 {
        self.sent.iter().flatten().map(|l| l.ahead_bytes).sum()
    }
}

impl Layer {
    /// Random weights from a fixed seed, calibrated and prepared.
    #[must_use]
    pub fn new(config: ModelConfig, setup: Setup) -> Layer {
        let mut weights = Weights::random(config.clone(), 7).unwrap();
        // A residual stream as in the middle of a model, not the tiny one of an initial embedding.
        weights.embed *= 25.0;
        let ranges = calibrate::ranges(&weights, 0, &calibrate::inputs(&config, config.max_positions, None));
        let bounds = calibrate::bounds(&weights, 0).unwrap();
        let plan: Plan = plan(&config, 0, false, &bounds, &ranges).unwrap();
        let seed = PreparationSeed::from_bytes([3; 32]);
        let owner = Prepared::owner(&weights, &plan, &seed).unwrap();
        let mut words = Vec::new();
        owner
            .helper_words(&seed, &mut |w| {
                words.push(w);
                Ok(())
            })
            .unwrap();
        let mut words = words.into_iter();
        let helper = Prepared::helper(&config, &plan, &mut |_| Ok(words.next().unwrap())).unwrap();
        let client = Prepared::client(&config, &plan, &seed, &mut |_| unreachable!("the head is private")).unwrap();
        let models = [owner, client, helper].map(|p| SecureModel::new(config.clone(), plan.clone(), p));
        Layer { config, models, setup }
    }

    /// The plan.
    #[must_use]
    pub fn plan(&self) -> &Plan {
        self.models[0].plan()
    }

    /// Runs passes of the given numbers of tokens at `context` cached positions (known values), as one batch of
    /// run-ahead, from cold.
    #[must_use]
    pub fn run(&self, context: usize, passes: &[usize]) -> Measured {
        let world = World::new(Keys::seeded(1), &self.setup);
        let (inputs, source) = channel();
        let source = embedding::source(source);
        let n = self.config.hidden_size;
        let k = self.plan().residual_k;
        for (p, &tokens) in passes.iter().enumerate() {
            let word = |i: usize| fixed::encode((((i * 31 + p * 7) % 41) as f64 - 20.0) / 24.0, F, k);
            inputs.send((0..tokens * n).map(word).collect()).unwrap();
        }
        let total: usize = passes.iter().sum();
        let caches: [Mutex<KvCache>; 3] = Role::ALL.map(|role| {
            let mut cache = self.models[role.index()].cache(context + total);
            cache.preload(role, context);
            Mutex::new(cache)
        });
        let (flags, opened) = channel();
        let (depth, names) = (Mutex::new(0), Mutex::new(Vec::new()));
        let start = Instant::now();
        let out = world
            .run(1, passes, |s| {
                let role = s.role();
                let (model, mut cache) = (&self.models[role.index()], caches[role.index()].lock().unwrap());
                let client = role == Role::Client;
                let rows = Rows::even(s.tokens(), n);
                let h = input::input(s, &Scope::new("input"), &rows, k, F, client.then_some(&source))?;
                let mut range = model.new_flags(s);
                let (before, d) = (s.declared(), s.depth());
                model.layer(s, 0, h, &mut cache, &mut range)?;
                cache.advance(s.tokens());
                if role == Role::Owner {
                    *depth.lock().unwrap() = s.depth() - d;
                }
                if client {
                    *names.lock().unwrap() = range.names();
                }
                range.open(s, &Scope::new("range"), client.then_some(&flags))?;
                let mut cost = s.declared();
                cost.subtract(&before);
                Ok(cost)
            })
            .unwrap();
        let wall = start.elapsed();
        drop(flags);
        for bits in opened {
            let up: Vec<_> =
                names.lock().unwrap().iter().zip(bits).filter(|(_, b)| *b != 0).map(|(n, _)| n.1).collect();
            assert!(up.is_empty(), "range flags are up: {up:?}");
        }
        let sent = Role::ALL
            .map(|from| Role::ALL.map(|to| if from == to { LinkTotals::default() } else { world.sent(from, to) }));
        Measured { wall, sent, depth: *depth.lock().unwrap(), declared: out.owner }
    }
}
