//! The residual streams of an adapter, unrolled.
//!
//! Between two nonlinear operations everything is linear, so no residual sum is ever computed: what a norm reads is a sum of
//! private matrices applied to what the nonlinear operations before it put out (*sources*), multiplied out by the provider.
//! `x_2 + a_1` of the second adapter is `(x_1 + x_2) + scale (B_1 u_1 + b)`, of which the first part is the Client's own; the
//! centring of LayerNorm, `C = I - 1 1^T / n`, is multiplied in too, and the gain of a norm into the matrix behind it. So
//! values of the backbone's width exist once, before the last norm, and nothing is truncated twice.

use ndarray::{Array1, Array2, s};

use super::plan::{F_WEIGHT, F_WEIGHT_QK};
use super::{AdapterConfig, AdapterWeights, LayerNorm};
use crate::error::{Error, Result};

/// What a nonlinear operation puts out, or the Client gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// Sum of the backbone's hidden states before the layers up to adapter `i`, rows of `hidden`.
    Input(usize),
    /// Heads of attention, rows of `rank`.
    Context(usize, usize),
    /// MLP behind its ReLU, rows of `rank`.
    Hidden(usize, usize),
}

/// What reads a residual stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Sink {
    /// The norm before attention, of block `.1` in adapter `.0`.
    Attention(usize, usize),
    /// The norm before the MLP.
    Mlp(usize, usize),
    /// The last norm, of the classification row alone; reads what the Client gives of it as well.
    Head,
}

/// One private matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Slot {
    /// From a source to a sink.
    Map(Sink, Source),
    /// Queries, by the root of the scores' scale.
    Query(usize, usize),
    /// Keys, by that root.
    Key(usize, usize),
    /// Values.
    Value(usize, usize),
    /// The linear map over keys in a softmax's place.
    Reset(usize, usize),
    /// The MLP's first matrix.
    Mlp(usize, usize),
    /// Classes.
    Head,
}

impl Sink {
    /// What it reads, in the order in which it comes to be.
    #[must_use]
    pub fn sources(self, c: &AdapterConfig) -> Vec<Source> {
        let (adapters, blocks, more) = match self {
            Sink::Attention(i, b) => (i + 1, b, false),
            Sink::Mlp(i, b) => (i + 1, b, true),
            Sink::Head => (c.layers.len(), c.blocks, false),
        };
        let mut all = Vec::new();
        for i in 0..adapters {
            all.push(Source::Input(i));
            let blocks = if i + 1 == adapters { blocks } else { c.blocks };
            all.extend((0..blocks).flat_map(|b| [Source::Context(i, b), Source::Hidden(i, b)]));
            if i + 1 == adapters && more {
                all.push(Source::Context(i, blocks));
            }
        }
        all
    }
}

/// All matrices, in the order in which they are used.
#[must_use]
pub fn slots(c: &AdapterConfig) -> Vec<Slot> {
    let maps = |sink: Sink| sink.sources(c).into_iter().map(move |source| Slot::Map(sink, source));
    let mut all = Vec::new();
    for i in 0..c.layers.len() {
        for b in 0..c.blocks {
            all.extend(maps(Sink::Attention(i, b)));
            all.extend([Slot::Query(i, b), Slot::Key(i, b), Slot::Value(i, b), Slot::Reset(i, b)]);
            all.extend(maps(Sink::Mlp(i, b)));
            all.push(Slot::Mlp(i, b));
        }
    }
    all.extend(maps(Sink::Head));
    all.push(Slot::Head);
    all
}

impl Slot {
    /// Fraction bits.
    #[must_use]
    pub fn fraction(self) -> u32 {
        if matches!(self, Slot::Query(..) | Slot::Key(..)) { F_WEIGHT_QK } else { F_WEIGHT }
    }

    /// Outputs and inputs.
    #[must_use]
    pub fn dim(self, c: &AdapterConfig) -> (usize, usize) {
        let r = c.rank;
        let inputs = |source| if let Source::Input(_) = source { c.hidden } else { r };
        match self {
            Slot::Map(Sink::Head, source) => (c.hidden, inputs(source)),
            Slot::Map(_, source) => (r, inputs(source)),
            Slot::Query(..) | Slot::Key(..) | Slot::Value(..) | Slot::Mlp(..) => (r, r),
            Slot::Reset(..) => (c.tokens, c.tokens),
            Slot::Head => (c.classes, c.hidden),
        }
    }
}

/// A sum of matrices over sources, and a constant.
struct Stream {
    terms: Vec<(Source, Array2<f32>)>,
    bias: Array1<f32>,
}

impl Stream {
    fn under(&self, m: &Array2<f32>) -> Stream {
        Stream { terms: self.terms.iter().map(|(s, w)| (*s, m.dot(w))).collect(), bias: m.dot(&self.bias) }
    }

    fn and(mut self, o: Stream) -> Stream {
        self.terms.extend(o.terms);
        self.bias += &o.bias;
        self
    }
}

/// Every column less its mean.
fn centred(mut m: Array2<f32>) -> Array2<f32> {
    for mut column in m.columns_mut() {
        let mean = column.mean().unwrap_or(0.0);
        column -= mean;
    }
    m
}

fn centred_vector(v: &Array1<f32>) -> Array1<f32> {
    v - v.mean().unwrap_or(0.0)
}

/// A private matrix in float, and its bias.
pub type Matrix = (Slot, Array2<f32>, Option<Array1<f32>>);

/// The matrix of each slot, and its bias: of a sink's maps the first has the whole stream's.
///
/// # Errors
/// [`Error::Internal`] for weights that are not of this configuration.
pub fn matrices(c: &AdapterConfig, w: &AdapterWeights) -> Result<Vec<Matrix>> {
    let folded = |m: &Array2<f32>, bias: &Array1<f32>, norm: &LayerNorm| (m * &norm.weight, m.dot(&norm.bias) + bias);
    let mut streams = Vec::new();
    let mut out: Vec<Matrix> = Vec::new();
    let mut sink = |sink: Sink, stream: Stream| {
        let bias = centred_vector(&stream.bias);
        for (i, (source, m)) in stream.terms.into_iter().enumerate() {
            out.push((Slot::Map(sink, source), centred(m), (i == 0).then(|| bias.clone())));
        }
    };
    let mut inner = Vec::new();
    for (i, l) in w.layers.iter().enumerate() {
        let own = Stream { terms: vec![(Source::Input(i), l.lora_a.weight.clone())], bias: l.lora_a.bias.clone() };
        // Below the adapters before it, whose outputs it reads through its own first matrix; in the order of their making.
        let mut stream: Option<Stream> = None;
        for (before, b) in streams.iter().zip(&w.layers) {
            let before: &Stream = before;
            let through = l.lora_a.weight.dot(&b.lora_b.weight) * c.scale;
            let mut part = before.under(&through);
            part.bias += &(l.lora_a.weight.dot(&b.lora_b.bias) * c.scale);
            stream = Some(match stream {
                None => part,
                Some(sum) => sum.and(part),
            });
        }
        let mut stream = match stream {
            None => own,
            Some(sum) => sum.and(own),
        };
        for (b, block) in l.blocks.iter().enumerate() {
            sink(Sink::Attention(i, b), stream.under(&Array2::eye(c.rank)));
            let r = c.rank;
            // The root of the scores' scale in both, so that neither loses digits.
            let scale = c.score_scale().sqrt();
            let none = Array1::zeros(3 * r);
            let (qkv, bias) = folded(&block.qkv, &none, &block.ln_1);
            let of = |n: usize, by: f32| {
                let (m, v) = (qkv.slice(s![n * r..(n + 1) * r, ..]), bias.slice(s![n * r..(n + 1) * r]));
                (m.to_owned() * by, Some(v.to_owned() * by))
            };
            for (slot, (m, bias)) in
                [(Slot::Query(i, b), of(0, scale)), (Slot::Key(i, b), of(1, scale)), (Slot::Value(i, b), of(2, 1.0))]
            {
                inner.push((slot, m, bias));
            }
            let reset = (block.attn_reset.weight.clone(), block.attn_reset.bias.clone());
            inner.push((Slot::Reset(i, b), reset.0, Some(reset.1)));
            stream.terms.push((Source::Context(i, b), block.proj.weight.clone()));
            stream.bias += &block.proj.bias;
            sink(Sink::Mlp(i, b), stream.under(&Array2::eye(r)));
            let (mlp, bias) = folded(&block.mlp_0.weight, &block.mlp_0.bias, &block.ln_2);
            inner.push((Slot::Mlp(i, b), mlp, Some(bias)));
            stream.terms.push((Source::Hidden(i, b), block.mlp_3.weight.clone()));
            stream.bias += &block.mlp_3.bias;
        }
        streams.push(stream);
    }
    let mut last: Option<Stream> = None;
    for (stream, l) in streams.iter().zip(&w.layers) {
        let mut part = stream.under(&(&l.lora_b.weight * c.scale));
        part.bias += &(&l.lora_b.bias * c.scale);
        last = Some(match last {
            None => part,
            Some(sum) => sum.and(part),
        });
    }
    let last = last.ok_or_else(|| Error::Internal("an adapter of no layers".into()))?;
    sink(Sink::Head, last);
    let (head, bias) = folded(&w.head.weight, &w.head.bias, &w.ln);
    inner.push((Slot::Head, head, Some(bias)));
    out.extend(inner);
    // Several adapters reach a sink from one source along several ways: these are added up.
    slots(c)
        .into_iter()
        .map(|slot| {
            let mut sum: Option<(Array2<f32>, Option<Array1<f32>>)> = None;
            for (_, m, bias) in out.iter().filter(|(s, ..)| *s == slot) {
                sum = Some(match sum {
                    None => (m.clone(), bias.clone()),
                    Some((all, first)) => (all + m, first.or_else(|| bias.clone())),
                });
            }
            let (m, bias) = sum.ok_or_else(|| Error::Internal(format!("no matrix for {slot:?}")))?;
            if m.dim() != slot.dim(c) {
                return Err(Error::Internal(format!("{slot:?} of {:?}, not {:?}", m.dim(), slot.dim(c))));
            }
            Ok((slot, m, bias))
        })
        .collect()
}
