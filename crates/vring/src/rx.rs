//! The device's side of an RX ring: frames go to the guest.
//!
//! [`RxRing::enqueue`] takes a selection of a burst. Usually every frame fits one buffer: then descriptors are fetched
//! and translated for all frames first, and copied afterwards, so that the copies find their lines on the way. A frame
//! that needs several buffers (mergeable, or a chain) is placed piece by piece. Nothing is visible to the guest until
//! the used index is published, once, at the end.

use std::sync::Arc;

use crate::RingError;
use crate::burst::{BURST_MAX, Burst, ChainFault, HEAD_LEN, HEADER_BYTES, HEADER_LEN, Piece};
use crate::copy::{copy, prefetch, prefetch_to_write, wide_registers};
use crate::descriptor::DESC_WRITE;
use crate::device::{AnyRing, DeviceRing, RingFault, either, ring_handle};
use crate::layout::Layout;
use crate::memory::GuestMemory;
use crate::setup::RingSetup;

ring_handle!(RxRing);

/// A running RX ring.
pub struct RxRing {
    ring: AnyRing,
    scratch: Scratch,
}

/// Room for what one burst needs.
struct Scratch {
    /// Where the frames go that have one buffer each.
    targets: Box<[*mut u8; BURST_MAX]>,
    /// The one frame that is being placed in several pieces.
    pieces: Vec<(*mut u8, u32)>,
    /// Its buffers: (id, slots, bytes).
    buffers: Vec<(u16, u16, u32)>,
}

impl Default for Scratch {
    fn default() -> Self {
        let targets = Box::new([std::ptr::null_mut(); BURST_MAX]);
        Self { targets, pieces: Vec::new(), buffers: Vec::new() }
    }
}

// SAFETY: its pointers are leftovers between calls that nobody follows.
unsafe impl Send for Scratch {}

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
    /// Written into the collected buffers.
    Whole,
    /// Not enough buffers; none is used up.
    Full,
    /// The collected buffers are returned empty.
    Refused(Refused),
}

enum Refused {
    TooSmall,
    Chain(ChainFault),
}

impl RxRing {
    /// Starts a ring at the position that the set-up names.
    pub fn start(setup: RingSetup, memory: &Arc<GuestMemory>) -> Result<Self, RingError> {
        Ok(Self { ring: AnyRing::start(setup, memory)?, scratch: Scratch::default() })
    }

    /// Copies the frames of `burst` that are in the set `select`, in their order, into the guest's buffers. Chains that
    /// are no frames are left out.
    ///
    /// On an error the ring must not be used any more; nothing was published.
    #[inline]
    pub fn enqueue(&mut self, burst: &Burst<'_>, select: u64) -> Result<Enqueued, RingFault> {
        enqueue_any(&mut self.ring, &mut self.scratch, burst, select)
    }

    /// Asks the guest for no kicks (it is asked for none when the ring starts; RX rings are never waited for).
    pub fn disarm(&mut self) {
        either!(&mut self.ring, ring => ring.disarm());
    }
}

wide_registers! {
    fn enqueue_any(
        ring: &mut AnyRing,
        scratch: &mut Scratch,
        burst: &Burst<'_>,
        select: u64,
    ) -> Result<Enqueued, RingFault> {
        either!(ring, ring => enqueue(ring, scratch, burst, select))
    }
}

#[inline(always)]
fn enqueue<L: Layout>(
    ring: &mut DeviceRing<L>,
    scratch: &mut Scratch,
    burst: &Burst<'_>,
    select: u64,
) -> Result<Enqueued, RingFault> {
    let mut result = Enqueued::default();
    let mut run = Run { at: ring.next, left: select & burst.valid(), placed: 0, lengths: 0, bytes: 0 };
    ring.begin_burst();
    #[allow(clippy::cast_possible_truncation)]
    let wanted = run.left.count_ones() as u16;
    let available = ring.available(wanted)?.min(wanted);
    ring.layout.prefetch(ring.next, available);
    place_singles(ring, scratch, burst, &mut run);
    // What did not end there is not simply one buffer a frame, in one region.
    let mut looked = None;
    while run.left != 0 {
        let Some((_, descriptor)) = ring.chain(run.at)? else {
            result.full += run.left.count_ones();
            break;
        };
        // Perhaps the buffer only lies in another region, or was not known to be available.
        if looked.replace(run.at) != Some(run.at) {
            ring.look_at(descriptor.addr);
            place_singles(ring, scratch, burst, &mut run);
            continue;
        }
        let frame = take_first(&mut run.left);
        run.at = place_frame(ring, scratch, burst, frame, run.at, &mut result)?;
        place_singles(ring, scratch, burst, &mut run);
    }
    copy_singles(burst, &scratch.targets, &run, ring.header_len);
    ring.check_memory()?;
    result.frames += run.placed.count_ones();
    result.bytes += run.bytes;
    if run.at != ring.next {
        result.call = ring.publish(run.at);
    }
    Ok(result)
}

/// A burst's way into buffers.
struct Run {
    /// Position of the next buffer.
    at: u16,
    /// Frames without a buffer yet.
    left: u64,
    /// Frames that have one buffer each, and where that is: to be copied when all have theirs, so that the lines are on
    /// their way.
    placed: u64,
    /// All bits of their lengths, header included: below a power of two if each of them is.
    lengths: u32,
    /// Their bytes, without header.
    bytes: u64,
}

/// Finds buffers for frames as long as each fits one buffer in the region of the one before, which is how nearly all are.
#[inline(always)]
fn place_singles<L: Layout>(
    ring: &mut DeviceRing<L>,
    scratch: &mut Scratch,
    burst: &Burst<'_>,
    run: &mut Run,
) {
    // Copies of our own, so that the compiler need not ask whether a guest's memory is ours.
    let (layout, window, shorter) = (ring.layout, ring.window(), HEADER_BYTES - ring.header_len);
    let (header_len, first, ahead) = (ring.header_len, ring.next, ring.ahead());
    let (places, targets) = (burst.places(), &mut *scratch.targets);
    let (mut at, mut left, mut lengths, mut bytes) = (run.at, run.left, run.lengths, 0u64);
    for _ in 0..left.count_ones().min(ring.known(at).into()) {
        let Some((id, descriptor)) = layout.single(at, DESC_WRITE) else { break };
        let frame = left.trailing_zeros() as usize % BURST_MAX;
        let len = places[frame].len.wrapping_sub(shorter);
        let fits = descriptor.len >= len;
        let Some((start, _)) = window.translate(descriptor.addr, len.into()).filter(|_| fits) else { break };
        prefetch(start);
        prefetch(start.wrapping_add(64));
        targets[frame] = start;
        left &= left.wrapping_sub(1);
        if L::FIRST_LAST && at == first {
            ring.first_used = (id, len);
        } else {
            layout.set_used(at.wrapping_add(ahead), id, len);
        }
        at = layout.after(at);
        lengths |= len;
        bytes = bytes.wrapping_add(len.wrapping_sub(header_len).into());
    }
    run.placed |= run.left & !left;
    run.bytes += bytes;
    (run.at, run.left, run.lengths) = (at, left, lengths);
}

/// Writes the frames that have one buffer each.
#[inline(always)]
fn copy_singles(burst: &Burst<'_>, targets: &[*mut u8; BURST_MAX], run: &Run, header_len: u32) {
    let mut left = run.placed;
    let Some((heads, places)) = burst.singles().filter(|_| header_len == HEADER_BYTES) else {
        while left != 0 {
            let frame = take_first(&mut left);
            // SAFETY: the target was translated for the frame's whole length, in memory that the ring holds.
            unsafe { copy_frame(burst, frame, targets[frame], header_len) };
        }
        return;
    };
    if (run.lengths as usize) < HEAD_LEN {
        while left != 0 {
            let frame = take_first(&mut left);
            // SAFETY: as above; the head is ours, and no frame is longer.
            unsafe { copy(heads[frame].0.as_ptr(), targets[frame], places[frame].len as usize) };
        }
        return;
    }
    while left != 0 {
        let frame = take_first(&mut left);
        // While this frame is copied, the next one's lines come: a tail that has to be waited for line by line costs a
        // third more.
        if left != 0 {
            let next = left.trailing_zeros() as usize % BURST_MAX;
            prefetch_tail(&places[next], targets[next]);
        }
        let (head, place, target) = (&heads[frame].0, places[frame], targets[frame]);
        let len = place.len as usize;
        // SAFETY: as above. What follows the head is memory that the burst keeps mapped, and may be the same as the
        // target if a guest arranged for it.
        unsafe {
            copy(head.as_ptr(), target, len.min(HEAD_LEN));
            if len > HEAD_LEN {
                let (from, to) = (place.at.wrapping_add(HEAD_LEN), target.add(HEAD_LEN));
                crate::copy::copy_overlapping(from, to, len.wrapping_sub(HEAD_LEN));
            }
        }
    }
}

/// Takes the first frame out of a set that is not empty.
#[inline(always)]
fn take_first(frames: &mut u64) -> usize {
    let first = frames.trailing_zeros() as usize % BURST_MAX;
    *frames &= frames.wrapping_sub(1);
    first
}

/// Asks the cache for what lies behind a frame's head, source and target.
#[inline(always)]
fn prefetch_tail(place: &Piece, target: *mut u8) {
    for line in (HEAD_LEN..place.len as usize).step_by(64) {
        prefetch(place.at.wrapping_add(line));
        prefetch_to_write(target.wrapping_add(line));
    }
}

/// Places a frame that does not simply fit the buffer at `at`. Returns where to go on.
#[inline(never)]
fn place_frame<L: Layout>(
    ring: &mut DeviceRing<L>,
    scratch: &mut Scratch,
    burst: &Burst<'_>,
    frame: usize,
    at: u16,
    result: &mut Enqueued,
) -> Result<u16, RingFault> {
    let len = burst.total_len(frame) - (HEADER_BYTES - ring.header_len);
    let placed = collect_buffers(ring, scratch, len, at)?;
    match placed {
        Placed::Whole => {
            scatter(scratch, burst, frame, ring.header_len);
            result.frames += 1;
            result.bytes += u64::from(len - ring.header_len);
        }
        Placed::Full => {
            result.full += 1;
            return Ok(at);
        }
        Placed::Refused(Refused::TooSmall) => result.too_small += 1,
        Placed::Refused(Refused::Chain(ChainFault::Unmapped)) => result.unmapped += 1,
        Placed::Refused(Refused::Chain(_)) => result.malformed += 1,
    }
    let whole = matches!(placed, Placed::Whole);
    let mut at = at;
    for &(id, slots, bytes) in &scratch.buffers {
        ring.set_used(at, id, if whole { bytes } else { 0 });
        at = ring.layout.advance(at, slots);
    }
    Ok(at)
}

/// Gathers buffers for `len` bytes, header included, from position `at` on.
fn collect_buffers<L: Layout>(
    ring: &mut DeviceRing<L>,
    scratch: &mut Scratch,
    len: u32,
    mut at: u16,
) -> Result<Placed, RingFault> {
    let Scratch { pieces, buffers, .. } = scratch;
    pieces.clear();
    buffers.clear();
    let mut left = len;
    loop {
        if ring.walked_enough() {
            // Buffers of which that many do not hold a frame are no use: away with them.
            let refused = Placed::Refused(Refused::Chain(ChainFault::Malformed));
            return Ok(if buffers.is_empty() { Placed::Full } else { refused });
        }
        // All of a frame's buffers must be there at once: a part of a frame is never published.
        let Some((id, descriptor)) = ring.chain(at)? else { return Ok(Placed::Full) };
        let before = left;
        let mut chain = ring.open(at, id, descriptor);
        let walked = ring.walk(&mut chain, true, |at, part| {
            let part = part.min(left);
            if part != 0 {
                pieces.push((at, part));
                left -= part;
            }
            true
        });
        let (id, slots) = ring.close(chain)?;
        buffers.push((id, slots, before - left));
        at = ring.layout.advance(at, slots);
        if let Err(fault) = walked {
            return Ok(Placed::Refused(Refused::Chain(fault)));
        }
        if left == 0 {
            return Ok(Placed::Whole);
        }
        if !ring.mergeable {
            return Ok(Placed::Refused(Refused::TooSmall));
        }
    }
}

/// Writes frame `frame` into the collected pieces.
fn scatter(scratch: &Scratch, burst: &Burst<'_>, frame: usize, header_len: u32) {
    let head = burst.head(frame);
    let mut header: [u8; HEADER_LEN] = *head.first_chunk().expect("a head begins with a header");
    #[allow(clippy::cast_possible_truncation)]
    let buffers = scratch.buffers.len() as u16;
    header[10..].copy_from_slice(&buffers.to_le_bytes());
    let mut to = Scatter::over(&scratch.pieces);
    to.write(header.as_ptr(), header_len as usize);
    to.write(head[HEADER_LEN..].as_ptr(), head.len() - HEADER_LEN);
    burst.each_piece(frame, |at, len| to.write(at, len));
}

/// Writes a frame into one buffer.
///
/// # Safety
/// `at` is valid for writes of the frame's length with a header of `header_len` bytes.
#[inline(never)]
pub(crate) unsafe fn copy_frame(burst: &Burst<'_>, frame: usize, at: *mut u8, header_len: u32) {
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
pub(crate) struct Scatter<'a> {
    pieces: &'a [(*mut u8, u32)],
    at: usize,
    offset: usize,
}

impl<'a> Scatter<'a> {
    /// At the beginning of pieces that are valid for writes.
    pub(crate) fn over(pieces: &'a [(*mut u8, u32)]) -> Self {
        Self { pieces, at: 0, offset: 0 }
    }

    /// Writes `len` bytes from `from`, which the caller keeps readable, as far as there is room.
    pub(crate) fn write(&mut self, mut from: *const u8, mut len: usize) {
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
