//! The base: protocols on replicated sharings, where all three parties send and receive.
//!
//! Here nobody runs ahead: the parties walk the same program pass by pass, each in a batch of ONE pass, and every round
//! is "send everything, then receive". That cannot deadlock, because the online lane never blocks its sender. A walker
//! of a holder receives itself, so these operations leave no jobs; in one pass they come BEFORE operations of the
//! masked engine, whose answering thread reads from the same links, or better in a pass of their own.
//!
//! | | Owner | Client | Helper |
//! |---|---|---|---|
//! | lacks | `x0` | `x1` | `x2` |
//! | shares with the next party | `x2` | `x0` | `x1` |
//! | shares with the party before | `x1` | `x2` | `x0` |
//! | one round of a product | sends its `z` to the Client | to the Helper | to the Owner |
//!
//! Linear maps need no message ([`crate::share::Replicated`], [`crate::share::Bits`]). [`boolean`] has the operations
//! on shared bits, [`sign`] the exact full-width comparison and what follows from it. Every function `f` has an
//! `f_cost`. Fixed point: products add fraction bits; to truncate, take the masked view (local), truncate there
//! (local), and [`materialise`] again (one message). Sources: Araki, Furukawa, Lindell, Nof, Ohara (CCS 2016), §2:
//! products over any ring with one element sent per party, zero sharings from pairwise PRFs; ABY3 (Mohassel and Rindal,
//! CCS 2018), §5: matrices, conversions, mixed products.
//!
//! Two fixed-point matrices, multiplied and compared by three parties in one process:
//!
//! ```
//! use ndarray::{ArrayD, IxDyn};
//! use trefoil::protocol::replicated::{input, less_than, matmul, open};
//! use trefoil::protocol::replicated::boolean::open_bits;
//! use trefoil::session::{Scope, Session};
//! use trefoil::{Result, Role, ring::fixed, world::World};
//!
//! const K: u32 = 64;
//! const F: u32 = 12;
//!
//! fn encode(v: [f64; 4], f: u32) -> ArrayD<u64> {
//!     ArrayD::from_shape_fn(IxDyn(&[2, 2]), |i| fixed::encode(v[2 * i[0] + i[1]], f, K))
//! }
//!
//! // Every party runs this; `input` takes a value from the one party that has it.
//! fn program(s: &mut Session) -> Result<(ArrayD<u64>, ArrayD<u64>)> {
//!     let x = (s.role() == Role::Client).then(|| encode([1.5, -2.0, 0.25, 3.0], F));
//!     let w = (s.role() == Role::Owner).then(|| encode([4.0, 0.5, -1.0, 2.0], F));
//!     let bound = (s.role() == Role::Helper).then(|| encode([0.0, 0.0, 0.0, 6.0], 2 * F));
//!     let x = input(s, &Scope::new("x"), Role::Client, x.as_ref(), &[2, 2], K, F)?;
//!     let w = input(s, &Scope::new("w"), Role::Owner, w.as_ref(), &[2, 2], K, F)?;
//!     let bound = input(s, &Scope::new("bound"), Role::Helper, bound.as_ref(), &[2, 2], K, 2 * F)?;
//!     let y = matmul(s, &Scope::new("y"), &x, &w)?;
//!     let below = less_than(s, &Scope::new("below"), &y, &bound)?;
//!     Ok((open(s, &Scope::new("open y"), &y)?, open_bits(s, &Scope::new("open below"), &below)?))
//! }
//!
//! let world = World::seeded(1);
//! let out = world.run(1, &[1], program)?;
//! let (y, below) = &out.client;
//! let y: Vec<f64> = y.iter().map(|v| fixed::decode(*v, 2 * F, K)).collect();
//! println!("y = {y:?}, below the bound: {below}");
//! assert_eq!(y, [8.0, -3.25, -2.0, 6.125]);
//! assert_eq!(below.iter().copied().collect::<Vec<_>>(), [0, 1, 1, 0]);
//! for from in Role::ALL {
//!     for to in [from.next(), from.prev()] {
//!         let sent = world.sent(from, to);
//!         println!("{from} -> {to}: {} bytes in {} messages", sent.online_bytes, sent.messages);
//!     }
//! }
//! # Ok::<(), trefoil::Error>(())
//! ```

pub mod boolean;
pub mod sign;

pub use sign::{less_than, msb, relu};

use ndarray::{ArrayD, IxDyn};

use crate::error::{Error, Result};
use crate::net::Lane;
use crate::party::Role;
use crate::plan::cost::Cost;
use crate::prf::Pair;
use crate::ring::{self, pack};
use crate::session::{Scope, Session, recv_words};
use crate::share::replicated::{check_width, elements, with_next, with_prev};
use crate::share::{Additive, Masked, Replicated, Side};

/// In which group the three components give the secret.
#[derive(Clone, Copy)]
enum Group {
    /// `Z_2^k`.
    Sum(u32),
    /// `k` bits under exclusive or.
    Xor(u32),
}

impl Group {
    fn bits(self) -> u32 {
        match self {
            Group::Sum(k) | Group::Xor(k) => k,
        }
    }

    /// `a[i] += b[i]`, reduced.
    fn add(self, a: &mut [u64], b: &[u64]) {
        let m = ring::mask(self.bits());
        match self {
            Group::Sum(_) => a.iter_mut().zip(b).for_each(|(a, b)| *a = a.wrapping_add(*b) & m),
            Group::Xor(_) => a.iter_mut().zip(b).for_each(|(a, b)| *a = (*a ^ b) & m),
        }
    }

    /// `a[i] -= b[i]`, reduced.
    fn sub(self, a: &mut [u64], b: &[u64]) {
        let m = ring::mask(self.bits());
        match self {
            Group::Sum(_) => a.iter_mut().zip(b).for_each(|(a, b)| *a = a.wrapping_sub(*b) & m),
            Group::Xor(_) => self.add(a, b),
        }
    }
}

/// The labels of one use of the pairs' streams, each pair its own, and of the message that goes with it.
struct Labels {
    owner_client: &'static str,
    client_helper: &'static str,
    owner_helper: &'static str,
    message: &'static str,
}

impl Labels {
    fn of(&self, pair: Pair) -> &'static str {
        match pair {
            Pair::OwnerClient => self.owner_client,
            Pair::ClientHelper => self.client_helper,
            Pair::OwnerHelper => self.owner_helper,
        }
    }
}

const ZERO: Labels =
    Labels { owner_client: "zero.oc", client_helper: "zero.ch", owner_helper: "zero.oh", message: "reshare.z" };
const RANDOM: Labels =
    Labels { owner_client: "random.oc", client_helper: "random.ch", owner_helper: "random.oh", message: "" };
const INPUT: Labels =
    Labels { owner_client: "input.oc", client_helper: "input.ch", owner_helper: "input.oh", message: "input.x" };
const MATERIALISE: Labels = Labels {
    owner_client: "materialise.x1",
    client_helper: "materialise.ch",
    owner_helper: "materialise.oh",
    message: "materialise.x2",
};

/// Uniform words from the stream that `pair` has for this use.
fn pair_words(s: &mut Session, scope: &Scope, pair: Pair, labels: &Labels, n: usize, k: u32) -> Result<Vec<u64>> {
    let pass = s.the_pass()?;
    Ok(s.stream(pair, scope, pass, labels.of(pair))?.words(n, k))
}

/// This party's `a_i` of `a0 + a1 + a2 = 0`: the stream shared with the next party minus the one shared with the party
/// before, so each stream counts once with each sign.
fn zero_words(s: &mut Session, scope: &Scope, n: usize, group: Group) -> Result<Vec<u64>> {
    let role = s.role();
    let mut a = pair_words(s, scope, with_next(role), &ZERO, n, group.bits())?;
    let b = pair_words(s, scope, with_prev(role), &ZERO, n, group.bits())?;
    group.sub(&mut a, &b);
    Ok(a)
}

/// The round that every product ends with; the components shared with the next party and with the one before.
fn reshare_words(s: &mut Session, scope: &Scope, mut z: Vec<u64>, group: Group) -> Result<(Vec<u64>, Vec<u64>)> {
    let (role, n, k) = (s.role(), z.len(), group.bits());
    let zero = zero_words(s, scope, n, group)?;
    group.add(&mut z, &zero);
    let step = scope.address(s.the_pass()?, ZERO.message);
    s.links().gather(role.next(), Lane::Online, &step, pack::pack(&z, k))?;
    let prev = recv_words(s.links(), role.prev(), Lane::Online, &step, n, k)?;
    Ok((z, prev))
}

/// Opens to all three.
fn open_words(s: &Session, scope: &Scope, next: &[u64], prev: &[u64], group: Group) -> Result<Vec<u64>> {
    let (role, k) = (s.role(), group.bits());
    let step = scope.address(s.the_pass()?, "open.x");
    // The next party lacks exactly the component that this party shares with the one before.
    s.links().gather(role.next(), Lane::Online, &step, pack::pack(prev, k))?;
    let mut x = recv_words(s.links(), role.prev(), Lane::Online, &step, next.len(), k)?;
    group.add(&mut x, next);
    group.add(&mut x, prev);
    Ok(x)
}

/// Opens to one party.
fn open_words_to(
    s: &Session,
    scope: &Scope,
    next: &[u64],
    prev: &[u64],
    group: Group,
    to: Role,
) -> Result<Option<Vec<u64>>> {
    let (role, k) = (s.role(), group.bits());
    let step = scope.address(s.the_pass()?, "open.x");
    if role == to.prev() {
        s.links().gather(to, Lane::Online, &step, pack::pack(prev, k))?;
    }
    if role != to {
        return Ok(None);
    }
    let mut x = recv_words(s.links(), to.prev(), Lane::Online, &step, next.len(), k)?;
    group.add(&mut x, next);
    group.add(&mut x, prev);
    Ok(Some(x))
}

/// A giver's share of what only it knows: a stream with the next party, the difference sent to the party before, and
/// zero for the component that the giver lacks. `x` is there at the giver only.
fn give_words(
    s: &mut Session,
    scope: &Scope,
    labels: &Labels,
    from: Role,
    x: Option<Vec<u64>>,
    n: usize,
    group: Group,
) -> Result<(Vec<u64>, Vec<u64>)> {
    let (role, k) = (s.role(), group.bits());
    let step = scope.address(s.the_pass()?, labels.message);
    if role == from {
        let mut x = x.filter(|x| x.len() == n).ok_or_else(|| Error::Internal("a giver without its value".into()))?;
        let next = pair_words(s, scope, with_next(from), labels, n, k)?;
        group.sub(&mut x, &next);
        s.links().gather(from.prev(), Lane::Online, &step, pack::pack(&x, k))?;
        return Ok((next, x));
    }
    if role == from.next() {
        // The giver stands before it.
        return Ok((vec![0; n], pair_words(s, scope, with_next(from), labels, n, k)?));
    }
    Ok((recv_words(s.links(), from, Lane::Online, &step, n, k)?, vec![0; n]))
}

fn declare(s: &mut Session, cost: Cost) {
    // As everywhere, the Owner's walk declares for all three parties.
    if s.is_owner() {
        s.declare(cost);
    }
}

fn array(op: &'static str, x: Vec<u64>, shape: &[usize]) -> Result<ArrayD<u64>> {
    ArrayD::from_shape_vec(IxDyn(shape), x).map_err(|e| Error::Internal(format!("{op}: {e}")))
}

/// What [`zero`] and [`random`] cost: nothing.
#[must_use]
pub fn random_cost() -> Cost {
    Cost::default()
}

/// A zero sharing: summands of 0.
///
/// | | Owner | Client | Helper |
/// |---|---|---|---|
/// | has | `F_oc - F_oh` | `F_ch - F_oc` | `F_oh - F_ch` |
///
/// `F` are the pairs' streams, each under its own label and taken once at each of its two holders. No message. Private:
/// any one party's summand holds a stream that each other party lacks one of, so it hides whatever is added to it.
/// Exact. Source: Araki et al. (CCS 2016), §2.2, correlated randomness.
///
/// # Errors
/// [`Error::Shape`] for a ring or shape that does not exist, [`Error::Reuse`].
pub fn zero(s: &mut Session, scope: &Scope, shape: &[usize], k: u32, f: u32) -> Result<Additive> {
    check_width("zero", k)?;
    let n = elements("zero", shape)?;
    Ok(Additive::new(zero_words(s, scope, n, Group::Sum(k))?, k, f, shape.to_vec()))
}

/// A sharing of uniform values that nobody knows.
///
/// | | Owner | Client | Helper |
/// |---|---|---|---|
/// | has | `F_oc`, `F_oh` | `F_ch`, `F_oc` | `F_oh`, `F_ch` |
///
/// No message. Private: each party lacks one uniform component. Exact. Source: Araki et al. (CCS 2016), §2.2.
///
/// # Errors
/// [`Error::Shape`] for a ring or shape that does not exist, [`Error::Reuse`].
pub fn random(s: &mut Session, scope: &Scope, shape: &[usize], k: u32, f: u32) -> Result<Replicated> {
    check_width("random", k)?;
    let n = elements("random", shape)?;
    let role = s.role();
    Replicated::from_pairs(role, k, f, shape.to_vec(), |pair| pair_words(s, scope, pair, &RANDOM, n, k))
}

/// What [`input`] costs for `n` elements.
#[must_use]
pub fn input_cost(from: Role, n: usize, k: u32) -> Cost {
    round(Cost::default().send(from, from.prev(), n, k))
}

fn round(mut c: Cost) -> Cost {
    c.depth = 1;
    c
}

/// Shares `x`, which party `from` gives and the others pass as `None`.
///
/// | | giver | next party | party before |
/// |---|---|---|---|
/// | shared with the next | `F` | 0 | `x - F`, received |
/// | shared with the one before | `x - F`, sent | `F` | 0 |
///
/// `F` = stream of giver and next party. Cost: ONE message of `k` bits per element, to the party before the giver (a
/// Client's input is masked for the Owner, as in the masked engine). Private: the next party sees its stream and zeros,
/// the other one `x` under a stream that it lacks; the third component may be zero because products are masked by zero
/// sharings, not by the components. Exact. Source: ABY3 (CCS 2018), §5, with the third component dropped.
///
/// # Errors
/// [`Error::Shape`] for a missing value, another shape or a ring that does not exist; [`Error::Peer`],
/// [`Error::Reuse`].
pub fn input(
    s: &mut Session,
    scope: &Scope,
    from: Role,
    x: Option<&ArrayD<u64>>,
    shape: &[usize],
    k: u32,
    f: u32,
) -> Result<Replicated> {
    check_width("input", k)?;
    let n = elements("input", shape)?;
    let mine = take_input(s, from, x, shape)?;
    declare(s, input_cost(from, n, k));
    let (next, prev) = give_words(s, scope, &INPUT, from, mine, n, Group::Sum(k))?;
    Ok(Replicated::new(s.role(), next, prev, k, f, shape.to_vec()))
}

fn take_input(s: &Session, from: Role, x: Option<&ArrayD<u64>>, shape: &[usize]) -> Result<Option<Vec<u64>>> {
    if s.role() != from {
        return Ok(None);
    }
    match x {
        Some(x) if x.shape() == shape => Ok(Some(x.iter().copied().collect())),
        other => {
            let lhs = other.map_or("no value".into(), |x| format!("{:?}", x.shape()));
            Err(Error::Shape { op: "input", lhs, rhs: format!("{shape:?} of the {from}") })
        }
    }
}

/// What [`reshare`] and every product costs for `n` elements of the RESULT.
#[must_use]
pub fn reshare_cost(n: usize, k: u32) -> Cost {
    round(Role::ALL.into_iter().fold(Cost::default(), |c, from| c.send(from, from.next(), n, k)))
}

/// Makes a sharing of three summands.
///
/// | | Owner | Client | Helper |
/// |---|---|---|---|
/// | adds its part of a zero sharing, sends to | Client | Helper | Owner |
/// | then holds | its own and the Helper's | its own and the Owner's | its own and the Client's |
///
/// Cost: one round, `k` bits per element and party. Private: what a party receives is masked by a stream of the two
/// others. Exact. Source: Araki et al. (CCS 2016), §2.2.
///
/// # Errors
/// [`Error::Peer`], [`Error::Reuse`].
pub fn reshare(s: &mut Session, scope: &Scope, z: Additive) -> Result<Replicated> {
    let (z, k, f, shape) = z.into_parts();
    declare(s, reshare_cost(z.len(), k));
    let (next, prev) = reshare_words(s, scope, z, Group::Sum(k))?;
    Ok(Replicated::new(s.role(), next, prev, k, f, shape))
}

/// `x * y`, element by element; fraction bits added.
///
/// Each party computes the cross products of its components and [`reshare`]s them: one round, `k` bits per element and
/// party ([`reshare_cost`]). Private: see there. Exact in the ring. Source: Araki et al. (CCS 2016), §2.2.
///
/// # Errors
/// [`Error::Shape`], [`Error::Peer`], [`Error::Reuse`].
pub fn mul(s: &mut Session, scope: &Scope, x: &Replicated, y: &Replicated) -> Result<Replicated> {
    reshare(s, scope, x.local_mul(y)?)
}

/// Dot products along the last axis, at the price of ONE element each ([`reshare_cost`] of the result).
///
/// As [`mul`]: the summands are added up before they are sent. Source: ABY3 (CCS 2018), §5.2, vectorised products.
///
/// # Errors
/// [`Error::Shape`], [`Error::Peer`], [`Error::Reuse`].
pub fn dot(s: &mut Session, scope: &Scope, x: &Replicated, y: &Replicated) -> Result<Replicated> {
    reshare(s, scope, x.local_dot(y)?)
}

/// The matrix product `t x n` times `n x m`: one round, `k` bits per element of the result and party
/// ([`reshare_cost`]).
///
/// As [`mul`]; two local matrix products per party. Source: ABY3 (CCS 2018), §5.2.
///
/// # Errors
/// [`Error::Shape`], [`Error::Peer`], [`Error::Reuse`].
pub fn matmul(s: &mut Session, scope: &Scope, x: &Replicated, y: &Replicated) -> Result<Replicated> {
    reshare(s, scope, x.local_matmul(y)?)
}

/// What [`open`] costs.
#[must_use]
pub fn open_cost(n: usize, k: u32) -> Cost {
    reshare_cost(n, k)
}

/// Opens `x` to all three parties.
///
/// Each party sends the next one the component that it lacks: one round, `k` bits per element and party. Private: the
/// component received is `x` minus what the receiver has, so it shows nothing but `x`. A truncated `x` also shows how
/// it was rounded; open fresh results. Source: Araki et al. (CCS 2016), §2.2.
///
/// # Errors
/// [`Error::Peer`].
pub fn open(s: &mut Session, scope: &Scope, x: &Replicated) -> Result<ArrayD<u64>> {
    declare(s, open_cost(x.len(), x.k()));
    let v = open_words(s, scope, x.next(), x.prev(), Group::Sum(x.k()))?;
    array("open", v, x.shape())
}

/// What [`open_to`] costs.
#[must_use]
pub fn open_to_cost(to: Role, n: usize, k: u32) -> Cost {
    round(Cost::default().send(to.prev(), to, n, k))
}

/// Opens `x` to one party; the others get `None`. One message of `k` bits per element, from the party before; otherwise
/// as [`open`].
///
/// # Errors
/// [`Error::Peer`].
pub fn open_to(s: &mut Session, scope: &Scope, x: &Replicated, to: Role) -> Result<Option<ArrayD<u64>>> {
    declare(s, open_to_cost(to, x.len(), x.k()));
    let v = open_words_to(s, scope, x.next(), x.prev(), Group::Sum(x.k()), to)?;
    v.map(|v| array("open", v, x.shape())).transpose()
}

/// What [`materialise`] costs.
#[must_use]
pub fn materialise_cost(n: usize, k: u32) -> Cost {
    input_cost(Role::Owner, n, k)
}

/// The replicated form of a masked value. The way back is local: [`Replicated::to_masked`].
///
/// | | Owner | Client | Helper |
/// |---|---|---|---|
/// | masked | `d` | `r` | `r` |
/// | sends | `d - F` to the Helper | | |
/// | replicated | `F`, `d - F` | `r`, `F` | `d - F`, `r` |
///
/// `F` = PRF(Owner, Client). Cost: one message of `k` bits per element, Owner to Helper. Private: the Helper lacks `F`.
/// Exact. Source: `docs/protocols.md`, "Parties and the masked view".
///
/// # Errors
/// [`Error::Shape`] if `shape` has another number of elements; [`Error::Peer`], [`Error::Reuse`].
pub fn materialise(s: &mut Session, scope: &Scope, x: &Masked, shape: &[usize]) -> Result<Replicated> {
    let (n, k) = (x.raw().len(), x.k());
    if elements("materialise", shape)? != n || (x.side() == Side::Value) != s.is_owner() {
        return Err(Error::Shape { op: "materialise", lhs: x.facts(), rhs: format!("{shape:?} at the {}", s.role()) });
    }
    declare(s, materialise_cost(n, k));
    let own = s.is_owner().then(|| x.raw().to_vec());
    let (next, prev) = give_words(s, scope, &MATERIALISE, Role::Owner, own, n, Group::Sum(k))?;
    // The component that the Owner lacks is not zero here, but the holders' r.
    let (next, prev) = match s.role() {
        Role::Owner => (next, prev),
        Role::Client => (x.raw().to_vec(), prev),
        Role::Helper => (next, x.raw().to_vec()),
    };
    Ok(Replicated::new(s.role(), next, prev, k, x.f(), shape.to_vec()))
}
