//! The long-running party: an Owner or a Helper that listens, lets in whom it can verify, and serves sessions side by side.
//!
//! A session has its own connections, keys and threads. What happens to one of them, happens to no other.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, oneshot, watch};

use super::certs::Fingerprint;
use super::config::{Config, Limits};
use super::helper::Helper;
use super::observe::{self, Observer, Watched};
use super::owner::Owner;
use super::seen::Seen;
use super::tls::{self, Reloading, Secured};
use super::wire::{self, Digest, ECHO_LIMIT, Hello, Refusal, Reply, Status};
use crate::error::{CertificateFault, Error, PeerFault, Result};
use crate::model::ModelConfig;
use crate::net::tamper::Wrap;
use crate::net::{Abort, Links};
use crate::party::Role;
use crate::plan::{Plan, memory};
use crate::prf::AddressLog;

/// What tests want of a party beyond its configuration.
#[derive(Clone, Default)]
pub struct Options {
    /// Records every PRF address taken.
    pub addresses: Option<AddressLog>,
    /// Has the links of every session in its hands: a party that does not keep to the protocol.
    pub wrap: Option<Wrap>,
}

/// Memory by prediction ([`crate::plan::memory`]), in bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Need {
    /// Of the model, whatever the sessions.
    pub model: u64,
    /// Of a session with the longest request that the configuration lets in.
    pub session: u64,
}

impl Need {
    pub fn of(role: Role, limits: &Limits, c: &ModelConfig, plan: &Plan, run_ahead: u64) -> Need {
        let model = memory::model_bytes(role, c, plan);
        let prefill = limits.prompt_tokens.clamp(1, plan.max_positions);
        let mut session = memory::session_bytes(role, c, plan, prefill, plan.max_positions - prefill, run_ahead);
        // A client may draft.
        session.batch = session.batch.max(memory::verification_bytes(role, c, plan, plan.max_positions));
        Need { model: model.weights + model.tables, session: session.total() }
    }

    /// Whether at least one session fits.
    pub fn check(&self, limits: &Limits) -> Result<()> {
        let (need, have) = (self.model + self.session, limits.memory_bytes);
        if need <= have {
            return Ok(());
        }
        let gb = |b: u64| b as f64 / 1e9;
        Err(Error::Config(format!(
            "[limits] memory_gb = {:.3}: the model takes {:.3} GB and a session up to {:.3} GB here; raise memory_gb, or lower prompt_tokens or run_ahead_mb, or prepare with a shorter --context",
            gb(have),
            gb(self.model),
            gb(self.session)
        )))
    }
}

/// What all tasks of a party share.
pub(super) struct Shared {
    pub config: Config,
    pub tls: Reloading,
    pub seen: Seen,
    pub observer: Observer,
    pub options: Options,
    permits: Arc<Semaphore>,
    running: Mutex<BTreeMap<u64, (Links, Vec<Fingerprint>)>>,
    numbers: AtomicU64,
    /// Bytes that the sessions now running may take.
    taken: AtomicU64,
    waiting: Mutex<HashMap<Digest, (String, oneshot::Sender<Secured>)>>,
    draining: AtomicBool,
    part: Part,
}

enum Part {
    Owner(Owner),
    Helper(Arc<Helper>),
}

pub(super) fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An ordinary end of a connection task: what was wrong has been told to the peer, and goes to the log.
pub(super) type Served = Result<()>;

/// A place among the sessions; given back when dropped.
pub(super) struct Place {
    _permit: OwnedSemaphorePermit,
    shared: Arc<Shared>,
    number: u64,
    bytes: u64,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.shared.taken.fetch_sub(self.bytes, Ordering::Relaxed);
        // One that never began to run.
        self.vacate(false);
        lock(&self.shared.running).remove(&self.number);
    }
}

impl Place {
    /// The session runs on `links` with these peers now: a shutdown ends them, or that a peer is revoked.
    pub fn occupy(&self, links: &Links, peers: Vec<Fingerprint>, watched: Watched) {
        lock(&self.shared.running).insert(self.number, (links.clone(), peers));
        self.shared.observer.begins(self.number, watched);
    }

    /// The session has ended, `well` or not.
    pub fn vacate(&self, well: bool) {
        self.shared.observer.ends(self.number, well);
    }
}

impl Shared {
    pub fn handshake_timeout(&self) -> Duration {
        self.config.limits().handshake_timeout
    }

    /// A place for one more session, which needs as much memory as `need` says.
    pub fn place(self: &Arc<Self>, need: &Need) -> Result<Place, Refusal> {
        if self.draining() {
            return Err(Refusal::Draining);
        }
        let busy = Refusal::Busy { sessions: self.config.limits().sessions as u64 };
        let permit = Arc::clone(&self.permits).try_acquire_owned().map_err(|_| busy)?;
        let bytes = need.session;
        let before = self.taken.fetch_add(bytes, Ordering::Relaxed);
        let number = self.numbers.fetch_add(1, Ordering::Relaxed);
        let place = Place { _permit: permit, shared: Arc::clone(self), number, bytes };
        if need.model.saturating_add(before).saturating_add(bytes) > self.config.limits().memory_bytes {
            return Err(Refusal::Memory);
        }
        Ok(place)
    }

    /// The connection for the run-ahead lane of `session`, which the party with this certificate will open.
    pub fn expect_ahead(&self, session: Digest, fingerprint: &str) -> oneshot::Receiver<Secured> {
        let (send, receive) = oneshot::channel();
        let mut waiting = lock(&self.waiting);
        waiting.retain(|_, (_, sender)| !sender.is_closed());
        waiting.insert(session, (fingerprint.to_string(), send));
        receive
    }

    async fn attach(&self, mut c: Secured, session: Digest) -> Served {
        let step = "run-ahead lane";
        let sender = {
            let mut waiting = lock(&self.waiting);
            match waiting.get(&session) {
                Some((owner, _)) if *owner == c.peer.fingerprint.to_string() => {
                    waiting.remove(&session).ok_or(Refusal::Session)
                }
                Some(_) => Err(Refusal::Session),
                // Its lane is taken, or it has ended.
                None if self.seen.contains(&session) => Err(Refusal::Replay),
                None => Err(Refusal::Session),
            }
        };
        let (_, sender) = match sender {
            Ok(sender) => sender,
            Err(why) => {
                let blamed = c.blame(step, why.fault());
                let _ = refuse(c, step, why).await;
                return Err(blamed);
            }
        };
        c.send(step, &wire::encode(&Reply::Attached)?).await?;
        // If the session has given up meanwhile, the connection goes with it.
        let _ = sender.send(c);
        Ok(())
    }

    async fn serve(self: Arc<Self>, tcp: TcpStream, address: SocketAddr) -> Served {
        let tls = self.tls.current();
        let mut c = tls::accept(&tls, tcp, address.to_string(), self.handshake_timeout()).await?;
        let limit = if c.peer.role == Role::Owner { wire::LONG } else { wire::SHORT };
        let bytes = c.recv("hello", limit).await?;
        let Some(hello) = wire::decode::<Hello>(&bytes) else {
            let blamed = c.blame("hello", PeerFault::Malformed("a control message that is none"));
            let _ = refuse(c, "hello", Refusal::Malformed).await;
            return Err(blamed);
        };
        match (&self.part, c.peer.role, hello) {
            (_, _, Hello::Probe) => self.probe(c).await,
            (Part::Owner(_), Role::Client, Hello::Ahead { session })
            | (Part::Helper(_), Role::Owner, Hello::Ahead { session }) => self.attach(c, session).await,
            (Part::Owner(owner), Role::Client, Hello::Open { nonce }) => owner.open_session(&self, c, nonce).await,
            (Part::Helper(helper), Role::Client, Hello::Join { nonce }) => helper.join(c, nonce).await,
            (
                Part::Helper(helper),
                Role::Owner,
                Hello::Pair { client_nonce, owner_nonce, client, preparation, agreed, half, ahead_capacity },
            ) => {
                let pair = super::helper::Pair {
                    client_nonce,
                    owner_nonce,
                    client,
                    preparation,
                    agreed,
                    half,
                    ahead_capacity,
                };
                helper.pair(&self, c, pair).await
            }
            (Part::Helper(helper), Role::Owner, Hello::Offer { manifest, chunks }) => {
                helper.receive(&self, c, manifest, chunks).await
            }
            _ => {
                let want = if self.config.role() == Role::Owner { Role::Client } else { Role::Owner };
                let kind = match c.peer.role {
                    got if got == want => PeerFault::Malformed("a control message that belongs to another party"),
                    got => PeerFault::Certificate(CertificateFault::Role { want, got }),
                };
                let blamed = c.blame("hello", kind);
                let _ = refuse(c, "hello", Refusal::Role).await;
                Err(blamed)
            }
        }
    }

    /// Ends sessions with peers that were revoked since.
    fn end_revoked(&self) {
        let tls = self.tls.current();
        let revoked = |peers: &[Fingerprint]| peers.iter().any(|p| tls.revoked(p));
        let gone: Vec<Links> =
            lock(&self.running).values().filter(|(_, peers)| revoked(peers)).map(|(links, _)| links.clone()).collect();
        for links in gone {
            tracing::warn!("ending a session: a certificate in it was revoked");
            links.end(&Abort { blamed: None, code: "revoked".into() });
        }
    }

    /// Ends sessions of which a link has ended: one that waits for its Client's next request would not notice that the other
    /// server has gone. `before` are those found last time; one that is about to end by itself has until now.
    fn end_broken(&self, before: &BTreeSet<u64>) -> BTreeSet<u64> {
        let broken: Vec<(u64, Links)> = lock(&self.running)
            .iter()
            .filter(|(_, (links, _))| links.broken())
            .map(|(number, (links, _))| (*number, links.clone()))
            .collect();
        broken.iter().filter(|(number, _)| before.contains(number)).for_each(|(_, links)| links.close());
        broken.into_iter().map(|(number, _)| number).collect()
    }

    pub fn draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    pub fn status(&self) -> Status {
        let (preparations, provisioned) = match &self.part {
            Part::Owner(owner) => (vec![owner.preparation().to_string()], owner.provisioned()),
            // The message is short, and more than these nobody compares.
            Part::Helper(helper) => (helper.preparations().into_iter().take(64).collect(), false),
        };
        let limit = self.config.limits().sessions;
        let clock = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64();
        Status {
            release: env!("CARGO_PKG_VERSION").into(),
            preparations,
            sessions: (limit - self.permits.available_permits().min(limit)) as u64,
            limit: limit as u64,
            clock,
            provisioned,
        }
    }

    async fn probe(&self, mut c: Secured) -> Served {
        c.send("probe", &wire::encode(&Reply::Status(self.status()))?).await?;
        // As many echoes as a measurement needs, and no more work and time than that for whoever asks.
        let begun = Instant::now();
        for _ in 0..256 {
            if begun.elapsed() > PROBE {
                break;
            }
            let bytes = match c.recv("probe", ECHO_LIMIT + wire::SHORT).await {
                Ok(bytes) => bytes,
                Err(Error::Peer { kind: PeerFault::Closed, .. }) => return Ok(()),
                Err(e) => return Err(e),
            };
            let Some(want) = wire::echo_wanted(&bytes) else {
                return refuse(c, "probe", Refusal::Malformed).await;
            };
            c.send("probe", &vec![0; want as usize]).await?;
        }
        Ok(())
    }
}

/// Says no, and goes. The refusal is the caller's to log.
pub(super) async fn refuse(mut c: Secured, step: &'static str, why: Refusal) -> Served {
    tracing::info!(peer = %c.peer, address = %c.address, step, refusal = %why.fault(), "refused");
    c.send(step, &wire::encode(&Reply::Refused(why))?).await?;
    c.close().await;
    Ok(())
}

/// Reads a reply; a refusal becomes the error that it is.
pub(super) async fn reply(c: &mut Secured, step: &'static str, limit: u32) -> Result<Reply> {
    let bytes = c.recv(step, limit).await?;
    match wire::decode(&bytes) {
        Some(Reply::Refused(why)) => Err(c.blame(step, why.fault())),
        Some(reply) => Ok(reply),
        None => Err(c.blame(step, PeerFault::Malformed("a control message that is none"))),
    }
}

/// A reply of another kind than the one expected.
pub(super) fn unexpected(c: &Secured, step: &'static str) -> Error {
    c.blame(step, PeerFault::Malformed("a control message out of turn"))
}

/// A running Owner or Helper.
pub struct Daemon {
    address: SocketAddr,
    metrics: Option<SocketAddr>,
    shared: Arc<Shared>,
    stop: Arc<Notify>,
    _watchers: watch::Sender<bool>,
    runtime: Option<tokio::runtime::Runtime>,
}

/// Connections that are not sessions yet.
const HANDSHAKES: usize = 128;
/// Of these, as many as one address may have: nobody keeps all others out by opening connections and saying nothing.
const HANDSHAKES_FROM_ONE: usize = HANDSHAKES / 2;
/// How often running sessions are looked at: whether a link has ended, or a certificate was revoked.
const WATCH: Duration = Duration::from_secs(2);
/// The longest that one probe is answered.
const PROBE: Duration = Duration::from_secs(60);

/// Connections by where they come from.
#[derive(Clone, Default)]
struct Doors(Arc<Mutex<HashMap<IpAddr, usize>>>);

/// One of them; gone when dropped.
struct Door(Doors, IpAddr);

impl Doors {
    /// One more from `address`, if it has not as many as one may have.
    fn open(&self, address: IpAddr) -> Option<Door> {
        let mut all = lock(&self.0);
        let count = all.entry(address).or_default();
        if *count >= HANDSHAKES_FROM_ONE {
            return None;
        }
        *count += 1;
        Some(Door(self.clone(), address))
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        let mut all = lock(&self.0.0);
        if let Some(count) = all.get_mut(&self.1) {
            *count -= 1;
            if *count == 0 {
                all.remove(&self.1);
            }
        }
    }
}

impl Daemon {
    /// Starts the party that the file `path` configures.
    ///
    /// # Errors
    /// [`Error::Config`], [`Error::Model`], [`Error::Io`]: whatever keeps it from serving.
    pub fn start(path: &Path, options: Options) -> Result<Daemon> {
        let config = Config::load(path)?;
        let Some(listen) = config.listen() else {
            return Err(Error::Config(format!(
                "{}: role = \"client\" does not listen; the client is `trefoil generate --config`",
                path.display()
            )));
        };
        let tls = Reloading::new(path, &config)?;
        let seen = Seen::open(config.store().unwrap_or(Path::new(".")))?;
        let part = match config.role() {
            Role::Owner => Part::Owner(Owner::open(&config)?),
            _ => Part::Helper(Arc::new(Helper::open(&config)?)),
        };
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("net")
            .enable_all()
            .build()
            .map_err(|e| Error::io("starting threads", e))?;
        let listener = runtime
            .block_on(TcpListener::bind(listen))
            .map_err(|e| {
                Error::Config(format!(
                    "[listen] address = \"{listen}\": {e}; is another program (this party, already started?) listening there, and is it an address of this machine?"
                ))
            })?;
        let address = listener.local_addr().map_err(|e| Error::io("the listening socket", e))?;
        let shared = Arc::new(Shared {
            permits: Arc::new(Semaphore::new(config.limits().sessions)),
            config,
            tls,
            seen,
            observer: Observer::default(),
            options,
            running: Mutex::default(),
            numbers: AtomicU64::new(0),
            taken: AtomicU64::new(0),
            waiting: Mutex::default(),
            draining: AtomicBool::new(false),
            part,
        });
        let stop = Arc::new(Notify::new());
        // It answers until the very end: that a party drains is something to say.
        let (watchers, watching) = watch::channel(false);
        let metrics = match shared.config.metrics() {
            Some(at) => Some(runtime.block_on(observe(at, &shared, watching))?),
            None => None,
        };
        runtime.spawn(listen_on(listener, Arc::clone(&shared), Arc::clone(&stop)));
        let watched = Arc::clone(&shared);
        runtime.spawn(async move {
            let mut broken = BTreeSet::new();
            loop {
                tokio::time::sleep(WATCH).await;
                let shared = Arc::clone(&watched);
                // Reads files.
                let watch = move || {
                    shared.end_revoked();
                    shared.end_broken(&broken)
                };
                broken = tokio::task::spawn_blocking(watch).await.unwrap_or_default();
            }
        });
        if let Part::Owner(owner) = &shared.part {
            runtime.spawn(owner.provision(Arc::clone(&shared)));
        }
        tracing::info!(role = %shared.config.role(), %address, identity = %shared.tls.current().own(), "listening");
        Ok(Daemon { address, metrics, shared, stop, _watchers: watchers, runtime: Some(runtime) })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where it tells its metrics, if it does.
    #[must_use]
    pub fn metrics(&self) -> Option<SocketAddr> {
        self.metrics
    }

    /// Sessions being served.
    #[must_use]
    pub fn sessions(&self) -> usize {
        self.shared.status().sessions as usize
    }

    /// Whether the Helper has all of this Owner's preparation.
    #[must_use]
    pub fn provisioned(&self) -> bool {
        self.shared.status().provisioned
    }

    /// Blocks until SIGTERM or Ctrl-C, then drains; a second signal ends at once.
    ///
    /// # Errors
    /// If signals cannot be waited for.
    pub fn run(self) -> Result<()> {
        let Some(runtime) = &self.runtime else { return Ok(()) };
        let drain = self.shared.config.limits().drain;
        let wait = async {
            use tokio::signal::unix::{SignalKind, signal};
            let mut term = signal(SignalKind::terminate())?;
            let mut int = signal(SignalKind::interrupt())?;
            tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} }
            self.close_doors();
            let sessions = self.sessions();
            tracing::info!(sessions, limit_s = drain.as_secs_f64(), "draining; signal again to end at once");
            tokio::select! { _ = term.recv() => {}, _ = int.recv() => {}, () = self.empty(drain) => {} }
            Ok(())
        };
        runtime.block_on(wait).map_err(|e: std::io::Error| Error::io("waiting for signals", e))?;
        self.end_rest();
        Ok(())
    }

    /// Stops listening, lets sessions end for at most `limit`, then ends them.
    pub fn stop(self, limit: Duration) {
        self.close_doors();
        if let Some(runtime) = &self.runtime {
            runtime.block_on(self.empty(limit));
        }
        self.end_rest();
    }

    fn close_doors(&self) {
        self.shared.draining.store(true, Ordering::Relaxed);
        // Kept if the listener is busy just now.
        self.stop.notify_one();
    }

    async fn empty(&self, limit: Duration) {
        let deadline = Instant::now() + limit;
        while self.sessions() > 0 && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    fn end_rest(&self) {
        let left: Vec<Links> = lock(&self.shared.running).values().map(|(links, _)| links.clone()).collect();
        if !left.is_empty() {
            tracing::warn!(sessions = left.len(), "ending sessions that did not end by themselves");
        }
        let reason = Abort { blamed: None, code: "shutdown".into() };
        left.iter().for_each(|links| links.end(&reason));
        let deadline = Instant::now() + Duration::from_secs(2);
        while self.sessions() > 0 && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
        tracing::info!("stopped");
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // Kept if the listener is busy just now.
        self.stop.notify_one();
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Listens for those who watch over this party.
async fn observe(at: SocketAddr, shared: &Arc<Shared>, stop: watch::Receiver<bool>) -> Result<SocketAddr> {
    let listener = TcpListener::bind(at).await.map_err(|e| {
        Error::Config(format!(
            "[metrics] listen = \"{at}\": {e}; is another program listening there, and is it an address of this machine?"
        ))
    })?;
    let address = listener.local_addr().map_err(|e| Error::io("the socket for metrics", e))?;
    tokio::spawn(crate::http::serve(listener, observe::router(shared), stop));
    tracing::info!(%address, "metrics");
    Ok(address)
}

async fn listen_on(listener: TcpListener, shared: Arc<Shared>, stop: Arc<Notify>) {
    let handshakes = Arc::new(Semaphore::new(HANDSHAKES));
    let doors = Doors::default();
    loop {
        let accepted = tokio::select! {
            () = stop.notified() => return,
            accepted = listener.accept() => accepted,
        };
        let (tcp, address) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of file descriptors, mostly: others may free some.
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let permit = Arc::clone(&handshakes).try_acquire_owned().ok();
        let Some(permit) = permit.and_then(|permit| Some((permit, doors.open(address.ip())?))) else {
            tracing::warn!(%address, "too many connections at once: dropped");
            continue;
        };
        let shared = Arc::clone(&shared);
        tokio::spawn(async move {
            if let Err(error) = shared.serve(tcp, address).await {
                tracing::warn!(%address, code = error.code(), %error, "connection refused or lost");
            }
            drop(permit);
        });
    }
}
