//! `trefoil adapter search`: which heads, rank and number of adapters to train, by trained accuracy and measured latency.

use std::path::PathBuf;

#[cfg(feature = "train")]
pub use search::run;

/// Options of `trefoil adapter search`.
#[derive(clap::Args)]
pub struct Args {
    /// The public vision transformer, a Hugging Face directory.
    #[arg(long, value_name = "DIR")]
    backbone: PathBuf,
    /// Labelled images: a directory with one folder of PNG or JPEG files per label.
    #[arg(long, value_name = "DIR", conflicts_with = "synthetic", required_unless_present = "synthetic")]
    images: Option<PathBuf>,
    /// Images made from this seed in place of files.
    #[arg(long, value_name = "SEED")]
    synthetic: Option<u64>,
    /// Labels of synthetic images.
    #[arg(long, default_value_t = 8)]
    classes: usize,
    /// Synthetic images per label; a fifth of them is held out.
    #[arg(long, default_value_t = 60)]
    per_class: usize,
    /// Heads to choose from.
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "1,2,4")]
    heads: Vec<usize>,
    /// Ranks to choose from; those that no head count divides are left out.
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "16,32,64")]
    ranks: Vec<usize>,
    /// Numbers of adapters to choose from: of the last layers of the backbone.
    #[arg(long, value_name = "N,..", value_delimiter = ',', default_value = "1,2")]
    layers: Vec<usize>,
    /// What to look for: utility (the highest accuracy, then the lowest latency), or efficiency[:FLOOR] (the lowest latency with an
    /// accuracy of at least FLOOR, 0 to 1). Without FLOOR: a hundredth below that of the largest adapters, which are trained first.
    #[arg(long, default_value = "utility", value_name = "utility|efficiency[:FLOOR]")]
    target: String,
    /// Points to train at most. More of them can be given to go on.
    #[arg(long, default_value_t = 12)]
    budget: usize,
    /// Training steps of each point.
    #[arg(long, default_value_t = 200)]
    steps: usize,
    /// Examples in a step.
    #[arg(long, default_value_t = 16)]
    batch_size: usize,
    /// Learning rate.
    #[arg(long, default_value_t = 1e-3)]
    lr: f64,
    /// Of what is drawn, and of the training.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Network of the latency: none, lan (0.1 ms, 16 Gbit/s), wan (20 ms, 0.4 Gbit/s), or RTT_MS,GBPS.
    #[arg(long, default_value = "lan")]
    net: String,
    /// Inferences per measured point; the median counts.
    #[arg(long, default_value_t = 3)]
    repeats: usize,
    /// Where history.jsonl, latency.json and search.svg are written. The same command goes on there where it was interrupted.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Threads to compute with; the same number makes the same bits. Default: RAYON_NUM_THREADS, or as many as the machine runs
    /// at once.
    #[arg(long)]
    threads: Option<usize>,
}
