//! `e^x` for `x` up to a known top: two small lookups side by side and one product.
//!
//! `e^x = e^hi e^lo` over a carry-free window (see [`crate::approx::exp_tables`], which reads the cyclic window so that
//! nearly the whole ring lies below the top). Cost: 4 messages; `2^hi + 2^lo` bits up and two words back, then a product.
//! Private: lookups and a product. Relative error: the dropped bits, at most `2^(low - f)`, and the columns' rounding.

use std::sync::Arc;

use super::lookup::{self, Table};
use super::product::{Elementwise, product};
use super::truncate::truncate;
use super::window::Window;
use crate::approx::ExpTables;
use crate::error::Result;
use crate::plan::cost::Cost;
use crate::plan::{F_EXP, F_EXP_HI, F_EXP_LO};
use crate::ring::fixed;
use crate::session::{Scope, Session};
use crate::share::Masked;

/// [`ExpTables`] encoded for a result in ring `k` with `f` fraction bits.
#[derive(Clone)]
pub struct Exp {
    low: u32,
    lo_bits: u32,
    hi_bits: u32,
    hi: Table,
    lo: Table,
    k: u32,
    f: u32,
}

impl Exp {
    /// Encodes the tables; the product lives in ring `k + 27 - f`.
    #[must_use]
    pub fn new(t: &ExpTables, k: u32, f: u32) -> Self {
        let product_k = k + F_EXP - f;
        let encode = |v: &[f64], f| v.iter().map(|&v| fixed::encode(v, f, product_k)).collect::<Vec<_>>();
        Exp {
            low: t.low,
            lo_bits: t.lo_bits,
            hi_bits: t.hi_bits,
            hi: Table::cyclic(&encode(&t.hi, F_EXP_HI)),
            lo: Table::unreduced(&encode(&t.lo, F_EXP_LO)),
            k,
            f,
        }
    }

    /// What it costs for `n` values.
    #[must_use]
    pub fn cost(&self, n: usize) -> Cost {
        let k = self.k + F_EXP - self.f;
        lookup::cost(n, 1 << self.hi_bits, 1, k)
            .beside(lookup::cost(n, 1 << self.lo_bits, 1, k))
            .then(super::product::cost(n, n, n, k))
    }
}

/// `e^x`, element by element.
///
/// # Errors
/// [`crate::Error::Shape`] unless the window reaches the top of the ring of `x`; [`crate::Error::Peer`], [`crate::Error::Reuse`].
pub fn exp(s: &mut Session, scope: &Scope, x: &Masked, e: &Exp) -> Result<Masked> {
    let k = e.k + F_EXP - e.f;
    let w = Window::of(x, e.low, e.lo_bits, e.hi_bits)?;
    let hi = lookup::words(s, &scope.at("hi"), &w.hi, std::slice::from_ref(&e.hi), &[F_EXP_HI], k)?;
    let lo = lookup::words(s, &scope.at("lo"), &w.lo, std::slice::from_ref(&e.lo), &[F_EXP_LO], k)?;
    let (hi, lo) = (hi.finish(s)?, lo.finish(s)?);
    let ([hi], [lo]) = (hi.as_slice(), lo.as_slice()) else {
        return Err(crate::Error::Internal("one column per table".into()));
    };
    truncate(&product(s, &scope.at("product"), hi, lo, Arc::new(Elementwise))?.finish(s)?, F_EXP - e.f)
}
