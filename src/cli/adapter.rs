//! `trefoil adapter`: private adapters over a public vision transformer or language model, trained, measured and used.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use clap::Subcommand;
use trefoil::cryptpeft::local::Classified;
use trefoil::cryptpeft::{AdapterConfig, Dataset, Preprocess, Vit};
use trefoil::error::{Error, Result};
use trefoil::generate::LinkReport;
use trefoil::party::Role;

#[path = "adapter_classify.rs"]
mod classify;
#[path = "adapter_data.rs"]
mod data;
#[path = "adapter_eval.rs"]
mod eval;
#[path = "adapter_search.rs"]
mod search;
#[path = "adapter_study.rs"]
mod study;
#[path = "adapter_train.rs"]
mod train;

/// Options of `trefoil adapter`.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Train adapters and a head for labelled images or texts. The backbone is frozen: it is run once over each. Needs a build
    /// with --features train.
    Train(Box<train::Args>),
    /// Measure an adapter on labelled images or texts that it was not trained on: in float, and secure beside it.
    Eval(Box<eval::Args>),
    /// Say what images show or what texts are, with owner, client and helper in this process. Only the label is opened, and only to
    /// the client.
    Classify(classify::Args),
    /// Find which heads, rank and number of adapters to train for labelled images: a controller trains some and learns from their accuracy and
    /// latency which to try next. Needs a build with --features train.
    Search(Box<search::Args>),
    /// Compare one-way adapters with what gives back to the backbone (two-way adapters, AdaptFormer, LoRA), and the layers they sit on:
    /// accuracy in float. Needs a build with --features train.
    Study(Box<study::Args>),
}

/// Runs the command.
///
/// # Errors
/// Whatever options, images, backbone or adapter got wrong, or a party.
pub fn run(a: &Args) -> Result<()> {
    match &a.command {
        Command::Train(args) => train::run(args),
        Command::Eval(args) => eval::run(args),
        Command::Classify(args) => classify::run(args),
        Command::Search(args) => search::run(args),
        Command::Study(args) => study::run(args),
    }
}

/// Which fifth of the images or texts of a label is the test part: one for all commands, so that none measures on what another learned.
const SPLIT: u64 = 0;
/// How many images or texts ranges are calibrated on.
const CALIBRATION: usize = 32;

/// What every training takes.
#[derive(clap::Args)]
#[cfg_attr(not(feature = "train"), allow(dead_code))]
struct Training {
    /// Heads of an adapter's attention, which divide the rank.
    #[arg(long, value_name = "N", default_value_t = 4)]
    heads: usize,
    /// Width of an adapter.
    #[arg(long, value_name = "N", default_value_t = 32)]
    rank: usize,
    /// Images or texts in a step.
    #[arg(long, value_name = "N", default_value_t = 32)]
    batch: usize,
    /// Threads to compute with; the same number makes the same bits. Default: RAYON_NUM_THREADS, or as many as the machine runs
    /// at once.
    #[arg(long)]
    threads: Option<usize>,
}

/// Labelled images.
#[derive(clap::Args)]
struct Data {
    /// Labelled images: a directory with one folder of PNG or JPEG files per label. A fifth of each is for the test.
    #[arg(long, value_name = "DIR", conflicts_with = "synthetic")]
    images: Option<PathBuf>,
    /// Images of shapes instead, made from this seed.
    #[arg(long, value_name = "SEED")]
    synthetic: Option<u64>,
    /// With --synthetic: how many shapes, 2 to 8.
    #[arg(long, value_name = "N", default_value_t = 8)]
    classes: usize,
    /// With --synthetic or --synthetic-text: how many of each label. A fifth is for the test.
    #[arg(long, value_name = "N", default_value_t = 200)]
    per_class: usize,
}

impl Data {
    fn load(&self, vit: &Vit, preprocess: &Preprocess) -> Result<Dataset> {
        match (&self.images, self.synthetic) {
            (Some(dir), _) => Dataset::folder(dir, preprocess, SPLIT),
            (None, Some(seed)) => {
                let set = Dataset::synthetic(vit.config().image, self.classes, self.per_class, seed)?;
                Ok(set.normalised(preprocess))
            }
            (None, None) => Err(Error::Config(
                "no images: give --images DIR, one folder of them per label, or --synthetic SEED".into(),
            )),
        }
    }
}

/// A backbone, and how images are made ready for it.
fn backbone(dir: &Path) -> Result<(Vit, Preprocess)> {
    let vit = Vit::open(dir)?;
    let preprocess = Preprocess::open(dir, vit.config())?;
    Ok((vit, preprocess))
}

/// A label by its name, or by its number where the adapter has no names.
fn name(config: &AdapterConfig, label: usize) -> String {
    config.labels.get(label).cloned().unwrap_or_else(|| format!("class {label}"))
}

fn links(c: &Classified) -> BTreeMap<String, LinkReport> {
    let mut out = BTreeMap::new();
    for from in Role::ALL {
        for to in Role::ALL.into_iter().filter(|&to| to != from) {
            let t = c.sent[from.index()][to.index()];
            let (online_bytes, ahead_bytes, messages) = (t.online_bytes, t.ahead_bytes, t.messages + t.ahead_messages);
            out.insert(format!("{from}->{to}"), LinkReport { online_bytes, ahead_bytes, messages });
        }
    }
    out
}

fn ms_each(c: &Classified) -> f64 {
    c.wall.as_secs_f64() * 1e3 / c.labels.len().max(1) as f64
}
