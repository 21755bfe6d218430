//! What a plug is asked to be. The same type is the API's body, the stored record and what `show -o json` prints.
//!
//! Three shapes, told apart by which of `socket` and `to` are there:
//!
//! ```text
//! socket        a port of the network, for a guest, or attached to another switch as if we were one
//! to            the network's uplink: a TAP, alone, in a Linux bridge or in Open vSwitch, or a macvtap
//! socket + to   the two joined: a network of their own
//! to, as guest  a TAP or macvtap that a guest's VMM opens, or a device that it gets: in no network of ours
//! ```
//!
//! [`PlugSpec::completed`] fills in what was left out, so that two ways of asking for the same thing compare equal and
//! a record says everything that unplug needs.

mod anti_spoof;
mod bridge;
mod device;
mod macvtap;
mod ovs;
mod tap;
#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use self::anti_spoof::ADDRESSES_MAX;
pub use self::anti_spoof::AntiSpoof;
pub use self::bridge::{Bridge, Uplink};
pub use self::device::{Device, DeviceType, Found, FoundFunction, FoundRepresentor};
pub use self::macvtap::{Macvtap, MacvtapMode, PortProfile};
pub use self::ovs::{Attach, DatapathType, KernelGuest, Ovs, SwitchPort};
pub use self::tap::Tap;
use crate::names::{IfName, Mac, Name, SocketPath};

/// The network of a plug that names none.
const NETWORK_DEFAULT: &str = "default";
/// Payload of an Ethernet frame unless said otherwise, bytes.
const MTU_DEFAULT: u16 = 1500;
/// Bounds of an MTU, bytes: IPv4's smallest, and the largest jumbo frame.
pub const MTU_RANGE: std::ops::RangeInclusive<u16> = 68..=9216;
/// Numbers of VLANs (IEEE 802.1Q-2018, table 9-2).
const VLAN_RANGE: std::ops::RangeInclusive<u16> = 1..=4094;
/// Queue pairs of one port (VIRTIO_NET_CTRL_MQ_VQ_PAIRS_MAX is higher; 128 is what front ends use).
pub const QUEUES_RANGE: std::ops::RangeInclusive<u16> = 1..=128;

/// What a plug is asked to be.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PlugSpec {
    /// Network to join; `default` if left out. A plug with both `socket` and `to` is a network of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<Name>,
    /// vhost-user socket of a guest, or of another switch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<Socket>,
    /// The host's side.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<To>,
    /// The guest's address, if known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<Mac>,
    /// Largest payload of an Ethernet frame, bytes; 1500 if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 68, maximum = 9216)]
    pub mtu: Option<u16>,
    /// Queue pairs. Left out: a guest may use up to 128; one for a TAP, and one of another switch, which may also have fewer
    /// than are asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 128)]
    pub queues: Option<u16>,
    /// Whether the guest may say that it is somebody else; it may, if left out. Needs `mac`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub anti_spoof: Option<AntiSpoof>,
}

/// A vhost-user socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Socket {
    /// Our side of it.
    pub role: Role,
    /// Where it is.
    pub path: SocketPath,
}

/// Who makes a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// The daemon makes it, the front end connects.
    Listen,
    /// The front end makes it, the daemon connects, for ever.
    Connect,
    /// The daemon is the front end and makes it, the back end of another switch connects.
    FrontendListen,
    /// The daemon is the front end, the back end makes it, and the daemon connects, for ever.
    FrontendConnect,
}

impl Role {
    /// True if we are the front end: a guest to another switch.
    pub fn is_front_end(self) -> bool {
        matches!(self, Self::FrontendListen | Self::FrontendConnect)
    }

    /// True if the daemon makes the socket.
    pub fn is_ours_to_make(self) -> bool {
        matches!(self, Self::Listen | Self::FrontendListen)
    }

    /// As the command line has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Listen => "listen",
            Self::Connect => "connect",
            Self::FrontendListen => "frontend-listen",
            Self::FrontendConnect => "frontend-connect",
        }
    }
}

/// The host's side of a plug.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum To {
    /// A TAP that is in no bridge.
    Tap(Tap),
    /// A TAP in a Linux bridge.
    Bridge(Bridge),
    /// A TAP in an Open vSwitch bridge.
    Ovs(Ovs),
    /// A macvtap on one of the host's interfaces.
    Macvtap(Macvtap),
    /// A PCI device of the host.
    Device(Device),
}

/// Why a spec cannot be.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// Nothing to plug.
    #[error("the plug has neither a socket nor a host side: give one of them, or both")]
    Empty,
    /// A network for two that are a network of their own.
    #[error("a plug with both a socket and a host side is a network of its own: leave out network {0}")]
    NetworkOfItsOwn(Name),
    /// An uplink has no guest.
    #[error("mac {0} is a guest's address, and this plug has no guest")]
    MacWithoutGuest(Mac),
    /// A number out of bounds.
    #[error("{field} is {value}, it must be {min} to {max}")]
    Bounds {
        /// Which one.
        field: &'static str,
        /// As asked.
        value: u16,
        /// Smallest possible.
        min: u16,
        /// Largest possible.
        max: u16,
    },
    /// Nothing of what the guest sends is ours to judge.
    #[error("anti_spoof is for a guest on a vhost-user socket: this plug has none")]
    PolicyWithoutGuest,
    /// Nobody is known who it may be.
    #[error("anti_spoof needs the guest's address: give mac")]
    PolicyWithoutMac,
    /// More than are asked for.
    #[error("anti_spoof has {0} addresses, at most 64 are possible: give networks instead")]
    Addresses(usize),
    /// A guest has one card.
    #[error("the TAP is the guest's card (spec.to.guest): leave out the socket")]
    TwoCards,
    /// It is attached already.
    #[error(
        "the TAP is the guest's card (spec.to.guest), nothing else joins it with the switch: leave out attach"
    )]
    CardAttached,
    /// Its guests' frames would not come.
    #[error(
        "a macvtap on {0} gets frames for its own address only, and a network has many: have it take {0} for \
         itself (macvtap:{0}:passthrough), put {0} into a bridge (--to bridge:BR), or join it with one guest (a socket, or guest)"
    )]
    MacvtapUplink(IfName),
    /// A number that no switch knows.
    #[error("VSI type {0} has more than 24 bits")]
    VsiType(u32),
    /// Neither where it is nor whose address it has.
    #[error("which device? give its address, or the guest's (mac), by which it is found")]
    WhichDevice,
    /// It has to get one.
    #[error("an ethernet device gets the guest's address: give mac, or ask for a generic one")]
    EthernetWithoutMac,
    /// Frames to the guest come through a macvtap on it.
    #[error(
        "a device behind a guest's socket is driven by its network driver: leave out driver, and ask for a generic or an \
         ethernet one"
    )]
    DeviceBehindSocket,
    /// There is nothing to choose.
    #[error(
        "a device's port in Open vSwitch is its representor: leave out attach, socket, guest and hybrid there"
    )]
    RepresentorIsPort,
    /// It is set through a physical function.
    #[error("{0} is for an ethernet device: ask for one, or leave it out")]
    WithoutEthernet(&'static str),
    /// lldpad knows interfaces.
    #[error(
        "a switch is told of a device by 802.1Qbh: ask for that, or for a macvtap, of which it is told by 802.1Qbg, too"
    )]
    ProfileOfDevice,
    /// It is the switch's to say.
    #[error("a port profile says how the switch treats the device: leave out vlan, spoof_check and trust")]
    ProfileAlone,
    /// Nobody is to connect to it.
    #[error("a socket of the switch is for attach vhost_user: leave out spec.to.socket, or ask for that")]
    StraySocket,
    /// A Linux bridge joins links.
    #[error(
        "a hybrid plug goes through Linux bridge spec.to.hybrid by a TAP: leave out attach and socket of spec.to"
    )]
    HybridSocket,
}

impl SpecError {
    /// The member of the spec that is at fault.
    pub fn field(&self) -> Option<&'static str> {
        match self {
            Self::Empty => None,
            Self::NetworkOfItsOwn(_) => Some("spec.network"),
            Self::MacWithoutGuest(_) => Some("spec.mac"),
            Self::Bounds { field, .. } => Some(field),
            Self::PolicyWithoutGuest | Self::PolicyWithoutMac => Some("spec.anti_spoof"),
            Self::Addresses(_) => Some("spec.anti_spoof.addresses"),
            Self::TwoCards => Some("spec.socket"),
            Self::CardAttached => Some("spec.to.attach"),
            Self::HybridSocket => Some("spec.to.attach"),
            Self::StraySocket => Some("spec.to.socket"),
            Self::MacvtapUplink(_) => Some("spec.to.mode"),
            Self::VsiType(_) => Some("spec.to.profile.type_id"),
            Self::WhichDevice => Some("spec.to.address"),
            Self::EthernetWithoutMac => Some("spec.mac"),
            Self::DeviceBehindSocket => Some("spec.to"),
            Self::RepresentorIsPort => Some("spec.to.port"),
            Self::WithoutEthernet(field) => Some(field),
            Self::ProfileOfDevice | Self::ProfileAlone => Some("spec.to.profile"),
        }
    }
}

impl PlugSpec {
    /// The same, checked, with everything that was left out filled in for plug `id`.
    pub fn completed(mut self, id: &Name) -> Result<Self, SpecError> {
        match (&self.socket, &self.to) {
            (None, None) => return Err(SpecError::Empty),
            (Some(_), Some(_)) if self.kernel_guest().is_some() => return Err(SpecError::TwoCards),
            (socket, Some(_)) if socket.is_some() || self.kernel_guest().is_some() => {
                if let Some(network) = self.network {
                    return Err(SpecError::NetworkOfItsOwn(network));
                }
            }
            _ => {
                let default = || NETWORK_DEFAULT.parse().expect("the default network's name is a name");
                self.network.get_or_insert_with(default);
            }
        }
        if let (false, Some(mac)) = (self.has_guest(), self.mac) {
            return Err(SpecError::MacWithoutGuest(mac));
        }
        self.check_anti_spoof()?;
        bounded("spec.mtu", *self.mtu.get_or_insert(MTU_DEFAULT), MTU_RANGE)?;
        if let Some(queues) = self.queues {
            bounded("spec.queues", queues, QUEUES_RANGE)?;
        }
        if let Some(To::Bridge(Bridge { uplink: Some(Uplink { vlan: Some(vlan), .. }), .. })) = &self.to {
            bounded("spec.to.uplink.vlan", *vlan, VLAN_RANGE)?;
        }
        let (is_uplink, behind_socket) = (self.is_uplink(), self.socket.is_some());
        let tap = match &mut self.to {
            // The VMM's TAP has the name that the VMM gives it.
            None | Some(To::Tap(_) | To::Bridge(Bridge { guest: true, .. })) => return Ok(self),
            Some(To::Device(device)) => {
                device.check(self.mac, behind_socket)?;
                return Ok(self);
            }
            Some(To::Bridge(bridge)) => &mut bridge.tap,
            Some(To::Ovs(ovs)) => {
                ovs.complete(id)?;
                return Ok(self);
            }
            Some(To::Macvtap(macvtap)) => {
                macvtap.check(is_uplink)?;
                &mut macvtap.tap
            }
        };
        tap.get_or_insert_with(|| tap_name(id));
        Ok(self)
    }

    fn check_anti_spoof(&self) -> Result<(), SpecError> {
        match &self.anti_spoof {
            None => Ok(()),
            Some(_) if self.socket.is_none() || self.is_front_end() => Err(SpecError::PolicyWithoutGuest),
            Some(_) if self.mac.is_none() => Err(SpecError::PolicyWithoutMac),
            Some(AntiSpoof { addresses }) if addresses.len() > ADDRESSES_MAX => {
                Err(SpecError::Addresses(addresses.len()))
            }
            Some(_) => Ok(()),
        }
    }

    /// What the dataplane asks of frames from the guest.
    pub fn policy(&self) -> Option<dataplane::Policy> {
        Some(self.anti_spoof.as_ref()?.policy(self.mac?))
    }

    /// The same, but what was left to the daemon as it is in a plug that is there: what was decided once stays.
    pub fn keeping(mut self, before: &Self) -> Self {
        self.to = match (self.to, &before.to) {
            (Some(To::Ovs(now)), Some(To::Ovs(then))) => Some(To::Ovs(now.keeping(then))),
            (Some(To::Device(now)), Some(To::Device(then))) => Some(To::Device(now.keeping(then))),
            (to, _) => to,
        };
        self
    }

    /// The sockets that we make or connect to.
    pub fn sockets(&self) -> impl Iterator<Item = Socket> {
        self.socket.clone().into_iter().chain(self.ovs().and_then(Ovs::vhost_user))
    }

    /// The network's name inside the dataplane. `:` is in no name that people can give.
    pub fn network_of(&self, id: &Name) -> String {
        match &self.network {
            Some(network) => network.to_string(),
            None => format!("plug:{id}"),
        }
    }

    /// True for the port through which a network reaches the host.
    pub fn is_uplink(&self) -> bool {
        self.socket.is_none() && self.kernel_guest().is_none()
    }

    /// The side in Open vSwitch.
    pub fn ovs(&self) -> Option<&Ovs> {
        match &self.to {
            Some(To::Ovs(ovs)) => Some(ovs),
            Some(To::Device(device)) => device.port.as_deref(),
            _ => None,
        }
    }

    /// The device that is the guest's.
    pub fn device(&self) -> Option<&Device> {
        match &self.to {
            Some(To::Device(device)) => Some(device),
            _ => None,
        }
    }

    /// What is made for a guest whose card is the TAP itself.
    pub fn kernel_guest(&self) -> Option<KernelGuest> {
        match &self.to {
            Some(To::Ovs(ovs)) => ovs.guest,
            Some(To::Bridge(Bridge { guest: true, .. })) => {
                Some(KernelGuest { make_tap: false, make_port: false })
            }
            Some(To::Tap(Tap { guest: true, .. }) | To::Macvtap(Macvtap { guest: true, .. })) => {
                Some(KernelGuest { make_tap: true, make_port: false })
            }
            Some(To::Device(_)) if self.socket.is_none() => {
                Some(KernelGuest { make_tap: false, make_port: false })
            }
            _ => None,
        }
    }

    /// True for a port that is a guest to another switch.
    pub fn is_front_end(&self) -> bool {
        self.socket.as_ref().is_some_and(|socket| socket.role.is_front_end())
    }

    fn has_guest(&self) -> bool {
        (self.socket.is_some() && !self.is_front_end()) || self.kernel_guest().is_some()
    }

    /// Queue pairs that a guest may use.
    pub fn guest_queues(&self) -> u16 {
        self.queues.unwrap_or(*QUEUES_RANGE.end())
    }

    /// Queue pairs to be used with another switch.
    pub fn front_end_queues(&self) -> u16 {
        self.queues.unwrap_or(1)
    }

    /// MTU of a completed spec.
    pub fn mtu_bytes(&self) -> u16 {
        self.mtu.unwrap_or(MTU_DEFAULT)
    }

    /// Queues of the TAP.
    pub fn tap_queues(&self) -> u16 {
        self.queues.unwrap_or(1)
    }

    /// Members in which two specs differ, as `socket.path`.
    pub fn differences(&self, other: &Self) -> Vec<String> {
        let as_json = |spec| serde_json::to_value(spec).expect("a spec is plain JSON");
        let mut fields = Vec::new();
        differing(&as_json(self), &as_json(other), "", &mut fields);
        fields
    }
}

impl To {
    /// The TAP's name.
    pub fn tap(&self, id: &Name) -> IfName {
        match self {
            Self::Tap(tap) => tap.tap.clone(),
            Self::Bridge(bridge) => bridge.tap(id),
            Self::Ovs(ovs) => ovs.tap(id),
            Self::Macvtap(macvtap) => macvtap.tap(id),
            Self::Device(_) => Device::tap(id),
        }
    }
}

fn bounded(field: &'static str, value: u16, range: std::ops::RangeInclusive<u16>) -> Result<(), SpecError> {
    if range.contains(&value) {
        return Ok(());
    }
    Err(SpecError::Bounds { field, value, min: *range.start(), max: *range.end() })
}

/// A TAP's name made from a plug's: `vhd-ID` where that fits, else `vhd` and twelve digits of a hash, the same in every
/// release. The two cannot meet, since a hash digit is never `-`.
fn tap_name(id: &Name) -> IfName {
    let readable = format!("vhd-{id}");
    if let Ok(name) = readable.parse() {
        return name;
    }
    format!("vhd{}", hashed(id)).parse().expect("fifteen letters and digits are an interface name")
}

/// Twelve hexadecimal digits of a hash: FNV-1a, 64 bits, is stable and enough to name things; a collision is found and refused
/// at plug.
fn hashed(id: &Name) -> String {
    let hash = id.as_str().bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("{:012x}", hash >> 16)
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde gives a reference")]
fn is_false(value: &bool) -> bool {
    !value
}

fn differing(a: &Value, b: &Value, at: &str, fields: &mut Vec<String>) {
    let (Value::Object(a), Value::Object(b)) = (a, b) else {
        if a != b {
            fields.push(at.to_owned());
        }
        return;
    };
    let mut keys: Vec<_> = a.keys().chain(b.keys().filter(|k| !a.contains_key(*k))).collect();
    keys.sort();
    for key in keys {
        let at = if at.is_empty() { key.clone() } else { format!("{at}.{key}") };
        differing(a.get(key).unwrap_or(&Value::Null), b.get(key).unwrap_or(&Value::Null), &at, fields);
    }
}
