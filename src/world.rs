//! Three parties in one process, each in its own threads, sharing nothing but channels.
//!
//! This is the seeded fixture of the tests and the ground on which in-process generation stands. A [`World`] owns the
//! links between the parties; [`World::run`] lets every party execute the same program against its own [`Session`].

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use rand_chacha::ChaCha20Rng;
use rand_core::{Rng, SeedableRng};

use crate::error::{Error, PeerFault, Result};
use crate::net::hollow::Hollow;
use crate::net::memory::{self, MemoryChannel};
use crate::net::meter::{LinkTotals, Meter, Metered};
use crate::net::shape::{Profile, Shaped};
use crate::net::tamper::{Rewrite, Tampered, View};
use crate::net::{Channel, Links};
use crate::party::Role;
use crate::plan::work::Work;
use crate::prf::{AddressLog, Pair, PairKey, Prf};
use crate::ring;
use crate::session::{JobQueue, Session, WALK_ENDED};
use crate::share::Masked;

/// The pairwise keys of a session, all in one place: only in a process that plays all three parties.
#[derive(Clone)]
pub struct Keys([(Pair, PairKey); 3]);

impl Keys {
    /// From the operating system.
    ///
    /// # Errors
    /// If it has no entropy to give.
    pub fn fresh() -> Result<Keys> {
        let k = PairKey::fresh;
        Ok(Keys([(Pair::OwnerClient, k()?), (Pair::ClientHelper, k()?), (Pair::OwnerHelper, k()?)]))
    }

    /// Reproducible, for tests.
    #[must_use]
    pub fn seeded(seed: u64) -> Keys {
        let mut rng = ChaCha20Rng::seed_from_u64(seed);
        let mut key = || {
            let mut b = [0u8; 16];
            rng.fill_bytes(&mut b);
            PairKey::new(b)
        };
        Keys([(Pair::OwnerClient, key()), (Pair::ClientHelper, key()), (Pair::OwnerHelper, key())])
    }

    /// The same keys but for one pair (what a receiver cannot know is re-drawn by the tests of views).
    #[must_use]
    pub fn with(mut self, pair: Pair, key: PairKey) -> Keys {
        for k in &mut self.0 {
            if k.0 == pair {
                k.1 = key.clone();
            }
        }
        self
    }

    fn of(&self, role: Role) -> impl Iterator<Item = (Pair, PairKey)> + '_ {
        self.0.iter().filter(move |(pair, _)| pair.has(role)).cloned()
    }
}

/// How the parties of a [`World`] are connected and watched.
#[derive(Clone)]
pub struct Setup {
    /// Simulated network.
    pub profile: Profile,
    /// Messages are gathered, as over TLS.
    pub gather: bool,
    /// Bytes that the Owner buffers of each peer's run-ahead.
    pub ahead_capacity: usize,
    /// How long a receive waits.
    pub timeout: Duration,
    /// Records what each party receives.
    pub views: [Option<View>; 3],
    /// Changes what each party sends.
    pub rewrites: [Option<Rewrite>; 3],
    /// Records every PRF address that any party takes.
    pub addresses: Option<AddressLog>,
}

impl Default for Setup {
    fn default() -> Self {
        Setup {
            profile: Profile::NONE,
            gather: false,
            ahead_capacity: 64 << 20,
            timeout: Duration::from_secs(120),
            views: [None, None, None],
            rewrites: [None, None, None],
            addresses: None,
        }
    }
}

/// Three connected parties.
pub struct World {
    links: [Links; 3],
    meters: [Arc<Meter>; 3],
    /// None in a world that counts.
    keys: Option<Keys>,
    work: Option<Arc<Work>>,
    addresses: Option<AddressLog>,
    /// Below this, passes have been run: [`World::run`] refuses them.
    next_pass: AtomicU64,
}

struct EndOnDrop(JobQueue);

impl Drop for EndOnDrop {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// How Client and Helper cut the passes of a run into batches.
#[derive(Clone, Copy)]
pub struct Batches<'a> {
    /// The size of the batch that a party walks after one of so many passes (0: its first).
    pub next: &'a (dyn Fn(Role, usize) -> usize + Sync),
    /// A batch is begun when no more walked passes than this wait for the Owner.
    pub waiting: usize,
}

/// What the three parties' programs returned.
#[derive(Debug)]
pub struct Outcome<T> {
    /// One result per pass.
    pub owner: Vec<T>,
    /// The result of the last batch.
    pub client: T,
    /// The result of the last batch.
    pub helper: T,
}

/// Walks all passes of a run at Client or Helper.
fn walk<T>(
    session: &mut Session,
    first_pass: u64,
    tokens: &[usize],
    batches: Batches<'_>,
    program: impl Fn(&mut Session) -> Result<T>,
) -> Result<T> {
    let jobs = session.jobs();
    let (mut walked, mut batch) = (0, 0);
    loop {
        batch = (batches.next)(session.role(), batch).max(1).min(tokens.len() - walked);
        session.begin(first_pass + walked as u64, &tokens[walked..walked + batch]);
        let out = program(session);
        let left = session.end_batch();
        let out = out.and_then(|out| left.map(|()| out));
        walked += batch;
        if out.is_err() || walked == tokens.len() {
            return out;
        }
        if !jobs.wait_below(batches.waiting) {
            return Err(Error::Internal(WALK_ENDED.into()));
        }
    }
}

impl World {
    /// Connected as `setup` says.
    #[must_use]
    pub fn new(keys: Keys, setup: &Setup) -> World {
        Self::connect(Some(keys), None, setup)
    }

    /// A world in which nothing is computed: the parties walk their programs, `work` counts what they would compute, the
    /// meters count what they would send, every value is zero, and the links carry lengths instead of bytes.
    #[must_use]
    pub fn counting(work: Arc<Work>) -> World {
        Self::connect(None, Some(work), &Setup::default())
    }

    fn connect(keys: Option<Keys>, work: Option<Arc<Work>>, setup: &Setup) -> World {
        let meters: [Arc<Meter>; 3] = Default::default();
        let mut ends: Vec<(Role, Role, MemoryChannel)> = Vec::new();
        for (a, b) in [(Role::Owner, Role::Client), (Role::Client, Role::Helper), (Role::Helper, Role::Owner)] {
            let (x, y) = memory::link(setup.ahead_capacity);
            ends.push((a, b, x.gathering(setup.gather)));
            ends.push((b, a, y.gathering(setup.gather)));
        }
        let mut channels: [Vec<(Role, Arc<dyn Channel>)>; 3] = Default::default();
        for (me, peer, end) in ends {
            let i = me.index();
            let meter = Arc::clone(&meters[i]);
            let channel: Arc<dyn Channel> = if work.is_some() {
                Arc::new(Metered::new(Hollow::new(end), peer, meter))
            } else {
                let shaped = Shaped::new(end, setup.profile);
                let tampered = Tampered::new(shaped, setup.views[i].clone(), setup.rewrites[i].clone());
                Arc::new(Metered::new(tampered, peer, meter))
            };
            channels[i].push((peer, channel));
        }
        let links = Role::ALL
            .map(|r| Links::new(r, std::mem::take(&mut channels[r.index()]), setup.timeout, setup.ahead_capacity));
        World { links, meters, keys, work, addresses: setup.addresses.clone(), next_pass: AtomicU64::new(0) }
    }

    /// For tests: keys from a seed that is printed, no simulated network.
    #[must_use]
    pub fn seeded(seed: u64) -> World {
        eprintln!("world seed {seed}");
        World::new(Keys::seeded(seed), &Setup::default())
    }

    /// A party's session over this world's links.
    #[must_use]
    pub fn session(&self, role: Role) -> Session {
        let (links, meter) = (self.links[role.index()].clone(), Arc::clone(&self.meters[role.index()]));
        if let Some(work) = &self.work {
            return Session::counting(role, links, meter, Arc::clone(work));
        }
        let prf = Prf::new(self.keys.iter().flat_map(|k| k.of(role)));
        let prf = match &self.addresses {
            Some(log) => prf.with_log(Arc::clone(log), role),
            None => prf,
        };
        Session::new(role, links, prf, meter)
    }

    /// What `from` has sent to `to` so far.
    #[must_use]
    pub fn sent(&self, from: Role, to: Role) -> LinkTotals {
        self.meters[from.index()].sent(to)
    }

    /// A party's meter.
    #[must_use]
    pub fn meter(&self, role: Role) -> &Arc<Meter> {
        &self.meters[role.index()]
    }

    /// How long a network takes for what has been walked ahead.
    pub(crate) fn transfer(&self, profile: &Profile) -> Duration {
        let sent = |from| self.sent(from, Role::Owner).ahead_bytes;
        let bits = 8.0 * sent(Role::Client).max(sent(Role::Helper)) as f64;
        profile.rtt + Duration::from_secs_f64(bits / profile.bits_per_second)
    }

    /// Ends all links.
    pub fn close(&self) {
        self.links.iter().for_each(Links::close);
    }

    /// Runs `program` at every party over passes of the given numbers of tokens: pass by pass at the Owner, as one batch at
    /// the others.
    ///
    /// # Errors
    /// [`Error::Reuse`] for pass numbers used before; the first party's error that is not the consequence of another's.
    pub fn run<T: Send>(
        &self,
        first_pass: u64,
        tokens: &[usize],
        program: impl Fn(&mut Session) -> Result<T> + Sync,
    ) -> Result<Outcome<T>> {
        let all = |_, _| tokens.len();
        self.run_in_batches(first_pass, tokens, Batches { next: &all, waiting: 0 }, program)
    }

    /// As [`World::run`], in several batches at Client and Helper.
    ///
    /// # Errors
    /// As [`World::run`].
    pub fn run_in_batches<T: Send>(
        &self,
        first_pass: u64,
        tokens: &[usize],
        batches: Batches<'_>,
        program: impl Fn(&mut Session) -> Result<T> + Sync,
    ) -> Result<Outcome<T>> {
        if self.next_pass.fetch_max(first_pass + tokens.len() as u64, Ordering::Relaxed) > first_pass {
            return Err(Error::Reuse(format!("pass {first_pass} of this world")));
        }
        let end = |result: Result<T>, role: Role| {
            if let Err(e) = &result {
                self.links[role.index()].abort(e);
            }
            result
        };
        let holder = |role: Role| -> Result<T> {
            let mut session = self.session(role);
            let (jobs, links) = (session.jobs(), session.links().clone());
            std::thread::scope(|scope| {
                let walker = scope.spawn(|| {
                    // Also when the walk panics: the online thread must not wait for jobs that will never come.
                    let _ended = EndOnDrop(session.jobs());
                    walk(&mut session, first_pass, tokens, batches, &program)
                });
                let online = (0..tokens.len()).try_for_each(|i| jobs.run_pass(first_pass + i as u64, &links));
                if let Err(e) = &online {
                    links.abort(e);
                    // The walk may wait for passes to be used.
                    jobs.end();
                }
                let walked = match (join(walker), online) {
                    (walked, Ok(())) => walked?,
                    (Ok(_), Err(e)) => return Err(e),
                    // A peer's fault seen online closes the links, on which the walk then fails too.
                    (Err(walk), Err(online)) => return Err(first_cause([online, walk])),
                };
                Ok(walked)
            })
        };
        let owner = || -> Result<Vec<T>> {
            let mut session = self.session(Role::Owner);
            tokens
                .iter()
                .enumerate()
                .map(|(i, &n)| {
                    session.begin(first_pass + i as u64, &[n]);
                    let out = program(&mut session);
                    let left = session.end_batch();
                    out.and_then(|out| left.map(|()| out))
                })
                .collect()
        };
        std::thread::scope(|scope| {
            let client = scope.spawn(|| end(holder(Role::Client), Role::Client));
            let helper = scope.spawn(|| end(holder(Role::Helper), Role::Helper));
            let owner = owner();
            if let Err(e) = &owner {
                self.links[Role::Owner.index()].abort(e);
            }
            root_cause(owner, join(client), join(helper))
        })
    }
}

fn root_cause<T>(owner: Result<Vec<T>>, client: Result<T>, helper: Result<T>) -> Result<Outcome<T>> {
    match (owner, client, helper) {
        (Ok(owner), Ok(client), Ok(helper)) => Ok(Outcome { owner, client, helper }),
        (o, c, h) => {
            let errors = [o.err(), c.err(), h.err()];
            Err(first_cause(errors.into_iter().flatten()))
        }
    }
}

/// The error that the others follow from: a closed link is a consequence, an ended session hearsay.
#[must_use]
pub fn first_cause(errors: impl IntoIterator<Item = Error>) -> Error {
    let consequence = |e: &Error| match e {
        Error::Peer { kind: PeerFault::Closed, .. } => 3,
        // Said by a walk's online half: the walk has its own error.
        Error::Internal(what) if what == WALK_ENDED => 4,
        Error::Internal(_) => 2,
        Error::Peer { kind: PeerFault::Aborted { .. }, .. } => 1,
        _ => 0,
    };
    errors
        .into_iter()
        .min_by_key(consequence)
        .unwrap_or_else(|| Error::Internal("a party failed without an error".into()))
}

/// Joins a scoped thread; a panic becomes an error.
///
/// # Errors
/// The thread's own, or [`Error::Internal`] if it panicked.
pub fn join<T>(handle: std::thread::ScopedJoinHandle<'_, Result<T>>) -> Result<T> {
    handle.join().unwrap_or_else(|_| Err(Error::Internal("a party's thread panicked".into())))
}

/// Puts the Owner's passes and one holder's batch together: the ring elements, for tests and for `--check` of a process
/// that plays all parties.
///
/// # Errors
/// [`Error::Shape`] if the two do not belong together.
pub fn reveal(owner: &[Masked], holder: &Masked) -> Result<Vec<u64>> {
    let d: Vec<u64> = owner.iter().flat_map(|m| m.raw().iter().copied()).collect();
    if d.len() != holder.raw().len() {
        let (lhs, rhs) = (format!("{} elements", d.len()), holder.facts());
        return Err(Error::Shape { op: "reveal", lhs, rhs });
    }
    let m = ring::mask(holder.k());
    Ok(d.iter().zip(holder.raw()).map(|(d, r)| d.wrapping_add(*r) & m).collect())
}

/// [`reveal`] as signed fixed-point numbers.
///
/// # Errors
/// [`Error::Shape`] if the two do not belong together.
pub fn reveal_f64(owner: &[Masked], holder: &Masked) -> Result<Vec<f64>> {
    Ok(reveal(owner, holder)?.into_iter().map(|v| ring::fixed::decode(v, holder.f(), holder.k())).collect())
}

fn lock<T>(m: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Holds the Owner until Client and Helper have ended their walks, however they ended.
#[derive(Default)]
pub(crate) struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Default)]
struct GateState {
    walked: usize,
    opened: bool,
}

pub(crate) struct Walker<'a>(&'a Gate);

impl Drop for Walker<'_> {
    fn drop(&mut self) {
        lock(&self.0.state).walked += 1;
        self.0.changed.notify_all();
    }
}

impl Gate {
    pub(crate) fn walker(&self) -> Walker<'_> {
        Walker(self)
    }

    /// Waits; says whether it is the first time.
    pub(crate) fn wait(&self) -> bool {
        let state = lock(&self.state);
        let closed = |s: &mut GateState| s.walked < 2;
        let mut state = self.changed.wait_while(state, closed).unwrap_or_else(PoisonError::into_inner);
        !std::mem::replace(&mut state.opened, true)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;
    use crate::protocol::{embedding::source, input, lift, truncate};
    use crate::session::Scope;
    use crate::share::Rows;

    #[test]
    fn input_truncate_lift() {
        let world = World::seeded(1);
        let (send, receive) = channel();
        let source = source(receive);
        let x: Vec<u64> = (0..40).map(|i| ring::fixed::encode(f64::from(i) - 20.0, 12, 28)).collect();
        x.chunks(10).for_each(|c| send.send(c.to_vec()).unwrap());
        let out = world
            .run(7, &[1, 1, 1, 1], |s| {
                let rows = Rows::even(s.tokens(), 10);
                let source = (s.role() == Role::Client).then_some(&source);
                let x = input::input(s, &Scope::new("x"), &rows, 28, 12, source)?;
                let x = truncate::truncate(&x, 4)?;
                lift::lift(s, &Scope::new("lift"), &x, 50)?.finish(s)
            })
            .unwrap();
        let got = reveal_f64(&out.owner, &out.client).unwrap();
        assert_eq!(out.client.k(), 50);
        for (i, g) in got.iter().enumerate() {
            assert!((g - (i as f64 - 20.0)).abs() < 1.0 / 256.0, "{i}: {g}");
        }
    }
}
