//! What a file or request may hold, and what it may not.

use serde_json::{Value as Json, json};
use vif::schema::Class;
use vif::{Document, Field, InstanceInfo};

fn envelope(class: &str, data: &Json) -> Json {
    let version = Class::named(class).expect("a class").version.to_string();
    json!({
        "versioned_object.name": class,
        "versioned_object.namespace": "os_vif",
        "versioned_object.version": version,
        "versioned_object.data": data,
    })
}

#[test]
fn a_plug_takes_a_vif_and_an_instance_and_nothing_else() {
    let vif = envelope("VIFVHostUser", &json!({ "id": "v" }));
    let instance = envelope("InstanceInfo", &json!({ "uuid": "" }));
    let plug = |json: Json| Document::parse(json.to_string().as_bytes()).and_then(|document| document.plug());

    assert_eq!(plug(vif.clone()).unwrap().instance_info, None);
    assert_eq!(plug(json!({ "vif": vif })).unwrap(), plug(vif.clone()).unwrap());
    assert_eq!(plug(json!({ "vif": vif, "instance_info": null })).unwrap().instance_info, None);
    let both = plug(json!({ "vif": vif, "instance_info": instance })).unwrap();
    let expected = InstanceInfo { uuid: Field::Value(String::new()), ..InstanceInfo::default() };
    assert_eq!((both.vif.id, both.instance_info), (Field::Value("v".into()), Some(expected)));

    let refused = [
        (
            json!([]),
            "not an os-vif document: it must be an os-vif object or {\"vif\": …, \"instance_info\": …}",
        ),
        (
            json!({ "name": "x" }),
            "not an os-vif document: it must be an os-vif object or {\"vif\": …, \"instance_info\": …}",
        ),
        (
            json!({ "vif": vif, "wait": 1 }),
            "key \"wait\" is unknown: beside vif there may be instance_info only",
        ),
        (json!({ "vif": 5 }), "vif: object: 5 is not an envelope"),
        (
            json!({ "vif": vif, "instance_info": {} }),
            "instance_info: object: key versioned_object.namespace is missing",
        ),
        (
            json!({ "vif": instance }),
            "an object of class InstanceInfo stands where one of class VIFBase must be",
        ),
        (
            json!({ "vif": vif, "instance_info": vif }),
            "an object of class VIFVHostUser stands where one of class InstanceInfo must be",
        ),
        (instance, "an object of class InstanceInfo stands where one of class VIFBase must be"),
        (json!({ "versioned_object.name": "x" }), "object: key versioned_object.namespace is missing"),
    ];
    for (json, message) in refused {
        assert_eq!(plug(json.clone()).unwrap_err().to_string(), message, "{json}");
    }
    assert!(Document::parse(b"{").is_err());
}

#[test]
fn a_document_is_written_in_the_form_it_was_read() {
    let vif = envelope("VIFVHostUser", &json!({ "id": "v" }));
    let instance = envelope("InstanceInfo", &json!({}));
    for json in
        [vif.clone(), instance.clone(), json!({"vif": vif}), json!({"vif": vif, "instance_info": instance})]
    {
        assert_eq!(Document::decode(&json).unwrap().encode(), json);
    }
}

#[test]
fn other_documents_are_told_apart() {
    assert!(
        Document::is_os_vif(&json!({ "vif": 5 }))
            && Document::is_os_vif(&json!({ "versioned_object.data": 5 }))
    );
    assert!(!Document::is_os_vif(&json!({ "listen": "/x" })) && !Document::is_os_vif(&json!("vif")));
}
