//! placeholder
pub mod error;
pub mod party;
pub mod model;
