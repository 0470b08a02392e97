//! The Client: the public layers in plaintext, an input per pass, tokens out.

use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use ndarray::Array2;

use super::verify::{self, Progress, Turn};
use super::{Draft, Drafts, Request, end_walk, lost, request_scope, walk, worst};
use crate::error::{Error, Result};
use crate::model::secure::{ClientPorts, SecureModel, logit_format};
use crate::model::{FloatCache, Weights, float};
use crate::net::Lane;
use crate::party::Role;
use crate::plan::{F, INPUT_LIMIT};
use crate::protocol::embedding::source;
use crate::protocol::gumbel::Gumbel;
use crate::ring::fixed;
use crate::session::{EndOnPanic, Session, WALK_ENDED};
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
    /// From each token to the next; the tokens that one pass gave out share its time evenly.
    pub decode: Vec<Duration>,
    /// Opened logits per token, if asked for.
    pub logits: Vec<Vec<f32>>,
    /// What became of the drafts; all zeros without a draft model.
    pub drafts: Drafts,
}

/// The Client of a session.
pub struct Client {
    session: Session,
    model: SecureModel,
    /// The public layers and the embedding they need; `None` when the embedding is private.
    public: Option<Weights>,
    draft: Option<Draft>,
    requests: u64,
    next_pass: u64,
}

impl Client {
    /// With the Client's prepared part and the public part of the checkpoint.
    #[must_use]
    pub fn new(session: Session, model: SecureModel, public: Option<Weights>) -> Self {
        Client { session, model, public, draft: None, requests: 0, next_pass: 1 }
    }

    /// From now on `draft` guesses tokens, which passes verify: the tokens are those without it, and there are fewer passes.
    ///
    /// # Errors
    /// [`Error::Config`] if it has another number of tokens than the model.
    pub fn draft_with(&mut self, draft: Draft) -> Result<()> {
        let (ours, theirs) = (draft.vocabulary(), self.model.config().vocab_size);
        if ours != theirs {
            return Err(Error::Config(format!(
                "the draft model has {ours} tokens, the model {theirs}: draft with a model of the same tokenizer"
            )));
        }
        self.draft = Some(draft);
        Ok(())
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
        if self.model.config().encoder() && max_new > 1 {
            return Err(Error::Config("an encoder has one pass: ask for one token, its label".into()));
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
            drafts: self.draft.as_ref().map_or(0, |d| d.tokens() as u8),
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
        let draft = self.draft.as_mut();
        let (decide, decided) = channel();
        let (jobs, links) = (session.jobs(), session.links().clone());
        let stop = AtomicBool::new(false);
        let mut answer = Answer::new(model, prompt, max_new, on_token);
        std::thread::scope(|scope| {
            let (ports, stop) = (&ports, &stop);
            let walker = scope.spawn(move || {
                let _guard = EndOnPanic(session.jobs());
                let walked = match r.drafts {
                    0 => walk(session, model, &r, Some(ports), stop),
                    _ => verify::walk(session, model, &r, Some(ports), &decided),
                };
                let walked = walked.and_then(|n| end_walk(session, index, n).map(|()| n));
                if walked.is_err() {
                    session.jobs().end();
                }
                walked
            });
            // It reads the prompt while the prompt's pass is under way.
            let mut reading = draft.map(|d| {
                scope.spawn(move || {
                    d.prepare(prompt);
                    Ok(d)
                })
            });
            let mut online = || -> Result<()> {
                let mut cache = public.map(|w| FloatCache::new(&w.config));
                let mut feed = |keep: usize, ids: &[u32]| -> Result<()> {
                    let words = match (public, &mut cache) {
                        (Some(w), Some(cache)) => {
                            cache.truncate(keep);
                            hidden_words(&float::hidden(w, ids, cache, &mut ()), model)?
                        }
                        _ => ids.iter().map(|&t| u64::from(t)).collect(),
                    };
                    inputs.send(words).map_err(|_| lost("the client's input"))
                };
                feed(0, prompt)?;
                let mut progress = Progress::new(&r);
                let mut draft: Option<&mut Draft> = None;
                // Of the pass under way.
                let mut drafts: Vec<u32> = Vec::new();
                let mut noise = (temperature > 0.0).then(|| Gumbel::new(seed, temperature));
                let mut last = start;
                for pass in r.first_pass.. {
                    jobs.run_pass(pass, &links)?;
                    check_flags(ports, &flags)?;
                    let ids = tokens.try_recv().map_err(|_| lost("the token"))?;
                    if ids.len() != drafts.len() + 1 {
                        return Err(lost("a token of the pass"));
                    }
                    if ids.iter().any(|&id| id >= model.config().vocab_size as u64) {
                        return Err(Error::Internal("a token beyond the vocabulary".into()));
                    }
                    // A draft is right if it is the model's token after all drafts before it; what the model says after a wrong one
                    // belongs to another text and is forgotten here.
                    let right = drafts.iter().zip(&ids).take_while(|&(&draft, &id)| u64::from(draft) == id).count();
                    let rows = match open_logits {
                        true => logits.try_recv().map_err(|_| lost("the logits"))?,
                        false => Vec::new(),
                    };
                    let took = last.elapsed();
                    last += took;
                    let (given, ended) = answer.take(&ids[..=right], &rows, took)?;
                    if let Some(progress) = &mut progress {
                        let counts = &mut answer.out.drafts;
                        counts.drafted += if ended.is_some() { given - 1 } else { drafts.len() };
                        counts.accepted += given - 1;
                        counts.passes += usize::from(pass > r.first_pass);
                        if let Some(reading) = reading.take() {
                            draft = Some(join(reading)?);
                        }
                        let most = (max_new - answer.out.tokens.len()).saturating_sub(1);
                        let n = draft.as_ref().map_or(0, |d| d.room(answer.text.len(), most));
                        let turn = Turn { accepted: given - 1, tokens: if ended.is_some() { 0 } else { n + 1 } };
                        let next = progress.take(turn).map_err(|what| Error::Internal(what.into()))?;
                        // Before drafting: meanwhile the others walk the pass.
                        verify::say(&links, pass + 1, turn)?;
                        if let Some(next) = next {
                            decide.send(next).map_err(|_| Error::Internal(WALK_ENDED.into()))?;
                            drafts = draft.as_mut().map_or_else(Vec::new, |d| {
                                d.propose(&answer.text, answer.out.tokens.len(), n, noise.as_mut())
                            });
                            feed(next.keep, &[&answer.text[next.keep..], &drafts].concat())?;
                        }
                    } else {
                        if answer.out.tokens.len() < max_new {
                            let step = request_scope().address(pass + 1, "request.control");
                            let go = vec![u8::from(ended.is_none())];
                            // With the next input, if there is one.
                            links.gather(Role::Owner, Lane::Online, &step, go.clone())?;
                            links.gather(Role::Helper, Lane::Online, &step, go)?;
                            if ended.is_some() {
                                links.flush(Lane::Online)?;
                            }
                        }
                        if ended.is_none() {
                            let keep = answer.text.len() - 1;
                            feed(keep, &answer.text[keep..])?;
                        }
                    }
                    if let Some(ended) = ended {
                        answer.out.stop = ended;
                        break;
                    }
                }
                Ok(())
            };
            let online = online();
            drop(decide);
            stop.store(true, Ordering::Relaxed);
            jobs.release(online.is_err());
            if let Err(e) = &online {
                links.abort(e);
            }
            worst(join(walker), online)
        })?;
        let out = answer.out;
        self.session.jobs().discard();
        // Not what was walked HERE: the Helper may have run further ahead, up to the end of the request, before it stopped.
        self.next_pass = r.first_pass + u64::from(r.max_new);
        Ok(out)
    }

    fn announce(&self, index: u64, r: &Request) -> Result<()> {
        self.tell(Role::Owner, index, r)?;
        // How tokens are sampled is the Owner's business only.
        self.tell(Role::Helper, index, &Request { temperature: 0.0, seed: 0, ..*r })
    }

    fn tell(&self, role: Role, index: u64, r: &Request) -> Result<()> {
        let step = request_scope().address(index, "request.open");
        self.session.links().send(role, Lane::Online, &step, r.encode())
    }

    /// Ends the session at all parties.
    ///
    /// # Errors
    /// [`Error::Peer`] if a peer is gone already.
    pub fn finish(self) -> Result<()> {
        self.finish_with(|| Ok(()))
    }

    /// Ends the session at the Owner, then at the Helper: what the Helper has sent ahead is lost with its connection, which a busy Owner may not
    /// have read to its end before `hear` has heard from it.
    ///
    /// # Errors
    /// As [`Client::finish`], and those of `hear`.
    pub(crate) fn finish_with<R>(self, hear: impl FnOnce() -> Result<R>) -> Result<R> {
        self.tell(Role::Owner, self.requests, &Request::END)?;
        let heard = hear();
        let told = self.tell(Role::Helper, self.requests, &Request::END);
        let heard = heard?;
        told.map(|()| heard)
    }
}

/// What has been given out of an answer.
struct Answer<'a> {
    model: &'a SecureModel,
    max_new: usize,
    on_token: &'a mut dyn FnMut(u32) -> bool,
    /// The prompt and the answer so far.
    text: Vec<u32>,
    out: Generation,
}

impl<'a> Answer<'a> {
    fn new(
        model: &'a SecureModel,
        prompt: &[u32],
        max_new: usize,
        on_token: &'a mut dyn FnMut(u32) -> bool,
    ) -> Answer<'a> {
        let out = Generation {
            tokens: Vec::new(),
            stop: Stop::Length,
            prefill: Duration::ZERO,
            decode: Vec::new(),
            logits: Vec::new(),
            drafts: Drafts::default(),
        };
        Answer { model, max_new, on_token, text: prompt.to_vec(), out }
    }

    /// Gives out the tokens of a pass that took so long, up to the end of the answer: how many those were, and why it ended.
    /// `logits` is empty unless they were opened.
    fn take(&mut self, ids: &[u64], logits: &[u64], took: Duration) -> Result<(usize, Option<Stop>)> {
        let (first, before, mut ended) = (self.out.tokens.is_empty(), self.out.tokens.len(), None);
        let ((f, k), width) = (logit_format(self.model.plan()), self.model.config().vocab_size);
        for (i, &id) in ids.iter().enumerate() {
            let id = id as u32;
            if !logits.is_empty() {
                let row = logits.get(i * width..(i + 1) * width).ok_or_else(|| lost("the logits"))?;
                self.out.logits.push(row.iter().map(|&v| fixed::decode(v, f, k) as f32).collect());
            }
            self.out.tokens.push(id);
            self.text.push(id);
            let more = (self.on_token)(id);
            ended = if self.model.config().eos_ids.contains(&id) {
                Some(Stop::EndToken)
            } else if self.out.tokens.len() == self.max_new {
                Some(Stop::Length)
            } else if more {
                None
            } else {
                Some(Stop::Caller)
            };
            if ended.is_some() {
                break;
            }
        }
        let given = self.out.tokens.len() - before;
        if first {
            self.out.prefill = took;
        } else {
            self.out.decode.extend(std::iter::repeat_n(took / given.max(1) as u32, given));
        }
        Ok((given, ended))
    }
}

/// The range flags of a pass, without which none of its tokens is taken.
fn check_flags(ports: &ClientPorts, flags: &Receiver<Vec<u64>>) -> Result<()> {
    let bits = flags.try_recv().map_err(|_| lost("the range flags"));
    let names = ports.names.lock().unwrap_or_else(PoisonError::into_inner);
    // No guard in the whole plan: everything is proven.
    let bits = if names.is_empty() { Vec::new() } else { bits? };
    if let Some(i) = bits.iter().position(|&b| b != 0) {
        let (layer, quantity) = names.get(i).cloned().ok_or_else(|| lost("the names of the flags"))?;
        return Err(Error::Range { layer, quantity: quantity.into() });
    }
    Ok(())
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
