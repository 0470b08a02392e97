//! Memory: few arenas, and what a session has used goes back to the system when it ends.

/// Lets all threads share two arenas. glibc would give each of a session's threads one of its own, and a session's peak would be
/// the sum of the peaks that they had at different times. Called before there are threads.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[allow(unsafe_code)]
pub fn few_arenas() {
    // SAFETY: sets a parameter of the allocator; no pointer is involved.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 2) };
}

/// Other allocators have none.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub fn few_arenas() {}

/// Hands back what the allocator keeps of freed memory. glibc keeps an arena per thread that was ever busy beside others, and
/// returns little of it by itself: after some sessions at once a daemon would hold several times of what it uses.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[allow(unsafe_code)]
pub(crate) fn freed_memory() {
    // SAFETY: takes the allocator's own locks; no pointer is involved.
    unsafe { libc::malloc_trim(0) };
}

/// Other allocators return memory by themselves.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub(crate) fn freed_memory() {}
