//! A simulated network: round-trip time and bandwidth, per directed link.
//!
//! A message arrives half a round trip after its last byte left. Both lanes share the link's bandwidth; online messages
//! go first (as a sender with a priority queue would do it), so run-ahead traffic delays itself, not the critical path,
//! and every online byte takes its time from the run-ahead traffic.

use std::fmt;
use std::str::FromStr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::{Abort, Channel, Lane, MESSAGE_HEADER, Message};
use crate::error::{Error, PeerFault};
use crate::ledger::{self, Doing};

/// Round-trip time and bandwidth of every link.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Profile {
    /// Round-trip time; a message pays half.
    pub rtt: Duration,
    /// Bits per second in each direction of a link; `f64::INFINITY` for no limit.
    pub bits_per_second: f64,
}

impl Profile {
    /// No simulated delay.
    pub const NONE: Profile = Profile { rtt: Duration::ZERO, bits_per_second: f64::INFINITY };
    /// 0.1 ms, 16 Gbit/s.
    pub const LAN: Profile = Profile { rtt: Duration::from_micros(100), bits_per_second: 16e9 };
    /// 20 ms, 0.4 Gbit/s.
    pub const WAN: Profile = Profile { rtt: Duration::from_millis(20), bits_per_second: 0.4e9 };

    /// Whether anything is simulated.
    #[must_use]
    pub fn is_none(&self) -> bool {
        *self == Profile::NONE
    }
}

const MAX_RTT_MS: f64 = 60_000.0;
/// A kilobit per second: slower than any modem.
const MIN_GBPS: f64 = 1e-6;
const MAX_GBPS: f64 = 1e6;

/// Longer than any simulation runs: what a link that is too slow for its traffic is taken to need.
const FOREVER: Duration = Duration::from_secs(10 * 365 * 86_400);

/// `by` later, however far that is.
fn later(at: Instant, by: Duration) -> Instant {
    at.checked_add(by.min(FOREVER)).unwrap_or(at)
}

impl FromStr for Profile {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self, Error> {
        match s {
            "none" => return Ok(Profile::NONE),
            "lan" => return Ok(Profile::LAN),
            "wan" => return Ok(Profile::WAN),
            _ => {}
        }
        let bad = || {
            Error::Config(format!(
                "--net {s}: expected none, lan, wan, or RTT_MS,GBPS such as 5,1 (round trip of 0 to {MAX_RTT_MS} ms, bandwidth of {MIN_GBPS} to {MAX_GBPS} Gbit/s)"
            ))
        };
        let (rtt, gbps) = s.split_once(',').ok_or_else(bad)?;
        let rtt: f64 = rtt.trim().parse().map_err(|_| bad())?;
        let gbps: f64 = gbps.trim().parse().map_err(|_| bad())?;
        if !((0.0..=MAX_RTT_MS).contains(&rtt) && (MIN_GBPS..=MAX_GBPS).contains(&gbps)) {
            return Err(bad());
        }
        Ok(Profile { rtt: Duration::from_secs_f64(rtt / 1e3), bits_per_second: gbps * 1e9 })
    }
}

impl fmt::Display for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_none() {
            return f.write_str("none (no simulated delay)");
        }
        write!(f, "{} ms round trip, {} Gbit/s", self.rtt.as_secs_f64() * 1e3, self.bits_per_second / 1e9)
    }
}

struct Busy {
    online: Instant,
    ahead: Instant,
}

/// A channel whose sends take as long as on the profile's network.
pub struct Shaped<C> {
    inner: C,
    profile: Profile,
    busy: Mutex<Busy>,
}

impl<C: Channel> Shaped<C> {
    /// Delays what `inner` carries.
    pub fn new(inner: C, profile: Profile) -> Self {
        let now = Instant::now();
        Shaped { inner, profile, busy: Mutex::new(Busy { online: now, ahead: now }) }
    }
}

impl<C: Channel> Channel for Shaped<C> {
    fn stamp(&self, lane: Lane, message: &mut Message) {
        self.inner.stamp(lane, message);
    }

    fn send_frame(&self, lane: Lane, mut frame: Vec<Message>) -> Result<(), PeerFault> {
        if !self.profile.is_none() {
            let bits = 8.0 * frame.iter().map(|m| m.payload.len() + MESSAGE_HEADER).sum::<usize>() as f64;
            // The fields are public: a profile may have any numbers in them.
            let transfer = Duration::try_from_secs_f64(bits / self.profile.bits_per_second).unwrap_or(FOREVER);
            let mut busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
            let now = Instant::now();
            let done = match lane {
                Lane::Online => {
                    busy.online = later(busy.online.max(now), transfer);
                    busy.ahead = later(busy.ahead.max(now), transfer);
                    busy.online
                }
                Lane::Ahead => {
                    busy.ahead = later(busy.ahead.max(now), transfer);
                    busy.ahead
                }
            };
            let arrives = later(done, self.profile.rtt / 2);
            frame.iter_mut().for_each(|m| m.not_before = Some(arrives));
        }
        self.inner.send_frame(lane, frame)
    }

    fn gathers(&self) -> bool {
        self.inner.gathers()
    }

    fn ready(&self, lane: Lane, tag: u64) -> bool {
        self.inner.ready(lane, tag)
    }

    fn recv(&self, lane: Lane, tag: u64, len: usize, timeout: Duration) -> Result<Message, PeerFault> {
        let frame = self.inner.recv(lane, tag, len, timeout)?;
        if let Some(at) = frame.not_before {
            let wait = at.saturating_duration_since(Instant::now());
            if !wait.is_zero() {
                ledger::during(Doing::Network, || std::thread::sleep(wait));
            }
        }
        Ok(frame)
    }

    fn drain(&self, lane: Lane, tag: u64, len: usize, timeout: Duration) -> Result<(Message, u64), PeerFault> {
        self.inner.drain(lane, tag, len, timeout)
    }

    fn end(&self, reason: Option<&Abort>) {
        self.inner.end(reason);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn profiles_parse_and_refuse() {
        assert_eq!("lan".parse::<Profile>().unwrap(), Profile::LAN);
        let p: Profile = "4,0.4".parse().unwrap();
        assert_eq!(p.rtt, Duration::from_millis(4));
        assert!((p.bits_per_second - 0.4e9).abs() < 1.0);
        for bad in [
            "", "fast", "1", "1,0", "1,-2", "-1,1", "nan,1", "1,inf", "1,1e-300", "1,9e-7", "1,1e7", "60001,1",
            "1e300,1", "inf,1",
        ] {
            assert!(bad.parse::<Profile>().is_err(), "{bad}");
        }
    }

    #[test]
    fn no_profile_makes_a_send_panic() {
        for bits_per_second in [1e-300, 0.0, -1.0, f64::NAN, f64::MIN_POSITIVE] {
            for rtt in [Duration::ZERO, Duration::MAX] {
                let (a, _b) = super::super::memory::link(1 << 20);
                let a = Shaped::new(a, Profile { rtt, bits_per_second });
                for lane in [Lane::Online, Lane::Ahead, Lane::Online] {
                    a.send(lane, Message { tag: 1, depth: 0, not_before: None, payload: vec![0; 10] }).unwrap();
                }
            }
        }
        let slowest: Profile = "60000,1e-6".parse().unwrap();
        assert_eq!(slowest.rtt, Duration::from_secs(60));
    }

    #[test]
    fn a_message_pays_half_a_round_trip_and_its_bytes() {
        let (a, b) = super::super::memory::link(1 << 30);
        let (a, b) = (Shaped::new(a, Profile { rtt: Duration::from_millis(20), bits_per_second: 8e8 }), b);
        let b = Shaped::new(b, Profile::NONE);
        let start = Instant::now();
        // 1 MB at 100 MB/s is 10 ms, and 10 ms for half the round trip.
        a.send(Lane::Online, Message { tag: 1, depth: 0, not_before: None, payload: vec![0; 1_000_000] }).unwrap();
        b.recv(Lane::Online, 1, 1_000_000, Duration::from_secs(5)).unwrap();
        assert!(start.elapsed() >= Duration::from_millis(20), "{:?}", start.elapsed());
    }
}
