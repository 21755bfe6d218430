//! The driver's side of a ring: what a guest does. For tests, benches and the demo, and for ports that attach to somebody
//! else's back end.
//!
//! [`DriverMemory`] is memory to share (a sealed memfd); [`DriverRing`] is one ring in it. A ring can be driven in three
//! ways: carefully ([`DriverRing::offer`], [`DriverRing::take_used`]), lightly ([`DriverRing::recycle`]: gives back whole
//! bursts without looking at buffers, so that a front end costs almost nothing in a measurement), and by hand
//! ([`DriverRing::set_descriptor`] and friends), which can say anything a hostile guest could.
//!
//! [`DriverRx`] and [`DriverTx`] carry the bursts of a switch through such rings. The memory is ours there, but the back end
//! writes it at any time: it is as hostile as a guest's.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};
use sys::sigbus::{Faults, Guard};

use crate::memory::RegionSpec;

mod frames;
mod ring;

pub use frames::{Area, DriverBurst, DriverRx, DriverTx};
pub use ring::DriverRing;

/// Guest address of the first byte of a [`DriverMemory`]: not 0 and not our own address, so that a mix-up shows.
pub const GUEST_BASE: u64 = 0x1_0000_0000;

/// Bytes of a huge page.
const HUGE_PAGE: usize = 2 << 20;

/// Memory that is shared with a back end.
pub struct DriverMemory {
    file: OwnedFd,
    base: *mut u8,
    len: usize,
    page_size: usize,
    /// A back end can punch holes into the file, for which no huge page may be left.
    guard: Option<Guard>,
    faults: Faults,
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
        // Before munmap: as soon as the addresses are free, a fault in them is somebody else's.
        drop(self.guard.take());
        // SAFETY: exactly what mmap returned; nobody else holds pointers into it, since rings hold an `Arc` of `self`.
        let _ = unsafe { rustix::mm::munmap(self.base.cast(), self.len) };
    }
}

impl DriverMemory {
    /// `len` bytes (rounded up to pages), sealed against resizing.
    pub fn new(len: usize) -> io::Result<Arc<Self>> {
        Self::map(len, MemfdFlags::empty(), rustix::param::page_size())?.sealed()
    }

    /// As [`Self::new`], in huge pages if that many are free (`len` is rounded up to them): bursts then cost fewer TLB
    /// misses.
    pub fn huge(len: usize) -> io::Result<Arc<Self>> {
        match Self::map(len, MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB, HUGE_PAGE) {
            Ok(memory) => memory.sealed(),
            Err(_) => Self::new(len),
        }
    }

    /// As [`Self::new`], but the file can be truncated: what a hostile front end would share.
    pub fn unsealed(len: usize) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self::map(len, MemfdFlags::empty(), rustix::param::page_size())?))
    }

    fn sealed(mut self) -> io::Result<Arc<Self>> {
        rustix::fs::fcntl_add_seals(&self.file, SealFlags::SHRINK | SealFlags::GROW)?;
        // SAFETY: the range is the mapping of our file; the guard is dropped before it is unmapped. Zero pages in its place
        // are as good as what the other side could have written there.
        let guard = unsafe { sys::sigbus::guard(self.base as usize, self.len, self.page_size, &self.faults) };
        self.guard = Some(guard.map_err(io::Error::other)?);
        Ok(Arc::new(self))
    }

    fn map(len: usize, pages: MemfdFlags, page_size: usize) -> io::Result<Self> {
        let len = len.next_multiple_of(page_size);
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
        Ok(Self { file, base: base.cast(), len, page_size, guard: None, faults: Faults::default() })
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

    /// Whether a part of it was lost and replaced by zeros: the other side has taken it away.
    pub fn faulted(&self) -> bool {
        self.faults.count() != 0
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
