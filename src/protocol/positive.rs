//! A function of a positive value over a wide range (`1/sqrt`, `1/x`): two windows looked up side by side, a selector, and
//! one polynomial.
//!
//! `f(v) ~ a1 + b1 lo1 + s (a2 + b2 lo2)`: the first window covers the top of the range; its table is zero and its selector
//! `s` is 1 where the value is too small for it, and then the second, finer window applies (see
//! [`crate::approx::PositiveTable`]). Cost: 4 messages; two lookups (`2^(w+1)` bits up, six words back) and a polynomial of
//! eight shares per value. Where even the second window is too coarse, `s low` counts a range fault. Private: lookups and a
//! polynomial. Error: the table's, stated there, and the rounding of its columns.

use std::sync::Arc;

use super::Pending;
use super::lookup::{self, Table};
use super::polynomial::polynomial;
use super::product::{Elementwise, product};
use super::window::Digits;
use crate::approx::PositiveTable;
use crate::error::Result;
use crate::plan::cost::Cost;
use crate::ring::fixed;
use crate::session::{Scope, Session};
use crate::share::Masked;

/// A [`PositiveTable`] encoded with `f` fraction bits.
#[derive(Clone)]
pub struct Positive {
    /// Its windows, without columns.
    table: PositiveTable,
    first: [Table; 3],
    second: [Table; 3],
    f: u32,
}

const MONOMIALS: [&[usize]; 4] = [&[0], &[1, 2], &[3, 4], &[3, 5, 6]];

impl Positive {
    /// Encodes the columns.
    #[must_use]
    pub fn new(table: PositiveTable, f: u32) -> Self {
        let column = |v: &[f64], f| Table::cyclic(&v.iter().map(|&v| fixed::encode(v, f, 64)).collect::<Vec<_>>());
        let first = [column(&table.a1, f), column(&table.b1, f), column(&table.s, 0)];
        let second = [column(&table.a2, f), column(&table.b2c, f), column(&table.low, 0)];
        // The columns stay as words only; as floats they would be half as much again.
        let table = PositiveTable::blank(table.bits, table.window);
        Positive { table, first, second, f }
    }

    /// With columns of zeros, all of them one: for walks that count instead of computing.
    pub(crate) fn blank(bits: u32, window: u32, f: u32) -> Self {
        let table = PositiveTable::blank(bits, window);
        let columns = |window: u32| {
            let zeros = Table::cyclic(&vec![0; 1 << window]);
            [zeros.clone(), zeros.clone(), zeros]
        };
        Positive { first: columns(table.window), second: columns(table.window2), table, f }
    }

    /// What it costs for `n` values, with or without counting faults.
    #[must_use]
    pub fn cost(&self, n: usize, count_bits: Option<u32>) -> Cost {
        let lookups =
            lookup::cost(n, 1 << self.table.window, 3, 64).beside(lookup::cost(n, 1 << self.table.window2, 3, 64));
        let mut rest = super::polynomial::cost(n, super::polynomial::cofactors(&MONOMIALS), 64);
        if let Some(k) = count_bits {
            rest = rest.beside(super::product::cost(n, n, n, k));
        }
        lookups.then(rest)
    }
}

/// Lookups under way.
pub struct Looked<'t> {
    p: &'t Positive,
    first: Pending<'static, Vec<Masked>>,
    second: Pending<'static, Vec<Masked>>,
    lo1: Masked,
    lo2: Masked,
}

/// The polynomial under way: the function's value (ring 64), and the faults if they are counted.
pub struct Evaluated {
    /// `f(v)`.
    pub value: Pending<'static, Masked>,
    /// Nonzero where `v` was too small.
    pub faults: Option<Pending<'static, Masked>>,
}

/// Starts the lookups for `v`, whose value is positive and below `2^bits` (proven or guarded).
///
/// # Errors
/// [`crate::Error::Shape`] if the ring is narrower than the table's; [`crate::Error::Peer`], [`crate::Error::Reuse`].
pub fn start<'t>(s: &mut Session, scope: &Scope, v: &Masked, p: &'t Positive) -> Result<Looked<'t>> {
    let t = &p.table;
    let (v1, v2) = (v.narrow(t.bits)?, v.narrow(t.b2)?);
    let hi1 = Digits::cut(&v1, t.bits - t.window, t.window)?;
    let hi2 = Digits::cut(&v2, t.b2 - t.window2, t.window2)?;
    let f = [p.f, p.f, 0];
    Ok(Looked {
        p,
        first: lookup::words(s, &scope.at("window1"), &hi1, &p.first, &f, 64)?,
        second: lookup::words(s, &scope.at("window2"), &hi2, &p.second, &f, 64)?,
        lo1: Digits::cut(&v1, t.lo1_low, t.lo1_bits)?.integer(64, 0),
        lo2: Digits::cut(&v2, t.lo2_low, t.lo2_bits)?.integer(64, 0),
    })
}

impl Looked<'_> {
    /// Receives the rows and starts the polynomial; counts faults in ring `count_bits` if given.
    ///
    /// # Errors
    /// [`crate::Error::Peer`], [`crate::Error::Reuse`].
    pub fn evaluate(self, s: &mut Session, scope: &Scope, count_bits: Option<u32>) -> Result<Evaluated> {
        let (first, second) = (self.first.finish(s)?, self.second.finish(s)?);
        let ([a1, b1, sel], [a2, b2, low]) = (first.as_slice(), second.as_slice()) else {
            return Err(crate::Error::Internal("three columns per window".into()));
        };
        debug_assert_eq!(a1.f(), self.p.f);
        let operands = [a1, b1, &self.lo1, sel, a2, b2, &self.lo2];
        let value = polynomial(s, &scope.at("select"), &operands, &MONOMIALS)?;
        let faults = match count_bits {
            None => None,
            Some(k) => Some(product(s, &scope.at("low"), &sel.narrow(k)?, &low.narrow(k)?, Arc::new(Elementwise))?),
        };
        Ok(Evaluated { value, faults })
    }
}
