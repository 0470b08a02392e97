//! Words of the rings Z_2^k, `1 <= k <= 64`, and the kernels that do nearly all local work: fixed point, bit packing,
//! matrix products, table folds and keystreams. A ring element is a `u64` whose bits above `k` mean nothing unless a function says
//! otherwise, so sums and products are plain wrapping arithmetic and reduction is left to the last moment, usually
//! [`pack`](mod@pack). Every kernel has a portable form and, where the machine has them, AVX2, AVX-512 and NEON forms chosen at run
//! time ([`Isa`]); property tests hold all forms equal bit for bit. Besides the memory map of
//! checkpoints this is the only module with `unsafe` code.

#[cfg(all(test, target_arch = "x86_64", target_os = "linux"))]
mod emulated;
mod filled;
pub mod fixed;
pub mod fold;
pub mod gemm;
mod isa;
pub(crate) mod keystream;
pub mod pack;
mod packed;
mod packed_rows;

pub(crate) use filled::{filled, try_filled};
pub use isa::Isa;
pub use packed::Packed;
pub(crate) use packed::{Bytes, pack_range};
pub use packed_rows::PackedRows;

/// The low `k` bits set: the largest element of Z_2^k, for `1 <= k <= 64`.
///
/// # Panics
/// If `k` is 0 or above 64.
#[must_use]
#[inline]
pub const fn mask(k: u32) -> u64 {
    assert!(k >= 1 && k <= 64, "a ring has 1 to 64 bits");
    u64::MAX >> (64 - k)
}

/// The two's complement value of the low `k` bits of `v`, in `[-2^(k-1), 2^(k-1))`; higher bits are ignored.
///
/// # Panics
/// If `k` is 0 or above 64.
#[must_use]
#[inline]
pub const fn signed(v: u64, k: u32) -> i64 {
    assert!(k >= 1 && k <= 64, "a ring has 1 to 64 bits");
    ((v << (64 - k)) as i64) >> (64 - k)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_and_signs_at_the_edges() {
        assert_eq!((mask(1), mask(8), mask(63), mask(64)), (1, 255, u64::MAX >> 1, u64::MAX));
        assert_eq!((signed(1, 1), signed(0x80, 8), signed(0x17f, 8)), (-1, -128, 127));
        assert_eq!((signed(u64::MAX, 64), signed(u64::MAX, 63)), (-1, -1));
    }
}
