//! The network: our own port, and every peer that this party dials.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant, SystemTime};

use serde::Serialize;
use tokio::net::TcpStream;

use super::super::certs::Host;
use super::super::config::{Address, Config, Tls as TlsConfig};
use super::super::party::{reply, unexpected};
use super::super::tls::{self, ALPN, Secured, Tls};
use super::super::wire::{self, ECHO_LIMIT, Echo, Hello, Reply, Status};
use super::{Finding, remedy, remedy_of};
use crate::error::{Error, PeerFault, Result};
use crate::party::Role;

/// Echoes behind a round-trip time: their median.
const ECHOES: usize = 21;
/// What a first idea of the bandwidth is had from.
const SAMPLE: u32 = 256 << 10;
/// The longest status: a store of a thousand preparations.
const STATUS_LIMIT: u32 = 64 << 10;
/// The large echoes are left out where they would take longer than this: peers wait no longer than for a handshake.
const PATIENCE_S: f64 = 1.5;
/// Clock differences that certificates and logs suffer from.
const CLOCK_WARN_S: f64 = 5.0;
const CLOCK_FAIL_S: f64 = 60.0;

/// A link to a peer, as measured.
#[derive(Clone, Debug, Serialize)]
pub struct LinkFigures {
    /// The peer.
    pub peer: String,
    /// Where it was dialled.
    pub address: String,
    /// Median round-trip time of small messages, in milliseconds.
    pub rtt_ms: f64,
    /// From here to the peer, Mbit/s.
    pub to_peer_mbit_s: f64,
    /// From the peer to here, Mbit/s.
    pub from_peer_mbit_s: f64,
}

/// What came of meeting everybody.
pub(super) struct Met {
    pub findings: Vec<Finding>,
    pub links: Vec<LinkFigures>,
    /// What peers say of themselves.
    pub peers: Vec<(Role, Status)>,
    /// The same of our own daemon, if it runs.
    pub own: Option<Status>,
}

/// Meets everybody at the same time, then measures one link after the other: they may share a line.
pub(super) fn meet(config: &Config) -> Result<Met> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.map_err(|e| Error::io("starting the network", e))?;
    // What is wrong with the files is a finding of its own; without them, ports can still be tried.
    let tls = Tls::load(config.tls(), config.role()).ok();
    let timeout = config.limits().handshake_timeout;
    let peers = config.peers();
    runtime.block_on(async {
        let peer = async |i: usize| match peers.get(i) {
            Some((role, address)) => Some(visit(tls.as_ref(), *role, address, timeout).await),
            None => None,
        };
        let ((own, mut findings), first, second) = tokio::join!(own_port(config, timeout), peer(0), peer(1));
        let mut met = Met { findings: Vec::new(), links: Vec::new(), peers: Vec::new(), own };
        for ((role, address), visit) in peers.iter().zip([first, second].into_iter().flatten()) {
            findings.extend(visit.findings);
            if let Some((status, rtt)) = visit.answer {
                met.peers.push((*role, status));
                if let Some(tls) = &tls {
                    let (finding, link) = measure(tls, *role, address, timeout, rtt).await;
                    findings.push(finding);
                    met.links.extend(link);
                }
            }
        }
        match config.role() {
            Role::Client => findings.push(Finding::ok(
                "link of owner and helper",
                "not visible from the client: the doctor at the owner measures it",
            )),
            Role::Helper => findings.push(Finding::ok(
                "peers",
                "the helper dials nobody: the doctors at the owner and at the clients try the links to it",
            )),
            Role::Owner => {}
        }
        met.findings = findings;
        Ok(met)
    })
}

/// Whether our port can be listened at, or our daemon does.
async fn own_port(config: &Config, timeout: Duration) -> (Option<Status>, Vec<Finding>) {
    let Some(listen) = config.listen() else { return (None, Vec::new()) };
    let check = "own port";
    if listen.port() == 0 {
        let found = format!("[listen] address = \"{listen}\": the system chooses a port, which peers cannot know");
        return (None, vec![Finding::warn(check, found, "give a port in [listen] address, such as 7001")]);
    }
    let error = match std::net::TcpListener::bind(listen) {
        Ok(_) => return (None, vec![Finding::ok(check, format!("{listen} is free; the daemon is not running"))]),
        Err(error) => error,
    };
    let finding = |found: String, remedy: &str| (None, vec![Finding::fail(check, found, remedy)]);
    match error.kind() {
        std::io::ErrorKind::AddrInUse => match ourselves(config, listen, timeout).await {
            Ok(status) => {
                let found = format!(
                    "our daemon (release {}) listens at {listen}, {} of {} sessions",
                    printable(&status.release),
                    status.sessions,
                    status.limit
                );
                (Some(status), vec![Finding::ok(check, found)])
            }
            // One that pins its peers does not count itself among them, and speaks TLS before it says so.
            Err(Error::Peer { kind: PeerFault::RefusesUs(_), .. }) if config.tls().ca.is_none() => {
                let found =
                    format!("our daemon listens at {listen}; it trusts pinned peers alone, so it tells us nothing");
                (None, vec![Finding::ok(check, found)])
            }
            Err(other) => finding(
                format!("{listen} is in use by something that is not this party's daemon ({other})"),
                "end that program, or give another port in [listen] address and in the [peers] of all who dial it",
            ),
        },
        std::io::ErrorKind::AddrNotAvailable => finding(
            format!("{listen} is no address of this machine"),
            "give one of its own addresses in [listen] address, or 0.0.0.0 for all",
        ),
        std::io::ErrorKind::PermissionDenied => {
            finding(format!("{listen}: {error}"), "ports below 1024 are the system's: give a higher one")
        }
        _ => finding(format!("{listen}: {error}"), "correct [listen] address"),
    }
}

/// Dials our own port, trusting our own certificate only: whoever answers has our key.
async fn ourselves(config: &Config, listen: SocketAddr, timeout: Duration) -> Result<Status> {
    let files = TlsConfig { ca: None, pinned: vec![config.tls().certificate.clone()], ..config.tls().clone() };
    let tls = Tls::load(&files, config.role())?;
    let ip = match listen.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip => ip,
    };
    let address = Address { host: Host::Ip(ip), port: listen.port() };
    let mut c = tls::connect(&tls, &address, config.role(), timeout).await?;
    let status = ask(&mut c).await?;
    c.close().await;
    Ok(status)
}

struct Visit {
    findings: Vec<Finding>,
    /// What the peer says of itself, and the round-trip time.
    answer: Option<(Status, Duration)>,
}

async fn ask(c: &mut Secured) -> Result<Status> {
    c.send("probe", &wire::encode(&Hello::Probe)?).await?;
    match reply(c, "probe", STATUS_LIMIT).await? {
        Reply::Status(status) if status.clock.is_finite() => Ok(status),
        _ => Err(unexpected(c, "probe")),
    }
}

/// Reachability, identity, version, clock and round-trip time of a peer.
async fn visit(tls: Option<&Tls>, role: Role, address: &Address, timeout: Duration) -> Visit {
    let name = role.to_string();
    let Some(tls) = tls else {
        return Visit { findings: vec![bare(role, address, timeout).await], answer: None };
    };
    match greet(tls, role, address, timeout).await {
        Ok((c, status, before, after, rtt)) => {
            let mut findings = vec![
                Finding::ok(&name, format!("{} at {address}", c.peer)),
                version(role, &status),
                clock(role, status.clock, before, after, rtt),
            ];
            c.close().await;
            if status.sessions >= status.limit {
                let found = format!("the {role} serves as many sessions as it takes, {}", status.limit);
                let remedy = "wait for one to end, or raise [limits] sessions there";
                findings.push(Finding::warn(format!("sessions of the {role}"), found, remedy));
            }
            Visit { findings, answer: Some((status, rtt)) }
        }
        Err(error) => {
            let remedy = match &error {
                Error::Peer { kind, .. } => remedy_of(kind, role),
                other => remedy(other).into(),
            };
            Visit { findings: vec![Finding::fail(name, error.to_string(), remedy)], answer: None }
        }
    }
}

/// Without a usable certificate of our own: whether anything answers at all.
async fn bare(role: Role, address: &Address, timeout: Duration) -> Finding {
    let own = "with [tls] here as it is, only its port can be tried";
    let cause = match tokio::time::timeout(timeout, TcpStream::connect(address.to_string())).await {
        Ok(Ok(_)) => {
            let found = format!("{address} takes connections; {own}");
            return Finding::warn(role.to_string(), found, "correct this party's own certificate and key first");
        }
        Ok(Err(e)) => e.to_string(),
        Err(_) => format!("no answer within {} s", timeout.as_secs_f64()),
    };
    let kind = PeerFault::Unreachable { address: address.to_string(), cause };
    Finding::fail(role.to_string(), format!("the {role} {kind}; {own}"), remedy_of(&kind, role))
}

type Greeting = (Secured, Status, SystemTime, SystemTime, Duration);

async fn greet(tls: &Tls, role: Role, address: &Address, timeout: Duration) -> Result<Greeting> {
    let mut c = tls::connect(tls, address, role, timeout).await?;
    let before = SystemTime::now();
    let status = ask(&mut c).await?;
    let after = SystemTime::now();
    let mut times = Vec::with_capacity(ECHOES);
    for _ in 0..ECHOES {
        times.push(echo(&mut c, 1, 0).await?);
    }
    times.sort_unstable();
    Ok((c, status, before, after, times[ECHOES / 2]))
}

/// Sends and receives so many bytes.
async fn echo(c: &mut Secured, want: u32, filler: usize) -> Result<Duration> {
    let message = wire::encode(&Echo { want, filler: vec![0; filler] })?;
    let begun = Instant::now();
    c.send("echo", &message).await?;
    let back = c.recv("echo", want).await?;
    if back.len() != want as usize {
        return Err(c.blame("echo", PeerFault::Length { want: want as usize, got: back.len() }));
    }
    Ok(begun.elapsed())
}

fn printable(text: &str) -> String {
    text.chars().filter(char::is_ascii_graphic).take(32).collect()
}

fn version(role: Role, status: &Status) -> Finding {
    let check = format!("version of the {role}");
    let (ours, theirs) = (env!("CARGO_PKG_VERSION"), printable(&status.release));
    if theirs == ours {
        return Finding::ok(check, format!("release {theirs}, protocol {ALPN}"));
    }
    let found = format!("the {role} runs release {theirs}, here it is {ours}; both speak {ALPN}");
    Finding::warn(check, found, "run the same release at all three parties")
}

fn clock(role: Role, theirs: f64, before: SystemTime, after: SystemTime, rtt: Duration) -> Finding {
    let check = format!("clock of the {role}");
    let since = |t: SystemTime| t.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64();
    // It was read half a round trip before its answer came; if the answer took long, that is all there is to know.
    let read = since(after) - rtt.as_secs_f64() / 2.0;
    let unsure = (since(after) - since(before) - rtt.as_secs_f64()).max(0.0);
    let ahead = theirs - read;
    let beyond = ahead.abs() - unsure;
    let which = if ahead > 0.0 { "ahead of" } else { "behind" };
    let found = format!("the {role}'s clock is {:.1} s {which} ours", ahead.abs());
    let remedy = format!("synchronise both clocks (NTP: chrony, systemd-timesyncd), at the {role} and here");
    if beyond > CLOCK_FAIL_S {
        Finding::fail(check, format!("{found}: certificates are taken for expired, or for not yet valid"), remedy)
    } else if beyond > CLOCK_WARN_S {
        Finding::warn(check, found, remedy)
    } else {
        Finding::ok(check, format!("{:+.3} s from ours", ahead))
    }
}

async fn measure(
    tls: &Tls,
    role: Role,
    address: &Address,
    timeout: Duration,
    rtt: Duration,
) -> (Finding, Option<LinkFigures>) {
    let check = format!("link to the {role}");
    match rates(tls, role, address, timeout, rtt).await {
        Ok([up, down]) => {
            let link = LinkFigures {
                peer: role.to_string(),
                address: address.to_string(),
                rtt_ms: rtt.as_secs_f64() * 1e3,
                to_peer_mbit_s: up / 1e6,
                from_peer_mbit_s: down / 1e6,
            };
            let found = format!(
                "round trip {:.2} ms; {:.0} Mbit/s from here to the {role}, {:.0} Mbit/s from the {role} to here",
                link.rtt_ms, link.to_peer_mbit_s, link.from_peer_mbit_s
            );
            (Finding::ok(check, found), Some(link))
        }
        Err(error) => {
            let remedy = "the link gives way under load: look for a proxy, a broken MTU, or a very slow line";
            (Finding::warn(check, error.to_string(), remedy), None)
        }
    }
}

/// Bits per second, there and back.
async fn rates(tls: &Tls, role: Role, address: &Address, timeout: Duration, rtt: Duration) -> Result<[f64; 2]> {
    let mut c = tls::connect(tls, address, role, timeout).await?;
    ask(&mut c).await?;
    let mut out = [0.0; 2];
    for (to_peer, rate) in [true, false].into_iter().zip(&mut out) {
        for bytes in [SAMPLE, ECHO_LIMIT] {
            let took = match to_peer {
                true => echo(&mut c, 1, bytes as usize).await?,
                false => echo(&mut c, bytes, 0).await?,
            };
            // What a round trip takes is no matter of bandwidth.
            let seconds = took.saturating_sub(rtt).max(Duration::from_micros(1)).as_secs_f64();
            *rate = 8.0 * f64::from(bytes) / seconds;
            if 8.0 * f64::from(ECHO_LIMIT) / *rate > PATIENCE_S {
                break;
            }
        }
    }
    c.close().await;
    Ok(out)
}
