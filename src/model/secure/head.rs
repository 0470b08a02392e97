//! The head: final norm, logits of each pass's last position (of a pass that verifies drafts: of all), noise, argmax,
//! tokens and range flags to the Client.

use std::sync::PoisonError;

use super::{Context, PassOptions, SecureModel};
use crate::error::Result;
use crate::plan::F;
use crate::protocol::argmax::argmax;
use crate::protocol::guard::RangeFlags;
use crate::protocol::linear::owner_linear;
use crate::protocol::truncate::truncate;
use crate::protocol::{last_tokens, open};
use crate::session::{Scope, Session};
use crate::share::Masked;

pub(super) fn head(
    m: &SecureModel,
    s: &mut Session,
    h: &Masked,
    mut flags: RangeFlags,
    o: PassOptions<'_>,
) -> Result<()> {
    let (scope, p) = (Scope::new("head"), &m.plan.head);
    let h = if o.every { h.clone() } else { last_tokens(s, h) };
    let x = {
        let mut c = Context { s, scope: &scope, layer: "head", flags: &mut flags, config: &m.config, pieces: 1 };
        m.final_norm.apply(&mut c, "norm", "sum of squares before the head", &h, &p.norm)?
    };
    let logits = owner_linear(s, &scope.at("lm_head"), &x, &m.parts.head)?;
    if o.open_logits {
        // Before the truncation below, which would show its carry. (Of a public head, what is opened determines the final
        // hidden state: one more reason why opening logits is an option with a name.)
        open::open(s, &scope.at("logits"), &logits, o.ports.and_then(|p| p.logits.as_ref()))?;
    }
    let logits = truncate(&logits, F + p.f_weight - p.f_logit)?.narrow(p.logit_k)?;
    let logits = match o.noise {
        Some(noise) => noise.add(logits),
        None => logits,
    };
    // The flags' reduction rides between the tournament's levels, whose replies it cannot delay.
    let flag_scope = Scope::new("range");
    let token = argmax(s, &scope.at("argmax"), &logits, p.radix.each(), &mut |s| flags.advance(s, &flag_scope))?;
    open::open(s, &scope.at("token"), &token, o.ports.map(|p| &p.token))?;
    if let Some(ports) = o.ports {
        *ports.names.lock().unwrap_or_else(PoisonError::into_inner) = flags.names();
    }
    flags.open(s, &flag_scope, o.ports.map(|p| &p.flags))
}
