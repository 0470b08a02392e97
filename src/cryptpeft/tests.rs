//! Against PyTorch (`tests/fixtures/cryptpeft-vit`), and what is refused. Malformed files: `tests_refused.rs`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use ndarray::{Array1, Array3};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};

use super::*;

pub(super) fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/cryptpeft-vit").join(name)
}

pub(super) type File = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

pub(super) fn read(path: &Path) -> File {
    let bytes = std::fs::read(path).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let values = |t: &TensorView<'_>| t.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    tensors.tensors().into_iter().map(|(name, t)| (name, (t.shape().to_vec(), values(&t)))).collect()
}

pub(super) fn write(path: &Path, file: &File) {
    let bytes = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    let all: Vec<_> = file.iter().map(|(name, (shape, values))| (name, shape.clone(), bytes(values))).collect();
    let views = all.iter().map(|(name, shape, b)| (*name, TensorView::new(Dtype::F32, shape.clone(), b).unwrap()));
    safetensors::serialize_to_file(views, None, path).unwrap();
}

/// A copy of a fixture's directory, in which the test may change what it likes.
pub(super) fn copy(name: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(fixture(name)).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
    }
    dir
}

#[derive(serde::Deserialize)]
struct Expected {
    logits: Vec<f32>,
    checksums: Vec<f64>,
    cls: Vec<f32>,
}

fn expected() -> Vec<Expected> {
    serde_json::from_slice(&std::fs::read(fixture("expected.json")).unwrap()).unwrap()
}

fn pixels(path: &str, name: &str) -> Array3<f32> {
    let (shape, values) = read(&fixture(path)).remove(name).unwrap();
    Array3::from_shape_vec((shape[0], shape[1], shape[2]), values).unwrap()
}

fn largest_difference<'a>(a: impl IntoIterator<Item = &'a f32>, b: impl IntoIterator<Item = &'a f32>) -> f32 {
    a.into_iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

pub(super) fn config() -> AdapterConfig {
    AdapterConfig {
        hidden: 20,
        rank: 8,
        heads: 2,
        blocks: 2,
        layers: vec![3, 4, 5],
        tokens: 10,
        classes: 4,
        scale: 0.7,
        eps: 1e-5,
        labels: ["a", "b", "c", "d"].map(str::to_owned).to_vec(),
    }
}

fn vit() -> VitConfig {
    let (hidden, intermediate) = (20, 40);
    VitConfig { layout: Layout::HuggingFace, image: 12, patch: 4, hidden, layers: 6, heads: 2, intermediate, eps: 1e-6 }
}

/// Every image through the backbone in `dir`.
fn check_backbone(dir: &Path) {
    let vit = Vit::open(dir).unwrap();
    let (config, w) = AdapterWeights::open(&fixture("adapter"), Some(vit.tokens())).unwrap();
    config.check_backbone(vit.config()).unwrap();
    assert_eq!((config.layers.as_slice(), config.rank, config.heads), ([1, 2].as_slice(), 12, 3));
    for (i, want) in expected().iter().enumerate() {
        let pixels = pixels("images.safetensors", &format!("image_{i}"));
        let all = vit.features(&pixels, &[0, 1, 2]).unwrap();
        assert!(largest_difference(&all.last, &want.cls) < 1e-4);
        for (x, want) in all.inputs.iter().zip(&want.checksums) {
            let n = x.len() as f64;
            let sum: f64 = x.iter().enumerate().map(|(i, v)| f64::from(*v) * i as f64 / n).sum();
            assert!((sum - want).abs() < 1e-3, "{sum} {want}");
        }
        let features = vit.features(&pixels, &config.layers).unwrap();
        assert_eq!(features, Features { inputs: all.inputs[1..].to_vec(), last: all.last });
        let got = logits(&config, &w, &features, &mut ());
        let difference = largest_difference(&got, &want.logits);
        assert!(got.len() == 5 && difference < 1e-4, "{}: image {i}: off by {difference}", dir.display());
    }
}

#[test]
fn both_layouts_give_the_logits_of_pytorch() {
    check_backbone(&fixture("hf"));
    check_backbone(&fixture("hf/model.safetensors"));
    check_backbone(&fixture("torchvision"));
}

#[test]
fn three_parties_give_the_logits_of_pytorch() {
    let vit = Vit::open(&fixture("hf")).unwrap();
    let (config, w) = AdapterWeights::open(&fixture("adapter"), Some(vit.tokens())).unwrap();
    let features =
        |i: usize| vit.features(&pixels("images.safetensors", &format!("image_{i}")), &config.layers).unwrap();
    let inputs: Vec<Features> = (0..expected().len()).map(features).collect();
    let local = LocalAdapter::new(&config, &w, &inputs, crate::world::Setup::default()).unwrap();
    let got = local.classify(&inputs, Opened::Logits, local::Pace::Cold).unwrap();
    assert_eq!(got.logits.len(), inputs.len());
    for ((got, label), want) in got.logits.iter().zip(&got.labels).zip(expected()) {
        let difference = largest_difference(got, &want.logits);
        assert!(got.len() == want.logits.len() && difference < 0.02, "{got}, {:?}", want.logits);
        assert_eq!(*label, eval::label(&Array1::from(want.logits)));
    }
}

#[test]
fn other_names_of_the_same_tensors() {
    let renamed = |from: &str, rename: &dyn Fn(&str) -> String| {
        let dir = copy(from);
        let path = dir.path().join("model.safetensors");
        let file = read(&path).into_iter().map(|(name, tensor)| (rename(&name), tensor)).collect();
        write(&path, &file);
        check_backbone(dir.path());
    };
    renamed("hf", &|name| format!("vit.{name}"));
    // As transformers 5 calls them while they are in memory.
    let within = |name: &str| {
        let mut name = name.to_owned();
        for (from, to) in [
            ("encoder.layer.", "layers."),
            ("attention.attention.query", "attention.q_proj"),
            ("attention.attention.key", "attention.k_proj"),
            ("attention.attention.value", "attention.v_proj"),
            ("attention.output.dense", "attention.o_proj"),
            ("intermediate.dense", "mlp.fc1"),
            ("output.dense", "mlp.fc2"),
        ] {
            name = name.replace(from, to);
        }
        name
    };
    renamed("hf", &within);
    renamed("torchvision", &|name| name.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"));
}

#[test]
fn only_the_cls_row_gives_the_same() {
    let (config, vit) = (config(), Vit::random(vit(), 1).unwrap());
    config.check_backbone(vit.config()).unwrap();
    let w = AdapterWeights::random(&config, 2);
    let pixels = Array3::from_shape_fn((3, 12, 12), |(c, y, x)| ((c * 5 + y * 3 + x * x) % 7) as f32 / 3.5 - 1.0);
    let features = vit.features(&pixels, &config.layers).unwrap();
    let full = float::adapters(&config, &w, &features, &mut (), usize::MAX);
    assert_eq!(full.dim(), (10, 20));
    let want = float::finish(&config, &w, &features, full.view(), &mut ());
    let got = logits(&config, &w, &features, &mut ());
    assert!(largest_difference(&got, &want) < 1e-5, "{got} {want}");
    // The adapters matter: they move the logits.
    let mut without = w.clone();
    without.layers.iter_mut().for_each(|layer| layer.lora_b.weight.fill(0.0));
    assert!(largest_difference(&got, &logits(&config, &without, &features, &mut ())) > 0.1);
}

#[test]
fn a_watch_sees_every_value_that_is_computed() {
    struct Sizes(BTreeMap<String, usize>);
    impl Watch for Sizes {
        fn see(&mut self, at: &str, values: &[f32]) {
            *self.0.entry(at.to_owned()).or_default() += values.len();
        }
    }
    let config = config();
    let w = AdapterWeights::random(&config, 3);
    let x = Array1::linspace(-1.0, 1.0, 200).into_shape_with_order((10, 20)).unwrap();
    let features = Features { inputs: vec![x; 3], last: Array1::ones(20) };
    let mut sizes = Sizes(BTreeMap::new());
    let _ = logits(&config, &w, &features, &mut sizes);
    let block = "k v q scores reset context proj mid ln_1 ln_1.var ln_2 ln_2.var mlp_0 mlp_3 out".split(' ');
    for name in block {
        for (at, all) in [("layer3.blk0", true), ("layer4.blk1", true), ("layer5.blk0", true), ("layer5.blk1", false)] {
            let rows = if all || ["k", "v", "ln_1", "ln_1.var"].contains(&name) { 10 } else { 1 };
            let each = match name {
                "scores" | "reset" => 2 * 10,
                "ln_1.var" | "ln_2.var" => 1,
                _ => 8,
            };
            assert_eq!(sizes.0.remove(&format!("{at}.{name}")), Some(rows * each), "{at}.{name}");
        }
    }
    for (at, n) in [("layer4.in", 200), ("layer4.out", 200), ("layer5.lora_a", 80), ("layer5.lora_b", 20)] {
        assert_eq!(sizes.0.get(at), Some(&n), "{at}");
    }
    for (at, n) in [("layer5.out", 20), ("ln.in", 20), ("ln.var", 1), ("ln", 20), ("logits", 4)] {
        assert_eq!(sizes.0.get(at), Some(&n), "{at}");
    }
}

#[test]
fn saved_and_opened_again() {
    let dir = tempfile::tempdir().unwrap();
    for config in [config(), AdapterConfig { eps: 1e-6, labels: vec![], blocks: 1, layers: vec![0], ..config() }] {
        let w = AdapterWeights::random(&config, 5);
        assert_eq!(w, AdapterWeights::random(&config, 5));
        assert_ne!(w, AdapterWeights::random(&config, 6));
        w.save(&config, dir.path()).unwrap();
        assert_eq!(AdapterWeights::open(dir.path(), Some(10)).unwrap(), (config.clone(), w.clone()));
        let narrow = AdapterConfig { rank: 4, ..config.clone() };
        let error = w.save(&narrow, dir.path()).unwrap_err().to_string();
        assert!(error.contains("lora_A.weight [8, 20]") && error.contains("[4, 20]"), "{error}");
        let error = w.save(&AdapterConfig { blocks: 3, ..config }, dir.path()).unwrap_err().to_string();
        assert!(error.contains("3 blocks"), "{error}");
    }
    std::fs::rename(dir.path().join("adapter.safetensors"), dir.path().join("model.safetensors")).unwrap();
    AdapterWeights::open(dir.path(), None).unwrap();
}

#[test]
fn nothing_private_is_shown() {
    let (config, vit) = (AdapterConfig { scale: 1.0, ..config() }, Vit::random(vit(), 1).unwrap());
    let mut w = AdapterWeights::random(&config, 2);
    w.layers.iter_mut().flat_map(|layer| &mut layer.blocks).for_each(|block| block.qkv.fill(0.12345));
    w.head.weight.fill(0.12345);
    w.ln.bias.fill(0.12345);
    w.layers[0].lora_a.bias.fill(0.12345);
    let features = vit.features(&Array3::zeros((3, 12, 12)), &config.layers).unwrap();
    for shown in [format!("{w:?}"), format!("{features:?}"), format!("{vit:?}")] {
        assert!(!shown.contains("0.") && shown.contains("20"), "{shown}");
    }
}

#[test]
fn photos_are_resized_and_cut_as_pytorch_does() {
    for name in ["hf", "torchvision"] {
        let backbone = fixture(name);
        let vit = Vit::open(&backbone).unwrap();
        let prepare = Preprocess::open(&backbone, vit.config()).unwrap();
        let got = prepare.file(&fixture("photo.png")).unwrap();
        let want = pixels("photo.safetensors", name);
        assert_eq!(got.dim(), want.dim());
        // One step of a byte, where a rounding went the other way.
        let step = 1.01 / 255.0 / 0.224;
        let difference = largest_difference(&got, &want);
        assert!(difference <= step, "{name}: off by {difference}");
        let mean = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).sum::<f32>() / want.len() as f32;
        assert!(mean < 0.2 * step, "{name}: {mean} on average");
    }
}
