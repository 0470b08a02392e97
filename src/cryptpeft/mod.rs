//! CryptPEFT (arXiv 2508.12264): a private adapter and classifier over a public vision transformer or language model, with one-way
//! communication. The backbone is public and stays with the Client, in the clear; adapters only read from it and nothing
//! goes back into it, so what is computed in secret is as small as the adapters.
//!
//! For the last `s` layers of the backbone, `a_i = adapter_i(x_i + a_{i-1}) + (x_i + a_{i-1})`, where `x_i` is the input of
//! layer `i` and `a` begins at 0. The last `a` is added to the backbone's last hidden state, and goes through the private
//! final LayerNorm and the private head: of the CLS row only, which is the last position of a text.
//!
//! ```text
//! vit       the backbone in float, of Hugging Face's and torchvision's checkpoints
//! text      the same of a Llama, for the last tokens of a text
//! image     PNG and JPEG files made into what the backbone takes
//! adapter   the private weights; read from and written to a directory
//! float     adapters and head in float: what the secure ones are measured against
//! maps      residual streams unrolled into private matrices
//! plan      ring widths, windows and guards
//! prepare   what each party gets
//! secure    the private adapter, walked by all three parties
//! local     all three in one process
//! latency   how long it takes: measured, and by the paper's linear model
//! estimate  how long it takes: by counting what is sent and computed
//! search    which heads, rank and number of adapters to train
//! synthetic labelled images, made from a seed or read from folders
//! texts     labelled texts, of files or made from a seed (sentences)
//! eval      features of labelled images, and the accuracy in float
//! train     adapters and head learned on cached features; cargo feature `train`
//! encoder   the backbone itself as a private model: what adapters are compared with
//! study     one-way adapters beside two-way ones, and where they sit; cargo feature `train`
//! ```

pub mod adapter;
mod disk;
pub mod encoder;
pub mod estimate;
pub mod eval;
pub mod float;
pub mod image;
pub mod latency;
pub mod local;
pub mod maps;
pub mod plan;
pub mod prepare;
pub mod search;
pub mod secure;
pub mod sentences;
#[cfg(feature = "train")]
pub mod study;
pub mod synthetic;
mod tensors;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_refused;
#[cfg(test)]
mod tests_texts;
pub mod text;
pub mod texts;
#[cfg(feature = "train")]
pub mod train;
#[cfg(feature = "train")]
mod twin;
pub mod vit;
mod vit_disk;

pub use adapter::{AdapterConfig, AdapterLayer, AdapterWeights, Affine, Block, LayerNorm};
pub use eval::{accuracy, cached_features};
pub use float::{Features, Watch, logits};
pub use image::Preprocess;
pub use local::LocalAdapter;
pub use plan::{Plan, plan};
pub use secure::{Opened, SecureAdapter};
pub use synthetic::{Dataset, Example};
pub use text::TextBackbone;
pub use texts::{TextExample, TextSet};
pub use vit::{Layout, Vit, VitConfig};
