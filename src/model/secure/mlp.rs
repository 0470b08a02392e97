//! SwiGLU: 4 messages. The activation of the gate is a line of its window, beside the lift of `up`; then their product. Of an MLP without a
//! gate the activation is all there is: 2 messages.

use std::sync::Arc;

use super::Context;
use super::projection::projection;
use crate::approx::{Activation, SignedTable};
use crate::error::Result;
use crate::model::prepare::PreparedLayer;
use crate::plan::{F, MlpPlan};
use crate::protocol::evaluate::{Lines, Table, line};
use crate::protocol::guard::guard;
use crate::protocol::lift::lift;
use crate::protocol::product::{Elementwise, product};
use crate::protocol::truncate::truncate;
use crate::protocol::window::Window;
use crate::ring::fixed;
use crate::share::Masked;

/// The activation's table.
pub(super) struct MlpTables {
    activation: Lines,
    hi_bits: u32,
    /// Fraction bits of the table.
    f: u32,
    /// Whether it is multiplied by `up`.
    gated: bool,
}

impl MlpTables {
    pub(super) fn new(p: &MlpPlan, activation: Activation, gated: bool) -> Self {
        // Without a product it is truncated to the activations' fraction itself.
        let f = if gated { p.f_table } else { p.f_table.max(F) };
        let hi_bits = p.gate_k - p.gate_lo_bits;
        let t = SignedTable::activation(activation, p.gate_k, F, 0, p.gate_lo_bits, hi_bits);
        let column = |v: &[f64]| Table::cyclic(&v.iter().map(|&v| fixed::encode(v, f, 64)).collect::<Vec<_>>());
        MlpTables { activation: Lines::new(column(&t.a), column(&t.b), Vec::new()), hi_bits, f, gated }
    }
}

pub(super) fn mlp(
    c: &mut Context<'_>,
    x: &Masked,
    parts: &PreparedLayer,
    p: &MlpPlan,
    t: &MlpTables,
) -> Result<Masked> {
    let scope = c.scope.at("mlp");
    let m = c.config.intermediate_size;
    let both = projection(c.s, &scope.at("gate_up"), x, &parts.gate_up)?;
    let gate = both.columns(0..m)?.narrow(p.gate_proven)?;
    let count_bits = c.flags.count_bits();
    let g = guard(c.s, &scope.at("guard"), &gate, p.gate_k, true, count_bits)?;
    let w = Window::of(&gate.narrow(p.gate_k)?, 0, p.gate_lo_bits, t.hi_bits)?;
    // What down reads is in ring 64 - f_table.
    let ring = if t.gated { 64 } else { 64 - p.f_table + (t.f - F) };
    let activated = line(c.s, &scope.at("activation"), &w, &t.activation, t.f, ring)?;
    let up = match t.gated {
        true => Some(lift(c.s, &scope.at("lift"), &both.columns(m..2 * m)?, 64)?),
        false => None,
    };
    c.flags.guard(c.layer, "gate", g);
    let (activated, up) = (activated.finish(c.s)?, up.map(|up| up.finish(c.s)).transpose()?);
    let [activated] = activated.as_slice() else {
        return Err(crate::Error::Internal("one line for the activation".into()));
    };
    let y = match up {
        Some(up) => {
            let y = product(c.s, &scope.at("product"), activated, &up, Arc::new(Elementwise))?;
            truncate(&y.finish(c.s)?, p.f_table)?
        }
        None => truncate(activated, t.f - F)?,
    };
    projection(c.s, &scope.at("down"), &y, &parts.down)
}
