//! The model as training sees it: the float twin's arithmetic on tensors that have gradients. Which weights are trained is
//! decided when it is made; the others are plain tensors, for which no gradient is computed.

use std::sync::Arc;

use candle_core::{Device, Result, Tensor, Var};
use ndarray::{Array1, Array2};

use super::adapter::Lora;
use super::data::Batch;
use super::ops::{Attention, Gated, Linear as Product, RmsNorm, Rope};
use crate::error::Error;
use crate::model::{LayerWeights, Linear, ModelConfig, Weights, float};
use crate::plan::Module;

/// What candle reports means a defect here: shapes were checked when the model was read.
pub(crate) fn defect(e: candle_core::Error) -> Error {
    Error::Internal(format!("training: {e}"))
}

/// The low-rank addition to a linear map: `scale * b a`.
struct Delta {
    a: Tensor,
    b: Tensor,
    scale: f32,
}

struct Map {
    w: Tensor,
    bias: Option<Tensor>,
    delta: Option<Delta>,
}

impl Map {
    fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let product = |x: &Tensor, w: &Tensor| x.apply_op2(w, Product { input: x.track_op(), weight: w.track_op() });
        let mut y = product(x, &self.w)?;
        if let Some(bias) = &self.bias {
            y = y.broadcast_add(bias)?;
        }
        if let Some(d) = &self.delta {
            // `affine` keeps the order of PEFT: (x a^T) b^T, then scaled.
            y = (y + product(&product(x, &d.a)?, &d.b)?.affine(f64::from(d.scale), 0.0)?)?;
        }
        Ok(y)
    }

    fn merged(&self) -> Result<Linear> {
        let mut w = matrix(&self.w)?;
        if let Some(d) = &self.delta {
            w.scaled_add(d.scale, &matrix(&d.b)?.dot(&matrix(&d.a)?));
        }
        Ok(Linear { w, bias: self.bias.as_ref().map(vector).transpose()?, adapter: None })
    }
}

struct Layer {
    input_norm: Tensor,
    q: Map,
    k: Map,
    v: Map,
    o: Map,
    q_norm: Option<Tensor>,
    k_norm: Option<Tensor>,
    post_norm: Tensor,
    gate: Map,
    up: Map,
    down: Map,
}

/// A weight by its name in a Hugging Face checkpoint (adapters: in PEFT's).
#[derive(Clone, Debug)]
pub struct Parameter {
    /// The name.
    pub name: String,
    /// Its variable.
    pub var: Var,
}

/// A model whose weights, or some of them, are trained.
pub struct Student {
    config: ModelConfig,
    embed: Tensor,
    layers: Vec<Layer>,
    norm: Tensor,
    head: Option<Tensor>,
    parameters: Vec<Parameter>,
    frequencies: Vec<f64>,
}

impl std::fmt::Debug for Student {
    /// Without the weights, which are private.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Student").field("parameters", &self.parameters.len()).finish_non_exhaustive()
    }
}

/// What a pass leaves behind.
#[derive(Debug)]
pub struct Trace {
    /// Per layer what its attention adds to the residual stream, `[tokens, hidden]`.
    pub attention: Vec<Tensor>,
    /// Per layer the residual stream after it, `[tokens, hidden]`.
    pub hidden: Vec<Tensor>,
}

/// Makes tensors of arrays, variables of those that are trained.
struct Maker<'a> {
    trained: &'a dyn Fn(&str) -> bool,
    lora: Option<&'a Lora>,
    parameters: Vec<Parameter>,
}

impl Maker<'_> {
    fn tensor(&mut self, name: &str, values: Vec<f32>, shape: &[usize]) -> Result<Tensor> {
        let tensor = Tensor::from_vec(values, shape, &Device::Cpu)?;
        if !(self.trained)(name) {
            return Ok(tensor);
        }
        self.variable(name.to_owned(), &tensor)
    }

    fn variable(&mut self, name: String, tensor: &Tensor) -> Result<Tensor> {
        let var = Var::from_tensor(tensor)?;
        self.parameters.push(Parameter { name, var: var.clone() });
        Ok(var.into_inner())
    }

    fn matrix(&mut self, name: &str, m: &Array2<f32>) -> Result<Tensor> {
        self.tensor(name, m.iter().copied().collect(), m.shape())
    }

    fn vector(&mut self, name: &str, v: &Array1<f32>) -> Result<Tensor> {
        self.tensor(name, v.to_vec(), v.shape())
    }

    fn map(&mut self, layer: usize, target: Module, m: &Linear) -> Result<Map> {
        let name = format!("model.layers.{layer}.{}", target.path());
        let w = self.matrix(&format!("{name}.weight"), &m.w)?;
        let bias = m.bias.as_ref().map(|b| self.vector(&format!("{name}.bias"), b)).transpose()?;
        let delta = match self.lora.and_then(|lora| Some((lora, lora.get(layer, target)?))) {
            None => None,
            Some((lora, d)) => {
                let [a, b] = [("A", &d.a), ("B", &d.b)].map(|(part, m)| {
                    let tensor = Tensor::from_vec(m.iter().copied().collect(), m.shape(), &Device::Cpu)?;
                    self.variable(super::adapter::key(layer, target, part), &tensor)
                });
                Some(Delta { a: a?, b: b?, scale: lora.scale() })
            }
        };
        Ok(Map { w, bias, delta })
    }

    fn layer(&mut self, i: usize, l: &LayerWeights) -> Result<Layer> {
        let name = |part: &str| format!("model.layers.{i}.{part}.weight");
        let mut gain = |part: &str, g: &Option<Array1<f32>>| -> Result<Option<Tensor>> {
            g.as_ref().map(|g| self.vector(&name(part), g)).transpose()
        };
        let (q_norm, k_norm) = (gain("self_attn.q_norm", &l.q_norm)?, gain("self_attn.k_norm", &l.k_norm)?);
        Ok(Layer {
            input_norm: self.vector(&name("input_layernorm"), &l.input_norm)?,
            q: self.map(i, Module::QProj, &l.q)?,
            k: self.map(i, Module::KProj, &l.k)?,
            v: self.map(i, Module::VProj, &l.v)?,
            o: self.map(i, Module::OProj, &l.o)?,
            q_norm,
            k_norm,
            post_norm: self.vector(&name("post_attention_layernorm"), &l.post_norm)?,
            gate: self.map(i, Module::GateProj, &l.gate)?,
            up: self.map(i, Module::UpProj, &l.up)?,
            down: self.map(i, Module::DownProj, &l.down)?,
        })
    }
}

impl Student {
    /// Of these weights, of which those are trained whose names `trained` says yes to, and the adapters if there are any.
    ///
    /// # Errors
    /// [`Error::Internal`] only.
    pub fn new(
        weights: &Weights,
        trained: &dyn Fn(&str) -> bool,
        lora: Option<&Lora>,
    ) -> std::result::Result<Self, Error> {
        let make = || -> Result<Self> {
            let mut m = Maker { trained, lora, parameters: Vec::new() };
            let embed = m.matrix("model.embed_tokens.weight", &weights.embed)?;
            let layers = weights.layers.iter().enumerate().map(|(i, l)| m.layer(i, l)).collect::<Result<_>>()?;
            let norm = m.vector("model.norm.weight", &weights.norm)?;
            let head = weights.head.as_ref().map(|h| m.matrix("lm_head.weight", h)).transpose()?;
            let frequencies = float::rope_frequencies(&weights.config);
            let config = weights.config.clone();
            Ok(Student { config, embed, layers, norm, head, parameters: m.parameters, frequencies })
        };
        make().map_err(defect)
    }

    /// The adapters as they are now; `like` is what the model was made with.
    ///
    /// # Errors
    /// [`Error::Internal`] only.
    pub fn adapters(&self, like: &Lora) -> std::result::Result<Lora, Error> {
        let mut lora = like.clone();
        for ((layer, target), d) in &mut lora.maps {
            for (part, m) in [("A", &mut d.a), ("B", &mut d.b)] {
                let name = super::adapter::key(*layer, *target, part);
                if let Some(p) = self.parameters.iter().find(|p| p.name == name) {
                    *m = matrix(p.var.as_tensor()).map_err(defect)?;
                }
            }
        }
        Ok(lora)
    }

    /// What is trained, always in the same order.
    #[must_use]
    pub fn parameters(&self) -> &[Parameter] {
        &self.parameters
    }

    /// The weights as they are now, adapters merged.
    ///
    /// # Errors
    /// [`Error::Internal`] only.
    pub fn weights(&self) -> std::result::Result<Weights, Error> {
        let of_layer = |l: &Layer| -> Result<LayerWeights> {
            Ok(LayerWeights {
                input_norm: vector(&l.input_norm)?,
                q: l.q.merged()?,
                k: l.k.merged()?,
                v: l.v.merged()?,
                o: l.o.merged()?,
                q_norm: l.q_norm.as_ref().map(vector).transpose()?,
                k_norm: l.k_norm.as_ref().map(vector).transpose()?,
                post_norm: vector(&l.post_norm)?,
                gate: l.gate.merged()?,
                up: l.up.merged()?,
                down: l.down.merged()?,
            })
        };
        let make = || -> Result<Weights> {
            Ok(Weights {
                config: self.config.clone(),
                embed: matrix(&self.embed)?,
                layers: self.layers.iter().map(of_layer).collect::<Result<_>>()?,
                norm: vector(&self.norm)?,
                head: self.head.as_ref().map(matrix).transpose()?,
                // Directories have no encoders.
                head_bias: None,
            })
        };
        make().map_err(defect)
    }

    /// Runs a batch through the layers.
    ///
    /// # Errors
    /// [`Error::Internal`] only.
    pub fn forward(&self, batch: &Batch) -> std::result::Result<Trace, Error> {
        self.pass(batch).map_err(defect)
    }

    /// The logits after those tokens of the batch that a learned one follows, `[rows, vocab]`.
    ///
    /// # Errors
    /// [`Error::Internal`] only.
    pub fn logits(&self, trace: &Trace, batch: &Batch) -> std::result::Result<Tensor, Error> {
        let make = || -> Result<Tensor> {
            let Some(h) = trace.hidden.last() else { candle_core::bail!("a model without layers") };
            let rows = Tensor::from_slice(&batch.rows, batch.rows.len(), &Device::Cpu)?;
            let x = self.norm(&h.index_select(&rows, 0)?, &self.norm)?;
            let head = self.head.as_ref().unwrap_or(&self.embed);
            x.apply_op2(head, Product { input: x.track_op(), weight: head.track_op() })
        };
        make().map_err(defect)
    }

    fn pass(&self, batch: &Batch) -> Result<Trace> {
        let n = batch.ids.len();
        let half = self.frequencies.len();
        let mut turns = Vec::with_capacity(n * half);
        for sequence in batch.starts.windows(2) {
            for position in 0..sequence[1] - sequence[0] {
                turns.extend(self.frequencies.iter().map(|f| {
                    let (sin, cos) = (position as f64 * f).sin_cos();
                    (cos as f32, sin as f32)
                }));
            }
        }
        let rope = Rope { turns: Arc::new(turns), half, direction: 1.0 };
        let starts = Arc::new(batch.starts.clone());

        let ids = Tensor::from_slice(&batch.ids, n, &Device::Cpu)?;
        let mut h = self.embed.index_select(&ids, 0)?;
        let (mut attention, mut hidden) = (Vec::new(), Vec::new());
        for (i, l) in self.layers.iter().enumerate() {
            let shape = self.config.layer(i);
            let x = self.norm(&h, &l.input_norm)?;
            let q = self.head_norm(&l.q.apply(&x)?, l.q_norm.as_ref())?.apply_op1(rope.clone())?;
            let k = self.head_norm(&l.k.apply(&x)?, l.k_norm.as_ref())?.apply_op1(rope.clone())?;
            let v = l.v.apply(&x)?;
            let context = q.apply_op3(&k, &v, Attention { starts: starts.clone(), shape })?;
            let attended = l.o.apply(&context)?;
            h = (h + &attended)?;
            let x = self.norm(&h, &l.post_norm)?;
            let gated = l.gate.apply(&x)?.apply_op2(&l.up.apply(&x)?, Gated(shape.activation))?;
            h = (h + l.down.apply(&gated)?)?;
            attention.push(attended);
            hidden.push(h.clone());
        }
        Ok(Trace { attention, hidden })
    }

    fn norm(&self, x: &Tensor, gain: &Tensor) -> Result<Tensor> {
        x.apply_op2(gain, RmsNorm { eps: self.config.rms_norm_eps, gain: gain.track_op() })
    }

    /// The norm of every head, where the model has one.
    fn head_norm(&self, x: &Tensor, gain: Option<&Tensor>) -> Result<Tensor> {
        let Some(gain) = gain else { return Ok(x.clone()) };
        let (n, width) = x.dims2()?;
        let dim = self.config.head_dim;
        self.norm(&x.reshape((n * width / dim, dim))?, gain)?.reshape((n, width))
    }
}

fn matrix(t: &Tensor) -> Result<Array2<f32>> {
    let values = t.flatten_all()?.to_vec1()?;
    Array2::from_shape_vec(t.dims2()?, values).map_err(candle_core::Error::wrap)
}

fn vector(t: &Tensor) -> Result<Array1<f32>> {
    t.to_vec1().map(Array1::from_vec)
}
