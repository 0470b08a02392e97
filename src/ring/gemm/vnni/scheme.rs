//! How words are cut into digits, and which of their products make the words' product.

use super::BLOCK;
use std::arch::x86_64::*;

/// A shift that leaves nothing.
pub(super) const NOWHERE: u32 = 64;

/// How words are cut into `X` signed digits of 16 bits at most. A digit's carry goes to the next, the last one's is lost. Constants, so
/// that the cutting is unrolled: of a few rows it takes as long as the product.
pub trait Cut<const X: usize> {
    /// From which bit on, and how many. Bits that two share are the lower one's, and zero in the higher.
    const DIGITS: [(u32, u32); X];

    /// The bits of each digit in a word moved down to its place.
    const MASKS: [u64; X] = {
        let (mut masks, mut p, mut end) = ([0; X], 0, 0);
        while p < X {
            let (place, bits) = Self::DIGITS[p];
            masks[p] = ((1 << bits) - 1) & !((1 << (end - place)) - 1);
            (p, end) = (p + 1, place + bits);
        }
        masks
    };

    /// Half of every digit but the last: added before the fields are taken and subtracted after, it makes them signed.
    const HALVES: u64 = {
        let (mut halves, mut p) = (0, 0);
        while p + 1 < X {
            halves += 1 << (Self::DIGITS[p].0 + Self::DIGITS[p].1 - 1);
            p += 1;
        }
        halves
    };
}

/// What is done with `X` digits of a word of `x` and `W` numbers made of one of `w`: `S` sums.
pub trait Scheme<const X: usize, const W: usize, const S: usize> {
    /// Where the sums stand: `(p, q)` is `2^p - 2^q`, or `2^p` where `q` is [`NOWHERE`].
    const PLACES: [(u32, u32); S];
    /// How many of them, the lowest, must be exact.
    const EXACT: usize;
    /// Pairs of columns over which those are: at least those of a block, or what is above `SHIFT` bits is moved.
    const STEPS: usize = BLOCK / 2;
    /// From `2^(k - 32)` on, seen from the lowest sum.
    const SHIFT: u32 = 0;
    /// Rows of `x` that meet a panel of `w` (of weights, two) at once: as many as registers hold the sums of.
    const ROWS: usize;

    /// What is made of the words of `x`, eight in each register: lane `4 l + r` is of word `l` of register `r`.
    ///
    /// # Safety
    /// The processor has AVX-512 F and BW.
    unsafe fn cut(words: [__m512i; 4]) -> [__m512i; X];

    /// The products of a pair of words of row `R` of the group that is at `x` by those of each panel.
    ///
    /// # Safety
    /// `x` is valid for reads of `X` pairs for each row up to `R`; the processor has AVX-512 F and VNNI.
    unsafe fn multiply<const R: usize, const P: usize>(
        x: *const [i16; 2],
        w: &[[__m512i; W]; P],
        sums: &mut [[__m512i; S]; P],
    );
}

/// Both operands of a product of ring words modulo `2^43`: `x0 w0 + 2^14 (x0 w1 + x1 w0) + 2^28 x1 w1 + 2^29 (x0 w2 + x2 w0)`, where
/// `x0 w1 + x1 w0` is `(x0 + x1) (w0 + w1) - x0 w0 - x1 w1` (Karatsuba): five products. The sums of the two lower digits fit 16 bits.
pub struct Shortest;

impl Cut<3> for Shortest {
    const DIGITS: [(u32, u32); 3] = [(0, 14), (14, 15), (29, 14)];
}

impl Scheme<4, 4, 4> for Shortest {
    const PLACES: [(u32, u32); 4] = [(0, 14), (14, NOWHERE), (28, 14), (29, NOWHERE)];
    const EXACT: usize = 1;
    // A pair of products adds at most 2^27.
    const STEPS: usize = 15;
    const SHIFT: u32 = 12;
    const ROWS: usize = 6;

    #[target_feature(enable = "avx512f,avx512bw")]
    #[inline]
    unsafe fn cut(words: [__m512i; 4]) -> [__m512i; 4] {
        let [x0, x1, x2] = digits::<3, Shortest>(words);
        [x0, x1, x2, _mm512_add_epi16(x0, x1)]
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    #[inline]
    unsafe fn multiply<const R: usize, const P: usize>(
        x: *const [i16; 2],
        w: &[[__m512i; 4]; P],
        sums: &mut [[__m512i; 4]; P],
    ) {
        for (&[w0, w1, w2, both], [a, m, b, c]) in w.iter().zip(sums) {
            // SAFETY: the caller's.
            unsafe {
                let x0 = broadcast::<4, R, 0>(x);
                *c = dot(*c, x0, w2);
                *a = dot(*a, x0, w0);
                *b = dot_at::<4, R, 1>(*b, x, w1);
                *m = dot_at::<4, R, 3>(*m, x, both);
                *c = dot_at::<4, R, 2>(*c, x, w0);
            }
        }
    }
}

/// Both operands of a product of ring words modulo `2^44`: `x0 w0 + 2^14 (x0 w1 + x1 w0) + 2^28 (x1 w1 + x0 w2 + x2 w0)`. The
/// last digit has 14 bits and stands two higher, so that it shares a sum with the product of the middle ones; its product with
/// another than the lowest begins at 2^44.
pub struct Short;

impl Cut<3> for Short {
    const DIGITS: [(u32, u32); 3] = [(0, 14), (14, 16), (28, 16)];
}

impl Scheme<3, 3, 3> for Short {
    const PLACES: [(u32, u32); 3] = [(0, NOWHERE), (14, NOWHERE), (28, NOWHERE)];
    const EXACT: usize = 1;
    // A pair of products adds at most 2^27.
    const STEPS: usize = 15;
    const SHIFT: u32 = 12;
    const ROWS: usize = 8;

    #[target_feature(enable = "avx512f,avx512bw")]
    #[inline]
    unsafe fn cut(words: [__m512i; 4]) -> [__m512i; 3] {
        digits::<3, Short>(words)
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    #[inline]
    unsafe fn multiply<const R: usize, const P: usize>(
        x: *const [i16; 2],
        w: &[[__m512i; 3]; P],
        sums: &mut [[__m512i; 3]; P],
    ) {
        for (&[w0, w1, w2], [a, b, c]) in w.iter().zip(sums) {
            // SAFETY: the caller's.
            unsafe {
                let (x0, x1) = (broadcast::<3, R, 0>(x), broadcast::<3, R, 1>(x));
                *c = dot(*c, x0, w2);
                *b = dot(*b, x0, w1);
                *c = dot(*c, x1, w1);
                *a = dot(*a, x0, w0);
                *c = dot_at::<3, R, 2>(*c, x, w0);
                *b = dot(*b, x1, w0);
            }
        }
    }
}

/// The same modulo `2^48`: `x0 w0 + 2^16 (x0 w1 + x1 w0) + 2^32 (x1 w1 + x0 w2 + x2 w0)`. The lowest digit of `x` is there in two
/// bytes as well, which meet `w0`, since those sums must be exact.
pub struct Long;

impl Cut<3> for Long {
    const DIGITS: [(u32, u32); 3] = [(0, 16), (16, 16), (32, 16)];
}

impl Scheme<5, 3, 4> for Long {
    const PLACES: [(u32, u32); 4] = [(0, NOWHERE), (8, NOWHERE), (16, NOWHERE), (32, NOWHERE)];
    // A pair of products with bytes adds at most 2^16 x 255.
    const EXACT: usize = 2;
    const ROWS: usize = 6;

    #[target_feature(enable = "avx512f,avx512bw")]
    #[inline]
    unsafe fn cut(words: [__m512i; 4]) -> [__m512i; 5] {
        let [x0, x1, x2] = digits::<3, Long>(words);
        [x0, x1, x2, _mm512_and_si512(x0, _mm512_set1_epi16(0xff)), _mm512_srai_epi16::<8>(x0)]
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    #[inline]
    unsafe fn multiply<const R: usize, const P: usize>(
        x: *const [i16; 2],
        w: &[[__m512i; 3]; P],
        sums: &mut [[__m512i; 4]; P],
    ) {
        for (&[w0, w1, w2], [a, b, c, d]) in w.iter().zip(sums) {
            // SAFETY: the caller's.
            unsafe {
                let (x0, x1) = (broadcast::<5, R, 0>(x), broadcast::<5, R, 1>(x));
                *d = dot(*d, x0, w2);
                *c = dot(*c, x0, w1);
                *d = dot(*d, x1, w1);
                *a = dot_at::<5, R, 3>(*a, x, w0);
                *c = dot(*c, x1, w0);
                *d = dot_at::<5, R, 2>(*d, x, w0);
                *b = dot_at::<5, R, 4>(*b, x, w0);
            }
        }
    }
}

/// Words that meet weights of 16 bits, modulo `2^K`. The last two sums may wrap; the digits below have 8 bits, so that their sums over a block
/// are exact, or 12: a pair of products adds at most 2^27.
pub struct Narrow<const K: u32>;

macro_rules! narrow {
    ($k:literal, $x:literal: $($p:literal)*, $rows:literal, $digits:expr, $($more:tt)*) => {
        impl Cut<$x> for Narrow<$k> {
            const DIGITS: [(u32, u32); $x] = $digits;
        }

        impl Scheme<$x, 1, $x> for Narrow<$k> {
            const PLACES: [(u32, u32); $x] = {
                let (mut places, mut p) = ([(0, NOWHERE); $x], 0);
                while p < $x {
                    places[p].0 = Self::DIGITS[p].0;
                    p += 1;
                }
                places
            };
            const EXACT: usize = $x - 2;
            const ROWS: usize = $rows;
            $($more)*

            #[target_feature(enable = "avx512f,avx512bw")]
            #[inline]
            unsafe fn cut(words: [__m512i; 4]) -> [__m512i; $x] {
                digits::<$x, Self>(words)
            }

            #[target_feature(enable = "avx512f,avx512vnni")]
            #[inline]
            unsafe fn multiply<const R: usize, const P: usize>(
                x: *const [i16; 2],
                w: &[[__m512i; 1]; P],
                sums: &mut [[__m512i; $x]; P],
            ) {
                // SAFETY: the caller's.
                unsafe {
                    $({
                        let x = broadcast::<$x, R, $p>(x);
                        for (w, sums) in w.iter().zip(&mut *sums) {
                            sums[$p] = dot(sums[$p], x, w[0]);
                        }
                    })*
                }
            }
        }
    };
}

narrow!(32, 2: 0 1, 6, [(0, 16), (16, 16)],);
narrow!(40, 3: 0 1 2, 4, [(0, 8), (8, 16), (24, 16)],);
narrow!(44, 3: 0 1 2, 4, [(0, 12), (12, 16), (28, 16)], const STEPS: usize = 15; const SHIFT: u32 = 12;);
narrow!(48, 4: 0 1 2 3, 3, [(0, 8), (8, 8), (16, 16), (32, 16)],);
narrow!(56, 4: 0 1 2 3, 3, [(0, 12), (12, 12), (24, 16), (40, 16)], const STEPS: usize = 15; const SHIFT: u32 = 24;);
narrow!(64, 6: 0 1 2 3 4 5, 2, [(0, 8), (8, 8), (16, 8), (24, 8), (32, 16), (48, 16)],);

/// The digits of 32 words, eight in each register: lane `4 l + r` is of word `l` of register `r`.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
pub(super) fn digits<const X: usize, C: Cut<X>>(words: [__m512i; 4]) -> [__m512i; X] {
    let words = words.map(|v| _mm512_add_epi64(v, _mm512_set1_epi64(C::HALVES as i64)));
    let mut digits = [_mm512_setzero_si512(); X];
    for (p, digit) in digits.iter_mut().enumerate() {
        let (place, bits) = C::DIGITS[p];
        for (r, &word) in words.iter().enumerate() {
            let up = (16 * r as u32 + 64 - place) % 64;
            let field = _mm512_rolv_epi64(word, _mm512_set1_epi64(i64::from(up)));
            let mask = _mm512_set1_epi64((C::MASKS[p] << (16 * r)) as i64);
            *digit = _mm512_or_si512(*digit, _mm512_and_si512(field, mask));
        }
        if p + 1 < X {
            *digit = _mm512_sub_epi16(*digit, _mm512_set1_epi16((1u32 << (bits - 1)) as i16));
        }
    }
    digits
}

/// `acc` and the products of 16-bit lanes, summed two by two. The intrinsic of that name is taken apart by LLVM into a product and
/// an addition wherever the sums depend on each other, at half the speed.
#[target_feature(enable = "avx512f,avx512vnni")]
#[inline]
fn dot(mut acc: __m512i, x: __m512i, w: __m512i) -> __m512i {
    // SAFETY: the processor has the instruction, which touches nothing but its registers.
    unsafe {
        std::arch::asm!(
            "vpdpwssd {0}, {1}, {2}",
            inout(zmm_reg) acc,
            in(zmm_reg) x,
            in(zmm_reg) w,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    acc
}

/// [`dot`] with the pair of 16-bit numbers that is number `D` of `X` of row `R` at `x`, in all lanes.
///
/// # Safety
/// There it is.
#[target_feature(enable = "avx512f,avx512vnni")]
#[inline]
unsafe fn dot_at<const X: usize, const R: usize, const D: usize>(
    mut acc: __m512i,
    x: *const [i16; 2],
    w: __m512i,
) -> __m512i {
    // SAFETY: the caller's.
    unsafe {
        std::arch::asm!(
            "vpdpwssd {0}, {1}, dword ptr [{2} + {3}]{{1to16}}",
            inout(zmm_reg) acc,
            in(zmm_reg) w,
            in(reg) x,
            const 4 * (R * X + D),
            options(pure, readonly, nostack, preserves_flags)
        );
    }
    acc
}

/// The pair of 16-bit numbers that is number `D` of `X` of row `R` at `x`, in all lanes. LLVM would rather load several at once and then permute them, which
/// takes the place of products.
///
/// # Safety
/// There it is.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn broadcast<const X: usize, const R: usize, const D: usize>(x: *const [i16; 2]) -> __m512i {
    let out;
    // SAFETY: the caller's.
    unsafe {
        std::arch::asm!(
            "vpbroadcastd {0}, dword ptr [{1} + {2}]",
            out(zmm_reg) out,
            in(reg) x,
            const 4 * (R * X + D),
            options(pure, readonly, nostack, preserves_flags)
        );
    }
    out
}
