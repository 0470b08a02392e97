//! Functions composed of windows, lookups and one exchange: exponentials and functions of a positive value. Exact arithmetic
//! is out of reach here, so results are held to the error that the tables state, beside what rounding does.

use proptest::prelude::*;
use trefoil::approx::{PositiveTable, exp_tables};
use trefoil::protocol::exp::{Exp, exp};
use trefoil::protocol::normalise;
use trefoil::protocol::positive::{self, Positive};
use trefoil::ring;
use trefoil::session::Scope;

use crate::support::{Given, Random, assert_cost, run};

#[test]
fn exponentials() {
    let (f, k, f_out) = (12, 40, 16);
    for (lo_bits, hi_bits) in [(12, 7), (10, 9), (13, 5), (12, 3)] {
        let width = lo_bits + hi_bits;
        let tables = exp_tables(f, lo_bits, hi_bits, 1.0);
        let mut r = Random(u64::from(width));
        let (from, to) = [tables.min_x, 1.0].map(|v| (v * f64::from(1 << f)) as i64).into();
        let values: Vec<i64> =
            (0..20_000).map(|i| from + i64::from(i > 0) * (r.word() % (to - from) as u64) as i64).collect();
        // The window ends shortly above the top, so the lowest values wrap around the sign.
        let x: Vec<u64> = values.iter().map(|&v| v as u64 & ring::mask(width)).collect();
        let (given, e) = (Given::even(&x, &[1], width, f), Exp::new(&tables, k, f_out));
        let ran = run(&[1], |s| {
            let x = given.share(s, "x")?;
            Ok(vec![exp(s, &Scope::new("exp"), &x, &e)?.finish(s)?])
        });
        assert_eq!((ran.k[0], ran.f[0]), (k, f_out));
        for (y, &v) in ran.signed(0).into_iter().zip(&values) {
            let x = v as f64 / f64::from(1 << f);
            let want = x.exp();
            let got = y as f64 / f64::from(1 << f_out);
            // Factors of 11 and rows of 16 fraction bits, halves of a unit each, and the result's own last place.
            let factor = want * (-12f64).exp2();
            let row = (f64::from(1 << lo_bits) / f64::from(1 << f)).exp() * (-17f64).exp2();
            let bound = factor + row + (-f64::from(f_out)).exp2();
            assert!((got - want).abs() <= 1.01 * bound, "e^{x} gave {got} for {want}");
        }
        assert_cost(&format!("exp, window {lo_bits} + {hi_bits}, 20000 values"), &ran, &[&given], e.cost(x.len()));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4))]

    #[test]
    fn functions_of_a_positive_value(seed: u64, bits in 20u32..44, window in 8u32..11, root: bool, alone: bool) {
        let gain = if root { f64::from(bits / 2).exp2() } else { f64::from(bits).exp2() };
        let function = |v: f64| if root { gain / v.sqrt() } else { gain / v };
        let fit = |alone| if alone { PositiveTable::fit_alone(function, bits, window) } else { PositiveTable::fit(function, bits, window) };
        let table = fit(alone);
        let (min, max, error) = (table.min_value, table.max_value, table.max_rel_error);
        let (mut r, f, k, passes) = (Random(seed), 18, 64, [2, 2]);
        let mut x = vec![min, max, min + 1, max - 1, 0, 1, 2, min - 1];
        x.extend((0..4_000).map(|_| (r.word() % max).max(1) >> r.below(bits as usize)));
        let given = Given::even(&x, &passes, k, 0);
        let p = Positive::new(table, f);
        let ran = run(&passes, |s| {
            let v = given.share(s, "v")?;
            let scope = Scope::new("f");
            let out = positive::start(s, &scope, &v, &p)?.evaluate(s, &scope, Some(24))?;
            let value = out.value.finish(s)?;
            Ok(vec![value, out.faults.expect("they are counted").finish(s)?])
        });
        let values = ran.signed(0);
        for (i, &v) in x.iter().enumerate() {
            let (got, want) = (values[i] as f64 / f64::from(1 << f), function(v as f64));
            // `a` and `b lo`, lo below 2^7, are rounded to half a unit.
            let bound = want * error + 66.0 / f64::from(1 << f);
            let fault = ran.values[1][i] != 0;
            prop_assert!(!(fault && v >= min), "{} is no fault from {}", v, min);
            prop_assert!(fault || v == 0 || (got - want).abs() <= bound, "f({}) = {} gave {}", v, want, got);
        }
    }
}

#[test]
fn cost_of_a_function_of_a_positive_value() {
    let x: Vec<u64> = (1..1_000).map(|i| i << 19).collect();
    let tables = [PositiveTable::reciprocal(30, 9, 1e9), PositiveTable::rsqrt_alone(30, 9, 1e9, 0.0, 1.0)];
    for (table, count) in tables.into_iter().flat_map(|t| [(t.clone(), None), (t, Some(24))]) {
        let p = Positive::new(table, 18);
        let given = Given::even(&x, &[1], 64, 0);
        let ran = run(&[1], |s| {
            let (v, scope) = (given.share(s, "v")?, Scope::new("f"));
            let out = positive::start(s, &scope, &v, &p)?.evaluate(s, &scope, count)?;
            let value = out.value.finish(s)?;
            if let Some(faults) = out.faults {
                faults.finish(s)?;
            }
            Ok(vec![value])
        });
        let name = format!("reciprocal of 30 bits, 999 values, faults {count:?}");
        assert_cost(&name, &ran, &[&given], p.cost(x.len(), count));
    }
}

#[test]
fn vectors_times_a_function_of_a_positive_value() {
    let (f, width, bits) = (20, 5, 34);
    let gain = f64::from(bits / 2).exp2();
    let function = |v: f64| gain / v.sqrt();
    let table = PositiveTable::fit_alone(function, bits, 12);
    let (min, max, error) = (table.min_value, table.max_value, table.max_rel_error);
    let p = Positive::new(table, f);
    let mut r = Random(11);
    let mut v = vec![min, max, min + 1, max - 1, 1, min - 1];
    v.extend((0..54).map(|_| (r.word() % max).max(1) >> r.below(6)));
    let x = r.signed(v.len() * width, 25, 64);
    for passes in [&[2, 1, 3][..], &[1]] {
        let (of, given) = (Given::even(&v, passes, 64, 0), Given::even(&x, passes, 64, 3));
        let ran = run(passes, |s| {
            let (v, x) = (of.share(s, "v")?, given.share(s, "x")?);
            let n = positive::normalise(s, &Scope::new("n"), &v, &x, &p)?.finish(s)?;
            Ok(vec![n.y, n.column])
        });
        assert_eq!((ran.k[0], ran.f[0]), (64, f + 3));
        for (i, (y, &x)) in ran.signed(0).into_iter().zip(&x).enumerate() {
            let v = v[i / width];
            let fault = ran.values[1][i / width] != 0;
            assert!(!(fault && v >= min) && (fault || v > min / 2), "{v} of {min}");
            let (got, x) = (y as f64 / f64::from(1 << f), ring::signed(x, 64) as f64);
            let bound = x.abs() * (function(v as f64) * error + 66.0 / f64::from(1 << f));
            assert!(fault || (got - x * function(v as f64)).abs() <= bound, "{x} f({v}) gave {got}");
        }
        if passes == [1] {
            let cost = normalise::cost(v.len(), width, 1 << 12);
            assert_cost("60 vectors of 5, window 12", &ran, &[&of, &given], cost);
        }
    }
}
