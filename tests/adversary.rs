//! Peers that do not keep to the protocol: wrong lengths, set padding, lost frames, closed links, noise. Each gives an error
//! that names the role and the step, or a wrong number where the protocol cannot know better; nothing panics or hangs.

#[allow(unused)]
#[path = "support/mod.rs"]
mod support;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ndarray::Array2;
use support::Random;
use trefoil::error::{Error, PeerFault, Result};
use trefoil::net::tamper::Rewrite;
use trefoil::net::{Lane, Message};
use trefoil::party::Role;
use trefoil::prf::PreparationSeed;
use trefoil::protocol::argmax::argmax;
use trefoil::protocol::cached::{Cached, Scores, product_cached};
use trefoil::protocol::embedding::{TableShare, embed, source};
use trefoil::protocol::guard::{RangeFlags, guard};
use trefoil::protocol::input::{InputSource, input};
use trefoil::protocol::linear::{OwnerMatrix, owner_linear};
use trefoil::protocol::lookup::{self, Table};
use trefoil::protocol::open::{OutputSink, open};
use trefoil::protocol::polynomial::polynomial;
use trefoil::protocol::product::{Elementwise, product};
use trefoil::protocol::square::{scale, square_sum};
use trefoil::protocol::thermometer::{Thermometer, reference};
use trefoil::protocol::window::Digits;
use trefoil::protocol::{compare::is_negative, lift::lift};
use trefoil::session::{Scope, Session};
use trefoil::share::Rows;
use trefoil::world::{Keys, Setup, World};

const WAIT: Duration = Duration::from_millis(300);
const PASSES: [usize; 3] = [1, 2, 1];
const WIDTH: usize = 5;

/// All operations, one after the other; widths that leave padding bits.
struct Program {
    values: InputSource,
    tokens: InputSource,
    table: [TableShare; 3],
    matrix: [OwnerMatrix; 3],
    /// Kept from pass to pass, by party.
    caches: [Mutex<Cached>; 3],
    sink: Mutex<OutputSink>,
    /// A party that closes its links on the way, after so many operations.
    quits: Option<(Role, usize)>,
}

impl Program {
    fn new(quits: Option<(Role, usize)>) -> Program {
        let (values, from_values) = channel();
        let (tokens, from_tokens) = channel();
        for (i, &n) in PASSES.iter().enumerate() {
            values.send(vec![(i as u64 + 1) << 8; n * WIDTH]).unwrap();
            tokens.send(vec![i as u64; n]).unwrap();
        }
        let seed = PreparationSeed::from_bytes([5; 32]);
        let rows = || TableShare::rows((11, WIDTH), 8, vec![3; 11 * WIDTH]).unwrap();
        let table = [rows(), TableShare::seed((11, WIDTH), 8, 1, seed.clone()), rows()];
        let owner = OwnerMatrix::quantise(2, "w", Array2::ones((3, WIDTH)).view(), None, 4).unwrap();
        let helper = OwnerMatrix::helper(2, 3, WIDTH, 4, owner.helper_words(&seed).unwrap()).unwrap();
        let matrix = [owner, OwnerMatrix::client(2, 3, WIDTH, 4, seed), helper];
        // Nobody reads the outputs, so the receiver must stay alive for as long as the process.
        let (sink, outputs) = channel();
        std::mem::forget(outputs);
        let caches = std::array::from_fn(|_| Mutex::new(Cached::new(WIDTH, 27, 8, 8)));
        let (values, tokens) = (source(from_values), source(from_tokens));
        Program { values, tokens, table, matrix, caches, sink: Mutex::new(sink), quits }
    }

    fn run(&self, s: &mut Session) -> Result<()> {
        let (n, i) = (s.tokens(), s.role().index());
        let client = s.role() == Role::Client;
        let sink = self.sink.lock().unwrap().clone();
        let mut step = 0;
        let mut at = |s: &Session, name: &str| {
            step += 1;
            if self.quits == Some((s.role(), step)) {
                s.links().close();
            }
            Scope::layer(1).at(name)
        };
        let e = embed(s, &at(s, "embed"), &self.table[i], n, 30, client.then_some(&self.tokens))?;
        let rows = Rows::even(n, WIDTH);
        let x = input(s, &at(s, "input"), &rows, 21, 8, client.then_some(&self.values))?;
        let y = owner_linear(s, &at(s, "linear"), &e, &self.matrix[i])?;
        let xy = product(s, &at(s, "product"), &x, &e, Arc::new(Elementwise))?.finish(s)?;
        let p = polynomial(s, &at(s, "polynomial"), &[&x, &xy], &[&[0, 0, 1], &[1, 0, 0]])?.finish(s)?;
        let t = Table::cyclic(&(0..32).collect::<Vec<_>>());
        let digits = Digits::cut(&p, 1, 5)?;
        let looked = lookup::words(s, &at(s, "lookup"), &digits, &[t], &[8], 27)?.finish(s)?;
        let lifted = lift(s, &at(s, "lift"), &looked[0], 47)?.finish(s)?;
        let (sum, squares) = square_sum(s, &at(s, "square"), &looked[0], WIDTH)?;
        let sum = sum.finish(s)?;
        scale(s, &at(s, "scale"), squares, &sum)?.finish(s)?;
        let mut cache = self.caches[i].lock().unwrap();
        let scores = Arc::new(Scores { heads: 1, kv_heads: 1, dim: WIDTH, all: None });
        let row = &looked[0];
        product_cached(s, &at(s, "cached"), row, row, &mut cache, scores)?.finish(s)?;
        let thermometer = Thermometer { step_bits: 20, base: -4, n: 9 };
        let lengths = vec![WIDTH; n];
        let shift = reference(s, &at(s, "thermometer"), &looked[0], &lengths, 3, &thermometer, 24)?;
        let sign = is_negative(s, &at(s, "compare"), &looked[0].narrow(20)?, 7)?.finish(s)?;
        let best = argmax(s, &at(s, "argmax"), &looked[0].narrow(15)?, &[4], &mut |_| Ok(()))?;
        let mut flags = RangeFlags::new(1000);
        let g = guard(s, &at(s, "guard"), &lifted, 27, true, flags.count_bits())?;
        flags.guard("1", "x", g);
        flags.count("1", "shift", shift.faults.narrow(flags.count_bits().min(24))?);
        flags.open(s, &at(s, "flags"), client.then_some(&sink))?;
        for (name, v) in [("open.y", &y), ("open.sign", &sign), ("open.best", &best)] {
            open(s, &at(s, name), v, client.then_some(&sink))?;
        }
        Ok(())
    }
}

/// Runs the program while `culprit` sends what `rewrite` makes of its frames. Checks that it ended soon.
fn misbehave(
    culprit: Role,
    rewrite: Option<Rewrite>,
    ahead_capacity: usize,
    quits: Option<(Role, usize)>,
) -> Result<()> {
    let mut setup = Setup { timeout: WAIT, ahead_capacity, ..Setup::default() };
    setup.rewrites[culprit.index()] = rewrite;
    let world = World::new(Keys::seeded(77), &setup);
    let program = Program::new(quits);
    let start = Instant::now();
    // World::run ends only when the threads of all three parties have ended.
    let result = world.run(1, &PASSES, |s| program.run(s)).map(|_| ());
    assert!(start.elapsed() < Duration::from_secs(10), "took {:?}", start.elapsed());
    result
}

/// Changes the `n`-th frame of a party only.
fn nth(n: usize, change: impl Fn(Message) -> Option<Message> + Send + Sync + 'static) -> (Rewrite, Arc<AtomicUsize>) {
    let count = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&count);
    let rewrite = Arc::new(
        move |_: Lane, f: Message| if counter.fetch_add(1, Ordering::SeqCst) == n { change(f) } else { Some(f) },
    );
    (rewrite, count)
}

/// Frames that a party sends in an honest run.
fn frames(role: Role) -> usize {
    let (rewrite, count) = nth(usize::MAX, Some);
    misbehave(role, Some(rewrite), 1 << 20, None).unwrap();
    count.load(Ordering::SeqCst)
}

/// `result` blames `culprit` at a step that has a name, with a fault that `allowed` accepts.
fn blames(result: &Result<()>, culprit: Role, what: &str, allowed: impl Fn(&PeerFault) -> bool) {
    match result {
        Err(Error::Peer { role, step, kind }) => {
            assert!(allowed(kind), "{what} of {culprit}: {kind}");
            assert_eq!(*role, culprit, "{what}: {kind} at {step}");
            assert!(step.starts_with("pass ") && step.contains('.'), "{what}: `{step}` names a step");
        }
        other => panic!("{what} of {culprit} gave {other:?}"),
    }
}

/// Every frame for parties that send few, a spread of them otherwise.
fn some(n: usize) -> impl Iterator<Item = usize> {
    (0..n).step_by((n / 60).max(1))
}

#[test]
fn an_honest_run_ends_well() {
    // The smaller one holds the walks back many times; it must hold one operation of a batch (see `net::memory::link`).
    for capacity in [1 << 10, 1 << 20] {
        misbehave(Role::Owner, None, capacity, None).unwrap();
    }
}

#[test]
fn lengths_are_exact() {
    for culprit in Role::ALL {
        for at in some(frames(culprit)) {
            let short = nth(at, |mut f| {
                f.payload.pop();
                Some(f)
            });
            let long = nth(at, |mut f| {
                f.payload.push(0);
                Some(f)
            });
            for (what, (rewrite, _)) in [("a byte less", short), ("a byte more", long)] {
                // With a tiny buffer the walks are still sending when the fault is seen.
                let result = misbehave(culprit, Some(rewrite), if at % 2 == 0 { 1 << 20 } else { 1 << 10 }, None);
                blames(
                    &result,
                    culprit,
                    what,
                    |kind| matches!(kind, PeerFault::Length { want, got } if want.abs_diff(*got) == 1),
                );
            }
        }
    }
}

#[test]
fn padding_is_zero() {
    for culprit in Role::ALL {
        let mut refused = 0;
        for at in some(frames(culprit)) {
            let (rewrite, _) = nth(at, |mut f| {
                if let Some(last) = f.payload.last_mut() {
                    *last |= 0x80;
                }
                Some(f)
            });
            // Where the packing leaves no bit over, the result is only wrong.
            let result = misbehave(culprit, Some(rewrite), 1 << 20, None);
            if result.is_err() {
                blames(&result, culprit, "padding", |kind| matches!(kind, PeerFault::Malformed(_)));
                refused += 1;
            }
        }
        assert!(refused > 3, "{culprit}: {refused}");
    }
}

#[test]
fn a_lost_frame_times_out() {
    // One message of each kind of link: a timeout takes its time.
    for culprit in Role::ALL {
        let n = frames(culprit);
        for at in [0, n / 3, n / 2, n - 1] {
            let result = misbehave(culprit, Some(nth(at, |_| None).0), 1 << 20, None);
            // Who waits for a party that itself waits may lose patience first: then the blame is on the one between.
            match &result {
                Err(Error::Peer { role, step, kind: PeerFault::Timeout(ms) }) => {
                    assert_eq!(*ms, WAIT.as_millis() as u64);
                    assert!(step.starts_with("pass "), "{role} {step}");
                }
                other => panic!("frame {at} of {culprit} lost: {other:?}"),
            }
        }
    }
}

#[test]
fn a_party_that_goes_silent_times_out() {
    for culprit in Role::ALL {
        let from = frames(culprit) / 2;
        let count = AtomicUsize::new(0);
        let rewrite: Rewrite = Arc::new(move |_, f| (count.fetch_add(1, Ordering::SeqCst) < from).then_some(f));
        let result = misbehave(culprit, Some(rewrite), 1 << 20, None);
        assert!(matches!(result, Err(Error::Peer { kind: PeerFault::Timeout(300), .. })), "{result:?}");
    }
}

#[test]
fn a_closed_link_is_seen_by_all() {
    for culprit in Role::ALL {
        for step in [1, 2, 5, 9, 13, 17] {
            for capacity in [1 << 10, 1 << 20] {
                let result = misbehave(culprit, None, capacity, Some((culprit, step)));
                match result {
                    Err(Error::Peer { step, kind: PeerFault::Closed, .. }) => assert!(step.starts_with("pass ")),
                    // One that saw it tells the others.
                    Err(Error::Peer { step, kind: PeerFault::Aborted { code, .. }, .. }) => {
                        assert!(step.starts_with("pass ") && code == "closed", "{step}: {code}");
                    }
                    other => panic!("{culprit} closed at {step}: {other:?}"),
                }
            }
        }
    }
}

#[test]
fn noise_of_the_right_length_breaks_nothing_but_the_result() {
    for culprit in Role::ALL {
        for at in some(frames(culprit)) {
            let (rewrite, _) = nth(at, move |mut f| {
                let mut r = Random(at as u64);
                f.payload.iter_mut().for_each(|b| *b = r.word() as u8);
                Some(f)
            });
            let result = misbehave(culprit, Some(rewrite), 1 << 20, None);
            if result.is_err() {
                blames(&result, culprit, "noise", |kind| matches!(kind, PeerFault::Malformed(_)));
            }
        }
        // And nothing but noise, from the first frame to the last, with and without the byte that may end in padding (some
        // messages have padding within).
        for padding in [true, false] {
            let rewrite: Rewrite = Arc::new(move |_, mut f| {
                let mut r = Random(f.tag);
                let n = f.payload.len();
                for (i, b) in f.payload.iter_mut().enumerate() {
                    *b = if i + 1 == n && !padding { *b } else { r.word() as u8 };
                }
                Some(f)
            });
            let result = misbehave(culprit, Some(rewrite), 1 << 20, None);
            if padding || result.is_err() {
                blames(&result, culprit, "noise", |kind| matches!(kind, PeerFault::Malformed(_)));
            }
        }
    }
}

#[test]
fn noise_of_any_length_is_refused() {
    for culprit in Role::ALL {
        let rewrite: Rewrite = Arc::new(|_, mut f| {
            let mut r = Random(f.tag);
            let n = f.payload.len() + 1 + r.below(100);
            f.payload = (0..n).map(|_| r.word() as u8).collect();
            Some(f)
        });
        blames(&misbehave(culprit, Some(rewrite), 1 << 20, None), culprit, "noise", |kind| {
            matches!(kind, PeerFault::Length { .. })
        });
    }
}

#[test]
fn frames_under_other_names_are_not_taken_for_the_right_ones() {
    for culprit in Role::ALL {
        let rewrite: Rewrite = Arc::new(|_, mut f| {
            f.tag ^= 1;
            Some(f)
        });
        let result = misbehave(culprit, Some(rewrite), 1 << 20, None);
        assert!(matches!(result, Err(Error::Peer { kind: PeerFault::Timeout(300), .. })), "{result:?}");
    }
}
