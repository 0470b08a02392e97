//! A benchmark from options to rows.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::breakdown::Times;
use super::subject::{Facts, Made};
use super::{Harness, Measured, Options, Pace, Part, Peak, Plaintext, Report, Row, Test, count};
use crate::deploy::doctor::machine;
use crate::error::{Error, Result};
use crate::generate::MAX_BATCH;
use crate::model::ModelConfig;
use crate::party::Role;
use crate::plan::{Plan, block, memory};
use crate::predict::{PROCESS, RUN_AHEAD};
use crate::ring::Isa;
use crate::world::Setup;

struct Bench<'a> {
    options: &'a Options,
    facts: Facts,
    /// What was done to the private layers.
    reshaping: String,
    harness: Harness,
    /// All private layers, planned like those that are run.
    whole: (ModelConfig, Plan),
    /// The same with the public layers, which the Client has.
    model: (ModelConfig, Plan),
    /// Bytes of each peer's run-ahead that the Owner holds.
    run_ahead: u64,
}

/// Measures; `progress` is told what is going on.
///
/// # Errors
/// [`Error::Config`] for options that do not go together or more memory than there is; those of a model that cannot be prepared.
pub fn run(options: &Options, progress: &dyn Fn(&str)) -> Result<Report> {
    let facts = options.subject.facts()?;
    let cases = options.cases();
    let positions = cases.iter().map(|&(test, context)| context.saturating_add(test.tokens())).max().unwrap_or(0);
    if positions > facts.positions {
        let Facts { limit, positions: most, .. } = &facts;
        return Err(Error::Config(format!("the tests take {positions} positions, but {limit} {most}")));
    }
    if let Some((test, _)) = cases.iter().find(|(test, _)| facts.encoder && matches!(test, Test::Decode(_))) {
        let text =
            format!("--test {test}: {} is an encoder, which decodes nothing; give pp{}", facts.name, facts.positions);
        return Err(Error::Config(text));
    }
    memory_for("weights and their shares", facts.bytes, facts.remedy)?;
    let run_ahead = run_ahead_room(machine::available().map(|free| free.saturating_sub(facts.bytes)));
    progress(&format!("{}: {}, calibration, plan", facts.name, facts.origin));
    let Made { weights, plan, tokens, reshaping, whole, model } = options.subject.make(positions, options.net)?;
    progress("machine's peak and float model");
    let peak = Peak::measure();
    let plaintext: Vec<Plaintext> =
        cases.iter().map(|&(test, context)| Plaintext::measure(&weights, test, context)).collect();
    progress("fixed point, shares of the weights");
    let timeout = Duration::from_secs(3600);
    let setup = Setup { profile: options.net, ahead_capacity: run_ahead as usize, timeout, ..Setup::default() };
    let tokens: Vec<u32> = tokens.into_iter().take(positions).collect();
    let harness = Harness::with(&weights, plan, &tokens, setup)?;
    drop(weights);
    let bench = Bench { options, facts, reshaping, harness, whole, model, run_ahead };
    let row = |(&(test, context), float): (&(Test, usize), &Plaintext)| {
        progress(&format!("{test} at context {context}"));
        Case { bench: &bench, test, context }.row(float)
    };
    let rows = cases.iter().zip(&plaintext).map(row).collect::<Result<_>>()?;
    Ok(Report { rows, plaintext, peak })
}

pub(super) fn memory_for(what: &str, bytes: u64, remedy: &str) -> Result<()> {
    match machine::available() {
        Some(free) if bytes > free => Err(Error::Config(format!(
            "{what} take about {}, but {} are free: {remedy}",
            machine::gb(bytes),
            machine::gb(free)
        ))),
        _ => Ok(()),
    }
}

/// The kernel's high-water mark of this process; 0 where it does not tell.
#[must_use]
pub fn peak_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap_or_default();
    line.trim().trim_end_matches("kB").trim().parse::<u64>().unwrap_or(0) * 1024
}

/// What this process takes now, in bytes; `None` where the system does not say.
#[must_use]
pub fn resident_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"))?;
    Some(line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()? * 1024)
}

/// Forgets the high-water mark of what was before, where the kernel lets us; else the mark includes the preparation.
fn forget_peak() {
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

/// Traffic of some passes.
struct Traffic {
    counted: Vec<Measured>,
    passes: usize,
    /// What Owner, Client and Helper send the Owner ahead in a pass, by [`Role::index`].
    to_owner: [f64; 3],
}

impl Traffic {
    /// Per pass.
    fn mean(&self, f: &dyn Fn(&Measured) -> u64) -> f64 {
        self.counted.iter().map(f).sum::<u64>() as f64 / self.passes as f64
    }

    /// In sequence.
    fn messages(&self) -> u32 {
        self.counted.last().map_or(0, |m| m.depth)
    }
}

/// A test at a context.
struct Case<'a> {
    bench: &'a Bench<'a>,
    test: Test,
    /// Cached positions before the first token.
    context: usize,
}

/// What a token took.
struct Taken {
    ms: f64,
    times: Times,
}

impl Case<'_> {
    fn row(&self, float: &Plaintext) -> Result<Row> {
        let facts = &self.bench.facts;
        let (passes, tokens) = self.test.passes();
        let traffic = self.traffic()?;
        self.session_memory(&traffic)?;
        forget_peak();
        // Batches as a generation with all private layers would have them.
        // Passes that half of the Owner's buffer holds.
        let half = (self.bench.run_ahead / 2) as f64;
        let room = traffic.to_owner.map(|each| (half / each.max(1.0)).max(1.0) as usize);
        let pace = Pace::Generation(room);
        let sustained = self.measure(pace, passes)?;
        let ready = passes.min(room.into_iter().fold(MAX_BATCH, usize::min));
        let ready = if self.in_blocks() { None } else { Some(self.measure(Pace::Ready, ready)?) };
        // The Client computes the public layers in the clear.
        let public = (facts.layers - facts.private) as f64 * float.layer_s * 1e3;
        let head = if facts.part == Part::Layers { 0.0 } else { float.head_s };
        let per_token = |bytes: f64| (bytes / tokens as f64).round() as u64;
        Ok(Row {
            preset: facts.name.clone(),
            reshaping: self.bench.reshaping.clone(),
            test: self.test.to_string(),
            context: self.context,
            net: self.bench.options.net.to_string(),
            layers_measured: facts.measured,
            layers_total: facts.private,
            ms_per_token: sustained.ms + public,
            ms_per_token_ready: ready.as_ref().map(|r| r.ms + public),
            float_ms_per_token: 1e3 * (facts.layers as f64 * float.layer_s + head),
            online_bytes_per_token: per_token(traffic.mean(&Measured::online_bytes)),
            ahead_bytes_per_token: per_token(traffic.mean(&Measured::ahead_bytes)),
            messages_per_token: f64::from(traffic.messages()) / tokens as f64,
            peak_memory_bytes: peak_memory(),
            predicted_peak_memory_bytes: self.predicted_memory(),
            run_ahead_buffer_bytes: self.bench.run_ahead,
            by_operation: sustained.times.by_operation(&|role, kind, lane| {
                let sent = |m: &Measured| m.spent[role.index()].sent(kind, lane);
                per_token(traffic.mean(&sent))
            }),
            ready_by_operation: ready.map(|r| r.times.steps()).unwrap_or_default(),
            threads: rayon::current_num_threads(),
            isa: Isa::current().name(),
        })
    }

    /// Of such a prompt nobody holds the whole run-ahead. A model's last layer is never cut.
    fn in_blocks(&self) -> bool {
        let (config, plan) = &self.bench.whole;
        let cut = self.bench.facts.part == Part::Layers || plan.layers.len() > 1;
        cut && matches!(self.test, Test::Prefill(n) if block::rows(config, plan, self.context, n) < n)
    }

    /// Per token, for all private layers.
    fn measure(&self, pace: Pace, passes: usize) -> Result<Taken> {
        let &Facts { measured, private: total, part, .. } = &self.bench.facts;
        let (_, tokens) = self.test.passes();
        let take = |part| -> Result<Taken> {
            let m = self.bench.harness.measure(part, pace, self.context, &vec![tokens; passes])?;
            let all = passes * tokens;
            Ok(Taken { ms: m.wall.as_secs_f64() * 1e3 / all as f64, times: Times::of(&m.spent, all) })
        };
        let whole = take(part)?;
        if measured == total {
            return Ok(whole);
        }
        let (more, layers) = ((total - measured) as f64 / measured as f64, take(Part::Layers)?);
        Ok(Taken { ms: whole.ms + more * layers.ms, times: whole.times.add(more, &layers.times) })
    }

    /// Counted for all private layers. It grows evenly from eight passes to the next eight, so that the mean of a long
    /// test is that of its ends.
    fn traffic(&self) -> Result<Traffic> {
        let (passes, tokens) = self.test.passes();
        let (context, (config, plan)) = (self.context, &self.bench.whole);
        let ends = if passes > 16 { vec![(context, 8), (context + passes - 8, 8)] } else { vec![(context, passes)] };
        let counted = ends
            .iter()
            .map(|&(at, n)| count(config, plan, self.bench.facts.part, at, &vec![tokens; n]))
            .collect::<Result<Vec<Measured>>>()?;
        let mut traffic = Traffic { counted, passes: ends.iter().map(|(_, n)| n).sum(), to_owner: [0.0; 3] };
        let to_owner = |role: Role| traffic.mean(&|m| m.sent[role.index()][Role::Owner.index()].ahead_bytes);
        traffic.to_owner = Role::ALL.map(to_owner);
        Ok(traffic)
    }

    fn session_memory(&self, traffic: &Traffic) -> Result<()> {
        let (prompt, decode) = self.request();
        let &Facts { measured, private: total, remedy, .. } = &self.bench.facts;
        let (config, plan) = (self.bench.harness.config(), self.bench.harness.plan());
        let of = |role| memory::session_bytes(role, config, plan, prompt, decode, self.bench.run_ahead).total();
        // All of it is there before the clock of `ready` starts; of a prompt in blocks there is no `ready`.
        let passes = if self.in_blocks() { 0 } else { self.test.passes().0.min(MAX_BATCH) as u64 };
        let walked = traffic.mean(&Measured::ahead_bytes) as u64 * measured as u64 / total.max(1) as u64 * passes;
        memory_for(
            &format!("{}: caches, vectors and run-ahead", self.test),
            Role::ALL.map(of).iter().sum::<u64>() + walked,
            remedy,
        )
    }

    /// The request whose memory is that of the test: its last position is the same.
    fn request(&self) -> (usize, usize) {
        match self.test {
            Test::Prefill(n) => (n, 0),
            Test::Decode(n) => (1, (self.context + n).saturating_sub(1)),
        }
    }

    fn predicted_memory(&self) -> BTreeMap<String, u64> {
        let (prompt, decode) = self.request();
        let (config, plan) = &self.bench.model;
        let of = |role: Role| {
            let model = memory::model_bytes(role, config, plan);
            let session = memory::session_bytes(role, config, plan, prompt, decode, self.bench.run_ahead);
            (role.to_string(), model.weights + model.tables + session.total() + PROCESS)
        };
        Role::ALL.map(of).into()
    }
}

/// The buffer for each peer's run-ahead: an eighth of the memory that is left, so that large models have batches worth their
/// while; at least the default, at most four times as much.
fn run_ahead_room(left: Option<u64>) -> u64 {
    left.map_or(RUN_AHEAD, |left| (left / 8).clamp(RUN_AHEAD, 4 * RUN_AHEAD))
}

/// Prints what is being prepared and since when.
pub fn stopwatch() -> impl Fn(&str) {
    let begun = Instant::now();
    move |what: &str| eprintln!("[{:6.1} s] {what}", begun.elapsed().as_secs_f64())
}
