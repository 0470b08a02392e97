//! The plain form of the fold: a bit becomes a whole-word mask, no branches.

/// See [`super::shifted`].
pub fn shifted(tables: &[&[u64]], n: usize, offset: &[u32], sub: &[u64], queries: &[u8], out: &mut [u64]) {
    let words = tables.len();
    let elements = offset.iter().zip(queries.chunks_exact(n / 8));
    for (((&offset, query), sub), out) in elements.zip(sub.chunks_exact(words)).zip(out.chunks_exact_mut(words)) {
        for ((table, &sub), out) in tables.iter().zip(sub).zip(out) {
            *out = fold(&table[offset as usize..][..n], sub, query);
        }
    }
}

/// See [`super::rows`].
pub fn rows(rows: &[u64], n: usize, queries: &[u8], out: &mut [u64]) {
    for ((rows, query), out) in rows.chunks_exact(n).zip(queries.chunks_exact(n / 8)).zip(out) {
        *out = fold(rows, 0, query);
    }
}

fn fold(rows: &[u64], sub: u64, query: &[u8]) -> u64 {
    let mut acc = [0u64; 8];
    for (rows, &bits) in rows.as_chunks::<8>().0.iter().zip(query) {
        for (i, (acc, row)) in acc.iter_mut().zip(rows).enumerate() {
            *acc ^= row.wrapping_sub(sub) & 0u64.wrapping_sub(u64::from(bits) >> i & 1);
        }
    }
    acc.into_iter().fold(0, |a, b| a ^ b)
}
