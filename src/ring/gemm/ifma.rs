//! Ring words times ring words modulo `2^k`, `k <= 52`, by `vpmadd52luq`: the low 52 bits of a product of 52-bit words, added to
//! a 64-bit lane; one instruction for eight multiply-adds. A lane's sum wraps at 2^64, a multiple of `2^52`.

use std::arch::x86_64::*;

/// The widest ring.
pub const WIDEST: u32 = 52;
/// Columns of a block: four rows of either operand stay in the L1 cache.
const COLUMNS: usize = 512;
/// Lanes of a register.
const LANES: usize = 8;

/// `rows[s][j] += sum_i x[s n + i] w[j n + i]`; bits from 52 on mean nothing.
///
/// # Safety
/// The processor has AVX-512 F and IFMA.
///
/// # Panics
/// If `x` is not `rows.len() x n` or `w` not `rows[_].len() x n`.
#[target_feature(enable = "avx512f,avx512ifma")]
pub unsafe fn tile(x: &[u64], w: &[u64], n: usize, rows: &mut [&mut [u64]]) {
    let m = rows.first().map_or(0, |r| r.len());
    assert!(x.len() == rows.len() * n && w.len() == m * n && rows.iter().all(|r| r.len() == m));
    for from in (0..n).step_by(COLUMNS) {
        let (len, mut j) = (COLUMNS.min(n - from), 0);
        while j < m {
            let wide = if m - j >= 4 { 4 } else { 1 };
            let w = &w[j * n + from..];
            let mut s = 0;
            while s < rows.len() {
                let x = &x[s * n + from..];
                let rows = &mut rows[s..];
                s += match (rows.len(), wide) {
                    (4.., 4) => block::<4, 4>(x, w, n, len, rows, j),
                    (_, 4) => block::<1, 4>(x, w, n, len, rows, j),
                    (4.., _) => block::<4, 1>(x, w, n, len, rows, j),
                    _ => block::<1, 1>(x, w, n, len, rows, j),
                };
            }
            j += wide;
        }
    }
}

/// The first `len` columns of `T` rows of `x` by `M` of `w`, added at column `j` of the first `T` of `rows`; gives `T`.
#[target_feature(enable = "avx512f,avx512ifma")]
fn block<const T: usize, const M: usize>(
    x: &[u64],
    w: &[u64],
    n: usize,
    len: usize,
    rows: &mut [&mut [u64]],
    j: usize,
) -> usize {
    assert!(x.len() >= (T - 1) * n + len && w.len() >= (M - 1) * n + len);
    let mut acc = [[_mm512_setzero_si512(); M]; T];
    let mut i = 0;
    while i < len {
        let lanes = u8::MAX >> (LANES - LANES.min(len - i));
        // SAFETY: row s < T of x and row q < M of w hold `len` elements each from s n and q n, and only lanes below are read.
        let (xs, ws): ([__m512i; T], [__m512i; M]) = unsafe {
            (
                std::array::from_fn(|s| _mm512_maskz_loadu_epi64(lanes, x.as_ptr().add(s * n + i).cast())),
                std::array::from_fn(|q| _mm512_maskz_loadu_epi64(lanes, w.as_ptr().add(q * n + i).cast())),
            )
        };
        for s in 0..T {
            for q in 0..M {
                acc[s][q] = _mm512_madd52lo_epu64(acc[s][q], xs[s], ws[q]);
            }
        }
        i += LANES;
    }
    for (row, acc) in rows.iter_mut().zip(acc) {
        for (out, acc) in row[j..j + M].iter_mut().zip(acc) {
            *out = out.wrapping_add(_mm512_reduce_add_epi64(acc) as u64);
        }
    }
    T
}
