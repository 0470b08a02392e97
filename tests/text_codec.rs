//! Text to tokens and back, whole and streamed: with the bundled byte-level tokenizer, and with one made like Llama's
//! (a mark for spaces, bytes as a fallback), whose decoder treats the start of a text differently.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tempfile::TempDir;
use trefoil::model::TextCodec;

fn quill() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/quill-4m")
}

fn quill_codec() -> TextCodec {
    TextCodec::open(&quill()).unwrap()
}

/// The configuration and tokenizer of the bundled model, in a directory that a test may change.
fn copy_quill() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(quill().join(name), dir.path().join(name)).unwrap();
    }
    dir
}

fn edit(path: &Path, edit: impl FnOnce(&mut Value)) {
    let mut value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    edit(&mut value);
    std::fs::write(path, serde_json::to_vec(&value).unwrap()).unwrap();
}

/// A tokenizer built as Llama's: words of a few letters, everything else in bytes.
fn llama_codec() -> TextCodec {
    let dir = copy_quill();
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).to_vec();
    tokens.extend((0..256).map(|byte| format!("<0x{byte:02X}>")));
    tokens.extend(
        ["\u{2581}", "a", "n", "d", "an", "\u{2581}an", "\u{2581}and", ",", "\u{2581}\u{2581}"].map(String::from),
    );
    let vocab: serde_json::Map<String, Value> =
        tokens.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect();
    let special = |id: usize| json!({"id": id, "content": tokens[id], "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true});
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [special(0), special(1), special(2)],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "\u{2581}"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"},
        ]},
        "pre_tokenizer": null,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": true, "byte_fallback": true, "vocab": vocab,
            "merges": ["a n", "\u{2581} an", "\u{2581}an d", "\u{2581} \u{2581}"],
        },
    });
    std::fs::write(dir.path().join("tokenizer.json"), serde_json::to_vec(&tokenizer).unwrap()).unwrap();
    TextCodec::open(dir.path()).unwrap()
}

#[test]
fn a_tokenizer_like_llamas_streams_too() {
    let codec = llama_codec();
    for text in ["and an, and", " and", "and  an", "日本 and 🦀🦀🦀🦀 an", "naïve, ünd"] {
        let ids = codec.encode(text).unwrap();
        assert_eq!(ids[0], 1);
        assert_eq!(codec.decode(&ids).unwrap(), text);
        for cut in 0..ids.len() {
            let before = codec.decode(&ids[..cut]).unwrap();
            if before.contains('\u{FFFD}') {
                continue;
            }
            let mut stream = codec.stream(&ids[..cut]).unwrap();
            let mut all = before;
            for &id in &ids[cut..] {
                let piece = stream.push(&codec, id).unwrap();
                assert!(!piece.contains('\u{FFFD}'), "a character came in halves: {piece:?}");
                all += &piece;
            }
            all += &stream.finish(&codec).unwrap();
            assert_eq!(all, text, "cut at {cut}");
        }
    }
}

#[test]
fn the_begin_token_is_added_once() {
    let dir = copy_quill();
    let config = dir.path().join("tokenizer_config.json");
    let path = dir.path().join("tokenizer.json");
    let encode = || TextCodec::open(dir.path()).and_then(|codec| codec.encode("Hello"));
    let want = encode().unwrap();
    edit(&config, |c| c["add_bos_token"] = json!(true));
    assert_eq!(encode().unwrap(), want, "the post-processor adds it already");
    edit(&path, |t| t["post_processor"] = Value::Null);
    assert_eq!(encode().unwrap(), want, "nobody else adds it");
    edit(&config, |c| c["bos_token"] = json!({"content": "<s>"}));
    assert_eq!(encode().unwrap(), want);
    edit(&config, |c| c["bos_token"] = json!("<begin>"));
    assert!(encode().unwrap_err().to_string().contains("bos_token"));
    edit(&config, |c| c["add_bos_token"] = json!(false));
    assert_eq!(encode().unwrap(), want[1..]);
}

#[test]
fn text_survives_the_codec() {
    let codec = quill_codec();
    for text in ["Hello, world.", "  spaces   and\nlines\t", "Größe, naïve, Ωμέγα, 日本語, 🦀🦀 — done", ""]
    {
        let ids = codec.encode(text).unwrap();
        assert_eq!(ids[0], 0, "the begin token, from the post-processor");
        assert_eq!(codec.decode(&ids).unwrap(), text);

        let mut stream = codec.stream(&[]).unwrap();
        let mut streamed = String::new();
        for &id in &ids {
            let piece = stream.push(&codec, id).unwrap();
            assert!(!piece.contains('\u{FFFD}'), "a character came in halves: {piece:?}");
            streamed += &piece;
        }
        assert_eq!(stream.finish(&codec).unwrap(), "");
        assert_eq!(streamed, text);
    }
}

#[test]
fn an_answer_streams_on_from_its_prompt() {
    let codec = quill_codec();
    let ids = codec.encode("An 日本 umbrella, 🦀 and more").unwrap();
    let whole = codec.decode(&ids).unwrap();
    for cut in 1..ids.len() {
        let before = codec.decode(&ids[..cut]).unwrap();
        let mut stream = codec.stream(&ids[..cut]).unwrap();
        let mut answer = String::new();
        for &id in &ids[cut..] {
            answer += &stream.push(&codec, id).unwrap();
        }
        answer += &stream.finish(&codec).unwrap();
        if before.ends_with('\u{FFFD}') {
            assert!(whole.ends_with(&answer), "a prompt that ends inside a character");
        } else {
            assert_eq!(before + &answer, whole, "cut at {cut}");
        }
    }
}

#[test]
fn broken_bytes_do_not_stall_the_stream() {
    let codec = quill_codec();
    let crab = codec.encode("🦀").unwrap();
    let mut stream = codec.stream(&[]).unwrap();
    let first = crab[1];
    let mut streamed = String::new();
    for _ in 0..12 {
        streamed += &stream.push(&codec, first).unwrap();
    }
    assert!(!streamed.is_empty(), "held back for ever");
    for id in codec.encode(" and on").unwrap() {
        streamed += &stream.push(&codec, id).unwrap();
    }
    streamed += &stream.finish(&codec).unwrap();
    assert!(streamed.ends_with(" and on"), "{streamed:?}");
    // A lone first byte at the end comes out when the answer ends.
    let mut stream = codec.stream(&[]).unwrap();
    assert_eq!(stream.push(&codec, first).unwrap(), "");
    assert_eq!(stream.finish(&codec).unwrap(), "\u{FFFD}");
}
