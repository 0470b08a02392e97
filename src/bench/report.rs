//! Rows, as JSON and as text.

use std::collections::BTreeMap;

use serde::Serialize;

use super::breakdown::{ByOperation, Operation, Steps};
use super::{Peak, Plaintext};
use crate::ledger::Kind;
use crate::ring::Isa;

/// What a test took. Where `layers_measured` is below `layers_total`, times are extrapolated; bytes and messages are
/// counted for all layers in any case.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// The shape; of a model its directory, and the adapter's.
    pub preset: String,
    /// What was done to the private layers: merged or fewer heads, another softmax or activation, LoRA; or `none`.
    pub reshaping: String,
    /// `ppN` or `tgN`.
    pub test: String,
    /// Cached positions before the first token.
    pub context: usize,
    /// The network.
    pub net: String,
    /// Private layers that were run.
    pub layers_measured: usize,
    /// Private layers that the figures are for.
    pub layers_total: usize,
    /// From cold, run-ahead work of all parties counted.
    pub ms_per_token: f64,
    /// The online part alone, of at most a batch of tokens; `None` of a prompt that is cut into blocks ([`crate::plan::block`]), whose run-ahead nobody
    /// holds as a whole.
    pub ms_per_token_ready: Option<f64>,
    /// The float model with all of its layers.
    pub float_ms_per_token: f64,
    /// Bytes of all links that depend on the input.
    pub online_bytes_per_token: u64,
    /// Bytes of all links that are sent ahead of it.
    pub ahead_bytes_per_token: u64,
    /// Online messages in sequence; of a prefill those of the pass over its tokens.
    pub messages_per_token: f64,
    /// Of this process: all three parties, with the layers that were run.
    pub peak_memory_bytes: u64,
    /// Of each party in a process of its own, all private layers.
    pub predicted_peak_memory_bytes: BTreeMap<String, u64>,
    /// What the Owner holds of each peer's run-ahead at most; batches take half of it.
    pub run_ahead_buffer_bytes: u64,
    /// Of all three parties together.
    pub threads: usize,
    /// The instruction set of the kernels.
    pub isa: &'static str,
    /// The sustained run by party and kind of operation; bytes counted for all layers.
    pub by_operation: ByOperation,
    /// The run behind `ms_per_token_ready` by kind of operation.
    pub ready_by_operation: Steps,
}

/// Rows and what the float model is held against.
pub struct Report {
    /// One per test.
    pub rows: Vec<Row>,
    /// The float model, by test.
    pub plaintext: Vec<Plaintext>,
    /// The machine.
    pub peak: Peak,
}

impl Report {
    /// A Markdown table.
    #[must_use]
    pub fn markdown(&self) -> String {
        let mut out = String::from(
            "| preset | reshaping | test | context | net | layers | ms/token sustained | ms/token ready | float ms/token | online MB/token | run-ahead MB/token | messages/token | peak MB, this process |\n|---|---|---|---:|---|---|---:|---:|---:|---:|---:|---:|---:|\n",
        );
        let mb = |b: u64| b as f64 / 1e6;
        for r in &self.rows {
            let layers = if r.layers_measured == r.layers_total {
                format!("{}", r.layers_total)
            } else {
                format!("{}, times extrapolated from {}", r.layers_total, r.layers_measured)
            };
            out += &format!(
                "| {} | {} | {} | {} | {} | {layers} | {:.2} | {} | {:.3} | {:.3} | {:.3} | {} | {:.0} |\n",
                r.preset,
                r.reshaping,
                r.test,
                r.context,
                r.net,
                r.ms_per_token,
                r.ms_per_token_ready.map_or("-".into(), |ms| format!("{ms:.2}")),
                r.float_ms_per_token,
                mb(r.online_bytes_per_token),
                mb(r.ahead_bytes_per_token),
                // Of a prefill its share of them.
                (1e3 * r.messages_per_token).round() / 1e3,
                mb(r.peak_memory_bytes),
            );
        }
        out + &self.breakdown()
    }

    /// What a token is made of, a table for every row.
    fn breakdown(&self) -> String {
        let mut out = String::new();
        for r in &self.rows {
            out += &format!("\n{} at context {}, per token:\n\n", r.test, r.context);
            out += &operations(&r.by_operation, &r.ready_by_operation);
        }
        out
    }

    /// The float model beside the machine, and what the figures are of.
    #[must_use]
    pub fn notes(&self) -> String {
        let giga = |v: f64| v / 1e9;
        let mut out = format!(
            "three parties on {} threads ({}); machine: {:.0} GB/s plain read, {:.0} GFLOP/s f32 multiply-add, all threads\n",
            rayon::current_num_threads(),
            Isa::current().name(),
            giga(self.peak.bytes),
            giga(self.peak.flops)
        );
        for (row, p) in self.rows.iter().zip(&self.plaintext) {
            out += &format!(
                "float model, {} at context {}: {:.1} GB/s, {:.1} GFLOP/s",
                row.test,
                row.context,
                giga(p.bytes),
                giga(p.flops)
            );
            out += match row.test.strip_prefix("tg").and_then(|n| n.parse::<usize>().ok()) {
                Some(n) if n < 64 => "; sustained over fewer than 64 tokens: not a headline\n",
                _ => "\n",
            };
        }
        out
    }
}

/// A table of what a token (an image) takes by kind of operation.
pub(super) fn operations(by_operation: &ByOperation, ready: &Steps) -> String {
    let mut out = String::from(
        "| operation | ready: Owner computes, ms | waits | network | from cold, ms computing: Owner | Client | Helper | of these, streams | online kB | run-ahead kB |\n|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|\n",
    );
    for kind in Kind::ALL {
        let of = |party: &str| by_operation.get(party).and_then(|o| o.get(kind.name())).copied();
        let parties = ["owner", "client", "helper"].map(of);
        let step = ready.get(kind.name()).copied();
        if step.is_none() && parties.iter().all(Option::is_none) {
            continue;
        }
        let (step, parties) = (step.unwrap_or_default(), parties.map(Option::unwrap_or_default));
        let [owner, client, helper] = parties.map(|o| o.computing());
        let streams: f64 = parties.iter().map(Operation::streams).sum();
        let kilo = |f: fn(&Operation) -> u64| parties.iter().map(f).sum::<u64>() as f64 / 1e3;
        out += &format!(
            "| {} | {:.3} | {:.3} | {:.3} | {owner:.3} | {client:.3} | {helper:.3} | {streams:.3} | {:.1} | {:.1} |\n",
            kind.name().replace('_', " "),
            step.compute_ms,
            step.wait_ms,
            step.network_ms,
            kilo(|o| o.online_bytes),
            kilo(|o| o.ahead_bytes),
        );
    }
    out
}
