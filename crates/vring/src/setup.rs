//! What a front end says about one ring before it starts.

use std::os::fd::OwnedFd;

/// Everything needed to start one vring, as gathered by a session. Addresses are the *front end's* user addresses
/// (vhost-user specification, "Memory regions description"); they are translated when the ring starts.
#[derive(Debug)]
pub struct RingSetup {
    /// Number of descriptors, 1..=32768, a power of two (virtio 1.2, 2.7).
    pub size: u16,
    /// Descriptor table.
    pub desc_user_addr: u64,
    /// Available ring (driver area).
    pub avail_user_addr: u64,
    /// Used ring (device area).
    pub used_user_addr: u64,
    /// Where to go on: the next available index to look at (SET_VRING_BASE).
    pub base: u16,
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
