//! Vectors times a smooth function of a scalar each, `y_j = x_j f(v)`, in ONE exchange: the second half of a norm.
//!
//! With `f(v) = a[hi] + b[hi] lo` over a carry-free window of `v`, `A = a[hi] + b[hi] r_lo`, `B = b[hi]`, and `x = d + r`:
//! `y_j = d_j A + d_j d_lo B + r_j A + d_lo r_j B`. The holders know `r_j` and `r_lo`, the Owner `d_j` and `d_lo`; what
//! neither knows is the row, and that is looked up as in [`super::evaluate`], by sums that are linear in the table.
//!
//! | | Owner | Client | Helper |
//! |---|---|---|---|
//! | has | digit of `v`; `d_j`, `d_lo`; `pick`, `O1` = PRF(O,C) | table, `r_j`, `r_lo`; `R`, `pad`, `r_z`; `pick`, `O1` | table, `r_j`, `r_lo`; `R`, `pad`, `r_z` |
//! | ahead | | over `pick`: `A - R_A`, `B - R_B`, `r_j A - R_Aj`, `r_j B - R_Bj`, plus pads; `X(O1) - r_z + pad` | |
//! | online | sends `pick xor e`, and `d_lo, d_j, d_j d_lo` less `O1` | | the same over the query; `X(O2) - pad` |
//! | result | `d_j (A - R_A) + d_j d_lo (B - R_B) + (r_j A - R_Aj) + d_lo (r_j B - R_Bj) + X - r_z` | `R_Aj + r_z` | `R_Aj + r_z` |
//!
//! with `X_j(O) = R_A d_j + R_B d_j d_lo + R_Bj d_lo`, linear in the factors' shares `O1 + O2`. One column more is looked up
//! as it is (whether `v` is outside of the window's good rows).
//!
//! Cost, for a group of `n` elements and a table of `2^h` rows: 2 messages; `2^h + k (1 + 2n)` bits up, `k (3 + 3n)` back and
//! as many ahead. A look-up of `f(v)` and then a product take 4 messages and less than half of these bytes: this is for few
//! and short vectors, where a message costs more than they do. Private: the query is masked by `pick` and the factors by
//! `O1`, which the Helper lacks; each reply alone is masked by its `pad`, differences of two replies by `R`, the sum of the
//! last ones by `r_z`; all of them fresh, from PRF(Client, Helper), one word for each word. Exact: no error but the table's.
//! Source: as [`super::evaluate`], whose factors are one scalar's.

use std::ops::Range;
use std::sync::Arc;

use super::Pending;
use super::evaluate::{Lines, ones};
use super::window::Window;
use crate::error::{Error, PeerFault, Result};
use crate::net::{Lane, blame};
use crate::par::in_blocks;
use crate::party::Role;
use crate::plan::cost::Cost;
use crate::plan::work::Counts;
use crate::prf::Pair;
use crate::ring::{fold, pack};
use crate::session::{Scope, Session};
use crate::share::{Masked, Rows};

/// Words that a group has beside those of its elements: `A`, `B`, the column.
const SHARED: usize = 3;
const K: u32 = 64;

/// Sizes that all three parties agree on.
#[derive(Clone, Copy)]
struct Form {
    n_rows: usize,
    /// Elements of a group.
    width: usize,
}

impl Form {
    fn query(self) -> usize {
        self.n_rows / 8
    }

    fn factors(self) -> usize {
        1 + 2 * self.width
    }

    /// Words that are differences of two replies.
    fn words(self) -> usize {
        SHARED + 2 * self.width
    }

    fn replied(self) -> usize {
        self.words() + self.width
    }

    fn cost(self, groups: usize) -> Cost {
        Cost::exchange(groups * (self.n_rows + 64 * self.factors()), groups * self.replied(), K)
    }
}

/// What it costs for `groups` groups of `width` elements and a table of `n_rows` rows.
#[must_use]
pub fn cost(groups: usize, width: usize, n_rows: usize) -> Cost {
    Form { n_rows, width }.cost(groups)
}

/// `y`, and the column's value of each group.
pub struct Normalised {
    /// `x_j f(v)` in ring 64, fraction bits of both added.
    pub y: Masked,
    /// Of 0 fraction bits, in ring 64.
    pub column: Masked,
}

/// The factors of a group's row of shares.
struct Factors<'a> {
    lo: u64,
    d: &'a [u64],
    d_lo: &'a [u64],
}

impl<'a> Factors<'a> {
    fn of(share: &'a [u64], width: usize) -> Self {
        let (d, d_lo) = share[1..].split_at(width);
        Factors { lo: share[0], d, d_lo }
    }

    /// `X_j` with the masks `r` of the group's words.
    fn cross<'b>(&'b self, r: &'b [u64], width: usize) -> impl Iterator<Item = u64> + 'b {
        let with_lo = &r[SHARED + width..];
        (0..width).map(move |j| {
            let sum = r[0].wrapping_mul(self.d[j]).wrapping_add(r[1].wrapping_mul(self.d_lo[j]));
            sum.wrapping_add(with_lo[j].wrapping_mul(self.lo))
        })
    }
}

/// Every group of `x` (ring 64) times the function that `t` is of the one window for it; `f` fraction bits of the function.
///
/// # Errors
/// [`Error::Shape`] for windows, tables and vectors that do not go together; [`Error::Peer`], [`Error::Reuse`].
pub fn normalise(
    s: &mut Session,
    scope: &Scope,
    x: &Masked,
    w: &Window,
    t: &Lines,
    f: u32,
) -> Result<Pending<'static, Normalised>> {
    let groups = &w.hi.rows;
    let form = Form { n_rows: t.rows(), width: x.raw().len().checked_div(groups.len()).unwrap_or(1) };
    let fits = |i| x.rows().row(i).len() == groups.row(i).len() * form.width;
    let tokens = groups.tokens();
    if x.k() != K || x.rows().tokens() != tokens || !(0..tokens).all(fits) || t.columns() != SHARED {
        let rhs = format!("{} groups, {} columns", groups.len(), t.columns());
        return Err(Error::Shape { op: "normalise", lhs: x.facts(), rhs });
    }
    super::evaluate::check(&w.hi, form.n_rows)?;
    if s.is_owner() { online(s, scope, x, w, form, f) } else { masks(s, scope, x, w, t, form, f).map(Pending::ready) }
}

fn online(
    s: &mut Session,
    scope: &Scope,
    x: &Masked,
    w: &Window,
    form: Form,
    f: u32,
) -> Result<Pending<'static, Normalised>> {
    let groups = w.hi.rows.clone();
    s.declare(form.cost(groups.len()));
    let mut payload = s.bytes_each(Pair::OwnerClient, scope, "normalise.pick", &groups, form.query())?;
    let mut lacking = Vec::with_capacity(groups.len());
    for (bits, &d) in payload.chunks_mut(form.query()).zip(&w.hi.v) {
        let (byte, bit) = (d as usize / 8, d % 8);
        lacking.push(bits[byte] >> bit & 1 == 1);
        bits[byte] ^= 1 << bit;
    }
    let lo: Vec<u64> = w.lo.v.iter().map(|&v| u64::from(v)).collect();
    let mut shares = s.words_each(Pair::OwnerClient, scope, "normalise.o1", &groups, form.factors(), K)?;
    for ((share, d), lo) in shares.chunks_mut(form.factors()).zip(x.raw().chunks(form.width.max(1))).zip(&lo) {
        let factors = std::iter::once(*lo).chain(d.iter().copied()).chain(d.iter().map(|d| d.wrapping_mul(*lo)));
        share.iter_mut().zip(factors).for_each(|(share, o)| *share = o.wrapping_sub(*share));
    }
    pack::pack_into(&shares, K, &mut payload);
    s.send_online(Role::Helper, scope, "normalise.query", payload)?;
    let (scope, x, f) = (scope.clone(), x.clone(), x.f() + f);
    Ok(Pending::new(move |s| {
        let n = groups.len() * form.replied();
        let client = s.recv_words(Role::Client, Lane::Ahead, &scope, "normalise.client", n, K)?;
        let helper = s.recv_words(Role::Helper, Lane::Online, &scope, "normalise.helper", n, K)?;
        let replies = client.chunks(form.replied()).zip(helper.chunks(form.replied()));
        let (mut y, mut column) = (Vec::with_capacity(x.raw().len()), Vec::with_capacity(groups.len()));
        for (g, ((c, h), lacking)) in replies.zip(lacking).enumerate() {
            let row = |i: usize| if lacking { c[i].wrapping_sub(h[i]) } else { h[i].wrapping_sub(c[i]) };
            let (a, b, lo, at) = (row(0), row(1), lo[g], form.words());
            for (j, d) in x.raw()[g * form.width..(g + 1) * form.width].iter().enumerate() {
                let own = d.wrapping_mul(a.wrapping_add(lo.wrapping_mul(b)));
                let rest = row(SHARED + j).wrapping_add(lo.wrapping_mul(row(SHARED + form.width + j)));
                y.push(own.wrapping_add(rest).wrapping_add(c[at + j]).wrapping_add(h[at + j]));
            }
            column.push(row(2));
        }
        let side = x.side();
        Ok(Normalised {
            y: Masked::new(y, side, K, f, x.rows().clone()),
            column: Masked::new(column, side, K, 0, groups),
        })
    }))
}

/// What a holder needs of its own to answer.
struct Holder {
    form: Form,
    t: Lines,
    hi: Vec<u32>,
    lo: Vec<u64>,
    r: Vec<u64>,
    rout: Vec<u64>,
}

impl Holder {
    /// [`Holder::reply`] of many groups.
    fn replies(&self, groups: Range<usize>, query: &[u8], shares: &[u64]) -> Vec<u64> {
        let (each, bytes, factors) = (self.form.replied(), self.form.query(), self.form.factors());
        let part = |b: Range<usize>| {
            let shares = &shares[b.start * factors..b.end * factors];
            self.reply(groups.start + b.start, &query[b.start * bytes..b.end * bytes], shares)
        };
        in_blocks(groups.len(), each, |n| n * each, part)
    }

    /// Sums of picked rows less their masks, and the cross terms, of groups from `first` on; without pads.
    fn reply(&self, first: usize, query: &[u8], shares: &[u64]) -> Vec<u64> {
        let Form { n_rows, width, .. } = self.form;
        let n = query.len() / self.form.query();
        let mut sums = vec![0; n * SHARED];
        fold::sums(&self.t.entries(), n_rows, &self.hi[first..first + n], query, &mut sums);
        let mut out = Vec::with_capacity(n * self.form.replied());
        let each = sums.chunks(SHARED).zip(query.chunks(self.form.query())).zip(shares.chunks(self.form.factors()));
        for (g, ((sums, query), share)) in (first..).zip(each) {
            let rout = &self.rout[g * self.form.words()..(g + 1) * self.form.words()];
            let (picked, r) = (ones(query), &self.r[g * width..(g + 1) * width]);
            let a = sums[0].wrapping_add(sums[1].wrapping_mul(self.lo[g]));
            let (with_a, with_b) = (r.iter().map(|r| r.wrapping_mul(a)), r.iter().map(|r| r.wrapping_mul(sums[1])));
            let words = [a, sums[1], sums[2]].into_iter().chain(with_a).chain(with_b);
            out.extend(words.zip(rout).map(|(v, r)| v.wrapping_sub(picked.wrapping_mul(*r))));
            out.extend(Factors::of(share, width).cross(rout, width));
        }
        out
    }
}

fn masks(s: &mut Session, scope: &Scope, x: &Masked, w: &Window, t: &Lines, form: Form, f: u32) -> Result<Normalised> {
    let groups = &w.hi.rows;
    let rout = s.words_each(Pair::ClientHelper, scope, "normalise.rout", groups, form.words(), K)?;
    let pad = s.words_each(Pair::ClientHelper, scope, "normalise.pad", groups, form.replied(), K)?;
    let rz = s.words_each(Pair::ClientHelper, scope, "normalise.rz", groups, form.width, K)?;
    let (mut y, mut column) = (rz.clone(), Vec::with_capacity(groups.len()));
    for (rout, y) in rout.chunks(form.words()).zip(y.chunks_mut(form.width.max(1))) {
        y.iter_mut().zip(&rout[SHARED..]).for_each(|(y, r)| *y = y.wrapping_add(*r));
        column.push(rout[2]);
    }
    let counted = s.work().is_some();
    s.count(
        scope,
        Counts {
            fold_words: (groups.len() * form.n_rows * SHARED) as u64,
            words: (groups.len() * form.replied()) as u64,
            ..Counts::default()
        },
    );
    let lo = w.lo.v.iter().map(|&v| u64::from(v)).collect();
    let holder = Holder { form, t: t.clone(), hi: w.hi.v.clone(), lo, r: x.raw().to_vec(), rout };
    if s.role() == Role::Client {
        let pick = s.bytes_each(Pair::OwnerClient, scope, "normalise.pick", groups, form.query())?;
        let shares = s.words_each(Pair::OwnerClient, scope, "normalise.o1", groups, form.factors(), K)?;
        let mut reply = if counted { vec![0; pad.len()] } else { holder.replies(0..groups.len(), &pick, &shares) };
        for (g, (reply, pad)) in reply.chunks_mut(form.replied()).zip(pad.chunks(form.replied())).enumerate() {
            reply.iter_mut().zip(pad).for_each(|(v, p)| *v = v.wrapping_add(*p));
            let rz = &rz[g * form.width..];
            reply[form.words()..].iter_mut().zip(rz).for_each(|(v, r)| *v = v.wrapping_sub(*r));
        }
        s.send_ahead(scope, "normalise.client", groups, form.replied(), K, &reply)?;
    } else {
        let (holder, pad) = (Arc::new(holder), Arc::new(pad));
        for (i, pass) in s.passes().iter().enumerate() {
            let range = groups.range(&pass.tokens);
            let (holder, pad) = (Arc::clone(&holder), Arc::clone(&pad));
            let (from, to) =
                (scope.address(pass.number, "normalise.query"), scope.address(pass.number, "normalise.helper"));
            s.leave(
                i,
                Box::new(move |links| {
                    let (queries, shared) = (range.len() * form.query(), range.len() * form.factors());
                    let payload =
                        links.recv(Role::Owner, Lane::Online, &from, queries + pack::packed_len(shared, K))?;
                    let shares = pack::unpack(&payload[queries..], shared, K)
                        .ok_or_else(|| blame(Role::Owner, &from, PeerFault::Malformed("padding bits set")))?;
                    let mut reply = match counted {
                        true => vec![0; range.len() * form.replied()],
                        false => holder.replies(range.clone(), &payload[..queries], &shares),
                    };
                    let pads = pad[range.start * form.replied()..].chunks(form.replied());
                    for (reply, pad) in reply.chunks_mut(form.replied()).zip(pads) {
                        for (i, (v, p)) in reply.iter_mut().zip(pad).enumerate() {
                            // The last ones are added at the Owner, the others subtracted.
                            *v = if i < form.words() { v.wrapping_add(*p) } else { v.wrapping_sub(*p) };
                        }
                    }
                    links.gather(Role::Owner, Lane::Online, &to, pack::pack(&reply, K))
                }),
            )?;
        }
    }
    let rows = |rows: &Rows| rows.clone();
    Ok(Normalised {
        y: Masked::new(y, x.side(), K, x.f() + f, rows(x.rows())),
        column: Masked::new(column, x.side(), K, 0, rows(groups)),
    })
}
