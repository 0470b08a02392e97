//! The public fixed-point plan of a model: every ring width, table position and guard, from a short menu.

use serde::{Deserialize, Serialize};

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
    /// Per-head norms of queries and keys (Qwen3).
    pub qk_norm: Option<(NormPlan, NormPlan)>,
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
