//! Secret products, polynomials, sums of squares and scaling.

use std::sync::Arc;

use proptest::prelude::*;
use trefoil::protocol::polynomial::{self, polynomial};
use trefoil::protocol::product::{self, Elementwise, Scale, Select, product};
use trefoil::protocol::square::{scale, scale_cost, square_cost, square_sum};
use trefoil::ring;
use trefoil::session::Scope;

use crate::support::{Given, Ran, Random, assert_cost, run};

fn elementwise(x: &Given, y: &Given, passes: &[usize]) -> Ran {
    run(passes, |s| {
        let (x, y) = (x.share(s, "x")?, y.share(s, "y")?);
        Ok(vec![product(s, &Scope::new("xy"), &x, &y, Arc::new(Elementwise))?.finish(s)?])
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(6))]

    #[test]
    fn elementwise_products(seed: u64, kx in 1u32..=64, ky in 1u32..=64) {
        let (mut r, passes) = (Random(seed), [1, 4, 3]);
        let widths: Vec<usize> = (0..8).map(|_| r.below(2_000)).collect();
        let n = widths.iter().sum();
        let (x, y) = (r.words(n, kx), r.words(n, ky));
        let (gx, gy) = (Given::ragged(&x, &passes, &widths, kx, 3), Given::ragged(&y, &passes, &widths, ky, 4));
        let ran = elementwise(&gx, &gy, &passes);
        let k = kx.min(ky);
        prop_assert_eq!((ran.k[0], ran.f[0]), (k, 7));
        let want: Vec<u64> = x.iter().zip(&y).map(|(a, b)| a.wrapping_mul(*b) & ring::mask(k)).collect();
        prop_assert_eq!(ran.only(), want);
    }

    #[test]
    fn groups_times_one(seed: u64, k in 1u32..=64, width in 1usize..40) {
        let (mut r, passes) = (Random(seed), [2, 1]);
        let widths: Vec<usize> = (0..3).map(|_| 1 + r.below(100)).collect();
        let n = widths.iter().sum::<usize>();
        let (x, y) = (r.words(n * width, k), r.words(n, k));
        let wide: Vec<usize> = widths.iter().map(|w| w * width).collect();
        let (gx, gy) = (Given::ragged(&x, &passes, &wide, k, 0), Given::ragged(&y, &passes, &widths, k, 0));
        let ran = run(&passes, |s| {
            let (x, y) = (gx.share(s, "x")?, gy.share(s, "y")?);
            Ok(vec![product(s, &Scope::new("xy"), &x, &y, Arc::new(Scale { width }))?.finish(s)?])
        });
        let want: Vec<u64> = (0..n * width).map(|i| x[i].wrapping_mul(y[i / width]) & ring::mask(k)).collect();
        prop_assert_eq!(ran.only(), want);
    }

    #[test]
    fn selections(seed: u64, k in 2u32..=64, group in 1usize..9, columns in 1usize..4) {
        let (mut r, passes) = (Random(seed), [1, 2]);
        let groups = 1 + r.below(300);
        let hot: Vec<usize> = (0..3 * groups).map(|_| r.below(group)).collect();
        let x: Vec<u64> = hot.iter().flat_map(|&h| (0..group).map(move |i| u64::from(i == h))).collect();
        let y = r.words(x.len() * columns, k);
        let (gx, gy) = (Given::even(&x, &passes, k, 0), Given::even(&y, &passes, k, 9));
        let ran = run(&passes, |s| {
            let (x, y) = (gx.share(s, "x")?, gy.share(s, "y")?);
            Ok(vec![product(s, &Scope::new("xy"), &x, &y, Arc::new(Select { group, columns }))?.finish(s)?])
        });
        let want: Vec<u64> =
            (0..3 * groups * columns).map(|i| y[(i / columns * columns + i % columns) * group + hot[i / columns]]).collect();
        prop_assert_eq!(ran.only(), want);
    }

    #[test]
    fn polynomials(seed: u64, count in 1usize..5, degree in 1usize..5) {
        let (mut r, passes, n) = (Random(seed), [2, 3], 1_000);
        // Operands may repeat within a monomial and monomials within the sum.
        let monomials: Vec<Vec<usize>> =
            (0..count).map(|i| (0..if i == 0 { degree } else { 1 + r.below(4) }).map(|_| r.below(4)).collect()).collect();
        let k: Vec<u32> = (0..4).map(|_| 20 + r.below(45) as u32).collect();
        let x: Vec<Vec<u64>> = k.iter().map(|&k| r.words(n * 5, k)).collect();
        let given: Vec<Given> = x.iter().zip(&k).map(|(x, &k)| Given::even(x, &passes, k, 0)).collect();
        let parts: Vec<&[usize]> = monomials.iter().map(Vec::as_slice).collect();
        let ran = run(&passes, |s| {
            let x = given.iter().enumerate().map(|(i, g)| g.share(s, &format!("x{i}"))).collect::<Result<Vec<_>, _>>()?;
            let x: Vec<_> = x.iter().collect();
            Ok(vec![polynomial(s, &Scope::new("p"), &x, &parts)?.finish(s)?])
        });
        let m = ring::mask(*k.iter().min().unwrap());
        for (i, &got) in ran.only().iter().enumerate() {
            let want = monomials.iter().fold(0u64, |sum, mono| {
                sum.wrapping_add(mono.iter().fold(1u64, |p, &j| p.wrapping_mul(x[j][i])))
            });
            prop_assert_eq!(got, want & m, "{:?}", &monomials);
        }
    }

    #[test]
    fn squares_and_scaling_lift(seed: u64, k in 3u32..=61, group in 1usize..50) {
        let (mut r, passes) = (Random(seed), [1, 2, 1]);
        let groups: Vec<usize> = (0..4).map(|_| 1 + r.below(40)).collect();
        let n = groups.iter().sum::<usize>();
        let x = r.signed(n * group, k - 1, k);
        let g = r.words(n, 64);
        let widths: Vec<usize> = groups.iter().map(|w| w * group).collect();
        let (gx, gg) = (Given::ragged(&x, &passes, &widths, k, 5), Given::ragged(&g, &passes, &groups, 64, 6));
        // Scaling takes groups of its own, those of `g`: an element has the same `g` here as in its sum of squares.
        let ran = run(&passes, |s| {
            let (x, g) = (gx.share(s, "x")?, gg.share(s, "g")?);
            let (sum, lifted) = square_sum(s, &Scope::new("norm"), &x, group)?;
            let sum = sum.finish(s)?;
            Ok(vec![sum, scale(s, &Scope::new("norm"), lifted, &g)?.finish(s)?])
        });
        prop_assert_eq!((&ran.k[..], &ran.f[..]), (&[64, 64][..], &[10, 11][..]));
        let x: Vec<u64> = x.iter().map(|&v| ring::signed(v, k) as u64).collect();
        let sums: Vec<u64> = x.chunks(group).map(|c| c.iter().fold(0u64, |a, v| a.wrapping_add(v.wrapping_mul(*v)))).collect();
        let scaled: Vec<u64> = (0..x.len()).map(|i| x[i].wrapping_mul(g[i / group])).collect();
        prop_assert_eq!(&ran.values[0], &sums);
        prop_assert_eq!(&ran.values[1], &scaled);
    }
}

#[test]
fn a_polynomial_without_cross_terms_sends_nothing() {
    let x = Random(1).words(100, 30);
    let given = Given::even(&x, &[1], 30, 0);
    let ran = run(&[1], |s| {
        let x = given.share(s, "x")?;
        Ok(vec![polynomial(s, &Scope::new("p"), &[&x, &x], &[&[0], &[1], &[0]])?.finish(s)?])
    });
    assert_eq!(ran.only(), x.iter().map(|v| (3 * v) & ring::mask(30)).collect::<Vec<_>>());
    assert_cost("a sum", &ran, &[&given], Default::default());
}

#[test]
fn costs() {
    let (mut r, n, one) = (Random(9), 1_001, [1]);
    let given = |v: &[u64], k| Given::even(v, &one, k, 0);
    let (x, y) = (given(&r.words(n, 44), 44), given(&r.words(n, 44), 44));
    assert_cost("product, 1001 elements of 44 bits", &elementwise(&x, &y, &one), &[&x, &y], product::cost(n, n, n, 44));

    let (u, a, b) = (given(&r.words(n, 44), 44), given(&r.words(n, 44), 44), given(&r.words(n, 44), 44));
    let line: [&[usize]; 2] = [&[0, 1], &[0, 2, 0]];
    let ran = run(&one, |s| {
        let (u, a, b) = (u.share(s, "u")?, a.share(s, "a")?, b.share(s, "b")?);
        Ok(vec![polynomial(s, &Scope::new("p"), &[&u, &a, &b], &line)?.finish(s)?])
    });
    let cost = polynomial::cost(n, polynomial::cofactors(&line), 44);
    assert_cost("polynomial u a + u b u, 1001 elements of 44 bits", &ran, &[&u, &a, &b], cost);

    let (x, g) = (given(&r.signed(n, 29, 30), 30), given(&r.words(7, 64), 64));
    let ran = run(&one, |s| {
        let (x, g) = (x.share(s, "x")?, g.share(s, "g")?);
        let (sum, lifted) = square_sum(s, &Scope::new("norm"), &x, n / 7)?;
        let sum = sum.finish(s)?;
        Ok(vec![sum, scale(s, &Scope::new("norm"), lifted, &g)?.finish(s)?])
    });
    let cost = square_cost(n, 7, 30).then(scale_cost(n, 7, 30));
    assert_cost("squares and scale, 1001 elements of 30 bits in 7 groups", &ran, &[&x, &g], cost);
}
