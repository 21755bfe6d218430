//! Promises that hold for any input: what the tables allow survives a round trip, and nothing panics.

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use serde_json::{Map, Value as Json, json};
use vif::schema::{CLASSES, Class, FieldSpec, Kind};
use vif::{Document, Vif, decode, encode};

/// A field's value as os-vif writes it.
fn canonical(kind: &'static Kind) -> BoxedStrategy<Json> {
    match *kind {
        Kind::Text | Kind::Uuid => "\\PC{0,12}".prop_map(Json::from).boxed(),
        Kind::Mac => any::<[u8; 6]>()
            .prop_map(|[a, b, c, d, e, f]| json!(format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")))
            .boxed(),
        Kind::Pci => (any::<u16>(), any::<u8>(), 0..32u8, 0..8u8)
            .prop_map(|(domain, bus, device, function)| {
                json!(format!("{domain:04x}:{bus:02x}:{device:02x}.{function}"))
            })
            .boxed(),
        Kind::Integer => any::<i64>().prop_map(Json::from).boxed(),
        Kind::Boolean => any::<bool>().prop_map(Json::from).boxed(),
        Kind::Enum(words) => select(words).prop_map(Json::from).boxed(),
        Kind::Ip => select(&["192.0.2.1", "::", "::1.2.3.4", "::ffff:1.2.3.4", "2001:db8::1"][..])
            .prop_map(Json::from)
            .boxed(),
        Kind::IpNetwork => {
            select(&["192.0.2.7/24", "0.0.0.0/0", "2001:db8::/128"][..]).prop_map(Json::from).boxed()
        }
        Kind::List(element) => vec(canonical(element), 0..3).prop_map(Json::from).boxed(),
        Kind::Object(class) => envelope(class),
        Kind::Subclass(base) => {
            let fitting: Vec<_> = CLASSES.into_iter().filter(|class| class.is_a(base)).collect();
            select(fitting).prop_flat_map(envelope).boxed()
        }
    }
}

/// A field left out, null if it may be, or with a value. `Network`'s constructor leaves none of its own out.
fn field(class: &Class, field: &'static FieldSpec) -> BoxedStrategy<Option<Json>> {
    let constructed = ["subnets", "multi_host", "should_provide_bridge", "should_provide_vlan", "mtu"];
    let unset = if class.name == "Network" && constructed.contains(&field.name) { 0 } else { 1 };
    prop_oneof![
        unset => Just(None),
        u32::from(field.nullable) => Just(Some(Json::Null)),
        3 => canonical(&field.kind).prop_map(Some),
    ]
    .boxed()
}

/// An envelope without `changes`: those of nested objects show in the outer ones when written.
fn envelope(class: &'static Class) -> BoxedStrategy<Json> {
    let fields: Vec<_> = class.fields().map(|spec| (Just(spec.name), field(class, spec))).collect();
    let version = (0..=class.version.minor).prop_map(|minor| format!("1.{minor}"));
    (fields, version)
        .prop_map(move |(fields, version)| {
            let set = fields.into_iter().filter_map(|(name, json)| Some((name.to_owned(), json?)));
            json!({
                "versioned_object.name": class.name,
                "versioned_object.namespace": "os_vif",
                "versioned_object.version": version,
                "versioned_object.data": Map::from_iter(set),
            })
        })
        .boxed()
}

fn any_envelope() -> impl Strategy<Value = Json> {
    select(&CLASSES[..]).prop_flat_map(envelope)
}

/// Any JSON, rich in names that mean something here.
fn any_json() -> impl Strategy<Value = Json> {
    let keys =
        ["name", "namespace", "version", "data", "changes"].map(|key| format!("versioned_object.{key}"));
    let classes = CLASSES.into_iter().map(|class| class.name);
    let fields = CLASSES.into_iter().flat_map(Class::fields).map(|field| field.name);
    let others = ["os_vif", "1.0", "1.1", "::/0", "vif", "instance_info"];
    let words: Vec<String> =
        keys.into_iter().chain(classes.chain(fields).chain(others).map(String::from)).collect();
    let word = prop_oneof![4 => select(words), 1 => any::<String>()];
    let leaf = prop_oneof![
        Just(Json::Null),
        any::<bool>().prop_map(Json::from),
        any::<i64>().prop_map(Json::from),
        any::<u64>().prop_map(Json::from),
        any::<f64>().prop_map(Json::from),
        word.clone().prop_map(Json::from),
    ];
    leaf.prop_recursive(20, 64, 5, move |inner| {
        prop_oneof![
            vec(inner.clone(), 0..5).prop_map(Json::from),
            vec((word.clone(), inner), 0..6).prop_map(|entries| Json::Object(entries.into_iter().collect())),
        ]
    })
}

/// Puts `value` in the place of the `nth` value of a tree, counted from the leaves of its first branch.
fn replace(tree: &mut Json, nth: &mut usize, value: &Json) {
    match tree {
        Json::Array(items) => items.iter_mut().for_each(|item| replace(item, nth, value)),
        Json::Object(map) => map.iter_mut().for_each(|(_, item)| replace(item, nth, value)),
        _ => {}
    }
    if *nth == 0 {
        *tree = value.clone();
    }
    *nth = nth.wrapping_sub(1);
}

proptest! {
    #[test]
    fn what_the_tables_allow_survives_a_round_trip(envelope in any_envelope()) {
        let object = decode(&envelope).unwrap();
        prop_assert_eq!(encode(&object), envelope);
    }

    #[test]
    fn every_vif_has_a_typed_view(envelope in any_envelope()) {
        let object = decode(&envelope).unwrap();
        prop_assert_eq!(Vif::try_from(&object).is_ok(), object.class().name.starts_with("VIF")
            && !object.class().name.starts_with("VIFPortProfile"));
    }

    #[test]
    fn a_damaged_object_is_refused_or_written_again_the_same(
        envelope in any_envelope(), nth in 0..40usize, value in any_json(),
    ) {
        let mut damaged = envelope;
        replace(&mut damaged, &mut nth.clone(), &value);
        if let Ok(object) = decode(&damaged) {
            let written = encode(&object);
            prop_assert_eq!(encode(&decode(&written).unwrap()), written);
        }
    }

    #[test]
    fn no_document_panics(json in any_json(), cut in any::<usize>()) {
        let text = json.to_string().into_bytes();
        let _ = Document::parse(&text);
        let _ = Document::parse(&text[..cut % (text.len() + 1)]);
        let _ = Document::decode(&json);
        let _ = Document::decode(&json!({ "vif": json })).and_then(|document| document.plug());
        let _ = decode(&json);
    }
}
