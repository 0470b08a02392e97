//! A benchmark from options to rows.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::{Harness, Measured, Pace, Part, Peak, Plaintext, Preset, count, random_weights};
use crate::deploy::doctor::machine;
use crate::error::{Error, Result};
use crate::generate::MAX_BATCH;
use crate::model::ModelConfig;
use crate::net::shape::Profile;
use crate::party::Role;
use crate::plan::{Plan, memory};
use crate::predict::{PROCESS, RUN_AHEAD};
use crate::ring::Isa;
use crate::world::Setup;

/// What is measured, in llama-bench's notation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Test {
    /// `ppN`: a pass over a prompt of N tokens.
    Prefill(usize),
    /// `tgN`: N passes of a token each.
    Decode(usize),
}

impl Test {
    /// Passes, and tokens of each.
    #[must_use]
    pub fn passes(self) -> (usize, usize) {
        match self {
            Test::Prefill(n) => (1, n),
            Test::Decode(n) => (n, 1),
        }
    }

    fn tokens(self) -> usize {
        let (passes, tokens) = self.passes();
        passes * tokens
    }

    /// A list such as `pp128,tg32`.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn list(text: &str) -> Result<Vec<Test>> {
        text.split(',').map(str::parse).collect()
    }
}

impl fmt::Display for Test {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Test::Prefill(n) => write!(f, "pp{n}"),
            Test::Decode(n) => write!(f, "tg{n}"),
        }
    }
}

impl FromStr for Test {
    type Err = Error;

    fn from_str(text: &str) -> Result<Test> {
        let number = |n: &str| n.parse().ok().filter(|&n: &usize| n > 0);
        let prefill = text.strip_prefix("pp").and_then(number).map(Test::Prefill);
        let test = prefill.or_else(|| text.strip_prefix("tg").and_then(number).map(Test::Decode));
        test.ok_or_else(|| {
            Error::Config(format!(
                "--test {text:?}: expected ppN (prefill of N tokens) or tgN (N tokens decoded), as in pp128,tg32"
            ))
        })
    }
}

/// What to measure.
#[derive(Clone, Debug)]
pub struct Options {
    /// The shape.
    pub preset: &'static Preset,
    /// One row each.
    pub tests: Vec<Test>,
    /// Cached positions before the decode tokens.
    pub context: usize,
    /// Private layers that are run; the figures of all are extrapolated.
    pub layers: Option<usize>,
    /// Private layers of the model, from the top; `None` for all and the embedding.
    pub private_layers: Option<usize>,
    /// Simulated network.
    pub net: Profile,
}

/// What a test took. Where `layers_measured` is below `layers_total`, times are extrapolated; bytes and messages are
/// counted for all layers in any case.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// The shape.
    pub preset: String,
    /// `ppN` or `tgN`.
    pub test: String,
    /// Cached positions before the first token.
    pub context: usize,
    /// The network.
    pub net: String,
    /// Private layers that were run.
    pub layers_measured: usize,
    /// Private layers that the figures are for.
    pub layers_total: usize,
    /// From cold, run-ahead work of all parties counted.
    pub ms_per_token: f64,
    /// The online part alone, of at most a batch of tokens.
    pub ms_per_token_ready: f64,
    /// The float model with all of the preset's layers.
    pub float_ms_per_token: f64,
    /// Bytes of all links that depend on the input.
    pub online_bytes_per_token: u64,
    /// Bytes of all links that are sent ahead of it.
    pub ahead_bytes_per_token: u64,
    /// Online messages in sequence; of a prefill those of the pass over its tokens.
    pub messages_per_token: f64,
    /// Of this process: all three parties, with the layers that were run.
    pub peak_memory_bytes: u64,
    /// Of each party in a process of its own, all private layers.
    pub predicted_peak_memory_bytes: BTreeMap<String, u64>,
    /// Of all three parties together.
    pub threads: usize,
    /// The instruction set of the kernels.
    pub isa: &'static str,
}

/// Rows and what the float model is held against.
pub struct Report {
    /// One per test.
    pub rows: Vec<Row>,
    /// The float model, by test.
    pub plaintext: Vec<Plaintext>,
    /// The machine.
    pub peak: Peak,
}

struct Bench<'a> {
    options: &'a Options,
    /// Private layers that are run, and that there are.
    layers: (usize, usize),
    part: Part,
    harness: Harness,
    /// All private layers, planned like those that are run.
    whole: (ModelConfig, Plan),
}

/// Measures; `progress` is told what is going on.
///
/// # Errors
/// [`Error::Config`] for options that do not go together or more memory than there is.
pub fn run(options: &Options, progress: &dyn Fn(&str)) -> Result<Report> {
    let preset = options.preset;
    let total = options.private_layers.unwrap_or(preset.layers());
    let measured = options.layers.unwrap_or(total);
    check_layers(options, total, measured)?;
    let positions = options.tests.iter().map(|&t| first_position(options, t) + t.tokens()).max().unwrap_or(0);
    if positions > preset.positions() {
        let most = preset.positions();
        return Err(Error::Config(format!("the tests take {positions} positions, but {} has {most}", preset.name)));
    }
    let config = preset.config(measured, positions);
    let private_embedding = preset.is_model() && options.private_layers.is_none();
    enough_memory("weights and their shares", weight_bytes(&config, private_embedding))?;
    progress(&format!("{}: random weights of {measured} layers ({})", preset.name, preset.source));
    let weights = random_weights(config)?;
    progress("machine's peak and float model");
    let peak = Peak::measure();
    let plaintext: Vec<Plaintext> =
        options.tests.iter().map(|&t| Plaintext::measure(&weights, t, first_position(options, t))).collect();
    progress("calibration, fixed point, shares of the weights");
    let timeout = Duration::from_secs(3600);
    let setup = Setup { profile: options.net, ahead_capacity: RUN_AHEAD as usize, timeout, ..Setup::default() };
    let harness = Harness::prepare(&weights, private_embedding, setup)?;
    drop(weights);
    let whole = all_layers(&harness, preset.config(total, positions));
    let part = if preset.is_model() { Part::Whole } else { Part::Layers };
    let bench = Bench { options, layers: (measured, total), part, harness, whole };
    let row = |(&test, float): (&Test, &Plaintext)| {
        progress(&format!("{test}"));
        bench.row(test, float)
    };
    let rows = options.tests.iter().zip(&plaintext).map(row).collect::<Result<_>>()?;
    Ok(Report { rows, plaintext, peak })
}

fn check_layers(options: &Options, total: usize, measured: usize) -> Result<()> {
    let preset = options.preset;
    let wrong = |option: &str, n: usize, most: usize, what: &str| {
        Err(Error::Config(format!("{option} {n}: give 1 to {most}, the {what} of {}", preset.name)))
    };
    if total == 0 || total > preset.layers() {
        return wrong("--private-layers", total, preset.layers(), "layers");
    }
    if measured == 0 || measured > total {
        return wrong("--layers", measured, total, "private layers");
    }
    Ok(())
}

fn first_position(options: &Options, test: Test) -> usize {
    match test {
        Test::Prefill(_) => 0,
        Test::Decode(_) => options.context,
    }
}

/// f32 weights, the Owner's integers and the Helper's words, with the matrices that are converted at a time.
fn weight_bytes(c: &ModelConfig, private_embedding: bool) -> u64 {
    let table = (c.vocab_size * c.hidden_size) as u64;
    let shared = c.parameter_count() - if c.tie_word_embeddings { 0 } else { table };
    let largest = table.max((2 * c.intermediate_size * c.hidden_size) as u64);
    4 * c.parameter_count() + 10 * shared + if private_embedding { 16 * table } else { 0 } + 12 * largest
}

fn enough_memory(what: &str, bytes: u64) -> Result<()> {
    match machine::available() {
        Some(free) if bytes > free => Err(Error::Config(format!(
            "{what} take about {}, but {} are free: measure fewer layers (--layers) or shorter tests",
            machine::gb(bytes),
            machine::gb(free)
        ))),
        _ => Ok(()),
    }
}

fn all_layers(harness: &Harness, config: ModelConfig) -> (ModelConfig, Plan) {
    let mut plan = harness.plan().clone();
    plan.layers = plan.layers.iter().cycle().take(config.num_layers).cloned().collect();
    (config, plan)
}

/// The kernel's high-water mark of this process; 0 where it does not tell.
#[must_use]
pub fn peak_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap_or_default();
    line.trim().trim_end_matches("kB").trim().parse::<u64>().unwrap_or(0) * 1024
}

/// Forgets the high-water mark of what was before, where the kernel lets us; else the mark includes the preparation.
fn forget_peak() {
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

/// Traffic per pass.
struct Traffic {
    online: f64,
    ahead: f64,
    /// What Owner, Client and Helper send the Owner ahead, by [`Role::index`].
    to_owner: [f64; 3],
    messages: u32,
}

impl Bench<'_> {
    fn row(&self, test: Test, float: &Plaintext) -> Result<Row> {
        let (measured, total) = self.layers;
        let preset = self.options.preset;
        let (passes, tokens) = test.passes();
        let traffic = self.traffic(test)?;
        self.session_memory(test, &traffic)?;
        forget_peak();
        let pace = self.pace(&traffic);
        let sustained = self.milliseconds(test, pace, passes)?;
        let room = traffic.to_owner.map(|each| batch_room(each).min(MAX_BATCH));
        let ready = passes.min(*room.iter().min().unwrap_or(&1));
        let ready = self.milliseconds(test, Pace::Ready, ready)?;
        // The Client computes the public layers in the clear.
        let public = (preset.layers() - total) as f64 * float.layer_s * 1e3;
        let head = if preset.is_model() { float.head_s } else { 0.0 };
        let per_token = |bytes: f64| (bytes / tokens as f64).round() as u64;
        Ok(Row {
            preset: preset.name.into(),
            test: test.to_string(),
            context: first_position(self.options, test),
            net: self.options.net.to_string(),
            layers_measured: measured,
            layers_total: total,
            ms_per_token: sustained + public,
            ms_per_token_ready: ready + public,
            float_ms_per_token: 1e3 * (preset.layers() as f64 * float.layer_s + head),
            online_bytes_per_token: per_token(traffic.online),
            ahead_bytes_per_token: per_token(traffic.ahead),
            messages_per_token: f64::from(traffic.messages) / tokens as f64,
            peak_memory_bytes: peak_memory(),
            predicted_peak_memory_bytes: self.predicted_memory(test),
            threads: rayon::current_num_threads(),
            isa: Isa::current().name(),
        })
    }

    /// Per token, for all private layers.
    fn milliseconds(&self, test: Test, pace: Pace, passes: usize) -> Result<f64> {
        let (measured, total) = self.layers;
        let (_, tokens) = test.passes();
        let context = first_position(self.options, test);
        let time = |part| -> Result<f64> {
            let m = self.harness.measure(part, pace, context, &vec![tokens; passes])?;
            Ok(m.wall.as_secs_f64() * 1e3 / (passes * tokens) as f64)
        };
        let whole = time(self.part)?;
        if measured == total {
            return Ok(whole);
        }
        Ok(whole + (total - measured) as f64 * time(Part::Layers)? / measured as f64)
    }

    /// Counted for all private layers. It grows evenly from eight passes to the next eight, so that the mean of a long
    /// test is that of its ends.
    fn traffic(&self, test: Test) -> Result<Traffic> {
        let (passes, tokens) = test.passes();
        let context = first_position(self.options, test);
        let (config, plan) = &self.whole;
        let ends = if passes > 16 { vec![(context, 8), (context + passes - 8, 8)] } else { vec![(context, passes)] };
        let counted = ends
            .iter()
            .map(|&(at, n)| count(config, plan, self.part, at, &vec![tokens; n]))
            .collect::<Result<Vec<Measured>>>()?;
        let walked: usize = ends.iter().map(|(_, n)| n).sum();
        let mean = |f: &dyn Fn(&Measured) -> u64| counted.iter().map(f).sum::<u64>() as f64 / walked as f64;
        let to_owner = |role: Role| mean(&|m: &Measured| m.sent[role.index()][Role::Owner.index()].ahead_bytes);
        Ok(Traffic {
            online: mean(&Measured::online_bytes),
            ahead: mean(&Measured::ahead_bytes),
            to_owner: Role::ALL.map(to_owner),
            messages: counted.last().map_or(0, |m| m.depth),
        })
    }

    /// Batches as a generation with all private layers would have them.
    fn pace(&self, traffic: &Traffic) -> Pace {
        Pace::Generation(traffic.to_owner.map(batch_room))
    }

    fn session_memory(&self, test: Test, traffic: &Traffic) -> Result<()> {
        let (prompt, decode) = self.request(test);
        let (measured, total) = self.layers;
        let (config, plan) = (self.options.preset.config(measured, self.whole.0.max_positions), self.harness.plan());
        let of = |role| memory::session_bytes(role, &config, plan, prompt, decode, RUN_AHEAD).total();
        // All of it is there before the clock of `ready` starts.
        let walked = traffic.ahead as u64 * measured as u64 / total as u64 * test.passes().0.min(MAX_BATCH) as u64;
        enough_memory(&format!("{test}: caches, vectors and run-ahead"), Role::ALL.map(of).iter().sum::<u64>() + walked)
    }

    /// The request whose memory is that of the test: its last position is the same.
    fn request(&self, test: Test) -> (usize, usize) {
        match test {
            Test::Prefill(n) => (n, 0),
            Test::Decode(n) => (1, (self.options.context + n).saturating_sub(1)),
        }
    }

    fn predicted_memory(&self, test: Test) -> BTreeMap<String, u64> {
        let (prompt, decode) = self.request(test);
        let (private, mut plan) = (&self.whole.0, self.whole.1.clone());
        // The Client has the public layers too.
        let config = self.options.preset.config(self.options.preset.layers(), private.max_positions);
        plan.first_private = config.num_layers - private.num_layers;
        let of = |role: Role| {
            let model = memory::model_bytes(role, &config, &plan);
            let session = memory::session_bytes(role, &config, &plan, prompt, decode, RUN_AHEAD);
            (role.to_string(), model.weights + model.tables + session.total() + PROCESS)
        };
        Role::ALL.map(of).into()
    }
}

/// Passes of `each` bytes that a batch may have: half of the Owner's buffer.
fn batch_room(each: f64) -> usize {
    ((RUN_AHEAD / 2) as f64 / each.max(1.0)).max(1.0) as usize
}

impl Report {
    /// A Markdown table.
    #[must_use]
    pub fn markdown(&self) -> String {
        let mut out = String::from(
            "| preset | test | context | net | layers | ms/token sustained | ms/token ready | float ms/token | online MB/token | run-ahead MB/token | messages/token | peak MB, this process |\n|---|---|---:|---|---|---:|---:|---:|---:|---:|---:|---:|\n",
        );
        let mb = |b: u64| b as f64 / 1e6;
        for r in &self.rows {
            let layers = if r.layers_measured == r.layers_total {
                format!("{}", r.layers_total)
            } else {
                format!("{}, times extrapolated from {}", r.layers_total, r.layers_measured)
            };
            out += &format!(
                "| {} | {} | {} | {} | {layers} | {:.2} | {:.2} | {:.3} | {:.3} | {:.3} | {} | {:.0} |\n",
                r.preset,
                r.test,
                r.context,
                r.net,
                r.ms_per_token,
                r.ms_per_token_ready,
                r.float_ms_per_token,
                mb(r.online_bytes_per_token),
                mb(r.ahead_bytes_per_token),
                r.messages_per_token,
                mb(r.peak_memory_bytes),
            );
        }
        out
    }

    /// The float model beside the machine, and what the figures are of.
    #[must_use]
    pub fn notes(&self) -> String {
        let giga = |v: f64| v / 1e9;
        let mut out = format!(
            "three parties on {} threads ({}); machine: {:.0} GB/s plain read, {:.0} GFLOP/s f32 multiply-add, all threads\n",
            rayon::current_num_threads(),
            Isa::current().name(),
            giga(self.peak.bytes),
            giga(self.peak.flops)
        );
        for (row, p) in self.rows.iter().zip(&self.plaintext) {
            out += &format!("float model, {}: {:.1} GB/s, {:.1} GFLOP/s", row.test, giga(p.bytes), giga(p.flops));
            out += match row.test.strip_prefix("tg").and_then(|n| n.parse::<usize>().ok()) {
                Some(n) if n < 64 => "; sustained over fewer than 64 tokens: not a headline\n",
                _ => "\n",
            };
        }
        out
    }
}

/// Prints what is being prepared and since when.
pub fn stopwatch() -> impl Fn(&str) {
    let begun = Instant::now();
    move |what: &str| eprintln!("[{:6.1} s] {what}", begun.elapsed().as_secs_f64())
}
