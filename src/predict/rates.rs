//! Rates of this machine's kernels, measured in some seconds, small models included: the real kernels on sizes as in a layer.

use std::hint::black_box;
use std::ops::Range;
use std::time::{Duration, Instant};

use ndarray::Array2;
use serde::Serialize;

use super::rehearsal::{Overheads, rehearse};
use crate::error::{Error, Result};
use crate::generate::MAX_BATCH;
use crate::model::matmul_transposed;
use crate::par::in_blocks;
use crate::plan::FW_LEAST;
use crate::plan::work::Counts;
use crate::prf::{Address, Pair, PairKey, Prf};
use crate::protocol::cached::{CachedBilinear, Context, Scores, Span};
use crate::protocol::linear::{OwnerMatrix, local_masks};
use crate::ring::{Isa, Packed, PackedRows, fold, gemm};
use crate::share::Rows;

/// What a second of one core does. Kernels run on the whole pool where they are large; these are figures of the pool
/// divided by its threads.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Rates {
    /// The instruction set.
    pub isa: &'static str,
    /// Threads of the pool.
    pub threads: usize,
    /// Bytes of AES streams.
    pub prf_bytes: f64,
    /// Multiply-adds by 16-bit weights, of 16 rows at once (a batch of decode tokens) and of 128 (a prompt).
    pub weight_macs: [f64; 2],
    /// Bytes of 16-bit weights, one row at a time.
    pub weight_bytes: f64,
    /// Multiply-adds ring by ring, of as many rows.
    pub ring_macs: [f64; 2],
    /// Bytes of packed ring matrices, one row at a time.
    pub ring_bytes: f64,
    /// Multiply-adds with short cached rows that were just read.
    pub row_macs: f64,
    /// The same of rows that come from memory.
    pub cold_row_macs: f64,
    /// The same of a batch of rows together.
    pub together_macs: f64,
    /// Table words read by lookups.
    pub fold_words: f64,
    /// Multiply-adds of f32 weights in plaintext, one row at a time and those of a prompt together; of all threads together.
    pub float_macs: [f64; 2],
    /// What small models took beyond that.
    pub overheads: Overheads,
}

/// Rows for which products are measured: a batch of decode tokens, and a prompt.
pub const ROWS: [usize; 2] = [MAX_BATCH, 128];

/// Bits of the rings in which most products are, where a model leaves room for it.
const USUAL: u32 = 40;

/// Bytes of a matrix that comes from memory.
const FAR: usize = 64 << 20;

/// Of every kernel.
const EACH: Duration = Duration::from_millis(120);

/// Repeats `f` for the time of one kernel; units per second at best of the runs.
fn rate(units: f64, mut f: impl FnMut()) -> f64 {
    f();
    let (begun, mut best) = (Instant::now(), f64::INFINITY);
    while begun.elapsed() < EACH {
        let start = Instant::now();
        f();
        best = best.min(start.elapsed().as_secs_f64());
    }
    units / best.max(1e-9)
}

impl Rates {
    /// Measures.
    ///
    /// # Errors
    /// [`crate::Error::Internal`] if a stream cannot be taken or a channel fails.
    pub fn measure() -> Result<Rates> {
        let threads = rayon::current_num_threads();
        let per = |whole: f64| whole / threads as f64;
        let (m, n, t) = (2048usize, 1024usize, ROWS[1]);
        let x: Vec<u64> = (0..(t * n) as u64).map(|i| i.wrapping_mul(0x9e37_79b9_7f4a_7c15)).collect();
        let narrow: Vec<i16> = (0..m * n).map(|i| i as i16).collect();
        let wide: Vec<u64> = (0..(m * n) as u64).collect();
        let mut y = vec![0u64; t * m];
        // Of more than most processors' caches hold: a model is read once a token.
        let (long, far) = (4096, vec![1i16; FAR / 2]);
        let rows = far.len() / long;
        let one_row = || gemm::weights_i16(USUAL, &x[..long], &far, 1, rows, long, &mut y[..rows]);
        let weight_bytes = per(rate(FAR as f64, one_row));
        drop(far);
        let weight_macs = ROWS.map(|t| {
            let product = || gemm::weights_i16(USUAL, &x[..t * n], &narrow, t, m, n, &mut y[..t * m]);
            per(rate((t * m * n) as f64, product))
        });
        let rows = 8 * FAR / (USUAL as usize * n);
        let packed = Packed::made(rows * n, USUAL, |part| Ok::<_, Error>(part.map(|i| i as u64).collect()))?;
        let packed = OwnerMatrix::helper_packed(0, (rows, n), FW_LEAST, packed)?;
        let one_row = || y[..rows].copy_from_slice(&local_masks(USUAL, &x[..n], &packed, 0..rows));
        let ring_bytes = per(rate(packed.bytes() as f64, one_row));
        drop(packed);
        // A part of a matrix that stays in the cache, as it is used.
        let part = &wide[..m / 8 * n];
        let part = |from: usize, out: &mut [u64]| out.copy_from_slice(&part[from..][..out.len()]);
        let ring_macs = ROWS.map(|t| {
            let digits = gemm::Rows::new(USUAL, &x[..t * n], n);
            per(rate((t * m / 8 * n) as f64, || {
                digits.times(m / 8, part, &mut y[..t * m / 8]);
            }))
        });
        // Scores and context over cached positions of heads of 64: of some tokens, few positions that stay in the cache of the processor,
        // and of a single token as many as do not.
        let (dim, heads) = (64, n / 64);
        let mut kept = PackedRows::new(n, USUAL, 4 * m);
        (0..4).for_each(|_| kept.extend(&wide));
        let scores = Scores { heads, kv_heads: heads, dim, all: None };
        let context = Context { heads, kv_heads: heads, dim, all: None };
        let mut row_rate = |tokens: usize, positions: usize| {
            let queries = Rows::even(tokens, heads * dim);
            let weights = Rows::ragged((positions - tokens..positions).map(|position| scores.outputs(position)));
            let macs: usize = (positions - tokens..positions).map(|position| scores.macs(position)).sum();
            per(rate(2.0 * macs as f64, || {
                let span = |rows| Span::new(rows, 0..tokens, &x[..rows.len()]);
                scores.each(&span(&queries), (&kept, positions), &mut y[..weights.len()]);
                context.each(&span(&weights), (&kept, positions), &mut y[..queries.len()]);
            }))
        };
        let (row_macs, cold_row_macs) = (row_rate(4, 256), row_rate(1, kept.rows()));
        let (tokens, positions) = (MAX_BATCH, 256);
        let op = Scores { heads: 1, kv_heads: 1, dim, all: None };
        let (row, lengths) =
            (Rows::even(tokens, dim), (positions - tokens..positions).map(|position| op.outputs(position)));
        let mut one_head = PackedRows::new(dim, USUAL, positions);
        one_head.extend(&wide[..positions * dim]);
        let mut out = vec![0; lengths.sum()];
        let together_macs = rate((tokens * dim * (positions - tokens / 2)) as f64, || {
            op.together(USUAL, &Span::new(&row, 0..tokens, &x[..tokens * dim]), (&one_head, positions), &mut out);
        });
        let (rows, elements) = (512usize, 1 << 13);
        let (offsets, queries) = (vec![7u32; elements], vec![0x5au8; elements * rows / 8]);
        let fold_words = per(rate((rows * elements) as f64, || {
            let part = |b: Range<usize>| {
                let (mut out, query) = (vec![0u64; b.len()], &queries[b.start * rows / 8..b.end * rows / 8]);
                fold::sums(&[&wide[..2 * rows]], rows, &offsets[b], query, &mut out);
                out
            };
            black_box(in_blocks(elements, 16, |n| n, part));
        }));
        let float_macs = [(1, FAR / 4 / n), (ROWS[1], m)].map(|(t, m)| {
            let (rows, weights) = (Array2::<f32>::ones((t, n)), Array2::<f32>::ones((m, n)));
            let mut product = Array2::<f32>::zeros((t, m));
            rate((t * m * n) as f64, || product.assign(&matmul_transposed(rows.view(), weights.view())))
        });
        let mut prf = Prf::new([(Pair::OwnerClient, PairKey::fresh()?)]);
        let address = Address { pass: 0, layer: 0, path: "rate".into(), label: "rate" };
        let mut stream = prf.take(Pair::OwnerClient, &address)?;
        let mut words = Vec::with_capacity(1 << 15);
        let prf_bytes = rate(f64::from(8 << 15), || {
            words.clear();
            stream.words_into(1 << 15, 64, &mut words);
        });
        let mut rates = Rates {
            isa: Isa::current().name(),
            threads,
            prf_bytes,
            weight_macs,
            weight_bytes,
            ring_macs,
            ring_bytes,
            row_macs,
            cold_row_macs,
            together_macs,
            fold_words,
            float_macs,
            overheads: Overheads::default(),
        };
        rates.overheads = rehearse(&rates)?;
        Ok(rates)
    }

    /// Seconds of one core for the kernels of `c`, of passes of so many rows; a single one reads the cache from memory. `batch` rows
    /// are multiplied by a matrix together; a single one (in the Owner's decode) as fast as a batch would be, or as the weights are read.
    #[must_use]
    pub fn kernel_seconds(&self, c: &Counts, rows: f64, batch: f64) -> f64 {
        let per = |n: u64, rate: f64| n as f64 / rate;
        // What a matrix takes by itself is shared by its rows.
        let [few, many] = ROWS.map(|t| 1.0 / t as f64);
        let macs = |n: u64, rates: [f64; 2], rows: f64| {
            let [slow, fast] = rates.map(|rate| per(n, rate));
            fast + (slow - fast).max(0.0) * (1.0 / rows - many) / (few - many)
        };
        let batch = batch.min(ROWS[1] as f64);
        per(c.prf_bytes + c.mask_bytes, self.prf_bytes)
            + macs(c.weight_macs, self.weight_macs, batch).max(per(c.weight_bytes, self.weight_bytes))
            + macs(c.ring_macs, self.ring_macs, batch).max(per(c.ring_bytes, self.ring_bytes))
            + per(c.row_macs, if rows > 1.0 { self.row_macs } else { self.cold_row_macs })
            + per(c.together_macs, self.together_macs)
            + per(c.fold_words, self.fold_words)
    }
}
