//! Verifying drafts: passes whose positions are decided one after the other.
//!
//! The Client guesses the next tokens with a small model of its own ([`super::Draft`]); one pass computes the model's token
//! after each of them. Drafts are accepted as far as they are the model's own tokens, and the model's token after the last
//! accepted one comes for free: a pass gives out 1 to `drafts + 1` tokens at about one token's latency.
//!
//! ```text
//! pass     input                 tokens of the model     given out     kept in the cache
//! p        t0 [d1 d2 d3 d4]      d1 d2 x3 x4 x5          d1 d2 x3      t0 d1 d2
//! p + 1    x3 [e1 e2 e3 e4]      ...
//! ```
//!
//! **Nothing is walked ahead of a decision.** The walk of a pass begins when the Client has said how many drafts of the pass
//! before were accepted (a [`Turn`]); all three truncate their caches to the accepted positions, which are then public
//! numbers, so no position is ever computed in vain. Within a pass walk and online part overlap as ever. Every pass has a number of
//! its own, rejected drafts or not: no mask is used twice, and a row of the cache that takes a rejected one's place is shared
//! anew, under new masks.
//!
//! **Cost.** A [`Turn`] of [`TURN_BYTES`] to Owner and Helper per pass; a pass over `n` positions is that of a prompt at
//! this place, with `n` heads instead of one.
//!
//! **What it discloses.** Owner and Helper learn how many drafts each pass had and how many of them were accepted: how predictable
//! the answer is to a model that they may know. The Client learns, after each rejected draft, the model's tokens for a
//! prefix of its own choosing, which are not given out: nothing that it could not have asked for. The range flags are those of the whole
//! pass, rejected positions included.

use std::sync::mpsc::Receiver;

use super::{Request, request_scope};
use crate::error::{PeerFault, Result};
use crate::model::secure::{ClientPorts, PassOptions, SecureModel};
use crate::net::{Lane, Links, blame};
use crate::party::Role;
use crate::session::Session;

/// Most drafts of a pass.
pub const MAX_DRAFTS: usize = 16;
/// Of a [`Turn`].
pub(super) const TURN_BYTES: usize = 3;

/// What the Client says after each pass of a request with drafts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Turn {
    /// Drafts of the last pass that were accepted; after the model's own token, which there always is, so many more were
    /// given out.
    pub accepted: usize,
    /// Positions of the next pass: the last token given out and the drafts after it. 0 ends the request.
    pub tokens: usize,
}

impl Turn {
    /// Go on or stop, drafts accepted, positions.
    fn encode(self) -> Vec<u8> {
        // Both are at most `MAX_DRAFTS + 1`, see `Progress::take`.
        vec![u8::from(self.tokens > 0), self.accepted as u8, self.tokens as u8]
    }

    fn decode(bytes: &[u8]) -> std::result::Result<Turn, &'static str> {
        let &[go, accepted, tokens] = bytes else { return Err("a turn of another length") };
        match (go, tokens) {
            (0, 0) | (1, 1..) => Ok(Turn { accepted: accepted.into(), tokens: tokens.into() }),
            (0, _) => Err("an end with another pass after it"),
            (1, 0) => Err("a pass without tokens"),
            _ => Err("a control byte that is not 0 or 1"),
        }
    }
}

/// The next pass: how much of the cache stays, and how many positions come after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Next {
    pub keep: usize,
    pub tokens: usize,
}

/// How far a request with drafts has come, the same at all three parties.
#[derive(Debug)]
pub(super) struct Progress {
    drafts: usize,
    prompt: usize,
    max_new: usize,
    /// Drafts in the last pass; the prompt's pass has none.
    drafted: usize,
    given: usize,
}

impl Progress {
    /// Before the prompt's pass; `None` for a request without drafts.
    pub fn new(r: &Request) -> Option<Progress> {
        let (prompt, max_new) = (r.prompt as usize, r.max_new as usize);
        (r.drafts > 0).then_some(Progress { drafts: r.drafts.into(), prompt, max_new, drafted: 0, given: 0 })
    }

    /// Tokens given out so far.
    pub fn given(&self) -> usize {
        self.given
    }

    /// Takes what the Client says of the last pass and of the next one; `None` at the end of the request. The error is what is
    /// wrong with it.
    pub fn take(&mut self, turn: Turn) -> std::result::Result<Option<Next>, &'static str> {
        if turn.accepted > self.drafted {
            return Err("more drafts accepted than the pass had");
        }
        // At most `max_new`, since the pass was allowed.
        self.given += 1 + turn.accepted;
        if turn.tokens == 0 {
            return Ok(None);
        }
        if turn.tokens > self.drafts + 1 {
            return Err("more drafts than the request announced");
        }
        if self.given + turn.tokens > self.max_new {
            return Err("a pass beyond the tokens that the request announced");
        }
        self.drafted = turn.tokens - 1;
        Ok(Some(Next { keep: self.prompt + self.given - 1, tokens: turn.tokens }))
    }
}

/// The Client tells both that `turn` comes before pass `pass`.
pub(super) fn say(links: &Links, pass: u64, turn: Turn) -> Result<()> {
    let step = request_scope().address(pass, "request.turn");
    links.send(Role::Owner, Lane::Online, &step, turn.encode())?;
    links.send(Role::Helper, Lane::Online, &step, turn.encode())
}

/// Owner and Helper: what comes after the pass before `pass`.
pub(super) fn hear(links: &Links, pass: u64, progress: &mut Progress) -> Result<Option<Next>> {
    let step = request_scope().address(pass, "request.turn");
    let bytes = links.recv(Role::Client, Lane::Online, &step, TURN_BYTES)?;
    let turn = Turn::decode(&bytes).and_then(|turn| progress.take(turn));
    turn.map_err(|what| blame(Role::Client, &step, PeerFault::Malformed(what)))
}

/// The walk of Client and Helper through a request with drafts: each pass when the online thread, which has done all jobs of
/// the one before, knows what it is. Returns the number of passes walked.
pub(super) fn walk(
    s: &mut Session,
    model: &SecureModel,
    r: &Request,
    ports: Option<&ClientPorts>,
    decided: &Receiver<Next>,
) -> Result<u64> {
    let mut cache = model.cache(r.positions());
    let mut next = Next { keep: 0, tokens: r.prompt as usize };
    let mut walked = 0;
    loop {
        cache.truncate(next.keep);
        s.begin(r.first_pass + walked, &[next.tokens]);
        let every = walked > 0;
        let options = PassOptions { ports, noise: None, open_logits: r.open_logits, every, depths: None };
        model.pass(s, &mut cache, options)?;
        s.end_batch()?;
        walked += 1;
        // The online thread lets go of its end when the request is over, well or not.
        match decided.recv() {
            Ok(decision) => next = decision,
            Err(_) => return Ok(walked),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn progress(drafts: u8, prompt: u32, max_new: u32) -> Progress {
        let r = Request { first_pass: 1, prompt, max_new, open_logits: false, temperature: 0.0, seed: 0, drafts };
        Progress::new(&r).unwrap()
    }

    #[test]
    fn what_is_kept_is_what_was_accepted() {
        let mut p = progress(4, 6, 20);
        // The prompt's pass gives one token; its position is computed next.
        assert_eq!(p.take(Turn { accepted: 0, tokens: 5 }), Ok(Some(Next { keep: 6, tokens: 5 })));
        assert_eq!(p.take(Turn { accepted: 2, tokens: 5 }), Ok(Some(Next { keep: 9, tokens: 5 })));
        assert_eq!(p.take(Turn { accepted: 0, tokens: 1 }), Ok(Some(Next { keep: 10, tokens: 1 })));
        assert_eq!(p.take(Turn { accepted: 0, tokens: 5 }), Ok(Some(Next { keep: 11, tokens: 5 })));
        assert_eq!(p.take(Turn { accepted: 4, tokens: 0 }), Ok(None));
        assert_eq!(p.given(), 11);
        assert!(Progress::new(&Request { drafts: 0, ..Request::END }).is_none());
    }

    #[test]
    fn what_nobody_announced_is_refused() {
        let after_prompt = |turn| progress(4, 6, 9).take(turn);
        assert!(after_prompt(Turn { accepted: 1, tokens: 1 }).unwrap_err().contains("accepted"));
        assert!(after_prompt(Turn { accepted: 0, tokens: 6 }).unwrap_err().contains("more drafts"));
        let mut p = progress(4, 6, 9);
        p.take(Turn { accepted: 0, tokens: 5 }).unwrap();
        assert!(p.take(Turn { accepted: 5, tokens: 1 }).unwrap_err().contains("accepted"));
        let mut p = progress(4, 6, 9);
        p.take(Turn { accepted: 0, tokens: 5 }).unwrap();
        // 6 of 9 tokens are given out: three more positions, and not four.
        assert!(p.take(Turn { accepted: 4, tokens: 4 }).unwrap_err().contains("beyond"));
        let mut p = progress(4, 6, 1);
        assert!(p.take(Turn { accepted: 0, tokens: 1 }).unwrap_err().contains("beyond"));
    }

    #[test]
    fn three_bytes_and_no_others() {
        for turn in [Turn { accepted: 0, tokens: 0 }, Turn { accepted: 16, tokens: 17 }] {
            assert_eq!(Turn::decode(&turn.encode()), Ok(turn));
        }
        for bad in [&[2, 0, 1][..], &[1, 0, 0], &[0, 0, 1], &[1, 0], &[1, 0, 1, 0]] {
            assert!(Turn::decode(bad).is_err(), "{bad:?}");
        }
    }
}
