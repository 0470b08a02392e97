//! What a plan chose, and why: what `trefoil cost` prints beside the figures.

use serde::Serialize;

use super::Source;
use crate::model::ModelConfig;
use crate::net::shape::Profile;
use crate::plan::cost::Cost;
use crate::plan::{F, FW_LEAST, LayerPlan, Plan, Radices, block, unlifted};
use crate::protocol::argmax;
use crate::protocol::pieces::LEAST_ROWS;

/// A choice of the plan.
#[derive(Clone, Debug, Serialize)]
pub struct Choice {
    /// The function.
    pub function: &'static str,
    /// What was chosen.
    pub chosen: String,
    /// Why, next to what else there is.
    pub why: String,
}

/// Radices that it is compared with, the same in all levels.
const RADICES: [usize; 3] = [2, 4, 8];

/// Seconds on the network alone.
fn seconds(c: &Cost, net: Profile) -> f64 {
    f64::from(c.depth) * net.rtt.as_secs_f64() / 2.0
        + 8.0 * (c.online_bytes() + c.ahead_bytes()) as f64 / net.bits_per_second
}

/// `3 to 7`, or `3`.
fn span(v: impl Iterator<Item = u32> + Clone) -> String {
    let (low, high) = (v.clone().min().unwrap_or(0), v.max().unwrap_or(0));
    if low == high { low.to_string() } else { format!("{low} to {high}") }
}

fn weights(p: &Plan) -> Choice {
    let all = p.weight_fractions();
    let more = all.clone().filter(|f| *f > FW_LEAST).count();
    Choice {
        function: "weights",
        chosen: format!("{} fraction bits, more than {FW_LEAST} in {more} of {} matrices", span(all.clone()), all.count()),
        why: "each matrix has the fewest that keep its rounding within the limits; more of them take no message, but bits of its outputs' ring".into(),
    }
}

fn norms(plan: &Plan) -> Choice {
    let all = || plan.norms();
    let two = all().filter(|n| n.windows == 2).count();
    let windows = span(all().map(|n| n.window));
    let few = || all().filter_map(|n| n.alone.filter(|a| a.most > 0));
    let alone = match few().next() {
        None => String::new(),
        Some(_) => format!(
            "; for up to {} values of a pass one of 2^{} rows in place of two, in {}",
            span(few().map(|a| a.most as u32)),
            span(few().map(|a| a.window)),
            few().count()
        ),
    };
    let joint = || all().map(|n| n.joint as u32).filter(|most| *most > 0);
    let together = match joint().next() {
        None => String::new(),
        Some(_) => format!(
            "; for up to {} values of a pass scaled in the same exchange, in {}",
            span(joint()),
            joint().count()
        ),
    };
    Choice {
        function: "norm: 1 / rms",
        chosen: format!(
            "{} norms with one window, {two} with two, of 2^{windows} rows{alone}{together}",
            all().count() - two
        ),
        why: "one window takes 6 messages (4 where scaling is in the same exchange, for more than twice the bytes: while those take less time than two messages do), two take 8 and tables of the square root of its size: two where one would need more than 2^14 rows for the sums of squares that were seen, with a margin of 8 at both ends, but one of up to 2^17 where the values are so few that on the network two messages take longer".into(),
    }
}

/// Whether the rotated queries and keys are in a narrower ring than the scores' product.
fn lifts_queries(l: &LayerPlan, encoder: bool) -> bool {
    let a = &l.attention;
    let gain = a.qk_norm.as_ref().map_or(l.input_norm.f_gain, |n| n.f_gain);
    gain > unlifted(a.score_proven, a.f_qk_gain.unwrap_or(a.f_qkv), encoder)
}

fn softmax(layers: &[LayerPlan], encoder: bool) -> Vec<Choice> {
    let plans = || layers.iter().filter_map(|l| Some((&l.attention, l.attention.exp?)));
    let lifted = layers.iter().filter(|l| lifts_queries(l, encoder)).count();
    let exponentials = || {
        [
            Choice {
                function: "softmax: reference",
                chosen: format!(
                    "thermometer of {} thresholds, 2^{} apart",
                    span(plans().map(|(_, e)| e.steps as u32)),
                    span(plans().map(|(_, e)| e.step_bits - F))
                ),
                why: "4 messages whatever the number of positions; a tournament takes 8 per level".into(),
            },
            Choice {
                function: "softmax: exponential",
                chosen: format!(
                    "table of 2^{} rows and factors of the Owner, ring of {} bits",
                    span(plans().map(|(a, e)| a.score_k - e.exp_lo_bits)),
                    span(plans().map(|(a, _)| a.score_k))
                ),
                why: format!(
                    "2 messages; rows 2^{} wide, since the factors carry what lies between them: more rows would only add bytes",
                    span(plans().map(|(_, e)| e.exp_lo_bits - F))
                ),
            },
        ]
    };
    let positive = layers.iter().filter(|l| l.attention.exp.is_none());
    let parts = positive.clone().map(|l| l.attention.score_k - (F - l.attention.f_prob));
    let mut all = Vec::new();
    if plans().next().is_some() {
        all.extend(exponentials());
    }
    if positive.clone().next().is_some() {
        all.push(Choice {
            function: "softmax: 2ReLU",
            chosen: format!(
                "positive parts of scores in a ring of {} bits, in {} layers",
                span(parts),
                positive.count()
            ),
            why:
                "6 messages, as maximum and exponential take; signs are exact, on the fewest bits that hold the scores"
                    .into(),
        });
    }
    all.push(Choice {
        function: "queries and keys",
        chosen: format!("lifted to the scores' ring in {lifted} of {} layers", layers.len()),
        why: "rotated, they keep 64 bits less the norm's gain and the fractions; the gain is shortened just enough to spare the lift and its 2 messages, where it keeps 10 bits".into(),
    });
    all
}

fn activation(layers: &[LayerPlan], gated: bool) -> Choice {
    let plans = || layers.iter().map(|l| &l.mlp);
    let (beside, messages) = match gated {
        true => (", with the lift of up beside them", "4 messages with the product"),
        false => ("", "2 messages"),
    };
    Choice {
        function: "MLP: activation",
        chosen: format!("lines on 2^{} rows{beside}", span(plans().map(|m| m.gate_k - m.gate_lo_bits))),
        why: format!("{messages}; rows an eighth wide, since a line's error grows with the square of the row"),
    }
}

fn tournament(s: &Source, net: Profile) -> Choice {
    let (n, k, chosen) = (s.config.vocab_size, s.plan.head.logit_k, &s.plan.head.radix);
    let one = |r: &Radices| {
        let c = argmax::cost(n, k, r.each());
        let mb = (c.online_bytes() + c.ahead_bytes()) as f64 / 1e6;
        let time = if net.is_none() { String::new() } else { format!(", {:.2} ms of network", 1e3 * seconds(&c, net)) };
        format!("radix {r}: {} messages, {mb:.2} MB{time}", c.depth)
    };
    let others: Vec<String> = RADICES.map(Radices::same).iter().filter(|r| *r != chosen).map(one).collect();
    Choice { function: "argmax", chosen: one(chosen), why: format!("of {n} candidates; {}", others.join("; ")) }
}

fn prompts(c: &ModelConfig, plan: &Plan) -> Choice {
    let tokens = plan.max_positions;
    let pieces = (tokens / LEAST_ROWS).clamp(1, plan.pieces.max(1));
    let rows = block::rows(c, plan, 0, tokens);
    let blocks = match tokens.div_ceil(rows.max(1)) {
        1 => "attention of all rows at once".into(),
        n => format!("attention of {tokens} rows in {n} blocks"),
    };
    let cut = match pieces {
        1 => "in one piece".into(),
        n => format!("in up to {n} pieces"),
    };
    Choice {
        function: "prompt",
        chosen: format!("maximum, exponential and MLP {cut}; {blocks}"),
        why: "pieces of 16 rows or more follow each other through an exchange where a network is between the parties, so that work and both directions of the links overlap, for no message in sequence more while all find room; blocks bound memory to 2^21 scores, for 14 messages each".into(),
    }
}

/// The choices of a plan, the tournament's beside its alternatives on `net`.
pub(super) fn choices(s: &Source, net: Profile) -> Vec<Choice> {
    let layers = &s.plan.layers;
    let mut out = vec![weights(&s.plan), norms(&s.plan)];
    if !layers.is_empty() {
        out.extend(softmax(layers, s.config.encoder()));
        out.push(activation(layers, !s.config.encoder()));
    }
    out.push(tournament(s, net));
    out.push(prompts(&s.config, &s.plan));
    out
}
