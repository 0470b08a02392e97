//! Channels inside one process. Behaves like a pair of network connections: ordered lanes, a bounded ahead lane, an end
//! that both sides see.

use std::sync::Arc;
use std::time::Duration;

use super::inbox::Inbox;
use super::{Abort, Channel, Lane, Message};
use crate::error::PeerFault;

/// One end of an in-memory link.
pub struct MemoryChannel {
    mine: Arc<Inbox>,
    peers: Arc<Inbox>,
    gathers: bool,
}

/// A link: two ends whose ahead lanes hold at most `ahead_capacity` bytes each way, see [`Inbox::new`].
#[must_use]
pub fn link(ahead_capacity: usize) -> (MemoryChannel, MemoryChannel) {
    let inbox = || Arc::new(Inbox::new(usize::MAX, ahead_capacity));
    let (a, b) = (inbox(), inbox());
    let end = |mine: &Arc<Inbox>, peers: &Arc<Inbox>| MemoryChannel {
        mine: Arc::clone(mine),
        peers: Arc::clone(peers),
        gathers: false,
    };
    (end(&a, &b), end(&b, &a))
}

impl MemoryChannel {
    /// With messages gathered as on a network: here that saves nothing.
    #[must_use]
    pub fn gathering(mut self, gathers: bool) -> Self {
        self.gathers = gathers;
        self
    }

    /// Bytes that this end has written so far, message headers included, per lane (online, ahead).
    #[must_use]
    pub fn written(&self) -> [u64; 2] {
        self.peers.pushed()
    }
}

impl Channel for MemoryChannel {
    fn send_frame(&self, lane: Lane, frame: Vec<Message>) -> Result<(), PeerFault> {
        self.peers.push(lane, frame)
    }

    fn gathers(&self) -> bool {
        self.gathers
    }

    fn ready(&self, lane: Lane, tag: u64) -> bool {
        self.mine.ready(lane, tag)
    }

    fn recv(&self, lane: Lane, tag: u64, len: usize, timeout: Duration) -> Result<Message, PeerFault> {
        self.mine.recv(lane, tag, len, timeout)
    }

    fn drain(&self, lane: Lane, tag: u64, len: usize, timeout: Duration) -> Result<(Message, u64), PeerFault> {
        self.mine.drain(lane, tag, len, timeout)
    }

    fn end(&self, reason: Option<&Abort>) {
        let fault = reason.map_or(PeerFault::Closed, Abort::fault);
        self.mine.end(&PeerFault::Closed);
        self.peers.end(&fault);
    }
}

impl Drop for MemoryChannel {
    fn drop(&mut self) {
        self.end(None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(tag: u64, n: usize) -> Message {
        Message { tag, depth: 0, not_before: None, payload: vec![0; n] }
    }

    #[test]
    fn out_of_turn_frames_wait_and_lengths_are_exact() {
        let (a, b) = link(1 << 20);
        for t in 0..3 {
            a.send(Lane::Ahead, frame(t, 10 + t as usize)).unwrap();
        }
        let second = Duration::from_secs(1);
        assert_eq!(b.recv(Lane::Ahead, 2, 12, second).unwrap().tag, 2);
        assert_eq!(b.recv(Lane::Ahead, 0, 10, second).unwrap().tag, 0);
        assert_eq!(b.recv(Lane::Ahead, 1, 12, second).err(), Some(PeerFault::Length { want: 12, got: 11 }));
        assert_eq!(b.recv(Lane::Online, 1, 1, Duration::from_millis(5)).err(), Some(PeerFault::Timeout(5)));
        drop(a);
        assert_eq!(b.recv(Lane::Online, 1, 1, second).err(), Some(PeerFault::Closed));
    }

    #[test]
    fn the_ahead_lane_holds_its_sender_back() {
        let (a, b) = link(100);
        a.send(Lane::Ahead, frame(0, 80)).unwrap();
        std::thread::scope(|s| {
            let blocked = s.spawn(|| a.send(Lane::Ahead, frame(1, 80)));
            std::thread::sleep(Duration::from_millis(20));
            assert!(!blocked.is_finished());
            b.recv(Lane::Ahead, 0, 80, Duration::from_secs(1)).unwrap();
            blocked.join().unwrap().unwrap();
        });
    }

    #[test]
    fn a_flood_out_of_turn_is_a_fault() {
        let (a, b) = link(1 << 10);
        for t in 0..40 {
            a.send(Lane::Online, frame(t, 1 << 15)).unwrap();
        }
        assert!(matches!(b.recv(Lane::Online, 99, 1, Duration::from_secs(1)), Err(PeerFault::Flood(_))));
    }
}
