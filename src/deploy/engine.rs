//! From agreed connections to a running session.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::certs::Fingerprint;
use super::observe::Watched;
use super::party::{Options, Place};
use super::tls::Secured;
use super::wire::Digest;
use crate::error::{Error, PeerFault, Result};
use crate::generate::Grant;
use crate::net::meter::{Meter, Metered};
use crate::net::tls::TlsChannel;
use crate::net::{Channel, Lane, Links};
use crate::party::Role;
use crate::prf::{Address, Pair, Prf};
use crate::session::{Scope, Session};

/// The connections to one peer.
pub(super) struct Peer {
    pub online: Secured,
    pub ahead: Option<Secured>,
}

/// What is agreed before the engine starts.
pub(super) struct Agreed {
    pub role: Role,
    pub id: Digest,
    /// Bytes that the Owner keeps of each peer's run-ahead.
    pub ahead_capacity: usize,
    pub timeout: Duration,
}

/// A session over TLS, and its channels, which somebody has to hold.
pub(super) struct Connected {
    pub session: Session,
    pub meter: Arc<Meter>,
    pub channels: Vec<(Role, Arc<TlsChannel>)>,
    /// Certificates of the peers.
    pub peers: Vec<Fingerprint>,
}

/// Hands the connections over to the engine. The pairs' keys come out of the TLS connections.
pub(super) fn connect(agreed: &Agreed, peers: Vec<Peer>, options: &Options) -> Result<Connected> {
    let meter = Arc::new(Meter::default());
    let (mut keys, mut channels) = (Vec::new(), Vec::new());
    let fingerprints = peers.iter().map(|p| p.online.peer.fingerprint).collect();
    let mut links: Vec<(Role, Arc<dyn Channel>)> = Vec::new();
    for peer in peers {
        let role = peer.online.peer.role;
        let pair =
            Pair::of(agreed.role, role).ok_or_else(|| Error::Internal(format!("a link of the {role} with itself")))?;
        keys.push((pair, peer.online.key(&agreed.id)?));
        let online = peer.online.into_stream(Some(agreed.timeout))?;
        // Run-ahead waits as long as the Owner's buffer is full, which ends with the session at the latest.
        let ahead = peer.ahead.map(|c| c.into_stream(None)).transpose()?;
        let channel = TlsChannel::new(online, ahead, agreed.ahead_capacity).map_err(|e| Error::io("a thread", e))?;
        let channel = Arc::new(channel);
        let link: Arc<dyn Channel> = Arc::clone(&channel) as _;
        let link = match &options.wrap {
            Some(wrap) => wrap(role, link),
            None => link,
        };
        links.push((role, Arc::new(Metered::new(link, role, Arc::clone(&meter)))));
        channels.push((role, channel));
    }
    let prf = Prf::new(keys);
    let prf = match &options.addresses {
        Some(log) => prf.with_log(Arc::clone(log), agreed.role),
        None => prf,
    };
    let links = Links::new(agreed.role, links, agreed.timeout, agreed.ahead_capacity);
    let session = Session::new(agreed.role, links, prf, Arc::clone(&meter));
    Ok(Connected { session, meter, channels, peers: fingerprints })
}

/// A session's first eight hex digits, for logs: the id is public to all three.
pub(super) fn short(id: &Digest) -> String {
    id[..4].iter().map(|b| format!("{b:02x}")).collect()
}

/// Runs a server's half of a session on a thread of its own; `place` is free again when it has ended.
pub(super) fn spawn(
    connected: Connected,
    id: Digest,
    client: String,
    place: Place,
    run: impl FnOnce(&mut Session, &Connection) -> Result<()> + Send + 'static,
) -> Result<()> {
    let Connected { mut session, meter, channels, peers } = connected;
    let links = session.links().clone();
    place.occupy(&links, peers, Watched { meter: Arc::clone(&meter), channels: channels.clone() });
    let started = Instant::now();
    let thread = std::thread::Builder::new().name(format!("session {}", short(&id)));
    let work = move || {
        let span = tracing::info_span!("session", id = %short(&id), %client);
        let _in = span.enter();
        tracing::info!("session begins");
        let connection = Connection { meter, channels };
        let out = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run(&mut session, &connection)))
            .unwrap_or_else(|_| Err(Error::Internal("a session's thread panicked".into())));
        let seconds = started.elapsed().as_secs_f64();
        match &out {
            Ok(()) => tracing::info!(seconds, "session ended"),
            Err(error) => {
                links.abort(error);
                tracing::warn!(seconds, code = error.code(), %error, "session failed");
            }
        }
        place.vacate(out.is_ok());
        drop((session, links, connection));
        super::release::freed_memory();
        drop(place);
    };
    thread.spawn(work).map(|_| ()).map_err(|e| Error::io("a session's thread", e))
}

/// What a running session can be asked.
pub(super) struct Connection {
    pub meter: Arc<Meter>,
    channels: Vec<(Role, Arc<TlsChannel>)>,
}

impl Connection {
    /// Bytes received from `peer`, message headers included: online, ahead.
    pub fn received(&self, peer: Role) -> [u64; 2] {
        self.channel(peer).map_or([0; 2], |c| c.received())
    }

    /// Messages received from `peer`.
    pub fn received_messages(&self, peer: Role) -> u64 {
        self.channel(peer).map_or(0, |c| c.received_messages())
    }

    fn channel(&self, peer: Role) -> Option<&Arc<TlsChannel>> {
        self.channels.iter().find(|(role, _)| *role == peer).map(|(_, c)| c)
    }
}

/// What the Owner tells the Client at the end of a session: numbers that all three could work out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SessionReport {
    /// Sequential online messages of the last pass's slowest private layer.
    pub layer_messages: u64,
    /// Passes walked ahead and not used.
    pub discarded_passes: u64,
    /// Their run-ahead bytes.
    pub discarded_bytes: u64,
    /// Owner to Helper: online bytes, online messages.
    pub owner_to_helper: [u64; 2],
    /// Helper to Owner: online bytes, run-ahead bytes.
    pub helper_to_owner: [u64; 2],
    /// Messages of both kinds.
    pub helper_to_owner_messages: u64,
}

const REPORT_WORDS: usize = 8;

fn report_step() -> Address {
    Scope::new("session").address(0, "session.report")
}

impl SessionReport {
    fn words(&self) -> [u64; REPORT_WORDS] {
        let ([a, b], [c, d]) = (self.owner_to_helper, self.helper_to_owner);
        [self.layer_messages, self.discarded_passes, self.discarded_bytes, a, b, c, d, self.helper_to_owner_messages]
    }

    /// Owner's side.
    pub(super) fn send(&self, links: &Links) -> Result<()> {
        let bytes: Vec<u8> = self.words().iter().flat_map(|w| w.to_le_bytes()).collect();
        links.send(Role::Client, Lane::Online, &report_step(), bytes)
    }

    /// Client's side.
    pub(super) fn receive(links: &Links) -> Result<SessionReport> {
        let bytes = links.recv(Role::Owner, Lane::Online, &report_step(), 8 * REPORT_WORDS)?;
        let words: Vec<u64> = bytes.chunks_exact(8).filter_map(|c| c.try_into().ok()).map(u64::from_le_bytes).collect();
        let [layer_messages, discarded_passes, discarded_bytes, a, b, c, d, helper_to_owner_messages] = words[..]
        else {
            let kind = PeerFault::Malformed("a report that is none");
            return Err(crate::net::blame(Role::Owner, &report_step(), kind));
        };
        Ok(SessionReport {
            layer_messages,
            discarded_passes,
            discarded_bytes,
            owner_to_helper: [a, b],
            helper_to_owner: [c, d],
            helper_to_owner_messages,
        })
    }
}

/// How long Helper and Client wait: a little longer than the Owner, who waits for both of them, and whose word on which of
/// them has stalled then comes first.
pub(super) fn patience(timeout: Duration) -> Duration {
    timeout + timeout / 10 + Duration::from_secs(1)
}

/// What a server grants, from its configuration.
pub(super) fn grant(limits: &super::config::Limits) -> Grant {
    Grant { idle: limits.idle_timeout, prompt: limits.prompt_tokens, open_logits: limits.open_logits }
}
