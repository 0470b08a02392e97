//! `trefoil finetune`: its model is the float twin's, its gradients are right and complete, a run that is interrupted ends with the same
//! weights, what is to stay as in the base stays so bit for bit, and what cannot be done is refused with the reason.

use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use tempfile::TempDir;
use trefoil::marill::adapter::{Lora, parse_targets};
use trefoil::marill::data::{Batch, DataOptions, Dataset, Example, Source};
use trefoil::marill::evaluate::score;
use trefoil::marill::reshape::{MergeBy, Reshape};
use trefoil::marill::student::Student;
use trefoil::marill::study::{self, Doing, Row};
use trefoil::marill::tasks::Task;
use trefoil::marill::train::{Method, Options, Outcome, run};
use trefoil::model::Adapter;
use trefoil::model::preparation::private_layers;
use trefoil::model::variant::{PrivateLayers, Record};
use trefoil::model::{Activation, Arch, Checkpoint, ModelConfig, Softmax, Variant, Weights, float};
use trefoil::plan::Module;

const BASE: &str = "models/quill-4m";

/// Larger weights than the usual ones, so that attention is not even.
fn random(config: ModelConfig) -> Weights {
    let mut w = Weights::random(config, 11).unwrap();
    for l in &mut w.layers {
        for m in [&mut l.q, &mut l.k, &mut l.v, &mut l.o, &mut l.gate, &mut l.up, &mut l.down] {
            m.w *= 8.0;
        }
    }
    w.embed *= 20.0;
    w
}

fn config(variant: Option<Variant>) -> ModelConfig {
    ModelConfig {
        arch: Arch::Qwen3,
        num_kv_heads: 2,
        head_dim: 8,
        qkv_bias: true,
        o_bias: true,
        mlp_bias: true,
        qk_norm: true,
        variant,
        ..ModelConfig::llama(32, 48, 3, 4, 60, 64)
    }
}

fn variants() -> Vec<Option<Variant>> {
    let one = Variant {
        from_layer: 1,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 8,
        softmax: Softmax::Exact,
        activation: Activation::Relu,
    };
    let merged = Variant { num_attention_heads: 2, num_key_value_heads: 1, head_dim: 16, ..one };
    vec![
        None,
        Some(one),
        Some(Variant { softmax: Softmax::TwoRelu, activation: Activation::Silu, ..one }),
        Some(Variant { activation: Activation::Quad, ..merged }),
        Some(Variant { softmax: Softmax::TwoRelu, ..merged }),
    ]
}

fn example(ids: std::ops::Range<u32>) -> Example {
    let n = ids.len();
    Example { ids: ids.collect(), learned: (0..n).map(|i| i > 0).collect() }
}

fn batch() -> Batch {
    Batch::new([&example(0..20), &example(30..41), &example(7..9)])
}

#[test]
fn logits_are_the_float_twins() {
    for variant in variants() {
        let weights = random(config(variant));
        let student = Student::new(&weights, &|_| false, None).unwrap();
        let batch = batch();
        let trace = student.forward(&batch).unwrap();
        let got = student.logits(&trace, &batch).unwrap().to_vec2::<f32>().unwrap();
        for part in batch.starts.windows(2) {
            let want = float::forward(&weights, &batch.ids[part[0]..part[1]]);
            let most = want.iter().fold(0f32, |a, b| a.max(b.abs()));
            for (got, want) in got[part[0]..part[1]].iter().zip(want.outer_iter()) {
                for (g, w) in got.iter().zip(want) {
                    assert!((g - w).abs() < 1e-3, "{variant:?}: {g} {w} of {most}");
                }
            }
        }
        assert_eq!(student.weights().unwrap(), weights);
    }
}

#[test]
fn every_trained_weight_has_its_gradient() {
    for variant in variants() {
        let weights = random(config(variant));
        let mut lora = Lora::fresh(&weights.config, 1, &Module::ALL, 2, 4.0, 1).unwrap();
        // As if it had learned something: with b = 0 there is no gradient for a.
        lora.maps.values_mut().for_each(|d| d.b.fill(0.05));
        let student = Student::new(&weights, &|_| true, Some(&lora)).unwrap();
        let batch = batch();
        let loss = || {
            let trace = student.forward(&batch).unwrap();
            student.logits(&trace, &batch).unwrap().sqr().unwrap().mean_all().unwrap()
        };
        let grads = loss().backward().unwrap();
        // 3 layers of 7 maps with bias, 4 norms, embedding, norm, head; 2 layers of 7 adapters of 2.
        assert_eq!(student.parameters().len(), 3 * (14 + 4) + 3 + 28);
        for p in student.parameters() {
            let grad = grads.get(p.var.as_tensor()).unwrap_or_else(|| panic!("{}: no gradient", p.name));
            let length = grad.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
            if length == 0.0 {
                continue;
            }
            let before = p.var.as_tensor().copy().unwrap();
            let size = before.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap().sqrt();
            let moved = |by: f64| {
                let moved = (&before + grad.affine(by / f64::from(length), 0.0).unwrap()).unwrap();
                p.var.set(&moved).unwrap();
                f64::from(loss().to_scalar::<f32>().unwrap())
            };
            // The loss along the gradient rises by its length, as far as single precision can tell; a long step may cross the
            // kinks of ReLU, a short one drown in rounding.
            let rises = |relative: f32| {
                let by = f64::from(relative * size.max(0.1));
                let slope = (moved(by) - moved(-by)) / (2.0 * by);
                let noise = 4e-7 * moved(0.0) / by;
                (slope - f64::from(length)).abs() < 0.05 * f64::from(length) + noise
            };
            assert!([1e-3, 1e-4, 1e-5, 1e-6].into_iter().any(rises), "{variant:?} {}: {length}", p.name);
            p.var.set(&before).unwrap();
        }
    }
}

fn options(out: &Path) -> Options {
    Options {
        base: PathBuf::from(BASE),
        data: Source::Task(Task::Dates),
        sampling: DataOptions { context: 64, examples: 40, seed: 3 },
        out: out.to_path_buf(),
        method: Method::Full,
        private_layers: None,
        reshape: Reshape::default(),
        rank: 4,
        alpha: 8.0,
        targets: Module::ALL.to_vec(),
        epochs: 2,
        stage1_epochs: 0,
        stage1_steps: None,
        steps: Some(7),
        batch_size: 8,
        lr: 1e-3,
        teacher: None,
        save_every: 2,
    }
}

fn finish(options: &Options) -> Outcome {
    run(options, &mut |_| true).unwrap().unwrap()
}

/// Runs until `step` and no further, as if killed.
fn kill_at(options: &Options, step: usize) {
    assert!(run(options, &mut |p| p.step < step).unwrap().is_none());
}

fn refused(options: &Options) -> String {
    run(options, &mut |_| true).unwrap_err().to_string()
}

fn read(dir: &TempDir, file: &str) -> Vec<u8> {
    std::fs::read(dir.path().join(file)).unwrap()
}

#[test]
fn an_interrupted_run_ends_with_the_same_weights() {
    let (whole, broken) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let outcome = finish(&options(whole.path()));
    // Within the first epoch, at its end, and in the second one.
    for step in [1, 3, 5, 6] {
        kill_at(&options(broken.path()), step);
    }
    let resumed = finish(&options(broken.path()));
    assert_eq!((resumed.resumed_at, resumed.steps), (4, 7));
    assert_eq!(resumed.score, outcome.score);
    for file in ["model.safetensors", "trefoil.json", "loss.svg"] {
        assert!(read(&whole, file) == read(&broken, file), "{file}");
    }
    assert!(!broken.path().join("training.safetensors").exists());
    // All of it may have changed, so all of it is private wherever it is served.
    let record = Record::open(whole.path()).unwrap().unwrap();
    assert_eq!(record.private_layers, Some(PrivateLayers::All));
    let config = ModelConfig::open(whole.path()).unwrap();
    assert_eq!(private_layers(None, &config, (whole.path(), None)).unwrap(), None);
    let e = private_layers(Some("2"), &config, (whole.path(), None)).unwrap_err().to_string();
    assert!(e.contains("given to every client"), "{e}");
    // Once more does nothing; other options are not mixed up with these.
    let again = finish(&options(broken.path()));
    assert!(again.finished_before && again.score == outcome.score);
    let e = refused(&Options { lr: 2e-3, ..options(broken.path()) });
    assert!(e.contains("another `lr`") && e.contains("--out"), "{e}");
    // Something was learned: what the base says of dates is far from them.
    let base = Weights::load(&Checkpoint::open(Path::new(BASE)).unwrap()).unwrap();
    let o = options(broken.path());
    let data = Dataset::load(&o.data, &o.base, &base.config, &o.sampling).unwrap();
    assert!(outcome.score.loss < 0.8 * score(&base, &data.held_out, true).loss);
}

#[test]
fn another_number_of_threads_does_not_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let pool = |n| rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap();
    pool(3).install(|| kill_at(&options(dir.path()), 3));
    let e = pool(1).install(|| refused(&options(dir.path())));
    assert!(e.contains("--threads 3") && e.contains("remove it"), "{e}");
    assert_eq!(pool(3).install(|| finish(&options(dir.path()))).resumed_at, 2);
}

#[test]
fn a_checkpoint_that_cannot_be_saved_leaves_the_earlier_one() {
    let (whole, dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let lora = |dir: &TempDir| Options { method: Method::Lora, ..options(dir.path()) };
    finish(&lora(&whole));
    kill_at(&lora(&dir), 3);
    let saved = read(&dir, "training.safetensors");
    // Fails for everybody, root included.
    let obstacle = dir.path().join(".training.safetensors.partial");
    std::fs::create_dir(&obstacle).unwrap();
    let e = refused(&lora(&dir));
    assert!(e.contains("intact") && e.contains("training.safetensors") && e.contains("again"), "{e}");
    assert!(read(&dir, "training.safetensors") == saved);
    let e = refused(&Options { rank: 2, ..lora(&dir) });
    assert!(e.contains("another `rank`"), "{e}");
    std::fs::remove_dir(&obstacle).unwrap();
    assert_eq!(finish(&lora(&dir)).resumed_at, 2);
    assert!(read(&dir, "adapter_model.safetensors") == read(&whole, "adapter_model.safetensors"));
}

/// As on a full disk: the system takes no more bytes of a file than this.
#[test]
fn a_disk_without_room_leaves_the_earlier_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let options = format!(
        "finetune --base {BASE} --data task:sums --method lora --rank 2 --targets q --context 48 --batch-size 2 --steps 4000 --epochs 4000 \
         --save-every 2 --threads 1 --json --out {}",
        out.display()
    );
    let program = env!("CARGO_BIN_EXE_trefoil");
    let mut child = std::process::Command::new(program)
        .args(options.split_whitespace())
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let saved = out.join("training.safetensors");
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while !saved.exists() {
        assert!(std::time::Instant::now() < deadline && child.try_wait().unwrap().is_none());
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let before = std::fs::read(&saved).unwrap();
    let full = std::process::Command::new("sh")
        .args(["-c", &format!("trap '' XFSZ; ulimit -f 8; exec {program} {options}")])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&full.stderr);
    assert!(!full.status.success() && said.contains("what was saved there before is intact"), "{said}");
    assert!(before == std::fs::read(&saved).unwrap(), "the checkpoint has changed");
}

#[test]
fn frozen_layers_are_the_bases_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    finish(&Options { method: Method::Freeze, private_layers: Some(3), ..options(dir.path()) });
    let (made, base) =
        (read(&dir, "model.safetensors"), std::fs::read(Path::new(BASE).join("model.safetensors")).unwrap());
    let (made, base) = (SafeTensors::deserialize(&made).unwrap(), SafeTensors::deserialize(&base).unwrap());
    assert_eq!(made.len(), base.len());
    for (name, tensor) in base.tensors() {
        let now = made.tensor(&name).unwrap();
        let frozen = name.contains("embed_tokens") || (0..5).any(|i| name.contains(&format!("layers.{i}.")));
        let same = now.dtype() == tensor.dtype() && now.data() == tensor.data();
        assert_eq!(same, frozen, "{name}");
    }
    let record = Record::open(dir.path()).unwrap().unwrap();
    assert_eq!((record.private_layers, record.variant), (Some(PrivateLayers::Top(3)), None));
}

#[test]
fn an_adapter_read_back_is_what_was_trained() {
    let dir = tempfile::tempdir().unwrap();
    let o = Options {
        method: Method::Lora,
        private_layers: Some(2),
        targets: vec![Module::QProj, Module::DownProj],
        ..options(dir.path())
    };
    let outcome = finish(&o);
    assert_eq!(outcome.trained, 2 * 4 * (192 + 192 + 192 + 512));
    let mut weights = Weights::load(&Checkpoint::open(Path::new(BASE)).unwrap()).unwrap();
    // As the parties read it, and unmerged.
    let base = Path::new(BASE);
    Adapter::open(dir.path(), base, &weights.config).unwrap().attach(&mut weights).unwrap();
    assert_eq!((weights.first_adapted(), weights.adapter_parameters()), (Some(6), Some(outcome.trained as u64)));
    let data = Dataset::load(&o.data, &o.base, &weights.config, &o.sampling).unwrap();
    let read_back = score(&weights, &data.held_out, true);
    assert!((read_back.loss - outcome.score.loss).abs() < 1e-5, "{read_back:?}, not {:?}", outcome.score);
    let config: serde_json::Value = serde_json::from_slice(&read(&dir, "adapter_config.json")).unwrap();
    assert_eq!(config["peft_type"], "LORA");
    assert_eq!(config["layers_to_transform"], serde_json::json!([6, 7]));
    assert_eq!(config["target_modules"], serde_json::json!(["q_proj", "down_proj"]));
    assert!(config["base_model_name_or_path"].as_str().unwrap().ends_with(BASE));
    assert!(!dir.path().join("model.safetensors").exists());
}

#[test]
fn a_student_of_another_shape_is_taught() {
    let (teacher, dir, broken) =
        (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let freeze = |dir: &TempDir| Options { method: Method::Freeze, private_layers: Some(4), ..options(dir.path()) };
    finish(&freeze(&teacher));
    let taught = |dir: &TempDir| Options {
        teacher: Some(teacher.path().to_path_buf()),
        stage1_epochs: 1,
        reshape: Reshape {
            merge_heads: 4,
            prune_layers: 2,
            softmax: Softmax::TwoRelu,
            activation: Some(Activation::Relu),
            ..Reshape::default()
        },
        ..freeze(dir)
    };
    let mut stages = Vec::new();
    let watch = &mut |p: trefoil::marill::train::Progress| {
        stages.push((p.matching, p.loss));
        true
    };
    run(&taught(&dir), watch).unwrap().unwrap();
    // 40 examples by 8: an epoch is 5 steps.
    assert_eq!(stages.iter().map(|s| s.0).collect::<Vec<_>>(), [true, true, true, true, true, false, false]);
    assert!(stages[4].1 < stages[0].1, "{stages:?}");
    // Interrupted in the first stage and at the first step of the second one.
    kill_at(&taught(&broken), 3);
    kill_at(&taught(&broken), 6);
    finish(&taught(&broken));
    assert!(read(&dir, "model.safetensors") == read(&broken, "model.safetensors"));

    let weights = Weights::load(&Checkpoint::open(dir.path()).unwrap()).unwrap();
    assert_eq!(weights.config.num_layers, 6);
    let v = weights.config.variant.unwrap();
    assert_eq!((v.from_layer, v.num_attention_heads, v.head_dim), (4, 2, 96));
    assert_eq!((v.softmax, v.activation), (Softmax::TwoRelu, Activation::Relu));
    // A teacher whose public layers are not the base's cannot teach one whose layers are.
    let full = tempfile::tempdir().unwrap();
    finish(&Options { steps: Some(1), ..options(full.path()) });
    let e = refused(&Options { teacher: Some(full.path().to_path_buf()), ..freeze(&tempfile::tempdir().unwrap()) });
    assert!(e.contains("--teacher") && e.contains("freeze"), "{e}");
}

#[test]
fn what_cannot_be_done_is_refused_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let o = || options(&dir.path().join("out"));
    let file = |name: &str, bytes: &[u8]| {
        std::fs::write(dir.path().join(name), bytes).unwrap();
        Options { data: Source::Path(dir.path().join(name)), ..o() }
    };
    let lora = |rank, targets: Vec<Module>| Options { method: Method::Lora, rank, targets, ..o() };
    let reshape = |merge_heads| Reshape { merge_heads, merge_by: MergeBy::Adjacent, ..Reshape::default() };
    for (bad, named) in [
        (file("empty.txt", b" \n"), "is empty"),
        (file("latin.txt", b"caf\xe9 au lait"), "not UTF-8"),
        (file("short.txt", b"one"), "cannot be split"),
        (file("chats.jsonl", b"{}\n"), "line 1: is no chat"),
        (Options { data: Source::Path(dir.path().join("nowhere")), ..o() }, "nowhere"),
        (lora(193, vec![Module::QProj]), "--rank 193"),
        (lora(0, vec![Module::QProj]), "--rank 0"),
        (Options { reshape: reshape(2), ..lora(4, vec![Module::QProj]) }, "--method lora"),
        (Options { reshape: reshape(3), ..o() }, "8 heads, which 3 does not divide"),
        (Options { private_layers: Some(9), ..o() }, "--private-layers 9"),
        (Options { lr: 0.0, ..o() }, "--lr 0"),
        (Options { batch_size: 0, ..o() }, "--batch-size 0"),
        (Options { stage1_epochs: 1, ..o() }, "--teacher"),
        (Options { teacher: Some(BASE.into()), stage1_epochs: 1, steps: Some(5), ..o() }, "--stage1-steps"),
        (Options { sampling: DataOptions { examples: 0, ..o().sampling }, ..o() }, "--examples 0"),
    ] {
        let e = refused(&bad);
        assert!(e.contains(named), "{named}: {e}");
    }
    assert!(parse_targets("q_proj,head").unwrap_err().to_string().contains("`head`"));
    assert!(Source::parse("task:poems").is_err());
    assert!(!dir.path().join("out").exists());
    // A directory that holds something else is left alone.
    let taken = options(dir.path());
    std::fs::write(dir.path().join("config.json"), "{}").unwrap();
    assert!(refused(&taken).contains("another directory"));
}

/// Options that the others leave without a meaning are named, and nothing is trained.
#[test]
fn an_option_that_says_nothing_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out").display().to_string();
    let text = format!("--data {BASE}/README.md");
    for (options, what) in [
        ("--data task:dates --rank 4", "--rank has no meaning"),
        ("--data task:dates --method freeze --alpha 4", "--alpha has no meaning"),
        ("--data task:dates --targets q_proj", "--targets has no meaning"),
        ("--data task:dates --merge-by adjacent", "--merge-by has no meaning"),
        ("--data task:dates --stage1-steps 9", "--stage1-steps has no meaning"),
        ("--data task:dates --private-layers 2", "--private-layers has no meaning"),
        (&format!("{text} --examples 9"), "--examples has no meaning"),
    ] {
        let args = format!("finetune --base {BASE} --out {out} {options}");
        let out = assert_cmd::Command::cargo_bin("trefoil").unwrap().args(args.split(' ')).output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(!out.status.success() && said.contains(what), "{options}: {said}");
    }
    assert!(!dir.path().join("out").exists());
}

/// Freezing leaves layers as they are, and public: not those of a base that is private itself.
#[test]
fn a_private_base_is_not_frozen_into_a_public_one() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base");
    std::fs::create_dir(&base).unwrap();
    for entry in std::fs::read_dir(BASE).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, base.join(path.file_name().unwrap())).unwrap();
    }
    let mut o = options(&dir.path().join("out"));
    o.base.clone_from(&base);
    o.method = Method::Freeze;
    for (record, private) in [("\"all\"", 4), ("5", 4)] {
        let record = format!("{{\"version\": 1, \"private_layers\": {record}}}");
        std::fs::write(base.join("trefoil.json"), record).unwrap();
        o.private_layers = Some(private);
        let e = refused(&o);
        assert!(e.contains("given to every client"), "{e}");
    }
    assert!(!o.out.exists());
}

/// What training writes runs in private as it is, and gives the float model's tokens.
#[test]
fn what_was_trained_passes_the_check() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let trefoil = |args: &[&str]| {
        let out = assert_cmd::Command::cargo_bin("trefoil").unwrap().args(args).output().unwrap();
        assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
        out.stdout
    };
    let passes = |name: &str, base: &str, options: &str| {
        let out = path(name);
        let common = format!(
            "finetune --base {base} --out {out} --data task:dates --steps 2 --batch-size 2 --examples 16 --context 48 --json {options}"
        );
        trefoil(&common.split(' ').collect::<Vec<_>>());
        let args =
            ["generate", "--model", &out, "--prompt", "Date: the third", "--max-new-tokens", "4", "--json", "--check"];
        let report: serde_json::Value = serde_json::from_slice(&trefoil(&args)).unwrap();
        assert_eq!(report["check"]["agree"], report["check"]["of"], "{name}: {report}");
        assert!(report["check"]["max_kl"].as_f64().unwrap() < 1e-3, "{name}: {}", report["check"]);
    };
    for (name, options) in [
        ("full", "--method full"),
        ("freeze-merge", "--method freeze --private-layers 2 --merge-heads 4 --softmax 2relu --activation relu"),
        ("prune-heads", "--method full --prune-heads 4"),
        ("prune-layers", "--method full --prune-layers 4"),
        ("quad", "--method freeze --private-layers 1 --activation quad"),
        ("lora", "--method lora --private-layers 2 --rank 4"),
        ("changed", "--method full --epochs 0 --private-layers 2 --merge-heads 2"),
    ] {
        passes(name, BASE, options);
    }
    // An adapter on a base that was changed before.
    passes("lora-on-changed", &path("changed"), "--method lora --rank 4 --private-layers 2");
}

#[test]
fn text_is_learned_from_the_command_line() {
    let dir = tempfile::tempdir().unwrap();
    let text = dir.path().join("text");
    std::fs::create_dir(&text).unwrap();
    std::fs::write(text.join("a.txt"), "The sea was calm and the ship lay still. ".repeat(80)).unwrap();
    std::fs::write(text.join("b.txt"), "Nobody spoke, and the night went on. ".repeat(80)).unwrap();
    let mut command = assert_cmd::Command::cargo_bin("trefoil").unwrap();
    command.args(["finetune", "--base", BASE, "--context", "64", "--epochs", "1", "--batch-size", "4", "--json"]);
    command.arg("--data").arg(&text).arg("--out").arg(dir.path().join("out"));
    let out = command.assert().success().get_output().stdout.clone();
    let report: serde_json::Value = serde_json::from_slice(&out).unwrap();
    assert!(report["score"]["perplexity"].as_f64().unwrap() < 20.0, "{report}");
    assert!(dir.path().join("out/loss.svg").exists());
}

fn study_of(out: &Path) -> study::Options {
    study::Options {
        base: PathBuf::from(BASE),
        data: Source::Task(Task::Dates),
        sampling: DataOptions { context: 64, examples: 40, seed: 0 },
        out: out.to_path_buf(),
        seeds: 0..1,
        steps: 8,
        batch_size: 8,
        rank: 4,
        rows: Row::chosen(&["2relu-merge4".into()]).unwrap(),
        net: "none".parse().unwrap(),
        save_every: 2,
        measure: true,
    }
}

#[test]
fn a_study_that_is_interrupted_gives_the_same_table() {
    let (whole, broken) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let finished = study::run(&study_of(whole.path()), &mut |_| true).unwrap().unwrap();
    // The teacher that the row needs comes with it.
    assert_eq!(finished.iter().map(|r| r.name).collect::<Vec<_>>(), ["full", "2relu-merge4"]);
    let kill = |name: &str, step: usize| {
        let mut watch = |p: study::Progress| match p.doing {
            Doing::Training(t) => p.name != name || t.step < step,
            Doing::Measuring => p.name != name || step > 0,
        };
        assert!(study::run(&study_of(broken.path()), &mut watch).unwrap().is_none());
        assert!(!broken.path().join("results.md").exists());
    };
    // While the teacher is trained, while it is measured, while the student is trained.
    kill("full", 5);
    kill("full", 0);
    kill("2relu-merge4", 3);
    let mut seen = Vec::new();
    let resumed = study::run(&study_of(broken.path()), &mut |p| {
        seen.push(p.name);
        true
    });
    let resumed = resumed.unwrap().unwrap();
    assert!(seen.iter().all(|name| *name == "2relu-merge4"), "{seen:?}");
    for (a, b) in finished.iter().zip(&resumed) {
        let (a, b) = (&a.runs[0], &b.runs[0]);
        assert_eq!((a.score, a.trained), (b.score, b.trained));
        let (a, b) = (a.cost.unwrap(), b.cost.unwrap());
        assert_eq!((a.prompts, a.decode_passes), (b.prompts, b.decode_passes));
        for (a, b) in [(a.prefill, b.prefill), (a.token, b.token)] {
            assert_eq!(a.messages, b.messages);
            // A word about the end of the run-ahead may be under way when the answer is there.
            assert!((a.bytes() - b.bytes()).abs() < 100.0, "{a:?} {b:?}");
        }
    }
    // Once more does nothing, and the table is the same to the last digit; with other options it is refused by name.
    let table = read(&broken, "results.md");
    study::run(&study_of(broken.path()), &mut |p| panic!("{p:?}")).unwrap();
    assert!(read(&broken, "results.md") == table);
    let table = String::from_utf8(table).unwrap();
    assert!(table.contains("| 2ReLU, merge 4 | ") && table.contains("| full fine-tune | 1.00 | 1.00"), "{table}");
    let e = study::run(&study::Options { steps: 12, ..study_of(broken.path()) }, &mut |_| true).unwrap_err();
    assert!(e.to_string().contains("another `steps`"), "{e}");
    let e = Row::chosen(&["merge3".into()]).unwrap_err().to_string();
    assert!(e.contains("merge3") && e.contains("merge4-adjacent"), "{e}");
}
