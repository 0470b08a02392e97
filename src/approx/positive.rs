//! Tables for functions of a positive value over many orders of magnitude (1/sqrt in RMSNorm, 1/sum in softmax): two windows
//! looked up side by side, one on the value and one, finer by `w - 6` bits, on the value narrowed to where it is small; or
//! the first alone, where the range is narrow enough for it.

use super::dropped;
use super::line::{self, Line};

/// Bits of the interpolation variable, where the ring has them.
const LO_BITS: u32 = 6;
/// Rows below this one are too coarse: the relative error of a line over a doubled interval falls as 1 / row^2.
const FIRST_GOOD_ROW: usize = 32;

/// `fn(v) ~ a1[hi1] + b1[hi1] lo1 + s[hi1] (a2[hi2] + b2[hi2] lo2)` for an integer `v` (in ring units) of at most `bits` bits.
///
/// Both windows have `2^window` rows (the second fewer where the ring runs out, see `window2`). The last row of each is
/// `hi = -1`: a carry out of the low part of a tiny value; hence `v < 2^bits - 2^(bits-window)`. Values below `min_value` may
/// raise `s low`, the caller's range flag; values that do not raise it are within `max_rel_error`.
#[derive(Clone, Debug, PartialEq)]
pub struct PositiveTable {
    /// The value is narrowed to this ring for the first window.
    pub bits: u32,
    /// Row bits: `hi1` is bits `[bits - window, bits)`.
    pub window: u32,
    /// Bits of `lo1`: 6, or what is left below the window.
    pub lo1_bits: u32,
    /// First bit of `lo1`.
    pub lo1_low: u32,
    /// The value is narrowed to this ring for the second window: `bits - window + 6`.
    pub b2: u32,
    /// Row bits of the second window: `window`, or `b2` where that is less.
    pub window2: u32,
    /// Bits of `lo2`: 6, or what is left below the second window.
    pub lo2_bits: u32,
    /// First bit of `lo2`.
    pub lo2_low: u32,
    /// There is no second window: no row is zeroed, and `s` is the flag of a value too small.
    pub alone: bool,
    /// Value at `lo1 = 0`, zero in the rows where `s = 1`.
    pub a1: Vec<f64>,
    /// Slope per unit of `lo1`, zero in the rows where `s = 1`.
    pub b1: Vec<f64>,
    /// 1 in the rows that leave the value to the second window: below 32, and the carry row.
    pub s: Vec<f64>,
    /// Value at `lo2 = 0`.
    pub a2: Vec<f64>,
    /// Slope per unit of `lo2`.
    pub b2c: Vec<f64>,
    /// 1 in the rows of the second window that are too coarse: below 32, and the carry row. `a2` and `b2c` are finite there.
    /// Where the second window has a row for every value, only row 0 (`v = 0`).
    pub low: Vec<f64>,
    /// Relative error bound for `min_value <= v <= max_value`, before the columns are encoded.
    pub max_rel_error: f64,
    /// From here on up no value raises `s low`.
    pub min_value: u64,
    /// The largest value for which the table holds.
    pub max_value: u64,
}

impl PositiveTable {
    /// Fits `function`, positive and monotonic, of a value in ring units, below `2^bits`, in windows of `window` bits.
    ///
    /// With 6 low bits in both windows, `min_value = 33 * 2^(bits - 2 window + 6)`. For `1/v` the bound is 1.0e-3
    /// (half of it dropped bits, with mean zero), met only at rows 31 to 33 of a window; for `1/sqrt(v)` 4.3e-4. Costs
    /// `2^(window+1)` line fits of 127 points.
    ///
    /// # Panics
    /// If `window` is not in 6..=24 or `bits` not in `window..=62`.
    #[must_use]
    pub fn fit(function: impl Fn(f64) -> f64, bits: u32, window: u32) -> PositiveTable {
        assert!((6..=24).contains(&window), "6 to 24 row bits");
        assert!((window..=62).contains(&bits), "a value of at least the window's bits, at most 62");
        let b2 = bits - window + LO_BITS;
        let window2 = window.min(b2);
        let first = Rows::fit(&function, bits, window);
        let second = Rows::fit(&function, b2, window2);
        let coarse = |i: usize, rows: usize| i < FIRST_GOOD_ROW || i + 1 == rows;
        let s: Vec<f64> = (0..1 << window).map(|i| f64::from(coarse(i, 1 << window))).collect();
        let keep = |column: &[f64]| column.iter().zip(&s).map(|(v, s)| v * (1.0 - s)).collect();
        let exact = window2 == b2;
        let low = (0..1 << window2).map(|i| f64::from(if exact { i == 0 } else { coarse(i, 1 << window2) })).collect();
        let row2 = b2 - window2;
        let error = |rows: &Rows, from: usize, to: usize| rows.error[from..to].iter().fold(0f64, |m, e| m.max(*e));
        let second_from = if exact { 1 } else { FIRST_GOOD_ROW };
        // the second window serves values up to a carry beyond row 31 of the first
        let second_to = (((FIRST_GOOD_ROW as u64 + 1) << (bits - window)) >> row2) as usize + 1;
        let max_rel_error = error(&first, FIRST_GOOD_ROW, (1 << window) - 1).max(error(
            &second,
            second_from,
            second_to.min((1 << window2) - 1),
        ));
        PositiveTable {
            bits,
            window,
            alone: false,
            lo1_bits: first.lo_bits,
            lo1_low: first.low,
            b2,
            window2,
            lo2_bits: second.lo_bits,
            lo2_low: second.low,
            a1: keep(&first.a),
            b1: keep(&first.b),
            s,
            a2: second.a,
            b2c: second.b,
            low,
            max_rel_error,
            min_value: if exact { 1 } else { (FIRST_GOOD_ROW as u64 + 1) << row2 },
            max_value: (1 << bits) - (1 << (bits - window)) - 1,
        }
    }

    /// One window only: `fn(v) ~ a1[hi1] + b1[hi1] lo1`, and `s[hi1]` is the range flag. `min_value = 33 * 2^(bits - window)`.
    ///
    /// # Panics
    /// As [`PositiveTable::fit`].
    #[must_use]
    pub fn fit_alone(function: impl Fn(f64) -> f64, bits: u32, window: u32) -> PositiveTable {
        assert!((6..=24).contains(&window), "6 to 24 row bits");
        assert!((window..=62).contains(&bits), "a value of at least the window's bits, at most 62");
        let rows = Rows::fit(&function, bits, window);
        let coarse = |i: usize| i < FIRST_GOOD_ROW || i + 1 == 1 << window;
        PositiveTable {
            alone: true,
            max_rel_error: rows.error[FIRST_GOOD_ROW..(1 << window) - 1].iter().fold(0f64, |m, e| m.max(*e)),
            min_value: (FIRST_GOOD_ROW as u64 + 1) << (bits - window),
            max_value: (1 << bits) - (1 << (bits - window)) - 1,
            s: (0..1 << window).map(|i| f64::from(coarse(i))).collect(),
            a1: rows.a,
            b1: rows.b,
            ..PositiveTable::blank(bits, window)
        }
    }

    /// The windows of a table without columns: for walks that count instead of computing.
    pub(crate) fn blank(bits: u32, window: u32) -> PositiveTable {
        let b2 = bits - window + LO_BITS;
        let window2 = window.min(b2);
        let ((lo1_low, lo1_bits), (lo2_low, lo2_bits)) = (low_part(bits, window), low_part(b2, window2));
        let (max_rel_error, min_value, max_value) = (0.0, 1, 1 << (bits - 1));
        let (a1, b1, s, a2, b2c, low) = Default::default();
        PositiveTable {
            bits,
            window,
            alone: false,
            lo1_bits,
            lo1_low,
            b2,
            window2,
            lo2_bits,
            lo2_low,
            a1,
            b1,
            s,
            a2,
            b2c,
            low,
            max_rel_error,
            min_value,
            max_value,
        }
    }

    /// `gain / sqrt(v / n + eps)`: RMSNorm, `v` the sum of squares in ring units, `n` the width times the units in 1.
    ///
    /// # Panics
    /// As [`PositiveTable::fit`].
    #[must_use]
    pub fn rsqrt(bits: u32, window: u32, n: f64, eps: f64, gain: f64) -> PositiveTable {
        PositiveTable::fit(|v| gain / (v / n + eps).sqrt(), bits, window)
    }

    /// [`PositiveTable::rsqrt`] in one window.
    ///
    /// # Panics
    /// As [`PositiveTable::fit`].
    #[must_use]
    pub fn rsqrt_alone(bits: u32, window: u32, n: f64, eps: f64, gain: f64) -> PositiveTable {
        PositiveTable::fit_alone(|v| gain / (v / n + eps).sqrt(), bits, window)
    }

    /// `gain / v`, `v` in ring units: the normalisation of a softmax.
    ///
    /// # Panics
    /// As [`PositiveTable::fit`].
    #[must_use]
    pub fn reciprocal(bits: u32, window: u32, gain: f64) -> PositiveTable {
        PositiveTable::fit(|v| gain / v, bits, window)
    }

    /// The table's value and whether the range flag is up, for the rows and interpolation variables of both windows (of a
    /// table of one, the second pair says nothing).
    ///
    /// # Panics
    /// If there is no such row.
    #[must_use]
    pub fn at(&self, (hi1, lo1): (usize, u64), (hi2, lo2): (usize, u64)) -> (f64, bool) {
        let first = self.a1[hi1] + self.b1[hi1] * lo1 as f64;
        if self.alone {
            return (first, self.s[hi1] != 0.0);
        }
        let second = self.a2[hi2] + self.b2c[hi2] * lo2 as f64;
        (first + self.s[hi1] * second, self.s[hi1] * self.low[hi2] != 0.0)
    }
}

/// Values at `lo = 0` that keep the middles of lines where they are when the slopes `b` are rounded to `f` fraction bits: the ends move by half of
/// what they would otherwise, and by no more than the slopes raise them.
pub(crate) fn levelled(a: &[f64], b: &[f64], lo_bits: u32, f: u32) -> Vec<f64> {
    let (scale, middle) = (f64::from(f).exp2(), f64::from(lo_bits).exp2() - 1.0);
    a.iter().zip(b).map(|(a, b)| a + (b - (b * scale).round() / scale) * middle).collect()
}

/// First bit and bits of the interpolation variable below a window.
fn low_part(bits: u32, window: u32) -> (u32, u32) {
    let below = bits - window;
    let lo_bits = below.min(LO_BITS);
    (below - lo_bits, lo_bits)
}

/// Row bits beyond which a table is fitted on fewer points from [`NARROW_ROW`] on.
const WIDE: u32 = 14;
const NARROW_ROW: u64 = 1 << 10;

/// One window's lines.
struct Rows {
    low: u32,
    lo_bits: u32,
    a: Vec<f64>,
    b: Vec<f64>,
    /// Relative error bound of each row.
    error: Vec<f64>,
}

impl Rows {
    fn fit(function: impl Fn(f64) -> f64, bits: u32, window: u32) -> Rows {
        let below = bits - window;
        let (low, lo_bits) = low_part(bits, window);
        let (unit, centre) = (f64::from(low).exp2(), dropped(low));
        // A value in ring units is at least 1 where it is not 0: keeps 1/v finite in rows that no good value reaches.
        let clamped = |v: f64| function(v.max(1.0));
        let mut rows = Rows { low, lo_bits, a: Vec::new(), b: Vec::new(), error: Vec::new() };
        for i in 0..1u64 << window {
            let hi = if i + 1 == 1 << window && below > 0 { -1.0 } else { i as f64 };
            let start = hi * f64::from(below).exp2();
            // Rows of the widest windows are so narrow, against the value, that the function is a parabola there.
            let grid = if window > WIDE && i >= NARROW_ROW { 17 } else { line::GRID };
            let line = Line::fit_on(grid, clamped, start + centre, unit, lo_bits);
            let last = start + f64::from(below + 1).exp2();
            // monotonic: the smallest value is at an end, and the dropped bits move it most where it is steepest
            let at = |v: f64| clamped(v);
            let moved = (at(start) - at(start + centre)).abs().max((at(last) - at(last - centre)).abs());
            rows.error.push((line.max_error + moved) / at(start).abs().min(at(last).abs()));
            rows.a.push(line.a);
            rows.b.push(line.b);
        }
        rows
    }
}

#[cfg(test)]
mod tests {
    use super::super::window;
    use super::*;

    /// The worst relative error among values that raise no flag, over every row, its edges, and both carry cases.
    fn worst(table: &PositiveTable, function: impl Fn(f64) -> f64) -> f64 {
        let step1 = 1u64 << (table.bits - table.window);
        let step2 = 1u64 << (table.b2 - table.window2);
        let rows = |step: u64, count: u64| {
            (0..count).flat_map(move |i| [0, 1, step / 3, step / 2, step - 1].map(|o| i * step + o.min(step - 1)))
        };
        let (mut worst, mut seed) = (0f64, 5);
        let second = if table.alone { 0 } else { 1 << table.window2 };
        for v in rows(step1, 1 << table.window).chain(rows(step2, second)) {
            if v > table.max_value {
                continue;
            }
            for r in window::masks(v, &mut seed) {
                let one = window::split(v, r, table.lo1_low, table.lo1_bits, table.window);
                let two = window::split(v, r, table.lo2_low, table.lo2_bits, table.window2);
                let (got, flag) = table.at(one, two);
                assert!(got.is_finite());
                assert!(!flag || v < table.min_value, "{v} is in range and flagged");
                if !flag && v >= 1 {
                    worst = worst.max((got / function(v as f64) - 1.0).abs());
                }
                if v == 0 {
                    assert!(flag, "zero is flagged");
                }
            }
        }
        worst
    }

    #[test]
    fn stated_errors_hold_over_the_whole_range() {
        for (bits, window) in [(40, 12), (36, 10), (30, 12), (24, 14), (20, 12), (16, 12), (13, 12), (12, 12), (62, 10)]
        {
            let reciprocal = PositiveTable::reciprocal(bits, window, 1e6);
            let got = worst(&reciprocal, |v| 1e6 / v);
            assert!(
                got <= reciprocal.max_rel_error + 1e-12,
                "1/v {bits} {window}: {got} of {}",
                reciprocal.max_rel_error
            );
            assert!(reciprocal.max_rel_error < 1.1e-3, "1/v {bits} {window}: {}", reciprocal.max_rel_error);
            let (n, eps) = (2048.0 * 64.0, 1e-5);
            let rsqrt = PositiveTable::rsqrt(bits, window, n, eps, 8.0);
            let got = worst(&rsqrt, |v| 8.0 / (v / n + eps).sqrt());
            assert!(got <= rsqrt.max_rel_error + 1e-12, "rsqrt {bits} {window}: {got} of {}", rsqrt.max_rel_error);
            assert!(rsqrt.max_rel_error < 4.5e-4, "rsqrt {bits} {window}: {}", rsqrt.max_rel_error);
        }
    }

    #[test]
    fn one_window_alone() {
        for (bits, window) in [(40, 12), (30, 14), (20, 12), (40, 16), (39, 17)] {
            let (n, eps) = (2048.0 * 64.0, 1e-5);
            let table = PositiveTable::rsqrt_alone(bits, window, n, eps, 8.0);
            let got = worst(&table, |v| 8.0 / (v / n + eps).sqrt());
            assert!(got <= table.max_rel_error + 1e-12, "{bits} {window}: {got} of {}", table.max_rel_error);
            assert!(table.max_rel_error < 4.5e-4, "{bits} {window}: {}", table.max_rel_error);
            assert_eq!(table.min_value, 33 << (bits - window));
        }
    }

    #[test]
    fn geometry() {
        let t = PositiveTable::rsqrt(40, 12, 1.0, 0.0, 1.0);
        assert_eq!((t.lo1_bits, t.lo1_low, t.b2, t.window2, t.lo2_bits, t.lo2_low), (6, 22, 34, 12, 6, 16));
        assert_eq!((t.min_value, t.max_value), (33 << 22, (1 << 40) - (1 << 28) - 1));
        assert!((t.s[31], t.s[32], t.s[4094], t.s[4095]) == (1.0, 0.0, 0.0, 1.0));
        assert!((t.a1[31], t.b1[31], t.a1[4095], t.b1[4095]) == (0.0, 0.0, 0.0, 0.0));
        // few bits: what is there, down to a row for every value
        let t = PositiveTable::rsqrt(16, 12, 1.0, 0.0, 1.0);
        assert_eq!((t.lo1_bits, t.lo1_low, t.b2, t.window2, t.lo2_bits, t.lo2_low), (4, 0, 10, 10, 0, 0));
        assert_eq!(t.min_value, 1);
    }
}
