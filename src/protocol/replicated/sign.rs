//! The exact sign of values in any ring of 1 to 64 bits, and what follows from it: comparison and ReLU.
//!
//! This is the general operation and the cross-check of the masked engine's lookup comparison (`protocol::compare`),
//! which is cheaper in rounds for narrow windows.

use super::boolean::{reshare_bits, select, select_cost};
use super::{declare, round};
use crate::error::{PeerFault, Result};
use crate::net::{Lane, blame};
use crate::party::Role;
use crate::plan::cost::Cost;
use crate::prf::Pair;
use crate::ring::{self, pack};
use crate::session::{Scope, Session};
use crate::share::bits::{Word, evens};
use crate::share::{Bits, Replicated};

/// One scope per level of the adder, the lowest first.
const LEVELS: [&str; 6] = ["level1", "level2", "level3", "level4", "level5", "level6"];

/// How the `k - 1` bits below the top are paired up.
#[derive(Clone, Copy)]
struct Plan {
    k: u32,
    /// A zero put below the lowest bit where their number is odd: it neither generates nor receives a carry.
    pad: u32,
    /// Their number after that; 0 in a ring of one bit.
    wide: u32,
}

impl Plan {
    fn new(k: u32) -> Plan {
        let low = k - 1;
        Plan { k, pad: low % 2, wide: low + low % 2 }
    }

    /// Bits of the products of pairs that do not stand on the padding.
    fn pairs(self) -> u32 {
        self.wide / 2 - self.pad
    }

    /// The bits below the top, padded.
    fn low(self, v: u64) -> u64 {
        (v & ring::mask(self.k) >> 1) << self.pad
    }

    /// For each pair of bits, their product.
    fn products(self, v: u64) -> u64 {
        high(self.low(v)) & evens(self.low(v))
    }

    /// Bits per element that each AND round of the tree sends.
    fn rounds(self) -> impl Iterator<Item = u32> {
        std::iter::successors(Some(self.wide), |w| (*w > 2).then(|| (w / 2).next_multiple_of(2)))
            .filter(|w| *w > 0)
            .map(|w| w - 1)
    }
}

/// The bits at odd places, side by side.
fn high(v: u64) -> u64 {
    evens(v >> 1)
}

/// What [`msb`] costs for `n` elements.
#[must_use]
pub fn msb_cost(n: usize, k: u32) -> Cost {
    let plan = Plan::new(k);
    let up = pack::packed_len(n, k) + pack::packed_len(n, plan.pairs());
    let give = round(Cost::default().send(Role::Owner, Role::Helper, up * 8, 1));
    plan.rounds().fold(give, |c, width| c.then(super::reshare_cost(n, width)))
}

/// The top bit of each element, one shared bit: 1 for the negative ones. Exact for every value of every ring.
///
/// `x = d + r` with `d = x1 + x2` known to the Owner and `r = x0` to the two others, so two-operand addition suffices.
/// The top bit is `d ^ r ^ carry`; the carry comes from a tree over (generate, propagate) pairs of groups of bits. The
/// tree's first level takes no round of its own: with `d'`, `r'` the lower bits of the pairs,
///
/// ```text
/// G = d r ^ (d ^ r) d' r' = (d)(r) ^ (d d')(r') ^ (d')(r r')
/// P = (d ^ r)(d' ^ r')    = (d)(r') ^ (d')(r) ^ d d' ^ r r'
/// ```
///
/// are bilinear in what the Owner gives (`d`, and `d d'` for each pair) and what the holders know. Later levels:
/// `G = g ^ p g'`, `P = p p'`, without the lowest `P`, which nothing needs.
///
/// | | Owner | Client | Helper |
/// |---|---|---|---|
/// | knows | `d` | `r` | `r` |
/// | round 1 | sends `d ^ F`, `d d' ^ F'` to the Helper | (has `F`, `F'`) | |
/// | each later round | ANDs, sends to the Client | to the Helper | to the Owner |
///
/// `F`, `F'` = PRF(Owner, Client). Rounds: `1 + ceil(log2(k - 1))`, 7 at `k = 64` (2 at `k = 2`, 1 at `k = 1`). Bits
/// per element: `k + (k - 1) / 2` Owner to Helper, then fewer than `2k` per party (120 at `k = 64`; prefix adders for
/// all sum bits take `k log2 k`). Private: the Helper receives the Owner's bits under streams that it lacks, the rest
/// is under zero sharings. Exact. Source: ABY3 (CCS 2018), §5.3, bit extraction with a parallel-prefix adder, reduced
/// to its top carry; the fused first level is a multi-input AND as in ABY2.0 (USENIX Security 2021).
///
/// # Errors
/// [`crate::Error::Peer`], [`crate::Error::Reuse`].
pub fn msb(s: &mut Session, scope: &Scope, x: &Replicated) -> Result<Bits> {
    let (n, k, role, shape) = (x.len(), x.k(), s.role(), x.shape());
    let plan = Plan::new(k);
    declare(s, msb_cost(n, k));

    let (owner, holders) = operands(s, scope, x, plan)?;
    let top = |i: usize| owner.d[i].xor(holders(i)).map(|w| w >> (k - 1));
    if plan.wide == 0 {
        let words: Vec<Word> = (0..n).map(top).collect();
        return Ok(Bits::from_words(role, &words, 1, shape.to_vec()));
    }

    // The first level, from the Owner's monomials times the holders'.
    let mut half = plan.wide / 2;
    let parts = |i: usize| {
        let (d, r) = (owner.d[i].map(|w| plan.low(w)), holders(i));
        let (a, a_low) = (d.map(high), d.map(evens));
        let (b, b_low) = (r.map(|w| high(plan.low(w))), r.map(|w| evens(plan.low(w))));
        let (aa, bb) = (owner.dd[i].map(|w| w << plan.pad), r.map(|w| plan.products(w)));
        (a, a_low, aa, b, b_low, bb)
    };
    let z = (0..n)
        .map(|i| {
            let (a, a_low, aa, b, b_low, bb) = parts(i);
            let generate = a.and(b) ^ aa.and(b_low) ^ a_low.and(bb);
            let propagate = a.and(b_low) ^ a_low.and(b);
            joined(generate, propagate, half)
        })
        .collect();
    let z = reshare_bits(s, &scope.at(LEVELS[0]), z, plan.wide - 1, shape)?;
    let mut groups: Vec<(Word, Word)> = z
        .words()
        .enumerate()
        .map(|(i, z)| {
            let (generate, propagate) = split(z, half);
            let (_, _, aa, _, _, bb) = parts(i);
            (generate, propagate.xor(aa).xor(bb))
        })
        .collect();

    // The other levels.
    for level in &LEVELS[1..] {
        if half == 1 {
            break;
        }
        let pad = half % 2;
        let wide = half + pad;
        half = wide / 2;
        groups.iter_mut().for_each(|(g, p)| (*g, *p) = (g.map(|w| w << pad), p.map(|w| w << pad)));
        let z = groups
            .iter()
            .map(|(g, p)| {
                let (p_high, p_low) = (p.map(high), p.map(evens));
                joined(p_high.and(g.map(evens)), p_high.and(p_low), half)
            })
            .collect();
        let z = reshare_bits(s, &scope.at(level), z, wide - 1, shape)?;
        for ((g, p), z) in groups.iter_mut().zip(z.words()) {
            let (generate, propagate) = split(z, half);
            (*g, *p) = (g.map(high).xor(generate), propagate);
        }
    }
    let words: Vec<Word> = groups.iter().enumerate().map(|(i, (carry, _))| top(i).xor(*carry)).collect();
    Ok(Bits::from_words(role, &words, 1, shape.to_vec()))
}

/// `half` generates and above them all propagates but the lowest.
fn joined(generate: u64, propagate: u64, half: u32) -> u64 {
    (generate & ring::mask(half)) | (propagate & ring::mask(half)) >> 1 << half
}

/// The reverse, the lowest propagate 0.
fn split(z: Word, half: u32) -> (Word, Word) {
    (z.map(|w| w & ring::mask(half)), z.map(|w| w >> half << 1 & ring::mask(half)))
}

/// The Owner's shared bits: `d`, and the products of its pairs.
struct Given {
    d: Vec<Word>,
    dd: Vec<Word>,
}

/// The first round. Gives shares of the Owner's bits, and `r` as a sharing that needs no message because both its
/// holders know it.
fn operands<'a>(
    s: &mut Session,
    scope: &Scope,
    x: &'a Replicated,
    plan: Plan,
) -> Result<(Given, impl Fn(usize) -> Word + 'a)> {
    let (n, k, pairs, role) = (x.len(), plan.k, plan.pairs(), s.role());
    let pass = s.the_pass()?;
    // Sections of one message; an empty one takes no stream.
    let sections = [("msb.d", k), ("msb.dd", pairs)];
    let stream = |s: &mut Session, i: usize| -> Result<Vec<u64>> {
        let (label, width) = sections[i];
        if width == 0 { Ok(vec![0; n]) } else { Ok(s.stream(Pair::OwnerClient, scope, pass, label)?.words(n, width)) }
    };
    let words = |next: Vec<u64>, prev: Vec<u64>| -> Vec<Word> {
        next.into_iter().zip(prev).map(|(next, prev)| Word { next, prev }).collect()
    };
    let [d, dd] = match role {
        Role::Owner => {
            let mut payload = Vec::new();
            let mut shared = [const { Vec::new() }; 2];
            for (i, out) in shared.iter_mut().enumerate() {
                let with_client = stream(s, i)?;
                let width = sections[i].1;
                let own = x.next().iter().zip(x.prev()).map(|(a, b)| a.wrapping_add(*b));
                let with_helper: Vec<u64> = own
                    .zip(&with_client)
                    .map(|(d, f)| match i {
                        0 => d & ring::mask(k) ^ f,
                        _ => plan.products(d) >> plan.pad ^ f,
                    })
                    .collect();
                if width > 0 {
                    pack::pack_into(&with_helper, width, &mut payload);
                }
                *out = words(with_client, with_helper);
            }
            s.send_online(Role::Helper, scope, "msb.bits", payload)?;
            shared
        }
        Role::Client => [words(vec![0; n], stream(s, 0)?), words(vec![0; n], stream(s, 1)?)],
        Role::Helper => {
            let step = scope.address(pass, "msb.bits");
            let lens = sections.map(|(_, width)| pack::packed_len(n, width));
            let bytes = s.links().recv(Role::Owner, Lane::Online, &step, lens[0] + lens[1])?;
            let parse = |bytes: &[u8], width| {
                let fault = PeerFault::Malformed("padding bits set");
                match width {
                    0 => Ok(vec![0; n]),
                    _ => pack::unpack(bytes, n, width).ok_or_else(|| blame(Role::Owner, &step, fault)),
                }
            };
            let (first, second) = bytes.split_at(lens[0]);
            [words(parse(first, k)?, vec![0; n]), words(parse(second, pairs)?, vec![0; n])]
        }
    };
    let holders = move |i: usize| match role {
        Role::Owner => Word { next: 0, prev: 0 },
        Role::Client => Word { next: x.next()[i], prev: 0 },
        Role::Helper => Word { next: 0, prev: x.prev()[i] },
    };
    Ok((Given { d, dd }, holders))
}

/// Whether `x < y`, one shared bit per element: the [`msb`] of the difference, at its cost. Exact whenever `x - y` is
/// in `[-2^(k-1), 2^(k-1))`.
///
/// # Errors
/// [`crate::Error::Shape`], [`crate::Error::Peer`], [`crate::Error::Reuse`].
pub fn less_than(s: &mut Session, scope: &Scope, x: &Replicated, y: &Replicated) -> Result<Bits> {
    msb(s, scope, &x.sub(y)?)
}

/// What [`relu`] costs for `n` elements. Its depth counts rounds: the causal chain is one message shorter where the last
/// message of the sign's longest chain does not end at the Owner, who begins the selection.
#[must_use]
pub fn relu_cost(n: usize, k: u32) -> Cost {
    msb_cost(n, k).then(select_cost(n, k))
}

/// `max(x, 0)`: [`msb`], then [`select`] by the inverted bit. 9 rounds at `k = 64`. Exact, private as its
/// parts.
///
/// # Errors
/// [`crate::Error::Peer`], [`crate::Error::Reuse`].
pub fn relu(s: &mut Session, scope: &Scope, x: &Replicated) -> Result<Replicated> {
    let negative = msb(s, &scope.at("msb"), x)?;
    select(s, &scope.at("select"), &negative.inverted(), x)
}
