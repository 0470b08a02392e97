//! The times that `trefoil cost` predicts beside measured ones, at shapes and networks that its fit has not seen: the table of
//! `docs/cost.md`. Random weights, three parties in this process. The fastest of three runs counts on both sides.
//! `cargo bench --bench prediction [-- HIDDEN ...]`

use trefoil::bench::{Harness, Pace, Part};
use trefoil::generate::MAX_BATCH;
use trefoil::model::ModelConfig;
use trefoil::net::shape::Profile;
use trefoil::plan::memory::owner_words;
use trefoil::predict::{Phase, Rates, Source, predict};
use trefoil::world::Setup;

/// Hidden size, intermediate size, layers, heads.
const SHAPES: [(usize, usize, usize, usize); 3] = [(448, 1200, 2, 7), (768, 2048, 1, 12), (2048, 5504, 1, 16)];
/// Tokens of a pass, cached positions, passes.
const TESTS: [(usize, usize, usize); 4] = [(16, 0, 1), (128, 0, 1), (1, 32, 16), (1, 400, 16)];
const REPEAT: usize = 3;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // Cargo passes options of its own.
    let asked: Vec<usize> = std::env::args().skip(1).filter_map(|a| a.parse().ok()).collect();
    let rates = Rates::measure()?;
    println!("predicted over measured, {} threads, {}", rates.threads, rates.isa);
    let (mut within, mut cells) = (0, 0);
    println!("| shape | 16 tokens | 128 tokens | decode at 32 | decode at 400 |\n|---|---:|---:|---:|---:|");
    for (hidden, intermediate, layers, heads) in SHAPES {
        if !asked.is_empty() && !asked.contains(&hidden) {
            continue;
        }
        // The fit's own has 1 ms and no limit.
        for net in ["none", "0.3,4", "4,0.5"] {
            let profile: Profile = net.parse()?;
            let config = ModelConfig::llama(hidden, intermediate, layers, heads, 2048, 512);
            let harness = Harness::new(config.clone(), Setup { profile, ..Setup::default() })?;
            let plan = harness.plan().clone();
            let source = Source { owner_bytes: 2 * owner_words(&config, &plan), config, plan };
            for (pace, name, of) in [
                (Pace::Generation([MAX_BATCH; 3]), "from cold", (|p: &Phase| p.one_process_ms) as fn(&Phase) -> f64),
                (Pace::Ready, "ready", |p| p.ready_ms),
            ] {
                let mut row = format!("| hidden {hidden}, {layers} layers, network {net}, {name} |");
                for (tokens, context, passes) in TESTS {
                    let predicted = match tokens {
                        1 => of(&predict(&source, context, passes + 1, profile, rates)?.decode),
                        _ => of(&predict(&source, tokens, 1, profile, rates)?.prefill),
                    };
                    let mut measured = f64::INFINITY;
                    for _ in 0..REPEAT {
                        let m = harness.measure(Part::Whole, pace, context, &vec![tokens; passes])?;
                        measured = measured.min(m.wall.as_secs_f64() * 1e3 / passes as f64);
                    }
                    let off = predicted / measured - 1.0;
                    (within, cells) = (within + usize::from(off.abs() <= 0.3), cells + 1);
                    row += &format!(" {:+.0} % ({measured:.1} ms) |", 100.0 * off);
                }
                println!("{row}");
            }
        }
    }
    println!("\n{within} of {cells} within 30 %");
    Ok(())
}
