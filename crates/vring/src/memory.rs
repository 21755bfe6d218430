//! Guest memory: the regions of one front end, mapped.
//!
//! A front end passes a file descriptor for each region of its guest's memory. [`GuestMemory`] is an immutable snapshot
//! of such a table; a changed table is a new snapshot that shares the mappings that stay. Rings hold an `Arc` of the
//! snapshot they were started on, so a mapping lives as long as anything can still touch it, and no longer.
//!
//! The file stays in the hands of a peer that may be hostile:
//! * it may lie about sizes and offsets: everything is checked against the file before the first mapping;
//! * it may pass something that is no memory: only regular files on tmpfs or hugetlbfs are taken;
//! * it may truncate the file later: every mapping stands under [`sys::sigbus`]'s guard, which puts zero pages in place
//!   of the lost ones and counts; rings look at [`GuestMemory::faulted`] once a burst and break;
//! * guest memory never lands in a core dump (MADV_DONTDUMP).

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{FileType, SealFlags};
use rustix::mm::{Advice, MapFlags, ProtFlags};
use sys::sigbus::Faults;

/// Bytes that one front end may map.
pub const PORT_BYTES_MAX: u64 = 1 << 40;
/// Bytes that all front ends together may map: half of a 47-bit address space.
pub const TOTAL_BYTES_MAX: u64 = 1 << 46;

const TMPFS_MAGIC: u64 = 0x0102_1994;
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;

/// Bytes mapped by all front ends now.
static TOTAL_BYTES: AtomicU64 = AtomicU64::new(0);

/// One region as the front end describes it (vhost-user specification, "Memory region description").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionSpec {
    /// Guest physical address: what descriptors contain.
    pub guest_addr: u64,
    /// Length in bytes.
    pub size: u64,
    /// The front end's own address: what SET_VRING_ADDR contains.
    pub user_addr: u64,
    /// Where the region begins in the file, bytes.
    pub mmap_offset: u64,
}

impl fmt::Display for RegionSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "region {:#x}+{:#x}", self.guest_addr, self.size)
    }
}

/// Why guest memory cannot be mapped.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// No region, or more than there are slots.
    #[error("{0} regions: a table has 1 to {max}", max = GuestMemory::REGIONS_MAX)]
    Count(usize),
    /// Length zero.
    #[error("{0} is empty")]
    Empty(RegionSpec),
    /// Address or offset arithmetic leaves 64 bits.
    #[error("{0} wraps around the address space")]
    Wraps(RegionSpec),
    /// Two regions claim one address.
    #[error("{0} and {1} overlap")]
    Overlap(RegionSpec, RegionSpec),
    /// The descriptor is not memory.
    #[error("{region}: {found} is no shareable memory: use a memfd, tmpfs or hugetlbfs file")]
    Kind {
        /// Which region.
        region: RegionSpec,
        /// What was passed instead.
        found: String,
    },
    /// The region ends behind the file.
    #[error("{region} ends at {end:#x}, but its file has {file_len:#x} bytes")]
    FileTooShort {
        /// Which region.
        region: RegionSpec,
        /// Where it would end, bytes into the file.
        end: u64,
        /// How long the file is.
        file_len: u64,
    },
    /// A budget is used up.
    #[error("{asked:#x} bytes of guest memory are more than {scope} may map ({max:#x})")]
    Budget {
        /// Wanted in all.
        asked: u64,
        /// Whose budget.
        scope: &'static str,
        /// The limit.
        max: u64,
    },
    /// The kernel refused.
    #[error("{region} cannot be mapped: {cause}")]
    Map {
        /// Which region.
        region: RegionSpec,
        /// Why.
        cause: std::io::Error,
    },
    /// The fault guard has no free slot.
    #[error("{region} cannot be guarded: {cause}")]
    Guard {
        /// Which region.
        region: RegionSpec,
        /// Why.
        cause: String,
    },
    /// REM_MEM_REG of something that is not there.
    #[error("{0} is not in the table")]
    Unknown(RegionSpec),
}

/// One mapping of a region's file. Unmapped when the last snapshot that contains it is gone.
struct Mapping {
    /// Where the kernel put it (page aligned), and how much of it there is.
    base: *mut u8,
    len: usize,
    /// Bytes counted in [`TOTAL_BYTES`].
    counted: u64,
    /// Present until the mapping is gone.
    guard: Option<sys::sigbus::Guard>,
    /// Device and inode: the identity of the file.
    file: (u64, u64),
    /// Whether the peer could still shrink the file under us (no F_SEAL_SHRINK).
    shrinkable: bool,
}

// SAFETY: the mapping is plain shared memory; all access to it goes through atomics or through copies that tolerate
// concurrent change, so it may be used and dropped on any thread.
unsafe impl Send for Mapping {}
// SAFETY: as above; `Mapping` has no interior state of its own besides the memory.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // Before munmap: as soon as the addresses are free, a fault in them is somebody else's. No access of ours is
        // left that could need it.
        drop(self.guard.take());
        #[cfg(test)]
        if self.len == 0 {
            return;
        }
        // SAFETY: `base` and `len` are exactly what mmap returned for this object, nothing else unmaps it, and no
        // pointer into it is left: rings and bursts that could hold one keep an `Arc` of the snapshot.
        let unmapped = unsafe { rustix::mm::munmap(self.base.cast(), self.len) };
        debug_assert!(unmapped.is_ok(), "munmap of our own mapping");
        TOTAL_BYTES.fetch_sub(self.counted, Ordering::Relaxed);
    }
}

/// A region and where it is in our memory.
#[derive(Clone)]
struct Region {
    spec: RegionSpec,
    /// Our address of the region's first byte, inside `mapping`.
    host: *mut u8,
    /// How often it was added.
    claims: u32,
    mapping: Arc<Mapping>,
}

// SAFETY: `host` points into `mapping`, which is `Send + Sync` and kept alive beside it.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

/// The mapped regions of one front end: an immutable snapshot; replacing the table makes a new one.
#[derive(Default)]
pub struct GuestMemory {
    /// Ascending by guest address, not overlapping.
    regions: Box<[Region]>,
    /// Pages lost to truncation, in this table and in those it came from and that came from it.
    faults: Faults,
}

impl fmt::Debug for GuestMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.regions.iter().map(|r| r.spec)).finish()
    }
}

impl GuestMemory {
    /// Regions at the most (CONFIGURE_MEM_SLOTS).
    pub const REGIONS_MAX: usize = 509;

    /// Maps a whole table. Every region is checked against the others and against its file before the first is mapped.
    pub fn map(regions: &[(RegionSpec, OwnedFd)]) -> Result<Self, MemoryError> {
        if regions.is_empty() || regions.len() > Self::REGIONS_MAX {
            return Err(MemoryError::Count(regions.len()));
        }
        check_table(regions.iter().map(|(spec, _)| *spec))?;
        let files = regions.iter().map(|(spec, fd)| check_file(*spec, fd.as_fd()));
        let files = files.collect::<Result<Vec<_>, _>>()?;
        let faults = Faults::default();
        let mut mapped = Vec::with_capacity(regions.len());
        for ((spec, fd), file) in regions.iter().zip(files) {
            mapped.push(map_region(*spec, fd.as_fd(), &file, &faults)?);
        }
        Ok(Self::sorted(mapped, faults))
    }

    /// Regions of heap memory, which outlives them; nothing is mapped.
    #[cfg(test)]
    pub(crate) fn of_heap(regions: &[(RegionSpec, *mut u8)]) -> Self {
        let region = |&(spec, host): &(RegionSpec, *mut u8)| {
            let base = std::ptr::null_mut();
            let mapping = Mapping { base, len: 0, counted: 0, guard: None, file: (0, 0), shrinkable: false };
            Region { spec, host, claims: 1, mapping: Arc::new(mapping) }
        };
        Self::sorted(regions.iter().map(region).collect(), Faults::default())
    }

    /// This table and one region more; existing mappings are shared, not made again.
    ///
    /// A region that is there already has to be removed as often as it was added: QEMU 7.2 adds and removes every
    /// region once for each queue pair, on the one connection that these share.
    pub fn with_region(&self, region: RegionSpec, fd: BorrowedFd<'_>) -> Result<Self, MemoryError> {
        let mut regions = self.regions.to_vec();
        if let Some(same) = regions.iter_mut().find(|r| r.is_same(&region, fd)) {
            same.claims = same.claims.saturating_add(1);
            return Ok(Self { regions: regions.into(), faults: self.faults.clone() });
        }
        if regions.len() >= Self::REGIONS_MAX {
            return Err(MemoryError::Count(regions.len() + 1));
        }
        check_table(regions.iter().map(|r| r.spec).chain([region]))?;
        let file = check_file(region, fd)?;
        regions.push(map_region(region, fd, &file, &self.faults)?);
        Ok(Self::sorted(regions, self.faults.clone()))
    }

    /// This table without the region that has the same guest address, user address and size.
    pub fn without_region(&self, region: &RegionSpec) -> Result<Self, MemoryError> {
        let same = |r: &Region| {
            r.spec.guest_addr == region.guest_addr
                && r.spec.user_addr == region.user_addr
                && r.spec.size == region.size
        };
        let mut regions = self.regions.to_vec();
        let found = regions.iter().position(same).ok_or(MemoryError::Unknown(*region))?;
        regions[found].claims -= 1;
        regions.retain(|r| r.claims > 0);
        Ok(Self { regions: regions.into(), faults: self.faults.clone() })
    }

    /// Whether this very table (same regions of the same files) is mapped already, so that nothing needs to be done.
    pub fn is_same(&self, regions: &[(RegionSpec, OwnedFd)]) -> bool {
        let mut wanted: Vec<_> = regions.iter().collect();
        wanted.sort_by_key(|(spec, _)| spec.guest_addr);
        wanted.len() == self.regions.len()
            && wanted.iter().zip(&self.regions).all(|((spec, fd), have)| have.is_same(spec, fd.as_fd()))
    }

    /// The regions, ascending by guest address.
    pub fn regions(&self) -> Vec<RegionSpec> {
        self.regions.iter().map(|r| r.spec).collect()
    }

    /// Bytes of guest memory in all regions.
    pub fn bytes(&self) -> u64 {
        self.regions.iter().map(|r| r.spec.size).sum()
    }

    /// Whether the front end could still truncate one of its files (no F_SEAL_SHRINK on it).
    pub fn shrinkable(&self) -> bool {
        self.regions.iter().any(|r| r.mapping.shrinkable)
    }

    /// Whether a page of it was lost because the front end truncated a file. One relaxed load.
    #[inline]
    pub fn faulted(&self) -> bool {
        self.faults.count() != 0
    }

    /// Counts a lost page that a system call ran into (EFAULT): no signal tells of those.
    pub(crate) fn count_fault(&self) {
        self.faults.add();
    }

    fn sorted(mut regions: Vec<Region>, faults: Faults) -> Self {
        regions.sort_by_key(|r| r.spec.guest_addr);
        Self { regions: regions.into_boxed_slice(), faults }
    }

    /// The region that contains guest address `addr`, to look into for the addresses that follow.
    #[cold]
    pub(crate) fn window(&self, addr: u64) -> Option<Window> {
        let index = self.regions.partition_point(|r| r.spec.guest_addr <= addr).checked_sub(1)?;
        let region = &self.regions[index];
        let found = Window { guest_addr: region.spec.guest_addr, size: region.spec.size, host: region.host };
        found.translate(addr, 0).map(|_| found)
    }

    /// Our address of what lies at guest address `addr` and how many of `len` bytes are contiguous there: a buffer may
    /// cross from one region into the next, whose mappings are not neighbours.
    pub(crate) fn translate_part(&self, addr: u64, len: u32) -> Option<(*mut u8, u32)> {
        let index = self.regions.partition_point(|r| r.spec.guest_addr <= addr).checked_sub(1)?;
        let region = &self.regions[index];
        let offset = addr - region.spec.guest_addr;
        let left = region.spec.size.checked_sub(offset).filter(|left| *left != 0)?;
        let part = u32::try_from(left).unwrap_or(u32::MAX).min(len);
        Some((region.host_addr(addr, u64::from(part))?, part))
    }

    /// Our address of `len` bytes at the front end's own address `addr`, if they lie in one region: ring addresses.
    pub(crate) fn translate_user(&self, addr: u64, len: u64) -> Option<*mut u8> {
        self.regions.iter().find_map(|r| {
            let offset = addr.checked_sub(r.spec.user_addr)?;
            r.host_addr(r.spec.guest_addr.checked_add(offset)?, len)
        })
    }
}

impl Region {
    /// Whether it is this region of this file.
    fn is_same(&self, spec: &RegionSpec, fd: BorrowedFd<'_>) -> bool {
        self.spec == *spec && rustix::fs::fstat(fd).is_ok_and(|s| (s.st_dev, s.st_ino) == self.mapping.file)
    }

    /// Our address of `len` bytes at guest address `addr`, if they lie in this region.
    fn host_addr(&self, addr: u64, len: u64) -> Option<*mut u8> {
        let window = Window { guest_addr: self.spec.guest_addr, size: self.spec.size, host: self.host };
        window.translate(addr, len).map(|(host, _)| host)
    }
}

/// One region without what keeps it mapped: for looking up many addresses in a row, since the buffers of a burst mostly
/// lie in one region. Whoever holds it holds the [`GuestMemory`] it came from.
#[derive(Clone, Copy, PartialEq)]
pub(crate) struct Window {
    guest_addr: u64,
    size: u64,
    host: *mut u8,
}

// SAFETY: as for `Region`: its owner keeps the mapping.
unsafe impl Send for Window {}

impl Window {
    /// Contains nothing.
    pub(crate) const EMPTY: Self = Self { guest_addr: 0, size: 0, host: std::ptr::null_mut() };

    /// Our address of `len` bytes at guest address `addr` if they lie in the window, and how many bytes are mapped there.
    #[inline]
    pub(crate) fn translate(&self, addr: u64, len: u64) -> Option<(*mut u8, u64)> {
        let offset = addr.wrapping_sub(self.guest_addr);
        let room = self.size.wrapping_sub(offset);
        if offset >= self.size || len > room {
            return None;
        }
        // `size` fits a mapping, so `offset` fits a usize. `wrapping_add` keeps this safe code; whoever dereferences
        // relies on the check above: the `len` bytes lie in the mapping.
        #[allow(clippy::cast_possible_truncation)]
        Some((self.host.wrapping_add(offset as usize), room))
    }
}

/// Checks regions against each other and the budget of one port.
fn check_table(regions: impl Iterator<Item = RegionSpec>) -> Result<(), MemoryError> {
    let mut regions: Vec<_> = regions.collect();
    let mut bytes = 0u64;
    for r in &regions {
        if r.size == 0 {
            return Err(MemoryError::Empty(*r));
        }
        let ends = [r.guest_addr, r.user_addr, r.mmap_offset].map(|start| start.checked_add(r.size));
        if ends.contains(&None) {
            return Err(MemoryError::Wraps(*r));
        }
        bytes = bytes.saturating_add(r.size);
    }
    for key in [|r: &RegionSpec| r.guest_addr, |r: &RegionSpec| r.user_addr] {
        regions.sort_by_key(key);
        for pair in regions.windows(2) {
            if key(&pair[0]) + pair[0].size > key(&pair[1]) {
                return Err(MemoryError::Overlap(pair[0], pair[1]));
            }
        }
    }
    if bytes > PORT_BYTES_MAX {
        return Err(MemoryError::Budget { asked: bytes, scope: "one port", max: PORT_BYTES_MAX });
    }
    Ok(())
}

/// What is known of a region's file.
struct CheckedFile {
    page_size: u64,
    id: (u64, u64),
    shrinkable: bool,
}

/// Checks that the descriptor is memory, and long enough.
fn check_file(region: RegionSpec, fd: BorrowedFd<'_>) -> Result<CheckedFile, MemoryError> {
    let kind = |found: String| MemoryError::Kind { region, found };
    let stat = rustix::fs::fstat(fd).map_err(|e| kind(format!("descriptor ({e})")))?;
    let file_type = FileType::from_raw_mode(stat.st_mode);
    if file_type != FileType::RegularFile {
        return Err(kind(name_of(file_type).into()));
    }
    let fs = rustix::fs::fstatfs(fd).map_err(|e| kind(format!("descriptor ({e})")))?;
    #[allow(clippy::cast_sign_loss)]
    let (magic, block_size) = (fs.f_type as u64 & 0xffff_ffff, fs.f_bsize as u64);
    if magic != TMPFS_MAGIC && magic != HUGETLBFS_MAGIC {
        return Err(kind(format!("a file on file system {magic:#x}")));
    }
    // check_table has shown that this does not wrap.
    let end = region.mmap_offset + region.size;
    let file_len = u64::try_from(stat.st_size).unwrap_or(0);
    if end > file_len {
        return Err(MemoryError::FileTooShort { region, end, file_len });
    }
    let shrinkable = rustix::fs::fcntl_get_seals(fd).map_or(true, |s| !s.contains(SealFlags::SHRINK));
    // hugetlbfs reports its page size as block size; mappings of it must be aligned to that.
    let page_size = if magic == HUGETLBFS_MAGIC { block_size } else { rustix::param::page_size() as u64 };
    Ok(CheckedFile { page_size, id: (stat.st_dev, stat.st_ino), shrinkable })
}

fn name_of(file_type: FileType) -> &'static str {
    match file_type {
        FileType::Fifo => "a pipe",
        FileType::Socket => "a socket",
        FileType::Directory => "a directory",
        FileType::CharacterDevice | FileType::BlockDevice => "a device",
        _ => "no file (an eventfd, for example)",
    }
}

/// Maps one checked region. Offsets into huge-page files need not be huge-page aligned (front ends split one file into
/// several regions), so the mapping begins at the page before.
fn map_region(
    spec: RegionSpec,
    fd: BorrowedFd<'_>,
    file: &CheckedFile,
    faults: &Faults,
) -> Result<Region, MemoryError> {
    let lead = spec.mmap_offset % file.page_size;
    let bytes = (lead + spec.size).next_multiple_of(file.page_size);
    let len = usize::try_from(bytes).map_err(|_| MemoryError::Wraps(spec))?;
    let total = TOTAL_BYTES.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes);
    if total > TOTAL_BYTES_MAX {
        TOTAL_BYTES.fetch_sub(bytes, Ordering::Relaxed);
        return Err(MemoryError::Budget { asked: total, scope: "all ports together", max: TOTAL_BYTES_MAX });
    }
    let flags = MapFlags::SHARED | MapFlags::NORESERVE;
    let prot = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a null hint lets the kernel choose the place, so no existing mapping is replaced; `fd` is open; the
    // result is checked.
    let base =
        unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, prot, flags, fd, spec.mmap_offset - lead) };
    let base = base.map_err(|e| {
        TOTAL_BYTES.fetch_sub(bytes, Ordering::Relaxed);
        MemoryError::Map { region: spec, cause: e.into() }
    })?;
    let mut mapping = Mapping {
        base: base.cast(),
        len,
        counted: bytes,
        guard: None,
        file: file.id,
        shrinkable: file.shrinkable,
    };
    // SAFETY: the range is the mapping made above; DONTDUMP changes no content.
    let _ = unsafe { rustix::mm::madvise(base, len, Advice::LinuxDontDump) };
    #[allow(clippy::cast_possible_truncation)]
    let page_size = file.page_size as usize;
    // SAFETY: the range is the mapping made above, of a file; the guard is dropped before it is unmapped.
    let guard = unsafe { sys::sigbus::guard(base as usize, len, page_size, faults) };
    mapping.guard = Some(guard.map_err(|e| MemoryError::Guard { region: spec, cause: e.to_string() })?);
    #[allow(clippy::cast_possible_truncation)]
    let host = mapping.base.wrapping_add(lead as usize);
    Ok(Region { spec, host, claims: 1, mapping: Arc::new(mapping) })
}
