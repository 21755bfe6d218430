//! A plain model of the device's side of a split ring, written from the specification (virtio 1.2, 2.7 and 5.1.6) with no
//! regard to speed. It works on an image of the guest's memory and says what the device must find in it and what the
//! image must be afterwards, to the last byte.
//!
//! [`Rig`] holds the same image in real shared memory, with the device on it, and compares.
#![allow(dead_code, unreachable_pub, reason = "each test uses its part")]
#![allow(clippy::unwrap_used, clippy::single_range_in_vec_init)]

use std::cell::Cell;
use std::ops::Range;

use vring::driver::GUEST_BASE;
use vring::{
    ChainFault, DESC_INDIRECT, DESC_NEXT, DESC_WRITE, Descriptor, Enqueued, FRAME_LEN_MAX, RingFault,
    features,
};

pub mod packed;
mod rig;

pub use rig::{Beside, Rig, Sent, eventfd, frame_of};

/// A part of the image that is contiguous for the guest.
#[derive(Clone, Copy, Debug)]
pub struct Region {
    pub guest: u64,
    pub offset: usize,
    pub len: usize,
}

/// Regions of the given lengths one behind the other in the image, each so many bytes of guest addresses behind the one
/// before.
pub fn regions(parts: &[(usize, u64)]) -> Vec<Region> {
    let (mut guest, mut offset) = (GUEST_BASE, 0);
    let place = |(len, gap): &(usize, u64)| {
        guest += gap;
        let region = Region { guest, offset, len: *len };
        guest += *len as u64;
        offset += len;
        region
    };
    parts.iter().map(place).collect()
}

/// The image, and where the device is in it.
#[derive(Clone)]
pub struct Model {
    pub image: Vec<u8>,
    pub regions: Vec<Region>,
    /// Offsets of descriptor table, available ring and used ring.
    pub ring: [usize; 3],
    pub size: u16,
    pub features: u64,
    pub next: u16,
    pub used: u16,
    /// Available index as last seen.
    seen: u16,
    /// Descriptors walked since the burst began.
    walked: Cell<u32>,
}

/// A chain's buffers as ranges of the image, and the descriptors that were read for them.
#[derive(Default)]
struct Walk {
    buffers: Vec<Range<usize>>,
    read: Vec<Range<usize>>,
}

/// What an enqueue does.
pub struct Placed {
    pub result: Result<Enqueued, RingFault>,
    /// Buffers lie over each other or over the ring: the content depends on the order of writes.
    pub tangled: bool,
    pub written: Vec<Range<usize>>,
}

impl Model {
    /// A ring at the image's beginning.
    pub fn new(image: Vec<u8>, regions: Vec<Region>, size: u16, features: u64, base: u16) -> Self {
        let avail = (16 * usize::from(size)).next_multiple_of(64);
        let used = (avail + 6 + 2 * usize::from(size)).next_multiple_of(64);
        let mut model = Self {
            image,
            regions,
            ring: [0, avail, used],
            size,
            features,
            next: base,
            used: base,
            seen: base,
            walked: Cell::new(0),
        };
        model.image[..used + 6 + 8 * usize::from(size)].fill(0);
        model.put16(used + 2, base);
        model.publish(base);
        model
    }

    pub fn has(&self, bit: u32) -> bool {
        self.features & 1 << bit != 0
    }

    pub fn header_len(&self) -> usize {
        if self.has(features::MRG_RXBUF) || self.has(features::VERSION_1) { 12 } else { 10 }
    }

    // --- the driver's part ---

    pub fn put16(&mut self, at: usize, value: u16) {
        self.image[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }

    pub fn put_descriptor(&mut self, at: usize, d: Descriptor) {
        self.image[at..at + 8].copy_from_slice(&d.addr.to_le_bytes());
        self.image[at + 8..at + 12].copy_from_slice(&d.len.to_le_bytes());
        self.put16(at + 12, d.flags);
        self.put16(at + 14, d.next);
    }

    pub fn offer(&mut self, index: u16, head: u16) {
        let at = self.ring[1] + 4 + 2 * usize::from(index % self.size);
        self.put16(at, head);
    }

    pub fn publish(&mut self, index: u16) {
        self.put16(self.ring[1] + 2, index);
    }

    pub fn set_used_event(&mut self, index: u16) {
        self.put16(self.ring[1] + 4 + 2 * usize::from(self.size), index);
    }

    pub fn guest_addr(&self, offset: usize) -> u64 {
        let region = self.regions.iter().find(|r| (r.offset..r.offset + r.len).contains(&offset));
        let region = region.expect("offsets are within the image");
        region.guest + (offset - region.offset) as u64
    }

    // --- the device's part ---

    pub fn get16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.image[at..at + 2].try_into().unwrap())
    }

    pub fn descriptor(&self, at: usize) -> Descriptor {
        descriptor(&self.image[at..at + 16])
    }

    /// What the device does to the ring when it starts: it polls, so it wants no kicks.
    pub fn start(&mut self) {
        self.seen = self.next;
        if !self.has(features::EVENT_IDX) {
            self.put16(self.ring[2], 1);
        }
    }

    pub fn avail_idx(&self) -> u16 {
        self.get16(self.ring[1] + 2)
    }

    /// How many entries there are; the index is looked at only if it must be, for `wanted` of them.
    pub fn available(&mut self, wanted: u16) -> Result<u16, RingFault> {
        let known = self.seen.wrapping_sub(self.next);
        if known >= wanted {
            return Ok(known);
        }
        let to = self.avail_idx();
        let available = to.wrapping_sub(self.next);
        if available > self.size {
            return Err(RingFault::AvailIndex { from: self.next, to, size: self.size });
        }
        // What was said before stays said.
        if available > known {
            self.seen = to;
        }
        Ok(available.max(known))
    }

    /// Head of the chain `step` entries further on.
    pub fn head(&self, step: u16) -> Result<u16, RingFault> {
        let slot = usize::from(self.next.wrapping_add(step) % self.size);
        let entry = self.get16(self.ring[1] + 4 + 2 * slot);
        if entry >= self.size { Err(RingFault::Head { entry, size: self.size }) } else { Ok(entry) }
    }

    /// Where guest address `addr` is in the image, and how many bytes from there on are in the same region.
    fn find(&self, addr: u64) -> Option<(usize, usize)> {
        self.regions.iter().find_map(|r| {
            let into = usize::try_from(addr.checked_sub(r.guest)?).ok()?;
            (into < r.len).then(|| (r.offset + into, r.len - into))
        })
    }

    /// The ranges of the image that `len` bytes at `addr` are.
    fn ranges(&self, addr: u64, len: u64) -> Result<Vec<Range<usize>>, ChainFault> {
        let last = addr.checked_add(len.saturating_sub(1)).ok_or(ChainFault::Unmapped)?;
        let (mut addr, mut ranges) = (addr, Vec::new());
        loop {
            let (at, room) = self.find(addr).ok_or(ChainFault::Unmapped)?;
            let part =
                usize::try_from((last - addr).saturating_add(1).min(len)).unwrap_or(usize::MAX).min(room);
            ranges.push(at..at + part);
            if len == 0 || addr + part as u64 > last {
                return Ok(ranges);
            }
            addr += part as u64;
        }
    }

    /// Follows a chain. At most `most` bytes.
    pub fn walk(&self, head: u16, writable: bool, most: u64) -> Result<Vec<Range<usize>>, ChainFault> {
        let mut walk = Walk::default();
        self.walk_into(&mut walk, head, writable, most).map(|()| walk.buffers)
    }

    fn walk_into(&self, walk: &mut Walk, head: u16, writable: bool, most: u64) -> Result<(), ChainFault> {
        let (mut count, mut bytes) = (0, 0);
        let mut table: Option<(u64, u16)> = None;
        let mut index = head;
        loop {
            let bytes_of = match table {
                None if index < self.size => vec![16 * usize::from(index)..16 * usize::from(index) + 16],
                Some((addr, entries)) if index < entries => {
                    let addr = addr.checked_add(16 * u64::from(index)).ok_or(ChainFault::Unmapped)?;
                    self.ranges(addr, 16)?
                }
                _ => return Err(ChainFault::Malformed),
            };
            let d = self.gathered(&bytes_of);
            walk.read.extend(bytes_of);
            if d.flags & DESC_INDIRECT != 0 {
                self.walked.update(|n| n + 1);
                let fits = (16..=16 * u32::from(self.size)).contains(&d.len) && d.len.is_multiple_of(16);
                if !self.has(features::INDIRECT_DESC) || table.is_some() || d.flags & DESC_NEXT != 0 || !fits
                {
                    return Err(ChainFault::Malformed);
                }
                table = Some((d.addr, u16::try_from(d.len / 16).unwrap()));
                index = 0;
                continue;
            }
            count += 1;
            if count > self.size {
                return Err(ChainFault::Malformed);
            }
            self.walked.update(|n| n + 1);
            if (d.flags & DESC_WRITE != 0) != writable {
                return Err(ChainFault::Malformed);
            }
            self.buffer(d, most, &mut bytes, &mut walk.buffers)?;
            if d.flags & DESC_NEXT == 0 {
                return Ok(());
            }
            index = d.next;
        }
    }

    /// A descriptor that may lie in two regions.
    fn gathered(&self, ranges: &[Range<usize>]) -> Descriptor {
        let bytes: Vec<u8> = ranges.iter().flat_map(|r| self.image[r.clone()].iter().copied()).collect();
        descriptor(&bytes)
    }

    fn buffer(
        &self,
        d: Descriptor,
        most: u64,
        bytes: &mut u64,
        to: &mut Vec<Range<usize>>,
    ) -> Result<(), ChainFault> {
        let len = u64::from(d.len);
        // What is too long before it leaves the memory is too long.
        let room = self.contiguous(d.addr);
        if *bytes + len.min(room) > most && len != 0 {
            return Err(ChainFault::Long);
        }
        let ranges = self.ranges(d.addr, len)?;
        *bytes += len;
        to.extend(ranges.into_iter().filter(|r| !r.is_empty()));
        Ok(())
    }

    /// Bytes of guest memory from `addr` on without a hole.
    fn contiguous(&self, addr: u64) -> u64 {
        let mut end = addr;
        while let Some((_, room)) = self.find(end) {
            end += room as u64;
        }
        end - addr
    }

    /// What the chain at `head` sends: virtio-net header as delivered, and frame.
    pub fn frame(&self, head: u16) -> Result<(Vec<u8>, Vec<u8>), ChainFault> {
        self.gather(self.walk(head, false, self.longest())?)
    }

    /// Bytes that a chain may send.
    fn longest(&self) -> u64 {
        u64::from(FRAME_LEN_MAX) + self.header_len() as u64
    }

    /// What a chain of these buffers sends.
    fn gather(&self, buffers: Vec<Range<usize>>) -> Result<(Vec<u8>, Vec<u8>), ChainFault> {
        let header_len = self.header_len();
        let bytes: Vec<u8> = buffers.into_iter().flat_map(|r| self.image[r].iter().copied()).collect();
        if bytes.len() < header_len + 14 {
            return Err(ChainFault::Short);
        }
        // virtio 1.2, 5.1.6.1: what a driver says in num_buffers means nothing.
        let header = [&bytes[..10], &[1, 0]].concat();
        Ok((header, bytes[header_len..].to_vec()))
    }

    /// Returns one chain to the driver, not yet visible; `step` chains were returned before.
    fn set_used(&mut self, step: u16, head: u16, len: u32) {
        let slot = usize::from(self.used.wrapping_add(step) % self.size);
        let at = self.ring[2] + 4 + 8 * slot;
        self.image[at..at + 4].copy_from_slice(&u32::from(head).to_le_bytes());
        self.image[at + 4..at + 8].copy_from_slice(&len.to_le_bytes());
    }

    /// Makes `count` returned chains visible; whether the driver must be called for it (virtio 1.2, 2.7.7.2).
    fn publish_used(&mut self, count: u16) -> bool {
        if count == 0 {
            return false;
        }
        let old = self.used;
        self.next = self.next.wrapping_add(count);
        self.used = self.used.wrapping_add(count);
        self.put16(self.ring[2] + 2, self.used);
        if self.has(features::EVENT_IDX) {
            let event = self.get16(self.ring[1] + 4 + 2 * usize::from(self.size));
            // One of the elements written is the one that the driver waits for.
            (0..count).any(|i| old.wrapping_add(i) == event)
        } else {
            self.get16(self.ring[1]) & 1 == 0
        }
    }

    /// Returns the first `count` chains of a TX ring.
    pub fn complete(&mut self, count: u16) -> bool {
        for step in 0..count {
            let head = self.head(step).unwrap();
            self.set_used(step, head, 0);
        }
        self.publish_used(count)
    }

    /// Delivers frames, each with a 12-byte header, to an RX ring.
    pub fn deliver(&mut self, frames: &[Vec<u8>]) -> Placed {
        let before = self.image.clone();
        let mut placed = Placed { result: Ok(Enqueued::default()), tangled: false, written: Vec::new() };
        let mut read = vec![0..self.ring[2] + 6 + 8 * usize::from(self.size)];
        let mut taken = 0;
        self.walked.set(0);
        let first = self.available(u16::try_from(frames.len()).unwrap());
        placed.result = first.and_then(|available| {
            let mut done = Enqueued::default();
            for (i, frame) in frames.iter().enumerate() {
                if taken >= available && self.available(taken + 1)? <= taken {
                    done.full += u32::try_from(frames.len() - i).unwrap();
                    break;
                }
                taken += self.place(frame, taken, &mut done, &mut placed.written, &mut read)?;
            }
            done.call = self.publish_used(taken);
            Ok(done)
        });
        placed.tangled = tangled(&placed.written, &read);
        if placed.result.is_err() {
            self.image = before;
        }
        placed
    }

    /// Places one frame; returns how many buffers it used up.
    fn place(
        &mut self,
        frame: &[u8],
        taken: u16,
        done: &mut Enqueued,
        written: &mut Vec<Range<usize>>,
        read: &mut Vec<Range<usize>>,
    ) -> Result<u16, RingFault> {
        let header_len = self.header_len();
        let mut bytes = [&frame[..header_len], &frame[12..]].concat();
        let (mut room, mut heads) = (Vec::new(), Vec::new());
        let mut left = bytes.len();
        let mut fault = None;
        while left != 0 && fault.is_none() && (heads.is_empty() || self.has(features::MRG_RXBUF)) {
            let step = taken + u16::try_from(heads.len()).unwrap();
            if heads.is_empty()
                && let head = self.head(step)?
                && let Some(buffer) = self.simple(self.descriptor(16 * usize::from(head)), left)
            {
                room.push(buffer);
                heads.push((head, left));
                left = 0;
                break;
            }
            if self.walked.get() > u32::from(self.size) + 4096 {
                if heads.is_empty() {
                    done.full += 1;
                    return Ok(0);
                }
                fault = Some(ChainFault::Malformed);
                break;
            }
            if self.available(step + 1)? <= step {
                done.full += 1;
                return Ok(0);
            }
            let head = self.head(step)?;
            let before = left;
            match self.writable(head, read) {
                Ok(buffers) => take(buffers, &mut left, &mut room),
                Err(why) => fault = Some(why),
            }
            heads.push((head, before - left));
        }
        let whole = left == 0 && fault.is_none();
        if whole {
            self.scatter(&mut bytes, heads.len(), room, written, done);
        } else {
            count(fault, done);
        }
        for (i, (head, len)) in (0..).zip(&heads) {
            self.set_used(taken + i, *head, if whole { u32::try_from(*len).unwrap() } else { 0 });
        }
        Ok(u16::try_from(heads.len()).unwrap())
    }

    /// The place for `len` bytes in a chain of one buffer that begins with room for them in one region: the rest of it is
    /// not looked at.
    fn simple(&self, d: Descriptor, len: usize) -> Option<Range<usize>> {
        let single = d.flags & (DESC_NEXT | DESC_WRITE | DESC_INDIRECT) == DESC_WRITE;
        let (at, room) = self.find(d.addr)?;
        (single && d.len as usize >= len && room >= len).then(|| at..at + len)
    }

    /// Writes a frame with its header, `bytes`, into the `room` that so many buffers gave.
    fn scatter(
        &mut self,
        bytes: &mut [u8],
        buffers: usize,
        room: Vec<Range<usize>>,
        written: &mut Vec<Range<usize>>,
        done: &mut Enqueued,
    ) {
        done.frames += 1;
        done.bytes += (bytes.len() - self.header_len()) as u64;
        if self.header_len() == 12 {
            bytes[10..12].copy_from_slice(&u16::try_from(buffers).unwrap().to_le_bytes());
        }
        let mut left = &bytes[..];
        for range in room.into_iter().filter(|range| !range.is_empty()) {
            let (part, rest) = left.split_at(range.len());
            self.image[range.clone()].copy_from_slice(part);
            left = rest;
            written.push(range);
        }
    }

    /// A chain's buffers.
    fn writable(&self, head: u16, read: &mut Vec<Range<usize>>) -> Result<Vec<Range<usize>>, ChainFault> {
        let mut walk = Walk::default();
        let walked = self.walk_into(&mut walk, head, true, u64::MAX);
        read.append(&mut walk.read);
        walked.map(|()| walk.buffers)
    }
}

/// Makes `room` in a chain's buffers for the bytes that are `left`.
fn take(buffers: Vec<Range<usize>>, left: &mut usize, room: &mut Vec<Range<usize>>) {
    for buffer in buffers {
        let part = buffer.len().min(*left);
        room.push(buffer.start..buffer.start + part);
        *left -= part;
    }
}

/// Counts a frame that found no place: of a faulty chain, or in too little room.
fn count(fault: Option<ChainFault>, done: &mut Enqueued) {
    match fault {
        None => done.too_small += 1,
        Some(ChainFault::Unmapped) => done.unmapped += 1,
        Some(_) => done.malformed += 1,
    }
}

/// A descriptor as it lies in memory (virtio 1.2, 2.7.5).
fn descriptor(bytes: &[u8]) -> Descriptor {
    Descriptor {
        addr: u64::from_le_bytes(bytes[..8].try_into().unwrap()),
        len: u32::from_le_bytes(bytes[8..12].try_into().unwrap()),
        flags: u16::from_le_bytes(bytes[12..14].try_into().unwrap()),
        next: u16::from_le_bytes(bytes[14..16].try_into().unwrap()),
    }
}

/// Whether ranges lie over each other, or over what is read meanwhile.
fn tangled(written: &[Range<usize>], read: &[Range<usize>]) -> bool {
    let mut sorted = written.to_vec();
    sorted.sort_by_key(|r| r.start);
    let over = |a: &Range<usize>, b: &Range<usize>| a.start < b.end && b.start < a.end;
    sorted.windows(2).any(|pair| over(&pair[0], &pair[1]))
        || read.iter().any(|r| written.iter().any(|w| over(r, w)))
}

/// Bytes that differ from their neighbours and from one `seed` to another.
pub fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2).wrapping_add(1);
    let mut next = || {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        (state >> 33).to_le_bytes()[0]
    };
    (0..len).map(|_| next()).collect()
}
