//! Which plugs there are, and whether another may be.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::Duration;

use dataplane::PortId;
use tokio::sync::OwnedMutexGuard;
use tokio::time::Instant;

use super::PlugError;
use super::repair::Repairs;
use crate::names::Name;
use crate::spec::{PlugSpec, Socket, To};
use crate::status::Whose;
use crate::store::{Intent, Record};

/// Plugs of one daemon.
const PLUGS_MAX: usize = 4096;

/// The plugs, and whose turn it is to change which.
pub(super) struct Table {
    entries: Mutex<BTreeMap<Name, Entry>>,
    turns: Mutex<HashMap<Name, Weak<tokio::sync::Mutex<()>>>>,
    /// Plugs that something in the background goes on with.
    retrying: Mutex<HashSet<Name>>,
}

struct Entry {
    record: Record,
    /// Its ports in the dataplane, once it has them.
    ports: Option<Vec<PortId>>,
    fault: Option<Fault>,
    repairs: Repairs,
}

impl Entry {
    fn new(record: Record) -> Self {
        Self { record, ports: None, fault: None, repairs: Repairs::default() }
    }
}

/// Why the last attempt failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Fault {
    pub(super) whose: Whose,
    pub(super) message: String,
}

/// All plugs but one that are wanted, however far they have come.
pub(super) struct Others<'a> {
    table: &'a Table,
    id: &'a Name,
}

impl Others<'_> {
    /// Whether one of them is so.
    pub(super) fn any(&self, is_so: impl Fn(&PlugSpec) -> bool) -> bool {
        let wanted = |entry: &Entry| entry.record.intent == Intent::Plugged && is_so(&entry.record.spec);
        self.table.entries().iter().any(|(id, entry)| id != self.id && wanted(entry))
    }
}

/// What may be done with a plug that is asked for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Admission {
    /// It is there, just so.
    Present,
    /// It is known, just so, but its steps have not all succeeded.
    Unfinished,
    /// Nobody has it, and nothing is in its way.
    New,
}

impl Table {
    pub(super) fn new(records: Vec<(Name, Record)>) -> Self {
        let entries = records.into_iter().map(|(id, record)| (id, Entry::new(record))).collect();
        Self { entries: Mutex::new(entries), turns: Mutex::default(), retrying: Mutex::default() }
    }

    fn entries(&self) -> MutexGuard<'_, BTreeMap<Name, Entry>> {
        self.entries.lock().expect("no holder of the table's lock panics")
    }

    /// Waits until nobody else changes this plug, and keeps others waiting until the guard is dropped.
    pub(super) async fn turn(&self, id: &Name) -> OwnedMutexGuard<()> {
        let turn = {
            let mut turns = self.turns.lock().expect("no holder of the turns' lock panics");
            turns.retain(|_, turn| turn.strong_count() > 0);
            turns.get(id).and_then(Weak::upgrade).unwrap_or_else(|| {
                let turn = Arc::default();
                turns.insert(id.clone(), Arc::downgrade(&turn));
                turn
            })
        };
        turn.lock_owned().await
    }

    pub(super) fn ids(&self) -> Vec<Name> {
        self.entries().keys().cloned().collect()
    }

    pub(super) fn look(&self, id: &Name) -> Option<(Record, Option<Vec<PortId>>, Option<Fault>)> {
        self.entries().get(id).map(|e| (e.record.clone(), e.ports.clone(), e.fault.clone()))
    }

    /// The other plugs that are wanted.
    pub(super) fn others<'a>(&'a self, id: &'a Name) -> Others<'a> {
        Others { table: self, id }
    }

    /// Whether a plug may be.
    pub(super) fn examine(&self, id: &Name, spec: &PlugSpec) -> Result<Admission, PlugError> {
        examine(&self.entries(), id, spec)
    }

    /// Decides whether a plug may be, and if it is new, takes its place, in one go.
    pub(super) fn admit(&self, id: &Name, spec: &PlugSpec) -> Result<Admission, PlugError> {
        let mut entries = self.entries();
        let admission = examine(&entries, id, spec)?;
        if admission == Admission::New {
            let record = Record::new(Intent::Plugged, spec.clone());
            entries.insert(id.clone(), Entry::new(record));
        }
        Ok(admission)
    }

    pub(super) fn remove(&self, id: &Name) {
        self.entries().remove(id);
    }

    pub(super) fn attached(&self, id: &Name, ports: Vec<PortId>) {
        self.change(id, |entry| entry.ports = Some(ports));
    }

    /// Every step has succeeded.
    pub(super) fn settled(&self, id: &Name) {
        self.change(id, |entry| entry.fault = None);
    }

    /// Those of which every step has succeeded, and that are so.
    pub(super) fn settled_plugs(&self, is_so: impl Fn(&Name, &PlugSpec) -> bool) -> Vec<Name> {
        let is_settled = |entry: &Entry| {
            entry.record.intent == Intent::Plugged && entry.ports.is_some() && entry.fault.is_none()
        };
        let entries = self.entries();
        let found = entries.iter().filter(|(id, entry)| is_settled(entry) && is_so(id, &entry.record.spec));
        found.map(|(id, _)| id.clone()).collect()
    }

    /// What somebody else had done was put right.
    pub(super) fn repaired(&self, id: &Name) {
        self.change(id, |entry| entry.repairs.add(Instant::now()));
    }

    /// How long to wait before that is done again, if it is done too often.
    pub(super) fn pause_before_repair(&self, id: &Name) -> Option<Duration> {
        self.entries().get(id)?.repairs.pause(Instant::now())
    }

    /// The ports that it had.
    pub(super) fn detached(&self, id: &Name) -> Vec<PortId> {
        self.entries().get_mut(id).and_then(|entry| entry.ports.take()).unwrap_or_default()
    }

    pub(super) fn unplugging(&self, id: &Name) {
        self.change(id, |entry| {
            if std::mem::replace(&mut entry.record.intent, Intent::Unplugged) == Intent::Plugged {
                entry.fault = None;
            }
        });
    }

    /// True if it failed for another reason, or for none, before.
    pub(super) fn failed(&self, id: &Name, fault: Fault) -> bool {
        let mut entries = self.entries();
        let Some(entry) = entries.get_mut(id) else { return false };
        let fault = Some(fault);
        let news = entry.fault != fault;
        entry.fault = fault;
        news
    }

    /// False if something goes on with it already. Both ends hold the plug's turn, so that neither misses the other.
    pub(super) fn begin_retrying(&self, id: &Name) -> bool {
        self.retrying().insert(id.clone())
    }

    pub(super) fn end_retrying(&self, id: &Name) {
        self.retrying().remove(id);
    }

    fn retrying(&self) -> MutexGuard<'_, HashSet<Name>> {
        self.retrying.lock().expect("no holder of this lock panics")
    }

    fn change(&self, id: &Name, change: impl FnOnce(&mut Entry)) {
        if let Some(entry) = self.entries().get_mut(id) {
            change(entry);
        }
    }
}

fn examine(entries: &BTreeMap<Name, Entry>, id: &Name, spec: &PlugSpec) -> Result<Admission, PlugError> {
    if let Some(entry) = entries.get(id).filter(|e| e.record.intent == Intent::Plugged) {
        let fields = entry.record.spec.differences(spec);
        return match (fields.is_empty(), &entry.ports, &entry.fault) {
            (false, ..) => Err(PlugError::Differs { id: id.clone(), fields }),
            (true, Some(_), None) => Ok(Admission::Present),
            (true, ..) => Ok(Admission::Unfinished),
        };
    }
    if entries.len() >= PLUGS_MAX {
        return Err(PlugError::Full(PLUGS_MAX));
    }
    for (owner, entry) in entries.iter().filter(|(owner, _)| *owner != id) {
        if let Some((what, field)) = shared(id, spec, owner, &entry.record.spec) {
            return Err(PlugError::Taken { what, owner: owner.clone(), field });
        }
    }
    Ok(Admission::New)
}

/// What two plugs would share though only one can have it.
fn shared(id: &Name, spec: &PlugSpec, other: &Name, theirs: &PlugSpec) -> Option<(String, &'static str)> {
    // A front end and a back end on one socket are a cable between two networks.
    let end = |s: Socket| (s.path, s.role.is_front_end());
    if let Some((path, _)) = spec.sockets().map(end).find(|ours| theirs.sockets().any(|s| end(s) == *ours)) {
        return Some((format!("socket {path}"), "spec.socket.path"));
    }
    let iface_id = |spec: &PlugSpec| spec.ovs().and_then(|ovs| ovs.iface_id.clone());
    if let (Some(iface_id), true) = (iface_id(spec), iface_id(spec) == iface_id(theirs)) {
        return Some((format!("logical port {iface_id}"), "spec.to.iface_id"));
    }
    let device = |spec: &PlugSpec| spec.device().and_then(|device| device.address);
    if let (Some(device), true) = (device(spec), device(spec) == device(theirs)) {
        return Some((format!("PCI device {device}"), "spec.to.address"));
    }
    let tap = |spec: &PlugSpec, id| spec.to.as_ref().map(|to: &To| to.tap(id));
    if let (Some(tap), true) = (tap(spec, id), tap(spec, id) == tap(theirs, other)) {
        return Some((format!("TAP {tap}"), "spec.to.tap"));
    }
    if spec.is_uplink() && theirs.is_uplink() && spec.network == theirs.network {
        return Some((format!("the uplink of network {}", spec.network_of(id)), "spec.network"));
    }
    None
}
