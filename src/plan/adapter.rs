//! Low-rank adapters (LoRA, Hu et al. 2021) in the plan: which projections have one, of which rank, and the fixed point of
//! their two factors. `y = W x + B (A x)`: the base `W` is public, `A` and `B` are private.
//!
//! ```text
//! x in ring k, F bits --- W, f bits ------------------------- truncate f ------> ring k - f   --+-- y
//!                    `--- A, f_a bits -- truncate f_a -- lift to m -- B, f_b -- truncate f_b --´
//! ```
//!
//! `A x` and `B` drop `f_a + f_b` bits where `W` drops `f`: too many for the ring that `x` is in (of 64 bits a norm takes 10 or
//! more, the rotation 8, the fractions 12 to 24 each), so the few middle values are lifted to ring `m = k - f + f_b`, from
//! which the second truncation leaves just the ring and the fraction of `W x`. It fits 64 bits: where a projection reads, a ring
//! has lost 10 bits and more beside the 12 and more of `f`, and `f_b` is at most 18.

use serde::{Deserialize, Serialize};

use super::layer::{FW_LEAST, Fault, within};
use crate::model::ModelConfig;

/// Most fraction bits of `A`, whose rows are scaled to a norm between 1 and 2.
pub const F_A_MOST: u32 = 16;
/// Most fraction bits of `B`: what is rounded there is far below the truncation of its outputs.
pub const F_B_MOST: u32 = 18;

/// The projections that are multiplied together, since they read the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Group {
    /// Queries, keys, values.
    Qkv,
    /// The attention's output.
    O,
    /// Gate and up.
    GateUp,
    /// Down.
    Down,
}

impl Group {
    /// In the order of a layer.
    pub const ALL: [Group; 4] = [Group::Qkv, Group::O, Group::GateUp, Group::Down];
}

/// A projection that may have an adapter, by the name that checkpoints give it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Module {
    /// Queries.
    QProj,
    /// Keys.
    KProj,
    /// Values.
    VProj,
    /// The attention's output.
    OProj,
    /// The gate.
    GateProj,
    /// What is gated.
    UpProj,
    /// Back to the residual stream.
    DownProj,
}

impl Module {
    /// In the order of a layer.
    pub const ALL: [Module; 7] = [
        Module::QProj,
        Module::KProj,
        Module::VProj,
        Module::OProj,
        Module::GateProj,
        Module::UpProj,
        Module::DownProj,
    ];

    /// Its name within a layer of a checkpoint.
    #[must_use]
    pub fn path(self) -> &'static str {
        match self {
            Module::QProj => "self_attn.q_proj",
            Module::KProj => "self_attn.k_proj",
            Module::VProj => "self_attn.v_proj",
            Module::OProj => "self_attn.o_proj",
            Module::GateProj => "mlp.gate_proj",
            Module::UpProj => "mlp.up_proj",
            Module::DownProj => "mlp.down_proj",
        }
    }

    /// The last part of its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        self.path().rsplit('.').next().unwrap_or_default()
    }

    /// With which others it is multiplied.
    #[must_use]
    pub fn group(self) -> Group {
        match self {
            Module::QProj | Module::KProj | Module::VProj => Group::Qkv,
            Module::OProj => Group::O,
            Module::GateProj | Module::UpProj => Group::GateUp,
            Module::DownProj => Group::Down,
        }
    }

    /// Its outputs and inputs in layer `index`.
    #[must_use]
    pub fn dim(self, c: &ModelConfig, index: usize) -> (usize, usize) {
        let (shape, n, m) = (c.layer(index), c.hidden_size, c.intermediate_size);
        match self {
            Module::QProj => (shape.q_size(), n),
            Module::KProj | Module::VProj => (shape.kv_size(), n),
            Module::OProj => (n, shape.q_size()),
            Module::GateProj | Module::UpProj => (m, n),
            Module::DownProj => (n, m),
        }
    }

    /// Where its outputs begin among those of its group.
    #[must_use]
    pub fn offset(self, c: &ModelConfig, index: usize) -> usize {
        let before = Module::ALL.into_iter().filter(|m| m.group() == self.group() && *m < self);
        before.map(|m| m.dim(c, index).0).sum()
    }
}

/// Something of those groups of a layer that have an adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Grouped<T> {
    /// Of queries, keys, values.
    #[serde(default = "none", skip_serializing_if = "Option::is_none")]
    pub qkv: Option<T>,
    /// Of the attention's output projection.
    #[serde(default = "none", skip_serializing_if = "Option::is_none")]
    pub o: Option<T>,
    /// Of gate and up.
    #[serde(default = "none", skip_serializing_if = "Option::is_none")]
    pub gate_up: Option<T>,
    /// Of down.
    #[serde(default = "none", skip_serializing_if = "Option::is_none")]
    pub down: Option<T>,
}

/// For serde, which would ask for `T: Default` otherwise.
fn none<T>() -> Option<T> {
    None
}

impl<T> Default for Grouped<T> {
    fn default() -> Self {
        Grouped { qkv: None, o: None, gate_up: None, down: None }
    }
}

impl<T> Grouped<T> {
    /// That of a group, if it has an adapter.
    #[must_use]
    pub fn get(&self, group: Group) -> Option<&T> {
        match group {
            Group::Qkv => self.qkv.as_ref(),
            Group::O => self.o.as_ref(),
            Group::GateUp => self.gate_up.as_ref(),
            Group::Down => self.down.as_ref(),
        }
    }

    /// Its place.
    pub fn place(&mut self, group: Group) -> &mut Option<T> {
        match group {
            Group::Qkv => &mut self.qkv,
            Group::O => &mut self.o,
            Group::GateUp => &mut self.gate_up,
            Group::Down => &mut self.down,
        }
    }

    /// Whether no group has an adapter.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        Group::ALL.iter().all(|g| self.get(*g).is_none())
    }

    /// Those that have one.
    pub fn iter(&self) -> impl Iterator<Item = (Group, &T)> {
        Group::ALL.into_iter().filter_map(|g| self.get(g).map(|t| (g, t)))
    }
}

/// Fraction bits of a group's factors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AdapterFractions {
    /// Of `A`.
    pub a: u32,
    /// Of `B`.
    pub b: u32,
}

/// What is proven of a group's adapters, for every input.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterBounds {
    /// The projections that have one.
    pub modules: Vec<Module>,
    /// Rank of each.
    pub rank: usize,
    /// The fraction bits that the bound is of.
    pub f: AdapterFractions,
    /// Largest element of `A x`.
    pub middle: f64,
}

/// The adapters of a group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AdapterPlan {
    /// The projections that have one, in the order of a layer.
    pub modules: Vec<Module>,
    /// Rank of each.
    pub rank: usize,
    /// Fraction bits of `A`.
    pub f_a: u32,
    /// Fraction bits of `B`.
    pub f_b: u32,
}

impl AdapterPlan {
    /// Where `W x` is in ring `ring` with `f` bits of weights: the ring in which `B` multiplies.
    #[must_use]
    pub fn ring(&self, ring: u32, f: u32) -> u32 {
        ring - f + self.f_b
    }

    /// `W x` of the group is in ring `ring`, with `f` bits of weights.
    pub(super) fn check(
        &self,
        c: &ModelConfig,
        index: usize,
        group: Group,
        (f, ring): (u32, u32),
    ) -> Result<(), Fault> {
        let ordered = self.modules.windows(2).all(|pair| pair[0] < pair[1]);
        if self.modules.is_empty() || !ordered || self.modules.iter().any(|m| m.group() != group) {
            return Err("an adapter's projections");
        }
        for m in &self.modules {
            let (out, inputs) = m.dim(c, index);
            if self.rank == 0 || self.rank > out.min(inputs) {
                return Err("an adapter's rank");
            }
        }
        within(self.f_a, FW_LEAST, F_A_MOST, "the fraction of an adapter's A")?;
        within(self.f_b, FW_LEAST, F_B_MOST, "the fraction of an adapter's B")?;
        // A lift takes 3 bits.
        within(ring, self.f_a + 3, 64, "the ring of an adapter's middle values")?;
        within(self.ring(ring, f), 1, 64, "the ring of an adapter's outputs")
    }
}

impl From<&AdapterBounds> for AdapterPlan {
    fn from(b: &AdapterBounds) -> Self {
        AdapterPlan { modules: b.modules.clone(), rank: b.rank, f_a: b.f.a, f_b: b.f.b }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_where_their_group_has_them() {
        let c = ModelConfig { num_kv_heads: 2, ..ModelConfig::llama(32, 80, 2, 4, 100, 64) };
        assert_eq!(Module::ALL.map(|m| m.offset(&c, 0)), [0, 32, 48, 0, 0, 80, 0]);
        assert_eq!(Module::KProj.dim(&c, 1), (16, 32));
        assert_eq!(serde_json::to_string(&Module::ALL[..2]).unwrap(), r#"["q_proj","k_proj"]"#);
        Module::ALL.iter().for_each(|m| assert_eq!(format!("\"{}\"", m.name()), serde_json::to_string(m).unwrap()));
    }

    #[test]
    fn impossible_adapters_are_refused() {
        let c = ModelConfig::llama(32, 80, 2, 4, 100, 64);
        let good = AdapterPlan { modules: vec![Module::QProj, Module::VProj], rank: 4, f_a: 12, f_b: 18 };
        assert_eq!(good.check(&c, 0, Group::Qkv, (12, 48)), Ok(()));
        for bad in [
            AdapterPlan { modules: vec![], ..good.clone() },
            AdapterPlan { modules: vec![Module::VProj, Module::QProj], ..good.clone() },
            AdapterPlan { modules: vec![Module::OProj], ..good.clone() },
            AdapterPlan { rank: 0, ..good.clone() },
            AdapterPlan { rank: 33, ..good.clone() },
            AdapterPlan { f_a: 17, ..good.clone() },
            AdapterPlan { f_b: 11, ..good.clone() },
        ] {
            assert!(bad.check(&c, 0, Group::Qkv, (12, 48)).is_err(), "{bad:?}");
        }
    }
}
