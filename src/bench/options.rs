//! What is to be measured.

use std::fmt;
use std::str::FromStr;

use super::Subject;
use crate::error::{Error, Result};
use crate::net::shape::Profile;

/// What is measured, in llama-bench's notation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Test {
    /// `ppN`: a pass over a prompt of N tokens.
    Prefill(usize),
    /// `tgN`: N passes of a token each.
    Decode(usize),
}

impl Test {
    /// Passes, and tokens of each.
    #[must_use]
    pub fn passes(self) -> (usize, usize) {
        match self {
            Test::Prefill(n) => (1, n),
            Test::Decode(n) => (n, 1),
        }
    }

    /// Of all passes.
    #[must_use]
    pub fn tokens(self) -> usize {
        let (passes, tokens) = self.passes();
        passes * tokens
    }

    /// A list such as `pp128,tg32`.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn list(text: &str) -> Result<Vec<Test>> {
        text.split(',').map(str::parse).collect()
    }
}

impl fmt::Display for Test {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Test::Prefill(n) => write!(f, "pp{n}"),
            Test::Decode(n) => write!(f, "tg{n}"),
        }
    }
}

impl FromStr for Test {
    type Err = Error;

    fn from_str(text: &str) -> Result<Test> {
        let number = |n: &str| n.parse().ok().filter(|&n: &usize| n > 0);
        let prefill = text.strip_prefix("pp").and_then(number).map(Test::Prefill);
        let test = prefill.or_else(|| text.strip_prefix("tg").and_then(number).map(Test::Decode));
        test.ok_or_else(|| {
            Error::Config(format!(
                "--test {text:?}: expected ppN (prefill of N tokens) or tgN (N tokens decoded), as in pp128,tg32"
            ))
        })
    }
}

/// What to measure.
#[derive(Clone, Debug)]
pub struct Options {
    /// The shape or the model.
    pub subject: Subject,
    /// One row each.
    pub tests: Vec<Test>,
    /// Cached positions before the decode tokens, each a row.
    pub contexts: Vec<usize>,
    /// Simulated network.
    pub net: Profile,
}

impl Options {
    /// Tests with the cached positions before them: a prefill starts from none.
    #[must_use]
    pub fn cases(&self) -> Vec<(Test, usize)> {
        let contexts = |&test: &Test| match test {
            Test::Prefill(_) => vec![(test, 0)],
            Test::Decode(_) => self.contexts.iter().map(|&context| (test, context)).collect(),
        };
        self.tests.iter().flat_map(contexts).collect()
    }
}

/// Contexts from a list such as `0,128,512`, in rising order.
///
/// # Errors
/// [`Error::Config`].
pub fn contexts(text: &str) -> Result<Vec<usize>> {
    let bad = || Error::Config(format!("--context {text:?}: expected numbers of cached positions, as in 0,128,512"));
    let mut list = text.split(',').map(|n| n.trim().parse().map_err(|_| bad())).collect::<Result<Vec<usize>>>()?;
    list.sort_unstable();
    list.dedup();
    Ok(list)
}
