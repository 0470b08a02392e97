//! The base (replicated sharings), where each party receives from the one before it, and the shared-weight linear map.
//!
//! What a party receives is masked by streams of the two others: the reshared summands by their zero sharing, inputs and
//! the Owner's shares of bits by the stream of giver and other holder, an opened component (of products here, which are
//! fresh) by the summand that it was reshared from. So the same re-draw makes all of it uniform, at all three parties.

use std::sync::mpsc::channel;

use ndarray::{Array2, ArrayD, IxDyn};
use trefoil::error::Result;
use trefoil::party::Role;
use trefoil::prf::{Address, AddressLog};
use trefoil::protocol::embedding::source;
use trefoil::protocol::input as masked;
use trefoil::protocol::replicated::boolean::{and, inject, input_bits, open_bits, random_bits, select};
use trefoil::protocol::replicated::{input, less_than, materialise, matmul, mul, open, random, relu};
use trefoil::protocol::shared_linear::{SharedMatrix, shared_linear};
use trefoil::ring::mask;
use trefoil::session::{Scope, Session};
use trefoil::share::Rows;
use trefoil::world::Keys;

use crate::tally::{Message, Tally};
use crate::{Draw, Names, combined, named, observe, others};

/// Four elements are whole bytes: sections within a message have no padding.
const K: u32 = 38;
const RUNS: u32 = 800;

/// Every operation, most of them twice, in one pass: the base before the masked engine.
fn program(s: &mut Session) -> Result<()> {
    let at = Scope::new;
    let (me, shape) = (s.role(), [2, 2]);
    let value = |salt: u64, k: u32| {
        ArrayD::from_shape_fn(IxDyn(&shape), |i| (salt * 9 + 5 * i[0] as u64 + i[1] as u64) & mask(k))
    };
    let mut x = Vec::new();
    for from in Role::ALL {
        let own = (me == from).then(|| value(from.index() as u64, K));
        x.push(input(s, &at(&format!("x{from}")), from, own.as_ref(), &shape, K, 0)?);
    }
    let y = [mul(s, &at("mul1"), &x[0], &x[1])?, mul(s, &at("mul2"), &x[1], &x[2])?];
    let any = random(s, &at("random"), &shape, K, 0)?;
    let z = matmul(s, &at("matmul"), &x[2], &any)?;
    open(s, &at("open y"), &y[0])?;
    open(s, &at("open z"), &y[1])?;
    let mut bits = Vec::new();
    for from in Role::ALL {
        let own = (me == from).then(|| value(from.index() as u64, 11));
        bits.push(input_bits(s, &at(&format!("b{from}")), from, own.as_ref(), &shape, 11)?);
    }
    let b = and(s, &at("and1"), &bits[0], &bits[1])?;
    let any = random_bits(s, &at("random_bits"), &shape, 11)?;
    and(s, &at("and2"), &bits[2], &any)?;
    open_bits(s, &at("open b"), &b)?;
    let less = [less_than(s, &at("less1"), &x[0], &x[1])?, less_than(s, &at("less2"), &x[2], &z)?];
    inject(s, &at("inject"), &less[0], K)?;
    select(s, &at("select"), &less[1], &x[1])?;
    relu(s, &at("relu"), &z)?;

    let w = Array2::from_shape_fn((3, 4), |(i, j)| (7 * i + j) as u64);
    let give = |from| (me == from).then(|| w.view());
    let matrices = [
        SharedMatrix::share(s, &at("w1"), Role::Client, give(Role::Client), 3, 4, K, 0)?,
        SharedMatrix::share(s, &at("w2"), Role::Helper, give(Role::Helper), 3, 4, K, 0)?,
    ];
    let (send, receive) = channel();
    send.send(vec![3, 1, 4, 1]).unwrap();
    let given = source(receive);
    let v = masked::input(s, &at("v"), &Rows::even(1, 4), K, 0, (me == Role::Client).then_some(&given))?;
    shared_linear(s, &at("linear1"), &v, &matrices[0])?.finish(s)?;
    shared_linear(s, &at("linear2"), &v, &matrices[1])?.finish(s)?;
    Ok(())
}

/// A masked value materialised: apart, because the Helper's walk receives here.
fn materialised(s: &mut Session) -> Result<()> {
    let (send, receive) = channel();
    send.send(vec![3, 1, 4, 1]).unwrap();
    let given = source(receive);
    let v = masked::input(s, &Scope::new("v"), &Rows::even(1, 4), K, 0, (s.role() == Role::Client).then_some(&given))?;
    materialise(s, &Scope::new("materialise"), &v, &[4])?;
    Ok(())
}

fn width(step: &Address) -> Option<u32> {
    match (step.label, step.path.as_str()) {
        ("msb.bits" | "monomials", _) => None,
        ("reshare.z" | "open.x" | "input_bits.x", path) if path.starts_with("and") || path == "open b" => Some(11),
        ("input_bits.x", _) => Some(11),
        // The levels of the comparison's tree have widths of their own.
        ("reshare.z", path) if path.contains("less") || path.contains("msb") => None,
        _ => Some(K),
    }
}

fn look(what: &str, program: fn(&mut Session) -> Result<()>, receivers: &[Role]) {
    for &receiver in receivers {
        let (keys, mut draw, log) = (Keys::seeded(70), Draw::new(71), AddressLog::default());
        let (mut tally, mut names) = (Tally::default(), Names::default());
        for i in 0..RUNS {
            let keys = keys.clone().with(others(receiver), draw.key());
            let got = observe(receiver, &keys, &[1], (i == 0).then_some(&log), program);
            if i == 0 {
                names = Names::from(&log, &["open y", "open z", "open b"]);
            }
            let mut run: Vec<Message> = named(&names, got, width);
            run.extend(combined(&run));
            tally.add(&run);
        }
        tally.assert_uniform(&format!("{what}, {receiver}"));
    }
}

#[test]
fn the_base_shows_nothing() {
    look("base", program, &Role::ALL);
    look("materialised", materialised, &[Role::Owner, Role::Helper]);
}
