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

use crate::memory::GuestMemory;
use crate::notify::Words;
use crate::setup::RingSetup;
use crate::{RingError, SIZE_MAX};

/// Descriptor flag: the chain goes on at `next` (virtio 1.2, 2.7.5).
pub const DESC_NEXT: u16 = 1;
/// Descriptor flag: the device may write the buffer, otherwise read it.
pub const DESC_WRITE: u16 = 2;
/// Descriptor flag: the buffer contains a table of descriptors.
pub const DESC_INDIRECT: u16 = 4;

/// One descriptor, copied out of shared memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// Guest physical address of the buffer.
    pub addr: u64,
    /// Its length in bytes.
    pub len: u32,
    /// `DESC_*`; undefined bits are ignored.
    pub flags: u16,
    /// Next descriptor, if `DESC_NEXT`.
    pub next: u16,
}

impl Descriptor {
    /// Bytes of a descriptor in memory.
    pub const LEN: u64 = 16;

    /// From the two words as they lie in memory, little-endian.
    #[inline]
    #[allow(clippy::cast_possible_truncation)]
    pub(crate) fn from_words(addr: u64, rest: u64) -> Self {
        let rest = u64::from_le(rest);
        Self {
            addr: u64::from_le(addr),
            len: rest as u32,
            flags: (rest >> 32) as u16,
            next: (rest >> 48) as u16,
        }
    }

    /// The two words as they lie in memory.
    #[inline]
    pub(crate) fn to_words(self) -> [u64; 2] {
        let rest = u64::from(self.len) | u64::from(self.flags) << 32 | u64::from(self.next) << 48;
        [self.addr.to_le(), rest.to_le()]
    }
}

/// Which areas of a split ring of `size` descriptors need how many bytes and which alignment (virtio 1.2, 2.7).
pub(crate) fn areas(size: u16) -> [(u64, u64); 3] {
    let size = u64::from(size);
    // The trailing event words exist only with EVENT_IDX, but every driver allocates them.
    [(Descriptor::LEN * size, 16), (6 + 2 * size, 2), (6 + 8 * size, 4)]
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
    /// Translates the addresses of a set-up. The whole of every area must lie in one region.
    pub(crate) fn new(setup: &RingSetup, memory: &Arc<GuestMemory>) -> Result<Self, RingError> {
        if setup.size == 0 || setup.size > SIZE_MAX || !setup.size.is_power_of_two() {
            return Err(RingError::Size(setup.size));
        }
        let names = ["descriptor table", "available ring", "used ring"];
        let addrs = [setup.desc_user_addr, setup.avail_user_addr, setup.used_user_addr];
        let mut host = [std::ptr::null_mut::<u8>(); 3];
        for (i, (len, align)) in areas(setup.size).into_iter().enumerate() {
            let (part, addr) = (names[i], addrs[i]);
            let at = memory.translate_user(addr, len).ok_or(RingError::Unmapped { part, addr, len })?;
            // The front end's alignment says nothing of ours: regions may be mapped from odd offsets.
            if addr % align != 0 || !(at as usize as u64).is_multiple_of(align) {
                return Err(RingError::Unaligned { part, addr, align });
            }
            host[i] = at;
        }
        // SAFETY: each area was translated with its whole length for `size` and is aligned as `areas` says.
        Ok(unsafe { Self::from_raw(host, setup.size) })
    }

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
        usize::from(index & (self.size - 1))
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

    /// Available index, with acquire: the entries before it may be read.
    #[inline]
    pub(crate) fn avail_idx(&self) -> u16 {
        self.kicks().index()
    }

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

    /// Asks the cache for a descriptor. Any index is harmless.
    #[inline]
    pub(crate) fn prefetch_descriptor(&self, index: u16) {
        crate::copy::prefetch(self.desc.wrapping_add(2 * usize::from(index)).cast());
    }

    /// Writes one used element; visible to the driver with the next [`Self::publish_used`].
    #[inline]
    pub(crate) fn set_used(&self, index: u16, id: u16, len: u32) {
        let element = (u64::from(id) | u64::from(len) << 32).to_le();
        // SAFETY: eight bytes inside the used area (see `used_element`). The driver does not read an element before the
        // index that publishes it, so the store need not be atomic.
        unsafe { self.used_element(index).write_unaligned(element) };
    }

    /// Stores the used index, with release: everything written before is visible to whoever sees it.
    #[inline]
    pub(crate) fn publish_used(&self, index: u16) {
        self.calls().publish(index);
    }

    /// The device's own index as it stands in memory: only read when a ring starts.
    pub(crate) fn used_idx(&self) -> u16 {
        self.calls().index()
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

    #[inline]
    pub(crate) fn publish_avail(&self, index: u16) {
        self.kicks().publish(index);
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
    pub(crate) fn kicks(&self) -> Direction<'_> {
        let event = self.used_word(2 + 4 * usize::from(self.size));
        Direction { index: self.avail_word(1), flags: self.used_word(0), event }
    }

    /// The device tells the driver.
    #[inline]
    pub(crate) fn calls(&self) -> Direction<'_> {
        let event = self.avail_word(2 + usize::from(self.size));
        Direction { index: self.used_word(1), flags: self.avail_word(0), event }
    }
}

/// The words of one direction, little-endian in memory (virtio 1.2, 2.7.6 and 2.7.8).
pub(crate) struct Direction<'a> {
    index: &'a AtomicU16,
    flags: &'a AtomicU16,
    event: &'a AtomicU16,
}

impl Words for Direction<'_> {
    #[inline]
    fn index(&self) -> u16 {
        u16::from_le(self.index.load(Ordering::Acquire))
    }

    #[inline]
    fn publish(&self, index: u16) {
        self.index.store(index.to_le(), Ordering::Release);
    }

    #[inline]
    fn flags(&self) -> u16 {
        u16::from_le(self.flags.load(Ordering::Relaxed))
    }

    #[inline]
    fn set_flags(&self, flags: u16) {
        self.flags.store(flags.to_le(), Ordering::Relaxed);
    }

    #[inline]
    fn event(&self) -> u16 {
        u16::from_le(self.event.load(Ordering::Relaxed))
    }

    #[inline]
    fn set_event(&self, index: u16) {
        self.event.store(index.to_le(), Ordering::Relaxed);
    }

    #[inline]
    fn fence(&self) {
        fence(Ordering::SeqCst);
    }
}
