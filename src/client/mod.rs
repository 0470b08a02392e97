//! What a program embeds to be a Client: an asynchronous handle on sessions with Owner and Helper, or on all three parties in this
//! process. The gateway ([`crate::serve`]) and `trefoil chat` stand on it.
//!
//! ```no_run
//! use trefoil::client::{Client, Event, Request};
//!
//! # async fn example() -> trefoil::Result<()> {
//! let client = Client::connect("configs/client.toml").await?;
//! let mut answer = client.generate(Request::text("It was a bright morning"))?;
//! while let Some(event) = answer.next().await {
//!     match event? {
//!         Event::Text(piece) => print!("{piece}"),
//!         Event::Done(end) => eprintln!("{} tokens", end.completion_tokens),
//!     }
//! }
//! client.close().await;
//! # Ok(())
//! # }
//! ```

mod queue;
mod session;
mod text;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures_core::Stream;
use serde::Serialize;
use tokio::sync::mpsc;

use crate::deploy::config::{Config, Party};
use crate::error::{Error, Result};
use crate::generate::{LinkReport, LocalOptions, Stop};
use crate::model::chat::Message;
use crate::model::{ChatTemplate, ModelConfig, TextCodec};
use crate::plan::MAX_TEMPERATURE;
use queue::{Queue, Refused};
use session::{Open, Source, View, since};
use text::Speaker;

/// What is asked for.
#[derive(Clone)]
pub struct Request {
    /// What to continue.
    pub prompt: Prompt,
    /// Most tokens of the answer; `None` is as many as the model's context has room for.
    pub max_tokens: Option<usize>,
    /// 0 (greedy) to 4.
    pub temperature: f64,
    /// Of the sampling noise; no key depends on it. `None` is a fresh one.
    pub seed: Option<u64>,
    /// The answer ends before the first of these.
    pub stop: Vec<String>,
    /// Requests of one caller are served in their order; callers take turns.
    pub caller: u64,
}

impl std::fmt::Debug for Request {
    /// Without what is private.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Request").field("max_tokens", &self.max_tokens).finish_non_exhaustive()
    }
}

/// What to continue.
#[derive(Clone)]
pub enum Prompt {
    /// Text.
    Text(String),
    /// A chat, by the model's template.
    Chat(Vec<Message>),
    /// Tokens.
    Tokens(Vec<u32>),
}

impl Request {
    /// Continues `prompt` greedily.
    #[must_use]
    pub fn new(prompt: Prompt) -> Self {
        Request { prompt, max_tokens: None, temperature: 0.0, seed: None, stop: Vec::new(), caller: 0 }
    }

    /// Continues a text greedily.
    #[must_use]
    pub fn text(text: impl Into<String>) -> Self {
        Self::new(Prompt::Text(text.into()))
    }

    /// Answers a chat greedily.
    #[must_use]
    pub fn chat(messages: Vec<Message>) -> Self {
        Self::new(Prompt::Chat(messages))
    }
}

/// Why a request failed, by what its sender can do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Failure {
    /// It asks for what there is not.
    #[error("{0}")]
    Invalid(String),
    /// It is longer than the model's context.
    #[error("{0}")]
    TooLong(String),
    /// As many requests wait as may.
    #[error("{0} requests are waiting already, as many as may: try again later")]
    Busy(usize),
    /// The Client is closing.
    #[error("the client is shutting down: no new requests")]
    Closing,
    /// No session can be had, for a reason on this side.
    #[error("the client cannot open a session; its log says why")]
    Unavailable,
    /// It failed on its way.
    #[error(transparent)]
    Failed(#[from] Error),
}

impl From<Failure> for Error {
    fn from(f: Failure) -> Error {
        match f {
            Failure::Failed(e) => e,
            other => Error::Config(other.to_string()),
        }
    }
}

/// What comes of a request.
#[derive(Clone)]
pub enum Event {
    /// A piece of the answer, never empty; characters are whole.
    Text(String),
    /// The answer is complete.
    Done(End),
}

/// A complete answer's figures.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct End {
    /// Whether the model, or a stop sequence, ended it; otherwise it has as many tokens as were asked for, or fit.
    pub stopped: bool,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens of the answer, an end token included.
    pub completion_tokens: usize,
    /// From the first message to the first token.
    pub prefill: Duration,
    /// From the first token to the last.
    pub decode: Duration,
}

/// An answer as it comes. Dropped, it ends the request and frees its place.
pub struct Answer(mpsc::UnboundedReceiver<Result<Event, Failure>>);

impl Answer {
    /// What comes next; `None` after [`Event::Done`] or an error.
    pub async fn next(&mut self) -> Option<Result<Event, Failure>> {
        self.0.recv().await
    }

    /// The whole text.
    ///
    /// # Errors
    /// The request's.
    pub async fn text(mut self) -> Result<(String, End), Failure> {
        let mut text = String::new();
        while let Some(event) = self.next().await {
            match event? {
                Event::Text(piece) => text += &piece,
                Event::Done(end) => return Ok((text, end)),
            }
        }
        Err(Failure::Closing)
    }
}

impl Stream for Answer {
    type Item = Result<Event, Failure>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.poll_recv(context)
    }
}

struct Job {
    prompt: Vec<u32>,
    max_tokens: usize,
    temperature: f64,
    seed: u64,
    stop: Vec<String>,
    caller: u64,
    out: mpsc::UnboundedSender<Result<Event, Failure>>,
}

/// How many sessions there may be, and how many requests may wait for them.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Requests that run at the same time, each in a session of its own.
    pub sessions: usize,
    /// Requests that wait.
    pub waiting: usize,
}

/// What the Client knows of its model and parties.
#[derive(Clone, Debug, Serialize)]
pub struct Facts {
    /// The model's public configuration.
    #[serde(skip)]
    pub config: ModelConfig,
    /// All three parties are in this process.
    pub local: bool,
    /// Layers that the Client computes in plaintext.
    pub public_layers: usize,
    /// Whether the embedding is the Owner's.
    pub private_embedding: bool,
    /// Whether final norm and head are the Owner's.
    pub private_head: bool,
    /// Positions: prompt and answer together, but for the answer's last token.
    pub context: usize,
    /// The longest prompt that is taken.
    pub prompt_tokens: usize,
    /// Who the Owner is.
    pub owner: String,
    /// Who the Helper is.
    pub helper: String,
}

/// Requests so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Totals {
    /// Begun.
    pub requests: u64,
    /// That failed.
    pub failed: u64,
    /// That their callers left.
    pub abandoned: u64,
    /// Tokens of prompts.
    pub prompt_tokens: u64,
    /// Tokens of answers.
    pub completion_tokens: u64,
}

/// The newest request that has begun.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Latest {
    /// Whether it still runs.
    pub running: bool,
    /// Tokens of its prompt.
    pub prompt_tokens: usize,
    /// Tokens of its answer so far.
    pub completion_tokens: usize,
    /// From the first message to the first token, once there is one.
    pub prefill_ms: Option<f64>,
    /// Mean time of a further token so far.
    pub decode_ms: Option<f64>,
    /// Its traffic.
    pub links: BTreeMap<String, LinkReport>,
    /// Its time.
    pub time: Time,
}

/// Where time went, on one thread: the Owner's, where all parties are in this process, and otherwise the Client's walk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Time {
    /// Computing.
    pub compute_ms: f64,
    /// Waiting for a peer.
    pub wait_ms: f64,
    /// Waiting for the simulated network.
    pub network_ms: f64,
}

/// What is going on, for pages and metrics.
#[derive(Clone, Debug, Serialize)]
pub struct State {
    /// Sessions: as many as may be, open now, busy now.
    pub sessions: [usize; 3],
    /// Requests: as many as may wait, waiting.
    pub queue: [usize; 2],
    /// Since the start.
    pub totals: Totals,
    /// Traffic since the start, by directed link; of a deployment, the Client's links.
    pub links: BTreeMap<String, LinkReport>,
    /// The newest request.
    pub latest: Option<Latest>,
}

/// The newest request, as it is kept.
struct Newest {
    number: u64,
    caller: u64,
    /// None once its session has ended: what it counted is in the facts.
    view: Option<View>,
    /// Counters when it began.
    base: (BTreeMap<String, LinkReport>, [u64; 3]),
    begun: Instant,
    first: Option<Instant>,
    last: Instant,
    facts: Latest,
}

impl Newest {
    fn update(&mut self) {
        let Some(view) = &self.view else { return };
        self.facts.links = since(view.links(), &self.base.0);
        let now = view.time();
        let ms = |i: usize| now[i].saturating_sub(self.base.1[i]) as f64 / 1e6;
        self.facts.time = Time { compute_ms: ms(0), wait_ms: ms(1), network_ms: ms(2) };
        let n = self.facts.completion_tokens;
        self.facts.prefill_ms = self.first.map(|t| (t - self.begun).as_secs_f64() * 1e3);
        self.facts.decode_ms =
            self.first.filter(|_| n > 1).map(|first| (self.last - first).as_secs_f64() * 1e3 / (n - 1) as f64);
    }
}

#[derive(Default)]
struct Watch {
    totals: Totals,
    /// Of sessions that have ended.
    links: BTreeMap<String, LinkReport>,
    open: BTreeMap<u64, View>,
    newest: Option<Newest>,
}

fn add(to: &mut BTreeMap<String, LinkReport>, links: BTreeMap<String, LinkReport>) {
    for (name, link) in links {
        let t = to.entry(name).or_default();
        t.online_bytes += link.online_bytes;
        t.ahead_bytes += link.ahead_bytes;
        t.messages += link.messages;
    }
}

struct Inner {
    source: Source,
    limits: Limits,
    queue: Queue<Job>,
    codec: TextCodec,
    /// The chat template, or why there is none.
    template: Result<ChatTemplate, String>,
    facts: Facts,
    watch: Mutex<Watch>,
    /// Open sessions that nobody uses, the one used last on top.
    idle: Mutex<Vec<Seat>>,
    busy: AtomicUsize,
    sessions: AtomicU64,
    workers: Mutex<Vec<std::thread::JoinHandle<()>>>,
}

/// A handle on sessions. Clones share them; with the last one gone no more requests are begun, and the sessions end.
#[derive(Clone)]
pub struct Client(Arc<Handle>);

struct Handle(Arc<Inner>);

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.queue.close();
    }
}

impl Client {
    /// The Client of the deployment that the file `path` configures, with up to 4 sessions and 64 requests waiting. One session is
    /// opened at once, so that what is wrong is known at once.
    ///
    /// # Errors
    /// [`Error::Config`] and [`Error::Model`] for what is here, [`Error::Peer`] for what is there.
    pub async fn connect(path: impl Into<PathBuf>) -> Result<Client> {
        Self::connect_with(path, Limits { sessions: 4, waiting: 64 }).await
    }

    /// As [`Client::connect`], with other limits.
    ///
    /// # Errors
    /// As [`Client::connect`].
    pub async fn connect_with(path: impl Into<PathBuf>, limits: Limits) -> Result<Client> {
        let path = path.into();
        blocking(move || {
            let config = Config::load(&path)?;
            let Party::Client { public, .. } = config.party() else {
                return Err(Error::Config(format!(
                    "{}: this is the {}'s configuration; a client's has role = \"client\" (trefoil init client)",
                    path.display(),
                    config.role()
                )));
            };
            let dir = public.clone();
            Self::start(Source::Deployment(path), &dir, limits)
        })
        .await
    }

    /// All three parties in this process, with the model in `dir`: that shows the protocol and isolates nothing. One session.
    ///
    /// # Errors
    /// As [`crate::generate::Local::open`].
    pub async fn local(dir: impl Into<PathBuf>, options: LocalOptions, waiting: usize) -> Result<Client> {
        let dir = dir.into();
        let limits = Limits { sessions: 1, waiting };
        blocking(move || Self::start(Source::Local(dir.clone(), Box::new(options)), &dir, limits)).await
    }

    fn start(source: Source, dir: &Path, limits: Limits) -> Result<Client> {
        let limits = Limits { sessions: limits.sessions.max(1), ..limits };
        let codec = TextCodec::open(dir)?;
        // One that cannot be read is no reason not to continue texts.
        let template = match ChatTemplate::open(dir) {
            Ok(Some(template)) => Ok(template),
            Ok(None) => Err("chat_template.jinja, or chat_template in tokenizer_config.json, is missing".to_owned()),
            Err(e) => {
                tracing::warn!(error = %e, "chats will be refused");
                Err(e.to_string())
            }
        };
        let first = source.open()?;
        let facts = match &first {
            Open::Deployment(remote) => {
                let f = remote.facts();
                Facts {
                    config: f.config.clone(),
                    local: false,
                    public_layers: f.plan.first_private,
                    private_embedding: f.plan.private_embedding,
                    private_head: !f.plan.head.public,
                    context: f.plan.max_positions,
                    prompt_tokens: f.prompt_tokens.min(f.own_prompt_tokens).min(f.plan.max_positions),
                    owner: f.owner.to_string(),
                    helper: f.helper.to_string(),
                }
            }
            Open::Local(local) => Facts {
                config: ModelConfig::open(dir)?,
                local: true,
                public_layers: local.plan().first_private,
                private_embedding: local.plan().private_embedding,
                private_head: !local.plan().head.public,
                context: local.plan().max_positions,
                prompt_tokens: local.plan().max_positions,
                owner: "this process".into(),
                helper: "this process".into(),
            },
        };
        let inner = Arc::new(Inner {
            source,
            limits,
            queue: Queue::new(),
            codec,
            template,
            facts,
            watch: Mutex::default(),
            idle: Mutex::default(),
            busy: AtomicUsize::new(0),
            sessions: AtomicU64::new(0),
            workers: Mutex::default(),
        });
        let first = inner.opened(first);
        inner.idle().push(first);
        let client = Client(Arc::new(Handle(Arc::clone(&inner))));
        for i in 0..limits.sessions {
            let shared = Arc::clone(&inner);
            let thread = std::thread::Builder::new().name(format!("client {i}"));
            let worker = thread.spawn(move || shared.work()).map_err(|e| Error::io("a session's thread", e))?;
            inner.workers.lock().unwrap_or_else(PoisonError::into_inner).push(worker);
        }
        Ok(client)
    }

    /// Asks. The answer comes when a session is free.
    ///
    /// # Errors
    /// [`Failure::Invalid`] and [`Failure::TooLong`] for the request, [`Failure::Busy`] if too many wait.
    pub fn generate(&self, request: Request) -> Result<Answer, Failure> {
        let inner = self.inner();
        // Those that a session is free for do not wait.
        let limit = inner.limits.waiting + inner.limits.sessions.saturating_sub(inner.busy.load(Relaxed));
        // Before the work of reading it.
        if inner.queue.full(request.caller, limit) {
            return Err(Failure::Busy(inner.limits.waiting));
        }
        let prompt = inner.encode(&request.prompt)?;
        if prompt.is_empty() {
            return Err(Failure::Invalid("the prompt is empty: give at least one token of text".into()));
        }
        let Facts { context, prompt_tokens, .. } = inner.facts;
        if prompt.len() > prompt_tokens {
            return Err(Failure::TooLong(format!(
                "the prompt has {} tokens, and at most {prompt_tokens} are taken (the context is {context}): shorten it",
                prompt.len()
            )));
        }
        // The answer's last token takes no position.
        let room = context + 1 - prompt.len();
        let max_tokens = request.max_tokens.unwrap_or(room);
        if max_tokens == 0 {
            return Err(Failure::Invalid("nothing to generate: ask for at least one token".into()));
        }
        if !(0.0..=MAX_TEMPERATURE).contains(&request.temperature) {
            return Err(Failure::Invalid(format!("temperature: expected 0 (greedy) to {MAX_TEMPERATURE}")));
        }
        let seed = match request.seed {
            Some(seed) => seed,
            None => fresh_seed()?,
        };
        let (out, answer) = mpsc::unbounded_channel();
        let job = Job {
            prompt,
            max_tokens: max_tokens.min(room),
            temperature: request.temperature,
            seed,
            stop: request.stop,
            caller: request.caller,
            out,
        };
        // Places of callers that have gone away are free.
        inner.queue.retain(|job| !job.out.is_closed());
        let gone = inner.queue.push(request.caller, job, limit).map_err(|e| match e {
            Refused::Full => Failure::Busy(inner.limits.waiting),
            Refused::Closed => Failure::Closing,
        })?;
        if let Some(job) = gone {
            let _ = job.out.send(Err(Failure::Busy(inner.limits.waiting)));
        }
        Ok(Answer(answer))
    }

    /// The model and the parties.
    #[must_use]
    pub fn facts(&self) -> &Facts {
        &self.inner().facts
    }

    fn inner(&self) -> &Arc<Inner> {
        &self.0.0
    }

    /// Whether the model has a chat template.
    #[must_use]
    pub fn chats(&self) -> bool {
        self.inner().template.is_ok()
    }

    /// What is going on.
    #[must_use]
    pub fn state(&self) -> State {
        let inner = self.inner();
        let mut watch = inner.watch();
        let mut links = watch.links.clone();
        watch.open.values().for_each(|view| add(&mut links, view.links()));
        let latest = watch.newest.as_mut().map(|n| {
            if n.facts.running {
                n.update();
            }
            n.facts.clone()
        });
        State {
            sessions: [inner.limits.sessions, watch.open.len(), inner.busy.load(Relaxed)],
            queue: [inner.limits.waiting, inner.queue.len()],
            totals: watch.totals,
            links,
            latest,
        }
    }

    /// The beginning of a message of each link that the Client sees, of the session of the newest request: what a party received. Empty
    /// before there is one, and to all but the caller of that request: together with what another party knows, what the Client
    /// sends is the prompt.
    #[must_use]
    pub fn samples(&self, caller: u64) -> BTreeMap<String, Vec<u8>> {
        let watch = self.inner().watch();
        let own = watch.newest.as_ref().filter(|n| n.caller == caller);
        own.and_then(|n| n.view.as_ref()).map(View::samples).unwrap_or_default()
    }

    /// Whether a request would be taken now: a session is open, or can be.
    ///
    /// # Errors
    /// What keeps Owner or Helper from it.
    pub async fn reachable(&self) -> Result<()> {
        let inner = self.inner();
        let waiting = inner.queue.len();
        if waiting >= inner.limits.waiting.max(1) {
            return Err(Failure::Busy(waiting).into());
        }
        match &inner.source {
            Source::Deployment(path) if !inner.healthy() => crate::deploy::client::reachable(path).await,
            _ => Ok(()),
        }
    }

    /// Takes no more requests, finishes those that were taken, and ends the sessions.
    pub async fn close(&self) {
        self.inner().queue.close();
        let inner = Arc::clone(self.inner());
        let wait = move || {
            let workers = std::mem::take(&mut *inner.workers.lock().unwrap_or_else(PoisonError::into_inner));
            workers.into_iter().for_each(|w| drop(w.join()));
        };
        let _ = tokio::task::spawn_blocking(wait).await;
    }
}

async fn blocking<T: Send + 'static>(f: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let lost = |_| Error::Internal("a thread panicked".into());
    tokio::task::spawn_blocking(f).await.map_err(lost)?
}

fn fresh_seed() -> Result<u64> {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).map_err(|e| Error::Internal(format!("the operating system has no randomness: {e}")))?;
    Ok(u64::from_le_bytes(bytes))
}

/// How long a request waits for a session.
const PATIENCE: Duration = Duration::from_secs(6);
const PAUSE: Duration = Duration::from_millis(250);

/// An open session and its number among those that are watched.
struct Seat {
    open: Open,
    number: u64,
}

impl Inner {
    fn watch(&self) -> MutexGuard<'_, Watch> {
        self.watch.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a session is open whose links have not ended.
    fn healthy(&self) -> bool {
        self.watch().open.values().any(|view| !view.broken())
    }

    fn encode(&self, prompt: &Prompt) -> Result<Vec<u32>, Failure> {
        Ok(match prompt {
            Prompt::Text(text) => self.codec.encode(text)?,
            Prompt::Tokens(ids) => {
                let wrong = |_| {
                    let most = self.facts.config.vocab_size;
                    Failure::Invalid(format!("the prompt has a token outside of the model's vocabulary of {most}"))
                };
                self.facts.config.check_ids(ids).map_err(wrong)?;
                ids.clone()
            }
            Prompt::Chat(messages) => {
                let template = self.template.as_ref().map_err(|why| {
                    Failure::Invalid(format!(
                        "this model has no chat template ({why}): it continues text, use /v1/completions"
                    ))
                })?;
                // The template writes begin and end tokens itself.
                self.codec.encode_plain(&template.render(messages, true).map_err(Failure::Invalid)?)?
            }
        })
    }

    fn opened(&self, open: Open) -> Seat {
        let number = self.sessions.fetch_add(1, Relaxed);
        self.watch().open.insert(number, open.view());
        Seat { open, number }
    }

    /// Gives a session up; its traffic stays in the sums.
    fn leave(&self, seat: Seat) -> Open {
        // Closing links takes its time: not under the lock.
        let _views = {
            let mut watch = self.watch();
            let view = watch.open.remove(&seat.number);
            if let Some(view) = &view {
                add(&mut watch.links, view.links());
            }
            let newest = watch.newest.as_mut().filter(|n| n.number == seat.number).and_then(|n| {
                n.update();
                n.facts.running = false;
                n.view.take()
            });
            (view, newest)
        };
        seat.open
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Seat>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A worker: one request after another.
    fn work(&self) {
        while let Some(job) = self.queue.next() {
            if job.out.is_closed() {
                continue;
            }
            self.busy.fetch_add(1, Relaxed);
            let mut seat = None;
            let served = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.serve(&mut seat, &job)));
            let spent = match served {
                Ok(Ok(())) => None,
                Ok(Err(failure)) => Some(failure),
                Err(_) => Some(Failure::Failed(Error::Internal("a request's thread panicked".into()))),
            };
            match (seat, spent) {
                (Some(seat), None) => self.idle().push(seat),
                (seat, failure) => {
                    let open = seat.map(|seat| self.leave(seat));
                    match (open, failure) {
                        (Some(open), Some(Failure::Failed(e))) => self.failed(&job, Failure::Failed(open.cause(e))),
                        (_, Some(failure)) => self.failed(&job, failure),
                        (_, None) => {}
                    }
                }
            }
            self.busy.fetch_sub(1, Relaxed);
        }
        let left = self.idle().pop();
        if let Some(seat) = left {
            // A peer that is gone has ended it already.
            let _ = self.leave(seat).finish();
        }
    }

    /// An open session: one that is idle, or a new one. Parties that are away, or have no place, are waited for a moment: they may be
    /// starting, or another request may end. Says whether it is new.
    fn seat(&self, job: &Job) -> Result<(Seat, bool), Failure> {
        let begun = Instant::now();
        loop {
            loop {
                let Some(seat) = self.idle().pop() else { break };
                let broken = self.watch().open.get(&seat.number).is_none_or(View::broken);
                if !broken {
                    return Ok((seat, false));
                }
                // A peer has ended it: it was idle too long, or the peer was started anew.
                drop(self.leave(seat));
            }
            match self.source.open() {
                Ok(open) => return Ok((self.opened(open), true)),
                Err(Error::Peer { .. }) if begun.elapsed() < PATIENCE && !job.out.is_closed() => {
                    std::thread::sleep(PAUSE);
                }
                Err(e @ Error::Peer { .. }) => return Err(Failure::Failed(e)),
                // Files or limits of this side: nothing that the caller could mend, or has to know.
                Err(e) => {
                    tracing::error!(code = e.code(), error = %e, "no session can be opened");
                    return Err(Failure::Unavailable);
                }
            }
        }
    }

    /// One request. On success the session in `seat` can be used again.
    fn serve(&self, seat: &mut Option<Seat>, job: &Job) -> Result<(), Failure> {
        {
            let totals = &mut self.watch().totals;
            totals.requests += 1;
            totals.prompt_tokens += job.prompt.len() as u64;
        }
        let mut again = true;
        loop {
            let (now, fresh) = self.seat(job)?;
            let now = seat.insert(now);
            let mut said = false;
            match self.answer(now, job, &mut said) {
                // Of a session that was idle for a while the first request finds out that it is broken.
                Err(Error::Peer { .. }) if !fresh && !said && again => {
                    again = false;
                    drop(seat.take().map(|seat| self.leave(seat)));
                }
                // What is wrong with the request leaves the session as it was.
                Err(e @ Error::Config(_)) => {
                    self.failed(job, Failure::Invalid(e.to_string()));
                    return Ok(());
                }
                other => return other.map_err(Failure::Failed),
            }
        }
    }

    fn failed(&self, job: &Job, failure: Failure) {
        let totals = &mut self.watch().totals;
        if job.out.is_closed() {
            totals.abandoned += 1;
            return;
        }
        totals.failed += 1;
        match &failure {
            Failure::Failed(e) => tracing::warn!(code = e.code(), error = %e, "a request failed"),
            other => tracing::warn!(error = %other, "a request failed"),
        }
        let _ = job.out.send(Err(failure));
    }

    /// Runs the request in an open session; `said` once a token has come.
    fn answer(&self, seat: &mut Seat, job: &Job, said: &mut bool) -> Result<()> {
        let mut speaker = Speaker::new(&self.codec, &job.prompt, &self.facts.config.eos_ids, &job.stop)?;
        let Some(view) = self.watch().open.get(&seat.number).cloned() else {
            return Err(Error::Internal("a session that nobody watches".into()));
        };
        self.begin(seat.number, view, job);
        let (mut stopped, mut broken) = (false, None);
        let mut on_token = |id: u32| {
            *said = true;
            self.token(seat.number);
            match speaker.token(id) {
                Ok((piece, end)) => {
                    stopped = end;
                    let heard = if piece.is_empty() {
                        !job.out.is_closed()
                    } else {
                        job.out.send(Ok(Event::Text(piece))).is_ok()
                    };
                    heard && !end
                }
                Err(e) => {
                    broken = Some(e);
                    false
                }
            }
        };
        let out = seat.open.generate(&job.prompt, job.max_tokens, (job.temperature, job.seed), &mut on_token);
        self.end(seat.number);
        let g = out?;
        if let Some(e) = broken {
            self.failed(job, Failure::Failed(e));
            return Ok(());
        }
        if job.out.is_closed() {
            self.watch().totals.abandoned += 1;
            return Ok(());
        }
        if !stopped {
            let (rest, end) = speaker.finish()?;
            stopped = end;
            if !rest.is_empty() {
                let _ = job.out.send(Ok(Event::Text(rest)));
            }
        }
        let end = End {
            stopped: stopped || g.stop == Stop::EndToken,
            prompt_tokens: job.prompt.len(),
            completion_tokens: g.tokens.len(),
            prefill: g.prefill,
            decode: g.decode.iter().sum(),
        };
        let _ = job.out.send(Ok(Event::Done(end)));
        Ok(())
    }

    fn begin(&self, number: u64, view: View, job: &Job) {
        let now = Instant::now();
        let base = (view.links(), view.time());
        let facts = Latest { running: true, prompt_tokens: job.prompt.len(), ..Latest::default() };
        let caller = job.caller;
        let newest = Newest { number, caller, view: Some(view), base, begun: now, first: None, last: now, facts };
        // What the one before held may take its time to close: not under the lock.
        let before = self.watch().newest.replace(newest);
        drop(before);
    }

    fn token(&self, number: u64) {
        let mut watch = self.watch();
        watch.totals.completion_tokens += 1;
        if let Some(n) = watch.newest.as_mut().filter(|n| n.number == number) {
            n.last = Instant::now();
            n.first.get_or_insert(n.last);
            n.facts.completion_tokens += 1;
        }
    }

    fn end(&self, number: u64) {
        if let Some(n) = self.watch().newest.as_mut().filter(|n| n.number == number && n.facts.running) {
            n.update();
            n.facts.running = false;
        }
    }
}
