//! Shared-weight linear: `y = W x` with `W` itself secret from all three servers (the delegation deployment: the client
//! and the owner of the model are outside, the servers hold shares of both).
//!
//! `W` is a masked value, `W = d_W + r_W`, and a cached operand: it is materialised once, in the largest ring that it
//! will meet, and every product after that sends shares of `x` only.
//!
//! | | Owner | Client | Helper |
//! |---|---|---|---|
//! | shared | `d_W` | `r_W` | `r_W` |
//! | materialised, once | sends `W2 = d_W - W1` | `W1` = PRF(O,C) | receives `W2` |
//! | ahead | | sends `(x1 + r_x) r_W + r_x W1 - r_y + rho` | |
//! | online | sends `x2 = d_x - x1` | | replies `x2 r_W + r_x W2 - rho` |
//! | result | `d_x d_W` + both `= y - r_y` | `r_y` | `r_y` |
//!
//! `x1` = PRF(Owner, Client); `r_y`, `rho` = PRF(Client, Helper), fresh. Cost: 2 messages in sequence; `k` bits per
//! input up, `k` per output back and `k` per output ahead; once per matrix, `k_W` bits per weight from the giver to the
//! Owner and from the Owner to the Helper. Private: `d_W` is masked by `r_W`, which the Owner lacks, `W2` by `W1`,
//! which the Helper lacks, and each is sent once; `x2` and the messages to the Owner as in [`super::product`]. Two
//! colluding servers rebuild `W`. Exact in the ring. Source: Araki et al. (CCS 2016), §2.2, from the Owner's side, the
//! Client's part ahead as in ASTRA (2019) and BLAZE (2020).

use std::sync::{Arc, OnceLock};

use ndarray::ArrayView2;

use super::{Pending, product};
use crate::error::{Error, Result};
use crate::net::Lane;
use crate::party::Role;
use crate::plan::cost::Cost;
use crate::prf::Pair;
use crate::ring::{self, gemm, pack};
use crate::session::{Scope, Session, recv_words};
use crate::share::{Masked, Rows, Side};

/// One party's part of a shared matrix, `outputs x inputs`, in a ring of `k` bits with `f` fraction bits.
///
/// Printing shows the public facts only; there is no serialisation.
///
/// ```compile_fail
/// fn sendable<T: serde::Serialize>(_: &T) {}
/// fn send(w: &trefoil::protocol::shared_linear::SharedMatrix) { sendable(w) }
/// ```
/// ```
/// fn sendable<T: serde::Serialize>(_: &T) {}
/// fn send(w: &trefoil::protocol::shared_linear::SharedMatrix) { sendable(&w.facts()) }
/// ```
#[derive(Clone)]
pub struct SharedMatrix {
    outputs: usize,
    inputs: usize,
    k: u32,
    f: u32,
    /// `d_W` at the Owner, `r_W` at the others.
    own: Arc<[u64]>,
    /// The Client's `W1`, the Helper's `W2` (there once its job has run), nothing at the Owner.
    share: Arc<OnceLock<Vec<u64>>>,
}

impl std::fmt::Debug for SharedMatrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.facts())
    }
}

impl SharedMatrix {
    /// Shares `w` (outputs x inputs, ring elements), which party `from` gives and the others pass as `None`, and
    /// materialises it. In a batch of one pass; the matrix then serves any batch of later passes. The owner of a model
    /// who is outside does what `from` does here. A matrix of the Owner's own is not masked from it ([`super::linear`]
    /// is cheaper).
    ///
    /// # Errors
    /// [`Error::Shape`] for a missing or different matrix; [`Error::Peer`], [`Error::Reuse`].
    #[allow(clippy::too_many_arguments)] // the public facts of a matrix
    pub fn share(
        s: &mut Session,
        scope: &Scope,
        from: Role,
        w: Option<ArrayView2<'_, u64>>,
        outputs: usize,
        inputs: usize,
        k: u32,
        f: u32,
    ) -> Result<Self> {
        let wrong = |lhs: String| Error::Shape { op: "share a matrix", lhs, rhs: format!("{outputs} x {inputs}") };
        let n = outputs.checked_mul(inputs).filter(|n| n.checked_mul(64).is_some() && (1..=64).contains(&k));
        let n = n.ok_or_else(|| wrong(format!("a ring of {k} bits")))?;
        if s.role() == from && w.is_none_or(|w| w.dim() != (outputs, inputs)) {
            return Err(wrong(w.map_or("no matrix".into(), |w| format!("{:?}", w.dim()))));
        }
        let pass = s.the_pass()?;
        let mut own = match (s.role(), from) {
            (_, Role::Owner) => vec![0; n],
            (Role::Owner, _) => Vec::new(),
            _ => s.stream(Pair::ClientHelper, scope, pass, "shared.r")?.words(n, k),
        };
        if s.role() == from {
            let m = ring::mask(k);
            let d: Vec<u64> = w.iter().flatten().zip(&own).map(|(w, r)| w.wrapping_sub(*r) & m).collect();
            if from == Role::Owner {
                own = d;
            } else {
                s.links().send(Role::Owner, Lane::Online, &scope.address(pass, "shared.d"), pack::pack(&d, k))?;
            }
        } else if s.is_owner() {
            own = s.recv_words(from, Lane::Online, scope, "shared.d", n, k)?;
        }
        if s.is_owner() && from != Role::Owner {
            s.declare(give_cost(from, n, k));
        }
        let side = super::side(s);
        Self::materialise(s, scope, &Masked::new(own, side, k, f, Rows::even(1, n)), outputs, inputs)
    }

    /// Makes a cached operand of a matrix that is already masked, row by row: one message, Owner to Helper, once. In a
    /// batch of one pass.
    ///
    /// # Errors
    /// [`Error::Shape`] if `w` has not `outputs x inputs` elements; [`Error::Peer`], [`Error::Reuse`].
    pub fn materialise(s: &mut Session, scope: &Scope, w: &Masked, outputs: usize, inputs: usize) -> Result<Self> {
        let (n, k, pass) = (w.raw().len(), w.k(), s.the_pass()?);
        if outputs.checked_mul(inputs) != Some(n) || w.side() != super::side(s) {
            return Err(Error::Shape { op: "materialise", lhs: w.facts(), rhs: format!("{outputs} x {inputs}") });
        }
        let share = Arc::new(OnceLock::new());
        match s.role() {
            Role::Owner => {
                s.declare(materialise_cost(n, k));
                let mut w2 = s.stream(Pair::OwnerClient, scope, pass, "shared.w1")?.words(n, k);
                let m = ring::mask(k);
                w2.iter_mut().zip(w.raw()).for_each(|(p, d)| *p = d.wrapping_sub(*p) & m);
                s.send_online(Role::Helper, scope, "shared.w2", pack::pack(&w2, k))?;
            }
            Role::Client => {
                let w1 = s.stream(Pair::OwnerClient, scope, pass, "shared.w1")?.words(n, k);
                // A fresh cell takes the first value.
                let _ = share.set(w1);
            }
            Role::Helper => {
                let (step, cell) = (scope.address(pass, "shared.w2"), Arc::clone(&share));
                s.leave(
                    0,
                    Box::new(move |links| {
                        let w2 = recv_words(links, Role::Owner, Lane::Online, &step, n, k)?;
                        cell.set(w2).map_err(|_| Error::Internal("a matrix was materialised twice".into()))
                    }),
                )?;
            }
        }
        Ok(SharedMatrix { outputs, inputs, k, f: w.f(), own: w.raw().into(), share })
    }

    /// Output and input dimension.
    #[must_use]
    pub fn dim(&self) -> (usize, usize) {
        (self.outputs, self.inputs)
    }

    /// Bytes that this party's part occupies.
    #[must_use]
    pub fn bytes(&self) -> usize {
        8 * (self.own.len() + self.share.get().map_or(0, Vec::len))
    }

    /// Shape, ring and fraction bits, for errors.
    #[must_use]
    pub fn facts(&self) -> String {
        format!("a shared matrix of {} x {} in Z_2^{} with {} fraction bits", self.outputs, self.inputs, self.k, self.f)
    }

    /// `y[t, :] += x[t, :] w^T`.
    fn add_product(&self, x: &[u64], w: &[u64], y: &mut [u64]) {
        gemm::ring(x, w, y.len() / self.outputs.max(1), self.outputs, self.inputs, y);
    }
}

fn give_cost(from: Role, n: usize, k: u32) -> Cost {
    let mut c = Cost::default().send(from, Role::Owner, n, k);
    c.depth = 1;
    c
}

/// What [`SharedMatrix::materialise`] costs for `n` weights.
#[must_use]
pub fn materialise_cost(n: usize, k: u32) -> Cost {
    let mut c = Cost::default().send(Role::Owner, Role::Helper, n, k);
    c.depth = 1;
    c
}

/// What [`SharedMatrix::share`] costs for `n` weights.
#[must_use]
pub fn share_cost(from: Role, n: usize, k: u32) -> Cost {
    let materialise = materialise_cost(n, k);
    if from == Role::Owner { materialise } else { give_cost(from, n, k).then(materialise) }
}

/// What [`shared_linear`] costs for `x` inputs and `y` outputs.
#[must_use]
pub fn cost(x: usize, y: usize, k: u32) -> Cost {
    Cost::exchange(pack::packed_len(x, k) * 8, y, k)
}

/// `y = W x` for every row of `w`'s inputs; ring of `x` (at most that of `w`), fraction bits of both added.
///
/// # Errors
/// [`Error::Shape`], [`Error::Peer`], [`Error::Reuse`].
pub fn shared_linear(s: &mut Session, scope: &Scope, x: &Masked, w: &SharedMatrix) -> Result<Pending<'static, Masked>> {
    let (outputs, inputs, rows) = (w.outputs, w.inputs, x.rows());
    let whole = inputs > 0 && (0..rows.tokens()).all(|t| rows.row(t).len() % inputs == 0);
    if !whole || x.k() > w.k || x.side() != super::side(s) {
        return Err(Error::Shape { op: "shared linear", lhs: x.facts(), rhs: w.facts() });
    }
    let out = Rows::ragged((0..rows.tokens()).map(|t| rows.row(t).len() / inputs * outputs));
    match s.role() {
        Role::Owner => online(s, scope, x, w, out),
        Role::Client | Role::Helper => masks(s, scope, x, w, out).map(Pending::ready),
    }
}

fn masks(s: &mut Session, scope: &Scope, x: &Masked, w: &SharedMatrix, out: Rows) -> Result<Masked> {
    let (k, f) = (x.k(), x.f() + w.f);
    let m = ring::mask(k);
    let ry = s.words(Pair::ClientHelper, scope, "shared.ry", &out, k)?;
    let rho = s.words(Pair::ClientHelper, scope, "shared.rho", &out, k)?;
    if s.role() == Role::Client {
        let w1 = w.share.get().ok_or_else(|| Error::Internal("a shared matrix without the client's share".into()))?;
        let mut x1 = s.words(Pair::OwnerClient, scope, "shared.x1", x.rows(), k)?;
        x1.iter_mut().zip(x.raw()).for_each(|(a, r)| *a = a.wrapping_add(*r));
        let mut y = vec![0; out.len()];
        w.add_product(&x1, &w.own, &mut y);
        w.add_product(x.raw(), w1, &mut y);
        for (i, y) in y.iter_mut().enumerate() {
            *y = y.wrapping_sub(ry[i]).wrapping_add(rho[i]) & m;
        }
        s.send_ahead(scope, "shared.client", &out, 1, k, &y)?;
        return Ok(Masked::new(ry, Side::Mask, k, f, out));
    }

    // Of the Helper's two products, r_x W2 needs no message: it is done here, ahead, unless W2 is still on its way.
    let mut own: Vec<u64> = rho.iter().map(|rho| rho.wrapping_neg()).collect();
    let ready = w.share.get();
    if let Some(w2) = ready {
        w.add_product(x.raw(), w2, &mut own);
    }
    let missing = ready.is_none();
    for (i, pass) in s.passes().iter().enumerate() {
        let (xr, yr) = (x.rows().range(&pass.tokens), out.range(&pass.tokens));
        let (w, mut y) = (w.clone(), own[yr].to_vec());
        let rx = if missing { x.raw()[xr.clone()].to_vec() } else { Vec::new() };
        let (from, to) = (scope.address(pass.number, "shared.x2"), scope.address(pass.number, "shared.helper"));
        s.leave(
            i,
            Box::new(move |links| {
                let x2 = recv_words(links, Role::Owner, Lane::Online, &from, xr.len(), k)?;
                w.add_product(&x2, &w.own, &mut y);
                if missing {
                    // The job that receives W2 was left before this one.
                    let w2 = w.share.get().ok_or_else(|| Error::Internal("a product before its matrix".into()))?;
                    w.add_product(&rx, w2, &mut y);
                }
                // Packing reduces modulo 2^k.
                links.gather(Role::Owner, Lane::Online, &to, pack::pack(&y, k))
            }),
        )?;
    }
    Ok(Masked::new(ry, Side::Mask, k, f, out))
}

fn online(s: &mut Session, scope: &Scope, x: &Masked, w: &SharedMatrix, out: Rows) -> Result<Pending<'static, Masked>> {
    let k = x.k();
    s.declare(cost(x.raw().len(), out.len(), k));
    let m = ring::mask(k);
    let mut x2 = s.words(Pair::OwnerClient, scope, "shared.x1", x.rows(), k)?;
    x2.iter_mut().zip(x.raw()).for_each(|(p, d)| *p = d.wrapping_sub(*p) & m);
    s.send_online(Role::Helper, scope, "shared.x2", pack::pack(&x2, k))?;
    let mut y = vec![0; out.len()];
    w.add_product(x.raw(), &w.own, &mut y);
    Ok(product::receive(scope, "shared.client", "shared.helper", y, k, x.f() + w.f, out))
}
