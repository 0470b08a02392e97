//! Predicted bytes and messages are those of a real run.

#[path = "support/models.rs"]
mod models;

use trefoil::Role;
use trefoil::generate::{Local, LocalOptions};
use trefoil::model::Weights;
use trefoil::predict::walk::walk;

#[track_caller]
fn same(weights: Weights, text: Option<Vec<u32>>, private: Option<usize>, prompt: &[u32], new: usize) {
    let options = LocalOptions { max_positions: Some(prompt.len() + new), ..LocalOptions::new(private) };
    let mut local = Local::start(weights.clone(), text, options).unwrap();
    let before = Role::ALL.map(|a| Role::ALL.map(|b| local.world().sent(a, b)));
    let out = local.generate(prompt, new, 0.0, 0, false, &mut |_| true).unwrap();
    assert_eq!(out.tokens.len(), new);
    let after = Role::ALL.map(|a| Role::ALL.map(|b| local.world().sent(a, b)));
    let plan = local.plan().clone();
    // The run-ahead's end is sent after the last token.
    let world_links = std::time::Instant::now();
    local.finish().unwrap();
    let _ = (after, world_links);
    let mut config = weights.config.clone();
    config.max_positions = plan.max_positions;
    let start = std::time::Instant::now();
    let w = walk(&config, &plan, prompt.len(), new - 1).unwrap();
    eprintln!("walk {:?}, depth {} + {}, layers {:?}", start.elapsed(), w.prefill.depth, w.decode.depth, w.layer_messages);
    let total = w.total();
    for from in Role::ALL {
        for to in Role::ALL.into_iter().filter(|&to| to != from) {
            let (i, j) = (from.index(), to.index());
            eprintln!("{from}->{to}: {:?} {:?}", after[i][j] - before[i][j], total[i][j]);
        }
    }
}

#[test]
fn bundled() {
    let w = models::load(&models::quill());
    let ids = models::default_ids();
    same(w.clone(), Some(ids.clone()), Some(4), &ids[..7], 5);
    same(w, Some(ids.clone()), None, &ids[..7], 40);
}
