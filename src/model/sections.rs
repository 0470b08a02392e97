//! The matrices of a preparation: which there are, in which order, of which shape, and in which ring each is multiplied.

use super::ModelConfig;
use crate::error::{Error, Result};
use crate::plan::{AdapterPlan, F, Group, LayerPlan, Module, Plan};
use crate::ring::pack;

/// Which matrix of a layer, or of the whole model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Slot {
    /// Queries, keys and values.
    Qkv,
    /// Gains of the queries' and keys' own norm.
    QkGain,
    /// The attention's output projection.
    O,
    /// Gate and up.
    GateUp,
    /// Down.
    Down,
    /// The output head.
    Head,
    /// The embedding.
    Embedding,
    /// The first factors of the adapters of a group of projections, one under the other.
    AdapterA(Group),
    /// The second factor of a projection's adapter.
    AdapterB(Module),
}

/// Slots of a layer or of the whole model, an adapter's included: numbers of one layer are apart from those of the next.
const SLOTS: u64 = 32;

impl Slot {
    /// Its number within a layer.
    fn number(self) -> u64 {
        match self {
            Slot::Qkv => 0,
            Slot::QkGain => 1,
            Slot::O => 2,
            Slot::GateUp => 3,
            Slot::Down => 4,
            Slot::Head => 5,
            Slot::Embedding => 6,
            Slot::AdapterA(group) => 8 + group as u64,
            Slot::AdapterB(module) => 16 + module as u64,
        }
    }
}

impl From<Group> for Slot {
    /// The base matrix of a group of projections.
    fn from(group: Group) -> Slot {
        match group {
            Group::Qkv => Slot::Qkv,
            Group::O => Slot::O,
            Group::GateUp => Slot::GateUp,
            Group::Down => Slot::Down,
        }
    }
}

/// The slots of a layer, in the order in which the Helper gets them.
pub(super) fn layer_slots(c: &ModelConfig, l: &LayerPlan) -> Vec<Slot> {
    let mut all = Vec::new();
    for group in Group::ALL {
        all.push(group.into());
        if let Some(a) = l.adapters.get(group) {
            all.push(Slot::AdapterA(group));
            all.extend(a.modules.iter().map(|m| Slot::AdapterB(*m)));
        }
        if group == Group::Qkv && c.qk_norm {
            all.push(Slot::QkGain);
        }
    }
    all
}

/// One matrix of a preparation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Section {
    /// Its layer; the number of layers for head and embedding.
    pub layer: usize,
    /// Which one.
    pub slot: Slot,
    /// Outputs; 1 for a diagonal.
    pub rows: usize,
    /// Inputs.
    pub cols: usize,
    /// Fraction bits of its elements.
    pub f: u32,
    /// The ring in which the plan multiplies it (or reads its rows): nobody needs `A` beyond it.
    pub ring: u32,
    /// A public linear map: the Helper's words are the weights themselves.
    pub public: bool,
}

impl Section {
    /// The matrix `slot` of `layer` under `plan`, which has passed [`Plan::check`].
    ///
    /// # Errors
    /// [`Error::Internal`] if the model has no such matrix.
    pub fn new(c: &ModelConfig, plan: &Plan, layer: usize, slot: Slot) -> Result<Self> {
        let none = || Error::Internal(format!("no matrix {slot:?} in layer {layer} of this model"));
        let (n, m, v) = (c.hidden_size, c.intermediate_size, c.vocab_size);
        let shape = c.layer(layer);
        let part = || plan.layers.get(layer.wrapping_sub(plan.first_private)).ok_or_else(none);
        let adapted = |group: Group| -> Result<(&LayerPlan, &AdapterPlan)> {
            let l = part()?;
            Ok((l, l.adapters.get(group).ok_or_else(none)?))
        };
        let (rows, cols, f, ring) = match slot {
            Slot::Qkv => {
                let (f, ring) = part()?.multiplied(Group::Qkv);
                (shape.q_size() + 2 * shape.kv_size(), n, f, ring)
            }
            Slot::QkGain => {
                let a = &part()?.attention;
                let norm = a.qk_norm.as_ref().ok_or_else(none)?;
                (1, shape.q_size() + shape.kv_size(), a.f_qk_gain.ok_or_else(none)?, 64 - norm.f_gain)
            }
            Slot::O => {
                let (f, ring) = part()?.multiplied(Group::O);
                (n, shape.q_size(), f, ring)
            }
            Slot::GateUp => {
                let (f, ring) = part()?.multiplied(Group::GateUp);
                (c.gate_up_size(), n, f, ring)
            }
            Slot::Down => {
                let (f, ring) = part()?.multiplied(Group::Down);
                (n, m, f, ring)
            }
            Slot::AdapterA(group) => {
                let (l, a) = adapted(group)?;
                let inputs = a.modules.first().map_or(0, |m| m.dim(c, layer).1);
                (a.rank * a.modules.len(), inputs, a.f_a, l.multiplied(group).1)
            }
            Slot::AdapterB(module) => {
                let (l, a) = adapted(module.group())?;
                let (f, ring) = l.multiplied(module.group());
                (module.dim(c, layer).0, a.rank, a.f_b, a.ring(ring, f))
            }
            Slot::Head => (v, n, plan.head.f_weight, 64 - plan.head.norm.f_gain),
            Slot::Embedding => (v, n, F, plan.residual_k),
        };
        let public = match slot {
            Slot::AdapterA(_) | Slot::AdapterB(_) | Slot::Embedding => false,
            Slot::Head => plan.head.public,
            Slot::Qkv | Slot::QkGain | Slot::O | Slot::GateUp | Slot::Down => plan.public_base,
        };
        Ok(Section { layer, slot, rows, cols, f, ring, public })
    }

    /// Its number within a preparation: the name of its stream `B`.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.layer as u64 * SLOTS + self.slot.number()
    }

    /// What errors call it.
    #[must_use]
    pub fn name(&self) -> String {
        let what = match self.slot {
            Slot::Head => return "lm_head".into(),
            Slot::Embedding => return "embed_tokens".into(),
            Slot::Qkv => "q_proj, k_proj, v_proj",
            Slot::QkGain => "q_norm, k_norm",
            Slot::O => "o_proj",
            Slot::GateUp => "gate_proj, up_proj",
            Slot::Down => "down_proj",
            Slot::AdapterA(Group::Qkv) => "lora_A of q_proj, k_proj, v_proj",
            Slot::AdapterA(Group::O) => "lora_A of o_proj",
            Slot::AdapterA(Group::GateUp) => "lora_A of gate_proj, up_proj",
            Slot::AdapterA(Group::Down) => "lora_A of down_proj",
            Slot::AdapterB(module) => return format!("layer {}: lora_B of {}", self.layer, module.name()),
        };
        format!("layer {}: {what}", self.layer)
    }

    /// Bits of a word of the Helper's half: those of the ring; public integers have 32.
    #[must_use]
    pub fn bits(&self) -> u32 {
        if self.public { 32 } else { self.ring }
    }

    /// Rows of one chunk: about [`CHUNK_BYTES`].
    fn chunk_rows(&self) -> usize {
        let row = pack::packed_len(self.cols, self.bits()).max(1);
        (CHUNK_BYTES / row).clamp(1, self.rows.max(1))
    }
}

/// All matrices in the order in which the Helper gets them.
///
/// # Errors
/// [`Error::Internal`] for a plan that has not passed [`Plan::check`].
pub fn sections(c: &ModelConfig, plan: &Plan) -> Result<Vec<Section>> {
    let mut all = Vec::new();
    for (layer, l) in (plan.first_private..c.num_layers).zip(&plan.layers) {
        for slot in layer_slots(c, l) {
            all.push(Section::new(c, plan, layer, slot)?);
        }
    }
    all.push(Section::new(c, plan, c.num_layers, Slot::Head)?);
    if plan.private_embedding {
        all.push(Section::new(c, plan, c.num_layers, Slot::Embedding)?);
    }
    Ok(all)
}

/// About the size of a chunk of the Helper's half; a chunk is whole rows of one matrix.
pub const CHUNK_BYTES: usize = 4 << 20;

/// How the Helper's half lies on disk and on the wire: section after section, each in chunks of whole rows, each chunk
/// packed from a fresh byte. A function of configuration and plan, so that neither side has to believe the other.
#[derive(Clone, Debug)]
pub struct HalfLayout {
    sections: Vec<Section>,
    /// Chunks and bytes before each section, and of all.
    before: Vec<(u64, u64)>,
}

/// A chunk: rows of a section.
#[derive(Clone, Copy, Debug)]
pub struct Chunk<'a> {
    /// Which matrix.
    pub section: &'a Section,
    /// Its place in the list of sections.
    pub index: usize,
    /// First row.
    pub first_row: usize,
    /// Number of rows.
    pub rows: usize,
    /// Where it begins in the half.
    pub offset: u64,
    /// Packed length.
    pub bytes: usize,
}

impl Chunk<'_> {
    /// Words of the matrix that it covers.
    #[must_use]
    pub fn words(&self) -> std::ops::Range<usize> {
        self.first_row * self.section.cols..(self.first_row + self.rows) * self.section.cols
    }
}

impl HalfLayout {
    /// For a plan that has passed [`Plan::check`].
    ///
    /// # Errors
    /// [`Error::Internal`] for one that has not.
    pub fn new(c: &ModelConfig, plan: &Plan) -> Result<Self> {
        let sections = sections(c, plan)?;
        let mut before = vec![(0u64, 0u64)];
        let (mut chunks, mut bytes) = (0u64, 0u64);
        for s in &sections {
            let each = s.chunk_rows();
            let (full, rest) = (s.rows / each, s.rows % each);
            chunks += full as u64 + u64::from(rest > 0);
            let packed = |rows: usize| pack::packed_len(rows * s.cols, s.bits()) as u64;
            bytes += full as u64 * packed(each) + packed(rest);
            before.push((chunks, bytes));
        }
        Ok(HalfLayout { sections, before })
    }

    /// The matrices.
    #[must_use]
    pub fn sections(&self) -> &[Section] {
        &self.sections
    }

    /// Number of chunks.
    #[must_use]
    pub fn chunks(&self) -> u64 {
        self.before.last().map_or(0, |b| b.0)
    }

    /// Bytes of all chunks.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.before.last().map_or(0, |b| b.1)
    }

    /// Memory that the half takes once it is loaded: mapped as it is, public matrices unpacked to 32-bit integers beside it.
    #[must_use]
    pub fn loaded_bytes(&self) -> u64 {
        let public = self.sections.iter().filter(|s| s.public);
        self.bytes() + public.map(|s| 4 * (s.rows * s.cols) as u64).sum::<u64>()
    }

    /// Chunk `index`, if there is one.
    #[must_use]
    pub fn chunk(&self, index: u64) -> Option<Chunk<'_>> {
        let at = self.before.partition_point(|b| b.0 <= index).checked_sub(1)?;
        let section = self.sections.get(at)?;
        let each = section.chunk_rows();
        let nth = index - self.before[at].0;
        let first_row = usize::try_from(nth).ok()? * each;
        let rows = each.min(section.rows.checked_sub(first_row)?);
        let packed = |rows: usize| pack::packed_len(rows * section.cols, section.bits());
        let offset = self.before[at].1 + nth * packed(each) as u64;
        Some(Chunk { section, index: at, first_row, rows, offset, bytes: packed(rows) })
    }

    /// Where section `index` begins, and how many of its words are packed together.
    #[must_use]
    pub fn section(&self, index: usize) -> Option<(usize, usize)> {
        let s = self.sections.get(index)?;
        Some((usize::try_from(self.before[index].1).ok()?, s.chunk_rows() * s.cols))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_matrix_of_a_model_has_a_number_of_its_own() {
        let plain = [Slot::Qkv, Slot::QkGain, Slot::O, Slot::GateUp, Slot::Down, Slot::Head, Slot::Embedding];
        let slots = plain.into_iter().chain(Group::ALL.map(Slot::AdapterA)).chain(Module::ALL.map(Slot::AdapterB));
        let numbers: std::collections::BTreeSet<u64> = slots.map(Slot::number).collect();
        assert_eq!(numbers.len(), plain.len() + 4 + 7);
        assert!(numbers.iter().all(|n| *n < SLOTS));
    }
}
