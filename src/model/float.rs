//! The float twin: the model in ordinary f32 arithmetic, line for line what Hugging Face transformers computes. It is
//! what the secure model is measured against, and it shows an [`Observer`] every range that calibration needs.
//!
//! Ids must be below the vocabulary's size ([`ModelConfig::check_ids`]); the functions here index by them.

use ndarray::{Array2, Array3, ArrayView1, ArrayView2, ArrayView3, ArrayViewMut1, Axis, Zip, s};
use rayon::prelude::*;

use super::adapter::LowRank;
use super::config::{Activation, LayerShape, ModelConfig, RopeScaling, Softmax};
use super::matmul::{self, matmul_transposed};
use super::observe::{Norm, Observer};
use super::variant::TWO_RELU_EPS;
use super::weights::{LayerWeights, Linear, Weights};

/// Keys (after the rotation) and values of the positions so far, layer by layer.
#[derive(Clone)]
pub struct FloatCache {
    layers: Vec<LayerCache>,
}

/// Both arrays are `[capacity, kv_heads, head_dim]`, of which the first `len` rows are filled.
#[derive(Clone)]
struct LayerCache {
    k: Array3<f32>,
    v: Array3<f32>,
    len: usize,
}

impl std::fmt::Debug for FloatCache {
    /// Without what it holds, which tells the prompt.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FloatCache").field("layers", &self.layers.len()).field("len", &self.len()).finish()
    }
}

impl FloatCache {
    /// An empty cache.
    #[must_use]
    pub fn new(config: &ModelConfig) -> Self {
        let layers = (0..config.num_layers).map(|i| LayerCache::new(config, i)).collect();
        FloatCache { layers }
    }

    /// How many positions the first layer has seen; between steps all layers have seen as many.
    #[must_use]
    pub fn len(&self) -> usize {
        self.layers.first().map_or(0, |layer| layer.len)
    }

    /// Whether no position was seen yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// As if `positions` positions had been seen, with small pseudorandom values: for measurements.
    pub fn preload(&mut self, positions: usize) {
        for layer in &mut self.layers {
            let (_, heads, dim) = layer.k.dim();
            let small = |(p, h, d): (usize, usize, usize)| {
                let i = ((p * heads + h) * dim + d) as u32;
                f32::from((i.wrapping_mul(0x9e37_79b9) >> 16) as u16) / 131_072.0 - 0.25
            };
            let values = Array3::from_shape_fn((positions, heads, dim), small);
            layer.append(&values, &values);
        }
    }

    /// Forgets all positions from `len` on.
    pub fn truncate(&mut self, len: usize) {
        for layer in &mut self.layers {
            layer.len = layer.len.min(len);
        }
    }

    /// The keys of layer `index`, after the rotation: `[positions, kv_heads, head_dim]`.
    #[must_use]
    pub fn keys(&self, index: usize) -> ArrayView3<'_, f32> {
        self.layers[index].keys()
    }

    /// The values of layer `index`: `[positions, kv_heads, head_dim]`.
    #[must_use]
    pub fn values(&self, index: usize) -> ArrayView3<'_, f32> {
        self.layers[index].values()
    }
}

impl LayerCache {
    fn new(config: &ModelConfig, index: usize) -> LayerCache {
        let LayerShape { num_kv_heads, head_dim, .. } = config.layer(index);
        let empty = || Array3::zeros((0, num_kv_heads, head_dim));
        LayerCache { k: empty(), v: empty(), len: 0 }
    }

    fn keys(&self) -> ArrayView3<'_, f32> {
        self.k.slice(s![..self.len, .., ..])
    }

    fn values(&self) -> ArrayView3<'_, f32> {
        self.v.slice(s![..self.len, .., ..])
    }

    fn append(&mut self, k: &Array3<f32>, v: &Array3<f32>) {
        let len = self.len + k.len_of(Axis(0));
        for (all, new) in [(&mut self.k, k), (&mut self.v, v)] {
            let (capacity, heads, dim) = all.dim();
            if len > capacity {
                // Doubling, so that a long decode copies every position only a few times.
                let mut larger = Array3::zeros((len.max(2 * capacity), heads, dim));
                larger.slice_mut(s![..self.len, .., ..]).assign(&all.slice(s![..self.len, .., ..]));
                *all = larger;
            }
            all.slice_mut(s![self.len..len, .., ..]).assign(new);
        }
        self.len = len;
    }
}

/// Logits after every one of `ids`, `[ids, vocab]`; `ids` begin the text.
///
/// # Panics
/// When an id is not below the vocabulary's size.
#[must_use]
pub fn forward(weights: &Weights, ids: &[u32]) -> Array2<f32> {
    advance(weights, ids, &mut FloatCache::new(&weights.config), &mut ())
}

/// Logits after every one of `ids`, `[ids, vocab]`, which continue the text in the cache and are added to it.
///
/// # Panics
/// When an id is not below the vocabulary's size, or the cache is another model's.
#[must_use]
pub fn advance(weights: &Weights, ids: &[u32], cache: &mut FloatCache, observer: &mut dyn Observer) -> Array2<f32> {
    logits_observed(weights, &hidden(weights, ids, cache, observer), observer)
}

/// The residual stream after the last layer, `[ids, hidden]`: [`advance`] without the head, which for a long prompt is
/// worth computing for the last position only.
///
/// # Panics
/// As [`advance`].
#[must_use]
pub fn hidden(weights: &Weights, ids: &[u32], cache: &mut FloatCache, observer: &mut dyn Observer) -> Array2<f32> {
    let start = cache.len();
    let mut h = embed(weights, ids);
    for index in 0..weights.layers.len() {
        h = layer(weights, index, h, start, cache, observer);
    }
    h
}

/// The embeddings of `ids`, `[ids, hidden]`.
///
/// # Panics
/// When an id is not below the vocabulary's size.
#[must_use]
pub fn embed(weights: &Weights, ids: &[u32]) -> Array2<f32> {
    let rows: Vec<usize> = ids.iter().map(|&id| id as usize).collect();
    weights.embed.select(Axis(0), &rows)
}

/// Decoder layer `index` on the residual stream `h`, `[tokens, hidden]`, of the positions from `start` on.
///
/// # Panics
/// When the cache does not hold exactly `start` positions of this layer.
#[must_use]
pub fn layer(
    weights: &Weights,
    index: usize,
    h: Array2<f32>,
    start: usize,
    cache: &mut FloatCache,
    observer: &mut dyn Observer,
) -> Array2<f32> {
    step(&weights.config, &weights.layers[index], index, h, (start, &mut cache.layers[index]), observer)
}

/// Decoder layer `index`, whose weights are `w`, on the residual stream `h` of a whole text.
#[must_use]
pub(super) fn whole(
    config: &ModelConfig,
    w: &LayerWeights,
    index: usize,
    h: Array2<f32>,
    observer: &mut dyn Observer,
) -> Array2<f32> {
    step(config, w, index, h, (0, &mut LayerCache::new(config, index)), observer)
}

fn step(
    config: &ModelConfig,
    w: &LayerWeights,
    index: usize,
    h: Array2<f32>,
    (start, cache): (usize, &mut LayerCache),
    observer: &mut dyn Observer,
) -> Array2<f32> {
    observer.norm_input(index, Norm::Input, h.view());
    let x = rms_norm(&h, w.input_norm.view(), config.rms_norm_eps);
    let h = h + self_attention(config, w, index, &x, start, cache, observer);

    observer.norm_input(index, Norm::PostAttention, h.view());
    let x = rms_norm(&h, w.post_norm.view(), config.rms_norm_eps);
    let gate = linear(&w.gate, &x);
    let mut up = if config.encoder() { Array2::ones(gate.dim()) } else { linear(&w.up, &x) };
    observer.gate(index, gate.view(), up.view());
    for (columns, activation) in config.layer(index).neurons(config.intermediate_size) {
        let columns = s![.., columns];
        Zip::from(up.slice_mut(columns)).and(gate.slice(columns)).for_each(|u, &g| *u *= activate(activation, g));
    }
    h + linear(&w.down, &up)
}

/// The final norm and the output head: `[tokens, hidden]` to `[tokens, vocab]`.
#[must_use]
pub fn logits(weights: &Weights, h: &Array2<f32>) -> Array2<f32> {
    logits_observed(weights, h, &mut ())
}

/// As [`logits`], with an observer.
#[must_use]
pub fn logits_observed(weights: &Weights, h: &Array2<f32>, observer: &mut dyn Observer) -> Array2<f32> {
    observer.norm_input(weights.config.num_layers, Norm::Final, h.view());
    let x = rms_norm(h, weights.norm.view(), weights.config.rms_norm_eps);
    let mut logits = matmul_transposed(x.view(), weights.head_matrix());
    if let Some(bias) = &weights.head_bias {
        logits += bias;
    }
    observer.logits(logits.view());
    logits
}

/// Mean negative log-likelihood, in nats, of each id after the first under the logits of the one before it; 0 where
/// there are none.
///
/// # Panics
/// When there are fewer rows than ids, or an id is not below the vocabulary's size.
#[must_use]
pub fn nats_per_token(logits: ArrayView2<'_, f32>, ids: &[u32]) -> f64 {
    let next = ids.iter().skip(1);
    let total: f64 = logits
        .outer_iter()
        .zip(next)
        .map(|(row, &id)| {
            let max = row.fold(f32::NEG_INFINITY, |a, &b| a.max(b));
            let sum: f64 = row.iter().map(|&l| f64::from(l - max).exp()).sum();
            sum.ln() - f64::from(row[id as usize] - max)
        })
        .sum();
    total / (ids.len().max(2) - 1) as f64
}

/// How far each pair of a head's coordinates turns per position, in radians, `head_dim / 2` of them, with the scaling
/// for long contexts applied. Pair `i` is the coordinates `i` and `i + head_dim / 2`.
#[must_use]
pub fn rope_frequencies(config: &ModelConfig) -> Vec<f64> {
    let dim = config.head_dim as f64;
    let base = (0..config.head_dim / 2).map(|i| config.rope.theta.powf(-2.0 * i as f64 / dim));
    match config.rope.scaling {
        RopeScaling::None => base.collect(),
        RopeScaling::Linear { factor } => base.map(|f| f / factor).collect(),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => base
            .map(|f| {
                // How many turns the pair makes in the original context: few of them is a low frequency.
                let turns = original_max_position_embeddings as f64 * f / std::f64::consts::TAU;
                let keep = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
                keep * f + (1.0 - keep) * f / factor
            })
            .collect(),
    }
}

fn self_attention(
    config: &ModelConfig,
    w: &LayerWeights,
    index: usize,
    x: &Array2<f32>,
    start: usize,
    cache: &mut LayerCache,
    observer: &mut dyn Observer,
) -> Array2<f32> {
    assert_eq!(cache.len, start, "layer {index}: the cache does not end where the step starts");
    let shape = config.layer(index);
    // Norms and rotation know the model's heads, of which a merged one has several.
    let mut q = split_heads(&linear(&w.q, x), config.head_dim);
    let mut k = split_heads(&linear(&w.k, x), config.head_dim);
    let v = split_heads(&linear(&w.v, x), shape.head_dim);
    for (heads, gain) in [(&mut q, &w.q_norm), (&mut k, &w.k_norm)] {
        if let Some(gain) = gain {
            for mut row in heads.rows_mut() {
                normalise(&mut row, gain.view(), config.rms_norm_eps);
            }
        }
    }
    if !config.encoder() {
        let frequencies = rope_frequencies(config);
        rotate(&mut q, start, &frequencies);
        rotate(&mut k, start, &frequencies);
    }
    let (q, k) = (regroup(q, shape.head_dim), regroup(k, shape.head_dim));
    cache.append(&k, &v);

    let tokens = x.nrows();
    let mut context = Array2::zeros((tokens, shape.q_size()));
    let mut row_max = Array2::zeros((shape.num_heads, tokens));
    let mut row_min = Array2::zeros((shape.num_heads, tokens));
    let (keys, values) = (cache.keys(), cache.values());
    let scale = shape.score_scale();
    let attend = |head: usize| {
        let group = head / (shape.num_heads / shape.num_kv_heads);
        let mut scores = matmul::product(q.slice(s![.., head, ..]), keys.slice(s![.., group, ..])) * scale;
        let mut extremes = Vec::with_capacity(tokens);
        for (mut row, visible) in scores.outer_iter_mut().zip(config.visible(start, tokens)) {
            let (mut seen, mut unseen) = row.view_mut().split_at(Axis(0), visible);
            unseen.fill(0.0);
            let (max, min) = seen.fold((f32::NEG_INFINITY, f32::INFINITY), |(max, min), &s| (max.max(s), min.min(s)));
            extremes.push((max, min));
            let floor = match shape.softmax {
                Softmax::Exact => {
                    seen.mapv_inplace(|s| (s - max).exp());
                    0.0
                }
                Softmax::TwoRelu => {
                    seen.mapv_inplace(|s| s.max(0.0));
                    TWO_RELU_EPS
                }
            };
            let sum: f64 = seen.iter().map(|&e| f64::from(e)).sum();
            seen *= (1.0 / (sum + floor)) as f32;
        }
        (weighted_sum(scores.view(), values.slice(s![.., group, ..])), extremes)
    };
    let work = tokens * keys.len();
    let heads: Vec<_> = if work < matmul::LARGE {
        (0..shape.num_heads).map(attend).collect()
    } else {
        (0..shape.num_heads).into_par_iter().map(attend).collect()
    };
    for (head, (of_head, extremes)) in heads.into_iter().enumerate() {
        let columns = head * shape.head_dim..(head + 1) * shape.head_dim;
        context.slice_mut(s![.., columns]).assign(&of_head);
        for (token, (max, min)) in extremes.into_iter().enumerate() {
            row_max[[head, token]] = max;
            row_min[[head, token]] = min;
        }
    }
    observer.attention(index, q.view(), k.view(), v.view(), row_max.view(), row_min.view());
    observer.context(index, context.view());
    linear(&w.o, &context)
}

/// `weights values`; of one row without the copies that a product of matrices would make.
fn weighted_sum(weights: ArrayView2<'_, f32>, values: ArrayView2<'_, f32>) -> Array2<f32> {
    if weights.nrows() > 1 {
        return weights.dot(&values);
    }
    let mut sum = Array2::zeros((weights.nrows(), values.ncols()));
    for mut sum in sum.rows_mut() {
        weights.iter().zip(values.rows()).for_each(|(&w, v)| sum.scaled_add(w, &v));
    }
    sum
}

/// `x w^T + bias + (x a^T) b^T`.
pub(super) fn linear(layer: &Linear, x: &Array2<f32>) -> Array2<f32> {
    let mut y = matmul_transposed(x.view(), layer.w.view());
    if let Some(bias) = &layer.bias {
        y += bias;
    }
    if let Some(LowRank { a, b }) = &layer.adapter {
        y += &matmul_transposed(matmul_transposed(x.view(), a.view()).view(), b.view());
    }
    y
}

fn rms_norm(h: &Array2<f32>, gain: ArrayView1<'_, f32>, eps: f64) -> Array2<f32> {
    let mut x = h.clone();
    for mut row in x.rows_mut() {
        normalise(&mut row, gain, eps);
    }
    x
}

fn normalise(row: &mut ArrayViewMut1<'_, f32>, gain: ArrayView1<'_, f32>, eps: f64) {
    let mean_square = row.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>() / row.len() as f64;
    let inverse = (1.0 / (mean_square + eps).sqrt()) as f32;
    Zip::from(row).and(gain).for_each(|x, &g| *x *= inverse * g);
}

fn activate(activation: Activation, x: f32) -> f32 {
    match activation {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::Relu => x.max(0.0),
        Activation::Quad => (0.125 * x + 0.25) * x + 0.5,
        Activation::Gelu => gelu(x),
    }
}

/// The exact one, with the error function.
pub(crate) fn gelu(x: f32) -> f32 {
    0.5 * x * (1.0 + libm::erff(x * std::f32::consts::FRAC_1_SQRT_2))
}

/// The same numbers as heads `dim` wide.
fn regroup(x: Array3<f32>, dim: usize) -> Array3<f32> {
    let (tokens, heads, width) = x.dim();
    if width == dim {
        return x;
    }
    Array3::from_shape_vec((tokens, heads * width / dim, dim), x.into_raw_vec_and_offset().0)
        .expect("merged heads are whole ones")
}

/// `[tokens, heads * dim]` to `[tokens, heads, dim]`.
fn split_heads(x: &Array2<f32>, dim: usize) -> Array3<f32> {
    let mut heads = Array3::zeros((x.nrows(), x.ncols() / dim, dim));
    for (to, from) in heads.iter_mut().zip(x) {
        *to = *from;
    }
    heads
}

/// Rotates each pair of coordinates by position times frequency. The angle is f64: at position 100000 an f32 would be
/// off by a hundredth of a radian.
fn rotate(x: &mut Array3<f32>, start: usize, frequencies: &[f64]) {
    let half = frequencies.len();
    for (token, mut heads) in x.outer_iter_mut().enumerate() {
        for (i, f) in frequencies.iter().enumerate() {
            let (sin, cos) = ((start + token) as f64 * f).sin_cos();
            let (sin, cos) = (sin as f32, cos as f32);
            for mut row in heads.outer_iter_mut() {
                let (a, b) = (row[i], row[i + half]);
                row[i] = a * cos - b * sin;
                row[i + half] = b * cos + a * sin;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frequencies(rope: &str) -> Vec<f64> {
        let text = format!(
            r#"{{"architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
                "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, {rope}}}"#
        );
        rope_frequencies(&ModelConfig::parse(text.as_bytes(), None, "test").unwrap())
    }

    #[track_caller]
    fn are(got: &[f64], want: &[(usize, f64)]) {
        assert_eq!(got.len(), 64);
        for &(i, want) in want {
            // transformers computes them in float32.
            assert!((got[i] / want - 1.0).abs() < 2e-6, "{i}: {} instead of {want}", got[i]);
        }
    }

    #[test]
    fn frequencies_of_llama_3_1() {
        // From transformers: high frequencies kept, 29 to 34 blended, low ones divided by 8.
        let want = [
            (0, 1.0),
            (1, 0.8146172165870667),
            (28, 0.0032114461064338684),
            (29, 0.0021665706299245358),
            (30, 0.0013718936825171113),
            (32, 0.0005248460220173001),
            (34, 0.0001785077911335975),
            (35, 9.556212171446532e-05),
            (63, 3.068925877869333e-07),
        ];
        let scaling = r#""factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192"#;
        are(
            &frequencies(&format!(r#""rope_theta": 500000.0, "rope_scaling": {{"rope_type": "llama3", {scaling}}}"#)),
            &want,
        );
        are(
            &frequencies(&format!(
                r#""rope_parameters": {{"rope_theta": 500000.0, "rope_type": "llama3", {scaling}}}"#
            )),
            &want,
        );
    }

    #[test]
    fn frequencies_of_deepseek_coder() {
        let want = [(0, 0.25), (1, 0.20884063839912415), (63, 2.992712552440935e-06)];
        are(&frequencies(r#""rope_theta": 100000, "rope_scaling": {"type": "linear", "factor": 4.0}"#), &want);
    }

    #[test]
    fn frequencies_without_scaling() {
        let want = [(0, 1.0), (32, 0.01), (63, 1e4f64.powf(-63.0 / 64.0))];
        are(&frequencies(r#""rope_scaling": null"#), &want);
        are(&frequencies(r#""rope_parameters": {"rope_theta": 10000, "rope_type": "default"}"#), &want);
    }

    #[test]
    fn loss_of_even_odds_is_the_logarithm() {
        let logits = Array2::from_elem((3, 8), 4.0);
        assert!((nats_per_token(logits.view(), &[1, 5, 2]) - 8f64.ln()).abs() < 1e-12);
        assert_eq!(nats_per_token(logits.view(), &[1]), 0.0);
    }
}
