//! The bundled adapter on the test part of the set that it was trained for: it says what the shapes are, and the secure run says
//! what the float one does.

use std::path::Path;

use trefoil::cryptpeft::eval::label;
use trefoil::cryptpeft::local::Pace;
use trefoil::cryptpeft::{
    AdapterWeights, Dataset, Features, LocalAdapter, Opened, Vit, accuracy, cached_features, logits,
};
use trefoil::world::Setup;

/// As `models/tiny-vit-shapes/README.md` says that it was trained.
const SEED: u64 = 1;

#[test]
fn secure_labels_are_the_float_ones() {
    let vit = Vit::open(Path::new("models/tiny-vit")).unwrap();
    let dir = Path::new("models/tiny-vit-shapes");
    let (config, weights) = AdapterWeights::open(dir, Some(vit.tokens())).unwrap();
    config.check_backbone(vit.config()).unwrap();
    let set = Dataset::synthetic(vit.config().image, 8, 200, SEED).unwrap();
    assert_eq!(config.labels, set.labels);
    let samples = cached_features(&vit, &set.train[..32], &config.layers).unwrap();
    let samples: Vec<Features> = samples.into_iter().map(|(f, _)| f).collect();
    let test = cached_features(&vit, &set.test, &config.layers).unwrap();
    assert!(test.len() >= 200, "{}", test.len());
    let right = accuracy(&config, &weights, &test);
    assert!(right > ACCURACY, "{right}");

    let inputs: Vec<Features> = test.into_iter().map(|(f, _)| f).collect();
    let local = LocalAdapter::new(&config, &weights, &samples, Setup::default()).unwrap();
    let opened = local.classify(&inputs, Opened::Logits, Pace::Cold).unwrap();
    let labels = local.classify(&inputs, Opened::Label, Pace::Cold).unwrap();
    assert!(labels.logits.is_empty());
    let (mut clear, mut same) = (0, 0);
    for (i, f) in inputs.iter().enumerate() {
        let want = logits(&config, &weights, f, &mut ());
        let error = want.iter().zip(&opened.logits[i]).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        assert!(error < 0.1, "image {i}: a logit is off by {error}");
        let most = label(&want);
        let second = (0..want.len()).filter(|n| *n != most).map(|n| want[n]).fold(f32::NEG_INFINITY, f32::max);
        if want[most] - second > 0.1 {
            clear += 1;
            same += usize::from(labels.labels[i] == most);
        }
    }
    assert!(clear > inputs.len() / 2, "{clear}");
    assert!(same as f64 >= 0.995 * clear as f64, "{same} of {clear}");
}

/// A little below what was measured.
const ACCURACY: f64 = 0.96;
