//! Table lookup by two-server PIR.
//!
//! | | Owner | Client | Helper |
//! |---|---|---|---|
//! | has | index digit `d`; `pick = PRF(O,C)` | `r`, `r_out`, `pad`, `pick` | `r`, `r_out`, `pad` |
//! | ahead | | XOR of the rows in `pick`, xor `pad` | |
//! | online | sends `pick xor e_d` | | XOR of the rows in the query, xor `pad` |
//! | result | XOR of both `= T[d + r] - r_out` | `r_out` | `r_out` |
//!
//! `row[i] = T[i + r] - r_out`; `r_out`, `pad` = PRF(Client, Helper), fresh per lookup. Cost: 2 messages; one bit per row
//! up, `w` words of `k` bits back and as many ahead. Private: the query is masked by `pick`, which the Helper lacks; each
//! reply alone is masked by `pad` (without it one reply would show rows to the Owner), both together by `r_out`. Exact.
//! Source: Chor et al. (1995) two-server PIR with correlated randomness in place of the second query; Pika (2022).
//!
//! Tables of [`words`] are read by sums in place of XORs, see [`super::evaluate`], at the same cost. XORs serve where rows
//! are bits: a table whose entries are 0 or a constant per column ([`indicator`]) needs only one bit per column and row: the
//! XOR of picked rows is `parity * (-r_out) xor X * ((-r_out) xor (step - r_out))`, `X` the XOR of the picked bits. Up to 63
//! columns then cost one word of work per row.

use std::ops::Range;
use std::sync::Arc;

use super::Pending;
pub use super::evaluate::Table;
use super::evaluate::{Brings, Form, check, evaluate};
use super::window::Digits;
use crate::error::{Error, Result};
use crate::net::Lane;
use crate::par;
use crate::party::Role;
use crate::plan::cost::Cost;
use crate::plan::work::{Counts, Work};
use crate::prf::Pair;
use crate::ring::{self, fold, pack};
use crate::session::{Scope, Session};
use crate::share::{Masked, Rows};

/// Computes the XOR of picked rows, minus nothing: `(elements, query bytes) -> words`, element-major.
pub(crate) type Answer = Arc<dyn Fn(Range<usize>, &[u8]) -> Vec<u64> + Send + Sync>;

/// What a lookup of `n` elements in `rows` rows costs, `words` words of `k` bits each.
#[must_use]
pub fn cost(n: usize, rows: usize, words: usize, k: u32) -> Cost {
    Cost::exchange(n * rows, n * words, k)
}

/// The general lookup: `n_rows` rows per element (a multiple of 8), `words` words of `k` bits per element, rows made by
/// `answer` at the holders; `index` is the Owner's row. Returns raw words: `T - r_out` at the Owner, `r_out` elsewhere.
pub(crate) struct Query<'a> {
    pub rows: &'a Rows,
    pub n_rows: usize,
    pub words: usize,
    /// Words of a table that are read per row; 0 where rows are computed.
    pub folded: usize,
    pub k: u32,
}

/// The holders' `r_out`.
pub(crate) fn out_masks(s: &mut Session, scope: &Scope, q: &Query<'_>) -> Result<Arc<Vec<u64>>> {
    Ok(Arc::new(s.words_each(Pair::ClientHelper, scope, "lookup.rout", q.rows, q.words, q.k)?))
}

pub(crate) fn masks(s: &mut Session, scope: &Scope, q: &Query<'_>, answer: Answer) -> Result<()> {
    let answer = match s.work() {
        None => answer,
        Some(work) => counted(Arc::clone(work), s.role(), scope, q),
    };
    let pad = s.words_each(Pair::ClientHelper, scope, "lookup.pad", q.rows, q.words, q.k)?;
    let (words, k, bytes) = (q.words, q.k, q.n_rows / 8);
    if s.role() == Role::Client {
        let pick = s.bytes_each(Pair::OwnerClient, scope, "lookup.pick", q.rows, bytes)?;
        let n = q.rows.len();
        let reply = par::in_blocks(
            n,
            words,
            |n| n * words,
            |b| {
                let pick = &pick[b.start * bytes..b.end * bytes];
                padded(&answer, b, pick, (&pad, words))
            },
        );
        return s.send_ahead(scope, "lookup.client", q.rows, words, k, &reply);
    }
    let pad = Arc::new(pad);
    for (i, pass) in s.passes().iter().enumerate() {
        let range = q.rows.range(&pass.tokens);
        let (pad, answer) = (Arc::clone(&pad), Arc::clone(&answer));
        let (from, to) = (scope.address(pass.number, "lookup.query"), scope.address(pass.number, "lookup.helper"));
        s.leave(
            i,
            Box::new(move |links| {
                let query = links.recv(Role::Owner, Lane::Online, &from, range.len() * bytes)?;
                let packed = |n: usize| pack::packed_len(n * words, k);
                let reply = par::in_blocks(range.len(), words, packed, |b| {
                    let query = &query[b.start * bytes..b.end * bytes];
                    let elements = range.start + b.start..range.start + b.end;
                    pack::packed(&padded(&answer, elements, query, (&pad, words)), k)
                });
                links.gather(Role::Owner, Lane::Online, &to, reply)
            }),
        )?;
    }
    Ok(())
}

/// The answer for `elements`, whose queries these are, under the pad of all elements.
fn padded(answer: &Answer, elements: Range<usize>, query: &[u8], (pad, words): (&[u64], usize)) -> Vec<u64> {
    let mut reply = answer(elements.clone(), query);
    reply.iter_mut().zip(&pad[elements.start * words..]).for_each(|(a, p)| *a ^= p);
    reply
}

/// Zeros for every row, and what they would take: ahead at the Client, online at the Helper.
fn counted(work: Arc<Work>, role: Role, scope: &Scope, q: &Query<'_>) -> Answer {
    let (scope, words, folded) = (scope.clone(), q.words, q.n_rows * q.folded);
    let lane = if role == Role::Client { Lane::Ahead } else { Lane::Online };
    Arc::new(move |elements, _| {
        let (n, out) = (elements.len(), elements.len() * words);
        let counts = Counts { fold_words: (n * folded) as u64, words: out as u64, ..Counts::default() };
        work.add(role, lane, &scope, counts);
        vec![0; out]
    })
}

/// Sends the query for `index` and returns what receives the words.
pub(crate) fn online(
    s: &mut Session,
    scope: &Scope,
    q: &Query<'_>,
    index: &[u32],
) -> Result<Pending<'static, Vec<u64>>> {
    s.declare(cost(q.rows.len(), q.n_rows, q.words, q.k));
    let bytes = q.n_rows / 8;
    let mut query = s.bytes_each(Pair::OwnerClient, scope, "lookup.pick", q.rows, bytes)?;
    for (bits, &d) in query.chunks_mut(bytes).zip(index) {
        bits[d as usize / 8] ^= 1 << (d % 8);
    }
    s.send_online(Role::Helper, scope, "lookup.query", query)?;
    let (scope, n, k) = (scope.clone(), q.rows.len() * q.words, q.k);
    Ok(Pending::new(move |s| {
        let c = s.recv_packed(Role::Client, Lane::Ahead, &scope, "lookup.client", n, k)?;
        let h = s.recv_packed(Role::Helper, Lane::Online, &scope, "lookup.helper", n, k)?;
        Ok(par::each(n, |b| {
            let mut out = c.block(b.clone());
            out.iter_mut().zip(h.block(b)).for_each(|(a, b)| *a ^= b);
            out
        }))
    }))
}

/// `tables[j][digit]` for every element: one [`Masked`] per table, ring `k`, fraction bits `f[j]`.
///
/// # Errors
/// [`Error::Shape`] for a digit that does not index the tables; [`Error::Peer`], [`Error::Reuse`].
pub fn words(
    s: &mut Session,
    scope: &Scope,
    digits: &Digits,
    tables: &[Table],
    f: &[u32],
    k: u32,
) -> Result<Pending<'static, Vec<Masked>>> {
    let n_rows = tables.first().map_or(0, Table::rows);
    check(digits, n_rows)?;
    if let Some(t) = tables.iter().find(|t| t.rows() != n_rows) {
        let (lhs, rhs) = (format!("{n_rows} rows"), format!("{} rows", t.rows()));
        return Err(Error::Shape { op: "table", lhs, rhs });
    }
    let w = tables.len();
    let form = Form { n_rows, constant: false, factors: 0, extras: w, folded: w, k };
    let brings = if s.is_owner() {
        Brings::Owner(&digits.v, Vec::new())
    } else {
        let (r, tables) = (digits.v.clone(), tables.to_vec());
        Brings::Holder(Arc::new(move |e: Range<usize>, query: &[u8]| {
            let entries: Vec<&[u64]> = tables.iter().map(Table::entries).collect();
            let mut out = vec![0u64; e.len() * w];
            fold::sums(&entries, n_rows, &r[e], query, &mut out);
            out
        }))
    };
    let raw = evaluate(s, scope, &digits.rows, form, brings)?;
    let (side, rows, f) = (digits.side, digits.rows.clone(), f.to_vec());
    Ok(raw.then(move |raw| {
        let column = |j: usize| raw.iter().skip(j).step_by(w).copied().collect();
        Ok(f.iter().enumerate().map(|(j, &f)| Masked::reduced(column(j), side, k, f, rows.clone())).collect())
    }))
}

/// A table of zeros and constants: column `j` of row `i` is `steps[j]` where bit `j` of `bits[i]` is set, else 0.
#[derive(Clone, Debug)]
pub struct Indicator {
    rows: Bits,
    steps: Arc<[u64]>,
}

/// A row's columns, bit by bit, in as short a word as holds them. The highest bit is set in every row, so that the fold also yields the
/// parity of the query.
#[derive(Clone, Debug)]
enum Bits {
    Narrow(Arc<[u32]>),
    Wide(Arc<[u64]>),
}

impl Bits {
    fn len(&self) -> usize {
        match self {
            Bits::Narrow(rows) => rows.len(),
            Bits::Wide(rows) => rows.len(),
        }
    }

    /// The XOR of the picked rows of each element, and the parity of how many they are.
    fn fold(&self, n: usize, offset: &[u32], query: &[u8]) -> Vec<(u64, bool)> {
        match self {
            Bits::Narrow(rows) => {
                let mut x = vec![0u32; offset.len()];
                fold::shifted(&[rows], n, offset, query, &mut x);
                x.into_iter().map(|x| (x.into(), x >> 31 == 1)).collect()
            }
            Bits::Wide(rows) => {
                let mut x = vec![0u64; offset.len()];
                fold::shifted(&[rows], n, offset, query, &mut x);
                x.into_iter().map(|x| (x, x >> 63 == 1)).collect()
            }
        }
    }
}

impl Indicator {
    /// Over a digit that is read modulo `n`; `test(row, column)` says where the constant stands.
    ///
    /// # Errors
    /// [`Error::Shape`] for more than 63 columns.
    pub fn cyclic(n: usize, steps: &[u64], test: impl Fn(usize, usize) -> bool) -> Result<Indicator> {
        Self::unreduced(2 * n, steps, |i, j| test(i % n, j))
    }

    /// Over an unreduced digit, `entries` = twice the query's bits.
    ///
    /// # Errors
    /// [`Error::Shape`] for more than 63 columns.
    pub fn unreduced(entries: usize, steps: &[u64], test: impl Fn(usize, usize) -> bool) -> Result<Indicator> {
        if steps.len() > 63 {
            let (lhs, rhs) = (format!("{} columns", steps.len()), "at most 63".into());
            return Err(Error::Shape { op: "indicator table", lhs, rhs });
        }
        let row = |i: usize| (0..steps.len()).fold(0u64, |w, j| w | u64::from(test(i, j)) << j);
        let rows = match steps.len() {
            ..=31 => Bits::Narrow((0..entries).map(|i| row(i) as u32 | 1 << 31).collect()),
            _ => Bits::Wide((0..entries).map(|i| row(i) | 1 << 63).collect()),
        };
        Ok(Indicator { rows, steps: steps.into() })
    }
}

/// From the XOR of picked bit rows to the XOR of picked value rows, see the head of this file.
pub(crate) fn expand_bits(x: u64, parity: bool, steps: &[u64], rout: &[u64], m: u64, out: &mut Vec<u64>) {
    // Without branches: which rows were picked is random.
    let all = |bit: u64| 0u64.wrapping_sub(bit);
    let parity = all(u64::from(parity));
    out.extend(steps.iter().zip(rout).enumerate().map(|(j, (step, r))| {
        let (zero, one) = (0u64.wrapping_sub(*r), step.wrapping_sub(*r));
        ((zero & parity) ^ ((zero ^ one) & all(x >> j & 1))) & m
    }));
}

/// All columns of an [`Indicator`] for every element: element-major, `columns` per element, ring `k`.
///
/// # Errors
/// [`Error::Shape`] for a digit that does not index the table; [`Error::Peer`], [`Error::Reuse`].
pub fn indicator(
    s: &mut Session,
    scope: &Scope,
    digits: &Digits,
    table: &Indicator,
    f: u32,
    k: u32,
) -> Result<Pending<'static, Masked>> {
    let n = table.rows.len() / 2;
    check(digits, n)?;
    let w = table.steps.len();
    let q = Query { rows: &digits.rows, n_rows: n, words: w, folded: 1, k };
    let raw = if s.is_owner() {
        online(s, scope, &q, &digits.v)?
    } else {
        let rout = out_masks(s, scope, &q)?;
        let (r, sub, table) = (digits.v.clone(), Arc::clone(&rout), table.clone());
        let m = ring::mask(k);
        let answer = move |e: Range<usize>, query: &[u8]| {
            let mut out = Vec::with_capacity(e.len() * w);
            let folded = table.rows.fold(n, &r[e.clone()], query);
            for ((x, parity), rout) in folded.into_iter().zip(sub[e.start * w..].chunks(w)) {
                expand_bits(x, parity, &table.steps, rout, m, &mut out);
            }
            out
        };
        masks(s, scope, &q, Arc::new(answer))?;
        Pending::ready(Arc::unwrap_or_clone(rout))
    };
    let (side, rows) = (digits.side, &digits.rows);
    let wide = Rows::ragged((0..rows.tokens()).map(|t| rows.row(t).len() * w));
    Ok(raw.then(move |raw| Ok(Masked::reduced(raw, side, k, f, wide))))
}
