//! From a checkpoint to a preparation: calibration, the public plan, a fresh seed and the Owner's part. The only way there
//! is, for three parties in one process and for `trefoil prepare`.

use std::ops::Range;
use std::path::{Path, PathBuf};

use super::prepare::Prepared;
use super::progress::{Progress, Stage};
use super::rounding::Choice;
use super::variant::{FILE, Record};
use super::{Adapter, Checkpoint, Layered, ModelConfig, Streamed, TextCodec, Weights, calibrate, weights};
use crate::error::{Error, Result};
use crate::net::shape::Profile;
use crate::plan::{self, Bounds, Plan, Ranges, Setting};
use crate::prf::PreparationSeed;

/// What the provider decides.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Private layers; `None` is all of them and the embedding.
    pub private_layers: Option<usize>,
    /// Limit on positions: prompt and answer together, but for the answer's last token. Shortens the model's own context.
    pub max_positions: Option<usize>,
    /// The public base: where its final norm and head are this model's bit for bit, they are public.
    pub base: Option<PathBuf>,
    /// An adapter over the model, which is then its public base.
    pub adapter: Option<PathBuf>,
    /// Text for calibration instead of the built-in one.
    pub calibration_text: Option<String>,
    /// The network that the parties are to be on, as far as it is known: the plan is made for it.
    pub net: Option<Profile>,
    /// Cores of each party, as far as they are known: the plan is made for them.
    pub cores: Option<usize>,
    /// Who is told how far it is.
    pub progress: Progress,
}

/// Which part of a model is private.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Split {
    /// The first private layer.
    pub first_private: usize,
    /// The embedding is private too.
    pub private_embedding: bool,
    /// Final norm and head are public.
    pub public_head: bool,
}

/// `N` or `all` into the first private layer and whether the embedding is private.
///
/// # Errors
/// [`Error::Config`] if the model has fewer layers.
pub fn split_layers(c: &ModelConfig, private_layers: Option<usize>) -> Result<(usize, bool)> {
    match private_layers {
        None => Ok((0, true)),
        Some(n) if n <= c.num_layers => Ok((c.num_layers - n, false)),
        Some(n) => Err(Error::Config(format!(
            "--private-layers {n}: the model has {} layers; give 0 to {} or 'all'",
            c.num_layers, c.num_layers
        ))),
    }
}

/// As [`split_layers`], of these weights: with an adapter the embedding is the base's, hence public, and every adapted layer private.
///
/// # Errors
/// [`Error::Config`] if the model has fewer layers, or an adapter in a layer that would be public.
pub fn split_weights(w: &dyn Layered, private_layers: Option<usize>) -> Result<(usize, bool)> {
    let layers = w.rest().config.num_layers;
    let (first_private, private_embedding) = split_layers(&w.rest().config, private_layers)?;
    match w.first_adapted() {
        None => Ok((first_private, private_embedding)),
        Some(adapted) if first_private > adapted => Err(Error::Config(format!(
            "--private-layers {}: layer {adapted} has an adapter, which is private: give {} or more, or leave the option out",
            layers - first_private,
            layers - adapted
        ))),
        Some(_) => Ok((first_private, false)),
    }
}

/// All weights of the checkpoint in `dir`, with the adapter in the directory `adapter` beside them.
///
/// # Errors
/// [`Error::Model`] for either.
pub fn adapted(checkpoint: &Checkpoint, dir: &Path, adapter: Option<&Path>, progress: &Progress) -> Result<Weights> {
    if adapter.is_some() {
        Record::check_public(dir)?;
    }
    // First the adapter, which is small: what is wrong with it need not wait for the weights.
    let adapter = adapter.map(|a| Adapter::open(a, dir, checkpoint.config())).transpose()?;
    let mut weights = Weights::load_telling(checkpoint, progress)?;
    adapter.map_or(Ok(()), |a| a.attach(&mut weights))?;
    Ok(weights)
}

/// The option `--private-layers`: a number, `all` (`None`), or half of the layers where it is left out.
///
/// # Errors
/// [`Error::Config`] for anything else.
pub fn parse_private_layers(text: Option<&str>, c: &ModelConfig) -> Result<Option<usize>> {
    match text {
        None => Ok(Some(c.num_layers.div_ceil(2))),
        Some("all") => Ok(None),
        Some(n) => n.parse().map(Some).map_err(|_| {
            Error::Config(format!("--private-layers {n}: give a number from 0 to {} or 'all'", c.num_layers))
        }),
    }
}

/// As [`parse_private_layers`], of the model in `dir`, perhaps with an adapter: where the option is left out, the layers from the
/// first with an adapter on, or what the model's `trefoil.json` says.
///
/// # Errors
/// As [`parse_private_layers`] and [`Adapter::open`], and for a `trefoil.json` that is none.
pub fn private_layers(
    text: Option<&str>,
    c: &ModelConfig,
    (dir, adapter): (&Path, Option<&Path>),
) -> Result<Option<usize>> {
    match (text, adapter) {
        (None, Some(adapter)) => Ok(Some(c.num_layers - Adapter::open(adapter, dir, c)?.first_layer())),
        (None, None) => match Record::open(dir)?.and_then(|r| r.private_layers) {
            Some(private) => match private.number() {
                Some(n) if n > c.num_layers => Err(Error::Model(format!(
                    "{}/{FILE}: private_layers is {n}, but the model has {} layers; correct that file",
                    dir.display(),
                    c.num_layers
                ))),
                n => Ok(n),
            },
            None => parse_private_layers(None, c),
        },
        (Some(_), _) => {
            let chosen = parse_private_layers(text, c)?;
            Record::check_kept(dir, chosen)?;
            Ok(chosen)
        }
    }
}

/// A model about to be prepared, at the Owner: all of its weights in memory, or layer by layer ([`Streamed`]).
#[derive(Debug)]
pub struct Loaded<W = Weights> {
    /// The weights, their configuration shortened to the context that was asked for.
    pub weights: W,
    /// What calibration reads.
    pub text: Option<Vec<u32>>,
    /// The model's own context, for calibration: the plan of a shortened one is calibrated on as long a text.
    pub context: usize,
    /// What is private.
    pub split: Split,
    /// What is planned for.
    pub setting: Setting,
    /// Who is told how far it is.
    pub progress: Progress,
}

/// The checkpoint in `dir` before its weights are read, which may take a while, and what calibration reads.
fn opened(dir: &Path, options: &Options) -> Result<(Checkpoint, Option<Vec<u32>>)> {
    let checkpoint = Checkpoint::open(dir)?;
    split_layers(checkpoint.config(), options.private_layers)?;
    let text = match &options.calibration_text {
        Some(text) => Some(TextCodec::open(dir)?.encode(text)?),
        // Without a tokenizer there are still the pseudorandom tokens.
        None if !dir.join("tokenizer.json").exists() => None,
        None => Some(TextCodec::open(dir)?.encode(calibrate::DEFAULT_TEXT)?),
    };
    Ok((checkpoint, text))
}

impl Loaded {
    /// Reads the checkpoint in `dir`.
    ///
    /// # Errors
    /// [`Error::Model`] for the checkpoint or the base, [`Error::Config`] for the options.
    pub fn open(dir: &Path, options: &Options) -> Result<Loaded> {
        let (checkpoint, text) = opened(dir, options)?;
        Loaded::new(adapted(&checkpoint, dir, options.adapter.as_deref(), &options.progress)?, text, options)
    }
}

impl Loaded<Streamed> {
    /// Opens the checkpoint in `dir`; its layers are read when they are needed, each by itself.
    ///
    /// # Errors
    /// As [`Loaded::open`].
    pub fn stream(dir: &Path, options: &Options) -> Result<Loaded<Streamed>> {
        let (checkpoint, text) = opened(dir, options)?;
        Loaded::new(Streamed::open(checkpoint, dir, options.adapter.as_deref())?, text, options)
    }
}

impl<W: Layered> Loaded<W> {
    /// From `weights`; `text` is what calibration reads.
    ///
    /// # Errors
    /// As [`Loaded::open`].
    pub fn new(mut weights: W, text: Option<Vec<u32>>, options: &Options) -> Result<Loaded<W>> {
        let context = weights.rest().config.max_positions;
        if let Some(n) = options.max_positions {
            weights.limit(context.min(n.max(2)));
        }
        let (first_private, private_embedding) = split_weights(&weights, options.private_layers)?;
        let public_head = match &options.base {
            // Of an adapter's base it is.
            None => weights.first_adapted().is_some(),
            Some(dir) => {
                let base = Checkpoint::open(dir)?;
                same_shape(&weights.rest().config, base.config(), dir)?;
                let base = Streamed::open(base, dir, None)?;
                if !private_embedding {
                    options.progress.tell(Stage::Weights, 0, 0);
                    same_public(&weights, &base, first_private, dir)?;
                }
                same_head(weights.rest(), base.rest())
            }
        };
        let split = Split { first_private, private_embedding, public_head };
        let setting = Setting::of(options.net, options.cores);
        Ok(Loaded { weights, text, context, split, setting, progress: options.progress.clone() })
    }

    /// Tells, layer by layer, how many bytes of them are through.
    fn telling(&self, stage: Stage) -> impl Fn(&usize) {
        let c = &self.weights.rest().config;
        let bytes = |layers: Range<usize>| 4 * layers.map(|i| c.layer_parameters(i)).sum::<u64>();
        move |i| self.progress.tell(stage, bytes(0..*i), bytes(0..c.num_layers))
    }

    /// What weights prove and calibration shows of the private layers.
    ///
    /// # Errors
    /// [`Error::Model`] naming the matrix of which no rounding leaves enough.
    pub fn evidence(&self) -> Result<Evidence> {
        let (w, first) = (self.weights.rest(), self.split.first_private);
        let c = &w.config;
        w.check_rest()?;
        if c.bottleneck > 0 && self.weights.first_adapted().is_some() {
            return Err(weights::bottleneck_and_adapter());
        }
        let mut choice = Choice::begin(w, self.split.private_embedding)?;
        choice.head(w)?;
        let mut bounds = Vec::new();
        // All that weights may be refused for, before what takes longest: text going through them.
        for i in (0..c.num_layers).inspect(self.telling(Stage::Weights)) {
            let l = self.weights.layer(i)?;
            l.check(c, i)?;
            if i >= first {
                let f = choice.layer(c, i, &l)?;
                bounds.push(calibrate::bounds_of(c, i, &l, &f)?);
            }
        }
        let bounds = calibrate::bounds_around(w, bounds, choice.fractions.head);
        let mut reading = calibrate::Reading::new(w, &calibrate::inputs(c, self.context, self.text.clone()));
        for i in (0..c.num_layers).inspect(self.telling(Stage::Calibration)) {
            reading.layer(c, i, &*self.weights.layer(i)?);
        }
        Ok(Evidence { choice, ranges: reading.finish(w, first), bounds })
    }

    /// The plan that weights and calibration give.
    ///
    /// # Errors
    /// [`Error::Model`] naming the layer and the quantity that does not fit, or the matrix of which no rounding leaves enough.
    pub fn plan(&self) -> Result<Plan> {
        let Evidence { choice, ranges, bounds } = self.evidence()?;
        let (c, first) = (&self.weights.rest().config, self.split.first_private);
        let mut plan = plan::propose(c, first, self.split.private_embedding, &bounds, &ranges)
            .map_err(|misfits| plan::refused(&misfits, |m| choice.explain(m)))?;
        plan.head.public |= self.split.public_head;
        Ok(plan.at(c, self.setting))
    }

    /// The plan, a fresh seed, and the Owner's part under both.
    ///
    /// # Errors
    /// As [`Loaded::plan`], and for a weight that cannot be represented.
    pub fn prepare(&self) -> Result<Preparation> {
        let plan = self.plan()?;
        let seed = PreparationSeed::fresh()?;
        let parts = Prepared::owner(&self.weights, &plan, &seed)?;
        Ok(Preparation { plan, seed, parts })
    }
}

/// On what a plan rests.
pub struct Evidence {
    /// Fraction bits of the weights, and why.
    pub choice: Choice,
    /// What calibration text showed.
    pub ranges: Ranges,
    /// What the rounded weights prove.
    pub bounds: Bounds,
}

/// A prepared model, at the Owner.
pub struct Preparation {
    /// The public plan.
    pub plan: Plan,
    /// The seed, for the Clients; used for this preparation and never again.
    pub seed: PreparationSeed,
    /// The Owner's part.
    pub parts: Prepared,
}

/// A base is the model that this one was tuned from: of the same shape.
fn same_shape(c: &ModelConfig, base: &ModelConfig, dir: &Path) -> Result<()> {
    let shape = |c: &ModelConfig| {
        [
            ("hidden_size", c.hidden_size),
            ("vocab_size", c.vocab_size),
            ("num_hidden_layers", c.num_layers),
            ("intermediate_size", c.intermediate_size),
            ("num_attention_heads", c.num_heads),
            ("num_key_value_heads", c.num_kv_heads),
            ("head_dim", c.head_dim),
        ]
    };
    if c.arch != base.arch {
        return Err(Error::Config(format!(
            "--base {}: a {:?} model, but the model is a {:?}: give the checkpoint that it was fine-tuned from",
            dir.display(),
            base.arch,
            c.arch
        )));
    }
    for ((name, own), (_, theirs)) in shape(c).into_iter().zip(shape(base)) {
        if own != theirs {
            return Err(Error::Config(format!(
                "--base {}: {name} is {theirs}, the model's is {own}: give the checkpoint that it was fine-tuned from",
                dir.display()
            )));
        }
    }
    Ok(())
}

/// What a fine-tuned model makes public is its base's: else training would be given away with it.
fn same_public(w: &dyn Layered, base: &dyn Layered, first_private: usize, dir: &Path) -> Result<()> {
    let mut differs = (w.rest().embed != base.rest().embed).then(|| "the embedding".to_owned());
    for i in 0..if differs.is_none() { first_private } else { 0 } {
        if w.layer(i)? != base.layer(i)? {
            differs = Some(format!("layer {i}"));
            break;
        }
    }
    let Some(differs) = differs else { return Ok(()) };
    Err(Error::Config(format!(
        "--base {}: {differs} is not the base's, and --private-layers {} would make it public; give more private layers (`trefoil inspect --base` \
         says which layers are the base's), or 'all', or leave --base out if it may be known",
        dir.display(),
        w.rest().config.num_layers - first_private
    )))
}

/// Whether final norm and head are the base's, bit for bit.
fn same_head(w: &Weights, base: &Weights) -> bool {
    let bits = |a: &mut dyn Iterator<Item = &f32>| a.map(|v| v.to_bits()).collect::<Vec<_>>();
    w.norm.len() == base.norm.len()
        && w.head_matrix().dim() == base.head_matrix().dim()
        && bits(&mut w.norm.iter()) == bits(&mut base.norm.iter())
        && bits(&mut w.head_matrix().iter()) == bits(&mut base.head_matrix().iter())
}
