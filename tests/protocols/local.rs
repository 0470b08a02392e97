//! Input, opening, truncation, windows and lifts.

use std::sync::mpsc::channel;

use proptest::prelude::*;
use trefoil::party::Role;
use trefoil::plan::cost::Cost;
use trefoil::protocol::{input, lift, lift::lift, open, truncate::truncate, window::Window};
use trefoil::ring;
use trefoil::session::Scope;
use trefoil::{Error, share::Masked};

use crate::support::{Given, Random, assert_cost, run};

#[test]
fn input_gives_what_the_client_has() {
    for k in [1, 7, 28, 63, 64] {
        let x = Random(1).words(3_000, k);
        let given = Given::even(&x, &[2, 1, 3], k, 0);
        let ran = run(&[2, 1, 3], |s| Ok(vec![given.share(s, "x")?]));
        assert_eq!(ran.only(), x);
        let given = Given::even(&x, &[1], k, 0);
        let ran = run(&[1], |s| Ok(vec![given.share(s, "x")?]));
        assert_cost("input", &ran, &[], input::cost(x.len(), k));
    }
}

#[test]
fn open_tells_the_client() {
    for k in [1, 24, 37, 64] {
        let x = Random(2).words(6_000, k);
        for passes in [vec![1], vec![3, 1, 2]] {
            let given = Given::even(&x, &passes, k, 0);
            let (send, receive) = channel();
            let ran = run(&passes, |s| {
                let x = given.share(s, "x")?;
                open::open(s, &Scope::new("y"), &x, (s.role() == Role::Client).then_some(&send))?;
                Ok(vec![x])
            });
            let opened: Vec<Vec<u64>> = receive.try_iter().collect();
            assert_eq!(opened.len(), passes.len());
            assert_eq!(opened.concat(), x);
            if passes.len() == 1 {
                assert_cost("open", &ran, &[&given], open::cost(x.len(), k));
            }
        }
    }
}

/// The error in units of `2^-t` of the last place, without the ring's wrap.
fn truncation_errors(x: &[u64], got: &[u64], k: u32, t: u32) -> impl Iterator<Item = i64> {
    x.iter().zip(got).map(move |(x, y)| ring::signed((y << t).wrapping_sub(*x), k))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn truncation_errs_by_less_than_one_ulp_and_by_none_on_average(seed: u64, k in 2u32..=64, t in 0u32..40) {
        let t = t.min(k - 1);
        let n = 40_000;
        let x = Random(seed).signed(n, k, k);
        let given = Given::even(&x, &[1, 3], k, t + 3);
        let ran = run(&[1, 3], |s| Ok(vec![truncate(&given.share(s, "x")?, t)?]));
        prop_assert_eq!((ran.k[0], ran.f[0]), (k - t, 3));
        let ulp = 1i64 << t;
        let mut sum = 0.0;
        for e in truncation_errors(&x, ran.only(), k, t) {
            prop_assert!(-ulp < e && e < ulp, "{} of {}", e, ulp);
            sum += e as f64 / ulp as f64;
        }
        // The error's standard deviation is below 1/2 ulp: this is more than five of its mean's.
        prop_assert!((sum / n as f64).abs() < 2.6 / (n as f64).sqrt(), "mean {}", sum / n as f64);
    }

    #[test]
    fn windows_split_exactly(seed: u64, low in 0u32..16, c in 0u32..12, high in 3u32..12) {
        let k = low + c + high;
        let x = Random(seed).words(20_000, k);
        let given = Given::even(&x, &[1, 1], k, 0);
        let ran = run(&[1, 1], |s| {
            let w = Window::of(&given.share(s, "x")?, low, c, high)?;
            Ok(vec![w.hi.integer(high, 0), w.lo.integer(64, 0)])
        });
        for (x, (hi, lo)) in x.iter().zip(ran.values[0].iter().zip(&ran.values[1])) {
            prop_assert!(*lo < (2u64 << c) - 1, "the unreduced low digit");
            let rest = x.wrapping_sub(hi << (low + c)).wrapping_sub(lo << low) & ring::mask(k);
            prop_assert!(rest < (2u64 << low) - 1, "what the dropped bits of both sides add up to");
        }
    }

    #[test]
    fn lifts_are_exact(seed: u64, k in 3u32..64, gap in 1u32..61) {
        let m = (k + gap).min(64);
        let x = Random(seed).signed(30_000, k - 1, k);
        let passes = [1, 2, 3];
        let given = Given::even(&x, &passes, k, 1);
        let ran = run(&passes, |s| {
            let x = given.share(s, "x")?;
            Ok(vec![lift(s, &Scope::layer(2).at("lift"), &x, m)?.finish(s)?])
        });
        prop_assert_eq!((ran.k[0], ran.f[0]), (m, 1));
        let want: Vec<i64> = x.iter().map(|&v| ring::signed(v, k)).collect();
        prop_assert_eq!(ran.signed(0), want);
    }
}

#[test]
fn costs() {
    let x = Random(3).signed(1_003, 20, 28);
    let given = Given::even(&x, &[1], 28, 12);
    let lifted = run(&[1], |s| {
        let x = given.share(s, "x")?;
        Ok(vec![lift(s, &Scope::new("lift"), &x, 61)?.finish(s)?])
    });
    assert_cost("lift 28 to 61, 1003 elements", &lifted, &[&given], lift::cost(x.len(), 28, 61));
    let given = Given::even(&x, &[1], 28, 12);
    let free = run(&[1], |s| {
        let x = given.share(s, "x")?;
        let w = Window::of(&x, 4, 12, 12)?;
        Ok(vec![truncate(&x, 7)?, w.lo.integer(50, 0), lift(s, &Scope::new("lift"), &x, 28)?.finish(s)?])
    });
    assert_cost("truncate, window, lift to the same ring", &free, &[&given], Cost::default());
}

#[test]
fn what_cannot_be_right_is_refused() {
    let given = Given::even(&[1, 2, 3], &[1], 20, 4);
    run(&[1], |s| {
        let x = given.share(s, "x")?;
        let refused = |r: Result<Masked, Error>| assert!(matches!(r, Err(Error::Shape { .. })));
        refused(truncate(&x, 5));
        refused(truncate(&x, 20));
        refused(x.narrow(21));
        refused(Window::of(&x, 4, 4, 8).map(|w| w.lo.integer(8, 0)));
        refused(lift(s, &Scope::new("narrower"), &x, 19).and_then(|p| p.finish(s)));
        Ok(vec![x])
    });
}
