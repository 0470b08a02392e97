//! Positive part: `max(x, 0)` of a small-ring value in a larger ring, exact over the whole small ring, in 6 messages.
//!
//! The sign by [`super::compare`] (4), in the larger ring, beside the lift of the value (2); then their product (2). A lift is
//! exact for half of a ring's values only; since negative ones are multiplied by an exact zero, only those from 0 up have to be
//! lifted rightly: they are moved down by a quarter of the ring before, and back behind it.
//!
//! Cost: that of [`compare`], a lift and a product of `k` bits. Private: as these.

use std::sync::Arc;

use super::Pending;
use super::compare::{self, is_negative};
use super::lift::{self, lift};
use super::product::{self, Elementwise, product};
use crate::error::Result;
use crate::plan::cost::Cost;
use crate::session::{Scope, Session};
use crate::share::Masked;

/// What it costs for `n` values of ring `from`, a multiple of 4 bits, and a result of `k` bits.
#[must_use]
pub fn cost(n: usize, from: u32, k: u32) -> Cost {
    compare::cost(n, from as usize / 4, k).beside(lift::cost(n, from, k)).then(product::cost(n, n, n, k))
}

/// `max(x, 0)` in ring `k`. The ring of `x` must be a multiple of 4 bits, 8 to 24.
///
/// # Errors
/// [`crate::Error::Shape`] for another ring; [`crate::Error::Peer`], [`crate::Error::Reuse`].
pub fn positive_part(s: &mut Session, scope: &Scope, x: &Masked, k: u32) -> Result<Pending<'static, Masked>> {
    let quarter = 1u64 << (x.k() - 2);
    let lifted = lift(s, &scope.at("lift"), &x.clone().offset(0u64.wrapping_sub(quarter)), k)?;
    let negative = is_negative(s, &scope.at("sign"), x, k)?;
    let (lifted, negative) = (lifted.finish(s)?.offset(quarter), negative.finish(s)?);
    let positive = negative.map(0, negative.rows().clone(), |v| v.iter().map(|b| 0u64.wrapping_sub(*b)).collect());
    product(s, &scope.at("product"), &lifted, &positive.offset(1), Arc::new(Elementwise))
}
