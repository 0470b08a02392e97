//! Products with cached keys and values, and the thermometer maximum.

use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use trefoil::plan::cost::Cost;
use trefoil::protocol::cached::{self, Cached, Context, Scores, product_cached};
use trefoil::protocol::last_tokens;
use trefoil::protocol::thermometer::{self, Thermometer, reference, subtract};
use trefoil::ring;
use trefoil::session::Scope;

use crate::support::{FIRST, Given, Ran, Random, assert_cost, run, run_in, world};

const HEADS: usize = 6;
const KV_HEADS: usize = 2;
const DIM: usize = 16;
const WIDTH: usize = KV_HEADS * DIM;
const K: u32 = 45;

/// What the three parties keep from pass to pass; a lock each, because the Owner waits for the others while it holds its.
type Caches = [Mutex<Option<Cached>>; 3];

fn caches() -> Caches {
    std::array::from_fn(|_| Mutex::new(Some(Cached::new(WIDTH, K, 3, 64))))
}

struct Step<'a> {
    first: u64,
    passes: &'a [usize],
    /// Positions cached before.
    from: usize,
}

/// Queries, keys, weights and values of all positions.
struct Attention {
    q: Vec<u64>,
    k: Vec<u64>,
    p: Vec<Vec<u64>>,
    v: Vec<u64>,
}

impl Attention {
    fn new(r: &mut Random, positions: usize) -> Attention {
        let (q, k, v) =
            (r.words(positions * HEADS * DIM, K), r.words(positions * WIDTH, K), r.words(positions * WIDTH, K));
        Attention { q, k, v, p: (0..positions).map(|i| r.words(HEADS * (i + 1), K)).collect() }
    }

    /// Both products for the positions of a step, at parties that keep `keys` and `values`.
    fn run(&self, world: &trefoil::world::World, step: &Step<'_>, keys: &Caches, values: &Caches) -> Ran {
        let tokens: usize = step.passes.iter().sum();
        let at = step.from..step.from + tokens;
        let even =
            |v: &[u64], n: usize| Given::even(&v[at.start * n..at.end * n], step.passes, K, 3).starting_at(step.first);
        let (q, k, v) = (even(&self.q, HEADS * DIM), even(&self.k, WIDTH), even(&self.v, WIDTH));
        let widths: Vec<usize> = at.clone().map(|i| HEADS * (i + 1)).collect();
        let p = Given::ragged(&self.p[at.clone()].concat(), step.passes, &widths, K, 3).starting_at(step.first);
        run_in(world, step.first, step.passes, |s| {
            let (q, k, p, v) = (q.share(s, "q")?, k.share(s, "k")?, p.share(s, "p")?, v.share(s, "v")?);
            let (mut keys, mut values) =
                (keys[s.role().index()].lock().unwrap(), values[s.role().index()].lock().unwrap());
            let (keys, values) = (keys.as_mut().unwrap(), values.as_mut().unwrap());
            let scores = Arc::new(Scores { heads: HEADS, kv_heads: KV_HEADS, dim: DIM, all: None });
            let context = Arc::new(Context { heads: HEADS, kv_heads: KV_HEADS, dim: DIM, all: None });
            let qk = product_cached(s, &Scope::layer(0).at("qk"), &q, &k, keys, scores)?;
            let pv = product_cached(s, &Scope::layer(0).at("pv"), &p, &v, values, context)?;
            Ok(vec![qk.finish(s)?, pv.finish(s)?])
        })
    }

    fn key(&self, of: &[u64], position: usize, head: usize, i: usize) -> u64 {
        of[position * WIDTH + head / (HEADS / KV_HEADS) * DIM + i]
    }

    /// `q k^T` and `p v` of one position, by the definition.
    fn want(&self, at: usize) -> (Vec<u64>, Vec<u64>) {
        let (m, mut qk, mut pv) = (ring::mask(K), Vec::new(), Vec::new());
        for h in 0..HEADS {
            for j in 0..=at {
                let q = &self.q[(at * HEADS + h) * DIM..][..DIM];
                let dot = q
                    .iter()
                    .enumerate()
                    .fold(0u64, |a, (i, q)| a.wrapping_add(q.wrapping_mul(self.key(&self.k, j, h, i))));
                qk.push(dot & m);
            }
            for i in 0..DIM {
                let dot = (0..=at).fold(0u64, |a, j| {
                    a.wrapping_add(self.p[at][h * (at + 1) + j].wrapping_mul(self.key(&self.v, j, h, i)))
                });
                pv.push(dot & m);
            }
        }
        (qk, pv)
    }
}

#[test]
fn a_prefill_and_decode_passes_over_several_runs() {
    let attention = Attention::new(&mut Random(3), 14);
    let (world, keys, values) = (world(), caches(), caches());
    // A prefill with three batched decode passes; passes of one and of several tokens; one more.
    let steps = [
        Step { first: FIRST, passes: &[6, 1, 1, 1], from: 0 },
        Step { first: FIRST + 10, passes: &[1, 3], from: 9 },
        Step { first: FIRST + 12, passes: &[1], from: 13 },
    ];
    for step in steps {
        let ran = attention.run(&world, &step, &keys, &values);
        let tokens: usize = step.passes.iter().sum();
        let (qk, pv): (Vec<_>, Vec<_>) = (step.from..step.from + tokens).map(|i| attention.want(i)).unzip();
        assert_eq!(ran.values[0], qk.concat(), "scores from position {}", step.from);
        assert_eq!(ran.values[1], pv.concat(), "context from position {}", step.from);
        assert_eq!((ran.k[0], ran.f[0]), (K, 6));
    }
    for cache in keys.iter().chain(&values) {
        let cache = cache.lock().unwrap();
        assert_eq!(cache.as_ref().unwrap().tokens(), 14);
    }
}

/// Only the last token of each pass asks: the others' keys and values are cached all the same, and nothing is sent for their queries.
#[test]
fn tokens_that_ask_nothing() {
    let attention = Attention::new(&mut Random(5), 12);
    for all in [None, Some(12)] {
        let passes: &[usize] = if all.is_some() { &[12] } else { &[9, 1, 2] };
        let (world, keys) = (world(), caches());
        let even = |v: &[u64], n: usize| Given::even(&v[..12 * n], passes, K, 3);
        let (q, k) = (even(&attention.q, HEADS * DIM), even(&attention.k, WIDTH));
        let ran = run_in(&world, FIRST, passes, |s| {
            let (q, k) = (q.share(s, "q")?, k.share(s, "k")?);
            let mut keys = keys[s.role().index()].lock().unwrap();
            let scores = Arc::new(Scores { heads: HEADS, kv_heads: KV_HEADS, dim: DIM, all });
            let own = last_tokens(s, &q);
            let qk = product_cached(s, &Scope::layer(0).at("qk"), &own, &k, keys.as_mut().unwrap(), scores)?;
            Ok(vec![qk.finish(s)?])
        });
        let last: &[usize] = if all.is_some() { &[11] } else { &[8, 9, 11] };
        let want: Vec<u64> = last.iter().flat_map(|&i| attention.want(i).0).collect();
        assert_eq!(ran.only(), want, "{all:?}");
        let up: Cost = passes.iter().zip(last).fold(Cost::default(), |cost, (&tokens, i)| {
            cost.beside(cached::cost(HEADS * DIM, tokens * WIDTH, HEADS * (i + 1), K))
        });
        let inputs = ran.declared.online_bytes() - up.online_bytes();
        let given = passes.iter().map(|n| cached_input(n * HEADS * DIM) + cached_input(n * WIDTH)).sum::<u64>();
        assert_eq!(inputs, given);
    }
}

/// Bytes of the Client's input of `n` elements.
fn cached_input(n: usize) -> u64 {
    trefoil::protocol::input::cost(n, K).online_bytes()
}

#[test]
fn cached_costs() {
    let attention = Attention::new(&mut Random(4), 8);
    let (keys, values) = (caches(), caches());
    let ran = attention.run(&world(), &Step { first: FIRST, passes: &[8], from: 0 }, &keys, &values);
    let pairs = 8 * 9 / 2 * HEADS;
    let scores = cached::cost(8 * HEADS * DIM, 8 * WIDTH, pairs, K);
    let context = cached::cost(pairs, 8 * WIDTH, 8 * HEADS * DIM, K);
    let given: Vec<Given> = [8 * HEADS * DIM, 8 * WIDTH, pairs, 8 * WIDTH]
        .iter()
        .map(|&n| Given::ragged(&vec![0; n], &[1], &[n], K, 3))
        .collect();
    let given: Vec<&Given> = given.iter().collect();
    assert_cost("scores and context of 8 positions, 6 heads of 16, 45 bits", &ran, &given, scores.beside(context));
}

/// 3 groups for each token, `lengths[i]` scores each.
const GROUPS: usize = 3;

fn scores(r: &mut Random, lengths: &[usize], k: u32, t: &Thermometer) -> Vec<u64> {
    let step = 1i64 << t.step_bits;
    // The bottom interval of the ring belongs to the carry of the window.
    let (floor, top) = (-(1i64 << (k - 1)) + step, 1i64 << (k - 1));
    let edges = [t.base, t.base + 1, t.base + t.n as i64, t.base + t.n as i64 + 1];
    let mut out = Vec::new();
    for &n in lengths {
        for _ in 0..GROUPS {
            // The maximum is anywhere, or at an edge of what is promised; the others are anywhere below it.
            let max = match r.below(3) {
                0 => edges[r.below(4)] * step - (r.below(2) as i64),
                _ => floor + (r.word() % (top - floor) as u64) as i64,
            }
            .clamp(floor, top - 1);
            let at = r.below(n);
            out.extend(
                (0..n).map(|i| if i == at { max } else { floor + (r.word() % (max - floor + 1) as u64) as i64 }),
            );
        }
    }
    out.into_iter().map(|v| v as u64 & ring::mask(k)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(10))]

    #[test]
    fn the_thermometer_is_near_the_maximum(seed: u64, longest in 1usize..70, bits in 6u32..9, n in 2usize..50) {
        let (mut r, k, passes) = (Random(seed), 20, [30, 1, 1, 9]);
        let t = Thermometer { step_bits: k - bits, base: -(n.min(25) as i64), n: n.min((1 << (bits - 1)) - 2) };
        let lengths: Vec<usize> = (0..41).map(|_| 1 + r.below(longest)).collect();
        let x = scores(&mut r, &lengths, k, &t);
        let widths: Vec<usize> = lengths.iter().map(|n| n * GROUPS).collect();
        let given = Given::ragged(&x, &passes, &widths, k, 9);
        let ran = run(&passes, |s| {
            let x = given.share(s, "x")?;
            let from = if s.is_owner() { [0, 30, 31, 32][(s.passes()[0].number - FIRST) as usize] } else { 0 };
            let lengths = &lengths[from..from + s.tokens()];
            let c = thermometer::counter_bits(longest);
            let out = reference(s, &Scope::new("max"), &x, lengths, c, &t, 16)?;
            Ok(vec![subtract(&x, &out.m, lengths)?, out.m, out.faults])
        });
        let (m, faults) = (ran.signed(1), &ran.values[2]);
        let step = 1i64 << t.step_bits;
        let (mut at, mut clean) = (0, 0);
        for (g, n) in lengths.iter().flat_map(|n| [*n; GROUPS]).enumerate() {
            let group = &x[at..at + n];
            let max = group.iter().map(|&v| ring::signed(v, k)).max().unwrap();
            let (low, high) = (t.base * step, (t.base + t.n as i64) * step);
            if faults[g] == 0 {
                prop_assert!(m[g] <= max && max < m[g] + 2 * step, "{} {}", m[g], max);
                clean += 1;
            }
            prop_assert!(faults[g] <= 1);
            prop_assert!(faults[g] == 1 || (low <= max && max < high + step), "{} in {}..{}", max, low, high);
            prop_assert!(faults[g] == 0 || !(low + step <= max && max < high), "{} in {}..{}", max, low, high);
            for (x, y) in group.iter().zip(&ran.values[0][at..at + n]) {
                prop_assert_eq!(x.wrapping_sub(ran.values[1][g]) & ring::mask(k), *y);
            }
            at += n;
        }
        prop_assert!(clean > 0 || n < 6, "some groups are in range");
    }
}

#[test]
fn thermometer_costs() {
    let t = Thermometer { step_bits: 13, base: -16, n: 31 };
    let x = Random(1).signed(GROUPS * 20, 16, 20);
    let given = Given::even(&x, &[1], 20, 10);
    let ran = run(&[1], |s| {
        let x = given.share(s, "x")?;
        let out = reference(s, &Scope::new("max"), &x, &[20], 5, &t, 16)?;
        Ok(vec![out.m, out.faults])
    });
    let cost = thermometer::cost(&t, GROUPS * 20, GROUPS, 20, 5, 16);
    assert_eq!(cost.depth, 4);
    assert_cost("thermometer of 31 steps, 3 groups of 20 scores of 20 bits", &ran, &[&given], cost);
}
