//! The AVX-512 form of packing: a group of eight elements of `k` bits is `k` bytes, and every group is alike. Whole groups
//! and the last, shorter one take the same instructions; loads and stores of bytes are masked to what is there.

use std::arch::x86_64::*;

/// Bytes that are asked for before they are needed: matrices come from memory, and a page at a time is what the processor
/// foresees by itself.
const AHEAD: usize = 4096;

/// The first `n` of up to 64 lanes.
fn lanes(n: usize) -> u64 {
    if n >= 64 { u64::MAX } else { (1 << n) - 1 }
}

/// Elements `out.len()` of `k` bits from the beginning of `bytes`: about five instructions per group. A word takes the
/// four 16-bit lanes that it begins in, shifted down, and the lane behind them, shifted up.
///
/// # Safety
/// The processor has AVX-512 F and BW.
///
/// # Panics
/// If `k` is not in 1..=64, or `bytes` shorter than so many elements.
#[target_feature(enable = "avx512f,avx512bw")]
pub unsafe fn unpack(bytes: &[u8], k: u32, out: &mut [u64]) {
    let size = k as usize;
    assert!((1..=64).contains(&k) && bytes.len() >= super::packed_len(out.len(), k));
    let start = |i: usize| (i * size / 16, (i * size % 16) as i64);
    let picks = |behind: usize| -> [i16; 32] { std::array::from_fn(|j| (start(j / 4).0 + behind + j % 4) as i16) };
    let (low, high) = (picks(0), picks(4));
    let down: [i64; 8] = std::array::from_fn(|i| start(i).1);
    let up = down.map(|r| 64 - r);
    // SAFETY: arrays of 64 bytes.
    let [low, high, down, up] = unsafe {
        [
            _mm512_loadu_si512(low.as_ptr().cast()),
            _mm512_loadu_si512(high.as_ptr().cast()),
            _mm512_loadu_si512(down.as_ptr().cast()),
            _mm512_loadu_si512(up.as_ptr().cast()),
        ]
    };
    let mask = _mm512_set1_epi64(super::mask(k) as i64);
    // Lanes wrap around where a word ends with the group; they are shifted out then, or masked off.
    let words = |v: __m512i| {
        let (first, behind) = (_mm512_permutexvar_epi16(low, v), _mm512_permutexvar_epi16(high, v));
        // Either of the two, and the mask.
        _mm512_ternarylogic_epi64::<0xe0>(mask, _mm512_srlv_epi64(first, down), _mm512_sllv_epi64(behind, up))
    };
    // Groups with a whole register of bytes from their beginning on: nothing to be masked.
    let whole = match bytes.len().checked_sub(64) {
        Some(last) => (out.len() / 8).min(last / size + 1),
        None => 0,
    };
    for g in 0..whole {
        // SAFETY: `g <= (bytes.len() - 64) / size` and `8 (g + 1) <= out.len()`. A prefetch may have any address.
        unsafe {
            _mm_prefetch::<_MM_HINT_T0>(bytes.as_ptr().wrapping_add(g * size + AHEAD).cast());
            let v = _mm512_loadu_si512(bytes.as_ptr().add(g * size).cast());
            _mm512_storeu_si512(out.as_mut_ptr().add(8 * g).cast(), words(v));
        }
    }
    let mut bytes = &bytes[whole * size..];
    for out in out[8 * whole..].chunks_mut(8) {
        let (group, rest) = bytes.split_at(size.min(bytes.len()));
        // SAFETY: only lanes within `group` are read, and only those within `out` written.
        unsafe {
            let v = _mm512_maskz_loadu_epi8(lanes(group.len()), group.as_ptr().cast());
            _mm512_mask_storeu_epi64(out.as_mut_ptr().cast(), lanes(out.len()) as __mmask8, words(v));
        }
        bytes = rest;
    }
}

/// The low `k` bits of `values` to `out`, which they fill: a word of the output is made of at most three elements.
///
/// # Safety
/// The processor has AVX-512 F and BW.
///
/// # Panics
/// If `k` is not in 32..=64, or `out` not exactly as long as so many elements.
#[target_feature(enable = "avx512f,avx512bw")]
pub unsafe fn pack(values: &[u64], k: u32, out: &mut [u8]) {
    let size = k as usize;
    assert!((32..=64).contains(&k) && out.len() == super::packed_len(values.len(), k));
    // Output word `m` begins in element `first(m)`.
    let first = |m: usize| 64 * m / size;
    let pick = |behind: usize| -> [i64; 8] { std::array::from_fn(|m| ((first(m) + behind) % 8) as i64) };
    let picks = [pick(0), pick(1), pick(2)];
    let down: [i64; 8] = std::array::from_fn(|m| (64 * m - first(m) * size) as i64);
    // An element beyond the word is shifted out of it; so is one beyond the group, whose number wraps around.
    let up = |behind: usize| -> [i64; 8] { std::array::from_fn(|m| ((first(m) + behind) * size - 64 * m) as i64) };
    let ups = [up(1), up(2)];
    // SAFETY: arrays of 64 bytes.
    let ([p0, p1, p2], down, [u1, u2]) = unsafe {
        (
            picks.map(|p| _mm512_loadu_si512(p.as_ptr().cast())),
            _mm512_loadu_si512(down.as_ptr().cast()),
            ups.map(|u| _mm512_loadu_si512(u.as_ptr().cast())),
        )
    };
    let mask = _mm512_set1_epi64(super::mask(k) as i64);
    for (values, out) in values.chunks(8).zip(out.chunks_mut(size)) {
        // SAFETY: only lanes within `values` are read.
        let v = unsafe { _mm512_maskz_loadu_epi64(lanes(values.len()) as __mmask8, values.as_ptr().cast()) };
        let v = _mm512_and_si512(v, mask);
        let a = _mm512_srlv_epi64(_mm512_permutexvar_epi64(p0, v), down);
        let b = _mm512_sllv_epi64(_mm512_permutexvar_epi64(p1, v), u1);
        let c = _mm512_sllv_epi64(_mm512_permutexvar_epi64(p2, v), u2);
        // Three ways or.
        let v = _mm512_ternarylogic_epi64::<0xfe>(a, b, c);
        // SAFETY: only lanes within `out` are written.
        unsafe { _mm512_mask_storeu_epi8(out.as_mut_ptr().cast(), lanes(out.len()), v) };
    }
}
