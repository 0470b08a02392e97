//! The latencies that a search goes by: a few points are measured, the paper's linear model is fitted to them and gives those of
//! all others. Measured once and kept in a file, so that a search that goes on has the same.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{LARGEST, Point, Space};
use crate::cryptpeft::estimate::CostModel;
use crate::cryptpeft::latency::{Comparison, LinearFit, Measurement, Shape, compare, measure};
use crate::error::{Error, Result};
use crate::net::shape::Profile;
use crate::predict::Rates;

/// What was measured, and the models of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Timing {
    /// Of the adapters.
    pub shape: Shape,
    /// The network, in words.
    pub net: String,
    /// What the linear model is fitted to.
    pub measured: Vec<Measurement>,
    /// What it is.
    pub fit: LinearFit,
    /// How many times longer than at this machine's kernel rates computing takes in our own model, by one measured point.
    pub factor: f64,
    /// Both models on points that they have not seen; none where the space has no other points.
    pub held_out: Option<Comparison>,
}

/// Where measuring is.
#[derive(Clone, Copy, Debug)]
pub struct Measuring {
    /// The round that begins: 0 does not count.
    pub round: usize,
    /// The last one.
    pub rounds: usize,
    /// Points in each.
    pub points: usize,
}

/// The least and the largest choice, or another beside the only one: a fit takes two.
fn levels(choices: &[usize], other: impl Fn(usize) -> usize) -> [usize; 2] {
    let low = choices.iter().copied().min().unwrap_or(1);
    let high = choices.iter().copied().max().unwrap_or(low);
    if low == high { [low, other(low)] } else { [low, high] }
}

fn common_multiple(a: usize, b: usize) -> usize {
    let (mut x, mut y) = (a, b);
    while y != 0 {
        (x, y) = (y, x % y);
    }
    a / x * b
}

/// The corners of a space, moved so that every head count there divides every rank.
fn corners(space: &Space) -> Result<Vec<Point>> {
    let heads = levels(&space.heads, |h| if h == 1 { 2 } else { 1 });
    let layers = levels(&space.layers, |s| s + 1);
    let each = common_multiple(heads[0], heads[1]);
    if each > LARGEST {
        return Err(Error::Config(format!(
            "--heads: {} and {} divide no rank up to {LARGEST}, so that latency cannot be measured at both; give heads that divide \
             each other",
            heads[0], heads[1]
        )));
    }
    let mut ranks = levels(&space.ranks, |r| 2 * r).map(|r| r.next_multiple_of(each));
    if ranks[0] == ranks[1] {
        ranks[1] += each;
    }
    let mut all = Vec::new();
    for layers in layers {
        for rank in ranks {
            all.extend(heads.map(|heads| Point { heads, rank, layers }));
        }
    }
    Ok(all)
}

/// Points of the space at a quarter, at half and at three quarters of those that are no corners.
fn between(points: &[Point], corners: &[Point]) -> Vec<Point> {
    let others: Vec<Point> = points.iter().filter(|p| !corners.contains(p)).copied().collect();
    let mut some: Vec<Point> = [1, 2, 3].iter().filter_map(|q| others.get(others.len() * q / 4).copied()).collect();
    some.dedup();
    some
}

impl Timing {
    /// Reads what was measured for this shape, space and network, or measures it, each point so many times, and writes it to
    /// `path`; `rates` are this machine's, asked for only then.
    ///
    /// # Errors
    /// [`Error::Config`] for a file of another shape or network; those of measuring; [`Error::Io`].
    pub fn open_or_measure(
        path: &Path,
        shape: Shape,
        space: &Space,
        (net, repeats): (Profile, usize),
        rates: impl FnOnce() -> Result<Rates>,
        progress: &mut dyn FnMut(Measuring),
    ) -> Result<Timing> {
        let points = space.points()?;
        let corners = corners(space)?;
        if let Some(there) = Self::read(path)? {
            let before: Vec<Point> = there.measured.iter().map(Measurement::point).collect();
            let what = match () {
                () if there.net != net.to_string() => format!("another --net ({} there, {net} here)", there.net),
                () if there.shape != shape => format!("another shape ({:?} there, {shape:?} here)", there.shape),
                () if before != corners => "another space".into(),
                () => return Ok(there),
            };
            return Err(Error::Config(format!(
                "{}: was measured for {what}; give the same options to go on, or another directory",
                path.display()
            )));
        }
        let others = between(&points, &corners);
        let all: Vec<Point> = corners.iter().chain(&others).copied().collect();
        let mut said = |round| progress(Measuring { round, rounds: repeats, points: all.len() });
        let mut measured = measure(shape, &all, net, repeats, &mut said)?;
        let held_out = measured.split_off(corners.len());
        let timing = Self::of(shape, net, measured, &held_out, rates()?)?;
        timing.write(path)?;
        Ok(timing)
    }

    fn of(
        shape: Shape,
        net: Profile,
        measured: Vec<Measurement>,
        held_out: &[Measurement],
        rates: Rates,
    ) -> Result<Timing> {
        let fit = LinearFit::fit(&measured)?;
        // Few enough digits that a file gives them back as they are.
        let [a, b, c, d] = [fit.a, fit.b, fit.c, fit.d].map(|v| (v * 1e12).round() / 1e12);
        let fit = LinearFit { a, b, c, d };
        let mut sorted = measured.clone();
        sorted.sort_by(|a, b| a.seconds.total_cmp(&b.seconds));
        let ours = CostModel::new(net, rates).calibrated(shape, &sorted[sorted.len() / 2])?;
        let held_out = if held_out.is_empty() { None } else { Some(compare(shape, &fit, &ours, held_out)?) };
        Ok(Timing { shape, net: net.to_string(), measured, fit, factor: ours.factor(), held_out })
    }

    /// Seconds of a point, by the linear model.
    ///
    /// # Errors
    /// [`Error::Config`] where the model gives no time above 0.
    pub fn seconds(&self, p: Point) -> Result<f64> {
        let seconds = self.fit.predict(p);
        if seconds > 0.0 {
            return Ok(seconds);
        }
        Err(Error::Config(format!(
            "{p}: the latency model gives {seconds:.4} s: measurements on this machine vary too much; remove the file of them and \
             measure with nothing else running"
        )))
    }

    fn read(path: &Path) -> Result<Option<Timing>> {
        let bytes = match std::fs::read(path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Error::io(path.display().to_string(), e)),
        };
        let wrong =
            |e| Error::Model(format!("{}: is no file of latencies ({e}); remove it to measure anew", path.display()));
        serde_json::from_slice(&bytes).map(Some).map_err(wrong)
    }

    /// Whole or not at all.
    fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self).map_err(|e| Error::Internal(format!("writing JSON: {e}")))?;
        let partial = path.with_extension("partial");
        let written = std::fs::write(&partial, text + "\n").and_then(|()| std::fs::rename(&partial, path));
        written.map_err(|e| Error::io(path.display().to_string(), e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cryptpeft::estimate::tests::rates;

    #[test]
    fn measured_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("latency.json");
        let shape = Shape { hidden: 16, tokens: 5, classes: 3 };
        let space = Space { heads: vec![1, 2], ranks: vec![4, 8], layers: vec![1, 2, 3] };
        let mut told = Vec::new();
        let mut open = |shape, space, net: &str| {
            let net = (net.parse().unwrap(), 1);
            Timing::open_or_measure(&path, shape, space, net, || Ok(rates()), &mut |m| told.push((m.round, m.points)))
        };
        let first = open(shape, &space, "4,1").unwrap();
        let p = Point { heads: 1, rank: 4, layers: 2 };
        assert!(first.seconds(p).unwrap() > 0.05 && first.held_out.is_some() && first.factor > 0.0, "{first:?}");
        assert_eq!(open(shape, &space, "4,1").unwrap().fit, first.fit);
        let narrow = Space { ranks: vec![4, 16], ..space.clone() };
        for (what, got) in [
            ("--net", open(shape, &space, "lan")),
            ("shape", open(Shape { classes: 4, ..shape }, &space, "4,1")),
            ("space", open(shape, &narrow, "4,1")),
        ] {
            assert!(got.as_ref().is_err_and(|e| e.to_string().contains(what)), "{got:?}");
        }
        assert_eq!(told, [(0, 11), (1, 11)]);
        std::fs::write(&path, "{").unwrap();
        assert!(Timing::read(&path).unwrap_err().to_string().contains("remove it"));
        let far = Space { heads: vec![64, 81], ranks: vec![64, 81], layers: vec![1] };
        assert!(corners(&far).unwrap_err().to_string().contains("--heads"));
    }

    #[test]
    fn corners_can_always_be_fitted() {
        for (heads, ranks, layers) in [
            (vec![1, 2, 4], vec![16, 32, 64], vec![1, 2]),
            (vec![1], vec![8], vec![1]),
            (vec![3, 4], vec![9, 16], vec![2, 5]),
            (vec![12], vec![60], vec![3]),
            (vec![5, 7], vec![30, 35], vec![1]),
        ] {
            let space = Space { heads, ranks, layers };
            let points = corners(&space).unwrap();
            assert!(points.len() == 8 && points.iter().all(|p| p.rank.is_multiple_of(p.heads)), "{points:?}");
            let time = |p: &Point| Measurement {
                heads: p.heads,
                rank: p.rank,
                layers: p.layers,
                seconds: (1e-3 * p.heads as f64 + 1e-4 * p.rank as f64) * p.layers as f64 + 0.02,
            };
            let fit = LinearFit::fit(&points.iter().map(time).collect::<Vec<_>>()).unwrap();
            assert!((fit.b - 1e-4).abs() < 1e-9, "{fit:?}");
            let held_out = between(&space.points().unwrap_or_default(), &points);
            assert!(held_out.len() <= 3 && held_out.iter().all(|p| !points.contains(p)));
        }
    }
}
