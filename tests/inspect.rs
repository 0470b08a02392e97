//! `trefoil inspect` and `trefoil recommend`.

use assert_cmd::Command;
use serde_json::Value;
use trefoil::model::ModelConfig;

#[allow(clippy::duplicate_mod)]
#[path = "support/models.rs"]
mod models;
use models::{fixture, quill};

fn trefoil(args: &[&str]) -> std::process::Output {
    Command::cargo_bin("trefoil").unwrap().args(args).output().unwrap()
}

fn json(args: &[&str]) -> Value {
    let out = trefoil(args);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_slice(&out.stdout).unwrap()
}

#[test]
fn what_is_public_and_private_adds_up() {
    let dir = quill();
    let all = ModelConfig::open(&dir).unwrap().parameter_count();
    let dir = dir.to_str().unwrap();
    for private in ["0", "2", "8", "all"] {
        let r = json(&["inspect", dir, "--private-layers", private, "--base", dir, "--json"]);
        let of = |name: &str| r[name].as_u64().unwrap();
        assert_eq!(of("public_parameters") + of("private_parameters"), all, "{private}");
        // The model is its own base: all layers are found to be the base's, and its head is public.
        assert_eq!(of("layers_of_base"), 8, "{private}");
        assert_eq!(r["private_head"], Value::Bool(false), "{private}");
        let private_layers: u64 = r["layers"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|l| l["private"] == true)
            .map(|l| l["last"].as_u64().unwrap() - l["first"].as_u64().unwrap() + 1)
            .sum();
        assert_eq!(private_layers, private.parse().unwrap_or(8), "{private}");
        assert_eq!(r["cost"]["private_layers"].as_u64().unwrap(), private_layers);
    }
    let text = String::from_utf8(trefoil(&["inspect", dir]).stdout).unwrap();
    assert!(text.contains("layers 4-7") && text.contains("private") && text.contains("8 query"), "{text}");
}

/// Fewer private layers than a model's own record says would give away what was trained.
#[test]
fn what_was_trained_is_not_given_away_by_an_option() {
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(fixture("llama-plain")).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
    }
    let at = dir.path().to_str().unwrap();
    for (record, fewer, enough) in [("2", vec!["0", "1"], vec!["2", "all"]), ("\"all\"", vec!["1", "2"], vec!["all"])] {
        let record = format!("{{\"version\": 1, \"private_layers\": {record}}}");
        std::fs::write(dir.path().join("trefoil.json"), record).unwrap();
        for n in fewer {
            let commands = [
                vec!["inspect", at, "--private-layers", n],
                vec!["cost", "--model", at, "--prefill", "4", "--decode", "2", "--private-layers", n],
                vec!["generate", "--model", at, "--prompt", "a", "--max-new-tokens", "1", "--private-layers", n],
            ];
            for command in commands {
                let out = trefoil(&command);
                let said = String::from_utf8_lossy(&out.stderr).into_owned();
                assert!(!out.status.success() && said.contains("given to every client"), "{command:?}: {said}");
            }
        }
        for n in enough {
            assert!(trefoil(&["inspect", at, "--private-layers", n]).status.success(), "{n}");
        }
        assert!(trefoil(&["inspect", at]).status.success());
    }
}

#[test]
fn techniques_are_held_against_the_full_fine_tune() {
    let (dir, net) = (quill(), ["--net", "lan"]);
    let request = ["recommend", "--model", dir.to_str().unwrap(), "--prefill", "16", "--decode", "4", "--json"];
    let rows = json(&[&request[..], &net[..]].concat());
    let row = |name: &str| {
        let found = rows.as_array().unwrap().iter().find(|r| r["technique"] == name);
        found.unwrap_or_else(|| panic!("{name}")).clone()
    };
    let fewer = |name: &str| row(name)["times_fewer_bytes"].as_f64().unwrap();
    assert!((fewer("full fine-tune") - 1.0).abs() < 1e-12);
    assert!(fewer("freeze 1/2") > 1.4 && fewer("freeze 3/4") > fewer("freeze 1/2"), "{rows:#}");
    assert!(fewer("merge 4 heads") > fewer("merge 2 heads") && fewer("merge 2 heads") > 1.05, "{rows:#}");
    assert!(fewer("freeze 1/2, merge 4") > fewer("freeze 1/2"), "{rows:#}");
    assert!(row("LoRA, rank 16")["impossible"].is_null(), "{rows:#}");
    assert!(fewer("freeze 1/2, LoRA") > 1.3 * fewer("LoRA, rank 16"), "{rows:#}");
    let messages = |name: &str| row(name)["token_messages"].as_u64().unwrap();
    assert!(messages("freeze 1/2") < messages("full fine-tune"));
    // One key/value head has no other to merge with.
    let one = fixture("llama-llama3");
    let rows = json(&["recommend", "--model", one.to_str().unwrap(), "--prefill", "4", "--decode", "2", "--json"]);
    let merged = rows.as_array().unwrap().iter().find(|r| r["technique"] == "merge 2 heads").unwrap().clone();
    assert!(merged["impossible"].as_str().unwrap().contains("1 key/value heads"), "{merged}");
}

#[test]
fn what_is_wrong_is_named() {
    for (args, named) in [
        (vec!["inspect", "nowhere"], "nowhere"),
        (vec!["recommend", "--prefill", "0", "--decode", "1"], "--prefill"),
        (vec!["recommend", "--prefill", "1", "--decode", "1", "--net", "fast"], "fast"),
    ] {
        let out = trefoil(&args);
        let error = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.code() == Some(1) && error.contains(named), "{args:?}: {error}");
    }
}
