//! The masked engine: one file per operation, each with its cost, its `masks` half and its `online` half.
//!
//! Every operation starts with a call that sends all that it has to send and returns a [`Pending`]; `finish` receives.
//! Operations that were started together travel together, so that their messages are counted once in the sequence. This
//! cannot deadlock: the online lane never blocks its sender, Client and Helper never wait for the Owner in their walk,
//! and the Helper's answering thread handles its jobs in the order in which the Owner sends.

pub mod argmax;
pub mod cached;
pub mod compare;
pub mod embedding;
pub mod evaluate;
pub mod exp;
pub mod guard;
pub mod gumbel;
pub mod input;
pub mod lift;
pub mod linear;
pub mod lookup;
pub mod normalise;
pub mod open;
pub mod pieces;
pub mod polynomial;
pub mod positive;
pub mod product;
pub mod relu;
pub mod replicated;
pub mod shared_linear;
pub mod square;
pub mod thermometer;
pub mod truncate;
pub mod window;

use crate::error::Result;
use crate::session::Session;
use crate::share::{Masked, Rows, Side};

/// An operation whose messages are sent and whose result is not yet received.
#[must_use = "a pending operation must be finished, or its messages are left behind"]
pub struct Pending<'a, T>(Receive<'a, T>);

type Receive<'a, T> = Box<dyn FnOnce(&mut Session) -> Result<T> + 'a>;

impl<'a, T: 'a> Pending<'a, T> {
    pub(crate) fn new(f: impl FnOnce(&mut Session) -> Result<T> + 'a) -> Self {
        Pending(Box::new(f))
    }

    pub(crate) fn ready(value: T) -> Self {
        Pending::new(move |_| Ok(value))
    }

    /// Receives what is missing.
    ///
    /// # Errors
    /// [`crate::Error::Peer`] if a peer fails.
    pub fn finish(self, s: &mut Session) -> Result<T> {
        (self.0)(s)
    }

    /// A local step on the result.
    pub fn then<U: 'a>(self, f: impl FnOnce(T) -> Result<U> + 'a) -> Pending<'a, U> {
        Pending::new(move |s| f(self.finish(s)?))
    }
}

/// The side that `s` holds of every masked value.
#[must_use]
pub fn side(s: &Session) -> Side {
    if s.is_owner() { Side::Value } else { Side::Mask }
}

/// Lays several values side by side, token by token. All in the narrowest of their rings, fraction bits of the first.
///
/// # Errors
/// [`crate::Error::Shape`] if they stand over different numbers of tokens.
pub fn concat(parts: &[&Masked]) -> Result<Masked> {
    let Some(first) = parts.first() else {
        return Err(crate::Error::Internal("nothing to concatenate".into()));
    };
    let tokens = first.rows().tokens();
    if let Some(other) = parts.iter().find(|p| p.rows().tokens() != tokens || p.side() != first.side()) {
        return Err(crate::Error::Shape { op: "concat", lhs: first.facts(), rhs: other.facts() });
    }
    let k = parts.iter().map(|p| p.k()).min().unwrap_or(64);
    let rows = Rows::ragged((0..tokens).map(|t| parts.iter().map(|p| p.rows().row(t).len()).sum()));
    let mut v = Vec::with_capacity(rows.len());
    for t in 0..tokens {
        for p in parts {
            v.extend_from_slice(&p.raw()[p.rows().row(t)]);
        }
    }
    Ok(Masked::new(v, first.side(), k, first.f(), rows))
}

/// Keeps the last token of every pass (what the head needs).
#[must_use]
pub fn last_tokens(s: &Session, x: &Masked) -> Masked {
    let last: Vec<usize> = s.passes().iter().map(|p| p.tokens.end - 1).collect();
    let tokens = x.rows().tokens();
    let rows = Rows::ragged((0..tokens).map(|t| if last.contains(&t) { x.rows().row(t).len() } else { 0 }));
    let v = last.iter().flat_map(|&t| x.raw()[x.rows().row(t)].iter().copied()).collect();
    Masked::new(v, x.side(), x.k(), x.f(), rows)
}
