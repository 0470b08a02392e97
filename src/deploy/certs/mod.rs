//! Certificates: how the parties know each other.
//!
//! A party's role is in its certificate, as the subject alternative name `trefoil:owner`, `trefoil:client` or
//! `trefoil:helper`, beside the hosts it may be dialled at; whoever signs it vouches for both. A key stays on the machine
//! that made it: what travels is a [request](Request::csr), and what comes back is signed by an [`Authority`]. Without an
//! authority, peers pin each other's [self-signed](Request::self_signed) certificates.

mod authority;
mod details;
mod key;
mod request;
#[cfg(test)]
mod tests;

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use rustls::pki_types::{DnsName, ServerName};
use sha2::{Digest, Sha256};
use time::OffsetDateTime;

use crate::error::{Error, Result};

pub use authority::{AUTHORITY_DAYS, Authority, Signed};
pub use details::Details;
pub use key::{Key, read_text, write_new, write_private, write_renewed};
pub use request::{CERTIFICATE_DAYS, Request};

/// How far back a new certificate's validity begins: the clocks of the peers may be that much behind the signer's.
const BACKDATE_S: i64 = 300;
const DAY_S: i64 = 86_400;

/// SHA-256 of a certificate's DER; written `sha256:` and 64 lower-case hex digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Fingerprint([u8; 32]);

impl Fingerprint {
    /// That of a certificate.
    #[must_use]
    pub fn of(der: &[u8]) -> Self {
        Fingerprint(Sha256::digest(der).into())
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("sha256:")?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Fingerprint {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = || {
            Error::Config(
                "not a fingerprint: expected sha256: and 64 hex digits, as `trefoil certs show` prints it".into(),
            )
        };
        let hex = text.strip_prefix("sha256:").ok_or_else(wrong)?.as_bytes();
        if hex.len() != 64 {
            return Err(wrong());
        }
        let digit = |byte: u8| char::from(byte).to_digit(16).ok_or_else(wrong);
        let mut out = [0; 32];
        for (byte, pair) in out.iter_mut().zip(hex.chunks_exact(2)) {
            *byte = (digit(pair[0])? * 16 + digit(pair[1])?) as u8;
        }
        Ok(Fingerprint(out))
    }
}

/// A host as certificates and configurations name it: without a port.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Host {
    /// A DNS name, in lower case.
    Dns(String),
    /// An address.
    Ip(IpAddr),
}

impl Host {
    /// The name to verify a peer's certificate against.
    ///
    /// # Errors
    /// [`Error::Config`] if a [`Host::Dns`] that was not parsed is no DNS name.
    pub fn server_name(&self) -> Result<ServerName<'static>> {
        match self {
            Host::Ip(ip) => Ok(ServerName::IpAddress((*ip).into())),
            Host::Dns(name) => DnsName::try_from(name.clone()).map(ServerName::DnsName).map_err(|_| not_a_host(name)),
        }
    }
}

fn not_a_host(text: &str) -> Error {
    Error::Config(format!(
        "{text:?} is no host: expected a DNS name or an IP address, without scheme, port or wildcard (owner.example, 192.0.2.7, ::1)"
    ))
}

impl FromStr for Host {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        if let Ok(ip) = text.parse() {
            return Ok(Host::Ip(ip));
        }
        // Digits and dots that are no address are a mistyped one, although they would pass as a DNS name.
        if text.bytes().all(|b| b.is_ascii_digit() || b == b'.') {
            return Err(not_a_host(text));
        }
        let name = DnsName::try_from(text).map_err(|_| not_a_host(text))?;
        Ok(Host::Dns(name.as_ref().to_ascii_lowercase()))
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Host::Dns(name) => f.write_str(name),
            Host::Ip(ip) => ip.fmt(f),
        }
    }
}

/// From when to when a certificate is valid, in seconds of Unix time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    /// First second.
    pub not_before: i64,
    /// Last second.
    pub not_after: i64,
}

impl Validity {
    /// The given number of days from `now` (Unix time), backdated by five minutes for clocks that are behind.
    #[must_use]
    pub fn days(days: u32, now: i64) -> Self {
        Validity { not_before: now - BACKDATE_S, not_after: now + i64::from(days) * DAY_S }
    }

    fn dates(self) -> Result<(OffsetDateTime, OffsetDateTime)> {
        let date = |seconds| OffsetDateTime::from_unix_timestamp(seconds);
        match (date(self.not_before), date(self.not_after)) {
            // The ASN.1 time types end there.
            (Ok(from), Ok(to)) if from < to && from.year() >= 1950 && to.year() <= 9999 => Ok((from, to)),
            _ => Err(Error::Config(format!("no validity from {} to {}", self.not_before, self.not_after))),
        }
    }
}

/// Seconds of Unix time, now.
#[must_use]
pub fn now() -> i64 {
    OffsetDateTime::now_utc().unix_timestamp()
}

/// Unix time as people read it, `2026-11-21 05:59 UTC`.
#[must_use]
pub fn date(seconds: i64) -> String {
    OffsetDateTime::from_unix_timestamp(seconds).map_or_else(
        |_| format!("{seconds} s"),
        |t| {
            let (year, month, day) = t.to_calendar_date();
            format!("{year:04}-{:02}-{day:02} {:02}:{:02} UTC", u8::from(month), t.hour(), t.minute())
        },
    )
}

/// Why a certificate could not be made, in this crate's words.
fn not_made(what: &str, cause: &rcgen::Error) -> Error {
    Error::Config(format!("cannot make {what}: {cause}"))
}
