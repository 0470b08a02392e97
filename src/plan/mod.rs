//! What is decided before anything runs, and what it costs.

pub mod cost;
