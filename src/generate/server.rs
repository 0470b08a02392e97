//! What Owner and Helper do for a session: serve requests until the Client ends it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::time::Duration;

use super::verify::{self, Progress};
use super::{REQUEST_BYTES, Request, WALKED_BYTES, control, end_walk, request_scope, walk, worst};
use crate::error::{Error, Result};
use crate::model::secure::{PassOptions, SecureModel};
use crate::net::Lane;
use crate::party::Role;
use crate::protocol::gumbel::Gumbel;
use crate::session::{EndOnPanic, Session, WALK_ENDED};
use crate::world::join;

/// What the Owner saw of a session.
#[derive(Clone, Debug, Default)]
pub struct OwnerReport {
    /// Sequential online messages of each private layer in the last decode pass (or the prefill, if there was none).
    pub layer_messages: Vec<u32>,
    /// Passes that were walked ahead and not used.
    pub discarded_passes: u64,
    /// Run-ahead bytes that were dropped with them.
    pub discarded_bytes: u64,
    /// Requests served.
    pub requests: u64,
    /// Tokens given out.
    pub tokens: u64,
}

/// What a server grants a session.
#[derive(Clone, Copy, Debug)]
pub struct Grant {
    /// How long it waits for the next request.
    pub idle: Duration,
    /// The longest prompt, in tokens.
    pub prompt: usize,
    /// Whether the logits may be opened to the Client, which are more than the tokens.
    pub open_logits: bool,
}

impl Grant {
    /// For a process that plays all three parties.
    #[must_use]
    pub fn all(idle: Duration) -> Grant {
        Grant { idle, prompt: usize::MAX, open_logits: true }
    }
}

/// The Owner's side of a session.
///
/// # Errors
/// [`crate::Error::Peer`] with the peer that failed.
pub fn owner(s: &mut Session, model: &SecureModel, grant: &Grant) -> Result<OwnerReport> {
    let mut report = OwnerReport::default();
    let mut next_pass = 0;
    for index in 0.. {
        let step = request_scope().address(index, "request.open");
        let bytes = s.links().within(grant.idle).recv(Role::Client, Lane::Online, &step, REQUEST_BYTES)?;
        let r = Request::decode(&bytes, model, next_pass, grant, &step)?;
        if r.prompt == 0 {
            break;
        }
        let mut cache = model.cache(r.positions());
        let mut noise = Gumbel::new(r.seed, r.temperature);
        let mut progress = Progress::new(&r);
        let (mut used, mut given) = (0, 0);
        let mut tokens = r.prompt as usize;
        loop {
            s.begin(r.first_pass + used, &[tokens]);
            let mut depths = Vec::new();
            // A rejected draft's noise is used again: by the token that is given out in its place.
            noise.seek(given);
            let options = PassOptions {
                ports: None,
                noise: Some(&mut noise),
                open_logits: r.open_logits,
                every: used > 0 && progress.is_some(),
                depths: Some(&mut depths),
            };
            model.pass(s, &mut cache, options)?;
            s.end_batch()?;
            report.layer_messages = depths.windows(2).map(|d| d[1] - d[0]).collect();
            used += 1;
            let pass = r.first_pass + used;
            match &mut progress {
                None => {
                    given = used;
                    if used == u64::from(r.max_new) || !control(s.links(), pass)? {
                        break;
                    }
                    tokens = 1;
                }
                Some(progress) => {
                    let next = verify::hear(s.links(), pass, progress)?;
                    given = progress.given() as u64;
                    let Some(next) = next else { break };
                    cache.truncate(next.keep);
                    tokens = next.tokens;
                }
            }
        }
        report.requests += 1;
        report.tokens += given;
        s.answered(given);
        next_pass = r.first_pass;
        for from in [Role::Client, Role::Helper] {
            let step = request_scope().address(index, "request.walked");
            let (walked, dropped) = s.links().drain(from, Lane::Ahead, &step, WALKED_BYTES)?;
            let walked = walked.try_into().map(u64::from_le_bytes).unwrap_or(0);
            next_pass = next_pass.max(r.first_pass.saturating_add(walked));
            report.discarded_bytes += dropped;
            if from == Role::Client {
                report.discarded_passes += walked.saturating_sub(used);
            }
        }
    }
    Ok(report)
}

/// The Helper's side of a session.
///
/// # Errors
/// [`crate::Error::Peer`] with the peer that failed.
pub fn helper(s: &mut Session, model: &SecureModel, grant: &Grant) -> Result<()> {
    let mut next_pass = 0;
    let (jobs, links) = (s.jobs(), s.links().clone());
    for index in 0.. {
        let step = request_scope().address(index, "request.open");
        let bytes = links.within(grant.idle).recv(Role::Client, Lane::Online, &step, REQUEST_BYTES)?;
        let r = Request::decode(&bytes, model, next_pass, grant, &step)?;
        if r.prompt == 0 {
            break;
        }
        let stop = AtomicBool::new(false);
        let (decide, decided) = channel();
        let walked = std::thread::scope(|scope| {
            let (s, r, stop) = (&mut *s, &r, &stop);
            let walker = scope.spawn(move || {
                let _guard = EndOnPanic(s.jobs());
                let out = match r.drafts {
                    0 => walk(s, model, r, None, stop),
                    _ => verify::walk(s, model, r, None, &decided),
                };
                let out = out.and_then(|n| end_walk(s, index, n).map(|()| n));
                if out.is_err() {
                    s.jobs().end();
                }
                out
            });
            let online = || -> Result<()> {
                if let Some(mut progress) = Progress::new(r) {
                    for pass in r.first_pass.. {
                        jobs.run_pass(pass, &links)?;
                        let Some(next) = verify::hear(&links, pass + 1, &mut progress)? else { break };
                        // All jobs of the pass are done: the walker may cut the cache that they have filled.
                        decide.send(next).map_err(|_| Error::Internal(WALK_ENDED.into()))?;
                    }
                    return Ok(());
                }
                for used in 0..u64::from(r.max_new) {
                    let pass = r.first_pass + used;
                    if used > 0 && !control(&links, pass)? {
                        break;
                    }
                    jobs.run_pass(pass, &links)?;
                }
                Ok(())
            };
            let online = online();
            drop(decide);
            stop.store(true, Ordering::Relaxed);
            jobs.release(online.is_err());
            if let Err(e) = &online {
                links.abort(e);
            }
            worst(join(walker), online)
        })?;
        jobs.discard();
        // How many tokens were given out is the Client's and the Owner's to count.
        s.answered(0);
        next_pass = r.first_pass + walked;
    }
    Ok(())
}
