//! The Client: the public layers in plaintext, an input per pass, tokens out.

use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use ndarray::Array2;

use super::{Request, end_walk, lost, request_scope, walk, worst};
use crate::error::{Error, Result};
use crate::model::secure::{ClientPorts, SecureModel, logit_format};
use crate::model::{FloatCache, Weights, float};
use crate::net::Lane;
use crate::party::Role;
use crate::plan::{F, INPUT_LIMIT};
use crate::protocol::embedding::source;
use crate::ring::fixed;
use crate::session::{EndOnPanic, Session};
use crate::world::join;

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// An end token.
    EndToken,
    /// As many tokens as were asked for.
    Length,
    /// The caller had enough.
    Caller,
}

/// What a request brought.
#[derive(Clone, Debug)]
pub struct Generation {
    /// Generated tokens, without the prompt; an end token is the last one.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub stop: Stop,
    /// From the request to the first token.
    pub prefill: Duration,
    /// From each token to the next.
    pub decode: Vec<Duration>,
    /// Opened logits per token, if asked for.
    pub logits: Vec<Vec<f32>>,
}

/// The Client of a session.
pub struct Client {
    session: Session,
    model: SecureModel,
    /// The public layers and the embedding they need; `None` when the embedding is private.
    public: Option<Weights>,
    requests: u64,
    next_pass: u64,
}

impl Client {
    /// With the Client's prepared part and the public part of the checkpoint.
    #[must_use]
    pub fn new(session: Session, model: SecureModel, public: Option<Weights>) -> Self {
        Client { session, model, public, requests: 0, next_pass: 1 }
    }

    /// Generates; `on_token` sees each accepted token and says whether to go on.
    ///
    /// # Errors
    /// [`Error::Config`] for a prompt that is empty or too long; [`Error::Range`] if a value left the plan's range (no
    /// token of that pass is given out); [`Error::Peer`].
    pub fn generate(
        &mut self,
        prompt: &[u32],
        max_new: usize,
        temperature: f64,
        seed: u64,
        open_logits: bool,
        on_token: &mut dyn FnMut(u32) -> bool,
    ) -> Result<Generation> {
        if prompt.is_empty() {
            return Err(Error::Config("the prompt is empty: give at least one token of text".into()));
        }
        if max_new == 0 {
            return Err(Error::Config("nothing to generate: ask for at least one token".into()));
        }
        let longest = self.model.plan().longest_answer(prompt.len());
        if longest == 0 {
            return Err(Error::Config(format!(
                "the prompt has {} tokens, but the model's context is {}: shorten the prompt",
                prompt.len(),
                self.model.plan().max_positions
            )));
        }
        if !(0.0..=crate::plan::MAX_TEMPERATURE).contains(&temperature) {
            return Err(Error::Config(format!(
                "temperature {temperature}: expected 0 (greedy) to {}",
                crate::plan::MAX_TEMPERATURE
            )));
        }
        self.model.config().check_ids(prompt)?;
        let max_new = max_new.min(longest);
        let r = Request {
            first_pass: self.next_pass,
            prompt: prompt.len() as u32,
            max_new: max_new as u32,
            open_logits,
            temperature,
            seed,
        };
        let index = self.requests;
        self.requests += 1;
        self.announce(index, &r)?;
        let start = Instant::now();

        let ((inputs, source_end), (token, tokens)) = (channel(), channel());
        let ((flag, flags), (logit, logits)) = (channel(), channel());
        let ports = ClientPorts {
            source: source(source_end),
            token,
            flags: flag,
            logits: open_logits.then_some(logit),
            names: Default::default(),
        };
        let (model, public, session) = (&self.model, self.public.as_ref(), &mut self.session);
        let (jobs, links) = (session.jobs(), session.links().clone());
        let stop = AtomicBool::new(false);
        let mut out = Generation {
            tokens: Vec::new(),
            stop: Stop::Length,
            prefill: Duration::ZERO,
            decode: Vec::new(),
            logits: Vec::new(),
        };
        std::thread::scope(|scope| {
            let (ports, stop) = (&ports, &stop);
            let walker = scope.spawn(move || {
                let _guard = EndOnPanic(session.jobs());
                let walked = walk(session, model, &r, Some(ports), stop);
                let walked = walked.and_then(|n| end_walk(session, index, n).map(|()| n));
                if walked.is_err() {
                    session.jobs().end();
                }
                walked
            });
            let mut online = || -> Result<()> {
                let mut cache = public.map(|w| FloatCache::new(&w.config));
                let mut feed = |ids: &[u32]| -> Result<()> {
                    let words = match (public, &mut cache) {
                        (Some(w), Some(cache)) => hidden_words(&float::hidden(w, ids, cache, &mut ()), model)?,
                        _ => ids.iter().map(|&t| u64::from(t)).collect(),
                    };
                    inputs.send(words).map_err(|_| lost("the client's input"))
                };
                feed(prompt)?;
                let mut last = start;
                for pass in r.first_pass.. {
                    jobs.run_pass(pass, &links)?;
                    let bits = flags.try_recv().map_err(|_| lost("the range flags"));
                    let names = ports.names.lock().unwrap_or_else(PoisonError::into_inner);
                    // No guard in the whole plan: everything is proven.
                    let bits = if names.is_empty() { Vec::new() } else { bits? };
                    if let Some(i) = bits.iter().position(|&b| b != 0) {
                        let (layer, quantity) = names.get(i).cloned().ok_or_else(|| lost("the names of the flags"))?;
                        return Err(Error::Range { layer, quantity: quantity.into() });
                    }
                    drop(names);
                    let id = tokens.try_recv().map_err(|_| lost("the token"))?;
                    let id = *id.first().ok_or_else(|| lost("the token"))? as u32;
                    if id as usize >= model.config().vocab_size {
                        return Err(Error::Internal("a token beyond the vocabulary".into()));
                    }
                    if open_logits {
                        let (f, k) = logit_format(model.plan());
                        let row = logits.try_recv().map_err(|_| lost("the logits"))?;
                        out.logits.push(row.iter().map(|&v| fixed::decode(v, f, k) as f32).collect());
                    }
                    let now = Instant::now();
                    if out.tokens.is_empty() {
                        out.prefill = now - start;
                    } else {
                        out.decode.push(now - last);
                    }
                    last = now;
                    out.tokens.push(id);
                    let more = on_token(id);
                    let ended = if model.config().eos_ids.contains(&id) {
                        Some(Stop::EndToken)
                    } else if out.tokens.len() == max_new {
                        Some(Stop::Length)
                    } else if more {
                        None
                    } else {
                        Some(Stop::Caller)
                    };
                    let go = ended.is_none();
                    if out.tokens.len() < max_new {
                        let step = request_scope().address(pass + 1, "request.control");
                        links.send(Role::Owner, Lane::Online, &step, vec![u8::from(go)])?;
                        links.send(Role::Helper, Lane::Online, &step, vec![u8::from(go)])?;
                    }
                    if let Some(ended) = ended {
                        out.stop = ended;
                        break;
                    }
                    feed(&[id])?;
                }
                Ok(())
            };
            let online = online();
            stop.store(true, Ordering::Relaxed);
            jobs.release(online.is_err());
            if let Err(e) = &online {
                links.abort(e);
            }
            worst(join(walker), online)
        })?;
        self.session.jobs().discard();
        // Not what was walked HERE: the Helper may have run further ahead, up to the end of the request, before it stopped.
        self.next_pass = r.first_pass + u64::from(r.max_new);
        Ok(out)
    }

    fn announce(&self, index: u64, r: &Request) -> Result<()> {
        let step = request_scope().address(index, "request.open");
        // How tokens are sampled is the Owner's business only.
        let for_helper = Request { temperature: 0.0, seed: 0, ..*r };
        self.session.links().send(Role::Owner, Lane::Online, &step, r.encode())?;
        self.session.links().send(Role::Helper, Lane::Online, &step, for_helper.encode())
    }

    /// Ends the session at all parties.
    ///
    /// # Errors
    /// [`Error::Peer`] if a peer is gone already.
    pub fn finish(self) -> Result<()> {
        let end = Request { first_pass: 0, prompt: 0, max_new: 0, open_logits: false, temperature: 0.0, seed: 0 };
        self.announce(self.requests, &end)
    }
}

/// Hidden states as ring elements of the residual ring.
fn hidden_words(h: &Array2<f32>, model: &SecureModel) -> Result<Vec<u64>> {
    let k = model.plan().residual_k;
    if h.iter().any(|v| !v.is_finite() || f64::from(v.abs()) >= INPUT_LIMIT) {
        let layer = model.plan().first_private.to_string();
        return Err(Error::Range { layer, quantity: "hidden state given by the client".into() });
    }
    Ok(h.iter().map(|&v| fixed::encode(f64::from(v), F, k)).collect())
}
