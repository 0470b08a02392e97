//! What a prepared adapter leaves at each party: the Owner's integers, the Client's seed, the Helper's `W - B`.

use std::collections::HashMap;

use super::AdapterWeights;
use super::maps::{Slot, matrices, slots};
use super::plan::Plan;
use crate::error::{Error, Result};
use crate::prf::PreparationSeed;
use crate::protocol::linear::OwnerMatrix;

/// One party's part.
pub struct Prepared {
    parts: HashMap<Slot, OwnerMatrix>,
}

impl std::fmt::Debug for Prepared {
    /// Without the part, which is secret at every party.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} matrices", self.parts.len())
    }
}

impl Prepared {
    fn of(plan: &Plan, make: &mut dyn FnMut(usize, Slot) -> Result<OwnerMatrix>) -> Result<Prepared> {
        let ring = |slot| if let Slot::Map(_, super::maps::Source::Input(_)) = slot { plan.input_k } else { 64 };
        let all = slots(&plan.config).into_iter().enumerate();
        let parts = all.map(|(i, slot)| Ok((slot, make(i, slot)?.within(ring(slot))))).collect::<Result<_>>()?;
        Ok(Prepared { parts })
    }

    /// The Owner's part.
    ///
    /// # Errors
    /// [`Error::Model`] for a weight that cannot be represented.
    pub fn owner(plan: &Plan, w: &AdapterWeights) -> Result<Prepared> {
        let mut all = matrices(&plan.config, w)?.into_iter();
        Self::of(plan, &mut |i, slot| {
            let (_, m, bias) = all.next().ok_or_else(|| Error::Internal("a matrix for each slot".into()))?;
            let name = format!("{slot:?}");
            OwnerMatrix::quantise(i as u64, &name, m.view(), bias.as_ref().and_then(|b| b.as_slice()), slot.fraction())
        })
    }

    /// The Client's part.
    ///
    /// # Errors
    /// None that a plan leads to.
    pub fn client(plan: &Plan, seed: &PreparationSeed) -> Result<Prepared> {
        Self::of(plan, &mut |i, slot| {
            let (outputs, inputs) = slot.dim(&plan.config);
            Ok(OwnerMatrix::client(i as u64, outputs, inputs, slot.fraction(), seed.clone()))
        })
    }

    /// At the Owner: the Helper's part.
    ///
    /// # Errors
    /// [`Error::Internal`] at another party.
    pub fn helper(&self, plan: &Plan, seed: &PreparationSeed) -> Result<Prepared> {
        Self::of(plan, &mut |i, slot| {
            let (outputs, inputs) = slot.dim(&plan.config);
            let words = self.matrix(slot)?.helper_words(seed)?;
            OwnerMatrix::helper(i as u64, outputs, inputs, slot.fraction(), words)
        })
    }

    /// Shapes alone, for a walk that counts.
    pub(super) fn shape(plan: &Plan) -> Result<Prepared> {
        Self::of(plan, &mut |i, slot| Ok(OwnerMatrix::shape(i as u64, slot.dim(&plan.config), slot.fraction(), false)))
    }

    pub(super) fn matrix(&self, slot: Slot) -> Result<&OwnerMatrix> {
        self.parts.get(&slot).ok_or_else(|| Error::Internal(format!("no matrix {slot:?}")))
    }
}
