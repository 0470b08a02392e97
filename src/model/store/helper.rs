//! The Helper's store: the halves that it holds, and one that is coming in.
//!
//! `STORE/<id>/half.part` grows chunk by chunk and becomes `half.bin` when every chunk is there; whoever is killed in
//! between finds the verified beginning again.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rayon::prelude::*;

use super::disk;
use super::manifest::{PreparationId, PublicManifest};
use crate::error::{Error, PeerFault, Result};
use crate::model::mmap::MappedFile;
use crate::model::prepare::Prepared;
use crate::model::sections::HalfLayout;
use crate::model::secure::SecureModel;
use crate::party::Role;
use crate::ring::{Bytes, Packed};

const MANIFEST: &str = "manifest.json";
const HASHES: &str = "half.sha256";
const HALF: &str = "half.bin";
const PART: &str = "half.part";
const LOCK: &str = "lock";

/// The preparations that this Helper has received.
#[derive(Clone, Debug)]
pub struct HelperStore {
    dir: PathBuf,
    /// The most memory that a model's half may take once it is loaded.
    limit: u64,
}

impl HelperStore {
    /// Opens the store in `dir`, or makes one.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn open(dir: &Path) -> Result<HelperStore> {
        if !dir.is_dir() {
            disk::create_dir(dir, 0o700, true)?;
        }
        Ok(HelperStore { dir: dir.to_path_buf(), limit: u64::MAX })
    }

    /// Refuses preparations whose half takes more memory than this once loaded.
    #[must_use]
    pub fn with_limit(self, bytes: u64) -> Self {
        HelperStore { limit: bytes, ..self }
    }

    /// The complete preparations, by name.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn ids(&self) -> Result<Vec<PreparationId>> {
        let fail = |e| disk::failed(&self.dir, e);
        let mut ids = Vec::new();
        for entry in std::fs::read_dir(&self.dir).map_err(fail)? {
            let name = entry.map_err(fail)?.file_name();
            // Anything else in there is not ours.
            let Some(id) = name.to_str().and_then(|n| n.parse().ok()) else { continue };
            if self.has(&id) {
                ids.push(id);
            }
        }
        ids.sort_unstable();
        Ok(ids)
    }

    /// The complete preparation that came last, if there is one.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn newest(&self) -> Result<Option<PreparationId>> {
        let age = |id: &PreparationId| std::fs::metadata(self.at(id).join(HALF)).and_then(|m| m.modified()).ok();
        Ok(self.ids()?.into_iter().max_by_key(age))
    }

    /// The hashes of a complete preparation's half, 32 bytes per chunk.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn hashes(&self, id: &PreparationId) -> Result<Vec<u8>> {
        let path = self.at(id).join(HASHES);
        std::fs::read(&path).map_err(|e| disk::failed(&path, e))
    }

    /// Whether a preparation is here and complete.
    #[must_use]
    pub fn has(&self, id: &PreparationId) -> bool {
        self.at(id).join(HALF).is_file()
    }

    fn at(&self, id: &PreparationId) -> PathBuf {
        self.dir.join(id.to_string())
    }

    fn admit(&self, manifest: &PublicManifest, layout: &HalfLayout) -> Result<()> {
        let want = layout.loaded_bytes();
        if want > self.limit {
            return Err(Error::Config(format!(
                "preparation {}: its half takes {want} bytes of memory, [limits] memory_gb leaves {}; raise it, or serve this model on a larger machine",
                manifest.id, self.limit
            )));
        }
        Ok(())
    }

    /// Begins to receive a preparation, or goes on where an earlier transfer ended. `hashes` are 32 bytes per chunk.
    ///
    /// # Errors
    /// [`Error::Peer`] for a manifest that cannot be right, [`Error::Config`] for one that is complete, coming in already
    /// or too large, [`Error::Io`].
    pub fn incoming(&self, manifest: &PublicManifest, hashes: &[u8]) -> Result<Incoming> {
        // Not only parsed by somebody: everything below is sized by it.
        let json = manifest.to_json()?;
        PublicManifest::parse(&json, "the owner's manifest")?;
        let layout = manifest.layout(&manifest.model_config()?)?;
        let want = layout.chunks().saturating_mul(32);
        if hashes.len() as u64 != want {
            return Err(fault(PeerFault::Length { want: want as usize, got: hashes.len() }));
        }
        self.admit(manifest, &layout)?;
        let dir = self.at(&manifest.id);
        if !dir.is_dir() {
            disk::create_dir(&dir, 0o700, false)?;
        }
        let lock = lock(&dir, &manifest.id)?;
        if self.has(&manifest.id) {
            return Err(Error::Config(format!("preparation {} is complete here already", manifest.id)));
        }
        // Another manifest or other hashes under this name: what came so far is worth nothing.
        let same = |name: &str, bytes: &[u8]| std::fs::read(dir.join(name)).is_ok_and(|have| have == bytes);
        if !same(MANIFEST, &json) || !same(HASHES, hashes) {
            for name in [PART, HASHES, MANIFEST] {
                remove_file(&dir.join(name))?;
            }
            disk::write(&dir.join(HASHES), hashes, disk::PRIVATE)?;
            disk::write(&dir.join(MANIFEST), &json, disk::PRIVATE)?;
        }
        let path = dir.join(PART);
        let open =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(disk::PRIVATE).open(&path);
        let file = open.map_err(|e| disk::failed(&path, e))?;
        let mut incoming = Incoming { dir, path, file, layout, hashes: hashes.to_vec(), next: 0, end: 0, _lock: lock };
        incoming.resume()?;
        Ok(incoming)
    }

    /// A complete preparation: its manifest and the Helper's part. Every chunk is verified again.
    ///
    /// # Errors
    /// [`Error::Model`] naming the file that is missing or damaged, [`Error::Config`] if it is too large, [`Error::Io`].
    pub fn load(&self, id: &PreparationId) -> Result<(PublicManifest, SecureModel)> {
        let dir = self.at(id);
        let wrong = |path: &Path, text: &str| {
            let remedy = "remove this preparation here and have the owner send it again";
            Error::Model(format!("{}: {text}; {remedy}", path.display()))
        };
        if !self.has(id) {
            return Err(Error::Model(format!(
                "{}: preparation {id} is not here, or not complete; start the owner, who sends it",
                self.dir.display()
            )));
        }
        let manifest = PublicManifest::read(&dir.join(MANIFEST))?;
        if manifest.id != *id {
            return Err(wrong(&dir.join(MANIFEST), &format!("belongs to preparation {}", manifest.id)));
        }
        let config = manifest.model_config()?;
        let layout = manifest.layout(&config)?;
        self.admit(&manifest, &layout)?;
        let hash_path = dir.join(HASHES);
        let hashes = disk::read_exact(&hash_path, 32 * layout.chunks(), |_| wrong(&hash_path, "has the wrong length"))?;
        let path = dir.join(HALF);
        let half = MappedFile::open(&path)?;
        if half.len() as u64 != layout.bytes() {
            return Err(wrong(&path, &format!("has {} bytes where {} belong", half.len(), layout.bytes())));
        }
        if let Some(index) = damaged(&half, &layout, &hashes) {
            return Err(wrong(&path, &format!("is damaged in chunk {index}")));
        }
        // The weights stay in the file: the system keeps what it has room for, and reads the rest again.
        let half: Bytes = Arc::new(half);
        let mut index = 0;
        let parts = Prepared::helper_packed(&config, &manifest.plan, &mut |s| {
            let (at, piece) = layout.section(index).ok_or_else(|| Error::Internal(format!("section {index}")))?;
            index += 1;
            Packed::from_bytes(Arc::clone(&half), at, s.rows * s.cols, piece, s.bits())
                .ok_or_else(|| wrong(&path, "is too short"))
        })?;
        let model = SecureModel::new(config, manifest.plan.clone(), parts);
        Ok((manifest, model))
    }

    /// Removes a preparation, complete or not.
    ///
    /// # Errors
    /// [`Error::Config`] while it is coming in, [`Error::Io`].
    pub fn remove(&self, id: &PreparationId) -> Result<()> {
        let dir = self.at(id);
        if !dir.is_dir() {
            return Ok(());
        }
        let _lock = lock(&dir, id)?;
        // The half first: from then on it does not count as complete.
        for name in [HALF, PART, HASHES, MANIFEST, LOCK] {
            remove_file(&dir.join(name))?;
        }
        std::fs::remove_dir(&dir).map_err(|e| disk::failed(&dir, e))
    }
}

/// A preparation that is coming in. While it lives, nobody else can write to it.
#[derive(Debug)]
pub struct Incoming {
    dir: PathBuf,
    path: PathBuf,
    file: File,
    layout: HalfLayout,
    hashes: Vec<u8>,
    next: u64,
    /// Length of the verified beginning.
    end: u64,
    /// The system frees it when this process ends, however it ends.
    _lock: File,
}

impl Incoming {
    /// The chunk to send next: as many as are here and verified.
    #[must_use]
    pub fn next_chunk(&self) -> u64 {
        self.next
    }

    /// How many there are.
    #[must_use]
    pub fn chunk_count(&self) -> u64 {
        self.layout.chunks()
    }

    /// Bytes here and in all, for a progress bar.
    #[must_use]
    pub fn progress(&self) -> (u64, u64) {
        (self.end, self.layout.bytes())
    }

    /// Exact length of chunk `index`.
    #[must_use]
    pub fn chunk_bytes(&self, index: u64) -> Option<usize> {
        self.layout.chunk(index).map(|c| c.bytes)
    }

    /// Adds chunk `index`, which must be the next one.
    ///
    /// # Errors
    /// [`Error::Peer`] for a chunk that is not the announced one (nothing is kept of it, the right one may follow);
    /// [`Error::Io`], also when the disk is full (what was received before is kept).
    pub fn put(&mut self, index: u64, bytes: &[u8]) -> Result<()> {
        let chunk = self.layout.chunk(index).filter(|_| index == self.next);
        let want = chunk.ok_or_else(|| fault(PeerFault::Malformed("a chunk out of order")))?.bytes;
        if bytes.len() != want {
            return Err(fault(PeerFault::Length { want, got: bytes.len() }));
        }
        if !is(&self.hashes, index, bytes) {
            return Err(fault(PeerFault::Malformed("a chunk that is not the announced one")));
        }
        if let Err(e) = self.file.write_all(bytes) {
            // Half a chunk is not kept; should that fail too, the next start finds and drops it.
            let _ = self.cut();
            return Err(disk::failed(&self.path, e));
        }
        self.next += 1;
        self.end += bytes.len() as u64;
        Ok(())
    }

    /// All chunks are here: makes the preparation complete.
    ///
    /// # Errors
    /// [`Error::Peer`] if some are missing, [`Error::Io`].
    pub fn finish(self) -> Result<()> {
        if self.next != self.layout.chunks() {
            return Err(fault(PeerFault::Malformed("fewer chunks than announced")));
        }
        self.file.sync_all().map_err(|e| disk::failed(&self.path, e))?;
        let half = self.dir.join(HALF);
        std::fs::rename(&self.path, &half).map_err(|e| disk::failed(&half, e))?;
        disk::sync_dir(&self.dir)?;
        self.dir.parent().map_or(Ok(()), disk::sync_dir)
    }

    /// Verifies what is on disk; cuts off what is not whole and right.
    fn resume(&mut self) -> Result<()> {
        let have = self.file.metadata().map_err(|e| disk::failed(&self.path, e))?.len();
        let mut bytes = Vec::new();
        while let Some(chunk) = self.layout.chunk(self.next) {
            if self.end + chunk.bytes as u64 > have {
                break;
            }
            bytes.resize(chunk.bytes, 0);
            self.file.read_exact(&mut bytes).map_err(|e| disk::failed(&self.path, e))?;
            if !is(&self.hashes, self.next, &bytes) {
                break;
            }
            self.next += 1;
            self.end += chunk.bytes as u64;
        }
        self.cut()
    }

    fn cut(&mut self) -> Result<()> {
        let end = self.end;
        let cut = self.file.set_len(end).and_then(|()| self.file.seek(SeekFrom::Start(end)));
        cut.map(|_| ()).map_err(|e| disk::failed(&self.path, e))
    }
}

/// Every chunk against its hash, on the pool: the first that is not the announced one.
fn damaged(half: &[u8], layout: &HalfLayout, hashes: &[u8]) -> Option<u64> {
    let right = |index: u64| {
        let chunk = layout.chunk(index)?;
        let bytes = half.get(usize::try_from(chunk.offset).ok()?..)?.get(..chunk.bytes)?;
        is(hashes, index, bytes).then_some(())
    };
    (0..layout.chunks()).into_par_iter().find_first(|index| right(*index).is_none())
}

fn is(hashes: &[u8], index: u64, bytes: &[u8]) -> bool {
    let at = usize::try_from(index).ok().and_then(|i| hashes.as_chunks::<32>().0.get(i));
    at.is_some_and(|want| *want == disk::sha256(bytes))
}

fn fault(kind: PeerFault) -> Error {
    Error::Peer { role: Role::Owner, step: "preparation".into(), kind }
}

/// Held by whoever writes to a preparation.
fn lock(dir: &Path, id: &PreparationId) -> Result<File> {
    let path = dir.join(LOCK);
    let open = OpenOptions::new().write(true).create(true).truncate(false).mode(disk::PRIVATE).open(&path);
    let file = open.map_err(|e| disk::failed(&path, e))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(Error::Config(format!(
            "preparation {id} is coming in already; wait for that transfer to end, or to time out"
        ))),
        Err(TryLockError::Error(e)) => Err(disk::failed(&path, e)),
    }
}

fn remove_file(path: &Path) -> Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(disk::failed(path, e)),
        _ => Ok(()),
    }
}
