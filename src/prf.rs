//! Pseudorandom streams shared by a pair of parties, taken once by address.
//!
//! Each pair of parties shares an AES-128 key per session. A stream is named by an [`Address`]; the name is mapped by a
//! keyed CBC-MAC (a PRF on the prefix-free encoding used here) to the whole 128-bit counter block at which an AES-CTR
//! stream starts. An address is given out ONCE: a second take is [`Error::Reuse`] in release builds too, because a mask
//! that is used twice shows its receiver the difference of two secrets (Araki et al., CCS 2016, §3;
//! `docs/protocols.md`, "Randomness").

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use aes::Aes128;
use aes::cipher::{Array, BlockCipherEncrypt, KeyInit};
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

use crate::error::{Error, Result};
use crate::party::Role;
use crate::ring::keystream::Key;

/// A pair of parties; the third one does not know its streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Pair {
    /// Owner and Client: what the Helper must not know (`x1`, `pick`, `B`).
    OwnerClient,
    /// Client and Helper: what the Owner must not know (every mask `r`, `rho`, pads).
    ClientHelper,
    /// Owner and Helper: what the Client must not know (the row mask of the embedding).
    OwnerHelper,
}

impl Pair {
    /// The pair of two parties, or `None` if they are the same.
    #[must_use]
    pub fn of(a: Role, b: Role) -> Option<Pair> {
        match (a, b) {
            (Role::Owner, Role::Client) | (Role::Client, Role::Owner) => Some(Pair::OwnerClient),
            (Role::Client, Role::Helper) | (Role::Helper, Role::Client) => Some(Pair::ClientHelper),
            (Role::Owner, Role::Helper) | (Role::Helper, Role::Owner) => Some(Pair::OwnerHelper),
            _ => None,
        }
    }

    /// Whether `role` is one of the two.
    #[must_use]
    pub fn has(self, role: Role) -> bool {
        match self {
            Pair::OwnerClient => role != Role::Helper,
            Pair::ClientHelper => role != Role::Owner,
            Pair::OwnerHelper => role != Role::Client,
        }
    }
}

/// Name of a stream or of a message: (pass, layer, operation, label). The session is part of the key.
///
/// The *pass* is a session-wide counter that only grows: a retry, a regeneration or a rejected draft gets a new one.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Address {
    /// Pass number.
    pub pass: u64,
    /// Layer, or [`Address::NO_LAYER`].
    pub layer: u32,
    /// Operation within the layer, e.g. `attn.scores`.
    pub path: String,
    /// Use within the operation, e.g. `product.rho`.
    pub label: &'static str,
}

impl Address {
    /// Stands for "not in a layer".
    pub const NO_LAYER: u32 = u32::MAX;

    /// Prefix-free encoding: fixed-width numbers, then length-prefixed strings.
    fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.pass.to_le_bytes());
        out.extend_from_slice(&self.layer.to_le_bytes());
        for text in [self.path.as_str(), self.label] {
            out.extend_from_slice(&(text.len() as u32).to_le_bytes());
            out.extend_from_slice(text.as_bytes());
        }
    }

    /// The 64-bit tag under which a message of this name travels. Public; only tells messages apart.
    #[must_use]
    pub fn tag(&self) -> u64 {
        let mut h = 0xcbf2_9ce4_8422_2325u64;
        let mut eat = |bytes: &[u8]| {
            for &b in bytes {
                h = (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3);
            }
        };
        eat(&self.pass.to_le_bytes());
        eat(&self.layer.to_le_bytes());
        eat(self.path.as_bytes());
        eat(&[0]);
        eat(self.label.as_bytes());
        // FNV's low bits are weak: finish with a mixer.
        h ^= h >> 32;
        h = h.wrapping_mul(0xd6e8_feb8_6659_fd93);
        h ^ (h >> 32)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pass {} ", self.pass)?;
        if self.layer != Address::NO_LAYER {
            write!(f, "layer {} ", self.layer)?;
        }
        write!(f, "{} {}", self.path, self.label)
    }
}

/// A pair's key for one session. Never printed, wiped when dropped.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct PairKey([u8; 16]);

impl PairKey {
    /// From 16 secret bytes (a TLS exporter's, or [`PairKey::fresh`]).
    #[must_use]
    pub fn new(bytes: [u8; 16]) -> Self {
        PairKey(bytes)
    }

    /// From the operating system's entropy.
    ///
    /// # Errors
    /// If the system has none to give.
    pub fn fresh() -> Result<Self> {
        let mut bytes = [0u8; 16];
        getrandom::fill(&mut bytes).map_err(|e| Error::Internal(format!("no system entropy: {e}")))?;
        Ok(PairKey(bytes))
    }

    fn derive(&self, purpose: u8) -> Aes128 {
        let mut block = Array::from([purpose; 16]);
        Aes128::new(&Array::from(self.0)).encrypt_block(&mut block);
        Aes128::new(&block)
    }

    fn derive_bytes(&self, purpose: u8) -> Zeroizing<[u8; 16]> {
        let mut block = Array::from([purpose; 16]);
        Aes128::new(&Array::from(self.0)).encrypt_block(&mut block);
        Zeroizing::new(block.into())
    }
}

impl fmt::Debug for PairKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PairKey(redacted)")
    }
}

/// A stream that was taken: by whom, of which pair, where it starts and under which name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Taken {
    /// The party that took it; the other of the pair takes the same one.
    pub holder: Role,
    /// Whose stream it is.
    pub pair: Pair,
    /// The counter block at which it starts.
    pub block: u128,
    /// Its name.
    pub address: Address,
}

/// Records every address taken, for the tests that look for a second use across sessions.
pub type AddressLog = Arc<Mutex<Vec<Taken>>>;

struct Keyed {
    pair: Pair,
    address_mac: Aes128,
    stream_key: Arc<Key>,
    /// Counter blocks taken, by pass; a closed pass is forgotten and refused as a whole.
    taken: BTreeMap<u64, HashSet<u128>>,
}

/// One party's two pairwise PRFs.
pub struct Prf {
    keys: Vec<Keyed>,
    closed_below: u64,
    log: Option<(AddressLog, Role)>,
}

impl fmt::Debug for Prf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Prf(redacted)")
    }
}

impl Prf {
    /// With the keys of the pairs that this party belongs to.
    #[must_use]
    pub fn new(keys: impl IntoIterator<Item = (Pair, PairKey)>) -> Self {
        let keys = keys
            .into_iter()
            .map(|(pair, key)| Keyed {
                pair,
                address_mac: key.derive(1),
                stream_key: Arc::new(Key::new(&key.derive_bytes(2))),
                taken: BTreeMap::new(),
            })
            .collect();
        Prf { keys, closed_below: 0, log: None }
    }

    /// Also records every address that `holder`, whose streams these are, takes (tests).
    #[must_use]
    pub fn with_log(mut self, log: AddressLog, holder: Role) -> Self {
        self.log = Some((log, holder));
        self
    }

    /// Takes the stream named `address`, once.
    ///
    /// # Errors
    /// [`Error::Reuse`] if it was taken before or its pass is closed; [`Error::Internal`] for a pair that this party is not in.
    pub fn take(&mut self, pair: Pair, address: &Address) -> Result<Stream> {
        if address.pass < self.closed_below {
            return Err(Error::Reuse(address.to_string()));
        }
        let keyed = self
            .keys
            .iter_mut()
            .find(|k| k.pair == pair)
            .ok_or_else(|| Error::Internal(format!("no key for {pair:?} at this party")))?;
        let mut name = Vec::with_capacity(64);
        address.encode(&mut name);
        let start = mac(&keyed.address_mac, &name);
        if !keyed.taken.entry(address.pass).or_default().insert(u128::from_le_bytes(start)) {
            return Err(Error::Reuse(address.to_string()));
        }
        if let Some((Ok(mut log), holder)) = self.log.as_ref().map(|(log, holder)| (log.lock(), *holder)) {
            let block = u128::from_le_bytes(start);
            log.push(Taken { holder, pair, block, address: address.clone() });
        }
        Ok(Stream { key: keyed.stream_key.clone(), start, at: 0 })
    }

    /// Forgets the addresses of passes below `pass` and refuses them from now on.
    pub fn close_below(&mut self, pass: u64) {
        self.closed_below = self.closed_below.max(pass);
        for keyed in &mut self.keys {
            keyed.taken = keyed.taken.split_off(&self.closed_below);
        }
    }
}

/// CBC-MAC with zero padding; a PRF because the input encoding is prefix-free.
fn mac(key: &Aes128, data: &[u8]) -> [u8; 16] {
    let mut state = Array::from([0u8; 16]);
    for chunk in data.chunks(16) {
        for (s, &b) in state.iter_mut().zip(chunk) {
            *s ^= b;
        }
        key.encrypt_block(&mut state);
    }
    state.into()
}

/// Bytes of a stream that a word of `k` bits takes: the least power of two that holds it, so that short words cost little of
/// the cipher.
#[must_use]
pub fn bytes_per_word(k: u32) -> usize {
    (k as usize).div_ceil(8).next_power_of_two()
}

/// A keystream, read front to back.
pub struct Stream {
    key: Arc<Key>,
    /// The first counter block.
    start: [u8; 16],
    /// Bytes that were read.
    at: u64,
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.start.zeroize();
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Stream(redacted)")
    }
}

impl Stream {
    fn read(&mut self, out: &mut [u8]) {
        self.key.keystream(&self.start, self.at, out);
        self.at += out.len() as u64;
    }

    /// Appends `n` words of `k` uniform bits, [`bytes_per_word`] of the stream each.
    pub fn words_into(&mut self, n: usize, k: u32, out: &mut Vec<u64>) {
        let m = crate::ring::mask(k);
        // Piece by piece, so that each is still in cache when it is reduced and moved to its place.
        let mut piece = [0u64; 512];
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut piece);
        let each = bytes_per_word(k);
        let mut left = n;
        out.reserve(n);
        while left > 0 {
            let now = left.min(bytes.len() / each);
            let bytes = &mut bytes[..now * each];
            self.read(bytes);
            match each {
                1 => out.extend(bytes.iter().map(|w| u64::from(*w) & m)),
                2 => out.extend(bytes.as_chunks().0.iter().map(|w| u64::from(u16::from_le_bytes(*w)) & m)),
                4 => out.extend(bytes.as_chunks().0.iter().map(|w| u64::from(u32::from_le_bytes(*w)) & m)),
                _ => out.extend(bytes.as_chunks().0.iter().map(|w| u64::from_le_bytes(*w) & m)),
            }
            left -= now;
        }
        piece.zeroize();
    }

    /// The words at these places of a stream of words of `k` bits alone, counted from its beginning, wherever it is.
    #[must_use]
    pub fn words_at(&self, words: Range<usize>, k: u32) -> Vec<u64> {
        let at = (words.start * bytes_per_word(k)) as u64;
        Stream { key: self.key.clone(), start: self.start, at }.words(words.len(), k)
    }

    /// `n` words of `k` uniform bits.
    #[must_use]
    pub fn words(&mut self, n: usize, k: u32) -> Vec<u64> {
        let mut out = Vec::with_capacity(n);
        self.words_into(n, k, &mut out);
        out
    }

    /// Appends `n` uniform bytes.
    pub fn bytes_into(&mut self, n: usize, out: &mut Vec<u8>) {
        let mut piece = [0; 4096];
        out.reserve(n);
        let end = out.len() + n;
        while out.len() < end {
            let piece = &mut piece[..(end - out.len()).min(4096)];
            self.read(piece);
            out.extend_from_slice(piece);
        }
        piece.zeroize();
    }
}

/// The matrix stream `B = PRF(Owner, Client; seed)` of a preparation: random access by word, the same for every session.
///
/// This is the one stream that is read more than once by design: `B` is not a mask of a message but one half of the
/// sharing `W = A + B` of a matrix, fixed for a preparation; each use is masked by fresh `rho` and `r_y`.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct PreparationSeed([u8; 32]);

impl fmt::Debug for PreparationSeed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PreparationSeed(redacted)")
    }
}

impl PreparationSeed {
    /// A new seed; one for each preparation, never one twice.
    ///
    /// # Errors
    /// If the operating system has no entropy to give.
    pub fn fresh() -> Result<Self> {
        let mut bytes = [0u8; 32];
        getrandom::fill(&mut bytes).map_err(|e| Error::Internal(format!("no system entropy: {e}")))?;
        Ok(PreparationSeed(bytes))
    }

    /// From 32 bytes received from the Owner, or fixed by a test.
    #[must_use]
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        PreparationSeed(bytes)
    }

    /// For the Owner to send to the Client.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; 32] {
        self.0
    }

    /// Matrix `id`'s stream.
    #[must_use]
    pub fn matrix(&self, id: u64) -> MatrixStream {
        let key = Zeroizing::new(std::array::from_fn(|i| self.0[i]));
        let name: [u8; 16] = std::array::from_fn(|i| self.0[16 + i]);
        let mut start = [0u8; 16];
        start[..8].copy_from_slice(&id.to_le_bytes());
        let start = mac(&Aes128::new(&Array::from(name)), &start);
        MatrixStream { key: Key::new(&key), start }
    }

    /// Words `from..from + out.len()` of matrix `id`'s stream, uniform in 64 bits.
    pub fn matrix_words(&self, id: u64, from: u64, out: &mut [u64]) {
        self.matrix(id).words(from, out);
    }
}

/// A matrix's stream of a [`PreparationSeed`], whose keys are made once.
pub struct MatrixStream {
    key: Key,
    start: [u8; 16],
}

impl MatrixStream {
    /// Words `from..from + out.len()`, uniform in 64 bits.
    pub fn words(&self, from: u64, out: &mut [u64]) {
        self.key.keystream(&self.start, from * 8, bytemuck::cast_slice_mut(out));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(pass: u64, label: &'static str) -> Address {
        Address { pass, layer: 3, path: "attn.scores".into(), label }
    }

    fn prf() -> Prf {
        Prf::new([(Pair::OwnerClient, PairKey::new([7; 16]))])
    }

    #[test]
    fn parts_of_a_stream_are_those_of_the_whole() {
        let stream = || Stream { key: Arc::new(Key::new(&[7; 16])), start: [9; 16], at: 0 };
        for k in [1, 8, 13, 32, 44, 64] {
            let whole = stream().words(3000, k);
            for part in [0..3000, 0..0, 1..2, 7..1031, 2999..3000] {
                assert_eq!(stream().words_at(part.clone(), k), whole[part], "k = {k}");
            }
        }
    }

    #[test]
    fn a_second_take_is_refused_and_a_closed_pass_too() {
        let mut p = prf();
        p.take(Pair::OwnerClient, &address(1, "product.x1")).unwrap();
        assert!(matches!(p.take(Pair::OwnerClient, &address(1, "product.x1")), Err(Error::Reuse(_))));
        p.take(Pair::OwnerClient, &address(1, "product.y1")).unwrap();
        p.close_below(2);
        assert!(matches!(p.take(Pair::OwnerClient, &address(1, "product.z")), Err(Error::Reuse(_))));
        p.take(Pair::OwnerClient, &address(2, "product.x1")).unwrap();
        assert!(p.take(Pair::ClientHelper, &address(2, "product.x1")).is_err());
    }

    #[test]
    fn both_ends_of_a_pair_read_the_same_stream() {
        let a = prf().take(Pair::OwnerClient, &address(1, "x")).unwrap().words(100, 44);
        let b = prf().take(Pair::OwnerClient, &address(1, "x")).unwrap().words(100, 44);
        let c = prf().take(Pair::OwnerClient, &address(1, "y")).unwrap().words(100, 44);
        assert_eq!(a, b);
        assert_ne!(a, c);
        assert!(a.iter().all(|w| w >> 44 == 0));
    }

    #[test]
    fn matrix_words_are_random_access() {
        let seed = PreparationSeed::from_bytes([9; 32]);
        let mut all = vec![0; 100];
        seed.matrix_words(5, 0, &mut all);
        let mut tail = vec![0; 33];
        seed.matrix_words(5, 67, &mut tail);
        assert_eq!(&all[67..], &tail[..]);
    }
}
