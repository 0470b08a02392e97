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

use super::adapter::{AdapterBounds, AdapterPlan, Group, Grouped};
use super::block;
use super::gate::{f_table, gate_window, mlp, table_error};
use super::layer::{
    Alone, F, F_ROPE, FW_LEAST, GAIN_LEAST, GAIN_MOST, HeadPlan, LayerFractions, LayerPlan, NormPlan, Plan, ROTATION,
    f_inverse, least_gain, least_unlifted, log2_ceil, most_gain, softmax_mass, unlifted, widest_square,
};
use super::network::{Radices, Setting};
use super::softmax::{PositiveParts, Steps, attention, normalised};
use crate::error::{Error, Result};
use crate::model::config::{LayerShape, ModelConfig, Softmax};
use crate::protocol::gumbel;

/// Bounds of one layer that hold for every input.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LayerBounds {
    /// The fraction bits of the weights that the bounds are of.
    pub f: LayerFractions,
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
    /// Largest change of the residual stream by the MLP, its activation exact.
    pub mlp: f64,
    /// How far it moves for each unit that the activation may be off.
    pub mlp_slope: f64,
    /// Of the adapters; what they add to an output is in the other bounds.
    pub adapters: Grouped<AdapterBounds>,
}

impl LayerBounds {
    /// What the middle values of a group's adapters take, as if they were outputs of weights of `f` fraction bits; 0 without.
    fn middle(&self, group: Group, f: u32) -> f64 {
        self.adapters.get(group).map_or(0.0, |a| a.middle * (f64::from(a.f.a) - f64::from(f)).exp2())
    }

    fn adapter_plans(&self) -> Grouped<AdapterPlan> {
        let mut plans = Grouped::default();
        self.adapters.iter().for_each(|(group, b)| *plans.place(group) = Some(b.into()));
        plans
    }
}

/// Bounds of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Bounds {
    /// Per private layer.
    pub layers: Vec<LayerBounds>,
    /// The fraction bits of the head's weights, which the largest logit is of.
    pub f_head: u32,
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

/// Most row bits of a norm's only window: its table grows with the range, that of two windows with the range's root.
pub(super) const WIDEST_ALONE: u32 = 14;
/// How far beyond its calibrated range a sum of squares may go.
const SUM_MARGIN: f64 = 8.0;
/// How far beyond its calibrated range a score or gate may go.
pub(super) const MARGIN: f64 = 2.0;
/// Highest sampling temperature that the head's ring reserves room for.
pub const MAX_TEMPERATURE: f64 = 4.0;

/// Bits of a signed ring for `|x| <= bound` with `f` fraction bits.
pub(super) fn ring_for(bound: f64, f: u32) -> u32 {
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

/// What a norm's output is multiplied by.
pub(super) struct Linear {
    /// Fraction bits of the weights.
    pub(super) f: u32,
    /// Largest output.
    pub(super) output: f64,
}

/// What a misfit calls a quantity for which weights of `f` fraction bits leave no room.
pub(super) fn needing(quantity: &str, f: u32) -> String {
    match f {
        FW_LEAST => quantity.into(),
        _ => format!("{quantity}, by weights so small that they need {f} fraction bits,"),
    }
}

/// A layer's name and what does not fit so far.
pub(super) struct Who<'a> {
    place: String,
    misfits: &'a RefCell<Vec<Misfit>>,
}

impl Who<'_> {
    pub(super) fn refuse(&self, quantity: &str, reaches: f64, limit: f64) {
        let (place, quantity) = (self.place.clone(), quantity.to_string());
        self.misfits.borrow_mut().push(Misfit { place, quantity, reaches, limit });
    }

    /// What `make` gives, and what it refuses, to be reported when its turn comes.
    pub(super) fn held<T>(&self, make: impl FnOnce(&Who<'_>) -> T) -> (T, Vec<Misfit>) {
        let misfits = RefCell::new(Vec::new());
        let made = make(&Who { place: self.place.clone(), misfits: &misfits });
        (made, misfits.into_inner())
    }

    pub(super) fn report(&self, misfits: Vec<Misfit>) {
        self.misfits.borrow_mut().extend(misfits);
    }

    // A number that is none fits nowhere.
    pub(super) fn fits(&self, quantity: &str, reaches: f64, limit: f64) {
        if !matches!(reaches.partial_cmp(&limit), Some(Ordering::Less)) {
            self.refuse(quantity, reaches, limit);
        }
    }

    /// A norm over `n` elements of ring `ring`, `|h| <= bound` proven, squares seen in `sum`; its output must carry the outputs
    /// of the linear map behind it with the bit that a lift needs. Where they do not fit, precision of the gain is given up
    /// for them, down to 13 bits.
    pub(super) fn norm(&self, n: usize, bound: f64, sum: (f64, f64), behind: &Linear, ring: u32) -> NormPlan {
        let widest = widest_square(n);
        let needed = ring_for(bound, F) + 1;
        self.fits("the input of a norm (bits)", f64::from(needed), f64::from(ring) + 0.5);
        let (k, coarse) =
            if needed <= widest { (needed.max(16), None) } else { (widest, Some(ring.saturating_sub(widest))) };
        let unit = f64::from(2 * F).exp2();
        let low = (sum.0.min(sum.1) / SUM_MARGIN).max(1.0 / unit);
        let bits = sum_bits(sum);
        let dynamic = bits as f64 - (low * unit).log2();
        // One window of w bits covers 2^(w - 5), two of them 2^(2w - 11).
        let alone = (dynamic + 5.05).max(0.0).ceil() as u32;
        let (windows, window) = if alone <= WIDEST_ALONE {
            (1, alone.max(12))
        } else {
            (2, (((dynamic + 11.05) / 2.0).ceil() as u32).clamp(12, 16))
        };
        // Linear outputs have F and the weights' fraction bits in ring 64 - f_gain; a lift takes what is below 2^(k-2).
        let room = |f_gain: u32| (62.0 - f64::from(f_gain + F + behind.f)).exp2();
        let lowest = least_gain(n, bits);
        self.fits("the sum of squares of a norm (bits of its root)", f64::from(lowest), f64::from(GAIN_MOST) + 0.5);
        // The more bits the gain has, the narrower is the ring of the products behind it: fewer run-ahead bytes, and fewer digits to
        // multiply. The lifts behind them take more, online: five bytes are narrow enough.
        let least = lowest.clamp(GAIN_LEAST, GAIN_MOST);
        // As much above the bound as the widths that follow from it are rounded up for.
        let output = behind.output * 1.002 + 0.01;
        let f_gain = (least..=most_gain(least)).rev().find(|&f| output < room(f)).unwrap_or(least);
        self.fits(&needing("a linear output after the norm", behind.f), output, room(f_gain));
        let few = (windows == 2 && alone <= Alone::WIDEST).then_some(Alone { window: alone, most: 0 });
        NormPlan { k, bits, window, windows, f_gain, coarse, alone: few, joint: 0 }
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
    propose(config, first_private, private_embedding, bounds, ranges).map_err(|m| refused(&m, Misfit::to_string))
}

/// The refusal of a model by the first that does not fit, as `text` says it.
#[must_use]
pub fn refused(misfits: &[Misfit], text: impl Fn(&Misfit) -> String) -> Error {
    Error::Model(misfits.first().map_or_else(|| "the model does not fit".into(), text))
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
    let context = config.max_positions;
    // The Client refuses to give an input beyond this; a private embedding is bounded by its table.
    let input = if private_embedding { bounds.embedding } else { INPUT_LIMIT };
    // One ring for the residual stream, with the bit that a lift needs. The wider it is, the less precise are a softmax's
    // reciprocal and the activation, and so the further it may move.
    let mut residual_k = 28;
    let shapes: Vec<LayerShape> = (0..bounds.layers.len()).map(|i| config.layer(first_private + i)).collect();
    let at_norm = loop {
        let at_norm = residual(&shapes, bounds, ranges, input, context, residual_k);
        let needed = at_norm.iter().fold(residual_k, |k, &h| ring_for(h, F).saturating_add(1).max(k));
        if needed > 40 {
            for (i, &h) in at_norm.iter().enumerate().filter(|(_, h)| ring_for(**h, F) >= 40) {
                let who = named(format!("layer {}", first_private + i.saturating_sub(1) / 2));
                who.refuse("the residual stream", h, 2f64.powi(26));
            }
            // What follows is looked at for what else does not fit, too.
            residual_k = 40;
            break at_norm;
        }
        if needed == residual_k {
            break at_norm;
        }
        residual_k = needed;
    };
    let mut layers: Vec<LayerPlan> = Vec::new();
    for (i, (b, r)) in bounds.layers.iter().zip(&ranges.layers).enumerate() {
        let shape = shapes[i];
        let who = named(format!("layer {}", first_private + i));
        // A query is rotated before it is lifted: F_ROPE more fraction bits, and a factor of sqrt 2. With norms of their
        // own, queries and keys are rotated behind those.
        let rotated = if config.encoder() { b.qk } else { b.qk * rotation() };
        let qkv = if r.qk_sum.is_some() { b.qk_raw } else { rotated }.max(b.v).max(b.middle(Group::Qkv, b.f.qkv));
        let qkv = Linear { f: b.f.qkv, output: qkv };
        let mut input_norm = who.norm(n, at_norm[2 * i], r.input_sum, &qkv, residual_k);
        let attention = attention(&who, (config, shape), b, r, (context, residual_k, input_norm.f_gain));
        if attention.qk_norm.is_none() {
            let wide_enough = unlifted(attention.score_proven, b.f.qkv, config.encoder());
            if wide_enough >= least_unlifted(n, input_norm.bits) {
                input_norm.f_gain = input_norm.f_gain.min(wide_enough);
            }
        }
        let gate_up = Linear { f: b.f.gate_up, output: b.gate.max(b.up).max(b.middle(Group::GateUp, b.f.gate_up)) };
        let post_norm = who.norm(n, at_norm[2 * i + 1], r.post_sum, &gate_up, residual_k);
        let mlp = mlp(&who, shape, b, r, residual_k);
        layers.push(LayerPlan { input_norm, attention, post_norm, mlp, adapters: b.adapter_plans() });
    }
    let who = named("the head".into());
    let largest = bounds.logit + MAX_TEMPERATURE * gumbel::CLIP;
    let last = at_norm.last().copied().unwrap_or(input);
    let norm = who.norm(n, last, ranges.final_sum, &Linear { f: bounds.f_head, output: largest }, residual_k);
    // One bit for the lift into the tournament's ring, which takes at most 23.
    let whole = ring_for(largest, 0) + 1;
    let f_logit = F.min(23u32.saturating_sub(whole));
    if f_logit < 4 {
        who.refuse("a logit", largest, 2f64.powi(17));
    }
    // Adapters are over a base that everybody has.
    let public_base = bounds.layers.iter().any(|b| !b.adapters.is_empty());
    let logit_k = whole + f_logit;
    let head =
        HeadPlan { norm, public: public_base, f_weight: bounds.f_head, logit_k, f_logit, radix: Radices::same(2) };
    let misfits = misfits.into_inner();
    if !misfits.is_empty() {
        return Err(misfits);
    }
    let max_positions = config.max_positions;
    let (block_scores, pieces) = (block::MOST_SCORES, 1);
    let plan = Plan {
        first_private,
        private_embedding,
        residual_k,
        max_positions,
        public_base,
        block_scores,
        pieces,
        layers,
        head,
    };
    Ok(plan.at(config, Setting::default()))
}

/// How much larger the rotation makes the ring's value of a query or key: [`F_ROPE`] fraction bits more, and at worst both of a pair in one.
pub(super) fn rotation() -> f64 {
    f64::from(F_ROPE).exp2() * std::f64::consts::SQRT_2 * ROTATION
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

/// |h| at every norm: what the guards of the norm before prove, plus the largest change since.
fn residual(
    shapes: &[LayerShape],
    bounds: &Bounds,
    ranges: &Ranges,
    input: f64,
    context: usize,
    residual_k: u32,
) -> Vec<f64> {
    let mut h = input;
    let mut at_norm = Vec::new();
    for (shape, (b, r)) in shapes.iter().zip(bounds.layers.iter().zip(&ranges.layers)) {
        at_norm.push(h);
        let mass = match shape.softmax {
            Softmax::Exact => softmax_mass(context, Steps::new(b, r).log),
            Softmax::TwoRelu => PositiveParts::new(r, context).mass(),
        };
        h = h.min(proven_by_guard(r.input_sum)) + b.attention * normalised(mass, f_inverse(residual_k, b.f.o));
        at_norm.push(h);
        let f_table = f_table(*shape, b, r, residual_k).unwrap_or(10);
        let error = table_error(*shape, gate_window(shape.activation, b, r).1, f_table);
        h = h.min(proven_by_guard(r.post_sum)) + b.mlp + b.mlp_slope * error;
    }
    at_norm.push(h);
    at_norm
}
