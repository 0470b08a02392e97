//! A vision transformer's own layers in secret, on the engine of the language models: the paper's baselines, which fine-tune layers of the
//! backbone and so have to compute them under MPC.
//!
//! A LayerNorm's centring is linear. Everything that writes to the residual stream (the Client's rows, the output and the down
//! projection) is centred beforehand, so that the stream is centred at any time and a LayerNorm is an RMSNorm of it; its shift goes through the
//! matrix behind it into that one's bias. So a layer is one of [`Arch::Vit`](crate::model::Arch::Vit), the same function.
//!
//! The head reads the CLS row, the engine's the last one: rows are given with the CLS token at the end. Positions are in the rows, and an
//! encoder's layer treats all rows alike, so their order is nobody's business.

use ndarray::{Array1, Array2, ArrayView2, Axis, concatenate, s};

use super::adapter::{Affine, LayerNorm};
use super::vit::{Layer, Vit};
use crate::error::{Error, Result};
use crate::model::{LayerWeights, Linear, ModelConfig, Weights};

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

fn layer(l: &Layer) -> LayerWeights {
    let (n, m) = (l.out.bias.len(), l.mlp_1.bias.len());
    LayerWeights {
        input_norm: l.ln_1.weight.clone(),
        q: behind(&l.qkv, &l.ln_1, 0..n),
        k: behind(&l.qkv, &l.ln_1, n..2 * n),
        v: behind(&l.qkv, &l.ln_1, 2 * n..3 * n),
        o: centred(&l.out),
        q_norm: None,
        k_norm: None,
        post_norm: l.ln_2.weight.clone(),
        gate: behind(&l.mlp_1, &l.ln_2, 0..m),
        up: Linear { w: Array2::zeros((0, n)), bias: None, adapter: None },
        down: centred(&l.mlp_2),
    }
}

/// The backbone with this norm and head, and the rows of some images ([`Vit::embed`]) as its vocabulary: image `i` are the ids
/// `i n .. (i + 1) n`, its CLS token the last of them. Where there are fewer labels than rows, the others have a logit of -16: for measurements and tests.
///
/// # Errors
/// [`Error::Shape`] for a head or rows of another width; [`Error::Model`] for a shape that the engine does not run.
pub fn model(vit: &Vit, norm: &LayerNorm, head: &Affine, images: &[Array2<f32>]) -> Result<Weights> {
    let v = vit.config();
    let (tokens, hidden) = (v.tokens(), v.hidden);
    let of_image = images.iter().all(|x| x.dim() == (tokens, hidden));
    if !of_image || norm.weight.len() != hidden || head.weight.ncols() != hidden || images.is_empty() {
        let lhs = format!("rows {:?}, a head of {:?}", images.first().map(Array2::dim), head.weight.dim());
        return Err(Error::Shape { op: "vision transformer", lhs, rhs: format!("{tokens} rows of {hidden}") });
    }
    let (labels, vocabulary) = (head.bias.len(), head.bias.len().max(images.len() * tokens));
    let config = ModelConfig {
        rms_norm_eps: v.eps,
        ..ModelConfig::vit(hidden, v.intermediate, v.layers, v.heads, vocabulary, tokens)
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
        layers: vit.layers.iter().map(layer).collect(),
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

    /// The bundled backbone with a random head, as a model; the ids of each image, and its logits as [`Vit`] computes them.
    fn bundled() -> (Weights, Vec<Vec<u32>>, Vec<Array1<f32>>) {
        let vit = Vit::open(Path::new("models/tiny-vit")).unwrap();
        let mut g = Gaussian::new(5);
        let (norm, head) = (g.norm(vit.config().hidden), g.affine(8, vit.config().hidden));
        let set = Dataset::synthetic(vit.config().image, 8, 5, 3).unwrap();
        let images: Vec<_> = set.test.iter().take(IMAGES).map(|e| &e.pixels).collect();
        assert_eq!(images.len(), IMAGES);
        let rows: Vec<_> = images.iter().map(|p| vit.embed(p).unwrap()).collect();
        let logits = images.iter().map(|p| {
            let last = vit.features(p, &[]).unwrap().last.insert_axis(Axis(0));
            let (x, _) = norm.apply(last.view(), vit.config().eps);
            head.apply(x.view()).remove_axis(Axis(0))
        });
        let ids = (0..IMAGES).map(|i| (i * vit.tokens()..(i + 1) * vit.tokens()).map(|t| t as u32).collect());
        (model(&vit, &norm, &head, &rows).unwrap(), ids.collect(), logits.collect())
    }

    fn difference(a: ArrayView1<'_, f32>, b: ArrayView1<'_, f32>) -> f32 {
        a.iter().zip(b).fold(0.0, |m, (a, b)| m.max((a - b).abs()))
    }

    #[test]
    fn the_model_is_the_backbone() {
        let (w, ids, logits) = bundled();
        for (ids, want) in ids.iter().zip(&logits) {
            let got = float::forward(&w, ids);
            let last = got.row(ids.len() - 1);
            assert!(difference(last.slice(s![..want.len()]), want.view()) < 2e-4);
            assert!(last.iter().skip(want.len()).all(|l| *l == NEVER));
        }
    }

    /// All layers in secret, the last one, and none but the head.
    #[test]
    fn in_secret_as_in_float() {
        let (w, ids, logits) = bundled();
        let text: Vec<u32> = ids.concat();
        for private in [4, 1, 0] {
            let mut local = Local::start(w.clone(), Some(text.clone()), LocalOptions::new(Some(private))).unwrap();
            let mut worst = 0f32;
            for (ids, want) in ids.iter().zip(&logits) {
                let out = local.generate(ids, 1, 0.0, 0, true, &mut |_| true).unwrap();
                let got = Array1::from_vec(out.logits[0].clone());
                worst = worst.max(difference(got.slice(s![..want.len()]), want.view()));
                let label = (0..want.len()).fold(0, |m, i| if want[i] > want[m] { i } else { m });
                let clear = (0..want.len()).all(|i| i == label || want[label] - want[i] > 0.1);
                assert!(!clear || out.tokens == [label as u32]);
            }
            eprintln!("{private} private layers: the largest error of a logit is {worst}");
            assert!(worst < 0.1, "{private}: {worst}");
            local.finish().unwrap();
        }
    }

    #[test]
    fn what_does_not_go_together_is_refused() {
        let vit = Vit::open(Path::new("models/tiny-vit")).unwrap();
        let mut g = Gaussian::new(5);
        let (norm, head) = (g.norm(16), g.affine(8, 16));
        let rows = Array2::zeros((vit.tokens(), vit.config().hidden));
        assert!(model(&vit, &norm, &head, &[rows]).is_err());
        let (norm, head) = (g.norm(vit.config().hidden), g.affine(8, vit.config().hidden));
        assert!(model(&vit, &norm, &head, &[]).is_err());
    }
}
