//! The float model at the same work: same layers, same positions, same cores.

use std::time::Instant;

use ndarray::{Array2, Axis, s};

use super::Test;
use crate::model::float::{self, FloatCache};
use crate::model::{Weights, calibrate};

/// What the float model takes.
#[derive(Clone, Copy, Debug)]
pub struct Plaintext {
    /// Seconds per token of one layer, in the mean.
    pub layer_s: f64,
    /// Seconds per token of final norm and head; of a prefill only the last position's, over all of its tokens.
    pub head_s: f64,
    /// Of the weight products, f32 operations per second, a multiply-add counted as two.
    pub flops: f64,
    /// Bytes of weights and cache read per second, once per pass.
    pub bytes: f64,
}

impl Plaintext {
    /// Measures `test` after `context` cached positions.
    #[must_use]
    pub fn measure(weights: &Weights, test: Test, context: usize) -> Plaintext {
        let c = &weights.config;
        let (passes, tokens) = test.passes();
        let mut cache = FloatCache::new(c);
        cache.preload(context);
        let ids = calibrate::stress(c, 64);
        let input = |p: usize| -> Array2<f32> {
            let ids: Vec<u32> = (0..tokens).map(|t| ids[(p + t) % ids.len()]).collect();
            float::embed(weights, &ids)
        };
        let pass = |p: usize, cache: &mut FloatCache| {
            let start = cache.len();
            let layer = |h, index| float::layer(weights, index, h, start, cache, &mut ());
            (0..c.num_layers).fold(input(p), layer)
        };
        // Once for the caches of the machine and the room of this one.
        let mut h = pass(0, &mut cache);
        cache.truncate(context);
        let begun = Instant::now();
        for p in 0..passes {
            h = pass(p, &mut cache);
        }
        let layers = begun.elapsed().as_secs_f64();
        let last = h.slice(s![tokens - 1, ..]).to_owned().insert_axis(Axis(0));
        let begun = Instant::now();
        for _ in 0..passes {
            std::hint::black_box(float::logits(weights, &last));
        }
        let head = begun.elapsed().as_secs_f64();
        let all = (passes * tokens) as f64;
        let table = (c.vocab_size * c.hidden_size) as f64;
        let outside = if c.tie_word_embeddings { table } else { 2.0 * table };
        let layer_weights = c.parameter_count() as f64 - outside;
        let cached = (0..c.num_layers).map(|i| 2 * c.layer(i).kv_size() * context).sum::<usize>() as f64;
        Plaintext {
            layer_s: layers / all / c.num_layers as f64,
            head_s: head / all,
            flops: 2.0 * layer_weights * all / layers,
            bytes: 4.0 * (layer_weights + cached) * passes as f64 / layers,
        }
    }
}
