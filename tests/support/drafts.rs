//! Draft models for tests, made from the bundled model: as it is, disturbed, or replaced by noise.
#![allow(dead_code, clippy::missing_panics_doc)] // every test file uses a part of it

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use ndarray::{Array1, Array2};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use trefoil::model::{Checkpoint, ModelConfig, Weights};

pub fn quill() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/quill-4m")
}

pub fn weights() -> Weights {
    Weights::load(&Checkpoint::open(&quill()).unwrap()).unwrap()
}

/// The bundled model, every matrix of its layers moved by `by` times its own spread in a random direction.
pub fn disturbed(by: f32, seed: u64) -> Weights {
    let mut w = weights();
    let noise = Weights::random(w.config.clone(), seed).unwrap();
    let spread = |m: &Array2<f32>| (m.iter().map(|v| v * v).sum::<f32>() / m.len() as f32).sqrt();
    for (l, n) in w.layers.iter_mut().zip(&noise.layers) {
        let pairs = [
            (&mut l.q, &n.q),
            (&mut l.k, &n.k),
            (&mut l.v, &n.v),
            (&mut l.o, &n.o),
            (&mut l.gate, &n.gate),
            (&mut l.up, &n.up),
            (&mut l.down, &n.down),
        ];
        for (m, n) in pairs {
            let scale = by * spread(&m.w) / spread(&n.w);
            m.w.scaled_add(scale, &n.w);
        }
    }
    w
}

/// A model of this shape that knows nothing; one layer, since it does not matter.
pub fn garbage() -> Weights {
    let mut w = weights();
    let noise = Weights::random(ModelConfig { num_layers: 1, ..w.config.clone() }, 77).unwrap();
    w.layers.truncate(1);
    w.config.num_layers = 1;
    // Ids that the model never says.
    w.head = noise.head;
    w.embed = noise.embed;
    w
}

/// Writes a model directory with the bundled tokenizer.
pub fn write(dir: &Path, w: &Weights) {
    std::fs::create_dir_all(dir).unwrap();
    let text = std::fs::read_to_string(quill().join("config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
    config["num_hidden_layers"] = w.config.num_layers.into();
    config["max_position_embeddings"] = w.config.max_positions.into();
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    std::fs::copy(quill().join("tokenizer.json"), dir.join("tokenizer.json")).unwrap();

    let bytes = |v: &mut dyn Iterator<Item = &f32>| v.flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
    let matrix = |m: &Array2<f32>| (vec![m.nrows(), m.ncols()], bytes(&mut m.iter()));
    let vector = |v: &Array1<f32>| (vec![v.len()], bytes(&mut v.iter()));
    let mut tensors = BTreeMap::new();
    tensors.insert("model.embed_tokens.weight".to_owned(), matrix(&w.embed));
    tensors.insert("lm_head.weight".to_owned(), matrix(w.head.as_ref().unwrap()));
    tensors.insert("model.norm.weight".to_owned(), vector(&w.norm));
    for (i, l) in w.layers.iter().enumerate() {
        let at = |name: &str| format!("model.layers.{i}.{name}.weight");
        for (name, m) in [
            ("self_attn.q_proj", &l.q),
            ("self_attn.k_proj", &l.k),
            ("self_attn.v_proj", &l.v),
            ("self_attn.o_proj", &l.o),
            ("mlp.gate_proj", &l.gate),
            ("mlp.up_proj", &l.up),
            ("mlp.down_proj", &l.down),
        ] {
            tensors.insert(at(name), matrix(&m.w));
        }
        tensors.insert(at("input_layernorm"), vector(&l.input_norm));
        tensors.insert(at("post_attention_layernorm"), vector(&l.post_norm));
    }
    let views = tensors.iter().map(|(n, (shape, b))| (n, TensorView::new(Dtype::F32, shape.clone(), b).unwrap()));
    safetensors::serialize_to_file(views, None, &dir.join("model.safetensors")).unwrap();
}
