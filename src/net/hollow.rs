//! A channel that carries the length of a payload in place of it: for walks that count. The receiver checks the length as
//! ever and gets zeros.

use std::time::Duration;

use super::{Abort, Channel, Lane, Message};
use crate::error::PeerFault;

/// Bytes of a length.
const LENGTH: usize = 8;

/// Wraps a channel; both ends must be wrapped.
pub(crate) struct Hollow<C>(C);

impl<C: Channel> Hollow<C> {
    pub(crate) fn new(inner: C) -> Self {
        Hollow(inner)
    }
}

fn fill(frame: Message, len: usize) -> Result<Message, PeerFault> {
    let got = frame.payload.as_slice().try_into().map_or(0, u64::from_le_bytes) as usize;
    if got != len {
        return Err(PeerFault::Length { want: len, got });
    }
    Ok(Message { payload: vec![0; len], ..frame })
}

impl<C: Channel> Channel for Hollow<C> {
    fn stamp(&self, lane: Lane, message: &mut Message) {
        self.0.stamp(lane, message);
    }

    fn send_frame(&self, lane: Lane, frame: Vec<Message>) -> Result<(), PeerFault> {
        let length = |m: Message| Message { payload: (m.payload.len() as u64).to_le_bytes().to_vec(), ..m };
        self.0.send_frame(lane, frame.into_iter().map(length).collect())
    }

    fn gathers(&self) -> bool {
        self.0.gathers()
    }

    fn ready(&self, lane: Lane, tag: u64) -> bool {
        self.0.ready(lane, tag)
    }

    fn recv(&self, lane: Lane, tag: u64, len: usize, timeout: Duration) -> Result<Message, PeerFault> {
        fill(self.0.recv(lane, tag, LENGTH, timeout)?, len)
    }

    fn drain(&self, lane: Lane, tag: u64, len: usize, timeout: Duration) -> Result<(Message, u64), PeerFault> {
        let (frame, dropped) = self.0.drain(lane, tag, LENGTH, timeout)?;
        Ok((fill(frame, len)?, dropped))
    }

    fn end(&self, reason: Option<&Abort>) {
        self.0.end(reason);
    }
}

#[cfg(test)]
mod tests {
    use super::super::memory;
    use super::*;

    #[test]
    fn lengths_arrive_and_are_checked() {
        let (a, b) = memory::link(1 << 10);
        let (a, b) = (Hollow::new(a), Hollow::new(b));
        let frame = |tag, n| Message { tag, depth: 3, not_before: None, payload: vec![7; n] };
        a.send(Lane::Ahead, frame(1, 100_000)).unwrap();
        a.send(Lane::Ahead, frame(2, 5)).unwrap();
        let second = Duration::from_secs(1);
        let got = b.recv(Lane::Ahead, 1, 100_000, second).unwrap();
        assert_eq!((got.depth, got.payload), (3, vec![0; 100_000]));
        assert_eq!(b.recv(Lane::Ahead, 2, 6, second).err(), Some(PeerFault::Length { want: 6, got: 5 }));
    }
}
