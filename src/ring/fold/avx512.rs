//! The AVX-512 form of the folds: a query byte is the mask of eight rows, one masked operation each; up to four words share
//! the mask.

use std::arch::x86_64::*;

use super::Scaled;

/// The folds of a width of words, up to four of which share the masks.
macro_rules! folds {
    ($name:ident, $word:ty, $element:ident) => {
        /// See [`super::shifted`] (`ADD` false) and [`super::sums`].
        ///
        /// # Safety
        /// The processor has AVX-512 F, DQ, BW and VL, and the lengths are as [`super::shifted`] asserts.
        #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl")]
        pub unsafe fn $name<const ADD: bool>(
            tables: &[&[$word]],
            n: usize,
            offset: &[u32],
            queries: &[u8],
            out: &mut [$word],
        ) {
            /// Words `first..first + W` of every element.
            ///
            /// # Safety
            /// As above, and there are so many tables.
            #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl")]
            unsafe fn several<const ADD: bool, const W: usize>(
                tables: &[&[$word]],
                first: usize,
                n: usize,
                offset: &[u32],
                queries: &[u8],
                out: &mut [$word],
            ) {
                for (e, (&offset, query)) in offset.iter().zip(queries.chunks_exact(n / 8)).enumerate() {
                    // SAFETY: `n` rows follow the offset in each table (the caller's).
                    let folded = unsafe {
                        let start = std::array::from_fn(|w| tables[first + w].as_ptr().add(offset as usize));
                        $element::<ADD, W>(start, query)
                    };
                    let at = e * tables.len() + first;
                    out[at..at + W].copy_from_slice(&folded);
                }
            }
            for first in (0..tables.len()).step_by(4) {
                // SAFETY: the caller's.
                unsafe {
                    match tables.len() - first {
                        4.. => several::<ADD, 4>(tables, first, n, offset, queries, out),
                        3 => several::<ADD, 3>(tables, first, n, offset, queries, out),
                        2 => several::<ADD, 2>(tables, first, n, offset, queries, out),
                        _ => several::<ADD, 1>(tables, first, n, offset, queries, out),
                    }
                }
            }
        }
    };
}

folds!(wide, u64, wide_element);
folds!(narrow, u32, narrow_element);

/// One element of `W` words of 64 bits.
///
/// # Safety
/// Every pointer is valid for reading `8 query.len()` words; the processor has AVX-512 F and DQ.
#[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl")]
#[inline]
unsafe fn wide_element<const ADD: bool, const W: usize>(start: [*const u64; W], query: &[u8]) -> [u64; W] {
    let mut acc = [_mm512_setzero_si512(); W];
    for (j, &bits) in query.iter().enumerate() {
        for w in 0..W {
            // SAFETY: 8 j + 8 <= 8 query.len().
            let rows = unsafe { _mm512_loadu_si512(start[w].add(8 * j).cast()) };
            acc[w] = if ADD {
                _mm512_mask_add_epi64(acc[w], bits, acc[w], rows)
            } else {
                _mm512_mask_xor_epi64(acc[w], bits, acc[w], rows)
            };
        }
    }
    acc.map(|acc| if ADD { _mm512_reduce_add_epi64(acc) as u64 } else { xor_lanes(acc) })
}

/// The same of 32 bits: two bytes are the mask of sixteen rows.
///
/// # Safety
/// As [`wide_element`].
#[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl")]
#[inline]
unsafe fn narrow_element<const ADD: bool, const W: usize>(start: [*const u32; W], query: &[u8]) -> [u32; W] {
    let mut acc = [_mm512_setzero_si512(); W];
    let join = |acc: __m512i, bits: u16, rows: __m512i| match ADD {
        true => _mm512_mask_add_epi32(acc, bits, acc, rows),
        false => _mm512_mask_xor_epi32(acc, bits, acc, rows),
    };
    let (pairs, rest) = query.as_chunks::<2>();
    for (j, bits) in pairs.iter().enumerate() {
        for w in 0..W {
            // SAFETY: 16 j + 16 <= 8 query.len().
            let rows = unsafe { _mm512_loadu_si512(start[w].add(16 * j).cast()) };
            acc[w] = join(acc[w], u16::from_le_bytes(*bits), rows);
        }
    }
    if let [bits] = *rest {
        for w in 0..W {
            // SAFETY: the last eight rows, and no more are read.
            let rows = unsafe { _mm512_maskz_loadu_epi32(0xff, start[w].add(16 * pairs.len()).cast()) };
            acc[w] = join(acc[w], bits.into(), rows);
        }
    }
    acc.map(|acc| {
        if ADD {
            return _mm512_reduce_add_epi32(acc) as u32;
        }
        let folded = xor_lanes(acc);
        (folded ^ folded >> 32) as u32
    })
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
