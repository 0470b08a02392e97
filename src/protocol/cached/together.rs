//! Scores and contexts of many rows at once, as products of matrices: what is cached is read once for all of them, by the kernels of
//! ring words ([`gemm::Rows`]). Rows see different numbers of positions: they are cut into tiles, and what a tile computes beyond what its rows
//! see is dropped (scores), or met by zeros (context).

use rayon::prelude::*;

use super::{CachedBilinear, Context, Scores, Span};
use crate::ring::{PackedRows, gemm};

/// Tokens of a tile.
const TILE: usize = 64;

/// Room for the outputs of each token, dealt to the heads: by key/value head those of its query heads, token after token.
fn by_head<'a>(out: &'a mut [u64], lengths: &[usize], (heads, kv_heads): (usize, usize)) -> Vec<Vec<&'a mut [u64]>> {
    let mut dealt: Vec<Vec<&mut [u64]>> = (0..kv_heads).map(|_| Vec::new()).collect();
    let mut left = out;
    for &length in lengths {
        for head in 0..heads {
            let (own, others) = left.split_at_mut(length);
            dealt[head / (heads / kv_heads)].push(own);
            left = others;
        }
    }
    dealt
}

/// Tiles of `tokens` tokens.
fn tiles(tokens: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    (0..tokens).step_by(TILE).map(move |from| from..tokens.min(from + TILE))
}

pub(super) fn scores(op: &Scores, k: u32, x: &Span<'_>, (cache, positions): (&PackedRows, usize), out: &mut [u64]) {
    let &Scores { heads, kv_heads, dim, .. } = op;
    let (group, tokens) = (heads / kv_heads, x.len());
    let before = positions - tokens;
    let lengths: Vec<usize> = (0..tokens).map(|i| op.visible(before + i)).collect();
    let head = |(g, mut out): (usize, Vec<&mut [u64]>)| {
        let keys = columns(cache, positions, g * dim..(g + 1) * dim);
        for tile in tiles(tokens) {
            let queries: Vec<u64> =
                tile.clone().flat_map(|i| &x.row(i)[g * group * dim..(g + 1) * group * dim]).copied().collect();
            let visible = op.visible(before + tile.end - 1);
            let keys = |from: usize, words: &mut [u64]| words.copy_from_slice(&keys[from..][..words.len()]);
            let mut all = vec![0; tile.len() * group * visible];
            gemm::Rows::new(k, &queries, dim).times(visible, keys, &mut all);
            let out = &mut out[tile.start * group..tile.end * group];
            out.iter_mut().zip(all.chunks(visible)).for_each(|(out, all)| out.copy_from_slice(&all[..out.len()]));
        }
    };
    by_head(out, &lengths, (heads, kv_heads)).into_par_iter().enumerate().for_each(head);
}

pub(super) fn context(op: &Context, k: u32, x: &Span<'_>, (cache, positions): (&PackedRows, usize), out: &mut [u64]) {
    let &Context { heads, kv_heads, dim, .. } = op;
    let (group, tokens) = (heads / kv_heads, x.len());
    let before = positions - tokens;
    let head = |(g, mut out): (usize, Vec<&mut [u64]>)| {
        let values = transposed(&columns(cache, positions, g * dim..(g + 1) * dim), dim);
        for tile in tiles(tokens) {
            let visible = op.visible(before + tile.end - 1);
            let mut weights = vec![0; tile.len() * group * visible];
            let mut rows = weights.chunks_mut(visible);
            for i in tile.clone() {
                let own = op.visible(before + i);
                for (p, row) in x.row(i)[g * group * own..(g + 1) * group * own].chunks(own).zip(&mut rows) {
                    row[..own].copy_from_slice(p);
                }
            }
            let columns = |from: usize, words: &mut [u64]| {
                for (i, column) in words.chunks_mut(visible).enumerate() {
                    column.copy_from_slice(&values[(from / visible + i) * positions..][..visible]);
                }
            };
            let mut all = vec![0; tile.len() * group * dim];
            gemm::Rows::new(k, &weights, visible).times(dim, columns, &mut all);
            let out = &mut out[tile.start * group..tile.end * group];
            out.iter_mut().zip(all.chunks(dim)).for_each(|(out, all)| out.copy_from_slice(all));
        }
    };
    let lengths = vec![dim; tokens];
    by_head(out, &lengths, (heads, kv_heads)).into_par_iter().enumerate().for_each(head);
}

/// Some columns of the first positions: a head's.
fn columns(cache: &PackedRows, positions: usize, columns: std::ops::Range<usize>) -> Vec<u64> {
    let mut out = vec![0; positions * columns.len()];
    cache.read(0..positions, columns, &mut out);
    out
}

/// A matrix's columns as rows.
fn transposed(words: &[u64], columns: usize) -> Vec<u64> {
    let rows = words.len() / columns;
    let mut out = vec![0; columns * rows];
    // A few rows at a time: their words fill whole lines of the cache.
    for from in (0..rows).step_by(8) {
        let to = rows.min(from + 8);
        for column in 0..columns {
            let row = &mut out[column * rows + from..column * rows + to];
            row.iter_mut().zip(from..to).for_each(|(out, r)| *out = words[r * columns + column]);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::prf::PreparationSeed;
    use crate::ring;
    use crate::share::Rows;

    /// Uniform words below `2^k`.
    fn words(seed: u8, n: usize, k: u32) -> Vec<u64> {
        let mut out = vec![0; n];
        PreparationSeed::from_bytes([seed; 32]).matrix(0).words(0, &mut out);
        out.iter_mut().for_each(|w| *w &= ring::mask(k));
        out
    }

    /// Of so many positions that threads share them.
    #[test]
    fn a_long_cache_in_parts() {
        let (heads, dim, positions, k) = (12, 40, 2301, 45);
        let width = heads * dim;
        let mut cache = PackedRows::new(width, k, 0);
        cache.extend(&words(1, positions * width, k));
        let alone = |op: &dyn CachedBilinear, rows: &Rows| {
            let tokens = rows.tokens();
            let x = words(2, rows.len(), k);
            let (span, of) = (Span::new(rows, 0..tokens, &x), (&cache, positions));
            let mut shared = vec![0; (positions - tokens..positions).map(|position| op.outputs(position)).sum()];
            let mut one = shared.clone();
            op.each(&span, of, &mut shared);
            op.part(&span, of, 0..positions, &mut one);
            assert_eq!(shared, one);
        };
        for tokens in [1, 3] {
            alone(&Scores { heads, kv_heads: heads, dim, all: None }, &Rows::even(tokens, width));
            let seen = Rows::ragged((0..tokens).map(|i| heads * (positions - tokens + i + 1)));
            alone(&Context { heads, kv_heads: heads, dim, all: None }, &seen);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        /// The same as token by token, over tiles and odd widths, in rings of all kernels.
        #[test]
        fn many_rows_are_each_by_itself(
            (tokens, before) in (1usize..140, prop_oneof![0usize..60, 500..900usize]),
            (kv_heads, group, dim) in (1usize..4, 1usize..4, 1usize..24),
            k in prop_oneof![Just(40u32), Just(44), Just(45), Just(48), Just(50), Just(58), Just(64)],
            seed: u8,
        ) {
            let (heads, width, m) = (kv_heads * group, kv_heads * dim, ring::mask(k));
            let mut cache = PackedRows::new(width, k, 0);
            cache.extend(&words(seed, (before + tokens) * width, k));
            let masked = |v: Vec<u64>| v.into_iter().map(|v| v & m).collect::<Vec<u64>>();
            let both = |op: &dyn CachedBilinear, rows: &Rows| {
                let x = words(seed.wrapping_add(1), rows.len(), k);
                let span = Span::new(rows, 0..tokens, &x);
                let mut all = vec![0; (before..before + tokens).map(|position| op.outputs(position)).sum()];
                let mut each = all.clone();
                op.together(k, &span, (&cache, before + tokens), &mut all);
                op.each(&span, (&cache, before + tokens), &mut each);
                (masked(all), masked(each))
            };
            for sees in [None, Some(before + tokens)] {
                let op = Scores { heads, kv_heads, dim, all: sees };
                let (all, each) = both(&op, &Rows::even(tokens, heads * dim));
                prop_assert_eq!(all, each);
                let seen = Rows::ragged((0..tokens).map(|i| heads * op.visible(before + i)));
                let (all, each) = both(&Context { heads, kv_heads, dim, all: sees }, &seen);
                prop_assert_eq!(all, each);
            }
        }
    }
}
