//! `trefoil bench`: what a shape takes, measured.

use std::path::PathBuf;

use trefoil::bench::{Options, Plots, Preset, Test, adapter, contexts, run as measure, stopwatch};
use trefoil::error::{Error, Result};
use trefoil::model::preparation::parse_private_layers;
use trefoil::model::variant::Reshaping;
use trefoil::model::{Activation, Softmax};

const TESTS: &str = "pp128,tg64";

/// Options of `trefoil bench`.
#[derive(clap::Args)]
pub struct Args {
    /// h768 and h2048 (a layer by itself), deep-256, tinyllama-1.1b, deepseek-coder-1.3b, openllama-3b, llama-2-7b;
    /// cryptpeft-hH-rR (or -sS): a private adapter of H heads and rank R over the last (S) layers of ViT-B/16, one row per image.
    #[arg(long, value_name = "NAME")]
    preset: String,
    /// ppN: prefill of N tokens; tgN: N tokens decoded, from cold. A list. Of an adapter: imgN, N images from cold.
    #[arg(long, default_value = TESTS, value_name = "LIST")]
    test: String,
    /// Cached positions before the decode tokens. A list: every decode test is run at each.
    #[arg(long, default_value = "0", value_name = "LIST")]
    context: String,
    /// Private layers that are run; times of all are extrapolated, and labelled so. Default: all.
    #[arg(long, value_name = "N")]
    layers: Option<usize>,
    /// How many layers, from the top, are private: a number, or 'all', which includes the embedding.
    #[arg(long, default_value = "all", value_name = "N|all")]
    private_layers: String,
    /// Heads that become one in the private layers, for less softmax.
    #[arg(long, default_value_t = 1, value_name = "M")]
    merge_heads: usize,
    /// How attention weighs: exact, or 2relu.
    #[arg(long, default_value = "exact", value_name = "KIND")]
    softmax: Softmax,
    /// The MLP's activation: silu, relu or quad. Default: the preset's own, which is silu.
    #[arg(long, value_name = "NAME")]
    activation: Option<Activation>,
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

fn run_adapter(a: &Args, shape: adapter::Shape) -> Result<()> {
    let images = if a.test == TESTS { 16 } else { adapter::images(&a.test)? };
    let row = adapter::run(&a.preset, shape, images, a.net.parse()?, &stopwatch())?;
    if !a.json {
        return super::say(&adapter::markdown(&row));
    }
    let json = serde_json::to_string_pretty(&[row]).map_err(|e| Error::Internal(format!("writing JSON: {e}")))?;
    super::say(&format!("{json}\n"))
}

/// Runs the command.
///
/// # Errors
/// Whatever the options got wrong, or a party.
pub fn run(a: &Args) -> Result<()> {
    if let Some(shape) = adapter::Shape::parse(&a.preset)? {
        return run_adapter(a, shape);
    }
    let preset = Preset::find(&a.preset)?;
    let options = Options {
        preset,
        tests: Test::list(&a.test)?,
        contexts: contexts(&a.context)?,
        layers: a.layers,
        private_layers: parse_private_layers(Some(&a.private_layers), &preset.config(preset.layers(), 1))?,
        reshaping: Reshaping { merged: a.merge_heads, softmax: a.softmax, activation: a.activation },
        net: a.net.parse()?,
    };
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
