//! Whom we believe: pinned certificates, the CA's, the list of revoked ones.

use std::cell::RefCell;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, RootCertStore, SignatureScheme};

use super::super::certs::{self, Details, Fingerprint};
use super::super::config::Tls as TlsConfig;
use crate::error::{CertificateFault, Error, Result};
use crate::party::Role;

/// What the verifier has found wrong in the handshake that has just failed on this thread.
pub(super) fn found() -> Option<CertificateFault> {
    FOUND.take()
}

thread_local! {
    /// What the verifier has just found wrong. rustls tells it to the peer as an alert and to us without the particulars; the
    /// verifier runs within the poll that then returns rustls's error, hence on the same thread.
    static FOUND: RefCell<Option<CertificateFault>> = const { RefCell::new(None) };
}

/// Decides on certificates, at both ends.
pub(super) struct Verifier {
    pinned: Vec<CertificateDer<'static>>,
    revoked: Vec<Fingerprint>,
    roots: Option<Arc<RootCertStore>>,
    clients: Option<Arc<dyn ClientCertVerifier>>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Verifier").finish_non_exhaustive()
    }
}

fn alert(fault: &CertificateFault) -> CertificateError {
    match fault {
        CertificateFault::UnknownIssuer { .. } => CertificateError::UnknownIssuer,
        CertificateFault::Expired(_) => CertificateError::Expired,
        CertificateFault::NotYetValid(_) => CertificateError::NotValidYet,
        CertificateFault::Revoked(_) => CertificateError::Revoked,
        CertificateFault::Name(_) => CertificateError::NotValidForName,
        _ => CertificateError::BadEncoding,
    }
}

impl Verifier {
    /// # Errors
    /// [`Error::Config`] naming the file.
    pub fn load(config: &TlsConfig, provider: &Arc<CryptoProvider>) -> Result<Verifier> {
        // One peer a file: what follows its certificate is a chain, not other peers.
        let first = |p: &PathBuf| read_certificates(p).map(|mut all| all.swap_remove(0));
        let pinned = config.pinned.iter().map(first).collect::<Result<Vec<_>>>()?;
        let roots = config.ca.as_deref().map(read_roots).transpose()?;
        let clients = match (&roots, &config.ca) {
            (Some(roots), Some(ca)) => Some(client_verifier(ca, roots, provider)?),
            _ => None,
        };
        let algorithms = provider.signature_verification_algorithms;
        Ok(Verifier { pinned, revoked: config.revoked.clone(), roots, clients, algorithms })
    }

    fn verify(
        &self,
        der: &CertificateDer<'_>,
        now: UnixTime,
        chain: &dyn Fn() -> Result<(), rustls::Error>,
    ) -> Result<(), rustls::Error> {
        let fault = self.examine(der, now, chain).err();
        FOUND.set(fault.clone());
        fault.map_or(Ok(()), |fault| Err(rustls::Error::InvalidCertificate(alert(&fault))))
    }

    fn examine(
        &self,
        der: &CertificateDer<'_>,
        now: UnixTime,
        chain: &dyn Fn() -> Result<(), rustls::Error>,
    ) -> Result<(), CertificateFault> {
        let d = Details::parse_der(der).map_err(|e| CertificateFault::Invalid(e.to_string()))?;
        if self.revoked.contains(&d.fingerprint) {
            return Err(CertificateFault::Revoked(d.fingerprint.to_string()));
        }
        // Before the chain: an expired certificate is told as such whoever signed it, since its owner can only renew it.
        let now = now.as_secs() as i64;
        if now > d.not_after {
            return Err(CertificateFault::Expired(certs::date(d.not_after)));
        }
        if now < d.not_before {
            return Err(CertificateFault::NotYetValid(certs::date(d.not_before)));
        }
        if self.pinned.iter().any(|p| p == der) {
            return Ok(());
        }
        let unknown = CertificateFault::UnknownIssuer { fingerprint: d.fingerprint.to_string() };
        if self.roots.is_none() {
            return Err(unknown);
        }
        chain().map_err(|e| match e {
            rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer) => unknown,
            rustls::Error::InvalidCertificate(CertificateError::Expired | CertificateError::ExpiredContext { .. }) => {
                CertificateFault::Expired("some day (its issuer's certificate)".into())
            }
            other if other.to_string().contains("CaUsedAsEndEntity") => {
                CertificateFault::Invalid("it is an authority's, not a party's".into())
            }
            other => CertificateFault::Invalid(other.to_string()),
        })
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        _ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.verify(end_entity, now, &|| {
            let roots = self.roots.as_ref().ok_or(CertificateError::UnknownIssuer)?;
            let cert = ParsedCertificate::try_from(end_entity)?;
            rustls::client::verify_server_cert_signed_by_trust_anchor(
                &cert,
                roots,
                intermediates,
                now,
                self.algorithms.all,
            )
        })?;
        if !self.pinned.iter().any(|p| p == end_entity) {
            let cert = ParsedCertificate::try_from(end_entity)?;
            rustls::client::verify_server_name(&cert, name).inspect_err(|_| {
                FOUND.set(Some(CertificateFault::Name(name.to_str().into_owned())));
            })?;
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for Verifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.verify(end_entity, now, &|| {
            let clients = self.clients.as_ref().ok_or(CertificateError::UnknownIssuer)?;
            clients.verify_client_cert(end_entity, intermediates, now).map(|_| ())
        })?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

pub(super) fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let bad = |e: &dyn fmt::Display| {
        Error::Config(format!("{}: {e}; a PEM file with a certificate belongs there (trefoil certs)", path.display()))
    };
    let text = certs::read_text(path)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(text.as_bytes()).collect();
    let found = found.map_err(|e| bad(&e))?;
    if found.is_empty() {
        return Err(bad(&"no certificate in it"));
    }
    Ok(found)
}

fn read_roots(path: &Path) -> Result<Arc<RootCertStore>> {
    let mut roots = RootCertStore::empty();
    for ca in read_certificates(path)? {
        roots.add(ca).map_err(|e| Error::Config(format!("{}: {e}", path.display())))?;
    }
    Ok(Arc::new(roots))
}

fn client_verifier(
    ca: &Path,
    roots: &Arc<RootCertStore>,
    provider: &Arc<CryptoProvider>,
) -> Result<Arc<dyn ClientCertVerifier>> {
    let builder = WebPkiClientVerifier::builder_with_provider(Arc::clone(roots), Arc::clone(provider));
    builder.build().map_err(|e| Error::Config(format!("{}: {e}", ca.display())))
}

/// Whether the authorities in the file `ca` have signed the certificate of a `role` in the file `certificate`, as of Unix time
/// `at`.
///
/// # Errors
/// [`Error::Config`] naming the file that cannot be read.
pub(in super::super) fn issued(certificate: &Path, ca: &Path, role: Role, at: i64) -> Result<bool> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let (chain, roots) = (read_certificates(certificate)?, read_roots(ca)?);
    let at = UnixTime::since_unix_epoch(Duration::from_secs(at.max(0).unsigned_abs()));
    if role == Role::Client {
        let clients = client_verifier(ca, &roots, &provider)?;
        return Ok(clients.verify_client_cert(&chain[0], &chain[1..], at).is_ok());
    }
    let bad = |e| Error::Config(format!("{}: {e}", certificate.display()));
    let leaf = ParsedCertificate::try_from(&chain[0]).map_err(bad)?;
    let algorithms = provider.signature_verification_algorithms.all;
    let found = rustls::client::verify_server_cert_signed_by_trust_anchor(&leaf, &roots, &chain[1..], at, algorithms);
    Ok(found.is_ok())
}
