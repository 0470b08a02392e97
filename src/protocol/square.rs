//! Sum of squares, and scaling, of a small-ring value in `Z_2^64` with the lift fused in.
//!
//! With `D = d + 2^(k-2) mod 2^k`, `t = top(D)` at the Owner and `s = 1 - top(r)`, `R = r - 2^(k-2) - 2^k top(r)` at the
//! holders, `x = D + R - 2^k s t` over the integers (the wrap is `top(r) or t`), for `|x| < 2^(k-2)`. Hence, mod `2^64`:
//!
//! - `x^2 = D^2 + 2 D R + t (2^(2k) s - 2^(k+1) s R) - 2^(k+1) s (t D) + R^2`: the Owner shares `D`, `t`, `t D`;
//! - `x g = D g + R g - 2^k s t g`: the Owner shares `D`, `t`, `d_g` and `t d_g`; `D` and `t` are already there.
//!
//! A coefficient that is a multiple of `2^j` needs its share modulo `2^(64-j)` only, which is how it is packed.
//!
//! | | Owner | Client | Helper |
//! |---|---|---|---|
//! | has | `D, t`; first shares = PRF(O,C) | `R, s`, first shares | `R, s` |
//! | ahead | | its cross terms `- r_z + rho` | |
//! | online | sends second shares | | replies its cross terms `- rho` |
//!
//! Cost: squares: 2 messages, `64 + (64-k) + (63-k)` bits up per element, 64 back and 64 ahead per group; scale: 2
//! messages, `64-k` bits up per element and 64 per group, 64 back and 64 ahead per element. Private: as
//! [`super::product`]; every share has its own stream. Exact. Source: ring extension inside a product, after SiRNN
//! (2021); derived in `docs/protocols.md`.

use std::sync::{Arc, Mutex, PoisonError};

use super::{Pending, product};
use crate::error::{Error, Result};
use crate::net::Lane;
use crate::party::Role;
use crate::plan::cost::Cost;
use crate::prf::Pair;
use crate::ring::{self, pack};
use crate::session::{Scope, Session};
use crate::share::{Masked, Rows, Side};

/// What stays of a sum of squares at each party, so that scaling the same value costs less.
pub struct Lifted {
    k: u32,
    f: u32,
    rows: Rows,
    part: Part,
}

#[derive(Clone)]
enum Part {
    Owner {
        d: Arc<Vec<u64>>,
        t: Arc<Vec<u64>>,
    },
    Client {
        signed: Arc<Vec<u64>>,
        s: Arc<Vec<u64>>,
        d1: Arc<Vec<u64>>,
        t1: Arc<Vec<u64>>,
    },
    /// `(D2, t2)` come in the online thread, a pass at a time.
    Helper {
        signed: Arc<Vec<u64>>,
        s: Arc<Vec<u64>>,
        shares: Arc<Mutex<Received>>,
    },
}

type Received = std::collections::HashMap<u64, (Vec<u64>, Vec<u64>)>;

/// What a sum of squares costs: `n` elements of ring `k`, `groups` sums.
#[must_use]
pub fn square_cost(n: usize, groups: usize, k: u32) -> Cost {
    let up = pack::packed_len(n, 64) + pack::packed_len(n, 64 - k) + pack::packed_len(n, 63 - k);
    Cost::exchange(up * 8, groups, 64)
}

/// What scaling costs.
#[must_use]
pub fn scale_cost(n: usize, groups: usize, k: u32) -> Cost {
    Cost::exchange((pack::packed_len(groups, 64) + pack::packed_len(n, 64 - k)) * 8, n, 64)
}

fn holder(x: &Masked) -> (Vec<u64>, Vec<u64>) {
    let k = x.k();
    let bias = 1u64 << (k - 2);
    x.raw()
        .iter()
        .map(|&r| {
            let top = r >> (k - 1);
            (r.wrapping_sub(bias).wrapping_sub(top << k), 1 - top)
        })
        .unzip()
}

/// `sum x_i^2` over groups of `group` neighbours, in `Z_2^64` with twice the fraction bits.
///
/// # Errors
/// [`Error::Shape`] for a ring above 61 bits or a group that does not divide; [`Error::Peer`], [`Error::Reuse`].
pub fn square_sum(
    s: &mut Session,
    scope: &Scope,
    x: &Masked,
    group: usize,
) -> Result<(Pending<'static, Masked>, Lifted)> {
    let (k, rows, tokens) = (x.k(), x.rows(), x.rows().tokens());
    if !(3..=61).contains(&k) || group == 0 || (0..tokens).any(|t| rows.row(t).len() % group != 0) {
        return Err(Error::Shape { op: "square sum", lhs: x.facts(), rhs: format!("groups of {group}, ring 3 to 61") });
    }
    let out = Rows::ragged((0..tokens).map(|t| rows.row(t).len() / group));
    let (kt, ktd) = (64 - k, 63 - k);
    let lifted = |part| Lifted { k, f: x.f(), rows: rows.clone(), part };
    let f = 2 * x.f();

    if s.is_owner() {
        s.declare(square_cost(rows.len(), out.len(), k));
        let (bias, low) = (1u64 << (k - 2), ring::mask(k));
        let d: Vec<u64> = x.raw().iter().map(|d| d.wrapping_add(bias) & low).collect();
        let t: Vec<u64> = d.iter().map(|d| d >> (k - 1)).collect();
        let mut payload = Vec::new();
        for (label, bits, value) in [("square.d1", 64, 0), ("square.t1", kt, 1), ("square.td1", ktd, 2)] {
            let mut share = s.words(Pair::OwnerClient, scope, label, rows, bits)?;
            let m = ring::mask(bits);
            for (i, w) in share.iter_mut().enumerate() {
                let v = [d[i], t[i], d[i].wrapping_mul(t[i])][value];
                *w = v.wrapping_sub(*w) & m;
            }
            pack::pack_into(&share, bits, &mut payload);
        }
        s.send_online(Role::Helper, scope, "square.shares", payload)?;
        let own = d.chunks(group).map(|g| ring::gemm::dot(g, g)).collect();
        let z = product::receive(scope, "square.client", "square.helper", own, 64, f, out);
        return Ok((z, lifted(Part::Owner { d: d.into(), t: t.into() })));
    }

    let (signed, sbit) = holder(x);
    let rz = s.words(Pair::ClientHelper, scope, "square.rz", &out, 64)?;
    let rho = s.words(Pair::ClientHelper, scope, "square.rho", &out, 64)?;
    let (signed, sbit) = (Arc::new(signed), Arc::new(sbit));
    let part = if s.role() == Role::Client {
        let d1 = s.words(Pair::OwnerClient, scope, "square.d1", rows, 64)?;
        let t1 = s.words(Pair::OwnerClient, scope, "square.t1", rows, kt)?;
        let td1 = s.words(Pair::OwnerClient, scope, "square.td1", rows, ktd)?;
        let mut z = local_squares(k, group, &signed, &sbit, &d1, &t1, &td1);
        for (i, (z, r)) in z.iter_mut().zip(signed.chunks(group)).enumerate() {
            *z = z.wrapping_add(ring::gemm::dot(r, r)).wrapping_sub(rz[i]).wrapping_add(rho[i]);
        }
        s.send_ahead(scope, "square.client", &out, 1, 64, &z)?;
        Part::Client { signed, s: sbit, d1: d1.into(), t1: t1.into() }
    } else {
        let shares = Arc::new(Mutex::new(Received::new()));
        let rho = Arc::new(rho);
        for (i, pass) in s.passes().iter().enumerate() {
            let (range, sums, number) = (rows.range(&pass.tokens), out.range(&pass.tokens), pass.number);
            let (signed, sbit, rho, shares) =
                (Arc::clone(&signed), Arc::clone(&sbit), Arc::clone(&rho), Arc::clone(&shares));
            let (from, to) = (scope.address(pass.number, "square.shares"), scope.address(pass.number, "square.helper"));
            s.leave(
                i,
                Box::new(move |links| {
                    let n = range.len();
                    let lens = [64, kt, ktd].map(|b| pack::packed_len(n, b));
                    let bytes = links.recv(Role::Owner, Lane::Online, &from, lens.iter().sum())?;
                    let (a, rest) = bytes.split_at(lens[0]);
                    let (b, c) = rest.split_at(lens[1]);
                    let parse = |bytes: &[u8], bits| {
                        pack::unpack(bytes, n, bits).ok_or_else(|| {
                            crate::net::blame(
                                Role::Owner,
                                &from,
                                crate::error::PeerFault::Malformed("padding bits set"),
                            )
                        })
                    };
                    let (d2, t2, td2) = (parse(a, 64)?, parse(b, kt)?, parse(c, ktd)?);
                    let mut z = local_squares(k, group, &signed[range.clone()], &sbit[range], &d2, &t2, &td2);
                    z.iter_mut().zip(&rho[sums]).for_each(|(z, rho)| *z = z.wrapping_sub(*rho));
                    shares.lock().unwrap_or_else(PoisonError::into_inner).insert(number, (d2, t2));
                    links.gather(Role::Owner, Lane::Online, &to, pack::pack(&z, 64))
                }),
            )?;
        }
        Part::Helper { signed, s: sbit, shares }
    };
    Ok((Pending::ready(Masked::new(rz, Side::Mask, 64, f, out)), lifted(part)))
}

/// `sum 2 D R + t (2^(2k) s - 2^(k+1) s R) - 2^(k+1) s (t D)` for one party's shares of `D`, `t`, `t D`.
fn local_squares(k: u32, group: usize, r: &[u64], s: &[u64], d: &[u64], t: &[u64], td: &[u64]) -> Vec<u64> {
    let top = if 2 * k < 64 { 1u64 << (2 * k) } else { 0 };
    (0..r.len() / group)
        .map(|g| {
            (g * group..(g + 1) * group).fold(0u64, |sum, i| {
                let mut term = d[i].wrapping_mul(r[i]).wrapping_mul(2);
                if s[i] == 1 {
                    let wrap = top.wrapping_sub(r[i] << (k + 1));
                    term = term.wrapping_add(t[i].wrapping_mul(wrap)).wrapping_sub(td[i] << (k + 1));
                }
                sum.wrapping_add(term)
            })
        })
        .collect()
}

/// `x g` with one `g` (ring 64) for every group of neighbours of the lifted `x`; fraction bits added, ring 64.
///
/// # Errors
/// [`Error::Shape`] if `g` does not divide the value; [`Error::Peer`], [`Error::Reuse`].
pub fn scale(s: &mut Session, scope: &Scope, x: Lifted, g: &Masked) -> Result<Pending<'static, Masked>> {
    let (k, rows, tokens) = (x.k, &x.rows, x.rows.tokens());
    let groups = g.raw().len();
    let width = rows.len().checked_div(groups).unwrap_or(1);
    let fits = g.k() == 64
        && g.rows().tokens() == tokens
        && (0..tokens).all(|t| rows.row(t).len() == g.rows().row(t).len() * width);
    if !fits {
        return Err(Error::Shape { op: "scale", lhs: g.facts(), rhs: format!("{} lifted elements", rows.len()) });
    }
    let (kt, f) = (64 - k, x.f + g.f());
    if let Part::Owner { d, t } = &x.part {
        s.declare(scale_cost(rows.len(), groups, k));
        let mut dg = s.words(Pair::OwnerClient, scope, "scale.g1", g.rows(), 64)?;
        let mut tg = s.words(Pair::OwnerClient, scope, "scale.tg1", rows, kt)?;
        dg.iter_mut().zip(g.raw()).for_each(|(w, v)| *w = v.wrapping_sub(*w));
        let m = ring::mask(kt);
        for (i, w) in tg.iter_mut().enumerate() {
            *w = t[i].wrapping_mul(g.raw()[i / width]).wrapping_sub(*w) & m;
        }
        let mut payload = pack::pack(&dg, 64);
        pack::pack_into(&tg, kt, &mut payload);
        s.send_online(Role::Helper, scope, "scale.shares", payload)?;
        let own = d.iter().enumerate().map(|(i, d)| d.wrapping_mul(g.raw()[i / width])).collect();
        return Ok(product::receive(scope, "scale.client", "scale.helper", own, 64, f, rows.clone()));
    }

    let rz = s.words(Pair::ClientHelper, scope, "scale.rz", rows, 64)?;
    let rho = s.words(Pair::ClientHelper, scope, "scale.rho", rows, 64)?;
    match x.part {
        Part::Client { signed, s: sbit, d1, t1 } => {
            let dg = s.words(Pair::OwnerClient, scope, "scale.g1", g.rows(), 64)?;
            let tg = s.words(Pair::OwnerClient, scope, "scale.tg1", rows, kt)?;
            let mut z = local_scale(k, width, &signed, &sbit, &d1, &t1, &dg, &tg, g.raw());
            for (i, z) in z.iter_mut().enumerate() {
                let own = signed[i].wrapping_mul(g.raw()[i / width]);
                *z = z.wrapping_add(own).wrapping_sub(rz[i]).wrapping_add(rho[i]);
            }
            s.send_ahead(scope, "scale.client", rows, 1, 64, &z)?;
        }
        Part::Helper { signed, s: sbit, shares } => {
            let (rho, g) = (Arc::new(rho), Arc::new(g.clone()));
            for (i, pass) in s.passes().iter().enumerate() {
                let (range, gr, number) = (rows.range(&pass.tokens), g.rows().range(&pass.tokens), pass.number);
                let (signed, sbit, rho, shares, g) =
                    (Arc::clone(&signed), Arc::clone(&sbit), Arc::clone(&rho), Arc::clone(&shares), Arc::clone(&g));
                let (from, to) =
                    (scope.address(pass.number, "scale.shares"), scope.address(pass.number, "scale.helper"));
                s.leave(
                    i,
                    Box::new(move |links| {
                        let lens = [pack::packed_len(gr.len(), 64), pack::packed_len(range.len(), kt)];
                        let bytes = links.recv(Role::Owner, Lane::Online, &from, lens[0] + lens[1])?;
                        let parse = |bytes: &[u8], n, bits| {
                            pack::unpack(bytes, n, bits).ok_or_else(|| {
                                let fault = crate::error::PeerFault::Malformed("padding bits set");
                                crate::net::blame(Role::Owner, &from, fault)
                            })
                        };
                        let dg = parse(&bytes[..lens[0]], gr.len(), 64)?;
                        let tg = parse(&bytes[lens[0]..], range.len(), kt)?;
                        let got = shares.lock().unwrap_or_else(PoisonError::into_inner).remove(&number);
                        let (d2, t2) = got.ok_or_else(|| Error::Internal("scale before its squares".into()))?;
                        let (r, b) = (&signed[range.clone()], &sbit[range.clone()]);
                        let mut z = local_scale(k, width, r, b, &d2, &t2, &dg, &tg, &g.raw()[gr]);
                        z.iter_mut().zip(&rho[range]).for_each(|(z, rho)| *z = z.wrapping_sub(*rho));
                        links.gather(Role::Owner, Lane::Online, &to, pack::pack(&z, 64))
                    }),
                )?;
            }
        }
        Part::Owner { .. } => {}
    }
    Ok(Pending::ready(Masked::new(rz, Side::Mask, 64, f, x.rows)))
}

/// `D r_g + R d_g - 2^k s (t d_g) - 2^k s t r_g` for one party's shares of `D`, `t`, `d_g`, `t d_g`.
#[allow(clippy::too_many_arguments)] // the terms of one formula
fn local_scale(
    k: u32,
    width: usize,
    r: &[u64],
    s: &[u64],
    d: &[u64],
    t: &[u64],
    dg: &[u64],
    tg: &[u64],
    rg: &[u64],
) -> Vec<u64> {
    (0..r.len())
        .map(|i| {
            let j = i / width;
            let mut z = d[i].wrapping_mul(rg[j]).wrapping_add(r[i].wrapping_mul(dg[j]));
            if s[i] == 1 {
                z = z.wrapping_sub(tg[i].wrapping_add(t[i].wrapping_mul(rg[j])) << k);
            }
            z
        })
        .collect()
}
