//! The secure model against the float model: 16 prompts on the bundled model, every architecture of `tests/fixtures`, and
//! models of sizes that stress what the code assumes. The figures are printed (`--nocapture`).

#[path = "support/models.rs"]
mod models;

use std::time::Instant;

use models::{codec, fixture, greedy, is_right, largest_difference, load, once, options, quill};
use trefoil::generate::{Check, Local, Stop, check};
use trefoil::model::{ModelConfig, Weights};

/// Prose, verse, dialogue, numbers, code, characters that the bundled model has hardly seen, and next to nothing.
const PROMPTS: [&str; 16] = [
    "It was a bright morning",
    "The old house stood at the end of the lane, and nobody had lived in it since the winter when the river rose.",
    "The sun went down behind the hill,\nThe birds were quiet, the wind was still,\nAnd",
    "O wild West Wind, thou breath of Autumn's being,\nThou, from whose unseen presence",
    "\"Where have you been?\" she asked.\n\"Out,\" said the boy, and",
    "\"No, no!\" cried the captain. \"We shall never",
    "1, 2, 3, 4, 5, 6, 7, 8,",
    "In 1815 there were 2,304 men, of whom 17% (392) had",
    "fn main() { let x = vec![1, 2, 3]; for i in &x {",
    "def add(a, b):\n    return a +",
    "naïve café, Ærøskøbing — “quoted” … 10 € ½",
    "日本語 русский ελληνικά 🙂🙃",
    "ALL THE WORLD'S A STAGE, AND",
    "aaaaaaaaaaaaaaaaaaaaaaaa",
    "  \t\n\n  ;;; {}[]<>!!??",
    "A",
];

fn sixteen_prompts(private_layers: Option<usize>) -> Check {
    let (weights, codec, start) = (load(&quill()), codec(), Instant::now());
    let mut local = Local::open(&quill(), options(private_layers, 128)).unwrap();
    let mut sum = Check::default();
    for text in PROMPTS {
        let prompt = codec.encode(text).unwrap();
        let g = greedy(&mut local, &prompt, 32).unwrap();
        let c = check(&weights, &prompt, &g, false);
        assert_eq!(c.of, g.tokens.len());
        eprintln!("{c:?} {:?} {:?}", text.get(..12), g.stop);
        sum = sum.and(c);
    }
    let report = local.finish().unwrap();
    eprintln!("{private_layers:?} private: {sum:?}, {:.1} s; {report:?}", start.elapsed().as_secs_f64());
    sum
}

fn assert_quality(c: &Check) {
    // End tokens make some answers shorter than 32.
    assert!(c.of >= 400 && c.of <= 16 * 32, "{c:?}");
    assert!(c.agree as f64 >= 0.99 * c.of as f64, "{c:?}");
    assert!(c.max_kl < 1e-3, "{c:?}");
}

#[test]
fn sixteen_prompts_with_half_of_the_layers_private() {
    assert_quality(&sixteen_prompts(Some(4)));
}

#[test]
fn sixteen_prompts_with_everything_private() {
    assert_quality(&sixteen_prompts(None));
}

/// The logits that decoding gives at a position are those that a prefill of everything before it gives.
#[test]
fn prefill_then_decode_is_recomputation() {
    let codec = codec();
    let mut worst = 0.0f32;
    for private in [Some(4), None] {
        let mut local = Local::open(&quill(), options(private, 48)).unwrap();
        for text in [PROMPTS[0], PROMPTS[4]] {
            let mut ids = codec.encode(text).unwrap();
            let decoded = greedy(&mut local, &ids, 12).unwrap();
            for (i, (row, &token)) in decoded.logits.iter().zip(&decoded.tokens).enumerate() {
                // Position 0 too: a second prefill under fresh keys.
                if i % 4 == 3 || i == 0 {
                    let again = greedy(&mut local, &ids, 1).unwrap();
                    worst = worst.max(largest_difference(&again.logits[0], row));
                }
                ids.push(token);
            }
        }
        local.finish().unwrap();
    }
    eprintln!("prefill then decode against recomputation: largest difference of a logit {worst:.4}");
    assert!(worst < 0.1, "{worst}");
}

#[derive(serde::Deserialize)]
struct Expected {
    ids: Vec<u32>,
    logits: Vec<Vec<f32>>,
}

#[test]
fn every_architecture_agrees_with_transformers_all_private() {
    for name in ["llama-plain", "llama-linear", "llama-llama3", "mistral-sharded", "qwen2-tied", "qwen3-qknorm"] {
        let dir = fixture(name);
        let weights = load(&dir);
        let Expected { ids, logits } =
            serde_json::from_slice(&std::fs::read(dir.join("expected.json")).unwrap()).unwrap();
        let mut local = Local::open(&dir, options(None, 64)).unwrap();
        let (mut sum, mut off, mut tokens) = (Check::default(), 0.0f32, Vec::new());
        for part in [1, ids.len() / 3, ids.len() / 2, ids.len()] {
            let g = greedy(&mut local, &ids[..part], 8).unwrap();
            sum = sum.and(check(&weights, &ids[..part], &g, false));
            off = off.max(largest_difference(&g.logits[0], &logits[part - 1]));
            tokens.extend(g.tokens);
        }
        local.finish().unwrap();
        eprintln!("{name:<16} {sum:?}; prefill logits against transformers: {off:.4}");
        assert_eq!(sum.agree, sum.of, "{name}");
        assert!(sum.max_kl < 1e-3 && off < 0.1, "{name}: {sum:?} {off}");
    }
}

fn config(
    hidden_size: usize,
    num_heads: usize,
    num_kv_heads: usize,
    head_dim: usize,
    vocab_size: usize,
) -> ModelConfig {
    ModelConfig { num_kv_heads, head_dim, ..ModelConfig::llama(hidden_size, 40, 2, num_heads, vocab_size, 32) }
}

/// Random weights, scaled up to what trained ones are like: at standard deviation 0.02 a layer this small does nothing.
fn random(c: ModelConfig) -> Weights {
    let mut w = Weights::random(c, 11).unwrap();
    w.embed *= 20.0;
    w.head = w.head.map(|h| h * 20.0);
    for l in &mut w.layers {
        for m in [&mut l.q, &mut l.k, &mut l.v, &mut l.o, &mut l.gate, &mut l.up, &mut l.down] {
            m.w *= 8.0;
        }
    }
    w
}

#[test]
fn unusual_sizes() {
    let plain = config(24, 4, 2, 6, 33);
    let sizes: Vec<(&str, ModelConfig)> = vec![
        ("vocabulary 33, heads of 6", plain.clone()),
        ("vocabulary 5", config(24, 4, 4, 6, 5)),
        ("vocabulary 2", config(16, 2, 1, 8, 2)),
        ("vocabulary 1", config(16, 2, 1, 8, 1)),
        ("one head of 2, hidden 3", ModelConfig { intermediate_size: 1, ..config(3, 1, 1, 2, 40) }),
        ("hidden 1", ModelConfig { intermediate_size: 1, ..config(1, 1, 1, 2, 10) }),
        ("one layer, one key head", ModelConfig { num_layers: 1, ..config(32, 8, 1, 4, 100) }),
        ("heads wider than hidden", config(20, 3, 3, 14, 257)),
        ("norms of queries and keys, tied", ModelConfig { qk_norm: true, tie_word_embeddings: true, ..plain.clone() }),
        ("all biases", ModelConfig { qkv_bias: true, o_bias: true, mlp_bias: true, ..plain.clone() }),
        ("epsilon large", ModelConfig { rms_norm_eps: 0.5, ..plain.clone() }),
        ("vocabulary 20000, radix 8", config(16, 2, 2, 8, 20_000)),
    ];
    for (name, c) in sizes {
        let w = random(c.clone());
        for private in [Some(0), Some(c.num_layers), Some(1), None] {
            let prompt: Vec<u32> = (0..9).map(|i| (i * 7 % c.vocab_size) as u32).collect();
            let (g, check) =
                once(&w, None, options(private, 24), &prompt, 6).unwrap_or_else(|e| panic!("{name} {private:?}: {e}"));
            eprintln!("{name:<32} {private:?}: {check:?}");
            assert_eq!(g.tokens.len(), 6, "{name} {private:?}");
            assert!(is_right(&check) && check.max_kl < 1e-3, "{name} {private:?}: {check:?}");
        }
    }
}

/// A prompt that fills the context leaves room for exactly one token, which is never fed back.
#[test]
fn a_prompt_that_fills_the_context() {
    let w = random(ModelConfig { max_positions: 8, ..config(24, 4, 2, 6, 33) });
    for private in [Some(1), None] {
        let (g, c) = once(&w, None, options(private, 100), &[1, 2, 3, 4, 5, 6, 7, 32], 5).unwrap();
        assert_eq!((g.tokens.len(), g.stop), (1, Stop::Length));
        assert!(is_right(&c), "{c:?}");
        let (g, c) = once(&w, None, options(private, 100), &[32], 50).unwrap();
        assert_eq!((g.tokens.len(), c.of), (8, 8), "one position of the prompt, seven fed back, the eighth token not");
        assert!(is_right(&c), "{c:?}");
        let refused = once(&w, None, options(private, 100), &[1; 9], 5).unwrap_err().to_string();
        assert!(refused.contains("9 tokens") && refused.contains("context is 8"), "{refused}");
    }
}

/// What a caller may do with a session: stop early, be refused, go on.
#[test]
fn a_session_survives_refused_and_stopped_requests() {
    let w = random(config(24, 4, 2, 6, 33));
    let mut local = Local::start(w.clone(), None, options(None, 20)).unwrap();
    for (prompt, max_new, temperature) in
        [(&[][..], 3, 0.0), (&[1], 0, 0.0), (&[33], 3, 0.0), (&[1], 3, -0.1), (&[1], 3, 4.5), (&[1], 3, f64::NAN)]
    {
        let error = local.generate(prompt, max_new, temperature, 0, true, &mut |_| true).unwrap_err();
        assert!(matches!(error, trefoil::Error::Config(_) | trefoil::Error::Model(_)), "{error}");
    }
    let mut seen = 0;
    let mut two = |_| {
        seen += 1;
        seen < 2
    };
    let g = local.generate(&[3, 4], 16, 0.0, 0, true, &mut two).unwrap();
    assert_eq!((g.tokens.len(), g.stop, seen), (2, Stop::Caller, 2));
    let g = greedy(&mut local, &[3, 4, 5], 16).unwrap();
    assert!(is_right(&check(&w, &[3, 4, 5], &g, false)));
    let sampled = local.generate(&[3, 4, 5], 8, 4.0, 9, true, &mut |_| true).unwrap();
    let c = check(&w, &[3, 4, 5], &sampled, true);
    assert!(sampled.tokens.len() == 8 && sampled.tokens.iter().all(|&t| t < 33) && is_right(&c), "{c:?}");
    local.finish().unwrap();
}
