//! The MLP in the plan: the gate's window, the activation's table and what it may err by.

use super::layer::{F, MlpPlan, TABLE_MOST, gate_lo_bits, least_table};
use super::ranges::{LayerBounds, LayerRanges, MARGIN, Who, needing, ring_for};
use crate::model::config::{Activation, LayerShape};

/// The gate's window and the bits of its low digit.
pub(super) fn gate_window(activation: Activation, b: &LayerBounds, r: &LayerRanges) -> (u32, u32) {
    let gate_k = ring_for(r.gate * MARGIN + 2.0, F).clamp(16, 21).min(gate_proven(b));
    (gate_k, gate_lo_bits(activation, gate_k))
}

fn gate_proven(b: &LayerBounds) -> u32 {
    // The lowest row of the window belongs to the carry: the bound stays above it.
    ring_for(b.gate * 1.05, F).max(16)
}

/// How far a layer's activation tables may be off, a slope of `f_table` bits taken up to `2^(lo_bits + 1)` times: measured by
/// the tests of `approx/signed.rs` before the rounding.
pub(super) fn table_error(shape: LayerShape, gate_lo_bits: u32, f_table: u32) -> f64 {
    let lines = shape.activations().map(|a| match a {
        Activation::Silu => SILU_ERROR,
        Activation::Relu => RELU_ERROR,
        Activation::Quad => QUAD_ERROR,
        Activation::Gelu => GELU_ERROR,
    });
    lines.fold(0.0, f64::max) + (f64::from(gate_lo_bits) - f64::from(f_table)).exp2()
}

/// The largest error of the activation's lines in any window of the plan.
const SILU_ERROR: f64 = 0.008;
/// Of a ReLU's: an eighth of the row around zero, twice as wide for the carry.
const RELU_ERROR: f64 = 0.033;
/// Of a parabola's.
const QUAD_ERROR: f64 = 0.0045;
/// Of a GELU's, which bends most at zero.
const GELU_ERROR: f64 = 0.013;

/// The largest absolute value of a layer's activations for gates up to `gate`; convex.
pub(crate) fn reach(shape: LayerShape, gate: f64) -> f64 {
    let one = |a| match a {
        Activation::Silu | Activation::Relu | Activation::Gelu => gate,
        Activation::Quad => (gate / 8.0 + 0.25) * gate + 0.5,
    };
    shape.activations().map(one).fold(0.0, f64::max)
}

/// Fraction bits of the activation's table: both the product with `up` (in ring 64) and the down projection's output (less its
/// weights' fraction bits after its truncation) must fit.
pub(super) fn f_table(shape: LayerShape, b: &LayerBounds, r: &LayerRanges, residual_k: u32) -> Option<u32> {
    // The activation may be off by one at most, see `table_error`.
    let product = ring_for((reach(shape, b.gate) + 1.1) * b.up, F);
    // The middle values of an adapter are lifted.
    let middle = b.adapters.down.as_ref().map_or(0, |a| ring_for(a.middle, F + a.f.a) + 1);
    let f = 64u32.saturating_sub(product.max(b.f.down + residual_k).max(middle)).min(TABLE_MOST);
    (f >= least_table(gate_window(shape.activation, b, r).1, b.f.down)).then_some(f)
}

pub(super) fn mlp(who: &Who<'_>, shape: LayerShape, b: &LayerBounds, r: &LayerRanges, residual_k: u32) -> MlpPlan {
    let (gate_k, gate_lo_bits) = gate_window(shape.activation, b, r);
    let f_table = f_table(shape, b, r, residual_k).unwrap_or_else(|| {
        let least = least_table(gate_lo_bits, b.f.down);
        let bits = residual_k + b.f.down + least;
        if let Some(a) = &b.adapters.down {
            let room = (62.0 - f64::from(least + F + a.f.a)).exp2();
            who.fits("what an adapter of the down projection makes of its input", a.middle, room);
        }
        if bits > 64 {
            let together = "the residual stream, the down projection's fraction and the activation's (bits)";
            who.refuse(&needing(together, b.f.down), f64::from(bits), 64.0);
        } else {
            let room = f64::from(64 - least - F).exp2();
            who.refuse(&needing("gate times up", b.f.down), reach(shape, b.gate) * b.up, room);
        }
        10
    });
    MlpPlan { f_gate_up: b.f.gate_up, gate_proven: gate_proven(b), gate_k, gate_lo_bits, f_table, f_down: b.f.down }
}
