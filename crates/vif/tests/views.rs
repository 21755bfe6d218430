//! The typed views have the fields that the tables have, in their three states.

use serde_json::{Value as Json, json};
use vif::profile::{FpBridgeProfile, FpTapProfile, OpenVSwitchProfile, RepresentorOffload};
use vif::schema::{CLASSES, Class, Kind, PROFILE_BASE, VIF_BASE};
use vif::vif::{VhostUserMode, VhostUserVif};
use vif::{DatapathOffload, Field, MacAddress, ProfileKind, Vif, VifKind, decode};

fn envelope(class: &str, data: &Json) -> Json {
    let version = Class::named(class).expect("a class").version.to_string();
    json!({
        "versioned_object.name": class,
        "versioned_object.namespace": "os_vif",
        "versioned_object.version": version,
        "versioned_object.data": data,
    })
}

/// An object with every field set. A field that takes several classes gets the one in `choice`, if it may.
fn full(class: &'static Class, choice: &'static Class) -> Json {
    fn value(kind: &Kind, choice: &'static Class) -> Json {
        match kind {
            Kind::Text | Kind::Uuid => json!("text"),
            Kind::Mac => json!("02:00:00:00:00:01"),
            Kind::Pci => json!("0000:00:00.0"),
            Kind::Integer => json!(1),
            Kind::Boolean => json!(true),
            Kind::Enum(words) => json!(words[0]),
            Kind::Ip => json!("::1"),
            Kind::IpNetwork => json!("::/64"),
            Kind::List(element) => json!([value(element, choice)]),
            Kind::Object(class) => full(class, choice),
            Kind::Subclass(base) => full(if choice.is_a(base) { choice } else { base }, choice),
        }
    }
    let data: serde_json::Map<_, _> =
        class.fields().map(|field| (field.name.to_owned(), value(&field.kind, choice))).collect();
    envelope(class.name, &data.into())
}

/// All field names in an envelope and those in it.
fn field_names(json: &Json, names: &mut Vec<String>) {
    match json {
        Json::Object(map) => map.iter().for_each(|(key, inner)| {
            let is_own = !key.starts_with("versioned_object.") && key != "objects";
            names.extend(is_own.then(|| key.clone()));
            field_names(inner, names);
        }),
        Json::Array(items) => items.iter().for_each(|item| field_names(item, names)),
        _ => {}
    }
}

#[test]
fn every_field_of_every_vif_class_profile_and_offload_is_in_its_view() {
    for class in CLASSES.into_iter().filter(|class| class.is_a(&VIF_BASE)) {
        for choice in CLASSES {
            let json = full(class, choice);
            let view = format!("{:?}", Vif::try_from(&decode(&json).unwrap()).unwrap());
            assert!(!view.contains("Unset") && !view.contains("Null"), "{view}");
            let mut names = Vec::new();
            field_names(&json, &mut names);
            for name in names {
                assert!(view.contains(&format!("{name}: Value(")), "{name} is not in {view}");
            }
        }
    }
}

#[test]
fn every_class_has_a_kind_of_its_own() {
    let vif = |json: &Json| Vif::try_from(&decode(json).unwrap()).unwrap();
    let vifs = CLASSES.into_iter().filter(|class| class.is_a(&VIF_BASE));
    let kinds: Vec<_> = vifs.map(|class| vif(&envelope(class.name, &json!({}))).kind).collect();
    let profiles = CLASSES.into_iter().filter(|class| class.is_a(&PROFILE_BASE));
    let profile_kinds: Vec<_> = profiles
        .map(|class| vif(&envelope("VIFBase", &json!({ "port_profile": envelope(class.name, &json!({})) }))))
        .map(|vif| vif.port_profile.into_value().unwrap().kind)
        .collect();
    assert_eq!((kinds.len(), profile_kinds.len()), (8, 9));
    assert!((1..8).all(|index| !kinds[..index].contains(&kinds[index])), "{kinds:?}");
    assert!((1..9).all(|index| !profile_kinds[..index].contains(&profile_kinds[index])), "{profile_kinds:?}");
}

#[test]
fn a_vhost_user_vif_of_nova_reads_as_it_says() {
    let network = envelope("Network", &json!({"id": "n", "mtu": 9000, "bridge_interface": null}));
    let offload = envelope("DatapathOffloadRepresentor", &json!({"representor_name": "eth5"}));
    let ovs = envelope(
        "VIFPortProfileOpenVSwitch",
        &json!({"interface_id": "i", "datapath_type": "netdev", "datapath_offload": offload}),
    );
    let json = envelope(
        "VIFVHostUser",
        &json!({"id": "v", "address": "FA-16-3E-00-00-01", "network": network, "plugin": "noop", "active": false,
            "path": "/run/v.sock", "mode": "server", "port_profile": ovs}),
    );
    let vif = Vif::try_from(&decode(&json).unwrap()).unwrap();

    assert_eq!(vif.class, "VIFVHostUser");
    assert_eq!(vif.address, Field::Value(MacAddress([0xfa, 0x16, 0x3e, 0, 0, 1])));
    assert_eq!((vif.active, vif.preserve_on_delete), (Field::Value(false), Field::Unset));
    let network = vif.network.value().unwrap();
    assert_eq!((&network.mtu, &network.bridge_interface), (&Field::Value(9000), &Field::Null));
    assert_eq!((&network.bridge, &network.subnets), (&Field::Unset, &Field::Value(vec![])));
    assert_eq!(network.multi_host, Field::Value(false), "filled by the constructor");
    let VifKind::VhostUser(VhostUserVif { vif_name, path, mode }) = vif.kind else {
        panic!("{:?}", vif.kind)
    };
    assert_eq!((vif_name.is_set(), path.value().unwrap().as_str()), (false, "/run/v.sock"));
    assert_eq!(mode, Field::Value(VhostUserMode::Server));
    let profile = vif.port_profile.into_value().unwrap();
    let ProfileKind::OpenVSwitch(OpenVSwitchProfile { interface_id, create_port, .. }) = profile.kind else {
        panic!("{:?}", profile.kind)
    };
    assert_eq!((interface_id.into_value().as_deref(), create_port), (Some("i"), Field::Unset));
    let DatapathOffload::Representor(RepresentorOffload { representor_name, .. }) =
        profile.datapath_offload.into_value().unwrap()
    else {
        panic!("not a representor")
    };
    assert_eq!(representor_name.value().unwrap(), "eth5");
}

#[test]
fn a_tap_profile_reads_its_address_in_three_states() {
    let mac_address = |data: Json| {
        let vif =
            envelope("VIFVHostUser", &json!({ "port_profile": envelope("VIFPortProfileFPTap", &data) }));
        let profile = Vif::try_from(&decode(&vif).unwrap()).unwrap().port_profile.into_value().unwrap();
        let ProfileKind::FpTap(FpTapProfile { mac_address }) = profile.kind else {
            panic!("{:?}", profile.kind)
        };
        mac_address
    };
    assert_eq!(mac_address(json!({})), Field::Unset);
    assert_eq!(mac_address(json!({ "mac_address": null })), Field::Null);
    let address = mac_address(json!({ "mac_address": "02:00:00:00:00:07" }));
    assert_eq!(address, Field::Value(MacAddress([2, 0, 0, 0, 0, 7])));
}

#[test]
fn a_bridge_profile_names_its_bridge() {
    let profile = envelope("VIFPortProfileFPBridge", &json!({ "bridge_name": "brq0" }));
    let vif = envelope("VIFVHostUser", &json!({ "port_profile": profile }));
    let profile = Vif::try_from(&decode(&vif).unwrap()).unwrap().port_profile.into_value().unwrap();
    let bridge = FpBridgeProfile { bridge_name: Field::Value("brq0".into()) };
    assert_eq!((profile.class, profile.kind), ("VIFPortProfileFPBridge", ProfileKind::FpBridge(bridge)));
}

#[test]
fn an_empty_list_object_reads_as_no_subnets() {
    let network = envelope("Network", &json!({ "subnets": envelope("SubnetList", &json!({})) }));
    let vif = decode(&envelope("VIFGeneric", &json!({ "network": network }))).unwrap();
    assert_eq!(Vif::try_from(&vif).unwrap().network.value().unwrap().subnets, Field::Value(vec![]));
}
