//! The best line through a function on one row's doubled interval: least maximum error (Chebyshev), by the exchange
//! algorithm on a grid of the values that `lo` can take.

/// `f(x0 + lo unit) ~ a + b lo` for every integer `lo` in `[0, 2^(c+1) - 2]`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Line {
    /// The value at `lo = 0`.
    pub a: f64,
    /// The slope per unit of `lo` (not per unit of x).
    pub b: f64,
    /// The largest absolute error over those `lo`.
    pub max_error: f64,
}

/// Grid points beyond which a fit looks at a subset: halving the step again changes the error by less than 1e-4 of itself.
pub(super) const GRID: u64 = 129;

impl Line {
    /// The least-maximum-error line for `f` on the doubled interval at `x0` of `lo_bits` low bits, each worth `unit`.
    ///
    /// With up to 6 low bits all values of `lo` are looked at and `max_error` is exact; with more, 129 of them, and
    /// 0.1 % is added. `f` must be finite there and smooth at the scale of the interval.
    #[must_use]
    pub fn fit(f: impl Fn(f64) -> f64, x0: f64, unit: f64, lo_bits: u32) -> Line {
        Line::fit_on(GRID, f, x0, unit, lo_bits)
    }

    /// [`Line::fit`] on so many points where there are more values: 17 do where the function is as good as a parabola, whose largest errors lie
    /// at the ends and in the middle.
    #[must_use]
    pub fn fit_on(grid: u64, f: impl Fn(f64) -> f64, x0: f64, unit: f64, lo_bits: u32) -> Line {
        let last = (2u64 << lo_bits) - 2;
        if last == 0 {
            return Line { a: f(x0), b: 0.0, max_error: 0.0 };
        }
        let points = grid.min(last + 1);
        // No overflow: a grid has at most 129 points and a window at most 24 row bits.
        let lo = |i: u64| (i * last / (points - 1)) as f64;
        let grid: Vec<(f64, f64)> = (0..points).map(lo).map(|lo| (lo, f(x0 + lo * unit))).collect();
        let mut line = exchange(&grid);
        if points <= last {
            line.max_error *= 1.001;
        }
        line
    }

    /// `a + b lo`.
    #[must_use]
    pub fn at(&self, lo: u64) -> f64 {
        self.a + self.b * lo as f64
    }
}

/// Three points where the error alternates in sign with equal size; the point with the largest error replaces one of them
/// until none is larger. Each step raises the levelled error, so it ends; in practice after two or three.
fn exchange(grid: &[(f64, f64)]) -> Line {
    let mut picked = [0, grid.len() / 2, grid.len() - 1];
    let mut best = Line { a: 0.0, b: 0.0, max_error: f64::INFINITY };
    for _ in 0..50 {
        let [p0, p1, p2] = picked.map(|i| grid[i]);
        let b = (p2.1 - p0.1) / (p2.0 - p0.0);
        let (g0, g1) = (p0.1 - b * p0.0, p1.1 - b * p1.0);
        let a = f64::midpoint(g0, g1);
        let error = |i: usize| grid[i].1 - (a + b * grid[i].0);
        let worst = (0..grid.len()).max_by(|&i, &j| error(i).abs().total_cmp(&error(j).abs())).unwrap_or(0);
        let max_error = error(worst).abs();
        if max_error < best.max_error {
            best = Line { a, b, max_error };
        }
        let level = (g0 - g1) / 2.0;
        if max_error <= level.abs() * (1.0 + 1e-9) + 1e-15 * (a.abs() + b.abs()) {
            break;
        }
        // outer points have the sign of `level`, the middle one the other
        let like_outer = (error(worst) < 0.0) == (level < 0.0);
        picked = match picked {
            [i, j, k] if worst < i => {
                if like_outer {
                    [worst, j, k]
                } else {
                    [worst, i, j]
                }
            }
            [i, j, k] if worst < j => {
                if like_outer {
                    [worst, j, k]
                } else {
                    [i, worst, k]
                }
            }
            [i, j, k] if worst < k => {
                if like_outer {
                    [i, j, worst]
                } else {
                    [i, worst, k]
                }
            }
            [i, j, k] => {
                if like_outer {
                    [i, j, worst]
                } else {
                    [j, k, worst]
                }
            }
        };
        if picked[0] == picked[1] || picked[1] == picked[2] {
            break;
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parabola_has_the_known_error() {
        // minimax error of x^2 by a line on an interval of length L is L^2 / 8
        let line = Line::fit(|x| x * x, -3.0, 1.0 / 16.0, 5);
        let length = 62.0 / 16.0;
        assert!((line.max_error - length * length / 8.0).abs() < 1e-9, "{line:?}");
    }

    #[test]
    fn levelled_at_three_points_for_any_shape() {
        let cubic = |x: f64| x * x * x - x;
        let line = Line::fit(cubic, -1.0, 2.0 / 126.0, 6);
        let errors: Vec<f64> = (0..=126).map(|lo| cubic(-1.0 + lo as f64 * 2.0 / 126.0) - line.at(lo)).collect();
        let worst = errors.iter().fold(0f64, |m, e| m.max(e.abs()));
        assert!((worst - line.max_error).abs() < 1e-12);
        // alternating extremes: at least three
        let mut signs: Vec<bool> = errors.iter().filter(|e| e.abs() > worst * (1.0 - 1e-6)).map(|e| *e > 0.0).collect();
        signs.dedup();
        assert!(signs.len() >= 3, "{signs:?}");
    }

    #[test]
    fn lines_and_single_points_are_exact() {
        let line = Line::fit(|x| 3.0 * x - 1.0, 2.0, 0.25, 7);
        assert!(line.max_error < 1e-12 && (line.b - 0.75).abs() < 1e-12);
        assert_eq!(Line::fit(f64::exp, 1.0, 0.5, 0), Line { a: 1f64.exp(), b: 0.0, max_error: 0.0 });
    }
}
