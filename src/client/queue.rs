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

impl<T> Waiting<T> {
    /// The longest line, if it is longer than the caller's would be.
    fn yielding(&self, caller: u64) -> Option<usize> {
        let own = self.callers.iter().find(|(c, _)| *c == caller).map_or(0, |(_, line)| line.len());
        let (place, (_, longest)) = self.callers.iter().enumerate().max_by_key(|(_, (_, line))| line.len())?;
        (longest.len() > own + 1).then_some(place)
    }
}

/// A bounded queue with a line for each caller.
pub(super) struct Queue<T> {
    waiting: Mutex<Waiting<T>>,
    changed: Condvar,
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
    pub fn new() -> Self {
        let waiting = Waiting { callers: VecDeque::new(), count: 0, closed: false };
        Queue { waiting: Mutex::new(waiting), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, Waiting<T>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts `item` at the end of the caller's line, if no more than `limit` then wait. Where they do, the last of the longest line
    /// has to go for a caller with a shorter one, and is returned: nobody fills the queue for all others.
    pub fn push(&self, caller: u64, item: T, limit: usize) -> Result<Option<T>, Refused> {
        let mut w = self.lock();
        if w.closed {
            return Err(Refused::Closed);
        }
        let mut gone = None;
        if w.count >= limit {
            let place = w.yielding(caller).ok_or(Refused::Full)?;
            gone = w.callers.get_mut(place).and_then(|(_, line)| line.pop_back());
            w.count -= 1;
        }
        w.count += 1;
        match w.callers.iter_mut().find(|(c, _)| *c == caller) {
            Some((_, line)) => line.push_back(item),
            None => w.callers.push_back((caller, VecDeque::from([item]))),
        }
        self.changed.notify_one();
        Ok(gone)
    }

    /// Whether [`Queue::push`] would refuse: known before the work of reading a request.
    pub fn full(&self, caller: u64, limit: usize) -> bool {
        let w = self.lock();
        w.count >= limit && w.yielding(caller).is_none()
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
        let q = Queue::new();
        for (caller, item) in [(1, "a1"), (1, "a2"), (1, "a3"), (2, "b1"), (3, "c1"), (2, "b2")] {
            q.push(caller, item, 8).unwrap();
        }
        q.close();
        let order: Vec<_> = std::iter::from_fn(|| q.next()).collect();
        assert_eq!(order, ["a1", "b1", "c1", "a2", "b2", "a3"]);
        assert_eq!(q.push(1, "late", 8), Err(Refused::Closed));
    }

    #[test]
    fn no_more_than_the_limit_wait() {
        let q = Queue::new();
        q.push(1, 1, 2).unwrap();
        q.push(2, 2, 2).unwrap();
        assert!(q.full(3, 2) && !q.full(3, 3));
        assert_eq!(q.push(3, 3, 2), Err(Refused::Full));
        q.retain(|&item| item != 1);
        assert_eq!(q.len(), 1);
        q.push(3, 3, 2).unwrap();
        assert_eq!((q.next(), q.next()), (Some(2), Some(3)));
    }

    #[test]
    fn a_full_queue_has_room_for_who_waits_less() {
        let q = Queue::new();
        (0..4).for_each(|i| assert_eq!(q.push(1, i, 4), Ok(None)));
        assert!(q.full(1, 4) && !q.full(2, 4));
        // The last of the first caller's goes, twice; then both have as many.
        assert_eq!(q.push(2, 10, 4), Ok(Some(3)));
        assert_eq!(q.push(2, 11, 4), Ok(Some(2)));
        assert_eq!(q.push(2, 12, 4), Err(Refused::Full));
        assert_eq!(q.push(1, 4, 4), Err(Refused::Full));
        assert_eq!(std::iter::from_fn(|| q.next()).take(4).collect::<Vec<_>>(), [0, 10, 1, 11]);
    }
}
