//! The three parties as separate processes over mutual TLS: that they compute what one process computes, and what happens
//! when somebody is wrong, hostile, slow or gone.

mod addresses;
mod attacker;
mod canary;
mod crashes;
mod draft;
#[path = "../support/drafts.rs"]
mod drafts;
mod foreign;
mod gateway;
mod hostile;
#[path = "../gateway/http.rs"]
mod http;
mod identities;
mod intruders;
mod memory;
mod proxy;
mod search;
mod sessions;
mod soak;
mod support;
