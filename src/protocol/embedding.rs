//! Row of the Owner's private table, for a token that only the Client knows: two-server PIR by Owner and Helper.
//!
//! | | Owner | Client | Helper |
//! |---|---|---|---|
//! | preparation | table `E`, seed | seed: `B = PRF(O,C; seed)` | `A = E - B` |
//! | has | `A = E - B`, `s`, `pad` = PRF(O,H), `pick = PRF(O,C)` | `r = PRF(C,H)`, `pick` | `s`, `pad` |
//! | online | | sends `pick xor e_t` to the Helper | |
//! | | sends XOR of rows `A[i] - s` in `pick`, xor `pad` | | sends XOR of rows in the query, xor `pad` |
//! | | | sends `A[t] - s + B[t] - r` to the Owner | |
//! | result | `+ s`: `E[t] - r` | `r` | `r` |
//!
//! Cost: 3 messages in sequence; one bit per row Client -> Helper, `2 k` bits per element to the Client, `k` to the Owner.
//! Private: the Helper sees `e_t` under `pick`, which it lacks; the Client sees each reply under `pad` and their XOR under
//! the fresh `s`, so never a row of `A` (with which it would know `E[t]`); the Owner sees `E[t] - s - r` under `r`.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use rayon::prelude::*;

use super::input::InputSource;
use crate::error::{Error, Result};
use crate::net::Lane;
use crate::party::Role;
use crate::plan::cost::Cost;
use crate::plan::work::Counts;
use crate::prf::{Pair, PreparationSeed};
use crate::ring::{self, Packed, pack};
use crate::session::{Scope, Session, recv_words};
use crate::share::{Masked, Rows, Side};

/// One party's part of a prepared table.
#[derive(Clone)]
pub struct TableShare {
    /// Rows and row length.
    pub dim: (usize, usize),
    /// Fraction bits.
    pub f: u32,
    /// `A` is known modulo `2^ring` only: rows are never asked for in a wider ring.
    ring: u32,
    part: TablePart,
}

#[derive(Clone)]
enum TablePart {
    /// Owner and Helper: `A`, in the bits of the ring in which rows are asked for.
    Rows(Packed),
    /// The Client regenerates rows of `B`.
    Seed { id: u64, seed: PreparationSeed },
    /// Nothing: for a walk that counts instead of computing.
    Shape,
}

impl TablePart {
    /// What stands for a part without content: no rows, of which a fold is zero.
    fn or_empty(&self, s: &Session) -> Result<TablePart> {
        match (self, s.work(), s.role()) {
            (TablePart::Shape, None, _) => {
                Err(Error::Internal("a table without rows outside a walk that counts".into()))
            }
            (TablePart::Shape, Some(_), Role::Client) => {
                Ok(TablePart::Seed { id: 0, seed: PreparationSeed::from_bytes([0; 32]) })
            }
            (TablePart::Shape, Some(_), _) => Ok(TablePart::Rows(Packed::new(&[], 64))),
            (part, ..) => Ok(part.clone()),
        }
    }
}

impl TableShare {
    /// The Owner's or the Helper's part: `A = E - B`, row by row.
    ///
    /// # Errors
    /// [`Error::Shape`] for the wrong number of words.
    pub fn rows(dim: (usize, usize), f: u32, a: impl AsRef<[u64]>) -> Result<Self> {
        Self::packed(dim, f, Packed::new(a.as_ref(), 64))
    }

    /// The same from words that are packed already.
    ///
    /// # Errors
    /// [`Error::Shape`] for the wrong number of words.
    pub(crate) fn packed(dim: (usize, usize), f: u32, a: Packed) -> Result<Self> {
        if a.len() != dim.0 * dim.1 {
            let (lhs, rhs) = (format!("{a:?}"), format!("{} x {}", dim.0, dim.1));
            return Err(Error::Shape { op: "embedding table", lhs, rhs });
        }
        Ok(TableShare { dim, f, ring: a.bits(), part: TablePart::Rows(a) })
    }

    /// The Client's part: the seed of `B`, the stream of matrix `id`.
    #[must_use]
    pub fn seed(dim: (usize, usize), f: u32, id: u64, seed: PreparationSeed) -> Self {
        TableShare { dim, f, ring: 64, part: TablePart::Seed { id, seed } }
    }

    /// No rows, for a session that counts.
    pub(crate) fn shape(dim: (usize, usize), f: u32) -> Self {
        TableShare { dim, f, ring: 64, part: TablePart::Shape }
    }

    /// Declares that rows are asked for in rings of at most `ring` bits, so that the Helper needs no more of `A`.
    #[must_use]
    pub fn within(self, ring: u32) -> Self {
        TableShare { ring: ring.min(self.ring), ..self }
    }

    /// Elements `range` of `A`, row by row; `None` at the Client.
    pub(crate) fn words(&self, range: Range<usize>) -> Option<Vec<u64>> {
        match &self.part {
            TablePart::Rows(a) if range.start <= range.end && range.end <= a.len() => {
                let mut words = vec![0; range.len()];
                a.read(range.start, &mut words);
                Some(words)
            }
            _ => None,
        }
    }
}

impl std::fmt::Debug for TableShare {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "table of {} x {} with {} fraction bits", self.dim.0, self.dim.1, self.f)
    }
}

/// What it costs for `n` tokens with a table of `rows` x `width`.
#[must_use]
pub fn cost(n: usize, rows: usize, width: usize, k: u32) -> Cost {
    let mut c = Cost::default()
        .send(Role::Client, Role::Helper, n * rows.next_multiple_of(8), 1)
        .send(Role::Owner, Role::Client, n * width, k)
        .send(Role::Helper, Role::Client, n * width, k)
        .send(Role::Client, Role::Owner, n * width, k);
    c.depth = 3;
    c
}

/// Rows of the table that a thread folds at a time.
const BLOCK: usize = 512;
/// Tokens that share a row once it is unpacked: so many of their sums stay in the cache.
const TOGETHER: usize = 16;

/// XOR of the rows `A[i] - s` picked by each of `queries`, of `bytes` each, with `width` words of `s` each.
fn fold_rows(a: &Packed, width: usize, queries: &[u8], bytes: usize, s: &[u64], m: u64) -> Vec<u64> {
    let rows = a.len() / width;
    let groups = queries.chunks(TOGETHER * bytes).zip(s.chunks(TOGETHER * width));
    let fold = |(queries, s): (&[u8], &[u64])| {
        let block = |block: usize| {
            let (mut acc, mut row) = (vec![0u64; s.len()], vec![0u64; width]);
            for i in block * BLOCK..rows.min((block + 1) * BLOCK) {
                let picked = |q: &[u8]| q[i / 8] >> (i % 8) & 1 == 1;
                if !queries.chunks(bytes).any(picked) {
                    continue;
                }
                a.read(i * width, &mut row);
                for ((acc, q), s) in acc.chunks_mut(width).zip(queries.chunks(bytes)).zip(s.chunks(width)) {
                    if picked(q) {
                        acc.iter_mut().zip(row.iter().zip(s)).for_each(|(o, (a, s))| *o ^= a.wrapping_sub(*s));
                    }
                }
            }
            acc
        };
        let mut sum = (0..rows.div_ceil(BLOCK)).into_par_iter().map(block).reduce(
            || vec![0u64; s.len()],
            |mut x, y| {
                x.iter_mut().zip(&y).for_each(|(x, y)| *x ^= y);
                x
            },
        );
        sum.iter_mut().for_each(|v| *v &= m);
        sum
    };
    groups.flat_map(fold).collect()
}

/// The rows of one token per element of `source`'s vectors, as `rows` of `width` elements each.
///
/// # Errors
/// [`Error::Peer`], [`Error::Reuse`]; [`Error::Model`] at the Client for a token beyond the table.
pub fn embed(
    s: &mut Session,
    scope: &Scope,
    table: &TableShare,
    tokens: usize,
    k: u32,
    source: Option<&InputSource>,
) -> Result<Masked> {
    let (vocabulary, width) = table.dim;
    let rows = Rows::even(tokens, width);
    let bytes = vocabulary.div_ceil(8);
    let m = ring::mask(k);
    if k > table.ring {
        let (lhs, rhs) = (format!("ring {k}"), format!("{table:?}, shared modulo 2^{}", table.ring));
        return Err(Error::Shape { op: "embedding", lhs, rhs });
    }
    if let (Some(work), true) = (s.work(), s.role() != Role::Client) {
        let counts = Counts { fold_words: (tokens * vocabulary * width) as u64, ..Counts::default() };
        work.add(s.role(), Lane::Online, scope, counts);
    }
    match (s.role(), &table.part.or_empty(s)?) {
        (Role::Owner, TablePart::Rows(a)) => {
            s.declare(cost(tokens, vocabulary, width, k));
            let sm = s.words(Pair::OwnerHelper, scope, "embed.s", &rows, k)?;
            let pad = s.words(Pair::OwnerHelper, scope, "embed.pad", &rows, k)?;
            let pick = s.bytes_each(Pair::OwnerClient, scope, "embed.pick", &Rows::even(tokens, 1), bytes)?;
            let mut reply = fold_rows(a, width, &pick, bytes, &sm, m);
            reply.iter_mut().zip(&pad).for_each(|(a, p)| *a ^= p);
            s.send_online(Role::Client, scope, "embed.owner", pack::pack(&reply, k))?;
            let got = s.recv_words(Role::Client, Lane::Online, scope, "embed.d", rows.len(), k)?;
            let d = got.iter().zip(&sm).map(|(d, s)| d.wrapping_add(*s)).collect();
            Ok(Masked::new(d, Side::Value, k, table.f, rows))
        }
        (Role::Helper, TablePart::Rows(a)) => {
            let r = s.words(Pair::ClientHelper, scope, "embed.r", &rows, k)?;
            let sm = Arc::new(s.words(Pair::OwnerHelper, scope, "embed.s", &rows, k)?);
            let pad = Arc::new(s.words(Pair::OwnerHelper, scope, "embed.pad", &rows, k)?);
            for (i, pass) in s.passes().iter().enumerate() {
                let (range, n) = (rows.range(&pass.tokens), pass.tokens.len());
                let (sm, pad, a) = (Arc::clone(&sm), Arc::clone(&pad), a.clone());
                let (from, to) =
                    (scope.address(pass.number, "embed.query"), scope.address(pass.number, "embed.helper"));
                s.leave(
                    i,
                    Box::new(move |links| {
                        let query = links.recv(Role::Client, Lane::Online, &from, n * bytes)?;
                        let mut reply = fold_rows(&a, width, &query, bytes, &sm[range.clone()], m);
                        reply.iter_mut().zip(&pad[range]).for_each(|(a, p)| *a ^= p);
                        links.gather(Role::Client, Lane::Online, &to, pack::pack(&reply, k))
                    }),
                )?;
            }
            Ok(Masked::new(r, Side::Mask, k, table.f, rows))
        }
        (Role::Client, TablePart::Seed { id, seed }) => {
            let source = source.ok_or_else(|| Error::Internal("the client has no input".into()))?;
            let r = s.words(Pair::ClientHelper, scope, "embed.r", &rows, k)?;
            let pick = s.bytes_each(Pair::OwnerClient, scope, "embed.pick", &Rows::even(tokens, 1), bytes)?;
            for (i, pass) in s.passes().iter().enumerate() {
                let mine = r[rows.range(&pass.tokens)].to_vec();
                let mut query = pick[pass.tokens.start * bytes..pass.tokens.end * bytes].to_vec();
                let names = ["embed.query", "embed.owner", "embed.helper", "embed.d"];
                let [ask, owner, helper, give] = names.map(|label| scope.address(pass.number, label));
                let (source, seed, id) = (Arc::clone(source), seed.clone(), *id);
                s.leave(
                    i,
                    Box::new(move |links| {
                        let ids = source.lock().unwrap_or_else(PoisonError::into_inner).recv();
                        let ids = ids.map_err(|_| Error::Internal("the client's input ended".into()))?;
                        let n = mine.len() / width;
                        if ids.len() != n || ids.iter().any(|&t| t >= vocabulary as u64) {
                            let (lhs, rhs) = (format!("{} tokens", ids.len()), format!("{n} below {vocabulary}"));
                            return Err(Error::Shape { op: "embedding", lhs, rhs });
                        }
                        for (q, &t) in query.chunks_mut(bytes).zip(&ids) {
                            q[t as usize / 8] ^= 1 << (t % 8);
                        }
                        links.gather(Role::Helper, Lane::Online, &ask, query)?;
                        let a = recv_words(links, Role::Owner, Lane::Online, &owner, mine.len(), k)?;
                        let b = recv_words(links, Role::Helper, Lane::Online, &helper, mine.len(), k)?;
                        let mut own = vec![0u64; width];
                        let mut d = Vec::with_capacity(mine.len());
                        for (j, &t) in ids.iter().enumerate() {
                            seed.matrix_words(id, t * width as u64, &mut own);
                            for (c, own) in own.iter().enumerate() {
                                let i = j * width + c;
                                d.push((a[i] ^ b[i]).wrapping_add(*own).wrapping_sub(mine[i]) & m);
                            }
                        }
                        links.gather(Role::Owner, Lane::Online, &give, pack::pack(&d, k))
                    }),
                )?;
            }
            Ok(Masked::new(r, Side::Mask, k, table.f, rows))
        }
        _ => Err(Error::Internal("this party has no part of the embedding table".into())),
    }
}

/// Tokens or hidden states from the Client's online loop, as a source for [`super::input`] and [`embed`].
#[must_use]
pub fn source(receiver: std::sync::mpsc::Receiver<Vec<u64>>) -> InputSource {
    Arc::new(Mutex::new(receiver))
}
