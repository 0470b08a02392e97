//! The NEON form of unpacking: two elements of a group of eight at a time, which lie in sixteen bytes.

use std::arch::aarch64::*;

/// The widest elements: with the bits before the first of its byte one fits 64.
pub const WIDEST: u32 = 57;

/// Elements of `k` bits from the beginning of `bytes`, as many whole groups of eight as have sixteen bytes from each pair's beginning on; gives
/// their number.
///
/// # Safety
/// The processor has NEON.
///
/// # Panics
/// If `k` is not in `1..=`[`WIDEST`], or `bytes` shorter than so many elements.
#[target_feature(enable = "neon")]
pub unsafe fn unpack(bytes: &[u8], k: u32, out: &mut [u64]) -> usize {
    let size = k as usize;
    assert!((1..=WIDEST).contains(&k) && bytes.len() >= super::packed_len(out.len(), k));
    // Of element 2 p: its first byte, the bytes of both from there on, and how far they are shifted down.
    let pairs: [(usize, uint8x16_t, int64x2_t); 4] = std::array::from_fn(|p| {
        let bit = [2 * p * size, (2 * p + 1) * size];
        let first = bit[0] / 8;
        let picks: [u8; 16] = std::array::from_fn(|i| (bit[i / 8] / 8 - first + i % 8) as u8);
        let right = bit.map(|bit| -((bit % 8) as i64));
        // SAFETY: arrays of 16 bytes.
        unsafe { (first, vld1q_u8(picks.as_ptr()), vld1q_s64(right.as_ptr())) }
    });
    let mask = vdupq_n_u64(super::mask(k));
    // The last pair of a group begins furthest.
    let groups = match bytes.len().checked_sub(pairs[3].0 + 16) {
        Some(last) => (out.len() / 8).min(last / size + 1),
        None => 0,
    };
    for (g, out) in out.chunks_exact_mut(8).take(groups).enumerate() {
        for ((first, picks, right), out) in pairs.iter().zip(out.chunks_exact_mut(2)) {
            // SAFETY: g size + first + 16 <= bytes.len(), and two words of `out`.
            unsafe {
                let v = vld1q_u8(bytes.as_ptr().add(g * size + first));
                let words = vreinterpretq_u64_u8(vqtbl1q_u8(v, *picks));
                vst1q_u64(out.as_mut_ptr(), vandq_u64(vshlq_u64(words, *right), mask));
            }
        }
    }
    8 * groups
}
