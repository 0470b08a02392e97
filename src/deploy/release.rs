//! Memory: few arenas, and what a session has used goes back to the system when it ends.

/// Lets all threads share two arenas. glibc would give each of a session's threads one of its own, and a session's peak would be
/// the sum of the peaks that they had at different times. And keeps freed pages for the next operation: to hand a pass's vectors
/// back to the system and have them zeroed anew costs a tenth of a prefill. Called before there are threads.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[allow(unsafe_code)]
pub fn tune_allocator() {
    // SAFETY: sets parameters of the allocator; no pointer is involved.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 2);
        // The largest that glibc takes; it would come to it by itself, but for the line below.
        libc::mallopt(libc::M_MMAP_THRESHOLD, 32 << 20);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 256 << 20);
    }
}

/// Other allocators have none.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub fn tune_allocator() {}

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
