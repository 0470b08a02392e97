//! The sessions behind a [`super::Client`]: each on a thread of its own, opened when a request needs it and again after a failure.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use crate::deploy::client::{Received, Remote};
use crate::deploy::party::Options;
use crate::error::{Error, Result};
use crate::generate::{Generation, LinkReport, Local, LocalOptions};
use crate::ledger::{Doing, Kind};
use crate::net::meter::Meter;
use crate::net::{Lane, Links};
use crate::party::Role;

/// Where sessions come from.
#[derive(Clone)]
pub(super) enum Source {
    /// A deployment's Client, by its configuration.
    Deployment(PathBuf),
    /// All three parties in this process, with the model in this directory.
    Local(PathBuf, Box<LocalOptions>),
}

/// A session that is open.
pub(super) enum Open {
    Deployment(Box<Remote>),
    Local(Box<Local>),
}

impl Source {
    /// Opens one.
    pub fn open(&self) -> Result<Open> {
        match self {
            Source::Deployment(path) => Remote::open(path, Options::default()).map(|r| Open::Deployment(Box::new(r))),
            Source::Local(dir, options) => Local::open(dir, (**options).clone()).map(|l| Open::Local(Box::new(l))),
        }
    }
}

impl Open {
    pub fn generate(
        &mut self,
        prompt: &[u32],
        max_new: usize,
        (temperature, seed): (f64, u64),
        on_token: &mut dyn FnMut(u32) -> bool,
    ) -> Result<Generation> {
        match self {
            Open::Deployment(remote) => remote.generate(prompt, max_new, temperature, seed, on_token),
            Open::Local(local) => local.generate(prompt, max_new, temperature, seed, false, on_token),
        }
    }

    /// What can be seen of it while it works.
    pub fn view(&self) -> View {
        match self {
            Open::Deployment(remote) => {
                let received = remote.received();
                let links = Some(remote.links());
                View {
                    meters: vec![(Role::Client, remote.meter())],
                    base: BTreeMap::new(),
                    received: Some(received),
                    links,
                }
            }
            Open::Local(local) => {
                let meters = Role::ALL.map(|role| (role, Arc::clone(local.world().meter(role))));
                let mut view = View { meters: meters.to_vec(), base: BTreeMap::new(), received: None, links: None };
                // Preparing the model is not a request's.
                view.base = view.links();
                view
            }
        }
    }

    /// Ends it in order.
    pub fn finish(self) -> Result<()> {
        match self {
            Open::Deployment(remote) => remote.finish().map(|_| ()),
            Open::Local(local) => local.finish().map(|_| ()),
        }
    }

    /// After a failure: the cause, of which `error` may be a consequence.
    pub fn cause(self, error: Error) -> Error {
        match self {
            Open::Deployment(_) => error,
            Open::Local(local) => local.root_cause(error),
        }
    }
}

/// Counters and samples of a session.
#[derive(Clone)]
pub(super) struct View {
    meters: Vec<(Role, Arc<Meter>)>,
    base: BTreeMap<String, LinkReport>,
    /// Of a Client alone, which has no meter of its peers.
    received: Option<Received>,
    links: Option<Links>,
}

/// Bytes of a link, as they went over it.
pub(super) type Samples = BTreeMap<String, Vec<u8>>;

impl View {
    /// Whether a link has ended.
    pub fn broken(&self) -> bool {
        self.links.as_ref().is_some_and(Links::broken)
    }

    /// Traffic since it was opened, by directed link; of a deployment those of the Client.
    pub fn links(&self) -> BTreeMap<String, LinkReport> {
        let mut out = BTreeMap::new();
        for (from, meter) in &self.meters {
            for to in Role::ALL.into_iter().filter(|to| to != from) {
                let t = meter.sent(to);
                let messages = t.messages + t.ahead_messages;
                let all = LinkReport { online_bytes: t.online_bytes, ahead_bytes: t.ahead_bytes, messages };
                out.insert(format!("{from}->{to}"), all);
            }
        }
        for (from, [online_bytes, ahead_bytes], messages) in self.received.iter().flat_map(|r| r()) {
            out.insert(format!("{from}->client"), LinkReport { online_bytes, ahead_bytes, messages });
        }
        since(out, &self.base)
    }

    /// Nanoseconds on the critical path, at the Owner where it is here: computing, waiting for peers, on the simulated network.
    pub fn time(&self) -> [u64; 3] {
        let Some((_, meter)) = self.meters.first() else { return [0; 3] };
        let spent = meter.ledger().spent();
        let sum = |doing| Kind::ALL.iter().map(|&k| spent.time(k, Lane::Online, doing)).sum::<u64>();
        [sum(Doing::Compute) + sum(Doing::Streams), sum(Doing::Wait), sum(Doing::Network)]
    }

    /// Forgets them: sessions serve one caller after another, and a sample is for the caller whose message it was.
    pub fn forget_samples(&self) {
        self.meters.iter().for_each(|(_, meter)| meter.forget_samples());
    }

    /// The beginning of a message on each link.
    pub fn samples(&self) -> Samples {
        let mut out = Samples::new();
        for (from, meter) in &self.meters {
            for to in Role::ALL.into_iter().filter(|to| to != from) {
                let [sent, received] = meter.samples(to);
                out.insert(format!("{from}->{to}"), sent);
                if self.received.is_some() {
                    out.insert(format!("{to}->{from}"), received);
                }
            }
        }
        out
    }
}

/// What came after `earlier`.
pub(super) fn since(
    mut links: BTreeMap<String, LinkReport>,
    earlier: &BTreeMap<String, LinkReport>,
) -> BTreeMap<String, LinkReport> {
    for (name, link) in &mut links {
        let e = earlier.get(name).copied().unwrap_or_default();
        link.online_bytes -= e.online_bytes;
        link.ahead_bytes -= e.ahead_bytes;
        link.messages -= e.messages;
    }
    links
}
