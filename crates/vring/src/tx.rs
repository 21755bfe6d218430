//! The device's side of a TX ring: frames come from the guest.
//!
//! [`TxRing::dequeue`] goes over a burst in short passes, so that the memory a pass needs was asked for by the one
//! before: heads (prefetch descriptors) → descriptors (translate, prefetch payload) → first bytes into private memory.
//! [`TxBurst::complete`] returns the chains when the frames are where they should be: until then the buffers are ours.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use crate::RingError;
use crate::burst::{BURST, BURST_MAX, Burst, ChainFault, FRAME_LEN_MAX, Frames};
use crate::copy::prefetch;
use crate::device::{DeviceRing, RingFault, ring_handle};
use crate::memory::GuestMemory;
use crate::setup::RingSetup;
use crate::split::{DESC_INDIRECT, DESC_NEXT, DESC_WRITE, Descriptor};

ring_handle!(TxRing);

/// A running TX ring.
pub struct TxRing {
    ring: DeviceRing,
}

/// Frames of one TX ring that are being forwarded. Dropped without [`TxBurst::complete`], the chains are still the
/// driver's and will come again.
pub struct TxBurst<'m> {
    /// The frames.
    pub burst: Burst<'m>,
    ring: &'m mut DeviceRing,
    heads: [u16; BURST_MAX],
}

impl TxRing {
    /// Starts a ring at the position that the set-up names.
    pub fn start(setup: RingSetup, memory: &Arc<GuestMemory>) -> Result<Self, RingError> {
        Ok(Self { ring: DeviceRing::start(setup, memory)? })
    }

    /// Takes up to [`BURST_MAX`] frames; an empty burst if there are none.
    ///
    /// On an error the ring must not be used any more.
    #[inline]
    pub fn dequeue<'m>(&'m mut self, frames: &'m mut Frames) -> Result<TxBurst<'m>, RingFault> {
        let ring = &mut self.ring;
        frames.clear();
        ring.begin_burst();
        let mut heads = [0u16; BURST_MAX];
        let count = ring.available(BURST)?.min(BURST);
        if count != 0 {
            for (i, head) in (0..count).zip(&mut heads) {
                *head = ring.split.avail_entry(ring.next.wrapping_add(i));
                ring.split.prefetch_descriptor(*head);
            }
            fetch_chains(ring, frames, &heads[..usize::from(count)])?;
            // SAFETY: every piece in `frames` was translated in `ring.memory` with its whole length, or with the room
            // that it was pushed with.
            unsafe { frames.fetch_heads(ring.header_len) };
        }
        // Also if there is nothing: an index of 0 may be that of a page put in place of a lost one.
        ring.check_memory()?;
        // SAFETY: every piece in `frames` was translated in `ring.memory`, which `ring` holds and nobody can replace
        // while the burst borrows it.
        let burst = unsafe { Burst::new(frames) };
        Ok(TxBurst { burst, ring, heads })
    }

    /// Whether there is something to take, without taking it.
    #[inline]
    pub fn is_empty(&mut self) -> Result<bool, RingFault> {
        Ok(self.ring.available(1)? == 0)
    }

    /// Asks the guest for a kick on the next frame. False if frames came meanwhile: poll again, no kick comes for them.
    pub fn arm(&mut self) -> bool {
        self.ring.arm()
    }

    /// Asks the guest for no kicks: it is being polled.
    pub fn disarm(&mut self) {
        self.ring.disarm();
    }

    /// Guest → us.
    pub fn kick_fd(&self) -> Option<BorrowedFd<'_>> {
        self.ring.kick_fd()
    }
}

/// Second pass: descriptors into places.
#[inline]
fn fetch_chains(ring: &mut DeviceRing, frames: &mut Frames, heads: &[u16]) -> Result<(), RingFault> {
    // From the shortest frame to the longest, the ring's header included.
    let lengths = ring.header_len + 14..=FRAME_LEN_MAX + ring.header_len;
    for &entry in heads {
        let Some(descriptor) = ring.split.descriptor(entry) else {
            return Err(RingFault::Head { entry, size: ring.split.size() });
        };
        let single = descriptor.flags & (DESC_NEXT | DESC_WRITE | DESC_INDIRECT) == 0;
        if single
            && lengths.contains(&descriptor.len)
            && let Some((at, room)) = ring.translate(descriptor.addr, descriptor.len)
        {
            prefetch(at);
            prefetch(at.wrapping_add(64));
            frames.push_single(at, descriptor.len, room);
        } else {
            fetch_chain(ring, frames, descriptor);
            if !frames.has_room() || ring.walked_enough() {
                break;
            }
        }
    }
    Ok(())
}

/// A chain that is not simply one buffer in one region: walks it with every check.
#[inline(never)]
fn fetch_chain(ring: &mut DeviceRing, frames: &mut Frames, descriptor: Descriptor) {
    let first = frames.begin_chain();
    let longest = FRAME_LEN_MAX + ring.header_len;
    let mut len = 0u32;
    let walked = ring.walk(descriptor, false, |at, part| {
        len = len.saturating_add(part);
        len <= longest && frames.push_piece(at, part)
    });
    match walked {
        Ok(()) if len < ring.header_len + 14 => frames.abandon_chain(first, ChainFault::Short),
        Ok(()) => frames.end_chain(first, len),
        Err(fault) => frames.abandon_chain(first, fault),
    }
}

impl TxBurst<'_> {
    /// Notes that a system call ran into memory of this burst that is not there any more (EFAULT): the front end
    /// truncated it. The ring is found broken at its next use.
    pub fn count_fault(&self) {
        self.ring.memory.count_fault();
    }

    /// Returns all chains to the driver. True if it wants to be called.
    #[inline]
    pub fn complete(self) -> bool {
        let count = self.burst.len().min(BURST_MAX);
        if count == 0 {
            return false;
        }
        let ring = self.ring;
        let mut used = ring.used;
        for &head in &self.heads[..count] {
            // Nothing was written into a TX buffer, so its length is 0 (virtio 1.2, 2.7.8).
            ring.split.set_used(used, head, 0);
            used = used.wrapping_add(1);
        }
        #[allow(clippy::cast_possible_truncation)]
        let taken = count as u16;
        ring.next = ring.next.wrapping_add(taken);
        ring.publish(used)
    }
}
