//! What a front end says about one ring before it starts.

use std::os::fd::OwnedFd;

/// Everything needed to start one vring, as gathered by a session. Addresses are the *front end's* user addresses
/// (vhost-user specification, "Memory regions description"); they are translated when the ring starts.
#[derive(Debug)]
pub struct RingSetup {
    /// Number of descriptors, 1..=32768; of a split ring a power of two (virtio 1.2, 2.7).
    pub size: u16,
    /// Descriptor table, or packed ring.
    pub desc_user_addr: u64,
    /// Driver area: available ring, or driver's event suppression.
    pub avail_user_addr: u64,
    /// Device area: used ring, or device's event suppression.
    pub used_user_addr: u64,
    /// Where to go on (SET_VRING_BASE). Split ring: the next available index. Packed ring: index and wrap counter of the
    /// next available descriptor, and in the upper half of the next used one.
    pub base: u32,
    /// Feature bits that the front end acknowledged.
    pub features: u64,
    /// Guest → us. `None`: the front end asked for polling (NOFD).
    pub kick: Option<OwnedFd>,
    /// Us → guest. `None`: the guest wants no notifications.
    pub call: Option<OwnedFd>,
    /// Signalled when the ring breaks.
    pub err: Option<OwnedFd>,
    /// Whether frames may pass (SET_VRING_ENABLE; true from the start without PROTOCOL_FEATURES).
    pub enabled: bool,
}
