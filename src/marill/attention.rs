//! Causal attention of a batch of sequences and its gradients, head by head.

use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis, s};
use rayon::prelude::*;

use crate::model::variant::TWO_RELU_EPS;
use crate::model::{LayerShape, Softmax};

/// What attends together: a sequence and a key/value head with its query heads.
struct Group {
    rows: std::ops::Range<usize>,
    kv: usize,
}

fn groups(starts: &[usize], shape: &LayerShape) -> Vec<Group> {
    let sequences = starts.windows(2).map(|w| w[0]..w[1]);
    sequences.flat_map(|rows| (0..shape.num_kv_heads).map(move |kv| Group { rows: rows.clone(), kv })).collect()
}

/// Rows and columns of one head, as a matrix of its own.
fn head(all: &[f32], width: usize, rows: &std::ops::Range<usize>, index: usize, dim: usize) -> Array2<f32> {
    let mut out = Array2::zeros((rows.len(), dim));
    for (mut to, from) in out.outer_iter_mut().zip(all[rows.start * width..rows.end * width].chunks(width)) {
        to.iter_mut().zip(&from[index * dim..]).for_each(|(t, f)| *t = *f);
    }
    out
}

fn put(all: &mut [f32], width: usize, rows: &std::ops::Range<usize>, index: usize, from: ArrayView2<'_, f32>) {
    let dim = from.ncols();
    let to = all[rows.start * width..rows.end * width].chunks_mut(width);
    for (to, from) in to.zip(from.outer_iter()) {
        to[index * dim..].iter_mut().zip(from).for_each(|(t, f)| *t = *f);
    }
}

/// Scores into attention weights, row by row; what a row does not see yet becomes 0. Returns what each row was divided by.
fn weigh(mut scores: ArrayViewMut2<'_, f32>, softmax: Softmax) -> Vec<f32> {
    let mut sums = Vec::with_capacity(scores.nrows());
    for (i, mut row) in scores.outer_iter_mut().enumerate() {
        let (mut seen, mut unseen) = row.view_mut().split_at(Axis(0), i + 1);
        unseen.fill(0.0);
        let floor = match softmax {
            Softmax::Exact => {
                let max = seen.fold(f32::NEG_INFINITY, |a, &b| a.max(b));
                seen.mapv_inplace(|x| super::ops::exp(x - max));
                0.0
            }
            Softmax::TwoRelu => {
                seen.mapv_inplace(|x| x.max(0.0));
                TWO_RELU_EPS as f32
            }
        };
        let sum = seen.sum() + floor;
        seen /= sum;
        sums.push(sum);
    }
    sums
}

/// The contexts `[n, heads * head_dim]` of queries `[n, heads * head_dim]` over keys and values `[n, kv_heads * head_dim]`.
pub(super) fn forward(starts: &[usize], shape: &LayerShape, [q, k, v]: [&[f32]; 3]) -> Vec<f32> {
    let (dim, per) = (shape.head_dim, shape.num_heads / shape.num_kv_heads);
    let groups = groups(starts, shape);
    let of_group = |g: &Group| -> Vec<Array2<f32>> {
        let (k, v) = (head(k, shape.kv_size(), &g.rows, g.kv, dim), head(v, shape.kv_size(), &g.rows, g.kv, dim));
        let of_head = |h: usize| {
            let q = head(q, shape.q_size(), &g.rows, h, dim) * shape.score_scale();
            let mut scores = q.dot(&k.t());
            weigh(scores.view_mut(), shape.softmax);
            scores.dot(&v)
        };
        (g.kv * per..(g.kv + 1) * per).map(of_head).collect()
    };
    let contexts: Vec<_> = groups.par_iter().map(of_group).collect();
    let mut out = vec![0f32; q.len()];
    for (g, contexts) in groups.iter().zip(&contexts) {
        for (i, context) in contexts.iter().enumerate() {
            put(&mut out, shape.q_size(), &g.rows, g.kv * per + i, context.view());
        }
    }
    out
}

/// Gradients of queries, keys and values from that of the contexts.
pub(super) fn backward(starts: &[usize], shape: &LayerShape, [q, k, v]: [&[f32]; 3], d: &[f32]) -> [Vec<f32>; 3] {
    let (dim, per, scale) = (shape.head_dim, shape.num_heads / shape.num_kv_heads, shape.score_scale());
    let (qs, kvs) = (shape.q_size(), shape.kv_size());
    let groups = groups(starts, shape);
    let of_group = |g: &Group| {
        let (k, v) = (head(k, kvs, &g.rows, g.kv, dim), head(v, kvs, &g.rows, g.kv, dim));
        let mut dk = Array2::<f32>::zeros(k.dim());
        let mut dv = Array2::<f32>::zeros(v.dim());
        let mut dqs = Vec::with_capacity(per);
        for h in g.kv * per..(g.kv + 1) * per {
            let q = head(q, qs, &g.rows, h, dim) * scale;
            let d = head(d, qs, &g.rows, h, dim);
            let scores = q.dot(&k.t());
            let mut p = scores.clone();
            let sums = weigh(p.view_mut(), shape.softmax);
            dv += &p.t().dot(&d);
            let mut ds = d.dot(&v.t());
            for (i, mut row) in ds.outer_iter_mut().enumerate() {
                let (mut seen, mut unseen) = row.view_mut().split_at(Axis(0), i + 1);
                unseen.fill(0.0);
                let p = p.slice(s![i, ..=i]);
                let mean = seen.iter().zip(p).map(|(d, p)| d * p).sum::<f32>();
                match shape.softmax {
                    Softmax::Exact => seen.iter_mut().zip(p).for_each(|(d, p)| *d = p * (*d - mean)),
                    Softmax::TwoRelu => {
                        let inverse = 1.0 / sums[i];
                        for (d, &score) in seen.iter_mut().zip(scores.slice(s![i, ..=i])) {
                            *d = if score > 0.0 { (*d - mean) * inverse } else { 0.0 };
                        }
                    }
                }
            }
            // `q` carries the scale already.
            dk += &ds.t().dot(&q);
            dqs.push(ds.dot(&k) * scale);
        }
        (dqs, dk, dv)
    };
    let grads: Vec<_> = groups.par_iter().map(of_group).collect();
    let mut out = [vec![0f32; q.len()], vec![0f32; k.len()], vec![0f32; v.len()]];
    for (g, (dqs, dk, dv)) in groups.iter().zip(&grads) {
        for (i, dq) in dqs.iter().enumerate() {
            put(&mut out[0], qs, &g.rows, g.kv * per + i, dq.view());
        }
        put(&mut out[1], kvs, &g.rows, g.kv, dk.view());
        put(&mut out[2], kvs, &g.rows, g.kv, dv.view());
    }
    out
}
