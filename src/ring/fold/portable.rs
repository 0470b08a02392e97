//! The plain form of the folds: a bit becomes a whole-word mask, no branches.

use super::{Scaled, Word};

/// See [`super::shifted`] (`ADD` false) and [`super::sums`].
pub fn shifted<T: Word, const ADD: bool>(tables: &[&[T]], n: usize, offset: &[u32], queries: &[u8], out: &mut [T]) {
    let words = tables.len();
    let elements = offset.iter().zip(queries.chunks_exact(n / 8));
    for ((&offset, query), out) in elements.zip(out.chunks_exact_mut(words)) {
        for (table, out) in tables.iter().zip(out) {
            *out = fold::<T, ADD>(&table[offset as usize..][..n], query, |row| row);
        }
    }
}

/// See [`super::scaled`].
pub fn scaled(s: &Scaled<'_>, n: usize, offset: &[u32], factor: &[u32], queries: &[u8], out: &mut [u64]) {
    let elements = offset.iter().zip(factor).zip(queries.chunks_exact(n / 8));
    for (((&offset, &factor), query), out) in elements.zip(out) {
        *out = fold::<u64, true>(&s.table[offset as usize..][..n], query, |row| s.row(row, factor));
    }
}

fn fold<T: Word, const ADD: bool>(rows: &[T], query: &[u8], of: impl Fn(T) -> T) -> T {
    let mut acc = [T::default(); 8];
    for (rows, &bits) in rows.as_chunks::<8>().0.iter().zip(query) {
        for (i, (acc, row)) in acc.iter_mut().zip(rows).enumerate() {
            *acc = acc.join::<ADD>(of(*row).masked(bits >> i & 1));
        }
    }
    acc.into_iter().fold(T::default(), |a, b| a.join::<ADD>(b))
}
