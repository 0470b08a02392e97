//! `trefoil adapter classify`.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;

use serde::Serialize;
use trefoil::bench::peak_memory;
use trefoil::cryptpeft::local::Pace;
use trefoil::cryptpeft::{Features, LocalAdapter, Opened};
use trefoil::error::{Error, Result};
use trefoil::generate::LinkReport;
use trefoil::net::shape::Profile;
use trefoil::world::Setup;

/// Options of `trefoil adapter classify`.
#[derive(clap::Args)]
pub struct Args {
    /// The public vision transformer that the adapter was trained on.
    #[arg(long, value_name = "DIR")]
    backbone: PathBuf,
    /// The adapter.
    #[arg(long, value_name = "DIR")]
    adapter: PathBuf,
    /// PNG or JPEG files.
    #[arg(required = true, value_name = "IMAGE")]
    images: Vec<PathBuf>,
    /// Open all logits to the client, which tell it more of the weights than the label does.
    #[arg(long)]
    logits: bool,
    /// Images like those to come: fixed-point ranges are calibrated on some of them, instead of on synthetic ones.
    #[arg(long, value_name = "DIR")]
    calibrate: Option<PathBuf>,
    /// Simulated network: none, lan (0.1 ms, 16 Gbit/s), wan (20 ms, 0.4 Gbit/s), or RTT_MS,GBPS. Round-trip figures.
    #[arg(long, default_value = "none")]
    net: String,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Answer {
    image: PathBuf,
    label: usize,
    name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    logits: Option<Vec<f32>>,
}

#[derive(Serialize)]
struct Report {
    images: Vec<Answer>,
    net: String,
    threads: usize,
    calibrated_on: String,
    backbone_ms_per_image: f64,
    preparation_ms: f64,
    ms_per_image: f64,
    messages_per_image: u32,
    links: BTreeMap<String, LinkReport>,
    peak_memory_bytes: u64,
}

/// Runs the command.
///
/// # Errors
/// Whatever options, images, backbone or adapter got wrong, or a party.
pub fn run(a: &Args) -> Result<()> {
    let profile: Profile = a.net.parse()?;
    let (vit, preprocess) = super::backbone(&a.backbone)?;
    let (config, weights) = super::adapter(&a.adapter, &vit)?;
    let pixels = a.images.iter().map(|path| preprocess.file(path)).collect::<Result<Vec<_>>>()?;
    let begun = Instant::now();
    let inputs = pixels.iter().map(|p| vit.features(p, &config.layers)).collect::<Result<Vec<Features>>>()?;
    let backbone_ms = begun.elapsed().as_secs_f64() * 1e3 / inputs.len().max(1) as f64;
    let (samples, calibrated_on) = super::samples(a.calibrate.as_deref(), &vit, &preprocess, &config)?;
    let begun = Instant::now();
    let local = LocalAdapter::new(&config, &weights, &samples, Setup { profile, ..Setup::default() })?;
    let preparation_ms = begun.elapsed().as_secs_f64() * 1e3;
    let opened = if a.logits { Opened::Logits } else { Opened::Label };
    let done = local.classify(&inputs, opened, Pace::Cold).map_err(|e| match e {
        Error::Range { layer, quantity } => Error::Config(format!(
            "{layer}: {quantity} has left its calibrated range: an image is unlike those that the ranges are from; give images like it with --calibrate DIR"
        )),
        other => other,
    })?;
    let answer = |(i, image): (usize, &PathBuf)| Answer {
        image: image.clone(),
        label: done.labels[i],
        name: super::name(&config, done.labels[i]),
        logits: done.logits.get(i).map(|l| l.to_vec()),
    };
    let report = Report {
        images: a.images.iter().enumerate().map(answer).collect(),
        net: profile.to_string(),
        threads: std::thread::available_parallelism().map_or(1, usize::from),
        calibrated_on,
        backbone_ms_per_image: backbone_ms,
        preparation_ms,
        ms_per_image: super::ms_per_image(&done),
        messages_per_image: done.messages,
        links: super::links(&done),
        peak_memory_bytes: peak_memory(),
    };
    if a.json {
        let json = serde_json::to_string_pretty(&report).map_err(|e| Error::Internal(format!("writing JSON: {e}")))?;
        return crate::say(&format!("{json}\n"));
    }
    for answer in &report.images {
        crate::say(&format!("{}\t{}\n", answer.image.display(), answer.name))?;
        for (n, logit) in answer.logits.iter().flatten().enumerate() {
            crate::say(&format!("\t{logit:.4}\t{}\n", super::name(&config, n)))?;
        }
    }
    summary(&report);
    Ok(())
}

fn summary(r: &Report) {
    let mb = |b: u64| b as f64 / 1e6;
    eprintln!();
    eprintln!("network       {}; {} threads for all three parties", r.net, r.threads);
    eprintln!("calibrated    on {}", r.calibrated_on);
    eprintln!("preparation   {:.0} ms, once per adapter", r.preparation_ms);
    eprintln!("backbone      {:.1} ms per image (client, plaintext)", r.backbone_ms_per_image);
    eprintln!("adapter       {:.1} ms per image, run-ahead included, {} images", r.ms_per_image, r.images.len());
    eprintln!("messages      {} in sequence per image", r.messages_per_image);
    crate::show_links(&r.links);
    eprintln!("peak memory   {:.0} MB for all three parties", mb(r.peak_memory_bytes));
}
