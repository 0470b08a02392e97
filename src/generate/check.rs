//! The secure run against the float model, teacher-forced on the secure tokens.

use serde::Serialize;

use super::Generation;
use crate::model::{FloatCache, Weights, float};

/// How the secure logits compare with the float model's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Check {
    /// Positions at which the secure token is the float model's choice, or one of its top two where those are closer
    /// than 0.1.
    pub agree: usize,
    /// Positions compared.
    pub of: usize,
    /// Largest Kullback-Leibler divergence, float to secure, in nats.
    pub max_kl: f64,
    /// Largest difference of a logit.
    pub max_logit_error: f64,
}

impl Check {
    /// Both together.
    #[must_use]
    pub fn and(self, o: Check) -> Check {
        Check {
            agree: self.agree + o.agree,
            of: self.of + o.of,
            max_kl: self.max_kl.max(o.max_kl),
            max_logit_error: self.max_logit_error.max(o.max_logit_error),
        }
    }
}

/// Float logits closer than this count as a tie.
const TIE: f32 = 0.1;

fn log_softmax(x: &[f32]) -> Vec<f64> {
    let max = x.iter().fold(f64::NEG_INFINITY, |m, &v| m.max(f64::from(v)));
    let sum: f64 = x.iter().map(|&v| (f64::from(v) - max).exp()).sum();
    x.iter().map(|&v| f64::from(v) - max - sum.ln()).collect()
}

/// Runs the float model over prompt and generated tokens and compares. With sampling, `agree` compares the largest
/// logits, since the token is a sample.
#[must_use]
pub fn check(w: &Weights, prompt: &[u32], g: &Generation, sampled: bool) -> Check {
    let mut cache = FloatCache::new(&w.config);
    let ids: Vec<u32> = prompt.iter().chain(&g.tokens[..g.tokens.len().saturating_sub(1)]).copied().collect();
    let logits = float::advance(w, &ids, &mut cache, &mut ());
    let mut out = Check::default();
    for (i, (secure, &token)) in g.logits.iter().zip(&g.tokens).enumerate() {
        let want = logits.row(prompt.len() - 1 + i).to_vec();
        let mut order: Vec<usize> = (0..want.len()).collect();
        order.sort_by(|&a, &b| want[b].total_cmp(&want[a]));
        let best = |v: &[f32]| (0..v.len()).fold(0, |m, i| if v[i] > v[m] { i } else { m });
        let chosen = if sampled { best(secure) } else { token as usize };
        let tie = order.len() > 1 && want[order[0]] - want[order[1]] < TIE;
        out.agree += usize::from(chosen == order[0] || tie && chosen == order[1]);
        out.of += 1;
        let (p, q) = (log_softmax(&want), log_softmax(secure));
        let kl: f64 = p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum();
        out.max_kl = out.max_kl.max(kl);
        let error = want.iter().zip(secure).fold(0.0f64, |m, (a, b)| m.max(f64::from((a - b).abs())));
        out.max_logit_error = out.max_logit_error.max(error);
    }
    out
}
