//! What a walk would compute, counted instead of done: the base of predicted times.
//!
//! A session that counts ([`crate::world::World::counting`]) runs the very program of the model, but its streams, weight
//! products, products with a cache and table lookups give zeros at once and add here what they would have taken. There is
//! no second description of the protocol that could fall behind it.

use std::collections::BTreeMap;
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
    /// Multiply-adds of ring words by 16- or 32-bit weights.
    pub weight_macs: u64,
    /// Bytes of such weights read.
    pub weight_bytes: u64,
    /// Multiply-adds of ring words by ring words, in large matrices.
    pub ring_macs: u64,
    /// Bytes of such matrices read.
    pub ring_bytes: u64,
    /// Multiply-adds with the cached keys and values.
    pub row_macs: u64,
    /// Words of tables read by lookups.
    pub fold_words: u64,
    /// Words masked, packed or unpacked: stands for everything element by element.
    pub words: u64,
}

impl std::ops::AddAssign for Counts {
    fn add_assign(&mut self, o: Counts) {
        self.prf_bytes += o.prf_bytes;
        self.weight_macs += o.weight_macs;
        self.weight_bytes += o.weight_bytes;
        self.ring_macs += o.ring_macs;
        self.ring_bytes += o.ring_bytes;
        self.row_macs += o.row_macs;
        self.fold_words += o.fold_words;
        self.words += o.words;
    }
}

impl Counts {
    /// Times `by`, rounded.
    #[must_use]
    pub fn scaled(self, by: f64) -> Counts {
        let s = |v: u64| (v as f64 * by).round() as u64;
        Counts {
            prf_bytes: s(self.prf_bytes),
            weight_macs: s(self.weight_macs),
            weight_bytes: s(self.weight_bytes),
            ring_macs: s(self.ring_macs),
            ring_bytes: s(self.ring_bytes),
            row_macs: s(self.row_macs),
            fold_words: s(self.fold_words),
            words: s(self.words),
        }
    }
}

type Table = [[[Counts; 4]; 2]; 3];

/// The work of all three parties of a walk, by party, lane (online or ahead) and part.
#[derive(Debug, Default)]
pub struct Work(Mutex<Counted>);

#[derive(Debug, Default)]
struct Counted {
    table: Table,
    /// Bytes of the vectors that an operation makes, by party and path.
    vectors: BTreeMap<(Role, String), u64>,
}

impl Work {
    fn with<T>(&self, f: impl FnOnce(&mut Counted) -> T) -> T {
        f(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn add(&self, role: Role, lane: Lane, scope: &Scope, counts: Counts) {
        self.with(|c| {
            c.table[role.index()][usize::from(lane == Lane::Ahead)][Part::of(scope) as usize] += counts;
            // A matrix is regenerated tile by tile and its stream never held.
            if counts.ring_macs + counts.weight_macs == 0 {
                *c.vectors.entry((role, scope.path().to_string())).or_default() +=
                    counts.prf_bytes.max(8 * counts.words);
            }
        });
    }

    /// What `role` would compute for `part` in its walk and its answers on `lane`.
    #[must_use]
    pub fn of(&self, role: Role, lane: Lane, part: Part) -> Counts {
        self.with(|c| c.table[role.index()][usize::from(lane == Lane::Ahead)][part as usize])
    }

    /// Bytes of the vectors of the operation that makes most of them at `role` (those of one layer of many).
    #[must_use]
    pub fn largest(&self, role: Role, layers: usize) -> u64 {
        let of = |(r, path): &(Role, String)| {
            *r == role && ["attn", "mlp", "norm1", "norm2"].iter().any(|p| path.starts_with(p))
        };
        self.with(|c| {
            let in_layers = c.vectors.iter().filter(|(k, _)| of(k)).map(|(_, v)| v / layers.max(1) as u64);
            let others = c.vectors.iter().filter(|((r, _), _)| *r == role).filter(|(k, _)| !of(k)).map(|(_, v)| *v);
            in_layers.chain(others).max().unwrap_or(0)
        })
    }
}
