//! What may be seen of the float twin as it runs: calibration takes the ranges of the values from here.

use ndarray::{ArrayView2, ArrayView3};

/// Which RMSNorm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Norm {
    /// Before a layer's attention.
    Input,
    /// Before a layer's MLP.
    PostAttention,
    /// Before the output head; its layer number is the number of layers.
    Final,
}

/// Is shown the values inside the float twin, layer by layer (layers count from 0). Every method does nothing unless
/// implemented; `()` is the observer that looks at nothing. Each call shows only the tokens of the present step, not
/// those in the cache.
pub trait Observer {
    /// What goes into a norm, `[tokens, hidden]`: the residual stream.
    fn norm_input(&mut self, layer: usize, which: Norm, h: ArrayView2<'_, f32>) {
        let _ = (layer, which, h);
    }

    /// Attention: queries `[tokens, heads, head_dim]`, keys and values `[tokens, kv_heads, head_dim]`, q and k after
    /// the rotation; and per head and token the largest and the least score `q.k / sqrt(head_dim)` over the positions
    /// that the token sees, `[heads, tokens]`.
    fn attention(
        &mut self,
        layer: usize,
        q: ArrayView3<'_, f32>,
        k: ArrayView3<'_, f32>,
        v: ArrayView3<'_, f32>,
        scores_row_max: ArrayView2<'_, f32>,
        scores_row_min: ArrayView2<'_, f32>,
    ) {
        let _ = (layer, q, k, v, scores_row_max, scores_row_min);
    }

    /// What goes into the attention's output projection, `[tokens, heads * head_dim]`.
    fn context(&mut self, layer: usize, o: ArrayView2<'_, f32>) {
        let _ = (layer, o);
    }

    /// The MLP's gate before its activation, and what is gated; both `[tokens, intermediate]`.
    fn gate(&mut self, layer: usize, gate: ArrayView2<'_, f32>, up: ArrayView2<'_, f32>) {
        let _ = (layer, gate, up);
    }

    /// The logits, `[tokens, vocab]`.
    fn logits(&mut self, l: ArrayView2<'_, f32>) {
        let _ = l;
    }
}

impl Observer for () {}
