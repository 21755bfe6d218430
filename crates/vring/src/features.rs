//! Feature bits that change how a ring or a header is read (virtio 1.2, 5.1.3 and 6). Bit numbers.

/// Guest may leave L4 checksums to us.
pub const CSUM: u32 = 0;
/// Guest accepts partial checksums.
pub const GUEST_CSUM: u32 = 1;
/// The device tells its MTU.
pub const MTU: u32 = 3;
/// The device tells its address.
pub const MAC: u32 = 5;
/// Legacy: all of the HOST_* segmentation bits.
pub const GSO: u32 = 6;
/// Guest accepts TSO over IPv4.
pub const GUEST_TSO4: u32 = 7;
/// Guest accepts TSO over IPv6.
pub const GUEST_TSO6: u32 = 8;
/// Guest accepts TSO with ECN.
pub const GUEST_ECN: u32 = 9;
/// Guest may send TSO over IPv4.
pub const HOST_TSO4: u32 = 11;
/// Guest may send TSO over IPv6.
pub const HOST_TSO6: u32 = 12;
/// Guest may send TSO with ECN.
pub const HOST_ECN: u32 = 13;
/// A frame may be written into several RX buffers.
pub const MRG_RXBUF: u32 = 15;
/// The device tells its link status.
pub const STATUS: u32 = 16;
/// There is a control queue (the front end keeps it).
pub const CTRL_VQ: u32 = 17;
/// The control queue takes receive modes.
pub const CTRL_RX: u32 = 18;
/// Guest announces itself when asked.
pub const GUEST_ANNOUNCE: u32 = 21;
/// Several queue pairs.
pub const MQ: u32 = 22;
/// Legacy: descriptors of a chain may be split anywhere.
pub const ANY_LAYOUT: u32 = 27;
/// Descriptors may refer to tables of descriptors.
pub const INDIRECT_DESC: u32 = 28;
/// Notification by index instead of flags.
pub const EVENT_IDX: u32 = 29;
/// vhost-user: protocol features can be negotiated.
pub const PROTOCOL_FEATURES: u32 = 30;
/// Virtio 1.0 and later.
pub const VERSION_1: u32 = 32;
/// Rings are packed (virtio 1.2, 2.8).
pub const RING_PACKED: u32 = 34;
/// Buffers are used in the order in which they were offered.
pub const IN_ORDER: u32 = 35;
/// The device orders its accesses like another processor.
pub const ORDER_PLATFORM: u32 = 36;
/// One ring can be reset and set up again while the others run.
pub const RING_RESET: u32 = 40;
/// Guest accepts UDP to be cut into datagrams (virtio 1.3, 5.1.3), over IPv4.
pub const GUEST_USO4: u32 = 54;
/// The same over IPv6.
pub const GUEST_USO6: u32 = 55;
/// Guest may send UDP to be cut into datagrams.
pub const HOST_USO: u32 = 56;
