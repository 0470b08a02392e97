//! What a request will cost, without running it.
pub mod walk;
