//! Instructions that this processor lacks, for tests of kernels that use them: the processor refuses each with a signal, whose handler does what
//! the manual says (Intel SDM, volume 2: VPMADD52LUQ, and chapter "AMX instruction set reference") and goes on behind it. Of the many
//! forms those are known that our kernels have; at any other the process ends as it would without us.
//!
//! Where the processor has the instructions, it runs them.

use std::arch::x86_64::__cpuid_count;
use std::cell::UnsafeCell;
use std::sync::Once;

/// Bytes of a row of a tile, and rows.
const ROW: usize = 64;
const ROWS: usize = 16;

/// The tile registers of a thread.
struct Tiles {
    configured: bool,
    registers: [[u8; ROW * ROWS]; 8],
}

thread_local! {
    static TILES: UnsafeCell<Tiles> = const { UnsafeCell::new(Tiles { configured: false, registers: [[0; ROW * ROWS]; 8] }) };
}

/// Runs `f`, whose instructions may be such.
pub fn with<R>(f: impl FnOnce() -> R) -> R {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        // SAFETY: the action is a handler of the three arguments that SA_SIGINFO promises, with an empty mask.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_flags = libc::SA_SIGINFO;
            action.sa_sigaction = refused as *const () as usize;
            assert_eq!(libc::sigaction(libc::SIGILL, &raw const action, std::ptr::null_mut()), 0);
        }
    });
    f()
}

/// Whether this thread's tile registers are in use.
pub fn tiles_in_use() -> bool {
    // SAFETY: nothing else has the thread's registers while this is read.
    TILES.with(|t| unsafe { (*t.get()).configured })
}

/// The handler.
extern "C" fn refused(_: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel gives the interrupted thread's context. The instruction at its address was read to be refused; the longest that is
    // known has 11 bytes, and is followed by more code of its function.
    unsafe {
        let machine = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext;
        let at = machine.gregs[libc::REG_RIP as usize] as *const u8;
        let code = std::slice::from_raw_parts(at, 11);
        match Instruction::decode(code).and_then(|i| i.run(machine)) {
            Some(length) => machine.gregs[libc::REG_RIP as usize] += length as i64,
            None => {
                // Refused once more, and not by us.
                libc::signal(libc::SIGILL, libc::SIG_DFL);
            }
        }
    }
}

/// Register numbers are as encoded, with all their bits.
struct Instruction {
    /// Of 512 bits with a mask (EVEX), or of tiles (VEX).
    evex: bool,
    opcode: u8,
    /// 0 none, 1 `66`, 2 `F3`, 3 `F2`.
    prefix: u8,
    reg: usize,
    other: usize,
    rm: Operand,
    mask: usize,
    zeroing: bool,
    length: usize,
}

enum Operand {
    Register(usize),
    /// Base, index with its scale if there is one, displacement.
    Memory(usize, Option<(usize, u32)>, i64),
}

impl Instruction {
    /// Of map 0F38, with a base register where there is memory.
    fn decode(code: &[u8]) -> Option<Instruction> {
        let bit = |byte: u8, at: u32| usize::from(!byte >> at & 1);
        let (evex, p0, p1, p2, at) = match code {
            [0x62, p0, p1, p2, ..] if p0 & 0x0f == 2 && p1 & 0x84 == 0x84 && p2 & 0x70 == 0x40 => {
                (true, *p0, *p1, *p2, 4)
            }
            [0xc4, p0, p1, ..] if p0 & 0x1f == 2 && p1 & 0x84 == 0 => (false, *p0, *p1, 0, 3),
            _ => return None,
        };
        let (opcode, modrm) = (code[at], code[at + 1]);
        let high = |v: usize, on: usize| if evex { v | on << 4 } else { v };
        let reg = high(usize::from(modrm >> 3 & 7) | bit(p0, 7) << 3, bit(p0, 4));
        let other = high(usize::from(!p1 >> 3 & 15), bit(p2, 3));
        let low = usize::from(modrm & 7);
        let mut at = at + 2;
        let rm = match modrm >> 6 {
            3 => Operand::Register(high(low | bit(p0, 5) << 3, bit(p0, 6))),
            form => {
                let (mut base, mut index) = (low, None);
                if low == 4 {
                    let sib = code[at];
                    at += 1;
                    base = usize::from(sib & 7);
                    let number = usize::from(sib >> 3 & 7) | bit(p0, 6) << 3;
                    index = (number != 4).then_some((number, u32::from(sib >> 6)));
                }
                let unit = if evex { ROW as i64 } else { 1 };
                let displacement = match form {
                    0 if base == 5 => return None,
                    0 => 0,
                    1 => i64::from(code[at] as i8) * unit,
                    _ => i64::from(i32::from_le_bytes(code[at..at + 4].try_into().ok()?)),
                };
                at += [0, 1, 4][usize::from(form)];
                Operand::Memory(base | bit(p0, 5) << 3, index, displacement)
            }
        };
        let (mask, zeroing) = (usize::from(p2 & 7), p2 & 0x80 != 0);
        Some(Instruction { evex, opcode, prefix: p1 & 3, reg, other, rm, mask, zeroing, length: at })
    }

    /// Gives its length, if it is one of ours.
    ///
    /// # Safety
    /// It is the one that `machine` was interrupted at.
    unsafe fn run(&self, machine: &mut libc::mcontext_t) -> Option<usize> {
        // SAFETY: the caller's; the thread's own registers, which nothing else has meanwhile.
        unsafe {
            if self.evex { self.run_wide(machine) } else { TILES.with(|t| self.run_tiles(&mut *t.get(), machine)) }?;
        }
        Some(self.length)
    }

    /// `vpmadd52luq` of 512 bits.
    unsafe fn run_wide(&self, machine: &mut libc::mcontext_t) -> Option<()> {
        if (self.opcode, self.prefix) != (0xb4, 1) {
            return None;
        }
        // SAFETY: the kernel has saved the registers there, all of them, since the processor has AVX-512.
        unsafe {
            let saved = Saved(machine.fpregs.cast());
            let b = match self.rm {
                Operand::Register(r) => saved.wide(r),
                Operand::Memory(base, index, displacement) => {
                    let index = index.map_or(0, |(i, scale)| general(machine, i) << scale);
                    let at = general(machine, base).wrapping_add(index).wrapping_add(displacement);
                    (at as *const [u64; 8]).read_unaligned()
                }
            };
            let (a, mut out) = (saved.wide(self.other), saved.wide(self.reg));
            let mask = if self.mask == 0 { u64::MAX } else { saved.mask(self.mask) };
            let low = (1u64 << 52) - 1;
            for (i, out) in out.iter_mut().enumerate() {
                if mask >> i & 1 == 1 {
                    let product = u128::from(a[i] & low) * u128::from(b[i] & low);
                    *out = out.wrapping_add(product as u64 & low);
                } else if self.zeroing {
                    *out = 0;
                }
            }
            saved.set_wide(self.reg, out);
        }
        Some(())
    }

    /// Instructions on tiles, all of which have full size.
    unsafe fn run_tiles(&self, tiles: &mut Tiles, machine: &libc::mcontext_t) -> Option<()> {
        let address = |base: usize, displacement: i64| general(machine, base).wrapping_add(displacement);
        match (self.opcode, self.prefix, &self.rm) {
            // ldtilecfg
            (0x49, 0, Operand::Memory(base, None, displacement)) => {
                // SAFETY: the instruction reads 64 bytes there.
                let config = unsafe { (address(*base, *displacement) as *const [u8; 64]).read_unaligned() };
                let full = (0..8).all(|i| config[16 + 2 * i] == 64 && config[17 + 2 * i] == 0 && config[48 + i] == 16);
                if config[0] != 1 || !full || config[1..16].iter().any(|b| *b != 0) {
                    return None;
                }
                *tiles = Tiles { configured: true, registers: [[0; ROW * ROWS]; 8] };
            }
            // tilerelease
            (0x49, 0, Operand::Register(0)) if self.reg == 0 => tiles.configured = false,
            _ if !tiles.configured => return None,
            // tilezero
            (0x49, 3, Operand::Register(0)) => tiles.registers[self.reg] = [0; ROW * ROWS],
            // tileloadd, tilestored
            (0x4b, 2 | 3, Operand::Memory(base, Some((index, scale)), displacement)) => {
                let stride = general(machine, *index) << scale;
                for (r, row) in tiles.registers[self.reg].chunks_exact_mut(ROW).enumerate() {
                    let at = address(*base, *displacement).wrapping_add(r as i64 * stride);
                    // SAFETY: the instruction reads, or writes, 64 bytes there.
                    unsafe {
                        if self.prefix == 3 {
                            std::ptr::copy_nonoverlapping(at as *const u8, row.as_mut_ptr(), ROW);
                        } else {
                            std::ptr::copy_nonoverlapping(row.as_ptr(), at as *mut u8, ROW);
                        }
                    }
                }
            }
            // tdpbuud, tdpbusd, tdpbsud, tdpbssd: the first source is the operand `rm`, the second the other.
            (0x5e, prefix, Operand::Register(first)) => {
                let (a, b) = (tiles.registers[*first], tiles.registers[self.other]);
                let (a_signed, b_signed) = (matches!(prefix, 2 | 3), matches!(prefix, 1 | 3));
                let number = |byte: u8, signed: bool| if signed { i32::from(byte as i8) } else { i32::from(byte) };
                for (i, sum) in tiles.registers[self.reg].chunks_exact_mut(4).enumerate() {
                    let (m, n) = (i / ROWS, i % ROWS);
                    let mut total = i32::from_le_bytes([sum[0], sum[1], sum[2], sum[3]]);
                    for k in 0..ROW {
                        let (a, b) = (a[m * ROW + k], b[k / 4 * ROW + 4 * n + k % 4]);
                        total = total.wrapping_add(number(a, a_signed) * number(b, b_signed));
                    }
                    sum.copy_from_slice(&total.to_le_bytes());
                }
            }
            _ => return None,
        }
        Some(())
    }
}

/// A general register by its number.
fn general(machine: &libc::mcontext_t, number: usize) -> i64 {
    let first = [
        libc::REG_RAX,
        libc::REG_RCX,
        libc::REG_RDX,
        libc::REG_RBX,
        libc::REG_RSP,
        libc::REG_RBP,
        libc::REG_RSI,
        libc::REG_RDI,
    ];
    let at = if number < 8 { first[number] as usize } else { libc::REG_R8 as usize + number - 8 };
    machine.gregs[at]
}

/// The registers as XSAVE lays them out.
struct Saved(*mut u8);

/// Parts of a wide register, with the number of their state: the lowest 128 bits lie in the area that all processors have.
const UPPER_128: u32 = 2;
const MASKS: u32 = 5;
const UPPER_256: u32 = 6;
const SECOND_16: u32 = 7;

impl Saved {
    /// Where a state is, for `write` marked as in use; what is not is zeros.
    unsafe fn state(&self, number: u32, write: bool) -> Option<*mut u8> {
        let layout = __cpuid_count(0xd, number);
        // SAFETY: the header follows the 512 bytes of the first area, the state is as far as the processor says.
        unsafe {
            let used = self.0.add(512).cast::<u64>();
            let state = self.0.add(layout.ebx as usize);
            if *used >> number & 1 == 0 {
                if !write {
                    return None;
                }
                state.write_bytes(0, layout.eax as usize);
                *used |= 1 << number;
            }
            Some(state)
        }
    }

    /// Where the words of a register are: number of the state (none for the first area), offset in it, words.
    fn parts(register: usize) -> [(Option<u32>, usize, usize); 3] {
        match register {
            0..16 => [
                (None, 160 + 16 * register, 2),
                (Some(UPPER_128), 16 * register, 2),
                (Some(UPPER_256), 32 * register, 4),
            ],
            _ => [(Some(SECOND_16), 64 * (register - 16), 8), (None, 0, 0), (None, 0, 0)],
        }
    }

    unsafe fn wide(&self, register: usize) -> [u64; 8] {
        let (mut out, mut at) = ([0; 8], 0);
        for (state, offset, words) in Self::parts(register) {
            // SAFETY: the caller's; a part lies in its state.
            unsafe {
                let from = state.map_or(Some(self.0), |n| self.state(n, false));
                if let Some(from) = from {
                    std::ptr::copy_nonoverlapping(from.add(offset), out[at..].as_mut_ptr().cast(), 8 * words);
                }
            }
            at += words;
        }
        out
    }

    unsafe fn set_wide(&self, register: usize, v: [u64; 8]) {
        let mut at = 0;
        for (state, offset, words) in Self::parts(register) {
            // SAFETY: as above.
            unsafe {
                let to = state.map_or(Some(self.0), |n| self.state(n, true));
                if let Some(to) = to {
                    std::ptr::copy_nonoverlapping(v[at..].as_ptr().cast(), to.add(offset), 8 * words);
                }
            }
            at += words;
        }
    }

    unsafe fn mask(&self, register: usize) -> u64 {
        // SAFETY: as above.
        unsafe { self.state(MASKS, false).map_or(0, |masks| masks.cast::<u64>().add(register).read_unaligned()) }
    }
}
