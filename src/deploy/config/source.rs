//! Errors that point into the text of a configuration.

use std::ops::Range;
use std::path::Path;

use toml::de::{DeTable, DeValue};

use crate::error::Error;

/// A configuration's text, and the file it is (or would be) in.
pub(super) struct Source<'a> {
    pub(super) file: &'a Path,
    pub(super) text: &'a str,
}

impl Source<'_> {
    /// `file:line:column: what`, both counted from 1, columns in characters.
    pub(super) fn error(&self, offset: usize, what: impl std::fmt::Display) -> Error {
        let mut end = offset.min(self.text.len());
        while !self.text.is_char_boundary(end) {
            end -= 1;
        }
        let before = &self.text[..end];
        let line = before.matches('\n').count() + 1;
        let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
        Error::Config(format!("{}:{line}:{column}: {what}", self.file.display()))
    }

    /// What the TOML parser or serde found, with the field that it concerns and, for an unknown one, what was meant.
    pub(super) fn toml_error(&self, error: &toml::de::Error) -> Error {
        let span = error.span().unwrap_or(0..0);
        let message = error.message();
        let field = DeTable::parse(self.text).ok().and_then(|table| path_at(table.get_ref(), &span));
        if let Some(rest) = message.strip_prefix("unknown field ") {
            let mut names = rest.split('`').skip(1).step_by(2);
            let unknown = names.next().unwrap_or_default();
            let known: Vec<&str> = names.collect();
            let name = field.unwrap_or_else(|| unknown.to_owned());
            let remedy = match nearest(unknown, &known) {
                Some(near) => format!("did you mean `{near}`?"),
                None => format!("here are known: {}", known.join(", ")),
            };
            return self.error(span.start, format!("{name}: there is no such field; {remedy}"));
        }
        match field {
            Some(field) => self.error(span.start, format!("{field}: {message}")),
            None => self.error(span.start, format!("not valid TOML: {message}")),
        }
    }
}

/// The dotted name of the innermost key whose key or value is at `span`.
fn path_at(table: &DeTable<'_>, span: &Range<usize>) -> Option<String> {
    let covers = |at: Range<usize>| at.start <= span.start && span.end <= at.end;
    for (key, value) in table {
        if let DeValue::Table(inner) = value.get_ref()
            && let Some(path) = path_at(inner, span)
        {
            return Some(format!("{}.{path}", key.get_ref()));
        }
        if covers(key.span()) || covers(value.span()) {
            return Some(key.get_ref().to_string());
        }
    }
    None
}

/// The known name that a mistyped one is most likely meant to be.
fn nearest<'a>(unknown: &str, known: &[&'a str]) -> Option<&'a str> {
    let unknown = unknown.to_lowercase().replace('-', "_");
    let (distance, best) = known.iter().map(|name| (edits(&unknown, name), *name)).min()?;
    let prefix = best.len() >= 3 && (unknown.starts_with(best) || best.starts_with(&unknown) && unknown.len() >= 3);
    (distance <= best.len() / 3 || prefix).then_some(best)
}

/// Levenshtein's distance; of names too long to be meant, a bound.
fn edits(a: &str, b: &str) -> usize {
    if a.len() > 64 {
        return a.len();
    }
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.iter().enumerate() {
            let change = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = change.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances() {
        for (a, b, d) in [("", "abc", 3), ("adress", "address", 1), ("kitten", "sitting", 3), ("x", "x", 0)] {
            assert_eq!(edits(a, b), d, "{a} {b}");
        }
        assert_eq!(nearest("Time-Out_s", &["timeout_s", "drain_s"]), Some("timeout_s"));
        assert_eq!(nearest("timeout", &["timeout_s", "drain_s"]), Some("timeout_s"));
        assert_eq!(nearest("colour", &["timeout_s", "drain_s"]), None);
    }
}
