//! Adapters for weights in memory.
#![allow(dead_code)] // every test file uses a part of it

use ndarray::Array2;
use trefoil::model::{LayerWeights, LowRank};
use trefoil::plan::Module;

/// Gives each of `modules` an adapter of this rank, about as large as the weights that it is added to.
pub fn adapt(l: &mut LayerWeights, modules: &[Module], rank: usize) {
    for &module in modules {
        let linear = l.linear_mut(module);
        let (out, inputs) = linear.w.dim();
        // Pseudorandom, in about [-0.1, 0.1).
        let small = |i: usize, j: usize| {
            let h = (i as u32).wrapping_mul(0x9e37_79b9) ^ (j as u32).wrapping_mul(0x85eb_ca6b).rotate_left(13);
            f32::from((h.wrapping_mul(0xc2b2_ae35) >> 16) as u16) / 327_680.0 - 0.1
        };
        let a = Array2::from_shape_fn((rank, inputs), |(i, j)| small(i + 7, j));
        let b = Array2::from_shape_fn((out, rank), |(i, j)| small(j, i + 99));
        linear.adapter = Some(LowRank { a, b });
    }
}
