//! Training of adapters and head on cached features: the backbone is frozen and nothing goes back into it, so a step costs
//! what the adapters cost. Cross entropy; the learning rate warms up in a line and falls along a cosine. Cargo feature `train`.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use candle_core::Tensor;
use ndarray::{Array1, Array2};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

use super::adapter::{AdapterConfig, AdapterLayer, AdapterWeights, Affine, Block, EPS, Gaussian, LayerNorm};
pub use super::eval::cached_features;
use super::float::Features;
use super::synthetic::shuffle;
use super::twin::{Given, Twin};
use crate::error::{Error, Result};
use crate::marill::ops::Loss;
use crate::marill::optimiser::{AdamW, Sgd, rate};
use crate::marill::student::{Parameter, defect};

/// How weights follow their gradients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Optimiser {
    /// Loshchilov and Hutter, arXiv:1711.05101.
    AdamW,
    /// Gradient descent with a momentum of 0.9, as CryptPEFT trains; it takes a learning rate some ten times larger.
    Sgd,
}

impl FromStr for Optimiser {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "adamw" => Ok(Optimiser::AdamW),
            "sgd" => Ok(Optimiser::Sgd),
            other => Err(Error::Config(format!("optimiser {other}: there are adamw and sgd"))),
        }
    }
}

impl fmt::Display for Optimiser {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Optimiser::AdamW => "adamw",
            Optimiser::Sgd => "sgd",
        })
    }
}

/// What to train, and how.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainOptions {
    /// Heads of LinAtten, which divide the rank.
    pub heads: usize,
    /// Width within an adapter, `r`.
    pub rank: usize,
    /// Blocks in each adapter.
    pub blocks: usize,
    /// How many layers of the backbone, from its end, have an adapter: `s`.
    pub layers: usize,
    /// How many layers the backbone has.
    pub backbone_layers: usize,
    /// Steps in all.
    pub steps: usize,
    /// Images in a step.
    pub batch: usize,
    /// The largest learning rate.
    pub lr: f64,
    /// Of the first weights and of the order of the images.
    pub seed: u64,
    /// Factor of what an adapter adds.
    pub scale: f32,
    /// How weights follow their gradients.
    pub optimiser: Optimiser,
    /// Decay of matrices, which keeps them in the range that fixed point carries.
    pub decay: f32,
}

impl Default for TrainOptions {
    /// For a backbone of 12 layers.
    fn default() -> Self {
        TrainOptions {
            heads: 3,
            rank: 12,
            blocks: 1,
            layers: 2,
            backbone_layers: 12,
            steps: 1000,
            batch: 32,
            lr: 3e-3,
            seed: 0,
            scale: 1.0,
            optimiser: Optimiser::AdamW,
            decay: 0.05,
        }
    }
}

impl TrainOptions {
    /// The backbone layers that have an adapter, from 0.
    ///
    /// # Errors
    /// [`Error::Config`] when there are not as many.
    pub fn adapted(&self) -> Result<Vec<usize>> {
        let (s, all) = (self.layers, self.backbone_layers);
        if s == 0 || s > all {
            return Err(Error::Config(format!("--layers {s}: the backbone has {all}; give 1 to {all}")));
        }
        Ok((all - s..all).collect())
    }

    pub(super) fn check(&self) -> Result<()> {
        let wrong = |text: String| Err(Error::Config(text));
        if self.steps == 0 || self.batch == 0 {
            return wrong(format!("--steps {}, --batch {}: give at least 1 of each", self.steps, self.batch));
        }
        if !(self.lr > 0.0 && self.lr <= 10.0) {
            return wrong(format!("--lr {}: give a number above 0, at most 10", self.lr));
        }
        if !(self.decay >= 0.0 && self.decay <= 1.0) {
            return wrong(format!("--decay {}: give a number from 0 to 1", self.decay));
        }
        Ok(())
    }

    /// The configuration of adapters for these features.
    fn config(&self, features: &[(Features, usize)], labels: &[String]) -> Result<AdapterConfig> {
        let wrong = |text: String| Err(Error::Config(text));
        let Some((first, _)) = features.first() else {
            return wrong("there is no image to train on; give a directory with one folder of images per label".into());
        };
        let layers = self.adapted()?;
        let same = |f: &Features| {
            f.last.len() == first.last.len()
                && f.inputs.len() == layers.len()
                && f.inputs.iter().all(|x| x.dim() == first.inputs[0].dim() && x.ncols() == first.last.len())
        };
        if first.inputs.is_empty() || !features.iter().all(|(f, _)| same(f)) {
            let lhs = format!("features of {} layers", first.inputs.len());
            let rhs = format!("{} layers of the backbone, all of one shape", layers.len());
            return Err(Error::Shape { op: "training an adapter", lhs, rhs });
        }
        if let Some((_, label)) = features.iter().find(|(_, label)| *label >= labels.len()) {
            return wrong(format!("an image has the label number {label}, but there are {} labels", labels.len()));
        }
        let config = AdapterConfig {
            hidden: first.last.len(),
            rank: self.rank,
            heads: self.heads,
            blocks: self.blocks,
            layers,
            tokens: first.inputs[0].nrows(),
            classes: labels.len(),
            scale: self.scale,
            eps: EPS,
            labels: labels.to_vec(),
        };
        config.check("the adapter to train")?;
        Ok(config)
    }
}

/// Weights to begin with: every query sees the mean of all values, so that the first scores, which no softmax bounds, change
/// little; and adapters add little to what they read.
pub(super) fn first_weights(config: &AdapterConfig, seed: u64) -> AdapterWeights {
    /// Of what an adapter adds, in deviations of the usual first weights.
    const LITTLE: f32 = 0.1;
    let mut g = Gaussian::new(seed);
    let (d, r, tokens) = (config.hidden, config.rank, config.tokens);
    let map = |g: &mut Gaussian, out: usize, from: usize, factor: f32| Affine {
        weight: g.matrix(out, from, factor * (from as f32).powf(-0.5)),
        bias: Array1::zeros(out),
    };
    let norm = |width: usize| LayerNorm { weight: Array1::ones(width), bias: Array1::zeros(width) };
    let even = 1.0 / tokens as f32;
    let block = |g: &mut Gaussian| Block {
        ln_1: norm(r),
        qkv: map(g, 3 * r, r, 1.0).weight,
        attn_reset: Affine {
            weight: Array2::eye(tokens) * even + g.matrix(tokens, tokens, even * even),
            bias: Array1::from_elem(tokens, even),
        },
        proj: map(g, r, r, 1.0),
        ln_2: norm(r),
        mlp_0: map(g, r, r, 1.0),
        mlp_3: map(g, r, r, 1.0),
    };
    let layer = |g: &mut Gaussian| AdapterLayer {
        lora_a: map(g, r, d, 1.0),
        blocks: (0..config.blocks).map(|_| block(g)).collect(),
        lora_b: map(g, d, r, LITTLE),
    };
    let layers = config.layers.iter().map(|_| layer(&mut g)).collect();
    AdapterWeights { layers, ln: norm(d), head: map(&mut g, config.classes, d, 1.0) }
}

enum Following {
    AdamW(AdamW),
    Sgd(Sgd),
}

/// Trains on the features of labelled images. `progress` is told every step, from 1, and its loss. Equal options and
/// features, and as many threads, give equal weights.
///
/// # Errors
/// [`Error::Config`] for options or features that nothing can be trained with, and for a loss that is no number any more.
pub fn train(
    options: &TrainOptions,
    features: &[(Features, usize)],
    labels: &[String],
    progress: &mut dyn FnMut(usize, f32),
) -> Result<(AdapterConfig, AdapterWeights)> {
    options.check()?;
    let config = options.config(features, labels)?;
    let twin = Twin::new(&config, &first_weights(&config, options.seed))?;
    let targets: Vec<usize> = features.iter().map(|(_, label)| *label).collect();
    let logits = |chosen: &[usize]| twin.logits(&Given::new(chosen.iter().map(|i| &features[*i].0))?);
    descend(options, twin.parameters(), &targets, &logits, progress)?;
    Ok((config, twin.weights()?))
}

/// Moves `parameters` so that `logits` of the examples that it is asked for, by their numbers, say what `targets` do.
pub(super) fn descend(
    options: &TrainOptions,
    parameters: &[Parameter],
    targets: &[usize],
    logits: &dyn Fn(&[usize]) -> Result<Tensor>,
    progress: &mut dyn FnMut(usize, f32),
) -> Result<()> {
    let mut following = match options.optimiser {
        Optimiser::AdamW => Following::AdamW(AdamW::new(parameters, options.decay)),
        Optimiser::Sgd => Following::Sgd(Sgd::new(parameters, options.decay * SGD_DECAY)),
    };
    let mut rng = ChaCha8Rng::seed_from_u64(options.seed);
    rng.set_stream(1);
    let (mut order, mut next) = ((0..targets.len()).collect::<Vec<_>>(), targets.len());
    let batch = options.batch.min(targets.len());
    for step in 0..options.steps {
        if next + batch > order.len() {
            // What is left of a pass is short of a batch and comes in the next one.
            shuffle(&mut order, &mut rng);
            next = 0;
        }
        let chosen = &order[next..next + batch];
        next += batch;
        let targets = chosen.iter().map(|i| targets[*i] as u32).collect();
        let loss = Loss { targets: Arc::new(targets), nll: 1.0, kl: 0.0, teacher: None };
        let loss = logits(chosen)?.apply_op1(loss).map_err(defect)?;
        let grads = loss.backward().map_err(defect)?;
        let rate = rate(options.lr, step, options.steps);
        let moved = match &mut following {
            Following::AdamW(o) => o.step(parameters, &grads, step, rate),
            Following::Sgd(o) => o.step(parameters, &grads, rate),
        };
        let loss = loss.to_scalar::<f32>().map_err(defect)?;
        if !moved.map_err(defect)? || !loss.is_finite() {
            return Err(Error::Config(format!(
                "the loss is no number any more at step {}: give a smaller --lr than {}",
                step + 1,
                options.lr
            )));
        }
        progress(step + 1, loss);
    }
    Ok(())
}

/// SGD's decay is part of the gradient, which is larger than AdamW's step of one.
const SGD_DECAY: f32 = 0.02;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cryptpeft::logits;
    use crate::cryptpeft::tests::config;

    fn features(config: &AdapterConfig, count: usize) -> Vec<(Features, usize)> {
        let mut g = Gaussian::new(3);
        let mut one = |n: usize| {
            let label = n % config.classes;
            let inputs = config.layers.iter().map(|_| g.matrix(config.tokens, config.hidden, 1.0)).collect();
            let mut last = g.matrix(1, config.hidden, 1.0).row(0).to_owned();
            last[label] += 1.5;
            (Features { inputs, last }, label)
        };
        (0..count).map(&mut one).collect()
    }

    #[test]
    fn its_logits_are_the_float_ones() {
        for layers in 1..=3 {
            let mut config = config();
            config.layers = (6 - layers..6).collect();
            let weights = AdapterWeights::random(&config, 7);
            let features = features(&config, 3);
            let twin = Twin::new(&config, &weights).unwrap();
            let given = Given::new(features.iter().map(|(f, _)| f)).unwrap();
            let got = twin.logits(&given).unwrap().to_vec2::<f32>().unwrap();
            for (got, (f, _)) in got.iter().zip(&features) {
                let want = logits(&config, &weights, f, &mut ());
                let most = want.iter().fold(1f32, |m, v| m.max(v.abs()));
                assert!(got.iter().zip(&want).all(|(g, w)| (g - w).abs() < 1e-4 * most), "{got:?} {want}");
            }
            assert_eq!(twin.weights().unwrap(), weights);
        }
    }

    #[test]
    fn every_weight_has_its_gradient() {
        let config = config();
        let twin = Twin::new(&config, &AdapterWeights::random(&config, 7)).unwrap();
        let features = features(&config, 4);
        let given = Given::new(features.iter().map(|(f, _)| f)).unwrap();
        let loss = || {
            let targets = Arc::new(features.iter().map(|f| f.1 as u32).collect());
            let loss = Loss { targets, nll: 1.0, kl: 0.0, teacher: None };
            twin.logits(&given).unwrap().apply_op1(loss).unwrap()
        };
        let grads = loss().backward().unwrap();
        assert_eq!(twin.parameters().len(), 3 * (4 + 2 * 13) + 4);
        for p in twin.parameters() {
            let grad = grads.get(p.var.as_tensor()).unwrap_or_else(|| panic!("{}: no gradient", p.name));
            let length = f64::from(grad.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap()).sqrt();
            let before = p.var.as_tensor().copy().unwrap();
            let moved = |by: f64| {
                p.var.set(&(&before + grad.affine(by / length, 0.0).unwrap()).unwrap()).unwrap();
                f64::from(loss().to_scalar::<f32>().unwrap())
            };
            // A long step may cross the kinks of ReLU, a short one drown in rounding.
            let rises = |by: f64| {
                let slope = (moved(by) - moved(-by)) / (2.0 * by);
                (slope - length).abs() < 0.05 * length + 4e-7 * moved(0.0) / by
            };
            assert!(length == 0.0 || [1e-2, 1e-3, 1e-4].into_iter().any(rises), "{}: {length}", p.name);
            p.var.set(&before).unwrap();
        }
    }
}
