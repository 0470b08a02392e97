//! A function of a positive value over a wide range (`1/sqrt`, `1/x`): one window, or two side by side and a selector.
//!
//! `f(v) ~ a1 + b1 lo1 + s (a2 + b2 lo2)`: the first window covers the top of the range; its table is zero and its selector
//! `s` is 1 where the value is too small for it, and then the second, finer window applies (see
//! [`crate::approx::PositiveTable`]). Cost: 2 messages for one window (`2^w + 64` bits up, four words back), 4 for two: two
//! such lines side by side, then the product with the selector. Where even the last window is too coarse, a range fault is
//! counted. Private: lines and products. Error: the table's, stated there, and the rounding of its columns.

use std::sync::Arc;

use super::Pending;
use super::evaluate::{Lines, Table, line};
use super::normalise::Normalised;
use super::product::{self, Elementwise, product};
use super::window::{Digits, Window};
use crate::approx::{PositiveTable, levelled};
use crate::error::{Error, Result};
use crate::plan::cost::Cost;
use crate::ring::fixed;
use crate::session::{Scope, Session};
use crate::share::Masked;

/// A [`PositiveTable`] encoded with `f` fraction bits.
#[derive(Clone)]
pub struct Positive {
    /// Its windows, without columns.
    table: PositiveTable,
    first: Lines,
    second: Option<Lines>,
    f: u32,
}

impl Positive {
    /// Encodes the columns.
    #[must_use]
    pub fn new(table: PositiveTable, f: u32) -> Self {
        let column = |v: &[f64], f| Table::cyclic(&v.iter().map(|&v| fixed::encode(v, f, 64)).collect::<Vec<_>>());
        let lines = |a: &[f64], b: &[f64], lo_bits, other: &[f64]| {
            let a = levelled(a, b, lo_bits, f);
            Lines::new(column(&a, f), column(b, f), vec![column(other, 0)])
        };
        let first = lines(&table.a1, &table.b1, table.lo1_bits, &table.s);
        let second = match table.alone {
            true => None,
            false => Some(lines(&table.a2, &table.b2c, table.lo2_bits, &table.low)),
        };
        // The columns stay as words only; as floats they would be half as much again.
        let table = PositiveTable { alone: table.alone, ..PositiveTable::blank(table.bits, table.window) };
        Positive { table, first, second, f }
    }

    /// With columns of zeros, all of them one: for walks that count instead of computing.
    pub(crate) fn blank(bits: u32, window: u32, alone: bool, f: u32) -> Self {
        let table = PositiveTable { alone, ..PositiveTable::blank(bits, window) };
        let lines = |window: u32| {
            let zeros = Table::cyclic(&vec![0; 1 << window]);
            Lines::new(zeros.clone(), zeros.clone(), vec![zeros])
        };
        let second = if alone { None } else { Some(lines(table.window2)) };
        Positive { first: lines(table.window), second, table, f }
    }

    /// Whether one window serves the whole range, as [`normalise`] needs it.
    #[must_use]
    pub fn single(&self) -> bool {
        self.second.is_none()
    }

    /// What it costs for `n` values, with or without counting faults.
    #[must_use]
    pub fn cost(&self, n: usize, count_bits: Option<u32>) -> Cost {
        let first = self.first.cost(n, 64);
        let Some(second) = &self.second else { return first };
        let mut select = product::cost(n, n, n, 64);
        if let Some(k) = count_bits {
            select = select.beside(product::cost(n, n, n, k));
        }
        first.beside(second.cost(n, 64)).then(select)
    }
}

/// Lines under way.
pub struct Looked {
    first: Pending<'static, Vec<Masked>>,
    second: Option<Pending<'static, Vec<Masked>>>,
}

/// The function's value (ring 64), and the faults if they are counted; both perhaps still under way.
pub struct Evaluated {
    /// `f(v)`.
    pub value: Pending<'static, Masked>,
    /// Nonzero where `v` was too small.
    pub faults: Option<Pending<'static, Masked>>,
}

/// Starts the lines for `v`, whose value is positive and below `2^bits` (proven or guarded).
///
/// # Errors
/// [`crate::Error::Shape`] if the ring is narrower than the table's; [`crate::Error::Peer`], [`crate::Error::Reuse`].
pub fn start(s: &mut Session, scope: &Scope, v: &Masked, p: &Positive) -> Result<Looked> {
    let t = &p.table;
    let window = |v: &Masked, (bits, rows): (u32, u32), (low, lo_bits): (u32, u32)| {
        Ok::<_, Error>(Window { hi: Digits::cut(v, bits - rows, rows)?, lo: Digits::cut(v, low, lo_bits)? })
    };
    let first = window(&v.narrow(t.bits)?, (t.bits, t.window), (t.lo1_low, t.lo1_bits))?;
    let first = line(s, &scope.at("window1"), &first, &p.first, p.f, 64)?;
    let second = match &p.second {
        None => None,
        Some(lines) => {
            let second = window(&v.narrow(t.b2)?, (t.b2, t.window2), (t.lo2_low, t.lo2_bits))?;
            Some(line(s, &scope.at("window2"), &second, lines, p.f, 64)?)
        }
    };
    Ok(Looked { first, second })
}

/// Vectors times the function of a value each, in one exchange: `x` (ring 64) has a group of elements for every element of `v`.
/// The column of the result is nonzero where `v` was too small. For a table of one window.
///
/// # Errors
/// [`crate::Error::Shape`] for two windows, or vectors that do not go with the values; [`crate::Error::Peer`], [`crate::Error::Reuse`].
pub fn normalise(
    s: &mut Session,
    scope: &Scope,
    v: &Masked,
    x: &Masked,
    p: &Positive,
) -> Result<Pending<'static, Normalised>> {
    let t = &p.table;
    if p.second.is_some() {
        return Err(Error::Shape { op: "normalise", lhs: v.facts(), rhs: "a table of two windows".into() });
    }
    let v = v.narrow(t.bits)?;
    let hi = Digits::cut(&v, t.bits - t.window, t.window)?;
    let window = Window { hi, lo: Digits::cut(&v, t.lo1_low, t.lo1_bits)? };
    super::normalise::normalise(s, scope, x, &window, &p.first, p.f)
}

impl Looked {
    /// Receives the lines and, of two, starts the selection; counts faults in ring `count_bits` if given.
    ///
    /// # Errors
    /// [`crate::Error::Peer`], [`crate::Error::Reuse`].
    pub fn evaluate(self, s: &mut Session, scope: &Scope, count_bits: Option<u32>) -> Result<Evaluated> {
        let two = |values: Vec<Masked>| -> Result<[Masked; 2]> {
            values.try_into().map_err(|_| Error::Internal("a line and a column per window".into()))
        };
        let [value, flag] = two(self.first.finish(s)?)?;
        let Some(second) = self.second else {
            let faults = count_bits.map(|k| flag.narrow(k)).transpose()?.map(Pending::ready);
            return Ok(Evaluated { value: Pending::ready(value), faults });
        };
        let [finer, low] = two(second.finish(s)?)?;
        let picked = product(s, &scope.at("select"), &flag, &finer, Arc::new(Elementwise))?;
        let faults = match count_bits {
            None => None,
            Some(k) => Some(product(s, &scope.at("low"), &flag.narrow(k)?, &low.narrow(k)?, Arc::new(Elementwise))?),
        };
        let value = picked.then(move |picked| value.add(&picked));
        Ok(Evaluated { value, faults })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `calibrate::NORM` counts on: with ten bits left to the least value, the columns that are looked up give the root to half a percent.
    #[test]
    fn ten_bits_hold_a_root() {
        let f = 20;
        for (bits, window, alone) in [
            (16, 12, true),
            (24, 12, true),
            (33, 12, false),
            (37, 13, true),
            (40, 14, true),
            (40, 12, false),
            (39, 17, true),
        ] {
            let fit = if alone { PositiveTable::rsqrt_alone } else { PositiveTable::rsqrt };
            // 2^10 units of `2^-f` at the largest value.
            let table = fit(bits, window, f64::from(bits).exp2(), 0.0, f64::from(10 - 20).exp2());
            let p = Positive::new(table.clone(), f);
            let windows = [
                (Some(&p.first), bits, window, table.lo1_low),
                (p.second.as_ref(), table.b2, table.window2, table.lo2_low),
            ];
            for (lines, bits, window, low) in windows {
                let Some(lines) = lines else { continue };
                let [a, b, _] = lines.entries()[..] else { panic!("three columns") };
                let lo_bits = bits - window - low;
                let mut worst = 0f64;
                for hi in 32..(1usize << window) - 1 {
                    for lo in [0, 1, 31, 63, 95, 126].map(|lo: u64| lo.min((2 << lo_bits) - 2)) {
                        let got = a[hi].wrapping_add(b[hi].wrapping_mul(lo)) as i64 as f64 * f64::from(-20).exp2();
                        let v = (((hi as u64) << (bits - window)) + (lo << low)) as f64 + ((1u64 << low) - 1) as f64;
                        worst = worst.max(
                            (got / (v.sqrt() / f64::from(table.bits).exp2().sqrt()).recip() / f64::from(-10).exp2()
                                - 1.0)
                                .abs(),
                        );
                    }
                }
                assert!((1e-5..5.5e-3).contains(&worst), "{bits} {window}: {worst}");
            }
        }
    }
}
