//! Memory that a session has used goes back to the system when it ends.

/// Hands back what the allocator keeps of freed memory. glibc keeps an arena per thread that was ever busy beside others, and
/// returns little of it by itself: after some sessions at once a daemon would hold several times of what it uses.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[allow(unsafe_code)]
pub(super) fn freed_memory() {
    // SAFETY: takes the allocator's own locks; no pointer is involved.
    unsafe { libc::malloc_trim(0) };
}

/// Other allocators return memory by themselves.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub(super) fn freed_memory() {}
