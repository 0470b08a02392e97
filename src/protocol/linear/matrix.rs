//! What each party keeps of a prepared matrix: integers as narrow as they fit, a seed, or packed ring words.

use std::ops::Range;
use std::sync::Arc;

use ndarray::ArrayView2;

use crate::error::{Error, Result};
use crate::prf::{MatrixStream, PreparationSeed};
use crate::ring::{Packed, filled, gemm};

/// The Owner's integers, as narrow as they fit. Which of them is the Owner's own business.
#[derive(Clone)]
pub(crate) enum Plain {
    I8(Arc<[i8]>),
    I16(Arc<[i16]>),
    I32(Arc<[i32]>),
}

/// Runs `$do` with the integers of whatever width as `$w`.
macro_rules! each_width {
    ($plain:expr, $w:ident => $do:expr) => {
        match $plain {
            Plain::I8($w) => $do,
            Plain::I16($w) => $do,
            Plain::I32($w) => $do,
        }
    };
}

impl Plain {
    /// `n` integers, each of which `int` gives whenever it is asked; `None` if one does not fit 32 bits.
    fn narrow<I: Iterator<Item = i64>>(n: usize, ints: impl Fn() -> I) -> Option<Plain> {
        // Once over them for their range and once to store them, rather than through a copy of 8 bytes each.
        let (low, high) = ints().fold((0, 0), |(low, high), v| (v.min(low), v.max(high)));
        let fits = |least: i64, most: i64| low >= least && high <= most;
        Some(if fits(i8::MIN.into(), i8::MAX.into()) {
            Plain::I8(filled(n, |out| out.iter_mut().zip(ints()).for_each(|(o, v)| *o = v as i8)))
        } else if fits(i16::MIN.into(), i16::MAX.into()) {
            Plain::I16(filled(n, |out| out.iter_mut().zip(ints()).for_each(|(o, v)| *o = v as i16)))
        } else if fits(i32::MIN.into(), i32::MAX.into()) {
            Plain::I32(filled(n, |out| out.iter_mut().zip(ints()).for_each(|(o, v)| *o = v as i32)))
        } else {
            return None;
        })
    }

    pub(crate) fn len(&self) -> usize {
        each_width!(self, w => w.len())
    }

    /// Bytes that they take.
    fn bytes(&self) -> usize {
        each_width!(self, w => size_of_val(&w[..]))
    }

    /// Rows `rows` of a matrix with `n` columns times each of the `t` rows of `x`, modulo `2^k`.
    pub(super) fn product(&self, k: u32, x: &[u64], t: usize, rows: Range<usize>, n: usize, y: &mut [u64]) {
        let (m, some) = (rows.len(), rows.start * n..rows.end * n);
        match self {
            Plain::I8(w) => gemm::weights_i8(k, x, &w[some], t, m, n, y),
            Plain::I16(w) => gemm::weights_i16(k, x, &w[some], t, m, n, y),
            Plain::I32(w) => gemm::weights_i32(x, &w[some], t, m, n, y),
        }
    }

    /// Each row of `x` times the integers, element by element.
    pub(super) fn scale(&self, x: &[u64], y: &mut [u64]) {
        let rows = y.iter_mut().zip(x);
        each_width!(self, w => rows.zip(w.iter().cycle()).for_each(|((y, x), &w)| *y = x.wrapping_mul(w as u64)));
    }

    /// `w - a`, of the integers `range`.
    fn minus(&self, range: Range<usize>, a: &mut [u64]) {
        each_width!(self, w => a.iter_mut().zip(&w[range]).for_each(|(a, &w)| *a = (w as u64).wrapping_sub(*a)));
    }
}

#[derive(Clone)]
pub(super) enum Part {
    Owner {
        w: Plain,
        bias: Option<Arc<[f32]>>,
    },
    Client {
        seed: PreparationSeed,
    },
    Helper {
        a: Packed,
    },
    /// Nothing: for a walk that counts instead of computing.
    Shape {
        public: bool,
    },
    /// Known to all three: a public linear map, to which each side applies what it holds. Nothing is sent. The bias is the
    /// Owner's alone to add.
    Public {
        w: Plain,
        bias: Option<Arc<[f32]>>,
    },
}

/// One party's part of a prepared matrix, `outputs x inputs`, with `f` fraction bits.
#[derive(Clone)]
pub struct OwnerMatrix {
    id: u64,
    pub(super) outputs: usize,
    pub(super) inputs: usize,
    /// Only the diagonal: `y_i = w_i x_i`.
    pub(super) diagonal: bool,
    pub(super) f: u32,
    /// The Helper knows `A` modulo `2^ring` only: no product may be in a wider ring.
    pub(super) ring: u32,
    pub(super) part: Part,
}

impl std::fmt::Debug for OwnerMatrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "matrix {} of {} x {} with {} fraction bits", self.id, self.outputs, self.inputs, self.f)
    }
}

/// What multiplies masks, made part by part.
pub(super) enum Masks<'a> {
    Client(Box<MatrixStream>),
    Helper(&'a Packed),
}

impl Masks<'_> {
    /// Elements from `from` on.
    pub(super) fn read(&self, from: usize, out: &mut [u64]) {
        match self {
            Masks::Client(stream) => stream.words(from as u64, out),
            Masks::Helper(a) => a.read(from, out),
        }
    }
}

impl OwnerMatrix {
    /// The Owner's part: `w` (outputs x inputs) rounded to `f` fraction bits.
    ///
    /// # Errors
    /// [`Error::Model`] if a weight does not fit 32 bits.
    pub fn quantise(id: u64, name: &str, w: ArrayView2<'_, f32>, bias: Option<&[f32]>, f: u32) -> Result<Self> {
        let scale = f64::from(f).exp2();
        let plain = Plain::narrow(w.len(), || w.iter().map(|&v| (f64::from(v) * scale).round() as i64));
        let plain = plain.ok_or_else(|| {
            let most = 31 - i64::from(f);
            Error::Model(format!(
                "{name}: a weight beyond 2^{most} cannot be represented in 32 bits with {f} of fraction"
            ))
        })?;
        Self::owner(id, w.dim(), f, plain, bias.map(Into::into))
    }

    /// The Owner's part from its integers.
    ///
    /// # Errors
    /// [`Error::Shape`] for the wrong number of them or of biases.
    pub(crate) fn owner(
        id: u64,
        (outputs, inputs): (usize, usize),
        f: u32,
        w: Plain,
        bias: Option<Arc<[f32]>>,
    ) -> Result<Self> {
        let biases = bias.as_ref().map_or(outputs, |b| b.len());
        if w.len() != outputs * inputs || biases != outputs {
            let (lhs, rhs) = (format!("{} integers, {biases} biases", w.len()), format!("{outputs} x {inputs}"));
            return Err(Error::Shape { op: "owner weights", lhs, rhs });
        }
        Ok(Self::new(id, outputs, inputs, f, Part::Owner { w, bias }))
    }

    fn new(id: u64, outputs: usize, inputs: usize, f: u32, part: Part) -> Self {
        OwnerMatrix { id, outputs, inputs, diagonal: false, f, ring: 64, part }
    }

    /// Declares that every product with it is in a ring of at most `ring` bits, so that the Helper needs no more of `A`.
    #[must_use]
    pub fn within(self, ring: u32) -> Self {
        OwnerMatrix { ring: ring.min(self.ring), ..self }
    }

    /// The Owner's integers and biases; `None` at other parties.
    pub(crate) fn integers(&self) -> Option<(&Plain, Option<&[f32]>)> {
        match &self.part {
            Part::Owner { w, bias } | Part::Public { w, bias } => Some((w, bias.as_deref())),
            Part::Client { .. } | Part::Helper { .. } | Part::Shape { .. } => None,
        }
    }

    /// The Client's part.
    #[must_use]
    pub fn client(id: u64, outputs: usize, inputs: usize, f: u32, seed: PreparationSeed) -> Self {
        Self::new(id, outputs, inputs, f, Part::Client { seed })
    }

    /// The Helper's part, `a` as made by [`OwnerMatrix::helper_words`].
    ///
    /// # Errors
    /// [`Error::Shape`] for the wrong number of words.
    pub fn helper(id: u64, outputs: usize, inputs: usize, f: u32, a: impl AsRef<[u64]>) -> Result<Self> {
        Self::helper_packed(id, (outputs, inputs), f, Packed::new(a.as_ref(), 64))
    }

    /// The Helper's part from words that are packed already.
    ///
    /// # Errors
    /// [`Error::Shape`] for the wrong number of words.
    pub(crate) fn helper_packed(id: u64, (outputs, inputs): (usize, usize), f: u32, a: Packed) -> Result<Self> {
        if a.len() != outputs * inputs {
            let (lhs, rhs) = (format!("{a:?}"), format!("{outputs} x {inputs}"));
            return Err(Error::Shape { op: "helper weights", lhs, rhs });
        }
        let ring = a.bits();
        Ok(OwnerMatrix { ring, ..Self::new(id, outputs, inputs, f, Part::Helper { a }) })
    }

    /// A matrix without weights, for a session that counts.
    pub(crate) fn shape(id: u64, (outputs, inputs): (usize, usize), f: u32, public: bool) -> Self {
        OwnerMatrix { id, outputs, inputs, diagonal: false, f, ring: 64, part: Part::Shape { public } }
    }

    /// At the Owner: gives the matrix up as public (it is in a public checkpoint, bit for bit).
    #[must_use]
    pub fn into_public(self) -> Self {
        match self.part {
            Part::Owner { w, bias } => OwnerMatrix { part: Part::Public { w, bias }, ..self },
            _ => self,
        }
    }

    /// The Client's or Helper's copy of a public matrix, from the words that [`OwnerMatrix::helper_words`] makes of one.
    ///
    /// # Errors
    /// [`Error::Shape`] for the wrong number of words.
    pub(crate) fn public(id: u64, (outputs, inputs): (usize, usize), f: u32, words: &Packed) -> Result<Self> {
        let checked = Self::helper_packed(id, (outputs, inputs), f, words.clone())?;
        let w = filled(words.len(), |out| {
            let mut row = vec![0; inputs];
            for (i, out) in out.chunks_mut(inputs.max(1)).enumerate() {
                words.read(i * inputs, &mut row);
                out.iter_mut().zip(&row).for_each(|(o, v)| *o = *v as i32);
            }
        });
        Ok(OwnerMatrix { ring: 64, part: Part::Public { w: Plain::I32(w), bias: None }, ..checked })
    }

    /// A matrix of one row, read as the diagonal of a square one.
    ///
    /// # Errors
    /// [`Error::Shape`] for more than one row.
    pub fn into_diagonal(self) -> Result<Self> {
        if self.outputs != 1 {
            return Err(Error::Shape { op: "diagonal", lhs: format!("{self:?}"), rhs: "one row".into() });
        }
        Ok(OwnerMatrix { outputs: self.inputs, diagonal: true, ..self })
    }

    pub(super) fn words(&self) -> usize {
        if self.diagonal { self.inputs } else { self.outputs * self.inputs }
    }

    /// `A = W - B` for the Helper; of a public matrix, `W` itself.
    ///
    /// # Errors
    /// [`Error::Internal`] at another party than the Owner.
    pub fn helper_words(&self, seed: &PreparationSeed) -> Result<Vec<u64>> {
        self.helper_range(seed, 0..self.words())
    }

    /// Words `range` of [`OwnerMatrix::helper_words`].
    ///
    /// # Errors
    /// [`Error::Internal`] at another party than the Owner, or for words that are not there.
    pub fn helper_range(&self, seed: &PreparationSeed, range: Range<usize>) -> Result<Vec<u64>> {
        if range.start > range.end || range.end > self.words() {
            return Err(Error::Internal(format!("words {range:?} of {self:?}")));
        }
        let mut a = vec![0u64; range.len()];
        let w = match &self.part {
            Part::Owner { w, .. } => {
                seed.matrix_words(self.id, range.start as u64, &mut a);
                w
            }
            Part::Public { w, .. } => w,
            _ => return Err(Error::Internal("only the owner can make the helper's weights".into())),
        };
        w.minus(range, &mut a);
        Ok(a)
    }

    /// The elements of `B` at the Client, of `A` at the Helper; nothing elsewhere.
    pub(super) fn masks(&self) -> Option<Masks<'_>> {
        match &self.part {
            Part::Client { seed } => Some(Masks::Client(Box::new(seed.matrix(self.id)))),
            Part::Helper { a } => Some(Masks::Helper(a)),
            Part::Owner { .. } | Part::Public { .. } | Part::Shape { .. } => None,
        }
    }

    /// Fraction bits of its elements.
    #[must_use]
    pub fn f(&self) -> u32 {
        self.f
    }

    /// The widest ring in which it may multiply.
    pub(crate) fn ring(&self) -> u32 {
        self.ring
    }

    /// Output and input dimension.
    #[must_use]
    pub fn dim(&self) -> (usize, usize) {
        (self.outputs, self.inputs)
    }

    /// Bytes that this party's part occupies.
    #[must_use]
    pub fn bytes(&self) -> usize {
        match &self.part {
            Part::Owner { w, .. } | Part::Public { w, .. } => w.bytes(),
            Part::Client { .. } => 32,
            Part::Helper { a } => a.bytes(),
            Part::Shape { .. } => 0,
        }
    }
}
