//! A plug's side in a Linux bridge.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::tap_name;
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
}

impl Bridge {
    /// In this bridge, with everything else left out.
    pub fn new(bridge: IfName) -> Self {
        Self { bridge, tap: None }
    }

    /// The TAP's name.
    pub fn tap(&self, id: &Name) -> IfName {
        self.tap.clone().unwrap_or_else(|| tap_name(id))
    }
}
