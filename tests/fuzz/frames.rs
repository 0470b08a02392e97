//! The frame decoder against a straightforward one, and what it allocates meanwhile.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use proptest::prelude::*;
use trefoil::error::PeerFault;
use trefoil::net::tls::Decoder;
use trefoil::net::{GATHERED, MESSAGE_HEADER, Message};

use crate::fuzz;

thread_local! {
    /// Bytes allocated by this thread and not freed by it, and the most there ever were.
    static HELD: Cell<(isize, isize)> = const { Cell::new((0, 0)) };
}

fn count(by: isize) {
    // Threads that are ending have no counter any more, and nothing here asks for theirs.
    let _ = HELD.try_with(|held| {
        let now = held.get().0 + by;
        held.set((now, held.get().1.max(now)));
    });
}

struct Counting;

// SAFETY: everything is passed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: as our caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: as our caller promises.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size as isize - layout.size() as isize);
        // SAFETY: as our caller promises.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// The most that this thread allocated at once during `f`, beyond what it had before.
fn peak<T>(f: impl FnOnce() -> T) -> (T, usize) {
    let before = HELD.get().0;
    HELD.set((before, before));
    let out = f();
    (out, (HELD.get().1 - before).max(0) as usize)
}

/// Messages, frame by frame.
type Frames = Vec<Vec<(u64, u32, Vec<u8>)>>;

/// In a message's length: another one of its frame follows.
const MORE: u32 = 1 << 31;

/// All of the stream at once.
fn plainly(mut bytes: &[u8], limit: usize) -> (Frames, Option<PeerFault>) {
    let (mut out, mut frame, mut gathered) = (Frames::new(), Vec::new(), 0);
    while bytes.len() >= MESSAGE_HEADER {
        let word = u32::from_le_bytes(bytes[8..12].try_into().unwrap());
        let len = (word & !MORE) as usize;
        if len > limit {
            return (out, Some(PeerFault::Oversize { limit, got: len }));
        }
        if gathered >= GATHERED {
            return (out, Some(PeerFault::Malformed("a frame that does not end")));
        }
        let Some(payload) = bytes[MESSAGE_HEADER..].get(..len) else { break };
        let tag = u64::from_le_bytes(bytes[..8].try_into().unwrap());
        frame.push((tag, u32::from_le_bytes(bytes[12..16].try_into().unwrap()), payload.to_vec()));
        gathered += MESSAGE_HEADER + len;
        if word & MORE == 0 {
            out.push(std::mem::take(&mut frame));
            gathered = 0;
        }
        bytes = &bytes[MESSAGE_HEADER + len..];
    }
    (out, None)
}

fn frame(tag: u64, len: u32, depth: u32, payload: &[u8]) -> Vec<u8> {
    [&tag.to_le_bytes()[..], &len.to_le_bytes(), &depth.to_le_bytes(), payload].concat()
}

/// Good frames, frames that announce something else than they are, and noise.
fn piece() -> impl Strategy<Value = Vec<u8>> {
    let payload = || prop_oneof![prop::collection::vec(any::<u8>(), 0..64), (0usize..40_000).prop_map(|n| vec![7; n])];
    let word = |p: &[u8], more: bool| p.len() as u32 | if more { MORE } else { 0 };
    let good = (any::<u64>(), any::<u32>(), payload(), any::<bool>())
        .prop_map(move |(t, d, p, more)| frame(t, word(&p, more), d, &p));
    let large = (300_000usize..1_500_000).prop_map(|n| frame(1, n as u32, 2, &vec![9; n]));
    let lying = (any::<u32>(), payload()).prop_map(|(len, p)| frame(3, len, 4, &p));
    prop_oneof![12 => good, 1 => large, 1 => lying, 1 => prop::collection::vec(any::<u8>(), 0..50)]
}

fn cuts() -> impl Strategy<Value = Vec<usize>> {
    prop_oneof![
        prop::collection::vec(1usize..40, 1..20),
        prop::collection::vec(1usize..70_000, 1..20),
        Just(vec![1]),
        Just(vec![65_536]),
    ]
}

#[test]
fn frame_decoder() {
    let limit = prop_oneof![Just(0usize), 1usize..2000, Just(2 << 20), Just(u32::MAX as usize)];
    let streams = (prop::collection::vec(piece(), 0..12), cuts(), limit);
    fuzz("frame decoder", &streams, |(pieces, cuts, limit)| {
        // Single bytes of a long stream take long and say no more than those of a short one.
        let mut stream = pieces.concat();
        stream.truncate(if cuts == [1] { 50_000 } else { usize::MAX });
        let (want, fault) = plainly(&stream, limit);
        let (mut got, mut ended) = (Frames::new(), None);
        let mut decoder = Decoder::new(limit);
        let mut rest = &stream[..];
        for size in cuts.iter().cycle() {
            let (now, later) = rest.split_at((*size).min(rest.len()));
            // Frames that are handed out are no longer the decoder's.
            let (mut handed, mut frames) = (0, Vec::with_capacity(now.len() / MESSAGE_HEADER + 1));
            let fed = (stream.len() - later.len()).min(limit);
            let (out, most) = peak(|| {
                decoder.feed(now, &mut |f| {
                    handed += f.iter().map(|m| m.payload.len() + size_of::<Message>()).sum::<usize>();
                    frames.push(f);
                    Ok(())
                })
            });
            // Of a frame that is not complete also a list of its messages, which may be empty ones.
            let list = 2 * (fed.min(GATHERED) / MESSAGE_HEADER + 4) * size_of::<Message>();
            prop_assert!(most <= handed + fed + fed / 8 + list + (256 << 10), "{most} bytes for {fed} received");
            let plain = |m: Message| (m.tag, m.depth, m.payload);
            got.extend(frames.into_iter().map(|f| f.into_iter().map(plain).collect::<Vec<_>>()));
            if let Err(fault) = out {
                ended = Some(fault);
                break;
            }
            rest = later;
            if rest.is_empty() {
                break;
            }
        }
        prop_assert_eq!(ended, fault);
        // Not as values: a difference would print megabytes.
        prop_assert_eq!(got.len(), want.len());
        prop_assert!(got == want, "frames differ");
        Ok(())
    });
}

/// Announced and not sent: a header alone must not cost what it names.
#[test]
fn announced_is_not_allocated() {
    for len in [1u32, 300_000, 50_000_000, u32::MAX] {
        let mut decoder = Decoder::new(u32::MAX as usize);
        let header = frame(1, len, 0, &[]);
        let (out, most) = peak(|| decoder.feed(&header, &mut |_| Ok(())));
        assert_eq!(out, Ok(()));
        assert!(most <= 256 << 10, "{most} for {len}");
        let mut fed = 0;
        while fed < len.min(3_000_000) as usize {
            let n = 65_000.min(len as usize - fed);
            let (out, most) = peak(|| decoder.feed(&vec![1; n], &mut |_| Ok(())));
            fed += n;
            assert_eq!(out, Ok(()));
            assert!(most <= n + fed / 8 + (256 << 10), "{most} more at {fed} of {len}");
        }
    }
}
