//! Weights are rounded to 12 fraction bits: what that may cost, which weights are refused, and what a refusal says. All of it
//! with the float twin on the rounded weights, which differs from the secure run by the rounding of activations alone.

#[path = "support/models.rs"]
mod models;

use models::{default_ids, fixture, load, quill};
use trefoil::Error;
use trefoil::model::rounding::{self, Loss};
use trefoil::model::{FloatCache, Weights, float};

/// Largest Kullback-Leibler divergence over the positions of a text, `w` to what is multiplied in its place.
fn max_kl(w: &Weights, first: usize, embedding: bool) -> f64 {
    let ids = &default_ids()[..96];
    let rounded = rounding::as_multiplied(w, first, embedding).unwrap();
    let run = |w: &Weights| float::advance(w, ids, &mut FloatCache::new(&w.config), &mut ());
    let (p, q) = (run(w), run(&rounded));
    let softmax = |x: Vec<f32>| {
        let max = x.iter().fold(f64::NEG_INFINITY, |m, &v| m.max(f64::from(v)));
        let sum: f64 = x.iter().map(|&v| (f64::from(v) - max).exp()).sum();
        x.iter().map(|&v| f64::from(v) - max - sum.ln()).collect::<Vec<f64>>()
    };
    p.rows().into_iter().zip(q.rows()).fold(0.0, |m, (p, q)| {
        let (p, q) = (softmax(p.to_vec()), softmax(q.to_vec()));
        let kl: f64 = p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum();
        m.max(kl)
    })
}

/// The losses of one layer's matrix.
fn loss<'a>(losses: &'a [Loss], place: &str, matrix: &str) -> &'a Loss {
    losses.iter().find(|l| l.place == place && l.matrix.ends_with(matrix)).unwrap()
}

/// The same function with other weights: in every layer the three matrices named are made smaller, and their partners larger,
/// until each has lost `part` of its limit.
fn at_the_limit(w: &Weights, first: [bool; 3], part: f64) -> Weights {
    let mut w = w.clone();
    for i in 0..w.layers.len() {
        let place = format!("layer {i}");
        for _ in 0..2 {
            let now = rounding::losses(&w, i, false);
            let by = |names: [&str; 2], first: bool| {
                let l = loss(&now, &place, names[usize::from(!first)]);
                let by = (part * l.limit() / l.all) as f32;
                if first { by } else { 1.0 / by }
            };
            let by = [
                by(["q_proj", "k_proj"], first[0]),
                by(["v_proj", "o_proj"], first[1]),
                by(["up_proj", "down_proj"], first[2]),
            ];
            let l = &mut w.layers[i];
            for ((a, b), by) in
                [(&mut l.q, &mut l.k), (&mut l.v, &mut l.o), (&mut l.up, &mut l.down)].into_iter().zip(by)
            {
                a.w /= by;
                b.w *= by;
            }
        }
    }
    w
}

#[test]
fn what_is_accepted_keeps_the_distribution() {
    let w = load(&quill());
    for first in [[true; 3], [false; 3], [true, false, true], [false, true, false]] {
        let r = at_the_limit(&w, first, 0.97);
        rounding::check(&r, 0, true).unwrap();
        let kl = max_kl(&r, 0, true);
        eprintln!("all layers at the limits, {first:?}: max KL {kl:.1e}");
        assert!(kl < 1e-3, "{first:?}: {kl}");
        let r = at_the_limit(&w, first, 1.1);
        assert!(rounding::check(&r, 0, true).is_err());
    }
    // What no other matrix can make up for: a smaller gate, head or embedding is another model, and keeps itself as well.
    for (what, limit) in [("gate", 0.015), ("head", 0.009), ("embedding", 0.006)] {
        let mut r = w.clone();
        // Some of the weights are multiples of a unit before they are made smaller: not proportional at first.
        for _ in 0..3 {
            let now = rounding::losses(&r, 0, true);
            let by = |l: &Loss| (0.97 * limit / l.all) as f32;
            match what {
                "gate" => (0..8).for_each(|i| r.layers[i].gate.w /= by(loss(&now, &format!("layer {i}"), "gate_proj"))),
                "head" => r.norm /= by(loss(&now, "the head", "lm_head")),
                _ => r.embed /= by(loss(&now, "the embedding", "embed_tokens")),
            }
        }
        rounding::check(&r, 0, true).unwrap();
        let kl = max_kl(&r, 0, true);
        eprintln!("{what} at its limit: max KL {kl:.1e}");
        assert!(kl < 1e-3, "{what}: {kl}");
    }
}

#[track_caller]
fn refused(w: &Weights, first: usize, embedding: bool, parts: &[&str]) {
    let Err(Error::Model(text)) = rounding::check(w, first, embedding) else { panic!("accepted: {parts:?}") };
    for part in parts.iter().copied().chain(["rescale"]) {
        assert!(text.contains(part), "no `{part}` in: {text}");
    }
}

#[test]
fn vanishing_weights_are_refused_by_name() {
    let w = load(&quill());
    let planted = |edit: &dyn Fn(&mut Weights)| {
        let mut w = w.clone();
        edit(&mut w);
        w
    };
    let all = planted(&|w| w.layers[2].v.w /= 300.0);
    refused(&all, 0, false, &["layer 2", "v_proj", "its weights"]);
    rounding::check(&all, 3, false).unwrap();
    refused(&planted(&|w| w.layers[5].post_norm /= 300.0), 4, false, &["layer 5", "gate_proj"]);
    refused(&planted(&|w| w.norm /= 1e4), 8, false, &["the head", "lm_head"]);
    let embed = planted(&|w| w.embed /= 1e3);
    refused(&embed, 0, true, &["the embedding", "embed_tokens"]);
    rounding::check(&embed, 1, false).unwrap();
    // One head whose values are small, and read by large weights; one neuron likewise, on either side.
    let head = planted(&|w| {
        w.layers[1].v.w.slice_mut(ndarray::s![24..48, ..]).mapv_inplace(|v| v / 500.0);
        w.layers[1].o.w.slice_mut(ndarray::s![.., 24..48]).mapv_inplace(|v| v * 500.0);
    });
    refused(&head, 0, false, &["layer 1", "v_proj", "its row"]);
    let neuron = planted(&|w| {
        w.layers[6].up.w.row_mut(7).mapv_inplace(|v| v / 1e3);
        w.layers[6].down.w.column_mut(7).mapv_inplace(|v| v * 1e3);
    });
    refused(&neuron, 0, false, &["layer 6", "up_proj", "its row 7"]);
    let neuron = planted(&|w| {
        w.layers[6].up.w.row_mut(7).mapv_inplace(|v| v * 1e4);
        w.layers[6].down.w.column_mut(7).mapv_inplace(|v| v / 1e4);
    });
    refused(&neuron, 0, false, &["layer 6", "down_proj"]);
    // Rows that are nothing next to the others lose all of themselves and matter to nobody.
    rounding::check(&planted(&|w| w.embed.row_mut(9).fill(1e-9)), 0, true).unwrap();
    rounding::check(&planted(&|w| w.layers[0].gate.w.row_mut(9).fill(1e-9)), 0, true).unwrap();
    let qwen = load(&fixture("qwen3-qknorm"));
    rounding::check(&qwen, 0, true).unwrap();
    let mut gain = qwen.clone();
    *gain.layers[1].q_norm.as_mut().unwrap() /= 1e3;
    refused(&gain, 0, true, &["layer 1", "q_norm"]);
}
