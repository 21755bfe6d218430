//! The bare loop: what moving frames from one split ring to another costs when there is nothing else to do.
//!
//! One copy, bursts of 64, prefetch, and no check of any frame: the descriptor table is checked and copied once, with the
//! first burst, and never looked at again. That holds for a front end that never changes its descriptors, as those of our
//! benches, for which it exists: the most that can be reached with one copy. Built with the feature `limit` only.

use std::sync::Arc;

use crate::RingError;
use crate::burst::{BURST, BURST_MAX, HEAD_LEN};
use crate::copy::{copy, prefetch};
use crate::memory::GuestMemory;
use crate::setup::RingSetup;
use crate::split::{DESC_WRITE, SplitRing};

/// Bytes that every buffer has, and that a frame has at the most.
const BUFFER_LEN: u32 = 2048;

/// A split ring with constant descriptors.
pub struct LimitRing {
    split: SplitRing,
    memory: Arc<GuestMemory>,
    /// Checked: address and length by descriptor. Empty until the first burst.
    buffers: Vec<(*mut u8, u32)>,
    next: u16,
}

// SAFETY: the pointers go into `memory`, which is shared memory and held here.
unsafe impl Send for LimitRing {}

impl LimitRing {
    /// Starts a ring.
    pub fn start(setup: &RingSetup, memory: &Arc<GuestMemory>) -> Result<Self, RingError> {
        let split = SplitRing::new(setup, memory)?;
        Ok(Self { split, memory: memory.clone(), buffers: Vec::new(), next: setup.base })
    }

    /// Next available index.
    pub fn base(&self) -> u16 {
        self.next
    }

    /// Checks and copies the descriptor table. False if it is not one of single buffers of the length supposed.
    #[cold]
    fn learn(&mut self) -> bool {
        let buffers = (0..self.split.size()).map_while(|index| {
            let descriptor = self.split.descriptor(index)?;
            let writable = descriptor.flags & DESC_WRITE != 0;
            // Frames are read, and buffers written, in heads of a fixed length.
            let (at, part) = self.memory.translate_part(descriptor.addr, BUFFER_LEN)?;
            if part < BUFFER_LEN {
                return None;
            }
            let fits = if writable { descriptor.len >= BUFFER_LEN } else { descriptor.len <= BUFFER_LEN };
            fits.then_some((at, descriptor.len))
        });
        self.buffers = buffers.collect();
        self.buffers.len() == usize::from(self.split.size())
    }

    /// Moves up to 64 frames from this TX ring into the RX ring `to`; returns how many.
    ///
    /// # Panics
    /// If the descriptors are not what this loop is for.
    #[inline(never)]
    pub fn forward(&mut self, to: &mut Self) -> u16 {
        let there = self.split.avail_idx().wrapping_sub(self.next);
        let room = to.split.avail_idx().wrapping_sub(to.next);
        let count = there.min(room).min(BURST);
        if count == 0 {
            return 0;
        }
        if self.buffers.is_empty() || to.buffers.is_empty() {
            assert!(self.learn() && to.learn(), "the bare loop is for single buffers of {BUFFER_LEN} bytes");
        }
        let mut copies = [(std::ptr::null::<u8>(), std::ptr::null_mut::<u8>(), 0usize); BURST_MAX];
        for (i, copy) in (0..count).zip(&mut copies) {
            let (source, len) = self.take(i, None);
            let (target, _) = to.take(i, Some(len));
            prefetch(source);
            prefetch(target);
            *copy = (source, target, len as usize);
        }
        for &(from, to, len) in &copies[..usize::from(count)] {
            // SAFETY: both buffers have BUFFER_LEN bytes in memory that the rings hold, and no frame is longer. The
            // drivers are our own: their buffers do not overlap.
            unsafe { copy(from, to, len.max(HEAD_LEN)) };
        }
        self.publish(count);
        to.publish(count);
        count
    }

    /// Buffer `i` of the burst, given back as used.
    #[inline]
    fn take(&self, i: u16, written: Option<u32>) -> (*mut u8, u32) {
        let at = self.next.wrapping_add(i);
        let head = self.split.avail_entry(at) & (self.split.size() - 1);
        self.split.set_used(at, head, written.unwrap_or(0));
        self.buffers[usize::from(head)]
    }

    fn publish(&mut self, count: u16) {
        self.next = self.next.wrapping_add(count);
        self.split.publish_used(self.next);
    }
}
