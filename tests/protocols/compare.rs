//! Signs, argmax and sampling.

use proptest::prelude::*;
use trefoil::plan::{Radices, Setting};
use trefoil::protocol::argmax::{self, argmax};
use trefoil::protocol::compare::{self, is_negative};
use trefoil::protocol::gumbel::{CLIP, Gumbel};
use trefoil::protocol::relu::{self, positive_part};
use trefoil::ring;
use trefoil::session::Scope;

use crate::support::{FIRST, Given, Ran, Random, assert_cost, run};

fn signs(x: &[u64], ring_bits: u32, k: u32, passes: &[usize]) -> (Ran, Given) {
    let given = Given::even(x, passes, ring_bits, 5);
    let ran = run(passes, |s| {
        let x = given.share(s, "x")?;
        Ok(vec![is_negative(s, &Scope::layer(3).at("sign"), &x, k)?.finish(s)?])
    });
    let want: Vec<u64> = x.iter().map(|&v| u64::from(ring::signed(v, ring_bits) < 0)).collect();
    assert_eq!(ran.only(), want, "signs of {ring_bits} bits in ring {k}");
    (ran, given)
}

#[test]
fn signs_of_the_whole_small_ring() {
    // Every value with many masks.
    let x: Vec<u64> = (0..256).cycle().take(256 * 60).collect();
    for k in [1, 8, 64] {
        signs(&x, 8, k, &[2, 1]);
    }
}

#[test]
fn signs_of_larger_rings() {
    for bits in [12, 16, 20, 24] {
        let mut r = Random(u64::from(bits));
        let half = 1u64 << (bits - 1);
        let mut x: Vec<u64> = [0, 1, half - 1, half, half + 1, 2 * half - 1].repeat(200);
        for nibble in 0..bits / 4 {
            // All patterns of a chunk between chunks of zeros and of ones: every way a carry can go.
            x.extend((0..16).flat_map(|v| [v << (4 * nibble), (v << (4 * nibble)) ^ (2 * half - 1)]).cycle().take(640));
        }
        x.extend(r.words(20_000 - x.len() % 5, bits));
        x.truncate(x.len() / 5 * 5);
        signs(&x, bits, 1 + r.below(64) as u32, &[1, 3, 1]);
        let (ran, given) = signs(&x[..1001], bits, 33, &[1]);
        let name = format!("compare of {bits} bits into 33, 1001 values");
        assert_cost(&name, &ran, &[&given], compare::cost(1001, bits as usize / 4, 33));
        assert_eq!(ran.depth, 5);
    }
}

/// Every value of a small ring, and the edges of the larger ones: no half of the ring is out of bounds.
#[test]
fn positive_parts_of_the_whole_ring() {
    for (bits, k) in [(8, 20), (16, 45), (20, 64)] {
        let half = 1u64 << (bits - 1);
        let mut r = Random(u64::from(bits));
        let mut x: Vec<u64> = if bits == 8 {
            (0..256).cycle().take(256 * 40).collect()
        } else {
            [0, 1, half / 2 - 1, half / 2, half / 2 + 1, half - 1, half, half + half / 2, 2 * half - 1].repeat(300)
        };
        x.extend(r.words(3000, bits));
        x.truncate(x.len() / 4 * 4);
        let passes = [1, 2, 1];
        let given = Given::even(&x, &passes, bits, 5);
        let ran = run(&passes, |s| {
            let x = given.share(s, "x")?;
            Ok(vec![positive_part(s, &Scope::layer(3).at("relu"), &x, k)?.finish(s)?])
        });
        let want: Vec<u64> = x.iter().map(|&v| ring::signed(v, bits).max(0) as u64).collect();
        assert_eq!(ran.only(), want, "{bits} bits into {k}");
        let given = Given::even(&x[..501], &[1], bits, 5);
        let ran = run(&[1], |s| {
            let x = given.share(s, "x")?;
            Ok(vec![positive_part(s, &Scope::layer(3).at("relu"), &x, k)?.finish(s)?])
        });
        let name = format!("positive parts of {bits} bits into {k}, 501 values");
        assert_cost(&name, &ran, &[&given], relu::cost(501, bits, k));
    }
}

fn first_max(x: &[u64], k: u32) -> u64 {
    let best = x.iter().map(|&v| ring::signed(v, k)).max().unwrap();
    x.iter().position(|&v| ring::signed(v, k) == best).unwrap() as u64
}

fn largest(x: &[u64], n: usize, k: u32, radices: &[usize], passes: &[usize]) -> (Ran, Given) {
    let given = Given::even(x, passes, k, 7);
    let ran = run(passes, |s| {
        let x = given.share(s, "x")?;
        Ok(vec![argmax(s, &Scope::new("head"), &x, radices, &mut |_| Ok(()))?])
    });
    let want: Vec<u64> = x.chunks(n).map(|x| first_max(x, k)).collect();
    assert_eq!(ran.only(), want, "argmax of {n} at radices {radices:?}, {k} bits");
    assert_eq!(ran.k[0], argmax::INDEX_BITS);
    (ran, given)
}

#[test]
fn argmax_of_every_size() {
    let mut r = Random(4);
    for radices in [&[2][..], &[4], &[8], &[3, 5, 12], &[12, 2]] {
        for n in [1, 2, 3, 7, 8, 9, 17, 64, 65, 300] {
            let k = 6 + r.below(18) as u32;
            // From few distinct values (ties) to all of the range; the edges are among them.
            let spread = 2 + r.below(k as usize - 3) as u32;
            let x = r.signed(n * 4, spread, k);
            largest(&x, n, k, radices, &[2, 1, 1]);
        }
    }
}

#[test]
fn ties_go_to_the_lower_index() {
    for radix in 2..=argmax::MOST_RADIX {
        let n = 2 * radix * radix + 1;
        let mut x = vec![ring::mask(18); 3 * n];
        // All equal; equal in the first and the last group; the last alone.
        (x[n + 1], x[2 * n - 1], x[3 * n - 1]) = (9, 9, 9);
        let (ran, _) = largest(&x, n, 18, &[radix], &[3]);
        assert_eq!(ran.only(), [0, 1, n as u64 - 1]);
    }
}

#[test]
fn argmax_of_a_vocabulary_and_its_cost() {
    let fastest = Radices::fastest(2048, 19, &Setting::default());
    for (n, radices) in [(2048, &[4][..]), (2048, &[8]), (1000, &[2]), (2048, fastest.each()), (300, &[3, 12])] {
        let x = Random(n as u64).signed(n, 18, 19);
        let (ran, given) = largest(&x, n, 19, radices, &[1]);
        assert_eq!(ran.depth, 1 + 2 + 8 * argmax::depth(n, radices));
        assert_cost(
            &format!("argmax of {n} at radices {radices:?}, 19 bits"),
            &ran,
            &[&given],
            argmax::cost(n, 19, radices),
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    #[test]
    fn argmax_of_anything(seed: u64, n in 1usize..200, k in 3u32..=23, radices in prop::collection::vec(2usize..=argmax::MOST_RADIX, 1..4)) {
        let mut r = Random(seed);
        let spread = 2 + r.below(k as usize - 2) as u32;
        let x = r.signed(n * 3, spread, k);
        largest(&x, n, k, &radices, &[1, 2]);
    }
}

#[test]
fn noise_is_added_by_the_owner_only_and_within_its_clip() {
    let (k, f, n, temperature) = (22, 12, 20_000, 0.7);
    let x = Random(1).signed(n, 16, k);
    let given = Given::even(&x, &[1], k, f);
    let ran = run(&[1], |s| {
        let x = given.share(s, "x")?;
        Ok(vec![Gumbel::new(3, temperature).add(x.clone()), Gumbel::new(3, 0.0).add(x)])
    });
    assert_eq!(ran.values[1], x, "no noise at temperature 0");
    assert_cost("gumbel", &ran, &[&given], Default::default());
    let noise: Vec<f64> = ran.values[0]
        .iter()
        .zip(&x)
        .map(|(y, x)| ring::fixed::decode(y.wrapping_sub(*x), f, k) / temperature)
        .collect();
    assert!(noise.iter().all(|g| (-CLIP.ln() - 0.01..=CLIP + 0.01).contains(g)));
    let mean = noise.iter().sum::<f64>() / n as f64;
    assert!((mean - 0.577_215_66).abs() < 0.05, "mean {mean} is Euler's constant");
}

#[test]
fn argmax_of_noisy_logits_samples_softmax() {
    let (k, f, tokens) = (20, 12, 20_000);
    let logits = [0.5, -1.0, 1.25];
    let x: Vec<u64> = (0..tokens).flat_map(|_| logits.map(|v| ring::fixed::encode(v, f, k))).collect();
    let given = Given::even(&x, &[tokens], k, f);
    let ran = run(&[tokens], |s| {
        let pass = s.passes()[0].number - FIRST;
        let x = Gumbel::new(11 + pass, 1.0).add(given.share(s, "x")?);
        Ok(vec![argmax(s, &Scope::new("head"), &x, &[4], &mut |_| Ok(()))?])
    });
    let sum: f64 = logits.iter().map(|v: &f64| v.exp()).sum();
    for (i, v) in logits.iter().enumerate() {
        let share = ran.only().iter().filter(|&&w| w == i as u64).count() as f64 / tokens as f64;
        // More than four standard deviations.
        assert!((share - v.exp() / sum).abs() < 0.015, "{i}: {share}");
    }
}
