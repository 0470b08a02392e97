//! Trefoil: private LLM inference between three parties. The provider keeps its weights, the user keeps the prompt.
//!
//! # Threat model
//!
//! - Three parties ([`Role`]): the *Owner* has the private weights, the *Client* the prompt, the *Helper* nothing. The
//!   Client learns the tokens; nobody learns anything else beyond public facts.
//! - Semi-honest, honest majority: any ONE party that keeps to the protocol sees only values that are uniformly random to it.
//! - Public: architecture, lengths, the fixed-point [`plan`] (its widths come from norms of the weights and from
//!   calibration), timing, the number of tokens, and to the Client which range flag went up.
//! - NOT protected: two colluding parties (Helper with any one Client rebuilds the weights; Owner with Helper the prompt),
//!   active deviation, model extraction through outputs, lengths and timing.
//! - A PRF stream is taken once ([`prf`]); a value that may have left its range ends the request instead of giving a
//!   wrong token ([`protocol::guard`]).
//! - Between hosts ([`deploy`]) every link is mutually authenticated TLS 1.3. In one process ([`generate::Local`]) the parties
//!   are threads: that shows the protocol and isolates nothing.
//!
//! More in `docs/threat-model.md`, `docs/protocols.md` and `docs/deployment.md` of the repository.
//!
//! # Shares
//!
//! A secret `x` in `Z_2^k` is `x = d + r mod 2^k`. The Owner holds `d`; Client and Helper hold the mask `r`, which is the
//! output of a PRF that they share, or a public function of such outputs ([`share::Masked`]). So both know every mask
//! before there is any input, and what they send for it runs ahead of time. Where an operation needs a three-party
//! sharing, the Owner splits `d = x1 + x2` with `x1 = PRF(Owner, Client)` and sends `x2` to the Helper.
//!
//! # Modules
//!
//! A module uses what stands above it:
//!
//! ```text
//! error, party    errors by who is to blame; the three roles
//! ring            words of Z_2^k: fixed point, packing, matrix products, table folds
//! share           what a party holds of a secret; local operations
//! prf             streams shared by pairs of parties, taken once by address
//! net             channels: tagged messages on two lanes; memory, TLS; meter, simulated network
//! ledger          where a party's time and bytes go, by kind of operation
//! session         one party's view: role, links, streams, passes, jobs
//! protocol        one file per operation, each with its cost and privacy argument
//! approx          tables for functions, with their errors
//! plan            ring widths, windows and guards of a model; costs
//! model           Hugging Face checkpoints, float twin, calibration, preparation (in memory, on disk), the private model
//! marill          models made cheap by training; cargo feature `train`
//! cryptpeft       a private adapter and head over a public vision transformer, which stays in the clear
//! world           three connected parties in one process
//! generate        requests: what each party does, and all three in one process
//! http            an HTTP server that is bounded in connections, time and size
//! deploy          three hosts: certificates, configuration, TLS, sessions, daemons, doctor
//! client          what a program embeds to be a Client: sessions, a queue, answers as streams
//! serve           OpenAI's API and the page, over HTTP
//! predict         what a request will cost: traffic (exact), time and memory (estimates)
//! bench           measurements with random weights at the shapes of published models
//! ```
//!
//! # Use
//!
//! ```no_run
//! use std::path::Path;
//! use trefoil::generate::{Local, LocalOptions};
//! use trefoil::model::TextCodec;
//!
//! # fn main() -> trefoil::Result<()> {
//! let dir = Path::new("models/quill-4m");
//! let codec = TextCodec::open(dir)?;
//! let prompt = codec.encode("It was a bright morning")?;
//! // Four private layers; calibrates, prepares the weights with a fresh seed and starts the three parties.
//! let mut local = Local::open(dir, LocalOptions::new(Some(4)))?;
//! let greedy = 0.0;
//! let out = local.generate(&prompt, 16, greedy, 0, false, &mut |_token| true)?;
//! println!("{}", codec.decode(&out.tokens)?);
//! local.finish()?;
//! # Ok(())
//! # }
//! ```
#![deny(unsafe_code)]
#![warn(missing_docs)]

pub mod approx;
pub mod bench;
pub mod client;
pub mod cryptpeft;
pub mod deploy;
pub mod error;
pub mod generate;
mod http;
pub mod ledger;
#[cfg(feature = "train")]
pub mod marill;
pub mod model;
pub mod net;
mod par;
pub mod party;
pub mod plan;
pub mod predict;
pub mod prf;
pub mod protocol;
#[allow(unsafe_code)] // SIMD kernels
pub mod ring;
pub mod serve;
pub mod session;
pub mod share;
pub mod world;

pub use error::{Error, Result};
pub use party::Role;
