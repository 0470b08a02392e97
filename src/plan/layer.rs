//! The public fixed-point plan of a model: every ring width, table position and guard, from a short menu.

use serde::{Deserialize, Serialize};

use super::adapter::{AdapterFractions, AdapterPlan, Group, Grouped};
use super::block;
use super::network::{MOST_PIECES, MOST_VALUES, Radices, Setting, most_alone, most_joint, pieces};
use super::ranges::WIDEST_ALONE;
use crate::model::{Activation, LayerShape, ModelConfig, Softmax};

/// Fraction bits of activations between operations.
pub const F: u32 = 12;
/// Fewest fraction bits of a matrix; one of small weights has more.
pub const FW_LEAST: u32 = 12;
/// Most: beside the activations' fraction, the most bits of a norm's gain and the bits that rotation and lift need, they
/// leave a ring. An `f32` has no more digits than that below 1.
pub const FW_MOST: u32 = 24;
/// Fraction bits of queries and keys in the scores' product.
pub(crate) const F_QK: u32 = 10;
/// Fraction bits of the rotation's sines and cosines.
pub const F_ROPE: u32 = 8;
/// The rotation's sines and cosines have 8 fraction bits: each is off by at most 2^-9, the length of a rotated pair by a factor
/// of at most `1 + sqrt(2) 2^-9`.
pub(crate) const ROTATION: f64 = 1.003;

/// Fraction bits of the exponential's rows.
pub const F_EXP_HI: u32 = 16;
/// Fraction bits of the Owner's factor of an exponential.
pub const F_EXP_LO: u32 = 11;
/// Of their product.
pub const F_EXP: u32 = F_EXP_HI + F_EXP_LO;

/// Fraction bits of one layer's matrices, each [`FW_LEAST`] to [`FW_MOST`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerFractions {
    /// Of queries, keys and values.
    pub qkv: u32,
    /// Of the gains of the queries' and keys' own norm, where there is one.
    pub qk_gain: u32,
    /// Of the output projection.
    pub o: u32,
    /// Of gate and up.
    pub gate_up: u32,
    /// Of down.
    pub down: u32,
    /// Of the adapters.
    pub adapters: Grouped<AdapterFractions>,
}

impl Default for LayerFractions {
    fn default() -> Self {
        let f = FW_LEAST;
        LayerFractions { qkv: f, qk_gain: f, o: f, gate_up: f, down: f, adapters: Grouped::default() }
    }
}

/// Fraction bits of all private matrices but the embedding, which has [`F`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fractions {
    /// Per private layer.
    pub layers: Vec<LayerFractions>,
    /// Of the head.
    pub head: u32,
}

impl Fractions {
    /// The fewest, of `layers` private layers.
    #[must_use]
    pub fn least(layers: usize) -> Self {
        Fractions { layers: vec![LayerFractions::default(); layers], head: FW_LEAST }
    }
}

/// One RMSNorm: from the residual stream to the normalised value in ring `64 - f_gain`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NormPlan {
    /// Ring of the value whose squares are summed; `|h| < 2^(k-2)` is proven or guarded.
    pub k: u32,
    /// The sum of squares (ring units, `2F` fraction bits) is below `2^bits`, guarded.
    pub bits: u32,
    /// Row bits of the reciprocal square root's windows.
    pub window: u32,
    /// One window is fine enough for the whole range, or a second one serves the smallest values (2 messages more).
    pub windows: u32,
    /// Fraction bits of `1 / rms`.
    pub f_gain: u32,
    /// Bits dropped before the coarse square sum that proves `|h|`, where weights do not prove it.
    pub coarse: Option<u32>,
    /// One window in the place of two for few values.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alone: Option<Alone>,
    /// Values of a pass up to which a single window and the scaling behind it are one exchange; none for 0.
    #[serde(default, skip_serializing_if = "none")]
    pub joint: usize,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "as serde calls it")]
fn none(values: &usize) -> bool {
    *values == 0
}

/// A window that covers a range by itself for which two are otherwise taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Alone {
    /// Its row bits.
    pub window: u32,
    /// Values of a pass up to which it is taken; none for 0.
    pub most: usize,
}

impl Alone {
    /// Most row bits: beyond, its table is a burden whatever the network.
    pub(crate) const WIDEST: u32 = 17;
}

/// Attention of one layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AttentionPlan {
    /// Fraction bits of the matrix of queries, keys and values.
    pub f_qkv: u32,
    /// Per-head norm of queries and keys (Qwen3).
    pub qk_norm: Option<NormPlan>,
    /// Fraction bits of that norm's gains.
    pub f_qk_gain: Option<u32>,
    /// Ring in which scores are proven to fit before they are narrowed.
    pub score_proven: u32,
    /// Ring of the scores (F fraction bits); guarded if narrower than `score_proven`.
    pub score_k: u32,
    /// The exponential and its reference; none where positive parts are taken in their place (2ReLU).
    pub exp: Option<ExpPlan>,
    /// Fraction bits of the probabilities before normalisation. Those of the scores whose positive parts they are, if so.
    pub f_prob: u32,
    /// Ring of the probabilities and of the cached values.
    pub prob_k: u32,
    /// Bits of the sum of probabilities.
    pub total_bits: u32,
    /// Row bits of the reciprocal's windows.
    pub total_window: u32,
    /// Fraction bits of the reciprocal; the context's ring is `64 - f_inverse`.
    pub f_inverse: u32,
    /// Fraction bits of the output projection.
    pub f_o: u32,
}

/// The exponential of scores less a reference near their largest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExpPlan {
    /// Thermometer: step, lowest threshold, number of steps.
    pub step_bits: u32,
    /// Lowest threshold in steps.
    pub base: i64,
    /// Number of steps.
    pub steps: usize,
    /// Bits of the low digit of the exponential's window.
    pub exp_lo_bits: u32,
}

/// MLP of one layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MlpPlan {
    /// Fraction bits of the matrix of gate and up.
    pub f_gate_up: u32,
    /// Ring in which the gate is proven to fit.
    pub gate_proven: u32,
    /// Ring of the gate's window; guarded if narrower.
    pub gate_k: u32,
    /// Bits of the window's low digit.
    pub gate_lo_bits: u32,
    /// Fraction bits of the activation's table; the product's ring is `64 - f_table`.
    pub f_table: u32,
    /// Fraction bits of the down projection.
    pub f_down: u32,
}

/// One layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerPlan {
    /// Before attention.
    pub input_norm: NormPlan,
    /// Attention.
    pub attention: AttentionPlan,
    /// Before the MLP.
    pub post_norm: NormPlan,
    /// MLP.
    pub mlp: MlpPlan,
    /// Low-rank adapters beside its projections.
    #[serde(default, skip_serializing_if = "Grouped::is_empty")]
    pub adapters: Grouped<AdapterPlan>,
}

/// Final norm, head and choice of the token.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HeadPlan {
    /// Final norm.
    pub norm: NormPlan,
    /// Final norm and head are those of the public base, bit for bit: a public linear map.
    pub public: bool,
    /// Fraction bits of the head's matrix.
    pub f_weight: u32,
    /// Ring of the logits that are compared, noise of the highest temperature included.
    pub logit_k: u32,
    /// Their fraction bits.
    pub f_logit: u32,
    /// Radices of the tournament.
    pub radix: Radices,
}

/// The plan of a model's private part.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// First private layer; below it the Client computes in plaintext.
    pub first_private: usize,
    /// The embedding is private too.
    pub private_embedding: bool,
    /// Ring of the residual stream.
    pub residual_k: u32,
    /// Largest number of positions.
    pub max_positions: usize,
    /// All weights but those of the adapters are a public base's: public linear maps, embedding and head too.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub public_base: bool,
    /// Scores that attention computes at once: see [`block`].
    #[serde(default = "block::most_scores", skip_serializing_if = "block::is_most")]
    pub block_scores: usize,
    /// Pieces in which a prompt's rows follow each other through the largest exchanges, at most.
    #[serde(default = "one_piece", skip_serializing_if = "is_one_piece")]
    pub pieces: usize,
    /// One plan per private layer.
    pub layers: Vec<LayerPlan>,
    /// The head.
    pub head: HeadPlan,
}

fn one_piece() -> usize {
    1
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "as serde calls it")]
fn is_one_piece(pieces: &usize) -> bool {
    *pieces == 1
}

/// What is wrong with a received plan.
pub(super) type Fault = &'static str;

/// Fraction bits of the probabilities before normalisation.
pub(super) const F_PROB: u32 = 14;
/// Widest scores: their product has 8 bits more, and a lift to come.
pub(super) const SCORE_PROVEN: u32 = 54;

/// Ring of the scores' product: `2 F_QK` fraction bits, truncated to `F`.
pub(crate) fn product_ring(score_proven: u32) -> u32 {
    score_proven.saturating_add(2 * F_QK - F)
}

/// Bits that queries and keys lose from the norm's output on, behind a matrix of `f_weight` fraction bits and the rotation, which an encoder lacks.
fn turned_bits(f_weight: u32, encoder: bool) -> u32 {
    f_weight.saturating_add(F - F_QK + if encoder { 0 } else { F_ROPE })
}

/// Rounded up; 0 below 1.
pub(super) fn log2_ceil(x: f64) -> u32 {
    x.max(1e-300).log2().ceil().max(0.0) as u32
}

/// The widest ring in which the sum of `n` squares of values below `2^(k-2)` stays below `2^63`.
pub(super) fn widest_square(n: usize) -> u32 {
    62u32.saturating_sub(log2_ceil(n as f64)) / 2 + 2
}

/// Bits left to `1/rms` on which every bound of a norm's output rests, and those that it has as a rule.
const GAIN_PROVEN: u32 = 10;
const GAIN_USUAL: u32 = 13;

/// Fraction bits that leave [`GAIN_USUAL`] to `1/rms` of `n` elements when their sum of squares is below `2^bits`.
pub(super) fn least_gain(n: usize, bits: u32) -> u32 {
    log2_ceil((f64::from(bits).exp2() / f64::from(2 * F).exp2() / n as f64).sqrt()) + GAIN_USUAL
}

/// Those that leave [`GAIN_PROVEN`]: where queries and keys need no lift for it.
pub(super) fn least_unlifted(n: usize, bits: u32) -> u32 {
    least_gain(n, bits) - (GAIN_USUAL - GAIN_PROVEN)
}

/// Most fraction bits of `1/rms` with which queries and keys need no lift: what is left of them, behind a matrix (or gains) of `f_weight`
/// fraction bits, the rotation and the step to the scores' fraction, is as wide as the scores' product.
pub(crate) fn unlifted(score_proven: u32, f_weight: u32, encoder: bool) -> u32 {
    64u32.saturating_sub(product_ring(score_proven).saturating_add(turned_bits(f_weight, encoder)))
}

/// Fewest and most fraction bits of a norm's `1/rms`.
pub(super) const GAIN_LEAST: u32 = 16;
pub(super) const GAIN_MOST: u32 = 26;
/// Fewest of the norm of queries and keys, which leaves as much as it can to their rotation.
pub(super) const QK_GAIN_LEAST: u32 = 14;

/// What it has where all that is behind it leaves room and it needs not more than `least`.
pub(super) fn most_gain(least: u32) -> u32 {
    24.max(least + 1).min(GAIN_MOST)
}

/// Bits of the low digit of the exponential's window: rows one wide where that takes at most 2^7 of them, never wider than four.
pub(super) fn exp_lo_bits(score_k: u32) -> u32 {
    score_k.saturating_sub(7).clamp(F, F + 2)
}

/// What the thermometer's highest threshold `top` needs of half the scores' ring: two steps above it, and the exponential's two
/// end rows, or the smallest probabilities would alias to the largest.
pub(super) fn score_room(score_k: u32, top: f64, step: f64) -> f64 {
    top.max(0.0) + 2.0 * step + 2.0 * f64::from(exp_lo_bits(score_k)).exp2() / f64::from(F).exp2()
}

/// The largest sum of a row's exponentials: every position two steps above the reference.
pub(super) fn softmax_mass(max_positions: usize, step_log: u32) -> f64 {
    max_positions as f64 * (2.0 * f64::from(step_log).exp2()).exp()
}

/// Row bits of the reciprocal's windows: a row's sum is at least `2^least` units, which must be a good row of the second window.
pub(super) fn total_window(total_bits: u32, least: u32) -> u32 {
    (total_bits.saturating_sub(least) + 12).div_ceil(2).clamp(10, 16)
}

/// Bits of the rings in which the signs of scores are taken, for a 2ReLU softmax.
pub(super) const RELU_RINGS: [u32; 2] = [16, 20];
/// Most bits that are dropped of scores for it: 8 fraction bits are left.
pub(super) const RELU_DROPPED: u32 = 4;
/// `TWO_RELU_EPS` is `2^-2`: fraction bits less this are those of the least sum.
pub(super) const RELU_LEAST: u32 = 2;
/// Most bits between the least and the largest sum of positive parts: the least is at row 16 of the second window at least.
pub(super) const RELU_RANGE: u32 = 22;

/// Bits of the sum of positive parts of scores in a ring of `ring` bits, with a spare one.
pub(super) fn relu_total(max_positions: usize, ring: u32) -> u32 {
    (usize::BITS - max_positions.saturating_sub(1).leading_zeros()) + ring
}

/// Fraction bits of a softmax's reciprocal: the context's ring is what they leave, and the residual stream's has to fit in it
/// after the output projection, of `f_o` fraction bits.
pub(super) fn f_inverse(residual_k: u32, f_o: u32) -> u32 {
    64u32.saturating_sub(f_o + residual_k).min(26)
}

/// Fewest that more than [`FW_LEAST`] bits of the output projection may leave. A row's sum is below `2^mass_bits`, and an eighth of
/// that where all positions are alike: there the reciprocal is rounded by at most 0.4 %. A sum of positive parts has no usual size:
/// its largest leaves a bit, and what is met, which has the margin of the scores and the mean of a row below it, more.
pub(super) fn least_inverse(softmax: Softmax, mass_bits: u32, f_o: u32) -> u32 {
    match softmax {
        Softmax::TwoRelu => mass_bits + 1,
        Softmax::Exact if f_o > FW_LEAST => mass_bits + 4,
        Softmax::Exact => 12,
    }
}

/// Most fraction bits of the activation's table.
pub(super) const TABLE_MOST: u32 = 24;

/// Fewest fraction bits of the activation's table that more than [`FW_LEAST`] bits of the down projection may leave: the rounding
/// of a line's slope is not further off than the line.
pub(super) fn least_table(gate_lo_bits: u32, f_down: u32) -> u32 {
    if f_down > FW_LEAST { gate_lo_bits + 7 } else { 10 }
}

/// Bits of the low digit of the gate's window: rows an eighth wide where that takes at most 2^11 of them, since the error of a
/// line grows with the square; of a ReLU, whose one row around zero errs with its width, half that.
pub(super) fn gate_lo_bits(activation: Activation, gate_k: u32) -> u32 {
    let wide = if gate_k <= 20 { 9 } else { gate_k - 11 };
    wide - u32::from(activation == Activation::Relu)
}

/// Signed: no difference of two widths wraps.
pub(super) fn within(v: impl Into<i64>, low: impl Into<i64>, high: impl Into<i64>, what: Fault) -> Result<(), Fault> {
    let v = v.into();
    if v >= low.into() && v <= high.into() { Ok(()) } else { Err(what) }
}

fn weights(f: u32, what: Fault) -> Result<(), Fault> {
    within(f, FW_LEAST, FW_MOST, what)
}

fn equal<T: PartialEq>(a: T, b: T, what: Fault) -> Result<(), Fault> {
    if a == b { Ok(()) } else { Err(what) }
}

impl NormPlan {
    /// Of `n` elements in a ring of `ring` bits; with `usual` fraction bits at least, or fewer where they are at most `spared`, with which queries and
    /// keys need no lift.
    fn check(&self, n: usize, ring: i64, (usual, spared): (u32, Option<u32>)) -> Result<(), Fault> {
        let widest = i64::from(widest_square(n));
        within(self.k, 16, widest.min(ring), "a norm's ring")?;
        within(self.bits, 24, 62, "a norm's sum of squares")?;
        within(self.window, 12, 16, "a norm's window")?;
        within(self.windows, 1, 2, "a norm's windows")?;
        if let Some(alone) = &self.alone {
            within(alone.window, WIDEST_ALONE + 1, Alone::WIDEST, "a norm's window for few values")?;
            within(self.windows, 2, 2, "a norm's windows")?;
            if alone.most > MOST_VALUES {
                return Err("a norm's window for few values");
            }
        }
        if self.joint > MOST_VALUES || (self.joint > 0 && self.windows == 2 && self.alone.is_none()) {
            return Err("a norm's joint step");
        }
        let least = least_gain(n, self.bits);
        let fewest = match spared {
            Some(most) if self.f_gain <= most => least_unlifted(n, self.bits),
            _ => least.max(usual),
        };
        within(self.f_gain, fewest, most_gain(least), "a norm's gain")?;
        match self.coarse {
            Some(t) => {
                equal(i64::from(self.k), widest, "a norm's ring")?;
                within(t, ring - widest, ring - widest, "a norm's coarse sum")?;
                within(t, 1, widest - 4, "a norm's coarse sum")
            }
            None => Ok(()),
        }
    }
}

impl AttentionPlan {
    fn check(&self, c: &ModelConfig, shape: LayerShape, plan: &Plan, f_gain: u32) -> Result<(), Fault> {
        weights(self.f_qkv, "the fraction of q, k and v")?;
        self.f_qk_gain.iter().try_for_each(|&f| weights(f, "the fraction of the queries' and keys' gains"))?;
        weights(self.f_o, "the output projection's fraction")?;
        within(self.score_k, 16, 26, "the scores' ring")?;
        within(self.score_proven, self.score_k, SCORE_PROVEN, "the scores' proven ring")?;
        equal(self.exp.is_some(), shape.softmax == Softmax::Exact, "the kind of softmax")?;
        match &self.exp {
            Some(exp) => self.check_exp(exp, plan.max_positions)?,
            None => self.check_relu(plan.max_positions)?,
        }
        equal(self.f_inverse, f_inverse(plan.residual_k, self.f_o), "the reciprocal's fraction")?;
        let least = least_inverse(shape.softmax, self.total_bits - self.f_prob - 1, self.f_o);
        within(self.f_inverse, least, 26, "the output projection's fraction")?;
        equal(self.qk_norm.is_some(), c.qk_norm, "the norm of queries and keys")?;
        equal(self.f_qk_gain.is_some(), c.qk_norm, "the fraction of the queries' and keys' gains")?;
        let ring = 64 - i64::from(f_gain) - i64::from(self.f_qkv);
        let spared = self.f_qk_gain.map(|f| unlifted(self.score_proven, f, c.encoder()));
        self.qk_norm.iter().try_for_each(|n| n.check(c.head_dim, ring, (QK_GAIN_LEAST, spared)))
    }

    fn check_exp(&self, exp: &ExpPlan, max_positions: usize) -> Result<(), Fault> {
        within(self.score_k, 17, 26, "the scores' ring")?;
        within(exp.step_bits, F, F + 3, "the thermometer's step")?;
        within(exp.base, -(1i64 << 16), 1i64 << 16, "the thermometer's base")?;
        within(u32::try_from(exp.steps).unwrap_or(u32::MAX), 2, 62, "the thermometer's steps")?;
        let step_log = exp.step_bits - F;
        let step = f64::from(step_log).exp2();
        let top = (exp.base + exp.steps as i64) as f64 * step;
        if f64::from(self.score_k - F).exp2() / 2.0 < score_room(self.score_k, top, step) {
            return Err("the thermometer's highest threshold");
        }
        equal(exp.exp_lo_bits, exp_lo_bits(self.score_k), "the exponential's window")?;
        equal(self.f_prob, F_PROB, "the probabilities' fraction")?;
        // Compared as numbers, not as logarithms rounded up: parties may differ in the last bit of an exponential.
        within(self.total_bits, F_PROB + 1, 62, "the reciprocal's range")?;
        let (mass, carried) = (softmax_mass(max_positions, step_log), f64::from(self.total_bits - F_PROB - 1).exp2());
        if carried < 0.999_999 * mass || carried > 2.000_001 * mass {
            return Err("the reciprocal's range");
        }
        equal(self.total_window, total_window(self.total_bits, F_PROB), "the reciprocal's window")?;
        // Values are bounded by no less than 1 in the sum that they are weighted to.
        within(self.prob_k, self.total_bits + F + 1, 64 - F_EXP + F_PROB, "the probabilities' ring")
    }

    fn check_relu(&self, max_positions: usize) -> Result<(), Fault> {
        within(self.f_prob, F - RELU_DROPPED, F, "the fraction of positive parts")?;
        let ring = self.score_k - (F - self.f_prob);
        within(i64::from(RELU_RINGS.contains(&ring)), 1, 1, "the ring of positive parts")?;
        equal(self.total_bits, relu_total(max_positions, ring), "the reciprocal's range")?;
        let least = self.f_prob - RELU_LEAST;
        within(self.total_bits, 0, least + RELU_RANGE, "the reciprocal's range")?;
        equal(self.total_window, total_window(self.total_bits, least), "the reciprocal's window")?;
        within(self.prob_k, self.total_bits + F + 1, 64, "the probabilities' ring")
    }
}

impl MlpPlan {
    /// Bits of the low digit of an activation's window: the layer's own is the plan's.
    pub(crate) fn lo_bits(&self, shape: LayerShape, activation: Activation) -> u32 {
        if activation == shape.activation { self.gate_lo_bits } else { gate_lo_bits(activation, self.gate_k) }
    }

    fn check(&self, activation: Activation, residual_k: u32, f_gain: u32) -> Result<(), Fault> {
        weights(self.f_gate_up, "the fraction of gate and up")?;
        weights(self.f_down, "the down projection's fraction")?;
        within(self.gate_k, 16, 21, "the gate's ring")?;
        let ring = 64 - i64::from(f_gain) - i64::from(self.f_gate_up);
        within(self.gate_proven, self.gate_k, ring, "the gate's proven ring")?;
        equal(self.gate_lo_bits, gate_lo_bits(activation, self.gate_k), "the gate's window")?;
        let most = 64 - i64::from(self.f_down) - i64::from(residual_k);
        within(
            self.f_table,
            least_table(self.gate_lo_bits, self.f_down),
            most.min(TABLE_MOST.into()),
            "the activation's fraction",
        )
    }
}

impl LayerPlan {
    /// Fraction bits of a group's matrix, and the ring in which it is multiplied: a value that was scaled by `2^f` and
    /// truncated by `f` bits is left in ring `64 - f`.
    #[must_use]
    pub fn multiplied(&self, group: Group) -> (u32, u32) {
        let (a, m) = (&self.attention, &self.mlp);
        match group {
            Group::Qkv => (a.f_qkv, 64 - self.input_norm.f_gain),
            Group::O => (a.f_o, 64 - a.f_inverse),
            Group::GateUp => (m.f_gate_up, 64 - self.post_norm.f_gain),
            Group::Down => (m.f_down, 64 - m.f_table),
        }
    }
}

impl Plan {
    /// Whether a received plan is one that this version could have made for the model: all widths and the relations between
    /// them are as [`plan`](super::plan) makes them, so that nothing in it can make a table too large, a window impossible or a
    /// value wrap that a bound or guard covers.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn check(&self, c: &ModelConfig) -> Result<(), &'static str> {
        let layers = c.num_layers.checked_sub(self.first_private).ok_or("the first private layer")?;
        equal(self.layers.len(), layers, "the number of layers")?;
        if self.max_positions == 0 || self.max_positions > c.max_positions {
            return Err("the context");
        }
        within(self.residual_k, 28, 40, "the residual stream's ring")?;
        if self.block_scores > block::MOST_SCORES {
            return Err("the scores of a block");
        }
        if !(1..=MOST_PIECES).contains(&self.pieces) {
            return Err("the pieces of a prompt");
        }
        let (n, ring) = (c.hidden_size, i64::from(self.residual_k));
        if self.public_base && (self.private_embedding || !self.head.public) {
            return Err("a public base with a private embedding or head");
        }
        for (index, l) in (self.first_private..).zip(&self.layers) {
            if !l.adapters.is_empty() && !self.public_base {
                return Err("an adapter of a private base");
            }
            let shape = c.layer(index);
            let a = &l.attention;
            let spared = a.qk_norm.is_none().then(|| unlifted(a.score_proven, a.f_qkv, c.encoder()));
            l.input_norm.check(n, ring, (GAIN_LEAST, spared))?;
            l.attention.check(c, shape, self, l.input_norm.f_gain)?;
            l.post_norm.check(n, ring, (GAIN_LEAST, None))?;
            l.mlp.check(shape.activation, self.residual_k, l.post_norm.f_gain)?;
            l.adapters.iter().try_for_each(|(group, a)| a.check(c, index, group, l.multiplied(group)))?;
        }
        let h = &self.head;
        h.norm.check(n, ring, (GAIN_LEAST, None))?;
        weights(h.f_weight, "the head's fraction")?;
        within(h.f_logit, 4, F, "the logits' fraction")?;
        // What the truncation of the head's product leaves.
        let left = 64 - i64::from(h.norm.f_gain) - i64::from(F + h.f_weight) + i64::from(h.f_logit);
        within(h.logit_k, h.f_logit + 2, left.min(23), "the logits' ring")?;
        if !h.radix.sound(c.vocab_size) {
            return Err("the tournament's radix");
        }
        Ok(())
    }

    /// The same for this network and so many cores.
    #[must_use]
    pub fn at(mut self, c: &ModelConfig, setting: impl Into<Setting>) -> Plan {
        let setting = &setting.into();
        self.head.radix = Radices::fastest(c.vocab_size, self.head.logit_k, setting);
        self.pieces = pieces(&setting.net);
        for (norm, n) in self.norms_mut(c) {
            let mut window = norm.window;
            if let Some(alone) = &mut norm.alone {
                alone.most = most_alone(alone.window, norm.window, setting);
                window = alone.window;
            }
            // Where two windows serve the range, only what one alone is taken for can be scaled with it.
            let single = norm.alone.map_or(if norm.windows == 1 { MOST_VALUES } else { 0 }, |a| a.most);
            norm.joint = most_joint(n, norm.k, window, setting).min(single);
        }
        self
    }

    /// With the elements of each one's groups.
    fn norms_mut(&mut self, c: &ModelConfig) -> impl Iterator<Item = (&mut NormPlan, usize)> {
        let (hidden, head) = (c.hidden_size, c.head_dim);
        let of_layers = self.layers.iter_mut().flat_map(move |l| {
            let LayerPlan { input_norm, attention, post_norm, .. } = l;
            let qk_norm = attention.qk_norm.as_mut().map(|norm| (norm, head));
            [Some((input_norm, hidden)), qk_norm, Some((post_norm, hidden))]
        });
        of_layers.flatten().chain([(&mut self.head.norm, hidden)])
    }

    /// Its norms, layer by layer.
    pub fn norms(&self) -> impl Iterator<Item = &NormPlan> + Clone {
        let of_layers = self.layers.iter().flat_map(|l| {
            let LayerPlan { input_norm, attention, post_norm, .. } = l;
            [Some(input_norm), attention.qk_norm.as_ref(), Some(post_norm)]
        });
        of_layers.flatten().chain([&self.head.norm])
    }

    /// Fraction bits of the private matrices, layer by layer, and of the head.
    pub fn weight_fractions(&self) -> impl Iterator<Item = u32> + Clone + '_ {
        let of = |l: &LayerPlan| {
            let (a, m) = (&l.attention, &l.mlp);
            let factors = Group::ALL.map(|g| l.adapters.get(g).map_or([None; 2], |a| [Some(a.f_a), Some(a.f_b)]));
            let base = [Some(a.f_qkv), a.f_qk_gain, Some(a.f_o), Some(m.f_gate_up), Some(m.f_down)];
            base.into_iter().chain(factors.into_iter().flatten())
        };
        self.layers.iter().flat_map(of).flatten().chain([self.head.f_weight])
    }

    /// The most tokens that may follow a prompt: prompt and answer take a position each, but for the answer's last token,
    /// which nothing follows. 0 for a prompt beyond the context.
    #[must_use]
    pub fn longest_answer(&self, prompt: usize) -> usize {
        self.max_positions.saturating_add(1).saturating_sub(prompt)
    }
}
