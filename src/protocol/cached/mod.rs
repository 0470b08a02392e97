//! Secret product with a cached operand: keys and values of earlier tokens.
//!
//! The cached operand is materialised once, ever: `y2 = d_y - PRF(O,C)` goes to the Helper with the first product that
//! uses the new rows, and every later token multiplies with what is already there. Otherwise as [`super::product`]:
//!
//! | | Owner | Client | Helper |
//! |---|---|---|---|
//! | keeps | `d_y` | `r_y`, `y1 = PRF(O,C)` | `r_y`, `y2` |
//! | ahead | | sends `op(x1 + rx, ry) + op(rx, y1) - r_z + rho` | |
//! | online | sends `x2` and the new rows' `y2` | | replies `op(x2, ry) + op(rx, y2) - rho` |
//!
//! A token without elements in `x` asks nothing, and gets nothing: its row of the cache is all that is new.
//!
//! Cost: 2 messages; `k (|x| + |new rows|)` bits up, `k` per output back and ahead. Private: as the product; a share of a
//! cached row is sent once, so its mask is used once.

mod together;

use std::ops::Range;
use std::sync::{Arc, PoisonError, RwLock};

use rayon::prelude::*;

use super::{Pending, product};
use crate::error::{Error, Result};
use crate::net::Lane;
use crate::party::Role;
use crate::plan::cost::Cost;
use crate::plan::work::{Counts, Work};
use crate::prf::Pair;
use crate::ring::{self, Isa, PackedRows, gemm, pack};
use crate::session::{Scope, Session, recv_words};
use crate::share::{Masked, Rows, Side};

/// Rows from which on they meet the cache together: see [`together`].
const TOGETHER: usize = 8;

/// Words of the cache that are there unpacked at a time: they stay in the L2 cache.
const UNPACKED: usize = 1 << 15;

/// Multiply-adds of single rows below which one thread is faster than several.
const PARALLEL_FROM: usize = 1 << 20;

type Store = Arc<RwLock<PackedRows>>;

fn read(store: &Store) -> std::sync::RwLockReadGuard<'_, PackedRows> {
    store.read().unwrap_or_else(PoisonError::into_inner)
}

fn extend(store: &Store, words: &[u64]) {
    store.write().unwrap_or_else(PoisonError::into_inner).extend(words);
}

/// One party's part of an operand that grows by a row of `width` elements per token; each takes its ring's `k` bits.
pub struct Cached {
    width: usize,
    k: u32,
    f: u32,
    tokens: usize,
    /// `d` at the Owner, `r` at the others.
    own: Store,
    /// The Client's `y1` or the Helper's `y2`.
    share: Store,
}

/// Tokens for which room is made at once.
const RESERVED: usize = 1024;

impl Cached {
    /// Empty, with room for `capacity` tokens, or for the first of them: a request may allow far more than it will use.
    #[must_use]
    pub fn new(width: usize, k: u32, f: u32, capacity: usize) -> Self {
        let store = || Arc::new(RwLock::new(PackedRows::new(width, k, capacity.min(RESERVED))));
        Cached { width, k, f, tokens: 0, own: store(), share: store() }
    }

    /// Fills the cache with values that all parties know, as if `tokens` tokens had been cached: for measuring what a
    /// decode step costs at a given context without computing that context. Nothing secret may follow from them.
    pub fn preload(&mut self, role: Role, tokens: usize, value: impl Fn(usize) -> i64) {
        let zero = vec![0; self.width];
        for token in 0..tokens {
            let words: Vec<u64> = (token * self.width..(token + 1) * self.width).map(|i| value(i) as u64).collect();
            match role {
                Role::Owner => extend(&self.own, &words),
                Role::Client => [&self.own, &self.share].into_iter().for_each(|store| extend(store, &zero)),
                Role::Helper => [(&self.own, &zero), (&self.share, &words)].iter().for_each(|(s, w)| extend(s, w)),
            }
        }
        self.tokens += tokens;
    }

    /// Forgets all tokens from `tokens` on: rejected drafts. Nobody may still have work to do for them; rows that take their
    /// place come in a later pass, under masks of their own.
    pub fn truncate(&mut self, tokens: usize) {
        self.tokens = self.tokens.min(tokens);
        for store in [&self.own, &self.share] {
            store.write().unwrap_or_else(PoisonError::into_inner).truncate(self.tokens);
        }
    }

    /// Tokens cached.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Bytes held.
    #[must_use]
    pub fn bytes(&self) -> usize {
        read(&self.own).bytes() + read(&self.share).bytes()
    }
}

/// Some rows of a cache, unpacked.
#[derive(Clone, Copy)]
pub struct Block<'a> {
    /// Position of the first.
    at: usize,
    /// One after the other.
    words: &'a [u64],
}

/// A bilinear map of new rows and the cached rows that each may see: token `i` of the batch, at position `first + i`,
/// sees positions `0..=first + i`, or all of the only pass of an encoder.
pub trait CachedBilinear: Send + Sync {
    /// Positions that a token at `position` sees.
    fn visible(&self, position: usize) -> usize;

    /// Elements of the result for a token at `position`.
    fn outputs(&self, position: usize) -> usize;

    /// Multiply-adds for a token at `position`.
    fn macs(&self, position: usize) -> usize;

    /// What the cached rows of `block` give for a token that sees `visible` positions: `x` its row; added to `out`, its outputs, or put
    /// where they alone give something.
    fn block(&self, x: &[u64], visible: usize, block: Block<'_>, out: &mut [u64]);

    /// The map for the tokens of `x`, the last of `positions` of the cache: each by itself, those without elements left out. `out` is zeros.
    fn each(&self, x: &Span<'_>, (cache, positions): (&PackedRows, usize), out: &mut [u64]) {
        let before = positions - x.len();
        let macs: usize = (0..x.len()).filter(|i| x.asks(*i)).map(|i| self.macs(before + i)).sum();
        let threads = if macs < PARALLEL_FROM { 1 } else { rayon::current_num_threads() };
        if threads == 1 {
            return self.part(x, (cache, positions), 0..positions, out);
        }
        // Scores of a part are of its own positions, of which the others' are zero; contexts add up.
        let size = positions.div_ceil(threads);
        let part = |at: usize| {
            let mut part = vec![0; out.len()];
            self.part(x, (cache, positions), at..positions.min(at + size), &mut part);
            part
        };
        let parts: Vec<Vec<u64>> = (0..positions.div_ceil(size)).into_par_iter().map(|i| part(i * size)).collect();
        for part in parts {
            out.iter_mut().zip(part).for_each(|(out, part)| *out = out.wrapping_add(part));
        }
    }

    /// [`Self::each`] of some of the cached rows.
    fn part(&self, x: &Span<'_>, (cache, positions): (&PackedRows, usize), part: Range<usize>, out: &mut [u64]) {
        let (before, width) = (positions - x.len(), cache.width());
        let step = (UNPACKED / width).min(part.len()).max(1);
        let mut unpacked = vec![0; step * width];
        for at in part.clone().step_by(step) {
            let rows = at..part.end.min(at + step);
            let words = &mut unpacked[..rows.len() * width];
            cache.read(rows, 0..width, words);
            let mut left = &mut *out;
            for i in (0..x.len()).filter(|i| x.asks(*i)) {
                let (own, others) = left.split_at_mut(self.outputs(before + i));
                let visible = self.visible(before + i);
                assert!(visible <= positions, "a token sees what is cached");
                if at < visible {
                    let words = &words[..words.len().min((visible - at) * width)];
                    self.block(x.row(i), visible, Block { at, words }, own);
                }
                left = others;
            }
        }
    }

    /// The map for the tokens of `x`, the last of `positions` of the cache, all of which have elements. Modulo `2^k`; bits above
    /// mean nothing. `out` is zeros.
    fn together(&self, k: u32, x: &Span<'_>, cache: (&PackedRows, usize), out: &mut [u64]);
}

/// Rows of some tokens of a value.
pub struct Span<'a> {
    rows: &'a Rows,
    tokens: Range<usize>,
    x: &'a [u64],
}

impl<'a> Span<'a> {
    /// Of `tokens`, whose elements are `x`.
    #[must_use]
    pub fn new(rows: &'a Rows, tokens: Range<usize>, x: &'a [u64]) -> Self {
        Span { rows, tokens, x }
    }

    fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Elements of its `i`th token.
    fn row(&self, i: usize) -> &'a [u64] {
        let (row, from) = (self.rows.row(self.tokens.start + i), self.rows.row(self.tokens.start).start);
        &self.x[row.start - from..row.end - from]
    }

    /// Whether its `i`th token has elements.
    fn asks(&self, i: usize) -> bool {
        !self.row(i).is_empty()
    }
}

/// The map for the tokens of `x`, the last of the first `positions` of a store, which may have those of later passes already.
fn apply(op: &dyn CachedBilinear, k: u32, x: &Span<'_>, store: &Store, positions: usize) -> Vec<u64> {
    let before = positions - x.len();
    let asking = (0..x.len()).filter(|i| x.asks(*i));
    let mut out = vec![0; asking.map(|i| op.outputs(before + i)).sum()];
    let cache = (&*read(store), positions);
    if x.len() >= TOGETHER && (0..x.len()).all(|i| x.asks(i)) {
        op.together(k, x, cache, &mut out);
    } else {
        op.each(x, cache, &mut out);
    }
    out
}

/// Attention scores `q k^T`: per head, one per visible position. Grouped queries share a key head.
pub struct Scores {
    /// Query heads.
    pub heads: usize,
    /// Key heads.
    pub kv_heads: usize,
    /// Elements per head.
    pub dim: usize,
    /// Positions of an encoder's pass, all of which every token sees; else each sees itself and those before it.
    pub all: Option<usize>,
}

impl CachedBilinear for Scores {
    fn visible(&self, position: usize) -> usize {
        self.all.unwrap_or(position + 1)
    }

    fn outputs(&self, position: usize) -> usize {
        self.heads * self.visible(position)
    }

    fn macs(&self, position: usize) -> usize {
        self.heads * self.dim * self.visible(position)
    }

    fn block(&self, x: &[u64], visible: usize, Block { at, words }: Block<'_>, out: &mut [u64]) {
        let (width, dim, group) = (self.kv_heads * self.dim, self.dim, self.heads / self.kv_heads);
        let positions = words.len() / width;
        let mut scores = vec![0; group * positions];
        for (g, (q, out)) in x.chunks(group * dim).zip(out.chunks_mut(group * visible)).enumerate() {
            scores.fill(0);
            gemm::strided(Isa::current(), q, &words[g * dim..], width, (group, positions, dim), &mut scores);
            for (scores, out) in scores.chunks(positions).zip(out.chunks_mut(visible)) {
                out[at..at + positions].copy_from_slice(scores);
            }
        }
    }

    fn together(&self, k: u32, x: &Span<'_>, cache: (&PackedRows, usize), out: &mut [u64]) {
        together::scores(self, k, x, cache, out);
    }
}

/// Attention context `p v`: `x` holds per head one weight per visible position.
pub struct Context {
    /// Query heads.
    pub heads: usize,
    /// Value heads.
    pub kv_heads: usize,
    /// Elements per head.
    pub dim: usize,
    /// Positions of an encoder's pass, all of which every token sees; else each sees itself and those before it.
    pub all: Option<usize>,
}

impl CachedBilinear for Context {
    fn visible(&self, position: usize) -> usize {
        self.all.unwrap_or(position + 1)
    }

    fn outputs(&self, _position: usize) -> usize {
        self.heads * self.dim
    }

    fn macs(&self, position: usize) -> usize {
        self.heads * self.dim * self.visible(position)
    }

    fn block(&self, x: &[u64], visible: usize, Block { at, words }: Block<'_>, out: &mut [u64]) {
        let (width, dim, group) = (self.kv_heads * self.dim, self.dim, self.heads / self.kv_heads);
        let positions = words.len() / width;
        let mut weights = Vec::with_capacity(group * positions);
        for (g, (p, out)) in x.chunks(group * visible).zip(out.chunks_mut(group * dim)).enumerate() {
            weights.clear();
            p.chunks(visible).for_each(|p| weights.extend_from_slice(&p[at..at + positions]));
            gemm::weighted(Isa::current(), &weights, &words[g * dim..], width, (group, dim, positions), out);
        }
    }

    fn together(&self, k: u32, x: &Span<'_>, cache: (&PackedRows, usize), out: &mut [u64]) {
        together::context(self, k, x, cache, out);
    }
}

/// A map that gives zeros and counts: online at Owner and Helper, ahead at the Client.
struct Counted {
    op: Arc<dyn CachedBilinear>,
    role: Role,
    /// Some tokens ask nothing: the others do not meet the cache together.
    alone: bool,
    scope: Scope,
    work: Arc<Work>,
}

impl CachedBilinear for Counted {
    fn visible(&self, position: usize) -> usize {
        self.op.visible(position)
    }

    fn outputs(&self, position: usize) -> usize {
        self.op.outputs(position)
    }

    fn macs(&self, position: usize) -> usize {
        self.op.macs(position)
    }

    fn block(&self, _x: &[u64], _visible: usize, _block: Block<'_>, _out: &mut [u64]) {}

    fn each(&self, x: &Span<'_>, (_, positions): (&PackedRows, usize), _out: &mut [u64]) {
        // As the request that is predicted will do it, not as the walk, whose prompts and batches are shorter.
        let together = !self.alone && (self.role == Role::Client || self.work.tokens().is_some());
        let before = positions - x.len();
        self.count((0..x.len()).filter(|i| x.asks(*i)).map(|i| before + i), together);
    }

    fn together(&self, _k: u32, x: &Span<'_>, (_, positions): (&PackedRows, usize), _out: &mut [u64]) {
        self.count(positions - x.len()..positions, true);
    }
}

impl Counted {
    fn count(&self, positions: impl Iterator<Item = usize>, together: bool) {
        let macs = positions.map(|position| self.op.macs(position)).sum::<usize>() as u64;
        let (row_macs, together_macs) = if together { (0, macs) } else { (macs, 0) };
        let lane = if self.role == Role::Client { Lane::Ahead } else { Lane::Online };
        self.work.add(self.role, lane, &self.scope, Counts { row_macs, together_macs, ..Counts::default() });
    }
}

/// What it costs: `x` elements and `new` cached elements up, `z` back.
#[must_use]
pub fn cost(x: usize, new: usize, z: usize, k: u32) -> Cost {
    Cost::exchange(pack::packed_len(x + new, k) * 8, z, k)
}

/// `op(x, cache)` after appending `new` (one row per token) to the cache.
///
/// # Errors
/// [`Error::Shape`], [`Error::Peer`], [`Error::Reuse`].
pub fn product_cached(
    s: &mut Session,
    scope: &Scope,
    x: &Masked,
    new: &Masked,
    cache: &mut Cached,
    op: Arc<dyn CachedBilinear>,
) -> Result<Pending<'static, Masked>> {
    let (k, first, tokens, width) = (cache.k, cache.tokens, x.rows().tokens(), cache.width);
    let rows_fit = (0..tokens).all(|t| new.rows().row(t).len() == width);
    if x.k() != k || new.k() != k || new.f() != cache.f || new.rows().tokens() != tokens || !rows_fit {
        return Err(Error::Shape { op: "product with a cache", lhs: x.facts(), rhs: new.facts() });
    }
    let op: Arc<dyn CachedBilinear> = match s.work() {
        None => op,
        Some(work) => {
            let alone = (0..tokens).any(|t| x.rows().row(t).is_empty());
            let (scope, work) = (scope.clone(), Arc::clone(work));
            Arc::new(Counted { op, role: s.role(), alone, scope, work })
        }
    };
    let asking = |t: usize| !x.rows().row(t).is_empty();
    let out = Rows::ragged((0..tokens).map(|t| if asking(t) { op.outputs(first + t) } else { 0 }));
    let f = x.f() + cache.f;
    let m = ring::mask(k);
    cache.tokens += tokens;
    extend(&cache.own, new.raw());

    if s.is_owner() {
        s.declare(cost(x.raw().len(), new.raw().len(), out.len(), k));
        let mut shares = s.words(Pair::OwnerClient, scope, "cached.x1", x.rows(), k)?;
        shares.extend(s.words(Pair::OwnerClient, scope, "cached.y1", new.rows(), k)?);
        shares.iter_mut().zip(x.raw().iter().chain(new.raw())).for_each(|(p, d)| *p = d.wrapping_sub(*p) & m);
        s.send_online(Role::Helper, scope, "cached.shares", pack::pack(&shares, k))?;
        let z = apply(&*op, k, &Span::new(x.rows(), 0..tokens, x.raw()), &cache.own, first + tokens);
        return Ok(product::receive(scope, "cached.client", "cached.helper", z, k, f, out));
    }

    let rz = s.words(Pair::ClientHelper, scope, "cached.rz", &out, k)?;
    let rho = s.words(Pair::ClientHelper, scope, "cached.rho", &out, k)?;
    if s.role() == Role::Client {
        let mut x1 = s.words(Pair::OwnerClient, scope, "cached.x1", x.rows(), k)?;
        let y1 = s.words(Pair::OwnerClient, scope, "cached.y1", new.rows(), k)?;
        extend(&cache.share, &y1);
        x1.iter_mut().zip(x.raw()).for_each(|(a, r)| *a = a.wrapping_add(*r));
        let of =
            |part: &[u64], cache: &Store| apply(&*op, k, &Span::new(x.rows(), 0..tokens, part), cache, first + tokens);
        let (mut z, second) = (of(&x1, &cache.own), of(x.raw(), &cache.share));
        for (i, z) in z.iter_mut().enumerate() {
            *z = z.wrapping_add(second[i]).wrapping_sub(rz[i]).wrapping_add(rho[i]) & m;
        }
        s.send_ahead(scope, "cached.client", &out, 1, k, &z)?;
    } else {
        let (x, rho) = (Arc::new(x.clone()), Arc::new(rho));
        for (i, pass) in s.passes().iter().enumerate() {
            let (tokens, xr, zr) = (pass.tokens.clone(), x.rows().range(&pass.tokens), out.range(&pass.tokens));
            let (x, rho, op) = (Arc::clone(&x), Arc::clone(&rho), Arc::clone(&op));
            let (own, share) = (Arc::clone(&cache.own), Arc::clone(&cache.share));
            let (from, to) = (scope.address(pass.number, "cached.shares"), scope.address(pass.number, "cached.helper"));
            s.leave(
                i,
                Box::new(move |links| {
                    let new = tokens.len() * width;
                    let mut xy = recv_words(links, Role::Owner, Lane::Online, &from, xr.len() + new, k)?;
                    extend(&share, &xy[xr.len()..]);
                    xy.truncate(xr.len());
                    let of = |part: &[u64], cache: &Store| {
                        apply(&*op, k, &Span::new(x.rows(), tokens.clone(), part), cache, first + tokens.end)
                    };
                    let (mut z, second) = (of(&xy, &own), of(&x.raw()[xr], &share));
                    for ((z, y), rho) in z.iter_mut().zip(second).zip(&rho[zr]) {
                        *z = z.wrapping_add(y).wrapping_sub(*rho) & m;
                    }
                    links.gather(Role::Owner, Lane::Online, &to, pack::pack(&z, k))
                }),
            )?;
        }
    }
    Ok(Pending::ready(Masked::new(rz, Side::Mask, k, f, out)))
}
