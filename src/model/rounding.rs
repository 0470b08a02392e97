//! Weights as the engine multiplies by them: gains folded in, rounded to 12 fraction bits; and whether enough of them is left.
//!
//! What follows from weights has to follow from these: bounds are computed of them, and the float twin that runs on them
//! ([`as_multiplied`]) differs from the secure run by the rounding of activations alone.

use ndarray::{Array1, Array2, ArrayView1, ArrayView2, Axis, s};

use super::calibrate::folded;
use super::prepare::layer_matrix;
use super::sections::Slot;
use super::{LayerWeights, Linear, ModelConfig, Weights};
use crate::error::{Error, Result};
use crate::plan::{F, FW};

/// To `f` fraction bits, as [`OwnerMatrix::quantise`](crate::protocol::linear::OwnerMatrix::quantise) does it.
fn round(w: &Array2<f32>, f: u32) -> Array2<f32> {
    let scale = f64::from(f).exp2();
    w.mapv(|v| ((f64::from(v) * scale).round() / scale) as f32)
}

/// The layer of which the engine's arithmetic is an exact evaluation, activations apart: gains are 1, and what was folded and
/// rounded is in the matrices. The queries (or the gain of their norm) have `1/sqrt(head_dim)` in them too.
///
/// # Errors
/// [`Error::Internal`] for weights that do not match the configuration.
pub(super) fn layer(c: &ModelConfig, l: &LayerWeights) -> Result<LayerWeights> {
    let rounded = |slot| Ok::<_, Error>(round(&layer_matrix(c, l, slot)?.0, FW));
    let (qkv, gate_up) = (rounded(Slot::Qkv)?, rounded(Slot::GateUp)?);
    let (nq, nk, m) = (c.q_size(), c.kv_size(), c.intermediate_size);
    let part = |w: &Array2<f32>, from: usize, n: usize, old: &Linear, by: f32| Linear {
        w: w.slice(s![from..from + n, ..]).to_owned(),
        bias: old.bias.as_ref().map(|b| b * by),
    };
    let scale = 1.0 / (c.head_dim as f32).sqrt();
    let q_scale = if c.qk_norm { 1.0 } else { scale };
    let gain = |g: &Option<Array1<f32>>, by: f32| {
        g.as_ref().map(|g| round(&(g * by).insert_axis(Axis(0)), FW).remove_axis(Axis(0)))
    };
    Ok(LayerWeights {
        input_norm: Array1::ones(c.hidden_size),
        q: part(&qkv, 0, nq, &l.q, q_scale),
        k: part(&qkv, nq, nk, &l.k, 1.0),
        v: part(&qkv, nq + nk, nk, &l.v, 1.0),
        o: Linear { w: rounded(Slot::O)?, bias: l.o.bias.clone() },
        q_norm: gain(&l.q_norm, scale),
        k_norm: gain(&l.k_norm, 1.0),
        post_norm: Array1::ones(c.hidden_size),
        gate: part(&gate_up, 0, m, &l.gate, 1.0),
        up: part(&gate_up, m, m, &l.up, 1.0),
        down: Linear { w: rounded(Slot::Down)?, bias: l.down.bias.clone() },
    })
}

/// The head likewise.
pub(super) fn head(w: &Weights) -> Array2<f32> {
    round(&folded(&w.head_matrix().to_owned(), &w.norm), FW)
}

/// The model whose private layers, head and private embedding are the numbers that the engine multiplies by: the float twin
/// of what is computed, where `w` is that of what is meant.
///
/// # Errors
/// [`Error::Internal`] for weights that do not match their configuration.
pub fn as_multiplied(w: &Weights, first_private: usize, private_embedding: bool) -> Result<Weights> {
    let c = &w.config;
    let back = (c.head_dim as f32).sqrt();
    let one = |(i, l): (usize, &LayerWeights)| {
        if i < first_private {
            return Ok(l.clone());
        }
        let mut l = layer(c, l)?;
        match &mut l.q_norm {
            Some(g) => *g *= back,
            None => {
                l.q.w *= back;
                l.q.bias.iter_mut().for_each(|b| *b *= back);
            }
        }
        Ok(l)
    };
    Ok(Weights {
        config: ModelConfig { tie_word_embeddings: false, ..c.clone() },
        embed: if private_embedding { round(&w.embed, F) } else { w.embed.clone() },
        layers: w.layers.iter().enumerate().map(one).collect::<Result<_>>()?,
        norm: Array1::ones(c.hidden_size),
        head: Some(head(w)),
    })
}

/// What rounding did to one matrix: root mean square of the error over that of the weights.
#[derive(Clone, Debug)]
pub struct Loss {
    /// What an error calls the place: `layer 3`, `the head`, `the embedding`.
    pub place: String,
    /// The matrix as the checkpoint names it.
    pub matrix: &'static str,
    /// Of the whole matrix.
    pub all: f64,
    /// Of the output row that lost most among those that matter.
    pub row: f64,
    /// Which one that is.
    pub at: usize,
}

impl Loss {
    /// The largest [`Loss::all`] that is accepted; [`Loss::row`] may be four times as much. What a relative error does
    /// to the distribution differs by kind: these are set so that the bundled model, rescaled without changing its function until all
    /// layers are at the limits at once, moves by a KL of less than 1e-3 (`tests/rounding.rs`).
    #[must_use]
    pub fn limit(&self) -> f64 {
        match self.matrix {
            "self_attn.q_proj" | "self_attn.k_proj" => 0.03,
            "mlp.down_proj" | "lm_head" => 0.009,
            "embed_tokens" => 0.006,
            _ => 0.015,
        }
    }
}

/// A row is one of many; but that of a head or a token may decide alone.
const ROW: f64 = 4.0;

/// A row matters if what it contributes is at least this part of what the median row contributes.
const MATTERS: f64 = 0.25;

/// Sums of squares of each row's weights and of their rounding errors, the columns weighted by the size of what they read.
fn energies(w: ArrayView2<'_, f32>, f: u32, reads: Option<&[f64]>) -> Vec<(f64, f64)> {
    let scale = f64::from(f).exp2();
    let row = |r: ArrayView1<'_, f32>| {
        r.iter().enumerate().fold((0.0, 0.0), |(all, lost), (j, &v)| {
            let (v, c) = (f64::from(v), reads.map_or(1.0, |c| c[j]));
            let error = v - (v * scale).round() / scale;
            (all + (v * c).powi(2), lost + (error * c).powi(2))
        })
    };
    w.rows().into_iter().map(row).collect()
}

fn norms(w: ArrayView2<'_, f32>, axis: Axis) -> Vec<f64> {
    w.lanes(axis).into_iter().map(|r| r.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt()).collect()
}

/// `importance` of a row is relative: what it contributes next to the others.
fn loss(place: &str, matrix: &'static str, rows: &[(f64, f64)], importance: &[f64]) -> Loss {
    let ratio = |(all, lost): (f64, f64)| if all > 0.0 { (lost / all).sqrt() } else { 0.0 };
    let all = ratio(rows.iter().fold((0.0, 0.0), |a, r| (a.0 + r.0, a.1 + r.1)));
    let mut sorted: Vec<f64> = importance.iter().copied().filter(|v| *v > 0.0).collect();
    sorted.sort_by(f64::total_cmp);
    let least = sorted.get(sorted.len() / 2).map_or(0.0, |median| median * MATTERS);
    let mattering = rows.iter().zip(importance).enumerate().filter(|(_, (_, i))| **i >= least && **i > 0.0);
    let (at, row) = mattering.map(|(i, (r, _))| (i, ratio(*r))).fold((0, 0.0), |m, r| if r.1 > m.1 { r } else { m });
    Loss { place: place.to_owned(), matrix, all, row, at }
}

fn layer_losses(c: &ModelConfig, l: &LayerWeights, place: &str, out: &mut Vec<Loss>) {
    let [q, k, v] = [&l.q, &l.k, &l.v].map(|m| folded(&m.w, &l.input_norm));
    let scale = if c.qk_norm { 1.0 } else { 1.0 / (c.head_dim as f32).sqrt() };
    let q = q * scale;
    let [gate, up] = [&l.gate, &l.up].map(|m| folded(&m.w, &l.post_norm));
    let (dim, group) = (c.head_dim, c.num_heads / c.num_kv_heads);
    let [rq, rk, rv, rg, ru] = [&q, &k, &v, &gate, &up].map(|w| norms(w.view(), Axis(1)));
    let [co, cd] = [&l.o.w, &l.down.w].map(|w| norms(w.view(), Axis(0)));
    let size =
        |rows: &[f64]| -> Vec<f64> { rows.chunks(dim).map(|h| h.iter().map(|v| v * v).sum::<f64>().sqrt()).collect() };
    let (hq, hk) = (size(&rq), size(&rk));
    // A head's queries count with its keys; under norms of their own, each within its head.
    let q_importance: Vec<f64> = (0..rq.len())
        .map(|i| if c.qk_norm { rq[i] / hq[i / dim].max(1e-30) } else { rq[i] * hk[i / dim / group] })
        .collect();
    let k_importance: Vec<f64> = (0..rk.len())
        .map(|i| {
            let (h, own) = (i / dim, hk[i / dim].max(1e-30));
            let asked = (h * group..(h + 1) * group).fold(0.0f64, |m, h| m.max(hq[h]));
            if c.qk_norm { rk[i] / own } else { rk[i] * asked }
        })
        .collect();
    let read = |i: usize| {
        let (h, d) = (i / dim, i % dim);
        (h * group..(h + 1) * group).fold(0.0f64, |m, h| m.max(co[h * dim + d]))
    };
    let v_importance: Vec<f64> = (0..rv.len()).map(|i| rv[i] * read(i)).collect();
    let neuron: Vec<f64> = (0..rg.len()).map(|i| rg[i] * ru[i]).collect();
    let mlp_importance: Vec<f64> = neuron.iter().zip(&cd).map(|(n, d)| n * d).collect();
    let o_reads: Vec<f64> = (0..co.len()).map(|i| rv[i / dim / group * dim + i % dim]).collect();
    let mut add = |matrix, w: &Array2<f32>, reads: Option<&[f64]>, importance: Option<&[f64]>| {
        let rows = energies(w.view(), FW, reads);
        let own: Vec<f64> = rows.iter().map(|r| r.0.sqrt()).collect();
        out.push(loss(place, matrix, &rows, importance.unwrap_or(&own)));
    };
    add("self_attn.q_proj", &q, None, Some(&q_importance));
    add("self_attn.k_proj", &k, None, Some(&k_importance));
    add("self_attn.v_proj", &v, None, Some(&v_importance));
    add("self_attn.o_proj", &l.o.w, Some(&o_reads), None);
    add("mlp.gate_proj", &gate, None, Some(&mlp_importance));
    add("mlp.up_proj", &up, None, Some(&mlp_importance));
    add("mlp.down_proj", &l.down.w, Some(&neuron), None);
    let back = 1.0 / (dim as f32).sqrt();
    for (matrix, gain, by) in [("self_attn.q_norm", &l.q_norm, back), ("self_attn.k_norm", &l.k_norm, 1.0)] {
        if let Some(g) = gain {
            add(matrix, &(g * by).insert_axis(Axis(0)), None, None);
        }
    }
}

/// What rounding does to every matrix that is prepared: the private layers', the head's and the private embedding's.
#[must_use]
pub fn losses(w: &Weights, first_private: usize, private_embedding: bool) -> Vec<Loss> {
    let mut out = Vec::new();
    for (i, l) in w.layers.iter().enumerate().skip(first_private) {
        layer_losses(&w.config, l, &format!("layer {i}"), &mut out);
    }
    let mut whole = |place, matrix, w: ArrayView2<'_, f32>, f| {
        let rows = energies(w, f, None);
        let own: Vec<f64> = rows.iter().map(|r| r.0.sqrt()).collect();
        out.push(loss(place, matrix, &rows, &own));
    };
    whole("the head", "lm_head", folded(&w.head_matrix().to_owned(), &w.norm).view(), FW);
    if private_embedding {
        whole("the embedding", "embed_tokens", w.embed.view(), F);
    }
    out
}

/// Refuses weights of which 12 fraction bits leave too little.
///
/// # Errors
/// [`Error::Model`] naming layer and matrix.
pub fn check(w: &Weights, first_private: usize, private_embedding: bool) -> Result<()> {
    for l in losses(w, first_private, private_embedding) {
        let limit = l.limit();
        let (what, lost, limit) = if l.all > limit {
            ("its weights".to_owned(), l.all, limit)
        } else if l.row > ROW * limit {
            (format!("its row {}", l.at), l.row, ROW * limit)
        } else {
            continue;
        };
        return Err(Error::Model(format!(
            "{}: {}: rounding to {FW} fraction bits changes {what} by {:.1} % (limit {:.1} %), too much for the right tokens: they are very small once the norm's gain is folded in; rescale the checkpoint (multiply this matrix, divide what it feeds or is fed by), or keep that part public with --private-layers",
            l.place,
            l.matrix,
            100.0 * lost,
            100.0 * limit
        )));
    }
    Ok(())
}
