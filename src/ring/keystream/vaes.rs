//! Four blocks to a register, eight registers under way: as many as hide the latency of a round.

use std::arch::x86_64::*;

use zeroize::Zeroizing;

/// The eleven round keys.
pub type RoundKeys = [[u64; 2]; 11];

const REGISTERS: usize = 8;
const BYTES: usize = 64 * REGISTERS;

/// The key schedule (FIPS 197, 5.2), or `None` where the processor lacks an instruction of this module. In its place from the beginning, so that
/// nothing is left to wipe on its way there.
pub fn expand(key: &[u8; 16]) -> Option<Box<Zeroizing<RoundKeys>>> {
    let has =
        is_x86_feature_detected!("aes") && is_x86_feature_detected!("vaes") && is_x86_feature_detected!("avx512f");
    // SAFETY: the processor has AES.
    has.then(|| unsafe { schedule(key) })
}

/// # Safety
/// The processor has AES.
#[target_feature(enable = "aes")]
unsafe fn schedule(key: &[u8; 16]) -> Box<Zeroizing<RoundKeys>> {
    // SAFETY: an array of 16 bytes.
    let mut last = unsafe { _mm_loadu_si128(key.as_ptr().cast()) };
    let mut keys = Box::new(Zeroizing::new([[0; 2]; 11]));
    let mut put = |i: usize, key: __m128i| keys[i] = [_mm_cvtsi128_si64(key) as u64, high_half(key)];
    put(0, last);
    macro_rules! round {
        ($i:literal, $constant:literal) => {
            // Each word is xored with all before it, then with the substituted last one.
            let assist = _mm_shuffle_epi32::<0xff>(_mm_aeskeygenassist_si128::<$constant>(last));
            last = _mm_xor_si128(last, _mm_slli_si128::<4>(last));
            last = _mm_xor_si128(last, _mm_slli_si128::<8>(last));
            last = _mm_xor_si128(last, assist);
            put($i, last);
        };
    }
    round!(1, 0x01);
    round!(2, 0x02);
    round!(3, 0x04);
    round!(4, 0x08);
    round!(5, 0x10);
    round!(6, 0x20);
    round!(7, 0x40);
    round!(8, 0x80);
    round!(9, 0x1b);
    round!(10, 0x36);
    keys
}

#[inline]
#[target_feature(enable = "aes")]
fn high_half(v: __m128i) -> u64 {
    _mm_cvtsi128_si64(_mm_unpackhi_epi64(v, v)) as u64
}

/// The keystream from the counter block `start` on, to `out`, whole blocks.
///
/// # Safety
/// The processor has VAES and AVX-512 F.
///
/// # Panics
/// If `out` is no whole number of blocks.
#[target_feature(enable = "avx512f,vaes")]
pub unsafe fn blocks(keys: &RoundKeys, [counter, high]: [u64; 2], out: &mut [u8]) {
    assert!(out.len().is_multiple_of(16));
    let key = |i: usize| {
        let [low, high] = keys[i].map(|half| half as i64);
        _mm512_set_epi64(high, low, high, low, high, low, high, low)
    };
    let keys: [__m512i; 11] = [key(0), key(1), key(2), key(3), key(4), key(5), key(6), key(7), key(8), key(9), key(10)];
    let (c, h) = (counter as i64, high as i64);
    let add = |v, n: i64| _mm512_add_epi64(v, _mm512_set_epi64(0, n, 0, n, 0, n, 0, n));
    let mut at = _mm512_add_epi64(_mm512_set_epi64(h, c, h, c, h, c, h, c), _mm512_set_epi64(0, 3, 0, 2, 0, 1, 0, 0));
    let mut pieces = out.chunks_exact_mut(BYTES);
    for piece in &mut pieces {
        let mut v = [_mm512_setzero_si512(); REGISTERS];
        for v in &mut v {
            *v = _mm512_xor_si512(at, keys[0]);
            at = add(at, 4);
        }
        for key in &keys[1..10] {
            for v in &mut v {
                *v = _mm512_aesenc_epi128(*v, *key);
            }
        }
        for (i, v) in v.into_iter().enumerate() {
            // SAFETY: `piece` has 64 bytes for each register.
            unsafe {
                _mm512_storeu_si512(piece.as_mut_ptr().add(64 * i).cast(), _mm512_aesenclast_epi128(v, keys[10]))
            };
        }
    }
    for piece in pieces.into_remainder().chunks_mut(64) {
        let mut v = _mm512_xor_si512(at, keys[0]);
        at = add(at, 4);
        for key in &keys[1..10] {
            v = _mm512_aesenc_epi128(v, *key);
        }
        let words = (1u16 << (piece.len() / 8)) - 1;
        // SAFETY: the mask has a bit for each word of eight bytes that `piece` has.
        unsafe {
            _mm512_mask_storeu_epi64(piece.as_mut_ptr().cast(), words as u8, _mm512_aesenclast_epi128(v, keys[10]))
        };
    }
}
