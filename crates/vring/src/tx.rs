//! The device's side of a TX ring: frames come from the guest.
//!
//! [`TxRing::dequeue`] goes over a burst in short passes, so that the memory a pass needs was asked for by the one
//! before: prefetch descriptors → descriptors (translate, prefetch payload) → first bytes into private memory.
//! [`TxBurst::complete`] returns the chains when the frames are where they should be: until then the buffers are ours.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use crate::RingError;
use crate::burst::{BURST, Burst, ChainFault, FRAME_LEN_MAX, Frames, HEAD_LEN, HEADER_BYTES, Piece, Taken};
use crate::copy::{prefetch, wide_registers};
use crate::descriptor::Descriptor;
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
    /// Position behind the last of its chains.
    next: u16,
}

impl TxRing {
    /// Starts a ring at the position that the set-up names.
    pub fn start(setup: RingSetup, memory: &Arc<GuestMemory>) -> Result<Self, RingError> {
        Ok(Self { ring: AnyRing::start(setup, memory)? })
    }

    /// Takes up to [`BURST_MAX`](crate::BURST_MAX) frames; an empty burst if there are none.
    ///
    /// On an error the ring must not be used any more.
    #[inline]
    pub fn dequeue<'m>(&'m mut self, frames: &'m mut Frames) -> Result<TxBurst<'m>, RingFault> {
        let next = dequeue_any(&mut self.ring, frames)?;
        // SAFETY: every piece in `frames` was translated in the ring's memory, which the ring holds and nobody can
        // replace while the burst borrows it.
        let burst = unsafe { Burst::new(frames) };
        Ok(TxBurst { burst, ring: &mut self.ring, next })
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

    /// The NUMA node of the guest's memory, as far as the ring is an example of it; `None` if that is not known.
    pub fn node(&self) -> Option<u32> {
        either!(&self.ring, ring => ring.node())
    }

    /// Guest → us.
    pub fn kick_fd(&self) -> Option<BorrowedFd<'_>> {
        either!(&self.ring, ring => ring.kick_fd())
    }
}

wide_registers! {
    fn dequeue_any(ring: &mut AnyRing, frames: &mut Frames) -> Result<u16, RingFault> {
        either!(ring, ring => dequeue(ring, frames))
    }
}

/// Returns the position behind the last chain.
#[inline(always)]
fn dequeue<L: Layout>(ring: &mut DeviceRing<L>, frames: &mut Frames) -> Result<u16, RingFault> {
    frames.clear();
    ring.begin_burst();
    let count = ring.available(BURST)?.min(BURST);
    ring.layout.prefetch(ring.next, count);
    let next = fetch_chains(ring, frames, count.into())?;
    // SAFETY: every piece in `frames` was translated in `ring.memory` with its whole length, singles with HEAD_LEN bytes
    // at least, and with a legacy header there are none.
    unsafe { frames.fetch_heads(ring.header_len) };
    // Also if there is nothing: an index of 0 may be that of a page put in place of a lost one.
    ring.check_memory()?;
    Ok(next)
}

/// Descriptors into places, `count` chains at the most. Returns the position behind the last chain.
#[inline(always)]
fn fetch_chains<L: Layout>(
    ring: &mut DeviceRing<L>,
    frames: &mut Frames,
    count: usize,
) -> Result<u16, RingFault> {
    let mut at = ring.next;
    // Where a run ended last.
    let mut ended = None;
    while frames.len() < count {
        let Run { fetched, odd } = fetch_singles(ring, &mut at, frames.singles(count))?;
        frames.push_singles(fetched);
        let Some((id, descriptor)) = odd else { break };
        // Perhaps it only lies in another region: then the run goes on there.
        if ended.replace(at) != Some(at) && ring.look_at(descriptor.addr) {
            continue;
        }
        at = fetch_odd(ring, frames, at, id, descriptor)?;
        if !frames.has_room() || ring.walked_enough() {
            break;
        }
    }
    Ok(at)
}

/// What [`fetch_singles`] did.
struct Run {
    fetched: usize,
    /// The chain that ended the run: id and first descriptor.
    odd: Option<(u16, Descriptor)>,
}

/// The chains from `at` on as long as each is one buffer in the region of the one before, which is how nearly all are.
#[inline(always)]
fn fetch_singles<'p, L: Layout>(
    ring: &DeviceRing<L>,
    at: &mut u16,
    places: impl Iterator<Item = (&'p mut Piece, &'p mut Taken)>,
) -> Result<Run, RingFault> {
    // Copies of our own, so that the compiler need not ask whether a guest's memory is ours.
    let (layout, window) = (ring.layout, ring.window());
    // From the shortest frame to the longest, the ring's header included.
    let shortest = HEADER_BYTES + 14;
    let mut run = Run { fetched: 0, odd: None };
    let simple = ring.header_len == HEADER_BYTES;
    for (place, taken) in places {
        let found = layout.single(*at, 0).and_then(|(id, Descriptor { addr, len, .. })| {
            // Where a head can be read whatever the frame's length.
            let (start, _) = window.translate(addr, u64::from(len).max(HEAD_LEN as u64))?;
            (simple && len.wrapping_sub(shortest) <= FRAME_LEN_MAX - 14).then_some((id, start, len))
        });
        let Some((id, start, len)) = found else {
            run.odd = layout.first(*at)?;
            break;
        };
        prefetch(start);
        prefetch(start.wrapping_add(64));
        *place = Piece { at: start, len };
        *taken = Taken { id, slots: 1 };
        *at = layout.after(*at);
        run.fetched = run.fetched.wrapping_add(1);
    }
    Ok(run)
}

/// A chain that is not simply one buffer in the region of the one before: walks it with every check. Returns the position
/// behind it.
#[inline(never)]
fn fetch_odd<L: Layout>(
    ring: &mut DeviceRing<L>,
    frames: &mut Frames,
    at: u16,
    id: u16,
    first: Descriptor,
) -> Result<u16, RingFault> {
    let begun = frames.begin_chain();
    let longest = FRAME_LEN_MAX + ring.header_len;
    let mut len = 0u32;
    let mut chain = ring.open(at, id, first);
    let walked = ring.walk(&mut chain, false, |at, part| {
        len = len.saturating_add(part);
        len <= longest && frames.push_piece(at, part)
    });
    let (id, slots) = ring.close(chain)?;
    frames.note_taken(Taken { id, slots });
    match walked {
        Ok(()) if len < ring.header_len + 14 => frames.abandon_chain(begun, ChainFault::Short),
        Ok(()) => frames.end_chain(begun, len),
        Err(fault) => frames.abandon_chain(begun, fault),
    }
    Ok(ring.layout.advance(at, slots))
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
        let taken = self.burst.taken();
        !taken.is_empty() && either!(self.ring, ring => complete(ring, taken, self.next))
    }
}

/// Nothing was written into a TX buffer, so its length is 0 (virtio 1.2, 2.7.8).
#[inline]
fn complete<L: Layout>(ring: &mut DeviceRing<L>, taken: &[Taken], next: u16) -> bool {
    if let (true, Some(last)) = (ring.in_order, taken.last()) {
        // The last one stands for all before it (virtio 1.2, 2.7.9 and 2.8.8).
        ring.set_used(ring.next, last.id, 0);
    } else {
        let mut at = ring.next;
        for &Taken { id, slots } in taken {
            ring.set_used(at, id, 0);
            at = ring.layout.advance(at, slots);
        }
    }
    ring.publish(next)
}
