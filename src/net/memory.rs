//! Channels inside one process. Behaves like a pair of network connections: ordered lanes, a bounded ahead lane, an end
//! that both sides see.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{Channel, FRAME_HEADER, Frame, Lane};
use crate::error::PeerFault;

#[derive(Default)]
struct Queue {
    frames: VecDeque<Frame>,
    bytes: usize,
    written: u64,
    closed: bool,
}

/// One direction of one lane.
struct Pipe {
    queue: Mutex<Queue>,
    changed: Condvar,
    capacity: usize,
}

impl Pipe {
    fn new(capacity: usize) -> Self {
        Pipe { queue: Mutex::new(Queue::default()), changed: Condvar::new(), capacity }
    }

    // A poisoned lock means that a thread died while it held a queue of plain bytes; the queue itself is still whole.
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send(&self, frame: Frame) -> Result<(), PeerFault> {
        let mut q = self.lock();
        // A frame larger than the whole buffer goes through alone: holding it back would be a deadlock.
        while !q.closed && q.bytes > 0 && q.bytes + frame.payload.len() > self.capacity {
            q = self.changed.wait(q).unwrap_or_else(PoisonError::into_inner);
        }
        if q.closed {
            return Err(PeerFault::Closed);
        }
        q.bytes += frame.payload.len();
        q.written += (frame.payload.len() + FRAME_HEADER) as u64;
        q.frames.push_back(frame);
        drop(q);
        self.changed.notify_all();
        Ok(())
    }

    fn recv(&self, timeout: Duration) -> Result<Frame, PeerFault> {
        let deadline = Instant::now() + timeout;
        let mut q = self.lock();
        loop {
            if let Some(frame) = q.frames.pop_front() {
                q.bytes -= frame.payload.len();
                drop(q);
                self.changed.notify_all();
                return Ok(frame);
            }
            if q.closed {
                return Err(PeerFault::Closed);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(PeerFault::Timeout(timeout.as_millis() as u64));
            }
            q = self.changed.wait_timeout(q, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }
}

/// Frames that came before their turn, by tag.
#[derive(Default)]
struct Early {
    frames: HashMap<u64, VecDeque<Frame>>,
    bytes: usize,
}

/// One end of an in-memory link.
pub struct MemoryChannel {
    out: [Arc<Pipe>; 2],
    inc: [Arc<Pipe>; 2],
    early: [Mutex<Early>; 2],
    /// More out-of-turn bytes than this is a fault of the peer.
    early_limit: usize,
}

/// A link: two ends whose ahead lanes hold at most `ahead_capacity` bytes each way, plus as much again that came out of
/// turn (one batch of run-ahead slots arrives operation by operation and is consumed slot by slot).
#[must_use]
pub fn link(ahead_capacity: usize) -> (MemoryChannel, MemoryChannel) {
    let pipes = || [Arc::new(Pipe::new(usize::MAX)), Arc::new(Pipe::new(ahead_capacity))];
    let (ab, ba) = (pipes(), pipes());
    let early_limit = ahead_capacity.saturating_mul(2).max(1 << 20);
    let end = |out: &[Arc<Pipe>; 2], inc: &[Arc<Pipe>; 2]| MemoryChannel {
        out: out.clone(),
        inc: inc.clone(),
        early: Default::default(),
        early_limit,
    };
    (end(&ab, &ba), end(&ba, &ab))
}

impl MemoryChannel {
    /// Bytes that this end has written so far, frame headers included, per lane (online, ahead).
    #[must_use]
    pub fn written(&self) -> [u64; 2] {
        [self.out[0].lock().written, self.out[1].lock().written]
    }
}

fn lane_index(lane: Lane) -> usize {
    match lane {
        Lane::Online => 0,
        Lane::Ahead => 1,
    }
}

impl Channel for MemoryChannel {
    fn send(&self, lane: Lane, frame: Frame) -> Result<(), PeerFault> {
        self.out[lane_index(lane)].send(frame)
    }

    fn recv(&self, lane: Lane, tag: u64, len: usize, timeout: Duration) -> Result<Frame, PeerFault> {
        let i = lane_index(lane);
        let mut early = self.early[i].lock().unwrap_or_else(PoisonError::into_inner);
        let found = early.frames.get_mut(&tag).and_then(VecDeque::pop_front);
        let frame = if let Some(frame) = found {
            early.bytes -= frame.payload.len();
            if early.frames.get(&tag).is_some_and(VecDeque::is_empty) {
                early.frames.remove(&tag);
            }
            frame
        } else {
            loop {
                let frame = self.inc[i].recv(timeout)?;
                if frame.tag == tag {
                    break frame;
                }
                early.bytes += frame.payload.len();
                if early.bytes > self.early_limit {
                    return Err(PeerFault::Flood(self.early_limit));
                }
                early.frames.entry(frame.tag).or_default().push_back(frame);
            }
        };
        if frame.payload.len() != len {
            return Err(PeerFault::Length { want: len, got: frame.payload.len() });
        }
        Ok(frame)
    }

    fn drain(&self, lane: Lane, tag: u64, len: usize, timeout: Duration) -> Result<(Frame, u64), PeerFault> {
        let i = lane_index(lane);
        let mut early = self.early[i].lock().unwrap_or_else(PoisonError::into_inner);
        let mut found = early.frames.remove(&tag).and_then(|mut q| q.pop_front());
        let mut dropped = (early.bytes - found.as_ref().map_or(0, |f| f.payload.len())) as u64;
        *early = Early::default();
        while found.is_none() {
            let frame = self.inc[i].recv(timeout)?;
            if frame.tag == tag {
                found = Some(frame);
            } else {
                dropped += frame.payload.len() as u64;
            }
        }
        match found {
            Some(frame) if frame.payload.len() == len => Ok((frame, dropped)),
            Some(frame) => Err(PeerFault::Length { want: len, got: frame.payload.len() }),
            None => Err(PeerFault::Closed),
        }
    }

    fn close(&self) {
        self.out.iter().chain(&self.inc).for_each(|p| p.close());
    }
}

impl Drop for MemoryChannel {
    fn drop(&mut self) {
        self.close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(tag: u64, n: usize) -> Frame {
        Frame { tag, depth: 0, not_before: None, payload: vec![0; n] }
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
