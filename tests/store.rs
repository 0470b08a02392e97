//! Preparations on disk: what three hosts load gives the tokens of one process; transfers resume; nothing damaged is
//! loaded; nothing private lies where the Client or everybody reads.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use proptest::prelude::*;
use tempfile::TempDir;
use trefoil::error::{Error, PeerFault, Result};
use trefoil::generate::{Client, Grant, Local, LocalOptions, helper, owner};
use trefoil::model::preparation::Options;
use trefoil::model::secure::SecureModel;
use trefoil::model::store::{ClientModel, HelperStore, OwnerPreparation, PublicManifest};
use trefoil::model::variant::{Record, Reshaping};
use trefoil::model::{Activation, Checkpoint, ModelConfig, Softmax, Weights};
use trefoil::party::Role;
use trefoil::plan::FW_LEAST;
use trefoil::world::{Keys, Setup, World};

#[allow(clippy::duplicate_mod)]
#[path = "support/models.rs"]
mod models;
use models::{fixture, quill};

fn options(private_layers: Option<usize>) -> Options {
    Options { private_layers, max_positions: Some(24), ..Options::default() }
}

fn prepare(dir: &Path, out: &Path, o: &Options) -> OwnerPreparation {
    let (mut last, mut total) = (0, 0);
    let made = OwnerPreparation::create(dir, out, o, &mut |done, of| {
        assert!(done > last && done <= of);
        (last, total) = (done, of);
    });
    let made = made.unwrap();
    assert_eq!((last, total), (made.manifest().half.bytes, made.manifest().half.bytes));
    made
}

fn transfer(from: &OwnerPreparation, to: &HelperStore) -> Result<()> {
    let mut incoming = to.incoming(from.manifest(), from.hashes())?;
    for i in incoming.next_chunk()..incoming.chunk_count() {
        incoming.put(i, &from.chunk(i)?)?;
    }
    incoming.finish()
}

/// Three parties that have nothing but their own directories.
fn tokens(prep: &Path, store: &HelperStore, public: &Path, prompt: &[u32], max_new: usize) -> Vec<u32> {
    let at_owner = OwnerPreparation::open(prep).unwrap();
    let (_, at_helper) = store.load(&at_owner.manifest().id).unwrap();
    let at_client = ClientModel::open(public).unwrap();
    let half = at_client.secure_model(at_owner.manifest(), at_owner.seed()).unwrap();
    let world = World::new(Keys::fresh().unwrap(), &Setup::default());
    let mut client = Client::new(world.session(Role::Client), half, at_client.into_public());
    let model: Arc<SecureModel> = at_owner.model();
    let grant = &Grant::all(Setup::default().timeout);
    std::thread::scope(|scope| {
        let (mut a, mut b) = (world.session(Role::Owner), world.session(Role::Helper));
        let a = scope.spawn(move || owner(&mut a, &model, grant).map(|_| ()));
        let b = scope.spawn(move || helper(&mut b, &at_helper, grant));
        let out = client.generate(prompt, max_new, 0.0, 0, false, &mut |_| true).unwrap();
        client.finish().unwrap();
        a.join().unwrap().unwrap();
        b.join().unwrap().unwrap();
        out.tokens
    })
}

#[track_caller]
fn as_in_one_process(dir: &Path, o: &Options) {
    let tmp = tempfile::tempdir().unwrap();
    let (prep, store) = (tmp.path().join("prep"), HelperStore::open(&tmp.path().join("store")).unwrap());
    let made = prepare(dir, &prep, o);
    transfer(&made, &store).unwrap();
    drop(made);
    // Not a byte more than public/ goes to the Client.
    let public = tmp.path().join("client");
    std::fs::rename(prep.join("public"), &public).unwrap();
    let prompt: Vec<u32> = vec![3, 1, 4, 1, 5, 9];
    let got = tokens(&prep, &store, &public, &prompt, 5);
    let (base, adapter) = (o.base.clone(), o.adapter.clone());
    let local = LocalOptions { max_positions: o.max_positions, base, adapter, ..LocalOptions::new(o.private_layers) };
    let mut local = Local::open(dir, local).unwrap();
    let want = local.generate(&prompt, 5, 0.0, 0, false, &mut |_| true).unwrap().tokens;
    local.finish().unwrap();
    assert_eq!(got, want, "{}", dir.display());
}

#[test]
fn loaded_parts_give_the_tokens_of_one_process() {
    for (name, private) in [
        ("llama-plain", Some(1)),
        ("qwen3-qknorm", None),
        ("qwen2-tied", Some(1)),
        ("qwen2-tied", None),
        ("mistral-sharded", Some(1)),
    ] {
        as_in_one_process(&fixture(name), &options(private));
    }
    as_in_one_process(&quill(), &options(Some(2)));
}

#[test]
fn a_public_head_is_the_clients_own() {
    for (name, private) in [("llama-plain", Some(1)), ("llama-plain", None), ("qwen2-tied", None)] {
        let dir = fixture(name);
        let o = Options { base: Some(dir.clone()), ..options(private) };
        as_in_one_process(&dir, &o);
    }
}

/// Two and two heads merged, 2ReLU and ReLU, from layer `from` on.
fn reshaped(from: usize) -> TempDir {
    let dir = smaller("llama-plain", &[]);
    let reshaping = Reshaping { merged: 2, softmax: Softmax::TwoRelu, activation: Some(Activation::Relu) };
    let own = ModelConfig::open(dir.path()).unwrap().layer(0);
    let record = Record { version: 1, variant: reshaping.of(own, from).unwrap(), ..Record::default() };
    std::fs::write(dir.path().join("trefoil.json"), serde_json::to_vec(&record).unwrap()).unwrap();
    dir
}

#[test]
fn what_was_done_to_a_model_is_known_to_all_three() {
    // In the private layer alone, and in a public one too.
    for from in [1, 0] {
        as_in_one_process(reshaped(from).path(), &options(Some(1)));
    }
}

/// The base itself knows nothing of it.
#[test]
fn the_base_serves_as_the_public_part_of_a_reshaped_model() {
    let (model, tmp) = (reshaped(1), tempfile::tempdir().unwrap());
    let base = smaller("llama-plain", &[]);
    let prep = tmp.path().join("prep");
    prepare(model.path(), &prep, &options(Some(1)));
    std::fs::copy(prep.join("public/manifest.json"), base.path().join("manifest.json")).unwrap();
    let client = ClientModel::open(base.path()).unwrap();
    assert_eq!(client.config().layer(1).num_heads, 2);
    assert_eq!(client.config().layer(0).num_heads, 4);
}

/// Of an adapter the Client gets the base and the plan: all matrices but the adapter's are its own.
#[test]
fn an_adapters_base_is_the_clients_own() {
    for (name, base, private) in [
        ("lora-all", "llama-plain", Some(2)),
        ("lora-grouped", "llama-linear", Some(2)),
        ("lora-some", "llama-plain", Some(1)),
        ("lora-some", "llama-plain", None),
        ("lora-qknorm", "qwen3-qknorm", Some(2)),
    ] {
        let o = Options { adapter: Some(fixture(name)), ..options(private) };
        as_in_one_process(&fixture(base), &o);
    }
    let tmp = tempfile::tempdir().unwrap();
    let o = Options { adapter: Some(fixture("lora-all")), ..options(Some(2)) };
    prepare(&fixture("llama-plain"), &tmp.path().join("prep"), &o);
    let public = tmp.path().join("prep/public");
    let names: Vec<String> =
        public.read_dir().unwrap().map(|e| e.unwrap().file_name().to_string_lossy().into_owned()).collect();
    assert!(!names.iter().any(|n| n.contains("adapter")), "{names:?}");
    let of = |dir: &Path| {
        let bytes = std::fs::read(dir.join("model.safetensors")).unwrap();
        let read = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        read.iter().map(|(n, t)| (n.to_owned(), t.data().to_vec())).collect::<std::collections::BTreeMap<_, _>>()
    };
    assert_eq!(of(&public), of(&fixture("llama-plain")), "the base, and nothing else");
}

/// A copy of a fixture, the tensors whose names end so divided.
fn smaller(name: &str, by: &[(&str, f32)]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(fixture(name)).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
    }
    let path = dir.path().join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let data = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(&bytes[8..data]).unwrap();
    for (suffix, by) in by {
        let tensors: Vec<_> = header.iter().filter(|(name, _)| name.ends_with(suffix)).collect();
        assert!(!tensors.is_empty(), "{suffix}");
        for (_, t) in tensors {
            assert_eq!(t["dtype"], "F32");
            let at = |i: usize| data + t["data_offsets"][i].as_u64().unwrap() as usize;
            for v in bytes[at(0)..at(1)].as_chunks_mut::<4>().0 {
                *v = (f32::from_le_bytes(*v) / by).to_le_bytes();
            }
        }
    }
    std::fs::write(&path, bytes).unwrap();
    dir
}

#[test]
fn more_fraction_bits_are_the_same_everywhere() {
    let small = [("model.norm.weight", 256.0), ("down_proj.weight", 64.0), ("self_attn.q_proj.weight", 128.0)];
    // The head private, then public: the Client's own integers, of as many bits as the plan says.
    for public_head in [false, true] {
        let dir = smaller("llama-plain", &small);
        let base = public_head.then(|| dir.path().to_owned());
        let o = Options { base, ..options(Some(1)) };
        let prep = tempfile::tempdir().unwrap();
        let made = prepare(dir.path(), &prep.path().join("prep"), &o);
        let plan = &made.manifest().plan;
        assert_eq!(plan.head.public, public_head);
        let layer = &plan.layers[0];
        let more = [plan.head.f_weight, layer.mlp.f_down, layer.attention.f_qkv];
        assert!(more.iter().all(|f| *f > FW_LEAST), "{more:?}");
        as_in_one_process(dir.path(), &o);
    }
}

#[test]
fn a_preparation_of_an_older_format_is_refused_with_what_to_do() {
    let text = String::from_utf8(sample().to_vec()).unwrap();
    let old = text.replacen("\"format\": 2", "\"format\": 1", 1);
    assert_ne!(text, old);
    let e = PublicManifest::parse(old.as_bytes(), "manifest.json").unwrap_err().to_string();
    assert!(e.contains("format 1") && e.contains("prepare anew"), "{e}");
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o777
}

fn small(tmp: &TempDir) -> (PathBuf, OwnerPreparation) {
    let prep = tmp.path().join("prep");
    let made = prepare(&fixture("qwen3-qknorm"), &prep, &options(None));
    (prep, made)
}

#[test]
fn secrets_are_in_private_files_only() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = fixture("llama-plain");
    let prep = tmp.path().join("prep");
    let made = prepare(&dir, &prep, &options(Some(1)));
    let store = HelperStore::open(&tmp.path().join("store")).unwrap();
    transfer(&made, &store).unwrap();
    assert_eq!(mode(&tmp.path().join("store")), 0o700);
    let at = tmp.path().join("store").join(made.manifest().id.to_string());
    for private in [prep.join("seed"), prep.join("owner.bin"), prep.join("half.sha256"), at.join("half.bin")] {
        assert_eq!(mode(&private), 0o600, "{}", private.display());
    }
    assert_eq!(mode(&prep), 0o700);
    // Neither private weights, in any 16 bytes of them, nor the seed, nor hashes of the half.
    let w = Weights::load(&Checkpoint::open(&dir).unwrap()).unwrap();
    let last = w.layers.last().unwrap();
    let bytes = |v: &[f32]| v.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    let halves = |v: &[f32]| v.iter().flat_map(|v| ((v.to_bits() >> 16) as u16).to_le_bytes()).collect::<Vec<u8>>();
    let mut needles: Vec<Vec<u8>> = vec![made.seed().to_bytes()[..16].to_vec()];
    needles.extend(made.hashes().chunks(32).map(<[u8]>::to_vec));
    for m in [&last.q.w, &last.o.w, &last.gate.w, &last.down.w, w.head.as_ref().unwrap()] {
        needles.push(bytes(&m.as_slice().unwrap()[8..12]));
        needles.push(halves(&m.as_slice().unwrap()[8..16]));
    }
    needles.push(bytes(&w.norm.as_slice().unwrap()[..4]));
    let hex = |b: &[u8]| b.iter().map(|b| format!("{b:02x}")).collect::<String>().into_bytes();
    needles.extend(needles.clone().iter().map(|n| hex(n)));
    let mut files = vec![prep.join("manifest.json"), at.join("manifest.json")];
    files.extend(std::fs::read_dir(prep.join("public")).unwrap().map(|e| e.unwrap().path()));
    for file in &files {
        let have = std::fs::read(file).unwrap();
        for n in &needles {
            assert!(!have.windows(n.len()).any(|w| w == n), "{}", file.display());
        }
    }
    // The search finds what is there.
    let public = std::fs::read(prep.join("public/model.safetensors")).unwrap();
    let shown = bytes(&w.layers[0].q.w.as_slice().unwrap()[8..12]);
    let short = halves(&w.layers[0].q.w.as_slice().unwrap()[8..16]);
    assert!(public.windows(16).any(|w| w == shown || w == short));
    // With everything private there are no public tensors at all.
    let all = tmp.path().join("all");
    prepare(&dir, &all, &options(None));
    assert!(!all.join("public/model.safetensors").exists());
    assert!(all.join("public/config.json").exists());
    let debug = format!("{made:?}");
    assert!(debug.len() < 300, "{debug}");
}

#[test]
fn a_transfer_resumes_after_any_interruption() {
    let tmp = tempfile::tempdir().unwrap();
    let (_, made) = small(&tmp);
    let store = HelperStore::open(&tmp.path().join("store")).unwrap();
    let part = tmp.path().join("store").join(made.manifest().id.to_string()).join("half.part");
    let begin = || store.incoming(made.manifest(), made.hashes());
    let mut incoming = begin().unwrap();
    assert!(made.chunk_count() > 8);
    for i in 0..5 {
        assert_eq!(incoming.next_chunk(), i);
        incoming.put(i, &made.chunk(i).unwrap()).unwrap();
    }
    assert!(begin().unwrap_err().to_string().contains("coming in already"));
    assert!(store.remove(&made.manifest().id).is_err());
    assert!(store.ids().unwrap().is_empty());
    drop(incoming);
    assert_eq!(mode(&part), 0o600);
    assert!(store.load(&made.manifest().id).unwrap_err().to_string().contains("not complete"));

    // A torn end, then a flipped bit: the rest is kept.
    let length = std::fs::metadata(&part).unwrap().len();
    std::fs::OpenOptions::new().write(true).open(&part).unwrap().set_len(length - 1).unwrap();
    assert_eq!(begin().unwrap().next_chunk(), 4);
    let mut bytes = std::fs::read(&part).unwrap();
    *bytes.last_mut().unwrap() ^= 4;
    std::fs::write(&part, &bytes).unwrap();
    let mut incoming = begin().unwrap();
    assert_eq!(incoming.next_chunk(), 3);

    // A wrong chunk is refused by name, and the right one still taken.
    let good = made.chunk(3).unwrap();
    let mut bad = good.clone();
    bad[0] ^= 1;
    let kind = |r: Result<()>| match r {
        Err(Error::Peer { role: Role::Owner, kind, .. }) => kind,
        other => panic!("{other:?}"),
    };
    assert_eq!(kind(incoming.put(3, &bad)), PeerFault::Malformed("a chunk that is not the announced one"));
    assert_eq!(kind(incoming.put(4, &good)), PeerFault::Malformed("a chunk out of order"));
    assert_eq!(kind(incoming.put(3, &good[1..])), PeerFault::Length { want: good.len(), got: good.len() - 1 });
    incoming.put(3, &good).unwrap();
    assert_eq!(kind(incoming.finish()), PeerFault::Malformed("fewer chunks than announced"));
    transfer(&made, &store).unwrap();
    assert_eq!(store.ids().unwrap(), [made.manifest().id]);
    assert!(!part.exists());
    assert!(begin().unwrap_err().to_string().contains("complete here already"));
    store.load(&made.manifest().id).unwrap();
    store.remove(&made.manifest().id).unwrap();
    assert!(store.ids().unwrap().is_empty());
    let mut few = made.hashes().to_vec();
    few.pop();
    let short = store.incoming(made.manifest(), &few).unwrap_err();
    assert!(matches!(short, Error::Peer { kind: PeerFault::Length { .. }, .. }), "{short}");
    let tight = store.with_limit(1000).incoming(made.manifest(), made.hashes()).unwrap_err();
    assert!(tight.to_string().contains("memory_gb"), "{tight}");
}

/// Cut short, lengthened, and with one bit wrong: refused each time, naming the file.
#[track_caller]
fn damage(path: &Path, load: &dyn Fn() -> Result<()>) {
    let good = std::fs::read(path).unwrap();
    let name = path.file_name().unwrap().to_string_lossy().into_owned();
    let mut cases: Vec<Vec<u8>> = [0, 1, 7, good.len() / 2, good.len() - 1].map(|n| good[..n].to_vec()).to_vec();
    cases.push([&good[..], &[0]].concat());
    for at in [0, good.len() / 3, good.len() - 1] {
        let mut bad = good.clone();
        bad[at] ^= 0x10;
        cases.push(bad);
    }
    for (i, case) in cases.iter().enumerate() {
        std::fs::write(path, case).unwrap();
        let e = load().expect_err(&format!("{name}, case {i}")).to_string();
        // A seed has no place to hold a checksum: its other half finds it.
        assert!(e.contains(&name) || name == "half.sha256" && e.contains("half.bin"), "{name}, case {i}: {e}");
    }
    std::fs::remove_file(path).unwrap();
    assert!(load().is_err());
    std::fs::write(path, good).unwrap();
    load().unwrap();
}

#[test]
fn damaged_files_are_refused_by_name() {
    let tmp = tempfile::tempdir().unwrap();
    let (prep, made) = small(&tmp);
    let store = HelperStore::open(&tmp.path().join("store")).unwrap();
    transfer(&made, &store).unwrap();
    let id = made.manifest().id;
    let open = || OwnerPreparation::open(&prep).map(|_| ());
    damage(&prep.join("seed"), &open);
    damage(&prep.join("owner.bin"), &open);
    let load = || store.load(&id).map(|_| ());
    damage(&tmp.path().join("store").join(id.to_string()).join("half.bin"), &load);
    damage(&tmp.path().join("store").join(id.to_string()).join("half.sha256"), &load);
}

#[test]
fn a_changed_model_is_a_new_preparation() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = fixture("llama-plain");
    let one = prepare(&dir, &tmp.path().join("one"), &options(Some(1)));
    let again = OwnerPreparation::create(&dir, &tmp.path().join("one"), &options(Some(1)), &mut |_, _| ());
    assert!(again.unwrap_err().to_string().contains("new preparation with a new seed"));
    let two = prepare(&dir, &tmp.path().join("two"), &options(Some(1)));
    assert_ne!(one.manifest().id, two.manifest().id);
    assert_ne!(one.seed().to_bytes(), two.seed().to_bytes());
    assert_ne!(one.chunk(0).unwrap(), two.chunk(0).unwrap());
    assert_eq!(one.manifest().public_hash, two.manifest().public_hash);
    // Nothing half made lies about, not even after a failure.
    let broken = tmp.path().join("broken");
    std::fs::create_dir(&broken).unwrap();
    std::fs::copy(dir.join("config.json"), broken.join("config.json")).unwrap();
    OwnerPreparation::create(&broken, &tmp.path().join("three"), &options(Some(1)), &mut |_, _| ()).unwrap_err();
    let mut names: Vec<_> = std::fs::read_dir(tmp.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["broken", "one", "two"]);
}

#[test]
fn a_client_refuses_what_is_not_its_own_with_both_values() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = fixture("llama-plain");
    let one = prepare(&dir, &tmp.path().join("one"), &options(Some(1)));
    let client = ClientModel::open(&tmp.path().join("one/public")).unwrap();
    client.secure_model(one.manifest(), one.seed()).unwrap();
    let refused = |theirs: &PublicManifest, what: &str| {
        let e = client.agree(theirs).unwrap_err();
        let Error::Peer { role: Role::Owner, kind: PeerFault::Mismatch { what: got, ours, theirs, .. }, .. } = &e
        else {
            panic!("{e}");
        };
        assert!(got.contains(what) && ours != theirs, "{e}");
        assert!(e.to_string().contains(ours) && e.to_string().contains(theirs));
    };
    let two = prepare(&dir, &tmp.path().join("two"), &options(Some(1)));
    refused(two.manifest(), "the preparation");
    let wide = prepare(&dir, &tmp.path().join("wide"), &Options { max_positions: Some(32), ..options(Some(1)) });
    refused(wide.manifest(), "plan");
    let other = prepare(&fixture("llama-llama3"), &tmp.path().join("other"), &options(Some(1)));
    refused(other.manifest(), "");
    // A tensor changed on the Client's disk.
    let path = tmp.path().join("one/public/model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let at = bytes.len() - 4;
    bytes[at] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let e = ClientModel::open(&tmp.path().join("one/public")).unwrap_err().to_string();
    assert!(e.contains(&one.manifest().public_hash.to_string()) && e.contains("public"), "{e}");
    // The public base itself will do, with the manifest beside it.
    let base = tmp.path().join("base");
    std::fs::create_dir(&base).unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(dir.join(name), base.join(name)).unwrap();
    }
    std::fs::copy(tmp.path().join("one/manifest.json"), base.join("manifest.json")).unwrap();
    ClientModel::open(&base).unwrap().secure_model(one.manifest(), one.seed()).unwrap();
}

fn command(out: &Path) -> std::process::Command {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_trefoil"));
    command.args(["prepare", "--private-layers", "2", "--json", "--model"]).arg(quill()).arg("--out").arg(out);
    command
}

#[test]
fn the_command_prepares_once() {
    let tmp = tempfile::tempdir().unwrap();
    let out = tmp.path().join("prep");
    let run = || command(&out).output().unwrap();
    let first = run();
    assert!(first.status.success() && first.stderr.is_empty(), "{}", String::from_utf8_lossy(&first.stderr));
    let report: serde_json::Value = serde_json::from_slice(&first.stdout).unwrap();
    let prep = OwnerPreparation::open(&out).unwrap();
    assert_eq!(report["id"], prep.manifest().id.to_string());
    assert_eq!(report["helper_bytes"], prep.manifest().half.bytes);
    assert_eq!(mode(&out.join("public/model.safetensors")), 0o644);
    let second = run();
    assert!(!second.status.success() && second.stdout.is_empty());
    assert!(String::from_utf8_lossy(&second.stderr).contains("new preparation with a new seed"));
    assert_eq!(OwnerPreparation::open(&out).unwrap().manifest(), prep.manifest());
}

#[test]
fn a_killed_command_leaves_nothing_half_valid() {
    let tmp = tempfile::tempdir().unwrap();
    for wait in [20, 300, 500, 600, 700, 900] {
        let out = tmp.path().join(format!("prep-{wait}"));
        let mut child = command(&out).stdout(std::process::Stdio::null()).spawn().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(wait));
        child.kill().unwrap();
        child.wait().unwrap();
        // Either it is not there, and can be made now, or it is whole.
        if out.exists() {
            OwnerPreparation::open(&out).unwrap();
            ClientModel::open(&out.join("public")).unwrap();
        }
    }
}

fn sample() -> &'static [u8] {
    static SAMPLE: std::sync::OnceLock<Vec<u8>> = std::sync::OnceLock::new();
    SAMPLE.get_or_init(|| {
        let tmp = tempfile::tempdir().unwrap();
        small(&tmp).1.manifest().to_json().unwrap()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn garbage_is_no_manifest(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        prop_assert!(PublicManifest::parse(&bytes, "x").is_err());
    }

    /// A number of the manifest replaced by any other: refused, or a manifest that can be used.
    #[test]
    fn a_changed_number_never_panics(which in 0usize..400, by in any::<i64>(), small in 0i64..100, choose in any::<bool>()) {
        let text = String::from_utf8(sample().to_vec()).unwrap();
        let plan = text.find("\"plan\"").unwrap();
        let digits = |c: char| c.is_ascii_digit();
        let starts: Vec<usize> = text[plan..].char_indices().filter(|(i, c)| digits(*c) && text[plan..][..*i].ends_with(' ')).map(|(i, _)| plan + i).collect();
        let from = starts[which % starts.len()];
        let length = text[from..].find(|c| !digits(c)).unwrap();
        let new = if choose { small } else { by };
        let changed = format!("{}{new}{}", &text[..from], &text[from + length..]);
        if let Ok(m) = PublicManifest::parse(changed.as_bytes(), "x") {
            prop_assert!(m.model_config().is_ok());
            let tmp = tempfile::tempdir().unwrap();
            let store = HelperStore::open(tmp.path()).unwrap();
            let hashes = vec![0; 32 * m.half.chunks as usize];
            prop_assert!(store.incoming(&m, &hashes).is_ok());
        }
    }

    #[test]
    fn a_cut_or_flipped_manifest_never_panics(cut in any::<prop::sample::Index>(), at in any::<prop::sample::Index>(), bit in 0u8..8) {
        let all = sample();
        prop_assert!(PublicManifest::parse(&all[..cut.index(all.len())], "x").is_err());
        let mut bytes = all.to_vec();
        bytes[at.index(all.len())] ^= 1 << bit;
        let _ = PublicManifest::parse(&bytes, "x");
    }
}
