//! `trefoil finetune`: from a public checkpoint to a private one that is cheaper to serve.

use std::path::PathBuf;

use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressStyle};
use trefoil::error::{Error, Result};
use trefoil::marill::adapter::parse_targets;
use trefoil::marill::data::{DataOptions, Source};
use trefoil::marill::reshape::{MergeBy, Reshape};
use trefoil::marill::train::{self, Method, Options, Outcome, Progress};
use trefoil::model::{Activation, ModelConfig, Softmax};

/// Options of `trefoil finetune`.
#[derive(clap::Args)]
pub struct Args {
    /// The public model to start from, a Hugging Face directory.
    #[arg(long, value_name = "DIR")]
    base: PathBuf,
    /// What to learn: a UTF-8 text file, a directory of them, chats (*.jsonl, a {"messages": [..]} a line, rendered by the base's
    /// chat template), or a built-in task: task:dates, task:reverse, task:sums. A tenth of it (512 examples of a task) is held
    /// out to measure on.
    #[arg(long, value_name = "FILE|DIR|task:NAME")]
    data: String,
    /// The directory to make. The same command goes on there where it was interrupted.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// What is trained: every weight; the private layers only (the rest stays the base's bit for bit, and public); or low-rank
    /// adapters on the private layers, beside the base.
    #[arg(long, value_enum, default_value_t = MethodName::Full)]
    method: MethodName,
    /// How many layers, from the top, are private: a number, a fraction (1/2 or 0.5), or 'all', which includes the embedding.
    /// Default: half for freeze, all otherwise.
    #[arg(long, value_name = "N|F|all", allow_negative_numbers = true)]
    private_layers: Option<String>,
    /// Merge so many attention heads of private layers into one.
    #[arg(long, value_name = "M", default_value_t = 1)]
    merge_heads: usize,
    /// Which ones: those that attend alike, or neighbours. Default: similarity.
    #[arg(long, value_enum)]
    merge_by: Option<MergeByName>,
    /// Keep one of so many heads of private layers, the most important ones (a baseline for merging).
    #[arg(long, value_name = "M", default_value_t = 1)]
    prune_heads: usize,
    /// Keep one of so many private layers (a baseline).
    #[arg(long, value_name = "M", default_value_t = 1)]
    prune_layers: usize,
    /// The softmax of private layers: 2relu needs no exponential.
    #[arg(long, default_value = "exact", value_name = "exact|2relu")]
    softmax: Softmax,
    /// The activation of private layers. Default: the model's own.
    #[arg(long, value_name = "silu|relu|quad|gelu")]
    activation: Option<Activation>,
    /// Rank of the adapters. Default: 16.
    #[arg(long)]
    rank: Option<usize>,
    /// Adapters are scaled by alpha / rank. Default: twice the rank.
    #[arg(long)]
    alpha: Option<f64>,
    /// The maps that get adapters, with commas between. Default: q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj.
    #[arg(long, value_name = "LIST")]
    targets: Option<String>,
    /// Passes over the data. 0 changes the shape of the model and trains nothing.
    #[arg(long, default_value_t = 2)]
    epochs: usize,
    /// How many of them match the teacher's attention outputs and hidden states (stage I). Default with a teacher: half.
    #[arg(long, value_name = "EPOCHS")]
    stage1_epochs: Option<usize>,
    /// At most as many steps of that.
    #[arg(long, value_name = "STEPS")]
    stage1_steps: Option<usize>,
    /// At most as many steps.
    #[arg(long)]
    steps: Option<usize>,
    /// Examples in a step.
    #[arg(long, default_value_t = 16)]
    batch_size: usize,
    /// The largest learning rate: reached after a twentieth of the steps, then falling to 0.
    #[arg(long, default_value_t = train::LEARNING_RATE, allow_negative_numbers = true)]
    lr: f64,
    /// The model whose behaviour is to be kept: the fine-tuned one, of the base's shape. The new one starts from its weights.
    #[arg(long, value_name = "DIR")]
    teacher: Option<PathBuf>,
    /// Longest example in tokens; text is cut into windows of this length. Default: 256, or the model's context if that is shorter.
    #[arg(long, value_name = "TOKENS")]
    context: Option<usize>,
    /// Examples of a task to train on. Default: 4096.
    #[arg(long)]
    examples: Option<usize>,
    /// Of the tasks, of the split, of the order of the data, of fresh adapters.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Save a checkpoint every so many steps.
    #[arg(long, value_name = "STEPS", default_value_t = 100)]
    save_every: usize,
    /// Threads to compute with; the same number makes the same bits. Default: RAYON_NUM_THREADS, or as many as the machine runs
    /// at once.
    #[arg(long)]
    threads: Option<usize>,
    /// Print one JSON object at the end instead of a progress bar.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum MethodName {
    Full,
    Freeze,
    Lora,
}

#[derive(Clone, Copy, ValueEnum)]
enum MergeByName {
    Similarity,
    Adjacent,
}

/// `N`, a fraction, or `all`, which is `None`.
fn private_layers(text: Option<&str>, method: MethodName, layers: usize) -> Result<Option<usize>> {
    let wrong = |text: &str| {
        Error::Config(format!(
            "--private-layers {text}: give a number from 0 to {layers}, a fraction below 1, or 'all'"
        ))
    };
    let Some(text) = text else {
        return Ok((method == MethodName::Freeze).then(|| layers.div_ceil(2)));
    };
    if text == "all" {
        return Ok(None);
    }
    if let Ok(n) = text.parse::<usize>() {
        return if n <= layers { Ok(Some(n)) } else { Err(wrong(text)) };
    }
    let fraction = match text.split_once('/') {
        Some((a, b)) => a.trim().parse::<f64>().ok().zip(b.trim().parse::<f64>().ok()).map(|(a, b)| a / b),
        None => text.parse::<f64>().ok(),
    };
    match fraction {
        Some(f) if f > 0.0 && f < 1.0 => Ok(Some(((f * layers as f64).round() as usize).max(1))),
        _ => Err(wrong(text)),
    }
}

/// How candle is told how many threads multiply matrices (rayon, the crate, reads it too), and how many do everything else.
const PRODUCTS: &str = "RAYON_NUM_THREADS";
const ELEMENTWISE: &str = "CANDLE_NUM_THREADS";

/// Lets `n` threads compute (`None`: what the environment says, else as many as the machine runs at once) by starting this
/// program anew with that environment, where it is not so already: candle takes the numbers from nowhere else, and a process
/// cannot safely change its own. For all but products candle's threads wait in a loop that leaves nothing to others
/// and gain nothing at the sizes that occur here, so one does that, unless the environment says otherwise.
///
/// # Errors
/// [`Error::Config`] for none, [`Error::Io`] if the program cannot be started.
pub fn threads(n: Option<usize>) -> Result<()> {
    use std::os::unix::process::CommandExt;
    if n == Some(0) {
        return Err(Error::Config("--threads 0: give 1 or more".into()));
    }
    let given = |name| std::env::var(name).ok().filter(|v| v.parse::<usize>().is_ok_and(|v| v > 0));
    let machine = || std::thread::available_parallelism().map_or(1, usize::from);
    let wanted = n.map(|n| n.to_string()).or_else(|| given(PRODUCTS)).unwrap_or_else(|| machine().to_string());
    if given(PRODUCTS).as_ref() == Some(&wanted) && given(ELEMENTWISE).is_some() {
        return Ok(());
    }
    let mut again = std::process::Command::new(std::env::current_exe().map_err(|e| Error::io("this program", e))?);
    again.args(std::env::args_os().skip(1)).env(PRODUCTS, wanted);
    again.env(ELEMENTWISE, given(ELEMENTWISE).unwrap_or_else(|| "1".into()));
    Err(Error::io("this program, to start it with --threads", again.exec()))
}

const TARGETS: &str = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj";

/// Passes over the data that match a teacher.
fn stage1_epochs(a: &Args) -> usize {
    a.stage1_epochs.unwrap_or(if a.teacher.is_some() { a.epochs / 2 } else { 0 })
}

/// Refuses options that the others leave without a meaning.
fn meant(a: &Args, data: &Source) -> Result<()> {
    let adapters = a.method == MethodName::Lora;
    let task = matches!(data, Source::Task(_));
    let reshaped = (a.merge_heads, a.prune_heads, a.prune_layers) != (1, 1, 1)
        || a.softmax != Softmax::Exact
        || a.activation.is_some();
    let some_layers = a.private_layers.as_deref().is_some_and(|n| n != "all");
    for (name, without, why) in [
        ("--rank", a.rank.is_some() && !adapters, "only --method lora makes adapters"),
        ("--alpha", a.alpha.is_some() && !adapters, "only --method lora makes adapters"),
        ("--targets", a.targets.is_some() && !adapters, "only --method lora makes adapters"),
        ("--merge-by", a.merge_by.is_some() && a.merge_heads == 1, "say with --merge-heads how many become one"),
        (
            "--stage1-steps",
            a.stage1_steps.is_some() && stage1_epochs(a) == 0,
            "there is no first stage; it matches a teacher (--teacher) for an epoch at least (--stage1-epochs)",
        ),
        (
            "--private-layers",
            some_layers && a.method == MethodName::Full && !reshaped && stage1_epochs(a) == 0,
            "--method full trains the weights of all layers; --method freeze leaves the lower ones as they are",
        ),
        ("--examples", a.examples.is_some() && !task, "files are read whole; only a task's examples are made up"),
    ] {
        if without {
            return Err(Error::Config(format!("{name} has no meaning here: {why}")));
        }
    }
    Ok(())
}

fn options(a: &Args) -> Result<Options> {
    let data = Source::parse(&a.data)?;
    meant(a, &data)?;
    let c = ModelConfig::open(&a.base)?;
    if a.save_every == 0 {
        return Err(Error::Config("--save-every 0: give 1 or more".into()));
    }
    let rank = a.rank.unwrap_or(16);
    let method = match a.method {
        MethodName::Full => Method::Full,
        MethodName::Freeze => Method::Freeze,
        MethodName::Lora => Method::Lora,
    };
    Ok(Options {
        base: a.base.clone(),
        data,
        sampling: DataOptions {
            context: a.context.unwrap_or(c.max_positions.min(256)),
            examples: a.examples.unwrap_or(4096),
            seed: a.seed,
        },
        out: a.out.clone(),
        method,
        private_layers: private_layers(a.private_layers.as_deref(), a.method, c.num_layers)?,
        reshape: Reshape {
            merge_heads: a.merge_heads,
            merge_by: match a.merge_by {
                None | Some(MergeByName::Similarity) => MergeBy::Similarity,
                Some(MergeByName::Adjacent) => MergeBy::Adjacent,
            },
            prune_heads: a.prune_heads,
            prune_layers: a.prune_layers,
            softmax: a.softmax,
            activation: a.activation,
        },
        rank,
        alpha: a.alpha.unwrap_or(2.0 * rank as f64),
        targets: parse_targets(a.targets.as_deref().unwrap_or(TARGETS))?,
        epochs: a.epochs,
        stage1_epochs: stage1_epochs(a),
        stage1_steps: a.stage1_steps,
        steps: a.steps,
        batch_size: a.batch_size,
        lr: a.lr,
        teacher: a.teacher.clone(),
        save_every: a.save_every,
    })
}

/// Runs the command.
///
/// # Errors
/// Whatever options, data, base or teacher got wrong, or what could not be saved.
pub fn run(a: &Args) -> Result<()> {
    threads(a.threads)?;
    let options = options(a)?;
    let bar = if a.json { ProgressBar::hidden() } else { ProgressBar::new(0) };
    if let Ok(style) = ProgressStyle::with_template("{prefix} {bar:30} {pos}/{len} steps, {msg}, {eta} left") {
        bar.set_style(style);
    }
    let mut mean: Option<(bool, f32)> = None;
    let mut watch = |p: Progress| {
        // A mean over about the last twenty steps, since single ones jump; the losses of the two stages are different things.
        let smooth = match mean {
            Some((matching, mean)) if matching == p.matching => mean + 0.05 * (p.loss - mean),
            _ => p.loss,
        };
        mean = Some((p.matching, smooth));
        if bar.length() != Some(p.steps as u64) {
            bar.set_length(p.steps as u64);
            // What an earlier run has done says nothing about the speed of this one.
            bar.set_position(p.step as u64 - 1);
            bar.reset_eta();
        }
        bar.set_prefix(if p.matching { "matching the teacher" } else { "training" });
        bar.set_message(format!("loss {smooth:.3}"));
        bar.set_position(p.step as u64);
        true
    };
    let outcome = train::run(&options, &mut watch)?;
    bar.finish_and_clear();
    let Some(outcome) = outcome else { return Err(Error::Internal("training ended early".into())) };
    if a.json {
        let json = serde_json::to_string_pretty(&outcome).map_err(|e| Error::Internal(format!("writing JSON: {e}")))?;
        return super::say(&format!("{json}\n"));
    }
    super::say(&show(&outcome, &options))
}

fn show(o: &Outcome, options: &Options) -> String {
    let mut out = String::new();
    let out_dir = options.out.display();
    if o.finished_before {
        out += &format!("{out_dir} was made before by the same options\n");
    } else {
        let from = if o.resumed_at > 0 { format!(" (this run from step {} on)", o.resumed_at) } else { String::new() };
        let speed = if o.seconds > 0.0 { o.tokens as f64 / o.seconds } else { 0.0 };
        out += &format!(
            "trained       {} weights, {} steps{from}, {:.0} s, {speed:.0} tokens/s\n",
            o.trained, o.steps, o.seconds
        );
    }
    if o.cut > 0 {
        out += &format!(
            "warning       {} examples were longer than {} tokens and cut; see --context\n",
            o.cut, options.sampling.context
        );
    }
    let s = &o.score;
    out += &format!(
        "held out      {} examples, {} tokens: loss {:.4} nats, perplexity {:.3}",
        s.examples, s.tokens, s.loss, s.perplexity
    );
    if let Some(exact) = s.exact_match {
        out += &format!(", exact match {:.1} %", 100.0 * exact);
    }
    out += &format!("\nwritten       {out_dir}\n");
    out
}
