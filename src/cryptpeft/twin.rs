//! Adapters and head as training sees them: the arithmetic of [`super::float`] on tensors that have gradients, of a batch of
//! images at a time. The backbone has none: what the adapters read of it is given.

use candle_core::{D, Device, Result, Tensor, Var};
use ndarray::{Array, Array1, Array2};

use super::adapter::{AdapterConfig, AdapterLayer, AdapterWeights, Affine, Block, LayerNorm};
use super::float::Features;
use crate::error::Error;
use crate::marill::ops::{Linear, RmsNorm};
use crate::marill::student::{Parameter, defect};

pub(super) struct Map {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Map {
    /// One that is not trained.
    pub(super) fn frozen(a: &Affine) -> Result<Self> {
        Ok(Map { weight: constant(&a.weight)?, bias: Some(constant(&a.bias)?) })
    }

    /// `[.., in]` to `[.., out]`.
    pub(super) fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let (out, from) = self.weight.dims2()?;
        let mut shape = x.dims().to_vec();
        if let Some(last) = shape.last_mut() {
            *last = out;
        }
        let x = x.contiguous()?.reshape((x.elem_count() / from, from))?;
        let mut y = x.apply_op2(&self.weight, Linear { input: x.track_op(), weight: self.weight.is_variable() })?;
        if let Some(bias) = &self.bias {
            y = y.broadcast_add(bias)?;
        }
        y.reshape(shape)
    }

    fn read(&self) -> Result<Affine> {
        let bias = match &self.bias {
            Some(bias) => vector(bias)?,
            None => Array1::zeros(0),
        };
        Ok(Affine { weight: matrix(&self.weight)?, bias })
    }
}

pub(super) struct Norm {
    gain: Tensor,
    shift: Tensor,
}

impl Norm {
    /// One that is not trained.
    pub(super) fn frozen(n: &LayerNorm) -> Result<Self> {
        Ok(Norm { gain: constant(&n.weight)?, shift: constant(&n.bias)? })
    }

    pub(super) fn apply(&self, x: &Tensor, eps: f64) -> Result<Tensor> {
        let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
        centred.apply_op2(&self.gain, RmsNorm { eps, gain: self.gain.is_variable() })?.broadcast_add(&self.shift)
    }

    fn read(&self) -> Result<LayerNorm> {
        Ok(LayerNorm { weight: vector(&self.gain)?, bias: vector(&self.shift)? })
    }
}

struct TwinBlock {
    ln_1: Norm,
    qkv: Map,
    reset: Map,
    proj: Map,
    ln_2: Norm,
    mlp_0: Map,
    mlp_3: Map,
}

struct TwinLayer {
    lora_a: Map,
    blocks: Vec<TwinBlock>,
    lora_b: Map,
}

/// Adapters and head that are trained.
pub(super) struct Twin {
    config: AdapterConfig,
    layers: Vec<TwinLayer>,
    ln: Norm,
    head: Map,
    parameters: Vec<Parameter>,
}

/// A batch: for each adapter what it reads, `[images, tokens, hidden]`, and the last hidden states, `[images, hidden]`.
pub(super) struct Given {
    pub(super) inputs: Vec<Tensor>,
    pub(super) last: Tensor,
}

impl Given {
    pub(super) fn new<'a>(features: impl Iterator<Item = &'a Features> + Clone) -> std::result::Result<Self, Error> {
        let make = || -> Result<Self> {
            let Some(first) = features.clone().next() else { candle_core::bail!("a batch of no images") };
            let images = features.clone().count();
            let inputs = first.inputs.iter().enumerate().map(|(i, x)| {
                let (tokens, hidden) = x.dim();
                let values: Vec<f32> = features.clone().flat_map(|f| f.inputs[i].iter().copied()).collect();
                Tensor::from_vec(values, (images, tokens, hidden), &Device::Cpu)
            });
            let inputs = inputs.collect::<Result<_>>()?;
            let last: Vec<f32> = features.clone().flat_map(|f| f.last.iter().copied()).collect();
            Ok(Given { inputs, last: Tensor::from_vec(last, (images, first.last.len()), &Device::Cpu)? })
        };
        make().map_err(defect)
    }
}

fn constant<D: ndarray::Dimension>(a: &Array<f32, D>) -> Result<Tensor> {
    Tensor::from_vec(a.iter().copied().collect::<Vec<_>>(), a.shape(), &Device::Cpu)
}

/// Makes variables of arrays.
#[derive(Default)]
pub(super) struct Maker(pub(super) Vec<Parameter>);

impl Maker {
    fn variable(&mut self, name: String, values: Vec<f32>, shape: &[usize]) -> Result<Tensor> {
        let var = Var::from_vec(values, shape, &Device::Cpu)?;
        let tensor = var.as_tensor().clone();
        self.0.push(Parameter { name, var });
        Ok(tensor)
    }

    fn matrix(&mut self, name: &str, m: &Array2<f32>) -> Result<Tensor> {
        self.variable(format!("{name}.weight"), m.iter().copied().collect(), m.shape())
    }

    fn vector(&mut self, name: String, v: &Array1<f32>) -> Result<Tensor> {
        self.variable(name, v.to_vec(), v.shape())
    }

    pub(super) fn map(&mut self, name: &str, a: &Affine) -> Result<Map> {
        let weight = self.matrix(name, &a.weight)?;
        Ok(Map { weight, bias: Some(self.vector(format!("{name}.bias"), &a.bias)?) })
    }

    fn norm(&mut self, name: &str, n: &LayerNorm) -> Result<Norm> {
        let gain = self.vector(format!("{name}.weight"), &n.weight)?;
        Ok(Norm { gain, shift: self.vector(format!("{name}.bias"), &n.bias)? })
    }

    fn block(&mut self, name: &str, b: &Block) -> Result<TwinBlock> {
        Ok(TwinBlock {
            ln_1: self.norm(&format!("{name}.ln_1"), &b.ln_1)?,
            qkv: Map { weight: self.matrix(&format!("{name}.qkv"), &b.qkv)?, bias: None },
            reset: self.map(&format!("{name}.attn_reset"), &b.attn_reset)?,
            proj: self.map(&format!("{name}.proj"), &b.proj)?,
            ln_2: self.norm(&format!("{name}.ln_2"), &b.ln_2)?,
            mlp_0: self.map(&format!("{name}.mlp.0"), &b.mlp_0)?,
            mlp_3: self.map(&format!("{name}.mlp.3"), &b.mlp_3)?,
        })
    }

    fn layer(&mut self, i: usize, l: &AdapterLayer) -> Result<TwinLayer> {
        let lora_a = self.map(&format!("layer{i}.lora_A"), &l.lora_a)?;
        let blocks = l.blocks.iter().enumerate().map(|(j, b)| self.block(&format!("layer{i}.blk{j}"), b));
        let blocks = blocks.collect::<Result<_>>()?;
        Ok(TwinLayer { lora_a, blocks, lora_b: self.map(&format!("layer{i}.lora_B"), &l.lora_b)? })
    }
}

impl Twin {
    /// All weights are trained, from these on.
    pub(super) fn new(config: &AdapterConfig, w: &AdapterWeights) -> std::result::Result<Self, Error> {
        w.check_shapes(config)?;
        let make = || -> Result<Self> {
            let mut maker = Maker::default();
            let layers = config.layers.iter().zip(&w.layers).map(|(i, l)| maker.layer(*i, l)).collect::<Result<_>>()?;
            let (ln, head) = (maker.norm("ln", &w.ln)?, maker.map("head", &w.head)?);
            Ok(Twin { config: config.clone(), layers, ln, head, parameters: maker.0 })
        };
        make().map_err(defect)
    }

    pub(super) fn parameters(&self) -> &[Parameter] {
        &self.parameters
    }

    /// `[images, classes]`.
    pub(super) fn logits(&self, given: &Given) -> std::result::Result<Tensor, Error> {
        self.forward(given).map_err(defect)
    }

    pub(super) fn forward(&self, given: &Given) -> Result<Tensor> {
        let mut a: Option<Tensor> = None;
        for (n, (layer, x)) in self.layers.iter().zip(&given.inputs).enumerate() {
            let u = match a {
                Some(a) => (x + a)?,
                None => x.clone(),
            };
            let cls_only = n + 1 == self.layers.len();
            let y = self.added(layer, &u, cls_only)?;
            let rows = y.dim(1)?;
            a = Some((y + u.narrow(1, 0, rows)?)?);
        }
        let h = match a {
            Some(a) => (a.narrow(1, 0, 1)?.squeeze(1)? + &given.last)?,
            None => given.last.clone(),
        };
        self.classify(&h)
    }

    /// Final norm and head, of `[images, hidden]`.
    pub(super) fn classify(&self, h: &Tensor) -> Result<Tensor> {
        self.head.apply(&self.ln.apply(h, self.config.eps)?)
    }

    /// What adapter `n` makes of `[images, tokens, hidden]`.
    pub(super) fn adapter(&self, n: usize, u: &Tensor) -> Result<Tensor> {
        self.added(&self.layers[n], u, false)
    }

    fn added(&self, layer: &TwinLayer, u: &Tensor, cls_only: bool) -> Result<Tensor> {
        let mut h = layer.lora_a.apply(u)?;
        for (j, block) in layer.blocks.iter().enumerate() {
            h = self.block(block, &h, cls_only && j + 1 == layer.blocks.len())?;
        }
        layer.lora_b.apply(&h)?.affine(f64::from(self.config.scale), 0.0)
    }

    /// On `[images, tokens, rank]`; with `cls_only` of the first row of each image alone.
    fn block(&self, b: &TwinBlock, h: &Tensor, cls_only: bool) -> Result<Tensor> {
        let (images, tokens, rank) = h.dims3()?;
        let (heads, dim) = (self.config.heads, self.config.head_dim());
        let rows = if cls_only { 1 } else { tokens };
        let qkv = b.qkv.apply(&b.ln_1.apply(h, self.config.eps)?)?;
        // `[images, heads, rows, dim]`.
        let part = |n: usize, rows: usize| {
            let part = qkv.narrow(2, n * rank, rank)?.narrow(1, 0, rows)?.contiguous()?;
            part.reshape((images, rows, heads, dim))?.transpose(1, 2)?.contiguous()
        };
        let (q, k, v) = (part(0, rows)?, part(1, tokens)?, part(2, tokens)?);
        let scores = q.matmul(&k.transpose(2, 3)?.contiguous()?)?.affine(f64::from(self.config.score_scale()), 0.0)?;
        let context = b.reset.apply(&scores)?.matmul(&v)?;
        let context = context.transpose(1, 2)?.contiguous()?.reshape((images, rows, rank))?;
        let mid = (b.proj.apply(&context)? + h.narrow(1, 0, rows)?)?;
        let hidden = b.mlp_0.apply(&b.ln_2.apply(&mid, self.config.eps)?)?.relu()?;
        b.mlp_3.apply(&hidden)? + mid
    }

    /// The weights as they are now.
    pub(super) fn weights(&self) -> std::result::Result<AdapterWeights, Error> {
        let block = |b: &TwinBlock| {
            Ok(Block {
                ln_1: b.ln_1.read()?,
                qkv: b.qkv.read()?.weight,
                attn_reset: b.reset.read()?,
                proj: b.proj.read()?,
                ln_2: b.ln_2.read()?,
                mlp_0: b.mlp_0.read()?,
                mlp_3: b.mlp_3.read()?,
            })
        };
        let layer = |l: &TwinLayer| {
            let blocks = l.blocks.iter().map(block).collect::<Result<_>>()?;
            Ok(AdapterLayer { lora_a: l.lora_a.read()?, blocks, lora_b: l.lora_b.read()? })
        };
        let make = || -> Result<AdapterWeights> {
            let layers = self.layers.iter().map(layer).collect::<Result<_>>()?;
            Ok(AdapterWeights { layers, ln: self.ln.read()?, head: self.head.read()? })
        };
        make().map_err(defect)
    }
}

fn matrix(t: &Tensor) -> Result<Array2<f32>> {
    let values = t.flatten_all()?.to_vec1()?;
    Array2::from_shape_vec(t.dims2()?, values).map_err(candle_core::Error::wrap)
}

fn vector(t: &Tensor) -> Result<Array1<f32>> {
    t.to_vec1().map(Array1::from_vec)
}
