//! What a walk would compute, counted instead of done: the base of predicted times.
//!
//! A session that counts ([`crate::world::World::counting`]) runs the very program of the model, but its streams, weight
//! products, products with a cache and table lookups give zeros at once and add here what they would have taken. There is
//! no second description of the protocol that could fall behind it.

use std::sync::{Mutex, PoisonError};

use serde::Serialize;

use crate::net::Lane;
use crate::party::Role;
use crate::session::Scope;

/// Parts of a pass, by the first name of an operation's path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// The norms before attention and MLP.
    Norm,
    /// Attention.
    Attention,
    /// MLP.
    Mlp,
    /// The Client's input, private embedding included; final norm, head, choice of the token, range flags.
    Head,
}

impl Part {
    /// All of them.
    pub const ALL: [Part; 4] = [Part::Norm, Part::Attention, Part::Mlp, Part::Head];

    fn of(scope: &Scope) -> Part {
        match scope.path().split('.').next() {
            Some("norm1" | "norm2" | "qk_norm") => Part::Norm,
            Some("attn") => Part::Attention,
            Some("mlp") => Part::Mlp,
            _ => Part::Head,
        }
    }
}

/// Work by kind of kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Bytes of AES streams.
    pub prf_bytes: u64,
    /// The same for the masks of matrices, once for all rows that are walked together.
    pub mask_bytes: u64,
    /// Multiply-adds of ring words by 16- or 32-bit weights.
    pub weight_macs: u64,
    /// Bytes of such weights read.
    pub weight_bytes: u64,
    /// Multiply-adds of ring words by ring words, in large matrices.
    pub ring_macs: u64,
    /// Bytes of such matrices read, once for all rows that are walked together.
    pub ring_bytes: u64,
    /// Multiply-adds with the cached keys and values, of single rows.
    pub row_macs: u64,
    /// The same of several rows together.
    pub together_macs: u64,
    /// Words of tables read by lookups.
    pub fold_words: u64,
    /// Words masked, packed or unpacked: stands for everything element by element.
    pub words: u64,
}

impl Counts {
    /// Field by field.
    #[must_use]
    pub fn zip(self, o: Counts, f: impl Fn(u64, u64) -> u64) -> Counts {
        Counts {
            prf_bytes: f(self.prf_bytes, o.prf_bytes),
            mask_bytes: f(self.mask_bytes, o.mask_bytes),
            weight_macs: f(self.weight_macs, o.weight_macs),
            weight_bytes: f(self.weight_bytes, o.weight_bytes),
            ring_macs: f(self.ring_macs, o.ring_macs),
            ring_bytes: f(self.ring_bytes, o.ring_bytes),
            row_macs: f(self.row_macs, o.row_macs),
            together_macs: f(self.together_macs, o.together_macs),
            fold_words: f(self.fold_words, o.fold_words),
            words: f(self.words, o.words),
        }
    }

    /// Of run-ahead work: with what is once for all rows walked together times `by`, rounded.
    #[must_use]
    pub fn batches_scaled(self, by: f64) -> Counts {
        let scaled = |v: u64| (v as f64 * by).round() as u64;
        let Counts { mask_bytes, ring_bytes, weight_bytes, .. } = self;
        let [mask_bytes, ring_bytes, weight_bytes] = [mask_bytes, ring_bytes, weight_bytes].map(scaled);
        Counts { mask_bytes, ring_bytes, weight_bytes, ..self }
    }

    /// Times `by`, rounded.
    #[must_use]
    pub fn scaled(self, by: f64) -> Counts {
        self.zip(self, |v, _| (v as f64 * by).round() as u64)
    }
}

impl std::ops::AddAssign for Counts {
    fn add_assign(&mut self, o: Counts) {
        *self = self.zip(o, |a, b| a + b);
    }
}

/// Work by party, lane (online, ahead) and part.
pub type Table = [[[Counts; 4]; 2]; 3];

/// A pass that a shorter one is walked for.
#[derive(Clone, Copy, Debug)]
pub struct Longer {
    /// Its length: what the program chooses by that (the range flags' counters, a norm's windows) is chosen for it.
    pub tokens: usize,
    /// Rows of the blocks that the short one is cut into, in place of what its own length says.
    pub block_rows: Option<usize>,
}

/// The work of all three parties of a walk, by party, lane (online or ahead) and part.
#[derive(Debug, Default)]
pub struct Work {
    table: Mutex<Table>,
    stands_for: Option<Longer>,
}

impl Work {
    /// For a pass that is walked in place of a longer one.
    #[must_use]
    pub fn standing_for(longer: Longer) -> Work {
        Work { stands_for: Some(longer), ..Work::default() }
    }

    pub(crate) fn tokens(&self) -> Option<usize> {
        self.stands_for.map(|l| l.tokens)
    }

    pub(crate) fn block_rows(&self) -> Option<usize> {
        self.stands_for?.block_rows
    }

    pub(crate) fn add(&self, role: Role, lane: Lane, scope: &Scope, counts: Counts) {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        table[role.index()][usize::from(lane == Lane::Ahead)][Part::of(scope) as usize] += counts;
    }

    /// By party, lane (online, ahead) and part.
    #[must_use]
    pub fn table(&self) -> Table {
        *self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
