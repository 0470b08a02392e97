//! No PRF stream is taken twice under one key between parties over TLS: over requests, requests that are stopped, sessions
//! side by side, and restarts of Owner and Helper in the middle of a session. `tests/addresses.rs` does the same within one
//! process, and says why it is the nonces that must differ.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::time::{Duration, Instant};

use trefoil::deploy::client::Remote;
use trefoil::deploy::party::{Daemon, Options};
use trefoil::error::Error;
use trefoil::party::Role;
use trefoil::prf::{Address, AddressLog, Pair, Taken};

use crate::support::*;

fn start(config: &Path, options: &Options) -> Daemon {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        match Daemon::start(config, options.clone()) {
            Ok(daemon) => return daemon,
            // The one before has just let go of port and store.
            Err(Error::Config(_)) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(50)),
            Err(error) => panic!("{error}"),
        }
    }
}

fn open(client: &Path, options: &Options) -> Remote {
    Remote::open(client, options.clone()).unwrap()
}

/// Three requests, one of which its caller stops while Client and Helper have run ahead.
fn session(client: &Path, options: &Options) {
    let mut remote = open(client, options);
    for (max_new, stop) in [(4, 9), (12, 2), (3, 9)] {
        let mut n = 0;
        let out = remote
            .generate(&prompt(), max_new, 0.0, 0, &mut |_| {
                n += 1;
                n < stop
            })
            .unwrap();
        let tokens: Vec<u64> = out.tokens.iter().map(|&t| u64::from(t)).collect();
        assert_eq!(tokens, expected(max_new.min(stop)));
    }
    remote.finish().unwrap();
}

/// A session that loses a party in its middle.
fn interrupted(client: &Path, options: &Options, strike: impl FnOnce()) {
    let mut remote = open(client, options);
    let mut strike = Some(strike);
    let mut n = 0;
    let out = remote.generate(&prompt(), 24, 0.0, 0, &mut |_| {
        n += 1;
        if n == 3
            && let Some(strike) = strike.take()
        {
            strike();
        }
        true
    });
    assert!(matches!(out, Err(Error::Peer { .. })), "{out:?}");
}

fn assert_once(log: &[Taken]) {
    let mut blocks = HashSet::new();
    let mut nonces: HashMap<(Pair, u64), (u128, &Address)> = HashMap::new();
    for t in log {
        assert!(blocks.insert((t.holder, t.pair, t.block)), "{} takes a stream twice: {}", t.holder, t.address);
        let first = nonces.entry((t.pair, (t.block >> 64) as u64)).or_insert((t.block, &t.address));
        assert_eq!(*first, (t.block, &t.address), "streams that may overlap");
    }
}

#[test]
fn no_stream_is_taken_twice_over_sessions_and_restarts() {
    expected(24);
    let options = Options { addresses: Some(AddressLog::default()), ..Options::default() };
    let site = Site::new();
    let any = "127.0.0.1:0";
    let helper = start(&site.config("helper", Role::Helper, "helper", any, "", ""), &options);
    let helper_at = helper.address().to_string();
    let helper_config = site.config("helper", Role::Helper, "helper", &helper_at, "", "");
    let owner = start(&site.config("owner", Role::Owner, "owner", any, "", &helper_at), &options);
    let owner_at = owner.address().to_string();
    let owner_config = site.config("owner", Role::Owner, "owner", &owner_at, "", &helper_at);
    let client = site.config("client", Role::Client, "client", "", &owner_at, &helper_at);
    provisioned(&owner);

    std::thread::scope(|s| {
        (0..2).for_each(|_| drop(s.spawn(|| session(&client, &options))));
    });
    interrupted(&client, &options, || owner.stop(Duration::ZERO));
    let owner = start(&owner_config, &options);
    provisioned(&owner);
    session(&client, &options);
    interrupted(&client, &options, || helper.stop(Duration::ZERO));
    let helper = start(&helper_config, &options);
    session(&client, &options);
    owner.stop(Duration::from_secs(5));
    helper.stop(Duration::from_secs(5));

    let log = options.addresses.unwrap().lock().unwrap().clone();
    assert_once(&log);
    // Six sessions named their streams alike, and took different ones.
    let name = &log.iter().find(|t| t.holder == Role::Client && t.address.pass == 1).unwrap();
    let alike = log.iter().filter(|t| t.holder == Role::Client && (t.pair, &t.address) == (name.pair, &name.address));
    assert_eq!(alike.count(), 6);
    eprintln!("{} streams in six sessions, none twice", log.len());
    // The check sees a second use.
    let again: Vec<Taken> = log.iter().chain(&log[..1]).cloned().collect();
    assert!(std::panic::catch_unwind(|| assert_once(&again)).is_err());
}
