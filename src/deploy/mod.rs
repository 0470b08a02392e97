//! Three organisations on three hosts: who they are (certificates), what each is told (configuration), how they meet (TLS,
//! sessions), and the parties that run for long.

pub mod certs;
pub mod client;
pub mod config;
pub mod doctor;
mod engine;
mod helper;
pub mod init;
mod observe;
mod owner;
pub mod party;
pub mod release;
mod seen;
pub mod tls;
pub mod wire;

pub use engine::SessionReport;
