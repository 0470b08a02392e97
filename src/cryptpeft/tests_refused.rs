//! What is refused, and that the error names the culprit.

use std::io::Cursor;
use std::path::Path;

use ::image::{DynamicImage, ImageFormat};
use ndarray::Array3;

use super::tests::{File, config, copy, fixture, read, write};
use super::*;

/// Changes a tensor file of a copied fixture and gives the error of opening it.
fn refused<T>(name: &str, tensors: &str, edit: impl Fn(&mut File), open: impl Fn(&Path) -> crate::Result<T>) -> String {
    let dir = copy(name);
    let path = dir.path().join(tensors);
    let mut file = read(&path);
    edit(&mut file);
    write(&path, &file);
    error(open(dir.path()))
}

fn error<T>(result: crate::Result<T>) -> String {
    let Err(e) = result else { panic!("taken") };
    assert!(matches!(e.code(), "model" | "config" | "shape"), "{e}");
    e.to_string()
}

fn says(error: &str, words: &[&str]) {
    for word in words {
        assert!(error.contains(word), "`{word}` is not in: {error}");
    }
}

/// Takes a tensor out and puts it in with another shape, filled with zeros.
fn reshape(file: &mut File, name: &str, shape: &[usize]) {
    file.insert(name.to_owned(), (shape.to_vec(), vec![0.0; shape.iter().product()]));
}

#[test]
fn adapters_with_wrong_tensors() {
    let p = "adapters.adapter_layer_1.";
    let b = "adapters.adapter_layer_2.blks.blk_0.";
    let open = |dir: &Path| AdapterWeights::open(dir, Some(17));
    let names: Vec<String> = read(&fixture("adapter/adapter.safetensors")).into_keys().collect();
    for name in &names {
        let without = |file: &mut File| drop(file.remove(name));
        says(&refused("adapter", "adapter.safetensors", without, open), &[name, "is missing"]);
    }
    for (name, shape, words) in [
        (format!("{b}self_attention.qkv.weight"), vec![36, 11], vec!["[36, 11]", "[36, 12]", "rank 12"]),
        (format!("{b}self_attention.attn_reset.weight"), vec![16, 16], vec!["[16, 16]", "[17, 17]", "17 tokens"]),
        (format!("{p}blks.blk_0.self_attention.attn_reset.weight"), vec![17, 16], vec!["[17, 16]", "square"]),
        (format!("{b}self_attention.attn_reset.bias"), vec![16], vec!["[16]", "[17]"]),
        (format!("{b}ln_1.weight"), vec![12, 1], vec!["[12, 1]", "[12]"]),
        (format!("{p}lora_A.weight"), vec![32], vec!["[32]", "[rank, hidden]"]),
        (format!("{p}lora_A.weight"), vec![0, 32], vec!["[0, 32]", "none of them 0"]),
        (format!("{p}lora_B.weight"), vec![12, 32], vec!["[12, 32]", "[32, 12]"]),
        ("heads.head.weight".to_owned(), vec![5, 31], vec!["[5, 31]", "[5, 32]", "5 classes"]),
        ("heads.head.bias".to_owned(), vec![4], vec!["[4]", "[5]"]),
        ("ln.bias".to_owned(), vec![12], vec!["[12]", "[32]", "hidden size 32"]),
    ] {
        let error = refused("adapter", "adapter.safetensors", |file| reshape(file, &name, &shape), open);
        says(&error, &[&name]);
        says(&error, &words);
    }
    for (name, word) in [
        ("adapters.adapter_layer_1.blks.blk_0.self_attention.qkv.bias", "none of the tensors"),
        ("adapters.adapter_layer_2.blks.blk_1.ln_1.weight", "1 blocks"),
        ("adapters.adapter_layer_x.ln_1.weight", "a number"),
        ("adapters.adapter_layer_01.ln_1.weight", "a number"),
    ] {
        let error = refused("adapter", "adapter.safetensors", |file| reshape(file, name, &[12]), open);
        says(&error, &[name, word]);
    }
    let gap = |file: &mut File| {
        *file = std::mem::take(file).into_iter().map(|(n, t)| (n.replace("layer_2", "layer_3"), t)).collect();
    };
    says(&refused("adapter", "adapter.safetensors", gap, open), &["[1, 3]", "without a gap"]);
    let nan = |file: &mut File| file.get_mut("ln.weight").unwrap().1[3] = f32::NAN;
    says(&refused("adapter", "adapter.safetensors", nan, open), &["ln.weight", "finite"]);
    let none = |file: &mut File| file.retain(|name, _| !name.starts_with("adapters."));
    says(&refused("adapter", "adapter.safetensors", none, open), &["no adapter of any layer"]);
}

#[test]
fn adapters_with_wrong_settings() {
    let dir = copy("adapter");
    let open = || error(AdapterWeights::open(dir.path(), None));
    for (json, words) in [
        (r#"{"heads": 5}"#, vec!["heads", "5 do not divide the rank 12"]),
        (r#"{"heads": 0}"#, vec!["0"]),
        (r#"{"scale": 1.0}"#, vec!["`heads` is missing"]),
        (r#"{"heads": 3, "scale": 1e60}"#, vec!["scale", "finite"]),
        (r#"{"heads": 3, "eps": 0}"#, vec!["eps", "above 0"]),
        (r#"{"heads": 3, "labels": ["a", "b"]}"#, vec!["labels", "2", "5 classes"]),
        (r#"{"heads": 3, "labels": [1, 2, 3, 4, 5]}"#, vec!["labels", "list of strings"]),
        (r#"{"heads": 3, "dropout": 0.1}"#, vec!["dropout", "not read"]),
        ("heads: 3", vec!["not JSON"]),
    ] {
        std::fs::write(dir.path().join("adapter_config.json"), json).unwrap();
        says(&open(), &words);
    }
    std::fs::remove_file(dir.path().join("adapter_config.json")).unwrap();
    says(&open(), &["adapter_config.json", "no such file"]);
    let dir = copy("adapter");
    std::fs::remove_file(dir.path().join("adapter.safetensors")).unwrap();
    says(&error(AdapterWeights::open(dir.path(), None)), &["adapter.safetensors"]);
}

#[test]
fn adapters_of_another_backbone() {
    let wrong = error(AdapterWeights::open(&fixture("adapter"), Some(197)));
    says(&wrong, &["attn_reset.weight", "[17, 17]", "[197, 197]", "197 tokens"]);
    let vit = Vit::open(&fixture("hf")).unwrap().config().clone();
    let (config, _) = AdapterWeights::open(&fixture("adapter"), None).unwrap();
    config.check_backbone(&vit).unwrap();
    says(&error(config.check_backbone(&VitConfig { layers: 4, ..vit.clone() })), &["[1, 2]", "4"]);
    says(&error(config.check_backbone(&VitConfig { hidden: 64, ..vit.clone() })), &["32", "64"]);
    says(&error(config.check_backbone(&VitConfig { image: 64, ..vit })), &["17", "65"]);
}

#[test]
fn backbones() {
    let open = |dir: &Path| Vit::open(dir);
    for layout in ["hf", "torchvision"] {
        let all = read(&fixture(layout).join("model.safetensors"));
        let unread = ["layernorm.weight", "layernorm.bias", "encoder.ln.weight", "encoder.ln.bias"];
        for name in all.keys().filter(|name| !unread.contains(&name.as_str())) {
            // The biases of queries, keys and values may be missing, and torchvision's layers are counted.
            let qkv_bias = ["query.bias", "key.bias", "value.bias"].iter().any(|part| name.ends_with(part));
            if qkv_bias || name.ends_with("ln_1.weight") {
                continue;
            }
            let error = refused(layout, "model.safetensors", |file| drop(file.remove(name)), open);
            says(&error, &[name, "missing"]);
        }
    }
    let reset = |file: &mut File| reshape(file, "embeddings.position_embeddings", &[1, 16, 32]);
    says(&refused("hf", "model.safetensors", reset, open), &["position_embeddings", "[1, 16, 32]", "[1, 17, 32]"]);
    let odd = |file: &mut File| reshape(file, "encoder.pos_embedding", &[1, 16, 32]);
    says(&refused("torchvision", "model.safetensors", odd, open), &["encoder.pos_embedding", "16 tokens"]);
    let none = |file: &mut File| file.retain(|name, _| name.contains("ln_1") && name.contains("_1.ln"));
    says(&refused("torchvision", "model.safetensors", none, open), &["class_token", "embeddings.cls_token"]);

    let dir = copy("torchvision");
    std::fs::remove_file(dir.path().join("config.json")).unwrap();
    says(&error(Vit::open(dir.path())), &["hidden size 32", "num_attention_heads"]);
    let dir = copy("hf");
    let config = std::fs::read_to_string(dir.path().join("config.json")).unwrap();
    for (from, to, words) in [
        ("\"patch_size\": 8", "\"patch_size\": 5", vec!["patch size 5", "32"]),
        ("\"patch_size\": 8", "\"patch_size\": 0", vec!["size"]),
        ("\"image_size\": 32", "\"image_size\": 64000", vec!["64000", "4096"]),
        ("\"image_size\": 32", "\"image_size\": 99999999999999", vec!["99999999999999"]),
        ("\"num_attention_heads\": 2", "\"num_attention_heads\": 3", vec!["3 attention heads"]),
        ("\"num_hidden_layers\": 3", "\"num_hidden_layers\": 60000", vec!["is missing"]),
        ("\"model_type\": \"vit\"", "\"model_type\": \"deit\"", vec!["model_type", "deit"]),
        ("\"hidden_act\": \"gelu\"", "\"hidden_act\": \"relu\"", vec!["hidden_act", "relu"]),
    ] {
        assert!(config.contains(from));
        std::fs::write(dir.path().join("config.json"), config.replace(from, to)).unwrap();
        says(&error(Vit::open(dir.path())), &words);
    }
    std::fs::remove_file(dir.path().join("config.json")).unwrap();
    says(&error(Vit::open(dir.path())), &["config.json", "no such file"]);
    says(&error(Vit::open(Path::new("/nowhere/at/all"))), &["/nowhere/at/all", "not there"]);
}

#[test]
fn pixels_and_layers() {
    let vit = Vit::open(&fixture("hf")).unwrap();
    let pixels = Array3::zeros((3, 32, 32));
    says(&error(vit.features(&Array3::zeros((3, 32, 31)), &[2])), &["[3, 32, 31]", "[3, 32, 32]"]);
    says(&error(vit.features(&(&pixels + f32::NAN), &[2])), &["finite"]);
    for layers in [vec![3], vec![2, 1], vec![1, 1]] {
        says(&error(vit.features(&pixels, &layers)), &[&format!("{layers:?}")]);
    }
    assert!(vit.features(&pixels, &[]).unwrap().inputs.is_empty());
    let bad = AdapterConfig { layers: vec![], ..config() };
    says(&error(bad.check("it")), &["it: "]);
}

fn png(width: u32, height: u32) -> Vec<u8> {
    encoded(&DynamicImage::new_luma8(width, height), ImageFormat::Png)
}

fn encoded(image: &DynamicImage, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Cursor::new(Vec::new());
    image.write_to(&mut bytes, format).unwrap();
    bytes.into_inner()
}

#[test]
fn images() {
    let vit = Vit::open(&fixture("torchvision")).unwrap();
    let prepare = Preprocess::new(vit.config());
    let refused = |bytes: &[u8]| error(prepare.decode(bytes, "it"));
    says(&refused(b"not an image"), &["it: ", "PNG or JPEG"]);
    says(&refused(b""), &["it: ", "PNG or JPEG"]);
    says(&refused(b"GIF89a whatever else"), &["it: ", "PNG or JPEG"]);
    let photo = std::fs::read(fixture("photo.png")).unwrap();
    for end in [10, 40, 1000] {
        says(&refused(&photo[..end]), &["it: ", "cannot be decoded"]);
    }
    says(&refused(&png(320, 9)), &["320 x 9", "32 times"]);
    assert_eq!(prepare.decode(&png(319, 10), "it").unwrap().dim(), (3, 32, 32));
    // A few bytes that would be gigabytes.
    let mut jpeg = encoded(&DynamicImage::new_rgb8(16, 16), ImageFormat::Jpeg);
    let size = jpeg.windows(2).position(|pair| pair == [0xff, 0xc0]).unwrap() + 5;
    jpeg[size..size + 4].copy_from_slice(&[0x3e, 0x80, 0x3e, 0x80]);
    says(&refused(&jpeg), &["16000 x 16000", "256 MiB"]);
    jpeg[size..size + 4].copy_from_slice(&[0xff; 4]);
    says(&refused(&jpeg), &["it: "]);
    says(&error(prepare.file(Path::new("/nowhere.png"))), &["/nowhere.png"]);
    // Any other damage is an error or an image, and no panic.
    for at in (0..photo.len()).step_by(37) {
        let mut photo = photo.clone();
        photo[at] ^= 0x5a;
        let _ = prepare.decode(&photo, "it");
    }
}

#[test]
fn jpeg_grey_and_transparent() {
    let vit = Vit::open(&fixture("hf")).unwrap();
    let prepare = Preprocess::open(&fixture("hf"), vit.config()).unwrap();
    let white = ::image::RgbImage::from_pixel(50, 20, ::image::Rgb([255; 3]));
    for image in [DynamicImage::from(white.clone()), DynamicImage::from(white).to_luma8().into()] {
        let got = prepare.decode(&encoded(&image, ImageFormat::Jpeg), "it").unwrap();
        assert!(got.iter().all(|v| (v - 1.0).abs() < 1e-6));
    }
    let clear = ::image::RgbaImage::from_pixel(5, 5, ::image::Rgba([255, 0, 255, 0]));
    let got = prepare.decode(&encoded(&clear.into(), ImageFormat::Png), "it").unwrap();
    assert_eq!([got[[0, 3, 3]], got[[1, 3, 3]], got[[2, 3, 3]]], [1.0, -1.0, 1.0]);
}

#[test]
fn preprocessor_config() {
    let dir = copy("hf");
    let vit = Vit::open(dir.path()).unwrap();
    let open = |json: &str| {
        std::fs::write(dir.path().join("preprocessor_config.json"), json).unwrap();
        Preprocess::open(dir.path(), vit.config())
    };
    let default = Preprocess::new(vit.config());
    let usual = r#"{"do_normalize": true, "do_rescale": true, "do_resize": true, "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5], "resample": 2, "rescale_factor": 0.00392156862745098,
        "size": {"height": 32, "width": 32}}"#;
    assert_eq!(open(usual).unwrap(), default);
    assert_eq!(open(r#"{"size": 32}"#).unwrap(), default);
    let cropped = open(r#"{"size": {"shortest_edge": 40}, "do_center_crop": true, "crop_size": 32, "resample": 3}"#);
    assert_eq!(cropped.unwrap(), Preprocess { shorter: Some(40), filter: super::image::Filter::Bicubic, ..default });
    for (json, words) in [
        (r#"{"size": 224}"#, vec!["size", "224", "32"]),
        (r#"{"size": {"height": 32, "width": 31}}"#, vec!["size", "height"]),
        (r#"{"size": {"shortest_edge": 40}}"#, vec!["size"]),
        (r#"{"size": {"shortest_edge": 30}, "do_center_crop": true}"#, vec!["30"]),
        (r#"{"size": 40, "do_center_crop": true, "crop_size": 32}"#, vec!["size"]),
        (r#"{"do_center_crop": true, "crop_size": {"height": 16, "width": 16}}"#, vec!["crop_size", "16"]),
        (r#"{"do_resize": false}"#, vec!["do_resize"]),
        (r#"{"resample": 0}"#, vec!["resample"]),
        (r#"{"image_mean": [0.5, 0.5]}"#, vec!["image_mean", "three numbers"]),
        (r#"{"image_std": [0.5, 0.5, 0]}"#, vec!["image_std", "above 0"]),
        (r#"{"rescale_factor": -1}"#, vec!["rescale_factor"]),
    ] {
        says(&error(open(json)), &words);
    }
}
