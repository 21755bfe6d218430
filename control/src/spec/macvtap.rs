//! A plug's side on top of one of the host's interfaces.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{is_false, tap_name};
use crate::names::{IfName, Name};

/// A macvtap: what the guest sends leaves through an interface of the host, without a bridge.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Macvtap {
    /// The interface below: a network card, one of its virtual functions, a VLAN.
    pub device: IfName,
    /// Which frames reach other macvtaps of the device.
    #[serde(default)]
    pub mode: MacvtapMode,
    /// The macvtap; named after the plug if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tap: Option<IfName>,
    /// The macvtap itself is the guest's card: its VMM opens it, and no frame of it goes through vhostd.
    #[serde(default, skip_serializing_if = "is_false")]
    pub guest: bool,
}

/// Which frames reach other macvtaps of the device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum MacvtapMode {
    /// Those for them, at once.
    #[default]
    Bridge,
    /// None: the switch outside sends back what is for a neighbour.
    Vepa,
    /// There are no others: it has the device, and its address, for itself.
    Passthrough,
}

impl MacvtapMode {
    /// As documents have it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bridge => "bridge",
            Self::Vepa => "vepa",
            Self::Passthrough => "passthrough",
        }
    }
}

impl From<MacvtapMode> for hostnet::MacvtapMode {
    fn from(mode: MacvtapMode) -> Self {
        match mode {
            MacvtapMode::Bridge => Self::Bridge,
            MacvtapMode::Vepa => Self::Vepa,
            MacvtapMode::Passthrough => Self::Passthrough,
        }
    }
}

impl Macvtap {
    /// On this interface, with everything else left out.
    pub fn new(device: IfName) -> Self {
        Self { device, mode: MacvtapMode::default(), tap: None, guest: false }
    }

    /// The macvtap's name.
    pub fn tap(&self, id: &Name) -> IfName {
        self.tap.clone().unwrap_or_else(|| tap_name(id))
    }
}
