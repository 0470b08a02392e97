//! NEON forms of the products. It has no 64-bit multiplication: ring words meet in halves of 32 bits, and weights of 8 or 16 bits meet the
//! bytes of ring words by `sdot` (of the dot product extension, ARMv8.2), sixteen multiply-adds of bytes an instruction.

use std::arch::aarch64::*;
use std::arch::asm;

use super::portable::{self, Widen};

/// Columns of ring words that meet at once.
const LANES: usize = 4;
/// Columns of bytes.
const DEEP: usize = 16;
/// Chunks of [`DEEP`] columns over which sums stay exact: each adds at most `2 x 4 x 2^14` to a lane of 32 bits.
const EXACT: usize = 1 << 12;

/// A weight of which four columns are loaded as words: their low halves and their high ones.
pub trait Load: Widen + Default {
    /// From `p` on.
    ///
    /// # Safety
    /// `p` is valid for reading four; the processor has NEON.
    unsafe fn load(p: *const Self) -> [uint32x4_t; 2];
}

#[target_feature(enable = "neon")]
fn extended(v: int32x4_t) -> [uint32x4_t; 2] {
    [vreinterpretq_u32_s32(v), vreinterpretq_u32_s32(vshrq_n_s32::<31>(v))]
}

impl Load for u64 {
    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn load(p: *const Self) -> [uint32x4_t; 2] {
        // SAFETY: the caller's.
        let halves = unsafe { vld2q_u32(p.cast()) };
        [halves.0, halves.1]
    }
}

impl Load for i32 {
    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn load(p: *const Self) -> [uint32x4_t; 2] {
        // SAFETY: the caller's.
        extended(unsafe { vld1q_s32(p) })
    }
}

impl Load for i16 {
    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn load(p: *const Self) -> [uint32x4_t; 2] {
        // SAFETY: the caller's.
        extended(vmovl_s16(unsafe { vld1_s16(p) }))
    }
}

impl Load for i8 {
    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn load(p: *const Self) -> [uint32x4_t; 2] {
        // SAFETY: the caller's.
        let four = unsafe { p.cast::<u32>().read_unaligned() };
        extended(vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(four.into())))))
    }
}

/// Sums of products of words: of low halves, and of a low half by a high one, which count 2^32 times as much; what these lose by wrapping
/// lies at 2^64.
#[derive(Clone, Copy)]
struct Sum(uint64x2_t, uint32x4_t);

impl Sum {
    #[target_feature(enable = "neon")]
    fn zero() -> Sum {
        Sum(vdupq_n_u64(0), vdupq_n_u32(0))
    }

    #[target_feature(enable = "neon")]
    #[inline]
    fn add(&mut self, x: [uint32x4_t; 2], w: [uint32x4_t; 2]) {
        self.0 = vmlal_u32(self.0, vget_low_u32(x[0]), vget_low_u32(w[0]));
        self.0 = vmlal_high_u32(self.0, x[0], w[0]);
        self.1 = vmlaq_u32(vmlaq_u32(self.1, x[0], w[1]), x[1], w[0]);
    }

    #[target_feature(enable = "neon")]
    fn total(self) -> u64 {
        vaddvq_u64(self.0).wrapping_add(u64::from(vaddvq_u32(self.1)) << 32)
    }
}

/// `rows[s][j] += sum_i x[s n + i] w[j stride + i]`.
///
/// # Safety
/// The processor has NEON.
///
/// # Panics
/// If a slice is shorter.
#[target_feature(enable = "neon")]
pub unsafe fn tile<W: Load>(x: &[u64], w: &[W], stride: usize, n: usize, rows: &mut [&mut [u64]]) {
    let m = rows.first().map_or(0, |r| r.len());
    let (mut j, wide) = (0, |left: usize| if left >= 2 { 2 } else { 1 });
    while j < m {
        let (w, mut s) = (&w[j * stride..], 0);
        while s < rows.len() {
            let (x, rows) = (&x[s * n..], &mut rows[s..]);
            s += match (rows.len(), m - j) {
                (4.., 2..) => block::<4, 2, W>(x, w, (stride, n), rows, j),
                (_, 2..) => block::<1, 2, W>(x, w, (stride, n), rows, j),
                (4.., _) => block::<4, 1, W>(x, w, (stride, n), rows, j),
                _ => block::<1, 1, W>(x, w, (stride, n), rows, j),
            };
        }
        j += wide(m - j);
    }
}

/// `T` rows of `x` by `M` of `w`, added at column `j` of the first `T` of `rows`; gives `T`.
#[target_feature(enable = "neon")]
fn block<const T: usize, const M: usize, W: Load>(
    x: &[u64],
    w: &[W],
    (stride, n): (usize, usize),
    rows: &mut [&mut [u64]],
    j: usize,
) -> usize {
    assert!(x.len() >= (T - 1) * n + n && w.len() >= (M - 1) * stride + n);
    let mut sums = [[Sum::zero(); M]; T];
    let whole = n / LANES * LANES;
    for i in (0..whole).step_by(LANES) {
        // SAFETY: row s < T of x and row q < M of w hold four words each from i on.
        let (xs, ws): ([[uint32x4_t; 2]; T], [[uint32x4_t; 2]; M]) = unsafe {
            (
                std::array::from_fn(|s| u64::load(x.as_ptr().add(s * n + i))),
                std::array::from_fn(|q| W::load(w.as_ptr().add(q * stride + i))),
            )
        };
        for (sums, x) in sums.iter_mut().zip(xs) {
            sums.iter_mut().zip(ws).for_each(|(sum, w)| sum.add(x, w));
        }
    }
    for (s, (row, sums)) in rows.iter_mut().zip(sums).enumerate() {
        for (q, (out, sum)) in row[j..j + M].iter_mut().zip(sums).enumerate() {
            let left = x[s * n + whole..(s + 1) * n].iter().zip(&w[q * stride + whole..q * stride + n]);
            let left = left.fold(0u64, |sum, (x, w)| sum.wrapping_add(x.wrapping_mul(w.widen())));
            *out = out.wrapping_add(sum.total()).wrapping_add(left);
        }
    }
    T
}

/// `c[s m + j] += sum_i x[s n + i] w[i stride + j]`.
///
/// # Safety
/// The processor has NEON.
///
/// # Panics
/// If `x` and `c` have not the same number of rows, or `w` has not `n` of `m`.
#[target_feature(enable = "neon")]
pub unsafe fn weighted(x: &[u64], w: &[u64], stride: usize, n: usize, m: usize, c: &mut [u64]) {
    assert!(x.len() / n == c.len() / m && w.len() >= (n - 1) * stride + m);
    for (x, c) in x.chunks_exact(n).zip(c.chunks_exact_mut(m)) {
        let (wide, last) = c.split_at_mut(m / (2 * LANES) * 2 * LANES);
        for (at, c) in wide.chunks_exact_mut(2 * LANES).enumerate() {
            let mut low = [vdupq_n_u64(0); LANES];
            let mut cross = [vdupq_n_u32(0); 2];
            for (i, &x) in x.iter().enumerate() {
                let [xl, xh] = [vdupq_n_u32(x as u32), vdupq_n_u32((x >> 32) as u32)];
                for v in 0..2 {
                    // SAFETY: row i < n of w has these four words.
                    let [wl, wh] = unsafe { u64::load(w.as_ptr().add(i * stride + (2 * at + v) * LANES)) };
                    low[2 * v] = vmlal_u32(low[2 * v], vget_low_u32(wl), vget_low_u32(xl));
                    low[2 * v + 1] = vmlal_high_u32(low[2 * v + 1], wl, xl);
                    cross[v] = vmlaq_u32(vmlaq_u32(cross[v], wl, xh), wh, xl);
                }
            }
            for (v, c) in c.chunks_exact_mut(2).enumerate() {
                let cross = if v % 2 == 0 { vget_low_u32(cross[v / 2]) } else { vget_high_u32(cross[v / 2]) };
                let sum = vaddq_u64(low[v], vshlq_n_u64::<32>(vmovl_u32(cross)));
                // SAFETY: two words.
                unsafe { vst1q_u64(c.as_mut_ptr(), vaddq_u64(vld1q_u64(c.as_ptr()), sum)) };
            }
        }
        let from = wide.len();
        if !last.is_empty() {
            x.iter().zip(w.chunks(stride)).for_each(|(x, w)| portable::axpy(*x, &w[from..m], last));
        }
    }
}

/// A weight of one byte or two.
pub trait Bytes: Copy + Default {
    /// Whether it has two.
    const TWO: bool;

    /// Sixteen from `p` on as signed bytes `[low, high]`: a weight of one is `low`, one of two `256 high + low + 128`.
    ///
    /// # Safety
    /// `p` is valid for reading sixteen; the processor has NEON.
    unsafe fn load(p: *const Self) -> [int8x16_t; 2];
}

impl Bytes for i8 {
    const TWO: bool = false;

    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn load(p: *const Self) -> [int8x16_t; 2] {
        // SAFETY: the caller's.
        [unsafe { vld1q_s8(p) }, vdupq_n_s8(0)]
    }
}

impl Bytes for i16 {
    const TWO: bool = true;

    #[target_feature(enable = "neon")]
    #[inline]
    unsafe fn load(p: *const Self) -> [int8x16_t; 2] {
        // SAFETY: the caller's.
        let bytes = unsafe { vld2q_s8(p.cast()) };
        [veorq_s8(bytes.0, vdupq_n_s8(i8::MIN)), bytes.1]
    }
}

/// Rows of words, cut into signed bytes: chunk by chunk of [`DEEP`] columns, in it byte by byte. Behind the last column are zeros.
pub struct Digits {
    n: usize,
    bytes: usize,
    chunks: Vec<[i8; DEEP]>,
    /// Of each row the sum of its words.
    sums: Vec<u64>,
}

impl Digits {
    /// Of rows of `n` words, for products modulo `2^k`.
    pub fn cut(x: &[u64], n: usize, k: u32) -> Digits {
        let bytes = k.div_ceil(8) as usize;
        let mut chunks = vec![[0; DEEP]; x.len() / n * n.div_ceil(DEEP) * bytes];
        let words = x.chunks_exact(n).flat_map(|row| row.chunks(DEEP));
        for (words, out) in words.zip(chunks.chunks_exact_mut(bytes)) {
            for (i, &word) in words.iter().enumerate() {
                let mut left = word;
                for out in out.iter_mut() {
                    let digit = left as i8;
                    // What a negative digit takes away, the next gives back.
                    left = left.wrapping_sub(digit as u64) >> 8;
                    out[i] = digit;
                }
            }
        }
        let sum = |row: &[u64]| row.iter().fold(0u64, |sum, x| sum.wrapping_add(*x));
        Digits { n, bytes, chunks, sums: x.chunks_exact(n).map(sum).collect() }
    }

    /// `rows[s][j] += sum_i x[first + s][i] w[j n + i]`, modulo the `2^k` that the words were cut for; higher bits mean nothing.
    ///
    /// # Safety
    /// The processor has NEON and its dot product extension.
    ///
    /// # Panics
    /// If `w` is not `rows[_].len() x n`, or there are not so many rows.
    #[target_feature(enable = "neon,dotprod")]
    pub unsafe fn tile<W: Bytes>(&self, first: usize, w: &[W], rows: &mut [&mut [u64]]) {
        match self.bytes {
            1 => self.tile_of::<1, W>(first, w, rows),
            2 => self.tile_of::<2, W>(first, w, rows),
            3 => self.tile_of::<3, W>(first, w, rows),
            4 => self.tile_of::<4, W>(first, w, rows),
            5 => self.tile_of::<5, W>(first, w, rows),
            6 => self.tile_of::<6, W>(first, w, rows),
            7 => self.tile_of::<7, W>(first, w, rows),
            _ => self.tile_of::<8, W>(first, w, rows),
        }
    }

    #[target_feature(enable = "neon,dotprod")]
    fn tile_of<const P: usize, W: Bytes>(&self, first: usize, w: &[W], rows: &mut [&mut [u64]]) {
        let (n, m) = (self.n, rows.first().map_or(0, |r| r.len()));
        assert!(w.len() == m * n && rows.iter().all(|r| r.len() == m));
        let len = n.div_ceil(DEEP) * P;
        for (j, w) in (0..m).step_by(2).zip(w.chunks(2 * n)) {
            for (s, row) in rows.iter_mut().enumerate() {
                let x = &self.chunks[(first + s) * len..][..len];
                // 128 times each word is missing from what the bytes of two make.
                let missing = if W::TWO { self.sums[first + s] << 7 } else { 0 };
                let out = &mut row[j..m.min(j + 2)];
                if out.len() == 2 {
                    meet::<P, 2, W>(x, w, n, out)
                } else {
                    meet::<P, 1, W>(x, w, n, out)
                }
                out.iter_mut().for_each(|out| *out = out.wrapping_add(missing));
            }
        }
    }
}

/// One row of `P` bytes by `M` rows of weights.
#[target_feature(enable = "neon,dotprod")]
fn meet<const P: usize, const M: usize, W: Bytes>(x: &[[i8; DEEP]], w: &[W], n: usize, out: &mut [u64]) {
    assert!(x.len() == n.div_ceil(DEEP) * P && w.len() == M * n && out.len() == M);
    for (part, x) in x.chunks(EXACT * P).enumerate() {
        let mut sums = [[vdupq_n_s32(0); P]; M];
        for (i, x) in x.chunks_exact(P).enumerate() {
            let from = (part * EXACT + i) * DEEP;
            // SAFETY: a chunk has `DEEP` bytes of each place; of row q < M of w as many columns are read as there are.
            let (xs, ws): ([int8x16_t; P], [[int8x16_t; 2]; M]) = unsafe {
                (
                    std::array::from_fn(|p| vld1q_s8(x[p].as_ptr())),
                    std::array::from_fn(|q| {
                        if n - from >= DEEP {
                            return W::load(w.as_ptr().add(q * n + from));
                        }
                        // Behind the last column `x` is zero, whatever these are.
                        let mut last = [W::default(); DEEP];
                        last[..n - from].copy_from_slice(&w[q * n + from..(q + 1) * n]);
                        W::load(last.as_ptr())
                    }),
                )
            };
            for (sums, [low, high]) in sums.iter_mut().zip(ws) {
                for p in 0..P {
                    sums[p] = dot(sums[p], xs[p], low);
                    if W::TWO && p > 0 {
                        sums[p] = dot(sums[p], xs[p - 1], high);
                    }
                }
            }
        }
        for (out, sums) in out.iter_mut().zip(sums) {
            for (p, sum) in sums.into_iter().enumerate() {
                *out = out.wrapping_add((vaddlvq_s32(sum) as u64) << (8 * p));
            }
        }
    }
}

/// Adds four products of bytes to each lane. (Its intrinsic is younger than our oldest compiler.)
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn dot(mut sum: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: an instruction of these registers alone, which the processor has.
    unsafe {
        asm!(
            "sdot {sum:v}.4s, {a:v}.16b, {b:v}.16b",
            sum = inout(vreg) sum, a = in(vreg) a, b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}
