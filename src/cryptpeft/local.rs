//! An adapter with its three parties in one process: that shows the protocol and measures it, and isolates nothing.

use std::sync::mpsc::{Receiver, channel};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use ndarray::Array1;

use super::eval::label;
use super::float::Features;
use super::plan::{Plan, given, length, plan};
use super::prepare::Prepared;
use super::secure::{Opened, Ports, SecureAdapter};
use super::{AdapterConfig, AdapterWeights};
use crate::error::{Error, Result};
use crate::ledger::{self, Spent};
use crate::net::meter::LinkTotals;
use crate::party::Role;
use crate::plan::F;
use crate::prf::PreparationSeed;
use crate::protocol::embedding;
use crate::ring::fixed;
use crate::world::{Gate, Keys, Setup, World};

/// The three parties' parts.
pub struct LocalAdapter {
    parties: [SecureAdapter; 3],
    setup: Setup,
}

impl std::fmt::Debug for LocalAdapter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LocalAdapter").field("config", &self.plan().config).finish_non_exhaustive()
    }
}

/// What the Client got, and what it took.
#[derive(Clone, Debug)]
pub struct Classified {
    /// The label of each input: the first of the largest logits.
    pub labels: Vec<usize>,
    /// Its logits, if they were opened.
    pub logits: Vec<Array1<f32>>,
    /// Wall time from the start of the clock until the last input is done at all parties.
    pub wall: Duration,
    /// Traffic of all of them, `[from][to]`.
    pub sent: [[LinkTotals; 3]; 3],
    /// Messages in sequence of one input, to what is opened and to its range flags.
    pub messages: u32,
    /// Time and bytes by kind of operation, by party.
    pub spent: [Spent; 3],
}

/// When Client and Helper do what needs no input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// From cold, with the clock running.
    Cold,
    /// All of it before the clock starts: the online part alone.
    Ready,
}

fn lock<T>(m: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the Client gives, as ring elements.
///
/// # Errors
/// [`Error::Config`] for features of another shape, or beyond the plan's range.
pub fn encode(p: &Plan, f: &Features) -> Result<Vec<u64>> {
    let c = &p.config;
    f.check(c)?;
    let (sums, last) = given(f);
    let mut out = Vec::with_capacity(p.inputs());
    let most = f64::from(p.input_k - 2 - F).exp2();
    let mut put = |row: ndarray::ArrayView1<'_, f32>, limit: f64, place: &str| {
        let (longest, long) = (limit.min(most), length(row));
        // A number that is none is too long.
        if !matches!(long.partial_cmp(&longest), Some(std::cmp::Ordering::Less | std::cmp::Ordering::Equal)) {
            return Err(Error::Range {
                layer: place.into(),
                quantity: format!("a row of length {long:.0}, calibrated up to {longest:.0},"),
            });
        }
        out.extend(row.iter().map(|&v| fixed::encode(f64::from(v), F, p.input_k)));
        Ok(())
    };
    for ((sum, layer), limit) in sums.iter().zip(&c.layers).zip(&p.row) {
        let place = format!("input of layer {layer}");
        sum.rows().into_iter().try_for_each(|row| put(row, *limit, &place))?;
    }
    put(last.view(), p.last, "last hidden state")?;
    Ok(out)
}

struct Outputs {
    logits: Receiver<Vec<u64>>,
    label: Receiver<Vec<u64>>,
    flags: Receiver<Vec<u64>>,
    last: Receiver<Vec<u64>>,
}

impl LocalAdapter {
    /// Calibrates on `samples`, plans and prepares with a fresh seed.
    ///
    /// # Errors
    /// [`Error::Model`] for weights that no plan fits.
    pub fn new(config: &AdapterConfig, w: &AdapterWeights, samples: &[Features], setup: Setup) -> Result<Self> {
        let plan = plan(config, w, samples)?;
        let seed = PreparationSeed::fresh()?;
        let owner = Prepared::owner(&plan, w)?;
        let helper = owner.helper(&plan, &seed)?;
        let client = Prepared::client(&plan, &seed)?;
        let parties = [owner, client, helper].map(|p| SecureAdapter::new(plan.clone(), p));
        Ok(LocalAdapter { parties, setup })
    }

    /// The public plan.
    #[must_use]
    pub fn plan(&self) -> &Plan {
        self.parties[0].plan()
    }

    /// Classifies what the features are of, one pass each.
    ///
    /// # Errors
    /// [`Error::Range`] for an input beyond the calibrated range, and those of a party.
    pub fn classify(&self, inputs: &[Features], opened: Opened, pace: Pace) -> Result<Classified> {
        let given = inputs.iter().map(|f| encode(self.plan(), f)).collect::<Result<Vec<_>>>()?;
        let mut setup = self.setup.clone();
        if pace == Pace::Ready {
            setup.ahead_capacity = usize::MAX / 4;
        }
        let world = World::new(Keys::fresh()?, &setup);
        let ((to, source), (logits, got), (chosen, said)) = (channel(), channel(), channel());
        let ((flags, up), (last, of_last)) = (channel(), channel());
        for x in given {
            to.send(x).map_err(|_| Error::Internal("the client's input".into()))?;
        }
        let ports = Ports { source: embedding::source(source), logits: Some(logits), label: Some(chosen), flags, last };
        let outputs = Outputs { logits: got, label: said, flags: up, last: of_last };
        let (gate, clock) = (Gate::default(), Mutex::new((Instant::now(), [Spent::default(); 3])));
        let spent = || Role::ALL.map(|role| world.meter(role).ledger().spent());
        let out = world.run(1, &vec![1; inputs.len()], |s| {
            let (role, ready) = (s.role(), pace == Pace::Ready);
            let _walked = (ready && role != Role::Owner).then(|| gate.walker());
            if ready && role == Role::Owner && gate.wait() {
                std::thread::sleep(world.transfer(&setup.profile));
                ledger::forget();
                *lock(&clock) = (Instant::now(), spent());
            }
            if ready {
                s.run_far_ahead();
            }
            self.parties[role.index()].pass(s, (role == Role::Client).then_some(&ports), opened)
        })?;
        let (begun, before) = *lock(&clock);
        let wall = begun.elapsed();
        let mut spent = spent();
        spent.iter_mut().zip(&before).for_each(|(all, before)| *all = all.since(before));
        self.check(&out.client, &outputs, inputs.len())?;
        let (labels, logits) = self.read(&outputs, opened);
        if labels.len() != inputs.len() {
            return Err(Error::Internal(format!("{} labels of {} inputs", labels.len(), inputs.len())));
        }
        let sent = Role::ALL
            .map(|from| Role::ALL.map(|to| if from == to { LinkTotals::default() } else { world.sent(from, to) }));
        let messages = world.meter(Role::Client).depth() / inputs.len().max(1) as u32;
        Ok(Classified { labels, logits, wall, sent, messages, spent })
    }

    fn check(&self, names: &[(String, &'static str)], o: &Outputs, inputs: usize) -> Result<()> {
        let (flags, last): (Vec<_>, Vec<_>) = (o.flags.try_iter().collect(), o.last.try_iter().collect());
        let all = flags.iter().all(|bits| bits.len() == names.len()) && last.iter().all(|counts| !counts.is_empty());
        if flags.len() != inputs || last.len() != inputs || !all {
            return Err(Error::Internal("range flags of some inputs are missing".into()));
        }
        for bits in flags {
            if let Some(((layer, quantity), _)) = names.iter().zip(bits).find(|(_, bit)| *bit != 0) {
                return Err(Error::Range { layer: layer.clone(), quantity: (*quantity).into() });
            }
        }
        match last.into_iter().flatten().any(|count| count != 0) {
            true => Err(Error::Range { layer: "head".into(), quantity: "variance before the head".into() }),
            false => Ok(()),
        }
    }

    fn read(&self, o: &Outputs, opened: Opened) -> (Vec<usize>, Vec<Array1<f32>>) {
        if opened == Opened::Label {
            return (o.label.try_iter().flatten().map(|l| l as usize).collect(), Vec::new());
        }
        let p = self.plan();
        let f = F + p.norm.f_gain + super::plan::F_WEIGHT;
        let decode = |v: Vec<u64>| v.into_iter().map(|v| fixed::decode(v, f, 64) as f32).collect::<Array1<f32>>();
        let logits: Vec<Array1<f32>> = o.logits.try_iter().map(decode).collect();
        (logits.iter().map(label).collect(), logits)
    }
}
