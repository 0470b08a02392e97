//! What has arrived at one end of a link and waits for its turn: two lanes, each with a bounded queue and a bounded store
//! of messages that came before they were asked for.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{Lane, MESSAGE_HEADER, Message};
use crate::error::PeerFault;

/// What a message takes in memory beyond its payload: empty ones must fill a lane, too.
const OVERHEAD: usize = size_of::<Message>() + MESSAGE_HEADER;
/// The same for one that is kept out of turn, under a tag of its own.
const EARLY_OVERHEAD: usize = 384;

#[derive(Default)]
struct Queue {
    messages: VecDeque<Message>,
    bytes: usize,
    written: u64,
    count: u64,
    ended: Option<PeerFault>,
}

/// One lane.
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

    fn push(&self, frame: Vec<Message>) -> Result<(), PeerFault> {
        let mut q = self.lock();
        // A frame larger than the whole buffer goes through alone: holding it back would be a deadlock.
        let payload: usize = frame.iter().map(|m| m.payload.len()).sum();
        let size = payload + frame.len() * OVERHEAD;
        while q.ended.is_none() && q.bytes > 0 && q.bytes + size > self.capacity {
            q = self.changed.wait(q).unwrap_or_else(PoisonError::into_inner);
        }
        if let Some(fault) = &q.ended {
            return Err(fault.clone());
        }
        q.bytes += size;
        q.written += (payload + frame.len() * MESSAGE_HEADER) as u64;
        q.count += frame.len() as u64;
        // Together: who answers one finds the others there as well, and answers them in the same frame.
        q.messages.extend(frame);
        drop(q);
        self.changed.notify_all();
        Ok(())
    }

    fn pop(&self, until: Deadline) -> Result<Message, PeerFault> {
        let mut q = self.lock();
        loop {
            if let Some(message) = q.messages.pop_front() {
                q.bytes -= message.payload.len() + OVERHEAD;
                drop(q);
                self.changed.notify_all();
                return Ok(message);
            }
            if let Some(fault) = &q.ended {
                return Err(fault.clone());
            }
            let left = until.at.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(PeerFault::Timeout(until.patience.as_millis() as u64));
            }
            q = self.changed.wait_timeout(q, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn end(&self, fault: PeerFault) {
        // The first reason is the cause.
        self.lock().ended.get_or_insert(fault);
        self.changed.notify_all();
    }
}

/// When the message asked for has to be there: others that trickle in meanwhile do not extend it.
#[derive(Clone, Copy)]
struct Deadline {
    at: Instant,
    patience: Duration,
}

impl Deadline {
    fn after(patience: Duration) -> Deadline {
        Deadline { at: Instant::now() + patience, patience }
    }
}

/// Messages that came before their turn, by tag.
#[derive(Default)]
struct Early {
    messages: HashMap<u64, VecDeque<Message>>,
    bytes: usize,
    count: usize,
}

/// One end's inbox.
pub struct Inbox {
    pipes: [Pipe; 2],
    early: [Mutex<Early>; 2],
    /// More out-of-turn bytes than this is a fault of the peer.
    early_limit: usize,
    /// Bytes that were taken out of the ahead lane, as [`Inbox::pushed`] counts.
    ahead_taken: AtomicU64,
}

fn index(lane: Lane) -> usize {
    match lane {
        Lane::Online => 0,
        Lane::Ahead => 1,
    }
}

impl Inbox {
    /// Lanes of `online_capacity` and `ahead_capacity` bytes, plus at most twice the latter that came out of turn (a batch of
    /// run-ahead slots arrives operation by operation and is consumed slot by slot).
    #[must_use]
    pub fn new(online_capacity: usize, ahead_capacity: usize) -> Self {
        Inbox {
            pipes: [Pipe::new(online_capacity), Pipe::new(ahead_capacity)],
            early: Default::default(),
            early_limit: early_limit(ahead_capacity),
            ahead_taken: AtomicU64::new(0),
        }
    }

    /// Appends what has arrived; blocks while the lane is full.
    ///
    /// # Errors
    /// Why the inbox has ended.
    pub fn push(&self, lane: Lane, frame: Vec<Message>) -> Result<(), PeerFault> {
        self.pipes[index(lane)].push(frame)
    }

    /// See [`super::Channel::ready`].
    #[must_use]
    pub fn ready(&self, lane: Lane, tag: u64) -> bool {
        let here = |m: &Message| m.not_before.is_none_or(|at| at <= Instant::now());
        let i = index(lane);
        let early = self.early[i].lock().unwrap_or_else(PoisonError::into_inner);
        match early.messages.get(&tag).and_then(VecDeque::front) {
            Some(message) => here(message),
            None => self.pipes[i].lock().messages.iter().find(|m| m.tag == tag).is_some_and(here),
        }
    }

    /// See [`super::Channel::recv`].
    ///
    /// # Errors
    /// Those of [`super::Channel::recv`].
    pub fn recv(&self, lane: Lane, tag: u64, len: usize, timeout: Duration) -> Result<Message, PeerFault> {
        let i = index(lane);
        let mut early = self.early[i].lock().unwrap_or_else(PoisonError::into_inner);
        let found = early.messages.get_mut(&tag).and_then(VecDeque::pop_front);
        let message = if let Some(message) = found {
            early.bytes -= message.payload.len();
            early.count -= 1;
            if early.messages.get(&tag).is_some_and(VecDeque::is_empty) {
                early.messages.remove(&tag);
            }
            message
        } else {
            let deadline = Deadline::after(timeout);
            loop {
                let message = self.pipes[i].pop(deadline)?;
                if message.tag == tag {
                    break message;
                }
                early.bytes += message.payload.len();
                early.count += 1;
                // Empty messages take memory as well.
                if early.bytes + early.count * EARLY_OVERHEAD > self.early_limit {
                    return Err(PeerFault::Flood(self.early_limit));
                }
                early.messages.entry(message.tag).or_default().push_back(message);
            }
        };
        if message.payload.len() != len {
            return Err(PeerFault::Length { want: len, got: message.payload.len() });
        }
        if lane == Lane::Ahead {
            self.ahead_taken.fetch_add((len + MESSAGE_HEADER) as u64, Relaxed);
        }
        Ok(message)
    }

    /// See [`super::Channel::drain`].
    ///
    /// # Errors
    /// Those of [`super::Channel::drain`].
    pub fn drain(&self, lane: Lane, tag: u64, len: usize, timeout: Duration) -> Result<(Message, u64), PeerFault> {
        let i = index(lane);
        let mut early = self.early[i].lock().unwrap_or_else(PoisonError::into_inner);
        let mut found = early.messages.remove(&tag).and_then(|mut q| q.pop_front());
        let mut dropped = (early.bytes - found.as_ref().map_or(0, |f| f.payload.len())) as u64;
        let mut taken = early.bytes + early.count * MESSAGE_HEADER;
        *early = Early::default();
        let deadline = Deadline::after(timeout);
        while found.is_none() {
            let message = self.pipes[i].pop(deadline)?;
            taken += message.payload.len() + MESSAGE_HEADER;
            if message.tag == tag {
                found = Some(message);
            } else {
                dropped += message.payload.len() as u64;
            }
        }
        if lane == Lane::Ahead {
            self.ahead_taken.fetch_add(taken as u64, Relaxed);
        }
        match found {
            Some(message) if message.payload.len() == len => Ok((message, dropped)),
            Some(message) => Err(PeerFault::Length { want: len, got: message.payload.len() }),
            None => Err(PeerFault::Closed),
        }
    }

    /// Nothing more will come, and why; what has arrived can still be taken.
    pub fn end(&self, fault: &PeerFault) {
        self.pipes.iter().for_each(|p| p.end(fault.clone()));
    }

    /// Messages that were ever pushed, both lanes.
    #[must_use]
    pub fn messages(&self) -> u64 {
        self.pipes.iter().map(|p| p.lock().count).sum()
    }

    /// Why the online lane has ended, waiting up to `limit` for it to end.
    #[must_use]
    pub fn ended_within(&self, limit: Duration) -> Option<PeerFault> {
        let pipe = &self.pipes[0];
        let wait = pipe.changed.wait_timeout_while(pipe.lock(), limit, |q| q.ended.is_none());
        wait.unwrap_or_else(PoisonError::into_inner).0.ended.clone()
    }

    /// Run-ahead bytes that have arrived and not been used yet.
    #[must_use]
    pub fn ahead_held(&self) -> u64 {
        let pushed = self.pushed()[1];
        pushed.saturating_sub(self.ahead_taken.load(Relaxed))
    }

    /// Bytes that were ever pushed, message headers included, per lane (online, ahead).
    #[must_use]
    pub fn pushed(&self) -> [u64; 2] {
        [self.pipes[0].lock().written, self.pipes[1].lock().written]
    }
}

/// The most bytes that are kept out of turn, and the longest single message that is taken from a network.
#[must_use]
pub fn early_limit(ahead_capacity: usize) -> usize {
    ahead_capacity.saturating_mul(2).max(1 << 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn empty(tag: u64) -> Message {
        Message { tag, depth: 0, not_before: None, payload: Vec::new() }
    }

    #[test]
    fn empty_messages_fill_a_lane() {
        let inbox = std::sync::Arc::new(Inbox::new(1 << 20, 10_000));
        let sender = std::thread::spawn({
            let inbox = std::sync::Arc::clone(&inbox);
            move || (0..100_000).take_while(|&i| inbox.push(Lane::Ahead, vec![empty(i)]).is_ok()).count()
        });
        std::thread::sleep(Duration::from_millis(100));
        inbox.end(&PeerFault::Closed);
        assert!(sender.join().unwrap() < 10_000 / MESSAGE_HEADER);
        // Out of turn they are a flood long before they take much memory.
        let inbox = Inbox::new(usize::MAX, 1);
        (0..10_000).for_each(|i| inbox.push(Lane::Online, vec![empty(i)]).unwrap());
        assert!(matches!(inbox.recv(Lane::Online, 1 << 40, 0, Duration::from_secs(1)), Err(PeerFault::Flood(_))));
    }
}
