//! The AVX2 form of the matrix product. There is no 64-bit product, so 32-bit ones are summed in two accumulators, the
//! second of which is shifted up by 32 at the very end: for ring weights `x w = xl wl + 2^32 (xl wh + xh wl)`, three
//! products; for weights of at most 32 signed bits `x = xl + 2^32 xh` with `xl` SIGNED, and two signed products do.

use std::arch::x86_64::*;

/// Four weights ready for 32-bit products.
pub trait Load: Copy + super::portable::Widen {
    /// Four from `p`, as 64-bit lanes.
    ///
    /// # Safety
    /// `p` is valid for four reads; the processor has AVX2.
    unsafe fn load(p: *const Self) -> __m256i;
    /// The high part of four ring words that goes with [`Load::step`].
    ///
    /// # Safety
    /// The processor has AVX2.
    unsafe fn high(x: __m256i) -> __m256i;
    /// The two accumulators after one product more of `x` (its high part `xh`) and `w`.
    ///
    /// # Safety
    /// The processor has AVX2.
    unsafe fn step(acc: [__m256i; 2], x: __m256i, xh: __m256i, w: __m256i) -> [__m256i; 2];
}

impl Load for u64 {
    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn load(p: *const Self) -> __m256i {
        // SAFETY: the caller's.
        unsafe { _mm256_loadu_si256(p.cast()) }
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn high(x: __m256i) -> __m256i {
        _mm256_srli_epi64::<32>(x)
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn step([low, high]: [__m256i; 2], x: __m256i, xh: __m256i, w: __m256i) -> [__m256i; 2] {
        let cross = _mm256_add_epi64(_mm256_mul_epu32(xh, w), _mm256_mul_epu32(x, _mm256_srli_epi64::<32>(w)));
        [_mm256_add_epi64(low, _mm256_mul_epu32(x, w)), _mm256_add_epi64(high, cross)]
    }
}

/// The high part that makes up for a low part read as signed: one more where bit 31 is set.
#[target_feature(enable = "avx2")]
#[inline]
fn high_of_signed_low(x: __m256i) -> __m256i {
    _mm256_srli_epi64::<32>(_mm256_add_epi64(x, _mm256_set1_epi64x(1 << 31)))
}

#[target_feature(enable = "avx2")]
#[inline]
fn signed_step([low, high]: [__m256i; 2], x: __m256i, xh: __m256i, w: __m256i) -> [__m256i; 2] {
    [_mm256_add_epi64(low, _mm256_mul_epi32(x, w)), _mm256_add_epi64(high, _mm256_mul_epi32(xh, w))]
}

impl Load for i32 {
    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn load(p: *const Self) -> __m256i {
        // SAFETY: the caller's.
        _mm256_cvtepi32_epi64(unsafe { _mm_loadu_si128(p.cast()) })
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn high(x: __m256i) -> __m256i {
        high_of_signed_low(x)
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn step(acc: [__m256i; 2], x: __m256i, xh: __m256i, w: __m256i) -> [__m256i; 2] {
        signed_step(acc, x, xh, w)
    }
}

impl Load for i16 {
    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn load(p: *const Self) -> __m256i {
        // SAFETY: the caller's.
        _mm256_cvtepi16_epi64(unsafe { _mm_loadl_epi64(p.cast()) })
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn high(x: __m256i) -> __m256i {
        high_of_signed_low(x)
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn step(acc: [__m256i; 2], x: __m256i, xh: __m256i, w: __m256i) -> [__m256i; 2] {
        signed_step(acc, x, xh, w)
    }
}

impl Load for i8 {
    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn load(p: *const Self) -> __m256i {
        // SAFETY: the caller's.
        _mm256_cvtepi8_epi64(unsafe { _mm_cvtsi32_si128(p.cast::<i32>().read_unaligned()) })
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn high(x: __m256i) -> __m256i {
        high_of_signed_low(x)
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    unsafe fn step(acc: [__m256i; 2], x: __m256i, xh: __m256i, w: __m256i) -> [__m256i; 2] {
        signed_step(acc, x, xh, w)
    }
}

/// `rows[s][j] += sum_i x[s n + i] w[j stride + i]`.
///
/// # Safety
/// The processor has AVX2.
///
/// # Panics
/// If `x` is not `rows.len() x n` or `w` not `rows[_].len() x n`.
#[target_feature(enable = "avx2")]
pub unsafe fn tile<W: Load>(x: &[u64], w: &[W], stride: usize, n: usize, rows: &mut [&mut [u64]]) {
    let m = rows.first().map_or(0, |r| r.len());
    assert!(x.len() == rows.len() * n && w.len() >= (m - 1) * stride + n && rows.iter().all(|r| r.len() == m));
    let mut j = 0;
    while j < m {
        let wide = if m - j >= 2 { 2 } else { 1 };
        let w = &w[j * stride..];
        let mut s = 0;
        while s < rows.len() {
            let x = &x[s * n..];
            let rows = &mut rows[s..];
            s += match (rows.len(), wide) {
                (2.., 2) => block::<W, 2, 2>(x, w, stride, n, rows, j),
                (_, 2) => block::<W, 1, 2>(x, w, stride, n, rows, j),
                (2.., _) => block::<W, 2, 1>(x, w, stride, n, rows, j),
                _ => block::<W, 1, 1>(x, w, stride, n, rows, j),
            };
        }
        j += wide;
    }
}

/// `T` rows of `x` by `M` rows of `w`, added at column `j` of the first `T` of `rows`; gives `T`.
#[target_feature(enable = "avx2")]
fn block<W: Load, const T: usize, const M: usize>(
    x: &[u64],
    w: &[W],
    stride: usize,
    n: usize,
    rows: &mut [&mut [u64]],
    j: usize,
) -> usize {
    assert!(x.len() >= T * n && w.len() >= (M - 1) * stride + n);
    let mut acc = [[[_mm256_setzero_si256(); 2]; M]; T];
    let whole = n - n % 4;
    let mut i = 0;
    while i < whole {
        // SAFETY: row s < T of x and row q < M of w hold n elements each from s n and q stride, and i + 4 <= n.
        unsafe {
            let xs: [__m256i; T] = std::array::from_fn(|s| <u64 as Load>::load(x.as_ptr().add(s * n + i)));
            let xh: [__m256i; T] = std::array::from_fn(|s| W::high(xs[s]));
            let ws: [__m256i; M] = std::array::from_fn(|q| W::load(w.as_ptr().add(q * stride + i)));
            for s in 0..T {
                for q in 0..M {
                    acc[s][q] = W::step(acc[s][q], xs[s], xh[s], ws[q]);
                }
            }
        }
        i += 4;
    }
    for (s, (row, acc)) in rows.iter_mut().zip(acc).enumerate() {
        for (q, (out, [low, high])) in row[j..j + M].iter_mut().zip(acc).enumerate() {
            let sum = _mm256_add_epi64(low, _mm256_slli_epi64::<32>(high));
            let half = _mm_add_epi64(_mm256_castsi256_si128(sum), _mm256_extracti128_si256::<1>(sum));
            let sum = (_mm_extract_epi64::<0>(half) as u64).wrapping_add(_mm_extract_epi64::<1>(half) as u64);
            let rest =
                (whole..n).fold(sum, |a, i| a.wrapping_add(x[s * n + i].wrapping_mul(w[q * stride + i].widen())));
            *out = out.wrapping_add(rest);
        }
    }
    T
}

/// `y += s x`, for slices of equal length.
///
/// # Safety
/// The processor has AVX2.
#[target_feature(enable = "avx2")]
pub unsafe fn axpy(s: u64, x: &[u64], y: &mut [u64]) {
    let factor = _mm256_set1_epi64x(s as i64);
    let (xs, x_rest) = x.as_chunks::<4>();
    let (ys, y_rest) = y.as_chunks_mut::<4>();
    for (x, y) in xs.iter().zip(ys) {
        // SAFETY: both point at four words; the processor has AVX2.
        unsafe {
            let x = <u64 as Load>::load(x.as_ptr());
            let start = [<u64 as Load>::load(y.as_ptr()), _mm256_setzero_si256()];
            let [low, high] = <u64 as Load>::step(start, x, <u64 as Load>::high(x), factor);
            _mm256_storeu_si256(y.as_mut_ptr().cast(), _mm256_add_epi64(low, _mm256_slli_epi64::<32>(high)));
        }
    }
    super::portable::axpy(s, x_rest, y_rest);
}
