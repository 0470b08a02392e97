//! Weights as the engine multiplies by them: gains folded in, rounded to a matrix's fraction bits; how many these are, and whether
//! they are enough.
//!
//! What follows from weights has to follow from these: bounds are computed of them, and the float twin that runs on them
//! ([`as_multiplied`]) differs from the secure run by the rounding of activations alone.

use std::fmt;

use ndarray::{Array1, Array2, ArrayView1, ArrayView2, Axis, CowArray, Ix2, s};

use super::adapter::LowRank;
use super::calibrate::folded;
use super::prepare::layer_matrix;
use super::sections::Slot;
use super::{LayerWeights, Linear, ModelConfig, Weights};
use crate::error::{Error, Result};
use crate::plan::{
    AdapterFractions, F, F_A_MOST, F_B_MOST, F_QK, FW_LEAST, FW_MOST, Fractions, Group, LayerFractions, Misfit,
};

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
pub(super) fn layer(c: &ModelConfig, index: usize, l: &LayerWeights, f: &LayerFractions) -> Result<LayerWeights> {
    let rounded = |slot, f| Ok::<_, Error>(round(&layer_matrix(c, index, l, slot)?.0, f));
    let (qkv, gate_up) = (rounded(Slot::Qkv, f.qkv)?, rounded(Slot::GateUp, f.gate_up)?);
    let shape = c.layer(index);
    let (nq, nk, m) = (shape.q_size(), shape.kv_size(), c.intermediate_size);
    let part = |w: &Array2<f32>, from: usize, n: usize, old: &Linear, by: f32| Linear {
        w: w.slice(s![from..from + n, ..]).to_owned(),
        bias: old.bias.as_ref().map(|b| b * by),
        adapter: None,
    };
    let scale = shape.score_scale();
    let q_scale = if c.qk_norm { 1.0 } else { scale };
    let gain = |g: &Option<Array1<f32>>, by: f32| {
        g.as_ref().map(|g| round(&(g * by).insert_axis(Axis(0)), f.qk_gain).remove_axis(Axis(0)))
    };
    let mut out = LayerWeights {
        input_norm: Array1::ones(c.hidden_size),
        q: part(&qkv, 0, nq, &l.q, q_scale),
        k: part(&qkv, nq, nk, &l.k, 1.0),
        v: part(&qkv, nq + nk, nk, &l.v, 1.0),
        o: Linear { w: rounded(Slot::O, f.o)?, bias: l.o.bias.clone(), adapter: None },
        q_norm: gain(&l.q_norm, scale),
        k_norm: gain(&l.k_norm, 1.0),
        post_norm: Array1::ones(c.hidden_size),
        gate: part(&gate_up, 0, m, &l.gate, 1.0),
        up: part(&gate_up, m, l.up.w.nrows(), &l.up, 1.0),
        down: Linear { w: rounded(Slot::Down, f.down)?, bias: l.down.bias.clone(), adapter: None },
    };
    for group in Group::ALL {
        let mut from = 0;
        for module in l.adapted().filter(|m| m.group() == group) {
            let none = || Error::Internal(format!("no fraction for the adapters of layer {index}"));
            let f = f.adapters.get(group).ok_or_else(none)?;
            let (all, b) = (rounded(Slot::AdapterA(group), f.a)?, rounded(Slot::AdapterB(module), f.b)?);
            let a = all.slice(s![from..from + b.ncols(), ..]).to_owned();
            from += b.ncols();
            out.linear_mut(module).adapter = Some(LowRank { a, b });
        }
    }
    Ok(out)
}

/// The head likewise.
pub(super) fn head(w: &Weights, f: u32) -> Array2<f32> {
    round(&folded(&w.head_matrix().to_owned(), &w.norm), f)
}

/// The model whose private layers, head and private embedding are the numbers that the engine multiplies by under a plan of
/// these fraction bits: the float twin of what is computed, where `w` is that of what is meant.
///
/// # Errors
/// [`Error::Internal`] for weights that do not match their configuration, or fractions of other layers.
pub fn as_multiplied(
    w: &Weights,
    first_private: usize,
    private_embedding: bool,
    fractions: &Fractions,
) -> Result<Weights> {
    let c = &w.config;
    let one = |(i, l): (usize, &LayerWeights)| {
        let Some(private) = i.checked_sub(first_private) else { return Ok(l.clone()) };
        let f = fractions.layers.get(private).ok_or_else(|| Error::Internal(format!("no fraction for layer {i}")))?;
        let mut l = layer(c, i, l, f)?;
        let back = 1.0 / c.layer(i).score_scale();
        match &mut l.q_norm {
            Some(g) => *g *= back,
            None => {
                l.q.w *= back;
                l.q.bias.iter_mut().for_each(|b| *b *= back);
                l.q.adapter.iter_mut().for_each(|a| a.b *= back);
            }
        }
        Ok(l)
    };
    Ok(Weights {
        config: ModelConfig { tie_word_embeddings: false, ..c.clone() },
        embed: if private_embedding { round(&w.embed, F) } else { w.embed.clone() },
        layers: w.layers.iter().enumerate().map(one).collect::<Result<_>>()?,
        norm: Array1::ones(c.hidden_size),
        head: Some(head(w, fractions.head)),
        head_bias: w.head_bias.clone(),
    })
}

/// What rounding did to one matrix or to its outputs: root mean square of the error over that of what is rounded.
#[derive(Clone, Debug)]
pub struct Loss {
    /// What an error calls the place: `layer 3`, `the head`, `the embedding`.
    pub place: String,
    /// The matrix as the checkpoint names it.
    pub matrix: &'static str,
    /// Fraction bits that it was rounded to.
    pub f: u32,
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
fn loss((place, matrix): (&str, &'static str), f: u32, rows: &[(f64, f64)], importance: &[f64]) -> Loss {
    let ratio = |(all, lost): (f64, f64)| if all > 0.0 { (lost / all).sqrt() } else { 0.0 };
    let all = ratio(rows.iter().fold((0.0, 0.0), |a, r| (a.0 + r.0, a.1 + r.1)));
    let mut sorted: Vec<f64> = importance.iter().copied().filter(|v| *v > 0.0).collect();
    sorted.sort_by(f64::total_cmp);
    let least = sorted.get(sorted.len() / 2).map_or(0.0, |median| median * MATTERS);
    let mattering = rows.iter().zip(importance).enumerate().filter(|(_, (_, i))| **i >= least && **i > 0.0);
    let (at, row) = mattering.map(|(i, (r, _))| (i, ratio(*r))).fold((0, 0.0), |m, r| if r.1 > m.1 { r } else { m });
    Loss { place: place.to_owned(), matrix, f, all, row, at }
}

/// The square roots of the energies: what a row contributes by itself.
fn own(rows: &[(f64, f64)]) -> Vec<f64> {
    rows.iter().map(|r| r.0.sqrt()).collect()
}

/// A matrix as it is multiplied, and what its rounding is weighed by.
struct Weighed<'a> {
    matrix: &'static str,
    w: CowArray<'a, f32, Ix2>,
    /// The size of what each column reads; all alike if there is none.
    reads: Option<Vec<f64>>,
    /// How much each row contributes; what it has itself if there is none.
    importance: Option<Vec<f64>>,
    /// Energies of its outputs and of what they lose themselves, whatever the fraction of the weights: by row, or by head.
    /// None where they are added to what is larger.
    outputs: Vec<(f64, f64)>,
}

impl<'a> Weighed<'a> {
    fn new(matrix: &'static str, w: impl Into<CowArray<'a, f32, Ix2>>) -> Self {
        Weighed { matrix, w: w.into(), reads: None, importance: None, outputs: Vec::new() }
    }

    /// What rounding to `f` fraction bits does to the weights.
    fn loss(&self, place: &str, f: u32) -> Loss {
        let rows = energies(self.w.view(), f, self.reads.as_deref());
        match &self.importance {
            Some(importance) => loss((place, self.matrix), f, &rows, importance),
            None => loss((place, self.matrix), f, &rows, &own(&rows)),
        }
    }

    /// The fewest fraction bits, `least` or more, that leave enough of the weights; and what [`FW_LEAST`] would do to them where
    /// these are not enough.
    fn fraction(&self, place: &str, least: u32) -> Result<(u32, Option<Loss>)> {
        let first = self.loss(place, FW_LEAST);
        if first.exceeded().is_none() {
            return Ok((least, None));
        }
        let outputs = loss((place, self.matrix), FW_LEAST, &self.outputs, &own(&self.outputs));
        if let Some((_, lost, limit)) = outputs.exceeded() {
            let more = format!(
                "more bits would not help, since its outputs are too small for their own rounding ({:.1} %, limit {:.1} %)",
                100.0 * lost,
                100.0 * limit
            );
            return Err(first.refused(&more));
        }
        // Rounded to more bits no weight is further off, so that what was enough for a matrix beside this one still is.
        for f in FW_LEAST + 1..=FW_MOST {
            if self.loss(place, f).exceeded().is_none() {
                return Ok((f.max(least), Some(first)));
            }
        }
        Err(self.loss(place, FW_MOST).refused("these are the most there are"))
    }
}

/// Mean square of a truncation's error, in units of the last place: it is the sum of two uniform ones.
const TRUNCATED: f64 = 1.0 / 6.0;

/// How far a line of the activation is off, root mean square: half of its largest error.
const LINE: f64 = 1e-3;

/// Mean square of the truncation to `f` fraction bits.
fn truncated(f: u32) -> f64 {
    TRUNCATED * (-2.0 * f64::from(f)).exp2()
}

/// Of one head's scores, given the norms of the rows of queries and keys: their mean square and what truncating the queries, the
/// keys leaves out. A score matters as one of size 1 at least, since the softmax sees differences.
fn score(q: &[f64], k: &[f64]) -> [(f64, f64); 2] {
    let all = q.iter().zip(k).map(|(q, k)| (q * k).powi(2)).sum::<f64>().max(1.0);
    [k, q].map(|other| (all, truncated(F_QK) * other.iter().map(|v| v * v).sum::<f64>()))
}

/// The matrices of a layer, each with the section that it is in.
fn weighed<'a>(c: &ModelConfig, index: usize, l: &'a LayerWeights) -> Vec<(Slot, Weighed<'a>)> {
    let [q, k, v] = [&l.q, &l.k, &l.v].map(|m| folded(&m.w, &l.input_norm));
    let shape = c.layer(index);
    let scale = if c.qk_norm { 1.0 } else { shape.score_scale() };
    let q = q * scale;
    let [gate, up] = [&l.gate, &l.up].map(|m| folded(&m.w, &l.post_norm));
    let gated = !c.encoder();
    let (dim, group) = (shape.head_dim, shape.num_heads / shape.num_kv_heads);
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
    // Without a gate what is activated is multiplied by 1.
    let ru = if gated { ru } else { vec![1.0; rg.len()] };
    let neuron: Vec<f64> = (0..rg.len()).map(|i| rg[i] * ru[i]).collect();
    let mlp_importance: Vec<f64> = neuron.iter().zip(&cd).map(|(n, d)| n * d).collect();
    let o_reads: Vec<f64> = (0..co.len()).map(|i| rv[i / dim / group * dim + i % dim]).collect();
    let (q_outputs, k_outputs) = if c.qk_norm {
        // What their norm reads; what it makes of them is the gains' output.
        let one = |h: &[f64]| h.iter().map(|h| (h * h, truncated(F) * dim as f64)).collect();
        (one(&hq), one(&hk))
    } else {
        let head = |h: usize| score(&rq[h * dim..(h + 1) * dim], &rk[h / group * dim..(h / group + 1) * dim]);
        (0..shape.num_heads).map(head).map(|[q, k]| (q, k)).unzip()
    };
    // Truncated themselves, and their weighted mean.
    let v_outputs = (0..rv.len()).map(|i| (v_importance[i].powi(2), 2.0 * truncated(F) * read(i).powi(2))).collect();
    // As much of the product, which is truncated too: of small gates the activation is half.
    let product = |i: usize, lost: f64| ((mlp_importance[i] / 2.0).powi(2), lost * cd[i].powi(2));
    let gate_outputs =
        (0..rg.len()).map(|i| product(i, (truncated(F) + LINE * LINE) * ru[i].powi(2) + truncated(F))).collect();
    let up_outputs = (0..ru.len()).map(|i| product(i, truncated(F) * ((rg[i] / 2.0).powi(2) + 1.0))).collect();
    let mut all = vec![
        (
            Slot::Qkv,
            Weighed { importance: Some(q_importance), outputs: q_outputs, ..Weighed::new("self_attn.q_proj", q) },
        ),
        (
            Slot::Qkv,
            Weighed { importance: Some(k_importance), outputs: k_outputs, ..Weighed::new("self_attn.k_proj", k) },
        ),
        (
            Slot::Qkv,
            Weighed { importance: Some(v_importance), outputs: v_outputs, ..Weighed::new("self_attn.v_proj", v) },
        ),
        (Slot::O, Weighed { reads: Some(o_reads), ..Weighed::new("self_attn.o_proj", &l.o.w) }),
        (
            Slot::GateUp,
            Weighed {
                importance: Some(mlp_importance.clone()),
                outputs: gate_outputs,
                ..Weighed::new("mlp.gate_proj", gate)
            },
        ),
        (Slot::Down, Weighed { reads: Some(neuron), ..Weighed::new("mlp.down_proj", &l.down.w) }),
    ];
    if gated {
        let up = Weighed::new("mlp.up_proj", up);
        all.push((Slot::GateUp, Weighed { importance: Some(mlp_importance), outputs: up_outputs, ..up }));
    }
    if let (Some(q), Some(k)) = (&l.q_norm, &l.k_norm) {
        let q = q * (1.0 / (dim as f32).sqrt());
        let size = |g: &Array1<f32>| g.iter().map(|&v| f64::from(v.abs())).collect::<Vec<_>>();
        let [of_q, of_k] = score(&size(&q), &size(k)).map(|head| vec![head]);
        let gain = |g: Array1<f32>| g.insert_axis(Axis(0));
        all.push((Slot::QkGain, Weighed { outputs: of_q, ..Weighed::new("self_attn.q_norm", gain(q)) }));
        all.push((Slot::QkGain, Weighed { outputs: of_k, ..Weighed::new("self_attn.k_norm", gain(k.clone())) }));
    }
    all
}

/// Part of a factor of an adapter that its rounding may change, root mean square: of what is a small part of an output itself.
const FACTOR: f64 = 0.005;

/// The fewest fraction bits that leave enough of the factors of a group's adapters; none without adapters. The most always do:
/// rows of `A` are scaled to a norm of 1 to 2, and what is lost of a `B` smaller than those can hold is less than the
/// truncation of what it is added to.
fn adapter_fractions(
    c: &ModelConfig,
    index: usize,
    l: &LayerWeights,
    group: Group,
) -> Result<Option<AdapterFractions>> {
    let fewest = |slot, most| -> Result<u32> {
        let (w, _) = layer_matrix(c, index, l, slot)?;
        let lost = |f: u32| {
            let (all, lost) = energies(w.view(), f, None).iter().fold((0.0, 0.0), |sum, r| (sum.0 + r.0, sum.1 + r.1));
            lost > FACTOR * FACTOR * all
        };
        Ok((FW_LEAST..most).find(|f| !lost(*f)).unwrap_or(most))
    };
    let mut f = None;
    for module in l.adapted().filter(|m| m.group() == group) {
        let b = fewest(Slot::AdapterB(module), F_B_MOST)?;
        let own: &mut AdapterFractions = match &mut f {
            Some(f) => f,
            None => f.insert(AdapterFractions { a: fewest(Slot::AdapterA(group), F_A_MOST)?, b }),
        };
        own.b = own.b.max(b);
    }
    Ok(f)
}

/// The head likewise.
fn weighed_head(w: &Weights) -> Weighed<'static> {
    Weighed::new("lm_head", folded(&w.head_matrix().to_owned(), &w.norm))
}

const HEAD: &str = "the head";

fn of_layer(i: usize) -> String {
    format!("layer {i}")
}

fn embedding_loss(w: &Weights) -> Loss {
    Weighed::new("embed_tokens", &w.embed).loss("the embedding", F)
}

/// What rounding to [`FW_LEAST`] fraction bits does to every matrix that is prepared: the private layers', the head's and the
/// private embedding's.
#[must_use]
pub fn losses(w: &Weights, first_private: usize, private_embedding: bool) -> Vec<Loss> {
    let mut out = Vec::new();
    for (i, l) in w.layers.iter().enumerate().skip(first_private) {
        out.extend(weighed(&w.config, i, l).iter().map(|(_, m)| m.loss(&of_layer(i), FW_LEAST)));
    }
    out.push(weighed_head(w).loss(HEAD, FW_LEAST));
    if private_embedding {
        out.push(embedding_loss(w));
    }
    out
}

/// How many fraction bits the private matrices get.
#[derive(Clone, Debug)]
pub struct Choice {
    /// Per matrix.
    pub fractions: Fractions,
    /// What [`FW_LEAST`] would do to those that get more.
    pub small: Vec<Loss>,
}

impl Choice {
    /// The fewest fraction bits, [`FW_LEAST`] to [`FW_MOST`], that leave enough of each private matrix.
    ///
    /// # Errors
    /// [`Error::Model`] naming layer and matrix where the most are not enough, or would not help: its outputs have the fraction
    /// of activations, whatever its own.
    pub fn new(w: &Weights, first_private: usize, private_embedding: bool) -> Result<Choice> {
        let mut choice = Choice::begin(w, private_embedding)?;
        for (i, l) in w.layers.iter().enumerate().skip(first_private) {
            choice.layer(&w.config, i, l)?;
        }
        choice.head(w)?;
        Ok(choice)
    }

    /// Of no layer yet.
    pub(super) fn begin(w: &Weights, private_embedding: bool) -> Result<Choice> {
        if private_embedding {
            let loss = embedding_loss(w);
            if loss.exceeded().is_some() {
                return Err(loss.refused("a private embedding has no more"));
            }
        }
        Ok(Choice { fractions: Fractions::least(0), small: Vec::new() })
    }

    fn raise(&mut self, place: &str, m: &Weighed<'_>, f: &mut u32) -> Result<()> {
        let (needed, loss) = m.fraction(place, *f)?;
        *f = needed;
        self.small.extend(loss);
        Ok(())
    }

    /// The next private layer, which is layer `index`.
    pub(super) fn layer(&mut self, c: &ModelConfig, index: usize, l: &LayerWeights) -> Result<LayerFractions> {
        let mut chosen = LayerFractions::default();
        for (slot, m) in weighed(c, index, l) {
            let f = match slot {
                Slot::Qkv => &mut chosen.qkv,
                Slot::QkGain => &mut chosen.qk_gain,
                Slot::O => &mut chosen.o,
                Slot::GateUp => &mut chosen.gate_up,
                Slot::Down => &mut chosen.down,
                Slot::Head | Slot::Embedding | Slot::AdapterA(_) | Slot::AdapterB(_) => {
                    return Err(Error::Internal(format!("{slot:?} in layer {index}")));
                }
            };
            self.raise(&of_layer(index), &m, f)?;
        }
        for group in Group::ALL {
            *chosen.adapters.place(group) = adapter_fractions(c, index, l, group)?;
        }
        self.fractions.layers.push(chosen);
        Ok(chosen)
    }

    /// The head of `w`.
    pub(super) fn head(&mut self, w: &Weights) -> Result<()> {
        let mut f = self.fractions.head;
        self.raise(HEAD, &weighed_head(w), &mut f)?;
        self.fractions.head = f;
        Ok(())
    }

    /// A misfit, and what fewer fraction bits would do where it is due to more of them.
    #[must_use]
    pub fn explain(&self, misfit: &Misfit) -> String {
        let small: Vec<String> = self.small.iter().filter(|l| l.place == misfit.place).map(Loss::to_string).collect();
        if small.is_empty() { misfit.to_string() } else { format!("{misfit}; {}; {REMEDY}", small.join("; ")) }
    }
}

const REMEDY: &str = "rescale the checkpoint (multiply this matrix, divide what it feeds or is fed by), or keep that part public with --private-layers";

impl Loss {
    /// What is beyond its limit, how much of it is lost, and the limit.
    fn exceeded(&self) -> Option<(String, f64, f64)> {
        let limit = self.limit();
        if self.all > limit {
            Some(("its weights".to_owned(), self.all, limit))
        } else if self.row > ROW * limit {
            Some((format!("its row {}", self.at), self.row, ROW * limit))
        } else {
            None
        }
    }

    fn refused(&self, why: &str) -> Error {
        Error::Model(format!(
            "{self}, too much for the right tokens, and {why}: they are very small once the norm's gain is folded in; {REMEDY}"
        ))
    }
}

impl fmt::Display for Loss {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Loss { place, matrix, f, .. } = self;
        let (what, lost, limit) = self.exceeded().unwrap_or(("its weights".to_owned(), self.all, self.limit()));
        let (lost, limit) = (100.0 * lost, 100.0 * limit);
        write!(
            out,
            "{place}: {matrix}: rounding to {f} fraction bits changes {what} by {lost:.1} % (limit {limit:.1} %)"
        )
    }
}
