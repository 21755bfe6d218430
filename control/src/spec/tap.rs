//! A plug's side in a TAP alone.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::is_false;
use crate::names::{IfName, Mac};

/// A TAP that is in no bridge.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Tap {
    /// The TAP.
    pub tap: IfName,
    /// Address of the host's interface; the kernel picks one if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<Mac>,
    /// The TAP itself is the guest's card: its VMM opens it, and no frame of it goes through vhostd.
    #[serde(default, skip_serializing_if = "is_false")]
    pub guest: bool,
}

impl Tap {
    /// Of this name, with everything else left out.
    pub fn new(tap: IfName) -> Self {
        Self { tap, mac: None, guest: false }
    }
}
