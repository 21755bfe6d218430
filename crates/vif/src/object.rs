//! The envelope: an object of any class, read and written by the tables.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value as Json};

use crate::error::{Cause, DecodeError, excerpt};
use crate::field::Field;
use crate::json;
use crate::schema::{self, Class};
use crate::value::Value;

const NAME: &str = "versioned_object.name";
const NAMESPACE: &str = "versioned_object.namespace";
const VERSION: &str = "versioned_object.version";
const DATA: &str = "versioned_object.data";
const CHANGES: &str = "versioned_object.changes";

/// The only namespace.
const OS_VIF: &str = "os_vif";

/// An object of any class.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Object {
    class: &'static Class,
    /// The sender's label.
    version: String,
    /// The fields that are set; `None` is null.
    fields: BTreeMap<&'static str, Option<Value>>,
    /// The fields that the sender says it changed, set or not.
    changes: BTreeSet<&'static str>,
}

/// Reads an object from its envelope.
///
/// # Errors
/// What os-vif would refuse, and what the crate's documentation lists as refused beyond that.
pub fn decode(json: &Json) -> Result<Object, DecodeError> {
    json::check_limits(json).map_err(|e| e.within("object"))?;
    let name =
        json.get(NAME).and_then(Json::as_str).and_then(Class::named).map_or("object", |class| class.name);
    decode_envelope(json, |_| Ok(())).map_err(|e| e.within(name))
}

/// Writes an object into its envelope, under the version it came with.
pub fn encode(object: &Object) -> Json {
    let data = object.fields.iter().map(|(name, value)| {
        let json = value.as_ref().map_or(Json::Null, Value::encode);
        ((*name).to_owned(), json)
    });
    let mut envelope = Map::from_iter([
        (NAME.to_owned(), object.class.name.into()),
        (NAMESPACE.to_owned(), OS_VIF.into()),
        (VERSION.to_owned(), object.version.as_str().into()),
        (DATA.to_owned(), Json::Object(data.collect())),
    ]);
    let changes: Vec<&str> = object.changed_fields().collect();
    if !changes.is_empty() {
        envelope.insert(CHANGES.to_owned(), changes.into());
    }
    Json::Object(envelope)
}

/// Whether `json` is meant to be an envelope.
pub(crate) fn is_envelope(json: &Map<String, Json>) -> bool {
    [NAME, NAMESPACE, VERSION, DATA].iter().any(|key| json.contains_key(*key))
}

/// Reads a nested object, which must be of `class`, or of one that extends it if `subclasses` are taken.
pub(crate) fn decode_as(json: &Json, class: &'static Class, subclasses: bool) -> Result<Object, DecodeError> {
    // The class is checked before the fields are read: what is refused anyway cannot nest for ever.
    decode_envelope(json, |found| {
        let fits = if subclasses { found.is_a(class) } else { found == class };
        if fits { Ok(()) } else { Err(Cause::WrongClass { found: found.name, expected: class.name }) }
    })
}

fn decode_envelope(
    json: &Json,
    check: impl FnOnce(&'static Class) -> Result<(), Cause>,
) -> Result<Object, DecodeError> {
    let Json::Object(envelope) = json else { return Err(Cause::malformed(json, "an envelope").into()) };
    let key = |name: &'static str| envelope.get(name).ok_or(Cause::MissingKey(name));

    // In os-vif's order, so that of two things wrong the same one is reported.
    let (namespace, name, version) = (key(NAMESPACE)?, key(NAME)?, key(VERSION)?);
    let class = class(namespace, name)?;
    check_version(class, version)?;
    check(class)?;
    let data = key(DATA)?;
    let Json::Object(data) = data else { return Err(Cause::malformed(data, "a map").at(DATA)) };

    let mut fields = constructed(class);
    for spec in class.fields() {
        if let Some(json) = data.get(spec.name) {
            fields.insert(spec.name, spec.coerce(json).map_err(|e| e.within(spec.name))?);
        }
    }
    let changes = changes(class, envelope.get(CHANGES)).map_err(|cause| cause.at(CHANGES))?;
    Ok(Object { class, version: version.as_str().unwrap_or_default().to_owned(), fields, changes })
}

fn class(namespace: &Json, name: &Json) -> Result<&'static Class, Cause> {
    let is_known = namespace.as_str() == Some(OS_VIF);
    let class = name.as_str().filter(|_| is_known).and_then(Class::named);
    class.ok_or_else(|| Cause::UnsupportedObject(format!("{}.{}", excerpt(namespace), excerpt(name))))
}

fn check_version(class: &'static Class, version: &Json) -> Result<(), Cause> {
    match version.as_str().and_then(|label| class.version.reads(label)) {
        Some(true) => Ok(()),
        Some(false) => Err(Cause::IncompatibleVersion {
            class: class.name,
            found: excerpt(version),
            supported: class.version,
        }),
        None => Err(Cause::InvalidVersion(excerpt(version))),
    }
}

/// The fields that an object's constructor sets. Only `Network`'s sets any.
fn constructed(class: &'static Class) -> BTreeMap<&'static str, Option<Value>> {
    if *class != schema::NETWORK {
        return BTreeMap::new();
    }
    let subnets = Object {
        class: &schema::SUBNET_LIST,
        version: schema::SUBNET_LIST.version.to_string(),
        fields: BTreeMap::from([("objects", Some(Value::List(Vec::new())))]),
        changes: BTreeSet::from(["objects"]),
    };
    BTreeMap::from([
        ("subnets", Some(Value::Object(subnets))),
        ("multi_host", Some(Value::Boolean(false))),
        ("should_provide_bridge", Some(Value::Boolean(false))),
        ("should_provide_vlan", Some(Value::Boolean(false))),
        ("mtu", None),
    ])
}

/// The names in `json` that are fields of the class; others are ignored.
fn changes(class: &'static Class, json: Option<&Json>) -> Result<BTreeSet<&'static str>, Cause> {
    let items = match json {
        None => return Ok(BTreeSet::new()),
        Some(Json::Array(items)) => items,
        Some(other) => return Err(Cause::malformed(other, "a list of field names")),
    };
    if let Some(item) = items.iter().find(|item| item.is_array() || item.is_object()) {
        return Err(Cause::malformed(item, "a field name"));
    }
    Ok(items
        .iter()
        .filter_map(Json::as_str)
        .filter_map(|name| class.field(name))
        .map(|spec| spec.name)
        .collect())
}

impl Object {
    /// Its class.
    pub fn class(&self) -> &'static Class {
        self.class
    }

    /// The version that its sender gave it; may be older than its class's.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// A field, by name. One that the class does not have is unset.
    pub fn field(&self, name: &str) -> Field<&Value> {
        match self.fields.get(name) {
            None => Field::Unset,
            Some(None) => Field::Null,
            Some(Some(value)) => Field::Value(value),
        }
    }

    /// The fields that are set and changed: those named by the sender and those whose object has changes itself.
    fn changed_fields(&self) -> impl Iterator<Item = &'static str> {
        self.fields.iter().filter_map(|(name, value)| {
            let is_changed = match value {
                Some(Value::Object(object)) => object.changed_fields().next().is_some(),
                _ => false,
            };
            (is_changed || self.changes.contains(name)).then_some(*name)
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// A VIF of that class and version with these fields.
    fn envelope(class: &str, version: &str, data: &Json) -> Json {
        json!({ NAME: class, NAMESPACE: OS_VIF, VERSION: version, DATA: data })
    }

    #[test]
    fn an_error_names_place_value_and_cause() {
        let vif = |data| envelope("VIFVHostUser", "1.1", &data);
        let network = |data| vif(json!({ "network": envelope("Network", "1.1", &data) }));
        let subnet = |data| {
            let list =
                envelope("SubnetList", "1.0", &json!({ "objects": [envelope("Subnet", "1.0", &data)] }));
            network(json!({ "subnets": list }))
        };
        let cases = [
            (vif(json!({"mode": "both"})), r#"VIFVHostUser.mode: "both" is not one of client, server"#),
            (
                vif(json!({"path": null})),
                "VIFVHostUser.path: null is not allowed: leave the field out or give it a value",
            ),
            (vif(json!({"active": "no"})), r#"VIFVHostUser.active: "no" is not true or false"#),
            (
                vif(json!({"port_profile": envelope("Network", "1.1", &json!({}))})),
                "VIFVHostUser.port_profile: an object of class Network is not of class VIFPortProfileBase",
            ),
            (
                vif(json!({"port_profile": envelope("VIFPortProfileOpenVSwitch", "1.5", &json!({}))})),
                "VIFVHostUser.port_profile: version \"1.5\" of VIFPortProfileOpenVSwitch is not supported, supported is \
                 1.4 or an older one of its major",
            ),
            (network(json!({"mtu": {}})), "VIFVHostUser.network.mtu: a map is not an integer of 64 bits"),
            (
                subnet(json!({"dns": ["::1", "x\n"]})),
                r#"VIFVHostUser.network.subnets.objects[0].dns[1]: "x\n" is not an IP address"#,
            ),
            (
                envelope("VIFTeleport", "1.0", &json!({})),
                r#"object: object type "os_vif"."VIFTeleport" is unknown: it must be a class of namespace os_vif"#,
            ),
            (
                envelope("VIFVHostUser", "x", &json!({})),
                r#"VIFVHostUser: "x" is not a version: it must be text of numbers with dots, as "1.1""#,
            ),
            (json!({}), "object: key versioned_object.namespace is missing"),
            (vif(json!([])), "VIFVHostUser.versioned_object.data: a list is not a map"),
        ];
        for (json, message) in cases {
            assert_eq!(decode(&json).unwrap_err().to_string(), message);
        }
    }

    #[test]
    fn a_long_value_is_shortened_in_messages() {
        let json = envelope("VIFVHostUser", "1.1", &json!({ "mode": "é".repeat(1000) }));
        let message = decode(&json).unwrap_err().to_string();
        assert!(message.contains("é\"… is not one of") && message.chars().count() < 130, "{message}");
    }

    #[test]
    fn limits_are_checked_wherever_the_tree_comes_from() {
        let deep = (0..1000).fold(json!(1), |inner, _| json!([inner]));
        let error = decode(&json!({ "unknown": deep })).unwrap_err();
        assert!(matches!(error.cause, Cause::Limit { limit: json::MAX_DEPTH, .. }), "{error}");
        let many = envelope("VIFVHostUser", "1.1", &json!({ "nope": vec![0; json::MAX_ITEMS + 1] }));
        assert_eq!(
            decode(&many).unwrap_err().to_string(),
            r#"object."versioned_object.data"."nope": more than 1024 items"#
        );
    }

    #[test]
    fn unset_null_and_value_stay_apart() {
        let object = decode(&envelope("VIFBase", "1.0", &json!({ "address": null, "id": "i" }))).unwrap();
        assert_eq!(object.field("address"), Field::Null);
        assert_eq!(object.field("id"), Field::Value(&Value::Text("i".into())));
        assert_eq!((object.field("plugin"), object.field("nope")), (Field::Unset, Field::Unset));
        assert_eq!((object.class().name, object.version()), ("VIFBase", "1.0"));
    }
}
