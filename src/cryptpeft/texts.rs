//! Labelled texts to train adapters of a language model on and to measure them: folders of files, lines of JSON, a text of which
//! the next token is the label, or sentences made from a seed.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;
use serde_json::Value;

use super::sentences;
use super::synthetic::{PARTS, entries, places, shuffle};
use super::text::TextBackbone;
use crate::error::{Error, Result};
use crate::model::calibrate::whole_text;

/// A window of tokens and what it is.
#[derive(Clone, PartialEq)]
pub struct TextExample {
    /// As many as the backbone reads.
    pub ids: Vec<u32>,
    /// Its place in [`TextSet::labels`].
    pub label: usize,
}

impl fmt::Debug for TextExample {
    /// Without the text, which is private.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TextExample").field("tokens", &self.ids.len()).field("label", &self.label).finish()
    }
}

/// Labelled texts, in two parts that share none.
#[derive(Clone, Debug, PartialEq)]
pub struct TextSet {
    /// To learn from.
    pub train: Vec<TextExample>,
    /// To measure on: a fifth of each label's texts.
    pub test: Vec<TextExample>,
    /// Names of the labels.
    pub labels: Vec<String>,
}

/// What the next tokens that are labels are.
#[derive(Clone, Copy, Debug)]
pub enum Vocabulary<'a> {
    /// At most so many, the most frequent ones.
    Most(usize),
    /// These, an adapter's.
    Known(&'a [String]),
}

/// The most texts: features of all are held in memory.
const MOST_TEXTS: usize = 100_000;
/// How often a next token has to come in the part to learn from to be a label.
pub const LEAST: usize = 5;
/// The most windows of a text in the part to learn from, and in the test part.
const MOST_WINDOWS: [usize; 2] = [20_000, 5_000];
/// A text is cut into blocks of so many windows, each of one part as a whole: windows overlap, and so would the parts.
const BLOCK: usize = 8;

impl TextSet {
    /// A directory with one folder of .txt files per label, or a .jsonl file with a text and its label in each line. Which fifth of
    /// each label's texts is the test part is decided by the seed.
    ///
    /// # Errors
    /// [`Error::Config`] naming the file, and the line, that is empty, not UTF-8 or no text with a label, or for too few labels
    /// or texts; [`Error::Io`].
    pub fn read(path: &Path, backbone: &TextBackbone, seed: u64) -> Result<Self> {
        let texts = if path.is_dir() { folders(path, backbone)? } else { lines(path, backbone)? };
        let wrong = |text: String| Err(Error::Config(format!("--texts {}: {text}", path.display())));
        if let (1, Some(only)) = (texts.len(), texts.keys().next()) {
            return wrong(format!("the only label is `{only}`; give texts of two labels at least"));
        }
        if let Some((label, _)) = texts.iter().find(|(_, texts)| texts.len() < 2) {
            return wrong(format!(
                "the label `{label}` has one text; give two at least: one to learn from and one for the test"
            ));
        }
        let mut set = TextSet { train: Vec::new(), test: Vec::new(), labels: texts.keys().cloned().collect() };
        for (label, mut texts) in texts.into_values().enumerate() {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            rng.set_stream(label as u64);
            shuffle(&mut texts, &mut rng);
            let mut examples = texts.into_iter().map(|ids| TextExample { ids, label });
            let of_test = (examples.len() / PARTS).max(1);
            set.test.extend(examples.by_ref().take(of_test));
            set.train.extend(examples);
        }
        Ok(set)
    }

    /// Windows of a text, whose labels are the tokens that come next; windows before other tokens are left out. The text is cut
    /// into blocks, of which a fifth is the test part; which is decided by the seed. Names of labels: [`TextBackbone::piece`].
    ///
    /// # Errors
    /// [`Error::Config`] for a file that is empty, not UTF-8 or too short, and for less than two labels; [`Error::Io`].
    pub fn next_token(path: &Path, backbone: &TextBackbone, labels: Vocabulary<'_>, seed: u64) -> Result<Self> {
        let wrong = |text: String| Err(Error::Config(format!("--next-token {}: {text}", path.display())));
        if let Vocabulary::Most(most @ 0..2) = labels {
            return Err(Error::Config(format!("--vocabulary {most}: give 2 or more labels")));
        }
        let text = whole_text(path, "--next-token")?;
        if text.trim().is_empty() {
            return wrong("is empty; give text to learn from".into());
        }
        let (ids, window) = (backbone.encode(&text)?, backbone.tokens());
        let mut blocks: Vec<&[u32]> = ids.chunks(BLOCK * window).filter(|block| block.len() > window).collect();
        if blocks.len() < 2 {
            return wrong(format!(
                "has {} tokens, but at least {} are needed, of which a part is for the test; give a longer text or a smaller --window",
                ids.len(),
                (BLOCK + 1) * window + 1
            ));
        }
        shuffle(&mut blocks, &mut ChaCha8Rng::seed_from_u64(seed));
        let of_test = (blocks.len() / PARTS).max(1);
        let (test, train) = blocks.split_at(of_test);
        let names: Vec<String> = match labels {
            Vocabulary::Most(most) => frequent(train, window, most).into_iter().map(|id| backbone.piece(id)).collect(),
            Vocabulary::Known(names) => names.to_vec(),
        };
        if names.len() < 2 {
            return wrong(format!(
                "fewer than two tokens come {LEAST} times after a window; give a longer text, or --texts"
            ));
        }
        let place: BTreeMap<&str, usize> = names.iter().enumerate().map(|(n, name)| (name.as_str(), n)).collect();
        let known: BTreeSet<u32> = ids.iter().copied().collect();
        let label = |id: u32| place.get(backbone.piece(id).as_str()).map(|n| (id, *n));
        let label: BTreeMap<u32, usize> = known.into_iter().filter_map(label).collect();
        let part = |blocks: &[&[u32]], most: usize| {
            let all: Vec<(&[u32], usize)> =
                next(blocks, window).filter_map(|(ids, next)| label.get(&next).map(|n| (ids, *n))).collect();
            let every = all.len().div_ceil(most).max(1);
            let example = |(ids, label): (&[u32], usize)| TextExample { ids: ids.to_vec(), label };
            all.into_iter().step_by(every).map(example).collect::<Vec<_>>()
        };
        let (train, test) = (part(train, MOST_WINDOWS[0]), part(test, MOST_WINDOWS[1]));
        if train.is_empty() || test.is_empty() {
            return wrong(format!(
                "no token of one of its two parts is one of the {} labels; give a longer text, and to an adapter one like that which it was trained on",
                names.len()
            ));
        }
        Ok(TextSet { train, test, labels: names })
    }

    /// Sentences made from a seed, `per_class` for each of the [`sentences::LABELS`]. Equal seeds give equal sentences.
    ///
    /// # Errors
    /// [`Error::Config`] for more than there are, or too few; [`Error::Model`] when the tokenizer fails.
    pub fn synthetic(backbone: &TextBackbone, per_class: usize, seed: u64) -> Result<Self> {
        let classes = sentences::LABELS.len();
        let labels = sentences::LABELS.map(str::to_owned).to_vec();
        let mut set = TextSet { train: Vec::new(), test: Vec::new(), labels };
        for (n, (text, label)) in sentences::sentences(per_class, seed)?.into_iter().enumerate() {
            let part = if (n / classes) % PARTS == PARTS - 1 { &mut set.test } else { &mut set.train };
            part.push(TextExample { ids: backbone.last_window(&text)?, label });
        }
        Ok(set)
    }

    /// With the labels in this order, which may have more of them: an adapter's.
    ///
    /// # Errors
    /// [`Error::Config`] naming a label that is not among them.
    pub fn relabelled(mut self, labels: &[String]) -> Result<Self> {
        let places = places(&self.labels, labels)?;
        self.train.iter_mut().chain(&mut self.test).for_each(|e| e.label = places[e.label]);
        self.labels = labels.to_vec();
        Ok(self)
    }
}

/// Windows like those to come, `count` at most: of the texts in a directory and its folders, of a .jsonl file or of one text; or of
/// synthetic sentences, alone and running on. And where they are from, in words.
///
/// # Errors
/// As [`TextSet::read`]; labels are not read.
pub fn samples(path: Option<&Path>, backbone: &TextBackbone, count: usize) -> Result<(Vec<Vec<u32>>, String)> {
    let Some(path) = path else {
        let labels = sentences::LABELS.len();
        let all = sentences::sentences(count.div_ceil(labels).max(PARTS), 0)?;
        let texts: Vec<String> = all.into_iter().map(|(text, _)| text).collect();
        // Of every length that leaves room for begin tokens.
        let alone = (0..count / 2).zip(&texts).map(|(n, text)| {
            let ids = backbone.encode(text)?;
            let long = (1 + n * backbone.tokens() / (count / 2)).min(ids.len());
            Ok(backbone.padded(&ids[ids.len() - long..]))
        });
        let mut windows = alone.collect::<Result<Vec<_>>>()?;
        windows.extend(backbone.windows(&backbone.encode(&texts.join(" "))?, count - count / 2));
        let from =
            format!("{} windows of synthetic texts; --calibrate PATH takes texts like those to come", windows.len());
        return Ok((windows, from));
    };
    let wrong = |text: String| Error::Config(format!("--calibrate {}: {text}", path.display()));
    let mut texts: Vec<(PathBuf, Option<String>)> = Vec::new();
    if path.is_dir() {
        let mut files = text_files(path)?;
        for folder in entries(path)?.into_iter().filter(|p| p.is_dir()) {
            files.extend(text_files(&folder)?);
        }
        files.sort();
        texts.extend(files.into_iter().map(|file| (file, None)));
    } else if is(path, "jsonl") {
        for (number, line) in whole_text(path, "--calibrate")?.lines().enumerate().filter(|(_, l)| !l.trim().is_empty())
        {
            let text = field(line, "text").map_err(|e| wrong(format!("line {}: {e}", number + 1)))?;
            texts.push((path.to_path_buf(), Some(text)));
        }
    } else {
        texts.push((path.to_path_buf(), None));
    }
    if texts.is_empty() {
        return Err(wrong(
            "has no text; give a .txt or .jsonl file, or a directory of .txt files like those to come".into(),
        ));
    }
    let every = texts.len().div_ceil(count.max(1));
    let of_each = count.div_ceil(texts.len());
    let mut windows = Vec::new();
    for (file, text) in texts.into_iter().step_by(every) {
        let text = text.map_or_else(|| whole_text(&file, "--calibrate"), Ok)?;
        let ids = backbone.encode(&text).map_err(|e| wrong(format!("{}: {e}", file.display())))?;
        windows.extend(backbone.windows(&ids, of_each));
    }
    let from = format!("{} windows of {}", windows.len(), path.display());
    Ok((windows, from))
}

/// Every window that lies in a block, and the token after it.
fn next<'a>(blocks: &[&'a [u32]], window: usize) -> impl Iterator<Item = (&'a [u32], u32)> {
    blocks.iter().flat_map(move |block| block.windows(window + 1).map(move |ids| (&ids[..window], ids[window])))
}

/// The tokens that come next most often, the most frequent one first, where it is often enough.
fn frequent(blocks: &[&[u32]], window: usize, most: usize) -> Vec<u32> {
    let mut counts = BTreeMap::<u32, usize>::new();
    for (_, id) in next(blocks, window) {
        *counts.entry(id).or_default() += 1;
    }
    let mut counts: Vec<(u32, usize)> = counts.into_iter().filter(|(_, count)| *count >= LEAST).collect();
    counts.sort_by_key(|(id, count)| (std::cmp::Reverse(*count), *id));
    counts.into_iter().take(most).map(|(id, _)| id).collect()
}

type ByLabel = BTreeMap<String, Vec<Vec<u32>>>;

fn folders(dir: &Path, backbone: &TextBackbone) -> Result<ByLabel> {
    let wrong = |path: &Path, text: &str| Error::Config(format!("--texts {}: {text}", path.display()));
    let mut folders: Vec<PathBuf> = entries(dir)?.into_iter().filter(|path| path.is_dir()).collect();
    folders.sort();
    if folders.len() < 2 {
        return Err(wrong(dir, "give a directory with one folder of .txt files per label, and at least two labels"));
    }
    let (mut all, mut count) = (ByLabel::new(), 0);
    for folder in folders {
        let files = text_files(&folder)?;
        if files.len() < 2 {
            return Err(wrong(&folder, "has fewer than two .txt files: one to learn from and one for the test"));
        }
        count += files.len();
        if count > MOST_TEXTS {
            return Err(wrong(dir, &format!("has more than {MOST_TEXTS} texts; give fewer")));
        }
        let read = |file: PathBuf| {
            let text = whole_text(&file, "--texts")?;
            backbone.last_window(&text).map_err(|e| wrong(&file, &e.to_string()))
        };
        let texts = files.into_iter().map(read).collect::<Result<Vec<_>>>()?;
        let label = folder.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        all.entry(label).or_default().extend(texts);
    }
    Ok(all)
}

fn lines(path: &Path, backbone: &TextBackbone) -> Result<ByLabel> {
    let wrong = |text: String| Error::Config(format!("--texts {}: {text}", path.display()));
    if !is(path, "jsonl") {
        let text =
            "is neither a directory with one folder of .txt files per label nor a .jsonl file; give one of the two";
        return Err(wrong(text.into()));
    }
    let text = whole_text(path, "--texts")?;
    let (mut all, mut count) = (ByLabel::new(), 0);
    for (number, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let wrong = |e: String| wrong(format!("line {}: {e}", number + 1));
        let (text, label) = (field(line, "text").map_err(wrong)?, field(line, "label").map_err(wrong)?);
        let ids = backbone.last_window(&text).map_err(|e| wrong(e.to_string()))?;
        all.entry(label).or_default().push(ids);
        count += 1;
        if count > MOST_TEXTS {
            return Err(wrong(format!("there are more than {MOST_TEXTS} texts; give fewer")));
        }
    }
    if all.is_empty() {
        return Err(wrong("is empty; give a line for each text: {\"text\": \"..\", \"label\": \"..\"}".into()));
    }
    Ok(all)
}

/// A field of a line of JSON; a label may be a whole number too. No error quotes the line.
fn field(line: &str, name: &str) -> std::result::Result<String, String> {
    const FORM: &str = "give {\"text\": \"..\", \"label\": \"..\"}";
    let value: Value =
        serde_json::from_str(line).map_err(|e| format!("is no JSON from column {} on; {FORM}", e.column()))?;
    match value.get(name) {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(Value::Number(n)) if name == "label" && (n.is_u64() || n.is_i64()) => Ok(n.to_string()),
        Some(_) => Err(format!("\"{name}\" is no text in quotes; {FORM}")),
        None => Err(format!("has no field \"{name}\"; {FORM}")),
    }
}

fn is(path: &Path, ending: &str) -> bool {
    path.extension().is_some_and(|e| e.eq_ignore_ascii_case(ending))
}

/// The .txt files directly in `dir`, in the order of their names.
fn text_files(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut all: Vec<PathBuf> = entries(dir)?.into_iter().filter(|path| is(path, "txt")).collect();
    all.sort();
    Ok(all)
}
