//! Who signs certificates.

use std::path::Path;

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType, DnValue, IsCa, Issuer,
    KeyUsagePurpose, SanType, SubjectPublicKeyInfo,
};
use rustls::pki_types::CertificateSigningRequestDer;
use rustls::pki_types::pem::PemObject;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::prelude::FromDer;
use zeroize::Zeroizing;

use super::details::add_role;
use super::request::{check_name, common_name, serial};
use super::{Details, Host, Key, Request, Validity, date, not_made, read_text};
use crate::error::{Error, Result};
use crate::party::Role;

/// Validity of an authority.
pub const AUTHORITY_DAYS: u32 = 730;

/// A key that signs certificates, and the certificate by which peers know it.
#[derive(Debug)]
pub struct Authority {
    certificate: String,
    details: Details,
    key: Key,
}

/// What an authority gave out.
#[derive(Clone, Debug)]
pub struct Signed {
    /// The certificate, in PEM.
    pub pem: String,
    /// What it says.
    pub request: Request,
}

impl Authority {
    /// A new one with a fresh key.
    ///
    /// # Errors
    /// [`Error::Config`] for an unusable name or validity.
    pub fn new(name: &str, validity: Validity) -> Result<Self> {
        check_name(name)?;
        let key = Key::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name = common_name(name);
        (params.not_before, params.not_after) = validity.dates()?;
        params.serial_number = Some(serial()?);
        // It signs parties, no further authorities.
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = params.self_signed(key.pair()).map_err(|e| not_made("the authority", &e))?;
        Authority::from_parts(certificate.pem(), key)
    }

    /// Reads one.
    ///
    /// # Errors
    /// [`Error::Config`] if the files are not a certificate and a key, do not belong together, or are no authority's;
    /// [`Error::Io`].
    pub fn load(certificate: &Path, key: &Path) -> Result<Self> {
        let text = read_text(certificate)?;
        Authority::from_parts(text.to_string(), Key::load(key)?)
            .map_err(|e| Error::Config(format!("authority {} with key {}: {e}", certificate.display(), key.display())))
    }

    fn from_parts(certificate: String, key: Key) -> Result<Self> {
        let all = Details::parse_pem(certificate.as_bytes())?;
        let [details] = <[Details; 1]>::try_from(all).map_err(|all| {
            Error::Config(format!("{} certificates in one file: expected the authority's only", all.len()))
        })?;
        if !details.is_ca {
            return Err(Error::Config(
                "the certificate is not an authority's: `trefoil certs authority` makes one".into(),
            ));
        }
        if !details.belongs_to(&key) {
            return Err(Error::Config(
                "the certificate and the key do not belong together: are they of two authorities?".into(),
            ));
        }
        Ok(Authority { certificate, details, key })
    }

    /// Its certificate, in PEM: what peers put into `[tls] ca`.
    #[must_use]
    pub fn certificate_pem(&self) -> &str {
        &self.certificate
    }

    /// What its certificate says.
    #[must_use]
    pub fn details(&self) -> &Details {
        &self.details
    }

    /// Its key, in PKCS#8 PEM.
    #[must_use]
    pub fn key_pem(&self) -> Zeroizing<String> {
        self.key.pem()
    }

    /// Refuses if it cannot sign anything valid at `now` (Unix time), or nothing that lasts as long as `validity`.
    ///
    /// # Errors
    /// [`Error::Config`].
    pub fn check_dates(&self, validity: Validity, now: i64) -> Result<()> {
        let name = &self.details.name;
        let (from, to) = (self.details.not_before, self.details.not_after);
        if now > to {
            return Err(Error::Config(format!(
                "the authority {name:?} expired on {}: make a new one (trefoil certs authority) and give its ca.pem to every party",
                date(to)
            )));
        }
        if now < from {
            return Err(Error::Config(format!(
                "the authority {name:?} is valid from {} only: is this machine's clock right?",
                date(from)
            )));
        }
        if validity.not_after > to {
            return Err(Error::Config(format!(
                "the authority {name:?} itself expires on {}, before the certificate would: --days {} at most",
                date(to),
                self.details.days_left(now)
            )));
        }
        Ok(())
    }

    /// Signs a request in PEM, for the role that the signer has agreed to. Its signature shows that who asks has the key.
    ///
    /// # Errors
    /// [`Error::Config`] if the request is damaged, not signed with its key, of another role, or asks for what Trefoil has no use for.
    pub fn sign(&self, csr: &str, role: Role, validity: Validity) -> Result<Signed> {
        let (request, public) = read_request(csr)?;
        if request.role != role {
            return Err(Error::Config(format!(
                "the request of {:?} is for the role {}, and you sign for {role}: ask who sent it, or give --role {}",
                request.name, request.role, request.role
            )));
        }
        let pem = self.certify(&request, &public, validity)?;
        Ok(Signed { pem, request })
    }

    /// Certifies a key that is at hand, without a request; in PEM.
    ///
    /// # Errors
    /// [`Error::Config`] if it cannot be made.
    pub fn issue(&self, request: &Request, key: &Key, validity: Validity) -> Result<String> {
        self.certify(request, key.pair(), validity)
    }

    fn certify(&self, request: &Request, public: &impl rcgen::PublicKeyData, validity: Validity) -> Result<String> {
        let issuer = Issuer::from_ca_cert_pem(&self.certificate, self.key.pair())
            .map_err(|e| not_made("a certificate with this authority", &e))?;
        let certificate = request.certificate(validity)?.signed_by(public, &issuer);
        Ok(certificate.map_err(|e| not_made("the certificate", &e))?.pem())
    }
}

/// Reads and verifies a request.
fn read_request(csr: &str) -> Result<(Request, SubjectPublicKeyInfo)> {
    let wrong =
        |what: &str| Error::Config(format!("the request {what}: let its sender make one with `trefoil certs request`"));
    let der = CertificateSigningRequestDer::from_pem_slice(csr.as_bytes())
        .map_err(|_| wrong("is no PEM certificate request"))?;
    let params = CertificateSigningRequestParams::from_der(&der)
        .map_err(|e| match e {
            rcgen::Error::InvalidCertificationRequestSignature => {
                wrong("is not signed with its own key: it was damaged or altered on its way")
            }
            rcgen::Error::UnsupportedExtension => wrong("asks for extensions that Trefoil does not sign"),
            _ => wrong("cannot be parsed, or its key is of an unknown kind"),
        })?
        .params;
    let (rest, parsed) = X509CertificationRequest::from_der(&der).map_err(|_| wrong("cannot be parsed"))?;
    if !rest.is_empty() {
        return Err(wrong("has bytes after its end"));
    }
    // From the key itself, and not from the algorithm that signed the request.
    let public = SubjectPublicKeyInfo::from_der(parsed.certification_request_info.subject_pki.raw)
        .map_err(|_| wrong("has a key of an unknown kind"))?;

    if params.is_ca != IsCa::NoCa && params.is_ca != IsCa::ExplicitNoCa {
        return Err(wrong("asks to become an authority itself"));
    }
    let name = match params.distinguished_name.get(&DnType::CommonName) {
        Some(DnValue::Utf8String(name)) => name.clone(),
        Some(DnValue::PrintableString(name)) => name.as_str().to_owned(),
        _ => return Err(wrong("has no common name in UTF-8")),
    };
    let (mut role, mut hosts) = (None, Vec::new());
    for san in &params.subject_alt_names {
        match san {
            SanType::DnsName(name) => hosts.push(name.as_str().parse()?),
            SanType::IpAddress(ip) => hosts.push(Host::Ip(*ip)),
            SanType::URI(uri) => add_role(&mut role, uri.as_str())?,
            _ => return Err(wrong("asks for names that are no hosts (an e-mail address?)")),
        }
    }
    let role = role.ok_or_else(|| wrong("carries no Trefoil role"))?;
    Ok((Request::new(role, &name, hosts)?, public))
}
