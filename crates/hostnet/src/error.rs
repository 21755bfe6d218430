//! What can go wrong on the host's side, in words for people.

use std::io;

use sys::tap::TapError;

use crate::link::Kind;
use crate::macvtap::MacvtapMode;

/// Why the host's side is not as asked. Each names the interface, the cause and the way out.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no netlink socket.
    #[error("cannot open a netlink socket: allow AF_NETLINK to this process")]
    Open(#[source] io::Error),
    /// The name cannot be an interface's, or a TAP queue failed in a way that has no better words below.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// A plug's name does not fit into a mark.
    #[error("cannot mark interface {name} as made for plug {owner:?}: give a name of 1 to 200 bytes")]
    Owner {
        /// The interface.
        name: String,
        /// The plug.
        owner: String,
    },
    /// More queues than the kernel has for one TAP, or none.
    #[error("TAP {name} cannot have {queues} queues: give 1 to {}", crate::tap::QUEUES_MAX)]
    Queues {
        /// The interface.
        name: String,
        /// Queues asked for.
        queues: u16,
    },
    /// EPERM.
    #[error("cannot {doing} {name}: this needs CAP_NET_ADMIN in the network namespace of the daemon")]
    Denied {
        /// The step that failed.
        doing: &'static str,
        /// The interface.
        name: String,
    },
    /// EOPNOTSUPP.
    #[error("cannot {doing} {name}: this kernel lacks what it takes, load the module or use another kernel")]
    Unsupported {
        /// The step that failed.
        doing: &'static str,
        /// The interface.
        name: String,
    },
    /// Any other error of the kernel.
    #[error("cannot {doing} {name}")]
    Kernel {
        /// The step that failed.
        doing: &'static str,
        /// The interface.
        name: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel's answer did not come, or was not understood.
    #[error("cannot {doing} {name}: no usable answer from the kernel within {} s", crate::netlink::DEADLINE.as_secs())]
    NoAnswer {
        /// The step that failed.
        doing: &'static str,
        /// The interface.
        name: String,
    },
    /// There is no such interface.
    #[error("there is no interface {name}")]
    Missing {
        /// The interface.
        name: String,
    },
    /// An interface of another kind has the name.
    #[error("interface {name} exists and is {kind}, not {wanted}: give another name, or remove it")]
    WrongKind {
        /// The interface.
        name: String,
        /// What it is.
        kind: Kind,
        /// What it would have to be.
        wanted: &'static str,
    },
    /// Somebody has queues of the TAP open.
    #[error("TAP {name} is held open by another process or plug: stop that, or choose another TAP")]
    Busy {
        /// The interface.
        name: String,
    },
    /// The interface is an administrator's, and the plug did not ask for that one.
    #[error(
        "{name} exists and was not made by vhostd: give another name, or remove it; to a TAP one can plug by name"
    )]
    Foreign {
        /// The interface.
        name: String,
    },
    /// The interface was made for another plug.
    #[error("{name} belongs to plug {owner}: give another name, or unplug that one first")]
    OtherPlug {
        /// The interface.
        name: String,
        /// The plug whose mark it bears.
        owner: String,
    },
    /// The TAP was made without multi-queue, which cannot be changed.
    #[error("TAP {name} has one queue, not {queues}: use one, or unplug and make it anew with multi_queue")]
    OneQueue {
        /// The interface.
        name: String,
        /// Queues asked for.
        queues: u16,
    },
    /// The interface was removed or replaced by somebody while we worked on it.
    #[error("interface {name} was changed by somebody else meanwhile: try again")]
    Changed {
        /// The interface.
        name: String,
    },
    /// The macvtap is there, but on top of another device or in another mode, which cannot be changed.
    #[error("macvtap {name} exists, but not on {device} in mode {mode}: unplug it and make it anew")]
    OtherDevice {
        /// The interface.
        name: String,
        /// The device that it should be on.
        device: String,
        /// As it should be.
        mode: MacvtapMode,
    },
    /// The kernel allows no (such) macvtap on the device.
    #[error(
        "no macvtap {name} in mode {mode} on {device}: the device is a port of a bridge, has another one in mode \
         passthrough, or has others while this one asks for passthrough"
    )]
    DeviceTaken {
        /// The interface that was to be made.
        name: String,
        /// The device.
        device: String,
        /// The mode that was asked for.
        mode: MacvtapMode,
    },
    /// A device that has to take a macvtap's address (mode passthrough) keeps its own.
    #[error(
        "macvtap {name} cannot have the guest's address: {device} keeps its own, as its physical function has it; plug the \
         PCI device with dev_type ethernet"
    )]
    AddressHeld {
        /// The macvtap.
        name: String,
        /// The device.
        device: String,
    },
    /// A macvtap carries no longer frames than what it is on.
    #[error("macvtap {name} cannot have an MTU of {mtu}: {device} has {most}, raise that first")]
    DeviceMtu {
        /// The interface.
        name: String,
        /// Bytes asked for.
        mtu: u32,
        /// The device.
        device: String,
        /// Its MTU.
        most: u32,
    },
    /// The host needs the interface itself.
    #[error("interface {name} is used by the host: {uses}; end that first, or ask for it nevertheless")]
    InUse {
        /// The interface.
        name: String,
        /// For what.
        uses: String,
    },
    /// Another interface has the name.
    #[error("interface {name} cannot be called {to}: that is another one's name, rename or remove it first")]
    NameTaken {
        /// The interface.
        name: String,
        /// The name that it was to get.
        to: String,
    },
    /// The interface's device has no such virtual function.
    #[error("interface {name} has no virtual function {number}: see sriov_numvfs of its device")]
    NoFunction {
        /// The physical function's interface.
        name: String,
        /// The number asked for.
        number: u32,
    },
    /// The VLAN is there, but with another number or on top of another device, which cannot be changed.
    #[error("VLAN {name} exists, but is not number {id} on {device}: give another name, or remove it")]
    OtherVlan {
        /// The interface.
        name: String,
        /// The number that it should have.
        id: u16,
        /// The device that it should be on.
        device: String,
    },
    /// No VLAN can have this number.
    #[error("{name} cannot be VLAN {id}: give 1 to 4094")]
    VlanId {
        /// The interface that was to be made.
        name: String,
        /// The number that was asked for.
        id: u16,
    },
    /// An administrator's bridge is used as it is.
    #[error(
        "{device} cannot become the uplink of {bridge}, which was not made by vhostd: add it there, or give another bridge"
    )]
    ForeignBridge {
        /// The bridge.
        bridge: String,
        /// What it should have as its uplink.
        device: String,
    },
    /// A bridge has one uplink.
    #[error(
        "{device} cannot become the uplink of {bridge}, which has {uplink}: give another bridge, or unplug what needs that one"
    )]
    OtherUplink {
        /// The bridge.
        bridge: String,
        /// What it should have as its uplink.
        device: String,
        /// What it has.
        uplink: String,
    },
    /// A file of /proc/sys/net cannot be read or written.
    #[error(
        "cannot set {key} of {name} in /proc/sys/net: this needs CAP_NET_ADMIN in the network namespace, and /proc/sys \
             not mounted read-only"
    )]
    Sysctl {
        /// The interface.
        name: String,
        /// The file.
        key: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The interface is a port of something else.
    #[error("{name} cannot join bridge {bridge}: it is a port of {master}, take it out there first")]
    Enslaved {
        /// The interface.
        name: String,
        /// Where it should go.
        bridge: String,
        /// Where it is.
        master: String,
    },
}

impl Error {
    /// The words for an error number that the kernel gave.
    pub(crate) fn kernel(doing: &'static str, name: &str, source: io::Error) -> Self {
        let name = name.to_owned();
        match source.raw_os_error() {
            Some(EPERM) => Self::Denied { doing, name },
            Some(EOPNOTSUPP) => Self::Unsupported { doing, name },
            Some(ENODEV) => Self::Missing { name },
            _ => Self::Kernel { doing, name, source },
        }
    }
}

const EPERM: i32 = 1;
pub(crate) const ESRCH: i32 = 3;
pub(crate) const EBUSY: i32 = 16;
pub(crate) const EEXIST: i32 = 17;
const ENODEV: i32 = 19;
pub(crate) const EINVAL: i32 = 22;
const EOPNOTSUPP: i32 = 95;
pub(crate) const EADDRNOTAVAIL: i32 = 99;
