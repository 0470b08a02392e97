//! The AVX2 form of the folds: a query byte becomes eight lane masks.

use std::arch::x86_64::*;

use super::Scaled;

by_two!("avx2", wide, u64, wide_element);
by_two!("avx2", narrow, u32, narrow_element);

/// See [`super::scaled`].
///
/// # Safety
/// The processor has AVX2, and the lengths are as [`super::scaled`] asserts.
#[target_feature(enable = "avx2")]
pub unsafe fn scaled(s: &Scaled<'_>, n: usize, offset: &[u32], factor: &[u32], queries: &[u8], out: &mut [u64]) {
    let half = _mm256_set1_epi64x(s.half() as i64);
    let count = _mm_cvtsi64_si128(i64::from(s.shift - 32));
    let elements = offset.iter().zip(factor).zip(queries.chunks_exact(n / 8));
    for (((&offset, &factor), query), out) in elements.zip(out) {
        let factor = _mm256_set1_epi64x(i64::from(factor));
        let row = |v: __m256i| {
            let low = _mm256_srli_epi64::<32>(_mm256_mul_epu32(v, factor));
            let high = _mm256_mul_epu32(_mm256_srli_epi64::<32>(v), factor);
            _mm256_srl_epi64(_mm256_add_epi64(_mm256_add_epi64(high, low), half), count)
        };
        // SAFETY: the slice has n rows.
        [*out] = unsafe { each::<true, 1>([s.table[offset as usize..][..n].as_ptr()], query, row) };
    }
}

/// One element, `W` words of 64 bits.
///
/// # Safety
/// As [`each`].
#[target_feature(enable = "avx2")]
unsafe fn wide_element<const ADD: bool, const W: usize>(start: [*const u64; W], query: &[u8]) -> [u64; W] {
    // SAFETY: the caller's.
    unsafe { each::<ADD, W>(start, query, |v| v) }
}

/// The same of 32 bits: eight rows are one register.
///
/// # Safety
/// As [`each`].
#[target_feature(enable = "avx2")]
unsafe fn narrow_element<const ADD: bool, const W: usize>(start: [*const u32; W], query: &[u8]) -> [u32; W] {
    let bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    let mut acc = [_mm256_setzero_si256(); W];
    for (j, &bits) in query.iter().enumerate() {
        let picked = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(bits.into()), bit), bit);
        for w in 0..W {
            // SAFETY: 8 j + 8 <= 8 query.len().
            let rows = _mm256_and_si256(unsafe { _mm256_loadu_si256(start[w].add(8 * j).cast()) }, picked);
            acc[w] = if ADD { _mm256_add_epi32(acc[w], rows) } else { _mm256_xor_si256(acc[w], rows) };
        }
    }
    let join = |a, b| if ADD { _mm_add_epi32(a, b) } else { _mm_xor_si128(a, b) };
    acc.map(|v| {
        let v = join(_mm256_castsi256_si128(v), _mm256_extracti128_si256::<1>(v));
        let v = join(v, _mm_shuffle_epi32::<0b1110>(v));
        _mm_cvtsi128_si32(join(v, _mm_shuffle_epi32::<1>(v))) as u32
    })
}

/// One element, `W` words, each row seen through `of`.
///
/// # Safety
/// Every pointer is valid for reading `8 query.len()` words; the processor has AVX2.
#[target_feature(enable = "avx2")]
unsafe fn each<const ADD: bool, const W: usize>(
    start: [*const u64; W],
    query: &[u8],
    of: impl Fn(__m256i) -> __m256i,
) -> [u64; W] {
    let bit = [_mm256_setr_epi64x(1, 2, 4, 8), _mm256_setr_epi64x(16, 32, 64, 128)];
    let join = |a, b| if ADD { _mm256_add_epi64(a, b) } else { _mm256_xor_si256(a, b) };
    let mut acc = [[_mm256_setzero_si256(); 2]; W];
    for (j, &bits) in query.iter().enumerate() {
        let bits = _mm256_set1_epi64x(i64::from(bits));
        let picked = bit.map(|bit| _mm256_cmpeq_epi64(_mm256_and_si256(bits, bit), bit));
        for w in 0..W {
            for half in 0..2 {
                // SAFETY: 8 j + 4 half + 4 <= 8 query.len().
                let rows = unsafe { _mm256_loadu_si256(start[w].add(8 * j + 4 * half).cast()) };
                acc[w][half] = join(acc[w][half], _mm256_and_si256(of(rows), picked[half]));
            }
        }
    }
    acc.map(|[a, b]| {
        let v = join(a, b);
        let (low, high) = (_mm256_castsi256_si128(v), _mm256_extracti128_si256::<1>(v));
        let v = if ADD { _mm_add_epi64(low, high) } else { _mm_xor_si128(low, high) };
        let (low, high) = (_mm_extract_epi64::<0>(v) as u64, _mm_extract_epi64::<1>(v) as u64);
        if ADD { low.wrapping_add(high) } else { low ^ high }
    })
}
