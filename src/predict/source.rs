//! Where a plan comes from: a checkpoint (calibrated as a preparation would) or what a preparation wrote down.

use std::path::Path;

use serde_json::Value;

use crate::error::{Error, Result};
use crate::generate::{same_head, split_layers};
use crate::model::{Checkpoint, ModelConfig, TextCodec, Weights, calibrate};
use crate::plan::memory::owner_words;
use crate::plan::{self, FW, Plan};

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

/// How a checkpoint would be prepared.
#[derive(Clone, Debug, Default)]
pub struct Choice<'a> {
    /// Private layers from the top; `None` for all and the embedding.
    pub private_layers: Option<usize>,
    /// The public base.
    pub base: Option<&'a Path>,
    /// The context.
    pub context: Option<usize>,
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
    /// [`Error::Model`], [`Error::Config`].
    pub fn checkpoint(dir: &Path, choice: &Choice<'_>) -> Result<Source> {
        let checkpoint = Checkpoint::open(dir)?;
        split_layers(checkpoint.config(), choice.private_layers)?;
        let ids = TextCodec::open(dir).ok().map(|c| c.encode(calibrate::DEFAULT_TEXT)).transpose()?;
        Self::weights(Weights::load(&checkpoint)?, ids, choice)
    }

    /// From weights in memory; `text` is what calibration reads.
    ///
    /// # Errors
    /// As [`Source::checkpoint`].
    pub fn weights(mut weights: Weights, text: Option<Vec<u32>>, choice: &Choice<'_>) -> Result<Source> {
        if let Some(n) = choice.context {
            weights.config.max_positions = weights.config.max_positions.min(n.max(2));
        }
        let (first, private_embedding) = split_layers(&weights.config, choice.private_layers)?;
        let public_head = match choice.base {
            None => false,
            Some(dir) => same_head(&weights, &Weights::load(&Checkpoint::open(dir)?)?),
        };
        weights.check()?;
        let inputs = calibrate::inputs(&weights.config, text);
        let ranges = calibrate::ranges(&weights, first, &inputs);
        let bounds = calibrate::bounds(&weights, first);
        let mut plan = plan::plan(&weights.config, first, private_embedding, &bounds, &ranges)?;
        plan.head.public = public_head;
        let owner_bytes = 2 * owner_words(&weights.config, &plan) + wide_bytes(&weights, first);
        Ok(Source { config: weights.config, plan, owner_bytes })
    }

    /// From a preparation's `manifest.json`.
    ///
    /// # Errors
    /// [`Error::Model`] naming the file for one that is damaged; [`Error::Io`].
    pub fn preparation(dir: &Path) -> Result<Source> {
        let file = dir.join(MANIFEST);
        let what = file.display().to_string();
        let bad =
            |text: &str| Error::Model(format!("{what}: {text}; was it written by `trefoil prepare` of this version?"));
        let bytes = std::fs::read(&file).map_err(|e| Error::io(what.clone(), e))?;
        let mut manifest: Value = serde_json::from_slice(&bytes).map_err(|e| bad(&format!("not JSON ({e})")))?;
        let plan = manifest.get_mut("plan").map(Value::take).ok_or_else(|| bad("no field `plan`"))?;
        let plan: Plan = serde_json::from_value(plan).map_err(|e| bad(&format!("the plan: {e}")))?;
        let text = match manifest.get("config") {
            Some(Value::String(text)) => text.clone(),
            Some(object @ Value::Object(_)) => object.to_string(),
            _ => return Err(bad("no field `config`")),
        };
        let mut config = ModelConfig::parse(text.as_bytes(), None, &what)?;
        plan.check(&config).map_err(|fault| bad(&format!("the plan: {fault}")))?;
        config.max_positions = plan.max_positions;
        // What is on the Owner's disk is what it loads; elsewhere the half is not there, and 16 bits are the rule.
        let half = std::fs::metadata(dir.join("owner.bin")).map(|m| m.len());
        let owner_bytes = half.unwrap_or(2 * owner_words(&config, &plan));
        Ok(Source { config, plan, owner_bytes })
    }
}

/// Bytes beyond 16 bits per word, of matrices with a weight that needs 32.
fn wide_bytes(w: &Weights, first: usize) -> u64 {
    let limit = f32::from(i16::MAX) / f64::from(FW).exp2() as f32;
    let wide = |m: &ndarray::Array2<f32>, gain: Option<&ndarray::Array1<f32>>, by: f32| {
        m.rows().into_iter().any(|r| match gain {
            Some(g) => r.iter().zip(g).any(|(v, g)| (v * g * by).abs() >= limit),
            None => r.iter().any(|v| (v * by).abs() >= limit),
        })
    };
    let scale = if w.config.qk_norm { 1.0 } else { 1.0 / (w.config.head_dim as f32).sqrt() };
    let mut bytes = 0;
    for l in &w.layers[first..] {
        let (n, p) = (Some(&l.input_norm), Some(&l.post_norm));
        let stacks = [
            (
                wide(&l.q.w, n, scale) || wide(&l.k.w, n, 1.0) || wide(&l.v.w, n, 1.0),
                l.q.w.len() + l.k.w.len() + l.v.w.len(),
            ),
            (wide(&l.o.w, None, 1.0), l.o.w.len()),
            (wide(&l.gate.w, p, 1.0) || wide(&l.up.w, p, 1.0), l.gate.w.len() + l.up.w.len()),
            (wide(&l.down.w, None, 1.0), l.down.w.len()),
        ];
        bytes += stacks.iter().filter(|s| s.0).map(|s| 2 * s.1 as u64).sum::<u64>();
    }
    let head = w.head.as_ref().unwrap_or(&w.embed);
    bytes + if wide(head, Some(&w.norm), 1.0) { 2 * head.len() as u64 } else { 0 }
}
