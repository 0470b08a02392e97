//! `trefoil bench`: what a shape or a model takes, measured.

use std::path::{Path, PathBuf};

use super::private::Chosen;
use trefoil::bench::{
    Model, Options, Plots, Preset, Shape, Subject, Test, adapter, contexts, run as measure, stopwatch,
};
use trefoil::error::{Error, Result};
use trefoil::model::preparation::{self, parse_private_layers};
use trefoil::predict::Source;

/// Of a language model; of an adapter, images.
const TESTS: &str = "pp128,tg64";
const IMAGES: usize = 16;
const CONTEXT: &str = "0";

/// Options of `trefoil bench`.
#[derive(clap::Args)]
pub struct Args {
    /// h768 and h2048 (a layer by itself), deep-256, tinyllama-1.1b, deepseek-coder-1.3b, openllama-3b, llama-2-7b; vit-b16 (a whole vision
    /// transformer, whose 197 tokens pp197 are an image); cryptpeft-hH-rR (or -sS): a private adapter of H heads and rank R over the last (S) layers of ViT-B/16, one row per image.
    #[arg(long, value_name = "NAME")]
    preset: Option<String>,
    /// In place of a shape a model with its own weights, calibrated and planned as for a preparation: a Hugging Face directory, or that of
    /// an adapter which names its base.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["preset", "layers"])]
    model: Option<PathBuf>,
    /// The public base that the model was fine-tuned from.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["adapter", "preset"])]
    base: Option<PathBuf>,
    /// A LoRA adapter over the model, as `trefoil generate` takes it.
    #[arg(long, value_name = "DIR", conflicts_with = "preset")]
    adapter: Option<PathBuf>,
    /// ppN: prefill of N tokens; tgN: N tokens decoded, from cold. A list. Of an adapter: imgN, N images from cold. Default: pp128,tg64; of
    /// vit-b16 pp197, an image; of an adapter img16.
    #[arg(long, value_name = "LIST")]
    test: Option<String>,
    /// Cached positions before the decode tokens. A list: every decode test is run at each.
    #[arg(long, default_value = CONTEXT, value_name = "LIST")]
    context: String,
    /// Of a model: positions to plan for, as --context of `trefoil generate` (shorter is cheaper). Default: its own. A preset is
    /// planned for those of the tests.
    #[arg(long, value_name = "TOKENS", conflicts_with = "preset")]
    plan_context: Option<usize>,
    /// Of a preset: private layers that are run; times of all are extrapolated, and labelled so. Default: all.
    #[arg(long, value_name = "N")]
    layers: Option<usize>,
    /// How many layers, from the top, are private: a number, or 'all', which includes the embedding. Default: all of a preset, of a
    /// model what its trefoil.json says, else half.
    #[arg(long, value_name = "N|all", allow_negative_numbers = true)]
    private_layers: Option<String>,
    #[command(flatten)]
    changes: super::changes::Args,
    /// Network: none, lan (0.1 ms, 16 Gbit/s), wan (20 ms, 0.4 Gbit/s), or RTT_MS,GBPS. Round-trip figures.
    #[arg(long, default_value = "none")]
    net: String,
    /// Write context.svg (time against context) and cost.svg (time and bytes by operation) into this directory.
    #[arg(long, value_name = "DIR")]
    plot: Option<PathBuf>,
    /// Print a JSON array of rows instead of a Markdown table.
    #[arg(long)]
    json: bool,
}

fn run_adapter(a: &Args, name: &str, shape: adapter::Shape) -> Result<()> {
    let given = [
        ("--layers", a.layers.is_some()),
        ("--private-layers", a.private_layers.is_some()),
        ("--context", a.context != CONTEXT),
        ("--plot", a.plot.is_some()),
    ];
    let given = given.iter().find(|(_, given)| *given).map(|(option, _)| *option);
    if let Some(option) = given.or(a.changes.given()) {
        return Err(Error::Config(format!(
            "{option} with --preset {name}: an adapter's shape is in its name, leave the option out"
        )));
    }
    let images = a.test.as_deref().map(adapter::images).transpose()?.unwrap_or(IMAGES);
    let row = adapter::run(name, shape, images, a.net.parse()?, &stopwatch())?;
    if !a.json {
        return super::say(&adapter::markdown(&row));
    }
    let json = serde_json::to_string_pretty(&[row]).map_err(|e| Error::Internal(format!("writing JSON: {e}")))?;
    super::say(&format!("{json}\n"))
}

fn shape(a: &Args, name: &str) -> Result<Subject> {
    let preset = Preset::find(name)?;
    if preset.encoder() && a.context != CONTEXT {
        return Err(Error::Config(format!(
            "--context with --preset {name}: an encoder has no cache, leave the option out"
        )));
    }
    let private_layers = a.private_layers.as_deref().unwrap_or("all");
    Ok(Subject::Shape(Shape {
        preset,
        layers: a.layers,
        private_layers: parse_private_layers(Some(private_layers), &preset.config(preset.layers(), 1))?,
        changes: a.changes.changes(),
    }))
}

fn model(a: &Args, dir: &Path) -> Result<Subject> {
    a.changes.refuse_beside_model()?;
    if Source::is_preparation(dir) {
        return Err(Error::Config(format!(
            "--model {}: a preparation has no weights to measure with, only shares of them; give the checkpoint that it was made of, or ask \
             `trefoil cost --model {}`",
            dir.display(),
            dir.display()
        )));
    }
    let private = super::private::Args { adapter: a.adapter.clone(), private_layers: a.private_layers.clone() };
    let Chosen { model, adapter, private_layers, .. } = private.chosen(dir)?;
    let (base, max_positions) = (a.base.clone(), a.plan_context);
    let options = preparation::Options { private_layers, max_positions, base, adapter, ..Default::default() };
    Ok(Subject::Model(Model { dir: model, options }))
}

/// Runs the command.
///
/// # Errors
/// Whatever the options or the model got wrong, or a party.
pub fn run(a: &Args) -> Result<()> {
    let subject = match (&a.preset, &a.model) {
        (Some(name), _) => match adapter::Shape::parse(name)? {
            Some(shape) => return run_adapter(a, name, shape),
            None => shape(a, name)?,
        },
        (None, Some(dir)) => model(a, dir)?,
        (None, None) => return Err(Error::Config("give --preset NAME or --model DIR".into())),
    };
    let usual = match &subject {
        Subject::Shape(s) if s.preset.encoder() => format!("pp{}", s.preset.positions()),
        _ => TESTS.into(),
    };
    let tests = Test::list(a.test.as_ref().unwrap_or(&usual))?;
    let options = Options { subject, tests, contexts: contexts(&a.context)?, net: a.net.parse()? };
    let plots = a.plot.as_deref().map(Plots::into_dir).transpose()?;
    let progress = stopwatch();
    let report = measure(&options, &progress)?;
    for path in plots.map(|p| p.write(&report)).transpose()?.unwrap_or_default() {
        progress(&format!("written: {}", path.display()));
    }
    if a.json {
        let json =
            serde_json::to_string_pretty(&report.rows).map_err(|e| Error::Internal(format!("writing JSON: {e}")))?;
        eprint!("{}", report.notes());
        super::say(&format!("{json}\n"))
    } else {
        super::say(&format!("{}\n{}", report.markdown(), report.notes()))
    }
}
