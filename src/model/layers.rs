//! A model's weights layer by layer: all of them in memory, or each layer read from its checkpoint when it is asked for, so that a preparation
//! takes the memory of one in f32.

use std::borrow::Cow;
use std::fmt;
use std::path::Path;

use super::variant::Record;
use super::{Adapter, Checkpoint, LayerWeights, Weights};
use crate::error::Result;

/// Weights that give one layer after the other.
pub trait Layered: Sync + fmt::Debug {
    /// All that is not in a layer.
    fn rest(&self) -> &Weights;

    /// Shortens the context to so many positions.
    fn limit(&mut self, positions: usize);

    /// Layer `index`, which is below the configuration's number of layers.
    ///
    /// # Errors
    /// [`crate::Error::Model`] naming file and tensor.
    fn layer(&self, index: usize) -> Result<Cow<'_, LayerWeights>>;

    /// The first layer with an adapter, if there is one.
    fn first_adapted(&self) -> Option<usize>;

    /// Number of the adapters' weights, if there are adapters.
    fn adapter_parameters(&self) -> Option<u64>;
}

impl Layered for Weights {
    fn rest(&self) -> &Weights {
        self
    }

    fn limit(&mut self, positions: usize) {
        self.config.max_positions = positions;
    }

    fn layer(&self, index: usize) -> Result<Cow<'_, LayerWeights>> {
        Ok(Cow::Borrowed(&self.layers[index]))
    }

    fn first_adapted(&self) -> Option<usize> {
        Weights::first_adapted(self)
    }

    fn adapter_parameters(&self) -> Option<u64> {
        Weights::adapter_parameters(self)
    }
}

/// Weights whose layers stay in the checkpoint, which is mapped, not read.
#[derive(Debug)]
pub struct Streamed {
    checkpoint: Checkpoint,
    /// Without layers.
    rest: Weights,
    adapter: Option<Adapter>,
}

impl Streamed {
    /// Of the checkpoint in `dir`, with the adapter in the directory `adapter` beside its layers.
    ///
    /// # Errors
    /// [`crate::Error::Model`] for either.
    pub fn open(checkpoint: Checkpoint, dir: &Path, adapter: Option<&Path>) -> Result<Streamed> {
        if adapter.is_some() {
            Record::check_public(dir)?;
        }
        let adapter = adapter.map(|a| Adapter::open(a, dir, checkpoint.config())).transpose()?;
        let rest = Weights::load_rest(&checkpoint)?;
        Ok(Streamed { checkpoint, rest, adapter })
    }
}

impl Layered for Streamed {
    fn rest(&self) -> &Weights {
        &self.rest
    }

    fn limit(&mut self, positions: usize) {
        self.rest.limit(positions);
    }

    fn layer(&self, index: usize) -> Result<Cow<'_, LayerWeights>> {
        let mut layer = LayerWeights::load(&self.checkpoint, index)?;
        self.adapter.as_ref().map_or(Ok(()), |a| a.attach_to(index, &mut layer))?;
        Ok(Cow::Owned(layer))
    }

    fn first_adapted(&self) -> Option<usize> {
        self.adapter.as_ref().map(Adapter::first_layer)
    }

    fn adapter_parameters(&self) -> Option<u64> {
        self.adapter.as_ref().map(Adapter::parameters)
    }
}
