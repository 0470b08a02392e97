//! Plans that are made pass the check of plans that are received; no other plan does, and none makes the check panic.

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use serde_json::Value;

use super::layer::{GAIN_LEAST, least_unlifted};
use super::*;
use crate::model::{Activation, Arch, ModelConfig, Softmax, Variant};

fn variant(hidden_size: usize, layers: usize) -> impl Strategy<Value = Option<Variant>> {
    let softmax = prop_oneof![Just(Softmax::Exact), Just(Softmax::TwoRelu)];
    let activation = prop_oneof![Just(Activation::Silu), Just(Activation::Relu), Just(Activation::Quad)];
    let merged =
        (0..layers, 1usize..=2, softmax, activation).prop_map(move |(from_layer, merged, softmax, activation)| {
            let (num_attention_heads, num_key_value_heads) = (4 / merged, 2 / merged);
            let head_dim = hidden_size / 4 * merged;
            Variant { from_layer, num_attention_heads, num_key_value_heads, head_dim, softmax, activation }
        });
    proptest::option::of(merged)
}

fn config(
    hidden_size: usize,
    qk_norm: bool,
    max_positions: usize,
    vocab_size: usize,
    variant: Option<Variant>,
) -> ModelConfig {
    ModelConfig {
        variant,
        arch: if qk_norm { Arch::Qwen3 } else { Arch::Llama },
        num_kv_heads: 2,
        tie_word_embeddings: true,
        qk_norm,
        ..ModelConfig::llama(hidden_size, 2 * hidden_size, 3, 4, vocab_size, max_positions)
    }
}

/// Positive, over many orders of magnitude.
fn size(low: f64, high: f64) -> impl Strategy<Value = f64> {
    (low..high).prop_map(f64::exp2)
}

/// Mostly the fewest, since more rarely fit.
fn fraction() -> impl Strategy<Value = u32> {
    prop_oneof![12 => Just(FW_LEAST), 1 => FW_LEAST..=FW_MOST]
}

prop_compose! {
    fn fractions()(qkv in fraction(), qk_gain in fraction(), o in fraction(), gate_up in fraction(), down in fraction())
        -> LayerFractions {
        LayerFractions { qkv, qk_gain, o, gate_up, down, ..LayerFractions::default() }
    }
}

prop_compose! {
    fn adapters()(which in 0u32..128, a in FW_LEAST..=F_A_MOST, b in FW_LEAST..=F_B_MOST, middle in size(-6.0, 18.0), any in 0..3)
        -> Grouped<AdapterBounds> {
        let mut all = Grouped::default();
        for module in Module::ALL.into_iter().filter(|m| any == 0 && which >> *m as u32 & 1 == 1) {
            let empty = || AdapterBounds { modules: Vec::new(), rank: 1, f: AdapterFractions { a, b }, middle };
            all.place(module.group()).get_or_insert_with(empty).modules.push(module);
        }
        all
    }
}

prop_compose! {
    fn layer_bounds()(f in fractions(), qk in size(-3.0, 14.0), raw in size(-3.0, 14.0), v in size(-3.0, 14.0), score in size(-3.0, 24.0),
        attention in size(-6.0, 20.0), gate in size(-3.0, 18.0), up in size(-3.0, 18.0), mlp in size(-3.0, 26.0),
        mlp_slope in size(-6.0, 12.0), adapters in adapters()) -> LayerBounds {
        LayerBounds { f, qk, qk_raw: raw, v, score, attention, gate, up, mlp, mlp_slope, adapters }
    }
}

prop_compose! {
    fn layer_ranges(qk_norm: bool)(sums in proptest::array::uniform3(size(-10.0, 34.0)), spread in size(0.0, 8.0),
        score in size(-2.0, 11.0), depth in 0.0..1.0f64, gate in size(-3.0, 12.0)) -> LayerRanges {
        let [a, b, c] = sums;
        LayerRanges {
            input_sum: (a / spread, a),
            post_sum: (b / spread, b),
            score,
            row_max: (-score * depth, score),
            gate,
            qk_sum: qk_norm.then_some((c / spread, c)),
        }
    }
}

fn made() -> impl Strategy<Value = (ModelConfig, Option<Plan>)> {
    let sizes = (3u32..13).prop_flat_map(|hidden| (Just(1usize << hidden), variant(1 << hidden, 3)));
    (sizes, any::<bool>(), 1usize..200_000, 5usize..200_000).prop_flat_map(
        |((hidden, v), qk_norm, positions, vocab)| {
            let c = config(hidden, qk_norm, positions, vocab, v);
            let layer = (layer_bounds(), layer_ranges(qk_norm));
            (
                proptest::collection::vec(layer, 3),
                size(0.0, 12.0),
                size(-4.0, 8.0),
                any::<bool>(),
                0..=3usize,
                fraction(),
            )
                .prop_map(move |(layers, logit, embedding, private, first, f_head)| {
                    let private = private && first == 0;
                    let (b, r): (Vec<_>, Vec<_>) = layers.into_iter().skip(first).unzip();
                    let last = (r.last().map_or(1.0, |r| r.post_sum.0), r.last().map_or(64.0, |r| r.post_sum.1));
                    let bounds = Bounds { layers: b, f_head, logit, embedding };
                    let ranges = Ranges { layers: r, final_sum: last, logit };
                    let public_base = bounds.layers.iter().any(|b| !b.adapters.is_empty());
                    (c.clone(), plan(&c, first, private && !public_base, &bounds, &ranges).ok())
                })
        },
    )
}

/// Paths of all numbers of a plan.
fn numbers(v: &Value, path: String, out: &mut Vec<String>) {
    match v {
        Value::Number(_) => out.push(path),
        Value::Object(m) => m.iter().for_each(|(k, v)| numbers(v, format!("{path}/{k}"), out)),
        Value::Array(a) => a.iter().enumerate().for_each(|(i, v)| numbers(v, format!("{path}/{i}"), out)),
        _ => {}
    }
}

fn edges() -> impl Strategy<Value = i64> {
    prop_oneof![
        -70i64..70,
        Just(i64::from(u32::MAX)),
        Just(i64::from(u32::MAX) - 1),
        Just(i64::MAX),
        Just(i64::MIN),
        Just(1 << 31),
        Just(1 << 40)
    ]
}

/// What the engine takes for granted of a plan's widths, said once more and in other words.
fn fits(p: &Plan) -> bool {
    p.layers.iter().all(|l| {
        let (a, m) = (&l.attention, &l.mlp);
        let (qkv, gate_up) = (64 - l.input_norm.f_gain - a.f_qkv, 64 - l.post_norm.f_gain - m.f_gate_up);
        // What a rotation, behind the gain's fraction or without, leaves to queries and keys of 10 fraction bits; a lift takes 3.
        let rotated = a.qk_norm.as_ref().map_or(qkv, |n| 64 - n.f_gain - a.f_qk_gain.unwrap()) - 10;
        64 - a.f_inverse - a.f_o >= p.residual_k
            && 64 - m.f_table - m.f_down >= p.residual_k
            && (a.f_o == FW_LEAST || a.f_inverse + a.f_prob >= a.total_bits + if a.exp.is_some() { 3 } else { 0 })
            && (m.f_down == FW_LEAST || m.f_table >= m.gate_lo_bits + 7)
            && rotated >= 3
            && gate_up >= m.gate_proven
            && m.gate_proven >= m.gate_k
            && a.score_proven >= a.score_k
            && a.qk_norm.as_ref().is_none_or(|n| n.k + n.coarse.unwrap_or(0) <= qkv)
            && [&l.input_norm, &l.post_norm].iter().all(|n| n.k + n.coarse.unwrap_or(0) <= p.residual_k)
            && a.exp.is_none_or(|e| e.exp_lo_bits < a.score_k)
            && (a.exp.is_some() || [16, 20].contains(&(a.score_k + a.f_prob - F)))
            && a.prob_k <= 64
            && a.total_bits < a.prob_k
            && l.adapters.iter().all(|(group, adapter)| {
                let (f, ring) = l.multiplied(group);
                let b = adapter.ring(ring, f);
                b <= 64 && b - adapter.f_b == ring - f && ring >= adapter.f_a + 3
            })
    }) && p.weight_fractions().all(|f| (FW_LEAST..=FW_MOST).contains(&f))
        && linear_ring(p) >= p.head.logit_k
}

fn linear_ring(p: &Plan) -> u32 {
    64 - p.head.norm.f_gain - (F + p.head.f_weight - p.head.f_logit)
}

#[test]
fn the_bounds_and_ranges_of_these_tests_do_make_plans() {
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let n = (0..400).filter(|_| made().new_tree(&mut runner).unwrap().current().1.is_some()).count();
    assert!((20..380).contains(&n), "{n} of 400");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1500))]

    #[test]
    fn what_is_made_is_accepted((c, p) in made()) {
        if let Some(p) = p {
            prop_assert_eq!(p.check(&c), Ok(()), "{:?}", p);
            prop_assert!(fits(&p), "{:?}", p);
        }
    }

    /// With overflow checks (`cargo test`) a width that wraps would panic here; without them it would be accepted.
    #[test]
    fn a_changed_plan_is_refused_or_still_fits(
        (c, p) in made(),
        changes in proptest::collection::vec((any::<prop::sample::Index>(), edges(), any::<bool>()), 1..4),
    ) {
        if let Some(p) = p {
            let mut json = serde_json::to_value(&p).unwrap();
            let mut paths = Vec::new();
            numbers(&json, String::new(), &mut paths);
            for (i, to, near) in changes {
                let at = json.pointer_mut(i.get::<String>(&paths).as_str()).unwrap();
                let old = at.as_i64().unwrap();
                *at = if near { old.saturating_add(to % 3) } else { to }.into();
            }
            if let Ok(p) = serde_json::from_value::<Plan>(json)
                && p.check(&c).is_ok()
            {
                prop_assert!(fits(&p), "{:?}", p);
            }
        }
    }
}

#[test]
fn relations_that_do_not_hold_are_refused_by_name() {
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let (c, p) = std::iter::repeat_with(|| made().new_tree(&mut runner).unwrap().current())
        .find_map(|(c, p)| p.filter(|p| p.layers.len() == 3 && c.qk_norm && c.variant.is_none()).map(|p| (c, p)))
        .unwrap();
    assert_eq!(p.check(&c), Ok(()));
    let refused = |edit: &dyn Fn(&mut Plan), what: &str| {
        let mut p = p.clone();
        edit(&mut p);
        let e = p.check(&c).expect_err(what);
        assert!(e.contains(what), "{e}, not {what}");
    };
    refused(&|p| p.layers[1].attention.f_inverse += 1, "reciprocal");
    refused(&|p| p.layers[1].mlp.f_table = 53 - p.residual_k, "activation");
    refused(&|p| p.layers[0].mlp.gate_proven = 53 - p.layers[0].post_norm.f_gain, "gate");
    refused(&|p| p.layers[2].input_norm.k += 20, "norm's ring");
    for fewer in [1, 4, 10] {
        refused(&|p| p.layers[0].input_norm.f_gain = GAIN_LEAST - fewer, "norm's gain");
        refused(&|p| p.layers[0].post_norm.f_gain = GAIN_LEAST - fewer, "norm's gain");
        refused(&|p| p.head.norm.f_gain = GAIN_LEAST - fewer, "norm's gain");
        let qk = |p: &mut Plan| {
            let norm = p.layers[2].attention.qk_norm.as_mut().unwrap();
            norm.f_gain = least_unlifted(c.head_dim, norm.bits) - fewer;
        };
        refused(&qk, "norm's gain");
    }
    refused(&|p| p.layers[2].input_norm.coarse = Some(u32::MAX), "norm");
    refused(&|p| p.layers[2].attention.qk_norm.as_mut().unwrap().k = 64, "norm's ring");
    refused(&|p| p.layers[2].attention.qk_norm = None, "queries and keys");
    let exp = |p: &mut Plan, edit: &dyn Fn(&mut ExpPlan)| edit(p.layers[0].attention.exp.as_mut().unwrap());
    refused(&|p| exp(p, &|e| e.step_bits = u32::MAX), "step");
    refused(&|p| exp(p, &|e| e.base = i64::MAX), "base");
    refused(&|p| exp(p, &|e| e.base = 1 << 15), "threshold");
    refused(&|p| p.layers[0].attention.exp = None, "kind of softmax");
    refused(&|p| p.layers[0].attention.score_proven = 64, "proven");
    refused(&|p| p.layers[0].attention.total_bits += 1, "reciprocal");
    refused(&|p| p.head.logit_k = 24, "logits");
    for f in [0, FW_LEAST - 1, FW_MOST + 1, u32::MAX] {
        refused(&|p| p.layers[0].attention.f_qkv = f, "fraction of q, k and v");
        refused(&|p| p.layers[1].attention.f_qk_gain = Some(f), "gains");
        refused(&|p| p.layers[2].attention.f_o = f, "output projection's");
        refused(&|p| p.layers[0].mlp.f_gate_up = f, "fraction of gate and up");
        refused(&|p| p.layers[1].mlp.f_down = f, "down projection's");
        refused(&|p| p.head.f_weight = f, "head's fraction");
    }
    refused(&|p| p.layers[1].attention.f_qk_gain = None, "gains");
    // Beyond what is left to the residual stream, or to the precision of what they multiply.
    refused(&|p| p.layers[2].attention.f_o += 1, "reciprocal's fraction");
    refused(
        &|p| (p.layers[2].attention.f_o, p.layers[2].attention.f_inverse) = (FW_MOST, 40 - p.residual_k),
        "output projection's",
    );
    refused(&|p| p.layers[1].mlp.f_down = FW_MOST, "activation's fraction");
    refused(&|p| (p.layers[1].mlp.f_down, p.layers[1].mlp.f_table) = (FW_LEAST + 1, 12), "activation's fraction");
    refused(&|p| p.layers[0].mlp.f_gate_up = 65 - p.layers[0].post_norm.f_gain - p.layers[0].mlp.gate_proven, "gate");
    refused(&|p| p.head.radix = Radices::same(13), "radix");
    for (windows, window, most) in [(2, 18, 1), (2, 14, 1), (2, 16, 1 << 20), (1, 16, 1)] {
        let alone = Some(Alone { window, most });
        refused(&|p| (p.layers[0].input_norm.windows, p.layers[0].input_norm.alone) = (windows, alone), "window");
    }
    refused(&|p| p.max_positions = 0, "context");
    refused(&|p| p.first_private = 9, "first private");
    assert_eq!(p.longest_answer(1), p.max_positions);
    assert_eq!((p.longest_answer(p.max_positions), p.longest_answer(p.max_positions + 1)), (1, 0));
    assert_eq!(p.longest_answer(usize::MAX), 0);
}
