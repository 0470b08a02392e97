//! Matrix products over Z_2^64 (hence over every Z_2^k: reduce afterwards): activations `x` times weights `w`, both with the
//! inner dimension contiguous, added to `c`. The Owner multiplies by its plaintext weights in 8, 16 or 32 bits, the other
//! products are ring by ring. Tiles of the output run in parallel on rayon's pool from about a million multiply-adds up;
//! within a tile a block of rows of `x` meets a block of rows of `w` in registers.

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod fma;
#[cfg(target_arch = "x86_64")]
mod ifma;
#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(target_arch = "x86_64")]
mod planes;
mod portable;
#[cfg(target_arch = "x86_64")]
pub(super) mod proof;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod vnni;

#[cfg(target_arch = "x86_64")]
pub(super) use amx::permitted as tiles_permitted;

use super::Isa;
use rayon::prelude::*;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// Multiply-adds below which one thread is faster than several.
const PARALLEL_FROM: usize = 1 << 20;
/// Rows of `x` and of `w` that a tile has a multiple of: enough to pay for reading a block of `w`, few enough that their chunks stay in L2.
const GRAIN: (usize, usize) = (64, 4);
/// Words of a matrix that is made as it is needed that are there at a time, per thread.
const MADE: usize = 1 << 14;
/// The same for products of more than [`LONG`] rows.
const MADE_LONG: usize = 1 << 16;
/// Rows from which on that is more.
const LONG: usize = 64;
/// Rows by which a word is multiplied while one is made.
const MAKING: usize = 16;

/// A weight that widens to a ring word: `u64` as it is, `i8`, `i16` and `i32` sign-extended. Sealed.
pub trait Weight: Copy + Send + Sync + lanes::Lanes {}
impl Weight for u64 {}
impl Weight for i32 {}
impl Weight for i16 {}
impl Weight for i8 {}

/// A weight of at most 16 bits.
#[cfg(target_arch = "x86_64")]
trait Narrow: Weight + planes::Load + amx::Bytes {}
#[cfg(target_arch = "x86_64")]
impl<W: Weight + planes::Load + amx::Bytes> Narrow for W {}
#[cfg(target_arch = "aarch64")]
trait Narrow: Weight + neon::Bytes {}
#[cfg(target_arch = "aarch64")]
impl<W: Weight + neon::Bytes> Narrow for W {}
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
trait Narrow: Weight {}
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
impl<W: Weight> Narrow for W {}

mod lanes {
    /// What every path knows about a weight type.
    #[cfg(target_arch = "x86_64")]
    pub trait Lanes: super::portable::Widen + super::avx2::Load + super::avx512::Load {}
    #[cfg(target_arch = "x86_64")]
    impl<W: super::portable::Widen + super::avx2::Load + super::avx512::Load> Lanes for W {}
    #[cfg(target_arch = "aarch64")]
    pub trait Lanes: super::portable::Widen + super::neon::Load {}
    #[cfg(target_arch = "aarch64")]
    impl<W: super::portable::Widen + super::neon::Load> Lanes for W {}
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    pub trait Lanes: super::portable::Widen {}
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    impl<W: super::portable::Widen> Lanes for W {}
}

/// `c[s m + j] += sum_i x[s n + i] w[j n + i]` modulo 2^64: `x` is `t x n`, `w` is `m x n` (output x input), `c` is `t x m`,
/// all row-major. `t m n` multiply-adds.
///
/// # Panics
/// If a slice has not exactly the length that `t`, `m` and `n` say.
pub fn ring(x: &[u64], w: &[u64], t: usize, m: usize, n: usize, c: &mut [u64]) {
    multiply(Isa::current(), x, w, t, m, n, c);
}

/// Ring words made ready for products modulo `2^k` with a matrix that is made part by part.
pub struct Rows<'a> {
    isa: Isa,
    x: &'a [u64],
    n: usize,
    #[cfg(target_arch = "x86_64")]
    digits: Option<Digits>,
}

/// Words that are cut beforehand, as some instruction set wants them.
#[cfg(target_arch = "x86_64")]
enum Digits {
    Fma(fma::Digits),
    Vnni(vnni::Words),
    Ifma(ifma::Words),
}

#[cfg(target_arch = "x86_64")]
impl Digits {
    /// Of rows of `n` words, where cutting them pays.
    fn cut(isa: Isa, x: &[u64], n: usize, k: u32) -> Option<Digits> {
        let rows = x.len().checked_div(n)?;
        // SAFETY: the processor has what `or_portable` leaves.
        match isa.or_portable() {
            isa if isa >= Isa::Ifma && k <= ifma::WIDEST && rows >= ifma::FEWEST => {
                Some(Digits::Ifma(ifma::Words::new(x, n)))
            }
            Isa::Vnni if k <= vnni::WIDEST && rows >= vnni::FEWEST => {
                Some(Digits::Vnni(unsafe { vnni::Words::cut(x, n, k) }))
            }
            Isa::Avx512 | Isa::Vnni if k <= fma::WIDEST && rows >= fma::FEWEST => {
                Some(Digits::Fma(unsafe { fma::Digits::cut(x, n, k) }))
            }
            _ => None,
        }
    }
}

impl<'a> Rows<'a> {
    /// Rows of `n` words.
    ///
    /// # Panics
    /// If `x` is not of whole rows.
    #[must_use]
    pub fn new(k: u32, x: &'a [u64], n: usize) -> Self {
        Rows::on(Isa::current(), k, x, n)
    }

    /// [`Rows::new`] on a chosen instruction set (portable where the processor lacks it).
    ///
    /// # Panics
    /// If `x` is not of whole rows.
    #[must_use]
    pub fn on(isa: Isa, k: u32, x: &'a [u64], n: usize) -> Self {
        assert!(x.len().is_multiple_of(n.max(1)) && k >= 1, "x is t x n");
        let isa = isa.or_portable();
        Rows {
            isa,
            x,
            n,
            #[cfg(target_arch = "x86_64")]
            digits: Digits::cut(isa, x, n, k),
        }
    }

    /// `c[s m + j] += sum_i x[s n + i] w[j n + i]`, where `w` is `m x n`, row-major, and never there as a whole: `make` is asked for words
    /// from one on, as many as it is given room for, by one thread or another. Bits of `c` above `k` mean nothing. Gives the time that
    /// it took, of all threads together.
    ///
    /// # Panics
    /// If `c` has not exactly the length that the rows and `m` say.
    pub fn times(&self, m: usize, make: impl Fn(usize, &mut [u64]) + Sync, c: &mut [u64]) -> Duration {
        let n = self.n;
        let t = self.x.len() / n.max(1);
        assert_eq!(c.len(), area(t, m), "c is t x m");
        if n == 0 {
            return Duration::ZERO;
        }
        let taken = AtomicU64::new(0);
        // All rows in one tile: made once. To make a word takes as long as to multiply it by some rows.
        let grain = (t.next_multiple_of(self.grain().0), self.grain().1);
        let work = n * MAKING.div_ceil(t.max(1));
        tiles(grain, (t, m, work), c, |_, j, rows| {
            let begun = Instant::now();
            self.made(|from, out| make(j * n + from, out), rows);
            taken.fetch_add(begun.elapsed().as_nanos() as u64, Relaxed);
        });
        Duration::from_nanos(taken.into_inner())
    }

    /// All rows by rows that are made.
    fn made(&self, make: impl Fn(usize, &mut [u64]), rows: &mut [&mut [u64]]) {
        let (n, columns) = (self.n, rows[0].len());
        // Of a few rows at a time that stay in the cache; of more where a long prompt would read its own rows again for each.
        let words = if rows.len() > LONG { MADE_LONG } else { MADE };
        let apart = self.apart();
        let step = words.div_ceil(n).next_multiple_of(if apart { 16 } else { 4 }).min(columns);
        // Rows that begin a multiple of 4 KB apart would push each other out of the L1 cache.
        let stride = if apart { n.next_multiple_of(8) + 8 } else { n };
        let mut w = vec![0; step * stride + 7];
        // Registers that straddle two lines of the cache are loaded at half the speed.
        let aligned = w.as_ptr().align_offset(64).min(7);
        let w = &mut w[aligned..];
        for from in (0..columns).step_by(step) {
            let to = columns.min(from + step);
            let w = &mut w[..(to - from) * stride];
            if apart {
                w.chunks_exact_mut(stride).enumerate().for_each(|(q, row)| make((from + q) * n, &mut row[..n]));
            } else {
                make(from * n, w);
            }
            self.tile(w, stride, &mut rows.iter_mut().map(|row| &mut row[from..to]).collect::<Vec<_>>());
        }
    }

    /// What a tile has multiples of.
    fn grain(&self) -> (usize, usize) {
        #[cfg(target_arch = "x86_64")]
        match &self.digits {
            Some(Digits::Vnni(_)) => return vnni::GRAIN,
            Some(Digits::Ifma(_)) => return ifma::GRAIN,
            _ => {}
        }
        GRAIN
    }

    /// Whether the rows that are made are better some words further apart than they are long.
    fn apart(&self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return matches!(self.digits, Some(Digits::Vnni(_) | Digits::Ifma(_)));
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    /// All rows by the rows `w`, which are `stride` apart: not more than they are long, unless they are [`apart`](Self::apart).
    fn tile(&self, w: &[u64], stride: usize, rows: &mut [&mut [u64]]) {
        #[cfg(target_arch = "x86_64")]
        match &self.digits {
            // SAFETY: there are digits only where `cut` has checked that the processor has the instructions.
            Some(Digits::Fma(x)) => return unsafe { x.tile(0, w, rows) },
            // SAFETY: as above.
            Some(Digits::Vnni(x)) => return unsafe { x.tile(w, stride, rows) },
            // SAFETY: as above.
            Some(Digits::Ifma(x)) => return unsafe { x.tile(w, stride, rows) },
            None => {}
        }
        let _ = stride;
        tile(self.isa, self.x, w, (self.n, self.n), rows);
    }
}

/// [`ring`] with 16-bit signed weights, modulo `2^k`: a quarter of the memory traffic, and fewer instructions. Bits of `c`
/// above `k` mean nothing.
///
/// # Panics
/// If a slice has not exactly the length that `t`, `m` and `n` say.
pub fn weights_i16(k: u32, x: &[u64], w: &[i16], t: usize, m: usize, n: usize, c: &mut [u64]) {
    multiply_i16(Isa::current(), k, x, w, (t, m, n), c);
}

/// [`weights_i16`] with 8-bit signed weights: half the memory traffic again, and the same instructions.
///
/// # Panics
/// If a slice has not exactly the length that `t`, `m` and `n` say.
pub fn weights_i8(k: u32, x: &[u64], w: &[i8], t: usize, m: usize, n: usize, c: &mut [u64]) {
    multiply_narrow(Isa::current(), k, x, w, (t, m, n), c);
}

/// [`weights_i16`] on a chosen instruction set (portable where the processor lacks it).
///
/// # Panics
/// If a slice has not exactly the length that `t`, `m` and `n` say.
pub fn multiply_i16(isa: Isa, k: u32, x: &[u64], w: &[i16], shape: (usize, usize, usize), c: &mut [u64]) {
    multiply_narrow(isa, k, x, w, shape, c);
}

/// [`weights_i8`] on a chosen instruction set (portable where the processor lacks it).
///
/// # Panics
/// If a slice has not exactly the length that `t`, `m` and `n` say.
pub fn multiply_i8(isa: Isa, k: u32, x: &[u64], w: &[i8], shape: (usize, usize, usize), c: &mut [u64]) {
    multiply_narrow(isa, k, x, w, shape, c);
}

fn multiply_narrow<W: Narrow>(isa: Isa, k: u32, x: &[u64], w: &[W], (t, m, n): (usize, usize, usize), c: &mut [u64]) {
    #[cfg(target_arch = "x86_64")]
    if isa.or_portable() >= Isa::Amx && n > 0 && t >= amx::FEWEST {
        check(x, w, n, (t, m, n), c);
        // SAFETY: `or_portable` has checked that the processor has the instructions, and the system's permission.
        let digits = unsafe { amx::Digits::cut(x, n, k) };
        // SAFETY: as above.
        tiles(amx::GRAIN, (t, m, n), c, |s, j, rows| unsafe { digits.tile(s, &w[j * n..][..rows[0].len() * n], rows) });
        return;
    }
    // One row reads the weights once, whichever way: then the cut with fewer blocks does.
    #[cfg(target_arch = "x86_64")]
    if isa.or_portable() >= Isa::Vnni && n > 0 && t > 1 {
        check(x, w, n, (t, m, n), c);
        // SAFETY: `or_portable` has checked that the processor has the instructions.
        let digits = unsafe { vnni::ByWeights::cut(x, n, k) };
        // SAFETY: as above.
        tiles(vnni::GRAIN, (t, m, n), c, |s, j, rows| unsafe {
            digits.tile(s, &w[j * n..][..rows[0].len() * n], rows)
        });
        return;
    }
    #[cfg(target_arch = "x86_64")]
    if isa.or_portable() >= Isa::Avx512 && n > 0 {
        check(x, w, n, (t, m, n), c);
        let digits = planes::Digits::cut(x, n, k);
        // SAFETY: `or_portable` has checked that the processor has the instructions.
        tiles(GRAIN, (t, m, n), c, |s, j, rows| unsafe { digits.tile(s, &w[j * n..][..rows[0].len() * n], rows) });
        return;
    }
    #[cfg(target_arch = "aarch64")]
    if isa.or_portable() >= Isa::Neon && n > 0 {
        check(x, w, n, (t, m, n), c);
        let digits = neon::Digits::cut(x, n, k);
        // SAFETY: `or_portable` has checked that the processor has the instructions.
        tiles(GRAIN, (t, m, n), c, |s, j, rows| unsafe { digits.tile(s, &w[j * n..][..rows[0].len() * n], rows) });
        return;
    }
    let _ = k;
    multiply(isa, x, w, t, m, n, c);
}

/// [`ring`] with 32-bit signed weights.
///
/// # Panics
/// If a slice has not exactly the length that `t`, `m` and `n` say.
pub fn weights_i32(x: &[u64], w: &[i32], t: usize, m: usize, n: usize, c: &mut [u64]) {
    multiply(Isa::current(), x, w, t, m, n, c);
}

/// The product that [`ring`] and [`weights_i32`] name, on a chosen instruction set (portable where the processor lacks it):
/// the result is the same bit for bit.
///
/// # Panics
/// If a slice has not exactly the length that `t`, `m` and `n` say.
pub fn multiply<W: Weight>(isa: Isa, x: &[u64], w: &[W], t: usize, m: usize, n: usize, c: &mut [u64]) {
    strided(isa, x, w, n, (t, m, n), c);
}

/// As [`multiply`], the rows of `w` `stride` elements apart: a head's part of a cache.
///
/// # Panics
/// If a slice has not exactly the length that `t`, `m`, `n` and `stride` say; what is between the rows of `w` may be missing at its end.
pub fn strided<W: Weight>(
    isa: Isa,
    x: &[u64],
    w: &[W],
    stride: usize,
    (t, m, n): (usize, usize, usize),
    c: &mut [u64],
) {
    check(x, w, stride, (t, m, n), c);
    if n == 0 {
        return;
    }
    let isa = isa.or_portable();
    tiles(GRAIN, (t, m, n), c, |s, j, rows| {
        let x = &x[s * n..][..rows.len() * n];
        let w = &w[j * stride..][..(rows[0].len() - 1) * stride + n];
        tile(isa, x, w, (stride, n), rows);
    });
}

/// A tile of the product, on an instruction set that the processor has.
fn tile<W: Weight>(isa: Isa, x: &[u64], w: &[W], (stride, n): (usize, usize), rows: &mut [&mut [u64]]) {
    match isa {
        // SAFETY: `or_portable` has checked that the processor has the instructions.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Vnni | Isa::Ifma | Isa::Amx => unsafe { avx512::tile(x, w, stride, n, rows) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { avx2::tile(x, w, stride, n, rows) },
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => unsafe { neon::tile(x, w, stride, n, rows) },
        _ => portable::tile(x, w, stride, n, rows),
    }
}

/// `c[s m + j] += sum_i x[s n + i] w[i stride + j]`: sums of the rows of `w`, which are `m` long and `stride` apart, weighted by
/// the rows of `x`. A head's context is one.
///
/// # Panics
/// If a slice has not exactly the length that `t`, `m`, `n` and `stride` say; what is between the rows of `w` may be missing at its end.
pub fn weighted(isa: Isa, x: &[u64], w: &[u64], stride: usize, (t, m, n): (usize, usize, usize), c: &mut [u64]) {
    let whole = if n == 0 { 0 } else { area(n - 1, stride) + m };
    assert!(stride >= m && w.len() >= whole && w.len() <= area(n, stride), "w is n x m");
    assert!(x.len() == area(t, n) && c.len() == area(t, m), "x is t x n, c is t x m");
    if c.is_empty() || n == 0 {
        return;
    }
    match isa.or_portable() {
        // SAFETY: `or_portable` has checked that the processor has the instructions.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Vnni | Isa::Ifma | Isa::Amx => unsafe { avx512::weighted(x, w, stride, n, m, c) },
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => unsafe { neon::weighted(x, w, stride, n, m, c) },
        isa => {
            for (x, c) in x.chunks_exact(n).zip(c.chunks_exact_mut(m)) {
                for (&s, w) in x.iter().zip(w.chunks(stride)) {
                    match isa {
                        // SAFETY: as above.
                        #[cfg(target_arch = "x86_64")]
                        Isa::Avx2 => unsafe { avx2::axpy(s, &w[..m], c) },
                        _ => portable::axpy(s, &w[..m], c),
                    }
                }
            }
        }
    }
}

fn area(a: usize, b: usize) -> usize {
    a.checked_mul(b).expect("a matrix that fits memory")
}

fn check<W>(x: &[u64], w: &[W], stride: usize, (t, m, n): (usize, usize, usize), c: &[u64]) {
    assert_eq!(x.len(), area(t, n), "x is t x n");
    assert_eq!(c.len(), area(t, m), "c is t x m");
    let whole = if m == 0 { 0 } else { area(m - 1, stride) + n };
    assert!(stride >= n && w.len() >= whole && w.len() <= area(m, stride), "w is m x n");
}

/// Runs `run` over tiles of `c` (`t x m`), in parallel if `t m n` multiply-adds are worth it: it gets the tile's first row and
/// column, multiples of the two of `grain`, and its rows.
fn tiles(
    grain: (usize, usize),
    (t, m, n): (usize, usize, usize),
    c: &mut [u64],
    run: impl Fn(usize, usize, &mut [&mut [u64]]) + Sync,
) {
    if c.is_empty() {
        return;
    }
    let threads = if area(t, m).saturating_mul(n) < PARALLEL_FROM { 1 } else { rayon::current_num_threads() };
    if threads == 1 {
        let mut rows: Vec<&mut [u64]> = c.chunks_mut(m).collect();
        return run(0, 0, &mut rows);
    }
    let rows = t.min(grain.0);
    let column_tiles = (4 * threads).div_ceil(t.div_ceil(rows));
    let columns = m.div_ceil(column_tiles).max(16).next_multiple_of(grain.1);
    // Cut c into tiles; each is a list of row pieces, so that threads get disjoint `&mut` without raw pointers.
    let tiles_across = m.div_ceil(columns);
    let mut tiles: Vec<Vec<&mut [u64]>> = Vec::new();
    for band in c.chunks_mut(rows * m) {
        let first = tiles.len();
        tiles.resize_with(first + tiles_across, Vec::new);
        for row in band.chunks_mut(m) {
            for (tile, piece) in tiles[first..].iter_mut().zip(row.chunks_mut(columns)) {
                tile.push(piece);
            }
        }
    }
    let run = |(at, mut tile): (usize, Vec<&mut [u64]>)| {
        run(at / tiles_across * rows, at % tiles_across * columns, &mut tile);
    };
    if tiles.len() == 1 {
        tiles.into_iter().enumerate().for_each(run);
    } else {
        tiles.into_par_iter().enumerate().for_each(run);
    }
}

/// `sum_i a[i] b[i]` modulo 2^64.
///
/// # Panics
/// If the lengths differ.
#[must_use]
pub fn dot(a: &[u64], b: &[u64]) -> u64 {
    assert_eq!(a.len(), b.len(), "a dot product of equal lengths");
    // Most are of a handful of words.
    if a.len() < 32 {
        return a.iter().zip(b).fold(0, |sum, (a, b)| sum.wrapping_add(a.wrapping_mul(*b)));
    }
    let mut sum = [0];
    multiply(Isa::current(), a, b, 1, 1, a.len(), &mut sum);
    sum[0]
}
