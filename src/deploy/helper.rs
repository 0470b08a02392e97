//! The Helper as a daemon: keeps its halves of prepared models, and brings Owner and Client of a session together.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::config::Config;
use super::engine::{self, Agreed, Peer};
use super::party::{Need, Served, Shared, lock, refuse};
use super::tls::Secured;
use super::wire::{self, Digest, Go, Nonce, Refusal, Reply, SessionFacts};
use crate::error::{Error, PeerFault, Result};
use crate::generate;
use crate::model::secure::SecureModel;
use crate::model::store::{HelperStore, PreparationId, PublicManifest};
use crate::party::Role;

/// A preparation in memory.
struct Loaded {
    agreed: Digest,
    /// Digest of the half's hashes.
    half: Digest,
    model: Arc<SecureModel>,
}

impl Loaded {
    /// From what an Owner says of it.
    fn differs(&self, agreed: Digest, half: Digest) -> Option<Refusal> {
        if self.agreed != agreed {
            return Some(Refusal::Manifest { ours: self.agreed, theirs: agreed });
        }
        (self.half != half).then_some(Refusal::Half)
    }
}

/// A Client that has come for its session, or is awaited.
struct Meeting {
    since: Instant,
    /// The Client that waits here, by its certificate.
    client: Option<String>,
    give: Option<oneshot::Sender<Secured>>,
    take: Option<oneshot::Receiver<Secured>>,
}

/// The Helper's part of a daemon.
pub(super) struct Helper {
    store: Arc<HelperStore>,
    loaded: Mutex<BTreeMap<String, Arc<Loaded>>>,
    meetings: Mutex<HashMap<Nonce, Meeting>>,
    patience: Duration,
}

/// What the Owner says of a session.
pub(super) struct Pair {
    pub client_nonce: Nonce,
    pub owner_nonce: Nonce,
    pub client: String,
    pub preparation: String,
    pub agreed: Digest,
    pub half: Digest,
    pub ahead_capacity: u64,
}

/// A session that is not let in: what the Owner hears, and what it is to blame for.
struct Denied {
    why: Refusal,
    fault: Option<PeerFault>,
}

/// Preparations kept in memory beyond those in use.
const IN_MEMORY: usize = 2;
/// Clients that wait for an Owner, at most.
const MEETINGS: usize = 1024;
/// Of these, with one certificate.
const MEETINGS_OF_ONE: usize = 64;
/// More run-ahead buffer than any Owner has.
const MOST_AHEAD: u64 = 1 << 40;

impl Helper {
    pub fn open(config: &Config) -> Result<Helper> {
        let helper = Helper {
            store: Arc::new(
                HelperStore::open(config.store().unwrap_or(Path::new(".")))?.with_limit(config.limits().memory_bytes),
            ),
            loaded: Mutex::default(),
            meetings: Mutex::default(),
            patience: config.limits().handshake_timeout,
        };
        // The newest: others are loaded when an Owner asks for them.
        if let Some(id) = helper.store.newest()? {
            // One that cannot be read does not keep the others from being served.
            match helper.load(&id) {
                // Beyond the limits.
                Err(error @ Error::Config(_)) => return Err(error),
                Err(error) => {
                    tracing::warn!(preparation = %id, code = error.code(), %error, "a stored preparation cannot be used");
                }
                Ok(()) => {}
            }
            let limits = config.limits();
            for l in lock(&helper.loaded).values() {
                Need::of(Role::Helper, limits, l.model.config(), l.model.plan(), 0).check(limits)?;
            }
        }
        Ok(helper)
    }

    /// Ids of the complete ones.
    pub fn preparations(&self) -> Vec<String> {
        self.store.ids().unwrap_or_default().iter().map(ToString::to_string).collect()
    }

    fn load(&self, id: &PreparationId) -> Result<()> {
        let (manifest, model) = self.store.load(id)?;
        self.keep(id, &manifest, model)
    }

    /// Drops models that no session uses, but for `name`.
    fn drop_idle(&self, name: &str) {
        lock(&self.loaded)
            .retain(|other, l| other == name || Arc::strong_count(l) > 1 || Arc::strong_count(&l.model) > 1);
    }

    fn keep(&self, id: &PreparationId, manifest: &PublicManifest, model: SecureModel) -> Result<()> {
        super::release::freed_memory();
        let half = wire::digest(&self.store.hashes(id)?);
        let loaded = Arc::new(Loaded { agreed: wire::digest(&manifest.to_json()?), half, model: Arc::new(model) });
        let mut all = lock(&self.loaded);
        all.insert(id.to_string(), loaded);
        // Older ones stay on disk; in memory only as long as a session uses them.
        let (name, mut spare) = (id.to_string(), all.len().saturating_sub(IN_MEMORY));
        all.retain(|other, l| {
            let goes = spare > 0 && *other != name && Arc::strong_count(l) == 1 && Arc::strong_count(&l.model) == 1;
            spare -= usize::from(goes);
            !goes
        });
        drop(all);
        tracing::info!(preparation = %id, "preparation loaded");
        Ok(())
    }

    /// Loads a preparation that is on disk but not in memory.
    async fn fetch(&self, name: &str) {
        let Ok(id) = name.parse::<PreparationId>() else { return };
        if lock(&self.loaded).contains_key(name) || !self.store.has(&id) {
            return;
        }
        let store = Arc::clone(&self.store);
        let loaded = blocking(move || store.load(&id)).await;
        if let Err(error) = loaded.and_then(|(manifest, model)| self.keep(&id, &manifest, model)) {
            tracing::warn!(preparation = %id, code = error.code(), %error, "a stored preparation cannot be used");
        }
    }

    /// The end of a meeting that `which` takes; whoever comes first makes it.
    fn meeting<T>(&self, nonce: &Nonce, which: impl FnOnce(&mut Meeting) -> Option<T>) -> Option<T> {
        self.forget_old_meetings();
        let mut meetings = lock(&self.meetings);
        if meetings.len() >= MEETINGS && !meetings.contains_key(nonce) {
            return None;
        }
        let m = meetings.entry(*nonce).or_insert_with(|| {
            let (give, take) = oneshot::channel();
            Meeting { since: Instant::now(), client: None, give: Some(give), take: Some(take) }
        });
        which(m)
    }

    fn forget_old_meetings(&self) {
        // Longer than any Client is kept waiting.
        lock(&self.meetings).retain(|_, m| m.since.elapsed() < 3 * self.patience);
    }

    /// A Client comes for its session. The Owner's task takes it from here.
    pub async fn join(self: &Arc<Self>, c: Secured, nonce: Nonce) -> Served {
        let fingerprint = c.peer.fingerprint.to_string();
        // A Client that joins and joins, and never opens a session at the Owner, takes no more than its share.
        let waiting = |m: &&Meeting| m.client.as_deref() == Some(&fingerprint) && m.take.is_some();
        if lock(&self.meetings).values().filter(waiting).count() >= MEETINGS_OF_ONE {
            return refuse(c, "joining a session", Refusal::Busy { sessions: MEETINGS_OF_ONE as u64 }).await;
        }
        let give = self.meeting(&nonce, |m| {
            m.client = Some(fingerprint);
            m.give.take()
        });
        let Some(give) = give else {
            let blamed = c.blame("joining a session", PeerFault::Replay);
            let _ = refuse(c, "joining a session", Refusal::Replay).await;
            return Err(blamed);
        };
        // If nobody waits any more, the connection closes.
        let _ = give.send(c);
        // And if the Owner never comes, the Client hears it from here, or it would blame the one who hangs up.
        let helper = Arc::clone(self);
        tokio::spawn(async move {
            tokio::time::sleep(2 * helper.patience).await;
            let take = lock(&helper.meetings).remove(&nonce).and_then(|m| m.take);
            if let Some(c) = take.and_then(|mut take| take.try_recv().ok()) {
                let why = Refusal::Third { role: Role::Owner, code: "timeout".into() };
                let _ = refuse(c, "joining a session", why).await;
            }
        });
        Ok(())
    }

    /// The Owner announces a session.
    pub async fn pair(&self, shared: &Arc<Shared>, mut o: Secured, p: Pair) -> Served {
        let step = "pairing a session";
        // The Client's connection, whatever comes of it: it hears what the Owner hears.
        let meeting = self.meeting(&p.client_nonce, |m| m.take.take());
        let client = async {
            let waited = tokio::time::timeout(self.patience, meeting?).await;
            waited.ok()?.ok()
        };
        self.fetch(&p.preparation).await;
        let (place, loaded) = match self.admit(shared, &p) {
            Ok(admitted) => admitted,
            Err(denied) => {
                let Denied { why, fault: blame } = *denied;
                let code = blame.as_ref().map_or("refused", |k| k.code());
                let blamed = blame.map(|kind| o.blame(step, kind));
                // Why there is no room is the Client's to know as well.
                let to_client = match &why {
                    Refusal::Busy { .. } | Refusal::Memory | Refusal::Draining | Refusal::Local => why.clone(),
                    _ => Refusal::Third { role: Role::Owner, code: code.into() },
                };
                let _ = refuse(o, step, why).await;
                if let Some(c) = client.await {
                    let _ = refuse(c, step, to_client).await;
                }
                return blamed.map_or(Ok(()), Err);
            }
        };
        let Some(mut c) = client.await else {
            let why = Refusal::Third { role: Role::Client, code: "timeout".into() };
            return refuse(o, step, why).await;
        };
        if c.peer.fingerprint.to_string() != p.client {
            let blamed = c.blame(step, Refusal::Session.fault());
            let _ = refuse(c, step, Refusal::Session).await;
            let _ = refuse(o, step, Refusal::Session).await;
            return Err(blamed);
        }
        let helper_nonce = wire::nonce()?;
        let own = shared.tls.current().own().fingerprint.to_string();
        let owner = o.peer.fingerprint.to_string();
        let facts = SessionFacts {
            nonces: [&p.owner_nonce, &p.client_nonce, &helper_nonce],
            agreed: &loaded.agreed,
            fingerprints: [&owner, &p.client, &own],
        };
        let session = facts.id();
        if !shared.seen.insert(&session)? {
            let blamed = o.blame(step, PeerFault::Replay);
            let _ = refuse(o, step, Refusal::Replay).await;
            return Err(blamed);
        }
        let expected = shared.expect_ahead(session, &owner);
        let joined = Reply::Joined { helper_nonce, owner_nonce: p.owner_nonce, owner, agreed: loaded.agreed, session };
        let joined = wire::encode(&joined)?;
        o.send(step, &joined).await?;
        c.send(step, &joined).await?;
        // The Client goes on when the Owner has welcomed it.
        c.timeout = 2 * self.patience;
        let go = wire::decode::<Go>(&c.recv(step, wire::SHORT).await?);
        if go.is_none_or(|g| g.session != session) {
            return Err(c.blame(step, PeerFault::Malformed("no agreement on the session")));
        }
        let Ok(Ok(ahead)) = tokio::time::timeout(self.patience, expected).await else {
            return Err(o.blame("run-ahead lane", PeerFault::Timeout(self.patience.as_millis() as u64)));
        };
        let limits = shared.config.limits();
        let agreed = Agreed {
            role: Role::Helper,
            id: session,
            ahead_capacity: p.ahead_capacity as usize,
            timeout: engine::patience(limits.timeout),
        };
        let client = c.peer.name.clone();
        let peers = vec![Peer { online: o, ahead: Some(ahead) }, Peer { online: c, ahead: None }];
        let connected = engine::connect(&agreed, peers, &shared.options)?;
        let (model, grant) = (Arc::clone(&loaded.model), engine::grant(limits));
        // Logits are the Owner's to open.
        let grant = generate::Grant { open_logits: true, ..grant };
        engine::spawn(connected, session, client, place, move |s, _| generate::helper(s, &model, &grant))
    }

    fn admit(&self, shared: &Arc<Shared>, p: &Pair) -> Result<(super::party::Place, Arc<Loaded>), Box<Denied>> {
        let denied = |why, fault| Box::new(Denied { why, fault });
        let fresh = shared.seen.insert(&p.client_nonce).and_then(|a| Ok(a && shared.seen.insert(&p.owner_nonce)?));
        match fresh {
            Ok(true) => {}
            Ok(false) => return Err(denied(Refusal::Replay, Some(PeerFault::Replay))),
            Err(error) => {
                tracing::error!(code = error.code(), %error, "the list of session ids cannot be written");
                return Err(denied(Refusal::Local, None));
            }
        }
        if p.ahead_capacity > MOST_AHEAD {
            return Err(denied(Refusal::Malformed, Some(PeerFault::Malformed("an impossible run-ahead buffer"))));
        }
        let Some(loaded) = lock(&self.loaded).get(&p.preparation).cloned() else {
            let wanted = p.preparation.chars().take(64).collect();
            let known = self.preparations().into_iter().take(8).collect();
            let why = Refusal::Preparation { wanted, known };
            let fault = why.fault();
            return Err(denied(why, Some(fault)));
        };
        if let Some(why) = loaded.differs(p.agreed, p.half) {
            let fault = why.fault();
            return Err(denied(why, Some(fault)));
        }
        // Several preparations may be in memory.
        let limits = shared.config.limits();
        let of = |l: &Loaded| Need::of(Role::Helper, limits, l.model.config(), l.model.plan(), p.ahead_capacity);
        let need = of(&loaded);
        let models = || lock(&self.loaded).values().map(|l| of(l).model).sum();
        let place = match shared.place(&Need { model: models(), ..need }) {
            Err(Refusal::Memory) => {
                self.drop_idle(&p.preparation);
                shared.place(&Need { model: models(), ..need })
            }
            other => other,
        };
        Ok((place.map_err(|why| denied(why, None))?, loaded))
    }

    /// The Owner offers a half: what is missing is received, verified chunk by chunk, and loaded.
    pub async fn receive(&self, shared: &Arc<Shared>, mut o: Secured, manifest: Vec<u8>, chunks: Vec<u8>) -> Served {
        let step = "receiving a preparation";
        o.timeout = shared.config.limits().timeout;
        let manifest = match PublicManifest::parse(&manifest, "the owner's manifest") {
            Ok(manifest) => manifest,
            Err(error) => {
                tracing::warn!(code = error.code(), %error, "the owner offers a preparation that is none");
                let blamed = o.blame(step, PeerFault::Malformed("a manifest that is none"));
                let _ = refuse(o, step, Refusal::Malformed).await;
                return Err(blamed);
            }
        };
        let id = manifest.id;
        let count = manifest.half.chunks;
        self.fetch(&id.to_string()).await;
        let loaded = lock(&self.loaded).get(&id.to_string()).cloned();
        if let Some(loaded) = loaded {
            let agreed = wire::digest(&manifest.to_json()?);
            if let Some(why) = loaded.differs(agreed, wire::digest(&chunks)) {
                let blamed = o.blame(step, why.fault());
                let _ = refuse(o, step, why).await;
                return Err(blamed);
            }
            o.send(step, &wire::encode(&Reply::Have { next: count })?).await?;
            o.send(step, &wire::encode(&Reply::Stored)?).await?;
            return Ok(());
        }
        let store = Arc::clone(&self.store);
        let incoming = blocking(move || store.incoming(&manifest, &chunks)).await;
        let mut incoming = match incoming {
            Ok(incoming) => incoming,
            Err(error) => {
                let _ = refuse(o, step, Refusal::Local).await;
                return Err(error);
            }
        };
        let next = incoming.next_chunk();
        o.send(step, &wire::encode(&Reply::Have { next })?).await?;
        for index in next..count {
            let bytes = o.recv(step, wire::LONG).await?;
            let (back, stored) = blocking(move || {
                let stored = incoming.put(index, &bytes);
                Ok((incoming, stored))
            })
            .await?;
            incoming = back;
            if let Err(error) = stored {
                let why = match &error {
                    Error::Io { .. } => Refusal::Local,
                    _ => Refusal::Corrupt { chunk: index },
                };
                let _ = refuse(o, step, why).await;
                return Err(error);
            }
        }
        let store = Arc::clone(&self.store);
        let loaded = blocking(move || incoming.finish().and_then(|()| store.load(&id))).await;
        if let Err(error) = loaded.and_then(|(manifest, model)| self.keep(&id, &manifest, model)) {
            let _ = refuse(o, step, Refusal::Local).await;
            return Err(error);
        }
        o.send(step, &wire::encode(&Reply::Stored)?).await?;
        o.close().await;
        Ok(())
    }
}

/// Work that waits for a disk.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|_| Error::Internal("a thread of the preparation store panicked".into()))?
}
