//! Errors, by who or what is to blame. No variant ever carries a share, a mask, a weight or a prompt.

use crate::party::Role;

/// What this crate's fallible functions return.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong, by who is to blame.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A peer did not keep to the protocol, or is gone.
    #[error("{role} at step `{step}`: {kind}")]
    Peer {
        /// Who is to blame.
        role: Role,
        /// The protocol step that waited for it.
        step: String,
        /// What it did.
        kind: PeerFault,
    },
    /// Somebody who has not proven who they are did something wrong, or a peer before its role is known.
    #[error("{address} at step `{step}`: {kind}")]
    Incoming {
        /// Where the connection comes from.
        address: String,
        /// What was being waited for.
        step: &'static str,
        /// What it did.
        kind: PeerFault,
    },
    /// The command line or a configuration is wrong.
    #[error("{0}")]
    Config(String),
    /// The checkpoint, its configuration or its tokenizer is wrong; the text names the file, what is wrong and the remedy.
    #[error("{0}")]
    Model(String),
    /// Operands that cannot go together.
    #[error("{op}: {lhs} does not go with {rhs}")]
    Shape {
        /// The operation.
        op: &'static str,
        /// Left operand: shape, ring and fraction bits.
        lhs: String,
        /// Right operand or what was expected.
        rhs: String,
    },
    /// A value may have left the range that the plan can represent: the result would be silently wrong, so it is not given out.
    #[error(
        "layer {layer}: {quantity} left the range of the plan; no token is given out. Prepare the model with text like this prompt for calibration (--calibration-text), or with a wider plan"
    )]
    Range {
        /// Which layer (or "head").
        layer: String,
        /// Which quantity.
        quantity: String,
    },
    /// A PRF address was asked for a second time; masks are used once.
    #[error("PRF address `{0}` was already taken: a mask may be used only once")]
    Reuse(String),
    /// An operating-system error on a named file or resource.
    #[error("{what}: {source}")]
    Io {
        /// The file or resource.
        what: String,
        /// The cause.
        source: std::io::Error,
    },
    /// A local thread of this process failed; a defect in Trefoil itself.
    #[error("internal: {0}; please report this")]
    Internal(String),
}

/// What a peer did wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PeerFault {
    /// The link ended.
    #[error("the link is closed: it has stopped, or the network between has; look at its log and start a new session")]
    Closed,
    /// Nothing came in time.
    #[error(
        "nothing came within {0} ms: it has stopped, is overloaded, or waits for another party in turn; look at its log, or raise [limits] timeout_s at all three parties"
    )]
    Timeout(u64),
    /// A message of the wrong length.
    #[error(
        "sent {got} bytes where exactly {want} were expected: run the same release of trefoil at all three parties"
    )]
    Length {
        /// What the step expects.
        want: usize,
        /// What came.
        got: usize,
    },
    /// Bits set where the packing has none, or a value beyond its type.
    #[error("sent a malformed value ({0}): run the same release of trefoil at all three parties")]
    Malformed(&'static str),
    /// It ended the session and said why.
    #[error("ended the session: {}{code}; its log says more", blamed.map_or(String::new(), |r| format!("it blames the {r}: ")))]
    Aborted {
        /// Whom it blames, if not itself.
        blamed: Option<Role>,
        /// The code of its error.
        code: String,
    },
    /// More messages ahead of their time than the agreed buffer holds.
    #[error("sent more run-ahead data than the agreed {0} bytes: run the same release of trefoil at all three parties")]
    Flood(usize),
    /// A frame that announces more than any step needs.
    #[error(
        "announced a message of {got} bytes; no step here takes more than {limit}: run the same release of trefoil at all three parties"
    )]
    Oversize {
        /// The most that is taken.
        limit: usize,
        /// What was announced.
        got: usize,
    },
    /// No connection.
    #[error(
        "cannot be reached at {address} ({cause}): is it running, is its port open, is the address in the configuration right?"
    )]
    Unreachable {
        /// The configured address.
        address: String,
        /// The system's words.
        cause: String,
    },
    /// What came is not TLS.
    #[error("does not speak TLS: something else listens or dials there (a proxy, a port scan, a plain TCP client?)")]
    NotTls,
    /// TLS, but nothing newer than 1.2.
    #[error("offers TLS 1.2 or older; Trefoil takes TLS 1.3 only: update the peer")]
    OldTls,
    /// The TLS handshake failed otherwise.
    #[error("TLS handshake failed: {0}; is it a trefoil party, and no proxy in between?")]
    Handshake(String),
    /// Its certificate is not good.
    #[error("{0}")]
    Certificate(CertificateFault),
    /// It does not take our certificate.
    #[error(
        "refused our certificate ({0}): check [tls] here and the peer's ca, pinned and revoked lists, and both clocks"
    )]
    RefusesUs(String),
    /// Another protocol version.
    #[error("speaks protocol version {theirs}, this is {ours}: run the same release of trefoil at all three parties")]
    Version {
        /// Ours.
        ours: String,
        /// Theirs.
        theirs: String,
    },
    /// Something that both have to agree on differs.
    #[error("{what} differs: {ours} here, {theirs} there; {remedy}")]
    Mismatch {
        /// What.
        what: &'static str,
        /// Ours.
        ours: String,
        /// Theirs.
        theirs: String,
        /// What to do.
        remedy: &'static str,
    },
    /// A session nonce or id that was used before.
    #[error(
        "used a session id or nonce a second time: a replay, or a machine restored from a snapshot; start a new session"
    )]
    Replay,
    /// It said no.
    #[error("refused: {0}")]
    Refused(String),
}

/// What is wrong with a peer's certificate.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CertificateFault {
    /// None was sent.
    #[error("presented no certificate: both sides of a link authenticate; set [tls] certificate and key there")]
    Missing,
    /// Neither pinned nor issued by an accepted CA.
    #[error(
        "its certificate ({fingerprint}) is neither pinned nor signed by our CA: check [tls] ca and pinned here, and who signed the peer's"
    )]
    UnknownIssuer {
        /// SHA-256 of the certificate.
        fingerprint: String,
    },
    /// Past its validity.
    #[error(
        "its certificate expired on {0}: the peer has to renew it (trefoil certs request, certs sign); if that is not so, check the clocks"
    )]
    Expired(String),
    /// Before its validity.
    #[error("its certificate is valid from {0} only: check the clocks of both machines")]
    NotYetValid(String),
    /// On our list of revoked ones.
    #[error(
        "its certificate ({0}) is on our list of revoked certificates: it needs a new one, unless [tls] revoked is wrong"
    )]
    Revoked(String),
    /// The certificate of another role.
    #[error(
        "its certificate is the {got}'s where the {want}'s belongs: are the addresses or certificate files swapped?"
    )]
    Role {
        /// The role that belongs there.
        want: Role,
        /// The role in the certificate.
        got: Role,
    },
    /// No role in it.
    #[error("its certificate carries no Trefoil role: make one with `trefoil certs request`")]
    NoRole,
    /// A name that is not in the certificate.
    #[error(
        "its certificate is not for {0}: dial a name or address in it (trefoil certs show), or have it signed for this one"
    )]
    Name(String),
    /// Damaged, or not signed with its own key.
    #[error("its certificate or signature is invalid ({0}): have it made by `trefoil certs`")]
    Invalid(String),
}

impl PeerFault {
    /// A short stable name of the fault, for structured logs and scripts.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            PeerFault::Closed => "closed",
            PeerFault::Timeout(_) => "timeout",
            PeerFault::Length { .. } => "length",
            PeerFault::Malformed(_) => "malformed",
            PeerFault::Aborted { .. } => "aborted",
            PeerFault::Flood(_) => "flood",
            PeerFault::Oversize { .. } => "oversize",
            PeerFault::Unreachable { .. } => "unreachable",
            PeerFault::NotTls => "not-tls",
            PeerFault::OldTls => "old-tls",
            PeerFault::Handshake(_) => "handshake",
            PeerFault::Certificate(fault) => match fault {
                CertificateFault::Missing => "no-certificate",
                CertificateFault::UnknownIssuer { .. } => "unknown-issuer",
                CertificateFault::Expired(_) => "expired",
                CertificateFault::NotYetValid(_) => "not-yet-valid",
                CertificateFault::Revoked(_) => "revoked",
                CertificateFault::Role { .. } => "wrong-role",
                CertificateFault::NoRole => "no-role",
                CertificateFault::Name(_) => "wrong-name",
                CertificateFault::Invalid(_) => "invalid-certificate",
            },
            PeerFault::RefusesUs(_) => "refuses-us",
            PeerFault::Version { .. } => "version",
            PeerFault::Mismatch { .. } => "mismatch",
            PeerFault::Replay => "replay",
            PeerFault::Refused(_) => "refused",
        }
    }
}

impl Error {
    /// A short stable name of the error, for structured logs and scripts.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Error::Peer { kind, .. } | Error::Incoming { kind, .. } => kind.code(),
            Error::Config(_) => "config",
            Error::Model(_) => "model",
            Error::Shape { .. } => "shape",
            Error::Range { .. } => "range",
            Error::Reuse(_) => "reuse",
            Error::Io { .. } => "io",
            Error::Internal(_) => "internal",
        }
    }

    /// An I/O error on a named thing.
    pub fn io(what: impl Into<String>, source: std::io::Error) -> Self {
        Error::Io { what: what.into(), source }
    }
}
