//! Attention with a secret KV cache: 14 messages, or 16 where queries and keys are lifted (20 to 24 with a norm on queries and keys, which are normalised side by side); of a
//! long prompt the 14 from the scores to the normalised context for each block of its rows ([`crate::plan::block`]).
//!
//! q, k, v in one linear; rotation (public); lifts of q, k, v beside each other (2), or none of q and k where the plan leaves them wide enough, and v's
//! beside the scores (of a prompt in blocks before the first of them); scores (2); thermometer maximum (4);
//! exponential (2); P V beside the reciprocal's windows (2); lift of the context beside their selection (2);
//! normalisation (2). Only positions that a token may see are ever computed: itself and those before it, or of an encoder all of the
//! pass.
//!
//! Where only some rows are wanted ([`Wanted`]), keys and values are computed of all, and all else of these; queries too, unless an adapter or
//! a norm stands behind the projection that they share with the keys.
//!
//! An adapter on q, k or v, or on the output projection, adds 2 messages each (`projection.rs`).
//!
//! A 2ReLU softmax takes positive parts in place of maximum and exponential: the sign of each score (4) beside its lift, and
//! their product (2).

use std::sync::Arc;

use super::norm::{Norm, Roots};
use super::projection::projection;
use super::{Context, Tables, Wanted, last_row};
use crate::approx::{PositiveTable, exp_tables};
use crate::error::Result;
use crate::model::prepare::PreparedLayer;
use crate::model::variant::TWO_RELU_EPS;
use crate::model::{LayerShape, Softmax};
use crate::plan::{AttentionPlan, ExpPlan, F, F_QK, F_ROPE, product_ring};
use crate::protocol::Pending;
use crate::protocol::cached::{Cached, Context as PV, Scores, product_cached};
use crate::protocol::exp::{Exp, exp};
use crate::protocol::guard::guard;
use crate::protocol::last_tokens;
use crate::protocol::lift::lift;
use crate::protocol::linear::{owner_linear, owner_linear_part};
use crate::protocol::pieces::{Pieces, Step};
use crate::protocol::positive::{self, Positive};
use crate::protocol::product::{Scale, product};
use crate::protocol::relu::positive_part;
use crate::protocol::thermometer::{self, Thermometer, counter_bits};
use crate::protocol::truncate::truncate;
use crate::ring::fixed;
use crate::session::{Scope, Session};
use crate::share::{Masked, Rows};

/// Exponential, reciprocal and the optional norms of queries and keys.
pub(super) struct AttentionTables {
    shape: LayerShape,
    exp: Option<Exp>,
    inverse: Positive,
    qk_norm: Option<Norm>,
}

impl AttentionTables {
    pub(super) fn new(
        p: &AttentionPlan,
        shape: LayerShape,
        head_dim: usize,
        tables: Tables,
        roots: &mut Roots,
    ) -> Self {
        let exp = p.exp.as_ref().map(|e| {
            let step = f64::from(e.step_bits).exp2() / f64::from(F).exp2();
            let tables = exp_tables(F, e.exp_lo_bits, p.score_k - e.exp_lo_bits, 2.0 * step);
            Exp::new(&tables, p.prob_k, p.f_prob)
        });
        let inverse = match tables {
            Tables::Fitted => {
                let table = PositiveTable::reciprocal(p.total_bits, p.total_window, f64::from(p.f_prob).exp2());
                Positive::new(table, p.f_inverse)
            }
            Tables::Blank => Positive::blank(p.total_bits, p.total_window, false, p.f_inverse),
        };
        AttentionTables { shape, exp, inverse, qk_norm: p.qk_norm.as_ref().map(|n| Norm::new(n, head_dim, roots)) }
    }
}

/// Rotates pairs `(i, i + dim/2)` of every head by the angle of its position; a public linear map.
fn rotate(x: &Masked, first: usize, dim: usize, frequencies: &[f64]) -> Masked {
    let (half, scale) = (dim / 2, f64::from(F_ROPE).exp2());
    let rows = x.rows().clone();
    x.map(x.f() + F_ROPE, rows.clone(), |v| {
        let mut out = vec![0u64; v.len()];
        for t in (0..rows.tokens()).filter(|t| !rows.row(*t).is_empty()) {
            let turn: Vec<(u64, u64)> = frequencies
                .iter()
                .map(|f| {
                    let angle = (first + t) as f64 * f;
                    ((angle.cos() * scale).round() as i64 as u64, (angle.sin() * scale).round() as i64 as u64)
                })
                .collect();
            let row = rows.row(t);
            for (x, y) in v[row.clone()].chunks(dim).zip(out[row].chunks_mut(dim)) {
                for (i, &(cos, sin)) in turn.iter().enumerate() {
                    let (a, b) = (x[i], x[i + half]);
                    y[i] = a.wrapping_mul(cos).wrapping_sub(b.wrapping_mul(sin));
                    y[i + half] = b.wrapping_mul(cos).wrapping_add(a.wrapping_mul(sin));
                }
            }
        }
        out
    })
}

/// To ring `k`: a lift, or nothing to send where the value's ring is wide enough.
pub(super) fn to_ring(s: &mut Session, scope: &Scope, x: &Masked, k: u32) -> Result<Pending<'static, Masked>> {
    if x.k() >= k { Ok(Pending::ready(x.narrow(k)?)) } else { lift(s, scope, x, k) }
}

/// `e^(s - m)` with `m` near the largest score of each row: never far above 1, and not all of them tiny.
fn exponential(
    c: &mut Context<'_>,
    scope: &Scope,
    s: &Masked,
    lengths: &[usize],
    p: &ExpPlan,
    table: &Exp,
) -> Result<Masked> {
    let t = Thermometer { step_bits: p.step_bits, base: p.base, n: p.steps };
    // All passes of a batch and all parties must agree on the counters: sized for the cache's end, publicly known.
    let (counter, count_bits) = (counter_bits(c.config.max_positions), c.flags.count_bits());
    // Codes, or the exponential's words.
    let reply = ((p.steps + 1) * counter as usize).div_ceil(8).max(8 * 3);
    let scores = |tokens| {
        let first = if c.config.encoder() { 0 } else { lengths[0] - 1 };
        s.rows().row(0).len() / lengths[0] * c.config.visible(first, tokens).sum::<usize>()
    };
    let pieces = Pieces::of(c.s, s.rows(), c.pieces, (scores, reply))?;
    let parts = pieces.run(c.s, scope, |session, scope, rows| {
        let (s, lengths) = (pieces.rows(s, rows)?, &lengths[rows.clone()]);
        let codes = thermometer::start(session, &scope.at("max"), &s, lengths, counter, &t, count_bits)?;
        Ok(Step::next(move |session, scope| {
            let thresholds = codes.thresholds(session, &scope.at("max"))?;
            Ok(Step::next(move |session, scope| {
                let reference = thresholds.finish(session)?;
                let below = thermometer::subtract(&s, &reference.m, lengths)?;
                let e = exp(session, &scope.at("exp"), &below, table)?;
                Ok(Step::next(move |session, _| Ok(Step::Done((e.finish(session)?, reference.faults)))))
            }))
        }))
    })?;
    let (exps, faults): (Vec<_>, Vec<_>) = parts.into_iter().unzip();
    c.flags.count(c.layer, "largest score of a row", Masked::stack(faults)?);
    Masked::stack(exps)
}

/// The attention of a layer at a pass.
pub(super) struct Attention<'a> {
    pub(super) parts: &'a PreparedLayer,
    pub(super) plan: &'a AttentionPlan,
    pub(super) tables: &'a AttentionTables,
    pub(super) frequencies: &'a [f64],
    /// Position of the first row.
    pub(super) first: usize,
    /// Rows that are computed at once.
    pub(super) block_rows: usize,
    /// Whose queries there are.
    pub(super) wanted: Wanted,
}

impl Attention<'_> {
    pub(super) fn apply(
        &self,
        c: &mut Context<'_>,
        x: &Masked,
        (keys, values): &mut (Cached, Cached),
    ) -> Result<Masked> {
        let (scope, p) = (c.scope.at("attn"), self.plan);
        let (q, k, v) = self.projected(c, &scope, x)?;
        let turned = |x: Masked| {
            // A merged head is several of the model's, each rotated by itself.
            let x = match c.config.encoder() {
                true => x,
                false => rotate(&x, self.first, c.config.head_dim, self.frequencies),
            };
            truncate(&x, x.f() - F_QK)
        };
        let (q, k) = (turned(q)?, turned(k)?);
        let ring = product_ring(p.score_proven);
        let q = to_ring(c.s, &scope.at("lift_q"), &q, ring)?;
        let k = to_ring(c.s, &scope.at("lift_k"), &k, ring)?;
        let (q, k) = (q.finish(c.s)?, k.finish(c.s)?);

        let tokens = x.rows().tokens();
        let o = if tokens <= self.block_rows {
            self.rows(c, &scope, self.first, [&q, &k], v, (keys, values))?
        } else {
            let (last, v) = (last_row(tokens), v.finish(c.s)?);
            let before = c.flags.hold();
            let mut blocks = Vec::with_capacity(tokens.div_ceil(self.block_rows));
            for from in (0..tokens).step_by(self.block_rows) {
                let rows = from..tokens.min(from + self.block_rows);
                let (q, k, v) = (q.tokens(&rows)?, k.tokens(&rows)?, Pending::ready(v.tokens(&rows)?));
                let scope = scope.block(from);
                let whole = c.s.begin_block(rows.len())?;
                let o = self.rows(c, &scope, self.first + from, [&q, &k], v, (keys, values));
                let o = o.and_then(|o| c.flags.fold(c.s, &scope.at("guard"), &last).map(|()| o));
                c.s.end_block(whole);
                blocks.push(o?);
            }
            c.flags.resume(before);
            Masked::stack(blocks)?
        };
        projection(c.s, &scope.at("o"), &o, &self.parts.o)
    }

    /// Queries of the rows that are wanted, keys and values of all of them: neither rotated, the values' lift begun.
    fn projected(
        &self,
        c: &mut Context<'_>,
        scope: &Scope,
        x: &Masked,
    ) -> Result<(Masked, Masked, Pending<'static, Masked>)> {
        let (p, w) = (self.plan, &self.parts.qkv);
        let (nq, nk) = (self.tables.shape.q_size(), self.tables.shape.kv_size());
        let last = self.wanted == Wanted::Last;
        // Unless something between them and the rotation is applied to queries and keys side by side. Whatever the passes, which not
        // all parties see together.
        if last && w.adapters.is_none() && p.qk_norm.is_none() {
            let own = last_tokens(c.s, x);
            let mut some = |scope: &Scope, x: &Masked, outputs| {
                truncate(&owner_linear_part(c.s, scope, x, &w.base, outputs)?, w.base.f())
            };
            let kv = some(&scope.at("qkv").at("kv"), x, nq..nq + 2 * nk)?;
            let q = some(&scope.at("qkv").at("q"), &own, 0..nq)?;
            let v = to_ring(c.s, &scope.at("lift_v"), &kv.columns(nk..2 * nk)?, p.prob_k)?;
            return Ok((q, kv.columns(0..nk)?, v));
        }
        let qkv = projection(c.s, &scope.at("qkv"), x, w)?;
        let v = to_ring(c.s, &scope.at("lift_v"), &qkv.columns(nq + nk..nq + 2 * nk)?, p.prob_k)?;
        let qk = qkv.columns(0..nq + nk)?;
        let qk = match (&self.tables.qk_norm, &p.qk_norm, &self.parts.qk_gain) {
            (Some(norm), Some(plan), Some(gain)) => {
                let y = norm.apply(c, "qk_norm", "sum of squares of a query or key", &qk, plan)?;
                // Not truncated before the rotation: the ring that this saves may save the lift.
                owner_linear(c.s, &scope.at("qk_gain"), &y, gain)?
            }
            _ => qk,
        };
        let q = qk.columns(0..nq)?;
        Ok((if last { last_tokens(c.s, &q) } else { q }, qk.columns(nq..nq + nk)?, v))
    }

    /// Some rows, from position `first` on: `softmax(q k^T) v`. The values' lift may end beside the scores.
    fn rows(
        &self,
        c: &mut Context<'_>,
        scope: &Scope,
        first: usize,
        [q, k]: [&Masked; 2],
        v: Pending<'static, Masked>,
        (keys, values): (&mut Cached, &mut Cached),
    ) -> Result<Masked> {
        let (p, t) = (self.plan, self.tables);
        let LayerShape { num_heads: heads, num_kv_heads: kv_heads, head_dim: dim, .. } = t.shape;
        let (tokens, count_bits) = (q.rows().tokens(), c.flags.count_bits());

        // scores = q k^T, guarded, then softmax with a reference near each row's maximum
        let lengths: Vec<usize> = c.config.visible(first, tokens).collect();
        // Of an encoder every row sees as many.
        let all = c.config.encoder().then_some(first + tokens);
        let s = product_cached(c.s, &scope.at("scores"), q, k, keys, Arc::new(Scores { heads, kv_heads, dim, all }))?;
        let (v, s) = (v.finish(c.s)?, s.finish(c.s)?);
        let s = truncate(&s, 2 * F_QK - F)?;
        let g = guard(c.s, &scope.at("guard"), &s, p.score_k, true, count_bits)?;
        c.flags.guard(c.layer, "score", g);
        let s = s.narrow(p.score_k)?;
        let e = match (&p.exp, &t.exp) {
            (Some(plan), Some(table)) => exponential(c, scope, &s, &lengths, plan, table)?,
            _ => positive_part(c.s, &scope.at("relu"), &truncate(&s, F - p.f_prob)?, p.prob_k)?.finish(c.s)?,
        };

        // o = (e v) / sum(e)
        let groups = lengths.iter().enumerate().map(|(t, n)| e.rows().row(t).len() / n);
        let total = e.map(e.f(), Rows::ragged(groups), |v| {
            let mut out = Vec::with_capacity(tokens * heads);
            for (t, &n) in lengths.iter().enumerate() {
                out.extend(v[e.rows().row(t)].chunks(n).map(|row| row.iter().fold(0u64, |a, b| a.wrapping_add(*b))));
            }
            out
        });
        let total = match t.shape.softmax {
            Softmax::Exact => total,
            Softmax::TwoRelu => total.offset(fixed::encode(TWO_RELU_EPS, p.f_prob, 64)),
        };
        let o = product_cached(c.s, &scope.at("pv"), &e, &v, values, Arc::new(PV { heads, kv_heads, dim, all }))?;
        let looked = positive::start(c.s, &scope.at("inverse"), &total, &t.inverse)?;
        let o = truncate(&o.finish(c.s)?, p.f_prob)?;
        let inverse = looked.evaluate(c.s, &scope.at("inverse"), None)?;
        let o = lift(c.s, &scope.at("lift_o"), &o, 64)?;
        let (o, inverse) = (o.finish(c.s)?, inverse.value.finish(c.s)?);
        let o = product(c.s, &scope.at("normalise"), &o, &inverse, Arc::new(Scale { width: dim }))?;
        truncate(&o.finish(c.s)?, p.f_inverse)
    }
}
