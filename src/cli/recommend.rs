//! `trefoil recommend`: which techniques of MARILL pay for a model, a request and a network.

use std::path::PathBuf;

use trefoil::error::{Error, Result};
use trefoil::model::preparation::{Loaded, Options};
use trefoil::net::shape::Profile;
use trefoil::predict::Rates;
use trefoil::predict::recommend::{Advice, recommend};

/// Options of `trefoil recommend`.
#[derive(clap::Args)]
pub struct Args {
    /// A Hugging Face directory. It is calibrated as it is; nothing is trained.
    #[arg(long, default_value = "models/quill-4m")]
    model: PathBuf,
    /// Tokens of the prompt.
    #[arg(long, value_name = "N")]
    prefill: usize,
    /// Tokens to generate: the first comes out of the prefill.
    #[arg(long, value_name = "N")]
    decode: usize,
    /// Network: none, lan (0.1 ms, 16 Gbit/s), wan (20 ms, 0.4 Gbit/s), or RTT_MS,GBPS. Round-trip figures.
    #[arg(long, default_value = "lan")]
    net: String,
    /// Print a JSON array.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
///
/// # Errors
/// Whatever the options or the checkpoint got wrong.
pub fn run(a: &Args) -> Result<()> {
    let net: Profile = a.net.parse()?;
    if a.prefill == 0 || a.decode == 0 {
        return Err(Error::Config("--prefill and --decode: give at least one token each".into()));
    }
    let loaded = Loaded::open(&a.model, &Options::default())?;
    let advice = recommend(&loaded, a.prefill, a.decode, net, Rates::measure()?)?;
    if a.json {
        let json = serde_json::to_string_pretty(&advice).map_err(|e| Error::Internal(format!("writing JSON: {e}")))?;
        return super::say(&format!("{json}\n"));
    }
    super::say(&text(a, net, &advice))
}

fn text(a: &Args, net: Profile, advice: &[Advice]) -> String {
    let mut out = format!(
        "{}: {} prompt tokens, {} new, network {net}; estimates at this machine's rates, a machine for each party,\nrun-ahead counted. What a technique costs in quality, only training tells (docs/marill.md).\n\n",
        a.model.display(),
        a.prefill,
        a.decode
    );
    out += &format!(
        "{:<28}{:>12}{:>12}{:>12}{:>12}{:>10}{:>9}{:>8}\n",
        "technique", "prefill ms", "token ms", "prefill MB", "token MB", "messages", "faster", "bytes"
    );
    let mb = |b: u64| b as f64 / 1e6;
    for r in advice {
        match &r.impossible {
            Some(why) => out += &format!("{:<28}not for this model: {why}\n", r.technique),
            None => {
                out += &format!(
                    "{:<28}{:>12.1}{:>12.2}{:>12.2}{:>12.3}{:>10}{:>8.2}x{:>7.2}x{}\n",
                    r.technique,
                    r.prefill_ms,
                    r.token_ms,
                    mb(r.prefill_bytes),
                    mb(r.token_bytes),
                    r.token_messages,
                    r.times_faster,
                    r.times_fewer_bytes,
                    if r.pays { "  pays" } else { "" }
                );
            }
        }
    }
    out
}
