//! Preparing a model: fixed point, folding, the public plan and a fresh seed; what it leaves at each party.
//!
//! | | Owner | Client | Helper |
//! |---|---|---|---|
//! | gets | | plan, 32-byte seed | plan, `A = W - B` of every matrix |
//! | keeps | plan, weights (16 or 32 bits), seed | plan, seed, the public part of the checkpoint | plan, `A` |
//!
//! Helper and Client together could rebuild the weights: they are assumed not to collude. Norm gains fold into the
//! matrices behind them and `1/sqrt(head_dim)` into the queries, so that both cost nothing.

use ndarray::{Array1, Array2, Axis, concatenate};

use super::calibrate::folded;
use super::{ModelConfig, Weights};
use crate::error::{Error, Result};
use crate::plan::{F, FW, Plan};
use crate::prf::PreparationSeed;
use crate::protocol::embedding::{TablePart, TableShare};
use crate::protocol::linear::OwnerMatrix;
use crate::ring::fixed;

/// One party's part of a layer.
pub struct PreparedLayer {
    /// Queries, keys, values.
    pub qkv: OwnerMatrix,
    /// Gains of the queries' and keys' own norm, a diagonal.
    pub qk_gain: Option<OwnerMatrix>,
    /// Output projection.
    pub o: OwnerMatrix,
    /// Gate and up.
    pub gate_up: OwnerMatrix,
    /// Down.
    pub down: OwnerMatrix,
}

/// One party's part of a prepared model.
pub struct Prepared {
    /// Private layers.
    pub layers: Vec<PreparedLayer>,
    /// Output head.
    pub head: OwnerMatrix,
    /// The embedding, if it is private.
    pub embedding: Option<TableShare>,
}

/// Identifier of a matrix within a preparation.
#[derive(Clone, Copy, Debug)]
#[repr(u64)]
enum Slot {
    Qkv,
    QkGain,
    O,
    GateUp,
    Down,
    Head,
    Embedding,
}

fn id(layer: usize, slot: Slot) -> u64 {
    layer as u64 * 8 + slot as u64
}

/// Shapes (outputs, inputs) of a layer's matrices.
fn shapes(c: &ModelConfig) -> [(usize, usize); 4] {
    let (n, m) = (c.hidden_size, c.intermediate_size);
    [(c.q_size() + 2 * c.kv_size(), n), (n, c.q_size()), (2 * m, n), (n, m)]
}

fn stack(parts: &[Array2<f32>]) -> Result<Array2<f32>> {
    let views: Vec<_> = parts.iter().map(|p| p.view()).collect();
    concatenate(Axis(0), &views).map_err(|e| Error::Internal(format!("stacking weights: {e}")))
}

fn stack_bias(parts: &[(&super::Linear, f32)]) -> Option<Vec<f32>> {
    if parts.iter().all(|(l, _)| l.bias.is_none()) {
        return None;
    }
    let one = |(l, scale): &(&super::Linear, f32)| -> Vec<f32> {
        l.bias.as_ref().map_or_else(|| vec![0.0; l.w.nrows()], |b| b.iter().map(|v| v * scale).collect())
    };
    Some(parts.iter().flat_map(one).collect())
}

impl Prepared {
    /// The Owner's part.
    ///
    /// # Errors
    /// [`Error::Model`] for a weight that cannot be represented.
    pub fn owner(w: &Weights, plan: &Plan, seed: &PreparationSeed) -> Result<Prepared> {
        let c = &w.config;
        let scale = 1.0 / (c.head_dim as f32).sqrt();
        let mut layers = Vec::new();
        for (i, l) in w.layers.iter().enumerate().skip(plan.first_private) {
            let name = |what: &str| format!("layer {i}: {what}");
            // With a norm on the queries the factor goes behind it, into its gain.
            let q_scale = if c.qk_norm { 1.0 } else { scale };
            let qkv = stack(&[
                folded(&l.q.w, &l.input_norm) * q_scale,
                folded(&l.k.w, &l.input_norm),
                folded(&l.v.w, &l.input_norm),
            ])?;
            let bias = stack_bias(&[(&l.q, q_scale), (&l.k, 1.0), (&l.v, 1.0)]);
            let qk_gain = match (&l.q_norm, &l.k_norm) {
                (Some(q), Some(k)) => {
                    let gain = |g: &Array1<f32>, heads: usize, by: f32| -> Vec<f32> {
                        (0..heads).flat_map(|_| g.iter().map(|v| v * by)).collect()
                    };
                    let row = [gain(q, c.num_heads, scale), gain(k, c.num_kv_heads, 1.0)].concat();
                    let row =
                        Array2::from_shape_vec((1, row.len()), row).map_err(|e| Error::Internal(e.to_string()))?;
                    let row =
                        OwnerMatrix::quantise(id(i, Slot::QkGain), &name("q_norm, k_norm"), row.view(), None, FW)?;
                    Some(row.into_diagonal()?)
                }
                _ => None,
            };
            let gate_up = stack(&[folded(&l.gate.w, &l.post_norm), folded(&l.up.w, &l.post_norm)])?;
            let gate_up_bias = stack_bias(&[(&l.gate, 1.0), (&l.up, 1.0)]);
            let matrix = |slot, what: &str, w: &Array2<f32>, bias: Option<&[f32]>| {
                OwnerMatrix::quantise(id(i, slot), &name(what), w.view(), bias, FW)
            };
            layers.push(PreparedLayer {
                qkv: matrix(Slot::Qkv, "q_proj, k_proj, v_proj", &qkv, bias.as_deref())?,
                qk_gain,
                o: matrix(Slot::O, "o_proj", &l.o.w, stack_bias(&[(&l.o, 1.0)]).as_deref())?,
                gate_up: matrix(Slot::GateUp, "gate_proj, up_proj", &gate_up, gate_up_bias.as_deref())?,
                down: matrix(Slot::Down, "down_proj", &l.down.w, stack_bias(&[(&l.down, 1.0)]).as_deref())?,
            });
        }
        let head = folded(&w.head_matrix().to_owned(), &w.norm);
        let head = OwnerMatrix::quantise(id(w.layers.len(), Slot::Head), "lm_head", head.view(), None, FW)?;
        let head = if plan.head.public { head.into_public() } else { head };
        let embedding = plan.private_embedding.then(|| {
            let (v, n) = w.embed.dim();
            let mut a = vec![0u64; v * n];
            seed.matrix_words(id(w.layers.len(), Slot::Embedding), 0, &mut a);
            a.iter_mut().zip(&w.embed).for_each(|(a, &e)| *a = fixed::encode(f64::from(e), F, 64).wrapping_sub(*a));
            TableShare { dim: (v, n), f: F, part: TablePart::Rows(a.into()) }
        });
        Ok(Prepared { layers, head, embedding })
    }

    /// The Client's part: nothing but the seed; and the head if it is public, from the words that `next` yields.
    ///
    /// # Errors
    /// Those of `next`.
    pub fn client(
        c: &ModelConfig,
        plan: &Plan,
        seed: &PreparationSeed,
        next: &mut dyn FnMut(usize) -> Result<Vec<u64>>,
    ) -> Result<Prepared> {
        let matrix = |i, slot, (m, n)| OwnerMatrix::client(id(i, slot), m, n, FW, seed.clone());
        let [qkv, o, gate_up, down] = shapes(c);
        let layers = (plan.first_private..c.num_layers)
            .map(|i| PreparedLayer {
                qkv: matrix(i, Slot::Qkv, qkv),
                qk_gain: c.qk_norm.then(|| {
                    let n = c.q_size() + c.kv_size();
                    matrix(i, Slot::QkGain, (n, n)).diagonal()
                }),
                o: matrix(i, Slot::O, o),
                gate_up: matrix(i, Slot::GateUp, gate_up),
                down: matrix(i, Slot::Down, down),
            })
            .collect();
        let (v, n) = (c.vocab_size, c.hidden_size);
        let head = if plan.head.public {
            OwnerMatrix::public(id(c.num_layers, Slot::Head), v, n, FW, next(v * n)?)?
        } else {
            matrix(c.num_layers, Slot::Head, (v, n))
        };
        let embedding = plan.private_embedding.then(|| TableShare {
            dim: (c.vocab_size, c.hidden_size),
            f: F,
            part: TablePart::Seed { id: id(c.num_layers, Slot::Embedding), seed: seed.clone() },
        });
        Ok(Prepared { layers, head, embedding })
    }

    /// The shapes alone, the same at every party: for a walk that counts instead of computing.
    pub(crate) fn shape(c: &ModelConfig, plan: &Plan) -> Prepared {
        let matrix = |i, slot, dim| OwnerMatrix::shape(id(i, slot), dim, FW, false);
        let [qkv, o, gate_up, down] = shapes(c);
        let gain = c.q_size() + c.kv_size();
        let layers = (plan.first_private..c.num_layers)
            .map(|i| PreparedLayer {
                qkv: matrix(i, Slot::Qkv, qkv),
                qk_gain: c.qk_norm.then(|| matrix(i, Slot::QkGain, (gain, gain)).diagonal()),
                o: matrix(i, Slot::O, o),
                gate_up: matrix(i, Slot::GateUp, gate_up),
                down: matrix(i, Slot::Down, down),
            })
            .collect();
        let dim = (c.vocab_size, c.hidden_size);
        let head = OwnerMatrix::shape(id(c.num_layers, Slot::Head), dim, FW, plan.head.public);
        let embedding = plan.private_embedding.then_some(TableShare { dim, f: F, part: TablePart::Shape });
        Prepared { layers, head, embedding }
    }

    /// The Helper's part, from the words that `next` yields in the order of [`Prepared::helper_words`].
    ///
    /// # Errors
    /// Those of `next`, which is told how many words it has to yield.
    pub fn helper(c: &ModelConfig, plan: &Plan, next: &mut dyn FnMut(usize) -> Result<Vec<u64>>) -> Result<Prepared> {
        let mut matrix = |i, slot, (m, n): (usize, usize)| OwnerMatrix::helper(id(i, slot), m, n, FW, next(m * n)?);
        let [qkv, o, gate_up, down] = shapes(c);
        let mut layers = Vec::new();
        for i in plan.first_private..c.num_layers {
            let qkv = matrix(i, Slot::Qkv, qkv)?;
            let qk_gain = if c.qk_norm {
                Some(matrix(i, Slot::QkGain, (1, c.q_size() + c.kv_size()))?.into_diagonal()?)
            } else {
                None
            };
            let (o, gate_up) = (matrix(i, Slot::O, o)?, matrix(i, Slot::GateUp, gate_up)?);
            layers.push(PreparedLayer { qkv, qk_gain, o, gate_up, down: matrix(i, Slot::Down, down)? });
        }
        let head = if plan.head.public {
            let (v, n) = (c.vocab_size, c.hidden_size);
            OwnerMatrix::public(id(c.num_layers, Slot::Head), v, n, FW, next(v * n)?)?
        } else {
            matrix(c.num_layers, Slot::Head, (c.vocab_size, c.hidden_size))?
        };
        let embedding = if plan.private_embedding {
            let a = next(c.vocab_size * c.hidden_size)?;
            Some(TableShare { dim: (c.vocab_size, c.hidden_size), f: F, part: TablePart::Rows(a.into()) })
        } else {
            None
        };
        Ok(Prepared { layers, head, embedding })
    }

    /// At the Owner: hands the Helper's words to `put`, matrix by matrix.
    ///
    /// # Errors
    /// Those of `put`, and [`Error::Internal`] at another party.
    pub fn helper_words(&self, seed: &PreparationSeed, put: &mut dyn FnMut(Vec<u64>) -> Result<()>) -> Result<()> {
        for l in &self.layers {
            put(l.qkv.helper_words(seed)?)?;
            if let Some(gain) = &l.qk_gain {
                put(gain.helper_words(seed)?)?;
            }
            for m in [&l.o, &l.gate_up, &l.down] {
                put(m.helper_words(seed)?)?;
            }
        }
        put(self.head.helper_words(seed)?)?;
        if let Some(TableShare { part: TablePart::Rows(a), .. }) = &self.embedding {
            put(a.to_vec())?;
        }
        Ok(())
    }
}
