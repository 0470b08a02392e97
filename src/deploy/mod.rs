//! Three organisations on three hosts: who they are (certificates), and what each is told (configuration).

pub mod certs;
pub mod config;
pub mod init;
