//! The bare loop: what moving frames from one split ring to another costs when there is nothing else to do.
//!
//! One copy, bursts of 64, prefetch, and no check of any frame: the descriptor table is checked and copied once, with the
//! first burst, and never looked at again. That holds for a front end that never changes its descriptors, as those of our
//! benches, for which it exists: the most that can be reached with one copy. Built with the feature `limit` only.

use std::sync::Arc;

use crate::RingError;
use crate::burst::{BURST, BURST_MAX, HEAD_LEN};
use crate::copy::{copy, prefetch};
use crate::descriptor::DESC_NEXT;
use crate::layout::Layout;
use crate::memory::GuestMemory;
use crate::setup::RingSetup;
use crate::split::SplitRing;

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
        let split = <SplitRing as Layout>::new(setup, memory)?;
        let [next, _] = split.start(setup.base)?;
        Ok(Self { split, memory: memory.clone(), buffers: Vec::new(), next })
    }

    /// Next available index.
    pub fn base(&self) -> u16 {
        self.next
    }

    /// Checks and copies the descriptor table. False if it is not one of single buffers.
    #[cold]
    fn learn(&mut self) -> bool {
        let head_len = u32::try_from(HEAD_LEN).expect("a head is short");
        let buffers = (0..self.split.size()).map_while(|index| {
            let descriptor = self.split.descriptor(index)?;
            // Frames are read, and buffers written, in heads of a fixed length.
            let len = descriptor.len.max(head_len);
            let (at, part) = self.memory.translate_part(descriptor.addr, len)?;
            (part == len && descriptor.flags & DESC_NEXT == 0).then_some((at, descriptor.len))
        });
        self.buffers = buffers.collect();
        self.buffers.len() == usize::from(self.split.size())
    }

    /// Whether the longest frame fits into the shortest buffer of `to`.
    #[cold]
    fn fits(&self, to: &Self) -> bool {
        let (frames, room) = (self.buffers.iter().map(|b| b.1).max(), to.buffers.iter().map(|b| b.1).min());
        frames <= room
    }

    /// Moves up to 64 frames from this TX ring into the RX ring `to`; returns how many.
    ///
    /// # Panics
    /// If the descriptors are not what this loop is for.
    #[inline(never)]
    pub fn forward(&mut self, to: &mut Self) -> u16 {
        let there = self.split.kicks(false).index().wrapping_sub(self.next);
        let room = to.split.kicks(false).index().wrapping_sub(to.next);
        let count = there.min(room).min(BURST);
        if count == 0 {
            return 0;
        }
        if self.buffers.is_empty() || to.buffers.is_empty() {
            let fits = self.learn() && to.learn() && self.fits(to);
            assert!(fits, "the bare loop is for frames in single buffers that fit into single buffers");
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
            // SAFETY: `learn` translated the longer of buffer and head on both sides, in memory that the rings hold, and
            // `fits` that no frame is longer than a buffer. The drivers are our own: their buffers do not overlap.
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
        self.split.calls(false).publish(self.next);
    }
}
