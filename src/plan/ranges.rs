//! From proven bounds and calibrated ranges to a plan.
//!
//! A *bound* is proven for every input from the weights alone: after RMSNorm the input of a linear layer has Euclidean norm
//! `sqrt(n)`, so each output is bounded by its row's norm times `sqrt(n)`, and each group of outputs by the group's spectral
//! norm times `sqrt(n)`. A *range* was seen by the float twin over calibration text and is proven for nothing: wherever
//! the plan relies on one, the engine guards it.

use std::cell::RefCell;
use std::cmp::Ordering;
use std::fmt;

use serde::Serialize;

use super::layer::{AttentionPlan, F, F_EXP, F_ROPE, FW, HeadPlan, LayerPlan, MlpPlan, NormPlan, Plan};
use crate::error::{Error, Result};
use crate::model::config::ModelConfig;
use crate::protocol::gumbel;

/// Bounds of one layer that hold for every input.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LayerBounds {
    /// Largest query, key element.
    pub qk: f64,
    /// Largest element of the queries and keys before their norm (Qwen3), else as `qk`.
    pub qk_raw: f64,
    /// Largest value element.
    pub v: f64,
    /// Largest scaled score.
    pub score: f64,
    /// Largest change of the residual stream by attention.
    pub attention: f64,
    /// Largest gate element.
    pub gate: f64,
    /// Largest up element.
    pub up: f64,
    /// Largest change of the residual stream by the MLP.
    pub mlp: f64,
}

/// Bounds of a model.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Bounds {
    /// Per private layer.
    pub layers: Vec<LayerBounds>,
    /// Largest logit.
    pub logit: f64,
    /// Largest embedding element (private embedding only).
    pub embedding: f64,
}

/// What calibration saw in one layer.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerRanges {
    /// Least and largest sum of squares at the input norm.
    pub input_sum: (f64, f64),
    /// Least and largest sum of squares at the post-attention norm.
    pub post_sum: (f64, f64),
    /// Largest absolute score.
    pub score: f64,
    /// Least and largest row maximum of the scores.
    pub row_max: (f64, f64),
    /// Largest absolute gate.
    pub gate: f64,
    /// Least and largest sum of squares of a raw query or key head (Qwen3).
    pub qk_sum: Option<(f64, f64)>,
}

impl Default for LayerRanges {
    fn default() -> Self {
        let none = (f64::INFINITY, 0.0);
        LayerRanges {
            input_sum: none,
            post_sum: none,
            score: 0.0,
            row_max: (f64::INFINITY, f64::NEG_INFINITY),
            gate: 0.0,
            qk_sum: None,
        }
    }
}

/// What calibration saw.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Ranges {
    /// Per private layer.
    pub layers: Vec<LayerRanges>,
    /// Least and largest sum of squares at the final norm.
    pub final_sum: (f64, f64),
    /// Largest absolute logit.
    pub logit: f64,
}

/// How far beyond its calibrated range a sum of squares may go.
const SUM_MARGIN: f64 = 8.0;
/// How far beyond its calibrated range a score or gate may go.
const MARGIN: f64 = 2.0;
/// Highest sampling temperature that the head's ring reserves room for.
pub const MAX_TEMPERATURE: f64 = 4.0;

fn log2_ceil(x: f64) -> u32 {
    // No ring has as many; far from where sums of bits overflow.
    x.max(1e-300).log2().ceil().clamp(0.0, 1000.0) as u32
}

/// Bits of a signed ring for `|x| <= bound` with `f` fraction bits.
fn ring_for(bound: f64, f: u32) -> u32 {
    log2_ceil(bound * 1.001 + 1e-3) + f + 1
}

/// A quantity that no ring can carry.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Misfit {
    /// The layer, or the head.
    pub place: String,
    /// Which quantity.
    pub quantity: String,
    /// What it may reach.
    pub reaches: f64,
    /// What can be carried.
    pub limit: f64,
}

impl fmt::Display for Misfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: {} may reach {:.4}, beyond the {:.4} that a 64-bit ring can carry here; a weight there is far outside the usual (a corrupt or badly scaled checkpoint?)",
            self.place, self.quantity, self.reaches, self.limit
        )
    }
}

/// A layer's name and what does not fit so far.
struct Who<'a> {
    place: String,
    misfits: &'a RefCell<Vec<Misfit>>,
}

impl Who<'_> {
    fn refuse(&self, quantity: &str, reaches: f64, limit: f64) {
        let (place, quantity) = (self.place.clone(), quantity.to_string());
        self.misfits.borrow_mut().push(Misfit { place, quantity, reaches, limit });
    }

    // A number that is none fits nowhere.
    fn fits(&self, quantity: &str, reaches: f64, limit: f64) {
        if !matches!(reaches.partial_cmp(&limit), Some(Ordering::Less)) {
            self.refuse(quantity, reaches, limit);
        }
    }

    /// A norm over `n` elements of ring `ring`, `|h| <= bound` proven, squares seen in `sum`; its output must carry linear
    /// outputs up to `output` with the bit that a lift needs. Where they do not fit, precision of the gain is given up for
    /// them, down to 11 bits.
    fn norm(&self, n: usize, bound: f64, sum: (f64, f64), output: f64, ring: u32) -> NormPlan {
        let n_bits = log2_ceil(n as f64);
        // The sum of squares of ring values |h| < 2^(k-2) must stay below 2^63.
        let widest = (62 - n_bits) / 2 + 2;
        let needed = ring_for(bound, F) + 1;
        self.fits("the input of a norm (bits)", f64::from(needed), f64::from(ring) + 0.5);
        let (k, coarse) =
            if needed <= widest { (needed.max(16), None) } else { (widest, Some(ring.saturating_sub(widest))) };
        let unit = f64::from(2 * F).exp2();
        let low = (sum.0.min(sum.1) / SUM_MARGIN).max(1.0 / unit);
        let bits = sum_bits(sum);
        let dynamic = (bits as f64 - (low * unit).log2() + 11.05).max(0.0) / 2.0;
        // Two windows of w bits cover 2^(2w - 11).
        let window = (dynamic.ceil() as u32).clamp(12, 16);
        let rms_max = (f64::from(bits).exp2() / unit / n as f64).sqrt();
        // Linear outputs have F + FW fraction bits in ring 64 - f_gain; a lift takes what is below 2^(k-2).
        let room = |f_gain: u32| f64::from(64 - f_gain - F - FW - 2).exp2();
        let [least, best] = [11, 14].map(|bits| (log2_ceil(rms_max) + bits).clamp(16, 26));
        let f_gain = (least..=best).rev().find(|&f| output < room(f)).unwrap_or(least);
        self.fits("a linear output after the norm", output, room(f_gain));
        NormPlan { k, bits, window, f_gain, coarse }
    }
}

/// The plan of the private layers `first..` from bounds and ranges.
///
/// # Errors
/// [`Error::Model`] naming the layer and the quantity that no ring can carry: the first of [`propose`]'s.
pub fn plan(
    config: &ModelConfig,
    first_private: usize,
    private_embedding: bool,
    bounds: &Bounds,
    ranges: &Ranges,
) -> Result<Plan> {
    propose(config, first_private, private_embedding, bounds, ranges).map_err(|misfits| {
        let first = misfits.first().map_or_else(|| "the model does not fit".into(), Misfit::to_string);
        Error::Model(first)
    })
}

/// As [`plan`], but says all that does not fit.
///
/// # Errors
/// What no ring can carry, layer by layer; never empty.
pub fn propose(
    config: &ModelConfig,
    first_private: usize,
    private_embedding: bool,
    bounds: &Bounds,
    ranges: &Ranges,
) -> std::result::Result<Plan, Vec<Misfit>> {
    let misfits = RefCell::new(Vec::new());
    let named = |place: String| Who { place, misfits: &misfits };
    let n = config.hidden_size;
    let context = config.max_positions as f64;
    // The Client refuses to give an input beyond this; a private embedding is bounded by its table.
    let input = if private_embedding { bounds.embedding } else { INPUT_LIMIT };
    // |h| at every norm: what the guards of the norm before prove, plus the largest change since.
    let mut h = input;
    let mut at_norm = Vec::new();
    for (b, r) in bounds.layers.iter().zip(&ranges.layers) {
        at_norm.push(h);
        h = h.min(proven_by_guard(r.input_sum)) + b.attention;
        at_norm.push(h);
        h = h.min(proven_by_guard(r.post_sum)) + b.mlp;
    }
    at_norm.push(h);
    // One ring for the residual stream, with the bit that a lift needs.
    let residual_k = at_norm.iter().fold(28, |k, &h| ring_for(h, F).saturating_add(1).max(k));
    if residual_k > 40 {
        for (i, &h) in at_norm.iter().enumerate().filter(|(_, h)| ring_for(**h, F) >= 40) {
            let who = named(format!("layer {}", first_private + i.saturating_sub(1) / 2));
            who.refuse("the residual stream", h, 2f64.powi(26));
        }
    }
    // What follows is looked at for what else does not fit, too.
    let residual_k = residual_k.min(40);
    let mut layers: Vec<LayerPlan> = Vec::new();
    for (i, (b, r)) in bounds.layers.iter().zip(&ranges.layers).enumerate() {
        let who = named(format!("layer {}", first_private + i));
        // A query is rotated before it is lifted: F_ROPE more fraction bits, and a factor of sqrt 2. With norms of their
        // own, queries and keys are rotated behind those.
        let rotated = b.qk * f64::from(F_ROPE).exp2() * std::f64::consts::SQRT_2;
        let output = if r.qk_sum.is_some() { b.qk_raw } else { rotated }.max(b.v);
        let input_norm = who.norm(n, at_norm[2 * i], r.input_sum, output, residual_k);
        let attention = attention(&who, config, b, r, (context, residual_k, input_norm.f_gain));
        let post_norm = who.norm(n, at_norm[2 * i + 1], r.post_sum, b.gate.max(b.up), residual_k);
        let mlp = mlp(&who, b, r, residual_k);
        layers.push(LayerPlan { input_norm, attention, post_norm, mlp });
    }
    let who = named("the head".into());
    let largest = bounds.logit + MAX_TEMPERATURE * gumbel::CLIP;
    let norm = who.norm(n, h, ranges.final_sum, largest, residual_k);
    // One bit for the lift into the tournament's ring, which takes at most 23.
    let whole = ring_for(largest, 0) + 1;
    let f_logit = F.min(23u32.saturating_sub(whole));
    if f_logit < 4 {
        who.refuse("a logit", largest, 2f64.powi(17));
    }
    let radix = if config.vocab_size > 16_384 { 8 } else { 4 };
    let head = HeadPlan { norm, public: false, logit_k: whole + f_logit, f_logit, radix };
    let misfits = misfits.into_inner();
    if !misfits.is_empty() {
        return Err(misfits);
    }
    Ok(Plan { first_private, private_embedding, residual_k, max_positions: config.max_positions, layers, head })
}

/// The largest hidden state that the Client may give; it refuses a larger one by name.
pub const INPUT_LIMIT: f64 = 16_000.0;

/// Bits that a norm's guard allows the sum of squares (`2F` fraction bits).
fn sum_bits(sum: (f64, f64)) -> u32 {
    log2_ceil(sum.1 * SUM_MARGIN * f64::from(2 * F).exp2()).clamp(24, 62)
}

/// What that guard proves of each element once the flags are down.
fn proven_by_guard(sum: (f64, f64)) -> f64 {
    (f64::from(sum_bits(sum)) / 2.0 - f64::from(F)).exp2()
}

fn attention(
    who: &Who<'_>,
    config: &ModelConfig,
    b: &LayerBounds,
    r: &LayerRanges,
    (context, residual_k, f_gain): (f64, u32, u32),
) -> AttentionPlan {
    let score_proven = ring_for(b.score + 1.0, F).max(17);
    let qk_norm = match r.qk_sum {
        None => None,
        Some(sum) => {
            let mut norm = who.norm(config.head_dim, b.qk_raw, sum, b.qk, 64 - f_gain - FW);
            // Gain, rotation and the step to the scores' fraction drop 22 bits; where the rest is as wide as the scores'
            // product, queries and keys need no lift. 14 bits hold 1 / rms as long as rms is not large.
            let wide_enough = 64u32.saturating_sub(score_proven + 8 + 22);
            norm.f_gain = norm.f_gain.min(wide_enough).max(norm.f_gain.min(14));
            Some(norm)
        }
    };
    // After the rotation queries and keys have F + FW + F_ROPE fraction bits and sqrt 2 more, and then a lift to come.
    let f_before = qk_norm.as_ref().map_or(f_gain, |n| n.f_gain);
    let limit = f64::from(62 - f_before - F - FW - F_ROPE).exp2() / std::f64::consts::SQRT_2;
    who.fits("a query or key", b.qk, limit);
    let mut score_k = ring_for(r.score * MARGIN + 4.0, F).clamp(17, 24).min(score_proven);
    // Thresholds around the calibrated row maxima, a step of 1, or 2 where the range is wide.
    let spread = (r.row_max.1 - r.row_max.0).max(0.0);
    let slack = 4.0 + spread / 2.0;
    let (from, to) = ((r.row_max.0 - slack).max(-b.score - 2.0), (r.row_max.1 + slack).min(b.score + 2.0));
    let step_log = u32::from(to - from > 40.0) + u32::from(to - from > 100.0) + u32::from(to - from > 200.0);
    let step = f64::from(step_log).exp2();
    let base = ((from / step).floor() as i64).saturating_sub(1);
    let steps = ((to / step).ceil() as i64).saturating_sub(base).saturating_add(1).clamp(2, 62) as usize;
    let top = (base as f64 + steps as f64) * step;
    // x = s - m runs from -R / 2 - top to 2 steps: it must fit the cyclic window of range R but for its two end rows, or
    // the smallest probabilities would alias to the largest.
    let digits = |k: u32| {
        let low = if k >= 21 { 5 } else { 4 };
        (low, (k - low) / 2)
    };
    let end_rows = |k: u32| 2.0 * f64::from(digits(k).0 + digits(k).1).exp2() / f64::from(F).exp2();
    while score_k <= 26 && f64::from(score_k - F).exp2() / 2.0 < top.max(0.0) + 2.0 * step + end_rows(score_k) {
        score_k += 1;
    }
    if score_k > 26 {
        who.refuse("a score", b.score.min(r.score * MARGIN), 4096.0);
    }
    let (exp_low, exp_lo_bits) = digits(score_k);
    let mass = context * (2.0 * step).exp();
    let f_prob = 14;
    let prob_k = log2_ceil(mass * (b.v + 1.0)) + f_prob + F + 3;
    who.fits("a weighted sum of values (bits)", f64::from(prob_k), f64::from(64 - F_EXP + f_prob) + 0.5);
    let total_bits = log2_ceil(mass) + f_prob + 1;
    // A row's sum is at least 1, which must be a good row of the second window.
    let total_window = ((total_bits - f_prob + 12).div_ceil(2)).clamp(10, 16);
    let f_inverse = (52 - residual_k).min(26);
    AttentionPlan {
        qk_norm,
        score_proven: score_proven.max(score_k),
        score_k,
        step_bits: F + step_log,
        base,
        steps,
        exp_low,
        exp_lo_bits,
        f_prob,
        prob_k,
        total_bits,
        total_window,
        f_inverse,
    }
}

fn mlp(who: &Who<'_>, b: &LayerBounds, r: &LayerRanges, residual_k: u32) -> MlpPlan {
    // The lowest row of the window belongs to the carry: the bound stays above it.
    let gate_proven = ring_for(b.gate * 1.05, F).max(16);
    let gate_k = ring_for(r.gate * MARGIN + 2.0, F).clamp(16, 21).min(gate_proven);
    // Rows an eighth wide where that takes at most 2^11 of them: the error of a line grows with the square.
    let gate_lo_bits = if gate_k <= 20 { 9 } else { gate_k - 11 };
    // Both the product (in ring 64) and the down projection's output (12 bits less after its truncation) must fit.
    let product = ring_for(b.gate * b.up, F);
    let f_table = (64u32.saturating_sub(product)).min(52 - residual_k).min(20);
    if f_table < 10 {
        who.refuse("gate times up", b.gate * b.up, f64::from(64 - 10 - F).exp2());
    }
    MlpPlan { gate_proven, gate_k, gate_lo_bits, f_table }
}
