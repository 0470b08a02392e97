//! Rows of ring words that stay packed while more come: what a cache keeps of every token.

use std::ops::Range;

use super::{Isa, pack};

/// Rows of `width` words modulo `2^k` in `k` bits each, every row from a fresh byte.
pub struct PackedRows {
    width: usize,
    k: u32,
    rows: usize,
    bytes: Vec<u8>,
    /// Rows for which room is made at once.
    room: usize,
}

impl PackedRows {
    /// None yet, with room for `room`, and for as many more whenever it is full: no more than that is ever unused.
    ///
    /// # Panics
    /// If `width` is 0, or `k` 0 or above 64.
    #[must_use]
    pub fn new(width: usize, k: u32, room: usize) -> Self {
        assert!(width >= 1 && (1..=64).contains(&k), "rows of words, of rings of 1 to 64 bits");
        PackedRows { width, k, rows: 0, bytes: Vec::with_capacity(room * pack::packed_len(width, k)), room }
    }

    /// How many there are.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Words of each.
    #[must_use]
    pub fn width(&self) -> usize {
        self.width
    }

    /// Bytes that they take.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes.len()
    }

    /// Rows of words at the end; bits from `k` on are dropped.
    ///
    /// # Panics
    /// If `words` are not whole rows.
    pub fn extend(&mut self, words: &[u64]) {
        assert!(words.len().is_multiple_of(self.width), "whole rows");
        let (at, size) = (self.bytes.len(), pack::packed_len(self.width, self.k));
        let rows = words.len() / self.width;
        if self.bytes.capacity() - at < rows * size {
            self.bytes.reserve_exact(rows.max(self.room) * size);
        }
        self.bytes.resize(at + rows * size, 0);
        for (row, out) in words.chunks_exact(self.width).zip(self.bytes[at..].chunks_exact_mut(size)) {
            pack::pack_on(Isa::current(), row, self.k, out);
        }
        self.rows += rows;
    }

    /// Forgets all rows from `rows` on.
    pub fn truncate(&mut self, rows: usize) {
        self.rows = self.rows.min(rows);
        self.bytes.truncate(self.rows * pack::packed_len(self.width, self.k));
    }

    /// Some columns of some rows, one row after the other, into `out`, which they fill.
    ///
    /// # Panics
    /// If there are not so many rows and columns, or `out` has not exactly room for them.
    pub fn read(&self, rows: Range<usize>, columns: Range<usize>, out: &mut [u64]) {
        assert!(rows.end <= self.rows && columns.end <= self.width, "rows and columns that are there");
        assert_eq!(out.len(), rows.len() * columns.len(), "as much room as there are words");
        if out.is_empty() {
            return;
        }
        let size = pack::packed_len(self.width, self.k);
        let bytes = &self.bytes[rows.start * size..rows.end * size];
        // Whole rows without a seam between them are one.
        if columns.len() == self.width && self.width * self.k as usize == 8 * size {
            return pack::unpack_from(bytes, 0, self.k, out);
        }
        for (row, out) in bytes.chunks_exact(size).zip(out.chunks_exact_mut(columns.len())) {
            pack::unpack_from(row, columns.start, self.k, out);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ring::mask;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn rows_read_as_written(
            values in prop::collection::vec(any::<u64>(), 1..600), k in 1u32..=64, width in 1usize..40, first in 0usize..9,
            (row, rows) in (0usize..90, 0usize..90), (column, columns) in (0usize..40, 0usize..40), keep in 0usize..90,
        ) {
            let values = &values[..values.len() / width * width];
            let mut packed = PackedRows::new(width, k, 3);
            let first = (first * width).min(values.len());
            packed.extend(&values[..first]);
            packed.extend(&values[first..]);
            prop_assert_eq!(packed.rows(), values.len() / width);
            prop_assert_eq!(packed.bytes(), packed.rows() * pack::packed_len(width, k));
            let before = packed.rows();
            packed.truncate(keep);
            prop_assert_eq!(packed.rows(), before.min(keep));
            // What was forgotten leaves nothing behind.
            packed.extend(&values[packed.rows() * width..]);

            let row = row.min(packed.rows());
            let rows = row..packed.rows().min(row + rows);
            let column = column.min(width);
            let columns = column..width.min(column + columns);
            let mut out = vec![0; rows.len() * columns.len()];
            packed.read(rows.clone(), columns.clone(), &mut out);
            let want: Vec<u64> =
                rows.flat_map(|r| columns.clone().map(move |c| values[r * width + c] & mask(k))).collect();
            prop_assert_eq!(out, want);
        }
    }
}
