//! Sharings: what a party holds of a secret, and the operations on it that need no message.
//!
//! [`Masked`] is the engine's form: the Owner holds `d`, Client and Helper hold `r`, and `x = d + r mod 2^k`.
//! [`replicated`] holds the classical form with three components, of which each party lacks one, and [`bits`] the same
//! with exclusive or.
//!
//! A share can be neither sent nor printed by accident. (Each example that does not compile is followed by one that does, which
//! differs in that alone: it is not a wrong name that fails.)
//!
//! ```compile_fail
//! fn sendable<T: serde::Serialize>(_: &T) {}
//! fn send(x: &trefoil::share::Masked) { sendable(x) }
//! ```
//! ```
//! fn sendable<T: serde::Serialize>(_: &T) {}
//! fn send(x: &trefoil::share::Masked) { sendable(&x.facts()) }
//! ```
//! ```compile_fail
//! fn print(x: &trefoil::share::Masked) { println!("{x}") }
//! ```
//! ```
//! fn print(x: &trefoil::share::Masked) { println!("{}", x.facts()) }
//! ```
//! ```compile_fail
//! fn peek(x: &trefoil::share::Masked) -> u64 { x.v[0] }
//! ```
//! ```
//! fn peek(x: &trefoil::share::Masked) -> u64 { x.facts().len() as u64 }
//! ```

pub mod bits;
mod masked;
pub mod replicated;

pub use bits::Bits;
pub use masked::{Masked, Rows, Side};
pub use replicated::{Additive, Replicated};
