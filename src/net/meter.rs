//! Counts what a party sends: bytes and messages per directed link and lane, and the causal depth of online messages.
//!
//! Depth makes "messages in sequence" exact instead of estimated: every online message carries one more than the largest
//! depth that its sender had received, so the growth of the Owner's clock over a stretch of work is the length of the
//! longest chain of messages in it.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::{Abort, Channel, Lane, MESSAGE_HEADER, Message};
use crate::error::PeerFault;
use crate::ledger::{self, Doing, Ledger};
use crate::party::Role;

/// What one directed link carried.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct LinkTotals {
    /// Payload and header bytes on the online lane.
    pub online_bytes: u64,
    /// Payload and header bytes on the ahead lane.
    pub ahead_bytes: u64,
    /// Messages on the online lane.
    pub messages: u64,
    /// Messages on the ahead lane.
    pub ahead_messages: u64,
}

impl LinkTotals {
    /// Number by number.
    #[must_use]
    pub fn zip(&self, o: &LinkTotals, f: impl Fn(u64, u64) -> u64) -> LinkTotals {
        LinkTotals {
            online_bytes: f(self.online_bytes, o.online_bytes),
            ahead_bytes: f(self.ahead_bytes, o.ahead_bytes),
            messages: f(self.messages, o.messages),
            ahead_messages: f(self.ahead_messages, o.ahead_messages),
        }
    }
}

impl std::ops::Sub for LinkTotals {
    type Output = LinkTotals;
    fn sub(self, o: LinkTotals) -> LinkTotals {
        self.zip(&o, |a, b| a - b)
    }
}

#[derive(Default)]
struct Counter {
    bytes: [AtomicU64; 2],
    messages: [AtomicU64; 2],
    frames: [AtomicU64; 2],
}

/// One party's counters, shared by the wrappers of its links.
#[derive(Default)]
pub struct Meter {
    sent: [Counter; 3],
    clock: AtomicU32,
    waited_ns: [AtomicU64; 3],
    requests: AtomicU64,
    tokens: AtomicU64,
    ledger: Arc<Ledger>,
    /// By peer: what was sent to it, and received from it.
    samples: [[Sample; 2]; 3],
}

/// Bytes of a message that are looked at.
const SAMPLE: usize = 1024;

/// The beginning of a message that really went over the link, for whoever wants to see what a party sees.
#[derive(Default)]
struct Sample {
    wanted: AtomicBool,
    bytes: Mutex<Vec<u8>>,
}

impl Sample {
    /// Shorter messages are control, and those of a few values.
    fn offer(&self, payload: &[u8]) {
        if payload.len() >= SAMPLE && self.wanted.swap(false, Relaxed) {
            *self.bytes.lock().unwrap_or_else(PoisonError::into_inner) = payload[..SAMPLE].to_vec();
        }
    }

    /// Nothing is kept of what was; the next message is.
    fn forget(&self) {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner).clear();
        self.wanted.store(true, Relaxed);
    }

    fn take(&self) -> Vec<u8> {
        self.wanted.store(true, Relaxed);
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Meter {
    /// What this party has sent to `to`.
    #[must_use]
    pub fn sent(&self, to: Role) -> LinkTotals {
        let c = &self.sent[to.index()];
        LinkTotals {
            online_bytes: c.bytes[0].load(Relaxed),
            ahead_bytes: c.bytes[1].load(Relaxed),
            messages: c.messages[0].load(Relaxed),
            ahead_messages: c.messages[1].load(Relaxed),
        }
    }

    /// Frames in which its messages to `to` left: online, ahead. How many there are is a matter of time, too.
    #[must_use]
    pub fn frames(&self, to: Role) -> [u64; 2] {
        self.sent[to.index()].frames.each_ref().map(|n| n.load(Relaxed))
    }

    /// Length of the longest chain of online messages that ended at this party so far.
    #[must_use]
    pub fn depth(&self) -> u32 {
        self.clock.load(Relaxed)
    }

    /// The same by kind of operation, with times.
    #[must_use]
    pub fn ledger(&self) -> &Arc<Ledger> {
        &self.ledger
    }

    /// Forgets samples: what comes next is another caller's.
    pub fn forget_samples(&self) {
        self.samples.iter().flatten().for_each(Sample::forget);
    }

    /// The first 1024 bytes of a message of a request to `peer`, and of one from it, as they went over the link; empty before there
    /// is one. Asking has the next ones kept: nothing is copied unless somebody looks.
    #[must_use]
    pub fn samples(&self, peer: Role) -> [Vec<u8>; 2] {
        self.samples[peer.index()].each_ref().map(Sample::take)
    }

    /// A request of so many tokens was answered.
    pub fn answered(&self, tokens: u64) {
        self.requests.fetch_add(1, Relaxed);
        self.tokens.fetch_add(tokens, Relaxed);
    }

    /// Requests that were answered, and their tokens.
    #[must_use]
    pub fn answers(&self) -> [u64; 2] {
        [self.requests.load(Relaxed), self.tokens.load(Relaxed)]
    }

    /// Time spent waiting for `peer`.
    #[must_use]
    pub fn waited(&self, peer: Role) -> Duration {
        Duration::from_nanos(self.waited_ns[peer.index()].load(Relaxed))
    }
}

/// A channel that counts for its owner's [`Meter`].
pub struct Metered<C> {
    inner: C,
    peer: Role,
    meter: Arc<Meter>,
}

impl<C: Channel> Metered<C> {
    /// Counts the traffic with `peer` over `inner`.
    pub fn new(inner: C, peer: Role, meter: Arc<Meter>) -> Self {
        Metered { inner, peer, meter }
    }
}

impl<C: Channel> Channel for Metered<C> {
    fn stamp(&self, lane: Lane, message: &mut Message) {
        let bytes = (message.payload.len() + MESSAGE_HEADER) as u64;
        if lane == Lane::Online {
            message.depth = self.meter.depth() + 1;
        }
        // Counted first: who has received a message must find it counted.
        let c = &self.meter.sent[self.peer.index()];
        let i = usize::from(lane == Lane::Ahead);
        c.bytes[i].fetch_add(bytes, Relaxed);
        c.messages[i].fetch_add(1, Relaxed);
        ledger::sent(lane, bytes);
        self.meter.samples[self.peer.index()][0].offer(&message.payload);
    }

    fn send_frame(&self, lane: Lane, frame: Vec<Message>) -> Result<(), PeerFault> {
        self.meter.sent[self.peer.index()].frames[usize::from(lane == Lane::Ahead)].fetch_add(1, Relaxed);
        match lane {
            Lane::Online => self.inner.send_frame(lane, frame),
            // It may have to wait for room.
            Lane::Ahead => ledger::during(Doing::Wait, || self.inner.send_frame(lane, frame)),
        }
    }

    fn gathers(&self) -> bool {
        self.inner.gathers()
    }

    fn ready(&self, lane: Lane, tag: u64) -> bool {
        self.inner.ready(lane, tag)
    }

    fn recv(&self, lane: Lane, tag: u64, len: usize, timeout: Duration) -> Result<Message, PeerFault> {
        let start = Instant::now();
        let message = ledger::during(Doing::Wait, || self.inner.recv(lane, tag, len, timeout));
        self.meter.waited_ns[self.peer.index()].fetch_add(start.elapsed().as_nanos() as u64, Relaxed);
        let message = message?;
        self.meter.samples[self.peer.index()][1].offer(&message.payload);
        if lane == Lane::Online {
            self.meter.clock.fetch_max(message.depth, Relaxed);
        }
        Ok(message)
    }

    fn drain(&self, lane: Lane, tag: u64, len: usize, timeout: Duration) -> Result<(Message, u64), PeerFault> {
        self.inner.drain(lane, tag, len, timeout)
    }

    fn ended(&self) -> bool {
        self.inner.ended()
    }

    fn end(&self, reason: Option<&Abort>) {
        self.inner.end(reason);
    }
}

#[cfg(test)]
mod tests {
    use super::super::memory;
    use super::*;

    #[test]
    fn the_meter_counts_what_the_channel_wrote() {
        let meter = Arc::new(Meter::default());
        let (a, b) = memory::link(1 << 30);
        let a = Metered::new(a, Role::Helper, Arc::clone(&meter));
        for (i, n) in [0usize, 1, 7, 100, 65_536].into_iter().enumerate() {
            for lane in [Lane::Online, Lane::Ahead] {
                a.send(lane, Message { tag: i as u64, depth: 0, not_before: None, payload: vec![0; n] }).unwrap();
                b.recv(lane, i as u64, n, Duration::from_secs(1)).unwrap();
            }
        }
        let (sent, written) = (meter.sent(Role::Helper), a.inner.written());
        assert_eq!([sent.online_bytes, sent.ahead_bytes], written);
    }

    #[test]
    fn depth_is_the_longest_chain() {
        let meters = [Arc::new(Meter::default()), Arc::new(Meter::default())];
        let (a, b) = memory::link(1 << 20);
        let (a, b) = (
            Metered::new(a, Role::Helper, Arc::clone(&meters[0])),
            Metered::new(b, Role::Owner, Arc::clone(&meters[1])),
        );
        let frame = |tag| Message { tag, depth: 0, not_before: None, payload: Vec::new() };
        let second = Duration::from_secs(1);
        for round in 0..3 {
            // Two messages side by side count once.
            for t in [0, 1] {
                a.send(Lane::Online, frame(round * 2 + t)).unwrap();
            }
            for t in [0, 1] {
                b.recv(Lane::Online, round * 2 + t, 0, second).unwrap();
            }
            b.send(Lane::Online, frame(round)).unwrap();
            a.recv(Lane::Online, round, 0, second).unwrap();
        }
        assert_eq!(meters[0].depth(), 6);
    }
}
