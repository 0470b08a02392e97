//! `trefoil adapter`, and the labelled images that it reads.

use std::path::{Path, PathBuf};

use assert_cmd::Command;
use serde_json::Value;
use tempfile::TempDir;
use trefoil::cryptpeft::{Dataset, Example, Preprocess, Vit};

const BACKBONE: &str = "models/tiny-vit";
const ADAPTER: &str = "models/tiny-vit-shapes";
const MODEL: &str = "models/quill-4m";

fn trefoil(args: &[&str]) -> Command {
    let mut command = Command::cargo_bin("trefoil").unwrap();
    command.arg("adapter").args(args);
    command
}

fn refused(args: &[&str], want: &str) {
    let out = trefoil(args).assert().failure();
    let error = String::from_utf8_lossy(&out.get_output().stderr).into_owned();
    assert!(error.contains(want), "{args:?}: {error}");
}

fn json(args: &[&str]) -> Value {
    let out = trefoil(args).assert().success();
    serde_json::from_slice(&out.get_output().stdout).unwrap()
}

/// As a PNG file.
fn write(path: &Path, e: &Example) {
    let side = e.pixels.shape()[1] as u32;
    let byte = |c: usize, x: u32, y: u32| ((e.pixels[[c, y as usize, x as usize]] + 1.0) * 127.5).round() as u8;
    let image = image::RgbImage::from_fn(side, side, |x, y| image::Rgb([0, 1, 2].map(|c| byte(c, x, y))));
    image.save(path).unwrap();
}

/// Folders of the first images of each label.
fn folders(set: &Dataset, of_each: usize) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (n, name) in set.labels.iter().enumerate() {
        let folder = dir.path().join(name);
        std::fs::create_dir(&folder).unwrap();
        for (i, e) in set.test.iter().filter(|e| e.label == n).take(of_each).enumerate() {
            write(&folder.join(format!("{i}.png")), e);
        }
        std::fs::write(folder.join("notes.txt"), "no image").unwrap();
    }
    dir
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn synthetic_images() {
    let set = Dataset::synthetic(32, 8, 10, 3).unwrap();
    assert_eq!((set.train.len(), set.test.len(), set.labels.len()), (64, 16, 8));
    assert_eq!(set, Dataset::synthetic(32, 8, 10, 3).unwrap());
    assert_ne!(set, Dataset::synthetic(32, 8, 10, 4).unwrap());
    let all = || set.train.iter().chain(&set.test);
    for n in 0..8 {
        assert_eq!(all().filter(|e| e.label == n).count(), 10);
    }
    assert!(all().flat_map(|e| &e.pixels).all(|v| v.abs() <= 1.0));
    // More images change none of the others.
    assert!(set.train.iter().all(|e| Dataset::synthetic(32, 8, 15, 3).unwrap().train.contains(e)));
    for (image, classes, per_class, want) in [
        (32, 1, 10, "2 to 8"),
        (32, 9, 10, "2 to 8"),
        (32, 8, 4, "5 or more"),
        (0, 8, 10, "one pixel"),
        (4096, 8, 100, "2 GiB"),
    ] {
        let error = Dataset::synthetic(image, classes, per_class, 0).unwrap_err().to_string();
        assert!(error.contains(want), "{error}");
    }
}

#[test]
fn folders_of_images() {
    let vit = Vit::open(Path::new(BACKBONE)).unwrap();
    let preprocess = Preprocess::open(Path::new(BACKBONE), vit.config()).unwrap();
    let set = Dataset::synthetic(32, 3, 50, 3).unwrap();
    let dir = folders(&set, 10);
    let read = Dataset::folder(dir.path(), &preprocess, 0).unwrap();
    // Folders are in the order of their names.
    assert_eq!(read.labels, ["disc", "ring", "square"]);
    assert_eq!((read.train.len(), read.test.len()), (24, 6));
    assert_eq!(read, Dataset::folder(dir.path(), &preprocess, 0).unwrap());
    assert!(read.test.iter().all(|e| !read.train.contains(e)));
    let close = |a: &Example, b: &Example| a.pixels.iter().zip(&b.pixels).all(|(a, b)| (a - b).abs() < 0.01);
    for e in read.train.iter().chain(&read.test) {
        assert!(set.test.iter().any(|o| close(e, o) && set.labels[o.label] == read.labels[e.label]));
    }

    let refuse = |path: &Path, want: &str| {
        let error = Dataset::folder(path, &preprocess, 0).unwrap_err().to_string();
        assert!(error.contains(want), "{error}");
    };
    refuse(&dir.path().join("ring"), "one folder of PNG or JPEG files per label");
    refuse(&dir.path().join("none"), "none");
    std::fs::create_dir(dir.path().join("empty")).unwrap();
    refuse(dir.path(), "fewer than two");
    std::fs::write(dir.path().join("empty/a.png"), "x").unwrap();
    std::fs::write(dir.path().join("empty/b.png"), "x").unwrap();
    refuse(dir.path(), "empty/");
}

#[test]
fn it_says_what_images_show() {
    let set = Dataset::synthetic(32, 8, 25, 1).unwrap();
    let dir = folders(&set, 2);
    let file = |label: &str| dir.path().join(label).join("0.png");
    let files: Vec<PathBuf> = set.labels.iter().map(|l| file(l)).collect();
    let mut args = vec!["classify", "--backbone", BACKBONE, "--adapter", ADAPTER];
    args.extend(files.iter().map(|f| text(f)));
    let out = trefoil(&args).assert().success();
    let said = String::from_utf8_lossy(&out.get_output().stdout).into_owned();
    let right = said.lines().zip(&files).zip(&set.labels).filter(|((line, file), label)| {
        assert!(line.starts_with(text(file)), "{line}");
        line.ends_with(&format!("\t{label}"))
    });
    assert!(right.count() >= 6, "{said}");
    let summary = String::from_utf8_lossy(&out.get_output().stderr).into_owned();
    for want in ["in sequence per image", "owner->client", "32 synthetic images", "ms per image"] {
        assert!(summary.contains(want), "{want}: {summary}");
    }

    args.extend(["--logits", "--json", "--net", "lan", "--calibrate", text(dir.path())]);
    let report = json(&args);
    for (answer, line) in report["images"].as_array().unwrap().iter().zip(said.lines()) {
        assert!(line.ends_with(answer["name"].as_str().unwrap()), "{line}: {answer}");
        assert_eq!(answer["logits"].as_array().unwrap().len(), 8);
    }
    assert!(report["calibrated_on"].as_str().unwrap().contains("16 images of"), "{report}");
    assert!(report["messages_per_image"].as_u64().unwrap() > 10);
}

#[test]
fn it_measures() {
    let set = Dataset::synthetic(32, 8, 50, 1).unwrap();
    let dir = folders(&set, 10);
    let common = ["eval", "--backbone", BACKBONE, "--adapter", ADAPTER];
    let report = json(&[&common[..], &["--synthetic", "1", "--per-class", "25", "--secure", "4", "--json"]].concat());
    assert_eq!((report["test_images"].as_u64(), report["secure"]["images"].as_u64()), (Some(40), Some(4)));
    assert!(report["float_accuracy"].as_f64().unwrap() > 0.7, "{report}");
    assert_eq!(report["secure"]["clear"], report["secure"]["clear_same_label"]);
    assert!(report["secure"]["max_logit_error"].as_f64().unwrap() < 0.1, "{report}");

    refused(&common, "give --images DIR, one folder of them per label, or --synthetic SEED");
    // Folders in the order of their names, which is not the adapter's.
    let read = json(&[&common[..], &["--images", text(dir.path()), "--json"]].concat());
    assert!(read["float_accuracy"].as_f64().unwrap() > 0.6, "{read}");
    std::fs::rename(dir.path().join("ring"), dir.path().join("wheel")).unwrap();
    refused(&[&common[..], &["--images", text(dir.path())]].concat(), "the label `wheel` is none of the adapter's");
    refused(&[&common[..], &["--synthetic", "1", "--secure", "0"]].concat(), "--secure 0");
}

#[test]
fn what_does_not_fit_is_refused() {
    let common = ["classify", "--backbone", BACKBONE, "--adapter"];
    refused(&[&common[..], &["models/none", "x.png"]].concat(), "models/none");
    refused(&[&common[..], &[ADAPTER, "x.png"]].concat(), "x.png");
    refused(&[&common[..], &[ADAPTER, "--net", "moon", "x.png"]].concat(), "moon");
    refused(&[&common[..], &["tests/fixtures/cryptpeft-vit/adapter", "x.png"]].concat(), "hidden size");
    refused(
        &["train", "--backbone", BACKBONE, "--out", "x"],
        if cfg!(feature = "train") { "--synthetic SEED" } else { "--features train" },
    );
    refused(
        &["study", "--backbone", BACKBONE],
        if cfg!(feature = "train") { "--synthetic SEED" } else { "--features train" },
    );
}

#[test]
fn images_and_texts_are_not_mixed() {
    let of_images = ["eval", "--backbone", BACKBONE, "--adapter", ADAPTER];
    refused(&[&of_images[..], &["--synthetic-text", "1"]].concat(), "go with --model DIR");
    refused(&[&of_images[..], &["--model", MODEL, "--synthetic", "1"]].concat(), "cannot be used with");
    refused(&["eval", "--adapter", ADAPTER, "--synthetic", "1"], "--backbone <DIR>|--model <DIR>");
    refused(
        &["classify", "--backbone", BACKBONE, "--adapter", ADAPTER, "--text", "a"],
        "with --backbone give PNG or JPEG files",
    );
    refused(&["classify", "--backbone", BACKBONE, "--adapter", ADAPTER], "no images");
    refused(&["classify", "--model", MODEL, "--adapter", ADAPTER, "--text", "a"], "`model.embed_tokens.weight`");
}

#[cfg(feature = "train")]
#[test]
fn what_is_trained_over_a_language_model_can_be_used() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("adapter");
    let data = ["--synthetic-text", "5", "--per-class", "30"];
    let train = ["train", "--model", MODEL, "--out", text(&out), "--steps", "60", "--rank", "8", "--heads", "2"];
    let train = [&train[..], &["--json", "--layers", "1", "--window", "8"]].concat();
    let report = json(&[&train[..], &data].concat());
    assert_eq!(report["test_texts"], 24);
    let eval = ["eval", "--model", MODEL, "--adapter", text(&out), "--json"];
    let measured = json(&[&eval[..], &data, &["--secure", "4"]].concat());
    assert_eq!(measured["float_accuracy"], report["test_accuracy"]);
    assert!(measured["secure"]["max_logit_error"].as_f64().unwrap() < 0.1, "{measured}");

    let classify = ["classify", "--model", MODEL, "--adapter", text(&out)];
    let said =
        json(&[&classify[..], &["--text", "He saw the ship and was sad.", "--text", "A bed.", "--json"]].concat());
    let names: Vec<&str> = said["texts"].as_array().unwrap().iter().filter_map(|t| t["name"].as_str()).collect();
    assert!(names.len() == 2 && names.iter().all(|n| report["labels"].as_array().unwrap().contains(&(*n).into())));
    refused(&[&classify[..], &["x.png"]].concat(), "with --model give --text");
    refused(&classify, "no texts");
    refused(&[&classify[..], &["--text", ""]].concat(), "--text, number 1: the text is empty");
    refused(&eval, "no texts: give --texts PATH");
    refused(&[&eval[..], &["--synthetic", "1"]].concat(), "with --model give --texts PATH");
    refused(&[&train[..], &["--images", "x"]].concat(), "with --model give --texts PATH");
    refused(&["train", "--model", MODEL, "--out", "x", "--window", "0"], "an adapter can read 1 to 256");
    refused(&["train", "--backbone", BACKBONE, "--out", "x", "--window", "8"], "--window 8 goes with --model DIR");
}

#[cfg(feature = "train")]
#[test]
fn what_is_trained_can_be_used() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("adapter");
    let data = ["--synthetic", "5", "--classes", "3", "--per-class", "30"];
    let train = ["train", "--backbone", BACKBONE, "--out", text(&out), "--steps", "60", "--rank", "8", "--heads", "2"];
    let report = json(&[&train[..], &data, &["--json", "--layers", "1"]].concat());
    assert_eq!(report["test_images"], 18);
    let eval = ["eval", "--backbone", BACKBONE, "--adapter", text(&out), "--json"];
    let measured = json(&[&eval[..], &data].concat());
    assert_eq!(measured["float_accuracy"], report["test_accuracy"]);
}

#[cfg(feature = "train")]
#[test]
fn ways_and_places_are_compared() {
    let study =
        ["study", "--backbone", BACKBONE, "--synthetic", "1", "--classes", "2", "--per-class", "20", "--steps", "20"];
    let study = [&study[..], &["--rank", "8", "--heads", "2"]].concat();
    let rows = json(&[&study[..], &["--seeds", "2", "--at", "3,1-2", "--json"]].concat());
    let rows = rows.as_array().unwrap();
    assert_eq!(rows.len(), 8);
    for (row, (way, layers)) in rows.iter().zip([
        ("one-way", vec![3]),
        ("two-way", vec![3]),
        ("adaptformer", vec![3]),
        ("lora", vec![3]),
        ("one-way", vec![1, 2]),
    ]) {
        assert_eq!((&row["way"], &row["layers"]), (&way.into(), &layers.into()));
        assert_eq!((&row["train_images"], &row["test_images"]), (&32.into(), &8.into()));
        let accuracy = row["test_accuracy"].as_array().unwrap();
        assert!(accuracy.len() == 2 && accuracy.iter().all(|v| (0.0..=1.0).contains(&v.as_f64().unwrap())));
    }
    // Equal seeds, equal figures; a table for people.
    let again = [&study[..], &["--seeds", "1", "--at", "3", "--ways", "lora", "--json"]].concat();
    assert_eq!(json(&again)[0]["test_accuracy"][0], rows[3]["test_accuracy"][0]);
    let out =
        trefoil(&[&study[..], &["--seeds", "1", "--at", "3", "--ways", "one-way,lora"]].concat()).assert().success();
    let table = String::from_utf8_lossy(&out.get_output().stdout).into_owned();
    assert!(table.starts_with("| layers | one-way | lora |\n|---|---:|---:|\n| 3 |"), "{table}");
    for (args, want) in [
        (["--at", "4"], "layers from 0 to 3"),
        (["--at", "2-1"], "--at 2-1"),
        (["--ways", "both"], "one-way, two-way"),
        (["--seeds", "0"], "--seeds 0"),
        (["--heads", "3"], "--heads 3"),
        (["--steps", "0"], "--steps 0"),
    ] {
        refused(&[&study[..5], &["--per-class", "5"], &args[..]].concat(), want);
    }
}
