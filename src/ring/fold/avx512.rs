//! The AVX-512 form of the folds: a query byte is the mask of eight rows, one masked operation each; up to four words share
//! the mask.

use std::arch::x86_64::*;

use super::Scaled;

/// See [`super::shifted`] (`ADD` false) and [`super::sums`].
///
/// # Safety
/// The processor has AVX-512 F, DQ, BW and VL, and the lengths are as [`super::shifted`] asserts.
#[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl")]
pub unsafe fn shifted<const ADD: bool>(tables: &[&[u64]], n: usize, offset: &[u32], queries: &[u8], out: &mut [u64]) {
    let words = tables.len();
    let mut first = 0;
    while first < words {
        let group = &tables[first..];
        // SAFETY: the caller's.
        first += unsafe {
            match group.len() {
                4.. => several::<ADD, 4>(group, n, offset, queries, out, words, first),
                3 => several::<ADD, 3>(group, n, offset, queries, out, words, first),
                2 => several::<ADD, 2>(group, n, offset, queries, out, words, first),
                _ => several::<ADD, 1>(group, n, offset, queries, out, words, first),
            }
        };
    }
}

/// Words `first..first + W` of every element, from the first `W` of `tables`; gives `W`.
///
/// # Safety
/// Every table holds `n` rows from every offset, and the other lengths fit `offset.len()` elements of `words` words.
#[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl")]
unsafe fn several<const ADD: bool, const W: usize>(
    tables: &[&[u64]],
    n: usize,
    offset: &[u32],
    queries: &[u8],
    out: &mut [u64],
    words: usize,
    first: usize,
) -> usize {
    for (e, (&offset, query)) in offset.iter().zip(queries.chunks_exact(n / 8)).enumerate() {
        let mut acc = [_mm512_setzero_si512(); W];
        // SAFETY: `n` rows follow the offset in each table (the caller's).
        let start: [*const u64; W] = std::array::from_fn(|w| unsafe { tables[w].as_ptr().add(offset as usize) });
        for (j, &bits) in query.iter().enumerate() {
            for w in 0..W {
                // SAFETY: 8 j + 8 <= n.
                let rows = unsafe { _mm512_loadu_si512(start[w].add(8 * j).cast()) };
                acc[w] = if ADD {
                    _mm512_mask_add_epi64(acc[w], bits, acc[w], rows)
                } else {
                    _mm512_mask_xor_epi64(acc[w], bits, acc[w], rows)
                };
            }
        }
        let at = e * words + first;
        for (out, acc) in out[at..at + W].iter_mut().zip(acc) {
            *out = if ADD { _mm512_reduce_add_epi64(acc) as u64 } else { xor_lanes(acc) };
        }
    }
    W
}

/// See [`super::scaled`].
///
/// # Safety
/// The processor has AVX-512 F, DQ, BW and VL, and the lengths are as [`super::scaled`] asserts.
#[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl")]
pub unsafe fn scaled(s: &Scaled<'_>, n: usize, offset: &[u32], factor: &[u32], queries: &[u8], out: &mut [u64]) {
    let half = _mm512_set1_epi64(s.half() as i64);
    let count = _mm_cvtsi64_si128(i64::from(s.shift - 32));
    let elements = offset.iter().zip(factor).zip(queries.chunks_exact(n / 8));
    for (((&offset, &factor), query), out) in elements.zip(out) {
        let factor = _mm512_set1_epi64(i64::from(factor));
        let mut acc = _mm512_setzero_si512();
        for (rows, &bits) in s.table[offset as usize..][..n].as_chunks::<8>().0.iter().zip(query) {
            // SAFETY: eight rows.
            let v = unsafe { _mm512_loadu_si512(rows.as_ptr().cast()) };
            let low = _mm512_srli_epi64::<32>(_mm512_mul_epu32(v, factor));
            let high = _mm512_mul_epu32(_mm512_srli_epi64::<32>(v), factor);
            let row = _mm512_srl_epi64(_mm512_add_epi64(_mm512_add_epi64(high, low), half), count);
            acc = _mm512_mask_add_epi64(acc, bits, acc, row);
        }
        *out = _mm512_reduce_add_epi64(acc) as u64;
    }
}

#[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl")]
fn xor_lanes(v: __m512i) -> u64 {
    let v = _mm256_xor_si256(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64::<1>(v));
    let v = _mm_xor_si128(_mm256_castsi256_si128(v), _mm256_extracti128_si256::<1>(v));
    (_mm_extract_epi64::<0>(v) ^ _mm_extract_epi64::<1>(v)) as u64
}
