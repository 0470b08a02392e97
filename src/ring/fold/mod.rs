//! The table fold: the XOR of the rows that a query's bits pick, which is the whole server side of a lookup
//! (two-server PIR). [`shifted`] reads a public table at an offset, a mask subtracted from every row as it goes by, so the
//! rotated and masked table of an element never exists in memory; several words share one query. Every row is read and
//! no branch depends on a query: the time tells nothing about it.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

use super::Isa;
use rayon::prelude::*;

/// Rows (times words) below which one thread is faster than several.
const PARALLEL_FROM: usize = 1 << 16;

/// For each element `e` and word `w`: `out[e W + w]` = XOR of `tables[w][offset[e] + i] - sub[e W + w]` (modulo 2^64) over the
/// rows `i` in `0..n` that query `e` picks, with `W = tables.len()`.
///
/// `n` is a multiple of 8; a query is `n / 8` bytes, bit `i` of byte `j` being row `8 j + i`. To serve offsets up to `n`, a
/// cyclic table of `n` rows is given twice in a row. Costs about a third of a cycle per row and word with AVX-512.
///
/// # Panics
/// If `n` is not a multiple of 8, a table ends before the largest offset plus `n`, or a length does not fit the number of
/// elements (`offset.len()`).
pub fn shifted(tables: &[&[u64]], n: usize, offset: &[u32], sub: &[u64], queries: &[u8], out: &mut [u64]) {
    shifted_on(Isa::current(), tables, n, offset, sub, queries, out);
}

/// [`shifted`] on a chosen instruction set (portable where the processor lacks it): the result is the same bit for bit.
///
/// # Panics
/// As [`shifted`].
pub fn shifted_on(isa: Isa, tables: &[&[u64]], n: usize, offset: &[u32], sub: &[u64], queries: &[u8], out: &mut [u64]) {
    let words = tables.len();
    assert_eq!(n % 8, 0, "a query has whole bytes");
    let outputs = offset.len().checked_mul(words).expect("outputs that fit memory");
    assert_eq!(sub.len(), outputs, "one subtrahend per output");
    assert_eq!(out.len(), outputs, "one output per element and word");
    assert_eq!(Some(queries.len()), offset.len().checked_mul(n / 8), "n / 8 query bytes per element");
    let Some(&furthest) = offset.iter().max() else { return };
    let end = (furthest as usize).checked_add(n).expect("a table that fits memory");
    assert!(tables.iter().all(|t| t.len() >= end), "tables reach the largest offset plus n");
    if words == 0 || n == 0 {
        return out.fill(0);
    }
    let isa = isa.or_portable();
    let run = |offset: &[u32], sub: &[u64], queries: &[u8], out: &mut [u64]| match isa {
        // SAFETY: `or_portable` has checked that the processor has the instructions; the asserts above, which hold for
        // every run of whole elements, bound all reads.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { avx512::shifted(tables, n, offset, sub, queries, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { avx2::shifted(tables, n, offset, sub, queries, out) },
        _ => portable::shifted(tables, n, offset, sub, queries, out),
    };
    let size = chunk(n * words, offset.len());
    if size == offset.len() {
        run(offset, sub, queries, out);
    } else {
        out.par_chunks_mut(size * words)
            .zip(offset.par_chunks(size))
            .zip(sub.par_chunks(size * words))
            .zip(queries.par_chunks(size * (n / 8)))
            .for_each(|(((out, offset), sub), queries)| run(offset, sub, queries, out));
    }
}

/// For each element `e`: `out[e]` = XOR of `rows[e n + i]` over the rows `i` that query `e` picks: [`shifted`] for one word
/// whose rows were made beforehand.
///
/// # Panics
/// If `n` is not a multiple of 8 or a length does not fit the number of elements (`out.len()`).
pub fn rows(rows: &[u64], n: usize, queries: &[u8], out: &mut [u64]) {
    rows_on(Isa::current(), rows, n, queries, out);
}

/// [`rows`] on a chosen instruction set (portable where the processor lacks it): the result is the same bit for bit.
///
/// # Panics
/// As [`rows`].
pub fn rows_on(isa: Isa, rows: &[u64], n: usize, queries: &[u8], out: &mut [u64]) {
    assert_eq!(n % 8, 0, "a query has whole bytes");
    assert_eq!(Some(rows.len()), out.len().checked_mul(n), "n rows per element");
    assert_eq!(queries.len(), rows.len() / 8, "n / 8 query bytes per element");
    if n == 0 {
        return out.fill(0);
    }
    let isa = isa.or_portable();
    let run = |rows: &[u64], queries: &[u8], out: &mut [u64]| match isa {
        // SAFETY: `or_portable` has checked that the processor has the instructions; the asserts above, which hold for
        // every run of whole elements, bound all reads.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => unsafe { avx512::rows(rows, n, queries, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { avx2::rows(rows, n, queries, out) },
        _ => portable::rows(rows, n, queries, out),
    };
    let size = chunk(n, out.len());
    if size == out.len() {
        run(rows, queries, out);
    } else {
        out.par_chunks_mut(size)
            .zip(rows.par_chunks(size * n))
            .zip(queries.par_chunks(size * (n / 8)))
            .for_each(|((out, rows), queries)| run(rows, queries, out));
    }
}

/// Elements per task: all of them for little work or one thread.
fn chunk(rows_per_element: usize, elements: usize) -> usize {
    let threads = rayon::current_num_threads();
    if threads == 1 || rows_per_element.saturating_mul(elements) < PARALLEL_FROM {
        return elements.max(1);
    }
    let at_least = (PARALLEL_FROM / 4).div_ceil(rows_per_element);
    elements.div_ceil(4 * threads).max(at_least).min(elements)
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

    fn check(elements: usize, n: usize, width: usize, seed: u64) {
        let tables: Vec<Vec<u64>> = (0..width).map(|w| words(seed + w as u64, 2 * n)).collect();
        let tables: Vec<&[u64]> = tables.iter().map(Vec::as_slice).collect();
        let offset: Vec<u32> = words(seed + 50, elements).iter().map(|v| (v % (n as u64 + 1)) as u32).collect();
        let sub = words(seed + 60, elements * width);
        let queries = bytes(seed + 70, elements * n / 8);
        let made = words(seed + 80, elements * n);
        let picked = |e: usize, i: usize| queries[e * n / 8 + i / 8] >> (i % 8) & 1 == 1;
        let mut want = vec![0; elements * width];
        let mut want_rows = vec![0; elements];
        for e in 0..elements {
            for i in (0..n).filter(|&i| picked(e, i)) {
                want_rows[e] ^= made[e * n + i];
                for w in 0..width {
                    want[e * width + w] ^= tables[w][offset[e] as usize + i].wrapping_sub(sub[e * width + w]);
                }
            }
        }
        for isa in Isa::available() {
            let mut got = vec![7; elements * width];
            shifted_on(isa, &tables, n, &offset, &sub, &queries, &mut got);
            assert!(got == want, "shifted {isa:?} {elements} {n} {width}");
            let mut got = vec![7; elements];
            rows_on(isa, &made, n, &queries, &mut got);
            assert!(got == want_rows, "rows {isa:?} {elements} {n}");
        }
    }

    #[test]
    fn every_unroll_remainder() {
        for n in (0..=72).step_by(8) {
            for width in 0..=6 {
                check(3, n, width, n as u64);
            }
        }
    }

    #[test]
    fn large_enough_to_run_in_parallel() {
        check(1025, 256, 2, 1);
        check(3, 65536, 2, 2);
        check(1, 65536, 3, 3);
    }

    #[test]
    fn a_lookup_is_the_xor_of_two_folds() {
        let n = 32;
        let table: Vec<u64> = words(1, n).repeat(2);
        let (r, r_out, d) = (21u32, 99, 17);
        let pick = bytes(5, n / 8);
        let mut query = pick.clone();
        query[d / 8] ^= 1 << (d % 8);
        let (mut a, mut b) = ([0], [0]);
        shifted(&[&table], n, &[r], &[r_out], &pick, &mut a);
        shifted(&[&table], n, &[r], &[r_out], &query, &mut b);
        assert_eq!((a[0] ^ b[0]).wrapping_add(r_out), table[(d + r as usize) % n]);
    }

    #[test]
    #[should_panic(expected = "largest offset")]
    fn a_short_table_is_refused() {
        shifted(&[&[0; 15]], 8, &[0, 8], &[0, 0], &[0, 0], &mut [0, 0]);
    }

    #[test]
    #[should_panic(expected = "query bytes")]
    fn a_short_query_is_refused() {
        rows(&[0; 16], 8, &[0], &mut [0, 0]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn paths_agree(elements in 0usize..20, n in 0usize..40, width in 0usize..6, seed in any::<u32>()) {
            check(elements, 8 * n, width, seed.into());
        }
    }
}
