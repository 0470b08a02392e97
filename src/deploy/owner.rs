//! The Owner as a daemon: offers its preparation to the Helper until that has it, then serves Clients.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::config::{Address, Config, Party};
use super::engine::{self, Agreed, Peer, SessionReport};
use super::party::{Need, Served, Shared, refuse, reply, unexpected};
use super::tls::{self, Secured};
use super::wire::{self, Digest, Go, Hello, Nonce, Refusal, Reply, SessionFacts};
use crate::error::{Error, PeerFault, Result};
use crate::generate;
use crate::model::store::OwnerPreparation;
use crate::party::Role;

/// The Owner's part of a daemon.
pub(super) struct Owner {
    preparation: Arc<OwnerPreparation>,
    manifest: Vec<u8>,
    agreed: Digest,
    need: Need,
    helper: Address,
    /// Chunks of the Helper's half that it has; `u64::MAX` once it has all.
    sent: Arc<AtomicU64>,
}

const ALL: u64 = u64::MAX;

impl Owner {
    pub fn open(config: &Config) -> Result<Owner> {
        let Party::Owner { helper, preparation, .. } = config.party() else {
            return Err(Error::Internal("an owner of another role".into()));
        };
        let helper = helper.clone();
        let preparation = Arc::new(OwnerPreparation::open(preparation)?);
        let manifest = preparation.manifest().to_json()?;
        let (limits, model) = (config.limits(), preparation.model());
        let need = Need::of(Role::Owner, limits, model.config(), model.plan(), limits.run_ahead_bytes as u64);
        need.check(limits)?;
        super::release::freed_memory();
        Ok(Owner { need, agreed: wire::digest(&manifest), manifest, preparation, helper, sent: Arc::default() })
    }

    pub fn preparation(&self) -> String {
        self.preparation.manifest().id.to_string()
    }

    pub fn provisioned(&self) -> bool {
        self.sent.load(Ordering::Relaxed) == ALL
    }

    /// Offers the Helper its half until it has it, and again from time to time, should it have lost it.
    pub fn provision(&self, shared: Arc<Shared>) -> impl Future<Output = ()> + Send + 'static {
        let (preparation, manifest) = (Arc::clone(&self.preparation), self.manifest.clone());
        let (helper, sent) = (self.helper.clone(), Arc::clone(&self.sent));
        async move {
            let mut pause = Duration::from_millis(250);
            loop {
                match offer(&shared, &preparation, &manifest, &helper, &sent).await {
                    Ok(()) => {
                        if sent.swap(ALL, Ordering::Relaxed) != ALL {
                            super::release::freed_memory();
                            tracing::info!(preparation = %preparation.manifest().id, "the helper has the model");
                        }
                        pause = Duration::from_secs(20);
                    }
                    Err(error) => {
                        tracing::warn!(code = error.code(), %error, retry_s = pause.as_secs_f64(), "the helper does not have the model yet");
                        pause = (pause * 2).min(Duration::from_secs(5));
                    }
                }
                tokio::time::sleep(pause).await;
            }
        }
    }

    /// A Client's session: pair up with the Helper, agree, hand over to the engine.
    pub async fn open_session(&self, shared: &Arc<Shared>, mut c: Secured, nonce: Nonce) -> Served {
        let step = "opening a session";
        let place = match shared.place(&self.need) {
            Ok(place) => place,
            Err(why) => return refuse(c, step, why).await,
        };
        let fresh = match shared.seen.insert(&nonce) {
            Ok(fresh) => fresh,
            Err(error) => {
                let _ = refuse(c, step, Refusal::Local).await;
                return Err(error);
            }
        };
        if !fresh {
            let blamed = c.blame(step, PeerFault::Replay);
            let _ = refuse(c, step, Refusal::Replay).await;
            return Err(blamed);
        }
        let sent = self.sent.load(Ordering::Relaxed);
        if sent != ALL {
            let percent = (sent * 100 / self.preparation.chunk_count().max(1)) as u8;
            return refuse(c, step, Refusal::Preparing { percent }).await;
        }
        let ready = match self.pair(shared, &c, nonce).await {
            Ok(ready) => ready,
            Err(error) => {
                let role = Role::Helper;
                let _ = refuse(c, step, Refusal::Third { role, code: error.code().into() }).await;
                return Err(error);
            }
        };
        let Ready { online, ahead, helper_nonce, owner_nonce, session } = ready;
        let expected = shared.expect_ahead(session, &c.peer.fingerprint.to_string());
        let limits = shared.config.limits();
        let welcome = Reply::Welcome {
            owner_nonce,
            helper_nonce,
            helper: online.peer.fingerprint.to_string(),
            manifest: self.manifest.clone(),
            seed: wire::Seed(self.preparation.seed().to_bytes()),
            ahead_capacity: limits.run_ahead_bytes as u64,
            prompt_tokens: limits.prompt_tokens as u64,
            session,
        };
        c.send(step, &wire::encode(&welcome)?).await?;
        let go = wire::decode::<Go>(&c.recv(step, wire::SHORT).await?);
        if go.is_none_or(|g| g.session != session) {
            return Err(c.blame(step, PeerFault::Malformed("no agreement on the session")));
        }
        let client_ahead = tokio::time::timeout(shared.handshake_timeout(), expected).await;
        let Ok(Ok(client_ahead)) = client_ahead else {
            let waited = shared.handshake_timeout().as_millis() as u64;
            return Err(c.blame("run-ahead lane", PeerFault::Timeout(waited)));
        };
        let client = c.peer.name.clone();
        let agreed =
            Agreed { role: Role::Owner, id: session, ahead_capacity: limits.run_ahead_bytes, timeout: limits.timeout };
        let peers = vec![Peer { online: c, ahead: Some(client_ahead) }, Peer { online, ahead: Some(ahead) }];
        let connected = engine::connect(&agreed, peers, &shared.options)?;
        let (model, grant) = (self.preparation.model(), engine::grant(limits));
        engine::spawn(connected, session, client, place, move |s, connection| {
            let report = generate::owner(s, &model, &grant)?;
            let to_helper = connection.meter.sent(Role::Helper);
            let sums = SessionReport {
                layer_messages: u64::from(report.layer_messages.iter().copied().max().unwrap_or(0)),
                discarded_passes: report.discarded_passes,
                discarded_bytes: report.discarded_bytes,
                owner_to_helper: [to_helper.online_bytes, to_helper.messages],
                helper_to_owner: connection.received(Role::Helper),
                helper_to_owner_messages: connection.received_messages(Role::Helper),
            };
            sums.send(s.links())?;
            tracing::info!(requests = report.requests, tokens = report.tokens, ?sums, "served");
            Ok(())
        })
    }

    async fn pair(&self, shared: &Arc<Shared>, c: &Secured, client_nonce: Nonce) -> Result<Ready> {
        let step = "pairing a session";
        let (tls, timeout) = (shared.tls.current(), shared.handshake_timeout());
        let mut online = tls::connect(&tls, &self.helper, Role::Helper, timeout).await?;
        let owner_nonce = wire::nonce()?;
        let pair = Hello::Pair {
            client_nonce,
            owner_nonce,
            client: c.peer.fingerprint.to_string(),
            preparation: self.preparation(),
            agreed: self.agreed,
            half: wire::digest(self.preparation.hashes()),
            ahead_capacity: shared.config.limits().run_ahead_bytes as u64,
        };
        online.send(step, &wire::encode(&pair)?).await?;
        // The Helper waits for the Client meanwhile.
        online.timeout = 2 * timeout;
        let joined = reply(&mut online, step, wire::SHORT).await?;
        online.timeout = timeout;
        let Reply::Joined { helper_nonce, owner, agreed, session, .. } = joined else {
            return Err(unexpected(&online, step));
        };
        if agreed != self.agreed {
            let why = Refusal::Manifest { ours: agreed, theirs: self.agreed };
            return Err(online.blame(step, why.fault()));
        }
        let (own, helper, client) =
            (tls.own().fingerprint.to_string(), online.peer.fingerprint.to_string(), c.peer.fingerprint.to_string());
        let facts = SessionFacts {
            nonces: [&owner_nonce, &client_nonce, &helper_nonce],
            agreed: &self.agreed,
            fingerprints: [&own, &client, &helper],
        };
        if owner != own || facts.id() != session {
            return Err(online.blame(step, Refusal::Session.fault()));
        }
        if !shared.seen.insert(&session)? {
            return Err(online.blame(step, PeerFault::Replay));
        }
        let mut ahead = tls::connect(&tls, &self.helper, Role::Helper, timeout).await?;
        ahead.send("run-ahead lane", &wire::encode(&Hello::Ahead { session })?).await?;
        let Reply::Attached = reply(&mut ahead, "run-ahead lane", wire::SHORT).await? else {
            return Err(unexpected(&ahead, "run-ahead lane"));
        };
        Ok(Ready { online, ahead, helper_nonce, owner_nonce, session })
    }
}

/// The Helper's side of a session is in place.
struct Ready {
    online: Secured,
    ahead: Secured,
    helper_nonce: Nonce,
    owner_nonce: Nonce,
    session: Digest,
}

/// One offer; returns once the Helper has everything.
async fn offer(
    shared: &Arc<Shared>,
    preparation: &Arc<OwnerPreparation>,
    manifest: &[u8],
    helper: &Address,
    sent: &AtomicU64,
) -> Result<()> {
    let step = "sending the model to the helper";
    let tls = shared.tls.current();
    let mut c = tls::connect(&tls, helper, Role::Helper, shared.handshake_timeout()).await?;
    // The Helper verifies what it has, which takes as long as reading it from disk.
    c.timeout = shared.config.limits().timeout;
    let hello = Hello::Offer { manifest: manifest.to_vec(), chunks: preparation.hashes().to_vec() };
    c.send(step, &wire::encode(&hello)?).await?;
    let Reply::Have { next } = reply(&mut c, step, wire::SHORT).await? else { return Err(unexpected(&c, step)) };
    let count = preparation.chunk_count();
    if next > count {
        return Err(unexpected(&c, step));
    }
    if next < count {
        // It may have lost its disk since.
        sent.store(next, Ordering::Relaxed);
        tracing::info!(from = next, of = count, "sending the model to the helper");
    }
    let mut told = 0;
    for index in next..count {
        let preparation = Arc::clone(preparation);
        let chunk = tokio::task::spawn_blocking(move || preparation.chunk(index)).await;
        let chunk = chunk.map_err(|_| Error::Internal("making a chunk of the helper's half".into()))??;
        c.send(step, &chunk).await?;
        sent.store(index, Ordering::Relaxed);
        let percent = (index + 1) * 100 / count;
        if percent / 10 > told / 10 {
            told = percent;
            tracing::info!(percent, "sending the model to the helper");
        }
    }
    let Reply::Stored = reply(&mut c, step, wire::SHORT).await? else { return Err(unexpected(&c, step)) };
    c.close().await;
    Ok(())
}
