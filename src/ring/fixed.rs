//! Fixed point: the real number `x` as the integer nearest to `x 2^f`, modulo 2^k, negative numbers in two's complement.

use super::{mask, signed};

/// `x 2^f` rounded to the nearest integer (ties to even), modulo 2^k; the result is below 2^k.
///
/// A number out of range WRAPS, as ring arithmetic does: use it where the range is known (tables, folded constants), and
/// [`try_encode`] for data. NaN gives 0; beyond 2^127 the integer saturates first.
///
/// # Panics
/// If `k` is 0 or above 64.
#[must_use]
#[inline]
pub fn encode(x: f64, f: u32, k: u32) -> u64 {
    (x * scale(f)).round_ties_even() as i128 as u64 & mask(k)
}

/// [`encode`], or `None` when the rounded integer is not in `[-2^(k-1), 2^(k-1))` or `x` is NaN.
///
/// # Panics
/// If `k` is 0 or above 64.
#[must_use]
#[inline]
pub fn try_encode(x: f64, f: u32, k: u32) -> Option<u64> {
    let v = (x * scale(f)).round_ties_even();
    let half = scale(k - 1);
    (-half <= v && v < half).then(|| v as i64 as u64 & mask(k))
}

/// The number that the low `k` bits of `v` stand for: their two's complement value over 2^f. Above 53 significant bits
/// the result is the nearest `f64`.
///
/// # Panics
/// If `k` is 0 or above 64.
#[must_use]
#[inline]
pub fn decode(v: u64, f: u32, k: u32) -> f64 {
    signed(v, k) as f64 / scale(f)
}

/// 2^f, exactly.
fn scale(f: u32) -> f64 {
    debug_assert!(f < 1023);
    f64::from_bits((1023 + u64::from(f)) << 52)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn rounds_to_even_and_wraps_only_when_asked_to() {
        assert_eq!(encode(0.5, 0, 8), 0);
        assert_eq!(encode(1.5, 0, 8), 2);
        assert_eq!(encode(-1.0, 0, 8), 255);
        assert_eq!(encode(256.0 + 3.0, 0, 8), 3);
        assert_eq!(encode(-(2f64.powi(70)) - 2f64.powi(30), 0, 64), (-(1i64 << 30)) as u64);
        assert_eq!(encode(f64::NAN, 12, 32), 0);
        assert_eq!(try_encode(127.4, 0, 8), Some(127));
        assert_eq!(try_encode(127.5, 0, 8), None);
        assert_eq!(try_encode(-128.5, 0, 8), Some(128));
        assert_eq!(try_encode(-129.0, 0, 8), None);
        assert_eq!(try_encode(f64::NAN, 0, 8), None);
        assert_eq!(try_encode(f64::INFINITY, 0, 64), None);
        assert_eq!(try_encode(2f64.powi(63), 0, 64), None);
        assert_eq!(try_encode(-(2f64.powi(63)), 0, 64), Some(1 << 63));
        assert_eq!(try_encode(-1.0, 0, 1), Some(1));
    }

    proptest! {
        #[test]
        fn decode_inverts_encode(x in -1e4f64..1e4, f in 0u32..30, k in 45u32..=64) {
            let v = try_encode(x, f, k).unwrap();
            prop_assert_eq!(v, encode(x, f, k));
            prop_assert!(v <= mask(k));
            prop_assert!((decode(v, f, k) - x).abs() <= 0.5 / scale(f));
            prop_assert_eq!(encode(decode(v, f, k), f, k), v);
        }
    }
}
