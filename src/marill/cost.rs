//! What a model costs by three parties: measured, by running it on the task's own prompts in this process over a simulated network.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::data::Example;
use crate::error::{Error, Result};
use crate::generate::{Local, LocalOptions};
use crate::model::preparation::private_layers;
use crate::model::{Adapter, ModelConfig};
use crate::net::shape::Profile;
use crate::party::Role;

/// Prompts that are run, after one that is not counted.
const PROMPTS: usize = 4;
/// Of held-out examples, so many are tried as prompts.
const TRIED: usize = 16;
/// Decode passes after each prompt, unless the task's answers are shorter.
const DECODE: usize = 8;
/// Tokens of a prompt of plain text, which has no place where an answer begins.
const TEXT: usize = 32;

/// Of a prefill, or of a decode pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Phase {
    /// Milliseconds of wall time, all three parties on this machine, run-ahead included: of the prompt that took least, since
    /// whatever else runs on the machine only adds.
    pub ms: f64,
    /// Bytes online, all links, message headers included.
    pub online_bytes: f64,
    /// Bytes ahead of it.
    pub ahead_bytes: f64,
    /// Messages that had to follow each other.
    pub messages: f64,
}

impl Phase {
    /// Online and ahead together.
    #[must_use]
    pub fn bytes(&self) -> f64 {
        self.online_bytes + self.ahead_bytes
    }

    fn each(self, other: Phase, f: impl Fn(f64, f64) -> f64) -> Phase {
        Phase {
            ms: f(self.ms, other.ms),
            online_bytes: f(self.online_bytes, other.online_bytes),
            ahead_bytes: f(self.ahead_bytes, other.ahead_bytes),
            messages: f(self.messages, other.messages),
        }
    }
}

/// Means over the prompts, but for times.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct SecureCost {
    /// Prompts.
    pub prompts: usize,
    /// Their tokens, in the mean.
    pub prompt_tokens: f64,
    /// Decode passes after each.
    pub decode_passes: usize,
    /// Threads of all three parties together.
    pub threads: usize,
    /// A prefill.
    pub prefill: Phase,
    /// A decode pass.
    pub token: Phase,
}

/// What has been sent so far, and how long the longest chain of messages is that reached the Client.
fn so_far(local: &Local) -> Phase {
    let links = local.links();
    let sum = |f: &dyn Fn(&crate::generate::LinkReport) -> u64| links.values().map(f).sum::<u64>() as f64;
    Phase {
        ms: 0.0,
        online_bytes: sum(&|l| l.online_bytes),
        ahead_bytes: sum(&|l| l.ahead_bytes),
        messages: f64::from(local.world().meter(Role::Client).depth()),
    }
}

/// Runs the model in `dir` on prompts of `held_out` with what its `trefoil.json` says is private, over `net`. Of every prompt
/// first one token is asked for, which is the prefill, then as many more as there are decode passes; of their difference, a pass's share is
/// what a token takes. Answers that end before are left out: of the passes walked ahead for them some would be counted that nobody used.
///
/// # Errors
/// [`Error::Model`] and [`Error::Io`] for the directory, [`Error::Config`] if all answers are too short; errors of the session.
pub(super) fn measure(dir: &Path, base: Option<&Path>, held_out: &[Example], net: Profile) -> Result<SecureCost> {
    let (model, adapter) = Adapter::resolve(dir, None)?;
    let config = ModelConfig::open(&model)?;
    let private = private_layers(None, &config, (&model, adapter.as_deref()))?;
    // What an adapter is added to is its base, and public as a whole.
    let base = if adapter.is_some() { None } else { base.map(Path::to_path_buf) };
    let options = LocalOptions { base, adapter, ..LocalOptions::new(private).net(net) };
    let tried = &held_out[..held_out.len().min(TRIED)];
    // The last token of an answer needs no pass.
    let shortest = tried.iter().map(|e| e.learned.iter().filter(|l| **l).count()).min().unwrap_or(0);
    let passes = shortest.saturating_sub(2).clamp(1, DECODE);
    let mut local = Local::open(&model, options)?;
    let unknown = Phase { ms: f64::INFINITY, ..Phase::default() };
    let (mut prefill, mut token) = (unknown, unknown);
    let (mut prompts, mut prompt_tokens, mut warm) = (0, 0, false);
    for example in tried {
        if prompts == PROMPTS {
            break;
        }
        let prompt = prompt(example);
        let start = so_far(&local);
        let ask = |local: &mut Local, n| local.generate(prompt, n, 0.0, 0, false, &mut |_| true);
        let first = match ask(&mut local, 1) {
            Ok(g) => g,
            Err(e) => return Err(local.root_cause(e)),
        };
        let middle = so_far(&local);
        let all = match ask(&mut local, 1 + passes) {
            Ok(g) => g,
            Err(e) => return Err(local.root_cause(e)),
        };
        let end = so_far(&local);
        if !std::mem::replace(&mut warm, true) || all.decode.len() < passes {
            continue;
        }
        let sub = |a: f64, b: f64| a - b;
        let mut one = middle.each(start, sub);
        let mut of_token = end.each(middle, sub).each(one, sub);
        one.ms = first.prefill.as_secs_f64() * 1e3;
        of_token = of_token.each(of_token, |a, _| a / passes as f64);
        of_token.ms = all.decode.iter().map(|d| d.as_secs_f64() * 1e3).sum::<f64>() / passes as f64;
        for (sum, of) in [(&mut prefill, one), (&mut token, of_token)] {
            *sum = Phase { ms: sum.ms.min(of.ms), ..sum.each(of, |a, b| a + b) };
        }
        prompts += 1;
        prompt_tokens += prompt.len();
    }
    local.finish()?;
    if prompts == 0 {
        return Err(Error::Config(format!(
            "{}: of {} held-out prompts none had an answer of {passes} tokens, so a decode pass cannot be measured; train for longer (--steps)",
            dir.display(),
            tried.len()
        )));
    }
    let n = prompts as f64;
    let mean = |sum: Phase| Phase { ms: sum.ms, ..sum.each(sum, |a, _| a / n) };
    Ok(SecureCost {
        prompts,
        prompt_tokens: prompt_tokens as f64 / n,
        decode_passes: passes,
        threads: rayon::current_num_threads(),
        prefill: mean(prefill),
        token: mean(token),
    })
}

/// What stands before the answer, or the beginning of plain text.
fn prompt(example: &Example) -> &[u32] {
    let before = example.learned.iter().position(|l| *l).unwrap_or(0);
    // A text begins with the begin token alone, if with anything.
    let len = if before < 2 { TEXT } else { before };
    &example.ids[..len.min(example.ids.len() - 1)]
}
