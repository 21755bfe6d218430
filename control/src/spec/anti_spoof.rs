//! What a guest may say that it is.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::names::{IpPrefix, Mac};

/// Addresses of a guest at the most; ours, to bound what is asked of each of its frames.
pub(super) const ADDRESSES_MAX: usize = 64;

/// A guest sends from its own Ethernet address only, and claims only IP addresses that are its own, in ARP and neighbour
/// discovery, too. What it sends otherwise is dropped.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AntiSpoof {
    /// The guest's own addresses, or networks of them, at most 64; its link-local address is always one of them. None at all:
    /// any address.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(value_type = Vec<String>, max_items = 64, example = json!(["192.0.2.7", "2001:db8::/64"]))]
    pub addresses: Vec<IpPrefix>,
}

impl AntiSpoof {
    /// As the dataplane asks it of each frame from a guest with this Ethernet address.
    pub fn policy(&self, mac: Mac) -> dataplane::Policy {
        dataplane::Policy::new(mac.0, self.addresses.iter().map(|prefix| (prefix.address(), prefix.bits())))
    }
}
