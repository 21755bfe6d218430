//! A plug's side in a Linux bridge.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{is_false, tap_name};
use crate::names::{IfName, Name};

/// A TAP in a Linux bridge.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Bridge {
    /// The bridge; made if it is not there.
    pub bridge: IfName,
    /// The TAP; named after the plug if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tap: Option<IfName>,
    /// The interface through which the bridge reaches the network outside. Plugs that name the same one share it; it leaves
    /// the bridge with the last of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uplink: Option<Uplink>,
    /// The TAP is the guest's card: its VMM makes it and puts it into the bridge, and no frame of it goes through vhostd.
    #[serde(default, skip_serializing_if = "is_false")]
    pub guest: bool,
}

/// An interface of the host that becomes a port of the bridge. Its addresses and routes are the bridge's meanwhile.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Uplink {
    /// The interface.
    pub device: IfName,
    /// A VLAN of it instead of itself, as interface `vlanNUMBER`; made if it is not there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 4094)]
    pub vlan: Option<u16>,
}

impl Uplink {
    /// The interface that becomes a port.
    pub fn port(&self) -> IfName {
        match self.vlan {
            Some(vlan) => {
                format!("vlan{vlan}").parse().expect("a word and five digits are an interface name")
            }
            None => self.device.clone(),
        }
    }
}

impl Bridge {
    /// In this bridge, with everything else left out.
    pub fn new(bridge: IfName) -> Self {
        Self { bridge, tap: None, uplink: None, guest: false }
    }

    /// The TAP's name.
    pub fn tap(&self, id: &Name) -> IfName {
        self.tap.clone().unwrap_or_else(|| tap_name(id))
    }
}
