//! The public fixed-point plan of an adapter: ring widths, windows and guards, from proven bounds and calibrated ranges.
//!
//! What follows from the weights is proven: a norm's output has the length `sqrt(rank)`, the Client gives no longer rows than
//! the plan says, and so queries, keys, values, scores and the MLP are bounded. Sums of squares and contexts are guarded, at
//! a multiple of what calibration saw.

use std::collections::BTreeMap;

use ndarray::{Array1, Array2};
use serde::{Deserialize, Serialize};

use super::float::{Features, Watch, logits};
use super::maps::{Matrix, Sink, Slot, Source, matrices};
use super::{AdapterConfig, AdapterWeights};
use crate::error::{Error, Result};
use crate::model::calibrate::spectral_bound;
use crate::plan::{F, NormPlan};
use crate::protocol::guard::AT_ONCE;

/// Fraction bits of most private matrices.
pub const F_WEIGHT: u32 = 12;
/// Of those of queries and keys, which the scores' scale makes small.
pub const F_WEIGHT_QK: u32 = 14;
/// Row bits of the window of a ReLU of one row.
pub const RELU_WINDOW: u32 = 12;
/// Fraction bits of a ReLU's values.
pub const F_RELU: u32 = 14;
/// How far beyond what calibration saw a row of the Client's may be, a sum of squares, and an element of a context.
const ROW_MARGIN: f64 = 2.0;
const SUM_MARGIN: f64 = 8.0;
const CONTEXT_MARGIN: f64 = 2.0;
/// Row bits of the only window of a norm: a factor of `2^(w - 5)` between the smallest sum of squares and the largest.
const WINDOW: std::ops::RangeInclusive<u32> = 12..=14;

/// One block of an adapter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BlockPlan {
    /// Before attention.
    pub ln_1: NormPlan,
    /// Fraction bits of queries and keys.
    pub f_qk: u32,
    /// Ring of the scores' product.
    pub score_k: u32,
    /// Bits that a context may have, guarded.
    pub context_bits: u32,
    /// Before the MLP.
    pub ln_2: NormPlan,
    /// Ring of what the ReLU reads, proven.
    pub relu_k: u32,
}

/// All of an adapter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// The adapter's shape.
    pub config: AdapterConfig,
    /// Ring of the Client's input, `F` fraction bits.
    pub input_k: u32,
    /// The longest row that the Client may give, per adapter.
    pub row: Vec<f64>,
    /// The longest centred last row.
    pub last: f64,
    /// Per adapter and block.
    pub blocks: Vec<Vec<BlockPlan>>,
    /// The last norm.
    pub norm: NormPlan,
    /// Bits of its sum of squares that are proven.
    pub norm_proven: u32,
    /// Ring and fraction bits of the logits when the largest is looked for.
    pub logit_k: u32,
    /// See `logit_k`.
    pub f_logit: u32,
}

impl Plan {
    /// Whether only the classification row of what block `b` of adapter `i` puts out is needed.
    #[must_use]
    pub fn one_row(&self, i: usize, b: usize) -> bool {
        last_block(&self.config, i, b)
    }

    /// Rows of queries there.
    #[must_use]
    pub fn rows(&self, i: usize, b: usize) -> usize {
        if self.one_row(i, b) { 1 } else { self.config.tokens }
    }

    /// Elements that the Client gives: rows for each adapter, then the centred last row.
    #[must_use]
    pub fn inputs(&self) -> usize {
        self.config.layers.len() * self.config.tokens * self.config.hidden + self.config.hidden
    }
}

/// What the Client gives, from what the backbone computed: for each adapter the sum of its and the earlier layers' inputs, and
/// the centred sum of all of them and the last hidden state at the classification row.
#[must_use]
pub fn given(f: &Features) -> (Vec<Array2<f32>>, Array1<f32>) {
    let mut sums: Vec<Array2<f32>> = Vec::new();
    for x in &f.inputs {
        sums.push(match sums.last() {
            None => x.clone(),
            Some(sum) => sum + x,
        });
    }
    let last = match sums.last() {
        None => f.last.clone(),
        Some(sum) => &sum.row(0) + &f.last,
    };
    let mean = last.mean().unwrap_or(0.0);
    (sums, last - mean)
}

/// The length of a row.
#[must_use]
pub fn length<'a>(row: impl IntoIterator<Item = &'a f32>) -> f64 {
    row.into_iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt()
}

/// Least and largest of what was seen, by name.
#[derive(Default)]
struct Seen(BTreeMap<String, (f64, f64)>);

impl Watch for Seen {
    fn see(&mut self, at: &str, values: &[f32]) {
        let e = self.0.entry(at.to_owned()).or_insert((f64::INFINITY, 0.0));
        for v in values {
            let v = f64::from(v.abs());
            *e = (e.0.min(v), e.1.max(v));
        }
    }
}

impl Seen {
    fn at(&self, name: &str) -> Result<(f64, f64)> {
        self.0.get(name).copied().ok_or_else(|| Error::Internal(format!("calibration saw no {name}")))
    }
}

/// Bits of a signed ring for `|x| <= bound`; of what is no number, more than there are.
fn ring_for(bound: f64, f: u32) -> u32 {
    if !bound.is_finite() {
        return u32::from(u16::MAX);
    }
    (bound * 1.001 + 1e-3).max(1e-300).log2().ceil().clamp(0.0, 1e4) as u32 + f + 1
}

/// As it is multiplied.
fn rounded((slot, m, bias): Matrix) -> Result<Matrix> {
    let scale = f64::from(slot.fraction()).exp2();
    let m = m.mapv(|v| ((f64::from(v) * scale).round() / scale) as f32);
    if m.iter().chain(bias.iter().flatten()).all(|v| v.is_finite()) {
        return Ok((slot, m, bias));
    }
    Err(Error::Model(format!("{slot:?}: weights multiplied out are beyond a float's range; is `scale` far too large?")))
}

/// Behind the last block only the classification row is needed.
fn last_block(c: &AdapterConfig, i: usize, b: usize) -> bool {
    i + 1 == c.layers.len() && b + 1 == c.blocks
}

fn row_bound(m: &Array2<f32>) -> f64 {
    m.rows().into_iter().map(length).fold(0.0, f64::max)
}

fn largest(v: Option<&Array1<f32>>) -> f64 {
    v.map_or(0.0, |v| v.iter().fold(0.0, |m, &v| f64::from(v.abs()).max(m)))
}

/// Bounds from the weights.
struct Bounds<'a> {
    config: &'a AdapterConfig,
    matrices: &'a [Matrix],
    /// Lengths of the rows of sources.
    sources: Vec<(Source, f64)>,
}

impl Bounds<'_> {
    fn matrix(&self, slot: Slot) -> Result<(&Array2<f32>, Option<&Array1<f32>>)> {
        let found = self.matrices.iter().find(|(s, ..)| *s == slot);
        found.map(|(_, m, b)| (m, b.as_ref())).ok_or_else(|| Error::Internal(format!("no matrix {slot:?}")))
    }

    /// Largest element, and length, of what `sink` reads; `given` is the length of what it reads beside.
    fn sink(&self, sink: Sink, given: f64) -> Result<(f64, f64)> {
        let (mut element, mut all) = (given, given);
        // What a truncation may add, and the bias's rounding.
        let ulp = 2.0 * (-f64::from(F)).exp2();
        for source in sink.sources(self.config) {
            let (m, bias) = self.matrix(Slot::Map(sink, source))?;
            let length = self.sources.iter().find(|(s, _)| *s == source).map_or(0.0, |(_, l)| *l);
            element += row_bound(m) * length + largest(bias) + ulp;
            all += spectral_bound(m.view()) * length + bias.map_or(0.0, self::length) + ulp * (m.nrows() as f64).sqrt();
        }
        Ok((element, all))
    }
}

/// A norm over `n` elements with `|c| <= element` proven, whose sums of squares were seen in `sum`.
fn norm(place: &str, n: usize, element: f64, sum: (f64, f64)) -> Result<NormPlan> {
    // What a context's map leaves of its ring.
    const WIDEST: u32 = 28;
    let unit = f64::from(2 * F).exp2();
    let refuse = |text: String| Err(Error::Model(format!("{place}: {text}")));
    let k = (ring_for(element, F) + 1).max(16);
    let widest = WIDEST.min(62u32.saturating_sub((n as f64).log2().ceil() as u32) / 2 + 2);
    if k > widest {
        return refuse(format!(
            "an element may reach {element:.0}, beyond the {:.0} that a 64-bit ring can carry here: a weight far outside the usual, or too many adapters of this rank; fewer layers, a smaller rank or scale keep it within",
            f64::from(widest - 2 - F).exp2()
        ));
    }
    let bits = ((sum.1 * SUM_MARGIN * unit).max(1.0).log2().ceil() as u32).clamp(24, 60);
    let low = (sum.0 / SUM_MARGIN * unit).max(1.0);
    let window = (f64::from(bits) - low.log2() + 5.05).max(0.0).ceil() as u32;
    let (windows, window) = match window {
        w if w <= *WINDOW.end() => (1, w.max(*WINDOW.start())),
        w => (2, (w.div_ceil(2) + 3).clamp(12, 16)),
    };
    // 15 bits of 1/rms at the largest sum: the slope of a line is multiplied by up to 2^7, and its rounding with it.
    let rms = (f64::from(bits).exp2() / unit / n as f64).sqrt();
    let f_gain = (rms.log2().ceil().max(0.0) as u32 + 15).max(16);
    if f_gain > 26 {
        return refuse(format!("rows are {rms:.0} long on average, too much for a norm's 26 fraction bits"));
    }
    Ok(NormPlan { k, bits, window, windows, f_gain, coarse: None, alone: None, joint: 0 })
}

/// Calibrates on what the backbone computed for some inputs, and plans.
///
/// # Errors
/// [`Error::Model`] naming the layer and the quantity that no ring can carry.
pub fn plan(config: &AdapterConfig, w: &AdapterWeights, samples: &[Features]) -> Result<Plan> {
    if samples.is_empty() {
        return Err(Error::Config("an adapter is calibrated on at least one input".into()));
    }
    config.check("the adapter's configuration")?;
    w.check_shapes(config)?;
    samples.iter().try_for_each(|f| f.check(config))?;
    let (mut seen, mut row, mut last) = (Seen::default(), vec![0f64; config.layers.len()], 0f64);
    for f in samples {
        let _ = logits(config, w, f, &mut seen);
        let (sums, centred) = given(f);
        for (row, sum) in row.iter_mut().zip(&sums) {
            *row = sum.rows().into_iter().map(length).fold(*row, f64::max);
        }
        last = last.max(length(&centred));
    }
    row.iter_mut().for_each(|r| *r *= ROW_MARGIN);
    last *= ROW_MARGIN;
    if !row.iter().chain([&last]).all(|r| r.is_finite()) {
        return Err(Error::Config("an input for calibration has values that are no numbers".into()));
    }
    let all = matrices(config, w)?.into_iter().map(rounded).collect::<Result<Vec<_>>>()?;
    // Elements are rounded to F bits.
    let encoded = (config.hidden as f64).sqrt() * (-f64::from(F)).exp2();
    let inputs = row.iter().enumerate().map(|(i, &r)| (Source::Input(i), r + encoded)).collect();
    let mut bounds = Bounds { config, matrices: &all, sources: inputs };
    let rank = config.rank;
    let root = (rank as f64).sqrt() * 1.01;
    let mut blocks = Vec::new();
    for (i, layer) in config.layers.iter().enumerate() {
        let mut of_layer = Vec::new();
        for b in 0..config.blocks {
            let name = |what: &str| format!("layer{layer}.blk{b}.{what}");
            let place = format!("adapter of layer {layer}, block {b}");
            let sums = |(low, high): (f64, f64)| (low * rank as f64, high * rank as f64);
            let (element, _) = bounds.sink(Sink::Attention(i, b), 0.0)?;
            let ln_1 = norm(&place, rank, element, sums(seen.at(&name("ln_1.var"))?))?;
            // Queries, keys and values of each head.
            let (q, q_bias) = bounds.matrix(Slot::Query(i, b))?;
            let (k, k_bias) = bounds.matrix(Slot::Key(i, b))?;
            let (v, v_bias) = bounds.matrix(Slot::Value(i, b))?;
            let dim = rank / config.heads;
            let of = |m: &Array2<f32>, bias: Option<&Array1<f32>>, from: usize| {
                let rows = ndarray::s![from..from + dim, ..];
                let part = bias.map_or(0.0, |v| length(v.slice(ndarray::s![from..from + dim])));
                spectral_bound(m.slice(rows)) * root + part
            };
            let score = (0..config.heads)
                .map(|h| (of(q, q_bias, h * dim), of(k, k_bias, h * dim)))
                // With what the truncation to 7 bits or more adds to either.
                .map(|(q, k)| q * k + (q + k) * (dim as f64).sqrt() / 128.0 + dim as f64 / 16384.0)
                .fold(0.0, f64::max);
            let value = row_bound(v) * root + largest(v_bias);
            let output = (row_bound(q) * root + largest(q_bias)).max(row_bound(k) * root + largest(k_bias)).max(value);
            let carried = F + ln_1.f_gain + F_WEIGHT_QK;
            let fits = |what: &str, reaches: f64, f: u32, k: u32| {
                if ring_for(reaches, f) < k {
                    return Ok(());
                }
                let most = f64::from(k.saturating_sub(f + 2)).exp2();
                let text = format!(
                    "{place}: {what} may reach {reaches:.0}, beyond the {most:.0} that a ring can carry here; an adapter's weight is far outside the usual"
                );
                Err(Error::Model(text))
            };
            fits("a query, key or value", output, carried, 64)?;
            // The scores' product, of twice the fraction bits, in the ring that truncation leaves; one bit for the lift behind it.
            let room = 64i64 - i64::from(carried) - i64::from(ring_for(score, 0)) - 1;
            let f_qk = room.clamp(0, 12) as u32;
            if f_qk < 7 {
                fits("a score", score, 14, 64 - carried + 7)?;
            }
            let score_k = 64 - (carried - f_qk);
            let (reset, reset_bias) = bounds.matrix(Slot::Reset(i, b))?;
            let absolute = reset.rows().into_iter().map(|r| r.iter().map(|v| f64::from(v.abs())).sum::<f64>());
            let weight = absolute.fold(0.0, f64::max) * score + largest(reset_bias);
            // Contexts are proven to fit the ring of their product, and guarded for what the matrices behind can carry.
            let context = weight * value * config.tokens as f64;
            fits("a context", context, 2 * F, 64 - F_WEIGHT)?;
            let context_bits = ring_for(seen.at(&name("context"))?.1 * CONTEXT_MARGIN, 2 * F).max(2 * F + 2);
            let guarded = f64::from(context_bits - 1 - 2 * F).exp2();
            bounds.sources.push((Source::Context(i, b), guarded * (rank as f64).sqrt()));
            let (element, _) = bounds.sink(Sink::Mlp(i, b), 0.0)?;
            let ln_2 = norm(&place, rank, element, sums(seen.at(&name("ln_2.var"))?))?;
            let (mlp, bias) = bounds.matrix(Slot::Mlp(i, b))?;
            let hidden = row_bound(mlp) * root + largest(bias);
            fits("the MLP", hidden, F + ln_2.f_gain + F_WEIGHT, 64)?;
            // The lowest row of a window belongs to the carry; an exact ReLU takes rings of multiples of 4 bits.
            let relu_k = ring_for(hidden * 1.01 + 0.1, F).max(16);
            let relu_k = if last_block(config, i, b) { relu_k } else { relu_k.next_multiple_of(4) };
            if relu_k > 24 {
                fits("the MLP", hidden, F, 24)?;
            }
            let length = spectral_bound(mlp.view()) * root + bias.map_or(0.0, length);
            // A line over the kink errs by an eighth of its row, which the carry makes twice as wide.
            let kink = (f64::from(relu_k) - f64::from(RELU_WINDOW + F) - 2.0).exp2() + (-f64::from(F)).exp2();
            bounds.sources.push((Source::Hidden(i, b), length + (rank as f64).sqrt() * (kink + 0.01)));
            of_layer.push(BlockPlan { ln_1, f_qk, score_k, context_bits, ln_2, relu_k });
        }
        blocks.push(of_layer);
    }
    let n = config.hidden;
    let (element, all) = bounds.sink(Sink::Head, last)?;
    let (low, high) = seen.at("ln.var")?;
    let norm_proven =
        ((all * all * f64::from(2 * F).exp2()).max(1.0).log2().ceil().min(100.0) as u32 + 1).clamp(24, 63);
    // Its flag takes one look-up, of 2^16 rows at most: where the proven sum is far above the calibrated one, the window follows it.
    let most = (f64::from(norm_proven.saturating_sub(AT_ONCE - 4)) - f64::from(2 * F)).exp2() / SUM_MARGIN;
    let norm = norm("the last norm", n, element, (low * n as f64, (high * n as f64).max(most)))?;
    let norm_proven = norm_proven.max(norm.bits);
    let (head, bias) = bounds.matrix(Slot::Head)?;
    let logit = row_bound(head) * (n as f64).sqrt() * 1.01 + largest(bias) + 2.0 * (-f64::from(F)).exp2();
    if ring_for(logit, F + norm.f_gain + F_WEIGHT) > 63 {
        return Err(Error::Model(format!("the head: a logit may reach {logit:.0}, beyond what a ring can carry here")));
    }
    // The tournament's ring takes at most 23 bits.
    let whole = ring_for(logit, 0) + 1;
    let f_logit = F.min(23u32.saturating_sub(whole));
    if f_logit < 4 {
        return Err(Error::Model(format!("the head: a logit may reach {logit:.0}, too much to be compared")));
    }
    let widest = blocks.iter().flatten().flat_map(|b: &BlockPlan| [b.ln_1.k, b.ln_2.k]).chain([norm.k]).max();
    let input_k = widest.unwrap_or(16) + F_WEIGHT;
    let logit_k = whole + f_logit;
    Ok(Plan { config: config.clone(), input_k, row, last, blocks, norm, norm_proven, logit_k, f_logit })
}
