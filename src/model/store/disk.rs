//! Writing so that a killed process leaves nothing half valid: new files with their mode from the start, synced, and
//! directories that appear under their name only when complete.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

use crate::error::{Error, Result};

/// Only the owner of the file.
pub(super) const PRIVATE: u32 = 0o600;
/// Everybody may read.
pub(super) const PUBLIC: u32 = 0o644;

/// An I/O error on `path`, with what to do where that is known.
pub(super) fn failed(path: &Path, e: std::io::Error) -> Error {
    let name = path.display();
    match e.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => {
            Error::io(format!("{name} (free some space on this disk and start again)"), e)
        }
        ErrorKind::PermissionDenied => Error::io(format!("{name} (check who owns it and its permissions)"), e),
        ErrorKind::NotFound => Error::io(format!("{name} (restore it, or prepare the model anew: trefoil prepare)"), e),
        _ => Error::io(name.to_string(), e),
    }
}

/// A new file that only we may read (or everybody); one that exists is refused.
pub(super) fn create(path: &Path, mode: u32) -> Result<File> {
    OpenOptions::new().write(true).create_new(true).mode(mode).open(path).map_err(|e| failed(path, e))
}

/// A new file with these bytes, synced.
pub(super) fn write(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    let mut file = create(path, mode)?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(|e| failed(path, e))
}

/// A file of exactly `want` bytes; anything else is `wrong`, before anything is allocated.
pub(super) fn read_exact(path: &Path, want: u64, wrong: impl Fn(u64) -> Error) -> Result<Vec<u8>> {
    let mut file = File::open(path).map_err(|e| failed(path, e))?;
    let meta = file.metadata().map_err(|e| failed(path, e))?;
    if !meta.is_file() {
        return Err(failed(path, std::io::Error::other("not a regular file")));
    }
    let have = meta.len();
    if have != want {
        return Err(wrong(have));
    }
    let mut bytes = vec![0; usize::try_from(want).map_err(|_| wrong(have))?];
    file.read_exact(&mut bytes).map_err(|e| failed(path, e))?;
    Ok(bytes)
}

/// Makes a rename or a new file within `dir` last.
pub(super) fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|d| d.sync_all()).map_err(|e| failed(dir, e))
}

/// A new directory; `parents` too if they are missing.
pub(super) fn create_dir(path: &Path, mode: u32, parents: bool) -> Result<()> {
    DirBuilder::new().mode(mode).recursive(parents).create(path).map_err(|e| failed(path, e))
}

/// SHA-256 of `bytes`.
pub(super) fn sha256(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

/// A directory in the making, beside the one that it becomes. Removed when dropped before that.
pub(super) struct Staging {
    path: PathBuf,
    target: PathBuf,
    published: bool,
}

impl Staging {
    /// For `target`, which does not exist.
    pub(super) fn new(target: &Path, name: &str) -> Result<Self> {
        let wrong = || Error::Config(format!("--out {}: not the name of a directory to make", target.display()));
        let file = target.file_name().ok_or_else(wrong)?.to_string_lossy().into_owned();
        let parent = parent(target);
        if !parent.is_dir() {
            return Err(Error::Config(format!("--out {}: make the directory above it first", target.display())));
        }
        let path = parent.join(format!(".{file}.partial-{name}"));
        create_dir(&path, 0o700, false)?;
        Ok(Staging { path, target: target.to_path_buf(), published: false })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Under its own name from here on, all at once.
    pub(super) fn publish(mut self) -> Result<()> {
        sync_dir(&self.path)?;
        std::fs::rename(&self.path, &self.target).map_err(|e| failed(&self.target, e))?;
        self.published = true;
        sync_dir(parent(&self.target))
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if !self.published {
            // What made the preparation fail is the error to show; what this one would add is a directory left over.
            let _ = std::fs::remove_dir_all(&self.path);
        }
    }
}

fn parent(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}
