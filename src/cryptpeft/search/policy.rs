//! The controller: for each dimension a softmax over its choices, trained by REINFORCE (Williams, 1992) with a moving baseline.
//!
//! The probability of a point is the product of those of its choices, over the points that can be built; the gradient is that
//! of this conditional probability, summed over all points instead of estimated.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// How far a step goes for an advantage of one usual deviation.
const RATE: f64 = 0.5;
/// How much of baseline and deviation stays from step to step.
const KEPT: f64 = 0.8;
/// A single reward counts for so many usual deviations at most.
const MOST: f64 = 2.0;
/// Logits stay within this of their mean, so that no choice's probability ever comes to nothing.
const WIDEST: f64 = 2.5;

pub(super) struct Policy {
    /// Of each dimension's choices.
    logits: [Vec<f64>; 3],
    /// Moving mean of rewards, and of how far they are from it; none before the first.
    usual: Option<(f64, f64)>,
}

impl Policy {
    pub(super) fn new(choices: [usize; 3]) -> Self {
        Policy { logits: choices.map(|n| vec![0.0; n]), usual: None }
    }

    /// Of each point.
    fn probabilities(&self, points: &[[usize; 3]]) -> Vec<f64> {
        let score = |p: &[usize; 3]| p.iter().zip(&self.logits).map(|(&i, of)| of[i]).sum::<f64>();
        let scores: Vec<f64> = points.iter().map(score).collect();
        let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|s| (s - most).exp()).collect();
        let sum: f64 = weights.iter().sum();
        weights.into_iter().map(|w| w / sum).collect()
    }

    /// The number of a point. What is drawn is a function of seed, step and state: there is no stream to restore.
    pub(super) fn draw(&self, points: &[[usize; 3]], seed: u64, step: u64) -> usize {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(step);
        let mut left = (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        for (i, p) in self.probabilities(points).into_iter().enumerate() {
            left -= p;
            if left < 0.0 {
                return i;
            }
        }
        points.len() - 1
    }

    /// Moves towards the point, or away from it.
    pub(super) fn learn(&mut self, points: &[[usize; 3]], drawn: usize, reward: f64) {
        let Some((mean, deviation)) = self.usual else {
            self.usual = Some((reward, 0.0));
            return;
        };
        let difference = reward - mean;
        let deviation = KEPT * deviation + (1.0 - KEPT) * difference.abs();
        self.usual = Some((KEPT * mean + (1.0 - KEPT) * reward, deviation));
        if deviation < 1e-12 {
            return;
        }
        let advantage = (difference / deviation).clamp(-MOST, MOST);
        let probabilities = self.probabilities(points);
        for (d, logits) in self.logits.iter_mut().enumerate() {
            let mut expected = vec![0.0; logits.len()];
            points.iter().zip(&probabilities).for_each(|(p, q)| expected[p[d]] += q);
            for (i, (logit, expected)) in logits.iter_mut().zip(expected).enumerate() {
                let chosen = if points[drawn][d] == i { 1.0 } else { 0.0 };
                *logit += RATE * advantage * (chosen - expected);
            }
            let mean = logits.iter().sum::<f64>() / logits.len() as f64;
            logits.iter_mut().for_each(|l| *l = (*l - mean).clamp(-WIDEST, WIDEST));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_rewarded_becomes_likely() {
        let points: Vec<[usize; 3]> = (0..12).map(|i| [i % 3, i / 3 % 2, i / 6]).filter(|p| p[0] != p[1]).collect();
        let mut policy = Policy::new([3, 2, 2]);
        let even = policy.probabilities(&points);
        assert!(even.iter().all(|p| (p * points.len() as f64 - 1.0).abs() < 1e-9));
        for step in 0..300 {
            let drawn = policy.draw(&points, 7, step);
            let p = points[drawn];
            policy.learn(&points, drawn, if p[0] == 2 { 1.0 } else { 0.0 } + if p[2] == 1 { 0.5 } else { 0.0 });
        }
        let likely: f64 = points
            .iter()
            .zip(policy.probabilities(&points))
            .filter(|(p, _)| p[0] == 2 && p[2] == 1)
            .map(|(_, q)| q)
            .sum();
        assert!(likely > 0.8, "{likely}");
        assert!(policy.probabilities(&points).iter().all(|p| *p > 0.0));
    }
}
