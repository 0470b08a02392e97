//! Lift from `Z_2^k` to a wider `Z_2^m`: a two-row lookup of the wrap bit.
//!
//! | | Owner | Client | Helper |
//! |---|---|---|---|
//! | has | `D = d + 2^(k-2)`, `t = top(D)`; `pick = PRF(O,C)` | `r`, `r_w`, `pad`, `pick` | `r`, `r_w`, `pad` |
//! | ahead | | `pad xor row[0] xor pick (row[0] xor row[1])` | |
//! | online | sends `pick xor t` | | `pad xor query (row[0] xor row[1])` |
//!
//! `row[t] = (t or top(r)) - r_w` modulo `2^(m-k)`. With `|x| < 2^(k-2)`, `D + r` wraps exactly when one of the two top
//! bits is set, so `x = D - 2^(k-2) + r - 2^k wrap`. Cost: 2 messages; 1 bit up, `m - k` bits back and as many ahead.
//! Private: as [`super::lookup`]. Exact for `-2^(k-2) <= x < 2^(k-2)`. Source: SiRNN (2021) §3.2 for the comparison-free
//! wrap of a bounded value, here by a lookup.

use std::sync::Arc;

use super::Pending;
use crate::error::{Error, Result};
use crate::net::Lane;
use crate::par;
use crate::party::Role;
use crate::plan::cost::Cost;
use crate::prf::Pair;
use crate::ring::{self, pack};
use crate::session::{Received, Scope, Session};
use crate::share::{Masked, Side};

/// What it costs for `n` elements.
#[must_use]
pub fn cost(n: usize, k: u32, m: u32) -> Cost {
    Cost::exchange(n, n, m - k)
}

/// `x` in the wider ring `m`.
///
/// # Errors
/// [`Error::Shape`] if `m` is narrower or the ring has fewer than 3 bits; [`Error::Peer`], [`Error::Reuse`].
pub fn lift(s: &mut Session, scope: &Scope, x: &Masked, m: u32) -> Result<Pending<'static, Masked>> {
    let k = x.k();
    if m < k || m > 64 || k < 3 {
        return Err(Error::Shape { op: "lift", lhs: x.facts(), rhs: format!("Z_2^{m}") });
    }
    if m == k {
        return Ok(Pending::ready(x.clone()));
    }
    match s.role() {
        Role::Owner => online(s, scope, x, m),
        Role::Client | Role::Helper => masks(s, scope, x, m).map(Pending::ready),
    }
}

fn masks(s: &mut Session, scope: &Scope, x: &Masked, m: u32) -> Result<Masked> {
    let (k, gap, rows) = (x.k(), m - x.k(), x.rows());
    let rw = s.words(Pair::ClientHelper, scope, "lift.rw", rows, gap)?;
    let pad = s.words(Pair::ClientHelper, scope, "lift.pad", rows, gap)?;
    let g = ring::mask(gap);
    let row = |i: usize, t: u64| (t | x.raw()[i] >> (k - 1)).wrapping_sub(rw[i]) & g;
    if s.role() == Role::Client {
        let pick = s.words(Pair::OwnerClient, scope, "lift.pick", rows, 1)?;
        let reply: Vec<u64> = (0..rows.len())
            .map(|i| pad[i] ^ row(i, 0) ^ if pick[i] == 1 { row(i, 0) ^ row(i, 1) } else { 0 })
            .collect();
        s.send_ahead(scope, "lift.client", rows, 1, gap, &reply)?;
    } else {
        let both: Arc<Vec<(u64, u64)>> = Arc::new((0..rows.len()).map(|i| (pad[i], row(i, 0) ^ row(i, 1))).collect());
        for (i, pass) in s.passes().iter().enumerate() {
            let (range, both) = (rows.range(&pass.tokens), Arc::clone(&both));
            let (from, to) = (scope.address(pass.number, "lift.query"), scope.address(pass.number, "lift.helper"));
            s.leave(
                i,
                Box::new(move |links| {
                    let q = Received::recv(links, Role::Owner, Lane::Online, &from, range.len(), 1)?;
                    let reply = par::in_blocks(
                        range.len(),
                        1,
                        |n| pack::packed_len(n, gap),
                        |b| {
                            let both = &both[range.start + b.start..range.start + b.end];
                            let reply = both.iter().zip(q.block(b));
                            let reply: Vec<u64> =
                                reply.map(|(&(pad, both), q)| pad ^ if q == 1 { both } else { 0 }).collect();
                            pack::packed(&reply, gap)
                        },
                    );
                    links.gather(Role::Owner, Lane::Online, &to, reply)
                }),
            )?;
        }
    }
    let v = x.raw().iter().zip(&rw).map(|(r, w)| r.wrapping_sub(w << k)).collect();
    Ok(Masked::new(v, Side::Mask, m, x.f(), rows.clone()))
}

fn online(s: &mut Session, scope: &Scope, x: &Masked, m: u32) -> Result<Pending<'static, Masked>> {
    let (k, gap, rows, f) = (x.k(), m - x.k(), x.rows().clone(), x.f());
    s.declare(cost(rows.len(), k, m));
    let (bias, low) = (1u64 << (k - 2), ring::mask(k));
    let d: Vec<u64> = x.raw().iter().map(|d| d.wrapping_add(bias) & low).collect();
    let mut query = s.words(Pair::OwnerClient, scope, "lift.pick", &rows, 1)?;
    query.iter_mut().zip(&d).for_each(|(q, d)| *q ^= d >> (k - 1));
    s.send_online(Role::Helper, scope, "lift.query", pack::pack(&query, 1))?;
    let scope = scope.clone();
    Ok(Pending::new(move |s| {
        let c = s.recv_packed(Role::Client, Lane::Ahead, &scope, "lift.client", rows.len(), gap)?;
        let h = s.recv_packed(Role::Helper, Lane::Online, &scope, "lift.helper", rows.len(), gap)?;
        let wide = ring::mask(m);
        let v = par::each(rows.len(), |b| {
            let gaps = c.block(b.clone()).into_iter().zip(h.block(b.clone())).map(|(c, h)| c ^ h);
            d[b].iter().zip(gaps).map(|(d, gap)| d.wrapping_sub(bias).wrapping_sub(gap << k) & wide).collect()
        });
        Ok(Masked::reduced(v, Side::Value, m, f, rows))
    }))
}
