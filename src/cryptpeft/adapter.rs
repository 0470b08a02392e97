//! The private weights of CryptPEFT: adapters with LinAtten, the final LayerNorm and the head.

use std::fmt;

use ndarray::{Array1, Array2, ArrayView2, Axis};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};

use super::vit::VitConfig;
use crate::error::{Error, Result};
use crate::model::matmul_transposed;

/// What is added to the variance of every LayerNorm, unless `adapter_config.json` says otherwise.
pub const EPS: f64 = 1e-6;

/// The public architecture of the adapters and the head.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdapterConfig {
    /// Width of the backbone, `d`.
    pub hidden: usize,
    /// Width within an adapter, `r`.
    pub rank: usize,
    /// Heads of LinAtten, which divide the rank.
    pub heads: usize,
    /// Blocks in each adapter.
    pub blocks: usize,
    /// The backbone layers whose input an adapter reads, from 0, ascending: the last ones of the backbone.
    pub layers: Vec<usize>,
    /// Tokens of the backbone, the CLS token among them: LinAtten's map over the keys is made for this length alone.
    pub tokens: usize,
    /// Classes that the head tells apart.
    pub classes: usize,
    /// Factor of what an adapter adds.
    pub scale: f32,
    /// Added to the variance of every LayerNorm.
    pub eps: f64,
    /// Names of the classes, or none.
    pub labels: Vec<String>,
}

impl AdapterConfig {
    /// Width of a head.
    #[must_use]
    pub fn head_dim(&self) -> usize {
        self.rank / self.heads.max(1)
    }

    /// What scores are multiplied by: `head_dim^-1/2`.
    #[must_use]
    pub fn score_scale(&self) -> f32 {
        (self.head_dim() as f64).powf(-0.5) as f32
    }

    /// Checks what the tensors' shapes do not tell; `what` names the file in errors.
    ///
    /// # Errors
    /// [`Error::Model`] naming the field.
    pub fn check(&self, what: &str) -> Result<()> {
        let wrong = |text: String| Err(Error::Model(format!("{what}: {text}")));
        let sizes = [self.hidden, self.rank, self.heads, self.blocks, self.tokens, self.classes];
        if sizes.contains(&0) || self.layers.is_empty() {
            return wrong(format!("no size may be 0, and there must be a layer: {self:?}"));
        }
        if !self.rank.is_multiple_of(self.heads) {
            let (rank, heads) = (self.rank, self.heads);
            return wrong(format!(
                "heads: {heads} do not divide the rank {rank} of the adapters, the rows of lora_A.weight; set as many heads as it was trained with"
            ));
        }
        if !self.layers.iter().zip(self.layers.iter().skip(1)).all(|(a, b)| a.checked_add(1) == Some(*b)) {
            return wrong(format!(
                "there are adapters of the layers {:?}, but they must be the last ones of the backbone without a gap",
                self.layers
            ));
        }
        if !self.scale.is_finite() {
            return wrong(format!("scale: must be a finite number, but is {}", self.scale));
        }
        if !(self.eps.is_finite() && self.eps > 0.0) {
            return wrong(format!("eps: must be a finite number above 0, but is {}", self.eps));
        }
        if !self.labels.is_empty() && self.labels.len() != self.classes {
            let (labels, classes) = (self.labels.len(), self.classes);
            return wrong(format!(
                "labels: there are {labels}, but the head has {classes} classes; give one of each class, or none at all"
            ));
        }
        Ok(())
    }

    /// Checks that the adapters are of this backbone.
    ///
    /// # Errors
    /// [`Error::Model`] with what differs.
    pub fn check_backbone(&self, vit: &VitConfig) -> Result<()> {
        let wrong = |text| Err(Error::Model(format!("adapter and backbone are not of one model: {text}")));
        if self.hidden != vit.hidden {
            return wrong(format!("the adapter's hidden size is {}, the backbone's {}", self.hidden, vit.hidden));
        }
        if self.tokens != vit.tokens() {
            return wrong(format!("the adapter is made for {} tokens, the backbone has {}", self.tokens, vit.tokens()));
        }
        if self.layers.last().map(|i| i + 1) != Some(vit.layers) {
            return wrong(format!(
                "there are adapters of the layers {:?} (from 0), which are not the last ones of the backbone's {}",
                self.layers, vit.layers
            ));
        }
        Ok(())
    }
}

/// `x W^T + b`.
#[derive(Clone, PartialEq)]
pub struct Affine {
    /// `[out, in]`.
    pub weight: Array2<f32>,
    /// `[out]`.
    pub bias: Array1<f32>,
}

impl Affine {
    /// `[rows, in]` to `[rows, out]`.
    #[must_use]
    pub fn apply(&self, x: ArrayView2<'_, f32>) -> Array2<f32> {
        matmul_transposed(x, self.weight.view()) + &self.bias
    }
}

/// Gain and shift of a LayerNorm.
#[derive(Clone, PartialEq)]
pub struct LayerNorm {
    /// `[width]`.
    pub weight: Array1<f32>,
    /// `[width]`.
    pub bias: Array1<f32>,
}

impl LayerNorm {
    /// Normalises every row; also gives the rows' variances, without `eps`.
    #[must_use]
    pub fn apply(&self, x: ArrayView2<'_, f32>, eps: f64) -> (Array2<f32>, Vec<f32>) {
        let mut y = x.to_owned();
        let mut variances = Vec::with_capacity(x.nrows());
        let n = x.ncols().max(1) as f64;
        for mut row in y.rows_mut() {
            let mean = row.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
            let variance = row.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / n;
            let inverse = 1.0 / (variance + eps).sqrt();
            for ((v, gain), shift) in row.iter_mut().zip(&self.weight).zip(&self.bias) {
                *v = ((f64::from(*v) - mean) * inverse) as f32 * gain + shift;
            }
            variances.push(variance as f32);
        }
        (y, variances)
    }
}

/// One block of an adapter: LinAtten and an MLP, each behind a LayerNorm and with a residual.
#[derive(Clone, PartialEq)]
pub struct Block {
    /// Before LinAtten.
    pub ln_1: LayerNorm,
    /// `[3 rank, rank]`: all rows of the queries, then of the keys, then of the values; no bias.
    pub qkv: Array2<f32>,
    /// Over the keys, where others have the softmax: `[tokens, tokens]`.
    pub attn_reset: Affine,
    /// After the heads are side by side: `[rank, rank]`.
    pub proj: Affine,
    /// Before the MLP.
    pub ln_2: LayerNorm,
    /// `[rank, rank]`; a ReLU follows.
    pub mlp_0: Affine,
    /// `[rank, rank]`.
    pub mlp_3: Affine,
}

/// The adapter that reads one backbone layer.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterLayer {
    /// `[rank, hidden]`.
    pub lora_a: Affine,
    /// In the order in which they are applied.
    pub blocks: Vec<Block>,
    /// `[hidden, rank]`.
    pub lora_b: Affine,
}

/// Everything that is private.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterWeights {
    /// Of [`AdapterConfig::layers`], in that order.
    pub layers: Vec<AdapterLayer>,
    /// The final LayerNorm.
    pub ln: LayerNorm,
    /// `[classes, hidden]`.
    pub head: Affine,
}

impl fmt::Debug for Affine {
    /// The shape alone: the weights are private.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Affine").field("weight", &self.weight.shape()).field("bias", &self.bias.shape()).finish()
    }
}

impl fmt::Debug for LayerNorm {
    /// The width alone: the weights are private.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LayerNorm").field("width", &self.weight.len()).finish()
    }
}

impl fmt::Debug for Block {
    /// The shapes alone: the weights are private.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Block").field("qkv", &self.qkv.shape()).field("attn_reset", &self.attn_reset).finish()
    }
}

impl AdapterWeights {
    /// Random weights for tests and measurements, of sizes such as training gives: matrices Gaussian with variance
    /// `1 / in`, gains near 1, small biases, and every key mostly mapped to itself. Equal seeds give equal weights.
    #[must_use]
    pub fn random(config: &AdapterConfig, seed: u64) -> Self {
        let mut g = Gaussian::new(seed);
        let (d, r, tokens) = (config.hidden, config.rank, config.tokens);
        let block = |g: &mut Gaussian| {
            let ln_1 = g.norm(r);
            let qkv = g.affine(3 * r, r).weight;
            let mut attn_reset = g.affine(tokens, tokens);
            attn_reset.weight += &Array2::eye(tokens);
            let (proj, ln_2) = (g.affine(r, r), g.norm(r));
            Block { ln_1, qkv, attn_reset, proj, ln_2, mlp_0: g.affine(r, r), mlp_3: g.affine(r, r) }
        };
        let layer = |g: &mut Gaussian| {
            let lora_a = g.affine(r, d);
            let blocks = (0..config.blocks).map(|_| block(g)).collect();
            AdapterLayer { lora_a, blocks, lora_b: g.affine(d, r) }
        };
        let layers = config.layers.iter().map(|_| layer(&mut g)).collect();
        AdapterWeights { layers, ln: g.norm(d), head: g.affine(config.classes, d) }
    }
}

/// Standard normal values of a seed.
pub(super) struct Gaussian {
    rng: ChaCha8Rng,
    spare: Option<f32>,
}

impl Gaussian {
    /// Of biases, and of gains around 1.
    const SMALL: f32 = 0.05;

    pub(super) fn new(seed: u64) -> Self {
        Gaussian { rng: ChaCha8Rng::seed_from_u64(seed), spare: None }
    }

    /// Box-Muller, two values at a time.
    pub(super) fn next(&mut self) -> f32 {
        if let Some(value) = self.spare.take() {
            return value;
        }
        // 24 bits each; the half keeps the logarithm's argument above 0.
        let mut uniform = || ((self.rng.next_u32() >> 8) as f32 + 0.5) * (1.0 / (1 << 24) as f32);
        let radius = (-2.0 * uniform().ln()).sqrt();
        let (sin, cos) = (std::f32::consts::TAU * uniform()).sin_cos();
        self.spare = Some(radius * sin);
        radius * cos
    }

    pub(super) fn matrix(&mut self, rows: usize, columns: usize, std: f32) -> Array2<f32> {
        Array2::from_shape_simple_fn((rows, columns), || std * self.next())
    }

    pub(super) fn vector(&mut self, len: usize, mean: f32) -> Array1<f32> {
        self.matrix(1, len, Self::SMALL).index_axis_move(Axis(0), 0) + mean
    }

    pub(super) fn affine(&mut self, out: usize, inputs: usize) -> Affine {
        let weight = self.matrix(out, inputs, (inputs.max(1) as f32).powf(-0.5));
        Affine { weight, bias: self.vector(out, 0.0) }
    }

    pub(super) fn norm(&mut self, len: usize) -> LayerNorm {
        LayerNorm { weight: self.vector(len, 1.0), bias: self.vector(len, 0.0) }
    }
}
