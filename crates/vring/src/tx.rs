//! The device's side of a TX ring: frames come from the guest.
//!
//! [`TxRing::dequeue`] goes over a burst in short passes, so that the memory a pass needs was asked for by the one
//! before: prefetch descriptors → descriptors (translate, prefetch payload) → first bytes into private memory.
//! [`TxBurst::complete`] returns the chains when the frames are where they should be: until then the buffers are ours.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use crate::RingError;
use crate::burst::{BURST, BURST_MAX, Burst, ChainFault, FRAME_LEN_MAX, Frames};
use crate::copy::prefetch;
use crate::descriptor::{DESC_INDIRECT, DESC_NEXT, DESC_WRITE, Descriptor};
use crate::device::{AnyRing, DeviceRing, RingFault, either, ring_handle};
use crate::layout::Layout;
use crate::memory::GuestMemory;
use crate::setup::RingSetup;

ring_handle!(TxRing);

/// A running TX ring.
pub struct TxRing {
    ring: AnyRing,
}

/// Frames of one TX ring that are being forwarded. Dropped without [`TxBurst::complete`], the chains are still the
/// driver's and will come again.
pub struct TxBurst<'m> {
    /// The frames.
    pub burst: Burst<'m>,
    ring: &'m mut AnyRing,
    taken: Taken,
}

/// The chains of a burst: (id, slots), one a frame.
struct Taken {
    chains: [(u16, u16); BURST_MAX],
    /// Position behind the last of them.
    next: u16,
}

impl TxRing {
    /// Starts a ring at the position that the set-up names.
    pub fn start(setup: RingSetup, memory: &Arc<GuestMemory>) -> Result<Self, RingError> {
        Ok(Self { ring: AnyRing::start(setup, memory)? })
    }

    /// Takes up to [`BURST_MAX`] frames; an empty burst if there are none.
    ///
    /// On an error the ring must not be used any more.
    #[inline]
    pub fn dequeue<'m>(&'m mut self, frames: &'m mut Frames) -> Result<TxBurst<'m>, RingFault> {
        let mut taken = Taken { chains: [(0, 0); BURST_MAX], next: 0 };
        either!(&mut self.ring, ring => dequeue(ring, frames, &mut taken))?;
        // SAFETY: every piece in `frames` was translated in the ring's memory, which the ring holds and nobody can
        // replace while the burst borrows it.
        let burst = unsafe { Burst::new(frames) };
        Ok(TxBurst { burst, ring: &mut self.ring, taken })
    }

    /// Whether there is something to take, without taking it.
    #[inline]
    pub fn is_empty(&mut self) -> Result<bool, RingFault> {
        either!(&mut self.ring, ring => ring.chain(ring.next).map(|chain| chain.is_none()))
    }

    /// Asks the guest for a kick on the next frame. False if frames came meanwhile: poll again, no kick comes for them.
    pub fn arm(&mut self) -> bool {
        either!(&mut self.ring, ring => ring.arm())
    }

    /// Asks the guest for no kicks: it is being polled.
    pub fn disarm(&mut self) {
        either!(&mut self.ring, ring => ring.disarm());
    }

    /// Guest → us.
    pub fn kick_fd(&self) -> Option<BorrowedFd<'_>> {
        either!(&self.ring, ring => ring.kick_fd())
    }
}

#[inline]
fn dequeue<L: Layout>(
    ring: &mut DeviceRing<L>,
    frames: &mut Frames,
    taken: &mut Taken,
) -> Result<(), RingFault> {
    frames.clear();
    ring.begin_burst();
    let count = ring.available(BURST)?.min(BURST);
    ring.layout.prefetch(ring.next, count);
    taken.next = fetch_chains(ring, frames, count, &mut taken.chains)?;
    // SAFETY: every piece in `frames` was translated in `ring.memory` with its whole length, or with the room that it was
    // pushed with.
    unsafe { frames.fetch_heads(ring.header_len) };
    // Also if there is nothing: an index of 0 may be that of a page put in place of a lost one.
    ring.check_memory()
}

/// Descriptors into places. Returns the position behind the last chain.
#[inline]
fn fetch_chains<L: Layout>(
    ring: &mut DeviceRing<L>,
    frames: &mut Frames,
    count: u16,
    taken: &mut [(u16, u16); BURST_MAX],
) -> Result<u16, RingFault> {
    // From the shortest frame to the longest, the ring's header included.
    let shortest = ring.header_len + 14;
    let lengths = FRAME_LEN_MAX - 14;
    let mut at = ring.next;
    for taken in taken.iter_mut().take(count.into()) {
        let Some((id, descriptor)) = ring.layout.first(at)? else { break };
        let single = descriptor.flags & (DESC_NEXT | DESC_WRITE | DESC_INDIRECT) == 0;
        if single
            && descriptor.len.wrapping_sub(shortest) <= lengths
            && let Some((start, room)) = ring.translate(descriptor.addr, descriptor.len)
        {
            prefetch(start);
            prefetch(start.wrapping_add(64));
            frames.push_single(start, descriptor.len, room);
            *taken = (id, 1);
            at = ring.layout.advance(at, 1);
        } else {
            *taken = fetch_chain(ring, frames, at, id, descriptor)?;
            at = ring.layout.advance(at, taken.1);
            if !frames.has_room() || ring.walked_enough() {
                break;
            }
        }
    }
    Ok(at)
}

/// A chain that is not simply one buffer in one region: walks it with every check. Returns its id and slots.
#[inline(never)]
fn fetch_chain<L: Layout>(
    ring: &mut DeviceRing<L>,
    frames: &mut Frames,
    at: u16,
    id: u16,
    first: Descriptor,
) -> Result<(u16, u16), RingFault> {
    let begun = frames.begin_chain();
    let longest = FRAME_LEN_MAX + ring.header_len;
    let mut len = 0u32;
    let mut chain = ring.open(at, id, first);
    let walked = ring.walk(&mut chain, false, |at, part| {
        len = len.saturating_add(part);
        len <= longest && frames.push_piece(at, part)
    });
    match walked {
        Ok(()) if len < ring.header_len + 14 => frames.abandon_chain(begun, ChainFault::Short),
        Ok(()) => frames.end_chain(begun, len),
        Err(fault) => frames.abandon_chain(begun, fault),
    }
    ring.close(chain)
}

impl TxBurst<'_> {
    /// Notes that a system call ran into memory of this burst that is not there any more (EFAULT): the front end
    /// truncated it. The ring is found broken at its next use.
    pub fn count_fault(&self) {
        either!(&*self.ring, ring => ring.memory.count_fault());
    }

    /// Returns all chains to the driver. True if it wants to be called.
    #[inline]
    pub fn complete(self) -> bool {
        let Some(taken) = self.taken.chains.get(..self.burst.len()).filter(|taken| !taken.is_empty()) else {
            return false;
        };
        either!(self.ring, ring => complete(ring, taken, self.taken.next))
    }
}

/// Nothing was written into a TX buffer, so its length is 0 (virtio 1.2, 2.7.8).
#[inline]
fn complete<L: Layout>(ring: &mut DeviceRing<L>, taken: &[(u16, u16)], next: u16) -> bool {
    let mut used = ring.used;
    if let (true, Some((id, _))) = (ring.in_order, taken.last()) {
        // The last one stands for all before it (virtio 1.2, 2.7.9 and 2.8.8).
        ring.set_used(used, *id, 0);
        used = taken.iter().fold(used, |at, (_, slots)| ring.layout.advance(at, *slots));
    } else {
        for &(id, slots) in taken {
            ring.set_used(used, id, 0);
            used = ring.layout.advance(used, slots);
        }
    }
    ring.publish(next, used)
}
