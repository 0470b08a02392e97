//! Owner linear: `y = W x` with `W` known to the Owner only. No online message.
//!
//! | | Owner | Client | Helper |
//! |---|---|---|---|
//! | preparation | `W`, seed | seed: `B = PRF(O,C; seed)` | `A = W - B` |
//! | ahead | | sends `B r - r_y + rho` | sends `A r - rho` |
//! | online | `W d` + both `= y - r_y` | | |
//!
//! `r_y`, `rho` = PRF(Client, Helper), fresh. Cost: `2k` bits ahead per output, nothing online. Private: the Client's
//! message is masked by `rho`, the Helper's too, and their sum by `r_y`; the Helper's `A` is uniform because it lacks the
//! seed, the Client knows only the seed. A preparation has its own seed: two preparations of different weights under one
//! seed would show the Helper `W' - W`. Source: mask-ahead linear layers as in DELPHI (2020) and ASTRA (2019), with the
//! weight matrix shared between the two mask holders. Exact (no error) in the ring.
//!
//! A matrix that all three know ([`OwnerMatrix::into_public`]) is a public linear map: each side multiplies what it holds, and
//! nothing is sent.

mod matrix;

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Instant;

pub use matrix::OwnerMatrix;
pub(crate) use matrix::Plain;
use matrix::{Masks, Part};

use super::Pending;
use super::product::received;
use crate::error::{Error, Result};
use crate::ledger;
use crate::net::Lane;
use crate::party::Role;
use crate::plan::cost::Cost;
use crate::plan::work::Counts;
use crate::prf::Pair;
use crate::ring::{self, fixed, gemm, pack};
use crate::session::{Scope, Session};
use crate::share::{Masked, Rows, Side};

/// What it costs for `n` outputs.
#[must_use]
pub fn cost(n: usize, k: u32) -> Cost {
    Cost::default().run_ahead(Role::Client, n, k).run_ahead(Role::Helper, n, k)
}

/// `y = W x (+ bias)` for every row of `w.inputs` elements; ring of `x`, fraction bits of both added.
///
/// # Errors
/// [`Error::Shape`], [`Error::Peer`], [`Error::Reuse`].
pub fn owner_linear(s: &mut Session, scope: &Scope, x: &Masked, w: &OwnerMatrix) -> Result<Masked> {
    owner_linear_part(s, scope, x, w, 0..w.outputs)
}

/// As [`owner_linear`], of some of the outputs: for tokens of which not all are wanted.
///
/// # Errors
/// As [`owner_linear`].
pub fn owner_linear_part(
    s: &mut Session,
    scope: &Scope,
    x: &Masked,
    w: &OwnerMatrix,
    outputs: Range<usize>,
) -> Result<Masked> {
    start(s, scope, x, w, outputs)?.finish(s)
}

fn start<'a>(
    s: &mut Session,
    scope: &Scope,
    x: &Masked,
    w: &'a OwnerMatrix,
    outputs: Range<usize>,
) -> Result<Pending<'a, Masked>> {
    s.enter(scope);
    let tokens = x.rows().tokens();
    let part = outputs.start <= outputs.end && outputs.end <= w.outputs && (!w.diagonal || outputs.len() == w.outputs);
    if !part || (0..tokens).any(|t| !x.rows().row(t).len().is_multiple_of(w.inputs)) {
        return Err(Error::Shape { op: "owner linear", lhs: x.facts(), rhs: format!("{w:?}") });
    }
    if x.k() > w.ring {
        let rhs = format!("{w:?}, shared modulo 2^{}", w.ring);
        return Err(Error::Shape { op: "owner linear", lhs: x.facts(), rhs });
    }
    let rows = Rows::ragged((0..tokens).map(|t| x.rows().row(t).len() / w.inputs * outputs.len()));
    match &w.part {
        Part::Shape { public } => {
            let n = x.raw().len();
            if !s.count(scope, counts(s.role(), *public, (n / w.inputs) as u64, (w, outputs.len()))) {
                return Err(Error::Internal("a matrix without weights outside a walk that counts".into()));
            }
            match (public, s.role()) {
                (true, _) => Ok(Pending::ready(Masked::new(vec![0; rows.len()], x.side(), x.k(), x.f() + w.f, rows))),
                (false, Role::Owner) => online(s, scope, x, rows, (w, outputs), None, None),
                (false, _) => masks(s, scope, x, rows, w, outputs).map(Pending::ready),
            }
        }
        Part::Owner { w: plain, bias } => online(s, scope, x, rows, (w, outputs), Some(plain), bias.as_deref()),
        Part::Client { .. } | Part::Helper { .. } => masks(s, scope, x, rows, w, outputs).map(Pending::ready),
        Part::Public { w: plain, bias } => {
            let mut y = local(x, plain, (w, &outputs), rows.len());
            // A constant known to all is added once: by the party that holds the value, not to the mask.
            if let (Side::Value, Some(bias)) = (x.side(), bias) {
                add_bias(&mut y, &bias[outputs], x.f() + w.f, x.k());
            }
            Ok(Pending::ready(Masked::new(y, x.side(), x.k(), x.f() + w.f, rows)))
        }
    }
}

/// What `t` rows through `outputs` of `w` would take at a party.
fn counts(role: Role, public: bool, t: u64, (w, outputs): (&OwnerMatrix, usize)) -> Counts {
    let words = if w.diagonal { w.inputs } else { outputs * w.inputs } as u64;
    let none = Counts::default();
    let macs = if w.diagonal { 0 } else { t * words };
    match role {
        Role::Owner => Counts { weight_macs: macs, weight_bytes: 2 * words, ..none },
        _ if public => Counts { weight_macs: macs, weight_bytes: 4 * words, ..none },
        Role::Client => Counts { ring_macs: macs, mask_bytes: 8 * words, ..none },
        Role::Helper => Counts { ring_macs: macs, ring_bytes: pack::packed_len(words as usize, w.ring) as u64, ..none },
    }
}

/// These outputs of `B r` or `A r`, modulo `2^k`.
pub(crate) fn local_masks(k: u32, r: &[u64], w: &OwnerMatrix, outputs: Range<usize>) -> Vec<u64> {
    let (m, n, first) = (outputs.len(), w.inputs, outputs.start * w.inputs);
    let t = r.len() / n;
    let Some(masks) = w.masks() else { return vec![0; t * m] };
    if w.diagonal {
        let mut own = vec![0; n];
        masks.read(0, &mut own);
        return r.iter().zip(own.iter().cycle()).map(|(r, w)| r.wrapping_mul(*w)).collect();
    }
    // Made part by part and never stored: the Client keeps 32 bytes per model, the Helper packed words.
    let mut y = vec![0; t * m];
    let drawing = AtomicU64::new(0);
    let all = gemm::Rows::new(k, r, n).times(
        m,
        |from, words| {
            let begun = Instant::now();
            masks.read(first + from, words);
            drawing.fetch_add(begun.elapsed().as_nanos() as u64, Relaxed);
        },
        &mut y,
    );
    if matches!(masks, Masks::Client(_)) {
        ledger::streams(drawing.into_inner() as f64 / all.as_nanos().max(1) as f64);
    }
    y
}

fn masks(
    s: &mut Session,
    scope: &Scope,
    x: &Masked,
    rows: Rows,
    w: &OwnerMatrix,
    outputs: Range<usize>,
) -> Result<Masked> {
    let k = x.k();
    let mut y = local_masks(k, x.raw(), w, outputs);
    let ry = s.words(Pair::ClientHelper, scope, "linear.ry", &rows, k)?;
    let rho = s.words(Pair::ClientHelper, scope, "linear.rho", &rows, k)?;
    let m = ring::mask(k);
    if s.role() == Role::Client {
        y.iter_mut().zip(ry.iter().zip(&rho)).for_each(|(y, (a, b))| *y = y.wrapping_sub(*a).wrapping_add(*b) & m);
        s.send_ahead(scope, "linear.client", &rows, 1, k, &y)?;
    } else {
        y.iter_mut().zip(&rho).for_each(|(y, b)| *y = y.wrapping_sub(*b) & m);
        s.send_ahead(scope, "linear.helper", &rows, 1, k, &y)?;
    }
    Ok(Masked::new(ry, Side::Mask, k, x.f() + w.f, rows))
}

/// `n` elements of these outputs of `W x`, of what this side holds of `x`.
fn local(x: &Masked, plain: &Plain, (w, outputs): (&OwnerMatrix, &Range<usize>), n: usize) -> Vec<u64> {
    let mut y = vec![0u64; n];
    if w.diagonal {
        plain.scale(x.raw(), &mut y);
    } else {
        plain.product(x.k(), x.raw(), x.raw().len() / w.inputs, outputs.clone(), w.inputs, &mut y);
    }
    y
}

fn add_bias(y: &mut [u64], bias: &[f32], f: u32, k: u32) {
    let bias: Vec<u64> = bias.iter().map(|&b| fixed::encode(f64::from(b), f, k)).collect();
    y.chunks_mut(bias.len()).for_each(|row| row.iter_mut().zip(&bias).for_each(|(y, b)| *y = y.wrapping_add(*b)));
}

fn online<'a>(
    s: &mut Session,
    scope: &Scope,
    x: &Masked,
    rows: Rows,
    (w, outputs): (&'a OwnerMatrix, Range<usize>),
    plain: Option<&'a Plain>,
    bias: Option<&'a [f32]>,
) -> Result<Pending<'a, Masked>> {
    let (k, f, n) = (x.k(), x.f() + w.f, rows.len());
    s.declare(cost(n, k));
    let mut y = plain.map_or_else(|| vec![0; n], |plain| local(x, plain, (w, &outputs), n));
    if let Some(bias) = bias {
        add_bias(&mut y, &bias[outputs], f, k);
    }
    Ok(received(scope, "linear.client", ("linear.helper", Lane::Ahead), y, k, f, rows))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::prf::PreparationSeed;
    use crate::ring::Packed;

    /// Word by word, modulo `2^k`.
    fn naive(r: &[u64], a: &[u64], n: usize, k: u32) -> Vec<u64> {
        let dot = |r: &[u64], a: &[u64]| r.iter().zip(a).fold(0u64, |y, (r, a)| y.wrapping_add(r.wrapping_mul(*a)));
        r.chunks(n).flat_map(|r| a.chunks(n).map(move |a| dot(r, a) & ring::mask(k))).collect()
    }

    fn words(seed: u8, n: usize) -> Vec<u64> {
        let mut words = vec![0; n];
        PreparationSeed::from_bytes([seed; 32]).matrix_words(1, 0, &mut words);
        words
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        // Packed in pieces that end anywhere, at any address, in more than one tile, for few rows and for many.
        #[test]
        fn packed_weights_multiply_as_words_do(
            seed: u8, t in 1usize..90, m in 1usize..70, n in 1usize..700, k in 1u32..=64, rows in 1usize..20, at in 0usize..9,
        ) {
            let (r, a) = (words(seed, t * n), words(!seed, m * n));
            let mut bytes = vec![0xa5; at];
            a.chunks(rows * n).for_each(|piece| pack::pack_into(piece, k, &mut bytes));
            let packed = Packed::from_bytes(Arc::new(bytes), at, m * n, rows * n, k).unwrap();
            let w = OwnerMatrix::helper_packed(1, (m, n), 12, packed).unwrap();
            let low = |y: Vec<u64>| y.into_iter().map(|y| y & ring::mask(k)).collect::<Vec<_>>();
            // All outputs, and some of them.
            for outputs in [0..m, m / 3..m - m / 4] {
                let want = naive(&r, &a[outputs.start * n..outputs.end * n], n, k);
                prop_assert_eq!(low(local_masks(k, &r, &w, outputs.clone())), want.clone());
                // The Client's half, regenerated: the same tiles.
                let client = OwnerMatrix::client(1, m, n, 12, PreparationSeed::from_bytes([!seed; 32]));
                prop_assert_eq!(low(local_masks(k, &r, &client, outputs)), want);
            }
        }

        #[test]
        fn a_packed_diagonal_scales(seed: u8, t in 1usize..5, n in 1usize..90, k in 1u32..=64) {
            let (r, a) = (words(seed, t * n), words(!seed, n));
            let w = OwnerMatrix::helper_packed(1, (1, n), 12, Packed::new(&a, k)).unwrap().into_diagonal().unwrap();
            let want = r.iter().zip(a.iter().cycle()).map(|(r, a)| r.wrapping_mul(*a) & ring::mask(k));
            let got = local_masks(k, &r, &w, 0..n);
            prop_assert!(got.iter().map(|y| y & ring::mask(k)).eq(want));
        }
    }

    #[test]
    fn a_ring_wider_than_the_packed_words_is_refused() {
        let w = OwnerMatrix::helper_packed(1, (2, 3), 12, Packed::new(&[0; 6], 44)).unwrap();
        assert_eq!(w.clone().within(60).ring, 44);
        assert_eq!(w.within(40).ring, 40);
        assert!(OwnerMatrix::helper_packed(1, (2, 4), 12, Packed::new(&[0; 6], 44)).is_err());
    }
}
