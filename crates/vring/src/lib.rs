//! Guest memory and the vrings in it.
//!
//! # Theory of operation
//!
//! A front end shares its guest's memory ([`GuestMemory`]) and names places in it that are rings ([`RingSetup`]). On the
//! device side a [`TxRing`] gives frames that the guest sends, a burst at a time, and an [`RxRing`] takes frames for it.
//! A [`Burst`] in between holds the frames where they are: payload goes from the sender's memory into the receiver's by
//! one copy. Beware of the words: *TX* and *RX* are the guest's view, so a switch *receives* from a TX ring.
//!
//! ```text
//!   guest A memory                    worker                      guest B memory
//!   ┌──────────────┐  dequeue   ┌──────────────────┐  enqueue   ┌──────────────┐
//!   │ TX ring      ├───────────►│ Burst: heads     ├───────────►│ RX ring      │
//!   │ buffers      ├ ─ ─ ─ ─ ─ ─│─ ─ ─ payload ─ ─ ┼ ─ ─ ─ ─ ─ ►│ buffers      │
//!   │              │◄───────────┤ complete         │            │              │
//!   └──────────────┘            └──────────────────┘            └──────────────┘
//! ```
//!
//! Everything in guest memory is hostile. Every word is fetched once, checked, and only then used; every address is
//! checked with its length; chains are bounded. What is wrong with one chain is a [`ChainFault`]: the chain is returned
//! and the ring goes on. What is wrong with the ring is a [`RingFault`]: it is stopped, and the front end must set it up
//! again. Neither can be seen from another port.
//!
//! [`driver`] is the other side: what a guest does, for tests, benches, the demo and ports that attach as a front end.
//!
//! This crate and `sys` are the only ones with `unsafe` code.
#![allow(unsafe_code)]

mod burst;
mod copy;
mod descriptor;
mod device;
pub mod driver;
pub mod features;
#[cfg(all(test, not(loom)))]
mod heap;
mod layout;
#[cfg(feature = "limit")]
pub mod limit;
mod memory;
mod notify;
mod packed;
mod rx;
mod setup;
mod split;
mod tx;

pub use burst::{BURST_MAX, Burst, ChainFault, FRAME_LEN_MAX, Frames, HEAD_LEN, HEADER_LEN};
pub use descriptor::{DESC_INDIRECT, DESC_NEXT, DESC_WRITE, Descriptor};
pub use device::RingFault;
pub use memory::{GuestMemory, MemoryError, PORT_BYTES_MAX, RegionSpec, TOTAL_BYTES_MAX};
pub use rx::{Enqueued, RxRing};
pub use setup::RingSetup;
pub use tx::{TxBurst, TxRing};

/// Descriptors of a ring at the most (virtio 1.2, 2.7 and 2.8).
pub const SIZE_MAX: u16 = 32_768;

/// Why a ring cannot start.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// The port has no such queue.
    #[error("there is no vring {0}: plug the port with more queues")]
    Index(u16),
    /// Size not possible.
    #[error("a ring cannot have {0} descriptors: use up to {SIZE_MAX}, in a split ring a power of two")]
    Size(u16),
    /// Position outside of the ring.
    #[error("the base {0:#x} is no position in this ring")]
    Base(u32),
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
