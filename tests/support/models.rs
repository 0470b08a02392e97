//! What the tests of whole models share: checkpoints of the repository, a session of three parties, a request with its
//! check against the float model.
#![allow(dead_code, clippy::missing_panics_doc)] // every test file uses a part of it

use std::path::{Path, PathBuf};

use trefoil::error::Result;
use trefoil::generate::{Check, Generation, Local, LocalOptions, check};
use trefoil::model::{Checkpoint, TextCodec, Weights, calibrate};

pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

pub fn quill() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/quill-4m")
}

pub fn load(dir: &Path) -> Weights {
    Weights::load(&Checkpoint::open(dir).unwrap()).unwrap()
}

pub fn codec() -> TextCodec {
    TextCodec::open(&quill()).unwrap()
}

/// The text on which the bundled model is calibrated unless told otherwise.
pub fn default_ids() -> Vec<u32> {
    codec().encode(calibrate::DEFAULT_TEXT).unwrap()
}

pub fn options(private_layers: Option<usize>, max_positions: usize) -> LocalOptions {
    LocalOptions { max_positions: Some(max_positions), ..LocalOptions::new(private_layers) }
}

/// A greedy request with opened logits.
pub fn greedy(local: &mut Local, prompt: &[u32], max_new: usize) -> Result<Generation> {
    local.generate(prompt, max_new, 0.0, 0, true, &mut |_| true)
}

/// One request in a session of its own, and what the check says.
pub fn once(
    w: &Weights,
    text: Option<Vec<u32>>,
    o: LocalOptions,
    prompt: &[u32],
    max_new: usize,
) -> Result<(Generation, Check)> {
    let mut local = Local::start(w.clone(), text, o)?;
    match greedy(&mut local, prompt, max_new) {
        Ok(g) => {
            local.finish()?;
            let c = check(w, prompt, &g, false);
            Ok((g, c))
        }
        Err(e) => Err(local.root_cause(e)),
    }
}

/// Right tokens: every one the float model's, and the whole distribution near.
pub fn is_right(c: &Check) -> bool {
    c.agree == c.of && c.of > 0 && c.max_kl < 1e-2
}

pub fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).fold(0.0, |m: f32, (a, b)| m.max((a - b).abs()))
}
