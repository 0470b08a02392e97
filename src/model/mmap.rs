//! The one place with `unsafe`: mapping a weight file into memory, so that a checkpoint larger than the memory that is
//! free can be read tensor by tensor, and the Helper's half of a model used without a copy.

use std::fs::File;
use std::ops::Deref;
use std::path::Path;

use crate::error::{Error, Result};

/// A file mapped read-only; dereferences to its bytes.
#[derive(Debug)]
pub(super) struct MappedFile(memmap2::Mmap);

impl MappedFile {
    /// Maps the regular file at `path`.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be opened or mapped, [`Error::Model`] when it is no regular file.
    #[allow(unsafe_code)]
    pub(super) fn open(path: &Path) -> Result<Self> {
        let fail = |e| Error::io(path.display().to_string(), e);
        // Asked before the opening, which would wait for ever on a pipe.
        if !std::fs::metadata(path).map_err(fail)?.is_file() {
            return Err(Error::Model(format!(
                "{}: not a regular file; a weight file must be one (or a link to one)",
                path.display()
            )));
        }
        let file = File::open(path).map_err(fail)?;
        // SAFETY: the map is private to this struct and read-only, and the bytes are only ever read as plain bytes, of
        // which every pattern is valid. What is left is another process that changes the file meanwhile; the
        // documentation asks that a model directory and a half in use stay untouched, as every mapping loader must. Our own
        // store never writes to a complete half: it renames one into place and unlinks it.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(fail)?;
        Ok(MappedFile(map))
    }
}

impl AsRef<[u8]> for MappedFile {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}
