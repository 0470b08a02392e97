//! The TLS handshake at both ends, fed with noise and with real messages that were altered: always an error, always in time.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use trefoil::deploy::certs::{Authority, Host, Key, Request, Validity, now, write_private};
use trefoil::deploy::config::Tls as TlsConfig;
use trefoil::deploy::tls::{self, ALPN, Tls};
use trefoil::error::Error;
use trefoil::party::Role;

use crate::fuzz;
use crate::mutate::{apply, byte_changes};

/// Longest wait for the other end.
const PATIENCE: Duration = Duration::from_millis(400);
/// On a machine that others use too.
const IN_TIME: Duration = Duration::from_secs(10);

struct Site {
    dir: TempDir,
    ca: Authority,
}

impl Site {
    fn new() -> Site {
        let ca = Authority::new("Fuzz", Validity::days(30, now())).unwrap();
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("ca.pem"), ca.certificate_pem()).unwrap();
        Site { dir, ca }
    }

    fn party(&self, role: Role) -> Tls {
        let at = |end: &str| self.dir.path().join(format!("{role}.{end}"));
        let hosts: Vec<Host> = if role == Role::Client { vec![] } else { vec!["127.0.0.1".parse().unwrap()] };
        let key = Key::generate().unwrap();
        let request = Request::new(role, "Fuzz", hosts).unwrap();
        std::fs::write(at("pem"), self.ca.issue(&request, &key, Validity::days(20, now())).unwrap()).unwrap();
        write_private(&at("key"), &key.pem()).unwrap();
        let config = TlsConfig {
            certificate: at("pem"),
            key: at("key"),
            ca: Some(self.dir.path().join("ca.pem")),
            pinned: vec![],
            revoked: vec![],
        };
        Tls::load(&config, role).unwrap()
    }
}

/// A real ClientHello, as one of our own Clients begins.
fn client_hello(ca: &Path) -> Vec<u8> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(ca).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![ALPN.into()];
    let name = ServerName::try_from("127.0.0.1").unwrap();
    let mut connection = ClientConnection::new(Arc::new(config), name).unwrap();
    let mut out = Vec::new();
    connection.write_tls(&mut out).unwrap();
    out
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// Sends `bytes` in pieces; hangs up, or stays silent from then on.
async fn speak(mut tcp: TcpStream, bytes: &[u8], piece: usize, stays: bool) {
    let mut rest = [0; 4096];
    for chunk in bytes.chunks(piece.max(1)) {
        if tcp.write_all(chunk).await.is_err() {
            return;
        }
    }
    if !stays {
        let _ = tcp.shutdown().await;
    }
    while tcp.read(&mut rest).await.is_ok_and(|n| n > 0) {}
}

#[test]
fn one_who_dials() {
    let site = Site::new();
    let owner = site.party(Role::Owner);
    let hello = client_hello(&site.dir.path().join("ca.pem"));
    let runtime = runtime();
    let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
    let address = listener.local_addr().unwrap();
    let noise = prop::collection::vec(any::<u8>(), 0..200);
    let record = (any::<u8>(), prop::collection::vec(any::<u8>(), 0..200)).prop_map(|(kind, body)| {
        let mut record = vec![kind % 32, 3, 3];
        record.extend((body.len() as u16).to_be_bytes());
        record.extend(body);
        record
    });
    let good = hello.clone();
    let altered = byte_changes().prop_map(move |changes| apply(&good, &changes));
    let bytes = prop_oneof![1 => noise, 1 => record, 4 => altered];
    let all = (bytes, 1usize..600, prop::bool::weighted(0.01));
    fuzz("handshake, as the one who is dialled", &all, |(bytes, piece, stays)| {
        runtime.block_on(async {
            let dialled = TcpStream::connect(address).await.unwrap();
            let (accepted, from) = listener.accept().await.unwrap();
            let begun = Instant::now();
            let other = speak(dialled, &bytes, piece, stays);
            let accept = tls::accept(&owner, accepted, from.to_string(), PATIENCE);
            tokio::pin!(other, accept);
            // The other end may have hung up long before.
            let out = tokio::select! { out = &mut accept => out, () = &mut other => accept.await };
            match out {
                Err(Error::Incoming { kind, .. }) => prop_assert!(!kind.to_string().is_empty()),
                Err(other) => return Err(TestCaseError::fail(format!("{other}"))),
                Ok(_) => return Err(TestCaseError::fail("let in")),
            }
            prop_assert!(begun.elapsed() < IN_TIME, "after {:?}", begun.elapsed());
            Ok(())
        })
    });
}

/// A server that is none, or whose messages were altered on their way.
#[test]
fn one_who_is_dialled() {
    let site = Site::new();
    let (owner, client) = (site.party(Role::Owner), site.party(Role::Client));
    let runtime = runtime();
    let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
    let address = listener.local_addr().unwrap().to_string().parse().unwrap();
    let noise = prop::collection::vec(any::<u8>(), 0..300);
    fuzz("handshake, as the one who dials", &(noise, 1usize..400), |(bytes, piece)| {
        runtime.block_on(async {
            let begun = Instant::now();
            let server = async {
                let (tcp, _) = listener.accept().await.unwrap();
                speak(tcp, &bytes, piece, false).await;
            };
            let (out, ()) = tokio::join!(tls::connect(&client, &address, Role::Owner, PATIENCE), server);
            let blamed = matches!(out, Err(Error::Peer { role: Role::Owner, .. }));
            prop_assert!(blamed);
            prop_assert!(begun.elapsed() < IN_TIME);
            Ok(())
        })
    });
    // Somebody in between alters one byte of what one side says.
    let all = (any::<bool>(), 0usize..3000, 0u8..8);
    let (whole, broken) = (std::cell::Cell::new(0u64), std::cell::Cell::new(0u64));
    fuzz("handshake, altered on its way", &all, |(of_client, at, bit)| {
        runtime.block_on(async {
            let middle = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let dial = middle.local_addr().unwrap().to_string().parse().unwrap();
            let begun = Instant::now();
            let relay = async {
                let (near, _) = middle.accept().await.unwrap();
                let far = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
                let ((near_in, near_out), (far_in, far_out)) = (near.into_split(), far.into_split());
                let up = pass_on(near_in, far_out, of_client.then_some((at, bit)));
                let down = pass_on(far_in, near_out, (!of_client).then_some((at, bit)));
                tokio::join!(up, down);
            };
            let server = async {
                let (tcp, from) = listener.accept().await.unwrap();
                // The greeting that follows every handshake of ours: with it both ends know of each other's success.
                let mut c = tls::accept(&owner, tcp, from.to_string(), PATIENCE).await?;
                c.send("test", &[1; 1500]).await?;
                c.recv("test", 2000).await
            };
            let client = async {
                let mut c = tls::connect(&client, &dial, Role::Owner, PATIENCE).await?;
                let heard = c.recv("test", 2000).await?;
                c.send("test", &[1; 1500]).await?;
                Ok::<_, Error>(heard)
            };
            let ends = async { tokio::join!(server, client) };
            tokio::pin!(relay, ends);
            let (a, b) = tokio::select! { both = &mut ends => both, () = &mut relay => ends.await };
            prop_assert!(begun.elapsed() < IN_TIME);
            // What arrives is what was sent; otherwise it is an error, and never anything else.
            for heard in [a, b] {
                match heard {
                    Ok(heard) => {
                        whole.set(whole.get() + 1);
                        prop_assert!(heard == vec![1; 1500]);
                    }
                    Err(Error::Incoming { .. } | Error::Peer { .. }) => broken.set(broken.get() + 1),
                    Err(other) => return Err(TestCaseError::fail(format!("{other}"))),
                }
            }
            Ok(())
        })
    });
    assert!(whole.get() > 0 && broken.get() > 0, "{} {}", whole.get(), broken.get());
}

async fn pass_on(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    alter: Option<(usize, u8)>,
) {
    let (mut buffer, mut before) = ([0; 4096], 0);
    while let Ok(n) = from.read(&mut buffer).await {
        if n == 0 {
            break;
        }
        if let Some((at, bit)) = alter
            && (before..before + n).contains(&at)
        {
            buffer[at - before] ^= 1 << bit;
        }
        before += n;
        if to.write_all(&buffer[..n]).await.is_err() {
            break;
        }
    }
    let _ = to.shutdown().await;
}
