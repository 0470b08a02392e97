//! Where training stands, on disk: parameters, the optimiser's moments, the step, the losses so far. The order of the data follows
//! from seed and step, so nothing else is needed to go on as if nothing had happened. Only the number of threads has to be the same:
//! matrix products are cut by it, and where they are cut sums are rounded.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde_json::Value;

use super::disk;
use super::ops::with_values;
use super::optimiser::{AdamW, DECAY, Moments};
use super::student::{Parameter, defect};
use crate::error::{Error, Result};

/// The file's name, in the directory of the model that is being made.
pub const FILE: &str = "training.safetensors";

/// Where training stands.
pub(super) struct State {
    /// Steps done.
    pub step: usize,
    /// Seconds that they took.
    pub seconds: f64,
    /// The loss of every step.
    pub losses: Vec<f32>,
    pub optimiser: AdamW,
}

/// The checkpoint of a run with certain settings.
pub(super) struct Checkpoint {
    path: PathBuf,
    /// All that the final weights follow from.
    settings: Value,
}

const STEP: &str = "step";
const SETTINGS: &str = "settings";
const SECONDS: &str = "seconds";
const LOSSES: &str = "losses";
const THREADS: &str = "threads";

impl Checkpoint {
    pub(super) fn new(dir: &Path, settings: Value) -> Self {
        Checkpoint { path: dir.join(FILE), settings }
    }

    /// Saves; what was saved before stays until this is complete.
    pub(super) fn save(&self, parameters: &[Parameter], state: &State) -> Result<()> {
        let mut tensors: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
        let bytes = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
        for (p, moments) in parameters.iter().zip(&state.optimiser.moments) {
            let shape = p.var.dims().to_vec();
            let value = with_values(p.var.as_tensor(), |v| Ok(bytes(v))).map_err(defect)?;
            for (part, value) in [("value", value), ("mean", bytes(&moments.mean)), ("square", bytes(&moments.square))]
            {
                tensors.push((format!("{part}.{}", p.name), shape.clone(), value));
            }
        }
        tensors.push((LOSSES.into(), vec![state.losses.len()], bytes(&state.losses)));
        let views = tensors.iter().map(|(name, shape, bytes)| {
            let view = TensorView::new(Dtype::F32, shape.clone(), bytes);
            view.map(|v| (name.as_str(), v)).map_err(|e| Error::Internal(format!("{name}: {e}")))
        });
        let metadata = HashMap::from([
            (STEP.to_owned(), state.step.to_string()),
            (SECONDS.to_owned(), state.seconds.to_string()),
            (SETTINGS.to_owned(), self.settings.to_string()),
            (THREADS.to_owned(), threads()),
        ]);
        disk::write_safetensors(&self.path, views.collect::<Result<_>>()?, Some(metadata))
    }

    /// Goes on where [`Checkpoint::save`] stopped, if it ever did: sets the parameters, returns the rest.
    pub(super) fn load(&self, parameters: &[Parameter]) -> Result<Option<State>> {
        let wrong = |e: String| {
            Error::Model(format!("{}: {e}; remove it to start over, or give another --out", self.path.display()))
        };
        let bytes = match std::fs::read(&self.path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Error::io(self.path.display().to_string(), e)),
        };
        let broken = |e: safetensors::SafeTensorError| wrong(format!("is no checkpoint of a training ({e})"));
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(broken)?;
        let metadata = header.metadata().clone().unwrap_or_default();
        let settings: Option<Value> = metadata.get(SETTINGS).and_then(|s| serde_json::from_str(s).ok());
        let settings = settings.ok_or_else(|| wrong("is no checkpoint of a training".into()))?;
        if let Some(name) = difference(&settings, &self.settings) {
            return Err(wrong(format!("was made with another `{name}`; give the same options to go on")));
        }
        let made_with =
            metadata.get(THREADS).ok_or_else(|| wrong("does not say by how many threads it was made".into()))?;
        if *made_with != threads() {
            return Err(Error::Config(format!(
                "--threads: {} was made by {made_with} threads, and {} would end with other weights; go on with --threads {made_with}, \
                 or remove it to start over",
                self.path.display(),
                threads()
            )));
        }
        let step = metadata.get(STEP).and_then(|s| s.parse().ok()).ok_or_else(|| wrong("has no step".into()))?;
        let file = SafeTensors::deserialize(&bytes).map_err(broken)?;
        let read = |name: &str, shape: Option<&[usize]>| -> Result<Vec<f32>> {
            let t = file.tensor(name).map_err(broken)?;
            if t.dtype() != Dtype::F32 || shape.is_some_and(|s| s != t.shape()) {
                return Err(wrong(format!("{name} is of another shape")));
            }
            Ok(t.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
        };
        let mut moments = Vec::new();
        for p in parameters {
            let of = |part: &str| read(&format!("{part}.{}", p.name), Some(p.var.dims()));
            let value = Tensor::from_vec(of("value")?, p.var.shape(), &Device::Cpu);
            value.and_then(|v| p.var.set(&v)).map_err(defect)?;
            moments.push(Moments { mean: of("mean")?, square: of("square")? });
        }
        let seconds = metadata.get(SECONDS).and_then(|s| s.parse().ok()).unwrap_or_default();
        Ok(Some(State { step, seconds, losses: read(LOSSES, None)?, optimiser: AdamW { moments, decay: DECAY } }))
    }

    /// The model is made: the way there is not needed any more.
    pub(super) fn remove(&self) -> Result<()> {
        match std::fs::remove_file(&self.path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(self.path.display().to_string(), e)),
            _ => Ok(()),
        }
    }
}

/// How many threads compute: rayon's, and where candle's products take another number than those, that too.
fn threads() -> String {
    match (rayon::current_num_threads(), candle_core::utils::get_num_threads()) {
        (ours, products) if ours == products => ours.to_string(),
        (ours, products) => format!("{ours} (products by {products})"),
    }
}

/// The first setting in which two runs differ.
pub(super) fn difference(a: &Value, b: &Value) -> Option<String> {
    let (Value::Object(a), Value::Object(b)) = (a, b) else { return (a != b).then(|| "settings".to_owned()) };
    a.keys().chain(b.keys()).find(|name| a.get(*name) != b.get(*name)).cloned()
}
