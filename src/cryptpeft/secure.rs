//! The private adapter: one program, walked by all three parties; an image (or a text) is one token of a pass.
//!
//! Messages in sequence of one adapter of one block: input (1); LayerNorm: squares (2), root (2), scaling (2); scores (2); the
//! lift of scores beside that of values (2); context (2); LayerNorm of the one row that is left: squares (2), root and scaling
//! in one exchange (2); ReLU by a window (2); the last norm: as before (4); logits to the Client (1): 24. Whether a value has
//! left its range travels beside them. The linear map over keys that stands in a softmax's place (LinAtten) sends nothing.
//!
//! Private: operations of [`crate::protocol`], each as in its file, on masked values; what is opened to the Client are the
//! logits (or the label alone) and, for each guarded quantity, whether its range was left. Source: CryptPEFT (2026), section 4;
//! the residual streams are unrolled ([`super::maps`]).

use std::collections::HashMap;
use std::sync::{Arc, mpsc};

use super::maps::{Sink, Slot, Source};
use super::plan::{F_RELU, Plan, RELU_WINDOW};
use super::prepare::Prepared;
use crate::approx::{Activation, PositiveTable, SignedTable};
use crate::error::{Error, Result};
use crate::plan::{F, NormPlan, Radices, Setting};
use crate::protocol::argmax::argmax;
use crate::protocol::evaluate::{Lines, Table, line};
use crate::protocol::guard::{RangeFlags, guard, guard_at_once};
use crate::protocol::input::{self, InputSource};
use crate::protocol::lift::lift;
use crate::protocol::linear::owner_linear;
use crate::protocol::positive::{self, Positive};
use crate::protocol::product::{Bilinear, product};
use crate::protocol::relu::positive_part;
use crate::protocol::square::{scale, square_sum};
use crate::protocol::truncate::truncate;
use crate::protocol::window::Window;
use crate::protocol::{concat, open};
use crate::ring::fixed;
use crate::session::{Scope, Session};
use crate::share::{Masked, Rows};

/// Where the Client's online thread takes inputs from and puts outputs to; a vector per pass.
pub struct Ports {
    /// Ring elements: [`Plan::inputs`] of them.
    pub source: InputSource,
    /// Logits.
    pub logits: Option<mpsc::Sender<Vec<u64>>>,
    /// The label.
    pub label: Option<mpsc::Sender<Vec<u64>>>,
    /// Range flags of all norms and contexts but the last norm's.
    pub flags: mpsc::Sender<Vec<u64>>,
    /// The last norm's.
    pub last: mpsc::Sender<Vec<u64>>,
}

/// What is opened to the Client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opened {
    /// The label alone.
    Label,
    /// All logits: more than the label, for those who ask for it.
    Logits,
}

struct BlockTables {
    ln_1: Positive,
    ln_2: Positive,
    relu: Lines,
}

/// One party's adapter.
pub struct SecureAdapter {
    plan: Plan,
    parts: Prepared,
    blocks: Vec<Vec<BlockTables>>,
    norm: Positive,
}

impl std::fmt::Debug for SecureAdapter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SecureAdapter").field("config", &self.plan.config).finish_non_exhaustive()
    }
}

fn root(p: &NormPlan, n: usize, eps: f64) -> Positive {
    let units = n as f64 * f64::from(2 * F).exp2();
    let fit = if p.windows == 1 { PositiveTable::rsqrt_alone } else { PositiveTable::rsqrt };
    Positive::new(fit(p.bits, p.window, units, eps, 1.0), p.f_gain)
}

/// Scores of every query with every key, head by head: `[query][head][key]`.
struct Scores {
    queries: usize,
    keys: usize,
    heads: usize,
    dim: usize,
}

fn fits(op: &'static str, x: &Masked, y: &Masked, widths: (usize, usize)) -> Result<()> {
    let even = |m: &Masked, width| (0..m.rows().tokens()).all(|t| m.rows().row(t).len() == width);
    if x.rows().tokens() != y.rows().tokens() || !even(x, widths.0) || !even(y, widths.1) {
        return Err(Error::Shape { op, lhs: x.facts(), rhs: y.facts() });
    }
    Ok(())
}

impl Bilinear for Scores {
    fn rows(&self, x: &Masked, y: &Masked) -> Result<Rows> {
        let rank = self.heads * self.dim;
        fits("scores", x, y, (self.queries * rank, self.keys * rank))?;
        Ok(Rows::even(x.rows().tokens(), self.queries * self.heads * self.keys))
    }

    fn apply(&self, x: &[u64], y: &[u64]) -> Vec<u64> {
        let rank = self.heads * self.dim;
        let mut out = Vec::new();
        for (x, y) in x.chunks(self.queries * rank).zip(y.chunks(self.keys * rank)) {
            for q in x.chunks(rank) {
                for (h, q) in q.chunks(self.dim).enumerate() {
                    let keys = y.chunks(rank).map(|k| crate::ring::gemm::dot(q, &k[h * self.dim..(h + 1) * self.dim]));
                    out.extend(keys);
                }
            }
        }
        out
    }
}

/// Weights `[query][head][key]` times values `[key][head * dim]`.
struct Context {
    queries: usize,
    keys: usize,
    heads: usize,
    dim: usize,
}

impl Bilinear for Context {
    fn rows(&self, x: &Masked, y: &Masked) -> Result<Rows> {
        let rank = self.heads * self.dim;
        fits("context", x, y, (self.queries * self.heads * self.keys, self.keys * rank))?;
        Ok(Rows::even(x.rows().tokens(), self.queries * rank))
    }

    fn apply(&self, x: &[u64], y: &[u64]) -> Vec<u64> {
        let rank = self.heads * self.dim;
        let per_query = self.heads * self.keys;
        let mut out = Vec::new();
        for (x, y) in x.chunks(self.queries * per_query).zip(y.chunks(self.keys * rank)) {
            for weights in x.chunks(per_query) {
                let mut sum = vec![0u64; rank];
                for (h, weights) in weights.chunks(self.keys).enumerate() {
                    let sum = &mut sum[h * self.dim..(h + 1) * self.dim];
                    for (w, v) in weights.iter().zip(y.chunks(rank)) {
                        let v = &v[h * self.dim..(h + 1) * self.dim];
                        sum.iter_mut().zip(v).for_each(|(s, v)| *s = s.wrapping_add(w.wrapping_mul(*v)));
                    }
                }
                out.extend(sum);
            }
        }
        out
    }
}

/// A pass under way.
struct Walk<'a> {
    s: &'a mut Session,
    flags: RangeFlags,
    sources: HashMap<Source, Masked>,
}

impl SecureAdapter {
    /// From a party's part.
    #[must_use]
    pub fn new(plan: Plan, parts: Prepared) -> Self {
        let c = &plan.config;
        let relu = |relu_k: u32| {
            let lo_bits = relu_k - RELU_WINDOW;
            let t = SignedTable::activation(Activation::Relu, relu_k, F, 0, lo_bits, RELU_WINDOW);
            let column =
                |v: &[f64]| Table::cyclic(&v.iter().map(|&v| fixed::encode(v, F_RELU, 64)).collect::<Vec<_>>());
            Lines::new(column(&t.a), column(&t.b), Vec::new())
        };
        let tables = |p: &super::plan::BlockPlan| BlockTables {
            ln_1: root(&p.ln_1, c.rank, c.eps),
            ln_2: root(&p.ln_2, c.rank, c.eps),
            relu: relu(p.relu_k),
        };
        let blocks = plan.blocks.iter().map(|layer| layer.iter().map(tables).collect()).collect();
        let norm = root(&plan.norm, c.hidden, c.eps);
        SecureAdapter { parts, blocks, norm, plan }
    }

    /// The public plan.
    #[must_use]
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// One pass over the session's batch: for each image the input to what is opened. Returns what its flags stand for.
    ///
    /// # Errors
    /// [`Error::Peer`], [`Error::Reuse`], [`Error::Shape`].
    pub fn pass(&self, s: &mut Session, ports: Option<&Ports>, opened: Opened) -> Result<Vec<(String, &'static str)>> {
        let (p, c, images) = (&self.plan, &self.plan.config, s.tokens());
        let rows = Rows::even(images, p.inputs());
        let given = input::input(s, &Scope::new("input"), &rows, p.input_k, F, ports.map(|p| &p.source))?;
        let each = c.tokens * c.hidden;
        let mut sources = HashMap::new();
        for i in 0..c.layers.len() {
            sources.insert(Source::Input(i), given.columns(i * each..(i + 1) * each)?);
        }
        let last = given.columns(c.layers.len() * each..p.inputs())?;
        let mut w = Walk { s, flags: RangeFlags::new(c.tokens * c.rank.max(c.hidden)), sources };
        for i in 0..c.layers.len() {
            for b in 0..c.blocks {
                self.block(&mut w, i, b)?;
            }
        }
        self.head(w, last, ports, opened)
    }

    /// What `sink` reads of all rows, or of the first alone, in ring `k`.
    fn sum(&self, w: &mut Walk<'_>, scope: &Scope, sink: Sink, one_row: bool, k: u32) -> Result<Masked> {
        let c = &self.plan.config;
        let mut sum: Option<Masked> = None;
        for (n, source) in sink.sources(c).into_iter().enumerate() {
            let m = self.parts.matrix(Slot::Map(sink, source))?;
            let x = w.sources.get(&source).ok_or_else(|| Error::Internal(format!("{source:?} is not there yet")))?;
            let x = if one_row { x.columns(0..m.dim().1)? } else { x.clone() };
            let y = owner_linear(w.s, &scope.at("map").at(&n.to_string()), &x, m)?;
            let y = truncate(&y, y.f() - F)?.narrow(k)?;
            sum = Some(match sum {
                None => y,
                Some(sum) => sum.add(&y)?,
            });
        }
        sum.ok_or_else(|| Error::Internal("a sink that reads nothing".into()))
    }

    /// `c / sqrt(mean(c^2) + eps)` of every row, in ring 64, not truncated.
    fn norm(
        &self,
        w: &mut Walk<'_>,
        (scope, place): (&Scope, &str),
        c: &Masked,
        (p, table, n): (&NormPlan, &Positive, usize),
        quantity: &'static str,
    ) -> Result<Masked> {
        let count_bits = w.flags.count_bits();
        let short = c.raw().len() == n * c.rows().tokens() && p.windows == 1;
        let (sum, lifted) = square_sum(w.s, &scope.at("square"), c, n)?;
        let wide = if short { Some(lift(w.s, &scope.at("lift"), c, 64)?) } else { None };
        let total = sum.finish(w.s)?;
        let g = guard(w.s, &scope.at("guard"), &total, p.bits, false, count_bits)?;
        let (y, faults) = if let Some(wide) = wide {
            let wide = wide.finish(w.s)?;
            let n = positive::normalise(w.s, &scope.at("scale"), &total, &wide, table)?.finish(w.s)?;
            (n.y, Some(n.column.narrow(count_bits)?))
        } else {
            let looked = positive::start(w.s, &scope.at("rsqrt"), &total, table)?;
            let value = looked.evaluate(w.s, &scope.at("rsqrt"), Some(count_bits))?;
            let inverse = value.value.finish(w.s)?;
            let y = scale(w.s, &scope.at("scale"), lifted, &inverse)?.finish(w.s)?;
            (y, value.faults.map(|f| f.finish(w.s)).transpose()?)
        };
        w.flags.guard(place, quantity, g);
        if let Some(faults) = faults {
            w.flags.count(place, quantity, faults);
        }
        Ok(y)
    }

    fn block(&self, w: &mut Walk<'_>, i: usize, b: usize) -> Result<()> {
        let c = &self.plan.config;
        let (p, t) = (&self.plan.blocks[i][b], &self.blocks[i][b]);
        let (one_row, queries, keys) = (self.plan.one_row(i, b), self.plan.rows(i, b), c.tokens);
        let (heads, dim) = (c.heads, c.rank / c.heads);
        let layer = Scope::layer(i * c.blocks + b);
        let place = format!("layer {}, block {b}", c.layers[i]);
        let matrix = |slot| self.parts.matrix(slot);

        let x = self.sum(w, &layer.at("norm1"), Sink::Attention(i, b), false, p.ln_1.k)?;
        let norm = (&p.ln_1, &t.ln_1, c.rank);
        let y = self.norm(w, (&layer.at("norm1"), &place), &x, norm, "variance before attention")?;
        let scope = layer.at("attn");
        let asking = if one_row { y.columns(0..c.rank)? } else { y.clone() };
        let q = owner_linear(w.s, &scope.at("qkv").at("q"), &asking, matrix(Slot::Query(i, b))?)?;
        let k = owner_linear(w.s, &scope.at("qkv").at("k"), &y, matrix(Slot::Key(i, b))?)?;
        let v = owner_linear(w.s, &scope.at("qkv").at("v"), &y, matrix(Slot::Value(i, b))?)?;
        let (q, k) = (truncate(&q, q.f() - p.f_qk)?, truncate(&k, k.f() - p.f_qk)?);
        let scores = product(w.s, &scope.at("scores"), &q, &k, Arc::new(Scores { queries, keys, heads, dim }))?;
        let scores = scores.finish(w.s)?;
        let scores = truncate(&scores, scores.f().saturating_sub(F))?;
        let wide = lift(w.s, &scope.at("lift_s"), &scores, 64)?;
        let v = lift(w.s, &scope.at("lift_v"), &truncate(&v, v.f() - F)?, 64)?;
        let (scores, v) = (wide.finish(w.s)?, v.finish(w.s)?);
        let weights = owner_linear(w.s, &scope.at("reset"), &scores, matrix(Slot::Reset(i, b))?)?;
        let weights = truncate(&weights, weights.f() - F)?;
        let context = product(w.s, &scope.at("pv"), &weights, &v, Arc::new(Context { queries, keys, heads, dim }))?;
        let context = context.finish(w.s)?;
        let g = guard(w.s, &scope.at("guard"), &context, p.context_bits, true, w.flags.count_bits())?;
        w.flags.guard(&place, "context", g);
        w.sources.insert(Source::Context(i, b), context);

        let x = self.sum(w, &layer.at("norm2"), Sink::Mlp(i, b), one_row, p.ln_2.k)?;
        let norm = (&p.ln_2, &t.ln_2, c.rank);
        let y = self.norm(w, (&layer.at("norm2"), &place), &x, norm, "variance before the MLP")?;
        let m = owner_linear(w.s, &layer.at("mlp").at("gate_up"), &y, matrix(Slot::Mlp(i, b))?)?;
        let m = truncate(&m, m.f() - F)?.narrow(p.relu_k)?;
        let hidden = if one_row {
            let window = Window::of(&m, 0, p.relu_k - RELU_WINDOW, RELU_WINDOW)?;
            let values = line(w.s, &layer.at("mlp").at("relu"), &window, &t.relu, F_RELU, 64)?.finish(w.s)?;
            let [value] = <[Masked; 1]>::try_from(values).map_err(|_| Error::Internal("one line for a ReLU".into()))?;
            value
        } else {
            // Of many rows an exact one, whose look-ups are short.
            positive_part(w.s, &layer.at("mlp").at("relu"), &m, 64)?.finish(w.s)?
        };
        w.sources.insert(Source::Hidden(i, b), hidden);
        Ok(())
    }

    fn head(
        &self,
        mut w: Walk<'_>,
        last: Masked,
        ports: Option<&Ports>,
        opened: Opened,
    ) -> Result<Vec<(String, &'static str)>> {
        let (p, scope, range) = (&self.plan, Scope::new("head"), Scope::new("range"));
        // The flags so far: their reduction rides beside what follows, which takes as long.
        w.flags.advance(w.s, &range)?;
        let x = self.sum(&mut w, &scope.at("norm"), Sink::Head, true, p.norm.k)?;
        let x = x.add(&last.narrow(p.norm.k)?)?;
        let (sum, lifted) = square_sum(w.s, &scope.at("norm.square"), &x, p.config.hidden)?;
        let wide = match p.norm.windows {
            1 => Some(lift(w.s, &scope.at("norm.lift"), &x, 64)?),
            _ => None,
        };
        let total = sum.finish(w.s)?;
        let wide = wide.map(|wide| wide.finish(w.s)).transpose()?;
        w.flags.advance(w.s, &range)?;
        let count_bits = w.flags.count_bits();
        let g = guard_at_once(w.s, &scope.at("norm.guard"), &total.narrow(p.norm_proven)?, p.norm.bits, count_bits)?;
        let (y, faults) = if let Some(wide) = wide {
            let n = positive::normalise(w.s, &scope.at("norm.scale"), &total, &wide, &self.norm)?.finish(w.s)?;
            (n.y, n.column.narrow(count_bits)?)
        } else {
            let looked = positive::start(w.s, &scope.at("norm.rsqrt"), &total, &self.norm)?;
            let value = looked.evaluate(w.s, &scope.at("norm.rsqrt"), Some(count_bits))?;
            let inverse = value.value.finish(w.s)?;
            let y = scale(w.s, &scope.at("norm.scale"), lifted, &inverse)?.finish(w.s)?;
            let faults = value.faults.ok_or_else(|| Error::Internal("faults are counted".into()))?;
            (y, faults.finish(w.s)?)
        };
        w.flags.advance(w.s, &range)?;
        // Counts of one row: each is what a flag would say, 0 or not, and nothing more.
        let counts = match g {
            Some(g) => concat(&[&g.finish(w.s)?, &faults])?,
            None => faults,
        };
        let logits = owner_linear(w.s, &scope.at("lm_head"), &y, self.parts.matrix(Slot::Head)?)?;
        match opened {
            // Before any truncation, whose carry it would show.
            Opened::Logits => open::open(w.s, &scope.at("logits"), &logits, ports.and_then(|p| p.logits.as_ref()))?,
            Opened::Label => {
                let logits = truncate(&logits, logits.f() - p.f_logit)?.narrow(p.logit_k)?;
                let radices = Radices::fastest(logits.rows().row(0).len(), p.logit_k, &Setting::default());
                let label = argmax(w.s, &scope.at("argmax"), &logits, radices.each(), &mut |_| Ok(()))?;
                open::open(w.s, &scope.at("label"), &label, ports.and_then(|p| p.label.as_ref()))?;
            }
        }
        open::open(w.s, &range.at("last"), &counts, ports.map(|p| &p.last))?;
        let names = w.flags.names();
        w.flags.open(w.s, &range, ports.map(|p| &p.flags))?;
        Ok(names)
    }
}
