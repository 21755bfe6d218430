//! Bursts through rings that we drive: what a port needs that attaches to somebody else's back end.
//!
//! [`DriverRx`] is the driver's side of an RX ring. All its buffers are on their way to the device, or hold frames of the
//! one [`DriverBurst`] there may be; a frame is as many used buffers as its header says (virtio 1.2, 5.1.6.3.2), and its
//! payload stays in them until it is where it should be. [`DriverTx`] is the driver's side of a TX ring: frames are copied
//! into free buffers, and all of a burst become available at once.
//!
//! Buffer `n` belongs to descriptor `n` for ever, so a used element can only bring back what is ours. The device may write
//! all of the memory at any time: lengths are held against our own, ids against what is on its way, both as fetched by one
//! load, and a frame's first bytes are copied to private memory before they are looked at.

use std::sync::Arc;

use super::{Buffer, DriverMemory, DriverRing};
use crate::burst::{BURST_MAX, Burst, ChainFault, FRAME_LEN_MAX, Frames, HEAD_LEN, HEADER_BYTES, HEADER_LEN};
use crate::device::RingFault;
use crate::features;
use crate::rx::{Enqueued, Scatter, copy_frame};

/// Bytes between two buffers. Without any, buffers of a power of two share few sets of a cache.
const GAP: usize = 256;

/// A ring and its buffers in a [`DriverMemory`].
#[derive(Clone, Copy, Debug)]
pub struct Area {
    /// Where it begins: a multiple of 64.
    pub at: usize,
    /// Descriptors, and buffers.
    pub size: u16,
    /// Bytes of a buffer, at least [`HEAD_LEN`].
    pub buffer_len: u32,
}

impl Area {
    /// Bytes that it takes.
    pub fn bytes(&self) -> usize {
        self.ring_bytes() + usize::from(self.size) * self.stride()
    }

    fn ring_bytes(&self) -> usize {
        DriverRing::bytes(self.size).next_multiple_of(64)
    }

    fn stride(&self) -> usize {
        self.buffer_len as usize + GAP
    }

    /// Where buffer `number` begins.
    fn buffer(&self, number: u16) -> usize {
        self.at + self.ring_bytes() + usize::from(number) * self.stride()
    }

    /// # Panics
    /// If it does not fit into the memory, or its buffers are too short: both are our own.
    fn ring(&self, memory: &Arc<DriverMemory>, features: u64) -> DriverRing {
        assert!(self.at + self.bytes() <= memory.len() && self.buffer_len as usize >= HEAD_LEN, "{self:?}");
        DriverRing::new(memory, self.at, self.size, features)
    }
}

/// The driver's side of an RX ring: frames come from the device.
pub struct DriverRx {
    ring: DriverRing,
    area: Area,
    mergeable: bool,
}

/// Frames from one RX ring. Dropped without [`DriverBurst::complete`], their buffers go back with those of the next one.
pub struct DriverBurst<'m> {
    /// The frames.
    pub burst: Burst<'m>,
    rx: &'m mut DriverRx,
}

impl DriverRx {
    /// A ring with all its buffers available. `features` are those negotiated; the header has 12 bytes, so VERSION_1 or
    /// MRG_RXBUF is among them.
    ///
    /// # Panics
    /// If the area does not fit.
    pub fn new(memory: &Arc<DriverMemory>, area: Area, features: u64) -> Self {
        let mergeable = features & (1 << features::MRG_RXBUF) != 0;
        let mut rx = Self { ring: area.ring(memory, features), area, mergeable };
        rx.ring.want_no_call();
        rx.give_back();
        rx
    }

    /// The ring: for SET_VRING_NUM, SET_VRING_ADDR and SET_VRING_BASE.
    pub fn ring(&self) -> &DriverRing {
        &self.ring
    }

    /// Takes up to [`BURST_MAX`] frames; an empty burst if there are none.
    ///
    /// On an error the ring must not be used any more.
    pub fn dequeue<'m>(&'m mut self, frames: &'m mut Frames) -> Result<DriverBurst<'m>, RingFault> {
        frames.clear();
        while frames.has_room() && self.take_frame(frames)? {}
        // SAFETY: every piece is part of a buffer of ours, and singles are whole buffers, which have HEAD_LEN bytes.
        unsafe { frames.fetch_heads(HEADER_BYTES) };
        check_memory(&self.ring)?;
        // SAFETY: what the pieces point to is in memory that the ring holds, and the burst borrows the ring.
        let burst = unsafe { Burst::new(frames) };
        Ok(DriverBurst { burst, rx: self })
    }

    /// Asks the device for a call on the next frame. False if frames came meanwhile: poll again, no call comes for them.
    pub fn arm(&mut self) -> bool {
        self.ring.want_call()
    }

    /// Asks the device for no calls: it is being polled.
    pub fn disarm(&mut self) {
        self.ring.want_no_call();
    }

    /// Takes one frame, or what should be one; false if there is none.
    fn take_frame(&mut self, frames: &mut Frames) -> Result<bool, RingFault> {
        let Some((first, mut len)) = self.take_buffer()? else { return Ok(false) };
        let count = if self.mergeable && len >= HEADER_BYTES { num_buffers(first) } else { 1 };
        if count <= 1 {
            match fault_of(len) {
                Some(fault) => frames.push_fault(fault),
                None => frames.push_single(first, len),
            }
            return Ok(true);
        }
        let begun = frames.begin_chain();
        frames.push_piece(first, len);
        for _ in 1..count {
            // A frame is published as a whole.
            let Some((at, part)) = self.take_buffer()? else {
                frames.abandon_chain(begun, ChainFault::Torn);
                return Ok(true);
            };
            len = len.saturating_add(part);
            if part != 0 && len <= FRAME_LEN_MAX + HEADER_BYTES {
                frames.push_piece(at, part);
            }
        }
        match fault_of(len) {
            Some(fault) => frames.abandon_chain(begun, fault),
            None => frames.end_chain(begun, len),
        }
        Ok(true)
    }

    /// The next used buffer, and how many bytes of it were written.
    fn take_buffer(&mut self) -> Result<Option<(*const u8, u32)>, RingFault> {
        let Some((number, len)) = self.ring.try_take_used()? else { return Ok(None) };
        let room = self.area.buffer_len;
        if len > room {
            return Err(RingFault::UsedLength { len, room });
        }
        let at = self.ring.memory().base.wrapping_add(self.area.buffer(number));
        Ok(Some((at, len)))
    }

    /// Makes every buffer available that is not. True if the device wants a kick.
    fn give_back(&mut self) -> bool {
        let area = self.area;
        let buffer = |_, number| Buffer { offset: area.buffer(number), len: area.buffer_len, writable: true };
        while self.ring.offer_numbered(1, buffer).is_some() {}
        self.ring.publish()
    }
}

impl DriverBurst<'_> {
    /// Gives the buffers back to the device. True if it wants a kick.
    pub fn complete(self) -> bool {
        self.rx.give_back()
    }
}

/// The driver's side of a TX ring: frames go to the device.
pub struct DriverTx {
    ring: DriverRing,
    area: Area,
    /// Buffers of the frame that is being placed.
    pieces: Vec<(*mut u8, u32)>,
}

// SAFETY: its pointers are leftovers between calls that nobody follows.
unsafe impl Send for DriverTx {}

impl DriverTx {
    /// A ring with all its buffers free; otherwise as [`DriverRx::new`].
    ///
    /// # Panics
    /// If the area does not fit.
    pub fn new(memory: &Arc<DriverMemory>, area: Area, features: u64) -> Self {
        let mut ring = area.ring(memory, features);
        // Buffers are taken back when the next burst comes.
        ring.want_no_call();
        Self { ring, area, pieces: Vec::new() }
    }

    /// The ring: for SET_VRING_NUM, SET_VRING_ADDR and SET_VRING_BASE.
    pub fn ring(&self) -> &DriverRing {
        &self.ring
    }

    /// Copies the frames of `burst` that are in the set `select`, in their order, into buffers and makes them available at
    /// one go. [`Enqueued::call`] says whether the device wants a kick.
    ///
    /// On an error the ring must not be used any more.
    pub fn enqueue(&mut self, burst: &Burst<'_>, select: u64) -> Result<Enqueued, RingFault> {
        while self.ring.try_take_used()?.is_some() {}
        let mut done = Enqueued::default();
        let mut left = select & burst.valid();
        while left != 0 {
            let frame = left.trailing_zeros() as usize % BURST_MAX;
            left &= left.wrapping_sub(1);
            let len = burst.total_len(frame);
            if self.place(len) {
                self.write(burst, frame);
                done.frames += 1;
                done.bytes += u64::from(len - HEADER_BYTES);
            } else {
                done.full += 1;
            }
        }
        check_memory(&self.ring)?;
        done.call = self.ring.publish();
        Ok(done)
    }

    /// Finds buffers for `len` bytes, header included; false if too few are free.
    fn place(&mut self, len: u32) -> bool {
        let Self { ring, area, pieces } = self;
        pieces.clear();
        let base = ring.memory().base;
        let mut left = len;
        let buffer = |_, number| {
            let (offset, part) = (area.buffer(number), left.min(area.buffer_len));
            left -= part;
            pieces.push((base.wrapping_add(offset), part));
            Buffer { offset, len: part, writable: false }
        };
        ring.offer_numbered(len.div_ceil(area.buffer_len) as usize, buffer).is_some()
    }

    /// Copies a frame into the buffers found for it.
    fn write(&self, burst: &Burst<'_>, frame: usize) {
        let Some(&(first, _)) = self.pieces.first() else { return };
        if self.pieces.len() == 1 {
            // SAFETY: the buffer is ours and has room for the frame, with a header of HEADER_BYTES.
            unsafe { copy_frame(burst, frame, first, HEADER_BYTES) };
        } else {
            let head = burst.head(frame);
            let mut to = Scatter::over(&self.pieces);
            to.write(head.as_ptr(), head.len());
            burst.each_piece(frame, |at, len| to.write(at, len));
        }
        // Virtio 1.2, 5.1.6.2.1: the driver sets num_buffers to 0.
        // SAFETY: a buffer has more bytes than a header, whose last two these are.
        unsafe { first.add(HEADER_LEN - 2).write_bytes(0, 2) };
    }
}

/// Buffers that the frame takes which begins at `at` (virtio 1.2, 5.1.6: the header's last field), fetched once.
fn num_buffers(at: *const u8) -> u16 {
    // SAFETY: `at` is the beginning of a buffer of ours, which has more bytes than a header. The device may write meanwhile:
    // any number is good.
    let bytes = unsafe { at.add(HEADER_LEN - 2).cast::<[u8; 2]>().read_volatile() };
    u16::from_le_bytes(bytes)
}

/// What is wrong with a frame of `len` bytes, header included.
fn fault_of(len: u32) -> Option<ChainFault> {
    if len < HEADER_BYTES + 14 {
        return Some(ChainFault::Short);
    }
    (len > HEADER_BYTES + FRAME_LEN_MAX).then_some(ChainFault::Long)
}

fn check_memory(ring: &DriverRing) -> Result<(), RingFault> {
    if ring.memory().faulted() { Err(RingFault::Truncated) } else { Ok(()) }
}
