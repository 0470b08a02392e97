//! Planted faults: weights and prompts that drive values out of the plan. The tokens are right, a range flag stops the
//! generation, or the model is refused when it is prepared. Which of the three, and by what name, `faults.txt` states for every
//! group of cases, and the one case on record in which the activation's error, magnified 4000 times, may change a token.

#[path = "support/models.rs"]
mod models;

use std::collections::BTreeMap;
use std::time::Instant;

use models::{codec, default_ids, fixture, load, once, options, quill};
use ndarray::Array1;
use trefoil::Error;
use trefoil::generate::{LocalOptions, check};
use trefoil::model::rounding::{self, Choice};
use trefoil::model::{LayerWeights, Linear, Weights};
use trefoil::plan::block::LEAST_ROWS;

/// A token of the bundled model that no calibration here reads, unless it is told to.
const RARE: u32 = 2001;
/// Positions in all of these tests: calibration, whose inputs have the context's length, is quick.
const CONTEXT: usize = 24;

/// The bundled model's first, fourth and last layer: a fault in one of them has to pass what follows, at a third of the time.
fn three_layers() -> Weights {
    let mut w = load(&quill());
    w.layers = [0, 3, 7].map(|i| w.layers[i].clone()).to_vec();
    w.config.num_layers = 3;
    w
}

/// Ids on which calibration is told to look; the rare token is not among them.
fn text() -> Vec<u32> {
    default_ids().into_iter().filter(|&t| t != RARE).take(2 * CONTEXT).collect()
}

/// How many cases of a group ended how: `right`, or `stopped` or `refused` with the layer and the quantity.
type Outcomes = BTreeMap<String, usize>;

#[derive(Default)]
struct Table {
    groups: BTreeMap<String, Outcomes>,
    wrong: Vec<String>,
    max_kl: f64,
}

/// What an error at preparation is about, without its numbers.
fn about(text: &str) -> &str {
    let end = [" may reach", ": a weight beyond", ": rounding"].iter().filter_map(|at| text.find(at)).min();
    &text[..end.unwrap_or(text.len())]
}

impl Table {
    /// Runs a case and counts its outcome under `group`. Right is what the float twin says of the numbers that are multiplied:
    /// the weights as rounded, which a planted row magnifies in both alike.
    fn case(&mut self, group: &str, what: &str, w: &Weights, ids: Option<Vec<u32>>, o: LocalOptions, prompt: &[u32]) {
        let private = o.private_layers;
        let outcome = match once(w, ids, o, prompt, 3) {
            Ok((g, _)) => {
                let first = private.map_or(0, |n| w.config.num_layers - n);
                let f = Choice::new(w, first, private.is_none()).unwrap().fractions;
                let twin = rounding::as_multiplied(w, first, private.is_none(), &f).unwrap();
                let c = check(&twin, prompt, &g, false);
                self.max_kl = self.max_kl.max(c.max_kl);
                if c.agree == c.of && c.max_kl < KL {
                    "right".to_owned()
                } else {
                    // On record in faults.txt or a failure.
                    eprintln!("{group}: {what}: {c:?}");
                    "imprecise".to_owned()
                }
            }
            Err(Error::Range { layer, quantity }) => format!("stopped: layer {layer}: {quantity}"),
            Err(Error::Model(text)) => format!("refused: {}", about(&text)),
            Err(e) => {
                self.wrong.push(format!("{group}: {what}: {e}"));
                return;
            }
        };
        eprintln!("{group}: {what}: {outcome}");
        *self.groups.entry(group.to_owned()).or_default().entry(outcome).or_default() += 1;
    }

    /// Compares with what `tests/faults.txt` says of each group: `test | group | outcome x count; ...`. A group that ends in one
    /// way or another, by the masks that are drawn, has a line for each.
    fn finish(self, name: &str, start: Instant) {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/faults.txt");
        let expected = std::fs::read_to_string(file).unwrap();
        eprintln!("{name}: {:.1} s, max KL {:.1e}", start.elapsed().as_secs_f64(), self.max_kl);
        let mut wrong = self.wrong;
        let mut said: Vec<&str> = expected.lines().filter(|l| l.starts_with(&format!("{name} | "))).collect();
        for (group, outcomes) in &self.groups {
            let all: Vec<String> = outcomes.iter().map(|(o, n)| format!("{o} x {n}")).collect();
            let line = format!("{name} | {group} | {}", all.join("; "));
            eprintln!("{line}");
            if said.contains(&line.as_str()) {
                said.retain(|s| !s.starts_with(&format!("{name} | {group} | ")));
            } else {
                wrong.push(format!("not expected: {line}"));
            }
        }
        wrong.extend(said.iter().map(|s| format!("expected: {s}")));
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }
}

/// Largest divergence of what counts as right. Values far from the usual cost precision, and differently from run to run (up to
/// 2e-3 was seen); a value that has left its ring is off by 0.3 and more.
const KL: f64 = 1e-2;

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
    let (w, text, start, mut table) = (three_layers(), text(), Instant::now(), Table::default());
    for name in MATRICES {
        for (layer, by) in [(0, 4000.0), (1, 4000.0), (2, 4000.0), (0, 30.0), (1, 300.0)] {
            let planted = scaled(&w, layer, name, 5, by);
            let private = if layer == 1 { Some(2) } else { None };
            table.case(
                name,
                &format!("layer {layer}, row x {by}"),
                &planted,
                Some(text.clone()),
                options(private, CONTEXT),
                &prompt(),
            );
        }
    }
    for name in ["o", "down"] {
        // Whole matrices: the residual stream's ring grows, and leaves less to the values that end in it.
        for by in [30.0, 300.0, 3000.0] {
            let mut planted = w.clone();
            matrix(&mut planted.layers[2], name).w *= by;
            table.case(
                &format!("all of {name}"),
                &format!("x {by}"),
                &planted,
                Some(text.clone()),
                options(None, CONTEXT),
                &prompt(),
            );
        }
    }
    for by in [30.0, 4000.0, 4e6] {
        let mut planted = w.clone();
        planted.head.as_mut().unwrap().row_mut(281).mapv_inplace(|v| v * by);
        table.case("lm_head", &format!("x {by}"), &planted, Some(text.clone()), options(Some(2), CONTEXT), &prompt());
        for private in [None, Some(3)] {
            let mut planted = w.clone();
            planted.embed.row_mut(prompt()[2] as usize).mapv_inplace(|v| v * by);
            table.case(
                "embedding",
                &format!("x {by}"),
                &planted,
                Some(text.clone()),
                options(private, CONTEXT),
                &prompt(),
            );
        }
    }
    table.finish("rows scaled before calibration", start);
}

#[test]
fn a_row_that_calibration_has_not_seen() {
    let (w, text, start, mut table) = (with_rare(&three_layers(), 1.0), text(), Instant::now(), Table::default());
    let prompt = around_the_rare_token();
    for name in ["q", "k", "v", "gate", "up"] {
        for (layer, value) in [(0, 4000.0), (2, 4000.0), (0, 40.0), (1, 400.0)] {
            let mut planted = w.clone();
            answer(&mut planted, layer, name, 5, value);
            let private = if layer == 1 { Some(2) } else { None };
            table.case(
                name,
                &format!("layer {layer}, {value}"),
                &planted,
                Some(text.clone()),
                options(private, CONTEXT),
                &prompt,
            );
        }
    }
    for name in ["o", "down"] {
        for (layer, by) in [(0, 4000.0), (1, 400.0), (2, 40.0)] {
            // The rare token's value or gate fires, and the row of o or down carries it on, 100 times as usual.
            let mut planted = scaled(&w, layer, name, 5, by);
            answer(&mut planted, layer, if name == "o" { "v" } else { "up" }, 5, 50.0);
            table.case(
                name,
                &format!("layer {layer}, x {by}"),
                &planted,
                Some(text.clone()),
                options(None, CONTEXT),
                &prompt,
            );
        }
    }
    // The score of the rare token with itself, to about value^2 / sqrt(24).
    for value in [12.0, 25.0, 50.0, 1000.0] {
        for layer in [0, 2] {
            let mut planted = w.clone();
            answer(&mut planted, layer, "q", 5, value);
            answer(&mut planted, layer, "k", 5, value);
            table.case(
                "score up",
                &format!("layer {layer}, {value}"),
                &planted,
                Some(text.clone()),
                options(Some(3 - layer), CONTEXT),
                &prompt,
            );
            answer(&mut planted, layer, "k", 5, -value);
            table.case(
                "score down",
                &format!("layer {layer}, {value}"),
                &planted,
                Some(text.clone()),
                options(Some(3 - layer), CONTEXT),
                &prompt,
            );
        }
    }
    // In the first block of a prompt that goes through attention in two: flags of all blocks count.
    for value in [12.0, 50.0] {
        let mut planted = w.clone();
        answer(&mut planted, 0, "q", 5, value);
        answer(&mut planted, 0, "k", 5, value);
        let long: Vec<u32> = prompt.iter().chain(&text).copied().take(40).collect();
        assert!(long.iter().rposition(|&t| t == RARE).unwrap() < LEAST_ROWS);
        let o = LocalOptions { block_scores: Some(1), ..options(Some(3), 2 * CONTEXT) };
        table.case("score up, in blocks", &format!("{value}"), &planted, Some(text.clone()), o, &long);
    }
    for times in [0.0, 1e-2, 100.0, 1e4, 1e9] {
        for private in [Some(3), Some(1), None] {
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
    let (w, start, mut table) = (three_layers(), Instant::now(), Table::default());
    let prompt = around_the_rare_token();
    // Calibration sees the rare token, so that only proofs stand between it and a wrong result.
    let text: Vec<u32> = prompt.iter().copied().cycle().take(2 * CONTEXT).collect();
    for times in [1.0, 300.0, 2000.0] {
        // Large embeddings leave little room behind the norms.
        let mut large = with_rare(&w, 1.0);
        large.embed *= times;
        table.case(
            "large residual stream",
            &format!("x {times}"),
            &large,
            Some(text.clone()),
            options(None, CONTEXT),
            &prompt,
        );
        for name in ["q", "k", "v", "up", "gate"] {
            for value in [700.0, 12_000.0] {
                let mut planted = large.clone();
                answer(&mut planted, 1, name, 5, value);
                if name == "up" || name == "gate" {
                    planted.layers[1].down.w.column_mut(5).fill(1.0 / 4096.0);
                }
                table.case(
                    &format!("{name} with embeddings x {times}"),
                    &format!("{value}"),
                    &planted,
                    Some(text.clone()),
                    options(Some(2), CONTEXT),
                    &prompt,
                );
            }
        }
    }
    table.finish("values near the proven bounds", start);
}

/// Queries and keys that have norms of their own may be large before them; and prompts unlike the calibration text.
#[test]
fn head_norms_and_prompts_unlike_the_calibration() {
    let (start, mut table) = (Instant::now(), Table::default());
    let dir = fixture("qwen3-qknorm");
    let w = load(&dir);
    let ids: Vec<u32> = (3..23).collect();
    for by in [30.0, 4000.0, 1e6] {
        for name in ["q", "k"] {
            let planted = scaled(&w, 1, name, 3, by);
            table.case(
                &format!("{name} before its norm"),
                &format!("x {by}"),
                &planted,
                None,
                options(None, CONTEXT),
                &ids,
            );
            let mut planted = w.clone();
            matrix(&mut planted.layers[1], name).w *= by;
            table.case(
                &format!("all of {name} before its norm"),
                &format!("x {by}"),
                &planted,
                None,
                options(None, CONTEXT),
                &ids,
            );
            let mut planted = w.clone();
            let l = &mut planted.layers[0];
            let gain = if name == "q" { &mut l.q_norm } else { &mut l.k_norm };
            gain.as_mut().unwrap()[2] *= by;
            table.case(&format!("gain of {name}"), &format!("x {by}"), &planted, None, options(None, CONTEXT), &ids);
        }
    }
    let w = three_layers();
    let mut state = 12345u64;
    let mut random = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 40) as u32 % 2048
    };
    let mut prompts: Vec<Vec<u32>> = (0..4).map(|_| (0..20).map(|_| random()).collect()).collect();
    prompts.extend([vec![0; 20], vec![1; 20], vec![2047; 20], vec![263; 20], (0..20).map(|i| 2047 - i).collect()]);
    for p in prompts {
        // Calibrated on one word, all over.
        table.case(
            "prompt unlike the calibration",
            &format!("{p:?}"),
            &w,
            Some(vec![372; 20]),
            options(None, CONTEXT),
            &p,
        );
    }
    table.finish("head norms, strange prompts", start);
}

/// Weights that never went through a file are checked all the same.
#[test]
fn weights_that_are_no_numbers_are_refused() {
    let w = load(&fixture("llama-plain"));
    let refused = |w: &Weights, part: &str| {
        let e = once(w, None, options(None, CONTEXT), &[1, 2, 3], 2)
            .expect_err("weights that are no numbers were accepted");
        assert!(matches!(&e, Error::Model(text) if text.contains(part)), "{e}");
    };
    for bad in [f32::NAN, f32::INFINITY, f32::MAX] {
        let mut planted = w.clone();
        planted.layers[1].down.w[[3, 4]] = bad;
        refused(&planted, "layer 1");
        let mut planted = w.clone();
        planted.embed[[3, 4]] = bad;
        refused(&planted, "");
        let mut planted = w.clone();
        planted.norm[3] = bad;
        refused(&planted, "head");
        let mut planted = w.clone();
        planted.layers[0].post_norm[3] = bad;
        refused(&planted, "layer 0");
    }
}
