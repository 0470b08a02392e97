//! `trefoil doctor` finds what keeps a deployment from working, with a remedy for each finding. Most peers here are servers of
//! this process, which say of themselves what a test wants them to.

#[path = "deployment/support.rs"]
#[allow(dead_code)] // of the deployment tests
mod support;

use std::net::TcpListener;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::Value;
use support::{Site, Trio, day, preparation, run, trefoil};
use tokio_rustls::TlsAcceptor;
use trefoil::deploy::certs::{Authority, Validity, now};
use trefoil::deploy::config::Config;
use trefoil::deploy::tls::{self, Secured, Tls};
use trefoil::deploy::wire::{self, ECHO_LIMIT, Echo, Hello, Reply, Status};
use trefoil::model::store::PublicManifest;
use trefoil::party::Role;

const PATIENCE: Duration = Duration::from_secs(10);

/// What the doctor says, and whether it is content.
fn doctor(config: &Path) -> (Value, bool) {
    let out = run(trefoil().args(["doctor", "--json", "--config"]).arg(config));
    let said: Value = serde_json::from_slice(&out.stdout).unwrap_or_else(|e| {
        panic!("{e}: {} {}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr))
    });
    for finding in said["findings"].as_array().unwrap() {
        let advised = finding["remedy"].as_str().is_some_and(|r| !r.is_empty());
        assert_eq!(advised, finding["status"] != "ok", "{finding}");
    }
    let fails = said["findings"].as_array().unwrap().iter().any(|f| f["status"] == "fail");
    assert_eq!(out.status.code(), Some(i32::from(fails)), "{said:#}");
    (said, out.status.success())
}

/// There must be a finding on `check` of this status that speaks of all `parts`.
#[track_caller]
fn finds(said: &Value, check: &str, status: &str, parts: &[&str]) {
    let all = said["findings"].as_array().unwrap();
    let is = |f: &&Value| {
        let text = f["found"].as_str().unwrap();
        f["check"] == check && f["status"] == status && parts.iter().all(|p| text.contains(p))
    };
    assert!(all.iter().any(|f| is(&f)), "no {status} of {check} with {parts:?} in {said:#}");
}

/// A peer that answers probes.
struct Fake {
    address: String,
    runtime: Option<tokio::runtime::Runtime>,
}

impl Drop for Fake {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

fn id() -> String {
    PublicManifest::read(&preparation().join("manifest.json")).unwrap().id.to_string()
}

/// Seconds since 1970, and as many more.
fn clock(more: f64) -> f64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs_f64() + more
}

fn healthy() -> Status {
    let release = env!("CARGO_PKG_VERSION").into();
    Status { release, preparations: vec![id()], sessions: 0, limit: 8, clock: 0.0, provisioned: true }
}

async fn answer(mut c: Secured, status: Status) -> trefoil::Result<()> {
    let hello = c.recv("test", wire::SHORT).await?;
    assert!(matches!(wire::decode(&hello), Some(Hello::Probe)));
    // The clock of a status is that much off.
    let status = Status { clock: clock(status.clock), ..status };
    c.send("test", &wire::encode(&Reply::Status(status))?).await?;
    loop {
        let echo: Echo = wire::decode(&c.recv("test", ECHO_LIMIT + wire::SHORT).await?).unwrap();
        c.send("test", &vec![0; echo.want as usize]).await?;
    }
}

impl Fake {
    /// Of role `role`, with the certificate `identity` of the site.
    fn start(site: &Site, role: Role, identity: &str, status: Status) -> Fake {
        let config = site.config("fake", role, identity, "127.0.0.1:0", "", "127.0.0.1:1");
        let config = Config::load(&config).unwrap();
        let tls = Arc::new(Tls::load(config.tls(), role).unwrap());
        Fake::serve(move |tcp| {
            let (tls, status) = (Arc::clone(&tls), status.clone());
            async move {
                if let Ok(c) = tls::accept(&tls, tcp, "doctor".into(), PATIENCE).await {
                    let _ = answer(c, status).await;
                }
            }
        })
    }

    fn serve<F: Future<Output = ()> + Send + 'static>(
        each: impl Fn(tokio::net::TcpStream) -> F + Send + 'static,
    ) -> Fake {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = runtime.block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap().to_string();
        runtime.spawn(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                tokio::spawn(each(tcp));
            }
        });
        Fake { address, runtime: Some(runtime) }
    }

    fn pair(site: &Site, owner: Status, helper: Status) -> [Fake; 2] {
        [Fake::start(site, Role::Owner, "owner", owner), Fake::start(site, Role::Helper, "helper", helper)]
    }
}

fn site() -> Site {
    let mut site = Site::new();
    site.limits = "timeout_s = 5\nhandshake_timeout_s = 10\n".into();
    site
}

/// The doctor at a client with this certificate, between these two.
fn at_client(site: &Site, identity: &str, [owner, helper]: [&str; 2]) -> (Value, bool) {
    doctor(&site.config("client", Role::Client, identity, "", owner, helper))
}

#[test]
fn a_healthy_trio() {
    let mut site = site();
    site.limits += "sessions = 2\nprompt_tokens = 64\nrun_ahead_mb = 16\n";
    let trio = Trio::at(site);
    for config in [&trio.client, &trio.owner_config, &trio.helper_config] {
        let (said, content) = doctor(config);
        assert!(content, "{said:#}");
        for check in ["configuration", "certificate", "key", "certificate issuer", "permissions"] {
            finds(&said, check, "ok", &[]);
        }
        finds(&said, "memory limit", "ok", &[]);
    }
    let (said, _) = doctor(&trio.client);
    for peer in ["owner", "helper"] {
        for check in ["", "version of the ", "clock of the ", "link to the ", "preparation at the "] {
            finds(&said, &format!("{check}{peer}"), "ok", &[]);
        }
    }
    finds(&said, "preparation", "ok", &["recomputed"]);
    finds(&said, "link of owner and helper", "ok", &["the doctor at the owner"]);
    assert_eq!(said["links"].as_array().unwrap().len(), 2);
    for link in said["links"].as_array().unwrap() {
        assert!(link["rtt_ms"].as_f64().unwrap() > 0.0, "{link}");
        assert!(link["to_peer_mbit_s"].as_f64().unwrap() > 1.0, "{link}");
        assert!(link["from_peer_mbit_s"].as_f64().unwrap() > 1.0, "{link}");
    }
    assert!(said["prediction"]["token_sustained_ms"].as_f64().unwrap() > 0.0, "{said:#}");
    // The daemons run, and are known for our own.
    let (said, _) = doctor(&trio.owner_config);
    finds(&said, "own port", "ok", &["our daemon"]);
    finds(&said, "preparation at the helper", "ok", &[]);
    let (said, _) = doctor(&trio.helper_config);
    finds(&said, "own port", "ok", &["our daemon"]);
    finds(&said, "preparations", "ok", &["every chunk verified"]);

    let out = run(trefoil().args(["doctor", "--config"]).arg(&trio.owner_config));
    let text = String::from_utf8(out.stdout).unwrap();
    assert!(text.contains("ms per token") && text.contains(" 0 failures"), "{text}");
    println!("{text}");
    trio.works();

    // Another preparation in the owner's configuration than its daemon serves, and the helper has.
    let other = trio.site.path("other");
    support::prepare(&other, &["--private-layers", "1"]);
    let config = std::fs::read_to_string(&trio.owner_config).unwrap();
    let there = preparation().display().to_string();
    std::fs::write(&trio.owner_config, config.replace(&there, &other.display().to_string())).unwrap();
    let (said, _) = doctor(&trio.owner_config);
    finds(&said, "preparation of our daemon", "fail", &[&id()]);
    finds(&said, "preparation at the helper", "fail", &["differs", &id()]);
    // A public directory that is not the one of the owner's preparation.
    let config = std::fs::read_to_string(&trio.client).unwrap();
    std::fs::write(&trio.client, config.replace(&there, &other.display().to_string())).unwrap();
    let (said, _) = doctor(&trio.client);
    finds(&said, "preparation at the owner", "fail", &["differs", &id()]);
    finds(&said, "preparation at the helper", "fail", &["differs", &id()]);
}

#[test]
fn wrong_ca() {
    let site = site();
    let other = Authority::new("Another authority", Validity::days(30, now())).unwrap();
    let peers = Fake::pair(&site, healthy(), healthy());
    let addresses = [&*peers[0].address, &*peers[1].address];
    // Ours is signed by another: found before anybody dials, and the peers say so too.
    site.certify("stranger", Role::Client, &other, Validity::days(20, now()));
    let (said, _) = at_client(&site, "stranger", addresses);
    finds(&said, "certificate issuer", "fail", &["Another authority", "ca.pem"]);
    finds(&said, "owner", "fail", &["refused our certificate"]);
    finds(&said, "helper", "fail", &["refused our certificate"]);
    // The peer's is: ours is the wrong list of authorities.
    std::fs::write(site.path("ca.pem"), other.certificate_pem()).unwrap();
    let (said, _) = at_client(&site, "stranger", addresses);
    finds(&said, "certificate issuer", "ok", &[]);
    finds(&said, "owner", "fail", &["neither pinned nor signed by our CA"]);
}

#[test]
fn expired_certificates() {
    let site = site();
    let past = Validity { not_before: day(-20), not_after: day(-2) };
    let peers = Fake::pair(&site, healthy(), healthy());
    site.certify("late", Role::Client, &site.ca, past);
    let (said, _) = at_client(&site, "late", [&peers[0].address, &peers[1].address]);
    finds(&said, "certificate dates", "fail", &["expired on"]);
    finds(&said, "certificate issuer", "ok", &[]);
    finds(&said, "owner", "fail", &["refused our certificate"]);
    // The helper's; ours ends in three weeks.
    site.certify("late-helper", Role::Helper, &site.ca, past);
    let late = Fake::start(&site, Role::Helper, "late-helper", healthy());
    let (said, _) = at_client(&site, "client", [&peers[0].address, &late.address]);
    finds(&said, "certificate dates", "warn", &["expires in"]);
    finds(&said, "owner", "ok", &[]);
    finds(&said, "helper", "fail", &["its certificate expired on"]);
}

#[test]
fn swapped_roles() {
    let site = site();
    let peers = Fake::pair(&site, healthy(), healthy());
    // The addresses.
    let (said, _) = at_client(&site, "client", [&peers[1].address, &peers[0].address]);
    finds(&said, "owner", "fail", &["the helper's where the owner's belongs"]);
    finds(&said, "helper", "fail", &["the owner's where the helper's belongs"]);
    // The files: with the owner's certificate nobody is a client, and ports can still be tried.
    let (said, _) = at_client(&site, "owner", [&peers[0].address, "127.0.0.1:1"]);
    finds(&said, "certificate", "fail", &["the owner's certificate", "role is client"]);
    finds(&said, "owner", "warn", &["takes connections"]);
    finds(&said, "helper", "fail", &["cannot be reached"]);
}

#[test]
fn closed_and_taken_ports() {
    let mut site = site();
    // As long as one who says nothing is listened to.
    site.limits = "handshake_timeout_s = 3\n".into();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let owner = Fake::start(&site, Role::Owner, "owner", healthy());
    let (said, _) = at_client(&site, "client", [&owner.address, &closed]);
    finds(&said, "owner", "ok", &[]);
    finds(&said, "helper", "fail", &["cannot be reached", &closed]);
    // Somebody else at our own port, who says nothing.
    let listen = taken.local_addr().unwrap().to_string();
    let (said, _) = doctor(&site.config("owner", Role::Owner, "owner", &listen, "", &closed));
    finds(&said, "own port", "fail", &["something that is not this party's daemon"]);
    finds(&said, "helper", "fail", &["cannot be reached"]);
    finds(&said, "preparation", "ok", &[&id()]);
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let (said, _) = doctor(&site.config("helper", Role::Helper, "helper", &free, "", ""));
    finds(&said, "own port", "ok", &["is free"]);
}

#[test]
fn clocks() {
    let site = site();
    let off = |s: f64| Status { clock: s, ..healthy() };
    let peers = Fake::pair(&site, off(3600.0), off(-20.0));
    let (said, _) = at_client(&site, "client", [&peers[0].address, &peers[1].address]);
    finds(&said, "clock of the owner", "fail", &["ahead of ours", "36"]);
    finds(&said, "clock of the helper", "warn", &["behind ours"]);
    let behind = Fake::start(&site, Role::Helper, "helper", off(-3600.0));
    let (said, _) = doctor(&site.config("o", Role::Owner, "owner", "127.0.0.1:0", "", &behind.address));
    finds(&said, "clock of the helper", "fail", &["behind ours"]);
}

#[test]
fn another_preparation() {
    let site = site();
    let other = "00112233445566778899aabbccddeeff";
    let has = |ids: &[&str]| Status { preparations: ids.iter().map(|i| i.to_string()).collect(), ..healthy() };
    let peers = Fake::pair(&site, has(&[other]), has(&[other, &id()]));
    let (said, _) = at_client(&site, "client", [&peers[0].address, &peers[1].address]);
    finds(&said, "preparation at the owner", "fail", &["differs", other, &id()]);
    finds(&said, "preparation at the helper", "ok", &[]);
    // A helper that lacks the owner's: wrong if it has another's, and no more than a reminder before the first start.
    let lacks = Fake::start(&site, Role::Helper, "helper", has(&[other]));
    let (said, _) = doctor(&site.config("o", Role::Owner, "owner", "127.0.0.1:0", "", &lacks.address));
    finds(&said, "preparation at the helper", "fail", &["differs", other, &id()]);
    let empty = Fake::start(&site, Role::Helper, "helper", has(&[]));
    let (said, _) = doctor(&site.config("o", Role::Owner, "owner", "127.0.0.1:0", "", &empty.address));
    finds(&said, "preparation at the helper", "warn", &["differs", "none", &id()]);
}

#[test]
fn another_version() {
    let site = site();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let chain = vec![CertificateDer::from_pem_file(site.path("owner.pem")).unwrap()];
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, PrivateKeyDer::from_pem_file(site.path("owner.key")).unwrap())
        .unwrap();
    config.alpn_protocols = vec![format!("{}0", tls::ALPN).into_bytes()];
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let newer = Fake::serve(move |tcp| {
        let acceptor = acceptor.clone();
        async move {
            let _ = acceptor.accept(tcp).await;
        }
    });
    let older = Status { release: "0.0.9".into(), ..healthy() };
    let helper = Fake::start(&site, Role::Helper, "helper", older);
    let (said, _) = at_client(&site, "client", [&newer.address, &helper.address]);
    finds(&said, "owner", "fail", &["speaks protocol version", &format!("this is {}", tls::ALPN)]);
    finds(&said, "version of the helper", "warn", &["0.0.9", env!("CARGO_PKG_VERSION")]);
}

#[test]
fn too_little_memory() {
    let mut site = site();
    let helper = Fake::start(&site, Role::Helper, "helper", healthy());
    let limits = site.limits.clone();
    let mut owner = |more: &str| {
        site.limits = format!("{limits}{more}\n");
        doctor(&site.config("o", Role::Owner, "owner", "127.0.0.1:0", "", &helper.address)).0
    };
    let said = owner("memory_gb = 0.01");
    finds(&said, "memory limit", "fail", &["no session can be served", "10.0 MB"]);
    // By prediction: enough for some of the sessions that are promised; more than any machine has.
    let said = owner("sessions = 10000");
    finds(&said, "memory limit", "warn", &["sessions at once", "16.00 GB"]);
    finds(&said, "memory", "warn", &["available", "enough for"]);
}

#[test]
fn files_here() {
    use std::os::unix::fs::PermissionsExt;
    let site = site();
    let open = |name: &str| std::fs::set_permissions(site.path(name), std::fs::Permissions::from_mode(0o644)).unwrap();
    open("client.key");
    let (said, _) = at_client(&site, "client", ["127.0.0.1:1", "127.0.0.1:2"]);
    finds(&said, "key", "fail", &["mode 0644"]);
    finds(&said, "preparation", "ok", &[]);
    std::fs::write(site.path("bad.toml"), "role = \"owner\"\n[limits]\nsessions = 0\n").unwrap();
    let (said, content) = doctor(&site.path("bad.toml"));
    assert!(!content);
    finds(&said, "configuration", "fail", &["bad.toml:"]);
    // A public part that is not what its manifest says, and a store with others' eyes on it.
    let public = site.path("public");
    std::fs::create_dir(&public).unwrap();
    for entry in std::fs::read_dir(preparation().join("public")).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), public.join(entry.file_name())).unwrap();
    }
    let weights = public.join("model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    let at = bytes.len() - 3;
    bytes[at] ^= 1;
    std::fs::write(&weights, bytes).unwrap();
    let config = site.config("client", Role::Client, "client", "", "127.0.0.1:1", "127.0.0.1:2");
    let text = std::fs::read_to_string(&config).unwrap();
    let there = format!("{}/public", preparation().display());
    std::fs::write(&config, text.replace(&there, &public.display().to_string())).unwrap();
    let (said, _) = doctor(&config);
    finds(&said, "preparation", "fail", &["the public tensors have the hash"]);
    let helper = site.config("h", Role::Helper, "helper", "127.0.0.1:0", "", "");
    std::fs::create_dir(site.path("h.store")).unwrap();
    std::fs::set_permissions(site.path("h.store"), std::fs::Permissions::from_mode(0o777)).unwrap();
    let (said, _) = doctor(&helper);
    finds(&said, "permissions", "fail", &["change the directory", "0777"]);
    finds(&said, "own port", "warn", &["the system chooses"]);
}
