//! Guest memory and the rings in it.
#![allow(unsafe_code)]
mod memory;
mod setup;
pub use memory::{GuestMemory, MemoryError, RegionSpec};
pub use setup::RingSetup;

/// Why a ring cannot start.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// Size not possible.
    #[error("a split ring cannot have {0} descriptors: use a power of two up to 32768")]
    Size(u16),
    /// Part of the ring is outside of guest memory or spans two regions.
    #[error("the {part} at user address {addr:#x} ({len} bytes) does not lie in one region of guest memory")]
    Unmapped {
        /// Which area.
        part: &'static str,
        /// Front end's address of it.
        addr: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// Part of the ring is not aligned (virtio 1.2, 2.7).
    #[error("the {part} at user address {addr:#x} is not aligned to {align} bytes")]
    Unaligned {
        /// Which area.
        part: &'static str,
        /// Front end's address of it.
        addr: u64,
        /// Needed alignment in bytes.
        align: u64,
    },
}
