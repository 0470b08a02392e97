//! Trefoil: private LLM inference between three parties.
#![deny(unsafe_code)]
#![warn(missing_docs)]

pub mod approx;
pub mod error;
pub mod generate;
pub mod model;
pub mod net;
pub mod party;
pub mod plan;
pub mod prf;
pub mod protocol;
#[allow(unsafe_code)] // SIMD kernels
pub mod ring;
pub mod session;
pub mod share;
pub mod world;

pub use error::{Error, Result};
pub use party::Role;
