//! Panels: two columns of sixteen rows of `w` in each register.

use super::super::planes::Load;
use super::{LANES, OUTPUTS, Register};
use std::arch::x86_64::*;

/// Two columns of sixteen rows of ring words a step: what `cut` makes of them.
#[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl")]
pub(super) fn pack_words<const W: usize>(
    rows: [&[u64]; OUTPUTS],
    panel: &mut [Register],
    cut: impl Fn([__m512i; 4]) -> [__m512i; W],
) {
    let n = rows[0].len();
    assert!(rows.iter().all(|r| r.len() == n) && panel.len() == W * n.div_ceil(2));
    for (i, out) in panel.chunks_mut(4 * W).enumerate() {
        let lanes = ((1u32 << (n - 8 * i).min(8)) - 1) as u8;
        // Of four rows, every second one, two columns in each of four registers.
        let four = |from: usize| {
            // SAFETY: columns of the row whose lanes are set.
            let row = |r: usize| unsafe {
                let at = rows[from + 2 * r].as_ptr().add(8 * i);
                // A prefetch may have any address.
                _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(16).cast());
                _mm512_maskz_loadu_epi64(lanes, at.cast())
            };
            let [a, b, c, d] = [row(0), row(1), row(2), row(3)];
            let (e, f) = (_mm512_shuffle_i64x2::<0x44>(a, b), _mm512_shuffle_i64x2::<0x44>(c, d));
            let (g, h) = (_mm512_shuffle_i64x2::<0xee>(a, b), _mm512_shuffle_i64x2::<0xee>(c, d));
            [
                _mm512_shuffle_i64x2::<0x88>(e, f),
                _mm512_shuffle_i64x2::<0xdd>(e, f),
                _mm512_shuffle_i64x2::<0x88>(g, h),
                _mm512_shuffle_i64x2::<0xdd>(g, h),
            ]
        };
        let [a, b, c, d] = [four(0), four(1), four(8), four(9)];
        for (i, out) in out.chunks_exact_mut(W).enumerate() {
            let words = [
                _mm512_unpacklo_epi64(a[i], b[i]),
                _mm512_unpackhi_epi64(a[i], b[i]),
                _mm512_unpacklo_epi64(c[i], d[i]),
                _mm512_unpackhi_epi64(c[i], d[i]),
            ];
            for (out, v) in out.iter_mut().zip(cut(words)) {
                // SAFETY: `out` has the 32 lanes that are stored.
                unsafe { _mm512_store_si512(out.0.as_mut_ptr().cast(), v) };
            }
        }
    }
}

/// Two columns of sixteen rows of weights a step.
#[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl")]
pub(super) fn pack_weights<V: Load>(rows: [&[V]; OUTPUTS], panel: &mut [Register]) {
    let n = rows[0].len();
    assert!(rows.iter().all(|r| r.len() == n) && panel.len() == n.div_ceil(2));
    for (i, out) in panel.chunks_mut(LANES / 2).enumerate() {
        let have = (n - i * LANES).min(LANES);
        let lanes = u32::MAX >> (LANES - have);
        // Rows 0, 8, 1, 9...: even lanes are the first eight.
        let v: [__m512i; 16] = std::array::from_fn(|r| {
            // SAFETY: lanes below `have` are within the row.
            unsafe { V::load(lanes, rows[r / 2 + r % 2 * 8].as_ptr().add(i * LANES)) }
        });
        for (out, v) in out.iter_mut().zip(transpose(v)) {
            // SAFETY: `out` has the 32 lanes that are stored.
            unsafe { _mm512_store_si512(out.0.as_mut_ptr().cast(), v) };
        }
    }
}

/// Rows of sixteen 32-bit numbers to columns.
#[target_feature(enable = "avx512f")]
#[inline]
fn transpose(v: [__m512i; 16]) -> [__m512i; 16] {
    // Lane L of 128 bits of `four[g][c]` has column 4 L + c of rows 4 g to 4 g + 3.
    let four: [[__m512i; 4]; 4] = std::array::from_fn(|g| {
        let [a, b, c, d] = [v[4 * g], v[4 * g + 1], v[4 * g + 2], v[4 * g + 3]];
        let (ab, cd) = (_mm512_unpacklo_epi32(a, b), _mm512_unpacklo_epi32(c, d));
        let (high_ab, high_cd) = (_mm512_unpackhi_epi32(a, b), _mm512_unpackhi_epi32(c, d));
        [
            _mm512_unpacklo_epi64(ab, cd),
            _mm512_unpackhi_epi64(ab, cd),
            _mm512_unpacklo_epi64(high_ab, high_cd),
            _mm512_unpackhi_epi64(high_ab, high_cd),
        ]
    });
    let mut out = v;
    for c in 0..4 {
        let (a, b) = (
            _mm512_shuffle_i32x4::<0x44>(four[0][c], four[1][c]),
            _mm512_shuffle_i32x4::<0x44>(four[2][c], four[3][c]),
        );
        let (e, f) = (
            _mm512_shuffle_i32x4::<0xee>(four[0][c], four[1][c]),
            _mm512_shuffle_i32x4::<0xee>(four[2][c], four[3][c]),
        );
        out[c] = _mm512_shuffle_i32x4::<0x88>(a, b);
        out[4 + c] = _mm512_shuffle_i32x4::<0xdd>(a, b);
        out[8 + c] = _mm512_shuffle_i32x4::<0x88>(e, f);
        out[12 + c] = _mm512_shuffle_i32x4::<0xdd>(e, f);
    }
    out
}
