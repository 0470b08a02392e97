//! Preparations on disk: what each of three hosts keeps of a model. No network code.
//!
//! | where | file | who may see it |
//! |---|---|---|
//! | Owner, `PREP/` | `manifest.json` ([`PublicManifest`]) | everyone |
//! | | `seed`, `owner.bin` | Owner (the seed goes to Clients over TLS) |
//! | | `half.sha256` | Owner and Helper |
//! | | `public/` | everyone: handed to Clients |
//! | Helper, `STORE/<id>/` | `manifest.json`, `half.bin` (`half.part` while it comes in), `half.sha256` | Helper |
//! | Client | a copy of `public/` | everyone |
//!
//! No hash of the Helper's half `A` may reach a Client: it knows `B`, so for a guess `W` of some weights it could compute
//! `A = W - B`, and a hash would tell it whether the guess is right. That is why the manifest, which all three have,
//! holds none, and why `half.sha256` is a file of its own. See `docs/preparation.md`.

mod client;
mod disk;
mod helper;
mod manifest;
mod owner;
mod owner_file;

pub use client::ClientModel;
pub use helper::{HelperStore, Incoming};
pub use manifest::{Digest, HalfSize, Hex, MAX_MANIFEST_BYTES, PreparationId, PublicManifest};
pub use owner::OwnerPreparation;
