//! Every operation of the masked engine, run by three parties, against exact integer arithmetic, its traffic against what
//! it declares.

#[path = "../support/mod.rs"]
mod support;

mod attention;
mod compare;
mod functions;
mod guard;
mod linear;
mod local;
mod lookup;
mod product;
