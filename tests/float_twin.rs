//! The float twin against Hugging Face transformers, on the checkpoints of `tests/fixtures`, and on the bundled model.

use std::path::{Path, PathBuf};

use ndarray::{Array2, ArrayView2, ArrayView3, Axis, concatenate, s};
use trefoil::model::float::{self, FloatCache};
use trefoil::model::{Arch, Checkpoint, ModelConfig, Norm, Observer, RopeScaling, TextCodec, Weights};

const FIXTURES: [&str; 6] =
    ["llama-plain", "llama-linear", "llama-llama3", "mistral-sharded", "qwen2-tied", "qwen3-qknorm"];

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn quill() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/quill-4m")
}

fn load(dir: &Path) -> Weights {
    Weights::load(&Checkpoint::open(dir).unwrap()).unwrap()
}

#[derive(serde::Deserialize)]
struct Expected {
    ids: Vec<u32>,
    logits: Vec<Vec<f32>>,
}

fn expected(name: &str) -> (Vec<u32>, Array2<f32>) {
    let text = std::fs::read(fixture(name).join("expected.json")).unwrap();
    let Expected { ids, logits } = serde_json::from_slice(&text).unwrap();
    let shape = (logits.len(), logits[0].len());
    (ids, Array2::from_shape_vec(shape, logits.concat()).unwrap())
}

fn argmax(row: ndarray::ArrayView1<'_, f32>) -> usize {
    (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap()
}

fn largest_difference(a: &Array2<f32>, b: &Array2<f32>) -> f32 {
    assert_eq!(a.dim(), b.dim());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn logits_are_those_of_transformers() {
    for name in FIXTURES {
        let weights = load(&fixture(name));
        let (ids, want) = expected(name);
        let got = float::forward(&weights, &ids);
        let difference = largest_difference(&got, &want);
        println!("{name}: largest difference {difference:.1e}");
        assert!(difference < 1e-4, "{name}: {difference}");
        for (got, want) in got.outer_iter().zip(want.outer_iter()) {
            assert_eq!(argmax(got), argmax(want), "{name}");
        }
    }
}

#[test]
fn decoding_step_by_step_equals_the_full_forward() {
    for name in FIXTURES {
        let weights = load(&fixture(name));
        let (ids, _) = expected(name);
        let full = float::forward(&weights, &ids);
        let mut cache = FloatCache::new(&weights.config);
        let mut steps = vec![
            float::advance(&weights, &ids[..5], &mut cache, &mut ()),
            float::advance(&weights, &ids[5..8], &mut cache, &mut ()),
        ];
        for id in &ids[8..] {
            steps.push(float::advance(&weights, std::slice::from_ref(id), &mut cache, &mut ()));
        }
        assert_eq!(cache.len(), ids.len());
        let views: Vec<_> = steps.iter().map(|step| step.view()).collect();
        let difference = largest_difference(&concatenate(Axis(0), &views).unwrap(), &full);
        assert!(difference < 1e-4, "{name}: {difference}");

        // Going back and on again is the same, too.
        cache.truncate(7);
        let again = float::advance(&weights, &ids[7..], &mut cache, &mut ());
        assert!(largest_difference(&again, &full.slice(s![7.., ..]).to_owned()) < 1e-4, "{name}");
    }
}

#[test]
fn configurations_are_read_in_full() {
    let open = |name| ModelConfig::open(&fixture(name)).unwrap();
    let linear = open("llama-linear");
    assert_eq!((linear.rope.theta, linear.rope.scaling), (100_000.0, RopeScaling::Linear { factor: 4.0 }));
    assert!(linear.tie_word_embeddings && linear.qkv_bias && linear.o_bias && linear.mlp_bias);
    let llama3 = open("llama-llama3");
    assert!(matches!(llama3.rope.scaling, RopeScaling::Llama3 { original_max_position_embeddings: 16, .. }));
    assert_eq!((llama3.num_kv_heads, llama3.head_dim, llama3.layer(0).q_size()), (1, 16, 64));
    let mistral = open("mistral-sharded");
    assert_eq!((mistral.arch, mistral.max_positions), (Arch::Mistral, 64), "clamped to the sliding window");
    let qwen2 = open("qwen2-tied");
    assert_eq!((qwen2.max_positions, qwen2.eos_ids.as_slice()), (256, &[2, 3][..]));
    assert!(qwen2.qkv_bias && !qwen2.o_bias && !qwen2.mlp_bias && !qwen2.qk_norm);
    assert!(open("qwen3-qknorm").qk_norm);
    for name in FIXTURES {
        let weights = load(&fixture(name));
        let mut count = weights.embed.len() + weights.norm.len() + weights.head.as_ref().map_or(0, |head| head.len());
        for l in &weights.layers {
            count += [&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down]
                .iter()
                .map(|m| m.w.len() + m.bias.as_ref().map_or(0, |b| b.len()))
                .sum::<usize>();
            count += l.input_norm.len()
                + l.post_norm.len()
                + [&l.q_norm, &l.k_norm].iter().map(|n| n.as_ref().map_or(0, |n| n.len())).sum::<usize>();
        }
        assert_eq!(count as u64, weights.config.parameter_count(), "{name}");
    }
}

/// Recomputes from what it is shown what the float twin made of it.
#[derive(Default)]
struct Watch {
    norms: Vec<(usize, Norm)>,
    attention: Vec<(usize, usize)>,
    logits: Option<Array2<f32>>,
    contexts: usize,
    gates: usize,
}

impl Observer for Watch {
    fn norm_input(&mut self, layer: usize, which: Norm, h: ArrayView2<'_, f32>) {
        assert_eq!(h.ncols(), 32);
        self.norms.push((layer, which));
    }

    fn attention(
        &mut self,
        layer: usize,
        q: ArrayView3<'_, f32>,
        k: ArrayView3<'_, f32>,
        v: ArrayView3<'_, f32>,
        max: ArrayView2<'_, f32>,
        min: ArrayView2<'_, f32>,
    ) {
        assert_eq!(k.dim(), v.dim());
        let (tokens, heads, dim) = q.dim();
        for head in 0..heads {
            for token in 0..tokens {
                let group = head / (heads / k.dim().1);
                let scores: Vec<f32> = (0..=token)
                    .map(|j| q.slice(s![token, head, ..]).dot(&k.slice(s![j, group, ..])) / (dim as f32).sqrt())
                    .collect();
                let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let least = scores.iter().copied().fold(f32::INFINITY, f32::min);
                assert!((largest - max[[head, token]]).abs() < 1e-4 && (least - min[[head, token]]).abs() < 1e-4);
            }
        }
        self.attention.push((layer, tokens));
    }

    fn context(&mut self, _: usize, o: ArrayView2<'_, f32>) {
        assert_eq!(o.ncols(), 64);
        self.contexts += 1;
    }

    fn gate(&mut self, _: usize, gate: ArrayView2<'_, f32>, up: ArrayView2<'_, f32>) {
        assert_eq!((gate.ncols(), up.ncols()), (64, 64));
        self.gates += 1;
    }

    fn logits(&mut self, l: ArrayView2<'_, f32>) {
        self.logits = Some(l.to_owned());
    }
}

#[test]
fn an_observer_sees_every_layer() {
    let weights = load(&fixture("qwen3-qknorm"));
    let (ids, _) = expected("qwen3-qknorm");
    let mut watch = Watch::default();
    let logits = float::advance(&weights, &ids, &mut FloatCache::new(&weights.config), &mut watch);
    assert_eq!(
        watch.norms,
        [(0, Norm::Input), (0, Norm::PostAttention), (1, Norm::Input), (1, Norm::PostAttention), (2, Norm::Final)]
    );
    assert_eq!(watch.attention, [(0, ids.len()), (1, ids.len())]);
    assert_eq!((watch.contexts, watch.gates), (2, 2));
    assert_eq!(watch.logits.unwrap(), logits);
}

#[test]
fn the_bundled_model_knows_english() {
    let weights = load(&quill());
    let codec = TextCodec::open(&quill()).unwrap();
    let text = "It was a fine evening, and the old man sat down by the fire with his daughter.";
    let ids = codec.encode(text).unwrap();
    let loss = float::nats_per_token(float::forward(&weights, &ids).view(), &ids);
    println!("{} tokens, {loss:.2} nats each", ids.len());
    assert!((1.0..5.0).contains(&loss), "{loss}");
    let mut shuffled = ids.clone();
    shuffled[1..].reverse();
    let reversed = float::nats_per_token(float::forward(&weights, &shuffled).view(), &shuffled);
    assert!(reversed > loss + 1.0, "{reversed} for the same words backwards, {loss} forwards");
}
