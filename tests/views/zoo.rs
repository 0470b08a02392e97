//! Every operation once, with known packing: differences are exact, element by element, within messages too.

use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};

use ndarray::Array2;
use trefoil::error::Result;
use trefoil::party::Role;
use trefoil::prf::{Address, AddressLog, PreparationSeed};
use trefoil::protocol::cached::{Cached, Scores, product_cached};
use trefoil::protocol::embedding::{TableShare, embed, source};
use trefoil::protocol::linear::{OwnerMatrix, owner_linear};
use trefoil::protocol::lookup::{self, Indicator, Table};
use trefoil::protocol::open::open;
use trefoil::protocol::product::{Elementwise, product};
use trefoil::protocol::thermometer::{Thermometer, reference};
use trefoil::protocol::window::{Digits, Window};
use trefoil::protocol::{argmax, compare, concat, evaluate, guard, input, lift, normalise, polynomial, square};
use trefoil::ring;
use trefoil::session::{Scope, Session};
use trefoil::share::Rows;
use trefoil::world::Keys;

use crate::tally::{Message, Residues, Tally};
use crate::{Draw, Names, combined, named, observe, others};

const PASSES: [usize; 2] = [2, 1];
const RUNS: u32 = 800;
const VOCABULARY: usize = 16;
const WIDTH: usize = 3;

/// Linear maps and tables of the three parties.
struct Parts {
    matrix: [OwnerMatrix; 3],
    table: [TableShare; 3],
    /// What the Helper gets before any session.
    words: [Vec<u64>; 2],
}

impl Parts {
    fn new(seed: &PreparationSeed) -> Parts {
        let w = Array2::from_shape_fn((3, 4), |(i, j)| i as f32 * 0.25 - j as f32 * 0.5);
        let owner = OwnerMatrix::quantise(1, "w", w.view(), Some(&[0.5, 0.0, -1.0]), 12).unwrap();
        let a = owner.helper_words(seed).unwrap();
        let helper = OwnerMatrix::helper(1, 3, 4, 12, a.clone()).unwrap();
        let mut rows = vec![0; VOCABULARY * WIDTH];
        seed.matrix_words(2, 0, &mut rows);
        rows.iter_mut().enumerate().for_each(|(i, b)| *b = (7 * i as u64).wrapping_sub(*b));
        let dim = (VOCABULARY, WIDTH);
        let table = TableShare::rows(dim, 12, rows.clone()).unwrap();
        Parts {
            matrix: [owner, OwnerMatrix::client(1, 3, 4, 12, seed.clone()), helper],
            table: [table.clone(), TableShare::seed(dim, 12, 2, seed.clone()), table],
            words: [a, rows],
        }
    }
}

/// A value given by the Client: the same small ones in every run, `n` per token.
fn given(s: &mut Session, name: &str, n: usize, k: u32) -> Result<trefoil::share::Masked> {
    let (send, receive) = channel();
    for (pass, tokens) in PASSES.iter().enumerate() {
        let words =
            (0..tokens * n).map(|i| (37 * i as u64 + 11 * pass as u64).wrapping_sub(50) & ring::mask(k)).collect();
        send.send(words).unwrap();
    }
    let source = source(receive);
    let rows = Rows::even(s.tokens(), n);
    input::input(s, &Scope::new(name), &rows, k, 12, (s.role() == Role::Client).then_some(&source))
}

/// The program, which opens `argmax` and a lookup to the Client.
fn program(s: &mut Session, parts: &Parts, caches: &[Mutex<Cached>; 3]) -> Result<()> {
    let me = s.role().index();
    let at = Scope::new;
    let (a, b) = (given(s, "a", 4, 44)?, given(s, "b", 4, 44)?);
    let (c, l) = (given(s, "c", 4, 28)?, given(s, "l", 4, 12)?);
    owner_linear(s, &at("linear"), &a, &parts.matrix[me])?;
    let x = product(s, &at("product"), &a, &b, Arc::new(Elementwise))?;
    let y = {
        let mut cache = caches[me].lock().unwrap();
        product_cached(
            s,
            &at("cached"),
            &a,
            &b,
            &mut cache,
            Arc::new(Scores { heads: 1, kv_heads: 1, dim: 4, all: None }),
        )?
    };
    x.finish(s)?;
    y.finish(s)?;
    let lo = Digits::cut(&a, 0, 5)?.integer(44, 0);
    polynomial::polynomial(s, &at("polynomial"), &[&a, &b, &lo], &[&[0, 1], &[0, 1, 2]])?.finish(s)?;
    let (sum, lifted) = square::square_sum(s, &at("square"), &c, 4)?;
    let sum = sum.finish(s)?;
    square::scale(s, &at("scale"), lifted, &sum)?.finish(s)?;
    let tables = [5u64, 11].map(|m| Table::cyclic(&(0..16).map(|i| i * m).collect::<Vec<_>>()));
    let words = lookup::words(s, &at("words"), &Digits::cut(&a, 0, 4)?, &tables, &[0, 0], 20)?.finish(s)?;
    let indicator = Indicator::cyclic(8, &[1, 1, 4], |i, j| i > j)?;
    lookup::indicator(s, &at("indicator"), &Digits::cut(&a, 4, 3)?, &indicator, 0, 9)?.finish(s)?;
    lift::lift(s, &at("lift"), &c, 50)?.finish(s)?;
    let wide = lift::lift(s, &at("wide"), &c, 64)?.finish(s)?;
    let columns = [3u64, 17, 1].map(|m| evaluate::Table::cyclic(&(0..16).map(|i| i * m).collect::<Vec<_>>()));
    let [first, second, column] = columns;
    let lines = evaluate::Lines::new(first, second, vec![column]);
    let window = Window { hi: Digits::cut(&a, 40, 4)?, lo: Digits::cut(&a, 34, 6)? };
    normalise::normalise(s, &at("normalise"), &concat(&[&wide, &wide])?, &window, &lines, 12)?.finish(s)?;
    compare::is_negative(s, &at("compare"), &c.narrow(16)?, 7)?.finish(s)?;
    if let Some(g) = guard::guard(s, &at("guard"), &a, 30, true, 16)? {
        g.finish(s)?;
    }
    let t = Thermometer { step_bits: 12, base: -4, n: 6 };
    reference(s, &at("thermometer"), &a.narrow(17)?, &vec![4; s.tokens()], 3, &t, 16)?;
    let token = argmax::argmax(s, &at("argmax"), &l, &[2], &mut |_| Ok(()))?;
    let (send, receive) = channel();
    for tokens in PASSES {
        send.send((0..tokens as u64).map(|i| 5 * i + 2).collect()).unwrap();
    }
    let ids = source(receive);
    embed(s, &at("embed"), &parts.table[me], s.tokens(), 28, (s.role() == Role::Client).then_some(&ids))?;
    let (sink, _opened) = channel();
    // The receiver of the sink lives as long as the Client's online thread may put something in.
    std::mem::forget(_opened);
    open(s, &at("token"), &token, Some(&sink))?;
    open(s, &at("word"), &words[0], Some(&sink))
}

/// Bits of a message's elements, where all have the same.
fn width(step: &Address) -> Option<u32> {
    let Address { path, label, .. } = step;
    let path = path.as_str();
    match *label {
        "lookup.query" | "evaluate.query" | "square.shares" | "scale.shares" | "embed.query" | "normalise.query" => {
            None
        }
        "lift.query" => Some(1),
        "lift.client" | "lift.helper" => Some(match path {
            "lift" => 22,
            "wide" => 36,
            _ => 12,
        }),
        _ => match path {
            "a" | "b" | "linear" | "product" | "cached" | "polynomial" => Some(44),
            "c" | "embed" => Some(28),
            "l" => Some(12),
            "square" | "scale" | "normalise" => Some(64),
            "words" | "word" => Some(20),
            "indicator" => Some(9),
            "compare.sign" => Some(7),
            "thermometer.codes" => Some(3),
            "thermometer.thresholds" => Some(17),
            "thermometer.ends" => Some(16),
            _ if path.starts_with("guard") => Some(16),
            _ if path.ends_with("compare.chunks") => Some(2),
            _ if path.ends_with("compare.sign") => Some(1),
            _ if path.starts_with("argmax") || path == "token" => Some(24),
            _ => panic!("no width for {step}"),
        },
    }
}

fn words(label: &'static str, words: &[u64]) -> Message {
    let step = Address { pass: 0, layer: Address::NO_LAYER, path: "prepare".into(), label };
    Message { step, bytes: ring::pack::pack(words, 64), k: Some(64) }
}

/// What `receiver` got in each run, everything that it knows being the same.
fn runs(receiver: Role, n: u32, mut each: impl FnMut(Vec<Message>)) {
    let (keys, mut draw, log) = (Keys::seeded(receiver.index() as u64), Draw::new(900), AddressLog::default());
    let mut parts = Parts::new(&draw.seed());
    let mut names = Names::default();
    for i in 0..n {
        let keys = keys.clone().with(others(receiver), draw.key());
        if receiver == Role::Helper {
            parts = Parts::new(&draw.seed());
        }
        let caches = std::array::from_fn(|_| Mutex::new(Cached::new(4, 44, 12, 4)));
        let got = observe(receiver, &keys, &PASSES, (i == 0).then_some(&log), |s| program(s, &parts, &caches));
        if i == 0 {
            names = Names::from(&log, &["token", "word"]);
        }
        let mut run = named(&names, got, width);
        if receiver == Role::Helper {
            run.extend([words("prepare.words", &parts.words[0]), words("prepare.rows", &parts.words[1])]);
        }
        each(run);
    }
}

#[test]
fn the_owner_sees_nothing() {
    let mut tally = Tally::default();
    // Comparisons of 16 bits and, in the tournament, of 16: 4 chunks of 2, 3, 3 and 4 states.
    let mut codes: Vec<Residues> = Vec::new();
    runs(Role::Owner, RUNS, |mut run| {
        let (chunks, both): (Vec<_>, Vec<_>) =
            combined(&run).into_iter().partition(|m| m.step.path.ends_with("compare.chunks"));
        codes.resize_with(chunks.len(), || Residues::new(vec![2, 3, 3, 4]));
        for (codes, m) in codes.iter_mut().zip(&chunks) {
            codes.add(&ring::pack::unpack(&m.bytes, 4 * m.bytes.len(), 2).unwrap());
        }
        run.extend(both);
        tally.add(&run);
    });
    tally.assert_uniform("operations, Owner");
    codes.iter().for_each(|c| c.assert_uniform("operations, Owner, codes of comparisons"));
}

#[test]
fn the_helper_sees_nothing() {
    let mut tally = Tally::default();
    runs(Role::Helper, RUNS, |run| tally.add(&run));
    tally.assert_uniform("operations, Helper");
}

#[test]
fn the_client_sees_its_output_and_no_row_of_the_table() {
    let (mut tally, mut opened) = (Tally::default(), None);
    runs(Role::Client, RUNS, |run| {
        let (mut replies, open): (Vec<_>, Vec<_>) = run.into_iter().partition(|m| m.step.label != "open.d");
        replies.extend(combined(&replies));
        tally.add(&replies);
        // Same masks, same outputs: the same messages, whatever Owner and Helper share.
        let open: Vec<Vec<u8>> = open.into_iter().map(|m| m.bytes).collect();
        assert_eq!(open.len(), 4);
        assert_eq!(*opened.get_or_insert(open.clone()), open);
    });
    tally.assert_uniform("operations, Client, embedding");
}
