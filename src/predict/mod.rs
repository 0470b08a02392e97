//! What a request will cost, without running it.
//!
//! Bytes, messages and messages in sequence are exact: the model's own program is walked by all three parties and counted
//! ([`mod@walk`]). Times are the counted work at this machine's measured rates ([`Rates`]); memory is computed from the plan
//! ([`crate::plan::memory`]). See `docs/cost.md`.

mod choices;
mod rates;
pub mod recommend;
mod rehearsal;
mod source;
mod time;
pub mod walk;

use std::collections::BTreeMap;

use serde::Serialize;

pub use choices::Choice;
pub use rates::Rates;
pub use rehearsal::{Fit, Overheads};
pub use source::Source;
pub use time::{Phase, Seconds};

use crate::error::{Error, Result};
use crate::generate::LinkReport;
use crate::net::shape::Profile;
use crate::party::Role;
use crate::plan::memory::{self, ModelBytes, SessionBytes};
use walk::{Links, Walked, walk};

/// Traffic by directed link, by name.
pub type NamedLinks = BTreeMap<String, LinkReport>;

/// Peak memory of a party in a process of its own.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct PartyMemory {
    /// What it keeps of the model.
    #[serde(flatten)]
    pub model: ModelBytes,
    /// What the session takes.
    #[serde(flatten)]
    pub session: SessionBytes,
    /// Program, threads and allocator before there is a model.
    pub process: u64,
    /// All of it.
    pub peak: u64,
}

/// Program, threads, links and allocator of a party's process before there is a model, in bytes: measured over TLS, see
/// `tests/deployment/memory.rs`.
pub const PROCESS: u64 = 12 << 20;
/// The Client also encodes and decodes text.
const TEXT: u64 = 4 << 20;

/// A prediction.
#[derive(Clone, Debug, Serialize)]
pub struct Prediction {
    /// Tokens of the prompt.
    pub prefill_tokens: usize,
    /// Tokens generated; the first comes out of the prefill.
    pub new_tokens: usize,
    /// Private layers.
    pub private_layers: usize,
    /// Whether the embedding is private too.
    pub private_embedding: bool,
    /// Whether the final norm and the head are private.
    pub private_head: bool,
    /// Positions of the plan.
    pub context: usize,
    /// The network.
    pub net: String,
    /// Messages in sequence of a private layer.
    pub messages_per_private_layer: u32,
    /// Messages in sequence of the prefill, from the prompt to the first token.
    pub messages_prefill: u32,
    /// Messages in sequence of a decode pass.
    pub messages_per_token: u32,
    /// Traffic of the prefill.
    pub prefill_links: NamedLinks,
    /// Traffic of a decode pass in the mean, rounded.
    pub token_links: NamedLinks,
    /// Traffic of the whole request.
    pub request_links: NamedLinks,
    /// Time of the prefill.
    pub prefill: Phase,
    /// Time of a decode pass in the mean.
    pub decode: Phase,
    /// What the plan chose, and why.
    pub choices: Vec<Choice>,
    /// Measured rates of this machine behind the times.
    pub rates: Rates,
    /// Peak memory by party.
    pub memory: BTreeMap<String, PartyMemory>,
}

fn named(links: &Links, by: u64) -> NamedLinks {
    let mut out = NamedLinks::new();
    let per = |v: u64| (v + by / 2) / by;
    for from in Role::ALL {
        for to in Role::ALL.into_iter().filter(|&to| to != from) {
            let t = links[from.index()][to.index()];
            let link = LinkReport {
                online_bytes: per(t.online_bytes),
                ahead_bytes: per(t.ahead_bytes),
                messages: per(t.messages + t.ahead_messages),
            };
            out.insert(format!("{from}->{to}"), link);
        }
    }
    out
}

/// Predicts a request of `prefill` prompt tokens and `new_tokens` generated ones.
///
/// # Errors
/// [`Error::Config`] for a request of no tokens or beyond the context.
pub fn predict(s: &Source, prefill: usize, new_tokens: usize, net: Profile, rates: Rates) -> Result<Prediction> {
    if new_tokens == 0 {
        return Err(Error::Config("--decode 0: ask for at least one token".into()));
    }
    let passes = new_tokens - 1;
    let walked = walk(&s.config, &s.plan, prefill, passes)?;
    let decode = passes.max(1) as u64;
    let [first, later] = [&walked.prefill, &walked.decode].map(|stretch| time::phase(stretch, s, net, &rates));
    Ok(Prediction {
        prefill_tokens: prefill,
        new_tokens,
        private_layers: s.plan.layers.len(),
        private_embedding: s.plan.private_embedding,
        private_head: !s.plan.head.public,
        context: s.plan.max_positions,
        net: net.to_string(),
        messages_per_private_layer: walked.layer_messages.iter().copied().max().unwrap_or(0),
        messages_prefill: walked.prefill.depth,
        messages_per_token: walked.decode.depth / decode as u32,
        prefill_links: named(&walked.prefill.links, 1),
        token_links: named(&walked.decode.links, decode),
        request_links: named(&walked.total(), 1),
        prefill: first,
        decode: later,
        choices: choices::choices(s, net),
        rates,
        memory: Role::ALL.map(|r| (r.to_string(), party_memory(r, s, &walked, prefill, passes))).into(),
    })
}

/// Bytes of each peer's run-ahead that the Owner buffers in one process, and by default.
pub const RUN_AHEAD: u64 = 256 << 20;

fn party_memory(role: Role, s: &Source, walked: &Walked, prefill: usize, passes: usize) -> PartyMemory {
    let mut model = memory::model_bytes(role, &s.config, &s.plan);
    if role == Role::Owner {
        model.weights += s.owner_bytes - 2 * memory::owner_words(&s.config, &s.plan).min(s.owner_bytes / 2);
    }
    let mut session = memory::session_bytes(role, &s.config, &s.plan, prefill, passes, RUN_AHEAD);
    if role == Role::Owner {
        // The walk knows what is sent ahead.
        let per_pass = walk::bytes(&walked.decode.links, crate::net::Lane::Ahead) / passes.max(1) as u64;
        let ahead = walk::bytes(&walked.prefill.links, crate::net::Lane::Ahead);
        let waiting = passes.min(crate::generate::MAX_WAITING) as u64 * per_pass;
        // Some of it is used by the time that the rest has come: less on a machine with other work, where it is mostly the
        // Owner who waits for a core.
        session.run_ahead = (ahead.max(waiting) * 3 / 5).min(2 * RUN_AHEAD);
    }
    let process = PROCESS + if role == Role::Client { TEXT } else { 0 };
    let peak = model.weights + model.tables + session.total() + process;
    PartyMemory { model, session, process, peak }
}
