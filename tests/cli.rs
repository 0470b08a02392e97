//! The command: what it prints when all is well, and that whatever is wrong ends with an error that names the culprit, an
//! exit code that is not 0, no panic and nothing on standard output that could be taken for a result.

use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};

use assert_cmd::Command;
use serde_json::{Value, json};
use tempfile::TempDir;

fn quill() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/quill-4m")
}

/// A copy of the bundled model that a test may break.
fn copy() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(quill()).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
    }
    dir
}

fn generate(model: &Path, args: &[&str]) -> Output {
    let mut command = Command::cargo_bin("trefoil").unwrap();
    command.arg("generate").arg("--model").arg(model).args(args).timeout(std::time::Duration::from_secs(120));
    command.output().unwrap()
}

/// Fails as it should, with and without `--json`.
#[track_caller]
fn refused(model: &Path, args: &[&str], parts: &[&str]) {
    for json in [true, false] {
        let args: Vec<&str> = args.iter().copied().chain(json.then_some("--json")).collect();
        let out = generate(model, &args);
        let stderr = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.code().is_some_and(|c| c != 0), "{args:?}: {:?} {stderr}", out.status);
        assert!(stderr.contains("error:") && !stderr.contains("panicked"), "{args:?}: {stderr}");
        for part in parts {
            assert!(stderr.contains(part), "{args:?}: no `{part}` in: {stderr}");
        }
        assert!(out.stdout.is_empty(), "{args:?} printed {}", String::from_utf8_lossy(&out.stdout));
    }
}

const SHORT: [&str; 4] = ["--prompt", "It was", "--max-new-tokens", "2"];

#[track_caller]
fn good(args: &[&str]) -> Value {
    let out = generate(&quill(), args);
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{stderr}");
    assert!(stderr.is_empty(), "with --json nothing but JSON is printed: {stderr}");
    serde_json::from_slice(&out.stdout).unwrap()
}

#[test]
fn one_json_object_with_all_the_figures() {
    let start = std::time::Instant::now();
    let r = good(&["--prompt", "It was a bright morning", "--max-new-tokens", "8", "--json", "--check"]);
    eprintln!("{:.2} s: {r}", start.elapsed().as_secs_f64());
    assert_eq!(r["tokens"].as_array().unwrap().len(), 8);
    assert!(r["tokens"].as_array().unwrap().iter().all(|t| t.as_u64().unwrap() < 2048));
    assert!(!r["text"].as_str().unwrap().is_empty());
    assert_eq!((&r["prompt_tokens"], &r["public_layers"], &r["private_layers"]), (&json!(6), &json!(4), &json!(4)));
    assert_eq!((&r["private_embedding"], &r["stop"]), (&json!(false), &json!("length")));
    assert!(r["prefill_ms"].as_f64().unwrap() > 0.0);
    let (median, p95) = (r["decode_ms"]["median"].as_f64().unwrap(), r["decode_ms"]["p95"].as_f64().unwrap());
    assert!(median > 0.0 && p95 >= median);
    assert_eq!(r["messages_per_private_layer"], 36);
    let links = r["links"].as_object().unwrap();
    let mut names: Vec<&str> = links.keys().map(String::as_str).collect();
    names.sort_unstable();
    let six = ["client->helper", "client->owner", "helper->client", "helper->owner", "owner->client", "owner->helper"];
    assert_eq!(names, six);
    for (name, link) in links {
        let fields: Vec<u64> =
            ["online_bytes", "ahead_bytes", "messages"].iter().map(|f| link[f].as_u64().unwrap()).collect();
        assert_eq!(link.as_object().unwrap().len(), 3);
        assert_eq!(fields[2] == 0, fields[0] + fields[1] == 0, "{name}: messages have bytes");
    }
    assert_eq!(links["helper->client"]["messages"], 0, "the helper tells the client nothing");
    assert!(r["peak_memory_bytes"].as_u64().unwrap() > 1 << 20);
    let check = &r["check"];
    assert_eq!((&check["agree"], &check["of"]), (&json!(8), &json!(8)));
    assert!(check["max_kl"].as_f64().unwrap() < 1e-3 && check["max_logit_error"].as_f64().unwrap() < 0.5);
}

#[test]
fn text_on_standard_output_figures_on_standard_error() {
    let out = generate(&quill(), &["--prompt", "It was a bright", "--max-new-tokens", "3", "--net", "lan"]);
    assert!(out.status.success());
    let (stdout, stderr) = (String::from_utf8(out.stdout).unwrap(), String::from_utf8(out.stderr).unwrap());
    assert!(stdout.starts_with("It was a bright") && stdout.len() > 16 && stdout.ends_with('\n'), "{stdout}");
    for part in ["4 public", "0.1 ms round trip", "owner->helper", "messages", "peak memory"] {
        assert!(stderr.contains(part), "{stderr}");
    }
}

#[test]
fn options_that_work() {
    let all =
        good(&["--prompt", "It was", "--max-new-tokens", "3", "--private-layers", "all", "--json", "--net", "2,1"]);
    assert_eq!(
        (&all["public_layers"], &all["private_layers"], &all["private_embedding"]),
        (&json!(0), &json!(8), &json!(true))
    );
    assert!(all.get("check").is_none(), "logits are opened only when asked for");
    let none = good(&["--prompt", "It was", "--max-new-tokens", "3", "--private-layers", "0", "--json"]);
    assert_eq!((&none["public_layers"], &none["private_layers"]), (&json!(8), &json!(0)));
    // Fixed point rounds at fresh masks, so a sample near a boundary may differ from run to run: valid, not equal.
    let hot = good(&[
        "--prompt",
        "It was",
        "--max-new-tokens",
        "4",
        "--temperature",
        "4",
        "--seed",
        "7",
        "--json",
        "--check",
    ]);
    assert!(hot["tokens"].as_array().unwrap().iter().all(|t| t.as_u64().unwrap() < 2048));
    assert_eq!(hot["check"]["agree"], hot["check"]["of"]);
    let huge = good(&["--prompt", "It", "--max-new-tokens", "18446744073709551615", "--context", "4", "--json"]);
    assert!(huge["tokens"].as_array().unwrap().len() <= 4);
    let huge = good(&[
        "--prompt",
        "It was a bright morning",
        "--max-new-tokens",
        "18446744073709551615",
        "--context",
        "7",
        "--json",
    ]);
    // Positions 1 to 6 are the prompt's and 7 the first new token's; nothing follows the second, which needs none.
    assert_eq!(huge["tokens"].as_array().unwrap().len(), 2);
}

#[test]
fn prompts_that_cannot_be() {
    let short = |prompt: &'static str| ["--prompt", prompt, "--max-new-tokens", "2"];
    refused(&quill(), &short(""), &["--prompt is empty"]);
    let long = "word after ".repeat(300);
    refused(&quill(), &["--prompt", &long], &["the context is 256", "shorten the prompt"]);
    refused(&quill(), &["--prompt", "It was a bright morning", "--context", "3"], &["6 tokens", "context is 3"]);
    refused(&quill(), &["--prompt", "It was", "--context", "0"], &["context is 0"]);
    refused(&quill(), &["--max-new-tokens", "2"], &["--prompt"]);
}

#[test]
fn options_that_cannot_be() {
    let with = |more: &[&'static str]| SHORT.iter().copied().chain(more.iter().copied()).collect::<Vec<_>>();
    for n in ["9", "some", "-1", "1.5", "99999999999999999999", ""] {
        refused(&quill(), &with(&["--private-layers", n]), &["--private-layers"]);
        refused(&quill(), &with(&[Box::leak(format!("--private-layers={n}").into_boxed_str())]), &["--private-layers"]);
    }
    refused(&quill(), &with(&["--private-layers", "9"]), &["8 layers"]);
    for t in ["-1", "4.1", "NaN", "inf", "hot"] {
        refused(&quill(), &with(&[Box::leak(format!("--temperature={t}").into_boxed_str())]), &["temperature"]);
    }
    for net in ["fast", "1", "1,0", "-1,1", "nan,1", "1,inf", "1,1e-300", "1,9e-7", "", "lan,wan"] {
        refused(&quill(), &with(&[Box::leak(format!("--net={net}").into_boxed_str())]), &["--net"]);
    }
    refused(&quill(), &["--prompt", "It was", "--max-new-tokens", "0"], &["max-new-tokens"]);
    refused(&quill(), &["--prompt", "It was", "--max-new-tokens", "many"], &["max-new-tokens"]);
    refused(&quill(), &with(&["--seed", "-4"]), &["'-4'"]);
    refused(
        &quill(),
        &with(&["--calibration-text", "/nonexistent/text"]),
        &["--calibration-text", "/nonexistent/text"],
    );
    let dir = tempfile::tempdir().unwrap();
    let binary = dir.path().join("binary");
    std::fs::write(&binary, [0xff, 0xfe, 0x00]).unwrap();
    let binary = Box::leak(binary.display().to_string().into_boxed_str());
    refused(&quill(), &with(&["--calibration-text", binary]), &["--calibration-text", "UTF-8"]);
}

#[test]
fn files_and_bases_that_cannot_be() {
    let with = |more: &[&'static str]| SHORT.iter().copied().chain(more.iter().copied()).collect::<Vec<_>>();
    let dir = tempfile::tempdir().unwrap();
    let large = dir.path().join("large");
    // Sparse: 65 MB of nothing.
    std::fs::File::create(&large).unwrap().set_len(65 << 20).unwrap();
    let large = Box::leak(large.display().to_string().into_boxed_str());
    refused(&quill(), &with(&["--calibration-text", large]), &["--calibration-text", "longer than"]);
    for not_a_file in ["/dev/zero", "/"] {
        refused(&quill(), &with(&["--calibration-text", not_a_file]), &["--calibration-text", "regular file"]);
    }
    let fixture = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/llama-plain");
    refused(&quill(), &with(&["--base", fixture]), &["--base", "hidden_size is 32", "192"]);
    refused(
        &quill(),
        &with(&["--base", concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/qwen3-qknorm")]),
        &["--base", "Qwen3"],
    );
}

/// The bundled model with a bit of the tensor `name` flipped.
fn flipped(name: &str) -> tempfile::TempDir {
    let dir = copy();
    let path = dir.path().join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let at = 8 + length + header[name]["data_offsets"][0].as_u64().unwrap() as usize;
    bytes[at] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    dir
}

#[test]
fn a_base_with_another_norm_leaves_the_head_private_and_says_so() {
    let quiet = good(&[&SHORT[..], &["--json", "--base", quill().to_str().unwrap()]].concat());
    assert_eq!(quiet["private_head"], false);
    let base = flipped("model.norm.weight");
    let out = generate(&quill(), &[&SHORT[..], &["--json", "--base", base.path().to_str().unwrap()]].concat());
    let stderr = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success() && stderr.contains("warning: final norm and head"), "{stderr}");
    assert_eq!(serde_json::from_slice::<Value>(&out.stdout).unwrap()["private_head"], true);
}

#[test]
fn layers_that_were_trained_are_not_made_public_beside_a_base() {
    for (name, says) in
        [("model.layers.3.mlp.up_proj.weight", "layer 3"), ("model.embed_tokens.weight", "the embedding")]
    {
        let base = flipped(name);
        let base = base.path().to_str().unwrap();
        refused(
            &quill(),
            &[&SHORT[..], &["--private-layers", "4", "--base", base]].concat(),
            &["--base", says, "public"],
        );
        if name.contains("layers.3") {
            good(&[&SHORT[..], &["--private-layers", "5", "--json", "--base", base]].concat());
        }
    }
}

#[test]
fn calibration_text_of_any_kind() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("text");
    for text in ["", "x", &"Some other text. ".repeat(200)] {
        std::fs::write(&file, text).unwrap();
        let args = ["--calibration-text", file.to_str().unwrap(), "--json", "--check", "--private-layers", "1"];
        let r = good(&SHORT.iter().copied().chain(args).collect::<Vec<_>>());
        assert_eq!(r["check"]["agree"], r["check"]["of"], "{r}");
    }
}

/// Changes the header of `model.safetensors`; the data stay as they are.
fn edit_header(dir: &TempDir, edit: impl FnOnce(&mut Value)) {
    let path = dir.path().join("model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    edit(&mut header);
    let header = serde_json::to_vec(&header).unwrap();
    std::fs::write(path, [&(header.len() as u64).to_le_bytes()[..], &header, &bytes[8 + length..]].concat()).unwrap();
}

#[test]
fn broken_models() {
    refused(Path::new("/nonexistent/model"), &SHORT, &["/nonexistent/model/config.json"]);
    let dir = copy();
    let weights = dir.path().join("model.safetensors");
    refused(&weights, &SHORT, &["model.safetensors"]); // a file, not a directory
    let bytes = std::fs::read(&weights).unwrap();
    for length in [bytes.len() - 1, bytes.len() / 2, 100, 0] {
        std::fs::write(&weights, &bytes[..length]).unwrap();
        refused(dir.path(), &SHORT, &["model.safetensors"]);
    }
    let mut corrupt = bytes.clone();
    corrupt[8] = b'x';
    std::fs::write(&weights, corrupt).unwrap();
    refused(dir.path(), &SHORT, &["model.safetensors", "header"]);

    // A weight that is no number (bfloat16).
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let tensor = &header["model.layers.3.mlp.up_proj.weight"];
    assert_eq!(tensor["dtype"], "BF16");
    let at = 8 + length + tensor["data_offsets"][0].as_u64().unwrap() as usize;
    let mut nan = bytes.clone();
    nan[at..at + 2].copy_from_slice(&0x7fc0u16.to_le_bytes());
    std::fs::write(&weights, nan).unwrap();
    refused(dir.path(), &SHORT, &["`model.layers.3.mlp.up_proj.weight`", "NaN"]);

    std::fs::write(&weights, &bytes).unwrap();
    edit_header(&dir, |h| {
        let tensors = h.as_object_mut().unwrap();
        let tensor = tensors.remove("model.layers.1.mlp.up_proj.weight").unwrap();
        tensors.insert("unknown".to_owned(), tensor);
    });
    refused(dir.path(), &SHORT, &["`model.layers.1.mlp.up_proj.weight` is missing"]);
    std::fs::write(&weights, &bytes).unwrap();
    edit_header(&dir, |h| h["model.layers.0.mlp.down_proj.weight"]["shape"] = json!([512, 192]));
    refused(dir.path(), &SHORT, &["`model.layers.0.mlp.down_proj.weight`", "[512, 192]"]);
    std::fs::remove_file(&weights).unwrap();
    refused(dir.path(), &SHORT, &["model.safetensors"]);
}

#[test]
fn broken_configurations_and_tokenizers() {
    let dir = copy();
    let (config, tokenizer) = (dir.path().join("config.json"), dir.path().join("tokenizer.json"));
    let good = std::fs::read(&config).unwrap();
    let mut json: Value = serde_json::from_slice(&good).unwrap();
    json["architectures"] = json!(["GPT2LMHeadModel"]);
    std::fs::write(&config, json.to_string()).unwrap();
    refused(dir.path(), &SHORT, &["config.json", "`GPT2LMHeadModel`"]);
    std::fs::write(&config, "{").unwrap();
    refused(dir.path(), &SHORT, &["config.json", "JSON"]);
    std::fs::write(&config, [0xff, 0xff]).unwrap();
    refused(dir.path(), &SHORT, &["config.json"]);
    std::fs::write(&config, &good).unwrap();
    let text = std::fs::read(&tokenizer).unwrap();
    for bad in [&b"\xff\xfe\x00 not UTF-8"[..], b"{}", b"", &text[..text.len() / 2]] {
        std::fs::write(&tokenizer, bad).unwrap();
        refused(dir.path(), &SHORT, &["tokenizer.json"]);
    }
    std::fs::remove_file(&tokenizer).unwrap();
    refused(dir.path(), &SHORT, &["tokenizer.json"]);
}

/// Nothing reads the text any more: the command ends, it does not panic.
#[test]
fn a_closed_pipe() {
    for args in [&["--json"][..], &[]] {
        let mut child = std::process::Command::new(assert_cmd::cargo::cargo_bin("trefoil"))
            .arg("generate")
            .arg("--model")
            .arg(quill())
            .args(SHORT)
            .args(args)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        drop(child.stdout.take());
        let out = child.wait_with_output().unwrap();
        let stderr = String::from_utf8_lossy(&out.stderr);
        assert!(!stderr.contains("panicked"), "{stderr}");
    }
}
