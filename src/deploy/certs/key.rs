//! Key files: made with mode 0600 from their first byte, never printed.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::Path;

use rcgen::{KeyPair, PublicKeyData};
use zeroize::Zeroizing;

use super::not_made;
use crate::error::{Error, Result};

/// More than any certificate chain or key takes.
const FILE_LIMIT: u64 = 1 << 20;

/// A private key.
pub struct Key(KeyPair);

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(..)")
    }
}

impl Key {
    /// A fresh one (ECDSA on P-256, which every TLS 1.3 implementation has).
    ///
    /// # Errors
    /// [`Error::Config`] if the operating system gives no randomness.
    pub fn generate() -> Result<Self> {
        KeyPair::generate().map(Key).map_err(|e| not_made("a key", &e))
    }

    /// From PKCS#8 PEM.
    ///
    /// # Errors
    /// [`Error::Config`] if it is no key.
    pub fn from_pem(pem: &str) -> Result<Self> {
        // The cause is left out: nothing of a key may reach a message.
        KeyPair::from_pem(pem).map(Key).map_err(|_| {
            Error::Config(
                "not a private key that can be used: expected unencrypted PKCS#8 PEM with ECDSA (P-256, P-384), Ed25519 or RSA; `openssl pkcs8 -topk8 -nocrypt` converts others".into(),
            )
        })
    }

    /// Reads a key file.
    ///
    /// # Errors
    /// [`Error::Config`] if others than its owner may read it, or it is no key; [`Error::Io`].
    pub fn load(path: &Path) -> Result<Self> {
        refuse_open_mode(path)?;
        Key::from_pem(&read_text(path)?).map_err(|e| Error::Config(format!("{}: {e}", path.display())))
    }

    /// PKCS#8 PEM, for [`write_private`].
    #[must_use]
    pub fn pem(&self) -> Zeroizing<String> {
        Zeroizing::new(self.0.serialize_pem())
    }

    pub(super) fn pair(&self) -> &KeyPair {
        &self.0
    }

    /// The public half, as certificates carry it (SubjectPublicKeyInfo, DER).
    pub(super) fn public(&self) -> Vec<u8> {
        self.0.subject_public_key_info()
    }
}

#[cfg(unix)]
fn refuse_open_mode(path: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let metadata = std::fs::metadata(path).map_err(|e| Error::io(path.display().to_string(), e))?;
    let mode = metadata.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(Error::Config(format!(
            "{}: others may use this private key (mode {mode:04o}): chmod 600 it, and make a new one if somebody may have read it",
            path.display()
        )));
    }
    Ok(())
}

#[cfg(not(unix))]
fn refuse_open_mode(_: &Path) -> Result<()> {
    Ok(())
}

/// Reads a certificate, a request or a key: text of at most a mebibyte.
///
/// # Errors
/// [`Error::Config`] if it is larger or no text; [`Error::Io`].
pub fn read_text(path: &Path) -> Result<Zeroizing<String>> {
    let io = |e| Error::io(path.display().to_string(), e);
    let mut bytes = Zeroizing::new(Vec::new());
    // A pipe or a device under this name would block us or never end.
    match std::fs::metadata(path) {
        Ok(meta) if !meta.is_file() => {
            return Err(Error::Config(format!("{}: not a regular file; name a file in PEM form", path.display())));
        }
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            let remedy = "make it (trefoil certs), get it from the peer, or correct the name";
            return Err(Error::Config(format!("{}: no such file; {remedy}", path.display())));
        }
        _ => {}
    }
    File::open(path).map_err(io)?.take(FILE_LIMIT + 1).read_to_end(&mut bytes).map_err(io)?;
    if bytes.len() as u64 > FILE_LIMIT {
        return Err(Error::Config(format!("{}: larger than {FILE_LIMIT} bytes, which no PEM file is", path.display())));
    }
    match std::str::from_utf8(&bytes) {
        Ok(text) => Ok(Zeroizing::new(text.to_owned())),
        Err(_) => Err(Error::Config(format!(
            "{}: not PEM text (a DER file? `openssl x509 -inform der` converts it)",
            path.display()
        ))),
    }
}

/// Writes a file that only its owner may read, and that did not exist.
///
/// # Errors
/// [`Error::Config`] if it exists; [`Error::Io`].
pub fn write_private(path: &Path, text: &str) -> Result<()> {
    create(path, text, 0o600)
}

/// Writes a file that did not exist.
///
/// # Errors
/// [`Error::Config`] if it exists; [`Error::Io`].
pub fn write_new(path: &Path, text: &str) -> Result<()> {
    create(path, text, 0o644)
}

/// Writes a file, replacing an older one at once: whoever reads meanwhile sees one or the other.
///
/// # Errors
/// [`Error::Io`].
pub fn write_renewed(path: &Path, text: &str) -> Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".{}.new", std::process::id()));
    let aside = path.with_file_name(name);
    create(&aside, text, 0o644)?;
    std::fs::rename(&aside, path).map_err(|e| Error::io(path.display().to_string(), e))
}

fn create(path: &Path, text: &str, mode: u32) -> Result<()> {
    let io = |e| Error::io(path.display().to_string(), e);
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, mode);
    #[cfg(not(unix))]
    let _ = mode;
    let mut file = match options.open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {
            return Err(Error::Config(format!(
                "{} already exists and is not overwritten: move it away, or write elsewhere (--out)",
                path.display()
            )));
        }
        Err(e) => return Err(io(e)),
    };
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(|e| {
        // A torn file must not pass for one; that it could not be removed changes nothing about the first error.
        let _ = std::fs::remove_file(path);
        io(e)
    })
}
