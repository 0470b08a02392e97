//! Argmax by a tournament: in each level all pairs of a group are compared side by side and exactly (ties go to the lower
//! index), so there are no cycles; one lookup per candidate on the masked bits of its own comparisons says whether it won
//! them all, and one product selects the winner's value and index.
//!
//! Cost per level of radix `a` (each level may have another): 8 messages: a [`compare`] of `g a (a-1) / 2` differences, a lookup of `2^(a-1)`
//! rows per candidate, a product. Private: compositions of private operations; nothing is opened here. Exact for values that a
//! [`lift`] takes: `[-2^(k-2), 2^(k-2))`.

use std::ops::Range;
use std::sync::Arc;

use super::lookup::{self, Query};
use super::product::{Select, product};
use super::{compare, concat, lift, side};
use crate::error::{Error, Result};
use crate::plan::cost::Cost;
use crate::ring;
use crate::session::{Scope, Session};
use crate::share::{Masked, Rows};

/// Ring of the index.
pub const INDEX_BITS: u32 = 24;

/// The largest radix: its winners are looked up in tables of `2^11` rows.
pub const MOST_RADIX: usize = 12;

/// Of the levels, candidates and radix, for `n` candidates: they are cut into groups of the level's radix, of which one may be filled up.
/// Levels beyond those of `radices` have the last one.
pub(crate) fn levels(n: usize, radices: &[usize]) -> impl Iterator<Item = (usize, usize)> {
    let radix = |level: usize| radices.get(level).or(radices.last()).copied().unwrap_or(2).max(2);
    let (mut left, mut level) = (n, 0);
    std::iter::from_fn(move || {
        let this = (left > 1).then_some((left, radix(level)))?;
        (left, level) = (left.div_ceil(this.1), level + 1);
        Some(this)
    })
}

/// Number of levels.
#[must_use]
pub fn depth(n: usize, radices: &[usize]) -> u32 {
    levels(n, radices).count() as u32
}

/// The narrowest ring that [`compare`] takes and that holds a difference.
fn compare_bits(k: u32) -> u32 {
    (k + 1).next_multiple_of(4).max(8)
}

/// What it costs for one position of `n` candidates in ring `k`.
#[must_use]
pub fn cost(n: usize, k: u32, radices: &[usize]) -> Cost {
    let all = lift::cost(n, k, compare_bits(k).max(INDEX_BITS));
    levels(n, radices).fold(all, |c, (left, radix)| c.then(level_cost(left, k, radix)))
}

/// A level with so many candidates.
#[must_use]
pub fn level_cost(left: usize, k: u32, radix: usize) -> Cost {
    let wide = compare_bits(k).max(INDEX_BITS);
    let groups = left.div_ceil(radix);
    let m = groups * radix;
    compare::cost(groups * radix * (radix - 1) / 2, compare_bits(k) as usize / 4, 1)
        .then(lookup::cost(m, winner_rows(radix), 1, wide))
        .then(super::product::cost(m, 2 * m, 2 * groups, wide))
}

fn winner_rows(radix: usize) -> usize {
    (1usize << (radix - 1)).max(8)
}

/// Index (as integers in `Z_2^24`) of the largest of each token's candidates; every token has the same number or none.
/// `between` is called after each level, at a time when all earlier replies are there.
///
/// # Errors
/// [`Error::Shape`] for uneven tokens, a ring above 23 bits, more than `2^22` candidates or a radix not 2 to [`MOST_RADIX`];
/// [`Error::Peer`], [`Error::Reuse`].
pub fn argmax(
    s: &mut Session,
    scope: &Scope,
    x: &Masked,
    radices: &[usize],
    between: &mut dyn FnMut(&mut Session) -> Result<()>,
) -> Result<Masked> {
    let tokens = x.rows().tokens();
    let n = (0..tokens).map(|t| x.rows().row(t).len()).max().unwrap_or(0);
    let even = (0..tokens).all(|t| [0, n].contains(&x.rows().row(t).len()));
    if !even
        || n == 0
        || n > 1 << 22
        || x.k() > 23
        || radices.is_empty()
        || !radices.iter().all(|r| (2..=MOST_RADIX).contains(r))
    {
        return Err(Error::Shape {
            op: "argmax",
            lhs: x.facts(),
            rhs: format!("equal rows, at most 23 bits, radices {radices:?}"),
        });
    }
    // Values and indices live in one ring, in which differences (one bit more than the values) are exact.
    let narrow = compare_bits(x.k());
    let wide = narrow.max(INDEX_BITS);
    let f = x.f();
    let mut value = lift::lift(s, &scope.at("lift"), x, wide)?.finish(s)?;
    let ids: Vec<u64> = (0..value.raw().len()).map(|i| (i % n) as u64).collect();
    let mut index = Masked::constant(ids, side(s), wide, f, value.rows().clone());
    for (level, (left, radix)) in levels(n, radices).enumerate() {
        let at = scope.at(&format!("level{level}"));
        let groups = left.div_ceil(radix);
        let m = groups * radix;
        // Candidates that only fill up the last group lose against anything: the lowest value, the highest index.
        let floor = 0u64.wrapping_sub(1 << (x.k() - 1));
        let (v, i) = (fill(&value, left, m, floor), fill(&index, left, m, (1 << 23) - 1));
        let bits = side_by_side(s, &at, &v, m, radix, narrow)?;
        let winner = winners(s, &at, &bits, radix, wide)?;
        let pairs = interleave(&v, &i, radix)?;
        let select = Arc::new(Select { group: radix, columns: 2 });
        let both = product(s, &at.at("select"), &winner, &pairs, select)?.finish(s)?;
        let rows = |b: &Masked| Rows::ragged((0..tokens).map(|t| b.rows().row(t).len() / 2));
        let half = |j: usize| both.map(f, rows(&both), |v| v.iter().skip(j).step_by(2).copied().collect());
        (value, index) = (half(0), half(1));
        between(s)?;
    }
    index.narrow(INDEX_BITS)
}

/// Extends every token's `n` candidates to `m` with a public constant.
fn fill(x: &Masked, n: usize, m: usize, with: u64) -> Masked {
    let tokens = x.rows().tokens();
    let rows = Rows::ragged((0..tokens).map(|t| x.rows().row(t).len() / n * m));
    let with = if x.side() == crate::share::Side::Value { with } else { 0 };
    x.map(x.f(), rows, |v| {
        v.chunks(n).flat_map(|c| c.iter().copied().chain(std::iter::repeat_n(with, m - n))).collect()
    })
}

/// `[x_i < x_j]` for all `i < j` of each group, as one masked bit each.
fn side_by_side(s: &mut Session, scope: &Scope, x: &Masked, m: usize, radix: usize, narrow: u32) -> Result<Masked> {
    let pairs = radix * (radix - 1) / 2;
    let tokens = x.rows().tokens();
    let rows = Rows::ragged((0..tokens).map(|t| x.rows().row(t).len() / radix * pairs));
    debug_assert_eq!(m % radix, 0);
    let diff = x.map(x.f(), rows, |v| {
        let mut out = Vec::with_capacity(v.len() / radix * pairs);
        for g in v.chunks(radix) {
            for i in 0..radix {
                out.extend(g[i + 1..].iter().map(|b| g[i].wrapping_sub(*b)));
            }
        }
        out
    });
    compare::is_negative(s, &scope.at("compare"), &diff.narrow(narrow)?, 1)?.finish(s)
}

/// 1 for the candidate of each group that won all its comparisons, 0 for the others, in ring `k`. The comparisons of one
/// candidate are bits `d xor r`, which index a table whose rows are permuted by `r`.
fn winners(s: &mut Session, scope: &Scope, bits: &Masked, radix: usize, k: u32) -> Result<Masked> {
    let pairs = radix * (radix - 1) / 2;
    let pair = |i: usize, j: usize| i * (2 * radix - i - 1) / 2 + (j - i - 1);
    let tokens = bits.rows().tokens();
    let rows = Rows::ragged((0..tokens).map(|t| bits.rows().row(t).len() / pairs * radix));
    let n_rows = winner_rows(radix);
    let codes: Vec<u32> = bits
        .raw()
        .chunks(pairs)
        .flat_map(|b| {
            (0..radix).map(move |i| {
                (0..radix)
                    .filter(|&j| j != i)
                    .enumerate()
                    .fold(0u32, |code, (at, j)| code | (b[pair(i.min(j), i.max(j))] as u32) << at)
            })
        })
        .collect();
    // Bit (i, j) says x_i < x_j for i < j. Candidate i wins if all its bits with j > i are 0 (ties go to the lower index) and
    // all with j < i are 1.
    let wins: Vec<u32> = (0..radix).map(|i| (1u32 << i) - 1).collect();
    let scope = scope.at("winner");
    let q = Query { rows: &rows, n_rows, words: 1, folded: 0, k };
    if s.is_owner() {
        let v = lookup::online(s, &scope, &q, &codes)?.finish(s)?;
        return Ok(Masked::new(v, side(s), k, 0, rows));
    }
    let rout = lookup::out_masks(s, &scope, &q)?;
    let (sub, low, bytes) = (Arc::clone(&rout), ring::mask(k), n_rows / 8);
    let answer = move |e: Range<usize>, query: &[u8]| {
        let mut out = Vec::with_capacity(e.len());
        for (i, q) in e.zip(query.chunks(bytes)) {
            let row = (wins[i % radix] ^ codes[i]) as usize;
            let hit = q[row / 8] >> (row % 8) & 1;
            let parity = q.iter().fold(0u8, |a, b| a ^ b).count_ones() % 2 == 1;
            lookup::expand_bits(u64::from(hit), parity, &[1], &sub[i..=i], low, &mut out);
        }
        out
    };
    lookup::masks(s, &scope, &q, Arc::new(answer))?;
    Ok(Masked::new(rout.to_vec(), side(s), k, 0, rows))
}

/// Group by group: the group's values, then its indices.
fn interleave(value: &Masked, index: &Masked, radix: usize) -> Result<Masked> {
    let both = concat(&[value, index])?;
    let rows = both.rows().clone();
    Ok(both.map(value.f(), rows.clone(), |v| {
        let mut out = Vec::with_capacity(v.len());
        for t in 0..rows.tokens() {
            let row = &v[rows.row(t)];
            let (a, b) = row.split_at(row.len() / 2);
            for (a, b) in a.chunks(radix).zip(b.chunks(radix)) {
                out.extend_from_slice(a);
                out.extend_from_slice(b);
            }
        }
        out
    }))
}

#[cfg(test)]
mod tests {
    #[test]
    fn levels_shrink_by_the_radix() {
        let levels = super::levels(2048, &[3, 4, 8]).collect::<Vec<_>>();
        assert_eq!(levels, [(2048, 3), (683, 4), (171, 8), (22, 8), (3, 8)]);
        assert_eq!(super::depth(32_000, &[8]), 5);
        assert_eq!(super::depth(1, &[4]), 0);
    }
}
