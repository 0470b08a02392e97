//! Predicted peak memory against the kernel's high-water mark of a process that plays ONE party: real parts, the real
//! program, and peers that answer with zeros.
//!
//! The test runs itself as a child process for each party and shape.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use ndarray::Array2;
use trefoil::Role;
use trefoil::error::PeerFault;
use trefoil::generate::{Grant, MAX_BATCH, helper, next_batch, owner};
use trefoil::model::preparation::{Loaded, Options};
use trefoil::model::prepare::{Prepared, PreparedLayer};
use trefoil::model::secure::{ClientPorts, PassOptions, SecureModel};
use trefoil::model::{ModelConfig, Weights};
use trefoil::net::meter::Meter;
use trefoil::net::{Abort, Channel, Lane, Links, Message};
use trefoil::plan::memory::{model_bytes, session_bytes};
use trefoil::plan::{FW_LEAST, Plan};
use trefoil::predict::Source;
use trefoil::prf::{Pair, PairKey, PreparationSeed, Prf};
use trefoil::protocol::embedding;
use trefoil::protocol::linear::OwnerMatrix;
use trefoil::session::{Scope, Session};

/// Hidden width, heads, key heads, MLP, layers, vocabulary, private layers, prompt, new tokens: the bundled model's shape,
/// and two others.
const SHAPES: [[usize; 9]; 3] =
    [[192, 6, 6, 512, 8, 2048, 4, 6, 64], [224, 7, 7, 600, 7, 1500, 4, 40, 33], [288, 9, 3, 900, 3, 5000, 3, 72, 12]];

/// Threads and their arenas, which a process that has just begun does not have yet.
const THREADS: u64 = 2 << 20;

fn config(s: &[usize; 9]) -> ModelConfig {
    let [hidden_size, num_heads, num_kv_heads, intermediate_size, num_layers, vocab_size, _, prompt, new] = *s;
    ModelConfig {
        num_kv_heads,
        tie_word_embeddings: true,
        ..ModelConfig::llama(hidden_size, intermediate_size, num_layers, num_heads, vocab_size, prompt + new)
    }
}

/// A peer that takes everything and answers zeros, but for the request.
struct Zeros {
    request: Vec<u8>,
    tag: u64,
    delay: Duration,
}

impl Channel for Zeros {
    fn send_frame(&self, _: Lane, _: Vec<Message>) -> Result<(), PeerFault> {
        Ok(())
    }

    fn recv(&self, lane: Lane, tag: u64, len: usize, _: Duration) -> Result<Message, PeerFault> {
        let payload = if tag == self.tag {
            self.request.clone()
        } else if len == 1 && lane == Lane::Online {
            vec![1]
        } else {
            vec![0; len]
        };
        if lane == Lane::Online && !self.delay.is_zero() {
            std::thread::sleep(self.delay);
        }
        Ok(Message { tag, depth: 1, not_before: None, payload })
    }

    fn drain(&self, _: Lane, tag: u64, len: usize, _: Duration) -> Result<(Message, u64), PeerFault> {
        Ok((Message { tag, depth: 1, not_before: None, payload: vec![0; len] }, 0))
    }

    fn end(&self, _: Option<&Abort>) {}
}

fn high_water() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches("kB").trim().parse::<u64>().unwrap() * 1024
}

fn parts(role: Role, c: &ModelConfig, plan: &Plan) -> Prepared {
    let seed = PreparationSeed::from_bytes([5; 32]);
    match role {
        Role::Client => Prepared::client(c, plan, &seed, &mut |_| unreachable!()).unwrap(),
        Role::Helper => Prepared::helper(c, plan, &mut |n| Ok((0..n as u64).collect())).unwrap(),
        Role::Owner => {
            let m = |m, n| {
                let w = Array2::from_elem((m, n), 0.5f32);
                OwnerMatrix::quantise(0, "w", w.view(), None, FW_LEAST).unwrap()
            };
            let (h, i) = (c.hidden_size, c.intermediate_size);
            let layer = |_| PreparedLayer {
                qkv: m(c.layer(0).q_size() + 2 * c.layer(0).kv_size(), h).into(),
                qk_gain: None,
                o: m(h, c.layer(0).q_size()).into(),
                gate_up: m(2 * i, h).into(),
                down: m(h, i).into(),
            };
            Prepared {
                layers: plan.layers.iter().enumerate().map(layer).collect(),
                head: m(c.vocab_size, h),
                embedding: None,
            }
        }
    }
}

/// One party alone; prints its high-water mark.
fn child(role: Role, s: &[usize; 9], plan: &Path) {
    let base = high_water();
    let plan: Plan = serde_json::from_slice(&std::fs::read(plan).unwrap()).unwrap();
    let c = config(s);
    let (prompt, new) = (s[7], s[8]);
    let mut request = 1u64.to_le_bytes().to_vec();
    request.extend((prompt as u32).to_le_bytes());
    request.extend((new as u32).to_le_bytes());
    request.resize(34, 0);
    let tag = Scope::new("request").address(0, "request.open").tag();
    // A Helper that is faster than its Owner.
    let delay = Duration::from_micros(if role == Role::Helper { 800 } else { 0 });
    let peers = Role::ALL.into_iter().filter(|&r| r != role);
    let peers = peers.map(|r| (r, Arc::new(Zeros { request: request.clone(), tag, delay }) as Arc<dyn Channel>));
    let links = Links::new(role, peers, Duration::from_secs(60), 256 << 20);
    let keys = [Pair::OwnerClient, Pair::ClientHelper, Pair::OwnerHelper].into_iter().filter(|p| p.has(role));
    let prf = Prf::new(keys.map(|p| (p, PairKey::new([9; 16]))));
    let mut session = Session::new(role, links, prf, Arc::new(Meter::default()));
    let model = SecureModel::new(c.clone(), plan.clone(), parts(role, &c, &plan));
    // Making weights is not what is measured: the mark starts anew here, where the kernel allows that.
    let _ = std::fs::write("/proc/self/clear_refs", "5");
    let grant = Grant::all(Duration::from_secs(60));
    match role {
        Role::Owner => drop(owner(&mut session, &model, &grant).unwrap()),
        Role::Helper => helper(&mut session, &model, &grant).unwrap(),
        Role::Client => client(&mut session, &model, &c, &plan, prompt, new),
    }
    println!("high water {} {base}", high_water());
}

/// The Client's walk; its tokens would be noise here.
fn client(s: &mut Session, model: &SecureModel, c: &ModelConfig, plan: &Plan, prompt: usize, new: usize) {
    let words = vec![0.5f32; model_bytes(Role::Client, c, plan).weights as usize / 4];
    let ((inputs, source), (token, _t), (flags, _f)) = (channel(), channel(), channel());
    let source = embedding::source(source);
    let ports = ClientPorts { source, token, flags, logits: None, names: Default::default() };
    let mut cache = model.cache(prompt + new);
    let (mut pass, mut batch) = (1, vec![prompt]);
    while !batch.is_empty() {
        for n in &batch {
            inputs.send(vec![0; n * c.hidden_size]).unwrap();
        }
        let (jobs, links) = (s.jobs(), s.links().clone());
        s.begin(pass, &batch);
        model
            .pass(
                s,
                &mut cache,
                PassOptions { ports: Some(&ports), noise: None, open_logits: false, every: false, depths: None },
            )
            .unwrap();
        s.end_batch().unwrap();
        for i in 0..batch.len() {
            jobs.run_pass(pass + i as u64, &links).unwrap();
        }
        pass += batch.len() as u64;
        let left = new - (pass - 1) as usize;
        let before = if pass == 2 { 0 } else { batch.len() };
        batch = vec![1; next_batch(before, MAX_BATCH).min(left)];
    }
    assert!(words.iter().all(|w| *w > 0.0));
}

#[test]
fn peak_memory_of_each_party() {
    if let Ok(spec) = std::env::var("TREFOIL_MEMORY_TEST") {
        let (role, rest) = spec.split_once(' ').unwrap();
        let (shape, plan) = rest.split_once(' ').unwrap();
        let role = Role::ALL.into_iter().find(|r| r.to_string() == role).unwrap();
        return child(role, &SHAPES[shape.parse::<usize>().unwrap()], Path::new(plan));
    }
    let mut wrong = Vec::new();
    for (i, s) in SHAPES.iter().enumerate() {
        let mut weights = Weights::random(config(s), 3).unwrap();
        weights.embed *= 20.0;
        let options = Options { private_layers: Some(s[6]), ..Options::default() };
        let source = Source::loaded(Loaded::new(weights, None, &options).unwrap()).unwrap();
        let plan = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(plan.path(), serde_json::to_vec(&source.plan).unwrap()).unwrap();
        for role in Role::ALL {
            let out = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "peak_memory_of_each_party", "--nocapture"])
                .env("TREFOIL_MEMORY_TEST", format!("{role} {i} {}", plan.path().display()))
                .output()
                .unwrap();
            let text = String::from_utf8_lossy(&out.stdout);
            let peak = text
                .lines()
                .find_map(|l| l.split("high water ").nth(1))
                .unwrap_or_else(|| panic!("{text} {}", String::from_utf8_lossy(&out.stderr)));
            let (real, base) = peak.trim().split_once(' ').unwrap();
            let (real, base): (u64, u64) = (real.parse().unwrap(), base.parse().unwrap());
            let m = model_bytes(role, &source.config, &source.plan);
            let session = session_bytes(role, &source.config, &source.plan, s[7], s[8] - 1, 256 << 20);
            // The peers here send nothing ahead of time.
            let predicted = m.weights + m.tables + session.cache + session.batch + base + THREADS;
            let error = predicted as f64 / real as f64 - 1.0;
            let mb = |b: u64| b as f64 / 1e6;
            eprintln!(
                "shape {i} {role:<7} real {:>6.1} predicted {:>6.1} ({:+.0} %): weights {:.1} tables {:.1} cache {:.1} batch {:.1}",
                mb(real),
                mb(predicted),
                100.0 * error,
                mb(m.weights),
                mb(m.tables),
                mb(session.cache),
                mb(session.batch)
            );
            if error.abs() > 0.2 {
                wrong.push((i, role, error));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:?}");
}
