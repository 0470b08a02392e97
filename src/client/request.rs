//! What is asked for, what comes of it, and why it fails.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_core::Stream;
use serde::Serialize;
use tokio::sync::mpsc;

use crate::error::{Error, Result};
use crate::model::chat::Message;

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
pub struct Answer(pub(super) mpsc::UnboundedReceiver<Result<Event, Failure>>);

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
