//! Secret product `z = op(x, y)`, any bilinear `op`, both operands secret.
//!
//! | | Owner | Client | Helper |
//! |---|---|---|---|
//! | has | `dx, dy`; `x1, y1 = PRF(O,C)` | `rx, ry, x1, y1` | `rx, ry` |
//! | ahead | | sends `op(x1 + rx, ry) + op(rx, y1) - r_z + rho` | |
//! | online | sends `x2 = dx - x1`, `y2 = dy - y1` | | replies `op(x2, ry) + op(rx, y2) - rho` |
//! | result | `op(dx, dy)` + both | `r_z` | `r_z` |
//!
//! Cost: 2 messages; `k(|x| + |y|)` bits up, `k` per output back and as many ahead. Private: `x2, y2` are masked by
//! streams that the Helper lacks, the messages to the Owner by `rho`, their sum by `r_z`. Exact. Source: Araki et al.
//! (CCS 2016) §3 seen from the Owner's side; the Client's part needs no input, as in ASTRA (2019) and BLAZE (2020).

use std::sync::Arc;

use super::Pending;
use crate::error::{Error, Result};
use crate::net::Lane;
use crate::par;
use crate::party::Role;
use crate::plan::cost::Cost;
use crate::prf::Pair;
use crate::ring::{self, pack};
use crate::session::{Scope, Session, recv_words};
use crate::share::{Masked, Rows, Side};

/// A bilinear map that works token by token.
pub trait Bilinear: Send + Sync {
    /// Layout of the result.
    ///
    /// # Errors
    /// [`Error::Shape`] for operands that do not go together.
    fn rows(&self, x: &Masked, y: &Masked) -> Result<Rows>;

    /// The map over the elements of some tokens.
    fn apply(&self, x: &[u64], y: &[u64]) -> Vec<u64>;
}

/// `x * y`, element by element.
pub struct Elementwise;

impl Bilinear for Elementwise {
    fn rows(&self, x: &Masked, y: &Masked) -> Result<Rows> {
        if x.rows() != y.rows() {
            return Err(Error::Shape { op: "product", lhs: x.facts(), rhs: y.facts() });
        }
        Ok(x.rows().clone())
    }

    fn apply(&self, x: &[u64], y: &[u64]) -> Vec<u64> {
        x.iter().zip(y).map(|(a, b)| a.wrapping_mul(*b)).collect()
    }
}

/// Groups of `width` elements of `x` times one element of `y`.
pub struct Scale {
    /// Elements of `x` per element of `y`.
    pub width: usize,
}

impl Bilinear for Scale {
    fn rows(&self, x: &Masked, y: &Masked) -> Result<Rows> {
        let tokens = x.rows().tokens();
        if y.rows().tokens() != tokens
            || (0..tokens).any(|t| x.rows().row(t).len() != y.rows().row(t).len() * self.width)
        {
            return Err(Error::Shape { op: "scale", lhs: x.facts(), rhs: y.facts() });
        }
        Ok(x.rows().clone())
    }

    fn apply(&self, x: &[u64], y: &[u64]) -> Vec<u64> {
        x.chunks(self.width).zip(y).flat_map(|(x, &y)| x.iter().map(move |x| x.wrapping_mul(y))).collect()
    }
}

/// Sums of `group` products: `sum_i x_i y_(c,i)` for `columns` values per element of `x` (selection by a one-hot `x`).
/// `y` holds, group by group, all values of column 0, then all of column 1, ...
pub struct Select {
    /// Elements per group.
    pub group: usize,
    /// Values per element.
    pub columns: usize,
}

impl Bilinear for Select {
    fn rows(&self, x: &Masked, y: &Masked) -> Result<Rows> {
        let tokens = x.rows().tokens();
        let ok = (0..tokens).all(|t| {
            let (a, b) = (x.rows().row(t).len(), y.rows().row(t).len());
            a % self.group == 0 && b == a * self.columns
        });
        if y.rows().tokens() != tokens || !ok {
            return Err(Error::Shape { op: "select", lhs: x.facts(), rhs: y.facts() });
        }
        Ok(Rows::ragged((0..tokens).map(|t| x.rows().row(t).len() / self.group * self.columns)))
    }

    fn apply(&self, x: &[u64], y: &[u64]) -> Vec<u64> {
        x.chunks(self.group)
            .zip(y.chunks(self.group * self.columns))
            .flat_map(|(x, y)| y.chunks(self.group).map(move |column| ring::gemm::dot(x, column)))
            .collect()
    }
}

/// What it costs: `x + y` elements up, `z` back.
#[must_use]
pub fn cost(x: usize, y: usize, z: usize, k: u32) -> Cost {
    Cost::exchange(pack::packed_len(x + y, k) * 8, z, k)
}

/// `op(x, y)` in the narrower of the two rings, fraction bits added.
///
/// # Errors
/// [`Error::Shape`], [`Error::Peer`], [`Error::Reuse`].
pub fn product(
    s: &mut Session,
    scope: &Scope,
    x: &Masked,
    y: &Masked,
    op: Arc<dyn Bilinear>,
) -> Result<Pending<'static, Masked>> {
    let k = x.k().min(y.k());
    let (x, y) = (x.narrow(k)?, y.narrow(k)?);
    let out = op.rows(&x, &y)?;
    match s.role() {
        Role::Owner => online(s, scope, &x, &y, &*op, out, k),
        Role::Client | Role::Helper => masks(s, scope, x, y, op, out, k).map(Pending::ready),
    }
}

fn masks(
    s: &mut Session,
    scope: &Scope,
    x: Masked,
    y: Masked,
    op: Arc<dyn Bilinear>,
    out: Rows,
    k: u32,
) -> Result<Masked> {
    let rz = s.words(Pair::ClientHelper, scope, "product.rz", &out, k)?;
    let rho = s.words(Pair::ClientHelper, scope, "product.rho", &out, k)?;
    let f = x.f() + y.f();
    if s.role() == Role::Client {
        let mut x1 = s.words(Pair::OwnerClient, scope, "product.x1", x.rows(), k)?;
        let y1 = s.words(Pair::OwnerClient, scope, "product.y1", y.rows(), k)?;
        x1.iter_mut().zip(x.raw()).for_each(|(a, r)| *a = a.wrapping_add(*r));
        let (mut z, second) = (op.apply(&x1, y.raw()), op.apply(x.raw(), &y1));
        let m = ring::mask(k);
        for (i, z) in z.iter_mut().enumerate() {
            *z = z.wrapping_add(second[i]).wrapping_sub(rz[i]).wrapping_add(rho[i]) & m;
        }
        s.send_ahead(scope, "product.client", &out, 1, k, &z)?;
    } else {
        let (x, y, rho) = (Arc::new(x), Arc::new(y), Arc::new(rho));
        for (i, pass) in s.passes().iter().enumerate() {
            let [rx, ry, rz] = [x.rows(), y.rows(), &out].map(|r| r.range(&pass.tokens));
            let (x, y, rho, op) = (Arc::clone(&x), Arc::clone(&y), Arc::clone(&rho), Arc::clone(&op));
            let (from, to) =
                (scope.address(pass.number, "product.shares"), scope.address(pass.number, "product.helper"));
            s.leave(
                i,
                Box::new(move |links| {
                    let xy = recv_words(links, Role::Owner, Lane::Online, &from, rx.len() + ry.len(), k)?;
                    let (x2, y2) = xy.split_at(rx.len());
                    let z = local_helper(&*op, x2, y2, &x.raw()[rx], &y.raw()[ry], &rho[rz], k);
                    links.gather(Role::Owner, Lane::Online, &to, pack::pack(&z, k))
                }),
            )?;
        }
    }
    Ok(Masked::new(rz, Side::Mask, k, f, out))
}

/// `op(x2, ry) + op(rx, y2) - rho`.
fn local_helper(op: &dyn Bilinear, x2: &[u64], y2: &[u64], rx: &[u64], ry: &[u64], rho: &[u64], k: u32) -> Vec<u64> {
    let (mut z, second) = (op.apply(x2, ry), op.apply(rx, y2));
    let m = ring::mask(k);
    for (i, z) in z.iter_mut().enumerate() {
        *z = z.wrapping_add(second[i]).wrapping_sub(rho[i]) & m;
    }
    z
}

fn online(
    s: &mut Session,
    scope: &Scope,
    x: &Masked,
    y: &Masked,
    op: &dyn Bilinear,
    out: Rows,
    k: u32,
) -> Result<Pending<'static, Masked>> {
    s.declare(cost(x.raw().len(), y.raw().len(), out.len(), k));
    let m = ring::mask(k);
    let mut shares = s.words(Pair::OwnerClient, scope, "product.x1", x.rows(), k)?;
    shares.extend(s.words(Pair::OwnerClient, scope, "product.y1", y.rows(), k)?);
    shares.iter_mut().zip(x.raw().iter().chain(y.raw())).for_each(|(p, d)| *p = d.wrapping_sub(*p) & m);
    s.send_online(Role::Helper, scope, "product.shares", pack::pack(&shares, k))?;
    let z = op.apply(x.raw(), y.raw());
    Ok(receive(scope, "product.client", "product.helper", z, k, x.f() + y.f(), out))
}

/// The Owner's second half of every product-like operation: its own term plus what the two others sent, the Helper online.
pub(crate) fn receive(
    scope: &Scope,
    client: &'static str,
    helper: &'static str,
    own: Vec<u64>,
    k: u32,
    f: u32,
    out: Rows,
) -> Pending<'static, Masked> {
    received(scope, client, (helper, Lane::Online), own, k, f, out)
}

/// [`receive`], where the Helper may have sent its part ahead.
pub(crate) fn received(
    scope: &Scope,
    client: &'static str,
    (helper, lane): (&'static str, Lane),
    own: Vec<u64>,
    k: u32,
    f: u32,
    out: Rows,
) -> Pending<'static, Masked> {
    let scope = scope.clone();
    Pending::new(move |s| {
        let n = out.len();
        let c = s.recv_packed(Role::Client, Lane::Ahead, &scope, client, n, k)?;
        let h = s.recv_packed(Role::Helper, lane, &scope, helper, n, k)?;
        let m = ring::mask(k);
        let sums = par::each(n, |b| {
            let others = c.block(b.clone()).into_iter().zip(h.block(b.clone()));
            own[b].iter().zip(others).map(|(z, (c, h))| z.wrapping_add(c).wrapping_add(h) & m).collect()
        });
        Ok(Masked::reduced(sums, Side::Value, k, f, out))
    })
}
