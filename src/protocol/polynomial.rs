//! Polynomial of masked values in ONE exchange, whatever its degree.
//!
//! Expanding `prod (d_i + r_i)` gives sums of (Owner monomial) x (holders' monomial). The Owner keeps its own monomial,
//! the holders theirs; for every other pair the Owner sends a share of its factor, merged where several factors meet the
//! same holders' polynomial (`u (a + b lo)`: six shares).
//!
//! | | Owner | Client | Helper |
//! |---|---|---|---|
//! | has | cofactors `o_j`; `o1_j = PRF(O,C)` | `h_j` of the masks, `o1_j` | `h_j` |
//! | ahead | | sends `sum o1_j h_j + h - r_z + rho` | |
//! | online | sends `o2_j = o_j - o1_j` | | replies `sum o2_j h_j - rho` |
//!
//! Cost: 2 messages; `k` bits up per cofactor, `k` back, `k` ahead. Private: as [`super::product`]; each cofactor has its
//! own share stream. Exact. Source: multi-input gates of ABY2.0 (2021) in the masked setting.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{Pending, product};
use crate::error::{Error, Result};
use crate::net::Lane;
use crate::party::Role;
use crate::plan::cost::Cost;
use crate::prf::Pair;
use crate::ring::{self, pack};
use crate::session::{Scope, Session, recv_words};
use crate::share::{Masked, Side};

/// Indices of operands multiplied together.
type Monomial = Vec<usize>;

/// A sum of Owner monomials, and the holders' polynomial (monomials with coefficients) that it multiplies.
type Group = (Vec<Monomial>, Vec<(Monomial, u64)>);

/// Owner cofactors (sums of monomials) and the holders' polynomial that each multiplies.
struct Expansion {
    groups: Vec<Group>,
}

fn expand(monomials: &[Monomial]) -> Expansion {
    let mut cofactors: BTreeMap<Monomial, BTreeMap<Monomial, u64>> = BTreeMap::new();
    for m in monomials {
        for picked in 1..(1u32 << m.len()) - 1 {
            let part = |owner: bool| {
                let mut v: Monomial =
                    m.iter().enumerate().filter(|(i, _)| (picked >> i & 1 == 1) == owner).map(|(_, &x)| x).collect();
                v.sort_unstable();
                v
            };
            *cofactors.entry(part(true)).or_default().entry(part(false)).or_default() += 1;
        }
    }
    let mut merged: BTreeMap<Vec<(Monomial, u64)>, Vec<Monomial>> = BTreeMap::new();
    for (owner, holders) in cofactors {
        merged.entry(holders.into_iter().collect()).or_default().push(owner);
    }
    Expansion { groups: merged.into_iter().map(|(h, o)| (o, h)).collect() }
}

/// Number of shares that the Owner sends per element.
#[must_use]
pub fn cofactors(monomials: &[&[usize]]) -> usize {
    expand(&monomials.iter().map(|m| m.to_vec()).collect::<Vec<_>>()).groups.len()
}

/// What it costs for `n` elements and `g` cofactors.
#[must_use]
pub fn cost(n: usize, g: usize, k: u32) -> Cost {
    Cost::exchange(pack::packed_len(n * g, k) * 8, n, k)
}

fn times(values: &[&[u64]], m: &[usize], i: usize) -> u64 {
    m.iter().fold(1u64, |a, &j| a.wrapping_mul(values[j][i]))
}

/// The sum of monomials over `operands` (indices), element by element, in the narrowest ring. No message if every
/// monomial is a single operand.
///
/// # Errors
/// [`Error::Shape`] unless layouts agree and every monomial has the same total of fraction bits; [`Error::Peer`].
pub fn polynomial(
    s: &mut Session,
    scope: &Scope,
    operands: &[&Masked],
    monomials: &[&[usize]],
) -> Result<Pending<'static, Masked>> {
    let (Some(first), Some(m0)) = (operands.first(), monomials.first()) else {
        return Err(Error::Internal("an empty polynomial".into()));
    };
    let total = |m: &[usize]| m.iter().map(|&i| operands[i].f()).sum::<u32>();
    let f = total(m0);
    if let Some(m) = monomials.iter().find(|m| total(m) != f) {
        let (lhs, rhs) = (format!("a monomial of {f} fraction bits"), format!("one of {}", total(m)));
        return Err(Error::Shape { op: "polynomial", lhs, rhs });
    }
    if let Some(o) = operands.iter().find(|o| o.rows() != first.rows()) {
        return Err(Error::Shape { op: "polynomial", lhs: first.facts(), rhs: o.facts() });
    }
    let k = operands.iter().map(|o| o.k()).min().unwrap_or(64);
    let monomials: Vec<Monomial> = monomials.iter().map(|m| m.to_vec()).collect();
    let e = expand(&monomials);
    let v: Vec<&[u64]> = operands.iter().map(|o| o.raw()).collect();
    let (rows, n, g, mask) = (first.rows().clone(), first.raw().len(), e.groups.len(), ring::mask(k));
    let own = |i: usize| monomials.iter().fold(0u64, |a, m| a.wrapping_add(times(&v, m, i)));

    // A sum of operands has no cross terms: each side adds what it holds.
    if g == 0 {
        return Ok(Pending::ready(Masked::new((0..n).map(own).collect(), first.side(), k, f, rows)));
    }

    if s.is_owner() {
        s.declare(cost(n, g, k));
        let mut shares = s.words_each(Pair::OwnerClient, scope, "polynomial.o1", &rows, g, k)?;
        for (i, row) in shares.chunks_mut(g).enumerate() {
            for (share, (owner, _)) in row.iter_mut().zip(&e.groups) {
                let o = owner.iter().fold(0u64, |a, m| a.wrapping_add(times(&v, m, i)));
                *share = o.wrapping_sub(*share) & mask;
            }
        }
        s.send_online(Role::Helper, scope, "polynomial.o2", pack::pack(&shares, k))?;
        let z = (0..n).map(own).collect();
        return Ok(product::receive(scope, "polynomial.client", "polynomial.helper", z, k, f, rows));
    }

    // h_j of every element, element-major like the shares.
    let mut h = Vec::with_capacity(n * g);
    for i in 0..n {
        for (_, holders) in &e.groups {
            h.push(holders.iter().fold(0u64, |a, (m, c)| a.wrapping_add(times(&v, m, i).wrapping_mul(*c))));
        }
    }
    let rz = s.words(Pair::ClientHelper, scope, "polynomial.rz", &rows, k)?;
    let rho = s.words(Pair::ClientHelper, scope, "polynomial.rho", &rows, k)?;
    if s.role() == Role::Client {
        let o1 = s.words_each(Pair::OwnerClient, scope, "polynomial.o1", &rows, g, k)?;
        let z: Vec<u64> = (0..n)
            .map(|i| {
                let cross = ring::gemm::dot(&o1[i * g..(i + 1) * g], &h[i * g..(i + 1) * g]);
                cross.wrapping_add(own(i)).wrapping_sub(rz[i]).wrapping_add(rho[i]) & mask
            })
            .collect();
        s.send_ahead(scope, "polynomial.client", &rows, 1, k, &z)?;
    } else {
        let (h, rho) = (Arc::new(h), Arc::new(rho));
        for (i, pass) in s.passes().iter().enumerate() {
            let (range, h, rho) = (rows.range(&pass.tokens), Arc::clone(&h), Arc::clone(&rho));
            let (from, to) =
                (scope.address(pass.number, "polynomial.o2"), scope.address(pass.number, "polynomial.helper"));
            s.leave(
                i,
                Box::new(move |links| {
                    let o2 = recv_words(links, Role::Owner, Lane::Online, &from, range.len() * g, k)?;
                    let h = &h[range.start * g..range.end * g];
                    let z: Vec<u64> = o2
                        .chunks(g)
                        .zip(h.chunks(g))
                        .zip(&rho[range])
                        .map(|((o, h), rho)| ring::gemm::dot(o, h).wrapping_sub(*rho) & mask)
                        .collect();
                    links.gather(Role::Owner, Lane::Online, &to, pack::pack(&z, k))
                }),
            )?;
        }
    }
    Ok(Pending::ready(Masked::new(rz, Side::Mask, k, f, rows)))
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_fused_line_times_a_value_takes_six_shares() {
        assert_eq!(super::cofactors(&[&[0, 3], &[1, 2, 3]]), 6);
        assert_eq!(super::cofactors(&[&[0, 1]]), 2);
        assert_eq!(super::cofactors(&[&[0, 0]]), 1);
    }
}
