//! How far calibration text stays from what a plan can carry: per layer and table the calibrated range, the proven bound,
//! the ring, the guard and the bits of headroom. All of it is read off the plan that runs, not planned a second time.

use serde::Serialize;

use super::layer::{AttentionPlan, ExpPlan, F, NormPlan, Plan};
use super::ranges::{Bounds, INPUT_LIMIT, Ranges};

/// One quantity of a layer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Headroom {
    /// The layer's number, or "head".
    pub place: String,
    /// Which quantity; the words of the error that its guard gives.
    pub quantity: &'static str,
    /// Least value seen, where a table has a lower end.
    pub least: Option<f64>,
    /// Largest value seen.
    pub largest: f64,
    /// What the weights prove for every input; none if only the guard does.
    pub proven: Option<f64>,
    /// Bits of the ring, fraction included.
    pub ring: u32,
    /// Least value that surely passes the guard.
    pub guard_low: Option<f64>,
    /// Largest value that surely passes; none where the bound is proven to fit and nothing is guarded.
    pub guard: Option<f64>,
    /// Bits by which the text stays away from the nearer end; none where nothing can leave the range.
    pub headroom_bits: Option<f64>,
    /// Rows of the tables that read the quantity, as bits of each window.
    pub windows: Vec<u32>,
}

/// Fraction of a guard's range that surely passes, signed and unsigned: a sixteenth at each end may not.
const SIGNED: f64 = 7.0 / 8.0;
const UNSIGNED: f64 = 15.0 / 16.0;

fn sum(place: &str, quantity: &'static str, p: &NormPlan, seen: (f64, f64)) -> Headroom {
    let unit = f64::from(2 * F).exp2();
    let (b2, limit) = (p.bits - p.window + 6, f64::from(p.bits).exp2() * UNSIGNED / unit);
    let window2 = p.window.min(b2);
    // Below row 33 of the second window a line is too coarse.
    let low = if window2 == b2 { 1.0 } else { 33.0 * f64::from(b2 - window2).exp2() } / unit;
    let bits = (limit / seen.1).log2().min((seen.0 / low).log2());
    Headroom {
        place: place.to_string(),
        quantity,
        least: Some(seen.0),
        largest: seen.1,
        proven: None,
        ring: p.bits,
        guard_low: Some(low),
        guard: Some(limit),
        headroom_bits: Some(bits),
        windows: vec![p.window, window2],
    }
}

/// A value of ring `k` that is guarded where its proven ring is wider.
fn signed(
    place: &str,
    quantity: &'static str,
    seen: f64,
    proven: f64,
    (k, proven_k): (u32, u32),
    windows: Vec<u32>,
) -> Headroom {
    let limit = (proven_k > k).then(|| (f64::from(k) - 1.0 - f64::from(F)).exp2() * SIGNED);
    Headroom {
        place: place.to_string(),
        quantity,
        least: None,
        largest: seen,
        proven: Some(proven),
        ring: k,
        guard_low: None,
        guard: limit,
        headroom_bits: limit.map(|l| (l / seen).log2()),
        windows,
    }
}

fn row_max(place: &str, a: &AttentionPlan, e: &ExpPlan, seen: (f64, f64)) -> Headroom {
    let step = (f64::from(e.step_bits) - f64::from(F)).exp2();
    // A maximum is seen a step too low at most.
    let (low, high) = ((e.base as f64 + 1.0) * step, (e.base as f64 + e.steps as f64) * step);
    let (centre, half) = ((low + high) / 2.0, (high - low) / 2.0);
    let reach = (seen.0 - centre).abs().max((seen.1 - centre).abs());
    Headroom {
        place: place.to_string(),
        quantity: "largest score of a row",
        least: Some(seen.0),
        largest: seen.1,
        proven: None,
        ring: a.score_k,
        guard_low: Some(low),
        guard: Some(high),
        headroom_bits: Some((half / reach).log2()),
        windows: vec![a.score_k - e.step_bits],
    }
}

/// Every guarded or proven quantity of a plan, layer by layer.
#[must_use]
pub fn headroom(plan: &Plan, bounds: &Bounds, ranges: &Ranges) -> Vec<Headroom> {
    let mut out = Vec::new();
    let input = if plan.private_embedding { bounds.embedding } else { INPUT_LIMIT };
    for (i, (l, (b, r))) in plan.layers.iter().zip(bounds.layers.iter().zip(&ranges.layers)).enumerate() {
        let place = (plan.first_private + i).to_string();
        let a = &l.attention;
        if i == 0 {
            let largest = r.input_sum.1.sqrt();
            let ring = (plan.residual_k, plan.residual_k);
            out.push(signed(
                &place,
                "hidden state given to the private layers (norm)",
                largest,
                input,
                ring,
                Vec::new(),
            ));
        }
        out.push(sum(&place, "sum of squares before attention", &l.input_norm, r.input_sum));
        if let (Some(p), Some(seen)) = (&a.qk_norm, r.qk_sum) {
            out.push(sum(&place, "sum of squares of a query or key", p, seen));
        }
        let exp = a.exp.iter().map(|e| a.score_k - e.exp_lo_bits).collect();
        out.push(signed(&place, "score", r.score, b.score, (a.score_k, a.score_proven), exp));
        if let Some(e) = &a.exp {
            out.push(row_max(&place, a, e, r.row_max));
        }
        out.push(sum(&place, "sum of squares before the MLP", &l.post_norm, r.post_sum));
        let window = vec![l.mlp.gate_k - l.mlp.gate_lo_bits];
        out.push(signed(&place, "gate", r.gate, b.gate, (l.mlp.gate_k, l.mlp.gate_proven), window));
    }
    out.push(sum("head", "sum of squares before the head", &plan.head.norm, ranges.final_sum));
    let ring = (plan.head.logit_k, plan.head.logit_k);
    out.push(signed("head", "logit", ranges.logit, bounds.logit, ring, Vec::new()));
    out
}
