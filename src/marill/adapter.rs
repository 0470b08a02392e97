//! LoRA adapters (Hu and others, arXiv:2106.09685) as the Python package `peft` writes and reads them: low-rank additions to linear maps,
//! kept apart from the base, whose directory they name.

use std::collections::BTreeMap;
use std::path::Path;

use ndarray::Array2;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::json;

use super::disk;
use crate::error::{Error, Result};
use crate::model::{LayerWeights, Linear, ModelConfig};

/// `peft`'s description of an adapter.
pub const CONFIG: &str = "adapter_config.json";
/// `peft`'s file of its weights.
pub const WEIGHTS: &str = "adapter_model.safetensors";

/// A linear map of a decoder layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Target {
    /// Queries.
    Q,
    /// Keys.
    K,
    /// Values.
    V,
    /// The attention's output projection.
    O,
    /// The MLP's gate.
    Gate,
    /// What is gated.
    Up,
    /// Back to the residual stream.
    Down,
}

impl Target {
    /// Every target with its name in `target_modules` and its path within a layer.
    pub const ALL: [(Target, &'static str, &'static str); 7] = [
        (Target::Q, "q_proj", "self_attn.q_proj"),
        (Target::K, "k_proj", "self_attn.k_proj"),
        (Target::V, "v_proj", "self_attn.v_proj"),
        (Target::O, "o_proj", "self_attn.o_proj"),
        (Target::Gate, "gate_proj", "mlp.gate_proj"),
        (Target::Up, "up_proj", "mlp.up_proj"),
        (Target::Down, "down_proj", "mlp.down_proj"),
    ];

    fn entry(self) -> (Target, &'static str, &'static str) {
        Self::ALL[self as usize]
    }

    /// Its name in `target_modules`.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.entry().1
    }

    /// Where it stands in a layer, as in the names of tensors.
    #[must_use]
    pub fn path(self) -> &'static str {
        self.entry().2
    }

    /// A list of names, with or without `_proj`, with commas between.
    ///
    /// # Errors
    /// [`Error::Config`] naming what is no target.
    pub fn parse_list(text: &str) -> Result<Vec<Target>> {
        let one = |name: &str| {
            let known =
                Self::ALL.iter().find(|(_, known, _)| *known == name || known.strip_suffix("_proj") == Some(name));
            known.map(|(target, ..)| *target).ok_or_else(|| {
                let names: Vec<&str> = Self::ALL.iter().map(|(_, name, _)| *name).collect();
                Error::Config(format!("--targets: `{name}` is no target; give some of {}", names.join(",")))
            })
        };
        let mut all = text.split(',').map(|name| one(name.trim())).collect::<Result<Vec<_>>>()?;
        all.sort_unstable();
        all.dedup();
        Ok(all)
    }

    /// The map in a layer.
    #[must_use]
    pub fn of(self, layer: &LayerWeights) -> &Linear {
        match self {
            Target::Q => &layer.q,
            Target::K => &layer.k,
            Target::V => &layer.v,
            Target::O => &layer.o,
            Target::Gate => &layer.gate,
            Target::Up => &layer.up,
            Target::Down => &layer.down,
        }
    }

    fn of_mut(self, layer: &mut LayerWeights) -> &mut Linear {
        match self {
            Target::Q => &mut layer.q,
            Target::K => &mut layer.k,
            Target::V => &mut layer.v,
            Target::O => &mut layer.o,
            Target::Gate => &mut layer.gate,
            Target::Up => &mut layer.up,
            Target::Down => &mut layer.down,
        }
    }

    /// Rows and columns of its matrix in layer `index`.
    #[must_use]
    pub fn shape(self, c: &ModelConfig, index: usize) -> [usize; 2] {
        let shape = c.layer(index);
        match self {
            Target::Q => [shape.q_size(), c.hidden_size],
            Target::K | Target::V => [shape.kv_size(), c.hidden_size],
            Target::O => [c.hidden_size, shape.q_size()],
            Target::Gate | Target::Up => [c.intermediate_size, c.hidden_size],
            Target::Down => [c.hidden_size, c.intermediate_size],
        }
    }
}

/// The name of a tensor in [`WEIGHTS`]; `part` is `A` or `B`.
pub(super) fn key(layer: usize, target: Target, part: &str) -> String {
    format!("base_model.model.model.layers.{layer}.{}.lora_{part}.weight", target.path())
}

/// The addition to one linear map: `alpha / rank * b a`.
#[derive(Clone, PartialEq)]
pub struct LowRank {
    /// `[rank, in]`.
    pub a: Array2<f32>,
    /// `[out, rank]`.
    pub b: Array2<f32>,
}

impl std::fmt::Debug for LowRank {
    /// Shapes only: the values are private.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LowRank").field("a", &self.a.shape()).field("b", &self.b.shape()).finish()
    }
}

/// An adapter.
#[derive(Clone, Debug, PartialEq)]
pub struct Lora {
    /// Rank of every addition.
    pub rank: usize,
    /// Additions are scaled by `alpha / rank`.
    pub alpha: f64,
    /// By layer and map.
    pub maps: BTreeMap<(usize, Target), LowRank>,
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
        targets: &[Target],
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
                let [out, from] = target.shape(c, layer);
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
                maps.insert((layer, target), LowRank { a, b: Array2::zeros((out, rank)) });
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
    pub fn get(&self, layer: usize, target: Target) -> Option<&LowRank> {
        self.maps.get(&(layer, target))
    }

    /// Adds it to the base's weights.
    pub fn merge_into(&self, layers: &mut [LayerWeights]) {
        for ((layer, target), d) in &self.maps {
            if let Some(layer) = layers.get_mut(*layer) {
                target.of_mut(layer).w.scaled_add(self.scale(), &d.b.dot(&d.a));
            }
        }
    }

    /// Writes `adapter_config.json` and `adapter_model.safetensors` into `dir`, which name `base` as what they add to.
    ///
    /// # Errors
    /// [`Error::Io`] naming the file; what stood there before is still there.
    pub fn write(&self, dir: &Path, base: &Path) -> Result<()> {
        let mut targets: Vec<Target> = self.maps.keys().map(|(_, t)| *t).collect();
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
        disk::write_safetensors(&dir.join(WEIGHTS), views.collect::<Result<Vec<_>>>()?, None)?;
        disk::write_json(&dir.join(CONFIG), &config)
    }

    /// Reads the adapter that [`Lora::write`] has written into `dir`, for a base of this shape.
    ///
    /// # Errors
    /// [`Error::Model`] naming file and tensor.
    pub fn open(dir: &Path, c: &ModelConfig) -> Result<Self> {
        let path = dir.join(CONFIG);
        let wrong = |e: String| Error::Model(format!("{}: {e}; make the adapter anew", path.display()));
        let text = std::fs::read(&path).map_err(|e| Error::io(path.display().to_string(), e))?;
        let config: serde_json::Value = serde_json::from_slice(&text).map_err(|e| wrong(e.to_string()))?;
        let rank = config["r"].as_u64().filter(|r| *r > 0).ok_or_else(|| wrong("`r` is no rank".into()))? as usize;
        let alpha = config["lora_alpha"].as_f64().ok_or_else(|| wrong("`lora_alpha` is no number".into()))?;
        let path = dir.join(WEIGHTS);
        let wrong = |e: String| Error::Model(format!("{}: {e}; make the adapter anew", path.display()));
        let bytes = std::fs::read(&path).map_err(|e| Error::io(path.display().to_string(), e))?;
        let file = SafeTensors::deserialize(&bytes).map_err(|e| wrong(e.to_string()))?;
        let mut maps = BTreeMap::new();
        for layer in 0..c.num_layers {
            for (target, ..) in Target::ALL {
                let [out, from] = target.shape(c, layer);
                let part = |part: &str, shape: [usize; 2]| -> Result<Option<Array2<f32>>> {
                    let name = key(layer, target, part);
                    let Ok(view) = file.tensor(&name) else { return Ok(None) };
                    if view.shape() != shape || view.dtype() != Dtype::F32 {
                        return Err(wrong(format!(
                            "{name} is {:?} {:?}, but for this base it must be F32 {shape:?}",
                            view.dtype(),
                            view.shape()
                        )));
                    }
                    let values = view.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
                    Array2::from_shape_vec(shape, values).map(Some).map_err(|e| wrong(e.to_string()))
                };
                match (part("A", [rank, from])?, part("B", [out, rank])?) {
                    (Some(a), Some(b)) => {
                        maps.insert((layer, target), LowRank { a, b });
                    }
                    (None, None) => {}
                    _ => return Err(wrong(format!("{} has only one of A and B", key(layer, target, "?")))),
                }
            }
        }
        if 2 * maps.len() != file.len() {
            return Err(wrong("has tensors that this base has no place for".into()));
        }
        Ok(Lora { rank, alpha, maps })
    }
}

/// The stream of the seed that fresh adapters are drawn from; the order of the data has those from 0 on.
const ADAPTER_STREAM: u64 = 1 << 40;
