//! VIFs as os-vif writes them.

use serde_json::{Value, json};

/// The VIF's id.
pub const VIF: &str = "dc065497-3c8d-4f44-8fb4-e1d33c16a536";
/// Its guest's address.
pub const ADDRESS: &str = "fa:16:3e:d8:b7:0e";
/// Its instance.
pub const INSTANCE: &str = "d7a730ca-3c28-49c3-8f26-4662b909fe8a";

/// A versioned object.
pub fn envelope(class: &str, version: &str, data: &Value) -> Value {
    json!({"versioned_object.name": class, "versioned_object.namespace": "os_vif",
           "versioned_object.version": version, "versioned_object.data": data})
}

/// What is posted to plug a VIF of this class into a bridge of Open vSwitch, with more fields of the VIF and of its profile.
pub fn in_open_vswitch(class: &str, bridge: &str, fields: &Value, profile: &Value) -> Value {
    let with = |mut all: Value, more: &Value| {
        all.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        all
    };
    let profile = with(json!({"interface_id": VIF}), profile);
    let network = json!({"id": "b82c1929-051e-481d-8110-4669916c7915", "bridge": bridge, "mtu": 1450});
    let data = json!({"id": VIF, "address": ADDRESS, "network": envelope("Network", "1.1", &network),
                      "port_profile": envelope("VIFPortProfileOpenVSwitch", "1.4", &profile)});
    let version = if class == "VIFVHostUser" { "1.1" } else { "1.0" };
    json!({"vif": envelope(class, version, &with(data, fields)),
           "instance_info": envelope("InstanceInfo", "1.0", &json!({"uuid": INSTANCE}))})
}
