//! Memory of each party, from public facts alone.
//!
//! | term | Owner | Client | Helper |
//! |---|---|---|---|
//! | weights | integers of 2 bytes (1 or 4 where that fits), `A` of a private embedding in the bits of its ring | public layers and embedding, f32; a public head, and the matrices under an adapter, at 4 | `A` in the bits of its ring; public matrices at 4 once more |
//! | tables | the functions of every private layer, the same at all three | | |
//! | cache | `d` of each key and value element, in the bits of its ring | `r` and a share | `r` and a share |
//! | run-ahead | what both peers have sent and no pass has used yet | none | none |
//! | batch | vectors of the largest operation of a pass | the same, of a batch of passes | the same, and what answers to the Owner wait for: of 2 layers of the prefill (of 1 if it goes through attention in blocks, [`super::block`]), or of the decode passes walked ahead |
//!
//! Exact but for the last two, which depend on who is faster: they are upper bounds up to allocator and rounding.

use std::collections::BTreeSet;

use serde::Serialize;

use super::block;
use super::{AdapterPlan, AttentionPlan, LayerPlan, Module, NormPlan, Plan, product_ring};
use crate::generate::{MAX_BATCH, MAX_DRAFTS, MAX_WAITING, next_batch};
use crate::model::sections::HalfLayout;
use crate::model::{LayerShape, ModelConfig};
use crate::party::Role;
use crate::protocol::{argmax, pieces};
use crate::ring::pack::packed_len;
use crate::session::{BLOCKS_PER_LAYER, JOBS_AHEAD_LAYERS};

/// What a party keeps of a model, whatever the sessions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ModelBytes {
    /// Weights.
    pub weights: u64,
    /// Tables of functions.
    pub tables: u64,
}

/// What a party takes for a session with one request at a time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct SessionBytes {
    /// Keys and values.
    pub cache: u64,
    /// Buffered run-ahead.
    pub run_ahead: u64,
    /// Vectors under way.
    pub batch: u64,
}

impl SessionBytes {
    /// All of it.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.cache + self.run_ahead + self.batch
    }
}

/// The private layers with their shapes.
fn shaped<'a>(c: &'a ModelConfig, plan: &'a Plan) -> impl Iterator<Item = (LayerShape, &'a LayerPlan)> {
    plan.layers.iter().enumerate().map(|(i, l)| (c.layer(plan.first_private + i), l))
}

/// Words of the private matrices, adapters and the head included (public or not), a private embedding not.
#[must_use]
pub fn owner_words(c: &ModelConfig, plan: &Plan) -> u64 {
    (base_words(c, plan) + adapter_words(c, plan) + c.vocab_size * c.hidden_size) as u64
}

/// Words of the matrices of the private layers, adapters apart.
fn base_words(c: &ModelConfig, plan: &Plan) -> usize {
    let (h, m) = (c.hidden_size, c.intermediate_size);
    let layer = |(shape, _): (LayerShape, &LayerPlan)| {
        let gain = if c.qk_norm { shape.q_size() + shape.kv_size() } else { 0 };
        2 * (shape.q_size() + shape.kv_size()) * h + (c.gate_up_size() + m) * h + gain
    };
    shaped(c, plan).map(layer).sum()
}

/// Words of the adapters' factors.
fn adapter_words(c: &ModelConfig, plan: &Plan) -> usize {
    let layer = |(index, l): (usize, &LayerPlan)| {
        let of = |a: &AdapterPlan, m: &Module| a.rank * (m.dim(c, index).0 + m.dim(c, index).1);
        l.adapters.iter().map(|(_, a)| a.modules.iter().map(|m| of(a, m)).sum::<usize>()).sum::<usize>()
    };
    (plan.first_private..).zip(&plan.layers).map(layer).sum()
}

/// Bytes per row of one window of a function of a positive value: three cyclic columns of words.
const WINDOW_ROW: u64 = 3 * 2 * 8;

fn windows(bits: u32, window: u32) -> u64 {
    // The second window has as many row bits where the ring has them.
    WINDOW_ROW * ((1u64 << window) + (1u64 << window.min(bits - window + 6)))
}

/// Tables of norms of the same number of elements: those that are alike are there once.
fn norm_tables<'a>(norms: impl Iterator<Item = &'a NormPlan>) -> u64 {
    let tables = norms.flat_map(|p| {
        let alone = p.alone.filter(|a| a.most > 0).map(|a| (p.bits, a.window, 1, p.f_gain));
        [Some((p.bits, p.window, p.windows, p.f_gain)), alone]
    });
    let tables: BTreeSet<(u32, u32, u32, u32)> = tables.flatten().collect();
    tables.iter().map(|(bits, window, n, _)| if *n == 1 { WINDOW_ROW << window } else { windows(*bits, *window) }).sum()
}

fn attention_tables(p: &AttentionPlan) -> u64 {
    let exp = p.exp.map_or(0, |e| (16u64 << (p.score_k - e.exp_lo_bits)) + (4 << e.exp_lo_bits));
    exp + windows(p.total_bits, p.total_window)
}

/// Tables of functions of the whole plan.
#[must_use]
pub fn table_bytes(plan: &Plan) -> u64 {
    let layers = plan.layers.iter().map(|l| {
        let gate = 32u64 << (l.mlp.gate_k - l.mlp.gate_lo_bits);
        attention_tables(&l.attention) + gate
    });
    let of_rows = plan.layers.iter().flat_map(|l| [&l.input_norm, &l.post_norm]).chain([&plan.head.norm]);
    let of_heads = plan.layers.iter().filter_map(|l| l.attention.qk_norm.as_ref());
    layers.sum::<u64>() + norm_tables(of_rows) + norm_tables(of_heads)
}

/// What `role` keeps of a model. Of the Owner's integers two bytes each are counted.
#[must_use]
pub fn model_bytes(role: Role, c: &ModelConfig, plan: &Plan) -> ModelBytes {
    let table = (c.vocab_size * c.hidden_size) as u64;
    // Rows are asked for in the ring of the residual stream.
    let embedding = if plan.private_embedding { (table * u64::from(plan.residual_k)).div_ceil(8) } else { 0 };
    let weights = match role {
        Role::Owner => 2 * owner_words(c, plan) + embedding,
        // All of it mapped, and read at least once to verify it. A plan that has not been checked may have none.
        Role::Helper => HalfLayout::new(c, plan).map_or(0, |half| half.loaded_bytes()),
        Role::Client => {
            let below = ModelConfig { num_layers: plan.first_private, ..c.clone() };
            let head = if c.tie_word_embeddings { 0 } else { table };
            let public = if plan.private_embedding { 0 } else { 4 * (below.parameter_count() - head) };
            let known = if plan.public_base { 4 * base_words(c, plan) as u64 } else { 0 };
            public + known + if plan.head.public { 4 * table } else { 0 }
        }
    };
    // A bottleneck's table beside that of the layer's own activation: twice as many rows at most.
    let bottleneck = |l: &LayerPlan| if c.bottleneck > 0 { 64u64 << (l.mlp.gate_k - l.mlp.gate_lo_bits) } else { 0 };
    ModelBytes { weights, tables: table_bytes(plan) + plan.layers.iter().map(bottleneck).sum::<u64>() }
}

/// Vectors of a pass at one layer: the largest operation, and what the Helper's answers wait for.
struct Layer {
    largest: u64,
    /// At the Owner, who has one party's share of everything and no tables of masks: the words of the maximum's codes, or the
    /// vectors of the MLP.
    value: u64,
    held: u64,
}

/// Of a pass whose blocks have `rows` rows, and its pieces what `most_pieces` leaves.
fn layer(
    c: &ModelConfig,
    (shape, l): (LayerShape, &LayerPlan),
    (first, tokens): (usize, usize),
    rows: usize,
    most_pieces: usize,
) -> Layer {
    let t = tokens as u64;
    let (h, m, q) = (c.hidden_size as u64, c.intermediate_size as u64, shape.q_size() as u64);
    let kv = shape.kv_size() as u64;
    // Of the last block, which is the largest; as many of them as are walked ahead.
    let rows = rows.min(tokens);
    let scores = block::scores(c, shape.num_heads, first + tokens - rows, rows) as u64;
    let ahead = (BLOCKS_PER_LAYER as u64 * scores).min(block::scores(c, shape.num_heads, first, tokens) as u64);
    let a = &l.attention;
    // Query bytes of a lookup per element.
    let query = |bits: u32| (1u64 << bits) / 8;
    let (exp_rows, code_rows, columns) = match &a.exp {
        Some(e) => (query(a.score_k - e.exp_lo_bits), query(a.score_k - e.step_bits), e.steps as u64 + 1),
        // Signs: five chunks with a word each, and a lookup of at most 216 rows.
        None => (query(8), 5 * query(4), 5),
    };
    // Of the pieces of a prompt all have what comes out, and one at a time what goes in and out.
    let pieced = |rows: usize, stays: u64, passes: u64| {
        let pieces = (rows / pieces::LEAST_ROWS).clamp(1, most_pieces.max(1));
        stays + passes / pieces as u64
    };
    let codes = pieced(rows, scores * 8 * columns, scores * (code_rows + 8 * 2 * columns));
    let gate = pieced(tokens, t * m * 8 * 2, t * m * (query(l.mlp.gate_k - l.mlp.gate_lo_bits) + 8 * 3));
    let exp = pieced(rows, scores * 8, scores * (exp_rows + 8 * 7));
    // Two windows of as many rows, or one of more.
    let rows = |p: &NormPlan| match p.alone.filter(|a| tokens <= a.most) {
        Some(alone) => query(alone.window),
        None => 2 * query(p.window),
    };
    // Scaled with the root, an element has three times the words.
    let words = |p: &NormPlan| if tokens <= p.joint { 12 } else { 4 };
    let norm =
        t * (rows(&l.post_norm).max(rows(&l.input_norm)) + 8 * h * words(&l.input_norm).max(words(&l.post_norm)));
    // Words that a job captures, per element: masks of the result and of the reply, copies of operands.
    let guard = |proven: u32, k: u32| if proven > k { 5 * u64::from((proven - k + 4).div_ceil(8)) } else { 0 };
    let words = 6 * h * t
        + t * (2 * (q + 2 * kv) + 5 * q)
        + ahead * (2 * columns + guard(a.score_proven, a.score_k) + 6)
        + t * m * (9 + guard(l.mlp.gate_proven, l.mlp.gate_k));
    // What lives beside it: hidden states, projections and gated values of the layer.
    let beside = 8 * t * (2 * m + 3 * h + 2 * q) * 10 / VECTORS;
    let value = (scores * code_rows.max(8 * 2 * columns + 8 * 10)).max(t * m * 8 * 20);
    Layer { value, largest: codes.max(gate).max(exp).max(norm) + beside, held: 8 * words }
}

/// The private layers at a pass.
fn layers(c: &ModelConfig, plan: &Plan, first: usize, tokens: usize) -> Vec<Layer> {
    let rows = block::rows(c, plan, first, tokens);
    shaped(c, plan).map(|l| layer(c, l, (first, tokens), rows, plan.pieces)).collect()
}

/// Run-ahead bytes of one pass of `tokens` from `first` on, about: what linear layers, products and lookups send to the
/// Owner (the exact figure is that of a walk).
fn ahead_bytes(c: &ModelConfig, plan: &Plan, first: usize, tokens: usize) -> u64 {
    let t = tokens as u64;
    let (h, m) = (c.hidden_size as u64, c.intermediate_size as u64);
    let layers = shaped(c, plan).map(|(shape, l)| {
        let (q, kv) = (shape.q_size() as u64, shape.kv_size() as u64);
        let scores = block::scores(c, shape.num_heads, first, tokens) as u64;
        let a = &l.attention;
        let counter = u64::from(usize::BITS - c.max_positions.leading_zeros());
        let per_score = u64::from(a.score_proven + 8)
            + 40
            + a.exp.map_or(24, |e| (e.steps as u64 + 1) * counter)
            + 3 * u64::from(a.prob_k + 13);
        let linear = 2 * (q + 2 * kv + h + c.gate_up_size() as u64 + h) * 48;
        let rest = 2 * h * 64 + 2 * (q + 2 * kv) * 24 + 3 * q * 64 + m * (128 + 24 + 64 + 64);
        (t * (linear + rest) + scores * per_score) / 8
    });
    layers.sum::<u64>() + c.vocab_size as u64 * (2 * 48 + 40) / 8
}

/// Tenths of the largest operation's own vectors that are alive with it: its operands and copies. Measured, see
/// `tests/cost_memory.rs`.
const VECTORS: u64 = 18;

/// Of the batches in which `decode` passes are walked.
fn largest_batch(decode: usize) -> usize {
    let (mut batch, mut left, mut largest) = (0, decode, 0);
    while left > 0 && largest < MAX_BATCH {
        batch = next_batch(batch, MAX_BATCH);
        largest = largest.max(batch.min(left));
        left = left.saturating_sub(batch);
    }
    largest
}

/// Bytes of vectors of the largest pass that verifies drafts, at the end of a context of `positions`: it is walked by itself,
/// as a prompt's, and has a head for every position. A request of no drafts needs none of it.
#[must_use]
pub fn verification_bytes(role: Role, c: &ModelConfig, plan: &Plan, positions: usize) -> u64 {
    let tokens = (MAX_DRAFTS + 1).min(positions);
    let layers = layers(c, plan, positions - tokens, tokens);
    let head = tokens as u64 * head_bytes(c, plan);
    let largest = VECTORS * layers.iter().map(|l| l.largest).max().unwrap_or(0).max(head) / 10;
    largest + if role == Role::Helper { most_held(&layers, JOBS_AHEAD_LAYERS) } else { 0 }
}

/// By the `n` layers that hold most.
fn most_held(layers: &[Layer], n: usize) -> u64 {
    let mut held: Vec<u64> = layers.iter().map(|l| l.held).collect();
    held.sort_unstable_by_key(|h| std::cmp::Reverse(*h));
    held.iter().take(n).sum()
}

/// Bytes of a tournament per comparison, and per candidate. Measured, see `tests/cost_memory.rs`.
const TOURNAMENT: (usize, usize) = (170, 20);

/// Of one position's tournament: its largest level.
fn head_bytes(c: &ModelConfig, plan: &Plan) -> u64 {
    let level = |(left, radix): (usize, usize)| {
        let candidates = left.next_multiple_of(radix);
        candidates * (radix - 1) / 2 * TOURNAMENT.0 + candidates * TOURNAMENT.1
    };
    argmax::levels(c.vocab_size, plan.head.radix.each()).map(level).max().unwrap_or(0) as u64
}

/// What `role` takes for a session whose longest request has `prefill` tokens and `decode` further ones, with buffers of
/// `run_ahead_capacity` bytes for each peer's run-ahead at the Owner.
#[must_use]
pub fn session_bytes(
    role: Role,
    c: &ModelConfig,
    plan: &Plan,
    prefill: usize,
    decode: usize,
    run_ahead_capacity: u64,
) -> SessionBytes {
    let positions = (prefill + decode) as u64;
    let parts = if role == Role::Owner { 1 } else { 2 };
    let kept = |(shape, l): (LayerShape, &LayerPlan)| {
        let [key, value] = [product_ring(l.attention.score_proven), l.attention.prob_k];
        (packed_len(shape.kv_size(), key) + packed_len(shape.kv_size(), value)) as u64
    };
    let cache = parts * shaped(c, plan).map(kept).sum::<u64>() * positions;
    let last = prefill + decode.saturating_sub(1);
    // Batches of holders: passes walked together, and passes walked and not yet used.
    let (batch, waiting) = (largest_batch(decode), decode.min(MAX_WAITING));
    let largest = |layers: &[Layer], head: u64| layers.iter().map(|l| l.largest).max().unwrap_or(0).max(head);
    let head = head_bytes(c, plan);
    let (first, later) = (layers(c, plan, 0, prefill), layers(c, plan, last, 1));
    let (once, together) = (VECTORS * largest(&first, head) / 10, VECTORS * batch as u64 * largest(&later, head) / 10);
    let value = first.iter().map(|l| l.value).max().unwrap_or(0).max(VECTORS * head / 10);
    let batch_bytes = match role {
        Role::Owner => value,
        Role::Client => once.max(together),
        Role::Helper => {
            let blocks = block::rows(c, plan, 0, prefill) < prefill;
            let prefill = once + most_held(&first, if blocks { 1 } else { JOBS_AHEAD_LAYERS });
            let held: u64 = later.iter().map(|l| l.held).sum::<u64>() + head;
            prefill.max(together + waiting as u64 * held)
        }
    };
    let run_ahead = if role == Role::Owner {
        let walked = ahead_bytes(c, plan, 0, prefill).max(waiting as u64 * ahead_bytes(c, plan, last, 1));
        walked.min(2 * run_ahead_capacity)
    } else {
        0
    };
    SessionBytes { cache, run_ahead, batch: batch_bytes }
}
