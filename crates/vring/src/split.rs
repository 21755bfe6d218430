//! The split ring as it lies in shared memory (virtio 1.2, 2.7): the only place that touches its words.
//!
//! Three areas: the *descriptor table* and the *available ring* are written by the driver, the *used ring* by the device.
//!
//! ```text
//! descriptor  addr u64 | len u32 | flags u16 | next u16                      size × 16 bytes
//! available   flags u16 | idx u16 | ring[size] u16      | used_event u16
//! used        flags u16 | idx u16 | ring[size] {id u32, len u32} | avail_event u16
//! ```
//!
//! The other side changes its words at any moment, so every word is read exactly once, by an atomic load, and only
//! the value read is checked and used. Ordering: an index is loaded with acquire before the entries it publishes are
//! read, and stored with release after them. Notification suppression needs a full fence on both sides, see
//! [`crate::notify`].

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU64, Ordering, fence};

use crate::descriptor::Descriptor;
use crate::device::RingFault;
use crate::layout::{Chain, Layout, SINGLE, translate_areas};
use crate::memory::GuestMemory;
use crate::notify::{Words, passed};
use crate::setup::RingSetup;
use crate::{RingError, SIZE_MAX};

/// Which areas a split ring of `size` descriptors has: (name, length, alignment) (virtio 1.2, 2.7).
pub(crate) fn areas(size: u16) -> [(&'static str, u64, u64); 3] {
    let size = u64::from(size);
    // The trailing event words exist only with EVENT_IDX, but every driver allocates them.
    [
        ("descriptor table", Descriptor::LEN * size, 16),
        ("available ring", 6 + 2 * size, 2),
        ("used ring", 6 + 8 * size, 4),
    ]
}

/// Pointers to the three areas of one running ring. Copying it copies pointers; it is valid as long as the memory it
/// was made from is mapped, which its owner guarantees by holding that memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SplitRing {
    desc: *const AtomicU64,
    avail: *const AtomicU16,
    used: *const AtomicU16,
    size: u16,
}

// SAFETY: the pointers go to shared memory that is accessed through atomics only; who owns a `SplitRing` also holds
// the memory behind it.
unsafe impl Send for SplitRing {}

impl SplitRing {
    /// From addresses of our own.
    ///
    /// # Safety
    /// Each pointer is aligned and valid for reads and writes of its area of a ring of `size` (see [`areas`]) as long
    /// as the result is used; `size` is a power of two.
    pub(crate) unsafe fn from_raw(host: [*mut u8; 3], size: u16) -> Self {
        Self { desc: host[0].cast(), avail: host[1].cast(), used: host[2].cast(), size }
    }

    #[inline]
    pub(crate) fn size(&self) -> u16 {
        self.size
    }

    #[inline]
    fn slot(&self, index: u16) -> usize {
        usize::from(index & self.size.wrapping_sub(1))
    }

    #[inline]
    fn desc_word(&self, word: usize) -> &AtomicU64 {
        debug_assert!(word < 2 * usize::from(self.size));
        // SAFETY: `word` < 2 × size (asserted by every caller's mask or check), and the table has 2 × size words;
        // aligned and valid by `from_raw`'s contract.
        unsafe { &*self.desc.add(word) }
    }

    #[inline]
    fn avail_word(&self, word: usize) -> &AtomicU16 {
        debug_assert!(word < 3 + usize::from(self.size));
        // SAFETY: callers pass 0, 1, 2 + slot or 2 + size; the area has 3 + size words.
        unsafe { &*self.avail.add(word) }
    }

    #[inline]
    fn used_word(&self, word: usize) -> &AtomicU16 {
        debug_assert!(word < 3 + 4 * usize::from(self.size));
        // SAFETY: callers pass 0, 1 or 2 + 4 × size; the area has 3 + 4 × size words of 16 bits.
        unsafe { &*self.used.add(word) }
    }

    /// Where used element `index` is: two 32-bit words that need not be aligned to 8.
    #[inline]
    fn used_element(&self, index: u16) -> *mut u64 {
        // Element `slot` < size begins 4 + 8 × slot bytes into the area, which has 6 + 8 × size.
        self.used.cast::<u8>().wrapping_add(4 + 8 * self.slot(index)).cast_mut().cast()
    }

    // --- what the device reads and writes ---

    /// Entry of the available ring: the head of a descriptor chain.
    #[inline]
    pub(crate) fn avail_entry(&self, index: u16) -> u16 {
        u16::from_le(self.avail_word(2 + self.slot(index)).load(Ordering::Relaxed))
    }

    /// One descriptor, fetched once. `None` if there is no such descriptor.
    #[inline]
    pub(crate) fn descriptor(&self, index: u16) -> Option<Descriptor> {
        if index >= self.size {
            return None;
        }
        let word = 2 * usize::from(index);
        let addr = self.desc_word(word).load(Ordering::Relaxed);
        let rest = self.desc_word(word + 1).load(Ordering::Relaxed);
        Some(Descriptor::from_words(addr, rest))
    }

    /// Writes one used element; visible to the driver when the index behind it is published.
    #[inline]
    pub(crate) fn set_used(&self, index: u16, id: u16, len: u32) {
        let element = (u64::from(id) | u64::from(len) << 32).to_le();
        // SAFETY: eight bytes inside the used area (see `used_element`). The driver does not read an element before the
        // index that publishes it, so the store need not be atomic.
        unsafe { self.used_element(index).write_unaligned(element) };
    }

    // --- what the driver reads and writes ---

    pub(crate) fn set_descriptor(&self, index: u16, descriptor: Descriptor) {
        let word = 2 * self.slot(index);
        let [addr, rest] = descriptor.to_words();
        self.desc_word(word).store(addr, Ordering::Relaxed);
        self.desc_word(word + 1).store(rest, Ordering::Relaxed);
    }

    #[inline]
    pub(crate) fn set_avail(&self, index: u16, head: u16) {
        self.avail_word(2 + self.slot(index)).store(head.to_le(), Ordering::Relaxed);
    }

    /// A used element: (head of the chain, bytes written).
    #[inline]
    pub(crate) fn used(&self, index: u16) -> (u32, u32) {
        // SAFETY: eight bytes inside the used area (see `used_element`), published by the index that was read before.
        let element = u64::from_le(unsafe { self.used_element(index).read_unaligned() });
        #[allow(clippy::cast_possible_truncation)]
        let id = element as u32;
        (id, (element >> 32) as u32)
    }

    // --- by what the two tell each other ---

    /// The driver tells the device.
    #[inline]
    pub(crate) fn kicks(&self, event_idx: bool) -> Direction<'_> {
        let event = self.used_word(2 + 4 * usize::from(self.size));
        Direction { index: self.avail_word(1), flags: self.used_word(0), event, event_idx }
    }

    /// The device tells the driver.
    #[inline]
    pub(crate) fn calls(&self, event_idx: bool) -> Direction<'_> {
        let event = self.avail_word(2 + usize::from(self.size));
        Direction { index: self.used_word(1), flags: self.avail_word(0), event, event_idx }
    }
}

/// The words of one direction, little-endian in memory (virtio 1.2, 2.7.6 and 2.7.8).
pub(crate) struct Direction<'a> {
    index: &'a AtomicU16,
    flags: &'a AtomicU16,
    event: &'a AtomicU16,
    event_idx: bool,
}

impl Direction<'_> {
    /// The teller's index, with acquire: the entries before it may be read.
    #[inline]
    pub(crate) fn index(&self) -> u16 {
        u16::from_le(self.index.load(Ordering::Acquire))
    }

    /// Stores the index, with release: everything written before is visible to whoever sees it.
    #[inline]
    pub(crate) fn publish(&self, index: u16) {
        self.index.store(index.to_le(), Ordering::Release);
    }

    /// The waiter's flags: bit 0 says that it wishes not to be told.
    #[inline]
    pub(crate) fn set_flags(&self, flags: u16) {
        self.flags.store(flags.to_le(), Ordering::Relaxed);
    }
}

impl Words for Direction<'_> {
    #[inline]
    fn is_there(&self, at: u16) -> bool {
        self.index() != at
    }

    #[inline]
    fn wish(&self, at: u16) {
        if self.event_idx {
            self.event.store(at.to_le(), Ordering::Relaxed);
        } else {
            self.set_flags(0);
        }
    }

    /// With EVENT_IDX the stale event index does that: it is passed once in 65536 entries.
    #[inline]
    fn wish_nothing(&self) {
        if !self.event_idx {
            self.set_flags(1);
        }
    }

    #[inline]
    fn is_wished(&self, old: u16, new: u16) -> bool {
        if self.event_idx {
            passed(u16::from_le(self.event.load(Ordering::Relaxed)), old, new)
        } else {
            u16::from_le(self.flags.load(Ordering::Relaxed)) & 1 == 0
        }
    }

    #[inline]
    fn fence(&self) {
        fence(Ordering::SeqCst);
    }
}

/// The device's way through a split ring. Positions are the free-running indices of the available and the used ring.
impl Layout for SplitRing {
    const FIRST_LAST: bool = false;

    fn new(setup: &RingSetup, memory: &Arc<GuestMemory>) -> Result<Self, RingError> {
        if setup.size == 0 || setup.size > SIZE_MAX || !setup.size.is_power_of_two() {
            return Err(RingError::Size(setup.size));
        }
        let host = translate_areas(setup, memory, areas(setup.size))?;
        // SAFETY: each area was translated with its whole length for `size` and is aligned as `areas` says.
        Ok(unsafe { Self::from_raw(host, setup.size) })
    }

    fn size(&self) -> u16 {
        self.size
    }

    fn start(&self, base: u32) -> Result<[u16; 2], RingError> {
        let next = u16::try_from(base).map_err(|_| RingError::Base(base))?;
        // The one time that the used index is read back: it is where the driver expects us to go on.
        Ok([next, self.calls(false).index().wrapping_sub(next)])
    }

    fn base(next: u16) -> u32 {
        next.into()
    }

    #[inline]
    fn after(&self, at: u16) -> u16 {
        at.wrapping_add(1)
    }

    #[inline]
    fn advance(&self, at: u16, slots: u16) -> u16 {
        at.wrapping_add(slots)
    }

    #[inline]
    fn available(&self, next: u16, seen: &mut u16, wanted: u16) -> Result<u16, RingFault> {
        let known = seen.wrapping_sub(next);
        if known >= wanted {
            return Ok(known);
        }
        let to = self.kicks(false).index();
        let available = to.wrapping_sub(next);
        if available > self.size {
            return Err(RingFault::AvailIndex { from: next, to, size: self.size });
        }
        // An index that goes back takes nothing away from a burst that counts on what it said before.
        if available > known {
            *seen = to;
        }
        Ok(available.max(known))
    }

    #[inline]
    fn known(&self, at: u16, seen: u16) -> u16 {
        seen.wrapping_sub(at)
    }

    #[inline]
    fn prefetch(&self, at: u16, count: u16) {
        // Four descriptors are in a line, and drivers mostly offer them in the order in which they lie there.
        for i in (0..count).step_by(4) {
            // A hint only: the entry is read again when its turn comes.
            let head = self.avail_entry(at.wrapping_add(i));
            crate::copy::prefetch(self.desc.wrapping_add(2 * usize::from(head)).cast());
        }
    }

    #[inline]
    fn first(&self, at: u16) -> Result<Option<(u16, Descriptor)>, RingFault> {
        let head = self.avail_entry(at);
        match self.descriptor(head) {
            Some(descriptor) => Ok(Some((head, descriptor))),
            None => Err(RingFault::Head { entry: head, size: self.size }),
        }
    }

    #[inline]
    fn single(&self, at: u16, flags: u16) -> Option<(u16, Descriptor)> {
        let head = self.avail_entry(at);
        let descriptor = self.descriptor(head).filter(|descriptor| descriptor.flags & SINGLE == flags)?;
        Some((head, descriptor))
    }

    fn follow(&self, chain: &mut Chain) -> bool {
        let next = self.descriptor(chain.last.next);
        chain.last = next.unwrap_or_default();
        next.is_some()
    }

    /// A chain is one entry of the available ring, however long it is.
    fn end(&self, _: &mut Chain) {}

    fn table_entry(words: [u64; 2], _index: u16, _entries: u16) -> Descriptor {
        Descriptor::from_words(words[0], words[1])
    }

    #[inline]
    fn set_used(&self, at: u16, id: u16, len: u32) {
        self.set_used(at, id, len);
    }

    #[inline]
    fn publish(&self, _: u16, new: u16, _: (u16, u32)) {
        self.calls(false).publish(new);
    }

    #[inline]
    fn kicks(&self, event_idx: bool) -> impl Words {
        self.kicks(event_idx)
    }

    #[inline]
    fn calls(&self, event_idx: bool) -> impl Words {
        self.calls(event_idx)
    }
}
