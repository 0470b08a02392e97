//! Matrix products over Z_2^64 (hence over every Z_2^k: reduce afterwards): activations `x` times weights `w`, both with the
//! inner dimension contiguous, added to `c`. The Owner multiplies by its plaintext weights in 16 or 32 bits, the other
//! products are ring by ring. Tiles of the output run in parallel on rayon's pool from about a million multiply-adds up;
//! within a tile a block of rows of `x` meets a block of rows of `w` in registers.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

use super::Isa;
use rayon::prelude::*;

/// Multiply-adds below which one thread is faster than several.
const PARALLEL_FROM: usize = 1 << 20;
/// Rows of `x` in one tile: enough to pay for reading a block of `w`, few enough that their chunks stay in L2.
const TILE_ROWS: usize = 64;

/// A weight that widens to a ring word: `u64` as it is, `i16` and `i32` sign-extended. Sealed.
pub trait Weight: Copy + Send + Sync + lanes::Lanes {}
impl Weight for u64 {}
impl Weight for i32 {}
impl Weight for i16 {}

mod lanes {
    /// What every path knows about a weight type.
    #[cfg(target_arch = "x86_64")]
    pub trait Lanes: super::portable::Widen + super::avx2::Load + super::avx512::Load {}
    #[cfg(target_arch = "x86_64")]
    impl<W: super::portable::Widen + super::avx2::Load + super::avx512::Load> Lanes for W {}
    #[cfg(not(target_arch = "x86_64"))]
    pub trait Lanes: super::portable::Widen {}
    #[cfg(not(target_arch = "x86_64"))]
    impl<W: super::portable::Widen> Lanes for W {}
}

/// `c[s m + j] += sum_i x[s n + i] w[j n + i]` modulo 2^64: `x` is `t x n`, `w` is `m x n` (output x input), `c` is `t x m`,
/// all row-major. `t m n` multiply-adds.
///
/// # Panics
/// If a slice has not exactly the length that `t`, `m` and `n` say.
pub fn ring(x: &[u64], w: &[u64], t: usize, m: usize, n: usize, c: &mut [u64]) {
    multiply(Isa::current(), x, w, t, m, n, c);
}

/// [`ring`] with 16-bit signed weights: a quarter of the memory traffic.
///
/// # Panics
/// If a slice has not exactly the length that `t`, `m` and `n` say.
pub fn weights_i16(x: &[u64], w: &[i16], t: usize, m: usize, n: usize, c: &mut [u64]) {
    multiply(Isa::current(), x, w, t, m, n, c);
}

/// [`ring`] with 32-bit signed weights.
///
/// # Panics
/// If a slice has not exactly the length that `t`, `m` and `n` say.
pub fn weights_i32(x: &[u64], w: &[i32], t: usize, m: usize, n: usize, c: &mut [u64]) {
    multiply(Isa::current(), x, w, t, m, n, c);
}

/// The product that [`ring`], [`weights_i16`] and [`weights_i32`] name, on a chosen instruction set (portable where the
/// processor lacks it): the result is the same bit for bit.
///
/// # Panics
/// If a slice has not exactly the length that `t`, `m` and `n` say.
pub fn multiply<W: Weight>(isa: Isa, x: &[u64], w: &[W], t: usize, m: usize, n: usize, c: &mut [u64]) {
    let area = |a: usize, b: usize| a.checked_mul(b).expect("a matrix that fits memory");
    assert_eq!(x.len(), area(t, n), "x is t x n");
    assert_eq!(w.len(), area(m, n), "w is m x n");
    assert_eq!(c.len(), area(t, m), "c is t x m");
    if c.is_empty() || n == 0 {
        return;
    }
    let isa = isa.or_portable();
    let threads = rayon::current_num_threads();
    let (rows, columns) = if threads == 1 || area(t, m).saturating_mul(n) < PARALLEL_FROM {
        (t, m)
    } else {
        let rows = t.min(TILE_ROWS);
        let column_tiles = (4 * threads).div_ceil(t.div_ceil(rows));
        (rows, m.div_ceil(column_tiles).next_multiple_of(4).max(16))
    };
    // Cut c into tiles; each is a list of row pieces, so that threads get disjoint `&mut` without raw pointers.
    let tiles_across = m.div_ceil(columns);
    let mut tiles: Vec<Vec<&mut [u64]>> = Vec::new();
    for band in c.chunks_mut(rows * m) {
        let first = tiles.len();
        tiles.resize_with(first + tiles_across, Vec::new);
        for row in band.chunks_mut(m) {
            for (tile, piece) in tiles[first..].iter_mut().zip(row.chunks_mut(columns)) {
                tile.push(piece);
            }
        }
    }
    let run = |(at, mut tile): (usize, Vec<&mut [u64]>)| {
        let (s, j) = (at / tiles_across * rows, at % tiles_across * columns);
        let x = &x[s * n..][..tile.len() * n];
        let w = &w[j * n..][..tile[0].len() * n];
        match isa {
            // SAFETY: `or_portable` has checked that the processor has the instructions.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => unsafe { avx512::tile(x, w, n, &mut tile) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => unsafe { avx2::tile(x, w, n, &mut tile) },
            _ => portable::tile(x, w, n, &mut tile),
        }
    };
    if tiles.len() == 1 {
        tiles.into_iter().enumerate().for_each(run);
    } else {
        tiles.into_par_iter().enumerate().for_each(run);
    }
}

/// `sum_i a[i] b[i]` modulo 2^64.
///
/// # Panics
/// If the lengths differ.
#[must_use]
pub fn dot(a: &[u64], b: &[u64]) -> u64 {
    assert_eq!(a.len(), b.len(), "a dot product of equal lengths");
    let mut sum = [0];
    multiply(Isa::current(), a, b, 1, 1, a.len(), &mut sum);
    sum[0]
}

/// `y[i] += s x[i]` modulo 2^64.
///
/// # Panics
/// If the lengths differ.
pub fn axpy(s: u64, x: &[u64], y: &mut [u64]) {
    axpy_on(Isa::current(), s, x, y);
}

/// [`axpy`] on a chosen instruction set (portable where the processor lacks it).
///
/// # Panics
/// If the lengths differ.
pub fn axpy_on(isa: Isa, s: u64, x: &[u64], y: &mut [u64]) {
    assert_eq!(x.len(), y.len(), "vectors of equal lengths");
    match isa.or_portable() {
        // SAFETY: `or_portable` has checked that the processor has the instructions.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { avx512::axpy(s, x, y) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { avx2::axpy(s, x, y) },
        _ => portable::axpy(s, x, y),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn words(seed: u64, n: usize) -> Vec<u64> {
        let mut s = seed;
        (0..n)
            .map(|_| {
                s = s.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
                (s ^ (s >> 29)).wrapping_mul(0x9e37_79b9_7f4a_7c15)
            })
            .collect()
    }

    /// The definition.
    fn naive(x: &[u64], w: &[u64], t: usize, m: usize, n: usize, c: &mut [u64]) {
        for s in 0..t {
            for j in 0..m {
                for i in 0..n {
                    c[s * m + j] = c[s * m + j].wrapping_add(x[s * n + i].wrapping_mul(w[j * n + i]));
                }
            }
        }
    }

    fn all_paths_agree(t: usize, m: usize, n: usize, seed: u64) {
        let (x, w, c) = (words(seed, t * n), words(seed + 1, m * n), words(seed + 2, t * m));
        let (w32, w16): (Vec<i32>, Vec<i16>) = w.iter().map(|&v| (v as i32, (v >> 32) as i16)).unzip();
        let extended32: Vec<u64> = w32.iter().map(|&v| v as u64).collect();
        let extended16: Vec<u64> = w16.iter().map(|&v| v as u64).collect();
        let (mut want, mut want32, mut want16) = (c.clone(), c.clone(), c.clone());
        naive(&x, &w, t, m, n, &mut want);
        naive(&x, &extended32, t, m, n, &mut want32);
        naive(&x, &extended16, t, m, n, &mut want16);
        for isa in Isa::available() {
            let (mut got, mut got32, mut got16) = (c.clone(), c.clone(), c.clone());
            multiply(isa, &x, &w, t, m, n, &mut got);
            multiply(isa, &x, &w32, t, m, n, &mut got32);
            multiply(isa, &x, &w16, t, m, n, &mut got16);
            assert!(got == want, "ring {isa:?} {t} {m} {n}");
            assert!(got32 == want32, "i32 {isa:?} {t} {m} {n}");
            assert!(got16 == want16, "i16 {isa:?} {t} {m} {n}");
        }
    }

    #[test]
    fn every_block_remainder() {
        for t in 1..=9 {
            for m in 1..=9 {
                for n in [1, 3, 4, 7, 8, 9, 16, 31] {
                    all_paths_agree(t, m, n, (t * 100 + m * 10 + n) as u64);
                }
            }
        }
    }

    #[test]
    fn large_enough_to_run_in_parallel() {
        all_paths_agree(70, 130, 129, 1);
        all_paths_agree(1, 1030, 1031, 2);
        all_paths_agree(300, 5, 801, 3);
    }

    #[test]
    fn extreme_weights() {
        for n in [5, 16] {
            let x: Vec<u64> =
                [u64::MAX, 1 << 63, 1 << 31, (1 << 31) - 1, 1 << 32, 0xffff_ffff, 0x8000_0000_8000_0000, 0]
                    .into_iter()
                    .cycle()
                    .take(n)
                    .collect();
            for (v32, v16) in [(i32::MIN, i16::MIN), (i32::MAX, i16::MAX), (-1, -1)] {
                let mut want = [0, 0];
                naive(&x, &vec![v32 as u64; n], 1, 1, n, &mut want[..1]);
                naive(&x, &vec![v16 as u64; n], 1, 1, n, &mut want[1..]);
                for isa in Isa::available() {
                    let mut got = [0, 0];
                    multiply(isa, &x, &vec![v32; n], 1, 1, n, &mut got[..1]);
                    multiply(isa, &x, &vec![v16; n], 1, 1, n, &mut got[1..]);
                    assert_eq!(got, want, "{isa:?}");
                }
            }
        }
    }

    #[test]
    fn empty_operands_leave_c_alone() {
        let mut c = [5, 6];
        ring(&[], &[], 1, 2, 0, &mut c);
        ring(&[], &[1, 2], 0, 2, 1, &mut []);
        assert_eq!(c, [5, 6]);
        assert_eq!(dot(&[], &[]), 0);
    }

    #[test]
    #[should_panic(expected = "w is m x n")]
    fn wrong_lengths_are_refused() {
        ring(&[1, 2], &[1, 2, 3], 1, 2, 2, &mut [0, 0]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn paths_agree(t in 1usize..12, m in 1usize..40, n in 1usize..200, seed in any::<u32>()) {
            all_paths_agree(t, m, n, seed.into());
        }

        #[test]
        fn dot_and_axpy(n in 0usize..100, s in any::<u64>(), seed in any::<u32>()) {
            let (x, y) = (words(seed.into(), n), words(u64::from(seed) + 9, n));
            let mut want = vec![0];
            naive(&x, &y, 1, 1, n, &mut want);
            prop_assert_eq!(dot(&x, &y), want[0]);
            let want: Vec<u64> = x.iter().zip(&y).map(|(x, y)| y.wrapping_add(s.wrapping_mul(*x))).collect();
            for isa in Isa::available() {
                let mut got = y.clone();
                axpy_on(isa, s, &x, &mut got);
                prop_assert_eq!(&got, &want);
            }
        }
    }
}
