//! One ring, driven by us, of either layout.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{Buffer, DriverMemory, GUEST_BASE};
use crate::descriptor::{DESC_INDIRECT, DESC_NEXT, DESC_WRITE, Descriptor};
use crate::packed::{self, PackedRing, WRAP, available_flags};
use crate::split::{self, SplitRing};
use crate::{RingFault, features, notify};

/// One ring, driven by us.
pub struct DriverRing {
    memory: Arc<DriverMemory>,
    words: Words,
    at: usize,
    event_idx: bool,
    /// The device may let one used element stand for many.
    in_order: bool,
    /// Descriptors that are in no chain. In a packed ring they are ids: a chain takes as many as it has buffers, and the
    /// first one names it.
    free: Vec<u16>,
    /// For each head: how many descriptors its chain has, 0 if it is not on its way. Here and not in the ring, which the
    /// device can write.
    lengths: Box<[u16]>,
    /// For each descriptor of a chain: the one behind it.
    next: Box<[u16]>,
    /// Chains on their way.
    out: u16,
    /// With IN_ORDER: heads on their way, oldest first.
    order: VecDeque<u16>,
    /// With IN_ORDER: everything up to this head is used, and not yet taken: (head, length).
    batch: Option<(u16, u32)>,
    /// Next available entry to fill, and what was published: positions.
    avail: u16,
    published: u16,
    /// Next used element to look at: a position.
    used: u16,
    /// Packed ring: the word that makes everything offered since the last publication visible.
    first: u64,
    /// Packed ring, after [`Self::fill`]: the word of each descriptor, without whose it is.
    filled: Vec<u64>,
}

/// Descriptors that [`DriverRing::recycle`] asks the cache for.
const RECYCLE_AHEAD: u16 = 64;

/// The ring in memory.
enum Words {
    Split(SplitRing),
    Packed(PackedRing),
}

impl DriverRing {
    /// Bytes that a ring of `size` descriptors takes, of either layout.
    pub fn bytes(size: u16) -> usize {
        offsets(&split::areas(size)).1.max(offsets(&packed::areas(size)).1)
    }

    /// A ring of `size` at `at` (aligned to 16); `features` are those negotiated and decide on its layout.
    ///
    /// # Panics
    /// If it does not fit there, or a split ring's size is no power of two: offsets and sizes are our own.
    pub fn new(memory: &Arc<DriverMemory>, at: usize, size: u16, features: u64) -> Self {
        let has = |bit: u32| features & (1 << bit) != 0;
        let is_packed = has(features::RING_PACKED);
        let (parts, len) = offsets(&if is_packed { packed::areas(size) } else { split::areas(size) });
        assert!(is_packed || size.is_power_of_two(), "a split ring of {size}");
        assert!(size != 0 && at.is_multiple_of(16), "a ring of {size} at {at}");
        let end = at.checked_add(len);
        assert!(end.is_some_and(|end| end <= memory.len()), "a ring of {size} does not fit at {at}");
        let host = parts.map(|part| memory.base.wrapping_add(at + part));
        // SAFETY: all areas lie in the mapping (asserted) that `memory` keeps, at aligned offsets of a page-aligned base,
        // and the size is what the layout demands (asserted).
        let words = unsafe {
            if is_packed {
                Words::Packed(PackedRing::from_raw(host, size))
            } else {
                Words::Split(SplitRing::from_raw(host, size))
            }
        };
        let start = if is_packed { WRAP } else { 0 };
        Self {
            memory: memory.clone(),
            words,
            at,
            event_idx: has(features::EVENT_IDX),
            in_order: has(features::IN_ORDER),
            free: (0..size).rev().collect(),
            lengths: vec![0; usize::from(size)].into(),
            next: vec![0; usize::from(size)].into(),
            out: 0,
            order: VecDeque::new(),
            batch: None,
            avail: start,
            published: start,
            used: start,
            first: 0,
            filled: Vec::new(),
        }
    }

    /// The memory it lies in.
    pub fn memory(&self) -> &Arc<DriverMemory> {
        &self.memory
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        match &self.words {
            Words::Split(ring) => ring.size(),
            Words::Packed(ring) => ring.size(),
        }
    }

    /// What to say in SET_VRING_BASE if nothing was offered yet: a packed ring begins with its wrap counter at 1.
    pub fn start(&self) -> u16 {
        match &self.words {
            Words::Split(_) => 0,
            Words::Packed(_) => WRAP,
        }
    }

    fn parts(&self) -> [usize; 3] {
        let size = self.size();
        match &self.words {
            Words::Split(_) => offsets(&split::areas(size)).0,
            Words::Packed(_) => offsets(&packed::areas(size)).0,
        }
    }

    /// Where the three areas are, as offsets into the memory: for whoever wants to scribble over them.
    pub fn area_offsets(&self) -> [usize; 3] {
        self.parts().map(|part| self.at + part)
    }

    /// Our addresses of the three areas (descriptors, driver's, device's): for SET_VRING_ADDR.
    pub fn user_addrs(&self) -> [u64; 3] {
        self.area_offsets().map(|offset| self.memory.base as u64 + offset as u64)
    }

    // --- carefully ---

    /// Descriptors that are free.
    pub fn free(&self) -> u16 {
        u16::try_from(self.free.len()).expect("a ring has at most 32768")
    }

    /// Offers a chain of buffers; visible with the next [`Self::publish`]. `None` if too few descriptors are free.
    pub fn offer(&mut self, buffers: &[Buffer]) -> Option<u16> {
        self.offer_numbered(buffers.len(), |at, _| buffers[at])
    }

    /// As [`Self::offer`], a chain of `count`; `buffer` is told its place in the chain and the number of its descriptor,
    /// which no other chain on its way has.
    pub fn offer_numbered(
        &mut self,
        count: usize,
        mut buffer: impl FnMut(usize, u16) -> Buffer,
    ) -> Option<u16> {
        let possible = (1..=self.free.len()).contains(&count);
        possible.then(|| self.push_chain(count, |at, number| descriptor_of(buffer(at, number))))
    }

    /// Offers a chain by an indirect table, which is written at `table` (16 bytes a buffer).
    pub fn offer_indirect(&mut self, table: usize, buffers: &[Buffer]) -> Option<u16> {
        if self.free.is_empty() {
            return None;
        }
        for (i, buffer) in (0u16..).zip(buffers) {
            let mut descriptor = descriptor_of(*buffer);
            let words = match &self.words {
                Words::Split(_) if usize::from(i) + 1 < buffers.len() => {
                    descriptor.flags |= DESC_NEXT;
                    descriptor.next = i + 1;
                    descriptor.to_words()
                }
                Words::Split(_) => descriptor.to_words(),
                Words::Packed(_) => descriptor.to_packed(),
            };
            let offset = table + 16 * usize::from(i);
            self.memory.write(offset, &words[0].to_ne_bytes());
            self.memory.write(offset + 8, &words[1].to_ne_bytes());
        }
        let len = u32::try_from(16 * buffers.len()).expect("a table of our own is short");
        let addr = GUEST_BASE + table as u64;
        Some(self.push_chain(1, |_, _| Descriptor { addr, len, flags: DESC_INDIRECT, next: 0 }))
    }

    /// Writes a chain of `count` descriptors into the ring, for which there is room.
    fn push_chain(&mut self, count: usize, mut descriptor: impl FnMut(usize, u16) -> Descriptor) -> u16 {
        let left = self.free.len() - count;
        let head = *self.free.last().expect("there is room");
        for at in 0..count {
            let number = self.free[self.free.len() - 1 - at];
            let behind = (at + 1 < count).then(|| self.free[self.free.len() - 2 - at]);
            let mut descriptor = descriptor(at, number);
            if let Some(behind) = behind {
                descriptor.flags |= DESC_NEXT;
                self.next[usize::from(number)] = behind;
            }
            match &self.words {
                Words::Split(ring) => {
                    descriptor.next = behind.unwrap_or(descriptor.next);
                    ring.set_descriptor(number, descriptor);
                }
                Words::Packed(ring) => {
                    let flags = descriptor.flags | available_flags(self.avail);
                    let [addr, rest] = Descriptor { flags, next: head, ..descriptor }.to_packed();
                    ring.set_addr(self.avail, addr);
                    if self.avail == self.published {
                        self.first = rest;
                    } else {
                        ring.set_rest(self.avail, rest, Ordering::Relaxed);
                    }
                    self.avail = ring.advance(self.avail, 1);
                }
            }
        }
        if let Words::Split(ring) = &self.words {
            ring.set_avail(self.avail, head);
            self.avail = self.avail.wrapping_add(1);
        }
        self.free.truncate(left);
        self.lengths[usize::from(head)] = u16::try_from(count).expect("a chain is no longer than the ring");
        self.out += 1;
        if self.in_order {
            self.order.push_back(head);
        }
        head
    }

    /// Makes everything offered visible. True if the device wants a kick.
    pub fn publish(&mut self) -> bool {
        let old = std::mem::replace(&mut self.published, self.avail);
        if old == self.avail {
            return false;
        }
        match &self.words {
            Words::Split(ring) => ring.kicks(self.event_idx).publish(self.avail),
            Words::Packed(ring) => ring.set_rest(old, self.first, Ordering::Release),
        }
        self.kick_wanted(old)
    }

    /// Whether the device wants a kick for what became available since position `old`.
    fn kick_wanted(&self, old: u16) -> bool {
        match &self.words {
            Words::Split(ring) => notify::wanted(&ring.kicks(self.event_idx), old, self.avail),
            Words::Packed(ring) => notify::wanted(&ring.kicks(self.event_idx), old, self.avail),
        }
    }

    /// Takes the next chain that the device has used: (head or id, bytes written).
    ///
    /// # Panics
    /// If the device returns what it was not given: it is ours.
    pub fn take_used(&mut self) -> Option<(u16, u32)> {
        self.try_take_used().expect("our device returns what it was given")
    }

    /// The same with a device that is not ours: (head or id, bytes that it says it has written).
    ///
    /// # Errors
    /// It returned what it was not given; the ring must not be used any more.
    pub fn try_take_used(&mut self) -> Result<Option<(u16, u32)>, RingFault> {
        let used = match self.batch.take() {
            Some(batch) => Some(batch),
            None => self.used_element()?,
        };
        let Some((head, len)) = used else { return Ok(None) };
        let head = match self.order.pop_front() {
            Some(oldest) if oldest != head => {
                self.batch = Some((head, len));
                oldest
            }
            _ => head,
        };
        let count = std::mem::take(&mut self.lengths[usize::from(head)]);
        self.out -= 1;
        self.used = match &self.words {
            Words::Split(_) => self.used.wrapping_add(1),
            Words::Packed(ring) => ring.advance(self.used, count),
        };
        self.put_back(head, count);
        Ok(Some((head, len)))
    }

    /// Puts the descriptors of a chain back, so that they are given away in the same order again.
    fn put_back(&mut self, head: u16, count: u16) {
        let (begun, mut number) = (self.free.len(), head);
        for _ in 0..count {
            self.free.push(number);
            number = self.next[usize::from(number)];
        }
        self.free[begun..].reverse();
    }

    /// The used element at our position, if it is there: a chain that is on its way.
    fn used_element(&self) -> Result<Option<(u16, u32)>, RingFault> {
        let (id, len) = match &self.words {
            Words::Split(ring) => {
                let to = self.used_idx();
                match to.wrapping_sub(self.used) {
                    0 => return Ok(None),
                    ahead if ahead > self.out => {
                        return Err(RingFault::UsedIndex { from: self.used, to, out: self.out });
                    }
                    _ => ring.used(self.used),
                }
            }
            Words::Packed(ring) if ring.is_used(self.used) => {
                let descriptor = ring.descriptor(self.used);
                (descriptor.next.into(), descriptor.len)
            }
            Words::Packed(_) => return Ok(None),
        };
        let known =
            u16::try_from(id).ok().filter(|id| self.lengths.get(usize::from(*id)).is_some_and(|n| *n != 0));
        Ok(Some((known.ok_or(RingFault::UsedId { id })?, len)))
    }

    /// Asks the device for a call on the next used chain. False if there is one already.
    pub fn want_call(&mut self) -> bool {
        match &self.words {
            Words::Split(ring) => notify::arm(&ring.calls(self.event_idx), self.used),
            Words::Packed(ring) => notify::arm(&ring.calls(self.event_idx), self.used),
        }
    }

    /// Asks the device for no calls.
    pub fn want_no_call(&mut self) {
        match &self.words {
            Words::Split(ring) => notify::disarm(&ring.calls(self.event_idx)),
            Words::Packed(ring) => notify::disarm(&ring.calls(self.event_idx)),
        }
    }

    // --- lightly ---

    /// Offers every descriptor as a chain of its own, `offset(i)` being where buffer `i` begins: what [`Self::recycle`]
    /// needs. The ring must be fresh.
    pub fn fill(&mut self, len: u32, writable: bool, offset: impl Fn(u16) -> usize) {
        self.fill_each(|i| Buffer { offset: offset(i), len, writable });
    }

    /// As [`Self::fill`], with buffers of any kind.
    pub fn fill_each(&mut self, buffer: impl Fn(u16) -> Buffer) {
        for i in 0..self.size() {
            let descriptor = Descriptor { next: i, ..descriptor_of(buffer(i)) };
            self.filled.push(descriptor.to_packed()[1]);
            // A fresh ring gives its descriptors away from 0 on.
            let head = self.push_chain(1, |_, _| descriptor);
            assert_eq!(head, i, "only a fresh ring can be filled");
        }
    }

    /// Gives back, unseen, all that the device has used; returns how many chains that were. Only after [`Self::fill`],
    /// and with a device that uses in order. In a split ring the available ring then already says what it should, and
    /// one load and one store do it.
    #[inline]
    pub fn recycle(&mut self) -> u16 {
        match &self.words {
            Words::Split(ring) => {
                let used = ring.calls(false).index();
                let count = used.wrapping_sub(self.used);
                if count != 0 {
                    self.used = used;
                    self.avail = self.avail.wrapping_add(count);
                    self.published = self.avail;
                    ring.kicks(false).publish(self.avail);
                }
                count
            }
            Words::Packed(ring) => {
                if !ring.is_used(self.used) {
                    return 0;
                }
                ring.prefetch_to_write(self.used, RECYCLE_AHEAD);
                let count = ring.offer_again(self.used, &self.filled);
                self.used = ring.advance(self.used, count);
                self.avail = ring.advance(self.avail, count);
                self.published = self.avail;
                count
            }
        }
    }

    /// Whether the device wants a kick for what [`Self::recycle`] gave back, `count` chains.
    pub fn kick_wanted_after(&self, count: u16) -> bool {
        let old = match &self.words {
            Words::Split(_) => self.avail.wrapping_sub(count),
            // Forward by the rest of two laps.
            Words::Packed(ring) => ring.advance(ring.advance(self.avail, ring.size() - count), ring.size()),
        };
        self.kick_wanted(old)
    }

    // --- by hand, a split ring ---

    fn split(&self) -> &SplitRing {
        match &self.words {
            Words::Split(ring) => ring,
            Words::Packed(_) => panic!("a packed ring has no such words"),
        }
    }

    /// Available index as published.
    pub fn avail_idx(&self) -> u16 {
        self.published
    }

    /// Used index as the device published it.
    pub fn used_idx(&self) -> u16 {
        self.split().calls(false).index()
    }

    /// Used element `index` steps before the next one to be taken: what the device wrote last, for checks.
    pub fn used_before(&self, index: u16) -> (u32, u32) {
        self.split().used(self.used.wrapping_sub(index))
    }

    /// Writes any descriptor.
    pub fn set_descriptor(&self, index: u16, descriptor: Descriptor) {
        self.split().set_descriptor(index, descriptor);
    }

    /// Writes any available entry.
    pub fn set_avail(&self, index: u16, head: u16) {
        self.split().set_avail(index, head);
    }

    /// Stores any available index; [`Self::publish`] does not know of it.
    pub fn publish_avail(&self, index: u16) {
        self.split().kicks(false).publish(index);
    }

    // --- by hand, a packed ring ---

    /// Writes any descriptor at any position, its flags last: they say whose it is.
    pub fn set_packed(&self, at: u16, descriptor: Descriptor) {
        let Words::Packed(ring) = &self.words else { panic!("a split ring has no such words") };
        let [addr, rest] = descriptor.to_packed();
        ring.set_addr(at, addr);
        ring.set_rest(at, rest, Ordering::Release);
    }

    /// Reads the descriptor at a position.
    pub fn packed(&self, at: u16) -> Descriptor {
        let Words::Packed(ring) = &self.words else { panic!("a split ring has no such words") };
        ring.descriptor(at)
    }
}

fn descriptor_of(buffer: Buffer) -> Descriptor {
    let flags = if buffer.writable { DESC_WRITE } else { 0 };
    Descriptor { addr: GUEST_BASE + buffer.offset as u64, len: buffer.len, flags, next: 0 }
}

/// Offsets of the three areas of a ring from its beginning, and its length. Each begins on a line of its own.
fn offsets(areas: &[(&'static str, u64, u64); 3]) -> ([usize; 3], usize) {
    let mut end = 0;
    let parts = areas.map(|(_, len, _)| {
        let at = end;
        end = (at + usize::try_from(len).expect("areas are small")).next_multiple_of(64);
        at
    });
    (parts, end)
}
