//! The packed ring as it lies in shared memory (virtio 1.2, 2.8): the only place that touches its words.
//!
//! One ring of descriptors that both sides write, and two words of event suppression. A driver writes a descriptor over a
//! used one; the device writes a used one over the first descriptor of a chain. Whose a descriptor is, two flags say, in
//! comparison with a *wrap counter* that each side flips when it comes to the ring's beginning.
//!
//! ```text
//! descriptor  addr u64 | len u32 | id u16 | flags u16        size × 16 bytes
//! event       descriptor u15, wrap u1 | flags u2             4 bytes for each side
//! ```
//!
//! A position is 16 bits: the index, and the wrap counter in bit 15, as SET_VRING_BASE and the event words have it.
//!
//! Length, id and flags are one aligned 64-bit word, which is loaded by one atomic load and stored by one atomic store:
//! whoever sees the flags sees the id and the length that belong to them. It is loaded with acquire before the address is
//! read. The first used descriptor of a burst is stored last, with release: the driver looks at descriptors in order, so
//! it sees all of them or none.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use crate::descriptor::{DESC_NEXT, DESC_WRITE, Descriptor};
use crate::device::RingFault;
use crate::layout::{Chain, Layout, SINGLE, translate_areas};
use crate::memory::GuestMemory;
use crate::notify::Words;
use crate::setup::RingSetup;
use crate::{RingError, SIZE_MAX};

/// Descriptor flag: equal to the driver's wrap counter when made available (virtio 1.2, 2.8.1).
pub(crate) const DESC_AVAIL: u16 = 1 << 7;
/// Descriptor flag: the inverse of it when made available, equal to [`DESC_AVAIL`] when used.
pub(crate) const DESC_USED: u16 = 1 << 15;
/// Wrap counter of a position.
pub(crate) const WRAP: u16 = 1 << 15;

/// Event flags (virtio 1.2, 2.8.14): notify always, never, or of one descriptor (with EVENT_IDX only).
const EVENT_ENABLE: u16 = 0;
const EVENT_DISABLE: u16 = 1;
const EVENT_DESC: u16 = 2;

/// Which areas a packed ring of `size` descriptors has: (name, length, alignment) (virtio 1.2, 2.8).
pub(crate) fn areas(size: u16) -> [(&'static str, u64, u64); 3] {
    let ring = Descriptor::LEN * u64::from(size);
    [("descriptor ring", ring, 16), ("driver event area", 4, 4), ("device event area", 4, 4)]
}

/// The flags that make a descriptor at a position available.
#[inline]
pub(crate) fn available_flags(at: u16) -> u16 {
    if at & WRAP != 0 { DESC_AVAIL } else { DESC_USED }
}

/// The flags that make it used.
#[inline]
pub(crate) fn used_flags(at: u16) -> u16 {
    if at & WRAP != 0 { DESC_AVAIL | DESC_USED } else { 0 }
}

/// Pointers to the three areas of one running ring; as for a split ring, its owner holds the memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PackedRing {
    desc: *const AtomicU64,
    driver_event: *const AtomicU32,
    device_event: *const AtomicU32,
    size: u16,
}

// SAFETY: the pointers go to shared memory that is accessed through atomics only; who owns a `PackedRing` also holds the
// memory behind it.
unsafe impl Send for PackedRing {}

impl PackedRing {
    /// From addresses of our own.
    ///
    /// # Safety
    /// Each pointer is aligned and valid for reads and writes of its area of a ring of `size` (see [`areas`]) as long as
    /// the result is used; `size` is not 0.
    pub(crate) unsafe fn from_raw(host: [*mut u8; 3], size: u16) -> Self {
        Self { desc: host[0].cast(), driver_event: host[1].cast(), device_event: host[2].cast(), size }
    }

    pub(crate) fn size(&self) -> u16 {
        self.size
    }

    /// The position `slots` ≤ size further on.
    #[inline]
    pub(crate) fn advance(&self, at: u16, slots: u16) -> u16 {
        // Below 2 × 32768, so it does not wrap around.
        let index = u32::from(at & !WRAP) + u32::from(slots);
        let size = u32::from(self.size);
        #[allow(clippy::cast_possible_truncation)]
        if index < size { at & WRAP | index as u16 } else { (at & WRAP ^ WRAP) | (index - size) as u16 }
    }

    /// Whether a position, given from outside, lies in the ring.
    fn contains(&self, at: u16) -> bool {
        at & !WRAP < self.size
    }

    /// Slots from position `from` forward to `to`, both in the ring: less than 2 × size.
    fn distance(&self, from: u16, to: u16) -> u32 {
        let size = u32::from(self.size);
        let laps = |at: u16| u32::from(at & !WRAP) + if at & WRAP != 0 { 0 } else { size };
        (laps(to) + 2 * size - laps(from)) % (2 * size)
    }

    /// One of the two words of the descriptor at a position in the ring: 0 the address, 1 the rest.
    #[inline]
    fn word(&self, at: u16, word: usize) -> &AtomicU64 {
        let index = usize::from(at & !WRAP);
        debug_assert!(index < usize::from(self.size) && word < 2);
        // SAFETY: positions come from `start` (checked) and `advance`, so the index is below `size`, and the ring has
        // 2 × size words; aligned and valid by `from_raw`'s contract.
        unsafe { &*self.desc.add(2 * index + word) }
    }

    /// Length, id and flags of the descriptor at `at`, with acquire.
    #[inline]
    pub(crate) fn rest(&self, at: u16) -> u64 {
        self.word(at, 1).load(Ordering::Acquire)
    }

    /// Stores them, with `order`: length, id, flags.
    #[inline]
    pub(crate) fn set_rest(&self, at: u16, rest: u64, order: Ordering) {
        self.word(at, 1).store(rest, order);
    }

    /// Stores the address of the descriptor at `at`.
    pub(crate) fn set_addr(&self, at: u16, addr: u64) {
        self.word(at, 0).store(addr.to_le(), Ordering::Relaxed);
    }

    /// The descriptor at `at`, whosever it is, fetched once.
    #[inline]
    pub(crate) fn descriptor(&self, at: u16) -> Descriptor {
        let rest = self.rest(at);
        Descriptor::from_packed(self.word(at, 0).load(Ordering::Relaxed), rest)
    }

    /// Flags of the descriptor at `at`, with acquire.
    #[inline]
    fn flags(&self, at: u16) -> u16 {
        Descriptor::from_packed(0, self.rest(at)).flags
    }

    /// Whether the descriptor at `at` was made available.
    #[inline]
    pub(crate) fn is_available(&self, at: u16) -> bool {
        self.flags(at) & (DESC_AVAIL | DESC_USED) == available_flags(at)
    }

    /// Whether the descriptor at `at` is used.
    #[inline]
    pub(crate) fn is_used(&self, at: u16) -> bool {
        self.flags(at) & (DESC_AVAIL | DESC_USED) == used_flags(at)
    }

    /// One address in each line of `count` descriptors from `at` on: four are in a line.
    #[inline]
    fn lines(&self, at: u16, count: u16) -> impl Iterator<Item = *const u8> {
        (0..count.min(self.size)).step_by(4).map(move |ahead| {
            let index = usize::from(self.advance(at, ahead) & !WRAP);
            self.desc.wrapping_add(2 * index).cast()
        })
    }

    /// Asks the cache for descriptors that are going to be written.
    #[inline]
    pub(crate) fn prefetch_to_write(&self, at: u16, count: u16) {
        self.lines(at, count).for_each(crate::copy::prefetch_to_write);
    }

    /// Offers again what the device has used from `at` on, at most a whole lap; returns how many descriptors that were.
    /// All of them are single buffers that have their descriptor's number as id, and their places in the ring: `filled` has
    /// the word of each, without whose it is. A used element whose id is ahead stands for those before it, too (IN_ORDER).
    #[inline]
    pub(crate) fn offer_again(&self, at: u16, filled: &[u64]) -> u16 {
        let begin = at & !WRAP;
        let (mut count, mut ahead) = (0, 0);
        for (lap, part) in [(at & WRAP, begin..self.size), (!at & WRAP, 0..begin)] {
            let used = u64::from(used_flags(lap));
            let mine = (u64::from(available_flags(!lap)) << 48).to_le();
            let words = &filled[usize::from(part.start)..usize::from(part.end)];
            for (index, word) in part.zip(words) {
                if ahead == 0 {
                    let rest = u64::from_le(self.rest(index));
                    if (rest >> 48) & u64::from(DESC_AVAIL | DESC_USED) != used {
                        return count;
                    }
                    #[allow(clippy::cast_possible_truncation)]
                    let id = (rest >> 32) as u16;
                    ahead = id.wrapping_sub(index).min(id.wrapping_sub(index).wrapping_add(self.size));
                } else {
                    ahead -= 1;
                }
                self.set_rest(index, word | mine, Ordering::Release);
                count += 1;
            }
        }
        count
    }

    fn used_word(at: u16, id: u16, len: u32) -> u64 {
        // Virtio 1.2, 2.8.4: WRITE tells that the length means something.
        let write = u16::from(len != 0) * DESC_WRITE;
        Descriptor { addr: 0, len, flags: used_flags(at) | write, next: id }.to_packed()[1]
    }

    /// The driver tells the device.
    #[inline]
    pub(crate) fn kicks(&self, event_idx: bool) -> Direction<'_> {
        // SAFETY: valid and aligned by `from_raw`'s contract.
        let event = unsafe { &*self.device_event };
        Direction { ring: self, event, event_idx, is_there: Self::is_available }
    }

    /// The device tells the driver.
    #[inline]
    pub(crate) fn calls(&self, event_idx: bool) -> Direction<'_> {
        // SAFETY: valid and aligned by `from_raw`'s contract.
        let event = unsafe { &*self.driver_event };
        Direction { ring: self, event, event_idx, is_there: Self::is_used }
    }
}

/// The wish of one side, one 32-bit word: position, then flags.
pub(crate) struct Direction<'a> {
    ring: &'a PackedRing,
    event: &'a AtomicU32,
    event_idx: bool,
    is_there: fn(&PackedRing, u16) -> bool,
}

impl Direction<'_> {
    #[inline]
    fn store(&self, at: u16, flags: u16) {
        self.event.store((u32::from(at) | u32::from(flags) << 16).to_le(), Ordering::Relaxed);
    }
}

impl Words for Direction<'_> {
    fn is_there(&self, at: u16) -> bool {
        (self.is_there)(self.ring, at)
    }

    fn wish(&self, at: u16) {
        self.store(at, if self.event_idx { EVENT_DESC } else { EVENT_ENABLE });
    }

    #[inline]
    fn wish_nothing(&self) {
        self.store(0, EVENT_DISABLE);
    }

    #[inline]
    fn is_wished(&self, old: u16, new: u16) -> bool {
        let event = u32::from_le(self.event.load(Ordering::Relaxed));
        #[allow(clippy::cast_possible_truncation)]
        let (at, flags) = (event as u16, (event >> 16) as u16 & 3);
        match flags {
            EVENT_DISABLE => false,
            // A position outside of the ring, and flags that mean nothing, are a wish for everything.
            EVENT_DESC if self.event_idx && self.ring.contains(at) => {
                self.ring.distance(old, at) < self.ring.distance(old, new)
            }
            _ => true,
        }
    }

    #[inline]
    fn fence(&self) {
        fence(Ordering::SeqCst);
    }
}

impl Layout for PackedRing {
    const FIRST_LAST: bool = true;

    fn new(setup: &RingSetup, memory: &Arc<GuestMemory>) -> Result<Self, RingError> {
        // Virtio 1.2, 2.8.10.1: any size up to 2^15, not only powers of two.
        if setup.size == 0 || setup.size > SIZE_MAX {
            return Err(RingError::Size(setup.size));
        }
        let host = translate_areas(setup, memory, areas(setup.size))?;
        // SAFETY: each area was translated with its whole length for `size` and is aligned as `areas` says.
        Ok(unsafe { Self::from_raw(host, setup.size) })
    }

    fn size(&self) -> u16 {
        self.size
    }

    /// The lower half is where to take chains, the upper half where to write used ones (vhost-user specification,
    /// "Virtqueue state"). Nothing is outstanding, so they are the same; some front ends leave the upper half at 0.
    fn start(&self, base: u32) -> Result<[u16; 2], RingError> {
        #[allow(clippy::cast_possible_truncation)]
        let next = base as u16;
        if self.contains(next) { Ok([next, 0]) } else { Err(RingError::Base(base)) }
    }

    fn base(next: u16) -> u32 {
        u32::from(next) | u32::from(next) << 16
    }

    #[inline]
    fn after(&self, at: u16) -> u16 {
        // Behind index 32767 the carry flips the wrap counter.
        let next = at.wrapping_add(1);
        if next & !WRAP == self.size { !at & WRAP } else { next }
    }

    #[inline]
    fn advance(&self, at: u16, slots: u16) -> u16 {
        self.advance(at, slots)
    }

    /// There is no index: only a look at each descriptor tells. If the first is not there, none is, and the lines behind
    /// it are better left to the driver that is writing them.
    #[inline]
    fn available(&self, next: u16, _: &mut u16, wanted: u16) -> Result<u16, RingFault> {
        Ok(if self.is_available(next) { wanted } else { 0 })
    }

    #[inline]
    fn known(&self, _: u16, _: u16) -> u16 {
        u16::MAX
    }

    #[inline]
    fn prefetch(&self, at: u16, count: u16) {
        self.lines(at, count).for_each(crate::copy::prefetch_to_write);
    }

    #[inline]
    fn first(&self, at: u16) -> Result<Option<(u16, Descriptor)>, RingFault> {
        let descriptor = self.descriptor(at);
        if descriptor.flags & (DESC_AVAIL | DESC_USED) != available_flags(at) {
            return Ok(None);
        }
        // The id of a longer chain is in its last descriptor, and checked when that is found.
        if descriptor.flags & DESC_NEXT == 0 && descriptor.next >= self.size {
            return Err(RingFault::Head { entry: descriptor.next, size: self.size });
        }
        Ok(Some((descriptor.next, descriptor)))
    }

    #[inline]
    fn single(&self, at: u16, flags: u16) -> Option<(u16, Descriptor)> {
        let descriptor = self.descriptor(at);
        let wanted = available_flags(at) | flags;
        let is_single = descriptor.flags & (DESC_AVAIL | DESC_USED | SINGLE) == wanted;
        (is_single && descriptor.next < self.size).then_some((descriptor.next, descriptor))
    }

    /// A chain is descriptors one behind the other, and its id is in the last one (virtio 1.2, 2.8.6). The driver makes
    /// the first one available when all are there.
    fn follow(&self, chain: &mut Chain) -> bool {
        let fits = chain.slots < self.size;
        if fits {
            chain.last = self.descriptor(self.advance(chain.at, chain.slots));
            chain.slots += 1;
            chain.id = chain.last.next;
        }
        fits
    }

    fn end(&self, chain: &mut Chain) {
        while chain.last.flags & DESC_NEXT != 0 && self.follow(chain) {}
    }

    /// Entries run to the table's end, and of their flags WRITE alone means something (virtio 1.2, 2.8.7).
    fn table_entry(words: [u64; 2], index: u16, entries: u16) -> Descriptor {
        let entry = Descriptor::from_packed(words[0], words[1]);
        let next = if index + 1 < entries { DESC_NEXT } else { 0 };
        Descriptor { flags: entry.flags & DESC_WRITE | next, next: index + 1, ..entry }
    }

    #[inline]
    fn set_used(&self, at: u16, id: u16, len: u32) {
        self.set_rest(at, Self::used_word(at, id, len), Ordering::Relaxed);
    }

    #[inline]
    fn publish(&self, old: u16, _: u16, (id, len): (u16, u32)) {
        self.set_rest(old, Self::used_word(old, id, len), Ordering::Release);
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

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::notify::{arm, wanted};

    /// Gives a ring in memory of its own to `test`.
    fn with_ring(size: u16, test: impl FnOnce(&PackedRing)) {
        let mut memory = vec![0u64; 2 * usize::from(size) + 2];
        let base: *mut u8 = memory.as_mut_ptr().cast();
        let events = 16 * usize::from(size);
        let host = [0, events, events + 8].map(|offset| base.wrapping_add(offset));
        // SAFETY: aligned to 8 as the words are, and valid for each area: the ring, and 8 bytes for either event.
        test(&unsafe { PackedRing::from_raw(host, size) });
    }

    /// All positions of a ring, in order, beginning with the first of the first lap.
    fn positions(size: u16) -> impl Iterator<Item = u16> + Clone {
        [WRAP, 0].into_iter().flat_map(move |wrap| (0..size).map(move |index| wrap | index))
    }

    /// Miri is a thousand times slower.
    const SIZES: &[u16] = if cfg!(miri) { &[1, 3] } else { &[1, 2, 3, 7, 8, 33] };

    #[test]
    fn positions_follow_each_other_for_two_laps() {
        for &size in SIZES {
            with_ring(size, |ring| {
                let round = positions(size).cycle();
                for (i, from) in positions(size).enumerate() {
                    for (slots, to) in (0..=size).zip(round.clone().skip(i)) {
                        assert_eq!(ring.advance(from, slots), to, "{from:#x} + {slots} of {size}");
                    }
                    for (distance, to) in (0..2 * u32::from(size)).zip(round.clone().skip(i)) {
                        assert_eq!(ring.distance(from, to), distance, "{from:#x} to {to:#x} of {size}");
                    }
                }
            });
        }
        with_ring(SIZE_MAX, |ring| {
            assert_eq!(ring.advance(WRAP | 32_767, 1), 0);
            assert_eq!(ring.advance(32_767, SIZE_MAX), WRAP | 32_767);
            assert_eq!(ring.distance(WRAP, 32_767), 65_535);
        });
    }

    /// Every wish there is, after every batch from every position: the specification's wish is to be told of one of the
    /// descriptors that were passed, and of whatever it is if the wish makes no sense (virtio 1.2, 2.8.14).
    #[test]
    fn told_exactly_when_the_event_is_among_the_descriptors() {
        for &size in SIZES {
            with_ring(size, |ring| {
                let outside = [size, 0x7fff, WRAP | size, 0xffff];
                for (old, batch) in positions(size).flat_map(|old| (1..=size).map(move |batch| (old, batch)))
                {
                    let passed: Vec<_> = (0..batch).map(|slot| ring.advance(old, slot)).collect();
                    let new = ring.advance(old, batch);
                    let told = |event: u16, flags: u16, event_idx| {
                        let word = (u32::from(event) | u32::from(flags) << 16).to_le();
                        // SAFETY: the events of this ring, valid as its maker promised.
                        let [driver, device] = unsafe { [&*ring.driver_event, &*ring.device_event] };
                        driver.store(word, Ordering::Relaxed);
                        let called = wanted(&ring.calls(event_idx), old, new);
                        driver.store(!word, Ordering::Relaxed);
                        device.store(word, Ordering::Relaxed);
                        assert_eq!(wanted(&ring.kicks(event_idx), old, new), called, "both ways alike");
                        called
                    };
                    for event in positions(size) {
                        assert_eq!(
                            told(event, EVENT_DESC, true),
                            passed.contains(&event),
                            "{event:#x} {old:#x} + {batch} of {size}"
                        );
                        assert!(!told(event, EVENT_DISABLE, true) && !told(event, EVENT_DISABLE, false));
                        assert!(told(event, EVENT_ENABLE, true) && told(event, EVENT_ENABLE, false));
                        // Reserved: 3, and 2 if it was not negotiated. Bits beyond mean nothing.
                        assert!(
                            told(event, 3, true) && told(event, 3, false) && told(event, EVENT_DESC, false)
                        );
                        assert!(!told(event, EVENT_DISABLE | 0xfffc, true));
                    }
                    assert!(outside.iter().all(|event| told(*event, EVENT_DESC, true)));
                }
            });
        }
    }

    /// Where the words are and what they say: virtio 1.2, 2.8.13 and 2.8.14.
    #[test]
    fn words_of_each_direction() {
        with_ring(4, |ring| {
            let words = |ring: &PackedRing| {
                // SAFETY: the events of this ring, valid as its maker promised.
                let events = unsafe { [&*ring.driver_event, &*ring.device_event] };
                events.map(|event| event.load(Ordering::Relaxed).to_ne_bytes())
            };
            assert!(arm(&ring.kicks(true), WRAP | 2) && arm(&ring.calls(true), WRAP | 3));
            assert_eq!(words(ring), [[3, 0x80, 2, 0], [2, 0x80, 2, 0]]);
            assert!(arm(&ring.kicks(false), WRAP | 2) && arm(&ring.calls(false), WRAP | 1));
            assert_eq!(words(ring), [[1, 0x80, 0, 0], [2, 0x80, 0, 0]]);
            crate::notify::disarm(&ring.kicks(true));
            assert_eq!(words(ring), [[1, 0x80, 0, 0], [0, 0, 1, 0]]);
            // Whose a descriptor is decides who finds it there.
            for (flags, kick, call) in [
                (0, false, false),
                (DESC_AVAIL, true, false),
                (DESC_USED, false, false),
                (DESC_AVAIL | DESC_USED, false, true),
            ] {
                let rest = Descriptor { flags, ..Descriptor::default() }.to_packed()[1];
                ring.set_rest(1, rest, Ordering::Relaxed);
                assert_eq!(!arm(&ring.kicks(true), WRAP | 1), kick, "{flags:#x}");
                assert_eq!(!arm(&ring.calls(true), WRAP | 1), call, "{flags:#x}");
                assert_eq!(!arm(&ring.kicks(true), 1), flags == DESC_USED, "{flags:#x} in the other lap");
                assert_eq!(!arm(&ring.calls(true), 1), flags == 0, "{flags:#x} in the other lap");
            }
            ring.set_used(WRAP | 1, 0x0203, 0x0405_0607);
            // SAFETY: the second word of descriptor 1.
            let bytes = unsafe { (*ring.desc.add(3)).load(Ordering::Relaxed) }.to_ne_bytes();
            assert_eq!(bytes, [7, 6, 5, 4, 3, 2, 0x82, 0x80]);
            ring.set_used(1, 0x0203, 0);
            assert_eq!(ring.descriptor(1), Descriptor { addr: 0, len: 0, flags: 0, next: 0x0203 });
        });
    }
}
