//! Kernels that few machines of ours can run ([`ifma`]), or none ([`amx`]), prove themselves where they are: before a process uses one for the first time, the
//! processor multiplies something by it and by the portable form. One that differs is not used: a wrong product would be a wrong answer.

use std::sync::OnceLock;

use super::{amx, ifma, portable};
use crate::ring::mask;

/// Whether this processor, which has IFMA, multiplies as it should.
pub fn of_ifma() -> bool {
    static PROVEN: OnceLock<bool> = OnceLock::new();
    // SAFETY: the caller has asked for the processor's features.
    *PROVEN.get_or_init(|| told("IFMA", unsafe { by_ifma() }))
}

/// Whether this processor, which has AMX and whose system permits it, multiplies as it should.
pub fn of_amx() -> bool {
    static PROVEN: OnceLock<bool> = OnceLock::new();
    // SAFETY: as above.
    *PROVEN.get_or_init(|| told("AMX", unsafe { by_amx() }))
}

fn told(name: &str, proven: bool) -> bool {
    if !proven {
        eprintln!("trefoil: {name} gives wrong products on this machine and is not used; please report it");
    }
    proven
}

/// Rows of either operand that fill a block and begin another; columns that end within a register.
const SHAPE: (usize, usize, usize) = (18, 19, 70);
/// The same of IFMA, whose blocks are larger.
const IFMA: (usize, usize, usize) = (70, 5, 525);

fn words(n: usize) -> Vec<u64> {
    (1..=n as u64).map(|i| i.wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(i as u32)).collect()
}

/// Modulo `2^k` the portable product of `x` by `w` and what `run` makes of them.
fn agree<W: super::Weight>(
    k: u32,
    (t, m, n): (usize, usize, usize),
    x: &[u64],
    w: &[W],
    run: impl FnOnce(&mut [&mut [u64]]),
) -> bool {
    let (mut want, mut got) = (vec![0; t * m], vec![0; t * m]);
    portable::tile(x, w, n, n, &mut want.chunks_mut(m).collect::<Vec<_>>());
    run(&mut got.chunks_mut(m).collect::<Vec<_>>());
    want.iter().zip(&got).all(|(a, b)| (a ^ b) & mask(k) == 0)
}

/// # Safety
/// The processor has AVX-512 F and IFMA.
pub(super) unsafe fn by_ifma() -> bool {
    let (t, m, n) = IFMA;
    let (x, w) = (words(t * n), words(m * n));
    // SAFETY: the caller's.
    agree(ifma::WIDEST, IFMA, &x, &w, |rows| unsafe { ifma::Words::new(&x, n).tile(&w, n, rows) })
}

/// # Safety
/// The processor has AVX-512 F and AMX INT8, which the system permits.
pub(super) unsafe fn by_amx() -> bool {
    let (t, m, n) = SHAPE;
    let (x, w) = (words(t * n), words(m * n));
    let w16: Vec<i16> = w.iter().map(|v| *v as i16).collect();
    let w8: Vec<i8> = w.iter().map(|v| *v as i8).collect();
    // Every number of bytes, since each has a loop of its own.
    (8..=64).step_by(8).all(|k| {
        // SAFETY: the caller's.
        let digits = unsafe { amx::Digits::cut(&x, n, k) };
        // SAFETY: as above.
        agree(k, SHAPE, &x, &w16, |rows| unsafe { digits.tile(0, &w16, rows) })
            && agree(k, SHAPE, &x, &w8, |rows| unsafe { digits.tile(0, &w8, rows) })
    })
}
