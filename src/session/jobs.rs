//! What a pass that was walked ahead still has to do online, between the thread that walks and the one that answers.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::error::{Error, Result};
use crate::net::{Lane, Links};

/// The error of an online thread whose walker has ended with an error of its own.
pub const WALK_ENDED: &str = "the run-ahead thread ended early";

/// What to do online for a pass that was walked ahead.
pub type Job = Box<dyn FnOnce(&Links) -> Result<()> + Send>;

/// A layer leaves no more jobs than this in a pass. A block of a prompt that goes through attention in blocks leaves 11 or more: so
/// many jobs are of [`BLOCKS_PER_LAYER`] blocks at most.
pub(super) const JOBS_PER_LAYER: usize = 40;
/// Jobs of a layer that there is one of for each piece of a prompt ([`crate::protocol::pieces`]).
pub(super) const JOBS_IN_PIECES: usize = 16;
/// Blocks whose jobs wait at most while a prompt goes through attention in blocks.
pub const BLOCKS_PER_LAYER: usize = 4;
/// How many layers the walk of a single pass runs ahead of its answers.
pub const JOBS_AHEAD_LAYERS: usize = 2;

#[derive(Default)]
struct Queued {
    passes: BTreeMap<u64, (VecDeque<Job>, bool)>,
    ended: bool,
    /// Nobody runs what the walker still leaves: the request has come to its end, and the walk has not.
    abandoned: bool,
}

/// What comes next in a pass.
enum Next {
    Job(Job),
    /// The walker has not left it yet.
    Wait,
    /// All has been done.
    Complete,
    /// Nothing more will come, though the pass is not complete.
    Ended,
}

impl Queued {
    fn has_room(&self, pass: u64, limit: usize) -> bool {
        self.ended || self.abandoned || self.passes.get(&pass).is_none_or(|(jobs, _)| jobs.len() < limit)
    }

    fn next(&mut self, pass: u64) -> Next {
        if let Some((jobs, complete)) = self.passes.get_mut(&pass) {
            if let Some(job) = jobs.pop_front() {
                return Next::Job(job);
            }
            if *complete {
                self.passes.remove(&pass);
                return Next::Complete;
            }
        }
        if self.ended { Next::Ended } else { Next::Wait }
    }
}

/// Jobs by pass, in program order. Filled by the walker, emptied by the online thread.
#[derive(Clone, Default)]
pub struct JobQueue(Arc<(Mutex<Queued>, Condvar)>);

impl JobQueue {
    fn lock(&self) -> MutexGuard<'_, Queued> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with<T>(&self, f: impl FnOnce(&mut Queued) -> T) -> T {
        let out = f(&mut self.lock());
        self.0.1.notify_all();
        out
    }

    pub(super) fn push(&self, pass: u64, job: Job) {
        self.with(|q| {
            if !q.abandoned {
                q.passes.entry(pass).or_default().0.push_back(job);
            }
        });
    }

    /// Whether a pass that is walked by itself has fewer jobs waiting than `limit`, or nobody will run them.
    pub(super) fn has_room(&self, pass: u64, limit: usize) -> bool {
        self.lock().has_room(pass, limit)
    }

    /// Blocks until it [has](JobQueue::has_room): what jobs captured is memory, of a long prompt a great deal. Nothing waits for this walk
    /// in turn: all that the jobs' own steps need of it has been sent.
    pub(super) fn wait_room(&self, pass: u64, limit: usize) {
        let mut q = self.lock();
        while !q.has_room(pass, limit) {
            q = self.0.1.wait(q).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// No more jobs will come for this pass.
    pub fn complete(&self, pass: u64) {
        self.with(|q| {
            if !q.abandoned {
                q.passes.entry(pass).or_default().1 = true;
            }
        });
    }

    /// No more jobs will come at all, and nobody will run those that are left.
    pub fn end(&self) {
        self.with(|q| {
            q.ended = true;
        });
    }

    /// Runs all jobs of `pass` in order, waiting for those not yet there. What they gathered leaves before each wait, and at the end.
    ///
    /// # Errors
    /// The first job's error; [`Error::Internal`] if the walker ended early.
    pub fn run_pass(&self, pass: u64, links: &Links) -> Result<()> {
        loop {
            let next = match self.lock().next(pass) {
                Next::Wait => None,
                next => Some(next),
            };
            let next = match next {
                Some(next) => next,
                None => {
                    links.flush(Lane::Online)?;
                    let mut q = self.lock();
                    loop {
                        match q.next(pass) {
                            Next::Wait => q = self.0.1.wait(q).unwrap_or_else(PoisonError::into_inner),
                            next => break next,
                        }
                    }
                }
            };
            match next {
                Next::Job(job) => {
                    self.0.1.notify_all();
                    job(links)?;
                }
                Next::Complete => {
                    self.0.1.notify_all();
                    return links.flush(Lane::Online);
                }
                Next::Wait | Next::Ended => return Err(Error::Internal(WALK_ENDED.into())),
            }
        }
    }

    /// No more jobs will be run until [`JobQueue::discard`]: a walker that waits for the queue to shrink goes on, to its batch's end, where
    /// it notices that it should stop; what it leaves until then is dropped. `ended` if for good.
    pub fn release(&self, ended: bool) {
        self.with(|q| {
            q.passes.clear();
            q.abandoned = true;
            q.ended |= ended;
        });
    }

    /// Blocks while more than `limit` walked passes wait to be run. Returns `false` once the queue has ended.
    #[must_use]
    pub fn wait_below(&self, limit: usize) -> bool {
        let mut q = self.lock();
        while !q.ended && q.passes.len() > limit {
            q = self.0.1.wait(q).unwrap_or_else(PoisonError::into_inner);
        }
        !q.ended
    }

    /// Drops the jobs of passes that will never run, once their walk has ended: the next request's will be run.
    pub fn discard(&self) {
        self.with(|q| {
            q.passes.clear();
            q.abandoned = false;
        });
    }
}

/// Ends a queue if the walking thread panics, so that its online thread does not wait for jobs that will never come.
pub struct EndOnPanic(pub JobQueue);

impl Drop for EndOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.end();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_walk_that_nobody_answers_comes_to_its_end() {
        let queue = JobQueue::default();
        let (ended, end) = channel();
        let walker = {
            let queue = queue.clone();
            move || {
                for _ in 0..10 {
                    queue.wait_room(7, 3);
                    queue.push(7, Box::new(|_| Ok(())));
                }
                ended.send(()).unwrap();
            }
        };
        std::thread::scope(|scope| {
            scope.spawn(walker);
            // It waits for room: nobody has run anything.
            assert!(end.recv_timeout(Duration::from_millis(50)).is_err());
            queue.release(false);
            let over = end.recv_timeout(Duration::from_secs(20));
            queue.end();
            over.expect("the walk goes on after the release, beyond the limit too");
        });
        let waiting = |queue: &JobQueue| queue.with(|q| q.passes.values().map(|(jobs, _)| jobs.len()).sum::<usize>());
        assert_eq!(waiting(&queue), 0, "what nobody will run is not kept");
        queue.discard();
        queue.push(8, Box::new(|_| Ok(())));
        assert_eq!(waiting(&queue), 1, "the next request's are");
    }
}
