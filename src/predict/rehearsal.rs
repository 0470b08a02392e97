//! What kernels' rates do not say: how long it takes to handle words one by one, and to take turns.
//!
//! Small models are run, all three parties in this process, and three coefficients fitted to their times by least squares:
//! for the kernels' computed time, for words, for messages in sequence. Models of other shapes are predicted from these, see
//! `docs/cost.md`.

use std::time::Duration;

use serde::Serialize;

use super::rates::Rates;
use super::time::terms;
use super::walk::walk;
use crate::bench::{Harness, Pace, Part, random_weights};
use crate::error::Result;
use crate::generate::MAX_BATCH;
use crate::model::{Activation, Arch, ModelConfig, Rope, RopeScaling};
use crate::world::Setup;

/// Number of [`Terms`].
const TERMS: usize = 3;

/// What a pass's time is a sum of: seconds of kernels at their rates, on one core; words handled one by one; messages in
/// sequence.
pub type Terms = [f64; TERMS];

/// Seconds for each of the [`Terms`].
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Fit {
    /// Per second of kernels: below 1 where several cores share them.
    pub kernels: f64,
    /// Per word.
    pub word_s: f64,
    /// Per message in sequence: two threads take turns.
    pub message_s: f64,
}

impl Fit {
    /// Seconds.
    #[must_use]
    pub fn seconds(&self, t: &Terms) -> f64 {
        self.kernels * t[0] + self.word_s * t[1] + self.message_s * t[2]
    }

    /// The coefficients, none negative, whose relative errors have the least sum of squares.
    fn of(samples: &[(Terms, f64)]) -> Fit {
        // In units in which the coefficients are of a size.
        let scale: Terms = std::array::from_fn(|i| samples.iter().map(|(t, _)| t[i]).fold(1e-12, f64::max));
        let rows: Vec<Terms> =
            samples.iter().map(|(t, s)| std::array::from_fn(|i| t[i] / scale[i] / s.max(1e-9))).collect();
        // Of the few subsets of terms, the best whose solution has no negative coefficient.
        let mut best = (f64::INFINITY, [0.0; TERMS]);
        for subset in 1u32..1 << TERMS {
            let active: Vec<usize> = (0..TERMS).filter(|i| subset >> i & 1 == 1).collect();
            let Some(x) = solve(&rows, &active) else { continue };
            if x.iter().any(|v| *v < 0.0) {
                continue;
            }
            let error = rows.iter().map(|r| (r.iter().zip(&x).map(|(r, x)| r * x).sum::<f64>() - 1.0).powi(2)).sum();
            if error < best.0 {
                best = (error, x);
            }
        }
        let x: Terms = std::array::from_fn(|i| best.1[i] / scale[i]);
        Fit { kernels: x[0], word_s: x[1], message_s: x[2] }
    }
}

/// The least squares solution of `rows x = 1` in the columns `active`, zero elsewhere; `None` if they depend on each other.
fn solve(rows: &[Terms], active: &[usize]) -> Option<Terms> {
    let n = active.len();
    let sum = |f: &dyn Fn(&Terms) -> f64| rows.iter().map(f).sum::<f64>();
    let mut a: Vec<Vec<f64>> = active
        .iter()
        .map(|&i| active.iter().map(|&j| sum(&|r| r[i] * r[j])).chain([sum(&|r| r[i])]).collect())
        .collect();
    for i in 0..n {
        let pivot = (i..n).max_by(|&p, &q| a[p][i].abs().total_cmp(&a[q][i].abs()))?;
        a.swap(i, pivot);
        if a[i][i].abs() < 1e-12 {
            return None;
        }
        for j in (0..n).filter(|&j| j != i).collect::<Vec<_>>() {
            let factor = a[j][i] / a[i][i];
            let row = a[i].clone();
            a[j].iter_mut().zip(&row).for_each(|(v, p)| *v -= factor * p);
        }
    }
    let mut x = [0.0; TERMS];
    active.iter().enumerate().for_each(|(i, &column)| x[column] = a[i][n] / a[i][i]);
    Some(x)
}

/// Times of a party's own machine with the run-ahead work already done, and of all three in one process from cold.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Overheads {
    /// Online work of Owner and Helper, who take turns.
    pub ready: Fit,
    /// All work of all parties.
    pub one_process: Fit,
}

fn config(hidden: usize, layers: usize) -> ModelConfig {
    ModelConfig {
        arch: Arch::Llama,
        hidden_size: hidden,
        intermediate_size: hidden * 11 / 4,
        num_layers: layers,
        num_heads: hidden / 32,
        num_kv_heads: hidden / 32,
        head_dim: 32,
        vocab_size: 512,
        max_positions: 512,
        rms_norm_eps: 1e-5,
        rope: Rope { theta: 1e4, scaling: RopeScaling::None },
        tie_word_embeddings: false,
        qkv_bias: false,
        o_bias: false,
        mlp_bias: false,
        qk_norm: false,
        activation: Activation::Silu,
        bos_id: None,
        eos_ids: vec![],
    }
}

/// Hidden size, layers, tokens of a pass, cached positions, passes.
const PIECES: [(usize, usize, &[(usize, usize, usize)]); 2] = [
    (64, 2, &[(16, 0, 1), (64, 0, 1), (1, 32, 16), (1, 400, 16)]),
    (256, 1, &[(16, 0, 1), (64, 0, 1), (1, 32, 16), (1, 400, 16)]),
];
/// Times that each piece is run; the fastest counts, as for the kernels.
const REPEAT: usize = 3;

/// Runs the small models.
///
/// # Errors
/// [`crate::Error::Internal`] if one of them fails.
pub(super) fn rehearse(rates: &Rates) -> Result<Overheads> {
    let (mut ready, mut all) = (Vec::new(), Vec::new());
    for (hidden, layers, pieces) in PIECES {
        let config = config(hidden, layers);
        let setup = Setup { timeout: Duration::from_secs(60), ..Setup::default() };
        let harness = Harness::prepare(&random_weights(config.clone())?, false, setup)?;
        for &(tokens, context, passes) in pieces {
            let fastest = |pace| -> Result<f64> {
                let mut best = f64::INFINITY;
                for _ in 0..REPEAT {
                    let m = harness.measure(Part::Whole, pace, context, &vec![tokens; passes])?;
                    best = best.min(m.wall.as_secs_f64() / passes as f64);
                }
                Ok(best)
            };
            let stretch = match tokens {
                1 => walk(&config, harness.plan(), context, passes)?.decode,
                _ => walk(&config, harness.plan(), tokens, 0)?.prefill,
            };
            let t = terms(&stretch, rates);
            ready.push((t.online, fastest(Pace::Ready)?));
            all.push((t.all, fastest(Pace::Generation([MAX_BATCH; 3]))?));
        }
    }
    Ok(Overheads { ready: Fit::of(&ready), one_process: Fit::of(&all) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fit_finds_what_made_the_times() {
        let terms: [Terms; 5] =
            [[1e-3, 1e5, 80.0], [5e-3, 9e5, 80.0], [2e-1, 1e7, 80.0], [1e-3, 4e5, 200.0], [3e-2, 1e5, 10.0]];
        let truth = Fit { kernels: 0.6, word_s: 5e-9, message_s: 4e-5 };
        let fit = Fit::of(&terms.map(|t| (t, truth.seconds(&t))));
        for (got, want) in [(fit.kernels, 0.6), (fit.word_s, 5e-9), (fit.message_s, 4e-5)] {
            assert!((got / want - 1.0).abs() < 1e-6, "{fit:?}");
        }
        // What would come out negative is left out.
        let fit = Fit::of(&terms.map(|t| (t, 1e-3 * t[0] + 1e-6 * t[2])));
        assert!(fit.kernels >= 0.0 && fit.word_s >= 0.0 && fit.message_s >= 0.0, "{fit:?}");
    }
}
