//! Private adapters against their float twins: logits, labels, messages and bytes.

use ndarray::Array1;
use trefoil::Error;
use trefoil::cryptpeft::eval::label;
use trefoil::cryptpeft::local::{Classified, Pace};
use trefoil::cryptpeft::{AdapterConfig, AdapterWeights, Features, LocalAdapter, Opened, logits};
use trefoil::world::Setup;

fn config(hidden: usize, tokens: usize, (heads, rank): (usize, usize), layers: usize, blocks: usize) -> AdapterConfig {
    AdapterConfig {
        hidden,
        rank,
        heads,
        blocks,
        layers: (12 - layers..12).collect(),
        tokens,
        classes: 100,
        scale: 1.0,
        eps: 1e-6,
        labels: Vec::new(),
    }
}

fn margin(l: &Array1<f32>) -> f32 {
    let mut v = l.to_vec();
    v.sort_by(|a, b| b.total_cmp(a));
    v[0] - v[1]
}

/// Largest error of a logit; labels agree wherever the two largest are not close.
fn compare(c: &AdapterConfig, w: &AdapterWeights, inputs: &[Features], got: &Classified) -> f32 {
    let mut worst = 0f32;
    assert_eq!((got.logits.len(), got.labels.len()), (inputs.len(), inputs.len()));
    for (f, (l, got_label)) in inputs.iter().zip(got.logits.iter().zip(&got.labels)) {
        let want = logits(c, w, f, &mut ());
        assert!(l.len() == want.len() && l.iter().all(|v| v.is_finite()));
        worst = l.iter().zip(&want).fold(worst, |m, (a, b)| m.max((a - b).abs()));
        assert!(margin(&want) < 0.1 || label(&want) == *got_label, "label {got_label}, {want}");
    }
    worst
}

fn online(got: &Classified, inputs: usize) -> f64 {
    got.sent.iter().flatten().map(|l| l.online_bytes).sum::<u64>() as f64 / inputs as f64
}

#[test]
fn shapes_of_the_paper() {
    for shape in [(1, 240), (4, 120), (12, 60), (6, 180), (1, 120)] {
        let c = config(768, 197, shape, 1, 1);
        let w = AdapterWeights::random(&c, 5);
        let all: Vec<Features> = (0..6).map(|i| Features::random(&c, 50 + i)).collect();
        let (samples, inputs) = all.split_at(3);
        let local = LocalAdapter::new(&c, &w, samples, Setup::default()).unwrap();
        let got = local.classify(inputs, Opened::Logits, Pace::Cold).unwrap();
        let worst = compare(&c, &w, inputs, &got);
        let bytes = online(&got, inputs.len());
        eprintln!("{shape:?}: {} messages, {bytes:.0} bytes online, error {worst}, {:.1?}", got.messages, got.wall);
        assert!(worst < 0.1, "{shape:?}: off by {worst}");
        assert!(got.messages <= 26, "{shape:?}: {} messages", got.messages);
        assert!(bytes < 6e6, "{shape:?}: {bytes} bytes");
    }
}

#[test]
fn several_adapters_of_several_blocks() {
    for (layers, blocks) in [(1, 2), (2, 1), (3, 2)] {
        let mut c = config(48, 17, (3, 24), layers, blocks);
        c.classes = 10;
        c.scale = 0.5;
        let w = AdapterWeights::random(&c, 3);
        let all: Vec<Features> = (0..20).map(|i| Features::random(&c, i)).collect();
        let (samples, inputs) = all.split_at(12);
        let local = LocalAdapter::new(&c, &w, samples, Setup::default()).unwrap();
        let got = local.classify(inputs, Opened::Logits, Pace::Ready).unwrap();
        let worst = compare(&c, &w, inputs, &got);
        eprintln!("{layers} adapters of {blocks} blocks: {} messages, error {worst}", got.messages);
        assert!(worst < 0.1, "off by {worst}");
        let labels = local.classify(inputs, Opened::Label, Pace::Cold).unwrap();
        assert!(labels.logits.is_empty());
        for ((f, a), b) in inputs.iter().zip(&labels.labels).zip(&got.labels) {
            assert!(a == b || margin(&logits(&c, &w, f, &mut ())) < 0.1);
        }
    }
}

#[test]
fn beyond_the_calibrated_range_is_refused_and_not_classified_wrongly() {
    let c = config(48, 17, (3, 24), 1, 1);
    let w = AdapterWeights::random(&c, 3);
    let samples: Vec<Features> = (0..8).map(|i| Features::random(&c, i)).collect();
    let local = LocalAdapter::new(&c, &w, &samples, Setup::default()).unwrap();
    let one = |f: Features| local.classify(&[f], Opened::Label, Pace::Cold).unwrap_err();
    let mut long = samples[0].clone();
    long.inputs[0].row_mut(3).mapv_inplace(|v| v * 10.0);
    assert!(matches!(one(long), Error::Range { layer, .. } if layer == "input of layer 11"));
    let mut none = samples[0].clone();
    none.last[5] = f32::NAN;
    assert!(matches!(one(none), Error::Range { layer, .. } if layer == "last hidden state"));
    // Rows that are all but equal: their variance is too small for the norms' windows.
    let mut flat = samples[0].clone();
    flat.inputs[0].mapv_inplace(|v| v * 1e-4);
    flat.last.mapv_inplace(|v| v * 1e-4);
    let e = one(flat);
    assert!(matches!(&e, Error::Range { .. }), "{e}");
    // Another shape.
    let other = config(48, 16, (3, 24), 1, 1);
    assert!(matches!(one(Features::random(&other, 1)), Error::Shape { .. }));
}
