//! A function by a table and factors of the Owner, in ONE exchange: the workhorse of everything smooth.
//!
//! A lookup whose replies are sums instead of XORs is linear in the table, so the holders may put what they know of the
//! argument into the rows they send, and the Owner multiplies by what it knows: `f(hi, lo) = sum_j O_j(d_lo) W_j(hi, r_lo)`.
//!
//! | | Owner | Client | Helper |
//! |---|---|---|---|
//! | has | digit `d`, factors `O_j`; `pick`, `O1_j` = PRF(O,C) | rows `W_j`; `R_j`, `pad`, `r_z`; `pick`, `O1_j` | rows `W_j`; `R_j`, `pad`, `r_z` |
//! | ahead | | sums over `pick` of `W_j - R_j`, plus `pad_j`; `sum R_j O1_j - r_z + pad` | |
//! | online | sends `pick xor e_d`, `O_j - O1_j` | | sums over the query of `W_j - R_j`, plus `pad_j`; `sum R_j O2_j - pad` |
//! | result | `W_0 - R_0 + sum O_j (W_j - R_j) + sum R_j O_j - r_z` | `R_0 + r_z` | `R_0 + r_z` |
//!
//! The two sums differ by row `d`, with a sign that the Owner reads off its own bit of `pick`. `R_j`, `pad`, `r_z` =
//! PRF(Client, Helper), fresh. Cost: 2 messages; one bit per row and `k` per factor up, `k` per word back and as many
//! ahead, one word more if there are factors. Private: the query is masked by `pick`, the factors' shares by `O1_j`, which
//! the Helper lacks; each reply alone is masked by its `pad`, the difference of two by `R_j`, the sum of the last two by
//! `r_z`. Exact: no error beyond the tables' own.
//!
//! [`fn@line`] is `a[hi] + b[hi] lo` over a carry-free window: `W_0 = a + b r_lo`, `W_1 = b`, `O_1 = d_lo`. A function that
//! would take a lookup and then a polynomial (4 messages) takes 2. Source: two-server PIR by additive differences (Chor et
//! al., 1995) with the cross terms of [`super::product`]; derived in `docs/protocols.md`.

use std::ops::Range;
use std::sync::Arc;

use super::Pending;
use super::window::{Digits, Window};
use crate::error::{Error, Result};
use crate::net::Lane;
use crate::par::in_blocks;
use crate::party::Role;
use crate::plan::cost::Cost;
use crate::plan::work::{Counts, Work};
use crate::prf::Pair;
use crate::ring::{self, fold, pack};
use crate::session::{Received, Scope, Session};
use crate::share::{Masked, Rows};

/// A table of `2n` entries over an UNREDUCED digit `d + r` in `[0, 2n - 2]`; for a digit modulo `n` it repeats itself.
#[derive(Clone, Debug)]
pub struct Table {
    entries: Arc<[u64]>,
}

impl Table {
    /// Over a digit that is read modulo `entries.len()`.
    #[must_use]
    pub fn cyclic(entries: &[u64]) -> Table {
        Table { entries: entries.iter().chain(entries).copied().collect() }
    }

    /// Over an unreduced digit: twice as many entries as the query has bits.
    #[must_use]
    pub fn unreduced(entries: &[u64]) -> Table {
        Table { entries: entries.into() }
    }

    /// Query bits.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.entries.len() / 2
    }

    pub(crate) fn entries(&self) -> &[u64] {
        &self.entries
    }
}

/// What is exchanged per element.
#[derive(Clone, Copy)]
pub(crate) struct Form {
    /// Rows of the table, a multiple of 8.
    pub n_rows: usize,
    /// There is a word `W_0` without a factor.
    pub constant: bool,
    /// Words that a factor of the Owner multiplies.
    pub factors: usize,
    /// Words that are results by themselves.
    pub extras: usize,
    /// Words of tables read per row.
    pub folded: usize,
    /// Ring.
    pub k: u32,
}

impl Form {
    fn words(&self) -> usize {
        usize::from(self.constant) + self.factors + self.extras
    }

    /// Words of a reply.
    fn replied(&self) -> usize {
        self.words() + usize::from(self.factors > 0)
    }

    /// Results: the value, if there is one, and the extras.
    fn results(&self) -> usize {
        usize::from(self.constant || self.factors > 0) + self.extras
    }

    /// What `n` of them cost.
    pub(crate) fn cost(&self, n: usize) -> Cost {
        Cost::exchange(n * self.n_rows + 8 * pack::packed_len(n * self.factors, self.k), n * self.replied(), self.k)
    }
}

/// The holders' sums of rows: `(elements, query bytes) -> words`, element-major, `words` of them per element.
pub(crate) type Sums = Arc<dyn Fn(Range<usize>, &[u8]) -> Vec<u64> + Send + Sync>;

/// What a party brings.
pub(crate) enum Brings<'a> {
    /// The Owner: the digits, and the factors, element-major.
    Owner(&'a [u32], Vec<u64>),
    /// Client and Helper.
    Holder(Sums),
}

/// Runs the exchange; element-major results in ring `k`: values at the Owner, masks elsewhere.
pub(crate) fn evaluate(
    s: &mut Session,
    scope: &Scope,
    rows: &Rows,
    form: Form,
    brings: Brings<'_>,
) -> Result<Pending<'static, Vec<u64>>> {
    match brings {
        Brings::Owner(index, factors) => online(s, scope, rows, form, index, factors),
        Brings::Holder(sums) => masks(s, scope, rows, form, sums).map(Pending::ready),
    }
}

fn online(
    s: &mut Session,
    scope: &Scope,
    rows: &Rows,
    form: Form,
    index: &[u32],
    factors: Vec<u64>,
) -> Result<Pending<'static, Vec<u64>>> {
    s.declare(form.cost(rows.len()));
    let (bytes, k, m) = (form.n_rows / 8, form.k, ring::mask(form.k));
    let mut payload = s.bytes_each(Pair::OwnerClient, scope, "evaluate.pick", rows, bytes)?;
    // Where the pick has the row, the Helper's sum lacks it.
    let mut lacking = Vec::with_capacity(index.len());
    for (bits, &d) in payload.chunks_mut(bytes).zip(index) {
        let (byte, bit) = (d as usize / 8, d % 8);
        lacking.push(bits[byte] >> bit & 1 == 1);
        bits[byte] ^= 1 << bit;
    }
    if form.factors > 0 {
        let mut shares = s.words_each(Pair::OwnerClient, scope, "evaluate.o1", rows, form.factors, k)?;
        shares.iter_mut().zip(&factors).for_each(|(share, o)| *share = o.wrapping_sub(*share) & m);
        pack::pack_into(&shares, k, &mut payload);
    }
    s.send_online(Role::Helper, scope, "evaluate.query", payload)?;
    let (scope, n) = (scope.clone(), rows.len() * form.replied());
    Ok(Pending::new(move |s| {
        let client = s.recv_packed(Role::Client, Lane::Ahead, &scope, "evaluate.client", n, k)?;
        let helper = s.recv_packed(Role::Helper, Lane::Online, &scope, "evaluate.helper", n, k)?;
        let (replied, first) = (form.replied(), usize::from(form.constant));
        let results = |elements: Range<usize>| {
            let words = elements.start * replied..elements.end * replied;
            let (client, helper) = (client.block(words.clone()), helper.block(words));
            let mut out = Vec::with_capacity(elements.len() * form.results());
            let replies = client.chunks(replied).zip(helper.chunks(replied)).zip(&lacking[elements.clone()]);
            for (e, ((c, h), &lacking)) in elements.zip(replies) {
                let row = |j: usize| if lacking { c[j].wrapping_sub(h[j]) } else { h[j].wrapping_sub(c[j]) };
                if form.results() > form.extras {
                    let mut value = if form.constant { row(0) } else { 0 };
                    for (j, o) in factors[e * form.factors..(e + 1) * form.factors].iter().enumerate() {
                        value = value.wrapping_add(o.wrapping_mul(row(first + j)));
                    }
                    if form.factors > 0 {
                        value = value.wrapping_add(c[replied - 1]).wrapping_add(h[replied - 1]);
                    }
                    out.push(value & m);
                }
                out.extend((first + form.factors..form.words()).map(|j| row(j) & m));
            }
            out
        };
        Ok(in_blocks(lacking.len(), replied, |n| n * form.results(), results))
    }))
}

fn masks(s: &mut Session, scope: &Scope, rows: &Rows, form: Form, sums: Sums) -> Result<Vec<u64>> {
    let sums = match s.work() {
        None => sums,
        Some(work) => counted(Arc::clone(work), s.role(), scope, form),
    };
    let (k, m, words, bytes) = (form.k, ring::mask(form.k), form.words(), form.n_rows / 8);
    let rout = Arc::new(s.words_each(Pair::ClientHelper, scope, "evaluate.rout", rows, words, k)?);
    let pad = s.words_each(Pair::ClientHelper, scope, "evaluate.pad", rows, form.replied(), k)?;
    let rz = match form.factors {
        0 => Vec::new(),
        _ => s.words(Pair::ClientHelper, scope, "evaluate.rz", rows, k)?,
    };
    if s.role() == Role::Client {
        let pick = s.bytes_each(Pair::OwnerClient, scope, "evaluate.pick", rows, bytes)?;
        let shares = match form.factors {
            0 => Vec::new(),
            factors => s.words_each(Pair::OwnerClient, scope, "evaluate.o1", rows, factors, k)?,
        };
        let (replied, factors) = (form.replied(), form.factors);
        let reply = in_blocks(
            rows.len(),
            replied,
            |n| n * replied,
            |b| {
                let (pick, shares) =
                    (&pick[b.start * bytes..b.end * bytes], &shares[b.start * factors..b.end * factors]);
                let mut reply = replies(form, b.clone(), &sums, pick, shares, &rout);
                for (e, reply) in b.zip(reply.chunks_mut(replied.max(1))) {
                    let pad = &pad[e * replied..];
                    reply.iter_mut().zip(pad).for_each(|(v, p)| *v = v.wrapping_add(*p) & m);
                    if let (Some(rz), Some(last)) = (rz.get(e), reply.last_mut()) {
                        *last = last.wrapping_sub(*rz) & m;
                    }
                }
                reply
            },
        );
        s.send_ahead(scope, "evaluate.client", rows, form.replied(), k, &reply)?;
    } else {
        let pad = Arc::new(pad);
        for (i, pass) in s.passes().iter().enumerate() {
            let range = rows.range(&pass.tokens);
            let (pad, rout, sums) = (Arc::clone(&pad), Arc::clone(&rout), Arc::clone(&sums));
            let (from, to) =
                (scope.address(pass.number, "evaluate.query"), scope.address(pass.number, "evaluate.helper"));
            s.leave(
                i,
                Box::new(move |links| {
                    let (queries, shared) = (range.len() * bytes, range.len() * form.factors);
                    let packed = pack::packed_len(shared, k);
                    let mut payload = links.recv(Role::Owner, Lane::Online, &from, queries + packed)?;
                    let shares = Received::new(payload.split_off(queries), shared, k, (Role::Owner, &from))?;
                    let queries = payload;
                    let (replied, factors) = (form.replied(), form.factors);
                    let reply = in_blocks(
                        range.len(),
                        replied,
                        |n| pack::packed_len(n * replied, k),
                        |b| {
                            let query = &queries[b.start * bytes..b.end * bytes];
                            let shares = shares.block(b.start * factors..b.end * factors);
                            let elements = range.start + b.start..range.start + b.end;
                            let mut reply = replies(form, elements.clone(), &sums, query, &shares, &rout);
                            let pads = pad[elements.start * replied..].chunks(replied);
                            for (reply, pad) in reply.chunks_mut(replied).zip(pads) {
                                for (j, (v, p)) in reply.iter_mut().zip(pad).enumerate() {
                                    // The last pair is added at the Owner, the others are subtracted.
                                    let cross = j == form.words();
                                    *v = if cross { v.wrapping_sub(*p) } else { v.wrapping_add(*p) } & m;
                                }
                            }
                            pack::packed(&reply, k)
                        },
                    );
                    links.gather(Role::Owner, Lane::Online, &to, reply)
                }),
            )?;
        }
    }
    // The value's mask, and those of the extras.
    let mut out = Vec::with_capacity(rows.len() * form.results());
    for (e, rout) in rout.chunks(words).enumerate() {
        if form.results() > form.extras {
            let constant = if form.constant { rout[0] } else { 0 };
            out.push(constant.wrapping_add(rz.get(e).copied().unwrap_or(0)) & m);
        }
        out.extend_from_slice(&rout[words - form.extras..]);
    }
    Ok(out)
}

/// Sums of picked rows less their masks, and the cross term, without pads.
fn replies(form: Form, elements: Range<usize>, sums: &Sums, queries: &[u8], shares: &[u64], rout: &[u64]) -> Vec<u64> {
    let (words, factors, first) = (form.words(), form.factors, usize::from(form.constant));
    let sums = sums(elements.clone(), queries);
    let mut out = Vec::with_capacity(elements.len() * form.replied());
    let rows =
        sums.chunks(words).zip(queries.chunks(form.n_rows / 8)).zip(rout[elements.start * words..].chunks(words));
    for (e, ((sums, query), rout)) in rows.enumerate() {
        let picked = ones(query);
        out.extend(sums.iter().zip(rout).map(|(v, r)| v.wrapping_sub(picked.wrapping_mul(*r))));
        if factors > 0 {
            out.push(ring::gemm::dot(&shares[e * factors..(e + 1) * factors], &rout[first..first + factors]));
        }
    }
    out
}

/// Bits set.
pub(crate) fn ones(query: &[u8]) -> u64 {
    let (words, rest) = query.as_chunks::<8>();
    let whole: u32 = words.iter().map(|w| u64::from_le_bytes(*w).count_ones()).sum();
    u64::from(whole + rest.iter().map(|b| b.count_ones()).sum::<u32>())
}

/// Zeros for every row, and what they would take: ahead at the Client, online at the Helper.
fn counted(work: Arc<Work>, role: Role, scope: &Scope, form: Form) -> Sums {
    let (scope, words, folded) = (scope.clone(), form.words(), form.n_rows * form.folded);
    let lane = if role == Role::Client { Lane::Ahead } else { Lane::Online };
    Arc::new(move |elements, _| {
        let (n, out) = (elements.len(), elements.len() * words);
        let counts = Counts { fold_words: (n * folded) as u64, words: out as u64, ..Counts::default() };
        work.add(role, lane, &scope, counts);
        vec![0; out]
    })
}

pub(crate) fn check(digits: &Digits, rows: usize) -> Result<()> {
    if rows < 8 || rows != 1 << digits.bits {
        let (lhs, rhs) = (format!("a digit of {} bits", digits.bits), format!("a table of {rows} rows"));
        return Err(Error::Shape { op: "table", lhs, rhs });
    }
    Ok(())
}

/// Columns over the same rows, `a[hi] + b[hi] lo` and others that are looked up as they are.
#[derive(Clone, Debug)]
pub struct Lines {
    /// `a`, `b`, then the others.
    columns: Vec<Table>,
}

impl Lines {
    /// Of `a`, `b` with the same fraction bits, and `others`, all of the same length.
    #[must_use]
    pub fn new(a: Table, b: Table, others: Vec<Table>) -> Lines {
        Lines { columns: [a, b].into_iter().chain(others).collect() }
    }

    /// Rows of a query.
    pub(crate) fn rows(&self) -> usize {
        self.columns[0].rows()
    }

    /// Columns, `a` and `b` among them.
    pub(crate) fn columns(&self) -> usize {
        self.columns.len()
    }

    /// Their entries.
    pub(crate) fn entries(&self) -> Vec<&[u64]> {
        self.columns.iter().map(Table::entries).collect()
    }

    fn form(&self, k: u32) -> Form {
        let n = self.columns.len();
        Form { n_rows: self.columns[0].rows(), constant: true, factors: 1, extras: n - 2, folded: n, k }
    }

    /// What `n` evaluations in ring `k` cost.
    #[must_use]
    pub fn cost(&self, n: usize, k: u32) -> Cost {
        self.form(k).cost(n)
    }
}

/// `a[hi] + b[hi] lo` with `f` fraction bits in ring `k`, then one value of 0 fraction bits per further column.
///
/// # Errors
/// [`Error::Shape`] for a digit that does not index every column; [`Error::Peer`], [`Error::Reuse`].
pub fn line(
    s: &mut Session,
    scope: &Scope,
    w: &Window,
    t: &Lines,
    f: u32,
    k: u32,
) -> Result<Pending<'static, Vec<Masked>>> {
    let form = t.form(k);
    for column in &t.columns {
        check(&w.hi, column.rows())?;
    }
    let (rows, side) = (&w.hi.rows, w.hi.side);
    let brings = if s.is_owner() {
        Brings::Owner(&w.hi.v, w.lo.v.iter().map(|&v| u64::from(v)).collect())
    } else {
        let (hi, lo, columns) = (w.hi.v.clone(), w.lo.v.clone(), t.columns.clone());
        Brings::Holder(Arc::new(move |e: Range<usize>, query: &[u8]| {
            let entries: Vec<&[u64]> = columns.iter().map(Table::entries).collect();
            let mut out = vec![0u64; e.len() * entries.len()];
            fold::sums(&entries, form.n_rows, &hi[e.clone()], query, &mut out);
            for (sums, lo) in out.chunks_mut(entries.len()).zip(&lo[e]) {
                sums[0] = sums[0].wrapping_add(sums[1].wrapping_mul(u64::from(*lo)));
            }
            out
        }))
    };
    let raw = evaluate(s, scope, rows, form, brings)?;
    let (rows, results) = (rows.clone(), form.results());
    Ok(raw.then(move |raw| {
        if results == 1 {
            return Ok(vec![Masked::reduced(raw, side, k, f, rows)]);
        }
        let column = |j: usize| raw.iter().skip(j).step_by(results).copied().collect();
        Ok((0..results)
            .map(|j| Masked::reduced(column(j), side, k, if j == 0 { f } else { 0 }, rows.clone()))
            .collect())
    }))
}
