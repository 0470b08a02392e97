//! What a party is told: a TOML file. A [`Config`] that exists is one that its role can run with; what the files it names
//! contain is looked at when they are used.

mod read;
mod source;
#[cfg(test)]
mod tests;

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use super::certs::{Fingerprint, Host};
use crate::error::{Error, Result};
use crate::party::Role;

/// More than any configuration takes.
const FILE_LIMIT: u64 = 1_000_000;

/// The configuration of one party.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    file: PathBuf,
    party: Party,
    tls: Tls,
    limits: Limits,
    log: Log,
    metrics: Option<SocketAddr>,
}

/// What only one role is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Party {
    /// The model provider.
    Owner {
        /// Where Clients dial in. Port 0 lets the system choose.
        listen: SocketAddr,
        /// The Helper.
        helper: Address,
        /// What `trefoil prepare` wrote.
        preparation: PathBuf,
        /// State directory.
        store: PathBuf,
    },
    /// The third server.
    Helper {
        /// Where Owner and Clients dial in. Port 0 lets the system choose.
        listen: SocketAddr,
        /// Preparations received, and state.
        store: PathBuf,
    },
    /// The user.
    Client {
        /// The Owner.
        owner: Address,
        /// The Helper.
        helper: Address,
        /// The public part of the model.
        public: PathBuf,
    },
}

/// Who this party is, and whom it trusts. At least one of `ca` and `pinned` is given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tls {
    /// Own certificate, or chain.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// Certificates of authorities.
    pub ca: Option<PathBuf>,
    /// Files with certificates of peers.
    pub pinned: Vec<PathBuf>,
    /// Certificates no longer accepted.
    pub revoked: Vec<Fingerprint>,
}

/// What a party allows its peers, and itself.
#[derive(Clone, Debug, PartialEq)]
pub struct Limits {
    /// Sessions at once.
    pub sessions: usize,
    /// Longest prompt.
    pub prompt_tokens: usize,
    /// All sessions and the model together.
    pub memory_bytes: u64,
    /// Owner: buffer of each peer's run-ahead, per session.
    pub run_ahead_bytes: usize,
    /// Longest wait for a peer within a request.
    pub timeout: Duration,
    /// Longest wait for a peer's handshake.
    pub handshake_timeout: Duration,
    /// Longest wait between the requests of a session.
    pub idle_timeout: Duration,
    /// How long running requests may take to end after a signal.
    pub drain: Duration,
    /// Owner: whether a Client may ask for logits.
    pub open_logits: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            sessions: 8,
            prompt_tokens: 4096,
            memory_bytes: 16_000_000_000,
            run_ahead_bytes: 256_000_000,
            timeout: Duration::from_secs(120),
            handshake_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(600),
            drain: Duration::from_secs(30),
            open_logits: false,
        }
    }
}

/// What goes into the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Log {
    /// How.
    pub format: LogFormat,
    /// How much.
    pub level: tracing::Level,
}

/// How a log is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// Lines for people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Where a peer is dialled. Its host is also the name that its certificate has to carry.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Address {
    /// Host.
    pub host: Host,
    /// Port, not 0.
    pub port: u16,
}

impl FromStr for Address {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = || {
            Error::Config(format!(
                "{text:?} is no address of a peer: expected host:port, such as owner.example:7001, 192.0.2.7:7001 or [2001:db8::7]:7001"
            ))
        };
        let (host, port) = text.rsplit_once(':').ok_or_else(wrong)?;
        let bracketed = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
        let host: Host = bracketed.unwrap_or(host).parse().map_err(|_| wrong())?;
        let v6 = matches!(host, Host::Ip(ip) if ip.is_ipv6());
        match port.parse() {
            Ok(port) if port != 0 && v6 == bracketed.is_some() => Ok(Address { host, port }),
            _ => Err(wrong()),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            Host::Ip(ip) => SocketAddr::new(*ip, self.port).fmt(f),
            Host::Dns(name) => write!(f, "{name}:{}", self.port),
        }
    }
}

impl Config {
    /// Reads a configuration file.
    ///
    /// # Errors
    /// [`Error::Config`] with file, line and column, the field and the remedy; [`Error::Io`].
    pub fn load(file: &Path) -> Result<Self> {
        let io = |e| Error::io(format!("configuration {} (`trefoil init` writes one)", file.display()), e);
        let mut bytes = Vec::new();
        File::open(file).map_err(io)?.take(FILE_LIMIT + 1).read_to_end(&mut bytes).map_err(io)?;
        if bytes.len() as u64 > FILE_LIMIT {
            return Err(Error::Config(format!(
                "{}: larger than {FILE_LIMIT} bytes, which no configuration is: is this the right file?",
                file.display()
            )));
        }
        let text = String::from_utf8(bytes)
            .map_err(|_| Error::Config(format!("{}: not text in UTF-8: is this the right file?", file.display())))?;
        Config::parse(&text, file)
    }

    /// Reads a configuration that is (or would be) in `file`: paths in it are relative to that file's directory.
    ///
    /// # Errors
    /// [`Error::Config`] with file, line and column, the field and the remedy.
    pub fn parse(text: &str, file: &Path) -> Result<Self> {
        read::config(text, file)
    }

    /// The file it was read from.
    #[must_use]
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// The role.
    #[must_use]
    pub fn role(&self) -> Role {
        match self.party {
            Party::Owner { .. } => Role::Owner,
            Party::Helper { .. } => Role::Helper,
            Party::Client { .. } => Role::Client,
        }
    }

    /// What only this role is told.
    #[must_use]
    pub fn party(&self) -> &Party {
        &self.party
    }

    /// Own identity, and trust in others.
    #[must_use]
    pub fn tls(&self) -> &Tls {
        &self.tls
    }

    /// Where it tells its metrics over plain HTTP, if it does.
    #[must_use]
    pub fn metrics(&self) -> Option<SocketAddr> {
        self.metrics
    }

    /// Where it is dialled; a Client is not.
    #[must_use]
    pub fn listen(&self) -> Option<SocketAddr> {
        match self.party {
            Party::Owner { listen, .. } | Party::Helper { listen, .. } => Some(listen),
            Party::Client { .. } => None,
        }
    }

    /// The peers that it dials, in the order it does.
    #[must_use]
    pub fn peers(&self) -> Vec<(Role, &Address)> {
        match &self.party {
            Party::Owner { helper, .. } => vec![(Role::Helper, helper)],
            Party::Helper { .. } => Vec::new(),
            Party::Client { owner, helper, .. } => vec![(Role::Owner, owner), (Role::Helper, helper)],
        }
    }

    /// The state directory; a Client has none.
    #[must_use]
    pub fn store(&self) -> Option<&Path> {
        match &self.party {
            Party::Owner { store, .. } | Party::Helper { store, .. } => Some(store),
            Party::Client { .. } => None,
        }
    }

    /// Limits.
    #[must_use]
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Log.
    #[must_use]
    pub fn log(&self) -> Log {
        self.log
    }
}
