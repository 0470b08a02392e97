//! No PRF address is ever taken twice: over requests, regenerations, requests that are stopped while Client and Helper have
//! run ahead, and sessions side by side.
//!
//! A stream is read from the counter block at which its address starts: the low half of the block counts, the high half
//! is a nonce. Two streams of one key whose nonces differ cannot overlap, however long they are; so all nonces of a key
//! must differ, not the starting blocks only.

use std::collections::{HashMap, HashSet};
use std::thread;

use trefoil::generate::{Draft, Local, LocalOptions, Stop};
use trefoil::model::{Arch, ModelConfig, Weights};
use trefoil::party::Role;
use trefoil::prf::{Address, AddressLog, Pair, Taken};
use trefoil::world::Keys;

fn config() -> ModelConfig {
    ModelConfig {
        arch: Arch::Qwen3,
        num_kv_heads: 1,
        qkv_bias: true,
        qk_norm: true,
        ..ModelConfig::llama(16, 24, 2, 2, 32, 32)
    }
}

/// A session of several requests; its passes and all that was taken.
fn session(keys: Option<Keys>, private_layers: Option<usize>) -> Vec<Taken> {
    let log = AddressLog::default();
    let options = LocalOptions { keys, addresses: Some(log.clone()), ..LocalOptions::new(private_layers) };
    let mut weights = Weights::random(config(), 5).unwrap();
    // Logits far enough apart that rounding, which fresh masks vary, does not decide.
    weights.head.as_mut().unwrap().mapv_inplace(|w| 100.0 * w);
    let mut local = Local::start(weights.clone(), None, options).unwrap();
    // Two requests, the first one again, one that its caller stops after two of 20 tokens, and the first one once more. Then the
    // same with drafts: as good as the model, and then ones of which most are rejected.
    let requests: [(&[u32], usize, usize); 5] =
        [(&[1, 2, 3], 5, 9), (&[7, 8], 3, 9), (&[1, 2, 3], 5, 9), (&[4], 20, 2), (&[1, 2, 3], 5, 9)];
    let requests = [requests; 3].concat();
    let (mut last, mut from, mut first) = (0, 0, None);
    for (i, (prompt, max_new, stop)) in requests.into_iter().enumerate() {
        match i {
            5 => local.draft_with(Draft::new(weights.clone(), 3).unwrap()).unwrap(),
            10 => local.draft_with(Draft::new(Weights::random(config(), 6).unwrap(), 3).unwrap()).unwrap(),
            _ => {}
        }
        let mut n = 0;
        let out = local
            .generate(prompt, max_new, 0.0, 0, false, &mut |_| {
                n += 1;
                n < stop
            })
            .unwrap_or_else(|e| panic!("request {i}: {e}"));
        assert_eq!(out.stop, if stop < max_new { Stop::Caller } else { Stop::Length });
        assert_eq!(out.tokens.len(), max_new.min(stop));
        if i == 0 {
            first = Some(out.tokens);
        } else if prompt == [1, 2, 3] {
            assert_eq!(first.as_ref(), Some(&out.tokens), "a regeneration gives the same tokens");
        }
        // Each request, a regeneration too, has passes of its own, larger than all before.
        let log = log.lock().unwrap();
        let passes: Vec<u64> =
            log[from..].iter().filter(|t| t.holder == Role::Client).map(|t| t.address.pass).collect();
        assert!(passes.iter().all(|&p| p > last), "request {i} begins after pass {last}");
        (last, from) = (passes.into_iter().max().unwrap(), log.len());
    }
    local.finish().unwrap();
    log.lock().unwrap().clone()
}

/// What each party took: nothing twice, and where two took the same address of a pair, the same stream.
fn assert_once(sessions: &[&[Taken]]) {
    let (mut blocks, mut nonces) = (HashSet::new(), HashMap::new());
    let mut streams = 0;
    for (session, log) in sessions.iter().enumerate() {
        let (mut taken, mut named) = (HashSet::new(), HashMap::new());
        for t in *log {
            assert!(t.pair.has(t.holder));
            assert!(
                taken.insert((t.holder, t.pair, t.address.clone())),
                "session {session}: {} takes {} twice",
                t.holder,
                t.address
            );
            assert!(
                blocks.insert((t.holder, session, t.pair, t.block)),
                "session {session}: one block for two addresses: {}",
                t.address
            );
            assert_eq!(
                *named.entry((t.pair, t.address.clone())).or_insert(t.block),
                t.block,
                "{} at both ends",
                t.address
            );
            // Over the sessions too: a coincidence of 64 random bits is not to be expected.
            let owner = nonces.entry((t.pair, (t.block >> 64) as u64)).or_insert((session, t.address.clone()));
            assert_eq!(*owner, (session, t.address.clone()), "streams that may overlap");
        }
        streams += named.len();
        let by = |holder: Role, pair: Pair| -> HashSet<&Address> {
            log.iter().filter(|t| t.holder == holder && t.pair == pair).map(|t| &t.address).collect()
        };
        // The Owner takes nothing that its peers did not, who run ahead of it.
        assert!(by(Role::Owner, Pair::OwnerClient).is_subset(&by(Role::Client, Pair::OwnerClient)));
        assert!(by(Role::Owner, Pair::OwnerHelper).is_subset(&by(Role::Helper, Pair::OwnerHelper)));
        assert!(
            by(Role::Client, Pair::OwnerClient).len() > by(Role::Owner, Pair::OwnerClient).len(),
            "slots were discarded"
        );
        assert!(!by(Role::Client, Pair::ClientHelper).is_disjoint(&by(Role::Helper, Pair::ClientHelper)));
    }
    eprintln!("{} sessions, {streams} streams, none twice", sessions.len());
}

#[test]
fn no_address_is_taken_twice_over_requests_and_sessions() {
    // Two sessions at once and one more after them; with and without a private embedding.
    let (a, b) = thread::scope(|s| {
        let a = s.spawn(|| session(Some(Keys::seeded(1)), None));
        let b = s.spawn(|| session(None, Some(1)));
        (a.join().unwrap(), b.join().unwrap())
    });
    let c = session(Some(Keys::seeded(2)), None);
    assert!(a.iter().any(|t| t.pair == Pair::OwnerHelper), "the private embedding uses the third pair");
    assert_once(&[&a, &b, &c]);
    // The same keys and program again, as no session may have them: the check sees it.
    let again = std::panic::catch_unwind(|| assert_once(&[&a, &a]));
    assert!(again.is_err(), "a session's keys used for another one");
}
