//! What is decided before anything runs: ring widths, tables, guards, and what it costs. All of it is public.

pub mod cost;
pub mod headroom;
mod layer;
pub mod memory;
mod ranges;
#[cfg(test)]
mod tests;
pub mod work;

pub use layer::{AttentionPlan, ExpPlan, Fractions, HeadPlan, LayerFractions, LayerPlan, MlpPlan, NormPlan, Plan};
pub use layer::{F, F_EXP, F_EXP_HI, F_EXP_LO, F_ROPE, FW_LEAST, FW_MOST};
pub(crate) use ranges::reach;
pub use ranges::{
    Bounds, INPUT_LIMIT, LayerBounds, LayerRanges, MAX_TEMPERATURE, Misfit, Ranges, plan, propose, refused,
};
