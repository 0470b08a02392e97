//! What Trefoil runs and how it is read from disk: the configuration, the weights and the tokenizer of a Hugging Face
//! checkpoint; the float twin, an ordinary f32 forward pass that says what the secure one should come out at; calibration,
//! preparation, and the private model itself.

pub mod adapter;
pub mod calibrate;
pub mod chat;
pub mod checkpoint;
pub mod config;
pub(crate) mod config_json;
pub(crate) mod files;
pub mod float;
pub mod layers;
mod matmul;
mod mmap;
mod observe;
pub mod preparation;
pub mod prepare;
pub mod progress;
mod public;
pub mod rounding;
pub mod sections;
pub mod secure;
pub mod store;
pub mod text;
pub mod variant;
pub mod weights;

pub use adapter::{Adapter, LowRank};
pub use chat::ChatTemplate;
pub use checkpoint::Checkpoint;
pub use config::{Activation, Arch, LayerShape, ModelConfig, Rope, RopeScaling, Softmax, Variant};
pub use float::FloatCache;
pub use layers::{Layered, Streamed};
pub use matmul::matmul_transposed;
pub use observe::{Norm, Observer};
pub use text::{TextCodec, TextStream};
pub use weights::{LayerWeights, Linear, Weights};
