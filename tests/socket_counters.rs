//! The meter against the kernel: what it counts for a request over TLS is what the kernel's TCP sockets have sent, but for TLS
//! records and control messages. A process of its own, with all three parties in it, so that all its sockets are theirs.
#![cfg(target_os = "linux")]

#[allow(dead_code)]
#[path = "deployment/support.rs"]
mod support;

use std::os::fd::RawFd;
use std::time::Duration;

use support::*;
use trefoil::deploy::client::Remote;
use trefoil::deploy::party::{Daemon, Options};
use trefoil::party::Role;

/// `tcpi_bytes_sent` in the kernel's `struct tcp_info` (since Linux 4.19); the libc crate's ends before it.
const BYTES_SENT: usize = 200;

/// What this socket has sent, if it is one of TCP.
#[allow(unsafe_code)]
fn sent(fd: RawFd) -> Option<u64> {
    let mut info = [0u8; 512];
    let mut len = libc::socklen_t::try_from(info.len()).unwrap();
    // SAFETY: the kernel writes at most `len` bytes to `info`; a descriptor that is no socket is an error.
    let rc = unsafe { libc::getsockopt(fd, libc::IPPROTO_TCP, libc::TCP_INFO, info.as_mut_ptr().cast(), &raw mut len) };
    let field = info.get(BYTES_SENT..BYTES_SENT + 8)?;
    (rc == 0 && len as usize >= BYTES_SENT + 8).then(|| u64::from_ne_bytes(field.try_into().unwrap()))
}

/// By all sockets of this process.
fn kernel() -> u64 {
    let open = std::fs::read_dir("/proc/self/fd").unwrap();
    open.filter_map(|e| sent(e.ok()?.file_name().to_str()?.parse().ok()?)).sum()
}

#[test]
fn the_meter_counts_what_the_kernel_sends() {
    let site = Site::new();
    let any = "127.0.0.1:0";
    let helper =
        Daemon::start(&site.config("helper", Role::Helper, "helper", any, "", ""), Options::default()).unwrap();
    let at = helper.address().to_string();
    let owner = Daemon::start(&site.config("owner", Role::Owner, "owner", any, "", &at), Options::default()).unwrap();
    let client = site.config("client", Role::Client, "client", "", &owner.address().to_string(), &at);
    provisioned(&owner);
    let mut remote = Remote::open(&client, Options::default()).unwrap();
    let before = kernel();
    remote.generate(&prompt(), 24, 0.0, 0, &mut |_| true).unwrap();
    let after = kernel();
    let (_, links) = remote.finish().unwrap();
    let metered: u64 = links.values().map(|l| l.online_bytes + l.ahead_bytes).sum();
    let kernel = after - before;
    eprintln!("meter {metered} bytes, kernel {kernel} bytes");
    assert!(kernel >= metered, "TLS only adds");
    assert!((kernel - metered) * 50 <= metered, "2 %");
    for daemon in [owner, helper] {
        daemon.stop(Duration::from_secs(5));
    }
}
