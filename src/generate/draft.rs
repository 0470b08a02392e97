//! The Client's draft model: a small model in plaintext that guesses what the private one will say.
//!
//! Any model with the same tokenizer will do: the public base of the private model, a smaller one of its family, fewer layers
//! of it. It runs in f32 at the Client and sends nothing; what it gets wrong costs time and never a token.
//!
//! Greedy drafts are the likeliest tokens. With a temperature the Client, whose seed makes the Owner's sampling noise
//! ([`crate::protocol::gumbel`]), adds the same noise to its own logits: where both models give much the same logits they then
//! sample the same token, which a greedy draft would often miss.

use std::path::Path;

use ndarray::s;

use super::MAX_DRAFTS;
use crate::error::{Error, Result};
use crate::model::{Checkpoint, FloatCache, ModelConfig, TextCodec, Weights, float};
use crate::protocol::gumbel::Gumbel;

/// A draft model, and how many tokens it drafts for a pass.
pub struct Draft {
    weights: Weights,
    tokens: usize,
    cache: FloatCache,
    /// The ids in the cache.
    read: Vec<u32>,
}

impl std::fmt::Debug for Draft {
    /// Without what it has read, which is the prompt.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Draft")
            .field("config", &self.weights.config)
            .field("tokens", &self.tokens)
            .finish_non_exhaustive()
    }
}

/// What became of the drafts of an answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Drafts {
    /// Tokens drafted, without those after the end of the answer.
    pub drafted: usize,
    /// Of these, the model's own.
    pub accepted: usize,
    /// Passes after the prompt's.
    pub passes: usize,
}

impl Drafts {
    /// Accepted of drafted; 0 if nothing was drafted.
    #[must_use]
    pub fn rate(&self) -> f64 {
        self.accepted as f64 / self.drafted.max(1) as f64
    }
}

/// Whether `tokens` drafts can be asked for.
///
/// # Errors
/// [`Error::Config`].
pub fn check_draft_tokens(tokens: usize) -> Result<()> {
    if (1..=MAX_DRAFTS).contains(&tokens) {
        return Ok(());
    }
    Err(Error::Config(format!("--draft-tokens {tokens}: expected 1 to {MAX_DRAFTS} drafts for a pass")))
}

impl Draft {
    /// Loads the model in `dir`, to draft `tokens` tokens for each pass of the model whose `config.json` and
    /// `tokenizer.json` are in `model`: its checkpoint, or the public directory of its preparation.
    ///
    /// # Errors
    /// [`Error::Model`] for a directory that cannot be read; [`Error::Config`] if the two have not the same tokens.
    pub fn open(dir: &Path, tokens: usize, model: &Path) -> Result<Draft> {
        check_draft_tokens(tokens)?;
        let (ours, theirs) = (ModelConfig::open(dir)?, ModelConfig::open(model)?);
        check_vocabulary((dir, ours.vocab_size), (model, theirs.vocab_size))?;
        if TextCodec::file(dir)? != TextCodec::file(model)? {
            return Err(Error::Config(format!(
                "--draft {}: its tokenizer.json is not that of {}, byte for byte, so its tokens mean something else; draft with a model of the same family, or copy the file if only its formatting differs",
                dir.display(),
                model.display()
            )));
        }
        Draft::new(Weights::load(&Checkpoint::open(dir)?)?, tokens)
    }

    /// With weights in memory.
    ///
    /// # Errors
    /// [`Error::Config`] for a number of tokens out of range.
    pub fn new(weights: Weights, tokens: usize) -> Result<Draft> {
        check_draft_tokens(tokens)?;
        let cache = FloatCache::new(&weights.config);
        Ok(Draft { weights, tokens, cache, read: Vec::new() })
    }

    /// Tokens that it drafts for a pass.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// The size of its vocabulary.
    #[must_use]
    pub fn vocabulary(&self) -> usize {
        self.weights.config.vocab_size
    }

    /// How many tokens it can draft after a text of `len` tokens, at most `most`: none beyond its own context.
    pub(super) fn room(&self, len: usize, most: usize) -> usize {
        // The last draft is not read.
        most.min(self.tokens).min((self.weights.config.max_positions + 1).saturating_sub(len))
    }

    /// Reads `text` but for its last token, which [`Draft::propose`] reads anyway.
    pub(super) fn prepare(&mut self, text: &[u32]) {
        if let [before @ .., _] = text
            && self.room(text.len(), 1) > 0
            && !before.is_empty()
        {
            let _ = self.advance(before);
        }
    }

    /// Drafts of the `n` tokens after `text`, of which the last `given` are the answer so far; `n` at most its room. `noise` is
    /// the request's, as the Owner has it.
    pub(super) fn propose(&mut self, text: &[u32], given: usize, n: usize, noise: Option<&mut Gumbel>) -> Vec<u32> {
        let (mut all, mut noise) = (text.to_vec(), noise);
        for index in given..given + n {
            let mut logits = self.advance(&all);
            if let Some(noise) = &mut noise {
                let noise = noise.of(index as u64, logits.len());
                logits.iter_mut().zip(noise).for_each(|(l, g)| *l += g as f32);
            }
            all.push(largest(&logits));
        }
        all.split_off(text.len())
    }

    /// The logits after `text`, of which only what is new is read.
    fn advance(&mut self, text: &[u32]) -> Vec<f32> {
        // Its last token is always read again: the logits come from there.
        let known = self.read.iter().zip(text).take_while(|(a, b)| a == b).count().min(text.len().saturating_sub(1));
        self.cache.truncate(known);
        self.read.truncate(known);
        let h = float::hidden(&self.weights, &text[known..], &mut self.cache, &mut ());
        self.read.extend_from_slice(&text[known..]);
        let last = h.slice(s![h.nrows() - 1.., ..]).to_owned();
        float::logits(&self.weights, &last).into_iter().collect()
    }
}

/// The first of the largest; what is not a number is never it.
fn largest(logits: &[f32]) -> u32 {
    let best =
        logits.iter().enumerate().fold((0, f32::NEG_INFINITY), |best, (i, &v)| if v > best.1 { (i, v) } else { best });
    best.0 as u32
}

fn check_vocabulary((draft, ours): (&Path, usize), (model, theirs): (&Path, usize)) -> Result<()> {
    if ours == theirs {
        return Ok(());
    }
    Err(Error::Config(format!(
        "--draft {}: it has {ours} tokens, {} has {theirs}; draft with a model of the same tokenizer (a smaller one of its family, or the base that it was made from)",
        draft.display(),
        model.display()
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draft() -> Draft {
        let config = ModelConfig::open(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/models/quill-4m"))).unwrap();
        let config = ModelConfig { num_layers: 1, max_positions: 10, ..config };
        Draft::new(Weights::random(config, 3).unwrap(), 4).unwrap()
    }

    #[test]
    fn drafts_do_not_depend_on_what_was_rejected() {
        let mut d = draft();
        let first = d.propose(&[1, 2, 3], 0, 4, None);
        // The model has said something else after the second draft.
        let text = [1, 2, 3, first[0], first[1] ^ 1];
        let after = d.propose(&text, 2, 3, None);
        assert_eq!(after, draft().propose(&text, 2, 3, None));
        // Another request.
        assert_eq!(d.propose(&[1, 2, 3], 0, 4, None), first);
        let mut prepared = draft();
        prepared.prepare(&[1, 2, 3]);
        assert_eq!(prepared.propose(&[1, 2, 3], 0, 4, None), first);
    }

    #[test]
    fn its_context_is_not_exceeded() {
        let d = draft();
        assert_eq!([3, 7, 8, 10, 11, 12].map(|len| d.room(len, 9)), [4, 4, 3, 1, 0, 0]);
        assert_eq!(d.room(3, 2), 2);
        let mut d = draft();
        assert_eq!(d.propose(&[5; 7], 0, 4, None).len(), 4);
        d.prepare(&[5; 40]);
    }

    #[test]
    fn one_to_sixteen() {
        let weights = draft().weights;
        for bad in [0, 17] {
            let error = Draft::new(weights.clone(), bad).unwrap_err().to_string();
            assert!(error.contains("--draft-tokens") && error.contains("1 to 16"), "{error}");
        }
    }
}
