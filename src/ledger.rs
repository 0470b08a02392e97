//! Where a party's time and bytes go, by kind of operation: what `trefoil bench` shows.
//!
//! A thread that walks a pass or answers for one keeps a lap: what it is doing now and since when. Sessions, meters and the
//! simulated network say when that changes, a look at the clock and an addition each time. Times are of that one thread's
//! clock: what it computes on all threads of the pool counts once, and waiting for a core counts as computing.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use crate::net::Lane;

/// Kinds of operation, from the paths of [`crate::session::Scope`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The Client's input, private embedding included.
    Input,
    /// Norms.
    Norm,
    /// Products with weights.
    Linear,
    /// Queries by keys, their lifts included.
    Scores,
    /// The reference near each row's maximum.
    Maximum,
    /// The softmax's exponentials.
    Exponential,
    /// The softmax's quotient.
    Quotient,
    /// Probabilities by values, the lifts of both included.
    Context,
    /// The MLP's activation and its product with the gate.
    Activation,
    /// Choice of the token and its opening.
    Argmax,
    /// Guards and range flags.
    RangeChecks,
    /// What has no name here.
    Rest,
}

/// Number of kinds.
pub const KINDS: usize = Kind::ALL.len();

impl Kind {
    /// All of them, in the order of a pass.
    pub const ALL: [Kind; 12] = [
        Kind::Input,
        Kind::Norm,
        Kind::Linear,
        Kind::Scores,
        Kind::Maximum,
        Kind::Exponential,
        Kind::Quotient,
        Kind::Context,
        Kind::Activation,
        Kind::Argmax,
        Kind::RangeChecks,
        Kind::Rest,
    ];

    /// As in JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Kind::Input => "input",
            Kind::Norm => "norm",
            Kind::Linear => "linear",
            Kind::Scores => "attention_scores",
            Kind::Maximum => "softmax_maximum",
            Kind::Exponential => "softmax_exponential",
            Kind::Quotient => "softmax_quotient",
            Kind::Context => "attention_context",
            Kind::Activation => "mlp_function",
            Kind::Argmax => "argmax",
            Kind::RangeChecks => "range_checks",
            Kind::Rest => "rest",
        }
    }

    /// Of the operation at `path`.
    #[must_use]
    pub fn of(path: &str) -> Kind {
        let mut names = path.split('.');
        let (part, step) = (names.next().unwrap_or_default(), names.next().unwrap_or_default());
        if part == "range" || path.split('.').any(|name| name == "guard") {
            return Kind::RangeChecks;
        }
        match (part, step) {
            ("input", _) => Kind::Input,
            (_, "qkv" | "qk_gain" | "o" | "gate_up" | "down" | "lm_head" | "map" | "reset") => Kind::Linear,
            ("norm1" | "norm2" | "qk_norm", _) | (_, "qk_norm") | ("head", "norm") => Kind::Norm,
            ("head", _) => Kind::Argmax,
            ("attn", "scores" | "lift_q" | "lift_k" | "lift_s") => Kind::Scores,
            ("attn", "max") => Kind::Maximum,
            // What stands in its place.
            ("attn", "exp" | "relu") => Kind::Exponential,
            ("attn", "inverse" | "normalise") => Kind::Quotient,
            ("attn", "pv" | "lift_v" | "lift_o") => Kind::Context,
            ("mlp", _) => Kind::Activation,
            _ => Kind::Rest,
        }
    }
}

/// What a thread does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Doing {
    /// Computes.
    Compute,
    /// Draws from streams.
    Streams,
    /// Waits for a peer: for its message, or for room in its buffer.
    Wait,
    /// Waits for the simulated network.
    Network,
}

/// What one party has spent, by [`Kind`] and [`Lane`]. A holder's walk is on the ahead lane, its answers are online.
#[derive(Clone, Copy, Debug, Default)]
pub struct Spent {
    /// Nanoseconds, last by [`Doing`].
    pub ns: [[[u64; 4]; 2]; KINDS],
    /// Bytes sent, message headers included.
    pub bytes: [[u64; 2]; KINDS],
    /// Messages sent.
    pub messages: [[u64; 2]; KINDS],
}

impl Spent {
    /// Nanoseconds of one kind.
    #[must_use]
    pub fn time(&self, kind: Kind, lane: Lane, doing: Doing) -> u64 {
        self.ns[kind as usize][index(lane)][doing as usize]
    }

    /// Bytes of one kind.
    #[must_use]
    pub fn sent(&self, kind: Kind, lane: Lane) -> u64 {
        self.bytes[kind as usize][index(lane)]
    }

    /// Together with `other`.
    #[must_use]
    pub fn plus(self, other: &Spent) -> Spent {
        self.each(other, |a, b| a + b)
    }

    /// Bytes and messages alone.
    #[must_use]
    pub fn traffic(self) -> Spent {
        Spent { ns: Spent::default().ns, ..self }
    }

    /// Number by number.
    #[must_use]
    pub fn each(mut self, other: &Spent, f: impl Fn(u64, u64) -> u64) -> Spent {
        let pairs = [(&mut self.bytes, &other.bytes), (&mut self.messages, &other.messages)];
        let pairs = pairs.into_iter().flat_map(|(a, b)| a.as_flattened_mut().iter_mut().zip(b.as_flattened()));
        let (ns, other_ns) = (self.ns.as_flattened_mut().as_flattened_mut(), other.ns.as_flattened().as_flattened());
        pairs.chain(ns.iter_mut().zip(other_ns)).for_each(|(a, b)| *a = f(*a, *b));
        self
    }

    /// What came after `earlier`.
    #[must_use]
    pub fn since(self, earlier: &Spent) -> Spent {
        self.each(earlier, u64::saturating_sub)
    }
}

fn index(lane: Lane) -> usize {
    usize::from(lane == Lane::Ahead)
}

/// One party's account.
#[derive(Debug, Default)]
pub struct Ledger {
    ns: [[[AtomicU64; 4]; 2]; KINDS],
    bytes: [[AtomicU64; 2]; KINDS],
    messages: [[AtomicU64; 2]; KINDS],
}

impl Ledger {
    /// So far; of a thread at work, up to its last change.
    #[must_use]
    pub fn spent(&self) -> Spent {
        Spent {
            ns: self.ns.each_ref().map(|k| k.each_ref().map(|l| l.each_ref().map(|ns| ns.load(Relaxed)))),
            bytes: self.bytes.each_ref().map(|k| k.each_ref().map(|b| b.load(Relaxed))),
            messages: self.messages.each_ref().map(|k| k.each_ref().map(|m| m.load(Relaxed))),
        }
    }
}

struct Lap {
    ledger: Arc<Ledger>,
    lane: Lane,
    kind: Kind,
    doing: Doing,
    since: Instant,
}

thread_local! {
    static LAP: RefCell<Option<Lap>> = const { RefCell::new(None) };
}

fn with<T>(f: impl FnOnce(&mut Lap) -> T) -> Option<T> {
    LAP.with_borrow_mut(|lap| lap.as_mut().map(f))
}

impl Lap {
    fn settle(&mut self) {
        let now = Instant::now();
        let ns = now.duration_since(self.since).as_nanos() as u64;
        self.ledger.ns[self.kind as usize][index(self.lane)][self.doing as usize].fetch_add(ns, Relaxed);
        self.since = now;
    }
}

/// This thread works for `ledger` from now on.
pub(crate) fn start(ledger: &Arc<Ledger>, lane: Lane, kind: Kind) {
    let lap = Lap { ledger: Arc::clone(ledger), lane, kind, doing: Doing::Compute, since: Instant::now() };
    LAP.set(Some(lap));
}

/// This thread works for nobody any more.
pub(crate) fn stop() {
    with(Lap::settle);
    LAP.set(None);
}

/// Forgets the time since the last change: it was not the pass's.
pub(crate) fn forget() {
    with(|lap| lap.since = Instant::now());
}

/// What this thread does is now for `kind`.
pub(crate) fn enter(kind: Kind) {
    with(|lap| {
        if lap.kind != kind {
            lap.settle();
            lap.kind = kind;
        }
    });
}

/// The kind that this thread works for.
pub(crate) fn current() -> Kind {
    with(|lap| lap.kind).unwrap_or(Kind::Rest)
}

/// Runs `f`, which is `doing`.
pub(crate) fn during<T>(doing: Doing, f: impl FnOnce() -> T) -> T {
    let change = |to| {
        with(|lap| {
            lap.settle();
            std::mem::replace(&mut lap.doing, to)
        })
    };
    let before = change(doing);
    let out = f();
    if let Some(before) = before {
        change(before);
    }
    out
}

/// Of the computing since the last change, the part `share` was drawing from streams on the threads of the pool.
pub(crate) fn streams(share: f64) {
    with(|lap| {
        let ns = lap.since.elapsed().as_nanos() as u64;
        let part = (ns as f64 * share.clamp(0.0, 1.0)) as u64;
        let cell = &lap.ledger.ns[lap.kind as usize][index(lap.lane)];
        cell[Doing::Streams as usize].fetch_add(part, Relaxed);
        cell[lap.doing as usize].fetch_add(ns - part, Relaxed);
        lap.since = Instant::now();
    });
}

/// This thread has sent a message of so many bytes.
pub(crate) fn sent(lane: Lane, bytes: u64) {
    with(|lap| {
        lap.ledger.bytes[lap.kind as usize][index(lane)].fetch_add(bytes, Relaxed);
        lap.ledger.messages[lap.kind as usize][index(lane)].fetch_add(1, Relaxed);
    });
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn time_goes_where_it_was_spent() {
        let ledger = Arc::new(Ledger::default());
        let sleep = || std::thread::sleep(Duration::from_millis(5));
        sent(Lane::Online, 1);
        start(&ledger, Lane::Online, Kind::Rest);
        enter(Kind::of("attn.exp"));
        sleep();
        during(Doing::Wait, || {
            sleep();
            during(Doing::Network, sleep);
        });
        sent(Lane::Ahead, 7);
        stop();
        sleep();
        let spent = ledger.spent();
        let ms = |doing| spent.time(Kind::Exponential, Lane::Online, doing) / 1_000_000;
        for doing in [Doing::Compute, Doing::Wait, Doing::Network] {
            assert!(ms(doing) >= 5, "{doing:?}");
        }
        assert_eq!(ms(Doing::Streams), 0);
        assert_eq!((spent.sent(Kind::Exponential, Lane::Ahead), spent.sent(Kind::Rest, Lane::Online)), (7, 0));
        assert_eq!(spent.since(&spent).sent(Kind::Exponential, Lane::Ahead), 0);
    }
}
