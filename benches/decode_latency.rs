//! Milliseconds per decoded token: one random-weight layer by shape and context, and the bundled model by private layers
//! and network. All three parties run in this process and share its cores; every figure is sustained from cold: the
//! run-ahead work is inside it.

use std::path::Path;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use trefoil::bench::{Harness, Preset};
use trefoil::generate::{Local, LocalOptions};
use trefoil::net::shape::Profile;
use trefoil::world::Setup;

/// Tokens of one batch of run-ahead, as in a generation.
const TOKENS: usize = 8;

fn peak_memory_mb() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let kb = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap_or("0");
    kb.trim().trim_end_matches("kB").trim().parse::<f64>().unwrap_or(0.0) / 1024.0
}

fn one_layer(c: &mut Criterion) {
    let setup = Setup { ahead_capacity: 1 << 30, ..Setup::default() };
    let prepared = |name: &str, context: usize| {
        let config = Preset::find(name).expect("a preset").config(1, context + 1);
        Harness::new(config, setup.clone()).expect("a prepared layer")
    };
    for (name, context) in [("h768", 128), ("h768", 512), ("h2048", 128), ("h2048", 512)] {
        let layer = prepared(name, context + TOKENS);
        let one = layer.run(context - 1, &[1]).expect("a pass");
        eprintln!(
            "{name} context {context}: {} online bytes, {} run-ahead bytes, {} messages in sequence, peak {:.0} MB",
            one.online_bytes(),
            one.ahead_bytes(),
            one.depth,
            peak_memory_mb()
        );
        let mut g = c.benchmark_group("decode layer, per token");
        g.sample_size(10).measurement_time(Duration::from_secs(8)).warm_up_time(Duration::from_secs(1));
        g.bench_function(BenchmarkId::new(name, context), |b| {
            b.iter_custom(|n| {
                (0..n).map(|_| layer.run(context - 1, &[1; TOKENS]).expect("passes").wall / TOKENS as u32).sum()
            });
        });
        g.finish();
    }
    let layer = prepared("h768", 128);
    let one = layer.run(0, &[128]).expect("a pass");
    eprintln!("h768 prefill 128: {} online bytes, {} run-ahead bytes", one.online_bytes(), one.ahead_bytes());
    let mut g = c.benchmark_group("prefill layer, 128 tokens");
    g.sample_size(10).measurement_time(Duration::from_secs(10)).warm_up_time(Duration::from_secs(1));
    g.bench_function("h768", |b| b.iter_custom(|n| (0..n).map(|_| layer.run(0, &[128]).expect("a pass").wall).sum()));
    g.finish();
}

fn bundled(c: &mut Criterion) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/quill-4m");
    let prompts = [8usize, 64, 192];
    for (private, label) in [(Some(4), "half"), (None, "all")] {
        for (net, profile) in [("none", Profile::NONE), ("lan", Profile::LAN), ("wan", Profile::WAN)] {
            let mut g = c.benchmark_group("decode quill-4m, per token");
            g.sample_size(10).measurement_time(Duration::from_secs(5)).warm_up_time(Duration::from_millis(500));
            for &prompt in &prompts {
                if net == "wan" && prompt != 8 {
                    continue;
                }
                let mut local = Local::open(&dir, LocalOptions::new(private).net(profile)).expect("the bundled model");
                let ids: Vec<u32> = (0..prompt as u32).map(|i| 300 + i).collect();
                let tokens = if net == "wan" { 3 } else { 17 };
                g.bench_function(BenchmarkId::new(format!("{label}/{net}"), prompt), |b| {
                    b.iter_custom(|n| {
                        (0..n)
                            .map(|_| {
                                let out = local.generate(&ids, tokens, 0.0, 0, false, &mut |_| true);
                                let out = out.expect("a generation");
                                out.decode.iter().sum::<Duration>() / out.decode.len().max(1) as u32
                            })
                            .sum()
                    });
                });
                local.finish().expect("the session's end");
            }
            g.finish();
        }
    }
}

criterion_group!(benches, one_layer, bundled);
criterion_main!(benches);
