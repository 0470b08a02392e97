//! What is decided before anything runs: ring widths, tables, guards, and what it costs. All of it is public.

pub mod cost;
pub mod headroom;
mod layer;
pub mod memory;
mod ranges;
#[cfg(test)]
mod tests;
pub mod work;

pub use layer::{AttentionPlan, HeadPlan, LayerPlan, MlpPlan, NormPlan, Plan};
pub use layer::{F, F_EXP, F_EXP_HI, F_EXP_LO, F_ROPE, FW};
pub use ranges::{Bounds, INPUT_LIMIT, LayerBounds, LayerRanges, MAX_TEMPERATURE, Misfit, Ranges, plan, propose};
