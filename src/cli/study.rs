//! `trefoil study`: what every technique does to quality and cost, in one table.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use trefoil::error::Result;
use trefoil::marill::data::{DataOptions, Source};
use trefoil::marill::study::{self, Doing, Options, Progress, Row};
use trefoil::model::ModelConfig;

/// Options of `trefoil study`.
#[derive(clap::Args)]
pub struct Args {
    /// The public model that everything starts from, a Hugging Face directory.
    #[arg(long, value_name = "DIR")]
    base: PathBuf,
    /// What to learn, as for finetune; exact matches are counted for tasks: task:dates, task:reverse, task:sums.
    #[arg(long, value_name = "task:NAME|FILE|DIR")]
    data: String,
    /// Where every run gets a directory, and results.json and results.md are written. The same command goes on there where it was
    /// interrupted.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Seeds of data, order and adapters: a number of them from 0 on, or the first and the one after the last, as 1..3, to share
    /// a study between machines.
    #[arg(long, default_value = "3", value_parser = seeds)]
    seeds: std::ops::Range<u64>,
    /// Steps of a run without a teacher; one with a teacher takes three quarters of them.
    #[arg(long, default_value_t = 256)]
    steps: usize,
    /// Only these runs and the teachers that they need, with commas between.
    #[arg(long, value_name = "NAME,..", value_delimiter = ',')]
    only: Vec<String>,
    /// Network of the secure runs: none, lan (0.1 ms, 16 Gbit/s), wan (20 ms, 0.4 Gbit/s), or RTT_MS,GBPS.
    #[arg(long, default_value = "lan")]
    net: String,
    /// Examples in a step.
    #[arg(long, default_value_t = 16)]
    batch_size: usize,
    /// Rank of the adapters.
    #[arg(long, default_value_t = 64)]
    rank: usize,
    /// Longest example in tokens. Default: 256, or the model's context if that is shorter.
    #[arg(long, value_name = "TOKENS")]
    context: Option<usize>,
    /// Examples of a task to train on.
    #[arg(long, default_value_t = 4096)]
    examples: usize,
    /// Save a checkpoint every so many steps.
    #[arg(long, value_name = "STEPS", default_value_t = 32)]
    save_every: usize,
    /// Threads to compute with; the same number makes the same bits. Default: RAYON_NUM_THREADS, or as many as the machine runs
    /// at once.
    #[arg(long)]
    threads: Option<usize>,
    /// Train only; the same command without this measures the secure cost later, on a machine with nothing else to do.
    #[arg(long)]
    no_cost: bool,
}

fn seeds(text: &str) -> std::result::Result<std::ops::Range<u64>, String> {
    let number = |n: &str| n.parse::<u64>().map_err(|_| "give a number, or two as 1..3".to_owned());
    match text.split_once("..") {
        Some((first, end)) => Ok(number(first)?..number(end)?),
        None => Ok(0..number(text)?),
    }
}

/// A line at most so often.
const EVERY: Duration = Duration::from_secs(15);

/// Says where the study is.
struct Reporter {
    begun: Instant,
    said: Option<(Instant, (u64, &'static str))>,
}

impl Reporter {
    fn step(&mut self, p: &Progress) {
        let run = (p.seed, p.name);
        let quiet = self.said.is_some_and(|(at, said)| said == run && at.elapsed() < EVERY);
        if quiet && !matches!(p.doing, Doing::Measuring) {
            return;
        }
        self.said = Some((Instant::now(), run));
        let what = match p.doing {
            Doing::Training(t) => {
                let stage = if t.matching { "matching, " } else { "" };
                format!("step {}/{}, {stage}loss {:.3}", t.step, t.steps, t.loss)
            }
            Doing::Measuring => "running it by three parties".into(),
        };
        let left = p.left.map_or(String::new(), |s| format!(", about {:.0} min left", (s / 60.0).ceil()));
        let (done, all) = p.runs;
        let at = self.begun.elapsed().as_secs_f64();
        eprintln!("[{at:7.1} s] seed {} {}: {what}; {done} of {all} runs done{left}", p.seed, p.name);
    }
}

/// Runs the command.
///
/// # Errors
/// Whatever options, base or data got wrong, or what could not be saved.
pub fn run(a: &Args) -> Result<()> {
    super::finetune::threads(a.threads)?;
    let c = ModelConfig::open(&a.base)?;
    let options = Options {
        base: a.base.clone(),
        data: Source::parse(&a.data)?,
        sampling: DataOptions { context: a.context.unwrap_or(c.max_positions.min(256)), examples: a.examples, seed: 0 },
        out: a.out.clone(),
        seeds: a.seeds.clone(),
        steps: a.steps,
        batch_size: a.batch_size,
        rank: a.rank,
        rows: Row::chosen(&a.only)?,
        net: a.net.parse()?,
        save_every: a.save_every,
        measure: !a.no_cost,
    };
    let mut reporter = Reporter { begun: Instant::now(), said: None };
    study::run(&options, &mut |p| {
        reporter.step(&p);
        true
    })?;
    let path = a.out.join("results.md");
    let table = std::fs::read_to_string(&path).map_err(|e| trefoil::Error::io(path.display().to_string(), e))?;
    super::say(&format!("{table}\n{}\n", path.display()))
}
