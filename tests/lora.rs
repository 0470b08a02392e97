//! LoRA adapters that the Python package `peft` has written, over public bases: the float twin and the private run against
//! the logits that peft gave, what an adapter may not be, and what it costs.

#[path = "support/adapters.rs"]
mod adapters;
#[path = "support/models.rs"]
mod models;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use adapters::adapt;
use models::{fixture, largest_difference, options, quill};
use ndarray::Array2;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use trefoil::generate::{Local, LocalOptions};
use trefoil::model::preparation::{Loaded, Options, adapted, private_layers};
use trefoil::model::prepare::Prepared;
use trefoil::model::progress::Progress;
use trefoil::model::sections::{Slot, sections};
use trefoil::model::{Adapter, Checkpoint, ModelConfig, Weights, float};
use trefoil::plan::{Group, Module, Plan};
use trefoil::prf::PreparationSeed;

/// Every projection; grouped queries with biases, a tied head and `alpha / sqrt(r)`; few projections of the upper layer;
/// norms of queries and keys.
const FIXTURES: [&str; 4] = ["lora-all", "lora-grouped", "lora-some", "lora-qknorm"];

#[derive(serde::Deserialize)]
struct Expected {
    base: String,
    ids: Vec<u32>,
    logits: Vec<Vec<f32>>,
}

fn expected(name: &str) -> Expected {
    serde_json::from_slice(&std::fs::read(fixture(name).join("expected.json")).unwrap()).unwrap()
}

/// Base and adapter.
fn dirs(name: &str) -> (PathBuf, PathBuf) {
    (fixture(&expected(name).base), fixture(name))
}

fn weights(name: &str) -> Weights {
    let (base, adapter) = dirs(name);
    adapted(&Checkpoint::open(&base).unwrap(), &base, Some(&adapter), &Progress::default()).unwrap()
}

fn loaded(name: &str, max_positions: usize) -> Loaded {
    let (base, adapter) = dirs(name);
    let private_layers = private_layers(None, &ModelConfig::open(&base).unwrap(), (&base, Some(&adapter))).unwrap();
    let o = Options { private_layers, max_positions: Some(max_positions), ..Options::default() };
    Loaded::open(&base, &Options { adapter: Some(adapter), ..o }).unwrap()
}

/// A preparation reads layer by layer what a run in one process has in memory.
#[test]
fn layer_by_layer_it_is_the_same_preparation() {
    let (seed, quill) = (PreparationSeed::from_bytes([4; 32]), (quill(), None));
    for (dir, adapter) in FIXTURES.map(dirs).map(|(base, adapter)| (base, Some(adapter))).into_iter().chain([quill]) {
        let o = Options { private_layers: Some(2), max_positions: Some(24), adapter, ..Options::default() };
        let (held, streamed) = (Loaded::open(&dir, &o).unwrap(), Loaded::stream(&dir, &o).unwrap());
        let plan = held.plan().unwrap();
        assert_eq!(streamed.plan().unwrap(), plan, "{}", dir.display());
        let words = |parts: Prepared| {
            let mut all = Vec::new();
            let mut keep = |words: Vec<u64>| {
                all.push(words);
                Ok(())
            };
            parts.helper_words(&seed, &mut keep).unwrap();
            all
        };
        let [a, b] = [Prepared::owner(&held.weights, &plan, &seed), Prepared::owner(&streamed.weights, &plan, &seed)];
        assert_eq!(words(a.unwrap()), words(b.unwrap()), "{}", dir.display());
    }
}

fn local(name: &str) -> Local {
    let (base, adapter) = dirs(name);
    let private_layers = private_layers(None, &ModelConfig::open(&base).unwrap(), (&base, Some(&adapter))).unwrap();
    Local::open(&base, LocalOptions { adapter: Some(adapter), ..options(private_layers, 24) }).unwrap()
}

fn argmax(row: &[f32]) -> usize {
    (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap()
}

#[test]
fn the_float_twin_gives_the_logits_of_peft() {
    for name in FIXTURES {
        let Expected { base, ids, logits } = expected(name);
        let got = float::forward(&weights(name), &ids);
        let plain = float::forward(&Weights::load(&Checkpoint::open(&fixture(&base)).unwrap()).unwrap(), &ids);
        let want = Array2::from_shape_vec((ids.len(), logits[0].len()), logits.concat()).unwrap();
        let difference = |a: &Array2<f32>| a.iter().zip(&want).fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
        println!("{name}: largest difference {:.1e}; without the adapter {:.2}", difference(&got), difference(&plain));
        assert!(difference(&got) < 1e-4 && difference(&plain) > 0.5, "{name}");
    }
}

#[test]
fn the_private_run_gives_the_logits_of_peft() {
    for name in FIXTURES {
        let Expected { ids, logits, .. } = expected(name);
        let mut local = local(name);
        let (mut worst, plan) = (0.0f32, local.plan().clone());
        assert!(plan.public_base && plan.head.public && !plan.private_embedding, "{name}");
        assert_eq!(plan.first_private, usize::from(name == "lora-some"), "{name}: below the adapters all is public");
        for n in 1..=ids.len() {
            let g = local.generate(&ids[..n], 1, 0.0, 0, true, &mut |_| true).unwrap();
            let (got, want) = (&g.logits[0], &logits[n - 1]);
            worst = worst.max(largest_difference(got, want));
            assert_eq!(g.tokens[0] as usize, argmax(want), "{name} at {n}");
        }
        // And with a cache that decode passes have filled.
        let g = local.generate(&ids[..4], 6, 0.0, 0, true, &mut |_| true).unwrap();
        let all: Vec<u32> = ids[..4].iter().chain(&g.tokens).copied().collect();
        let twin = float::forward(&weights(name), &all);
        for (i, got) in g.logits.iter().enumerate() {
            worst = worst.max(largest_difference(got, &twin.row(3 + i).to_vec()));
        }
        local.finish().unwrap();
        println!("{name}: largest difference {worst:.4}");
        assert!(worst < 0.1, "{name}: {worst}");
    }
}

/// Opens a copy of a fixture's adapter that `edit` has broken: the error must mention all of `parts`.
#[track_caller]
fn copied(name: &str, edit: impl FnOnce(&Path)) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        std::fs::copy(fixture(name).join(file), dir.path().join(file)).unwrap();
    }
    edit(dir.path());
    dir
}

fn refused(name: &str, base: &str, edit: impl FnOnce(&Path), parts: &[&str]) {
    let dir = copied(name, edit);
    let base = fixture(base);
    let error = Adapter::open(dir.path(), &base, &ModelConfig::open(&base).unwrap()).expect_err("a broken adapter");
    let error = error.to_string();
    println!("{error}");
    parts.iter().for_each(|part| assert!(error.contains(part), "no `{part}` in: {error}"));
}

fn edit_config(dir: &Path, field: &str, value: Value) {
    let path = dir.join("adapter_config.json");
    let mut json: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    json[field] = value;
    std::fs::write(path, serde_json::to_vec(&json).unwrap()).unwrap();
}

type Tensors = BTreeMap<String, (Vec<usize>, Vec<u8>)>;

fn edit_tensors(dir: &Path, edit: impl FnOnce(&mut Tensors)) {
    let path = dir.join("adapter_model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let read = SafeTensors::deserialize(&bytes).unwrap();
    let mut all: Tensors = read.iter().map(|(n, t)| (n.to_owned(), (t.shape().to_vec(), t.data().to_vec()))).collect();
    edit(&mut all);
    let views = all.iter().map(|(n, (s, d))| (n.clone(), TensorView::new(Dtype::F32, s.clone(), d).unwrap()));
    safetensors::serialize_to_file(views, None, &path).unwrap();
}

const Q0: &str = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";

#[test]
fn what_changes_the_function_is_refused_by_name() {
    for (field, value, named) in [
        ("peft_type", json!("IA3"), "supported: LORA"),
        ("r", json!(0), "rank 0"),
        ("r", json!("many"), "whole number"),
        ("lora_alpha", json!(null), "missing"),
        ("lora_alpha", json!(1e300), "float32"),
        ("bias", json!("lora_only"), "biases"),
        ("fan_in_fan_out", json!(true), "changes what the adapter computes"),
        ("modules_to_save", json!(["lm_head"]), "lm_head"),
        ("use_dora", json!(true), "changes"),
        ("rank_pattern", json!({"q_proj": 8}), "q_proj"),
        ("alpha_pattern", json!({"q_proj": 8}), "q_proj"),
        ("layer_replication", json!([[0, 2], [1, 2]]), "changes"),
        ("what_comes_after_peft", json!(0.5), "0.5"),
        ("init_lora_weights", json!("pissa"), "convert"),
        ("exclude_modules", json!(["q_proj"]), "target_modules"),
        ("target_modules", json!("model.*q_proj"), "pattern"),
        ("target_modules", json!(["q_proj", "embed_tokens"]), "embed_tokens"),
        ("target_modules", json!([]), "list"),
        ("layers_to_transform", json!([0, 2]), "2 is no layer"),
        ("layers_to_transform", json!(-1), "-1 is no layer"),
    ] {
        refused(
            "lora-all",
            "llama-plain",
            |dir| edit_config(dir, field, value),
            &["adapter_config.json", field, named],
        );
    }
}

#[test]
fn an_adapter_that_does_not_go_with_its_base_is_refused() {
    let made_for = "the adapter was made for `tests/fixtures/llama-plain`, the base given is";
    refused("lora-all", "mistral-sharded", |_| (), &["[4, 32]", "[4, 64]", "layers.0", made_for, "mistral-sharded"]);
    refused("lora-all", "llama-linear", |_| (), &["k_proj.lora_B", "[32, 4]", "[16, 4]", made_for]);
    let edit = |edit: fn(&mut Tensors)| move |dir: &Path| edit_tensors(dir, edit);
    refused("lora-all", "llama-plain", edit(|t| drop(t.remove(Q0))), &[Q0, "missing"]);
    let second = edit(|t| t.retain(|n, _| !n.contains("layers.1.mlp.up_proj.lora_B")));
    refused("lora-all", "llama-plain", second, &["layers.1.mlp.up_proj.lora_B", "missing"]);
    let renamed = |to: &'static str| {
        move |dir: &Path| {
            edit_tensors(dir, |t| {
                let tensor = t.remove(Q0).unwrap();
                t.insert(to.into(), tensor);
            });
        }
    };
    let beyond = "base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight";
    refused("lora-all", "llama-plain", renamed(beyond), &[beyond, "layer 7", "2 layers"]);
    let foreign = "base_model.model.model.layers.0.mixer.q_proj.lora_A.weight";
    refused("lora-all", "llama-plain", renamed(foreign), &[foreign, "none of a LoRA adapter"]);
    refused("lora-some", "llama-plain", |d| edit_config(d, "target_modules", json!(["up_proj"])), &["k_proj", "name"]);
    // Of the same shape, by name.
    let another = |dir: &Path| edit_config(dir, "base_model_name_or_path", json!("meta/some-other-model"));
    refused("lora-all", "llama-plain", another, &["base_model_name_or_path", "meta/some-other-model", "llama-plain"]);
    let moved = |dir: &Path| edit_config(dir, "base_model_name_or_path", json!("somebody/Llama-Plain"));
    let dir = copied("lora-all", moved);
    let base = fixture("llama-plain");
    Adapter::open(dir.path(), &base, &ModelConfig::open(&base).unwrap()).unwrap();
    // 33 dimensions of 32, everything else in order.
    let wide = |dir: &Path| {
        edit_config(dir, "r", json!(33));
        edit_tensors(dir, |t| {
            for (shape, data) in t.values_mut() {
                let at = usize::from(shape[1] == 3);
                shape[at] = 33;
                *data = vec![0; 4 * shape[0] * shape[1]];
            }
        });
    };
    refused("lora-some", "llama-plain", wide, &["rank 33", "dimension 32"]);
    refused(
        "lora-all",
        "llama-plain",
        |d| std::fs::write(d.join("adapter_model.safetensors"), b"no").unwrap(),
        &["adapter_model"],
    );
}

#[test]
fn tensors_may_have_the_name_of_the_adapter_in_theirs() {
    let dir = tempfile::tempdir().unwrap();
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        std::fs::copy(fixture("lora-all").join(file), dir.path().join(file)).unwrap();
    }
    edit_tensors(dir.path(), |t| {
        *t = std::mem::take(t).into_iter().map(|(n, v)| (n.replace(".weight", ".default.weight"), v)).collect();
    });
    let base = fixture("llama-plain");
    let w = adapted(&Checkpoint::open(&base).unwrap(), &base, Some(dir.path()), &Progress::default()).unwrap();
    assert_eq!(w, weights("lora-all"));
}

#[test]
fn an_adapter_is_found_with_its_base_or_says_how_to_give_it() {
    // The tests run in the root of the repository, to which the fixtures' configurations are relative.
    let (base, adapter) = Adapter::resolve(&fixture("lora-all"), None).unwrap();
    assert_eq!((base.as_path(), adapter), (Path::new("tests/fixtures/llama-plain"), Some(fixture("lora-all"))));
    let plain = Adapter::resolve(&fixture("llama-plain"), Some(&fixture("lora-all"))).unwrap();
    assert_eq!(plain, (fixture("llama-plain"), Some(fixture("lora-all"))));
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(fixture("lora-all").join("adapter_config.json"), dir.path().join("adapter_config.json")).unwrap();
    for (name, named) in
        [(json!("meta/none-of-this-machine"), "`meta/none-of-this-machine`"), (json!(null), "names no base")]
    {
        edit_config(dir.path(), "base_model_name_or_path", name);
        let e = Adapter::resolve(dir.path(), None).unwrap_err().to_string();
        assert!(e.contains(named) && e.contains("--model BASE --adapter"), "{e}");
    }
    let e = Adapter::resolve(&fixture("lora-all"), Some(&fixture("lora-some"))).unwrap_err().to_string();
    assert!(e.contains("must name the base"), "{e}");
}

/// An adapted layer cannot be the client's.
#[test]
fn adapted_layers_are_private() {
    let (base, adapter) = dirs("lora-all");
    let o = Options { private_layers: Some(1), adapter: Some(adapter), ..Options::default() };
    let e = Loaded::open(&base, &o).unwrap_err().to_string();
    assert!(e.contains("layer 0 has an adapter") && e.contains("give 2 or more"), "{e}");
    // All layers, but the embedding is the base's.
    let split = Loaded::open(&base, &Options { private_layers: None, ..o }).unwrap().split;
    assert_eq!((split.first_private, split.private_embedding, split.public_head), (0, false, true));
}

/// What is secret is what the adapters are: a preparation of them shares their factors alone.
#[test]
fn the_plan_says_which_projections_and_no_more() {
    let w = weights("lora-some");
    let plan = loaded("lora-some", 24).plan().unwrap();
    plan.check(&ModelConfig { max_positions: 24, ..w.config.clone() }).unwrap();
    let [layer] = &plan.layers[..] else { panic!("one private layer") };
    let of = |group| layer.adapters.get(group).map(|a| (a.modules.clone(), a.rank));
    assert_eq!(of(Group::Qkv), Some((vec![Module::KProj], 3)));
    assert_eq!(of(Group::GateUp), Some((vec![Module::UpProj], 3)));
    assert_eq!((of(Group::O), of(Group::Down)), (None, None));
    for s in sections(&w.config, &plan).unwrap() {
        let adapter = matches!(s.slot, Slot::AdapterA(_) | Slot::AdapterB(_));
        assert_eq!(s.public, !adapter, "{}", s.name());
    }
    let json = serde_json::to_string(&plan).unwrap();
    assert_eq!(serde_json::from_str::<Plan>(&json).unwrap(), plan);
}

/// A trained adapter's scale says little: whether a factor is large or tiny, and the other the inverse, is rounded the same.
#[test]
fn the_split_of_the_scale_between_the_factors_does_not_matter() {
    let w = weights("lora-all");
    for by in [-20, 20] {
        let by = f32::from(by as i8).exp2();
        let mut other = w.clone();
        for l in &mut other.layers {
            for module in Module::ALL {
                let adapter = l.linear_mut(module).adapter.as_mut().unwrap();
                adapter.a *= by;
                adapter.b *= 1.0 / by;
            }
        }
        let o = Options { private_layers: Some(2), max_positions: Some(24), ..Options::default() };
        let plan = |w: &Weights| Loaded::new(w.clone(), None, &o).unwrap().plan().unwrap();
        assert_eq!(plan(&other), plan(&w));
    }
}

/// An adapter of the bundled model, as peft lays it out: q and v of the upper three layers.
fn quill_adapter(dir: &Path) {
    let config = ModelConfig::open(&quill()).unwrap();
    let json = json!({
        "peft_type": "LORA", "r": 4, "lora_alpha": 64, "target_modules": ["q_proj", "v_proj"],
        "layers_to_transform": [5, 6, 7], "base_model_name_or_path": quill(),
    });
    std::fs::write(dir.join("adapter_config.json"), json.to_string()).unwrap();
    let mut l = Weights::random(config, 5).unwrap().layers.swap_remove(0);
    adapt(&mut l, &[Module::QProj, Module::VProj], 4);
    let mut all = Tensors::new();
    for (layer, module) in (5..8).flat_map(|i| [(i, Module::QProj), (i, Module::VProj)]) {
        let factors = l.linear(module).adapter.as_ref().unwrap();
        for (half, m) in [("lora_A", &factors.a), ("lora_B", &factors.b)] {
            let name = format!("base_model.model.model.layers.{layer}.{}.{half}.weight", module.path());
            all.insert(name, (m.shape().to_vec(), m.iter().flat_map(|v| v.to_le_bytes()).collect()));
        }
    }
    let views = all.iter().map(|(n, (s, d))| (n.clone(), TensorView::new(Dtype::F32, s.clone(), d).unwrap()));
    safetensors::serialize_to_file(views, None, &dir.join("adapter_model.safetensors")).unwrap();
}

fn trefoil(args: &[&str]) -> Value {
    let out = assert_cmd::Command::cargo_bin("trefoil").unwrap().args(args).args(["--json"]).assert().success();
    serde_json::from_slice(&out.get_output().stdout).unwrap()
}

#[test]
fn every_command_takes_an_adapter() {
    let dir = tempfile::tempdir().unwrap();
    quill_adapter(dir.path());
    let (base, adapter) = (quill(), dir.path().to_str().unwrap().to_owned());
    let base = base.to_str().unwrap();
    let prompt = ["--prompt", "The old man", "--max-new-tokens", "5", "--context", "16"];
    let given = trefoil(&[&["generate", "--model", base, "--adapter", &adapter, "--check"][..], &prompt].concat());
    assert_eq!((&given["private_layers"], &given["private_head"]), (&json!(3), &json!(false)));
    assert_eq!((&given["check"]["agree"], &given["check"]["of"]), (&json!(5), &json!(5)), "{}", given["check"]);
    assert!(given["check"]["max_logit_error"].as_f64().unwrap() < 0.1, "{}", given["check"]);
    let named = trefoil(&[&["generate", "--model", &adapter][..], &prompt].concat());
    assert_eq!(named["tokens"], given["tokens"], "the base that the adapter names");
    let without = trefoil(&[&["generate", "--model", base, "--private-layers", "0"][..], &prompt].concat());
    assert_ne!(without["tokens"], given["tokens"], "or there is nothing to see here");

    let request = ["--prefill", "3", "--decode", "5"];
    let cost = trefoil(&[&["cost", "--model", base, "--adapter", &adapter, "--context", "16"][..], &request].concat());
    assert_eq!(cost["messages_per_private_layer"], given["messages_per_private_layer"]);
    let prep = dir.path().join("prep");
    let prep = prep.to_str().unwrap();
    trefoil(&["prepare", "--model", base, "--adapter", &adapter, "--context", "16", "--net", "none", "--out", prep]);
    let of_it = trefoil(&[&["cost", "--model", prep][..], &request].concat());
    assert_eq!(of_it["request_links"], cost["request_links"]);
    let text = dir.path().join("text");
    std::fs::write(&text, "The old man looked at the sea and said nothing. ".repeat(20)).unwrap();
    let text = text.to_str().unwrap();
    let calibrated = trefoil(&["calibrate", "--model", base, "--adapter", &adapter, "--text", text, "--context", "16"]);
    assert_eq!((&calibrated["fits"], &calibrated["plan"]["public_base"]), (&json!(true), &json!(true)));
}

/// What an adapter adds to is given to Helper and Clients: not a model whose record says that it is private.
#[test]
fn a_private_base_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    // An adapter knows its base by name.
    let base = dir.path().join("llama-plain");
    std::fs::create_dir(&base).unwrap();
    for entry in std::fs::read_dir(fixture("llama-plain")).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), base.join(entry.file_name())).unwrap();
    }
    let open = || {
        let adapter = Some(fixture("lora-all"));
        Loaded::open(&base, &Options { private_layers: Some(2), adapter, ..Options::default() }).map(|_| ())
    };
    for (record, refused) in [
        (r#"{"version": 1}"#, false),
        (r#"{"version": 1, "private_layers": 0}"#, false),
        (r#"{"version": 1, "private_layers": 1}"#, true),
        (r#"{"version": 1, "private_layers": "all"}"#, true),
    ] {
        std::fs::write(base.join("trefoil.json"), record).unwrap();
        match open() {
            Ok(()) => assert!(!refused, "{record}"),
            Err(e) => assert!(refused && e.to_string().contains("private"), "{record}: {e}"),
        }
    }
}
