//! The public part of a checkpoint: what the Client computes with in plaintext.

use ndarray::{Array1, Array2};

use super::prepare::quantised_head;
use super::sections::{Section, Slot};
use super::{Checkpoint, LayerWeights, Linear, ModelConfig, Weights};
use crate::error::{Error, Result};
use crate::plan::Plan;
use crate::protocol::linear::OwnerMatrix;

/// A tensor: its name in the checkpoint, its shape, its values.
pub(super) type Tensor<'a> = (String, Vec<usize>, &'a [f32]);

/// The public tensors under a plan: the embedding and the layers below the first private one unless the embedding is
/// private; final norm and head if the head is public.
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
        let layers = if plan.private_embedding { 0 } else { plan.first_private };
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
            let linears: [(&str, &Linear); 7] = [
                ("self_attn.q_proj", &l.q),
                ("self_attn.k_proj", &l.k),
                ("self_attn.v_proj", &l.v),
                ("self_attn.o_proj", &l.o),
                ("mlp.gate_proj", &l.gate),
                ("mlp.up_proj", &l.up),
                ("mlp.down_proj", &l.down),
            ];
            for (part, l) in linears {
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

    /// The head's integers, if the head is public.
    pub(super) fn quantised_head(&self, c: &ModelConfig, plan: &Plan) -> Result<Option<OwnerMatrix>> {
        let (Some(norm), Some(head)) = (&self.norm, self.head.as_ref().or(self.embed.as_ref())) else {
            return Ok(None);
        };
        let section = Section::new(c, plan, c.num_layers, Slot::Head)?;
        Ok(Some(quantised_head(&section, head, norm)?.into_public()))
    }

    /// What the Client runs in plaintext; `None` when the embedding is private.
    pub(super) fn into_weights(self, c: &ModelConfig, plan: &Plan) -> Option<Weights> {
        let embed = self.embed.filter(|_| !plan.private_embedding)?;
        let config = ModelConfig { num_layers: plan.first_private, ..c.clone() };
        Some(Weights { config, embed, layers: self.layers, norm: Array1::zeros(0), head: None })
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
