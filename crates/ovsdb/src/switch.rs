//! Bridges and ports of Open vSwitch, ensured and removed.
//!
//! The tables and columns are those of ovs-vswitchd.conf.db(5).

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use tracing::info;

use crate::plan::{self, BRIDGE_MARK, Found, PortSpec, bridge_operations, is_open, mutate, port_operations};
use crate::value::{self, Row};
use crate::{Client, Error};

/// For ovs-vswitchd to take up a port.
const APPLY_LIMIT: Duration = Duration::from_secs(6);
/// For it to let go of one. Should it take longer, the next port of that name waits for it.
const RELEASE_LIMIT: Duration = Duration::from_secs(2);
/// The same while it was late the last time: whoever removes many ports of a switch that does not run waits once.
const RELEASE_LIMIT_LATE: Duration = Duration::from_millis(50);
/// Attempts of a change that others get in the way of.
const ATTEMPTS: u32 = 5;

/// A running Open vSwitch.
#[derive(Debug)]
pub struct Switch {
    client: Client,
    /// The switch did not take up the last configuration that was waited for in time.
    is_late: AtomicBool,
}

/// The type of ports by which the switch is the back end of a vhost-user socket that it connects to.
pub const VHOST_USER: &str = "dpdkvhostuserclient";

/// What became of a change.
enum Commit {
    /// Made, as the configuration of this generation (`next_cfg`).
    Done(i64),
    /// Not made, because it does not fit what is there now; in the server's words.
    Lost(String),
}

impl Switch {
    /// Through this client.
    pub fn new(client: Client) -> Self {
        Self { client, is_late: AtomicBool::new(false) }
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
        Ok(self.datapath_type(bridge).await?.is_some())
    }

    /// What forwards for the bridge, as `system` or `netdev`; `None` if there is no such bridge.
    ///
    /// # Errors
    /// Those of a connection.
    pub async fn datapath_type(&self, bridge: &str) -> Result<Option<String>, Error> {
        let select = select("Bridge", &json!(["name", "==", bridge]), &["datapath_type"]);
        let answers = self.client.transact(vec![select], Duration::ZERO).await?;
        let bridge = answers.first().and_then(|answer| rows(answer).into_iter().next());
        Ok(Found { bridge, ..Found::default() }.datapath_type().map(Into::into))
    }

    /// Whether the switch has DPDK running, and with it ports of type `dpdkvhostuserclient`.
    ///
    /// # Errors
    /// Those of a connection.
    pub async fn has_vhost_user(&self) -> Result<bool, Error> {
        let columns = json!(["dpdk_initialized", "iface_types"]);
        let select = json!({"op": "select", "table": "Open_vSwitch", "where": [], "columns": columns});
        let answers = match self.client.transact(vec![select], Duration::ZERO).await {
            // Before Open vSwitch 2.10 there are no such columns.
            Err(Error::Refused { .. }) => return Ok(false),
            answers => answers?,
        };
        let root = answers.first().and_then(|answer| rows(answer).into_iter().next()).unwrap_or_default();
        Ok(value::flag(&root, "dpdk_initialized") == Some(true)
            && value::texts(&root, "iface_types").iter().any(|kind| kind == VHOST_USER))
    }

    /// Makes the bridge of such a port if it is not there. False if it was.
    ///
    /// # Errors
    /// [`Error::DatapathType`]; [`Error::Unapplied`]; those of a connection.
    pub async fn ensure_bridge(&self, spec: &PortSpec) -> Result<bool, Error> {
        let (bridge, mut cause) = (&spec.bridge, String::new());
        for _ in 0..ATTEMPTS {
            let (_, operations) = bridge_operations(&self.look("", bridge).await?, spec, 0)?;
            if operations.is_empty() {
                return Ok(false);
            }
            let generation = match self.commit(operations).await? {
                Commit::Done(generation) => generation,
                Commit::Lost(why) => {
                    cause = why;
                    continue;
                }
            };
            self.wait_until_applied(bridge, generation, APPLY_LIMIT).await?;
            info!(bridge, "Open vSwitch bridge made");
            return Ok(true);
        }
        Err(Error::Raced { port: bridge.clone(), cause })
    }

    /// Makes the bridge and the port if they are not there, corrects the columns that the spec names, and waits until the
    /// switch has the port open. False if nothing was changed.
    ///
    /// # Errors
    /// [`Error::DatapathType`], [`Error::OtherBridge`], [`Error::OtherOwner`], [`Error::LogicalPort`]; [`Error::Port`],
    /// [`Error::Unapplied`]: the rows stay then; those of a connection.
    pub async fn ensure_port(&self, spec: &PortSpec) -> Result<bool, Error> {
        self.ensure_ports(&[spec]).await
    }

    /// The same for ports that the switch has to take up at one time, all or none: a patch port whose peer comes later has an
    /// error that the switch may not look at again. They must not need one bridge that is not there.
    ///
    /// # Errors
    /// As [`ensure_port`](Self::ensure_port).
    pub async fn ensure_ports(&self, specs: &[&PortSpec]) -> Result<bool, Error> {
        let Some(first) = specs.first().map(|spec| spec.name.as_str()) else { return Ok(false) };
        let (mut changed, mut cause) = (false, String::new());
        for _ in 0..ATTEMPTS {
            let found = self.look_at(specs).await?;
            let both = || found.iter().zip(specs);
            let operations = both().enumerate().map(|(n, (found, spec))| port_operations(found, spec, n));
            let operations = operations.collect::<Result<Vec<_>, _>>()?.concat();
            let complete = found.iter().all(|found| found.port.is_some());
            // What is there of an incomplete pair goes first, as does what has another device open.
            let in_the_way = |(found, spec): &(&Found, &&PortSpec)| {
                found.port.is_some() && (found.is_stale(spec) || !complete)
            };
            if let Some((_, spec)) = both().find(in_the_way) {
                self.remove(&spec.bridge, &spec.name).await?;
                changed = true;
                continue;
            }
            if operations.is_empty() && both().all(|(found, spec)| is_open(found, spec).is_ok()) {
                return Ok(changed);
            }
            if !complete {
                for spec in specs {
                    self.free_logical_port(spec).await?;
                }
                // A port of this name that went just now has to be gone for the switch, too, before it comes again.
                let generation = found.iter().map(|found| found.generation).max().unwrap_or_default();
                self.wait_until_applied(first, generation, APPLY_LIMIT).await?;
            }
            changed |= !operations.is_empty();
            // Without operations it is asked for a sign: a port that is right, but not open, may be about to be.
            let generation = match self.commit(operations).await? {
                Commit::Done(generation) => generation,
                Commit::Lost(why) => {
                    cause = why;
                    continue;
                }
            };
            self.wait_until_applied(first, generation, APPLY_LIMIT).await?;
            let found = self.look_at(specs).await?;
            if found.iter().any(|found| found.interface.is_none()) {
                continue;
            }
            for (found, spec) in found.iter().zip(specs) {
                is_open(found, spec)?;
                info!(port = spec.name, bridge = spec.bridge, "port of Open vSwitch");
            }
            return Ok(changed);
        }
        Err(Error::Raced { port: first.into(), cause })
    }

    /// Removes the port if it is in the bridge and bears the plug's mark. False if it was not removed. The switch has let go
    /// of it when this returns, unless it does not answer.
    ///
    /// # Errors
    /// Those of a connection.
    pub async fn remove_port(&self, bridge: &str, name: &str, owner: &str) -> Result<bool, Error> {
        let found = self.look(name, bridge).await?;
        if found.port.is_none() && found.has_qos {
            // Somebody else removed the port, and left this.
            self.client.transact(vec![plan::delete_qos(name)], Duration::ZERO).await?;
        }
        if found.owner().as_deref() != Some(owner) || found.port_bridge.as_deref() != Some(bridge) {
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
        let select = select("Bridge", &json!(["name", "==", bridge]), &["_uuid", "ports", "external_ids"]);
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
        let Commit::Done(generation) = self.commit(operations).await? else { return Ok(false) };
        self.wait_until_released(bridge, generation).await?;
        info!(bridge, "Open vSwitch bridge removed");
        Ok(true)
    }

    async fn remove(&self, bridge: &str, name: &str) -> Result<(), Error> {
        let mut cause = String::new();
        for _ in 0..ATTEMPTS {
            let found = self.look(name, bridge).await?;
            let Some(port) = found.port.as_ref().and_then(|port| value::uuids(port, "_uuid").pop()) else {
                return Ok(());
            };
            match self.commit(plan::removal(bridge, name, &port)).await? {
                Commit::Done(generation) => return self.wait_until_released(name, generation).await,
                Commit::Lost(why) => cause = why,
            }
        }
        Err(Error::Raced { port: name.into(), cause })
    }

    /// Removes another port that an earlier plug has left under the same logical port: OVN would bind either.
    async fn free_logical_port(&self, spec: &PortSpec) -> Result<(), Error> {
        let Some(iface_id) = spec.external_ids.get("iface-id") else { return Ok(()) };
        let whose = json!(["external_ids", "includes", value::map([("iface-id", iface_id.as_str())])]);
        let answers =
            self.client.transact(vec![select("Interface", &whose, &["name"])], Duration::ZERO).await?;
        for row in answers.first().map(rows).unwrap_or_default() {
            let Some(port) = value::text(&row, "name").filter(|name| *name != spec.name) else { continue };
            let found = self.look(port, "").await?;
            match (found.owner(), found.port_bridge) {
                (Some(owner), Some(bridge)) => {
                    self.remove(&bridge, port).await?;
                    info!(port, bridge, owner, iface_id, "port of Open vSwitch that was left removed");
                }
                _ => return Err(Error::LogicalPort { iface_id: iface_id.clone(), port: port.into() }),
            }
        }
        Ok(())
    }

    async fn look_at(&self, specs: &[&PortSpec]) -> Result<Vec<Found>, Error> {
        let mut found = Vec::with_capacity(specs.len());
        for spec in specs {
            found.push(self.look(&spec.name, &spec.bridge).await?);
        }
        Ok(found)
    }

    async fn look(&self, port: &str, bridge: &str) -> Result<Found, Error> {
        let named = |name: &str| json!(["name", "==", name]);
        let interface =
            ["_uuid", "type", "options", "external_ids", "mtu_request", "ofport", "error", "ifindex"];
        let operations = vec![
            select("Bridge", &named(bridge), &["_uuid", "datapath_type"]),
            select("Port", &named(port), &["_uuid", "external_ids"]),
            select("Interface", &named(port), &interface),
            select("QoS", &plan::of_port(port), &["_uuid"]),
            json!({"op": "select", "table": "Open_vSwitch", "where": [], "columns": ["next_cfg"]}),
        ];
        let answers = self.client.transact(operations, Duration::ZERO).await?;
        let mut first = answers.iter().map(|answer| rows(answer).into_iter().next());
        let mut next = || first.next().flatten();
        let mut found = Found { bridge: next(), port: next(), interface: next(), ..Found::default() };
        found.has_qos = next().is_some();
        found.generation = next().and_then(|root| value::integer(&root, "next_cfg")).unwrap_or_default();
        if let Some(uuid) = found.port.as_ref().and_then(|port| value::uuids(port, "_uuid").pop()) {
            let whose = json!(["ports", "includes", value::set([value::uuid(&uuid)])]);
            let holder = select("Bridge", &whose, &["name"]);
            let answers = self.client.transact(vec![holder], Duration::ZERO).await?;
            let holder = answers.first().and_then(|answer| rows(answer).into_iter().next());
            found.port_bridge = holder.and_then(|row| value::text(&row, "name").map(Into::into));
        }
        Ok(found)
    }

    /// Makes a change that the switch is to take up.
    async fn commit(&self, mut operations: Vec<Value>) -> Result<Commit, Error> {
        operations.push(mutate("Open_vSwitch", &[], "next_cfg", "+=", &json!(1)));
        operations
            .push(json!({"op": "select", "table": "Open_vSwitch", "where": [], "columns": ["next_cfg"]}));
        let answers = match self.client.transact(operations, Duration::ZERO).await {
            Ok(answers) => answers,
            // A name that is there already, a reference to a row that is gone; a guard that does not hold any more.
            Err(Error::Refused { error, details })
                if ["constraint violation", "referential integrity violation", "timed out"]
                    .contains(&error.as_str()) =>
            {
                return Ok(Commit::Lost(format!("{error}: {details}")));
            }
            Err(error) => return Err(error),
        };
        let root = answers.iter().rev().find_map(|answer| rows(answer).into_iter().next());
        Ok(Commit::Done(root.and_then(|root| value::integer(&root, "next_cfg")).unwrap_or_default()))
    }

    /// Waits until the switch has taken up the configuration of this generation (`cur_cfg`). The server does the waiting
    /// (RFC 7047 §5.2.6).
    async fn wait_until_applied(&self, port: &str, generation: i64, limit: Duration) -> Result<(), Error> {
        let timeout = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
        let wait = json!({"op": "wait", "table": "Open_vSwitch", "where": [["cur_cfg", ">=", generation]],
                          "until": "!=", "columns": ["_uuid"], "rows": [], "timeout": timeout});
        let applied = match self.client.transact(vec![wait], limit).await {
            Ok(_) => Ok(()),
            Err(Error::Refused { error, .. }) if error == "timed out" => {
                Err(Error::Unapplied { port: port.into(), limit })
            }
            Err(error) => Err(error),
        };
        self.is_late.store(matches!(applied, Err(Error::Unapplied { .. })), Ordering::Relaxed);
        applied
    }

    /// The same for something that was removed: a switch that does not run has let go of everything.
    async fn wait_until_released(&self, name: &str, generation: i64) -> Result<(), Error> {
        let limit = if self.is_late.load(Ordering::Relaxed) { RELEASE_LIMIT_LATE } else { RELEASE_LIMIT };
        match self.wait_until_applied(name, generation, limit).await {
            Err(Error::Unapplied { .. }) => Ok(()),
            applied => applied,
        }
    }
}

/// The operation that gives these columns of the rows for which a condition holds.
fn select(table: &str, whose: &Value, columns: &[&str]) -> Value {
    json!({"op": "select", "table": table, "where": [whose], "columns": columns})
}

fn rows(answer: &Row) -> Vec<Row> {
    let rows = answer.get("rows").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    rows.iter().filter_map(|row| row.as_object().cloned()).collect()
}
