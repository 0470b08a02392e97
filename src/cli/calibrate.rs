//! `trefoil calibrate`: the float model over text, headroom per layer and table, the plan it proposes, what would not fit.

use std::path::{Path, PathBuf};

use super::private::Chosen;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use trefoil::error::{Error, Result};
use trefoil::model::preparation::{adapted, split_layers, split_weights};
use trefoil::model::progress::Progress;
use trefoil::model::rounding::Choice;
use trefoil::model::{Checkpoint, TextCodec, calibrate};
use trefoil::plan::headroom::{Headroom, headroom};
use trefoil::plan::{Misfit, Plan, propose};

/// Options of `trefoil calibrate`.
#[derive(clap::Args)]
pub struct Args {
    /// A Hugging Face directory: config.json, model.safetensors (or a sharded index), tokenizer.json.
    #[arg(long, default_value = "models/quill-4m")]
    model: PathBuf,
    #[command(flatten)]
    private: super::private::Args,
    /// Text like the prompts to come, UTF-8.
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// Positions to plan for, below the model's own; the text is read in windows of as many tokens.
    #[arg(long, value_name = "TOKENS")]
    context: Option<usize>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    tokens: usize,
    windows: usize,
    context: usize,
    private_layers: usize,
    private_embedding: bool,
    fits: bool,
    warnings: Vec<String>,
    /// What too few fraction bits would do to the matrices that get more.
    small_weights: Vec<String>,
    does_not_fit: Vec<Misfit>,
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<&'static str>,
    headroom: Vec<Headroom>,
    plan: Option<Plan>,
}

/// For what no ring can carry.
const REMEDY: &str = "look for a corrupt or badly scaled weight in the layers named; otherwise keep those layers public \
(--private-layers with a smaller number), or plan for a shorter --context where a sum over positions does not fit";

fn read(file: &Path) -> Result<String> {
    let text = calibrate::whole_text(file, "--text")?;
    if text.trim().is_empty() {
        let name = file.display();
        return Err(Error::Config(format!("--text: {name}: is empty; give text like the prompts to come")));
    }
    Ok(text)
}

/// Runs the command; says whether the model fits.
///
/// # Errors
/// Whatever the options, the text or the checkpoint got wrong; [`Error::Model`] if the model does not fit.
pub fn run(a: &Args) -> Result<()> {
    let text = read(&a.text)?;
    let Chosen { model, adapter, config, private_layers } = a.private.chosen(&a.model)?;
    // Before the weights are read, which takes a while.
    split_layers(&config, private_layers)?;
    let ids = TextCodec::open(&model)?.encode(&text)?;
    let mut weights = adapted(&Checkpoint::open(&model)?, &model, adapter.as_deref(), &Progress::default())?;
    let (first, private_embedding) = split_weights(&weights, private_layers)?;
    weights.check()?;
    if let Some(n) = a.context {
        if n < 2 {
            return Err(Error::Config(format!("--context {n}: give at least 2 positions")));
        }
        weights.config.max_positions = weights.config.max_positions.min(n);
    }
    let config = weights.config.clone();
    let choice = Choice::new(&weights, first, private_embedding)?;
    let context = config.max_positions;
    let mut windows: Vec<Vec<u32>> = ids.chunks(context).map(<[u32]>::to_vec).collect();
    let count = windows.len();
    // As a preparation does: pseudorandom tokens stress a model as prose does not.
    windows.push(calibrate::stress(&config, context));
    let bar =
        if a.json { ProgressBar::hidden() } else { ProgressBar::new(windows.iter().map(|w| w.len() as u64).sum()) };
    if let Ok(style) = ProgressStyle::with_template("calibrating {bar:30} {pos}/{len} tokens, {eta} left") {
        bar.set_style(style);
    }
    let ranges = calibrate::ranges_watched(&weights, first, &windows, &mut |n| bar.inc(n as u64));
    bar.finish_and_clear();
    let bounds = calibrate::bounds(&weights, first, &choice.fractions)?;
    let proposed = propose(&config, first, private_embedding, &bounds, &ranges);
    let mut warnings = Vec::new();
    if ids.len() < 2 * context {
        warnings.push(format!(
            "the text has {} tokens, less than two contexts of {context}: long prompts may leave these ranges; give more text, or a --context as short as the prompts",
            ids.len()
        ));
    }
    let (plan, does_not_fit) = match proposed {
        Ok(plan) => (Some(plan), Vec::new()),
        Err(misfits) => (None, misfits),
    };
    let report = Report {
        tokens: ids.len(),
        windows: count,
        context,
        private_layers: config.num_layers - first,
        private_embedding,
        fits: plan.is_some(),
        warnings,
        small_weights: choice.small.iter().map(ToString::to_string).collect(),
        remedy: plan.is_none().then_some(REMEDY),
        headroom: plan.as_ref().map_or_else(Vec::new, |p| headroom(p, &bounds, &ranges)),
        does_not_fit,
        plan,
    };
    if a.json {
        let json = serde_json::to_string_pretty(&report).map_err(|e| Error::Internal(format!("writing JSON: {e}")))?;
        super::say(&format!("{json}\n"))?;
    } else {
        super::say(&show(&report))?;
    }
    match report.does_not_fit.len() {
        0 => Ok(()),
        n => Err(Error::Model(format!("{}: {n} quantities do not fit, named above", a.model.display()))),
    }
}

fn show(r: &Report) -> String {
    let mut out = format!(
        "text          {} tokens in {} windows of at most {}; {} private layers{}\n",
        r.tokens,
        r.windows,
        r.context,
        r.private_layers,
        if r.private_embedding { " and the embedding" } else { "" }
    );
    for w in &r.warnings {
        out += &format!("warning       {w}\n");
    }
    for s in &r.small_weights {
        out += &format!("more bits     {s}\n");
    }
    for m in &r.does_not_fit {
        out += &format!("does not fit  {m}\n");
    }
    if let Some(remedy) = r.remedy {
        out += &format!("remedy        {remedy}\n");
    }
    if let Some(p) = &r.plan {
        out += &format!(
            "plan          residual stream {} bits, weights with up to {} of fraction, logits {} bits with {} of fraction, tournament of radix {}\n\n",
            p.residual_k,
            p.weight_fractions().max().unwrap_or(0),
            p.head.logit_k,
            p.head.f_logit,
            p.head.radix
        );
        out += &format!(
            "{:<6}{:<48}{:>24}{:>12}{:>6}{:>24}{:>10}  {}\n",
            "layer", "quantity", "seen", "proven", "ring", "guard", "headroom", "windows"
        );
    }
    for h in &r.headroom {
        let range = |low: Option<f64>, high: f64| match low {
            Some(low) => format!("{} to {}", figure(low), figure(high)),
            None => figure(high),
        };
        out += &format!(
            "{:<6}{:<48}{:>24}{:>12}{:>6}{:>24}{:>10}  {}\n",
            h.place,
            h.quantity,
            range(h.least, h.largest),
            h.proven.map_or_else(|| "-".into(), figure),
            h.ring,
            h.guard.map_or_else(|| "none: proven".into(), |g| range(h.guard_low, g)),
            h.headroom_bits.map_or_else(|| "-".into(), |b| format!("{b:.1} bits")),
            h.windows.iter().map(|w| format!("2^{w}")).collect::<Vec<_>>().join(" + ")
        );
    }
    out
}

fn figure(v: f64) -> String {
    if v == 0.0 || (1e-2..1e5).contains(&v.abs()) { format!("{v:.2}") } else { format!("{v:.1e}") }
}
