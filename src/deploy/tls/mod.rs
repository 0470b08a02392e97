//! Mutual TLS 1.3: who a peer is, is what its verified certificate says.
//!
//! A certificate is good if it is pinned (the very bytes) or signed by the configured CA, within its validity, and not on the
//! list of revoked ones. Its role is in it. Names are checked by the one who dials; a pinned certificate needs no name.

mod fault;
mod reload;
mod secured;
mod trust;

use std::fmt;
use std::sync::Arc;

use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::NoServerSessionStorage;
use rustls::{ClientConfig, ServerConfig};

use super::certs::{Details, Fingerprint, Key};
use super::config::Tls as TlsConfig;
use crate::error::{CertificateFault, Error, PeerFault, Result};
use crate::party::Role;

pub use reload::Reloading;
pub use secured::{Secured, accept, connect};
pub(super) use trust::issued;
use trust::{Verifier, read_certificates};

/// The protocol version, spoken in ALPN.
pub const ALPN: &str = "trefoil/4";
/// Agreed on by parties that have no version in common, so that one can tell the other its own.
const ALPN_REFUSE: &str = "trefoil/refuse";

/// Who a peer is, from its verified certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Its role.
    pub role: Role,
    /// Its name, for people.
    pub name: String,
    /// SHA-256 of its certificate.
    pub fingerprint: Fingerprint,
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} \"{}\" ({})", self.role, self.name, self.fingerprint)
    }
}

impl Identity {
    fn of(der: &[u8]) -> Result<Identity, PeerFault> {
        let invalid = |e: &dyn fmt::Display| PeerFault::Certificate(CertificateFault::Invalid(e.to_string()));
        let d = Details::parse_der(der).map_err(|e| invalid(&e))?;
        let role = d.role.ok_or(PeerFault::Certificate(CertificateFault::NoRole))?;
        Ok(Identity { role, name: d.name, fingerprint: d.fingerprint })
    }
}

/// One party's side of TLS, as configured.
pub struct Tls {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
    own: Identity,
    revoked: Vec<Fingerprint>,
}

impl Tls {
    /// Reads certificates and key of a party of role `role`.
    ///
    /// # Errors
    /// [`Error::Config`] naming the file.
    pub fn load(config: &TlsConfig, role: Role) -> Result<Tls> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let chain = read_certificates(&config.certificate)?;
        let own = Identity::of(&chain[0])
            .map_err(|fault| Error::Config(format!("{}: {fault}", config.certificate.display())))?;
        if own.role != role {
            return Err(Error::Config(format!(
                "{}: this certificate's role is {}, but the configuration's role is {role}",
                config.certificate.display(),
                own.role
            )));
        }
        let key = PrivateKeyDer::from_pem_slice(Key::load(&config.key)?.pem().as_bytes())
            .map_err(|e| Error::Config(format!("{}: no private key in PEM form ({e})", config.key.display())))?;
        let verifier = Arc::new(Verifier::load(config, &provider)?);
        let (client, server) = configs(provider, verifier, chain, key)
            .map_err(|e| Error::Config(format!("{}, {}: {e}", config.certificate.display(), config.key.display())))?;
        Ok(Tls { client: Arc::new(client), server: Arc::new(server), own, revoked: config.revoked.clone() })
    }

    /// Whether a certificate is on the list of revoked ones.
    #[must_use]
    pub fn revoked(&self, fingerprint: &Fingerprint) -> bool {
        self.revoked.contains(fingerprint)
    }

    /// Who we are.
    #[must_use]
    pub fn own(&self) -> &Identity {
        &self.own
    }
}

fn configs(
    provider: Arc<CryptoProvider>,
    verifier: Arc<Verifier>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<(ClientConfig, ServerConfig), rustls::Error> {
    let tls13 = &[&rustls::version::TLS13];
    let alpn = || vec![ALPN.as_bytes().to_vec(), ALPN_REFUSE.as_bytes().to_vec()];
    let mut client = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(tls13)?
        .dangerous() // our own verifier: the CA's chains as usual, and pinned certificates
        .with_custom_certificate_verifier(Arc::clone(&verifier) as _)
        .with_client_auth_cert(chain.clone(), key.clone_key())?;
    // Every connection has fresh keys: no tickets, no early data.
    client.resumption = rustls::client::Resumption::disabled();
    client.alpn_protocols = alpn();
    let mut server = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(tls13)?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)?;
    server.session_storage = Arc::new(NoServerSessionStorage {});
    server.send_tls13_tickets = 0;
    server.alpn_protocols = alpn();
    Ok((client, server))
}
