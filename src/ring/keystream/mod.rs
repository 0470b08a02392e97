//! AES-128 in counter mode: the low 64 bits of the counter block, little endian, count up and wrap. With VAES in 512-bit
//! registers the blocks never leave them; elsewhere they go through the `aes` crate, whose own such path takes about twice as
//! long in builds in which the compiler does not inline its loops of one register each.

#[cfg(target_arch = "x86_64")]
mod vaes;

use aes::Aes128;
use aes::cipher::{Array, BlockCipherEncrypt, KeyInit};
use zeroize::Zeroizing;

use super::Isa;

/// Blocks that are made together: a part of the first-level cache.
const TOGETHER: usize = 128;

/// A key, expanded. Wiped when dropped.
pub(crate) struct Key {
    cipher: Aes128,
    #[cfg(target_arch = "x86_64")]
    wide: Option<Box<Zeroizing<vaes::RoundKeys>>>,
}

impl Key {
    pub(crate) fn new(key: &[u8; 16]) -> Key {
        Key::on(Isa::current(), key)
    }

    fn on(isa: Isa, key: &[u8; 16]) -> Key {
        #[cfg(not(target_arch = "x86_64"))]
        let _ = isa;
        Key {
            cipher: Aes128::new(&Array::from(*key)),
            #[cfg(target_arch = "x86_64")]
            wide: if isa.or_portable() >= Isa::Avx512 { vaes::expand(key) } else { None },
        }
    }

    /// Bytes `from..from + out.len()` of the keystream that begins at the counter block `start`.
    pub(crate) fn keystream(&self, start: &[u8; 16], from: u64, out: &mut [u8]) {
        let (mut block, skipped) = (from / 16, (from % 16) as usize);
        let (head, out) = out.split_at_mut(((16 - skipped) % 16).min(out.len()));
        if !head.is_empty() {
            let mut one = Zeroizing::new([0; 16]);
            self.blocks(start, block, one.as_mut_slice());
            head.copy_from_slice(&one[skipped..][..head.len()]);
            block += 1;
        }
        let (whole, tail) = out.split_at_mut(out.len() / 16 * 16);
        self.blocks(start, block, whole);
        if !tail.is_empty() {
            let mut one = Zeroizing::new([0; 16]);
            self.blocks(start, block + (whole.len() / 16) as u64, one.as_mut_slice());
            tail.copy_from_slice(&one[..tail.len()]);
        }
    }

    /// Whole blocks from the `first` on.
    fn blocks(&self, start: &[u8; 16], first: u64, out: &mut [u8]) {
        let [low, high] = halves(start);
        let counter = low.wrapping_add(first);
        #[cfg(target_arch = "x86_64")]
        if let Some(keys) = &self.wide {
            // SAFETY: `expand` has checked that the processor has the instructions.
            return unsafe { vaes::blocks(keys, [counter, high], out) };
        }
        let (blocks, _) = Array::slice_as_chunks_mut(out);
        for (i, blocks) in blocks.chunks_mut(TOGETHER).enumerate() {
            for (j, block) in blocks.iter_mut().enumerate() {
                let at = counter.wrapping_add((i * TOGETHER + j) as u64);
                block[..8].copy_from_slice(&at.to_le_bytes());
                block[8..].copy_from_slice(&high.to_le_bytes());
            }
            self.cipher.encrypt_blocks(blocks);
        }
    }
}

/// The counter, and what stays.
fn halves(block: &[u8; 16]) -> [u64; 2] {
    let bits = u128::from_le_bytes(*block);
    [bits as u64, (bits >> 64) as u64]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One block at a time.
    fn oracle(key: [u8; 16], start: [u8; 16], blocks: usize) -> Vec<u8> {
        let (cipher, [low, high]) = (Aes128::new(&Array::from(key)), halves(&start));
        let block = |i: usize| {
            let at = u128::from(low.wrapping_add(i as u64)) | u128::from(high) << 64;
            let mut block = Array::from(at.to_le_bytes());
            cipher.encrypt_block(&mut block);
            <[u8; 16]>::from(block)
        };
        (0..blocks).flat_map(block).collect()
    }

    #[test]
    fn every_path_is_the_cipher_block_by_block_from_any_byte_on() {
        let key = std::array::from_fn(|i| (37 * i + 5) as u8);
        // The counter wraps after the third block, and what is beside it stays.
        for start in [[9; 16], u128::from_le_bytes([0xff; 16]).wrapping_sub(2).to_le_bytes()] {
            let want = oracle(key, start, 400);
            for isa in Isa::available() {
                let key = Key::on(isa, &key);
                for range in [0..6400, 0..0, 0..16, 0..1, 15..16, 15..17, 1..15, 7..1031, 16..112, 500..6399, 496..1520]
                {
                    let mut out = vec![0; range.len()];
                    key.keystream(&start, range.start as u64, &mut out);
                    assert_eq!(out, want[range.clone()], "{isa:?}, {range:?}");
                }
            }
        }
    }

    /// FIPS 197, appendix B: what the two ends of a connection agree on is AES itself, on whatever path.
    #[test]
    fn the_standard_example() {
        let key = 0x2b7e_1516_28ae_d2a6_abf7_1588_09cf_4f3c_u128.to_be_bytes();
        let input = 0x3243_f6a8_885a_308d_3131_98a2_e037_0734_u128.to_be_bytes();
        for isa in Isa::available() {
            let mut out = [0; 16];
            Key::on(isa, &key).keystream(&input, 0, &mut out);
            assert_eq!(u128::from_be_bytes(out), 0x3925_841d_02dc_09fb_dc11_8597_196a_0b32);
        }
    }
}
