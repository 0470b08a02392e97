//! `trefoil adapter`: private adapters over a public vision transformer, trained, measured and used.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use clap::Subcommand;
use trefoil::cryptpeft::local::Classified;
use trefoil::cryptpeft::{AdapterConfig, AdapterWeights, Dataset, Features, Preprocess, Vit, synthetic};
use trefoil::error::{Error, Result};
use trefoil::generate::LinkReport;
use trefoil::party::Role;

#[path = "adapter_classify.rs"]
mod classify;
#[path = "adapter_eval.rs"]
mod eval;
#[path = "adapter_search.rs"]
mod search;
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
    /// Train adapters and a head for labelled images. The backbone is frozen: it is run once over every image. Needs a build with
    /// --features train.
    Train(Box<train::Args>),
    /// Measure an adapter on labelled images that it was not trained on: in float, and secure beside it.
    Eval(eval::Args),
    /// Say what images show, with owner, client and helper in this process. Only the label is opened, and only to the client.
    Classify(classify::Args),
    /// Find which heads, rank and number of adapters to train: a controller trains some and learns from their accuracy and
    /// latency which to try next. Needs a build with --features train.
    Search(Box<search::Args>),
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
    }
}

/// Which fifth of a folder's images is the test part: one for all commands, so that none measures on what another learned.
const SPLIT: u64 = 0;
/// How many images ranges are calibrated on.
const CALIBRATION: usize = 32;

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
    /// With --synthetic: images of each. A fifth is for the test.
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

/// An adapter of this backbone.
fn adapter(dir: &Path, vit: &Vit) -> Result<(AdapterConfig, AdapterWeights)> {
    let (config, weights) = AdapterWeights::open(dir, Some(vit.tokens()))?;
    config.check_backbone(vit.config())?;
    Ok((config, weights))
}

/// What ranges are calibrated on: images of `dir` and the folders in it, or synthetic ones; and where they are from, in words.
fn samples(
    dir: Option<&Path>,
    vit: &Vit,
    preprocess: &Preprocess,
    config: &AdapterConfig,
) -> Result<(Vec<Features>, String)> {
    let (pixels, from) = match dir {
        Some(dir) => {
            let mut files = synthetic::images(dir)?;
            let listed = std::fs::read_dir(dir).map_err(|e| Error::io(dir.display().to_string(), e))?;
            let mut folders: Vec<PathBuf> = listed.flatten().map(|e| e.path()).filter(|p| p.is_dir()).collect();
            folders.sort();
            for folder in folders {
                files.extend(synthetic::images(&folder)?);
            }
            if files.is_empty() {
                let text = "has no PNG or JPEG files; give a directory of images like those to come";
                return Err(Error::Config(format!("--calibrate {}: {text}", dir.display())));
            }
            let every = files.len().div_ceil(CALIBRATION);
            let files: Vec<&PathBuf> = files.iter().step_by(every).collect();
            let pixels = files.iter().map(|file| preprocess.file(file)).collect::<Result<Vec<_>>>()?;
            (pixels, format!("{} images of {}", files.len(), dir.display()))
        }
        None => {
            let labels = synthetic::SHAPES.len();
            // A fifth of them is for a test that there is not.
            let set = Dataset::synthetic(vit.config().image, labels, CALIBRATION.div_ceil(labels) + 1, SPLIT)?;
            let set = set.normalised(preprocess);
            let pixels: Vec<_> = set.train.into_iter().take(CALIBRATION).map(|e| e.pixels).collect();
            let text = format!("{} synthetic images; --calibrate DIR takes images like those to come", pixels.len());
            (pixels, text)
        }
    };
    let features = pixels.iter().map(|p| vit.features(p, &config.layers)).collect::<Result<_>>()?;
    Ok((features, from))
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

fn ms_per_image(c: &Classified) -> f64 {
    c.wall.as_secs_f64() * 1e3 / c.labels.len().max(1) as f64
}
