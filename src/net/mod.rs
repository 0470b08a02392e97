//! Channels between parties: tagged messages of exact length on two lanes.
//!
//! The *online* lane carries what depends on inputs; the *ahead* lane carries what depends on masks only and is bounded
//! in bytes, so that a party that runs ahead is held back by its peer's buffer. Each lane keeps its order; a receiver
//! names the tag that it waits for, and messages of other tags that came first are kept for later. Wrappers compose:
//! [`meter`] counts, [`shape`] simulates a network, [`tamper`] plays the adversary in tests.

pub(crate) mod hollow;
pub mod inbox;
pub mod memory;
pub mod meter;
pub mod shape;
pub mod tamper;
pub mod tls;

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::error::{Error, PeerFault, Result};
use crate::party::Role;
use crate::prf::Address;

/// What a frame adds to its payload on the wire: tag (8), length (4), causal depth (4).
pub const FRAME_HEADER: usize = 16;

/// The two lanes of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Lane {
    /// Depends on inputs: on the critical path.
    Online,
    /// Depends on masks only: may be sent long before it is needed.
    Ahead,
}

/// A message in flight.
pub struct Frame {
    /// Which step it belongs to, see [`Address::tag`].
    pub tag: u64,
    /// 1 + the largest depth of any online message that its sender had received: the length of the causal chain.
    pub depth: u32,
    /// Not to be delivered earlier (simulated networks).
    pub not_before: Option<Instant>,
    /// The bytes.
    pub payload: Vec<u8>,
}

/// One end of a link to one peer. Errors are [`PeerFault`]s; the caller adds who and where.
pub trait Channel: Send + Sync {
    /// Queues a frame; blocks while the ahead lane is full.
    ///
    /// # Errors
    /// [`PeerFault::Closed`] when the peer is gone.
    fn send(&self, lane: Lane, frame: Frame) -> Result<(), PeerFault>;

    /// Waits for the frame with this tag, of exactly `len` bytes.
    ///
    /// # Errors
    /// [`PeerFault::Closed`], [`PeerFault::Timeout`] or [`PeerFault::Length`].
    fn recv(&self, lane: Lane, tag: u64, len: usize, timeout: Duration) -> Result<Frame, PeerFault>;

    /// Drops frames until the one with this tag comes, which must have exactly `len` bytes; says how many bytes were
    /// dropped.
    ///
    /// # Errors
    /// As [`Channel::recv`].
    fn drain(&self, lane: Lane, tag: u64, len: usize, timeout: Duration) -> Result<(Frame, u64), PeerFault>;

    /// Whether the peer has ended the link, as far as this channel can tell without waiting.
    fn ended(&self) -> bool {
        false
    }

    /// Ends the link in both directions; waiting calls return [`PeerFault::Closed`], at the peer with the reason, if there
    /// is one.
    fn end(&self, reason: Option<&Abort>);
}

impl<C: Channel + ?Sized> Channel for Arc<C> {
    fn send(&self, lane: Lane, frame: Frame) -> Result<(), PeerFault> {
        (**self).send(lane, frame)
    }

    fn recv(&self, lane: Lane, tag: u64, len: usize, timeout: Duration) -> Result<Frame, PeerFault> {
        (**self).recv(lane, tag, len, timeout)
    }

    fn drain(&self, lane: Lane, tag: u64, len: usize, timeout: Duration) -> Result<(Frame, u64), PeerFault> {
        (**self).drain(lane, tag, len, timeout)
    }

    fn ended(&self) -> bool {
        (**self).ended()
    }

    fn end(&self, reason: Option<&Abort>) {
        (**self).end(reason);
    }
}

/// Why a party ends a session before its time, in its own words: whom it blames and for what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Abort {
    /// The party to blame; `None` if it is the one that speaks, or nobody.
    pub blamed: Option<Role>,
    /// [`Error::code`].
    pub code: String,
}

/// The longest code that is taken from a peer.
const CODE_LIMIT: usize = 24;

impl Abort {
    /// The peer's words for `error`.
    #[must_use]
    pub fn of(error: &Error) -> Abort {
        let (blamed, code) = match error {
            // Hearsay is passed on as it was heard.
            Error::Peer { kind: PeerFault::Aborted { blamed: Some(role), code }, .. } => (Some(*role), code.as_str()),
            Error::Peer { role, kind, .. } => (Some(*role), kind.code()),
            other => (None, other.code()),
        };
        Abort { blamed, code: code.to_string() }
    }

    /// What it is to the peer that hears it.
    #[must_use]
    pub fn fault(&self) -> PeerFault {
        PeerFault::Aborted { blamed: self.blamed, code: self.code.clone() }
    }

    /// On the wire: a byte for the role, then the code.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![self.blamed.map_or(3, |r| r.index() as u8)];
        out.extend(self.code.bytes().take(CODE_LIMIT));
        out
    }

    /// From the wire; `None` for what is not one.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Abort> {
        let (&role, code) = bytes.split_first()?;
        let blamed = match role {
            3 => None,
            i => Some(*Role::ALL.get(usize::from(i))?),
        };
        let plain = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit() || *b == b'-';
        if code.len() > CODE_LIMIT || !code.iter().all(plain) {
            return None;
        }
        Some(Abort { blamed, code: String::from_utf8(code.to_vec()).ok()? })
    }
}

/// One party's links to its two peers. Cheap to clone.
#[derive(Clone)]
pub struct Links {
    role: Role,
    peers: [Option<Arc<dyn Channel>>; 3],
    timeout: Duration,
    ahead_capacity: usize,
}

impl Links {
    /// With a channel to each peer, whose ahead lanes hold `ahead_capacity` bytes.
    #[must_use]
    pub fn new(
        role: Role,
        peers: impl IntoIterator<Item = (Role, Arc<dyn Channel>)>,
        timeout: Duration,
        ahead_capacity: usize,
    ) -> Self {
        let mut table = [None, None, None];
        for (peer, channel) in peers {
            table[peer.index()] = Some(channel);
        }
        Links { role, peers: table, timeout, ahead_capacity }
    }

    /// Whose links these are.
    #[must_use]
    pub fn role(&self) -> Role {
        self.role
    }

    /// Bytes that a peer buffers of this party's run-ahead.
    #[must_use]
    pub fn ahead_capacity(&self) -> usize {
        self.ahead_capacity
    }

    fn channel(&self, peer: Role) -> Result<&Arc<dyn Channel>> {
        self.peers[peer.index()].as_ref().ok_or_else(|| Error::Internal(format!("{} has no link to {peer}", self.role)))
    }

    /// Sends `payload` under the name `step`.
    ///
    /// # Errors
    /// [`Error::Peer`] naming the peer and the step.
    pub fn send(&self, to: Role, lane: Lane, step: &Address, payload: Vec<u8>) -> Result<()> {
        let frame = Frame { tag: step.tag(), depth: 0, not_before: None, payload };
        self.channel(to)?.send(lane, frame).map_err(|kind| blame(to, step, kind))
    }

    /// Receives exactly `len` bytes under the name `step`.
    ///
    /// # Errors
    /// [`Error::Peer`] naming the peer and the step.
    pub fn recv(&self, from: Role, lane: Lane, step: &Address, len: usize) -> Result<Vec<u8>> {
        let frame =
            self.channel(from)?.recv(lane, step.tag(), len, self.timeout).map_err(|kind| blame(from, step, kind))?;
        Ok(frame.payload)
    }

    /// Drops what `from` has sent on `lane` before the message named `step`; returns that one and the bytes dropped.
    ///
    /// # Errors
    /// [`Error::Peer`] naming the peer and the step.
    pub fn drain(&self, from: Role, lane: Lane, step: &Address, len: usize) -> Result<(Vec<u8>, u64)> {
        let got = self.channel(from)?.drain(lane, step.tag(), len, self.timeout);
        let (frame, dropped) = got.map_err(|kind| blame(from, step, kind))?;
        Ok((frame.payload, dropped))
    }

    /// Whether a peer has ended its link.
    #[must_use]
    pub fn broken(&self) -> bool {
        self.peers.iter().flatten().any(|c| c.ended())
    }

    /// Closes all links of this party.
    pub fn close(&self) {
        self.peers.iter().flatten().for_each(|c| c.end(None));
    }

    /// Closes all links of this party and tells the peers why; the one to blame is told as well.
    pub fn abort(&self, error: &Error) {
        match error {
            // That a flag went up tells something about the Client's values: to the others it looks as if it had just left.
            Error::Range { .. } => self.close(),
            other => self.end(&Abort::of(other)),
        }
    }

    /// Closes all links of this party, for the reason given.
    pub fn end(&self, reason: &Abort) {
        self.peers.iter().flatten().for_each(|c| c.end(Some(reason)));
    }

    /// The same links with another limit on every wait.
    #[must_use]
    pub fn within(&self, timeout: Duration) -> Links {
        Links { timeout, ..self.clone() }
    }
}

/// An [`Error::Peer`] for `role` at `step`.
#[must_use]
pub fn blame(role: Role, step: &Address, kind: PeerFault) -> Error {
    Error::Peer { role, step: step.to_string(), kind }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_at_the_end() {
        let peer = |kind| Error::Peer { role: Role::Helper, step: "s".into(), kind };
        let said = Abort::of(&peer(PeerFault::Timeout(5)));
        assert_eq!((said.blamed, said.code.as_str()), (Some(Role::Helper), "timeout"));
        assert_eq!(Abort::decode(&said.encode()), Some(said.clone()));
        // Hearsay keeps its source.
        assert_eq!(Abort::of(&peer(said.fault())), said);
        // A range flag looks like a Client that leaves.
        let heard = |end: &dyn Fn(&Links)| {
            let (a, b) = memory::link(1 << 10);
            end(&Links::new(Role::Client, [(Role::Owner, Arc::new(a) as _)], Duration::from_secs(1), 1 << 10));
            b.recv(Lane::Online, 1, 1, Duration::from_secs(1)).err()
        };
        let range = Error::Range { layer: "3".into(), quantity: "a score".into() };
        assert_eq!(heard(&|l| l.abort(&range)), heard(&Links::close));
        for bad in [&[] as &[u8], &[4, b'a'], &[0, b'A'], &[3; 40], &[1, 0xff]] {
            assert_eq!(Abort::decode(bad), None);
        }
    }
}
