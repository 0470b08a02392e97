//! Changes to something valid: what an accident or an attacker makes of it.

use proptest::prelude::*;
use proptest::sample::Index;

/// One change.
#[derive(Clone, Debug)]
pub enum Change {
    Set(Index, u8),
    Flip(Index, u8),
    Insert(Index, Vec<u8>),
    Delete(Index, usize),
    Repeat(Index, usize),
    Cut(Index),
    /// A word or number, of those in the text, becomes another.
    Word(Index, &'static str),
    /// A word or number becomes one from elsewhere in the text.
    Swap(Index, Index),
}

/// What parsers stumble over.
const WORDS: [&str; 30] = [
    "0",
    "-0.0",
    "1",
    "-1",
    "2",
    "3",
    "7",
    "255",
    "65535",
    "65536",
    "2147483648",
    "4294967295",
    "4294967296",
    "9223372036854775807",
    "9223372036854775808",
    "18446744073709551615",
    "18446744073709551616",
    "1e308",
    "-1e308",
    "1e400",
    "1e-320",
    "nan",
    "inf",
    "null",
    "true",
    "\"\"",
    "\"\u{1F33F}\"",
    "[]",
    "{}",
    "[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[",
];

fn change() -> impl Strategy<Value = Change> {
    let at = any::<Index>;
    prop_oneof![
        2 => (at(), any::<u8>()).prop_map(|(i, b)| Change::Set(i, b)),
        2 => (at(), 0u8..8).prop_map(|(i, b)| Change::Flip(i, b)),
        1 => (at(), prop::collection::vec(any::<u8>(), 1..24)).prop_map(|(i, b)| Change::Insert(i, b)),
        1 => (at(), 1usize..200).prop_map(|(i, n)| Change::Delete(i, n)),
        1 => (at(), 1usize..200).prop_map(|(i, n)| Change::Repeat(i, n)),
        1 => at().prop_map(Change::Cut),
        4 => (at(), prop::sample::select(&WORDS[..])).prop_map(|(i, w)| Change::Word(i, w)),
        2 => (at(), at()).prop_map(|(i, j)| Change::Swap(i, j)),
    ]
}

/// A few changes.
pub fn changes() -> impl Strategy<Value = Vec<Change>> {
    prop::collection::vec(change(), 1..6)
}

/// Changes of bytes only, for what is no text.
pub fn byte_changes() -> impl Strategy<Value = Vec<Change>> {
    changes().prop_map(|mut all| {
        all.retain(|c| !matches!(c, Change::Word(..) | Change::Swap(..)));
        all
    })
}

fn words(text: &[u8]) -> Vec<std::ops::Range<usize>> {
    let part = |b: u8| b.is_ascii_alphanumeric() || b"-+._".contains(&b);
    let (mut out, mut at) = (Vec::new(), 0);
    while at < text.len() {
        let end = at + text[at..].iter().take_while(|b| part(**b)).count();
        if end > at {
            out.push(at..end);
        }
        at = end + 1;
    }
    out
}

/// `good` with the changes made.
pub fn apply(good: &[u8], changes: &[Change]) -> Vec<u8> {
    let mut out = good.to_vec();
    for change in changes {
        let n = out.len();
        if n == 0 {
            break;
        }
        match change {
            Change::Set(i, b) => out[i.index(n)] = *b,
            Change::Flip(i, bit) => out[i.index(n)] ^= 1 << bit,
            Change::Insert(i, bytes) => drop(out.splice(i.index(n)..i.index(n), bytes.iter().copied())),
            Change::Delete(i, len) => drop(out.drain(i.index(n)..(i.index(n) + len).min(n))),
            Change::Repeat(i, len) => {
                let piece = out[i.index(n)..(i.index(n) + len).min(n)].to_vec();
                drop(out.splice(i.index(n)..i.index(n), piece));
            }
            Change::Cut(i) => out.truncate(i.index(n)),
            Change::Word(i, word) => {
                let all = words(&out);
                if !all.is_empty() {
                    out.splice(all[i.index(all.len())].clone(), word.bytes());
                }
            }
            Change::Swap(i, j) => {
                let all = words(&out);
                if !all.is_empty() {
                    let word = out[all[j.index(all.len())].clone()].to_vec();
                    out.splice(all[i.index(all.len())].clone(), word);
                }
            }
        }
    }
    out
}
