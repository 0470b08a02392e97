//! The paper's ablation (MARILL, arXiv:2408.03561), at any scale: every technique and every baseline trained on the same data from the same base,
//! for several seeds, scored on what was held out, and run by three parties to see what it costs. Interrupted at any moment and
//! started again, it goes on where it stopped; runs that are finished are not repeated.

use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::cost::{self, SecureCost};
use super::data::{DataOptions, Dataset, Source};
use super::evaluate::{Score, score};
use super::reshape::{MergeBy, Reshape};
use super::resume::difference;
use super::train::{self, Method};
use super::{disk, table};
use crate::error::{Error, Result};
use crate::model::variant::Softmax;
use crate::model::{Checkpoint, ModelConfig, Weights};
use crate::net::shape::Profile;
use crate::plan::Module;

/// Of one run, in its directory.
const RESULT: &str = "result.json";

/// What is done to the base in a row of the table.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// Its name, for `--only` and as a directory.
    pub name: &'static str,
    /// In words.
    pub title: &'static str,
    /// What is trained; `None` is the base as it is.
    method: Option<Method>,
    /// Only the upper half of the layers is private.
    half: bool,
    reshape: Reshape,
    /// The row, of the same seed, whose model it starts from and is distilled from.
    teacher: Option<&'static str>,
}

impl Row {
    /// Every row, teachers before their students.
    #[must_use]
    pub fn all() -> Vec<Row> {
        let none = Reshape::default();
        let merge = |merge_heads| Reshape { merge_heads, ..none };
        let relu = |merge_heads| Reshape { merge_heads, softmax: Softmax::TwoRelu, ..none };
        let base = Row { name: "base", title: "base", method: None, half: false, reshape: none, teacher: None };
        let full = Row { name: "full", title: "full fine-tune", method: Some(Method::Full), ..base };
        let freeze = Row { name: "freeze", title: "freeze 1/2", method: Some(Method::Freeze), half: true, ..base };
        let lora = Row { name: "lora", title: "LoRA", method: Some(Method::Lora), ..base };
        let student = |name, title, reshape| Row { name, title, reshape, teacher: Some("full"), ..full };
        let frozen = |name, title, reshape| Row { name, title, reshape, teacher: Some("freeze"), ..freeze };
        vec![
            base,
            full,
            freeze,
            lora,
            Row { name: "freeze-lora", title: "freeze 1/2, LoRA", half: true, ..lora },
            student("merge2", "merge 2 by similarity", merge(2)),
            student("merge4", "merge 4 by similarity", merge(4)),
            student("merge4-adjacent", "merge 4 adjacent", Reshape { merge_by: MergeBy::Adjacent, ..merge(4) }),
            student("prune-heads2", "prune heads, 1 of 2 kept", Reshape { prune_heads: 2, ..none }),
            student("prune-heads4", "prune heads, 1 of 4 kept", Reshape { prune_heads: 4, ..none }),
            student("prune-layers2", "prune layers, 1 of 2 kept", Reshape { prune_layers: 2, ..none }),
            student("2relu", "2ReLU", relu(1)),
            student("2relu-merge4", "2ReLU, merge 4", relu(4)),
            frozen("freeze-merge4", "freeze 1/2, merge 4", merge(4)),
            frozen("freeze-merge4-2relu", "freeze 1/2, merge 4, 2ReLU", relu(4)),
            Row {
                name: "freeze-lora-merge4-2relu",
                title: "freeze 1/2, LoRA, merge 4, 2ReLU",
                reshape: relu(4),
                half: true,
                teacher: Some("freeze"),
                ..lora
            },
        ]
    }

    /// Those of these names, with the teachers that they need; all for none.
    ///
    /// # Errors
    /// [`Error::Config`] for a name that there is not, listing those that there are.
    pub fn chosen(names: &[String]) -> Result<Vec<Row>> {
        let all = Row::all();
        let mut wanted = Vec::new();
        for name in names {
            let Some(row) = all.iter().find(|r| r.name == name) else {
                let names: Vec<&str> = all.iter().map(|r| r.name).collect();
                return Err(Error::Config(format!(
                    "--only {name}: there is no such run; there are {}",
                    names.join(", ")
                )));
            };
            wanted.extend([Some(row.name), row.teacher].into_iter().flatten());
        }
        Ok(all.into_iter().filter(|r| names.is_empty() || wanted.contains(&r.name)).collect())
    }
}

/// What to do.
#[derive(Clone, Debug)]
pub struct Options {
    /// The public model that everything starts from.
    pub base: PathBuf,
    /// What to learn.
    pub data: Source,
    /// Examples and their length; its seed is not used.
    pub sampling: DataOptions,
    /// Where every run gets a directory.
    pub out: PathBuf,
    /// Its seeds.
    pub seeds: std::ops::Range<u64>,
    /// Steps of a run without a teacher; one with a teacher, which starts from what that has learned, takes three quarters of
    /// them, the first third of these in stage I.
    pub steps: usize,
    /// Examples in a step.
    pub batch_size: usize,
    /// Rank of adapters.
    pub rank: usize,
    /// What to run.
    pub rows: Vec<Row>,
    /// The simulated network of the secure runs.
    pub net: Profile,
    /// A checkpoint every so many steps.
    pub save_every: usize,
    /// Whether to run what was trained by three parties; it can be done later, on a machine with nothing else to do.
    pub measure: bool,
}

/// What came out of one run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Finished {
    /// All that it follows from; another study in the same directory is refused by it.
    settings: Value,
    /// On held-out data.
    pub score: Score,
    /// Weights that were trained; unknown as the seconds.
    pub trained: Option<usize>,
    /// Seconds that its steps took (the teacher's passes are among them, scoring is not); unknown if it was interrupted between its
    /// last step and this.
    pub seconds: Option<f64>,
    /// What running it by three parties takes.
    pub cost: Option<SecureCost>,
    /// Why that was not measured.
    pub no_cost: Option<String>,
}

/// A row of the table.
#[derive(Clone, Debug, Serialize)]
pub struct Rowed {
    /// Its name.
    pub name: &'static str,
    /// In words.
    pub title: &'static str,
    /// By seed.
    pub runs: Vec<Finished>,
}

/// What is going on.
#[derive(Clone, Copy, Debug)]
pub enum Doing {
    /// A step of training was taken.
    Training(train::Progress),
    /// The run is run by three parties.
    Measuring,
}

/// For who watches.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    /// The run's seed.
    pub seed: u64,
    /// The run's name.
    pub name: &'static str,
    /// What it is at.
    pub doing: Doing,
    /// Runs that are finished, and all.
    pub runs: (usize, usize),
    /// Seconds left for all of them at the speed so far, once there is one.
    pub left: Option<f64>,
}

/// A step with a teacher takes the teacher's pass forward too.
const TAUGHT: f64 = 1.35;

/// How far the study is.
struct Clock {
    begun: Instant,
    /// Of work, in steps without a teacher: done in this process, and left.
    done: f64,
    left: f64,
    runs: (usize, usize),
}

impl Clock {
    fn progress(&self, seed: u64, row: &Row, doing: Doing) -> Progress {
        let speed = self.begun.elapsed().as_secs_f64() / self.done;
        let left = (self.done > 0.0).then_some(self.left.max(0.0) * speed);
        Progress { seed, name: row.name, doing, runs: self.runs, left }
    }
}

impl Options {
    fn check(&self, c: &ModelConfig) -> Result<()> {
        let wrong = |text: &str| Err(Error::Config(text.to_owned()));
        if self.seeds.is_empty() {
            return wrong(
                "--seeds: there are none; give a number of them, or the first and the one after the last as 1..3",
            );
        }
        if self.steps < 4 {
            return wrong("--steps: give 4 or more, of which those with a teacher take three quarters");
        }
        if self.save_every == 0 {
            return wrong("--save-every 0: give 1 or more");
        }
        let first = |row: &Row| if row.half { c.num_layers / 2 } else { 0 };
        // Before hours of training.
        self.rows.iter().try_for_each(|row| {
            let refused = |e| Error::Config(format!("{}: {e}; choose other runs with --only", row.name));
            row.reshape.check(c, first(row)).map_err(refused)
        })
    }

    fn dir(&self, seed: u64, name: &str) -> PathBuf {
        self.out.join(format!("seed-{seed}")).join(name)
    }

    fn steps_of(&self, row: &Row) -> usize {
        match (row.method, row.teacher) {
            (None, _) => 0,
            (Some(_), None) => self.steps,
            (Some(_), Some(_)) => self.steps * 3 / 4,
        }
    }

    fn work(&self, row: &Row) -> f64 {
        self.steps_of(row) as f64 * if row.teacher.is_some() { TAUGHT } else { 1.0 }
    }

    fn settings(&self, row: &Row, seed: u64) -> Value {
        json!({
            "base": self.base,
            "data": self.data.to_string(),
            "steps": self.steps_of(row),
            "batch_size": self.batch_size,
            "rank": self.rank,
            "examples": self.sampling.examples,
            "context": self.sampling.context,
            "seed": seed,
            "net": self.net.to_string(),
        })
    }

    /// How a row is trained.
    fn training(&self, row: &Row, method: Method, seed: u64, layers: usize) -> train::Options {
        let steps = self.steps_of(row);
        train::Options {
            base: self.base.clone(),
            data: self.data.clone(),
            sampling: DataOptions { seed, ..self.sampling },
            out: self.dir(seed, row.name),
            method,
            private_layers: row.half.then(|| layers.div_ceil(2)),
            reshape: row.reshape,
            rank: self.rank,
            alpha: 2.0 * self.rank as f64,
            targets: Module::ALL.to_vec(),
            // As many as ever needed: the steps say when it ends.
            epochs: steps,
            stage1_epochs: if row.teacher.is_some() { steps } else { 0 },
            stage1_steps: row.teacher.map(|_| steps / 3),
            steps: Some(steps),
            batch_size: self.batch_size,
            lr: train::LEARNING_RATE,
            teacher: row.teacher.map(|name| self.dir(seed, name)),
            save_every: self.save_every,
        }
    }
}

/// Does it, and writes `results.json` and `results.md`. `watch` ends it, as if the process had been killed, by returning `false`;
/// then there is no table.
///
/// # Errors
/// Those of [`train::run`] and of generation; [`Error::Config`] for a directory with the runs of another study.
pub fn run(options: &Options, watch: &mut dyn FnMut(Progress) -> bool) -> Result<Option<Vec<Rowed>>> {
    let c = ModelConfig::open(&options.base)?;
    options.check(&c)?;
    let mut clock = Clock { begun: Instant::now(), done: 0.0, left: 0.0, runs: (0, 0) };
    let runs = |seed| options.rows.iter().map(move |row| (seed, row));
    for (seed, row) in options.seeds.clone().flat_map(runs) {
        clock.runs.1 += 1;
        if !options.dir(seed, row.name).join(RESULT).exists() {
            clock.left += options.work(row);
        }
    }
    // Seed by seed: whoever stops early has whole tables of fewer seeds.
    for seed in options.seeds.clone() {
        let data = Dataset::load(&options.data, &options.base, &c, &DataOptions { seed, ..options.sampling })?;
        for row in &options.rows {
            if one(options, row, seed, &data, &mut clock, watch)?.is_none() {
                return Ok(None);
            }
            clock.runs.0 += 1;
        }
    }
    let mut rows = Vec::new();
    for row in &options.rows {
        let load = |seed| read(&options.dir(seed, row.name))?.ok_or_else(|| Error::Internal("a run is lost".into()));
        let runs = options.seeds.clone().map(load).collect::<Result<_>>()?;
        rows.push(Rowed { name: row.name, title: row.title, runs });
    }
    disk::write_json(&options.out.join("results.json"), &rows)?;
    let text = table::markdown(&rows);
    disk::replace(&options.out.join("results.md"), |out| out.write_all(text.as_bytes()))?;
    Ok(Some(rows))
}

fn read(dir: &Path) -> Result<Option<Finished>> {
    let path = dir.join(RESULT);
    let wrong = |e: String| Error::Model(format!("{}: {e}; remove it to measure that run anew", path.display()));
    match std::fs::read(&path) {
        Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(|e| wrong(e.to_string())),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::io(path.display().to_string(), e)),
    }
}

/// One run, or what is left of it.
fn one(
    options: &Options,
    row: &Row,
    seed: u64,
    data: &Dataset,
    clock: &mut Clock,
    watch: &mut dyn FnMut(Progress) -> bool,
) -> Result<Option<()>> {
    let dir = options.dir(seed, row.name);
    let settings = options.settings(row, seed);
    let mut finished = match read(&dir)? {
        Some(finished) => {
            if let Some(name) = difference(&finished.settings, &settings) {
                return Err(Error::Config(format!(
                    "--out {}: {} was run with another `{name}`; give the same options to go on, or another directory",
                    options.out.display(),
                    dir.display()
                )));
            }
            finished
        }
        None => {
            let Some(finished) = train_one(options, row, seed, data, clock, watch, settings)? else { return Ok(None) };
            // At once: the time that training took is known only now.
            disk::write_json(&dir.join(RESULT), &finished)?;
            finished
        }
    };
    if finished.cost.is_some() || row.method.is_none() || !options.measure {
        return Ok(Some(()));
    }
    if !watch(clock.progress(seed, row, Doing::Measuring)) {
        return Ok(None);
    }
    let base = row.half.then_some(options.base.as_path());
    match cost::measure(&dir, base, &data.held_out, options.net) {
        Ok(cost) => (finished.cost, finished.no_cost) = (Some(cost), None),
        // Answers of another length than asked for are a finding about this row, and no reason to end the others.
        Err(e @ Error::Config(_)) => finished.no_cost = Some(e.to_string()),
        Err(e) => return Err(e),
    }
    disk::write_json(&dir.join(RESULT), &finished)?;
    Ok(Some(()))
}

fn train_one(
    options: &Options,
    row: &Row,
    seed: u64,
    data: &Dataset,
    clock: &mut Clock,
    watch: &mut dyn FnMut(Progress) -> bool,
    settings: Value,
) -> Result<Option<Finished>> {
    let base = Checkpoint::open(&options.base)?;
    let dir = options.dir(seed, row.name);
    std::fs::create_dir_all(&dir).map_err(|e| Error::io(format!("--out {}", dir.display()), e))?;
    let Some(method) = row.method else {
        let score = score(&Weights::load(&base)?, &data.held_out, data.exact);
        let no_cost = Some("public, so nothing has to be hidden".to_owned());
        return Ok(Some(Finished { settings, score, trained: None, seconds: None, cost: None, no_cost }));
    };
    let mut training = options.training(row, method, seed, base.config().num_layers);
    if method == Method::Lora && !row.reshape.is_none() {
        // An adapter adds to a base that stays as it is, so the base is changed first. Its weights are the public base's in another
        // order; how heads are grouped is seen in the training data and goes out with it.
        let changed = train::Options {
            out: dir.join("base"),
            method: Method::Full,
            epochs: 0,
            stage1_epochs: 0,
            teacher: None,
            ..training.clone()
        };
        train::run(&changed, &mut |_| true)?;
        training = train::Options { base: changed.out, reshape: Reshape::default(), ..training };
    }
    let (work, steps) = (options.work(row), options.steps_of(row).max(1));
    let mut step = 0;
    let mut each = |p: train::Progress| {
        // What an earlier process did took none of this one's time.
        let before = if step == 0 { p.step - 1 } else { step };
        let one = work / steps as f64;
        clock.left -= (p.step - step) as f64 * one;
        clock.done += (p.step - before) as f64 * one;
        step = p.step;
        watch(clock.progress(seed, row, Doing::Training(p)))
    };
    let Some(outcome) = train::run(&training, &mut each)? else { return Ok(None) };
    clock.left -= (steps - step.min(steps)) as f64 * work / steps as f64;
    let made_now = !outcome.finished_before;
    Ok(Some(Finished {
        settings,
        score: outcome.score,
        trained: made_now.then_some(outcome.trained),
        seconds: made_now.then_some(outcome.seconds_in_all),
        cost: None,
        no_cost: None,
    }))
}
