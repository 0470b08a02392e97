//! Preparing a model: fixed point, folding, the public plan and a fresh seed; what it leaves at each party.
//!
//! | | Owner | Client | Helper |
//! |---|---|---|---|
//! | gets | | plan, 32-byte seed | plan, `A = W - B` of every matrix |
//! | keeps | plan, weights (8, 16 or 32 bits), seed | plan, seed, the public part of the checkpoint | plan, `A` in the bits of its ring |
//!
//! Helper and Client together could rebuild the weights: they are assumed not to collude. Norm gains fold into the
//! matrices behind them and `1/sqrt(head_dim)` into the queries, so that both cost nothing.

use std::borrow::Cow;
use std::ops::Range;

use ndarray::{Array1, Array2, Axis, concatenate};

use super::adapter;
use super::calibrate::folded;
use super::sections::{Section, Slot};
use super::{LayerWeights, Layered, Linear, ModelConfig};
use crate::error::{Error, Result};
use crate::plan::{AdapterPlan, F, Group, Grouped, Module, Plan};
use crate::prf::PreparationSeed;
use crate::protocol::embedding::TableShare;
use crate::protocol::linear::OwnerMatrix;
use crate::ring::{Packed, fixed, pack_range};

/// One party's part of the projections that read the same: `W`, and the adapters of some of them.
pub struct Projection {
    /// The matrices one under the other.
    pub base: OwnerMatrix,
    /// What is added to their outputs.
    pub adapters: Option<Adapters>,
}

impl From<OwnerMatrix> for Projection {
    /// Without adapters.
    fn from(base: OwnerMatrix) -> Self {
        Projection { base, adapters: None }
    }
}

/// One party's part of adapters that read the same.
pub struct Adapters {
    /// The first factors one under the other, `rank` rows each.
    pub a: OwnerMatrix,
    /// The second factor of each, and where its outputs are among those of `W`.
    pub b: Vec<(Range<usize>, OwnerMatrix)>,
}

impl Projection {
    fn matrices(&self) -> impl Iterator<Item = &OwnerMatrix> {
        let adapters = self.adapters.iter();
        std::iter::once(&self.base).chain(adapters.flat_map(|a| std::iter::once(&a.a).chain(a.b.iter().map(|b| &b.1))))
    }
}

/// One party's part of a layer.
pub struct PreparedLayer {
    /// Queries, keys, values.
    pub qkv: Projection,
    /// Gains of the queries' and keys' own norm, a diagonal.
    pub qk_gain: Option<OwnerMatrix>,
    /// Output projection.
    pub o: Projection,
    /// Gate and up.
    pub gate_up: Projection,
    /// Down.
    pub down: Projection,
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

fn stack(parts: &[Array2<f32>]) -> Result<Array2<f32>> {
    let views: Vec<_> = parts.iter().map(|p| p.view()).collect();
    concatenate(Axis(0), &views).map_err(|e| Error::Internal(format!("stacking weights: {e}")))
}

fn stack_bias(parts: &[(&Linear, f32)]) -> Option<Vec<f32>> {
    if parts.iter().all(|(l, _)| l.bias.is_none()) {
        return None;
    }
    let one = |(l, scale): &(&Linear, f32)| -> Vec<f32> {
        l.bias.as_ref().map_or_else(|| vec![0.0; l.w.nrows()], |b| b.iter().map(|v| v * scale).collect())
    };
    Some(parts.iter().flat_map(one).collect())
}

/// A layer's weights as they are multiplied, gains and factors folded in, and their bias.
pub(super) fn layer_matrix(
    c: &ModelConfig,
    index: usize,
    l: &LayerWeights,
    slot: Slot,
) -> Result<(Array2<f32>, Option<Vec<f32>>)> {
    let shape = c.layer(index);
    let scale = shape.score_scale();
    // With a norm on the queries the factor goes behind it, into its gain.
    let q_scale = if c.qk_norm { 1.0 } else { scale };
    Ok(match slot {
        Slot::Qkv => {
            let w =
                [folded(&l.q.w, &l.input_norm) * q_scale, folded(&l.k.w, &l.input_norm), folded(&l.v.w, &l.input_norm)];
            (stack(&w)?, stack_bias(&[(&l.q, q_scale), (&l.k, 1.0), (&l.v, 1.0)]))
        }
        Slot::QkGain => {
            let (Some(q), Some(k)) = (&l.q_norm, &l.k_norm) else {
                return Err(Error::Internal("no norm of queries and keys".into()));
            };
            let gain = |g: &Array1<f32>, heads: usize, by: f32| -> Vec<f32> {
                (0..heads).flat_map(|_| g.iter().map(|v| v * by)).collect()
            };
            let row =
                [gain(q, shape.q_size() / c.head_dim, scale), gain(k, shape.kv_size() / c.head_dim, 1.0)].concat();
            (Array2::from_shape_vec((1, row.len()), row).map_err(|e| Error::Internal(e.to_string()))?, None)
        }
        Slot::O => (l.o.w.clone(), stack_bias(&[(&l.o, 1.0)])),
        Slot::GateUp => {
            let w = [folded(&l.gate.w, &l.post_norm), folded(&l.up.w, &l.post_norm)];
            (stack(&w)?, stack_bias(&[(&l.gate, 1.0), (&l.up, 1.0)]))
        }
        Slot::Down => (l.down.w.clone(), stack_bias(&[(&l.down, 1.0)])),
        Slot::AdapterA(group) => (stack(&adapter::first_factors(l, group))?, None),
        Slot::AdapterB(module) => {
            let by = if module == Module::QProj { q_scale } else { 1.0 };
            let b = adapter::second_factor(l, module);
            (b.ok_or_else(|| Error::Internal(format!("no adapter of {}", module.name())))? * by, None)
        }
        Slot::Head | Slot::Embedding => return Err(Error::Internal(format!("{slot:?} of a layer"))),
    })
}

/// The integers of a layer's matrix: of a public base the same at the Owner and at the Client.
///
/// # Errors
/// [`Error::Model`] for a weight that cannot be represented.
pub(super) fn quantised(c: &ModelConfig, s: &Section, l: &LayerWeights) -> Result<OwnerMatrix> {
    let (w, bias) = layer_matrix(c, s.layer, l, s.slot)?;
    OwnerMatrix::quantise(s.id(), &s.name(), w.view(), bias.as_deref(), s.f)
}

/// The head's integers, the final norm's gain folded in: the same at the Owner and, from a public base, at the Client. The bias is the Owner's.
///
/// # Errors
/// [`Error::Model`] for a weight that cannot be represented.
pub fn quantised_head(
    s: &Section,
    head: &Array2<f32>,
    norm: &Array1<f32>,
    bias: Option<&Array1<f32>>,
) -> Result<OwnerMatrix> {
    let bias = bias.map(|b| b.to_vec());
    OwnerMatrix::quantise(s.id(), &s.name(), folded(head, norm).view(), bias.as_deref(), s.f)
}

/// A group of projections of a layer, its matrices from `one` in the order of their sections.
fn projection(
    c: &ModelConfig,
    (layer, adapters): (usize, &Grouped<AdapterPlan>),
    group: Group,
    one: &mut dyn FnMut(usize, Slot) -> Result<OwnerMatrix>,
) -> Result<Projection> {
    let base = one(layer, group.into())?;
    let Some(plan) = adapters.get(group) else { return Ok(base.into()) };
    let a = one(layer, Slot::AdapterA(group))?;
    let second = |m: &Module| {
        let (from, b) = (m.offset(c, layer), one(layer, Slot::AdapterB(*m))?);
        Ok((from..from + b.dim().0, b))
    };
    let b = plan.modules.iter().map(second).collect::<Result<_>>()?;
    Ok(Projection { base, adapters: Some(Adapters { a, b }) })
}

impl Prepared {
    /// Of any party: `make` gives each matrix of [`sections`](super::sections::sections) in their order, `table` the embedding.
    pub(crate) fn assemble(
        c: &ModelConfig,
        plan: &Plan,
        make: &mut dyn FnMut(&Section) -> Result<OwnerMatrix>,
        table: &mut dyn FnMut(&Section) -> Result<TableShare>,
    ) -> Result<Prepared> {
        let mut one = |layer, slot| -> Result<OwnerMatrix> {
            let s = Section::new(c, plan, layer, slot)?;
            let m = make(&s)?;
            let m = if slot == Slot::QkGain { m.into_diagonal()? } else { m };
            Ok(m.within(s.ring))
        };
        let mut layers = Vec::new();
        for (i, l) in (plan.first_private..c.num_layers).zip(&plan.layers) {
            let adapters = &l.adapters;
            layers.push(PreparedLayer {
                qkv: projection(c, (i, adapters), Group::Qkv, &mut one)?,
                qk_gain: if c.qk_norm { Some(one(i, Slot::QkGain)?) } else { None },
                o: projection(c, (i, adapters), Group::O, &mut one)?,
                gate_up: projection(c, (i, adapters), Group::GateUp, &mut one)?,
                down: projection(c, (i, adapters), Group::Down, &mut one)?,
            });
        }
        let head = one(c.num_layers, Slot::Head)?;
        let embedding = if plan.private_embedding {
            let s = Section::new(c, plan, c.num_layers, Slot::Embedding)?;
            Some(table(&s)?.within(s.ring))
        } else {
            None
        };
        Ok(Prepared { layers, head, embedding })
    }

    /// The Owner's part.
    ///
    /// # Errors
    /// [`Error::Model`] for a weight that cannot be represented.
    pub fn owner(weights: &dyn Layered, plan: &Plan, seed: &PreparationSeed) -> Result<Prepared> {
        let w = weights.rest();
        let mut held: Option<(usize, Cow<'_, LayerWeights>)> = None;
        let mut matrix = |s: &Section| -> Result<OwnerMatrix> {
            let m = if s.layer < w.config.num_layers {
                let (_, l) = match held.take().filter(|(layer, _)| *layer == s.layer) {
                    Some(same) => held.insert(same),
                    None => held.insert((s.layer, weights.layer(s.layer)?)),
                };
                quantised(&w.config, s, l)?
            } else {
                quantised_head(s, &w.head_matrix().to_owned(), &w.norm, w.head_bias.as_ref())?
            };
            Ok(if s.public { m.into_public() } else { m })
        };
        let mut table = |s: &Section| -> Result<TableShare> {
            let all = w.embed.as_slice().ok_or_else(|| Error::Internal("an embedding of another layout".into()))?;
            let a = Packed::made(all.len(), s.ring, |range| {
                let mut a = vec![0; range.len()];
                seed.matrix_words(s.id(), range.start as u64, &mut a);
                let e = all[range].iter().map(|&e| fixed::encode(f64::from(e), F, 64));
                a.iter_mut().zip(e).for_each(|(a, e)| *a = e.wrapping_sub(*a));
                Ok::<_, Error>(a)
            })?;
            TableShare::packed((s.rows, s.cols), F, a)
        };
        Prepared::assemble(&w.config, plan, &mut matrix, &mut table)
    }

    /// The Client's part: nothing but the seed; and what is public, from the words that `next` yields in the order of the sections.
    ///
    /// # Errors
    /// Those of `next`.
    pub fn client(
        c: &ModelConfig,
        plan: &Plan,
        seed: &PreparationSeed,
        next: &mut dyn FnMut(usize) -> Result<Vec<u64>>,
    ) -> Result<Prepared> {
        let mut matrix = |s: &Section| {
            if s.public {
                let words = Packed::new(&next(s.rows * s.cols)?, s.bits());
                return OwnerMatrix::public(s.id(), (s.rows, s.cols), s.f, &words);
            }
            Ok(OwnerMatrix::client(s.id(), s.rows, s.cols, s.f, seed.clone()))
        };
        let mut table = |s: &Section| Ok(TableShare::seed((s.rows, s.cols), F, s.id(), seed.clone()));
        Prepared::assemble(c, plan, &mut matrix, &mut table)
    }

    /// The shapes alone, the same at every party: for a walk that counts instead of computing.
    ///
    /// # Errors
    /// [`Error::Internal`] for a plan that has not passed [`Plan::check`].
    pub(crate) fn shape(c: &ModelConfig, plan: &Plan) -> Result<Prepared> {
        let mut matrix = |s: &Section| Ok(OwnerMatrix::shape(s.id(), (s.rows, s.cols), s.f, s.public));
        let mut table = |s: &Section| Ok(TableShare::shape((s.rows, s.cols), F));
        Prepared::assemble(c, plan, &mut matrix, &mut table)
    }

    /// The Helper's part, from the words that `next` yields in the order of [`Prepared::helper_words`].
    ///
    /// # Errors
    /// Those of `next`, which is told how many words it has to yield.
    pub fn helper(c: &ModelConfig, plan: &Plan, next: &mut dyn FnMut(usize) -> Result<Vec<u64>>) -> Result<Prepared> {
        Self::helper_packed(c, plan, &mut |s| Ok(Packed::new(&next(s.rows * s.cols)?, s.bits())))
    }

    /// The Helper's part, from what [`Prepared::helper_bytes`] makes of each section.
    ///
    /// # Errors
    /// Those of `next`.
    pub(crate) fn helper_packed(
        c: &ModelConfig,
        plan: &Plan,
        next: &mut dyn FnMut(&Section) -> Result<Packed>,
    ) -> Result<Prepared> {
        let next = std::cell::RefCell::new(next);
        let mut matrix = |s: &Section| {
            let words = next.borrow_mut()(s)?;
            if s.public {
                return OwnerMatrix::public(s.id(), (s.rows, s.cols), s.f, &words);
            }
            OwnerMatrix::helper_packed(s.id(), (s.rows, s.cols), s.f, words)
        };
        let mut table = |s: &Section| TableShare::packed((s.rows, s.cols), F, next.borrow_mut()(s)?);
        Prepared::assemble(c, plan, &mut matrix, &mut table)
    }

    /// The matrices in the order of their sections; the embedding's table is not among them.
    pub(crate) fn matrices(&self) -> impl Iterator<Item = &OwnerMatrix> {
        let layer = |l| {
            let PreparedLayer { qkv, qk_gain, o, gate_up, down }: &PreparedLayer = l;
            let rest = [o, gate_up, down].into_iter().flat_map(Projection::matrices);
            qkv.matrices().chain(qk_gain).chain(rest)
        };
        self.layers.iter().flat_map(layer).chain([&self.head])
    }

    /// At the Owner: hands the Helper's words to `put`, matrix by matrix.
    ///
    /// # Errors
    /// Those of `put`, and [`Error::Internal`] at another party.
    pub fn helper_words(&self, seed: &PreparationSeed, put: &mut dyn FnMut(Vec<u64>) -> Result<()>) -> Result<()> {
        for m in self.matrices() {
            put(m.helper_words(seed)?)?;
        }
        if let Some(table) = &self.embedding {
            let words = table.words(0..table.dim.0 * table.dim.1);
            put(words.ok_or_else(|| Error::Internal("only the owner can make the helper's rows".into()))?)?;
        }
        Ok(())
    }

    /// At the Owner: words `range` of section `index`, which is `s`, packed as the Helper keeps them.
    ///
    /// # Errors
    /// [`Error::Internal`] at another party, or if there are no such words.
    pub(crate) fn helper_bytes(
        &self,
        seed: &PreparationSeed,
        (index, s): (usize, &Section),
        range: Range<usize>,
    ) -> Result<Vec<u8>> {
        match (self.matrices().nth(index), &self.embedding) {
            (Some(m), _) => pack_range(range, s.bits(), |some| m.helper_range(seed, some)),
            (None, Some(table)) => pack_range(range, s.bits(), |some| {
                table.words(some).ok_or_else(|| Error::Internal("rows that only the owner has".into()))
            }),
            (None, None) => Err(Error::Internal(format!("no matrix {} of this model", s.name()))),
        }
    }
}
