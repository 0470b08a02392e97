//! Adapters and head in ordinary f32 arithmetic: what the secure ones are measured against. [`Watch`] sees every
//! intermediate value, from which calibration takes the ranges of fixed point.
//!
//! Nothing is computed that the CLS row of the logits does not need: in the last block of the last adapter there is one
//! query, and behind it one row. The secure side computes the same.

use std::fmt;

use ndarray::{Array1, Array2, ArrayView2, Axis, concatenate, s};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use super::adapter::{AdapterConfig, AdapterLayer, AdapterWeights, Block};
use crate::error::{Error, Result};

/// What the adapters read of the backbone.
#[derive(Clone, PartialEq)]
pub struct Features {
    /// The inputs of the layers that have an adapter, `[tokens, hidden]` each.
    pub inputs: Vec<Array2<f32>>,
    /// The CLS row of the last hidden state, before the backbone's own final LayerNorm: `[hidden]`.
    pub last: Array1<f32>,
}

impl Features {
    /// About normal, with some large columns, as the hidden states of a vision transformer have: to measure and to test with.
    #[must_use]
    pub fn random(c: &AdapterConfig, seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut uniform = move || f64::from(rng.next_u32()) / f64::from(u32::MAX) - 0.5;
        let mut normal = move || (0..12).map(|_| uniform()).sum::<f64>();
        let mut value = |j: usize| (normal() * if j.is_multiple_of(97) { 4.0 } else { 1.0 }) as f32;
        Features {
            inputs: c.layers.iter().map(|_| Array2::from_shape_fn((c.tokens, c.hidden), |(_, j)| value(j))).collect(),
            last: Array1::from_shape_fn(c.hidden, value),
        }
    }

    /// Checks that they are what adapters of this configuration read.
    ///
    /// # Errors
    /// [`Error::Shape`] with both shapes.
    pub fn check(&self, c: &AdapterConfig) -> Result<()> {
        let shapes = self.inputs.iter().all(|x| x.dim() == (c.tokens, c.hidden)) && self.last.len() == c.hidden;
        if self.inputs.len() == c.layers.len() && shapes {
            return Ok(());
        }
        let (lhs, rhs) = (format!("{self:?}"), format!("{} inputs of {} x {}", c.layers.len(), c.tokens, c.hidden));
        Err(Error::Shape { op: "features", lhs, rhs })
    }
}

impl fmt::Debug for Features {
    /// The shapes alone: the values tell the image.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inputs: Vec<_> = self.inputs.iter().map(Array2::shape).collect();
        f.debug_struct("Features").field("inputs", &inputs).field("last", &self.last.shape()).finish()
    }
}

/// Sees intermediate values by their names, each row by row; what has heads is seen once for each of them. With `i` the
/// backbone layer and `j` the block:
///
/// ```text
/// layer{i}.in          x_i + a_{i-1}
/// layer{i}.lora_a
/// layer{i}.blk{j}.     ln_1.var (of each row, without eps), ln_1, q, k, v, scores (scaled), reset, context, proj,
///                      mid (after the residual), ln_2.var, ln_2, mlp_0 (before the ReLU), mlp_3, out (after the residual)
/// layer{i}.lora_b      with the scale
/// layer{i}.out         a_i
/// ln.in, ln.var, ln, logits
/// ```
pub trait Watch {
    /// Values under this name.
    fn see(&mut self, at: &str, values: &[f32]);
}

/// Looks away.
impl Watch for () {
    fn see(&mut self, _: &str, _: &[f32]) {}
}

/// A watch, and what stands before the names.
struct At<'a> {
    watch: &'a mut dyn Watch,
    prefix: String,
}

impl At<'_> {
    fn see(&mut self, name: &str, x: &Array2<f32>) {
        let name = format!("{}{name}", self.prefix);
        match x.as_slice() {
            Some(values) => self.watch.see(&name, values),
            None => self.watch.see(&name, &x.iter().copied().collect::<Vec<_>>()),
        }
    }

    fn variances(&mut self, name: &str, values: &[f32]) {
        self.watch.see(&format!("{}{name}.var", self.prefix), values);
    }
}

/// The logits of the image that `features` are of: `[classes]`.
///
/// # Panics
/// When features or weights are not of the configuration's shapes ([`AdapterWeights::check_shapes`]).
#[must_use]
pub fn logits(config: &AdapterConfig, w: &AdapterWeights, features: &Features, watch: &mut dyn Watch) -> Array1<f32> {
    let pruned = config.layers.len().saturating_sub(1);
    let a = adapters(config, w, features, watch, pruned);
    finish(config, w, features, a.view(), watch)
}

/// The last `a`; from adapter number `pruned` on, only its CLS row.
pub(super) fn adapters(
    config: &AdapterConfig,
    w: &AdapterWeights,
    features: &Features,
    watch: &mut dyn Watch,
    pruned: usize,
) -> Array2<f32> {
    assert_eq!(features.inputs.len(), w.layers.len(), "features of as many layers as there are adapters");
    let mut a: Option<Array2<f32>> = None;
    for (n, ((layer, x), index)) in w.layers.iter().zip(&features.inputs).zip(&config.layers).enumerate() {
        let u = match a {
            Some(a) => x + &a,
            None => x.clone(),
        };
        let at = At { watch, prefix: format!("layer{index}.") };
        a = Some(adapter(config, layer, u, at, n >= pruned));
    }
    a.unwrap_or_else(|| Array2::zeros((1, config.hidden)))
}

/// `adapter(u) + u`; with `cls_only` of its first row alone.
fn adapter(config: &AdapterConfig, w: &AdapterLayer, u: Array2<f32>, mut at: At<'_>, cls_only: bool) -> Array2<f32> {
    at.see("in", &u);
    let mut h = w.lora_a.apply(u.view());
    at.see("lora_a", &h);
    for (j, b) in w.blocks.iter().enumerate() {
        let last = j + 1 == w.blocks.len();
        let at = At { watch: at.watch, prefix: format!("{}blk{j}.", at.prefix) };
        h = block(config, b, h, at, cls_only && last);
    }
    let rows = if cls_only { 1 } else { u.nrows() };
    let mut y = w.lora_b.apply(h.slice(s![..rows, ..]));
    y *= config.scale;
    at.see("lora_b", &y);
    y += &u.slice(s![..rows, ..]);
    at.see("out", &y);
    y
}

/// A block on `h`, `[tokens, rank]`; with `cls_only` of its first row alone.
fn block(config: &AdapterConfig, w: &Block, h: Array2<f32>, mut at: At<'_>, cls_only: bool) -> Array2<f32> {
    let rows = if cls_only { 1 } else { h.nrows() };
    let (x, variances) = w.ln_1.apply(h.view(), config.eps);
    at.variances("ln_1", &variances);
    at.see("ln_1", &x);
    let context = lin_atten(config, w, x.view(), &mut at, rows);
    let proj = w.proj.apply(context.view());
    at.see("proj", &proj);
    let mid = proj + h.slice(s![..rows, ..]);
    at.see("mid", &mid);
    let (x, variances) = w.ln_2.apply(mid.view(), config.eps);
    at.variances("ln_2", &variances);
    at.see("ln_2", &x);
    let mut y = w.mlp_0.apply(x.view());
    at.see("mlp_0", &y);
    y.mapv_inplace(|v| v.max(0.0));
    let y = w.mlp_3.apply(y.view());
    at.see("mlp_3", &y);
    let out = y + mid;
    at.see("out", &out);
    out
}

/// The heads side by side, `[rows, rank]`, of the first `rows` queries of `x`, `[tokens, rank]`.
fn lin_atten(config: &AdapterConfig, w: &Block, x: ArrayView2<'_, f32>, at: &mut At<'_>, rows: usize) -> Array2<f32> {
    let (rank, dim) = (config.rank, config.head_dim());
    let part = |n: usize| w.qkv.slice(s![n * rank..(n + 1) * rank, ..]);
    let q = x.slice(s![..rows, ..]).dot(&part(0).t());
    let (k, v) = (x.dot(&part(1).t()), x.dot(&part(2).t()));
    for (name, x) in [("q", &q), ("k", &k), ("v", &v)] {
        at.see(name, x);
    }
    let mut heads = Vec::with_capacity(config.heads);
    for head in 0..config.heads {
        let columns = s![.., head * dim..(head + 1) * dim];
        let scores = q.slice(columns).dot(&k.slice(columns).t()) * config.score_scale();
        at.see("scores", &scores);
        let reset = w.attn_reset.apply(scores.view());
        at.see("reset", &reset);
        heads.push(reset.dot(&v.slice(columns)));
    }
    let heads: Vec<_> = heads.iter().map(|head| head.view()).collect();
    let context = concatenate(Axis(1), &heads).expect("heads of as many rows, and at least one");
    at.see("context", &context);
    context
}

/// Final LayerNorm and head, of the CLS row.
pub(super) fn finish(
    config: &AdapterConfig,
    w: &AdapterWeights,
    features: &Features,
    a: ArrayView2<'_, f32>,
    watch: &mut dyn Watch,
) -> Array1<f32> {
    let mut at = At { watch, prefix: String::new() };
    let h = (&a.row(0) + &features.last).insert_axis(Axis(0));
    at.see("ln.in", &h);
    let (x, variances) = w.ln.apply(h.view(), config.eps);
    at.variances("ln", &variances);
    at.see("ln", &x);
    let y = w.head.apply(x.view());
    at.see("logits", &y);
    y.index_axis_move(Axis(0), 0)
}
