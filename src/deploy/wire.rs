//! Control messages between parties, before the engine takes a connection over.
//!
//! ```text
//! Client -> Owner   Open   ->  Welcome | Refused          Client -> Owner    Ahead -> Attached
//! Client -> Helper  Join   ->  Joined  | Refused          Owner  -> Helper   Ahead -> Attached
//! Owner  -> Helper  Pair   ->  Joined  | Refused          Owner  -> Helper   Offer -> Have ... chunks ... Stored
//! any    -> any     Probe  ->  Status, then echoes
//! ```
//!
//! Each is one length-prefixed postcard value. What is read is bounded before it is parsed; text in it is never printed as it
//! came.

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use zeroize::{Zeroize, ZeroizeOnDrop};

use super::tls::ALPN;
use crate::error::{Error, PeerFault, Result};
use crate::party::Role;

/// A party's contribution to a session id.
pub type Nonce = [u8; 32];
/// SHA-256 of what is to be agreed on.
pub type Digest = [u8; 32];

/// What the one who dials says first.
#[derive(Debug, Serialize, Deserialize)]
pub enum Hello {
    /// Client to Owner: a session, please.
    Open {
        /// Fresh.
        nonce: Nonce,
    },
    /// Client to Helper: the session that the Owner will announce under this nonce.
    Join {
        /// As in `Open`.
        nonce: Nonce,
    },
    /// Owner to Helper: a Client's session.
    Pair {
        /// The Client's.
        client_nonce: Nonce,
        /// Fresh.
        owner_nonce: Nonce,
        /// Fingerprint of the Client's certificate, as the Owner verified it.
        client: String,
        /// Which preparation.
        preparation: String,
        /// Digest of its public manifest.
        agreed: Digest,
        /// Digest of the hashes of the Helper's half: only the Owner that made it and the Helper know them, so that no other
        /// Owner gets sessions on this half. Never sent to a Client (`docs/preparation.md`).
        half: Digest,
        /// Bytes that the Owner keeps of the Helper's run-ahead.
        ahead_capacity: u64,
    },
    /// To where `Open` or `Pair` went: this connection carries the run-ahead lane of that session.
    Ahead {
        /// Session id.
        session: Digest,
    },
    /// Owner to Helper: have you this preparation's half?
    Offer {
        /// The public manifest, JSON.
        manifest: Vec<u8>,
        /// SHA-256 of every chunk of the Helper's half, 32 bytes each.
        chunks: Vec<u8>,
    },
    /// `trefoil doctor`: who are you, and how far away?
    Probe,
}

/// The preparation's seed on its way to a Client; never printed, wiped when dropped.
#[derive(Serialize, Deserialize, Zeroize, ZeroizeOnDrop)]
pub struct Seed(pub [u8; 32]);

impl std::fmt::Debug for Seed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Seed(redacted)")
    }
}

/// What the other one answers.
#[derive(Debug, Serialize, Deserialize)]
pub enum Reply {
    /// No, and why.
    Refused(Refusal),
    /// Owner to Client.
    Welcome {
        /// Fresh.
        owner_nonce: Nonce,
        /// Fresh, from the Helper.
        helper_nonce: Nonce,
        /// Fingerprint of the Helper's certificate, as the Owner verified it.
        helper: String,
        /// The public manifest of the preparation, JSON.
        manifest: Vec<u8>,
        /// The preparation's seed.
        seed: Seed,
        /// Bytes that the Owner keeps of the Client's run-ahead.
        ahead_capacity: u64,
        /// The longest prompt that it takes.
        prompt_tokens: u64,
        /// Session id.
        session: Digest,
    },
    /// Helper to Client and Owner.
    Joined {
        /// Fresh.
        helper_nonce: Nonce,
        /// The Owner's, for the Client.
        owner_nonce: Nonce,
        /// Fingerprint of the Owner's certificate, as the Helper verified it.
        owner: String,
        /// Digest of the Helper's public manifest.
        agreed: Digest,
        /// Session id.
        session: Digest,
    },
    /// The run-ahead lane is in place.
    Attached,
    /// Of an offered half: the first chunk that is not there yet (the number of chunks: all there).
    Have {
        /// Its index.
        next: u64,
    },
    /// The half is complete, verified and on disk.
    Stored,
    /// For a probe.
    Status(Status),
}

/// The Client's last word before the engine starts, to Owner and Helper: it has verified that all agree.
#[derive(Debug, Serialize, Deserialize)]
pub struct Go {
    /// Session id.
    pub session: Digest,
}

/// A daemon's state, for whoever has a valid certificate.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    /// Release of the program.
    pub release: String,
    /// Preparation ids that it has.
    pub preparations: Vec<String>,
    /// Sessions now.
    pub sessions: u64,
    /// And at most.
    pub limit: u64,
    /// Its clock, seconds since 1970.
    pub clock: f64,
    /// Of an Owner: the Helper has its half.
    pub provisioned: bool,
}

/// One step of measuring a link.
#[derive(Debug, Serialize, Deserialize)]
pub struct Echo {
    /// As much is wanted back, at most [`ECHO_LIMIT`].
    pub want: u32,
    /// Filler.
    pub filler: Vec<u8>,
}

/// Bytes of an echo, each way.
pub const ECHO_LIMIT: u32 = 8 << 20;

/// How much an [`Echo`] wants back; `None` if it is none, or wants more than there is.
#[must_use]
pub fn echo_wanted(bytes: &[u8]) -> Option<u32> {
    // Read as a pair, which is the same on the wire: the filler is not copied byte by byte, which would be measured too.
    let ((want, _), rest) = postcard::take_from_bytes::<(u32, &[u8])>(bytes).ok()?;
    (rest.is_empty() && want <= ECHO_LIMIT).then_some(want)
}

/// Why a party says no.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Refusal {
    /// Not for a party of this role.
    Role,
    /// As many sessions as it takes.
    Busy {
        /// Its limit.
        sessions: u64,
    },
    /// No memory for another session within its limit.
    Memory,
    /// Nonce or session id seen before.
    Replay,
    /// It is shutting down.
    Draining,
    /// It does not have the preparation.
    Preparation {
        /// The one asked for.
        wanted: String,
        /// Those that it has.
        known: Vec<String>,
    },
    /// The Helper is still receiving the preparation.
    Preparing {
        /// So far.
        percent: u8,
    },
    /// Public facts differ.
    Manifest {
        /// The refuser's digest.
        ours: Digest,
        /// The other's.
        theirs: Digest,
    },
    /// The hashes of the Helper's half differ. Which they are is not said: knowing them is what makes an Owner the half's.
    Half,
    /// Session ids differ.
    Session,
    /// The third party failed it.
    Third {
        /// Who.
        role: Role,
        /// The error's code.
        code: String,
    },
    /// A chunk does not have the announced hash.
    Corrupt {
        /// Its index.
        chunk: u64,
    },
    /// Its disk or memory let it down; its log says more.
    Local,
    /// Not understood.
    Malformed,
}

/// Text from a peer, cut down to what can be printed.
fn plain(text: &str) -> String {
    text.chars().filter(|c| c.is_ascii_graphic() || *c == ' ').take(64).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

impl Refusal {
    /// What it is to the one who is refused.
    #[must_use]
    pub fn fault(&self) -> PeerFault {
        let text = match self {
            Refusal::Replay => return PeerFault::Replay,
            Refusal::Manifest { ours, theirs } => {
                return PeerFault::Mismatch {
                    what: "the preparation (id, plan, configuration or hash of the public part)",
                    ours: hex(theirs),
                    theirs: hex(ours),
                    remedy: "prepare the model anew, or remove this preparation from the helper's store",
                };
            }
            Refusal::Half => {
                return PeerFault::Mismatch {
                    what: "the hashes of the helper's half",
                    ours: "those in the owner's half.sha256".into(),
                    theirs: "those of the half at the helper".into(),
                    remedy: "another owner has made this preparation and sent that half, or half.sha256 is not the one that belongs to it: prepare the model anew",
                };
            }
            Refusal::Session => {
                return PeerFault::Mismatch {
                    what: "the session",
                    ours: "one of these nonces and certificates".into(),
                    theirs: "another, or none any more".into(),
                    remedy: "start a new one; if it happens again, somebody relays or mixes sessions: check the addresses",
                };
            }
            Refusal::Preparation { wanted, known } => {
                let known: Vec<String> = known.iter().take(8).map(|k| plain(k)).collect();
                return PeerFault::Mismatch {
                    what: "the preparation",
                    ours: plain(wanted),
                    theirs: if known.is_empty() { "none".into() } else { known.join(", ") },
                    remedy: "the owner offers its preparation to the helper when it starts: wait until that is done, or look at both logs",
                };
            }
            Refusal::Role => "this is not for a party of our role: are the addresses in [peers] swapped?".into(),
            Refusal::Busy { sessions } => {
                format!(
                    "it already serves {sessions} sessions, its limit: try again later, or raise [limits] sessions there"
                )
            }
            Refusal::Memory => {
                "no memory left for another session: try again later, or raise [limits] memory_gb there".into()
            }
            Refusal::Draining => "it is shutting down: try again when it is back".into(),
            Refusal::Preparing { percent } => {
                format!("the helper is still receiving the model ({percent} %): try again when that is done")
            }
            // Hearsay: the one it blames, if it can be asked, knows better.
            Refusal::Third { role, code } => {
                return PeerFault::Aborted { blamed: Some(*role), code: plain(code) };
            }
            Refusal::Corrupt { chunk } => format!("chunk {chunk} arrived damaged: start the transfer again"),
            Refusal::Local => "it has a problem of its own: see its log".into(),
            Refusal::Malformed => "it did not understand us: run the same release everywhere".into(),
        };
        PeerFault::Refused(text)
    }
}

/// What all three nonces, the preparation and the three certificates make.
#[derive(Clone, Copy)]
pub struct SessionFacts<'a> {
    /// In the order Owner, Client, Helper.
    pub nonces: [&'a Nonce; 3],
    /// Digest of the public manifest.
    pub agreed: &'a Digest,
    /// Certificates, in the same order.
    pub fingerprints: [&'a str; 3],
}

impl SessionFacts<'_> {
    /// The session id: a hash of all of them, and of the protocol version.
    #[must_use]
    pub fn id(&self) -> Digest {
        let mut h = Sha256::new();
        h.update(b"trefoil session id\0");
        h.update(ALPN.as_bytes());
        for nonce in self.nonces {
            h.update(nonce);
        }
        h.update(self.agreed);
        for fingerprint in self.fingerprints {
            h.update((fingerprint.len() as u64).to_le_bytes());
            h.update(fingerprint.as_bytes());
        }
        h.finalize().into()
    }
}

/// Digest of a public manifest.
#[must_use]
pub fn digest(manifest: &[u8]) -> Digest {
    Sha256::digest(manifest).into()
}

/// A fresh nonce.
///
/// # Errors
/// If the operating system has no entropy to give.
pub fn nonce() -> Result<Nonce> {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes).map_err(|e| Error::Internal(format!("no system entropy: {e}")))?;
    Ok(bytes)
}

/// For the wire.
///
/// # Errors
/// [`Error::Internal`]; plain data always encodes.
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>> {
    postcard::to_stdvec(message).map_err(|e| Error::Internal(format!("encoding a control message: {e}")))
}

/// From the wire; `None` for what is not exactly one message.
#[must_use]
pub fn decode<T: for<'a> Deserialize<'a>>(bytes: &[u8]) -> Option<T> {
    postcard::take_from_bytes(bytes).ok().filter(|(_, rest)| rest.is_empty()).map(|(message, _)| message)
}

/// The longest message other than those that carry a manifest.
pub const SHORT: u32 = 4 << 10;
/// The longest of all: one with a manifest (a plan of a hundred layers, and room) or a list of hashes.
pub const LONG: u32 = 32 << 20;
