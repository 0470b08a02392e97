//! What is decided before anything runs: ring widths, tables, guards, and what it costs. All of it is public.

mod adapter;
pub mod block;
pub mod cost;
mod gate;
pub mod headroom;
mod layer;
pub mod memory;
mod network;
mod ranges;
mod softmax;
#[cfg(test)]
mod tests;
pub mod work;

pub use adapter::{AdapterBounds, AdapterFractions, AdapterPlan, F_A_MOST, F_B_MOST, Group, Grouped, Module};
pub(crate) use gate::reach;
pub use layer::{
    Alone, AttentionPlan, ExpPlan, Fractions, HeadPlan, LayerFractions, LayerPlan, MlpPlan, NormPlan, Plan,
};
pub use layer::{F, F_EXP, F_EXP_HI, F_EXP_LO, F_ROPE, FW_LEAST, FW_MOST};
pub(crate) use layer::{F_QK, ROTATION, product_ring, unlifted};
pub use network::{Radices, Setting};
pub use ranges::{
    Bounds, INPUT_LIMIT, LayerBounds, LayerRanges, MAX_TEMPERATURE, Misfit, Ranges, plan, propose, refused,
};
