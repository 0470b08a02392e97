//! Mutual TLS 1.3: who a peer is, is what its verified certificate says.
//!
//! A certificate is good if it is pinned (the very bytes) or signed by the configured CA, within its validity, and not on the
//! list of revoked ones. Its role is in it. Names are checked by the one who dials; a pinned certificate needs no name.

use std::cell::RefCell;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier};
use rustls::{
    AlertDescription, CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, RootCertStore,
    ServerConfig, SignatureScheme,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

use super::certs::{self, Details, Fingerprint, Key};
use super::config::{Address, Config, Tls as TlsConfig};
use crate::error::{CertificateFault, Error, PeerFault, Result};
use crate::net::tls::Stream;
use crate::party::Role;
use crate::prf::PairKey;

/// The protocol version, spoken in ALPN.
pub const ALPN: &str = "trefoil/1";
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

thread_local! {
    /// What the verifier has just found wrong. rustls tells it to the peer as an alert and to us without the particulars; the
    /// verifier runs within the poll that then returns rustls's error, hence on the same thread.
    static FOUND: RefCell<Option<CertificateFault>> = const { RefCell::new(None) };
}

/// Decides on certificates, at both ends.
struct Verifier {
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

/// One party's side of TLS, as configured.
pub struct Tls {
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
    own: Identity,
    revoked: Vec<Fingerprint>,
}

fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>> {
    let bad = |e: &dyn fmt::Display| {
        Error::Config(format!("{}: {e}; a PEM file with a certificate belongs there (trefoil certs)", path.display()))
    };
    let found: Result<Vec<_>, _> = CertificateDer::pem_file_iter(path).map_err(|e| bad(&e))?.collect();
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

/// Whether the authorities in the file `ca` have signed the certificate of a `role` in the file `certificate`, as of Unix time
/// `at`.
///
/// # Errors
/// [`Error::Config`] naming the file that cannot be read.
pub(super) fn issued(certificate: &Path, ca: &Path, role: Role, at: i64) -> Result<bool> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let (chain, roots) = (read_certificates(certificate)?, read_roots(ca)?);
    let at = UnixTime::since_unix_epoch(Duration::from_secs(at.max(0).unsigned_abs()));
    if role == Role::Client {
        let built = WebPkiClientVerifier::builder_with_provider(roots, provider).build();
        let clients = built.map_err(|e| Error::Config(format!("{}: {e}", ca.display())))?;
        return Ok(clients.verify_client_cert(&chain[0], &chain[1..], at).is_ok());
    }
    let bad = |e| Error::Config(format!("{}: {e}", certificate.display()));
    let leaf = ParsedCertificate::try_from(&chain[0]).map_err(bad)?;
    let algorithms = provider.signature_verification_algorithms.all;
    let found = rustls::client::verify_server_cert_signed_by_trust_anchor(&leaf, &roots, &chain[1..], at, algorithms);
    Ok(found.is_ok())
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
                "{}: this is the certificate of a {}, but the configuration's role is {role}",
                config.certificate.display(),
                own.role
            )));
        }
        let key = PrivateKeyDer::from_pem_slice(Key::load(&config.key)?.pem().as_bytes())
            .map_err(|e| Error::Config(format!("{}: no private key in PEM form ({e})", config.key.display())))?;
        // One peer a file: what follows its certificate is a chain, not other peers.
        let first = |p: &PathBuf| read_certificates(p).map(|mut all| all.swap_remove(0));
        let pinned = config.pinned.iter().map(first).collect::<Result<Vec<_>>>()?;
        let roots = config.ca.as_deref().map(read_roots).transpose()?;
        let internal = |e: &dyn fmt::Display| Error::Config(format!("[tls]: {e}"));
        let clients = match &roots {
            None => None,
            Some(roots) => {
                let builder = WebPkiClientVerifier::builder_with_provider(Arc::clone(roots), Arc::clone(&provider));
                let built: Arc<dyn ClientCertVerifier> = builder.build().map_err(|e| internal(&e))?;
                Some(built)
            }
        };
        let algorithms = provider.signature_verification_algorithms;
        let verifier = Arc::new(Verifier { pinned, revoked: config.revoked.clone(), roots, clients, algorithms });
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
        .with_custom_certificate_verifier(Arc::clone(&verifier) as Arc<dyn ServerCertVerifier>)
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

/// What a failed handshake means.
fn fault(e: &std::io::Error) -> PeerFault {
    use rustls::Error as E;
    let found = FOUND.take();
    let Some(e) = e.get_ref().and_then(|e| e.downcast_ref::<E>()) else {
        return match e.kind() {
            std::io::ErrorKind::UnexpectedEof
            | std::io::ErrorKind::ConnectionReset
            | std::io::ErrorKind::BrokenPipe
            | std::io::ErrorKind::ConnectionAborted => PeerFault::Closed,
            _ => PeerFault::Handshake(e.to_string()),
        };
    };
    match (e, found) {
        (E::InvalidCertificate(_), Some(found)) => PeerFault::Certificate(found),
        (E::InvalidCertificate(e), None) => PeerFault::Certificate(CertificateFault::Invalid(format!("{e}"))),
        (E::NoCertificatesPresented, _) => PeerFault::Certificate(CertificateFault::Missing),
        (E::InvalidMessage(_) | E::InappropriateMessage { .. }, _) => PeerFault::NotTls,
        (E::NoApplicationProtocol | E::AlertReceived(AlertDescription::NoApplicationProtocol), _) => {
            PeerFault::Version { ours: ALPN.into(), theirs: "(it did not say)".into() }
        }
        (E::AlertReceived(AlertDescription::ProtocolVersion), _) => PeerFault::OldTls,
        (E::AlertReceived(alert), _) if about_certificates(*alert) => PeerFault::RefusesUs(spoken(*alert).into()),
        (E::PeerIncompatible(what), _) => {
            use rustls::PeerIncompatible as P;
            match what {
                P::SupportedVersionsExtensionRequired
                | P::Tls12NotOffered
                | P::Tls12NotOfferedOrEnabled
                | P::ServerDoesNotSupportTls12Or13
                | P::ServerTlsVersionIsDisabledByOurConfig => PeerFault::OldTls,
                other => PeerFault::Handshake(format!("{other:?}")),
            }
        }
        (other, _) => PeerFault::Handshake(other.to_string()),
    }
}

fn about_certificates(a: AlertDescription) -> bool {
    use AlertDescription as A;
    matches!(
        a,
        A::UnknownCA
            | A::CertificateExpired
            | A::CertificateRevoked
            | A::BadCertificate
            | A::CertificateUnknown
            | A::CertificateRequired
            | A::UnsupportedCertificate
            | A::AccessDenied
            | A::DecryptError
    )
}

fn spoken(a: AlertDescription) -> &'static str {
    use AlertDescription as A;
    match a {
        A::UnknownCA => "it does not know who signed it",
        A::CertificateExpired => "by its clock the certificate is not valid now",
        A::CertificateRevoked => "it is on the peer's list of revoked certificates",
        A::CertificateRequired => "it got none",
        _ => "bad certificate",
    }
}

/// A connection whose other end is known.
pub struct Secured {
    tls: TlsStream<TcpStream>,
    /// Who is at the other end.
    pub peer: Identity,
    /// Where.
    pub address: String,
    /// The longest wait for a message.
    pub timeout: Duration,
}

/// The longest control message: a plan of a hundred layers, and room.
const MESSAGE_LIMIT: u32 = 32 << 20;

impl Secured {
    fn finish(tls: TlsStream<TcpStream>, address: String, timeout: Duration) -> Result<(Secured, bool), PeerFault> {
        let (_, state) = tls.get_ref();
        let der = state.peer_certificates().and_then(<[_]>::first);
        let der = der.ok_or(PeerFault::Certificate(CertificateFault::Missing))?;
        let peer = Identity::of(der)?;
        let same = state.alpn_protocol() == Some(ALPN.as_bytes());
        Ok((Secured { tls, peer, address, timeout }, same))
    }

    /// An error that blames this peer.
    #[must_use]
    pub fn blame(&self, step: &'static str, kind: PeerFault) -> Error {
        Error::Peer { role: self.peer.role, step: format!("{step} ({})", self.address), kind }
    }

    /// Sends one control message.
    ///
    /// # Errors
    /// [`Error::Peer`] if the peer is gone or takes too long.
    pub async fn send(&mut self, step: &'static str, bytes: &[u8]) -> Result<()> {
        let work = async {
            self.tls.write_all(&(bytes.len() as u32).to_le_bytes()).await?;
            self.tls.write_all(bytes).await?;
            self.tls.flush().await
        };
        let out = tokio::time::timeout(self.timeout, work).await;
        if matches!(out, Ok(Err(_))) {
            // Why the other side has hung up may still be readable: an alert about our certificate, mostly.
            let mut byte = [0; 1];
            if let Ok(Err(e)) = tokio::time::timeout(LINGER, self.tls.read(&mut byte)).await {
                return Err(self.blame(step, fault(&e)));
            }
        }
        self.outcome(step, out)
    }

    /// Receives one control message of at most `limit` bytes.
    ///
    /// # Errors
    /// [`Error::Peer`].
    pub async fn recv(&mut self, step: &'static str, limit: u32) -> Result<Vec<u8>> {
        let limit = limit.min(MESSAGE_LIMIT);
        let mut bytes = Vec::new();
        let mut oversize = None;
        let work = async {
            let mut len = [0; 4];
            self.tls.read_exact(&mut len).await?;
            let len = u32::from_le_bytes(len);
            if len > limit {
                oversize = Some(len as usize);
                return Ok(());
            }
            // Grows with what has come, not with what was announced.
            let n = (&mut self.tls).take(u64::from(len)).read_to_end(&mut bytes).await?;
            if n < len as usize {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            Ok(())
        };
        let out = tokio::time::timeout(self.timeout, work).await;
        if let Some(got) = oversize {
            return Err(self.blame(step, PeerFault::Oversize { limit: limit as usize, got }));
        }
        self.outcome(step, out)?;
        Ok(bytes)
    }

    fn outcome(&self, step: &'static str, out: Result<std::io::Result<()>, tokio::time::error::Elapsed>) -> Result<()> {
        match out {
            Ok(Ok(())) => Ok(()),
            Ok(Err(e)) => Err(self.blame(step, fault(&e))),
            Err(_) => Err(self.blame(step, PeerFault::Timeout(self.timeout.as_millis() as u64))),
        }
    }

    /// Ends the connection in an orderly way.
    pub async fn close(mut self) {
        let _ = tokio::time::timeout(Duration::from_secs(1), self.tls.shutdown()).await;
    }

    /// The pair's key for session `id`: the TLS exporter (RFC 5705, RFC 8446 §7.5) with the session id as context, so it
    /// depends on this very connection and on all three nonces.
    ///
    /// # Errors
    /// [`Error::Internal`]; a finished handshake always has one.
    pub fn key(&self, id: &[u8; 32]) -> Result<PairKey> {
        let label = b"EXPORTER-trefoil-pair-key";
        let out = match &self.tls {
            TlsStream::Client(s) => s.get_ref().1.export_keying_material([0; 16], label, Some(id)),
            TlsStream::Server(s) => s.get_ref().1.export_keying_material([0; 16], label, Some(id)),
        };
        out.map(PairKey::new).map_err(|e| Error::Internal(format!("TLS exporter: {e}")))
    }

    /// The connection for the engine: blocking, without tokio.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn into_stream(self, write_timeout: Option<Duration>) -> Result<Stream> {
        let failed = |e| Error::io("a connection", e);
        let (tcp, tls): (_, rustls::Connection) = match self.tls {
            TlsStream::Client(s) => {
                let (tcp, tls) = s.into_inner();
                (tcp, tls.into())
            }
            TlsStream::Server(s) => {
                let (tcp, tls) = s.into_inner();
                (tcp, tls.into())
            }
        };
        Stream::new(tcp.into_std().map_err(failed)?, tls, write_timeout).map_err(failed)
    }
}

/// Takes in somebody who has dialled.
///
/// # Errors
/// [`Error::Incoming`] with the address.
pub async fn accept(tls: &Tls, tcp: TcpStream, address: String, timeout: Duration) -> Result<Secured> {
    let failed = |kind| Error::Incoming { address: address.clone(), step: "TLS handshake", kind };
    let _ = tcp.set_nodelay(true);
    let acceptor = TlsAcceptor::from(Arc::clone(&tls.server));
    let handshake = async { acceptor.accept(tcp).into_fallible().await.map_err(|(e, tcp)| (fault(&e), tcp)) };
    let stream = match tokio::time::timeout(timeout, handshake).await {
        Err(_) => return Err(failed(PeerFault::Timeout(timeout.as_millis() as u64))),
        Ok(Err((kind, tcp))) => {
            hear_out(tcp).await;
            return Err(failed(kind));
        }
        Ok(Ok(stream)) => stream,
    };
    let (mut secured, same) = Secured::finish(stream.into(), address.clone(), timeout).map_err(failed)?;
    if !same {
        // Each says its version and goes.
        let theirs = exchange_versions(&mut secured).await?;
        return Err(secured.blame("TLS handshake", PeerFault::Version { ours: ALPN.into(), theirs }));
    }
    Ok(secured)
}

/// How long one that is refused is heard out.
const LINGER: Duration = Duration::from_millis(300);

/// Reads on for a moment after an alert was sent: closing at once would discard what the peer has sent meanwhile, and with it,
/// in many systems, our alert.
async fn hear_out(mut tcp: TcpStream) {
    let _ = tcp.shutdown().await;
    let mut rest = [0; 4096];
    let _ = tokio::time::timeout(LINGER, async {
        for _ in 0..64 {
            match tcp.read(&mut rest).await {
                Ok(0) | Err(_) => break,
                Ok(_) => {}
            }
        }
    })
    .await;
}

/// The longest version that is read.
const VERSION_LIMIT: u32 = 64;

async fn exchange_versions(secured: &mut Secured) -> Result<String> {
    secured.send("version", ALPN.as_bytes()).await?;
    let theirs = secured.recv("version", VERSION_LIMIT).await?;
    // It will be printed: nothing but plain characters.
    Ok(theirs.iter().filter(|b| b.is_ascii_graphic()).map(|&b| char::from(b)).collect())
}

/// Dials `address`, where a party of role `want` is expected.
///
/// # Errors
/// [`Error::Peer`] blaming that role.
pub async fn connect(tls: &Tls, address: &Address, want: Role, timeout: Duration) -> Result<Secured> {
    let failed = |step: &str, kind| Error::Peer { role: want, step: format!("{step} ({address})"), kind };
    let slow = || PeerFault::Timeout(timeout.as_millis() as u64);
    let unreachable = |cause: String| PeerFault::Unreachable { address: address.to_string(), cause };
    let tcp = match tokio::time::timeout(timeout, TcpStream::connect(address.to_string())).await {
        Err(_) => {
            return Err(failed("connecting", unreachable(format!("no answer within {} s", timeout.as_secs_f64()))));
        }
        Ok(Err(e)) => return Err(failed("connecting", unreachable(e.to_string()))),
        Ok(Ok(tcp)) => tcp,
    };
    let _ = tcp.set_nodelay(true);
    let name = address.host.server_name()?;
    let connector = TlsConnector::from(Arc::clone(&tls.client));
    let handshake = async { connector.connect(name, tcp).await.map_err(|e| fault(&e)) };
    let stream = match tokio::time::timeout(timeout, handshake).await {
        Err(_) => return Err(failed("TLS handshake", slow())),
        Ok(Err(kind)) => return Err(failed("TLS handshake", kind)),
        Ok(Ok(stream)) => stream,
    };
    let (mut secured, same) =
        Secured::finish(stream.into(), address.to_string(), timeout).map_err(|kind| failed("TLS handshake", kind))?;
    if secured.peer.role != want {
        let kind = PeerFault::Certificate(CertificateFault::Role { want, got: secured.peer.role });
        return Err(failed("TLS handshake", kind));
    }
    if !same {
        let theirs = exchange_versions(&mut secured).await?;
        return Err(failed("TLS handshake", PeerFault::Version { ours: ALPN.into(), theirs }));
    }
    Ok(secured)
}

/// [`Tls`] that follows its files: certificates, keys, CA, pins and the list of revoked ones are read again when a file has
/// changed, so that renewing and revoking need no restart.
pub struct Reloading {
    path: PathBuf,
    role: Role,
    state: Mutex<(Vec<Stamp>, TlsConfig, Arc<Tls>)>,
}

impl Reloading {
    /// As configured in the file `path`.
    ///
    /// # Errors
    /// As [`Tls::load`].
    pub fn new(path: &Path, config: &Config) -> Result<Reloading> {
        let tls = config.tls().clone();
        let stamps = stamps(path, &tls);
        let loaded = Arc::new(Tls::load(&tls, config.role())?);
        Ok(Reloading { path: path.to_path_buf(), role: config.role(), state: Mutex::new((stamps, tls, loaded)) })
    }

    /// The current one. If the new files are not good, the old ones stay in force and the log says why.
    #[must_use]
    pub fn current(&self) -> Arc<Tls> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        // Taken before the files are read: what changes meanwhile is read again next time.
        let now = stamps(&self.path, &state.1);
        if now != state.0 {
            let fresh = Config::load(&self.path).and_then(|c| Ok((Tls::load(c.tls(), self.role)?, c.tls().clone())));
            match fresh {
                Ok((tls, config)) => {
                    tracing::info!("certificates and lists read again");
                    // Other files may be named now: they count as read only if they are the same ones.
                    let stamps = if config == state.1 { now } else { Vec::new() };
                    *state = (stamps, config, Arc::new(tls));
                }
                Err(error) => {
                    tracing::warn!(%error, "certificates changed but cannot be used; the old ones stay in force");
                    state.0 = now;
                }
            }
        }
        Arc::clone(&state.2)
    }
}

/// What tells that a file has changed.
type Stamp = Option<(u64, u64, i64, i64)>;

fn stamps(path: &Path, tls: &TlsConfig) -> Vec<Stamp> {
    use std::os::unix::fs::MetadataExt;
    let files = [path, &tls.certificate, &tls.key].into_iter();
    let files = files.chain(tls.ca.as_deref()).chain(tls.pinned.iter().map(PathBuf::as_path));
    files
        .map(|f| {
            std::fs::metadata(f).ok().map(|m| {
                (
                    m.ino(),
                    m.len(),
                    m.mtime_nsec() + m.mtime() * 1_000_000_000,
                    m.ctime_nsec() + m.ctime() * 1_000_000_000,
                )
            })
        })
        .collect()
}
