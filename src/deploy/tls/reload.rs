//! Renewing and revoking without a restart.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::super::config::{Config, Tls as TlsConfig};
use super::Tls;
use crate::error::Result;
use crate::party::Role;

/// [`Tls`] that follows its files: certificates, keys, CA, pins and the list of revoked ones are read again when a file has
/// changed, so that renewing and revoking need no restart.
pub struct Reloading {
    path: PathBuf,
    role: Role,
    state: Mutex<(Vec<Stamp>, TlsConfig, Arc<Tls>)>,
}

impl Reloading {
    /// As configured in the file `path`.
    ///
    /// # Errors
    /// As [`Tls::load`].
    pub fn new(path: &Path, config: &Config) -> Result<Reloading> {
        let tls = config.tls().clone();
        let stamps = stamps(path, &tls);
        let loaded = Arc::new(Tls::load(&tls, config.role())?);
        Ok(Reloading { path: path.to_path_buf(), role: config.role(), state: Mutex::new((stamps, tls, loaded)) })
    }

    /// The current one. If the new files are not good, the old ones stay in force and the log says why.
    #[must_use]
    pub fn current(&self) -> Arc<Tls> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        // Taken before the files are read: what changes meanwhile is read again next time.
        let now = stamps(&self.path, &state.1);
        if now != state.0 {
            let fresh = Config::load(&self.path).and_then(|c| Ok((Tls::load(c.tls(), self.role)?, c.tls().clone())));
            match fresh {
                Ok((tls, config)) => {
                    tracing::info!("certificates and lists read again");
                    // Other files may be named now: they count as read only if they are the same ones.
                    let stamps = if config == state.1 { now } else { Vec::new() };
                    *state = (stamps, config, Arc::new(tls));
                }
                Err(error) => {
                    tracing::warn!(%error, "certificates changed but cannot be used; the old ones stay in force");
                    state.0 = now;
                }
            }
        }
        Arc::clone(&state.2)
    }
}

/// What tells that a file has changed.
type Stamp = Option<(u64, u64, i64, i64)>;

fn stamps(path: &Path, tls: &TlsConfig) -> Vec<Stamp> {
    use std::os::unix::fs::MetadataExt;
    let files = [path, &tls.certificate, &tls.key].into_iter();
    let files = files.chain(tls.ca.as_deref()).chain(tls.pinned.iter().map(PathBuf::as_path));
    files
        .map(|f| {
            std::fs::metadata(f).ok().map(|m| {
                (
                    m.ino(),
                    m.len(),
                    m.mtime_nsec() + m.mtime() * 1_000_000_000,
                    m.ctime_nsec() + m.ctime() * 1_000_000_000,
                )
            })
        })
        .collect()
}
