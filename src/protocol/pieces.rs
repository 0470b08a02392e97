//! Rows of a prompt in pieces that follow each other through an exchange.
//!
//! The rows of a pass do not depend on each other between one sum over positions and the next. So an exchange that carries much may be
//! several, of some rows each: while the Helper answers the first piece, the Owner masks the second and the network carries both ways, and
//! as soon as the first is answered its next exchange begins. Every piece has addresses of its own ([`Scope::block`]): nothing else
//! changes, neither results nor bytes but for a header each, nor the number of messages in sequence.

use std::borrow::Cow;
use std::ops::Range;

use crate::error::{Error, Result};
use crate::session::{Pass, Scope, Session};
use crate::share::{Masked, Rows};

/// Rows that a piece has at least, on average.
pub const LEAST_ROWS: usize = 16;

/// How a pass is cut: the same at all parties.
pub struct Pieces(Vec<Range<usize>>);

impl Pieces {
    /// The rows of a prompt in at most `most` pieces of about as many elements, all but the last of a multiple of 8 rows, so that no
    /// message has padding of its own. One piece where not all rows have elements.
    ///
    /// # Errors
    /// [`Error::Internal`] if passes are walked together of which the Owner, who walks each by itself, would cut one.
    pub fn of(s: &mut Session, rows: &Rows, most: usize) -> Result<Pieces> {
        let tokens = rows.tokens();
        let pieces = |tokens: usize| (tokens / LEAST_ROWS).clamp(1, most.max(1));
        let one = Pieces(std::iter::once(0..tokens).collect());
        let last_only = |p: &Pass| p.tokens.clone().any(|t| rows.row(t).is_empty());
        if s.passes().iter().all(last_only) {
            return Ok(one);
        }
        if s.passes().len() != 1 {
            return match s.passes().iter().any(|p| pieces(p.tokens.len()) > 1) {
                true => Err(Error::Internal("a prompt in pieces is walked by itself".into())),
                false => Ok(one),
            };
        }
        let longer = s.stands_for();
        let n = pieces(longer.unwrap_or(tokens));
        if n == 1 {
            return Ok(one);
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
        Ok(Pieces((0..n).map(|i| cut(i)..cut(i + 1)).collect()))
    }

    /// Begins with each piece in turn: `op` gets its rows.
    ///
    /// # Errors
    /// What `op` says.
    pub fn start<T>(
        &self,
        s: &mut Session,
        scope: &Scope,
        mut op: impl FnMut(&mut Session, &Scope, &Range<usize>) -> Result<T>,
    ) -> Result<Vec<T>> {
        self.next(s, scope, self.0.clone(), |s, scope, rows| op(s, scope, &rows))
    }

    /// Goes on with each piece in turn, from what `before` has of it.
    ///
    /// # Errors
    /// What `op` says.
    pub fn next<T, U>(
        &self,
        s: &mut Session,
        scope: &Scope,
        before: Vec<T>,
        mut op: impl FnMut(&mut Session, &Scope, T) -> Result<U>,
    ) -> Result<Vec<U>> {
        let mut out = Vec::with_capacity(before.len());
        for (i, (rows, x)) in self.0.iter().zip(before).enumerate() {
            out.push(match self.0.len() {
                1 => op(s, scope, x)?,
                _ => {
                    let scope = scope.block(i);
                    s.piece(rows.len(), |s| op(s, &scope, x))?
                }
            });
        }
        Ok(out)
    }

    /// The rows of a piece.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] for rows that `x` has not.
    pub fn rows<'a>(&self, x: &'a Masked, rows: &Range<usize>) -> Result<Cow<'a, Masked>> {
        match self.0.len() {
            1 => Ok(Cow::Borrowed(x)),
            _ => x.tokens(rows).map(Cow::Owned),
        }
    }
}
