//! Control messages: what a peer with a valid certificate may send before the engine starts.

use std::fmt::Debug;

use proptest::prelude::*;
use serde::Serialize;
use serde::de::DeserializeOwned;
use trefoil::deploy::certs::{Authority, Details, Host, Key, Request, Validity, now};
use trefoil::deploy::wire::{ECHO_LIMIT, Echo, Go, Hello, Refusal, Reply, Status, decode, echo_wanted, encode};
use trefoil::net::Abort;
use trefoil::party::Role;

use crate::fuzz;
use crate::mutate::{apply, byte_changes};

fn hellos() -> Vec<Hello> {
    vec![
        Hello::Open { nonce: [1; 32] },
        Hello::Join { nonce: [2; 32] },
        Hello::Pair {
            half: [8; 32],
            client_nonce: [3; 32],
            owner_nonce: [4; 32],
            client: "sha256:ab".into(),
            preparation: "00ff".into(),
            agreed: [5; 32],
            ahead_capacity: 1 << 28,
        },
        Hello::Ahead { session: [6; 32] },
        Hello::Offer { manifest: b"{}".to_vec(), chunks: vec![7; 64] },
        Hello::Probe,
    ]
}

fn replies() -> Vec<Reply> {
    let refusals = [
        Refusal::Role,
        Refusal::Busy { sessions: 8 },
        Refusal::Memory,
        Refusal::Preparation { wanted: "a".into(), known: vec!["b\u{1b}[2J".into(), "c".into()] },
        Refusal::Preparing { percent: 50 },
        Refusal::Manifest { ours: [1; 32], theirs: [2; 32] },
        Refusal::Third { role: Role::Helper, code: "timeout".into() },
        Refusal::Corrupt { chunk: 3 },
    ];
    let status = Status {
        release: "0.1.0".into(),
        preparations: vec!["x".into(); 3],
        sessions: 1,
        limit: 8,
        clock: 1.8e9,
        provisioned: true,
    };
    let mut all: Vec<Reply> = refusals.into_iter().map(Reply::Refused).collect();
    all.extend([
        Reply::Welcome {
            owner_nonce: [1; 32],
            helper_nonce: [2; 32],
            helper: "sha256:cd".into(),
            manifest: b"{}".to_vec(),
            seed: trefoil::deploy::wire::Seed([3; 32]),
            ahead_capacity: 1,
            prompt_tokens: 4096,
            session: [4; 32],
        },
        Reply::Joined {
            helper_nonce: [1; 32],
            owner_nonce: [2; 32],
            owner: "sha256:ef".into(),
            agreed: [3; 32],
            session: [4; 32],
        },
        Reply::Attached,
        Reply::Have { next: 3 },
        Reply::Stored,
        Reply::Status(status),
    ]);
    all
}

/// What decodes says what was sent: encoded again it decodes to the same.
fn read<T: Serialize + DeserializeOwned + Debug>(bytes: &[u8]) -> Result<Option<T>, TestCaseError> {
    let Some(message) = decode::<T>(bytes) else { return Ok(None) };
    let again: Option<T> = decode(&encode(&message).unwrap());
    prop_assert_eq!(format!("{again:?}"), format!("{:?}", Some(&message)));
    Ok(Some(message))
}

fn all(bytes: &[u8]) -> Result<(), TestCaseError> {
    read::<Hello>(bytes)?;
    read::<Go>(bytes)?;
    let echo = read::<Echo>(bytes)?.map(|e| e.want).filter(|want| *want <= ECHO_LIMIT);
    prop_assert_eq!(echo_wanted(bytes), echo);
    read::<Status>(bytes)?;
    if let Some(Reply::Refused(why)) = read::<Reply>(bytes)? {
        let said = why.fault().to_string();
        prop_assert!(!said.chars().any(char::is_control), "{said:?}");
    }
    if let Some(abort) = Abort::decode(bytes) {
        prop_assert_eq!(abort.encode(), bytes);
    }
    Ok(())
}

#[test]
fn control_messages() {
    fuzz("control messages, any bytes", &prop::collection::vec(any::<u8>(), 0..300), |bytes| all(&bytes));
    let mut good: Vec<Vec<u8>> = hellos().iter().map(|m| encode(m).unwrap()).collect();
    good.extend(replies().iter().map(|m| encode(m).unwrap()));
    good.push(encode(&Echo { want: 8 << 20, filler: vec![0; 40] }).unwrap());
    good.push(encode(&Go { session: [9; 32] }).unwrap());
    good.push(Abort { blamed: Some(Role::Owner), code: "timeout".into() }.encode());
    let mutated = (prop::sample::select(good), byte_changes());
    fuzz("control messages, mutated", &mutated, |(good, changes)| all(&apply(&good, &changes)));
}

/// Certificates and requests come from strangers.
#[test]
fn certificates() {
    let ca = Authority::new("Fuzz", Validity::days(30, now())).unwrap();
    let hosts: Vec<Host> = ["owner.example", "192.0.2.7", "::1"].iter().map(|h| h.parse().unwrap()).collect();
    let request = Request::new(Role::Owner, "Ünïcode Org", hosts).unwrap();
    let key = Key::generate().unwrap();
    let pem = ca.issue(&request, &key, Validity::days(20, now())).unwrap();
    let der = unarmoured(&pem);
    fuzz("certificate, mutated", &byte_changes(), |changes| {
        if let Ok(d) = Details::parse_der(&apply(&der, &changes)) {
            let _ = (format!("{d:?}"), d.days_left(now()), trefoil::deploy::certs::date(d.not_after));
        }
        Ok(())
    });
    let csr = request.csr(&key).unwrap();
    let raw = unarmoured(&csr);
    let (validity, refused) = (Validity::days(20, now()), std::cell::Cell::new(0u64));
    fuzz("certificate request, mutated", &byte_changes(), |changes| {
        let bytes = apply(&raw, &changes);
        match ca.sign(&armoured(&bytes), Role::Owner, validity) {
            // Whatever was changed, it is none of what the key has signed.
            Ok(signed) => prop_assert_eq!(&signed.request, &request),
            Err(_) => refused.set(refused.get() + 1),
        }
        Ok(())
    });
    assert!(refused.get() > 0);
    fuzz("certificates in PEM, mutated", &crate::mutate::changes(), |changes| {
        let text = String::from_utf8_lossy(&apply(pem.as_bytes(), &changes)).into_owned();
        let _ = (Details::parse_pem(text.as_bytes()), Key::from_pem(&text));
        Ok(())
    });
}

const BASE64: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

fn unarmoured(pem: &str) -> Vec<u8> {
    let digits = pem.lines().filter(|l| !l.starts_with("---")).flat_map(str::bytes);
    let (mut out, mut held, mut bits) = (Vec::new(), 0u32, 0);
    for d in digits.filter_map(|b| BASE64.iter().position(|c| *c == b)) {
        (held, bits) = (held << 6 | d as u32, bits + 6);
        if bits >= 8 {
            bits -= 8;
            out.push((held >> bits) as u8);
        }
    }
    out
}

fn armoured(der: &[u8]) -> String {
    let mut text = String::new();
    for three in der.chunks(3) {
        let word = three.iter().enumerate().fold(0u32, |w, (i, b)| w | u32::from(*b) << (16 - 8 * i));
        for i in 0..4 {
            let digit = char::from(BASE64[(word >> (18 - 6 * i) & 63) as usize]);
            text.push(if i <= three.len() { digit } else { '=' });
        }
    }
    let lines: Vec<&str> = text.as_bytes().chunks(64).map(|l| std::str::from_utf8(l).unwrap()).collect();
    format!("-----BEGIN CERTIFICATE REQUEST-----\n{}\n-----END CERTIFICATE REQUEST-----\n", lines.join("\n"))
}
