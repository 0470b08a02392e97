//! The public fixed-point plan of a model: every ring width, table position and guard, from a short menu.

use serde::{Deserialize, Serialize};

use crate::model::ModelConfig;

/// Fraction bits of activations between operations.
pub const F: u32 = 12;
/// Fraction bits of weights.
pub const FW: u32 = 12;
/// Fraction bits of the rotation's sines and cosines.
pub const F_ROPE: u32 = 8;

/// Fraction bits of `e^hi` and of `e^lo`.
pub const F_EXP_HI: u32 = 15;
/// Fraction bits of `e^lo`.
pub const F_EXP_LO: u32 = 12;
/// Of their product.
pub const F_EXP: u32 = F_EXP_HI + F_EXP_LO;

/// One RMSNorm: from the residual stream to the normalised value in ring `64 - f_gain`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NormPlan {
    /// Ring of the value whose squares are summed; `|h| < 2^(k-2)` is proven or guarded.
    pub k: u32,
    /// The sum of squares (ring units, `2F` fraction bits) is below `2^bits`, guarded.
    pub bits: u32,
    /// Row bits of the reciprocal square root's windows.
    pub window: u32,
    /// Fraction bits of `1 / rms`.
    pub f_gain: u32,
    /// Bits dropped before the coarse square sum that proves `|h|`, where weights do not prove it.
    pub coarse: Option<u32>,
}

/// Attention of one layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AttentionPlan {
    /// Per-head norm of queries and keys (Qwen3).
    pub qk_norm: Option<NormPlan>,
    /// Ring in which scores are proven to fit before they are narrowed.
    pub score_proven: u32,
    /// Ring of the scores (F fraction bits); guarded if narrower than `score_proven`.
    pub score_k: u32,
    /// Thermometer: step, lowest threshold, number of steps.
    pub step_bits: u32,
    /// Lowest threshold in steps.
    pub base: i64,
    /// Number of steps.
    pub steps: usize,
    /// Dropped and low bits of the exponential's window.
    pub exp_low: u32,
    /// Bits of its low digit.
    pub exp_lo_bits: u32,
    /// Fraction bits of the probabilities before normalisation.
    pub f_prob: u32,
    /// Ring of the probabilities and of the cached values.
    pub prob_k: u32,
    /// Bits of the sum of probabilities.
    pub total_bits: u32,
    /// Row bits of the reciprocal's windows.
    pub total_window: u32,
    /// Fraction bits of the reciprocal; the context's ring is `64 - f_inverse`.
    pub f_inverse: u32,
}

/// MLP of one layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MlpPlan {
    /// Ring in which the gate is proven to fit.
    pub gate_proven: u32,
    /// Ring of the gate's window; guarded if narrower.
    pub gate_k: u32,
    /// Bits of the window's low digit.
    pub gate_lo_bits: u32,
    /// Fraction bits of the activation's table; the product's ring is `64 - f_table`.
    pub f_table: u32,
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
}

/// Final norm, head and choice of the token.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HeadPlan {
    /// Final norm.
    pub norm: NormPlan,
    /// Final norm and head are those of the public base, bit for bit: a public linear map.
    pub public: bool,
    /// Ring of the logits that are compared, noise of the highest temperature included.
    pub logit_k: u32,
    /// Their fraction bits.
    pub f_logit: u32,
    /// Radix of the tournament.
    pub radix: usize,
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
    /// One plan per private layer.
    pub layers: Vec<LayerPlan>,
    /// The head.
    pub head: HeadPlan,
}

/// What is wrong with a received plan.
type Fault = &'static str;

fn within<T: PartialOrd>(v: T, low: T, high: T, what: Fault) -> Result<(), Fault> {
    if v >= low && v <= high { Ok(()) } else { Err(what) }
}

impl NormPlan {
    fn check(&self, ring: u32) -> Result<(), Fault> {
        within(self.k, 16, 34, "a norm's ring")?;
        within(self.bits, 24, 62, "a norm's sum of squares")?;
        within(self.window, 12, 16, "a norm's window")?;
        within(self.f_gain, 12, 26, "a norm's gain")?;
        match self.coarse {
            Some(t) => within(t, 1, self.k - 4, "a norm's coarse sum").and(within(
                self.k.saturating_add(t),
                ring,
                ring,
                "a norm's ring",
            )),
            None => within(self.k, 0, ring, "a norm's ring"),
        }
    }
}

impl AttentionPlan {
    fn check(&self) -> Result<(), Fault> {
        within(self.score_k, 13, 26, "the scores' ring")?;
        within(self.score_proven, self.score_k, 54, "the scores' proven ring")?;
        within(self.step_bits, F, F + 3, "the thermometer's step")?;
        within(self.score_k.saturating_sub(self.step_bits), 3, 16, "the thermometer's codes")?;
        within(self.base, -(1 << 16), 1 << 16, "the thermometer's base")?;
        within(self.steps, 2, 62, "the thermometer's steps")?;
        within(self.exp_lo_bits, 3, 14, "the exponential's low digit")?;
        within(self.exp_low, 0, 8, "the exponential's dropped bits")?;
        let hi = self.score_k.checked_sub(self.exp_low + self.exp_lo_bits).ok_or("the exponential's window")?;
        within(hi, 3, 14, "the exponential's high digit")?;
        within(self.f_prob, 8, F_EXP, "the probabilities' fraction")?;
        within(self.prob_k, self.f_prob + 4, 64 - F_EXP + self.f_prob, "the probabilities' ring")?;
        within(self.total_window, 10, 16, "the reciprocal's window")?;
        within(self.total_bits, self.total_window, self.prob_k.min(62), "the reciprocal's range")?;
        within(self.f_inverse, 10, 26, "the reciprocal's fraction")?;
        self.qk_norm.iter().try_for_each(|n| n.check(n.k.saturating_add(n.coarse.unwrap_or(0))))
    }
}

impl MlpPlan {
    fn check(&self) -> Result<(), Fault> {
        within(self.gate_k, 13, 24, "the gate's ring")?;
        within(self.gate_proven, self.gate_k, 40, "the gate's proven ring")?;
        within(self.gate_k.saturating_sub(self.gate_lo_bits), 3, 14, "the gate's window")?;
        within(self.f_table, 10, 20, "the activation's fraction")
    }
}

impl Plan {
    /// Whether a received plan is one that this version could have made for the model: nothing in it can make a table
    /// too large or a window impossible.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn check(&self, c: &ModelConfig) -> Result<(), &'static str> {
        within(self.first_private, 0, c.num_layers, "the first private layer")?;
        within(
            self.layers.len(),
            c.num_layers - self.first_private,
            c.num_layers - self.first_private,
            "the number of layers",
        )?;
        within(self.max_positions, 1, c.max_positions, "the context")?;
        within(self.residual_k, 28, 40, "the residual stream's ring")?;
        for l in &self.layers {
            l.input_norm.check(self.residual_k)?;
            l.attention.check()?;
            let same = u32::from(l.attention.qk_norm.is_some());
            within(same, c.qk_norm.into(), c.qk_norm.into(), "the norm of queries and keys")?;
            l.post_norm.check(self.residual_k)?;
            l.mlp.check()?;
        }
        self.head.norm.check(self.residual_k)?;
        within(self.head.logit_k, 5, 23, "the logits' ring")?;
        within(self.head.f_logit, 1, F, "the logits' fraction")?;
        within(self.head.radix, 2, 8, "the tournament's radix")
    }
}
