//! The masked view of a replicated sharing, lazily materialised, and its local linear operations.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::ring;

/// Which half of `x = d + r` a party holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The Owner's `d`.
    Value,
    /// The `r` of Client and Helper.
    Mask,
}

/// How elements are laid out over tokens: token-major, `width` per token or as many as each token needs (attention).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rows {
    offsets: Arc<[usize]>,
}

impl Rows {
    /// `width` elements for each of `tokens` tokens.
    #[must_use]
    pub fn even(tokens: usize, width: usize) -> Self {
        Rows { offsets: (0..=tokens).map(|i| i * width).collect() }
    }

    /// `widths[i]` elements for token `i`.
    #[must_use]
    pub fn ragged(widths: impl IntoIterator<Item = usize>) -> Self {
        let mut offsets = vec![0];
        let mut end = 0;
        for w in widths {
            end += w;
            offsets.push(end);
        }
        Rows { offsets: offsets.into() }
    }

    /// Number of tokens.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.offsets.len() - 1
    }

    /// Number of elements.
    #[must_use]
    pub fn len(&self) -> usize {
        self.offsets[self.tokens()]
    }

    /// Whether there is no element.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Elements of a range of tokens.
    #[must_use]
    pub fn range(&self, tokens: &Range<usize>) -> Range<usize> {
        self.offsets[tokens.start]..self.offsets[tokens.end]
    }

    /// Elements of each token that has any; 0 if none has, `None` if they have different numbers.
    #[must_use]
    pub fn width(&self) -> Option<usize> {
        let mut widths = self.offsets.windows(2).map(|o| o[1] - o[0]).filter(|width| *width > 0);
        let first = widths.next().unwrap_or(0);
        widths.all(|width| width == first).then_some(first)
    }

    /// Elements of one token.
    #[must_use]
    pub fn row(&self, token: usize) -> Range<usize> {
        self.offsets[token]..self.offsets[token + 1]
    }
}

/// One party's half of masked fixed-point values: ring width `k`, `f` fraction bits, laid out over tokens.
///
/// Printing shows the public facts only; there is no serialisation.
#[derive(Clone)]
pub struct Masked {
    v: Vec<u64>,
    side: Side,
    k: u32,
    f: u32,
    rows: Rows,
}

impl fmt::Debug for Masked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.facts())
    }
}

impl Masked {
    pub(crate) fn new(mut v: Vec<u64>, side: Side, k: u32, f: u32, rows: Rows) -> Self {
        assert!((1..=64).contains(&k), "ring widths are 1 to 64");
        if k < 64 {
            let m = ring::mask(k);
            v.iter_mut().for_each(|w| *w &= m);
        }
        Masked::reduced(v, side, k, f, rows)
    }

    /// Of elements that are below `2^k` already.
    pub(crate) fn reduced(v: Vec<u64>, side: Side, k: u32, f: u32, rows: Rows) -> Self {
        assert_eq!(v.len(), rows.len(), "a masked value has as many elements as its rows");
        assert!((1..=64).contains(&k), "ring widths are 1 to 64");
        debug_assert!(v.iter().all(|w| *w <= ring::mask(k)), "elements of the ring");
        Masked { v, side, k, f, rows }
    }

    pub(crate) fn raw(&self) -> &[u64] {
        &self.v
    }

    pub(crate) fn side(&self) -> Side {
        self.side
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

    /// Layout.
    #[must_use]
    pub fn rows(&self) -> &Rows {
        &self.rows
    }

    /// Shape, ring and fraction bits, for errors.
    #[must_use]
    pub fn facts(&self) -> String {
        format!(
            "{} elements over {} tokens in Z_2^{} with {} fraction bits",
            self.v.len(),
            self.rows.tokens(),
            self.k,
            self.f
        )
    }

    fn mismatch(&self, op: &'static str, other: &Masked) -> Error {
        Error::Shape { op, lhs: self.facts(), rhs: other.facts() }
    }

    /// A public constant: the Owner holds it, the mask is zero.
    #[must_use]
    pub(crate) fn constant(v: Vec<u64>, side: Side, k: u32, f: u32, rows: Rows) -> Self {
        let v = if side == Side::Value { v } else { vec![0; v.len()] };
        Masked::new(v, side, k, f, rows)
    }

    /// Forgets the top of the ring: only for values known to fit. Widening is a lift, never this.
    ///
    /// # Errors
    /// [`Error::Shape`] if `k` is wider than the ring.
    pub fn narrow(&self, k: u32) -> Result<Masked> {
        if k > self.k || k == 0 {
            return Err(Error::Shape { op: "narrow", lhs: self.facts(), rhs: format!("Z_2^{k}") });
        }
        let m = ring::mask(k);
        let v = self.v.iter().map(|w| w & m).collect();
        Ok(Masked::reduced(v, self.side, k, self.f, self.rows.clone()))
    }

    /// Sum; the narrower ring wins.
    ///
    /// # Errors
    /// [`Error::Shape`] for different layouts or fraction bits.
    pub fn add(&self, o: &Masked) -> Result<Masked> {
        if self.rows != o.rows || self.f != o.f || self.side != o.side {
            return Err(self.mismatch("add", o));
        }
        let (k, m) = (self.k.min(o.k), ring::mask(self.k.min(o.k)));
        let v = self.v.iter().zip(&o.v).map(|(a, b)| a.wrapping_add(*b) & m).collect();
        Ok(Masked::reduced(v, self.side, k, self.f, self.rows.clone()))
    }

    /// Difference; the narrower ring wins.
    ///
    /// # Errors
    /// [`Error::Shape`] for different layouts or fraction bits.
    pub fn sub(&self, o: &Masked) -> Result<Masked> {
        if self.rows != o.rows || self.f != o.f || self.side != o.side {
            return Err(self.mismatch("sub", o));
        }
        let (k, m) = (self.k.min(o.k), ring::mask(self.k.min(o.k)));
        let v = self.v.iter().zip(&o.v).map(|(a, b)| a.wrapping_sub(*b) & m).collect();
        Ok(Masked::reduced(v, self.side, k, self.f, self.rows.clone()))
    }

    /// Adds a public ring constant to every element.
    #[must_use]
    pub fn offset(mut self, c: u64) -> Masked {
        if self.side == Side::Value {
            let m = ring::mask(self.k);
            self.v.iter_mut().for_each(|w| *w = w.wrapping_add(c) & m);
        }
        self
    }

    /// A public linear map: each side applies it to what it holds. `fn` gets all elements and returns those of `rows`.
    #[must_use]
    pub fn map(&self, f: u32, rows: Rows, map: impl FnOnce(&[u64]) -> Vec<u64>) -> Masked {
        Masked::new(map(&self.v), self.side, self.k, f, rows)
    }

    /// Columns `columns` of a value with equally many elements for each token, or none.
    ///
    /// # Errors
    /// [`Error::Shape`] for tokens of different widths, or columns that they have not.
    pub fn columns(&self, columns: Range<usize>) -> Result<Masked> {
        let Some(width) = self.rows.width().filter(|width| columns.end <= *width) else {
            let rhs = format!("columns {columns:?}");
            return Err(Error::Shape { op: "columns", lhs: self.facts(), rhs });
        };
        let mut v = Vec::with_capacity(self.v.len() / width.max(1) * columns.len());
        self.v.chunks(width.max(1)).for_each(|row| v.extend_from_slice(&row[columns.clone()]));
        let has = |t: usize| if self.rows.row(t).is_empty() { 0 } else { columns.len() };
        let rows = Rows::ragged((0..self.rows.tokens()).map(has));
        Ok(Masked::reduced(v, self.side, self.k, self.f, rows))
    }

    /// The rows of `tokens`.
    ///
    /// # Errors
    /// [`Error::Shape`] for tokens that it has not.
    pub fn tokens(&self, tokens: &Range<usize>) -> Result<Masked> {
        if tokens.start > tokens.end || tokens.end > self.rows.tokens() {
            return Err(Error::Shape { op: "tokens", lhs: self.facts(), rhs: format!("tokens {tokens:?}") });
        }
        let rows = Rows::ragged(tokens.clone().map(|t| self.rows.row(t).len()));
        Ok(Masked::reduced(self.v[self.rows.range(tokens)].to_vec(), self.side, self.k, self.f, rows))
    }

    /// Values under each other, as if their tokens had been one after the other in one value.
    ///
    /// # Errors
    /// [`Error::Shape`] for none, and for values of different rings or fractions.
    pub fn stack(parts: Vec<Masked>) -> Result<Masked> {
        let mut parts = parts.into_iter();
        let Some(mut all) = parts.next() else {
            return Err(Error::Shape { op: "stack", lhs: "nothing".into(), rhs: "a value at least".into() });
        };
        let mut widths: Vec<usize> = (0..all.rows.tokens()).map(|t| all.rows.row(t).len()).collect();
        for part in parts {
            if part.k != all.k || part.f != all.f || part.side != all.side {
                return Err(all.mismatch("stack", &part));
            }
            widths.extend((0..part.rows.tokens()).map(|t| part.rows.row(t).len()));
            all.v.extend(part.v);
        }
        all.rows = Rows::ragged(widths);
        Ok(all)
    }

    /// Values beside each other: of every token, the elements of one after those of the other.
    ///
    /// # Errors
    /// [`Error::Shape`] for none, and for values of different rings, fractions or numbers of tokens.
    pub fn beside(mut parts: Vec<Masked>) -> Result<Masked> {
        let (Some(first), 2..) = (parts.first(), parts.len()) else {
            let nothing = Error::Shape { op: "beside", lhs: "nothing".into(), rhs: "a value at least".into() };
            return parts.pop().ok_or(nothing);
        };
        let alike =
            |p: &Masked| (p.k, p.f, p.side, p.rows.tokens()) == (first.k, first.f, first.side, first.rows.tokens());
        if let Some(other) = parts.iter().find(|p| !alike(p)) {
            return Err(first.mismatch("beside", other));
        }
        let widths = (0..first.rows.tokens()).map(|t| parts.iter().map(|p| p.rows.row(t).len()).sum());
        let rows = Rows::ragged(widths);
        let mut v = Vec::with_capacity(rows.len());
        for t in 0..rows.tokens() {
            parts.iter().for_each(|p| v.extend_from_slice(&p.v[p.rows.row(t)]));
        }
        Ok(Masked::reduced(v, first.side, first.k, first.f, rows))
    }

    /// Adds `o` to the columns from `first` on of a value with equally many elements for each token, or none.
    ///
    /// # Errors
    /// [`Error::Shape`] for columns that it has not, or another ring or fraction.
    pub fn add_columns(mut self, first: usize, o: &Masked) -> Result<Masked> {
        let (Some(width), Some(added)) = (self.rows.width(), o.rows.width()) else {
            return Err(self.mismatch("add columns", o));
        };
        let fits = first.checked_add(added).is_some_and(|end| end <= width);
        let same = |t: usize| self.rows.row(t).is_empty() == o.rows.row(t).is_empty();
        let alike = self.k == o.k && self.f == o.f && self.side == o.side && self.rows.tokens() == o.rows.tokens();
        if !fits || !alike || !(0..self.rows.tokens()).all(same) {
            return Err(self.mismatch("add columns", o));
        }
        let m = ring::mask(self.k);
        for (row, more) in self.v.chunks_mut(width.max(1)).zip(o.v.chunks(added.max(1))) {
            row[first..].iter_mut().zip(more).for_each(|(a, b)| *a = a.wrapping_add(*b) & m);
        }
        Ok(self)
    }

    /// Sums groups of `n` neighbours.
    ///
    /// # Errors
    /// [`Error::Shape`] if a token's elements are not a multiple of `n`.
    pub fn sum_groups(&self, n: usize) -> Result<Masked> {
        let bad = || Error::Shape { op: "sum", lhs: self.facts(), rhs: format!("groups of {n}") };
        let tokens = self.rows.tokens();
        if n == 0 || (0..tokens).any(|t| !self.rows.row(t).len().is_multiple_of(n)) {
            return Err(bad());
        }
        let m = ring::mask(self.k);
        let v = self.v.chunks(n).map(|c| c.iter().fold(0u64, |a, b| a.wrapping_add(*b)) & m).collect();
        let rows = Rows::ragged((0..tokens).map(|t| self.rows.row(t).len() / n));
        Ok(Masked::reduced(v, self.side, self.k, self.f, rows))
    }

    /// The same elements under another layout of the same tokens.
    ///
    /// # Errors
    /// [`Error::Shape`] if the number of elements differs.
    pub fn with_rows(self, rows: Rows) -> Result<Masked> {
        if rows.len() != self.v.len() {
            return Err(Error::Shape { op: "with_rows", lhs: self.facts(), rhs: format!("{} elements", rows.len()) });
        }
        Ok(Masked { rows, ..self })
    }

    /// Reads the elements as having `f` fraction bits (multiplication by a power of two, for free).
    #[must_use]
    pub fn with_f(self, f: u32) -> Masked {
        Masked { f, ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_of_tokens_that_have_any() {
        let value =
            |v: Vec<u64>, widths: &[usize]| Masked::new(v, Side::Value, 32, 4, Rows::ragged(widths.iter().copied()));
        let x = value((0..8).collect(), &[0, 4, 0, 4]);
        let part = x.columns(1..3).unwrap();
        assert_eq!((part.raw(), part.rows()), (&[1, 2, 5, 6][..], &Rows::ragged([0, 2, 0, 2])));
        let more = value(vec![10, 20], &[0, 1, 0, 1]);
        assert_eq!(x.clone().add_columns(3, &more).unwrap().raw(), [0, 1, 2, 13, 4, 5, 6, 27]);
        assert!(x.columns(3..5).is_err(), "columns that it has not");
        assert!(value((0..7).collect(), &[3, 4]).columns(0..2).is_err(), "tokens of different widths");
        assert!(x.clone().add_columns(4, &more).is_err());
        assert!(x.add_columns(0, &value(vec![10, 20], &[1, 1, 0, 0])).is_err(), "of other tokens");
        assert_eq!(value(Vec::new(), &[0, 0]).columns(0..0).unwrap().rows().tokens(), 2);
    }
}
