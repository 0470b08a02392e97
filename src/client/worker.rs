//! The threads that answer requests, one after another, each in a session that is open, or is opened for it.

use std::sync::atomic::Ordering::Relaxed;
use std::sync::{MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::request::{End, Event, Failure, Prompt};
use super::session::{Open, View};
use super::text::Speaker;
use super::watch::{Latest, Newest, Watch, add};
use super::{Inner, Job};
use crate::error::{Error, Result};
use crate::generate::Stop;

/// How long a request waits for a session.
const PATIENCE: Duration = Duration::from_secs(6);
const PAUSE: Duration = Duration::from_millis(250);

/// An open session and its number among those that are watched.
pub(super) struct Seat {
    open: Open,
    number: u64,
}

impl Inner {
    pub(super) fn watch(&self) -> MutexGuard<'_, Watch> {
        self.watch.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a session is open whose links have not ended.
    pub(super) fn healthy(&self) -> bool {
        self.watch().open.values().any(|view| !view.broken())
    }

    pub(super) fn encode(&self, prompt: &Prompt) -> Result<Vec<u32>, Failure> {
        Ok(match prompt {
            Prompt::Text(text) => self.codec.encode(text)?,
            Prompt::Tokens(ids) => {
                let wrong = |_| {
                    let most = self.facts.config.vocab_size;
                    Failure::Invalid(format!("the prompt has a token outside of the model's vocabulary of {most}"))
                };
                self.facts.config.check_ids(ids).map_err(wrong)?;
                ids.clone()
            }
            Prompt::Chat(messages) => {
                let template = self.template.as_ref().map_err(|why| {
                    Failure::Invalid(format!(
                        "this model has no chat template ({why}): it continues text, use /v1/completions"
                    ))
                })?;
                // The template writes begin and end tokens itself.
                self.codec.encode_plain(&template.render(messages, true).map_err(Failure::Invalid)?)?
            }
        })
    }

    pub(super) fn opened(&self, open: Open) -> Seat {
        let number = self.sessions.fetch_add(1, Relaxed);
        self.watch().open.insert(number, open.view());
        Seat { open, number }
    }

    /// Gives a session up; its traffic stays in the sums.
    fn leave(&self, seat: Seat) -> Open {
        // Closing links takes its time: not under the lock.
        let _views = {
            let mut watch = self.watch();
            let view = watch.open.remove(&seat.number);
            if let Some(view) = &view {
                add(&mut watch.links, view.links());
            }
            let newest = watch.newest.as_mut().filter(|n| n.number == seat.number).and_then(|n| {
                n.update();
                n.facts.running = false;
                n.view.take()
            });
            (view, newest)
        };
        seat.open
    }

    pub(super) fn idle(&self) -> MutexGuard<'_, Vec<Seat>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A worker: one request after another.
    pub(super) fn work(&self) {
        while let Some(job) = self.queue.next() {
            if job.out.is_closed() {
                continue;
            }
            self.busy.fetch_add(1, Relaxed);
            let mut seat = None;
            let served = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.serve(&mut seat, &job)));
            let spent = match served {
                Ok(Ok(())) => None,
                Ok(Err(failure)) => Some(failure),
                Err(_) => Some(Failure::Failed(Error::Internal("a request's thread panicked".into()))),
            };
            match (seat, spent) {
                (Some(seat), None) => self.idle().push(seat),
                (seat, failure) => {
                    let open = seat.map(|seat| self.leave(seat));
                    match (open, failure) {
                        (Some(open), Some(Failure::Failed(e))) => self.failed(&job, Failure::Failed(open.cause(e))),
                        (_, Some(failure)) => self.failed(&job, failure),
                        (_, None) => {}
                    }
                }
            }
            self.busy.fetch_sub(1, Relaxed);
        }
        let left = self.idle().pop();
        if let Some(seat) = left {
            // A peer that is gone has ended it already.
            let _ = self.leave(seat).finish();
        }
    }

    /// An open session: one that is idle, or a new one. Parties that are away, or have no place, are waited for a moment: they may be
    /// starting, or another request may end. Says whether it is new.
    fn seat(&self, job: &Job) -> Result<(Seat, bool), Failure> {
        let begun = Instant::now();
        loop {
            loop {
                let Some(seat) = self.idle().pop() else { break };
                let broken = self.watch().open.get(&seat.number).is_none_or(View::broken);
                if !broken {
                    return Ok((seat, false));
                }
                // A peer has ended it: it was idle too long, or the peer was started anew.
                drop(self.leave(seat));
            }
            match self.source.open() {
                Ok(open) => return Ok((self.opened(open), true)),
                Err(Error::Peer { .. }) if begun.elapsed() < PATIENCE && !job.out.is_closed() => {
                    std::thread::sleep(PAUSE);
                }
                Err(e @ Error::Peer { .. }) => return Err(Failure::Failed(e)),
                // Files or limits of this side: nothing that the caller could mend, or has to know.
                Err(e) => {
                    tracing::error!(code = e.code(), error = %e, "no session can be opened");
                    return Err(Failure::Unavailable);
                }
            }
        }
    }

    /// One request. On success the session in `seat` can be used again.
    fn serve(&self, seat: &mut Option<Seat>, job: &Job) -> Result<(), Failure> {
        {
            let totals = &mut self.watch().totals;
            totals.requests += 1;
            totals.prompt_tokens += job.prompt.len() as u64;
        }
        let mut again = true;
        loop {
            let (now, fresh) = self.seat(job)?;
            let now = seat.insert(now);
            let mut said = false;
            match self.answer(now, job, &mut said) {
                // Of a session that was idle for a while the first request finds out that it is broken.
                Err(Error::Peer { .. }) if !fresh && !said && again => {
                    again = false;
                    drop(seat.take().map(|seat| self.leave(seat)));
                }
                // What is wrong with the request leaves the session as it was.
                Err(e @ Error::Config(_)) => {
                    self.failed(job, Failure::Invalid(e.to_string()));
                    return Ok(());
                }
                other => return other.map_err(Failure::Failed),
            }
        }
    }

    fn failed(&self, job: &Job, failure: Failure) {
        let totals = &mut self.watch().totals;
        if job.out.is_closed() {
            totals.abandoned += 1;
            return;
        }
        totals.failed += 1;
        match &failure {
            Failure::Failed(e) => tracing::warn!(code = e.code(), error = %e, "a request failed"),
            other => tracing::warn!(error = %other, "a request failed"),
        }
        let _ = job.out.send(Err(failure));
    }

    /// Runs the request in an open session; `said` once a token has come.
    fn answer(&self, seat: &mut Seat, job: &Job, said: &mut bool) -> Result<()> {
        let mut speaker = Speaker::new(&self.codec, &job.prompt, &self.facts.config.eos_ids, &job.stop)?;
        let Some(view) = self.watch().open.get(&seat.number).cloned() else {
            return Err(Error::Internal("a session that nobody watches".into()));
        };
        self.begin(seat.number, view, job);
        let (mut stopped, mut broken) = (false, None);
        let mut on_token = |id: u32| {
            *said = true;
            self.token(seat.number);
            match speaker.token(id) {
                Ok((piece, end)) => {
                    stopped = end;
                    let heard = if piece.is_empty() {
                        !job.out.is_closed()
                    } else {
                        job.out.send(Ok(Event::Text(piece))).is_ok()
                    };
                    heard && !end
                }
                Err(e) => {
                    broken = Some(e);
                    false
                }
            }
        };
        let out = seat.open.generate(&job.prompt, job.max_tokens, (job.temperature, job.seed), &mut on_token);
        self.end(seat.number);
        let g = out?;
        if let Some(e) = broken {
            self.failed(job, Failure::Failed(e));
            return Ok(());
        }
        if job.out.is_closed() {
            self.watch().totals.abandoned += 1;
            return Ok(());
        }
        if !stopped {
            let (rest, end) = speaker.finish()?;
            stopped = end;
            if !rest.is_empty() {
                let _ = job.out.send(Ok(Event::Text(rest)));
            }
        }
        let end = End {
            stopped: stopped || g.stop == Stop::EndToken,
            prompt_tokens: job.prompt.len(),
            completion_tokens: g.tokens.len(),
            prefill: g.prefill,
            decode: g.decode.iter().sum(),
        };
        let _ = job.out.send(Ok(Event::Done(end)));
        Ok(())
    }

    fn begin(&self, number: u64, view: View, job: &Job) {
        let now = Instant::now();
        view.forget_samples();
        let base = (view.links(), view.time());
        let facts = Latest { running: true, prompt_tokens: job.prompt.len(), ..Latest::default() };
        let caller = job.caller;
        let newest = Newest { number, caller, view: Some(view), base, begun: now, first: None, last: now, facts };
        // What the one before held may take its time to close: not under the lock.
        let before = self.watch().newest.replace(newest);
        drop(before);
    }

    fn token(&self, number: u64) {
        let mut watch = self.watch();
        watch.totals.completion_tokens += 1;
        if let Some(n) = watch.newest.as_mut().filter(|n| n.number == number) {
            n.last = Instant::now();
            n.first.get_or_insert(n.last);
            n.facts.completion_tokens += 1;
        }
    }

    fn end(&self, number: u64) {
        if let Some(n) = self.watch().newest.as_mut().filter(|n| n.number == number && n.facts.running) {
            n.update();
            n.facts.running = false;
        }
    }
}
