//! What the gateway counts, in Prometheus' text format. Nothing in it says more than lengths, times and counts.

use std::fmt;
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

use crate::client::{Client, End};
use crate::error::{Error, Result};

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Answered {
    path: String,
    status: u16,
}

/// All of them.
pub(super) struct Metrics {
    registry: Registry,
    responses: Family<Answered, Counter>,
    first_token: Histogram,
    per_token: Histogram,
}

impl Metrics {
    pub fn new(client: &Client) -> Self {
        let mut registry = Registry::with_prefix("trefoil");
        let responses = Family::default();
        // 5 ms to 160 s, and 1 ms to 32 s.
        let first_token = Histogram::new(exponential_buckets(0.005, 2.0, 16));
        let per_token = Histogram::new(exponential_buckets(0.001, 2.0, 16));
        registry.register("http_responses", "Answers to HTTP requests, by path and status", responses.clone());
        registry.register_with_unit(
            "time_to_first_token",
            "From the first message of a request to its first token",
            Unit::Seconds,
            first_token.clone(),
        );
        registry.register_with_unit(
            "time_per_token",
            "Mean over an answer's further tokens",
            Unit::Seconds,
            per_token.clone(),
        );
        registry.register_collector(Box::new(Live(client.clone())));
        Metrics { registry, responses, first_token, per_token }
    }

    pub fn responded(&self, path: &str, status: u16) {
        self.responses.get_or_create(&Answered { path: path.to_owned(), status }).inc();
    }

    pub fn ended(&self, end: &End) {
        self.first_token.observe(end.prefill.as_secs_f64());
        if end.completion_tokens > 1 {
            let each = end.decode / u32::try_from(end.completion_tokens - 1).unwrap_or(u32::MAX);
            self.per_token.observe(Duration::as_secs_f64(&each));
        }
    }

    pub fn text(&self) -> Result<String> {
        let mut out = String::new();
        let failed = |_: fmt::Error| Error::Internal("writing metrics".into());
        prometheus_client::encoding::text::encode(&mut out, &self.registry).map_err(failed)?;
        Ok(out)
    }
}

/// What the Client knows at the time of asking.
struct Live(Client);

impl fmt::Debug for Live {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Live")
    }
}

impl Collector for Live {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let state = self.0.state();
        let t = state.totals;
        let mut counters = |name: &str, help: &str, label: &str, values: &[(String, u64)]| -> Result<(), fmt::Error> {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for (value, n) in values {
                ConstCounter::new(*n).encode(family.encode_family(&[(label, value.as_str())])?)?;
            }
            Ok(())
        };
        let named = |values: &[(&str, u64)]| values.iter().map(|(v, n)| ((*v).to_owned(), *n)).collect::<Vec<_>>();
        let ended = [("begun", t.requests), ("failed", t.failed), ("abandoned", t.abandoned)];
        counters("requests", "Requests, by what became of them; all have begun", "state", &named(&ended))?;
        let tokens = [("prompt", t.prompt_tokens), ("completion", t.completion_tokens)];
        counters("tokens", "Tokens of prompts and answers", "kind", &named(&tokens))?;
        let links = |f: &dyn Fn(&crate::generate::LinkReport) -> u64| {
            state.links.iter().map(|(name, link)| (name.clone(), f(link))).collect::<Vec<_>>()
        };
        counters(
            "link_online_bytes",
            "Bytes that depend on inputs, by directed link",
            "link",
            &links(&|l| l.online_bytes),
        )?;
        counters("link_ahead_bytes", "Bytes that run ahead, by directed link", "link", &links(&|l| l.ahead_bytes))?;
        counters("link_messages", "Messages of both kinds, by directed link", "link", &links(&|l| l.messages))?;
        let [limit, open, busy] = state.sessions;
        let [most, waiting] = state.queue;
        for (name, help, value) in [
            ("sessions_limit", "Sessions that there may be", limit),
            ("sessions_open", "Sessions that are open", open),
            ("sessions_busy", "Sessions that answer a request", busy),
            ("queue_limit", "Requests that may wait", most),
            ("queue_waiting", "Requests that wait", waiting),
        ] {
            let gauge = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            ConstGauge::new(value as i64).encode(gauge)?;
        }
        if let Some(bytes) = crate::bench::resident_memory() {
            let help = "Memory of this process";
            let gauge = encoder.encode_descriptor("resident_memory", help, Some(&Unit::Bytes), MetricType::Gauge)?;
            ConstGauge::new(i64::try_from(bytes).unwrap_or(i64::MAX)).encode(gauge)?;
        }
        Ok(())
    }
}

/// Bits per byte of a sample.
pub(super) fn entropy(bytes: &[u8]) -> f64 {
    let mut counts = [0usize; 256];
    bytes.iter().for_each(|&b| counts[usize::from(b)] += 1);
    let n = bytes.len() as f64;
    counts.iter().filter(|&&c| c > 0).map(|&c| c as f64 / n).fold(0.0, |bits, p| bits - p * p.log2())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entropy_of_extremes() {
        assert_eq!(entropy(&[7; 100]), 0.0);
        let all: Vec<u8> = (0..=255).collect();
        assert_eq!(entropy(&all), 8.0);
        assert_eq!(entropy(&[]), 0.0);
    }
}
