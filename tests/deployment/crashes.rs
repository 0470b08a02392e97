//! kill -9 for each party in turn, in each phase, with four sessions running: nobody hangs, nobody gets a wrong token, no
//! session id comes twice, and the next session works soon after the restart, with the other two parties as they were.
//!
//! `TREFOIL_KILLS=20` kills each party twenty times in each phase; without it, once.

use std::collections::HashSet;
use std::io::Read;
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use trefoil::party::Role;

use crate::proxy::Proxy;
use crate::support::*;

const CLIENTS: usize = 4;
/// Long enough for a prefill that can be hit.
const LONG: &str = "It was a bright morning and the little town by the river was waking up. The baker opened his door, \
    the children ran to school, and an old dog slept in the sun. It was a bright morning";
const TOKENS: usize = 16;
/// The parties wait five seconds for each other, and tell the others within one more.
const PATIENCE: Duration = Duration::from_secs(30);
const RECOVERY: Duration = Duration::from_secs(10);

fn kills() -> usize {
    std::env::var("TREFOIL_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(1)
}

/// One of these tests at a time: what they measure should not be each other.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Starting a session is work on a busy machine; waiting for a peer that is gone is not.
fn site() -> Site {
    let mut site = Site::new();
    site.limits = "timeout_s = 5\nhandshake_timeout_s = 10\nsessions = 16\n".into();
    site
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Phase {
    Preparation,
    Prefill,
    Decode,
}

/// All that one process prints.
fn expected_text() -> &'static str {
    static TEXT: OnceLock<String> = OnceLock::new();
    TEXT.get_or_init(|| {
        let out = run(trefoil().args(["generate", "--model", MODEL, "--prompt", LONG]).args(more()));
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap()
    })
}

fn more() -> [String; 2] {
    ["--max-new-tokens".into(), TOKENS.to_string()]
}

/// A Client's process, whose output is read as it comes.
struct Running {
    child: Child,
    said: Arc<Mutex<Vec<u8>>>,
    readers: Vec<std::thread::JoinHandle<()>>,
    complaint: Arc<Mutex<Vec<u8>>>,
    begun: Instant,
}

enum End {
    /// All tokens, and right.
    Whole,
    /// So much of the text, all of it right, and this error.
    Broken(String),
    Killed,
    Hangs,
    Wrong(String),
}

impl Running {
    fn start(config: &Path) -> Running {
        let mut c = trefoil();
        c.args(["generate", "--prompt", LONG, "--config"]).arg(config).args(more());
        let mut child = c.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let (said, complaint) = (Arc::<Mutex<Vec<u8>>>::default(), Arc::<Mutex<Vec<u8>>>::default());
        let mut readers = Vec::new();
        let streams: [(Box<dyn Read + Send>, _); 2] = [
            (Box::new(child.stdout.take().unwrap()), Arc::clone(&said)),
            (Box::new(child.stderr.take().unwrap()), Arc::clone(&complaint)),
        ];
        for (mut from, to) in streams {
            readers.push(std::thread::spawn(move || {
                let mut bytes = [0; 4096];
                while let Ok(n @ 1..) = from.read(&mut bytes) {
                    to.lock().unwrap().extend_from_slice(&bytes[..n]);
                }
            }));
        }
        Running { child, said, readers, complaint, begun: Instant::now() }
    }

    fn length(&self) -> usize {
        self.said.lock().unwrap().len()
    }

    fn over(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// What became of it, at most `PATIENCE` from now.
    fn end(mut self, killed: bool) -> End {
        let deadline = Instant::now() + PATIENCE;
        while !self.over() {
            if Instant::now() > deadline {
                let _ = self.child.kill();
                let _ = self.child.wait();
                return End::Hangs;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let status = self.child.wait().unwrap();
        self.readers.drain(..).for_each(|r| r.join().unwrap());
        let text = String::from_utf8_lossy(&self.said.lock().unwrap()).into_owned();
        let complaint = String::from_utf8_lossy(&self.complaint.lock().unwrap()).into_owned();
        if status.success() {
            return if text == expected_text() { End::Whole } else { End::Wrong(text) };
        }
        // A failed session ends its line.
        if !expected_text().starts_with(text.trim_end_matches('\n')) {
            return End::Wrong(text);
        }
        if killed { End::Killed } else { End::Broken(complaint) }
    }
}

#[derive(Default)]
struct Tally {
    kills: usize,
    hangs: usize,
    wrong: usize,
    whole: usize,
    broken: usize,
    slowest_end: Duration,
    slowest_recovery: Duration,
    complaints: HashSet<String>,
}

/// Waits until a Client is in `phase`.
fn reach(phase: Phase, clients: &mut [Running]) {
    let deadline = Instant::now() + PATIENCE;
    let reached = |clients: &mut [Running]| match phase {
        // The prompt is shown when the session stands; the first token is shown when the prefill is over.
        Phase::Prefill => clients.iter().any(|c| c.length() > 0),
        Phase::Decode => clients.iter().any(|c| c.length() > LONG.len() + 4),
        Phase::Preparation => true,
    };
    while !reached(clients) {
        assert!(Instant::now() < deadline, "no client comes to {phase:?}");
        if clients.iter_mut().all(Running::over) {
            let why = String::from_utf8_lossy(&clients[0].complaint.lock().unwrap()).into_owned();
            panic!("the clients ended before {phase:?}: {why}");
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Four clients, a victim killed when one of them is in `phase`, and what became of all.
fn strike(trio: &mut Trio, victim: Role, phase: Phase, round: usize, tally: &mut Tally) {
    let mut clients: Vec<Running> = (0..CLIENTS).map(|_| Running::start(&trio.client)).collect();
    reach(phase, &mut clients);
    // Not always at the same instant.
    std::thread::sleep(Duration::from_millis(match phase {
        Phase::Prefill => (round * 13 % 60) as u64,
        _ => (round * 37 % 300) as u64,
    }));
    let struck = Instant::now();
    tally.kills += 1;
    let mut killed = None;
    match victim {
        Role::Owner => {
            trio.owner.kill();
            trio.owner = Party::start(&trio.owner_config);
        }
        Role::Helper => {
            trio.helper.kill();
            trio.helper = Party::start(&trio.helper_config);
        }
        Role::Client => {
            // One whose session stands, if there still is one.
            let i = (0..CLIENTS).find(|&i| clients[i].length() > 0 && !clients[i].over()).unwrap_or(round % CLIENTS);
            let _ = clients[i].child.kill();
            killed = Some(i);
        }
    }
    let restarted = Instant::now();
    recovers(trio, victim, restarted, tally);
    for (i, client) in clients.into_iter().enumerate() {
        let begun = client.begun;
        let end = client.end(killed == Some(i));
        tally.slowest_end = tally.slowest_end.max(begun.max(struck).elapsed());
        match end {
            End::Whole => tally.whole += 1,
            End::Killed => {}
            End::Hangs => tally.hangs += 1,
            End::Wrong(text) => {
                tally.wrong += 1;
                eprintln!("{victim} killed in {phase:?}: a wrong text: {text:?}");
            }
            End::Broken(complaint) => {
                tally.broken += 1;
                let last = complaint.lines().last().unwrap_or_default().to_string();
                // Typed: it names a party, a step and a fault. What the Client did to itself harms nobody else.
                let named =
                    last.starts_with("error: ") && last.contains(&victim.to_string()) && last.contains("at step");
                assert!(named && victim != Role::Client, "{victim} killed in {phase:?}: {complaint}");
                tally.complaints.insert(last.rsplit("`: ").next().unwrap_or_default().to_string());
            }
        }
    }
    assert!(trio.owner.alive() && trio.helper.alive());
}

/// The next session works soon; the others have not been touched.
fn recovers(trio: &Trio, victim: Role, since: Instant, tally: &mut Tally) {
    loop {
        let out = run(&mut trio.generate(&trio.client, 4));
        if out.status.success() {
            assert_eq!(tokens(&out), expected(4));
            break;
        }
        let text = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(since.elapsed() < RECOVERY, "after the restart of the {victim}: {text}");
        std::thread::sleep(Duration::from_millis(50));
    }
    let took = since.elapsed();
    assert!(took < RECOVERY, "{victim}: {took:?}");
    tally.slowest_recovery = tally.slowest_recovery.max(took);
}

/// Ids and nonces of all sessions of both daemons, over all restarts: the file only grows.
fn assert_ids_differ(trio: &Trio) -> usize {
    let mut all = 0;
    for file in ["owner.state/sessions.seen", "helper.store/sessions.seen"] {
        let bytes = std::fs::read(trio.site.path(file)).unwrap();
        let ids: Vec<&[u8]> = bytes.chunks(32).collect();
        assert!(ids.iter().all(|id| id.len() == 32));
        let distinct: HashSet<&&[u8]> = ids.iter().collect();
        assert_eq!(distinct.len(), ids.len(), "{file}");
        all += ids.len();
    }
    all
}

fn report(phase: Phase, victim: Role, t: &Tally) {
    eprintln!(
        "{phase:?}, {victim}: {} kills, {} hangs, {} wrong tokens, {} sessions whole, {} ended by an error; slowest error or answer {:.1} s after the kill, slowest recovery {:.2} s",
        t.kills,
        t.hangs,
        t.wrong,
        t.whole,
        t.broken,
        t.slowest_end.as_secs_f64(),
        t.slowest_recovery.as_secs_f64()
    );
    t.complaints.iter().for_each(|c| eprintln!("    {c}"));
    assert_eq!((t.hangs, t.wrong), (0, 0));
}

fn in_session(phase: Phase) {
    expected_text();
    expected(4);
    let _alone = alone();
    let mut trio = Trio::at(site());
    for victim in Role::ALL {
        let mut tally = Tally::default();
        for round in 0..kills() {
            strike(&mut trio, victim, phase, round, &mut tally);
        }
        report(phase, victim, &tally);
    }
    let ids = assert_ids_differ(&trio);
    eprintln!("{ids} ids and nonces, all different");
}

#[test]
fn killed_during_prefill() {
    in_session(Phase::Prefill);
}

#[test]
fn killed_during_decode() {
    in_session(Phase::Decode);
}

#[test]
fn killed_while_the_helper_receives_its_half() {
    expected_text();
    expected(4);
    let _alone = alone();
    for victim in Role::ALL {
        let mut tally = Tally::default();
        let mut resumed = 0;
        for round in 0..kills() {
            resumed += usize::from(preparing(victim, round, &mut tally));
        }
        report(Phase::Preparation, victim, &tally);
        eprintln!("{resumed} transfers were not begun again");
        assert_eq!(resumed, tally.kills);
    }
}

/// A fresh Helper behind a slow network; whether the transfer, if it was broken off, went on where it had ended.
fn preparing(victim: Role, round: usize, tally: &mut Tally) -> bool {
    let site = site();
    let any = "127.0.0.1:0";
    let helper = Party::start(&site.config("helper", Role::Helper, "helper", any, "", ""));
    let helper_config = site.config("helper", Role::Helper, "helper", &helper.address, "", "");
    let slow = Proxy::to(&helper.address);
    let manifest = std::fs::read(preparation().join("manifest.json")).unwrap();
    let manifest: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
    let bytes = manifest["half"]["bytes"].as_u64().unwrap();
    slow.limit(bytes);
    let owner = Party::start(&site.config("owner", Role::Owner, "owner", any, "", &slow.address));
    let owner_config = site.config("owner", Role::Owner, "owner", &owner.address, "", &slow.address);
    let client = site.config("client", Role::Client, "client", "", &owner.address, &helper.address);
    let mut trio = Trio { site, owner, helper, client, owner_config, helper_config };
    let sending = |l: &serde_json::Value| l["message"] == "sending the model to the helper";
    trio.owner.wait("transfer", sending);
    // In another place of the transfer each time, with some chunks through.
    let some = bytes * (40 + round as u64 * 17 % 50) / 100;
    let deadline = Instant::now() + PATIENCE;
    while slow.forwarded() < some {
        assert!(Instant::now() < deadline, "the transfer stands still");
        std::thread::sleep(Duration::from_millis(5));
    }
    strike_at_once(&mut trio, victim, &slow, tally);
    // Nobody sends again what was there: what the killed one had left to the network may even have been all of it.
    let from_the_beginning = trio.owner.lines().iter().filter(|l| sending(l) && l["from"] == 0).count();
    assert_ids_differ(&trio);
    from_the_beginning == usize::from(victim != Role::Owner)
}

fn strike_at_once(trio: &mut Trio, victim: Role, slow: &Proxy, tally: &mut Tally) {
    let begun = Instant::now();
    let mut clients: Vec<Running> = (0..CLIENTS).map(|_| Running::start(&trio.client)).collect();
    std::thread::sleep(Duration::from_millis(20));
    tally.kills += 1;
    match victim {
        Role::Owner => {
            trio.owner.kill();
            trio.owner = Party::start(&trio.owner_config);
        }
        Role::Helper => {
            trio.helper.kill();
            trio.helper = Party::start(&trio.helper_config);
        }
        Role::Client => {
            let _ = clients[0].child.kill();
        }
    }
    let restarted = Instant::now();
    slow.limit(0);
    for (i, client) in clients.into_iter().enumerate() {
        match client.end(victim == Role::Client && i == 0) {
            End::Hangs => tally.hangs += 1,
            End::Wrong(text) => {
                tally.wrong += 1;
                eprintln!("{text:?}");
            }
            End::Whole => tally.whole += 1,
            End::Killed => {}
            End::Broken(complaint) => {
                tally.broken += 1;
                let last = complaint.lines().last().unwrap_or_default().to_string();
                let peer = last.contains("owner") || last.contains("helper");
                assert!(last.starts_with("error: ") && peer && last.contains("at step"), "{complaint}");
                tally.complaints.insert(last.rsplit("`: ").next().unwrap_or_default().to_string());
            }
        }
    }
    tally.slowest_end = tally.slowest_end.max(begun.elapsed());
    recovers(trio, victim, restarted, tally);
    assert!(trio.owner.alive() && trio.helper.alive());
}
