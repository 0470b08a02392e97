//! Bounds and ranges of a checkpoint: what its weights prove for every input, and what the float twin shows over text.

use ndarray::{Array1, Array2, ArrayView2, ArrayView3, s};

use super::float::{self, FloatCache};
use super::observe::{Norm, Observer};
use super::{LayerWeights, Linear, ModelConfig, Weights};
use crate::plan::{Bounds, LayerBounds, LayerRanges, Ranges};

/// Text that calibration reads when the provider gives none: prose, dialogue, numbers, code.
pub const DEFAULT_TEXT: &str = include_str!("calibration.txt");

/// Slack for rounding of weights and of the norm.
const SLACK: f64 = 1.01;

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
fn largest(w: ArrayView2<'_, f32>, l: &Linear, radius: f64) -> f64 {
    row_norm(w).iter().enumerate().fold(0.0, |m: f64, (i, n)| m.max(n * radius * SLACK + bias_at(l, i)))
}

/// Bound of the norm of each head's output.
fn head_norms(w: &Array2<f32>, l: &Linear, dim: usize, radius: f64) -> Vec<f64> {
    (0..w.nrows() / dim)
        .map(|h| {
            let bias = (0..dim).map(|i| bias_at(l, h * dim + i).powi(2)).sum::<f64>().sqrt();
            spectral_bound(w.slice(s![h * dim..(h + 1) * dim, ..])) * radius + bias
        })
        .collect()
}

fn layer_bounds(c: &ModelConfig, l: &LayerWeights) -> LayerBounds {
    let radius = (c.hidden_size as f64).sqrt() * SLACK;
    let (dim, scale) = (c.head_dim, (c.head_dim as f64).sqrt());
    let [q, k, v] = [&l.q, &l.k, &l.v].map(|m| folded(&m.w, &l.input_norm));
    let qk_raw = largest(q.view(), &l.q, radius).max(largest(k.view(), &l.k, radius));
    let gain = |g: &Option<Array1<f32>>| g.as_ref().map(|g| g.iter().fold(0.0f64, |m, v| m.max(f64::from(v.abs()))));
    let (qk, qn, kn) = if let (Some(a), Some(b)) = (gain(&l.q_norm), gain(&l.k_norm)) {
        // After its norm a head has norm sqrt(dim) before the gain.
        let one = |g: f64, heads| vec![g * scale * SLACK; heads];
        (a.max(b) * scale * SLACK, one(a, c.num_heads), one(b, c.num_kv_heads))
    } else {
        (qk_raw, head_norms(&q, &l.q, dim, radius), head_norms(&k, &l.k, dim, radius))
    };
    let group = c.num_heads / c.num_kv_heads;
    let score = qn.iter().enumerate().fold(0.0f64, |m, (h, q)| m.max(q * kn[h / group] / scale));
    let v_norms = head_norms(&v, &l.v, dim, radius);
    let context = (0..c.num_heads).map(|h| v_norms[h / group].powi(2)).sum::<f64>().sqrt();
    let [g, u] = [&l.gate, &l.up].map(|m| folded(&m.w, &l.post_norm));
    let (gate, up) = (largest(g.view(), &l.gate, radius), largest(u.view(), &l.up, radius));
    // |silu(g)| <= |g|, so a change is at most sum_i |w_i g_i u_i|: by elements, or by norms.
    let (gr, ur) = (row_norm(g.view()), row_norm(u.view()));
    let by_elements = l.down.w.rows().into_iter().map(|row| {
        row.iter().enumerate().fold(0.0, |sum, (i, w)| {
            let each = (gr[i] * radius + bias_at(&l.gate, i)) * (ur[i] * radius + bias_at(&l.up, i));
            sum + f64::from(w.abs()) * each
        })
    });
    let by_elements = by_elements.fold(0.0f64, f64::max);
    let bias_norm =
        |l: &Linear| l.bias.as_ref().map_or(0.0, |b| b.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt());
    let steepest = l.down.w.iter().fold(0.0f64, |m, w| m.max(f64::from(w.abs())));
    let by_norms = steepest
        * (spectral_bound(g.view()) * radius + bias_norm(&l.gate))
        * (spectral_bound(u.view()) * radius + bias_norm(&l.up));
    let bias_max =
        |l: &Linear| l.bias.as_ref().map_or(0.0, |b| b.iter().fold(0.0f64, |m, v| m.max(f64::from(v.abs()))));
    LayerBounds {
        qk,
        qk_raw,
        v: largest(v.view(), &l.v, radius),
        score,
        attention: row_norm(l.o.w.view()).iter().fold(0.0f64, |m, n| m.max(*n)) * context * SLACK + bias_max(&l.o),
        gate,
        up,
        mlp: by_elements.min(by_norms) * SLACK + bias_max(&l.down),
    }
}

/// What the weights of the layers from `first` on prove.
#[must_use]
pub fn bounds(w: &Weights, first: usize) -> Bounds {
    let radius = (w.config.hidden_size as f64).sqrt() * SLACK;
    let largest_of = |w: ArrayView2<'_, f32>| row_norm(w).iter().fold(0.0f64, |m, n| m.max(*n));
    let head = folded(&w.head_matrix().to_owned(), &w.norm);
    Bounds {
        layers: w.layers[first..].iter().map(|l| layer_bounds(&w.config, l)).collect(),
        logit: largest_of(head.view()) * radius * SLACK,
        embedding: w.embed.iter().fold(0.0f64, |m, v| m.max(f64::from(v.abs()))),
    }
}

struct Watch<'a> {
    weights: &'a Weights,
    layers: Vec<LayerRanges>,
    final_sum: (f64, f64),
    logit: f64,
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
            Norm::Input => &mut self.layers[layer].input_sum,
            Norm::PostAttention => &mut self.layers[layer].post_sum,
            Norm::Final => &mut self.final_sum,
        };
        h.rows().into_iter().for_each(|r| stretch(range, sum_squares(r)));
        let c = &self.weights.config;
        if which == Norm::Input && c.qk_norm {
            let w = &self.weights.layers[layer];
            let mut x = h.to_owned();
            for mut row in x.rows_mut() {
                let scale = (sum_squares(row.iter()) / c.hidden_size as f64 + c.rms_norm_eps).sqrt() as f32;
                row.iter_mut().zip(&w.input_norm).for_each(|(v, g)| *v = *v / scale * g);
            }
            let range = self.layers[layer].qk_sum.get_or_insert((f64::INFINITY, 0.0));
            for l in [&w.q, &w.k] {
                let mut y = x.dot(&l.w.t());
                if let Some(b) = &l.bias {
                    y += b;
                }
                for row in y.rows() {
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
        let r = &mut self.layers[layer];
        r.score = r.score.max(absolute(row_max)).max(absolute(row_min));
        row_max.iter().for_each(|&m| stretch(&mut r.row_max, f64::from(m)));
    }

    fn gate(&mut self, layer: usize, gate: ArrayView2<'_, f32>, _up: ArrayView2<'_, f32>) {
        let r = &mut self.layers[layer];
        r.gate = r.gate.max(absolute(gate));
    }

    fn logits(&mut self, l: ArrayView2<'_, f32>) {
        self.logit = self.logit.max(absolute(l));
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
    let mut watch = Watch {
        weights: w,
        layers: vec![LayerRanges::default(); w.layers.len()],
        final_sum: (f64::INFINITY, 0.0),
        logit: 0.0,
    };
    for ids in texts.iter().filter(|ids| !ids.is_empty()) {
        let mut cache = FloatCache::new(&w.config);
        let ids = &ids[..ids.len().min(w.config.max_positions)];
        let _ = float::advance(w, ids, &mut cache, &mut watch);
        done(ids.len());
    }
    Ranges { layers: watch.layers.split_off(first), final_sum: watch.final_sum, logit: watch.logit }
}

/// Calibration inputs: `text` cut to the context, and pseudorandom tokens, which stress a model as prose does not.
#[must_use]
pub fn inputs(c: &ModelConfig, text: Option<Vec<u32>>) -> Vec<Vec<u32>> {
    let length = c.max_positions.min(256);
    let mut all = vec![stress(c)];
    if let Some(ids) = text {
        all.extend(ids.chunks(length).take(4).map(<[u32]>::to_vec));
    }
    all
}

/// Pseudorandom tokens.
#[must_use]
pub fn stress(c: &ModelConfig) -> Vec<u32> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % c.vocab_size as u64) as u32
    };
    (0..c.max_positions.min(64)).map(|_| random()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

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
