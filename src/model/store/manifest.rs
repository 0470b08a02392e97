//! The public facts of a preparation, the same at all three parties.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::{Digest as _, Sha256};

use crate::error::{Error, Result};
use crate::model::public::PublicPart;
use crate::model::sections::{CHUNK_BYTES, HalfLayout};
use crate::model::{ModelConfig, RopeScaling, Variant};
use crate::plan::Plan;

/// The version of all files of a preparation.
const FORMAT: u32 = 2;

/// The largest manifest that is read or taken from a peer, in bytes.
pub const MAX_MANIFEST_BYTES: u64 = 16 << 20;

/// Bytes written as lower-case hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Hex<const N: usize>([u8; N]);

/// The random name of a preparation.
pub type PreparationId = Hex<16>;
/// A SHA-256.
pub type Digest = Hex<32>;

impl<const N: usize> Hex<N> {
    /// Of these bytes.
    #[must_use]
    pub fn new(bytes: [u8; N]) -> Self {
        Hex(bytes)
    }

    /// The bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8; N] {
        &self.0
    }

    /// From the operating system's entropy.
    ///
    /// # Errors
    /// If the system has none to give.
    pub fn random() -> Result<Self> {
        let mut bytes = [0u8; N];
        getrandom::fill(&mut bytes).map_err(|e| Error::Internal(format!("no system entropy: {e}")))?;
        Ok(Hex(bytes))
    }
}

impl<const N: usize> fmt::Display for Hex<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl<const N: usize> fmt::Debug for Hex<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl<const N: usize> FromStr for Hex<N> {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = || Error::Model(format!("expected {} lower-case hexadecimal digits", 2 * N));
        let digit = |c: u8| match c {
            b'0'..=b'9' => Ok(c - b'0'),
            b'a'..=b'f' => Ok(c - b'a' + 10),
            _ => Err(wrong()),
        };
        if text.len() != 2 * N {
            return Err(wrong());
        }
        let mut bytes = [0; N];
        for (b, pair) in bytes.iter_mut().zip(text.as_bytes().as_chunks::<2>().0) {
            *b = digit(pair[0])? << 4 | digit(pair[1])?;
        }
        Ok(Hex(bytes))
    }
}

impl<const N: usize> Serialize for Hex<N> {
    fn serialize<S: Serializer>(&self, s: S) -> std::result::Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de, const N: usize> Deserialize<'de> for Hex<N> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> std::result::Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Size of the Helper's half; follows from configuration and plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HalfSize {
    /// All of it.
    pub bytes: u64,
    /// About the size of a chunk.
    pub chunk_bytes: u64,
    /// Number of chunks.
    pub chunks: u64,
}

/// What everybody may know of a preparation. Holds no hash of anything private.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PublicManifest {
    /// Version of the files.
    pub format: u32,
    /// Random name of the preparation.
    pub id: PreparationId,
    /// The text of `config.json`.
    pub config: String,
    /// The text of `generation_config.json`, if there is one.
    pub generation_config: Option<String>,
    /// Where layers are not as `config.json` says.
    pub variant: Option<Variant>,
    /// The plan.
    pub plan: Plan,
    /// Hash of configuration, plan and the public tensors.
    pub public_hash: Digest,
    /// Size of the Helper's half.
    pub half: HalfSize,
}

impl PublicManifest {
    /// A new preparation's.
    pub(super) fn new(
        id: PreparationId,
        (config, generation_config): (String, Option<String>),
        variant: Option<Variant>,
        plan: Plan,
        public_hash: Digest,
        layout: &HalfLayout,
    ) -> Self {
        let half = half_size(layout);
        PublicManifest { format: FORMAT, id, config, generation_config, variant, plan, public_hash, half }
    }

    /// Parses and checks a manifest from a file or a peer; `what` names it in errors.
    ///
    /// # Errors
    /// [`Error::Model`]: too long, no manifest, another version, or a plan that this version could not have made.
    pub fn parse(bytes: &[u8], what: &str) -> Result<Self> {
        let wrong = |text: String| Error::Model(format!("{what}: {text}"));
        if bytes.len() as u64 > MAX_MANIFEST_BYTES {
            return Err(wrong(format!("a manifest of {} bytes; none is over {MAX_MANIFEST_BYTES}", bytes.len())));
        }
        #[derive(Deserialize)]
        struct Version {
            format: u32,
        }
        let remedy = "get it anew from the provider, who makes it with `trefoil prepare`";
        let version: Version = serde_json::from_slice(bytes)
            .map_err(|e| wrong(format!("is not a preparation's manifest ({e}); {remedy}")))?;
        if version.format != FORMAT {
            return Err(wrong(format!(
                "is of format {}, this release reads {FORMAT}: run the same release at all three parties, or prepare anew",
                version.format
            )));
        }
        let manifest: PublicManifest =
            serde_json::from_slice(bytes).map_err(|e| wrong(format!("is damaged ({e}); {remedy}")))?;
        let config = manifest.read_config(what)?;
        manifest.plan.check(&config).map_err(|e| wrong(format!("the plan is impossible: {e}; {remedy}")))?;
        if manifest.half != half_size(&manifest.layout(&config)?) {
            return Err(wrong(format!("the size of the helper's half does not follow from the plan; {remedy}")));
        }
        Ok(manifest)
    }

    /// Reads and checks a manifest file.
    ///
    /// # Errors
    /// As [`PublicManifest::parse`], or when the file cannot be read.
    pub fn read(path: &Path) -> Result<Self> {
        let remedy = "the path must name a preparation, made by `trefoil prepare`";
        let bytes = crate::model::files::read_required(path, MAX_MANIFEST_BYTES, remedy)?;
        PublicManifest::parse(&bytes, &path.display().to_string())
    }

    /// As JSON.
    ///
    /// # Errors
    /// [`Error::Internal`].
    pub fn to_json(&self) -> Result<Vec<u8>> {
        serde_json::to_vec_pretty(self).map_err(|e| Error::Internal(format!("writing a manifest: {e}")))
    }

    /// The model's configuration, its context shortened to the plan's.
    ///
    /// # Errors
    /// [`Error::Model`] for a text that is no configuration.
    pub fn model_config(&self) -> Result<ModelConfig> {
        let config = self.read_config("the preparation's manifest")?;
        Ok(ModelConfig { max_positions: self.plan.max_positions, ..config })
    }

    fn read_config(&self, what: &str) -> Result<ModelConfig> {
        let generation = self.generation_config.as_ref().map(String::as_bytes);
        let config = ModelConfig::parse(self.config.as_bytes(), generation, &format!("{what}: config.json"))?;
        let config = ModelConfig { variant: self.variant, ..config };
        config.check().map_err(|e| Error::Model(format!("{what}: {e}")))?;
        Ok(config)
    }

    /// How the Helper's half is laid out.
    pub(super) fn layout(&self, config: &ModelConfig) -> Result<HalfLayout> {
        HalfLayout::new(config, &self.plan)
    }

    /// Hash of the plan alone, to name it by.
    #[must_use]
    pub fn plan_hash(&self) -> Digest {
        let mut hash = Sha256::new();
        hash.update(plan_text(&self.plan));
        Hex(hash.finalize().into())
    }
}

fn half_size(layout: &HalfLayout) -> HalfSize {
    HalfSize { bytes: layout.bytes(), chunk_bytes: CHUNK_BYTES as u64, chunks: layout.chunks() }
}

/// A plan holds whole numbers and flags only, so its JSON is one text.
fn plan_text(plan: &Plan) -> Vec<u8> {
    serde_json::to_vec(plan).unwrap_or_default()
}

/// What a configuration says that all three have to agree on, field by field. The context is the plan's; which tokens end
/// an answer is the Client's own business.
pub(super) fn facts(c: &ModelConfig) -> Vec<(&'static str, String)> {
    let scaling = match c.rope.scaling {
        RopeScaling::None => "none".into(),
        RopeScaling::Linear { factor } => format!("linear {factor:?}"),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
            format!("llama3 {factor:?} {low_freq_factor:?} {high_freq_factor:?} {original_max_position_embeddings}")
        }
    };
    let hidden_act = match c.bottleneck {
        0 => format!("{:?}", c.activation),
        n => format!("{:?}, {n} of its neurons Relu", c.activation),
    };
    vec![
        ("architectures", c.arch.name().into()),
        ("hidden_size", c.hidden_size.to_string()),
        ("intermediate_size", c.intermediate_size.to_string()),
        ("num_hidden_layers", c.num_layers.to_string()),
        ("num_attention_heads", c.num_heads.to_string()),
        ("num_key_value_heads", c.num_kv_heads.to_string()),
        ("head_dim", c.head_dim.to_string()),
        ("vocab_size", c.vocab_size.to_string()),
        ("rms_norm_eps", format!("{:?}", c.rms_norm_eps)),
        ("rope_theta", format!("{:?}", c.rope.theta)),
        ("rope_scaling", scaling),
        ("tie_word_embeddings", c.tie_word_embeddings.to_string()),
        ("attention_bias", format!("{} {}", c.qkv_bias, c.o_bias)),
        ("mlp_bias", c.mlp_bias.to_string()),
        ("qk_norm", c.qk_norm.to_string()),
        ("hidden_act", hidden_act),
        ("variant", format!("{:?}", c.variant)),
    ]
}

/// Hash of configuration, plan and public tensors (names, shapes, f32 bits): what Owner and Client must have in common.
pub(super) fn public_hash(c: &ModelConfig, plan: &Plan, part: &PublicPart) -> Result<Digest> {
    let mut hash = Sha256::new();
    hash.update(b"trefoil public part 1\n");
    for (name, value) in facts(c) {
        hash.update(format!("{name}={value}\n"));
    }
    hash.update(plan_text(plan));
    for (name, shape, values) in part.tensors()? {
        hash.update(format!("\n{name} {shape:?}\n"));
        // In blocks, so that the hash is fed more than a word at a time.
        let mut bytes = Vec::with_capacity(4 * values.len().min(1 << 14));
        for block in values.chunks(1 << 14) {
            bytes.clear();
            bytes.extend(block.iter().flat_map(|v| v.to_bits().to_le_bytes()));
            hash.update(&bytes);
        }
    }
    Ok(Hex(hash.finalize().into()))
}
