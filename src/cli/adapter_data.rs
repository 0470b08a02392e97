//! The public models that adapters are over, and labelled data for them: images of a vision transformer, texts of a language model.

use std::path::{Path, PathBuf};

use trefoil::cryptpeft::texts::{self, Vocabulary};
use trefoil::cryptpeft::{
    AdapterConfig, AdapterWeights, Dataset, Example, Features, Preprocess, TextBackbone, TextExample, TextSet, Vit,
    cached_features, synthetic,
};
use trefoil::error::{Error, Result};

use super::{CALIBRATION, SPLIT};

/// The public model: one of the two.
#[derive(clap::Args)]
#[group(required = true, multiple = false)]
pub struct Public {
    /// For images: the public vision transformer, a directory with model.safetensors and config.json.
    #[arg(long, value_name = "DIR")]
    backbone: Option<PathBuf>,
    /// For texts: the public language model, a Hugging Face directory such as models/quill-4m.
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
}

/// Labelled images or texts.
#[derive(clap::Args)]
pub struct Labelled {
    #[command(flatten)]
    images: super::Data,
    /// With --model, labelled texts: a directory with one folder of .txt files per label, or a .jsonl file of lines {"text": "..",
    /// "label": ".."}. A fifth of each label's is for the test.
    #[arg(long, value_name = "PATH", conflicts_with_all = ["next_token", "synthetic_text"])]
    texts: Option<PathBuf>,
    /// With --model: a text in UTF-8, of which windows are read and the label is the token that comes next. A fifth of its blocks
    /// of eight windows is for the test.
    #[arg(long, value_name = "FILE", conflicts_with = "synthetic_text")]
    next_token: Option<PathBuf>,
    /// With --model: sentences made from this seed instead, of two topics and two moods.
    #[arg(long, value_name = "SEED")]
    synthetic_text: Option<u64>,
}

impl Labelled {
    fn any_texts(&self) -> bool {
        self.texts.is_some() || self.next_token.is_some() || self.synthetic_text.is_some()
    }
}

/// Images or texts with their labels.
pub enum Examples {
    Images(Vec<Example>),
    Texts(Vec<TextExample>),
}

impl Examples {
    pub fn len(&self) -> usize {
        match self {
            Examples::Images(all) => all.len(),
            Examples::Texts(all) => all.len(),
        }
    }

    /// Some of them, to calibrate on.
    pub fn some(&self) -> Self {
        let every = self.len().div_ceil(CALIBRATION).max(1);
        match self {
            Examples::Images(all) => Examples::Images(all.iter().step_by(every).cloned().collect()),
            Examples::Texts(all) => Examples::Texts(all.iter().step_by(every).cloned().collect()),
        }
    }
}

/// Labelled data in its two parts.
pub struct Set {
    pub train: Examples,
    pub test: Examples,
    pub labels: Vec<String>,
}

impl From<Dataset> for Set {
    fn from(Dataset { train, test, labels }: Dataset) -> Self {
        Set { train: Examples::Images(train), test: Examples::Images(test), labels }
    }
}

impl From<TextSet> for Set {
    fn from(TextSet { train, test, labels }: TextSet) -> Self {
        Set { train: Examples::Texts(train), test: Examples::Texts(test), labels }
    }
}

/// A public model, opened.
pub enum Backbone {
    Images(Box<(Vit, Preprocess)>),
    Texts(Box<TextBackbone>),
}

impl Backbone {
    /// To train an adapter that reads `window` tokens of a text.
    #[cfg(feature = "train")]
    pub fn open(public: &Public, window: Option<usize>) -> Result<Self> {
        /// About two sentences.
        const WINDOW: usize = 32;
        match (&public.model, window) {
            (Some(dir), n) => Ok(Backbone::Texts(Box::new(TextBackbone::open(dir, n.unwrap_or(WINDOW))?))),
            (None, None) => public.vit(),
            (None, Some(n)) => Err(Error::Config(format!(
                "--window {n} goes with --model DIR: a vision transformer says itself how many tokens an image has; leave it out"
            ))),
        }
    }

    /// What it reads, in words: one of it.
    pub fn noun(&self) -> &'static str {
        match self {
            Backbone::Images(_) => "image",
            Backbone::Texts(_) => "text",
        }
    }

    /// How many layers it has.
    #[cfg(feature = "train")]
    pub fn layers(&self) -> usize {
        match self {
            Backbone::Images(b) => b.0.config().layers,
            Backbone::Texts(b) => b.config().num_layers,
        }
    }

    /// The data that the options name, with the labels of an adapter, or else new ones: of next tokens at most `vocabulary`.
    pub fn load(&self, data: &Labelled, known: &[String], vocabulary: usize) -> Result<Set> {
        let wrong = |text: &str| Err(Error::Config(text.into()));
        match self {
            Backbone::Images(_) if data.any_texts() => wrong(
                "--texts, --next-token and --synthetic-text go with --model DIR, a language model; with --backbone give --images DIR or --synthetic SEED",
            ),
            Backbone::Images(b) => {
                let set = data.images.load(&b.0, &b.1)?;
                Ok(if known.is_empty() { set } else { set.relabelled(known)? }.into())
            }
            Backbone::Texts(_) if data.images.images.is_some() || data.images.synthetic.is_some() => wrong(
                "--images and --synthetic go with --backbone DIR, a vision transformer; with --model give --texts PATH, --next-token FILE or --synthetic-text SEED",
            ),
            Backbone::Texts(b) => {
                let set = match (&data.texts, &data.next_token, data.synthetic_text) {
                    (Some(path), ..) => TextSet::read(path, b, SPLIT)?,
                    (_, Some(file), _) => {
                        let of = if known.is_empty() { Vocabulary::Most(vocabulary) } else { Vocabulary::Known(known) };
                        return Ok(TextSet::next_token(file, b, of, SPLIT)?.into());
                    }
                    (.., Some(seed)) => TextSet::synthetic(b, data.images.per_class, seed)?,
                    _ => {
                        return wrong(
                            "no texts: give --texts PATH (one folder of them per label, or a .jsonl file), --next-token FILE or --synthetic-text SEED",
                        );
                    }
                };
                Ok(if known.is_empty() { set } else { set.relabelled(known)? }.into())
            }
        }
    }

    /// What the adapters of these layers read of each, with its label.
    pub fn features(&self, examples: &Examples, layers: &[usize]) -> Result<Vec<(Features, usize)>> {
        match (self, examples) {
            (Backbone::Images(b), Examples::Images(all)) => cached_features(&b.0, all, layers),
            (Backbone::Texts(b), Examples::Texts(all)) => b.cached_features(all, layers),
            _ => Err(Error::Internal("images and texts mixed".into())),
        }
    }

    /// What ranges are calibrated on: images or texts of `path`, or synthetic ones; and where they are from, in words.
    pub fn samples(&self, path: Option<&Path>, layers: &[usize]) -> Result<(Vec<Features>, String)> {
        match self {
            Backbone::Images(b) => {
                let (pixels, from) = match path {
                    Some(dir) => images_of(dir, &b.1)?,
                    None => images_made(&b.0, &b.1)?,
                };
                Ok((pixels.iter().map(|p| b.0.features(p, layers)).collect::<Result<_>>()?, from))
            }
            Backbone::Texts(b) => {
                let (windows, from) = texts::samples(path, b, CALIBRATION)?;
                Ok((windows.iter().map(|ids| b.features(ids, layers)).collect::<Result<_>>()?, from))
            }
        }
    }
}

impl Public {
    fn vit(&self) -> Result<Backbone> {
        let none = || Error::Config("no public model: give --backbone DIR for images or --model DIR for texts".into());
        let (vit, preprocess) = super::backbone(self.backbone.as_ref().ok_or_else(none)?)?;
        Ok(Backbone::Images(Box::new((vit, preprocess))))
    }

    /// The model with an adapter of it. How many tokens are read of a text, the adapter says.
    pub fn with_adapter(&self, dir: &Path) -> Result<(Backbone, AdapterConfig, AdapterWeights)> {
        if let Some(model) = &self.model {
            let (config, weights) = AdapterWeights::open(dir, None)?;
            let backbone = TextBackbone::open(model, config.tokens)?;
            backbone.check(&config)?;
            return Ok((Backbone::Texts(Box::new(backbone)), config, weights));
        }
        let backbone = self.vit()?;
        let vit = match &backbone {
            Backbone::Images(b) => &b.0,
            Backbone::Texts(_) => return Err(Error::Internal("a language model for images".into())),
        };
        let (config, weights) = AdapterWeights::open(dir, Some(vit.tokens()))?;
        config.check_backbone(vit.config())?;
        Ok((backbone, config, weights))
    }
}

type Pixels = Vec<ndarray::Array3<f32>>;

/// Of a directory and the folders in it.
fn images_of(dir: &Path, preprocess: &Preprocess) -> Result<(Pixels, String)> {
    let mut files = synthetic::images(dir)?;
    let listed = std::fs::read_dir(dir).map_err(|e| Error::io(dir.display().to_string(), e))?;
    let mut folders: Vec<PathBuf> = listed.flatten().map(|e| e.path()).filter(|p| p.is_dir()).collect();
    folders.sort();
    for folder in folders {
        files.extend(synthetic::images(&folder)?);
    }
    if files.is_empty() {
        let text = "has no PNG or JPEG files; give a directory of images like those to come";
        return Err(Error::Config(format!("--calibrate {}: {text}", dir.display())));
    }
    let every = files.len().div_ceil(CALIBRATION);
    let files: Vec<&PathBuf> = files.iter().step_by(every).collect();
    let pixels = files.iter().map(|file| preprocess.file(file)).collect::<Result<Vec<_>>>()?;
    Ok((pixels, format!("{} images of {}", files.len(), dir.display())))
}

fn images_made(vit: &Vit, preprocess: &Preprocess) -> Result<(Pixels, String)> {
    let labels = synthetic::SHAPES.len();
    // A fifth of them is for a test that there is not.
    let set = Dataset::synthetic(vit.config().image, labels, CALIBRATION.div_ceil(labels) + 1, SPLIT)?;
    let set = set.normalised(preprocess);
    let pixels: Vec<_> = set.train.into_iter().take(CALIBRATION).map(|e| e.pixels).collect();
    let text = format!("{} synthetic images; --calibrate DIR takes images like those to come", pixels.len());
    Ok((pixels, text))
}
