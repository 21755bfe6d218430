//! A plug's side on top of one of the host's interfaces.

use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{SpecError, is_false, tap_name};
use crate::names::{ExternalId, IfName, Name, Uuid};

/// Most that a VSI type can be: 24 bits.
const TYPE_ID_MAX: u32 = 0x00ff_ffff;

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
    /// What the switch outside is told of the guest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub profile: Option<PortProfile>,
}

/// What a switch outside is told of a guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "protocol", deny_unknown_fields)]
pub enum PortProfile {
    /// IEEE 802.1Qbg, through lldpad.
    #[serde(rename = "802.1Qbg")]
    Qbg {
        /// Who defines the VSI type.
        manager_id: u8,
        /// The VSI type.
        #[schema(maximum = 16777215)]
        type_id: u32,
        /// Its version.
        type_id_version: u8,
        /// The VSI instance.
        instance_id: Uuid,
    },
    /// IEEE 802.1Qbh, through the device's driver.
    #[serde(rename = "802.1Qbh")]
    Qbh {
        /// The profile's name at the switch.
        profile_id: ExternalId,
        /// The guest.
        instance_id: Uuid,
    },
}

impl PortProfile {
    /// The standard by which the switch is told.
    pub fn protocol(&self) -> &'static str {
        match self {
            Self::Qbg { .. } => "802.1Qbg",
            Self::Qbh { .. } => "802.1Qbh",
        }
    }
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

impl FromStr for MacvtapMode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let all = [Self::Bridge, Self::Vepa, Self::Passthrough];
        let found = all.into_iter().find(|mode| mode.name() == text);
        found.ok_or_else(|| format!("{text:?} is not a mode: bridge, vepa or passthrough"))
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
        Self { device, mode: MacvtapMode::default(), tap: None, guest: false, profile: None }
    }

    /// The macvtap's name.
    pub fn tap(&self, id: &Name) -> IfName {
        self.tap.clone().unwrap_or_else(|| tap_name(id))
    }

    /// Refuses what cannot be. A device that others have, too, gives each of them the frames for its own address only: an
    /// uplink of a network would miss those for the guests behind it.
    pub(super) fn check(&self, is_uplink: bool) -> Result<(), SpecError> {
        if is_uplink && self.mode != MacvtapMode::Passthrough {
            return Err(SpecError::MacvtapUplink(self.device.clone()));
        }
        match self.profile {
            Some(PortProfile::Qbg { type_id, .. }) if type_id > TYPE_ID_MAX => {
                Err(SpecError::VsiType(type_id))
            }
            _ => Ok(()),
        }
    }
}
