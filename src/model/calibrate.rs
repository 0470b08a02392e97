//! Bounds and ranges of a checkpoint: what its weights prove for every input, and what the float twin shows over text.

use std::borrow::Cow;
use std::path::Path;

use ndarray::{Array1, Array2, ArrayView1, ArrayView2, ArrayView3, s};

use super::adapter::LowRank;
use super::float;
use super::observe::{Norm, Observer};
use super::{LayerWeights, Linear, ModelConfig, Weights, files, rounding};
use crate::error::{Error, Result};
use crate::plan::ROTATION;
use crate::plan::{
    AdapterBounds, Bounds, F, F_QK, Fractions, Group, Grouped, LayerBounds, LayerFractions, LayerRanges, Module,
    Ranges, reach,
};

/// Text that calibration reads when the provider gives none: prose, dialogue, numbers, code.
pub const DEFAULT_TEXT: &str = include_str!("calibration.txt");

/// Slack for the f32 arithmetic of these bounds.
const SLACK: f64 = 1.01;

/// How far the norm's fixed-point output may exceed `sqrt(n)`, as a factor. `1/rms` is a line per row of a table, whose error is at
/// most 4.5e-4. Its columns are rounded to half a unit: the slope's half counts 63 times at most, and never more than the slope itself
/// ([`crate::approx`]); the plan leaves 10 bits to `1/rms`, so that this is at most 5e-3 of it (5.5e-3 together: a test of `protocol/positive.rs`). The truncation of each of `n` outputs by less than
/// 2^-12 adds less than `2^-12 sqrt(n)` to the norm: 2.5e-4. Together below 6e-3.
const NORM: f64 = 1.01;

/// A unit in the last place of activations: what a truncation may add.
const ULP: f64 = 1.0 / (1u64 << F) as f64;

/// A unit in the last place of queries and keys in the scores' product.
const QK_ULP: f64 = 1.0 / (1u64 << F_QK) as f64;

/// A softmax weight sum `sum e_i / sum e_i` as the engine normalises it, its reciprocal's constant not counted, which depends on the
/// plan: the reciprocal's table errs by at most 1.1e-3, its slope's rounding moves it by at most `2 / 32`.
const SOFTMAX: f64 = 1.065;

/// How far the activation's table may be off in any plan.
const OFF: f64 = 1.1;

/// An upper bound of the spectral norm: the Frobenius norm of a power of the Gram matrix.
#[must_use]
pub fn spectral_bound(w: ArrayView2<'_, f32>) -> f64 {
    let mut m: Array2<f32> = if w.nrows() < w.ncols() { w.dot(&w.t()) } else { w.t().dot(&w) };
    let squarings = if m.nrows() > 512 { 3 } else { 5 };
    let (mut log, mut weight) = (0.0f64, 1.0f64);
    for step in 0..=squarings {
        let fro = m.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt();
        if fro == 0.0 || !fro.is_finite() {
            return if fro == 0.0 { 0.0 } else { f64::INFINITY };
        }
        log += weight * fro.ln();
        if step < squarings {
            m.mapv_inplace(|v| (f64::from(v) / fro) as f32);
            m = m.dot(&m);
            weight /= 2.0;
        }
    }
    (log / 2.0).exp() * SLACK
}

fn row_norm(w: ArrayView2<'_, f32>) -> Vec<f64> {
    w.rows().into_iter().map(|r| r.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt()).collect()
}

/// The weights of a linear layer with the gain of the norm before it folded in.
#[must_use]
pub fn folded(w: &Array2<f32>, gain: &Array1<f32>) -> Array2<f32> {
    w * gain
}

fn bias_at(l: &Linear, i: usize) -> f64 {
    l.bias.as_ref().map_or(0.0, |b| f64::from(b[i]).abs())
}

/// Largest output element for inputs of norm `radius`.
fn largest(l: &Linear, radius: f64) -> f64 {
    row_norm(l.w.view()).iter().enumerate().fold(0.0, |m: f64, (i, n)| m.max(n * radius * SLACK + bias_at(l, i))) + ULP
}

/// Bound of the norm of each head's output.
fn head_norms(l: &Linear, dim: usize, radius: f64) -> Vec<f64> {
    (0..l.w.nrows() / dim)
        .map(|h| {
            let bias = (0..dim).map(|i| bias_at(l, h * dim + i).powi(2)).sum::<f64>().sqrt();
            let rounding = (dim as f64).sqrt() * ULP;
            spectral_bound(l.w.slice(s![h * dim..(h + 1) * dim, ..])) * radius + bias + rounding
        })
        .collect()
}

/// `W + B A` for the bounds of both. Their outputs are truncated apart, and the middle values too, which `B` passes on: that slack is in
/// the bias, of which bounds look at the size alone.
fn merged(l: &Linear) -> Linear {
    let Some(LowRank { a, b }) = &l.adapter else { return l.clone() };
    // Rounded up for the f32 that it is put into.
    let slack =
        |row: ArrayView1<'_, f32>| (1.001 * ULP * (1.0 + row.iter().map(|v| f64::from(v.abs())).sum::<f64>())) as f32;
    let slack = b.rows().into_iter().map(slack).collect::<Array1<f32>>();
    let bias = l.bias.as_ref().map_or_else(|| slack.clone(), |bias| bias.abs() + &slack);
    Linear { w: &l.w + &b.dot(a), bias: Some(bias), adapter: None }
}

/// `l` as it is multiplied ([`rounding::layer`]): gains folded in, rounded to `f` fraction bits.
fn layer_bounds(c: &ModelConfig, index: usize, l: &LayerWeights, f: LayerFractions) -> LayerBounds {
    let apart = l;
    let mut whole = Cow::Borrowed(l);
    for module in apart.adapted() {
        *whole.to_mut().linear_mut(module) = merged(apart.linear(module));
    }
    let l = &*whole;
    let shape = c.layer(index);
    let radius = (c.hidden_size as f64).sqrt() * NORM;
    let (dim, scale) = (shape.head_dim, (shape.head_dim as f64).sqrt());
    let largest_qk = largest(&l.q, radius).max(largest(&l.k, radius));
    let gain = |g: &Option<Array1<f32>>| g.as_ref().map(|g| g.iter().fold(0.0f64, |m, v| m.max(f64::from(v.abs()))));
    let (qk, qn, kn) = if let (Some(a), Some(b)) = (gain(&l.q_norm), gain(&l.k_norm)) {
        // After its norm a head has norm sqrt(dim) before the gain, which is not truncated before the rotation.
        let one = |g: f64, heads| vec![g * scale * NORM; heads];
        (a.max(b) * scale * NORM, one(a, shape.num_heads), one(b, shape.num_kv_heads))
    } else {
        (largest_qk, head_norms(&l.q, dim, radius), head_norms(&l.k, dim, radius))
    };
    let group = shape.num_heads / shape.num_kv_heads;
    // Rotated, and truncated to the fraction bits of the scores' product.
    let turned = if c.encoder() { 1.0 } else { ROTATION };
    let rotated = |norm: f64| norm * turned + scale * QK_ULP;
    let score = qn.iter().enumerate().fold(0.0f64, |m, (h, q)| m.max(rotated(*q) * rotated(kn[h / group])));
    let v_norms = head_norms(&l.v, dim, radius);
    let context = (0..shape.num_heads).map(|h| v_norms[h / group].powi(2)).sum::<f64>().sqrt();
    // Truncated before and after it is normalised.
    let context = context * SOFTMAX + (shape.q_size() as f64).sqrt() * 3.0 * ULP;
    let gated = !c.encoder();
    let (gate, up) = (largest(&l.gate, radius), if gated { largest(&l.up, radius) } else { 1.0 });
    // |f(g)| <= reach(g), which is |g| for all activations but a parabola, where it is at most slope |g| + least; so a change is
    // at most sum_i |w_i f(g_i) u_i|: by elements, or by norms.
    let reach = |g: f64| reach(shape, g);
    let (least, slope) = (reach(0.0), (reach(gate) - reach(0.0)) / gate);
    let (gr, ur) = (row_norm(l.gate.w.view()), row_norm(l.up.w.view()));
    let g_at = |i: usize| gr[i] * radius + bias_at(&l.gate, i) + ULP;
    let u_at = |i: usize| if gated { ur[i] * radius + bias_at(&l.up, i) + ULP } else { 1.0 };
    let sums_of = |w: ArrayView2<'_, f32>, each: &dyn Fn(usize) -> f64| {
        let row = |row: ArrayView1<'_, f32>| {
            row.iter().enumerate().fold(0.0, |sum, (i, w)| sum + f64::from(w.abs()) * each(i))
        };
        w.rows().into_iter().map(row).fold(0.0f64, f64::max)
    };
    let sums = |each: &dyn Fn(usize) -> f64| sums_of(l.down.w.view(), each);
    let bias_norm =
        |l: &Linear| l.bias.as_ref().map_or(0.0, |b| b.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt());
    let steepest = l.down.w.iter().fold(0.0f64, |m, w| m.max(f64::from(w.abs())));
    let width = (c.intermediate_size as f64).sqrt();
    let norm_of = |l: &Linear| spectral_bound(l.w.view()) * radius + bias_norm(l) + width * ULP;
    let gate_norm = norm_of(&l.gate);
    // Without a gate each of the values is multiplied by 1.
    let up_norm = if gated { norm_of(&l.up) } else { width };
    let by_norms = steepest * (slope * gate_norm + least * width) * up_norm;
    let bias_max =
        |l: &Linear| l.bias.as_ref().map_or(0.0, |b| b.iter().fold(0.0f64, |m, v| m.max(f64::from(v.abs()))));
    let down_sum = sums(&|_| 1.0);
    // Of the first factors, each of what its group reads; the activation may be off by OFF.
    let middle = |a: ArrayView2<'_, f32>, group| {
        let longest = row_norm(a).into_iter().fold(0.0, f64::max);
        let most = match group {
            Group::Qkv | Group::GateUp => longest * radius,
            Group::O => longest * context,
            Group::Down => {
                let largest = f64::from(a.iter().fold(0.0f32, |m, v| m.max(v.abs())));
                let by_norms = largest * (slope * gate_norm + (least + OFF) * width) * up_norm;
                sums_of(a, &|i| (reach(g_at(i)) + OFF) * u_at(i)).min(by_norms) + sums_of(a, &|_| ULP)
            }
        };
        most * SLACK + ULP
    };
    let mut adapters = Grouped::default();
    for (group, f) in f.adapters.iter() {
        let modules: Vec<Module> = apart.adapted().filter(|m| m.group() == group).collect();
        let factors = || modules.iter().filter_map(|m| apart.linear(*m).adapter.as_ref());
        let (rank, middle) = (
            factors().map(|f| f.a.nrows()).max().unwrap_or(0),
            factors().map(|f| middle(f.a.view(), group)).fold(0.0, f64::max),
        );
        *adapters.place(group) = Some(AdapterBounds { modules, rank, f: *f, middle });
    }
    LayerBounds {
        adapters,
        f,
        qk,
        qk_raw: largest_qk,
        v: largest(&l.v, radius),
        score,
        attention: row_norm(l.o.w.view()).iter().fold(0.0f64, |m, n| m.max(*n)) * context * SLACK
            + bias_max(&l.o)
            + ULP,
        gate,
        up,
        mlp: sums(&|i| reach(g_at(i)) * u_at(i)).min(by_norms) * SLACK + down_sum * ULP + bias_max(&l.down) + ULP,
        mlp_slope: sums(&u_at).min(steepest * width * up_norm) * SLACK,
    }
}

/// What the weights of the layers from `first` on prove, rounded to these fraction bits: of the numbers that the engine multiplies
/// by, not of those that they were rounded from.
///
/// # Errors
/// [`crate::Error::Internal`] for weights that do not match their configuration, or fractions of other layers.
pub fn bounds(w: &Weights, first: usize, fractions: &Fractions) -> Result<Bounds> {
    let private = &w.layers[first..];
    if fractions.layers.len() != private.len() {
        let (have, of) = (fractions.layers.len(), private.len());
        return Err(Error::Internal(format!("fractions of {have} layers for {of}")));
    }
    let one = |(i, (l, f))| bounds_of(&w.config, i, l, f);
    let layers = (first..).zip(private.iter().zip(&fractions.layers)).map(one).collect::<Result<_>>()?;
    Ok(bounds_around(w, layers, fractions.head))
}

/// Those of layer `index`.
pub(super) fn bounds_of(c: &ModelConfig, index: usize, l: &LayerWeights, f: &LayerFractions) -> Result<LayerBounds> {
    Ok(layer_bounds(c, index, &rounding::layer(c, index, l, f)?, *f))
}

/// Those of `layers`, and of the head, rounded to `f_head` fraction bits, and embedding of `w`.
pub(super) fn bounds_around(w: &Weights, layers: Vec<LayerBounds>, f_head: u32) -> Bounds {
    let radius = (w.config.hidden_size as f64).sqrt() * NORM;
    let head = rounding::head(w, f_head);
    Bounds {
        layers,
        f_head,
        logit: row_norm(head.view()).iter().fold(0.0f64, |m, n| m.max(*n)) * radius * SLACK
            + w.head_bias.iter().flatten().fold(0.0f64, |m, v| m.max(f64::from(v.abs())))
            + ULP,
        embedding: w.embed.iter().fold(0.0f64, |m, v| m.max(f64::from(v.abs()))) + ULP,
    }
}

/// What was seen so far.
struct Seen {
    layers: Vec<LayerRanges>,
    final_sum: (f64, f64),
    logit: f64,
}

impl Seen {
    fn new(c: &ModelConfig) -> Seen {
        let layers = vec![LayerRanges::default(); c.num_layers];
        Seen { layers, final_sum: (f64::INFINITY, 0.0), logit: 0.0 }
    }

    /// Layer `index` on the residual stream of a whole text.
    fn layer(&mut self, c: &ModelConfig, index: usize, l: &LayerWeights, h: Array2<f32>) -> Array2<f32> {
        float::whole(c, l, index, h, &mut Watch { seen: self, config: c, layer: Some(l) })
    }

    /// Behind the last layer.
    fn head(&mut self, w: &Weights, h: &Array2<f32>) {
        let _ = float::logits_observed(w, h, &mut Watch { seen: self, config: &w.config, layer: None });
    }

    fn ranges(mut self, first: usize) -> Ranges {
        Ranges { layers: self.layers.split_off(first), final_sum: self.final_sum, logit: self.logit }
    }
}

/// Texts that go through a model together, layer by layer.
pub(super) struct Reading {
    seen: Seen,
    states: Vec<Array2<f32>>,
}

impl Reading {
    /// Of `texts`, below the first layer.
    pub(super) fn new(w: &Weights, texts: &[Vec<u32>]) -> Reading {
        let texts = texts.iter().filter(|ids| !ids.is_empty());
        Reading { seen: Seen::new(&w.config), states: texts.map(|ids| float::embed(w, ids)).collect() }
    }

    /// Through layer `index`, which follows the one before.
    pub(super) fn layer(&mut self, c: &ModelConfig, index: usize, l: &LayerWeights) {
        for h in &mut self.states {
            *h = self.seen.layer(c, index, l, std::mem::take(h));
        }
    }

    /// Through the head, as [`ranges`] from `first` on.
    pub(super) fn finish(mut self, w: &Weights, first: usize) -> Ranges {
        self.states.iter().for_each(|h| self.seen.head(w, h));
        self.seen.ranges(first)
    }
}

struct Watch<'a> {
    seen: &'a mut Seen,
    config: &'a ModelConfig,
    /// Where it is.
    layer: Option<&'a LayerWeights>,
}

fn stretch(range: &mut (f64, f64), v: f64) {
    range.0 = range.0.min(v);
    range.1 = range.1.max(v);
}

fn sum_squares<'a>(row: impl IntoIterator<Item = &'a f32>) -> f64 {
    row.into_iter().map(|v| f64::from(*v).powi(2)).sum()
}

fn absolute(x: ArrayView2<'_, f32>) -> f64 {
    x.iter().fold(0.0, |m, v| m.max(f64::from(v.abs())))
}

impl Observer for Watch<'_> {
    fn norm_input(&mut self, layer: usize, which: Norm, h: ArrayView2<'_, f32>) {
        let range = match which {
            Norm::Input => &mut self.seen.layers[layer].input_sum,
            Norm::PostAttention => &mut self.seen.layers[layer].post_sum,
            Norm::Final => &mut self.seen.final_sum,
        };
        h.rows().into_iter().for_each(|r| stretch(range, sum_squares(r)));
        let c = self.config;
        if let (Norm::Input, true, Some(w)) = (which, c.qk_norm, self.layer) {
            let mut x = h.to_owned();
            for mut row in x.rows_mut() {
                let scale = (sum_squares(row.iter()) / c.hidden_size as f64 + c.rms_norm_eps).sqrt() as f32;
                row.iter_mut().zip(&w.input_norm).for_each(|(v, g)| *v = *v / scale * g);
            }
            let range = self.seen.layers[layer].qk_sum.get_or_insert((f64::INFINITY, 0.0));
            for l in [&w.q, &w.k] {
                for row in float::linear(l, &x).rows() {
                    let row: Vec<f32> = row.to_vec();
                    row.chunks(c.head_dim).for_each(|head| stretch(range, sum_squares(head)));
                }
            }
        }
    }

    fn attention(
        &mut self,
        layer: usize,
        _q: ArrayView3<'_, f32>,
        _k: ArrayView3<'_, f32>,
        _v: ArrayView3<'_, f32>,
        row_max: ArrayView2<'_, f32>,
        row_min: ArrayView2<'_, f32>,
    ) {
        let r = &mut self.seen.layers[layer];
        r.score = r.score.max(absolute(row_max)).max(absolute(row_min));
        row_max.iter().for_each(|&m| stretch(&mut r.row_max, f64::from(m)));
    }

    fn gate(&mut self, layer: usize, gate: ArrayView2<'_, f32>, _up: ArrayView2<'_, f32>) {
        let r = &mut self.seen.layers[layer];
        r.gate = r.gate.max(absolute(gate));
    }

    fn logits(&mut self, l: ArrayView2<'_, f32>) {
        self.seen.logit = self.seen.logit.max(absolute(l));
    }
}

/// What the float twin shows over `texts` (token ids, each at most the model's context), in the layers from `first` on.
#[must_use]
pub fn ranges(w: &Weights, first: usize, texts: &[Vec<u32>]) -> Ranges {
    ranges_watched(w, first, texts, &mut |_| ())
}

/// As [`ranges`]; `done` is told how many tokens of each text have been read.
#[must_use]
pub fn ranges_watched(w: &Weights, first: usize, texts: &[Vec<u32>], done: &mut dyn FnMut(usize)) -> Ranges {
    let mut seen = Seen::new(&w.config);
    for ids in texts.iter().filter(|ids| !ids.is_empty()) {
        let layers = w.layers.iter().enumerate();
        let h = layers.fold(float::embed(w, ids), |h, (i, l)| seen.layer(&w.config, i, l, h));
        seen.head(w, &h);
        done(ids.len());
    }
    seen.ranges(first)
}

/// Longest calibration text, in bytes.
const TEXT_BYTES: u64 = 64 << 20;

/// Bytes of a text that are given to the tokenizer: far more than [`inputs`] takes.
const USED_BYTES: usize = 1 << 20;

/// Reads the file that the command's `option` names: plain UTF-8 of at most 64 MB.
///
/// # Errors
/// [`Error::Config`] naming option and file.
pub fn whole_text(path: &Path, option: &str) -> Result<String> {
    let wrong = |e: &dyn std::fmt::Display| Error::Config(format!("{option}: {e}"));
    let bytes = files::read_required(path, TEXT_BYTES, "give a file of plain text").map_err(|e| wrong(&e))?;
    String::from_utf8(bytes).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        wrong(&format!("{}: not UTF-8 from byte {at} on; give a text file in UTF-8", path.display()))
    })
}

/// Reads a provider's calibration text: plain UTF-8 of at most 64 MB, of which the beginning is used.
///
/// # Errors
/// [`Error::Config`] naming the file.
pub fn read_text(path: &Path) -> Result<String> {
    let mut text = whole_text(path, "--calibration-text")?;
    let end = (0..=USED_BYTES.min(text.len())).rev().find(|&i| text.is_char_boundary(i)).unwrap_or(0);
    text.truncate(end);
    Ok(text)
}

/// Windows of text that calibration reads.
const WINDOWS: usize = 4;
/// Their longest length: attention over it costs as much as everything else.
const WINDOW: usize = 512;

/// Calibration inputs of at most `context` tokens: four windows of `text`, and pseudorandom tokens, which stress a model as prose does not.
/// The context is the model's, not what a request needs: values at later positions are part of what the plan must hold.
#[must_use]
pub fn inputs(c: &ModelConfig, context: usize, text: Option<Vec<u32>>) -> Vec<Vec<u32>> {
    let length = context.clamp(1, WINDOW);
    let mut all = vec![stress(c, length)];
    if let Some(ids) = text {
        all.extend(ids.chunks(length).take(WINDOWS).map(<[u32]>::to_vec));
    }
    all
}

/// Pseudorandom tokens, `length` at most.
#[must_use]
pub fn stress(c: &ModelConfig, length: usize) -> Vec<u32> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % c.vocab_size as u64) as u32
    };
    (0..length.min(64)).map(|_| random()).collect()
}

#[cfg(test)]
mod tests {

    use super::*;

    fn wide(ulps: f32) -> Weights {
        let n = 8700;
        let c = ModelConfig { head_dim: 8, tie_word_embeddings: true, ..ModelConfig::llama(n, 8, 1, 1, 16, 16) };
        let mut w = Weights::random(c, 1).unwrap();
        let l = &mut w.layers[0];
        l.input_norm.fill(1.0);
        l.post_norm.fill(1.0);
        for m in [&mut l.q.w, &mut l.k.w, &mut l.v.w, &mut l.gate.w, &mut l.up.w] {
            m.fill(ulps / 4096.0);
        }
        w
    }

    /// 3.505 units become 4: with an input of ones the gate is 7.45 in float and 8.50 as it is multiplied, where a bound from
    /// the float weights proved a ring that holds 8.
    #[test]
    fn bounds_are_those_of_the_rounded_weights() {
        for (ulps, rounded) in [(3.0, 3.0f64), (3.505, 4.0), (0.501, 1.0)] {
            let w = wide(ulps);
            let b = &bounds(&w, 0, &Fractions::least(1)).unwrap().layers[0];
            let n = w.config.hidden_size as f64;
            // An input along the rows, as long as the norm's output gets: rounded outward, element by element.
            let largest = rounded / 4096.0 * n * 1.006;
            for (name, bound) in [("gate", b.gate), ("up", b.up), ("v", b.v), ("qk", b.qk)] {
                assert!(bound >= largest && bound < 1.03 * largest, "{name} of {ulps}: {bound}, {largest}");
            }
            // q carries 1 / sqrt(8) and is rounded with it.
            let q = (f64::from(ulps) / 8f64.sqrt()).round() / 4096.0 * n;
            let score = q * rounded / 4096.0 * n * 8.0;
            assert!(b.score >= score, "{} {score}", b.score);
        }
    }

    #[test]
    fn the_spectral_bound_is_above_and_near() {
        // A rank-one matrix has its spectral norm equal to its Frobenius norm; a diagonal one to its largest entry.
        let w = Array2::from_shape_fn((20, 50), |(i, j)| (i as f32 + 1.0) * (j as f32 - 25.0) / 100.0);
        let fro = w.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
        let b = spectral_bound(w.view());
        assert!(b >= fro && b < 1.02 * fro, "{b} {fro}");
        let d = Array2::from_shape_fn((40, 40), |(i, j)| if i == j { 3.0 } else { 0.0 });
        let b = spectral_bound(d.view());
        assert!((3.0..3.3).contains(&b), "{b}");
        assert_eq!(spectral_bound(Array2::<f32>::zeros((3, 4)).view()), 0.0);
    }
}
