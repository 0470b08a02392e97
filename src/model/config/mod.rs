//! `config.json`: the architecture and its numbers, read strictly. A configuration decides how much memory we allocate
//! and which arithmetic we run, so every number is checked before use, and what we do not implement (an unknown
//! architecture, rope scaling, activation, quantised weights) is refused by name rather than run approximately.

use std::path::Path;

use super::config_json::Json;
use super::files;
use super::variant::Record;
pub use super::variant::{Activation, LayerShape, Softmax, Variant};
use crate::error::{Error, Result};

/// The largest `config.json` or `generation_config.json` that is read, in bytes.
const CONFIG_LIMIT: u64 = 4 << 20;

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

    /// Reads `config.json` in `dir`, and `generation_config.json` where there is one (its begin and end tokens win).
    ///
    /// # Errors
    /// [`Error::Model`] naming the file and field; [`Error::Io`] when a file cannot be read.
    pub fn open(dir: &Path) -> Result<Self> {
        let path = dir.join("config.json");
        let bytes = files::read_required(
            &path,
            CONFIG_LIMIT,
            "the path must name a Hugging Face model directory (config.json, *.safetensors, tokenizer.json)",
        )?;
        let generation_path = dir.join("generation_config.json");
        let generation = files::read_optional(&generation_path, CONFIG_LIMIT)?;
        let json = Json::parse(&bytes, path.display().to_string())?;
        let generation = generation.map(|b| Json::parse(&b, generation_path.display().to_string())).transpose()?;
        let mut config = Self::from_json(&json, generation.as_ref())?;
        config.variant = Record::open(dir)?.and_then(|r| r.variant);
        config.check().map_err(|e| Error::Model(format!("{}: {e}", dir.display())))?;
        Ok(config)
    }

    /// Parses the text of a `config.json`, and of a `generation_config.json` if given; `what` names it in errors.
    ///
    /// # Errors
    /// [`Error::Model`] naming `what` and the field.
    pub fn parse(config: &[u8], generation: Option<&[u8]>, what: &str) -> Result<Self> {
        let json = Json::parse(config, what.to_owned())?;
        let generation = generation.map(|b| Json::parse(b, format!("{what} (generation_config.json)"))).transpose()?;
        Self::from_json(&json, generation.as_ref())
    }

    fn from_json(json: &Json, generation: Option<&Json>) -> Result<Self> {
        let arch = read_arch(json)?;
        if !json.is_null("quantization_config") {
            return Err(json.wrong(
                "quantization_config",
                "quantised weights are not supported; use the unquantised checkpoint (float32, float16 or bfloat16)",
            ));
        }
        if json.float_or("partial_rotary_factor", 1.0)? != 1.0 {
            return Err(json.wrong("partial_rotary_factor", "only 1 (the whole head is rotated) is supported"));
        }
        let activation = match json.text_or("hidden_act", "silu")? {
            "silu" | "swish" => Activation::Silu,
            "relu" => Activation::Relu,
            other => {
                return Err(json.wrong(
                    "hidden_act",
                    &format!("activation `{other}` is not supported; supported: silu (also called swish), relu"),
                ));
            }
        };

        let num_heads = json.size("num_attention_heads")?;
        let num_kv_heads = match json.optional_size("num_key_value_heads")? {
            Some(n) => n,
            // Left out, it means "as many as heads" for Llama only; the other families' defaults are of one model each.
            None if arch == Arch::Llama || json.has("num_key_value_heads") => num_heads,
            None => return Err(json.missing("num_key_value_heads")),
        };
        let hidden_size = json.size("hidden_size")?;
        let head_dim = match json.optional_size("head_dim")? {
            Some(n) => n,
            None if arch == Arch::Qwen3 && !json.has("head_dim") => return Err(json.missing("head_dim")),
            None if num_heads == 0 || !hidden_size.is_multiple_of(num_heads) => {
                return Err(json.wrong(
                    "hidden_size",
                    &format!(
                        "{hidden_size} does not divide into num_attention_heads = {num_heads}, and no head_dim is given"
                    ),
                ));
            }
            None => hidden_size / num_heads,
        };

        let attention_bias = json.flag_or("attention_bias", false)?;
        let (qkv_bias, o_bias) = match arch {
            Arch::Llama | Arch::Qwen3 => (attention_bias, attention_bias),
            Arch::Mistral => (false, false),
            Arch::Qwen2 => (true, false),
            Arch::Vit => (true, true),
        };
        let ids = generation.into_iter().chain([json]);
        let bos_id = first_given(ids.clone(), "bos_token_id")?.and_then(|ids| ids.first().copied());
        let eos_ids = first_given(ids, "eos_token_id")?.unwrap_or_default();

        let config = ModelConfig {
            arch,
            hidden_size,
            intermediate_size: json.size("intermediate_size")?,
            num_layers: json.size("num_hidden_layers")?,
            num_heads,
            num_kv_heads,
            head_dim,
            vocab_size: json.size("vocab_size")?,
            max_positions: clamp_to_window(json, arch, json.size("max_position_embeddings")?)?,
            rms_norm_eps: json.float("rms_norm_eps")?,
            rope: read_rope(json)?,
            tie_word_embeddings: json.flag_or("tie_word_embeddings", false)?,
            qkv_bias,
            o_bias,
            mlp_bias: arch == Arch::Llama && json.flag_or("mlp_bias", false)?,
            qk_norm: arch == Arch::Qwen3,
            activation,
            bos_id,
            eos_ids,
            variant: None,
        };
        config.check().map_err(|e| Error::Model(format!("{}: {e}", json.what())))?;
        Ok(config)
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
            Some(variant) if index >= variant.from_layer => variant.shape(),
            _ => LayerShape {
                num_heads: self.num_heads,
                num_kv_heads: self.num_kv_heads,
                head_dim: self.head_dim,
                softmax: Softmax::Exact,
                activation: self.activation,
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

/// The architecture named by `architectures`, which lists one.
fn read_arch(json: &Json) -> Result<Arch> {
    let name = json.first_text("architectures")?;
    Arch::ALL.iter().find(|(_, known)| *known == name).map(|(arch, _)| *arch).ok_or_else(|| {
        let known: Vec<&str> = Arch::ALL.iter().map(|(_, known)| *known).collect();
        json.wrong("architectures", &format!("`{name}` is not supported; supported: {}", known.join(", ")))
    })
}

/// Where a file gives the ids under `name` (one or a list), the first file's; `generation_config.json` comes first.
fn first_given<'a>(files: impl Iterator<Item = &'a Json>, name: &str) -> Result<Option<Vec<u32>>> {
    for json in files {
        if let Some(ids) = json.ids(name)? {
            return Ok(Some(ids));
        }
    }
    Ok(None)
}

/// The context length within which a sliding window makes no difference.
fn clamp_to_window(json: &Json, arch: Arch, max_positions: usize) -> Result<usize> {
    let windowed = match arch {
        Arch::Llama | Arch::Vit => false,
        Arch::Mistral => true,
        Arch::Qwen2 | Arch::Qwen3 => json.flag_or("use_sliding_window", false)?,
    };
    if !windowed {
        return Ok(max_positions);
    }
    match json.optional_size("sliding_window")? {
        // A window of w lets a token see itself and the w - 1 before it, so w positions see everything.
        Some(window) => Ok(max_positions.min(window)),
        None if json.has("sliding_window") => Ok(max_positions),
        // What the reference implementation assumes of these families when the field is left out.
        None => Ok(max_positions.min(4096)),
    }
}

/// Rotary parameters, in either of the two layouts of `config.json`: `rope_theta` with `rope_scaling`, or all in
/// `rope_parameters`.
fn read_rope(json: &Json) -> Result<Rope> {
    let modern = json.object("rope_parameters")?;
    let legacy = json.object("rope_scaling")?;
    let theta = match &modern {
        Some(rope) if rope.has("rope_theta") => rope.float("rope_theta")?,
        _ => json.float_or("rope_theta", 10_000.0)?,
    };
    let Some(rope) = modern.or(legacy) else {
        return Ok(Rope { theta, scaling: RopeScaling::None });
    };
    if rope.float_or("partial_rotary_factor", 1.0)? != 1.0 {
        return Err(rope.wrong("partial_rotary_factor", "only 1 (the whole head is rotated) is supported"));
    }
    let old_name = rope.text_or("type", "default")?;
    let scaling = match rope.text_or("rope_type", old_name)? {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: rope.float("factor")? },
        "llama3" => RopeScaling::Llama3 {
            factor: rope.float("factor")?,
            low_freq_factor: rope.float("low_freq_factor")?,
            high_freq_factor: rope.float("high_freq_factor")?,
            original_max_position_embeddings: rope.size("original_max_position_embeddings")?,
        },
        other => {
            return Err(rope.wrong(
                "rope_type",
                &format!("rope scaling `{other}` is not supported; supported: default, linear, llama3"),
            ));
        }
    };
    Ok(Rope { theta, scaling })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// hidden, intermediate, layers, heads, kv heads, vocabulary, positions, then the other fields as JSON.
    fn parse(arch: &str, [h, f, l, n, kv, v, p]: [usize; 7], more: &str) -> ModelConfig {
        let text = format!(
            r#"{{"architectures": ["{arch}"], "hidden_size": {h}, "intermediate_size": {f}, "num_hidden_layers": {l}, "num_attention_heads": {n},
                "num_key_value_heads": {kv}, "vocab_size": {v}, "max_position_embeddings": {p}, "rms_norm_eps": 1e-5 {more}}}"#
        );
        ModelConfig::parse(text.as_bytes(), None, "config.json").unwrap()
    }

    #[test]
    fn published_models_have_their_published_sizes() {
        let tiny = parse("LlamaForCausalLM", [2048, 5632, 22, 32, 4, 32000, 2048], "");
        assert_eq!((tiny.parameter_count(), tiny.head_dim), (1_100_048_384, 64));
        let smol = parse("LlamaForCausalLM", [576, 1536, 30, 9, 3, 49152, 2048], r#", "tie_word_embeddings": true"#);
        assert_eq!(smol.parameter_count(), 134_515_008);
        let coder = parse(
            "LlamaForCausalLM",
            [2048, 5504, 24, 16, 16, 32256, 16384],
            r#", "rope_theta": 100000, "rope_scaling": {"factor": 4.0, "type": "linear"}"#,
        );
        assert_eq!(coder.parameter_count(), 1_346_471_936);
        let mistral =
            parse("MistralForCausalLM", [4096, 14336, 32, 32, 8, 32000, 32768], r#", "sliding_window": 4096"#);
        assert_eq!((mistral.parameter_count(), mistral.max_positions), (7_241_732_096, 4096));
        let qwen2 = parse(
            "Qwen2ForCausalLM",
            [896, 4864, 24, 14, 2, 151_936, 32768],
            r#", "tie_word_embeddings": true, "sliding_window": 32768, "use_sliding_window": false"#,
        );
        assert_eq!((qwen2.parameter_count(), qwen2.max_positions), (494_032_768, 32768));
        let qwen3 = parse(
            "Qwen3ForCausalLM",
            [1024, 3072, 28, 16, 8, 151_936, 40960],
            r#", "head_dim": 128, "tie_word_embeddings": true"#,
        );
        assert_eq!((qwen3.parameter_count(), qwen3.layer(0).q_size()), (596_049_920, 2048));
    }

    #[test]
    fn a_window_bounds_the_positions_only_where_it_is_used() {
        let sizes = [64, 64, 1, 4, 4, 100, 32768];
        assert_eq!(parse("MistralForCausalLM", sizes, r#", "sliding_window": null"#).max_positions, 32768);
        assert_eq!(parse("MistralForCausalLM", sizes, "").max_positions, 4096);
        assert_eq!(parse("LlamaForCausalLM", sizes, r#", "sliding_window": 16"#).max_positions, 32768);
        assert_eq!(
            parse("Qwen2ForCausalLM", sizes, r#", "sliding_window": 16, "use_sliding_window": true"#).max_positions,
            16
        );
    }

    #[test]
    fn key_heads_left_out_are_as_many_as_query_heads_for_llama_only() {
        let text = |arch: &str, more: &str| {
            format!(
                r#"{{"architectures": ["{arch}"], "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
                    "vocab_size": 100, "max_position_embeddings": 64, "rms_norm_eps": 1e-5 {more}}}"#
            )
        };
        let parse = |arch, more| ModelConfig::parse(text(arch, more).as_bytes(), None, "config.json");
        assert_eq!(parse("LlamaForCausalLM", "").unwrap().num_kv_heads, 4);
        assert_eq!(parse("MistralForCausalLM", r#", "num_key_value_heads": null"#).unwrap().num_kv_heads, 4);
        assert!(parse("MistralForCausalLM", "").unwrap_err().to_string().contains("`num_key_value_heads` is missing"));
    }
}
