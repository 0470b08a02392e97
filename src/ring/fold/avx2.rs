//! The AVX2 form of the fold: a query byte becomes two vectors of four whole-word masks, shared by up to two words.

use std::arch::x86_64::*;

/// See [`super::shifted`].
///
/// # Safety
/// The processor has AVX2, and the lengths are as [`super::shifted`] asserts.
#[target_feature(enable = "avx2")]
pub unsafe fn shifted(tables: &[&[u64]], n: usize, offset: &[u32], sub: &[u64], queries: &[u8], out: &mut [u64]) {
    let words = tables.len();
    let elements = offset.iter().zip(queries.chunks_exact(n / 8));
    for (((&offset, query), sub), out) in elements.zip(sub.chunks_exact(words)).zip(out.chunks_exact_mut(words)) {
        let starts = |t: &[&[u64]], i: usize| t[i][offset as usize..][..n].as_ptr();
        for ((tables, sub), out) in tables.chunks(2).zip(sub.chunks(2)).zip(out.chunks_mut(2)) {
            // SAFETY: each pointer is the start of a slice of n rows.
            unsafe {
                if let [s0, s1] = *sub {
                    out.copy_from_slice(&several([starts(tables, 0), starts(tables, 1)], [s0, s1], query));
                } else {
                    out.copy_from_slice(&several([starts(tables, 0)], [sub[0]], query));
                }
            }
        }
    }
}

/// See [`super::rows`].
///
/// # Safety
/// The processor has AVX2, and the lengths are as [`super::rows`] asserts.
#[target_feature(enable = "avx2")]
pub unsafe fn rows(rows: &[u64], n: usize, queries: &[u8], out: &mut [u64]) {
    for ((rows, query), out) in rows.chunks_exact(n).zip(queries.chunks_exact(n / 8)).zip(out) {
        // SAFETY: the slice has n rows.
        [*out] = unsafe { several([rows.as_ptr()], [0], query) };
    }
}

/// One element, `W` words.
///
/// # Safety
/// Every pointer is valid for reading `8 query.len()` words; the processor has AVX2.
#[target_feature(enable = "avx2")]
unsafe fn several<const W: usize>(start: [*const u64; W], sub: [u64; W], query: &[u8]) -> [u64; W] {
    let bit = [_mm256_setr_epi64x(1, 2, 4, 8), _mm256_setr_epi64x(16, 32, 64, 128)];
    let subs: [__m256i; W] = std::array::from_fn(|w| _mm256_set1_epi64x(sub[w] as i64));
    let mut acc = [[_mm256_setzero_si256(); 2]; W];
    for (j, &bits) in query.iter().enumerate() {
        let bits = _mm256_set1_epi64x(i64::from(bits));
        let picked = bit.map(|bit| _mm256_cmpeq_epi64(_mm256_and_si256(bits, bit), bit));
        for w in 0..W {
            for half in 0..2 {
                // SAFETY: 8 j + 4 half + 4 <= 8 query.len().
                let rows = unsafe { _mm256_loadu_si256(start[w].add(8 * j + 4 * half).cast()) };
                let term = _mm256_and_si256(_mm256_sub_epi64(rows, subs[w]), picked[half]);
                acc[w][half] = _mm256_xor_si256(acc[w][half], term);
            }
        }
    }
    acc.map(|[a, b]| {
        let v = _mm256_xor_si256(a, b);
        let v = _mm_xor_si128(_mm256_castsi256_si128(v), _mm256_extracti128_si256::<1>(v));
        (_mm_extract_epi64::<0>(v) ^ _mm_extract_epi64::<1>(v)) as u64
    })
}
