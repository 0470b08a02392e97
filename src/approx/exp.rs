//! The exponential as one small table and two factors: `e^x = e^hi e^d_lo e^r_lo`.

use crate::ring::fixed;

/// `e^x` for `x <= top`, in a ring of `lo_bits + hi_bits` bits, as a product of a row of `hi` and one factor for each half of
/// the unreduced low digit.
///
/// The cyclic rows are read ASYMMETRICALLY: exponents of a softmax reach far down and hardly up, so the rows stand for the
/// window that ENDS at the first row boundary above `top`. The tables hold for `x` in `[min_x, limit)`, which has
/// the whole ring but one row: the lowest row belongs to the carry. No bits are dropped: exact but for the rounding.
#[derive(Clone, Debug, PartialEq)]
pub struct ExpTables {
    /// Bits of the low part.
    pub lo_bits: u32,
    /// Bits of the high part; the window reaches the top of the ring.
    pub hi_bits: u32,
    /// `e^hi` with `f_hi` fraction bits, `2^hi_bits` rows, none above `e^top`.
    pub hi: Vec<u64>,
    /// As many as 53 bits of a row allow, but not more than 40.
    pub f_hi: u32,
    /// `e^lo` with `f_lo` fraction bits, `2^lo_bits` entries: half of a low digit.
    pub lo: Vec<u32>,
    /// As many as 32 bits allow.
    pub f_lo: u32,
    /// The smallest value for which the tables hold: above `-(R - top - 2 step)`, `R` the ring's range, `step` a row's.
    pub min_x: f64,
    /// Values below this are right; from here on they alias to the smallest. Above `top`, by at most a step.
    pub limit: f64,
}

/// Tables for `e^x` over a ring of `lo_bits + hi_bits` bits with `f` fraction bits, for `x <= top`. `top` is a promise of the
/// caller; nothing aliases as long as `x < limit`.
///
/// # Panics
/// If `hi_bits` is not in 1..=24, `lo_bits` is above 24, or a row is wider than `e^11`.
#[must_use]
pub fn exp_tables(f: u32, lo_bits: u32, hi_bits: u32, top: f64) -> ExpTables {
    assert!((1..=24).contains(&hi_bits) && lo_bits <= 24, "1 to 24 bits");
    let unit = (-f64::from(f)).exp2();
    let step = f64::from(lo_bits).exp2() * unit;
    assert!(step <= 11.0, "a factor that fits 16 bits");
    let rows = 1i64 << hi_bits;
    // A carry only ever lowers the row, so no row is needed above the one that holds `top`.
    let end = (top / step).floor() as i64 + 1;
    let bits = |x: f64| (x * std::f64::consts::LOG2_E).max(0.0).ceil() as u32;
    let (f_hi, f_lo) = (52u32.saturating_sub(bits(top)).min(40), 31 - bits(step));
    let hi = (0..rows).map(|i| {
        let hi = end - rows + (i - end).rem_euclid(rows);
        fixed::encode((hi as f64 * step).min(top).exp(), f_hi, 64)
    });
    let lo = (0..1u64 << lo_bits).map(|i| fixed::encode((i as f64 * unit).exp(), f_lo, 32) as u32);
    ExpTables {
        lo_bits,
        hi_bits,
        hi: hi.collect(),
        f_hi,
        lo: lo.collect(),
        f_lo,
        min_x: (end - rows + 1) as f64 * step,
        limit: end as f64 * step,
    }
}

#[cfg(test)]
mod tests {
    use super::super::window;
    use super::*;

    fn exp_at(t: &ExpTables, x: i64, r: u64) -> f64 {
        let (lo_bits, m) = (t.lo_bits, (1u64 << t.lo_bits) - 1);
        let (hi, lo) = window::split(x as u64, r, 0, lo_bits, t.hi_bits);
        // The holders' half of the digit, and what is left of it for the Owner's.
        let r_lo = r & m;
        let d_lo = lo - r_lo;
        let lo = |v: u64| f64::from(t.lo[v as usize]) / f64::from(t.f_lo).exp2();
        t.hi[hi] as f64 / f64::from(t.f_hi).exp2() * lo(d_lo) * lo(r_lo)
    }

    #[test]
    fn right_over_the_whole_range() {
        for (f, lo_bits, hi_bits, top) in [(12, 12, 7, 4.0), (12, 10, 9, 0.0), (12, 14, 10, 16.0), (12, 12, 5, 2.0)] {
            let tables = exp_tables(f, lo_bits, hi_bits, top);
            let k = lo_bits + hi_bits;
            let scale = f64::from(f).exp2();
            let step = 1i64 << lo_bits;
            let (range, width) = (f64::from(k).exp2() / scale, step as f64 / scale);
            assert!(tables.min_x <= -(range - top - 2.0 * width), "{tables:?}");
            assert!(tables.limit > top && tables.limit <= top + width);
            let unit = (-f64::from(tables.f_hi)).exp2();
            assert!(tables.hi.iter().all(|v| *v as f64 * unit <= top.exp() + unit && *v < 1 << 53));
            let (first, end) = ((tables.min_x * scale) as i64, (tables.limit * scale) as i64);
            let deepest = exp_at(&tables, first, u64::MAX);
            assert!(deepest <= (tables.min_x + width).exp() + unit, "the lowest row does not alias");
            let mut seed = 3;
            for x in (first..end).step_by(step as usize).flat_map(|x| [0, 1, step / 3, step - 1].map(|o| x + o)) {
                for r in window::masks(x as u64, &mut seed) {
                    let want = (x as f64 / scale).exp();
                    let error = (exp_at(&tables, x, r) - want).abs();
                    // Of a row, half a unit times both factors; of a factor, 2^-32 times its power of two each.
                    let bound = unit * (2.0 * width).exp() + want * (1.0 - f64::from(tables.f_lo)).exp2();
                    assert!(error <= bound, "e^{}: {error} of {bound}", x as f64 / scale);
                }
            }
        }
    }
}
