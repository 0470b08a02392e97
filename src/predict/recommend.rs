//! Which of MARILL's techniques pay for a model, a request and a network (MARILL, appendix F): the cost model asked once for
//! each, with the ranges that calibration saw in the model as it is. What a technique costs in quality, training tells.

use ndarray::Array2;
use serde::Serialize;

use super::{Prediction, Rates, Source, predict};
use crate::error::{Error, Result};
use crate::model::preparation::{Evidence, Loaded, Options};
use crate::model::variant::Reshaping;
use crate::model::{Activation, LowRank, ModelConfig, Softmax};
use crate::net::shape::Profile;
use crate::plan::memory::owner_words;
use crate::plan::{self, Bounds, Module, Ranges};

/// What is done to the model.
#[derive(Clone, Copy, Debug)]
struct Technique {
    name: &'static str,
    /// Private layers: all of them over this.
    frozen: usize,
    reshaping: Reshaping,
    /// Adapters of [`RANK`] over a public base.
    adapters: bool,
}

/// Rank of the adapters asked about: the default of `trefoil finetune`.
const RANK: usize = 16;

const fn technique(
    name: &'static str,
    frozen: usize,
    merged: usize,
    softmax: Softmax,
    activation: Option<Activation>,
) -> Technique {
    Technique { name, frozen, reshaping: Reshaping { merged, softmax, activation }, adapters: false }
}

const FULL: Technique = technique("full fine-tune", 1, 1, Softmax::Exact, None);

const fn lora(name: &'static str, frozen: usize) -> Technique {
    Technique { adapters: true, ..technique(name, frozen, 1, Softmax::Exact, None) }
}

const TECHNIQUES: [Technique; 11] = [
    technique("freeze 1/2", 2, 1, Softmax::Exact, None),
    technique("freeze 3/4", 4, 1, Softmax::Exact, None),
    lora("LoRA, rank 16", 1),
    lora("freeze 1/2, LoRA", 2),
    technique("merge 2 heads", 1, 2, Softmax::Exact, None),
    technique("merge 4 heads", 1, 4, Softmax::Exact, None),
    technique("2ReLU softmax", 1, 1, Softmax::TwoRelu, None),
    technique("ReLU", 1, 1, Softmax::Exact, Some(Activation::Relu)),
    technique("freeze 1/2, merge 2", 2, 2, Softmax::Exact, None),
    technique("freeze 1/2, merge 4", 2, 4, Softmax::Exact, None),
    technique("freeze 1/2, merge 4, 2ReLU", 2, 4, Softmax::TwoRelu, None),
];

/// What a technique would cost.
#[derive(Clone, Debug, Serialize)]
pub struct Advice {
    /// Its name.
    pub technique: &'static str,
    /// Why it cannot be applied; the figures are then those of nothing.
    pub impossible: Option<String>,
    /// Milliseconds of the prefill, run-ahead counted, a machine for each party.
    pub prefill_ms: f64,
    /// Of a decode pass.
    pub token_ms: f64,
    /// Bytes of all parties, run-ahead counted: prefill.
    pub prefill_bytes: u64,
    /// Per decode pass.
    pub token_bytes: u64,
    /// Messages in sequence of the prefill.
    pub prefill_messages: u32,
    /// Per decode pass.
    pub token_messages: u32,
    /// Of the whole request, the full fine-tune's time over this.
    pub times_faster: f64,
    /// Of the whole request, the full fine-tune's bytes over these.
    pub times_fewer_bytes: f64,
    /// Whether it saves a tenth of the request's time at least.
    pub pays: bool,
}

/// Below this a technique is not worth what it does to a model.
const PAYS: f64 = 1.1;

/// The model as a technique would leave it: its plan from the ranges of the model as it is.
fn source(loaded: &Loaded, bounds: &Bounds, ranges: &Ranges, t: Technique, net: Profile) -> Result<Source> {
    let c = &loaded.weights.config;
    let first = c.num_layers - c.num_layers.div_ceil(t.frozen);
    let variant = t.reshaping.of(c.layer(c.num_layers - 1), first)?;
    let config = ModelConfig { variant, ..c.clone() };
    // Their base is public, embedding included.
    let private_embedding = t.frozen == 1 && !t.adapters;
    let mut bounds = Bounds { layers: bounds.layers[first..].to_vec(), ..bounds.clone() };
    // The sum of several heads' scores over the root of their number.
    bounds.layers.iter_mut().for_each(|b| b.score *= (t.reshaping.merged as f64).sqrt());
    let ranges = Ranges { layers: ranges.layers[first..].to_vec(), ..ranges.clone() };
    let plan = plan::plan(&config, first, private_embedding, &bounds, &ranges)?.at(&config, net);
    let owner_bytes = 2 * owner_words(&config, &plan);
    Ok(Source { config, plan, owner_bytes })
}

/// What the model shows with adapters on all of its maps, whose entries are of the size of trained ones: of the cost no more than some widths
/// of rings follow from them.
fn adapted(loaded: &Loaded) -> Result<Evidence> {
    let mut weights = loaded.weights.clone();
    for l in &mut weights.layers {
        for module in Module::ALL {
            let linear = l.linear_mut(module);
            let (out, inputs) = linear.w.dim();
            let [a, b] = [(RANK, inputs), (out, RANK)].map(|shape| Array2::from_elem(shape, 0.02));
            linear.adapter = Some(LowRank { a, b });
        }
    }
    let options = Options { private_layers: Some(weights.config.num_layers), ..Options::default() };
    let adapted = Loaded::new(weights, loaded.text.clone(), &options)?;
    Loaded { context: loaded.context, ..adapted }.evidence()
}

fn bytes(links: &super::NamedLinks) -> u64 {
    links.values().map(|l| l.online_bytes + l.ahead_bytes).sum()
}

/// What each technique would make of a request of `prefill` prompt tokens and `new_tokens` generated ones on `net`. The first
/// is the full fine-tune, of which everything is private, embedding and head included. `loaded` is the model with all layers
/// private.
///
/// # Errors
/// As [`predict`], and those of the model's calibration.
pub fn recommend(
    loaded: &Loaded,
    prefill: usize,
    new_tokens: usize,
    net: Profile,
    rates: Rates,
) -> Result<Vec<Advice>> {
    if loaded.weights.config.variant.is_some() {
        return Err(Error::Config(
            "this model's layers were changed already, as its trefoil.json says: ask for the model that it was made of"
                .into(),
        ));
    }
    let (plain, adapted) = (loaded.evidence()?, adapted(loaded));
    let ask = |t: Technique| {
        let evidence = match (t.adapters, &adapted) {
            (false, _) => &plain,
            (true, Ok(evidence)) => evidence,
            (true, Err(e)) => return Err(Error::Model(e.to_string())),
        };
        predict(&source(loaded, &evidence.bounds, &evidence.ranges, t, net)?, prefill, new_tokens, net, rates)
    };
    let full = ask(FULL)?;
    let passes = new_tokens.saturating_sub(1) as f64;
    let time = |p: &Prediction| p.prefill.sustained_ms + passes * p.decode.sustained_ms;
    let one = |t: Technique| match ask(t) {
        Ok(p) => {
            let times_faster = time(&full) / time(&p);
            Advice {
                technique: t.name,
                impossible: None,
                prefill_ms: p.prefill.sustained_ms,
                token_ms: p.decode.sustained_ms,
                prefill_bytes: bytes(&p.prefill_links),
                token_bytes: bytes(&p.token_links),
                prefill_messages: p.messages_prefill,
                token_messages: p.messages_per_token,
                times_faster,
                times_fewer_bytes: bytes(&full.request_links) as f64 / bytes(&p.request_links).max(1) as f64,
                pays: times_faster >= PAYS,
            }
        }
        Err(e) => Advice {
            technique: t.name,
            impossible: Some(e.to_string()),
            prefill_ms: 0.0,
            token_ms: 0.0,
            prefill_bytes: 0,
            token_bytes: 0,
            prefill_messages: 0,
            token_messages: 0,
            times_faster: 0.0,
            times_fewer_bytes: 0.0,
            pays: false,
        },
    };
    Ok(std::iter::once(FULL).chain(TECHNIQUES).map(one).collect())
}
