//! A vision transformer's own layers in secret, on the engine of the language models: the paper's baselines, which fine-tune layers of the
//! backbone and so have to compute them under MPC.
//!
//! A LayerNorm's centring is linear. Everything that writes to the residual stream (the Client's rows, the output and the down
//! projection) is centred beforehand, so that the stream is centred at any time and a LayerNorm is an RMSNorm of it; its shift goes through the
//! matrix behind it into that one's bias. So a layer is one of [`Arch::Vit`](crate::model::Arch::Vit), the same function.
//!
//! AdaptFormer's bottleneck reads what the MLP reads and is added to what it gives, so its neurons are more of the MLP's, with another activation.
//!
//! The head reads the CLS row, the engine's the last one: rows are given with the CLS token at the end. Positions are in the rows, and an
//! encoder's layer treats all rows alike, so their order is nobody's business.

use ndarray::{Array1, Array2, ArrayView2, Axis, concatenate, s};

use super::adapter::{Affine, LayerNorm};
use super::vit::{Layer, Vit};
use crate::error::{Error, Result};
use crate::model::{LayerWeights, Linear, ModelConfig, Weights};

/// AdaptFormer's adapter beside a layer's MLP: `scale up(relu(down(LN(x))))` of what the MLP reads (arXiv 2205.13535, section 3.2).
pub struct Bottleneck {
    /// `[rank, hidden]`.
    pub down: Affine,
    /// `[hidden, rank]`.
    pub up: Affine,
    /// What it is multiplied by.
    pub scale: f32,
}

/// Logit of labels that are none.
const NEVER: f32 = -16.0;

/// Each row less its mean.
fn centred_rows(x: ArrayView2<'_, f32>) -> Array2<f32> {
    let mut x = x.to_owned();
    for mut row in x.rows_mut() {
        let mean = row.iter().map(|v| f64::from(*v)).sum::<f64>() / row.len().max(1) as f64;
        row -= mean as f32;
    }
    x
}

/// A map whose output is centred.
fn centred(m: &Affine) -> Linear {
    let w = centred_rows(m.weight.t()).reversed_axes().as_standard_layout().to_owned();
    let bias = centred_rows(m.bias.view().insert_axis(Axis(0))).remove_axis(Axis(0));
    Linear { w, bias: Some(bias), adapter: None }
}

/// Some rows of a map behind a norm, with what the norm's shift makes of them.
fn behind(m: &Affine, norm: &LayerNorm, rows: std::ops::Range<usize>) -> Linear {
    let w = m.weight.slice(s![rows.clone(), ..]).to_owned();
    let bias = &m.bias.slice(s![rows]) + &w.dot(&norm.bias);
    Linear { w, bias: Some(bias), adapter: None }
}

/// The MLP's first map, and its second, with a bottleneck's.
fn mlp(l: &Layer, bottleneck: Option<&Bottleneck>) -> Result<(Affine, Affine)> {
    let Some(Bottleneck { down, up, scale }) = bottleneck else {
        return Ok((l.mlp_1.clone(), l.mlp_2.clone()));
    };
    let (rank, hidden) = down.weight.dim();
    if hidden != l.mlp_1.weight.ncols()
        || up.weight.dim() != (hidden, rank)
        || (down.bias.len(), up.bias.len()) != (rank, hidden)
        || rank == 0
    {
        let lhs = format!("a bottleneck of {:?} and {:?}", down.weight.dim(), up.weight.dim());
        return Err(Error::Shape {
            op: "vision transformer",
            lhs,
            rhs: format!("a layer of width {}", l.mlp_1.weight.ncols()),
        });
    }
    let wrong = |e| Error::Internal(format!("a layer with a bottleneck: {e}"));
    let (scaled, bias) = (&up.weight * *scale, &l.mlp_2.bias + &(&up.bias * *scale));
    let first = Affine {
        weight: concatenate(Axis(0), &[l.mlp_1.weight.view(), down.weight.view()]).map_err(wrong)?,
        bias: concatenate(Axis(0), &[l.mlp_1.bias.view(), down.bias.view()]).map_err(wrong)?,
    };
    let weight = concatenate(Axis(1), &[l.mlp_2.weight.view(), scaled.view()]).map_err(wrong)?;
    Ok((first, Affine { weight, bias }))
}

fn layer(l: &Layer, bottleneck: Option<&Bottleneck>) -> Result<LayerWeights> {
    let (mlp_1, mlp_2) = mlp(l, bottleneck)?;
    let (n, m) = (l.out.bias.len(), mlp_1.bias.len());
    Ok(LayerWeights {
        input_norm: l.ln_1.weight.clone(),
        q: behind(&l.qkv, &l.ln_1, 0..n),
        k: behind(&l.qkv, &l.ln_1, n..2 * n),
        v: behind(&l.qkv, &l.ln_1, 2 * n..3 * n),
        o: centred(&l.out),
        q_norm: None,
        k_norm: None,
        post_norm: l.ln_2.weight.clone(),
        gate: behind(&mlp_1, &l.ln_2, 0..m),
        up: Linear { w: Array2::zeros((0, n)), bias: None, adapter: None },
        down: centred(&mlp_2),
    })
}

/// The backbone with this norm and head, and the rows of some images ([`Vit::embed`]) as its vocabulary: image `i` are the ids
/// `i n .. (i + 1) n`, its CLS token the last of them; `bottlenecks` none, or one of equal rank for each layer. Where there are fewer labels than rows, the others have a logit of -16: for measurements and tests.
///
/// # Errors
/// [`Error::Shape`] for a head or rows of another width; [`Error::Model`] for a shape that the engine does not run.
pub fn model(
    vit: &Vit,
    bottlenecks: &[Bottleneck],
    (norm, head): (&LayerNorm, &Affine),
    images: &[Array2<f32>],
) -> Result<Weights> {
    let v = vit.config();
    let (tokens, hidden) = (v.tokens(), v.hidden);
    let of_image = images.iter().all(|x| x.dim() == (tokens, hidden));
    if !of_image || norm.weight.len() != hidden || head.weight.ncols() != hidden || images.is_empty() {
        let lhs = format!("rows {:?}, a head of {:?}", images.first().map(Array2::dim), head.weight.dim());
        return Err(Error::Shape { op: "vision transformer", lhs, rhs: format!("{tokens} rows of {hidden}") });
    }
    let rank = bottlenecks.first().map_or(0, |b| b.down.bias.len());
    let alike = bottlenecks.iter().all(|b| b.down.bias.len() == rank);
    if !alike || !(bottlenecks.is_empty() || bottlenecks.len() == v.layers) {
        let ranks: Vec<usize> = bottlenecks.iter().map(|b| b.down.bias.len()).collect();
        let lhs = format!("bottlenecks of ranks {ranks:?}");
        return Err(Error::Shape { op: "vision transformer", lhs, rhs: format!("one rank for {} layers", v.layers) });
    }
    let (labels, vocabulary) = (head.bias.len(), head.bias.len().max(images.len() * tokens));
    let config = ModelConfig {
        rms_norm_eps: v.eps,
        bottleneck: rank,
        ..ModelConfig::vit(hidden, v.intermediate + rank, v.layers, v.heads, vocabulary, tokens)
    };
    config.check()?;
    let wrong = |e| Error::Internal(format!("a model of a backbone: {e}"));
    let cls_last = |x: &Array2<f32>| {
        let order: Vec<usize> = (1..tokens).chain([0]).collect();
        centred_rows(x.select(Axis(0), &order).view())
    };
    let rows = images.iter().map(cls_last).collect::<Vec<_>>();
    let spare = Array2::zeros((vocabulary - images.len() * tokens, hidden));
    let parts: Vec<_> = rows.iter().chain([&spare]).map(|x| x.view()).collect();
    let embed = concatenate(Axis(0), &parts).map_err(wrong)?;
    let last = behind(head, norm, 0..labels);
    let none = Array2::zeros((vocabulary - labels, hidden));
    let classes = concatenate(Axis(0), &[last.w.view(), none.view()]).map_err(wrong)?;
    let bias = last.bias.unwrap_or_default();
    let bias = concatenate(Axis(0), &[bias.view(), Array1::from_elem(vocabulary - labels, NEVER).view()]);
    Ok(Weights {
        config,
        embed,
        layers: vit.layers.iter().enumerate().map(|(i, l)| layer(l, bottlenecks.get(i))).collect::<Result<_>>()?,
        norm: norm.weight.clone(),
        head: Some(classes),
        head_bias: Some(bias.map_err(wrong)?),
    })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use ndarray::{Array1, ArrayView1};

    use super::*;
    use crate::cryptpeft::adapter::Gaussian;
    use crate::cryptpeft::synthetic::Dataset;
    use crate::generate::{Local, LocalOptions};
    use crate::model::float;

    const IMAGES: usize = 8;

    /// A random head, and bottlenecks of this rank.
    struct Added {
        norm: LayerNorm,
        head: Affine,
        bottlenecks: Vec<Bottleneck>,
    }

    impl Added {
        fn random(vit: &Vit, rank: usize) -> Added {
            let (mut g, hidden) = (Gaussian::new(5), vit.config().hidden);
            let (norm, head) = (g.norm(hidden), g.affine(8, hidden));
            let layers = if rank == 0 { 0 } else { vit.config().layers };
            let mut one = |_| Bottleneck { down: g.affine(rank, hidden), up: g.affine(hidden, rank), scale: 0.5 };
            Added { norm, head, bottlenecks: (0..layers).map(&mut one).collect() }
        }

        /// In float, a layer and its bottleneck side by side.
        fn logits(&self, vit: &Vit, rows: &Array2<f32>) -> Array1<f32> {
            let (mut h, c) = (rows.clone(), vit.config());
            for (i, layer) in vit.layers.iter().enumerate() {
                let more = self.bottlenecks.get(i).map(|b| {
                    let (x, _) = layer.ln_2.apply(layer.attend(c, h.clone()).view(), c.eps);
                    b.up.apply(b.down.apply(x.view()).mapv(|v| v.max(0.0)).view()) * b.scale
                });
                h = layer.apply(c, h);
                h = more.map_or(h.clone(), |more| h + more);
            }
            let (x, _) = self.norm.apply(h.slice(s![..1, ..]), c.eps);
            self.head.apply(x.view()).remove_axis(Axis(0))
        }
    }

    /// The bundled backbone with a random head and bottlenecks, as a model; the ids of each image, and its logits as [`Vit`] computes them.
    fn bundled(rank: usize) -> (Weights, Vec<Vec<u32>>, Vec<Array1<f32>>) {
        let vit = Vit::open(Path::new("models/tiny-vit")).unwrap();
        let added = Added::random(&vit, rank);
        let set = Dataset::synthetic(vit.config().image, 8, 5, 3).unwrap();
        let images: Vec<_> = set.test.iter().take(IMAGES).map(|e| &e.pixels).collect();
        assert_eq!(images.len(), IMAGES);
        let rows: Vec<_> = images.iter().map(|p| vit.embed(p).unwrap()).collect();
        let logits = rows.iter().map(|rows| added.logits(&vit, rows)).collect();
        let ids = (0..IMAGES).map(|i| (i * vit.tokens()..(i + 1) * vit.tokens()).map(|t| t as u32).collect());
        let Added { norm, head, bottlenecks } = &added;
        (model(&vit, bottlenecks, (norm, head), &rows).unwrap(), ids.collect(), logits)
    }

    fn difference(a: ArrayView1<'_, f32>, b: ArrayView1<'_, f32>) -> f32 {
        a.iter().zip(b).fold(0.0, |m, (a, b)| m.max((a - b).abs()))
    }

    #[test]
    fn the_model_is_the_backbone() {
        let mut seen = Vec::new();
        for rank in [0, 12] {
            let (w, ids, logits) = bundled(rank);
            for (ids, want) in ids.iter().zip(&logits) {
                let got = float::forward(&w, ids);
                let last = got.row(ids.len() - 1);
                assert!(difference(last.slice(s![..want.len()]), want.view()) < 2e-4);
                assert!(last.iter().skip(want.len()).all(|l| *l == NEVER));
            }
            seen.push(logits);
        }
        assert!(difference(seen[0][0].view(), seen[1][0].view()) > 0.1, "bottlenecks change what is seen");
    }

    /// All layers in secret, the last one, and none but the head; with AdaptFormer's bottlenecks too.
    #[test]
    fn in_secret_as_in_float() {
        for (rank, private) in [(0, 4), (0, 1), (0, 0), (12, 4), (12, 1)] {
            let (w, ids, logits) = bundled(rank);
            let text: Vec<u32> = ids.concat();
            let mut local = Local::start(w, Some(text), LocalOptions::new(Some(private))).unwrap();
            let mut worst = 0f32;
            for (ids, want) in ids.iter().zip(&logits) {
                let out = local.generate(ids, 1, 0.0, 0, true, &mut |_| true).unwrap();
                let got = Array1::from_vec(out.logits[0].clone());
                worst = worst.max(difference(got.slice(s![..want.len()]), want.view()));
                let label = (0..want.len()).fold(0, |m, i| if want[i] > want[m] { i } else { m });
                let clear = (0..want.len()).all(|i| i == label || want[label] - want[i] > 0.1);
                assert!(!clear || out.tokens == [label as u32]);
            }
            eprintln!("{private} private layers, rank {rank}: the largest error of a logit is {worst}");
            assert!(worst < 0.1, "{private}, {rank}: {worst}");
            local.finish().unwrap();
        }
    }

    #[test]
    fn what_does_not_go_together_is_refused() {
        let vit = Vit::open(Path::new("models/tiny-vit")).unwrap();
        let rows = [Array2::zeros((vit.tokens(), vit.config().hidden))];
        let refused = |a: &Added, rows: &[Array2<f32>]| model(&vit, &a.bottlenecks, (&a.norm, &a.head), rows).is_err();
        let good = || Added::random(&vit, 4);
        assert!(!refused(&good(), &rows));
        assert!(refused(&good(), &[]));
        assert!(refused(&Added { norm: Gaussian::new(5).norm(16), ..good() }, &rows));
        assert!(refused(&Added { head: Gaussian::new(5).affine(8, 16), ..good() }, &rows));
        let mut some = good();
        some.bottlenecks.pop();
        assert!(refused(&some, &rows), "one layer has none");
        let wrong = |up| Bottleneck { up, ..Added::random(&vit, 4).bottlenecks.remove(0) };
        let mut turned = good();
        turned.bottlenecks[1] = wrong(Gaussian::new(5).affine(4, vit.config().hidden));
        assert!(refused(&turned, &rows), "its second map has the shape of its first");
    }
}
