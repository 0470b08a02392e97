//! Rows of a prompt in pieces that follow each other through exchanges.
//!
//! The rows of a pass do not depend on each other between one sum over positions and the next. So exchanges that carry much may be
//! several, of some rows each: while the Helper answers the first piece, the Owner masks the second and the network carries both ways, and
//! as soon as the first is answered its next exchange begins. Every piece has addresses of its own ([`Scope::block`]): nothing else
//! changes, neither results nor bytes but for a header each, nor the number of messages in sequence. Not all pieces are under way at once:
//! what the Helper has answered waits at the Owner, and must find room there while the Owner still asks.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::ops::Range;

use crate::error::{Error, Result};
use crate::net::tls::ONLINE_CAPACITY;
use crate::session::{Pass, Scope, Session};
use crate::share::{Masked, Rows};

/// Rows that a piece has at least, on average.
pub const LEAST_ROWS: usize = 16;

/// Bytes of answers to all pieces that are under way together: so much finds room at the Owner, whatever it is doing.
const UNDER_WAY: usize = ONLINE_CAPACITY / 2;

/// How a pass is cut: the same at all parties.
pub struct Pieces {
    ranges: Vec<Range<usize>>,
    under_way: usize,
}

/// What becomes of a piece: an exchange is under way, or it is done.
pub enum Step<'a, T> {
    /// Receives, and perhaps begins another exchange.
    Next(Next<'a, T>),
    /// The result.
    Done(T),
}

type Next<'a, T> = Box<dyn FnOnce(&mut Session, &Scope) -> Result<Step<'a, T>> + 'a>;

impl<'a, T> Step<'a, T> {
    /// What follows once the exchange is answered.
    pub fn next(f: impl FnOnce(&mut Session, &Scope) -> Result<Step<'a, T>> + 'a) -> Self {
        Step::Next(Box::new(f))
    }
}

impl Pieces {
    /// The rows of a prompt in at most `most` pieces of about as many elements, all but the last of a multiple of 8 rows, so that no
    /// message has padding of its own. One piece where not all rows have elements. `elements` says how many there are in a prompt of so many
    /// tokens, of each of which an answer has at most `reply` bytes.
    ///
    /// # Errors
    /// [`Error::Internal`] if passes are walked together of which the Owner, who walks each by itself, would cut one.
    pub fn of(
        s: &mut Session,
        rows: &Rows,
        most: usize,
        (elements, reply): (impl Fn(usize) -> usize, usize),
    ) -> Result<Pieces> {
        let tokens = rows.tokens();
        let pieces = |tokens: usize| (tokens / LEAST_ROWS).clamp(1, most.max(1));
        let one = || Pieces { ranges: std::iter::once(0..tokens).collect(), under_way: 1 };
        let last_only = |p: &Pass| p.tokens.clone().any(|t| rows.row(t).is_empty());
        if s.passes().iter().all(last_only) {
            return Ok(one());
        }
        if s.passes().len() != 1 {
            return match s.passes().iter().any(|p| pieces(p.tokens.len()) > 1) {
                true => Err(Error::Internal("a prompt in pieces is walked by itself".into())),
                false => Ok(one()),
            };
        }
        let longer = s.stands_for();
        let n = pieces(longer.unwrap_or(tokens));
        if n == 1 {
            return Ok(one());
        }
        s.in_pieces(n);
        let cut = |i: usize| match longer {
            _ if i == n => tokens,
            // A walk that counts for a longer prompt: as many messages, of which the last has all elements.
            Some(_) => 0,
            None => {
                let row = (0..tokens).position(|t| rows.row(t).end > rows.len() * i / n).unwrap_or(tokens);
                row.next_multiple_of(8).min(tokens)
            }
        };
        let each = elements(longer.unwrap_or(tokens)) * reply / n;
        let ranges = (0..n).map(|i| cut(i)..cut(i + 1)).collect();
        Ok(Pieces { ranges, under_way: (UNDER_WAY / each.max(1)).clamp(1, n) })
    }

    /// Takes all pieces through their exchanges, as many at a time as may be under way, each in its turn: `first` begins with the rows of
    /// one. Gives their results in order.
    ///
    /// # Errors
    /// What a step says.
    pub fn run<'a, T>(
        &self,
        s: &mut Session,
        scope: &Scope,
        mut first: impl FnMut(&mut Session, &Scope, &Range<usize>) -> Result<Step<'a, T>>,
    ) -> Result<Vec<T>> {
        let n = self.ranges.len();
        let mut turns: VecDeque<(usize, Option<Next<'a, T>>)> = (0..self.under_way).map(|i| (i, None)).collect();
        let mut out: Vec<Option<T>> = (0..n).map(|_| None).collect();
        while let Some((i, step)) = turns.pop_front() {
            let rows = &self.ranges[i];
            let turn = |s: &mut Session, scope: &Scope| match step {
                None => first(s, scope, rows),
                Some(step) => step(s, scope),
            };
            let step = match n {
                1 => turn(s, scope)?,
                _ => {
                    let scope = scope.block(i);
                    s.piece(rows.len(), |s| turn(s, &scope))?
                }
            };
            match step {
                Step::Next(next) => turns.push_back((i, Some(next))),
                Step::Done(result) => {
                    out[i] = Some(result);
                    if i + self.under_way < n {
                        turns.push_back((i + self.under_way, None));
                    }
                }
            }
        }
        let all: Option<Vec<T>> = out.into_iter().collect();
        all.ok_or_else(|| Error::Internal("a piece without an end".into()))
    }

    /// The rows of a piece.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] for rows that `x` has not.
    pub fn rows<'a>(&self, x: &'a Masked, rows: &Range<usize>) -> Result<Cow<'a, Masked>> {
        match self.ranges.len() {
            1 => Ok(Cow::Borrowed(x)),
            _ => x.tokens(rows).map(Cow::Owned),
        }
    }
}
