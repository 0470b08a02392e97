//! Models made cheap under MPC, by training (MARILL: Rathee and others, "MPC-Minimized Secure LLM Inference", arXiv:2408.03561): fine-tuning with the
//! bottom layers frozen or by low-rank adapters, merged heads, a softmax without exponentials, distillation; and what the paper
//! compares them with. Behind the feature `train`, on candle's tensors.

pub mod adapter;
mod attention;
mod chat;
pub mod cluster;
pub mod cost;
mod curve;
pub mod data;
mod disk;
pub mod evaluate;
pub(crate) mod ops;
pub(crate) mod optimiser;
mod output;
pub mod reshape;
mod resume;
pub mod student;
pub mod study;
mod table;
pub mod tasks;
pub mod train;
