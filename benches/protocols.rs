//! The operations of the masked engine, three parties in one process without a simulated network: time per call, and once
//! the bytes and messages of each. `cargo bench --bench protocols`.

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use ndarray::Array2;
use trefoil::Result;
use trefoil::net::shape::Profile;
use trefoil::party::Role;
use trefoil::plan::{Radices, Setting};
use trefoil::prf::PreparationSeed;
use trefoil::protocol::argmax::argmax;
use trefoil::protocol::compare::is_negative;
use trefoil::protocol::lift::lift;
use trefoil::protocol::linear::{OwnerMatrix, owner_linear};
use trefoil::protocol::lookup::{self, Table};
use trefoil::protocol::polynomial::polynomial;
use trefoil::protocol::product::{Elementwise, product};
use trefoil::protocol::truncate::truncate;
use trefoil::protocol::window::{Digits, Window};
use trefoil::protocol::{embedding::source, input};
use trefoil::session::{Scope, Session};
use trefoil::share::{Masked, Rows};
use trefoil::world::{Keys, Setup, World};

/// Elements of the elementwise operations.
const N: usize = 1 << 16;

/// Times `program` over `tokens` tokens of `width` input elements each (of ring `k`), in one pass. The input is part of the
/// time: a message of `k` bits per element.
fn operation(
    c: &mut Criterion,
    name: &str,
    elements: usize,
    (tokens, width, k): (usize, usize, u32),
    program: impl Fn(&mut Session, Masked) -> Result<Masked> + Sync,
) {
    let world = World::new(Keys::seeded(1), &Setup::default());
    let pass = AtomicU64::new(0);
    let x: Vec<u64> = (0..(tokens * width) as u64).map(|i| i.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (66 - k)).collect();
    let once = || {
        let (send, receive) = std::sync::mpsc::channel();
        send.send(x.clone()).expect("the receiver is here");
        let source = source(receive);
        let first = pass.fetch_add(1, Ordering::Relaxed);
        let run = world.run(first, &[tokens], |s| {
            let source = (s.role() == Role::Client).then_some(&source);
            let x = input::input(s, &Scope::new("x"), &Rows::even(tokens, width), k, 12, source)?;
            let y = program(s, x)?;
            Ok((y, s.declared()))
        });
        run.expect("three honest parties")
    };
    let cost = once().owner[0].1;
    let given = input::cost(tokens * width, k).online(Role::Client, Role::Owner);
    let [up, down] = [(Role::Owner, Role::Helper), (Role::Helper, Role::Owner)].map(|(a, b)| cost.online(a, b));
    println!(
        "{name}: {} bytes up in {} messages, {} down in {}, {} ahead; {} for the input",
        up.bytes,
        up.messages,
        down.bytes,
        down.messages,
        cost.ahead_bytes(),
        given.bytes
    );
    let mut group = c.benchmark_group("protocols");
    group.throughput(Throughput::Elements(elements as u64));
    group.bench_function(name, |b| b.iter(|| black_box(once())));
    group.finish();
}

fn elementwise(c: &mut Criterion) {
    operation(c, "input", N, (1, N, 44), |_, x| Ok(x));
    operation(c, "multiply_truncate_44", N, (1, N, 44), |s, x| {
        truncate(&product(s, &Scope::new("xx"), &x, &x, Arc::new(Elementwise))?.finish(s)?, 12)
    });
    let table = Table::cyclic(&(0..256u64).map(|i| i * i).collect::<Vec<_>>());
    operation(c, "lookup_256_rows", N, (1, N, 8), |s, x| {
        let tables = std::slice::from_ref(&table);
        let mut out = lookup::words(s, &Scope::new("t"), &Digits::cut(&x, 0, 8)?, tables, &[0], 44)?.finish(s)?;
        Ok(out.remove(0))
    });
    operation(c, "lift_28_64", N, (1, N, 28), |s, x| lift(s, &Scope::new("lift"), &x, 64)?.finish(s));
    operation(c, "compare_16", N, (1, N, 16), |s, x| is_negative(s, &Scope::new("sign"), &x, 64)?.finish(s));
    // The gate of SwiGLU: a line per interval of 9 bits, then u (a + b lo) in one exchange; u is the gate's input here.
    let line = [21, 12].map(|f| Table::cyclic(&(0..512u64).map(|i| i << (f - 9)).collect::<Vec<_>>()));
    operation(c, "line_polynomial_512_rows", N, (1, N, 18), |s, x| {
        let w = Window::of(&x, 0, 9, 9)?;
        let looked = lookup::words(s, &Scope::new("line"), &w.hi, &line, &[21, 12], 64)?;
        let u = lift(s, &Scope::new("lift"), &x, 64)?.finish(s)?;
        let ab = looked.finish(s)?;
        let operands = [&u, &ab[0], &ab[1], &w.lo.integer(64, 9)];
        truncate(&polynomial(s, &Scope::new("p"), &operands, &[&[0, 1], &[0, 2, 3]])?.finish(s)?, 21)
    });
}

fn linear(c: &mut Criterion) {
    for (tokens, outputs, inputs) in [(1, 2048, 2048), (128, 768, 768)] {
        let w = Array2::from_shape_fn((outputs, inputs), |(i, j)| (i * 31 + j * 17) as f32 % 200.0 / 128.0 - 0.7);
        let seed = PreparationSeed::from_bytes([3; 32]);
        let owner = OwnerMatrix::quantise(1, "w", w.view(), None, 12).expect("small weights");
        let a = owner.helper_words(&seed).expect("the owner's part");
        let helper = OwnerMatrix::helper(1, outputs, inputs, 12, a).expect("as many words");
        let parts = [owner, OwnerMatrix::client(1, outputs, inputs, 12, seed), helper];
        let name = format!("owner_linear_{tokens}x{outputs}x{inputs}");
        operation(c, &name, tokens * outputs * inputs, (tokens, inputs, 52), |s, x| {
            owner_linear(s, &Scope::new("w"), &x, &parts[s.role().index()])
        });
    }
}

fn tournament(c: &mut Criterion) {
    for n in [2048, 32_000] {
        let fastest = |net| Radices::fastest(n, 19, &Setting::of(net, None));
        for radices in [Radices::same(4), Radices::same(8), fastest(Some(Profile::NONE)), fastest(Some(Profile::WAN))] {
            operation(c, &format!("argmax_{n}_radix_{radices}"), n, (1, n, 19), |s, x| {
                argmax(s, &Scope::new("head"), &x, radices.each(), &mut |_| Ok(()))
            });
        }
    }
}

criterion_group! {
    name = protocols;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(700));
    targets = elementwise, linear, tournament
}
criterion_main!(protocols);
