//! Range flags: proof that a value fits the ring that it is narrowed to, off the critical path.
//!
//! Narrowing forgets the top of a ring and is right only for values that fit. Where no bound on weights proves that, a
//! guard counts the values that may not fit; the counts of a pass are reduced to one bit per layer and quantity and
//! opened to the Client before it accepts the token.
//!
//! For `v in [0, 2^b)` in a ring of `k` bits, the bits from `b - 4` up are cut into chunks of at most 8. The lowest
//! chunk's unreduced sum tells its value and its carry; the chunks above must equal `-r - carry`. Both hypotheses are
//! looked up side by side (`M0` counts mismatches if there is no carry, `M1` if there is one), and `v` fits if `M0 M1 = 0`.
//! The bits below `b - 4` may carry: the sum names the interval (of 16) of `v` or the one below it. So
//!
//! | | never accepted | always accepted |
//! |---|---|---|
//! | signed | outside `[-2^(b-1), 2^(b-1))` | `[-2^(b-1) + 2^(b-4), 2^(b-1) - 2^(b-4))` |
//! | unsigned, for values that cannot be in `[-2^(b-4), 0)` | outside `[-2^(b-4), 2^b)` | `[0, 2^b - 2^(b-4))` |
//!
//! Unsigned values (sums of squares) may be tiny, and zero cannot be told from minus one without the low bits.
//! Cost: one lookup of at most 256 rows per chunk
//! and one product per value, none of it waited for. Private: lookups and products as in their files; the Client sees one
//! bit per layer and quantity, and it is 0 unless the generation ends there.

use std::ops::Range;
use std::sync::Arc;

use super::lookup::{self, Indicator, Query};
use super::product::{Elementwise, product};
use super::window::Digits;
use super::{Pending, concat, open, side};
use crate::error::{Error, Result};
use crate::ring;
use crate::session::{Scope, Session};
use crate::share::{Masked, Rows};

/// Codes accepted of a signed value, shifted to begin at 0: with a carry from below it still lies in the 16 of the range.
const SIGNED: usize = 15;
/// Codes accepted of an unsigned value, shifted by an interval so that a carry under a tiny value is code 0.
const UNSIGNED: usize = 16;

/// Mismatch counts of one guard.
pub enum Counts {
    /// Nonzero where the value does not fit.
    Direct(Masked),
    /// The product of the two is nonzero where the value does not fit.
    Pair(Masked, Masked),
}

/// `[d != e]` for each hypothesis `e` of the holders: element-major counts in ring `k`.
fn mismatch(
    s: &mut Session,
    scope: &Scope,
    q: &Query<'_>,
    index: &[u32],
    hypotheses: Vec<Vec<u32>>,
) -> Result<Pending<'static, Masked>> {
    let Query { rows, n_rows: n, words, k, .. } = *q;
    let wide = Rows::ragged((0..rows.tokens()).map(|t| rows.row(t).len() * words));
    let side = side(s);
    let raw = if s.is_owner() {
        lookup::online(s, scope, q, index)?
    } else {
        let rout = lookup::out_masks(s, scope, q)?;
        let (sub, m, bytes) = (Arc::clone(&rout), ring::mask(k), n / 8);
        let ones = vec![1; words];
        let answer = move |e: Range<usize>, query: &[u8]| {
            let mut out = Vec::with_capacity(e.len() * words);
            for (i, q) in e.zip(query.chunks(bytes)) {
                let parity = q.iter().fold(0u8, |a, b| a ^ b).count_ones() % 2 == 1;
                let mut x = 0u64;
                for (j, h) in hypotheses.iter().enumerate() {
                    let e = h[i] as usize;
                    let hit = q[e / 8] >> (e % 8) & 1 == 1;
                    x |= u64::from(parity ^ hit) << j;
                }
                lookup::expand_bits(x, parity, &ones, &sub[i * words..(i + 1) * words], m, &mut out);
            }
            out
        };
        lookup::masks(s, scope, q, Arc::new(answer))?;
        Pending::ready(Arc::unwrap_or_clone(rout))
    };
    Ok(raw.then(move |raw| Ok(Masked::new(raw, side, k, 0, wide))))
}

/// Even chunks of at most 8 and at least 4 bits (a query has whole bytes).
fn chunks(bits: u32) -> Vec<u32> {
    let n = bits.div_ceil(8);
    (0..n).map(|i| bits / n + u32::from(i < bits % n)).collect()
}

/// What a guard costs for `n` values of ring `k` and counts of `count_bits` bits, the final product not included.
#[must_use]
pub fn cost(n: usize, k: u32, b: u32, count_bits: u32) -> crate::plan::cost::Cost {
    let mut c = crate::plan::cost::Cost::default();
    if k > b {
        let parts = chunks(k - b + 4);
        let words = if parts.len() == 1 { 1 } else { 2 };
        for bits in parts {
            c = c.beside(lookup::cost(n, 1 << bits, words, count_bits));
        }
    }
    c
}

/// Starts a guard that `x` fits `b` bits: `[-2^(b-1), 2^(b-1))` if `signed`, else `[0, 2^b)` for a value that cannot be
/// just below zero. Nothing to do if the ring has no more than `b` bits.
///
/// # Errors
/// [`crate::Error::Peer`], [`crate::Error::Reuse`], [`crate::Error::Shape`].
pub fn guard(
    s: &mut Session,
    scope: &Scope,
    x: &Masked,
    b: u32,
    signed: bool,
    count_bits: u32,
) -> Result<Option<Pending<'static, Counts>>> {
    let k = x.k();
    if k <= b {
        return Ok(None);
    }
    if b < 4 {
        return Err(Error::Shape { op: "guard", lhs: x.facts(), rhs: format!("{b} bits, of at least 4") });
    }
    let low = b - 4;
    let (shift, accepted) = if signed { (1 << (b - 1), SIGNED) } else { (1 << low, UNSIGNED) };
    let x = x.clone().offset(shift);
    let parts = chunks(k - low);
    let first = Digits::cut(&x, low, parts[0])?;
    let n = 1usize << parts[0];
    if parts.len() == 1 {
        let table = Indicator::cyclic(n, &[1], |i, _| i >= accepted)?;
        let counts = lookup::indicator(s, &scope.at("chunk0"), &first, &table, 0, count_bits)?;
        return Ok(Some(counts.then(|m| Ok(Counts::Direct(m)))));
    }
    let table = Indicator::unreduced(2 * n, &[1, 1], |i, hypothesis| {
        !(if hypothesis == 0 { i < accepted } else { (n..n + accepted).contains(&i) })
    })?;
    let mut pending = vec![lookup::indicator(s, &scope.at("chunk0"), &first, &table, 0, count_bits)?];
    let top = low + parts[0];
    let upper = ring::mask(k - top);
    let mut from = 0;
    for (j, &bits) in parts.iter().enumerate().skip(1) {
        let cut = |v: u64| ((v >> from) & ring::mask(bits)) as u32;
        let (index, hypotheses) = if s.is_owner() {
            (x.raw().iter().map(|w| cut(w >> top)).collect::<Vec<_>>(), Vec::new())
        } else {
            let minus =
                |c: u64| x.raw().iter().map(|w| cut(0u64.wrapping_sub(w >> top).wrapping_sub(c) & upper)).collect();
            (Vec::new(), vec![minus(0), minus(1)])
        };
        let q = Query { rows: x.rows(), n_rows: 1 << bits, words: 2, folded: 0, k: count_bits };
        pending.push(mismatch(s, &scope.at(&format!("chunk{j}")), &q, &index, hypotheses)?);
        from += bits;
    }
    let rows = x.rows().clone();
    Ok(Some(Pending::new(move |s| {
        let mut sum: Option<Masked> = None;
        for p in pending {
            let m = p.finish(s)?;
            sum = Some(match sum {
                None => m,
                Some(sum) => sum.add(&m)?,
            });
        }
        let sum = sum.ok_or_else(|| crate::Error::Internal("a guard without chunks".into()))?;
        let pick = |j: usize| sum.map(0, rows.clone(), |v| v.iter().skip(j).step_by(2).copied().collect());
        Ok(Counts::Pair(pick(0), pick(1)))
    })))
}

/// The longest chunk of [`guard_at_once`], in bits.
pub(crate) const AT_ONCE: u32 = 16;

/// As [`guard`] of an unsigned value, in one look-up of as many rows as that takes: for few values whose flag cannot wait for the
/// product that several chunks need. Nonzero where the value does not fit.
///
/// # Errors
/// As [`guard`], and [`crate::Error::Shape`] if the ring has more than 12 bits beyond `b`.
pub fn guard_at_once(
    s: &mut Session,
    scope: &Scope,
    x: &Masked,
    b: u32,
    count_bits: u32,
) -> Result<Option<Pending<'static, Masked>>> {
    if x.k() <= b {
        return Ok(None);
    }
    if b < 4 || x.k() - b + 4 > AT_ONCE {
        return Err(Error::Shape { op: "guard", lhs: x.facts(), rhs: format!("{b} bits, in one look-up") });
    }
    let x = x.clone().offset(1 << (b - 4));
    let digits = Digits::cut(&x, b - 4, x.k() - b + 4)?;
    let table = Indicator::cyclic(1 << digits.bits, &[1], |i, _| i >= UNSIGNED)?;
    Ok(Some(lookup::indicator(s, &scope.at("chunk0"), &digits, &table, 0, count_bits)?))
}

/// Collects the counts of a batch and reduces them to opened bits.
pub struct RangeFlags {
    count_bits: u32,
    names: Vec<(String, &'static str)>,
    direct: Vec<(usize, Masked)>,
    guards: Vec<(usize, Pending<'static, Counts>)>,
    /// Of a long prompt: see [`RangeFlags::fold`].
    late: Option<Pending<'static, Vec<(usize, Masked)>>>,
    state: State,
}

/// Guards of a pass of which a block is walked.
pub struct HeldGuards(Vec<(usize, Pending<'static, Counts>)>);

/// Sums of products that stand side by side for each token, of some tokens: for each quantity with the layout of its own.
fn sums_by_quantity(m: &Masked, tokens: Range<usize>, quantities: &[(usize, Rows)]) -> Vec<(usize, u64)> {
    let mut sums: Vec<(usize, u64)> = quantities.iter().map(|(i, _)| (*i, 0)).collect();
    for t in tokens {
        let mut row = &m.raw()[m.rows().row(t)];
        for ((_, sum), (_, rows)) in sums.iter_mut().zip(quantities) {
            let (own, others) = row.split_at(rows.row(t).len());
            *sum = own.iter().fold(*sum, |a, b| a.wrapping_add(*b));
            row = others;
        }
    }
    sums
}

enum State {
    Collecting,
    Products { pair_of: Vec<(usize, Rows)>, pending: Option<Pending<'static, Masked>> },
    Chunks(Pending<'static, Masked>),
    Bits(Pending<'static, Masked>),
    Done,
}

impl RangeFlags {
    /// For at most `counts` guarded values per quantity and pass (a public bound: sizes the counters).
    #[must_use]
    pub fn new(counts: usize) -> Self {
        // 64 per value is the largest product of two mismatch counts.
        let count_bits = (usize::BITS - (counts.max(1) * 64).leading_zeros() + 1).next_multiple_of(8);
        let (names, direct, guards, late) = (Vec::new(), Vec::new(), Vec::new(), None);
        RangeFlags { count_bits, names, direct, guards, late, state: State::Collecting }
    }

    /// Ring of the counters.
    #[must_use]
    pub fn count_bits(&self) -> u32 {
        self.count_bits
    }

    /// The quantities, in the order of the opened bits.
    #[must_use]
    pub fn names(&self) -> Vec<(String, &'static str)> {
        self.names.clone()
    }

    fn name(&mut self, layer: &str, quantity: &'static str) -> usize {
        if let Some(i) = self.names.iter().position(|(l, q)| l == layer && *q == quantity) {
            return i;
        }
        self.names.push((layer.to_string(), quantity));
        self.names.len() - 1
    }

    /// Adds counts that are zero where all is well.
    pub fn count(&mut self, layer: &str, quantity: &'static str, x: Masked) {
        let i = self.name(layer, quantity);
        self.direct.push((i, x));
    }

    /// Adds a guard started by [`guard`].
    pub fn guard(&mut self, layer: &str, quantity: &'static str, g: Option<Pending<'static, Counts>>) {
        if let Some(g) = g {
            let i = self.name(layer, quantity);
            self.guards.push((i, g));
        }
    }

    /// Takes the guards of the whole pass aside, while those of a block are collected.
    pub fn hold(&mut self) -> HeldGuards {
        HeldGuards(std::mem::take(&mut self.guards))
    }

    /// Puts them back.
    pub fn resume(&mut self, held: HeldGuards) {
        self.guards.splice(0..0, held.0);
    }

    /// Sums up what has been collected, which would take as much memory as all guarded values of the pass: after each block and each layer
    /// of a prompt that is walked in blocks. `last` is a row for every token of the whole pass and an element at its last one. Called
    /// where the replies are surely there; those of the product that it begins are taken by the next call.
    ///
    /// # Errors
    /// [`crate::Error::Peer`], [`crate::Error::Reuse`], [`crate::Error::Shape`].
    pub fn fold(&mut self, s: &mut Session, scope: &Scope, last: &Rows) -> Result<()> {
        self.take_late(s)?;
        let one = |m: &Masked| m.map(0, last.clone(), |v| vec![v.iter().fold(0u64, |a, b| a.wrapping_add(*b))]);
        for (i, m) in std::mem::take(&mut self.direct) {
            self.add(i, if m.rows() == last { m } else { one(&m) })?;
        }
        let (mut a, mut b, mut quantities) = (Vec::new(), Vec::new(), Vec::new());
        for (i, g) in std::mem::take(&mut self.guards) {
            match g.finish(s)? {
                Counts::Direct(m) => self.add(i, one(&m))?,
                Counts::Pair(m0, m1) => {
                    quantities.push((i, m0.rows().clone()));
                    a.push(m0);
                    b.push(m1);
                }
            }
        }
        if quantities.is_empty() {
            return Ok(());
        }
        let (a, b) = (concat(&a.iter().collect::<Vec<_>>())?, concat(&b.iter().collect::<Vec<_>>())?);
        let products = product(s, &scope.at("pairs"), &a, &b, Arc::new(Elementwise))?;
        let (side, k, last) = (side(s), self.count_bits, last.clone());
        let sums = products.then(move |m| {
            let sums = sums_by_quantity(&m, 0..m.rows().tokens(), &quantities);
            Ok(sums.into_iter().map(|(i, sum)| (i, Masked::new(vec![sum], side, k, 0, last.clone()))).collect())
        });
        self.late = Some(if s.is_owner() { sums } else { Pending::ready(sums.finish(s)?) });
        Ok(())
    }

    fn take_late(&mut self, s: &mut Session) -> Result<()> {
        let Some(sums) = self.late.take() else { return Ok(()) };
        sums.finish(s)?.into_iter().try_for_each(|(i, sum)| self.add(i, sum))
    }

    /// Adds counts to those of the same quantity and layout.
    fn add(&mut self, i: usize, m: Masked) -> Result<()> {
        match self.direct.iter_mut().find(|(j, sum)| *j == i && sum.rows() == m.rows()) {
            Some((_, sum)) => *sum = sum.add(&m)?,
            None => self.direct.push((i, m)),
        }
        Ok(())
    }

    /// Takes the next step, without which later steps cannot start. Called at points where earlier replies are surely
    /// there already, so that nothing on the critical path waits for it.
    ///
    /// # Errors
    /// [`crate::Error::Peer`], [`crate::Error::Reuse`].
    pub fn advance(&mut self, s: &mut Session, scope: &Scope) -> Result<()> {
        let scope = scope.at("flags");
        self.state = match std::mem::replace(&mut self.state, State::Done) {
            State::Collecting => {
                self.take_late(s)?;
                let (mut a, mut b, mut pair_of) = (Vec::new(), Vec::new(), Vec::new());
                for (i, g) in std::mem::take(&mut self.guards) {
                    match g.finish(s)? {
                        Counts::Direct(m) => self.direct.push((i, m)),
                        Counts::Pair(m0, m1) => {
                            pair_of.push((i, m0.rows().clone()));
                            a.push(m0);
                            b.push(m1);
                        }
                    }
                }
                let pending = if a.is_empty() {
                    None
                } else {
                    let (a, b) = (concat(&a.iter().collect::<Vec<_>>())?, concat(&b.iter().collect::<Vec<_>>())?);
                    Some(product(s, &scope.at("pairs"), &a, &b, Arc::new(Elementwise))?)
                };
                State::Products { pair_of, pending }
            }
            State::Products { pair_of, pending } => {
                let products = pending.map(|p| p.finish(s)).transpose()?;
                self.totals(s, &pair_of, products.as_ref()).map_or(Ok(State::Done), |total| {
                    let n = self.count_bits / 8;
                    let rows = Rows::ragged((0..total.rows().tokens()).map(|t| total.rows().row(t).len() * n as usize));
                    let split = |v: &[u64]| -> Vec<u32> {
                        v.iter().flat_map(|w| (0..n).map(move |j| (w >> (8 * j) & 255) as u32)).collect()
                    };
                    let (index, hypotheses) = if s.is_owner() {
                        (split(total.raw()), Vec::new())
                    } else {
                        let m = ring::mask(self.count_bits);
                        let minus: Vec<u64> = total.raw().iter().map(|r| 0u64.wrapping_sub(*r) & m).collect();
                        (Vec::new(), vec![split(&minus)])
                    };
                    let q = Query { rows: &rows, n_rows: 256, words: 1, folded: 0, k: 4 };
                    let pending = mismatch(s, &scope.at("zero"), &q, &index, hypotheses)?;
                    Ok::<State, crate::Error>(State::Chunks(pending.then(move |m| m.sum_groups(n as usize))))
                })?
            }
            State::Chunks(pending) => {
                let sums = pending.finish(s)?;
                let table = Indicator::cyclic(16, &[1], |i, _| i != 0)?;
                let digits = Digits::cut(&sums, 0, 4)?;
                State::Bits(lookup::indicator(s, &scope.at("bit"), &digits, &table, 0, 1)?)
            }
            other => other,
        };
        Ok(())
    }

    /// Per pass, the sum of all counts of each quantity, at the pass's last token.
    fn totals(&self, s: &Session, pair_of: &[(usize, Rows)], products: Option<&Masked>) -> Option<Masked> {
        if self.names.is_empty() {
            return None;
        }
        let q = self.names.len();
        let passes = s.passes().to_vec();
        let tokens = s.tokens();
        let last: Vec<usize> = passes.iter().map(|p| p.tokens.end - 1).collect();
        let rows = Rows::ragged((0..tokens).map(|t| if last.contains(&t) { q } else { 0 }));
        let mut v = vec![0u64; rows.len()];
        for (p, pass) in passes.iter().enumerate() {
            let sums = &mut v[p * q..(p + 1) * q];
            for (i, m) in &self.direct {
                let sum = m.raw()[m.rows().range(&pass.tokens)].iter().fold(0u64, |a, b| a.wrapping_add(*b));
                sums[*i] = sums[*i].wrapping_add(sum);
            }
            if let Some(m) = products {
                for (i, sum) in sums_by_quantity(m, pass.tokens.clone(), pair_of) {
                    sums[i] = sums[i].wrapping_add(sum);
                }
            }
        }
        Some(Masked::new(v, side(s), self.count_bits, 0, rows))
    }

    /// Finishes all steps and opens the bits to the Client: one per name, 1 where the range was left.
    ///
    /// # Errors
    /// [`crate::Error::Peer`], [`crate::Error::Reuse`].
    pub fn open(mut self, s: &mut Session, scope: &Scope, sink: Option<&open::OutputSink>) -> Result<()> {
        loop {
            match std::mem::replace(&mut self.state, State::Done) {
                State::Bits(pending) => {
                    let bits = pending.finish(s)?;
                    return open::open(s, &scope.at("flags.open"), &bits, sink);
                }
                State::Done => return Ok(()),
                other => {
                    self.state = other;
                    self.advance(s, scope)?;
                }
            }
        }
    }
}
