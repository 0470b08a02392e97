//! What kernels' rates do not say: how long it takes to handle words one by one, and to take turns.
//!
//! Small models are run, all three parties in this process, and two coefficients fitted to what their times exceed the
//! kernels' by, by least squares: for words, and for messages in sequence. What a message takes more on a network, where who waits
//! sleeps, is what one of them takes longer on a simulated one. Models of other shapes are predicted from these,
//! see `docs/cost.md`.

use std::time::Duration;

use serde::Serialize;

use super::rates::Rates;
use super::time::terms;
use super::walk::walk;
use crate::bench::{Harness, Pace, Part, random_weights};
use crate::error::Result;
use crate::generate::MAX_BATCH;
use crate::model::ModelConfig;
use crate::net::shape::Profile;
use crate::world::Setup;

/// What a pass's time is a sum of: seconds of kernels at their rates; words handled one by one; messages in sequence.
pub type Terms = [f64; 3];

/// Seconds for what the kernels' rates do not say.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Fit {
    /// Per word.
    pub word_s: f64,
    /// Per message in sequence: two threads take turns.
    pub message_s: f64,
}

impl Fit {
    /// Seconds.
    #[must_use]
    pub fn seconds(&self, t: &Terms) -> f64 {
        t[0] + self.word_s * t[1] + self.message_s * t[2]
    }

    /// The coefficients, none negative, whose relative errors have the least sum of squares.
    fn of(samples: &[(Terms, f64)]) -> Fit {
        // (words, messages, what they have to explain), each in units of the whole time.
        let rows: Vec<[f64; 3]> = samples.iter().map(|(t, s)| [t[1] / s, t[2] / s, 1.0 - t[0] / s]).collect();
        let sum = |i: usize, j: usize| rows.iter().map(|r| r[i] * r[j]).sum::<f64>();
        let (ww, wm, mm, wt, mt) = (sum(0, 0), sum(0, 1), sum(1, 1), sum(0, 2), sum(1, 2));
        let alone = |xx: f64, xt: f64| if xx > 0.0 { (xt / xx).max(0.0) } else { 0.0 };
        let both = ww * mm - wm * wm;
        let (word_s, message_s) = ((wt * mm - mt * wm) / both, (mt * ww - wt * wm) / both);
        // Where one comes out negative (or both say the same), the better of the two by itself.
        if word_s >= 0.0 && message_s >= 0.0 {
            return Fit { word_s, message_s };
        }
        let (word_s, message_s) = (alone(ww, wt), alone(mm, mt));
        if word_s * wt >= message_s * mt { Fit { word_s, message_s: 0.0 } } else { Fit { word_s: 0.0, message_s } }
    }
}

/// Times of a party's own machine with the run-ahead work already done, and of all three in one process from cold.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Overheads {
    /// Online work of Owner and Helper, who take turns.
    pub ready: Fit,
    /// All work of all parties.
    pub one_process: Fit,
    /// On a network, seconds per message in sequence beyond its latency: who waits for it sleeps, and has to be woken.
    pub woken_s: f64,
}

fn config(hidden: usize, layers: usize) -> ModelConfig {
    ModelConfig { head_dim: 32, ..ModelConfig::llama(hidden, hidden * 11 / 4, layers, hidden / 32, 512, 512) }
}

/// Hidden sizes and layers.
const MODELS: [(usize, usize); 2] = [(64, 2), (256, 1)];
/// Tokens of a pass, cached positions, passes.
const PIECES: [(usize, usize, usize); 4] = [(16, 0, 1), (64, 0, 1), (1, 32, 16), (1, 400, 16)];
/// Times that each piece is run; the fastest counts, as for the kernels.
const REPEAT: usize = 3;

/// Runs the small models.
///
/// # Errors
/// [`crate::Error::Internal`] if one of them fails.
pub(super) fn rehearse(rates: &Rates) -> Result<Overheads> {
    let (mut ready, mut all) = (Vec::new(), Vec::new());
    for (hidden, layers) in MODELS {
        let config = config(hidden, layers);
        let setup = Setup { timeout: Duration::from_secs(60), ..Setup::default() };
        let harness = Harness::prepare(&random_weights(config.clone())?, false, setup)?;
        for (tokens, context, passes) in PIECES {
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
            let t = terms(&stretch, layers, rates);
            ready.push((t.online, fastest(Pace::Ready)?));
            all.push((t.all, fastest(Pace::Generation([MAX_BATCH; 3]))?));
        }
    }
    let (ready, one_process) = (Fit::of(&ready), Fit::of(&all));
    Ok(Overheads { ready, one_process, woken_s: woken(rates, &ready)? })
}

/// Passes that are run on a network.
const SLEEPY: usize = 4;

/// What a message takes beyond `ready` and a network's latency.
fn woken(rates: &Rates, ready: &Fit) -> Result<f64> {
    let (hidden, layers) = MODELS[0];
    let (config, profile) = (config(hidden, layers), Profile { rtt: Duration::from_millis(1), ..Profile::LAN });
    let harness = Harness::new(config.clone(), Setup { profile, ..Setup::default() })?;
    let stretch = walk(&config, harness.plan(), 32, SLEEPY)?.decode;
    let mut took = f64::INFINITY;
    for _ in 0..REPEAT {
        let m = harness.measure(Part::Whole, Pace::Ready, 32, &[1; SLEEPY])?;
        took = took.min(m.wall.as_secs_f64() / SLEEPY as f64);
    }
    let messages = f64::from(stretch.depth) / SLEEPY as f64;
    let known = ready.seconds(&terms(&stretch, layers, rates).online) + messages * profile.rtt.as_secs_f64() / 2.0;
    Ok(((took - known) / messages).max(0.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fit_finds_what_made_the_times() {
        let terms: [Terms; 4] = [[1e-3, 1e5, 80.0], [5e-3, 9e5, 80.0], [2e-1, 1e7, 80.0], [1e-3, 4e5, 200.0]];
        let truth = Fit { word_s: 5e-9, message_s: 4e-5 };
        let fit = Fit::of(&terms.map(|t| (t, truth.seconds(&t))));
        assert!((fit.word_s / 5e-9 - 1.0).abs() < 1e-6 && (fit.message_s / 4e-5 - 1.0).abs() < 1e-6, "{fit:?}");
        // What would come out negative is left out.
        let fit = Fit::of(&terms.map(|t| (t, t[0] - 1e-10 * t[1] + 1e-4 * t[2])));
        assert!(fit.word_s == 0.0 && fit.message_s > 0.0, "{fit:?}");
        let fit = Fit::of(&terms.map(|t| (t, 0.5 * t[0])));
        assert_eq!((fit.word_s, fit.message_s), (0.0, 0.0));
    }
}
