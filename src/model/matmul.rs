//! `x w^T` in f32 for the float twin, both matrices row by row.
//!
//! A few rows of `x` read the weights once, in order, at the speed of memory. More of them are transposed, so that a vector
//! holds one column of several tokens; the weights are read where they lie, and sums stay in registers. An output is summed
//! in the same order whatever the number of threads.

use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis};
use rayon::prelude::*;

use crate::ring::Isa;

/// Elements of `w` from which on it is worth waking other threads.
pub(super) const LARGE: usize = 1 << 18;
/// Rows of `w` that a thread takes at a time: few, so that the others take over from a thread that the machine holds up.
const STRIP: usize = 48;
/// Columns that are multiplied at a time, so that they stay in the caches.
const DEPTH: usize = 512;

/// `x w^T`, `[rows of x, rows of w]`: what the float twin multiplies with, on the pool's threads.
///
/// # Panics
/// If the rows of `x` and `w` have different lengths.
#[must_use]
pub fn matmul_transposed(x: ArrayView2<'_, f32>, w: ArrayView2<'_, f32>) -> Array2<f32> {
    assert_eq!(x.ncols(), w.ncols(), "rows of one length");
    with(Kernel::of(Isa::current()), x, w)
}

fn with(kernel: Option<Kernel>, x: ArrayView2<'_, f32>, w: ArrayView2<'_, f32>) -> Array2<f32> {
    let (tokens, n) = x.dim();
    let mut y = Array2::zeros((tokens, w.nrows()));
    let (Some(kernel), Some(rows), true) =
        (kernel, x.as_slice(), !x.is_empty() && w.is_standard_layout() && !w.is_empty())
    else {
        strips(&w, y.view_mut(), |w, mut y| y.assign(&product(x, w)));
        return y;
    };
    let transposed = (2 * tokens > kernel.lanes).then(|| transpose(rows, n, kernel.lanes, kernel.across));
    strips(&w, y.view_mut(), |w, mut y| {
        let Some(w) = w.as_slice() else { return };
        let mut sums = vec![0f32; w.len() / n * tokens.next_multiple_of(kernel.lanes)];
        let stride = match &transposed {
            None => {
                (kernel.rows)(rows, w, n, &mut sums);
                tokens
            }
            Some(x) => {
                (kernel.tiles)(x, w, n, &mut sums);
                tokens.next_multiple_of(kernel.lanes)
            }
        };
        for (t, mut row) in y.outer_iter_mut().enumerate() {
            row.iter_mut().zip(sums[t..].iter().step_by(stride)).for_each(|(y, sum)| *y = *sum);
        }
    });
    y
}

/// Rows of `w` and the columns of `y` that belong to them, shared among the threads of the pool.
fn strips(
    w: &ArrayView2<'_, f32>,
    mut y: ArrayViewMut2<'_, f32>,
    f: impl Fn(ArrayView2<'_, f32>, ArrayViewMut2<'_, f32>) + Sync,
) {
    if w.len() < LARGE {
        return f(w.view(), y);
    }
    let parts = y.axis_chunks_iter_mut(Axis(1), STRIP).into_par_iter();
    parts.zip(w.axis_chunks_iter(Axis(0), STRIP)).for_each(|(y, w)| f(w, y));
}

/// `x w^T` by one thread, of rows in any order: also where there is no kernel of our own.
pub(super) fn product(x: ArrayView2<'_, f32>, w: ArrayView2<'_, f32>) -> Array2<f32> {
    if x.nrows() == 1 { w.dot(&x.row(0)).insert_axis(Axis(0)) } else { x.dot(&w.t()) }
}

/// Rows of `n`, filled up with zeros to whole vectors of `lanes` rows: by blocks of [`DEPTH`] columns, in groups of at most
/// `across` vectors, column by column.
fn transpose(x: &[f32], n: usize, lanes: usize, across: usize) -> Vec<f32> {
    let tokens = x.len() / n;
    let padded = tokens.next_multiple_of(lanes);
    let mut out = Vec::with_capacity(n * padded);
    for from in (0..n).step_by(DEPTH) {
        for group in (0..padded).step_by(across * lanes) {
            for column in from..n.min(from + DEPTH) {
                let tokens = group..padded.min(group + across * lanes);
                out.extend(tokens.map(|t| x.get(t * n + column).copied().unwrap_or(0.0)));
            }
        }
    }
    out
}

/// Both compute `w x^T`.
struct Kernel {
    lanes: usize,
    /// Vectors of tokens side by side in a tile; its rows of `w` are as many as leave their sums in registers.
    across: usize,
    /// Of rows of `x` as they are.
    rows: fn(x: &[f32], w: &[f32], n: usize, y: &mut [f32]),
    /// Of what [`transpose`] made of `x`; rows of `y` are whole vectors.
    tiles: fn(x: &[f32], w: &[f32], n: usize, y: &mut [f32]),
}

impl Kernel {
    fn of(isa: Isa) -> Option<Kernel> {
        #[cfg(target_arch = "x86_64")]
        match isa {
            Isa::Avx512 | Isa::Vnni | Isa::Ifma | Isa::Amx if isa.supported() => return Some(avx512::KERNEL),
            Isa::Avx2 if isa.supported() && is_x86_feature_detected!("fma") => return Some(avx2::KERNEL),
            _ => {}
        }
        let _ = isa;
        None
    }
}

#[cfg(target_arch = "x86_64")]
macro_rules! kernel {
    ($name:ident, $features:literal, $lanes:literal, $across:literal, $down:literal, $zero:ident, $set:ident, $load:ident, $fma:ident, $store:ident) => {
        #[allow(unsafe_code)]
        mod $name {
            use std::arch::x86_64::*;
            use std::ops::Range;

            use super::{DEPTH, Kernel};

            pub(super) const KERNEL: Kernel = Kernel {
                lanes: $lanes,
                across: $across,
                // SAFETY: [`Kernel::of`] gives this out only where the processor has the features.
                rows: |x, w, n, y| unsafe { rows(x, w, n, y) },
                // SAFETY: as above.
                tiles: |x, w, n, y| unsafe { tiles(x, w, n, y) },
            };

            #[target_feature(enable = $features)]
            fn rows(x: &[f32], w: &[f32], n: usize, y: &mut [f32]) {
                let (tokens, whole) = (x.len() / n, n - n % $lanes);
                for (w, y) in w.chunks(4 * n).zip(y.chunks_mut(4 * tokens)) {
                    for (t, x) in x.chunks_exact(n).enumerate() {
                        if w.len() < 4 * n {
                            for (w, y) in w.chunks_exact(n).zip(y.chunks_exact_mut(tokens)) {
                                y[t] = x.iter().zip(w).map(|(x, w)| x * w).sum();
                            }
                            continue;
                        }
                        let mut sums = [$zero(); 4];
                        for i in (0..whole).step_by($lanes) {
                            // SAFETY: i + lanes <= n, and x has n elements.
                            let v = unsafe { $load(x.as_ptr().add(i)) };
                            for (j, sum) in sums.iter_mut().enumerate() {
                                // SAFETY: w has 4 n elements.
                                *sum = $fma(unsafe { $load(w.as_ptr().add(j * n + i)) }, v, *sum);
                            }
                        }
                        for (j, sum) in sums.into_iter().enumerate() {
                            let mut lanes = [0f32; $lanes];
                            // SAFETY: as many as the vector has.
                            unsafe { $store(lanes.as_mut_ptr(), sum) };
                            let sum = lanes.iter().sum();
                            y[j * tokens + t] = (whole..n).fold(sum, |s, i| s + x[i] * w[j * n + i]);
                        }
                    }
                }
            }

            #[target_feature(enable = $features)]
            fn tiles(x: &[f32], w: &[f32], n: usize, y: &mut [f32]) {
                let padded = x.len() / n;
                for from in (0..n).step_by(DEPTH) {
                    let depth = DEPTH.min(n - from);
                    let x = &x[from * padded..][..depth * padded];
                    for (w, y) in w.chunks($down * n).zip(y.chunks_mut($down * padded)) {
                        if y.len() == $down * padded {
                            across::<$down>(x, w, n, from..from + depth, y);
                            continue;
                        }
                        for (w, y) in w.chunks(n).zip(y.chunks_mut(padded)) {
                            across::<1>(x, w, n, from..from + depth, y);
                        }
                    }
                }
            }

            /// All tokens by `D` rows of `w`.
            #[target_feature(enable = $features)]
            fn across<const D: usize>(x: &[f32], w: &[f32], n: usize, columns: Range<usize>, y: &mut [f32]) {
                let (w, depth, stride) = (&w[columns.start..], columns.len(), y.len() / D);
                for (i, x) in x.chunks(depth * $across * $lanes).enumerate() {
                    let y = &mut y[i * $across * $lanes..];
                    match x.len() / (depth * $lanes) {
                        4 => tile::<4, D>(x, w, n, y, stride),
                        3 => tile::<3, D>(x, w, n, y, stride),
                        2 => tile::<2, D>(x, w, n, y, stride),
                        _ => tile::<1, D>(x, w, n, y, stride),
                    }
                }
            }

            /// `y += w x` of `A` vectors of tokens by `D` rows of `w`, which are `n` apart as those of `y` are `stride`.
            #[target_feature(enable = $features)]
            fn tile<const A: usize, const D: usize>(x: &[f32], w: &[f32], n: usize, y: &mut [f32], stride: usize) {
                let depth = x.len() / (A * $lanes);
                let w: [&[f32]; D] = std::array::from_fn(|j| &w[j * n..][..depth]);
                let mut sums = [[$zero(); A]; D];
                for i in 0..depth {
                    // SAFETY: x has depth times A vectors.
                    let x = unsafe { x.as_ptr().add(i * A * $lanes) };
                    let mut xs = [$zero(); A];
                    for (a, v) in xs.iter_mut().enumerate() {
                        // SAFETY: as above.
                        *v = unsafe { $load(x.add(a * $lanes)) };
                    }
                    for (sums, w) in sums.iter_mut().zip(&w) {
                        // SAFETY: every row has been cut to depth.
                        let w = $set(unsafe { *w.get_unchecked(i) });
                        for (sum, x) in sums.iter_mut().zip(&xs) {
                            *sum = $fma(*x, w, *sum);
                        }
                    }
                }
                for (sums, j) in sums.iter().zip(0..) {
                    for (sum, y) in sums.iter().zip(y[j * stride..].chunks_exact_mut($lanes)) {
                        let mut lanes = [0f32; $lanes];
                        // SAFETY: as many as the vector has.
                        unsafe { $store(lanes.as_mut_ptr(), *sum) };
                        y.iter_mut().zip(lanes).for_each(|(y, sum)| *y += sum);
                    }
                }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
kernel!(
    avx512,
    "avx512f",
    16,
    4,
    6,
    _mm512_setzero_ps,
    _mm512_set1_ps,
    _mm512_loadu_ps,
    _mm512_fmadd_ps,
    _mm512_storeu_ps
);
#[cfg(target_arch = "x86_64")]
kernel!(
    avx2,
    "avx2,fma",
    8,
    2,
    6,
    _mm256_setzero_ps,
    _mm256_set1_ps,
    _mm256_loadu_ps,
    _mm256_fmadd_ps,
    _mm256_storeu_ps
);

#[cfg(test)]
mod tests {
    use super::*;

    /// Small integers, so that every order of the sums gives the same.
    fn integers(rows: usize, columns: usize, step: usize) -> Array2<f32> {
        Array2::from_shape_fn((rows, columns), |(i, j)| ((i * step + 3 * j) % 7) as f32 - 3.0)
    }

    #[test]
    fn every_kernel_and_every_remainder() {
        for isa in Isa::available() {
            // The baseline has kernels wherever we have: it is what we are measured against.
            assert!(isa < Isa::Avx512 || Kernel::of(isa).is_some());
            for tokens in [0, 1, 2, 4, 5, 8, 9, 17, 33, 65, 130] {
                for (outputs, n) in [(1, 5), (3, 16), (6, 33), (7, 513), (50, 1030), (0, 4), (2, 0), (301, 1024)] {
                    let (x, w) = (integers(tokens, n, 5), integers(outputs, n, 2));
                    let got = with(Kernel::of(isa), x.view(), w.view());
                    assert_eq!(got, x.dot(&w.t()), "{isa:?}: {tokens} by {outputs} x {n}");
                }
            }
        }
        // Rows that do not lie together.
        let (x, w) = (integers(9, 40, 5), integers(40, 30, 2));
        assert_eq!(matmul_transposed(x.view(), w.t()), x.dot(&w));
    }
}
