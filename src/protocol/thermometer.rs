//! Thermometer maximum: a value near the maximum of each group in 4 messages, whatever the group's length.
//!
//! A lookup maps each coarse code of a score to bits `[score >= threshold_j]` as short counters; the counters are summed
//! over the group locally; one lookup per threshold gives `[count > 0] * step`, and their sum is the maximum to within
//! two steps: `m <= max < m + 2 step` (one step of quantisation, one of the window's carry). Counters have `c` bits with
//! `2^c` above the group length, so they cannot wrap.
//!
//! The lowest threshold must be reached by some score and the highest by none, or `m` would not be near the maximum: both
//! are counted as range faults. Cost: two exchanges: `2^(k - log step)` bits up and `(n+1) c` bits back per score, then
//! `2^c` bits up and `k` back per threshold and group. Private: lookups and local sums. Exact up to the stated two steps.

use super::Pending;
use super::lookup::{self, Indicator};
use super::window::Digits;
use crate::error::{Error, Result};
use crate::plan::cost::Cost;
use crate::ring;
use crate::session::{Scope, Session};
use crate::share::{Masked, Rows};

/// Thresholds `base + j step` for `j` in `0..=n`, in units of the score's ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Thermometer {
    /// Step = `2^step_bits` ring units.
    pub step_bits: u32,
    /// Lowest threshold in steps (may be negative).
    pub base: i64,
    /// Number of steps; at most 62.
    pub n: usize,
}

/// What it costs for `scores` in groups over `groups` rows, ring `k`, counters of `c` bits, faults of `count_bits`.
#[must_use]
pub fn cost(t: &Thermometer, scores: usize, groups: usize, k: u32, c: u32, count_bits: u32) -> Cost {
    let codes = lookup::cost(scores, 1 << (k - t.step_bits), t.n + 1, c);
    let bits = lookup::cost(groups * (t.n - 1), 1 << c, 1, k);
    codes.then(bits.beside(lookup::cost(groups * 2, 1 << c, 1, count_bits)))
}

/// Counter bits for groups of at most `length`.
#[must_use]
pub fn counter_bits(length: usize) -> u32 {
    (usize::BITS - length.leading_zeros()).max(3)
}

/// What comes out: `m` per group, and counts that are zero if every group's maximum lies within the thresholds.
pub struct Reference {
    /// The reference value `m`, in the ring of the scores.
    pub m: Masked,
    /// Range faults per group.
    pub faults: Masked,
}

/// Codes under way.
pub struct Codes {
    counters: Pending<'static, Masked>,
    groups: Groups,
}

/// Thresholds under way.
pub struct Thresholds {
    steps: Pending<'static, Masked>,
    ends: Pending<'static, Masked>,
    groups: Groups,
}

struct Groups {
    /// Of the scores.
    rows: Rows,
    f: u32,
    k: u32,
    lengths: Vec<usize>,
    counter: u32,
    t: Thermometer,
    count_bits: u32,
}

/// Starts the reference of each group; token `i` has groups of `lengths[i]` scores. Counters of `c` bits, faults of `count_bits`.
///
/// # Errors
/// [`Error::Shape`], [`Error::Peer`], [`Error::Reuse`].
pub fn start(
    s: &mut Session,
    scope: &Scope,
    scores: &Masked,
    lengths: &[usize],
    c: u32,
    t: &Thermometer,
    count_bits: u32,
) -> Result<Codes> {
    let (k, rows, tokens) = (scores.k(), scores.rows(), scores.rows().tokens());
    let fits = lengths.len() == tokens
        && (0..tokens).all(|i| lengths[i] > 0 && rows.row(i).len() % lengths[i] == 0 && lengths[i] >> c == 0);
    if !fits || t.step_bits + 3 > k || t.n < 2 || t.n > 62 {
        return Err(Error::Shape { op: "thermometer", lhs: scores.facts(), rhs: format!("{t:?}") });
    }
    let bits = k - t.step_bits;
    let codes = Digits::cut(scores, t.step_bits, bits)?;
    let value = |i: usize| ring::signed(i as u64, bits);
    let table = Indicator::cyclic(1 << bits, &vec![1; t.n + 1], |i, j| value(i) >= t.base + j as i64)?;
    let counters = lookup::indicator(s, &scope.at("codes"), &codes, &table, 0, c)?;
    let (rows, lengths) = (rows.clone(), lengths.to_vec());
    Ok(Codes { counters, groups: Groups { rows, f: scores.f(), k, lengths, counter: c, t: *t, count_bits } })
}

impl Codes {
    /// Receives the codes' counters, sums them over the groups and starts the thresholds.
    ///
    /// # Errors
    /// [`Error::Peer`], [`Error::Reuse`].
    pub fn thresholds(self, s: &mut Session, scope: &Scope) -> Result<Thresholds> {
        let counters = self.counters.finish(s)?;
        let Groups { rows, f, k, lengths, counter: c, t, count_bits } = &self.groups;
        let (tokens, columns, c) = (rows.tokens(), t.n + 1, *c);
        // Group sums: groups x columns.
        let groups = Rows::ragged((0..tokens).map(|i| rows.row(i).len() / lengths[i]));
        let sums = counters.map(0, Rows::ragged((0..tokens).map(|i| groups.row(i).len() * columns)), |v| {
            let mut out = Vec::with_capacity(groups.len() * columns);
            for (i, &length) in lengths.iter().enumerate() {
                let r = rows.row(i);
                for group in v[r.start * columns..r.end * columns].chunks((length * columns).max(1)) {
                    let from = out.len();
                    out.resize(from + columns, 0u64);
                    for score in group.chunks(columns) {
                        out[from..].iter_mut().zip(score).for_each(|(a, b)| *a = a.wrapping_add(*b));
                    }
                }
            }
            out
        });
        let split = |keep: &dyn Fn(usize) -> bool, n: usize| {
            sums.map(0, Rows::ragged((0..tokens).map(|i| groups.row(i).len() * n)), |v| {
                v.iter().enumerate().filter(|(i, _)| keep(i % columns)).map(|(_, v)| *v).collect()
            })
        };
        let inner = split(&|j| j > 0 && j < t.n, t.n - 1);
        let ends = split(&|j| j == 0 || j == t.n, 2);
        let any = Indicator::cyclic(1 << c, &[1 << t.step_bits], |i, _| i != 0)?;
        let one = Indicator::cyclic(1 << c, &[1], |i, _| i != 0)?;
        let steps = lookup::indicator(s, &scope.at("thresholds"), &Digits::cut(&inner, 0, c)?, &any, *f, *k)?;
        let ends = lookup::indicator(s, &scope.at("ends"), &Digits::cut(&ends, 0, c)?, &one, 0, *count_bits)?;
        Ok(Thresholds { steps, ends, groups: self.groups })
    }
}

impl Thresholds {
    /// Receives the reference.
    ///
    /// # Errors
    /// [`Error::Peer`].
    pub fn finish(self, s: &mut Session) -> Result<Reference> {
        let Groups { rows, lengths, t, .. } = &self.groups;
        let m = self.steps.finish(s)?.sum_groups(t.n - 1)?.offset((t.base << t.step_bits) as u64);
        let ends = self.ends.finish(s)?;
        // A group is at fault if nothing reaches the lowest threshold, or something the highest.
        let groups = Rows::ragged(lengths.iter().enumerate().map(|(i, n)| rows.row(i).len() / n));
        let faults = ends.map(0, groups, |v| v.chunks(2).map(|e| e[1].wrapping_sub(e[0])).collect()).offset(1);
        Ok(Reference { m, faults })
    }
}

/// All of it: the reference of each group.
///
/// # Errors
/// As [`start`].
pub fn reference(
    s: &mut Session,
    scope: &Scope,
    scores: &Masked,
    lengths: &[usize],
    c: u32,
    t: &Thermometer,
    count_bits: u32,
) -> Result<Reference> {
    start(s, scope, scores, lengths, c, t, count_bits)?.thresholds(s, scope)?.finish(s)
}

/// `x - m` with each group's `m` subtracted from its `lengths[i]` elements.
///
/// # Errors
/// [`Error::Shape`].
pub fn subtract(scores: &Masked, m: &Masked, lengths: &[usize]) -> Result<Masked> {
    let spread = m.map(m.f(), scores.rows().clone(), |v| {
        let mut out = Vec::with_capacity(scores.rows().len());
        for (i, &n) in lengths.iter().enumerate() {
            for &m in &v[m.rows().row(i)] {
                out.resize(out.len() + n, m);
            }
        }
        out
    });
    scores.sub(&spread)
}
