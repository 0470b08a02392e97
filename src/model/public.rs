//! The public part of a checkpoint: what the Client computes with in plaintext.

use std::collections::BTreeMap;

use ndarray::{Array1, Array2};

use super::prepare::{quantised, quantised_head};
use super::sections::sections;
use super::{Checkpoint, LayerWeights, ModelConfig, Weights};
use crate::error::{Error, Result};
use crate::plan::{Module, Plan};
use crate::protocol::linear::OwnerMatrix;

/// A tensor: its name in the checkpoint, its shape, its values.
pub(super) type Tensor<'a> = (String, Vec<usize>, &'a [f32]);

/// The public tensors under a plan: the embedding and the layers below the first private one unless the embedding is
/// private; final norm and head if the head is public; all of it where only adapters are private.
pub(super) struct PublicPart {
    embed: Option<Array2<f32>>,
    layers: Vec<LayerWeights>,
    norm: Option<Array1<f32>>,
    /// `None` too where the head is the embedding.
    head: Option<Array2<f32>>,
}

impl PublicPart {
    /// Whether there is a public tensor at all.
    pub(super) fn any(plan: &Plan) -> bool {
        !plan.private_embedding || plan.head.public
    }

    /// Nothing.
    pub(super) fn none() -> Self {
        PublicPart { embed: None, layers: Vec::new(), norm: None, head: None }
    }

    /// From a checkpoint that has these tensors (and maybe others, which are not looked at).
    pub(super) fn load(checkpoint: &Checkpoint, plan: &Plan) -> Result<Self> {
        let c = checkpoint.config();
        let table = [c.vocab_size, c.hidden_size];
        let (head, tied) = (plan.head.public, c.tie_word_embeddings);
        let matrix = |name: &str, wanted: bool| wanted.then(|| checkpoint.tensor2(name, table)).transpose();
        let layers = match (plan.public_base, plan.private_embedding) {
            (true, _) => c.num_layers,
            (false, true) => 0,
            (false, false) => plan.first_private,
        };
        Ok(PublicPart {
            embed: matrix(EMBED, !plan.private_embedding || head && tied)?,
            layers: (0..layers).map(|i| LayerWeights::load(checkpoint, i)).collect::<Result<_>>()?,
            norm: head.then(|| checkpoint.tensor1(NORM, c.hidden_size)).transpose()?,
            head: matrix(HEAD, head && !tied)?,
        })
    }

    /// All of its tensors, always in the same order.
    pub(super) fn tensors(&self) -> Result<Vec<Tensor<'_>>> {
        let mut all = Vec::new();
        if let Some(m) = &self.embed {
            all.push(matrix(EMBED.into(), m)?);
        }
        for (i, l) in self.layers.iter().enumerate() {
            let name = |part: &str| format!("model.layers.{i}.{part}");
            let gains = [
                ("input_layernorm", Some(&l.input_norm)),
                ("post_attention_layernorm", Some(&l.post_norm)),
                ("self_attn.q_norm", l.q_norm.as_ref()),
                ("self_attn.k_norm", l.k_norm.as_ref()),
            ];
            for (part, gain) in gains {
                if let Some(g) = gain {
                    all.push(vector(name(&format!("{part}.weight")), g)?);
                }
            }
            for module in Module::ALL {
                let (part, l) = (module.path(), l.linear(module));
                all.push(matrix(name(&format!("{part}.weight")), &l.w)?);
                if let Some(b) = &l.bias {
                    all.push(vector(name(&format!("{part}.bias")), b)?);
                }
            }
        }
        if let Some(g) = &self.norm {
            all.push(vector(NORM.into(), g)?);
        }
        if let Some(m) = &self.head {
            all.push(matrix(HEAD.into(), m)?);
        }
        Ok(all)
    }

    /// The integers of the public matrices, by the number of their section: what the Owner multiplies by. Their biases are
    /// the Owner's to add.
    pub(super) fn quantised(&self, c: &ModelConfig, plan: &Plan) -> Result<BTreeMap<u64, OwnerMatrix>> {
        let mut all = BTreeMap::new();
        for s in sections(c, plan)?.iter().filter(|s| s.public) {
            let none = || Error::Internal(format!("{} is not among the public tensors", s.name()));
            let m = match (self.layers.get(s.layer), &self.norm, self.head.as_ref().or(self.embed.as_ref())) {
                (Some(l), ..) => quantised(c, s, l)?,
                (None, Some(norm), Some(head)) => quantised_head(s, head, norm, None)?,
                (None, ..) => return Err(none()),
            };
            all.insert(s.id(), m.into_public());
        }
        Ok(all)
    }

    /// What the Client runs in plaintext; `None` when the embedding is private.
    pub(super) fn into_weights(self, c: &ModelConfig, plan: &Plan) -> Option<Weights> {
        let embed = self.embed.filter(|_| !plan.private_embedding)?;
        let config = ModelConfig { num_layers: plan.first_private, ..c.clone() };
        let layers = self.layers.into_iter().take(plan.first_private).collect();
        Some(Weights { config, embed, layers, norm: Array1::zeros(0), head: None, head_bias: None })
    }
}

const EMBED: &str = "model.embed_tokens.weight";
const NORM: &str = "model.norm.weight";
const HEAD: &str = "lm_head.weight";

fn matrix(name: String, m: &Array2<f32>) -> Result<Tensor<'_>> {
    let values = m.as_slice().ok_or_else(disordered)?;
    Ok((name, m.shape().to_vec(), values))
}

fn vector(name: String, v: &Array1<f32>) -> Result<Tensor<'_>> {
    let values = v.as_slice().ok_or_else(disordered)?;
    Ok((name, v.shape().to_vec(), values))
}

fn disordered() -> Error {
    Error::Internal("a tensor that is not in row-major order".into())
}
