//! Truncation: local, and the ring shrinks with it.
//!
//! | | Owner | Client, Helper |
//! |---|---|---|
//! | holds | `d` | `r` |
//! | computes | `(d + 2^t - 1) >> t` | `r >> t` |
//!
//! The result lives in `Z_2^(k-t)`, so the carry out of the top that makes truncation of shares wrap in a fixed ring
//! falls off the end: there is no large error, only one of (-1, 1) units in the last place with mean 0 (the Owner's
//! `2^t - 1` centres it). Shrinking rings instead of probabilistic truncation: Escudero et al. (CRYPTO 2020), Ditto
//! (2024). No message, nothing revealed: each side maps what it holds. Only fresh values are opened to anyone, never a
//! truncated one, because the dropped bits of `d` and `r` are correlated with what stays.

use crate::error::{Error, Result};
use crate::ring;
use crate::share::{Masked, Side};

/// Drops the low `t` bits; ring `k - t`, fraction bits `f - t`.
///
/// # Errors
/// [`Error::Shape`] if fewer than `t` fraction bits or no ring would be left.
pub fn truncate(x: &Masked, t: u32) -> Result<Masked> {
    if t >= x.k() || t > x.f() {
        return Err(Error::Shape { op: "truncate", lhs: x.facts(), rhs: format!("{t} bits") });
    }
    if t == 0 {
        return Ok(x.clone());
    }
    let m = ring::mask(x.k());
    let up = match x.side() {
        Side::Value => (1u64 << t) - 1,
        Side::Mask => 0,
    };
    let v = x.raw().iter().map(|&w| (w.wrapping_add(up) & m) >> t).collect();
    Ok(Masked::reduced(v, x.side(), x.k() - t, x.f() - t, x.rows().clone()))
}
