//! Generation: what each party does for a request, and the three of them in one process.
//!
//! A request is a prefill pass over the prompt and one decode pass per further token. The Client announces it, gives an
//! input per pass and says before each decode pass whether to go on; Client and Helper walk the passes ahead in batches
//! that double up to a limit; what was walked beyond the end is discarded and counted.
//!
//! With drafts ([`Draft`]) a decode pass verifies several tokens at once, and no pass is walked ahead of the one before it: see
//! `verify.rs`, whose head says what that costs and discloses.

mod check;
mod client;
mod draft;
mod local;
mod server;
mod verify;

pub use check::{Check, check};
pub use client::{Client, Generation, Stop};
pub use draft::{Draft, Drafts, check_draft_tokens};
pub use local::{LinkReport, Local, LocalOptions};
pub use server::{Grant, OwnerReport, helper, owner};
pub use verify::MAX_DRAFTS;

use std::sync::atomic::{AtomicBool, Ordering};

pub use crate::model::preparation::split_layers;

use crate::error::{Error, PeerFault, Result};
use crate::model::secure::{ClientPorts, PassOptions, SecureModel};
use crate::net::{Lane, blame};
use crate::party::Role;
use crate::plan::cost::Cost;
use crate::session::{Scope, Session};

/// Largest batch of run-ahead passes.
pub const MAX_BATCH: usize = 16;
/// Most passes that have been walked, or are, and are not yet used.
pub const MAX_WAITING: usize = 2 * MAX_BATCH;

/// The size of the batch after one of `before` passes (0: the prompt's), if `room` passes fit the Owner's buffer.
#[must_use]
pub fn next_batch(before: usize, room: usize) -> usize {
    (2 * before).clamp(1, room.clamp(1, MAX_BATCH))
}

/// What the Client announces to Owner and Helper; all of it public to them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Request {
    /// Pass number of the prefill; larger than any used in the session before.
    pub first_pass: u64,
    /// Tokens of the prompt; 0 ends the session.
    pub prompt: u32,
    /// Most tokens to generate.
    pub max_new: u32,
    /// The logits are opened to the Client too.
    pub open_logits: bool,
    /// Sampling temperature; 0 is greedy.
    pub temperature: f64,
    /// Seed of the Owner's sampling noise; no key depends on it.
    pub seed: u64,
    /// Most drafts that a pass verifies; 0 for a request without drafts.
    pub drafts: u8,
}

const REQUEST_BYTES: usize = 34;
/// Of the number of passes walked.
const WALKED_BYTES: usize = 8;

impl Request {
    /// Ends the session.
    const END: Request =
        Request { first_pass: 0, prompt: 0, max_new: 0, open_logits: false, temperature: 0.0, seed: 0, drafts: 0 };

    /// Positions that it may compute: the answer's last token needs none.
    fn positions(&self) -> usize {
        (self.prompt as usize).saturating_add(self.max_new as usize).saturating_sub(1)
    }

    fn encode(&self) -> Vec<u8> {
        let mut b = self.first_pass.to_le_bytes().to_vec();
        b.extend(self.prompt.to_le_bytes());
        b.extend(self.max_new.to_le_bytes());
        b.push(u8::from(self.open_logits));
        b.extend(self.temperature.to_le_bytes());
        b.extend(self.seed.to_le_bytes());
        b.push(self.drafts);
        b
    }

    /// Parses and checks what the Client sent.
    fn decode(
        bytes: &[u8],
        model: &SecureModel,
        next_pass: u64,
        grant: &Grant,
        step: &crate::prf::Address,
    ) -> Result<Request> {
        let bad = |what| blame(Role::Client, step, PeerFault::Malformed(what));
        let word = |at: usize| -> Result<[u8; 8]> {
            bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).ok_or_else(|| bad("a short request"))
        };
        if bytes.len() != REQUEST_BYTES {
            return Err(bad("a request of another length"));
        }
        let half = u64::from_le_bytes(word(8)?);
        let r = Request {
            first_pass: u64::from_le_bytes(word(0)?),
            prompt: half as u32,
            max_new: (half >> 32) as u32,
            open_logits: bytes[16] == 1,
            temperature: f64::from_le_bytes(word(17)?),
            seed: u64::from_le_bytes(word(25)?),
            drafts: bytes[33],
        };
        if r.prompt == 0 {
            return Ok(r);
        }
        let longest = model.plan().longest_answer(r.prompt as usize);
        if bytes[16] > 1 || r.max_new == 0 || r.max_new as usize > longest {
            return Err(bad("a request beyond the model's context"));
        }
        if r.prompt as usize > grant.prompt {
            return Err(bad("a prompt longer than this server takes"));
        }
        if r.open_logits && !grant.open_logits {
            return Err(bad("a request for logits, which this server does not open"));
        }
        if r.first_pass < next_pass || r.first_pass > u64::MAX / 2 {
            return Err(bad("a pass number used before"));
        }
        if !(0.0..=crate::plan::MAX_TEMPERATURE).contains(&r.temperature) {
            return Err(bad("a temperature out of range"));
        }
        if usize::from(r.drafts) > MAX_DRAFTS {
            return Err(bad("more drafts for a pass than any request may have"));
        }
        Ok(r)
    }
}

/// What the messages around the passes cost: the announcement of a `request`, the word before each of `passes` decode
/// passes, and at the `end` where the run-ahead data ends.
#[must_use]
pub fn control_cost(request: bool, passes: u64, end: bool) -> Cost {
    let mut c = Cost::default();
    for to in [Role::Owner, Role::Helper] {
        if request {
            c = c.send(Role::Client, to, REQUEST_BYTES, 8);
        }
        for _ in 0..passes {
            c = c.send(Role::Client, to, 1, 8);
        }
    }
    if end {
        c = c.run_ahead(Role::Client, WALKED_BYTES, 8).run_ahead(Role::Helper, WALKED_BYTES, 8);
    }
    c
}

fn request_scope() -> Scope {
    Scope::new("request")
}

/// The walk of Client and Helper through a request's passes, ahead of the Owner. Returns the number of passes walked.
fn walk(
    s: &mut Session,
    model: &SecureModel,
    r: &Request,
    ports: Option<&ClientPorts>,
    stop: &AtomicBool,
) -> Result<u64> {
    let mut cache = model.cache(r.positions());
    let jobs = s.jobs();
    let mut walked = 0u64;
    let mut batch = vec![r.prompt as usize];
    // The stop flag is read after the wait, which a stop may have ended.
    while !batch.is_empty() && jobs.wait_below(MAX_BATCH) && !stop.load(Ordering::Relaxed) {
        s.begin(r.first_pass + walked, &batch);
        let options = PassOptions { ports, noise: None, open_logits: r.open_logits, every: false, depths: None };
        let before = s.ahead_sent();
        model.pass(s, &mut cache, options)?;
        s.end_batch()?;
        // A batch arrives operation by operation and is consumed pass by pass, so all of it must fit the Owner's buffer
        // (half of it: contexts grow), or Owner and walker would wait for each other.
        let each = (s.ahead_sent() - before) / batch.len() as u64;
        let room = s.links().ahead_capacity() as u64 / 2 / each.max(1);
        let before = if walked == 0 { 0 } else { batch.len() };
        let grown = next_batch(before, usize::try_from(room).unwrap_or(MAX_BATCH));
        walked += batch.len() as u64;
        batch = vec![1; grown.min((u64::from(r.max_new) - walked) as usize)];
    }
    Ok(walked)
}

/// After its walk a party tells the Owner where the run-ahead data of this request ends.
fn end_walk(s: &Session, request: u64, walked: u64) -> Result<()> {
    let step = request_scope().address(request, "request.walked");
    s.links().send(Role::Owner, Lane::Ahead, &step, walked.to_le_bytes().to_vec())
}

/// A walk that failed because the session ended is not the cause of anything.
fn worst(walk: Result<u64>, online: Result<()>) -> Result<u64> {
    match (walk, online) {
        (Ok(n), Ok(())) => Ok(n),
        (Err(e), Ok(())) | (Ok(_), Err(e)) => Err(e),
        (Err(a), Err(b)) => Err(crate::world::first_cause([b, a])),
    }
}

/// A control byte before each decode pass: 1 goes on, 0 stops.
fn control(s: &crate::net::Links, pass: u64) -> Result<bool> {
    let step = request_scope().address(pass, "request.control");
    match s.recv(Role::Client, Lane::Online, &step, 1)?[0] {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(blame(Role::Client, &step, PeerFault::Malformed("a control byte that is not 0 or 1"))),
    }
}

/// A thread that ended without a result.
fn lost(what: &str) -> Error {
    Error::Internal(format!("{what} ended without a result"))
}
