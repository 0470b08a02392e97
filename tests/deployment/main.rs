//! The three parties as separate processes over mutual TLS: that they compute what one process computes, and what happens
//! when somebody is wrong, hostile, slow or gone.

mod attacker;
mod identities;
mod intruders;
mod memory;
mod sessions;
mod support;
