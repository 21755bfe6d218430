//! The rows of Open vSwitch's database, as they can be compared with those that os-vif's own plug-in leaves.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::Ovs;

/// What os-vif 5.3.0's plug-in `ovs` leaves of the VIF of [`crate::osvif`], by case, as JSON of RFC 7047.
const OS_VIF: &str = include_str!("os_vif.json");

/// Columns that are compared.
const TABLES: [(&str, &str); 4] = [
    ("Bridge", "name"),
    ("Interface", "name,type,options,external_ids,mtu_request"),
    ("Port", "name,tag,vlan_mode,trunks,qos"),
    ("QoS", "type,external_ids"),
];

/// The rows of each table, each as its columns.
pub type Rows = BTreeMap<String, Vec<BTreeMap<String, Value>>>;

/// The rows that os-vif's plug-in leaves in this case.
pub fn of_os_vif(case: &str) -> Result<Rows> {
    let mut cases: BTreeMap<String, Rows> = serde_json::from_str(OS_VIF)?;
    Ok(comparable(cases.remove(case).with_context(|| format!("no case {case}"))?))
}

impl Ovs {
    /// The rows that there are now.
    pub fn comparable_rows(&self) -> Result<Rows> {
        let read = |(table, columns): (&str, &str)| {
            let text = self.vsctl(&format!("--no-wait --format=json --columns={columns} list {table}"))?;
            let listed: Value = serde_json::from_str(&text)?;
            let headings: Vec<String> = serde_json::from_value(listed["headings"].clone())?;
            let rows: Vec<Vec<Value>> = serde_json::from_value(listed["data"].clone())?;
            let rows = rows.into_iter().map(|row| headings.iter().cloned().zip(row).collect());
            Ok((table.to_owned(), rows.collect()))
        };
        Ok(comparable(TABLES.into_iter().map(read).collect::<Result<_>>()?))
    }
}

/// In order, and without what differs for a reason: which datapath the machine has; the UUID of a row, which is there or not;
/// where a socket is; and mtu_request of a device in the kernel, which os-vif sets through the kernel only.
fn comparable(mut tables: Rows) -> Rows {
    for rows in tables.values_mut() {
        for row in rows.iter_mut() {
            row.remove("datapath_type");
            if row.get("type") == Some(&json!("")) {
                row.remove("mtu_request");
            }
            if let Some(qos) = row.get_mut("qos") {
                *qos = json!(qos[0] == "uuid");
            }
            if let Some(path) = row.get_mut("options").and_then(|options| options.pointer_mut("/1/0/1"))
                && path.as_str().is_some_and(|path| path.starts_with('/'))
            {
                *path = json!("a socket");
            }
        }
        rows.sort_by_cached_key(|row| format!("{row:?}"));
    }
    tables
}
