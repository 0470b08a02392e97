//! `owner.bin`: the Owner's integers, as narrow as they are.
//!
//! Magic, id, a check value of the seed; then per matrix one byte of width, the integers, one byte whether there are
//! biases, the biases; for a private embedding one byte of width and the table's integers. Last a SHA-256 of all of it.
//! Little-endian. The lengths follow from the manifest, so the file says none.

use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use sha2::{Digest as _, Sha256};

use super::disk;
use super::manifest::PreparationId;
use crate::error::{Error, Result};
use crate::model::ModelConfig;
use crate::model::prepare::Prepared;
use crate::model::sections::{HalfLayout, Section};
use crate::plan::{F, Plan};
use crate::prf::PreparationSeed;
use crate::protocol::embedding::TableShare;
use crate::protocol::linear::{OwnerMatrix, Plain};
use crate::ring::{self, Packed, try_filled};

const MAGIC: &[u8; 8] = b"TREFOWN1";
const REMEDY: &str = "restore it from a backup, or prepare the model anew (trefoil prepare)";
/// Elements of the embedding that are handled at once.
const BLOCK: usize = 1 << 16;

/// Ties `owner.bin` and `seed` together: a preparation with another's seed would give nonsense, and no error.
fn seed_check(id: &PreparationId, seed: &PreparationSeed) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update(b"trefoil seed check 1");
    hash.update(id.bytes());
    hash.update(seed.to_bytes());
    hash.finalize().into()
}

struct Writer<'a> {
    file: BufWriter<File>,
    hash: Sha256,
    path: &'a Path,
}

impl Writer<'_> {
    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.hash.update(bytes);
        self.file.write_all(bytes).map_err(|e| disk::failed(self.path, e))
    }

    fn integers(&mut self, w: &Plain) -> Result<()> {
        fn put<T: Copy, const N: usize>(out: &mut Writer<'_>, w: &[T], bytes: impl Fn(T) -> [u8; N]) -> Result<()> {
            out.put(&[N as u8])?;
            w.chunks(BLOCK).try_for_each(|b| out.put(&bytes_of(b.iter().map(|v| bytes(*v)))))
        }
        match w {
            Plain::I8(w) => put(self, w, i8::to_le_bytes),
            Plain::I16(w) => put(self, w, i16::to_le_bytes),
            Plain::I32(w) => put(self, w, i32::to_le_bytes),
        }
    }
}

fn bytes_of<const N: usize>(values: impl Iterator<Item = [u8; N]>) -> Vec<u8> {
    values.flatten().collect()
}

/// Writes the file.
pub(super) fn write(
    path: &Path,
    id: &PreparationId,
    seed: &PreparationSeed,
    parts: &Prepared,
    layout: &HalfLayout,
) -> Result<()> {
    let file = disk::create(path, disk::PRIVATE)?;
    let mut out = Writer { file: BufWriter::with_capacity(1 << 20, file), hash: Sha256::new(), path };
    out.put(MAGIC)?;
    out.put(id.bytes())?;
    out.put(&seed_check(id, seed))?;
    for m in parts.matrices() {
        let (w, bias) = m.integers().ok_or_else(|| Error::Internal("only the owner has integers".into()))?;
        out.integers(w)?;
        out.put(&[u8::from(bias.is_some())])?;
        if let Some(bias) = bias {
            out.put(&bytes_of(bias.iter().map(|b| b.to_le_bytes())))?;
        }
    }
    if let (Some(table), Some(section)) = (&parts.embedding, layout.sections().last()) {
        write_table(&mut out, table, section, seed)?;
    }
    let hash: [u8; 32] = out.hash.clone().finalize().into();
    out.put(&hash)?;
    out.file.flush().and_then(|()| out.file.get_ref().sync_all()).map_err(|e| disk::failed(path, e))
}

/// The table itself, `E = A + B`, in 2, 4 or 8 bytes an element.
fn write_table(out: &mut Writer<'_>, table: &TableShare, s: &Section, seed: &PreparationSeed) -> Result<()> {
    let n = s.rows * s.cols;
    let each = |put: &mut dyn FnMut(&[i64]) -> Result<()>| -> Result<()> {
        for from in (0..n).step_by(BLOCK) {
            let range = from..n.min(from + BLOCK);
            let a = table.words(range.clone()).ok_or_else(|| Error::Internal("only the owner has the table".into()))?;
            let mut e = vec![0u64; range.len()];
            seed.matrix_words(s.id(), from as u64, &mut e);
            let e: Vec<i64> = e.iter().zip(a).map(|(b, a)| ring::signed(a.wrapping_add(*b), s.ring)).collect();
            put(&e)?;
        }
        Ok(())
    };
    let (mut low, mut high) = (0, 0);
    each(&mut |e| {
        e.iter().for_each(|&v| (low, high) = (low.min(v), high.max(v)));
        Ok(())
    })?;
    let fits = |least: i64, most: i64| low >= least && high <= most;
    let width: u8 = if fits(i16::MIN.into(), i16::MAX.into()) {
        2
    } else if fits(i32::MIN.into(), i32::MAX.into()) {
        4
    } else {
        8
    };
    out.put(&[width])?;
    each(&mut |e| {
        let mut bytes = Vec::with_capacity(e.len() * usize::from(width));
        e.iter().for_each(|v| bytes.extend_from_slice(&v.to_le_bytes()[..usize::from(width)]));
        out.put(&bytes)
    })
}

struct Reader {
    file: BufReader<File>,
    hash: Sha256,
    left: u64,
    path: PathBuf,
}

impl Reader {
    fn wrong(&self, text: &str) -> Error {
        Error::Model(format!("{}: {text}; {REMEDY}", self.path.display()))
    }

    /// Before anything of this size is allocated.
    fn has(&mut self, n: usize, width: usize) -> Result<()> {
        let want = (n as u64).checked_mul(width as u64).filter(|&want| want <= self.left);
        self.left -= want.ok_or_else(|| self.wrong("is truncated, or of another model than manifest.json"))?;
        Ok(())
    }

    fn take(&mut self, out: &mut [u8]) -> Result<()> {
        self.file.read_exact(out).map_err(|e| disk::failed(&self.path, e))?;
        self.hash.update(out);
        Ok(())
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.has(1, N)?;
        self.take(&mut bytes)?;
        Ok(bytes)
    }

    /// `n` elements of `N` bytes each.
    fn elements<const N: usize, T: Copy + Default>(&mut self, n: usize, of: impl Fn([u8; N]) -> T) -> Result<Arc<[T]>> {
        self.has(n, N)?;
        try_filled(n, |out| {
            let mut bytes = vec![0; N * n.min(BLOCK)];
            for out in out.chunks_mut(BLOCK) {
                let block = &mut bytes[..N * out.len()];
                self.take(block)?;
                out.iter_mut().zip(block.as_chunks::<N>().0).for_each(|(out, b)| *out = of(*b));
            }
            Ok(())
        })
    }

    fn matrix(&mut self, s: &Section) -> Result<OwnerMatrix> {
        let n = s.rows * s.cols;
        let w = match self.array::<1>()? {
            [1] => Plain::I8(self.elements(n, i8::from_le_bytes)?),
            [2] => Plain::I16(self.elements(n, i16::from_le_bytes)?),
            [4] => Plain::I32(self.elements(n, i32::from_le_bytes)?),
            _ => return Err(self.wrong(&format!("is corrupt at {}", s.name()))),
        };
        let bias: Option<Arc<[f32]>> = match self.array::<1>()? {
            [0] => None,
            [1] => Some(self.elements(s.rows, f32::from_le_bytes)?),
            _ => return Err(self.wrong(&format!("is corrupt at {}", s.name()))),
        };
        let m = OwnerMatrix::owner(s.id(), (s.rows, s.cols), s.f, w, bias)?;
        Ok(if s.public { m.into_public() } else { m })
    }

    /// Of the table no more is there unpacked than a block.
    fn table(&mut self, s: &Section, seed: &PreparationSeed) -> Result<TableShare> {
        let n = s.rows * s.cols;
        let [width] = self.array::<1>()?;
        if !matches!(width, 2 | 4 | 8) {
            return Err(self.wrong(&format!("is corrupt at {}", s.name())));
        }
        let width = usize::from(width);
        self.has(n, width)?;
        let a = Packed::made(n, s.ring, |range| {
            let mut bytes = vec![0; width * range.len()];
            self.take(&mut bytes)?;
            let mut a = vec![0; range.len()];
            seed.matrix_words(s.id(), range.start as u64, &mut a);
            for (a, e) in a.iter_mut().zip(bytes.chunks_exact(width)) {
                let mut word = [0; 8];
                word[..width].copy_from_slice(e);
                // Signed, of so many bytes: only the ring's own bits count.
                let e = ring::signed(u64::from_le_bytes(word), 8 * width as u32) as u64;
                *a = e.wrapping_sub(*a);
            }
            Ok::<_, Error>(a)
        })?;
        TableShare::packed((s.rows, s.cols), F, a)
    }
}

/// Reads the file back.
pub(super) fn read(
    path: &Path,
    id: &PreparationId,
    seed: &PreparationSeed,
    config: &ModelConfig,
    plan: &Plan,
) -> Result<Prepared> {
    let file = File::open(path).map_err(|e| disk::failed(path, e))?;
    let left = file.metadata().map_err(|e| disk::failed(path, e))?.len();
    let file = BufReader::with_capacity(1 << 20, file);
    let r = std::cell::RefCell::new(Reader { file, hash: Sha256::new(), left, path: path.to_path_buf() });
    {
        let mut r = r.borrow_mut();
        if &r.array::<8>()? != MAGIC {
            return Err(r.wrong("is no such file of this release"));
        }
        if &r.array::<16>()? != id.bytes() {
            return Err(r.wrong("belongs to another preparation than manifest.json"));
        }
        if r.array::<32>()? != seed_check(id, seed) {
            return Err(r.wrong("does not go with the file `seed`"));
        }
    }
    let parts =
        Prepared::assemble(config, plan, &mut |s| r.borrow_mut().matrix(s), &mut |s| r.borrow_mut().table(s, seed))?;
    let mut r = r.into_inner();
    let want: [u8; 32] = r.hash.clone().finalize().into();
    if r.array::<32>()? != want || r.left != 0 {
        return Err(r.wrong("is corrupt: its checksum is not that of its contents"));
    }
    Ok(parts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::sections::Slot;

    fn section(slot: Slot, ring: u32) -> Section {
        Section { layer: 0, slot, rows: 7, cols: 13, f: 15, ring, public: false }
    }

    /// What `read` makes of what `write` wrote.
    fn back<T>(
        write: impl FnOnce(&mut Writer<'_>) -> Result<()>,
        read: impl FnOnce(&mut Reader) -> Result<T>,
    ) -> (u64, T) {
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path();
        let mut out = Writer { file: BufWriter::new(File::create(path).unwrap()), hash: Sha256::new(), path };
        write(&mut out).unwrap();
        out.file.flush().unwrap();
        let left = std::fs::metadata(path).unwrap().len();
        let file = BufReader::new(File::open(path).unwrap());
        let mut r = Reader { file, hash: Sha256::new(), left, path: path.to_path_buf() };
        let got = read(&mut r).unwrap();
        assert_eq!(r.left, 0);
        (left, got)
    }

    #[test]
    fn integers_of_every_width_come_back() {
        let (s, seed) = (section(Slot::O, 48), PreparationSeed::from_bytes([4; 32]));
        for (most, bytes) in [(1i64 << 7, 1), (1 << 15, 2), (1 << 31, 4)] {
            // The ends of the width, and what lies between.
            let w = |i: usize| [-most, most - 1, 0, -1][i % 4] / (1 + i as i64 / 4);
            let w: Vec<f32> = (0..7 * 13).map(|i| w(i) as f32 * (-(s.f as f32)).exp2()).collect();
            // An f32 has 24 bits: the upper end of 32 rounds to what does not fit.
            let w: Vec<f32> =
                w.into_iter().map(|v| v.min((most - 1).min((1 << 31) - 128) as f32 * (-(s.f as f32)).exp2())).collect();
            let w = ndarray::Array2::from_shape_vec((7, 13), w).unwrap();
            let made = OwnerMatrix::quantise(s.id(), "w", w.view(), None, s.f).unwrap();
            assert_eq!(made.bytes(), 7 * 13 * bytes);
            let put = |out: &mut Writer<'_>| {
                out.integers(made.integers().unwrap().0)?;
                out.put(&[0])
            };
            let (len, got) = back(put, |r| r.matrix(&s));
            assert_eq!((len as usize, got.bytes()), (2 + 7 * 13 * bytes, made.bytes()));
            assert_eq!(got.helper_words(&seed).unwrap(), made.helper_words(&seed).unwrap());
        }
    }

    #[test]
    fn a_table_comes_back_in_the_ring_of_its_rows() {
        let seed = PreparationSeed::from_bytes([4; 32]);
        for (ring, most, bytes) in [(40, 1i64 << 15, 2), (40, 1 << 31, 4), (44, 1 << 40, 8), (64, 1 << 62, 8)] {
            let s = section(Slot::Embedding, ring);
            let mut a = vec![0u64; 7 * 13];
            seed.matrix_words(s.id(), 0, &mut a);
            let e = |i: usize| [-most, most - 1, 0, -1][i % 4] / (1 + i as i64 / 4);
            a.iter_mut().enumerate().for_each(|(i, a)| *a = (e(i) as u64).wrapping_sub(*a));
            let made = TableShare::packed((7, 13), F, Packed::new(&a, ring)).unwrap();
            let (len, got) = back(|out| write_table(out, &made, &s, &seed), |r| r.table(&s, &seed));
            assert_eq!(len, 1 + 7 * 13 * bytes);
            assert_eq!(got.words(0..7 * 13), made.words(0..7 * 13));
        }
    }
}
