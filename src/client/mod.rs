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
mod request;
mod session;
mod text;
mod watch;
mod worker;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use serde::Serialize;
use tokio::sync::mpsc;

use crate::deploy::config::{Config, Party};
use crate::error::{Error, Result};
use crate::generate::LocalOptions;
use crate::model::{ChatTemplate, ModelConfig, TextCodec};
use crate::plan::MAX_TEMPERATURE;
use queue::{Queue, Refused};
pub use request::{Answer, End, Event, Failure, Prompt, Request};
use session::{Open, Source, View};
pub use watch::{Latest, State, Time, Totals};
use watch::{Watch, add};
use worker::Seat;

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
        inner.drop_abandoned();
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
        inner.drop_abandoned();
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
        inner.drop_abandoned();
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

impl Inner {
    /// Callers that have gone away hold no place in the queue.
    fn drop_abandoned(&self) {
        self.queue.retain(|job| !job.out.is_closed());
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
