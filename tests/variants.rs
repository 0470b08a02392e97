//! Models made for MPC: merged heads, 2ReLU, ReLU and Quad in some layers, against the float twin.

use trefoil::generate::{Check, Local, LocalOptions, check};
use trefoil::model::variant::Reshaping;
use trefoil::model::{Activation, Arch, ModelConfig, Softmax, Variant, Weights};

/// Random weights, scaled up to what trained ones are like: at standard deviation 0.02 a layer this small does nothing.
fn random(c: ModelConfig) -> Weights {
    let mut w = Weights::random(c, 5).unwrap();
    w.embed *= 20.0;
    w.head = w.head.map(|h| h * 20.0);
    for l in &mut w.layers {
        for m in [&mut l.q, &mut l.k, &mut l.v, &mut l.o, &mut l.gate, &mut l.up, &mut l.down] {
            m.w *= 8.0;
        }
    }
    w
}

/// Heads merged `merged` at a time, from `from_layer` on.
fn variant(c: &ModelConfig, from_layer: usize, merged: usize, softmax: Softmax, activation: Activation) -> Variant {
    Reshaping { merged, softmax, activation: Some(activation) }.of(c.layer(0), from_layer).unwrap().unwrap()
}

fn run(w: &Weights, private: Option<usize>) -> (Check, u32) {
    let options = LocalOptions { max_positions: Some(24), ..LocalOptions::new(private) };
    let mut local = Local::start(w.clone(), None, options).unwrap();
    let prompt: Vec<u32> = (0..9).map(|i| i * 7 % w.config.vocab_size as u32).collect();
    let g = local.generate(&prompt, 6, 0.0, 0, true, &mut |_| true).unwrap();
    // Measured from one private layer to the next.
    let messages = local.finish().unwrap().layer_messages.iter().copied().max().unwrap_or(0);
    (check(w, &prompt, &g, false), messages)
}

fn base(kv_heads: usize) -> ModelConfig {
    ModelConfig { num_kv_heads: kv_heads, ..ModelConfig::llama(32, 40, 2, 4, 60, 32) }
}

#[test]
fn every_variant_agrees_with_the_float_twin() {
    use Activation::{Quad, Relu, Silu};
    use Softmax::{Exact, TwoRelu};
    let qwen = ModelConfig { arch: Arch::Qwen3, qk_norm: true, ..base(4) };
    for (name, c, from, merged, softmax, activation) in [
        ("merged by 2", base(4), 0, 2, Exact, Silu),
        ("merged by 4", base(4), 0, 4, Exact, Silu),
        ("grouped queries, merged by 2", base(2), 0, 2, Exact, Silu),
        ("norms of queries and keys, merged by 2", qwen, 0, 2, Exact, Silu),
        ("2ReLU", base(4), 0, 1, TwoRelu, Silu),
        ("ReLU", base(4), 0, 1, Exact, Relu),
        ("Quad", base(4), 0, 1, Exact, Quad),
        ("all of it in the upper layer", base(2), 1, 2, TwoRelu, Relu),
    ] {
        let w = random(ModelConfig { variant: Some(variant(&c, from, merged, softmax, activation)), ..c });
        // The layer of the variant private, and below it one in the clear; then all.
        for private in [Some(1), None] {
            let (check, messages) = run(&w, private);
            eprintln!("{name:<40} {private:?}: {messages} messages, {check:?}");
            assert_eq!(check.agree, check.of, "{name} {private:?}: {check:?}");
            assert!(check.max_kl < 1e-3, "{name} {private:?}: {check:?}");
        }
    }
}

/// The private part of a pruned model has fewer heads than its public one, and a merged one attends as the float twin does where
/// its heads are alike.
#[test]
fn merging_heads_that_are_alike_changes_nothing_but_the_scale() {
    let c = base(4);
    let mut w = random(c.clone());
    for l in &mut w.layers {
        let d = c.head_dim;
        for m in [&mut l.q, &mut l.k] {
            // Heads 0 and 1 are one, 2 and 3 another; merged they see twice the scores over the root of twice the width.
            for pair in [0, 2] {
                let head = m.w.slice(ndarray::s![pair * d..(pair + 1) * d, ..]).to_owned();
                m.w.slice_mut(ndarray::s![(pair + 1) * d..(pair + 2) * d, ..]).assign(&head);
            }
        }
    }
    let ids: Vec<u32> = (0..12).collect();
    let plain = trefoil::model::float::forward(&w, &ids);
    let mut merged = w.clone();
    merged.config.variant = Some(variant(&c, 0, 2, Softmax::Exact, Activation::Silu));
    for l in &mut merged.layers {
        l.q.w *= 0.5f32.sqrt();
    }
    let other = trefoil::model::float::forward(&merged, &ids);
    let difference = plain.iter().zip(&other).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
    assert!(difference < 1e-4, "{difference}");
}
