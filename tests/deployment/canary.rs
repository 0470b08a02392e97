//! Nothing secret in logs, errors and files: prompt, weights, seeds, keys and masks of known values are planted, and looked
//! for in everything that the parties write, at the most talkative level, also when things go wrong.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rand_chacha::ChaCha20Rng;
use rand_core::{Rng, SeedableRng};
use trefoil::deploy::certs::Key;
use trefoil::deploy::wire::{Reply, Seed};
use trefoil::generate::{Local, LocalOptions};
use trefoil::model::store::{ClientModel, HelperStore, OwnerPreparation};
use trefoil::model::{Checkpoint, TextCodec, Weights};
use trefoil::net::{Channel, Lane};
use trefoil::party::Role;
use trefoil::prf::{AddressLog, Pair, PairKey, PreparationSeed, Prf};
use trefoil::world::Keys;

use crate::attacker::open;
use crate::gateway::Gateway;
use crate::http::{get, post};
use crate::search::Search;
use crate::support::*;

const SECRET_PROMPT: &str = "Zanzibar heron quinquefoil umbrella seventeen, the purple";

/// Values of planted weights: eight bits each, so that bfloat16 and fixed point both have them exactly.
fn planted() -> Vec<i64> {
    (0..24).map(|i| (129 + i * 47 % 127) * if i % 3 == 1 { -1 } else { 1 }).collect()
}

fn weight(v: i64) -> f32 {
    v as f32 / 4096.0
}

/// The bundled model with the pattern in rows of private matrices.
fn model(dir: &Path) -> PathBuf {
    let out = dir.join("model");
    std::fs::create_dir(&out).unwrap();
    for entry in std::fs::read_dir(MODEL).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), out.join(entry.file_name())).unwrap();
    }
    let path = out.join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let tensors: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    for name in ["model.layers.5.self_attn.o_proj.weight", "model.layers.6.mlp.down_proj.weight"] {
        let tensor = &tensors[name];
        assert_eq!(tensor["dtype"], "BF16");
        let columns = tensor["shape"][1].as_u64().unwrap() as usize;
        let begin = 8 + header + tensor["data_offsets"][0].as_u64().unwrap() as usize;
        let row = begin + 2 * 3 * columns;
        for (i, v) in planted().into_iter().enumerate() {
            let high = (weight(v).to_bits() >> 16) as u16;
            assert_eq!(f32::from_bits(u32::from(high) << 16), weight(v));
            bytes[row + 2 * i..row + 2 * i + 2].copy_from_slice(&high.to_le_bytes());
        }
    }
    std::fs::write(&path, bytes).unwrap();
    out
}

fn look_for_weights(search: &mut Search) {
    let values = planted();
    let bytes = |f: &dyn Fn(i64) -> Vec<u8>| values.iter().flat_map(|&v| f(v)).collect::<Vec<u8>>();
    search.bytes("weights as i16", &bytes(&|v| (v as i16).to_le_bytes().to_vec())[..16]);
    search.bytes("weights as i32", &bytes(&|v| (v as i32).to_le_bytes().to_vec())[..32]);
    search.bytes("weights as i64", &bytes(&|v| v.to_le_bytes().to_vec())[..32]);
    search.bytes("weights as f32", &bytes(&|v| weight(v).to_le_bytes().to_vec())[..32]);
    search.bytes("weights as f64", &bytes(&|v| f64::from(weight(v)).to_le_bytes().to_vec())[..32]);
    let short = |v: i64| ((weight(v).to_bits() >> 16) as u16).to_le_bytes().to_vec();
    search.bytes("weights as bf16", &bytes(&short)[..16]);
    // A message may show a few only.
    search.numbers("weights", &values[..4].iter().map(|&v| weight(v)).collect::<Vec<_>>());
    search.numbers("fixed-point weights", &values[..4]);
}

fn look_for_prompt(search: &mut Search, codec: &TextCodec) {
    search.bytes("prompt", &SECRET_PROMPT.as_bytes()[..26]);
    search.bytes("rare word", b"quinquefoil");
    let ids = codec.encode(SECRET_PROMPT).unwrap();
    let some = &ids[2..8];
    search.bytes("token ids as u32", &some.iter().flat_map(|t| t.to_le_bytes()).collect::<Vec<_>>());
    search.bytes("token ids as u64", &some.iter().flat_map(|&t| u64::from(t).to_le_bytes()).collect::<Vec<_>>());
    search.numbers("token ids", some);
}

/// What a PEM file holds.
fn der(pem: &str) -> Vec<u8> {
    let text: String = pem.lines().filter(|l| !l.starts_with("-----")).collect();
    let value = |c: u8| match c {
        b'A'..=b'Z' => c - b'A',
        b'a'..=b'z' => c - b'a' + 26,
        b'0'..=b'9' => c - b'0' + 52,
        b'+' => 62,
        _ => 63,
    };
    let text: Vec<u8> = text.bytes().take_while(|&c| c != b'=').map(value).collect();
    (0..text.len() * 6 / 8)
        .map(|i| (0..8).fold(0, |v, j| v << 1 | text[(8 * i + j) / 6] >> (5 - (8 * i + j) % 6) & 1))
        .collect()
}

/// The private number of a P-256 key in PKCS #8: an octet string of 32 bytes.
fn private_number(pem: &str) -> Vec<u8> {
    let der = der(pem);
    let at = der.windows(2).position(|w| w == [4, 32]).unwrap();
    der[at + 2..at + 34].to_vec()
}

fn files(dir: &Path, all: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { files(&path, all) } else { all.push(path) }
    }
}

fn wait_text(party: &Party, text: &str) {
    let deadline = std::time::Instant::now() + Duration::from_secs(30);
    while !party.log.lock().unwrap().iter().any(|l| l.contains(text)) {
        assert!(std::time::Instant::now() < deadline, "no {text:?} in the log");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn nothing_secret_in_logs_errors_and_files() {
    let mut site = Site::new();
    let model = model(site.dir.path());
    site.preparation = site.path("prep");
    let temporary = site.path("tmp");
    std::fs::create_dir(&temporary).unwrap();
    let mut prepare = trefoil();
    prepare.args(["prepare", "--model"]).arg(&model).arg("--out").arg(&site.preparation);
    let prepared = run(prepare.env("TMPDIR", &temporary).env("RUST_LOG", "trace"));
    assert!(prepared.status.success());

    let mut search = Search::default();
    look_for_weights(&mut search);
    look_for_prompt(&mut search, &TextCodec::open(&model).unwrap());
    search.bytes("preparation seed", &std::fs::read(site.preparation.join("seed")).unwrap());
    for name in ["owner", "helper", "client"] {
        let pem = std::fs::read_to_string(site.path(&format!("{name}.key"))).unwrap();
        search.bytes(&format!("the {name}'s key"), &private_number(&pem));
    }

    let mut written: Vec<(String, Vec<u8>)> = vec![("prepare".into(), [prepared.stdout, prepared.stderr].concat())];
    for format in ["text", "json"] {
        let environment = [("RUST_LOG", "trace"), ("TMPDIR", temporary.to_str().unwrap())];
        let any = "127.0.0.1:0";
        let start = |config: &Path| Party::start_as(config, format, &environment);
        let helper = start(&site.config("helper", trefoil::party::Role::Helper, "helper", any, "", ""));
        let owner = start(&site.config("owner", trefoil::party::Role::Owner, "owner", any, "", &helper.address));
        let client = site.config("client", trefoil::party::Role::Client, "client", "", &owner.address, &helper.address);
        wait_text(&owner, "the helper has the model");
        let generate = |prompt: &str, tokens: &str| {
            let mut c = trefoil();
            c.args(["generate", "--prompt", prompt, "--max-new-tokens", tokens, "--config"]).arg(&client);
            c.env("RUST_LOG", "trace").env("TMPDIR", &temporary);
            c
        };
        let out = run(&mut generate(SECRET_PROMPT, "4"));
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        written.push(("client's report".into(), out.stderr));
        // A prompt that is too long; a Client that does not keep to the protocol; a Helper that dies.
        let out = run(&mut generate(&SECRET_PROMPT.repeat(60), "4"));
        assert!(!out.status.success());
        written.push(("client's error".into(), out.stderr));
        let nonce = if format == "text" { [3; 32] } else { [4; 32] };
        let attack = open(&client, nonce).unwrap_or_else(|refused| panic!("{refused:?}"));
        let tag = trefoil::session::Scope::new("request").address(0, "request.open").tag();
        let frame = trefoil::net::Message { tag, depth: 1, not_before: None, payload: vec![1; 32] };
        attack.owner.send(Lane::Online, frame).unwrap();
        wait_text(&owner, "session failed");
        drop(attack);
        let mut helper = helper;
        let out = std::thread::scope(|s| {
            let sessions = |p: &Party| p.log.lock().unwrap().iter().filter(|l| l.contains("session begins")).count();
            let before = sessions(&owner);
            let out = s.spawn(|| run(&mut generate(SECRET_PROMPT, "120")));
            while sessions(&owner) == before {
                std::thread::sleep(Duration::from_millis(5));
            }
            std::thread::sleep(Duration::from_millis(100));
            helper.kill();
            out.join().unwrap()
        });
        assert!(!out.status.success());
        written.push(("client's error".into(), out.stderr));
        std::thread::sleep(Duration::from_millis(500));
        for (name, party) in [("owner", &owner), ("helper", &helper)] {
            let log = party.log.lock().unwrap().join("\n");
            assert!(log.contains("TRACE"), "the {name}'s log is not at level trace");
            written.push((format!("{name}'s log, {format}"), log.into_bytes()));
        }
    }

    // Keys, the model, and the Owner's own part of the preparation are where secrets belong. The Helper's half is searched.
    let secret = |path: &Path| {
        let kept = [site.preparation.join("seed"), site.preparation.join("owner.bin")];
        path.extension().is_some_and(|e| e == "key") || path.starts_with(&model) || kept.contains(&path.to_path_buf())
    };
    let mut all = Vec::new();
    files(site.dir.path(), &mut all);
    let (secret, open): (Vec<PathBuf>, Vec<PathBuf>) = all.into_iter().partition(|p| secret(p));
    let bytes: usize = written.iter().map(|(_, w)| w.len()).sum();
    for path in &open {
        written.push((path.display().to_string(), std::fs::read(path).unwrap()));
    }
    for (place, content) in &written {
        assert_eq!(search.find(content), Vec::<&str>::new(), "{place}");
    }
    // The search would find them: they are where they belong.
    let found = |name: &str| search.find(&std::fs::read(secret.iter().find(|p| p.ends_with(name)).unwrap()).unwrap());
    assert!(found("model.safetensors").contains(&"weights as bf16, raw"));
    assert!(found("prep/seed").contains(&"preparation seed, raw"));
    assert!(open.iter().any(|p| p.ends_with("half.bin")));
    eprintln!("{} forms; {bytes} bytes of logs and errors, {} files: nothing", search.forms(), open.len());

    shown(&search, &site, &model);
}

/// The same of the gateway: its log, its page and what that shows to another caller, its metrics and those of the parties, and
/// answers that are errors. Of what was answered only the caller learns.
#[test]
fn nothing_secret_from_the_gateway_its_page_and_its_metrics() {
    let mut site = Site::new();
    let model = model(site.dir.path());
    (site.preparation, site.metrics) = (site.path("prep"), true);
    let mut prepare = trefoil();
    assert!(run(prepare.args(["prepare", "--model"]).arg(&model).arg("--out").arg(&site.preparation)).status.success());
    let (ours, theirs) = ("canary-key-quokka-0001", "another-key-0002-of-somebody");
    let keys = site.path("api.keys");
    std::fs::write(&keys, format!("{ours}\n{theirs}\n")).unwrap();
    std::fs::set_permissions(&keys, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let (any, loud) = ("127.0.0.1:0", [("RUST_LOG", "trace")]);
    let helper = Party::start_as(&site.config("helper", Role::Helper, "helper", any, "", ""), "text", &loud);
    let owner = Party::start_as(&site.config("owner", Role::Owner, "owner", any, "", &helper.address), "json", &loud);
    wait_text(&owner, "the helper has the model");
    let client = site.config("client", Role::Client, "client", "", &owner.address, &helper.address);
    let gateway = Gateway::of(&client, any, &["--sessions", "2", "--api-keys", keys.to_str().unwrap()], &loud);
    let at = gateway.address.as_str();
    let by = |key: &str| format!("Bearer {key}");
    let ask = |key: &str, body: serde_json::Value| {
        post(at, "/v1/completions", &[("Authorization", &by(key))], &body.to_string())
    };
    let body = |n: usize| serde_json::json!({"prompt": SECRET_PROMPT, "max_tokens": n, "temperature": 0});

    let answer = ask(ours, body(24));
    assert_eq!(answer.status, 200, "{}", answer.body);
    let said = answer.json()["choices"][0]["text"].as_str().unwrap().to_owned();
    let mut search = Search::default();
    look_for_weights(&mut search);
    look_for_prompt(&mut search, &TextCodec::open(&model).unwrap());
    search.bytes("answer", said.as_bytes());
    search.bytes("an API key", ours.as_bytes());
    search.bytes("preparation seed", &std::fs::read(site.preparation.join("seed")).unwrap());
    for name in ["owner", "helper", "client"] {
        let pem = std::fs::read_to_string(site.path(&format!("{name}.key"))).unwrap();
        search.bytes(&format!("the {name}'s key"), &private_number(&pem));
    }
    assert!(search.find(answer.body.as_bytes()).contains(&"answer, raw"), "the search does not find what is there");

    // As chats, through the template, whole and as a stream to its end.
    let picture = serde_json::json!([{"type": "image_url", "image_url": {"url": SECRET_PROMPT}}]);
    let talk = |content: &serde_json::Value, stream: bool| {
        let said = serde_json::json!([{"role": "user", "content": content}]);
        let body = serde_json::json!({"messages": said, "max_tokens": 4, "stream": stream});
        post(at, "/v1/chat/completions", &[("Authorization", &by(ours))], &body.to_string())
    };
    let text = serde_json::json!(SECRET_PROMPT);
    assert_eq!((talk(&text, false).status, talk(&text, true).status), (200, 200));

    // What goes wrong: too long, refused by name, no request, a wrong key, a caller that leaves, a Helper that dies.
    let mut seen: Vec<(String, String)> = Vec::new();
    let long = serde_json::json!({"prompt": SECRET_PROMPT.repeat(60)});
    let mut tools = body(4);
    tools["logit_bias"] = serde_json::json!({SECRET_PROMPT: 1});
    let torn = format!("{{\"prompt\": \"{SECRET_PROMPT}");
    for (what, reply) in [
        ("too long", ask(ours, long)),
        ("refused", ask(ours, tools)),
        ("a picture", talk(&picture, false)),
        ("torn", post(at, "/v1/completions", &[("Authorization", &by(ours))], &torn)),
        ("without a key", post(at, "/v1/completions", &[], &body(4).to_string())),
        ("a wrong key", ask(&format!("{ours}-not"), body(4))),
        ("no such page", get(at, "/no-such-page", &[])),
    ] {
        assert!(reply.status >= 400, "{what}: {}", reply.body);
        seen.push((what.into(), reply.body));
    }
    let mut left = body(100);
    left["stream"] = true.into();
    drop(crate::http::send(at, "POST", "/v1/completions", &[("Authorization", &by(ours))], &left.to_string()));
    let look = |key: &str, path: &str| get(at, path, &[("Authorization", &by(key))]).body;
    for path in ["/", "/page/app.js", "/page/style.css", "/health", "/ready", "/v1/models", "/metrics", "/api/state"] {
        seen.push((path.into(), look(theirs, path)));
    }
    // The samples are the caller's alone.
    assert!(!look(theirs, "/api/state").contains("\"bytes\":\""), "{}", look(theirs, "/api/state"));
    for (name, party) in [("owner", &owner), ("helper", &helper)] {
        let deadline = std::time::Instant::now() + Duration::from_secs(10);
        let address = loop {
            let log = party.log.lock().unwrap().join("\n");
            let found = log.lines().find(|l| l.contains("metrics") && l.contains("127.0.0.1:")).and_then(|l| {
                let port: String = l.split("127.0.0.1:").nth(1)?.chars().take_while(char::is_ascii_digit).collect();
                Some(format!("127.0.0.1:{port}"))
            });
            if let Some(address) = found {
                break address;
            }
            assert!(std::time::Instant::now() < deadline, "{name} does not say where its metrics are");
            std::thread::sleep(Duration::from_millis(50));
        };
        for path in ["/metrics", "/health", "/ready"] {
            seen.push((format!("{name}'s {path}"), get(&address, path, &[]).body));
        }
    }
    let mut helper = helper;
    helper.kill();
    let failed = ask(ours, body(8));
    assert!(failed.status >= 500, "{}", failed.body);
    seen.push(("without a helper".into(), failed.body));
    seen.push(("ready without a helper".into(), look(theirs, "/ready")));
    for (name, party) in [("owner", &owner), ("helper", &helper)] {
        seen.push((format!("{name}'s log"), party.log.lock().unwrap().join("\n")));
    }
    let log = gateway.log.lock().unwrap().clone();
    assert!(log.contains("TRACE"), "the gateway's log is not at level trace");
    seen.push(("gateway's log".into(), log));
    let bytes: usize = seen.iter().map(|(_, text)| text.len()).sum();
    for (place, text) in &seen {
        assert!(!text.is_empty(), "{place} is empty");
        assert_eq!(search.find(text.as_bytes()), Vec::<&str>::new(), "{place}");
    }
    eprintln!("{} forms; {bytes} bytes of {} places: nothing", search.forms(), seen.len());
}

/// What values that hold secrets say of themselves.
fn shown(search: &Search, site: &Site, model: &Path) {
    let prepared = OwnerPreparation::open(&site.preparation).unwrap();
    let seed: [u8; 32] = std::fs::read(site.preparation.join("seed")).unwrap().try_into().unwrap();
    let client = ClientModel::open(&site.preparation.join("public")).unwrap();
    let secure = client.secure_model(prepared.manifest(), &PreparationSeed::from_bytes(seed)).unwrap();
    let welcome = Reply::Welcome {
        owner_nonce: [0; 32],
        helper_nonce: [0; 32],
        helper: String::new(),
        manifest: vec![],
        seed: Seed(seed),
        ahead_capacity: 0,
        prompt_tokens: 0,
        session: [0; 32],
    };
    let store = HelperStore::open(&site.path("helper.store")).unwrap();
    let half = store.load(&prepared.manifest().id).unwrap().1;
    let weights = Weights::load(&Checkpoint::open(model).unwrap()).unwrap();
    let mut codec = TextCodec::open(model).unwrap();
    let stream = codec.stream(&codec.encode(SECRET_PROMPT).unwrap()).unwrap();
    let shown = [
        format!("{:?} {:?} {:?} {:?}", prepared, prepared.seed(), prepared.model(), prepared.manifest()),
        format!("{client:?} {secure:?} {half:?} {welcome:?} {weights:?} {:?}", weights.layers),
        format!("{:?} {:?} {stream:?}", Key::load(&site.path("owner.key")).unwrap(), codec_shown(&mut codec)),
    ];
    for text in shown {
        assert_eq!(search.find(text.as_bytes()), Vec::<&str>::new(), "{}", &text[..text.len().min(200)]);
    }
}

fn codec_shown(codec: &mut TextCodec) -> String {
    format!("{codec:?}")
}

#[derive(Clone, Default)]
struct Captured(Arc<Mutex<Vec<u8>>>);

impl Write for Captured {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// The keys of a session come out of TLS, where nothing can be planted; so here are sessions with known ones.
#[test]
fn no_key_and_no_mask_in_the_log() {
    const SEED: u64 = 20_260;
    let captured = Captured::default();
    let writer = captured.clone();
    let subscriber =
        tracing_subscriber::fmt().with_max_level(tracing::Level::TRACE).with_writer(move || writer.clone()).finish();
    // Also for the threads of the parties.
    tracing::subscriber::set_global_default(subscriber).unwrap();
    let log = AddressLog::default();
    let options = LocalOptions {
        keys: Some(Keys::seeded(SEED)),
        addresses: Some(log.clone()),
        max_positions: Some(48),
        ..LocalOptions::new(Some(2))
    };
    let mut local = Local::open(Path::new(MODEL), options).unwrap();
    let prompt = TextCodec::open(Path::new(MODEL)).unwrap().encode(SECRET_PROMPT).unwrap();
    local.generate(&prompt, 4, 0.0, 0, false, &mut |_| true).unwrap();
    let bad = local.generate(&prompt, 4, 99.0, 0, false, &mut |_| true).unwrap_err();
    let long = local.generate(&prompt.repeat(9), 4, 0.0, 0, false, &mut |_| true).unwrap_err();
    local.finish().unwrap();

    let mut rng = ChaCha20Rng::seed_from_u64(SEED);
    let mut search = Search::default();
    let keys = [Pair::OwnerClient, Pair::ClientHelper, Pair::OwnerHelper].map(|pair| {
        let mut key = [0; 16];
        rng.fill_bytes(&mut key);
        search.bytes(&format!("key of {pair:?}"), &key);
        (pair, key)
    });
    let mut again = Prf::new(keys.map(|(pair, key)| (pair, PairKey::new(key))));
    let mut masks = 0;
    let log = log.lock().unwrap();
    for t in log.iter().filter(|t| t.address.pass < 3).step_by(23) {
        // Both ends took it.
        let Ok(mut stream) = again.take(t.pair, &t.address) else { continue };
        let words = stream.words(4, 64);
        masks += 1;
        let name = format!("mask {}", t.address);
        for k in [16, 28, 44, 50, 64] {
            let words: Vec<u64> = words.iter().map(|w| w & (u64::MAX >> (64 - k))).collect();
            search.bytes(&name, bytemuck::cast_slice(&words));
            search.numbers(&name, &words);
        }
    }
    assert!(masks > 50, "{masks}");
    // These are the right keys: the log of addresses has the same blocks.
    look_for_prompt(&mut search, &TextCodec::open(Path::new(MODEL)).unwrap());
    let shown = format!("{again:?} {:?} {bad} {bad:?} {long} {long:?}", keys.map(|(_, k)| PairKey::new(k)));
    tracing::trace!("the end");
    let captured = captured.0.lock().unwrap();
    assert!(String::from_utf8_lossy(&captured).contains("the end"));
    for place in [&captured[..], shown.as_bytes()] {
        assert_eq!(search.find(place), Vec::<&str>::new());
    }
    eprintln!("{} forms of {masks} masks and three keys; {} bytes of log: nothing", search.forms(), captured.len());
}
