//! How good a model is on what was held out, by the float twin.

use ndarray::Axis;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::data::Example;
use crate::model::{FloatCache, Weights, float};

/// What was found.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Score {
    /// Mean negative log-likelihood of the learned tokens, in nats.
    pub loss: f64,
    /// Its exponential.
    pub perplexity: f64,
    /// The share of examples that greedy decoding answers exactly, end token included; tasks only.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub exact_match: Option<f64>,
    /// Examples.
    pub examples: usize,
    /// Tokens that were predicted.
    pub tokens: usize,
}

/// Scores `examples`; `exact` where an answer is right or wrong as a whole.
///
/// Greedy decoding gives exactly an answer if and only if each of its tokens is the likeliest after those before it, which one pass
/// over prompt and answer shows.
#[must_use]
pub fn score(weights: &Weights, examples: &[Example], exact: bool) -> Score {
    let of = |example: &Example| {
        let ids = &example.ids[..example.ids.len() - 1];
        let h = float::hidden(weights, ids, &mut FloatCache::new(&weights.config), &mut ());
        let (rows, targets): (Vec<usize>, Vec<u32>) = example.predictions().unzip();
        let logits = float::logits(weights, &h.select(Axis(0), &rows));
        let (mut nats, mut right) = (0.0, true);
        for (row, &target) in logits.outer_iter().zip(&targets) {
            let (best, max) = row
                .iter()
                .enumerate()
                .fold((0, f32::NEG_INFINITY), |(best, max), (i, &l)| if l > max { (i, l) } else { (best, max) });
            let sum: f64 = row.iter().map(|&l| f64::from(l - max).exp()).sum();
            nats += sum.ln() - f64::from(row[target as usize] - max);
            right &= best == target as usize;
        }
        (nats, targets.len(), right)
    };
    let all: Vec<(f64, usize, bool)> = examples.par_iter().map(of).collect();
    let tokens = all.iter().map(|(_, n, _)| n).sum::<usize>();
    let loss = all.iter().map(|(nats, ..)| nats).sum::<f64>() / tokens.max(1) as f64;
    let right = all.iter().filter(|(.., right)| *right).count();
    Score {
        loss,
        perplexity: loss.exp(),
        exact_match: exact.then(|| right as f64 / all.len().max(1) as f64),
        examples: all.len(),
        tokens,
    }
}
