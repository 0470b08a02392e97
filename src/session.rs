//! One party's view of a session: role, links, streams, the passes being walked, and what operations declared to cost.
//!
//! All three parties run the same model program against their own [`Session`]. What differs is the *half* of each
//! operation that they execute:
//!
//! | party | walks | holds | waits for |
//! |---|---|---|---|
//! | Owner | one pass at a time, online | `d` | ahead messages of both, online replies of the Helper |
//! | Client | a batch of passes, masks only | `r` | nobody (back-pressure of the Owner's buffer only) |
//! | Helper | a batch of passes, masks only; a second thread answers the Owner | `r` | the Owner, in that second thread |
//!
//! The walk of Client and Helper leaves [`Job`]s behind: what is to be done once a pass is really online. The Helper's
//! jobs answer the Owner; the Client's jobs give an input or open an output.

mod jobs;

use std::ops::Range;
use std::sync::Arc;

use crate::error::{Error, PeerFault, Result};
use crate::ledger::{self, Doing, Kind};
use crate::net::meter::Meter;
use crate::net::{Lane, Links, blame};
use crate::par;
use crate::party::Role;
use crate::plan::cost::Cost;
use crate::plan::work::{Counts, Work};
use crate::prf::{Address, Pair, Prf, Stream, bytes_per_word};
use crate::ring::pack;
use crate::share::Rows;
pub use jobs::{BLOCKS_PER_LAYER, EndOnPanic, JOBS_AHEAD_LAYERS, Job, JobQueue, WALK_ENDED};
use jobs::{JOBS_IN_PIECES, JOBS_PER_LAYER};

/// One secure pass: consecutive positions computed together under one pass number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pass {
    /// Session-wide, never used again.
    pub number: u64,
    /// Its tokens within the batch being walked.
    pub tokens: Range<usize>,
}

/// Where in the program an operation stands: binds its randomness and its messages.
#[derive(Clone, Debug)]
pub struct Scope {
    layer: u32,
    path: String,
    /// Which block of the pass, if it is not walked as a whole: its first row, or one more for each piece of it.
    block: Option<usize>,
}

impl Scope {
    /// A scope outside the layers.
    #[must_use]
    pub fn new(path: &str) -> Self {
        Scope { layer: Address::NO_LAYER, path: path.to_string(), block: None }
    }

    /// A scope in a layer.
    #[must_use]
    pub fn layer(layer: usize) -> Self {
        Scope { layer: layer as u32, path: String::new(), block: None }
    }

    /// A child scope.
    #[must_use]
    pub fn at(&self, name: &str) -> Scope {
        let path = if self.path.is_empty() { name.to_string() } else { format!("{}.{name}", self.path) };
        Scope { path, ..*self }
    }

    /// The same for block `n` of the pass, or of the block that this scope is of already: what is in it has addresses of its own.
    #[must_use]
    pub fn block(&self, n: usize) -> Scope {
        Scope { path: self.path.clone(), block: Some(self.block.unwrap_or(0) + n), ..*self }
    }

    /// The operation's path, `attn.scores` for example.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The address of `label` in pass `pass`.
    #[must_use]
    pub fn address(&self, pass: u64, label: &'static str) -> Address {
        let path = match self.block {
            None => self.path.clone(),
            Some(row) => format!("{}@{row}", self.path),
        };
        Address { pass, layer: self.layer, path, label }
    }
}

/// One party's side of a session.
pub struct Session {
    role: Role,
    links: Links,
    prf: Prf,
    passes: Vec<Pass>,
    jobs: JobQueue,
    declared: Cost,
    meter: Arc<Meter>,
    /// Only in a walk that counts: see [`Session::counting`].
    work: Option<Arc<Work>>,
    /// See [`Session::run_far_ahead`].
    far_ahead: bool,
    /// The pass goes through attention in blocks.
    in_blocks: bool,
    /// What is walked now is a block of it.
    block: bool,
    /// Most pieces in which the pass goes through an exchange.
    pieces: usize,
}

impl Session {
    /// A new session; the PRF keys are the session's own.
    #[must_use]
    pub fn new(role: Role, links: Links, prf: Prf, meter: Arc<Meter>) -> Self {
        let (passes, jobs, declared) = (Vec::new(), JobQueue::default(), Cost::default());
        let (work, far_ahead, in_blocks, block, pieces) = (None, false, false, false, 1);
        Session { role, links, prf, passes, jobs, declared, meter, work, far_ahead, in_blocks, block, pieces }
    }

    /// A session that computes nothing: streams, products and lookups give zeros at once and are added to `work`. It has no
    /// key, so nothing in it is secret, and only a [`crate::world::World`] of its own, whose links carry lengths instead of
    /// bytes, makes one.
    pub(crate) fn counting(role: Role, links: Links, meter: Arc<Meter>, work: Arc<Work>) -> Self {
        Session { work: Some(work), ..Session::new(role, links, Prf::new([]), meter) }
    }

    /// What counts instead of computing, if this session does.
    pub(crate) fn work(&self) -> Option<&Arc<Work>> {
        self.work.as_ref()
    }

    /// What follows is for the operation at `scope`. Sending, receiving and drawing say so by themselves.
    pub(crate) fn enter(&self, scope: &Scope) {
        ledger::enter(Kind::of(scope.path()));
    }

    /// Adds what this party would compute in its walk, if this session counts; says whether it does.
    pub(crate) fn count(&self, scope: &Scope, counts: Counts) -> bool {
        self.enter(scope);
        let lane = if self.is_owner() { Lane::Online } else { Lane::Ahead };
        self.work.as_ref().is_some_and(|w| {
            w.add(self.role, lane, scope, counts);
            true
        })
    }

    /// Which party this is.
    #[must_use]
    pub fn role(&self) -> Role {
        self.role
    }

    /// This party's links.
    #[must_use]
    pub fn links(&self) -> &Links {
        &self.links
    }

    /// The jobs that this party's walk leaves behind.
    #[must_use]
    pub fn jobs(&self) -> JobQueue {
        self.jobs.clone()
    }

    /// Length of the longest chain of online messages that has ended at this party.
    #[must_use]
    pub fn depth(&self) -> u32 {
        self.meter.depth()
    }

    /// A request of so many tokens was answered.
    pub fn answered(&self, tokens: u64) {
        self.meter.answered(tokens);
    }

    /// Run-ahead bytes that this party has sent to the Owner.
    #[must_use]
    pub fn ahead_sent(&self) -> u64 {
        self.meter.sent(Role::Owner).ahead_bytes
    }

    /// Starts a batch of passes with consecutive numbers from `first`, of `tokens[i]` positions each. The Owner's
    /// batches have exactly one pass.
    pub fn begin(&mut self, first: u64, tokens: &[usize]) {
        let lane = if self.is_owner() { Lane::Online } else { Lane::Ahead };
        ledger::start(self.meter.ledger(), lane, Kind::Rest);
        (self.in_blocks, self.block, self.pieces) = (false, false, 1);
        let mut start = 0;
        self.passes = tokens
            .iter()
            .enumerate()
            .map(|(i, &n)| {
                start += n;
                Pass { number: first + i as u64, tokens: start - n..start }
            })
            .collect();
    }

    /// Walks a block of `rows` rows of the only pass: until the result is given to [`Session::end_block`], the pass is nothing but these
    /// rows. Scopes in it come from [`Scope::block`].
    ///
    /// # Errors
    /// [`Error::Internal`] if several passes are walked together.
    pub(crate) fn begin_block(&mut self, rows: usize) -> Result<Vec<Pass>> {
        let block = Pass { number: self.the_pass()?, tokens: 0..rows };
        (self.in_blocks, self.block) = (true, true);
        Ok(std::mem::replace(&mut self.passes, vec![block]))
    }

    /// Goes on with the whole pass.
    pub(crate) fn end_block(&mut self, whole: Vec<Pass>) {
        self.block = false;
        self.passes = whole;
    }

    /// What `op` does for a piece of `rows` rows of the only pass, which for it has no others. Scopes in it come from [`Scope::block`].
    pub(crate) fn piece<T>(&mut self, rows: usize, op: impl FnOnce(&mut Session) -> Result<T>) -> Result<T> {
        let piece = Pass { number: self.the_pass()?, tokens: 0..rows };
        let whole = std::mem::replace(&mut self.passes, vec![piece]);
        let out = op(self).and_then(|out| self.end_turn().map(|()| out));
        self.passes = whole;
        out
    }

    /// What was gathered for a piece leaves: its receiver has nothing else to wait for, though more is to follow.
    fn end_turn(&self) -> Result<()> {
        match self.role {
            Role::Owner => self.links.flush(Lane::Online),
            Role::Helper => self.leave(0, Box::new(|links| links.flush(Lane::Online))),
            Role::Client => Ok(()),
        }
    }

    /// An exchange of the pass is in so many pieces: more jobs wait, of fewer rows each.
    pub(crate) fn in_pieces(&mut self, pieces: usize) {
        self.pieces = self.pieces.max(pieces);
    }

    /// Tokens of the longer prompt for which this walk counts, unless what is walked now is a block, which is as long as there.
    pub(crate) fn stands_for(&self) -> Option<usize> {
        if self.block { None } else { self.work.as_ref()?.tokens() }
    }

    /// Ends the batch: its addresses can never be taken again, and all that was gathered leaves.
    ///
    /// # Errors
    /// [`Error::Peer`] if it can't.
    pub fn end_batch(&mut self) -> Result<()> {
        let left = self.links.flush(Lane::Ahead).and_then(|()| self.links.flush(Lane::Online));
        ledger::stop();
        if self.role != Role::Owner {
            for pass in &self.passes {
                self.jobs.complete(pass.number);
            }
        }
        if let Some(last) = self.passes.last() {
            self.prf.close_below(last.number + 1);
        }
        self.passes.clear();
        left
    }

    /// The passes being walked.
    #[must_use]
    pub fn passes(&self) -> &[Pass] {
        &self.passes
    }

    /// Positions in the batch.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.passes.last().map_or(0, |p| p.tokens.end)
    }

    /// Whether this party holds `d`.
    #[must_use]
    pub fn is_owner(&self) -> bool {
        self.role == Role::Owner
    }

    /// Takes one stream for a pass.
    ///
    /// # Errors
    /// [`Error::Reuse`].
    pub fn stream(&mut self, pair: Pair, scope: &Scope, pass: u64, label: &'static str) -> Result<Stream> {
        self.prf.take(pair, &scope.address(pass, label))
    }

    /// Uniform words for every element of `rows`, a stream per pass.
    ///
    /// # Errors
    /// [`Error::Reuse`].
    pub fn words(&mut self, pair: Pair, scope: &Scope, label: &'static str, rows: &Rows, k: u32) -> Result<Vec<u64>> {
        self.words_each(pair, scope, label, rows, 1, k)
    }

    /// Like [`Session::words`], `each` words per element.
    ///
    /// # Errors
    /// [`Error::Reuse`].
    pub fn words_each(
        &mut self,
        pair: Pair,
        scope: &Scope,
        label: &'static str,
        rows: &Rows,
        each: usize,
        k: u32,
    ) -> Result<Vec<u64>> {
        let words = rows.len() * each;
        if self.count(
            scope,
            Counts { prf_bytes: (bytes_per_word(k) * words) as u64, words: words as u64, ..Counts::default() },
        ) {
            return Ok(vec![0; words]);
        }
        let mut out = Vec::with_capacity(if self.passes.len() == 1 { 0 } else { words });
        for i in 0..self.passes.len() {
            let (number, n) = (self.passes[i].number, rows.range(&self.passes[i].tokens).len());
            let mut stream = self.stream(pair, scope, number, label)?;
            ledger::during(Doing::Streams, || match self.passes.len() {
                // Of a prompt's, which may be long, several threads share the blocks.
                1 => out = par::each(words, |block| stream.words_at(block, k)),
                _ => stream.words_into(n * each, k, &mut out),
            });
        }
        Ok(out)
    }

    /// Uniform bytes, `each` per element of `rows`.
    ///
    /// # Errors
    /// [`Error::Reuse`].
    pub fn bytes_each(
        &mut self,
        pair: Pair,
        scope: &Scope,
        label: &'static str,
        rows: &Rows,
        each: usize,
    ) -> Result<Vec<u8>> {
        let bytes = rows.len() * each;
        if self.count(scope, Counts { prf_bytes: bytes as u64, ..Counts::default() }) {
            return Ok(vec![0; bytes]);
        }
        let mut out = Vec::with_capacity(bytes);
        for i in 0..self.passes.len() {
            let (number, n) = (self.passes[i].number, rows.range(&self.passes[i].tokens).len());
            let mut stream = self.stream(pair, scope, number, label)?;
            ledger::during(Doing::Streams, || stream.bytes_into(n * each, &mut out));
        }
        Ok(out)
    }

    /// Client or Helper: sends `each` words of `k` bits per element to the Owner, a message per pass, ahead of time.
    ///
    /// # Errors
    /// [`Error::Peer`].
    pub fn send_ahead(
        &self,
        scope: &Scope,
        label: &'static str,
        rows: &Rows,
        each: usize,
        k: u32,
        values: &[u64],
    ) -> Result<()> {
        self.count(scope, Counts { words: values.len() as u64, ..Counts::default() });
        for pass in &self.passes {
            let r = rows.range(&pass.tokens);
            let payload = pack::pack(&values[r.start * each..r.end * each], k);
            self.links.gather(Role::Owner, Lane::Ahead, &scope.address(pass.number, label), payload)?;
        }
        Ok(())
    }

    /// The one pass of the Owner, or of a prompt.
    ///
    /// # Errors
    /// [`Error::Internal`] if the batch has not exactly one pass.
    pub fn the_pass(&self) -> Result<u64> {
        match self.passes.as_slice() {
            [pass] => Ok(pass.number),
            _ => Err(Error::Internal("one pass is walked at a time, online and in blocks".into())),
        }
    }

    /// The Owner's send to the Helper.
    ///
    /// # Errors
    /// [`Error::Peer`].
    pub fn send_online(&self, to: Role, scope: &Scope, label: &'static str, payload: Vec<u8>) -> Result<()> {
        self.enter(scope);
        self.links.gather(to, Lane::Online, &scope.address(self.the_pass()?, label), payload)
    }

    /// The Owner's receive of `n` packed words of `k` bits.
    ///
    /// # Errors
    /// [`Error::Peer`].
    pub fn recv_words(
        &self,
        from: Role,
        lane: Lane,
        scope: &Scope,
        label: &'static str,
        n: usize,
        k: u32,
    ) -> Result<Vec<u64>> {
        Ok(self.recv_packed(from, lane, scope, label, n, k)?.words())
    }

    /// [`Session::recv_words`], for words that are wanted block by block.
    ///
    /// # Errors
    /// [`Error::Peer`].
    pub fn recv_packed(
        &self,
        from: Role,
        lane: Lane,
        scope: &Scope,
        label: &'static str,
        n: usize,
        k: u32,
    ) -> Result<Received> {
        self.count(scope, Counts { words: n as u64, ..Counts::default() });
        Received::recv(&self.links, from, lane, &scope.address(self.the_pass()?, label), n, k)
    }

    /// Lets the walk of a single pass run to its end before any of its jobs is done, whatever memory that takes: for
    /// measurements of the online part by itself.
    pub fn run_far_ahead(&mut self) {
        self.far_ahead = true;
    }

    /// Leaves a job for pass `index` of the batch; of a single pass, not more than two layers ahead of the jobs done, or one layer where
    /// a layer is as long as to be cut into blocks.
    ///
    /// # Errors
    /// [`Error::Peer`] if what was gathered, which leaves before this waits, can't.
    pub fn leave(&self, index: usize, job: Job) -> Result<()> {
        let pass = self.passes[index].number;
        // Of several passes walked together, the first cannot be answered before the walk has come to its end.
        if self.passes.len() == 1 && !self.far_ahead {
            let layers = if self.in_blocks { 1 } else { JOBS_AHEAD_LAYERS };
            let limit = layers * (JOBS_PER_LAYER + JOBS_IN_PIECES * (self.pieces - 1));
            if !self.jobs.has_room(pass, limit) {
                self.links.flush(Lane::Ahead)?;
                ledger::during(Doing::Wait, || self.jobs.wait_room(pass, limit));
            }
        }
        let (ledger, kind) = (Arc::clone(self.meter.ledger()), ledger::current());
        let accounted = move |links: &Links| {
            ledger::start(&ledger, Lane::Online, kind);
            let out = job(links);
            ledger::stop();
            out
        };
        self.jobs.push(pass, Box::new(accounted));
        Ok(())
    }

    /// An operation states what it costs; summed up for comparison with the meter.
    pub fn declare(&mut self, cost: Cost) {
        self.declared = self.declared.beside(cost);
    }

    /// What the operations so far declared (the Owner's walk declares for all three parties).
    #[must_use]
    pub fn declared(&self) -> Cost {
        self.declared
    }
}

/// Packed words as they came.
pub struct Received {
    bytes: Vec<u8>,
    n: usize,
    k: u32,
}

impl Received {
    /// Receives `n` words of `k` bits on any thread.
    ///
    /// # Errors
    /// [`Error::Peer`] with the peer, the step and what was wrong.
    pub fn recv(links: &Links, from: Role, lane: Lane, step: &Address, n: usize, k: u32) -> Result<Received> {
        Received::new(links.recv(from, lane, step, pack::packed_len(n, k))?, n, k, (from, step))
    }

    /// `n` words of `k` bits that `from` has sent at `step`.
    ///
    /// # Errors
    /// [`Error::Peer`] for another length or padding bits that are set.
    pub fn new(bytes: Vec<u8>, n: usize, k: u32, (from, step): (Role, &Address)) -> Result<Received> {
        match pack::well_formed(&bytes, n, k) {
            true => Ok(Received { bytes, n, k }),
            false => Err(blame(from, step, PeerFault::Malformed("padding bits set"))),
        }
    }

    /// Some of them.
    #[must_use]
    pub fn block(&self, words: Range<usize>) -> Vec<u64> {
        pack::unpacked(&self.bytes, words, self.k)
    }

    /// All of them.
    #[must_use]
    pub fn words(&self) -> Vec<u64> {
        par::each(self.n, |block| self.block(block))
    }
}

/// [`Received::recv`], of words that are wanted at once.
///
/// # Errors
/// As [`Received::recv`].
pub fn recv_words(links: &Links, from: Role, lane: Lane, step: &Address, n: usize, k: u32) -> Result<Vec<u64>> {
    Ok(Received::recv(links, from, lane, step, n, k)?.words())
}
