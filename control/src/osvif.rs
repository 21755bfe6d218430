//! What an os-vif VIF asks of us. The one place that knows both os-vif's objects and a plug's spec.
//!
//! ```text
//! VIFVHostUser, no profile       a port of the network that vif.network names
//!               FPTap            joined with the TAP vif_name
//!               FPBridge         joined with the TAP vif_name in the profile's bridge
//!               FPOpenVSwitch    joined with the TAP vif_name in the network's bridge of Open vSwitch
//!               OpenVSwitch      the same
//! VIFOpenVSwitch, OpenVSwitch    the TAP vif_name in the network's bridge of Open vSwitch is the guest's card; the profile
//!                                says whether TAP and port are ours to make (create_tap, create_port)
//! VIFGeneric                       the TAP vif_name is the guest's card
//! VIFDirect, no profile            a macvtap on vlan_name, or on the interface of PCI device dev_address, is the guest's card
//! ```
//!
//! os-vif's `mode` is the VMM's side of the socket: `client` means that we listen. `plugin`, `active`,
//! `preserve_on_delete` and `has_traffic_filtering` say nothing about forwarding frames and are not looked at.

use std::fmt::Display;
use std::path::Path;
use std::str::FromStr;

use vif::profile::OpenVSwitchProfile;
use vif::vif::{DirectMode, DirectVif, VhostUserMode, VhostUserVif};
use vif::{Field, Network, PortProfile, ProfileKind, Vif, VifKind};

use crate::names::{IfName, Name};
use crate::problem::{Kind, Problem};
use crate::spec::{DatapathType, KernelGuest, Macvtap, MacvtapMode, Ovs, PlugSpec, Role, Socket, To};

/// Queues of a multi-queue TAP whose VMM says how many it wants when it opens them: more than one makes it such a TAP.
const CARD_QUEUES: u16 = 2;

const SUPPORTED: &str = "supported are VIFVHostUser without port profile and with VIFPortProfileFPTap, \
                         VIFPortProfileFPBridge, VIFPortProfileFPOpenVSwitch (not hybrid) or \
                         VIFPortProfileOpenVSwitch, VIFOpenVSwitch, VIFGeneric, and VIFDirect without port profile";

/// Where the kernel shows PCI devices.
const PCI_DEVICES: &str = "/sys/bus/pci/devices";
const NO_INTERFACE: &str = "is it there (lspci), and bound to its network driver, not to vfio-pci?";

/// The plug that serves a VIF.
pub fn plug_of(asked: &vif::Plug) -> Result<(Name, PlugSpec), Problem> {
    let vif = &asked.vif;
    let id = id_of(vif)?;
    let network = vif.network.value();
    let mut spec = PlugSpec {
        mac: vif.address.value().map(|mac| parsed("vif.address", mac)).transpose()?,
        mtu: network.map(mtu_of).transpose()?.flatten(),
        ..PlugSpec::default()
    };
    match &vif.kind {
        VifKind::VhostUser(port) => {
            spec.socket = Some(socket_of(port)?);
            match vif.port_profile.value() {
                Some(profile) if !matches!(profile.kind, ProfileKind::Base) => {
                    spec.to = Some(host_side(asked, port, profile)?);
                }
                _ => {
                    let id = network.and_then(|network| network.id.value());
                    spec.network = id.map(|id| parsed("vif.network.id", id)).transpose()?;
                }
            }
        }
        VifKind::OpenVSwitch(card) => {
            let Some(ProfileKind::OpenVSwitch(profile)) = vif.port_profile.value().map(|p| &p.kind) else {
                return Err(unsupported("a VIFOpenVSwitch without VIFPortProfileOpenVSwitch"));
            };
            let is_set = |field: &Field<bool>| field.value().copied().unwrap_or_default();
            let guest = KernelGuest {
                make_tap: is_set(&profile.create_tap),
                make_port: is_set(&profile.create_port),
            };
            let tap = Some(parsed("vif.vif_name", required("vif.vif_name", &card.vif_name)?)?);
            spec.queues = is_set(&profile.multiqueue).then_some(CARD_QUEUES);
            spec.to = Some(To::Ovs(Ovs { tap, guest: Some(guest), ..ovs_of(asked, profile)? }));
        }
        VifKind::Generic(card) => {
            let tap = parsed("vif.vif_name", required("vif.vif_name", &card.vif_name)?)?;
            spec.to = Some(To::Tap { tap, mac: None, guest: true });
        }
        VifKind::Direct(card) => spec.to = Some(To::Macvtap(macvtap_of(vif, card)?)),
        _ => return Err(unsupported(&format!("a VIF of class {}", vif.class))),
    }
    Ok((id, spec))
}

/// The plug's id is the VIF's.
pub fn id_of(vif: &Vif) -> Result<Name, Problem> {
    parsed("vif.id", required("vif.id", &vif.id)?)
}

fn socket_of(vif: &VhostUserVif) -> Result<Socket, Problem> {
    let role = match required("vif.mode", &vif.mode)? {
        VhostUserMode::Client => Role::Listen,
        VhostUserMode::Server => Role::Connect,
    };
    Ok(Socket { role, path: parsed("vif.path", required("vif.path", &vif.path)?)? })
}

fn host_side(asked: &vif::Plug, vif: &VhostUserVif, profile: &PortProfile) -> Result<To, Problem> {
    // VIFVHostUser 1.0 has no vif_name.
    let tap = || parsed("vif.vif_name", required("vif.vif_name", &vif.vif_name)?);
    match &profile.kind {
        ProfileKind::FpTap(tap_profile) => {
            let field = "vif.port_profile.mac_address";
            let mac = tap_profile.mac_address.value().map(|mac| parsed(field, mac)).transpose()?;
            Ok(To::Tap { tap: tap()?, mac, guest: false })
        }
        ProfileKind::FpBridge(bridge) => {
            let field = "vif.port_profile.bridge_name";
            let bridge = parsed(field, required(field, &bridge.bridge_name)?)?;
            Ok(To::Bridge { bridge, tap: Some(tap()?) })
        }
        ProfileKind::FpOpenVSwitch(_, more) if more.hybrid_plug.value() == Some(&true) => {
            Err(unsupported("a hybrid plug, through a Linux bridge into Open vSwitch,"))
        }
        ProfileKind::FpOpenVSwitch(ovs, _) => Ok(To::Ovs(Ovs { tap: Some(tap()?), ..ovs_of(asked, ovs)? })),
        // os-vif's own plug-in makes up a name here and does not look at vif_name.
        ProfileKind::OpenVSwitch(ovs) => {
            let tap = vif.vif_name.value().map(|name| parsed("vif.vif_name", name)).transpose()?;
            Ok(To::Ovs(Ovs { tap, ..ovs_of(asked, ovs)? }))
        }
        _ => Err(unsupported(&format!("a VIF with port profile {}", profile.class))),
    }
}

/// The macvtap on the VLAN that is named, or on the device of that PCI address.
fn macvtap_of(vif: &Vif, card: &DirectVif) -> Result<Macvtap, Problem> {
    if let Some(profile) = vif.port_profile.value().filter(|p| !matches!(p.kind, ProfileKind::Base)) {
        return Err(unsupported(&format!("a VIFDirect with port profile {}", profile.class)));
    }
    let device = match (card.vlan_name.value(), card.dev_address.value()) {
        (Some(vlan), _) if !vlan.is_empty() => parsed("vif.vlan_name", vlan)?,
        (_, Some(address)) => interface_of(Path::new(PCI_DEVICES), &address.to_string())?,
        _ => return Err(missing("vif.dev_address")),
    };
    let mode = match required("vif.mode", &card.mode)? {
        DirectMode::Vepa => MacvtapMode::Vepa,
        DirectMode::Passthrough => MacvtapMode::Passthrough,
        DirectMode::Bridge => MacvtapMode::Bridge,
    };
    let tap = card.vif_name.value().map(|name| parsed("vif.vif_name", name)).transpose()?;
    Ok(Macvtap { mode, tap, guest: true, ..Macvtap::new(device) })
}

/// The network interface of a PCI device.
fn interface_of(devices: &Path, address: &str) -> Result<IfName, Problem> {
    let field = "vif.dev_address";
    let mut interfaces = devices.join(address).join("net").read_dir().into_iter().flatten();
    match interfaces.next() {
        Some(Ok(interface)) => parsed(field, &interface.file_name().to_string_lossy()),
        _ => {
            let problem = format!("{field}: this host has no network interface of PCI device {address}");
            Err(Problem::new(Kind::Precondition, problem).field(field).hint(NO_INTERFACE))
        }
    }
}

/// The port in Open vSwitch, but for its TAP. Its bridge is the network's, as for os-vif's own plug-in.
fn ovs_of(asked: &vif::Plug, profile: &OpenVSwitchProfile) -> Result<Ovs, Problem> {
    let field = "vif.network.bridge";
    let network = asked.vif.network.value().ok_or_else(|| missing("vif.network"))?;
    let bridge = parsed(field, required(field, &network.bridge)?)?;
    required("vif.address", &asked.vif.address)?;
    let field = "vif.port_profile.datapath_type";
    let datapath_type = match profile.datapath_type.value().map(String::as_str) {
        None | Some("") => None,
        Some("system") => Some(DatapathType::System),
        Some("netdev") => Some(DatapathType::Netdev),
        Some(other) => {
            let problem = Problem::invalid(format!("{field} is {other:?}, it must be system or netdev"));
            return Err(problem.field(field));
        }
    };
    let given = |field: &str, text: Option<&String>| {
        text.filter(|text| !text.is_empty()).map(|text| parsed(field, text)).transpose()
    };
    let uuid = asked.instance_info.as_ref().and_then(|instance| instance.uuid.value());
    Ok(Ovs {
        datapath_type,
        iface_id: given("vif.port_profile.interface_id", profile.interface_id.value())?,
        vm_uuid: given("instance_info.uuid", uuid)?,
        ..Ovs::new(bridge)
    })
}

fn mtu_of(network: &Network) -> Result<Option<u16>, Problem> {
    let field = "vif.network.mtu";
    let in_range =
        |mtu: i64| mtu.try_into().map_err(|_| Problem::invalid(format!("{field} is {mtu}")).field(field));
    // os-vif's own plug-ins take 0 as "not told".
    network.mtu.value().filter(|mtu| **mtu != 0).map(|mtu| in_range(*mtu)).transpose()
}

fn required<'a, T>(field: &str, value: &'a Field<T>) -> Result<&'a T, Problem> {
    value.value().ok_or_else(|| missing(field))
}

fn missing(field: &str) -> Problem {
    Problem::invalid(format!("{field} is not set, and a plug needs it")).field(field)
}

fn parsed<T: FromStr<Err: Display>>(field: &str, value: &impl ToString) -> Result<T, Problem> {
    value.to_string().parse().map_err(|e| Problem::invalid(format!("{field}: {e}")).field(field))
}

fn unsupported(what: &str) -> Problem {
    Problem::new(Kind::Unsupported, format!("{what} is not supported")).hint(SUPPORTED)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn envelope(class: &str, version: &str, data: Value) -> Value {
        let mut envelope = json!({"versioned_object.name": class, "versioned_object.namespace": "os_vif"});
        envelope["versioned_object.version"] = version.into();
        envelope["versioned_object.data"] = data;
        envelope
    }

    const ID: &str = "dc065497-3c8d-4f44-8fb4-e1d33c16a536";
    const NETWORK: &str = "b82c1929-051e-481d-8110-4669916c7915";

    /// A VIF with these fields beside its id, path and mode.
    fn vif(mut more: Value) -> Value {
        let mut data = json!({"id": ID, "path": "/run/vm.sock", "mode": "client"});
        data.as_object_mut().unwrap().append(more.as_object_mut().unwrap());
        envelope("VIFVHostUser", "1.1", data)
    }

    fn plug(value: &Value) -> Result<Value, Problem> {
        let document = vif::Document::decode(value).unwrap();
        let (id, spec) = plug_of(&document.plug().unwrap())?;
        assert_eq!(id.as_str(), ID);
        Ok(serde_json::to_value(spec).unwrap())
    }

    #[test]
    fn without_a_profile_it_is_a_port_of_its_network() {
        let network = envelope("Network", "1.1", json!({"id": NETWORK, "mtu": 9000}));
        let spec = plug(&vif(json!({"network": network, "address": "22:52:25:62:e2:aa", "mode": "server"})))
            .unwrap();
        let socket = json!({"role": "connect", "path": "/run/vm.sock"});
        assert_eq!(
            spec,
            json!({"network": NETWORK, "socket": socket, "mac": "22:52:25:62:e2:aa", "mtu": 9000})
        );
    }

    #[test]
    fn what_producers_leave_out_is_done_without() {
        let socket = json!({"role": "listen", "path": "/run/vm.sock"});
        let bare = envelope("Network", "1.0", json!({}));
        let unmeasured = envelope("Network", "1.1", json!({"mtu": 0}));
        for more in [
            json!({}),
            json!({"address": null, "network": null}),
            json!({"network": bare}),
            json!({"network": unmeasured}),
            json!({"port_profile": envelope("VIFPortProfileBase", "1.1", json!({}))}),
        ] {
            assert_eq!(plug(&vif(more)).unwrap(), json!({"socket": socket}));
        }
        let old =
            envelope("VIFVHostUser", "1.0", json!({"id": ID, "path": "/run/vm.sock", "mode": "client"}));
        assert_eq!(plug(&old).unwrap(), json!({"socket": socket}));
    }

    #[test]
    fn profiles_join_it_with_the_host() {
        let network = envelope("Network", "1.1", json!({"id": NETWORK, "mtu": 1450}));
        let tap = envelope("VIFPortProfileFPTap", "1.1", json!({"mac_address": "52:54:00:00:00:09"}));
        let spec = plug(&vif(json!({"vif_name": "tapdc065497-3c", "port_profile": tap, "network": network})))
            .unwrap();
        assert_eq!(spec["to"], json!({"kind": "tap", "tap": "tapdc065497-3c", "mac": "52:54:00:00:00:09"}));
        assert_eq!((&spec["mtu"], &spec["network"]), (&json!(1450), &Value::Null));
        let bridge = envelope("VIFPortProfileFPBridge", "1.0", json!({"bridge_name": "brq1"}));
        let spec = plug(&vif(json!({"vif_name": "tap1", "port_profile": bridge}))).unwrap();
        assert_eq!(spec["to"], json!({"kind": "bridge", "bridge": "brq1", "tap": "tap1"}));
    }

    /// A VIF in Open vSwitch, its profile of this class, and these fields.
    fn in_ovs(class: &str, profile: &str, mut more: Value, profile_data: Value) -> Value {
        let network = envelope("Network", "1.1", json!({"id": NETWORK, "bridge": "br-int", "mtu": 1450}));
        let mut data = json!({"id": ID, "address": "22:52:25:62:e2:aa", "network": network,
                              "port_profile": envelope(profile, "1.4", profile_data)});
        data.as_object_mut().unwrap().append(more.as_object_mut().unwrap());
        envelope(class, if class == "VIFVHostUser" { "1.1" } else { "1.0" }, data)
    }

    #[test]
    fn a_vhost_user_port_in_open_vswitch_is_joined_with_a_tap() {
        let socket = json!({"path": "/run/vm.sock", "mode": "client", "vif_name": "vhudc065497-3c"});
        for profile in ["VIFPortProfileFPOpenVSwitch", "VIFPortProfileOpenVSwitch"] {
            let data = json!({"interface_id": ID, "datapath_type": "netdev"});
            let spec = plug(&in_ovs("VIFVHostUser", profile, socket.clone(), data)).unwrap();
            let to = json!({"kind": "ovs", "bridge": "br-int", "tap": "vhudc065497-3c", "datapath_type": "netdev",
                            "iface_id": ID});
            assert_eq!((&spec["to"], &spec["mtu"], &spec["network"]), (&to, &json!(1450), &Value::Null));
            assert_eq!(spec["mac"], "22:52:25:62:e2:aa");
        }
    }

    #[test]
    fn the_guests_tap_in_open_vswitch_is_made_as_far_as_the_profile_says() {
        let profile = "VIFPortProfileOpenVSwitch";
        let card = |data| {
            let vif = in_ovs("VIFOpenVSwitch", profile, json!({"vif_name": "tap1"}), data);
            let document =
                json!({"vif": vif, "instance_info": envelope("InstanceInfo", "1.0", json!({"uuid": "vm"}))});
            let spec = plug(&document).unwrap();
            assert_eq!((&spec["socket"], &spec["to"]["tap"]), (&Value::Null, &json!("tap1")));
            (spec["to"]["guest"].clone(), spec["to"]["vm_uuid"].clone(), spec["queues"].clone())
        };
        let made = |make_tap: bool, make_port: bool| json!({"make_tap": make_tap, "make_port": make_port});
        assert_eq!(card(json!({})), (made(false, false), json!("vm"), Value::Null));
        assert_eq!(card(json!({"create_port": true})).0, made(false, true));
        let all = json!({"create_port": true, "create_tap": true, "multiqueue": true});
        assert_eq!(card(all), (made(true, true), json!("vm"), json!(2)));
    }

    #[test]
    fn cards_of_the_kernels_own_are_made_for_the_vmm() {
        let generic = json!({"id": ID, "vif_name": "tap1", "address": "52:54:00:00:00:09"});
        let spec = plug(&envelope("VIFGeneric", "1.0", generic)).unwrap();
        assert_eq!(spec["to"], json!({"kind": "tap", "tap": "tap1", "guest": true}));
        assert_eq!(spec["mac"], "52:54:00:00:00:09");
        let on_vlan = json!({"id": ID, "vif_name": "mvt1", "mode": "passthrough", "vlan_name": "vlan7",
                             "dev_address": "0000:03:00.1"});
        let spec = plug(&envelope("VIFDirect", "1.0", on_vlan)).unwrap();
        let to = json!({"kind": "macvtap", "device": "vlan7", "mode": "passthrough", "tap": "mvt1", "guest": true});
        assert_eq!(spec["to"], to);
        let nowhere = json!({"id": ID, "mode": "bridge", "dev_address": "fff0:1f:1f.7"});
        let problem = plug(&envelope("VIFDirect", "1.0", nowhere)).unwrap_err();
        assert_eq!((problem.kind, problem.field.as_deref()), (Kind::Precondition, Some("vif.dev_address")));
        assert!(problem.detail.contains("PCI device fff0:1f:1f.7"), "{}", problem.detail);
    }

    #[test]
    fn a_pci_device_is_known_by_its_interface() {
        let devices = tempfile::tempdir().unwrap();
        let bound = devices.path().join("0000:03:00.1/net/enp3s0f1");
        std::fs::create_dir_all(bound).unwrap();
        std::fs::create_dir_all(devices.path().join("0000:03:00.2/net")).unwrap();
        let interface = |address| interface_of(devices.path(), address);
        assert_eq!(interface("0000:03:00.1").unwrap().as_str(), "enp3s0f1");
        for unbound in ["0000:03:00.2", "0000:03:00.3"] {
            assert_eq!(interface(unbound).unwrap_err().kind, Kind::Precondition);
        }
    }

    #[test]
    fn what_is_not_supported_is_said_with_what_is() {
        let qbh = envelope("VIFPortProfile8021Qbh", "1.1", json!({}));
        let hybrid = json!({"interface_id": ID, "hybrid_plug": true, "bridge_name": "qbr1"});
        let hybrid = envelope("VIFPortProfileFPOpenVSwitch", "1.4", hybrid);
        let device = envelope("VIFHostDevice", "1.0", json!({"id": ID, "dev_address": "0000:03:00.1"}));
        let qbg = envelope("VIFPortProfile8021Qbg", "1.1", json!({}));
        let direct = json!({"id": ID, "mode": "vepa", "vlan_name": "vlan7", "port_profile": qbg});
        let direct = envelope("VIFDirect", "1.0", direct);
        let bare = envelope("VIFOpenVSwitch", "1.0", json!({"id": ID, "vif_name": "tap1"}));
        for (value, named) in [
            (vif(json!({"port_profile": qbh})), "VIFPortProfile8021Qbh"),
            (vif(json!({"port_profile": hybrid, "vif_name": "tap1"})), "hybrid"),
            (device, "VIFHostDevice"),
            (direct, "VIFPortProfile8021Qbg"),
            (bare, "VIFOpenVSwitch"),
        ] {
            let problem = plug(&value).unwrap_err();
            assert_eq!(problem.kind, Kind::Unsupported);
            assert!(problem.detail.contains(named), "{}", problem.detail);
            assert!(problem.hint.unwrap().contains("VIFVHostUser"));
        }
    }

    #[test]
    fn what_a_plug_needs_is_asked_for() {
        let tap = || envelope("VIFPortProfileFPTap", "1.1", json!({}));
        let fp_bridge = |data| envelope("VIFPortProfileFPBridge", "1.1", data);
        let ovs = |data| envelope("VIFPortProfileOpenVSwitch", "1.4", data);
        let bridged = || envelope("Network", "1.1", json!({"bridge": "br-int"}));
        let huge = envelope("Network", "1.1", json!({"mtu": 70_000}));
        let odd = envelope("Network", "1.1", json!({"id": "a/b"}));
        for (value, field) in [
            (vif(json!({"path": "relative"})), "vif.path"),
            (vif(json!({"port_profile": tap()})), "vif.vif_name"),
            (vif(json!({"port_profile": tap(), "vif_name": "sixteen-bytes-xx"})), "vif.vif_name"),
            (
                vif(json!({"port_profile": fp_bridge(json!({})), "vif_name": "t"})),
                "vif.port_profile.bridge_name",
            ),
            (vif(json!({"network": huge})), "vif.network.mtu"),
            (vif(json!({"port_profile": ovs(json!({}))})), "vif.network"),
            (vif(json!({"port_profile": ovs(json!({})), "network": bridged()})), "vif.address"),
            (
                vif(json!({"port_profile": ovs(json!({"datapath_type": "fpga"})), "network": bridged(),
                           "address": "22:52:25:62:e2:aa"})),
                "vif.port_profile.datapath_type",
            ),
            (vif(json!({"network": odd})), "vif.network.id"),
            (vif(json!({"address": "ff:ff:ff:ff:ff:ff"})), "vif.address"),
            (vif(json!({"id": "../x"})), "vif.id"),
            (envelope("VIFVHostUser", "1.1", json!({"id": ID, "mode": "client"})), "vif.path"),
            (envelope("VIFVHostUser", "1.1", json!({"id": ID, "path": "/x"})), "vif.mode"),
            (envelope("VIFVHostUser", "1.1", json!({})), "vif.id"),
            (envelope("VIFGeneric", "1.0", json!({"id": ID})), "vif.vif_name"),
            (envelope("VIFDirect", "1.0", json!({"id": ID, "mode": "vepa"})), "vif.dev_address"),
            (envelope("VIFDirect", "1.0", json!({"id": ID, "vlan_name": "v"})), "vif.mode"),
        ] {
            assert_eq!(plug(&value).unwrap_err().field.as_deref(), Some(field));
        }
    }
}
