//! Three parties in one process multiply two fixed-point matrices, compare the result with a bound and open both.
//!
//! The Client gives `x`, the Owner `w`, the Helper the bound; nobody sees what another one gave.
//! `cargo run --release --example replicated`

use ndarray::{ArrayD, IxDyn};
use trefoil::protocol::replicated::boolean::open_bits;
use trefoil::protocol::replicated::{input, less_than, matmul, open, relu};
use trefoil::session::{Scope, Session};
use trefoil::{Result, Role, ring::fixed, world::Keys, world::Setup, world::World};

/// Ring width and fraction bits.
const K: u32 = 64;
const F: u32 = 12;

fn encode(rows: &[[f64; 2]], f: u32) -> ArrayD<u64> {
    ArrayD::from_shape_fn(IxDyn(&[rows.len(), 2]), |i| fixed::encode(rows[i[0]][i[1]], f, K))
}

/// What everyone learns: the product, where it lies below the bound, and its positive part.
struct Opened {
    y: ArrayD<u64>,
    below: ArrayD<u64>,
    positive: ArrayD<u64>,
}

/// Every party runs this.
fn program(s: &mut Session) -> Result<Opened> {
    let x = (s.role() == Role::Client).then(|| encode(&[[1.5, -2.0], [0.25, 3.0], [-1.0, -1.0]], F));
    let w = (s.role() == Role::Owner).then(|| encode(&[[4.0, 0.5], [-1.0, 2.0]], F));
    let bound = (s.role() == Role::Helper).then(|| encode(&[[0.0, 0.0], [0.0, 6.0], [-2.5, -3.5]], 2 * F));

    let x = input(s, &Scope::new("x"), Role::Client, x.as_ref(), &[3, 2], K, F)?;
    let w = input(s, &Scope::new("w"), Role::Owner, w.as_ref(), &[2, 2], K, F)?;
    let bound = input(s, &Scope::new("bound"), Role::Helper, bound.as_ref(), &[3, 2], K, 2 * F)?;

    let y = matmul(s, &Scope::new("y"), &x, &w)?;
    let below = less_than(s, &Scope::new("below"), &y, &bound)?;
    let positive = relu(s, &Scope::new("relu"), &y)?;
    Ok(Opened {
        y: open(s, &Scope::new("open.y"), &y)?,
        below: open_bits(s, &Scope::new("open.below"), &below)?,
        positive: open(s, &Scope::new("open.positive"), &positive)?,
    })
}

fn main() -> Result<()> {
    let world = World::new(Keys::fresh()?, &Setup::default());
    let out = world.run(1, &[1], program)?.client;
    let decode = |x: &ArrayD<u64>| x.mapv(|v| fixed::decode(v, 2 * F, K));
    println!("x w =\n{}", decode(&out.y));
    println!("below the bound:\n{}", out.below);
    println!("max(x w, 0) =\n{}", decode(&out.positive));
    for from in Role::ALL {
        for to in [from.next(), from.prev()] {
            let sent = world.sent(from, to);
            println!("{from} -> {to}: {} bytes in {} messages", sent.online_bytes, sent.messages);
        }
    }
    Ok(())
}
