//! Weights of 8 or 16 bits times ring words by AMX tiles: an instruction multiplies 16 rows of 64 bytes by 64 rows of 16, and adds to 32-bit
//! sums. Words and weights are cut into bytes, all unsigned but a weight's last; each pair of bytes whose place lies below `2^k` has sums
//! of its own, which over [`MOST`] chunks of columns stay exact.
//!
//! No machine of ours has the instructions: the tests run this code, instruction by instruction, on `ring/emulated.rs`.

use std::arch::asm;
use std::arch::x86_64::*;
use std::ops::Range;

/// Rows of `x` from which tiles pay: half of one.
pub const FEWEST: usize = 8;
/// Rows of `x` and of `w` that a tile of the output has a multiple of.
pub const GRAIN: (usize, usize) = (4 * SIDE, SIDE);
/// Rows of a tile register.
const SIDE: usize = 16;
/// Columns that two of them meet in: a chunk.
const DEEP: usize = 64;
/// Chunks over which sums of products of bytes stay within 32 bits: `255 x 255 x 64 x 1024 < 2^32`, and half of it of signed ones.
const MOST: usize = 1024;
/// Sums that have registers, beside one for either operand.
const AT_ONCE: usize = 6;

/// A tile register in memory.
#[derive(Clone)]
#[repr(C, align(64))]
struct Tile([u8; SIDE * DEEP]);

impl Tile {
    const ZERO: Tile = Tile([0; SIDE * DEEP]);
}

/// Sums in as many registers as there are.
#[repr(C, align(64))]
struct Sums([[i32; SIDE * SIDE]; AT_ONCE]);

/// What `ldtilecfg` reads: all registers of full size.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

static CONFIG: Config = Config {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

/// A weight of some bytes.
pub trait Bytes: Copy {
    /// How many.
    const BYTES: usize;
    /// One of them, from the lowest.
    fn byte(self, i: usize) -> u8;
}

impl Bytes for i8 {
    const BYTES: usize = 1;
    #[inline]
    fn byte(self, _: usize) -> u8 {
        self as u8
    }
}

impl Bytes for i16 {
    const BYTES: usize = 2;
    #[inline]
    fn byte(self, i: usize) -> u8 {
        (self >> (8 * i)) as u8
    }
}

/// Asks the operating system for the tile registers, which it gives to those that ask: once per process. Whether processor and system have
/// them.
#[cfg(target_os = "linux")]
pub fn permitted() -> bool {
    use std::sync::OnceLock;
    /// `ARCH_REQ_XCOMP_PERM` of `arch_prctl`, and the number of the tiles' data among the processor's states.
    const REQUEST: libc::c_long = 0x1023;
    const TILE_DATA: libc::c_long = 18;
    static PERMITTED: OnceLock<bool> = OnceLock::new();
    *PERMITTED.get_or_init(|| {
        // SAFETY: of xgetbv, the system saves extended states; it reads the register 0.
        #[target_feature(enable = "xsave")]
        fn enabled() -> u64 {
            unsafe { _xgetbv(0) }
        }
        let (most, first) = (__cpuid(0).eax, __cpuid(1).ecx);
        let (tile, int8) = (1 << 24, 1 << 25);
        if most < 7 || first & (1 << 27) == 0 || __cpuid_count(7, 0).edx & (tile | int8) != tile | int8 {
            return false;
        }
        // SAFETY: OSXSAVE says that the instruction is there; the call reads and writes no memory of ours.
        unsafe { enabled() >> 17 & 3 == 3 && libc::syscall(libc::SYS_arch_prctl, REQUEST, TILE_DATA) == 0 }
    })
}

/// Other systems are not asked.
#[cfg(not(target_os = "linux"))]
pub fn permitted() -> bool {
    false
}

/// Rows of words, cut: group by group of [`SIDE`] rows, chunk by chunk of [`DEEP`] columns, byte by byte. A tile's row holds four columns of all rows
/// of its group. Behind the last row and column are zeros.
pub struct Digits {
    rows: usize,
    n: usize,
    bytes: usize,
    tiles: Vec<Tile>,
}

impl Digits {
    /// Of rows of `n` words, for products modulo `2^k`.
    ///
    /// # Safety
    /// The processor has AVX-512 F.
    #[target_feature(enable = "avx512f")]
    pub unsafe fn cut(x: &[u64], n: usize, k: u32) -> Digits {
        let (rows, bytes, chunks) = (x.len() / n, k.div_ceil(8) as usize, n.div_ceil(DEEP));
        let mut tiles = vec![Tile::ZERO; rows.div_ceil(SIDE) * chunks * bytes];
        for (s, row) in x.chunks_exact(n).enumerate() {
            let group = &mut tiles[s / SIDE * chunks * bytes..][..chunks * bytes];
            for (words, tiles) in row.chunks(DEEP).zip(group.chunks_exact_mut(bytes)) {
                for (i, words) in words.chunks(8).enumerate() {
                    let lanes = u8::MAX >> (8 - words.len());
                    // SAFETY: only lanes within `words` are read.
                    let words = unsafe { _mm512_maskz_loadu_epi64(lanes, words.as_ptr().cast()) };
                    for (p, tile) in tiles.iter_mut().enumerate() {
                        let shifted = _mm512_srl_epi64(words, _mm_cvtsi64_si128(8 * p as i64));
                        let eight = _mm_cvtsi128_si64(_mm512_cvtepi64_epi8(shifted)).to_le_bytes();
                        for (half, four) in eight.chunks_exact(4).enumerate() {
                            tile.0[(2 * i + half) * DEEP + 4 * (s % SIDE)..][..4].copy_from_slice(four);
                        }
                    }
                }
            }
        }
        Digits { rows, n, bytes, tiles }
    }

    /// `rows[s][j] += sum_i x[first + s][i] w[j n + i]`, modulo the `2^k` that the words were cut for; higher bits mean nothing.
    ///
    /// # Safety
    /// [`permitted`] said yes, and the processor has AVX-512 F.
    ///
    /// # Panics
    /// If `w` is not `rows[_].len() x n`, there are not so many rows, or `first` is no multiple of those of [`GRAIN`].
    #[target_feature(enable = "avx512f")]
    pub unsafe fn tile<W: Bytes>(&self, first: usize, w: &[W], rows: &mut [&mut [u64]]) {
        let m = rows.first().map_or(0, |r| r.len());
        assert!(rows.iter().all(|r| r.len() == m) && first + rows.len() <= self.rows && w.len() == m * self.n);
        assert!(first.is_multiple_of(SIDE), "a tile begins with a group");
        let chunks = self.n.div_ceil(DEEP);
        let mut panel = vec![Tile::ZERO; W::BYTES * chunks];
        for (j, w) in (0..m).step_by(SIDE).zip(w.chunks(SIDE * self.n)) {
            pack(w, self.n, &mut panel);
            for (group, rows) in rows.chunks_mut(SIDE).enumerate() {
                let x = &self.tiles[(first / SIDE + group) * chunks * self.bytes..][..chunks * self.bytes];
                let mut sums = [[0; SIDE]; SIDE];
                for (i, w) in panel.chunks_exact(chunks).enumerate().take(self.bytes) {
                    // SAFETY: the caller's processor has the instructions, and the system's permission.
                    unsafe { self.meet(x, w, (i, i + 1 == W::BYTES), &mut sums) };
                }
                for (s, row) in rows.iter_mut().enumerate() {
                    for (out, sums) in row[j..].iter_mut().zip(&sums) {
                        *out = out.wrapping_add(sums[s]);
                    }
                }
            }
        }
    }

    /// A group of rows by byte `i` of sixteen rows of weights, which is `signed` or not: `sums[output][row]`.
    ///
    /// # Safety
    /// As [`Digits::tile`].
    #[target_feature(enable = "avx512f")]
    unsafe fn meet(&self, x: &[Tile], w: &[Tile], (i, signed): (usize, bool), sums: &mut [[u64; SIDE]; SIDE]) {
        let count = self.bytes - i;
        // As evenly as can be: seven or eight are cut in two.
        let step = count.div_ceil(count.div_ceil(AT_ONCE));
        for from in (0..count).step_by(step) {
            let bytes = from..count.min(from + step);
            for (x, w) in x.chunks(MOST * self.bytes).zip(w.chunks(MOST)) {
                let mut out = Sums([[0; SIDE * SIDE]; AT_ONCE]);
                // SAFETY: as the caller promises.
                unsafe { products(x, w, (self.bytes, bytes.clone()), signed, &mut out) };
                for (out, p) in out.0.iter().zip(bytes.clone()) {
                    let place = 8 * (i + p);
                    for (sum, v) in sums.as_flattened_mut().iter_mut().zip(out) {
                        let v = if signed { i64::from(*v) as u64 } else { u64::from(*v as u32) };
                        *sum = sum.wrapping_add(v << place);
                    }
                }
            }
        }
    }
}

/// At most sixteen rows of weights, `n` apart, as tiles: byte by byte, chunk by chunk.
#[target_feature(enable = "avx512f")]
fn pack<W: Bytes>(w: &[W], n: usize, panel: &mut [Tile]) {
    let (chunks, have) = (n.div_ceil(DEEP), w.len() / n);
    for (i, tiles) in panel.chunks_exact_mut(chunks).enumerate() {
        for (s, row) in w.chunks_exact(n).enumerate() {
            for (from, tile) in row.chunks(DEEP).zip(tiles.iter_mut()) {
                tile.0[s * DEEP..].iter_mut().zip(from).for_each(|(to, v)| *to = v.byte(i));
            }
        }
        // Of the panel before.
        tiles.iter_mut().for_each(|tile| tile.0[have * DEEP..].fill(0));
    }
}

/// `out[p] = w x[p]` over all chunks, for the bytes `p` of `x`'s `all` in `bytes`.
///
/// # Safety
/// As [`Digits::tile`].
///
/// # Panics
/// For more bytes than there are registers, and for other numbers of chunks.
unsafe fn products(x: &[Tile], w: &[Tile], (all, bytes): (usize, Range<usize>), signed: bool, out: &mut Sums) {
    assert!(bytes.end <= all && x.len() == all * w.len() && !w.is_empty());
    /// The instruction and the registers of the sums.
    macro_rules! run {
        ($multiply:literal; $($p:literal)*) => {
            // SAFETY: `w` has a tile for each chunk and `x` one for each of its bytes, of which those from `bytes.start` on are read; `out`
            // has room for six. The registers are configured and released in here.
            unsafe {
                asm!(
                    "ldtilecfg [{config}]",
                    $(concat!("tilezero tmm", $p),)*
                    "2:",
                    "tileloadd tmm7, [{w} + {stride}]",
                    $(
                        concat!("tileloadd tmm6, [{x} + {stride} + 1024*", $p, "]"),
                        concat!($multiply, " tmm", $p, ", tmm7, tmm6"),
                    )*
                    "add {w}, 1024",
                    "add {x}, {step}",
                    "dec {chunks}",
                    "jnz 2b",
                    $(concat!("tilestored [{out} + {stride} + 1024*", $p, "], tmm", $p),)*
                    "tilerelease",
                    config = in(reg) &raw const CONFIG,
                    w = inout(reg) w.as_ptr() => _,
                    x = inout(reg) x.as_ptr().add(bytes.start) => _,
                    out = in(reg) &raw mut *out,
                    stride = in(reg) DEEP,
                    step = in(reg) all * size_of::<Tile>(),
                    chunks = inout(reg) w.len() => _,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                )
            }
        };
    }
    match (signed, bytes.len()) {
        (true, 1) => run!("tdpbsud"; 0),
        (true, 2) => run!("tdpbsud"; 0 1),
        (true, 3) => run!("tdpbsud"; 0 1 2),
        (true, 4) => run!("tdpbsud"; 0 1 2 3),
        (true, 5) => run!("tdpbsud"; 0 1 2 3 4),
        (true, 6) => run!("tdpbsud"; 0 1 2 3 4 5),
        (false, 1) => run!("tdpbuud"; 0),
        (false, 2) => run!("tdpbuud"; 0 1),
        (false, 3) => run!("tdpbuud"; 0 1 2),
        (false, 4) => run!("tdpbuud"; 0 1 2 3),
        (false, 5) => run!("tdpbuud"; 0 1 2 3 4),
        (false, 6) => run!("tdpbuud"; 0 1 2 3 4 5),
        (_, n) => panic!("{n} sums at once"),
    }
}
