//! What one-way communication costs in accuracy, and where adapters should sit: the comparisons that CryptPEFT's design rests on,
//! trained and tested in float. Cargo feature `train`.
//!
//! A two-way adapter gives its result back to the backbone, so that every layer above it would have to be computed in secret;
//! such models are trained here to be compared with, and run nowhere. Backbones are frozen in any case: what is trained is what
//! was added, the final LayerNorm and the head.

use std::fmt;
use std::str::FromStr;

use candle_core::{D, Result as Made, Tensor};
use ndarray::{Array1, Array2};

use super::adapter::{AdapterConfig, AdapterWeights, Affine, EPS, Gaussian};
use super::eval::{cached_features, label};
use super::float::Features;
use super::synthetic::Dataset;
use super::train::{TrainOptions, descend, first_weights};
use super::twin::{Given, Maker, Map, Norm, Twin};
use super::vit::{self, Vit, VitConfig};
use crate::error::{Error, Result};
use crate::marill::student::{Parameter, defect};

/// What is added to the backbone, and whether it gives anything back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// CryptPEFT's adapters, which only read.
    OneWay,
    /// The same adapters; what each adds goes into the layer that it reads.
    TwoWay,
    /// A bottleneck with ReLU beside the MLP of a layer (AdaptFormer, arXiv 2205.13535).
    AdaptFormer,
    /// Low-rank additions to queries and values (arXiv 2106.09685).
    Lora,
}

impl Way {
    /// All of them.
    pub const ALL: [Way; 4] = [Way::OneWay, Way::TwoWay, Way::AdaptFormer, Way::Lora];

    /// What `--ways` knows it by.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Way::OneWay => "one-way",
            Way::TwoWay => "two-way",
            Way::AdaptFormer => "adaptformer",
            Way::Lora => "lora",
        }
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Way {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Way::ALL
            .into_iter()
            .find(|w| w.name() == text)
            .ok_or_else(|| Error::Config(format!("--ways {text}: there are {}", Way::ALL.map(Way::name).join(", "))))
    }
}

/// What was learned.
#[derive(Clone, Copy, Debug)]
pub struct Learned {
    /// The part of the test images that get their label.
    pub accuracy: f64,
    /// Trained numbers, final norm and head included.
    pub parameters: usize,
}

/// The labels of a set, of its two parts.
struct Labels {
    train: Vec<usize>,
    test: Vec<usize>,
}

/// Trains what `way` adds to the layers `at` (from 0, ascending) of the backbone on the images of a set, and tests it. `options` give rank,
/// heads, steps, batch, rate and seed; its layers are not looked at.
///
/// # Errors
/// [`Error::Config`] for options that nothing can be trained with.
pub fn learn(
    vit: &Vit,
    set: &Dataset,
    (way, at): (Way, &[usize]),
    options: &TrainOptions,
    progress: &mut dyn FnMut(usize, f32),
) -> Result<Learned> {
    options.check()?;
    let (config, wrong) = (vit.config(), |text: String| Err(Error::Config(text)));
    if set.train.is_empty() || set.test.is_empty() {
        return wrong("there are no images to train and to test on; give more per label".into());
    }
    let ascending = at.windows(2).all(|pair| pair[0] < pair[1]);
    let Some(&first) = at.first().filter(|_| ascending && at.iter().all(|i| *i < config.layers)) else {
        return wrong(format!("layers {at:?}: give ascending ones of the backbone's {}, from 0", config.layers));
    };
    if options.rank == 0 || options.heads == 0 || !options.rank.is_multiple_of(options.heads) {
        return wrong(format!("--rank {}, --heads {}: give heads that divide the rank", options.rank, options.heads));
    }
    // Two-way additions are computed with from the lowest of them on; below it nothing changes.
    let read = if way == Way::OneWay { at.to_vec() } else { vec![first] };
    let [train, test] = [&set.train, &set.test].map(|part| cached_features(vit, part, &read));
    let (train, test) = (train?, test?);
    let labels = |part: &[(Features, usize)]| part.iter().map(|(_, label)| *label).collect();
    let labels = Labels { train: labels(&train), test: labels(&test) };
    let model = Model::new(vit, (way, at), options, set.labels.len())?;
    let of = |part: &[(Features, usize)], chosen: &[usize]| {
        let given = Given::new(chosen.iter().map(|i| &part[*i].0))?;
        model.logits(&given).map_err(defect)
    };
    descend(options, &model.parameters, &labels.train, &|chosen| of(&train, chosen), progress)?;
    let mut right = 0;
    let numbers: Vec<usize> = (0..test.len()).collect();
    for chosen in numbers.chunks(64) {
        let rows = of(&test, chosen)?.to_vec2::<f32>().map_err(defect)?;
        right += rows
            .into_iter()
            .zip(chosen)
            .filter(|(row, i)| label(&Array1::from_vec(row.clone())) == labels.test[**i])
            .count();
    }
    let parameters = model.parameters.iter().map(|p| p.var.elem_count()).sum();
    Ok(Learned { accuracy: right as f64 / test.len() as f64, parameters })
}

/// A layer of the backbone on tensors.
struct Frozen {
    ln_1: Norm,
    qkv: Map,
    out: Map,
    ln_2: Norm,
    mlp_1: Map,
    mlp_2: Map,
}

impl Frozen {
    fn new(l: &vit::Layer) -> Made<Self> {
        Ok(Frozen {
            ln_1: Norm::frozen(&l.ln_1)?,
            qkv: Map::frozen(&l.qkv)?,
            out: Map::frozen(&l.out)?,
            ln_2: Norm::frozen(&l.ln_2)?,
            mlp_1: Map::frozen(&l.mlp_1)?,
            mlp_2: Map::frozen(&l.mlp_2)?,
        })
    }
}

/// A backbone from its first changed layer on, with what is trained.
struct Model {
    backbone: VitConfig,
    way: Way,
    /// Changed layers, from 0.
    at: Vec<usize>,
    /// The layers from the first changed one on.
    frozen: Vec<Frozen>,
    /// Adapters, final norm and head; where something else is added, norm and head alone.
    twin: Twin,
    /// Of each changed layer: the bottleneck's two maps, or those of queries and then of values.
    maps: Vec<Vec<Map>>,
    parameters: Vec<Parameter>,
}

impl Model {
    fn new(vit: &Vit, (way, at): (Way, &[usize]), options: &TrainOptions, classes: usize) -> Result<Self> {
        let c = vit.config();
        let adapters = matches!(way, Way::OneWay | Way::TwoWay);
        let config = AdapterConfig {
            hidden: c.hidden,
            rank: options.rank,
            heads: options.heads,
            blocks: options.blocks,
            layers: if adapters { at.to_vec() } else { Vec::new() },
            tokens: c.tokens(),
            classes,
            scale: options.scale,
            eps: EPS,
            labels: Vec::new(),
        };
        let weights: AdapterWeights = first_weights(&config, options.seed);
        let twin = Twin::new(&config, &weights)?;
        let (mut maker, mut g) = (Maker::default(), Gaussian::new(options.seed));
        let mut map = |name: String, out: usize, from: usize, factor: f32| {
            let weight: Array2<f32> = g.matrix(out, from, factor * (from as f32).powf(-0.5));
            maker.map(&name, &Affine { weight, bias: Array1::zeros(out) })
        };
        // The upper map begins at nothing, as LoRA's and AdaptFormer's do.
        let mut pair = |name: &str, i: usize| -> Made<[Map; 2]> {
            let (d, r) = (c.hidden, options.rank);
            Ok([map(format!("layer{i}.{name}.down"), r, d, 1.0)?, map(format!("layer{i}.{name}.up"), d, r, 0.0)?])
        };
        let mut added = |i: usize| -> Made<Vec<Map>> {
            Ok(match way {
                Way::OneWay | Way::TwoWay => Vec::new(),
                Way::AdaptFormer => pair("mlp", i)?.into(),
                Way::Lora => pair("q", i)?.into_iter().chain(pair("v", i)?).collect(),
            })
        };
        let maps = at.iter().map(|i| added(*i)).collect::<Made<_>>().map_err(defect)?;
        let first = if way == Way::OneWay { c.layers } else { at[0] };
        let frozen = vit.layers[first..].iter().map(Frozen::new).collect::<Made<_>>().map_err(defect)?;
        let parameters = twin.parameters().iter().chain(&maker.0);
        let parameters = parameters.map(|p| Parameter { name: p.name.clone(), var: p.var.clone() }).collect();
        Ok(Model { backbone: c.clone(), way, at: at.to_vec(), frozen, twin, maps, parameters })
    }

    fn logits(&self, given: &Given) -> Made<Tensor> {
        if self.way == Way::OneWay {
            return self.twin.forward(given);
        }
        let mut h = given.inputs[0].clone();
        for (i, layer) in (self.at[0]..).zip(&self.frozen) {
            h = self.layer(layer, self.at.iter().position(|n| *n == i), h)?;
        }
        self.twin.classify(&h.narrow(1, 0, 1)?.squeeze(1)?)
    }

    /// A layer, which is the `changed`th of the changed ones.
    fn layer(&self, l: &Frozen, changed: Option<usize>, h: Tensor) -> Made<Tensor> {
        let eps = self.backbone.eps;
        let with = |way: Way| changed.filter(|_| self.way == way);
        let h = match with(Way::TwoWay) {
            Some(n) => (self.twin.adapter(n, &h)? + h)?,
            None => h,
        };
        let x = l.ln_1.apply(&h, eps)?;
        let mut qkv = l.qkv.apply(&x)?;
        if let Some([down_q, up_q, down_v, up_v]) = with(Way::Lora).map(|n| &self.maps[n][..]) {
            let (q, v) = (up_q.apply(&down_q.apply(&x)?)?, up_v.apply(&down_v.apply(&x)?)?);
            qkv = (qkv + Tensor::cat(&[&q, &q.zeros_like()?, &v], D::Minus1)?)?;
        }
        let h = (l.out.apply(&self.attention(&qkv)?)? + h)?;
        let x = l.ln_2.apply(&h, eps)?;
        let mut y = l.mlp_2.apply(&l.mlp_1.apply(&x)?.gelu_erf()?)?;
        if let Some([down, up]) = with(Way::AdaptFormer).map(|n| &self.maps[n][..]) {
            y = (y + up.apply(&down.apply(&x)?.relu()?)?)?;
        }
        y + h
    }

    /// Softmax attention over all tokens, `[images, tokens, 3 hidden]` to `[images, tokens, hidden]`.
    fn attention(&self, qkv: &Tensor) -> Made<Tensor> {
        let (images, tokens, wide) = qkv.dims3()?;
        let (d, heads) = (wide / 3, self.backbone.heads);
        let dim = d / heads;
        let part = |n: usize| {
            let part = qkv.narrow(2, n * d, d)?.contiguous()?;
            part.reshape((images, tokens, heads, dim))?.transpose(1, 2)?.contiguous()
        };
        let (q, k, v) = (part(0)?, part(1)?, part(2)?);
        let scores = q.matmul(&k.transpose(2, 3)?.contiguous()?)?.affine((dim as f64).powf(-0.5), 0.0)?;
        // What is subtracted changes nothing, so it needs no gradient.
        let exp = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?.detach())?.exp()?;
        let weights = exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)?;
        weights.matmul(&v)?.transpose(1, 2)?.contiguous()?.reshape((images, tokens, d))
    }
}

#[cfg(test)]
mod tests {
    use super::super::vit::Layout;
    use super::*;

    fn backbone() -> Vit {
        let (hidden, intermediate) = (16, 32);
        let (layers, heads, layout) = (3, 4, Layout::HuggingFace);
        Vit::random(VitConfig { layout, image: 16, patch: 4, hidden, layers, heads, intermediate, eps: 1e-6 }, 4)
            .unwrap()
    }

    /// Before anything is learned, LoRA and AdaptFormer add nothing: what the head reads is the backbone's.
    #[test]
    fn a_frozen_backbone_on_tensors_is_the_float_one() {
        let (vit, options) = (backbone(), TrainOptions { heads: 2, rank: 8, ..TrainOptions::default() });
        let set = Dataset::synthetic(16, 3, 5, 2).unwrap();
        let features = cached_features(&vit, &set.train, &[0]).unwrap();
        let given = Given::new(features.iter().map(|(f, _)| f)).unwrap();
        for way in [Way::AdaptFormer, Way::Lora] {
            let model = Model::new(&vit, (way, &[0, 2]), &options, 3).unwrap();
            let got = model.logits(&given).unwrap().to_vec2::<f32>().unwrap();
            let want = model.twin.classify(&given.last).unwrap().to_vec2::<f32>().unwrap();
            for (got, want) in got.iter().flatten().zip(want.iter().flatten()) {
                assert!((got - want).abs() < 1e-4, "{way}: {got} {want}");
            }
        }
    }

    /// Whatever is added is moved, and nothing of the backbone is.
    #[test]
    fn every_way_learns_what_it_adds() {
        let vit = backbone();
        let set = Dataset::synthetic(16, 2, 20, 2).unwrap();
        let options = TrainOptions { heads: 2, rank: 8, steps: 60, batch: 16, lr: 1e-2, ..TrainOptions::default() };
        for way in Way::ALL {
            let mut losses = Vec::new();
            let learned = learn(&vit, &set, (way, &[0, 2]), &options, &mut |_, loss| losses.push(loss)).unwrap();
            let mean = |part: &[f32]| part.iter().sum::<f32>() / part.len() as f32;
            assert!(mean(&losses[50..]) < 0.8 * mean(&losses[..10]), "{way}: {losses:?}");
            assert!((0.0..=1.0).contains(&learned.accuracy), "{way}");
            let (d, r) = (16, 8);
            let head = 2 * d + 2 * d + 2;
            let pair = 2 * d * r + d + r;
            match way {
                Way::AdaptFormer => assert_eq!(learned.parameters, head + 2 * pair),
                Way::Lora => assert_eq!(learned.parameters, head + 4 * pair),
                Way::OneWay | Way::TwoWay => assert!(learned.parameters > head + 2 * pair),
            }
        }
        for (at, steps) in [(vec![], 1), (vec![3], 1), (vec![2, 0], 1), (vec![0], 0)] {
            let options = TrainOptions { steps, ..options.clone() };
            let refused = learn(&vit, &set, (Way::Lora, &at), &options, &mut |_, _| ()).unwrap_err();
            assert!(matches!(refused, Error::Config(_)), "{refused}");
        }
    }
}
