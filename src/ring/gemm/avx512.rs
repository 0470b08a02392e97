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

impl Load for i8 {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    #[inline]
    unsafe fn load(p: *const Self) -> __m512i {
        // SAFETY: the caller's.
        _mm512_cvtepi8_epi64(unsafe { _mm_loadl_epi64(p.cast()) })
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    #[inline]
    unsafe fn load_some(lanes: __mmask8, p: *const Self) -> __m512i {
        // SAFETY: the caller's.
        _mm512_cvtepi8_epi64(unsafe { _mm_maskz_loadu_epi8(lanes.into(), p) })
    }
}

/// `rows[s][j] += sum_i x[s n + i] w[j stride + i]`.
///
/// # Safety
/// The processor has AVX-512 F, DQ, BW and VL.
///
/// # Panics
/// If `x` is not `rows.len() x n` or `w` not `rows[_].len() x n`.
#[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl")]
pub unsafe fn tile<W: Load>(x: &[u64], w: &[W], stride: usize, n: usize, rows: &mut [&mut [u64]]) {
    let m = rows.first().map_or(0, |r| r.len());
    assert!(x.len() == rows.len() * n && w.len() >= (m - 1) * stride + n && rows.iter().all(|r| r.len() == m));
    let mut j = 0;
    while j < m {
        let wide = if m - j >= 4 { 4 } else { 1 };
        let w = &w[j * stride..];
        let mut s = 0;
        while s < rows.len() {
            let x = &x[s * n..];
            let rows = &mut rows[s..];
            s += match (rows.len(), wide) {
                (4.., 4) => block::<W, 4, 4>(x, w, stride, n, rows, j),
                (2.., 4) => block::<W, 2, 4>(x, w, stride, n, rows, j),
                (_, 4) => block::<W, 1, 4>(x, w, stride, n, rows, j),
                (4.., _) => block::<W, 4, 1>(x, w, stride, n, rows, j),
                (2.., _) => block::<W, 2, 1>(x, w, stride, n, rows, j),
                _ => block::<W, 1, 1>(x, w, stride, n, rows, j),
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
    stride: usize,
    n: usize,
    rows: &mut [&mut [u64]],
    j: usize,
) -> usize {
    assert!(x.len() >= T * n && w.len() >= (M - 1) * stride + n);
    let mut acc = [[_mm512_setzero_si512(); M]; T];
    let whole = n - n % 8;
    let mut i = 0;
    while i < whole {
        // SAFETY: row s < T of x and row q < M of w hold n elements each from s n and q stride, and i + 8 <= n.
        let (xs, ws): ([__m512i; T], [__m512i; M]) = unsafe {
            (
                std::array::from_fn(|s| <u64 as Load>::load(x.as_ptr().add(s * n + i))),
                std::array::from_fn(|q| W::load(w.as_ptr().add(q * stride + i))),
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
                std::array::from_fn(|q| W::load_some(lanes, w.as_ptr().add(q * stride + i))),
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

/// `c[s m + j] += sum_i x[s n + i] w[i stride + j]`.
///
/// # Safety
/// The processor has AVX-512 F, DQ, BW and VL.
///
/// # Panics
/// If `x` and `c` have not the same number of rows, or `w` has not `n` of `m`.
#[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl")]
pub unsafe fn weighted(x: &[u64], w: &[u64], stride: usize, n: usize, m: usize, c: &mut [u64]) {
    let t = c.len() / m;
    assert!(x.len() == t * n && c.len() == t * m && w.len() >= (n - 1) * stride + m);
    let mut s = 0;
    while s < t {
        let (x, c) = (&x[s * n..], &mut c[s * m..]);
        let mut j = 0;
        while j < m {
            let (w, c) = (&w[j..], &mut c[j..]);
            match (t - s, m - j) {
                (4.., 32..) => columns::<4, 4>(x, w, stride, n, m, c, 32),
                (_, 32..) => columns::<1, 4>(x, w, stride, n, m, c, 32),
                (4.., left) => columns::<4, 1>(x, w, stride, n, m, c, left.min(8)),
                (_, left) => columns::<1, 1>(x, w, stride, n, m, c, left.min(8)),
            }
            j += if m - j >= 32 { 32 } else { 8 };
        }
        s += if t - s >= 4 { 4 } else { 1 };
    }
}

/// `T` rows of `x`, `V` registers of columns of which the last `some - 8 (V - 1)` lanes count.
#[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl")]
fn columns<const T: usize, const V: usize>(
    x: &[u64],
    w: &[u64],
    stride: usize,
    n: usize,
    m: usize,
    c: &mut [u64],
    some: usize,
) {
    assert!(some > 8 * (V - 1) && some <= 8 * V);
    assert!(x.len() >= T * n && w.len() >= (n - 1) * stride + some && c.len() >= (T - 1) * m + some);
    let lanes = |v: usize| if v + 1 < V { u8::MAX } else { u8::MAX >> (8 * V - some) };
    let mut acc = [[_mm512_setzero_si512(); V]; T];
    for i in 0..n {
        // SAFETY: row i < n of w holds `some` words, and only lanes below are read.
        let ws: [__m512i; V] = unsafe {
            std::array::from_fn(|v| _mm512_maskz_loadu_epi64(lanes(v), w.as_ptr().add(i * stride + 8 * v).cast()))
        };
        for s in 0..T {
            let factor = _mm512_set1_epi64(x[s * n + i] as i64);
            for v in 0..V {
                acc[s][v] = _mm512_add_epi64(acc[s][v], _mm512_mullo_epi64(factor, ws[v]));
            }
        }
    }
    for (s, acc) in acc.into_iter().enumerate() {
        for (v, acc) in acc.into_iter().enumerate() {
            // SAFETY: row s < T of c holds `some` words, and only lanes below are read and written.
            unsafe {
                let at = c.as_mut_ptr().add(s * m + 8 * v).cast::<i64>();
                let sum = _mm512_add_epi64(_mm512_maskz_loadu_epi64(lanes(v), at), acc);
                _mm512_mask_storeu_epi64(at, lanes(v), sum);
            }
        }
    }
}
