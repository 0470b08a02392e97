//! Passes of a private model, its three parties in one process: what benchmarks and tests of cost run.

use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::generate::{MAX_BATCH, next_batch};
use crate::ledger::{self, Spent};
use crate::model::float::{self, FloatCache};
use crate::model::prepare::Prepared;
use crate::model::rounding::Choice;
use crate::model::sections::sections;
use crate::model::secure::{ClientPorts, KvCache, PassOptions, SecureModel, Wanted};
use crate::model::{ModelConfig, Weights, calibrate};
use crate::net::meter::LinkTotals;
use crate::net::shape::Profile;
use crate::party::Role;
use crate::plan::cost::Cost;
use crate::plan::work::Work;
use crate::plan::{F, Fractions, Plan, Setting, plan};
use crate::predict::walk::{self, Cells};
use crate::prf::PreparationSeed;
use crate::protocol::gumbel::Gumbel;
use crate::protocol::{embedding, input};
use crate::ring::{Packed, fixed};
use crate::session::{Scope, Session};
use crate::share::Rows;
use crate::world::{Batches, Gate, Keys, Setup, World};

/// What of a pass is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Hidden states in, all layers, range flags opened to the Client: no embedding, no head.
    Layers,
    /// From the Client's input to its token, as in a generation.
    Whole,
    /// The same with a token for every position, as in a pass that verifies drafts.
    Verified,
}

/// When Client and Helper do their run-ahead work, and from when on the clock runs.
#[derive(Clone, Copy, Debug)]
pub enum Pace {
    /// From cold, all passes walked as one batch.
    OneBatch,
    /// From cold, in batches as in a generation; the rooms are the batches that fit the Owner's buffer, by [`Role::index`].
    Generation([usize; 3]),
    /// All passes are walked and have arrived before the clock starts: the online part alone.
    Ready,
}

/// Random weights from a fixed seed for benchmarks.
///
/// # Errors
/// As [`Weights::random`].
pub fn random_weights(config: ModelConfig) -> Result<Weights> {
    let mut weights = Weights::random(config, 7)?;
    // A residual stream as in the middle of a model, not the tiny one of an initial embedding.
    weights.embed *= 25.0;
    Ok(weights)
}

/// The plan of all layers of `weights` as private ones: all matrices with the fewest fraction bits. With adapters the base is
/// public, and fraction bits are as a preparation has them.
///
/// # Errors
/// [`Error::Model`] for weights that no plan fits.
pub(super) fn planned(weights: &Weights, private_embedding: bool, setting: impl Into<Setting>) -> Result<Plan> {
    let config = &weights.config;
    let ranges = calibrate::ranges(weights, 0, &calibrate::inputs(config, config.max_positions, None));
    let fractions = match weights.first_adapted().is_some() {
        true => Choice::new(weights, 0, private_embedding)?.fractions,
        false => Fractions::least(config.num_layers),
    };
    let bounds = calibrate::bounds(weights, 0, &fractions)?;
    Ok(plan(config, 0, private_embedding, &bounds, &ranges)?.at(config, setting))
}

/// A model, prepared for all three parties.
pub struct Harness {
    models: [SecureModel; 3],
    /// What stands for a Client's input.
    tokens: Vec<u64>,
    /// Its hidden states below the first private layer.
    hidden: Vec<Vec<u64>>,
    setup: Setup,
}

/// How many different tokens are given as input to random weights.
pub(super) const ROWS: usize = 16;

/// What some passes took.
#[derive(Clone, Debug)]
pub struct Measured {
    /// Wall time from the start of the clock until the last pass is done at all parties.
    pub wall: Duration,
    /// Traffic by link: `[from][to]`.
    pub sent: [[LinkTotals; 3]; 3],
    /// Frames in which it left, online and ahead; as many as messages where nothing is gathered ([`crate::world::Setup`]).
    pub frames: [[[u64; 2]; 3]; 3],
    /// Time and bytes by kind of operation, by party; with [`Pace::Ready`] those since the start of the clock.
    pub spent: [Spent; 3],
    /// Online messages in sequence in a pass; of [`Part::Layers`] those of the layers alone.
    pub depth: u32,
    /// What the Owner's walk declared, per pass; of [`Part::Layers`] without the input.
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

impl Harness {
    /// All layers of `config` private, the embedding public; random weights, calibrated and prepared.
    ///
    /// # Errors
    /// [`Error::Model`] for an impossible configuration.
    pub fn new(config: ModelConfig, setup: Setup) -> Result<Harness> {
        Harness::prepare(&random_weights(config)?, false, setup)
    }

    /// Calibrates, plans and prepares `weights`, all layers private, all matrices with the fewest fraction bits. With adapters the base is
    /// public, and fraction bits are as a preparation has them.
    ///
    /// # Errors
    /// [`Error::Model`] for weights that no plan fits.
    pub fn prepare(weights: &Weights, private_embedding: bool, setup: Setup) -> Result<Harness> {
        let plan = planned(weights, private_embedding, setup.profile)?;
        Harness::with(weights, plan, &calibrate::stress(&weights.config, ROWS), setup)
    }

    /// Prepares `weights` by `plan`; the Client's input is `tokens` over and over.
    ///
    /// # Errors
    /// [`Error::Model`] for weights that the plan does not fit.
    pub(super) fn with(weights: &Weights, plan: Plan, tokens: &[u32], setup: Setup) -> Result<Harness> {
        let config = &weights.config;
        let seed = PreparationSeed::from_bytes([3; 32]);
        let owner = Prepared::owner(weights, &plan, &seed)?;
        let (mut index, none) = (0, || Error::Internal("the helper's part is not what the owner made".into()));
        let helper = Prepared::helper_packed(config, &plan, &mut |s| {
            let n = s.rows * s.cols;
            let bytes = owner.helper_bytes(&seed, (index, s), 0..n)?;
            index += 1;
            Packed::from_bytes(Arc::new(bytes), 0, n, n, s.bits()).ok_or_else(none)
        })?;
        let client = {
            let mut known = owner.matrices().zip(sections(config, &plan)?).filter(|(_, s)| s.public).map(|(m, _)| m);
            Prepared::client(config, &plan, &seed, &mut |_| known.next().ok_or_else(none)?.helper_words(&seed))?
        };
        let mut cache = FloatCache::new(config);
        let public = 0..plan.first_private;
        let states =
            public.fold(float::embed(weights, tokens), |h, i| float::layer(weights, i, h, 0, &mut cache, &mut ()));
        let encode = |&v: &f32| fixed::encode(f64::from(v), F, plan.residual_k);
        let hidden = states.rows().into_iter().map(|row| row.iter().map(encode).collect()).collect();
        let tokens = tokens.iter().map(|&id| id.into()).collect();
        let models = [owner, client, helper].map(|p| SecureModel::new(config.clone(), plan.clone(), p));
        Ok(Harness { models, tokens, hidden, setup })
    }

    /// The configuration: of a shape the layers that are run.
    pub(super) fn config(&self) -> &ModelConfig {
        self.models[0].config()
    }

    /// The plan.
    #[must_use]
    pub fn plan(&self) -> &Plan {
        self.models[0].plan()
    }

    /// Runs passes of the given numbers of tokens through the layers at `context` cached positions (known values), as one
    /// batch of run-ahead, from cold.
    ///
    /// # Errors
    /// As [`Harness::measure`].
    pub fn run(&self, context: usize, passes: &[usize]) -> Result<Measured> {
        self.measure(Part::Layers, Pace::OneBatch, context, passes)
    }

    /// Runs passes of the given numbers of tokens at `context` cached positions (known values).
    ///
    /// # Errors
    /// [`Error::Range`] if a range flag goes up, and those of a party.
    pub fn measure(&self, part: Part, pace: Pace, context: usize, passes: &[usize]) -> Result<Measured> {
        let mut setup = self.setup.clone();
        if matches!(pace, Pace::Ready) {
            setup.ahead_capacity = usize::MAX / 4;
        }
        let world = World::new(Keys::seeded(1), &setup);
        let run = Run { world: &world, part, pace, profile: setup.profile };
        let input = |i: usize| match part {
            Part::Whole | Part::Verified if self.plan().private_embedding => vec![self.tokens[i % self.tokens.len()]],
            _ => self.hidden[i % self.hidden.len()].clone(),
        };
        run.execute(&self.models.each_ref(), context, passes, &input)
    }
}

impl Cells for Measured {
    fn zip(&self, o: &Measured, f: impl Fn(u64, u64) -> u64 + Copy) -> Measured {
        let mut out = self.clone();
        let others = o.sent.as_flattened();
        out.sent.as_flattened_mut().iter_mut().zip(others).for_each(|(a, b)| *a = a.zip(b, f));
        out.spent.iter_mut().zip(&o.spent).for_each(|(a, b)| *a = a.each(b, f));
        out.depth = f(self.depth.into(), o.depth.into()) as u32;
        out
    }
}

/// What such passes cost, counted by the walk of `trefoil cost` without computing them: no time, nothing declared.
///
/// # Errors
/// [`Error::Internal`] for a plan that does not belong to the configuration.
pub fn count(config: &ModelConfig, plan: &Plan, part: Part, context: usize, passes: &[usize]) -> Result<Measured> {
    let model = SecureModel::shape(config.clone(), plan.clone())?;
    let width = if part != Part::Layers && plan.private_embedding { 1 } else { config.hidden_size };
    let counted = |passes: &[usize], work: Work| -> Result<Measured> {
        let world = World::counting(Arc::new(work));
        let pace = Pace::Generation([MAX_BATCH; 3]);
        let run = Run { world: &world, part, pace, profile: Profile::NONE };
        let m = run.execute(&[&model, &model, &model], context, passes, &|_| vec![0; width])?;
        Ok(Measured { wall: Duration::ZERO, spent: m.spent.map(Spent::traffic), declared: Vec::new(), ..m })
    };
    match passes {
        &[prompt] if context == 0 => walk::prefill(config, plan, prompt, &mut |tokens, work| counted(&[tokens], work)),
        _ => counted(passes, Work::default()),
    }
}

/// The ends of channels on which the Client's outputs come.
struct Outputs {
    flags: Receiver<Vec<u64>>,
    _tokens: Receiver<Vec<u64>>,
}

struct Run<'a> {
    world: &'a World,
    part: Part,
    pace: Pace,
    profile: Profile,
}

impl Run<'_> {
    fn execute(
        &self,
        models: &[&SecureModel; 3],
        context: usize,
        passes: &[usize],
        input: &dyn Fn(usize) -> Vec<u64>,
    ) -> Result<Measured> {
        let (inputs, source) = channel();
        let mut position = 0;
        for &tokens in passes {
            let rows = (position..position + tokens).flat_map(input).collect();
            inputs.send(rows).map_err(|_| Error::Internal("the input of a benchmark".into()))?;
            position += tokens;
        }
        let caches: [Mutex<KvCache>; 3] = Role::ALL.map(|role| {
            let mut cache = models[role.index()].cache(context + position);
            cache.preload(role, context);
            Mutex::new(cache)
        });
        let ((token, tokens), (flags, opened)) = (channel(), channel());
        let outputs = Outputs { flags: opened, _tokens: tokens };
        let source = embedding::source(source);
        let ports = ClientPorts { source, token, flags, logits: None, names: Mutex::default() };
        let (gate, clock) = (Gate::default(), Mutex::new((Instant::now(), [Spent::default(); 3])));
        let spent = || Role::ALL.map(|role| self.world.meter(role).ledger().spent());
        let (all, generation) = (
            |_, _| passes.len(),
            |role: Role, before| match self.pace {
                Pace::Generation(room) => next_batch(before, room[role.index()]),
                _ => 1,
            },
        );
        let batches = match self.pace {
            Pace::Generation(_) => Batches { next: &generation, waiting: MAX_BATCH },
            Pace::OneBatch | Pace::Ready => Batches { next: &all, waiting: 0 },
        };
        let out = self.world.run_in_batches(1, passes, batches, |s| {
            let (role, ready) = (s.role(), matches!(self.pace, Pace::Ready));
            let _walked = (ready && role != Role::Owner).then(|| gate.walker());
            if ready && role == Role::Owner && gate.wait() {
                std::thread::sleep(self.world.transfer(&self.profile));
                ledger::forget();
                *locked(&clock) = (Instant::now(), spent());
            }
            if ready {
                s.run_far_ahead();
            }
            let mut cache = locked(&caches[role.index()]);
            self.pass(models[role.index()], s, &mut cache, &ports)
        })?;
        let (begun, before) = *locked(&clock);
        let wall = begun.elapsed();
        let mut spent = spent();
        spent.iter_mut().zip(&before).for_each(|(all, before)| *all = all.since(before));
        check_flags(&ports, &outputs)?;
        let sent = Role::ALL
            .map(|from| Role::ALL.map(|to| if from == to { LinkTotals::default() } else { self.world.sent(from, to) }));
        let frames = Role::ALL.map(|from| Role::ALL.map(|to| self.world.meter(from).frames(to)));
        let depth = match self.part {
            Part::Layers => out.owner.last().map_or(0, |(_, depth)| *depth),
            Part::Whole | Part::Verified => self.world.meter(Role::Client).depth() / passes.len().max(1) as u32,
        };
        Ok(Measured {
            wall,
            sent,
            frames,
            spent,
            depth,
            declared: out.owner.into_iter().map(|(cost, _)| cost).collect(),
        })
    }

    /// One batch at one party: what it declared, and messages in sequence.
    fn pass(
        &self,
        model: &SecureModel,
        s: &mut Session,
        cache: &mut KvCache,
        ports: &ClientPorts,
    ) -> Result<(Cost, u32)> {
        let client = (s.role() == Role::Client).then_some(ports);
        if self.part == Part::Layers {
            return layers(model, s, cache, client);
        }
        let (mut noise, before) = (Gumbel::new(0, 0.0), (s.declared(), s.depth()));
        let noise = (s.role() == Role::Owner).then_some(&mut noise);
        let every = self.part == Part::Verified;
        model.pass(s, cache, PassOptions { ports: client, noise, open_logits: false, every, depths: None })?;
        Ok(since(s, &before.0, before.1))
    }
}

fn since(s: &Session, declared: &Cost, depth: u32) -> (Cost, u32) {
    let mut cost = s.declared();
    cost.subtract(declared);
    (cost, s.depth() - depth)
}

fn layers(
    model: &SecureModel,
    s: &mut Session,
    cache: &mut KvCache,
    client: Option<&ClientPorts>,
) -> Result<(Cost, u32)> {
    let rows = Rows::even(s.tokens(), model.config().hidden_size);
    let k = model.plan().residual_k;
    let mut h = input::input(s, &Scope::new("input"), &rows, k, F, client.map(|p| &p.source))?;
    let mut flags = model.new_flags(s);
    let (declared, before) = (s.declared(), s.depth());
    for index in 0..model.plan().layers.len() {
        h = model.layer(s, index, h, Wanted::Every, (&mut *cache, &mut flags))?;
    }
    cache.advance(s.tokens());
    let depth = s.depth() - before;
    if let Some(ports) = client {
        *locked(&ports.names) = flags.names();
    }
    flags.open(s, &Scope::new("range"), client.map(|p| &p.flags))?;
    Ok((since(s, &declared, before).0, depth))
}

fn check_flags(ports: &ClientPorts, outputs: &Outputs) -> Result<()> {
    let names = locked(&ports.names);
    for bits in outputs.flags.try_iter() {
        if let Some(((layer, quantity), _)) = names.iter().zip(bits).find(|(_, bit)| *bit != 0) {
            return Err(Error::Range { layer: layer.clone(), quantity: (*quantity).into() });
        }
    }
    Ok(())
}

fn locked<T>(m: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}
