//! The host's side of a network: links, bridges, TAPs, macvtaps, veth pairs and VLANs, through netlink; PCI devices, through
//! sysfs.
//!
//! Each `ensure_…` says what has to be there. It makes what is missing, touches nothing that is as it should be, and
//! refuses what belongs to somebody else. Each `remove_…` succeeds if nothing is there. All may be repeated at any
//! time, after a crash above all: nothing is remembered here, the kernel's own state is the only one. What a device was
//! before it is taken (its driver, its name, a virtual function's address) is asked for first, and kept by the caller.
//!
//! # Ours and foreign
//!
//! An interface that we made bears a mark in its alias (`ip link show`): [`tap_mark`] on what one plug has for itself, which
//! names the plug, and [`BRIDGE_MARK`] on a bridge or VLAN, which plugs may share. What bears no mark is an
//! administrator's: it is used where the caller asks for it, and never deleted.
//!
//! # TAPs stay
//!
//! Bridges and Open vSwitch hold a TAP by its number. One that is deleted and made again under the same name looks
//! right and passes nothing. So a TAP is persistent, outlives us, and is attached to again, never made again.
//!
//! Calls may run side by side, but two that contradict each other (a bridge ensured here, removed there) take effect
//! in any order: whoever plugs into a bridge and unplugs from it must not do both at one time.
#![forbid(unsafe_code)]

mod association;
mod bridge;
mod error;
mod function;
mod interface;
mod link;
mod macvtap;
mod netlink;
mod pci;
mod sysctl;
mod tap;
mod uplink;
mod veth;
mod vlan;
mod watch;

pub use association::{
    Agent, Association, AssociationError, LetGo, Listener, Profile, Request, Response, SwitchWatch,
};
pub use bridge::{BRIDGE_MARK, Bridge};
pub use error::Error;
pub use function::FunctionState;
pub use interface::Use;
pub use link::{Kind, LinkState, TunState};
pub use macvtap::{MacvtapMode, MacvtapSpec};
pub use netlink::HostNet;
pub use pci::{
    Binding, DRIVER_LIMIT, Function, NotAnAddress, Pci, PciAddress, PciDevice, PciError, Representor,
};
pub use tap::{QUEUES_MAX, Tap, TapSpec, tap_mark};
pub use veth::{Veth, VethSpec};
pub use watch::{LinkEvent, Watch};
