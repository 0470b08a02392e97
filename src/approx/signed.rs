//! Tables for functions of a signed value over its whole ring: one row of `a` and `b` per high part.

use super::line::Line;
use super::{Activation, dropped};

/// `fn(x) ~ a[hi] + b[hi] lo` for a signed value in a ring of `low + lo_bits + hi_bits` bits.
///
/// Row `i` means `hi = i`, or `i - 2^hi_bits` from the middle row on. The lowest interval belongs to the carry: the table
/// holds for `x` (in ring units, `k` bits) in `[-2^(k-1) + 2^(k-hi_bits), 2^(k-1))`; below that the row wraps to the top one.
#[derive(Clone, Debug, PartialEq)]
pub struct SignedTable {
    /// Bits dropped below the window.
    pub low: u32,
    /// Bits of the interpolation variable; unreduced it is in `[0, 2^(lo_bits+1) - 2]`.
    pub lo_bits: u32,
    /// Bits of the row number; the window reaches the top of the ring.
    pub hi_bits: u32,
    /// Value at `lo = 0`, per row.
    pub a: Vec<f64>,
    /// Slope per unit of `lo`, per row.
    pub b: Vec<f64>,
    /// Largest absolute error over the safe range, before `a` and `b` are encoded.
    pub max_error: f64,
}

impl SignedTable {
    /// Fits `function` over a ring of `k` bits with `f` fraction bits, window `low + lo_bits + hi_bits == k`.
    ///
    /// Costs `2^hi_bits` line fits of up to 129 points.
    ///
    /// # Panics
    /// If the window does not reach exactly from `low` to the top of the ring, or `hi_bits` is 0 or above 24.
    #[must_use]
    pub fn fit(function: impl Fn(f64) -> f64, k: u32, f: u32, low: u32, lo_bits: u32, hi_bits: u32) -> SignedTable {
        assert_eq!(low + lo_bits + hi_bits, k, "a window must reach the top of its ring");
        assert!((1..=24).contains(&hi_bits), "1 to 24 row bits");
        let ring_unit = (-f64::from(f)).exp2();
        let unit = f64::from(low).exp2() * ring_unit;
        let centre = dropped(low) * ring_unit;
        let rows = 1i64 << hi_bits;
        let (mut a, mut b, mut max_error) = (Vec::new(), Vec::new(), 0f64);
        for i in 0..rows {
            let hi = if i >= rows / 2 { i - rows } else { i };
            let x0 = hi as f64 * f64::from(lo_bits).exp2() * unit;
            let line = Line::fit(&function, x0 + centre, unit, lo_bits);
            // what the dropped bits can move the function by, on top of the fit
            let moved = if low == 0 {
                0.0
            } else {
                let at = |step: i64| function(x0 + centre + step as f64 * unit);
                (0..=2i64 << lo_bits.min(6))
                    .map(|i| i << lo_bits.saturating_sub(6))
                    .map(|lo| (at(lo + 1) - at(lo)).abs().max((at(lo) - at(lo - 1)).abs()))
                    .fold(0.0, f64::max)
            };
            max_error = max_error.max(line.max_error + moved);
            a.push(line.a);
            b.push(line.b);
        }
        SignedTable { low, lo_bits, hi_bits, a, b, max_error }
    }

    /// [`SignedTable::fit`] of a named activation.
    ///
    /// # Panics
    /// As [`SignedTable::fit`].
    #[must_use]
    pub fn activation(function: Activation, k: u32, f: u32, low: u32, lo_bits: u32, hi_bits: u32) -> SignedTable {
        SignedTable::fit(|x| function.eval(x), k, f, low, lo_bits, hi_bits)
    }

    /// The table's value for a row and an interpolation variable.
    ///
    /// # Panics
    /// If there is no such row.
    #[must_use]
    pub fn at(&self, hi: usize, lo: u64) -> f64 {
        self.a[hi] + self.b[hi] * lo as f64
    }

    /// The signed values, in ring units, for which the table holds: `(first, last)`.
    #[must_use]
    pub fn safe_range(&self) -> (i64, i64) {
        let half = 1i64 << (self.low + self.lo_bits + self.hi_bits - 1);
        (-half + (1 << (self.low + self.lo_bits)), half - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::super::window;
    use super::*;
    use crate::ring::fixed::decode;

    /// Every row at its edges and inside, every carry case: the worst error met.
    fn worst(table: &SignedTable, function: Activation, f: u32) -> f64 {
        let k = table.low + table.lo_bits + table.hi_bits;
        let (first, last) = table.safe_range();
        let step = 1i64 << (table.low + table.lo_bits);
        let mut seed = 1;
        let mut worst = 0f64;
        let inside = [0, 1, step / 5, step / 3, step / 2, step - 2, step - 1];
        for x in (0..1i64 << table.hi_bits).flat_map(|i| inside.map(|o| first + i * step + o)) {
            if x > last {
                continue;
            }
            for r in window::masks(x as u64, &mut seed) {
                let (hi, lo) = window::split(x as u64, r, table.low, table.lo_bits, table.hi_bits);
                worst = worst.max((table.at(hi, lo) - function.eval(decode(x as u64, f, k))).abs());
            }
        }
        worst
    }

    #[test]
    fn stated_errors_hold_and_are_tight() {
        let all = [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Sigmoid];
        for (k, f, low, lo_bits, hi_bits, limit) in [
            (18, 12, 0, 9, 9, 3.2e-3),
            (18, 12, 0, 6, 12, 5e-5),
            (20, 14, 3, 7, 10, 1.4e-3),
            (16, 10, 4, 2, 10, 1.9e-2),
            (12, 6, 0, 0, 12, 0.0),
        ] {
            for function in all {
                let table = SignedTable::activation(function, k, f, low, lo_bits, hi_bits);
                let worst = worst(&table, function, f);
                let label = format!("{function:?} {k} {f} {low} {lo_bits} {hi_bits}: {worst} of {}", table.max_error);
                assert!(worst <= table.max_error + 1e-12, "{label}");
                assert!(worst >= 0.4 * table.max_error, "{label}");
                assert!(table.max_error <= limit, "{label}");
            }
        }
    }

    /// The windows of the plan (`plan/layer.rs`) for the other activations; its bounds are in `plan/ranges.rs`.
    #[test]
    fn the_windows_of_parabolas_and_ramps() {
        for (function, k, lo_bits, limit) in [
            (Activation::Quad, 18, 9, 1.1e-3),
            (Activation::Quad, 21, 10, 4.4e-3),
            (Activation::Relu, 18, 8, 1.6e-2),
            (Activation::Relu, 21, 9, 3.2e-2),
        ] {
            let table = SignedTable::activation(function, k, 12, 0, lo_bits, k - lo_bits);
            // A ramp's bend lies between two of the points to which lines are fitted: what is met counts, not what is stated.
            let worst = worst(&table, function, 12);
            assert!(worst <= limit && worst > 0.8 * limit, "{function:?} {k}: {worst}");
        }
    }

    /// The windows of the plan (`plan/layer.rs`): rows an eighth wide, a quarter at 21 bits.
    #[test]
    fn the_gates_windows() {
        for (k, lo_bits, limit) in [(16, 9, 2e-3), (18, 9, 2e-3), (20, 9, 2e-3), (21, 10, 7.9e-3)] {
            // A GELU bends 1.6 times as much at zero.
            for (function, by) in [(Activation::Silu, 1.0), (Activation::Gelu, 1.6)] {
                let table = SignedTable::activation(function, k, 12, 0, lo_bits, k - lo_bits);
                let (worst, limit) = (worst(&table, function, 12), by * limit);
                let holds = worst <= limit && table.max_error <= limit && worst > 0.4 * limit;
                assert!(holds, "{function:?} {k}: {worst}, {}", table.max_error);
            }
        }
    }

    #[test]
    fn below_the_safe_range_lies_the_alias() {
        let table = SignedTable::activation(Activation::Silu, 18, 12, 0, 9, 9);
        let (first, _) = table.safe_range();
        assert_eq!(first, -(1 << 17) + (1 << 9));
        // just below, with a carry out of the low part: the row of the largest values
        let (hi, _) = window::split((first - 2) as u64, 511, 0, 9, 9);
        assert_eq!(hi, 255);
    }

    #[test]
    #[should_panic(expected = "top of its ring")]
    fn a_window_short_of_the_top_is_refused() {
        let _ = SignedTable::activation(Activation::Silu, 20, 12, 0, 9, 9);
    }
}
