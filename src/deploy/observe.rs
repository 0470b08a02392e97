//! What an Owner or a Helper says of itself to whoever watches over it: metrics in Prometheus' text format, liveness and readiness, over
//! plain HTTP at `[metrics] listen`. Counts, bytes and times; nothing of what a session is about, and no names.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Registry, Unit};

use super::party::Shared;
use crate::ledger::{Doing, Kind, Spent};
use crate::net::Lane;
use crate::net::meter::Meter;
use crate::net::tls::TlsChannel;
use crate::party::Role;

/// What a session has counted.
#[derive(Clone, Copy, Default)]
struct Sums {
    spent: Spent,
    /// By peer, in nanoseconds.
    waited: [u64; 3],
    /// By peer: online, ahead.
    received: [[u64; 2]; 3],
    requests: u64,
    tokens: u64,
    /// Run-ahead bytes that have come and are not used yet.
    held: u64,
}

impl Sums {
    fn plus(mut self, o: &Sums) -> Sums {
        self.spent = self.spent.plus(&o.spent);
        for i in 0..3 {
            self.waited[i] += o.waited[i];
            (0..2).for_each(|lane| self.received[i][lane] += o.received[i][lane]);
        }
        self.requests += o.requests;
        self.tokens += o.tokens;
        self.held += o.held;
        self
    }
}

/// A running session.
#[derive(Clone)]
pub(super) struct Watched {
    pub meter: Arc<Meter>,
    pub channels: Vec<(Role, Arc<TlsChannel>)>,
}

impl Watched {
    fn sums(&self) -> Sums {
        let [requests, tokens] = self.meter.answers();
        let mut sums = Sums { spent: self.meter.ledger().spent(), requests, tokens, ..Sums::default() };
        for (peer, channel) in &self.channels {
            sums.waited[peer.index()] = self.meter.waited(*peer).as_nanos() as u64;
            sums.received[peer.index()] = channel.received();
            sums.held += channel.ahead_held();
        }
        sums
    }
}

#[derive(Default)]
struct Sessions {
    begun: u64,
    failed: u64,
    ended: Sums,
    running: BTreeMap<u64, Watched>,
}

/// The sessions of a party, running and ended.
#[derive(Default)]
pub(super) struct Observer(Mutex<Sessions>);

impl Observer {
    fn lock(&self) -> MutexGuard<'_, Sessions> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn begins(&self, number: u64, session: Watched) {
        let mut all = self.lock();
        all.begun += 1;
        all.running.insert(number, session);
    }

    pub fn ends(&self, number: u64, well: bool) {
        let mut all = self.lock();
        if let Some(session) = all.running.remove(&number) {
            let sums = Sums { held: 0, ..session.sums() };
            all.ended = all.ended.plus(&sums);
            all.failed += u64::from(!well);
        }
    }
}

/// For a scrape.
struct Live(Arc<Shared>);

impl fmt::Debug for Live {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Live")
    }
}

type Labels<'a> = Vec<(&'static str, &'a str)>;

fn counters<'a>(
    encoder: &mut DescriptorEncoder,
    (name, help, unit): (&str, &str, Option<&Unit>),
    values: impl IntoIterator<Item = (Labels<'a>, f64)>,
) -> fmt::Result {
    let mut family = encoder.encode_descriptor(name, help, unit, MetricType::Counter)?;
    for (labels, value) in values {
        ConstCounter::new(value).encode(family.encode_family(&labels)?)?;
    }
    Ok(())
}

const LANES: [(Lane, &str); 2] = [(Lane::Online, "online"), (Lane::Ahead, "ahead")];

impl Collector for Live {
    fn encode(&self, mut encoder: DescriptorEncoder) -> fmt::Result {
        let e = &mut encoder;
        let (sums, begun, failed) = {
            let all = self.0.observer.lock();
            (all.running.values().fold(all.ended, |sum, s| sum.plus(&s.sums())), all.begun, all.failed)
        };
        let kinds = || Kind::ALL.into_iter().flat_map(|kind| LANES.map(|(lane, name)| (kind, lane, name)));
        let by_kind = |f: &dyn Fn(Kind, Lane) -> u64, unit: f64| {
            kinds()
                .map(|(kind, lane, name)| {
                    (vec![("operation", kind.name()), ("lane", name)], f(kind, lane) as f64 / unit)
                })
                .collect::<Vec<_>>()
        };
        let spent = &sums.spent;
        let index = |lane| usize::from(lane == Lane::Ahead);
        let bytes = by_kind(&|kind, lane| spent.sent(kind, lane), 1.0);
        counters(e, ("sent", "Bytes sent, by kind of operation", Some(&Unit::Bytes)), bytes)?;
        let messages = by_kind(&|kind, lane| spent.messages[kind as usize][index(lane)], 1.0);
        counters(e, ("messages", "Messages sent, by kind of operation", None), messages)?;
        let computing = |kind, lane| [Doing::Compute, Doing::Streams].map(|d| spent.time(kind, lane, d)).iter().sum();
        let help = "Time that sessions' threads have computed, by kind of operation";
        counters(e, ("computing", help, Some(&Unit::Seconds)), by_kind(&computing, 1e9))?;
        let names = Role::ALL.map(|r| r.to_string());
        let own = self.0.config.role();
        let peers = || Role::ALL.into_iter().filter(|r| *r != own);
        let waited = peers().map(|p| (vec![("peer", names[p.index()].as_str())], sums.waited[p.index()] as f64 / 1e9));
        counters(e, ("waiting", "Time that sessions' threads have waited for a peer", Some(&Unit::Seconds)), waited)?;
        let received = peers().flat_map(|p| {
            LANES.map(|(lane, name)| {
                let bytes = sums.received[p.index()][index(lane)] as f64;
                (vec![("peer", names[p.index()].as_str()), ("lane", name)], bytes)
            })
        });
        counters(e, ("received", "Bytes received, message headers included", Some(&Unit::Bytes)), received)?;
        let ended = [("begun", begun), ("failed", failed)].map(|(state, n)| (vec![("state", state)], n as f64));
        counters(e, ("sessions", "Sessions, by what became of them; all have begun", None), ended)?;
        counters(e, ("requests", "Requests answered", None), [(vec![], sums.requests as f64)])?;
        if own == Role::Owner {
            counters(e, ("tokens", "Tokens given out to Clients", None), [(vec![], sums.tokens as f64)])?;
        }
        let status = self.0.status();
        let mut gauges = vec![
            ("sessions_open", "Sessions now", None, status.sessions),
            ("sessions_limit", "Sessions that there may be", None, status.limit),
            ("run_ahead_held", "Run-ahead that has come and is not used yet", Some(Unit::Bytes), sums.held),
        ];
        gauges.extend(
            crate::bench::resident_memory()
                .map(|b| ("resident_memory", "Memory of this process", Some(Unit::Bytes), b)),
        );
        for (name, help, unit, value) in gauges {
            let gauge = e.encode_descriptor(name, help, unit.as_ref(), MetricType::Gauge)?;
            ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX)).encode(gauge)?;
        }
        Ok(())
    }
}

/// `/metrics`, `/health` and `/ready`.
pub(super) fn router(shared: &Arc<Shared>) -> Router {
    let mut registry = Registry::with_prefix("trefoil");
    registry.register_collector(Box::new(Live(Arc::clone(shared))));
    let registry = Arc::new(registry);
    let metrics = move || {
        let registry = Arc::clone(&registry);
        async move {
            let mut text = String::new();
            match prometheus_client::encoding::text::encode(&mut text, &registry) {
                Ok(()) => {
                    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
                    ([(header::CONTENT_TYPE, kind)], text).into_response()
                }
                Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
            }
        }
    };
    let shared = Arc::clone(shared);
    let ready = move || {
        let shared = Arc::clone(&shared);
        async move { readiness(&shared) }
    };
    Router::new().route("/metrics", get(metrics)).route("/health", get(|| async { "ok\n" })).route("/ready", get(ready))
}

/// Whether a new session would be taken.
fn readiness(shared: &Shared) -> Response {
    let status = shared.status();
    let not = if shared.draining() {
        "draining"
    } else if status.sessions >= status.limit {
        "all sessions are taken"
    } else if shared.config.role() == Role::Owner && !status.provisioned {
        "the helper does not have the model yet"
    } else {
        return "ready\n".into_response();
    };
    (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {not}\n")).into_response()
}
