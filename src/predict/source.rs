//! Where a plan comes from: a checkpoint (calibrated as a preparation would) or what a preparation wrote down.

use std::path::Path;

use crate::error::Result;
use crate::model::preparation::{Loaded, Options};
use crate::model::store::PublicManifest;
use crate::model::{Layered, ModelConfig};
use crate::plan::memory::owner_words;
use crate::plan::{LayerPlan, Plan};

/// A model as far as its cost goes: nothing secret.
#[derive(Clone, Debug)]
pub struct Source {
    /// Its configuration; the context is the plan's.
    pub config: ModelConfig,
    /// Its plan.
    pub plan: Plan,
    /// Bytes of the Owner's integers.
    pub owner_bytes: u64,
}

/// What a preparation writes beside the seed.
const MANIFEST: &str = "manifest.json";

impl Source {
    /// Whether `dir` holds a preparation.
    #[must_use]
    pub fn is_preparation(dir: &Path) -> bool {
        dir.join(MANIFEST).is_file()
    }

    /// From a checkpoint: loads, calibrates and plans it as a preparation does.
    ///
    /// # Errors
    /// [`crate::Error::Model`], [`crate::Error::Config`].
    pub fn checkpoint(dir: &Path, options: &Options) -> Result<Source> {
        Self::loaded(Loaded::stream(dir, options)?)
    }

    /// From weights in memory.
    ///
    /// # Errors
    /// As [`Source::checkpoint`].
    pub fn loaded<W: Layered>(loaded: Loaded<W>) -> Result<Source> {
        let plan = loaded.plan()?;
        let config = loaded.weights.rest().config.clone();
        let owner_bytes = 2 * owner_words(&config, &plan) + wide_bytes(&loaded.weights, &plan)?;
        Ok(Source { config, plan, owner_bytes })
    }

    /// From a preparation's `manifest.json`.
    ///
    /// # Errors
    /// [`crate::Error::Model`] naming the file for one that is damaged; [`crate::Error::Io`].
    pub fn preparation(dir: &Path) -> Result<Source> {
        let manifest = PublicManifest::read(&dir.join(MANIFEST))?;
        let config = manifest.model_config()?;
        // What is on the Owner's disk is what it loads; elsewhere the half is not there, and 16 bits are the rule.
        let half = std::fs::metadata(dir.join("owner.bin")).map(|m| m.len());
        let owner_bytes = half.unwrap_or(2 * owner_words(&config, &manifest.plan));
        Ok(Source { config, plan: manifest.plan, owner_bytes })
    }
}

/// Bytes beyond 16 bits per word, of matrices with a weight that needs 32.
fn wide_bytes(weights: &dyn Layered, plan: &Plan) -> Result<u64> {
    let w = weights.rest();
    let wide = |m: &ndarray::Array2<f32>, gain: Option<&ndarray::Array1<f32>>, by: f32, f: u32| {
        let limit = f32::from(i16::MAX) / f64::from(f).exp2() as f32;
        m.rows().into_iter().any(|r| match gain {
            Some(g) => r.iter().zip(g).any(|(v, g)| (v * g * by).abs() >= limit),
            None => r.iter().any(|v| (v * by).abs() >= limit),
        })
    };
    let mut bytes = 0;
    for (i, p) in (plan.first_private..).zip(&plan.layers) {
        let l = weights.layer(i)?;
        let scale = if w.config.qk_norm { 1.0 } else { w.config.layer(i).score_scale() };
        let LayerPlan { attention: a, mlp, .. } = p;
        let (n, p) = (Some(&l.input_norm), Some(&l.post_norm));
        let (f_qkv, f_gate_up) = (a.f_qkv, mlp.f_gate_up);
        let stacks = [
            (
                wide(&l.q.w, n, scale, f_qkv) || wide(&l.k.w, n, 1.0, f_qkv) || wide(&l.v.w, n, 1.0, f_qkv),
                l.q.w.len() + l.k.w.len() + l.v.w.len(),
            ),
            (wide(&l.o.w, None, 1.0, a.f_o), l.o.w.len()),
            (wide(&l.gate.w, p, 1.0, f_gate_up) || wide(&l.up.w, p, 1.0, f_gate_up), l.gate.w.len() + l.up.w.len()),
            (wide(&l.down.w, None, 1.0, mlp.f_down), l.down.w.len()),
        ];
        bytes += stacks.iter().filter(|s| s.0).map(|s| 2 * s.1 as u64).sum::<u64>();
    }
    let head = w.head.as_ref().unwrap_or(&w.embed);
    Ok(bytes + if wide(head, Some(&w.norm), 1.0, plan.head.f_weight) { 2 * head.len() as u64 } else { 0 })
}
