//! Compare: the sign of a masked value, exact over its whole ring, in 4 messages.
//!
//! The Owner's `d` and the holders' `r` are cut into 4-bit chunks. A 16-row lookup per chunk returns whether the chunk's
//! sum kills, propagates or generates a carry (the top chunk: the sign without and with a carry in), masked modulo the
//! number of states (2 for the lowest, 3, 4 for the top); one lookup over the masked codes returns the sign.
//!
//! | | Owner | Client | Helper |
//! |---|---|---|---|
//! | 1 | queries per chunk | masked states ahead, xor pad | replies, xor pad |
//! | 2 | query over the codes `state - m mod n` | sign rows rotated by `m`, ahead | replies |
//!
//! Cost: 4 messages; for 16 bits `4*16 + 72` bits up, 8 + `k` back. Private: lookups as in [`super::lookup`]; the codes
//! that the Owner sees are uniform because each state is masked by a fresh `m`. Exact. Source: carry-lookahead by lookup
//! tables as in MAESTRO (2025) and Pika (2022).

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use super::lookup::{self, Query};
use super::{Pending, side};
use crate::error::{Error, Result};
use crate::plan::cost::Cost;
use crate::prf::Pair;
use crate::ring;
use crate::session::{Scope, Session};
use crate::share::{Masked, Rows};

/// Numbers of states: lowest, middle, top chunk.
fn states(chunks: usize) -> Vec<u32> {
    (0..chunks)
        .map(|j| {
            if j == 0 {
                2
            } else if j + 1 == chunks {
                4
            } else {
                3
            }
        })
        .collect()
}

/// Rows of the final lookup, rounded up to whole bytes.
fn rows_of(chunks: usize) -> usize {
    states(chunks).iter().product::<u32>().next_multiple_of(8) as usize
}

/// What it costs for `n` values of `4 * chunks` bits and a result of `k` bits.
#[must_use]
pub fn cost(n: usize, chunks: usize, k: u32) -> Cost {
    lookup::cost(n * chunks, 16, 1, 2).then(lookup::cost(n, rows_of(chunks), 1, k))
}

/// `sign[state0 + 2 (state1 + 3 (...))]` for codes of a given number of chunks.
fn sign_of(codes: &[u32]) -> bool {
    let (top, rest) = codes.split_last().map_or((0, codes), |(t, r)| (*t, r));
    let carry = rest.iter().enumerate().fold(0, |carry, (j, &c)| match (j, c) {
        (0, c) => c,
        (_, 2) => 1,
        (_, 1) => carry,
        _ => 0,
    });
    if carry == 1 { top >> 1 & 1 == 1 } else { top & 1 == 1 }
}

/// State of chunk `j` of `chunks` for an unreduced sum `t`.
fn state(j: usize, chunks: usize, t: u32) -> u32 {
    if j == 0 {
        u32::from(t >= 16)
    } else if j + 1 < chunks {
        u32::from(t >= 15) + u32::from(t >= 16)
    } else {
        (t >> 3 & 1) + 2 * ((t + 1) >> 3 & 1)
    }
}

/// For each combination of masks, the rows of the final lookup as a bitmap: `bit[codes] = sign(codes + masks)`.
fn sign_maps(chunks: usize) -> &'static [Vec<u64>] {
    static MAPS: [OnceLock<Vec<Vec<u64>>>; 7] = [const { OnceLock::new() }; 7];
    MAPS[chunks].get_or_init(|| {
        let n = states(chunks);
        let total: u32 = n.iter().product();
        let digits = |mut v: u32| -> Vec<u32> {
            n.iter()
                .map(|&n| {
                    let d = v % n;
                    v /= n;
                    d
                })
                .collect()
        };
        let all: Vec<Vec<u32>> = (0..total).map(digits).collect();
        let mut codes = vec![0; chunks];
        all.iter()
            .map(|m| {
                let mut map = vec![0u64; rows_of(chunks).div_ceil(64)];
                for (c, digits) in all.iter().enumerate() {
                    for (i, code) in codes.iter_mut().enumerate() {
                        *code = (digits[i] + m[i]) % n[i];
                    }
                    map[c / 64] |= u64::from(sign_of(&codes)) << (c % 64);
                }
                map
            })
            .collect()
    })
}

/// Whether each element of `x` is negative: 0 or 1 in ring `k`. The ring of `x` must be a multiple of 4 bits, 8 to 24.
///
/// # Errors
/// [`Error::Shape`] for another ring; [`Error::Peer`], [`Error::Reuse`].
pub fn is_negative(s: &mut Session, scope: &Scope, x: &Masked, k: u32) -> Result<Pending<'static, Masked>> {
    let chunks = x.k() as usize / 4;
    if !x.k().is_multiple_of(4) || !(2..=6).contains(&chunks) {
        return Err(Error::Shape { op: "compare", lhs: x.facts(), rhs: "a ring of 8, 12, 16, 20 or 24 bits".into() });
    }
    let n = states(chunks);
    let (rows, own) = (x.rows(), side(s));
    let wide = Rows::ragged((0..rows.tokens()).map(|t| rows.row(t).len() * chunks));
    let nibbles: Vec<u32> = x.raw().iter().flat_map(|w| (0..chunks).map(move |j| (w >> (4 * j) & 15) as u32)).collect();
    let first = Query { rows: &wide, n_rows: 16, words: 1, folded: 0, k: 2 };
    let last = Query { rows, n_rows: rows_of(chunks), words: 1, folded: 0, k };
    let radix = |digits: &[u32]| digits.iter().zip(&n).rev().fold(0, |v, (d, n)| v * n + d);

    if s.is_owner() {
        let codes: Vec<u32> = lookup::online(s, &scope.at("chunks"), &first, &nibbles)?
            .finish(s)?
            .iter()
            .enumerate()
            .map(|(i, &c)| (c as u32).min(n[i % chunks] - 1))
            .collect();
        let index: Vec<u32> = codes.chunks(chunks).map(radix).collect();
        let rows = rows.clone();
        let pending = lookup::online(s, &scope.at("sign"), &last, &index)?;
        return Ok(pending.then(move |v| Ok(Masked::new(v, own, k, 0, rows))));
    }

    let random = s.words(Pair::ClientHelper, &scope.at("chunks"), "compare.m", &wide, 64)?;
    let m: Arc<Vec<u32>> =
        Arc::new(random.iter().enumerate().map(|(i, w)| (w % u64::from(n[i % chunks])) as u32).collect());
    let (r, masks, moduli) = (nibbles, Arc::clone(&m), n.clone());
    let chunk_answer = move |e: Range<usize>, query: &[u8]| -> Vec<u64> {
        e.zip(query.chunks(2))
            .map(|(i, q)| {
                let (j, mut bits) = (i % chunks, u16::from_le_bytes([q[0], q[1]]));
                let mut acc = 0u32;
                while bits != 0 {
                    let row = bits.trailing_zeros();
                    bits &= bits - 1;
                    acc ^= (state(j, chunks, row + r[i]) + moduli[j] - masks[i]) % moduli[j];
                }
                u64::from(acc)
            })
            .collect()
    };
    lookup::masks(s, &scope.at("chunks"), &first, Arc::new(chunk_answer))?;
    let rout = lookup::out_masks(s, &scope.at("sign"), &last)?;
    let combos: Vec<u32> = m.chunks(chunks).map(radix).collect();
    let (sub, maps, bytes, low) = (Arc::clone(&rout), sign_maps(chunks), last.n_rows / 8, ring::mask(k));
    let sign_answer = move |e: Range<usize>, query: &[u8]| -> Vec<u64> {
        let mut out = Vec::with_capacity(e.len());
        for (i, q) in e.zip(query.chunks(bytes)) {
            let (mut hit, mut parity) = (0u64, 0u64);
            for (w, map) in q.chunks(8).zip(&maps[combos[i] as usize]) {
                let mut word = [0u8; 8];
                word[..w.len()].copy_from_slice(w);
                let word = u64::from_le_bytes(word);
                parity ^= word;
                hit ^= word & map;
            }
            let odd = |w: u64| w.count_ones() % 2 == 1;
            lookup::expand_bits(u64::from(odd(hit)), odd(parity), &[1], &sub[i..=i], low, &mut out);
        }
        out
    };
    lookup::masks(s, &scope.at("sign"), &last, Arc::new(sign_answer))?;
    Ok(Pending::ready(Masked::new(rout.to_vec(), own, k, 0, rows.clone())))
}
