//! Shapes to be measured, with where they are published.

use crate::error::{Error, Result};
use crate::model::{ModelConfig, Rope, RopeScaling};

/// A published shape.
#[derive(Clone, Copy, Debug)]
pub struct Preset {
    /// What `--preset` knows it by.
    pub name: &'static str,
    /// Where the shape is published.
    pub source: &'static str,
    hidden: usize,
    intermediate: usize,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    /// None of a block: a layer by itself, without embedding and head.
    vocabulary: Option<usize>,
    positions: usize,
    eps: f64,
    rope: Rope,
    /// A pass is all that there is: every token sees every other.
    encoder: bool,
}

const fn rope(theta: f64) -> Rope {
    Rope { theta, scaling: RopeScaling::None }
}

const fn block(name: &'static str, hidden: usize, heads: usize, intermediate: usize) -> Preset {
    let source = "one Llama block, as private inference is compared by";
    let (vocabulary, positions, eps) = (None, 1 << 17, 1e-5);
    let (layers, kv_heads, rope, encoder) = (1, heads, rope(1e4), false);
    Preset { name, source, hidden, intermediate, layers, heads, kv_heads, vocabulary, positions, eps, rope, encoder }
}

/// All of them.
pub const PRESETS: [Preset; 8] = [
    block("h768", 768, 12, 2048),
    block("h2048", 2048, 16, 5504),
    Preset {
        name: "deep-256",
        source: "as many layers as openllama-3b at a width that fits anywhere, to see what the number of private layers does",
        hidden: 256,
        intermediate: 688,
        layers: 26,
        heads: 8,
        kv_heads: 8,
        vocabulary: Some(2048),
        positions: 2048,
        eps: 1e-6,
        rope: rope(1e4),
        encoder: false,
    },
    Preset {
        name: "tinyllama-1.1b",
        source: "https://huggingface.co/TinyLlama/TinyLlama-1.1B-Chat-v1.0/blob/main/config.json",
        hidden: 2048,
        intermediate: 5632,
        layers: 22,
        heads: 32,
        kv_heads: 4,
        vocabulary: Some(32_000),
        positions: 2048,
        eps: 1e-5,
        rope: rope(1e4),
        encoder: false,
    },
    Preset {
        name: "deepseek-coder-1.3b",
        source: "https://huggingface.co/deepseek-ai/deepseek-coder-1.3b-base/blob/main/config.json",
        hidden: 2048,
        intermediate: 5504,
        layers: 24,
        heads: 16,
        kv_heads: 16,
        vocabulary: Some(32_256),
        positions: 16_384,
        eps: 1e-6,
        rope: Rope { theta: 1e5, scaling: RopeScaling::Linear { factor: 4.0 } },
        encoder: false,
    },
    Preset {
        name: "openllama-3b",
        source: "https://huggingface.co/openlm-research/open_llama_3b/blob/main/config.json",
        hidden: 3200,
        intermediate: 8640,
        layers: 26,
        heads: 32,
        kv_heads: 32,
        vocabulary: Some(32_000),
        positions: 2048,
        eps: 1e-6,
        rope: rope(1e4),
        encoder: false,
    },
    Preset {
        name: "llama-2-7b",
        source: "https://huggingface.co/meta-llama/Llama-2-7b-hf/blob/main/config.json",
        hidden: 4096,
        intermediate: 11_008,
        layers: 32,
        heads: 32,
        kv_heads: 32,
        vocabulary: Some(32_000),
        positions: 4096,
        eps: 1e-5,
        rope: rope(1e4),
        encoder: false,
    },
    Preset {
        name: "vit-b16",
        source: "https://huggingface.co/google/vit-base-patch16-224/blob/main/config.json",
        hidden: 768,
        intermediate: 3072,
        layers: 12,
        heads: 12,
        kv_heads: 12,
        vocabulary: Some(1000),
        positions: 197,
        eps: 1e-12,
        rope: rope(1e4),
        encoder: true,
    },
];

impl Preset {
    /// By name.
    ///
    /// # Errors
    /// [`Error::Config`] with the known names.
    pub fn find(name: &str) -> Result<&'static Preset> {
        PRESETS.iter().find(|p| p.name == name).ok_or_else(|| {
            let known: Vec<&str> = PRESETS.iter().map(|p| p.name).collect();
            Error::Config(format!(
                "--preset {name}: expected one of {}, or an adapter as in {}",
                known.join(", "),
                super::adapter::PAPER[0]
            ))
        })
    }

    /// Layers of the model; a block is one.
    #[must_use]
    pub fn layers(&self) -> usize {
        self.layers
    }

    /// Whether a pass is all that there is, and nothing is decoded.
    #[must_use]
    pub fn encoder(&self) -> bool {
        self.encoder
    }

    /// Whether it has an embedding and a head.
    #[must_use]
    pub fn is_model(&self) -> bool {
        self.vocabulary.is_some()
    }

    /// Positions that the model was made for.
    #[must_use]
    pub fn positions(&self) -> usize {
        self.positions
    }

    /// With `layers` layers, for `positions` positions.
    #[must_use]
    pub fn config(&self, layers: usize, positions: usize) -> ModelConfig {
        if self.encoder {
            let labels = self.vocabulary.unwrap_or(1);
            let plain = ModelConfig::vit(self.hidden, self.intermediate, layers, self.heads, labels, positions);
            return ModelConfig { rms_norm_eps: self.eps, ..plain };
        }
        ModelConfig {
            // A block's is not measured; calibration draws its inputs from one.
            num_kv_heads: self.kv_heads,
            rms_norm_eps: self.eps,
            rope: self.rope,
            tie_word_embeddings: !self.is_model(),
            ..ModelConfig::llama(
                self.hidden,
                self.intermediate,
                layers,
                self.heads,
                self.vocabulary.unwrap_or(256),
                positions,
            )
        }
    }
}
