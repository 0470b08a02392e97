//! What is measured: a published shape with random weights, or a model as it would be prepared.

use std::path::PathBuf;

use super::harness::{ROWS, planned, random_weights};
use super::{Part, Preset};
use crate::error::{Error, Result};
use crate::model::preparation::{Loaded, Options, split_layers};
use crate::model::variant::Reshaping;
use crate::model::{ModelConfig, Variant, Weights, calibrate};
use crate::net::shape::Profile;
use crate::plan::{Module, Plan, Setting};

/// What is measured.
#[derive(Clone, Debug)]
pub enum Subject {
    /// A published shape.
    Shape(Shape),
    /// A model of one's own.
    Model(Model),
}

/// A published shape with random weights.
#[derive(Clone, Debug)]
pub struct Shape {
    /// Where it is published.
    pub preset: &'static Preset,
    /// Private layers that are run; the figures of all are extrapolated.
    pub layers: Option<usize>,
    /// Private layers of the model, from the top; `None` for all and the embedding.
    pub private_layers: Option<usize>,
    /// What is changed of those.
    pub changes: Changes,
}

/// What is changed of a shape's private layers; nothing by default.
#[derive(Clone, Copy, Debug, Default)]
pub struct Changes {
    /// Their heads, softmax and activation.
    pub reshaping: Reshaping,
    /// Rank of adapters on their queries and values (LoRA); all else of the model is public then.
    pub lora: Option<usize>,
    /// Rank of a bottleneck with ReLU beside each layer's MLP (AdaptFormer), of an encoder.
    pub bottleneck: Option<usize>,
}

/// A model in a directory with its own weights: calibrated and planned as for a preparation.
#[derive(Clone, Debug)]
pub struct Model {
    /// The directory of the checkpoint.
    pub dir: PathBuf,
    /// What the provider would decide.
    pub options: Options,
}

/// What a subject says of itself before its weights are there.
pub(super) struct Facts {
    /// The preset, or the directory, and the adapter's.
    pub name: String,
    /// Where the weights come from.
    pub origin: String,
    /// Layers of the whole model.
    pub layers: usize,
    /// Private ones of them.
    pub private: usize,
    /// Private ones that are run.
    pub measured: usize,
    /// Positions that there are.
    pub positions: usize,
    /// What limits them.
    pub limit: String,
    /// There is nothing to decode.
    pub encoder: bool,
    /// What to do where memory does not suffice.
    pub remedy: &'static str,
    /// What of a pass is run.
    pub part: Part,
    /// Bytes of the weights, of the Owner's integers and the Helper's words while they are made.
    pub bytes: u64,
}

/// A subject with weights and a plan.
pub(super) struct Made {
    /// Those that are run.
    pub weights: Weights,
    /// Of the layers that are run.
    pub plan: Plan,
    /// What the Client asks about.
    pub tokens: Vec<u32>,
    /// What was done to the private layers.
    pub reshaping: String,
    /// All private layers, planned like those that are run: what traffic is counted for.
    pub whole: (ModelConfig, Plan),
    /// The same with the public layers, which the Client has.
    pub model: (ModelConfig, Plan),
}

impl Subject {
    /// What the configuration says.
    ///
    /// # Errors
    /// [`Error::Config`] for options that do not go together, [`Error::Model`] for a configuration that is none.
    pub(super) fn facts(&self) -> Result<Facts> {
        match self {
            Subject::Shape(s) => s.facts(),
            Subject::Model(m) => m.facts(),
        }
    }

    /// Weights and plan, of a shape for `positions` positions, for a network.
    ///
    /// # Errors
    /// As [`Weights::random`] and [`Loaded::open`]; [`Error::Model`] for weights that no plan fits.
    pub(super) fn make(&self, positions: usize, net: Profile) -> Result<Made> {
        match self {
            Subject::Shape(s) => s.make(positions, net),
            Subject::Model(m) => m.make(net),
        }
    }
}

impl Shape {
    fn private(&self) -> usize {
        self.private_layers.unwrap_or(self.preset.layers())
    }

    /// With `layers` layers, all of them private, for `positions` positions.
    fn config(&self, layers: usize, positions: usize) -> Result<ModelConfig> {
        let plain = self.preset.config(layers, positions);
        Ok(self.wider(ModelConfig { variant: self.changes.reshaping.of(plain.layer(0), 0)?, ..plain }))
    }

    /// With the bottleneck's neurons.
    fn wider(&self, c: ModelConfig) -> ModelConfig {
        let bottleneck = self.changes.bottleneck.unwrap_or(0);
        ModelConfig { intermediate_size: c.intermediate_size.saturating_add(bottleneck), bottleneck, ..c }
    }

    /// What was done to the private layers.
    fn reshaped(&self) -> String {
        let Changes { reshaping, lora, bottleneck } = self.changes;
        let added = [lora.map(|rank| format!("LoRA {rank}")), bottleneck.map(|rank| format!("AdaptFormer {rank}"))];
        let added: Vec<String> = added.into_iter().flatten().collect();
        let reshaping = (reshaping != Reshaping::default() || added.is_empty()).then(|| reshaping.to_string());
        reshaping.into_iter().chain(added).collect::<Vec<_>>().join(", ")
    }

    fn private_embedding(&self) -> bool {
        // What makes an image's patches hidden states is public, as a backbone's is.
        self.preset.is_model() && !self.preset.encoder() && self.private_layers.is_none() && self.changes.lora.is_none()
    }

    /// Whether the preset has as many layers as are asked for; those that are run.
    ///
    /// # Errors
    /// [`Error::Config`] naming the option.
    pub(super) fn check(&self) -> Result<usize> {
        let (preset, private) = (self.preset, self.private());
        let measured = self.layers.unwrap_or(private);
        let wrong = |option: &str, n: usize, most: usize, what: &str| {
            Err(Error::Config(format!("{option} {n}: give 1 to {most}, the {what} of {}", preset.name)))
        };
        if private == 0 || private > preset.layers() {
            return wrong("--private-layers", private, preset.layers(), "layers");
        }
        if measured == 0 || measured > private {
            return wrong("--layers", measured, private, "private layers");
        }
        let c = self.config(1, 1)?;
        let narrower = c.hidden_size.min(c.layer(0).kv_size());
        match self.changes {
            Changes { bottleneck: Some(_), .. } if !preset.encoder() => Err(Error::Config(format!(
                "--adaptformer-rank with --preset {}: only an encoder (vit-b16) has a bottleneck beside its MLP",
                preset.name
            ))),
            Changes { bottleneck: Some(rank), .. } if rank == 0 || rank > c.hidden_size => {
                wrong("--adaptformer-rank", rank, c.hidden_size, "width")
            }
            Changes { lora: Some(_), bottleneck: Some(_), .. } => {
                Err(Error::Config("--lora-rank with --adaptformer-rank: give one of them".into()))
            }
            Changes { lora: Some(rank), .. } if rank == 0 || rank > narrower => {
                wrong("--lora-rank", rank, narrower, "width of the values")
            }
            _ => Ok(measured),
        }
    }

    fn facts(&self) -> Result<Facts> {
        let (preset, private, measured) = (self.preset, self.private(), self.check()?);
        Ok(Facts {
            name: preset.name.into(),
            origin: format!("random weights of {measured} layers ({})", preset.source),
            layers: preset.layers(),
            private,
            measured,
            positions: preset.positions(),
            limit: format!("{} has", preset.name),
            encoder: preset.encoder(),
            remedy: "measure fewer layers (--layers) or shorter tests",
            part: if preset.is_model() { Part::Whole } else { Part::Layers },
            bytes: bytes(&self.config(measured, 1)?, measured, self.private_embedding())
                + measured as u64 * self.lora_bytes()?,
        })
    }

    /// Bytes of a layer's adapters: in f32, as integers and as the Helper's words.
    pub(super) fn lora_bytes(&self) -> Result<u64> {
        let Some(rank) = self.changes.lora else { return Ok(0) };
        let c = self.config(1, 1)?;
        let factors = [Module::QProj, Module::VProj].map(|m| m.dim(&c, 0)).map(|(out, inputs)| out + inputs);
        Ok(14 * (rank * factors.iter().sum::<usize>()) as u64)
    }

    pub(super) fn make(&self, positions: usize, setting: impl Into<Setting>) -> Result<Made> {
        let (private, layers) = (self.private(), self.preset.layers());
        let mut weights = random_weights(self.config(self.layers.unwrap_or(private), positions)?)?;
        if let Some(rank) = self.changes.lora {
            weights.adapt(&[Module::QProj, Module::VProj], rank, 8);
        }
        let plan = planned(&weights, self.private_embedding(), setting)?;
        let mut all = plan.clone();
        all.layers = plan.layers.iter().cycle().take(private).cloned().collect();
        let whole = (self.config(private, positions)?, all.clone());
        all.first_private = layers - private;
        let variant = whole.0.variant.map(|v| Variant { from_layer: all.first_private, ..v });
        let model = (self.wider(ModelConfig { variant, ..self.preset.config(layers, positions) }), all);
        let tokens = calibrate::stress(&weights.config, ROWS);
        Ok(Made { weights, plan, tokens, reshaping: self.reshaped(), whole, model })
    }
}

impl Model {
    fn facts(&self) -> Result<Facts> {
        let c = ModelConfig::open(&self.dir)?;
        let (first_private, private_embedding) = split_layers(&c, self.options.private_layers)?;
        let private = c.num_layers - first_private;
        let Options { adapter, base, max_positions, .. } = &self.options;
        let dir = self.dir.display();
        // The least that is planned for.
        let shortened = max_positions.map(|n| n.max(2)).filter(|n| *n < c.max_positions);
        // The base's weights are held beside the model's while they are compared.
        let compared = if base.is_some() { 4 * c.parameter_count() } else { 0 };
        Ok(Facts {
            name: adapter.as_ref().map_or(dir.to_string(), |a| format!("{dir} + {}", a.display())),
            origin: "its weights".into(),
            layers: c.num_layers,
            private,
            measured: private,
            positions: shortened.unwrap_or(c.max_positions),
            encoder: c.encoder(),
            limit: shortened.map_or(format!("{dir} has"), |_| "by --plan-context there are".into()),
            remedy: "run shorter tests, or give fewer private layers (--private-layers) where that may be",
            part: Part::Whole,
            bytes: bytes(&c, private, private_embedding && adapter.is_none()) + compared,
        })
    }

    fn make(&self, net: Profile) -> Result<Made> {
        let loaded = Loaded::open(&self.dir, &Options { net: Some(net), ..self.options.clone() })?;
        let plan = loaded.plan()?;
        let Loaded { weights, text, .. } = loaded;
        let tokens = text.filter(|t| !t.is_empty()).unwrap_or_else(|| calibrate::stress(&weights.config, ROWS));
        let model = (weights.config.clone(), plan.clone());
        let reshaping = done(&weights.config, self.options.adapter.is_some());
        Ok(Made { tokens, reshaping, whole: model.clone(), plan, model, weights })
    }
}

/// f32 weights, the Owner's integers and the Helper's words of the top `private` layers and the head, with the matrices that are
/// converted at a time.
fn bytes(c: &ModelConfig, private: usize, private_embedding: bool) -> u64 {
    let table = (c.vocab_size * c.hidden_size) as u64;
    let layers = (c.num_layers - private..c.num_layers).map(|i| c.layer_parameters(i)).sum::<u64>();
    let shared = layers + table + c.hidden_size as u64;
    let largest = table.max((c.gate_up_size() * c.hidden_size) as u64);
    4 * c.parameter_count() + 10 * shared + if private_embedding { 16 * table } else { 0 } + 12 * largest
}

/// What `trefoil.json` says was done to a model, as options of a shape say it.
fn done(c: &ModelConfig, adapter: bool) -> String {
    let seen = |v: Variant| Reshaping {
        merged: v.head_dim / c.head_dim,
        softmax: v.softmax,
        activation: (v.activation != c.activation).then_some(v.activation),
    };
    let reshaping = c.variant.map(seen).unwrap_or_default();
    let left = c.variant.map_or(c.num_heads, |v| v.num_attention_heads * reshaping.merged);
    let parts = [
        (reshaping != Reshaping::default()).then(|| reshaping.to_string()),
        (left < c.num_heads).then(|| format!("{left} of {} heads", c.num_heads)),
        adapter.then(|| "LoRA".to_owned()),
    ];
    let parts: Vec<String> = parts.into_iter().flatten().collect();
    if parts.is_empty() { reshaping.to_string() } else { parts.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Activation, Softmax};

    #[test]
    fn what_was_done_has_a_name() {
        let plain = ModelConfig::llama(32, 64, 2, 4, 64, 16);
        let own = Variant {
            from_layer: 1,
            num_attention_heads: 4,
            num_key_value_heads: 4,
            head_dim: 8,
            softmax: Softmax::Exact,
            activation: Activation::Silu,
        };
        let heads = |n, head_dim| Variant { num_attention_heads: n, num_key_value_heads: n, head_dim, ..own };
        for (variant, adapter, name) in [
            (None, false, "none"),
            (None, true, "LoRA"),
            (Some(heads(2, 16)), false, "merge 2"),
            (Some(heads(2, 8)), false, "2 of 4 heads"),
            (Some(heads(1, 16)), true, "merge 2, 2 of 4 heads, LoRA"),
            (Some(Variant { softmax: Softmax::TwoRelu, activation: Activation::Relu, ..own }), false, "2relu, relu"),
        ] {
            assert_eq!(done(&ModelConfig { variant, ..plain.clone() }, adapter), name);
        }
    }
}
