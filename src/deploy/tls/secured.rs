//! Connections whose other end is known: taken in, dialled, and used for control messages until the engine takes them over.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

use super::super::config::Address;
use super::super::wire;
use super::fault::fault;
use super::{ALPN, Identity, Tls};
use crate::error::{CertificateFault, Error, PeerFault, Result};
use crate::net::tls::Stream;
use crate::party::Role;
use crate::prf::PairKey;

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
        let limit = limit.min(wire::LONG);
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
