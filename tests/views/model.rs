//! Whole private models: what each party receives from prompt to token.

use std::sync::Mutex;
use std::sync::mpsc::channel;

use trefoil::model::calibrate::{bounds, inputs, ranges};
use trefoil::model::preparation::split_weights;
use trefoil::model::prepare::Prepared;
use trefoil::model::rounding::Choice;
use trefoil::model::sections::{Section, sections};
use trefoil::model::secure::{ClientPorts, PassOptions, SecureModel, logit_format};
use trefoil::model::{Arch, ModelConfig, Weights};
use trefoil::net::shape::Profile;
use trefoil::party::Role;
use trefoil::plan::{F, Fractions, Module, Plan};
use trefoil::prf::{Address, AddressLog, PreparationSeed};
use trefoil::protocol::embedding::source;
use trefoil::ring::{self, fixed, pack};
use trefoil::world::Keys;

use crate::adapters::adapt;
use crate::tally::{Message, Residues, Tally};
use crate::{Draw, Got, Names, combined, named, observe, others};

/// A prefill of three tokens and two decode passes.
const PASSES: [usize; 3] = [3, 1, 1];
const RUNS: u32 = 300;
/// Scopes in which messages travel but no stream is taken.
pub const OPENED: [&str; 3] = ["head.token", "head.logits", "range.flags.open"];

/// A tiny Llama: grouped queries, or one key head per query head.
pub fn llama(num_kv_heads: usize, num_layers: usize) -> ModelConfig {
    ModelConfig { num_kv_heads, ..ModelConfig::llama(16, 24, num_layers, 2, 32, 16) }
}

/// A tiny Qwen3: grouped queries, norms on queries and keys.
pub fn qwen3() -> ModelConfig {
    ModelConfig { arch: Arch::Qwen3, qk_norm: true, ..llama(1, 1) }
}

/// The public plan of weights, as the Owner makes it.
pub fn plan_of(w: &Weights, private_layers: Option<usize>) -> Plan {
    let (first, private_embedding) = split_weights(w, private_layers).unwrap();
    let fractions = match w.first_adapted().is_some() {
        true => Choice::new(w, first, private_embedding).unwrap().fractions,
        false => Fractions::least(w.config.num_layers - first),
    };
    let ranges = ranges(w, first, &inputs(&w.config, w.config.max_positions, None));
    let bounds = bounds(w, first, &fractions).unwrap();
    // Here passes of different lengths are walked together, which no request does and norms that go by their length refuse.
    trefoil::plan::plan(&w.config, first, private_embedding, &bounds, &ranges).unwrap().at(&w.config, Profile::NONE)
}

/// What the Helper gets before any session.
fn helper_words(owner: &Prepared, seed: &PreparationSeed) -> Vec<Vec<u64>> {
    let mut words = Vec::new();
    let put = &mut |w| {
        words.push(w);
        Ok(())
    };
    owner.helper_words(seed, put).unwrap();
    words
}

/// A prepared model at its three parties.
struct Trio {
    models: [SecureModel; 3],
}

impl Trio {
    fn new(w: &Weights, plan: &Plan, seed: &PreparationSeed) -> Trio {
        let owner = Prepared::owner(w, plan, seed).unwrap();
        let words = helper_words(&owner, seed);
        let all = sections(&w.config, plan).unwrap();
        let mut known = words.iter().zip(&all).filter(|(_, s)| s.public).map(|(w, _)| w.clone());
        let client = Prepared::client(&w.config, plan, seed, &mut |_| Ok(known.next().unwrap())).unwrap();
        let mut next = words.iter();
        let helper = Prepared::helper(&w.config, plan, &mut |_| Ok(next.next().unwrap().clone())).unwrap();
        let model = |parts| SecureModel::new(w.config.clone(), plan.clone(), parts);
        Trio { models: [model(owner), model(client), model(helper)] }
    }

    /// What the Client gives: small hidden states, or tokens.
    fn inputs(&self) -> Vec<Vec<u64>> {
        let m = &self.models[0];
        let (n, k) = (m.config().hidden_size, m.plan().residual_k);
        PASSES
            .iter()
            .enumerate()
            .map(|(pass, &tokens)| match m.plan().private_embedding {
                true => (0..tokens).map(|i| (7 * i + 3 * pass) as u64 % 32).collect(),
                false => {
                    (0..tokens * n).map(|i| fixed::encode(((i + 5 * pass) % 9) as f64 * 0.01 - 0.03, F, k)).collect()
                }
            })
            .collect()
    }

    /// One run: what `receiver` got, and what was opened to the Client (tokens, flags, logits; pass by pass).
    fn run(
        &self,
        receiver: Role,
        keys: &Keys,
        open_logits: bool,
        log: Option<&AddressLog>,
    ) -> (Got, [Vec<Vec<u64>>; 3]) {
        let (input, source_end) = channel();
        self.inputs().into_iter().for_each(|x| input.send(x).unwrap());
        let ((token, tokens), (flag, flags), (logit, logits)) = (channel(), channel(), channel());
        let ports = ClientPorts {
            source: source(source_end),
            token,
            flags: flag,
            logits: open_logits.then_some(logit),
            names: Mutex::default(),
        };
        let caches = self.models.each_ref().map(|m| Mutex::new(m.cache(8)));
        let got = observe(receiver, keys, &PASSES, log, |s| {
            let me = s.role().index();
            let ports = (s.role() == Role::Client).then_some(&ports);
            let options = PassOptions { ports, noise: None, open_logits, every: false, depths: None };
            self.models[me].pass(s, &mut caches[me].lock().unwrap(), options)
        });
        (got, [tokens, flags, logits].map(|r| r.try_iter().collect()))
    }
}

/// Codes of a comparison in the tournament: 2, 3, ..., 3, 4 states.
fn states(plan: &Plan) -> Vec<u64> {
    let chunks = (plan.head.logit_k + 1).div_ceil(4) as usize;
    let mut states = vec![3; chunks];
    (states[0], states[chunks - 1]) = (2, 4);
    states
}

/// The Helper's part of a preparation, by the seed that it lacks.
fn preparation_shows_nothing(what: &str, weights: &Weights, plan: &Plan) {
    let (mut tally, mut draw) = (Tally::default(), Draw::new(50));
    let sections = sections(&weights.config, plan).unwrap();
    for _ in 0..RUNS {
        let seed = draw.seed();
        let words = helper_words(&Prepared::owner(weights, plan, &seed).unwrap(), &seed);
        // Packed to the bits of each matrix's ring, as they are sent.
        let message = |(i, (words, section)): (usize, (&Vec<u64>, &Section))| Message {
            step: Address { pass: i as u64, layer: Address::NO_LAYER, path: "prepare".into(), label: "prepare.words" },
            bytes: pack::pack(words, section.bits()),
            k: Some(section.bits()),
        };
        // Of an adapter's base the Helper gets what everybody has.
        let private = words.iter().zip(&sections).enumerate().filter(|(_, (_, section))| !section.public);
        tally.add(&private.map(message).collect::<Vec<_>>());
    }
    tally.assert_uniform(&format!("{what}, helper, preparation"));
}

/// The views of Owner and Helper of one model. In its sessions the Helper's part of the preparation is fixed, and with the
/// weights the seed; what its seed hides is looked at apart.
fn nothing_to_see(what: &str, weights: &Weights, private_layers: Option<usize>) {
    let plan = plan_of(weights, private_layers);
    preparation_shows_nothing(what, weights, &plan);
    let trio = Trio::new(weights, &plan, &Draw::new(29).seed());
    for receiver in [Role::Owner, Role::Helper] {
        let (keys, mut draw, log) = (Keys::seeded(20), Draw::new(30), AddressLog::default());
        let (mut tally, mut codes, mut names): (_, Vec<Residues>, _) = (Tally::default(), Vec::new(), Names::default());
        for i in 0..RUNS {
            let keys = keys.clone().with(others(receiver), draw.key());
            let (got, _) = trio.run(receiver, &keys, false, (i == 0).then_some(&log));
            if i == 0 {
                names = Names::from(&log, &OPENED);
            }
            let mut run = named(&names, got, |_| None);
            if receiver == Role::Owner {
                let (chunks, both): (Vec<_>, Vec<_>) =
                    combined(&run).into_iter().partition(|m| m.step.path.ends_with("compare.chunks"));
                codes.resize_with(chunks.len(), || Residues::new(states(&plan)));
                for (codes, m) in codes.iter_mut().zip(&chunks) {
                    codes.add(&pack::unpack(&m.bytes, 4 * m.bytes.len(), 2).unwrap());
                }
                run.extend(both);
            }
            tally.add(&run);
        }
        tally.assert_uniform(&format!("{what}, {receiver}"));
        codes.iter().for_each(|c| c.assert_uniform(&format!("{what}, owner, codes of comparisons")));
    }
}

#[test]
fn llama_shows_nothing() {
    nothing_to_see("Llama", &Weights::random(llama(2, 2), 3).unwrap(), Some(2));
}

#[test]
fn adapters_over_a_public_base_show_nothing() {
    let mut weights = Weights::random(llama(1, 1), 3).unwrap();
    adapt(&mut weights.layers[0], &Module::ALL, 2);
    nothing_to_see("Llama, adapters", &weights, Some(1));
}

#[test]
fn qwen3_with_a_private_embedding_shows_nothing() {
    nothing_to_see("Qwen3, private embedding", &Weights::random(qwen3(), 3).unwrap(), None);
}

/// With its masks fixed, what is opened to the Client is the output and nothing else: between any two sets of weights the
/// messages differ by exactly what the outputs differ.
#[test]
fn the_client_sees_its_output() {
    let config = ModelConfig { num_kv_heads: 1, ..llama(1, 1) };
    let mut draw = Draw::new(40);
    let (keys, seed, log) = (Keys::seeded(41), draw.seed(), AddressLog::default());
    let first = Weights::random(config.clone(), 1).unwrap();
    let plan = plan_of(&first, None);
    let mut names = Names::default();
    let (mut masks, mut seen) = (None, std::collections::BTreeSet::new());
    for i in 0..12 {
        let weights = Weights::random(config.clone(), 1 + i).unwrap();
        if plan_of(&weights, None) != plan {
            continue;
        }
        let trio = Trio::new(&weights, &plan, &seed);
        let keys = keys.clone().with(others(Role::Client), draw.key());
        let (got, [tokens, flags, logits]) = trio.run(Role::Client, &keys, true, (i == 0).then_some(&log));
        if i == 0 {
            names = Names::from(&log, &OPENED);
        }
        let run = named(&names, got, |_| None);
        let opened = |path: &str, values: &[Vec<u64>], k: u32| -> Vec<Vec<u64>> {
            let messages: Vec<_> = run.iter().filter(|m| m.step.path == path).collect();
            assert_eq!((messages.len(), values.len()), (PASSES.len(), PASSES.len()), "{path}");
            let mask = |(m, x): (&&Message, &Vec<u64>)| {
                let d = pack::unpack(&m.bytes, x.len(), k).unwrap();
                x.iter().zip(d).map(|(x, d)| x.wrapping_sub(d) & ring::mask(k)).collect()
            };
            messages.iter().zip(values).map(mask).collect()
        };
        let all = [
            opened("head.token", &tokens, 24),
            opened("range.flags.open", &flags, 1),
            opened("head.logits", &logits, logit_format(&plan).1),
        ];
        seen.insert(tokens);
        assert_eq!(*masks.get_or_insert(all.clone()), all, "the same masks in every run");
    }
    assert!(seen.len() > 3, "different weights, different tokens: {seen:?}");
}
