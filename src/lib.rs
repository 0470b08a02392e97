//! placeholder
pub mod error;
pub mod party;
