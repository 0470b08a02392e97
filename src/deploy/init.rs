//! A first configuration: every field with what it means, and its default.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::{Path, PathBuf};

use super::certs::{CERTIFICATE_DAYS, Details, Fingerprint, Key, Request, Validity, now, write_new, write_private};
use super::config::Config;
use crate::error::{Error, Result};
use crate::party::Role;

/// What a configuration is written with.
#[derive(Clone, Debug)]
pub struct Choice {
    /// Where a server listens, host and port.
    pub listen: Option<String>,
    /// Where the Owner is dialled.
    pub owner: String,
    /// Where the Helper is dialled.
    pub helper: String,
    /// Trust the peers' certificates themselves, instead of an authority that signed them.
    pub pinned: bool,
}

impl Choice {
    /// To be replaced by one's own.
    #[must_use]
    pub fn example() -> Choice {
        Choice { listen: None, owner: "owner.example:7001".into(), helper: "helper.example:7002".into(), pinned: false }
    }

    /// All three on one machine, as in `configs/`.
    #[must_use]
    pub fn trial(role: Role) -> Choice {
        let (owner, helper) = ("127.0.0.1:7001".to_string(), "127.0.0.1:7002".to_string());
        let listen = if role == Role::Helper { helper.clone() } else { owner.clone() };
        Choice { listen: Some(listen), owner, helper, pinned: false }
    }
}

/// Makes a key, readable by its owner only, and a certificate signed with it, for peers to pin: `certs/ROLE.key` and
/// `certs/ROLE.pem` where the configuration `file` expects them. Returns the certificate's path and fingerprint.
///
/// # Errors
/// [`Error::Config`] if they exist or the request is not possible; [`Error::Io`].
pub fn identity(request: &Request, file: &Path) -> Result<(PathBuf, Fingerprint)> {
    let certs = file.parent().unwrap_or(Path::new(".")).join("../certs");
    std::fs::create_dir_all(&certs).map_err(|e| Error::io(certs.display().to_string(), e))?;
    // Without the detour, for people to read.
    let certs = certs.canonicalize().map_err(|e| Error::io(certs.display().to_string(), e))?;
    let at = |extension: &str| certs.join(format!("{}.{extension}", request.role()));
    let key = Key::generate()?;
    let certificate = request.self_signed(&key, Validity::days(CERTIFICATE_DAYS, now()))?;
    write_private(&at("key"), &key.pem())?;
    write_new(&at("pem"), &certificate)?;
    let details = Details::parse_pem(certificate.as_bytes())?;
    let details = details.first().ok_or_else(|| Error::Internal("a certificate that is none".into()))?;
    Ok((at("pem"), details.fingerprint))
}

/// The commented configuration of a role.
#[must_use]
pub fn text(role: Role, choice: &Choice) -> String {
    let Choice { owner, helper, .. } = choice;
    let listen = choice.listen.clone().unwrap_or_else(|| {
        let port = if role == Role::Helper { 7002 } else { 7001 };
        format!("0.0.0.0:{port}")
    });
    let peers: Vec<String> =
        Role::ALL.into_iter().filter(|&r| r != role).map(|r| format!("\"../certs/{r}.pem\"")).collect();
    let trust = if choice.pinned {
        format!(
            "# ca = \"../certs/ca.pem\"\n# ... and peers whose certificates are in these files. With some pinned, ca may be left out.\npinned = [{}]",
            peers.join(", ")
        )
    } else {
        "ca = \"../certs/ca.pem\"\n# ... and peers whose certificates are in these files. With some pinned, ca may be left out.\n# pinned = []".into()
    };
    let head = format!(
        r#"# Configuration of the {role}. Paths are relative to this file. Lines such as `# sessions = 8` show defaults.
# It names files that hold keys and contains none, so it is no secret.

role = "{role}"

[tls]
# Its certificate (`trefoil certs request`, then `certs sign`), possibly followed by the chain to the authority.
certificate = "../certs/{role}.pem"
# The key of the certificate; only its owner may read it (mode 0600), and it never leaves this machine.
key = "../certs/{role}.key"
# Whom it trusts: peers whose certificates one of these authorities signed (one or more certificates in the file) ...
{trust}
# Certificates not accepted any more, by the fingerprint that `trefoil certs show` prints: ["sha256:..."].
# revoked = []
"#
    );
    let network = match role {
        Role::Owner => format!(
            r#"
[listen]
# IP address and port that clients dial; 0.0.0.0 is every interface.
address = "{listen}"

[peers]
# The helper's host and port. The host has to be in the helper's certificate.
helper = "{helper}"

[model]
# What `trefoil prepare --out DIR` wrote.
preparation = "../prep"
# State of this party: the ids of sessions it has seen. No two parties may share it.
store = "../store/owner"
"#
        ),
        Role::Helper => format!(
            r#"
[listen]
# IP address and port that the owner and clients dial; 0.0.0.0 is every interface.
address = "{listen}"

[model]
# The preparations it receives from the owner, and its state: the ids of sessions it has seen. No two parties may share it.
store = "../store/helper"
"#
        ),
        Role::Client => format!(
            r#"
[peers]
# Host and port of the two servers. The host has to be in the server's certificate.
owner = "{owner}"
helper = "{helper}"

[model]
# The public part of the model, as the owner hands it out: config.json, tokenizer.json and the public layers.
public = "../prep/public"
"#
        ),
    };
    let servers = r"
[limits]
# Sessions at once.
# sessions = 8
# Longest prompt, in tokens.
# prompt_tokens = 4096
# Memory for the model and all sessions together, in GB.
# memory_gb = 16.0
";
    let limits = match role {
        Role::Owner => format!(
            "{servers}{}",
            r"# What a peer may send ahead of its use, per session and peer, in MB.
# run_ahead_mb = 256
# Whether clients may ask for logits, which tell more about the model than the tokens do.
# open_logits = false
"
        ),
        Role::Helper => servers.to_owned(),
        Role::Client => r"
[limits]
# Longest prompt, in tokens.
# prompt_tokens = 4096
# Memory for the model and the session, in GB.
# memory_gb = 16.0
"
        .to_owned(),
    };
    let waits = r"# Longest wait for a peer within a request, in seconds.
# timeout_s = 120
# Longest wait for a connection's TLS handshake and greeting, in seconds.
# handshake_timeout_s = 10
";
    let daemon = match role {
        Role::Client => {
            r"# How long the gateway's running requests may take to end after SIGTERM or Ctrl-C, in seconds; 0 ends them at once.
# drain_s = 30
"
        }
        Role::Owner | Role::Helper => {
            r"# How long a session may be idle between two requests, in seconds.
# idle_timeout_s = 600
# How long running requests may take to end after SIGTERM or Ctrl-C, in seconds; 0 ends them at once.
# drain_s = 30
"
        }
    };
    let log = r#"
[log]
# "text" for people, "json" for one object a line.
# format = "text"
# "error", "warn", "info", "debug" or "trace".
# level = "info"
"#;
    let metrics = match role {
        Role::Client => "",
        Role::Owner | Role::Helper => {
            r#"
# Where to tell metrics (/metrics, for Prometheus), liveness (/health) and readiness (/ready), over plain HTTP without keys: for this
# machine, or a network on which only those who watch over it are.
# [metrics]
#   listen = "127.0.0.1:9101"
"#
        }
    };
    format!("{head}{network}{limits}{waits}{daemon}{log}{metrics}")
}

/// Whether a configuration may be written to `file`.
///
/// # Errors
/// [`Error::Config`] if it exists and is not to be replaced by `force`.
pub fn free(file: &Path, force: bool) -> Result<()> {
    if force || file.symlink_metadata().is_err() {
        return Ok(());
    }
    Err(Error::Config(format!(
        "{} already exists: edit it, give another --out, or replace it with --force",
        file.display()
    )))
}

/// Writes a first configuration to `file`, for its owner to edit. An existing file is replaced only by `force`.
///
/// # Errors
/// [`Error::Config`] if the file exists; [`Error::Io`].
pub fn write(role: Role, choice: &Choice, file: &Path, force: bool) -> Result<()> {
    let text = text(role, choice);
    // Addresses come from the command line: what is written must load.
    Config::parse(&text, file)?;
    free(file, force)?;
    let io = |e| Error::io(file.display().to_string(), e);
    if let Some(directory) = file.parent() {
        std::fs::create_dir_all(directory).map_err(|e| Error::io(directory.display().to_string(), e))?;
    }
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).create_new(!force);
    options.open(file).and_then(|mut out| out.write_all(text.as_bytes())).map_err(io)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::deploy::config::{Limits, LogFormat};

    #[test]
    fn what_it_writes_is_a_configuration_with_the_defaults() {
        let dir = tempfile::tempdir().unwrap();
        for role in Role::ALL {
            let file = dir.path().join("new").join(format!("{role}.toml"));
            write(role, &Choice::example(), &file, false).unwrap();
            let config = Config::load(&file).unwrap();
            assert_eq!((config.role(), config.limits()), (role, &Limits::default()));
            assert_eq!((config.log().format, config.log().level), (LogFormat::Text, tracing::Level::INFO));

            std::fs::write(&file, "mine").unwrap();
            let refusal = write(role, &Choice::example(), &file, false).unwrap_err().to_string();
            assert!(refusal.contains("already exists"), "{refusal}");
            assert_eq!(std::fs::read_to_string(&file).unwrap(), "mine");
            write(role, &Choice::example(), &file, true).unwrap();
            assert!(Config::load(&file).is_ok());
        }
    }

    /// The defaults that are shown are those that hold.
    #[test]
    fn the_defaults_shown_are_the_defaults() {
        for role in Role::ALL {
            let plain = text(role, &Choice::example());
            let shown: Vec<String> = plain
                .lines()
                .map(|line| match line.strip_prefix("# ") {
                    Some(rest)
                        if rest.split(" = ").next().is_some_and(|n| !n.contains(' ')) && rest.contains(" = ") =>
                    {
                        rest.to_owned()
                    }
                    _ => line.to_owned(),
                })
                .collect();
            let shown = shown.join("\n");
            assert!(plain.matches("\n# ").count() > shown.matches("\n# ").count());
            let file = Path::new("configs/x.toml");
            assert_eq!(Config::parse(&plain, file).unwrap(), Config::parse(&shown, file).unwrap());
        }
    }

    #[test]
    fn the_repository_has_those_of_a_trial() {
        for role in Role::ALL {
            let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("configs/{role}.toml"));
            let found = std::fs::read_to_string(&file).unwrap_or_default();
            assert_eq!(found, text(role, &Choice::trial(role)), "{} differs from what init.rs writes", file.display());
            assert_eq!(Config::load(&file).unwrap().role(), role);
        }
    }
}
