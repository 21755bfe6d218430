//! Checked views of bytes, and the arithmetic on them.
//!
//! A frame here is bytes from a stranger. Every type checks once, when it is made, and what it then says
//! about the bytes holds. No function does I/O or allocates, except the frame builders in [`craft`]; none
//! panics on what a frame or a virtio-net header says.
//!
//! The dataplane decides on a *prefix*: the first hundred or so bytes of a frame, copied out of guest memory
//! that may change at any moment. So the parsers take the prefix and the length of the whole frame, and tell
//! "the frame ends here" (malformed) from "the prefix ends here" (unknown).
//!
//! In the order in which a frame meets them:
//!
//! - [`ethernet`], [`mac`]: addresses, VLAN tags and EtherType; all that the switch looks at.
//! - [`flow`]: the number by which a receive queue is chosen.
//! - [`vnet`], [`offloads`]: the virtio-net header and the work it leaves to the receiver; [`check`] is the
//!   one gate through which a guest's header has to pass.
//! - [`ip`]: where the headers of a frame lie; [`claims`]: whom it says that it is from.
//! - [`checksum`], [`mod@segment`]: doing that work for a receiver that cannot.
//! - [`arp`], [`rarp`], [`craft`]: making frames.
#![forbid(unsafe_code)]

pub mod arp;
pub mod check;
pub mod checksum;
pub mod claims;
pub mod craft;
pub mod ethernet;
pub mod flow;
pub mod ip;
pub mod mac;
pub mod offloads;
pub mod rarp;
pub mod segment;
pub mod vnet;

pub use check::HeaderFault;
pub use claims::Claims;
pub use ethernet::Ethernet;
pub use flow::flow_hash;
pub use ip::{Ip, IpFault};
pub use mac::Mac;
pub use offloads::Offloads;
pub use segment::{SegmentFault, segment};
pub use vnet::VnetHeader;
