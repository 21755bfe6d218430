//! The tables: os-vif's classes with their version, base and fields, as of os-vif 5.3.0 (the same since 4.3.0).

use std::fmt;

use crate::version::Version;

/// A class of objects.
pub struct Class {
    /// Its name in the envelope.
    pub name: &'static str,
    /// The version that this table describes. It only ever adds fields to those before.
    pub version: Version,
    /// The class it extends.
    pub base: Option<&'static Class>,
    /// The fields it adds to its base's.
    pub own_fields: &'static [FieldSpec],
}

/// A field of a class.
#[derive(Clone, Copy, Debug)]
pub struct FieldSpec {
    /// Its name in `versioned_object.data`.
    pub name: &'static str,
    /// Its type.
    pub kind: Kind,
    /// Whether it can be null.
    pub nullable: bool,
    /// What null stands for when it cannot. Nothing else applies it; and all fields that have one are booleans.
    pub default: Option<bool>,
}

/// The type of a field.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// Text.
    Text,
    /// Text that ought to be a UUID; not checked.
    Uuid,
    /// A MAC address.
    Mac,
    /// A PCI address.
    Pci,
    /// A whole number.
    Integer,
    /// True or false.
    Boolean,
    /// One of these words.
    Enum(&'static [&'static str]),
    /// An IPv4 or IPv6 address.
    Ip,
    /// An IPv4 or IPv6 address with a prefix length.
    IpNetwork,
    /// A list of elements of that type, none of them null.
    List(&'static Kind),
    /// An object of that class.
    Object(&'static Class),
    /// An object of that class or of one that extends it.
    Subclass(&'static Class),
}

impl Class {
    /// The class of that name.
    pub fn named(name: &str) -> Option<&'static Class> {
        CLASSES.into_iter().find(|class| class.name == name)
    }

    /// Itself, its base, its base's base …
    pub fn lineage(&'static self) -> impl Iterator<Item = &'static Class> {
        std::iter::successors(Some(self), |class| class.base)
    }

    /// Whether an object of this class is one of `class` too.
    pub fn is_a(&'static self, class: &Class) -> bool {
        self.lineage().any(|ancestor| ancestor == class)
    }

    /// All its fields, its base's too.
    pub fn fields(&'static self) -> impl Iterator<Item = &'static FieldSpec> {
        self.lineage().flat_map(|class| class.own_fields)
    }

    /// Its field of that name.
    pub fn field(&'static self, name: &str) -> Option<&'static FieldSpec> {
        self.fields().find(|field| field.name == name)
    }
}

impl PartialEq for Class {
    /// By name: there is one class of each.
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

impl Eq for Class {}

impl fmt::Debug for Class {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "{} {}", self.name, self.version)
    }
}

use Kind::{Boolean, Enum, Integer, Ip, IpNetwork, List, Mac, Object, Pci, Subclass, Text, Uuid};

const fn class(name: &'static str, minor: u64, own_fields: &'static [FieldSpec]) -> Class {
    Class { name, version: Version { major: 1, minor }, base: None, own_fields }
}

impl Class {
    const fn extends(mut self, base: &'static Class) -> Self {
        self.base = Some(base);
        self
    }
}

const fn field(name: &'static str, kind: Kind) -> FieldSpec {
    FieldSpec { name, kind, nullable: false, default: None }
}

const fn nullable(name: &'static str, kind: Kind) -> FieldSpec {
    FieldSpec { name, kind, nullable: true, default: None }
}

const fn boolean(name: &'static str, default: bool) -> FieldSpec {
    FieldSpec { name, kind: Boolean, nullable: false, default: Some(default) }
}

/// All classes.
pub static CLASSES: [&Class; 31] = [
    &VIF_BASE,
    &VIF_GENERIC,
    &VIF_BRIDGE,
    &VIF_OPEN_VSWITCH,
    &VIF_DIRECT,
    &VIF_VHOST_USER,
    &VIF_HOST_DEVICE,
    &VIF_NESTED_DPDK,
    &PROFILE_BASE,
    &PROFILE_OPEN_VSWITCH,
    &PROFILE_FP_OPEN_VSWITCH,
    &PROFILE_OVS_REPRESENTOR,
    &PROFILE_FP_BRIDGE,
    &PROFILE_FP_TAP,
    &PROFILE_8021QBG,
    &PROFILE_8021QBH,
    &PROFILE_K8S_DPDK,
    &OFFLOAD_BASE,
    &OFFLOAD_REPRESENTOR,
    &NETWORK,
    &SUBNET_LIST,
    &SUBNET,
    &ROUTE_LIST,
    &ROUTE,
    &FIXED_IP_LIST,
    &FIXED_IP,
    &INSTANCE_INFO,
    &HOST_INFO,
    &HOST_PLUGIN_INFO,
    &HOST_VIF_INFO,
    &HOST_PORT_PROFILE_INFO,
];

/// What all VIFs have.
pub static VIF_BASE: Class = class(
    "VIFBase",
    0,
    &[
        field("id", Uuid),
        nullable("address", Mac),
        nullable("network", Object(&NETWORK)),
        field("plugin", Text),
        boolean("active", true),
        boolean("preserve_on_delete", false),
        boolean("has_traffic_filtering", false),
        field("port_profile", Subclass(&PROFILE_BASE)),
    ],
);
static VIF_GENERIC: Class = class("VIFGeneric", 0, &[field("vif_name", Text)]).extends(&VIF_BASE);
static VIF_BRIDGE: Class =
    class("VIFBridge", 0, &[field("vif_name", Text), field("bridge_name", Text)]).extends(&VIF_BASE);
static VIF_OPEN_VSWITCH: Class =
    class("VIFOpenVSwitch", 0, &[field("vif_name", Text), field("bridge_name", Text)]).extends(&VIF_BASE);
static VIF_DIRECT: Class = class(
    "VIFDirect",
    0,
    &[
        field("vif_name", Text),
        field("dev_address", Pci),
        field("mode", Enum(&["vepa", "passthrough", "bridge"])),
        field("vlan_name", Text),
    ],
)
.extends(&VIF_BASE);
static VIF_VHOST_USER: Class = class(
    "VIFVHostUser",
    1,
    &[
        field("vif_name", Text), // since 1.1
        field("path", Text),
        field("mode", Enum(&["client", "server"])),
    ],
)
.extends(&VIF_BASE);
static VIF_HOST_DEVICE: Class = class(
    "VIFHostDevice",
    0,
    &[field("dev_type", Enum(&["ethernet", "generic"])), field("dev_address", Pci)],
)
.extends(&VIF_BASE);
static VIF_NESTED_DPDK: Class =
    class("VIFNestedDPDK", 0, &[field("pci_address", Text), field("dev_driver", Text)]).extends(&VIF_BASE);

/// What all port profiles have.
pub static PROFILE_BASE: Class = class(
    "VIFPortProfileBase",
    1,
    &[nullable("datapath_offload", Subclass(&OFFLOAD_BASE))], // since 1.1; since 1.2 in Open vSwitch's
);
static PROFILE_OPEN_VSWITCH: Class = class(
    "VIFPortProfileOpenVSwitch",
    4,
    &[
        field("interface_id", Uuid),
        field("profile_id", Text),
        nullable("datapath_type", Text), // since 1.1
        boolean("create_port", false),   // since 1.3
        boolean("create_tap", false),    // since 1.4
        boolean("multiqueue", false),    // since 1.4
    ],
)
.extends(&PROFILE_BASE);
static PROFILE_FP_OPEN_VSWITCH: Class =
    class("VIFPortProfileFPOpenVSwitch", 4, &[field("bridge_name", Text), boolean("hybrid_plug", false)])
        .extends(&PROFILE_OPEN_VSWITCH);
static PROFILE_OVS_REPRESENTOR: Class = class(
    "VIFPortProfileOVSRepresentor",
    4,
    &[nullable("representor_name", Text), nullable("representor_address", Pci)],
)
.extends(&PROFILE_OPEN_VSWITCH);
static PROFILE_FP_BRIDGE: Class =
    class("VIFPortProfileFPBridge", 1, &[field("bridge_name", Text)]).extends(&PROFILE_BASE);
static PROFILE_FP_TAP: Class =
    class("VIFPortProfileFPTap", 1, &[nullable("mac_address", Mac)]).extends(&PROFILE_BASE);
static PROFILE_8021QBG: Class = class(
    "VIFPortProfile8021Qbg",
    1,
    &[
        field("manager_id", Integer),
        field("type_id", Integer),
        field("type_id_version", Integer),
        field("instance_id", Uuid),
    ],
)
.extends(&PROFILE_BASE);
static PROFILE_8021QBH: Class =
    class("VIFPortProfile8021Qbh", 1, &[field("profile_id", Text)]).extends(&PROFILE_BASE);
static PROFILE_K8S_DPDK: Class = class(
    "VIFPortProfileK8sDPDK",
    1,
    &[field("l3_setup", Boolean), field("selflink", Text), field("resourceversion", Text)],
)
.extends(&PROFILE_BASE);

static OFFLOAD_BASE: Class = class("DatapathOffloadBase", 0, &[]);
static OFFLOAD_REPRESENTOR: Class = class(
    "DatapathOffloadRepresentor",
    0,
    &[nullable("representor_name", Text), nullable("representor_address", Text)],
)
.extends(&OFFLOAD_BASE);

/// The network a VIF is in.
pub static NETWORK: Class = class(
    "Network",
    1,
    &[
        field("id", Uuid),
        field("bridge", Text),
        field("label", Text),
        field("subnets", Object(&SUBNET_LIST)),
        field("multi_host", Boolean),
        field("should_provide_bridge", Boolean),
        field("should_provide_vlan", Boolean),
        nullable("bridge_interface", Text),
        nullable("vlan", Integer),
        nullable("mtu", Integer), // since 1.1
    ],
);
/// A network's subnets.
pub static SUBNET_LIST: Class = class("SubnetList", 0, &[field("objects", List(&Object(&SUBNET)))]);
static SUBNET: Class = class(
    "Subnet",
    0,
    &[
        field("cidr", IpNetwork),
        field("dns", List(&Ip)),
        field("gateway", Ip),
        field("ips", Object(&FIXED_IP_LIST)),
        field("routes", Object(&ROUTE_LIST)),
        field("dhcp_server", Ip),
    ],
);
static ROUTE_LIST: Class = class("RouteList", 0, &[field("objects", List(&Object(&ROUTE)))]);
static ROUTE: Class =
    class("Route", 0, &[field("cidr", IpNetwork), field("gateway", Ip), field("interface", Text)]);
static FIXED_IP_LIST: Class = class("FixedIPList", 0, &[field("objects", List(&Object(&FIXED_IP)))]);
static FIXED_IP: Class = class("FixedIP", 0, &[field("address", Ip), field("floating_ips", List(&Ip))]);

/// The guest that a VIF belongs to.
pub static INSTANCE_INFO: Class =
    class("InstanceInfo", 0, &[field("uuid", Uuid), field("name", Text), field("project_id", Text)]);

static HOST_INFO: Class = class("HostInfo", 0, &[field("plugin_info", List(&Object(&HOST_PLUGIN_INFO)))]);
static HOST_PLUGIN_INFO: Class = class(
    "HostPluginInfo",
    0,
    &[field("plugin_name", Text), field("vif_info", List(&Object(&HOST_VIF_INFO)))],
);
static HOST_VIF_INFO: Class = class(
    "HostVIFInfo",
    1,
    &[
        field("vif_object_name", Text),
        field("min_version", Text),
        field("max_version", Text),
        field("supported_port_profiles", List(&Object(&HOST_PORT_PROFILE_INFO))), // since 1.1
    ],
);
static HOST_PORT_PROFILE_INFO: Class = class(
    "HostPortProfileInfo",
    0,
    &[field("profile_object_name", Text), field("min_version", Text), field("max_version", Text)],
);
