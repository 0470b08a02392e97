//! The gateway with all three parties in its process: OpenAI's API, what it refuses, and who cannot keep others out. Behind a
//! deployment: tests/deployment/gateway.rs; with the `openai` package and a browser: tests/clients/run.sh.

mod http;

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use http::{Reply, connect, get, post, stream};
use rustix::process::{Resource, getrlimit, setrlimit};
use serde_json::{Value, json};

/// A gateway that ends with the test.
struct Served {
    child: Child,
    address: String,
}

impl Served {
    fn start(more: &[&str]) -> Served {
        let mut child = Command::new(env!("CARGO_BIN_EXE_trefoil"))
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .args(["serve", "--listen", "127.0.0.1:0", "--private-layers", "1"])
            .args(more)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("listening on http://").expect("it did not start").to_owned();
        Served { child, address }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const PROMPT: &str = "It was a bright morning";

fn chat(content: &str) -> Value {
    json!({"messages": [{"role": "user", "content": content}], "max_tokens": 12, "temperature": 0})
}

fn ask(address: &str, path: &str, body: &Value) -> Reply {
    post(address, path, &[], &body.to_string())
}

fn code(reply: &Reply) -> String {
    reply.json()["error"]["code"].as_str().unwrap_or_default().to_owned()
}

#[test]
fn answers_are_those_of_generate() {
    let out = Command::new(env!("CARGO_BIN_EXE_trefoil"))
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .args(["generate", "--prompt", PROMPT, "--private-layers", "1", "--max-new-tokens", "12", "--json"])
        .output()
        .unwrap();
    let generated: Value = serde_json::from_slice(&out.stdout).unwrap();
    let want = generated["text"].as_str().unwrap();
    let served = Served::start(&[]);
    let at = &served.address;

    let whole = ask(at, "/v1/completions", &json!({"prompt": PROMPT, "max_tokens": 12, "temperature": 0}));
    assert_eq!(whole.status, 200, "{}", whole.body);
    let whole = whole.json();
    assert_eq!(whole["choices"][0]["text"], want);
    assert_eq!(whole["usage"]["completion_tokens"], 12);
    assert_eq!(whole["usage"]["prompt_tokens"], generated["prompt_tokens"]);
    assert_eq!(whole["choices"][0]["finish_reason"], "length");

    let whole = ask(at, "/v1/chat/completions", &chat(PROMPT)).json();
    assert_eq!(whole["object"], "chat.completion");
    assert_eq!(whole["choices"][0]["message"], json!({"role": "assistant", "content": want, "refusal": null}));

    let mut body = chat(PROMPT);
    body["stream"] = true.into();
    body["stream_options"] = json!({"include_usage": true});
    let chunks = stream(at, "/v1/chat/completions", &body);
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
    let said: String = chunks.iter().filter_map(|c| c["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(said, want);
    let [.., last, usage] = &chunks[..] else { panic!("no chunks") };
    assert_eq!(last["choices"][0]["finish_reason"], "length");
    assert_eq!(
        (&usage["choices"], &usage["usage"]["total_tokens"]),
        (&json!([]), &json!(12 + generated["prompt_tokens"].as_u64().unwrap()))
    );
    assert!(chunks.iter().all(|c| c["id"] == chunks[0]["id"]));
}

#[test]
fn a_stop_sequence_ends_the_answer_before_it() {
    let served = Served::start(&[]);
    let at = &served.address;
    let body = json!({"prompt": PROMPT, "max_tokens": 12, "temperature": 0});
    let all = ask(at, "/v1/completions", &body).json();
    let all = all["choices"][0]["text"].as_str().unwrap();
    let stop: String = all.chars().skip(6).take(3).collect();
    let mut body = body.clone();
    body["stop"] = json!([stop]);
    let cut = ask(at, "/v1/completions", &body).json();
    assert_eq!(cut["choices"][0]["text"], all[..all.find(&stop).unwrap()]);
    assert_eq!(cut["choices"][0]["finish_reason"], "stop");
    assert!(cut["usage"]["completion_tokens"].as_u64().unwrap() < 12);
}

#[test]
fn a_seed_gives_the_same_answer_again() {
    let served = Served::start(&[]);
    let at = &served.address;
    let answer = |seed: i64| {
        let body = json!({"prompt": PROMPT, "max_tokens": 8, "temperature": 1.2, "seed": seed});
        ask(at, "/v1/completions", &body).json()["choices"][0]["text"].clone()
    };
    assert_eq!(answer(5), answer(5));
    assert!((6..12).any(|seed| answer(seed) != answer(5)));
}

#[test]
fn what_cannot_be_served_is_refused_by_name() {
    let served = Served::start(&[]);
    let at = &served.address;
    let mut with_tools = chat("hi");
    with_tools["tools"] = json!([{"type": "function", "function": {"name": "f"}}]);
    let long = "word ".repeat(400);
    for (path, body, status, named) in [
        ("/v1/chat/completions", with_tools, 400, "tools"),
        ("/v1/completions", json!({"prompt": "a", "logprobs": 3}), 400, "logprobs"),
        ("/v1/completions", json!({"prompt": "a", "model": "gpt-9"}), 404, "gpt-9"),
        ("/v1/completions", json!({"prompt": []}), 400, "empty"),
        ("/v1/completions", json!({"prompt": [99999]}), 400, "vocabulary of 2048"),
        ("/v1/completions", json!({"prompt": "a", "max_tokens": 0}), 400, "at least one token"),
        ("/v1/completions", json!({"prompt": "a", "temperature": 9}), 400, "temperature"),
        ("/v1/completions", json!({"prompt": long}), 400, "shorten"),
        ("/v1/embeddings", json!({"input": "a"}), 404, "/v1/embeddings"),
    ] {
        let reply = ask(at, path, &body);
        assert_eq!(reply.status, status, "{body} {}", reply.body);
        let message = reply.json()["error"]["message"].as_str().unwrap().to_owned();
        assert!(message.contains(named), "{body}: {message}");
    }
    assert_eq!(code(&ask(at, "/v1/completions", &json!({"prompt": long}))), "context_length_exceeded");
    assert_eq!(get(at, "/v1/chat/completions", &[]).status, 404);
    assert_eq!(get(at, "/v1/models", &[]).json()["data"][0]["id"], "quill-4m");
    assert_eq!(get(at, "/v1/models/quill-4m", &[]).status, 200);
    assert_eq!(get(at, "/v1/models/other", &[]).status, 404);
}

#[test]
fn what_is_no_request_is_refused() {
    let served = Served::start(&[]);
    let at = &served.address;
    let send = |body: &str| post(at, "/v1/completions", &[], body);
    assert_eq!(send("not JSON").status, 400);
    assert_eq!(send("[]").status, 400);
    assert_eq!(send(&("{\"a\":".to_owned() + &"[".repeat(100_000))).status, 400);
    assert_eq!(send(&format!("{{\"prompt\":\"{}\"}}", "a".repeat(2 << 20))).status, 413);
    // The text of a request is not repeated to anybody.
    assert!(!send("{\"prompt\": \"a secret\",}").body.contains("secret"));
    let typed = post(at, "/v1/completions", &[("Content-Type", "text/plain")], "{\"prompt\":\"a\"}");
    assert_eq!(typed.status, 415);
    // Without a length, longer than what is taken.
    let mut c = connect(at);
    let head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n";
    c.write_all(head.as_bytes()).unwrap();
    let chunk = format!("10000\r\n{}\r\n", "a".repeat(0x10000));
    // It may close before all of it is sent.
    let _ = (0..40).try_for_each(|_| c.write_all(chunk.as_bytes()));
    assert!(matches!(Reply::read(&mut c), None | Some(Reply { status: 413, .. })));
    // A head that is too large.
    let huge = "x".repeat(1 << 20);
    let reply = http::request(at, "GET", "/health", &[("X-Huge", huge.as_str())], "");
    assert!(matches!(reply, None | Some(Reply { status: 431, .. })));
    // Another page that has its own name point here.
    assert_eq!(http::request(at, "GET", "/v1/models", &[("Host", "evil.example")], "").unwrap().status, 421);
    assert_eq!(get(at, "/health", &[]).status, 200);
}

#[test]
fn keys_let_in() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("keys");
    std::fs::write(&file, "# the first\n0123456789abcdef-one\n\n0123456789abcdef-two\n").unwrap();
    let start = || {
        Command::new(env!("CARGO_BIN_EXE_trefoil"))
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .args(["serve", "--listen", "127.0.0.1:0", "--private-layers", "1", "--api-keys"])
            .arg(&file)
            .output()
            .unwrap()
    };
    std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    let public = start();
    assert!(!public.status.success() && String::from_utf8_lossy(&public.stderr).contains("chmod 600"));
    std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let served = Served::start(&["--api-keys", file.to_str().unwrap()]);
    let at = &served.address;
    let status = |key: Option<&str>, path: &str| {
        let bearer = key.map(|k| format!("Bearer {k}"));
        let headers: Vec<(&str, &str)> = bearer.iter().map(|b| ("Authorization", b.as_str())).collect();
        get(at, path, &headers).status
    };
    for path in ["/v1/models", "/api/state", "/metrics"] {
        assert_eq!(status(None, path), 401, "{path}");
        assert_eq!(status(Some("0123456789abcdef-three"), path), 401);
        assert_eq!(status(Some("0123456789abcdef-two"), path), 200);
    }
    for path in ["/", "/page/app.js", "/page/style.css", "/health", "/ready"] {
        assert_eq!(status(None, path), 200, "{path}");
    }
    assert_eq!(ask(at, "/v1/completions", &json!({"prompt": "a"})).status, 401);
    // An address that others reach has to have keys.
    let open = Command::new(env!("CARGO_BIN_EXE_trefoil")).args(["serve", "--listen", "0.0.0.0:0"]).output().unwrap();
    assert!(!open.status.success() && String::from_utf8_lossy(&open.stderr).contains("--api-keys"));
}

/// Waits until `is` holds for what the gateway says of itself.
fn wait(at: &str, what: &str, is: impl Fn(&Value) -> bool) -> Value {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let state = get(at, "/api/state", &[]).json();
        if is(&state) {
            return state;
        }
        assert!(Instant::now() < deadline, "{what}: {state}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn who_goes_away_frees_the_place_and_who_comes_too_late_is_told() {
    let served = Served::start(&["--queue", "1", "--net", "20,1"]);
    let at = &served.address;
    let mut long = chat("hello");
    long["max_tokens"] = 200.into();
    long["stream"] = true.into();
    let first = http::send(at, "POST", "/v1/chat/completions", &[], &long.to_string());
    wait(at, "running", |s| s["sessions"]["busy"] == 1);
    let second = http::send(at, "POST", "/v1/chat/completions", &[], &chat("second").to_string());
    wait(at, "waiting", |s| s["queue"]["waiting"] == 1);
    let third = ask(at, "/v1/chat/completions", &chat("third"));
    assert_eq!((third.status, code(&third).as_str()), (429, "queue_full"));
    assert!(third.head.to_lowercase().contains("retry-after"));
    // Nobody is served yet, and the second no longer waits: its place is free.
    drop(second);
    wait(at, "left", |s| s["queue"]["waiting"] == 0);
    let second = http::send(at, "POST", "/v1/chat/completions", &[], &chat("second").to_string());
    wait(at, "waiting again", |s| s["queue"]["waiting"] == 1);
    drop(first);
    // It has the place of the first.
    let mut second = second;
    assert_eq!(Reply::read(&mut second).unwrap().status, 200);
    let state = wait(at, "abandoned", |s| s["totals"]["abandoned"] == 1);
    assert!(state["totals"]["completion_tokens"].as_u64().unwrap() < 200, "{state}");
}

#[test]
fn metrics_and_the_page_say_the_same() {
    let served = Served::start(&[]);
    let at = &served.address;
    assert_eq!(ask(at, "/v1/completions", &json!({"prompt": PROMPT, "max_tokens": 5})).status, 200);
    // The first look has the next messages kept.
    get(at, "/api/state", &[]);
    assert_eq!(ask(at, "/v1/chat/completions", &chat(PROMPT)).status, 200);
    let state = get(at, "/api/state", &[]).json();
    let metrics = get(at, "/metrics", &[]).body;
    let value = |name: &str| -> u64 {
        let line = metrics.lines().find(|l| l.starts_with(name)).unwrap_or_else(|| panic!("{name} in {metrics}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    };
    for (link, counts) in state["links"].as_object().unwrap() {
        for field in ["online_bytes", "ahead_bytes", "messages"] {
            assert_eq!(
                counts[field],
                value(&format!("trefoil_link_{field}_total{{link=\"{link}\"}}")),
                "{link} {field}"
            );
        }
    }
    assert_eq!(state["links"].as_object().unwrap().len(), 6);
    assert_eq!(state["totals"]["completion_tokens"], value("trefoil_tokens_total{kind=\"completion\"}"));
    assert_eq!(state["totals"]["completion_tokens"], 17);
    assert_eq!(value("trefoil_time_to_first_token_seconds_count"), 2);
    assert_eq!(state["last"]["completion_tokens"], 12);
    assert!(state["last"]["links"]["owner->helper"]["online_bytes"].as_u64().unwrap() > 0);
    // What a party receives looks like noise: 1024 uniformly random bytes have 7.81 bits each in the mean.
    let samples = state["samples"].as_object().unwrap();
    let full: Vec<f64> =
        samples.values().filter(|s| s["bytes"] != "").map(|s| s["entropy"].as_f64().unwrap()).collect();
    assert!(full.len() >= 3, "{samples:?}");
    assert!(full.iter().all(|&e| e > 7.7), "{full:?}");
    assert!(!metrics.contains(PROMPT) && !state.to_string().contains(PROMPT));
}

#[test]
fn nobody_keeps_others_out() {
    let served = Served::start(&[]);
    let at = &served.address;
    // Heads and bodies that do not come to an end.
    let mut slow: Vec<_> = (0..100).map(|_| connect(at)).collect();
    let body = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{";
    for (i, c) in slow.iter_mut().enumerate() {
        c.write_all(if i % 2 == 0 { "GET / HTTP/1.1\r\nX-Slow: ".as_bytes() } else { body.as_bytes() }).unwrap();
    }
    let asked = || ask(at, "/v1/completions", &json!({"prompt": PROMPT, "max_tokens": 2}));
    assert_eq!(asked().status, 200);
    // More connections than there may be: the quiet ones make room, also those whose body does not go on.
    let wanted = std::env::var("TREFOIL_CONNECTIONS").ok().and_then(|n| n.parse().ok()).unwrap_or(1500);
    let mut files = getrlimit(Resource::Nofile);
    files.current = files.maximum;
    setrlimit(Resource::Nofile, files).unwrap();
    let (begun, before) = (Instant::now(), memory(at));
    let mut many = Vec::new();
    for _ in 0..wanted {
        match std::net::TcpStream::connect(at.as_str()) {
            Ok(mut c) => {
                if many.len() % 2 == 1 {
                    let _ = c.write_all(body.as_bytes());
                }
                many.push(c);
            }
            // This test's own limit on files.
            Err(_) => break,
        }
    }
    assert!(many.len() > 500, "{}", many.len());
    many.truncate(many.len() - 4);
    let (opened, begun) = (begun.elapsed(), Instant::now());
    assert_eq!(asked().status, 200);
    eprintln!(
        "{} connections in {opened:.1?}; the next request answered after {:.0?}; memory {:.1} to {:.1} MB",
        many.len() + 4,
        begun.elapsed(),
        before / 1e6,
        memory(at) / 1e6
    );
}

fn memory(at: &str) -> f64 {
    let text = get(at, "/metrics", &[]).body;
    let line = text.lines().find(|l| l.starts_with("trefoil_resident_memory_bytes ")).unwrap();
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

#[test]
fn a_signal_lets_requests_end() {
    let mut served = Served::start(&["--net", "10,1"]);
    let mut body = chat("hello");
    body["max_tokens"] = 30.into();
    let mut running = http::send(&served.address, "POST", "/v1/chat/completions", &[], &body.to_string());
    wait(&served.address, "running", |s| s["sessions"]["busy"] == 1);
    assert!(Command::new("kill").arg(served.child.id().to_string()).status().unwrap().success());
    let reply = Reply::read(&mut running).unwrap();
    assert_eq!((reply.status, &reply.json()["usage"]["completion_tokens"]), (200, &json!(30)));
    let deadline = Instant::now() + Duration::from_secs(20);
    while served.child.try_wait().unwrap().is_none() {
        assert!(Instant::now() < deadline, "it does not end");
        std::thread::sleep(Duration::from_millis(20));
    }
}
