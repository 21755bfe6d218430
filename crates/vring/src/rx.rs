//! The device's side of an RX ring: frames go to the guest.
//!
//! [`RxRing::enqueue`] takes a selection of a burst. Usually every frame fits one buffer: then descriptors are fetched
//! and translated for all frames first, and copied afterwards, so that the copies find their lines on the way. A frame
//! that needs several buffers (mergeable, or a chain) is placed piece by piece. Nothing is visible to the guest until
//! the used index is published, once, at the end.

use std::sync::Arc;

use crate::RingError;
use crate::burst::{BURST_MAX, Burst, ChainFault, HEADER_BYTES, HEADER_LEN};
use crate::copy::{copy, prefetch};
use crate::device::{DeviceRing, RingFault, ring_handle};
use crate::memory::GuestMemory;
use crate::setup::RingSetup;
use crate::split::{DESC_INDIRECT, DESC_NEXT, DESC_WRITE};

ring_handle!(RxRing);

/// A running RX ring.
pub struct RxRing {
    ring: DeviceRing,
    /// Room for the pieces of the one frame that is being placed in several.
    pieces: Vec<(*mut u8, u32)>,
    /// Its buffers: (head, bytes).
    buffers: Vec<(u16, u32)>,
}

// SAFETY: `pieces` holds leftovers between calls that nobody follows; the ring itself is `Send`.
unsafe impl Send for RxRing {}

/// What became of the frames of one [`RxRing::enqueue`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Enqueued {
    /// Delivered.
    pub frames: u32,
    /// Their bytes, without virtio-net header.
    pub bytes: u64,
    /// Not delivered: no (more) buffers.
    pub full: u32,
    /// Not delivered: the buffer is too small and buffers cannot be merged.
    pub too_small: u32,
    /// Not delivered: the buffer's chain is malformed.
    pub malformed: u32,
    /// Not delivered: the buffer is not in guest memory.
    pub unmapped: u32,
    /// The driver wants to be called.
    pub call: bool,
}

/// What became of one frame.
enum Placed {
    /// Written into so many buffers.
    Buffers(u16),
    /// Not enough buffers; none is used up.
    Full,
    /// So many buffers are returned empty.
    Refused(u16, Refused),
}

enum Refused {
    TooSmall,
    Chain(ChainFault),
}

impl RxRing {
    /// Starts a ring at the position that the set-up names.
    pub fn start(setup: RingSetup, memory: &Arc<GuestMemory>) -> Result<Self, RingError> {
        Ok(Self { ring: DeviceRing::start(setup, memory)?, pieces: Vec::new(), buffers: Vec::new() })
    }

    /// Copies the frames of `burst` that are in the set `select`, in their order, into the guest's buffers. Chains that
    /// are no frames are left out.
    ///
    /// On an error the ring must not be used any more; nothing was published.
    #[inline]
    pub fn enqueue(&mut self, burst: &Burst<'_>, select: u64) -> Result<Enqueued, RingFault> {
        let mut result = Enqueued::default();
        let mut copies = [(std::ptr::null_mut::<u8>(), 0u8); BURST_MAX];
        let mut copies_len = 0;
        let mut left = select & burst.valid();
        let ring = &mut self.ring;
        #[allow(clippy::cast_possible_truncation)]
        let available = ring.available(left.count_ones() as u16)?;
        ring.begin_burst();
        #[allow(clippy::cast_possible_truncation)]
        for i in 0..available.min(left.count_ones() as u16) {
            ring.split.prefetch_descriptor(ring.split.avail_entry(ring.next.wrapping_add(i)));
        }
        let shorter = HEADER_BYTES - ring.header_len;
        let mut taken = 0u16;
        while left != 0 {
            let ring = &mut self.ring;
            // Merged frames use more buffers than were counted at first, so look again.
            if taken >= available && ring.available(taken + 1)? <= taken {
                result.full += left.count_ones();
                break;
            }
            let frame = left.trailing_zeros() as usize % BURST_MAX;
            left &= left - 1;
            let len = burst.total_len(frame) - shorter;
            let (head, descriptor) = ring.head(ring.next.wrapping_add(taken))?;
            let single = descriptor.flags & (DESC_NEXT | DESC_INDIRECT | DESC_WRITE) == DESC_WRITE;
            if single
                && descriptor.len >= len
                && let Some((at, _)) = ring.translate(descriptor.addr, len)
            {
                prefetch(at);
                prefetch(at.wrapping_add(64));
                #[allow(clippy::cast_possible_truncation)]
                let copy = (at, frame as u8);
                copies[copies_len % BURST_MAX] = copy;
                copies_len += 1;
                ring.split.set_used(ring.used.wrapping_add(taken), head, len);
                taken += 1;
                result.bytes += u64::from(len);
            } else {
                taken += self.place_frame(burst, frame, taken, &mut result)?;
            }
        }
        let ring = &mut self.ring;
        for &(at, frame) in &copies[..copies_len.min(BURST_MAX)] {
            // SAFETY: `at` was translated for the frame's whole length in `ring.memory`, which `ring` holds.
            unsafe { copy_frame(burst, frame.into(), at, ring.header_len) };
        }
        ring.check_memory()?;
        #[allow(clippy::cast_possible_truncation)]
        let simple = copies_len as u32;
        result.frames += simple;
        result.bytes -= u64::from(simple) * u64::from(ring.header_len);
        if taken != 0 {
            ring.next = ring.next.wrapping_add(taken);
            result.call = ring.publish(ring.used.wrapping_add(taken));
        }
        Ok(result)
    }

    /// Places a frame that does not simply fit the next buffer. Returns how many buffers it used up.
    #[inline(never)]
    fn place_frame(
        &mut self,
        burst: &Burst<'_>,
        frame: usize,
        taken: u16,
        result: &mut Enqueued,
    ) -> Result<u16, RingFault> {
        let len = burst.total_len(frame) - (HEADER_BYTES - self.ring.header_len);
        match self.collect_buffers(len, taken)? {
            Placed::Buffers(count) => {
                self.scatter(burst, frame, count);
                for (i, &(head, len)) in (0..count).zip(&self.buffers) {
                    self.ring.split.set_used(self.ring.used.wrapping_add(taken).wrapping_add(i), head, len);
                }
                result.frames += 1;
                result.bytes += u64::from(len - self.ring.header_len);
                Ok(count)
            }
            Placed::Full => {
                result.full += 1;
                Ok(0)
            }
            Placed::Refused(count, why) => {
                for (i, &(head, _)) in (0..count).zip(&self.buffers) {
                    self.ring.split.set_used(self.ring.used.wrapping_add(taken).wrapping_add(i), head, 0);
                }
                match why {
                    Refused::TooSmall => result.too_small += 1,
                    Refused::Chain(ChainFault::Unmapped) => result.unmapped += 1,
                    Refused::Chain(_) => result.malformed += 1,
                }
                Ok(count)
            }
        }
    }

    /// Gathers buffers for `len` bytes, header included, from available entry `taken` on.
    fn collect_buffers(&mut self, len: u32, taken: u16) -> Result<Placed, RingFault> {
        self.pieces.clear();
        self.buffers.clear();
        let mut left = len;
        let mut count = 0u16;
        loop {
            if self.ring.walked_enough() {
                // Buffers of which that many do not hold a frame are no use: away with them.
                let refused = Placed::Refused(count, Refused::Chain(ChainFault::Malformed));
                return Ok(if count == 0 { Placed::Full } else { refused });
            }
            // All of a frame's buffers must be there at once: a part of a frame is never published.
            if self.ring.available(taken + count + 1)? <= taken + count {
                return Ok(Placed::Full);
            }
            let (head, descriptor) =
                self.ring.head(self.ring.next.wrapping_add(taken).wrapping_add(count))?;
            let before = left;
            let pieces = &mut self.pieces;
            let walked = self.ring.walk(descriptor, true, |at, part| {
                let part = part.min(left);
                if part != 0 {
                    pieces.push((at, part));
                    left -= part;
                }
                true
            });
            self.buffers.push((head, before - left));
            count += 1;
            if let Err(fault) = walked {
                return Ok(Placed::Refused(count, Refused::Chain(fault)));
            }
            if left == 0 {
                return Ok(Placed::Buffers(count));
            }
            if !self.ring.mergeable {
                return Ok(Placed::Refused(count, Refused::TooSmall));
            }
        }
    }

    /// Writes frame `frame` into the collected pieces.
    fn scatter(&mut self, burst: &Burst<'_>, frame: usize, buffers: u16) {
        let head = burst.head(frame);
        let mut header: [u8; HEADER_LEN] = *head.first_chunk().expect("a head begins with a header");
        header[10..].copy_from_slice(&buffers.to_le_bytes());
        let mut to = Scatter { pieces: &self.pieces, at: 0, offset: 0 };
        to.write(header.as_ptr(), self.ring.header_len as usize);
        to.write(head[HEADER_LEN..].as_ptr(), head.len() - HEADER_LEN);
        burst.each_piece(frame, |at, len| to.write(at, len));
    }

    /// Asks the guest for no kicks (it is asked for none when the ring starts; RX rings are never waited for).
    pub fn disarm(&mut self) {
        self.ring.disarm();
    }
}

/// Writes a frame into one buffer.
///
/// # Safety
/// `at` is valid for writes of the frame's length with a header of `header_len` bytes.
#[inline]
unsafe fn copy_frame(burst: &Burst<'_>, frame: usize, at: *mut u8, header_len: u32) {
    let head = burst.head(frame);
    let gap = HEADER_LEN - header_len as usize;
    let mut to = at;
    // SAFETY: the parts written one behind the other are the frame's length in all, for which `at` is valid; the
    // sources are private memory, and pieces that the burst keeps mapped. Source and destination may be the same
    // guest memory if the guest arranged for it: then the bytes are the guest's own problem, but `copy` must not be
    // told of an overlap, so pieces go through `copy_overlapping`.
    unsafe {
        if gap == 0 {
            copy(head.as_ptr(), to, head.len());
            to = to.add(head.len());
        } else {
            copy(head.as_ptr(), to, header_len as usize);
            copy(head.as_ptr().add(HEADER_LEN), to.add(header_len as usize), head.len() - HEADER_LEN);
            to = to.add(head.len() - gap);
        }
        match burst.single_tail(frame) {
            Some((_, 0)) => {}
            Some((from, len)) => crate::copy::copy_overlapping(from, to, len),
            None => burst.each_piece(frame, |from, len| {
                crate::copy::copy_overlapping(from, to, len);
                to = to.add(len);
            }),
        }
    }
}

/// A cursor over pieces of guest memory.
struct Scatter<'a> {
    pieces: &'a [(*mut u8, u32)],
    at: usize,
    offset: usize,
}

impl Scatter<'_> {
    /// Writes `len` bytes from `from`, which the caller keeps readable, as far as there is room.
    fn write(&mut self, mut from: *const u8, mut len: usize) {
        while len != 0 {
            let Some(&(piece, piece_len)) = self.pieces.get(self.at) else { return };
            let part = len.min(piece_len as usize - self.offset);
            // SAFETY: `part` bytes are left in the piece, which was translated in memory that the ring holds, and `len`
            // ≥ `part` bytes are readable at `from`.
            unsafe { crate::copy::copy_overlapping(from, piece.add(self.offset), part) };
            from = from.wrapping_add(part);
            len -= part;
            self.offset += part;
            if self.offset == piece_len as usize {
                self.at += 1;
                self.offset = 0;
            }
        }
    }
}
