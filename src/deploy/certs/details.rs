//! What a certificate says.

use std::net::IpAddr;
use std::path::Path;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer;
use x509_parser::x509::X509Name;

use super::{DAY_S, Fingerprint, Key, read_text};
use crate::error::{Error, Result};
use crate::party::Role;

/// What a certificate says. Whether that is true is for its signature to show, which is not looked at here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Details {
    /// Common name of the subject: the organisation or user. Empty if it has none.
    pub name: String,
    /// The role, if it carries one.
    pub role: Option<Role>,
    /// DNS names.
    pub dns: Vec<String>,
    /// IP addresses.
    pub ips: Vec<IpAddr>,
    /// First second of its validity, in Unix time.
    pub not_before: i64,
    /// Last second of its validity, in Unix time.
    pub not_after: i64,
    /// SHA-256 of it all.
    pub fingerprint: Fingerprint,
    /// Common name of the issuer, or the whole distinguished name if that has none.
    pub issuer: String,
    /// Whether the issuer has the same distinguished name as the subject.
    pub self_issued: bool,
    /// Whether it may sign other certificates.
    pub is_ca: bool,
    public_key: Vec<u8>,
}

/// Names go to terminals and into logs: no line breaks, no escape sequences, no end of it.
fn printable(name: String) -> String {
    name.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).take(256).collect()
}

impl Details {
    /// Reads DER.
    ///
    /// # Errors
    /// [`Error::Config`] if it is no certificate, or carries two roles or an unknown one.
    pub fn parse_der(der: &[u8]) -> Result<Self> {
        let wrong = |what: &str| Error::Config(format!("not a usable X.509 certificate: {what}"));
        let (rest, certificate) = X509Certificate::from_der(der).map_err(|_| wrong("it cannot be parsed"))?;
        if !rest.is_empty() {
            return Err(wrong("bytes follow it"));
        }
        let mut details = Details {
            name: printable(common_name(certificate.subject()).unwrap_or_default()),
            role: None,
            dns: Vec::new(),
            ips: Vec::new(),
            not_before: certificate.validity().not_before.timestamp(),
            not_after: certificate.validity().not_after.timestamp(),
            fingerprint: Fingerprint::of(der),
            issuer: printable(common_name(certificate.issuer()).unwrap_or_else(|| certificate.issuer().to_string())),
            self_issued: certificate.issuer().as_raw() == certificate.subject().as_raw(),
            is_ca: certificate.is_ca(),
            public_key: certificate.public_key().raw.to_vec(),
        };
        let names =
            certificate.subject_alternative_name().map_err(|_| wrong("its alternative names cannot be parsed"))?;
        for name in names.iter().flat_map(|extension| &extension.value.general_names) {
            match name {
                GeneralName::DNSName(dns) => details.dns.push((*dns).to_owned()),
                GeneralName::IPAddress(octets) => {
                    let ip = <[u8; 4]>::try_from(*octets)
                        .map(IpAddr::from)
                        .or_else(|_| <[u8; 16]>::try_from(*octets).map(IpAddr::from));
                    details.ips.push(ip.map_err(|_| wrong("an IP address in it is of no known length"))?);
                }
                GeneralName::URI(uri) => add_role(&mut details.role, uri)?,
                _ => {}
            }
        }
        Ok(details)
    }

    /// Reads the certificates of a PEM text, in their order; at least one.
    ///
    /// # Errors
    /// [`Error::Config`] if there is none, or one is wrong.
    pub fn parse_pem(pem: &[u8]) -> Result<Vec<Self>> {
        let wrong = |what: &str| Error::Config(format!("no PEM certificate: {what}"));
        let mut all = Vec::new();
        for der in CertificateDer::pem_slice_iter(pem) {
            all.push(Details::parse_der(&der.map_err(|_| wrong("the PEM is damaged"))?)?);
        }
        if all.is_empty() {
            let private = pem.windows(12).any(|w| w == b"PRIVATE KEY-");
            return Err(wrong(if private { "this is a private key" } else { "there is no CERTIFICATE in it" }));
        }
        Ok(all)
    }

    /// Reads the certificates of a file.
    ///
    /// # Errors
    /// [`Error::Config`], which names the file; [`Error::Io`].
    pub fn load(path: &Path) -> Result<Vec<Self>> {
        Details::parse_pem(read_text(path)?.as_bytes()).map_err(|e| Error::Config(format!("{}: {e}", path.display())))
    }

    /// Whether this is the key that it was made for.
    #[must_use]
    pub fn belongs_to(&self, key: &Key) -> bool {
        self.public_key == key.public()
    }

    /// Whole days until it expires at `now` (Unix time); negative once it has.
    #[must_use]
    pub fn days_left(&self, now: i64) -> i64 {
        self.not_after.saturating_sub(now).div_euclid(DAY_S)
    }
}

/// Takes the role from a URI that names one; other URIs say nothing to Trefoil.
pub(super) fn add_role(role: &mut Option<Role>, uri: &str) -> Result<()> {
    let Some(text) = uri.strip_prefix("trefoil:") else { return Ok(()) };
    let one = text.parse()?;
    match role.replace(one) {
        None => Ok(()),
        Some(other) => Err(Error::Config(format!("it carries two roles, {other} and {one}; a party has one"))),
    }
}

fn common_name(name: &X509Name<'_>) -> Option<String> {
    name.iter_common_name().next()?.as_str().ok().map(str::to_owned)
}
