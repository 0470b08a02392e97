//! Range guards: never a value out of range, always one of the inner range; flags opened per layer and quantity.

use std::sync::mpsc::channel;

use trefoil::error::Error;
use trefoil::party::Role;
use trefoil::protocol::guard::{Counts, RangeFlags, cost, guard, guard_at_once};
use trefoil::ring;
use trefoil::session::Scope;

use crate::support::{Given, Random, assert_cost, run};

/// Values around every boundary of a guard of `b` bits in ring `k`, of every magnitude, and uniform ones.
fn values(r: &mut Random, k: u32, b: u32, signed: bool) -> Vec<u64> {
    let (low, half) = (1i128 << (b - 4), 1i128 << (b - 1));
    let edges = if signed { [-half, half, -half + low, half - low] } else { [0, 2 * half, -low, 2 * half - low] };
    let mut out: Vec<i128> = Vec::new();
    for edge in edges {
        for near in [0, 1, 2, 3, low / 2, low - 1, low, low + 1] {
            // Each value many times: whether a carry comes from below depends on the mask.
            out.extend([edge + near, edge - near].repeat(4));
        }
    }
    for bits in 1..k {
        out.extend([1i128 << bits, -(1i128 << bits), (1i128 << bits) - 1, 0].repeat(2));
    }
    out.extend((0..1_000).map(|_| i128::from(r.word() as i64)));
    out.extend((0..1_000).map(|_| i128::from(r.word() % (2 * half as u64)) - if signed { half } else { 0 }));
    out.into_iter().map(|v| v as u64 & ring::mask(k)).collect()
}

#[test]
fn accepts_the_inner_range_and_nothing_beyond_the_range() {
    let mut r = Random(6);
    // One chunk, two and as many as there can be; even and uneven ones.
    for (k, b) in [(20, 16), (24, 22), (19, 18), (30, 20), (33, 18), (44, 18), (64, 40), (64, 4), (52, 5), (64, 63)] {
        for signed in [true, false] {
            let x = values(&mut r, k, b, signed);
            let given = Given::even(&x, &[1], k, 0);
            let ran = run(&[1], |s| {
                let x = given.share(s, "x")?;
                let counts = guard(s, &Scope::new("g"), &x, b, signed, 16)?.expect("the ring is wider").finish(s)?;
                Ok(match counts {
                    Counts::Direct(m) => vec![m],
                    Counts::Pair(m0, m1) => vec![m0, m1],
                })
            });
            assert_eq!(ran.values.len(), if k - b + 4 <= 8 { 1 } else { 2 });
            assert_cost(
                &format!("guard of {b} in {k} bits, {} values", x.len()),
                &ran,
                &[&given],
                cost(x.len(), k, b, 16),
            );
            let (low, half) = (1i128 << (b - 4), 1i128 << (b - 1));
            let (range, inner) =
                if signed { (-half..half, -half + low..half - low) } else { (-low..2 * half, 0..2 * half - low) };
            let (mut accepted, mut inside) = (0, 0);
            for (i, &x) in x.iter().enumerate() {
                let count: u64 = ran.values.iter().map(|v| v[i]).product();
                assert!(ran.values.iter().all(|v| v[i] <= 8), "what the counters are sized for");
                let v = i128::from(ring::signed(x, k));
                assert!(count != 0 || range.contains(&v), "{v} accepted as {b} bits, signed {signed}");
                assert!(count == 0 || !inner.contains(&v), "{v} refused as {b} bits of {k}, signed {signed}");
                accepted += usize::from(count == 0);
                inside += usize::from(inner.contains(&v));
            }
            assert!(accepted >= inside && inside > 300, "{accepted} {inside}");
        }
    }
}

#[test]
fn nothing_to_guard_and_nothing_to_guard_with() {
    let given = Given::even(&[1, 2, 3], &[1], 12, 0);
    let ran = run(&[1], |s| {
        let x = given.share(s, "x")?;
        assert!(guard(s, &Scope::new("a"), &x, 12, true, 16)?.is_none());
        assert!(guard(s, &Scope::new("b"), &x, 30, false, 16)?.is_none());
        assert!(matches!(guard(s, &Scope::new("c"), &x, 3, true, 16), Err(Error::Shape { .. })));
        let mut flags = RangeFlags::new(3);
        flags.advance(s, &Scope::new("head"))?;
        flags.open(s, &Scope::new("head"), None)?;
        Ok(vec![x])
    });
    assert_cost("no guard", &ran, &[&given], Default::default());
}

/// Which of the five quantities of [`flags_name_layer_and_quantity`] leaves its range in a pass.
const BAD: [Option<usize>; 7] = [None, Some(0), Some(1), None, Some(2), Some(3), Some(4)];

#[test]
fn flags_name_layer_and_quantity() {
    let mut r = Random(12);
    let passes: Vec<usize> = vec![3, 1, 2, 1, 1, 4, 1];
    let tokens: usize = passes.iter().sum();
    // Ring, guarded bits, signed, values per token.
    let plan = [(24, 20, true, 5), (40, 18, true, 3), (64, 30, false, 1), (30, 16, true, 7)];
    let names = [("0", "gate"), ("0", "score"), ("1", "norm"), ("1", "gate"), ("1", "count")];
    let pass_of: Vec<usize> = passes.iter().enumerate().flat_map(|(i, &n)| vec![i; n]).collect();
    let given: Vec<Given> = plan
        .iter()
        .enumerate()
        .map(|(q, &(k, b, signed, width))| {
            let mut x: Vec<u64> = Vec::new();
            for t in 0..tokens {
                let fine =
                    r.signed(width, b - 1, k).into_iter().map(|v| if signed { v } else { v & ring::mask(b - 1) });
                x.extend(fine);
                if BAD[pass_of[t]] == Some(q) {
                    let at = x.len() - 1 - r.below(width);
                    x[at] = 1 << b;
                }
            }
            Given::even(&x, &passes, k, 0)
        })
        .collect();
    let counts: Vec<u64> = pass_of.iter().flat_map(|&p| [0, u64::from(BAD[p] == Some(4)), 0]).collect();
    let count_bits = RangeFlags::new(40).count_bits();
    let counts = Given::even(&counts, &passes, count_bits, 0);
    let (send, receive) = channel();
    run(&passes, |s| {
        let mut flags = RangeFlags::new(40);
        for (i, (given, (_, b, signed, _))) in given.iter().zip(plan).enumerate() {
            let x = given.share(s, &format!("x{i}"))?;
            let g = guard(s, &Scope::new(&format!("g{i}")), &x, b, signed, count_bits)?;
            flags.guard(names[i].0, names[i].1, g);
            // A second guard of the same name falls into the same bit.
            if i == 0 {
                let g = guard(s, &Scope::new("again"), &x, b + 1, signed, count_bits)?;
                flags.guard(names[i].0, names[i].1, g);
            }
        }
        flags.count(names[4].0, names[4].1, counts.share(s, "counts")?);
        let found: Vec<(String, &str)> = flags.names();
        // Guards and counts are named in the order in which they were given.
        assert!(found.iter().map(|(l, q)| (l.as_str(), *q)).eq(names));
        let scope = Scope::new("head");
        flags.advance(s, &scope)?;
        flags.open(s, &scope, (s.role() == Role::Client).then_some(&send))?;
        Ok(vec![])
    });
    let opened: Vec<Vec<u64>> = receive.try_iter().collect();
    assert_eq!(opened.len(), passes.len());
    for (pass, bits) in opened.iter().enumerate() {
        let want: Vec<u64> = (0..5).map(|q| u64::from(BAD[pass] == Some(q))).collect();
        assert_eq!(*bits, want, "pass {pass}");
    }
}

#[test]
fn a_guard_in_one_look_up_accepts_the_same() {
    let mut r = Random(8);
    for (k, b) in [(25, 24), (36, 24), (58, 50), (63, 51)] {
        let x = values(&mut r, k, b, false);
        let given = Given::even(&x, &[1], k, 0);
        let ran = run(&[1], |s| {
            let x = given.share(s, "x")?;
            Ok(vec![guard_at_once(s, &Scope::new("g"), &x, b, 16)?.expect("the ring is wider").finish(s)?])
        });
        let (low, half) = (1i128 << (b - 4), 1i128 << (b - 1));
        let (mut accepted, mut inside) = (0, 0);
        for (&count, &x) in ran.values[0].iter().zip(&x) {
            let v = i128::from(ring::signed(x, k));
            assert!(count <= 1, "opened as it is");
            assert!(count != 0 || (-low..2 * half).contains(&v), "{v} accepted as {b} bits");
            assert!(count == 0 || !(0..2 * half - low).contains(&v), "{v} refused as {b} bits of {k}");
            accepted += usize::from(count == 0);
            inside += usize::from((0..2 * half - low).contains(&v));
        }
        assert!(accepted >= inside && inside > 300, "{accepted} {inside}");
    }
    let x = Given::even(&[1, 2], &[1], 40, 0);
    let refused = |b: u32| {
        let world = trefoil::world::World::seeded(1);
        world.run(crate::support::FIRST, &[1], |s| {
            let x = x.share(s, "x")?;
            guard_at_once(s, &Scope::new("g"), &x, b, 16).map(|_| ())
        })
    };
    assert!(matches!(refused(27), Err(Error::Shape { .. })));
}
