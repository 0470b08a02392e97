//! Our own model of an adapter's latency: its program is walked and counted, not run, and the counts are turned into time.
//!
//! `messages x RTT/2 + bytes of the busiest link / bandwidth + computing`. Messages and bytes are exact. Computing is what all
//! three parties compute at this machine's kernel rates ([`Rates`], fitted on other models), times one factor for what those
//! rates do not know of adapters: 1, or set by a single measured point ([`CostModel::calibrated`]).

use std::sync::Arc;
use std::sync::mpsc::channel;

use super::latency::{Measurement, Shape};
use super::plan::{Plan, plan};
use super::prepare::Prepared;
use super::search::Point;
use super::secure::{Opened, Ports, SecureAdapter};
use crate::error::{Error, Result};
use crate::net::shape::Profile;
use crate::party::Role;
use crate::plan::work::{Counts, Work};
use crate::predict::Rates;
use crate::predict::walk::Links;
use crate::protocol::embedding;
use crate::world::World;

/// What one inference takes.
#[derive(Clone, Copy, Debug)]
pub struct Counted {
    /// Traffic by directed link, `[from][to]`.
    pub links: Links,
    /// Messages in sequence.
    pub messages: u32,
    /// Of all parties together.
    pub work: Counts,
}

/// Counts one inference without computing it.
///
/// # Errors
/// [`Error::Internal`] for a plan that does not belong to its configuration.
pub fn count(plan: &Plan, opened: Opened) -> Result<Counted> {
    let work = Arc::new(Work::default());
    let world = World::counting(Arc::clone(&work));
    let adapter = SecureAdapter::new(plan.clone(), Prepared::shape(plan)?);
    let ((to, source), (logits, _logits), (label, _label)) = (channel(), channel(), channel());
    let ((flags, _flags), (last, _last)) = (channel(), channel());
    to.send(vec![0; plan.inputs()]).map_err(|_| Error::Internal("the input of a walk".into()))?;
    let ports = Ports { source: embedding::source(source), logits: Some(logits), label: Some(label), flags, last };
    world.run(1, &[1], |s| {
        let ports = (s.role() == Role::Client).then_some(&ports);
        adapter.pass(s, ports, opened)
    })?;
    let links =
        Role::ALL.map(|from| Role::ALL.map(|to| if from == to { Default::default() } else { world.sent(from, to) }));
    let mut all = products(plan);
    work.table().iter().flatten().flatten().for_each(|c| all += *c);
    Ok(Counted { links, messages: world.meter(Role::Client).depth(), work: all })
}

/// What a walk does not count: multiply-adds of scores and contexts, secret by secret, of which the Owner computes one, Client
/// and Helper two each.
fn products(plan: &Plan) -> Counts {
    let c = &plan.config;
    let blocks = (0..c.layers.len()).flat_map(|i| (0..c.blocks).map(move |b| (i, b)));
    let one: usize = blocks.map(|(i, b)| plan.rows(i, b) * c.tokens * c.rank).sum();
    Counts { row_macs: 2 * 5 * one as u64, ..Counts::default() }
}

/// The model, on one network and machine.
#[derive(Clone, Copy, Debug)]
pub struct CostModel {
    net: Profile,
    rates: Rates,
    factor: f64,
}

impl CostModel {
    /// Computing at the rates alone.
    #[must_use]
    pub fn new(net: Profile, rates: Rates) -> Self {
        CostModel { net, rates, factor: 1.0 }
    }

    /// Computing so fast that `m` took as long as it did, but for the network.
    ///
    /// # Errors
    /// Those of a plan; [`Error::Config`] if the network alone takes longer than was measured.
    pub fn calibrated(self, shape: Shape, m: &Measurement) -> Result<Self> {
        let (network, computing) = self.parts(shape, m.point())?;
        let factor = (m.seconds - network) / computing;
        if !(factor.is_finite() && factor > 0.0) {
            return Err(Error::Config(format!(
                "{}: {:.4} s were measured, but the network {} alone takes {network:.4} s; measure on that network",
                m.point(),
                m.seconds,
                self.net
            )));
        }
        Ok(CostModel { factor, ..self })
    }

    /// How many times longer computing takes than the rates say.
    #[must_use]
    pub fn factor(&self) -> f64 {
        self.factor
    }

    /// Seconds of the network, and of computing at the rates.
    fn parts(&self, shape: Shape, p: Point) -> Result<(f64, f64)> {
        let (config, weights, features) = shape.example(p)?;
        let counted = count(&plan(&config, &weights, &[features])?, Opened::Label)?;
        let busiest = counted.links.iter().flatten().map(|l| l.online_bytes + l.ahead_bytes).max().unwrap_or(0);
        let depth = f64::from(counted.messages);
        let (overheads, threads) = (&self.rates.overheads, self.rates.threads.max(1) as f64);
        let woken = if self.net.is_none() { 0.0 } else { overheads.woken_s };
        let network =
            depth * (self.net.rtt.as_secs_f64() / 2.0 + woken) + 8.0 * busiest as f64 / self.net.bits_per_second;
        let kernels = self.rates.kernel_seconds(&counted.work, shape.tokens as f64, shape.tokens as f64);
        let computing = [kernels / threads, counted.work.words as f64 / threads, depth];
        let computing = overheads.one_process.seconds(&computing);
        Ok((network, computing))
    }

    /// Seconds of one inference.
    ///
    /// # Errors
    /// Those of a plan, for a point that cannot be built.
    pub fn seconds(&self, shape: Shape, p: Point) -> Result<f64> {
        let (network, computing) = self.parts(shape, p)?;
        Ok(network + self.factor * computing)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::local::Pace;
    use super::super::{LocalAdapter, latency};
    use super::*;
    use crate::predict::{Fit, Overheads};
    use crate::world::Setup;

    const SHAPE: Shape = Shape { hidden: 16, tokens: 5, classes: 3 };

    #[test]
    fn what_is_counted_is_what_is_sent() {
        for (heads, rank, layers) in [(1, 4, 1), (2, 8, 2)] {
            let (config, w, features) = SHAPE.example(Point { heads, rank, layers }).unwrap();
            let samples = [features];
            let local = LocalAdapter::new(&config, &w, &samples, Setup::default()).unwrap();
            for opened in [Opened::Label, Opened::Logits] {
                let got = local.classify(&samples, opened, Pace::Cold).unwrap();
                let counted = count(local.plan(), opened).unwrap();
                assert_eq!((counted.links, counted.messages), (got.sent, got.messages), "{opened:?}");
            }
        }
    }

    /// A machine of round numbers: nothing is measured.
    pub(in crate::cryptpeft) fn rates() -> Rates {
        let one_process = Fit { word_s: 1e-9, message_s: 1e-5 };
        Rates {
            isa: "none",
            threads: 1,
            prf_bytes: 1e9,
            weight_macs: [1e9; 2],
            weight_bytes: 1e9,
            ring_macs: [1e9; 2],
            ring_bytes: 1e9,
            row_macs: 1e9,
            together_macs: 1e9,
            cold_row_macs: 1e9,
            fold_words: 1e9,
            float_macs: [1e9; 2],
            overheads: Overheads { ready: one_process, one_process, woken_s: 0.0 },
        }
    }

    #[test]
    fn one_point_sets_the_speed_and_both_models_are_compared() {
        let ours = CostModel::new("2,1".parse().unwrap(), rates());
        let p = |heads, rank, layers| Point { heads, rank, layers };
        let network = ours.parts(SHAPE, p(1, 4, 1)).unwrap().0;
        assert!(network > 0.026, "{network}");
        // A machine twice as slow as its rates.
        let slow = |q: Point| {
            let (network, computing) = ours.parts(SHAPE, q).unwrap();
            Measurement { heads: q.heads, rank: q.rank, layers: q.layers, seconds: network + 2.0 * computing }
        };
        let calibrated = ours.calibrated(SHAPE, &slow(p(1, 4, 1))).unwrap();
        assert!((calibrated.factor() - 2.0).abs() < 1e-9);
        let all = [p(1, 4, 1), p(2, 4, 1), p(1, 8, 1), p(1, 4, 2), p(2, 16, 2)].map(slow);
        let linear = latency::LinearFit::fit(&all).unwrap();
        let compared = latency::compare(SHAPE, &linear, &calibrated, &[slow(p(2, 8, 2)), slow(p(4, 8, 1))]).unwrap();
        assert!(compared.ours.worst < 1e-9 && compared.linear.worst < 0.2, "{compared:?}");
        assert!(compared.linear.mean <= compared.linear.worst && compared.points.len() == 2);
        let fast = Measurement { seconds: network / 2.0, ..slow(p(1, 4, 1)) };
        assert!(ours.calibrated(SHAPE, &fast).unwrap_err().to_string().contains("network"));
        assert!(latency::compare(SHAPE, &linear, &ours, &[]).is_err());
    }
}
