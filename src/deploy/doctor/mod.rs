//! `trefoil doctor`: everything that can keep a party from serving, found before it does, each finding with its remedy.
//!
//! All checks that can still run do run: a missing file says nothing about the network, and one peer nothing about the
//! other. Nothing is changed, on this machine or elsewhere, and nothing secret is shown.

mod identity;
mod links;
pub(crate) mod machine;
mod models;
mod predicted;

use std::path::Path;

use serde::Serialize;

use super::config::Config;
use crate::error::{Error, PeerFault};
use crate::party::Role;

pub use links::LinkFigures;
pub use predicted::Predicted;

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// As it should be.
    Ok,
    /// Works, but not well, or not for long.
    Warn,
    /// Does not work.
    Fail,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What: a stable name, such as `certificate` or `clock of the helper`.
    pub check: String,
    /// How it is.
    pub status: Status,
    /// What was found.
    pub found: String,
    /// What to do. Always there if the status is not ok.
    pub remedy: Option<String>,
}

impl Finding {
    fn ok(check: impl Into<String>, found: impl Into<String>) -> Finding {
        Finding { check: check.into(), status: Status::Ok, found: found.into(), remedy: None }
    }

    fn warn(check: impl Into<String>, found: impl Into<String>, remedy: impl Into<String>) -> Finding {
        Finding { check: check.into(), status: Status::Warn, found: found.into(), remedy: Some(remedy.into()) }
    }

    fn fail(check: impl Into<String>, found: impl Into<String>, remedy: impl Into<String>) -> Finding {
        Finding { check: check.into(), status: Status::Fail, found: found.into(), remedy: Some(remedy.into()) }
    }
}

/// What the doctor says of a party.
#[derive(Clone, Debug, Serialize)]
pub struct Diagnosis {
    /// The configuration file.
    pub config: String,
    /// The role in it, if it can be read.
    pub role: Option<String>,
    /// In the order in which to deal with them.
    pub findings: Vec<Finding>,
    /// Links to the peers that this party dials, as measured.
    pub links: Vec<LinkFigures>,
    /// What a token will take, if model and links are known.
    pub prediction: Option<Predicted>,
}

impl Diagnosis {
    /// The worst finding.
    #[must_use]
    pub fn status(&self) -> Status {
        self.findings.iter().map(|f| f.status).max().unwrap_or(Status::Ok)
    }
}

/// Examines the party that the file `path` configures.
///
/// # Errors
/// [`Error::Io`] if not even a thread can be had. Whatever else is wrong is a finding.
pub fn examine(path: &Path) -> Result<Diagnosis, Error> {
    let mut out = Diagnosis {
        config: path.display().to_string(),
        role: None,
        findings: Vec::new(),
        links: Vec::new(),
        prediction: None,
    };
    let config = match Config::load(path) {
        Ok(config) => config,
        Err(error) => {
            let remedy = "correct it there; `trefoil init` writes a commented one to compare with";
            out.findings.push(Finding::fail("configuration", error.to_string(), remedy));
            out.findings.extend(machine::processor());
            return Ok(out);
        }
    };
    let role = config.role();
    out.role = Some(role.to_string());
    out.findings.push(Finding::ok("configuration", format!("{} of the {role}", path.display())));
    out.findings.extend(identity::check(&config));
    // What reads disks, and what waits for peers, at the same time.
    let (model, met) = std::thread::scope(|s| {
        let disk = s.spawn(|| models::examine(&config));
        let met = links::meet(&config);
        let model = disk.join().map_err(|_| Error::Internal("a thread of the doctor panicked".into()));
        (model, met)
    });
    let (model, met) = (model?, met?);
    out.findings.extend(machine::files(&config));
    out.findings.extend(machine::processor());
    out.findings.extend(machine::memory(&config, &model, met.own.as_ref()));
    out.findings.extend(machine::disk(&config, &model));
    let compared = models::compare(&config, &model, &met);
    out.findings.extend(model.findings);
    out.findings.extend(met.findings);
    out.findings.extend(compared);
    out.links = met.links;
    match predicted::predict(&config, model.manifest.as_ref(), &out.links) {
        Ok(prediction) => out.prediction = prediction,
        Err(error) => {
            let remedy = "`trefoil cost` on the model says more";
            out.findings.push(Finding::warn("prediction", error.to_string(), remedy));
        }
    }
    Ok(out)
}

/// What to do about a local error; the error itself names the file.
fn remedy(error: &Error) -> &'static str {
    match error {
        Error::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
            "correct the path in the configuration, or put the file there"
        }
        Error::Io { source, .. } if source.kind() == std::io::ErrorKind::PermissionDenied => {
            "run the doctor, and the party, as the user whom the file belongs to"
        }
        Error::Internal(_) => "please report this",
        _ => "do as the message says, and run the doctor again",
    }
}

/// What to do about a peer's fault, seen from here.
fn remedy_of(kind: &PeerFault, peer: Role) -> String {
    use crate::error::CertificateFault as C;
    match kind {
        PeerFault::Unreachable { .. } => format!(
            "start the {peer} there (trefoil party), open its port in the firewalls between, and compare [peers] {peer} here with [listen] there"
        ),
        PeerFault::NotTls | PeerFault::OldTls => {
            format!(
                "see what listens there: [peers] {peer} has to name the {peer}'s own port, without a proxy that ends TLS"
            )
        }
        PeerFault::RefusesUs(_) => format!(
            "have the {peer}'s operator compare our certificate (trefoil certs show) with ca, pinned and revoked there, and compare both clocks"
        ),
        PeerFault::Version { .. } => "install the same release of trefoil at all three parties".into(),
        PeerFault::Certificate(C::UnknownIssuer { .. }) => format!(
            "put the certificate of the authority that signed the {peer}'s into [tls] ca here (or pin the {peer}'s own), or have it signed by ours"
        ),
        PeerFault::Certificate(C::Expired(_)) => {
            format!(
                "the {peer} renews its certificate (trefoil certs request, certs sign); if it has not expired, set this clock right"
            )
        }
        PeerFault::Certificate(C::NotYetValid(_)) => "set both clocks right (NTP)".into(),
        PeerFault::Certificate(C::Revoked(_)) => {
            format!(
                "the {peer} needs a new certificate; if the revocation is a mistake, take it out of [tls] revoked here"
            )
        }
        PeerFault::Certificate(C::Role { got, .. }) => format!(
            "have [peers] {peer} name the {peer}'s address (a {got} answers there), or the {peer} use its own certificate"
        ),
        PeerFault::Certificate(C::Name(_)) => format!(
            "dial the {peer} by a name in its certificate (trefoil certs show), or have one with this name signed"
        ),
        PeerFault::Closed | PeerFault::Timeout(_) => {
            format!("look at the {peer}'s log, and for a firewall or proxy in between")
        }
        _ => format!("do as the message says; the {peer}'s log has its side of it"),
    }
}
