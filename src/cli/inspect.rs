//! `trefoil inspect`: what a model is, what of it is public and private, and what it would cost.

use std::fmt::Write as _;
use std::path::PathBuf;

use super::private::Chosen;
use serde::Serialize;
use trefoil::error::{Error, Result};
use trefoil::model::preparation::{Loaded, Options, Split};
use trefoil::model::variant::Record;
use trefoil::model::{Activation, Checkpoint, LayerWeights, Layered, ModelConfig, Softmax};
use trefoil::net::shape::Profile;
use trefoil::predict::{Prediction, Rates, Source, predict};

/// Tokens of the request whose cost is shown.
const PREFILL: usize = 32;
const DECODE: usize = 16;

/// Options of `trefoil inspect`.
#[derive(clap::Args)]
pub struct Args {
    /// The model's directory.
    #[arg(value_name = "DIR", default_value = "models/quill-4m")]
    model: PathBuf,
    /// The public base that it was fine-tuned from: layers that are still its own, bit for bit, are found by comparison.
    #[arg(long, value_name = "DIR", conflicts_with = "adapter")]
    base: Option<PathBuf>,
    #[command(flatten)]
    private: super::private::Args,
    /// Network for the predicted cost: none, lan, wan, or RTT_MS,GBPS.
    #[arg(long, default_value = "none")]
    net: String,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Neighbouring layers that are alike.
#[derive(Serialize)]
struct Layers {
    first: usize,
    last: usize,
    private: bool,
    query_heads: usize,
    key_value_heads: usize,
    head_dim: usize,
    softmax: Softmax,
    activation: Activation,
    parameters: u64,
}

#[derive(Serialize)]
struct Report {
    architecture: &'static str,
    hidden_size: usize,
    intermediate_size: usize,
    vocab_size: usize,
    max_positions: usize,
    layers: Vec<Layers>,
    private_embedding: bool,
    private_head: bool,
    public_parameters: u64,
    private_parameters: u64,
    /// Layers from the bottom that are the base's, if one was given.
    layers_of_base: Option<usize>,
    /// Of an adapter: the only private ones.
    adapter_parameters: Option<u64>,
    /// What trefoil.json says of how the model was made.
    made: serde_json::Map<String, serde_json::Value>,
    cost: Prediction,
}

/// Runs the command.
///
/// # Errors
/// Whatever the options or the checkpoint got wrong.
pub fn run(a: &Args) -> Result<()> {
    let net: Profile = a.net.parse()?;
    let Chosen { model, adapter, config: c, private_layers } = a.private.chosen(&a.model)?;
    let layers_of_base = match &a.base {
        Some(dir) => Some(common_layers(&Checkpoint::open(&model)?, &Checkpoint::open(dir)?)?),
        None => None,
    };
    let options = Options { private_layers, base: a.base.clone(), adapter, ..Options::default() };
    let loaded = Loaded::stream(&model, &options)?;
    let Split { first_private: first, private_embedding, .. } = loaded.split;
    let adapters = loaded.weights.adapter_parameters();
    let source = Source::loaded(loaded)?;
    let prefill = PREFILL.min(c.max_positions.saturating_sub(DECODE).max(1));
    let cost = predict(&source, prefill, DECODE.min(c.max_positions), net, Rates::measure()?)?;
    let private_head = cost.private_head;
    let table = (c.vocab_size * c.hidden_size) as u64;
    let of = |range: std::ops::Range<usize>| range.map(|i| c.layer_parameters(i)).sum::<u64>();
    let head = table + c.hidden_size as u64;
    // What an adapter is added to is public.
    let private_parameters = adapters.unwrap_or_else(|| {
        of(first..c.num_layers)
            + if private_head { head } else { 0 }
            + if private_embedding && !(c.tie_word_embeddings && private_head) { table } else { 0 }
    });
    let report = Report {
        architecture: c.arch.name(),
        hidden_size: c.hidden_size,
        intermediate_size: c.intermediate_size,
        vocab_size: c.vocab_size,
        max_positions: c.max_positions,
        layers: alike(&c, first),
        private_embedding,
        private_head,
        public_parameters: c.parameter_count() + adapters.unwrap_or(0) - private_parameters,
        private_parameters,
        layers_of_base,
        adapter_parameters: adapters,
        made: Record::open(&a.model)?.map(|r| r.made).unwrap_or_default(),
        cost,
    };
    if a.json {
        let json = serde_json::to_string_pretty(&report).map_err(|e| Error::Internal(format!("writing JSON: {e}")))?;
        return super::say(&format!("{json}\n"));
    }
    super::say(&text(a, &report))
}

/// Layers from the bottom, and the embedding below them, that are the same in both, bit for bit.
fn common_layers(model: &Checkpoint, base: &Checkpoint) -> Result<usize> {
    let (c, b) = (model.config(), base.config());
    let table = [c.vocab_size, c.hidden_size];
    let embedding = |of: &Checkpoint| of.tensor2("model.embed_tokens.weight", table);
    if table != [b.vocab_size, b.hidden_size] || embedding(model)? != embedding(base)? {
        return Ok(0);
    }
    for i in 0..c.num_layers.min(b.num_layers) {
        if c.layer(i) != b.layer(i) || LayerWeights::load(model, i)? != LayerWeights::load(base, i)? {
            return Ok(i);
        }
    }
    Ok(c.num_layers.min(b.num_layers))
}

fn alike(c: &ModelConfig, first_private: usize) -> Vec<Layers> {
    let mut all: Vec<Layers> = Vec::new();
    for i in 0..c.num_layers {
        let (shape, private) = (c.layer(i), i >= first_private);
        let parameters = c.layer_parameters(i);
        match all.last_mut() {
            Some(l) if l.private == private && c.layer(l.first) == shape => {
                l.last = i;
                l.parameters += parameters;
            }
            _ => all.push(Layers {
                first: i,
                last: i,
                private,
                query_heads: shape.num_heads,
                key_value_heads: shape.num_kv_heads,
                head_dim: shape.head_dim,
                softmax: shape.softmax,
                activation: shape.activation,
                parameters,
            }),
        }
    }
    all
}

fn text(a: &Args, r: &Report) -> String {
    let side = |private: bool| if private { "private" } else { "public" };
    let mut out = format!(
        "{}\n{}, hidden {}, MLP {}, vocabulary {}, context {}\n\n",
        a.model.display(),
        r.architecture,
        r.hidden_size,
        r.intermediate_size,
        r.vocab_size,
        r.max_positions
    );
    // Writing to a string does not fail.
    let _ = writeln!(out, "{:<14}{}", "embedding", side(r.private_embedding));
    for l in &r.layers {
        let which =
            if l.first == l.last { format!("layer {}", l.first) } else { format!("layers {}-{}", l.first, l.last) };
        let softmax = if l.softmax == Softmax::Exact { "exact softmax" } else { "2ReLU softmax" };
        let _ = writeln!(
            out,
            "{which:<14}{:<9}{} query and {} key/value heads of {}, {softmax}, {:?}, {} parameters",
            side(l.private),
            l.query_heads,
            l.key_value_heads,
            l.head_dim,
            l.activation,
            l.parameters
        );
    }
    let _ = writeln!(out, "{:<14}{}", "norm and head", side(r.private_head));
    if let Some(n) = r.layers_of_base {
        let _ = writeln!(out, "{:<14}the lowest {n} layers and the embedding are the base's, bit for bit", "base");
    }
    if let Some(n) = r.adapter_parameters {
        let _ = writeln!(out, "{:<14}{n} parameters, private; what it is added to is public", "adapter");
    }
    let _ = writeln!(out, "\nparameters    {} public, {} private", r.public_parameters, r.private_parameters);
    for (name, value) in &r.made {
        let _ = writeln!(out, "{name:<14}{value}");
    }
    let p = &r.cost;
    let mb = |links: &trefoil::predict::NamedLinks| {
        links.values().map(|l| l.online_bytes + l.ahead_bytes).sum::<u64>() as f64 / 1e6
    };
    let _ = writeln!(
        out,
        "\npredicted     {} prompt tokens: {:.1} ms, {:.2} MB, {} messages; then per token {:.2} ms, {:.3} MB, {} messages\n              (network {}, a machine for each party, run-ahead counted; trefoil cost says more)",
        p.prefill_tokens,
        p.prefill.sustained_ms,
        mb(&p.prefill_links),
        p.messages_prefill,
        p.decode.sustained_ms,
        mb(&p.token_links),
        p.messages_per_token,
        p.net
    );
    out
}
