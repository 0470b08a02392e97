//! The table fold: the XOR or the sum of the rows that a query's bits pick, which is the whole server side of a lookup
//! (two-server PIR). [`shifted`] and [`sums`] read a public table at an offset, so the rotated table of an element never
//! exists in memory; several words share one query. [`scaled`] multiplies each row by a factor of the element as it goes
//! by. Every row is read and no branch depends on a query: the time tells nothing about it.

/// The folds of a width of words, two of which share the masks, of an instruction set whose `$element` folds one or two.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! by_two {
    ($feature:literal, $name:ident, $word:ty, $element:ident) => {
        /// See [`super::shifted`] (`ADD` false) and [`super::sums`].
        ///
        /// # Safety
        /// The processor has the feature, and the lengths are as [`super::shifted`] asserts.
        #[target_feature(enable = $feature)]
        pub unsafe fn $name<const ADD: bool>(
            tables: &[&[$word]],
            n: usize,
            offset: &[u32],
            queries: &[u8],
            out: &mut [$word],
        ) {
            let words = tables.len();
            let elements = offset.iter().zip(queries.chunks_exact(n / 8));
            for ((&offset, query), out) in elements.zip(out.chunks_exact_mut(words)) {
                let start = |t: &[$word]| t[offset as usize..][..n].as_ptr();
                for (tables, out) in tables.chunks(2).zip(out.chunks_mut(2)) {
                    // SAFETY: each pointer is the start of a slice of n rows.
                    unsafe {
                        if let [first, second] = *tables {
                            out.copy_from_slice(&$element::<ADD, 2>([start(first), start(second)], query));
                        } else {
                            out.copy_from_slice(&$element::<ADD, 1>([start(tables[0])], query));
                        }
                    }
                }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;

use super::Isa;

/// A table's word: 64 bits, or 32 where they are enough, so that a register holds twice as many rows.
pub trait Word: kernel::Kernel {}

impl Word for u32 {}
impl Word for u64 {}

mod kernel {
    /// What the folds are made of, for a width of words.
    pub trait Kernel: Copy + Default + Send + Sync {
        /// This word where `bit` is 1, 0 where it is 0.
        fn masked(self, bit: u8) -> Self;
        /// The sum if `ADD`, else the XOR.
        fn join<const ADD: bool>(self, other: Self) -> Self;
        /// See [`super::shifted`] (`ADD` false) and [`super::sums`].
        ///
        /// # Safety
        /// The lengths are as [`super::check`] asserts.
        unsafe fn shifted<const ADD: bool>(
            isa: super::Isa,
            tables: &[&[Self]],
            n: usize,
            offset: &[u32],
            queries: &[u8],
            out: &mut [Self],
        );
    }
}

macro_rules! kernel {
    ($word:ty, $width:ident) => {
        impl kernel::Kernel for $word {
            fn masked(self, bit: u8) -> Self {
                self & Self::from(bit).wrapping_neg()
            }

            fn join<const ADD: bool>(self, other: Self) -> Self {
                if ADD { self.wrapping_add(other) } else { self ^ other }
            }

            unsafe fn shifted<const ADD: bool>(
                isa: Isa,
                tables: &[&[Self]],
                n: usize,
                offset: &[u32],
                queries: &[u8],
                out: &mut [Self],
            ) {
                match isa.or_portable() {
                    // SAFETY: `or_portable` has checked that the processor has the instructions; the lengths are the caller's.
                    #[cfg(target_arch = "x86_64")]
                    Isa::Avx512 | Isa::Vnni | Isa::Ifma | Isa::Amx => unsafe {
                        avx512::$width::<ADD>(tables, n, offset, queries, out)
                    },
                    // SAFETY: as above.
                    #[cfg(target_arch = "x86_64")]
                    Isa::Avx2 => unsafe { avx2::$width::<ADD>(tables, n, offset, queries, out) },
                    // SAFETY: as above.
                    #[cfg(target_arch = "aarch64")]
                    Isa::Neon => unsafe { neon::$width::<ADD>(tables, n, offset, queries, out) },
                    _ => portable::shifted::<Self, ADD>(tables, n, offset, queries, out),
                }
            }
        }
    };
}

kernel!(u32, narrow);
kernel!(u64, wide);

/// For each element `e` and word `w`: `out[e W + w]` = XOR of `tables[w][offset[e] + i]` over the rows `i` in `0..n` that
/// query `e` picks, with `W = tables.len()`.
///
/// Words are of 64 or of 32 bits. `n` is a multiple of 8; a query is `n / 8` bytes, bit `i` of byte `j` being row `8 j + i`. To serve offsets up to `n`, a
/// cyclic table of `n` rows is given twice in a row. Costs about a third of a cycle per row and word of 64 bits with AVX-512, half of that of 32.
///
/// # Panics
/// If `n` is not a multiple of 8, a table ends before the largest offset plus `n`, or a length does not fit the number of
/// elements (`offset.len()`).
pub fn shifted<T: Word>(tables: &[&[T]], n: usize, offset: &[u32], queries: &[u8], out: &mut [T]) {
    folded::<T, false>(Isa::current(), tables, n, offset, queries, out);
}

/// [`shifted`] on a chosen instruction set (portable where the processor lacks it): the result is the same bit for bit.
///
/// # Panics
/// As [`shifted`].
pub fn shifted_on<T: Word>(isa: Isa, tables: &[&[T]], n: usize, offset: &[u32], queries: &[u8], out: &mut [T]) {
    folded::<T, false>(isa, tables, n, offset, queries, out);
}

/// As [`shifted`], with the sum (modulo 2^64, or 2^32) in place of the XOR.
///
/// # Panics
/// As [`shifted`].
pub fn sums<T: Word>(tables: &[&[T]], n: usize, offset: &[u32], queries: &[u8], out: &mut [T]) {
    folded::<T, true>(Isa::current(), tables, n, offset, queries, out);
}

/// [`sums`] on a chosen instruction set.
///
/// # Panics
/// As [`shifted`].
pub fn sums_on<T: Word>(isa: Isa, tables: &[&[T]], n: usize, offset: &[u32], queries: &[u8], out: &mut [T]) {
    folded::<T, true>(isa, tables, n, offset, queries, out);
}

/// Checks the lengths of a fold over tables at offsets; says whether there is nothing to read.
fn check<T>(tables: &[&[T]], n: usize, offset: &[u32], queries: &[u8], out: &[T]) -> bool {
    assert_eq!(n % 8, 0, "a query has whole bytes");
    let outputs = offset.len().checked_mul(tables.len()).expect("outputs that fit memory");
    assert_eq!(out.len(), outputs, "one output per element and word");
    assert_eq!(Some(queries.len()), offset.len().checked_mul(n / 8), "n / 8 query bytes per element");
    let furthest = offset.iter().max().map_or(0, |&o| o as usize);
    let end = furthest.checked_add(n).expect("a table that fits memory");
    assert!(offset.is_empty() || tables.iter().all(|t| t.len() >= end), "tables reach the largest offset plus n");
    out.is_empty() || n == 0
}

fn folded<T: Word, const ADD: bool>(
    isa: Isa,
    tables: &[&[T]],
    n: usize,
    offset: &[u32],
    queries: &[u8],
    out: &mut [T],
) {
    if check(tables, n, offset, queries, out) {
        return out.fill(T::default());
    }
    // SAFETY: checked.
    unsafe { T::shifted::<ADD>(isa, tables, n, offset, queries, out) };
}

/// A table whose rows are multiplied as they are read: row times factor, divided by `2^shift` and rounded.
#[derive(Clone, Copy, Debug)]
pub struct Scaled<'a> {
    /// Rows below 2^63, given twice in a row if they are cyclic.
    pub table: &'a [u64],
    /// 33 to 63.
    pub shift: u32,
}

impl Scaled<'_> {
    /// Half of what a row is divided by after its lowest 32 bits are gone.
    fn half(&self) -> u64 {
        1 << (self.shift - 33)
    }

    /// One row: the definition, the same on every instruction set.
    fn row(&self, row: u64, factor: u32) -> u64 {
        let factor = u64::from(factor);
        let low = ((row & 0xffff_ffff) * factor) >> 32;
        ((row >> 32) * factor).wrapping_add(low).wrapping_add(self.half()) >> (self.shift - 32)
    }
}

/// For each element `e`: `out[e]` = the sum of `table[offset[e] + i] factor[e] / 2^shift`, each rounded, over the rows `i`
/// that query `e` picks. Costs about one cycle per row with AVX-512.
///
/// # Panics
/// As [`shifted`], and if `shift` is not in 33..=63 or there is not one factor per element.
pub fn scaled(s: &Scaled<'_>, n: usize, offset: &[u32], factor: &[u32], queries: &[u8], out: &mut [u64]) {
    scaled_on(Isa::current(), s, n, offset, factor, queries, out);
}

/// [`scaled`] on a chosen instruction set (portable where the processor lacks it): the result is the same bit for bit.
///
/// # Panics
/// As [`scaled`].
pub fn scaled_on(isa: Isa, s: &Scaled<'_>, n: usize, offset: &[u32], factor: &[u32], queries: &[u8], out: &mut [u64]) {
    assert!((33..=63).contains(&s.shift), "a shift of 33 to 63 bits");
    assert_eq!(factor.len(), offset.len(), "one factor per element");
    if check(&[s.table], n, offset, queries, out) {
        return out.fill(0);
    }
    let isa = isa.or_portable();
    match isa {
        // SAFETY: `or_portable` has checked that the processor has the instructions, `check` the lengths.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Vnni | Isa::Ifma | Isa::Amx => unsafe { avx512::scaled(s, n, offset, factor, queries, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { avx2::scaled(s, n, offset, factor, queries, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => unsafe { neon::scaled(s, n, offset, factor, queries, out) },
        _ => portable::scaled(s, n, offset, factor, queries, out),
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

    fn bytes(seed: u64, n: usize) -> Vec<u8> {
        words(seed, n.div_ceil(8)).iter().flat_map(|w| w.to_le_bytes()).take(n).collect()
    }

    fn agree(elements: usize, n: usize, width: usize, seed: u64) {
        let tables: Vec<Vec<u64>> = (0..width).map(|w| words(seed + w as u64, 2 * n)).collect();
        let tables: Vec<&[u64]> = tables.iter().map(Vec::as_slice).collect();
        let offset: Vec<u32> = words(seed + 50, elements).iter().map(|v| (v % (n as u64 + 1)) as u32).collect();
        let factor: Vec<u32> = words(seed + 60, elements).iter().map(|v| *v as u32).collect();
        let queries = bytes(seed + 70, elements * n / 8);
        let positive: Vec<u64> = words(seed + 90, 2 * n).iter().map(|v| v >> 3).collect();
        let scale = Scaled { table: &positive, shift: 33 + (seed % 31) as u32 };
        let picked = |e: usize, i: usize| queries[e * n / 8 + i / 8] >> (i % 8) & 1 == 1;
        let (mut xor, mut sum) = (vec![0; elements * width], vec![0u64; elements * width]);
        let mut want_scaled = vec![0u64; elements];
        for e in 0..elements {
            for i in (0..n).filter(|&i| picked(e, i)) {
                let exact = u128::from(positive[offset[e] as usize + i]) * u128::from(factor[e]);
                // What is below 2^32 is dropped before it is rounded.
                let rounded = ((exact >> 32) + u128::from(scale.half())) >> (scale.shift - 32);
                want_scaled[e] = want_scaled[e].wrapping_add(rounded as u64);
                for w in 0..width {
                    let row = tables[w][offset[e] as usize + i];
                    xor[e * width + w] ^= row;
                    sum[e * width + w] = sum[e * width + w].wrapping_add(row);
                }
            }
        }
        // Of 32 bits: the lower halves of the same.
        let halves: Vec<Vec<u32>> = tables.iter().map(|t| t.iter().map(|v| *v as u32).collect()).collect();
        let halves: Vec<&[u32]> = halves.iter().map(Vec::as_slice).collect();
        let low = |v: &[u64]| v.iter().map(|v| *v as u32).collect::<Vec<_>>();
        for isa in Isa::available() {
            let mut got = vec![7; elements * width];
            shifted_on(isa, &tables, n, &offset, &queries, &mut got);
            assert!(got == xor, "shifted {isa:?} {elements} {n} {width}");
            sums_on(isa, &tables, n, &offset, &queries, &mut got);
            assert!(got == sum, "sums {isa:?} {elements} {n} {width}");
            let mut got = vec![7; elements * width];
            shifted_on(isa, &halves, n, &offset, &queries, &mut got);
            assert!(got == low(&xor), "shifted, 32 bits {isa:?} {elements} {n} {width}");
            sums_on(isa, &halves, n, &offset, &queries, &mut got);
            assert!(got == low(&sum), "sums, 32 bits {isa:?} {elements} {n} {width}");
            let mut got = vec![7; elements];
            scaled_on(isa, &scale, n, &offset, &factor, &queries, &mut got);
            assert!(got == want_scaled, "scaled {isa:?} {elements} {n}");
        }
    }

    #[test]
    fn every_unroll_remainder() {
        for n in (0..=72).step_by(8) {
            for width in 0..=6 {
                agree(3, n, width, n as u64);
            }
        }
    }

    #[test]
    fn large_enough_to_run_in_parallel() {
        agree(1025, 256, 2, 1);
        agree(3, 65536, 2, 2);
        agree(1, 65536, 3, 3);
    }

    #[test]
    fn a_lookup_is_the_difference_of_two_folds() {
        let n = 32;
        let table: Vec<u64> = words(1, n).repeat(2);
        let (r, d) = (21u32, 17);
        let pick = bytes(5, n / 8);
        let mut query = pick.clone();
        query[d / 8] ^= 1 << (d % 8);
        let (mut a, mut b) = ([0], [0]);
        let want = table[(d + r as usize) % n];
        shifted(&[&table], n, &[r], &pick, &mut a);
        shifted(&[&table], n, &[r], &query, &mut b);
        assert_eq!(a[0] ^ b[0], want);
        sums(&[&table], n, &[r], &pick, &mut a);
        sums(&[&table], n, &[r], &query, &mut b);
        let gone = pick[d / 8] >> (d % 8) & 1 == 1;
        assert_eq!(if gone { a[0].wrapping_sub(b[0]) } else { b[0].wrapping_sub(a[0]) }, want);
    }

    #[test]
    #[should_panic(expected = "largest offset")]
    fn a_short_table_is_refused() {
        shifted::<u64>(&[&[0; 15]], 8, &[0, 8], &[0, 0], &mut [0, 0]);
    }

    #[test]
    #[should_panic(expected = "query bytes")]
    fn a_short_query_is_refused() {
        shifted::<u64>(&[&[0; 16]], 8, &[0, 8], &[0], &mut [0, 0]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn paths_agree(elements in 0usize..20, n in 0usize..40, width in 0usize..6, seed in any::<u32>()) {
            agree(elements, 8 * n, width, seed.into());
        }
    }
}
