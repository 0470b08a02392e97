//! The adversary of the tests: records what a party receives, or changes what it sends.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::{Abort, Channel, Lane, Message};
use crate::error::PeerFault;
use crate::party::Role;

/// What a receiver saw: lane, tag and bytes, in order of reception.
pub type View = Arc<Mutex<Vec<(Lane, u64, Vec<u8>)>>>;

/// What happens to a message on its way out; `None` drops it.
pub type Rewrite = Arc<dyn Fn(Lane, Message) -> Option<Message> + Send + Sync>;

/// What is put between a party and its link to a peer.
pub type Wrap = Arc<dyn Fn(Role, Arc<dyn Channel>) -> Arc<dyn Channel> + Send + Sync>;

/// A channel under the eyes, or in the hands, of a test.
pub struct Tampered<C> {
    inner: C,
    view: Option<View>,
    rewrite: Option<Rewrite>,
}

impl<C: Channel> Tampered<C> {
    /// Changes nothing, records into `view` if there is one, rewrites outgoing messages if told how.
    pub fn new(inner: C, view: Option<View>, rewrite: Option<Rewrite>) -> Self {
        Tampered { inner, view, rewrite }
    }
}

impl<C: Channel> Channel for Tampered<C> {
    fn stamp(&self, lane: Lane, message: &mut Message) {
        self.inner.stamp(lane, message);
    }

    fn send_frame(&self, lane: Lane, mut frame: Vec<Message>) -> Result<(), PeerFault> {
        if let Some(rewrite) = &self.rewrite {
            frame = frame.into_iter().filter_map(|message| rewrite(lane, message)).collect();
        }
        if frame.is_empty() { Ok(()) } else { self.inner.send_frame(lane, frame) }
    }

    fn gathers(&self) -> bool {
        self.inner.gathers()
    }

    fn ready(&self, lane: Lane, tag: u64) -> bool {
        self.inner.ready(lane, tag)
    }

    fn recv(&self, lane: Lane, tag: u64, len: usize, timeout: Duration) -> Result<Message, PeerFault> {
        let message = self.inner.recv(lane, tag, len, timeout)?;
        if let Some(view) = &self.view {
            view.lock().unwrap_or_else(PoisonError::into_inner).push((lane, tag, message.payload.clone()));
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
