//! What each VIF is made of, as a plug's spec.

use super::*;
use crate::spec::Role;
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
    plug_by(value, None)
}

/// The same with a socket beside the VIF.
fn plug_by(value: &Value, socket: Option<Socket>) -> Result<Value, Problem> {
    let document = vif::Document::decode(value).unwrap();
    let (id, spec) = plug_of(&document.plug().unwrap(), socket)?;
    assert_eq!(id.as_str(), ID);
    Ok(serde_json::to_value(spec).unwrap())
}

#[test]
fn without_a_profile_it_is_a_port_of_its_network() {
    let network = envelope("Network", "1.1", json!({"id": NETWORK, "mtu": 9000}));
    let spec =
        plug(&vif(json!({"network": network, "address": "22:52:25:62:e2:aa", "mode": "server"}))).unwrap();
    let socket = json!({"role": "connect", "path": "/run/vm.sock"});
    assert_eq!(spec, json!({"network": NETWORK, "socket": socket, "mac": "22:52:25:62:e2:aa", "mtu": 9000}));
}

#[test]
fn addresses_of_an_unfiltered_guest_are_its_only_ones() {
    let list = |class: &str, objects: Vec<Value>| envelope(class, "1.0", json!({"objects": objects}));
    let fixed = |address: &str| {
        envelope("FixedIP", "1.0", json!({"address": address, "floating_ips": ["203.0.113.1"]}))
    };
    let subnet = |ips: Vec<Value>| {
        envelope("Subnet", "1.0", json!({"cidr": "10.0.0.0/24", "ips": list("FixedIPList", ips)}))
    };
    let subnets = |subnets| envelope("Network", "1.1", json!({"subnets": list("SubnetList", subnets)}));
    let anti_spoof = |filtered: bool, network: &Value, address: Value| {
        let more = json!({"has_traffic_filtering": filtered, "address": address, "network": network});
        plug(&vif(more)).unwrap()["anti_spoof"].clone()
    };
    let two =
        subnets(vec![subnet(vec![fixed("10.0.0.7")]), subnet(vec![fixed("2001:db8::7")]), subnet(vec![])]);
    let mac = json!("22:52:25:62:e2:aa");
    assert_eq!(anti_spoof(false, &two, mac.clone()), json!({"addresses": ["10.0.0.7", "2001:db8::7"]}));
    assert_eq!(anti_spoof(true, &two, mac.clone()), Value::Null);
    assert_eq!(anti_spoof(false, &two, Value::Null), Value::Null);
    assert_eq!(anti_spoof(false, &subnets(vec![]), mac), Value::Null);
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
    let old = envelope("VIFVHostUser", "1.0", json!({"id": ID, "path": "/run/vm.sock", "mode": "client"}));
    assert_eq!(plug(&old).unwrap(), json!({"socket": socket}));
}

#[test]
fn profiles_join_it_with_the_host() {
    let network = envelope("Network", "1.1", json!({"id": NETWORK, "mtu": 1450}));
    let tap = envelope("VIFPortProfileFPTap", "1.1", json!({"mac_address": "52:54:00:00:00:09"}));
    let spec =
        plug(&vif(json!({"vif_name": "tapdc065497-3c", "port_profile": tap, "network": network}))).unwrap();
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
fn a_hybrid_plug_goes_through_a_linux_bridge() {
    let socket = json!({"path": "/run/vm.sock", "mode": "client", "vif_name": "tapdc065497-3c"});
    let profile = json!({"interface_id": ID, "hybrid_plug": true, "bridge_name": "qbrdc065497-3c"});
    let spec = plug(&in_ovs("VIFVHostUser", "VIFPortProfileFPOpenVSwitch", socket.clone(), profile)).unwrap();
    let to = json!({"kind": "ovs", "bridge": "br-int", "hybrid": "qbrdc065497-3c", "tap": "tapdc065497-3c",
                    "iface_id": ID});
    assert_eq!(spec["to"], to);
    let plain = json!({"interface_id": ID, "hybrid_plug": false, "bridge_name": "qbrdc065497-3c"});
    let spec = plug(&in_ovs("VIFVHostUser", "VIFPortProfileFPOpenVSwitch", socket, plain)).unwrap();
    assert_eq!(spec["to"]["hybrid"], Value::Null);

    let card = json!({"vif_name": "tapdc065497-3c", "bridge_name": "qbrdc065497-3c"});
    let card = in_ovs("VIFBridge", "VIFPortProfileOpenVSwitch", card, json!({"interface_id": ID}));
    let mut guests = to.clone();
    guests["guest"] = json!({"make_tap": false, "make_port": true});
    assert_eq!(plug(&card).unwrap()["to"], guests);
    let socket = Socket { role: Role::Listen, path: "/run/vm.sock".parse().unwrap() };
    let served = plug_by(&card, Some(socket)).unwrap();
    assert_eq!((&served["to"], &served["socket"]["path"]), (&to, &json!("/run/vm.sock")));
}

/// A VIFBridge in a network with these fields.
fn in_bridge(network: Value) -> Value {
    let card = json!({"id": ID, "vif_name": "tap1", "bridge_name": "brq1", "address": "22:52:25:62:e2:aa",
                      "network": envelope("Network", "1.1", network)});
    envelope("VIFBridge", "1.0", card)
}

#[test]
fn a_bridge_has_the_uplink_that_os_vif_is_to_provide() {
    let of = |network| plug(&in_bridge(network)).unwrap()["to"].clone();
    let uplink = |network| of(network)["uplink"].clone();
    let bare = json!({"kind": "bridge", "bridge": "brq1", "tap": "tap1", "guest": true});
    assert_eq!(of(json!({})), bare);
    assert_eq!(of(json!({"bridge_interface": "eth1"})), bare, "somebody else made the bridge");
    let provided = json!({"should_provide_bridge": true, "bridge_interface": "eth1", "vlan": 7});
    let with = |field: &str, value: Value| {
        let mut network = provided.clone();
        network[field] = value;
        network
    };
    assert_eq!(uplink(provided.clone()), json!({"device": "eth1"}));
    assert_eq!(uplink(with("bridge_interface", Value::Null)), Value::Null);
    assert_eq!(uplink(with("multi_host", json!(true))), Value::Null);
    assert_eq!(uplink(with("should_provide_vlan", json!(true))), json!({"device": "eth1", "vlan": 7}));
    let asked_for = |network, field| {
        assert_eq!(plug(&in_bridge(network)).unwrap_err().field.as_deref(), Some(field));
    };
    let vlan = json!({"should_provide_bridge": true, "should_provide_vlan": true});
    asked_for(vlan.clone(), "vif.network.bridge_interface");
    let mut vlan = vlan;
    vlan["bridge_interface"] = json!("eth1");
    asked_for(vlan.clone(), "vif.network.vlan");
    vlan["vlan"] = json!(70_000);
    asked_for(vlan, "vif.network.vlan");
    asked_for(with("bridge_interface", json!("sixteen-bytes-xx")), "vif.network.bridge_interface");

    // Without a bridge of its own it is the network's.
    let network = envelope("Network", "1.1", json!({"bridge": "brq2"}));
    let card = |network: &Value| envelope("VIFBridge", "1.0", json!({"id": ID, "network": network}));
    assert_eq!(
        plug(&card(&network)).unwrap()["to"],
        json!({"kind": "bridge", "bridge": "brq2", "guest": true})
    );
    let nowhere = plug(&card(&Value::Null)).unwrap_err();
    assert_eq!(nowhere.field.as_deref(), Some("vif.bridge_name"));
}

#[test]
fn any_card_may_be_served_by_a_socket_beside_it() {
    let socket = || Socket { role: Role::Connect, path: "/run/vm.sock".parse().unwrap() };
    let profile = "VIFPortProfileOpenVSwitch";
    let data = json!({"create_tap": true, "create_port": true, "multiqueue": true});
    let generic = envelope("VIFGeneric", "1.0", json!({"id": ID, "vif_name": "tap1"}));
    let direct = json!({"id": ID, "vif_name": "mvt1", "mode": "bridge", "vlan_name": "vlan7"});
    let function = json!({"id": ID, "address": "22:52:25:62:e2:aa", "dev_type": "ethernet", "dev_address": "0000:03:00.1",
                          "network": envelope("Network", "1.1", json!({"id": NETWORK, "vlan": 7}))});
    for (vif, to) in [
        (in_bridge(json!({})), json!({"kind": "bridge", "bridge": "brq1", "tap": "tap1"})),
        (generic, json!({"kind": "tap", "tap": "tap1"})),
        (
            envelope("VIFDirect", "1.0", direct),
            json!({"kind": "macvtap", "device": "vlan7", "mode": "bridge", "tap": "mvt1"}),
        ),
        (
            in_ovs("VIFOpenVSwitch", profile, json!({"vif_name": "tap1"}), data),
            json!({"kind": "ovs", "bridge": "br-int", "tap": "tap1"}),
        ),
        (
            envelope("VIFHostDevice", "1.0", function),
            json!({"kind": "device", "address": "0000:03:00.1", "dev_type": "ethernet", "vlan": 7}),
        ),
    ] {
        let spec = plug_by(&vif, Some(socket())).unwrap();
        assert_eq!((&spec["to"], &spec["queues"]), (&to, &Value::Null));
        assert_eq!(spec["socket"], json!({"role": "connect", "path": "/run/vm.sock"}));
        assert!(plug(&vif).unwrap()["socket"].is_null());
    }
    let twice = plug_by(&vif(json!({})), Some(socket())).unwrap_err();
    assert_eq!((twice.kind, twice.field.as_deref()), (Kind::Invalid, Some("socket")));
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
    let to =
        json!({"kind": "macvtap", "device": "vlan7", "mode": "passthrough", "tap": "mvt1", "guest": true});
    assert_eq!(spec["to"], to);
    let nowhere = json!({"id": ID, "mode": "bridge", "dev_address": "fff0:1f:1f.7"});
    let problem = plug(&envelope("VIFDirect", "1.0", nowhere)).unwrap_err();
    assert_eq!((problem.kind, problem.field.as_deref()), (Kind::Precondition, Some("vif.dev_address")));
    assert!(problem.detail.contains("PCI device fff0:1f:1f.7"), "{}", problem.detail);
}

#[test]
fn a_switch_outside_is_told_of_a_guest_by_its_port_profile() {
    let direct = |profile: Value| {
        let mut data = json!({"id": ID, "vif_name": "mvt1", "mode": "vepa", "vlan_name": "vlan7"});
        data["port_profile"] = profile;
        let instance = envelope("InstanceInfo", "1.0", json!({"uuid": NETWORK}));
        plug(&json!({"vif": envelope("VIFDirect", "1.0", data), "instance_info": instance}))
    };
    let qbg = |more: Value| {
        let mut data = json!({"manager_id": 11, "type_id": 12345, "type_id_version": 1, "instance_id": ID});
        data.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        direct(envelope("VIFPortProfile8021Qbg", "1.1", data))
    };
    let profile = json!({"protocol": "802.1Qbg", "manager_id": 11, "type_id": 12345, "type_id_version": 1,
                         "instance_id": ID});
    assert_eq!(qbg(json!({})).unwrap()["to"]["profile"], profile);
    for (field, value) in [("manager_id", json!(256)), ("type_id", json!(-1)), ("instance_id", json!("x"))] {
        let problem = qbg(json!({field: value})).unwrap_err();
        assert_eq!(problem.field, Some(format!("vif.port_profile.{field}")));
    }
    let qbh = direct(envelope("VIFPortProfile8021Qbh", "1.1", json!({"profile_id": "web"}))).unwrap();
    let profile = json!({"protocol": "802.1Qbh", "profile_id": "web", "instance_id": NETWORK});
    assert_eq!(qbh["to"]["profile"], profile);

    let device = |dev_type: &str, class: &str| {
        let mut data = json!({"id": ID, "dev_type": dev_type, "dev_address": "0000:03:00.1"});
        data["address"] = "22:52:25:62:e2:aa".into();
        data["port_profile"] = envelope(class, "1.1", json!({"profile_id": "web"}));
        let instance = envelope("InstanceInfo", "1.0", json!({"uuid": NETWORK}));
        plug(&json!({"vif": envelope("VIFHostDevice", "1.0", data), "instance_info": instance}))
    };
    let spec = device("ethernet", "VIFPortProfile8021Qbh").unwrap();
    let to = json!({"kind": "device", "address": "0000:03:00.1", "dev_type": "ethernet", "profile": profile});
    assert_eq!((&spec["to"], &spec["mac"]), (&to, &json!("22:52:25:62:e2:aa")));
    for (dev_type, class) in [("generic", "VIFPortProfile8021Qbh"), ("ethernet", "VIFPortProfile8021Qbg")] {
        assert_eq!(device(dev_type, class).unwrap_err().kind, Kind::Unsupported);
    }
}

#[test]
fn a_device_is_the_guests_card_and_its_representor_a_port_of_open_vswitch() {
    let device = |more: Value| {
        let mut data = json!({"id": ID, "dev_type": "ethernet", "dev_address": "0000:03:00.1"});
        data["address"] = "22:52:25:62:e2:aa".into();
        data.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        plug(&envelope("VIFHostDevice", "1.0", data))
    };
    let network = envelope("Network", "1.1", json!({"id": NETWORK, "vlan": 7, "bridge": "br-int"}));
    let spec = device(json!({"network": network})).unwrap();
    let to = json!({"kind": "device", "address": "0000:03:00.1", "dev_type": "ethernet", "vlan": 7});
    assert_eq!((&spec["to"], &spec["mac"]), (&to, &json!("22:52:25:62:e2:aa")));
    let generic = device(json!({"dev_type": "generic"})).unwrap();
    assert_eq!(generic["to"], json!({"kind": "device", "address": "0000:03:00.1", "dev_type": "generic"}));

    let named = |address: &str| json!({"representor_name": "tap1", "representor_address": address});
    let offload = envelope("DatapathOffloadRepresentor", "1.0", named("0000:03:00.1"));
    let mut newer = named("0000:03:00.1");
    newer.as_object_mut().unwrap().extend([("datapath_offload".into(), offload.clone())]);
    let profiles = [
        ("VIFPortProfileOVSRepresentor", "1.0", named("0000:03:00.1")),
        ("VIFPortProfileOVSRepresentor", "1.4", newer),
        ("VIFPortProfileOpenVSwitch", "1.4", json!({"datapath_offload": offload})),
    ];
    let port = json!({"bridge": "br-int", "tap": "tap1", "iface_id": ID});
    for (class, version, mut data) in profiles {
        data["interface_id"] = ID.into();
        let profile = envelope(class, version, data);
        let spec = device(json!({"network": network, "port_profile": profile})).unwrap();
        assert_eq!((&spec["to"]["port"], &spec["to"]["vlan"]), (&port, &Value::Null), "{class} {version}");
        let behind_socket =
            vif(json!({"network": network, "port_profile": profile, "address": "22:52:25:62:e2:aa"}));
        let to = json!({"kind": "device", "address": "0000:03:00.1", "dev_type": "generic", "port": port});
        assert_eq!(plug(&behind_socket).unwrap()["to"], to);
    }
    let other = envelope("VIFPortProfileOVSRepresentor", "1.0", named("0000:03:00.2"));
    let problem = device(json!({"network": network, "port_profile": other})).unwrap_err();
    assert_eq!(problem.field.as_deref(), Some("vif.port_profile.representor_address"));
}

#[test]
fn a_nested_device_is_found_by_its_address() {
    let nested = |data: Value| plug(&envelope("VIFNestedDPDK", "1.0", data)).map(|spec| spec["to"].clone());
    let profile = envelope("VIFPortProfileK8sDPDK", "1.1", json!({"l3_setup": false, "selflink": "/x"}));
    let by_mac = nested(json!({"id": ID, "address": "22:52:25:62:e2:aa", "port_profile": profile})).unwrap();
    assert_eq!(by_mac, json!({"kind": "device", "dev_type": "nested"}));
    let there = nested(json!({"id": ID, "pci_address": "0000:00:05.0", "dev_driver": "virtio-pci"})).unwrap();
    assert_eq!(there, json!({"kind": "device", "dev_type": "nested", "address": "0000:00:05.0"}));
    assert_eq!(nested(json!({"id": ID})).unwrap_err().field.as_deref(), Some("vif.address"));
    let odd = nested(json!({"id": ID, "pci_address": "eth0"})).unwrap_err();
    assert_eq!(odd.field.as_deref(), Some("vif.pci_address"));
}

#[test]
fn what_is_not_supported_is_said_with_what_is() {
    let qbh = envelope("VIFPortProfile8021Qbh", "1.1", json!({}));
    let fp_tap = envelope("VIFPortProfileFPTap", "1.1", json!({}));
    let fp_tap = json!({"id": ID, "vif_name": "tap1", "bridge_name": "br1", "port_profile": fp_tap});
    let tap = || envelope("VIFPortProfileFPTap", "1.1", json!({}));
    let device =
        json!({"id": ID, "dev_type": "generic", "dev_address": "0000:03:00.1", "port_profile": tap()});
    let device = envelope("VIFHostDevice", "1.0", device);
    let l3 = envelope("VIFPortProfileK8sDPDK", "1.1", json!({"l3_setup": true}));
    let nested = json!({"id": ID, "address": "52:54:00:00:00:09", "port_profile": l3});
    let direct = json!({"id": ID, "mode": "vepa", "vlan_name": "vlan7", "port_profile": tap()});
    let direct = envelope("VIFDirect", "1.0", direct);
    let bare = envelope("VIFOpenVSwitch", "1.0", json!({"id": ID, "vif_name": "tap1"}));
    for (value, named) in [
        (vif(json!({"port_profile": qbh})), "VIFPortProfile8021Qbh"),
        (envelope("VIFBridge", "1.0", fp_tap), "VIFPortProfileFPTap"),
        (device, "VIFPortProfileFPTap"),
        (envelope("VIFNestedDPDK", "1.0", nested), "l3_setup"),
        (direct, "VIFPortProfileFPTap"),
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
        (vif(json!({"port_profile": fp_bridge(json!({})), "vif_name": "t"})), "vif.port_profile.bridge_name"),
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
        (
            in_ovs("VIFBridge", "VIFPortProfileOpenVSwitch", json!({"vif_name": "t"}), json!({})),
            "vif.bridge_name",
        ),
        (
            in_ovs(
                "VIFVHostUser",
                "VIFPortProfileFPOpenVSwitch",
                json!({"path": "/x", "mode": "client", "vif_name": "t"}),
                json!({"hybrid_plug": true}),
            ),
            "vif.port_profile.bridge_name",
        ),
        (envelope("VIFDirect", "1.0", json!({"id": ID, "mode": "vepa"})), "vif.dev_address"),
        (envelope("VIFDirect", "1.0", json!({"id": ID, "vlan_name": "v"})), "vif.mode"),
        (envelope("VIFHostDevice", "1.0", json!({"id": ID, "dev_type": "generic"})), "vif.dev_address"),
        (envelope("VIFHostDevice", "1.0", json!({"id": ID, "dev_address": "0000:03:00.1"})), "vif.dev_type"),
    ] {
        assert_eq!(plug(&value).unwrap_err().field.as_deref(), Some(field));
    }
}
