use super::*;
use crate::ring::mask;
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

/// Parts of a matrix that is there.
fn part(w: &[u64]) -> impl Fn(usize, &mut [u64]) + Sync {
    |from, out| out.copy_from_slice(&w[from..][..out.len()])
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
    let w8: Vec<i8> = w.iter().map(|&v| (v >> 21) as i8).collect();
    let extended8: Vec<u64> = w8.iter().map(|&v| v as u64).collect();
    let (mut want, mut want32, mut want16, mut want8) = (c.clone(), c.clone(), c.clone(), c.clone());
    naive(&x, &extended8, t, m, n, &mut want8);
    naive(&x, &w, t, m, n, &mut want);
    naive(&x, &extended32, t, m, n, &mut want32);
    naive(&x, &extended16, t, m, n, &mut want16);
    for isa in Isa::available() {
        let (mut got, mut got32) = (c.clone(), c.clone());
        multiply(isa, &x, &w, t, m, n, &mut got);
        multiply(isa, &x, &w32, t, m, n, &mut got32);
        assert!(got == want, "ring {isa:?} {t} {m} {n}");
        assert!(got32 == want32, "i32 {isa:?} {t} {m} {n}");
        for k in [1, 2, 8, 31, 32, 33, 40, 41, 43, 44, 48, 49, 50, 51, 52, 53, 63, 64] {
            let (mut got16, mut got) = (c.clone(), c.clone());
            multiply_i16(isa, k, &x, &w16, (t, m, n), &mut got16);
            Rows::on(isa, k, &x, n).times(m, part(&w), &mut got);
            let low = |v: &[u64]| v.iter().map(|v| v & mask(k)).collect::<Vec<_>>();
            assert!(low(&got) == low(&want), "ring {isa:?} {t} {m} {n} modulo 2^{k}");
            assert!(low(&got16) == low(&want16), "i16 {isa:?} {t} {m} {n} modulo 2^{k}");
            let mut got8 = c.clone();
            multiply_i8(isa, k, &x, &w8, (t, m, n), &mut got8);
            assert!(low(&got8) == low(&want8), "i8 {isa:?} {t} {m} {n} modulo 2^{k}");
        }
    }
}

#[test]
fn every_block_remainder() {
    for t in (1..=9).chain(32..=35) {
        for m in 1..=9 {
            for n in [1, 3, 4, 7, 8, 9, 16, 31, 257] {
                all_paths_agree(t, m, n, (t * 100 + m * 10 + n) as u64);
            }
        }
    }
}

#[test]
fn large_enough_to_run_in_parallel() {
    all_paths_agree(70, 130, 129, 1);
    all_paths_agree(1, 1030, 1031, 2);
    all_paths_agree(40, 300, 600, 4);
    all_paths_agree(300, 5, 801, 3);
}

#[test]
fn extreme_weights() {
    for n in [5, 16, 5000, 9000] {
        let x: Vec<u64> = [u64::MAX, 1 << 63, 1 << 31, (1 << 31) - 1, 1 << 32, 0xffff_ffff, 0x8000_0000_8000_0000, 0]
            .into_iter()
            .cycle()
            .take(n)
            .collect();
        for (v32, v16) in [(i32::MIN, i16::MIN), (i32::MAX, i16::MAX), (-1, -1)] {
            let mut want = [0, 0];
            naive(&x, &vec![v32 as u64; n], 1, 1, n, &mut want[..1]);
            naive(&x, &vec![v16 as u64; n], 1, 1, n, &mut want[1..]);
            let v8 = v16.clamp(i8::MIN.into(), i8::MAX.into()) as i8;
            let mut want8 = [0];
            naive(&x, &vec![v8 as u64; n], 1, 1, n, &mut want8);
            for isa in Isa::available() {
                let mut got8 = [0];
                multiply_i8(isa, 64, &x, &vec![v8; n], (1, 1, n), &mut got8);
                assert_eq!(got8, want8, "{isa:?}");
                let mut got = [0, 0];
                multiply(isa, &x, &vec![v32; n], 1, 1, n, &mut got[..1]);
                multiply_i16(isa, 64, &x, &vec![v16; n], (1, 1, n), &mut got[1..]);
                assert_eq!(got, want, "{isa:?}");
            }
        }
    }
}

/// Digits at the ends of their ranges, all of one sign: the largest sums there are.
#[test]
fn extreme_digits() {
    let (t, n) = (33, 700);
    for k in 1..=50u32 {
        let low = k.div_ceil(2);
        let least = (1 << (low - 1)) | (1 << (k - 1));
        for (v, u) in [(least, least), (least, mask(k) ^ least), (mask(k) ^ least, mask(k) ^ least), (mask(k), 1)] {
            let (x, w) = (vec![v; t * n], vec![u; 4 * n]);
            let mut want = vec![0; 4 * t];
            naive(&x, &w, t, 4, n, &mut want);
            for isa in Isa::available() {
                let mut got = vec![0; 4 * t];
                Rows::on(isa, k, &x, n).times(4, part(&w), &mut got);
                assert!(got.iter().zip(&want).all(|(a, b)| (a ^ b) & mask(k) == 0), "{isa:?} 2^{k} {v:x} {u:x}");
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
    fn strided_and_weighted(t in 1usize..6, m in 1usize..50, n in 1usize..50, gap in 0usize..9, cut: bool, seed in any::<u32>()) {
        let seed = u64::from(seed);
        let (x, c) = (words(seed, t * n), words(seed + 1, t * m));
        let rows = |count: usize, len: usize| {
            let w = words(seed + 2, count * (len + gap));
            let tight: Vec<u64> = w.chunks(len + gap).flat_map(|r| &r[..len]).copied().collect();
            let w = if cut { w[..w.len() - gap].to_vec() } else { w };
            (w, tight)
        };
        let (w, tight) = rows(m, n);
        let mut want = c.clone();
        naive(&x, &tight, t, m, n, &mut want);
        let (u, tight) = rows(n, m);
        let transposed: Vec<u64> = (0..m * n).map(|i| tight[i % n * m + i / n]).collect();
        let mut wanted = c.clone();
        naive(&x, &transposed, t, m, n, &mut wanted);
        for isa in Isa::available() {
            let mut got = c.clone();
            strided(isa, &x, &w, n + gap, (t, m, n), &mut got);
            prop_assert_eq!(&got, &want);
            let mut got = c.clone();
            weighted(isa, &x, &u, m + gap, (t, m, n), &mut got);
            prop_assert_eq!(&got, &wanted);
        }
    }

    #[test]
    fn dots(n in 0usize..100, seed in any::<u32>()) {
        let (x, y) = (words(seed.into(), n), words(u64::from(seed) + 9, n));
        let mut want = vec![0];
        naive(&x, &y, 1, 1, n, &mut want);
        prop_assert_eq!(dot(&x, &y), want[0]);
    }
}

/// What this processor lacks, instruction by instruction: see `ring/emulated.rs`.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod emulated {
    use super::*;
    use crate::ring::emulated::{tiles_in_use, with};

    /// By what makes `c` of operands, and by definition.
    fn agree(
        k: u32,
        (t, m, n): (usize, usize, usize),
        x: &[u64],
        extended: &[u64],
        run: impl FnOnce(&mut [&mut [u64]]),
    ) {
        let c = words(7, t * m);
        let (mut want, mut got) = (c.clone(), c);
        naive(x, extended, t, m, n, &mut want);
        with(|| run(&mut got.chunks_mut(m).collect::<Vec<_>>()));
        let same = want.iter().zip(&got).all(|(a, b)| (a ^ b) & mask(k) == 0);
        assert!(same, "{t} x {m} x {n} modulo 2^{k}");
        assert!(!tiles_in_use(), "the tile registers are released");
    }

    fn by_weights<W: amx::Bytes>(k: u32, shape: (usize, usize, usize), x: &[u64], w: &[W], extended: &[u64]) {
        // SAFETY: what the processor lacks is emulated.
        agree(k, shape, x, extended, |rows| unsafe { amx::Digits::cut(x, shape.2, k).tile(0, w, rows) });
    }

    #[test]
    fn tiles_of_bytes() {
        if !Isa::Avx512.supported() {
            return;
        }
        for (t, m, n) in [(1, 1, 1), (16, 16, 64), (17, 15, 63), (3, 33, 65), (35, 18, 200)] {
            let (x, w) = (words(1, t * n), words(2, m * n));
            let (w8, w16): (Vec<i8>, Vec<i16>) = w.iter().map(|&v| ((v >> 21) as i8, (v >> 32) as i16)).unzip();
            let (as_8, as_16): (Vec<u64>, Vec<u64>) = w8.iter().zip(&w16).map(|(a, b)| (*a as u64, *b as u64)).unzip();
            for k in [1, 8, 9, 16, 24, 32, 40, 44, 48, 49, 56, 57, 64] {
                by_weights(k, (t, m, n), &x, &w8, &as_8);
                by_weights(k, (t, m, n), &x, &w16, &as_16);
            }
        }
    }

    /// The largest sums of either sign, of more columns than 32 bits take.
    #[test]
    fn tiles_of_extreme_bytes() {
        if !Isa::Avx512.supported() {
            return;
        }
        for n in [1 << 16, (1 << 16) + 70] {
            let x = vec![u64::MAX; n];
            for w in [i16::MIN, i16::MAX, -1] {
                by_weights(24, (1, 1, n), &x, &vec![w; n], &vec![w as u64; n]);
                let w = (w >> 8) as i8;
                by_weights(24, (1, 1, n), &x, &vec![w; n], &vec![w as u64; n]);
            }
        }
    }

    /// Before a processor that has them uses them.
    #[test]
    fn kernels_prove_themselves() {
        if Isa::Avx512.supported() {
            // SAFETY: what the processor lacks is emulated.
            assert!(with(|| unsafe { proof::by_ifma() && proof::by_amx() }));
        }
    }

    /// Tiles begin where threads cut them.
    #[test]
    fn a_tile_of_the_output() {
        if !Isa::Avx512.supported() {
            return;
        }
        let (t, m, n, first) = (70, 5, 90, 64);
        let (x, w) = (words(3, t * n), words(4, m * n));
        let w8: Vec<i8> = w.iter().map(|&v| v as i8).collect();
        let extended: Vec<u64> = w8.iter().map(|&v| v as u64).collect();
        // SAFETY: what the processor lacks is emulated.
        agree(44, (t - first, m, n), &x[first * n..], &extended, |rows| unsafe {
            amx::Digits::cut(&x, n, 44).tile(first, &w8, rows);
        });
    }

    #[test]
    fn products_of_52_bits() {
        if !Isa::Avx512.supported() {
            return;
        }
        for t in [1, 2, 3, 4, 9, 70] {
            for m in [1, 4, 7] {
                for n in [1, 8, 13, 600] {
                    let (x, w) = (words(5, t * n), words(6, m * n));
                    // SAFETY: what the processor lacks is emulated.
                    agree(52, (t, m, n), &x, &w, |rows| unsafe { ifma::Words::new(&x, n).tile(&w, n, rows) });
                }
            }
        }
        let (x, w) = (vec![mask(52); 4096], vec![u64::MAX; 4096]);
        // SAFETY: as above.
        agree(52, (1, 1, 4096), &x, &w, |rows| unsafe { ifma::Words::new(&x, 4096).tile(&w, 4096, rows) });
    }
}
