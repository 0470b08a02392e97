//! Long vectors, block by block: what is between the steps of an operation stays in cache, and of a prefill several threads
//! share the blocks.
//!
//! The threads are started anew each time. A pool would not do: the threads of parties in one process, or of several sessions, share it,
//! and what a party is waited for would queue behind another's matrix products. Starting one takes some 25 us (two virtual cores at 2.5 GHz).

use std::mem::MaybeUninit;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// Words of a block.
const BLOCK: usize = 1 << 12;

/// Blocks below which one thread is faster than several.
const SEVERAL: usize = 4;

/// What `part` makes of the blocks of `0..n`, one after the other; blocks begin at multiples of 8, so that packed words of one end on a
/// byte. `words` is what an element has of them at most, and `len` says how much is made of so many elements, of whole blocks
/// in proportion.
///
/// # Panics
/// If a part has another length.
#[allow(unsafe_code)]
pub(crate) fn in_blocks<T: Copy + Send>(
    n: usize,
    words: usize,
    len: impl Fn(usize) -> usize,
    part: impl Fn(Range<usize>) -> Vec<T> + Sync,
) -> Vec<T> {
    let size = (BLOCK / words.max(1)).max(8) / 8 * 8;
    if n <= size {
        let all = part(0..n);
        assert_eq!(all.len(), len(n), "a part as long as announced");
        return all;
    }
    let total = len(n);
    let mut out = Vec::with_capacity(total);
    let mut spare = &mut out.spare_capacity_mut()[..total];
    let mut blocks = Vec::with_capacity(n.div_ceil(size));
    for from in (0..n).step_by(size) {
        let range = from..(from + size).min(n);
        let (block, rest) = spare.split_at_mut(len(range.end) - len(from));
        blocks.push((range, block));
        spare = rest;
    }
    let threads = rayon::current_num_threads().min(blocks.len() / SEVERAL * 2).max(1);
    let left = Mutex::new(blocks.into_iter());
    let work = || {
        let next = || left.lock().unwrap_or_else(PoisonError::into_inner).next();
        while let Some((range, block)) = next() {
            fill(block, &part(range));
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads {
            // Without it the others do its share.
            let _ = std::thread::Builder::new().spawn_scoped(scope, work);
        }
        work();
    });
    // SAFETY: the blocks are the first `total` elements, without a gap; each was filled to its end, or its thread panicked, which
    // the scope has passed on.
    unsafe { out.set_len(total) };
    out
}

/// [`in_blocks`] of one word for each element.
pub(crate) fn each<T: Copy + Send>(n: usize, part: impl Fn(Range<usize>) -> Vec<T> + Sync) -> Vec<T> {
    in_blocks(n, 1, |n| n, part)
}

fn fill<T: Copy>(block: &mut [MaybeUninit<T>], part: &[T]) {
    assert_eq!(block.len(), part.len(), "a part as long as announced");
    for (to, v) in block.iter_mut().zip(part) {
        to.write(*v);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_in_order_and_whole() {
        for n in [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5, 40 * BLOCK, 41 * BLOCK - 3] {
            let twice = in_blocks(n, 1, |m| 2 * m, |r| r.flat_map(|i| [i, i + 7]).collect());
            assert_eq!(twice, (0..n).flat_map(|i| [i, i + 7]).collect::<Vec<_>>());
            // Elements of 5 bits.
            let bytes = in_blocks(n, 3, |m| (5 * m).div_ceil(8), |r| vec![1u8; (5 * r.len()).div_ceil(8)]);
            assert_eq!(bytes.len(), (5 * n).div_ceil(8));
        }
    }

    #[test]
    #[should_panic]
    fn a_part_of_another_length_is_noticed() {
        in_blocks(9 * BLOCK, 1, |m| m, |r| vec![0u8; r.len() - usize::from(r.start == 8 * BLOCK)]);
    }
}
