//! Ring words times ring words modulo `2^k`, `k <= 52`, by `vpmadd52luq`: the low 52 bits of a product of 52-bit words, added to
//! a 64-bit lane; one instruction for eight multiply-adds. A lane's sum wraps at 2^64, a multiple of `2^52`.
//!
//! Four rows of `x` meet four of `w` in sixteen registers of sums, a block of columns at a time: that of `w` stays in the L1 cache, and
//! those of [`CHUNK`] rows of `x` in L2, where they lie one behind the other in the order in which they are read.

use std::arch::x86_64::*;

/// The widest ring.
pub const WIDEST: u32 = 52;
/// Rows of `x` from which it pays: one is over as soon as `w` is read, whichever way.
pub const FEWEST: usize = 2;
/// Rows of `x` that a tile has a multiple of, and rows of `w`.
pub const GRAIN: (usize, usize) = (64, ROWS);
/// Rows of either operand that meet at once.
const ROWS: usize = 4;
/// Columns of a block: four rows take 16 KB.
const COLUMNS: usize = 512;
/// Rows of `x` by which all of `w` is multiplied before the next: a block of them takes 256 KB.
const CHUNK: usize = 64;
/// Lanes of a register.
const LANES: usize = 8;

/// A register in memory: one that straddles two cache lines is loaded at half the speed.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Register([u64; LANES]);

/// Rows of words as they are read: block by block of columns, in it four rows at a time, in that register by register of each row in turn.
/// Behind the last row and column are zeros.
pub struct Words {
    rows: usize,
    n: usize,
    registers: Vec<Register>,
}

impl Words {
    /// Of rows of `n` words.
    pub fn new(x: &[u64], n: usize) -> Words {
        let (rows, wide) = (x.len() / n, n.div_ceil(LANES));
        let groups = rows.div_ceil(ROWS);
        let mut this = Words { rows, n, registers: vec![Register([0; LANES]); groups * ROWS * wide] };
        for (s, row) in x.chunks_exact(n).enumerate() {
            for (block, words) in row.chunks(COLUMNS).enumerate() {
                let at = this.group(block, s / ROWS).start + s % ROWS;
                for (i, words) in words.chunks(LANES).enumerate() {
                    this.registers[at + i * ROWS].0[..words.len()].copy_from_slice(words);
                }
            }
        }
        this
    }

    /// Where a block of four rows is.
    fn group(&self, block: usize, group: usize) -> std::ops::Range<usize> {
        let from = block * COLUMNS;
        let each = ROWS * (self.n - from).min(COLUMNS).div_ceil(LANES);
        let at = self.rows.div_ceil(ROWS) * ROWS * from / LANES + group * each;
        at..at + each
    }

    /// `rows[s][j] += sum_i x[s][i] w[j stride + i]`; bits from 52 on mean nothing.
    ///
    /// # Safety
    /// The processor has AVX-512 F and IFMA.
    ///
    /// # Panics
    /// If there are not as many rows as of `x`, all of the same length, or `w` has not that many rows, or they are closer than they are long.
    #[target_feature(enable = "avx512f,avx512ifma")]
    pub unsafe fn tile(&self, w: &[u64], stride: usize, rows: &mut [&mut [u64]]) {
        let (m, n) = (rows.first().map_or(0, |r| r.len()), self.n);
        assert!(rows.len() == self.rows && rows.iter().all(|r| r.len() == m));
        assert!(stride >= n && w.len() >= m.saturating_sub(1) * stride + n * usize::from(m > 0));
        for block in 0..n.div_ceil(COLUMNS) {
            let from = block * COLUMNS;
            let len = COLUMNS.min(n - from);
            for (chunk, rows) in rows.chunks_mut(CHUNK).enumerate() {
                let mut j = 0;
                while j < m {
                    let w = &w[j * stride + from..];
                    let wide = if m - j >= ROWS { ROWS } else { 1 };
                    for (group, rows) in rows.chunks_mut(ROWS).enumerate() {
                        let x = &self.registers[self.group(block, chunk * CHUNK / ROWS + group)];
                        match (rows.len(), wide) {
                            (4, ROWS) => meet::<4, ROWS>(x, w, (stride, len), rows, j),
                            (3, ROWS) => meet::<3, ROWS>(x, w, (stride, len), rows, j),
                            (2, ROWS) => meet::<2, ROWS>(x, w, (stride, len), rows, j),
                            (_, ROWS) => meet::<1, ROWS>(x, w, (stride, len), rows, j),
                            (4, _) => meet::<4, 1>(x, w, (stride, len), rows, j),
                            (3, _) => meet::<3, 1>(x, w, (stride, len), rows, j),
                            (2, _) => meet::<2, 1>(x, w, (stride, len), rows, j),
                            _ => meet::<1, 1>(x, w, (stride, len), rows, j),
                        }
                    }
                    j += wide;
                }
            }
        }
    }
}

/// A block of `T` rows of `x` by `len` columns of `M` rows of `w`, added from column `j` on.
#[inline(never)]
#[target_feature(enable = "avx512f,avx512ifma")]
fn meet<const T: usize, const M: usize>(
    x: &[Register],
    w: &[u64],
    (stride, len): (usize, usize),
    rows: &mut [&mut [u64]],
    j: usize,
) {
    assert!(T <= ROWS && rows.len() == T && x.len() == ROWS * len.div_ceil(LANES));
    assert!(w.len() >= (M - 1) * stride + len && rows.iter().all(|row| row.len() >= j + M));
    // Rows of a large product are pages apart: what will be added to is asked for before it is needed.
    rows.iter().for_each(|row| _mm_prefetch::<_MM_HINT_T0>(row.as_ptr().wrapping_add(j).cast()));
    let mut sums = [[_mm512_setzero_si512(); M]; T];
    let mut add = |i: usize, lanes: Option<u8>| {
        // SAFETY: a group has `ROWS` registers for every eight columns, row q < M of w holds `len` words from q stride on, and lanes
        // beyond them are not read.
        let (xs, ws): ([__m512i; T], [__m512i; M]) = unsafe {
            let x = x.as_ptr().add(i / LANES * ROWS);
            let w = |q: usize| w.as_ptr().add(q * stride + i).cast::<i64>();
            (
                std::array::from_fn(|s| _mm512_load_si512(x.add(s).cast())),
                std::array::from_fn(|q| match lanes {
                    None => _mm512_loadu_si512(w(q).cast()),
                    Some(lanes) => _mm512_maskz_loadu_epi64(lanes, w(q)),
                }),
            )
        };
        for (sums, x) in sums.iter_mut().zip(xs) {
            for (sum, w) in sums.iter_mut().zip(ws) {
                *sum = _mm512_madd52lo_epu64(*sum, x, w);
            }
        }
    };
    let whole = len / LANES * LANES;
    for i in (0..whole).step_by(LANES) {
        add(i, None);
    }
    if whole < len {
        add(whole, Some(u8::MAX >> (LANES - (len - whole))));
    }
    for (row, sums) in rows.iter_mut().zip(sums) {
        let out = &mut row[j..j + M];
        match sums[..] {
            [a, b, c, d] => {
                // SAFETY: `out` has four words.
                unsafe {
                    let at = out.as_mut_ptr().cast();
                    _mm256_storeu_si256(at, _mm256_add_epi64(_mm256_loadu_si256(at), across([a, b, c, d])));
                }
            }
            _ => {
                for (out, sum) in out.iter_mut().zip(sums) {
                    *out = out.wrapping_add(_mm512_reduce_add_epi64(sum) as u64);
                }
            }
        }
    }
}

/// The sums of four registers' lanes.
#[inline]
#[target_feature(enable = "avx512f")]
fn across([a, b, c, d]: [__m512i; 4]) -> __m256i {
    // Of two registers in turn, then of all four, a pair of lanes each.
    let ab = _mm512_add_epi64(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
    let cd = _mm512_add_epi64(_mm512_unpacklo_epi64(c, d), _mm512_unpackhi_epi64(c, d));
    let pairs = _mm512_add_epi64(_mm512_shuffle_i64x2::<0x88>(ab, cd), _mm512_shuffle_i64x2::<0xdd>(ab, cd));
    let pairs = _mm512_add_epi64(pairs, _mm512_shuffle_i64x2::<0xb1>(pairs, pairs));
    _mm512_castsi512_si256(_mm512_permutexvar_epi64(_mm512_setr_epi64(0, 1, 4, 5, 0, 0, 0, 0), pairs))
}
