//! What specs are made of, and what is none.

use super::*;
use serde_json::json;

fn spec(value: Value) -> PlugSpec {
    serde_json::from_value(value).unwrap()
}

fn name(text: &str) -> Name {
    text.parse().unwrap()
}

fn listen() -> Value {
    json!({"role": "listen", "path": "/run/x.sock"})
}

#[test]
fn what_is_left_out_is_filled_in() {
    let port = spec(json!({"socket": listen()})).completed(&name("vm1")).unwrap();
    assert_eq!(
        serde_json::to_value(&port).unwrap(),
        json!({"network": "default", "socket": listen(), "mtu": 1500})
    );
    let uplink = spec(json!({"to": {"kind": "bridge", "bridge": "br0"}})).completed(&name("up")).unwrap();
    let to = json!({"kind": "bridge", "bridge": "br0", "tap": "vhd-up"});
    assert_eq!(serde_json::to_value(&uplink).unwrap(), json!({"network": "default", "to": to, "mtu": 1500}));
    let again = uplink.clone().completed(&name("up")).unwrap();
    assert_eq!(again, uplink);
}

#[test]
fn a_tap_in_open_vswitch_is_an_uplink_or_a_guests_card() {
    let uplink = spec(json!({"to": {"kind": "ovs", "bridge": "br-int"}})).completed(&name("up")).unwrap();
    let to = json!({"kind": "ovs", "bridge": "br-int", "tap": "vhd-up"});
    assert_eq!(serde_json::to_value(&uplink).unwrap(), json!({"network": "default", "to": to, "mtu": 1500}));
    assert!(uplink.is_uplink());
    let to = json!({"kind": "ovs", "bridge": "br-int", "tap": "tap1", "datapath_type": "netdev", "isolated": true,
                    "iface_id": "lsp 1", "guest": {"make_tap": true, "make_port": false}});
    let card = spec(json!({"to": to, "mac": "52:54:00:00:00:01"})).completed(&name("vm1")).unwrap();
    assert!(!card.is_uplink() && card.network.is_none());
    assert_eq!(serde_json::to_value(&card).unwrap()["to"], to);
    let named = spec(json!({"network": "blue", "to": to})).completed(&name("vm1"));
    assert!(matches!(named, Err(SpecError::NetworkOfItsOwn(_))));
}

#[test]
fn what_was_decided_for_a_plug_stays_when_it_is_asked_for_again() {
    let asked = |to: Value| spec(json!({"socket": listen(), "to": to})).completed(&name("vm1")).unwrap();
    let record =
        asked(json!({"kind": "ovs", "bridge": "br0", "attach": "vhost_user", "socket": "/run/o/vhd-vm1",
                              "isolated": true}));
    let again = asked(json!({"kind": "ovs", "bridge": "br0"})).keeping(&record);
    assert_eq!(again, record);
    let otherwise = asked(json!({"kind": "ovs", "bridge": "br0", "attach": "tap"})).keeping(&record);
    assert!(otherwise.differences(&record).contains(&"to.attach".to_owned()));
    assert_eq!(record.sockets().count(), 2);
    // A socket of the switch says how it is attached.
    let named = asked(json!({"kind": "ovs", "bridge": "br0", "socket": "/run/o/vhd-vm1", "isolated": true}));
    assert_eq!(named, record);

    // One that gets a bridge of its own is made by us in any case.
    let card = |port_bridge: bool| {
        let guest = json!({"make_tap": true, "make_port": false});
        let to = json!({"kind": "ovs", "bridge": "br0", "guest": guest, "per_port_bridge": port_bridge});
        let spec = spec(json!({"to": to})).completed(&name("vm1")).unwrap();
        spec.clone().keeping(&spec).kernel_guest().unwrap()
    };
    assert_eq!(card(true), KernelGuest { make_tap: true, make_port: true });
    assert_eq!(card(false), KernelGuest { make_tap: false, make_port: false });
}

#[test]
fn a_port_in_a_bridge_of_its_own_is_joined_by_two_patch_ports() {
    let to = json!({"kind": "ovs", "bridge": "br-int", "tap": "tap1", "per_port_bridge": true});
    let ports = |id: &str| {
        let spec = spec(json!({"to": to})).completed(&name(id)).unwrap();
        let ports = spec.ovs().unwrap().ports(&name(id));
        ports
            .into_iter()
            .map(|port| format!("{} {} {:?}", port.bridge, port.name, port.peer))
            .collect::<Vec<_>>()
    };
    let id = "dc065497-3c8d-4f44-8fb4-e1d33c16a536";
    let own = "pbdc065497-3c8";
    assert_eq!(
        ports(id),
        [
            format!("{own} tap1 None"),
            format!("{own} pbp{id} Some(\"ibp{id}\")"),
            format!("br-int ibp{id} Some(\"pbp{id}\")")
        ]
    );
    let own = |id: &str| ports(id)[0].split(' ').next().unwrap().to_owned();
    assert_ne!(own("network-port-000001"), own("network-port-000002"));
}

#[test]
fn a_bridge_has_an_uplink_and_a_hybrid_plug_a_pair() {
    let to =
        json!({"kind": "bridge", "bridge": "br0", "guest": true, "uplink": {"device": "eth1", "vlan": 4094}});
    let card = spec(json!({"to": to})).completed(&name("vm1")).unwrap();
    assert!(!card.is_uplink() && card.network.is_none());
    assert_eq!(serde_json::to_value(&card).unwrap()["to"], to, "the VMM names its TAP");
    let Some(To::Bridge(Bridge { uplink: Some(uplink), .. })) = card.to else { panic!("no uplink") };
    assert_eq!(uplink.port().as_str(), "vlan4094");
    assert_eq!(Uplink { vlan: None, ..uplink }.port().as_str(), "eth1");
    let vlan = json!({"to": {"kind": "bridge", "bridge": "br0", "uplink": {"device": "eth1", "vlan": 4095}}});
    assert_eq!(spec(vlan).completed(&name("vm1")).unwrap_err().field(), Some("spec.to.uplink.vlan"));

    let ovs = Ovs { hybrid: Some("qbr0".parse().unwrap()), ..Ovs::new("br-int".parse().unwrap()) };
    let id = name("dc065497-3c8d-4f44-8fb4-e1d33c16a536");
    let pair = ovs.veth(&id).unwrap().map(String::from);
    assert_eq!(pair, ["qvbdc065497-3c", "qvodc065497-3c"]);
    assert_eq!(ovs.port(&id).as_str(), "qvodc065497-3c");
    assert_eq!(ovs.veth(&name("a")).unwrap().map(String::from), ["qvba", "qvoa"]);
    assert_ne!(ovs.port(&name("network-port-000001")), ovs.port(&name("network-port-000002")));
    for joined in [json!({"attach": "vhost_user"}), json!({"socket": "/run/o/x"})] {
        let mut to = json!({"kind": "ovs", "bridge": "br-int", "hybrid": "qbr0"});
        to.as_object_mut().unwrap().extend(joined.as_object().unwrap().clone());
        let refused = spec(json!({"socket": listen(), "to": to})).completed(&name("vm1")).unwrap_err();
        assert!(matches!(refused, SpecError::HybridSocket), "{refused}");
    }
    assert_eq!(Ovs { hybrid: None, ..ovs }.port(&id), tap_name(&id));
}

#[test]
fn a_macvtap_or_a_tap_may_be_a_guests_card() {
    let to = json!({"kind": "macvtap", "device": "eth1"});
    let joined = spec(json!({"socket": listen(), "to": to})).completed(&name("vm1")).unwrap();
    let whole = json!({"kind": "macvtap", "device": "eth1", "mode": "bridge", "tap": "vhd-vm1"});
    assert_eq!(serde_json::to_value(&joined).unwrap()["to"], whole);
    let uplink = |to: &Value| spec(json!({"to": to})).completed(&name("up"));
    assert!(matches!(uplink(&to), Err(SpecError::MacvtapUplink(_))));
    let alone = json!({"kind": "macvtap", "device": "eth1", "mode": "passthrough"});
    assert!(uplink(&alone).unwrap().is_uplink());
    for to in [
        json!({"kind": "macvtap", "device": "eth1", "mode": "vepa", "guest": true}),
        json!({"kind": "tap", "tap": "tap1", "guest": true}),
    ] {
        let card = spec(json!({"to": to, "mac": "52:54:00:00:00:01"})).completed(&name("vm1")).unwrap();
        assert!(!card.is_uplink() && card.network.is_none() && card.kernel_guest().is_some());
        let two = spec(json!({"to": to, "socket": listen()})).completed(&name("vm1"));
        assert!(matches!(two, Err(SpecError::TwoCards)));
    }
}

#[test]
fn a_joined_plug_is_a_network_of_its_own() {
    let joined = json!({"socket": listen(), "to": {"kind": "tap", "tap": "tap0"}});
    let joined = spec(joined).completed(&name("vm1")).unwrap();
    assert_eq!(joined.network_of(&name("vm1")), "plug:vm1");
    let named = json!({"network": "blue", "socket": listen(), "to": {"kind": "tap", "tap": "tap0"}});
    assert!(matches!(spec(named).completed(&name("vm1")), Err(SpecError::NetworkOfItsOwn(_))));
}

#[test]
fn impossible_specs_are_refused() {
    let refused = |value| spec(value).completed(&name("vm1")).unwrap_err();
    assert!(matches!(refused(json!({})), SpecError::Empty));
    let card = json!({"make_tap": true, "make_port": true});
    let two = json!({"socket": listen(), "to": {"kind": "ovs", "bridge": "br-int", "guest": card.clone()}});
    assert_eq!(refused(two).field(), Some("spec.socket"));
    let ovs = |more: Value| {
        let mut to = json!({"kind": "ovs", "bridge": "br-int"});
        to.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        json!({"to": to})
    };
    let attached = json!({"guest": card, "attach": "tap"});
    assert_eq!(refused(ovs(attached)).field(), Some("spec.to.attach"));
    for stray in [json!({"guest": card, "socket": "/run/o"}), json!({"attach": "tap", "socket": "/run/o"})] {
        assert_eq!(refused(ovs(stray)).field(), Some("spec.to.socket"));
    }
    let uplink = json!({"kind": "tap", "tap": "tap0"});
    let with_mac = json!({"to": uplink, "mac": "52:54:00:00:00:01"});
    assert!(matches!(refused(with_mac), SpecError::MacWithoutGuest(_)));
    let front = |more: Value| {
        let mut spec = json!({"socket": {"role": "frontend_connect", "path": "/run/x.sock"}});
        spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        spec
    };
    let with_mac = front(json!({"mac": "52:54:00:00:00:01"}));
    assert!(matches!(refused(with_mac), SpecError::MacWithoutGuest(_)));
    assert_eq!(refused(front(json!({"queues": 129}))).field(), Some("spec.queues"));
    let policy = json!({"addresses": ["192.0.2.7"]});
    assert!(matches!(refused(front(json!({"anti_spoof": policy}))), SpecError::PolicyWithoutGuest));
    assert!(matches!(refused(json!({"to": uplink, "anti_spoof": policy})), SpecError::PolicyWithoutGuest));
    let guest =
        |policy: &Value| json!({"socket": listen(), "mac": "52:54:00:00:00:01", "anti_spoof": policy});
    assert!(spec(guest(&policy)).completed(&name("vm1")).unwrap().policy().is_some());
    let many = json!({"addresses": vec!["192.0.2.7"; 65]});
    assert_eq!(refused(guest(&many)).field(), Some("spec.anti_spoof.addresses"));
    assert!(matches!(refused(json!({"socket": listen(), "anti_spoof": {}})), SpecError::PolicyWithoutMac));
    for (field, value) in [("mtu", 67), ("mtu", 9217), ("queues", 0), ("queues", 129)] {
        let error = refused(json!({"socket": listen(), field: value}));
        assert_eq!(error.field(), Some(format!("spec.{field}").as_str()));
    }
}

#[test]
fn unknown_fields_are_refused_at_every_level() {
    let bad = [
        json!({"sockets": listen()}),
        json!({"socket": {"role": "listen", "path": "/x", "mode": "server"}}),
        json!({"to": {"kind": "tap", "tap": "t", "bridge": "b"}}),
        json!({"to": {"kind": "macvtap", "tap": "t"}}),
        json!({"to": {"kind": "macvtap", "device": "eth0", "mode": "private"}}),
        json!({"socket": {"role": "server", "path": "/x"}}),
    ];
    for bad in bad {
        assert!(serde_json::from_value::<PlugSpec>(bad.clone()).is_err(), "{bad}");
    }
}

#[test]
fn tap_names_are_stable_short_and_distinct() {
    assert_eq!(tap_name(&name("uplink")).as_str(), "vhd-uplink");
    let long = tap_name(&name("dc065497-3c8d-4f44-8fb4-e1d33c16a536"));
    assert_eq!(long.as_str(), "vhd45ab527dcab4");
    assert_ne!(long, tap_name(&name("dc065497-3c8d-4f44-8fb4-e1d33c16a537")));
}

#[test]
fn differences_are_named_by_their_path() {
    let id = name("vm1");
    let a = spec(json!({"socket": listen(), "mtu": 1500})).completed(&id).unwrap();
    let b = spec(json!({"socket": {"role": "connect", "path": "/run/x.sock"}, "mtu": 9000, "queues": 2}));
    assert_eq!(a.differences(&b.completed(&id).unwrap()), ["mtu", "queues", "socket.role"]);
    assert!(a.differences(&a).is_empty());
}
