//! `e^x` for `x` up to a known top, in one exchange: a row times the Owner's and the holders' factors.
//!
//! `e^x = e^hi e^d_lo e^r_lo` over a carry-free window whose low digit `d_lo + r_lo` is unreduced, so that its exponential
//! splits exactly: the rows that the holders sum are `e^hi e^r_lo`, and the Owner's factor is `e^d_lo` (see
//! [`super::evaluate`]; rows are read by [`fold::scaled`], the cyclic window as in [`crate::approx::exp_tables`]). A row
//! may be as wide as the factors allow, so the table is tiny. Cost: 2 messages; `2^hi + k` bits up, two words back and two
//! ahead. Private: as [`super::evaluate`]. Error: `2^-17 e^(a row's width)` for the rounding of a row, `2^-12` of the value
//! for that of the Owner's factor.

use std::ops::Range;
use std::sync::Arc;

use super::Pending;
use super::evaluate::{Brings, Form, Table, evaluate};
use super::truncate::truncate;
use super::window::Window;
use crate::approx::ExpTables;
use crate::error::Result;
use crate::plan::cost::Cost;
use crate::plan::{F_EXP, F_EXP_HI, F_EXP_LO};
use crate::ring::fold::{self, Scaled};
use crate::session::{Scope, Session};
use crate::share::Masked;

/// [`ExpTables`] for a result in ring `k` with `f` fraction bits.
#[derive(Clone)]
pub struct Exp {
    lo_bits: u32,
    hi_bits: u32,
    hi: Table,
    lo: Arc<[u32]>,
    /// Bits dropped from a row times a holder's factor: `F_EXP_HI` are left.
    shift: u32,
    /// Bits dropped from a factor at the Owner: `F_EXP_LO` are left.
    owner_shift: u32,
    k: u32,
    f: u32,
}

impl Exp {
    /// From the tables; the product lives in ring `k + 27 - f`.
    #[must_use]
    pub fn new(t: &ExpTables, k: u32, f: u32) -> Self {
        Exp {
            lo_bits: t.lo_bits,
            hi_bits: t.hi_bits,
            hi: Table::cyclic(&t.hi),
            lo: t.lo.as_slice().into(),
            shift: t.f_hi + t.f_lo - F_EXP_HI,
            owner_shift: t.f_lo - F_EXP_LO,
            k,
            f,
        }
    }

    fn form(&self) -> Form {
        let k = self.k + F_EXP - self.f;
        Form { n_rows: 1 << self.hi_bits, constant: false, factors: 1, extras: 0, folded: 1, k }
    }

    /// What it costs for `n` values.
    #[must_use]
    pub fn cost(&self, n: usize) -> Cost {
        self.form().cost(n)
    }
}

/// `e^x`, element by element.
///
/// # Errors
/// [`crate::Error::Shape`] unless the window reaches the top of the ring of `x`; [`crate::Error::Peer`], [`crate::Error::Reuse`].
pub fn exp(s: &mut Session, scope: &Scope, x: &Masked, e: &Exp) -> Result<Pending<'static, Masked>> {
    let form = e.form();
    let w = Window::of(x, 0, e.lo_bits, e.hi_bits)?;
    super::evaluate::check(&w.hi, form.n_rows)?;
    let lo = w.lo.v.iter().map(|&lo| e.lo[lo as usize]);
    let brings = if s.is_owner() {
        let half = 1u64 << (e.owner_shift - 1);
        Brings::Owner(&w.hi.v, lo.map(|v| (u64::from(v) + half) >> e.owner_shift).collect())
    } else {
        let (hi, lo, table, shift) = (w.hi.v.clone(), lo.collect::<Vec<u32>>(), e.hi.clone(), e.shift);
        Brings::Holder(Arc::new(move |e: Range<usize>, query: &[u8]| {
            let mut out = vec![0u64; e.len()];
            let table = Scaled { table: table.entries(), shift };
            fold::scaled(&table, form.n_rows, &hi[e.clone()], &lo[e], query, &mut out);
            out
        }))
    };
    let (side, rows, f) = (x.side(), x.rows().clone(), e.f);
    let y = evaluate(s, scope, x.rows(), form, brings)?;
    Ok(y.then(move |y| truncate(&Masked::new(y, side, form.k, F_EXP, rows), F_EXP - f)))
}
