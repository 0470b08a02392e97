//! Carry-free windows: splitting a masked value into digits without a carry.
//!
//! `x = hi 2^(low + c) + lo 2^low` (plus dropped bits) with `hi = (d_hi + r_hi) mod 2^h` and `lo = d_lo + r_lo`
//! UNREDUCED, in `[0, 2^(c+1) - 2]`: exact, `hi` being one less when `lo` overflows. Hence tables are fitted on doubled
//! intervals, and `lo` is an honest integer that may be used in any ring without a lift. Local; reveals nothing.
//!
//! A window must reach the top of its ring, or `hi` would alias: [`Window::of`] refuses any other. The lowest `hi`
//! interval belongs to the carry, so the safe range of a signed value is `[-2^(k-1) + 2^(k-h), 2^(k-1))`.

use crate::error::{Error, Result};
use crate::ring;
use crate::share::{Masked, Rows, Side};

/// One party's half of small digits: `d` at the Owner, `r` at the others; the digit is `d + r`.
#[derive(Clone)]
pub struct Digits {
    pub(crate) v: Vec<u32>,
    pub(crate) side: Side,
    pub(crate) bits: u32,
    pub(crate) rows: Rows,
}

impl Digits {
    /// Bits `from..from + bits` of every element.
    ///
    /// # Errors
    /// [`Error::Shape`] beyond the ring or for more than 24 bits.
    pub fn cut(x: &Masked, from: u32, bits: u32) -> Result<Digits> {
        if bits > 24 || from + bits > x.k() {
            return Err(Error::Shape { op: "window", lhs: x.facts(), rhs: format!("bits {from}..{}", from + bits) });
        }
        let m = if bits == 0 { 0 } else { ring::mask(bits) };
        let v = x.raw().iter().map(|w| ((w >> from) & m) as u32).collect();
        Ok(Digits { v, side: x.side(), bits, rows: x.rows().clone() })
    }

    /// The unreduced digit as a masked integer of `f` fraction bits in any ring.
    #[must_use]
    pub fn integer(&self, k: u32, f: u32) -> Masked {
        Masked::new(self.v.iter().map(|&v| u64::from(v)).collect(), self.side, k, f, self.rows.clone())
    }
}

/// The two digits of a window.
pub struct Window {
    /// `hi`, to be read modulo `2^h`.
    pub hi: Digits,
    /// `lo`, unreduced.
    pub lo: Digits,
}

impl Window {
    /// Splits `x` into `hi` (the top `high` bits) and `lo` (`c` bits above the lowest `low`).
    ///
    /// # Errors
    /// [`Error::Shape`] unless `low + c + high` is the ring width.
    pub fn of(x: &Masked, low: u32, c: u32, high: u32) -> Result<Window> {
        if low + c + high != x.k() {
            let rhs = format!("a window of {low} + {c} + {high} bits, which must reach the top of the ring");
            return Err(Error::Shape { op: "window", lhs: x.facts(), rhs });
        }
        Ok(Window { hi: Digits::cut(x, low + c, high)?, lo: Digits::cut(x, low, c)? })
    }
}
