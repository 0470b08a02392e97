//! What a private layer costs: bytes and messages, asserted; declared costs against the meter.

#[path = "support/adapters.rs"]
mod adapters;

use adapters::adapt;
use trefoil::Role;
use trefoil::bench::{Harness, Measured, Pace, Part, Preset, count, random_weights};
use trefoil::model::{Arch, ModelConfig, Weights};
use trefoil::net::MESSAGE_HEADER;
use trefoil::net::shape::Profile;
use trefoil::plan::{Module, Radices, Setting};
use trefoil::world::Setup;

/// One layer of a preset.
fn shape(name: &str, context: usize) -> ModelConfig {
    Preset::find(name).unwrap().config(1, context + 1)
}

fn tiny() -> ModelConfig {
    let (heads, head_dim) = (4, 16);
    ModelConfig {
        hidden_size: heads * head_dim,
        intermediate_size: 176,
        num_heads: heads,
        num_kv_heads: heads,
        head_dim,
        ..shape("h768", 40)
    }
}

fn prepared(config: ModelConfig) -> Harness {
    Harness::new(config, Setup { ahead_capacity: 1 << 30, ..Setup::default() }).unwrap()
}

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
                    sent.online_bytes -= (trefoil::ring::pack::packed_len(n, k) + MESSAGE_HEADER) as u64;
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
    let layer = prepared(tiny());
    let k = layer.plan().residual_k;
    let m = layer.run(0, &[5]).unwrap();
    declared_is_metered(&m, &[(5 * 64, k)]);
    let m = layer.run(20, &[1, 1, 1]).unwrap();
    declared_is_metered(&m, &[(64, k); 3]);
    assert!(m.depth <= 40, "{} messages in sequence", m.depth);
}

/// What an adapted group of projections adds: its base sends nothing any more, its factors and the lift between them what they
/// declare, and an exchange for each group.
#[test]
fn a_layer_with_adapters_costs_what_it_declares() {
    let plain = Weights::random(ModelConfig { num_kv_heads: 2, qkv_bias: true, ..tiny() }, 3).unwrap();
    let setup = || Setup { ahead_capacity: 1 << 30, ..Setup::default() };
    let without = Harness::prepare(&plain, false, setup()).unwrap();
    let depth = without.run(20, &[1]).unwrap().depth;
    let groups: [(&[Module], u32); 4] = [
        (&[Module::QProj, Module::VProj], 1),
        (&[Module::OProj], 1),
        (&[Module::KProj, Module::GateProj, Module::UpProj, Module::DownProj], 3),
        (&Module::ALL, 4),
    ];
    for (modules, groups) in groups {
        let mut weights = plain.clone();
        weights.layers.iter_mut().for_each(|l| adapt(l, modules, 3));
        let layer = Harness::prepare(&weights, false, setup()).unwrap();
        let k = layer.plan().residual_k;
        declared_is_metered(&layer.run(0, &[5]).unwrap(), &[(5 * 64, k)]);
        // The last layer of a model, of which the head reads one row.
        declared_is_metered(&layer.measure(Part::Whole, Pace::OneBatch, 0, &[5]).unwrap(), &[]);
        let m = layer.run(20, &[1]).unwrap();
        declared_is_metered(&m, &[(64, k)]);
        assert_eq!(m.depth, depth + 2 * groups, "{modules:?}");
    }
}

/// Llama: 30, and 2 more where queries and keys need a lift, and for each norm whose range takes two windows. A norm on queries and keys adds 6
/// (8) to what there is with a lift, or 4 (6) without.
#[test]
fn messages_in_sequence_by_architecture() {
    let wide = |n: &trefoil::plan::NormPlan| if n.windows == 2 { 2 } else { 0 };
    let norms = |l: &trefoil::plan::LayerPlan| wide(&l.input_norm) + wide(&l.post_norm);
    // Hidden states so large that 1 / rms needs more bits than the scores' ring leaves to it.
    for (scale, lifts) in [(1.0, 0), (256.0, 2)] {
        let mut weights = random_weights(tiny()).unwrap();
        weights.embed *= scale;
        let layer = Harness::prepare(&weights, false, Setup::default()).unwrap();
        let plan = &layer.plan().layers[0];
        assert_eq!(
            layer.run(20, &[1]).unwrap().depth,
            30 + lifts + norms(plan),
            "Llama, hidden states times {scale}: {plan:?}"
        );
    }
    // No rotation, no gate: two messages fewer.
    let encoder = prepared(ModelConfig::vit(64, 176, 1, 4, 16, 40));
    let layers = encoder.run(0, &[33]).unwrap();
    assert_eq!(layers.depth, 28 + norms(&encoder.plan().layers[0]), "an encoder");
    for (heads, head_dim) in [(4, 16), (4, 64), (2, 128)] {
        let qwen3 = ModelConfig {
            arch: Arch::Qwen3,
            num_heads: heads,
            num_kv_heads: heads / 2,
            head_dim,
            qk_norm: true,
            ..tiny()
        };
        let layer = prepared(qwen3);
        let a = &layer.plan().layers[0].attention;
        let n = a.qk_norm.as_ref().unwrap();
        // Ring after gain, rotation and the step to the scores' 10 fraction bits; the scores' product has 8 bits more.
        let no_lift = 64 - n.f_gain - 22 >= a.score_proven + 8;
        let depth = layer.run(20, &[1]).unwrap().depth;
        eprintln!("Qwen3, head dimension {head_dim}: {depth} messages in sequence");
        // Values are lifted all the same, unless theirs is wide enough too: beside the norm, off the critical path.
        let expected = if no_lift { 36 } else { 38 } + wide(n) + norms(&layer.plan().layers[0]);
        assert_eq!(depth, expected, "head dimension {head_dim}: {a:?}");
        declared_is_metered(&layer.measure(Part::Whole, Pace::OneBatch, 0, &[5]).unwrap(), &[]);
    }
}

/// The head reads one row of a prompt: of the last layer's other rows there are keys and values, and nothing else.
#[test]
fn the_last_layer_computes_what_the_head_reads() {
    let encoder = ModelConfig::vit(64, 176, 1, 4, 16, 40);
    for config in [tiny(), encoder] {
        let layer = prepared(config.clone());
        let [one, whole, layers] = [(Part::Whole, 1), (Part::Whole, 33), (Part::Layers, 33)]
            .map(|(part, tokens)| layer.measure(part, Pace::OneBatch, 0, &[tokens]).unwrap());
        declared_is_metered(&whole, &[]);
        // Walked together with others, which of an encoder is refused.
        match layer.measure(Part::Whole, Pace::OneBatch, 0, &[5, 5, 5]) {
            Ok(m) if config.arch == Arch::Llama => declared_is_metered(&m, &[]),
            other => assert!(config.arch == Arch::Vit && other.is_err(), "{other:?}"),
        }
        let (online, all) = (whole.online_bytes() - one.online_bytes(), layers.online_bytes());
        eprintln!("{:?}: {online} bytes for 32 more rows, {all} for all of 33", config.arch);
        assert!(3 * online < all, "{online} {all}");
        assert!(2 * (whole.ahead_bytes() - one.ahead_bytes()) < layers.ahead_bytes());
        assert_eq!(whole.depth, one.depth, "as many messages");
    }
}

#[test]
fn decode_h2048_context_512() {
    let layer = prepared(shape("h2048", 512));
    let m = layer.run(511, &[1]).unwrap();
    show("decode h2048, context 512, one layer", &m, 1);
    assert!(m.online_bytes() <= 1_830_000, "{} online bytes", m.online_bytes());
    assert!(m.ahead_bytes() <= 980_000, "{} run-ahead bytes", m.ahead_bytes());
    assert_eq!(m.depth, 30);
}

#[test]
fn prefill_h768_128_tokens() {
    let layer = prepared(shape("h768", 128));
    let m = layer.run(0, &[128]).unwrap();
    show("prefill of 128 tokens at h768, one layer", &m, 1);
    assert!(m.online_bytes() + m.ahead_bytes() <= 75_000_000, "{} bytes", m.online_bytes() + m.ahead_bytes());
    assert_eq!(m.depth, 30);
}

/// A pass that verifies drafts, from its input to its tokens: a head for every position, and no more messages in sequence than
/// one token takes.
#[test]
fn a_pass_that_verifies_drafts_costs_what_it_declares() {
    let layer = prepared(tiny());
    let k = layer.plan().residual_k;
    let verified = |passes: &[usize]| layer.measure(Part::Verified, Pace::OneBatch, 20, passes).unwrap();
    let one = verified(&[1]);
    for tokens in [1, 2, 5, 17] {
        let m = verified(&[tokens]);
        // Here the input is the pass's own, and declared.
        declared_is_metered(&m, &[]);
        assert_eq!(m.depth, one.depth, "{tokens} positions");
        show("a pass that verifies drafts, per position", &m, tokens);
        // The same tokens one by one would carry as much, but for padding and what later passes add to the context.
        let apart = verified(&vec![1; tokens]);
        assert!(m.online_bytes() <= apart.online_bytes(), "{} {}", m.online_bytes(), apart.online_bytes());
        assert!(m.ahead_bytes() <= apart.ahead_bytes());
        let messages = |m: &Measured| m.sent.iter().flatten().map(|l| l.messages).sum::<u64>();
        assert_eq!(messages(&m), messages(&one), "{tokens} positions, {k} bits each");
    }
}

/// Pieces of a prompt carry what the whole does, but for their headers, in as many messages in sequence; and the walk of a short prompt
/// says so of a long one.
#[test]
fn pieces_cost_their_headers() {
    let config = ModelConfig { max_positions: 200, ..tiny() };
    let fast = Profile { bits_per_second: 1e12, ..Profile::NONE };
    let on =
        |profile| Harness::new(config.clone(), Setup { profile, ahead_capacity: 1 << 30, ..Setup::default() }).unwrap();
    let (whole, pieces) = (on(Profile::NONE), on(fast));
    assert_eq!((whole.plan().pieces, pieces.plan().pieces), (1, 4));
    for tokens in [31, 32, 50, 77, 160] {
        let [a, b] = [&whole, &pieces].map(|layer| layer.measure(Part::Layers, Pace::OneBatch, 0, &[tokens]).unwrap());
        assert_eq!(a.depth, b.depth, "{tokens} tokens");
        let n = (tokens as u64 / 16).clamp(1, 4);
        for (a, b) in a.sent.iter().flatten().zip(b.sent.iter().flatten()) {
            assert_eq!(b.online_bytes - a.online_bytes, (b.messages - a.messages) * MESSAGE_HEADER as u64);
            assert_eq!(b.ahead_bytes - a.ahead_bytes, (b.ahead_messages - a.ahead_messages) * MESSAGE_HEADER as u64);
        }
        // Codes, thresholds, their ends, exponential; gate, the lift beside it, their product.
        assert_eq!(b.sent[0][2].messages - a.sent[0][2].messages, 7 * (n - 1), "{tokens} tokens");
        declared_is_metered(&b, &[(tokens * 64, pieces.plan().residual_k)]);
        let counted = count(&config, pieces.plan(), Part::Layers, 0, &[tokens]).unwrap();
        assert_eq!((b.sent, b.depth), (counted.sent, counted.depth), "{tokens} tokens");
    }
    // More than may be under way at once: the later ones wait for the earlier, and the walk of short prompts knows.
    let wide = ModelConfig { intermediate_size: 8192, max_positions: 450, ..tiny() };
    let setup = Setup { profile: fast, ahead_capacity: 1 << 30, ..Setup::default() };
    let layer = Harness::new(wide.clone(), setup).unwrap();
    let metered = layer.measure(Part::Layers, Pace::OneBatch, 0, &[440]).unwrap();
    let counted = count(&wide, layer.plan(), Part::Layers, 0, &[440]).unwrap();
    assert_eq!((metered.sent, metered.depth), (counted.sent, counted.depth));
    assert_eq!(metered.depth, layer.run(0, &[20]).unwrap().depth + 12, "four pieces, one at a time");
    // Passes side by side of which none is cut, and such that the Owner would cut.
    let together = |layer: &Harness, passes| layer.measure(Part::Layers, Pace::OneBatch, 20, passes);
    assert_eq!(together(&whole, &[31, 31]).unwrap().sent, together(&pieces, &[31, 31]).unwrap().sent);
    let error = together(&pieces, &[40, 40]).unwrap_err().to_string();
    assert!(error.contains("ended the session: internal"), "{error}");
}

/// Over a network a party's turn is one frame to a peer, whatever it sends, but for what is longer than a record; and the results and
/// the counts are those of messages by themselves.
#[test]
fn a_turn_is_a_frame() {
    let setup = |gather| Setup { gather, ahead_capacity: 1 << 30, ..Setup::default() };
    let [apart, together] = [false, true].map(|gather| Harness::new(tiny(), setup(gather)).unwrap());
    for passes in [vec![1], vec![1; 3], vec![5]] {
        let of = |layer: &Harness| layer.measure(Part::Whole, Pace::Ready, 20, &passes).unwrap();
        let (a, b) = (of(&apart), of(&together));
        assert_eq!((a.sent, a.depth), (b.sent, b.depth), "{passes:?}");
        let count = |m: &Measured, from: Role, to: Role| m.frames[from.index()][to.index()];
        for (from, to) in [(Role::Owner, Role::Helper), (Role::Helper, Role::Owner), (Role::Client, Role::Owner)] {
            let sent = a.sent[from.index()][to.index()];
            assert_eq!(count(&a, from, to), [sent.messages, sent.ahead_messages], "{from}->{to}, nothing gathered");
        }
        // Of two messages in sequence one is the Owner's.
        let turns = u64::from(b.depth) * passes.len() as u64 / 2;
        let (asked, answered) = (count(&b, Role::Owner, Role::Helper)[0], count(&b, Role::Helper, Role::Owner)[0]);
        let ahead = (b.sent[1][0].ahead_messages, count(&b, Role::Client, Role::Owner)[1]);
        let messages = b.sent[0][2].messages;
        eprintln!("{passes:?}: {messages} messages, {turns} turns, {asked} frames, {answered} back; ahead {ahead:?}");
        if passes[0] == 1 {
            assert!(asked <= turns, "{asked} frames in {turns} turns");
            // Ready, but for what the Helper's walk has not left yet.
            assert!(answered <= turns + turns / 4, "{answered} frames back in {turns} turns");
        }
        assert!(messages * 5 > asked * 6 && ahead.0 > 4 * ahead.1);
    }
}

/// The walk that counts says what the meters say, link by link.
#[test]
fn the_counted_cost_is_the_metered_one() {
    let encoder = ModelConfig::vit(64, 176, 2, 4, 16, 40);
    for (config, part, context, passes) in [
        (tiny(), Part::Layers, 0, vec![7]),
        (tiny(), Part::Layers, 20, vec![1; 3]),
        (tiny(), Part::Whole, 20, vec![1; 3]),
        (tiny(), Part::Whole, 0, vec![7]),
        (tiny(), Part::Whole, 0, vec![40]),
        (tiny(), Part::Verified, 20, vec![5]),
        (encoder.clone(), Part::Layers, 0, vec![7]),
        (encoder.clone(), Part::Whole, 0, vec![7]),
        (encoder, Part::Whole, 0, vec![40]),
    ] {
        let layer = prepared(config.clone());
        let metered = layer.measure(part, Pace::Ready, context, &passes).unwrap();
        let counted = count(&config, layer.plan(), part, context, &passes).unwrap();
        assert_eq!(metered.sent, counted.sent, "{part:?} {passes:?}");
        assert_eq!(metered.depth, counted.depth, "{part:?} {passes:?}");
    }
}

/// Choosing a token of 32,000: a lift and five levels.
#[test]
fn argmax_of_32000() {
    for net in [None, Some(Profile::NONE), Some(Profile::WAN)] {
        let radices = Radices::fastest(32_000, 23, &Setting::of(net, None));
        assert!(trefoil::protocol::argmax::cost(32_000, 23, radices.each()).depth <= 48);
    }
}
