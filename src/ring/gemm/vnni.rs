//! Products with ring words by `vpdpwssd` (AVX-512 VNNI): 32 multiply-adds of 16-bit integers an instruction, summed in pairs
//! into 32-bit lanes. Words are cut into signed digits, a digit's plane meets another's, and the sums are put together by their
//! places at the end of a block of columns.
//!
//! A sum whose place lies at `2^(k - 32)` or above may wrap at 32 bits: what it loses lies at `2^k`. The sums below have digits
//! short enough to be exact over a block of columns.

use super::planes::Load;
use std::arch::x86_64::*;

/// The widest ring of [`Digits`]: ring words by ring words.
pub const WIDEST: u32 = 48;
/// Rows of `x` from which cutting `w` pays.
pub const FEWEST: usize = 4;
/// Columns in one register.
const LANES: usize = 32;

/// Digits that stay in the L2 cache beside what they meet.
const CACHED: usize = 1 << 18;

/// A register in memory: one that straddles two cache lines is loaded at half the speed.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Register([i16; LANES]);

const EMPTY: Register = Register([0; LANES]);

/// How words are cut into `P` signed digits of 16 bits at most. A digit's carry goes to the next, the last one's is lost. Constants, so
/// that the cutting is unrolled: of a few rows it takes as long as the product.
pub trait Cut<const P: usize> {
    /// From which bit on, and how many. Bits that two share are the lower one's, and zero in the higher.
    const DIGITS: [(u32, u32); P];

    /// Columns of a block: sums over so many that must be exact fit 32 bits. At most 768, for what a block needs to stay in the L1 cache.
    const COLUMNS: usize;

    /// The bits of each digit in a word moved down to its place.
    const MASKS: [u64; P] = {
        let (mut masks, mut p, mut end) = ([0; P], 0, 0);
        while p < P {
            let (place, bits) = Self::DIGITS[p];
            masks[p] = ((1 << bits) - 1) & !((1 << (end - place)) - 1);
            (p, end) = (p + 1, place + bits);
        }
        masks
    };

    /// Half of every digit but the last: added before the fields are taken and subtracted after, it makes them signed.
    const HALVES: u64 = {
        let (mut halves, mut p) = (0, 0);
        while p + 1 < P {
            halves += 1 << (Self::DIGITS[p].0 + Self::DIGITS[p].1 - 1);
            p += 1;
        }
        halves
    };
}

/// Both operands of a product of ring words modulo `2^44`: `x0 w0 + 2^14 (x0 w1 + x1 w0) + 2^28 (x1 w1 + x0 w2 + x2 w0)`. The
/// last digit has 14 bits and stands two higher, so that it shares a sum with the product of the middle ones; its product with
/// another than the lowest begins at 2^44.
struct Short;

impl Cut<3> for Short {
    const DIGITS: [(u32, u32); 3] = [(0, 14), (14, 16), (28, 16)];
    // A pair of products adds at most 2^27.
    const COLUMNS: usize = 15 * LANES;
}

/// The same modulo `2^48`: `x0 w0 + 2^16 (x0 w1 + x1 w0) + 2^32 (x1 w1 + x0 w2 + x2 w0)`. The lowest digit of `x` is cut in two
/// bytes when it meets that of `w`, since those sums must be exact.
struct Long;

impl Cut<3> for Long {
    const DIGITS: [(u32, u32); 3] = [(0, 16), (16, 16), (32, 16)];
    // A pair of products with bytes adds at most 2^24.
    const COLUMNS: usize = 24 * LANES;
}

/// Words that meet weights of 16 bits: all digits but the last two have 12 bits, their sums are exact: a pair of products adds at
/// most 2^27.
pub struct Ring<const P: usize>;

impl Cut<2> for Ring<2> {
    const DIGITS: [(u32, u32); 2] = [(0, 16), (16, 16)];
    const COLUMNS: usize = 24 * LANES;
}

impl Cut<3> for Ring<3> {
    const DIGITS: [(u32, u32); 3] = [(0, 12), (12, 16), (28, 16)];
    const COLUMNS: usize = 15 * LANES;
}

impl Cut<4> for Ring<4> {
    const DIGITS: [(u32, u32); 4] = [(0, 12), (12, 12), (24, 16), (40, 16)];
    const COLUMNS: usize = 15 * LANES;
}

impl Cut<5> for Ring<5> {
    const DIGITS: [(u32, u32); 5] = [(0, 12), (12, 12), (24, 12), (36, 16), (52, 16)];
    const COLUMNS: usize = 15 * LANES;
}

/// The digits of `row`, `P` registers for each 32 columns, zeros behind its end. Columns are in an order of their own, the same for
/// all rows, or, with `in_order`, in that of the row.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn digits<const P: usize, C: Cut<P>>(row: &[u64], in_order: bool, out: &mut [Register]) {
    assert!(out.len() == P * row.len().div_ceil(LANES));
    let halves = _mm512_set1_epi64(C::HALVES as i64);
    // Lane 4 l + r of the registers below holds column 8 r + l.
    let order: [i16; LANES] = std::array::from_fn(|i| (4 * (i % 8) + i / 8) as i16);
    for (row, out) in row.chunks(LANES).zip(out.chunks_exact_mut(P)) {
        let words: [__m512i; 4] = std::array::from_fn(|r| {
            let have = row.len().saturating_sub(8 * r).min(8);
            let lanes = ((1u32 << have) - 1) as u8;
            // SAFETY: only lanes within `row` are read, and the address stays within it or is unused.
            let v = unsafe { _mm512_maskz_loadu_epi64(lanes, row.as_ptr().wrapping_add(8 * r).cast()) };
            _mm512_add_epi64(v, halves)
        });
        for (p, out) in out.iter_mut().enumerate() {
            let (place, bits) = C::DIGITS[p];
            let mut plane = _mm512_setzero_si512();
            for (r, &word) in words.iter().enumerate() {
                let up = (16 * r as u32 + 64 - place) % 64;
                let field = _mm512_rolv_epi64(word, _mm512_set1_epi64(i64::from(up)));
                let mask = _mm512_set1_epi64((C::MASKS[p] << (16 * r)) as i64);
                plane = _mm512_or_si512(plane, _mm512_and_si512(field, mask));
            }
            if p + 1 < P {
                plane = _mm512_sub_epi16(plane, _mm512_set1_epi16((1u32 << (bits - 1)) as i16));
            }
            // SAFETY: `order` and `out` have the 32 lanes that are loaded and stored.
            unsafe {
                if in_order {
                    plane = _mm512_permutexvar_epi16(_mm512_loadu_si512(order.as_ptr().cast()), plane);
                }
                _mm512_store_si512(out.0.as_mut_ptr().cast(), plane);
            }
        }
    }
}

/// Rows of `n` words, cut: block by block of columns, within it row by row.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn rows<const P: usize, C: Cut<P>>(x: &[u64], n: usize, in_order: bool) -> Vec<Register> {
    let rows = x.len() / n;
    let mut blocks = vec![EMPTY; P * rows * n.div_ceil(LANES)];
    for (s, row) in x.chunks_exact(n).enumerate() {
        for block in Block::of(n, C::COLUMNS) {
            digits::<P, C>(&row[block.from..block.to], in_order, &mut blocks[block.rows(P, rows, s, 1)]);
        }
    }
    blocks
}

/// A block of columns.
#[derive(Clone, Copy)]
struct Block {
    from: usize,
    to: usize,
}

impl Block {
    fn of(n: usize, columns: usize) -> impl Iterator<Item = Block> {
        (0..n).step_by(columns).map(move |from| Block { from, to: n.min(from + columns) })
    }

    /// Registers that a plane takes.
    fn registers(self) -> usize {
        (self.to - self.from).div_ceil(LANES)
    }

    /// Where `count` rows from `first` of `rows` have their digits in this block.
    fn rows(self, planes: usize, rows: usize, first: usize, count: usize) -> std::ops::Range<usize> {
        let each = planes * self.registers();
        let at = planes * rows * self.from / LANES + first * each;
        at..at + count * each
    }
}

/// Ring words, cut for products with ring words.
pub struct Digits {
    long: bool,
    rows: usize,
    n: usize,
    blocks: Vec<Register>,
}

impl Digits {
    /// Of rows of `n` words, for products modulo `2^k`.
    ///
    /// # Safety
    /// The processor has AVX-512 F, DQ, BW, VL and VNNI.
    ///
    /// # Panics
    /// If `k` is above [`WIDEST`].
    #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl,avx512vnni")]
    pub unsafe fn cut(x: &[u64], n: usize, k: u32) -> Digits {
        assert!(k <= WIDEST);
        let long = k > 44;
        let blocks = if long { rows::<3, Long>(x, n, false) } else { rows::<3, Short>(x, n, false) };
        Digits { long, rows: x.len() / n, n, blocks }
    }

    /// `rows[s][j] += sum_i x[first + s][i] w[j n + i]`, modulo the `2^k` that the digits were cut for; higher bits mean nothing.
    ///
    /// # Safety
    /// The processor has AVX-512 F, DQ, BW, VL and VNNI.
    ///
    /// # Panics
    /// If `w` is not `rows[_].len() x n`, or there are not so many rows.
    #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl,avx512vnni")]
    pub unsafe fn tile(&self, first: usize, w: &[u64], rows: &mut [&mut [u64]]) {
        // As many sums as registers hold.
        if self.long { self.tile_of::<Long, 3, 4>(first, w, rows) } else { self.tile_of::<Short, 4, 3>(first, w, rows) }
    }

    /// [`Digits::tile`], `M` rows of `w` at a time, with `S` sums a product.
    #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl,avx512vnni")]
    fn tile_of<C: Cut<3>, const M: usize, const S: usize>(&self, first: usize, w: &[u64], rows: &mut [&mut [u64]]) {
        let (n, m) = (self.n, rows.first().map_or(0, |r| r.len()));
        assert!(w.len() == m * n && rows.iter().all(|r| r.len() == m) && first + rows.len() <= self.rows);
        let mut cut = vec![EMPTY; M * 3 * C::COLUMNS.min(n).div_ceil(LANES)];
        for block in Block::of(n, C::COLUMNS) {
            let x = &self.blocks[block.rows(3, self.rows, first, rows.len())];
            let each = 3 * block.registers();
            let mut j = 0;
            while j < m {
                let wide = if m - j >= M { M } else { 1 };
                for (q, out) in cut.chunks_exact_mut(each).take(wide).enumerate() {
                    digits::<3, C>(&w[(j + q) * n..][block.from..block.to], false, out);
                }
                let w = &cut[..wide * each];
                let mut s = 0;
                while s < rows.len() {
                    let x = &x[s * each..];
                    let rows = &mut rows[s..];
                    s += match (rows.len(), wide == M) {
                        (2.., true) => words::<2, M, S>(x, w, each, rows, j),
                        (_, true) => words::<1, M, S>(x, w, each, rows, j),
                        (2.., _) => words::<2, 1, S>(x, w, each, rows, j),
                        _ => words::<1, 1, S>(x, w, each, rows, j),
                    };
                }
                j += wide;
            }
        }
    }
}

/// `T` rows of digits of `x` by `M` of `w`, added at column `j` of the first `T` of `rows`; gives `T`. Of [`Short`] digits with
/// three sums, of [`Long`] ones with four.
#[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl,avx512vnni")]
fn words<const T: usize, const M: usize, const S: usize>(
    x: &[Register],
    w: &[Register],
    each: usize,
    rows: &mut [&mut [u64]],
    j: usize,
) -> usize {
    assert!(x.len() >= T * each && w.len() >= M * each && each.is_multiple_of(3) && T * M <= 8);
    let mut acc = [[[_mm512_setzero_si512(); S]; M]; T];
    let mut i = 0;
    while i < each {
        let load = |v: &[Register], s: usize| -> [__m512i; 3] {
            // SAFETY: rows s < T of x and q < M of w have `each` registers, a multiple of three, and i is one below it.
            unsafe {
                let at = v.as_ptr().add(s * each + i);
                std::array::from_fn(|p| _mm512_load_si512(at.add(p).cast()))
            }
        };
        let xs: [[__m512i; 3]; T] = std::array::from_fn(|s| load(x, s));
        for q in 0..M {
            let [w0, w1, w2] = load(w, q);
            for s in 0..T {
                let ([x0, x1, x2], acc) = (xs[s], &mut acc[s][q]);
                if S == 3 {
                    acc[0] = dot(acc[0], x0, w0);
                } else {
                    acc[0] = dot(acc[0], _mm512_and_si512(x0, _mm512_set1_epi16(0xff)), w0);
                    acc[1] = dot(acc[1], _mm512_srai_epi16::<8>(x0), w0);
                }
                acc[S - 2] = dot(acc[S - 2], x0, w1);
                acc[S - 1] = dot(acc[S - 1], x1, w1);
                acc[S - 2] = dot(acc[S - 2], x1, w0);
                acc[S - 1] = dot(acc[S - 1], x0, w2);
                acc[S - 1] = dot(acc[S - 1], x2, w0);
            }
        }
        i += 3;
    }
    let mut sums = [_mm512_setzero_si512(); 8];
    for (sum, acc) in sums.iter_mut().zip(acc.as_flattened()) {
        let (middle, high) = (wrapped(acc[S - 2]), wrapped(acc[S - 1]));
        *sum = if S == 3 {
            let rest = _mm512_add_epi64(_mm512_slli_epi64::<14>(middle), _mm512_slli_epi64::<28>(high));
            _mm512_add_epi64(exact(acc[0]), rest)
        } else {
            let low = _mm512_add_epi64(exact(acc[0]), _mm512_slli_epi64::<8>(exact(acc[1])));
            _mm512_add_epi64(low, _mm512_add_epi64(_mm512_slli_epi64::<16>(middle), _mm512_slli_epi64::<32>(high)))
        };
    }
    let sums = reduce(sums);
    for (row, sums) in rows.iter_mut().zip(sums.chunks_exact(M)).take(T) {
        for (out, sum) in row[j..j + M].iter_mut().zip(sums) {
            *out = out.wrapping_add(*sum);
        }
    }
    T
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

/// The 32-bit lanes of `v` two by two, as signed integers.
#[target_feature(enable = "avx512f")]
fn exact(v: __m512i) -> __m512i {
    let low = _mm512_srai_epi64::<32>(_mm512_slli_epi64::<32>(v));
    _mm512_add_epi64(low, _mm512_srai_epi64::<32>(v))
}

/// The 32-bit lanes of `v` two by two, modulo 2^32: higher bits mean nothing.
#[target_feature(enable = "avx512f")]
fn wrapped(v: __m512i) -> __m512i {
    _mm512_add_epi64(v, _mm512_srli_epi64::<32>(v))
}

/// The sum of each one's lanes.
#[target_feature(enable = "avx512f")]
fn reduce(v: [__m512i; 8]) -> [u64; 8] {
    let pair = |a, b| _mm512_add_epi64(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    let fold = |a, b| _mm512_add_epi64(_mm512_shuffle_i64x2::<0x88>(a, b), _mm512_shuffle_i64x2::<0xdd>(a, b));
    let (low, high) = (fold(pair(v[0], v[1]), pair(v[2], v[3])), fold(pair(v[4], v[5]), pair(v[6], v[7])));
    let mut out = [0; 8];
    // SAFETY: `out` has the eight words that are stored.
    unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), fold(low, high)) };
    out
}

/// Ring words, cut for products with weights of at most 16 bits.
pub enum Narrow {
    /// Modulo 2^32.
    Two(Planes<2>),
    /// Modulo 2^44.
    Three(Planes<3>),
    /// Modulo 2^56.
    Four(Planes<4>),
    /// Modulo 2^64.
    Five(Planes<5>),
}

impl Narrow {
    /// Of rows of `n` words, for products modulo `2^k`.
    ///
    /// # Safety
    /// The processor has AVX-512 F, DQ, BW, VL and VNNI.
    #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl,avx512vnni")]
    pub unsafe fn cut(x: &[u64], n: usize, k: u32) -> Narrow {
        match k {
            ..=32 => Narrow::Two(Planes::cut(x, n)),
            33..=44 => Narrow::Three(Planes::cut(x, n)),
            45..=56 => Narrow::Four(Planes::cut(x, n)),
            _ => Narrow::Five(Planes::cut(x, n)),
        }
    }

    /// `rows[s][j] += sum_i x[first + s][i] w[j n + i]`, modulo the `2^k` that the digits were cut for; higher bits mean nothing.
    ///
    /// # Safety
    /// The processor has AVX-512 F, DQ, BW, VL and VNNI.
    ///
    /// # Panics
    /// If `w` is not `rows[_].len() x n`, or there are not so many rows.
    #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl,avx512vnni")]
    pub unsafe fn tile<W: Load>(&self, first: usize, w: &[W], rows: &mut [&mut [u64]]) {
        match self {
            Narrow::Two(x) => x.tile::<8, W>(first, w, rows),
            Narrow::Three(x) => x.tile::<6, W>(first, w, rows),
            Narrow::Four(x) => x.tile::<6, W>(first, w, rows),
            Narrow::Five(x) => x.tile::<4, W>(first, w, rows),
        }
    }
}

/// Rows of words in `P` planes.
pub struct Planes<const P: usize> {
    rows: usize,
    n: usize,
    blocks: Vec<Register>,
}

impl<const P: usize> Planes<P>
where
    Ring<P>: Cut<P>,
{
    #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl,avx512vnni")]
    fn cut(x: &[u64], n: usize) -> Self {
        Planes { rows: x.len() / n, n, blocks: rows::<P, Ring<P>>(x, n, true) }
    }

    /// [`Narrow::tile`], `M` rows of weights at a time.
    #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl,avx512vnni")]
    fn tile<const M: usize, W: Load>(&self, first: usize, w: &[W], rows: &mut [&mut [u64]]) {
        let (n, m) = (self.n, rows.first().map_or(0, |r| r.len()));
        assert!(w.len() == m * n && rows.iter().all(|r| r.len() == m) && first + rows.len() <= self.rows);
        // Where the digits of x do not stay in the cache, each block of them meets many rows of w before the next.
        let most = if rows.len() * n * P <= CACHED { M } else { 8 * M };
        let mut sums = vec![0; rows.len() * most];
        for from in (0..m).step_by(most) {
            let outputs = most.min(m - from);
            for block in Block::of(n, Ring::<P>::COLUMNS) {
                let (each, len) = (P * block.registers(), block.to - block.from);
                let x = &self.blocks[block.rows(P, self.rows, first, rows.len())];
                let mut j = 0;
                while j < outputs {
                    let wide = if outputs - j >= M { M } else { 1 };
                    let w = &w[(from + j) * n + block.from..(from + j + wide - 1) * n + block.to];
                    for (x, sums) in x.chunks_exact(each).zip(sums.chunks_exact_mut(most)) {
                        let out = &mut sums[j..j + wide];
                        if wide == M {
                            self.block::<M, W>(x, w, len, out);
                        } else {
                            self.block::<1, W>(x, w, len, out);
                        }
                    }
                    j += wide;
                }
            }
            for (row, sums) in rows.iter_mut().zip(sums.chunks_exact_mut(most)) {
                row[from..from + outputs].iter_mut().zip(sums.iter()).for_each(|(y, sum)| *y = y.wrapping_add(*sum));
                sums.fill(0);
            }
        }
    }

    /// The first `len` columns of one row of digits by `M` rows of weights. Not inlined: the sums take nearly all registers.
    #[inline(never)]
    #[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl,avx512vnni")]
    fn block<const M: usize, W: Load>(&self, x: &[Register], w: &[W], len: usize, out: &mut [u64]) {
        let n = self.n;
        assert!(x.len() == len.div_ceil(LANES) * P && w.len() == (M - 1) * n + len && out.len() == M && M <= 8);
        let mut acc = [[_mm512_setzero_si512(); P]; M];
        let mut i = 0;
        while i < len {
            let lanes = if len - i >= LANES { u32::MAX } else { (1 << (len - i)) - 1 };
            // SAFETY: digits i / LANES of all planes are there.
            let xs: [__m512i; P] =
                std::array::from_fn(|p| unsafe { _mm512_load_si512(x.as_ptr().add(i / LANES * P + p).cast()) });
            for (q, acc) in acc.iter_mut().enumerate() {
                // SAFETY: of row q < M of w, lanes below `len` are read.
                let w = unsafe { W::load(lanes, w.as_ptr().add(q * n + i)) };
                for (acc, x) in acc.iter_mut().zip(xs) {
                    *acc = dot(*acc, x, w);
                }
            }
            i += LANES;
        }
        let mut sums = [_mm512_setzero_si512(); 8];
        for (sum, acc) in sums.iter_mut().zip(acc) {
            for (p, acc) in acc.into_iter().enumerate() {
                let part = if p + 2 < P { exact(acc) } else { wrapped(acc) };
                let part = _mm512_sll_epi64(part, _mm_cvtsi32_si128(Ring::<P>::DIGITS[p].0 as i32));
                *sum = _mm512_add_epi64(*sum, part);
            }
        }
        for (out, sum) in out.iter_mut().zip(reduce(sums)) {
            *out = out.wrapping_add(sum);
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
            1 << 43,
            u64::MAX,
        ];
        let tile = |run: &dyn Fn(&mut [&mut [u64]]), k: u32, one: u64| {
            let mut c = vec![0; t * m];
            run(&mut c.chunks_mut(m).collect::<Vec<_>>());
            let want = one.wrapping_mul(n as u64);
            assert!(c.iter().all(|v| (v ^ want) & mask(k) == 0), "a column gives {one:x}, modulo 2^{k}");
        };
        for k in [32, 33, 40, 44, 45, 47, 48, 56, 64] {
            for a in words {
                let x = vec![a; t * n];
                for b in words.into_iter().filter(|_| k <= WIDEST) {
                    let w = vec![b; m * n];
                    // SAFETY: the processor has the instructions.
                    tile(&|rows| unsafe { Digits::cut(&x, n, k).tile(0, &w, rows) }, k, a.wrapping_mul(b));
                }
                for b in [i16::MIN, i16::MAX, -1] {
                    let w = vec![b; m * n];
                    // SAFETY: as above.
                    tile(&|rows| unsafe { Narrow::cut(&x, n, k).tile(0, &w, rows) }, k, a.wrapping_mul(b as u64));
                }
            }
        }
    }
}
