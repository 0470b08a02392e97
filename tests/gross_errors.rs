//! Ten million truncations, lifts, signs, lookups and windows through the three-party protocol: no gross error. A wrap with
//! a probability of one in a million would show here; in a model it would show as a wrong word.

#[allow(unused)]
#[path = "support/mod.rs"]
mod support;

use support::{Given, Random, run};
use trefoil::protocol::compare::is_negative;
use trefoil::protocol::lift::lift;
use trefoil::protocol::lookup::{self, Table};
use trefoil::protocol::truncate::truncate;
use trefoil::protocol::window::{Digits, Window};
use trefoil::ring;
use trefoil::session::Scope;

/// Elements per run, and runs.
const CHUNK: usize = 1 << 20;
const CHUNKS: u64 = 10;

/// Two passes, so that the holders' batch and the Owner's passes differ.
const PASSES: [usize; 2] = [1, 1];

#[test]
fn truncations_err_by_less_than_one_ulp() {
    let mut sum = 0.0;
    for chunk in 0..CHUNKS {
        // All of the ring: truncation promises nothing less. Widths from those of scores to the widest.
        let (k, t) = [(64, 20), (52, 12), (44, 12), (28, 8), (19, 7)][chunk as usize % 5];
        let x = Random(chunk).signed(CHUNK, k, k);
        let given = Given::even(&x, &PASSES, k, t);
        let ran = run(&PASSES, |s| Ok(vec![truncate(&given.share(s, "x")?, t)?]));
        let ulp = 1i64 << t;
        for (x, y) in x.iter().zip(ran.only()) {
            let e = ring::signed((y << t).wrapping_sub(*x), k);
            assert!(-ulp < e && e < ulp, "{x:x} to {y:x} in {k} bits");
            sum += e as f64 / ulp as f64;
        }
    }
    // The standard deviation of one error is 0.41 ulp: five times that of the mean.
    let n = CHUNKS as f64 * CHUNK as f64;
    assert!((sum / n).abs() < 2.1 / n.sqrt(), "mean {} ulp", sum / n);
}

#[test]
fn lifts_are_exact() {
    for chunk in 0..CHUNKS {
        let (k, m) = [(28, 64), (18, 44), (44, 64), (52, 64), (3, 64)][chunk as usize % 5];
        let x = Random(100 + chunk).signed(CHUNK, k - 1, k);
        let given = Given::even(&x, &PASSES, k, 0);
        let ran = run(&PASSES, |s| {
            let x = given.share(s, "x")?;
            Ok(vec![lift(s, &Scope::new("lift"), &x, m)?.finish(s)?])
        });
        let want = x.iter().map(|&v| ring::signed(v, k) as u64 & ring::mask(m));
        assert!(ran.only().iter().copied().eq(want), "{k} to {m} bits");
    }
}

#[test]
fn signs_are_exact() {
    for chunk in 0..CHUNKS {
        let k = [16, 20, 12, 24, 16][chunk as usize % 5];
        // Half of them near zero, where carries run through all chunks.
        let mut r = Random(200 + chunk);
        let mut x = r.words(CHUNK / 2, k);
        x.extend(r.signed(CHUNK / 2, 5, k));
        let given = Given::even(&x, &PASSES, k, 0);
        let ran = run(&PASSES, |s| {
            let x = given.share(s, "x")?;
            Ok(vec![is_negative(s, &Scope::new("sign"), &x, 64)?.finish(s)?])
        });
        assert!(ran.only().iter().copied().eq(x.iter().map(|v| v >> (k - 1))), "{k} bits");
    }
}

#[test]
fn lookups_are_exact() {
    for chunk in 0..CHUNKS {
        let bits = [8, 4, 6, 9, 8][chunk as usize % 5];
        let mut r = Random(300 + chunk);
        let (x, entries) = (r.words(CHUNK, bits), r.words(1 << bits, 64));
        let given = Given::even(&x, &PASSES, bits, 0);
        let table = Table::cyclic(&entries);
        let ran = run(&PASSES, |s| {
            let digits = Digits::cut(&given.share(s, "x")?, 0, bits)?;
            lookup::words(s, &Scope::new("t"), &digits, std::slice::from_ref(&table), &[0], 44)?.finish(s)
        });
        let want = x.iter().map(|&v| entries[v as usize] & ring::mask(44));
        assert!(ran.only().iter().copied().eq(want), "{bits} bits");
    }
}

#[test]
fn windows_are_exact() {
    for chunk in 0..CHUNKS {
        let (low, c, high) = [(0, 9, 9), (5, 7, 10), (0, 8, 8), (12, 4, 3), (0, 20, 12)][chunk as usize % 5];
        let k = low + c + high;
        let x = Random(400 + chunk).words(CHUNK, k);
        let given = Given::even(&x, &PASSES, k, 0);
        let ran = run(&PASSES, |s| {
            let w = Window::of(&given.share(s, "x")?, low, c, high)?;
            Ok(vec![w.hi.integer(high, 0), w.lo.integer(64, 0)])
        });
        for (x, (hi, lo)) in x.iter().zip(ran.values[0].iter().zip(&ran.values[1])) {
            let rest = x.wrapping_sub(hi << (low + c)).wrapping_sub(lo << low) & ring::mask(k);
            assert!(*lo < (2u64 << c) - 1 && rest < (2u64 << low) - 1, "{x:x} into {hi:x} and {lo:x}");
        }
    }
}
