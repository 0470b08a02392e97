//! Changing the shape of a model's private layers before training: heads merged or pruned, layers pruned, another softmax, another
//! activation (MARILL, section 5.3, and the baselines that the paper compares with).
//!
//! Where heads share keys and values (grouped queries), a key/value head with its queries is what is merged or pruned: query head `i` of a
//! group is merged with query head `i` of the others.

use ndarray::{Array2, ArrayView2, ArrayView3, Axis, s};
use rayon::prelude::*;

use super::cluster;
use crate::error::{Error, Result};
use crate::model::{
    Activation, FloatCache, LayerShape, LayerWeights, Linear, ModelConfig, Observer, Softmax, Variant, Weights, float,
};

/// How heads are chosen to be merged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MergeBy {
    /// Those that attend alike.
    #[default]
    Similarity,
    /// Neighbours.
    Adjacent,
}

/// What to change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reshape {
    /// Merge as many heads into one.
    pub merge_heads: usize,
    /// Which ones.
    pub merge_by: MergeBy,
    /// Keep one of so many heads, the most important ones.
    pub prune_heads: usize,
    /// Keep one of so many private layers.
    pub prune_layers: usize,
    /// The softmax of private layers.
    pub softmax: Softmax,
    /// The activation of private layers; `None` leaves the model's own.
    pub activation: Option<Activation>,
}

impl Default for Reshape {
    fn default() -> Self {
        Reshape {
            merge_heads: 1,
            merge_by: MergeBy::default(),
            prune_heads: 1,
            prune_layers: 1,
            softmax: Softmax::default(),
            activation: None,
        }
    }
}

/// A model whose shape was changed.
#[derive(Debug)]
pub struct Reshaped {
    /// Its weights, its configuration with them.
    pub weights: Weights,
    /// Which layer of the original each layer was.
    pub origin: Vec<usize>,
    /// Per private layer the key/value heads that each new one was made of.
    pub groups: Vec<Vec<Vec<usize>>>,
}

impl Reshape {
    /// Whether everything stays as it is.
    #[must_use]
    pub fn is_none(&self) -> bool {
        *self == Reshape { merge_by: self.merge_by, ..Reshape::default() }
    }

    /// Whether it can be done to the layers of `c` from `first` on.
    ///
    /// # Errors
    /// [`Error::Config`] naming the option, and for a model that was changed already.
    pub fn check(&self, c: &ModelConfig, first: usize) -> Result<()> {
        let wrong = |text: String| Err(Error::Config(text));
        if self.is_none() {
            return Ok(());
        }
        if c.variant.is_some() {
            return wrong(
                "--base: its private layers were changed already (trefoil.json); start from the unchanged model, and make all changes at once".into(),
            );
        }
        if first == c.num_layers {
            return wrong("--private-layers 0: only private layers are changed; give at least 1".into());
        }
        for (option, m) in [
            ("--merge-heads", self.merge_heads),
            ("--prune-heads", self.prune_heads),
            ("--prune-layers", self.prune_layers),
        ] {
            if m == 0 {
                return wrong(format!("{option} 0: give 1 (nothing changes) or more"));
            }
        }
        if self.merge_heads > 1 && self.prune_heads > 1 {
            return wrong("--merge-heads and --prune-heads: give one of the two".into());
        }
        for (option, m) in [("--merge-heads", self.merge_heads), ("--prune-heads", self.prune_heads)] {
            if !c.num_heads.is_multiple_of(m) {
                return wrong(format!("{option} {m}: the model has {} heads, which {m} does not divide", c.num_heads));
            }
            if !c.num_kv_heads.is_multiple_of(m) {
                return wrong(format!(
                    "{option} {m}: the model's {} query heads share {} key/value heads, and heads go together only with their \
                     keys and values, so {m} has to divide {}",
                    c.num_heads, c.num_kv_heads, c.num_kv_heads
                ));
            }
        }
        if !(c.num_layers - first).is_multiple_of(self.prune_layers) {
            return wrong(format!(
                "--prune-layers {}: does not divide the {} private layers",
                self.prune_layers,
                c.num_layers - first
            ));
        }
        Ok(())
    }

    /// Does it to the layers from `first` on; `windows` of text show which heads are alike and which important.
    ///
    /// # Errors
    /// As [`Reshape::check`].
    pub fn apply(&self, mut weights: Weights, first: usize, windows: &[Vec<u32>]) -> Result<Reshaped> {
        self.check(&weights.config, first)?;
        let layers = weights.config.num_layers;
        if self.is_none() {
            return Ok(Reshaped { weights, origin: (0..layers).collect(), groups: Vec::new() });
        }
        // Evenly, the last layer among them: what feeds the head changes least.
        let kept = |i: &usize| *i < first || (layers - 1 - i).is_multiple_of(self.prune_layers);
        let origin: Vec<usize> = (0..layers).filter(kept).collect();
        let c = weights.config.clone();
        let kv = c.num_kv_heads;
        let m = self.merge_heads;
        let groups: Vec<Vec<Vec<usize>>> = if m > 1 && self.merge_by == MergeBy::Similarity {
            let seen = Seen::run(&weights, first, windows);
            seen.distances().iter().map(|d| cluster::equal_groups(d, m)).collect::<Result<_>>()?
        } else if self.prune_heads > 1 {
            let seen = Seen::run(&weights, first, windows);
            seen.important(&weights, first, kv / self.prune_heads)
        } else {
            let adjacent = (0..kv / m).map(|g| (g * m..(g + 1) * m).collect()).collect::<Vec<_>>();
            vec![adjacent; layers - first]
        };
        for (i, groups) in groups.iter().enumerate() {
            regroup(&mut weights.layers[first + i], &c, groups);
        }
        let mut all: Vec<Option<LayerWeights>> = weights.layers.drain(..).map(Some).collect();
        weights.layers = origin.iter().filter_map(|&i| all[i].take()).collect();
        let groups = origin.iter().filter(|i| **i >= first).map(|i| groups[i - first].clone()).collect();
        weights.config.num_layers = origin.len();
        let variant = Variant {
            from_layer: first,
            num_attention_heads: c.num_heads / m / self.prune_heads,
            num_key_value_heads: kv / m / self.prune_heads,
            head_dim: c.head_dim * m,
            softmax: self.softmax,
            activation: self.activation.unwrap_or(c.activation),
        };
        // Fewer layers of the same kind are described by config.json alone.
        weights.config.variant = (variant.shape(c.bottleneck) != c.layer(first)).then_some(variant);
        weights.config.check()?;
        Ok(Reshaped { weights, origin, groups })
    }
}

/// Puts the key/value heads of `groups`, each with its query heads, next to each other; those in no group are dropped.
fn regroup(layer: &mut LayerWeights, c: &ModelConfig, groups: &[Vec<usize>]) {
    let per = c.num_heads / c.num_kv_heads;
    let expand = |heads: Vec<usize>| -> Vec<usize> {
        heads.into_iter().flat_map(|h| h * c.head_dim..(h + 1) * c.head_dim).collect()
    };
    let kv = expand(groups.concat());
    // Of a group first the first queries of all its members, then the second ones.
    let queries =
        |group: &Vec<usize>| -> Vec<usize> { (0..per).flat_map(|i| group.iter().map(move |g| g * per + i)).collect() };
    let q = expand(groups.iter().flat_map(queries).collect());
    let rows = |l: &mut Linear, rows: &[usize]| {
        l.w = l.w.select(Axis(0), rows);
        l.bias = l.bias.take().map(|b| b.select(Axis(0), rows));
    };
    rows(&mut layer.q, &q);
    rows(&mut layer.k, &kv);
    rows(&mut layer.v, &kv);
    layer.o.w = layer.o.w.select(Axis(1), &q);
}

/// What heads do on text, layer by layer.
struct Seen {
    first: usize,
    shape: LayerShape,
    layers: Vec<OfLayer>,
}

/// Of one layer.
struct OfLayer {
    /// Sums over positions of the divergences of key/value heads: of their query heads, one by one.
    divergence: Array2<f64>,
    /// `x^T x` of the contexts: what any norm of their projections follows from.
    gram: Array2<f64>,
    positions: f64,
}

impl Seen {
    fn run(weights: &Weights, first: usize, windows: &[Vec<u32>]) -> Seen {
        let c = &weights.config;
        let shape = c.layer(first);
        let empty = || OfLayer {
            divergence: Array2::zeros((c.num_kv_heads, c.num_kv_heads)),
            gram: Array2::zeros((shape.q_size(), shape.q_size())),
            positions: 0.0,
        };
        let layers = (first..c.num_layers).map(|_| empty()).collect();
        let mut seen = Seen { first, shape, layers };
        for ids in windows {
            let _ = float::hidden(weights, ids, &mut FloatCache::new(c), &mut seen);
        }
        seen
    }

    /// Mean distances between key/value heads, per layer.
    fn distances(&self) -> Vec<Array2<f64>> {
        self.layers.iter().map(|l| &l.divergence / l.positions.max(1.0)).collect()
    }

    /// Per layer the `keep` key/value heads whose queries add most to the residual stream, each a group of its own.
    fn important(&self, weights: &Weights, first: usize, keep: usize) -> Vec<Vec<Vec<usize>>> {
        let per = self.shape.num_heads / self.shape.num_kv_heads;
        let width = per * self.shape.head_dim;
        let of_layer = |(i, l): (usize, &OfLayer)| {
            let o = weights.layers[first + i].o.w.mapv(f64::from);
            // || x w^T ||^2 is the trace of w (x^T x) w^T.
            let norm = |h: usize| {
                let columns = h * width..(h + 1) * width;
                let w = o.slice(s![.., columns.clone()]);
                (w.dot(&l.gram.slice(s![columns.clone(), columns])) * w).sum()
            };
            let norms: Vec<f64> = (0..self.shape.num_kv_heads).map(norm).collect();
            let mut order: Vec<usize> = (0..norms.len()).collect();
            order.sort_by(|&a, &b| norms[b].total_cmp(&norms[a]));
            order.truncate(keep);
            order.sort_unstable();
            order.into_iter().map(|h| vec![h]).collect()
        };
        self.layers.iter().enumerate().map(of_layer).collect()
    }
}

/// The attention distributions of one head, `[tokens, tokens]`, by the exact softmax, whatever the layer's own.
fn distributions(q: ArrayView2<'_, f32>, k: ArrayView2<'_, f32>, scale: f32) -> Array2<f32> {
    let mut p = q.dot(&k.t()) * scale;
    for (i, mut row) in p.outer_iter_mut().enumerate() {
        let (mut seen, mut unseen) = row.view_mut().split_at(Axis(0), i + 1);
        unseen.fill(0.0);
        let max = seen.fold(f32::NEG_INFINITY, |a, &b| a.max(b));
        seen.mapv_inplace(|x| (x - max).exp());
        let sum = seen.sum();
        seen /= sum;
    }
    p
}

impl Observer for Seen {
    fn attention(
        &mut self,
        layer: usize,
        q: ArrayView3<'_, f32>,
        k: ArrayView3<'_, f32>,
        _: ArrayView3<'_, f32>,
        _: ArrayView2<'_, f32>,
        _: ArrayView2<'_, f32>,
    ) {
        let Some(l) = layer.checked_sub(self.first).and_then(|i| self.layers.get_mut(i)) else { return };
        let (heads, kv, scale) = (self.shape.num_heads, self.shape.num_kv_heads, self.shape.score_scale());
        let per = heads / kv;
        let of = |h: usize| distributions(q.index_axis(Axis(1), h), k.index_axis(Axis(1), h / per), scale);
        let all: Vec<Array2<f32>> = (0..heads).into_par_iter().map(of).collect();
        let pairs: Vec<(usize, usize)> = (0..kv).flat_map(|a| (0..a).map(move |b| (a, b))).collect();
        let divergence = |&(a, b): &(usize, usize)| -> f64 {
            let of_queries = (0..per).map(|i| {
                let (p, q) = (&all[a * per + i], &all[b * per + i]);
                let rows = p.outer_iter().zip(q.outer_iter()).enumerate();
                rows.map(|(t, (p, q))| cluster::jensen_shannon(p.slice(s![..=t]), q.slice(s![..=t]))).sum::<f64>()
            });
            of_queries.sum::<f64>() / per as f64
        };
        let sums: Vec<f64> = pairs.par_iter().map(divergence).collect();
        for (&(a, b), sum) in pairs.iter().zip(sums) {
            l.divergence[[a, b]] += sum;
            l.divergence[[b, a]] += sum;
        }
        l.positions += q.len_of(Axis(0)) as f64;
    }

    fn context(&mut self, layer: usize, o: ArrayView2<'_, f32>) {
        let Some(l) = layer.checked_sub(self.first).and_then(|i| self.layers.get_mut(i)) else { return };
        l.gram += &o.t().dot(&o).mapv(f64::from);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Arch;

    fn weights(kv: usize) -> Weights {
        let config = ModelConfig {
            arch: Arch::Qwen3,
            num_kv_heads: kv,
            head_dim: 6,
            qkv_bias: true,
            qk_norm: true,
            ..ModelConfig::llama(24, 40, 4, 4, 50, 64)
        };
        Weights::random(config, 5).unwrap()
    }

    fn windows() -> Vec<Vec<u32>> {
        vec![(0..20).collect(), (10..40).collect()]
    }

    #[test]
    fn what_is_not_asked_for_stays_the_models_own() {
        let mut relu = weights(4);
        relu.config.activation = Activation::Relu;
        let merged = Reshape { merge_heads: 2, ..Reshape::default() }.apply(relu.clone(), 2, &windows()).unwrap();
        assert_eq!(merged.weights.config.layer(3).activation, Activation::Relu);
        let silu = Reshape { activation: Some(Activation::Silu), ..Reshape::default() };
        assert_eq!(silu.apply(relu, 2, &windows()).unwrap().weights.config.layer(3).activation, Activation::Silu);
    }

    #[test]
    fn merging_keeps_every_weight_and_one_head_merged_is_the_model() {
        let before = weights(4);
        let merged = Reshape { merge_heads: 2, ..Reshape::default() }.apply(before.clone(), 2, &windows()).unwrap();
        let v = merged.weights.config.variant.unwrap();
        assert_eq!((v.from_layer, v.num_attention_heads, v.num_key_value_heads, v.head_dim), (2, 2, 2, 12));
        assert_eq!(merged.weights.layers[..2], before.layers[..2]);
        for (i, groups) in merged.groups.iter().enumerate() {
            assert_eq!((groups.len(), groups.concat().len()), (2, 4));
            let (old, new) = (&before.layers[2 + i], &merged.weights.layers[2 + i]);
            for (place, &head) in groups.concat().iter().enumerate() {
                let rows = |h: usize| s![h * 6..(h + 1) * 6, ..];
                assert_eq!(new.q.w.slice(rows(place)), old.q.w.slice(rows(head)));
                assert_eq!(new.v.w.slice(rows(place)), old.v.w.slice(rows(head)));
                let columns = |h: usize| s![.., h * 6..(h + 1) * 6];
                assert_eq!(new.o.w.slice(columns(place)), old.o.w.slice(columns(head)));
            }
        }
        // Permuted without being merged, it computes the same.
        let mut same = merged.weights.clone();
        same.config.variant = None;
        let (a, b) = (float::forward(&before, &windows()[0]), float::forward(&same, &windows()[0]));
        assert!((a - b).iter().all(|d| d.abs() < 1e-5));
    }

    #[test]
    fn equal_heads_are_found() {
        let mut w = weights(4);
        // In layer 3, heads 0 and 2 are one, 1 and 3 another.
        for (from, to) in [(0, 2), (1, 3)] {
            let l = &mut w.layers[3];
            for m in [&mut l.q, &mut l.k] {
                let head = m.w.slice(s![from * 6..(from + 1) * 6, ..]).to_owned() * 20.0;
                m.w.slice_mut(s![from * 6..(from + 1) * 6, ..]).assign(&head);
                m.w.slice_mut(s![to * 6..(to + 1) * 6, ..]).assign(&head);
                if let Some(b) = &mut m.bias {
                    b.fill(0.0);
                }
            }
        }
        let merged = Reshape { merge_heads: 2, ..Reshape::default() }.apply(w, 3, &windows()).unwrap();
        assert_eq!(merged.groups, [[[0, 2], [1, 3]]]);
    }

    #[test]
    fn grouped_queries_are_merged_with_their_peers() {
        let before = weights(2);
        let adjacent = Reshape { merge_heads: 2, merge_by: MergeBy::Adjacent, ..Reshape::default() };
        let merged = adjacent.apply(before.clone(), 3, &[]).unwrap();
        let v = merged.weights.config.variant.unwrap();
        assert_eq!((v.num_attention_heads, v.num_key_value_heads, v.head_dim), (2, 1, 12));
        // Queries 0 and 1 belong to keys 0, queries 2 and 3 to keys 1.
        for (place, head) in [0, 2, 1, 3].into_iter().enumerate() {
            let rows = |h: usize| s![h * 6..(h + 1) * 6, ..];
            assert_eq!(merged.weights.layers[3].q.w.slice(rows(place)), before.layers[3].q.w.slice(rows(head)));
        }
    }

    #[test]
    fn pruning_keeps_what_matters() {
        let mut w = weights(4);
        for i in [0, 2] {
            w.layers[1].o.w.slice_mut(s![.., i * 6..(i + 1) * 6]).fill(1e-6);
        }
        let pruned = Reshape { prune_heads: 2, ..Reshape::default() }.apply(w.clone(), 1, &windows()).unwrap();
        assert_eq!(pruned.groups[0], [[1], [3]]);
        let v = pruned.weights.config.variant.unwrap();
        assert_eq!((v.num_attention_heads, v.head_dim), (2, 6));
        assert_eq!(float::forward(&pruned.weights, &[1, 2, 3]).dim(), (3, 50));

        let fewer = Reshape { prune_layers: 2, ..Reshape::default() }.apply(w.clone(), 0, &windows()).unwrap();
        assert_eq!((fewer.origin, fewer.weights.config.variant), (vec![1, 3], None));
        assert_eq!(fewer.weights.layers[0], w.layers[1]);
    }

    #[test]
    fn what_cannot_be_done_is_refused_with_the_reason() {
        let reshape = Reshape::default();
        for (bad, kv, first, named) in [
            (Reshape { merge_heads: 3, ..reshape }, 4, 0, "4 heads, which 3 does not divide"),
            (Reshape { merge_heads: 4, ..reshape }, 2, 0, "4 query heads share 2 key/value heads"),
            (Reshape { merge_heads: 0, ..reshape }, 4, 0, "--merge-heads 0"),
            (Reshape { prune_heads: 2, merge_heads: 2, ..reshape }, 4, 0, "one of the two"),
            (Reshape { prune_layers: 3, ..reshape }, 4, 0, "4 private layers"),
            (Reshape { softmax: Softmax::TwoRelu, ..reshape }, 4, 4, "--private-layers 0"),
        ] {
            let e = bad.check(&weights(kv).config, first).unwrap_err().to_string();
            assert!(e.contains(named), "{e}");
        }
        let changed = Reshape { merge_heads: 2, ..reshape }.apply(weights(4), 0, &windows()).unwrap().weights;
        let e = Reshape { merge_heads: 2, ..reshape }.check(&changed.config, 0).unwrap_err().to_string();
        assert!(e.contains("changed already"), "{e}");
    }
}
