//! Typed views of port profiles: how the far side is to treat a VIF.

use crate::field::{Field, View, views};
use crate::object::Object;
use crate::value::{MacAddress, PciAddress, Value};

/// A port profile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortProfile {
    /// Its class's name.
    pub class: &'static str,
    /// Which hardware does the switching. Since 1.1; since 1.2 in Open vSwitch's.
    pub datapath_offload: Field<DatapathOffload>,
    /// What its class adds.
    pub kind: ProfileKind,
}

/// What a class of port profiles adds to the base.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProfileKind {
    /// `VIFPortProfileBase`: nothing.
    Base,
    /// `VIFPortProfileOpenVSwitch`.
    OpenVSwitch(OpenVSwitchProfile),
    /// `VIFPortProfileFPOpenVSwitch`.
    FpOpenVSwitch(OpenVSwitchProfile, FpOpenVSwitchProfile),
    /// `VIFPortProfileOVSRepresentor`.
    OvsRepresentor(OpenVSwitchProfile, OvsRepresentorProfile),
    /// `VIFPortProfileFPBridge`.
    FpBridge(FpBridgeProfile),
    /// `VIFPortProfileFPTap`.
    FpTap(FpTapProfile),
    /// `VIFPortProfile8021Qbg`.
    Ieee8021Qbg(Ieee8021QbgProfile),
    /// `VIFPortProfile8021Qbh`.
    Ieee8021Qbh(Ieee8021QbhProfile),
    /// `VIFPortProfileK8sDPDK`.
    K8sDpdk(K8sDpdkProfile),
}

/// Which hardware does the switching.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DatapathOffload {
    /// `DatapathOffloadBase`: says nothing.
    Base,
    /// `DatapathOffloadRepresentor`: a virtual function with a representor in the kernel's switchdev model.
    Representor(RepresentorOffload),
}

views! {
    /// An OVS port (1.4).
    OpenVSwitchProfile {
        /// The port's `iface-id`, a UUID; not checked.
        interface_id: String,
        /// OVS port profile. nova never sends it.
        profile_id: String,
        /// Datapath type of the bridge, `system` or `netdev`. Since 1.1.
        datapath_type: String,
        /// Whether the plug-in adds the port to the bridge. Since 1.3.
        create_port: bool,
        /// Whether the plug-in makes the TAP. Since 1.4.
        create_tap: bool,
        /// Whether that TAP has several queues. Since 1.4.
        multiqueue: bool,
    }

    /// What a fast-path port in OVS adds (1.4).
    FpOpenVSwitchProfile {
        /// The Linux bridge between VIF and OVS when plugged hybrid.
        bridge_name: String,
        /// Whether that bridge is wanted.
        hybrid_plug: bool,
    }

    /// What a representor port in OVS adds (1.4).
    OvsRepresentorProfile {
        /// The name that the representor is to get.
        representor_name: String,
        /// The virtual function.
        representor_address: PciAddress,
    }

    /// A fast-path port in a Linux bridge (1.1).
    FpBridgeProfile {
        /// The bridge.
        bridge_name: String,
    }

    /// A fast-path port that is a TAP (1.1).
    FpTapProfile {
        /// The TAP's own address.
        mac_address: MacAddress,
    }

    /// IEEE 802.1Qbg VEPA with VSI discovery (1.1).
    Ieee8021QbgProfile {
        /// VSI manager.
        manager_id: i64,
        /// VSI type.
        type_id: i64,
        /// VSI type's version.
        type_id_version: i64,
        /// VSI instance, a UUID; not checked.
        instance_id: String,
    }

    /// IEEE 802.1Qbh port extension (1.1).
    Ieee8021QbhProfile {
        /// The profile's name at the switch.
        profile_id: String,
    }

    /// A DPDK device of a Kubernetes pod (1.1).
    K8sDpdkProfile {
        /// Whether addresses are to be set up.
        l3_setup: bool,
        /// The pod.
        selflink: String,
        /// The pod's version.
        resourceversion: String,
    }

    /// The representor of a virtual function (1.0).
    RepresentorOffload {
        /// The name that the representor is to get.
        representor_name: String,
        /// PCI address of the virtual function; text, not checked.
        representor_address: String,
    }
}

impl View for PortProfile {
    fn view(value: &Value) -> Option<Self> {
        let Value::Object(object) = value else { return None };
        let ovs = || OpenVSwitchProfile::of(object);
        let class = object.class().name;
        let kind = match class {
            "VIFPortProfileOpenVSwitch" => ProfileKind::OpenVSwitch(ovs()),
            "VIFPortProfileFPOpenVSwitch" => {
                ProfileKind::FpOpenVSwitch(ovs(), FpOpenVSwitchProfile::of(object))
            }
            "VIFPortProfileOVSRepresentor" => {
                ProfileKind::OvsRepresentor(ovs(), OvsRepresentorProfile::of(object))
            }
            "VIFPortProfileFPBridge" => ProfileKind::FpBridge(FpBridgeProfile::of(object)),
            "VIFPortProfileFPTap" => ProfileKind::FpTap(FpTapProfile::of(object)),
            "VIFPortProfile8021Qbg" => ProfileKind::Ieee8021Qbg(Ieee8021QbgProfile::of(object)),
            "VIFPortProfile8021Qbh" => ProfileKind::Ieee8021Qbh(Ieee8021QbhProfile::of(object)),
            "VIFPortProfileK8sDPDK" => ProfileKind::K8sDpdk(K8sDpdkProfile::of(object)),
            "VIFPortProfileBase" => ProfileKind::Base,
            _ => return None,
        };
        Some(PortProfile { class, datapath_offload: object.view("datapath_offload"), kind })
    }
}

impl View for DatapathOffload {
    fn view(value: &Value) -> Option<Self> {
        let Value::Object(object) = value else { return None };
        match object.class().name {
            "DatapathOffloadRepresentor" => {
                Some(DatapathOffload::Representor(RepresentorOffload::of(object)))
            }
            "DatapathOffloadBase" => Some(DatapathOffload::Base),
            _ => None,
        }
    }
}
