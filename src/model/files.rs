//! Reading the small files of a model directory, and text for calibration: bounded in size, with errors that name the file. A model directory
//! comes from somebody else, so no file in it may make us read without end.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use crate::error::{Error, Result};

/// Reads a regular file of at most `limit` bytes; `Ok(None)` where there is none.
pub(crate) fn read_optional(path: &Path, limit: u64) -> Result<Option<Vec<u8>>> {
    let name = path.display();
    let meta = match std::fs::metadata(path) {
        Ok(meta) => meta,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::io(name.to_string(), e)),
    };
    // A pipe or a device under this name would block us or never end.
    if !meta.is_file() {
        return Err(Error::Model(format!("{name}: not a regular file; give a plain file (or a link to one)")));
    }
    let too_long = || {
        Error::Model(format!(
            "{name}: longer than {limit} bytes, which no real file of this kind is; check what was put there"
        ))
    };
    if meta.len() > limit {
        return Err(too_long());
    }
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(|e| Error::io(name.to_string(), e))?;
    file.take(limit + 1).read_to_end(&mut bytes).map_err(|e| Error::io(name.to_string(), e))?;
    if bytes.len() as u64 > limit {
        return Err(too_long());
    }
    Ok(Some(bytes))
}

/// Reads a file that has to be there; `remedy` ends the error when it is not.
pub(crate) fn read_required(path: &Path, limit: u64, remedy: &str) -> Result<Vec<u8>> {
    read_optional(path, limit)?.ok_or_else(|| Error::Model(format!("{}: no such file; {remedy}", path.display())))
}
