//! Owner linear: `y = W x` with `W` known to the Owner only. No online message.
//!
//! | | Owner | Client | Helper |
//! |---|---|---|---|
//! | preparation | `W`, seed | seed: `B = PRF(O,C; seed)` | `A = W - B` |
//! | ahead | | sends `B r - r_y + rho` | sends `A r - rho` |
//! | online | `W d` + both `= y - r_y` | | |
//!
//! `r_y`, `rho` = PRF(Client, Helper), fresh. Cost: `2k` bits ahead per output, nothing online. Private: the Client's
//! message is masked by `rho`, the Helper's too, and their sum by `r_y`; the Helper's `A` is uniform because it lacks the
//! seed, the Client knows only the seed. A preparation has its own seed: two preparations of different weights under one
//! seed would show the Helper `W' - W`. Source: mask-ahead linear layers as in DELPHI (2020) and ASTRA (2019), with the
//! weight matrix shared between the two mask holders. Exact (no error) in the ring.
//!
//! A matrix that all three know ([`OwnerMatrix::public`]) is a public linear map: each side multiplies what it holds, and
//! nothing is sent.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use ndarray::ArrayView2;
use rayon::prelude::*;

use super::Pending;
use crate::error::{Error, Result};
use crate::ledger;
use crate::net::Lane;
use crate::party::Role;
use crate::plan::cost::Cost;
use crate::plan::work::Counts;
use crate::prf::{Pair, PreparationSeed};
use crate::ring::{self, filled, fixed, gemm};
use crate::session::{Scope, Session};
use crate::share::{Masked, Rows, Side};

/// The Owner's integers, as narrow as they fit. Which of the two is the Owner's own business.
#[derive(Clone)]
pub(crate) enum Plain {
    I16(Arc<[i16]>),
    I32(Arc<[i32]>),
}

impl Plain {
    pub(crate) fn len(&self) -> usize {
        match self {
            Plain::I16(w) => w.len(),
            Plain::I32(w) => w.len(),
        }
    }

    /// Modulo `2^k`.
    fn product(&self, k: u32, x: &[u64], t: usize, m: usize, n: usize, y: &mut [u64]) {
        match self {
            Plain::I16(w) => gemm::weights_i16(k, x, w, t, m, n, y),
            Plain::I32(w) => gemm::weights_i32(x, w, t, m, n, y),
        }
    }
}

#[derive(Clone)]
enum Part {
    Owner {
        w: Plain,
        bias: Option<Arc<[f32]>>,
    },
    Client {
        seed: PreparationSeed,
    },
    Helper {
        a: Arc<[u64]>,
    },
    /// Nothing: for a walk that counts instead of computing.
    Shape {
        public: bool,
    },
    /// Known to all three: a public linear map, to which each side applies what it holds. Nothing is sent.
    Public {
        w: Plain,
    },
}

/// One party's part of a prepared matrix, `outputs x inputs`, with `f` fraction bits.
#[derive(Clone)]
pub struct OwnerMatrix {
    id: u64,
    outputs: usize,
    inputs: usize,
    /// Only the diagonal: `y_i = w_i x_i`.
    diagonal: bool,
    f: u32,
    /// The Helper knows `A` modulo `2^ring` only: no product may be in a wider ring.
    ring: u32,
    part: Part,
}

impl std::fmt::Debug for OwnerMatrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "matrix {} of {} x {} with {} fraction bits", self.id, self.outputs, self.inputs, self.f)
    }
}

impl OwnerMatrix {
    /// The Owner's part: `w` (outputs x inputs) rounded to `f` fraction bits.
    ///
    /// # Errors
    /// [`Error::Model`] if a weight does not fit 32 bits.
    pub fn quantise(id: u64, name: &str, w: ArrayView2<'_, f32>, bias: Option<&[f32]>, f: u32) -> Result<Self> {
        let scale = f64::from(f).exp2();
        let int = |&v: &f32| (f64::from(v) * scale).round() as i64;
        // Twice over the weights rather than once through integers of 8 bytes.
        let all = |fits: fn(i64) -> bool| w.iter().all(|v| fits(int(v)));
        let plain = if all(|v| i16::try_from(v).is_ok()) {
            Plain::I16(filled(w.len(), |out| out.iter_mut().zip(&w).for_each(|(o, v)| *o = int(v) as i16)))
        } else if all(|v| i32::try_from(v).is_ok()) {
            Plain::I32(filled(w.len(), |out| out.iter_mut().zip(&w).for_each(|(o, v)| *o = int(v) as i32)))
        } else {
            return Err(Error::Model(format!("{name}: a weight beyond 2^{} cannot be represented", 31 - f)));
        };
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
        OwnerMatrix { ring, ..self }
    }

    /// The Owner's integers and biases; `None` at other parties.
    pub(crate) fn integers(&self) -> Option<(&Plain, Option<&[f32]>)> {
        match &self.part {
            Part::Owner { w, bias } => Some((w, bias.as_deref())),
            Part::Public { w } => Some((w, None)),
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
    pub fn helper(id: u64, outputs: usize, inputs: usize, f: u32, a: Vec<u64>) -> Result<Self> {
        if a.len() != outputs * inputs {
            let (lhs, rhs) = (format!("{} words", a.len()), format!("{outputs} x {inputs}"));
            return Err(Error::Shape { op: "helper weights", lhs, rhs });
        }
        Ok(Self::new(id, outputs, inputs, f, Part::Helper { a: a.into() }))
    }

    /// A matrix without weights, for a session that counts.
    pub(crate) fn shape(id: u64, (outputs, inputs): (usize, usize), f: u32, public: bool) -> Self {
        OwnerMatrix { id, outputs, inputs, diagonal: false, f, ring: 64, part: Part::Shape { public } }
    }

    /// At the Owner: gives the matrix up as public (it is in a public checkpoint, bit for bit).
    #[must_use]
    pub fn into_public(self) -> Self {
        match self.part {
            Part::Owner { w, bias: None } => OwnerMatrix { part: Part::Public { w }, ..self },
            _ => self,
        }
    }

    /// The Client's or Helper's copy of a public matrix, from the words that [`OwnerMatrix::helper_words`] makes of one.
    ///
    /// # Errors
    /// [`Error::Shape`] for the wrong number of words.
    pub fn public(id: u64, outputs: usize, inputs: usize, f: u32, words: Vec<u64>) -> Result<Self> {
        let w = Plain::I32(words.iter().map(|&w| w as i32).collect());
        let checked = Self::helper(id, outputs, inputs, f, words)?;
        Ok(OwnerMatrix { part: Part::Public { w }, ..checked })
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

    fn words(&self) -> usize {
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
            Part::Public { w } => w,
            _ => return Err(Error::Internal("only the owner can make the helper's weights".into())),
        };
        let minus = |a: &mut u64, w: i64| *a = (w as u64).wrapping_sub(*a);
        match w {
            Plain::I16(w) => a.iter_mut().zip(&w[range]).for_each(|(a, &w)| minus(a, w.into())),
            Plain::I32(w) => a.iter_mut().zip(&w[range]).for_each(|(a, &w)| minus(a, w.into())),
        }
        Ok(a)
    }

    /// Output and input dimension.
    #[must_use]
    pub fn dim(&self) -> (usize, usize) {
        (self.outputs, self.inputs)
    }

    /// Bytes that this party's part occupies.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let n = self.words();
        match &self.part {
            Part::Owner { w: Plain::I16(_), .. } | Part::Public { w: Plain::I16(_) } => 2 * n,
            Part::Owner { w: Plain::I32(_), .. } | Part::Public { w: Plain::I32(_) } => 4 * n,
            Part::Client { .. } => 32,
            Part::Helper { .. } => 8 * n,
            Part::Shape { .. } => 0,
        }
    }
}

/// What it costs for `n` outputs.
#[must_use]
pub fn cost(n: usize, k: u32) -> Cost {
    Cost::default().run_ahead(Role::Client, n, k).run_ahead(Role::Helper, n, k)
}

/// `y = W x (+ bias)` for every row of `w.inputs` elements; ring of `x`, fraction bits of both added.
///
/// # Errors
/// [`Error::Shape`], [`Error::Peer`], [`Error::Reuse`].
pub fn owner_linear(s: &mut Session, scope: &Scope, x: &Masked, w: &OwnerMatrix) -> Result<Masked> {
    start(s, scope, x, w)?.finish(s)
}

fn start<'a>(s: &mut Session, scope: &Scope, x: &Masked, w: &'a OwnerMatrix) -> Result<Pending<'a, Masked>> {
    s.enter(scope);
    let tokens = x.rows().tokens();
    if (0..tokens).any(|t| !x.rows().row(t).len().is_multiple_of(w.inputs)) {
        return Err(Error::Shape { op: "owner linear", lhs: x.facts(), rhs: format!("{w:?}") });
    }
    if x.k() > w.ring {
        let rhs = format!("{w:?}, shared modulo 2^{}", w.ring);
        return Err(Error::Shape { op: "owner linear", lhs: x.facts(), rhs });
    }
    let rows = Rows::ragged((0..tokens).map(|t| x.rows().row(t).len() / w.inputs * w.outputs));
    match &w.part {
        Part::Shape { public } => {
            let n = x.raw().len();
            if !s.count(scope, counts(s.role(), *public, (n / w.inputs) as u64, w)) {
                return Err(Error::Internal("a matrix without weights outside a walk that counts".into()));
            }
            match (public, s.role()) {
                (true, _) => Ok(Pending::ready(Masked::new(vec![0; rows.len()], x.side(), x.k(), x.f() + w.f, rows))),
                (false, Role::Owner) => online(s, scope, x, rows, w, None, None),
                (false, _) => masks(s, scope, x, rows, w).map(Pending::ready),
            }
        }
        Part::Owner { w: plain, bias } => online(s, scope, x, rows, w, Some(plain), bias.as_deref()),
        Part::Client { .. } | Part::Helper { .. } => masks(s, scope, x, rows, w).map(Pending::ready),
        Part::Public { w: plain } => {
            let mut y = vec![0u64; rows.len()];
            plain.product(x.k(), x.raw(), x.raw().len() / w.inputs, w.outputs, w.inputs, &mut y);
            Ok(Pending::ready(Masked::new(y, x.side(), x.k(), x.f() + w.f, rows)))
        }
    }
}

/// What `t` rows through `w` would take at a party.
fn counts(role: Role, public: bool, t: u64, w: &OwnerMatrix) -> Counts {
    let words = w.words() as u64;
    let none = Counts::default();
    let macs = if w.diagonal { 0 } else { t * words };
    match role {
        Role::Owner => Counts { weight_macs: macs, weight_bytes: 2 * words, ..none },
        _ if public => Counts { weight_macs: macs, weight_bytes: 4 * words, ..none },
        Role::Client => Counts { ring_macs: macs, prf_bytes: 8 * words, ..none },
        Role::Helper => Counts { ring_macs: macs, ring_bytes: 8 * words, ..none },
    }
}

/// `B r` or `A r`.
fn local_masks(r: &[u64], w: &OwnerMatrix) -> Vec<u64> {
    let (m, n) = (w.outputs, w.inputs);
    let t = r.len() / n;
    let mut y = vec![0u64; t * m];
    if w.diagonal {
        let own: Vec<u64> = match &w.part {
            Part::Client { seed } => {
                let mut b = vec![0u64; n];
                seed.matrix_words(w.id, 0, &mut b);
                b
            }
            Part::Helper { a } => a.to_vec(),
            Part::Owner { .. } | Part::Public { .. } | Part::Shape { .. } => Vec::new(),
        };
        y.iter_mut().zip(r).zip(own.iter().cycle()).for_each(|((y, r), w)| *y = r.wrapping_mul(*w));
        return y;
    }
    match &w.part {
        Part::Owner { .. } | Part::Public { .. } | Part::Shape { .. } => {}
        Part::Helper { a } => gemm::ring(r, a, t, m, n, &mut y),
        Part::Client { seed } => {
            // B is regenerated tile by tile and never stored: the Client keeps 32 bytes per model.
            let tile = (1usize << 16).div_ceil(n).clamp(1, m);
            let (drawing, all) = (AtomicU64::new(0), AtomicU64::new(0));
            let tiles: Vec<(usize, Vec<u64>)> = (0..m.div_ceil(tile))
                .into_par_iter()
                .map_init(Vec::new, |b: &mut Vec<u64>, i| {
                    let (from, rows) = (i * tile, tile.min(m - i * tile));
                    let begun = Instant::now();
                    b.resize(rows * n, 0);
                    seed.matrix_words(w.id, (from * n) as u64, b);
                    drawing.fetch_add(begun.elapsed().as_nanos() as u64, Relaxed);
                    let mut part = vec![0u64; t * rows];
                    gemm::ring(r, b, t, rows, n, &mut part);
                    all.fetch_add(begun.elapsed().as_nanos() as u64, Relaxed);
                    (from, part)
                })
                .collect();
            ledger::streams(drawing.into_inner() as f64 / all.into_inner().max(1) as f64);
            for (from, part) in tiles {
                let rows = part.len() / t.max(1);
                for (i, row) in part.chunks(rows.max(1)).enumerate() {
                    y[i * m + from..i * m + from + rows].copy_from_slice(row);
                }
            }
        }
    }
    y
}

fn masks(s: &mut Session, scope: &Scope, x: &Masked, rows: Rows, w: &OwnerMatrix) -> Result<Masked> {
    let k = x.k();
    let mut y = local_masks(x.raw(), w);
    let ry = s.words(Pair::ClientHelper, scope, "linear.ry", &rows, k)?;
    let rho = s.words(Pair::ClientHelper, scope, "linear.rho", &rows, k)?;
    let m = ring::mask(k);
    if s.role() == Role::Client {
        y.iter_mut().zip(ry.iter().zip(&rho)).for_each(|(y, (a, b))| *y = y.wrapping_sub(*a).wrapping_add(*b) & m);
        s.send_ahead(scope, "linear.client", &rows, 1, k, &y)?;
    } else {
        y.iter_mut().zip(&rho).for_each(|(y, b)| *y = y.wrapping_sub(*b) & m);
        s.send_ahead(scope, "linear.helper", &rows, 1, k, &y)?;
    }
    Ok(Masked::new(ry, Side::Mask, k, x.f() + w.f, rows))
}

fn online<'a>(
    s: &mut Session,
    scope: &Scope,
    x: &Masked,
    rows: Rows,
    w: &'a OwnerMatrix,
    plain: Option<&'a Plain>,
    bias: Option<&'a [f32]>,
) -> Result<Pending<'a, Masked>> {
    let (k, f, n) = (x.k(), x.f() + w.f, rows.len());
    s.declare(cost(n, k));
    let (outputs, inputs) = w.dim();
    let t = x.raw().len() / inputs;
    let mut y = vec![0u64; n];
    let each = |y: &mut [u64], w: &mut dyn Iterator<Item = i64>| {
        y.iter_mut().zip(x.raw()).zip(w).for_each(|((y, d), w)| *y = d.wrapping_mul(w as u64));
    };
    match plain {
        Some(Plain::I16(v)) if w.diagonal => each(&mut y, &mut v.iter().cycle().map(|&v| i64::from(v))),
        Some(Plain::I32(v)) if w.diagonal => each(&mut y, &mut v.iter().cycle().map(|&v| i64::from(v))),
        Some(plain) => plain.product(k, x.raw(), t, outputs, inputs, &mut y),
        None => {}
    }
    if let Some(bias) = bias {
        let bias: Vec<u64> = bias.iter().map(|&b| fixed::encode(f64::from(b), f, k)).collect();
        y.chunks_mut(outputs).for_each(|row| row.iter_mut().zip(&bias).for_each(|(y, b)| *y = y.wrapping_add(*b)));
    }
    let scope = scope.clone();
    Ok(Pending::new(move |s| {
        let c = s.recv_words(Role::Client, Lane::Ahead, &scope, "linear.client", n, k)?;
        let h = s.recv_words(Role::Helper, Lane::Ahead, &scope, "linear.helper", n, k)?;
        y.iter_mut().zip(c.iter().zip(&h)).for_each(|(y, (c, h))| *y = y.wrapping_add(*c).wrapping_add(*h));
        Ok(Masked::new(y, Side::Value, k, f, rows))
    }))
}
