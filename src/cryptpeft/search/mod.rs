//! Which adapter to train: a search over heads, rank and number of adapters, after algorithm 1 of CryptPEFT (arXiv 2508.12264).
//!
//! ```text
//! mod       spaces, targets, the search itself
//! policy    the controller: a softmax over the choices of each dimension, trained by REINFORCE
//! history   the file of all evaluated points
//! plot      accuracy against latency, with the Pareto front
//! timing    latencies of all points, from measurements of a few
//! trained   points judged by training them; cargo feature `train`
//! ```
//!
//! In each step the controller draws a point, gets its reward, and is moved towards what was better than usual. A point met
//! before is rewarded again without being trained anew, so that the budget counts trained points alone. The controller's
//! state is nowhere on disk: it follows from the seed and the history, which is walked again when a search goes on.
//!
//! Rewards are ours (the paper's text leaves their form open): [`Target::reward`].

mod history;
mod plot;
mod policy;
#[cfg(test)]
mod tests;
pub mod timing;
#[cfg(feature = "train")]
pub mod trained;

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

pub use history::{Record, read};
pub use plot::plot;

use crate::error::{Error, Result};
use history::History;
use policy::Policy;

/// What is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Point {
    /// Heads of LinAtten.
    pub heads: usize,
    /// Width within an adapter.
    pub rank: usize,
    /// Backbone layers with an adapter, the last ones.
    pub layers: usize,
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "heads {}, rank {}, layers {}", self.heads, self.rank, self.layers)
    }
}

/// What there is to choose from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Space {
    /// See [`Point::heads`].
    pub heads: Vec<usize>,
    /// See [`Point::rank`].
    pub ranks: Vec<usize>,
    /// See [`Point::layers`].
    pub layers: Vec<usize>,
}

/// Every point is looked at in every step.
const MOST_POINTS: usize = 100_000;
/// No choice is larger.
const LARGEST: usize = 4096;

impl Space {
    /// Its points, each as the indices of its choices: those whose heads divide the rank.
    ///
    /// # Errors
    /// [`Error::Config`] for a dimension without choices, a choice that is 0 or there twice, and no point at all.
    fn indices(&self) -> Result<Vec<[usize; 3]>> {
        let mut all = 1usize;
        for (name, choices) in [("--heads", &self.heads), ("--ranks", &self.ranks), ("--layers", &self.layers)] {
            let wrong = |text: String| Err(Error::Config(format!("{name}: {text}")));
            if choices.is_empty() {
                return wrong("give at least one choice".into());
            }
            if choices.contains(&0) {
                return wrong("0 is no choice; give 1 or more".into());
            }
            if let Some(large) = choices.iter().find(|c| **c > LARGEST) {
                return wrong(format!("{large} is too large; give {LARGEST} or less"));
            }
            let twice = choices.iter().enumerate().find(|(i, c)| choices[..*i].contains(c));
            if let Some((_, twice)) = twice {
                return wrong(format!("{twice} is there twice; give each choice once"));
            }
            all = all.saturating_mul(choices.len());
        }
        if all > MOST_POINTS {
            return Err(Error::Config(format!(
                "the space has {all} points; give fewer choices, {MOST_POINTS} at most"
            )));
        }
        let mut points = Vec::new();
        for (h, heads) in self.heads.iter().enumerate() {
            for (r, rank) in self.ranks.iter().enumerate() {
                if rank.is_multiple_of(*heads) {
                    points.extend((0..self.layers.len()).map(|s| [h, r, s]));
                }
            }
        }
        if points.is_empty() {
            let (heads, ranks) = (&self.heads, &self.ranks);
            return Err(Error::Config(format!(
                "--heads {heads:?} divide none of --ranks {ranks:?}; give ranks that are multiples of the heads"
            )));
        }
        Ok(points)
    }

    fn at(&self, i: &[usize; 3]) -> Point {
        Point { heads: self.heads[i[0]], rank: self.ranks[i[1]], layers: self.layers[i[2]] }
    }

    /// All points that can be built: those whose heads divide the rank.
    ///
    /// # Errors
    /// [`Error::Config`] naming the dimension that has no choices, or a choice that is none.
    pub fn points(&self) -> Result<Vec<Point>> {
        Ok(self.indices()?.iter().map(|i| self.at(i)).collect())
    }
}

/// What a point is trained and timed by.
pub trait Evaluator {
    /// The share of held-out examples, 0 to 1, that are classified right once the point's adapters are trained. Equal seeds
    /// must give equal shares.
    ///
    /// # Errors
    /// Whatever training needs. The search can be run again and goes on with this point.
    fn accuracy(&mut self, p: Point, seed: u64) -> Result<f64>;

    /// Seconds of one private inference.
    ///
    /// # Errors
    /// As above.
    fn latency(&mut self, p: Point) -> Result<f64>;

    /// All that its answers follow from: a search with others does not go on in the same file.
    fn settings(&self) -> Value {
        Value::Null
    }
}

/// What is looked for.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Target {
    /// The highest accuracy; of equal ones the lowest latency.
    Utility,
    /// The lowest latency whose accuracy is at least the floor; of equal ones the highest accuracy.
    Efficiency {
        /// From 0 to 1.
        floor: f64,
    },
}

/// What the whole latency of a point is worth in accuracy while the controller learns utility: less than a real difference in
/// accuracy, and enough to tell equals apart.
const LATENCY_WEIGHT: f64 = 0.05;

impl Target {
    /// What the controller is told, with `t = latency / (latency + unit)` from 0 to 1 and the first point's latency as unit:
    ///
    /// - utility: `accuracy - 0.05 t`;
    /// - efficiency: `1 - t` with the floor reached, else `accuracy - floor`, which is below 0.
    #[must_use]
    pub fn reward(&self, accuracy: f64, latency: f64, unit: f64) -> f64 {
        let t = latency / (latency + unit);
        match self {
            Target::Utility => accuracy - LATENCY_WEIGHT * t,
            Target::Efficiency { floor } if accuracy >= *floor => 1.0 - t,
            Target::Efficiency { floor } => accuracy - floor,
        }
    }

    /// The best of some points, or none if no point reaches the floor.
    #[must_use]
    pub fn best<'a>(&self, records: &'a [Record]) -> Option<&'a Record> {
        let more = |a: f64, b: f64| b.total_cmp(&a);
        match self {
            Target::Utility => {
                records.iter().min_by(|a, b| more(a.accuracy, b.accuracy).then(a.latency.total_cmp(&b.latency)))
            }
            Target::Efficiency { floor } => records
                .iter()
                .filter(|r| r.accuracy >= *floor)
                .min_by(|a, b| a.latency.total_cmp(&b.latency).then(more(a.accuracy, b.accuracy))),
        }
    }

    fn check(&self) -> Result<()> {
        match self {
            Target::Efficiency { floor } if !(0.0..=1.0).contains(floor) => Err(Error::Config(format!(
                "--target efficiency:{floor}: the floor is an accuracy from 0 to 1, such as 0.9"
            ))),
            _ => Ok(()),
        }
    }
}

impl FromStr for Target {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        let bad =
            || Error::Config(format!("--target {s}: expected utility, or efficiency:FLOOR such as efficiency:0.9"));
        let target = match s.split_once(':') {
            None if s == "utility" => Target::Utility,
            Some(("efficiency", floor)) => Target::Efficiency { floor: floor.parse().map_err(|_| bad())? },
            _ => return Err(bad()),
        };
        target.check()?;
        Ok(target)
    }
}

/// Points that no other is better than in one of accuracy and latency and as good in the other; the fastest first.
#[must_use]
pub fn front(records: &[Record]) -> Vec<Record> {
    let mut all = records.to_vec();
    all.sort_by(|a, b| a.latency.total_cmp(&b.latency).then(b.accuracy.total_cmp(&a.accuracy)));
    let mut best = f64::NEG_INFINITY;
    all.retain(|r| {
        let better = r.accuracy > best;
        best = best.max(r.accuracy);
        better
    });
    all
}

/// A search.
#[derive(Clone, Debug)]
pub struct Search {
    /// What there is.
    pub space: Space,
    /// What is looked for.
    pub target: Target,
    /// Of what is drawn, and of the training.
    pub seed: u64,
    /// Points that are trained at most, in all runs of the search together. A later run may have more of them.
    pub budget: usize,
}

/// Where a search is.
#[derive(Clone, Copy, Debug)]
pub struct Progress<'a> {
    /// The controller's step, from 0.
    pub step: u64,
    /// Points that were evaluated, by earlier runs too.
    pub evaluated: usize,
    /// See [`Search::budget`], or all points of the space if they are fewer.
    pub budget: usize,
    /// The point of this step.
    pub point: Point,
    /// What came out; none while it is being trained.
    pub done: Option<&'a Record>,
}

/// Why a search ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// As many points as it may.
    Budget,
    /// No new point for many steps: the controller knows what it wants.
    Settled,
    /// There is no other point.
    Exhausted,
}

/// What was found.
#[derive(Clone, Debug)]
pub struct Found {
    /// The best for the target; none if no point reaches the floor.
    pub best: Option<Record>,
    /// See [`front`].
    pub front: Vec<Record>,
    /// All that were evaluated, in their order.
    pub records: Vec<Record>,
    /// Steps of the controller.
    pub steps: u64,
    /// Why there are no more.
    pub ended: Ended,
}

/// Steps in a row without a new point after which the controller is done.
const PATIENCE: u32 = 200;

impl Search {
    /// All that a history follows from; not the budget, which may grow.
    fn settings(&self, evaluator: &dyn Evaluator) -> Value {
        json!({
            "space": self.space, "target": self.target, "seed": self.seed, "evaluator": evaluator.settings(),
        })
    }

    /// Searches, and goes on where an earlier run with the same settings and `history` stopped. `progress` is told of every
    /// point before and after it is trained; when it says no, the search stops and there is no result.
    ///
    /// # Errors
    /// [`Error::Config`] for a space or target that is none, for a history of other settings, and one that another process
    /// writes; [`Error::Model`] for a damaged history; the evaluator's own.
    pub fn run(
        &self,
        evaluator: &mut dyn Evaluator,
        history: &Path,
        progress: &mut dyn FnMut(Progress<'_>) -> bool,
    ) -> Result<Option<Found>> {
        if self.budget == 0 {
            return Err(Error::Config("--budget 0: give 1 point or more".into()));
        }
        self.target.check()?;
        let points = self.space.indices()?;
        let budget = self.budget.min(points.len());
        let (mut file, before) = History::open(history, &self.settings(evaluator))?;
        let mut before = VecDeque::from(before);
        let mut policy = Policy::new([self.space.heads.len(), self.space.ranks.len(), self.space.layers.len()]);
        let (mut records, mut known): (Vec<Record>, HashMap<Point, usize>) = (Vec::new(), HashMap::new());
        let (mut step, mut idle) = (0u64, 0);
        while idle < PATIENCE && (records.len() < budget || !before.is_empty()) {
            let drawn = policy.draw(&points, self.seed, step);
            let point = self.space.at(&points[drawn]);
            if let Some(&i) = known.get(&point) {
                idle += 1;
                policy.learn(&points, drawn, records[i].reward);
                step += 1;
                continue;
            }
            idle = 0;
            let said = |done| Progress { step, evaluated: records.len(), budget, point, done };
            let record = match before.pop_front() {
                Some(r) if (r.step, r.point) == (step, point) => r,
                Some(r) => return Err(file.foreign(&r, records.len())),
                None => {
                    if !progress(said(None)) {
                        return Ok(None);
                    }
                    Record { step, point, ..self.evaluate(evaluator, point)? }
                }
            };
            let unit = records.first().map_or(record.latency, |first| first.latency);
            let record = Record { reward: self.target.reward(record.accuracy, record.latency, unit), ..record };
            policy.learn(&points, drawn, record.reward);
            known.insert(point, records.len());
            records.push(record);
            // Told after it is on disk.
            if file.append_unless_there(&record, records.len())?
                && !progress(Progress { step, evaluated: records.len(), budget, point, done: Some(&record) })
            {
                return Ok(None);
            }
            step += 1;
        }
        if let Some(r) = before.front() {
            return Err(file.foreign(r, records.len()));
        }
        let ended = match records.len() {
            n if n == points.len() => Ended::Exhausted,
            n if n >= budget => Ended::Budget,
            _ => Ended::Settled,
        };
        let best = self.target.best(&records).copied();
        Ok(Some(Found { best, front: front(&records), records, steps: step, ended }))
    }

    /// Without its step and reward.
    fn evaluate(&self, evaluator: &mut dyn Evaluator, point: Point) -> Result<Record> {
        // Numbers that a line of the file gives back bit by bit, whatever reads it.
        let rounded = |v: f64| (v * 1e9).round() / 1e9;
        let accuracy = rounded(evaluator.accuracy(point, self.seed)?);
        let latency = rounded(evaluator.latency(point)?);
        let good = (0.0..=1.0).contains(&accuracy) && latency > 0.0 && latency < 1e6;
        if !good {
            return Err(Error::Config(format!(
                "{point}: accuracy {accuracy} and latency {latency} s; an evaluator gives an accuracy from 0 to 1 and a time above 0"
            )));
        }
        Ok(Record { step: 0, point, accuracy, latency, reward: 0.0 })
    }
}
