//! RMSNorm, without its gain (folded into the next matrices): 6 messages, 8 where its range is wide and the values are not few,
//! 4 where they are so few that root and scaling go together.
//!
//! square-sum with fused lift (2), reciprocal square root by a window (2), or by two and a selection (4), scaling with fused
//! lift (2); or a lift beside the square-sum (2), then root and scaling in one exchange (2).

use std::collections::HashMap;

use super::{Context, Tables};
use crate::approx::PositiveTable;
use crate::error::{Error, Result};
use crate::plan::{F, NormPlan};
use crate::protocol::guard::guard;
use crate::protocol::lift::lift;
use crate::protocol::positive::{self, Positive};
use crate::protocol::square::{scale, square_sum};
use crate::protocol::truncate::truncate;
use crate::session::{Pass, Session};
use crate::share::{Masked, Rows};

/// The tables of one norm over `n` elements.
pub(super) struct Norm {
    n: usize,
    table: Positive,
    /// Of a single window, and up to how many values it is taken.
    alone: Option<(Positive, usize)>,
    /// Up to how many values a single window and the scaling are one exchange.
    joint: usize,
}

/// The tables of all norms of a model: those that are alike are there once.
pub(super) struct Roots {
    tables: Tables,
    eps: f64,
    made: HashMap<(usize, u32, u32, bool, u32), Positive>,
}

impl Roots {
    pub(super) fn new(tables: Tables, eps: f64) -> Self {
        Roots { tables, eps, made: HashMap::new() }
    }

    fn of(&mut self, p: &NormPlan, n: usize, window: u32, alone: bool) -> Positive {
        let (tables, eps) = (self.tables, self.eps);
        let make = || {
            let units = n as f64 * f64::from(2 * F).exp2();
            match (tables, alone) {
                (Tables::Fitted, true) => {
                    Positive::new(PositiveTable::rsqrt_alone(p.bits, window, units, eps, 1.0), p.f_gain)
                }
                (Tables::Fitted, false) => {
                    Positive::new(PositiveTable::rsqrt(p.bits, window, units, eps, 1.0), p.f_gain)
                }
                (Tables::Blank, alone) => Positive::blank(p.bits, window, alone, p.f_gain),
            }
        };
        self.made.entry((n, p.bits, window, alone, p.f_gain)).or_insert_with(make).clone()
    }
}

impl Norm {
    pub(super) fn new(p: &NormPlan, n: usize, roots: &mut Roots) -> Self {
        let few = p.alone.filter(|a| a.most > 0);
        let alone = few.map(|a| (roots.of(p, n, a.window, true), a.most));
        Norm { n, table: roots.of(p, n, p.window, p.windows == 1), alone, joint: p.joint }
    }

    /// What the sums of `h` are looked up in, and whether the scaling goes with it. All parties decide by what a pass has, since the
    /// Owner walks one at a time.
    fn table(&self, s: &Session, h: &Rows) -> Result<(&Positive, bool)> {
        let (n, joint) = (self.n, self.joint);
        let most = self.alone.as_ref().map_or(0, |(_, most)| *most);
        let of_pass = |p: &Pass| {
            let (tokens, values) = (p.tokens.len(), h.range(&p.tokens).len() / n);
            let values = match s.work().and_then(|w| w.tokens()) {
                // A walk that counts may stand for a longer prompt, but for the one row that a head reads.
                Some(longer) if values >= tokens => values / tokens.max(1) * longer,
                _ => values,
            };
            (values <= most, values <= joint)
        };
        let mut kinds = s.passes().iter().map(of_pass);
        let first = kinds.next().unwrap_or_default();
        if kinds.any(|kind| kind != first) {
            return Err(Error::Internal(
                "passes that are walked together are of lengths that take different windows".into(),
            ));
        }
        let table = match &self.alone {
            Some((alone, _)) if first.0 => alone,
            _ => &self.table,
        };
        Ok((table, first.1 && table.single()))
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
        let h = h.narrow(p.k)?;
        let (table, joint) = self.table(c.s, h.rows())?;
        let (sum, lifted) = square_sum(c.s, &scope.at("square"), &h, self.n)?;
        let wide = if joint { Some(lift(c.s, &scope.at("lift"), &h, 64)?) } else { None };
        let total = sum.finish(c.s)?;
        if let Some((sum, t)) = coarse {
            let sum = sum.finish(c.s)?;
            let g = guard(c.s, &scope.at("coarse.guard"), &sum, 2 * (p.k - 2 - t), false, count_bits)?;
            c.flags.guard(c.layer, quantity, g);
        }
        let g = guard(c.s, &scope.at("guard"), &total, p.bits, false, count_bits)?;
        let (y, faults) = if let Some(wide) = wide {
            let wide = wide.finish(c.s)?;
            let joint = positive::normalise(c.s, &scope.at("scale"), &total, &wide, table)?;
            c.flags.guard(c.layer, quantity, g);
            let joint = joint.finish(c.s)?;
            (joint.y, Some(joint.column.narrow(count_bits)?))
        } else {
            let looked = positive::start(c.s, &scope.at("rsqrt"), &total, table)?;
            c.flags.guard(c.layer, quantity, g);
            let value = looked.evaluate(c.s, &scope.at("rsqrt"), Some(count_bits))?;
            let inverse = value.value.finish(c.s)?;
            let y = scale(c.s, &scope.at("scale"), lifted, &inverse)?.finish(c.s)?;
            (y, value.faults.map(|faults| faults.finish(c.s)).transpose()?)
        };
        if let Some(faults) = faults {
            c.flags.count(c.layer, quantity, faults);
        }
        truncate(&y, p.f_gain)
    }
}
