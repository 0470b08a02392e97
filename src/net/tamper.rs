//! The adversary of the tests: records what a party receives, or changes what it sends.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::{Abort, Channel, Frame, Lane};
use crate::error::PeerFault;
use crate::party::Role;

/// What a receiver saw: lane, tag and bytes, in order of reception.
pub type View = Arc<Mutex<Vec<(Lane, u64, Vec<u8>)>>>;

/// What happens to a frame on its way out; `None` drops it.
pub type Rewrite = Arc<dyn Fn(Lane, Frame) -> Option<Frame> + Send + Sync>;

/// What is put between a party and its link to a peer.
pub type Wrap = Arc<dyn Fn(Role, Arc<dyn Channel>) -> Arc<dyn Channel> + Send + Sync>;

/// A channel under the eyes, or in the hands, of a test.
pub struct Tampered<C> {
    inner: C,
    view: Option<View>,
    rewrite: Option<Rewrite>,
}

impl<C: Channel> Tampered<C> {
    /// Changes nothing, records into `view` if there is one, rewrites outgoing frames if told how.
    pub fn new(inner: C, view: Option<View>, rewrite: Option<Rewrite>) -> Self {
        Tampered { inner, view, rewrite }
    }
}

impl<C: Channel> Channel for Tampered<C> {
    fn send(&self, lane: Lane, frame: Frame) -> Result<(), PeerFault> {
        match &self.rewrite {
            None => self.inner.send(lane, frame),
            Some(rewrite) => rewrite(lane, frame).map_or(Ok(()), |f| self.inner.send(lane, f)),
        }
    }

    fn recv(&self, lane: Lane, tag: u64, len: usize, timeout: Duration) -> Result<Frame, PeerFault> {
        let frame = self.inner.recv(lane, tag, len, timeout)?;
        if let Some(view) = &self.view {
            view.lock().unwrap_or_else(PoisonError::into_inner).push((lane, tag, frame.payload.clone()));
        }
        Ok(frame)
    }

    fn drain(&self, lane: Lane, tag: u64, len: usize, timeout: Duration) -> Result<(Frame, u64), PeerFault> {
        self.inner.drain(lane, tag, len, timeout)
    }

    fn ended(&self) -> bool {
        self.inner.ended()
    }

    fn end(&self, reason: Option<&Abort>) {
        self.inner.end(reason);
    }
}
