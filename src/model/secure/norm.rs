//! RMSNorm, without its gain (folded into the next matrices): 6 messages, 8 where its range is wide.
//!
//! square-sum with fused lift (2), reciprocal square root by a window (2), or by two and a selection (4), scaling with fused
//! lift (2).

use super::{Context, Tables};
use crate::approx::PositiveTable;
use crate::error::Result;
use crate::plan::{F, NormPlan};
use crate::protocol::guard::guard;
use crate::protocol::positive::{self, Positive};
use crate::protocol::square::{scale, square_sum};
use crate::protocol::truncate::truncate;
use crate::share::Masked;

/// The tables of one norm over `n` elements.
pub(super) struct Norm {
    n: usize,
    table: Positive,
}

impl Norm {
    pub(super) fn new(p: &NormPlan, n: usize, eps: f64, tables: Tables) -> Self {
        let units = n as f64 * f64::from(2 * F).exp2();
        let table = match (tables, p.windows) {
            (Tables::Fitted, 1) => {
                Positive::new(PositiveTable::rsqrt_alone(p.bits, p.window, units, eps, 1.0), p.f_gain)
            }
            (Tables::Fitted, _) => Positive::new(PositiveTable::rsqrt(p.bits, p.window, units, eps, 1.0), p.f_gain),
            (Tables::Blank, windows) => Positive::blank(p.bits, p.window, windows == 1, p.f_gain),
        };
        Norm { n, table }
    }

    /// `h / rms(h)` of every group of `n` elements, in ring `64 - f_gain` with `F` fraction bits.
    pub(super) fn apply(
        &self,
        c: &mut Context<'_>,
        name: &str,
        quantity: &'static str,
        h: &Masked,
        p: &NormPlan,
    ) -> Result<Masked> {
        let scope = c.scope.at(name);
        let count_bits = c.flags.count_bits();
        let coarse = match p.coarse {
            None => None,
            Some(t) => {
                // The sum of squares of the coarse value fits for every h of the residual ring; bounded, it proves that
                // h fits the narrower ring in which the fine squares are summed.
                let low = truncate(&h.clone().with_f(t.max(h.f())), t)?;
                Some((square_sum(c.s, &scope.at("coarse"), &low, self.n)?.0, t))
            }
        };
        let (sum, lifted) = square_sum(c.s, &scope.at("square"), &h.narrow(p.k)?, self.n)?;
        let total = sum.finish(c.s)?;
        if let Some((sum, t)) = coarse {
            let sum = sum.finish(c.s)?;
            let g = guard(c.s, &scope.at("coarse.guard"), &sum, 2 * (p.k - 2 - t), false, count_bits)?;
            c.flags.guard(c.layer, quantity, g);
        }
        let g = guard(c.s, &scope.at("guard"), &total, p.bits, false, count_bits)?;
        let looked = positive::start(c.s, &scope.at("rsqrt"), &total, &self.table)?;
        c.flags.guard(c.layer, quantity, g);
        let value = looked.evaluate(c.s, &scope.at("rsqrt"), Some(count_bits))?;
        let inverse = value.value.finish(c.s)?;
        let y = scale(c.s, &scope.at("scale"), lifted, &inverse)?;
        if let Some(faults) = value.faults {
            let faults = faults.finish(c.s)?;
            c.flags.count(c.layer, quantity, faults);
        }
        truncate(&y.finish(c.s)?, p.f_gain)
    }
}
