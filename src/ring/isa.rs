//! Which instruction set the kernels use: the best that the processor has, or what `TREFOIL_ISA` asks for. Kernels
//! take an [`Isa`] value, so tests and benches can run every path in one process.

use std::sync::OnceLock;

/// An instruction set that kernels are written for, in rising order of preference.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// Plain Rust; on every machine.
    Portable,
    /// On ARM: 128-bit vectors with dot products of bytes (NEON and its extension of ARMv8.2).
    Neon,
    /// 256-bit vectors, 64-bit products from 32-bit ones.
    Avx2,
    /// 512-bit vectors with 64-bit products and mask registers (F, DQ, BW and VL).
    Avx512,
    /// The same, with 16-bit products that add ([`Isa::Avx512`] and VNNI).
    Vnni,
    /// The same, with 52-bit products that add ([`Isa::Vnni`] and IFMA).
    Ifma,
    /// The same, with tiles of bytes ([`Isa::Ifma`] and AMX INT8, which the operating system permits).
    Amx,
}

impl Isa {
    /// All, from the plainest to the fastest.
    pub const ALL: [Isa; 7] = [Isa::Portable, Isa::Neon, Isa::Avx2, Isa::Avx512, Isa::Vnni, Isa::Ifma, Isa::Amx];

    /// What this process uses: `TREFOIL_ISA` (`portable`, `neon`, `avx2`, `avx512`, `vnni`, `ifma` or `amx`) where it is set, else the best that the
    /// processor has. Read once. A name that is unknown or that the processor lacks is reported on standard error and
    /// means `portable`: someone who forces a path is looking for a defect, and must not get a third one silently.
    #[must_use]
    pub fn current() -> Isa {
        static CURRENT: OnceLock<Isa> = OnceLock::new();
        *CURRENT.get_or_init(|| {
            let asked = std::env::var_os("TREFOIL_ISA").map(|v| v.to_string_lossy().into_owned());
            let (isa, complaint) = Isa::choose(asked.as_deref());
            if let Some(complaint) = complaint {
                eprintln!("trefoil: {complaint}");
            }
            isa
        })
    }

    /// Whether this processor (and operating system) can run it; of those that our tests only emulate, whether their first product here was
    /// right.
    #[must_use]
    pub fn supported(self) -> bool {
        match self {
            Isa::Portable => true,
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => {
                std::arch::is_aarch64_feature_detected!("neon") && std::arch::is_aarch64_feature_detected!("dotprod")
            }
            #[cfg(not(target_arch = "aarch64"))]
            Isa::Neon => false,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => is_x86_feature_detected!("avx2"),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Vnni => Isa::Avx512.supported() && is_x86_feature_detected!("avx512vnni"),
            #[cfg(target_arch = "x86_64")]
            Isa::Ifma => {
                Isa::Vnni.supported() && is_x86_feature_detected!("avx512ifma") && super::gemm::proof::of_ifma()
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Amx => Isa::Ifma.supported() && super::gemm::tiles_permitted() && super::gemm::proof::of_amx(),
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx2 | Isa::Avx512 | Isa::Vnni | Isa::Ifma | Isa::Amx => false,
        }
    }

    /// The ones that this processor can run.
    pub fn available() -> impl Iterator<Item = Isa> {
        Isa::ALL.into_iter().filter(|isa| isa.supported())
    }

    /// The name that `TREFOIL_ISA` knows it by.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Isa::Portable => "portable",
            Isa::Neon => "neon",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Vnni => "vnni",
            Isa::Ifma => "ifma",
            Isa::Amx => "amx",
        }
    }

    /// Itself where the processor has it, else portable. Every kernel passes through here before it enters code that
    /// assumes the instructions, so an `Isa` made by hand is safe.
    pub(super) fn or_portable(self) -> Isa {
        if self.supported() { self } else { Isa::Portable }
    }

    /// The choice for one setting of `TREFOIL_ISA`, and what to tell the user about it.
    fn choose(asked: Option<&str>) -> (Isa, Option<String>) {
        let Some(asked) = asked.filter(|a| !a.is_empty()) else {
            return (Isa::available().last().unwrap_or(Isa::Portable), None);
        };
        match Isa::ALL.into_iter().find(|isa| isa.name() == asked) {
            Some(isa) if isa.supported() => (isa, None),
            Some(_) => (
                Isa::Portable,
                Some(format!("TREFOIL_ISA={asked}: this processor or its system lacks it; using portable")),
            ),
            None => (
                Isa::Portable,
                Some(format!(
                    "TREFOIL_ISA={asked} is not one of portable, neon, avx2, avx512, vnni, ifma, amx; using portable"
                )),
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forced_path_is_kept_or_portable() {
        let best = Isa::available().last().unwrap();
        assert_eq!(Isa::choose(None), (best, None));
        assert_eq!(Isa::choose(Some("")), (best, None));
        assert_eq!(Isa::choose(Some("portable")), (Isa::Portable, None));
        let (isa, complaint) = Isa::choose(Some("sse9"));
        assert_eq!(isa, Isa::Portable);
        assert!(complaint.unwrap().contains("sse9"));
        for isa in Isa::ALL {
            let (got, complaint) = Isa::choose(Some(isa.name()));
            assert_eq!(got, isa.or_portable());
            assert_eq!(complaint.is_some(), !isa.supported());
        }
    }
}
