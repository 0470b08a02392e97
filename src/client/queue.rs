//! Requests that wait for a session: bounded, and fair between callers. Each caller's requests are served in their order, and
//! callers take turns, so that nobody who sends many keeps another from being served.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Whose turn it is, and what waits.
struct Waiting<T> {
    /// Callers in the order of their turns; none without a request.
    callers: VecDeque<(u64, VecDeque<T>)>,
    count: usize,
    closed: bool,
}

/// A bounded queue with a line for each caller.
pub(super) struct Queue<T> {
    waiting: Mutex<Waiting<T>>,
    changed: Condvar,
    limit: usize,
}

/// Why a request was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refused {
    /// As many wait as may.
    Full,
    /// Nothing is served any more.
    Closed,
}

impl<T> Queue<T> {
    pub fn new(limit: usize) -> Self {
        let waiting = Waiting { callers: VecDeque::new(), count: 0, closed: false };
        Queue { waiting: Mutex::new(waiting), changed: Condvar::new(), limit }
    }

    fn lock(&self) -> MutexGuard<'_, Waiting<T>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts `item` at the end of the caller's line.
    pub fn push(&self, caller: u64, item: T) -> Result<(), Refused> {
        let mut w = self.lock();
        if w.closed {
            return Err(Refused::Closed);
        }
        if w.count >= self.limit {
            return Err(Refused::Full);
        }
        w.count += 1;
        match w.callers.iter_mut().find(|(c, _)| *c == caller) {
            Some((_, line)) => line.push_back(item),
            None => w.callers.push_back((caller, VecDeque::from([item]))),
        }
        self.changed.notify_one();
        Ok(())
    }

    /// The next one; waits for it. `None` once the queue is closed and empty.
    pub fn next(&self) -> Option<T> {
        let mut w = self.lock();
        loop {
            if let Some((caller, mut line)) = w.callers.pop_front() {
                let item = line.pop_front();
                if !line.is_empty() {
                    // Behind everybody else.
                    w.callers.push_back((caller, line));
                }
                w.count -= 1;
                return item;
            }
            if w.closed {
                return None;
            }
            w = self.changed.wait(w).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Takes nothing more; what waits is still given out.
    pub fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    /// Drops what `keep` does not want: callers that have gone away hold no place.
    pub fn retain(&self, mut keep: impl FnMut(&T) -> bool) {
        let mut w = self.lock();
        w.callers.iter_mut().for_each(|(_, line)| line.retain(&mut keep));
        w.callers.retain(|(_, line)| !line.is_empty());
        w.count = w.callers.iter().map(|(_, line)| line.len()).sum();
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.lock().count
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn callers_take_turns() {
        let q = Queue::new(8);
        for (caller, item) in [(1, "a1"), (1, "a2"), (1, "a3"), (2, "b1"), (3, "c1"), (2, "b2")] {
            q.push(caller, item).unwrap();
        }
        q.close();
        let order: Vec<_> = std::iter::from_fn(|| q.next()).collect();
        assert_eq!(order, ["a1", "b1", "c1", "a2", "b2", "a3"]);
        assert_eq!(q.push(1, "late"), Err(Refused::Closed));
    }

    #[test]
    fn no_more_than_the_limit_wait() {
        let q = Queue::new(2);
        q.push(1, 1).unwrap();
        q.push(2, 2).unwrap();
        assert_eq!(q.push(3, 3), Err(Refused::Full));
        q.retain(|&item| item != 1);
        assert_eq!(q.len(), 1);
        q.push(3, 3).unwrap();
        assert_eq!((q.next(), q.next()), (Some(2), Some(3)));
    }
}
