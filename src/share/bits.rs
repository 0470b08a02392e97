//! Replicated sharing with exclusive or: `x = x0 ^ x1 ^ x2`, up to 64 bits of an element packed in a word.
//!
//! Who lacks which component is as in [`super::replicated`]. The bits of a word are the lanes of every operation: the
//! bits of one number in an adder, or 64 flags side by side. On the wire an element takes exactly its `width` bits.
//!
//! ```compile_fail
//! fn sendable<T: serde::Serialize>(_: &T) {}
//! fn send(x: &trefoil::share::Bits) { sendable(x) }
//! ```
//! ```
//! fn sendable<T: serde::Serialize>(_: &T) {}
//! fn send(x: &trefoil::share::Bits) { sendable(&x.facts()) }
//! ```
//! ```compile_fail
//! fn print(x: &trefoil::share::Bits) { println!("{x}") }
//! ```
//! ```
//! fn print(x: &trefoil::share::Bits) { println!("{}", x.facts()) }
//! ```
//! ```compile_fail
//! fn peek(x: &trefoil::share::Bits) -> u64 { x.next[0] }
//! ```
//! ```
//! fn peek(x: &trefoil::share::Bits) -> u64 { x.facts().len() as u64 }
//! ```

use std::fmt;

use ndarray::ArrayD;

use super::replicated::{with_next, with_prev};
use crate::error::{Error, Result};
use crate::party::Role;
use crate::prf::Pair;
use crate::ring;

/// One party's part of words of `width` shared bits, any shape (row-major).
///
/// Printing shows the public facts only; there is no serialisation.
#[derive(Clone)]
pub struct Bits {
    role: Role,
    next: Vec<u64>,
    prev: Vec<u64>,
    width: u32,
    shape: Vec<usize>,
}

impl fmt::Debug for Bits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.facts())
    }
}

impl Bits {
    /// As [`super::Replicated::new`].
    pub(crate) fn new(role: Role, mut next: Vec<u64>, mut prev: Vec<u64>, width: u32, shape: Vec<usize>) -> Self {
        let n: usize = shape.iter().product();
        assert!(next.len() == n && prev.len() == n, "a sharing has as many elements as its shape");
        let m = ring::mask(width);
        if width < 64 {
            next.iter_mut().chain(&mut prev).for_each(|w| *w &= m);
        }
        Bits { role, next, prev, width, shape }
    }

    pub(crate) fn from_words(role: Role, words: &[Word], width: u32, shape: Vec<usize>) -> Self {
        let (next, prev) = words.iter().map(|w| (w.next, w.prev)).unzip();
        Bits::new(role, next, prev, width, shape)
    }

    pub(crate) fn next(&self) -> &[u64] {
        &self.next
    }

    pub(crate) fn prev(&self) -> &[u64] {
        &self.prev
    }

    /// Both components, element by element.
    pub(crate) fn words(&self) -> impl ExactSizeIterator<Item = Word> + '_ {
        self.next.iter().zip(&self.prev).map(|(&next, &prev)| Word { next, prev })
    }

    /// Whose part this is.
    #[must_use]
    pub fn role(&self) -> Role {
        self.role
    }

    /// Bits per element.
    #[must_use]
    pub fn width(&self) -> u32 {
        self.width
    }

    /// Shape.
    #[must_use]
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Number of elements (words, not bits).
    #[must_use]
    pub fn len(&self) -> usize {
        self.next.len()
    }

    /// Whether there is no element.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.next.is_empty()
    }

    /// Shape and width, for errors.
    #[must_use]
    pub fn facts(&self) -> String {
        format!("{:?} words of {} shared bits", self.shape, self.width)
    }

    pub(crate) fn mismatch(&self, op: &'static str, rhs: String) -> Error {
        Error::Shape { op, lhs: self.facts(), rhs }
    }

    pub(crate) fn check_same(&self, op: &'static str, o: &Bits) -> Result<()> {
        if self.shape != o.shape || self.width != o.width || self.role != o.role {
            return Err(self.mismatch(op, o.facts()));
        }
        Ok(())
    }

    /// Exclusive or.
    ///
    /// # Errors
    /// [`Error::Shape`] for different shapes or widths.
    pub fn xor(&self, o: &Bits) -> Result<Bits> {
        self.check_same("xor", o)?;
        let words: Vec<Word> = self.words().zip(o.words()).map(|(a, b)| a.xor(b)).collect();
        Ok(Bits::from_words(self.role, &words, self.width, self.shape.clone()))
    }

    /// Exclusive or with public words of the same shape; they go into the component of Owner and Client.
    ///
    /// # Errors
    /// [`Error::Shape`] for another shape.
    pub fn xor_public(&self, c: &ArrayD<u64>) -> Result<Bits> {
        if c.shape() != self.shape {
            return Err(self.mismatch("xor public", format!("{:?}", c.shape())));
        }
        let mut out = self.clone();
        let m = ring::mask(self.width);
        out.component(Pair::OwnerClient).into_iter().flatten().zip(c).for_each(|(w, c)| *w ^= c & m);
        Ok(out)
    }

    /// All bits inverted.
    #[must_use]
    pub fn inverted(mut self) -> Bits {
        let m = ring::mask(self.width);
        self.component(Pair::OwnerClient).into_iter().flatten().for_each(|w| *w ^= m);
        self
    }

    fn component(&mut self, pair: Pair) -> Option<&mut Vec<u64>> {
        if pair == with_next(self.role) {
            Some(&mut self.next)
        } else if pair == with_prev(self.role) {
            Some(&mut self.prev)
        } else {
            None
        }
    }

    fn map(&self, width: u32, map: impl Fn(u64) -> u64) -> Bits {
        let each = |v: &[u64]| v.iter().map(|w| map(*w)).collect();
        Bits::new(self.role, each(&self.next), each(&self.prev), width, self.shape.clone())
    }

    /// Shifted towards the top by `n` bits, zeros below; the width grows.
    ///
    /// # Errors
    /// [`Error::Shape`] beyond 64 bits.
    pub fn shl(&self, n: u32) -> Result<Bits> {
        if n > 64 - self.width {
            return Err(self.mismatch("shift up", format!("{n} bits")));
        }
        Ok(self.map(self.width + n, |w| w << n))
    }

    /// The lowest `n` bits dropped; the width shrinks.
    ///
    /// # Errors
    /// [`Error::Shape`] if no bit would be left.
    pub fn shr(&self, n: u32) -> Result<Bits> {
        if n >= self.width {
            return Err(self.mismatch("shift down", format!("{n} bits")));
        }
        Ok(self.map(self.width - n, |w| w >> n))
    }

    /// The lowest `n` bits kept.
    ///
    /// # Errors
    /// [`Error::Shape`] if there are not as many, or for none.
    pub fn low(&self, n: u32) -> Result<Bits> {
        if n == 0 || n > self.width {
            return Err(self.mismatch("low bits", format!("{n} bits")));
        }
        Ok(self.map(n, |w| w))
    }
}

/// A party's two components of one element, for circuits that combine many of them before anything is sent.
#[derive(Clone, Copy)]
pub(crate) struct Word {
    pub(crate) next: u64,
    pub(crate) prev: u64,
}

impl Word {
    /// A map that is linear over exclusive or (shifts, selections of bits).
    pub(crate) fn map(self, f: impl Fn(u64) -> u64) -> Word {
        Word { next: f(self.next), prev: f(self.prev) }
    }

    pub(crate) fn xor(self, o: Word) -> Word {
        Word { next: self.next ^ o.next, prev: self.prev ^ o.prev }
    }

    /// This party's summand of the AND: over the three parties, each of the nine cross products once.
    pub(crate) fn and(self, o: Word) -> u64 {
        self.prev & (o.prev ^ o.next) ^ self.next & o.prev
    }
}

/// The bits at even places of `w`, side by side.
pub(crate) fn evens(w: u64) -> u64 {
    let mut w = w & 0x5555_5555_5555_5555;
    for (shift, m) in [
        (1, 0x3333_3333_3333_3333),
        (2, 0x0f0f_0f0f_0f0f_0f0f),
        (4, 0x00ff_00ff_00ff_00ff),
        (8, 0x0000_ffff_0000_ffff),
        (16, 0x0000_0000_ffff_ffff),
    ] {
        w = (w | w >> shift) & m;
    }
    w
}

#[cfg(test)]
mod tests {
    use ndarray::IxDyn;
    use proptest::prelude::*;

    use super::*;

    fn share(x: &[u64], masks: &[(u64, u64)], width: u32) -> [Bits; 3] {
        Role::ALL.map(|role| {
            let component = |pair| {
                let word = |(x, (a, b)): (&u64, &(u64, u64))| match pair {
                    Pair::ClientHelper => *a,
                    Pair::OwnerHelper => *b,
                    Pair::OwnerClient => x ^ a ^ b,
                };
                x.iter().zip(masks).map(word).collect()
            };
            Bits::new(role, component(with_next(role)), component(with_prev(role)), width, vec![x.len()])
        })
    }

    fn reveal(x: &[Bits; 3]) -> Vec<u64> {
        for role in Role::ALL {
            assert_eq!(x[role.index()].next(), x[role.next().index()].prev(), "both holders agree");
        }
        (0..x[0].len()).map(|i| x.iter().fold(0, |s, p| s ^ p.next()[i])).collect()
    }

    fn each(x: &[Bits; 3], f: impl Fn(&Bits) -> Bits) -> Vec<u64> {
        reveal(&[f(&x[0]), f(&x[1]), f(&x[2])])
    }

    proptest! {
        #[test]
        fn local_operations(
            width in 1u32..=64, n in 0u32..64, x in prop::collection::vec(any::<u64>(), 9),
            y in prop::collection::vec(any::<u64>(), 9), masks in prop::collection::vec(any::<(u64, u64)>(), 9),
        ) {
            let m = ring::mask(width);
            let plain = |f: &dyn Fn(u64, u64) -> u64| x.iter().zip(&y).map(|(a, b)| f(*a, *b)).collect::<Vec<u64>>();
            let (sx, sy) = (share(&x, &masks, width), share(&y, &masks[..], width));
            let xored: Vec<_> = sx.iter().zip(&sy).map(|(a, b)| a.xor(b).unwrap()).collect();
            prop_assert_eq!(reveal(&xored.try_into().unwrap()), plain(&|a, b| (a ^ b) & m));
            let public = ArrayD::from_shape_vec(IxDyn(&[9]), y.clone()).unwrap();
            prop_assert_eq!(each(&sx, |p| p.xor_public(&public).unwrap()), plain(&|a, b| (a ^ b) & m));
            prop_assert_eq!(each(&sx, |p| p.clone().inverted()), plain(&|a, _| !a & m));
            if n < width {
                prop_assert_eq!(each(&sx, |p| p.shr(n).unwrap()), plain(&|a, _| (a & m) >> n));
                prop_assert_eq!(each(&sx, |p| p.low(n + 1).unwrap()), plain(&|a, _| a & ring::mask(n + 1)));
            } else {
                prop_assert!(sx[0].shr(n).is_err() && sx[0].low(n + 1).is_err());
            }
            if width + n <= 64 {
                prop_assert_eq!(each(&sx, |p| p.shl(n).unwrap()), plain(&|a, _| (a & m) << n));
            } else {
                prop_assert!(sx[0].shl(n).is_err());
            }
            let and: Vec<u64> = (0..9)
                .map(|i| sx.iter().zip(&sy).fold(0, |s, (a, b)| {
                    s ^ a.words().nth(i).unwrap().and(b.words().nth(i).unwrap())
                }))
                .collect();
            prop_assert_eq!(and, plain(&|a, b| a & b & m));
        }

        #[test]
        fn even_places(w in any::<u64>()) {
            let want = (0..32).fold(0, |v, i| v | (w >> (2 * i) & 1) << i);
            prop_assert_eq!(evens(w), want);
        }
    }

    #[test]
    fn what_does_not_go_together_is_refused() {
        let [a, b, _] = share(&[1, 2], &[(3, 4); 2], 7);
        assert!(matches!(a.xor(&b), Err(Error::Shape { .. })));
        assert!(a.xor(&a.low(3).unwrap()).is_err());
        assert!(a.xor_public(&ArrayD::zeros(IxDyn(&[3]))).is_err());
        assert!(!format!("{a:?}").contains("next"));
    }
}
