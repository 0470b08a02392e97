//! What a plan chooses for a network and the parties' cores: messages against bytes and work. Every choice gives the same tokens, but for the
//! rounding of a norm.
//!
//! **The radices of the tournament** that picks a token, level by level. A level of radix `r` makes one candidate of `r`. A large radix takes fewer levels, of 8 messages each, but `r - 1` comparisons for every two candidates:
//! so radices grow from level to level, as the candidates get fewer, and all are larger where messages take long.
//!
//! **A norm's windows.** A wide range takes two windows and a selection between them, or a single one with as many rows as the range is wide, and two
//! messages fewer: worth it for few values at once, as in decode.
//!
//! **Pieces.** A prompt's rows go through the largest exchanges in pieces behind each other ([`crate::protocol::pieces`]), so that computing and both
//! directions of the links overlap: more of them where bytes take long.
//!
//! **A norm's scaling.** One window and the scaling behind it take an exchange each, or one for both with more than twice the bytes
//! ([`crate::protocol::normalise`]).

use std::collections::HashMap;
use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::net::shape::Profile;
use crate::plan::cost::Cost;
use crate::protocol::argmax::{self, MOST_RADIX};
use crate::protocol::{lift, normalise, square};

/// What a plan is made for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Setting {
    /// The network between the parties.
    pub net: Profile,
    /// Cores of each party.
    pub cores: usize,
}

/// Cores of a party of which nothing is known, and those of the machine whose times are below.
const CORES: usize = 2;

impl Default for Setting {
    /// Parties in one region, of two cores.
    fn default() -> Setting {
        Setting { net: Profile { rtt: Duration::from_millis(1), bits_per_second: 1e9 }, cores: CORES }
    }
}

impl From<Profile> for Setting {
    fn from(net: Profile) -> Setting {
        Setting { net, ..Setting::default() }
    }
}

impl Setting {
    /// As far as it is known.
    #[must_use]
    pub fn of(net: Option<Profile>, cores: Option<usize>) -> Setting {
        let Setting { net: region, cores: few } = Setting::default();
        Setting { net: net.unwrap_or(region), cores: cores.unwrap_or(few).max(1) }
    }

    /// Seconds of a message that takes so much by itself.
    fn message(&self, by_itself: f64) -> f64 {
        self.net.rtt.as_secs_f64() / 2.0 + by_itself
    }

    /// Seconds of so many bytes, in the network and at the parties.
    fn bytes(&self, bytes: f64) -> f64 {
        bytes * (8.0 / self.net.bits_per_second + self.work(BYTE))
    }

    /// Seconds of what takes so many on the measured machine's cores.
    fn work(&self, seconds: f64) -> f64 {
        seconds * CORES as f64 / self.cores as f64
    }
}

/// Seconds of a message besides the network's: two threads take turns. This, and the two below, are of two cores of 2.5 GHz, by the tournaments of
/// `cargo bench --bench protocols`; what counts is how they compare.
const MESSAGE: f64 = 80e-6;
/// Of a comparison at all parties, in one process.
const COMPARISON: f64 = 0.75e-6;
/// Of a byte.
const BYTE: f64 = 1e-9;
/// Of a row of a norm's window, three words, at Client and Helper: from memory, since no cache holds all norms' tables.
const ROW: f64 = 3.5e-9;

/// Of an element that is scaled in the same exchange as its root is looked up, beyond what it takes by itself: words drawn, multiplied and packed at
/// all parties (`trefoil bench --preset deep-256 --layers 2`, with and without).
const ELEMENT: f64 = 0.3e-6;
/// Of a message that this saves, in one process.
const TURN: f64 = 10e-6;

/// Levels that a tournament may always have: 42 messages with the lift. More only where radix 8 would take more.
const LEVELS: usize = 5;
/// Parties serve several sessions at once, whose work shares their cores, where a message of one keeps nobody else waiting: so many times a
/// norm's rows count beside its messages.
const BUSY: f64 = 4.0;

/// A tournament's radices from its first level on; levels beyond have the last one. Plans of earlier versions have one for all, and are written
/// as a number.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Written", into = "Written")]
pub struct Radices(Vec<usize>);

#[derive(Clone, Serialize, Deserialize)]
#[serde(untagged)]
enum Written {
    Same(usize),
    Each(Vec<usize>),
}

impl From<Written> for Radices {
    fn from(w: Written) -> Self {
        match w {
            Written::Same(r) => Radices(vec![r]),
            Written::Each(r) => Radices(r),
        }
    }
}

impl From<Radices> for Written {
    fn from(r: Radices) -> Self {
        match *r.0 {
            [one] => Written::Same(one),
            _ => Written::Each(r.0),
        }
    }
}

impl fmt::Display for Radices {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let each: Vec<String> = self.0.iter().map(usize::to_string).collect();
        f.write_str(&each.join("-"))
    }
}

impl Radices {
    /// The same in all levels.
    #[must_use]
    pub fn same(radix: usize) -> Radices {
        Radices(vec![radix])
    }

    /// Those of `n` values of `k` bits that take least at `setting`: time of messages, bytes and comparisons together, in at most 42 messages for up
    /// to 32,768 candidates.
    #[must_use]
    pub fn fastest(n: usize, k: u32, setting: &Setting) -> Radices {
        let mut search = Search { k, setting: *setting, known: HashMap::new() };
        let levels = (LEVELS..).find(|l| 8usize.saturating_pow(*l as u32) >= n).unwrap_or(LEVELS);
        let (mut radices, mut left) = (Vec::new(), n);
        while let Some((_, radix)) = search.best(left, levels - radices.len()).filter(|_| left > 1) {
            radices.push(radix);
            left = left.div_ceil(radix);
        }
        if radices.is_empty() {
            // One candidate wins without a level.
            radices.push(2);
        }
        Radices(radices)
    }

    /// What [`argmax::argmax`] takes.
    #[must_use]
    pub fn each(&self) -> &[usize] {
        &self.0
    }

    /// Whether a tournament of `n` candidates can have them.
    #[must_use]
    pub fn sound(&self, n: usize) -> bool {
        let levels = !self.0.is_empty() && self.0.iter().all(|r| (2..=MOST_RADIX).contains(r));
        levels && self.0.len() <= (argmax::depth(n, &self.0) as usize).max(1)
    }
}

/// Up to how many values of a pass a single window of `2^alone` rows takes less than two of `2^window` rows and a selection.
pub(super) fn most_alone(alone: u32, window: u32, setting: &Setting) -> usize {
    let rows = (1u64 << alone).saturating_sub(2 << window) as f64;
    let saved = 2.0 * setting.message(MESSAGE);
    let each = setting.work(rows * BUSY * ROW) + setting.bytes(rows / 8.0);
    ((saved / each) as usize).min(MOST_VALUES)
}

/// Up to how many values of a pass, each of a group of `n` elements in ring `k`, one exchange for root and scaling takes less than one for
/// each: two messages fewer, but the lift of the group and two words more than twice for each of its elements.
pub(super) fn most_joint(n: usize, k: u32, window: u32, setting: &Setting) -> usize {
    let bytes = |c: &Cost| (c.online_bytes() + c.ahead_bytes()) as f64;
    let apart = bytes(&square::scale_cost(n, 1, k)) + ((1 << window) / 8) as f64;
    let more = bytes(&lift::cost(n, k, 64)) + bytes(&normalise::cost(1, n, 1 << window)) - apart;
    let saved = 2.0 * setting.message(TURN);
    let each = setting.bytes(more) + setting.work(n as f64 * ELEMENT);
    ((saved / each) as usize).min(MOST_VALUES)
}

/// Pieces in which a prompt goes through its largest exchanges, at most: the more, the sooner all parties and both directions of the links are
/// busy, but each takes a message (`trefoil bench --preset h768 --test pp128`, with `--net`). In one process all parties compute as fast as
/// they can, and there is nothing to wait for meanwhile.
pub(super) fn pieces(net: &Profile) -> usize {
    match net.bits_per_second {
        _ if net.is_none() => 1,
        fast if fast > 4e9 => MOST_PIECES / 2,
        _ => MOST_PIECES,
    }
}

/// Most pieces of a prompt. Fewer than the rows of the smallest block of [`super::block`], so that no two have the same address.
pub(super) const MOST_PIECES: usize = 8;

/// Beyond so many values nobody gains by a single window.
pub(super) const MOST_VALUES: usize = 1 << 10;

struct Search {
    k: u32,
    setting: Setting,
    known: HashMap<(usize, usize), Option<(f64, usize)>>,
}

impl Search {
    /// Seconds of the best tournament of `n` in at most `levels` levels, and its first radix (2 if it has no level).
    fn best(&mut self, n: usize, levels: usize) -> Option<(f64, usize)> {
        if n <= 1 {
            return Some((0.0, 2));
        }
        if levels == 0 {
            return None;
        }
        if let Some(known) = self.known.get(&(n, levels)) {
            return *known;
        }
        let mut best: Option<(f64, usize)> = None;
        for radix in 2..=MOST_RADIX.min(n) {
            let Some((rest, _)) = self.best(n.div_ceil(radix), levels - 1) else { continue };
            let all = self.level(n, radix) + rest;
            if best.is_none_or(|(seconds, _)| all < seconds) {
                best = Some((all, radix));
            }
        }
        self.known.insert((n, levels), best);
        best
    }

    fn level(&self, n: usize, radix: usize) -> f64 {
        let c: Cost = argmax::level_cost(n, self.k, radix);
        let bytes = (c.online_bytes() + c.ahead_bytes()) as f64;
        let comparisons = n.div_ceil(radix) * radix * (radix - 1) / 2;
        f64::from(c.depth) * self.setting.message(MESSAGE)
            + self.setting.bytes(bytes)
            + self.setting.work(comparisons as f64 * COMPARISON)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn messages(n: usize, net: Option<Profile>) -> (u32, usize, Radices) {
        let r = Radices::fastest(n, 19, &Setting::of(net, None));
        assert!(r.sound(n), "{n}: {r}");
        let (mut left, mut comparisons) = (n, 0);
        for radix in r.each() {
            comparisons += left.div_ceil(*radix) * radix * (radix - 1) / 2;
            left = left.div_ceil(*radix);
        }
        assert!(left <= 1, "{n}: {r}");
        (argmax::cost(n, 19, r.each()).depth, comparisons, r)
    }

    #[test]
    fn few_messages_and_fewer_comparisons_than_with_one_radix() {
        for n in [1, 2, 3, 5, 8, 12, 13, 100, 1000, 2048, 32_000, 151_936, 248_832] {
            for net in [None, Some(Profile::NONE), Some(Profile::LAN), Some(Profile::WAN)] {
                let (depth, comparisons, r) = messages(n, net);
                assert!(depth <= if n <= 1 << 15 { 42 } else { 50 }, "{n}: {depth} messages, {r}");
                let eight = n.div_ceil(8) * 28;
                assert!(n < 2048 || comparisons < eight * 6 / 5, "{n}: {comparisons} comparisons, {r}");
            }
        }
        assert!(messages(1 << 22, None).0 <= 2 + 8 * 8);
    }

    #[test]
    fn few_values_take_a_window_alone() {
        let most = |net| most_alone(16, 12, &Setting::of(net, None));
        assert_eq!(most(Some(Profile::NONE)), 0);
        assert!(most(None) >= 1 && most(Some(Profile::WAN)) > 5 * most(None));
        assert_eq!(most_alone(17, 12, &Setting::default()), 0);
        let endless = Profile { rtt: Duration::from_secs(60), ..Profile::WAN };
        assert_eq!(most_alone(13, 12, &endless.into()), MOST_VALUES);
    }

    #[test]
    fn few_and_short_groups_are_scaled_with_their_roots() {
        let most = |n, net| most_joint(n, 24, 14, &Setting::of(net, None));
        assert_eq!([64, 256, 2048].map(|n| most(n, Some(Profile::NONE))), [0; 3]);
        assert_eq!(most(4096, None), 0, "four messages are faster than its bytes");
        for n in [64, 256, 2048] {
            assert!(most(n, Some(Profile::WAN)) > 2 * most(n, None).max(1), "{n}");
        }
        assert!(most(64, None) > most(256, None) && most(256, None) > 1);
    }

    #[test]
    fn a_network_carries_pieces() {
        let nets = [Profile::NONE, Profile::LAN, Profile::WAN, Setting::default().net];
        assert_eq!(nets.map(|net| pieces(&net)), [1, 4, 8, 8]);
    }

    #[test]
    fn a_slow_network_takes_fewer_messages() {
        for n in [1000, 2048, 32_000] {
            let depth = |net| messages(n, Some(net)).0;
            assert!(depth(Profile::WAN) <= depth(Profile::NONE), "{n}");
        }
        assert!(messages(2048, Some(Profile::WAN)).0 < messages(2048, Some(Profile::NONE)).0);
    }

    #[test]
    fn more_cores_take_more_work_for_fewer_messages() {
        let with = |cores| Setting::of(None, Some(cores));
        assert!(most_alone(16, 12, &with(32)) > most_alone(16, 12, &with(1)));
        assert!(most_joint(256, 24, 14, &with(32)) > most_joint(256, 24, 14, &with(1)));
        let here = |cores| Setting { cores, ..Profile::NONE.into() };
        let depth = |cores| argmax::depth(2048, Radices::fastest(2048, 19, &here(cores)).each());
        assert!(depth(32) < depth(1));
        assert_eq!(with(0), with(1));
    }

    #[test]
    fn written_as_earlier_versions_did() {
        assert_eq!(serde_json::to_string(&Radices::same(8)).unwrap(), "8");
        assert_eq!(serde_json::from_str::<Radices>("8").unwrap(), Radices::same(8));
        let each = Radices::fastest(2048, 19, &Setting::default());
        assert_eq!(serde_json::from_str::<Radices>(&serde_json::to_string(&each).unwrap()).unwrap(), each);
    }

    #[test]
    fn what_no_tournament_has_is_not_sound() {
        for bad in ["[]", "1", "13", "[4, 0]", "[2, 2, 2, 2, 2]"] {
            assert!(!serde_json::from_str::<Radices>(bad).unwrap().sound(16), "{bad}");
        }
        assert!(Radices::same(2).sound(16) && Radices::same(2).sound(1));
    }
}
