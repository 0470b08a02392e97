//! The plain form of the matrix product: four rows of `w` at a time, so that each word of `x` is read once per four.

/// A weight as a ring word.
pub trait Widen: Copy {
    /// Sign-extended where the type is signed.
    fn widen(self) -> u64;
}

impl Widen for u64 {
    #[inline(always)]
    fn widen(self) -> u64 {
        self
    }
}

impl Widen for i32 {
    #[inline(always)]
    fn widen(self) -> u64 {
        self as u64
    }
}

impl Widen for i8 {
    #[inline(always)]
    fn widen(self) -> u64 {
        self as u64
    }
}

impl Widen for i16 {
    #[inline(always)]
    fn widen(self) -> u64 {
        self as u64
    }
}

/// `rows[s][j] += sum_i x[s n + i] w[j stride + i]`.
pub fn tile<W: Widen>(x: &[u64], w: &[W], stride: usize, n: usize, rows: &mut [&mut [u64]]) {
    for (x, row) in x.chunks_exact(n).zip(rows) {
        for (w, out) in w.chunks(4 * stride).zip(row.chunks_mut(4)) {
            if let [o0, o1, o2, o3] = out {
                let (w0, rest) = w.split_at(stride);
                let (w1, rest) = rest.split_at(stride);
                let (w2, w3) = rest.split_at(stride);
                let mut s = [0u64; 4];
                for ((((x, w0), w1), w2), w3) in x.iter().zip(w0).zip(w1).zip(w2).zip(w3) {
                    s[0] = s[0].wrapping_add(x.wrapping_mul(w0.widen()));
                    s[1] = s[1].wrapping_add(x.wrapping_mul(w1.widen()));
                    s[2] = s[2].wrapping_add(x.wrapping_mul(w2.widen()));
                    s[3] = s[3].wrapping_add(x.wrapping_mul(w3.widen()));
                }
                for (o, s) in [o0, o1, o2, o3].into_iter().zip(s) {
                    *o = o.wrapping_add(s);
                }
            } else {
                for (w, o) in w.chunks(stride).zip(out) {
                    let sum = x.iter().zip(w).fold(0u64, |s, (x, w)| s.wrapping_add(x.wrapping_mul(w.widen())));
                    *o = o.wrapping_add(sum);
                }
            }
        }
    }
}

/// `y += s x`.
pub fn axpy(s: u64, x: &[u64], y: &mut [u64]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y = y.wrapping_add(s.wrapping_mul(*x));
    }
}
