//! The public backbone in float: a vision transformer with pre-norm blocks, a CLS token and learned positions, as Hugging
//! Face transformers (`ViTModel`, `ViTForImageClassification`) and torchvision (`vit_b_16` and its like) store it.
//!
//! Its pooler, final LayerNorm and classifier are not read: CryptPEFT has its own.

use std::fmt;
use std::path::Path;

use ndarray::{Array1, Array2, Array3, ArrayView2, Axis, s};
use rayon::prelude::*;

use super::adapter::{Affine, Gaussian, LayerNorm};
use super::float::Features;
use crate::error::{Error, Result};
use crate::model::float::gelu;

/// Colours of a pixel.
pub const CHANNELS: usize = 3;

/// Of an image, in pixels a side.
const LARGEST_IMAGE: usize = 4096;

/// Who named the tensors; it also decides how images are made ready where no file says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Hugging Face transformers.
    HuggingFace,
    /// torchvision.
    Torchvision,
}

/// The architecture of a backbone.
#[derive(Clone, Debug, PartialEq)]
pub struct VitConfig {
    /// Who named the tensors.
    pub layout: Layout,
    /// Height and width of the image, in pixels.
    pub image: usize,
    /// Height and width of a patch, in pixels.
    pub patch: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// How many layers.
    pub layers: usize,
    /// Attention heads in each.
    pub heads: usize,
    /// Width of the MLP.
    pub intermediate: usize,
    /// Added to the variance of every LayerNorm.
    pub eps: f64,
}

impl VitConfig {
    /// Tokens of an image: its patches and the CLS token, which is the first.
    #[must_use]
    pub fn tokens(&self) -> usize {
        (self.image / self.patch.max(1)).pow(2) + 1
    }

    /// Checks the sizes; `what` names the file in errors.
    ///
    /// # Errors
    /// [`Error::Model`] naming the field.
    pub fn check(&self, what: &str) -> Result<()> {
        let wrong = |text: String| Err(Error::Model(format!("{what}: {text}")));
        /// Far above every published model, and squares of it overflow nothing.
        const LARGE: usize = 1 << 16;
        let sizes = [self.image, self.patch, self.hidden, self.layers, self.heads, self.intermediate];
        if sizes.iter().any(|n| *n == 0 || *n > LARGE) {
            return wrong(format!("every size must be from 1 to {LARGE}: {self:?}"));
        }
        // A small file can describe a large image, for which memory is taken.
        if self.image > LARGEST_IMAGE {
            return wrong(format!("images of {} pixels a side; at most {LARGEST_IMAGE} are taken", self.image));
        }
        if !self.image.is_multiple_of(self.patch) {
            let (image, patch) = (self.image, self.patch);
            return wrong(format!(
                "the patch size {patch} does not divide the image size {image}; correct config.json"
            ));
        }
        if !self.hidden.is_multiple_of(self.heads) {
            let (hidden, heads) = (self.hidden, self.heads);
            return wrong(format!(
                "{heads} attention heads do not divide the hidden size {hidden}; correct config.json"
            ));
        }
        if !(self.eps.is_finite() && self.eps >= 0.0) {
            return wrong(format!("layer_norm_eps: must be a finite number from 0, but is {}", self.eps));
        }
        Ok(())
    }
}

/// A backbone with its weights.
pub struct Vit {
    pub(super) config: VitConfig,
    /// `[hidden, 3 patch patch]`: colours, rows, columns.
    pub(super) patches: Affine,
    pub(super) class_token: Array1<f32>,
    /// `[tokens, hidden]`.
    pub(super) positions: Array2<f32>,
    pub(super) layers: Vec<Layer>,
}

/// One layer: attention and an MLP with GELU, each behind a LayerNorm and with a residual.
pub(super) struct Layer {
    pub(super) ln_1: LayerNorm,
    /// `[3 hidden, hidden]`: queries, keys, values.
    pub(super) qkv: Affine,
    pub(super) out: Affine,
    pub(super) ln_2: LayerNorm,
    pub(super) mlp_1: Affine,
    pub(super) mlp_2: Affine,
}

impl fmt::Debug for Vit {
    /// The architecture alone.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vit").field("config", &self.config).finish_non_exhaustive()
    }
}

impl Vit {
    /// Opens a backbone: a directory with `model.safetensors`, or a safetensors file. `config.json` beside it must be there
    /// in the layout of Hugging Face; in torchvision's it may give `num_attention_heads` (else `hidden / 64`) and
    /// `layer_norm_eps` (else 1e-6).
    ///
    /// # Errors
    /// [`Error::Model`] naming the file, the field or the tensor with its shape; [`Error::Io`].
    pub fn open(dir_or_file: &Path) -> Result<Self> {
        super::vit_disk::open(dir_or_file)
    }

    /// Random weights for tests and measurements. Equal seeds give equal weights.
    ///
    /// # Errors
    /// [`Error::Model`] when the configuration does not pass [`VitConfig::check`].
    pub fn random(config: VitConfig, seed: u64) -> Result<Self> {
        config.check("random backbone")?;
        let mut g = Gaussian::new(seed);
        let (d, m) = (config.hidden, config.intermediate);
        let patches = g.affine(d, CHANNELS * config.patch * config.patch);
        let class_token = g.vector(d, 0.0);
        let positions = g.matrix(config.tokens(), d, 0.2);
        let layer = |_| {
            let (ln_1, qkv, out, ln_2) = (g.norm(d), g.affine(3 * d, d), g.affine(d, d), g.norm(d));
            Layer { ln_1, qkv, out, ln_2, mlp_1: g.affine(m, d), mlp_2: g.affine(d, m) }
        };
        let layers = (0..config.layers).map(layer).collect();
        Ok(Vit { config, patches, class_token, positions, layers })
    }

    /// The architecture.
    #[must_use]
    pub fn config(&self) -> &VitConfig {
        &self.config
    }

    /// Tokens of an image, the CLS token among them.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.config.tokens()
    }

    /// Runs the backbone on `pixels`, `[3, image, image]` and normalised, for adapters of these layers (from 0, ascending).
    ///
    /// # Errors
    /// [`Error::Shape`] for pixels or layers that are not of this backbone.
    pub fn features(&self, pixels: &Array3<f32>, layers: &[usize]) -> Result<Features> {
        let config = &self.config;
        let mut h = self.embed(pixels)?;
        let wrong = |lhs, rhs| Err(Error::Shape { op: "vision transformer", lhs, rhs });
        if !layers.windows(2).all(|pair| pair[0] < pair[1]) || layers.last().is_some_and(|i| *i >= config.layers) {
            return wrong(format!("layers {layers:?}"), format!("ascending ones of the backbone's {}", config.layers));
        }
        let mut inputs = Vec::with_capacity(layers.len());
        for (i, layer) in self.layers.iter().enumerate() {
            if layers.contains(&i) {
                inputs.push(h.clone());
            }
            h = layer.apply(config, h);
        }
        Ok(Features { inputs, last: h.row(0).to_owned() })
    }

    /// CLS token and patches with their positions: `[tokens, hidden]`.
    ///
    /// # Errors
    /// [`Error::Shape`] for pixels that are not of this backbone.
    pub fn embed(&self, pixels: &Array3<f32>) -> Result<Array2<f32>> {
        let wrong = |lhs, rhs| Err(Error::Shape { op: "vision transformer", lhs, rhs });
        let want = [CHANNELS, self.config.image, self.config.image];
        if pixels.shape() != want {
            return wrong(format!("pixels {:?}", pixels.shape()), format!("{want:?} of the backbone"));
        }
        if pixels.iter().any(|v| !v.is_finite()) {
            return wrong("pixels that are not finite".to_owned(), "numbers".to_owned());
        }
        let (p, across) = (self.config.patch, self.config.image / self.config.patch);
        let mut patches = Array2::zeros((across * across, CHANNELS * p * p));
        for (n, mut to) in patches.outer_iter_mut().enumerate() {
            let (y, x) = (n / across * p, n % across * p);
            let from = pixels.slice(s![.., y..y + p, x..x + p]);
            to.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
        }
        let mut h = self.positions.clone();
        let (mut cls, mut rest) = h.view_mut().split_at(Axis(0), 1);
        cls += &self.class_token;
        rest += &self.patches.apply(patches.view());
        Ok(h)
    }
}

impl Layer {
    pub(super) fn apply(&self, config: &VitConfig, h: Array2<f32>) -> Array2<f32> {
        let h = self.attend(config, h);
        let (x, _) = self.ln_2.apply(h.view(), config.eps);
        let mut y = self.mlp_1.apply(x.view());
        y.par_mapv_inplace(gelu);
        self.mlp_2.apply(y.view()) + h
    }

    /// The first half: what the MLP's norm reads.
    pub(super) fn attend(&self, config: &VitConfig, h: Array2<f32>) -> Array2<f32> {
        let (x, _) = self.ln_1.apply(h.view(), config.eps);
        let qkv = self.qkv.apply(x.view());
        self.out.apply(attention(config, qkv.view()).view()) + h
    }
}

/// Softmax attention over all tokens: of queries, keys and values side by side the heads side by side.
fn attention(config: &VitConfig, qkv: ArrayView2<'_, f32>) -> Array2<f32> {
    let (d, dim) = (config.hidden, config.hidden / config.heads);
    let scale = (dim as f64).powf(-0.5) as f32;
    let part = |n: usize, head: usize| qkv.slice(s![.., n * d + head * dim..n * d + (head + 1) * dim]);
    let heads = (0..config.heads).into_par_iter().map(|head| {
        let mut scores = part(0, head).dot(&part(1, head).t()) * scale;
        for mut row in scores.rows_mut() {
            let max = row.fold(f32::NEG_INFINITY, |a, &b| a.max(b));
            row.mapv_inplace(|v| (v - max).exp());
            let sum: f64 = row.iter().map(|&v| f64::from(v)).sum();
            row *= (1.0 / sum) as f32;
        }
        scores.dot(&part(2, head))
    });
    let mut context = Array2::zeros((qkv.nrows(), d));
    for (head, of_head) in heads.collect::<Vec<_>>().into_iter().enumerate() {
        context.slice_mut(s![.., head * dim..(head + 1) * dim]).assign(&of_head);
    }
    context
}
