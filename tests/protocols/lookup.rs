//! Table lookups: words and indicators, cyclic and unreduced.

use proptest::prelude::*;
use trefoil::error::Error;
use trefoil::protocol::lookup::{self, Indicator, Table};
use trefoil::protocol::window::Digits;
use trefoil::ring;
use trefoil::session::Scope;

use crate::support::{Given, Random, assert_cost, run};

/// Elements for a table of `2^bits` rows, so that all cases cost about the same.
fn elements(bits: u32) -> usize {
    (1usize << 20 >> bits).clamp(300, 20_000) / 6 * 6
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn words_of_tables(seed: u64, bits in 3u32..=12, low in 0u32..5, k in 1u32..=64, columns in 1usize..4, cyclic: bool) {
        let (mut r, passes, n) = (Random(seed), [1, 3, 2], elements(bits));
        let x = r.words(n, 30);
        let rows = 1usize << bits;
        let entries: Vec<Vec<u64>> =
            (0..columns).map(|_| r.words(if cyclic { rows } else { 2 * rows }, 64)).collect();
        let tables: Vec<Table> =
            entries.iter().map(|e| if cyclic { Table::cyclic(e) } else { Table::unreduced(e) }).collect();
        let f: Vec<u32> = (0..columns as u32).collect();
        let given = Given::even(&x, &passes, 30, 0);
        let ran = run(&passes, |s| {
            let digits = Digits::cut(&given.share(s, "x")?, low, bits)?;
            let mut out = lookup::words(s, &Scope::layer(1).at("t"), &digits, &tables, &f, k)?.finish(s)?;
            out.push(digits.integer(32, 0));
            Ok(out)
        });
        let digits = &ran.values[columns];
        for (j, e) in entries.iter().enumerate() {
            prop_assert_eq!((ran.k[j], ran.f[j]), (k, j as u32));
            let want: Vec<u64> = digits.iter().map(|&d| e[d as usize % e.len()] & ring::mask(k)).collect();
            prop_assert_eq!(&ran.values[j], &want, "column {}", j);
        }
        if low == 0 {
            prop_assert!(digits.iter().zip(&x).all(|(d, x)| d % rows as u64 == x % rows as u64));
        }
    }

    #[test]
    fn indicators(seed: u64, bits in 3u32..=12, k in 1u32..=64, columns in 1usize..=63, cyclic: bool) {
        let (mut r, passes, n) = (Random(seed), [1, 1, 1], elements(bits) / 4 / 3 * 3);
        let x = r.words(n, 25);
        let rows = 1usize << bits;
        let (steps, pattern) = (r.words(columns, 64), r.words(2 * rows, 63));
        let test = |i: usize, j: usize| pattern[i] >> j & 1 == 1;
        let table = if cyclic {
            Indicator::cyclic(rows, &steps, test).unwrap()
        } else {
            Indicator::unreduced(2 * rows, &steps, test).unwrap()
        };
        let given = Given::even(&x, &passes, 25, 0);
        let ran = run(&passes, |s| {
            let digits = Digits::cut(&given.share(s, "x")?, 1, bits)?;
            let bits = lookup::indicator(s, &Scope::new("t"), &digits, &table, 3, k)?.finish(s)?;
            Ok(vec![bits, digits.integer(32, 0)])
        });
        let want: Vec<u64> = ran.values[1]
            .iter()
            .map(|&d| if cyclic { d as usize % rows } else { d as usize })
            .flat_map(|d| steps.iter().enumerate().map(move |(j, step)| if test(d, j) { step & ring::mask(k) } else { 0 }))
            .collect();
        prop_assert_eq!(&ran.values[0], &want);
    }
}

#[test]
fn every_row_of_a_table_is_found() {
    for bits in [3, 8, 12] {
        let rows = 1u64 << bits;
        let (x, table): (Vec<u64>, Vec<u64>) = ((0..rows).collect(), (0..rows).map(|i| i * i + 7).collect());
        let given = Given::even(&x, &[1], bits, 0);
        let ran = run(&[1], |s| {
            let digits = Digits::cut(&given.share(s, "x")?, 0, bits)?;
            lookup::words(s, &Scope::new("t"), &digits, &[Table::cyclic(&table)], &[0], 40)?.finish(s)
        });
        assert_eq!(ran.only(), table);
    }
}

#[test]
fn costs_and_refusals() {
    let (x, entries) = (Random(4).words(999, 20), Random(5).words(256, 64));
    let given = Given::even(&x, &[1], 20, 0);
    let ran = run(&[1], |s| {
        let digits = Digits::cut(&given.share(s, "x")?, 0, 8)?;
        let tables = [Table::cyclic(&entries), Table::cyclic(&entries)];
        lookup::words(s, &Scope::new("t"), &digits, &tables, &[0, 0], 37)?.finish(s)
    });
    assert_cost("lookup of 256 rows, 2 words of 37 bits, 999 elements", &ran, &[&given], lookup::cost(999, 256, 2, 37));

    let given = Given::even(&x, &[1], 20, 0);
    let ran = run(&[1], |s| {
        let digits = Digits::cut(&given.share(s, "x")?, 0, 6)?;
        let table = Indicator::cyclic(64, &[1; 31], |i, j| i > j)?;
        Ok(vec![lookup::indicator(s, &Scope::new("t"), &digits, &table, 0, 11)?.finish(s)?])
    });
    assert_cost(
        "indicator of 64 rows, 31 columns of 11 bits, 999 elements",
        &ran,
        &[&given],
        lookup::cost(999, 64, 31, 11),
    );

    let given = Given::even(&x, &[1], 20, 0);
    run(&[1], |s| {
        let x = given.share(s, "x")?;
        let digits = Digits::cut(&x, 0, 7)?;
        let refused = lookup::words(s, &Scope::new("t"), &digits, &[Table::cyclic(&entries)], &[0], 20);
        assert!(matches!(refused, Err(Error::Shape { .. })), "7 bits do not index 256 rows");
        let refused =
            lookup::words(s, &Scope::new("t"), &Digits::cut(&x, 0, 2)?, &[Table::cyclic(&entries[..4])], &[0], 20);
        assert!(matches!(refused, Err(Error::Shape { .. })), "a query has whole bytes");
        assert!(matches!(Digits::cut(&x, 13, 8), Err(Error::Shape { .. })), "a digit ends with its ring");
        assert!(Indicator::cyclic(8, &[1; 64], |_, _| true).is_err());
        Ok(vec![x])
    });
}
