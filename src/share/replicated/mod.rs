//! Replicated sharing over `Z_2^k`: `x = x0 + x1 + x2`, and each party lacks one component.
//!
//! | component | Owner | Client | Helper | named after |
//! |---|---|---|---|---|
//! | `x0` | lacks it | holds it | holds it | [`Pair::ClientHelper`] |
//! | `x1` | holds it | lacks it | holds it | [`Pair::OwnerHelper`] |
//! | `x2` | holds it | holds it | lacks it | [`Pair::OwnerClient`] |
//!
//! A party stores the component that the [next](Role::next) party has too and the one that the party before has too.
//! Seen from the Owner, `x1 + x2` is the `d` and `x0` the `r` of the masked form (`super::Masked`).
//!
//! Neither a sharing nor a party's summand of one can be sent, printed or looked into by accident:
//!
//! ```compile_fail
//! fn sendable<T: serde::Serialize>(_: &T) {}
//! fn send(x: &trefoil::share::Replicated) { sendable(x) }
//! ```
//! ```
//! fn sendable<T: serde::Serialize>(_: &T) {}
//! fn send(x: &trefoil::share::Replicated) { sendable(&x.facts()) }
//! ```
//! ```compile_fail
//! fn print(x: &trefoil::share::Replicated) { println!("{x}") }
//! ```
//! ```
//! fn print(x: &trefoil::share::Replicated) { println!("{}", x.facts()) }
//! ```
//! ```compile_fail
//! fn peek(x: &trefoil::share::Replicated) -> u64 { x.next[0] }
//! ```
//! ```
//! fn peek(x: &trefoil::share::Replicated) -> u64 { x.facts().len() as u64 }
//! ```
//! ```compile_fail
//! fn peek(x: &trefoil::share::Additive) -> u64 { x.v[0] }
//! ```
//! ```
//! fn peek(x: &trefoil::share::Additive) -> u64 { x.facts().len() as u64 }
//! ```

mod additive;

pub use additive::Additive;

use std::fmt;
use std::ops::Range;

use ndarray::{ArrayD, ArrayView2};

use super::{Masked, Rows, Side};
use crate::error::{Error, Result};
use crate::party::Role;
use crate::prf::Pair;
use crate::ring::{self, gemm};

/// The pair of a party and the next one. `Pair::of` would be an option that is never empty.
pub(crate) fn with_next(role: Role) -> Pair {
    match role {
        Role::Owner => Pair::OwnerClient,
        Role::Client => Pair::ClientHelper,
        Role::Helper => Pair::OwnerHelper,
    }
}

/// The pair of a party and the one before.
pub(crate) fn with_prev(role: Role) -> Pair {
    with_next(role.prev())
}

/// Number of elements of a shape; shapes come from the caller, so an overflow is an error.
pub(crate) fn elements(op: &'static str, shape: &[usize]) -> Result<usize> {
    // Axes of length zero count as one here, so that no product of some of the axes overflows later either.
    let all = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d.max(1)));
    let all = all.ok_or_else(|| {
        let (lhs, rhs) = (format!("{shape:?}"), "the memory of this machine".into());
        Error::Shape { op, lhs, rhs }
    })?;
    Ok(if shape.contains(&0) { 0 } else { all })
}

/// Refuses a ring or a word width that does not exist.
pub(crate) fn check_width(op: &'static str, k: u32) -> Result<()> {
    if (1..=64).contains(&k) {
        return Ok(());
    }
    Err(Error::Shape { op, lhs: format!("{k} bits"), rhs: "1 to 64 bits".into() })
}

/// One party's part of values shared in three components: ring width `k`, `f` fraction bits, any shape (row-major).
///
/// Printing shows the public facts only; there is no serialisation.
#[derive(Clone)]
pub struct Replicated {
    role: Role,
    next: Vec<u64>,
    prev: Vec<u64>,
    k: u32,
    f: u32,
    shape: Vec<usize>,
}

impl fmt::Debug for Replicated {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.facts())
    }
}

impl Replicated {
    /// From the component shared with the next party and the one shared with the party before. The callers have checked
    /// `k` and counted the elements.
    pub(crate) fn new(role: Role, mut next: Vec<u64>, mut prev: Vec<u64>, k: u32, f: u32, shape: Vec<usize>) -> Self {
        let n: usize = shape.iter().product();
        assert!(next.len() == n && prev.len() == n, "a sharing has as many elements as its shape");
        let m = ring::mask(k);
        if k < 64 {
            next.iter_mut().chain(&mut prev).for_each(|w| *w &= m);
        }
        Replicated { role, next, prev, k, f, shape }
    }

    /// From what this party holds of each component, by the pair that holds it.
    pub(crate) fn from_pairs(
        role: Role,
        k: u32,
        f: u32,
        shape: Vec<usize>,
        mut component: impl FnMut(Pair) -> Result<Vec<u64>>,
    ) -> Result<Self> {
        let (next, prev) = (component(with_next(role))?, component(with_prev(role))?);
        Ok(Replicated::new(role, next, prev, k, f, shape))
    }

    /// The component shared with the next party.
    pub(crate) fn next(&self) -> &[u64] {
        &self.next
    }

    /// The component shared with the party before.
    pub(crate) fn prev(&self) -> &[u64] {
        &self.prev
    }

    /// The component of a pair, if this party holds it.
    pub(crate) fn of(&self, pair: Pair) -> Option<&[u64]> {
        if pair == with_next(self.role) {
            Some(&self.next)
        } else if pair == with_prev(self.role) {
            Some(&self.prev)
        } else {
            None
        }
    }

    /// Whose part this is.
    #[must_use]
    pub fn role(&self) -> Role {
        self.role
    }

    /// Ring width in bits.
    #[must_use]
    pub fn k(&self) -> u32 {
        self.k
    }

    /// Fraction bits.
    #[must_use]
    pub fn f(&self) -> u32 {
        self.f
    }

    /// Shape.
    #[must_use]
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.next.len()
    }

    /// Whether there is no element.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.next.is_empty()
    }

    /// Shape, ring and fraction bits, for errors.
    #[must_use]
    pub fn facts(&self) -> String {
        format!("{:?} in Z_2^{} with {} fraction bits", self.shape, self.k, self.f)
    }

    fn mismatch(&self, op: &'static str, rhs: String) -> Error {
        Error::Shape { op, lhs: self.facts(), rhs }
    }

    /// A public linear map of the elements: each component is mapped for itself.
    fn map(&self, f: u32, shape: Vec<usize>, map: impl Fn(&[u64]) -> Vec<u64>) -> Replicated {
        Replicated::new(self.role, map(&self.next), map(&self.prev), self.k, f, shape)
    }

    fn zip(&self, op: &'static str, o: &Replicated, g: impl Fn(u64, u64) -> u64) -> Result<Replicated> {
        if self.shape != o.shape || self.k != o.k || self.f != o.f || self.role != o.role {
            return Err(self.mismatch(op, o.facts()));
        }
        let both = |a: &[u64], b: &[u64]| a.iter().zip(b).map(|(a, b)| g(*a, *b)).collect();
        let (next, prev) = (both(&self.next, &o.next), both(&self.prev, &o.prev));
        Ok(Replicated::new(self.role, next, prev, self.k, self.f, self.shape.clone()))
    }

    /// Sum.
    ///
    /// # Errors
    /// [`Error::Shape`] for different shapes, rings or fraction bits.
    pub fn add(&self, o: &Replicated) -> Result<Replicated> {
        self.zip("add", o, u64::wrapping_add)
    }

    /// Difference.
    ///
    /// # Errors
    /// [`Error::Shape`] for different shapes, rings or fraction bits.
    pub fn sub(&self, o: &Replicated) -> Result<Replicated> {
        self.zip("sub", o, u64::wrapping_sub)
    }

    /// The negative.
    #[must_use]
    pub fn neg(&self) -> Replicated {
        self.scale(u64::MAX)
    }

    /// Times a public integer.
    #[must_use]
    pub fn scale(&self, c: u64) -> Replicated {
        self.map(self.f, self.shape.clone(), |v| v.iter().map(|w| w.wrapping_mul(c)).collect())
    }

    /// Plus public ring elements of the same shape: they go into the component of Owner and Client, so that they reach
    /// the `d` of the masked form and leave its mask alone.
    ///
    /// # Errors
    /// [`Error::Shape`] for another shape.
    pub fn add_public(&self, c: &ArrayD<u64>) -> Result<Replicated> {
        if c.shape() != self.shape {
            return Err(self.mismatch("add public", format!("{:?}", c.shape())));
        }
        let mut out = self.clone();
        let m = ring::mask(self.k);
        if let Some(component) = out.of_mut(Pair::OwnerClient) {
            component.iter_mut().zip(c).for_each(|(w, c)| *w = w.wrapping_add(*c) & m);
        }
        Ok(out)
    }

    fn of_mut(&mut self, pair: Pair) -> Option<&mut [u64]> {
        if pair == with_next(self.role) {
            Some(&mut self.next)
        } else if pair == with_prev(self.role) {
            Some(&mut self.prev)
        } else {
            None
        }
    }

    /// `x w` for a public matrix `w` with `f` fraction bits: `t x n` times `n x m`.
    ///
    /// # Errors
    /// [`Error::Shape`] if they do not go together.
    pub fn matmul_public(&self, w: ArrayView2<'_, u64>, f: u32) -> Result<Replicated> {
        let (n, m) = w.dim();
        let t = match *self.shape {
            [t, inner] if inner == n => t,
            _ => return Err(self.mismatch("public matmul", format!("{n} x {m}"))),
        };
        elements("public matmul", &[t, m])?;
        let w: Vec<u64> = w.t().iter().copied().collect();
        Ok(self.map(self.f + f, vec![t, m], |v| {
            let mut out = vec![0; t * m];
            gemm::ring(v, &w, t, m, n, &mut out);
            out
        }))
    }

    /// The same elements in another shape.
    ///
    /// # Errors
    /// [`Error::Shape`] if the number of elements differs.
    pub fn reshape(mut self, shape: &[usize]) -> Result<Replicated> {
        if elements("reshape", shape)? != self.len() {
            return Err(self.mismatch("reshape", format!("{shape:?}")));
        }
        self.shape = shape.to_vec();
        Ok(self)
    }

    /// Elements before, along and after an axis.
    fn axis(&self, op: &'static str, axis: usize) -> Result<(usize, usize, usize)> {
        match self.shape.get(axis) {
            Some(&n) => Ok((self.shape[..axis].iter().product(), n, self.shape[axis + 1..].iter().product())),
            None => Err(self.mismatch(op, format!("axis {axis}"))),
        }
    }

    /// The part with the given indices along an axis.
    ///
    /// # Errors
    /// [`Error::Shape`] if there is no such axis or index.
    pub fn slice(&self, axis: usize, range: Range<usize>) -> Result<Replicated> {
        let (_, n, inner) = self.axis("slice", axis)?;
        if range.start > range.end || range.end > n {
            return Err(self.mismatch("slice", format!("{range:?} along axis {axis}")));
        }
        let mut shape = self.shape.clone();
        shape[axis] = range.len();
        let block = (n * inner).max(1);
        Ok(self.map(self.f, shape, |v| {
            v.chunks(block).flat_map(|b| &b[range.start * inner..range.end * inner]).copied().collect()
        }))
    }

    /// The sum along an axis, which disappears.
    ///
    /// # Errors
    /// [`Error::Shape`] if there is no such axis.
    pub fn sum_axis(&self, axis: usize) -> Result<Replicated> {
        let (outer, n, inner) = self.axis("sum", axis)?;
        let mut shape = self.shape.clone();
        shape.remove(axis);
        Ok(self.map(self.f, shape, |v| {
            let mut out = vec![0u64; outer * inner];
            for (i, row) in v.chunks(inner.max(1)).enumerate() {
                let at = i / n * inner;
                out[at..at + inner].iter_mut().zip(row).for_each(|(o, w)| *o = o.wrapping_add(*w));
            }
            out
        }))
    }

    /// The transpose of a matrix.
    ///
    /// # Errors
    /// [`Error::Shape`] for anything but two axes.
    pub fn transpose(&self) -> Result<Replicated> {
        let [t, n] = *self.shape else {
            return Err(self.mismatch("transpose", "a matrix".into()));
        };
        Ok(self.map(self.f, vec![n, t], |v| transpose(v, t, n)))
    }

    /// Forgets the top of the ring: only for values known to fit. Widening needs a protocol, never this.
    ///
    /// # Errors
    /// [`Error::Shape`] if `k` is wider than the ring.
    pub fn narrow(self, k: u32) -> Result<Replicated> {
        if k == 0 || k > self.k {
            return Err(self.mismatch("narrow", format!("Z_2^{k}")));
        }
        Ok(Replicated::new(self.role, self.next, self.prev, k, self.f, self.shape))
    }

    /// Reads the elements as having `f` fraction bits (multiplication by a power of two, for free).
    #[must_use]
    pub fn with_f(self, f: u32) -> Replicated {
        Replicated { f, ..self }
    }

    /// The masked view, without a message: the Owner adds its two components to `d`, the others take the one that the
    /// Owner lacks as `r`.
    ///
    /// # Errors
    /// [`Error::Shape`] if `rows` has another number of elements.
    pub fn to_masked(&self, rows: Rows) -> Result<Masked> {
        if rows.len() != self.len() {
            return Err(self.mismatch("masked view", format!("{} elements", rows.len())));
        }
        let (v, side) = match self.of(Pair::ClientHelper) {
            Some(r) => (r.to_vec(), Side::Mask),
            None => (self.next.iter().zip(&self.prev).map(|(a, b)| a.wrapping_add(*b)).collect(), Side::Value),
        };
        Ok(Masked::new(v, side, self.k, self.f, rows))
    }
}

fn transpose(v: &[u64], rows: usize, columns: usize) -> Vec<u64> {
    let mut out = vec![0; v.len()];
    for (i, row) in v.chunks(columns.max(1)).enumerate() {
        for (j, w) in row.iter().enumerate() {
            out[j * rows + i] = *w;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use ndarray::{Array2, IxDyn};
    use proptest::prelude::*;

    use super::*;

    /// Three parties' parts of `x` with the given components `x0`, `x1`.
    fn share(x: &[u64], masks: &[(u64, u64)], k: u32, shape: &[usize]) -> [Replicated; 3] {
        Role::ALL.map(|role| {
            let component = |pair| {
                let word = |(x, (a, b)): (&u64, &(u64, u64))| match pair {
                    Pair::ClientHelper => *a,
                    Pair::OwnerHelper => *b,
                    Pair::OwnerClient => x.wrapping_sub(*a).wrapping_sub(*b),
                };
                Ok(x.iter().zip(masks).map(word).collect())
            };
            Replicated::from_pairs(role, k, 3, shape.to_vec(), component).unwrap()
        })
    }

    fn reveal(x: &[Replicated; 3]) -> Vec<u64> {
        for role in Role::ALL {
            assert_eq!(x[role.index()].next(), x[role.next().index()].prev(), "both holders agree");
        }
        let m = ring::mask(x[0].k());
        let sum = |i: usize| x.iter().fold(0u64, |s, p| s.wrapping_add(p.next()[i])) & m;
        (0..x[0].len()).map(sum).collect()
    }

    fn each(x: &[Replicated; 3], f: impl Fn(&Replicated) -> Replicated) -> Vec<u64> {
        reveal(&[f(&x[0]), f(&x[1]), f(&x[2])])
    }

    fn summed(x: &[Replicated; 3], y: &[Replicated; 3], f: impl Fn(&Replicated, &Replicated) -> Additive) -> Vec<u64> {
        let parts: Vec<Vec<u64>> = x.iter().zip(y).map(|(x, y)| f(x, y).into_parts().0).collect();
        let m = ring::mask(x[0].k());
        (0..parts[0].len()).map(|i| parts.iter().fold(0u64, |s, p| s.wrapping_add(p[i])) & m).collect()
    }

    type Inputs = (u32, Vec<u64>, Vec<u64>, Vec<(u64, u64)>);

    fn input() -> impl Strategy<Value = Inputs> {
        let words = || prop::collection::vec(any::<u64>(), 24);
        (1u32..=64, words(), words(), prop::collection::vec(any::<(u64, u64)>(), 24))
    }

    proptest! {
        #[test]
        fn local_linear_maps((k, x, y, masks) in input(), c in any::<u64>()) {
            let m = ring::mask(k);
            let (sx, sy) = (share(&x, &masks, k, &[2, 3, 4]), share(&y, &masks, k, &[2, 3, 4]));
            let both = |g: fn(u64, u64) -> u64| -> Vec<u64> { x.iter().zip(&y).map(|(a, b)| g(*a, *b) & m).collect() };
            let added: Vec<_> = (0..3).map(|i| sx[i].add(&sy[i]).unwrap()).collect();
            prop_assert_eq!(reveal(&added.try_into().unwrap()), both(u64::wrapping_add));
            let less: Vec<_> = (0..3).map(|i| sx[i].sub(&sy[i]).unwrap()).collect();
            prop_assert_eq!(reveal(&less.try_into().unwrap()), both(u64::wrapping_sub));
            let want: Vec<u64> = x.iter().map(|v| v.wrapping_neg() & m).collect();
            prop_assert_eq!(each(&sx, Replicated::neg), want);
            let want: Vec<u64> = x.iter().map(|v| v.wrapping_mul(c) & m).collect();
            prop_assert_eq!(each(&sx, |p| p.scale(c)), want);
            let public = ArrayD::from_shape_vec(IxDyn(&[2, 3, 4]), y.clone()).unwrap();
            prop_assert_eq!(each(&sx, |p| p.add_public(&public).unwrap()), both(u64::wrapping_add));

            let plain = ArrayD::from_shape_vec(IxDyn(&[2, 3, 4]), x.clone()).unwrap();
            for axis in 0..3 {
                let want: Vec<u64> = plain
                    .fold_axis(ndarray::Axis(axis), 0u64, |a, b| a.wrapping_add(*b)).iter().map(|v| v & m).collect();
                prop_assert_eq!(each(&sx, |p| p.sum_axis(axis).unwrap()), want);
                let part = plain.slice_axis(ndarray::Axis(axis), (1..2).into());
                let want: Vec<u64> = part.iter().map(|v| v & m).collect();
                prop_assert_eq!(each(&sx, |p| p.slice(axis, 1..2).unwrap()), want);
            }
            let matrix = ArrayView2::from_shape((4, 6), &y).unwrap();
            let rows = ArrayView2::from_shape((6, 4), &x).unwrap();
            let got = each(&sx, |p| p.clone().reshape(&[6, 4]).unwrap().matmul_public(matrix, 2).unwrap());
            prop_assert_eq!(got, product(rows, matrix, m));
            let want: Vec<u64> = rows.t().iter().map(|v| v & m).collect();
            prop_assert_eq!(each(&sx, |p| p.clone().reshape(&[6, 4]).unwrap().transpose().unwrap()), want);
            let low = k.min(7);
            let want: Vec<u64> = x.iter().map(|v| v & ring::mask(low)).collect();
            prop_assert_eq!(each(&sx, |p| p.clone().narrow(low).unwrap()), want);
        }

        #[test]
        fn local_products_sum_to_the_product((k, x, y, masks) in input()) {
            let m = ring::mask(k);
            let others: Vec<(u64, u64)> = masks.iter().rev().copied().collect();
            let (sx, sy) = (share(&x, &masks, k, &[24]), share(&y, &others, k, &[24]));
            let want: Vec<u64> = x.iter().zip(&y).map(|(a, b)| a.wrapping_mul(*b) & m).collect();
            prop_assert_eq!(summed(&sx, &sy, |x, y| x.local_mul(y).unwrap()), want.clone());
            let dot = vec![want.iter().fold(0u64, |a, b| a.wrapping_add(*b)) & m];
            prop_assert_eq!(summed(&sx, &sy, |x, y| x.local_dot(y).unwrap()), dot);
            let (a, b) = (ArrayView2::from_shape((3, 8), &x).unwrap(), ArrayView2::from_shape((8, 3), &y).unwrap());
            let got = summed(&sx, &sy, |x, y| {
                let x = x.clone().reshape(&[3, 8]).unwrap();
                x.local_matmul(&y.clone().reshape(&[8, 3]).unwrap()).unwrap()
            });
            prop_assert_eq!(got, product(a, b, m));
        }

        #[test]
        fn the_masked_view((k, x, _, masks) in input()) {
            let sx = share(&x, &masks, k, &[24]);
            let [d, r, same] = sx.map(|p| p.to_masked(Rows::even(2, 12)).unwrap());
            prop_assert_eq!(r.raw(), same.raw());
            let want: Vec<u64> = x.iter().map(|v| v & ring::mask(k)).collect();
            prop_assert_eq!(crate::world::reveal(&[d], &r).unwrap(), want);
        }
    }

    fn product(a: ArrayView2<'_, u64>, b: ArrayView2<'_, u64>, m: u64) -> Vec<u64> {
        let z = Array2::from_shape_fn((a.nrows(), b.ncols()), |(i, j)| {
            (0..a.ncols()).fold(0u64, |s, l| s.wrapping_add(a[[i, l]].wrapping_mul(b[[l, j]]))) & m
        });
        z.iter().copied().collect()
    }

    #[test]
    fn what_does_not_go_together_is_refused() {
        let masks = [(1, 2); 6];
        let [a, other, _] = share(&[1, 2, 3, 4, 5, 6], &masks, 16, &[2, 3]);
        let [b, ..] = share(&[1, 2, 3, 4, 5, 6], &masks, 17, &[2, 3]);
        let [c, ..] = share(&[1, 2, 3, 4, 5, 6], &masks, 16, &[3, 2]);
        for bad in [a.add(&b), a.sub(&c), a.add(&other), a.add(&a.clone().with_f(4)), a.sum_axis(2), a.slice(1, 2..4)] {
            assert!(matches!(bad, Err(Error::Shape { .. })), "{bad:?}");
        }
        for bad in [a.local_mul(&b), a.local_dot(&c), a.local_matmul(&a), c.local_matmul(&b)] {
            assert!(matches!(bad, Err(Error::Shape { .. })), "{bad:?}");
        }
        assert!(a.clone().reshape(&[usize::MAX, 2]).is_err());
        assert!(a.clone().narrow(17).is_err() && a.clone().narrow(0).is_err());
        assert!(a.to_masked(Rows::even(1, 5)).is_err());
        assert!(!format!("{a:?} {:?}", a.local_mul(&a).unwrap()).contains("next"));
        assert_eq!(c.sum_axis(0).unwrap().shape(), [2]);
        assert_eq!(a.slice(1, 1..1).unwrap().shape(), [2, 0]);
    }
}
