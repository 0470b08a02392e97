//! Weights are rounded to 12 fraction bits, or to as many more as small ones need: what that may cost, which weights get more,
//! which are refused, and what a refusal says.

#[path = "support/models.rs"]
mod models;

use models::{default_ids, fixture, greedy, load, options, quill};
use trefoil::Error;
use trefoil::generate::{Local, check};
use trefoil::model::preparation::{Loaded, Options};
use trefoil::model::prepare::Prepared;
use trefoil::model::rounding::{self, Choice, Loss};
use trefoil::model::{FloatCache, LayerWeights, Weights, float};
use trefoil::plan::{FW_LEAST, FW_MOST, Fractions, LayerFractions, Plan};
use trefoil::prf::PreparationSeed;

/// Largest Kullback-Leibler divergence over the positions of a text, `w` to what is multiplied in its place.
fn max_kl(w: &Weights, first: usize, embedding: bool) -> f64 {
    let ids = &default_ids()[..96];
    let fractions = Choice::new(w, first, embedding).unwrap().fractions;
    let rounded = rounding::as_multiplied(w, first, embedding, &fractions).unwrap();
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
        assert!(Choice::new(&r, 0, true).unwrap().small.is_empty());
        let kl = max_kl(&r, 0, true);
        eprintln!("all layers at the limits, {first:?}: max KL {kl:.1e}");
        assert!(kl < 1e-3, "{first:?}: {kl}");
        let r = at_the_limit(&w, first, 1.1);
        assert!(Choice::new(&r, 0, true).is_ok_and(|c| !c.small.is_empty()));
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
        assert!(Choice::new(&r, 0, true).unwrap().small.is_empty());
        let kl = max_kl(&r, 0, true);
        eprintln!("{what} at its limit: max KL {kl:.1e}");
        assert!(kl < 1e-3, "{what}: {kl}");
    }
}

/// `w` with every layer changed.
fn each_layer(w: &Weights, edit: impl FnMut(&mut LayerWeights)) -> Weights {
    let mut w = w.clone();
    w.layers.iter_mut().for_each(edit);
    w
}

/// What a plan says of its matrices.
fn of_plan(p: &Plan) -> Fractions {
    let one = |l: &trefoil::plan::LayerPlan| LayerFractions {
        qkv: l.attention.f_qkv,
        qk_gain: l.attention.f_qk_gain.unwrap_or(FW_LEAST),
        o: l.attention.f_o,
        gate_up: l.mlp.f_gate_up,
        down: l.mlp.f_down,
        ..LayerFractions::default()
    };
    Fractions { layers: p.layers.iter().map(one).collect(), head: p.head.f_weight }
}

/// That a model of small weights gets more bits, that the plan carries them, and that the secure run is the float model's, of the
/// weights as they are meant.
#[track_caller]
fn right_with_more_bits(what: &str, w: &Weights, more: impl Fn(&Fractions) -> bool) {
    let ids = default_ids();
    let choice = Choice::new(w, 0, true).unwrap();
    assert!(more(&choice.fractions) && !choice.small.is_empty(), "{what}: {:?}", choice.fractions);
    let kl = max_kl(w, 0, true);
    let mut local = Local::start(w.clone(), Some(ids.clone()), options(None, 40)).unwrap();
    assert_eq!(of_plan(local.plan()), choice.fractions, "{what}");
    let g = greedy(&mut local, &ids[..16], 8).unwrap();
    local.finish().unwrap();
    let c = check(w, &ids[..16], &g, false);
    eprintln!(
        "{what}: up to {:?} fraction bits, KL of the rounding {kl:.1e}, of the run {:.1e}",
        most(&choice),
        c.max_kl
    );
    assert!(c.agree == c.of && c.of == 8 && c.max_kl < 1e-3 && kl < 1e-3, "{what}: {kl}, {c:?}");
}

fn most(c: &Choice) -> u32 {
    c.fractions.layers.iter().flat_map(|l| [l.qkv, l.qk_gain, l.o, l.gate_up, l.down]).fold(c.fractions.head, u32::max)
}

#[test]
fn small_weights_get_more_bits_and_stay_right() {
    let w = load(&quill());
    assert_eq!(Choice::new(&w, 0, true).unwrap().fractions, Fractions::least(8));
    // Another function, whose weights nothing else makes up for.
    let small = each_layer(&w, |l| l.input_norm /= 4.0);
    right_with_more_bits("input norms", &small, |f| f.layers[0].qkv > FW_LEAST && f.layers[0].o == FW_LEAST);
    let small = each_layer(&w, |l| l.q.w /= 32.0);
    right_with_more_bits("queries", &small, |f| f.layers.iter().all(|l| l.qkv > FW_LEAST + 2));
    let mut small = w.clone();
    small.norm /= 64.0;
    right_with_more_bits("head", &small, |f| f.head > FW_LEAST);
    // The same function, of smaller weights and larger ones that make up for them.
    let small = each_layer(&w, |l| {
        l.q.w /= 8.0;
        l.k.w *= 8.0;
        l.down.w /= 32.0;
        l.up.w *= 32.0;
        l.v.w *= 16.0;
        l.o.w /= 16.0;
    });
    right_with_more_bits("queries, output projection, down", &small, |f| {
        f.layers.iter().all(|l| l.qkv > FW_LEAST && l.o > FW_LEAST && l.down > FW_LEAST && l.gate_up == FW_LEAST)
    });
    // Norms of their own on queries and keys.
    let qwen = load(&fixture("qwen3-qknorm"));
    let small = each_layer(&qwen, |l| *l.q_norm.as_mut().unwrap() /= 256.0);
    let choice = Choice::new(&small, 0, true).unwrap();
    assert!(choice.fractions.layers.iter().all(|l| l.qk_gain > FW_LEAST && l.qkv == FW_LEAST), "{choice:?}");
    let (c, prompt) = (options(None, 32), [3, 1, 4, 1, 5, 9]);
    let mut local = Local::start(small.clone(), None, c).unwrap();
    assert_eq!(of_plan(local.plan()), choice.fractions);
    let g = greedy(&mut local, &prompt, 6).unwrap();
    local.finish().unwrap();
    let c = check(&small, &prompt, &g, false);
    // Random weights: two tokens may be as good as tied.
    assert!(c.of == 6 && c.max_kl < 1e-3 && c.max_logit_error < 0.05, "{c:?}");
}

/// The words of the Helper and the stream of the seed add up to the weights, rounded to as many bits as the plan says.
#[test]
fn the_integers_have_the_plans_fraction() {
    let small = each_layer(&load(&fixture("llama-plain")), |l| l.down.w /= 64.0);
    let loaded = Loaded::new(small.clone(), None, &Options::default()).unwrap();
    let (plan, seed) = (loaded.plan().unwrap(), PreparationSeed::from_bytes([8; 32]));
    let f = plan.layers[1].mlp.f_down;
    assert!(f > FW_LEAST);
    let parts = Prepared::owner(&small, &plan, &seed).unwrap();
    let down = &small.layers[1].down.w;
    // Layer 1, the fifth of its matrices: a layer has 32 numbers.
    let mut b = vec![0; down.len()];
    seed.matrix_words(32 + 4, 0, &mut b);
    let a = parts.layers[1].down.base.helper_words(&seed).unwrap();
    for ((a, b), w) in a.iter().zip(&b).zip(down) {
        let integer = (f64::from(*w) * f64::from(f).exp2()).round() as i64;
        assert_eq!(a.wrapping_add(*b) as i64, integer);
    }
    let too_large = each_layer(&small, |l| l.down.w[[0, 0]] = 1e7);
    let e = Prepared::owner(&too_large, &plan, &seed).err().unwrap().to_string();
    assert!(e.contains("down_proj") && e.contains(&format!("2^{}", 31 - f)) && e.contains(&format!("{f} of")), "{e}");
}

#[test]
fn the_fewest_bits_that_are_enough_are_chosen() {
    let w = load(&quill());
    let of = |by: i32| {
        let mut w = w.clone();
        w.norm *= 2f32.powi(-by);
        Choice::new(&w, 8, false).map(|c| c.fractions.head)
    };
    // As many times halved, rounded to as many bits more: the same loss.
    let first = (0..24).find(|by| of(*by).unwrap() > FW_LEAST).unwrap();
    let past = first + (FW_MOST - FW_LEAST) as i32;
    for by in 0..past {
        assert_eq!(of(by).unwrap(), FW_LEAST + (by + 1 - first).max(0) as u32, "halved {by} times");
    }
    assert!(of(past).is_err());
    // A section has the bits of its neediest matrix.
    let keys = each_layer(&w, |l| l.k.w /= 64.0);
    let both = each_layer(&keys, |l| l.q.w /= 2.0);
    let [keys, both] = [keys, both].map(|w| Choice::new(&w, 0, false).unwrap());
    for (k, b) in keys.fractions.layers.iter().zip(&both.fractions.layers) {
        assert!(k.qkv > FW_LEAST && b.qkv >= k.qkv);
    }
}

#[track_caller]
fn says(e: trefoil::error::Result<()>, parts: &[&str]) {
    let Err(Error::Model(text)) = e else { panic!("accepted: {parts:?}") };
    for part in parts.iter().copied().chain(["rescale"]) {
        assert!(text.contains(part), "no `{part}` in: {text}");
    }
}

#[track_caller]
fn refused(w: &Weights, first: usize, embedding: bool, parts: &[&str]) {
    says(Choice::new(w, first, embedding).map(|_| ()), parts);
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
    refused(&all, 0, false, &["layer 2", "v_proj", "its weights", "12 fraction bits", "would not help"]);
    Choice::new(&all, 3, false).unwrap();
    let mlp = planted(&|w| w.layers[5].post_norm /= 300.0);
    refused(&mlp, 4, false, &["layer 5", "gate_proj", "would not help"]);
    refused(&planted(&|w| w.norm /= 1e8), 8, false, &["the head", "lm_head", "24 fraction bits", "the most"]);
    let embed = planted(&|w| w.embed /= 1e3);
    refused(&embed, 0, true, &["the embedding", "embed_tokens"]);
    Choice::new(&embed, 1, false).unwrap();
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
        w.layers[6].up.w.row_mut(7).mapv_inplace(|v| v * 1e8);
        w.layers[6].down.w.column_mut(7).mapv_inplace(|v| v / 1e8);
    });
    refused(&neuron, 0, false, &["layer 6", "down_proj", "24 fraction bits"]);
    // Rows that are nothing next to the others lose all of themselves and matter to nobody.
    let least = |w: &Weights| assert!(Choice::new(w, 0, true).unwrap().small.is_empty());
    least(&planted(&|w| w.embed.row_mut(9).fill(1e-9)));
    least(&planted(&|w| w.layers[0].gate.w.row_mut(9).fill(1e-9)));
    let qwen = load(&fixture("qwen3-qknorm"));
    least(&qwen);
    let mut gain = qwen.clone();
    *gain.layers[1].q_norm.as_mut().unwrap() /= 1e9;
    refused(&gain, 0, true, &["layer 1", "q_norm"]);
}

/// Enough bits there are, but the ring has no room for them beside what else it carries.
#[test]
fn bits_without_room_are_refused_by_name() {
    let w = load(&quill());
    let plan = |edit: &dyn Fn(&mut LayerWeights)| {
        let mut w = w.clone();
        edit(&mut w.layers[3]);
        let loaded = Loaded::new(
            w,
            Some(default_ids()[..64].to_vec()),
            &Options { private_layers: Some(5), ..Options::default() },
        );
        loaded.unwrap().plan().map(|_| ())
    };
    let why = ["layer 3", "fraction bits", "(limit"];
    says(plan(&|l| l.down.w /= 4096.0), &[&why[..], &["down_proj", "the activation's"]].concat());
    says(plan(&|l| l.o.w /= 4096.0), &[&why[..], &["o_proj", "softmax's reciprocal"]].concat());
    // One key a million times the others, which decide nothing beside it, and values that need more bits.
    let values = |l: &mut LayerWeights| {
        l.v.w /= 8.0;
        l.k.w.row_mut(0).mapv_inplace(|v| v * 1e7);
    };
    says(plan(&values), &[&why[..], &["v_proj", "a linear output after the norm"]].concat());
}
