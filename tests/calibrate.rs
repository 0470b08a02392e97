//! `trefoil calibrate`: ranges, headroom and plan of the bundled model; what does not fit, all of it, by name.

use std::path::{Path, PathBuf};
use std::process::Output;

use assert_cmd::Command;
use serde_json::Value;
use trefoil::model::ModelConfig;
use trefoil::plan::{Bounds, FW_LEAST, LayerBounds, LayerFractions, LayerRanges, Ranges, plan, propose};

fn quill() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/quill-4m")
}

fn text(content: &[u8]) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), content).unwrap();
    file
}

fn calibrate(file: &Path, args: &[&str]) -> Output {
    let mut c = Command::cargo_bin("trefoil").unwrap();
    c.arg("calibrate").arg("--model").arg(quill()).arg("--text").arg(file).args(args).output().unwrap()
}

fn prose() -> String {
    "The morning was bright, and the two men walked along the river until they came to the old house. ".repeat(12)
}

#[test]
fn every_table_has_headroom_and_the_plan_is_one_that_runs() {
    let file = text(prose().as_bytes());
    let out = calibrate(file.path(), &["--context", "64", "--json", "--private-layers", "3"]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let r: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!((&r["fits"], &r["context"], &r["private_layers"]), (&true.into(), &64.into(), &3.into()));
    assert_eq!(r["plan"]["layers"].as_array().unwrap().len(), 3);
    assert!(r["warnings"].as_array().unwrap().is_empty() && r["tokens"].as_u64().unwrap() > 128);
    let rows = r["headroom"].as_array().unwrap();
    for quantity in ["sum of squares before attention", "score", "largest score of a row", "gate"] {
        assert_eq!(rows.iter().filter(|h| h["quantity"] == quantity).count(), 3, "{quantity}");
    }
    for h in rows {
        if let Some(bits) = h["headroom_bits"].as_f64() {
            assert!(bits > 0.0, "the plan is made for this text: {h}");
            assert!(h["guard"].as_f64().unwrap() > h["largest"].as_f64().unwrap(), "{h}");
        } else {
            assert!(h["proven"].as_f64().unwrap() >= h["largest"].as_f64().unwrap(), "{h}");
        }
    }
    let gate = rows.iter().find(|h| h["quantity"] == "gate").unwrap();
    assert_eq!(gate["ring"], r["plan"]["layers"][0]["mlp"]["gate_k"]);
}

#[test]
fn text_output_and_a_short_text() {
    let file = text(b"A short text.");
    let out = calibrate(file.path(), &[]);
    let stdout = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    for part in ["warning", "less than two contexts", "largest score of a row", "headroom", "4 private layers"] {
        assert!(stdout.contains(part), "{part} in {stdout}");
    }
}

#[test]
fn texts_that_are_none() {
    for (content, part) in [(&b""[..], "is empty"), (b" \n\t", "is empty"), (b"abc\xff\xfe", "not UTF-8 from byte 3")] {
        let file = text(content);
        let out = calibrate(file.path(), &[]);
        let stderr = String::from_utf8_lossy(&out.stderr);
        let name = file.path().display().to_string();
        assert!(!out.status.success() && stderr.contains(part) && stderr.contains(&name), "{stderr}");
        assert!(out.stdout.is_empty());
    }
    let out = calibrate(Path::new("/no/such/text"), &[]);
    assert!(!out.status.success() && String::from_utf8_lossy(&out.stderr).contains("/no/such/text"));
}

/// A copy of the bundled model with its bfloat16 tensors of some names scaled by 2^`by`.
fn scaled(names: &[&str], by: u16) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(quill()).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
    }
    let file = dir.path().join("model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    for name in names {
        let t = &header[name];
        let exponent = match t["dtype"].as_str().unwrap() {
            "BF16" => 7,
            "F16" => 10,
            other => panic!("{other}"),
        };
        let [from, to] = [0, 1].map(|i| t["data_offsets"][i].as_u64().unwrap() as usize + 8 + length);
        for word in bytes[from..to].chunks_mut(2) {
            let v = u16::from_le_bytes([word[0], word[1]]);
            if v & 0x7fff != 0 {
                word.copy_from_slice(&(v + (by << exponent)).to_le_bytes());
            }
        }
    }
    std::fs::write(&file, bytes).unwrap();
    dir
}

#[test]
fn all_that_does_not_fit_is_named() {
    let names = ["model.layers.5.mlp.up_proj.weight", "model.layers.7.mlp.gate_proj.weight"];
    let dir = scaled(&names, 18);
    let file = text(prose().as_bytes());
    for json in [false, true] {
        let mut c = Command::cargo_bin("trefoil").unwrap();
        c.args(["calibrate", "--context", "64", "--model"]).arg(dir.path()).arg("--text").arg(file.path());
        if json {
            c.arg("--json");
        }
        let out = c.output().unwrap();
        let stdout = String::from_utf8_lossy(&out.stdout);
        assert_eq!(out.status.code(), Some(1), "{stdout}");
        for part in ["layer 5", "layer 7", "remedy"] {
            assert!(stdout.contains(part), "{part} in {stdout}");
        }
    }
}

#[test]
fn a_plan_and_a_proposal_are_the_same() {
    let c = ModelConfig { tie_word_embeddings: true, ..ModelConfig::llama(64, 128, 3, 4, 100, 64) };
    let bound = LayerBounds {
        f: LayerFractions::default(),
        qk: 30.0,
        qk_raw: 30.0,
        v: 9.0,
        score: 200.0,
        attention: 20.0,
        gate: 30.0,
        up: 20.0,
        mlp: 90.0,
        mlp_slope: 1.0,
        ..LayerBounds::default()
    };
    let range = LayerRanges {
        input_sum: (3.0, 400.0),
        post_sum: (3.0, 400.0),
        score: 9.0,
        row_max: (-1.0, 8.0),
        gate: 6.0,
        qk_sum: None,
    };
    let mut bounds = Bounds { layers: vec![bound; 3], f_head: FW_LEAST, logit: 90.0, embedding: 1.0 };
    let ranges = Ranges { layers: vec![range; 3], final_sum: (9.0, 900.0), logit: 20.0 };
    let fine = propose(&c, 0, true, &bounds, &ranges).unwrap();
    assert_eq!(fine, plan(&c, 0, true, &bounds, &ranges).unwrap());
    for bad in [1e9, 1e30, f64::INFINITY] {
        bounds.layers[0].gate = bad;
        bounds.layers[2].v = bad;
        bounds.logit = bad;
        let misfits = propose(&c, 0, true, &bounds, &ranges).unwrap_err();
        let places: Vec<&str> = misfits.iter().map(|m| m.place.as_str()).collect();
        for place in ["layer 0", "layer 2", "the head"] {
            assert!(places.contains(&place), "{bad}: {misfits:?}");
        }
        let first = plan(&c, 0, true, &bounds, &ranges).unwrap_err().to_string();
        assert_eq!(first, misfits[0].to_string());
    }
}
