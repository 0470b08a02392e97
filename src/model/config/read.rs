//! Reading of `config.json`.

use std::path::Path;

use super::super::config_json::Json;
use super::super::files;
use super::super::variant::Record;
use super::{Activation, Arch, ModelConfig, Rope, RopeScaling};
use crate::error::{Error, Result};

/// The largest `config.json` or `generation_config.json` that is read, in bytes.
const CONFIG_LIMIT: u64 = 4 << 20;

impl ModelConfig {
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
            bottleneck: 0,
            bos_id,
            eos_ids,
            variant: None,
        };
        config.check().map_err(|e| Error::Model(format!("{}: {e}", json.what())))?;
        Ok(config)
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
