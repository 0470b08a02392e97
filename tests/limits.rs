//! At the edges of what is promised: the largest vocabularies, the smallest buffers.

use trefoil::generate::{Local, LocalOptions, check};
use trefoil::model::{Activation, ModelConfig, Softmax, Variant, Weights};

fn config(vocab_size: usize) -> ModelConfig {
    ModelConfig { num_kv_heads: 1, tie_word_embeddings: true, ..ModelConfig::llama(32, 64, 1, 2, vocab_size, 32) }
}

fn generate(weights: Weights, options: LocalOptions, prompt: &[u32], tokens: usize) {
    let float = weights.clone();
    let mut local = Local::start(weights, None, options).unwrap();
    let out = local.generate(prompt, tokens, 0.0, 0, true, &mut |_| true);
    let g = match out {
        Ok(g) => g,
        Err(e) => panic!("{}", local.root_cause(e)),
    };
    local.finish().unwrap();
    let c = check(&float, prompt, &g, false);
    eprintln!("{c:?}");
    assert_eq!((c.agree, c.of), (tokens, tokens));
    assert!(c.max_kl < 1e-3, "{c:?}");
}

#[test]
fn a_vocabulary_of_152_064() {
    let mut weights = Weights::random(config(152_064), 3).unwrap();
    weights.embed *= 20.0;
    generate(weights, LocalOptions::new(None), &[151_000, 7, 152_063], 2);
}

/// The Owner's buffer is smaller than one pass of run-ahead: Client and Helper are held back, and nothing hangs.
#[test]
fn a_small_buffer_holds_back_and_does_not_hang() {
    let mut weights = Weights::random(config(512), 4).unwrap();
    weights.embed *= 20.0;
    let mut options = LocalOptions::new(None);
    options.setup.ahead_capacity = 2_000;
    options.setup.timeout = std::time::Duration::from_secs(20);
    generate(weights, options, &[1, 2, 3, 4, 5], 12);
}

/// Prompts of four blocks, the last of them short, with even and odd numbers of heads and both kinds of softmax: as the float model says.
#[test]
fn long_prompts_go_through_attention_in_blocks() {
    let relu = Variant {
        from_layer: 1,
        num_attention_heads: 2,
        num_key_value_heads: 1,
        head_dim: 16,
        softmax: Softmax::TwoRelu,
        activation: Activation::Relu,
    };
    let gelu = Variant { softmax: Softmax::Exact, activation: Activation::Gelu, ..relu };
    let varied = |variant| ModelConfig { variant: Some(variant), ..in_blocks(2) };
    // The only private layer is the last one, of which a prompt has one row: it is not cut.
    for (config, private) in [
        (in_blocks(2), None),
        (in_blocks(3), None),
        (varied(relu), None),
        (varied(gelu), None),
        (in_blocks(2), Some(1)),
    ] {
        let weights = Weights::random(config, 5).unwrap();
        let prompt: Vec<u32> = (0..109).map(|i| i * 7 % 301).collect();
        let blocks = LocalOptions { block_scores: Some(1), ..LocalOptions::new(private) };
        generate(weights, blocks, &prompt, 3);
    }
}

fn in_blocks(heads: usize) -> ModelConfig {
    ModelConfig { num_kv_heads: 1, ..ModelConfig::llama(16 * heads, 64, 2, heads, 301, 128) }
}

/// The same answer on machines without AVX-512, and without AVX at all.
#[test]
fn portable_kernels_generate_too() {
    for isa in ["portable", "avx2"] {
        let out = assert_cmd::Command::cargo_bin("trefoil")
            .unwrap()
            .env("TREFOIL_ISA", isa)
            .args(["generate", "--prompt", "The captain of the ship", "--max-new-tokens", "6", "--json", "--check"])
            .output()
            .unwrap();
        assert!(out.status.success(), "{isa}: {}", String::from_utf8_lossy(&out.stderr));
        let report: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
        assert_eq!(report["check"]["agree"], report["check"]["of"], "{isa}: {report}");
        assert!(report["check"]["max_kl"].as_f64().unwrap() < 1e-3, "{isa}: {report}");
    }
}
