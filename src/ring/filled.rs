//! Shared slices that are made in place.
//!
//! `Vec` into `Arc<[T]>` copies: for a moment a matrix is there twice, and what is freed stays with the allocator.

use std::sync::Arc;

/// `n` elements behind a counter, written by `fill`: there is never a second copy of them.
pub(crate) fn filled<T: Copy + Default>(n: usize, fill: impl FnOnce(&mut [T])) -> Arc<[T]> {
    // Of an iterator that knows its length, the slice is allocated once.
    let mut all: Arc<[T]> = std::iter::repeat_n(T::default(), n).collect();
    // Nobody else has it yet: this is no copy.
    fill(Arc::make_mut(&mut all));
    all
}

/// [`filled`] by what can fail.
///
/// # Errors
/// Those of `fill`.
pub(crate) fn try_filled<T: Copy + Default, E>(
    n: usize,
    fill: impl FnOnce(&mut [T]) -> Result<(), E>,
) -> Result<Arc<[T]>, E> {
    let mut done = Ok(());
    let all = filled(n, |all| done = fill(all));
    done.map(|()| all)
}
