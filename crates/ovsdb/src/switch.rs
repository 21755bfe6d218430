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

/// For ovs-vswitchd to take up a port.
const APPLY_LIMIT: Duration = Duration::from_secs(6);
/// For it to let go of one. Should it take longer, the next port of that name waits for it.
const RELEASE_LIMIT: Duration = Duration::from_secs(2);
/// Attempts of a change that others get in the way of.
const ATTEMPTS: u32 = 5;

/// Key in the `external_ids` of a bridge that we made.
pub const BRIDGE_MARK: &str = "vhostd";
/// Key in the `external_ids` of a port that we made or took over; its value is the plug.
pub const PORT_MARK: &str = "vhostd-plug";

/// Key beside it: number of the device that the port was made for.
const DEVICE_MARK: &str = "vhostd-ifindex";

/// Frames tagged with this VLAN go nowhere: Neutron's "dead VLAN", which a port is in until an agent has set it up.
const DEAD_VLAN: u16 = 4095;

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

/// A running Open vSwitch.
#[derive(Debug)]
pub struct Switch {
    client: Client,
}

/// What the database says of a port before a change.
#[derive(Debug, Default)]
struct Found {
    bridge: Option<Row>,
    port: Option<Row>,
    interface: Option<Row>,
    /// Name of the bridge that the port is in.
    port_bridge: Option<String>,
    /// The configuration's generation (`next_cfg`).
    generation: i64,
}

impl Found {
    /// Whether the switch has a device open that had the name before. It lets go of one only if the port is away for a whole
    /// configuration, and shows nothing of it: not even `Interface.ifindex` can be trusted, which is looked up by name. So
    /// the number is kept with the port.
    fn is_stale(&self, spec: &PortSpec) -> bool {
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

    /// Makes the bridge of such a port if it is not there. False if it was.
    ///
    /// # Errors
    /// [`Error::DatapathType`]; [`Error::Unapplied`]; those of a connection.
    pub async fn ensure_bridge(&self, spec: &PortSpec) -> Result<bool, Error> {
        let bridge = &spec.bridge;
        for _ in 0..ATTEMPTS {
            let (_, operations) = bridge_operations(&self.look("", bridge).await?, spec)?;
            if operations.is_empty() {
                return Ok(false);
            }
            if let Some(generation) = self.commit(operations).await? {
                self.wait_until_applied(bridge, generation, APPLY_LIMIT).await?;
                info!(bridge, "Open vSwitch bridge made");
                return Ok(true);
            }
        }
        Err(Error::Raced { port: bridge.clone() })
    }

    /// Makes the bridge and the port if they are not there, corrects the columns that the spec names, and waits until the
    /// switch has the port open. False if nothing was changed.
    ///
    /// # Errors
    /// [`Error::DatapathType`], [`Error::OtherBridge`], [`Error::OtherOwner`]; [`Error::Port`],
    /// [`Error::Unapplied`]: the rows stay then; those of a connection.
    pub async fn ensure_port(&self, spec: &PortSpec) -> Result<bool, Error> {
        let (name, mut changed) = (&spec.name, false);
        for _ in 0..ATTEMPTS {
            let found = self.look(name, &spec.bridge).await?;
            let operations = port_operations(&found, spec)?;
            if found.is_stale(spec) {
                self.remove(&spec.bridge, name).await?;
                changed = true;
                continue;
            }
            if operations.is_empty() && found.interface.as_ref().is_some_and(|row| opened(row, spec).is_ok())
            {
                return Ok(changed);
            }
            if found.port.is_none() {
                // A port of this name that went just now has to be gone for the switch, too, before it comes again.
                self.wait_until_applied(name, found.generation, APPLY_LIMIT).await?;
            }
            changed |= !operations.is_empty();
            // Without operations it is asked for a sign: a port that is right, but not open, may be about to be.
            let Some(generation) = self.commit(operations).await? else { continue };
            self.wait_until_applied(name, generation, APPLY_LIMIT).await?;
            let Some(interface) = self.look(name, &spec.bridge).await?.interface else { continue };
            opened(&interface, spec)?;
            info!(port = name, bridge = spec.bridge, "port of Open vSwitch");
            return Ok(changed);
        }
        Err(Error::Raced { port: name.clone() })
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

    /// Removes the bridge if we made it and it has no ports but its own, or, if it is `given_up`, whoever made it and whatever
    /// is in it. False if it was not removed.
    ///
    /// # Errors
    /// Those of a connection.
    pub async fn remove_bridge(&self, bridge: &str, given_up: bool) -> Result<bool, Error> {
        let columns = json!(["_uuid", "ports", "external_ids"]);
        let select =
            json!({"op": "select", "table": "Bridge", "where": [["name", "==", bridge]], "columns": columns});
        let answers = self.client.transact(vec![select], Duration::ZERO).await?;
        let Some(row) = answers.first().and_then(|answer| rows(answer).into_iter().next()) else {
            return Ok(false);
        };
        let ports = value::uuids(&row, "ports");
        let ours = value::pairs(&row, "external_ids").contains_key(BRIDGE_MARK);
        if !given_up && (ports.len() > 1 || !ours) {
            return Ok(false);
        }
        let Some(uuid) = value::uuids(&row, "_uuid").pop() else { return Ok(false) };
        let unchanged = json!({"ports": value::set(ports.iter().map(|port| value::uuid(port)))});
        let operations = vec![
            json!({"op": "wait", "table": "Bridge", "where": [["_uuid", "==", value::uuid(&uuid)]], "until": "==",
                   "columns": ["ports"], "rows": [unchanged], "timeout": 0}),
            mutate("Open_vSwitch", &[], "bridges", "delete", &value::set([value::uuid(&uuid)])),
        ];
        let Some(generation) = self.commit(operations).await? else { return Ok(false) };
        self.wait_until_released(bridge, generation).await?;
        info!(bridge, "Open vSwitch bridge removed");
        Ok(true)
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
            let Some(generation) = self.commit(operations).await? else { continue };
            return self.wait_until_released(name, generation).await;
        }
        Err(Error::Raced { port: name.into() })
    }

    async fn look(&self, port: &str, bridge: &str) -> Result<Found, Error> {
        let select = |table: &str, name: &str, columns: &[&str]| {
            let whose = json!([["name", "==", name]]);
            json!({"op": "select", "table": table, "where": whose, "columns": columns})
        };
        let interface =
            ["_uuid", "type", "options", "external_ids", "mtu_request", "ofport", "error", "ifindex"];
        let operations = vec![
            select("Bridge", bridge, &["_uuid", "datapath_type", "external_ids"]),
            select("Port", port, &["_uuid", "interfaces", "external_ids"]),
            select("Interface", port, &interface),
            json!({"op": "select", "table": "Open_vSwitch", "where": [], "columns": ["next_cfg"]}),
        ];
        let answers = self.client.transact(operations, Duration::ZERO).await?;
        let mut first = answers.iter().map(|answer| rows(answer).into_iter().next());
        let mut next = || first.next().flatten();
        let mut found = Found { bridge: next(), port: next(), interface: next(), ..Found::default() };
        found.generation = next().and_then(|root| value::integer(&root, "next_cfg")).unwrap_or_default();
        if let Some(uuid) = found.port.as_ref().and_then(|port| value::uuids(port, "_uuid").pop()) {
            let holder = json!({"op": "select", "table": "Bridge", "columns": ["name"],
                                "where": [["ports", "includes", value::set([value::uuid(&uuid)])]]});
            let answers = self.client.transact(vec![holder], Duration::ZERO).await?;
            let holder = answers.first().and_then(|answer| rows(answer).into_iter().next());
            found.port_bridge = holder.and_then(|row| value::text(&row, "name").map(Into::into));
        }
        Ok(found)
    }

    /// Makes a change that the switch is to take up, and gives its generation (`next_cfg`). `None` if somebody else changed
    /// the same rows first.
    async fn commit(&self, mut operations: Vec<Value>) -> Result<Option<i64>, Error> {
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
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        let root = answers.iter().rev().find_map(|answer| rows(answer).into_iter().next());
        Ok(Some(root.and_then(|root| value::integer(&root, "next_cfg")).unwrap_or_default()))
    }

    /// Waits until the switch has taken up the configuration of this generation (`cur_cfg`). The server does the waiting
    /// (RFC 7047 §5.2.6).
    async fn wait_until_applied(&self, port: &str, generation: i64, limit: Duration) -> Result<(), Error> {
        let timeout = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
        let wait = json!({"op": "wait", "table": "Open_vSwitch", "where": [["cur_cfg", ">=", generation]],
                          "until": "!=", "columns": ["_uuid"], "rows": [], "timeout": timeout});
        match self.client.transact(vec![wait], limit).await {
            Ok(_) => Ok(()),
            Err(Error::Refused { error, .. }) if error == "timed out" => {
                Err(Error::Unapplied { port: port.into(), limit })
            }
            Err(error) => Err(error),
        }
    }

    /// The same for something that was removed: a switch that does not run has let go of everything.
    async fn wait_until_released(&self, name: &str, generation: i64) -> Result<(), Error> {
        match self.wait_until_applied(name, generation, RELEASE_LIMIT).await {
            Err(Error::Unapplied { .. }) => Ok(()),
            applied => applied,
        }
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
    let kind = spec.datapath_type.unwrap_or(spec.datapath_default).name();
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
                          "external_ids": pairs(&marks(spec))});
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

/// What we write about a port beside its interface.
fn marks(spec: &PortSpec) -> BTreeMap<String, String> {
    let mut marks = BTreeMap::from([(PORT_MARK.to_owned(), spec.owner.clone())]);
    if let Device::Host(number) = spec.device {
        marks.insert(DEVICE_MARK.to_owned(), number.to_string());
    }
    marks
}

fn mark_of(port: &Row) -> Option<String> {
    value::pairs(port, "external_ids").remove(PORT_MARK)
}

/// Whether the switch has the port open. It says -1 or nothing where it has not.
fn opened(interface: &Row, spec: &PortSpec) -> Result<(), Error> {
    if spec.device == Device::ToCome {
        return Ok(());
    }
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
