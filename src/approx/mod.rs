//! Which table stands for which function, and how wrong it is. Tables are fitted for carry-free windows: of a masked
//! value `x = d + r`, `hi = (hd + hr) mod 2^h` picks a row and `lo = ld + lr` is left UNREDUCED in `[0, 2^(c+1) - 2]`, so
//! `x = hi 2^c + lo` holds exactly with `hi` one less whenever `lo` overflows: every row serves a DOUBLED interval.
//! Rows are lines `a + b lo` ([`line`](mod@line)); bits below a window are lost, on average `2^low - 1` units, which the fits add
//! back. All of it is public and computed once; tables are `f64` and the caller encodes them.
//!
//! | function | table | error |
//! |---|---|---|
//! | SiLU, GELU, sigmoid over a signed ring | [`SignedTable`] | absolute, `max_error` |
//! | e^x, rising to a known top | [`ExpTables`] | relative, `max_rel_error` |
//! | 1/sqrt, 1/x of a positive value, 2^(2w - 11) of dynamic range | [`PositiveTable`] | relative, `max_rel_error` |

mod activation;
mod exp;
pub mod line;
mod positive;
mod signed;

pub use activation::Activation;
pub use exp::{ExpTables, exp_tables};
pub use positive::PositiveTable;
pub(crate) use positive::levelled;
pub use signed::SignedTable;

/// Ring units by which the bits below `low` of two shares exceed nothing on average: they sum to `0..=2^(low+1) - 2`.
fn dropped(low: u32) -> f64 {
    (low as f64).exp2() - 1.0
}

#[cfg(test)]
mod window {
    //! The windows as the parties compute them.

    use crate::ring::mask;

    /// `(hi, lo)` of `x = d + r` in Z_2^k, `k = low + lo_bits + hi_bits`.
    pub fn split(x: u64, r: u64, low: u32, lo_bits: u32, hi_bits: u32) -> (usize, u64) {
        let d = x.wrapping_sub(r) & mask(low + lo_bits + hi_bits);
        let r = r & mask(low + lo_bits + hi_bits);
        let lo = |v: u64| v >> low & ((1 << lo_bits) - 1);
        let hi = |v: u64| v >> (low + lo_bits) & ((1 << hi_bits) - 1);
        (((hi(d) + hi(r)) & ((1 << hi_bits) - 1)) as usize, lo(d) + lo(r))
    }

    /// Masks that make every low part carry, none, and something between: for a value `x`.
    pub fn masks(x: u64, seed: &mut u64) -> [u64; 6] {
        let mut next = || {
            *seed = seed.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            (*seed ^ (*seed >> 29)).wrapping_mul(0x9e37_79b9_7f4a_7c15)
        };
        [0, u64::MAX, x, x.wrapping_add(1), next(), next()]
    }
}
