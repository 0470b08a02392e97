//! Opening to the Client.
//!
//! | | Owner | Client |
//! |---|---|---|
//! | online | sends `d` | `x = d + r` |
//!
//! Cost: one message of `k` bits per element, Owner -> Client. Private: the Client learns `x` and could have computed
//! `d = x - r` from it, so it learns nothing else. That holds for FRESH values only (a lookup's, product's or linear's
//! result): a truncated one would also show the carry of the dropped bits.

use std::sync::mpsc::Sender;

use crate::error::{Error, Result};
use crate::net::Lane;
use crate::party::Role;
use crate::plan::cost::Cost;
use crate::ring::{self, pack};
use crate::session::{Scope, Session, recv_words};
use crate::share::Masked;

/// Opened ring elements, a vector per pass.
pub type OutputSink = Sender<Vec<u64>>;

/// What it costs.
#[must_use]
pub fn cost(n: usize, k: u32) -> Cost {
    let mut c = Cost::default().send(Role::Owner, Role::Client, n, k);
    c.depth = 1;
    c
}

/// Opens `x` to the Client, whose online thread puts the values into `sink`, one vector per pass.
///
/// # Errors
/// [`Error::Peer`].
pub fn open(s: &mut Session, scope: &Scope, x: &Masked, sink: Option<&OutputSink>) -> Result<()> {
    let k = x.k();
    match s.role() {
        Role::Owner => {
            s.declare(cost(x.raw().len(), k));
            s.send_online(Role::Client, scope, "open.d", pack::pack(x.raw(), k))
        }
        Role::Helper => Ok(()),
        Role::Client => {
            let sink = sink.ok_or_else(|| Error::Internal("the client has nowhere to put an output".into()))?;
            for (i, pass) in s.passes().iter().enumerate() {
                let r = x.raw()[x.rows().range(&pass.tokens)].to_vec();
                let (step, sink) = (scope.address(pass.number, "open.d"), sink.clone());
                s.leave(
                    i,
                    Box::new(move |links| {
                        let d = recv_words(links, Role::Owner, Lane::Online, &step, r.len(), k)?;
                        let m = ring::mask(k);
                        let x = d.iter().zip(&r).map(|(d, r)| d.wrapping_add(*r) & m).collect();
                        sink.send(x).map_err(|_| Error::Internal("nobody takes the client's output".into()))
                    }),
                )?;
            }
            Ok(())
        }
    }
}
