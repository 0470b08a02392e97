//! The file of all evaluated points: a line of JSON for the settings, then one for each point, on disk as soon as it is known.
//! A line without its end was cut short by a crash: it is dropped, and its point is evaluated again.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::Point;
use crate::error::{Error, Result};

/// An evaluated point.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// The controller's step at which it was first drawn.
    pub step: u64,
    /// What was evaluated.
    #[serde(flatten)]
    pub point: Point,
    /// Share of held-out examples classified right.
    pub accuracy: f64,
    /// Seconds.
    pub latency: f64,
    /// What the controller was told.
    pub reward: f64,
}

/// The header's name of the format and its version.
const FORMAT: &str = "trefoil_adapter_search";
const VERSION: u64 = 1;

/// The file, to be added to.
pub(super) struct History {
    path: PathBuf,
    file: File,
    /// Points that it held when it was opened.
    there: usize,
}

fn header(settings: &Value) -> String {
    let mut all = json!({ FORMAT: VERSION });
    if let (Some(all), Some(settings)) = (all.as_object_mut(), settings.as_object()) {
        all.extend(settings.clone());
    }
    all.to_string()
}

fn damaged(path: &Path, line: usize, text: &str) -> Error {
    Error::Model(format!("{}: line {line}: {text}; remove the file to search anew", path.display()))
}

/// Settings and points of `text`, which ends with a whole line; none of an empty one.
fn parse(path: &Path, text: &str) -> Result<Option<(Value, Vec<Record>)>> {
    let mut lines = text.lines();
    let Some(first) = lines.next() else { return Ok(None) };
    let settings: Value = serde_json::from_str(first).map_err(|_| damaged(path, 1, "is no history of a search"))?;
    if settings.get(FORMAT).and_then(Value::as_u64) != Some(VERSION) {
        return Err(damaged(path, 1, &format!("is no history of a search of version {VERSION}")));
    }
    let record = |(i, line): (usize, &str)| {
        serde_json::from_str(line).map_err(|e| damaged(path, i + 2, &format!("is no point ({e})")))
    };
    Ok(Some((settings, lines.enumerate().map(record).collect::<Result<_>>()?)))
}

/// The first setting that differs, by its path, with both values.
fn difference(a: &Value, b: &Value, at: &str) -> Option<String> {
    if let (Value::Object(x), Value::Object(y)) = (a, b) {
        let names = x.keys().chain(y.keys().filter(|name| !x.contains_key(*name)));
        let inner = |name: &String| {
            let at = if at.is_empty() { name.clone() } else { format!("{at}.{name}") };
            difference(x.get(name).unwrap_or(&Value::Null), y.get(name).unwrap_or(&Value::Null), &at)
        };
        return names.into_iter().find_map(inner);
    }
    (a != b).then(|| format!("`{at}` ({a} there, {b} here)"))
}

fn whole_lines(text: &str) -> &str {
    &text[..text.rfind('\n').map_or(0, |end| end + 1)]
}

/// The settings and all points of a history.
///
/// # Errors
/// [`Error::Io`]; [`Error::Model`] naming the line that is damaged.
pub fn read(path: &Path) -> Result<(Value, Vec<Record>)> {
    let text = std::fs::read(path).map_err(|e| Error::io(path.display().to_string(), e))?;
    let text = String::from_utf8_lossy(&text);
    parse(path, whole_lines(&text))?.ok_or_else(|| damaged(path, 1, "there is no history of a search"))
}

impl History {
    /// Opens or begins a history, and gives the points that are in it.
    pub(super) fn open(path: &Path, settings: &Value) -> Result<(Self, Vec<Record>)> {
        let failed = |e| Error::io(path.display().to_string(), e);
        let file = OpenOptions::new().read(true).append(true).create(true).open(path).map_err(failed)?;
        // Two at once would each write what the other does not know. Where a file system has no locks, that is not found out.
        if let Err(TryLockError::WouldBlock) = file.try_lock() {
            return Err(Error::Config(format!(
                "{}: another search is writing there; wait for it, or give another directory",
                path.display()
            )));
        }
        let mut history = History { path: path.to_path_buf(), file, there: 0 };
        let mut bytes = Vec::new();
        history.file.read_to_end(&mut bytes).map_err(failed)?;
        let text = String::from_utf8_lossy(&bytes);
        let text = whole_lines(&text);
        let header = header(settings);
        let ours: Value = serde_json::from_str(&header).map_err(|e| Error::Internal(format!("settings: {e}")))?;
        let Some((theirs, records)) = parse(path, text)? else {
            history.cut(0)?;
            history.line(&header)?;
            return Ok((history, Vec::new()));
        };
        if let Some(what) = difference(&theirs, &ours, "") {
            return Err(Error::Config(format!(
                "{}: was made with another {what}; give the same options to go on, or another directory",
                path.display()
            )));
        }
        if text.len() < bytes.len() {
            history.cut(text.len() as u64)?;
        }
        history.there = records.len();
        Ok((history, records))
    }

    fn cut(&mut self, len: u64) -> Result<()> {
        let cut = self.file.set_len(len).and_then(|()| self.file.seek(SeekFrom::End(0)));
        cut.map(|_| ()).map_err(|e| Error::io(self.path.display().to_string(), e))
    }

    fn line(&mut self, text: &str) -> Result<()> {
        let line = format!("{text}\n");
        let written = self.file.write_all(line.as_bytes()).and_then(|()| self.file.sync_data());
        written.map_err(|e| {
            let what = format!("{} (run the same command again to go on once this is mended)", self.path.display());
            Error::io(what, e)
        })
    }

    /// Writes point number `n`, from 1, if it is not one of those that the file was opened with; says whether it did.
    pub(super) fn append_unless_there(&mut self, r: &Record, n: usize) -> Result<bool> {
        if n <= self.there {
            return Ok(false);
        }
        let text = serde_json::to_string(r).map_err(|e| Error::Internal(format!("writing JSON: {e}")))?;
        self.line(&text)?;
        Ok(true)
    }

    /// The error of a point, after `n` others, that the search would not have come to.
    pub(super) fn foreign(&self, r: &Record, n: usize) -> Error {
        let text = format!("{} at step {} is not what these settings lead to", r.point, r.step);
        damaged(&self.path, n + 2, &text)
    }
}
