//! The exponential as two small tables and a product: `e^x = e^hi e^lo`.

use super::dropped;

/// `e^x ~ hi[row] * lo[ld + lr]` for `x <= top`, in a ring of `low + lo_bits + hi_bits` bits.
///
/// The cyclic rows are read ASYMMETRICALLY: exponents of a softmax reach far down and hardly up, so the rows stand for the
/// window that ENDS at the first row boundary above `top`. The tables hold for `x` in `[min_x, limit)`, which has
/// the whole ring but one row: the lowest row belongs to the carry.
#[derive(Clone, Debug, PartialEq)]
pub struct ExpTables {
    /// Bits dropped below the window.
    pub low: u32,
    /// Bits of the low part.
    pub lo_bits: u32,
    /// Bits of the high part; the window reaches the top of the ring.
    pub hi_bits: u32,
    /// `e^hi`, `2^hi_bits` rows, none above `e^top`.
    pub hi: Vec<f64>,
    /// `e^lo`, `2^(lo_bits+1)` rows addressed by the unreduced sum; between 1 and `e^(2 step)`.
    pub lo: Vec<f64>,
    /// The smallest value for which the tables hold: above `-(R - top - 2 step)`, `R` the ring's range, `step` a row's.
    pub min_x: f64,
    /// Values below this are right; from here on they alias to the smallest. Above `top`, by at most a step.
    pub limit: f64,
    /// Relative error bound over `[min_x, limit)`, before the tables are encoded: what the dropped bits can do.
    pub max_rel_error: f64,
}

/// Tables for `e^x` over a ring of `k` bits with `f` fraction bits, window `low + lo_bits + hi_bits == k`, for `x <= top`.
///
/// The relative error is at most `e^c - 1` with `c = (2^low - 1) / 2^f`, centred: zero when no bits are dropped. `top` is
/// a promise of the caller; nothing aliases as long as `x < limit`.
///
/// # Panics
/// If the window does not reach exactly from `low` to the top of the ring, `hi_bits` is not in 1..=24 or `lo_bits` above 24.
#[must_use]
pub fn exp_tables(k: u32, f: u32, low: u32, lo_bits: u32, hi_bits: u32, top: f64) -> ExpTables {
    assert_eq!(low + lo_bits + hi_bits, k, "a window must reach the top of its ring");
    assert!((1..=24).contains(&hi_bits) && lo_bits <= 24, "1 to 24 row bits");
    let ring_unit = (-f64::from(f)).exp2();
    let unit = f64::from(low).exp2() * ring_unit;
    let step = f64::from(lo_bits).exp2() * unit;
    let rows = 1i64 << hi_bits;
    // A carry only ever lowers the row, so no row is needed above the one that holds `top`.
    let end = (top / step).floor() as i64 + 1;
    let hi = (0..rows).map(|i| {
        let hi = end - rows + (i - end).rem_euclid(rows);
        (hi as f64 * step).min(top).exp()
    });
    let centre = dropped(low) * ring_unit;
    ExpTables {
        low,
        lo_bits,
        hi_bits,
        hi: hi.collect(),
        lo: (0..2i64 << lo_bits).map(|i| (i as f64 * unit + centre).exp()).collect(),
        min_x: (end - rows + 1) as f64 * step,
        limit: end as f64 * step,
        max_rel_error: centre.exp_m1(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::window;
    use super::*;

    fn exp_at(tables: &ExpTables, x: i64, r: u64) -> f64 {
        let (hi, lo) = window::split(x as u64, r, tables.low, tables.lo_bits, tables.hi_bits);
        tables.hi[hi] * tables.lo[lo as usize]
    }

    #[test]
    fn stated_errors_hold_over_the_whole_range() {
        for (k, f, low, lo_bits, hi_bits, top) in [
            (19, 12, 2, 8, 9, 4.0),
            (19, 12, 0, 9, 10, 0.0),
            (22, 12, 5, 7, 10, 4.0),
            (20, 12, 4, 8, 8, 0.3),
            (18, 12, 3, 7, 8, -1.5),
        ] {
            let tables = exp_tables(k, f, low, lo_bits, hi_bits, top);
            let scale = f64::from(f).exp2();
            let step = 1i64 << (low + lo_bits);
            let (range, width) = (f64::from(k).exp2() / scale, step as f64 / scale);
            assert!(tables.min_x <= -(range - top - 2.0 * width), "{tables:?}");
            assert!(tables.limit > top && tables.limit <= top + width);
            assert!(tables.hi.iter().all(|v| *v <= top.exp()));
            // below -700 the f64 product itself loses bits, then is 0
            let first = (tables.min_x.max(-700.0) * scale) as i64;
            let end = (tables.limit * scale) as i64;
            let deepest = exp_at(&tables, (tables.min_x * scale) as i64, u64::MAX);
            assert!(deepest <= (tables.min_x + width).exp(), "the lowest row does not alias");
            let (mut worst, mut seed) = (0f64, 3);
            for x in (first..end).step_by(step as usize).flat_map(|x| [0, 1, step / 3, step - 1].map(|o| x + o)) {
                for r in window::masks(x as u64, &mut seed) {
                    worst = worst.max((exp_at(&tables, x, r) / (x as f64 / scale).exp() - 1.0).abs());
                }
            }
            assert!(worst <= tables.max_rel_error + 1e-12, "{worst} of {}", tables.max_rel_error);
            assert!(worst >= 0.9 * tables.max_rel_error);
        }
    }

    #[test]
    #[should_panic(expected = "top of its ring")]
    fn a_window_short_of_the_top_is_refused() {
        let _ = exp_tables(20, 12, 2, 8, 9, 4.0);
    }
}
