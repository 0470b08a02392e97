//! The gateway in front of Owner and Helper, three processes over TLS: many chats at once, parties that die under them, what the parties
//! tell about themselves, and that nothing secret is in it.
//!
//! `TREFOIL_LOAD_SECONDS=300` runs the chats for five minutes; without it, for a few seconds.

use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::http::{self, Reply, get, post};
use crate::support::*;

/// A gateway process, and what it logs.
pub struct Gateway {
    child: Child,
    pub address: String,
    pub log: Arc<Mutex<String>>,
}

impl Gateway {
    fn start(trio: &Trio, more: &[&str]) -> Gateway {
        Gateway::listen(trio, "127.0.0.1:0", more)
    }

    fn listen(trio: &Trio, at: &str, more: &[&str]) -> Gateway {
        Gateway::of(&trio.client, at, more, &[])
    }

    pub fn of(client: &Path, at: &str, more: &[&str], environment: &[(&str, &str)]) -> Gateway {
        let mut command: Command = trefoil();
        command.args(["serve", "--listen", at, "--config"]).arg(client).args(more).envs(environment.iter().copied());
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let log: Arc<Mutex<String>> = Arc::default();
        let (lines, stderr) = (Arc::clone(&log), child.stderr.take().unwrap());
        std::thread::spawn(move || {
            BufReader::new(stderr).lines().map_while(Result::ok).for_each(|l| *lines.lock().unwrap() += &(l + "\n"));
        });
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("listening on http://");
        let address = address.unwrap_or_else(|| panic!("{}", log.lock().unwrap())).to_owned();
        Gateway { child, address, log }
    }

    fn memory(&self) -> u64 {
        let text = get(&self.address, "/metrics", &[]).body;
        let line = text.lines().find(|l| l.starts_with("trefoil_resident_memory_bytes ")).unwrap();
        line.rsplit(' ').next().unwrap().parse().unwrap()
    }
}

impl Gateway {
    fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        self.kill();
    }
}

fn body(tokens: usize, prompt: &str) -> Value {
    json!({"messages": [{"role": "user", "content": prompt}], "max_tokens": tokens, "temperature": 0, "stream": true})
}

/// A streamed chat: the text, time to the first piece, time to the end; or what went wrong.
fn chat(at: &str, tokens: usize) -> Result<(String, Duration, Duration), String> {
    chat_seen(at, tokens, &AtomicUsize::new(0))
}

/// Counted in `answering` from its first piece to its end.
fn chat_seen(at: &str, tokens: usize, answering: &AtomicUsize) -> Result<(String, Duration, Duration), String> {
    let begun = Instant::now();
    let sent = http::try_send(at, "POST", "/v1/chat/completions", &[], &body(tokens, PROMPT).to_string());
    let mut c = sent.map_err(|e| {
        std::thread::sleep(Duration::from_millis(100));
        e.to_string()
    })?;
    let (mut first, mut bytes, mut buffer) = (None, Vec::new(), [0; 4096]);
    while let Ok(n) = c.read(&mut buffer) {
        if n == 0 {
            break;
        }
        bytes.extend_from_slice(&buffer[..n]);
        if first.is_none() && bytes.windows(11).any(|w| w == b"\"content\":\"") {
            first = Some(begun.elapsed());
            answering.fetch_add(1, Ordering::Relaxed);
        }
    }
    if first.is_some() {
        answering.fetch_sub(1, Ordering::Relaxed);
    }
    let text = String::from_utf8_lossy(&bytes).into_owned();
    if !text.starts_with("HTTP/1.1 200") || !text.contains("data: [DONE]") {
        return Err(text);
    }
    let pieces = text.lines().filter_map(|l| serde_json::from_str::<Value>(l.strip_prefix("data: ")?).ok());
    let said = pieces.filter_map(|p| Some(p["choices"][0]["delta"]["content"].as_str()?.to_owned())).collect();
    Ok((said, first.unwrap_or_default(), begun.elapsed()))
}

fn quantile(values: &mut [Duration], q: f64) -> f64 {
    values.sort_unstable();
    values[((values.len() - 1) as f64 * q).round() as usize].as_secs_f64() * 1e3
}

const TOKENS: usize = 8;
const CHATS: usize = 8;

#[test]
fn many_chats_at_once_and_a_party_dies_under_them() {
    let mut site = Site::new();
    site.limits = "timeout_s = 5\nhandshake_timeout_s = 10\nsessions = 16\n".into();
    let mut trio = Trio::at(site);
    let mut gateway = Gateway::start(&trio, &["--sessions", "8"]);
    let address = gateway.address.clone();
    let at = address.as_str();
    let (want, ..) = chat(at, TOKENS).unwrap();
    let seconds = std::env::var("TREFOIL_LOAD_SECONDS").ok().and_then(|n| n.parse().ok()).unwrap_or(4);
    let times: Mutex<Vec<(Duration, Duration)>> = Mutex::default();
    let memory: Mutex<Vec<[u64; 3]>> = Mutex::default();
    let taken = || [gateway.memory(), trio.owner.memory("VmRSS:"), trio.helper.memory("VmRSS:")];
    let (until, warm) = (Instant::now() + Duration::from_secs(seconds), Duration::from_secs(seconds / 4));
    std::thread::scope(|s| {
        for _ in 0..CHATS {
            s.spawn(|| {
                while Instant::now() < until {
                    let (said, first, all) = chat(at, TOKENS).unwrap();
                    assert_eq!(said, want);
                    times.lock().unwrap().push((first, (all - first) / (TOKENS as u32 - 1)));
                }
            });
        }
        s.spawn(|| {
            std::thread::sleep(warm);
            memory.lock().unwrap().push(taken());
            while Instant::now() < until {
                std::thread::sleep(Duration::from_millis(500));
                memory.lock().unwrap().push(taken());
            }
        });
    });
    let times = times.into_inner().unwrap();
    let (mut first, mut each): (Vec<_>, Vec<_>) = times.iter().copied().unzip();
    let memory = memory.into_inner().unwrap();
    let (warm, end) = (memory[0], *memory.last().unwrap());
    eprintln!(
        "{} chats of {TOKENS} tokens in {seconds} s, {CHATS} at once: first token p50 {:.0} ms, p95 {:.0}; per token p50 {:.1} ms, p95 {:.1}; memory of gateway, Owner, Helper after warm-up {:.1?} MB, at the end {:.1?} MB",
        times.len(),
        quantile(&mut first, 0.5),
        quantile(&mut first, 0.95),
        quantile(&mut each, 0.5),
        quantile(&mut each, 0.95),
        warm.map(|b| b as f64 / 1e6),
        end.map(|b| b as f64 / 1e6),
    );
    // In a few seconds the sessions have only just begun.
    let grown = warm.iter().zip(&end).map(|(a, b)| *b as f64 / *a as f64).fold(0.0, f64::max);
    assert!(seconds < 60 || grown < 1.15, "{memory:?}");

    for role in ["helper", "owner", "gateway"] {
        let stop = AtomicBool::new(false);
        let failures: Mutex<Vec<String>> = Mutex::default();
        let answered: Mutex<Vec<Instant>> = Mutex::default();
        let answering = AtomicUsize::new(0);
        let back = std::thread::scope(|s| {
            for _ in 0..CHATS {
                s.spawn(|| {
                    while !stop.load(Ordering::Relaxed) {
                        match chat_seen(at, 24, &answering) {
                            Ok((said, ..)) => {
                                assert!(said.starts_with(&want));
                                answered.lock().unwrap().push(Instant::now());
                            }
                            Err(text) => failures.lock().unwrap().push(text),
                        }
                    }
                });
            }
            // In the middle of answers.
            let deadline = Instant::now() + Duration::from_secs(30);
            while answering.load(Ordering::Relaxed) < CHATS / 2 && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(5));
            }
            match role {
                "helper" => trio.helper.kill(),
                "owner" => trio.owner.kill(),
                _ => gateway.kill(),
            }
            std::thread::sleep(Duration::from_millis(700));
            match role {
                "helper" => trio.helper = Party::start(&trio.helper_config),
                "owner" => trio.owner = Party::start(&trio.owner_config),
                _ => gateway = Gateway::listen(&trio, at, &["--sessions", "8"]),
            }
            // Since the party listens again; what was answered before it was killed does not count.
            let (back, deadline) = (Instant::now(), Instant::now() + Duration::from_secs(15));
            while Instant::now() < deadline && !answered.lock().unwrap().iter().any(|&at| at > back) {
                std::thread::sleep(Duration::from_millis(20));
            }
            stop.store(true, Ordering::Relaxed);
            back
        });
        let first = answered.into_inner().unwrap().into_iter().filter(|&at| at > back).min();
        let recovered = first.map(|at| at - back).filter(|d| *d < Duration::from_secs(10));
        let failures = failures.into_inner().unwrap();
        assert!(recovered.is_some(), "nothing works 10 s after the {role} is back: {:?}", failures.last());
        assert!(!failures.is_empty(), "nobody was in the middle of an answer when the {role} died");
        for text in &failures {
            // Said as an error, by name; in the middle of an answer, as an event. Of the gateway's own end only the connection tells.
            assert!(!text.contains("[DONE]"), "{text}");
            assert!(role == "gateway" || text.contains("\"error\":{"), "{text}");
        }
        eprintln!("{role} killed: {} requests ended with an error, served again after {recovered:?}", failures.len());
    }
    assert_eq!(get(at, "/ready", &[]).status, 200);
}

#[test]
fn what_parties_tell_about_themselves() {
    let mut site = Site::new();
    site.metrics = true;
    let mut trio = Trio::at(site);
    let at = |party: &Party| {
        let line = party.wait("metrics", |l| l["message"] == "metrics");
        line["address"].as_str().unwrap().to_owned()
    };
    let (owner, helper) = (at(&trio.owner), at(&trio.helper));
    for address in [&owner, &helper] {
        assert_eq!((get(address, "/health", &[]).status, get(address, "/ready", &[]).status), (200, 200));
    }
    let gateway = Gateway::start(&trio, &["--sessions", "1"]);
    let canary = "Zanzibarquokka canary words of a prompt that nobody else may see";
    let reply = post(&gateway.address, "/v1/chat/completions", &[], &body(12, canary).to_string());
    assert_eq!(reply.status, 200);
    let read = |address: &str| get(address, "/metrics", &[]).body;
    let sum = |text: &str, name: &str| -> f64 {
        let lines = text.lines().filter(|l| l.starts_with(name));
        lines.map(|l| l.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum()
    };
    // What one has sent the other has received, the Client's figure and the Owner's counted apart; and the last of it may be on its way.
    let deadline = Instant::now() + Duration::from_secs(20);
    let agree = |told: &str, ours: &str| {
        sum(told, "trefoil_tokens_total") == 12.0
            && ["online", "ahead"].iter().all(|lane| {
                let sent = sum(ours, &format!("trefoil_link_{lane}_bytes_total{{link=\"client->owner\"}}"));
                sent > 0.0
                    && sent == sum(told, &format!("trefoil_received_bytes_total{{peer=\"client\",lane=\"{lane}\"}}"))
            })
    };
    let (told, theirs, ours) = loop {
        let (told, theirs, ours) = (read(&owner), read(&helper), read(&gateway.address));
        if agree(&told, &ours) {
            break (told, theirs, ours);
        }
        assert!(Instant::now() < deadline, "{told}\n{ours}");
        std::thread::sleep(Duration::from_millis(50));
    };
    assert_eq!(sum(&told, "trefoil_sessions_open"), 1.0);
    assert!(sum(&told, "trefoil_computing_seconds_total{operation=\"linear\"") > 0.0, "{told}");
    assert!(sum(&told, "trefoil_waiting_seconds_total{peer=\"helper\"") > 0.0);
    assert!(sum(&theirs, "trefoil_messages_total{operation=\"softmax_exponential\"") > 0.0);
    for text in [&told, &theirs, &ours, &get(&gateway.address, "/api/state", &[]).body, &*gateway.log.lock().unwrap()] {
        assert!(!text.contains("Zanzibar") && !text.contains("quokka"), "{text}");
    }
    for party in [&trio.owner, &trio.helper] {
        assert!(!party.log.lock().unwrap().iter().any(|l| l.contains("Zanzibar")));
    }
    // Without the Helper: not ready, and said so; and ready again.
    drop(gateway);
    trio.helper.kill();
    let deadline = Instant::now() + Duration::from_secs(20);
    let gateway = {
        trio.helper = Party::start(&trio.helper_config);
        Gateway::start(&trio, &["--sessions", "1"])
    };
    trio.helper.kill();
    loop {
        let reply: Reply = get(&gateway.address, "/ready", &[]);
        if reply.status == 503 {
            assert!(reply.body.contains("helper"), "{}", reply.body);
            break;
        }
        assert!(Instant::now() < deadline, "{}", reply.body);
        std::thread::sleep(Duration::from_millis(100));
    }
    let failed = post(&gateway.address, "/v1/completions", &[], &json!({"prompt": "a", "max_tokens": 1}).to_string());
    assert_eq!(failed.status, 503, "{}", failed.body);
    assert!(failed.body.contains("helper"), "{}", failed.body);
}
