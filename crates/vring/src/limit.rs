//! The bare loop: what moving frames from one ring to another of the same layout costs when there is nothing else to do.
//!
//! One copy, bursts of 64, prefetch, and no check of any frame: the descriptors are checked and copied once, with the
//! first burst, and of each there is looked only at what says that it is there. That holds for a front end that never
//! changes its buffers, as those of our benches, for which it exists: the most that can be reached with one copy. Built
//! with the feature `limit` only.

use std::sync::Arc;

use crate::burst::{BURST, BURST_MAX, HEAD_LEN};
use crate::copy::{copy, prefetch};
use crate::descriptor::{DESC_NEXT, Descriptor};
use crate::layout::Layout;
use crate::memory::GuestMemory;
use crate::packed::{PackedRing, WRAP};
use crate::setup::RingSetup;
use crate::split::SplitRing;
use crate::{RingError, features};

/// A ring of either layout with constant buffers.
pub struct LimitRing(Any);

enum Any {
    Split(Bare<SplitRing>),
    Packed(Bare<PackedRing>),
}

impl LimitRing {
    /// Starts a ring.
    pub fn start(setup: &RingSetup, memory: &Arc<GuestMemory>) -> Result<Self, RingError> {
        Ok(Self(if setup.features & (1 << features::RING_PACKED) == 0 {
            Any::Split(Bare::start(setup, memory)?)
        } else {
            Any::Packed(Bare::start(setup, memory)?)
        }))
    }

    /// Where it stands, as GET_VRING_BASE wants it.
    pub fn base(&self) -> u32 {
        match &self.0 {
            Any::Split(ring) => SplitRing::base(ring.next),
            Any::Packed(ring) => PackedRing::base(ring.next),
        }
    }

    /// Moves up to 64 frames from this TX ring into the RX ring `to`; returns how many.
    ///
    /// # Panics
    /// If the buffers are not what this loop is for, or the rings are not of one layout.
    pub fn forward(&mut self, to: &mut Self) -> u16 {
        match (&mut self.0, &mut to.0) {
            (Any::Split(from), Any::Split(to)) => from.forward(to),
            (Any::Packed(from), Any::Packed(to)) => from.forward(to),
            _ => panic!("the bare loop is for rings of one layout"),
        }
    }
}

/// What a loop needs of a layout that knows all buffers.
trait Heads: Layout {
    /// Number of the buffer that is offered at a position, if one is known to be.
    fn head(&self, at: u16) -> Option<u16>;
    /// Descriptor `index`, whatever it says.
    fn constant(&self, index: u16) -> Option<Descriptor>;
}

impl Heads for SplitRing {
    #[inline]
    fn head(&self, at: u16) -> Option<u16> {
        Some(self.avail_entry(at) & (self.size() - 1))
    }

    fn constant(&self, index: u16) -> Option<Descriptor> {
        self.descriptor(index)
    }
}

impl Heads for PackedRing {
    /// Buffers are the numbers of the descriptors: each comes again in its place.
    #[inline]
    fn head(&self, at: u16) -> Option<u16> {
        self.is_available(at).then_some(at & !WRAP)
    }

    fn constant(&self, index: u16) -> Option<Descriptor> {
        Some(self.descriptor(index))
    }
}

/// A ring of one layout.
struct Bare<L> {
    ring: L,
    memory: Arc<GuestMemory>,
    /// Checked: address and length by number. Empty until the first burst.
    buffers: Vec<(*mut u8, u32)>,
    /// Available index as last seen (split ring).
    seen: u16,
    next: u16,
}

// SAFETY: the pointers go into `memory`, which is shared memory and held here.
unsafe impl<L> Send for Bare<L> {}

impl<L: Heads> Bare<L> {
    fn start(setup: &RingSetup, memory: &Arc<GuestMemory>) -> Result<Self, RingError> {
        let ring = <L as Layout>::new(setup, memory)?;
        let [next, ahead] = ring.start(setup.base)?;
        assert_eq!(ahead, 0, "the bare loop is for fresh rings");
        Ok(Self { ring, memory: memory.clone(), buffers: Vec::new(), seen: next, next })
    }

    /// Checks and copies the descriptors. False if one of them is not a single buffer.
    #[cold]
    fn learn(&mut self) -> bool {
        let head_len = u32::try_from(HEAD_LEN).expect("a head is short");
        let buffers = (0..self.ring.size()).map_while(|index| {
            let descriptor = self.ring.constant(index)?;
            // Frames are read, and buffers written, in heads of a fixed length.
            let len = descriptor.len.max(head_len);
            let (at, part) = self.memory.translate_part(descriptor.addr, len)?;
            (part == len && descriptor.flags & DESC_NEXT == 0).then_some((at, descriptor.len))
        });
        self.buffers = buffers.collect();
        self.buffers.len() == usize::from(self.ring.size())
    }

    /// Whether the longest frame fits into the shortest buffer of `to`.
    #[cold]
    fn fits(&self, to: &Self) -> bool {
        let (frames, room) = (self.buffers.iter().map(|b| b.1).max(), to.buffers.iter().map(|b| b.1).min());
        frames <= room
    }

    fn available(&mut self) -> u16 {
        self.ring.available(self.next, &mut self.seen, BURST).unwrap_or(0)
    }

    #[inline(never)]
    fn forward(&mut self, to: &mut Self) -> u16 {
        let most = self.available().min(to.available()).min(BURST);
        if most == 0 {
            return 0;
        }
        if self.buffers.is_empty() || to.buffers.is_empty() {
            let fits = self.learn() && to.learn() && self.fits(to);
            assert!(fits, "the bare loop is for frames in single buffers that fit into single buffers");
        }
        let mut copies = [(std::ptr::null::<u8>(), std::ptr::null_mut::<u8>(), 0usize); BURST_MAX];
        let (mut from_end, mut to_end, mut first, mut count) = (self.next, to.next, [(0, 0); 2], 0);
        while count < most
            && let Some(head) = self.ring.head(from_end)
            && let Some(room) = to.ring.head(to_end)
        {
            let (source, len) = self.buffers[usize::from(head)];
            let (target, _) = to.buffers[usize::from(room)];
            prefetch(source);
            prefetch(target);
            if count == 0 {
                first = [(head, 0), (room, len)];
            }
            if count != 0 || !L::FIRST_LAST {
                self.ring.set_used(from_end, head, 0);
                to.ring.set_used(to_end, room, len);
            }
            copies[usize::from(count)] = (source, target, len as usize);
            from_end = self.ring.after(from_end);
            to_end = to.ring.after(to_end);
            count += 1;
        }
        for &(from, to, len) in &copies[..usize::from(count)] {
            // SAFETY: `learn` translated the longer of buffer and head on both sides, in memory that the rings hold, and
            // `fits` that no frame is longer than a buffer. The drivers are our own: their buffers do not overlap.
            unsafe { copy(from, to, len.max(HEAD_LEN)) };
        }
        if count != 0 {
            self.ring.publish(self.next, from_end, first[0]);
            to.ring.publish(to.next, to_end, first[1]);
            (self.next, to.next) = (from_end, to_end);
        }
        count
    }
}
