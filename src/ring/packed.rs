//! Words of a ring that stay packed: what the Helper keeps of the weights, in its memory or in a file mapped into it.

use std::ops::Range;
use std::sync::Arc;

use super::{Isa, pack};

/// Bytes that somebody keeps: a vector, or a mapped file.
pub(crate) type Bytes = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// `words` elements of `bits` bits, in pieces of `piece` elements, each packed from a fresh byte.
#[derive(Clone)]
pub struct Packed {
    bytes: Bytes,
    /// Where they begin in `bytes`.
    at: usize,
    words: usize,
    piece: usize,
    bits: u32,
}

/// Elements that are there unpacked at a time while a matrix is packed; a multiple of eight, so that there is no seam.
const AT_ONCE: usize = 1 << 14;

impl Packed {
    /// All of `words`, in one piece.
    #[must_use]
    pub fn new(words: &[u64], bits: u32) -> Packed {
        Packed::of(Arc::new(pack::pack(words, bits)), 0, words.len(), words.len(), bits)
    }

    /// `words` elements, asked for some at a time.
    ///
    /// # Errors
    /// Those of `some`.
    pub(crate) fn made<E>(
        words: usize,
        bits: u32,
        some: impl FnMut(Range<usize>) -> Result<Vec<u64>, E>,
    ) -> Result<Packed, E> {
        Ok(Packed::of(Arc::new(pack_range(0..words, bits, some)?), 0, words, words, bits))
    }

    /// From bytes packed by somebody else, from `at` on; `None` if they are too few.
    #[must_use]
    pub(crate) fn from_bytes(bytes: Bytes, at: usize, words: usize, piece: usize, bits: u32) -> Option<Packed> {
        let pieces = words.checked_div(piece).unwrap_or(0);
        let whole = pieces.checked_mul(pack::packed_len(piece, bits))?;
        let len = whole.checked_add(pack::packed_len(words - pieces * piece, bits))?;
        let end = at.checked_add(len)?;
        ((*bytes).as_ref().len() >= end).then(|| Packed::of(bytes, at, words, piece, bits))
    }

    fn of(bytes: Bytes, at: usize, words: usize, piece: usize, bits: u32) -> Packed {
        Packed { bytes, at, words, piece: piece.max(1), bits }
    }

    /// Number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.words
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.words == 0
    }

    /// Bits of an element.
    #[must_use]
    pub fn bits(&self) -> u32 {
        self.bits
    }

    /// Bytes that they take.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let pieces = self.words / self.piece;
        pieces * pack::packed_len(self.piece, self.bits) + pack::packed_len(self.words - pieces * self.piece, self.bits)
    }

    /// Elements from `from` on, as many as `out` has room for.
    ///
    /// # Panics
    /// If there are not so many.
    pub fn read(&self, from: usize, out: &mut [u64]) {
        assert!(from <= self.words && out.len() <= self.words - from, "elements that are there");
        let all = &(*self.bytes).as_ref()[self.at..];
        let stride = pack::packed_len(self.piece, self.bits);
        let (mut from, mut out) = (from, out);
        while !out.is_empty() {
            let (piece, within) = (from / self.piece, from % self.piece);
            let (some, rest) = out.split_at_mut(out.len().min(self.piece - within));
            pack::unpack_from(&all[piece * stride..], within, self.bits, some);
            from += some.len();
            out = rest;
        }
    }
}

impl std::fmt::Debug for Packed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} packed words of {} bits", self.words, self.bits)
    }
}

/// Elements `range`, asked for some at a time, packed.
///
/// # Errors
/// Those of `some`.
pub(crate) fn pack_range<E>(
    range: Range<usize>,
    bits: u32,
    mut some: impl FnMut(Range<usize>) -> Result<Vec<u64>, E>,
) -> Result<Vec<u8>, E> {
    let mut out = vec![0; pack::packed_len(range.len(), bits)];
    let size = pack::packed_len(AT_ONCE, bits);
    for (from, out) in range.clone().step_by(AT_ONCE).zip(out.chunks_mut(size)) {
        pack::pack_on(Isa::current(), &some(from..range.end.min(from + AT_ONCE))?, bits, out);
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ring::mask;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn pieces_read_as_one(
            values in prop::collection::vec(any::<u64>(), 1..400), k in 1u32..=64, piece in 1usize..100, at in 0usize..9,
            from in 0usize..400, n in 0usize..400,
        ) {
            let mut bytes = vec![0xff; at];
            values.chunks(piece).for_each(|c| pack::pack_into(c, k, &mut bytes));
            let len = bytes.len() - at;
            let packed = Packed::from_bytes(Arc::new(bytes.clone()), at, values.len(), piece, k).unwrap();
            prop_assert_eq!(packed.bytes(), len);
            let from = from.min(values.len());
            let mut out = vec![0; n.min(values.len() - from)];
            packed.read(from, &mut out);
            prop_assert!(out.iter().zip(&values[from..]).all(|(o, v)| *o == v & mask(k)));
            bytes.pop();
            prop_assert!(Packed::from_bytes(Arc::new(bytes), at, values.len(), piece, k).is_none());
        }
    }

    #[test]
    fn made_piece_by_piece() {
        let words: Vec<u64> = (0..40_000u64).map(|i| i.wrapping_mul(0x9e37_79b9_7f4a_7c15)).collect();
        let made = Packed::made(words.len(), 51, |r| Ok::<_, ()>(words[r].to_vec())).unwrap();
        assert_eq!((*made.bytes).as_ref(), (*Packed::new(&words, 51).bytes).as_ref());
        assert!(Packed::made(9, 5, |_| Err::<Vec<u64>, _>(())).is_err());
    }
}
