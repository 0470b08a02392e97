//! What a token will take over the links as measured.

use std::path::Path;
use std::time::Duration;

use serde::Serialize;

use super::super::config::{Config, Party};
use super::links::LinkFigures;
use crate::error::Result;
use crate::model::store::PublicManifest;
use crate::net::shape::Profile;
use crate::party::Role;
use crate::predict::{Rates, Source, predict as cost};

/// A request as many are.
const PROMPT: usize = 32;
const TOKENS: usize = 33;

/// A prediction of `trefoil cost` over the measured network.
#[derive(Clone, Debug, Serialize)]
pub struct Predicted {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens generated.
    pub new_tokens: usize,
    /// From the prompt to the first token, in milliseconds.
    pub prefill_ms: f64,
    /// Per further token, run-ahead already there.
    pub token_ready_ms: f64,
    /// Per further token, run-ahead counted.
    pub token_sustained_ms: f64,
    /// The network that this is for.
    pub network: String,
    /// What it leaves out.
    pub assumes: String,
}

/// The slowest of the links decides; the Client takes the one that it cannot see for such a one too.
pub(super) fn predict(
    config: &Config,
    manifest: Option<&PublicManifest>,
    links: &[LinkFigures],
) -> Result<Option<Predicted>> {
    let dir: &Path = match config.party() {
        Party::Owner { preparation, .. } => preparation,
        Party::Client { public, .. } => public,
        Party::Helper { .. } => return Ok(None),
    };
    let (Some(manifest), false) = (manifest, links.is_empty()) else { return Ok(None) };
    let rtt = links.iter().map(|l| l.rtt_ms).fold(0.0, f64::max);
    let slowest = links.iter().map(|l| l.to_peer_mbit_s.min(l.from_peer_mbit_s)).fold(f64::INFINITY, f64::min);
    let net = Profile { rtt: Duration::from_secs_f64(rtt / 1e3), bits_per_second: slowest * 1e6 };
    // Short contexts take what fits.
    let positions = manifest.plan.max_positions;
    let prompt = PROMPT.min(positions.div_ceil(2)).max(1);
    let tokens = TOKENS.min(positions + 1 - prompt).max(1);
    let p = cost(&Source::preparation(dir)?, prompt, tokens, net, Rates::measure()?)?;
    let assumes = match config.role() {
        Role::Client => {
            "peers with processors as this one; the link of owner and helper as the slowest from here: the doctor at the owner measures that link, which matters most"
        }
        _ => "peers with processors as this one, and clients as near as the helper is",
    };
    Ok(Some(Predicted {
        prompt_tokens: prompt,
        new_tokens: tokens,
        prefill_ms: p.prefill.sustained_ms,
        token_ready_ms: p.decode.ready_ms,
        token_sustained_ms: p.decode.sustained_ms,
        network: format!("{rtt:.2} ms round trip, {slowest:.0} Mbit/s"),
        assumes: assumes.into(),
    }))
}
