//! What has to be written for a port to be there, given what is: no input or output, only rows and operations.

use std::collections::BTreeMap;
use std::fmt;

use serde_json::{Value, json};
use uuid::{Uuid, uuid};

use crate::Error;
use crate::value::{self, Row};

/// Key in the `external_ids` of a bridge that we made.
pub const BRIDGE_MARK: &str = "vhostd";
/// Key in the `external_ids` of a port that we made or took over; its value is the plug.
pub const PORT_MARK: &str = "vhostd-plug";

/// Key beside it: number of the device that the port was made for.
const DEVICE_MARK: &str = "vhostd-ifindex";

/// Frames tagged with this VLAN go nowhere: Neutron's "dead VLAN", which a port is in until an agent has set it up.
const DEAD_VLAN: u16 = 4095;

/// A port's row in table QoS bears, as `id`, its name's UUID of version 5 in this namespace: os-vif's, so that either finds
/// what the other has left.
const QOS_NAMESPACE: Uuid = uuid!("68da264a-847f-42a8-8ab0-5e774aee3d95");

/// Where a bridge's frames are forwarded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DatapathType {
    /// In the kernel.
    #[default]
    System,
    /// In ovs-vswitchd itself.
    Netdev,
}

impl DatapathType {
    /// As the database has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::Netdev => "netdev",
        }
    }
}

impl fmt::Display for DatapathType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A port that has to be there.
#[derive(Clone, Debug, Default)]
pub struct PortSpec {
    /// Its bridge, made if it is not there.
    pub bridge: String,
    /// What the bridge has to be; `None`: whatever it is.
    pub datapath_type: Option<DatapathType>,
    /// What a bridge is made as, if that is left to us.
    pub datapath_default: DatapathType,
    /// Name of the port, of its only interface, and of the device unless `kind` says otherwise.
    pub name: String,
    /// The plug that needs it.
    pub owner: String,
    /// Interface.type; empty for a device of the host.
    pub kind: String,
    /// Interface.options.
    pub options: BTreeMap<String, String>,
    /// Interface.external_ids. Others that are there stay.
    pub external_ids: BTreeMap<String, String>,
    /// Interface.mtu_request, bytes.
    pub mtu: Option<u16>,
    /// Whether a port that is made starts in the dead VLAN.
    pub isolated: bool,
    /// QoS.type of a port that is made; `None`: it has no row in that table. A port that is there keeps what it has.
    pub qos: Option<String>,
    /// What the switch is to open.
    pub device: Device,
}

/// The device behind an interface.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Device {
    /// The switch makes it.
    #[default]
    Own,
    /// The host's device of this number. Names are taken over, numbers are not.
    Host(u32),
    /// Somebody will make it: a port that is not open yet is as good as one that is.
    ToCome,
}

/// What the database says of a port before a change.
#[derive(Debug, Default)]
pub(crate) struct Found {
    pub(crate) bridge: Option<Row>,
    pub(crate) port: Option<Row>,
    pub(crate) interface: Option<Row>,
    /// Name of the bridge that the port is in.
    pub(crate) port_bridge: Option<String>,
    /// Whether there is a row of table QoS for a port of that name.
    pub(crate) has_qos: bool,
    /// The configuration's generation (`next_cfg`).
    pub(crate) generation: i64,
}

impl Found {
    /// The plug whose port it is.
    pub(crate) fn owner(&self) -> Option<String> {
        self.port.as_ref().and_then(|port| value::pairs(port, "external_ids").remove(PORT_MARK))
    }

    /// What forwards for the bridge that is there.
    pub(crate) fn datapath_type(&self) -> Option<&str> {
        let kind = value::text(self.bridge.as_ref()?, "datapath_type").filter(|kind| !kind.is_empty());
        Some(kind.unwrap_or_else(|| DatapathType::System.name()))
    }

    /// Whether the switch has a device open that had the name before. It lets go of one only if the port is away for a whole
    /// configuration, and shows nothing of it: not even `Interface.ifindex` can be trusted, which is looked up by name. So
    /// the number is kept with the port.
    pub(crate) fn is_stale(&self, spec: &PortSpec) -> bool {
        let (Device::Host(now), Some(port)) = (spec.device, &self.port) else { return false };
        let marked = value::pairs(port, "external_ids").remove(DEVICE_MARK);
        let shown =
            || self.interface.as_ref().and_then(|row| value::integer(row, "ifindex")).filter(|i| *i > 0);
        match marked {
            Some(number) => number != now.to_string(),
            None => shown().is_some_and(|number| number != i64::from(now)),
        }
    }
}

/// What it takes to have the bridge of port `n` of a transaction, and how to name it there.
pub(crate) fn bridge_operations(
    found: &Found,
    spec: &PortSpec,
    n: usize,
) -> Result<(Value, Vec<Value>), Error> {
    if let (Some(row), Some(kind)) = (&found.bridge, found.datapath_type()) {
        let uuid = value::uuids(row, "_uuid").pop().unwrap_or_default();
        return match spec.datapath_type {
            Some(wanted) if wanted.name() != kind => Err(Error::DatapathType {
                bridge: spec.bridge.clone(),
                found: kind.into(),
                wanted: wanted.to_string(),
            }),
            _ => Ok((value::uuid(&uuid), Vec::new())),
        };
    }
    let kind = spec.datapath_type.unwrap_or(spec.datapath_default).name();
    let bridge = &spec.bridge;
    let [own_interface, own_port, name] =
        ["own_interface", "own_port", "bridge"].map(|row| format!("{row}{n}"));
    // A bridge has a port of its own, which the host sees as a link of the bridge's name.
    let operations = vec![
        json!({"op": "insert", "table": "Interface", "uuid-name": own_interface,
               "row": {"name": bridge, "type": "internal"}}),
        json!({"op": "insert", "table": "Port", "uuid-name": own_port,
               "row": {"name": bridge, "interfaces": value::named(&own_interface)}}),
        json!({"op": "insert", "table": "Bridge", "uuid-name": name,
               "row": {"name": bridge, "datapath_type": kind, "ports": value::named(&own_port),
                       "external_ids": value::map([(BRIDGE_MARK, "made")])}}),
        mutate("Open_vSwitch", &[], "bridges", "insert", &value::set([value::named(&name)])),
    ];
    Ok((value::named(&name), operations))
}

/// What it takes to have port `n` of a transaction. Empty if all is as it should be.
pub(crate) fn port_operations(found: &Found, spec: &PortSpec, n: usize) -> Result<Vec<Value>, Error> {
    let (bridge, mut operations) = bridge_operations(found, spec, n)?;
    let foreign =
        |owner: String| Error::OtherOwner { port: spec.name.clone(), bridge: spec.bridge.clone(), owner };
    let (port, interface) = match (&found.port, &found.interface) {
        (Some(port), Some(interface)) => (port, interface),
        (None, None) => {
            operations.extend(new_port(&bridge, spec, n));
            return Ok(operations);
        }
        _ => return Err(foreign("somebody else, as part of a bond".into())),
    };
    if let Some(elsewhere) = found.port_bridge.as_ref().filter(|name| **name != spec.bridge) {
        let (found, wanted) = (elsewhere.clone(), spec.bridge.clone());
        return Err(Error::OtherBridge { port: spec.name.clone(), found, wanted });
    }
    if let Some(owner) = found.owner().filter(|owner| *owner != spec.owner) {
        return Err(foreign(format!("plug {owner}")));
    }
    if let Some(kind) = value::text(interface, "type").filter(|kind| *kind != spec.kind) {
        return Err(foreign(format!("somebody else, with type {kind:?}")));
    }
    operations.extend(set_pairs("Port", port, "external_ids", &marks(spec)));
    operations.extend(set_pairs("Interface", interface, "external_ids", &spec.external_ids));
    operations.extend(set_pairs("Interface", interface, "options", &spec.options));
    if let Some(mtu) = spec.mtu.filter(|mtu| value::integer(interface, "mtu_request") != Some((*mtu).into()))
    {
        let row = json!({"mtu_request": mtu});
        operations
            .push(json!({"op": "update", "table": "Interface", "where": [same(interface)], "row": row}));
    }
    Ok(operations)
}

fn new_port(bridge: &Value, spec: &PortSpec, n: usize) -> Vec<Value> {
    let pairs = |map: &BTreeMap<String, String>| {
        value::map(map.iter().map(|(key, value)| (key.as_str(), value.as_str())))
    };
    let mut interface = json!({"name": spec.name, "type": spec.kind, "options": pairs(&spec.options),
                               "external_ids": pairs(&spec.external_ids)});
    if let Some(mtu) = spec.mtu {
        interface["mtu_request"] = mtu.into();
    }
    let [interface_name, port_name, qos_name] = ["interface", "port", "qos"].map(|row| format!("{row}{n}"));
    // Transient: `ovs-ctl --delete-transient-ports` takes it out when the host starts, before its device is there again and
    // whether its plug is still wanted is known. We put back what is.
    let mut port = json!({"name": spec.name, "interfaces": value::named(&interface_name),
                          "external_ids": pairs(&marks(spec)),
                          "other_config": value::map([("transient", "true")])});
    if spec.isolated {
        port["tag"] = DEAD_VLAN.into();
        port["vlan_mode"] = "trunk".into();
        port["trunks"] = DEAD_VLAN.into();
    }
    let mut operations = vec![delete_qos(&spec.name)];
    if let Some(kind) = &spec.qos {
        let ids = value::map([("id", qos_id(&spec.name).as_str()), ("_type", kind)]);
        operations.push(json!({"op": "insert", "table": "QoS", "uuid-name": qos_name,
                               "row": {"type": kind, "external_ids": ids}}));
        port["qos"] = value::named(&qos_name);
    }
    // Aborts the transaction if the bridge has gone meanwhile: a port in no bridge would be made and lost in silence.
    let guard = |uuid: &Value| {
        json!({"op": "wait", "table": "Bridge", "where": [["_uuid", "==", uuid]], "until": "!=", "columns": ["_uuid"],
               "rows": [], "timeout": 0})
    };
    let there = bridge.get(0).is_some_and(|tag| tag == "uuid");
    let whose = if there { json!(["_uuid", "==", bridge]) } else { json!(["name", "==", spec.bridge]) };
    operations.extend(there.then(|| guard(bridge)));
    operations.extend([
        json!({"op": "insert", "table": "Interface", "uuid-name": interface_name, "row": interface}),
        json!({"op": "insert", "table": "Port", "uuid-name": port_name, "row": port}),
        mutate("Bridge", &[whose], "ports", "insert", &value::set([value::named(&port_name)])),
    ]);
    operations
}

/// What it takes to be rid of a port. One that no bridge has is gone, and so is its interface (their tables are not roots,
/// RFC 7047 §3.2); table QoS is one.
pub(crate) fn removal(bridge: &str, port: &str, uuid: &str) -> Vec<Value> {
    let uuid = value::uuid(uuid);
    vec![
        json!({"op": "update", "table": "Port", "where": [["_uuid", "==", uuid]], "row": {"qos": ["set", []]}}),
        mutate("Bridge", &[json!(["name", "==", bridge])], "ports", "delete", &value::set([uuid])),
        delete_qos(port),
    ]
}

/// Removes what is in table QoS for the port of that name.
pub(crate) fn delete_qos(port: &str) -> Value {
    json!({"op": "delete", "table": "QoS", "where": [of_port(port)]})
}

/// The condition for rows of table QoS that are for the port of that name.
pub(crate) fn of_port(port: &str) -> Value {
    json!(["external_ids", "includes", value::map([("id", qos_id(port).as_str())])])
}

fn qos_id(port: &str) -> String {
    Uuid::new_v5(&QOS_NAMESPACE, port.as_bytes()).to_string()
}

/// Sets the pairs that are not so, and leaves others alone.
fn set_pairs(table: &str, row: &Row, column: &str, wanted: &BTreeMap<String, String>) -> Vec<Value> {
    let found = value::pairs(row, column);
    let differing: Vec<_> = wanted.iter().filter(|(key, value)| found.get(*key) != Some(*value)).collect();
    if differing.is_empty() {
        return Vec::new();
    }
    let whose = [same(row)];
    let keys = value::set(differing.iter().map(|(key, _)| key.as_str()));
    let pairs = value::map(differing.iter().map(|(key, value)| (key.as_str(), value.as_str())));
    // "insert" leaves a key that is there as it is (RFC 7047 §5.1).
    vec![mutate(table, &whose, column, "delete", &keys), mutate(table, &whose, column, "insert", &pairs)]
}

pub(crate) fn mutate(table: &str, whose: &[Value], column: &str, mutator: &str, value: &Value) -> Value {
    json!({"op": "mutate", "table": table, "where": whose, "mutations": [[column, mutator, value]]})
}

fn same(row: &Row) -> Value {
    json!(["_uuid", "==", row.get("_uuid")])
}

/// What we write about a port beside its interface.
fn marks(spec: &PortSpec) -> BTreeMap<String, String> {
    let mut marks = BTreeMap::from([(PORT_MARK.to_owned(), spec.owner.clone())]);
    if let Device::Host(number) = spec.device {
        marks.insert(DEVICE_MARK.to_owned(), number.to_string());
    }
    marks
}

/// Whether the switch has the port open. It says -1 or nothing where it has not.
pub(crate) fn is_open(found: &Found, spec: &PortSpec) -> Result<(), Error> {
    if spec.device == Device::ToCome {
        return Ok(());
    }
    let none = Row::new();
    let interface = found.interface.as_ref().unwrap_or(&none);
    let cause = match (value::text(interface, "error"), value::integer(interface, "ofport")) {
        (Some(error), _) => error.to_owned(),
        (None, Some(1..)) => return Ok(()),
        (None, _) => {
            "it gave the port no number, its log says why (a bridge of datapath_type system needs the kernel \
                      module openvswitch)"
                .into()
        }
    };
    Err(Error::Port { port: spec.name.clone(), bridge: spec.bridge.clone(), cause })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> PortSpec {
        PortSpec {
            bridge: "br0".into(),
            name: "t0".into(),
            owner: "vm1".into(),
            external_ids: [("iface-id".to_owned(), "lsp1".to_owned())].into(),
            mtu: Some(1450),
            device: Device::Host(7),
            ..PortSpec::default()
        }
    }

    fn row(value: Value) -> Option<Row> {
        let Value::Object(row) = value else { panic!("{value}") };
        Some(row)
    }

    /// The port as the spec has it, open.
    fn there() -> Found {
        let marks = [(PORT_MARK, "vm1"), (DEVICE_MARK, "7")];
        Found {
            bridge: row(json!({"_uuid": value::uuid("b"), "datapath_type": "netdev"})),
            port: row(json!({"_uuid": value::uuid("p"), "external_ids": value::map(marks)})),
            interface: row(json!({"_uuid": value::uuid("i"), "type": "", "mtu_request": 1450, "ofport": 1,
                                  "external_ids": value::map([("iface-id", "lsp1"), ("ovn-installed", "true")])})),
            port_bridge: Some("br0".into()),
            has_qos: false,
            generation: 1,
        }
    }

    fn kinds(found: &Found, spec: &PortSpec) -> Vec<String> {
        let operations = port_operations(found, spec, 0).unwrap();
        operations.iter().map(|o| format!("{} {}", o["op"], o["table"]).replace('"', "")).collect()
    }

    #[test]
    fn a_port_that_is_right_is_not_touched() {
        assert!(port_operations(&there(), &spec(), 0).unwrap().is_empty());
        assert!(!there().is_stale(&spec()));
        assert_eq!(is_open(&there(), &spec()), Ok(()));
    }

    #[test]
    fn bridge_and_port_are_made_together() {
        let new = kinds(&Found::default(), &spec());
        let bridge = ["insert Interface", "insert Port", "insert Bridge", "mutate Open_vSwitch"];
        assert_eq!(new[..4], bridge);
        assert_eq!(new[4..], ["delete QoS", "insert Interface", "insert Port", "mutate Bridge"]);
        // Into a bridge that is there only while it is.
        let bridge = Found { bridge: there().bridge, ..Found::default() };
        let port = ["delete QoS", "wait Bridge", "insert Interface", "insert Port", "mutate Bridge"];
        assert_eq!(kinds(&bridge, &spec()), port);
        let isolated = PortSpec { isolated: true, ..spec() };
        assert_eq!(port_operations(&bridge, &isolated, 0).unwrap()[3]["row"]["tag"], 4095);
        let shaped = PortSpec { qos: Some("linux-noop".into()), ..spec() };
        let operations = port_operations(&bridge, &shaped, 0).unwrap();
        assert_eq!(
            (&operations[1]["table"], &operations[1]["row"]["type"]),
            (&json!("QoS"), &json!("linux-noop"))
        );
        assert_eq!(operations[4]["row"]["qos"], json!(["named-uuid", "qos0"]));
    }

    #[test]
    fn a_ports_quality_of_service_bears_the_id_that_os_vif_gives_it() {
        assert_eq!(qos_id("tapdc065497-3c"), "58b25a10-7b82-5385-9020-a2e650c6b0da");
    }

    #[test]
    fn only_what_differs_is_corrected() {
        let ids = PortSpec { external_ids: [("iface-id".to_owned(), "lsp2".to_owned())].into(), ..spec() };
        let operations = port_operations(&there(), &ids, 0).unwrap();
        let keys: Vec<_> =
            operations.iter().map(|operation| operation["mutations"][0][2].to_string()).collect();
        assert_eq!(keys, [r#"["set",["iface-id"]]"#, r#"["map",[["iface-id","lsp2"]]]"#]);
        assert_eq!(kinds(&there(), &PortSpec { mtu: Some(1500), ..spec() }), ["update Interface"]);
        // One that somebody else made is marked.
        let unmarked = Found { port: row(json!({"_uuid": value::uuid("p")})), ..there() };
        assert_eq!(kinds(&unmarked, &spec()), ["mutate Port", "mutate Port"]);
    }

    #[test]
    fn what_is_somebody_elses_is_refused() {
        let refused = |found: &Found, spec: &PortSpec| port_operations(found, spec, 0).unwrap_err();
        let netdev = PortSpec { datapath_type: Some(DatapathType::System), ..spec() };
        assert!(matches!(refused(&there(), &netdev), Error::DatapathType { .. }));
        let elsewhere = Found { port_bridge: Some("br1".into()), ..there() };
        assert!(matches!(refused(&elsewhere, &spec()), Error::OtherBridge { found, .. } if found == "br1"));
        for (found, expected) in [
            (there(), "plug vm1"),
            (Found { port: row(json!({})), interface: row(json!({"type": "patch"})), ..there() }, "patch"),
            (Found { port: None, ..there() }, "bond"),
            (Found { interface: None, ..there() }, "bond"),
        ] {
            let error = refused(&found, &PortSpec { owner: "vm2".into(), ..spec() });
            assert!(error.is_conflict() && error.to_string().contains(expected), "{error}");
        }
    }

    #[test]
    fn a_device_that_was_made_anew_is_known_by_its_number() {
        assert!(there().is_stale(&PortSpec { device: Device::Host(8), ..spec() }));
        assert!(!there().is_stale(&PortSpec { device: Device::ToCome, ..spec() }));
        let shown = |number: i64| Found {
            port: row(json!({})),
            interface: row(json!({"ifindex": number})),
            ..there()
        };
        assert!(shown(8).is_stale(&spec()) && !shown(7).is_stale(&spec()) && !shown(0).is_stale(&spec()));
    }

    #[test]
    fn only_a_port_with_a_number_is_open() {
        for (interface, expected) in [
            (json!({"ofport": ["set", []]}), "no number"),
            (json!({"ofport": -1}), "no number"),
            (json!({"ofport": -1, "error": "could not open t0"}), "could not open t0"),
        ] {
            let found = Found { interface: row(interface), ..there() };
            let error = is_open(&found, &spec()).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
            assert_eq!(is_open(&found, &PortSpec { device: Device::ToCome, ..spec() }), Ok(()));
        }
    }
}
