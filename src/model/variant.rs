//! What was done to a model's architecture to make it cheap under MPC: from one layer on, merged heads, another softmax,
//! another activation (MARILL, sections 5.3 and 6). It stands in `trefoil.json` beside `config.json`, and everything that
//! reads a model obeys it.

use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::files;
use crate::error::{Error, Result};

/// The file's name.
pub const FILE: &str = "trefoil.json";

/// The largest `trefoil.json` that is read, in bytes.
const LIMIT: u64 = 1 << 20;

/// How attention weighs what it reads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Softmax {
    /// `exp(x_i) / sum exp(x_j)`.
    #[default]
    #[serde(rename = "exact")]
    Exact,
    /// `relu(x_i) / (sum relu(x_j) + `[`TWO_RELU_EPS`]`)`: no exponential, no maximum.
    #[serde(rename = "2relu")]
    TwoRelu,
}

/// What a 2ReLU softmax's denominator is at least: a row without a positive score attends to nothing.
pub const TWO_RELU_EPS: f64 = 0.25;

/// The activation of the MLP's gate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Activation {
    /// `x * sigmoid(x)`, also called swish.
    #[default]
    Silu,
    /// `max(x, 0)`.
    Relu,
    /// `x^2 / 8 + x / 4 + 1 / 2` (MPCFormer, section 3.2).
    Quad,
    /// `x Phi(x)` with the error function.
    Gelu,
}

/// One of the values that stand for themselves in `trefoil.json`.
fn named<T: serde::de::DeserializeOwned>(text: &str, known: &str) -> Result<T> {
    serde_json::from_value(text.into()).map_err(|_| Error::Config(format!("{text:?} is not one of {known}")))
}

impl FromStr for Softmax {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        named(text, "exact, 2relu")
    }
}

impl FromStr for Activation {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        named(text, "silu, relu, quad, gelu")
    }
}

/// The shape of attention and MLP in one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LayerShape {
    /// Number of query heads, each with a softmax of its own.
    pub num_heads: usize,
    /// Number of key/value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Width of one head: the model's, or a multiple of it where heads were merged. Positions rotate, and norms of queries and
    /// keys apply to, blocks of the model's `head_dim`.
    pub head_dim: usize,
    /// How attention weighs.
    pub softmax: Softmax,
    /// The MLP's activation.
    pub activation: Activation,
    /// So many neurons of the MLP, the last ones, are ReLUs whatever its activation: [`ModelConfig::bottleneck`](super::ModelConfig::bottleneck).
    pub bottleneck: usize,
}

impl LayerShape {
    /// The activations that its neurons have, the MLP's own first.
    pub fn activations(&self) -> impl Iterator<Item = Activation> + use<> {
        std::iter::once(self.activation).chain((self.bottleneck > 0).then_some(Activation::Relu))
    }

    /// Which of the MLP's `neurons` have which.
    pub fn neurons(&self, neurons: usize) -> impl Iterator<Item = (Range<usize>, Activation)> + use<> {
        let own = neurons - self.bottleneck;
        [0..own, own..neurons].into_iter().zip(self.activations())
    }

    /// Width of all query heads together.
    #[must_use]
    pub fn q_size(&self) -> usize {
        self.num_heads * self.head_dim
    }

    /// Width of all key (or value) heads together.
    #[must_use]
    pub fn kv_size(&self) -> usize {
        self.num_kv_heads * self.head_dim
    }

    /// What scores are multiplied by: `1 / sqrt(head_dim)`.
    #[must_use]
    pub fn score_scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }
}

/// The layers from `from_layer` on, where they are not as `config.json` says.
///
/// Merged heads lie as one: with `m` heads merged, `q_proj` has `num_attention_heads` heads of `m` blocks of the model's
/// `head_dim` rows each, and `o_proj` has its columns in the same order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Variant {
    /// The first layer that is different.
    pub from_layer: usize,
    /// Query heads, merged ones counted once.
    pub num_attention_heads: usize,
    /// Key/value heads, merged ones counted once.
    pub num_key_value_heads: usize,
    /// Width of one of them.
    pub head_dim: usize,
    /// How attention weighs.
    #[serde(default)]
    pub softmax: Softmax,
    /// The MLP's activation.
    #[serde(default)]
    pub activation: Activation,
}

impl Variant {
    /// The shape of its layers in a model with this bottleneck.
    #[must_use]
    pub fn shape(&self, bottleneck: usize) -> LayerShape {
        LayerShape {
            num_heads: self.num_attention_heads,
            num_kv_heads: self.num_key_value_heads,
            head_dim: self.head_dim,
            softmax: self.softmax,
            activation: self.activation,
            bottleneck,
        }
    }

    /// Whether it can be of a model of `layers` layers whose heads are `head_dim` wide.
    ///
    /// # Errors
    /// What is wrong.
    pub(super) fn check(&self, layers: usize, head_dim: usize) -> std::result::Result<(), String> {
        let (heads, kv, dim) = (self.num_attention_heads, self.num_key_value_heads, self.head_dim);
        for (name, value) in [("num_attention_heads", heads), ("num_key_value_heads", kv)] {
            if value == 0 || value > 1 << 10 {
                return Err(format!("variant.{name} is {value}; it must be between 1 and 1024"));
            }
        }
        if self.from_layer >= layers {
            return Err(format!("variant.from_layer is {}; the model has {layers} layers", self.from_layer));
        }
        if !heads.is_multiple_of(kv) {
            return Err(format!("variant: {heads} query heads are not a multiple of {kv} key/value heads"));
        }
        if dim == 0 || dim > 1 << 14 || !dim.is_multiple_of(head_dim) {
            return Err(format!(
                "variant.head_dim is {dim}; merged heads are as wide as several of the model's, which have {head_dim}"
            ));
        }
        Ok(())
    }
}

/// What is done to a model's layers to make them cheap; nothing by default.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reshaping {
    /// So many heads become one.
    pub merged: usize,
    /// How attention weighs.
    pub softmax: Softmax,
    /// The MLP's activation; `None` leaves the model's own.
    pub activation: Option<Activation>,
}

impl Default for Reshaping {
    fn default() -> Self {
        Reshaping { merged: 1, softmax: Softmax::Exact, activation: None }
    }
}

impl Reshaping {
    /// What becomes of layers of shape `own` from `from_layer` on; `None` where nothing changes.
    ///
    /// # Errors
    /// [`Error::Config`] for heads that do not merge by that number.
    pub fn of(self, own: LayerShape, from_layer: usize) -> Result<Option<Variant>> {
        let Reshaping { merged, softmax, activation } = self;
        if merged == 0 || !own.num_kv_heads.is_multiple_of(merged) {
            return Err(Error::Config(format!(
                "{} key/value heads cannot be merged by {merged}: give a divisor of their number",
                own.num_kv_heads
            )));
        }
        let variant = Variant {
            from_layer,
            num_attention_heads: own.num_heads / merged,
            num_key_value_heads: own.num_kv_heads / merged,
            head_dim: own.head_dim * merged,
            softmax,
            activation: activation.unwrap_or(own.activation),
        };
        Ok((variant.shape(own.bottleneck) != own).then_some(variant))
    }
}

impl fmt::Display for Reshaping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        if self.merged > 1 {
            parts.push(format!("merge {}", self.merged));
        }
        if self.softmax == Softmax::TwoRelu {
            parts.push("2relu".into());
        }
        match self.activation {
            None => {}
            Some(Activation::Silu) => parts.push("silu".into()),
            Some(Activation::Relu) => parts.push("relu".into()),
            Some(Activation::Quad) => parts.push("quad".into()),
            Some(Activation::Gelu) => parts.push("gelu".into()),
        }
        f.write_str(if parts.is_empty() { "none".into() } else { parts.join(", ") }.as_str())
    }
}

/// How much of a model is meant to be private: a number or `"all"` in `trefoil.json`, as for `--private-layers`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Value", into = "Value")]
pub enum PrivateLayers {
    /// So many layers, from the top.
    Top(usize),
    /// Every layer and the embedding.
    All,
}

impl PrivateLayers {
    /// As options have it: `None` is all.
    #[must_use]
    pub fn number(self) -> Option<usize> {
        match self {
            PrivateLayers::Top(n) => Some(n),
            PrivateLayers::All => None,
        }
    }
}

impl From<PrivateLayers> for Value {
    fn from(p: PrivateLayers) -> Value {
        p.number().map_or_else(|| "all".into(), Value::from)
    }
}

impl TryFrom<Value> for PrivateLayers {
    type Error = String;

    fn try_from(v: Value) -> std::result::Result<Self, String> {
        match v.as_u64() {
            Some(n) => usize::try_from(n).map(PrivateLayers::Top).map_err(|e| format!("private_layers is {n}: {e}")),
            None if v == "all" => Ok(PrivateLayers::All),
            None => Err(format!("private_layers is {v}; it must be a number of layers or \"all\"")),
        }
    }
}

/// `trefoil.json`: what was done to a model, and how to serve it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// Of the format: 1.
    pub version: u32,
    /// What is meant to be private: what `--private-layers` is where it is not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub private_layers: Option<PrivateLayers>,
    /// Where layers are not as `config.json` says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<Variant>,
    /// How it was made, for people.
    #[serde(default, skip_serializing_if = "serde_json::Map::is_empty")]
    pub made: serde_json::Map<String, Value>,
}

impl Record {
    /// Refuses a base that is private itself: what an adapter adds to becomes public.
    ///
    /// # Errors
    /// [`Error::Config`] for a model in `dir` whose `trefoil.json` says so; errors of reading it.
    pub fn check_public(dir: &Path) -> Result<()> {
        match Self::open(dir)?.and_then(|r| r.private_layers) {
            None | Some(PrivateLayers::Top(0)) => Ok(()),
            Some(_) => Err(Error::Config(format!(
                "{} was fine-tuned, and its {FILE} says that it is private; the base of an adapter is given to helper and clients as it is: adapt a public model, or take private_layers out of that file if this one may be given away",
                dir.display()
            ))),
        }
    }

    /// Refuses to make fewer layers of the model in `dir` private than its `trefoil.json` says: what was trained would be given away.
    /// `None` is all, with the embedding.
    ///
    /// # Errors
    /// [`Error::Config`]; errors of reading the file.
    pub fn check_kept(dir: &Path, chosen: Option<usize>) -> Result<()> {
        let recorded = Self::open(dir)?.and_then(|r| r.private_layers);
        let (Some(fewer), Some(recorded)) = (chosen, recorded) else { return Ok(()) };
        if recorded.number().is_some_and(|n| n <= fewer) {
            return Ok(());
        }
        let meant = Value::from(recorded);
        Err(Error::Config(format!(
            "--private-layers {fewer}: by {}/{FILE} what is private is {meant}, and the others would be given to every client as they are; give as many, or take private_layers out of that file if they may be given away",
            dir.display()
        )))
    }

    /// Of the format that this version writes.
    pub const VERSION: u32 = 1;

    /// That of the model in `dir`, if there is one.
    ///
    /// # Errors
    /// [`Error::Model`] for a file that is none, naming what is wrong; [`Error::Io`].
    pub fn open(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join(FILE);
        let Some(bytes) = files::read_optional(&path, LIMIT)? else { return Ok(None) };
        let wrong =
            |e: String| Error::Model(format!("{}: {e}; make the model anew with `trefoil finetune`", path.display()));
        let record: Record = serde_json::from_slice(&bytes)
            .map_err(|e| wrong(format!("is not the JSON object that it should be: {e}")))?;
        if record.version != Self::VERSION {
            return Err(wrong(format!("version {} is not known (known: {})", record.version, Self::VERSION)));
        }
        Ok(Some(record))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_read_as_it_was_written_and_a_wrong_one_refused() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Record::open(dir.path()).unwrap(), None);
        let variant = Variant {
            from_layer: 4,
            num_attention_heads: 2,
            num_key_value_heads: 2,
            head_dim: 128,
            softmax: Softmax::TwoRelu,
            activation: Activation::Relu,
        };
        let private_layers = Some(PrivateLayers::Top(4));
        let record = Record { version: 1, private_layers, variant: Some(variant), ..Record::default() };
        let text = serde_json::to_string(&record).unwrap();
        assert!(text.contains(r#""softmax":"2relu","activation":"relu""#), "{text}");
        std::fs::write(dir.path().join(FILE), &text).unwrap();
        assert_eq!(Record::open(dir.path()).unwrap(), Some(record));
        for (from, to, named) in [
            ("\"version\":1", "\"version\":7", "version 7"),
            ("2relu", "softmin", "softmin"),
            ("from_layer", "from", "from"),
            (
                "\"private_layers\":4",
                "\"private_layers\":\"some\"",
                "\"some\"; it must be a number of layers or \"all\"",
            ),
            ("\"private_layers\":4", "\"private_layers\":-1", "-1"),
        ] {
            std::fs::write(dir.path().join(FILE), text.replace(from, to)).unwrap();
            let e = Record::open(dir.path()).unwrap_err().to_string();
            assert!(e.contains(named) && e.contains("trefoil.json"), "{e}");
        }
        let all = Record { version: 1, private_layers: Some(PrivateLayers::All), ..Record::default() };
        let text = serde_json::to_string(&all).unwrap();
        assert_eq!(text, r#"{"version":1,"private_layers":"all"}"#);
        std::fs::write(dir.path().join(FILE), &text).unwrap();
        assert_eq!(Record::open(dir.path()).unwrap(), Some(all));
    }

    #[test]
    fn a_variant_has_to_go_with_its_model() {
        let good = Variant {
            from_layer: 1,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            head_dim: 64,
            softmax: Softmax::Exact,
            activation: Activation::Silu,
        };
        assert_eq!(good.check(2, 32), Ok(()));
        for (bad, named) in [
            (Variant { from_layer: 2, ..good }, "from_layer"),
            (Variant { num_key_value_heads: 3, ..good }, "multiple"),
            (Variant { num_key_value_heads: 0, ..good }, "num_key_value_heads"),
            (Variant { head_dim: 48, ..good }, "head_dim"),
        ] {
            assert!(bad.check(2, 32).unwrap_err().contains(named));
        }
    }
}
