//! What loading and preparing a model is at: of large ones they take minutes.

use std::fmt;
use std::sync::Arc;

/// A part of the way from a checkpoint to a running model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Weights are read and looked at: bytes in f32, of how many.
    Weights,
    /// Calibration, and the choice of fraction bits: bytes of the layers that text has gone through, of how many.
    Calibration,
    /// Weights become integers, and shares for the other parties: bytes sent, of how many.
    Shares,
}

/// Who is told. Nobody by default.
#[derive(Clone, Default)]
pub struct Progress(Option<Arc<Told>>);

type Told = dyn Fn(Stage, u64, u64) + Send + Sync;

impl Progress {
    /// `told` hears of each stage how much of it is done, and of how much; from any thread.
    #[must_use]
    pub fn new(told: impl Fn(Stage, u64, u64) + Send + Sync + 'static) -> Self {
        Progress(Some(Arc::new(told)))
    }

    /// Says so.
    pub fn tell(&self, stage: Stage, done: u64, total: u64) {
        if let Some(told) = &self.0 {
            told(stage, done, total);
        }
    }
}

impl fmt::Debug for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "Progress(told)" } else { "Progress(nobody)" })
    }
}
