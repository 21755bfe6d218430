//! Typed views of a VIF's network and of the guest it belongs to.

use std::net::IpAddr;

use crate::field::{Field, View, views};
use crate::object::Object;
use crate::value::{IpNetwork, Value};

views! {
    /// The network a VIF is in (1.1).
    Network {
        /// Its UUID; not checked.
        id: String,
        /// The bridge or OVS bridge that serves it on this host.
        bridge: String,
        /// Its name, for people.
        label: String,
        /// Its subnets. A list object without its list counts as an empty one.
        subnets: Vec<Subnet>,
        /// A relic of nova-network.
        multi_host: bool,
        /// Whether the plug-in is to make the bridge.
        should_provide_bridge: bool,
        /// Whether the plug-in is to make the VLAN interface.
        should_provide_vlan: bool,
        /// The interface that joins the bridge to the world.
        bridge_interface: String,
        /// VLAN ID; range not checked.
        vlan: i64,
        /// Largest payload of an Ethernet frame, bytes; range not checked. Since 1.1.
        mtu: i64,
    }

    /// A subnet of a network (1.0).
    Subnet {
        /// Its addresses.
        cidr: IpNetwork,
        /// Its name servers.
        dns: Vec<IpAddr>,
        /// Its default gateway.
        gateway: IpAddr,
        /// The VIF's addresses in it.
        ips: Vec<FixedIp>,
        /// Its other routes.
        routes: Vec<Route>,
        /// Its DHCP server.
        dhcp_server: IpAddr,
    }

    /// A route of a subnet (1.0).
    Route {
        /// Where to.
        cidr: IpNetwork,
        /// Through which neighbour.
        gateway: IpAddr,
        /// Over which interface.
        interface: String,
    }

    /// An address of a VIF (1.0).
    FixedIp {
        /// The address.
        address: IpAddr,
        /// Addresses outside that are translated to it.
        floating_ips: Vec<IpAddr>,
    }

    /// The guest that a VIF belongs to (1.0).
    InstanceInfo {
        /// Its UUID; not checked, may be empty.
        uuid: String,
        /// Its name.
        name: String,
        /// The project that owns it.
        project_id: String,
    }
}
