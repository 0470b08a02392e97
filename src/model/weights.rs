//! The weights of a model in memory, f32, under the names that the forward pass uses.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use ndarray::{Array, Array1, Array2, ArrayView2, Dimension};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use rayon::prelude::*;

use super::adapter::LowRank;
use super::checkpoint::Checkpoint;
use super::config::ModelConfig;
use super::progress::{Progress, Stage};
use crate::error::{Error, Result};
use crate::plan::Module;

/// A linear map with an optional bias and an optional adapter: `y = x w^T + bias + (x a^T) b^T`.
#[derive(Clone, PartialEq)]
pub struct Linear {
    /// `[out, in]`, as Hugging Face stores it.
    pub w: Array2<f32>,
    /// `[out]`.
    pub bias: Option<Array1<f32>>,
    /// What is added to `w`, kept apart from it.
    pub adapter: Option<LowRank>,
}

/// The weights of one decoder layer.
#[derive(Clone, PartialEq)]
pub struct LayerWeights {
    /// Gain of the RMSNorm before the attention, `[hidden]`.
    pub input_norm: Array1<f32>,
    /// Queries, `[heads * head_dim, hidden]`.
    pub q: Linear,
    /// Keys, `[kv_heads * head_dim, hidden]`.
    pub k: Linear,
    /// Values, `[kv_heads * head_dim, hidden]`.
    pub v: Linear,
    /// The attention's output projection, `[hidden, heads * head_dim]`.
    pub o: Linear,
    /// Gain of the RMSNorm on every query head, `[head_dim]`; Qwen3 only.
    pub q_norm: Option<Array1<f32>>,
    /// Gain of the RMSNorm on every key head, `[head_dim]`; Qwen3 only.
    pub k_norm: Option<Array1<f32>>,
    /// Gain of the RMSNorm before the MLP, `[hidden]`.
    pub post_norm: Array1<f32>,
    /// The gate, `[intermediate, hidden]`.
    pub gate: Linear,
    /// What is gated, `[intermediate, hidden]`; without rows where the MLP has no gate and `gate` is all there is.
    pub up: Linear,
    /// Back to the residual stream, `[hidden, intermediate]`.
    pub down: Linear,
}

/// All weights of a model.
#[derive(Clone, PartialEq)]
pub struct Weights {
    /// What they are the weights of.
    pub config: ModelConfig,
    /// The embedding, `[vocab, hidden]`.
    pub embed: Array2<f32>,
    /// The decoder layers, first to last.
    pub layers: Vec<LayerWeights>,
    /// Gain of the final RMSNorm, `[hidden]`.
    pub norm: Array1<f32>,
    /// The output head, `[vocab, hidden]`; `None` where it is the embedding.
    pub head: Option<Array2<f32>>,
    /// Added to the logits, `[vocab]`; an encoder's only.
    pub head_bias: Option<Array1<f32>>,
}

// Weights are private: `{:?}` shows shapes only, so that none gets into a log by accident.

impl fmt::Debug for Linear {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Linear")
            .field("shape", &self.w.shape())
            .field("has_bias", &self.bias.is_some())
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for LayerWeights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LayerWeights")
            .field("q", &self.q)
            .field("k", &self.k)
            .field("gate", &self.gate)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Weights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Weights").field("config", &self.config).finish_non_exhaustive()
    }
}

/// Where the weights of one layer (or of what lies outside of the layers) come from.
trait Source {
    fn matrix(&mut self, name: &str, shape: [usize; 2]) -> Result<Array2<f32>>;
    fn bias(&mut self, name: &str, len: usize) -> Result<Array1<f32>>;
    fn gain(&mut self, name: &str, len: usize) -> Result<Array1<f32>>;

    fn linear(&mut self, name: &str, shape: [usize; 2], has_bias: bool) -> Result<Linear> {
        let w = self.matrix(&format!("{name}.weight"), shape)?;
        let bias = if has_bias { Some(self.bias(&format!("{name}.bias"), shape[0])?) } else { None };
        Ok(Linear { w, bias, adapter: None })
    }
}

impl Source for &Checkpoint {
    fn matrix(&mut self, name: &str, shape: [usize; 2]) -> Result<Array2<f32>> {
        self.tensor2(name, shape)
    }

    fn bias(&mut self, name: &str, len: usize) -> Result<Array1<f32>> {
        self.tensor1(name, len)
    }

    fn gain(&mut self, name: &str, len: usize) -> Result<Array1<f32>> {
        self.tensor1(name, len)
    }
}

/// Gaussian weights; biases and matrices of standard deviation [`Gaussian::STD`], gains that much around 1.
struct Gaussian {
    rng: ChaCha8Rng,
    spare: Option<f32>,
}

impl Gaussian {
    const STD: f32 = 0.02;

    /// Every `stream` of a seed is independent of the others, so that the layers can be made side by side.
    fn new(seed: u64, stream: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(stream);
        Gaussian { rng, spare: None }
    }

    /// Box-Muller, two values at a time.
    fn next(&mut self) -> f32 {
        if let Some(value) = self.spare.take() {
            return value;
        }
        // 24 bits each; the half keeps the logarithm's argument above 0.
        let mut uniform = || ((self.rng.next_u32() >> 8) as f32 + 0.5) * (1.0 / (1 << 24) as f32);
        let radius = Self::STD * (-2.0 * uniform().ln()).sqrt();
        let (sin, cos) = (std::f32::consts::TAU * uniform()).sin_cos();
        self.spare = Some(radius * sin);
        radius * cos
    }
}

impl Source for Gaussian {
    fn matrix(&mut self, _: &str, shape: [usize; 2]) -> Result<Array2<f32>> {
        Ok(Array2::from_shape_simple_fn(shape, || self.next()))
    }

    fn bias(&mut self, _: &str, len: usize) -> Result<Array1<f32>> {
        Ok(Array1::from_shape_simple_fn(len, || self.next()))
    }

    fn gain(&mut self, _: &str, len: usize) -> Result<Array1<f32>> {
        Ok(Array1::from_shape_simple_fn(len, || 1.0 + self.next()))
    }
}

impl LayerWeights {
    /// One of its projections.
    #[must_use]
    pub fn linear(&self, module: Module) -> &Linear {
        match module {
            Module::QProj => &self.q,
            Module::KProj => &self.k,
            Module::VProj => &self.v,
            Module::OProj => &self.o,
            Module::GateProj => &self.gate,
            Module::UpProj => &self.up,
            Module::DownProj => &self.down,
        }
    }

    /// One of its projections.
    pub fn linear_mut(&mut self, module: Module) -> &mut Linear {
        match module {
            Module::QProj => &mut self.q,
            Module::KProj => &mut self.k,
            Module::VProj => &mut self.v,
            Module::OProj => &mut self.o,
            Module::GateProj => &mut self.gate,
            Module::UpProj => &mut self.up,
            Module::DownProj => &mut self.down,
        }
    }

    /// The projections that have an adapter, in the order of the layer.
    pub fn adapted(&self) -> impl Iterator<Item = Module> + Clone {
        Module::ALL.into_iter().filter(|m| self.linear(*m).adapter.is_some())
    }

    /// Checks layer `i` as [`Weights::check`] does.
    pub(super) fn check(&self, c: &ModelConfig, i: usize) -> Result<()> {
        if c.bottleneck > 0 && self.adapted().next().is_some() {
            return Err(bottleneck_and_adapter());
        }
        let mut ranks = self.adapted().filter_map(|m| self.linear(m).adapter.as_ref().map(|a| (m, a)));
        let rank = ranks.clone().next().map_or(0, |(_, a)| a.a.nrows());
        if let Some((m, a)) = ranks.find(|(m, a)| {
            let (out, inputs) = self.linear(*m).w.dim();
            a.a.dim() != (rank, inputs) || a.b.dim() != (out, rank)
        }) {
            return Err(Error::Model(format!(
                "layer {i}: the adapter of {} is of shapes {:?} and {:?}, which are not those of its projection at rank {rank}, the layer's first",
                m.name(),
                a.a.shape(),
                a.b.shape()
            )));
        }
        let factors = |a: &LowRank| finite(&a.a) && finite(&a.b);
        let linear =
            |l: &Linear| finite(&l.w) && l.bias.as_ref().is_none_or(finite) && l.adapter.as_ref().is_none_or(factors);
        let gains = [Some(&self.input_norm), Some(&self.post_norm), self.q_norm.as_ref(), self.k_norm.as_ref()];
        let all = Module::ALL.map(|m| self.linear(m)).into_iter().all(linear);
        if all && gains.into_iter().flatten().all(finite) { Ok(()) } else { not_finite(&format!("layer {i}")) }
    }

    /// Loads layer `index`, from 0.
    ///
    /// # Errors
    /// As [`Checkpoint::tensor2`].
    pub fn load(checkpoint: &Checkpoint, index: usize) -> Result<Self> {
        Self::read(&mut &*checkpoint, checkpoint.config(), index)
    }

    fn read(source: &mut impl Source, config: &ModelConfig, index: usize) -> Result<Self> {
        let name = |part: &str| format!("model.layers.{index}.{part}");
        let shape = config.layer(index);
        let (hidden, mlp, q, kv) = (config.hidden_size, config.intermediate_size, shape.q_size(), shape.kv_size());
        let mut head_norm = |part: &str| -> Result<Option<Array1<f32>>> {
            if config.qk_norm { source.gain(&name(part), config.head_dim).map(Some) } else { Ok(None) }
        };
        let q_norm = head_norm("self_attn.q_norm.weight")?;
        let k_norm = head_norm("self_attn.k_norm.weight")?;
        Ok(LayerWeights {
            input_norm: source.gain(&name("input_layernorm.weight"), hidden)?,
            q: source.linear(&name("self_attn.q_proj"), [q, hidden], config.qkv_bias)?,
            k: source.linear(&name("self_attn.k_proj"), [kv, hidden], config.qkv_bias)?,
            v: source.linear(&name("self_attn.v_proj"), [kv, hidden], config.qkv_bias)?,
            o: source.linear(&name("self_attn.o_proj"), [hidden, q], config.o_bias)?,
            q_norm,
            k_norm,
            post_norm: source.gain(&name("post_attention_layernorm.weight"), hidden)?,
            gate: source.linear(&name("mlp.gate_proj"), [mlp, hidden], config.mlp_bias)?,
            up: match config.encoder() {
                true => Linear { w: Array2::zeros((0, hidden)), bias: None, adapter: None },
                false => source.linear(&name("mlp.up_proj"), [mlp, hidden], config.mlp_bias)?,
            },
            down: source.linear(&name("mlp.down_proj"), [hidden, mlp], config.mlp_bias)?,
        })
    }
}

pub(super) fn bottleneck_and_adapter() -> Error {
    let why = "all beside LoRA's adapters is public, so a bottleneck in the MLP cannot be private: give one of them";
    Error::Model(why.into())
}

fn finite<D: Dimension>(m: &Array<f32, D>) -> bool {
    m.iter().all(|v| v.is_finite())
}

fn not_finite(what: &str) -> Result<()> {
    Err(Error::Model(format!("{what}: a weight is not a finite number")))
}

impl Weights {
    /// Loads all weights of a checkpoint: 4 bytes of memory for each of [`ModelConfig::parameter_count`].
    ///
    /// # Errors
    /// As [`Checkpoint::tensor2`].
    pub fn load(checkpoint: &Checkpoint) -> Result<Self> {
        Self::load_telling(checkpoint, &Progress::default())
    }

    /// As [`Weights::load`], and tells how far it is.
    ///
    /// # Errors
    /// As [`Weights::load`].
    pub fn load_telling(checkpoint: &Checkpoint, progress: &Progress) -> Result<Self> {
        let config = checkpoint.config().clone();
        let (read, total) = (AtomicU64::new(0), 4 * config.parameter_count());
        let load = |index| {
            let layer = LayerWeights::load(checkpoint, index)?;
            let bytes = 4 * config.layer_parameters(index);
            progress.tell(Stage::Weights, read.fetch_add(bytes, Relaxed) + bytes, total);
            Ok(layer)
        };
        progress.tell(Stage::Weights, 0, total);
        let layers = (0..config.num_layers).into_par_iter().map(load).collect::<Result<_>>()?;
        progress.tell(Stage::Weights, total, total);
        Self::read(&mut &*checkpoint, config, layers)
    }

    /// All that is not in a layer.
    pub(super) fn load_rest(checkpoint: &Checkpoint) -> Result<Self> {
        Self::read(&mut &*checkpoint, checkpoint.config().clone(), Vec::new())
    }

    /// Random weights for tests and benchmarks: matrices and biases Gaussian with standard deviation 0.02, norm gains
    /// the same around 1. Equal seeds give equal weights.
    ///
    /// # Errors
    /// [`crate::error::Error::Model`] when the configuration does not pass [`ModelConfig::check`].
    pub fn random(config: ModelConfig, seed: u64) -> Result<Self> {
        config.check()?;
        let layers = (0..config.num_layers)
            .into_par_iter()
            .map(|index| LayerWeights::read(&mut Gaussian::new(seed, index as u64 + 1), &config, index))
            .collect::<Result<_>>()?;
        Self::read(&mut Gaussian::new(seed, 0), config, layers)
    }

    fn read(source: &mut impl Source, config: ModelConfig, layers: Vec<LayerWeights>) -> Result<Self> {
        let table = [config.vocab_size, config.hidden_size];
        let embed = source.matrix("model.embed_tokens.weight", table)?;
        let norm = source.gain("model.norm.weight", config.hidden_size)?;
        let head = if config.tie_word_embeddings { None } else { Some(source.matrix("lm_head.weight", table)?) };
        let head_bias = match config.encoder() {
            true => Some(source.bias("lm_head.bias", config.vocab_size)?),
            false => None,
        };
        Ok(Weights { config, embed, layers, norm, head, head_bias })
    }

    /// Gives these projections of every layer an adapter of `rank` whose factors are Gaussian as [`Weights::random`]'s matrices: for
    /// benchmarks.
    pub fn adapt(&mut self, modules: &[Module], rank: usize, seed: u64) {
        self.layers.par_iter_mut().enumerate().for_each(|(index, layer)| {
            let mut g = Gaussian::new(seed, index as u64 + 1);
            for module in modules {
                let linear = layer.linear_mut(*module);
                let (out, inputs) = linear.w.dim();
                let mut factor = |shape: [usize; 2]| Array2::from_shape_simple_fn(shape, || g.next());
                linear.adapter = Some(LowRank { a: factor([rank, inputs]), b: factor([out, rank]) });
            }
        });
    }

    /// Checks that every weight is a number, as those read from a checkpoint are: what is prepared from others would be
    /// silently wrong.
    ///
    /// # Errors
    /// [`Error::Model`] naming the layer.
    pub fn check(&self) -> Result<()> {
        self.layers.iter().enumerate().try_for_each(|(i, l)| l.check(&self.config, i))?;
        self.check_rest()
    }

    /// The same of all that is not in a layer.
    pub(super) fn check_rest(&self) -> Result<()> {
        if !finite(&self.embed) {
            return not_finite("the embedding");
        }
        let bias = self.head_bias.as_ref().is_none_or(finite);
        if !finite(&self.norm) || !self.head.as_ref().is_none_or(finite) || !bias {
            return not_finite("the head");
        }
        Ok(())
    }

    /// Number of the adapters' weights, if there are adapters.
    #[must_use]
    pub fn adapter_parameters(&self) -> Option<u64> {
        self.first_adapted()?;
        let of = |l: &LayerWeights| -> usize {
            l.adapted().filter_map(|m| l.linear(m).adapter.as_ref()).map(|a| a.a.len() + a.b.len()).sum()
        };
        Some(self.layers.iter().map(of).sum::<usize>() as u64)
    }

    /// The first layer with an adapter, if there is one.
    #[must_use]
    pub fn first_adapted(&self) -> Option<usize> {
        self.layers.iter().position(|l| l.adapted().next().is_some())
    }

    /// The output head, `[vocab, hidden]`, whether it is tied to the embedding or not.
    #[must_use]
    pub fn head_matrix(&self) -> ArrayView2<'_, f32> {
        self.head.as_ref().unwrap_or(&self.embed).view()
    }
}

#[cfg(test)]
mod tests {
    use super::super::config::Arch;
    use super::*;

    fn config() -> ModelConfig {
        ModelConfig {
            arch: Arch::Qwen3,
            num_kv_heads: 2,
            head_dim: 16,
            qkv_bias: true,
            qk_norm: true,
            ..ModelConfig::llama(48, 80, 3, 4, 500, 64)
        }
    }

    #[test]
    fn random_weights_are_gaussian_and_follow_the_seed() {
        let a = Weights::random(config(), 7).unwrap();
        assert_eq!(a, Weights::random(config(), 7).unwrap());
        assert_ne!(a.embed, Weights::random(config(), 8).unwrap().embed);
        assert_ne!(a.layers[0].q.w, a.layers[1].q.w);
        let (mean, std) = (a.embed.mean().unwrap(), a.embed.std(0.0));
        assert!(mean.abs() < 1e-3 && (std - 0.02).abs() < 1e-3, "{mean} {std}");
        assert!((a.norm.mean().unwrap() - 1.0).abs() < 0.02);
        assert_eq!(a.layers[2].k.w.dim(), (32, 48));
        assert_eq!(a.layers[2].k.bias.as_ref().unwrap().len(), 32);
        assert!(a.layers[2].o.bias.is_none() && a.layers[2].q_norm.is_some());
    }

    #[test]
    fn a_tied_head_is_the_embedding() {
        let weights = Weights::random(ModelConfig { tie_word_embeddings: true, ..config() }, 1).unwrap();
        assert!(weights.head.is_none());
        assert_eq!(weights.head_matrix(), weights.embed);
    }

    #[test]
    fn impossible_configurations_make_no_weights() {
        let error = Weights::random(ModelConfig { num_kv_heads: 3, ..config() }, 1).unwrap_err();
        assert!(error.to_string().contains("num_key_value_heads = 3"), "{error}");
    }

    #[test]
    fn no_weight_shows_in_debug_output() {
        let weights = Weights::random(config(), 7).unwrap();
        let layer = format!("{:?}", weights.layers[0]);
        assert!(layer.contains("[64, 48]") && !layer.contains("0."), "{layer}");
        let all = format!("{weights:?}");
        assert!(all.contains("Qwen3") && !all.contains(&weights.embed[[0, 0]].to_string()), "{all}");
        assert!(all.len() < 700, "{all}");
    }
}
