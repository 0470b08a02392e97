//! Bit packing for the wire: `n` elements of Z_2^k in `ceil(n k / 8)` bytes, element `i` in bits `[i k, (i + 1) k)` of the
//! stream, the lowest bit of a byte first. Widths of whole bytes take copy loops; in all
//! others eight elements at a time, which end on a byte, take overlapping words. With AVX-512 eight elements are one
//! register, whatever their width, and NEON unpacks two at a time.

#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;

use std::ops::Range;

use super::{Isa, mask};
use crate::par;

/// Bytes that `n` elements of `k` bits take.
///
/// # Panics
/// If `n k` does not fit a `usize`.
#[must_use]
pub fn packed_len(n: usize, k: u32) -> usize {
    n.checked_mul(k as usize).expect("a packed length that fits memory").div_ceil(8)
}

/// The low `k` bits of each value, packed. Higher bits are dropped, so this is also the reduction modulo 2^k.
///
/// # Panics
/// If `k` is 0 or above 64.
#[must_use]
pub fn pack(values: &[u64], k: u32) -> Vec<u8> {
    par::in_blocks(values.len(), 1, |n| packed_len(n, k), |block| packed(&values[block], k))
}

/// [`pack`] of a few values.
pub(crate) fn packed(values: &[u64], k: u32) -> Vec<u8> {
    let mut out = vec![0; packed_len(values.len(), k)];
    pack_on(Isa::current(), values, k, &mut out);
    out
}

/// [`pack`], appended to `out`, starting at a fresh byte.
///
/// # Panics
/// If `k` is 0 or above 64.
pub fn pack_into(values: &[u64], k: u32, out: &mut Vec<u8>) {
    out.extend_from_slice(&pack(values, k));
}

/// [`pack`] on a chosen instruction set (portable where the processor lacks it), to `out`, which it fills.
///
/// # Panics
/// If `k` is 0 or above 64, or `out` has not [`packed_len`] bytes.
pub fn pack_on(isa: Isa, values: &[u64], k: u32, out: &mut [u8]) {
    assert_eq!(out.len(), packed_len(values.len(), k), "as many bytes as the elements take");
    #[cfg(target_arch = "x86_64")]
    if isa.or_portable() >= Isa::Avx512 && (32..64).contains(&k) {
        // SAFETY: `or_portable` has checked that the processor has the instructions.
        return unsafe { avx512::pack(values, k, out) };
    }
    let _ = isa;
    match k {
        8 => pack_bytes::<1>(values, out),
        16 => pack_bytes::<2>(values, out),
        24 => pack_bytes::<3>(values, out),
        32 => pack_bytes::<4>(values, out),
        40 => pack_bytes::<5>(values, out),
        48 => pack_bytes::<6>(values, out),
        56 => pack_bytes::<7>(values, out),
        64 => pack_bytes::<8>(values, out),
        _ => pack_bits(values, k, out),
    }
}

/// The `n` elements in `bytes`, each below 2^k; `None` when [`well_formed`] says no. Takes bytes from a peer: never panics for a valid
/// `k`.
///
/// # Panics
/// If `k` is 0 or above 64.
#[must_use]
pub fn unpack(bytes: &[u8], n: usize, k: u32) -> Option<Vec<u64>> {
    well_formed(bytes, n, k).then(|| par::each(n, |block| unpacked(bytes, block, k)))
}

/// Some elements of a packed stream, which has them.
pub(crate) fn unpacked(bytes: &[u8], elements: Range<usize>, k: u32) -> Vec<u64> {
    let mut out = vec![0; elements.len()];
    unpack_from(bytes, elements.start, k, &mut out);
    out
}

/// Whether `bytes` are `n` packed elements: exactly [`packed_len`] of them, and no unused bit of the last one set.
///
/// # Panics
/// If `k` is 0 or above 64.
#[must_use]
pub fn well_formed(bytes: &[u8], n: usize, k: u32) -> bool {
    assert!((1..=64).contains(&k), "a ring has 1 to 64 bits");
    let Some(bits) = n.checked_mul(k as usize) else { return false };
    bytes.len() == bits.div_ceil(8) && (bits % 8 == 0 || bytes.last().is_some_and(|last| last >> (bits % 8) == 0))
}

/// Elements `from..from + out.len()` of a packed stream.
///
/// # Panics
/// If `k` is 0 or above 64, or `bytes` holds fewer elements.
pub fn unpack_from(bytes: &[u8], from: usize, k: u32, out: &mut [u64]) {
    // Eight elements begin and end on a byte: up to the next such place by way of the group around `from`.
    let within = from % 8;
    let bytes = &bytes[packed_len(from - within, k)..];
    if within == 0 {
        return unpack_on(Isa::current(), &bytes[..packed_len(out.len(), k)], k, out);
    }
    let (head, rest) = out.split_at_mut(out.len().min(8 - within));
    let mut group = [0; 8];
    let group = &mut group[..within + head.len()];
    unpack_on(Isa::current(), &bytes[..packed_len(group.len(), k)], k, group);
    head.copy_from_slice(&group[within..]);
    if !rest.is_empty() {
        unpack_on(Isa::current(), &bytes[k as usize..][..packed_len(rest.len(), k)], k, rest);
    }
}

/// As many elements as `out` has room for, on a chosen instruction set (portable where the processor lacks it). What is left
/// over in the last byte is not looked at.
///
/// # Panics
/// If `k` is 0 or above 64, or `bytes` has not [`packed_len`] bytes.
pub fn unpack_on(isa: Isa, bytes: &[u8], k: u32, out: &mut [u64]) {
    assert_eq!(bytes.len(), packed_len(out.len(), k), "as many bytes as the elements take");
    #[cfg(target_arch = "x86_64")]
    if isa.or_portable() >= Isa::Avx512 && (1..64).contains(&k) {
        // SAFETY: `or_portable` has checked that the processor has the instructions.
        return unsafe { avx512::unpack(bytes, k, out) };
    }
    #[cfg(target_arch = "aarch64")]
    let (bytes, out) = if isa.or_portable() >= Isa::Neon && k <= neon::WIDEST {
        // SAFETY: `or_portable` has checked that the processor has the instructions.
        let done = unsafe { neon::unpack(bytes, k, out) };
        (&bytes[packed_len(done, k)..], &mut out[done..])
    } else {
        (bytes, out)
    };
    let _ = isa;
    match k {
        8 => unpack_bytes::<1>(bytes, out),
        16 => unpack_bytes::<2>(bytes, out),
        24 => unpack_bytes::<3>(bytes, out),
        32 => unpack_bytes::<4>(bytes, out),
        40 => unpack_bytes::<5>(bytes, out),
        48 => unpack_bytes::<6>(bytes, out),
        56 => unpack_bytes::<7>(bytes, out),
        64 => unpack_bytes::<8>(bytes, out),
        _ => unpack_bits(bytes, k, mask(k), out),
    }
}

fn pack_bytes<const B: usize>(values: &[u64], out: &mut [u8]) {
    let (cells, rest) = out.as_chunks_mut::<B>();
    assert!(cells.len() == values.len() && rest.is_empty());
    for (cell, v) in cells.iter_mut().zip(values) {
        cell.copy_from_slice(&v.to_le_bytes()[..B]);
    }
}

fn unpack_bytes<const B: usize>(bytes: &[u8], out: &mut [u64]) {
    let (cells, rest) = bytes.as_chunks::<B>();
    assert!(cells.len() == out.len() && rest.is_empty());
    for (v, cell) in out.iter_mut().zip(cells) {
        let mut word = [0; 8];
        word[..B].copy_from_slice(cell);
        *v = u64::from_le_bytes(word);
    }
}

/// Where the eight elements of a group start: eight elements fill exactly `k` bytes, so every group is alike.
fn group(k: usize) -> [(usize, u32); 8] {
    std::array::from_fn(|i| (i * k / 8, (i * k % 8) as u32))
}

/// Any width that is not whole bytes. Up to 57 bits an element and its shift fit one word: whole groups are written as
/// overlapping words, each carrying over what the one before left in it. The rest goes bit after bit.
fn pack_bits(values: &[u64], k: u32, out: &mut [u8]) {
    let (mask, size, starts) = (mask(k), k as usize, group(k as usize));
    // a group's last word reaches at most 8 bytes beyond the group
    let groups = if k > 57 { 0 } else { out.len().saturating_sub(8) / size };
    let (groups_in, rest) = values.split_at(8 * groups);
    for (g, values) in groups_in.as_chunks::<8>().0.iter().enumerate() {
        let out = &mut out[g * size..][..size + 8];
        let (mut word, mut last) = (0u64, 0);
        for (v, (at, shift)) in values.iter().zip(starts) {
            // two starts are 8 bytes apart at most, and exactly 8 never: k <= 57
            word = word >> (8 * (at - last)) | (v & mask) << shift;
            out[at..at + 8].copy_from_slice(&word.to_le_bytes());
            last = at;
        }
    }
    pack_rest(rest, k, &mut out[groups * size..]);
}

/// From a byte boundary to the end: a word is written whenever 64 bits are full.
fn pack_rest(values: &[u64], k: u32, out: &mut [u8]) {
    let mask = mask(k);
    let (words, tail) = out.as_chunks_mut::<8>();
    let mut words = words.iter_mut();
    let (mut acc, mut fill) = (0u64, 0u32);
    for &v in values {
        let v = v & mask;
        acc |= v << fill;
        fill += k;
        if fill >= 64 {
            fill -= 64;
            match words.next() {
                Some(word) => *word = acc.to_le_bytes(),
                None => unreachable!("the output has packed_len bytes"),
            }
            // k < 64, so at least one bit of v went into the word and the shift is below 64
            acc = v >> (k - fill);
        }
    }
    // the last bits: a whole word where they reach into its eighth byte
    match words.next() {
        Some(word) => *word = acc.to_le_bytes(),
        None => tail.copy_from_slice(&acc.to_le_bytes()[..tail.len()]),
    }
}

/// The inverse of [`pack_bits`]: whole groups by overlapping loads, the rest bit after bit.
fn unpack_bits(bytes: &[u8], k: u32, mask: u64, out: &mut [u64]) {
    let (size, starts) = (k as usize, group(k as usize));
    let groups = if k > 57 { 0 } else { bytes.len().saturating_sub(8) / size };
    let (groups_out, rest) = out.split_at_mut(8 * groups);
    for (g, values) in groups_out.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        let bytes = &bytes[g * size..][..size + 8];
        for (v, (at, shift)) in values.iter_mut().zip(starts) {
            let word = bytes[at..].first_chunk::<8>().map_or(0, |w| u64::from_le_bytes(*w));
            *v = word >> shift & mask;
        }
    }
    unpack_rest(&bytes[groups * size..], k, mask, rest);
}

/// From a byte boundary to the end: a word is read whenever the bits run out.
fn unpack_rest(bytes: &[u8], k: u32, mask: u64, out: &mut [u64]) {
    let (words, tail) = bytes.as_chunks::<8>();
    let mut last = [0; 8];
    last[..tail.len()].copy_from_slice(tail);
    let mut words = words.iter().chain(std::iter::once(&last)).map(|w| u64::from_le_bytes(*w));
    let (mut acc, mut fill) = (0u64, 0u32);
    for v in out {
        if fill >= k {
            *v = acc & mask;
            acc >>= k;
            fill -= k;
        } else {
            let word = words.next().unwrap_or(0);
            *v = (acc | word << fill) & mask;
            // fill < k < 64, so the shift is in 1..=63
            acc = word >> (k - fill);
            fill += 64 - k;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The definition, one bit at a time.
    fn bit_by_bit(values: &[u64], k: u32) -> Vec<u8> {
        let mut out = vec![0u8; packed_len(values.len(), k)];
        for (i, v) in values.iter().enumerate() {
            for b in 0..k as usize {
                let at = i * k as usize + b;
                out[at / 8] |= ((v >> b & 1) as u8) << (at % 8);
            }
        }
        out
    }

    #[test]
    fn every_width_round_trips() {
        let values: Vec<u64> = (1..=131u64).map(|i| i.wrapping_mul(0x9e37_79b9_7f4a_7c15)).collect();
        for k in 1..=64 {
            for n in [0, 1, 7, 8, 63, 64, 65, 131] {
                let packed = pack(&values[..n], k);
                assert_eq!(packed, bit_by_bit(&values[..n], k), "k = {k}, n = {n}");
                for isa in Isa::available() {
                    let (mut bytes, mut words) = (vec![0xa5; packed.len()], vec![1; n]);
                    pack_on(isa, &values[..n], k, &mut bytes);
                    assert_eq!(bytes, packed, "{isa:?}, k = {k}, n = {n}");
                    unpack_on(isa, &packed, k, &mut words);
                    assert!(words.iter().zip(&values).all(|(w, v)| *w == v & mask(k)), "{isa:?}, k = {k}, n = {n}");
                }
                let want: Vec<u64> = values[..n].iter().map(|v| v & mask(k)).collect();
                assert_eq!(unpack(&packed, n, k), Some(want), "k = {k}, n = {n}");
            }
        }
    }

    #[test]
    fn refuses_wrong_lengths_and_padding() {
        assert_eq!(unpack(&[0; 3], 3, 7), Some(vec![0; 3]));
        assert_eq!(unpack(&[0; 4], 3, 7), None);
        assert_eq!(unpack(&[0; 2], 3, 7), None);
        assert_eq!(unpack(&[0, 0, 0b0010_0000], 3, 7), None);
        assert_eq!(unpack(&[0, 0, 0b0001_0000], 3, 7), Some(vec![0, 0, 64]));
        assert_eq!(unpack(&[], 0, 13), Some(vec![]));
        assert_eq!(unpack(&[0], 0, 13), None);
        assert_eq!(unpack(&[0], usize::MAX, 64), None);
    }

    proptest! {
        #[test]
        fn paths_agree(values in prop::collection::vec(any::<u64>(), 0..300), k in 1u32..=64, skip in 0usize..9) {
            let want = bit_by_bit(&values, k);
            // At any address, and with nothing but noise beside it.
            let mut bytes = vec![0x5a; skip + want.len() + 70];
            for isa in Isa::available() {
                pack_on(isa, &values, k, &mut bytes[skip..skip + want.len()]);
                prop_assert_eq!(&bytes[skip..skip + want.len()], &want[..]);
                let mut words = vec![u64::MAX; values.len() + 2];
                unpack_on(isa, &bytes[skip..skip + want.len()], k, &mut words[1..=values.len()]);
                for (w, v) in words[1..].iter().zip(&values) {
                    prop_assert_eq!(*w, v & mask(k));
                }
                prop_assert_eq!((words[0], words[values.len() + 1]), (u64::MAX, u64::MAX));
            }
            prop_assert!(bytes[..skip].iter().chain(&bytes[skip + want.len()..]).all(|b| *b == 0x5a));
        }

        #[test]
        fn any_part_of_a_stream(values in prop::collection::vec(any::<u64>(), 0..200), k in 1u32..=64, from in 0usize..200, n in 0usize..200) {
            let from = from.min(values.len());
            let n = n.min(values.len() - from);
            let mut words = vec![0; n];
            unpack_from(&pack(&values, k), from, k, &mut words);
            let want: Vec<u64> = values[from..from + n].iter().map(|v| v & mask(k)).collect();
            prop_assert_eq!(words, want);
        }

        #[test]
        fn appends_and_round_trips(values in prop::collection::vec(any::<u64>(), 0..300), k in 1u32..=64) {
            let mut out = vec![0xaa; 3];
            pack_into(&values, k, &mut out);
            prop_assert_eq!(&out[..3], &[0xaa; 3]);
            prop_assert_eq!(&out[3..], &bit_by_bit(&values, k)[..]);
            let want: Vec<u64> = values.iter().map(|v| v & mask(k)).collect();
            prop_assert_eq!(unpack(&out[3..], values.len(), k), Some(want));
        }
    }
}
