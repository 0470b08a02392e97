//! Input: the Client gives a value.
//!
//! | | Owner | Client | Helper |
//! |---|---|---|---|
//! | before | | `r = PRF(C,H)` | `r = PRF(C,H)` |
//! | online | receives `d = x - r` | sends `d` | |
//!
//! Cost: one message of `k` bits per element, Client -> Owner. Private: `d` is masked by a fresh `r` that the Owner
//! cannot compute.

use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::{Error, Result};
use crate::net::Lane;
use crate::party::Role;
use crate::plan::cost::Cost;
use crate::prf::Pair;
use crate::ring::pack;
use crate::session::{Scope, Session};
use crate::share::{Masked, Rows, Side};

/// Where the Client's online thread takes its inputs from: ring elements, one vector per pass.
pub type InputSource = Arc<Mutex<Receiver<Vec<u64>>>>;

/// What it costs.
#[must_use]
pub fn cost(n: usize, k: u32) -> Cost {
    let mut c = Cost::default().send(Role::Client, Role::Owner, n, k);
    c.depth = 1;
    c
}

/// Shares `rows` elements that the Client's online thread will find in `source` when the pass is really there.
///
/// # Errors
/// [`Error::Peer`], [`Error::Reuse`].
pub fn input(
    s: &mut Session,
    scope: &Scope,
    rows: &Rows,
    k: u32,
    f: u32,
    source: Option<&InputSource>,
) -> Result<Masked> {
    match s.role() {
        Role::Owner => online(s, scope, rows, k, f),
        Role::Client | Role::Helper => masks(s, scope, rows, k, f, source),
    }
}

fn masks(s: &mut Session, scope: &Scope, rows: &Rows, k: u32, f: u32, source: Option<&InputSource>) -> Result<Masked> {
    let r = s.words(Pair::ClientHelper, scope, "input.r", rows, k)?;
    if s.role() == Role::Client {
        let source = source.ok_or_else(|| Error::Internal("the client has no input".into()))?;
        for (i, pass) in s.passes().iter().enumerate() {
            let mine = r[rows.range(&pass.tokens)].to_vec();
            let (step, source) = (scope.address(pass.number, "input.d"), Arc::clone(source));
            s.leave(
                i,
                Box::new(move |links| {
                    let x = source
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .recv()
                        .map_err(|_| Error::Internal("the client's input ended".into()))?;
                    if x.len() != mine.len() {
                        let (lhs, rhs) = (format!("{} values", x.len()), format!("{} elements", mine.len()));
                        return Err(Error::Shape { op: "input", lhs, rhs });
                    }
                    let m = crate::ring::mask(k);
                    let d: Vec<u64> = x.iter().zip(&mine).map(|(x, r)| x.wrapping_sub(*r) & m).collect();
                    links.gather(Role::Owner, Lane::Online, &step, pack::pack(&d, k))
                }),
            )?;
        }
    }
    Ok(Masked::new(r, Side::Mask, k, f, rows.clone()))
}

fn online(s: &mut Session, scope: &Scope, rows: &Rows, k: u32, f: u32) -> Result<Masked> {
    s.declare(cost(rows.len(), k));
    let d = s.recv_words(Role::Client, Lane::Online, scope, "input.d", rows.len(), k)?;
    Ok(Masked::new(d, Side::Value, k, f, rows.clone()))
}
