//! placeholder
pub mod error;
pub mod party;
pub mod ring;
pub mod approx;
