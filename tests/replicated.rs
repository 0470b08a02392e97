//! The base: operations on replicated sharings and the shared-weight linear layer give exact results, and send exactly
//! what their costs say.

use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};

use ndarray::{ArrayD, IxDyn};
use rand_chacha::ChaCha20Rng;
use rand_core::{Rng, SeedableRng};
use trefoil::net::tamper::Rewrite;
use trefoil::plan::cost::Cost;
use trefoil::protocol::compare::is_negative;
use trefoil::protocol::input as masked_input;
use trefoil::protocol::replicated::boolean::{self, and, inject, input_bits, open_bits, open_bits_to, select};
use trefoil::protocol::replicated::{
    self as base, dot, input, less_than, materialise, matmul, msb, mul, open, open_to, random, relu, zero,
};
use trefoil::protocol::shared_linear::{self, SharedMatrix, shared_linear};
use trefoil::ring::{mask, signed};
use trefoil::session::{Scope, Session};
use trefoil::share::{Bits, Masked, Replicated, Rows};
use trefoil::world::{Keys, Outcome, Setup, World, reveal};
use trefoil::{Error, Result, Role};

const WIDTHS: [u32; 14] = [1, 2, 3, 4, 5, 8, 16, 17, 31, 33, 44, 52, 63, 64];

fn words(seed: u64, n: usize) -> Vec<u64> {
    let mut rng = ChaCha20Rng::seed_from_u64(seed);
    (0..n).map(|_| rng.next_u64()).collect()
}

/// Words of `k` bits: the edges first, then random ones.
fn values(seed: u64, n: usize, k: u32) -> Vec<u64> {
    let half = 1u64 << (k - 1);
    let edges = [0, 1, 2, half, half.wrapping_sub(1), half + half / 2, u64::MAX, u64::MAX - 1, half.wrapping_add(1)];
    edges.into_iter().chain(words(seed, n)).take(n).map(|v| v & mask(k)).collect()
}

fn array(v: &[u64], shape: &[usize]) -> ArrayD<u64> {
    ArrayD::from_shape_vec(IxDyn(shape), v.to_vec()).unwrap()
}

/// Runs one pass; the three results in order.
fn run<T: Send + std::fmt::Debug>(
    world: &World,
    pass: u64,
    program: impl Fn(&mut Session) -> Result<T> + Sync,
) -> [T; 3] {
    let Outcome { mut owner, client, helper } = world.run(pass, &[1], program).unwrap();
    assert_eq!(owner.len(), 1);
    [owner.remove(0), client, helper]
}

/// Runs one pass in which all parties learn the same.
fn run_open(world: &World, pass: u64, program: impl Fn(&mut Session) -> Result<ArrayD<u64>> + Sync) -> Vec<u64> {
    let [a, b, c] = run(world, pass, program);
    assert!(a == b && b == c, "the parties open the same");
    a.iter().copied().collect()
}

fn give(s: &mut Session, name: &str, from: Role, v: &[u64], shape: &[usize], k: u32) -> Result<Replicated> {
    let mine = (s.role() == from).then(|| array(v, shape));
    input(s, &Scope::new(name), from, mine.as_ref(), shape, k, 0)
}

fn scope(name: &str) -> Scope {
    Scope::new(name)
}

#[test]
fn products_are_exact_in_every_ring() {
    let world = World::seeded(11);
    for (pass, k) in WIDTHS.into_iter().enumerate() {
        let (x, y, m) = (values(1, 60, k), words(2, 60), mask(k));
        for (i, from) in Role::ALL.into_iter().enumerate() {
            let [product, dots, matrix] = [0, 1, 2].map(|which| {
                run_open(&world, (9 * pass + 3 * i + which) as u64, |s| {
                    let (xs, ys) = if which == 2 { ([12, 5], [5, 12]) } else { ([12, 5], [12, 5]) };
                    let x = give(s, "x", from, &x, &xs, k)?;
                    let y = give(s, "y", from.next(), &y, &ys, k)?;
                    let z = match which {
                        0 => mul(s, &scope("z"), &x, &y)?,
                        1 => dot(s, &scope("z"), &x, &y)?,
                        _ => matmul(s, &scope("z"), &x, &y)?,
                    };
                    open(s, &scope("open"), &z)
                })
            });
            let want: Vec<u64> = x.iter().zip(&y).map(|(a, b)| a.wrapping_mul(*b) & m).collect();
            assert_eq!(product, want, "mul, k = {k}");
            let sum = |v: &[u64]| v.iter().fold(0u64, |a, b| a.wrapping_add(*b)) & m;
            assert_eq!(dots, want.chunks(5).map(sum).collect::<Vec<_>>(), "dot, k = {k}");
            let want: Vec<u64> = (0..144)
                .map(|at| {
                    (0..5).fold(0u64, |s, l| s.wrapping_add(x[at / 12 * 5 + l].wrapping_mul(y[l * 12 + at % 12]))) & m
                })
                .collect();
            assert_eq!(matrix, want, "matmul, k = {k}");
        }
    }
}

#[test]
fn the_sign_is_exact_in_every_ring() {
    let world = World::seeded(12);
    for k in 1..=64 {
        let x = if k <= 12 { (0..1 << k).collect() } else { values(u64::from(k), 3000, k) };
        let n = x.len();
        let got = run_open(&world, u64::from(k), |s| {
            // A sum of two inputs, so that all three components are random.
            let noise = random(s, &scope("noise"), &[n], k, 0)?;
            let x = give(s, "x", Role::Client, &x, &[n], k)?.add(&noise)?.sub(&noise)?;
            let sign = msb(s, &scope("msb"), &x)?;
            open_bits(s, &scope("open"), &sign)
        });
        let want: Vec<u64> = x.iter().map(|v| v >> (k - 1)).collect();
        assert_eq!(got, want, "k = {k}");
    }
}

/// Carries that run through the whole adder, and a million random values under random components.
#[test]
fn the_sign_of_a_million_values() {
    let world = World::seeded(13);
    let n = 1_000_000;
    let mut x = words(5, n);
    for (i, v) in x.iter_mut().enumerate().take(4096) {
        let (a, b) = (i as u32 % 64, i as u32 / 64);
        *v = (u64::MAX >> a).wrapping_sub(1 << b);
    }
    let got = run_open(&world, 1, |s| {
        let noise = random(s, &scope("noise"), &[n], 64, 0)?;
        let x = give(s, "x", Role::Owner, &x, &[n], 64)?.add(&noise)?.sub(&noise)?;
        let sign = msb(s, &scope("msb"), &x)?;
        open_bits(s, &scope("open"), &sign)
    });
    assert!(got.iter().zip(&x).all(|(s, x)| *s == x >> 63));
}

/// An Owner's input has `r = 0`, so the adder gets exactly these operands: `d = 1 - 2^b`.
#[test]
fn the_sign_without_random_components() {
    let world = World::seeded(14);
    for k in [1, 2, 3, 7, 16, 63, 64] {
        let x: Vec<u64> = (0..k).map(|b| 1u64 << b).collect();
        let n = x.len();
        let got = run_open(&world, u64::from(k), |s| {
            let x = give(s, "x", Role::Owner, &x, &[n], k)?;
            let y = x.neg().add_public(&array(&vec![1; n], &[n]))?;
            let sign = msb(s, &scope("msb"), &y)?;
            open_bits(s, &scope("open"), &sign)
        });
        let want: Vec<u64> = x.iter().map(|v| (1u64.wrapping_sub(*v) & mask(k)) >> (k - 1)).collect();
        assert_eq!(got, want, "k = {k}");
    }
}

#[test]
fn bits_comparisons_and_selections() {
    let world = World::seeded(15);
    for (pass, k) in WIDTHS.into_iter().enumerate() {
        let (x, y) = (values(7, 200, k), values(8, 200, k));
        let pass = 10 * pass as u64;
        let give_bits = |s: &mut Session, name: &str, from: Role, v: &[u64], width: u32| {
            let mine = (s.role() == from).then(|| array(v, &[200]));
            input_bits(s, &scope(name), from, mine.as_ref(), &[200], width)
        };
        for (i, from) in Role::ALL.into_iter().enumerate() {
            let got = run_open(&world, pass + i as u64, |s| {
                let x = give_bits(s, "x", from, &x, k)?;
                let y = give_bits(s, "y", from.prev(), &y, k)?;
                let z = and(s, &scope("z"), &x, &y)?.xor(&x)?;
                open_bits(s, &scope("open"), &z.xor_public(&array(&[5; 200], &[200]))?.inverted())
            });
            let want: Vec<u64> = x.iter().zip(&y).map(|(x, y)| !((x & y) ^ x ^ 5) & mask(k)).collect();
            assert_eq!(got, want, "and, k = {k}");
        }
        let bit: Vec<u64> = y.iter().map(|v| v >> (k / 2) & 1).collect();
        let got = run_open(&world, pass + 3, |s| {
            let noise = boolean::random_bits(s, &scope("noise"), &[200], 1)?;
            let b = give_bits(s, "b", Role::Helper, &bit, 1)?.xor(&noise)?.xor(&noise)?;
            let b = inject(s, &scope("inject"), &b, k)?;
            open(s, &scope("open"), &b)
        });
        assert_eq!(got, bit, "inject, k = {k}");
        let got = run_open(&world, pass + 4, |s| {
            let b = give_bits(s, "b", Role::Client, &bit, 1)?;
            let noise = random(s, &scope("noise"), &[200], k, 0)?;
            let x = give(s, "x", Role::Client, &x, &[200], k)?.add(&noise)?.sub(&noise)?;
            let z = select(s, &scope("select"), &b, &x)?;
            open(s, &scope("open"), &z)
        });
        assert_eq!(got, bit.iter().zip(&x).map(|(b, x)| b * x).collect::<Vec<_>>(), "select, k = {k}");
        let got = run_open(&world, pass + 5, |s| {
            let x = give(s, "x", Role::Helper, &x, &[200], k)?;
            let z = relu(s, &scope("relu"), &x)?;
            open(s, &scope("open"), &z)
        });
        let want: Vec<u64> = x.iter().map(|&v| signed(v, k).max(0) as u64).collect();
        assert_eq!(got, want, "relu, k = {k}");
    }
    // Numbers of 62 bits compared in a ring of 64: no difference leaves it.
    let (x, y) = (values(9, 500, 62), values(10, 500, 62));
    let got = run_open(&world, 1000, |s| {
        let x = give(s, "x", Role::Owner, &x, &[500], 64)?;
        let y = give(s, "y", Role::Client, &y, &[500], 64)?;
        let z = less_than(s, &scope("less"), &x, &y)?;
        open_bits(s, &scope("open"), &z)
    });
    assert_eq!(got, x.iter().zip(&y).map(|(x, y)| u64::from(x < y)).collect::<Vec<_>>());
}

#[test]
fn opening_to_one_party() {
    let world = World::seeded(16);
    for (pass, to) in Role::ALL.into_iter().enumerate() {
        let out = run(&world, pass as u64, |s| {
            let x = give(s, "x", to.next(), &[1, 2, 3], &[3], 17)?;
            let bits = boolean::random_bits(s, &scope("bits"), &[4], 9)?;
            let all = open_bits(s, &scope("open all"), &bits)?;
            let bits = open_bits_to(s, &scope("open bits"), &bits, to)?;
            Ok((open_to(s, &scope("open"), &x, to)?, bits, all, s.role()))
        });
        for (x, bits, all, role) in out {
            assert_eq!(x, (role == to).then(|| array(&[1, 2, 3], &[3])));
            assert_eq!(bits, (role == to).then_some(all));
        }
    }
}

#[test]
fn the_lookup_comparison_agrees_with_the_adder() {
    let world = World::seeded(17);
    let x: Vec<u64> = (0..1 << 16).step_by(7).chain([0x7fff, 0x8000, 0xffff]).collect();
    let n = x.len();
    let out = run(&world, 1, |s| {
        let noise = random(s, &scope("noise"), &[n], 16, 0)?;
        let x = give(s, "x", Role::Client, &x, &[n], 16)?.add(&noise)?.sub(&noise)?;
        let sign = msb(s, &scope("msb"), &x)?;
        let sign = open_bits(s, &scope("open"), &sign)?;
        // From here on the masked engine: the holders leave jobs.
        let masked = is_negative(s, &scope("lookup"), &x.to_masked(Rows::even(1, n))?, 16)?.finish(s)?;
        Ok((sign, masked))
    });
    let [(sign, d), (_, r), _] = out;
    let masked = reveal(&[d], &r).unwrap();
    assert!(sign.iter().zip(&masked).zip(&x).all(|((a, b), x)| a == b && *a == x >> 15));
}

#[test]
fn conversions_between_the_masked_and_the_replicated_form() {
    let world = World::seeded(18);
    for (pass, k) in WIDTHS.into_iter().enumerate() {
        let x = values(3, 24, k);
        let back = |s: &mut Session| -> Result<(Masked, ArrayD<u64>)> {
            let noise = random(s, &scope("noise"), &[24], k, 0)?;
            let x = give(s, "x", Role::Helper, &x, &[24], k)?.add(&noise)?.sub(&noise)?;
            let masked = x.to_masked(Rows::even(1, 24))?;
            let again = materialise(s, &scope("materialise"), &masked, &[4, 6])?;
            Ok((masked, open(s, &scope("open"), &again)?))
        };
        let [(d, a), (r, b), (same, c)] = run(&world, pass as u64, back);
        assert!(a == b && b == c);
        assert_eq!(a.iter().copied().collect::<Vec<_>>(), x);
        for mask in [r, same] {
            assert_eq!(reveal(std::slice::from_ref(&d), &mask).unwrap(), x);
        }
    }
}

/// The same traffic on every directed link, the same length of the chain.
fn assert_cost(name: &str, cost: Cost, world: &World, declared: Cost) {
    for from in Role::ALL {
        for to in [from.next(), from.prev()] {
            let sent = world.sent(from, to);
            let online = cost.online(from, to);
            let ahead = cost.ahead(from, to);
            assert_eq!((sent.online_bytes, sent.messages), (online.bytes, online.messages), "{name}: {from} -> {to}");
            assert_eq!(
                (sent.ahead_bytes, sent.ahead_messages),
                (ahead.bytes, ahead.messages),
                "{name}: {from} -> {to}"
            );
            assert_eq!(declared.online(from, to), online, "{name} declares what it costs");
            assert_eq!(declared.ahead(from, to), ahead, "{name} declares what it costs");
        }
    }
    let depth = Role::ALL.map(|r| world.meter(r).depth()).into_iter().max();
    // Only a composite may have a chain of messages that is shorter than its rounds.
    let shorter = u32::from(name.starts_with("relu"));
    assert!(depth.is_some_and(|d| d == cost.depth || d + shorter == cost.depth), "{name}: {depth:?} in sequence");
}

/// Runs one operation alone on random sharings, which cost nothing to make, and compares with the meter.
fn check(name: &str, cost: Cost, program: impl Fn(&mut Session, &[Replicated], &[Bits]) -> Result<()> + Sync, k: u32) {
    let world = World::seeded(19);
    let [declared, ..] = run(&world, 1, |s| {
        let x = [random(s, &scope("x"), &[7, 5], k, 0)?, random(s, &scope("y"), &[5, 7], k, 0)?];
        let mut bits = Vec::new();
        for (name, width) in [("b", k), ("c", k), ("bit", 1)] {
            bits.push(boolean::random_bits(s, &scope(name), &[7, 5], width)?);
        }
        program(s, &x, &bits)?;
        Ok(s.declared())
    });
    assert_cost(&format!("{name} (k = {k})"), cost, &world, declared);
}

#[test]
fn every_operation_sends_what_it_declares() {
    let o = &scope("op");
    for k in WIDTHS {
        let public = array(&words(1, 35), &[7, 5]);
        let mine = |s: &Session, from: Role| (s.role() == from).then(|| public.clone());
        for from in Role::ALL {
            let cost = base::input_cost(from, 35, k);
            check("input", cost, |s, _, _| input(s, o, from, mine(s, from).as_ref(), &[7, 5], k, 0).map(drop), k);
            let cost = boolean::input_bits_cost(from, 35, k);
            check(
                "input bits",
                cost,
                |s, _, _| input_bits(s, o, from, mine(s, from).as_ref(), &[7, 5], k).map(drop),
                k,
            );
            check("open to", base::open_to_cost(from, 35, k), |s, x, _| open_to(s, o, &x[0], from).map(drop), k);
            check("open to", base::open_to_cost(from, 35, k), |s, _, b| open_bits_to(s, o, &b[0], from).map(drop), k);
        }
        check("zero", base::random_cost(), |s, _, _| zero(s, o, &[9], k, 0).map(drop), k);
        check(
            "reshare",
            base::reshare_cost(9, k),
            |s, _, _| {
                let z = zero(s, &scope("z"), &[9], k, 0)?;
                base::reshare(s, o, z).map(drop)
            },
            k,
        );
        check("mul", base::reshare_cost(35, k), |s, x, _| mul(s, o, &x[0], &x[0]).map(drop), k);
        check("dot", base::reshare_cost(7, k), |s, x, _| dot(s, o, &x[0], &x[0]).map(drop), k);
        check("matmul", base::reshare_cost(49, k), |s, x, _| matmul(s, o, &x[0], &x[1]).map(drop), k);
        check("open", base::open_cost(35, k), |s, x, _| open(s, o, &x[0]).map(drop), k);
        check("and", boolean::and_cost(35, k), |s, _, b| and(s, o, &b[0], &b[1]).map(drop), k);
        check("open bits", boolean::open_bits_cost(35, k), |s, _, b| open_bits(s, o, &b[0]).map(drop), k);
        check("inject", boolean::inject_cost(35, k), |s, _, b| inject(s, o, &b[2], k).map(drop), k);
        check("select", boolean::select_cost(35, k), |s, x, b| select(s, o, &b[2], &x[0]).map(drop), k);
        check("msb", base::sign::msb_cost(35, k), |s, x, _| msb(s, o, &x[0]).map(drop), k);
        check("less", base::sign::msb_cost(35, k), |s, x, _| less_than(s, o, &x[0], &x[0]).map(drop), k);
        check("relu", base::sign::relu_cost(35, k), |s, x, _| relu(s, o, &x[0]).map(drop), k);
        check(
            "materialise",
            base::materialise_cost(35, k),
            |s, x, _| {
                let masked = x[0].to_masked(Rows::even(1, 35))?;
                materialise(s, o, &masked, &[5, 7]).map(drop)
            },
            k,
        );
    }
    let rounds = |k| base::sign::msb_cost(1, k).depth;
    assert_eq!([1, 2, 3, 4, 8, 9, 16, 17, 32, 64].map(rounds), [1, 2, 2, 3, 4, 4, 5, 5, 6, 7]);
}

#[test]
fn a_zero_sharing_sums_to_zero() {
    let world = World::seeded(20);
    for (pass, k) in WIDTHS.into_iter().enumerate() {
        let got = run_open(&world, pass as u64, |s| {
            let z = zero(s, &scope("zero"), &[50], k, 0)?;
            let z = base::reshare(s, &scope("reshare"), z)?;
            open(s, &scope("open"), &z)
        });
        assert_eq!(got, vec![0; 50], "k = {k}");
    }
}

#[test]
fn a_scope_is_used_once() {
    let world = World::seeded(21);
    let twice = world.run(1, &[1], |s| {
        let x = random(s, &scope("x"), &[3], 20, 0)?;
        mul(s, &scope("z"), &x, &x)?;
        mul(s, &scope("z"), &x, &x)
    });
    assert!(matches!(twice, Err(Error::Reuse(_))), "{twice:?}");
    // Replicated operations go pass by pass: a batch of several is refused by the parties that walk it as one.
    let batch = World::seeded(22).run(1, &[1, 1], |s| random(s, &scope("x"), &[3], 20, 0));
    assert!(batch.is_err());
}

#[test]
fn wrong_inputs_are_errors_of_their_giver() {
    let program = |s: &mut Session| input(s, &scope("x"), Role::Client, None, &[3], 20, 0);
    assert!(matches!(World::seeded(23).run(1, &[1], program), Err(Error::Shape { .. })));
    let program = |s: &mut Session| random(s, &scope("x"), &[usize::MAX, 3], 20, 0);
    assert!(matches!(World::seeded(23).run(1, &[1], program), Err(Error::Shape { .. })));
    for k in [0, 65] {
        let program = |s: &mut Session| random(s, &scope("x"), &[3], k, 0);
        assert!(matches!(World::seeded(23).run(1, &[1], program), Err(Error::Shape { .. })));
    }
}

#[test]
fn a_peer_that_sends_something_else_is_named() {
    for (change, who) in [(0, Role::Owner), (1, Role::Owner), (1, Role::Client), (0, Role::Helper)] {
        let rewrite: Rewrite = Arc::new(move |_, mut frame| {
            match (change, frame.payload.last_mut()) {
                (0, _) => frame.payload.push(0),
                (_, Some(last)) => *last = 0xff,
                _ => {}
            }
            Some(frame)
        });
        let mut setup = Setup::default();
        setup.rewrites[who.index()] = Some(rewrite);
        let world = World::new(Keys::seeded(24), &setup);
        let out = world.run(1, &[1], |s| {
            let x = random(s, &scope("x"), &[3], 13, 0)?;
            relu(s, &scope("relu"), &x)
        });
        match out {
            Err(Error::Peer { role, .. }) => assert_eq!(role, who),
            other => panic!("{other:?}"),
        }
    }
}

/// `y = W x` over batches of passes: exact, and as dear as declared.
#[test]
fn shared_linear_over_batches() {
    const M: usize = 9;
    const N: usize = 13;
    for (seed, (k, kw)) in [(64, 64), (44, 44), (33, 52), (1, 64)].into_iter().enumerate() {
        for from in Role::ALL {
            let world = World::seeded(30 + seed as u64);
            let w = words(40 + seed as u64, M * N);
            let plain = ndarray::ArrayView2::from_shape((M, N), &w).unwrap();
            let [owner, client, helper] = run(&world, 1, |s| {
                let mine = (s.role() == from).then_some(plain);
                let w = SharedMatrix::share(s, &scope("w"), from, mine, M, N, kw, 0)?;
                Ok((w, s.declared()))
            });
            assert_cost("share", shared_linear::share_cost(from, M * N, kw), &world, owner.1);
            let (owner, client, helper) = (owner.0, client.0, helper.0);
            assert_eq!((owner.dim(), owner.bytes(), helper.bytes()), ((M, N), 8 * M * N, 16 * M * N));

            let tokens = [1, 3, 2];
            let x: Vec<u64> = words(50, 6 * N).iter().map(|v| v & mask(k)).collect();
            let (send, receive) = channel();
            let source = Arc::new(Mutex::new(receive));
            let mut at = 0;
            for n in tokens {
                send.send(x[at * N..(at + n) * N].to_vec()).unwrap();
                at += n;
            }
            let before = Role::ALL.map(|a| Role::ALL.map(|b| world.sent(a, b)));
            let out = world.run(2, &tokens, |s| {
                let w = match s.role() {
                    Role::Owner => &owner,
                    Role::Client => &client,
                    Role::Helper => &helper,
                };
                let rows = Rows::even(s.tokens(), N);
                let source = (s.role() == Role::Client).then_some(&source);
                let x = masked_input::input(s, &scope("x"), &rows, k, 0, source)?;
                shared_linear(s, &scope("y"), &x, w)?.finish(s)
            });
            let out = out.unwrap();
            let got = reveal(&out.owner, &out.client).unwrap();
            let entry = |t: usize, j: usize| {
                (0..N).fold(0u64, |sum, i| sum.wrapping_add(w[j * N + i].wrapping_mul(x[t * N + i]))) & mask(k)
            };
            let want: Vec<u64> = (0..6 * M).map(|at| entry(at / M, at % M)).collect();
            assert_eq!(got, want, "k = {k} under {kw}, given by the {from}");
            assert_eq!(reveal(&out.owner, &out.helper).unwrap(), want);

            let mut cost = Cost::default();
            for n in tokens {
                cost = cost.beside(masked_input::cost(n * N, k)).beside(shared_linear::cost(n * N, n * M, k));
            }
            for a in Role::ALL {
                for b in [a.next(), a.prev()] {
                    let sent = world.sent(a, b) - before[a.index()][b.index()];
                    let (online, ahead) = (cost.online(a, b), cost.ahead(a, b));
                    assert_eq!((sent.online_bytes, sent.messages), (online.bytes, online.messages), "{a} -> {b}");
                    assert_eq!((sent.ahead_bytes, sent.ahead_messages), (ahead.bytes, ahead.messages), "{a} -> {b}");
                }
            }
        }
    }
}

/// A matrix that is already masked, used in the very pass that materialises it; the exchange is two messages in
/// sequence.
#[test]
fn a_masked_matrix_is_materialised_and_used_at_once() {
    let world = World::seeded(60);
    let [owner, client, _] = run(&world, 1, |s| {
        let w = random(s, &scope("w"), &[6], 40, 3)?.to_masked(Rows::even(1, 6))?;
        let x = random(s, &scope("x"), &[3], 40, 2)?.to_masked(Rows::even(1, 3))?;
        let shared = SharedMatrix::materialise(s, &scope("shared"), &w, 2, 3)?;
        let y = shared_linear(s, &scope("y"), &x, &shared)?.finish(s)?;
        Ok((w, x, y, s.declared()))
    });
    let cost = shared_linear::materialise_cost(6, 40).beside(shared_linear::cost(3, 2, 40));
    assert_cost("shared linear", cost, &world, owner.3);
    let both = |a: Masked, b: &Masked| reveal(&[a], b).unwrap();
    assert_eq!(client.2.f(), 5);
    let (w, x, y) = (both(owner.0, &client.0), both(owner.1, &client.1), both(owner.2, &client.2));
    let row = |j: usize| (0..3).fold(0u64, |s, i| s.wrapping_add(w[3 * j + i].wrapping_mul(x[i]))) & mask(40);
    assert_eq!(y, [row(0), row(1)]);
    let wide = World::seeded(61).run(1, &[1], |s| {
        let w = random(s, &scope("w"), &[6], 40, 3)?.to_masked(Rows::even(1, 6))?;
        let x = random(s, &scope("x"), &[3], 41, 2)?.to_masked(Rows::even(1, 3))?;
        let shared = SharedMatrix::materialise(s, &scope("shared"), &w, 2, 3)?;
        shared_linear(s, &scope("y"), &x, &shared)?.finish(s)
    });
    assert!(matches!(wide, Err(Error::Shape { .. })), "a matrix is materialised in the largest ring that it meets");
}
