//! The AVX-512 form of the matrix product: `vpmullq` on eight lanes, up to four rows of `x` by four rows of `w` in
//! registers.

use std::arch::x86_64::*;

/// Eight weights as eight ring words.
pub trait Load: Copy {
    /// Eight from `p`.
    ///
    /// # Safety
    /// `p` is valid for eight reads; the processor has AVX-512 F, BW and VL.
    unsafe fn load(p: *const Self) -> __m512i;
    /// Those from `p` whose bit in `lanes` is set, zero elsewhere.
    ///
    /// # Safety
    /// `p` is valid for reads of the set lanes; the processor has AVX-512 F, BW and VL.
    unsafe fn load_some(lanes: __mmask8, p: *const Self) -> __m512i;
}

impl Load for u64 {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    #[inline]
    unsafe fn load(p: *const Self) -> __m512i {
        // SAFETY: the caller's.
        unsafe { _mm512_loadu_si512(p.cast()) }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    #[inline]
    unsafe fn load_some(lanes: __mmask8, p: *const Self) -> __m512i {
        // SAFETY: the caller's.
        unsafe { _mm512_maskz_loadu_epi64(lanes, p.cast()) }
    }
}

impl Load for i32 {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    #[inline]
    unsafe fn load(p: *const Self) -> __m512i {
        // SAFETY: the caller's.
        _mm512_cvtepi32_epi64(unsafe { _mm256_loadu_si256(p.cast()) })
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    #[inline]
    unsafe fn load_some(lanes: __mmask8, p: *const Self) -> __m512i {
        // SAFETY: the caller's.
        _mm512_cvtepi32_epi64(unsafe { _mm256_maskz_loadu_epi32(lanes, p) })
    }
}

impl Load for i16 {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    #[inline]
    unsafe fn load(p: *const Self) -> __m512i {
        // SAFETY: the caller's.
        _mm512_cvtepi16_epi64(unsafe { _mm_loadu_si128(p.cast()) })
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    #[inline]
    unsafe fn load_some(lanes: __mmask8, p: *const Self) -> __m512i {
        // SAFETY: the caller's.
        _mm512_cvtepi16_epi64(unsafe { _mm_maskz_loadu_epi16(lanes, p) })
    }
}

/// `rows[s][j] += sum_i x[s n + i] w[j n + i]`.
///
/// # Safety
/// The processor has AVX-512 F, DQ, BW and VL.
///
/// # Panics
/// If `x` is not `rows.len() x n` or `w` not `rows[_].len() x n`.
#[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl")]
pub unsafe fn tile<W: Load>(x: &[u64], w: &[W], n: usize, rows: &mut [&mut [u64]]) {
    let m = rows.first().map_or(0, |r| r.len());
    assert!(x.len() == rows.len() * n && w.len() == m * n && rows.iter().all(|r| r.len() == m));
    let mut j = 0;
    while j < m {
        let wide = if m - j >= 4 { 4 } else { 1 };
        let w = &w[j * n..][..wide * n];
        let mut s = 0;
        while s < rows.len() {
            let x = &x[s * n..];
            let rows = &mut rows[s..];
            s += match (rows.len(), wide) {
                (4.., 4) => block::<W, 4, 4>(x, w, n, rows, j),
                (2.., 4) => block::<W, 2, 4>(x, w, n, rows, j),
                (_, 4) => block::<W, 1, 4>(x, w, n, rows, j),
                (4.., _) => block::<W, 4, 1>(x, w, n, rows, j),
                (2.., _) => block::<W, 2, 1>(x, w, n, rows, j),
                _ => block::<W, 1, 1>(x, w, n, rows, j),
            };
        }
        j += wide;
    }
}

/// `T` rows of `x` by `M` rows of `w`, added at column `j` of the first `T` of `rows`; gives `T`.
#[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl")]
fn block<W: Load, const T: usize, const M: usize>(
    x: &[u64],
    w: &[W],
    n: usize,
    rows: &mut [&mut [u64]],
    j: usize,
) -> usize {
    assert!(x.len() >= T * n && w.len() >= M * n);
    let mut acc = [[_mm512_setzero_si512(); M]; T];
    let whole = n - n % 8;
    let mut i = 0;
    while i < whole {
        // SAFETY: row s < T of x and row q < M of w hold n elements each from s n and q n, and i + 8 <= n.
        let (xs, ws): ([__m512i; T], [__m512i; M]) = unsafe {
            (
                std::array::from_fn(|s| <u64 as Load>::load(x.as_ptr().add(s * n + i))),
                std::array::from_fn(|q| W::load(w.as_ptr().add(q * n + i))),
            )
        };
        for s in 0..T {
            for q in 0..M {
                acc[s][q] = _mm512_add_epi64(acc[s][q], _mm512_mullo_epi64(xs[s], ws[q]));
            }
        }
        i += 8;
    }
    if i < n {
        let lanes = (1u8 << (n - i)) - 1;
        // SAFETY: as above; the lanes set are those below n.
        let (xs, ws): ([__m512i; T], [__m512i; M]) = unsafe {
            (
                std::array::from_fn(|s| <u64 as Load>::load_some(lanes, x.as_ptr().add(s * n + i))),
                std::array::from_fn(|q| W::load_some(lanes, w.as_ptr().add(q * n + i))),
            )
        };
        for s in 0..T {
            for q in 0..M {
                acc[s][q] = _mm512_add_epi64(acc[s][q], _mm512_mullo_epi64(xs[s], ws[q]));
            }
        }
    }
    for (row, acc) in rows.iter_mut().zip(acc) {
        for (out, acc) in row[j..j + M].iter_mut().zip(acc) {
            *out = out.wrapping_add(_mm512_reduce_add_epi64(acc) as u64);
        }
    }
    T
}

/// `y += s x`, for slices of equal length.
///
/// # Safety
/// The processor has AVX-512 F, DQ, BW and VL.
#[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl")]
pub unsafe fn axpy(s: u64, x: &[u64], y: &mut [u64]) {
    let factor = _mm512_set1_epi64(s as i64);
    let (xs, x_rest) = x.as_chunks::<8>();
    let (ys, y_rest) = y.as_chunks_mut::<8>();
    for (x, y) in xs.iter().zip(ys) {
        // SAFETY: both point at eight words.
        unsafe {
            let sum = _mm512_add_epi64(
                _mm512_loadu_si512(y.as_ptr().cast()),
                _mm512_mullo_epi64(factor, _mm512_loadu_si512(x.as_ptr().cast())),
            );
            _mm512_storeu_si512(y.as_mut_ptr().cast(), sum);
        }
    }
    super::portable::axpy(s, x_rest, y_rest);
}
