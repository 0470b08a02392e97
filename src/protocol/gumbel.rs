//! Gumbel sampling: exact softmax sampling at no cost.
//!
//! `argmax_i (x_i + T g_i)` with independent Gumbel `g_i` is a sample of `softmax(x / T)`. The Owner adds the noise to its
//! side of the masked logits: nobody sees the logits, and the Owner, who knows the noise, sees no logit. Noise is clipped
//! to `[-ln 20, 20]` (probability `e^-20` each way), a range that the plan of the head reserves. Local.
//!
//! The noise of a token is a function of seed and the token's index in the answer alone: however the answer is cut into
//! passes, and whatever was drafted and rejected in between, the same seed gives the same tokens.

use rand_chacha::ChaCha20Rng;
use rand_core::{Rng, SeedableRng};

use crate::ring::fixed;
use crate::share::{Masked, Side};

/// The largest noise at temperature 1.
pub const CLIP: f64 = 20.0;
/// Words of 32 bits that [`Gumbel::draw`] takes.
const WORDS_PER_DRAW: u128 = 2;

/// The Owner's sampling noise; its seed is no key of any PRF stream.
pub struct Gumbel {
    rng: ChaCha20Rng,
    temperature: f64,
    /// Index in the answer of the next token that gets noise.
    next: u64,
}

impl Gumbel {
    /// Noise for one request. `temperature` 0 means none.
    #[must_use]
    pub fn new(seed: u64, temperature: f64) -> Self {
        Gumbel { rng: ChaCha20Rng::seed_from_u64(seed), temperature, next: 0 }
    }

    /// The next logits are those of the answer's token `index`.
    pub fn seek(&mut self, index: u64) {
        self.next = index;
    }

    /// Adds noise to the Owner's side, for a token of the answer per row that is not empty; a no-op for masks.
    #[must_use]
    pub fn add(&mut self, x: Masked) -> Masked {
        if x.side() == Side::Mask || self.temperature == 0.0 {
            return x;
        }
        let (k, f, rows) = (x.k(), x.f(), x.rows().clone());
        x.map(f, rows.clone(), |v| {
            let mut out = Vec::with_capacity(v.len());
            for logits in (0..rows.tokens()).map(|t| &v[rows.row(t)]).filter(|r| !r.is_empty()) {
                let noise = self.of(self.next, logits.len());
                self.next += 1;
                out.extend(logits.iter().zip(noise).map(|(w, g)| w.wrapping_add(fixed::encode(g, f, k))));
            }
            out
        })
    }

    /// The noise of the answer's token `index`, temperature included, one for each of `n` candidates. The Client, whose seed it
    /// is, drafts with it.
    pub(crate) fn of(&mut self, index: u64, n: usize) -> Vec<f64> {
        self.rng.set_word_pos(u128::from(index) * WORDS_PER_DRAW * n as u128);
        (0..n).map(|_| self.temperature * self.draw()).collect()
    }

    fn draw(&mut self) -> f64 {
        // 53 uniform bits in (0, 1).
        let u = ((self.rng.next_u64() >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
        (-(-u.ln()).ln()).clamp(-CLIP.ln(), CLIP)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frequencies_are_those_of_softmax() {
        let x = [0.0f64, 1.0, 2.0];
        let mut g = Gumbel::new(1, 1.0);
        let mut counts = [0usize; 3];
        let n = 100_000;
        for _ in 0..n {
            let y: Vec<f64> = x.iter().map(|v| v + g.draw()).collect();
            counts[(0..3).max_by(|&a, &b| y[a].total_cmp(&y[b])).unwrap()] += 1;
        }
        let sum: f64 = x.iter().map(|v| v.exp()).sum();
        for (c, v) in counts.iter().zip(x) {
            assert!((*c as f64 / n as f64 - v.exp() / sum).abs() < 0.005);
        }
    }
}
