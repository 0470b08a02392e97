//! From TOML to a [`Config`].

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use toml::Spanned;

use super::source::Source;
use super::{Address, Config, Limits, Log, LogFormat, Party, Tls};
use crate::error::{Error, Result};
use crate::party::Role;

type Field<T> = Option<Spanned<T>>;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    role: Field<String>,
    tls: Field<TlsTable>,
    listen: Field<ListenTable>,
    peers: Field<PeersTable>,
    model: Field<ModelTable>,
    #[serde(default)]
    limits: LimitsTable,
    #[serde(default)]
    log: LogTable,
    metrics: Field<MetricsTable>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TlsTable {
    certificate: Field<String>,
    key: Field<String>,
    ca: Field<String>,
    #[serde(default)]
    pinned: Vec<Spanned<String>>,
    #[serde(default)]
    revoked: Vec<Spanned<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ListenTable {
    address: Field<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct MetricsTable {
    listen: Field<String>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct PeersTable {
    owner: Field<String>,
    helper: Field<String>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct ModelTable {
    preparation: Field<String>,
    public: Field<String>,
    store: Field<String>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct LimitsTable {
    sessions: Field<i64>,
    prompt_tokens: Field<i64>,
    memory_gb: Field<f64>,
    run_ahead_mb: Field<f64>,
    timeout_s: Field<f64>,
    handshake_timeout_s: Field<f64>,
    idle_timeout_s: Field<f64>,
    drain_s: Field<f64>,
    open_logits: Option<bool>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct LogTable {
    format: Field<String>,
    level: Field<String>,
}

/// Knows what every field is read for.
struct Reader<'a> {
    source: Source<'a>,
    /// Relative paths start here.
    base: &'a Path,
    role: Role,
    /// Where the role is said: what is missing altogether is missing because of it.
    role_at: usize,
}

pub(super) fn config(text: &str, file: &Path) -> Result<Config> {
    let source = Source { file, text };
    let raw: File = toml::from_str(text).map_err(|e| source.toml_error(&e))?;
    let Some(role) = &raw.role else {
        return Err(source.error(0, "role: missing; say role = \"owner\", \"client\" or \"helper\""));
    };
    let role_at = role.span().start;
    let role = role.get_ref().parse().map_err(|e| source.error(role_at, format!("role: {e}")))?;
    let base = file.parent().unwrap_or(Path::new(""));
    let reader = Reader { source, base, role, role_at };
    Ok(Config {
        file: file.to_owned(),
        tls: reader.tls(raw.tls)?,
        party: reader.party(raw.listen, raw.peers, raw.model)?,
        limits: reader.limits(&raw.limits)?,
        log: reader.log(&raw.log)?,
        metrics: reader.metrics(raw.metrics)?,
    })
}

impl Reader<'_> {
    /// A field that this role needs; `section` is where its section begins, if there is one.
    fn need<T>(&self, field: Field<T>, section: Option<usize>, name: &str, what: &str) -> Result<Spanned<T>> {
        field.ok_or_else(|| {
            let what = format!("{name}: missing; the {} needs {what}", self.role);
            self.source.error(section.unwrap_or(self.role_at), what)
        })
    }

    /// A field that this role has no use for: it would promise something that does not happen.
    fn refuse<T>(&self, field: &Field<T>, name: &str, why: &str) -> Result<()> {
        match field {
            None => Ok(()),
            Some(field) => {
                let what = format!("{name}: the {} {why}; remove it, or is the role wrong?", self.role);
                Err(self.source.error(field.span().start, what))
            }
        }
    }

    fn path(&self, field: &Spanned<String>, name: &str) -> Result<PathBuf> {
        let text = field.get_ref();
        // Not shown: somebody may have pasted the key itself.
        if text.is_empty() || text.chars().any(char::is_control) {
            let what = format!("{name}: expected the path of a file or directory, and not its content");
            return Err(self.source.error(field.span().start, what));
        }
        Ok(self.base.join(text))
    }

    fn wrong<T>(&self, field: &Spanned<T>, name: &str, what: impl fmt::Display) -> Error {
        self.source.error(field.span().start, format!("{name}: {what}"))
    }

    fn tls(&self, table: Field<TlsTable>) -> Result<Tls> {
        let table = self.need(table, None, "[tls]", "a section [tls] with certificate, key and ca")?;
        let at = table.span().start;
        let table = table.into_inner();
        let certificate = self.need(table.certificate, Some(at), "tls.certificate", "its certificate")?;
        let key = self.need(table.key, Some(at), "tls.key", "the key of its certificate")?;
        if table.ca.is_none() && table.pinned.is_empty() {
            let what = "tls.ca: missing; give the authority's certificate as ca, or the peers' certificates as pinned";
            return Err(self.source.error(at, what));
        }
        let revoked =
            table.revoked.iter().map(|one| one.get_ref().parse().map_err(|e| self.wrong(one, "tls.revoked", e)));
        Ok(Tls {
            certificate: self.path(&certificate, "tls.certificate")?,
            key: self.path(&key, "tls.key")?,
            ca: table.ca.map(|ca| self.path(&ca, "tls.ca")).transpose()?,
            pinned: table.pinned.iter().map(|one| self.path(one, "tls.pinned")).collect::<Result<_>>()?,
            revoked: revoked.collect::<Result<_>>()?,
        })
    }

    fn party(&self, listen: Field<ListenTable>, peers: Field<PeersTable>, model: Field<ModelTable>) -> Result<Party> {
        let listen_at = listen.as_ref().map(|s| s.span().start);
        let peers_at = peers.as_ref().map(|s| s.span().start);
        let model_at = model.as_ref().map(|s| s.span().start);
        let peers = peers.map(Spanned::into_inner).unwrap_or_default();
        let model = model.map(Spanned::into_inner).unwrap_or_default();

        const PREPARATION: &str = "preparation = \"DIR\" in [model]: what `trefoil prepare --out DIR` wrote";
        const PUBLIC: &str = "public = \"DIR\" in [model]: the public part of the model, from the Owner";
        const STORE: &str = "store = \"DIR\" in [model]: a directory to keep its state in";
        const OWNER: &str = "owner = \"HOST:7001\" in [peers]: where it dials the owner";
        const HELPER: &str = "helper = \"HOST:7002\" in [peers]: where it dials the helper";
        let path = |field, name, what| self.path(&self.need(field, model_at, name, what)?, name);
        let peer = |field, name, what| {
            let field: Spanned<String> = self.need(field, peers_at, name, what)?;
            field.get_ref().parse::<Address>().map_err(|e| self.wrong(&field, name, e))
        };
        if self.role != Role::Client {
            self.refuse(&model.public, "model.public", "reads no public part apart from its preparation")?;
            self.refuse(&peers.owner, "peers.owner", "does not dial the owner")?;
        }
        if self.role != Role::Owner {
            self.refuse(&model.preparation, "model.preparation", "holds no prepared weights")?;
        }
        match self.role {
            Role::Owner => Ok(Party::Owner {
                listen: self.listen(listen, listen_at)?,
                helper: peer(peers.helper, "peers.helper", HELPER)?,
                preparation: path(model.preparation, "model.preparation", PREPARATION)?,
                store: path(model.store, "model.store", STORE)?,
            }),
            Role::Helper => {
                self.refuse(&peers.helper, "peers.helper", "is dialled by the others and dials nobody")?;
                Ok(Party::Helper {
                    listen: self.listen(listen, listen_at)?,
                    store: path(model.store, "model.store", STORE)?,
                })
            }
            Role::Client => {
                self.refuse(&listen, "[listen]", "dials the others and listens nowhere")?;
                self.refuse(&model.store, "model.store", "keeps no state")?;
                let helper_at = peers.helper.as_ref().map(|s| s.span().start);
                let owner = peer(peers.owner, "peers.owner", OWNER)?;
                let helper = peer(peers.helper, "peers.helper", HELPER)?;
                if owner == helper {
                    let what = format!("peers.helper: the same address as the owner's, {owner}; they are two servers");
                    return Err(self.source.error(helper_at.unwrap_or_default(), what));
                }
                Ok(Party::Client { owner, helper, public: path(model.public, "model.public", PUBLIC)? })
            }
        }
    }

    fn listen(&self, table: Field<ListenTable>, at: Option<usize>) -> Result<SocketAddr> {
        let what = "address = \"0.0.0.0:PORT\" in [listen]: where others dial it";
        let field = table.and_then(|s| s.into_inner().address);
        let field = self.need(field, at, "listen.address", what)?;
        self.socket(&field, "listen.address", 7001)
    }

    fn socket(&self, field: &Spanned<String>, name: &str, port: u16) -> Result<SocketAddr> {
        field.get_ref().parse().map_err(|_| {
            let what = format!(
                "{:?} is no address to listen at: expected IP:PORT, such as 0.0.0.0:{port} (on all interfaces), 127.0.0.1:{port} or [::]:{port}",
                field.get_ref()
            );
            self.wrong(field, name, what)
        })
    }

    fn metrics(&self, table: Field<MetricsTable>) -> Result<Option<SocketAddr>> {
        let Some(table) = table else { return Ok(None) };
        if self.role == Role::Client {
            return self
                .refuse(&Some(table), "[metrics]", "has its metrics at the gateway, `trefoil serve`")
                .map(|()| None);
        }
        let at = table.span().start;
        let what = "listen = \"127.0.0.1:9101\" in [metrics]: where it tells its metrics";
        let field = self.need(table.into_inner().listen, Some(at), "metrics.listen", what)?;
        self.socket(&field, "metrics.listen", 9101).map(Some)
    }

    /// A number from `least` to `most`, or the default.
    fn number<T: Copy + PartialOrd + fmt::Display>(
        &self,
        field: &Field<T>,
        name: &str,
        least: T,
        most: T,
        default: T,
    ) -> Result<T> {
        let Some(field) = field else { return Ok(default) };
        let value = *field.get_ref();
        // Refuses NaN too.
        if value >= least && value <= most {
            return Ok(value);
        }
        let what = format!("{value} does not do: expected {least} to {most} (default {default})");
        Err(self.wrong(field, &format!("limits.{name}"), what))
    }

    fn limits(&self, table: &LimitsTable) -> Result<Limits> {
        const DAY_S: f64 = 86_400.0;
        let usual = Limits::default();
        let seconds = |field, name, least, default: Duration| {
            self.number(field, name, least, DAY_S, default.as_secs_f64()).map(Duration::from_secs_f64)
        };
        let count = |field, name, most, default: usize| {
            self.number(field, name, 1, most, default as i64).map(|count| count as usize)
        };
        let bytes = |field, name, least, most, unit: f64, default: u64| {
            self.number(field, name, least, most, default as f64 / unit).map(|value| (value * unit).round() as u64)
        };
        Ok(Limits {
            sessions: count(&table.sessions, "sessions", 10_000, usual.sessions)?,
            prompt_tokens: count(&table.prompt_tokens, "prompt_tokens", 1_000_000, usual.prompt_tokens)?,
            memory_bytes: bytes(&table.memory_gb, "memory_gb", 0.001, 1e6, 1e9, usual.memory_bytes)?,
            run_ahead_bytes: bytes(&table.run_ahead_mb, "run_ahead_mb", 0.001, 1e6, 1e6, usual.run_ahead_bytes as u64)?
                as usize,
            timeout: seconds(&table.timeout_s, "timeout_s", 0.001, usual.timeout)?,
            handshake_timeout: seconds(
                &table.handshake_timeout_s,
                "handshake_timeout_s",
                0.001,
                usual.handshake_timeout,
            )?,
            idle_timeout: seconds(&table.idle_timeout_s, "idle_timeout_s", 0.001, usual.idle_timeout)?,
            // At once is a choice.
            drain: seconds(&table.drain_s, "drain_s", 0.0, usual.drain)?,
            open_logits: table.open_logits.unwrap_or(usual.open_logits),
        })
    }

    fn log(&self, table: &LogTable) -> Result<Log> {
        let format = match table.format.as_ref().map(|f| (f, f.get_ref().as_str())) {
            None | Some((_, "text")) => LogFormat::Text,
            Some((_, "json")) => LogFormat::Json,
            Some((field, other)) => {
                return Err(self.wrong(field, "log.format", format!("{other:?} is unknown: expected text or json")));
            }
        };
        let level = match &table.level {
            None => tracing::Level::INFO,
            Some(field) => match field.get_ref().as_str() {
                "error" => tracing::Level::ERROR,
                "warn" => tracing::Level::WARN,
                "info" => tracing::Level::INFO,
                "debug" => tracing::Level::DEBUG,
                "trace" => tracing::Level::TRACE,
                other => {
                    let what = format!("{other:?} is unknown: expected error, warn, info, debug or trace");
                    return Err(self.wrong(field, "log.level", what));
                }
            },
        };
        Ok(Log { format, level })
    }
}
