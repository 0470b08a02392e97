//! Products with ring words by `vpdpwssd` (AVX-512 VNNI): 32 multiply-adds of 16-bit integers an instruction, summed in pairs
//! into 32-bit lanes. Words are cut into signed digits, and each product of digits that matters is added to the sum of its place.
//!
//! A lane is an output: two columns of sixteen rows of `w` lie side by side in a register (a panel), and meet two columns of a row of `x` that
//! are broadcast. So no sum is ever taken across lanes, and what a block of columns costs at its end is small.
//!
//! A sum whose place lies at `2^(k - 32)` or above may wrap at 32 bits: what it loses lies at `2^k`. The sums below have digits
//! short enough to be exact over a block of columns, or over [`Scheme::STEPS`] pairs of them: then what is above [`Scheme::SHIFT`] bits is
//! moved to a sum of its own, which may wrap.

mod pack;
mod scheme;

use super::planes::Load;
use pack::{pack_weights, pack_words};
use scheme::{Long, Narrow, Scheme, Short, Shortest, digits};
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
/// 16-bit lanes of a register.
const LANES: usize = 32;
/// Rows of `w` in one panel.
const OUTPUTS: usize = 16;

/// A register in memory: one that straddles two cache lines is loaded at half the speed.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Register([i16; LANES]);

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
