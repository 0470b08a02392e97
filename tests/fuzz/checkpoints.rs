//! Checkpoints from elsewhere: config.json, the header of safetensors files, the shards' index.

use std::path::{Path, PathBuf};

use proptest::prelude::*;
use tempfile::TempDir;
use trefoil::error::Error;
use trefoil::model::{Checkpoint, ModelConfig, Weights};

use crate::fuzz;
use crate::mutate::{apply, changes};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

const ALL: [&str; 6] = ["llama-plain", "llama-linear", "llama-llama3", "mistral-sharded", "qwen2-tied", "qwen3-qknorm"];

/// A good configuration is one that a model can have; an error names the file.
#[test]
fn hugging_face_config() {
    let good: Vec<Vec<u8>> = ALL.iter().map(|name| std::fs::read(fixture(name).join("config.json")).unwrap()).collect();
    let generation = br#"{"bos_token_id": 1, "eos_token_id": [2, 3], "temperature": 0.6}"#;
    let all = (prop::sample::select(good), changes(), prop::option::of(changes()));
    fuzz("config.json, mutated", &all, |(text, main, second)| {
        let second = second.map(|changes| apply(generation, &changes));
        match ModelConfig::parse(&apply(&text, &main), second.as_deref(), "from/config.json") {
            Ok(c) => {
                prop_assert!(c.num_heads > 0 && c.num_kv_heads > 0 && c.num_heads % c.num_kv_heads == 0);
                prop_assert!(c.hidden_size > 0 && c.vocab_size > 0 && c.max_positions > 0);
                let _ = c.parameter_count();
            }
            Err(Error::Model(message)) => prop_assert!(message.contains("config.json"), "{message}"),
            Err(other) => return Err(TestCaseError::fail(format!("{other}"))),
        }
        Ok(())
    });
    fuzz("config.json, any bytes", &prop::collection::vec(any::<u8>(), 0..200), |bytes| {
        prop_assert!(ModelConfig::parse(&bytes, None, "config.json").is_err());
        Ok(())
    });
}

/// A directory of our own with a fixture in it.
fn copy(name: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(fixture(name)).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
    }
    dir
}

/// Loads what is there; wrong is what is neither loaded nor blamed on the model.
fn load(dir: &Path) -> Result<(), TestCaseError> {
    match Checkpoint::open(dir).and_then(|c| Weights::load(&c)) {
        Ok(_) | Err(Error::Model(_)) => Ok(()),
        // A mutated index may name a directory, or a name longer than the system takes.
        Err(Error::Io { .. }) => Ok(()),
        Err(other) => Err(TestCaseError::fail(format!("{other}"))),
    }
}

#[test]
fn checkpoint_header() {
    let dir = copy("llama-plain");
    let path = dir.path().join("model.safetensors");
    let good = std::fs::read(&path).unwrap();
    let length = u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
    let (header, data) = good[8..].split_at(length);
    let claim = prop_oneof![4 => Just(None), 1 => any::<u64>().prop_map(Some), 1 => (0u64..4096).prop_map(Some)];
    let all = (changes(), claim, 0usize..=data.len(), prop::bool::weighted(0.2));
    fuzz("safetensors header, mutated", &all, |(changes, claim, cut, short)| {
        let header = apply(header, &changes);
        let length = claim.unwrap_or(header.len() as u64);
        let data = if short { &data[..cut] } else { data };
        // A new file: the old one may still be mapped.
        let _ = std::fs::remove_file(&path);
        std::fs::write(&path, [&length.to_le_bytes()[..], &header, data].concat()).unwrap();
        load(dir.path())
    });
    fuzz("safetensors file, any bytes", &prop::collection::vec(any::<u8>(), 0..64), |bytes| {
        let _ = std::fs::remove_file(&path);
        std::fs::write(&path, bytes).unwrap();
        prop_assert!(Checkpoint::open(dir.path()).is_err());
        Ok(())
    });
}

#[test]
fn shard_index() {
    let dir = copy("mistral-sharded");
    let path = dir.path().join("model.safetensors.index.json");
    let good = std::fs::read(&path).unwrap();
    fuzz("shard index, mutated", &changes(), |changes| {
        std::fs::write(&path, apply(&good, &changes)).unwrap();
        load(dir.path())
    });
}
