//! The plain form of the folds: a bit becomes a whole-word mask, no branches.

use super::Scaled;

/// See [`super::shifted`] (`ADD` false) and [`super::sums`].
pub fn shifted<const ADD: bool>(tables: &[&[u64]], n: usize, offset: &[u32], queries: &[u8], out: &mut [u64]) {
    let words = tables.len();
    let elements = offset.iter().zip(queries.chunks_exact(n / 8));
    for ((&offset, query), out) in elements.zip(out.chunks_exact_mut(words)) {
        for (table, out) in tables.iter().zip(out) {
            *out = fold::<ADD>(&table[offset as usize..][..n], query, |row| row);
        }
    }
}

/// See [`super::scaled`].
pub fn scaled(s: &Scaled<'_>, n: usize, offset: &[u32], factor: &[u32], queries: &[u8], out: &mut [u64]) {
    let elements = offset.iter().zip(factor).zip(queries.chunks_exact(n / 8));
    for (((&offset, &factor), query), out) in elements.zip(out) {
        *out = fold::<true>(&s.table[offset as usize..][..n], query, |row| s.row(row, factor));
    }
}

fn fold<const ADD: bool>(rows: &[u64], query: &[u8], of: impl Fn(u64) -> u64) -> u64 {
    let join = |a: u64, b: u64| if ADD { a.wrapping_add(b) } else { a ^ b };
    let mut acc = [0u64; 8];
    for (rows, &bits) in rows.as_chunks::<8>().0.iter().zip(query) {
        for (i, (acc, row)) in acc.iter_mut().zip(rows).enumerate() {
            *acc = join(*acc, of(*row) & 0u64.wrapping_sub(u64::from(bits) >> i & 1));
        }
    }
    acc.into_iter().fold(0, join)
}
