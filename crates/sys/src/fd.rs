//! Descriptors of crates that know only raw ones.

use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};

/// Makes a descriptor a `T`, which owns it from then on.
pub fn adopt<T: FromRawFd>(fd: OwnedFd) -> T {
    // SAFETY: the descriptor is open, and nobody else owns it.
    unsafe { T::from_raw_fd(fd.into_raw_fd()) }
}
