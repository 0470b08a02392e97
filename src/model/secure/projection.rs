//! A group of projections that read the same, with or without adapters: `y = W x + B (A x)`.
//!
//! Without an adapter: one linear map, no online message. With one (LoRA, Hu et al. 2021, kept apart from `W` as in MARILL, §5.2):
//! `W` is public, so that each side multiplies what it holds and nothing is sent; `A` and `B` are owner linear, which sends
//! ahead only. Their few middle values are lifted in between ([`crate::plan::AdapterPlan`] says why): 2 messages, of `rank`
//! elements per projection and token. All projections of a group share this exchange.
//!
//! Cost per token, `r` the ranks together, `n` the outputs of the adapted projections: ahead `2 k r` bits for `A`, `2 m n` for `B`,
//! and a lift of `r` elements. Private: `W x` sends nothing; what `A`, the lift and `B` send is masked as in
//! [`crate::protocol::linear`] and [`crate::protocol::lift`], with streams of their own scopes, and nobody but the Owner knows
//! more of `A` and `B` than of any private matrix. Exact but for truncation: the middle values' error of less than one unit goes through
//! `B`, the sums of both parts are each truncated; all of it is in the plan's bounds.

use super::attention::to_ring;
use crate::error::Result;
use crate::model::prepare::Projection;
use crate::protocol::linear::owner_linear;
use crate::protocol::truncate::truncate;
use crate::session::{Scope, Session};
use crate::share::Masked;

/// `W x + B (A x)` for every row of `x`, truncated to the fraction bits of `x`, in its ring less those of `W`.
///
/// # Errors
/// [`crate::Error::Shape`], [`crate::Error::Peer`], [`crate::Error::Reuse`].
pub fn projection(s: &mut Session, scope: &Scope, x: &Masked, w: &Projection) -> Result<Masked> {
    let mut y = truncate(&owner_linear(s, scope, x, &w.base)?, w.base.f())?;
    let Some(adapters) = &w.adapters else { return Ok(y) };
    let middle = truncate(&owner_linear(s, &scope.at("lora_a"), x, &adapters.a)?, adapters.a.f())?;
    let ring = adapters.b.iter().fold(middle.k(), |k, (_, b)| k.max(b.ring()));
    let middle = to_ring(s, &scope.at("lift"), &middle, ring)?.finish(s)?;
    let mut from = 0;
    for (at, (outputs, b)) in adapters.b.iter().enumerate() {
        let own = from..from + b.dim().1;
        from = own.end;
        let scope = scope.at(&format!("lora_b{at}"));
        let added = owner_linear(s, &scope, &middle.columns(own)?.narrow(b.ring())?, b)?;
        let added = truncate(&added, b.f())?.narrow(y.k())?;
        y = y.add_columns(outputs.start, &added)?;
    }
    Ok(y)
}
