//! The activation functions of the supported models, in floating point.

use std::f64::consts::{FRAC_1_SQRT_2, FRAC_2_SQRT_PI, PI};

/// A function that an MLP applies elementwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Activation {
    /// `x / (1 + e^-x)` (Llama).
    Silu,
    /// `x Phi(x)` with the error function.
    Gelu,
    /// The tanh form of GELU.
    GeluTanh,
    /// `1 / (1 + e^-x)`.
    Sigmoid,
    /// `max(x, 0)`.
    Relu,
    /// `x^2 / 8 + x / 4 + 1 / 2`.
    Quad,
}

impl From<crate::model::Activation> for Activation {
    fn from(a: crate::model::Activation) -> Self {
        match a {
            crate::model::Activation::Silu => Activation::Silu,
            crate::model::Activation::Relu => Activation::Relu,
            crate::model::Activation::Quad => Activation::Quad,
            crate::model::Activation::Gelu => Activation::Gelu,
        }
    }
}

impl Activation {
    /// The function at `x`, to about 1e-15 relative.
    #[must_use]
    pub fn eval(self, x: f64) -> f64 {
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        match self {
            Activation::Silu => x * sigmoid(x),
            Activation::Gelu => x * 0.5 * (1.0 + erf(x * FRAC_1_SQRT_2)),
            // 0.5 (1 + tanh z) = sigmoid(2 z)
            Activation::GeluTanh => x * sigmoid(2.0 * (2.0 / PI).sqrt() * (x + 0.044_715 * x * x * x)),
            Activation::Sigmoid => sigmoid(x),
            Activation::Relu => x.max(0.0),
            Activation::Quad => (0.125 * x + 0.25) * x + 0.5,
        }
    }
}

/// The error function: the all-positive series below 3 (no cancellation), the continued fraction of its complement above.
fn erf(x: f64) -> f64 {
    let z = x.abs();
    let value = if z < 3.0 {
        let (mut term, mut sum, mut n) = (z, z, 0.0);
        while term > sum * 1e-17 {
            n += 1.0;
            term *= 2.0 * z * z / (2.0 * n + 1.0);
            sum += term;
        }
        FRAC_2_SQRT_PI * (-z * z).exp() * sum
    } else {
        let fraction = (1..=60).rev().fold(z, |tail, n| z + f64::from(n) / 2.0 / tail);
        1.0 - FRAC_2_SQRT_PI / 2.0 * (-z * z).exp() / fraction
    };
    value.copysign(x)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_values() {
        for (x, want) in [
            (0.0, 0.0),
            (0.5, 0.520_499_877_813_046_5),
            (1.0, 0.842_700_792_949_714_9),
            (-2.0, -0.995_322_265_018_952_7),
            (2.999_999, 0.999_977_909_363_748),
            (3.0, 0.999_977_909_503_001_4),
            (30.0, 1.0),
        ] {
            assert!((erf(x) - want).abs() < 1e-15, "erf({x}) = {}", erf(x));
        }
        assert!((Activation::Silu.eval(1.0) - 0.731_058_578_630_004_9).abs() < 1e-15);
        assert!((Activation::Gelu.eval(1.0) - 0.841_344_746_068_542_9).abs() < 1e-15);
        assert!((Activation::GeluTanh.eval(1.0) - 0.841_191_990_608_302_8).abs() < 1e-12);
        for f in [Activation::Silu, Activation::Gelu, Activation::GeluTanh, Activation::Sigmoid] {
            assert!(f.eval(-1e4).abs() < 1e-300 && f.eval(1e4) >= 1.0);
        }
    }
}
