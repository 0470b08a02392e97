//! SwiGLU: 4 messages. The activation of the gate is a line of its window, beside the lift of `up`; then their product. Of an MLP without a
//! gate the activation is all there is: 2 messages. A bottleneck's neurons (AdaptFormer) are activated at the same time by a table of their own.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use super::Context;
use super::projection::projection;
use crate::approx::{Activation, SignedTable};
use crate::error::Result;
use crate::model::config::{LayerShape, ModelConfig};
use crate::model::prepare::PreparedLayer;
use crate::plan::{F, MlpPlan};
use crate::protocol::evaluate::{Lines, Table, line};
use crate::protocol::guard::guard;
use crate::protocol::lift::lift;
use crate::protocol::pieces::{Pieces, Step};
use crate::protocol::product::{Elementwise, product};
use crate::protocol::truncate::truncate;
use crate::protocol::window::Window;
use crate::ring::fixed;
use crate::share::Masked;

/// The tables of a layer's activations.
pub(super) struct MlpTables {
    functions: Vec<Function>,
    /// Fraction bits of the tables.
    f: u32,
    /// Whether what is activated is multiplied by `up`.
    gated: bool,
}

/// An activation of some neurons.
struct Function {
    neurons: Range<usize>,
    scope: &'static str,
    lines: Lines,
    lo_bits: u32,
    hi_bits: u32,
}

/// Of the MLP's own neurons and of a bottleneck's.
const SCOPES: [&str; 2] = ["activation", "bottleneck"];

impl MlpTables {
    pub(super) fn new(p: &MlpPlan, c: &ModelConfig, shape: LayerShape) -> Self {
        let gated = !c.encoder();
        // Without a product it is truncated to the activations' fraction itself.
        let f = if gated { p.f_table } else { p.f_table.max(F) };
        let column = |v: &[f64]| Table::cyclic(&v.iter().map(|&v| fixed::encode(v, f, 64)).collect::<Vec<_>>());
        let function = |((neurons, activation), scope)| {
            let lo_bits = p.lo_bits(shape, activation);
            let hi_bits = p.gate_k - lo_bits;
            let t = SignedTable::activation(Activation::from(activation), p.gate_k, F, 0, lo_bits, hi_bits);
            let lines = Lines::new(column(&t.a), column(&t.b), Vec::new());
            Function { neurons, scope, lines, lo_bits, hi_bits }
        };
        let functions = shape.neurons(c.intermediate_size).zip(SCOPES).map(function).collect();
        MlpTables { functions, f, gated }
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
    let gate = gate.narrow(p.gate_k)?;
    let up = if t.gated { Some(both.columns(m..2 * m)?) } else { None };
    // What down reads is in ring 64 - f_table.
    let ring = if t.gated { 64 } else { 64 - p.f_table + (t.f - F) };
    // Line and lift; the product has less.
    let reply = 8 * 3 + 8;
    let pieces = Pieces::of(c.s, gate.rows(), c.pieces, (|tokens| tokens * m, reply))?;
    let dropped = if t.gated { p.f_table } else { t.f - F };
    let y = pieces.run(c.s, &scope, |s, scope, rows| {
        let gate = pieces.rows(&gate, rows)?;
        let mut activated = Vec::new();
        for function in &t.functions {
            let gate = if t.functions.len() == 1 {
                Cow::Borrowed(&*gate)
            } else {
                Cow::Owned(gate.columns(function.neurons.clone())?)
            };
            let w = Window::of(&gate, 0, function.lo_bits, function.hi_bits)?;
            activated.push(line(s, &scope.at(function.scope), &w, &function.lines, t.f, ring)?);
        }
        let up = match &up {
            Some(up) => Some(lift(s, &scope.at("lift"), &*pieces.rows(up, rows)?, 64)?),
            None => None,
        };
        Ok(Step::next(move |s, scope| {
            let mut columns = Vec::new();
            for activated in activated {
                columns.extend(activated.finish(s)?);
            }
            let activated = Masked::beside(columns)?;
            let Some(up) = up else { return Ok(Step::Done(truncate(&activated, dropped)?)) };
            let up = up.finish(s)?;
            let y = product(s, &scope.at("product"), &activated, &up, Arc::new(Elementwise))?;
            Ok(Step::next(move |s, _| Ok(Step::Done(truncate(&y.finish(s)?, dropped)?))))
        }))
    })?;
    c.flags.guard(c.layer, "gate", g);
    let y = Masked::stack(y)?;
    projection(c.s, &scope.at("down"), &y, &parts.down)
}
