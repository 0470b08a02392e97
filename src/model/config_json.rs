//! Typed access to the fields of a JSON file, with errors that name the file and the field.

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// A JSON object and the name that it has in errors.
pub(crate) struct Json {
    what: String,
    fields: Map<String, Value>,
}

impl Json {
    /// Parses an object; `what` names it in errors.
    pub(crate) fn parse(bytes: &[u8], what: String) -> Result<Self> {
        let remedy = "fetch the file again from where the model comes from";
        match serde_json::from_slice(bytes) {
            Ok(Value::Object(fields)) => Ok(Json { what, fields }),
            Ok(_) => Err(Error::Model(format!("{what}: holds JSON but no object; {remedy}"))),
            Err(e) => Err(Error::Model(format!("{what}: is not JSON ({e}); {remedy}"))),
        }
    }

    /// The name in errors.
    pub(crate) fn what(&self) -> &str {
        &self.what
    }

    /// The error of a field with a wrong value.
    pub(crate) fn wrong(&self, name: &str, text: &str) -> Error {
        Error::Model(format!("{}: {name}: {text}", self.what))
    }

    /// The error of a field that is not there.
    pub(crate) fn missing(&self, name: &str) -> Error {
        Error::Model(format!(
            "{}: the field `{name}` is missing; add it, or fetch the file again from where the model comes from",
            self.what
        ))
    }

    /// The error of a field of another kind than is read.
    pub(crate) fn expected(&self, name: &str, kind: &str, found: &Value) -> Error {
        let mut found = found.to_string();
        if let Some((end, _)) = found.char_indices().nth(60) {
            found.truncate(end);
        }
        self.wrong(name, &format!("must be {kind}, but is {found}"))
    }

    /// The field, unless left out or null.
    fn get(&self, name: &str) -> Option<&Value> {
        self.fields.get(name).filter(|v| !v.is_null())
    }

    /// Whether the field is there, be it null.
    pub(super) fn has(&self, name: &str) -> bool {
        self.fields.contains_key(name)
    }

    /// Whether the field is left out or null.
    pub(crate) fn is_null(&self, name: &str) -> bool {
        self.get(name).is_none()
    }

    /// A whole number from 0.
    pub(crate) fn size(&self, name: &str) -> Result<usize> {
        self.optional_size(name)?.ok_or_else(|| self.missing(name))
    }

    /// A whole number from 0, unless left out or null.
    pub(crate) fn optional_size(&self, name: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        // Some files have 8192.0 where 8192 is meant.
        let whole = value
            .as_u64()
            .or_else(|| value.as_f64().filter(|f| f.fract() == 0.0 && (0.0..1e15).contains(f)).map(|f| f as u64));
        match whole.and_then(|n| usize::try_from(n).ok()) {
            Some(n) => Ok(Some(n)),
            None => Err(self.expected(name, "a whole number", value)),
        }
    }

    /// A number.
    pub(crate) fn float(&self, name: &str) -> Result<f64> {
        let value = self.get(name).ok_or_else(|| self.missing(name))?;
        value.as_f64().ok_or_else(|| self.expected(name, "a number", value))
    }

    /// A number; `default` if left out or null.
    pub(crate) fn float_or(&self, name: &str, default: f64) -> Result<f64> {
        if self.is_null(name) { Ok(default) } else { self.float(name) }
    }

    /// True or false; `default` if left out or null.
    pub(crate) fn flag_or(&self, name: &str, default: bool) -> Result<bool> {
        let Some(value) = self.get(name) else { return Ok(default) };
        value.as_bool().ok_or_else(|| self.expected(name, "true or false", value))
    }

    /// A string; `default` if left out or null.
    pub(crate) fn text_or<'a>(&'a self, name: &str, default: &'a str) -> Result<&'a str> {
        let Some(value) = self.get(name) else { return Ok(default) };
        value.as_str().ok_or_else(|| self.expected(name, "a string", value))
    }

    /// All fields, null ones too.
    pub(crate) fn fields(&self) -> &Map<String, Value> {
        &self.fields
    }

    /// The value of a field, of whatever kind, unless left out or null.
    pub(crate) fn value(&self, name: &str) -> Option<&Value> {
        self.get(name)
    }

    /// The first of a list of strings.
    pub(super) fn first_text(&self, name: &str) -> Result<&str> {
        let value = self.get(name).ok_or_else(|| self.missing(name))?;
        value.get(0).and_then(Value::as_str).ok_or_else(|| self.expected(name, "a list with a string", value))
    }

    /// An object, unless left out or null.
    pub(crate) fn object(&self, name: &str) -> Result<Option<Json>> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::Object(fields)) => {
                Ok(Some(Json { what: format!("{}: {name}", self.what), fields: fields.clone() }))
            }
            Some(other) => Err(self.expected(name, "an object", other)),
        }
    }

    /// A token id or a list of them, unless left out or null.
    pub(super) fn ids(&self, name: &str) -> Result<Option<Vec<u32>>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let one = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
        let ids = match value {
            Value::Array(list) => list.iter().map(one).collect(),
            other => one(other).map(|id| vec![id]),
        };
        ids.map(Some).ok_or_else(|| self.expected(name, "a token id or a list of them", value))
    }

    /// The text of a special token, which is a string or an object with `content`, unless left out or null.
    pub(super) fn token(&self, name: &str) -> Option<&str> {
        let value = self.get(name)?;
        value.as_str().or_else(|| value.get("content").and_then(Value::as_str))
    }
}
