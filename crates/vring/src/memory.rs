//! Guest memory: the regions of one front end, mapped.
use std::os::fd::OwnedFd;

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

/// Why guest memory cannot be mapped.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// To be detailed.
    #[error("{0}")]
    Other(String),
}

/// The mapped regions of one session: an immutable snapshot; replacing the table makes a new one.
#[derive(Debug, Default)]
pub struct GuestMemory {}

impl GuestMemory {
    /// Regions at the most (CONFIGURE_MEM_SLOTS).
    pub const REGIONS_MAX: usize = 509;
    /// Maps a whole table. Every check is made before the first mapping.
    pub fn map(_regions: Vec<(RegionSpec, OwnedFd)>) -> Result<Self, MemoryError> {
        Err(MemoryError::Other("not yet".into()))
    }
    /// This table and one region more; existing mappings are shared, not made again.
    pub fn with_region(&self, _region: RegionSpec, _fd: OwnedFd) -> Result<Self, MemoryError> {
        Err(MemoryError::Other("not yet".into()))
    }
    /// This table without the region that has the same guest address, user address and size.
    pub fn without_region(&self, _region: &RegionSpec) -> Result<Self, MemoryError> {
        Err(MemoryError::Other("not yet".into()))
    }
    /// Whether this very table (same regions, same files) is mapped already.
    pub fn is_same(&self, _regions: &[(RegionSpec, OwnedFd)]) -> bool {
        false
    }
    /// The regions, ascending by guest address.
    pub fn regions(&self) -> Vec<RegionSpec> {
        Vec::new()
    }
}
