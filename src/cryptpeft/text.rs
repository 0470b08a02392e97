//! The public backbone in float for text: a Llama, of which an adapter reads the last tokens.
//!
//! A text is as many tokens as the adapter was made for: its last ones, or the begin token repeated in front of a shorter one. The
//! rows of what adapters read are in the order from the end: row `i` is `i` tokens back. So row 0, which the head reads and
//! which is the CLS row of a vision transformer, is the last position, the only one that has seen the whole text.

use std::fmt;
use std::path::Path;

use ndarray::{Array2, Axis};
use rayon::prelude::*;

use super::AdapterConfig;
use super::float::Features;
use super::texts::TextExample;
use crate::error::{Error, Result};
use crate::model::variant::Record;
use crate::model::{Checkpoint, FloatCache, ModelConfig, TextCodec, Weights, float};

/// The most tokens that an adapter may read: it has a map from each of them to each.
pub const MOST_WINDOW: usize = 1024;

/// A public Llama, how its text is cut, and its tokenizer.
pub struct TextBackbone {
    weights: Weights,
    codec: TextCodec,
    window: usize,
    /// Stands in front of a short text.
    begin: u32,
}

impl fmt::Debug for TextBackbone {
    /// The architecture alone.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TextBackbone")
            .field("config", &self.weights.config)
            .field("window", &self.window)
            .finish_non_exhaustive()
    }
}

impl TextBackbone {
    /// Opens a Hugging Face directory, for adapters that read `window` tokens. What stands in front of a short text is the begin
    /// token of `config.json`, or token 0 where it has none.
    ///
    /// # Errors
    /// [`Error::Model`] naming the file and what is wrong with it; [`Error::Config`] for a model that is private, and for a
    /// window that the model does not have; [`Error::Io`].
    pub fn open(dir: &Path, window: usize) -> Result<Self> {
        Record::check_public(dir)?;
        let checkpoint = Checkpoint::open(dir)?;
        let config = checkpoint.config();
        // Before the weights, which take long.
        let most = config.max_positions.min(MOST_WINDOW);
        if window == 0 || window > most {
            return Err(Error::Config(format!(
                "a window of {window} tokens: with {} an adapter can read 1 to {most}; give --window so many, or the model that the adapter was trained on",
                dir.display()
            )));
        }
        let begin = config.bos_id.unwrap_or(0);
        config.check_ids(&[begin]).map_err(|_| {
            let text = format!(
                "bos_token_id is {begin}, outside of the vocabulary of {}; correct config.json",
                config.vocab_size
            );
            Error::Model(format!("{}: {text}", dir.display()))
        })?;
        let codec = TextCodec::open(dir)?;
        let mut weights = Weights::load(&checkpoint)?;
        // It is never run, and may be a large part of a model.
        weights.head = None;
        Ok(TextBackbone { weights, codec, window, begin })
    }

    /// The architecture.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.weights.config
    }

    /// Tokens of a text.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.window
    }

    /// Checks that the adapters are of this model.
    ///
    /// # Errors
    /// [`Error::Model`] with the names and shapes that differ.
    pub fn check(&self, adapter: &AdapterConfig) -> Result<()> {
        let wrong = |text: String| {
            let remedy = "give the model that the adapter was trained on";
            Err(Error::Model(format!("adapter and model do not go together: {text}; {remedy}")))
        };
        let c = self.config();
        let first = format!("adapters.adapter_layer_{}", adapter.layers.first().copied().unwrap_or(0));
        if adapter.hidden != c.hidden_size {
            let (rank, d) = (adapter.rank, adapter.hidden);
            return wrong(format!(
                "`{first}.lora_A.weight` has the shape [{rank}, {d}], the hidden size {d}, but the model's `model.embed_tokens.weight` has [{}, {}]",
                c.vocab_size, c.hidden_size
            ));
        }
        if adapter.layers.last().map(|i| i + 1) != Some(c.num_layers) {
            return wrong(format!(
                "there are `adapters.adapter_layer_*` of the layers {:?} (from 0), which are not the last ones of the model's {}",
                adapter.layers, c.num_layers
            ));
        }
        if adapter.tokens != self.window {
            let n = adapter.tokens;
            return wrong(format!(
                "`{first}.blks.blk_0.self_attention.attn_reset.weight` has the shape [{n}, {n}], but texts are read as {} tokens",
                self.window
            ));
        }
        Ok(())
    }

    /// The tokens of `text`, without any around it.
    ///
    /// # Errors
    /// [`Error::Config`] for a text without any, [`Error::Model`] when the tokenizer fails; neither quotes the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let ids = self.codec.encode_plain(text)?;
        if ids.is_empty() {
            return Err(Error::Config("the text is empty; give one with a word at least".into()));
        }
        Ok(ids)
    }

    /// The last tokens of `text`, as many as the window has, with the begin token in front where there are fewer.
    ///
    /// # Errors
    /// As [`TextBackbone::encode`].
    pub fn last_window(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.padded(&self.encode(text)?))
    }

    /// At most `count` windows that lie evenly over `ids`, the last one among them.
    #[must_use]
    pub fn windows(&self, ids: &[u32], count: usize) -> Vec<Vec<u32>> {
        let room = ids.len().saturating_sub(self.window);
        let count = count.min(room + 1);
        let end = |n: usize| ids.len() - room * n / count.max(1);
        (0..count).map(|n| self.padded(&ids[..end(n)])).collect()
    }

    /// The last of `ids`, as many as the window has, with the begin token in front where there are fewer.
    pub(super) fn padded(&self, ids: &[u32]) -> Vec<u32> {
        let ids = &ids[ids.len().saturating_sub(self.window)..];
        let mut all = vec![self.begin; self.window - ids.len()];
        all.extend(ids);
        all
    }

    /// The text of one token as the vocabulary has it (there a space may be `Ġ` or `▁`), what no terminal shows escaped: each
    /// token has another one, which decoded text has not.
    #[must_use]
    pub fn piece(&self, id: u32) -> String {
        let piece = self.codec.token(id).unwrap_or_else(|| format!("<{id}>"));
        let shown = |c: char| c != '\\' && !c.is_control();
        piece.chars().map(|c| if shown(c) { c.to_string() } else { c.escape_default().to_string() }).collect()
    }

    /// Runs the model on a window, for adapters of these layers (from 0, ascending).
    ///
    /// # Errors
    /// [`Error::Shape`] for a window or layers that are not of this backbone; [`Error::Model`] for a token that is not.
    pub fn features(&self, ids: &[u32], layers: &[usize]) -> Result<Features> {
        let wrong = |lhs, rhs| Err(Error::Shape { op: "language model", lhs, rhs });
        let all = self.config().num_layers;
        if ids.len() != self.window {
            return wrong(format!("{} tokens", ids.len()), format!("a window of {}", self.window));
        }
        if !layers.windows(2).all(|pair| pair[0] < pair[1]) || layers.last().is_some_and(|i| *i >= all) {
            return wrong(format!("layers {layers:?}"), format!("ascending ones of the model's {all}"));
        }
        self.config().check_ids(ids)?;
        let from_the_end: Vec<usize> = (0..self.window).rev().collect();
        let mut cache = FloatCache::new(self.config());
        let mut h: Array2<f32> = float::embed(&self.weights, ids);
        let mut inputs = Vec::with_capacity(layers.len());
        for i in 0..all {
            if layers.contains(&i) {
                inputs.push(h.select(Axis(0), &from_the_end));
            }
            h = float::layer(&self.weights, i, h, 0, &mut cache, &mut ());
        }
        Ok(Features { inputs, last: h.row(self.window - 1).to_owned() })
    }

    /// What the adapters of these layers read of every text, with its label: computed once, since the model never changes.
    ///
    /// # Errors
    /// As [`TextBackbone::features`].
    pub fn cached_features(&self, set: &[TextExample], layers: &[usize]) -> Result<Vec<(Features, usize)>> {
        set.par_iter().map(|e| Ok((self.features(&e.ids, layers)?, e.label))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODEL: &str = "models/quill-4m";
    const TEXT: &str = "My sister saw the ship and was glad.";

    fn backbone(window: usize) -> TextBackbone {
        TextBackbone::open(Path::new(MODEL), window).unwrap()
    }

    fn message<T: fmt::Debug>(result: Result<T>) -> String {
        result.unwrap_err().to_string()
    }

    #[test]
    fn rows_come_from_the_end() {
        let b = backbone(6);
        let all = b.encode(TEXT).unwrap();
        let ids = b.last_window(TEXT).unwrap();
        assert_eq!(ids, all[all.len() - 6..]);
        let weights = Weights::load(&Checkpoint::open(Path::new(MODEL)).unwrap()).unwrap();
        let got = b.features(&ids, &[6, 7]).unwrap();
        let mut cache = FloatCache::new(&weights.config);
        let mut h = float::embed(&weights, &ids);
        for i in 0..8 {
            if i >= 6 {
                for back in 0..6 {
                    assert_eq!(got.inputs[i - 6].row(back), h.row(5 - back), "layer {i}, {back} tokens back");
                }
            }
            h = float::layer(&weights, i, h, 0, &mut cache, &mut ());
        }
        assert_eq!(got.last, h.row(5));
        assert!(got.inputs.iter().all(|x| x.is_standard_layout() && x.dim() == (6, 192)));
        // It is the whole model: head and all, the same word follows.
        assert_eq!(h, float::hidden(&weights, &ids, &mut FloatCache::new(&weights.config), &mut ()));
    }

    #[test]
    fn short_texts_are_padded_in_front() {
        let b = backbone(32);
        let plain = b.encode(TEXT).unwrap();
        let ids = b.last_window(TEXT).unwrap();
        assert!(plain.len() < 32);
        assert_eq!(ids[32 - plain.len()..], plain);
        // <s>, of config.json.
        assert!(ids[..32 - plain.len()].iter().all(|id| *id == 0));
        // What comes first is seen by all that follow, so the padding is part of the text.
        let (short, long) = (b.features(&ids, &[7]).unwrap(), backbone(31).features(&ids[1..], &[7]).unwrap());
        assert_eq!((short.inputs[0].dim(), long.inputs[0].dim()), ((32, 192), (31, 192)));
        assert_ne!(short.last, long.last);
    }

    #[test]
    fn windows_lie_evenly() {
        let b = backbone(4);
        let ids: Vec<u32> = (0..20).collect();
        let windows = b.windows(&ids, 4);
        assert_eq!(windows.iter().map(|w| w[3]).collect::<Vec<_>>(), [19, 15, 11, 7]);
        assert_eq!(b.windows(&ids, 100).len(), 17);
        assert_eq!(b.windows(&ids[..2], 5), [[0, 0, 0, 1]]);
        assert!(b.windows(&ids, 0).is_empty());
    }

    #[test]
    fn each_token_has_a_name_of_its_own() {
        let b = backbone(4);
        let names: std::collections::BTreeSet<String> = (0..2048).map(|id| b.piece(id)).collect();
        assert_eq!(names.len(), 2048);
        assert!(names.iter().all(|n| !n.chars().any(char::is_control)));
        assert!(names.contains("Ġship"));
        assert_eq!(b.piece(9999), "<9999>");
    }

    #[test]
    fn bad_input_is_refused() {
        let open = |window| message(TextBackbone::open(Path::new(MODEL), window));
        assert!(open(0).contains("1 to 256"), "{}", open(0));
        assert!(open(257).contains("--window"), "{}", open(257));
        assert!(message(TextBackbone::open(Path::new("models/none"), 4)).contains("models/none"));
        let b = backbone(4);
        assert!(message(b.last_window("")).contains("empty"));
        assert!(message(b.features(&[1, 2, 3], &[7])).contains("window of 4"));
        assert!(message(b.features(&[1, 2, 3, 4000], &[7])).contains("vocabulary"));
        for layers in [&[8][..], &[7, 6], &[7, 7]] {
            assert!(message(b.features(&[1, 2, 3, 4], layers)).contains("ascending ones of the model's 8"));
        }
        assert!(!format!("{b:?}").contains("weights"));
    }

    #[test]
    fn adapters_of_other_models_are_refused() {
        let b = backbone(4);
        let config = AdapterConfig {
            hidden: 192,
            rank: 8,
            heads: 2,
            blocks: 1,
            layers: vec![6, 7],
            tokens: 4,
            classes: 2,
            scale: 1.0,
            eps: 1e-6,
            labels: Vec::new(),
        };
        b.check(&config).unwrap();
        let refused = |config: AdapterConfig| message(b.check(&config));
        let hidden = refused(AdapterConfig { hidden: 64, ..config.clone() });
        assert!(hidden.contains("[8, 64]") && hidden.contains("[2048, 192]"), "{hidden}");
        let layers = refused(AdapterConfig { layers: vec![5, 6], ..config.clone() });
        assert!(layers.contains("adapter_layer_*") && layers.contains("[5, 6]"), "{layers}");
        let tokens = refused(AdapterConfig { tokens: 8, ..config });
        assert!(tokens.contains("[8, 8]") && tokens.contains("4 tokens"), "{tokens}");
    }
}
