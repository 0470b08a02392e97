//! The backbone's tensors by the names of Hugging Face and of torchvision.

use std::path::Path;

use ndarray::{Axis, concatenate};
use rayon::prelude::*;

use super::adapter::Affine;
use super::tensors::Tensors;
use super::vit::{CHANNELS, Layer, Layout, Vit, VitConfig};
use crate::error::{Error, Result};
use crate::model::config_json::Json;
use crate::model::files;

/// The largest `config.json` that is read, in bytes; a classifier's lists its labels.
const CONFIG_LIMIT: u64 = 16 << 20;

/// Opens a directory or a file.
pub(super) fn open(dir_or_file: &Path) -> Result<Vit> {
    let path = if dir_or_file.is_dir() { dir_or_file.join("model.safetensors") } else { dir_or_file.to_path_buf() };
    if !path.exists() {
        let text = "is not there; give the directory of a vision transformer with its weights in one model.safetensors, or the file";
        return Err(Error::Model(format!("{}: {text}", path.display())));
    }
    let config_path = path.with_file_name("config.json");
    let bytes = files::read_optional(&config_path, CONFIG_LIMIT)?;
    let json = bytes.map(|bytes| Json::parse(&bytes, config_path.display().to_string())).transpose()?;
    let mut file = Tensors::open(path, "a vision transformer")?;
    let vit = "vit.embeddings.cls_token";
    if file.has("class_token") {
        let config = torchvision_config(&file, json.as_ref())?;
        return read(&mut file, config, &Names::torchvision());
    }
    if !(file.has(vit) || file.has(&vit[4..])) {
        let text = "is missing, and neither `embeddings.cls_token` nor torchvision's `class_token` is there: this is no vision transformer that is read";
        return Err(file.wrong(vit, text));
    }
    let json = json.ok_or_else(|| {
        let text = "no such file; it must lie beside the weights of a Hugging Face model";
        Error::Model(format!("{}: {text}", config_path.display()))
    })?;
    let names = Names::hugging_face(&file);
    read(&mut file, hugging_face_config(&json)?, &names)
}

/// What a layout calls the tensors.
struct Names {
    layout: Layout,
    class_token: String,
    positions: String,
    patches: String,
    /// Before the number of a layer.
    layer: String,
    ln_1: &'static str,
    /// Queries, keys and values.
    qkv: Option<[&'static str; 3]>,
    out: &'static str,
    ln_2: &'static str,
    mlp: [&'static str; 2],
}

impl Names {
    fn torchvision() -> Self {
        Names {
            layout: Layout::Torchvision,
            class_token: "class_token".to_owned(),
            positions: "encoder.pos_embedding".to_owned(),
            patches: "conv_proj".to_owned(),
            layer: "encoder.layers.encoder_layer_".to_owned(),
            ln_1: "ln_1",
            qkv: None,
            out: "self_attention.out_proj",
            ln_2: "ln_2",
            mlp: ["mlp.0", "mlp.3"],
        }
    }

    /// As transformers writes them to disk, or as they are called within transformers 5.
    fn hugging_face(file: &Tensors) -> Self {
        let p = if file.has("vit.embeddings.cls_token") { "vit." } else { "" };
        let within = file.has(&format!("{p}layers.0.attention.q_proj.weight"));
        Names {
            layout: Layout::HuggingFace,
            class_token: format!("{p}embeddings.cls_token"),
            positions: format!("{p}embeddings.position_embeddings"),
            patches: format!("{p}embeddings.patch_embeddings.projection"),
            layer: if within { format!("{p}layers.") } else { format!("{p}encoder.layer.") },
            ln_1: "layernorm_before",
            qkv: Some(if within {
                ["attention.q_proj", "attention.k_proj", "attention.v_proj"]
            } else {
                ["attention.attention.query", "attention.attention.key", "attention.attention.value"]
            }),
            out: if within { "attention.o_proj" } else { "attention.output.dense" },
            ln_2: "layernorm_after",
            mlp: if within { ["mlp.fc1", "mlp.fc2"] } else { ["intermediate.dense", "output.dense"] },
        }
    }
}

fn hugging_face_config(json: &Json) -> Result<VitConfig> {
    let kind = json.text_or("model_type", "vit")?;
    if kind != "vit" {
        return Err(json.wrong("model_type", &format!("is `{kind}`, but only `vit` is read; use a ViT backbone")));
    }
    let activation = json.text_or("hidden_act", "gelu")?;
    if activation != "gelu" {
        return Err(json.wrong("hidden_act", &format!("is `{activation}`, but only `gelu` is computed")));
    }
    let channels = json.optional_size("num_channels")?.unwrap_or(CHANNELS);
    if channels != CHANNELS {
        return Err(json.wrong("num_channels", &format!("is {channels}, but images have {CHANNELS}")));
    }
    let config = VitConfig {
        layout: Layout::HuggingFace,
        image: json.size("image_size")?,
        patch: json.size("patch_size")?,
        hidden: json.size("hidden_size")?,
        layers: json.size("num_hidden_layers")?,
        heads: json.size("num_attention_heads")?,
        intermediate: json.size("intermediate_size")?,
        eps: json.float_or("layer_norm_eps", 1e-12)?,
    };
    config.check(json.what())?;
    Ok(config)
}

fn torchvision_config(file: &Tensors, json: Option<&Json>) -> Result<VitConfig> {
    let [hidden, _, patch, _] = file.sizes("conv_proj.weight", "[hidden, 3, patch, patch]")?;
    let [_, tokens, _] = file.sizes("encoder.pos_embedding", "[1, tokens, hidden]")?;
    let across = (tokens - 1).isqrt();
    if across == 0 || across * across != tokens - 1 {
        let text = format!("is of {tokens} tokens, which are not one and those of a square image");
        return Err(file.wrong("encoder.pos_embedding", &text));
    }
    let layer = "encoder.layers.encoder_layer_";
    let layers = (0..).take_while(|i| file.has(&format!("{layer}{i}.ln_1.weight"))).count();
    let first = [0, 1].map(|n| format!("{layer}0.{}.weight", mlp(file, 0)[n]));
    let [intermediate, _] = file.sizes(&first[0], "[intermediate, hidden]")?;
    let (heads, eps) = match json {
        Some(json) => (json.optional_size("num_attention_heads")?, json.float_or("layer_norm_eps", 1e-6)?),
        None => (None, 1e-6),
    };
    let heads = heads.or_else(|| hidden.is_multiple_of(64).then_some(hidden / 64)).ok_or_else(|| {
        let text = format!("has the hidden size {hidden}, of which 64 is no part: give \"num_attention_heads\" in a config.json beside the file");
        file.wrong("conv_proj.weight", &text)
    })?;
    let image = across.saturating_mul(patch);
    let config = VitConfig { layout: Layout::Torchvision, image, patch, hidden, layers, heads, intermediate, eps };
    config.check(&file.path().display().to_string())?;
    Ok(config)
}

/// What torchvision calls the MLP of a layer: before version 0.13 otherwise.
fn mlp(file: &Tensors, layer: usize) -> [&'static str; 2] {
    let older = ["mlp.linear_1", "mlp.linear_2"];
    let is_older = file.has(&format!("encoder.layers.encoder_layer_{layer}.{}.weight", older[0]));
    if is_older { older } else { ["mlp.0", "mlp.3"] }
}

fn read(file: &mut Tensors, config: VitConfig, names: &Names) -> Result<Vit> {
    let source = match names.layout {
        Layout::HuggingFace => "by config.json",
        Layout::Torchvision => "by the shapes of `conv_proj.weight`, `encoder.pos_embedding` and the first MLP",
    };
    file.facts = format!("{source} it is {config:?}; the tensors are not all of one model");
    let file = &*file;
    let (d, patch, tokens) = (config.hidden, config.patch, config.tokens());
    let patches = Affine {
        weight: file.reshaped(&format!("{}.weight", names.patches), &[d, CHANNELS, patch, patch], d)?,
        bias: file.vector(&format!("{}.bias", names.patches), d)?,
    };
    let class_token = file.values(&names.class_token, &[1, 1, d])?.into();
    let positions = file.reshaped(&names.positions, &[1, tokens, d], tokens)?;
    let layers = (0..config.layers).into_par_iter();
    let layers = layers.map(|i| read_layer(file, &config, names, i)).collect::<Result<_>>()?;
    Ok(Vit { config, patches, class_token, positions, layers })
}

fn read_layer(file: &Tensors, config: &VitConfig, names: &Names, index: usize) -> Result<Layer> {
    let (d, m) = (config.hidden, config.intermediate);
    let name = |part: &str| format!("{}{index}.{part}", names.layer);
    let [mlp_1, mlp_2] = if names.layout == Layout::Torchvision { mlp(file, index) } else { names.mlp };
    let qkv = match names.qkv {
        None => Affine {
            weight: file.matrix(&name("self_attention.in_proj_weight"), 3 * d, d)?,
            bias: file.vector(&name("self_attention.in_proj_bias"), 3 * d)?,
        },
        Some(parts) => {
            let parts = parts.map(|part| -> Result<Affine> {
                // `qkv_bias` may be false.
                if !file.has(&name(&format!("{part}.bias"))) {
                    let weight = file.matrix(&name(&format!("{part}.weight")), d, d)?;
                    return Ok(Affine { weight, bias: ndarray::Array1::zeros(d) });
                }
                file.affine(&name(part), d, d)
            });
            let [q, k, v] = parts;
            let (q, k, v) = (q?, k?, v?);
            let weights = [q.weight.view(), k.weight.view(), v.weight.view()];
            let biases = [q.bias.view(), k.bias.view(), v.bias.view()];
            let internal = |e| Error::Internal(format!("{}: {e}", name("attention")));
            Affine {
                weight: concatenate(Axis(0), &weights).map_err(internal)?,
                bias: concatenate(Axis(0), &biases).map_err(internal)?,
            }
        }
    };
    Ok(Layer {
        ln_1: file.norm(&name(names.ln_1), d)?,
        qkv,
        out: file.affine(&name(names.out), d, d)?,
        ln_2: file.norm(&name(names.ln_2), d)?,
        mlp_1: file.affine(&name(mlp_1), m, d)?,
        mlp_2: file.affine(&name(mlp_2), d, m)?,
    })
}
