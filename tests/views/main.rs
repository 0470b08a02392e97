//! What each party receives, tested: given all that it knows, it is uniform.
//!
//! A test fixes everything that a receiver knows (its two pair keys, its weights or prompt, its part of the preparation)
//! and re-draws what only the other two share: their pair key and, for the Helper, the seed of the preparation, which is
//! a secret of Owner and Client. Then:
//!
//! | receiver | re-drawn | must be |
//! |---|---|---|
//! | Owner | Client-Helper key | every message, every sum (or XOR) of the Client's and the Helper's message of a step, and all differences of messages of one kind: uniform. What the two add up to in the first round of a comparison is a code modulo 2, 3 or 4: uniform over those |
//! | Helper | Owner-Client key, seed | every message (queries, second shares, `A = W - B`) and all differences: uniform |
//! | Client | Owner-Helper key | embedding replies and their XOR: uniform. What is opened to it is NOT uniform, because it holds the mask: it must be `output - mask`, hence the same for every re-draw, and between any two sets of weights it must differ by exactly what the outputs differ |
//!
//! In the base protocols every party receives from the one before it, under the same rule; see `base.rs`. Operations one
//! by one are in `zoo.rs`, whole models in `model.rs`.
//!
//! Messages about public facts (request, control byte, plan) are compared between prompts and weights in `facts.rs`.

#[path = "../support/adapters.rs"]
mod adapters;
mod base;
mod facts;
mod model;
mod tally;
mod zoo;

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use rand_chacha::ChaCha20Rng;
use rand_core::{Rng, SeedableRng};
use trefoil::error::Result;
use trefoil::party::Role;
use trefoil::prf::{Address, AddressLog, Pair, PairKey, PreparationSeed};
use trefoil::session::Session;
use trefoil::world::{Keys, Setup, World};

use tally::{Join, Message};

/// Every label under which a message of a pass travels. A message of another name fails the tests: a new kind must be
/// added here, and is tested from then on.
const LABELS: [&str; 30] = [
    "input.d",
    "open.d",
    "embed.query",
    "embed.owner",
    "embed.helper",
    "embed.d",
    "linear.client",
    "linear.helper",
    "lookup.query",
    "lookup.client",
    "lookup.helper",
    "evaluate.query",
    "evaluate.client",
    "evaluate.helper",
    "lift.query",
    "lift.client",
    "lift.helper",
    "product.shares",
    "product.client",
    "product.helper",
    "cached.shares",
    "cached.client",
    "cached.helper",
    "polynomial.o2",
    "polynomial.client",
    "polynomial.helper",
    "square.shares",
    "square.client",
    "square.helper",
    "scale.shares",
];
/// And those of the base and the delegation.
const MORE: [&str; 17] = [
    "scale.client",
    "scale.helper",
    "normalise.query",
    "normalise.client",
    "normalise.helper",
    "input.x",
    "input_bits.x",
    "reshare.z",
    "open.x",
    "materialise.x2",
    "monomials",
    "msb.bits",
    "shared.d",
    "shared.w2",
    "shared.x2",
    "shared.client",
    "shared.helper",
];

/// Message names by tag.
#[derive(Default)]
pub struct Names(HashMap<u64, Address>);

impl Names {
    /// All labels in every scope in which some stream was taken, and in those of `others`, in which none is.
    fn from(log: &AddressLog, others: &[&str]) -> Names {
        let mut names = Names::default();
        for taken in log.lock().unwrap().iter() {
            let at = &taken.address;
            names.insert(at);
            for path in others {
                names.insert(&Address { layer: Address::NO_LAYER, path: (*path).into(), ..at.clone() });
            }
        }
        names
    }

    fn insert(&mut self, at: &Address) {
        for label in LABELS.into_iter().chain(MORE) {
            let step = Address { label, ..at.clone() };
            let before = self.0.insert(step.tag(), step.clone());
            assert!(before.is_none_or(|b| b == step), "two names with one tag");
        }
    }
}

/// Reproducible keys that are re-drawn.
struct Draw(ChaCha20Rng);

impl Draw {
    fn new(seed: u64) -> Draw {
        Draw(ChaCha20Rng::seed_from_u64(seed))
    }

    fn key(&mut self) -> PairKey {
        let mut bytes = [0; 16];
        self.0.fill_bytes(&mut bytes);
        PairKey::new(bytes)
    }

    fn seed(&mut self) -> PreparationSeed {
        let mut bytes = [0; 32];
        self.0.fill_bytes(&mut bytes);
        PreparationSeed::from_bytes(bytes)
    }
}

/// The pair that `receiver` is not in.
fn others(receiver: Role) -> Pair {
    Pair::of(receiver.next(), receiver.prev()).unwrap()
}

/// Number of the first pass.
const FIRST: u64 = 3;

/// What a party received, in order: tags and bytes.
type Got = Vec<(u64, Vec<u8>)>;

/// Runs `program` and returns what `receiver` got, in order; the log is filled if there is one.
fn observe(
    receiver: Role,
    keys: &Keys,
    passes: &[usize],
    log: Option<&AddressLog>,
    program: impl Fn(&mut Session) -> Result<()> + Sync,
) -> Got {
    let view = Arc::new(Mutex::new(Vec::new()));
    let mut setup = Setup { addresses: log.cloned(), ..Setup::default() };
    setup.views[receiver.index()] = Some(Arc::clone(&view));
    World::new(keys.clone(), &setup).run(FIRST, passes, program).unwrap();
    let got = std::mem::take(&mut *view.lock().unwrap());
    got.into_iter().map(|(_, tag, bytes)| (tag, bytes)).collect()
}

/// With their names; `width` knows the elements of some.
fn named(names: &Names, got: Got, width: impl Fn(&Address) -> Option<u32>) -> Vec<Message> {
    got.into_iter()
        .map(|(tag, bytes)| {
            let step = names.0.get(&tag).expect("a message of unknown kind: add its label to the list").clone();
            Message { k: width(&step), step, bytes }
        })
        .collect()
}

/// The Client's and the Helper's message of every step as the Owner puts them together.
fn combined(run: &[Message]) -> Vec<Message> {
    let mut out = Vec::new();
    for a in run {
        let (partner, label, join) = match a.step.label {
            "linear.client" => ("linear.helper", "linear, both", Join::Sum),
            "lookup.client" => ("lookup.helper", "lookup, both", Join::Xor),
            "evaluate.client" => ("evaluate.helper", "evaluate, sum", Join::Sum),
            "normalise.client" => ("normalise.helper", "normalise, sum", Join::Sum),
            "lift.client" => ("lift.helper", "lift, both", Join::Xor),
            "product.client" => ("product.helper", "product, both", Join::Sum),
            "cached.client" => ("cached.helper", "cached, both", Join::Sum),
            "polynomial.client" => ("polynomial.helper", "polynomial, both", Join::Sum),
            "square.client" => ("square.helper", "square, both", Join::Sum),
            "scale.client" => ("scale.helper", "scale, both", Join::Sum),
            "shared.client" => ("shared.helper", "shared, both", Join::Sum),
            "embed.owner" => ("embed.helper", "embed, both", Join::Xor),
            _ => continue,
        };
        let step = Address { label: partner, ..a.step.clone() };
        let b = run.iter().find(|m| m.step == step).expect("both halves of a step");
        out.push(a.with(b, label, join));
        match a.step.label {
            "evaluate.client" => out.push(a.with(b, "evaluate, difference", Join::Difference)),
            "normalise.client" => out.push(a.with(b, "normalise, difference", Join::Difference)),
            _ => {}
        }
    }
    out
}
