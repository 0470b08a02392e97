//! `trefoil cost`: predicted bytes and messages are those of a real run, exactly.

#[path = "support/models.rs"]
mod models;

#[path = "support/adapters.rs"]
mod adapters;

use std::sync::Arc;

use adapters::adapt;

use assert_cmd::Command;
use serde_json::Value;
use trefoil::Role;
use trefoil::generate::{Local, LocalOptions, control_cost};
use trefoil::model::preparation::{Loaded, Options};
use trefoil::model::{Arch, ModelConfig, Weights};
use trefoil::net::Lane;
use trefoil::net::meter::LinkTotals;
use trefoil::plan::Module;
use trefoil::predict::Source;
use trefoil::predict::walk::{Stretch, bytes, walk};

/// Runs a request of `prompt` and `new` tokens for real, then predicts it from the plan that was used.
#[track_caller]
fn exact(weights: &Weights, text: Option<Vec<u32>>, private: Option<usize>, prompt: &[u32], new: usize) {
    exact_with(weights, text, LocalOptions::new(private), prompt, new);
}

#[track_caller]
fn exact_with(
    weights: &Weights,
    text: Option<Vec<u32>>,
    options: LocalOptions,
    prompt: &[u32],
    new: usize,
) -> Vec<u32> {
    let context = prompt.len() + new;
    let options = LocalOptions { max_positions: Some(context), ..options };
    let mut local = Local::start(weights.clone(), text, options).unwrap();
    let meters = Role::ALL.map(|r| Arc::clone(local.world().meter(r)));
    let read = || Role::ALL.map(|a| Role::ALL.map(|b| meters[a.index()].sent(b)));
    let before = read();
    let depth = meters[Role::Client.index()].depth();
    let out = local.generate(prompt, new, 0.0, 0, false, &mut |_| true).unwrap();
    let depth = meters[Role::Client.index()].depth() - depth;
    assert_eq!(out.tokens.len(), new, "no end token in these models");
    let plan = local.plan().clone();
    let report = local.finish().unwrap();
    assert_eq!((report.discarded_passes, report.discarded_bytes), (0, 0));
    let after = read();
    // Ending the session is another announcement.
    let bye = control_cost(true, 0, false);

    let config = ModelConfig { max_positions: plan.max_positions, ..weights.config.clone() };
    let walked = walk(&config, &plan, prompt.len(), new - 1).unwrap();
    let total = walked.total();
    for from in Role::ALL {
        for to in Role::ALL.into_iter().filter(|&to| to != from) {
            let (i, j) = (from.index(), to.index());
            let mut real = after[i][j] - before[i][j];
            real.online_bytes -= bye.online(from, to).bytes;
            real.messages -= bye.online(from, to).messages;
            assert_eq!(total[i][j], real, "{from} -> {to}");
        }
    }
    assert_eq!(walked.prefill.depth + walked.decode.depth, depth, "messages in sequence");
    assert_eq!(walked.layer_messages.iter().max(), report.layer_messages.iter().max());
    out.tokens
}

#[test]
fn adapters_over_a_public_base() {
    let mut w = random(shape(64, 4, 2, 160, 3));
    // Public below them; private without an adapter above.
    adapt(&mut w.layers[1], &[Module::QProj, Module::KProj, Module::VProj, Module::DownProj], 4);
    exact(&w, None, Some(2), &[1, 2, 3, 4, 5], 4);
    exact(&w, None, None, &[7], 2);
}

fn shape(hidden: usize, heads: usize, kv_heads: usize, intermediate: usize, layers: usize) -> ModelConfig {
    ModelConfig {
        num_kv_heads: kv_heads,
        qkv_bias: true,
        ..ModelConfig::llama(hidden, intermediate, layers, heads, 301, 256)
    }
}

fn random(config: ModelConfig) -> Weights {
    let mut w = Weights::random(config, 11).unwrap();
    w.embed *= 20.0;
    w
}

#[test]
fn the_bundled_model() {
    let mut w = models::load(&models::quill());
    w.config.eos_ids = Vec::new();
    let ids = models::default_ids();
    exact(&w, Some(ids.clone()), Some(4), &ids[..7], 1);
    exact(&w, Some(ids.clone()), Some(4), &ids[..19], 12);
    // Longer than what is walked: the rest follows.
    exact(&w, Some(ids.clone()), None, &ids[..5], 45);
}

/// On a network norms of few values take one window in place of two: in decode, for the row that a head reads, and in short prompts; a long prompt,
/// of which a shorter one is walked, does not. Prompts of 32 tokens and more go in pieces. The tokens are those without a network.
#[test]
fn the_bundled_model_on_a_network() {
    let mut w = models::load(&models::quill());
    w.config.eos_ids = Vec::new();
    let ids = models::default_ids();
    let options = || LocalOptions::new(Some(2)).net("4,1".parse().unwrap());
    let few = Local::start(w.clone(), Some(ids.clone()), options()).unwrap();
    let most: Vec<usize> = few.plan().norms().filter_map(|n| n.alone).map(|a| a.most).collect();
    assert!(most.iter().any(|most| (1..41).contains(most)), "{most:?}");
    few.finish().unwrap();
    for (prompt, new) in [(2, 3), (41, 2), (90, 2)] {
        let there = exact_with(&w, Some(ids.clone()), options(), &ids[..prompt], new);
        let here = exact_with(&w, Some(ids.clone()), LocalOptions::new(Some(2)), &ids[..prompt], new);
        assert_eq!(there, here, "{prompt} tokens");
    }
}

#[test]
fn random_shapes() {
    let ids: Vec<u32> = (0..40).map(|i| i * 7 % 301).collect();
    exact(&random(shape(48, 3, 1, 104, 2)), None, Some(1), &ids[..3], 31);
    exact(&random(shape(40, 5, 5, 72, 3)), None, None, &ids[..33], 18);
    let long: Vec<u32> = (0..101).map(|i| i * 5 % 301).collect();
    exact(&random(shape(48, 3, 3, 64, 1)), None, None, &long, 3);
    exact(&random(shape(64, 4, 1, 72, 2)), None, Some(2), &long[..77], 3);
    let qwen3 = ModelConfig { qk_norm: true, arch: Arch::Qwen3, qkv_bias: false, ..shape(64, 4, 2, 96, 2) };
    exact(&random(qwen3), None, Some(2), &ids[..9], 20);
}

/// Prompts of two blocks and of more, the last as long as the others and shorter, walked as they are and extrapolated.
#[test]
fn prompts_in_blocks() {
    let ids: Vec<u32> = (0..150).map(|i| i * 7 % 301).collect();
    // Heads, tokens of the prompt, scores of a block.
    for (heads, tokens, scores) in [
        (3, 60, 1),
        (3, 109, 1),
        (3, 128, 3 * 128 * 40),
        (4, 64, 1),
        (4, 71, 4 * 71 * 32),
        (4, 139, 1),
        (4, 139, 4 * 139 * 64),
    ] {
        let options = LocalOptions { block_scores: Some(scores), ..LocalOptions::new(Some(1)) };
        exact_with(&random(shape(16 * heads, heads, 1, 64, 2)), None, options, &ids[..tokens], 2);
    }
}

#[test]
fn an_extrapolated_answer_is_the_walked_one() {
    let w = random(shape(48, 3, 3, 56, 2));
    let options = Options { private_layers: Some(2), max_positions: Some(128), ..Options::default() };
    let s = Source::loaded(Loaded::new(w, None, &options).unwrap()).unwrap();
    // Sixteen passes from position p on are walked; the sum of such stretches is what a long answer must take.
    for prompt in [1, 6, 13] {
        let long = walk(&s.config, &s.plan, prompt, 80).unwrap();
        let mut links = [[LinkTotals::default(); 3]; 3];
        for k in 0..5 {
            let part = walk(&s.config, &s.plan, prompt + 16 * k, 16).unwrap();
            for (sum, l) in links.iter_mut().flatten().zip(part.decode.links.iter().flatten()) {
                sum.online_bytes += l.online_bytes;
                sum.ahead_bytes += l.ahead_bytes;
                sum.messages += l.messages;
                sum.ahead_messages += l.ahead_messages;
            }
        }
        assert_eq!(long.decode.links, links, "prompt of {prompt}");
    }
    // The masks of the matrices are made once for each batch that a request walks ahead: of 1, 2, 4, 8 and then 16 passes.
    let masks = |s: &Stretch| {
        let parts = &s.work[Role::Client.index()][Lane::Ahead as usize];
        parts.iter().map(|c| c.mask_bytes).sum::<u64>() as f64
    };
    for (passes, batches) in [(1, 1), (3, 2), (16, 5), (20, 5), (40, 6), (80, 9)] {
        let walked = walk(&s.config, &s.plan, 8, passes).unwrap();
        assert_eq!((walked.prefill.batches, walked.decode.batches), (1, batches), "{passes}");
        let times = masks(&walked.decode) / masks(&walked.prefill);
        assert!((times - batches as f64).abs() < 1e-3, "{passes}: {times}");
    }
}

/// A plan for a shape, from plausible bounds: there is no checkpoint of this size here.
#[test]
fn a_large_model_in_seconds() {
    use trefoil::plan::{Bounds, FW_LEAST, LayerBounds, LayerFractions, LayerRanges, Ranges};
    let c = ModelConfig { vocab_size: 32_000, max_positions: 192, qkv_bias: false, ..shape(2048, 32, 4, 5632, 22) };
    let bound = |i: usize| LayerBounds {
        f: LayerFractions::default(),
        qk: 60.0 + i as f64,
        qk_raw: 60.0 + i as f64,
        v: 20.0,
        score: 900.0,
        attention: 60.0,
        gate: 50.0,
        up: 40.0,
        mlp: 900.0,
        mlp_slope: 1.0,
        ..LayerBounds::default()
    };
    let range = |i: usize| LayerRanges {
        input_sum: (2.0, 4000.0 * (i + 1) as f64),
        post_sum: (2.0, 4000.0 * (i + 1) as f64),
        score: 20.0 + i as f64,
        row_max: (-2.0, 15.0 + i as f64),
        gate: 12.0,
        qk_sum: None,
    };
    let bounds = Bounds { layers: (0..22).map(bound).collect(), f_head: FW_LEAST, logit: 300.0, embedding: 1.0 };
    let ranges = Ranges { layers: (0..22).map(range).collect(), final_sum: (100.0, 90_000.0), logit: 40.0 };
    let plan = trefoil::plan::plan(&c, 0, true, &bounds, &ranges).unwrap();
    let start = std::time::Instant::now();
    let w = walk(&c, &plan, 128, 1).unwrap();
    let took = start.elapsed();
    eprintln!(
        "walked in {:.1} s: prefill {} MB online, {} MB ahead",
        took.as_secs_f64(),
        bytes(&w.prefill.links, Lane::Online) / 1_000_000,
        bytes(&w.prefill.links, Lane::Ahead) / 1_000_000
    );
    assert!(bytes(&w.prefill.links, Lane::Online) > 1 << 31 && took.as_secs() < 60, "{took:?}");
}

fn cost(args: &[&str]) -> std::process::Output {
    Command::cargo_bin("trefoil").unwrap().arg("cost").arg("--model").arg(models::quill()).args(args).output().unwrap()
}

#[test]
fn the_command_says_what_generate_measures() {
    let out = cost(&["--prefill", "6", "--decode", "8", "--json"]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let predicted: Value = serde_json::from_slice(&out.stdout).unwrap();
    let out = Command::cargo_bin("trefoil")
        .unwrap()
        .args(["generate", "--prompt", "It was a bright morning", "--max-new-tokens", "8", "--json", "--model"])
        .arg(models::quill())
        .output()
        .unwrap();
    let real: Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!((&real["prompt_tokens"], real["tokens"].as_array().unwrap().len()), (&6.into(), 8));
    assert_eq!(predicted["request_links"], real["links"]);
    assert_eq!(predicted["messages_per_private_layer"], real["messages_per_private_layer"]);
    for party in ["owner", "client", "helper"] {
        assert!(predicted["memory"][party]["peak"].as_u64().unwrap() > 1 << 20);
    }
    for phase in ["prefill", "decode"] {
        let [ready, sustained] = ["ready_ms", "sustained_ms"].map(|f| predicted[phase][f].as_f64().unwrap());
        assert!(ready > 0.0 && sustained >= ready, "{phase}: {ready} {sustained}");
    }
}

#[test]
fn text_and_refusals() {
    let out = cost(&["--prefill", "16", "--decode", "4", "--net", "wan", "--private-layers", "all"]);
    let stdout = String::from_utf8_lossy(&out.stdout);
    for part in ["32 per private layer", "owner->helper", "peak memory", "ready", "sustained", "20 ms round trip"] {
        assert!(stdout.contains(part), "{part} in {stdout}");
    }
    for (args, part) in [
        (["--prefill", "0", "--decode", "1"], "--prefill 0"),
        (["--prefill", "1", "--decode", "0"], "--decode 0"),
        (["--prefill", "4000", "--decode", "4"], "context"),
    ] {
        let out = cost(&args);
        let stderr = String::from_utf8_lossy(&out.stderr);
        assert!(!out.status.success() && stderr.contains(part) && out.stdout.is_empty(), "{args:?}: {stderr}");
    }
}
