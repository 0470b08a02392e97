//! The Client's side of a deployment: dials Owner and Helper, agrees with both, and generates.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::config::{Address, Config, Party};
use super::engine::{self, Agreed, Peer, SessionReport};
use super::party::{Need, Options, reply, unexpected};
use super::tls::{self, Identity, Reloading, Secured, Tls};
use super::wire::{self, Digest, Go, Hello, Nonce, Refusal, Reply, SessionFacts};
use crate::error::{Error, PeerFault, Result};
use crate::generate::{Client, Draft, Generation, LinkReport};
use crate::model::ModelConfig;
use crate::model::store::{ClientModel, PublicManifest};
use crate::net::meter::Meter;
use crate::net::tls::TlsChannel;
use crate::party::Role;
use crate::plan::Plan;
use crate::prf::PreparationSeed;
use crate::world::first_cause;

/// A session with an Owner and a Helper somewhere else.
pub struct Remote {
    client: Client,
    meter: Arc<Meter>,
    channels: Vec<(Role, Arc<TlsChannel>)>,
    links: crate::net::Links,
    facts: Facts,
}

/// Says what has come from each peer so far: online and run-ahead bytes, and messages.
pub type Received = Arc<dyn Fn() -> Vec<(Role, [u64; 2], u64)> + Send + Sync>;

/// What was agreed.
#[derive(Clone, Debug)]
pub struct Facts {
    /// Who the Owner is, from its certificate.
    pub owner: Identity,
    /// Who the Helper is, from its certificate.
    pub helper: Identity,
    /// The model's public configuration.
    pub config: ModelConfig,
    /// The public plan.
    pub plan: Plan,
    /// Id of the preparation.
    pub preparation: String,
    /// Session id, its first digits.
    pub session: String,
    /// The longest prompt that the Owner takes.
    pub prompt_tokens: usize,
    /// And by our own limits.
    pub own_prompt_tokens: usize,
    /// From dialling to the agreement.
    pub setup: Duration,
}

/// Longest wait for peers at the end of a session.
const GOODBYE: Duration = Duration::from_secs(5);

impl Remote {
    /// A session as the file `path` configures it.
    ///
    /// # Errors
    /// [`Error::Config`] and [`Error::Model`] for what is here, [`Error::Peer`] for what is there.
    pub fn open(path: &Path, options: Options) -> Result<Remote> {
        let config = Config::load(path)?;
        let Party::Client { owner, helper, public } = config.party() else {
            return Err(Error::Config(format!(
                "{}: role = \"{}\" is a long-running party (trefoil party --config); to generate, the role is client",
                path.display(),
                config.role()
            )));
        };
        let begun = Instant::now();
        let tls = Reloading::new(path, &config)?.current();
        let model = ClientModel::open(public)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|e| Error::io("starting the network", e))?;
        let nonce = wire::nonce()?;
        runtime.block_on(async {
            let met = meet(&tls, (owner, helper), nonce, config.limits().handshake_timeout).await?;
            let Met { mut owner, mut helper, welcome, session } = met;
            let step = "agreeing on a session";
            let manifest = PublicManifest::parse(&welcome.manifest, "the owner's manifest")
                .map_err(|_| owner.blame(step, PeerFault::Malformed("a manifest that is none")))?;
            let seed = PreparationSeed::from_bytes(welcome.seed.0);
            let secure = model.secure_model(&manifest, &seed).map_err(|e| match e {
                Error::Peer { kind, .. } => owner.blame(step, kind),
                other => other,
            })?;
            let (limits, run_ahead) = (config.limits(), welcome.ahead_capacity);
            Need::of(Role::Client, limits, secure.config(), secure.plan(), run_ahead).check(limits)?;
            let go = wire::encode(&Go { session })?;
            owner.send(step, &go).await?;
            helper.send(step, &go).await?;
            let mut ahead = tls::connect(&tls, owner_address(&config)?, Role::Owner, owner.timeout).await?;
            ahead.send("run-ahead lane", &wire::encode(&Hello::Ahead { session })?).await?;
            let Reply::Attached = reply(&mut ahead, "run-ahead lane", wire::SHORT).await? else {
                return Err(unexpected(&ahead, "run-ahead lane"));
            };
            let facts = Facts {
                owner: owner.peer.clone(),
                helper: helper.peer.clone(),
                config: secure.config().clone(),
                plan: secure.plan().clone(),
                preparation: manifest.id.to_string(),
                session: engine::short(&session),
                prompt_tokens: usize::try_from(welcome.prompt_tokens).unwrap_or(usize::MAX),
                own_prompt_tokens: limits.prompt_tokens,
                setup: begun.elapsed(),
            };
            let agreed = Agreed {
                role: Role::Client,
                id: session,
                ahead_capacity: usize::try_from(welcome.ahead_capacity).unwrap_or(usize::MAX),
                timeout: engine::patience(config.limits().timeout),
            };
            let peers = vec![Peer { online: owner, ahead: Some(ahead) }, Peer { online: helper, ahead: None }];
            let connected = engine::connect(&agreed, peers, &options)?;
            let links = connected.session.links().clone();
            let client = Client::new(connected.session, secure, model.into_public());
            Ok(Remote { client, meter: connected.meter, channels: connected.channels, links, facts })
        })
    }

    /// What was agreed.
    #[must_use]
    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    /// Generates, see [`Client::generate`]. After an error the session is spent.
    ///
    /// # Errors
    /// As [`Client::generate`].
    pub fn generate(
        &mut self,
        prompt: &[u32],
        max_new: usize,
        temperature: f64,
        seed: u64,
        on_token: &mut dyn FnMut(u32) -> bool,
    ) -> Result<Generation> {
        let n = prompt.len();
        let Facts { prompt_tokens: theirs, own_prompt_tokens: ours, .. } = self.facts;
        if n > theirs {
            return Err(Error::Config(format!(
                "the prompt has {n} tokens, but the owner takes {theirs} at most: shorten it (or ask for a higher [limits] prompt_tokens there)"
            )));
        }
        if n > ours {
            return Err(Error::Config(format!(
                "the prompt has {n} tokens: shorten it, or raise [limits] prompt_tokens = {ours} in the configuration"
            )));
        }
        self.client.generate(prompt, max_new, temperature, seed, false, on_token)
    }

    /// Generates with drafts from now on, see [`Client::draft_with`].
    ///
    /// # Errors
    /// As [`Client::draft_with`].
    pub fn draft_with(&mut self, draft: Draft) -> Result<()> {
        self.client.draft_with(draft)
    }

    /// Its links: they say when one has ended, and the session is spent.
    #[must_use]
    pub fn links(&self) -> crate::net::Links {
        self.links.clone()
    }

    /// Counts what the Client sends, while it works too.
    #[must_use]
    pub fn meter(&self) -> Arc<Meter> {
        Arc::clone(&self.meter)
    }

    /// Counts what has come, while the Client works too.
    #[must_use]
    pub fn received(&self) -> Received {
        let channels = self.channels.clone();
        Arc::new(move || channels.iter().map(|(peer, c)| (*peer, c.received(), c.received_messages())).collect())
    }

    /// Ends the session at all parties and returns what the Owner reports, and the traffic of all links by name.
    ///
    /// # Errors
    /// [`Error::Peer`] if a peer is gone already.
    pub fn finish(self) -> Result<(SessionReport, BTreeMap<String, LinkReport>)> {
        let Remote { client, meter, channels, links, .. } = self;
        let report = client.finish_with(|| SessionReport::receive(&links.within(GOODBYE)))?;
        let mut out = BTreeMap::new();
        for (peer, channel) in &channels {
            let sent = meter.sent(*peer);
            let [online, ahead] = channel.received();
            out.insert(
                format!("client->{peer}"),
                LinkReport {
                    online_bytes: sent.online_bytes,
                    ahead_bytes: sent.ahead_bytes,
                    messages: sent.messages + sent.ahead_messages,
                },
            );
            let messages = channel.received_messages();
            out.insert(format!("{peer}->client"), LinkReport { online_bytes: online, ahead_bytes: ahead, messages });
        }
        let [online_bytes, messages] = report.owner_to_helper;
        out.insert("owner->helper".into(), LinkReport { online_bytes, ahead_bytes: 0, messages });
        let [online_bytes, ahead_bytes] = report.helper_to_owner;
        let messages = report.helper_to_owner_messages;
        out.insert("helper->owner".into(), LinkReport { online_bytes, ahead_bytes, messages });
        for (_, channel) in &channels {
            channel.linger(Duration::from_secs(1));
        }
        Ok((report, out))
    }
}

/// Whether Owner and Helper answer, and the Owner has a place for one more session: what `/ready` of a gateway says.
///
/// # Errors
/// What keeps them from it.
pub async fn reachable(path: &Path) -> Result<()> {
    let config = Config::load(path)?;
    let tls = Tls::load(config.tls(), config.role())?;
    let (step, timeout) = ("probe", config.limits().handshake_timeout);
    for (role, address) in config.peers() {
        let mut c = tls::connect(&tls, address, role, timeout).await?;
        c.send(step, &wire::encode(&Hello::Probe)?).await?;
        let Reply::Status(status) = reply(&mut c, step, wire::LONG).await? else { return Err(unexpected(&c, step)) };
        if status.sessions >= status.limit {
            return Err(c.blame(step, Refusal::Busy { sessions: status.limit }.fault()));
        }
        if role == Role::Owner && !status.provisioned {
            return Err(c.blame(step, Refusal::Preparing { percent: 0 }.fault()));
        }
        c.close().await;
    }
    Ok(())
}

fn owner_address(config: &Config) -> Result<&Address> {
    match config.party() {
        Party::Client { owner, .. } => Ok(owner),
        _ => Err(Error::Internal("a client of another role".into())),
    }
}

struct Welcome {
    manifest: Vec<u8>,
    seed: wire::Seed,
    ahead_capacity: u64,
    prompt_tokens: u64,
}

/// Both peers, and what they agree on.
struct Met {
    owner: Secured,
    helper: Secured,
    welcome: Welcome,
    session: Digest,
}

/// Dials both and hears what they say of the session.
async fn meet(tls: &Tls, (owner, helper): (&Address, &Address), nonce: Nonce, timeout: Duration) -> Result<Met> {
    let step = "opening a session";
    // The Owner pairs up with the Helper before it answers; the Helper waits for both.
    let patience = 4 * timeout;
    let at_owner = async {
        let mut c = tls::connect(tls, owner, Role::Owner, timeout).await?;
        c.send(step, &wire::encode(&Hello::Open { nonce })?).await?;
        c.timeout = patience;
        let heard = reply(&mut c, step, wire::LONG).await?;
        Ok((c, heard))
    };
    let at_helper = async {
        let mut c = tls::connect(tls, helper, Role::Helper, timeout).await?;
        c.send(step, &wire::encode(&Hello::Join { nonce })?).await?;
        c.timeout = patience;
        let heard = reply(&mut c, step, wire::SHORT).await?;
        Ok((c, heard))
    };
    let ((mut owner, welcome), (mut helper, joined)) = both(at_owner, at_helper).await?;
    owner.timeout = timeout;
    helper.timeout = timeout;
    let Reply::Welcome {
        owner_nonce,
        helper_nonce,
        helper: helper_seen,
        manifest,
        seed,
        ahead_capacity,
        prompt_tokens,
        session,
    } = welcome
    else {
        return Err(unexpected(&owner, step));
    };
    let Reply::Joined { helper_nonce: said, owner_nonce: heard, owner: owner_seen, agreed, session: theirs } = joined
    else {
        return Err(unexpected(&helper, step));
    };
    let own = wire::digest(&manifest);
    if agreed != own {
        return Err(helper.blame(step, Refusal::Manifest { ours: agreed, theirs: own }.fault()));
    }
    let fingerprints =
        [&owner.peer.fingerprint, &tls.own().fingerprint, &helper.peer.fingerprint].map(ToString::to_string);
    let [o, c, h] = &fingerprints;
    let facts = SessionFacts { nonces: [&owner_nonce, &nonce, &helper_nonce], agreed: &own, fingerprints: [o, c, h] };
    let id = facts.id();
    // Each has seen the same three certificates and nonces, or somebody is in between.
    if session != id || helper_seen != *h {
        return Err(owner.blame(step, Refusal::Session.fault()));
    }
    if theirs != id || said != helper_nonce || heard != owner_nonce || owner_seen != *o {
        return Err(helper.blame(step, Refusal::Session.fault()));
    }
    Ok(Met { owner, helper, welcome: Welcome { manifest, seed, ahead_capacity, prompt_tokens }, session: id })
}

/// Both results, or the error that is not the other's consequence. When one fails for a reason of its own, the other is not
/// waited for longer than a moment: it may know a better reason.
async fn both<A, B>(a: impl Future<Output = Result<A>>, b: impl Future<Output = Result<B>>) -> Result<(A, B)> {
    const MOMENT: Duration = Duration::from_millis(300);
    tokio::pin!(a, b);
    let (a, b) = tokio::select! {
        x = &mut a => match x {
            Ok(x) => (Ok(x), Some(b.await)),
            Err(e) => (Err(e), tokio::time::timeout(MOMENT, b).await.ok()),
        },
        y = &mut b => match y {
            Ok(y) => (a.await, Some(Ok(y))),
            Err(e) => match tokio::time::timeout(MOMENT, a).await {
                Ok(a) => (a, Some(Err(e))),
                Err(_) => return Err(e),
            },
        },
    };
    match (a, b) {
        (Ok(a), Some(Ok(b))) => Ok((a, b)),
        (Err(a), Some(Err(b))) => Err(first_cause([a, b])),
        (Err(e), _) | (Ok(_), Some(Err(e))) => Err(e),
        (Ok(_), None) => Err(Error::Internal("a peer was not waited for".into())),
    }
}
