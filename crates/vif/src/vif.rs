//! The typed view of a VIF of any class.

use crate::field::{Field, View, views};
use crate::network::{InstanceInfo, Network};
use crate::object::Object;
use crate::profile::PortProfile;
use crate::schema::{self, Class};
use crate::value::{MacAddress, PciAddress, Value};

/// A VIF: what all classes have, and what its own adds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vif {
    /// Its class's name.
    pub class: &'static str,
    /// The port's UUID; not checked. Ironic's agent sends none.
    pub id: Field<String>,
    /// The guest's MAC address.
    pub address: Field<MacAddress>,
    /// The network it is in.
    pub network: Field<Network>,
    /// The os-vif plug-in that is to serve it.
    pub plugin: Field<String>,
    /// Whether the cloud thinks that the port works already. Not a link state: false on first boot.
    pub active: Field<bool>,
    /// Whether the port existed before the guest. Unplugging does not heed it.
    pub preserve_on_delete: Field<bool>,
    /// Whether the cloud's network service filters its traffic.
    pub has_traffic_filtering: Field<bool>,
    /// How the far side is to treat it. Mostly unset.
    pub port_profile: Field<PortProfile>,
    /// What its class adds.
    pub kind: VifKind,
}

/// What a class of VIFs adds to the base.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VifKind {
    /// `VIFBase`: nothing.
    Base,
    /// `VIFGeneric`.
    Generic(GenericVif),
    /// `VIFBridge`.
    Bridge(BridgeVif),
    /// `VIFOpenVSwitch`.
    OpenVSwitch(OpenVSwitchVif),
    /// `VIFDirect`.
    Direct(DirectVif),
    /// `VIFVHostUser`.
    VhostUser(VhostUserVif),
    /// `VIFHostDevice`.
    HostDevice(HostDeviceVif),
    /// `VIFNestedDPDK`.
    NestedDpdk(NestedDpdkVif),
}

views! {
    /// A TAP (1.0).
    GenericVif {
        /// Its name.
        vif_name: String,
    }

    /// An interface in a Linux bridge (1.0).
    BridgeVif {
        /// The interface's name.
        vif_name: String,
        /// The bridge.
        bridge_name: String,
    }

    /// An interface in an OVS bridge (1.0).
    OpenVSwitchVif {
        /// The interface's name.
        vif_name: String,
        /// The bridge.
        bridge_name: String,
    }

    /// A macvtap (1.0).
    DirectVif {
        /// Its name.
        vif_name: String,
        /// The device below.
        dev_address: PciAddress,
        /// The macvtap's mode.
        mode: DirectMode,
        /// The VLAN interface between it and the device.
        vlan_name: String,
    }

    /// A vhost-user port (1.1).
    VhostUserVif {
        /// Its name. Since 1.1.
        vif_name: String,
        /// Path of the socket; neither length nor form is checked.
        path: String,
        /// What the hypervisor does with the socket.
        mode: VhostUserMode,
    }

    /// A device passed through (1.0).
    HostDeviceVif {
        /// How the guest gets it.
        dev_type: HostDeviceType,
        /// The device.
        dev_address: PciAddress,
    }

    /// A DPDK device of a container in a guest (1.0).
    NestedDpdkVif {
        /// The device; text, not checked.
        pci_address: String,
        /// The driver it was bound to before.
        dev_driver: String,
    }
}

macro_rules! words {
    ($($(#[$doc:meta])* $type:ident { $($(#[$word_doc:meta])* $word:ident = $text:literal,)* })*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $type {
            $($(#[$word_doc])* $word,)*
        }

        impl View for $type {
            fn view(value: &Value) -> Option<Self> {
                match value {
                    $(Value::Text(text) if text == $text => Some($type::$word),)*
                    _ => None,
                }
            }
        }
    )*};
}

words! {
    /// What the **hypervisor** does with a vhost-user socket. The back end does the opposite.
    VhostUserMode {
        /// It connects: the back end listens.
        Client = "client",
        /// It listens: the back end connects.
        Server = "server",
    }

    /// How a macvtap shares its device.
    DirectMode {
        /// All frames go to the switch outside, which sends them back if need be.
        Vepa = "vepa",
        /// It has the device for itself.
        Passthrough = "passthrough",
        /// Frames between macvtaps of the device stay inside.
        Bridge = "bridge",
    }

    /// How a guest gets a passed-through device.
    HostDeviceType {
        /// As a network interface, with address and VLAN set by the host.
        Ethernet = "ethernet",
        /// As a PCI device like any other.
        Generic = "generic",
    }
}

/// An object that is not of the class asked for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an object of class {found} stands where one of class {expected} must be")]
pub struct NotA {
    /// Its class.
    pub found: &'static str,
    /// The class asked for.
    pub expected: &'static str,
}

impl TryFrom<&Object> for Vif {
    type Error = NotA;

    fn try_from(object: &Object) -> Result<Self, NotA> {
        let class = object.class().name;
        expect_class(object, &schema::VIF_BASE)?;
        let kind = match class {
            "VIFGeneric" => VifKind::Generic(GenericVif::of(object)),
            "VIFBridge" => VifKind::Bridge(BridgeVif::of(object)),
            "VIFOpenVSwitch" => VifKind::OpenVSwitch(OpenVSwitchVif::of(object)),
            "VIFDirect" => VifKind::Direct(DirectVif::of(object)),
            "VIFVHostUser" => VifKind::VhostUser(VhostUserVif::of(object)),
            "VIFHostDevice" => VifKind::HostDevice(HostDeviceVif::of(object)),
            "VIFNestedDPDK" => VifKind::NestedDpdk(NestedDpdkVif::of(object)),
            _ => VifKind::Base,
        };
        Ok(Vif {
            class,
            id: object.view("id"),
            address: object.view("address"),
            network: object.view("network"),
            plugin: object.view("plugin"),
            active: object.view("active"),
            preserve_on_delete: object.view("preserve_on_delete"),
            has_traffic_filtering: object.view("has_traffic_filtering"),
            port_profile: object.view("port_profile"),
            kind,
        })
    }
}

impl TryFrom<&Object> for InstanceInfo {
    type Error = NotA;

    fn try_from(object: &Object) -> Result<Self, NotA> {
        expect_class(object, &schema::INSTANCE_INFO)?;
        Ok(InstanceInfo::of(object))
    }
}

fn expect_class(object: &Object, class: &'static Class) -> Result<(), NotA> {
    let found = object.class();
    if found.is_a(class) { Ok(()) } else { Err(NotA { found: found.name, expected: class.name }) }
}
