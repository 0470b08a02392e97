//! What the tests of the protocols share: inputs of the Client, a run of three parties whose traffic is compared with what
//! the operations declared, and exact arithmetic to compare results with.
#![allow(dead_code, clippy::missing_panics_doc)] // every test file uses a part of it

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::channel;

use trefoil::error::Result;
use trefoil::net::meter::LinkTotals;
use trefoil::party::Role;
use trefoil::plan::cost::{Cost, Traffic};
use trefoil::protocol::{embedding, input};
use trefoil::ring;
use trefoil::session::{Scope, Session};
use trefoil::share::{Masked, Rows};
use trefoil::world::{World, reveal};

/// Number of the first pass of a run, unless a test has its own.
pub const FIRST: u64 = 5;

/// splitmix64: reproducible words for large vectors, where proptest's own strategies would be slow.
pub struct Random(pub u64);

impl Random {
    pub fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform words of `k` bits.
    pub fn words(&mut self, n: usize, k: u32) -> Vec<u64> {
        (0..n).map(|_| self.word() & ring::mask(k)).collect()
    }

    /// `[-2^(bits-1), 2^(bits-1))` in ring `k`, the edges among them.
    pub fn signed(&mut self, n: usize, bits: u32, k: u32) -> Vec<u64> {
        let half = 1u64 << (bits - 1);
        let edges = [0, 1, u64::MAX, half - 1, half.wrapping_neg(), half / 2, (half / 2).wrapping_neg()];
        let rest = (edges.len()..n).map(|_| ring::signed(self.word(), bits) as u64).collect::<Vec<_>>();
        edges.into_iter().take(n).chain(rest).map(|v| v & ring::mask(k)).collect()
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.word() % n as u64) as usize
    }
}

/// Values that the Client will give, laid out over passes.
pub struct Given {
    source: input::InputSource,
    first: u64,
    passes: Vec<usize>,
    /// Elements of every token of the run.
    widths: Vec<usize>,
    k: u32,
    f: u32,
}

impl Given {
    /// `values` over `passes[i]` tokens each, the same number of elements per token.
    pub fn even(values: &[u64], passes: &[usize], k: u32, f: u32) -> Given {
        let tokens: usize = passes.iter().sum();
        assert_eq!(values.len() % tokens, 0, "{} values over {tokens} tokens", values.len());
        Self::ragged(values, passes, &vec![values.len() / tokens; tokens], k, f)
    }

    /// `widths[i]` elements for token `i` of the run.
    pub fn ragged(values: &[u64], passes: &[usize], widths: &[usize], k: u32, f: u32) -> Given {
        let (send, receive) = channel();
        let (mut token, mut at) = (0, 0);
        for &n in passes {
            let len: usize = widths[token..token + n].iter().sum();
            send.send(values[at..at + len].to_vec()).unwrap();
            (token, at) = (token + n, at + len);
        }
        assert_eq!(at, values.len());
        Given {
            source: embedding::source(receive),
            first: FIRST,
            passes: passes.to_vec(),
            widths: widths.to_vec(),
            k,
            f,
        }
    }

    /// For a run whose first pass has another number.
    pub fn starting_at(self, first: u64) -> Given {
        Given { first, ..self }
    }

    /// Layout of what `s` walks.
    pub fn rows(&self, s: &Session) -> Rows {
        let pass = (s.passes()[0].number - self.first) as usize;
        let from: usize = self.passes[..pass].iter().sum();
        Rows::ragged(self.widths[from..from + s.tokens()].iter().copied())
    }

    /// Where the Client takes its values from.
    pub fn source(&self, s: &Session) -> Option<&input::InputSource> {
        (s.role() == Role::Client).then_some(&self.source)
    }

    /// The input operation.
    pub fn share(&self, s: &mut Session, name: &str) -> Result<Masked> {
        let rows = self.rows(s);
        input::input(s, &Scope::new(name), &rows, self.k, self.f, self.source(s))
    }
}

/// What a program of three parties gave.
pub struct Ran {
    /// Ring elements of each result.
    pub values: Vec<Vec<u64>>,
    /// Ring of each result.
    pub k: Vec<u32>,
    /// Fraction bits of each result.
    pub f: Vec<u32>,
    pub declared: Cost,
    /// Longest chain of online messages.
    pub depth: u32,
    pub sent: [[LinkTotals; 3]; 3],
}

impl Ran {
    /// The `i`-th result as signed integers.
    pub fn signed(&self, i: usize) -> Vec<i64> {
        self.values[i].iter().map(|&v| ring::signed(v, self.k[i])).collect()
    }

    /// The only result.
    pub fn only(&self) -> &[u64] {
        assert_eq!(self.values.len(), 1);
        &self.values[0]
    }
}

fn totals(world: &World) -> [[LinkTotals; 3]; 3] {
    Role::ALL.map(|from| Role::ALL.map(|to| world.sent(from, to)))
}

/// A new seed for every world, so that no two cases share masks; printed by [`World::seeded`].
pub fn world() -> World {
    static SEED: AtomicU64 = AtomicU64::new(1);
    World::seeded(SEED.fetch_add(1, Ordering::Relaxed))
}

/// Runs `program` in a new world, see [`run_in`].
pub fn run(passes: &[usize], program: impl Fn(&mut Session) -> Result<Vec<Masked>> + Sync) -> Ran {
    run_in(&world(), FIRST, passes, program)
}

/// Runs `program` at all parties, reveals its results with either holder's masks, and asserts that every directed link
/// carried exactly what the Owner's walk declared: bytes and messages of both lanes.
pub fn run_in(
    world: &World,
    first: u64,
    passes: &[usize],
    program: impl Fn(&mut Session) -> Result<Vec<Masked>> + Sync,
) -> Ran {
    let before = totals(world);
    let out = world.run(first, passes, |s| Ok((program(s)?, s.declared()))).unwrap();
    let mut sent = totals(world);
    let declared = out.owner.last().unwrap().1;
    for from in Role::ALL {
        for to in Role::ALL {
            let t = &mut sent[from.index()][to.index()];
            *t = *t - before[from.index()][to.index()];
            let online = Traffic { bytes: t.online_bytes, messages: t.messages };
            let ahead = Traffic { bytes: t.ahead_bytes, messages: t.ahead_messages };
            assert_eq!(declared.online(from, to), online, "declared and counted, online, {from} to {to}");
            assert_eq!(declared.ahead(from, to), ahead, "declared and counted, ahead, {from} to {to}");
        }
    }
    let (client, helper) = (out.client.0, out.helper.0);
    let values = (0..client.len())
        .map(|i| {
            let owner: Vec<Masked> = out.owner.iter().map(|o| o.0[i].clone()).collect();
            let value = reveal(&owner, &client[i]).unwrap();
            assert_eq!(value, reveal(&owner, &helper[i]).unwrap(), "client and helper hold the same masks");
            for d in &owner {
                assert_eq!((d.k(), d.f()), (client[i].k(), client[i].f()), "ring and fraction bits agree");
            }
            let tokens = owner.iter().flat_map(|d| (0..d.rows().tokens()).map(|t| d.rows().row(t).len()));
            assert!(tokens.eq((0..client[i].rows().tokens()).map(|t| client[i].rows().row(t).len())), "layouts agree");
            value
        })
        .collect();
    let depth = Role::ALL.map(|r| world.meter(r).depth()).into_iter().max().unwrap();
    Ran {
        values,
        k: client.iter().map(Masked::k).collect(),
        f: client.iter().map(Masked::f).collect(),
        declared,
        depth,
        sent,
    }
}

/// Asserts that a run of ONE pass, whose inputs were one message each and given side by side, cost what the operation's
/// own `cost` says, and took as many messages in sequence.
pub fn assert_cost(name: &str, ran: &Ran, inputs: &[&Given], cost: Cost) {
    let mut all = cost;
    for given in inputs {
        assert_eq!(given.passes.len(), 1);
        all = all.beside(input::cost(given.widths.iter().sum(), given.k));
    }
    all.depth = cost.depth + u32::from(!inputs.is_empty());
    for from in Role::ALL {
        for to in Role::ALL {
            assert_eq!(ran.declared.online(from, to), all.online(from, to), "{name}: online, {from} to {to}");
            assert_eq!(ran.declared.ahead(from, to), all.ahead(from, to), "{name}: ahead, {from} to {to}");
        }
    }
    assert_eq!(ran.depth, all.depth, "{name}: messages in sequence, the inputs' one included");
    let [up, down] = [(Role::Owner, Role::Helper), (Role::Helper, Role::Owner)].map(|(a, b)| cost.online(a, b).bytes);
    eprintln!(
        "{name}: {up} bytes O->H, {down} H->O, {} online in all, {} ahead, {} messages in sequence",
        cost.online_bytes(),
        cost.ahead_bytes(),
        cost.depth
    );
}
