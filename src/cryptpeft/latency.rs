//! How long private inference takes with an adapter of given heads, rank and layers: measured, and the paper's linear model
//! `(a h + b r + c) s + d` fitted to that (CryptPEFT, arXiv 2508.12264). Our own model of it: [`super::estimate`].

use serde::{Deserialize, Serialize};

use super::adapter::EPS;
use super::estimate::CostModel;
use super::local::Pace;
use super::search::Point;
use super::{AdapterConfig, AdapterWeights, Features, LocalAdapter, Opened};
use crate::error::{Error, Result};
use crate::net::shape::Profile;
use crate::world::Setup;

/// What all points of a search have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// Width of the backbone.
    pub hidden: usize,
    /// Tokens of the backbone, the CLS token among them.
    pub tokens: usize,
    /// Classes that the head tells apart.
    pub classes: usize,
}

impl Shape {
    /// Adapters of one block each.
    #[must_use]
    pub fn config(&self, p: Point) -> AdapterConfig {
        AdapterConfig {
            hidden: self.hidden,
            rank: p.rank,
            heads: p.heads,
            blocks: 1,
            layers: (0..p.layers).collect(),
            tokens: self.tokens,
            classes: self.classes,
            scale: 1.0,
            eps: EPS,
            labels: Vec::new(),
        }
    }

    /// Random weights, and features to calibrate them with: times do not depend on the values.
    pub(super) fn example(&self, p: Point) -> Result<(AdapterConfig, AdapterWeights, Features)> {
        let config = self.config(p);
        config.check(&p.to_string())?;
        let weights = AdapterWeights::random(&config, 1);
        let features = Features::random(&config, 2);
        Ok((config, weights, features))
    }
}

/// A point and its time.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measurement {
    /// See [`Point`].
    pub heads: usize,
    /// See [`Point`].
    pub rank: usize,
    /// See [`Point`].
    pub layers: usize,
    /// Seconds from the Client's features to its label.
    pub seconds: f64,
}

impl Measurement {
    /// What was measured.
    #[must_use]
    pub fn point(&self) -> Point {
        Point { heads: self.heads, rank: self.rank, layers: self.layers }
    }
}

/// Measures the points with all three parties in this process, from cold (nothing was run ahead), on a simulated network: the
/// medians of so many rounds after one that does not count. A round is one inference of each, so that a shared machine's slow
/// minutes fall on all of them; `progress` is told each, from 0. The public backbone, the same for all, is not in it.
///
/// # Errors
/// [`Error::Config`] for no rounds; those of a plan for a point that cannot be built.
pub fn measure(
    shape: Shape,
    points: &[Point],
    net: Profile,
    rounds: usize,
    progress: &mut dyn FnMut(usize),
) -> Result<Vec<Measurement>> {
    if rounds == 0 {
        return Err(Error::Config("latency is measured at least once; give 1 repeat or more".into()));
    }
    let ready = |&p: &Point| {
        let (config, weights, features) = shape.example(p)?;
        let samples = [features];
        let setup = Setup { profile: net, ..Setup::default() };
        Ok((p, LocalAdapter::new(&config, &weights, &samples, setup)?, samples, Vec::new()))
    };
    let mut ready = points.iter().map(ready).collect::<Result<Vec<_>>>()?;
    for round in 0..=rounds {
        progress(round);
        for (_, local, samples, seconds) in &mut ready {
            seconds.push(local.classify(samples, Opened::Label, Pace::Cold)?.wall.as_secs_f64());
        }
    }
    let median = |(p, _, _, mut seconds): (Point, LocalAdapter, [Features; 1], Vec<f64>)| {
        seconds.remove(0);
        seconds.sort_by(f64::total_cmp);
        let seconds = (seconds[(rounds - 1) / 2] + seconds[rounds / 2]) / 2.0;
        Measurement { heads: p.heads, rank: p.rank, layers: p.layers, seconds }
    };
    Ok(ready.into_iter().map(median).collect())
}

/// `(a h + b r + c) s + d` seconds for `h` heads, rank `r` and `s` layers.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LinearFit {
    /// Seconds per head and layer.
    pub a: f64,
    /// Seconds per rank and layer.
    pub b: f64,
    /// Seconds per layer.
    pub c: f64,
    /// Seconds.
    pub d: f64,
}

/// Unknowns of the fit.
const N: usize = 4;

fn terms(p: Point) -> [f64; N] {
    let s = p.layers as f64;
    [p.heads as f64 * s, p.rank as f64 * s, s, 1.0]
}

impl LinearFit {
    /// By least squares.
    ///
    /// # Errors
    /// [`Error::Config`] for fewer than four points, for a dimension in which all are equal (by its name), and for points that
    /// leave a coefficient open otherwise.
    pub fn fit(measured: &[Measurement]) -> Result<LinearFit> {
        let refuse = |text: String| Err(Error::Config(format!("fitting the latency model: {text}")));
        if measured.len() < N {
            return refuse(format!("{} points are too few for 4 coefficients; measure {N} or more", measured.len()));
        }
        if let Some(m) = measured.iter().find(|m| !m.seconds.is_finite()) {
            return refuse(format!("{} took {} s, which is no time; measure it again", m.point(), m.seconds));
        }
        type Of = fn(&Measurement) -> usize;
        let dimensions: [(&str, Of); 3] = [("heads", |m| m.heads), ("rank", |m| m.rank), ("layers", |m| m.layers)];
        for (name, of) in dimensions {
            let first = of(&measured[0]);
            if measured.iter().all(|m| of(m) == first) {
                return refuse(format!(
                    "all points have {name} {first}, which says nothing about what {name} cost; measure two values or more"
                ));
            }
        }
        // The normal equations, with columns of length 1: heads and ranks are of other sizes than 1.
        let rows: Vec<[f64; N]> = measured.iter().map(|m| terms(m.point())).collect();
        let lengths: [f64; N] = std::array::from_fn(|j| rows.iter().map(|r| r[j] * r[j]).sum::<f64>().sqrt());
        let mut system = [[0.0; N + 1]; N];
        for (i, equation) in system.iter_mut().enumerate() {
            for (j, cell) in equation[..N].iter_mut().enumerate() {
                *cell = rows.iter().map(|r| r[i] * r[j]).sum::<f64>() / (lengths[i] * lengths[j]);
            }
            equation[N] = rows.iter().zip(measured).map(|(r, m)| r[i] * m.seconds).sum::<f64>() / lengths[i];
        }
        let Some(x) = solve(system) else {
            return refuse(
                "the points leave a coefficient open (heads, rank and layers change only together); \
                 measure points that differ in one of them alone"
                    .into(),
            );
        };
        let [a, b, c, d] = std::array::from_fn(|j| x[j] / lengths[j]);
        Ok(LinearFit { a, b, c, d })
    }

    /// Seconds.
    #[must_use]
    pub fn predict(&self, p: Point) -> f64 {
        [self.a, self.b, self.c, self.d].iter().zip(terms(p)).map(|(k, t)| k * t).sum()
    }
}

/// By elimination with pivots; none where a pivot is nothing but rounding.
fn solve(mut m: [[f64; N + 1]; N]) -> Option<[f64; N]> {
    for i in 0..N {
        let pivot = (i..N).max_by(|&a, &b| m[a][i].abs().total_cmp(&m[b][i].abs()))?;
        m.swap(i, pivot);
        if m[i][i].abs() < 1e-10 {
            return None;
        }
        let row = m[i];
        for below in &mut m[i + 1..] {
            let by = below[i] / row[i];
            below.iter_mut().zip(row).for_each(|(v, of)| *v -= by * of);
        }
    }
    let mut x = [0.0; N];
    for i in (0..N).rev() {
        let known: f64 = (i + 1..N).map(|j| m[i][j] * x[j]).sum();
        x[i] = (m[i][N] - known) / m[i][i];
    }
    Some(x)
}

/// Relative errors of a model, without sign.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Errors {
    /// On average.
    pub mean: f64,
    /// The largest.
    pub worst: f64,
}

impl Errors {
    fn of(errors: &[f64]) -> Errors {
        let n = errors.len().max(1) as f64;
        Errors { mean: errors.iter().sum::<f64>() / n, worst: errors.iter().copied().fold(0.0, f64::max) }
    }
}

/// A point that neither model has seen.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Compared {
    /// What was measured.
    #[serde(flatten)]
    pub measured: Measurement,
    /// By [`LinearFit`].
    pub linear: f64,
    /// By [`CostModel`].
    pub ours: f64,
}

/// Both models against measurement.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// Point by point.
    pub points: Vec<Compared>,
    /// Of the linear model.
    pub linear: Errors,
    /// Of ours.
    pub ours: Errors,
}

/// Both models' errors on points that were held out of both.
///
/// # Errors
/// [`Error::Config`] for no points; those of a plan.
pub fn compare(shape: Shape, linear: &LinearFit, ours: &CostModel, held_out: &[Measurement]) -> Result<Comparison> {
    if held_out.is_empty() {
        return Err(Error::Config("comparing latency models takes a point that neither was fitted to".into()));
    }
    let one = |&measured: &Measurement| {
        let p = measured.point();
        Ok(Compared { measured, linear: linear.predict(p), ours: ours.seconds(shape, p)? })
    };
    let points = held_out.iter().map(one).collect::<Result<Vec<_>>>()?;
    let errors = |of: fn(&Compared) -> f64| {
        let relative = |c: &Compared| (of(c) / c.measured.seconds - 1.0).abs();
        Errors::of(&points.iter().map(relative).collect::<Vec<_>>())
    };
    let (linear, ours) = (errors(|c| c.linear), errors(|c| c.ours));
    Ok(Comparison { points, linear, ours })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn points(all: &[(usize, usize, usize)]) -> Vec<Point> {
        all.iter().map(|&(heads, rank, layers)| Point { heads, rank, layers }).collect()
    }

    #[test]
    fn a_fit_recovers_what_made_the_times() {
        let truth = LinearFit { a: 3e-4, b: 2e-5, c: 0.011, d: 0.02 };
        let all = points(&[(1, 16, 1), (4, 16, 1), (2, 64, 1), (1, 32, 2), (4, 128, 3), (2, 240, 2)]);
        let measured: Vec<Measurement> = all
            .iter()
            .map(|&p| Measurement { heads: p.heads, rank: p.rank, layers: p.layers, seconds: truth.predict(p) })
            .collect();
        let fit = LinearFit::fit(&measured).unwrap();
        for (got, want) in [(fit.a, truth.a), (fit.b, truth.b), (fit.c, truth.c), (fit.d, truth.d)] {
            assert!((got / want - 1.0).abs() < 1e-6, "{fit:?}");
        }
        let refused = |m: &[Measurement], what: &str| {
            let error = LinearFit::fit(m).unwrap_err().to_string();
            assert!(error.contains(what), "{error}");
        };
        refused(&measured[..3], "3 points are too few");
        let of = |change: fn(&mut Measurement)| {
            let mut m = measured.clone();
            m.iter_mut().for_each(change);
            m
        };
        refused(&of(|m| m.heads = 2), "all points have heads 2");
        refused(&of(|m| m.layers = 1), "all points have layers 1");
        refused(&of(|m| m.rank = 8 * m.heads), "change only together");
        refused(&of(|m| m.seconds = f64::NAN), "no time");
    }

    #[test]
    fn small_adapters_are_measured() {
        let shape = Shape { hidden: 16, tokens: 5, classes: 3 };
        let all = points(&[(1, 4, 1), (2, 8, 2)]);
        let measured = measure(shape, &all, "1,1".parse().unwrap(), 2, &mut |_| ()).unwrap();
        // 26 messages and the argmax's at half a millisecond each, at least.
        assert!(measured.iter().all(|m| m.seconds > 0.013), "{measured:?}");
        assert!(measured[1].seconds > measured[0].seconds && measured[1].point() == all[1]);
        assert!(measure(shape, &all, Profile::NONE, 0, &mut |_| ()).is_err());
        assert!(
            measure(shape, &points(&[(3, 4, 1)]), Profile::NONE, 1, &mut |_| ())
                .unwrap_err()
                .to_string()
                .contains("heads")
        );
    }
}
