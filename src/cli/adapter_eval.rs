//! `trefoil adapter eval`.

use std::path::PathBuf;

use serde_json::json;
use trefoil::cryptpeft::eval::label;
use trefoil::cryptpeft::local::Pace;
use trefoil::cryptpeft::{Features, LocalAdapter, Opened, accuracy, logits};
use trefoil::error::{Error, Result};
use trefoil::net::shape::Profile;
use trefoil::world::Setup;

/// Options of `trefoil adapter eval`.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    public: super::data::Public,
    /// The adapter, which was trained on that model.
    #[arg(long, value_name = "DIR")]
    adapter: PathBuf,
    #[command(flatten)]
    data: super::data::Labelled,
    /// Run so many of the test images or texts with the three parties, in this process, and compare with float. Opens the logits to the
    /// client, for this check only. Ranges are calibrated on some of the part to learn from, or on --calibrate.
    #[arg(long, value_name = "N")]
    secure: Option<usize>,
    /// Images (a directory) or texts (a .txt or .jsonl file, or a directory of .txt files) to calibrate fixed-point ranges on.
    #[arg(long, value_name = "PATH")]
    calibrate: Option<PathBuf>,
    /// Simulated network: none, lan (0.1 ms, 16 Gbit/s), wan (20 ms, 0.4 Gbit/s), or RTT_MS,GBPS. Round-trip figures.
    #[arg(long, default_value = "none")]
    net: String,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// A distance of the two largest logits above which fixed point should change no label.
const CLEAR: f32 = 0.1;

/// Runs the command.
///
/// # Errors
/// Whatever options, data, backbone or adapter got wrong, or a party.
pub fn run(a: &Args) -> Result<()> {
    let profile: Profile = a.net.parse()?;
    if a.secure == Some(0) {
        return Err(Error::Config("--secure 0: give at least one to run".into()));
    }
    let (backbone, config, weights) = a.public.with_adapter(&a.adapter)?;
    let noun = backbone.noun();
    let set = backbone.load(&a.data, &config.labels, config.classes)?;
    if set.labels.len() > config.classes {
        return Err(Error::Config(format!(
            "the adapter tells {} classes apart, which have no names, but the {noun}s have {} labels, {:?}: give fewer",
            config.classes,
            set.labels.len(),
            set.labels
        )));
    }
    let test = backbone.features(&set.test, &config.layers)?;
    let right = accuracy(&config, &weights, &test);
    let mut text = format!("float         {:.1} % of {} test {noun}s get their label\n", 100.0 * right, test.len());
    let mut report = json!({ format!("test_{noun}s"): test.len(), "float_accuracy": right });
    if let Some(n) = a.secure {
        let (samples, from) = match &a.calibrate {
            Some(path) => backbone.samples(Some(path), &config.layers)?,
            None => {
                let features = backbone.features(&set.train.some(), &config.layers)?;
                let from = format!("{} {noun}s of the part to learn from", features.len());
                (features.into_iter().map(|(f, _)| f).collect(), from)
            }
        };
        // Spread over the labels, which a folder has one after the other.
        let every = (test.len() / n.min(test.len()).max(1)).max(1);
        let (inputs, wanted): (Vec<Features>, Vec<usize>) = test.into_iter().step_by(every).take(n).unzip();
        let setup = Setup { profile, ..Setup::default() };
        let local = LocalAdapter::new(&config, &weights, &samples, setup)?;
        let by_label = local.classify(&inputs, Opened::Label, Pace::Cold)?;
        let by_logits = local.classify(&inputs, Opened::Logits, Pace::Cold)?;
        let (mut error, mut same, mut clear, mut clear_same, mut hits) = (0f32, 0, 0, 0, 0);
        for (i, f) in inputs.iter().enumerate() {
            let want = logits(&config, &weights, f, &mut ());
            error = want.iter().zip(&by_logits.logits[i]).map(|(a, b)| (a - b).abs()).fold(error, f32::max);
            let (most, secure) = (label(&want), by_label.labels[i]);
            let others = want.iter().enumerate().filter(|(n, _)| *n != most).map(|(_, v)| *v);
            let is_clear = want[most] - others.fold(f32::NEG_INFINITY, f32::max) > CLEAR;
            (same, hits) = (same + usize::from(most == secure), hits + usize::from(secure == wanted[i]));
            (clear, clear_same) = (clear + usize::from(is_clear), clear_same + usize::from(is_clear && most == secure));
        }
        let count = inputs.len();
        let links = super::links(&by_label);
        let bytes =
            |ahead: bool| -> u64 { links.values().map(|l| if ahead { l.ahead_bytes } else { l.online_bytes }).sum() };
        let kb = |bytes: u64| bytes as f64 / 1e3 / count as f64;
        let ms = super::ms_each(&by_label);
        text += &format!("calibrated    on {from}\n");
        text += &format!("secure        {:.1} % of {count} of them\n", 100.0 * hits as f64 / count as f64);
        text += &format!(
            "same label    {same} of {count}; {clear_same} of the {clear} whose two largest logits are more than {CLEAR} apart\n"
        );
        text += &format!("logits        off by at most {error:.4} (opened to the client for this check only)\n");
        text += &format!("messages      {} in sequence per {noun}\n", by_label.messages);
        text += &format!(
            "traffic       {:.1} kB online, {:.1} kB run-ahead per {noun}\n",
            kb(bytes(false)),
            kb(bytes(true))
        );
        text += &format!(
            "time          {ms:.1} ms per {noun}, run-ahead included, network {profile}, all three parties here\n"
        );
        report["secure"] = json!({
            format!("{noun}s"): count, "accuracy": hits as f64 / count as f64, "same_label": same, "clear": clear,
            "clear_same_label": clear_same, "max_logit_error": error, format!("messages_per_{noun}"): by_label.messages,
            format!("ms_per_{noun}"): ms, "net": profile.to_string(), "links": links, "calibrated_on": from,
        });
    }
    if a.json {
        return crate::say(&format!("{report:#}\n"));
    }
    crate::say(&text)
}
