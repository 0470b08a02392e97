//! A first configuration: every field with what it means, and its default.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;

use crate::error::{Error, Result};
use crate::party::Role;

/// The addresses that a configuration is written with.
#[derive(Clone, Copy, Debug)]
pub struct Addresses {
    /// Interface that a server listens at.
    pub listen: &'static str,
    /// Host of the Owner.
    pub owner: &'static str,
    /// Host of the Helper.
    pub helper: &'static str,
}

impl Addresses {
    /// To be replaced by one's own.
    pub const EXAMPLE: Addresses = Addresses { listen: "0.0.0.0", owner: "owner.example", helper: "helper.example" };
    /// All three on one machine, as in `configs/`.
    pub const TRIAL: Addresses = Addresses { listen: "127.0.0.1", owner: "127.0.0.1", helper: "127.0.0.1" };
}

/// The commented configuration of a role.
#[must_use]
pub fn text(role: Role, addresses: Addresses) -> String {
    let Addresses { listen, owner, helper } = addresses;
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
ca = "../certs/ca.pem"
# ... and peers whose certificates are in these files. With some pinned, ca may be left out.
# pinned = []
# Certificates not accepted any more, by the fingerprint that `trefoil certs show` prints: ["sha256:..."].
# revoked = []
"#
    );
    let network = match role {
        Role::Owner => format!(
            r#"
[listen]
# IP address and port that clients dial; 0.0.0.0 is every interface.
address = "{listen}:7001"

[peers]
# The helper's host and port. The host has to be in the helper's certificate.
helper = "{helper}:7002"

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
address = "{listen}:7002"

[model]
# The preparations it receives from the owner, and its state: the ids of sessions it has seen. No two parties may share it.
store = "../store/helper"
"#
        ),
        Role::Client => format!(
            r#"
[peers]
# Host and port of the two servers. The host has to be in the server's certificate.
owner = "{owner}:7001"
helper = "{helper}:7002"

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
        Role::Client => "",
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
    format!("{head}{network}{limits}{waits}{daemon}{log}")
}

/// Writes a first configuration to `file`, for its owner to edit. An existing file is replaced only by `force`.
///
/// # Errors
/// [`Error::Config`] if the file exists; [`Error::Io`].
pub fn write(role: Role, file: &Path, force: bool) -> Result<()> {
    let io = |e| Error::io(file.display().to_string(), e);
    if let Some(directory) = file.parent() {
        std::fs::create_dir_all(directory).map_err(|e| Error::io(directory.display().to_string(), e))?;
    }
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).create_new(!force);
    let mut out = match options.open(file) {
        Ok(out) => out,
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {
            return Err(Error::Config(format!(
                "{} already exists: edit it, give another --out, or replace it with --force",
                file.display()
            )));
        }
        Err(e) => return Err(io(e)),
    };
    out.write_all(text(role, Addresses::EXAMPLE).as_bytes()).map_err(io)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::deploy::config::{Config, Limits, LogFormat};

    #[test]
    fn what_it_writes_is_a_configuration_with_the_defaults() {
        let dir = tempfile::tempdir().unwrap();
        for role in Role::ALL {
            let file = dir.path().join("new").join(format!("{role}.toml"));
            write(role, &file, false).unwrap();
            let config = Config::load(&file).unwrap();
            assert_eq!((config.role(), config.limits()), (role, &Limits::default()));
            assert_eq!((config.log().format, config.log().level), (LogFormat::Text, tracing::Level::INFO));

            std::fs::write(&file, "mine").unwrap();
            let refusal = write(role, &file, false).unwrap_err().to_string();
            assert!(refusal.contains("already exists"), "{refusal}");
            assert_eq!(std::fs::read_to_string(&file).unwrap(), "mine");
            write(role, &file, true).unwrap();
            assert!(Config::load(&file).is_ok());
        }
    }

    /// The defaults that are shown are those that hold.
    #[test]
    fn the_defaults_shown_are_the_defaults() {
        for role in Role::ALL {
            let plain = text(role, Addresses::EXAMPLE);
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
            assert_eq!(found, text(role, Addresses::TRIAL), "{} differs from what init.rs writes", file.display());
            assert_eq!(Config::load(&file).unwrap().role(), role);
        }
    }
}
