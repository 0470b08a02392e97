//! Operations on shared bits: input, AND, opening, and the way back to the ring.
//!
//! As in [`super`], with exclusive or for the sum and AND for the product; an element of `width` bits takes `width`
//! bits on the wire. [`inject`] and [`select`] multiply a shared bit into the ring.
//!
//! Both see a bit as `b = t ^ c`, where the Owner knows `t` (its two components) and both holders know `c` (the
//! component that the Owner lacks), so `b = t + c - 2 t c` is linear in what the Owner gives times what the holders
//! know. The Owner gives shares of its monomials, the holders multiply them by theirs: two messages, whatever the
//! degree.

use ndarray::ArrayD;

use super::{
    Group, Labels, array, declare, elements, give_words, open_words, open_words_to, pair_words, reshare_words, round,
    take_input,
};
use crate::error::{PeerFault, Result};
use crate::net::{Lane, blame};
use crate::party::Role;
use crate::plan::cost::Cost;
use crate::prf::Pair;
use crate::ring::{self, pack};
use crate::session::{Scope, Session};
use crate::share::replicated::{check_width, with_next, with_prev};
use crate::share::{Bits, Replicated};

const RANDOM_BITS: Labels = Labels {
    owner_client: "random_bits.oc",
    client_helper: "random_bits.ch",
    owner_helper: "random_bits.oh",
    message: "",
};

const INPUT_BITS: Labels = Labels {
    owner_client: "input_bits.oc",
    client_helper: "input_bits.ch",
    owner_helper: "input_bits.oh",
    message: "input_bits.x",
};

/// What [`input_bits`] costs for `n` words.
#[must_use]
pub fn input_bits_cost(from: Role, n: usize, width: u32) -> Cost {
    super::input_cost(from, n, width)
}

/// Shares words of `width` bits, which party `from` gives and the others pass as `None`; table, cost and privacy as
/// [`super::input`].
///
/// # Errors
/// As [`super::input`].
pub fn input_bits(
    s: &mut Session,
    scope: &Scope,
    from: Role,
    x: Option<&ArrayD<u64>>,
    shape: &[usize],
    width: u32,
) -> Result<Bits> {
    check_width("input", width)?;
    let n = elements("input", shape)?;
    let mine = take_input(s, from, x, shape)?;
    declare(s, input_bits_cost(from, n, width));
    let (next, prev) = give_words(s, scope, &INPUT_BITS, from, mine, n, Group::Xor(width))?;
    Ok(Bits::new(s.role(), next, prev, width, shape.to_vec()))
}

/// A sharing of uniform bits that nobody knows; no message, as [`super::random`].
///
/// # Errors
/// [`crate::Error::Shape`] for a width or shape that does not exist, [`crate::Error::Reuse`].
pub fn random_bits(s: &mut Session, scope: &Scope, shape: &[usize], width: u32) -> Result<Bits> {
    check_width("random", width)?;
    let (n, role) = (elements("random", shape)?, s.role());
    let next = pair_words(s, scope, with_next(role), &RANDOM_BITS, n, width)?;
    let prev = pair_words(s, scope, with_prev(role), &RANDOM_BITS, n, width)?;
    Ok(Bits::new(role, next, prev, width, shape.to_vec()))
}

/// What [`and`] costs for `n` words.
#[must_use]
pub fn and_cost(n: usize, width: u32) -> Cost {
    super::reshare_cost(n, width)
}

/// `x & y`, bit by bit.
///
/// Each party computes the cross products of its components, adds its part of a zero sharing and sends the result to
/// the next party: one round, `width` bits per element and party. Private and exact as [`super::reshare`]. Source:
/// Araki et al. (CCS 2016), §2.1.
///
/// # Errors
/// [`crate::Error::Shape`], [`crate::Error::Peer`], [`crate::Error::Reuse`].
pub fn and(s: &mut Session, scope: &Scope, x: &Bits, y: &Bits) -> Result<Bits> {
    x.check_same("and", y)?;
    declare(s, and_cost(x.len(), x.width()));
    let z = x.words().zip(y.words()).map(|(x, y)| x.and(y)).collect();
    reshare_bits(s, scope, z, x.width(), x.shape())
}

/// A sharing of three summands; declares nothing.
pub(super) fn reshare_bits(s: &mut Session, scope: &Scope, z: Vec<u64>, width: u32, shape: &[usize]) -> Result<Bits> {
    let (next, prev) = reshare_words(s, scope, z, Group::Xor(width))?;
    Ok(Bits::new(s.role(), next, prev, width, shape.to_vec()))
}

/// What [`open_bits`] costs.
#[must_use]
pub fn open_bits_cost(n: usize, width: u32) -> Cost {
    super::open_cost(n, width)
}

/// Opens words of bits to all three parties, as [`super::open`].
///
/// # Errors
/// [`crate::Error::Peer`].
pub fn open_bits(s: &mut Session, scope: &Scope, x: &Bits) -> Result<ArrayD<u64>> {
    declare(s, open_bits_cost(x.len(), x.width()));
    let v = open_words(s, scope, x.next(), x.prev(), Group::Xor(x.width()))?;
    array("open", v, x.shape())
}

/// Opens words of bits to one party, as [`super::open_to`] and at its cost.
///
/// # Errors
/// [`crate::Error::Peer`].
pub fn open_bits_to(s: &mut Session, scope: &Scope, x: &Bits, to: Role) -> Result<Option<ArrayD<u64>>> {
    declare(s, super::open_to_cost(to, x.len(), x.width()));
    let v = open_words_to(s, scope, x.next(), x.prev(), Group::Xor(x.width()), to)?;
    v.map(|v| array("open", v, x.shape())).transpose()
}

/// What [`inject`] costs for `n` bits.
#[must_use]
pub fn inject_cost(n: usize, k: u32) -> Cost {
    round(Cost::default().send(Role::Owner, Role::Helper, n, k)).then(super::reshare_cost(n, k))
}

/// The bits of `b` (width 1) as the numbers 0 and 1 of `Z_2^k`.
///
/// | | Owner | Client | Helper |
/// |---|---|---|---|
/// | knows | `t` | `c` | `c` |
/// | gives | `t2 = t - t1` to the Helper | (has `t1`) | |
/// | summand | 0 | `t1 (1 - 2c) + c` | `t2 (1 - 2c)` |
///
/// `t1` = PRF(Owner, Client); then [`super::reshare`]. Cost: two messages in sequence; `k` bits Owner to Helper, then
/// `k` bits per party. Private: `t2` is masked by a stream that the Helper lacks, the rest by a zero sharing. Exact.
/// Source: ABY3 (CCS 2018), §5.4, bit times ring element, with a dealt product in place of its oblivious transfer.
///
/// # Errors
/// [`crate::Error::Shape`] for wider words or a ring that does not exist; [`crate::Error::Peer`],
/// [`crate::Error::Reuse`].
pub fn inject(s: &mut Session, scope: &Scope, b: &Bits, k: u32) -> Result<Replicated> {
    check_width("bit injection", k)?;
    if b.width() != 1 {
        return Err(b.mismatch("bit injection", "words of one bit".into()));
    }
    let n = b.len();
    declare(s, inject_cost(n, k));
    let role = s.role();
    let z = match own_bits(b, role) {
        Own::Owner(t) => {
            give_monomials(s, scope, &[("inject.t", &t)], k)?;
            vec![0; n]
        }
        Own::Holder(c) => {
            let [t] = take_monomials(s, scope, ["inject.t"], n, k)?;
            let linear = u64::from(role == Role::Client);
            t.iter().zip(c).map(|(t, &c)| signed_by(*t, c).wrapping_add(linear * c)).collect()
        }
    };
    let (next, prev) = reshare_words(s, scope, z, Group::Sum(k))?;
    Ok(Replicated::new(role, next, prev, k, 0, b.shape().to_vec()))
}

/// What [`select`] costs for `n` elements.
#[must_use]
pub fn select_cost(n: usize, k: u32) -> Cost {
    let up = 2 * pack::packed_len(n, k) * 8;
    round(Cost::default().send(Role::Owner, Role::Helper, up, 1)).then(super::reshare_cost(n, k))
}

/// `b x`: each element of `x` where the bit (width 1) is 1, otherwise 0.
///
/// | | Owner | Client | Helper |
/// |---|---|---|---|
/// | knows | `t`, `d = x1 + x2` | `c`, `r = x0`, `x2` | `c`, `r = x0`, `x1` |
/// | gives | shares of `t`, `t d` to the Helper | (has the other shares) | |
/// | summand | 0 | `td_1 (1 - 2c) + t_1 (r - 2 c r) + x2 c + c r` | `td_2 (1 - 2c) + t_2 (r - 2 c r) + x1 c` |
///
/// Cost: two messages in sequence, not the three of injection and product; `2k` bits Owner to Helper, then `k` bits per
/// party. Private as [`inject`]. Exact. Source: ABY3 (CCS 2018), §5.4; several factors in one exchange as in ABY2.0
/// (USENIX Security 2021).
///
/// # Errors
/// [`crate::Error::Shape`] for wider words or different shapes; [`crate::Error::Peer`], [`crate::Error::Reuse`].
pub fn select(s: &mut Session, scope: &Scope, b: &Bits, x: &Replicated) -> Result<Replicated> {
    if b.width() != 1 || b.shape() != x.shape() {
        return Err(b.mismatch("select", x.facts()));
    }
    let (n, k, role) = (x.len(), x.k(), s.role());
    declare(s, select_cost(n, k));
    let z = match (own_bits(b, role), x.of(Pair::ClientHelper)) {
        (Own::Holder(c), Some(r)) => {
            let [t, td] = take_monomials(s, scope, ["select.t", "select.td"], n, k)?;
            let (with_owner, linear) = if role == Role::Client { (x.prev(), 1) } else { (x.next(), 0) };
            (0..n)
                .map(|i| {
                    let (c, cr) = (c[i], c[i].wrapping_mul(r[i]));
                    signed_by(td[i], c)
                        .wrapping_add(t[i].wrapping_mul(signed_by(r[i], c)))
                        .wrapping_add(c.wrapping_mul(with_owner[i]))
                        .wrapping_add(cr.wrapping_mul(linear))
                })
                .collect()
        }
        (Own::Owner(t), _) => {
            let d = x.next().iter().zip(x.prev()).map(|(a, b)| a.wrapping_add(*b));
            let td: Vec<u64> = t.iter().zip(d).map(|(t, d)| t.wrapping_mul(d)).collect();
            give_monomials(s, scope, &[("select.t", &t), ("select.td", &td)], k)?;
            vec![0; n]
        }
        // A holder holds that component of every sharing.
        (Own::Holder(_), None) => return Err(b.mismatch("select", x.facts())),
    };
    let (next, prev) = reshare_words(s, scope, z, Group::Sum(k))?;
    Ok(Replicated::new(role, next, prev, k, x.f(), x.shape().to_vec()))
}

/// What a party knows of shared bits alone: the Owner `t`, the holders `c`.
enum Own<'a> {
    Owner(Vec<u64>),
    Holder(&'a [u64]),
}

fn own_bits(b: &Bits, role: Role) -> Own<'_> {
    match role {
        Role::Owner => Own::Owner(b.words().map(|w| w.next ^ w.prev).collect()),
        Role::Client => Own::Holder(b.next()),
        Role::Helper => Own::Holder(b.prev()),
    }
}

/// `v (1 - 2c)`.
fn signed_by(v: u64, c: u64) -> u64 {
    v.wrapping_sub(v.wrapping_mul(2 * c))
}

/// The Owner: sends the Helper its shares of several monomials in one message.
fn give_monomials(s: &mut Session, scope: &Scope, monomials: &[(&'static str, &[u64])], k: u32) -> Result<()> {
    let (pass, m) = (s.the_pass()?, ring::mask(k));
    let mut payload = Vec::new();
    for (label, v) in monomials {
        let mut share = s.stream(Pair::OwnerClient, scope, pass, label)?.words(v.len(), k);
        share.iter_mut().zip(*v).for_each(|(w, v)| *w = v.wrapping_sub(*w) & m);
        pack::pack_into(&share, k, &mut payload);
    }
    s.send_online(Role::Helper, scope, "monomials", payload)
}

/// A holder's shares of the Owner's monomials: the Client's from its streams, the Helper's from the message.
fn take_monomials<const N: usize>(
    s: &mut Session,
    scope: &Scope,
    labels: [&'static str; N],
    n: usize,
    k: u32,
) -> Result<[Vec<u64>; N]> {
    let pass = s.the_pass()?;
    let mut shares = [const { Vec::new() }; N];
    if s.role() == Role::Client {
        for (share, label) in shares.iter_mut().zip(labels) {
            *share = s.stream(Pair::OwnerClient, scope, pass, label)?.words(n, k);
        }
        return Ok(shares);
    }
    let (step, len) = (scope.address(pass, "monomials"), pack::packed_len(n, k));
    let bytes = s.links().recv(Role::Owner, Lane::Online, &step, N * len)?;
    for (i, share) in shares.iter_mut().enumerate() {
        let words = pack::unpack(&bytes[i * len..(i + 1) * len], n, k);
        let fault = PeerFault::Malformed("padding bits set");
        *share = words.ok_or_else(|| blame(Role::Owner, &step, fault))?;
    }
    Ok(shares)
}
