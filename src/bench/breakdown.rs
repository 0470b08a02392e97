//! What a token takes by kind of operation, out of the parties' ledgers.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::ledger::{Doing, KINDS, Kind, Spent};
use crate::net::Lane;
use crate::party::Role;

/// What a party spends on a kind of operation, per token. Online is the Owner's walk and what the others answer to it;
/// "ahead" is the run-ahead walk of Client and Helper.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Operation {
    /// Computing online.
    pub compute_ms: f64,
    /// Of that, drawing from AES streams.
    pub streams_ms: f64,
    /// Waiting for a peer's message, in which the peer computes, or waits itself.
    pub wait_ms: f64,
    /// Waiting for the simulated network to deliver a message.
    pub network_ms: f64,
    /// Computing ahead.
    pub ahead_compute_ms: f64,
    /// Of that, drawing from AES streams.
    pub ahead_streams_ms: f64,
    /// Waiting ahead: for room in the Owner's buffer.
    pub ahead_wait_ms: f64,
    /// Sent online.
    pub online_bytes: u64,
    /// Sent ahead.
    pub ahead_bytes: u64,
}

impl Operation {
    /// All computing.
    #[must_use]
    pub fn computing(&self) -> f64 {
        self.compute_ms + self.ahead_compute_ms
    }

    /// All drawing.
    #[must_use]
    pub fn streams(&self) -> f64 {
        self.streams_ms + self.ahead_streams_ms
    }
}

/// What a kind of operation takes of a token whose run-ahead is there, by the Owner's clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Step {
    /// The Owner computes.
    pub compute_ms: f64,
    /// The Owner waits while another party computes.
    pub wait_ms: f64,
    /// A message is on its way over the simulated network.
    pub network_ms: f64,
}

/// By party, then by kind.
pub type ByOperation = BTreeMap<String, BTreeMap<&'static str, Operation>>;
/// By kind.
pub type Steps = BTreeMap<&'static str, Step>;

/// Milliseconds per token by party, kind, lane and doing, as in [`Spent`].
#[derive(Clone, Copy, Debug)]
pub(super) struct Times([[[[f64; 4]; 2]; KINDS]; 3]);

impl Times {
    pub(super) fn of(spent: &[Spent; 3], tokens: usize) -> Times {
        let ms = |ns: u64| ns as f64 / 1e6 / tokens as f64;
        Times(spent.map(|s| s.ns.map(|kind| kind.map(|lane| lane.map(ms)))))
    }

    /// Adds `by` times the other.
    pub(super) fn add(mut self, by: f64, other: &Times) -> Times {
        let all = |t: &[[[[f64; 4]; 2]; KINDS]; 3]| t.as_flattened().as_flattened().as_flattened().to_vec();
        let own = self.0.as_flattened_mut().as_flattened_mut().as_flattened_mut();
        own.iter_mut().zip(all(&other.0)).for_each(|(a, b)| *a += by * b);
        self
    }

    fn at(&self, role: Role, kind: Kind, lane: Lane, doing: Doing) -> f64 {
        self.0[role.index()][kind as usize][usize::from(lane == Lane::Ahead)][doing as usize]
    }

    fn computing(&self, role: Role, kind: Kind, lane: Lane) -> f64 {
        self.at(role, kind, lane, Doing::Compute) + self.at(role, kind, lane, Doing::Streams)
    }

    /// With what `bytes` says of a party, kind and lane.
    pub(super) fn by_operation(&self, bytes: &dyn Fn(Role, Kind, Lane) -> u64) -> ByOperation {
        let (online, ahead) = (Lane::Online, Lane::Ahead);
        let operation = |role, kind| Operation {
            compute_ms: self.computing(role, kind, online),
            streams_ms: self.at(role, kind, online, Doing::Streams),
            wait_ms: self.at(role, kind, online, Doing::Wait),
            network_ms: self.at(role, kind, online, Doing::Network),
            ahead_compute_ms: self.computing(role, kind, ahead),
            ahead_streams_ms: self.at(role, kind, ahead, Doing::Streams),
            ahead_wait_ms: self.at(role, kind, ahead, Doing::Wait),
            online_bytes: bytes(role, kind, online),
            ahead_bytes: bytes(role, kind, ahead),
        };
        let of = |role: Role| {
            let all = Kind::ALL.map(|kind| (kind.name(), operation(role, kind)));
            let some = all.into_iter().filter(|(_, o)| *o != Operation::default());
            (role.to_string(), some.collect())
        };
        Role::ALL.map(of).into()
    }

    /// The Owner's clock. While it waits, a message may be on its way to a peer: that is the network's time, too.
    pub(super) fn steps(&self) -> Steps {
        let step = |kind| {
            let online = |role, doing| self.at(role, kind, Lane::Online, doing);
            let waited = online(Role::Owner, Doing::Wait);
            let peers = online(Role::Helper, Doing::Network) + online(Role::Client, Doing::Network);
            let there = peers.min(waited);
            Step {
                compute_ms: self.computing(Role::Owner, kind, Lane::Online),
                wait_ms: waited - there,
                network_ms: online(Role::Owner, Doing::Network) + there,
            }
        };
        let all = Kind::ALL.map(|kind| (kind.name(), step(kind)));
        all.into_iter().filter(|(_, step)| *step != Step::default()).collect()
    }
}
