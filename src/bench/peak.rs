//! What this machine can do at most, measured: what the float model is held against.

use std::hint::black_box;
use std::time::Instant;

use rayon::prelude::*;

/// Rates of all threads together.
#[derive(Clone, Copy, Debug)]
pub struct Peak {
    /// Bytes read from memory per second, in order, of an array larger than any cache.
    pub bytes: f64,
    /// f32 operations per second, a multiply-add counted as two, in registers.
    pub flops: f64,
}

/// Larger than the caches of a server's share.
const WORDS: usize = 64 << 20;

/// Of several runs, as memory of shared machines varies.
const RUNS: usize = 4;

fn best(mut run: impl FnMut()) -> f64 {
    let time = |_| {
        let start = Instant::now();
        run();
        start.elapsed().as_secs_f64()
    };
    (0..RUNS).map(time).fold(f64::INFINITY, f64::min).max(1e-9)
}

impl Peak {
    /// Measures in about a second.
    #[must_use]
    pub fn measure() -> Peak {
        let threads = rayon::current_num_threads();
        let words = vec![1u64; WORDS];
        let read = best(|| {
            let part = |c: &[u64]| c.iter().fold(0u64, |a, &w| a ^ w);
            black_box(words.par_chunks(WORDS.div_ceil(threads)).map(part).reduce(|| 0, |a, b| a ^ b));
        });
        let compute = best(|| {
            (0..threads).into_par_iter().for_each(|_| {
                black_box(multiply_adds(black_box(0.999)));
            });
        });
        Peak { bytes: (8 * WORDS) as f64 / read, flops: 2.0 * (threads * ROUNDS * LANES) as f64 / compute }
    }
}

const ROUNDS: usize = 4 << 20;
/// Enough independent sums to fill the pipelines: 16 vectors of 16.
const LANES: usize = 256;

#[inline(always)]
fn fused(factor: f32) -> f32 {
    let mut sums = [1.0f32; LANES];
    for _ in 0..ROUNDS {
        for s in &mut sums {
            *s = s.mul_add(factor, 0.5);
        }
    }
    sums.iter().sum()
}

fn multiply_adds(factor: f32) -> f32 {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f")]
        fn avx512(factor: f32) -> f32 {
            fused(factor)
        }
        #[target_feature(enable = "avx2,fma")]
        fn avx2(factor: f32) -> f32 {
            fused(factor)
        }
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the processor has it.
            #[allow(unsafe_code)]
            return unsafe { avx512(factor) };
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: the processor has them.
            #[allow(unsafe_code)]
            return unsafe { avx2(factor) };
        }
    }
    // Every ARM processor of 64 bits has them.
    if cfg!(target_arch = "aarch64") {
        return fused(factor);
    }
    let mut sums = [1.0f32; LANES];
    for _ in 0..ROUNDS {
        for s in &mut sums {
            *s = *s * factor + 0.5;
        }
    }
    sums.iter().sum()
}
