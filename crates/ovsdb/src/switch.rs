//! Bridges and ports of Open vSwitch, ensured and removed.
//!
//! The tables and columns are those of ovs-vswitchd.conf.db(5).

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use serde_json::{Value, json};
use tracing::info;

use crate::value::{self, Row};
use crate::{Client, Error};

/// For ovs-vswitchd to take up a change.
const APPLY_LIMIT: Duration = Duration::from_secs(10);
/// Attempts of a change that others get in the way of.
const ATTEMPTS: u32 = 5;

/// Key in the `external_ids` of a bridge that we made.
pub const BRIDGE_MARK: &str = "vhostd";
/// Key in the `external_ids` of a port that we made or took over; its value is the plug.
pub const PORT_MARK: &str = "vhostd-plug";

/// Frames tagged with this VLAN go nowhere: Neutron's "dead VLAN", which a port is in until an agent has set it up.
const DEAD_VLAN: u16 = 4095;

/// Where a bridge's frames are forwarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DatapathType {
    /// In the kernel.
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
    /// What the bridge has to be; `None`: whatever it is, and one that is made is in the kernel if that is possible.
    pub datapath_type: Option<DatapathType>,
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
    /// Number of the device that the switch must have open, if it is one of the host.
    pub ifindex: Option<u32>,
}

/// A running Open vSwitch.
#[derive(Debug)]
pub struct Switch {
    client: Client,
}

/// What the database says of a port before a change.
#[derive(Debug, Default)]
struct Found {
    /// Row of Open_vSwitch.
    root: Row,
    bridge: Option<Row>,
    port: Option<Row>,
    interface: Option<Row>,
    /// Name of the bridge that the port is in.
    port_bridge: Option<String>,
}

impl Switch {
    /// Through this client.
    pub fn new(client: Client) -> Self {
        Self { client }
    }

    /// Where its database is.
    pub fn address(&self) -> &crate::Address {
        self.client.address()
    }

    /// Whether there is such a bridge.
    ///
    /// # Errors
    /// Those of a connection.
    pub async fn has_bridge(&self, bridge: &str) -> Result<bool, Error> {
        Ok(self.look("", bridge).await?.bridge.is_some())
    }

    /// Makes the bridge if it is not there. False if it was.
    ///
    /// # Errors
    /// [`Error::DatapathType`], [`Error::NoDatapath`]; [`Error::Unapplied`]; those of a connection.
    pub async fn ensure_bridge(&self, bridge: &str, wanted: Option<DatapathType>) -> Result<bool, Error> {
        let spec = PortSpec { bridge: bridge.into(), datapath_type: wanted, ..PortSpec::default() };
        for _ in 0..ATTEMPTS {
            let found = self.look("", bridge).await?;
            let (_, operations) = bridge_operations(&found, &spec)?;
            if operations.is_empty() {
                return Ok(false);
            }
            if self.change(bridge, operations).await? {
                info!(bridge, "Open vSwitch bridge made");
                return Ok(true);
            }
        }
        Err(Error::Raced { port: bridge.into() })
    }

    /// Makes the bridge and the port if they are not there, corrects the columns that the spec names, and waits until the
    /// switch has the port open. False if nothing was changed.
    ///
    /// # Errors
    /// [`Error::DatapathType`], [`Error::NoDatapath`], [`Error::OtherBridge`], [`Error::OtherOwner`]; [`Error::Port`],
    /// [`Error::Unapplied`]: the rows stay then; those of a connection.
    pub async fn ensure_port(&self, spec: &PortSpec) -> Result<bool, Error> {
        let mut changed = false;
        for _ in 0..ATTEMPTS {
            let found = self.look(&spec.name, &spec.bridge).await?;
            let operations = port_operations(&found, spec)?;
            let interface = match found.interface {
                // Untouched, and the switch has it open.
                Some(interface) if operations.is_empty() && opened(&interface, spec).is_ok() => interface,
                // Right, but not open: the switch may be about to, so it is asked for a sign.
                _ => {
                    changed = true;
                    if !self.change(&spec.name, operations).await? {
                        continue;
                    }
                    let found = self.look(&spec.name, &spec.bridge).await?;
                    let Some(interface) = found.interface else { continue };
                    interface
                }
            };
            if is_stale(&interface, spec) {
                // ovs-vswitchd holds the device that had this name before. It lets go of it only if the port is away
                // for a whole configuration.
                self.remove(&spec.bridge, &spec.name).await?;
                continue;
            }
            opened(&interface, spec)?;
            if changed {
                info!(port = spec.name, bridge = spec.bridge, "port of Open vSwitch");
            }
            return Ok(changed);
        }
        Err(Error::Raced { port: spec.name.clone() })
    }

    /// Removes the port if it is in the bridge and bears the plug's mark. False if it was not removed. The switch has let go
    /// of it when this returns, unless it does not answer.
    ///
    /// # Errors
    /// Those of a connection.
    pub async fn remove_port(&self, bridge: &str, name: &str, owner: &str) -> Result<bool, Error> {
        let found = self.look(name, bridge).await?;
        let ours = found.port.as_ref().is_some_and(|port| mark_of(port).as_deref() == Some(owner));
        if !ours || found.port_bridge.as_deref() != Some(bridge) {
            return Ok(false);
        }
        self.remove(bridge, name).await?;
        info!(port = name, bridge, "port of Open vSwitch removed");
        Ok(true)
    }

    /// Removes the bridge if we made it and it has no ports but its own. False if it was not removed.
    ///
    /// # Errors
    /// Those of a connection.
    pub async fn remove_bridge(&self, bridge: &str) -> Result<bool, Error> {
        let columns = json!(["_uuid", "ports", "external_ids"]);
        let select =
            json!({"op": "select", "table": "Bridge", "where": [["name", "==", bridge]], "columns": columns});
        let answers = self.client.transact(vec![select], Duration::ZERO).await?;
        let Some(row) = answers.first().and_then(|answer| rows(answer).into_iter().next()) else {
            return Ok(false);
        };
        let ports = value::uuids(&row, "ports");
        if ports.len() > 1 || !value::pairs(&row, "external_ids").contains_key(BRIDGE_MARK) {
            return Ok(false);
        }
        let Some(uuid) = value::uuids(&row, "_uuid").pop() else { return Ok(false) };
        let unchanged = json!({"ports": value::set(ports.iter().map(|port| value::uuid(port)))});
        let operations = vec![
            json!({"op": "wait", "table": "Bridge", "where": [["_uuid", "==", value::uuid(&uuid)]], "until": "==",
                   "columns": ["ports"], "rows": [unchanged], "timeout": 0}),
            mutate("Open_vSwitch", &[], "bridges", "delete", &value::set([value::uuid(&uuid)])),
        ];
        let removed = self.change(bridge, operations).await;
        let removed = tolerate_absent_switch(removed)?;
        if removed {
            info!(bridge, "Open vSwitch bridge removed");
        }
        Ok(removed)
    }

    async fn remove(&self, bridge: &str, name: &str) -> Result<(), Error> {
        for _ in 0..ATTEMPTS {
            let found = self.look(name, bridge).await?;
            let Some(port) = found.port.as_ref().and_then(|port| value::uuids(port, "_uuid").pop()) else {
                return Ok(());
            };
            // A port that no bridge has is gone, and so is its interface (their tables are not roots, RFC 7047 §3.2).
            let whose = [json!(["name", "==", bridge])];
            let operations =
                vec![mutate("Bridge", &whose, "ports", "delete", &value::set([value::uuid(&port)]))];
            if tolerate_absent_switch(self.change(name, operations).await)? {
                return Ok(());
            }
        }
        Err(Error::Raced { port: name.into() })
    }

    async fn look(&self, port: &str, bridge: &str) -> Result<Found, Error> {
        let select = |table: &str, name: &str, columns: &[&str]| json!({"op": "select", "table": table, "where": [["name", "==", name]], "columns": columns});
        let root = json!({"op": "select", "table": "Open_vSwitch", "where": [],
                          "columns": ["_uuid", "datapath_types", "external_ids"]});
        let interface =
            ["_uuid", "type", "options", "external_ids", "mtu_request", "ofport", "error", "ifindex"];
        let operations = vec![
            root,
            select("Bridge", bridge, &["_uuid", "datapath_type", "external_ids"]),
            select("Port", port, &["_uuid", "interfaces", "external_ids"]),
            select("Interface", port, &interface),
        ];
        let answers = self.client.transact(operations, Duration::ZERO).await?;
        let mut first = answers.iter().map(|answer| rows(answer).into_iter().next());
        let mut next = || first.next().flatten();
        let mut found = Found {
            root: next().unwrap_or_default(),
            bridge: next(),
            port: next(),
            interface: next(),
            port_bridge: None,
        };
        if let Some(uuid) = found.port.as_ref().and_then(|port| value::uuids(port, "_uuid").pop()) {
            let holder = json!({"op": "select", "table": "Bridge", "columns": ["name"],
                                "where": [["ports", "includes", value::set([value::uuid(&uuid)])]]});
            let answers = self.client.transact(vec![holder], Duration::ZERO).await?;
            let holder = answers.first().and_then(|answer| rows(answer).into_iter().next());
            found.port_bridge = holder.and_then(|row| value::text(&row, "name").map(Into::into));
        }
        Ok(found)
    }

    /// Makes a change and waits until the switch has taken it up. False if somebody else changed the same rows first.
    async fn change(&self, port: &str, mut operations: Vec<Value>) -> Result<bool, Error> {
        operations.push(mutate("Open_vSwitch", &[], "next_cfg", "+=", &json!(1)));
        operations
            .push(json!({"op": "select", "table": "Open_vSwitch", "where": [], "columns": ["next_cfg"]}));
        let answers = match self.client.transact(operations, Duration::ZERO).await {
            Ok(answers) => answers,
            // A name that is there already, a reference to a row that is gone; a guard that does not hold any more.
            Err(Error::Refused { error, .. })
                if ["constraint violation", "referential integrity violation", "timed out"]
                    .contains(&error.as_str()) =>
            {
                return Ok(false);
            }
            Err(error) => return Err(error),
        };
        let root =
            answers.iter().rev().find_map(|answer| rows(answer).into_iter().next()).unwrap_or_default();
        let next = value::integer(&root, "next_cfg").unwrap_or_default();
        self.wait_until_applied(port, next).await?;
        Ok(true)
    }

    /// Waits until `cur_cfg` has come to `next`. The server does the waiting (RFC 7047 §5.2.6).
    async fn wait_until_applied(&self, port: &str, next: i64) -> Result<(), Error> {
        let limit = u64::try_from(APPLY_LIMIT.as_millis()).unwrap_or(u64::MAX);
        let wait = json!({"op": "wait", "table": "Open_vSwitch", "where": [["cur_cfg", ">=", next]], "until": "!=",
                          "columns": ["_uuid"], "rows": [], "timeout": limit});
        match self.client.transact(vec![wait], APPLY_LIMIT).await {
            Ok(_) => Ok(()),
            Err(Error::Refused { error, .. }) if error == "timed out" => {
                Err(Error::Unapplied { port: port.into(), limit: APPLY_LIMIT })
            }
            Err(error) => Err(error),
        }
    }
}

/// A switch that does not run has let go of everything.
fn tolerate_absent_switch(removed: Result<bool, Error>) -> Result<bool, Error> {
    match removed {
        Err(Error::Unapplied { .. }) => Ok(true),
        removed => removed,
    }
}

/// What it takes to have the bridge, and how to name it in the same transaction.
fn bridge_operations(found: &Found, spec: &PortSpec) -> Result<(Value, Vec<Value>), Error> {
    if let Some(row) = &found.bridge {
        let uuid = value::uuids(row, "_uuid").pop().unwrap_or_default();
        let kind = value::text(row, "datapath_type").filter(|kind| !kind.is_empty());
        let kind = kind.unwrap_or_else(|| DatapathType::System.name());
        return match spec.datapath_type {
            Some(wanted) if wanted.name() != kind => Err(Error::DatapathType {
                bridge: spec.bridge.clone(),
                found: kind.into(),
                wanted: wanted.to_string(),
            }),
            _ => Ok((value::uuid(&uuid), Vec::new())),
        };
    }
    let kind = datapath_type(found, spec)?.name();
    let bridge = &spec.bridge;
    // A bridge has a port of its own, which the host sees as a link of the bridge's name.
    let operations = vec![
        json!({"op": "insert", "table": "Interface", "uuid-name": "own_interface",
               "row": {"name": bridge, "type": "internal"}}),
        json!({"op": "insert", "table": "Port", "uuid-name": "own_port",
               "row": {"name": bridge, "interfaces": value::named("own_interface")}}),
        json!({"op": "insert", "table": "Bridge", "uuid-name": "bridge",
               "row": {"name": bridge, "datapath_type": kind, "ports": value::named("own_port"),
                       "external_ids": value::map([(BRIDGE_MARK, "made")])}}),
        mutate("Open_vSwitch", &[], "bridges", "insert", &value::set([value::named("bridge")])),
    ];
    Ok((value::named("bridge"), operations))
}

/// The datapath of a bridge that is to be made.
fn datapath_type(found: &Found, spec: &PortSpec) -> Result<DatapathType, Error> {
    let available = value::texts(&found.root, "datapath_types");
    let has = |kind: DatapathType| available.iter().any(|name| name == kind.name());
    match spec.datapath_type {
        // A switch that has not started yet has not said what it has.
        Some(wanted) if available.is_empty() || has(wanted) => Ok(wanted),
        Some(wanted) => {
            Err(Error::NoDatapath { bridge: spec.bridge.clone(), wanted: wanted.to_string(), available })
        }
        None if available.is_empty() || has(DatapathType::System) => Ok(DatapathType::System),
        None => Ok(DatapathType::Netdev),
    }
}

/// What it takes to have the port. Empty if all is as it should be.
fn port_operations(found: &Found, spec: &PortSpec) -> Result<Vec<Value>, Error> {
    let (bridge, mut operations) = bridge_operations(found, spec)?;
    let (Some(port), Some(interface)) = (&found.port, &found.interface) else {
        operations.extend(new_port(&bridge, spec));
        return Ok(operations);
    };
    if let Some(elsewhere) = found.port_bridge.as_ref().filter(|name| **name != spec.bridge) {
        let (found, wanted) = (elsewhere.clone(), spec.bridge.clone());
        return Err(Error::OtherBridge { port: spec.name.clone(), found, wanted });
    }
    let mark = mark_of(port);
    let foreign_kind = value::text(interface, "type").filter(|kind| *kind != spec.kind);
    let owner = match (&mark, foreign_kind) {
        (Some(owner), _) if *owner != spec.owner => Some(format!("plug {owner}")),
        (_, Some(kind)) => Some(format!("somebody else, with type {kind:?}")),
        _ => None,
    };
    if let Some(owner) = owner {
        return Err(Error::OtherOwner { port: spec.name.clone(), bridge: spec.bridge.clone(), owner });
    }
    if mark.is_none() {
        let marked = BTreeMap::from([(PORT_MARK.to_owned(), spec.owner.clone())]);
        operations.extend(set_pairs("Port", port, "external_ids", &marked));
    }
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

fn new_port(bridge: &Value, spec: &PortSpec) -> Vec<Value> {
    let pairs = |map: &BTreeMap<String, String>| {
        value::map(map.iter().map(|(key, value)| (key.as_str(), value.as_str())))
    };
    let mut interface = json!({"name": spec.name, "type": spec.kind, "options": pairs(&spec.options),
                               "external_ids": pairs(&spec.external_ids)});
    if let Some(mtu) = spec.mtu {
        interface["mtu_request"] = mtu.into();
    }
    let mut port = json!({"name": spec.name, "interfaces": value::named("interface"),
                          "external_ids": value::map([(PORT_MARK, spec.owner.as_str())])});
    if spec.isolated {
        port["tag"] = DEAD_VLAN.into();
        port["vlan_mode"] = "trunk".into();
        port["trunks"] = DEAD_VLAN.into();
    }
    // Aborts the transaction if the bridge has gone meanwhile: a port in no bridge would be made and lost in silence.
    let guard = |uuid: &Value| {
        json!({"op": "wait", "table": "Bridge", "where": [["_uuid", "==", uuid]], "until": "!=", "columns": ["_uuid"],
               "rows": [], "timeout": 0})
    };
    let there = bridge.get(0).is_some_and(|tag| tag == "uuid");
    let whose = if there { json!(["_uuid", "==", bridge]) } else { json!(["name", "==", spec.bridge]) };
    there
        .then(|| guard(bridge))
        .into_iter()
        .chain([
            json!({"op": "insert", "table": "Interface", "uuid-name": "interface", "row": interface}),
            json!({"op": "insert", "table": "Port", "uuid-name": "port", "row": port}),
            mutate("Bridge", &[whose], "ports", "insert", &value::set([value::named("port")])),
        ])
        .collect()
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

fn mutate(table: &str, whose: &[Value], column: &str, mutator: &str, value: &Value) -> Value {
    json!({"op": "mutate", "table": table, "where": whose, "mutations": [[column, mutator, value]]})
}

fn same(row: &Row) -> Value {
    json!(["_uuid", "==", row.get("_uuid")])
}

fn rows(answer: &Row) -> Vec<Row> {
    let rows = answer.get("rows").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    rows.iter().filter_map(|row| row.as_object().cloned()).collect()
}

fn mark_of(port: &Row) -> Option<String> {
    value::pairs(port, "external_ids").remove(PORT_MARK)
}

/// Whether the switch has the port open. It says -1 or nothing where it has not.
fn opened(interface: &Row, spec: &PortSpec) -> Result<(), Error> {
    let cause = match (value::text(interface, "error"), value::integer(interface, "ofport")) {
        (Some(error), _) => error.to_owned(),
        (None, Some(1..)) => return Ok(()),
        (None, _) => "it gave the port no number (see ovs-vswitchd's log)".into(),
    };
    Err(Error::Port { port: spec.name.clone(), bridge: spec.bridge.clone(), cause })
}

/// Whether the switch has another device open than the one that bears the name now.
fn is_stale(interface: &Row, spec: &PortSpec) -> bool {
    let held = value::integer(interface, "ifindex").filter(|held| *held > 0);
    matches!((held, spec.ifindex), (Some(held), Some(now)) if held != i64::from(now))
}
