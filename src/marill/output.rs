//! The directory of a model that was made: weights, configuration, tokenizer, and in `trefoil.json` what was done.

use std::borrow::Cow;
use std::path::Path;

use safetensors::tensor::{Dtype, TensorView};
use serde_json::Value;

use super::disk;
use crate::error::{Error, Result};
use crate::model::checkpoint::Checkpoint;
use crate::model::variant::{self, Record};
use crate::model::{Linear, Weights};
use crate::plan::Module;

/// What stands beside the weights and is as the base has it.
const BESIDE: [&str; 7] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
];

/// A tensor: its name, its name in the base, shape and values.
type Named = (String, String, Vec<usize>, Vec<f32>);

/// All tensors of a model, layer `i` of which was layer `origin[i]` of the base.
fn tensors(w: &Weights, origin: &[usize]) -> Vec<Named> {
    let mut all: Vec<Named> = Vec::new();
    let mut add = |name: String, from: String, shape: &[usize], values: Vec<f32>| {
        all.push((name, from, shape.to_vec(), values));
    };
    let once = |name: &str| (name.to_owned(), name.to_owned());
    let (name, from) = once("model.embed_tokens.weight");
    add(name, from, w.embed.shape(), w.embed.iter().copied().collect());
    for ((i, layer), origin) in w.layers.iter().enumerate().zip(origin) {
        let names = |part: &str| (format!("model.layers.{i}.{part}"), format!("model.layers.{origin}.{part}"));
        let gains = [
            ("input_layernorm.weight", Some(&layer.input_norm)),
            ("self_attn.q_norm.weight", layer.q_norm.as_ref()),
            ("self_attn.k_norm.weight", layer.k_norm.as_ref()),
            ("post_attention_layernorm.weight", Some(&layer.post_norm)),
        ];
        for (part, gain) in gains {
            if let Some(g) = gain {
                let (name, from) = names(part);
                add(name, from, g.shape(), g.to_vec());
            }
        }
        for module in Module::ALL {
            let (Linear { w, bias, .. }, path) = (layer.linear(module), module.path());
            let (name, from) = names(&format!("{path}.weight"));
            add(name, from, w.shape(), w.iter().copied().collect());
            if let Some(b) = bias {
                let (name, from) = names(&format!("{path}.bias"));
                add(name, from, b.shape(), b.to_vec());
            }
        }
    }
    let (name, from) = once("model.norm.weight");
    add(name, from, w.norm.shape(), w.norm.to_vec());
    if let Some(head) = &w.head {
        let (name, from) = once("lm_head.weight");
        add(name, from, head.shape(), head.iter().copied().collect());
    }
    all
}

/// Whether the base stores exactly these values: its bytes are then taken as they are, in its own number format.
fn stored<'a>(base: &'a Checkpoint, name: &str, shape: &[usize], values: &[f32]) -> Option<(Dtype, &'a [u8])> {
    if !base.has(name) {
        return None;
    }
    let (dtype, bytes) = base.stored(name, shape).ok()?;
    let same = |(v, f): (&f32, f32)| v.to_bits() == f.to_bits();
    let all = match dtype {
        Dtype::F32 => values.iter().zip(bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b))).all(same),
        Dtype::BF16 => {
            values.iter().zip(bytes.as_chunks::<2>().0.iter().map(|b| half::bf16::from_le_bytes(*b).to_f32())).all(same)
        }
        Dtype::F16 => {
            values.iter().zip(bytes.as_chunks::<2>().0.iter().map(|b| half::f16::from_le_bytes(*b).to_f32())).all(same)
        }
        _ => false,
    };
    all.then_some((dtype, bytes))
}

/// Writes the model into `dir`: what is as in the base with the base's bytes, the rest as f32.
///
/// # Errors
/// [`Error::Io`] naming the file; [`Error::Model`] for the base's configuration.
pub(super) fn write_model(dir: &Path, base_dir: &Path, base: &Checkpoint, w: &Weights, origin: &[usize]) -> Result<()> {
    let all = tensors(w, origin);
    let bytes = |(_, from, shape, values): &Named| -> (Dtype, Cow<'_, [u8]>) {
        match stored(base, from, shape, values) {
            Some((dtype, bytes)) => (dtype, bytes.into()),
            None => (Dtype::F32, values.iter().flat_map(|v| v.to_le_bytes()).collect()),
        }
    };
    let contents: Vec<_> = all.iter().map(bytes).collect();
    let views = all.iter().zip(&contents).map(|((name, _, shape, _), (dtype, bytes))| {
        let view = TensorView::new(*dtype, shape.clone(), bytes);
        view.map(|v| (name.as_str(), v)).map_err(|e| Error::Internal(format!("{name}: {e}")))
    });
    // As transformers marks its files, without which it does not load them.
    let format = [("format".to_owned(), "pt".to_owned())].into();
    disk::write_safetensors(&dir.join("model.safetensors"), views.collect::<Result<_>>()?, Some(format))?;
    copy_beside(dir, base_dir)?;

    let path = base_dir.join("config.json");
    let text = std::fs::read(&path).map_err(|e| Error::io(path.display().to_string(), e))?;
    let mut config: Value =
        serde_json::from_slice(&text).map_err(|e| Error::Model(format!("{}: is not JSON ({e})", path.display())))?;
    config["num_hidden_layers"] = w.config.num_layers.into();
    // A list with an entry for each layer would no longer go with their number.
    if let Some(fields) = config.as_object_mut() {
        fields.remove("layer_types");
    }
    disk::write_json(&dir.join("config.json"), &config)
}

fn copy_beside(dir: &Path, base_dir: &Path) -> Result<()> {
    for name in BESIDE {
        let from = base_dir.join(name);
        match std::fs::read(&from) {
            Ok(bytes) => disk::replace(&dir.join(name), |out| out.write_all(&bytes))?,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(Error::io(from.display().to_string(), e)),
        }
    }
    Ok(())
}

/// Writes `trefoil.json`: last, so that where it is, everything is.
pub(super) fn write_record(dir: &Path, record: &Record) -> Result<()> {
    disk::write_json(&dir.join(variant::FILE), record)
}
