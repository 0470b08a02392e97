//! Tokens into pieces of text, up to a stop sequence.

use crate::error::Result;
use crate::model::{TextCodec, TextStream};

/// An answer's text as it grows.
pub(super) struct Speaker<'a> {
    codec: &'a TextCodec,
    stream: TextStream,
    stops: Stops,
    eos: &'a [u32],
}

impl<'a> Speaker<'a> {
    /// Of an answer that continues `prompt`.
    pub fn new(codec: &'a TextCodec, prompt: &[u32], eos: &'a [u32], stop: &[String]) -> Result<Self> {
        Ok(Speaker { codec, stream: codec.stream(prompt)?, stops: Stops::new(stop), eos })
    }

    /// The text that `id` completes, and whether a stop sequence ends the answer here.
    pub fn token(&mut self, id: u32) -> Result<(String, bool)> {
        if self.eos.contains(&id) {
            return Ok((String::new(), false));
        }
        let piece = self.stream.push(self.codec, id)?;
        Ok(self.stops.push(&piece))
    }

    /// What was held back.
    pub fn finish(mut self) -> Result<(String, bool)> {
        let rest = self.stream.finish(self.codec)?;
        let (mut text, stopped) = self.stops.push(&rest);
        if !stopped {
            text += &self.stops.held;
        }
        Ok((text, stopped))
    }
}

/// Looks for stop sequences, which may come in several pieces.
struct Stops {
    stop: Vec<String>,
    /// Text that may be the beginning of one.
    held: String,
    found: bool,
}

impl Stops {
    fn new(stop: &[String]) -> Self {
        Stops { stop: stop.iter().filter(|s| !s.is_empty()).cloned().collect(), held: String::new(), found: false }
    }

    fn push(&mut self, piece: &str) -> (String, bool) {
        if self.found {
            return (String::new(), true);
        }
        self.held += piece;
        if let Some(at) = self.stop.iter().filter_map(|s| self.held.find(s.as_str())).min() {
            self.found = true;
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), true);
        }
        let begins = |from: usize| self.stop.iter().any(|s| s.starts_with(&self.held[from..]));
        let keep = self.held.char_indices().map(|(i, _)| i).find(|&i| begins(i)).unwrap_or(self.held.len());
        let rest = self.held.split_off(keep);
        (std::mem::replace(&mut self.held, rest), false)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn said(stop: &[&str], pieces: &[&str]) -> (String, bool) {
        let stop: Vec<String> = stop.iter().map(|s| (*s).to_owned()).collect();
        let mut stops = Stops::new(&stop);
        let mut out = String::new();
        for piece in pieces {
            let (text, stopped) = stops.push(piece);
            out += &text;
            if stopped {
                return (out, true);
            }
        }
        (out + &stops.held, false)
    }

    #[test]
    fn a_stop_sequence_in_pieces_ends_the_text_before_it() {
        assert_eq!(said(&["END"], &["one E", "N", "D two"]), ("one ".into(), true));
        assert_eq!(said(&["END"], &["one E", "N", "d two"]), ("one ENd two".into(), false));
        assert_eq!(said(&["aab"], &["a", "a", "a", "b"]), ("a".into(), true));
        assert_eq!(said(&["\n\n", "."], &["é\n", "x.", "y"]), ("é\nx".into(), true));
        assert_eq!(said(&[""], &["a"]), ("a".into(), false));
    }

    proptest! {
        /// However the text is cut, it ends where the first stop sequence begins.
        #[test]
        fn pieces_do_not_matter(text in "[abé]{0,24}", stop in "[abé]{1,3}", cut in 1usize..5) {
            let chars: Vec<char> = text.chars().collect();
            let pieces: Vec<String> = chars.chunks(cut).map(|c| c.iter().collect()).collect();
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            let want = text.find(&stop).map_or((text.clone(), false), |at| (text[..at].to_owned(), true));
            prop_assert_eq!(said(&[&stop], &pieces), want);
        }
    }
}
