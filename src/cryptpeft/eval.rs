//! How well an adapter does, in float: the features of labelled images, and how many of them get their label.

use ndarray::Array1;
use rayon::prelude::*;

use super::float::{Features, logits};
use super::synthetic::Example;
use super::vit::Vit;
use super::{AdapterConfig, AdapterWeights};
use crate::error::Result;

/// What the adapters of these backbone layers read of every image, with its label. The backbone never changes, so this is
/// computed once.
///
/// # Errors
/// [`crate::Error::Shape`] for images or layers that are not of this backbone.
pub fn cached_features(vit: &Vit, set: &[Example], layers: &[usize]) -> Result<Vec<(Features, usize)>> {
    set.par_iter().map(|e| Ok((vit.features(&e.pixels, layers)?, e.label))).collect()
}

/// The first of the largest logits.
#[must_use]
pub fn label(logits: &Array1<f32>) -> usize {
    let larger = |(n, most): (usize, f32), (i, &v): (usize, &f32)| if v > most { (i, v) } else { (n, most) };
    logits.iter().enumerate().fold((0, f32::NEG_INFINITY), larger).0
}

/// The part of `features` that gets its label in float; 0 of none.
///
/// # Panics
/// As [`logits`], for features that are not of the configuration.
#[must_use]
pub fn accuracy(config: &AdapterConfig, weights: &AdapterWeights, features: &[(Features, usize)]) -> f64 {
    let right = features.par_iter().filter(|(f, want)| label(&logits(config, weights, f, &mut ())) == *want).count();
    right as f64 / features.len().max(1) as f64
}
