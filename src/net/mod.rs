//! Channels between parties: tagged messages of exact length on two lanes.
//!
//! The *online* lane carries what depends on inputs; the *ahead* lane carries what depends on masks only and is bounded
//! in bytes, so that a party that runs ahead is held back by its peer's buffer. Each lane keeps its order; a receiver
//! names the tag that it waits for, and messages of other tags that came first are kept for later. Wrappers compose:
//! [`meter`] counts, [`shape`] simulates a network, [`tamper`] plays the adversary in tests.
//!
//! What operations send over a network is gathered: the messages of a party's turn to one peer leave in one *frame*, when the party begins to
//! wait or [`GATHERED`] bytes have come together. A long message leaves at once, behind those before it, and travels while the next one is
//! computed.

pub(crate) mod hollow;
pub mod inbox;
pub mod memory;
pub mod meter;
pub mod shape;
pub mod tamper;
pub mod tls;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::error::{Error, PeerFault, Result};
use crate::party::Role;
use crate::prf::Address;

/// What a message adds to its payload on the wire: tag (8), length (4; its highest bit says that another message of the frame follows),
/// causal depth (4). A frame adds nothing to its messages.
pub const MESSAGE_HEADER: usize = 16;

/// Messages wait for each other, and for the end of their sender's turn, until they are as many bytes as this, headers included: a full TLS
/// record. In longer frames the peer would wait for what it could answer meanwhile.
pub const GATHERED: usize = 16 << 10;

/// The two lanes of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Lane {
    /// Depends on inputs: on the critical path.
    Online,
    /// Depends on masks only: may be sent long before it is needed.
    Ahead,
}

/// A message in flight.
pub struct Message {
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
    /// A message is about to be sent: what is counted is counted now, for the operation that it belongs to.
    fn stamp(&self, _lane: Lane, _message: &mut Message) {}

    /// Sends messages as one frame; blocks while the ahead lane is full.
    ///
    /// # Errors
    /// [`PeerFault::Closed`] when the peer is gone.
    fn send_frame(&self, lane: Lane, frame: Vec<Message>) -> Result<(), PeerFault>;

    /// A message that is a frame by itself.
    ///
    /// # Errors
    /// As [`Channel::send_frame`].
    fn send(&self, lane: Lane, mut message: Message) -> Result<(), PeerFault> {
        self.stamp(lane, &mut message);
        self.send_frame(lane, vec![message])
    }

    /// Whether frames of several messages are worth waiting for: a network's are, each is a write, a record and a packet.
    fn gathers(&self) -> bool {
        true
    }

    /// Whether the message with this tag is known to be there: receiving it would not wait.
    fn ready(&self, _lane: Lane, _tag: u64) -> bool {
        false
    }

    /// Waits for the message with this tag, of exactly `len` bytes.
    ///
    /// # Errors
    /// [`PeerFault::Closed`], [`PeerFault::Timeout`] or [`PeerFault::Length`].
    fn recv(&self, lane: Lane, tag: u64, len: usize, timeout: Duration) -> Result<Message, PeerFault>;

    /// Drops messages until the one with this tag comes, which must have exactly `len` bytes; says how many bytes were
    /// dropped.
    ///
    /// # Errors
    /// As [`Channel::recv`].
    fn drain(&self, lane: Lane, tag: u64, len: usize, timeout: Duration) -> Result<(Message, u64), PeerFault>;

    /// Whether the peer has ended the link, as far as this channel can tell without waiting.
    fn ended(&self) -> bool {
        false
    }

    /// Ends the link in both directions; waiting calls return [`PeerFault::Closed`], at the peer with the reason, if there
    /// is one.
    fn end(&self, reason: Option<&Abort>);
}

impl<C: Channel + ?Sized> Channel for Arc<C> {
    fn stamp(&self, lane: Lane, message: &mut Message) {
        (**self).stamp(lane, message);
    }

    fn send_frame(&self, lane: Lane, frame: Vec<Message>) -> Result<(), PeerFault> {
        (**self).send_frame(lane, frame)
    }

    fn gathers(&self) -> bool {
        (**self).gathers()
    }

    fn ready(&self, lane: Lane, tag: u64) -> bool {
        (**self).ready(lane, tag)
    }

    fn recv(&self, lane: Lane, tag: u64, len: usize, timeout: Duration) -> Result<Message, PeerFault> {
        (**self).recv(lane, tag, len, timeout)
    }

    fn drain(&self, lane: Lane, tag: u64, len: usize, timeout: Duration) -> Result<(Message, u64), PeerFault> {
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

/// Messages to one peer on one lane that wait for their frame to be full, or for their sender to wait.
#[derive(Default)]
struct Outbox {
    messages: Vec<Message>,
    bytes: usize,
    /// The name of the first.
    step: Option<Address>,
}

impl Outbox {
    /// Sends what there is to `to`.
    fn leave(&mut self, channel: &Arc<dyn Channel>, to: Role, lane: Lane) -> Result<()> {
        let Some(step) = self.step.take() else { return Ok(()) };
        self.bytes = 0;
        channel.send_frame(lane, std::mem::take(&mut self.messages)).map_err(|kind| blame(to, &step, kind))
    }
}

/// One party's links to its two peers. Cheap to clone.
#[derive(Clone)]
pub struct Links {
    role: Role,
    peers: [Option<Arc<dyn Channel>>; 3],
    /// By lane and peer.
    outboxes: Arc<[[Mutex<Outbox>; 3]; 2]>,
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
        Links { role, peers: table, outboxes: Arc::default(), timeout, ahead_capacity }
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

    /// Sends `payload` under the name `step`, at once, behind what was gathered for `to` on this lane.
    ///
    /// # Errors
    /// [`Error::Peer`] naming the peer and the step.
    pub fn send(&self, to: Role, lane: Lane, step: &Address, payload: Vec<u8>) -> Result<()> {
        self.put(to, lane, step, payload, 0)
    }

    /// Sends `payload` under the name `step` with what else this thread sends to `to` in its turn: when it waits for a message, or calls
    /// [`Links::flush`], at the latest.
    ///
    /// # Errors
    /// [`Error::Peer`] naming the peer and the step.
    pub fn gather(&self, to: Role, lane: Lane, step: &Address, payload: Vec<u8>) -> Result<()> {
        self.put(to, lane, step, payload, GATHERED)
    }

    fn put(&self, to: Role, lane: Lane, step: &Address, payload: Vec<u8>, full: usize) -> Result<()> {
        let channel = self.channel(to)?;
        let mut message = Message { tag: step.tag(), depth: 0, not_before: None, payload };
        let mut outbox = self.outbox(lane, to);
        channel.stamp(lane, &mut message);
        if message.payload.len() >= GATHERED {
            // Not with it: they would arrive when it has.
            outbox.leave(channel, to, lane)?;
        }
        outbox.bytes += message.payload.len() + MESSAGE_HEADER;
        outbox.messages.push(message);
        outbox.step.get_or_insert_with(|| step.clone());
        match outbox.bytes < full && channel.gathers() {
            true => Ok(()),
            false => outbox.leave(channel, to, lane),
        }
    }

    fn outbox(&self, lane: Lane, to: Role) -> MutexGuard<'_, Outbox> {
        // A poisoned lock means that a thread died between two whole messages.
        self.outboxes[usize::from(lane == Lane::Ahead)][to.index()].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was gathered on `lane` leaves. Every thread does so for its own lane before it waits: for a message it need not be told.
    ///
    /// # Errors
    /// [`Error::Peer`] naming the first peer to which it could not be sent; the other has its own all the same.
    pub fn flush(&self, lane: Lane) -> Result<()> {
        let leave = |to: Role| match self.channel(to) {
            Ok(channel) => self.outbox(lane, to).leave(channel, to, lane),
            // No peer, nothing gathered.
            Err(_) => Ok(()),
        };
        Role::ALL.map(leave).into_iter().collect()
    }

    /// Receives exactly `len` bytes under the name `step`.
    ///
    /// # Errors
    /// [`Error::Peer`] naming the peer and the step.
    pub fn recv(&self, from: Role, lane: Lane, step: &Address, len: usize) -> Result<Vec<u8>> {
        let (channel, tag) = (self.channel(from)?, step.tag());
        if lane == Lane::Ahead || !channel.ready(lane, tag) {
            // Not what runs ahead: it may have to wait for room, which the walk's own thread alone can afford.
            self.flush(Lane::Online)?;
        }
        let message = channel.recv(lane, tag, len, self.timeout).map_err(|kind| blame(from, step, kind))?;
        Ok(message.payload)
    }

    /// Drops what `from` has sent on `lane` before the message named `step`; returns that one and the bytes dropped.
    ///
    /// # Errors
    /// [`Error::Peer`] naming the peer and the step.
    pub fn drain(&self, from: Role, lane: Lane, step: &Address, len: usize) -> Result<(Vec<u8>, u64)> {
        self.flush(Lane::Online)?;
        let got = self.channel(from)?.drain(lane, step.tag(), len, self.timeout);
        let (message, dropped) = got.map_err(|kind| blame(from, step, kind))?;
        Ok((message.payload, dropped))
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

    /// The Client's links to the Owner, with what is gathered on them, and the Owner's end.
    fn gathering(gathers: bool) -> (Links, Arc<meter::Meter>, memory::MemoryChannel) {
        let (a, b) = memory::link(1 << 20);
        let meter = Arc::new(meter::Meter::default());
        let channel = meter::Metered::new(a.gathering(gathers), Role::Owner, Arc::clone(&meter));
        let links =
            Links::new(Role::Client, [(Role::Owner, Arc::new(channel) as _)], Duration::from_millis(20), 1 << 20);
        (links, meter, b)
    }

    fn step(n: u64) -> Address {
        Address { pass: n, layer: 0, path: "test".into(), label: "step" }
    }

    #[test]
    fn messages_of_a_turn_are_a_frame() {
        let (links, meter, owner) = gathering(true);
        let arrived = |n| owner.ready(Lane::Online, step(n).tag());
        let say = |n, bytes| links.gather(Role::Owner, Lane::Online, &step(n), vec![1; bytes]).unwrap();
        let frames = || meter.frames(Role::Owner)[0];
        (0..3).for_each(|n| say(n, 100));
        assert!(!(0..3).any(arrived));
        assert_eq!(meter.sent(Role::Owner).messages, 3, "counted for the operation that sends");
        // A message that is there does not make it wait; one that is not does.
        owner.send(Lane::Online, Message { tag: step(9).tag(), depth: 4, not_before: None, payload: vec![] }).unwrap();
        links.recv(Role::Owner, Lane::Online, &step(9), 0).unwrap();
        assert!(!(0..3).any(arrived) && frames() == 0);
        assert!(links.recv(Role::Owner, Lane::Online, &step(10), 0).is_err());
        assert!((0..3).all(arrived) && frames() == 1);
        // What the others were told before it had that message says so.
        let got = |n, len| owner.recv(Lane::Online, step(n).tag(), len, Duration::from_secs(1)).unwrap();
        assert_eq!([got(0, 100).depth, got(2, 100).depth], [1, 1]);
        // A long one leaves at once, behind those before it; one that is sent at once with them.
        say(3, 10);
        assert!(!arrived(3));
        say(4, GATHERED);
        assert!(arrived(3) && arrived(4) && frames() == 3);
        say(5, 10);
        links.send(Role::Owner, Lane::Online, &step(6), vec![]).unwrap();
        assert!(arrived(5) && arrived(6) && frames() == 4);
        assert_eq!(got(6, 0).depth, 5);
        say(7, 10);
        links.flush(Lane::Ahead).unwrap();
        assert!(!arrived(7));
        links.flush(Lane::Online).unwrap();
        assert!(arrived(7) && frames() == 5);
        links.flush(Lane::Online).unwrap();
        assert_eq!(frames(), 5, "nothing is no frame");
    }

    #[test]
    fn where_nothing_is_gained_nothing_waits() {
        let (links, meter, owner) = gathering(false);
        for n in 0..3 {
            links.gather(Role::Owner, Lane::Online, &step(n), vec![1; 100]).unwrap();
            assert!(owner.ready(Lane::Online, step(n).tag()));
        }
        assert_eq!(meter.frames(Role::Owner), [3, 0]);
    }

    #[test]
    fn what_was_gathered_for_a_peer_that_has_gone_is_its_fault() {
        let (links, _, owner) = gathering(true);
        links.gather(Role::Owner, Lane::Online, &step(0), vec![1; 100]).unwrap();
        drop(owner);
        let error = links.flush(Lane::Online).unwrap_err();
        assert_eq!(error.to_string(), blame(Role::Owner, &step(0), PeerFault::Closed).to_string());
    }

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
