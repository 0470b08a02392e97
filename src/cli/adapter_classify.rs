//! `trefoil adapter classify`.

use std::path::PathBuf;
use std::time::Instant;

use serde::Serialize;
use serde_json::json;
use trefoil::bench::peak_memory;
use trefoil::cryptpeft::local::{Classified, Pace};
use trefoil::cryptpeft::{Features, LocalAdapter, Opened};
use trefoil::error::{Error, Result};
use trefoil::net::shape::Profile;
use trefoil::world::Setup;

use super::data::Backbone;

/// Options of `trefoil adapter classify`.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    public: super::data::Public,
    /// The adapter, which was trained on that model.
    #[arg(long, value_name = "DIR")]
    adapter: PathBuf,
    /// With --backbone: PNG or JPEG files.
    #[arg(value_name = "IMAGE")]
    images: Vec<PathBuf>,
    /// With --model: a text. Give the option once for each.
    #[arg(long, value_name = "TEXT")]
    text: Vec<String>,
    /// Open all logits to the client, which tell it more of the weights than the label does.
    #[arg(long)]
    logits: bool,
    /// Images (a directory) or texts (a .txt or .jsonl file, or a directory of .txt files) like those to come: fixed-point ranges
    /// are calibrated on some of them, instead of on synthetic ones.
    #[arg(long, value_name = "PATH")]
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
    #[serde(skip_serializing_if = "Option::is_none")]
    image: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    text: Option<String>,
    label: usize,
    name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    logits: Option<Vec<f32>>,
}

/// What it took, besides what [`Classified`] says.
struct Facts {
    net: Profile,
    threads: usize,
    calibrated_on: String,
    backbone_ms: f64,
    preparation_ms: f64,
}

impl Args {
    /// What is to be classified goes with the model.
    fn check(&self, backbone: &Backbone) -> Result<()> {
        let text = match (backbone, self.images.is_empty(), self.text.is_empty()) {
            (Backbone::Images(_), _, false) => {
                "--text goes with --model DIR, a language model; with --backbone give PNG or JPEG files"
            }
            (Backbone::Images(_), true, _) => "no images: give PNG or JPEG files",
            (Backbone::Texts(_), false, _) => {
                "images go with --backbone DIR, a vision transformer; with --model give --text \"..\""
            }
            (Backbone::Texts(_), _, true) => "no texts: give --text \"..\", once for each",
            _ => return Ok(()),
        };
        Err(Error::Config(text.into()))
    }

    /// What the adapters read, and how long the backbone took for each.
    fn features(&self, backbone: &Backbone, layers: &[usize]) -> Result<(Vec<Features>, f64)> {
        let each = |begun: Instant, n: usize| begun.elapsed().as_secs_f64() * 1e3 / n.max(1) as f64;
        match backbone {
            Backbone::Images(b) => {
                let pixels = self.images.iter().map(|path| b.1.file(path)).collect::<Result<Vec<_>>>()?;
                let begun = Instant::now();
                let features = pixels.iter().map(|p| b.0.features(p, layers)).collect::<Result<Vec<_>>>()?;
                Ok((features, each(begun, pixels.len())))
            }
            Backbone::Texts(b) => {
                let window = |(n, text): (usize, &String)| {
                    b.last_window(text).map_err(|e| Error::Config(format!("--text, number {}: {e}", n + 1)))
                };
                let windows = self.text.iter().enumerate().map(window).collect::<Result<Vec<_>>>()?;
                let begun = Instant::now();
                let features = windows.iter().map(|ids| b.features(ids, layers)).collect::<Result<Vec<_>>>()?;
                Ok((features, each(begun, windows.len())))
            }
        }
    }
}

/// Runs the command.
///
/// # Errors
/// Whatever options, images or texts, backbone or adapter got wrong, or a party.
pub fn run(a: &Args) -> Result<()> {
    let profile: Profile = a.net.parse()?;
    let (backbone, config, weights) = a.public.with_adapter(&a.adapter)?;
    a.check(&backbone)?;
    let noun = backbone.noun();
    let (inputs, backbone_ms) = a.features(&backbone, &config.layers)?;
    let (samples, calibrated_on) = backbone.samples(a.calibrate.as_deref(), &config.layers)?;
    let begun = Instant::now();
    let local = LocalAdapter::new(&config, &weights, &samples, Setup { profile, ..Setup::default() })?;
    let preparation_ms = begun.elapsed().as_secs_f64() * 1e3;
    let opened = if a.logits { Opened::Logits } else { Opened::Label };
    let done = local.classify(&inputs, opened, Pace::Cold).map_err(|e| match e {
        Error::Range { layer, quantity } => Error::Config(format!(
            "{layer}: {quantity} has left its calibrated range: one {noun} is unlike those that the ranges are from; give {noun}s like it with --calibrate PATH"
        )),
        other => other,
    })?;
    let answer = |(i, label): (usize, &usize)| Answer {
        image: a.images.get(i).cloned(),
        text: a.text.get(i).cloned(),
        label: *label,
        name: super::name(&config, *label),
        logits: done.logits.get(i).map(|l| l.to_vec()),
    };
    let answers: Vec<Answer> = done.labels.iter().enumerate().map(answer).collect();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let facts = Facts { net: profile, threads, calibrated_on, backbone_ms, preparation_ms };
    if a.json {
        let report = json!({
            format!("{noun}s"): answers, "net": profile.to_string(), "threads": threads,
            "calibrated_on": facts.calibrated_on, format!("backbone_ms_per_{noun}"): backbone_ms,
            "preparation_ms": preparation_ms, format!("ms_per_{noun}"): super::ms_each(&done),
            format!("messages_per_{noun}"): done.messages, "links": super::links(&done),
            "peak_memory_bytes": peak_memory(),
        });
        return crate::say(&format!("{report:#}\n"));
    }
    for answer in &answers {
        let image = answer.image.iter().map(|path| path.display().to_string());
        // One line each, whatever is in the text.
        let text = answer.text.iter().map(|text| text.escape_debug().to_string());
        crate::say(&format!("{}\t{}\n", image.chain(text).collect::<String>(), answer.name))?;
        for (n, logit) in answer.logits.iter().flatten().enumerate() {
            crate::say(&format!("\t{logit:.4}\t{}\n", super::name(&config, n)))?;
        }
    }
    summary(noun, &facts, &done);
    Ok(())
}

fn summary(noun: &str, f: &Facts, done: &Classified) {
    let mb = |b: u64| b as f64 / 1e6;
    eprintln!();
    eprintln!("network       {}; {} threads for all three parties", f.net, f.threads);
    eprintln!("calibrated    on {}", f.calibrated_on);
    eprintln!("preparation   {:.0} ms, once per adapter", f.preparation_ms);
    eprintln!("backbone      {:.1} ms per {noun} (client, plaintext)", f.backbone_ms);
    let (ms, count) = (super::ms_each(done), done.labels.len());
    eprintln!("adapter       {ms:.1} ms per {noun}, run-ahead included, {count} {noun}s");
    eprintln!("messages      {} in sequence per {noun}", done.messages);
    crate::show_links(&super::links(done));
    eprintln!("peak memory   {:.0} MB for all three parties", mb(peak_memory()));
}
