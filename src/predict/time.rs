//! From counted work to seconds.
//!
//! A pass is a sequence of exchanges: the Owner computes and asks, the Helper computes and answers. Its time, with the
//! run-ahead work already done ("ready"), is the online work of both, one after the other, plus what the messages take. A prompt's largest
//! exchanges go in pieces ([`crate::protocol::pieces`]), so that work and both directions of the link overlap.
//! Sustained, all work counts: in one process it shares the cores; on one machine each, the slowest of the three and of
//! their links sets the pace.

use serde::Serialize;

use super::rates::Rates;
use super::rehearsal::Terms;
use super::source::Source;
use super::walk::Stretch;
use crate::generate::MAX_BATCH;
use crate::net::Lane;
use crate::net::shape::Profile;
use crate::party::Role;
use crate::plan::work::{Counts, Part};
use crate::protocol::pieces;

/// Seconds of a pass by part.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Seconds {
    /// The Client's public layers in plaintext.
    pub public_layers: f64,
    /// Online work of Owner and Helper for norms.
    pub norm: f64,
    /// For attention.
    pub attention: f64,
    /// For the MLPs.
    pub mlp: f64,
    /// For input, final norm, head and choice of the token.
    pub head: f64,
    /// Latency and bandwidth of the online messages, and handing them from thread to thread.
    pub network: f64,
    /// Work of Client and Helper ahead of time, not part of `ready`.
    pub run_ahead: f64,
}

/// A phase's time in milliseconds per pass.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Phase {
    /// By part, on cores of its own for every party.
    pub parts_ms: Seconds,
    /// One machine each, run-ahead already there.
    pub ready_ms: f64,
    /// One machine each, run-ahead work and traffic counted.
    pub sustained_ms: f64,
    /// All three in one process on this machine's cores, run-ahead work counted.
    pub one_process_ms: f64,
}

fn bits_s(bytes: u64, net: Profile) -> f64 {
    8.0 * bytes as f64 / net.bits_per_second
}

/// The time of one pass of `stretch`.
pub(super) fn phase(stretch: &Stretch, s: &Source, net: Profile, rates: &Rates) -> Phase {
    if stretch.passes == 0 {
        let parts_ms = Seconds::default();
        return Phase { parts_ms, ready_ms: 0.0, sustained_ms: 0.0, one_process_ms: 0.0 };
    }
    let passes = stretch.passes as f64;
    let (ready, one_process) = (&rates.overheads.ready, &rates.overheads.one_process);
    let layers = s.plan.layers.len();
    let parts = Part::ALL.map(|part| ready.seconds(&online(stretch, part, layers, rates)[1]));
    // On all cores of a machine of its own.
    let alone = |role: Role, lane: Lane| {
        let mut all = Counts::default();
        stretch.work[role.index()][lane as usize].iter().for_each(|c| all += *c);
        one_process.seconds(&work(&all, lane, stretch, layers, rates)[1])
    };
    let sent = |from: Role, to: Role| stretch.links[from.index()][to.index()];
    let wires = [
        (Role::Owner, Role::Helper),
        (Role::Helper, Role::Owner),
        (Role::Client, Role::Owner),
        (Role::Owner, Role::Client),
    ]
    .map(|(a, b)| bits_s(sent(a, b).online_bytes, net) / passes);
    let wire: f64 = wires.iter().sum();
    let depth = f64::from(stretch.depth) / passes;
    let woken = if net.is_none() { 0.0 } else { rates.overheads.woken_s };
    let overlapped = overlap(stretch, s.plan.pieces, [wires[0], wires[1], parts[1] + parts[2]]);
    let network = depth * (net.rtt.as_secs_f64() / 2.0 + ready.message_s + woken) + wire - overlapped;
    let (client, helper) = (alone(Role::Client, Lane::Ahead), alone(Role::Helper, Lane::Ahead));
    let public = public_layers(stretch, s, rates) / passes;
    let seconds = Seconds {
        public_layers: public,
        norm: parts[0],
        attention: parts[1],
        mlp: parts[2],
        head: parts[3],
        network,
        run_ahead: client.max(helper),
    };
    let compute = parts.iter().sum::<f64>();
    let ready = public + compute + network;
    let links = Role::ALL.iter().flat_map(|&a| Role::ALL.map(|b| sent(a, b)));
    let busiest = links.map(|l| bits_s(l.online_bytes + l.ahead_bytes, net) / passes).fold(0.0, f64::max);
    let helper_all = helper + alone(Role::Helper, Lane::Online);
    let sustained = ready.max(client).max(helper_all).max(busiest);
    let cores = public + one_process.seconds(&terms(stretch, layers, rates).all);
    // On a network the cores are busy with what is ahead while the online part waits, but not all of the time.
    let shared = if net.is_none() { ready.max(cores) } else { (ready.powi(3) + cores.powi(3)).cbrt() };
    let one_process = shared.max(busiest);
    let ms = |s: f64| s * 1e3;
    let parts_ms = Seconds {
        public_layers: ms(seconds.public_layers),
        norm: ms(seconds.norm),
        attention: ms(seconds.attention),
        mlp: ms(seconds.mlp),
        head: ms(seconds.head),
        network: ms(seconds.network),
        run_ahead: ms(seconds.run_ahead),
    };
    Phase { parts_ms, ready_ms: ms(ready), sustained_ms: ms(sustained), one_process_ms: ms(one_process) }
}

/// Of what attention and MLPs compute and send, the share that goes in pieces (`trefoil bench --preset h768 --test pp128` on three networks).
const IN_PIECES: f64 = 0.75;

/// Seconds by which the longest of these stages hides the others: with `n` pieces all but an `n`-th of them.
fn overlap(stretch: &Stretch, most_pieces: usize, stages: [f64; 3]) -> f64 {
    if stretch.passes != 1 {
        return 0.0;
    }
    let n = (stretch.tokens / pieces::LEAST_ROWS).clamp(1, most_pieces.max(1)) as f64;
    let longest = stages.iter().copied().fold(0.0, f64::max);
    IN_PIECES * (stages.iter().sum::<f64>() - longest) * (1.0 - 1.0 / n)
}

/// What a pass's times are fitted to.
pub(super) struct PassTerms {
    /// Online work of Owner and Helper.
    pub online: Terms,
    /// All work.
    pub all: Terms,
}

fn plus(a: Terms, b: Terms) -> Terms {
    std::array::from_fn(|i| a[i] + b[i])
}

/// Multiply-adds of a pass and layer from which kernels use the whole pool.
const WIDE: u64 = 1 << 20;

/// Words of a pass and layer from which several threads share them: some thirty operations have as many as [`crate::par`] shares.
const MANY_WORDS: u64 = 1 << 19;

/// Of a pass of `stretch`, which took `c` in all: seconds of cores, and of the clock.
fn work(c: &Counts, lane: Lane, stretch: &Stretch, layers: usize, rates: &Rates) -> [Terms; 2] {
    let passes = stretch.passes.max(1) as f64;
    let [rows, walked] = [passes, stretch.batches.max(1) as f64].map(|n| stretch.tokens as f64 / n);
    let batch = match lane {
        Lane::Ahead => walked,
        Lane::Online if rows > 1.0 => rows,
        Lane::Online => MAX_BATCH as f64,
    };
    let kernels = rates.kernel_seconds(c, rows, batch) / passes;
    let each = (layers.max(1) * stretch.passes.max(1)) as u64;
    let threads = |n: u64, enough: u64| if n / each > enough { rates.threads as f64 } else { 1.0 };
    let words = c.words as f64 / passes;
    let macs = c.weight_macs + c.ring_macs + 16 * c.fold_words;
    [[kernels, words, 0.0], [kernels / threads(macs, WIDE), words / threads(c.words, MANY_WORDS), 0.0]]
}

/// Online work of Owner and Helper in a part of a pass.
fn online(stretch: &Stretch, part: Part, layers: usize, rates: &Rates) -> [Terms; 2] {
    let of = |role: Role| &stretch.work[role.index()][Lane::Online as usize][part as usize];
    let mut helper = *of(Role::Helper);
    // An answer masks, packs and unpacks as many words as its question.
    helper.words += of(Role::Owner).words;
    let (owner, helper) = (
        work(of(Role::Owner), Lane::Online, stretch, layers, rates),
        work(&helper, Lane::Online, stretch, layers, rates),
    );
    [0, 1].map(|i| plus(owner[i], helper[i]))
}

/// The terms of a pass of `stretch` through `layers` private layers.
pub(super) fn terms(stretch: &Stretch, layers: usize, rates: &Rates) -> PassTerms {
    let depth = [0.0, 0.0, f64::from(stretch.depth) / stretch.passes.max(1) as f64];
    let parts = Part::ALL.map(|part| online(stretch, part, layers, rates));
    let ahead = stretch.work.iter().flat_map(|lanes| &lanes[Lane::Ahead as usize]);
    let cores = parts.iter().map(|p| p[0]).chain(ahead.map(|c| work(c, Lane::Ahead, stretch, layers, rates)[0]));
    let [kernels, words, depth_all] = cores.fold(depth, plus);
    PassTerms {
        online: parts.iter().map(|p| p[1]).fold(depth, plus),
        all: [kernels / rates.threads as f64, words / rates.threads as f64, depth_all],
    }
}

/// The Client's plaintext layers: one row reads all weights, a prompt's share them.
fn public_layers(stretch: &Stretch, s: &Source, rates: &Rates) -> f64 {
    let c = &s.config;
    let weights = (0..s.plan.first_private).map(|i| c.layer_parameters(i)).sum::<u64>() as f64;
    let (passes, [row, together]) = (stretch.passes as f64, rates.float_macs);
    passes * (weights / row).max(stretch.tokens as f64 / passes.max(1.0) * weights / together)
}
