//! What a model is trained on: text, chats, or a built-in task, as tokens of which some are to be predicted, split by the seed into
//! a part to train on and a part held out.

use std::path::{Path, PathBuf};

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use super::chat::pieces;
use super::tasks::Task;
use crate::error::{Error, Result};
use crate::model::chat::ChatTemplate;
use crate::model::{ModelConfig, TextCodec, calibrate};

/// One sequence of tokens.
#[derive(Clone, PartialEq)]
pub struct Example {
    /// The tokens.
    pub ids: Vec<u32>,
    /// Which of them the model is to predict from those before; never the first.
    pub learned: Vec<bool>,
}

impl std::fmt::Debug for Example {
    /// Without the text, which is private.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let learned = self.learned.iter().filter(|l| **l).count();
        f.debug_struct("Example").field("tokens", &self.ids.len()).field("learned", &learned).finish()
    }
}

impl Example {
    /// Of pieces, each with whether it is to be predicted.
    fn new(pieces: &[(Vec<u32>, bool)]) -> Self {
        let ids: Vec<u32> = pieces.iter().flat_map(|(ids, _)| ids.iter().copied()).collect();
        let mut learned: Vec<bool> = pieces.iter().flat_map(|(ids, l)| ids.iter().map(move |_| *l)).collect();
        if let Some(first) = learned.first_mut() {
            *first = false;
        }
        Example { ids, learned }
    }

    /// Its first `len` tokens.
    fn truncate(&mut self, len: usize) {
        self.ids.truncate(len);
        self.learned.truncate(len);
    }

    /// Where a token is predicted that is learned, and that token.
    pub fn predictions(&self) -> impl Iterator<Item = (usize, u32)> {
        let learned = self.learned.iter().zip(&self.ids).enumerate().skip(1).filter(|(_, (learned, _))| **learned);
        learned.map(|(i, (_, id))| (i - 1, *id))
    }
}

/// Examples that are run together, one after the other without padding. The last token of each predicts nothing and is left out.
#[derive(Clone, PartialEq)]
pub struct Batch {
    /// All tokens.
    pub ids: Vec<u32>,
    /// Where examples start in `ids`, and the end.
    pub starts: Vec<usize>,
    /// After which tokens a learned one comes.
    pub rows: Vec<u32>,
    /// That token.
    pub targets: Vec<u32>,
}

impl std::fmt::Debug for Batch {
    /// Without the text, which is private.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Batch").field("starts", &self.starts).finish_non_exhaustive()
    }
}

impl Batch {
    /// Of these examples.
    #[must_use]
    pub fn new<'a>(examples: impl IntoIterator<Item = &'a Example>) -> Self {
        let mut batch = Batch { ids: Vec::new(), starts: vec![0], rows: Vec::new(), targets: Vec::new() };
        for example in examples {
            let start = batch.ids.len();
            batch.ids.extend(&example.ids[..example.ids.len() - 1]);
            batch.starts.push(batch.ids.len());
            for (row, id) in example.predictions() {
                batch.rows.push((start + row) as u32);
                batch.targets.push(id);
            }
        }
        batch
    }
}

/// Where data comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A built-in task.
    Task(Task),
    /// A text file, a JSONL file of chats (`*.jsonl`), or a directory of text files.
    Path(PathBuf),
}

impl Source {
    /// `task:NAME` or a path.
    ///
    /// # Errors
    /// [`Error::Config`] for a task that there is not.
    pub fn parse(text: &str) -> Result<Self> {
        match text.strip_prefix("task:") {
            Some(name) => Task::parse(name).map(Source::Task),
            None => Ok(Source::Path(PathBuf::from(text))),
        }
    }
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Source::Task(task) => write!(f, "task:{}", task.name()),
            Source::Path(path) => path.display().fmt(f),
        }
    }
}

/// How much of it is taken, and how.
#[derive(Clone, Copy, Debug)]
pub struct DataOptions {
    /// Longest example, in tokens; longer ones are cut there, text into windows of this length.
    pub context: usize,
    /// How many examples of a task to train on.
    pub examples: usize,
    /// Of the split, of the order and of the built-in tasks.
    pub seed: u64,
}

/// Data, split.
#[derive(Clone, Debug)]
pub struct Dataset {
    /// To train on.
    pub train: Vec<Example>,
    /// To measure on; a tenth of text and chats.
    pub held_out: Vec<Example>,
    /// Whether an answer is right or wrong as a whole: tasks only.
    pub exact: bool,
    /// How many examples were longer than the context and cut.
    pub cut: usize,
}

/// How many examples of a task are held out.
const HELD_OUT: usize = 512;

impl Dataset {
    /// Reads or makes the data, with the tokenizer in `base`.
    ///
    /// # Errors
    /// [`Error::Config`] for data that is empty, too little to split, not UTF-8, no chat, or without a chat template to render it.
    pub fn load(source: &Source, base: &Path, c: &ModelConfig, options: &DataOptions) -> Result<Dataset> {
        let codec = TextCodec::open(base)?;
        let end = c.eos_ids.first().copied();
        let (examples, given, exact) = match source {
            Source::Task(task) => {
                let end = end.ok_or_else(|| {
                    Error::Config("--data: a task needs a model with an end token (eos_token_id in config.json)".into())
                })?;
                let pairs = task.examples(options.examples.saturating_add(HELD_OUT), options.seed);
                let encode = |(prompt, answer): &(String, String)| {
                    let mut ids = codec.encode_plain(answer)?;
                    ids.push(end);
                    Ok(Example::new(&[(codec.encode(prompt)?, false), (ids, true)]))
                };
                (pairs.iter().map(encode).collect::<Result<Vec<_>>>()?, Some(HELD_OUT), true)
            }
            Source::Path(path) => {
                let (files, chat_files): (Vec<_>, Vec<_>) =
                    files(path)?.into_iter().partition(|f| f.extension().is_none_or(|e| e != "jsonl"));
                let mut examples = Vec::new();
                for file in &chat_files {
                    examples.extend(chats(file, base, &codec)?);
                }
                if !files.is_empty() || chat_files.is_empty() {
                    let texts = files.iter().map(|file| calibrate::whole_text(file, "--data"));
                    let text = texts.collect::<Result<Vec<_>>>()?.join("\n\n");
                    examples.extend(windows(&text, path, &codec, options.context)?);
                }
                (examples, None, false)
            }
        };
        split(examples, given, exact, options)
    }
}

fn split(mut examples: Vec<Example>, given: Option<usize>, exact: bool, options: &DataOptions) -> Result<Dataset> {
    let mut cut = 0;
    for example in &mut examples {
        if example.ids.len() > options.context {
            example.truncate(options.context);
            cut += 1;
        }
    }
    examples.retain(|e| e.predictions().next().is_some());
    shuffle(&mut examples, options.seed, SPLIT_STREAM);
    let most = examples.len().saturating_sub(1);
    let held_out = given.unwrap_or_else(|| examples.len().div_ceil(10)).min(most);
    if held_out == 0 {
        return Err(Error::Config(format!(
            "--data: {} examples with something to learn within {} tokens, which cannot be split into some to train on and some to hold out; give more, or a longer --context",
            examples.len(),
            options.context
        )));
    }
    let train = examples.split_off(held_out);
    Ok(Dataset { train, held_out: examples, exact, cut })
}

/// The stream of the seed that the split is drawn from; the order within epoch `e` has stream `e`.
const SPLIT_STREAM: u64 = 1 << 41;

/// Fisher and Yates, by a stream of the seed.
pub(super) fn shuffle<T>(items: &mut [T], seed: u64, stream: u64) {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(stream);
    for i in (1..items.len()).rev() {
        items.swap(i, below(&mut rng, i + 1));
    }
}

/// A number below `n`, evenly but for 2^-32 or so.
pub(super) fn below(rng: &mut ChaCha8Rng, n: usize) -> usize {
    ((u128::from(rng.next_u64()) * n as u128) >> 64) as usize
}

/// A file, or all the files directly in a directory, in the order of their names.
fn files(path: &Path) -> Result<Vec<PathBuf>> {
    let failed = |e| Error::io(format!("--data {}", path.display()), e);
    if !path.is_dir() {
        return Ok(vec![path.to_path_buf()]);
    }
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let hidden = entry.file_name().to_string_lossy().starts_with('.');
        if entry.path().is_file() && !hidden {
            files.push(entry.path());
        }
    }
    files.sort();
    Ok(files)
}

/// Text as windows of at most `context` tokens.
fn windows(text: &str, path: &Path, codec: &TextCodec, context: usize) -> Result<Vec<Example>> {
    if text.trim().is_empty() {
        return Err(Error::Config(format!("--data {}: is empty; give text to learn from", path.display())));
    }
    let start = codec.encode("")?;
    let ids = codec.encode_plain(text)?;
    let room = context.saturating_sub(start.len()).max(2);
    let window = |ids: &[u32]| Example::new(&[(start.clone(), false), (ids.to_vec(), true)]);
    Ok(ids.chunks(room).map(window).collect())
}

/// The chats of a JSONL file, one a line: `{"messages": [{"role": .., "content": ..}, ..]}`. What the assistant says is learned.
fn chats(path: &Path, base: &Path, codec: &TextCodec) -> Result<Vec<Example>> {
    let text = calibrate::whole_text(path, "--data")?;
    if text.trim().is_empty() {
        return Err(Error::Config(format!("--data {}: is empty; give chats to learn from", path.display())));
    }
    let template = ChatTemplate::open(base)?.ok_or_else(|| {
        Error::Config(format!(
            "--data: chats need a chat template, and {} has none (chat_template.jinja, or chat_template in tokenizer_config.json); give a base that has one (instruction-tuned models do), or plain text",
            base.display()
        ))
    })?;
    let mut examples = Vec::new();
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let wrong = |e: String| Error::Config(format!("--data {}: line {}: {e}", path.display(), number + 1));
        let pieces = pieces(&template, line).map_err(wrong)?;
        // The template writes begin and end tokens itself.
        let encode = |(text, learned): &(String, bool)| Ok((codec.encode_plain(text)?, *learned));
        examples.push(Example::new(&pieces.iter().map(encode).collect::<Result<Vec<_>>>()?));
    }
    Ok(examples)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chats_are_rendered_by_the_template_and_answers_learned() {
        let base = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/models/quill-4m"));
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("chats.jsonl");
        let line = |i: usize| {
            let (asked, said) = (format!("Say {i}."), format!("It is {i}."));
            serde_json::json!({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]})
        };
        std::fs::write(&file, (0..20).map(|i| format!("{}\n", line(i))).collect::<String>()).unwrap();
        let options = DataOptions { context: 64, examples: 1, seed: 1 };
        let config = ModelConfig::open(base).unwrap();
        let data = Dataset::load(&Source::Path(dir.path().into()), base, &config, &options).unwrap();
        assert_eq!((data.train.len(), data.held_out.len(), data.cut, data.exact), (18, 2, 0, false));
        let codec = TextCodec::open(base).unwrap();
        for example in data.train.iter().chain(&data.held_out) {
            let learned = |learned: bool| -> Vec<u32> {
                example.ids.iter().zip(&example.learned).filter(|(_, l)| **l == learned).map(|(id, _)| *id).collect()
            };
            let text = |ids: Vec<u32>| codec.decode(&ids).unwrap();
            assert!(text(learned(true)).contains("It is "), "{:?}", text(learned(true)));
            assert!(text(learned(false)).contains("Say "), "{:?}", text(learned(false)));
            assert!(!text(learned(true)).contains("Say "));
        }
    }

    #[test]
    fn a_batch_predicts_what_is_learned_and_nothing_else() {
        let a = Example::new(&[(vec![5, 6], false), (vec![7, 8], true)]);
        let b = Example::new(&[(vec![9, 4, 3], true)]);
        let batch = Batch::new([&a, &b]);
        assert_eq!(batch.ids, [5, 6, 7, 9, 4]);
        assert_eq!(batch.starts, [0, 3, 5]);
        assert_eq!(batch.rows, [1, 2, 3, 4]);
        assert_eq!(batch.targets, [7, 8, 4, 3]);
    }

    #[test]
    fn a_shuffle_follows_seed_and_stream() {
        let shuffled = |seed, stream| {
            let mut items: Vec<usize> = (0..50).collect();
            shuffle(&mut items, seed, stream);
            items
        };
        assert_eq!(shuffled(1, 2), shuffled(1, 2));
        assert_ne!(shuffled(1, 2), shuffled(1, 3));
        assert_ne!(shuffled(1, 2), shuffled(2, 2));
        let mut all = shuffled(1, 2);
        all.sort_unstable();
        assert_eq!(all, (0..50).collect::<Vec<_>>());
    }
}
