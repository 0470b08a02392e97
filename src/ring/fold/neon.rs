//! The NEON form of the folds: a query byte becomes eight lane masks.

use std::arch::aarch64::*;

use super::Scaled;

by_two!("neon", wide, u64, wide_element);
by_two!("neon", narrow, u32, narrow_element);

/// See [`super::scaled`].
///
/// # Safety
/// The processor has NEON, and the lengths are as [`super::scaled`] asserts.
#[target_feature(enable = "neon")]
pub unsafe fn scaled(s: &Scaled<'_>, n: usize, offset: &[u32], factor: &[u32], queries: &[u8], out: &mut [u64]) {
    let half = vdupq_n_u64(s.half());
    let right = vdupq_n_s64(32 - i64::from(s.shift));
    let elements = offset.iter().zip(factor).zip(queries.chunks_exact(n / 8));
    for (((&offset, &factor), query), out) in elements.zip(out) {
        let factor = vdup_n_u32(factor);
        let row = |v: uint64x2_t| {
            let low = vshrq_n_u64::<32>(vmull_u32(vmovn_u64(v), factor));
            let high = vmull_u32(vshrn_n_u64::<32>(v), factor);
            vshlq_u64(vaddq_u64(vaddq_u64(high, low), half), right)
        };
        // SAFETY: the slice has n rows.
        [*out] = unsafe { each::<true, 1>([s.table[offset as usize..][..n].as_ptr()], query, row) };
    }
}

/// One element, `W` words of 64 bits.
///
/// # Safety
/// As [`each`].
#[target_feature(enable = "neon")]
unsafe fn wide_element<const ADD: bool, const W: usize>(start: [*const u64; W], query: &[u8]) -> [u64; W] {
    // SAFETY: the caller's.
    unsafe { each::<ADD, W>(start, query, |v| v) }
}

/// The same of 32 bits: eight rows are two registers.
///
/// # Safety
/// As [`each`].
#[target_feature(enable = "neon")]
unsafe fn narrow_element<const ADD: bool, const W: usize>(start: [*const u32; W], query: &[u8]) -> [u32; W] {
    // Of eight bytes the rows' bits, four at a time.
    let bits = [0x0008_0004_0002_0001, 0x0080_0040_0020_0010].map(|b| vmovl_u16(vcreate_u16(b)));
    let join = |a, b| if ADD { vaddq_u32(a, b) } else { veorq_u32(a, b) };
    let mut acc = [[vdupq_n_u32(0); 2]; W];
    for (j, &byte) in query.iter().enumerate() {
        let byte = vdupq_n_u32(byte.into());
        let picked = bits.map(|bit| vtstq_u32(byte, bit));
        for (start, acc) in start.iter().zip(&mut acc) {
            for (i, (acc, picked)) in acc.iter_mut().zip(picked).enumerate() {
                // SAFETY: 8 j + 4 i + 4 <= 8 query.len().
                let rows = unsafe { vld1q_u32(start.add(8 * j + 4 * i)) };
                *acc = join(*acc, vandq_u32(rows, picked));
            }
        }
    }
    acc.map(|[a, b]| {
        let v = join(a, b);
        let lanes = [vgetq_lane_u32::<0>(v), vgetq_lane_u32::<1>(v), vgetq_lane_u32::<2>(v), vgetq_lane_u32::<3>(v)];
        lanes.into_iter().fold(0u32, |a, b| if ADD { a.wrapping_add(b) } else { a ^ b })
    })
}

/// One element, `W` words, each row seen through `of`.
///
/// # Safety
/// Every pointer is valid for reading `8 query.len()` words; the processor has NEON.
#[target_feature(enable = "neon")]
#[inline]
unsafe fn each<const ADD: bool, const W: usize>(
    start: [*const u64; W],
    query: &[u8],
    of: impl Fn(uint64x2_t) -> uint64x2_t,
) -> [u64; W] {
    let bits: [uint64x2_t; 4] =
        std::array::from_fn(|i| vcombine_u64(vcreate_u64(1 << (2 * i)), vcreate_u64(2 << (2 * i))));
    let join = |a, b| if ADD { vaddq_u64(a, b) } else { veorq_u64(a, b) };
    let mut acc = [[vdupq_n_u64(0); 4]; W];
    for (j, &byte) in query.iter().enumerate() {
        let byte = vdupq_n_u64(byte.into());
        let picked = bits.map(|bit| vtstq_u64(byte, bit));
        for (start, acc) in start.iter().zip(&mut acc) {
            for (i, (acc, picked)) in acc.iter_mut().zip(picked).enumerate() {
                // SAFETY: 8 j + 2 i + 2 <= 8 query.len().
                let rows = unsafe { vld1q_u64(start.add(8 * j + 2 * i)) };
                *acc = join(*acc, vandq_u64(of(rows), picked));
            }
        }
    }
    acc.map(|[a, b, c, d]| {
        let v = join(join(a, b), join(c, d));
        let (low, high) = (vgetq_lane_u64::<0>(v), vgetq_lane_u64::<1>(v));
        if ADD { low.wrapping_add(high) } else { low ^ high }
    })
}
