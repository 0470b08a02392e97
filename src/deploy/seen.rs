//! Session ids and nonces seen before: a session is never repeated, not even across a restart.

use std::collections::{HashSet, VecDeque};
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use super::wire::Digest;
use crate::error::{Error, Result};

/// So many are remembered; the ids of honest parties repeat never, so this only bounds what a replay can reach back to.
const KEEP: usize = 1 << 17;

struct State {
    known: HashSet<Digest>,
    order: VecDeque<Digest>,
    file: File,
    written: usize,
}

/// The ids that a party has seen, in memory and in a file.
pub struct Seen {
    path: PathBuf,
    state: Mutex<State>,
}

impl Seen {
    /// Opens or makes the file `sessions.seen` in `directory`.
    ///
    /// # Errors
    /// [`Error::Io`] naming it.
    pub fn open(directory: &Path) -> Result<Seen> {
        let path = directory.join("sessions.seen");
        let failed = |e| Error::io(path.display().to_string(), e);
        // The Helper's halves lie in the same directory.
        let made = DirBuilder::new().recursive(true).mode(0o700).create(directory);
        made.map_err(|e| Error::io(directory.display().to_string(), e))?;
        let options = || {
            let mut o = OpenOptions::new();
            o.read(true).append(true).create(true).mode(0o600);
            o
        };
        let mut file = options().open(&path).map_err(failed)?;
        // Two parties that share the list would each not see what the other has.
        file.try_lock().map_err(|_| {
            Error::Config(format!(
                "{}: another party that runs on this machine uses this directory; give each its own [model] store",
                directory.display()
            ))
        })?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(failed)?;
        // A last entry that a crash cut off was never acted upon.
        let whole = bytes.len() - bytes.len() % 32;
        if whole < bytes.len() {
            file.set_len(whole as u64).map_err(failed)?;
        }
        let skip = (whole / 32).saturating_sub(KEEP);
        let order: VecDeque<Digest> =
            bytes[..whole].chunks_exact(32).skip(skip).filter_map(|c| c.try_into().ok()).collect();
        let state = State { known: order.iter().copied().collect(), order, file, written: whole / 32 };
        Ok(Seen { path, state: Mutex::new(state) })
    }

    /// Whether `id` was noted before.
    #[must_use]
    pub fn contains(&self, id: &Digest) -> bool {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).known.contains(id)
    }

    /// Notes `id`; `false` if it was there before. It is in the file before this returns.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be written: then the session must not begin.
    pub fn insert(&self, id: &Digest) -> Result<bool> {
        let failed = |e| Error::io(self.path.display().to_string(), e);
        let mut s = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if s.known.contains(id) {
            return Ok(false);
        }
        if s.written >= 2 * KEEP {
            self.compact(&mut s)?;
        }
        if let Err(e) = s.file.write_all(id) {
            // Half an entry (a full disk) would shift all that come after it.
            let _ = s.file.set_len(32 * s.written as u64);
            return Err(failed(e));
        }
        s.written += 1;
        s.known.insert(*id);
        s.order.push_back(*id);
        if s.order.len() > KEEP
            && let Some(old) = s.order.pop_front()
        {
            s.known.remove(&old);
        }
        Ok(true)
    }

    fn compact(&self, s: &mut State) -> Result<()> {
        let failed = |e| Error::io(self.path.display().to_string(), e);
        let fresh = self.path.with_extension("new");
        let mut o = OpenOptions::new();
        let _ = std::fs::remove_file(&fresh);
        let mut file = o.append(true).create_new(true).mode(0o600).open(&fresh).map_err(failed)?;
        let all: Vec<u8> = s.order.iter().flatten().copied().collect();
        file.write_all(&all).and_then(|()| file.sync_all()).map_err(failed)?;
        file.try_lock().map_err(|e| failed(e.into()))?;
        std::fs::rename(&fresh, &self.path).map_err(failed)?;
        s.file = file;
        s.written = s.order.len();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_taken_once_even_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let seen = Seen::open(dir.path()).unwrap();
        assert!(seen.insert(&[1; 32]).unwrap());
        assert!(!seen.insert(&[1; 32]).unwrap());
        assert!(seen.insert(&[2; 32]).unwrap());
        drop(seen);
        // A crash in the middle of an entry.
        let mut file = OpenOptions::new().append(true).open(dir.path().join("sessions.seen")).unwrap();
        file.write_all(&[3; 7]).unwrap();
        let seen = Seen::open(dir.path()).unwrap();
        assert!(!seen.insert(&[1; 32]).unwrap());
        assert!(!seen.insert(&[2; 32]).unwrap());
        assert!(seen.insert(&[3; 32]).unwrap());
        drop(seen);
        assert!(!Seen::open(dir.path()).unwrap().insert(&[3; 32]).unwrap());
    }
}
