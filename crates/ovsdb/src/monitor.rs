//! What becomes of bridges and ports: the rows of interest, followed as they change (RFC 7047 §4.1.5).

use std::collections::{BTreeSet, HashMap};

use serde_json::{Value, json};
use tokio::time::timeout;

use crate::Error;
use crate::client::DATABASE;
use crate::connection::{Address, Connection, LIMIT, Message};
use crate::value::{self, Row};

/// Rows of one table that are looked at: more than a switch has ports for.
const ROWS_MAX: usize = 1 << 17;

/// News of the tables that [`View`] shows.
#[derive(Debug)]
pub struct Monitor {
    connection: Connection,
    /// A probe of ours that has not been answered.
    probe: Option<u64>,
}

/// An interface at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Interface {
    /// Number of its port in the switch; above 0 when the switch has it open.
    pub ofport: Option<i64>,
    /// Why the switch could not open it.
    pub error: Option<String>,
    /// Number of the device that the switch has open.
    pub ifindex: Option<i64>,
    /// MTU as the switch found it, bytes; once it has.
    pub mtu: Option<i64>,
    /// `external_ids:ovn-installed`: OVN's flows for the port are in place.
    pub ovn_installed: bool,
}

/// The tables as far as they are known.
#[derive(Debug, Default)]
pub struct View {
    interfaces: Table<Interface>,
    ports: Table<()>,
    /// Each with the UUIDs of its ports.
    bridges: Table<BTreeSet<String>>,
    ovn_bridge: Option<String>,
}

/// Rows by name and by UUID.
#[derive(Debug)]
struct Table<T> {
    rows: HashMap<String, (String, T)>,
    uuids: HashMap<String, String>,
}

impl<T> Default for Table<T> {
    fn default() -> Self {
        Self { rows: HashMap::new(), uuids: HashMap::new() }
    }
}

impl<T> Table<T> {
    /// The row is now so, or gone.
    fn replace(&mut self, uuid: &str, row: Option<(String, T)>) {
        if let Some((former, _)) = self.rows.remove(uuid)
            // Another row may have taken over the name within the same change.
            && self.uuids.get(&former).is_some_and(|named| named == uuid)
        {
            self.uuids.remove(&former);
        }
        if let Some((name, row)) = row.filter(|_| self.rows.len() < ROWS_MAX) {
            self.uuids.insert(name.clone(), uuid.into());
            self.rows.insert(uuid.into(), (name, row));
        }
    }

    fn by_name(&self, name: &str) -> Option<&T> {
        self.rows.get(self.uuids.get(name)?).map(|(_, row)| row)
    }
}

impl Monitor {
    /// Connects, and gives the tables as they are now.
    ///
    /// # Errors
    /// Those of a connection.
    pub async fn open(address: &Address) -> Result<(Self, View), Error> {
        let mut monitor = Self { connection: Connection::open(address).await?, probe: None };
        // All of it: a server that says other things meanwhile has not answered.
        match timeout(LIMIT, monitor.begin()).await {
            Ok(view) => Ok((monitor, view?)),
            Err(_) => Err(monitor.connection.silent()),
        }
    }

    async fn begin(&mut self) -> Result<View, Error> {
        let columns = |columns: &[&str]| json!([{ "columns": columns }]);
        let tables = json!({
            "Open_vSwitch": columns(&["external_ids"]),
            "Bridge": columns(&["name", "ports"]),
            "Port": columns(&["name"]),
            "Interface": columns(&["name", "ofport", "error", "ifindex", "mtu", "external_ids"]),
        });
        let id = self.connection.request("monitor", json!([DATABASE, null, tables])).await?;
        loop {
            match self.connection.receive().await? {
                Message::Reply(reply, result) if reply == id => {
                    let mut view = View::default();
                    view.apply(&result.map_err(Error::of_request)?);
                    return Ok(view);
                }
                Message::Reply(..) => {
                    return Err(self.connection.protocol(&"a reply to nothing that was asked"));
                }
                Message::Probe(answer) => self.connection.answer(&answer).await?,
                Message::Update(_) | Message::Other => {}
            }
        }
    }

    /// Waits for the next change, and takes it into the view with `apply`. A server that says nothing is asked whether it is
    /// there. Not cancel safe.
    ///
    /// # Errors
    /// Those of a connection.
    pub async fn next(&mut self) -> Result<Value, Error> {
        loop {
            let Ok(received) = timeout(LIMIT, self.connection.receive()).await else {
                if self.probe.is_some() {
                    return Err(self.connection.silent());
                }
                self.probe = Some(self.connection.request("echo", json!([])).await?);
                continue;
            };
            match received? {
                Message::Update(mut params) => {
                    // `params` is [the monitor's name, the tables].
                    return Ok(params.get_mut(1).map(Value::take).unwrap_or_default());
                }
                Message::Reply(id, _) if self.probe == Some(id) => self.probe = None,
                Message::Reply(..) => {
                    return Err(self.connection.protocol(&"a reply to nothing that was asked"));
                }
                Message::Probe(answer) => self.connection.answer(&answer).await?,
                Message::Other => {}
            }
        }
    }
}

impl View {
    /// Takes a change in. What it does not understand it leaves out: a column that is not there is not known.
    pub fn apply(&mut self, tables: &Value) {
        for (table, rows) in tables.as_object().into_iter().flatten() {
            for (uuid, change) in rows.as_object().into_iter().flatten() {
                let row = change.get("new").and_then(Value::as_object);
                let named = |row| Some((value::text(row, "name")?.to_owned(), row));
                match table.as_str() {
                    "Interface" => {
                        let row = row.and_then(named).map(|(name, row)| (name, Interface::from(row)));
                        self.interfaces.replace(uuid, row);
                    }
                    "Port" => self.ports.replace(uuid, row.and_then(named).map(|(name, _)| (name, ()))),
                    "Bridge" => {
                        let ports = |row| value::uuids(row, "ports").into_iter().collect();
                        self.bridges.replace(uuid, row.and_then(named).map(|(name, row)| (name, ports(row))));
                    }
                    "Open_vSwitch" => self.ovn_bridge = row.and_then(ovn_bridge),
                    _ => {}
                }
            }
        }
    }

    /// The interface of that name.
    pub fn interface(&self, name: &str) -> Option<&Interface> {
        self.interfaces.by_name(name)
    }

    /// The name of the bridge that the port of that name is in.
    pub fn bridge_of(&self, port: &str) -> Option<&str> {
        let uuid = self.ports.uuids.get(port)?;
        self.bridges.rows.values().find(|(_, ports)| ports.contains(uuid)).map(|(name, _)| name.as_str())
    }

    /// Whether there is a bridge of that name.
    pub fn has_bridge(&self, name: &str) -> bool {
        self.bridges.uuids.contains_key(name)
    }

    /// The bridge in which OVN makes logical ports out of ports with an `iface-id`, if OVN is set up on this host
    /// (ovn-controller(8)).
    pub fn ovn_bridge(&self) -> Option<&str> {
        self.ovn_bridge.as_deref()
    }
}

impl From<&Row> for Interface {
    fn from(row: &Row) -> Self {
        Self {
            ofport: value::integer(row, "ofport"),
            error: value::text(row, "error").map(Into::into),
            ifindex: value::integer(row, "ifindex"),
            // A port of DPDK's has 0 until it is set up.
            mtu: value::integer(row, "mtu").filter(|mtu| *mtu > 0),
            ovn_installed: value::pairs(row, "external_ids")
                .get("ovn-installed")
                .is_some_and(|set| set == "true"),
        }
    }
}

fn ovn_bridge(row: &Row) -> Option<String> {
    let mut ids = value::pairs(row, "external_ids");
    let is_set_up = ids.contains_key("ovn-remote");
    ids.remove("ovn-bridge").or_else(|| is_set_up.then(|| "br-int".into()))
}
