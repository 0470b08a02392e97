//! This machine: who may read what, processor, memory, disk.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use super::super::config::{Config, Party};
use super::super::party::Need;
use super::super::wire::Status as Running;
use super::Finding;
use super::models::Model;
use crate::party::Role;
use crate::predict::PROCESS;
use crate::ring::Isa;

/// Files that hold secrets, and directories with such files.
pub(super) fn files(config: &Config) -> Vec<Finding> {
    let mut secret: Vec<PathBuf> = Vec::new();
    let mut directories: Vec<&Path> = config.store().into_iter().collect();
    match config.party() {
        Party::Owner { preparation, .. } => {
            secret.extend(["seed", "owner.bin", "half.sha256"].map(|name| preparation.join(name)));
            directories.push(preparation);
        }
        Party::Helper { store, .. } => {
            let entries = std::fs::read_dir(store).into_iter().flatten().flatten().map(|e| e.path());
            let halves = entries.flat_map(|dir| ["half.bin", "half.part", "half.sha256"].map(|n| dir.join(n)));
            secret.extend(halves.filter(|path| path.exists()));
        }
        Party::Client { .. } => {}
    }
    // That the key file is closed is looked at where it is read.
    let mut out: Vec<Finding> = secret.iter().filter_map(|path| closed(path)).collect();
    out.extend(directories.into_iter().filter_map(directory));
    if out.is_empty() {
        let others = if config.role() == Role::Client {
            "the client keeps nothing secret but its key"
        } else {
            "closed to others"
        };
        out.push(Finding::ok("permissions", others));
    }
    out
}

fn mode(path: &Path) -> Option<u32> {
    std::fs::metadata(path).ok().map(|m| m.permissions().mode() & 0o777)
}

fn closed(path: &Path) -> Option<Finding> {
    let mode = match std::fs::metadata(path) {
        Ok(m) => m.permissions().mode() & 0o777,
        Err(e) => {
            let remedy = "restore it from a backup, or prepare the model anew (trefoil prepare)";
            return Some(Finding::fail("files", format!("{}: {e}", path.display()), remedy));
        }
    };
    (mode & 0o077 != 0).then(|| {
        let found = format!("{} is open to others (mode {mode:04o})", path.display());
        let remedy = format!(
            "chmod 600 {}; if somebody may have read it, prepare the model anew: a new seed makes the old one worthless",
            path.display()
        );
        Finding::fail("permissions", found, remedy)
    })
}

fn directory(path: &Path) -> Option<Finding> {
    let mode = mode(path)?;
    let found = |what: &str| format!("others may {what} the directory {} (mode {mode:04o})", path.display());
    let remedy = format!("chmod 700 {}", path.display());
    if mode & 0o022 != 0 {
        Some(Finding::fail("permissions", found("change"), remedy))
    } else if mode & 0o055 != 0 {
        Some(Finding::warn("permissions", found("look into"), remedy))
    } else {
        None
    }
}

/// What the kernels run on.
pub(super) fn processor() -> Vec<Finding> {
    let best = Isa::available().last().unwrap_or(Isa::Portable);
    let used = Isa::current();
    let isa = if used < best {
        let found = format!("kernels use {}, although this processor has {}", used.name(), best.name());
        Finding::warn("processor", found, "unset TREFOIL_ISA, which is for tests")
    } else if best == Isa::Portable {
        let (lacks, with) = if cfg!(target_arch = "aarch64") {
            ("no dot products of bytes", "them (ARMv8.2 and later)")
        } else {
            ("neither AVX2 nor AVX-512", "AVX2 (2013 and later)")
        };
        let mend = format!("use a processor with {with}; in a virtual machine, pass its features through");
        Finding::warn("processor", format!("{lacks}: kernels run several times slower"), mend)
    } else {
        Finding::ok("processor", format!("kernels use {}", used.name()))
    };
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let cores = match cores {
        1 => Finding::warn("cores", "one core", "run-ahead work competes with answering: two cores or more are better"),
        n => Finding::ok("cores", format!("{n} cores")),
    };
    vec![isa, cores]
}

/// Bytes that programs can still take: of the machine, or of the container that this is.
pub(crate) fn available() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    let machine = line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()?.saturating_mul(1024);
    let group = |name: &str| std::fs::read_to_string(format!("/sys/fs/cgroup/memory.{name}")).ok()?.trim().parse().ok();
    let container: Option<u64> =
        group("max").zip(group("current")).map(|(max, now): (u64, u64)| max.saturating_sub(now));
    Some(container.map_or(machine, |c| c.min(machine)))
}

/// Bytes for people.
pub(crate) fn gb(bytes: u64) -> String {
    if bytes < 100_000_000 { format!("{:.1} MB", bytes as f64 / 1e6) } else { format!("{:.2} GB", bytes as f64 / 1e9) }
}

/// What this party needs by prediction, against what it may take and what there is.
pub(super) fn memory(config: &Config, model: &Model, running: Option<&Running>) -> Vec<Finding> {
    let (role, limits) = (config.role(), config.limits());
    let free = available();
    let needs: Vec<Need> = model
        .known
        .iter()
        .filter_map(|m| {
            let config = m.model_config().ok()?;
            Some(Need::of(role, limits, &config, &m.plan, limits.run_ahead_bytes as u64))
        })
        .collect();
    if needs.is_empty() {
        let have = free.map_or("unknown".into(), gb);
        return vec![Finding::ok(
            "memory",
            format!("{have} available; without a model there is nothing to compare with"),
        )];
    }
    let sessions = if role == Role::Client { 1 } else { limits.sessions as u64 };
    // The Helper keeps two preparations in memory.
    let kept = needs.iter().take(2).map(|n| n.model).sum::<u64>();
    let session = needs.iter().map(|n| n.session).max().unwrap_or(0);
    let one = kept.saturating_add(session);
    let all = kept.saturating_add(session.saturating_mul(sessions));
    let need = format!(
        "the model takes {}, a session up to {}, {sessions} of them with it {}",
        gb(kept),
        gb(session),
        gb(all)
    );
    let fit = |have: u64| have.saturating_sub(kept) / session.max(1);
    let smaller = "lower prompt_tokens, run_ahead_mb or sessions in [limits], or prepare with a shorter --context";
    let mut out = Vec::new();
    let limit = limits.memory_bytes;
    out.push(if one > limit {
        let found = format!("{need}; [limits] memory_gb allows {}: no session can be served", gb(limit));
        Finding::fail(
            "memory limit",
            found,
            format!("raise memory_gb to {:.3} or more, or {smaller}", all as f64 / 1e9),
        )
    } else if all > limit {
        let found = format!("{need}; [limits] memory_gb allows {}: {} sessions at once", gb(limit), fit(limit));
        Finding::warn("memory limit", found, format!("raise memory_gb to {:.3}, or {smaller}", all as f64 / 1e9))
    } else {
        Finding::ok("memory limit", format!("{need}; [limits] memory_gb allows {}", gb(limit)))
    });
    if let Some(free) = free {
        // A daemon that runs has its model already.
        let (have, with) = match running {
            Some(_) => (free.saturating_add(kept), " beside the running daemon"),
            None => (free.saturating_sub(PROCESS), ""),
        };
        out.push(if one > have {
            let found = format!("{need}; available{with}: {}", gb(free));
            Finding::fail("memory", found, format!("end other programs, use a larger machine, or {smaller}"))
        } else if all > have {
            let found = format!("{need}; available{with}: {}, enough for {} sessions", gb(free), fit(have));
            Finding::warn(
                "memory",
                found,
                format!("set [limits] memory_gb to what there is, use a larger machine, or {smaller}"),
            )
        } else {
            Finding::ok("memory", format!("{} available{with}", gb(free)))
        });
    }
    out
}

/// Enough for anybody's state, and for the log beside it.
const LEAST_FREE: u64 = 50_000_000;

/// Room for what is kept: the Helper's halves, and the ids of sessions.
pub(super) fn disk(config: &Config, model: &Model) -> Option<Finding> {
    let store = config.store()?;
    // Of the directory that it will be made in, if it is not there yet.
    let at = store.ancestors().find(|p| p.is_dir()).unwrap_or(Path::new("."));
    let name = store.display();
    let free = match rustix::fs::statvfs(at) {
        Ok(s) => s.f_bavail.saturating_mul(s.f_frsize),
        Err(e) => {
            let found = format!("{name}: {e}");
            return Some(Finding::warn("disk", found, "correct [model] store, or the permissions of its directory"));
        }
    };
    let largest = model.known.iter().map(|m| m.half.bytes).max().unwrap_or(0);
    Some(if free < LEAST_FREE {
        Finding::fail(
            "disk",
            format!("{} free at {name}", gb(free)),
            "free some space, or move [model] store to another disk",
        )
    } else if config.role() == Role::Helper && free < model.missing {
        let found =
            format!("{} free at {name}; a preparation that is coming in needs {} more", gb(free), gb(model.missing));
        Finding::fail("disk", found, "free some space, or move [model] store to another disk")
    } else if config.role() == Role::Helper && free < largest {
        let found = format!(
            "{} free at {name}, less than another preparation such as those here takes ({})",
            gb(free),
            gb(largest)
        );
        Finding::warn("disk", found, "remove preparations that no owner uses any more (their directories in the store)")
    } else {
        Finding::ok("disk", format!("{} free at {name}", gb(free)))
    })
}
