//! A plug's side in Open vSwitch.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{is_false, tap_name};
use crate::names::{ExternalId, IfName, Name};

/// Trunk bridges of Neutron, one a trunk port, are named so and go with their port.
const TRUNK_PREFIX: &str = "tbr-";

/// A TAP that is a port of an Open vSwitch bridge.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Ovs {
    /// The bridge; made if it is not there.
    pub bridge: IfName,
    /// The TAP; named after the plug if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tap: Option<IfName>,
    /// What the bridge has to be; left out: whatever it is, and one that is made is as the daemon's configuration says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub datapath_type: Option<DatapathType>,
    /// `external_ids:iface-id` of the interface: the logical port in OVN and Neutron.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iface_id: Option<ExternalId>,
    /// `external_ids:vm-uuid` of the interface.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm_uuid: Option<ExternalId>,
    /// A port that is made starts in the dead VLAN (tag 4095), out of which somebody else takes it.
    #[serde(default, skip_serializing_if = "is_false")]
    pub isolated: bool,
    /// The TAP itself is the guest's card: its VMM opens it, and no frame of it goes through vhostd.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest: Option<KernelGuest>,
}

/// What is made for a guest whose card is the TAP; the VMM makes the rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct KernelGuest {
    /// The TAP.
    pub make_tap: bool,
    /// The port of the bridge.
    pub make_port: bool,
}

/// Where an Open vSwitch bridge forwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum DatapathType {
    /// In the kernel.
    System,
    /// In ovs-vswitchd.
    Netdev,
}

impl From<DatapathType> for ovsdb::DatapathType {
    fn from(kind: DatapathType) -> Self {
        match kind {
            DatapathType::System => Self::System,
            DatapathType::Netdev => Self::Netdev,
        }
    }
}

impl Ovs {
    /// A port of this bridge, with everything else left out.
    pub fn new(bridge: IfName) -> Self {
        Self {
            bridge,
            tap: None,
            datapath_type: None,
            iface_id: None,
            vm_uuid: None,
            isolated: false,
            guest: None,
        }
    }

    /// The TAP's name.
    pub fn tap(&self, id: &Name) -> IfName {
        self.tap.clone().unwrap_or_else(|| tap_name(id))
    }

    /// Whether the TAP is ours to make.
    pub fn makes_tap(&self) -> bool {
        self.guest.is_none_or(|guest| guest.make_tap)
    }

    /// Whether the port is ours to make.
    pub fn makes_port(&self) -> bool {
        self.guest.is_none_or(|guest| guest.make_port)
    }

    /// Whether the bridge belongs to a trunk port, and to it alone.
    pub fn is_trunk(&self) -> bool {
        self.bridge.as_str().starts_with(TRUNK_PREFIX)
    }
}
