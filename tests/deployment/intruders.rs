//! Peers that send what they should not, or nothing: each fault is named in the log within the timeout, and the next session
//! works.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};
use trefoil::deploy::certs::{Validity, now};
use trefoil::deploy::wire::{self, Hello, Refusal, Reply};
use trefoil::model::store::OwnerPreparation;
use trefoil::net::{Channel, Lane, Message};
use trefoil::party::Role;
use trefoil::session::Scope;

use crate::attacker::{Attacker, block_on, dial, hear, open, open_with, say};
use crate::support::*;

fn raw(address: &str, bytes: &[u8]) -> TcpStream {
    let mut tcp = TcpStream::connect(address).unwrap();
    tcp.write_all(bytes).unwrap();
    tcp.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    tcp
}

/// What a daemon does with these bytes: it says `code` of where they come from, and hangs up.
fn refused(party: &Party, bytes: &[u8], code: &str) {
    let tcp = raw(&party.address, bytes);
    let at = tcp.local_addr().unwrap().to_string();
    hangs_up(tcp);
    let line = party.wait(code, |l| l["address"] == at.as_str());
    assert_eq!(line["code"], code, "{line}");
    assert!(line["error"].as_str().unwrap().starts_with(&at), "{line}");
}

/// Reads until the other side hangs up, which it must.
fn hangs_up(mut tcp: TcpStream) {
    let mut rest = Vec::new();
    match tcp.read_to_end(&mut rest) {
        Ok(_) => {}
        Err(e) => assert!(e.kind() == std::io::ErrorKind::ConnectionReset, "{e}"),
    }
}

/// A ClientHello as of TLS 1.2: without the extension that names newer versions.
fn tls12() -> Vec<u8> {
    let extensions: &[u8] = &[
        0, 10, 0, 4, 0, 2, 0, 23, // supported groups: P-256
        0, 11, 0, 2, 1, 0, // point formats
        0, 13, 0, 6, 0, 4, 4, 3, 8, 4, // signature algorithms
    ];
    let mut body = vec![3, 3];
    body.extend([7; 32]);
    body.push(0);
    body.extend([0, 2, 0xc0, 0x2b]); // ECDHE-ECDSA with AES-128-GCM
    body.extend([1, 0]);
    body.extend((extensions.len() as u16).to_be_bytes());
    body.extend(extensions);
    let mut hello = vec![1];
    hello.extend(&(body.len() as u32).to_be_bytes()[1..]);
    hello.extend(body);
    let mut record = vec![22, 3, 1];
    record.extend((hello.len() as u16).to_be_bytes());
    record.extend(hello);
    record
}

fn strangers(code: &str, all: &[&[u8]]) {
    let trio = Trio::new();
    for party in [&trio.owner, &trio.helper] {
        for bytes in all {
            refused(party, bytes, code);
        }
    }
    trio.works();
}

#[test]
fn plain_tcp() {
    strangers("not-tls", &[b"GET / HTTP/1.1\r\nHost: trefoil\r\n\r\n"]);
}

#[test]
fn random_bytes() {
    // Also such as begin like a record of TLS.
    let all = [0, 20, 21, 22, 23, 255].map(noise);
    strangers("not-tls", &all.each_ref().map(|n| &n[..]));
}

#[test]
fn an_offer_of_tls_1_2() {
    strangers("old-tls", &[&tls12()]);
}

#[test]
fn silence_on_the_port() {
    let begun = Instant::now();
    strangers("timeout", &[b""]);
    // Five seconds are configured, and two daemons dialled.
    assert!(begun.elapsed() < Duration::from_secs(40), "{:?}", begun.elapsed());
}

#[test]
fn garbage_after_a_good_handshake() {
    let trio = Trio::new();
    block_on(async {
        // A message that is none; one longer than any; one that never ends.
        let mut c = dial(&trio.client, Role::Owner).await.unwrap();
        c.send("test", &[0xff; 40]).await.unwrap();
        trio.owner.wait_code("malformed");
        let mut c = dial(&trio.client, Role::Owner).await.unwrap();
        // It may hang up before it has seen all.
        let _ = c.send("test", &vec![0; 1 << 20]).await;
        trio.owner.wait_code("oversize");
        let _silent = dial(&trio.client, Role::Owner).await.unwrap();
        trio.owner.wait_code("timeout");
    });
    trio.works();
}

fn request() -> Message {
    // A prompt of 4 tokens, 4 new ones, greedy.
    let mut payload = 1u64.to_le_bytes().to_vec();
    payload.extend(4u32.to_le_bytes());
    payload.extend(4u32.to_le_bytes());
    payload.push(0);
    payload.extend(0f64.to_le_bytes());
    payload.extend(0u64.to_le_bytes());
    payload.push(0);
    frame(Scope::new("request").address(0, "request.open").tag(), payload)
}

fn frame(tag: u64, payload: Vec<u8>) -> Message {
    Message { tag, depth: 1, not_before: None, payload }
}

fn session(trio: &Trio, raw: Option<&[u8]>) -> Attacker {
    use std::hash::{BuildHasher, RandomState};
    let mut nonce = [0; 32];
    nonce[..8].copy_from_slice(&RandomState::new().hash_one(0).to_le_bytes());
    nonce[8..16].copy_from_slice(&RandomState::new().hash_one(1).to_le_bytes());
    open_with(&trio.client, nonce, raw).unwrap_or_else(|refused| panic!("{refused:?}"))
}

fn blames_the_client(trio: &Trio, code: &str) {
    for party in [&trio.owner, &trio.helper] {
        let line = party.wait("failed session", |l| l["message"] == "session failed");
        let error = line["error"].as_str().unwrap();
        // The one who saw it says what; the other heard of it, or saw the client go.
        assert!(error.contains("client"), "{line}");
    }
    trio.owner.wait("the fault", |l| l["message"] == "session failed" && l["code"] == code);
    trio.works();
}

#[test]
fn an_oversize_frame() {
    let trio = Trio::new();
    // With the four bytes before it: a tag, a length of almost 4 GB, a depth, and not one byte more.
    let raw = [[7, 7, 7, 7], (u32::MAX - 5).to_le_bytes(), [0; 4]].concat();
    let a = session(&trio, Some(&raw));
    a.helper.send(Lane::Online, request()).unwrap();
    blames_the_client(&trio, "oversize");
}

#[test]
fn a_frame_one_byte_short() {
    let trio = Trio::new();
    let a = session(&trio, None);
    let mut short = request();
    short.payload.pop();
    a.owner.send(Lane::Online, short).unwrap();
    a.helper.send(Lane::Online, request()).unwrap();
    blames_the_client(&trio, "length");
}

#[test]
fn one_that_stalls() {
    let trio = Trio::new();
    let a = session(&trio, None);
    a.owner.send(Lane::Online, request()).unwrap();
    a.helper.send(Lane::Online, request()).unwrap();
    // And says nothing more; five seconds are configured.
    blames_the_client(&trio, "timeout");
    drop(a);
}

#[test]
fn one_that_closes_in_the_middle_of_a_layer() {
    let trio = Trio::new();
    let a = session(&trio, None);
    a.owner.send(Lane::Online, request()).unwrap();
    a.helper.send(Lane::Online, request()).unwrap();
    let width = 4 * 192 * 28 / 8;
    let input = Scope::new("input").address(1, "input.d").tag();
    a.owner.send(Lane::Online, frame(input, vec![0; width])).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    drop(a);
    blames_the_client(&trio, "closed");
}

#[test]
fn a_nonce_used_before() {
    let mut trio = Trio::new();
    let nonce = [42; 32];
    drop(open(&trio.client, nonce).unwrap_or_else(|refused| panic!("{refused:?}")));
    let refused = |answer: Result<Attacker, Box<Reply>>| {
        let answer = answer.err().map(|reply| *reply);
        assert!(matches!(answer, Some(Reply::Refused(Refusal::Replay))), "{answer:?}");
    };
    refused(open(&trio.client, nonce));
    trio.owner.wait_code("replay");
    // Not even after a restart.
    trio.owner.kill();
    trio.owner = Party::start(&trio.owner_config);
    trio.provisioned();
    refused(open(&trio.client, nonce));
    trio.works();
}

/// What a server answers to the first message of the party with this configuration.
async fn answer(config: &Path, to: Role, hello: &Hello) -> Reply {
    let mut c = dial(config, to).await.unwrap();
    say(&mut c, hello).await.unwrap();
    hear(&mut c).await.unwrap()
}

#[test]
fn the_id_of_a_session_that_has_ended() {
    let trio = Trio::new();
    let a = session(&trio, None);
    let session = a.session;
    drop(a);
    for (party, config, role) in
        [(&trio.owner, &trio.client, Role::Owner), (&trio.helper, &trio.owner_config, Role::Helper)]
    {
        party.wait("the end", |l| l["message"] == "session failed");
        block_on(async {
            let again = answer(config, role, &Hello::Ahead { session }).await;
            assert!(matches!(again, Reply::Refused(Refusal::Replay)), "{again:?}");
            let invented = answer(config, role, &Hello::Ahead { session: [3; 32] }).await;
            assert!(matches!(invented, Reply::Refused(Refusal::Session)), "{invented:?}");
        });
        let who = if role == Role::Owner { "client" } else { "owner" };
        for code in ["replay", "mismatch"] {
            let line = party.wait_code(code);
            assert!(line["error"].as_str().unwrap().starts_with(&format!("{who} at step `run-ahead lane")), "{line}");
        }
    }
    trio.works();
}

#[test]
fn a_pairing_announced_twice() {
    let trio = Trio::new();
    let preparation = OwnerPreparation::open(&trio.site.preparation).unwrap();
    let pair = |client: u8, owner: u8| Hello::Pair {
        client_nonce: [client; 32],
        owner_nonce: [owner; 32],
        client: trio.site.fingerprint("client"),
        preparation: preparation.manifest().id.to_string(),
        agreed: wire::digest(&preparation.manifest().to_json().unwrap()),
        half: wire::digest(preparation.hashes()),
        ahead_capacity: 1 << 28,
    };
    block_on(async {
        let mut client = dial(&trio.client, Role::Helper).await.unwrap();
        say(&mut client, &Hello::Join { nonce: [1; 32] }).await.unwrap();
        let mut owner = dial(&trio.owner_config, Role::Helper).await.unwrap();
        say(&mut owner, &pair(1, 2)).await.unwrap();
        let joined = hear(&mut owner).await.unwrap();
        assert!(matches!(joined, Reply::Joined { .. }), "{joined:?}");
        drop((client, owner));
        // As it was, or with one of its nonces.
        for (n, (client, owner)) in [(1, 2), (1, 3), (4, 2)].into_iter().enumerate() {
            let again = answer(&trio.owner_config, Role::Helper, &pair(client, owner)).await;
            assert!(matches!(again, Reply::Refused(Refusal::Replay)), "{again:?}");
            let blamed = |l: &&serde_json::Value| {
                l["code"] == "replay" && l["error"].as_str().unwrap().starts_with("owner at step `pairing a session")
            };
            trio.helper.wait("a replay", |_| trio.helper.lines().iter().filter(blamed).count() > n);
        }
    });
    trio.works();
}

#[test]
fn a_preparation_belongs_to_the_owner_that_made_it() {
    let trio = Trio::new();
    // Another owner with a good certificate, who knows everything public of the preparation, but not the half.
    let stolen = trio.site.path("stolen");
    std::fs::create_dir(&stolen).unwrap();
    for entry in std::fs::read_dir(&trio.site.preparation).unwrap().map(Result::unwrap) {
        if entry.path().is_file() {
            std::fs::copy(entry.path(), stolen.join(entry.file_name())).unwrap();
        }
    }
    let hashes = stolen.join("half.sha256");
    let mut bytes = std::fs::read(&hashes).unwrap();
    bytes[5] ^= 1;
    let seal = bytes.len() - 32;
    let digest = Sha256::digest(&bytes[..seal]);
    bytes[seal..].copy_from_slice(&digest);
    std::fs::write(&hashes, bytes).unwrap();
    trio.site.certify("rival", Role::Owner, &trio.site.ca, Validity::days(5, now()));
    let config = trio.site.config("rival", Role::Owner, "rival", "127.0.0.1:0", "", &trio.helper.address);
    let text = std::fs::read_to_string(&config).unwrap();
    let own = format!("preparation = \"{}\"", trio.site.preparation.display());
    std::fs::write(&config, text.replace(&own, &format!("preparation = \"{}\"", stolen.display()))).unwrap();
    let rival = Party::start(&config);
    let line = rival.wait_code("mismatch");
    assert!(line["error"].as_str().unwrap().contains("another owner has made this preparation"), "{line}");
    assert!(!rival.lines().iter().any(|l| l["message"] == "the helper has the model"));
    trio.works();
}

#[test]
fn revoking_a_client_ends_its_session() {
    let trio = Trio::new();
    let fingerprint = trio.site.certify("mallory", Role::Client, &trio.site.ca, Validity::days(5, now()));
    let config = trio.site.config("mallory", Role::Client, "mallory", "", &trio.owner.address, &trio.helper.address);
    let held = open(&config, [9; 32]).unwrap_or_else(|refused| panic!("{refused:?}"));
    trio.owner.wait("a session", |l| l["message"] == "session begins");
    revoke(&trio.owner_config, &fingerprint);
    trio.owner.wait("the end", |l| l["message"] == "session failed");
    trio.helper.wait("the end", |l| l["message"] == "session failed");
    drop(held);
    trio.works();
}
