//! Training from start to end: the base and the data are read, layers reshaped, adapters added, steps taken, the result written and
//! measured. Interrupted at any moment and started again with the same options, it ends with the same weights.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use candle_core::Tensor;
use serde::Serialize;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::adapter::Lora;
use super::data::{Batch, DataOptions, Dataset, Example, Source, shuffle};
use super::evaluate::{Score, score};
use super::ops::{Loss, with_values};
use super::optimiser::{AdamW, DECAY, rate};
use super::reshape::{MergeBy, Reshape, Reshaped};
use super::resume::{Checkpoint as Saved, State, difference};
use super::student::{Student, Trace, defect};
use super::{curve, disk, output};
use crate::error::{Error, Result};
use crate::model::checkpoint::Checkpoint;
use crate::model::preparation::split_layers;
use crate::model::variant::{PrivateLayers, Record};
use crate::model::{ModelConfig, Weights};
use crate::plan::Module;

/// What is trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// Every weight.
    Full,
    /// The private layers; final norm and head too, unless the head is the embedding.
    Freeze,
    /// Low-rank additions to the linear maps of the private layers.
    Lora,
}

/// A largest learning rate that learns, whatever the method.
pub const LEARNING_RATE: f64 = 1e-3;

/// What to do.
#[derive(Clone, Debug)]
pub struct Options {
    /// The model to start from.
    pub base: PathBuf,
    /// What to learn.
    pub data: Source,
    /// Examples, their length, and the seed of everything.
    pub sampling: DataOptions,
    /// The directory to make.
    pub out: PathBuf,
    /// What is trained.
    pub method: Method,
    /// How many layers, from the top, are private; `None` is all of them and the embedding.
    pub private_layers: Option<usize>,
    /// What becomes of the shape of private layers.
    pub reshape: Reshape,
    /// Rank of the adapters.
    pub rank: usize,
    /// Additions are scaled by `alpha / rank`.
    pub alpha: f64,
    /// The maps that get adapters.
    pub targets: Vec<Module>,
    /// Passes over the data.
    pub epochs: usize,
    /// How many of them are the first stage of a distillation.
    pub stage1_epochs: usize,
    /// At most as many steps of that.
    pub stage1_steps: Option<usize>,
    /// At most as many steps.
    pub steps: Option<usize>,
    /// Examples in a step.
    pub batch_size: usize,
    /// The largest learning rate.
    pub lr: f64,
    /// The model whose behaviour is to be kept.
    pub teacher: Option<PathBuf>,
    /// A checkpoint every so many steps.
    pub save_every: usize,
}

/// Of one step.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    /// Steps done, this one included.
    pub step: usize,
    /// Steps in all.
    pub steps: usize,
    /// Whether it was one of the first stage of a distillation.
    pub matching: bool,
    /// Its loss.
    pub loss: f32,
    /// Its tokens.
    pub tokens: usize,
}

/// What came out.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// On held-out data.
    pub score: Score,
    /// Steps in all.
    pub steps: usize,
    /// The step at which this run began, if it went on where another had stopped.
    pub resumed_at: usize,
    /// Weights that were trained.
    pub trained: usize,
    /// Tokens that went through the model in this run.
    pub tokens: usize,
    /// Seconds that the steps of this run took.
    pub seconds: f64,
    /// Seconds that all steps took, those of earlier runs as far as they were saved included.
    pub seconds_in_all: f64,
    /// How many examples were longer than the context and cut.
    pub cut: usize,
    /// Whether the model was there already, made by the same options.
    pub finished_before: bool,
}

/// Weights of the losses (MARILL, appendix E).
const ATTENTION: f64 = 0.1;
const HIDDEN: f64 = 5.0;
const KL: f32 = 0.5;
const NLL: f32 = 0.5;

/// Windows of the training data that show how heads attend, and their longest length.
const WINDOWS: usize = 32;
const WINDOW: usize = 256;

/// All that stays the same during the steps.
struct Run<'a> {
    options: &'a Options,
    dataset: &'a Dataset,
    student: &'a Student,
    teacher: Option<&'a Student>,
    /// The first private layer, and of which layer of the original each layer was made.
    first: usize,
    origin: &'a [usize],
    /// Steps of an epoch, of the first stage, and in all.
    per_epoch: usize,
    matching: usize,
    steps: usize,
}

impl Options {
    fn check(&self, c: &ModelConfig, first: usize) -> Result<()> {
        let wrong = |text: String| Err(Error::Config(text));
        if self.batch_size == 0 {
            return wrong("--batch-size 0: give 1 or more".into());
        }
        if self.sampling.examples == 0 {
            return wrong("--examples 0: give 1 or more".into());
        }
        if !(self.lr > 0.0 && self.lr <= 1.0) {
            return wrong(format!("--lr {}: give a number above 0, at most 1", self.lr));
        }
        if self.sampling.context < 2 || self.sampling.context > c.max_positions {
            return wrong(format!(
                "--context {}: give 2 to {} tokens, the model's own",
                self.sampling.context, c.max_positions
            ));
        }
        if self.stage1_epochs > self.epochs {
            return wrong(format!("--stage1-epochs {}: there are {} epochs in all", self.stage1_epochs, self.epochs));
        }
        if self.stage1_epochs > 0 && self.teacher.is_none() {
            return wrong("--stage1-epochs: the first stage matches a teacher; give one with --teacher".into());
        }
        if self.method != Method::Full && first == c.num_layers {
            return wrong("--private-layers 0: nothing would be trained; give at least 1".into());
        }
        if self.method == Method::Lora && !self.reshape.is_none() {
            return wrong(
                "--method lora: an adapter adds to a base that stays as it is, so its layers cannot be changed on the way; change \
                 them first (--method full --epochs 0 with --merge-heads, --softmax, ..), then train an adapter on what that makes"
                    .into(),
            );
        }
        self.reshape.check(c, first)
    }

    /// All that the final weights follow from; base and teacher by their paths.
    fn settings(&self, dataset: &Dataset) -> Value {
        let mut hash = Sha256::new();
        for example in dataset.train.iter().chain(&dataset.held_out) {
            hash.update((example.ids.len() as u64).to_le_bytes());
            example.ids.iter().for_each(|id| hash.update(id.to_le_bytes()));
            example.learned.iter().for_each(|l| hash.update([u8::from(*l)]));
        }
        let data: String = hash.finalize().iter().take(16).map(|b| format!("{b:02x}")).collect();
        let mut settings = json!({
            "base": self.base,
            "data": data,
            "method": self.method,
            "private_layers": self.private_layers.map_or(Value::from("all"), Value::from),
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "lr": self.lr,
            "seed": self.sampling.seed,
            "context": self.sampling.context,
        });
        let r = &self.reshape;
        let more = [
            ("steps", self.steps.map(Value::from)),
            ("teacher", self.teacher.as_ref().map(|t| json!(t))),
            ("stage1_epochs", self.teacher.as_ref().map(|_| self.stage1_epochs.into())),
            ("stage1_steps", self.stage1_steps.map(Value::from)),
            ("rank", (self.method == Method::Lora).then(|| self.rank.into())),
            ("alpha", (self.method == Method::Lora).then(|| self.alpha.into())),
            ("targets", (self.method == Method::Lora).then(|| self.targets.iter().map(|t| t.name()).collect())),
            ("merge_heads", (r.merge_heads > 1).then(|| r.merge_heads.into())),
            (
                "merge_by",
                (r.merge_heads > 1)
                    .then(|| if r.merge_by == MergeBy::Similarity { "similarity" } else { "adjacent" }.into()),
            ),
            ("prune_heads", (r.prune_heads > 1).then(|| r.prune_heads.into())),
            ("prune_layers", (r.prune_layers > 1).then(|| r.prune_layers.into())),
            ("softmax", (r.softmax != Reshape::default().softmax).then(|| json!(r.softmax))),
            ("activation", r.activation.map(|a| json!(a))),
        ];
        for (name, value) in more {
            if let Some(value) = value {
                settings[name] = value;
            }
        }
        settings
    }

    /// Which weights are trained, by name.
    fn trains(&self, c: &ModelConfig, first: usize, name: &str) -> bool {
        match self.method {
            Method::Full => true,
            Method::Lora => false,
            Method::Freeze if self.private_layers.is_none() => true,
            Method::Freeze => {
                let layer = name.strip_prefix("model.layers.").and_then(|n| n.split('.').next()?.parse::<usize>().ok());
                match layer {
                    Some(layer) => layer >= first,
                    // A head that is the embedding is public with it; the norm before it then too, so that the Client needs
                    // only the base.
                    None => name != "model.embed_tokens.weight" && !c.tie_word_embeddings,
                }
            }
        }
    }
}

/// Does it. `watch` sees every step and ends the run, as if the process had been killed, by returning `false`; then there is no outcome.
///
/// # Errors
/// [`Error::Config`] for options and data, [`Error::Model`] for base and teacher, [`Error::Io`] for what cannot be saved.
pub fn run(options: &Options, watch: &mut dyn FnMut(Progress) -> bool) -> Result<Option<Outcome>> {
    let base = Checkpoint::open(&options.base)?;
    let (first, _) = split_layers(base.config(), options.private_layers)?;
    options.check(base.config(), first)?;
    let lora = match options.method {
        Method::Lora => {
            Record::check_public(&options.base)?;
            let (rank, alpha, seed) = (options.rank, options.alpha, options.sampling.seed);
            Some(Lora::fresh(base.config(), first, &options.targets, rank, alpha, seed)?)
        }
        Method::Freeze => {
            // What it leaves as it is will be public.
            Record::check_kept(&options.base, options.private_layers)?;
            None
        }
        Method::Full => None,
    };
    let dataset = Dataset::load(&options.data, &options.base, base.config(), &options.sampling)?;
    let settings = options.settings(&dataset);
    if let Some(outcome) = made_before(options, &settings, &dataset)? {
        return Ok(Some(outcome));
    }

    let weights = Weights::load(&base)?;
    let teacher = options.teacher.as_ref().map(|dir| open_teacher(dir, options, &weights, first)).transpose()?;
    // An adapter adds to the base, and a base whose layers were changed already brings its own weights; everything else starts
    // from what the teacher knows.
    let start = match &teacher {
        Some(teacher) if options.method != Method::Lora && weights.config.variant.is_none() => teacher.clone(),
        _ => weights,
    };
    let windows: Vec<Vec<u32>> =
        dataset.train.iter().take(WINDOWS).map(|e| e.ids[..e.ids.len().min(WINDOW)].to_vec()).collect();
    let Reshaped { weights: start, origin, groups } = options.reshape.apply(start, first, &windows)?;
    let trained = |name: &str| options.trains(&start.config, first, name);
    let student = Student::new(&start, &trained, lora.as_ref())?;
    let teacher = teacher.map(|t| Student::new(&t, &|_| false, None)).transpose()?;
    drop(start);

    let per_epoch = dataset.train.len().div_ceil(options.batch_size);
    let steps = options.steps.map_or(usize::MAX, |n| n).min(options.epochs * per_epoch);
    let matching = steps.min(options.stage1_epochs * per_epoch).min(options.stage1_steps.unwrap_or(usize::MAX));
    if matching == steps && steps > 0 && options.stage1_steps.is_none() && options.stage1_epochs < options.epochs {
        return Err(Error::Config(format!(
            "--steps {steps}: the first stage, which matches the teacher's hidden states and learns nothing from the data, takes all of them \
             ({} epochs of {per_epoch}); give it fewer with --stage1-steps, or give more steps",
            options.stage1_epochs
        )));
    }
    let teacher = teacher.as_ref();
    let run = Run {
        options,
        dataset: &dataset,
        student: &student,
        teacher,
        first,
        origin: &origin,
        per_epoch,
        matching,
        steps,
    };
    std::fs::create_dir_all(&options.out).map_err(|e| Error::io(format!("--out {}", options.out.display()), e))?;
    let saved = Saved::new(&options.out, settings.clone());
    let Some(done) = run.steps(&saved, watch)? else { return Ok(None) };

    let weights = student.weights()?;
    let score = score(&weights, &dataset.held_out, dataset.exact);
    match &lora {
        Some(lora) => {
            let base = std::path::absolute(&options.base).unwrap_or_else(|_| options.base.clone());
            student.adapters(lora)?.write(&options.out, &base)?;
        }
        None => output::write_model(&options.out, &options.base, &base, &weights, &origin)?,
    }
    let svg = curve::svg(&done.losses, matching, score.loss)?;
    disk::replace(&options.out.join("loss.svg"), |out| out.write_all(svg.as_bytes()))?;
    let made = json!({
        "by": format!("trefoil {} finetune", env!("CARGO_PKG_VERSION")),
        "settings": settings,
        "steps": steps,
        "held_out": score,
        "head_groups": groups,
    });
    let Value::Object(made) = made else { return Err(Error::Internal("a map that is none".into())) };
    let private_layers = match options.method {
        // Nothing was learned: the weights are the base's in another order, as private as it is.
        _ if steps == 0 && options.teacher.is_none() => Record::open(&options.base)?.and_then(|r| r.private_layers),
        // Every weight may have changed, so there is no part of it that may be given out.
        Method::Full => Some(PrivateLayers::All),
        Method::Freeze if options.private_layers.is_none() => Some(PrivateLayers::All),
        // An adapter leaves the embedding as it is, whatever layers it is on.
        Method::Freeze | Method::Lora => Some(PrivateLayers::Top(weights.config.num_layers - first)),
    };
    let variant = if lora.is_some() { None } else { weights.config.variant };
    output::write_record(&options.out, &Record { version: Record::VERSION, private_layers, variant, made })?;
    saved.remove()?;
    Ok(Some(Outcome {
        score,
        steps,
        resumed_at: done.resumed_at,
        trained: student.parameters().iter().map(|p| p.var.elem_count()).sum(),
        tokens: done.tokens,
        seconds: done.seconds,
        seconds_in_all: done.seconds_in_all,
        cut: dataset.cut,
        finished_before: false,
    }))
}

/// If the directory holds the model already, what came out when it was made.
///
/// # Errors
/// [`Error::Config`] if it holds another one.
fn made_before(options: &Options, settings: &Value, dataset: &Dataset) -> Result<Option<Outcome>> {
    let Some(record) = Record::open(&options.out)? else {
        let taken = ["config.json", crate::model::adapter::CONFIG].into_iter().find(|f| options.out.join(f).exists());
        // Left by a run that ended while writing its result; its checkpoint is still there.
        let ours = options.out.join(super::resume::FILE).exists();
        return match taken {
            Some(file) if !ours => Err(Error::Config(format!(
                "--out {}: there is a model already ({file}), made by somebody else; give another directory",
                options.out.display()
            ))),
            _ => Ok(None),
        };
    };
    let made = Value::Object(record.made);
    if let Some(name) = difference(&made["settings"], settings) {
        return Err(Error::Config(format!(
            "--out {}: there is a model already, made with another `{name}`; give another directory",
            options.out.display()
        )));
    }
    let held_out = serde_json::from_value(made["held_out"].clone());
    let score = held_out.map_err(|e| Error::Model(format!("{}: trefoil.json: {e}", options.out.display())))?;
    // Left by a run that ended between the result and this.
    Saved::new(&options.out, settings.clone()).remove()?;
    let steps = made["steps"].as_u64().unwrap_or_default() as usize;
    let cut = dataset.cut;
    Ok(Some(Outcome {
        score,
        steps,
        resumed_at: steps,
        trained: 0,
        tokens: 0,
        seconds: 0.0,
        seconds_in_all: 0.0,
        cut,
        finished_before: true,
    }))
}

/// The teacher's weights.
fn open_teacher(dir: &Path, options: &Options, base: &Weights, first: usize) -> Result<Weights> {
    let teacher = Weights::load(&Checkpoint::open(dir)?)?;
    let wrong = |text: &str| Error::Config(format!("--teacher {}: {text}", dir.display()));
    if (ModelConfig { variant: None, ..teacher.config.clone() })
        != (ModelConfig { variant: None, ..base.config.clone() })
    {
        return Err(wrong("has another architecture than --base; give a model that was fine-tuned from it"));
    }
    let public = options.method == Method::Freeze && options.private_layers.is_some();
    let tied = base.config.tie_word_embeddings;
    let same = teacher.embed == base.embed
        && teacher.layers[..first] == base.layers[..first]
        && (!tied || teacher.norm == base.norm);
    if public && !same {
        return Err(wrong(
            "its bottom layers are not the base's, which are to stay as they are; give one made with --method freeze and the same --private-layers",
        ));
    }
    Ok(teacher)
}

/// What the steps leave behind.
struct Done {
    losses: Vec<f32>,
    resumed_at: usize,
    tokens: usize,
    seconds: f64,
    seconds_in_all: f64,
}

impl Run<'_> {
    /// Takes the steps that are left; `None` if `watch` ended it.
    fn steps(&self, saved: &Saved, watch: &mut dyn FnMut(Progress) -> bool) -> Result<Option<Done>> {
        let parameters = self.student.parameters();
        let fresh = || State { step: 0, seconds: 0.0, losses: Vec::new(), optimiser: AdamW::new(parameters, DECAY) };
        let mut state = saved.load(parameters)?.unwrap_or_else(fresh);
        let (resumed_at, before, started) = (state.step, state.seconds, Instant::now());
        let mut order: (Option<usize>, Vec<&Example>) = (None, Vec::new());
        let mut tokens = 0;
        while state.step < self.steps {
            let (epoch, at) = (state.step / self.per_epoch, state.step % self.per_epoch);
            if order.0 != Some(epoch) {
                let mut examples: Vec<&Example> = self.dataset.train.iter().collect();
                shuffle(&mut examples, self.options.sampling.seed, epoch as u64);
                order = (Some(epoch), examples);
            }
            let size = self.options.batch_size;
            let batch = Batch::new(order.1.iter().skip(at * size).take(size).copied());
            if state.step == self.matching {
                // Another loss: its moments start anew.
                state.optimiser = AdamW::new(parameters, DECAY);
            }
            let loss = self.step(&mut state, &batch)?;
            state.losses.push(loss);
            state.step += 1;
            state.seconds = before + started.elapsed().as_secs_f64();
            tokens += batch.ids.len();
            let matching = state.step <= self.matching;
            let go_on =
                watch(Progress { step: state.step, steps: self.steps, matching, loss, tokens: batch.ids.len() });
            if !go_on {
                return Ok(None);
            }
            if state.step.is_multiple_of(self.options.save_every) {
                saved.save(parameters, &state)?;
            }
        }
        // What follows may fail too, for want of room.
        saved.save(parameters, &state)?;
        let seconds = started.elapsed().as_secs_f64();
        Ok(Some(Done { losses: state.losses, resumed_at, tokens, seconds, seconds_in_all: before + seconds }))
    }

    /// One step; returns its loss.
    fn step(&self, state: &mut State, batch: &Batch) -> Result<f32> {
        let matching = state.step < self.matching;
        let (done, of) = match matching {
            true => (state.step, self.matching),
            false => (state.step - self.matching, self.steps - self.matching),
        };
        let trace = self.student.forward(batch)?;
        let taught = self.teacher.map(|t| t.forward(batch).map(|trace| (t, trace))).transpose()?;
        let loss = match (matching, &taught) {
            (true, Some((_, taught))) => self.stage1(&trace, taught).map_err(defect)?,
            _ => self.stage2(&trace, taught.as_ref(), batch)?,
        };
        let value = loss.to_scalar::<f32>().map_err(defect)?;
        let (lr, step) = (self.options.lr, state.step + 1);
        let diverged =
            || Error::Config(format!("--lr {lr}: at step {step} the loss is no longer a number; give a lower one"));
        if !value.is_finite() {
            return Err(diverged());
        }
        let grads = loss.backward().map_err(defect)?;
        let parameters = self.student.parameters();
        if !matching && let Some(p) = parameters.iter().find(|p| grads.get(p.var.as_tensor()).is_none()) {
            return Err(Error::Internal(format!("training: {} has no gradient", p.name)));
        }
        let rate = rate(self.options.lr, done, of);
        if !state.optimiser.step(parameters, &grads, done, rate).map_err(defect)? {
            return Err(diverged());
        }
        Ok(value)
    }

    /// Attention outputs and hidden states of the private layers as the teacher's, mean over layers (MARILL, appendix E, stage I).
    fn stage1(&self, student: &Trace, teacher: &Trace) -> candle_core::Result<Tensor> {
        let mut loss: Option<Tensor> = None;
        let mean_square = |a: &Tensor, b: &Tensor| (a - b)?.sqr()?.mean_all();
        for (i, &origin) in self.origin.iter().enumerate().skip(self.first) {
            let attention = mean_square(&student.attention[i], &teacher.attention[origin])?;
            let hidden = mean_square(&student.hidden[i], &teacher.hidden[origin])?;
            let of_layer = (attention.affine(ATTENTION, 0.0)? + hidden.affine(HIDDEN, 0.0)?)?;
            loss = Some(match loss {
                Some(loss) => (loss + of_layer)?,
                None => of_layer,
            });
        }
        let layers = (self.origin.len() - self.first) as f64;
        match loss {
            Some(loss) => loss.affine(1.0 / layers, 0.0),
            None => candle_core::bail!("no private layer to match"),
        }
    }

    /// The data's own tokens, and the teacher's distribution if there is one (stage II).
    fn stage2(&self, student: &Trace, teacher: Option<&(&Student, Trace)>, batch: &Batch) -> Result<Tensor> {
        let logits = self.student.logits(student, batch)?;
        let targets = Arc::new(batch.targets.clone());
        let loss = match teacher {
            None => Loss { targets, nll: 1.0, kl: 0.0, teacher: None },
            Some((teacher, trace)) => {
                let logits = teacher.logits(trace, batch)?;
                let logits = with_values(&logits, |v| Ok(v.to_vec())).map_err(defect)?;
                Loss { targets, nll: NLL, kl: KL, teacher: Some(Arc::new(logits)) }
            }
        };
        logits.apply_op1(loss).map_err(defect)
    }
}
