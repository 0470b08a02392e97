//! LoRA adapters (Hu and others, arXiv:2106.09685) as the Python package `peft` writes them: low-rank additions to linear maps,
//! kept apart from the base, whose directory they name.

use std::collections::BTreeMap;
use std::path::Path;

use ndarray::Array2;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::json;

use super::disk;
use crate::error::{Error, Result};
use crate::model::ModelConfig;
use crate::model::adapter::{CONFIG, PREFIX, TENSORS};
use crate::plan::Module;

/// A list of projections, with or without `_proj`, with commas between.
///
/// # Errors
/// [`Error::Config`] naming what is none.
pub fn parse_targets(text: &str) -> Result<Vec<Module>> {
    let one = |name: &str| {
        let known = |m: &Module| m.name() == name || m.name().strip_suffix("_proj") == Some(name);
        Module::ALL.into_iter().find(known).ok_or_else(|| {
            let names = Module::ALL.map(Module::name).join(",");
            Error::Config(format!("--targets: `{name}` is no target; give some of {names}"))
        })
    };
    let mut all = text.split(',').map(|name| one(name.trim())).collect::<Result<Vec<_>>>()?;
    all.sort_unstable();
    all.dedup();
    Ok(all)
}

/// The name of a tensor in [`TENSORS`]; `part` is `A` or `B`.
pub(super) fn key(layer: usize, target: Module, part: &str) -> String {
    format!("{PREFIX}{layer}.{}.lora_{part}.weight", target.path())
}

/// The factors of what is added to a projection, `alpha / rank * b a`: as they are trained and stored, the scale not in them.
#[derive(Clone)]
pub struct Factors {
    /// `[rank, in]`.
    pub a: Array2<f32>,
    /// `[out, rank]`.
    pub b: Array2<f32>,
}

/// An adapter in training; a finished one is read by [`crate::model::Adapter`].
#[derive(Clone)]
pub struct Lora {
    /// Rank of every addition.
    pub rank: usize,
    /// Additions are scaled by `alpha / rank`.
    pub alpha: f64,
    /// By layer and map.
    pub maps: BTreeMap<(usize, Module), Factors>,
}

impl Lora {
    /// A fresh one on the layers from `first` on, as `peft` starts: `a` uniform within `1 / sqrt(in)`, `b` zero, so that it
    /// changes nothing yet.
    ///
    /// # Errors
    /// [`Error::Config`] when the rank is 0 or above a dimension of a target, or alpha is not above 0.
    pub fn fresh(
        c: &ModelConfig,
        first: usize,
        targets: &[Module],
        rank: usize,
        alpha: f64,
        seed: u64,
    ) -> Result<Self> {
        if rank == 0 {
            return Err(Error::Config("--rank 0: an adapter of rank 0 changes nothing; give 1 or more".into()));
        }
        if !(alpha > 0.0 && alpha.is_finite()) {
            return Err(Error::Config(format!("--alpha {alpha}: give a number above 0")));
        }
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(ADAPTER_STREAM);
        let mut maps = BTreeMap::new();
        for layer in first..c.num_layers {
            for &target in targets {
                let (out, from) = target.dim(c, layer);
                if rank > out.min(from) {
                    return Err(Error::Config(format!(
                        "--rank {rank}: {} of layer {layer} is {out} x {from}, of rank {} at most; give a lower rank or leave it out of --targets",
                        target.name(),
                        out.min(from)
                    )));
                }
                let bound = 1.0 / (from as f32).sqrt();
                let mut uniform = || ((rng.next_u32() >> 8) as f32 / (1 << 23) as f32 - 1.0) * bound;
                let a = Array2::from_shape_simple_fn((rank, from), &mut uniform);
                maps.insert((layer, target), Factors { a, b: Array2::zeros((out, rank)) });
            }
        }
        Ok(Lora { rank, alpha, maps })
    }

    /// `alpha / rank`.
    #[must_use]
    pub fn scale(&self) -> f32 {
        (self.alpha / self.rank as f64) as f32
    }

    /// The addition to a map of layer `layer`, if it has one.
    #[must_use]
    pub fn get(&self, layer: usize, target: Module) -> Option<&Factors> {
        self.maps.get(&(layer, target))
    }

    /// Writes `adapter_config.json` and `adapter_model.safetensors` into `dir`, which name `base` as what they add to.
    ///
    /// # Errors
    /// [`Error::Io`] naming the file; what stood there before is still there.
    pub fn write(&self, dir: &Path, base: &Path) -> Result<()> {
        let mut targets: Vec<Module> = self.maps.keys().map(|(_, t)| *t).collect();
        targets.sort_unstable();
        targets.dedup();
        let mut layers: Vec<usize> = self.maps.keys().map(|(l, _)| *l).collect();
        layers.dedup();
        let config = json!({
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base.display().to_string(),
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": 0.0,
            "target_modules": targets.iter().map(|t| t.name()).collect::<Vec<_>>(),
            "layers_to_transform": layers,
            "bias": "none",
            "fan_in_fan_out": false,
            "use_rslora": false,
            "use_dora": false,
            "inference_mode": true,
        });
        let mut bytes = Vec::new();
        for ((layer, target), d) in &self.maps {
            for (part, m) in [("A", &d.a), ("B", &d.b)] {
                let values: Vec<u8> = m.iter().flat_map(|v| v.to_le_bytes()).collect();
                bytes.push((key(*layer, *target, part), m.shape().to_vec(), values));
            }
        }
        let views = bytes.iter().map(|(name, shape, values)| {
            let view = TensorView::new(Dtype::F32, shape.clone(), values);
            view.map(|v| (name.as_str(), v)).map_err(|e| Error::Internal(format!("{name}: {e}")))
        });
        disk::write_safetensors(&dir.join(TENSORS), views.collect::<Result<Vec<_>>>()?, None)?;
        disk::write_json(&dir.join(CONFIG), &config)
    }
}

/// The stream of the seed that fresh adapters are drawn from; the order of the data has those from 0 on.
const ADAPTER_STREAM: u64 = 1 << 40;
