//! Products with ring words by `vpdpwssd` (AVX-512 VNNI): 32 multiply-adds of 16-bit integers an instruction, summed in pairs
//! into 32-bit lanes. Words are cut into signed digits, and each product of digits that matters is added to the sum of its place.
//!
//! A lane is an output: two columns of sixteen rows of `w` lie side by side in a register (a panel), and meet two columns of a row of `x` that
//! are broadcast. So no sum is ever taken across lanes, and what a block of columns costs at its end is small.
//!
//! A sum whose place lies at `2^(k - 32)` or above may wrap at 32 bits: what it loses lies at `2^k`. The sums below have digits
//! short enough to be exact over a block of columns, or over [`Scheme::STEPS`] pairs of them: then what is above [`Scheme::SHIFT`] bits is
//! moved to a sum of its own, which may wrap.

use super::planes::Load;
use std::arch::x86_64::*;
use std::marker::PhantomData;

/// The widest ring of [`Words`]: ring words by ring words.
pub const WIDEST: u32 = 48;
/// Rows of `x` from which cutting `w` pays.
pub const FEWEST: usize = 4;
/// Rows of `x` that a tile has a multiple of, whatever the scheme, and rows of `w`: those of two panels.
pub const GRAIN: (usize, usize) = (144, 2 * OUTPUTS);
/// Columns of `x` whose digits meet all of a tile before the next: those of a tile stay in the L2 cache.
const BLOCK: usize = 256;
/// A shift that leaves nothing.
const NOWHERE: u32 = 64;
/// 16-bit lanes of a register.
const LANES: usize = 32;
/// Rows of `w` in one panel.
const OUTPUTS: usize = 16;

/// A register in memory: one that straddles two cache lines is loaded at half the speed.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Register([i16; LANES]);

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
    /// Rows of `x` that meet `W_PANELS` panels of `w` in registers: as many sums as those hold.
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
fn digits<const X: usize, C: Cut<X>>(words: [__m512i; 4]) -> [__m512i; X] {
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

/// A block of columns.
#[derive(Clone, Copy)]
struct Block {
    from: usize,
    to: usize,
}

impl Block {
    fn of(n: usize) -> impl Iterator<Item = Block> {
        (0..n).step_by(BLOCK).map(move |from| Block { from, to: n.min(from + BLOCK) })
    }

    fn pairs(self) -> usize {
        (self.to - self.from).div_ceil(2)
    }
}

/// Rows of words, cut: block by block of columns, in it group by group of as many rows as meet a panel at once, in that pair by pair of columns, row by
/// row, digit by digit. Behind the last row and column are zeros.
pub struct Rows<C, const X: usize, const W: usize, const S: usize> {
    rows: usize,
    n: usize,
    pairs: Vec<[i16; 2]>,
    scheme: PhantomData<C>,
}

impl<C: Scheme<X, W, S>, const X: usize, const W: usize, const S: usize> Rows<C, X, W, S> {
    /// `P` panels of `w` meet rows at once.
    const EACH: usize = C::ROWS * X;

    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    fn cut(x: &[u64], n: usize) -> Self {
        let rows = x.len() / n;
        let mut this = Rows { rows, n, pairs: Vec::new(), scheme: PhantomData };
        this.pairs = vec![[0; 2]; rows.div_ceil(C::ROWS) * Self::EACH * n.div_ceil(2)];
        // Lane 4 l + r of the planes holds column 8 r + l.
        let order: [i16; LANES] = std::array::from_fn(|i| (4 * (i % 8) + i / 8) as i16);
        for (s, row) in x.chunks_exact(n).enumerate() {
            for block in Block::of(n) {
                let at = this.group(block, s / C::ROWS).start + s % C::ROWS * X;
                for (i, words) in row[block.from..block.to].chunks(LANES).enumerate() {
                    let words: [__m512i; 4] = std::array::from_fn(|r| {
                        let lanes = ((1u32 << words.len().saturating_sub(8 * r).min(8)) - 1) as u8;
                        // SAFETY: only lanes within `words` are read, and the address stays within it or is unused.
                        unsafe { _mm512_maskz_loadu_epi64(lanes, words.as_ptr().wrapping_add(8 * r).cast()) }
                    });
                    let mut planes = [[[0i16; 2]; LANES / 2]; X];
                    // SAFETY: the caller's processor has the instructions; `order` and the planes have the 32 lanes that are loaded and
                    // stored.
                    unsafe {
                        let order = _mm512_loadu_si512(order.as_ptr().cast());
                        for (out, plane) in planes.iter_mut().zip(C::cut(words)) {
                            _mm512_storeu_si512(out.as_mut_ptr().cast(), _mm512_permutexvar_epi16(order, plane));
                        }
                    }
                    let (at, have) = (at + i * LANES / 2 * Self::EACH, (block.pairs() - i * LANES / 2).min(LANES / 2));
                    for (i, out) in this.pairs[at..].chunks_mut(Self::EACH).take(have).enumerate() {
                        for (out, plane) in out[..X].iter_mut().zip(&planes) {
                            *out = plane[i];
                        }
                    }
                }
            }
        }
        this
    }

    /// Where a group of rows has its digits of a block.
    fn group(&self, block: Block, group: usize) -> std::ops::Range<usize> {
        let each = block.pairs() * Self::EACH;
        let at = self.rows.div_ceil(C::ROWS) * Self::EACH * block.from / 2 + group * each;
        at..at + each
    }

    /// `rows[s][j] += sum_i x[first + s][i] w[j][i]`, where `pack` makes a panel: a block of columns of the [`OUTPUTS`] rows of `w` from `j`
    /// on, zeros where there are none. `P` panels meet rows of `x` at once.
    #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl,avx512vnni")]
    fn tile<const P: usize>(
        &self,
        first: usize,
        rows: &mut [&mut [u64]],
        mut pack: impl FnMut(usize, Block, &mut [Register]),
    ) {
        let m = rows.first().map_or(0, |r| r.len());
        assert!(rows.iter().all(|r| r.len() == m) && first + rows.len() <= self.rows);
        assert!(first.is_multiple_of(C::ROWS), "a tile begins with a group");
        let mut panels = vec![Register([0; LANES]); P * W * BLOCK.min(self.n).div_ceil(2)];
        for block in Block::of(self.n) {
            let panels = &mut panels[..P * W * block.pairs()];
            for j in (0..m).step_by(P * OUTPUTS) {
                for (q, panel) in panels.chunks_exact_mut(W * block.pairs()).enumerate() {
                    pack(j + q * OUTPUTS, block, panel);
                }
                for (group, rows) in rows.chunks_mut(C::ROWS).enumerate() {
                    let x = &self.pairs[self.group(block, first / C::ROWS + group)];
                    match rows.len() {
                        1 => meet::<C, X, W, S, P, 1>(x, panels, rows, j),
                        2 => meet::<C, X, W, S, P, 2>(x, panels, rows, j),
                        3 => meet::<C, X, W, S, P, 3>(x, panels, rows, j),
                        4 => meet::<C, X, W, S, P, 4>(x, panels, rows, j),
                        5 => meet::<C, X, W, S, P, 5>(x, panels, rows, j),
                        6 => meet::<C, X, W, S, P, 6>(x, panels, rows, j),
                        7 => meet::<C, X, W, S, P, 7>(x, panels, rows, j),
                        _ => meet::<C, X, W, S, P, 8>(x, panels, rows, j),
                    }
                }
            }
        }
    }

    /// A panel's rows of `w`, which are `n` apart and `m` in all: those of a block from row `j` on, and `none` where there are none.
    fn panel<'a, V>(
        w: &'a [V],
        none: &'a [V; BLOCK],
        (m, n): (usize, usize),
        j: usize,
        block: Block,
    ) -> [&'a [V]; OUTPUTS] {
        std::array::from_fn(|i| match j + i {
            at if at < m => &w[at * n + block.from..at * n + block.to],
            _ => &none[..block.to - block.from],
        })
    }

    /// [`Rows::tile`] by rows of ring words, `n` apart, of which `cut` makes numbers.
    #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl,avx512vnni")]
    fn by_words(&self, w: &[u64], n: usize, rows: &mut [&mut [u64]], cut: impl Fn([__m512i; 4]) -> [__m512i; W]) {
        let (m, none) = (rows.first().map_or(0, |r| r.len()), [0; BLOCK]);
        assert!(w.len() == m * n && n >= self.n, "w is m x n");
        self.tile::<1>(0, rows, |j, block, panel| pack_words(Self::panel(w, &none, (m, n), j, block), panel, &cut));
    }

    /// [`Rows::tile`] by rows of weights.
    #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl,avx512vnni")]
    fn by_weights<V: Load>(&self, first: usize, w: &[V], rows: &mut [&mut [u64]]) {
        let (m, n, none) = (rows.first().map_or(0, |r| r.len()), self.n, [V::default(); BLOCK]);
        assert!(w.len() == m * n, "w is m x n");
        self.tile::<2>(first, rows, |j, block, panel| pack_weights(Self::panel(w, &none, (m, n), j, block), panel));
    }
}

/// The first `T` rows of a group by `P` panels, added from column `j` on.
#[inline(never)]
#[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl,avx512vnni")]
fn meet<C: Scheme<X, W, S>, const X: usize, const W: usize, const S: usize, const P: usize, const T: usize>(
    x: &[[i16; 2]],
    panels: &[Register],
    rows: &mut [&mut [u64]],
    j: usize,
) {
    assert!(T <= C::ROWS && rows.len() == T);
    let zero = _mm512_setzero_si512();
    let (mut sums, mut above) = ([[[zero; S]; P]; T], [[[zero; 2]; P]; T]);
    // Rows of a large product are pages apart: what will be added to is asked for before it is needed.
    for row in rows.iter() {
        (0..2 * P).for_each(|half| _mm_prefetch::<_MM_HINT_T0>(row.as_ptr().wrapping_add(j + 8 * half).cast()));
    }
    steps::<C, X, W, S, P, T>(x, panels, &mut sums, &mut above);
    for ((row, sums), above) in rows.iter_mut().zip(&sums).zip(&above) {
        for (q, (sums, above)) in sums.iter().zip(above).enumerate() {
            // Even lanes are the first eight outputs of a panel, odd ones the others.
            let (mut even, mut odd) = (zero, zero);
            let mut add = |v: __m512i, exact: bool, (plus, minus): (u32, u32)| {
                let place = |v, p: u32| _mm512_sllv_epi64(v, _mm512_set1_epi64(i64::from(p)));
                let low = if exact { _mm512_srai_epi64::<32>(_mm512_slli_epi64::<32>(v)) } else { v };
                let high = if exact { _mm512_srai_epi64::<32>(v) } else { _mm512_srli_epi64::<32>(v) };
                even = _mm512_sub_epi64(_mm512_add_epi64(even, place(low, plus)), place(low, minus));
                odd = _mm512_sub_epi64(_mm512_add_epi64(odd, place(high, plus)), place(high, minus));
            };
            for (p, &sum) in sums.iter().enumerate() {
                add(sum, p < C::EXACT, C::PLACES[p]);
                if C::SHIFT > 0 && p < C::EXACT {
                    let (plus, minus) = C::PLACES[p];
                    add(above[p], false, (plus + C::SHIFT, minus + C::SHIFT));
                }
            }
            for (half, sum) in [even, odd].into_iter().enumerate() {
                let out = row.get_mut(j + q * OUTPUTS + 8 * half..).unwrap_or_default();
                let lanes = ((1u32 << out.len().min(8)) - 1) as u8;
                // SAFETY: only lanes within `out` are read and written.
                unsafe {
                    let old = _mm512_maskz_loadu_epi64(lanes, out.as_ptr().cast());
                    _mm512_mask_storeu_epi64(out.as_mut_ptr().cast(), lanes, _mm512_add_epi64(old, sum));
                }
            }
        }
    }
}

/// The sums of [`meet`], and what was moved out of them. By itself, and not inlined, so that all of them stay in registers.
#[inline(never)]
#[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl,avx512vnni")]
fn steps<C: Scheme<X, W, S>, const X: usize, const W: usize, const S: usize, const P: usize, const T: usize>(
    x: &[[i16; 2]],
    panels: &[Register],
    out: &mut [[[__m512i; S]; P]; T],
    above: &mut [[[__m512i; 2]; P]; T],
) {
    let (pairs, each) = (panels.len() / (P * W), C::ROWS * X);
    assert!(T <= C::ROWS && panels.len() == pairs * P * W && x.len() == pairs * each);
    assert!(C::STEPS >= pairs || C::SHIFT > 0 && C::EXACT <= 2, "sums that stay exact");
    let (shift, low) = (_mm512_set1_epi32(C::SHIFT as i32), _mm512_set1_epi32((1 << C::SHIFT) - 1));
    let mut sums = *out;
    let mut i = 0;
    while i < pairs {
        let to = pairs.min(i + C::STEPS);
        loop {
            // SAFETY: a panel has W registers for each of the pairs, and the group X digits of each of at least T rows; the processor
            // has the instructions.
            unsafe {
                let w: [[__m512i; W]; P] = std::array::from_fn(|q| {
                    let at = panels.as_ptr().add((q * pairs + i) * W);
                    std::array::from_fn(|p| _mm512_load_si512(at.add(p).cast()))
                });
                let x = x.as_ptr().add(i * each);
                // Unrolled by hand: the compiler stops at seven.
                macro_rules! rows {
                    ($($s:literal)*) => {
                        $(if let Some(sums) = sums.get_mut($s) {
                            C::multiply::<$s, P>(x, &w, sums);
                        })*
                    };
                }
                rows!(0 1 2 3 4 5 6 7);
            }
            i += 1;
            if i >= to {
                break;
            }
        }
        if C::SHIFT > 0 {
            for (sums, above) in sums.as_flattened_mut().iter_mut().zip(above.as_flattened_mut()) {
                for (sum, above) in sums.iter_mut().zip(above).take(C::EXACT) {
                    *above = _mm512_add_epi32(*above, _mm512_srav_epi32(*sum, shift));
                    *sum = _mm512_and_si512(*sum, low);
                }
            }
        }
    }
    *out = sums;
}

/// Two columns of sixteen rows of ring words a step: what `cut` makes of them.
#[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl")]
fn pack_words<const W: usize>(
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
fn pack_weights<V: Load>(rows: [&[V]; OUTPUTS], panel: &mut [Register]) {
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

/// Ring words, cut for products with ring words.
pub enum Words {
    /// Modulo 2^43.
    Shortest(Rows<Shortest, 4, 4, 4>),
    /// Modulo 2^44.
    Short(Rows<Short, 3, 3, 3>),
    /// Modulo 2^48.
    Long(Rows<Long, 5, 3, 4>),
}

impl Words {
    /// Of rows of `n` words, for products modulo `2^k`.
    ///
    /// # Safety
    /// The processor has AVX-512 F, DQ, BW, VL and VNNI.
    ///
    /// # Panics
    /// If `k` is above [`WIDEST`].
    #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl,avx512vnni")]
    pub unsafe fn cut(x: &[u64], n: usize, k: u32) -> Words {
        assert!(k <= WIDEST);
        match k {
            ..=43 => Words::Shortest(Rows::cut(x, n)),
            44 => Words::Short(Rows::cut(x, n)),
            _ => Words::Long(Rows::cut(x, n)),
        }
    }

    /// `rows[s][j] += sum_i x[s][i] w[j stride + i]`, modulo the `2^k` that the digits were cut for; higher bits mean nothing.
    ///
    /// # Safety
    /// The processor has AVX-512 F, DQ, BW, VL and VNNI.
    ///
    /// # Panics
    /// If `w` has not `rows[_].len()` rows, or `x` not so many.
    #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl,avx512vnni")]
    pub unsafe fn tile(&self, w: &[u64], stride: usize, rows: &mut [&mut [u64]]) {
        match self {
            // SAFETY: the caller's processor has the instructions.
            Words::Shortest(x) => x.by_words(w, stride, rows, |v| unsafe { Shortest::cut(v) }),
            Words::Short(x) => x.by_words(w, stride, rows, |v| digits::<3, Short>(v)),
            Words::Long(x) => x.by_words(w, stride, rows, |v| digits::<3, Long>(v)),
        }
    }
}

/// Ring words, cut for products with weights of at most 16 bits.
pub enum ByWeights {
    /// Modulo 2^32.
    To32(Rows<Narrow<32>, 2, 1, 2>),
    /// Modulo 2^40.
    To40(Rows<Narrow<40>, 3, 1, 3>),
    /// Modulo 2^44.
    To44(Rows<Narrow<44>, 3, 1, 3>),
    /// Modulo 2^48.
    To48(Rows<Narrow<48>, 4, 1, 4>),
    /// Modulo 2^56.
    To56(Rows<Narrow<56>, 4, 1, 4>),
    /// Modulo 2^64.
    To64(Rows<Narrow<64>, 6, 1, 6>),
}

impl ByWeights {
    /// Of rows of `n` words, for products modulo `2^k`.
    ///
    /// # Safety
    /// The processor has AVX-512 F, DQ, BW, VL and VNNI.
    #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl,avx512vnni")]
    pub unsafe fn cut(x: &[u64], n: usize, k: u32) -> ByWeights {
        match k {
            ..=32 => ByWeights::To32(Rows::cut(x, n)),
            33..=40 => ByWeights::To40(Rows::cut(x, n)),
            41..=44 => ByWeights::To44(Rows::cut(x, n)),
            45..=48 => ByWeights::To48(Rows::cut(x, n)),
            49..=56 => ByWeights::To56(Rows::cut(x, n)),
            _ => ByWeights::To64(Rows::cut(x, n)),
        }
    }

    /// `rows[s][j] += sum_i x[first + s][i] w[j n + i]`, modulo the `2^k` that the digits were cut for; higher bits mean nothing.
    ///
    /// # Safety
    /// The processor has AVX-512 F, DQ, BW, VL and VNNI.
    ///
    /// # Panics
    /// If `w` is not `rows[_].len() x n`, there are not so many rows, or `first` is no multiple of those of [`GRAIN`].
    #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl,avx512vnni")]
    pub unsafe fn tile<V: Load>(&self, first: usize, w: &[V], rows: &mut [&mut [u64]]) {
        match self {
            ByWeights::To32(x) => x.by_weights(first, w, rows),
            ByWeights::To40(x) => x.by_weights(first, w, rows),
            ByWeights::To44(x) => x.by_weights(first, w, rows),
            ByWeights::To48(x) => x.by_weights(first, w, rows),
            ByWeights::To56(x) => x.by_weights(first, w, rows),
            ByWeights::To64(x) => x.by_weights(first, w, rows),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ring::{Isa, mask};

    /// Digits at the ends of their ranges in every column, so that all products have one sign: the largest sums there are.
    #[test]
    fn extreme_digits_of_either_sign() {
        if !Isa::Vnni.supported() {
            return;
        }
        let (t, m, n) = (5, 13, 1600);
        let words = [
            0x2000,
            0x1fff,
            0x2000 | 0x8000 << 14,
            0x1fff | 0x7fff << 14,
            0x0800,
            0x07ff,
            0x07ff | 0x7fff << 12,
            0x0800 | 0x0800 << 12 | 0x0800 << 24 | 0x8000 << 36,
            0x7f7f_7f7f_7f7f,
            0x8000_8000_8000,
            0x7fff_7fff_7fff,
            0x80ff_80ff_80ff,
            0x00ff_00ff_00ff,
            0x2000 | 0x4000 << 14,
            0x1fff | 0x3fff << 14,
            0x2000 | 0x4000 << 14 | 0x2000 << 29,
            0x7f | 0x7fff << 8 | 0x7fff << 24,
            0x80 | 0x8000 << 8 | 0x8000 << 24,
            1 << 43,
            u64::MAX,
        ];
        let tile = |run: &dyn Fn(&mut [&mut [u64]]), k: u32, one: u64| {
            let mut c = vec![0; t * m];
            run(&mut c.chunks_mut(m).collect::<Vec<_>>());
            let want = one.wrapping_mul(n as u64);
            assert!(c.iter().all(|v| (v ^ want) & mask(k) == 0), "a column gives {one:x}, modulo 2^{k}");
        };
        for k in [32, 33, 40, 41, 43, 44, 45, 47, 48, 56, 64] {
            for a in words {
                let x = vec![a; t * n];
                for b in words.into_iter().filter(|_| k <= WIDEST) {
                    let w = vec![b; m * n];
                    // SAFETY: the processor has the instructions.
                    tile(&|rows| unsafe { Words::cut(&x, n, k).tile(&w, n, rows) }, k, a.wrapping_mul(b));
                }
                for b in [i16::MIN, i16::MAX, -1] {
                    let w = vec![b; m * n];
                    // SAFETY: as above.
                    tile(&|rows| unsafe { ByWeights::cut(&x, n, k).tile(0, &w, rows) }, k, a.wrapping_mul(b as u64));
                }
            }
        }
    }
}
