//! Errors, by who or what is to blame. No variant ever carries a share, a mask, a weight or a prompt.

use crate::party::Role;

/// What this crate's fallible functions return.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong, by who is to blame.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A peer did not keep to the protocol, or is gone.
    #[error("{role} at step `{step}`: {kind}")]
    Peer {
        /// Who is to blame.
        role: Role,
        /// The protocol step that waited for it.
        step: String,
        /// What it did.
        kind: PeerFault,
    },
    /// The command line or a configuration is wrong.
    #[error("{0}")]
    Config(String),
    /// The checkpoint, its configuration or its tokenizer is wrong; the text names the file, what is wrong and the remedy.
    #[error("{0}")]
    Model(String),
    /// Operands that cannot go together.
    #[error("{op}: {lhs} does not go with {rhs}")]
    Shape {
        /// The operation.
        op: &'static str,
        /// Left operand: shape, ring and fraction bits.
        lhs: String,
        /// Right operand or what was expected.
        rhs: String,
    },
    /// A value may have left the range that the plan can represent: the result would be silently wrong, so it is not given out.
    #[error(
        "layer {layer}: {quantity} left the range of the plan; no token is given out. Prepare the model with text like this prompt for calibration (--calibration-text), or with a wider plan"
    )]
    Range {
        /// Which layer (or "head").
        layer: String,
        /// Which quantity.
        quantity: String,
    },
    /// A PRF address was asked for a second time; masks are used once.
    #[error("PRF address `{0}` was already taken: a mask may be used only once")]
    Reuse(String),
    /// An operating-system error on a named file or resource.
    #[error("{what}: {source}")]
    Io {
        /// The file or resource.
        what: String,
        /// The cause.
        source: std::io::Error,
    },
    /// A local thread of this process failed; a defect in Trefoil itself.
    #[error("internal: {0}; please report this")]
    Internal(String),
}

/// What a peer did wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PeerFault {
    /// The link ended.
    #[error("the link is closed")]
    Closed,
    /// Nothing came in time.
    #[error("nothing came within {0} ms")]
    Timeout(u64),
    /// A message of the wrong length.
    #[error("sent {got} bytes where exactly {want} were expected")]
    Length {
        /// What the step expects.
        want: usize,
        /// What came.
        got: usize,
    },
    /// Bits set where the packing has none, or a value beyond its type.
    #[error("sent a malformed value ({0})")]
    Malformed(&'static str),
    /// More messages ahead of their time than the agreed buffer holds.
    #[error("sent more run-ahead data than the agreed {0} bytes")]
    Flood(usize),
}

impl Error {
    /// An I/O error on a named thing.
    pub fn io(what: impl Into<String>, source: std::io::Error) -> Self {
        Error::Io { what: what.into(), source }
    }
}
