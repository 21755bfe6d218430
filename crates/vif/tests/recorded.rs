//! What os-vif did, as recorded in testdata/ (see README.md there), and what this crate does with the same input.

use std::collections::BTreeMap;

use serde_json::{Value as Json, json};
use vif::schema::{CLASSES, Class, FieldSpec, Kind};
use vif::{decode, encode};

fn lines(text: &str) -> impl Iterator<Item = Json> {
    text.lines().map(|line| line.parse().expect("testdata is JSON"))
}

/// `changes` comes from a set: its order means nothing.
fn sort_changes(mut json: Json) -> Json {
    match &mut json {
        Json::Array(items) => items.iter_mut().for_each(|item| *item = sort_changes(item.take())),
        Json::Object(map) => {
            map.iter_mut().for_each(|(_, item)| *item = sort_changes(item.take()));
            if let Some(Json::Array(changes)) = map.get_mut("versioned_object.changes") {
                changes.sort_by_key(Json::to_string);
            }
        }
        _ => {}
    }
    json
}

/// Checks our verdict on a case's `input` against os-vif's, `ok` or `exception`.
fn check(case: &Json) {
    let ours = decode(&case["input"]);
    match (&ours, case.get("ok"), case.get("exception")) {
        (Ok(object), Some(theirs), None) => {
            assert_eq!(sort_changes(encode(object)), sort_changes(theirs.clone()), "{case}");
        }
        (Err(error), None, Some(theirs)) => assert_eq!(error.cause.exception(), theirs, "{case}: {error}"),
        (Err(_), None, None) if case["stricter"] == true => {}
        _ => panic!("{case}\nours: {ours:?}"),
    }
}

#[test]
fn every_sample_is_written_again_as_it_was() {
    let samples = lines(include_str!("../testdata/samples.jsonl"));
    let objects =
        samples.map(|sample| sample["object"].clone()).chain(lines(include_str!("../testdata/random.jsonl")));
    let mut count = 0;
    for object in objects {
        let decoded = decode(&object).unwrap_or_else(|error| panic!("{object}: {error}"));
        assert_eq!(sort_changes(encode(&decoded)), sort_changes(object));
        count += 1;
    }
    assert_eq!(count, 41 + 93);
}

#[test]
fn every_case_is_decided_as_os_vif_decided_it() {
    let recorded = include_str!("../testdata/recorded.jsonl");
    let cases = include_str!("../testdata/cases.jsonl");
    lines(recorded).chain(lines(cases)).for_each(|case| check(&case));
}

#[test]
fn the_tables_are_os_vifs() {
    let theirs: Json = serde_json::from_str(include_str!("../testdata/schema.json")).unwrap();
    let ours: BTreeMap<&str, Json> = CLASSES.iter().map(|class| (class.name, describe(class))).collect();
    assert_eq!(json!(ours), theirs);
}

fn describe(class: &'static Class) -> Json {
    let bases: Vec<&str> = class.lineage().skip(1).map(|base| base.name).collect();
    let fields: BTreeMap<&str, Json> =
        class.fields().map(|field| (field.name, describe_field(field))).collect();
    json!({ "version": class.version.to_string(), "bases": bases, "fields": fields })
}

fn describe_field(field: &FieldSpec) -> Json {
    let mut json = json!({ "type": describe_kind(&field.kind), "nullable": field.nullable });
    if let Some(default) = field.default {
        json["default"] = default.into();
    }
    json
}

fn describe_kind(kind: &Kind) -> Json {
    match kind {
        Kind::Text => json!("String"),
        Kind::Uuid => json!("UUID"),
        Kind::Mac => json!("MACAddress"),
        Kind::Pci => json!("PCIAddress"),
        Kind::Integer => json!("Integer"),
        Kind::Boolean => json!("Boolean"),
        Kind::Enum(words) => json!({ "enum": words }),
        Kind::Ip => json!("IPAddress"),
        Kind::IpNetwork => json!("IPNetwork"),
        Kind::List(element) => json!({ "list": describe_kind(element) }),
        Kind::Object(class) => json!({ "object": class.name }),
        Kind::Subclass(class) => json!({ "subclass": class.name }),
    }
}
