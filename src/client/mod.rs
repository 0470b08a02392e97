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
    view: View,
    /// Counters when it began.
    base: (BTreeMap<String, LinkReport>, [u64; 3]),
    begun: Instant,
    first: Option<Instant>,
    last: Instant,
    facts: Latest,
}

impl Newest {
    fn update(&mut self) {
        self.facts.links = since(self.view.links(), &self.base.0);
        let now = self.view.time();
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
    template: Option<ChatTemplate>,
    facts: Facts,
    watch: Mutex<Watch>,
    busy: AtomicUsize,
    sessions: AtomicU64,
    workers: Mutex<Vec<std::thread::JoinHandle<()>>>,
}

/// A handle on sessions. Clones share them.
#[derive(Clone)]
pub struct Client(Arc<Inner>);

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
        let template = ChatTemplate::open(dir)?;
        let first = source.open(&|| true)?;
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
            queue: Queue::new(limits.waiting),
            codec,
            template,
            facts,
            watch: Mutex::default(),
            busy: AtomicUsize::new(0),
            sessions: AtomicU64::new(0),
            workers: Mutex::default(),
        });
        let mut first = Some(inner.opened(first));
        for i in 0..limits.sessions {
            let (shared, open) = (Arc::clone(&inner), first.take());
            let thread = std::thread::Builder::new().name(format!("client {i}"));
            let worker = thread.spawn(move || shared.work(open)).map_err(|e| Error::io("a session's thread", e))?;
            inner.workers.lock().unwrap_or_else(PoisonError::into_inner).push(worker);
        }
        Ok(Client(inner))
    }

    /// Asks. The answer comes when a session is free.
    ///
    /// # Errors
    /// [`Failure::Invalid`] and [`Failure::TooLong`] for the request, [`Failure::Busy`] if too many wait.
    pub fn generate(&self, request: Request) -> Result<Answer, Failure> {
        let inner = &self.0;
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
            out,
        };
        // Places of callers that have gone away are free.
        inner.queue.retain(|job| !job.out.is_closed());
        inner.queue.push(request.caller, job).map_err(|e| match e {
            Refused::Full => Failure::Busy(inner.limits.waiting),
            Refused::Closed => Failure::Closing,
        })?;
        Ok(Answer(answer))
    }

    /// The model and the parties.
    #[must_use]
    pub fn facts(&self) -> &Facts {
        &self.0.facts
    }

    /// Whether the model has a chat template.
    #[must_use]
    pub fn chats(&self) -> bool {
        self.0.template.is_some()
    }

    /// What is going on.
    #[must_use]
    pub fn state(&self) -> State {
        let inner = &self.0;
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
    /// before there is one. For the user's own eyes.
    #[must_use]
    pub fn samples(&self) -> BTreeMap<String, Vec<u8>> {
        self.0.watch().newest.as_ref().map(|n| n.view.samples()).unwrap_or_default()
    }

    /// Whether a request would be taken now: a session is open, or can be.
    ///
    /// # Errors
    /// What keeps Owner or Helper from it.
    pub async fn reachable(&self) -> Result<()> {
        let waiting = self.0.queue.len();
        if waiting >= self.0.limits.waiting {
            return Err(Failure::Busy(waiting).into());
        }
        match &self.0.source {
            Source::Deployment(path) if !self.0.healthy() => crate::deploy::client::reachable(path).await,
            _ => Ok(()),
        }
    }

    /// Takes no more requests, finishes those that were taken, and ends the sessions.
    pub async fn close(&self) {
        self.0.queue.close();
        let inner = Arc::clone(&self.0);
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
                self.facts.config.check_ids(ids).map_err(|e| Failure::Invalid(e.to_string()))?;
                ids.clone()
            }
            Prompt::Chat(messages) => {
                let template = self.template.as_ref().ok_or_else(|| {
                    Failure::Invalid(
                        "this model has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json): it continues text, use /v1/completions".into(),
                    )
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
        let mut watch = self.watch();
        if let Some(view) = watch.open.remove(&seat.number) {
            add(&mut watch.links, view.links());
        }
        seat.open
    }

    /// A worker: one request after another, in a session that is opened when there is a request.
    fn work(&self, mut seat: Option<Seat>) {
        while let Some(job) = self.queue.next() {
            if job.out.is_closed() {
                continue;
            }
            self.busy.fetch_add(1, Relaxed);
            seat = self.serve(seat.take(), &job);
            self.busy.fetch_sub(1, Relaxed);
        }
        if let Some(seat) = seat {
            // A peer that is gone has ended it already.
            let _ = self.leave(seat).finish();
        }
    }

    /// One request; returns the session, unless it is spent.
    fn serve(&self, seat: Option<Seat>, job: &Job) -> Option<Seat> {
        // A peer may have ended it since: it was idle too long, or the peer was started anew.
        let broken = |number: u64| self.watch().open.get(&number).is_none_or(View::broken);
        let mut seat = seat.and_then(|seat| match broken(seat.number) {
            true => {
                drop(self.leave(seat));
                None
            }
            false => Some(seat),
        });
        let mut fresh = seat.is_none();
        {
            let totals = &mut self.watch().totals;
            totals.requests += 1;
            totals.prompt_tokens += job.prompt.len() as u64;
        }
        loop {
            let mut now = match seat.take() {
                Some(seat) => seat,
                None => match self.source.open(&|| !job.out.is_closed()) {
                    Ok(open) => self.opened(open),
                    Err(e) => {
                        self.failed(job, e);
                        return None;
                    }
                },
            };
            let mut said = false;
            match self.answer(&mut now, job, &mut said) {
                Ok(()) => return Some(now),
                // Of a session that was idle for a while the first request finds out that it is broken.
                Err(Error::Peer { .. }) if !fresh && !said => {
                    drop(self.leave(now));
                    fresh = true;
                }
                // What is wrong with the request leaves the session as it was.
                Err(e @ Error::Config(_)) => {
                    self.failed(job, e);
                    return Some(now);
                }
                Err(e) => {
                    let cause = self.leave(now).cause(e);
                    self.failed(job, cause);
                    return None;
                }
            }
        }
    }

    fn failed(&self, job: &Job, e: Error) {
        self.watch().totals.failed += 1;
        tracing::warn!(code = e.code(), error = %e, "a request failed");
        let _ = job.out.send(Err(Failure::Failed(e)));
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
            self.failed(job, e);
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
        self.watch().newest = Some(Newest { number, view, base, begun: now, first: None, last: now, facts });
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
