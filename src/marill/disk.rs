//! Files written so that they are whole or not there: under a name beside their own, synced, then renamed. Where that fails, what
//! stood there before still stands.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Write};
use std::path::Path;

use safetensors::tensor::TensorView;

use crate::error::{Error, Result};

/// Lets `fill` write a file that then takes the place of `path`.
pub(super) fn replace(path: &Path, fill: impl FnOnce(&mut dyn Write) -> std::io::Result<()>) -> Result<()> {
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let partial = path.with_file_name(format!(".{name}.partial"));
    let written = || -> std::io::Result<()> {
        let mut file = BufWriter::new(OpenOptions::new().write(true).create(true).truncate(true).open(&partial)?);
        fill(&mut file)?;
        file.flush()?;
        file.get_ref().sync_all()?;
        std::fs::rename(&partial, path)?;
        // So that the rename lasts too.
        match path.parent().filter(|p| !p.as_os_str().is_empty()) {
            Some(dir) => File::open(dir)?.sync_all(),
            None => Ok(()),
        }
    };
    written().map_err(|e| {
        // A leftover would only take room on a full disk; the error to show is the one above.
        let _ = std::fs::remove_file(&partial);
        let before = if path.exists() { "what was saved there before is intact" } else { "nothing was saved" };
        let remedy = match e.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => "free some room",
            std::io::ErrorKind::PermissionDenied => "check who owns the directory and its permissions",
            _ => "check the disk and the directory",
        };
        Error::io(format!("saving {} ({before}; {remedy}, then run the same command again)", path.display()), e)
    })
}

/// JSON for people.
pub(super) fn write_json(path: &Path, value: &impl serde::Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value).map_err(|e| Error::Internal(format!("writing JSON: {e}")))?;
    replace(path, |out| out.write_all(text.as_bytes()).and_then(|()| out.write_all(b"\n")))
}

/// A safetensors file with these tensors and this metadata.
pub(super) fn write_safetensors(
    path: &Path,
    tensors: Vec<(&str, TensorView<'_>)>,
    metadata: Option<HashMap<String, String>>,
) -> Result<()> {
    let bytes = safetensors::serialize(tensors, metadata).map_err(|e| Error::Internal(format!("safetensors: {e}")))?;
    replace(path, |out| out.write_all(&bytes))
}
