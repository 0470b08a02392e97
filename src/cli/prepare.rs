//! `trefoil prepare`: a checkpoint becomes a preparation for three hosts.

use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

use super::private::Chosen;
use serde::Serialize;
use trefoil::error::{Error, Result};
use trefoil::model::calibrate;
use trefoil::model::preparation::Options;
use trefoil::model::progress::Stage;
use trefoil::model::store::OwnerPreparation;
use trefoil::net::shape::Profile;
use trefoil::plan::Setting;

/// Options of `trefoil prepare`.
#[derive(clap::Args)]
pub struct Args {
    /// A Hugging Face directory: config.json, model.safetensors (or a sharded index), tokenizer.json.
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// The public base that the model was fine-tuned from: final norm and head are public where they are its own, bit
    /// for bit.
    #[arg(long, value_name = "DIR", conflicts_with = "adapter")]
    base: Option<PathBuf>,
    #[command(flatten)]
    private: super::private::Args,
    /// Limit on prompt and answer together, below the model's own (shorter is cheaper).
    #[arg(long, value_name = "TOKENS")]
    context: Option<usize>,
    /// Text like the prompts to come: fixed-point ranges are calibrated on it, instead of on a built-in text.
    #[arg(long, value_name = "FILE")]
    calibration_text: Option<PathBuf>,
    /// The network that the parties will be on: none, lan (0.1 ms, 16 Gbit/s), wan (20 ms, 0.4 Gbit/s), or RTT_MS,GBPS. On a slow one the plan takes fewer
    /// messages. Default: 1 ms, 1 Gbit/s.
    #[arg(long, value_name = "PROFILE")]
    net: Option<Profile>,
    /// Cores of each party: with more of them the plan takes more work for fewer messages.
    #[arg(long, value_name = "N", default_value_t = Setting::default().cores)]
    cores: usize,
    /// The directory to make. It must not exist: a changed model is a new preparation with a new seed.
    #[arg(long, value_name = "PREP")]
    out: PathBuf,
    /// Print one JSON object at the end.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    id: String,
    out: PathBuf,
    public: PathBuf,
    public_hash: String,
    public_layers: usize,
    private_layers: usize,
    private_embedding: bool,
    private_head: bool,
    context: usize,
    helper_bytes: u64,
    helper_chunks: u64,
    preparation_ms: f64,
}

/// Runs the command.
///
/// # Errors
/// Whatever is wrong with options or checkpoint.
pub fn run(a: &Args) -> Result<()> {
    let Chosen { model, adapter, private_layers, .. } = a.private.chosen(&a.model)?;
    let calibration_text = a.calibration_text.as_deref().map(calibrate::read_text).transpose()?;
    let (progress, bar) = super::progress::bar(!a.json);
    let (base, net, cores) = (a.base.clone(), a.net, Some(a.cores));
    let options =
        Options { private_layers, max_positions: a.context, base, adapter, calibration_text, net, cores, progress };
    let begun = Instant::now();
    if !a.json {
        eprintln!("preparing {} (calibration, fixed point, the helper's half) ...", a.model.display());
    }
    let made = OwnerPreparation::create(&model, &a.out, &options, &mut |done, total| {
        options.progress.tell(Stage::Shares, done, total);
    });
    bar.finish_and_clear();
    let made = made?;
    let (manifest, plan) = (made.manifest(), made.plan());
    let report = Report {
        id: manifest.id.to_string(),
        out: a.out.clone(),
        public: a.out.join("public"),
        public_hash: manifest.public_hash.to_string(),
        public_layers: plan.first_private,
        private_layers: plan.layers.len(),
        private_embedding: plan.private_embedding,
        private_head: !plan.head.public,
        context: plan.max_positions,
        helper_bytes: manifest.half.bytes,
        helper_chunks: manifest.half.chunks,
        preparation_ms: begun.elapsed().as_secs_f64() * 1e3,
    };
    let text = if a.json {
        let json = serde_json::to_string_pretty(&report).map_err(|e| Error::Internal(format!("writing JSON: {e}")))?;
        format!("{json}\n")
    } else {
        summary(&report)
    };
    match std::io::stdout().lock().write_all(text.as_bytes()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(Error::io("standard output", e)),
        _ => Ok(()),
    }
}

fn summary(r: &Report) -> String {
    let private = match (r.private_embedding, r.private_head) {
        (true, true) => ", the embedding and the head",
        (true, false) => " and the embedding",
        (false, true) => " and the head",
        (false, false) => "",
    };
    format!(
        "preparation   {}\n\
         layers        {} public, {} private{private}\n\
         context       {} tokens\n\
         helper's half {:.1} MB in {} chunks; the owner's daemon sends it\n\
         \n\
         {} holds the weights and the seed: keep it to yourself.\n\
         {} is for clients: hand it to each of them.\n",
        r.id,
        r.public_layers,
        r.private_layers,
        r.context,
        r.helper_bytes as f64 / 1e6,
        r.helper_chunks,
        r.out.display(),
        r.public.display()
    )
}
