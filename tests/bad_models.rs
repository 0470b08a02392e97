//! Model directories that are broken, or hostile: each is refused with an error that names the culprit, without a panic
//! and without allocating what a false number asks for.

use std::path::{Path, PathBuf};

use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;
use trefoil::model::{Checkpoint, ModelConfig, TextCodec, Weights};

fn source(name: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    if name == "quill-4m" { root.join("models").join(name) } else { root.join("tests/fixtures").join(name) }
}

/// A copy of a fixture that a test may break.
fn copy(name: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(source(name)).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
    }
    dir
}

fn load(dir: &Path) -> trefoil::error::Result<Weights> {
    Weights::load(&Checkpoint::open(dir)?)
}

/// The error of loading `dir`, which must mention all of `parts`.
#[track_caller]
fn refused(dir: &Path, parts: &[&str]) {
    let message = load(dir).expect_err("a broken model was loaded").to_string();
    println!("{message}");
    for part in parts {
        assert!(message.contains(part), "no `{part}` in: {message}");
    }
}

fn edit_json(path: &Path, edit: impl FnOnce(&mut Value)) {
    let mut value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    edit(&mut value);
    std::fs::write(path, serde_json::to_vec(&value).unwrap()).unwrap();
}

/// Loads a copy of `llama-plain` with one field of config.json changed (null takes it out).
#[track_caller]
fn config_refused(field: &str, value: Value, parts: &[&str]) {
    let dir = copy("llama-plain");
    edit_json(&dir.path().join("config.json"), |config| {
        let fields = config.as_object_mut().unwrap();
        if value.is_null() {
            fields.remove(field)
        } else {
            fields.insert(field.to_owned(), value)
        };
    });
    refused(dir.path(), parts);
}

/// Rewrites the header of `model.safetensors`; the data stay as they are.
fn edit_header(path: &Path, edit: impl FnOnce(&mut Value)) {
    let bytes = std::fs::read(path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    edit(&mut header);
    let header = serde_json::to_vec(&header).unwrap();
    let all = [&(header.len() as u64).to_le_bytes()[..], &header, &bytes[8 + length..]].concat();
    std::fs::write(path, all).unwrap();
}

fn weights_file(dir: &TempDir) -> PathBuf {
    dir.path().join("model.safetensors")
}

#[test]
fn truncated_weights() {
    let dir = copy("llama-plain");
    let bytes = std::fs::read(weights_file(&dir)).unwrap();
    for (length, part) in [
        (bytes.len() - 1, "truncated"),
        (bytes.len() / 2, "truncated"),
        (100, "truncated"),
        (7, "7 bytes"),
        (0, "0 bytes"),
    ] {
        std::fs::write(weights_file(&dir), &bytes[..length]).unwrap();
        refused(dir.path(), &["model.safetensors", part]);
    }
    std::fs::write(weights_file(&dir), [&bytes[..], &[0]].concat()).unwrap();
    refused(dir.path(), &["model.safetensors", "other data"]);
}

#[test]
fn corrupt_header() {
    let dir = copy("llama-plain");
    let mut bytes = std::fs::read(weights_file(&dir)).unwrap();
    bytes[8] = b'x';
    std::fs::write(weights_file(&dir), bytes).unwrap();
    refused(dir.path(), &["model.safetensors", "corrupt header"]);
}

#[test]
fn header_that_claims_huge_lengths() {
    let dir = copy("llama-plain");
    let good = std::fs::read(weights_file(&dir)).unwrap();
    for claim in [u64::MAX, 1 << 40, 99_000_000] {
        std::fs::write(weights_file(&dir), [&claim.to_le_bytes()[..], &good[8..]].concat()).unwrap();
        refused(dir.path(), &["model.safetensors", &claim.to_string()]);
    }
    std::fs::write(weights_file(&dir), &good).unwrap();
    edit_header(&weights_file(&dir), |header| header["model.norm.weight"]["shape"] = json!([u64::MAX, 8]));
    refused(dir.path(), &["model.safetensors", "header"]);

    // Eight tensors of almost 2^61 bytes: their sum is just short of 2^64, so that a sum with the header overflows.
    let size = (1u64 << 61) - 1;
    let tensors: serde_json::Map<String, Value> = (0..8)
        .map(|i| (format!("t{i}"), json!({"dtype": "U8", "shape": [size], "data_offsets": [i * size, (i + 1) * size]})))
        .collect();
    let header = serde_json::to_vec(&tensors).unwrap();
    std::fs::write(weights_file(&dir), [&(header.len() as u64).to_le_bytes()[..], &header, &[0; 64]].concat()).unwrap();
    refused(dir.path(), &["model.safetensors", "truncated"]);
}

#[test]
fn missing_tensor() {
    let dir = copy("llama-plain");
    edit_header(&weights_file(&dir), |header| {
        let tensors = header.as_object_mut().unwrap();
        let tensor = tensors.remove("model.layers.1.mlp.up_proj.weight").unwrap();
        tensors.insert("unknown".to_owned(), tensor);
    });
    refused(dir.path(), &["model.safetensors", "`model.layers.1.mlp.up_proj.weight` is missing"]);
}

#[test]
fn wrong_shape() {
    let dir = copy("llama-plain");
    edit_header(&weights_file(&dir), |header| header["model.layers.0.mlp.down_proj.weight"]["shape"] = json!([64, 32]));
    refused(dir.path(), &["`model.layers.0.mlp.down_proj.weight`", "[64, 32]", "must be [32, 64]"]);
    config_refused("vocab_size", json!(1 << 20), &["`model.embed_tokens.weight`", "[128, 32]", "[1048576, 32]"]);
}

#[test]
fn unsupported_type() {
    let dir = copy("llama-plain");
    edit_header(&weights_file(&dir), |header| header["model.norm.weight"]["dtype"] = json!("I32"));
    refused(dir.path(), &["`model.norm.weight`", "I32", "BF16"]);
}

#[test]
fn weights_that_are_no_numbers() {
    for (name, bits, shown) in [
        ("llama-plain", &f32::NAN.to_le_bytes()[..], "NaN"),
        ("llama-llama3", &0xfc00u16.to_le_bytes()[..], "-inf"),
        ("llama-linear", &0x7f80u16.to_le_bytes()[..], "inf"),
    ] {
        let dir = copy(name);
        let mut bytes = std::fs::read(weights_file(&dir)).unwrap();
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
        // Row 3, column 5 of a matrix with 32 columns.
        let at = 8
            + length
            + header["model.layers.1.mlp.gate_proj.weight"]["data_offsets"][0].as_u64().unwrap() as usize
            + (3 * 32 + 5) * bits.len();
        bytes[at..at + bits.len()].copy_from_slice(bits);
        std::fs::write(weights_file(&dir), bytes).unwrap();
        refused(dir.path(), &["`model.layers.1.mlp.gate_proj.weight`", &format!("the value {shown} at [3, 5]")]);
    }
}

#[test]
fn files_that_are_not_there() {
    let dir = copy("llama-plain");
    std::fs::remove_file(weights_file(&dir)).unwrap();
    refused(dir.path(), &["neither model.safetensors nor model.safetensors.index.json"]);
    std::fs::write(dir.path().join("pytorch_model.bin"), "x").unwrap();
    refused(dir.path(), &["pytorch_model.bin is not read", "convert"]);
    std::fs::create_dir(weights_file(&dir)).unwrap();
    refused(dir.path(), &["model.safetensors: not a regular file"]);
    std::fs::remove_file(dir.path().join("config.json")).unwrap();
    refused(dir.path(), &["config.json: no such file"]);
    refused(Path::new("/nonexistent/model"), &["/nonexistent/model/config.json"]);
}

#[test]
fn architectures_that_are_not_supported() {
    config_refused(
        "architectures",
        json!(["GPT2LMHeadModel"]),
        &[
            "config.json",
            "`GPT2LMHeadModel`",
            "LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM",
        ],
    );
    config_refused("architectures", json!([]), &["architectures", "[]"]);
    config_refused("hidden_act", json!("gelu_new"), &["hidden_act", "`gelu_new`", "silu"]);
    config_refused("quantization_config", json!({"quant_method": "gptq"}), &["quantization_config", "unquantised"]);
    for kind in ["yarn", "dynamic", "longrope"] {
        config_refused(
            "rope_parameters",
            json!({"rope_theta": 1e4, "rope_type": kind, "factor": 2.0}),
            &["rope_parameters", &format!("`{kind}`"), "llama3"],
        );
    }
}

#[test]
fn fields_that_are_missing_or_wrong() {
    for field in [
        "architectures",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
        "max_position_embeddings",
        "rms_norm_eps",
    ] {
        config_refused(field, Value::Null, &["config.json", &format!("`{field}` is missing")]);
    }
    config_refused("hidden_size", json!("32"), &["hidden_size", "must be a whole number", "\"32\""]);
    config_refused("hidden_size", json!(-32), &["hidden_size", "-32"]);
    config_refused("num_hidden_layers", json!(0), &["num_hidden_layers is 0"]);
    config_refused("num_hidden_layers", json!(1_000_000_000), &["num_hidden_layers is 1000000000"]);
    config_refused("vocab_size", json!(u64::MAX), &["vocab_size is 18446744073709551615"]);
    config_refused("num_attention_heads", json!(3), &["num_attention_heads = 3", "num_key_value_heads = 4"]);
    config_refused("num_key_value_heads", json!(3), &["num_key_value_heads = 3"]);
    config_refused("head_dim", json!(7), &["head_dim is 7", "even"]);
    config_refused("rms_norm_eps", json!(-1.0), &["rms_norm_eps is -1"]);
    config_refused("rope_parameters", json!({"rope_theta": 0.0, "rope_type": "default"}), &["rope_theta is 0"]);
    config_refused(
        "rope_parameters",
        json!({"rope_theta": 1e4, "rope_type": "linear"}),
        &["rope_parameters", "`factor` is missing"],
    );
    config_refused("rope_parameters", json!({"rope_theta": 1e4, "rope_type": "linear", "factor": 0.0}), &["factor 0"]);
    config_refused("eos_token_id", json!([2, 128]), &["eos_token_id 128", "vocab_size = 128"]);
    config_refused("bos_token_id", json!(-1), &["bos_token_id", "-1"]);
    let dir = copy("llama-plain");
    std::fs::write(dir.path().join("config.json"), "{\"hidden_size\": ").unwrap();
    refused(dir.path(), &["config.json: is not JSON"]);
    std::fs::write(dir.path().join("config.json"), "[]").unwrap();
    refused(dir.path(), &["config.json: holds JSON but no object"]);
}

#[test]
fn shard_indices() {
    let index = "model.safetensors.index.json";
    let dir = copy("mistral-sharded");
    let path = dir.path().join(index);
    let set = |file: &str| edit_json(&path, |index| index["weight_map"]["model.norm.weight"] = json!(file));
    set("model-00009-of-00003.safetensors");
    refused(dir.path(), &[index, "`model-00009-of-00003.safetensors`, which is not there"]);
    for outside in ["../x", "/etc/passwd", "sub/x", "..", ""] {
        set(outside);
        refused(dir.path(), &[index, &format!("`{outside}`, which is not a plain file name")]);
    }
    set("model-00001-of-00003.safetensors");
    refused(dir.path(), &["model-00001-of-00003.safetensors", "`model.norm.weight`", "index"]);
    edit_json(&path, |index| drop(index["weight_map"].as_object_mut().unwrap().remove("model.norm.weight")));
    refused(dir.path(), &[index, "`model.norm.weight` is missing"]);
    std::fs::write(&path, "{}").unwrap();
    refused(dir.path(), &[index, "weight_map"]);
}

#[test]
fn tokenizers() {
    let fails = |dir: &Path, parts: &[&str]| {
        let message = TextCodec::open(dir)
            .and_then(|codec| codec.encode("some text"))
            .expect_err("a broken tokenizer was accepted")
            .to_string();
        println!("{message}");
        for part in parts {
            assert!(message.contains(part), "no `{part}` in: {message}");
        }
    };
    let dir = copy("quill-4m");
    let path = dir.path().join("tokenizer.json");
    let good = std::fs::read(&path).unwrap();
    for garbage in [&b"\x00\xff garbage"[..], b"{}", b"[]", b"", &good[..good.len() / 2]] {
        std::fs::write(&path, garbage).unwrap();
        fails(dir.path(), &["tokenizer.json"]);
    }
    std::fs::remove_file(&path).unwrap();
    fails(dir.path(), &["tokenizer.json: no such file", "AutoTokenizer"]);
    std::fs::write(&path, &good).unwrap();
    edit_json(&dir.path().join("config.json"), |config| config["vocab_size"] = json!(40));
    fails(dir.path(), &["tokenizer.json", "outside of the model's vocabulary of 40"]);
}

#[test]
fn generation_config_wins() {
    let dir = copy("qwen2-tied");
    let path = dir.path().join("generation_config.json");
    std::fs::write(&path, r#"{"eos_token_id": [5, 6], "bos_token_id": null}"#).unwrap();
    let config = ModelConfig::open(dir.path()).unwrap();
    assert_eq!((config.bos_id, config.eos_ids.as_slice()), (Some(1), &[5, 6][..]));
    std::fs::write(&path, "no JSON").unwrap();
    refused(dir.path(), &["generation_config.json: is not JSON"]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn flipped_bytes_never_panic(flips in prop::collection::vec((any::<prop::sample::Index>(), 1u8..), 1..6), in_config in any::<bool>()) {
        let dir = copy("llama-plain");
        let path = if in_config { dir.path().join("config.json") } else { weights_file(&dir) };
        let mut bytes = std::fs::read(&path).unwrap();
        let range = if in_config { bytes.len() } else { 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize };
        for (at, flip) in flips {
            bytes[at.index(range)] ^= flip;
        }
        std::fs::write(&path, bytes).unwrap();
        if let Err(error) = load(dir.path()) {
            prop_assert!(error.to_string().contains(dir.path().to_str().unwrap()), "does not say where: {error}");
        }
    }
}

/// tokenizer.json files that parse but do not hold together; whatever the library makes of them, it is no panic.
#[test]
fn inconsistent_tokenizers_never_panic() {
    let dir = copy("quill-4m");
    let path = dir.path().join("tokenizer.json");
    let good: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let token = |id: u64, content: &str| json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true});
    let edits: Vec<(&str, Value)> = vec![
        ("/added_tokens", json!([token(0, ""), token(0, "x"), token(7, "x"), token(u64::from(u32::MAX), "Hello")])),
        ("/added_tokens", json!([])),
        ("/model/vocab", json!({})),
        ("/model/vocab", json!({"a": 0, "b": 0, "c": 4_000_000_000u64})),
        ("/model/merges", json!([["Hello", "nothing"]])),
        ("/model/merges", json!([["", ""]])),
        ("/model", json!({"type": "Unigram", "unk_id": 5, "vocab": [["a", 0.0]]})),
        ("/model", json!({"type": "Unigram", "unk_id": null, "vocab": [["a", -1.0]]})),
        ("/model", json!({"type": "Unigram", "unk_id": 0, "vocab": []})),
        (
            "/model",
            json!({"type": "Unigram", "unk_id": 0, "vocab": [["", 1e308], ["", -1e308]], "byte_fallback": true}),
        ),
        (
            "/model",
            json!({"type": "WordPiece", "vocab": {}, "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 0}),
        ),
        ("/model", json!({"type": "WordLevel", "vocab": {}, "unk_token": "[UNK]"})),
        ("/normalizer", json!({"type": "Precompiled", "precompiled_charsmap": "AAAA"})),
        ("/normalizer", json!({"type": "Precompiled", "precompiled_charsmap": "/////wAAAAD//////////w=="})),
        ("/normalizer", json!({"type": "Replace", "pattern": {"Regex": "(a*)*b("}, "content": ""})),
        ("/normalizer", json!({"type": "Replace", "pattern": {"String": ""}, "content": "x"})),
        ("/pre_tokenizer", json!({"type": "Split", "pattern": {"Regex": ""}, "behavior": "Isolated", "invert": true})),
        ("/pre_tokenizer", json!({"type": "Metaspace", "replacement": "", "prepend_scheme": "always"})),
        ("/post_processor/special_tokens", json!({})),
        ("/post_processor/special_tokens/<s>/ids", json!([4_000_000_000u64])),
        ("/decoder", json!({"type": "Strip", "content": "H", "start": 1_000_000, "stop": 1_000_000})),
        ("/decoder", json!({"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": true})),
        ("/decoder", Value::Null),
        ("/truncation", json!({"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 9})),
        (
            "/padding",
            json!({"strategy": {"Fixed": 1u64 << 60}, "direction": "Right", "pad_to_multiple_of": 0, "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}),
        ),
    ];
    for (place, value) in edits {
        let mut broken = good.clone();
        *broken.pointer_mut(place).unwrap() = value.clone();
        std::fs::write(&path, serde_json::to_vec(&broken).unwrap()).unwrap();
        let result = TextCodec::open(dir.path()).and_then(|codec| {
            let ids = codec.encode("Hello, 日本 world")?;
            let mut stream = codec.stream(&ids[..ids.len() / 2])?;
            stream.push(&codec, 1_000_000)?;
            stream.finish(&codec)?;
            codec.decode(&ids)
        });
        println!("{place} = {value}: {result:?}");
        if let Err(error) = result {
            assert!(error.to_string().contains("tokenizer.json"), "{error}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn flipped_tokenizer_bytes_never_panic(flips in prop::collection::vec((any::<prop::sample::Index>(), 1u8..), 1..4)) {
        let dir = copy("quill-4m");
        let path = dir.path().join("tokenizer.json");
        let mut bytes = std::fs::read(&path).unwrap();
        for (at, flip) in flips {
            // The first 2000 bytes hold everything but the vocabulary and the merges.
            let range = if flip % 2 == 0 { 2000 } else { bytes.len() };
            bytes[at.index(range)] ^= flip;
        }
        std::fs::write(&path, bytes).unwrap();
        let result = TextCodec::open(dir.path()).and_then(|codec| codec.decode(&codec.encode("Hello, 日本 world")?));
        if let Err(error) = result {
            prop_assert!(error.to_string().contains("tokenizer.json"), "does not say where: {error}");
        }
    }
}
