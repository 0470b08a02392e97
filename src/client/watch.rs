//! What is going on in a Client, for pages and metrics.

use std::collections::BTreeMap;
use std::time::Instant;

use serde::Serialize;

use super::session::{View, since};
use crate::generate::LinkReport;

/// Requests so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Totals {
    /// Begun.
    pub requests: u64,
    /// That failed.
    pub failed: u64,
    /// That their callers left.
    pub abandoned: u64,
    /// Tokens of prompts.
    pub prompt_tokens: u64,
    /// Tokens of answers.
    pub completion_tokens: u64,
}

/// The newest request that has begun.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Latest {
    /// Whether it still runs.
    pub running: bool,
    /// Tokens of its prompt.
    pub prompt_tokens: usize,
    /// Tokens of its answer so far.
    pub completion_tokens: usize,
    /// From the first message to the first token, once there is one.
    pub prefill_ms: Option<f64>,
    /// Mean time of a further token so far.
    pub decode_ms: Option<f64>,
    /// Its traffic.
    pub links: BTreeMap<String, LinkReport>,
    /// Its time.
    pub time: Time,
}

/// Where time went, on one thread: the Owner's, where all parties are in this process, and otherwise the Client's walk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Time {
    /// Computing.
    pub compute_ms: f64,
    /// Waiting for a peer.
    pub wait_ms: f64,
    /// Waiting for the simulated network.
    pub network_ms: f64,
}

/// What is going on, for pages and metrics.
#[derive(Clone, Debug, Serialize)]
pub struct State {
    /// Sessions: as many as may be, open now, busy now.
    pub sessions: [usize; 3],
    /// Requests: as many as may wait, waiting.
    pub queue: [usize; 2],
    /// Since the start.
    pub totals: Totals,
    /// Traffic since the start, by directed link; of a deployment, the Client's links.
    pub links: BTreeMap<String, LinkReport>,
    /// The newest request.
    pub latest: Option<Latest>,
}

/// The newest request, as it is kept.
pub(super) struct Newest {
    pub number: u64,
    pub caller: u64,
    /// None once its session has ended: what it counted is in the facts.
    pub view: Option<View>,
    /// Counters when it began.
    pub base: (BTreeMap<String, LinkReport>, [u64; 3]),
    pub begun: Instant,
    pub first: Option<Instant>,
    pub last: Instant,
    pub facts: Latest,
}

impl Newest {
    pub fn update(&mut self) {
        let Some(view) = &self.view else { return };
        self.facts.links = since(view.links(), &self.base.0);
        let now = view.time();
        let ms = |i: usize| now[i].saturating_sub(self.base.1[i]) as f64 / 1e6;
        self.facts.time = Time { compute_ms: ms(0), wait_ms: ms(1), network_ms: ms(2) };
        let n = self.facts.completion_tokens;
        self.facts.prefill_ms = self.first.map(|t| (t - self.begun).as_secs_f64() * 1e3);
        self.facts.decode_ms =
            self.first.filter(|_| n > 1).map(|first| (self.last - first).as_secs_f64() * 1e3 / (n - 1) as f64);
    }
}

#[derive(Default)]
pub(super) struct Watch {
    pub totals: Totals,
    /// Of sessions that have ended.
    pub links: BTreeMap<String, LinkReport>,
    pub open: BTreeMap<u64, View>,
    pub newest: Option<Newest>,
}

pub(super) fn add(to: &mut BTreeMap<String, LinkReport>, links: BTreeMap<String, LinkReport>) {
    for (name, link) in links {
        let t = to.entry(name).or_default();
        t.online_bytes += link.online_bytes;
        t.ahead_bytes += link.ahead_bytes;
        t.messages += link.messages;
    }
}
