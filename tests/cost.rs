//! What a private layer costs: bytes and messages, asserted; declared costs against the meter.

#[path = "../benches/support/layer.rs"]
mod layer;

use layer::{Layer, Measured, shape};
use trefoil::Role;
use trefoil::model::{Arch, ModelConfig};
use trefoil::net::FRAME_HEADER;
use trefoil::world::Setup;

fn show(what: &str, m: &Measured, per: usize) {
    eprintln!(
        "{what}: online {:.3} MB, run-ahead {:.3} MB, {} messages in sequence",
        m.online_bytes() as f64 / per as f64 / 1e6,
        m.ahead_bytes() as f64 / per as f64 / 1e6,
        m.depth
    );
}

/// Every directed link, both lanes: declared = metered. The input is declared before the layer.
fn declared_is_metered(m: &Measured, inputs: &[(usize, u32)]) {
    for from in Role::ALL {
        for to in Role::ALL.into_iter().filter(|&to| to != from) {
            let mut sent = m.sent[from.index()][to.index()];
            if from == Role::Client && to == Role::Owner {
                for &(n, k) in inputs {
                    sent.online_bytes -= (trefoil::ring::pack::packed_len(n, k) + FRAME_HEADER) as u64;
                    sent.messages -= 1;
                }
            }
            let sum = |f: &dyn Fn(&trefoil::plan::cost::Cost) -> u64| m.declared.iter().map(f).sum::<u64>();
            assert_eq!(sum(&|c| c.online(from, to).bytes), sent.online_bytes, "{from}->{to} online bytes");
            assert_eq!(sum(&|c| c.online(from, to).messages), sent.messages, "{from}->{to} online messages");
            assert_eq!(sum(&|c| c.ahead(from, to).bytes), sent.ahead_bytes, "{from}->{to} run-ahead bytes");
            assert_eq!(sum(&|c| c.ahead(from, to).messages), sent.ahead_messages, "{from}->{to} run-ahead messages");
        }
    }
}

#[test]
fn a_whole_layer_costs_what_it_declares() {
    let layer = Layer::new(shape("tiny", 40), Setup::default());
    let k = layer.plan().residual_k;
    let m = layer.run(0, &[5]);
    declared_is_metered(&m, &[(5 * 64, k)]);
    let m = layer.run(20, &[1, 1, 1]);
    declared_is_metered(&m, &[(64, k); 3]);
    assert!(m.depth <= 40, "{} messages in sequence", m.depth);
}

/// Llama: 38. A norm on queries and keys adds 8, or 6 where its output's ring is wide enough for the scores, so that the two need
/// no lift.
#[test]
fn messages_in_sequence_by_architecture() {
    let layer = Layer::new(shape("tiny", 40), Setup::default());
    assert_eq!(layer.run(20, &[1]).depth, 38, "Llama");
    for (heads, head_dim) in [(4, 16), (4, 64), (2, 128)] {
        let qwen3 = ModelConfig {
            arch: Arch::Qwen3,
            num_heads: heads,
            num_kv_heads: heads / 2,
            head_dim,
            qk_norm: true,
            ..shape("tiny", 40)
        };
        let layer = Layer::new(qwen3, Setup::default());
        let a = &layer.plan().layers[0].attention;
        let n = a.qk_norm.as_ref().unwrap();
        // Ring after gain, rotation and the step to the scores' 10 fraction bits; the scores' product has 8 bits more.
        let no_lift = 64 - n.f_gain - 22 >= a.score_proven + 8;
        let depth = layer.run(20, &[1]).depth;
        eprintln!("Qwen3, head dimension {head_dim}: {depth} messages in sequence");
        // Values are lifted all the same, unless theirs is wide enough too: beside the norm, off the critical path.
        assert_eq!(depth, if no_lift { 44 } else { 46 }, "head dimension {head_dim}: {a:?}");
    }
}

#[test]
fn decode_h2048_context_512() {
    let layer = Layer::new(shape("h2048", 512), Setup { ahead_capacity: 1 << 30, ..Setup::default() });
    let m = layer.run(511, &[1]);
    show("decode h2048, context 512, one layer", &m, 1);
    assert!(m.online_bytes() <= 2_700_000, "{} online bytes", m.online_bytes());
    assert!(m.ahead_bytes() <= 1_500_000, "{} run-ahead bytes", m.ahead_bytes());
    assert!(m.depth <= 40, "{} messages in sequence", m.depth);
}

#[test]
fn prefill_h768_128_tokens() {
    let layer = Layer::new(shape("h768", 128), Setup { ahead_capacity: 1 << 30, ..Setup::default() });
    let m = layer.run(0, &[128]);
    show("prefill of 128 tokens at h768, one layer", &m, 1);
    assert!(m.online_bytes() + m.ahead_bytes() <= 100_000_000, "{} bytes", m.online_bytes() + m.ahead_bytes());
    assert!(m.depth <= 40, "{} messages in sequence", m.depth);
}
