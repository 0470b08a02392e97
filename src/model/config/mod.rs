//! `config.json`: the architecture and its numbers, read strictly. A configuration decides how much memory we allocate
//! and which arithmetic we run, so every number is checked before use, and what we do not implement (an unknown
//! architecture, rope scaling, activation, quantised weights) is refused by name rather than run approximately.

mod read;

pub use super::variant::{Activation, LayerShape, Softmax, Variant};
use crate::error::{Error, Result};

/// The model families that are implemented. All but the last are pre-norm decoders with RMSNorm, rotary positions and a SwiGLU MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Arch {
    /// `LlamaForCausalLM`: Llama, OpenLLaMA, TinyLlama, SmolLM, deepseek-coder.
    Llama,
    /// `MistralForCausalLM`.
    Mistral,
    /// `Qwen2ForCausalLM`: biases on q, k and v.
    Qwen2,
    /// `Qwen3ForCausalLM`: an RMSNorm per head on q and k before the rotation.
    Qwen3,
    /// `ViTForImageClassification`: an encoder. Every position sees every other, nothing is rotated, the MLP has no gate, and all maps have
    /// biases. Its LayerNorms are RMSNorms of a residual stream that is kept centred (`cryptpeft::encoder` makes it so). No directory is read
    /// as one: it is what adapters over a vision transformer are compared with.
    Vit,
}

impl Arch {
    /// Every architecture that a directory may have, with its name in `config.json`.
    pub const ALL: [(Arch, &'static str); 4] = [
        (Arch::Llama, "LlamaForCausalLM"),
        (Arch::Mistral, "MistralForCausalLM"),
        (Arch::Qwen2, "Qwen2ForCausalLM"),
        (Arch::Qwen3, "Qwen3ForCausalLM"),
    ];

    /// Its name in `config.json`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Arch::Llama => "LlamaForCausalLM",
            Arch::Mistral => "MistralForCausalLM",
            Arch::Qwen2 => "Qwen2ForCausalLM",
            Arch::Qwen3 => "Qwen3ForCausalLM",
            Arch::Vit => "ViTForImageClassification",
        }
    }
}

/// Rotary position embedding.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rope {
    /// Base of the frequencies: pair `i` of `n` turns by `theta^(-i/n)` radians per position.
    pub theta: f64,
    /// What is done to the frequencies for long contexts.
    pub scaling: RopeScaling,
}

/// How the rotary frequencies were stretched for contexts longer than the ones first trained on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// Every frequency divided by `factor`.
    Linear {
        /// At least 1.
        factor: f64,
    },
    /// Llama 3.1: low frequencies divided by `factor`, high ones kept, a linear blend between.
    Llama3 {
        /// At least 1.
        factor: f64,
        /// Wavelengths longer than `original_max_position_embeddings / low_freq_factor` are stretched in full.
        low_freq_factor: f64,
        /// Wavelengths shorter than `original_max_position_embeddings / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// The context length, in tokens, before stretching.
        original_max_position_embeddings: usize,
    },
}

/// The public description of a model: everything but its weights.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// The model family.
    pub arch: Arch,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP.
    pub intermediate_size: usize,
    /// Number of decoder layers.
    pub num_layers: usize,
    /// Number of query heads.
    pub num_heads: usize,
    /// Number of key/value heads; divides `num_heads` (grouped-query attention where it is less).
    pub num_kv_heads: usize,
    /// Width of one head; even, since the rotation works on pairs.
    pub head_dim: usize,
    /// Rows of the embedding; every token id is below it.
    pub vocab_size: usize,
    /// Most positions (prompt and answer together) the model may be run on. Where the model attends through a sliding
    /// window this is clamped to the window: up to there windowed and full attention are the same thing, so the model
    /// is run exactly, and beyond it it is not run at all.
    pub max_positions: usize,
    /// Added to the mean square in every RMSNorm.
    pub rms_norm_eps: f64,
    /// Rotary position embedding.
    pub rope: Rope,
    /// Whether the output head is the embedding matrix.
    pub tie_word_embeddings: bool,
    /// Whether q, k and v have biases.
    pub qkv_bias: bool,
    /// Whether the attention's output projection has a bias.
    pub o_bias: bool,
    /// Whether gate, up and down have biases.
    pub mlp_bias: bool,
    /// Whether q and k pass an RMSNorm per head before the rotation.
    pub qk_norm: bool,
    /// The activation of the MLP's gate.
    pub activation: Activation,
    /// Of an encoder's `intermediate_size` neurons the last so many are ReLUs: AdaptFormer's bottleneck of that rank beside each layer's MLP,
    /// which reads what the MLP reads (arXiv 2205.13535, section 3.2).
    pub bottleneck: usize,
    /// The token that begins a text, if the model has one.
    pub bos_id: Option<u32>,
    /// The tokens that end an answer; may be empty.
    pub eos_ids: Vec<u32>,
    /// Where layers are not as all this says: `trefoil.json`.
    pub variant: Option<Variant>,
}

impl ModelConfig {
    /// A plain Llama of this shape: `heads` heads that share the hidden size evenly, untied, without biases or special tokens.
    #[must_use]
    pub fn llama(
        hidden_size: usize,
        intermediate_size: usize,
        num_layers: usize,
        heads: usize,
        vocab_size: usize,
        max_positions: usize,
    ) -> Self {
        ModelConfig {
            arch: Arch::Llama,
            hidden_size,
            intermediate_size,
            num_layers,
            num_heads: heads,
            num_kv_heads: heads,
            head_dim: hidden_size / heads.max(1),
            vocab_size,
            max_positions,
            rms_norm_eps: 1e-5,
            rope: Rope { theta: 1e4, scaling: RopeScaling::None },
            tie_word_embeddings: false,
            qkv_bias: false,
            o_bias: false,
            mlp_bias: false,
            qk_norm: false,
            activation: Activation::Silu,
            bottleneck: 0,
            bos_id: None,
            eos_ids: Vec::new(),
            variant: None,
        }
    }

    /// A vision transformer of this shape, for `positions` positions: see [`Arch::Vit`].
    #[must_use]
    pub fn vit(
        hidden_size: usize,
        intermediate_size: usize,
        num_layers: usize,
        heads: usize,
        labels: usize,
        positions: usize,
    ) -> Self {
        ModelConfig {
            arch: Arch::Vit,
            qkv_bias: true,
            o_bias: true,
            mlp_bias: true,
            activation: Activation::Gelu,
            ..ModelConfig::llama(hidden_size, intermediate_size, num_layers, heads, labels, positions)
        }
    }

    /// Whether every position sees every other, without rotation, and the MLP has no gate.
    #[must_use]
    pub fn encoder(&self) -> bool {
        self.arch == Arch::Vit
    }

    /// How many positions each of `tokens` rows sees that come after `first` others.
    pub fn visible(&self, first: usize, tokens: usize) -> impl Iterator<Item = usize> + Clone + use<> {
        let encoder = self.encoder();
        (0..tokens).map(move |t| if encoder { first + tokens } else { first + t + 1 })
    }

    /// Rows of the matrix that gate and up make together.
    #[must_use]
    pub fn gate_up_size(&self) -> usize {
        if self.encoder() { self.intermediate_size } else { 2 * self.intermediate_size }
    }

    /// Checks that the numbers go together and are of a size that a real model can have.
    ///
    /// # Errors
    /// [`Error::Model`] naming the field. A configuration that was read by [`ModelConfig::open`] has passed it; one
    /// that was put together by hand should be given it.
    pub fn check(&self) -> Result<()> {
        let wrong = |text: String| Err(Error::Model(text));
        // Generous, and small enough that the product of any three of them is far from overflowing a u64.
        let sizes = [
            ("hidden_size", self.hidden_size, 1 << 16),
            ("intermediate_size", self.intermediate_size, 1 << 19),
            ("num_hidden_layers", self.num_layers, 1 << 10),
            ("num_attention_heads", self.num_heads, 1 << 10),
            ("num_key_value_heads", self.num_kv_heads, 1 << 10),
            ("head_dim", self.head_dim, 1 << 10),
            ("vocab_size", self.vocab_size, 1 << 21),
            ("max_position_embeddings", self.max_positions, 1 << 24),
        ];
        for (name, value, most) in sizes {
            if value == 0 || value > most {
                return wrong(format!("{name} is {value}; it must be between 1 and {most}"));
            }
        }
        if !self.num_heads.is_multiple_of(self.num_kv_heads) {
            return wrong(format!(
                "num_attention_heads = {} is not a multiple of num_key_value_heads = {}",
                self.num_heads, self.num_kv_heads
            ));
        }
        if !self.encoder() && !self.head_dim.is_multiple_of(2) {
            return wrong(format!("head_dim is {}; it must be even, since positions rotate pairs", self.head_dim));
        }
        if !(self.rms_norm_eps > 0.0 && self.rms_norm_eps < 1.0) {
            return wrong(format!("rms_norm_eps is {}; it must be above 0 and below 1", self.rms_norm_eps));
        }
        if !(self.rope.theta >= 1.0 && self.rope.theta <= 1e15) {
            return wrong(format!("rope_theta is {}; it must be between 1 and 1e15", self.rope.theta));
        }
        if self.bottleneck > 0 && (!self.encoder() || self.bottleneck >= self.intermediate_size) {
            return wrong(format!(
                "a bottleneck of {} neurons: only an encoder has one, among its intermediate_size = {}",
                self.bottleneck, self.intermediate_size
            ));
        }
        self.check_scaling()?;
        if let Some(variant) = &self.variant {
            variant.check(self.num_layers, self.head_dim).map_err(Error::Model)?;
        }
        for (name, id) in
            self.bos_id.iter().map(|id| ("bos_token_id", id)).chain(self.eos_ids.iter().map(|id| ("eos_token_id", id)))
        {
            if *id as usize >= self.vocab_size {
                return wrong(format!("{name} {id} is not below vocab_size = {}", self.vocab_size));
            }
        }
        Ok(())
    }

    fn check_scaling(&self) -> Result<()> {
        let wrong = |text: String| Err(Error::Model(text));
        let sane = |factor: f64| (1.0..=1e6).contains(&factor);
        match self.rope.scaling {
            RopeScaling::None => Ok(()),
            RopeScaling::Linear { factor } if sane(factor) => Ok(()),
            RopeScaling::Llama3 {
                factor,
                low_freq_factor: low,
                high_freq_factor: high,
                original_max_position_embeddings: original,
            } if sane(factor) => {
                if !(low > 0.0 && low < high && high <= 1e6) {
                    return wrong(format!(
                        "rope scaling has low_freq_factor {low} and high_freq_factor {high}; the first must be above 0 and below the second"
                    ));
                }
                if original == 0 || original > 1 << 24 {
                    return wrong(format!(
                        "rope scaling has original_max_position_embeddings {original}; it must be between 1 and {}",
                        1 << 24
                    ));
                }
                Ok(())
            }
            RopeScaling::Linear { factor } | RopeScaling::Llama3 { factor, .. } => {
                wrong(format!("rope scaling has factor {factor}; it must be between 1 and 1000000"))
            }
        }
    }

    /// Checks that every id is in the vocabulary.
    ///
    /// # Errors
    /// [`Error::Model`]; it does not say which id, since ids are part of the prompt.
    pub fn check_ids(&self, ids: &[u32]) -> Result<()> {
        if ids.iter().all(|&id| (id as usize) < self.vocab_size) {
            return Ok(());
        }
        Err(Error::Model(format!(
            "the text has a token outside of the model's vocabulary of {} (vocab_size in config.json); tokenizer and model do not go together, fetch both from the same place",
            self.vocab_size
        )))
    }

    /// The shape of attention and MLP in layer `index`.
    #[must_use]
    pub fn layer(&self, index: usize) -> LayerShape {
        match &self.variant {
            Some(variant) if index >= variant.from_layer => variant.shape(self.bottleneck),
            _ => LayerShape {
                num_heads: self.num_heads,
                num_kv_heads: self.num_kv_heads,
                head_dim: self.head_dim,
                softmax: Softmax::Exact,
                activation: self.activation,
                bottleneck: self.bottleneck,
            },
        }
    }

    /// Number of weights, a tied head counted once.
    #[must_use]
    pub fn parameter_count(&self) -> u64 {
        let [h, v] = [self.hidden_size, self.vocab_size].map(|n| n as u64);
        let heads = if self.tie_word_embeddings { 1 } else { 2 };
        let bias = if self.encoder() { v } else { 0 };
        (0..self.num_layers).map(|i| self.layer_parameters(i)).sum::<u64>() + h + heads * v * h + bias
    }

    /// Number of weights of layer `index`.
    #[must_use]
    pub fn layer_parameters(&self, index: usize) -> u64 {
        let shape = self.layer(index);
        let [h, f, q, kv, d] =
            [self.hidden_size, self.intermediate_size, shape.q_size(), shape.kv_size(), self.head_dim]
                .map(|n| n as u64);
        let bias = |has: bool, n: u64| if has { n } else { 0 };
        let attention =
            2 * h * q + 2 * h * kv + bias(self.qkv_bias, q + 2 * kv) + bias(self.o_bias, h) + bias(self.qk_norm, 2 * d);
        let rows = self.gate_up_size() as u64;
        let mlp = (rows + f) * h + bias(self.mlp_bias, rows + h);
        attention + mlp + 2 * h
    }
}
