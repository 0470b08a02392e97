//! What a party asks to have certified, and what any certificate of a party contains.

use rcgen::string::Ia5String;
use rcgen::{
    CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, KeyUsagePurpose, SanType, SerialNumber,
};

use super::{Host, Key, Validity, not_made};
use crate::error::{Error, Result};
use crate::party::Role;

/// Usual validity of a party's certificate. Short, because a lost key is then of use for no longer.
pub const CERTIFICATE_DAYS: u32 = 90;
/// X.520's limit.
const NAME_CHARS: usize = 64;
/// More than any party has; bounds what a request can make an authority sign.
const HOSTS: usize = 100;

/// Who asks for a certificate: its role, its name, and the hosts it can be dialled at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    pub(super) role: Role,
    pub(super) name: String,
    hosts: Vec<Host>,
}

impl Request {
    /// For a party of this name (an organisation or a user). Owner and Helper are dialled and need a host; a Client needs none.
    ///
    /// # Errors
    /// [`Error::Config`] if the name is empty, too long or not printable, or a host is missing.
    pub fn new(role: Role, name: &str, hosts: Vec<Host>) -> Result<Self> {
        check_name(name)?;
        if hosts.is_empty() && role != Role::Client {
            return Err(Error::Config(format!(
                "a certificate of the {role} names the hosts that others dial it at: give at least one (--host owner.example or --host 192.0.2.7)"
            )));
        }
        if hosts.len() > HOSTS {
            return Err(Error::Config(format!("{} hosts in one certificate; at most {HOSTS} are taken", hosts.len())));
        }
        Ok(Request { role, name: name.to_owned(), hosts })
    }

    /// The role.
    #[must_use]
    pub fn role(&self) -> Role {
        self.role
    }

    /// The name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The hosts.
    #[must_use]
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// A certificate signing request, in PEM.
    ///
    /// # Errors
    /// [`Error::Config`] if it cannot be made.
    pub fn csr(&self, key: &Key) -> Result<String> {
        let mut params = self.named()?;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        let request = params.serialize_request(key.pair()).and_then(|request| request.pem());
        request.map_err(|e| not_made("the request", &e))
    }

    /// A certificate signed with its own key, in PEM, for peers that pin it.
    ///
    /// # Errors
    /// [`Error::Config`] if it cannot be made.
    pub fn self_signed(&self, key: &Key, validity: Validity) -> Result<String> {
        let certificate = self.certificate(validity)?.self_signed(key.pair());
        Ok(certificate.map_err(|e| not_made("the certificate", &e))?.pem())
    }

    fn named(&self) -> Result<CertificateParams> {
        let text = |text: &str| Ia5String::try_from(text).map_err(|e| not_made("a name", &e));
        let mut params = CertificateParams::default();
        params.distinguished_name = common_name(&self.name);
        params.subject_alt_names.push(SanType::URI(text(&format!("trefoil:{}", self.role))?));
        for host in &self.hosts {
            params.subject_alt_names.push(match host {
                Host::Dns(name) => SanType::DnsName(text(name)?),
                Host::Ip(ip) => SanType::IpAddress(*ip),
            });
        }
        Ok(params)
    }

    /// All that a party's certificate contains: nothing else that a request may ask for gets into it.
    pub(super) fn certificate(&self, validity: Validity) -> Result<CertificateParams> {
        let mut params = self.named()?;
        (params.not_before, params.not_after) = validity.dates()?;
        params.serial_number = Some(serial()?);
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = match self.role {
            Role::Client => vec![ExtendedKeyUsagePurpose::ClientAuth],
            Role::Owner | Role::Helper => {
                vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth]
            }
        };
        params.use_authority_key_identifier_extension = true;
        Ok(params)
    }
}

/// A name that people read and logs carry: one printable line.
pub(super) fn check_name(name: &str) -> Result<()> {
    let chars = name.chars().count();
    if chars == 0 || chars > NAME_CHARS || name.trim() != name || name.chars().any(char::is_control) {
        return Err(Error::Config(format!(
            "{name:?} does not do as a name: expected 1 to {NAME_CHARS} printable characters, such as the organisation's name, without spaces around it"
        )));
    }
    Ok(())
}

pub(super) fn common_name(name: &str) -> DistinguishedName {
    let mut subject = DistinguishedName::new();
    subject.push(DnType::CommonName, name);
    subject
}

/// 127 random bits: positive in DER, and never twice.
pub(super) fn serial() -> Result<SerialNumber> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes)
        .map_err(|e| Error::Config(format!("the operating system gives no randomness for a serial number: {e}")))?;
    // The first octet neither zero (which DER would have to strip) nor negative.
    bytes[0] = bytes[0] & 0x7f | 0x40;
    Ok(SerialNumber::from_slice(&bytes))
}
