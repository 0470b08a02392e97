//! Channels over TLS connections: one for the online lane, and one for the ahead lane where there is run-ahead traffic, so
//! that a full ahead buffer holds back nothing but itself and online messages never queue behind it.
//!
//! The TLS handshake happens elsewhere ([`crate::deploy`]); here a finished connection carries frames, a message or several: tag
//! (8 bytes), length (4, of which the highest bit says that another message of the frame follows), causal depth (4), all
//! little-endian, then the payload. A thread per connection reads; senders write by themselves, so that a message takes no
//! detour through another thread. Reading never waits for writing, hence two parties that send to each other at the same time
//! cannot block each other, as long as what waits at a receiver finds room ([`ONLINE_CAPACITY`]; see [`crate::protocol::pieces`]).

use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use rustls::Connection;

use super::inbox::{Inbox, early_limit};
use super::{Abort, Channel, GATHERED, Lane, MESSAGE_HEADER, Message};
use crate::error::{PeerFault, Result};

/// Plaintext handed to TLS at a time: four full records.
const CHUNK: usize = 64 << 10;
/// The tag of an [`Abort`]; no step has it.
const ABORT_TAG: u64 = u64::MAX;
/// How long a last word may take.
const LAST_WORD: Duration = Duration::from_millis(500);

/// One TLS connection after its handshake, with blocking reads and writes.
pub struct Stream {
    tcp: TcpStream,
    tls: Mutex<Connection>,
    /// Held while a frame goes out, so that frames stay whole; holds ciphertext on its way.
    out: Mutex<Vec<u8>>,
}

impl Stream {
    /// Takes over a connection; a write that blocks for longer than `write_timeout` fails.
    ///
    /// # Errors
    /// If the socket cannot be made blocking.
    pub fn new(tcp: TcpStream, tls: impl Into<Connection>, write_timeout: Option<Duration>) -> io::Result<Self> {
        tcp.set_nonblocking(false)?;
        tcp.set_nodelay(true)?;
        tcp.set_read_timeout(None)?;
        tcp.set_write_timeout(write_timeout)?;
        let mut tls = tls.into();
        tls.set_buffer_limit(None);
        Ok(Stream { tcp, tls: Mutex::new(tls), out: Mutex::new(Vec::new()) })
    }

    fn tls(&self) -> MutexGuard<'_, Connection> {
        self.tls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands `parts` to TLS and the network, [`CHUNK`] bytes at a time.
    fn write(&self, mut out: MutexGuard<'_, Vec<u8>>, parts: &[&[u8]]) -> io::Result<()> {
        let mut rest = parts.iter().copied();
        let mut next: &[u8] = &[];
        loop {
            // In one go: two writes would be two records.
            let (mut slices, mut room) = (Vec::with_capacity(2 * parts.len()), CHUNK);
            while room > 0 {
                if next.is_empty() {
                    let Some(part) = rest.next() else { break };
                    next = part;
                }
                let (now, later) = next.split_at(next.len().min(room));
                slices.push(IoSlice::new(now));
                room -= now.len();
                next = later;
            }
            if room == CHUNK {
                return Ok(());
            }
            out.clear();
            {
                // Encryption holds the connection; the socket does not, so that reading goes on meanwhile.
                let mut tls = self.tls();
                if tls.writer().write_vectored(&slices)? != CHUNK - room {
                    return Err(io::Error::other("TLS took part of a frame, though its buffer has no limit"));
                }
                while tls.wants_write() {
                    tls.write_tls(&mut *out)?;
                }
            }
            (&self.tcp).write_all(&out)?;
        }
    }

    /// Reads into `sink` until the connection ends, and says why it did.
    fn read(&self, sink: &mut dyn FnMut(&[u8]) -> Result<(), PeerFault>) -> PeerFault {
        let mut raw = vec![0u8; 256 << 10];
        let mut plain = vec![0u8; 64 << 10];
        // What came with the handshake is already inside the connection: deliver first, then read.
        let mut have = 0..0;
        loop {
            let mut fresh = &raw[have.clone()];
            if let Err(fault) = self.deliver(&mut fresh, &mut plain, sink) {
                return fault;
            }
            have = have.end - fresh.len()..have.end;
            if have.is_empty() {
                match (&self.tcp).read(&mut raw) {
                    Ok(0) => return PeerFault::Closed,
                    Ok(n) => have = 0..n,
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    Err(_) => return PeerFault::Closed,
                }
            }
        }
    }

    /// Decrypts some of `raw` and hands on what can be read.
    fn deliver(
        &self,
        raw: &mut &[u8],
        plain: &mut [u8],
        sink: &mut dyn FnMut(&[u8]) -> Result<(), PeerFault>,
    ) -> Result<(), PeerFault> {
        let mut tls = self.tls();
        if !raw.is_empty() {
            tls.read_tls(raw).map_err(|e| PeerFault::Handshake(e.to_string()))?;
        }
        tls.process_new_packets().map_err(|_| PeerFault::Malformed("a TLS record that is damaged or not authentic"))?;
        loop {
            match tls.reader().read(plain) {
                Ok(0) => return Err(PeerFault::Closed),
                Ok(n) => {
                    // The inbox may hold us back: not with the connection in hand.
                    drop(tls);
                    sink(&plain[..n])?;
                    tls = self.tls();
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(_) => return Err(PeerFault::Closed),
            }
        }
    }

    /// Says goodbye if that is possible at once, and ends sending. What was sent before still arrives.
    fn finish(&self, last_word: Option<&[u8]>) {
        // A stalled peer must not hold up the one who leaves; nor a frame half written.
        if let Ok(out) = self.out.try_lock() {
            let _ = self.tcp.set_write_timeout(Some(LAST_WORD));
            let sent = match last_word {
                Some(payload) => self.write(out, &[&header(ABORT_TAG, payload.len(), 0, false), payload]),
                None => {
                    drop(out);
                    Ok(())
                }
            };
            if sent.is_ok()
                && let Ok(mut out) = self.out.try_lock()
            {
                out.clear();
                let mut tls = self.tls();
                tls.send_close_notify();
                while tls.wants_write() && tls.write_tls(&mut *out).is_ok() {}
                drop(tls);
                let _ = (&self.tcp).write_all(&out);
            }
        }
        let _ = self.tcp.shutdown(Shutdown::Write);
    }

    fn abandon(&self) {
        let _ = self.tcp.shutdown(Shutdown::Both);
    }
}

/// In a message's length: another message of the same frame follows.
const MORE: u32 = 1 << 31;

fn header(tag: u64, len: usize, depth: u32, more: bool) -> [u8; MESSAGE_HEADER] {
    let mut h = [0; MESSAGE_HEADER];
    h[..8].copy_from_slice(&tag.to_le_bytes());
    h[8..12].copy_from_slice(&(len as u32 | if more { MORE } else { 0 }).to_le_bytes());
    h[12..].copy_from_slice(&depth.to_le_bytes());
    h
}

/// Cuts a byte stream into frames. Memory grows with what has arrived, not with what was announced.
pub struct Decoder {
    header: [u8; MESSAGE_HEADER],
    have: usize,
    payload: Vec<u8>,
    /// Messages of a frame that is not complete, and their bytes.
    frame: Vec<Message>,
    gathered: usize,
    limit: usize,
}

/// The first allocation for a payload.
const FIRST_PIECE: usize = 256 << 10;

impl Decoder {
    /// Takes messages of up to `limit` bytes of payload.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        let (payload, frame) = (Vec::new(), Vec::new());
        Decoder { header: [0; MESSAGE_HEADER], have: 0, payload, frame, gathered: 0, limit }
    }

    /// Of the message at hand: its length, and whether another one of its frame follows.
    fn length(&self) -> (usize, bool) {
        let [_, _, _, _, _, _, _, _, a, b, c, d, ..] = self.header;
        let word = u32::from_le_bytes([a, b, c, d]);
        ((word & !MORE) as usize, word & MORE != 0)
    }

    /// Takes more of the stream; `sink` gets each frame that is complete.
    ///
    /// # Errors
    /// [`PeerFault::Oversize`] as soon as a header announces it, [`PeerFault::Malformed`] for a frame that goes on after [`GATHERED`]
    /// bytes, and what `sink` says.
    pub fn feed(
        &mut self,
        mut bytes: &[u8],
        sink: &mut dyn FnMut(Vec<Message>) -> Result<(), PeerFault>,
    ) -> Result<(), PeerFault> {
        loop {
            if self.have < MESSAGE_HEADER {
                let n = bytes.len().min(MESSAGE_HEADER - self.have);
                self.header[self.have..self.have + n].copy_from_slice(&bytes[..n]);
                self.have += n;
                bytes = &bytes[n..];
                if self.have < MESSAGE_HEADER {
                    return Ok(());
                }
                let (len, _) = self.length();
                if len > self.limit {
                    return Err(PeerFault::Oversize { limit: self.limit, got: len });
                }
                if self.gathered >= GATHERED {
                    return Err(PeerFault::Malformed("a frame that does not end"));
                }
                self.payload = Vec::with_capacity(len.min(FIRST_PIECE));
            }
            let (len, more) = self.length();
            let n = bytes.len().min(len - self.payload.len());
            if self.payload.capacity() - self.payload.len() < n {
                // Not doubled, as a vector does by itself: an eighth at a time is cheap as well, and hardly ahead of what came.
                let room = (self.payload.len() / 8).max(FIRST_PIECE / 2).max(n);
                self.payload.reserve_exact(room.min(len - self.payload.len()));
            }
            self.payload.extend_from_slice(&bytes[..n]);
            bytes = &bytes[n..];
            if self.payload.len() < len {
                return Ok(());
            }
            let [a, b, c, d, e, f, g, h, _, _, _, _, w, x, y, z] = self.header;
            self.frame.push(Message {
                tag: u64::from_le_bytes([a, b, c, d, e, f, g, h]),
                depth: u32::from_le_bytes([w, x, y, z]),
                not_before: None,
                payload: std::mem::take(&mut self.payload),
            });
            self.gathered += len + MESSAGE_HEADER;
            self.have = 0;
            if !more {
                self.gathered = 0;
                sink(std::mem::take(&mut self.frame))?;
            }
        }
    }
}

/// One end of a link to a peer over TLS.
pub struct TlsChannel {
    inbox: Arc<Inbox>,
    online: Arc<Stream>,
    ahead: Option<Arc<Stream>>,
    readers: Vec<JoinHandle<()>>,
}

/// Online bytes that wait at a receiver before its reader stops taking more from the network.
pub const ONLINE_CAPACITY: usize = 64 << 20;

impl TlsChannel {
    /// From finished connections; `ahead_capacity` bounds what is kept of the peer's run-ahead, or of ours at the peer.
    ///
    /// # Errors
    /// If no thread can be started.
    pub fn new(online: Stream, ahead: Option<Stream>, ahead_capacity: usize) -> io::Result<Self> {
        let inbox = Arc::new(Inbox::new(ONLINE_CAPACITY, ahead_capacity));
        let online = Arc::new(online);
        let ahead = ahead.map(Arc::new);
        let mut readers = Vec::new();
        for (lane, stream) in [(Lane::Online, Some(&online)), (Lane::Ahead, ahead.as_ref())] {
            let Some(stream) = stream else { continue };
            let (stream, inbox) = (Arc::clone(stream), Arc::clone(&inbox));
            let reader = std::thread::Builder::new().name("link".into()).spawn(move || {
                let mut decoder = Decoder::new(early_limit(ahead_capacity));
                let fault = stream.read(&mut |bytes| {
                    decoder.feed(bytes, &mut |frame| {
                        if let Some(word) = frame.iter().find(|m| m.tag == ABORT_TAG) {
                            let abort = Abort::decode(&word.payload);
                            return Err(abort.map_or(PeerFault::Malformed("an abort that is none"), |a| a.fault()));
                        }
                        // After the end of our side what still comes is read, so that our last word gets through.
                        let _ = inbox.push(lane, frame);
                        Ok(())
                    })
                });
                // One connection of a link does not outlive the other; if there is a reason, it comes on the online lane.
                let fault = match (lane, fault) {
                    (Lane::Ahead, PeerFault::Closed) => inbox.ended_within(LAST_WORD).unwrap_or(PeerFault::Closed),
                    (_, fault) => fault,
                };
                inbox.end(&fault);
                if fault != PeerFault::Closed {
                    stream.abandon();
                }
            })?;
            readers.push(reader);
        }
        Ok(TlsChannel { inbox, online, ahead, readers })
    }

    /// Bytes received so far, message headers included: online, ahead.
    #[must_use]
    pub fn received(&self) -> [u64; 2] {
        self.inbox.pushed()
    }

    /// Run-ahead bytes that have arrived and not been used yet.
    #[must_use]
    pub fn ahead_held(&self) -> u64 {
        self.inbox.ahead_held()
    }

    /// Messages received so far, both lanes.
    #[must_use]
    pub fn received_messages(&self) -> u64 {
        self.inbox.messages()
    }

    /// Ends sending and waits, at most `limit`, until the peer has ended too: so nothing that was sent gets lost.
    pub fn linger(&self, limit: Duration) {
        for stream in std::iter::once(&self.online).chain(&self.ahead) {
            stream.finish(None);
        }
        self.await_readers(limit);
    }

    fn await_readers(&self, limit: Duration) {
        let deadline = std::time::Instant::now() + limit;
        while !self.readers.iter().all(JoinHandle::is_finished) && std::time::Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Channel for TlsChannel {
    fn send_frame(&self, lane: Lane, frame: Vec<Message>) -> Result<(), PeerFault> {
        let stream = match (lane, &self.ahead) {
            (Lane::Ahead, Some(ahead)) => ahead,
            _ => &self.online,
        };
        let limit = MORE as usize - 1;
        if let Some(long) = frame.iter().find(|m| m.payload.len() > limit) {
            return Err(PeerFault::Oversize { limit, got: long.payload.len() });
        }
        let more = |i| i + 1 < frame.len();
        let heads: Vec<_> =
            frame.iter().enumerate().map(|(i, m)| header(m.tag, m.payload.len(), m.depth, more(i))).collect();
        let parts: Vec<&[u8]> = heads.iter().zip(&frame).flat_map(|(h, m)| [h.as_slice(), &m.payload]).collect();
        let out = stream.out.lock().unwrap_or_else(PoisonError::into_inner);
        stream.write(out, &parts).map_err(|e| match e.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                // Half a frame may be out: the connection is of no more use.
                stream.abandon();
                PeerFault::Timeout(stream.tcp.write_timeout().ok().flatten().unwrap_or_default().as_millis() as u64)
            }
            // Why the peer has gone, if it said so, is in the inbox.
            _ => self.inbox.ended_within(LAST_WORD).unwrap_or(PeerFault::Closed),
        })
    }

    fn ready(&self, lane: Lane, tag: u64) -> bool {
        self.inbox.ready(lane, tag)
    }

    fn recv(&self, lane: Lane, tag: u64, len: usize, timeout: Duration) -> Result<Message, PeerFault> {
        self.inbox.recv(lane, tag, len, timeout)
    }

    fn drain(&self, lane: Lane, tag: u64, len: usize, timeout: Duration) -> Result<(Message, u64), PeerFault> {
        self.inbox.drain(lane, tag, len, timeout)
    }

    fn ended(&self) -> bool {
        self.inbox.ended_within(Duration::ZERO).is_some()
    }

    fn end(&self, reason: Option<&Abort>) {
        let word = reason.map(Abort::encode);
        self.online.finish(word.as_deref());
        if let Some(s) = &self.ahead {
            // A sender that the peer's full buffer holds back gives way only when the socket goes.
            s.abandon();
        }
        self.inbox.end(&PeerFault::Closed);
    }
}

impl Drop for TlsChannel {
    fn drop(&mut self) {
        self.inbox.end(&PeerFault::Closed);
        self.online.finish(None);
        self.await_readers(LAST_WORD);
        for stream in std::iter::once(&self.online).chain(&self.ahead) {
            stream.abandon();
        }
        for reader in self.readers.drain(..) {
            let _ = reader.join();
        }
    }
}
