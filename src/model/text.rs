//! Text to token ids and back, by the checkpoint's `tokenizer.json`, and the same piece by piece while an answer is
//! being generated.

use std::path::Path;

use tokenizers::Tokenizer;

use super::config::ModelConfig;
use super::config_json::Json;
use super::files;
use crate::error::{Error, Result};

const TOKENIZER: &str = "tokenizer.json";
/// The largest `tokenizer.json` that is read, in bytes.
const TOKENIZER_LIMIT: u64 = 256 << 20;
/// The largest `tokenizer_config.json` that is read, in bytes.
const CONFIG_LIMIT: u64 = 16 << 20;
/// With how many ids of the prompt the first token of an answer is decoded.
const LOOK_BACK: usize = 6;
/// What bytes that are no character (yet) decode to.
const BROKEN: char = '\u{FFFD}';
/// A character is at most 4 bytes, so at most 4 byte tokens: a piece that is still broken after that many stays broken.
const CHARACTER_TOKENS: usize = 4;

/// The tokenizer of a model.
pub struct TextCodec {
    tokenizer: Tokenizer,
    config: ModelConfig,
    /// Put before every text, where the configuration asks for it and the post-processor does not do it.
    prepend: Option<u32>,
    what: String,
}

impl std::fmt::Debug for TextCodec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TextCodec").field("file", &self.what).field("prepend", &self.prepend).finish_non_exhaustive()
    }
}

impl TextCodec {
    /// Reads `tokenizer.json` in `dir`, with `config.json` and, where there is one, `tokenizer_config.json`.
    ///
    /// # Errors
    /// [`Error::Model`] naming the file and what is wrong with it; [`Error::Io`] when it cannot be read.
    pub fn open(dir: &Path) -> Result<Self> {
        let config = ModelConfig::open(dir)?;
        let what = dir.join(TOKENIZER).display().to_string();
        let bytes = TextCodec::file(dir)?;
        let mut tokenizer = guarded(&what, || Tokenizer::from_bytes(&bytes))?
            .map_err(|e| Error::Model(format!("{what}: is not a tokenizer of the `tokenizers` library ({e}); fetch it again from where the model comes from")))?;
        // As transformers does: these two are leftovers of training, a prompt is neither cut nor filled up.
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|e| Error::Model(format!("{what}: {e}")))?;

        let mut codec = TextCodec { tokenizer, config, prepend: None, what };
        let config_path = dir.join("tokenizer_config.json");
        if let Some(bytes) = files::read_optional(&config_path, CONFIG_LIMIT)? {
            codec.prepend = codec.prepended(&Json::parse(&bytes, config_path.display().to_string())?)?;
        }
        Ok(codec)
    }

    /// The bytes of `tokenizer.json` in `dir`.
    ///
    /// # Errors
    /// As [`TextCodec::open`].
    pub fn file(dir: &Path) -> Result<Vec<u8>> {
        let remedy = "convert the tokenizer with transformers (AutoTokenizer.from_pretrained(dir, use_fast=True).save_pretrained(dir))";
        files::read_required(&dir.join(TOKENIZER), TOKENIZER_LIMIT, remedy)
    }

    /// The begin token that `tokenizer_config.json` asks for, unless the post-processor adds one by itself: one that
    /// adds anything adds it to the empty text too.
    fn prepended(&self, json: &Json) -> Result<Option<u32>> {
        if !json.flag_or("add_bos_token", false)? || !self.raw_encode("", true)?.is_empty() {
            return Ok(None);
        }
        let id = match json.token("bos_token") {
            Some(token) => self.tokenizer.token_to_id(token),
            None => self.config.bos_id,
        };
        id.map(Some).ok_or_else(|| {
            json.wrong(
                "add_bos_token",
                "is set, but there is no bos_token that the tokenizer knows; set one, or set add_bos_token to false",
            )
        })
    }

    /// The token ids of `text`, with the special tokens that the model expects around it.
    ///
    /// # Errors
    /// [`Error::Model`] when the tokenizer fails or makes an id that the model does not have.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = self.raw_encode(text, true)?;
        if let Some(bos) = self.prepend {
            ids.insert(0, bos);
        }
        self.checked(ids)
    }

    /// The token ids of `text` alone, to be joined to others. Special tokens that are written out in it are recognised.
    ///
    /// # Errors
    /// As [`TextCodec::encode`].
    pub fn encode_plain(&self, text: &str) -> Result<Vec<u32>> {
        self.checked(self.raw_encode(text, false)?)
    }

    fn checked(&self, ids: Vec<u32>) -> Result<Vec<u32>> {
        self.config.check_ids(&ids).map_err(|e| Error::Model(format!("{}: {e}", self.what)))?;
        Ok(ids)
    }

    fn raw_encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        // Without the cause: it could quote the text, and no error may carry a prompt.
        let encoding = guarded(&self.what, || self.tokenizer.encode_fast(text, special))?;
        let encoding = encoding.map_err(|_| {
            Error::Model(format!(
                "{}: cannot encode this text; the tokenizer lacks a token for the unknown, or is broken",
                self.what
            ))
        })?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of `ids`, special tokens left out. Ids that the tokenizer does not know (models pad their vocabulary)
    /// are left out too; bytes that are no UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// [`Error::Model`] when the tokenizer fails.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        guarded(&self.what, || self.tokenizer.decode(ids, true))?
            .map_err(|_| Error::Model(format!("{}: cannot decode these tokens; the tokenizer is broken", self.what)))
    }

    /// Begins decoding an answer token by token, which continues the text `before` (the prompt's ids; empty if there is
    /// none): some decoders drop the space before the first word of a text, and only of that.
    ///
    /// # Errors
    /// As [`TextCodec::decode`].
    pub fn stream(&self, before: &[u32]) -> Result<TextStream> {
        let mut stream = TextStream { ids: Vec::new(), shown_ids: 0, shown: String::new(), held: 0 };
        for more in 0..CHARACTER_TOKENS {
            let from = before.len().saturating_sub(LOOK_BACK + more);
            stream.ids = before[from..].to_vec();
            stream.shown_ids = stream.ids.len();
            stream.shown = self.decode(&stream.ids)?;
            // Begin between two characters.
            if !stream.shown.starts_with(BROKEN) {
                break;
            }
        }
        Ok(stream)
    }

    /// The text of the special or ordinary token `id`, if the tokenizer knows it.
    #[must_use]
    pub fn token(&self, id: u32) -> Option<String> {
        self.tokenizer.id_to_token(id)
    }

    /// The number of tokens that the tokenizer knows, added ones included.
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        self.tokenizer.get_vocab_size(true)
    }
}

/// Runs the `tokenizers` library, which trusts its file: with a few kinds of inconsistent one it panics.
fn guarded<T>(what: &str, run: impl FnOnce() -> T) -> Result<T> {
    let broken = |_| {
        Error::Model(format!(
            "{what}: is inconsistent, the `tokenizers` library fails on it; fetch it again from where the model comes from"
        ))
    };
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).map_err(broken)
}

/// Decodes one token after another into pieces of text that never break a character; together they are the answer.
#[derive(Clone)]
pub struct TextStream {
    /// The ids of the last piece, then those whose text was not shown yet. A piece ends between two characters, so the
    /// ids from any piece on decode by themselves; the last one is kept so that the next is not the start of a text.
    ids: Vec<u32>,
    /// How many of `ids` were shown.
    shown_ids: usize,
    /// Their text.
    shown: String,
    /// For how many tokens an incomplete character has been held back.
    held: usize,
}

impl std::fmt::Debug for TextStream {
    /// Without the text, which is private.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TextStream").field("held", &self.held).finish_non_exhaustive()
    }
}

impl TextStream {
    /// Adds a token; returns the text that it completes, empty while a character is incomplete.
    ///
    /// # Errors
    /// As [`TextCodec::decode`].
    pub fn push(&mut self, codec: &TextCodec, id: u32) -> Result<String> {
        self.ids.push(id);
        let text = codec.decode(&self.ids)?;
        if text.len() > self.shown.len() && text.ends_with(BROKEN) && self.held + 1 < CHARACTER_TOKENS {
            self.held += 1;
            return Ok(String::new());
        }
        self.show(codec, &text)
    }

    /// Ends the answer; returns what was held back, an incomplete character as U+FFFD.
    ///
    /// # Errors
    /// As [`TextCodec::decode`].
    pub fn finish(&mut self, codec: &TextCodec) -> Result<String> {
        let text = codec.decode(&self.ids)?;
        self.show(codec, &text)
    }

    fn show(&mut self, codec: &TextCodec, text: &str) -> Result<String> {
        // What was shown cannot be taken back: where it was broken and now reads otherwise, go on after as many characters.
        let piece: String = match text.strip_prefix(self.shown.as_str()) {
            Some(piece) => piece.to_owned(),
            None => text.chars().skip(self.shown.chars().count()).collect(),
        };
        if !piece.is_empty() {
            self.ids.drain(..self.shown_ids);
            self.shown_ids = self.ids.len();
            self.shown = codec.decode(&self.ids)?;
            self.held = 0;
        }
        Ok(piece)
    }
}
