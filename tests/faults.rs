//! Planted faults: weights and prompts that drive values out of the plan. The tokens are right, a range flag stops the
//! generation, or the model is refused when it is prepared; never a wrong token. The outcomes are counted and printed.

#[path = "support/models.rs"]
mod models;

use std::collections::BTreeMap;
use std::time::Instant;

use models::{codec, default_ids, is_right, load, once, options, quill};
use ndarray::Array1;
use trefoil::Error;
use trefoil::generate::LocalOptions;
use trefoil::model::{LayerWeights, Linear, Weights};

/// A token of the bundled model that no calibration here reads, unless it is told to.
const RARE: u32 = 2001;
/// Positions in all of these tests: calibration, whose inputs have the context's length, is quick.
const CONTEXT: usize = 24;

/// Ids on which calibration is told to look; the rare token is not among them.
fn text() -> Vec<u32> {
    default_ids().into_iter().filter(|&t| t != RARE).take(2 * CONTEXT).collect()
}

#[derive(Default)]
struct Tally {
    right: usize,
    stopped: usize,
    refused: usize,
    max_kl: f64,
}

#[derive(Default)]
struct Table {
    rows: BTreeMap<String, Tally>,
    wrong: Vec<String>,
}

impl Table {
    /// Runs a case and counts its outcome under `group`.
    fn case(&mut self, group: &str, what: &str, w: &Weights, ids: Option<Vec<u32>>, o: LocalOptions, prompt: &[u32]) {
        let row = self.rows.entry(group.to_owned()).or_default();
        match once(w, ids, o, prompt, 3) {
            Ok((_, c)) if is_right(&c) => {
                row.right += 1;
                row.max_kl = row.max_kl.max(c.max_kl);
                if c.max_kl > 1e-3 {
                    eprintln!("{group}: {what}: right, but {c:?}");
                }
            }
            Ok((g, c)) => self.wrong.push(format!("{group}: {what}: silently wrong: {:?} {c:?}", g.tokens)),
            Err(Error::Range { layer, quantity }) => {
                row.stopped += 1;
                if layer.is_empty() || quantity.is_empty() {
                    self.wrong.push(format!("{group}: {what}: a flag without a name"));
                }
            }
            Err(Error::Model(text)) if text.starts_with("layer ") || text.starts_with("the head") || text.starts_with("lm_head") || text.starts_with("the embedding") => {
                row.refused += 1;
            }
            Err(e) => self.wrong.push(format!("{group}: {what}: {e}")),
        }
    }

    fn finish(self, name: &str, start: Instant) {
        eprintln!("{name}: {:.1} s", start.elapsed().as_secs_f64());
        eprintln!("{:<44} {:>6} {:>8} {:>8}  max KL", "", "right", "stopped", "refused");
        for (group, t) in &self.rows {
            eprintln!("{group:<44} {:>6} {:>8} {:>8}  {:.1e}", t.right, t.stopped, t.refused, t.max_kl);
        }
        assert!(self.wrong.is_empty(), "{}", self.wrong.join("\n"));
    }
}

const MATRICES: [&str; 7] = ["q", "k", "v", "o", "gate", "up", "down"];

fn matrix<'a>(l: &'a mut LayerWeights, name: &str) -> &'a mut Linear {
    match name {
        "q" => &mut l.q,
        "k" => &mut l.k,
        "v" => &mut l.v,
        "o" => &mut l.o,
        "gate" => &mut l.gate,
        "up" => &mut l.up,
        _ => &mut l.down,
    }
}

fn scaled(w: &Weights, layer: usize, name: &str, row: usize, by: f32) -> Weights {
    let mut w = w.clone();
    matrix(&mut w.layers[layer], name).w.row_mut(row).mapv_inplace(|v| v * by);
    w
}

fn prompt() -> Vec<u32> {
    codec().encode("It was a bright morning, and the").unwrap()
}

/// A direction of the residual stream, a unit vector.
fn direction(n: usize) -> Array1<f32> {
    let d = Array1::from_shape_fn(n, |i| ((i * 37 % 19) as f32 - 9.0) + 0.5);
    let norm = d.dot(&d).sqrt();
    d / norm
}

/// The rare token's embedding points along `direction`, with `times` the size of a usual one.
fn with_rare(w: &Weights, times: f32) -> Weights {
    let mut w = w.clone();
    let usual = (w.embed.iter().map(|v| v * v).sum::<f32>() / w.embed.nrows() as f32).sqrt();
    let row = direction(w.config.hidden_size) * usual * times;
    w.embed.row_mut(RARE as usize).assign(&row);
    w
}

/// A row that answers to the rare token: its output there is about `value`, elsewhere a tenth of it.
fn answer(w: &mut Weights, layer: usize, name: &str, row: usize, value: f32) {
    let n = w.config.hidden_size;
    let l = &mut w.layers[layer];
    let gain = if matches!(name, "q" | "k" | "v") { l.input_norm.clone() } else { l.post_norm.clone() };
    let along = direction(n) * (value / (n as f32).sqrt()) / gain;
    matrix(l, name).w.row_mut(row).assign(&along);
}

fn around_the_rare_token() -> Vec<u32> {
    let mut ids = prompt();
    ids.insert(3, RARE);
    ids.push(RARE);
    ids
}

#[test]
fn a_scaled_row_that_calibration_has_seen() {
    let (w, text, start, mut table) = (load(&quill()), text(), Instant::now(), Table::default());
    for name in MATRICES {
        for (layer, by) in [(0, 4000.0), (4, 4000.0), (7, 4000.0), (0, 30.0), (4, 300.0), (7, 60.0)] {
            let planted = scaled(&w, layer, name, 5, by);
            let private = if layer == 4 { Some(4) } else { None };
            table.case(name, &format!("layer {layer}, row x {by}"), &planted, Some(text.clone()), options(private, CONTEXT), &prompt());
        }
    }
    for by in [30.0, 4000.0, 4e6] {
        let mut planted = w.clone();
        planted.head.as_mut().unwrap().row_mut(281).mapv_inplace(|v| v * by);
        table.case("lm_head", &format!("x {by}"), &planted, Some(text.clone()), options(Some(2), CONTEXT), &prompt());
        for private in [None, Some(8)] {
            let mut planted = w.clone();
            planted.embed.row_mut(prompt()[2] as usize).mapv_inplace(|v| v * by);
            table.case("embedding", &format!("x {by}"), &planted, Some(text.clone()), options(private, CONTEXT), &prompt());
        }
    }
    table.finish("rows scaled before calibration", start);
}

#[test]
fn a_row_that_calibration_has_not_seen() {
    let (w, text, start, mut table) = (with_rare(&load(&quill()), 1.0), text(), Instant::now(), Table::default());
    let prompt = around_the_rare_token();
    for name in ["q", "k", "v", "gate", "up"] {
        for (layer, value) in [(0, 4000.0), (7, 4000.0), (0, 40.0), (4, 400.0)] {
            let mut planted = w.clone();
            answer(&mut planted, layer, name, 5, value);
            let private = if layer == 4 { Some(5) } else { None };
            table.case(name, &format!("layer {layer}, {value}"), &planted, Some(text.clone()), options(private, CONTEXT), &prompt);
        }
    }
    for name in ["o", "down"] {
        for (layer, by) in [(0, 4000.0), (6, 400.0), (7, 40.0)] {
            // The rare token's value or gate fires, and the row of o or down carries it on, 100 times as usual.
            let mut planted = scaled(&w, layer, name, 5, by);
            answer(&mut planted, layer, if name == "o" { "v" } else { "up" }, 5, 50.0);
            table.case(name, &format!("layer {layer}, x {by}"), &planted, Some(text.clone()), options(None, CONTEXT), &prompt);
        }
    }
    // The score of the rare token with itself, to about value^2 / sqrt(24).
    for value in [5.0, 12.0, 25.0, 50.0, 100.0, 300.0, 1000.0] {
        for layer in [0, 7] {
            let mut planted = w.clone();
            answer(&mut planted, layer, "q", 5, value);
            answer(&mut planted, layer, "k", 5, value);
            table.case("score up", &format!("layer {layer}, {value}"), &planted, Some(text.clone()), options(Some(8 - layer), CONTEXT), &prompt);
            answer(&mut planted, layer, "k", 5, -value);
            table.case("score down", &format!("layer {layer}, {value}"), &planted, Some(text.clone()), options(Some(8 - layer), CONTEXT), &prompt);
        }
    }
    for times in [1e-2, 100.0, 1e4, 1e6, 1e9] {
        for private in [Some(8), Some(3), None] {
            let planted = with_rare(&w, times);
            let o = options(private, CONTEXT);
            table.case("embedding", &format!("x {times}, {private:?}"), &planted, Some(text.clone()), o, &prompt);
        }
    }
    table.finish("values that calibration has not seen", start);
}

/// Values near the edge of what bounds on the weights prove: whoever spends a bit too many is wrong here.
#[test]
fn values_at_the_edge_of_what_is_proven() {
    let (w, start, mut table) = (load(&quill()), Instant::now(), Table::default());
    let prompt = around_the_rare_token();
    // Calibration sees the rare token, so that only proofs stand between it and a wrong result.
    let text: Vec<u32> = prompt.iter().copied().cycle().take(2 * CONTEXT).collect();
    for times in [1.0, 30.0, 300.0, 3000.0] {
        // Large embeddings leave little room behind the norms.
        let mut large = with_rare(&w, 1.0);
        large.embed *= times;
        table.case("large residual stream", &format!("x {times}"), &large, Some(text.clone()), options(None, CONTEXT), &prompt);
        for name in ["q", "k", "v", "up", "gate"] {
            for value in [30.0, 200.0, 700.0, 3000.0, 12_000.0] {
                let mut planted = large.clone();
                answer(&mut planted, 1, name, 5, value);
                if name == "up" || name == "gate" {
                    planted.layers[1].down.w.column_mut(5).fill(1.0 / 4096.0);
                }
                table.case(&format!("{name} with embeddings x {times}"), &format!("{value}"), &planted, Some(text.clone()), options(Some(7), CONTEXT), &prompt);
            }
        }
    }
    table.finish("values near the proven bounds", start);
}
