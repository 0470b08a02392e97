//! Local products of replicated sharings: each party computes its summand, and the three summands add up to the
//! product.

use std::fmt;

use super::{Replicated, elements, transpose};
use crate::error::{Error, Result};
use crate::ring::gemm;

/// One party's summand of values: `x` is the sum of the three parties' summands. What local products give; only
/// `protocol::replicated::reshare` makes a sharing of it again, under a fresh zero sharing.
#[derive(Clone)]
pub struct Additive {
    v: Vec<u64>,
    k: u32,
    f: u32,
    shape: Vec<usize>,
}

impl fmt::Debug for Additive {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.facts())
    }
}

impl Additive {
    pub(crate) fn new(v: Vec<u64>, k: u32, f: u32, shape: Vec<usize>) -> Self {
        Additive { v, k, f, shape }
    }

    pub(crate) fn into_parts(self) -> (Vec<u64>, u32, u32, Vec<usize>) {
        (self.v, self.k, self.f, self.shape)
    }

    /// Shape, ring and fraction bits, for errors.
    #[must_use]
    pub fn facts(&self) -> String {
        format!("summands of {:?} in Z_2^{} with {} fraction bits", self.shape, self.k, self.f)
    }

    /// Sum: several products can be reshared as one.
    ///
    /// # Errors
    /// [`Error::Shape`] for different shapes, rings or fraction bits.
    pub fn add(&self, o: &Additive) -> Result<Additive> {
        if self.shape != o.shape || self.k != o.k || self.f != o.f {
            return Err(Error::Shape { op: "add", lhs: self.facts(), rhs: o.facts() });
        }
        let v = self.v.iter().zip(&o.v).map(|(a, b)| a.wrapping_add(*b)).collect();
        Ok(Additive::new(v, self.k, self.f, self.shape.clone()))
    }
}

impl Replicated {
    /// This party's summand of any bilinear `op`: with `a` the component shared with the party before and `b` the one
    /// shared with the next, `op(a, a') + op(a, b') + op(b, a')`. Over the three parties that is each of the nine cross
    /// products once.
    fn bilinear(&self, o: &Replicated, op: impl Fn(&[u64], &[u64]) -> Vec<u64>) -> Vec<u64> {
        let sum: Vec<u64> = o.prev.iter().zip(&o.next).map(|(a, b)| a.wrapping_add(*b)).collect();
        let mut z = op(&self.prev, &sum);
        z.iter_mut().zip(op(&self.next, &o.prev)).for_each(|(z, w)| *z = z.wrapping_add(w));
        z
    }

    fn check_product(&self, op: &'static str, o: &Replicated, fits: bool) -> Result<()> {
        if !fits || self.k != o.k || self.role != o.role {
            return Err(self.mismatch(op, o.facts()));
        }
        Ok(())
    }

    /// This party's summand of `x * y`, element by element.
    ///
    /// # Errors
    /// [`Error::Shape`] for different shapes or rings.
    pub fn local_mul(&self, o: &Replicated) -> Result<Additive> {
        self.check_product("mul", o, self.shape == o.shape)?;
        let v = self.bilinear(o, |x, y| x.iter().zip(y).map(|(a, b)| a.wrapping_mul(*b)).collect());
        Ok(Additive::new(v, self.k, self.f + o.f, self.shape.clone()))
    }

    /// This party's summand of the dot products along the last axis.
    ///
    /// # Errors
    /// [`Error::Shape`] for different shapes or rings, or no axis.
    pub fn local_dot(&self, o: &Replicated) -> Result<Additive> {
        self.check_product("dot", o, self.shape == o.shape && !self.shape.is_empty())?;
        let (outer, n) = match self.shape.split_last() {
            Some((&n, outer)) => (outer.to_vec(), n),
            None => (Vec::new(), 0),
        };
        let count: usize = outer.iter().product();
        let v = self.bilinear(o, |x, y| (0..count).map(|i| gemm::dot(&x[i * n..][..n], &y[i * n..][..n])).collect());
        Ok(Additive::new(v, self.k, self.f + o.f, outer))
    }

    /// This party's summand of the matrix product `t x n` times `n x m`.
    ///
    /// # Errors
    /// [`Error::Shape`] if they do not go together.
    pub fn local_matmul(&self, o: &Replicated) -> Result<Additive> {
        let (t, n, m) = match (&*self.shape, &*o.shape) {
            (&[t, n], &[inner, m]) if n == inner => (t, n, m),
            _ => return Err(self.mismatch("matmul", o.facts())),
        };
        self.check_product("matmul", o, true)?;
        elements("matmul", &[t, m])?;
        let v = self.bilinear(o, |x, y| {
            let mut z = vec![0; t * m];
            gemm::ring(x, &transpose(y, n, m), t, m, n, &mut z);
            z
        });
        Ok(Additive::new(v, self.k, self.f + o.f, vec![t, m]))
    }
}
