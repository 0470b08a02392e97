//! Attention in the plan: rings of scores and probabilities, the thermometer or the positive parts, the reciprocal.

use super::layer::{
    AttentionPlan, ExpPlan, F, F_EXP, F_PROB, QK_GAIN_LEAST, RELU_DROPPED, RELU_LEAST, RELU_RANGE, RELU_RINGS,
    SCORE_PROVEN, exp_lo_bits, f_inverse, least_gain, least_inverse, least_unlifted, log2_ceil, relu_total, score_room,
    softmax_mass, total_window, unlifted,
};
use super::ranges::{LayerBounds, LayerRanges, Linear, MARGIN, Who, needing, ring_for, rotation};
use crate::model::config::{LayerShape, ModelConfig, Softmax};

/// How much larger than it should be a context may get: the reciprocal's constant is rounded to `f_inverse` bits; relative to the
/// reciprocal that is the softmax's sum, `mass` at most.
pub(super) fn normalised(mass: f64, f_inverse: u32) -> f64 {
    1.0 + mass * (-1.0 - f64::from(f_inverse)).exp2()
}

/// Thermometer thresholds around the calibrated row maxima, a step of 1, or more where the range is wide.
pub(super) struct Steps {
    pub(super) log: u32,
    base: i64,
    count: usize,
}

impl Steps {
    pub(super) fn new(b: &LayerBounds, r: &LayerRanges) -> Steps {
        let spread = (r.row_max.1 - r.row_max.0).max(0.0);
        let slack = 4.0 + spread / 2.0;
        let (from, to) = ((r.row_max.0 - slack).max(-b.score - 2.0), (r.row_max.1 + slack).min(b.score + 2.0));
        let log = u32::from(to - from > 40.0) + u32::from(to - from > 100.0) + u32::from(to - from > 200.0);
        let step = f64::from(log).exp2();
        let base = (from / step).floor() as i64 - 1;
        let count = ((to / step).ceil() as i64).saturating_sub(base).saturating_add(1).clamp(2, 62) as usize;
        Steps { log, base, count }
    }
}

/// Scores as a 2ReLU softmax takes them: the fewest bits dropped with which their range fits a ring whose signs can be taken.
pub(super) struct PositiveParts {
    /// Bits of the scores' ring before some are dropped.
    score_k: u32,
    ring: u32,
    total_bits: u32,
}

impl PositiveParts {
    pub(super) fn new(r: &LayerRanges, context: usize) -> PositiveParts {
        let needed = ring_for(r.score * MARGIN + 4.0, F).clamp(RELU_RINGS[0], RELU_RINGS[1] + RELU_DROPPED);
        let ring = if needed <= RELU_RINGS[0] + RELU_DROPPED { RELU_RINGS[0] } else { RELU_RINGS[1] };
        PositiveParts { score_k: needed.max(ring), ring, total_bits: relu_total(context, ring) }
    }

    /// Their fraction bits.
    fn f(&self) -> u32 {
        F - (self.score_k - self.ring)
    }

    /// The largest sum.
    pub(super) fn mass(&self) -> f64 {
        (f64::from(self.total_bits) - 1.0 - f64::from(self.f())).exp2()
    }
}

pub(super) fn attention(
    who: &Who<'_>,
    (config, shape): (&ModelConfig, LayerShape),
    b: &LayerBounds,
    r: &LayerRanges,
    (context, residual_k, f_gain): (usize, u32, u32),
) -> AttentionPlan {
    let score_proven = ring_for(b.score + 1.0, F).max(17);
    who.fits("a score (bits)", f64::from(score_proven), f64::from(SCORE_PROVEN) + 0.5);
    let (chosen, refused) = who.held(|who| match shape.softmax {
        Softmax::Exact => exponentials(who, b, r, context, score_proven),
        Softmax::TwoRelu => positive_parts(who, b, r, context),
    });
    let score_proven = score_proven.max(chosen.score_k);
    let qk_norm = match r.qk_sum {
        None => None,
        Some(sum) => {
            let gain = Linear { f: b.f.qk_gain, output: b.qk };
            let mut norm = who.norm(config.head_dim, b.qk_raw, sum, &gain, 64 - f_gain - b.f.qkv);
            // Where they are as wide as the scores' product behind the gain, queries and keys need no lift.
            let wide_enough = unlifted(score_proven, b.f.qk_gain, config.encoder());
            let most = match wide_enough >= least_unlifted(config.head_dim, norm.bits) {
                true => wide_enough,
                // The rotation takes bits, too: what is not needed is left to it.
                false => QK_GAIN_LEAST.max(least_gain(config.head_dim, norm.bits)),
            };
            norm.f_gain = norm.f_gain.min(most);
            Some(norm)
        }
    };
    // After the rotation queries and keys have F_ROPE fraction bits more and a factor of sqrt 2, and then a lift to come.
    let (f_before, f_weight) = qk_norm.as_ref().map_or((f_gain, b.f.qkv), |n| (n.f_gain, b.f.qk_gain));
    let turned = if config.encoder() { 1.0 } else { rotation() };
    let limit = (62.0 - f64::from(f_before + F + f_weight)).exp2() / turned;
    who.fits(&needing("a query or key", f_weight), b.qk, limit);
    who.report(refused);
    let f_inverse = f_inverse(residual_k, b.f.o);
    let least = least_inverse(shape.softmax, log2_ceil(chosen.mass), b.f.o);
    let together = "the residual stream, the output projection's fraction and that of a softmax's reciprocal (bits)";
    who.fits(&needing(together, b.f.o), f64::from(residual_k + b.f.o + least), 64.5);
    if let Some(a) = &b.adapters.o {
        // With the bit that their lift needs.
        let room = (62.0 - f64::from(f_inverse + F + a.f.a)).exp2();
        who.fits(
            "what an adapter of the output projection makes of a context",
            a.middle * normalised(chosen.mass, f_inverse),
            room,
        );
    }
    AttentionPlan {
        f_qkv: b.f.qkv,
        f_qk_gain: qk_norm.is_some().then_some(b.f.qk_gain),
        qk_norm,
        score_proven,
        score_k: chosen.score_k,
        exp: chosen.exp,
        f_prob: chosen.f_prob,
        prob_k: chosen.prob_k,
        total_bits: chosen.total_bits,
        total_window: chosen.total_window,
        f_inverse,
        f_o: b.f.o,
    }
}

/// What the kind of softmax decides.
struct Weighing {
    score_k: u32,
    exp: Option<ExpPlan>,
    f_prob: u32,
    prob_k: u32,
    total_bits: u32,
    total_window: u32,
    /// The largest sum.
    mass: f64,
}

fn positive_parts(who: &Who<'_>, b: &LayerBounds, r: &LayerRanges, context: usize) -> Weighing {
    let p = PositiveParts::new(r, context);
    let limit = f64::from(p.score_k - F - 1).exp2();
    who.fits("a score", b.score.min(r.score * MARGIN), limit);
    let (f_prob, least) = (p.f(), p.f() - RELU_LEAST);
    who.fits(
        "a sum of positive scores (bits above the least)",
        f64::from(p.total_bits - least),
        f64::from(RELU_RANGE) + 0.5,
    );
    // Weighted, a sign and the bit of a lift.
    let prob_k = p.total_bits + F + log2_ceil(b.v + 1.0) + 2;
    who.fits("a weighted sum of values (bits)", f64::from(prob_k), 64.5);
    Weighing {
        score_k: p.score_k,
        exp: None,
        f_prob,
        prob_k,
        total_bits: p.total_bits,
        total_window: total_window(p.total_bits, least),
        mass: p.mass(),
    }
}

fn exponentials(who: &Who<'_>, b: &LayerBounds, r: &LayerRanges, context: usize, score_proven: u32) -> Weighing {
    let mut score_k = ring_for(r.score * MARGIN + 4.0, F).clamp(17, 24).min(score_proven);
    let Steps { log: step_log, base, count: steps } = Steps::new(b, r);
    let step = f64::from(step_log).exp2();
    let top = (base as f64 + steps as f64) * step;
    // x = s - m runs from -R / 2 - top to 2 steps: it must fit the cyclic window of range R but for its two end rows.
    while score_k <= 26 && f64::from(score_k - F).exp2() / 2.0 < score_room(score_k, top, step) {
        score_k += 1;
    }
    if score_k > 26 {
        who.refuse("a score", b.score.min(r.score * MARGIN), 4096.0);
    }
    let exp_lo_bits = exp_lo_bits(score_k);
    let mass = softmax_mass(context, step_log);
    let f_prob = F_PROB;
    let prob_k = log2_ceil(mass * (b.v + 1.0)) + f_prob + F + 3;
    who.fits("a weighted sum of values (bits)", f64::from(prob_k), f64::from(64 - F_EXP + f_prob) + 0.5);
    let total_bits = log2_ceil(mass) + f_prob + 1;
    Weighing {
        score_k,
        exp: Some(ExpPlan { step_bits: F + step_log, base, steps, exp_lo_bits }),
        f_prob,
        prob_k,
        total_bits,
        total_window: total_window(total_bits, f_prob),
        mass,
    }
}
