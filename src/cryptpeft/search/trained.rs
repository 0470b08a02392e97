//! Points judged by training them: accuracy on images held out of that, latency by [`Timing`]. Cargo feature `train`.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::timing::Timing;
use super::{Evaluator, Point};
use crate::cryptpeft::train::{TrainOptions, train};
use crate::cryptpeft::{Features, accuracy, plan};
use crate::error::{Error, Result};

/// Features of images and their labels.
type Set = Vec<(Features, usize)>;

/// One image in so many of each label is not learned from, but judged by: the test part stays unseen by the search.
const PARTS: usize = 5;
/// Images that a plan is calibrated on.
const CALIBRATION: usize = 32;

/// Trains adapters on features that are computed once.
pub struct Trained<'a> {
    options: TrainOptions,
    learn: Set,
    judge: Set,
    labels: Vec<String>,
    timing: Timing,
    data: Value,
    out: PathBuf,
    /// Trained before the search.
    known: HashMap<Point, f64>,
    progress: &'a mut dyn FnMut(Point, usize, f32),
}

impl std::fmt::Debug for Trained<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Trained").field("options", &self.options).finish_non_exhaustive()
    }
}

/// What the adapters of the last `layers` layers read.
#[must_use]
pub fn cut(set: &[(Features, usize)], layers: usize) -> Vec<(Features, usize)> {
    let one = |f: &Features| Features {
        inputs: f.inputs[f.inputs.len().saturating_sub(layers)..].to_vec(),
        last: f.last.clone(),
    };
    set.iter().map(|(f, label)| (one(f), *label)).collect()
}

impl<'a> Trained<'a> {
    /// `options` but for heads, rank and layers; `features` of as many layers as any point has; `data` says in the history what
    /// they are of. Each point's adapter is saved in a directory of `out`. `progress` is told each step and its loss.
    ///
    /// # Errors
    /// [`Error::Config`] for too few images to hold some out.
    pub fn new(
        options: TrainOptions,
        features: Vec<(Features, usize)>,
        labels: Vec<String>,
        timing: Timing,
        (data, out): (Value, &Path),
        progress: &'a mut dyn FnMut(Point, usize, f32),
    ) -> Result<Self> {
        let (mut learn, mut judge, mut seen) = (Set::new(), Set::new(), HashMap::<usize, usize>::new());
        for example in features {
            let n = seen.entry(example.1).or_default();
            *n += 1;
            if n.is_multiple_of(PARTS) { judge.push(example) } else { learn.push(example) }
        }
        if learn.is_empty() || judge.is_empty() {
            return Err(Error::Config(format!(
                "{} images to train on are too few: one in {PARTS} of each label judges the adapters; give {PARTS} of each or more",
                learn.len() + judge.len()
            )));
        }
        let (out, known) = (out.to_path_buf(), HashMap::new());
        Ok(Trained { options, learn, judge, labels, timing, data, out, known, progress })
    }

    /// Where a point's adapter is.
    #[must_use]
    pub fn dir(out: &Path, p: Point) -> PathBuf {
        out.join("adapters").join(format!("h{}-r{}-s{}", p.heads, p.rank, p.layers))
    }

    /// The accuracy of a point that the search's target depends on. It is kept in `path`, so that a search that goes on has the
    /// same target, and not computed again when the search comes to the point.
    ///
    /// # Errors
    /// Those of training; [`Error::Config`] for a file of other settings.
    pub fn reference(&mut self, p: Point, seed: u64, path: &Path) -> Result<f64> {
        let mut settings = json!({ "point": p, "seed": seed, "evaluator": self.settings() });
        let failed = |e| Error::io(path.display().to_string(), e);
        let there = match std::fs::read(path) {
            Ok(bytes) => serde_json::from_slice::<Value>(&bytes).ok(),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
            Err(e) => return Err(failed(e)),
        };
        if let Some(mut there) = there {
            let accuracy = there.as_object_mut().and_then(|o| o.remove("accuracy")).and_then(|a| a.as_f64());
            return match accuracy {
                Some(accuracy) if there == settings => {
                    self.known.insert(p, accuracy);
                    Ok(accuracy)
                }
                _ => Err(Error::Config(format!(
                    "{}: was made with other settings; give the same options to go on, or another directory",
                    path.display()
                ))),
            };
        }
        let accuracy = (self.accuracy(p, seed)? * 1e9).round() / 1e9;
        settings["accuracy"] = accuracy.into();
        std::fs::write(path, format!("{settings:#}\n")).map_err(failed)?;
        self.known.insert(p, accuracy);
        Ok(accuracy)
    }
}

impl Evaluator for Trained<'_> {
    /// In float, which the secure adapter agrees with. 0 for adapters that fixed point cannot carry: they cannot be served.
    fn accuracy(&mut self, p: Point, seed: u64) -> Result<f64> {
        if let Some(accuracy) = self.known.get(&p) {
            return Ok(*accuracy);
        }
        let options = TrainOptions { heads: p.heads, rank: p.rank, layers: p.layers, seed, ..self.options.clone() };
        let learn = cut(&self.learn, p.layers);
        let (config, weights) =
            train(&options, &learn, &self.labels, &mut |step, loss| (self.progress)(p, step, loss))?;
        let every = learn.len().div_ceil(CALIBRATION).max(1);
        let samples: Vec<Features> = learn.iter().step_by(every).map(|(f, _)| f.clone()).collect();
        if let Err(Error::Model(_)) = plan(&config, &weights, &samples) {
            return Ok(0.0);
        }
        weights.save(&config, &Self::dir(&self.out, p))?;
        Ok(accuracy(&config, &weights, &cut(&self.judge, p.layers)))
    }

    fn latency(&mut self, p: Point) -> Result<f64> {
        self.timing.seconds(p)
    }

    fn settings(&self) -> Value {
        let o = &self.options;
        json!({
            "data": self.data, "labels": self.labels, "images": [self.learn.len(), self.judge.len()],
            "shape": self.timing.shape, "net": self.timing.net, "latency": self.timing.fit,
            "blocks": o.blocks, "steps": o.steps, "batch": o.batch, "lr": o.lr, "scale": o.scale.to_string(),
            "optimiser": o.optimiser.to_string(), "decay": o.decay.to_string(),
            // Products are cut by the number of threads, and rounded where they are cut.
            "threads": rayon::current_num_threads(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Search, Space, Target};
    use super::*;
    use crate::cryptpeft::AdapterWeights;
    use crate::cryptpeft::adapter::Gaussian;
    use crate::cryptpeft::latency::{LinearFit, Shape};

    const STEPS: usize = 60;

    /// Two labels that a line tells apart.
    fn features(shape: Shape, layers: usize) -> Set {
        let mut g = Gaussian::new(1);
        let mut one = |n: usize| {
            let label = n % shape.classes;
            let inputs = (0..layers).map(|_| g.matrix(shape.tokens, shape.hidden, 1.0)).collect();
            let mut last = g.matrix(1, shape.hidden, 1.0).row(0).to_owned();
            last[label] += 8.0;
            (Features { inputs, last }, label)
        };
        (0..60).map(&mut one).collect()
    }

    #[test]
    fn adapters_are_trained_saved_and_not_trained_twice() {
        let dir = tempfile::tempdir().unwrap();
        let shape = Shape { hidden: 12, tokens: 4, classes: 2 };
        let fit = LinearFit { a: 1e-3, b: 1e-4, c: 0.01, d: 0.02 };
        let timing = Timing { shape, net: "none".into(), measured: Vec::new(), fit, factor: 1.0, held_out: None };
        let options = TrainOptions {
            backbone_layers: 3,
            layers: 2,
            steps: STEPS,
            batch: 16,
            lr: 2e-2,
            ..TrainOptions::default()
        };
        let labels = vec!["a".to_owned(), "b".to_owned()];
        let space = Space { heads: vec![1, 2], ranks: vec![4, 6], layers: vec![1, 2] };
        let floor = dir.path().join("floor.json");
        let largest = Point { heads: 2, rank: 6, layers: 2 };
        let mut steps = 0;
        let mut run = |budget: usize, seed: u64| {
            let mut count = |_: Point, _: usize, _: f32| steps += 1;
            let (features, data) = (features(shape, 2), json!({ "images": "made up" }));
            let given = (data, dir.path());
            let mut e =
                Trained::new(options.clone(), features, labels.clone(), timing.clone(), given, &mut count).unwrap();
            let accuracy = e.reference(largest, seed, &floor)?;
            let search = Search { space: space.clone(), target: Target::Utility, seed, budget };
            let found = search.run(&mut e, &dir.path().join("history.jsonl"), &mut |_| true)?.unwrap();
            Ok::<_, Error>((accuracy, found, steps))
        };
        let (_, found, trained) = run(3, 0).unwrap();
        // The largest was trained before the search, whether that came to it or not.
        let times =
            |records: &[super::super::Record]| STEPS * (1 + records.iter().filter(|r| r.point != largest).count());
        assert_eq!((found.records.len(), trained), (3, times(&found.records)));
        let (accuracy, found, all) = run(8, 0).unwrap();
        assert!(found.records.len() > 3 && all == times(&found.records), "{all} {found:?}");
        assert!(accuracy > 0.7 && found.best.unwrap().accuracy > 0.7, "{accuracy}");
        for r in &found.records {
            let (config, _) = AdapterWeights::open(&Trained::dir(dir.path(), r.point), Some(4)).unwrap();
            assert_eq!((config.heads, config.rank, config.layers.len()), (r.point.heads, r.point.rank, r.point.layers));
            assert!((r.latency - fit.predict(r.point)).abs() < 1e-8);
        }
        assert!(run(8, 1).unwrap_err().to_string().contains("floor.json"));
        let mut none = |_: Point, _: usize, _: f32| {};
        let few = features(shape, 2).into_iter().take(3).collect();
        let given = (Value::Null, dir.path());
        let refused = Trained::new(options, few, labels, timing, given, &mut none).unwrap_err().to_string();
        assert!(refused.contains("too few"), "{refused}");
    }
}
