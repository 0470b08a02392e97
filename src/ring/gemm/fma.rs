//! Ring words times ring words modulo `2^k`, `k <= 50`, in double precision: both are cut into two signed digits of about
//! `k/2` bits, and three fused multiply-adds give the product: `x0 w0 + 2^l (x0 w1 + x1 w0)`, what is left out being a multiple
//! of `2^k`. All sums are integers of at most 2^53, so that nothing is ever rounded. `vpmullq` takes as many steps
//! of the processor and an addition more; the blocks here are cut so that they stay in its caches, which counts for long prompts.

use std::arch::x86_64::*;

/// The widest ring.
pub const WIDEST: u32 = 50;
/// Rows of `x` from which cutting `w` pays.
pub const FEWEST: usize = 32;
/// Lanes of a register.
const LANES: usize = 8;

/// A register in memory: one that straddles two cache lines is loaded at half the speed.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Register([f64; LANES]);

/// How words modulo `2^k` are cut.
#[derive(Clone, Copy)]
struct Cut {
    /// Bits of the low digit, and of the high one.
    low: u32,
    high: u32,
    /// Columns over which the sums of a lane stay below 2^53 (at most 256: what a block needs stays in the L1 cache).
    columns: usize,
}

impl Cut {
    fn of(k: u32) -> Cut {
        let low = k.div_ceil(2);
        // A column adds at most 2 x 2^(k - 2) to a lane's mixed products, and no more to its low ones.
        Cut { low, high: (k - low).max(1), columns: LANES << (54 - k.max(4)).min(5) }
    }

    /// Digits of `row`, register by register: low, then high; zeros behind its end.
    #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl")]
    fn digits(self, row: &[u64], out: &mut [Register]) {
        assert!(out.len() == 2 * row.len().div_ceil(LANES));
        let up = |bits: u32| _mm_cvtsi32_si128(64 - bits as i32);
        let (low, high, down) = (up(self.low), up(self.high), _mm_cvtsi32_si128(self.low as i32));
        for (v, out) in row.chunks(LANES).zip(out.chunks_exact_mut(2)) {
            let lanes = u8::MAX >> (LANES - v.len());
            // SAFETY: only lanes within `v` are read; each `out` has the eight doubles that are stored.
            unsafe {
                let v = _mm512_maskz_loadu_epi64(lanes, v.as_ptr().cast());
                let l = _mm512_sra_epi64(_mm512_sll_epi64(v, low), low);
                let h = _mm512_srl_epi64(_mm512_sub_epi64(v, l), down);
                let h = _mm512_sra_epi64(_mm512_sll_epi64(h, high), high);
                _mm512_storeu_pd(out[0].0.as_mut_ptr(), _mm512_cvtepi64_pd(l));
                _mm512_storeu_pd(out[1].0.as_mut_ptr(), _mm512_cvtepi64_pd(h));
            }
        }
    }
}

/// Rows of words, cut: block by block of columns, within it row by row.
pub struct Digits {
    cut: Cut,
    rows: usize,
    n: usize,
    blocks: Vec<Register>,
}

impl Digits {
    /// Of rows of `n` words, for products modulo `2^k`.
    ///
    /// # Safety
    /// The processor has AVX-512 F, DQ, BW and VL.
    ///
    /// # Panics
    /// If `k` is above [`WIDEST`].
    #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl")]
    pub unsafe fn cut(x: &[u64], n: usize, k: u32) -> Digits {
        assert!(k <= WIDEST);
        let (cut, rows) = (Cut::of(k), x.len() / n);
        // Columns of a block are whole registers, but for the last block.
        let mut blocks = vec![Register([0.0; LANES]); 2 * rows * n.div_ceil(LANES)];
        for s in 0..rows {
            let row = &x[s * n..][..n];
            for from in (0..n).step_by(cut.columns) {
                let to = n.min(from + cut.columns);
                let each = 2 * (to - from).div_ceil(LANES);
                let at = 2 * rows * from / LANES + s * each;
                cut.digits(&row[from..to], &mut blocks[at..at + each]);
            }
        }
        Digits { cut, rows, n, blocks }
    }

    /// `rows[s][j] += sum_i x[first + s][i] w[j n + i]`, modulo the `2^k` that the digits were cut for; higher bits mean nothing.
    ///
    /// # Safety
    /// The processor has AVX-512 F, DQ, BW and VL.
    ///
    /// # Panics
    /// If `w` is not `rows[_].len() x n`, or there are not so many rows.
    #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl")]
    pub unsafe fn tile(&self, first: usize, w: &[u64], rows: &mut [&mut [u64]]) {
        let (n, m) = (self.n, rows.first().map_or(0, |r| r.len()));
        assert!(w.len() == m * n && rows.iter().all(|r| r.len() == m) && first + rows.len() <= self.rows);
        let mut digits = vec![Register([0.0; LANES]); 3 * 2 * self.cut.columns.min(n).div_ceil(LANES)];
        for from in (0..n).step_by(self.cut.columns) {
            let to = n.min(from + self.cut.columns);
            let each = 2 * (to - from).div_ceil(LANES);
            let x = &self.blocks[2 * self.rows * from / LANES + first * each..][..rows.len() * each];
            let mut j = 0;
            while j < m {
                let wide = (m - j).min(3);
                for (q, out) in digits.chunks_exact_mut(each).take(wide).enumerate() {
                    self.cut.digits(&w[(j + q) * n + from..(j + q) * n + to], out);
                }
                let w = &digits[..wide * each];
                match wide {
                    3 => self.columns::<3>(x, w, each, rows, j),
                    2 => self.columns::<2>(x, w, each, rows, j),
                    _ => self.columns::<1>(x, w, each, rows, j),
                }
                j += wide;
            }
        }
    }

    /// A block of columns of all rows of `x` by `M` rows of `w`.
    #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl")]
    fn columns<const M: usize>(&self, x: &[Register], w: &[Register], each: usize, rows: &mut [&mut [u64]], j: usize) {
        let mut s = 0;
        while s < rows.len() {
            let (x, rows) = (&x[s * each..], &mut rows[s..]);
            s += match rows.len() {
                4.. => block::<4, M>(self.cut.low, x, w, each, rows, j),
                2.. => block::<2, M>(self.cut.low, x, w, each, rows, j),
                _ => block::<1, M>(self.cut.low, x, w, each, rows, j),
            };
        }
    }
}

/// `T` rows of digits of `x` by `M` of `w`, added at column `j` of the first `T` of `rows`; gives `T`.
#[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl")]
fn block<const T: usize, const M: usize>(
    low: u32,
    x: &[Register],
    w: &[Register],
    each: usize,
    rows: &mut [&mut [u64]],
    j: usize,
) -> usize {
    assert!(x.len() >= T * each && w.len() >= M * each && each.is_multiple_of(2));
    let mut products = [[_mm512_setzero_pd(); M]; T];
    let mut mixed = [[_mm512_setzero_pd(); M]; T];
    let mut i = 0;
    while i < each {
        // SAFETY: rows s < T of x and q < M of w have `each` registers, an even number, and i + 1 is below it.
        let ([w0, w1], x): ([[__m512d; M]; 2], _) = unsafe {
            let at = |q: usize, d: usize| _mm512_loadu_pd(w.as_ptr().add(q * each + i + d).cast());
            ([std::array::from_fn(|q| at(q, 0)), std::array::from_fn(|q| at(q, 1))], x.as_ptr().add(i))
        };
        for s in 0..T {
            // SAFETY: as above.
            let (x0, x1) = unsafe {
                let at = x.add(s * each);
                (_mm512_loadu_pd(at.cast()), _mm512_loadu_pd(at.add(1).cast()))
            };
            for q in 0..M {
                products[s][q] = _mm512_fmadd_pd(x0, w0[q], products[s][q]);
                mixed[s][q] = _mm512_fmadd_pd(x0, w1[q], mixed[s][q]);
            }
            for q in 0..M {
                mixed[s][q] = _mm512_fmadd_pd(x1, w0[q], mixed[s][q]);
            }
        }
        i += 2;
    }
    let up = _mm_cvtsi32_si128(low as i32);
    for s in 0..T {
        for (q, out) in rows[s][j..j + M].iter_mut().enumerate() {
            let mixed = _mm512_sll_epi64(_mm512_cvtpd_epi64(mixed[s][q]), up);
            let sum = _mm512_reduce_add_epi64(_mm512_add_epi64(_mm512_cvtpd_epi64(products[s][q]), mixed));
            *out = out.wrapping_add(sum as u64);
        }
    }
    T
}
