//! Training of adapters: it learns, the same weights come of the same seed, they are carried by fixed point, and what cannot be
//! trained is refused with the reason. Over a language model too, where the secure run says what the float one does.

use std::path::Path;

use trefoil::cryptpeft::eval::label;
use trefoil::cryptpeft::local::Pace;
use trefoil::cryptpeft::plan::plan;
use trefoil::cryptpeft::train::{Optimiser, TrainOptions, train};
use trefoil::cryptpeft::{
    Dataset, Features, Layout, LocalAdapter, Opened, TextBackbone, TextSet, Vit, VitConfig, accuracy, cached_features,
    logits,
};
use trefoil::world::Setup;

fn vit() -> Vit {
    let (hidden, intermediate) = (32, 64);
    let (layers, heads) = (3, 4);
    let config =
        VitConfig { layout: Layout::HuggingFace, image: 16, patch: 4, hidden, layers, heads, intermediate, eps: 1e-6 };
    Vit::random(config, 4).unwrap()
}

fn options() -> TrainOptions {
    TrainOptions { heads: 2, rank: 8, backbone_layers: 3, steps: 120, batch: 16, ..TrainOptions::default() }
}

fn features(s: usize) -> (Vec<(Features, usize)>, Vec<String>) {
    let set = Dataset::synthetic(16, 3, 40, 2).unwrap();
    let layers: Vec<usize> = (3 - s..3).collect();
    (cached_features(&vit(), &set.train, &layers).unwrap(), set.labels)
}

#[test]
fn it_learns() {
    for (s, optimiser, lr) in [(1, Optimiser::AdamW, 5e-3), (2, Optimiser::Sgd, 5e-2), (3, Optimiser::AdamW, 5e-3)] {
        let (features, labels) = features(s);
        let options = TrainOptions { layers: s, optimiser, lr, ..options() };
        let mut losses = Vec::new();
        let mut progress = |step: usize, loss: f32| {
            assert_eq!(step, losses.len() + 1);
            losses.push(loss);
        };
        let (config, weights) = train(&options, &features, &labels, &mut progress).unwrap();
        assert_eq!((config.layers.len(), losses.len()), (s, 120));
        let mean = |part: &[f32]| part.iter().sum::<f32>() / part.len() as f32;
        let (before, after) = (mean(&losses[..10]), mean(&losses[110..]));
        assert!(after < 0.85 * before, "{s} layers, {optimiser}: {before} {after}");
        let right = accuracy(&config, &weights, &features);
        assert!(right > 0.5, "{s} layers, {optimiser}: {right}");
        let samples: Vec<Features> = features.into_iter().map(|(f, _)| f).collect();
        plan(&config, &weights, &samples).unwrap();
    }
}

#[test]
fn equal_seeds_give_equal_weights() {
    let (features, labels) = features(2);
    let run = |seed: u64| {
        let options = TrainOptions { steps: 15, seed, ..options() };
        train(&options, &features, &labels, &mut |_, _| ()).unwrap().1
    };
    let first = run(1);
    assert!(first == run(1) && first != run(2));
}

#[test]
fn what_cannot_be_trained_is_refused() {
    let (features, labels) = features(2);
    let refused = |options: TrainOptions, features: &[(Features, usize)], labels: &[String], want: &str| {
        let error = train(&options, features, labels, &mut |_, _| ()).unwrap_err().to_string();
        assert!(error.contains(want), "{error}");
    };
    let o = options;
    refused(TrainOptions { layers: 4, ..o() }, &features, &labels, "--layers 4: the backbone has 3");
    refused(TrainOptions { layers: 0, ..o() }, &features, &labels, "--layers 0");
    refused(TrainOptions { layers: 1, ..o() }, &features, &labels, "features of 2 layers");
    refused(TrainOptions { heads: 3, ..o() }, &features, &labels, "heads: 3 do not divide the rank 8");
    refused(TrainOptions { rank: 0, ..o() }, &features, &labels, "no size may be 0");
    refused(TrainOptions { steps: 0, ..o() }, &features, &labels, "--steps 0");
    refused(TrainOptions { lr: f64::NAN, ..o() }, &features, &labels, "--lr NaN");
    refused(TrainOptions { decay: -1.0, ..o() }, &features, &labels, "--decay -1");
    refused(o(), &[], &labels, "there is no image");
    refused(o(), &features, &labels[..2], "there are 2 labels");
    refused(TrainOptions { scale: f32::NAN, ..o() }, &features, &labels, "scale");
}

#[test]
fn it_learns_over_a_language_model() {
    let backbone = TextBackbone::open(Path::new("models/quill-4m"), 8).unwrap();
    let set = TextSet::synthetic(&backbone, 120, 1).unwrap();
    let all = backbone.config().num_layers;
    let options = TrainOptions { layers: 2, backbone_layers: all, steps: 300, lr: 5e-3, ..options() };
    let layers = options.adapted().unwrap();
    let learn = backbone.cached_features(&set.train, &layers).unwrap();
    let test = backbone.cached_features(&set.test, &layers).unwrap();
    let (config, weights) = train(&options, &learn, &set.labels, &mut |_, _| ()).unwrap();
    assert_eq!((config.tokens, config.hidden, config.layers.as_slice()), (8, 192, &[6, 7][..]));
    backbone.check(&config).unwrap();
    // By chance a quarter, by the topic alone a half.
    let right = accuracy(&config, &weights, &test);
    assert!(right > 0.55, "{right}");

    let samples: Vec<Features> = learn.iter().step_by(learn.len() / 32).map(|(f, _)| f.clone()).collect();
    let inputs: Vec<Features> = test.into_iter().step_by(6).map(|(f, _)| f).collect();
    let local = LocalAdapter::new(&config, &weights, &samples, Setup::default()).unwrap();
    let opened = local.classify(&inputs, Opened::Logits, Pace::Cold).unwrap();
    let labels = local.classify(&inputs, Opened::Label, Pace::Cold).unwrap();
    let mut clear = 0;
    for (i, f) in inputs.iter().enumerate() {
        let want = logits(&config, &weights, f, &mut ());
        let error = want.iter().zip(&opened.logits[i]).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        assert!(error < 0.1, "text {i}: a logit is off by {error}");
        let most = label(&want);
        let second = (0..want.len()).filter(|n| *n != most).map(|n| want[n]).fold(f32::NEG_INFINITY, f32::max);
        if want[most] - second > 0.1 {
            clear += 1;
            assert_eq!(labels.labels[i], most, "text {i}");
        }
    }
    assert!(clear > inputs.len() / 2, "{clear} of {}", inputs.len());
}
