//! The driver's side of a split ring: what a guest does. For tests, benches and the demo, and for ports that attach to
//! somebody else's back end.
//!
//! [`DriverMemory`] is memory to share (a sealed memfd); [`DriverRing`] is one ring in it. A ring can be driven in three
//! ways: carefully ([`DriverRing::offer`], [`DriverRing::take_used`]), lightly ([`DriverRing::recycle`]: gives back whole
//! bursts without looking at buffers, so that a front end costs almost nothing in a measurement), and by hand
//! ([`DriverRing::set_descriptor`] and friends), which can say anything a hostile guest could.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};

use crate::memory::RegionSpec;
use crate::notify;
use crate::split::{DESC_INDIRECT, DESC_NEXT, DESC_WRITE, Descriptor, SplitRing, areas};

/// Guest address of the first byte of a [`DriverMemory`]: not 0 and not our own address, so that a mix-up shows.
pub const GUEST_BASE: u64 = 0x1_0000_0000;

/// Bytes of a huge page.
const HUGE_PAGE: usize = 2 << 20;

/// Memory that is shared with a back end.
pub struct DriverMemory {
    file: OwnedFd,
    base: *mut u8,
    len: usize,
}

// SAFETY: plain shared memory, accessed by bounds-checked copies and through atomics; unmapped only on drop.
unsafe impl Send for DriverMemory {}
// SAFETY: as above.
unsafe impl Sync for DriverMemory {}

impl fmt::Debug for DriverMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DriverMemory").field("len", &self.len).finish_non_exhaustive()
    }
}

impl Drop for DriverMemory {
    fn drop(&mut self) {
        // SAFETY: exactly what mmap returned; nobody else holds pointers into it, since rings hold an `Arc` of `self`.
        let _ = unsafe { rustix::mm::munmap(self.base.cast(), self.len) };
    }
}

impl DriverMemory {
    /// `len` bytes (rounded up to pages), sealed against resizing. In huge pages if that many are free: a burst then
    /// costs no TLB miss a frame.
    pub fn new(len: usize) -> io::Result<Arc<Self>> {
        let huge = Self::map(len.next_multiple_of(HUGE_PAGE), MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB);
        let memory = huge.or_else(|_| Self::map(len, MemfdFlags::empty()))?;
        rustix::fs::fcntl_add_seals(&memory.file, SealFlags::SHRINK | SealFlags::GROW)?;
        Ok(Arc::new(memory))
    }

    /// As [`Self::new`], but of small pages, and the file can be truncated: what a hostile front end would share.
    pub fn unsealed(len: usize) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self::map(len, MemfdFlags::empty())?))
    }

    fn map(len: usize, pages: MemfdFlags) -> io::Result<Self> {
        let len = len.next_multiple_of(rustix::param::page_size());
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | pages;
        let file = rustix::fs::memfd_create("vring-driver", flags)?;
        rustix::fs::ftruncate(&file, len as u64)?;
        // SAFETY: a new mapping at a place of the kernel's choice, of a file that we just made.
        let base = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                &file,
                0,
            )?
        };
        Ok(Self { file, base: base.cast(), len })
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never empty.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The file, to be sent to the back end.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// The whole as one region.
    pub fn region(&self) -> RegionSpec {
        self.region_of(0, self.len)
    }

    /// `len` bytes from `offset` on as a region.
    pub fn region_of(&self, offset: usize, len: usize) -> RegionSpec {
        RegionSpec {
            guest_addr: GUEST_BASE + offset as u64,
            size: len as u64,
            user_addr: self.base as u64 + offset as u64,
            mmap_offset: offset as u64,
        }
    }

    /// Copies bytes in at `offset`.
    ///
    /// # Panics
    /// If they do not fit: offsets are our own.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        assert!(
            offset.checked_add(bytes.len()).is_some_and(|end| end <= self.len),
            "write outside of own memory"
        );
        // SAFETY: in bounds (asserted); the destination is shared memory, no reference to it exists.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.base.add(offset), bytes.len()) };
    }

    /// Copies bytes out from `offset`.
    ///
    /// # Panics
    /// If there are not so many: offsets are our own.
    pub fn read(&self, offset: usize, bytes: &mut [u8]) {
        assert!(
            offset.checked_add(bytes.len()).is_some_and(|end| end <= self.len),
            "read outside of own memory"
        );
        // SAFETY: in bounds (asserted); the source is shared memory that tolerates concurrent change.
        unsafe { std::ptr::copy_nonoverlapping(self.base.add(offset), bytes.as_mut_ptr(), bytes.len()) };
    }
}

/// One buffer of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Offset into the [`DriverMemory`].
    pub offset: usize,
    /// Bytes.
    pub len: u32,
    /// The device may write it.
    pub writable: bool,
}

/// One ring, driven by us.
pub struct DriverRing {
    memory: Arc<DriverMemory>,
    split: SplitRing,
    at: usize,
    event_idx: bool,
    /// Descriptors that are not in a chain.
    free: Vec<u16>,
    /// For each head: the descriptors of its chain.
    chains: Vec<Vec<u16>>,
    /// Next available entry to fill, and what was published.
    avail: u16,
    published: u16,
    /// Next used element to look at.
    used: u16,
}

impl DriverRing {
    /// Bytes that a ring of `size` descriptors takes.
    pub fn bytes(size: u16) -> usize {
        offsets(size).1
    }

    /// A ring of `size` (a power of two) at `at` (aligned to 16).
    ///
    /// # Panics
    /// If it does not fit there: offsets and sizes are our own.
    pub fn new(memory: &Arc<DriverMemory>, at: usize, size: u16, event_idx: bool) -> Self {
        let (parts, len) = offsets(size);
        assert!(size.is_power_of_two() && at.is_multiple_of(16), "ring of {size} at {at}");
        assert!(
            at.checked_add(len).is_some_and(|end| end <= memory.len),
            "a ring of {size} does not fit at {at}"
        );
        let host = parts.map(|part| memory.base.wrapping_add(at + part));
        // SAFETY: all areas lie in the mapping (asserted) that `memory` keeps, at aligned offsets of a page-aligned base.
        let split = unsafe { SplitRing::from_raw(host, size) };
        Self {
            memory: memory.clone(),
            split,
            at,
            event_idx,
            free: (0..size).rev().collect(),
            chains: vec![Vec::new(); usize::from(size)],
            avail: 0,
            published: 0,
            used: 0,
        }
    }

    /// The memory it lies in.
    pub fn memory(&self) -> &Arc<DriverMemory> {
        &self.memory
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.split.size()
    }

    /// Our addresses of descriptor table, available ring and used ring: for SET_VRING_ADDR.
    pub fn user_addrs(&self) -> [u64; 3] {
        offsets(self.size()).0.map(|part| self.memory.base as u64 + (self.at + part) as u64)
    }

    /// Offers a chain of buffers; visible with the next [`Self::publish`]. `None` if too few descriptors are free.
    pub fn offer(&mut self, buffers: &[Buffer]) -> Option<u16> {
        if buffers.is_empty() || buffers.len() > self.free.len() {
            return None;
        }
        let chain: Vec<u16> =
            self.free.split_off(self.free.len() - buffers.len()).into_iter().rev().collect();
        for (i, buffer) in buffers.iter().enumerate() {
            let next = chain.get(i + 1).copied();
            self.split.set_descriptor(chain[i], descriptor_of(*buffer, next));
        }
        Some(self.push_chain(chain))
    }

    /// Offers a chain by an indirect table, which is written at `table` (16 bytes a buffer).
    pub fn offer_indirect(&mut self, table: usize, buffers: &[Buffer]) -> Option<u16> {
        let head = self.free.pop()?;
        for (i, buffer) in (0u16..).zip(buffers) {
            let next = (usize::from(i) + 1 < buffers.len()).then_some(i + 1);
            let words = descriptor_of(*buffer, next).to_words();
            let offset = table + 16 * usize::from(i);
            self.memory.write(offset, &words[0].to_ne_bytes());
            self.memory.write(offset + 8, &words[1].to_ne_bytes());
        }
        let len = u32::try_from(16 * buffers.len()).expect("a table of our own is short");
        let addr = GUEST_BASE + table as u64;
        self.split.set_descriptor(head, Descriptor { addr, len, flags: DESC_INDIRECT, next: 0 });
        Some(self.push_chain(vec![head]))
    }

    fn push_chain(&mut self, chain: Vec<u16>) -> u16 {
        let head = chain[0];
        self.chains[usize::from(head)] = chain;
        self.split.set_avail(self.avail, head);
        self.avail = self.avail.wrapping_add(1);
        head
    }

    /// Makes everything offered visible. True if the device wants a kick.
    pub fn publish(&mut self) -> bool {
        let old = std::mem::replace(&mut self.published, self.avail);
        if old == self.avail {
            return false;
        }
        self.split.publish_avail(self.avail);
        notify::wanted(&self.split.kicks(), self.event_idx, old, self.avail)
    }

    /// Takes the next chain that the device has used: (head, bytes written).
    pub fn take_used(&mut self) -> Option<(u16, u32)> {
        if self.split.used_idx() == self.used {
            return None;
        }
        let (id, len) = self.split.used(self.used);
        self.used = self.used.wrapping_add(1);
        let head = u16::try_from(id).expect("our device returns what it was given");
        let chain = std::mem::take(&mut self.chains[usize::from(head)]);
        self.free.extend(chain.into_iter().rev());
        Some((head, len))
    }

    /// Offers every descriptor as a chain of its own, `offset(i)` being where buffer `i` begins: what [`Self::recycle`]
    /// needs. The ring must be fresh.
    pub fn fill(&mut self, len: u32, writable: bool, offset: impl Fn(u16) -> usize) {
        self.fill_each(|i| Buffer { offset: offset(i), len, writable });
    }

    /// As [`Self::fill`], with buffers of any kind.
    pub fn fill_each(&mut self, buffer: impl Fn(u16) -> Buffer) {
        for i in 0..self.size() {
            let buffer = buffer(i);
            self.split.set_descriptor(i, descriptor_of(buffer, None));
            self.split.set_avail(i, i);
        }
        self.free.clear();
        self.avail = self.size();
    }

    /// Gives back, unseen, all that the device has used; returns how many chains that were. Only after [`Self::fill`],
    /// and with a device that uses in order: then the available ring already says what it should, and one load and one
    /// store do it.
    #[inline]
    pub fn recycle(&mut self) -> u16 {
        let used = self.split.used_idx();
        let count = used.wrapping_sub(self.used);
        if count != 0 {
            self.used = used;
            self.avail = self.avail.wrapping_add(count);
            self.published = self.avail;
            self.split.publish_avail(self.avail);
        }
        count
    }

    /// Used element `index` steps before the next one to be taken: what the device wrote last, for checks.
    pub fn used_before(&self, index: u16) -> (u32, u32) {
        self.split.used(self.used.wrapping_sub(index))
    }

    /// Whether the device wants a kick for what [`Self::recycle`] gave back, `count` chains.
    pub fn kick_wanted_after(&self, count: u16) -> bool {
        let old = self.avail.wrapping_sub(count);
        notify::wanted(&self.split.kicks(), self.event_idx, old, self.avail)
    }

    /// Asks the device for a call on the next used chain. False if there is one already.
    pub fn want_call(&mut self) -> bool {
        notify::arm(&self.split.calls(), self.event_idx, self.used)
    }

    /// Asks the device for no calls.
    pub fn want_no_call(&mut self) {
        notify::disarm(&self.split.calls(), self.event_idx);
    }

    /// Available index as published.
    pub fn avail_idx(&self) -> u16 {
        self.published
    }

    /// Used index as the device published it.
    pub fn used_idx(&self) -> u16 {
        self.split.used_idx()
    }

    /// Writes any descriptor, by hand.
    pub fn set_descriptor(&self, index: u16, descriptor: Descriptor) {
        self.split.set_descriptor(index, descriptor);
    }

    /// Writes any available entry, by hand.
    pub fn set_avail(&self, index: u16, head: u16) {
        self.split.set_avail(index, head);
    }

    /// Stores any available index, by hand; [`Self::publish`] does not know of it.
    pub fn publish_avail(&self, index: u16) {
        self.split.publish_avail(index);
    }

    /// Where the three areas are, as offsets into the memory: for whoever wants to scribble over them.
    pub fn area_offsets(&self) -> [usize; 3] {
        offsets(self.size()).0.map(|part| self.at + part)
    }
}

fn descriptor_of(buffer: Buffer, next: Option<u16>) -> Descriptor {
    let mut flags = if buffer.writable { DESC_WRITE } else { 0 };
    if next.is_some() {
        flags |= DESC_NEXT;
    }
    Descriptor { addr: GUEST_BASE + buffer.offset as u64, len: buffer.len, flags, next: next.unwrap_or(0) }
}

/// Offsets of the three areas of a ring from its beginning, and its length. Each begins on a line of its own.
fn offsets(size: u16) -> ([usize; 3], usize) {
    let mut end = 0;
    let parts = areas(size).map(|(len, _)| {
        let at = end;
        end = (at + usize::try_from(len).expect("areas are small")).next_multiple_of(64);
        at
    });
    (parts, end)
}
