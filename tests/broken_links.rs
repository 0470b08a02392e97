//! Messages lost or changed in the middle of a generation: the error names the peer and the step that waited for it, every
//! thread ends, and nothing hangs.

#[path = "support/models.rs"]
mod models;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use models::{fixture, greedy, load};
use trefoil::error::PeerFault;
use trefoil::generate::{Local, LocalOptions};
use trefoil::model::Weights;
use trefoil::net::tamper::Rewrite;
use trefoil::net::{Lane, Message};
use trefoil::{Error, Role};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    Drop,
    Cut,
    Grow,
    Rename,
}

/// Does `fault` to the `nth` frame that a party sends on `lane`; frames are counted from the first.
fn rewrite(lane: Lane, nth: usize, fault: Fault) -> Rewrite {
    let seen = AtomicUsize::new(0);
    Arc::new(move |l, mut frame: Message| {
        if l != lane || seen.fetch_add(1, Ordering::Relaxed) != nth {
            return Some(frame);
        }
        match fault {
            Fault::Drop => return None,
            Fault::Cut => drop(frame.payload.pop()),
            Fault::Grow => frame.payload.push(0),
            Fault::Rename => frame.tag ^= 1,
        }
        Some(frame)
    })
}

/// Runs a generation in a thread of its own; `None` if it does not end in time.
fn ends(w: &Weights, options: LocalOptions) -> Option<Result<usize, Error>> {
    let (done, wait) = channel();
    let w = w.clone();
    std::thread::spawn(move || {
        let run = || {
            let mut local = Local::start(w, None, options)?;
            match greedy(&mut local, &[1, 7, 30, 31], 6) {
                // root_cause joins the threads of Owner and Helper, the Client's were scoped: all have ended after it.
                Err(e) => Err(local.root_cause(e)),
                Ok(g) => local.finish().map(|_| g.tokens.len()),
            }
        };
        let _ = done.send(run());
    });
    wait.recv_timeout(Duration::from_secs(60)).ok()
}

fn count(w: &Weights, options: &LocalOptions) -> [[usize; 2]; 3] {
    let counts: [Arc<Mutex<[usize; 2]>>; 3] = Default::default();
    let mut options = options.clone();
    for (party, c) in counts.iter().enumerate() {
        let c = Arc::clone(c);
        options.setup.rewrites[party] = Some(Arc::new(move |lane, frame| {
            c.lock().unwrap()[usize::from(lane == Lane::Ahead)] += 1;
            Some(frame)
        }));
    }
    ends(w, options).unwrap().unwrap();
    counts.map(|c| *c.lock().unwrap())
}

#[test]
fn lost_and_changed_messages() {
    let mut w = load(&fixture("llama-plain"));
    w.config.eos_ids.clear();
    let options = LocalOptions { max_positions: Some(16), ..LocalOptions::new(None) };
    let counts = count(&w, &options);
    eprintln!("frames sent, online and ahead, by party: {counts:?}");
    let (start, mut cases) = (Instant::now(), 0);
    for role in Role::ALL {
        for (lane, which) in [(Lane::Online, 0), (Lane::Ahead, 1)] {
            let n = counts[role.index()][which];
            // The first (preparation, request), the last (its end), and the middle of prefill and decode.
            let mut places: Vec<usize> = [0, 1, n / 5, n / 2, n.max(1) - 1].into_iter().filter(|&i| i < n).collect();
            places.dedup();
            for fault in [Fault::Cut, Fault::Grow] {
                places.iter().for_each(|&nth| one(&w, &options, role, (lane, nth), fault));
            }
            // These wait for the timeout, so they wait together.
            let mut impatient = options.clone();
            impatient.setup.timeout = Duration::from_millis(1500);
            std::thread::scope(|scope| {
                for &nth in &places {
                    for fault in [Fault::Drop, Fault::Rename] {
                        let (w, options) = (&w, &impatient);
                        scope.spawn(move || one(w, options, role, (lane, nth), fault));
                    }
                }
            });
            cases += 4 * places.len();
        }
    }
    eprintln!("{cases} faults in {:.1} s", start.elapsed().as_secs_f64());
}

fn one(w: &Weights, options: &LocalOptions, role: Role, (lane, nth): (Lane, usize), fault: Fault) {
    let mut o = options.clone();
    o.setup.rewrites[role.index()] = Some(rewrite(lane, nth, fault));
    let what = format!("{role}, {lane:?} frame {nth}, {fault:?}");
    match ends(w, o).unwrap_or_else(|| panic!("{what}: hangs")) {
        Err(Error::Peer { role: blamed, step, kind }) => {
            assert!(!step.is_empty(), "{what}: {kind}");
            // A cut or a grown message shows by itself who sent it. (Who waits for one that never came may wait for
            // somebody who waits in turn.)
            if matches!(fault, Fault::Cut | Fault::Grow) {
                assert!(blamed == role && matches!(kind, PeerFault::Length { .. }), "{what}: {blamed} {step} {kind}");
            } else {
                let told = matches!(kind, PeerFault::Timeout(_) | PeerFault::Closed);
                assert!(told, "{what}: {blamed} {step} {kind}");
            }
        }
        // What a party walked ahead in vain is dropped unread.
        Ok(tokens) => assert!(lane == Lane::Ahead && tokens == 6, "{what}: went unnoticed"),
        Err(e) => panic!("{what}: {e}"),
    }
}
