//! Owners and Helpers that break the protocol in the middle of a session: Client and the other server say who it was and what
//! it did, and the next session works.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use trefoil::deploy::client::Remote;
use trefoil::deploy::party::{Daemon, Options};
use trefoil::error::Result;
use trefoil::net::tamper::Tampered;
use trefoil::net::{Abort, Channel, Lane, Message};
use trefoil::party::Role;

use crate::support::*;

#[derive(Clone, Copy)]
enum Fault {
    OneByteShort,
    Stall,
    Close,
}

/// So many online messages to the other server go well: then it is in the middle of the prefill's first layer.
const GOOD: usize = 6;
/// Longer than anybody waits.
const STALL: Duration = Duration::from_secs(40);

/// Makes a server commit this fault, once.
fn committing(fault: Fault, other: Role) -> Options {
    let sent = Arc::new(AtomicUsize::new(0));
    let links: Arc<Mutex<Vec<Weak<dyn Channel>>>> = Arc::default();
    let wrap = move |peer: Role, channel: Arc<dyn Channel>| -> Arc<dyn Channel> {
        links.lock().unwrap().push(Arc::downgrade(&channel));
        if peer != other {
            return channel;
        }
        let (sent, links) = (Arc::clone(&sent), Arc::clone(&links));
        let rewrite = move |lane, mut frame: Message| {
            if lane == Lane::Online && sent.fetch_add(1, Ordering::Relaxed) == GOOD {
                match fault {
                    Fault::OneByteShort => assert!(frame.payload.pop().is_some()),
                    Fault::Stall => std::thread::sleep(STALL),
                    // Without a word, to both.
                    Fault::Close => {
                        links.lock().unwrap().iter().filter_map(Weak::upgrade).for_each(|link| link.end(None));
                    }
                }
            }
            Some(frame)
        };
        Arc::new(Tampered::new(channel, None, Some(Arc::new(rewrite))))
    };
    Options { wrap: Some(Arc::new(wrap)), ..Options::default() }
}

fn generate(client: &std::path::Path) -> Result<Vec<u64>> {
    let mut remote = Remote::open(client, Options::default())?;
    let out = remote.generate(&prompt(), 4, 0.0, 0, &mut |_| true)?;
    remote.finish()?;
    Ok(out.tokens.into_iter().map(u64::from).collect())
}

fn blamed(hostile: Role, fault: Fault, code: &str) {
    expected(4);
    let other = if hostile == Role::Owner { Role::Helper } else { Role::Owner };
    let site = Site::new();
    let (mut bad, mut good) = (None, None);
    let mut start = |role: Role, helper: &str| {
        let name = role.to_string();
        let config = site.config(&name, role, &name, "127.0.0.1:0", "", helper);
        if role == hostile {
            bad.insert(Daemon::start(&config, committing(fault, other)).unwrap()).address().to_string()
        } else {
            good.insert(Party::start(&config)).address.clone()
        }
    };
    let helper = start(Role::Helper, "");
    let owner = start(Role::Owner, &helper);
    let (bad, good) = (bad.unwrap(), good.unwrap());
    match hostile {
        Role::Owner => provisioned(&bad),
        _ => drop(good.wait("provisioning", |l| l["message"] == "the helper has the model")),
    }
    let client = site.config("client", Role::Client, "client", "", &owner, &helper);

    let begun = Instant::now();
    let error = generate(&client).unwrap_err();
    // Five seconds are configured.
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    // By its own eyes, or by the word of the one that has seen it.
    assert_eq!(Abort::of(&error), Abort { blamed: Some(hostile), code: code.into() }, "{error}");
    let line = good.wait("the fault", |l| l["message"] == "session failed");
    assert_eq!(line["code"], code, "{line}");
    assert!(line["error"].as_str().unwrap().starts_with(&format!("{hostile} at step `pass 1 layer ")), "{line}");

    assert_eq!(generate(&client).unwrap(), expected(4));
}

#[test]
fn a_helper_whose_frame_is_one_byte_short() {
    blamed(Role::Helper, Fault::OneByteShort, "length");
}

#[test]
fn a_helper_that_stalls() {
    blamed(Role::Helper, Fault::Stall, "timeout");
}

#[test]
fn a_helper_that_closes_in_the_middle_of_a_layer() {
    blamed(Role::Helper, Fault::Close, "closed");
}

#[test]
fn an_owner_whose_frame_is_one_byte_short() {
    blamed(Role::Owner, Fault::OneByteShort, "length");
}

#[test]
fn an_owner_that_stalls() {
    blamed(Role::Owner, Fault::Stall, "timeout");
}

#[test]
fn an_owner_that_closes_in_the_middle_of_a_layer() {
    blamed(Role::Owner, Fault::Close, "closed");
}
