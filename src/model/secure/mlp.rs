//! SwiGLU: 4 messages. The activation of the gate is a line of its window, beside the lift of `up`; then their product.

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
}

impl MlpTables {
    pub(super) fn new(p: &MlpPlan, activation: Activation) -> Self {
        let hi_bits = p.gate_k - p.gate_lo_bits;
        let t = SignedTable::activation(activation, p.gate_k, F, 0, p.gate_lo_bits, hi_bits);
        let column = |v: &[f64]| Table::cyclic(&v.iter().map(|&v| fixed::encode(v, p.f_table, 64)).collect::<Vec<_>>());
        MlpTables { activation: Lines::new(column(&t.a), column(&t.b), Vec::new()), hi_bits }
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
    let (gate, up) = (both.columns(0..m)?.narrow(p.gate_proven)?, both.columns(m..2 * m)?);
    let count_bits = c.flags.count_bits();
    let g = guard(c.s, &scope.at("guard"), &gate, p.gate_k, true, count_bits)?;
    let w = Window::of(&gate.narrow(p.gate_k)?, 0, p.gate_lo_bits, t.hi_bits)?;
    let activated = line(c.s, &scope.at("activation"), &w, &t.activation, p.f_table, 64)?;
    let up = lift(c.s, &scope.at("lift"), &up, 64)?;
    c.flags.guard(c.layer, "gate", g);
    let (activated, up) = (activated.finish(c.s)?, up.finish(c.s)?);
    let [activated] = activated.as_slice() else {
        return Err(crate::Error::Internal("one line for the activation".into()));
    };
    let y = product(c.s, &scope.at("product"), activated, &up, Arc::new(Elementwise))?;
    let y = truncate(&y.finish(c.s)?, p.f_table)?;
    projection(c.s, &scope.at("down"), &y, &parts.down)
}
