//! Bit packing for the wire: `n` elements of Z_2^k in `ceil(n k / 8)` bytes, element `i` in bits `[i k, (i + 1) k)` of the
//! stream, the lowest bit of a byte first. Widths of whole bytes take copy loops; in all
//! others eight elements at a time, which end on a byte, take overlapping words.

use super::mask;

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
    let mut out = Vec::new();
    pack_into(values, k, &mut out);
    out
}

/// [`pack`], appended to `out`, starting at a fresh byte.
///
/// # Panics
/// If `k` is 0 or above 64.
pub fn pack_into(values: &[u64], k: u32, out: &mut Vec<u8>) {
    let start = out.len();
    out.resize(start + packed_len(values.len(), k), 0);
    let out = &mut out[start..];
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

/// The `n` elements in `bytes`, each below 2^k; `None` when the length is not exactly [`packed_len`] or an unused bit of the
/// last byte is set. Takes bytes from a peer: never panics for a valid `k`.
///
/// # Panics
/// If `k` is 0 or above 64.
#[must_use]
pub fn unpack(bytes: &[u8], n: usize, k: u32) -> Option<Vec<u64>> {
    let mask = mask(k);
    let bits = n.checked_mul(k as usize)?;
    if bytes.len() != bits.div_ceil(8) {
        return None;
    }
    if bits % 8 != 0 && bytes.last()? >> (bits % 8) != 0 {
        return None;
    }
    let mut out = vec![0; n];
    match k {
        8 => unpack_bytes::<1>(bytes, &mut out),
        16 => unpack_bytes::<2>(bytes, &mut out),
        24 => unpack_bytes::<3>(bytes, &mut out),
        32 => unpack_bytes::<4>(bytes, &mut out),
        40 => unpack_bytes::<5>(bytes, &mut out),
        48 => unpack_bytes::<6>(bytes, &mut out),
        56 => unpack_bytes::<7>(bytes, &mut out),
        64 => unpack_bytes::<8>(bytes, &mut out),
        _ => unpack_bits(bytes, k, mask, &mut out),
    }
    Some(out)
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
