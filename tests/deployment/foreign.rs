//! Peers that are not Trefoil, or another version of it: whoever meets one says who it was and what is wrong, in time, and the
//! daemons serve the next session.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::version::TLS13;
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection, StreamOwned};
use trefoil::deploy::certs::{Authority, Validity, now};
use trefoil::deploy::client::Remote;
use trefoil::deploy::party::Options;
use trefoil::deploy::tls::ALPN;
use trefoil::error::Error;
use trefoil::net::Abort;
use trefoil::party::Role;

use crate::support::*;

/// The version after ours.
static NEXT: LazyLock<String> = LazyLock::new(|| {
    let (name, version) = ALPN.rsplit_once('/').unwrap();
    format!("{name}/{}", version.parse::<u32>().unwrap() + 1)
});
const REFUSE: &str = "trefoil/refuse";

fn identity(site: &Site, name: &str) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
    let certificate = CertificateDer::from_pem_file(site.path(&format!("{name}.pem"))).unwrap();
    (vec![certificate], PrivateKeyDer::from_pem_file(site.path(&format!("{name}.key"))).unwrap())
}

fn protocols(names: &[&str]) -> Vec<Vec<u8>> {
    names.iter().map(|n| n.as_bytes().to_vec()).collect()
}

/// Dials with a Client's certificate.
fn client(site: &Site, address: &str, alpn: &[&str]) -> StreamOwned<ClientConnection, TcpStream> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(site.path("ca.pem")).unwrap()).unwrap();
    let (chain, key) = identity(site, "client");
    let builder = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()));
    let builder = builder.with_protocol_versions(&[&TLS13]).unwrap().with_root_certificates(roots);
    let mut config = builder.with_client_auth_cert(chain, key).unwrap();
    config.alpn_protocols = protocols(alpn);
    let connection = ClientConnection::new(Arc::new(config), ServerName::try_from("127.0.0.1").unwrap()).unwrap();
    StreamOwned::new(connection, TcpStream::connect(address).unwrap())
}

/// Serves one connection after the other.
fn listen(serve: impl Fn(TcpStream) + Send + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || listener.incoming().map_while(Result::ok).for_each(serve));
    address
}

type Served = StreamOwned<ServerConnection, TcpStream>;

/// Serves over TLS, with the certificate `name`.
fn listen_tls(site: &Site, name: &str, alpn: &[&str], serve: impl Fn(Served) + Send + 'static) -> String {
    let (chain, key) = identity(site, name);
    let builder = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()));
    let builder = builder.with_protocol_versions(&[&TLS13]).unwrap().with_no_client_auth();
    let mut config = builder.with_single_cert(chain, key).unwrap();
    config.alpn_protocols = protocols(alpn);
    let config = Arc::new(config);
    listen(move |tcp| serve(StreamOwned::new(ServerConnection::new(Arc::clone(&config)).unwrap(), tcp)))
}

/// Answers whatever comes first with these bytes.
fn answering(bytes: &[u8]) -> String {
    let bytes = bytes.to_vec();
    listen(move |mut tcp| {
        let _ = tcp.read(&mut [0; 4096]);
        let _ = tcp.write_all(&bytes);
        stay(tcp);
    })
}

/// Until the other side hangs up.
fn stay(mut from: impl Read) {
    let _ = io::copy(&mut from, &mut io::sink());
}

/// A control message.
fn say(to: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
    to.write_all(&(bytes.len() as u32).to_le_bytes())?;
    to.write_all(bytes)?;
    to.flush()
}

fn hear(from: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut len = [0; 4];
    from.read_exact(&mut len)?;
    let mut bytes = vec![0; u32::from_le_bytes(len) as usize];
    from.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// A Client at this configuration hears from or says of `role`, what the error's code is.
fn met(trio: &Trio, config: &Path, role: Role, code: &str) {
    let begun = Instant::now();
    let error = Remote::open(config, Options::default()).err().unwrap();
    // Five seconds are configured.
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    assert!(matches!(error, Error::Peer { role: blamed, .. } if blamed == role), "{error}");
    assert_eq!(error.code(), code, "{error}");
    // The command says the same.
    let out = run(&mut trio.generate(config, 4));
    let text = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(!out.status.success() && text.contains(&format!("error: {error}")), "{text}\n{error}");
}

/// A Client with such a server in the place of the Owner, then of the Helper; and an Owner with one in the Helper's place.
fn both_met(code: &str, server: impl Fn(&Site, Role) -> String) {
    let trio = Trio::new();
    let at_owner = server(&trio.site, Role::Owner);
    let config = trio.site.config("misled", Role::Client, "client", "", &at_owner, &trio.helper.address);
    met(&trio, &config, Role::Owner, code);
    let at_helper = server(&trio.site, Role::Helper);
    let config = trio.site.config("misled", Role::Client, "client", "", &trio.owner.address, &at_helper);
    met(&trio, &config, Role::Helper, code);
    let second = Party::start(&trio.site.config("second", Role::Owner, "owner", "127.0.0.1:0", "", &at_helper));
    let line = second.wait_code(code);
    assert!(line["error"].as_str().unwrap().starts_with("helper at step `"), "{line}");
    drop(second);
    trio.works();
}

#[test]
fn a_client_of_the_next_version() {
    let trio = Trio::new();
    for party in [&trio.owner, &trio.helper] {
        let logged = |at: &str| {
            let line = party.wait("the version", |l| l["address"] == at && l["code"] == "version");
            line["error"].as_str().unwrap().to_string()
        };
        let mut c = client(&trio.site, &party.address, &[NEXT.as_str(), REFUSE]);
        let at = c.sock.local_addr().unwrap().to_string();
        assert_eq!(hear(&mut c).unwrap(), ALPN.as_bytes());
        say(&mut c, NEXT.as_bytes()).unwrap();
        let error = logged(&at);
        assert!(error.starts_with("client at step `TLS handshake") && error.contains(&at), "{error}");
        assert!(error.contains(&format!("speaks protocol version {}, this is {ALPN}", *NEXT)), "{error}");
        // One that knows no way to say so.
        let mut c = client(&trio.site, &party.address, &[NEXT.as_str()]);
        let at = c.sock.local_addr().unwrap().to_string();
        assert!(hear(&mut c).is_err());
        assert!(logged(&at).starts_with(&at));
    }
    trio.works();
}

#[test]
fn a_server_of_the_next_version() {
    both_met("version", |site, role| {
        listen_tls(site, &role.to_string(), &[NEXT.as_str(), REFUSE], |mut c| {
            let _ = say(&mut c, NEXT.as_bytes());
            assert_eq!(hear(&mut c).unwrap(), ALPN.as_bytes());
            stay(c);
        })
    });
}

#[test]
fn a_server_whose_certificate_has_expired() {
    both_met("expired", |site, role| {
        let name = format!("late-{role}");
        site.certify(&name, role, &site.ca, Validity { not_before: day(-20), not_after: day(-1) });
        listen_tls(site, &name, &[ALPN], stay)
    });
}

#[test]
fn a_server_of_another_authority() {
    both_met("unknown-issuer", |site, role| {
        let name = format!("strange-{role}");
        let other = Authority::new("Another authority", Validity::days(30, now())).unwrap();
        site.certify(&name, role, &other, Validity::days(10, now()));
        listen_tls(site, &name, &[ALPN], stay)
    });
}

#[test]
fn a_server_whose_certificate_is_revoked() {
    let trio = Trio::new();
    for role in [Role::Owner, Role::Helper] {
        let config = trio.site.config("wary", Role::Client, "client", "", &trio.owner.address, &trio.helper.address);
        revoke(&config, &trio.site.fingerprint(&role.to_string()));
        met(&trio, &config, role, "revoked");
    }
    trio.works();
}

#[test]
fn a_server_with_tls_1_2_only() {
    // A fatal alert: protocol version.
    both_met("old-tls", |_, _| answering(&[21, 3, 3, 0, 2, 2, 70]));
}

#[test]
fn a_server_without_tls() {
    both_met("not-tls", |_, _| answering(b"HTTP/1.1 400 Bad Request\r\n\r\n"));
}

#[test]
fn a_server_that_answers_with_random_bytes() {
    both_met("not-tls", |_, _| answering(&noise(1)));
}

#[test]
fn a_server_that_says_nothing() {
    both_met("timeout", |_, _| listen(stay));
}

#[test]
fn a_server_that_hangs_up() {
    both_met("closed", |_, _| listen(drop));
}

/// Good TLS and a good certificate; what comes after the first control message is up to `serve`.
fn insider(site: &Site, role: Role, serve: impl Fn(Served) + Send + 'static) -> String {
    listen_tls(site, &role.to_string(), &[ALPN], move |mut c| {
        if hear(&mut c).is_ok() {
            serve(c);
        }
    })
}

#[test]
fn a_server_that_announces_too_long_a_message() {
    both_met("oversize", |site, role| {
        insider(site, role, |mut c| {
            let _ = c.write_all(&u32::MAX.to_le_bytes());
            stay(c);
        })
    });
}

#[test]
fn a_server_whose_message_is_one_byte_short() {
    both_met("malformed", |site, role| {
        insider(site, role, |mut c| {
            // The text of a refusal that promises a number.
            let _ = say(&mut c, &[0, 1]);
            stay(c);
        })
    });
}

#[test]
fn a_server_that_closes_in_the_middle_of_a_message() {
    both_met("closed", |site, role| {
        insider(site, role, |mut c| {
            let _ = c.write_all(&[100, 0, 0, 0, 1, 2, 3]);
            let _ = c.flush();
        })
    });
}

#[test]
fn an_owner_that_stalls_before_the_session() {
    let trio = Trio::new();
    let owner = insider(&trio.site, Role::Owner, stay);
    let config = trio.site.config("misled", Role::Client, "client", "", &owner, &trio.helper.address);
    let begun = Instant::now();
    let error = Remote::open(&config, Options::default()).err().unwrap();
    // The Helper waits for the Owner as well, less long than the Client, and says so instead of just hanging up.
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    assert_eq!(Abort::of(&error), Abort { blamed: Some(Role::Owner), code: "timeout".into() }, "{error}");
    trio.works();
}
