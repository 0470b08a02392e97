//! Weights of 16 bits (or 8, widened when they are loaded) times ring words by `vpmaddwd`: the words are cut into digits once,
//! each digit's plane meets the weights as 16-bit integers, and the sums are put together at the end. Per 32 multiply-adds one instruction and one addition a plane,
//! where `vpmullq` takes four of each and its three parts.
//!
//! The top two digits have 16 bits: what their 32-bit sums lose by wrapping lies at 2^k or above. The digits below have 8 bits,
//! so that their sums over [`EXACT`] columns fit 32 bits and are exact. All are signed; a digit's carry goes to the next.

use std::arch::x86_64::*;

/// A weight that `vpmaddwd` takes, as 16 bits.
pub trait Load: Copy + Default {
    /// Those of 32 from `p` whose bit in `lanes` is set, zero elsewhere.
    ///
    /// # Safety
    /// `p` is valid for reads of the set lanes; the processor has AVX-512 F, BW and VL.
    unsafe fn load(lanes: u32, p: *const Self) -> __m512i;
}

impl Load for i16 {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    #[inline]
    unsafe fn load(lanes: u32, p: *const Self) -> __m512i {
        // SAFETY: the caller's.
        unsafe { _mm512_maskz_loadu_epi16(lanes, p) }
    }
}

impl Load for i8 {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    #[inline]
    unsafe fn load(lanes: u32, p: *const Self) -> __m512i {
        // SAFETY: the caller's.
        _mm512_cvtepi8_epi16(unsafe { _mm256_maskz_loadu_epi8(lanes, p) })
    }
}

/// Columns in one register.
const LANES: usize = 32;
/// Columns over which an 8-bit digit's sums stay exact: a step adds at most 2 x 2^15 x 2^7 to a lane.
const EXACT: usize = 128 * LANES;

/// Planes that products modulo `2^k` need.
pub fn planes(k: u32) -> usize {
    match k {
        ..=32 => 2,
        33..=48 => 4,
        _ => 6,
    }
}

/// A register in memory: one that straddles two cache lines is loaded at half the speed.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Register([i16; LANES]);

/// Rows of words, cut: `LANES` columns of each plane in turn, zeros behind the last column.
pub struct Digits {
    planes: usize,
    n: usize,
    words: Vec<Register>,
}

impl Digits {
    /// Of rows of `n` words, for products modulo `2^k`.
    pub fn cut(x: &[u64], n: usize, k: u32) -> Digits {
        let planes = planes(k);
        let mut words = vec![Register([0; LANES]); x.len() / n * n.div_ceil(LANES) * planes];
        let groups = x.chunks_exact(n).flat_map(|row| row.chunks(LANES));
        for (group, out) in groups.zip(words.chunks_exact_mut(planes)) {
            let mut v = [0; LANES];
            v[..group.len()].copy_from_slice(group);
            let (last, small) = (planes - 2, 8 * (planes as u32 - 2));
            for (p, out) in out.iter_mut().enumerate() {
                let bits = if p < last { 8 } else { 16 };
                for (v, out) in v.iter_mut().zip(&mut out.0) {
                    let digit = (*v << (64 - bits)) as i64 >> (64 - bits);
                    *v = v.wrapping_sub(digit as u64) >> bits;
                    *out = digit as i16;
                }
            }
            debug_assert!(small + 32 >= k.min(64));
        }
        Digits { planes, n, words }
    }

    /// Row `s`.
    fn row(&self, s: usize) -> &[Register] {
        let len = self.n.div_ceil(LANES) * self.planes;
        &self.words[s * len..][..len]
    }

    /// `rows[s][j] += sum_i x[first + s][i] w[j n + i]`, modulo the `2^k` that the digits were cut for; higher bits mean nothing.
    ///
    /// # Safety
    /// The processor has AVX-512 F, DQ, BW and VL.
    ///
    /// # Panics
    /// If `w` is not `rows[_].len() x n`, or there are not so many rows.
    #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl")]
    pub unsafe fn tile<W: Load>(&self, first: usize, w: &[W], rows: &mut [&mut [u64]]) {
        match self.planes {
            2 => self.tile_of::<2, W>(first, w, rows),
            4 => self.tile_of::<4, W>(first, w, rows),
            _ => self.tile_of::<6, W>(first, w, rows),
        }
    }

    #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl")]
    fn tile_of<const P: usize, W: Load>(&self, first: usize, w: &[W], rows: &mut [&mut [u64]]) {
        let (n, m) = (self.n, rows.first().map_or(0, |r| r.len()));
        assert!(w.len() == m * n && rows.iter().all(|r| r.len() == m));
        let mut j = 0;
        while j < m {
            let wide = if m - j >= 4 { 4 } else { 1 };
            let w = &w[j * n..][..wide * n];
            for (s, row) in rows.iter_mut().enumerate() {
                let (x, out) = (self.row(first + s), &mut row[j..j + wide]);
                if wide == 4 {
                    block::<P, 4, W>(x, w, (n, s == 0), out)
                } else {
                    block::<P, 1, W>(x, w, (n, false), out)
                }
            }
            j += wide;
        }
    }
}

/// One row of digits by `M` rows of weights. `ahead` asks for the `M` that come next.
#[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl")]
fn block<const P: usize, const M: usize, W: Load>(x: &[Register], w: &[W], (n, ahead): (usize, bool), out: &mut [u64]) {
    assert!(x.len() == n.div_ceil(LANES) * P && w.len() == M * n && out.len() == M);
    let mut from = 0;
    while from < n {
        let to = n.min(from + EXACT);
        let mut acc = [[_mm512_setzero_si512(); P]; M];
        let mut i = from;
        while i < to {
            let lanes = if n - i >= LANES { u32::MAX } else { (1 << (n - i)) - 1 };
            // Whole rows: the processor itself does not look beyond a page, and a row is about as long. A prefetch may have any address.
            if ahead {
                (M..2 * M).for_each(|q| _mm_prefetch::<_MM_HINT_T1>(w.as_ptr().wrapping_add(q * n + i).cast()));
            }
            // SAFETY: digits i / LANES of all planes are there; of row q < M of w, lanes below n are read.
            let (xs, ws): ([__m512i; P], [__m512i; M]) = unsafe {
                (
                    std::array::from_fn(|p| _mm512_loadu_si512(x.as_ptr().add(i / LANES * P + p).cast())),
                    std::array::from_fn(|q| W::load(lanes, w.as_ptr().add(q * n + i))),
                )
            };
            for q in 0..M {
                for p in 0..P {
                    acc[q][p] = _mm512_add_epi32(acc[q][p], _mm512_madd_epi16(xs[p], ws[q]));
                }
            }
            i += LANES;
        }
        for (out, acc) in out.iter_mut().zip(acc) {
            for (p, acc) in acc.into_iter().enumerate() {
                let low = _mm512_cvtepi32_epi64(_mm512_castsi512_si256(acc));
                let high = _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64::<1>(acc));
                let sum = _mm512_reduce_add_epi64(_mm512_add_epi64(low, high)) as u64;
                // 8-bit digits up to the last but one, then two of 16 bits.
                let at = if p + 1 < P { 8 * p } else { 8 * p + 8 };
                *out = out.wrapping_add(sum << at);
            }
        }
        from = to;
    }
}
