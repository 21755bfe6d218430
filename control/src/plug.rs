//! A plug's way into the dataplane and out again. The one file that knows both what a plug is and what a port is.
//!
//! ```text
//! plug    admit → store the intent → TAP, bridge → ports → Open vSwitch    any step fails: undo the ones before it
//! unplug  store the intent → ports → Open vSwitch, TAP, bridge → forget    driven by the record; nothing there is success
//! start   for each record: the same steps, tried until they succeed
//! ```
//!
//! A step that somebody else undoes later, to a link or a device of the host or in Open vSwitch's database, is taken again and
//! told as an event.
//!
//! What cannot be finished, a stored plug that does not come back or an unplug that fails half-way, keeps its record,
//! says so, and is tried again in the background until it succeeds. A start goes on with it.
//!
//! What one plug does is serialised by its turn; different plugs do not wait for one another. Whether a plug may be at
//! all (a name, socket, TAP or uplink that is taken) is decided in one short critical section over the table of plugs,
//! before anything is done. An admitted request runs to its end even if whoever asked goes away.

mod announce;
mod association;
mod bridge;
mod device;
mod error;
mod links;
mod macvtap;
mod ovs;
mod plan;
mod repair;
mod steps;
mod table;
mod tap;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use dataplane::Dataplane;
use hostnet::HostNet;
use tokio::time::Instant;

pub use self::error::StepError;
pub use self::steps::SocketRules;
use self::steps::Steps;
use self::table::{Admission, Fault, Table};
use crate::config::{DevicesConfig, OvsConfig};
use crate::events::{EventKind, Events};
use crate::names::Name;
use crate::spec::{PlugSpec, SpecError};
use crate::status::{Condition, Phase, Plug, Status, Whose};
use crate::store::{Intent, Record, Store, StoreError};

/// How often a waiter looks, at most: not every step of a port is an event.
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// First and longest pause between two attempts at what could not be finished.
const RETRY_FIRST: Duration = Duration::from_millis(100);
const RETRY_LONGEST: Duration = Duration::from_secs(10);

/// Why a plug cannot be made, undone or waited for.
#[derive(Debug, thiserror::Error)]
pub enum PlugError {
    /// The spec itself.
    #[error("{0}")]
    Spec(#[from] SpecError),
    /// It is there and differs.
    #[error("plug {id} exists and differs in {}", fields.join(", "))]
    Differs {
        /// Which plug.
        id: Name,
        /// In what, as `socket.path`.
        fields: Vec<String>,
    },
    /// Another plug has something that this one needs alone.
    #[error("{what} belongs to plug {owner} already")]
    Taken {
        /// What it is, as `socket /run/x.sock`.
        what: String,
        /// The other plug.
        owner: Name,
        /// Member of the spec that asks for it.
        field: &'static str,
    },
    /// No more.
    #[error("there are {0} plugs, more are not possible")]
    Full(usize),
    /// The record cannot be written.
    #[error("{0}")]
    Store(#[from] StoreError),
    /// A step failed; the ones before it were undone.
    #[error("plug {id}: {cause}")]
    Step {
        /// Which plug.
        id: Name,
        /// What failed.
        cause: StepError,
    },
    /// An unplug that goes on in the background.
    #[error("plug {id} is being unplugged, which is tried again until it succeeds: {cause}")]
    Unfinished {
        /// Which plug.
        id: Name,
        /// Who has to do something about it.
        whose: Whose,
        /// What failed.
        cause: String,
    },
    /// Not there.
    #[error("there is no plug {0}")]
    NotFound(Name),
    /// The state waited for did not come.
    #[error("plug {id} is {}, not {} after {}: {reason}", status.phase.name(), wanted.name(), duration_text(*after))]
    Waiting {
        /// Which plug.
        id: Name,
        /// How it is.
        status: Status,
        /// What was waited for.
        wanted: Phase,
        /// How long.
        after: Duration,
        /// The first missing step.
        reason: String,
    },
}

/// A duration as people write it, `10s` or `250ms`.
pub fn duration_text(duration: Duration) -> String {
    if duration.subsec_millis() == 0 {
        format!("{}s", duration.as_secs())
    } else {
        format!("{}ms", duration.as_millis())
    }
}

impl From<&StepError> for Fault {
    fn from(error: &StepError) -> Self {
        Self { whose: error.whose(), message: error.to_string() }
    }
}

impl From<StepError> for Fault {
    fn from(error: StepError) -> Self {
        Self::from(&error)
    }
}

impl From<StoreError> for Fault {
    fn from(error: StoreError) -> Self {
        Self { whose: Whose::Host, message: error.to_string() }
    }
}

/// All plugs of this host.
pub struct Plugs {
    table: Table,
    steps: Steps,
    store: Store,
    events: Arc<Events>,
}

/// What a request to plug did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It is new.
    Created,
    /// It was there as asked.
    Unchanged,
}

impl Plugs {
    /// The plugs in a store; none of them is in the dataplane before [`restore`](Self::restore).
    pub fn new(
        dataplane: Arc<Dataplane>,
        host: HostNet,
        configs: (OvsConfig, DevicesConfig),
        rules: SocketRules,
        (store, records): (Store, Vec<(Name, Record)>),
        events: Arc<Events>,
    ) -> Self {
        Self { table: Table::new(records), steps: Steps::new(dataplane, host, configs, rules), store, events }
    }

    /// Makes a plug, or finds it made.
    pub async fn plug(self: &Arc<Self>, id: Name, spec: PlugSpec) -> Result<Outcome, PlugError> {
        let spec = spec.completed(&id)?;
        let plugs = self.clone();
        // A task of its own: the steps go on if the connection that asked is closed half-way.
        let task = tokio::spawn(async move { plugs.plug_in_turn(&id, spec).await });
        task.await.expect("the steps of a plug do not panic")
    }

    /// What [`plug`](Self::plug) would say before it does anything, and the steps that it would take then.
    pub async fn plug_dry(&self, id: &Name, spec: PlugSpec) -> Result<(Outcome, Plug), PlugError> {
        let spec = self.resolved(id, spec.completed(id)?).await?;
        if self.table.examine(id, &spec)? == Admission::Present {
            return Ok((Outcome::Unchanged, self.show(id)?));
        }
        let step = |cause| PlugError::Step { id: id.clone(), cause };
        let steps = self.steps.plan(id, &spec).await.map_err(step)?;
        let status = Status::pending(Whose::Vhostd, "dry run: not plugged");
        Ok((Outcome::Created, Plug { id: id.clone(), spec, status, steps }))
    }

    /// Undoes a plug. False if there is none.
    pub async fn unplug(self: &Arc<Self>, id: Name) -> Result<bool, PlugError> {
        let plugs = self.clone();
        let task = tokio::spawn(async move { plugs.unplug_in_turn(&id).await });
        task.await.expect("the steps of an unplug do not panic")
    }

    /// One plug.
    pub fn show(&self, id: &Name) -> Result<Plug, PlugError> {
        let (record, ports, fault) = self.table.look(id).ok_or_else(|| PlugError::NotFound(id.clone()))?;
        let status = match (record.intent, fault) {
            (Intent::Unplugged, None) => Status::pending(Whose::Vhostd, "being unplugged"),
            (Intent::Unplugged, Some(fault)) => {
                let message = format!("being unplugged, will be tried again: {}", fault.message);
                Status::pending(fault.whose, message)
            }
            (Intent::Plugged, fault) => match (ports, fault) {
                (Some(ports), None) => self.steps.status(id, &record.spec, &ports),
                (Some(ports), Some(Fault { whose, message })) => {
                    let status = self.steps.status(id, &record.spec, &ports);
                    let is_said = status.conditions.iter().any(|condition| condition.message == message);
                    let missing = Condition { phase: Phase::Forwarding, whose, message };
                    if is_said { status } else { status.and(vec![missing]) }
                }
                (None, Some(fault)) => Status::pending(fault.whose, fault.message),
                (None, None) => Status::pending(Whose::Vhostd, "being plugged"),
            },
        };
        Ok(Plug { id: id.clone(), spec: record.spec, status, steps: Vec::new() })
    }

    /// All plugs, by name.
    pub fn list(&self) -> Vec<Plug> {
        self.table.ids().iter().filter_map(|id| self.show(id).ok()).collect()
    }

    /// Number of plugs.
    pub fn count(&self) -> usize {
        self.table.ids().len()
    }

    /// Waits until a plug has come as far as `wanted`, for so long since it was asked for: what it takes to make it counts.
    pub async fn wait(
        &self,
        id: &Name,
        wanted: Phase,
        timeout: Duration,
        asked: Instant,
    ) -> Result<Plug, PlugError> {
        let deadline = asked + timeout;
        let mut changes = self.events.subscribe();
        loop {
            let plug = self.show(id)?;
            if plug.status.phase >= wanted {
                return Ok(plug);
            }
            if Instant::now() >= deadline {
                let reason = plug.status.conditions.first().map_or_else(String::new, |c| c.message.clone());
                let (id, status) = (plug.id, plug.status);
                return Err(PlugError::Waiting { id, status, wanted, after: timeout, reason });
            }
            let look = deadline.min(Instant::now() + LOOK_EVERY);
            let _ = tokio::time::timeout_at(look, changes.changed()).await;
        }
    }

    /// Brings every stored plug back, and returns when each has been tried once. Those that fail are tried again in
    /// the background until they succeed or are unplugged.
    pub async fn restore(self: &Arc<Self>) {
        let restore_one = |id| {
            let plugs = self.clone();
            async move {
                let _turn = plugs.table.turn(&id).await;
                if !plugs.go_on(&id).await {
                    plugs.retry(&id);
                }
            }
        };
        let tasks: Vec<_> = self.table.ids().into_iter().map(|id| tokio::spawn(restore_one(id))).collect();
        for task in tasks {
            task.await.expect("restoring a plug does not panic");
        }
    }

    /// Goes on with a plug in the background until nothing is left to do. The caller has its turn.
    fn retry(self: &Arc<Self>, id: &Name) {
        self.retry_after(id, RETRY_FIRST);
    }

    fn retry_after(self: &Arc<Self>, id: &Name, mut pause: Duration) {
        if !self.table.begin_retrying(id) {
            return;
        }
        let (plugs, id) = (self.clone(), id.clone());
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(pause).await;
                let _turn = plugs.table.turn(&id).await;
                if plugs.go_on(&id).await {
                    return plugs.table.end_retrying(&id);
                }
                pause = (pause * 2).min(RETRY_LONGEST);
            }
        });
    }

    /// Takes the steps that are left for a plug. True when there are none any more. The caller has its turn.
    async fn go_on(self: &Arc<Self>, id: &Name) -> bool {
        let Some((record, ..)) = self.table.look(id) else { return true };
        let done = match record.intent {
            Intent::Plugged => self.attach(id, &record.spec).await.map_err(Fault::from),
            Intent::Unplugged => self.detach_and_forget(id, &record.spec).await,
        };
        let finished = done.is_ok();
        if let Err(fault) = done {
            self.failed(id, fault);
        } else if record.intent == Intent::Unplugged {
            self.unplugged(id);
        }
        finished
    }

    async fn plug_in_turn(self: &Arc<Self>, id: &Name, spec: PlugSpec) -> Result<Outcome, PlugError> {
        let _turn = self.table.turn(id).await;
        // An unplug that could not be finished is in the way of anything new under this name.
        if let Some((Record { intent: Intent::Unplugged, spec: old, .. }, ..)) = self.table.look(id) {
            self.undo(id, &old).await?;
            self.unplugged(id);
        }
        let held = self.steps.hold_devices(&spec).await;
        let spec = self.resolved(id, spec).await?;
        let admission = self.table.admit(id, &spec)?;
        drop(held);
        let step = |cause| PlugError::Step { id: id.clone(), cause };
        match admission {
            Admission::Present => return Ok(Outcome::Unchanged),
            Admission::Unfinished => {
                let attached = self.attach(id, &spec).await;
                attached.inspect_err(|cause| self.failed(id, cause.into())).map_err(step)?;
            }
            Admission::New => {
                if let Err(error) = self.store.put(id, Record::new(Intent::Plugged, spec.clone())).await {
                    self.table.remove(id);
                    return Err(error.into());
                }
                if let Err(cause) = self.attach(id, &spec).await {
                    self.table.unplugging(id);
                    // What matters to the caller is why there is no plug; what is left of it is not theirs to clear away.
                    let _ = self.undo(id, &spec).await;
                    return Err(step(cause));
                }
            }
        }
        tracing::info!(plug = %id, "plugged");
        self.events.publish(EventKind::Plugged, Some(id.as_str()), "");
        Ok(Outcome::Created)
    }

    /// The spec with what it leaves to us filled in: from the record, or for a new plug as things are now.
    async fn resolved(&self, id: &Name, spec: PlugSpec) -> Result<PlugSpec, PlugError> {
        match self.table.look(id) {
            Some((record, ..)) if record.intent == Intent::Plugged => Ok(spec.keeping(&record.spec)),
            _ => {
                let failed = |cause| PlugError::Step { id: id.clone(), cause };
                self.steps.resolve(id, spec).await.map_err(failed)
            }
        }
    }

    async fn unplug_in_turn(self: &Arc<Self>, id: &Name) -> Result<bool, PlugError> {
        let _turn = self.table.turn(id).await;
        let Some((record, ..)) = self.table.look(id) else { return Ok(false) };
        self.store.put(id, Record::new(Intent::Unplugged, record.spec.clone())).await?;
        self.table.unplugging(id);
        self.undo(id, &record.spec).await?;
        self.unplugged(id);
        Ok(true)
    }

    /// Takes the steps that have not succeeded yet, and again those that somebody else has undone.
    async fn attach(self: &Arc<Self>, id: &Name, spec: &PlugSpec) -> Result<(), StepError> {
        self.watch_over(spec);
        let attached = self.table.look(id).and_then(|(_, ports, _)| ports);
        let again = attached.is_some();
        let (ports, mut mended) = match attached {
            Some(ports) => self.steps.mend(id, spec, ports).await?,
            None => (self.steps.attach(id, spec).await?, Vec::new()),
        };
        self.table.attached(id, ports.clone());
        if self.steps.join(id, spec, &ports).await? && again {
            mended.push("it is not in Open vSwitch as it was".to_owned());
        }
        if !mended.is_empty() {
            let message = format!("put right what somebody else had done: {}", mended.join("; "));
            tracing::warn!(plug = %id, "{message}");
            self.events.publish(EventKind::Repaired, Some(id.as_str()), message);
            self.table.repaired(id);
        }
        self.table.settled(id);
        Ok(())
    }

    /// Undoes a plug whose intent says so, if not now then in the background.
    async fn undo(self: &Arc<Self>, id: &Name, spec: &PlugSpec) -> Result<(), PlugError> {
        let Err(fault) = self.detach_and_forget(id, spec).await else { return Ok(()) };
        let Fault { whose, message } = fault.clone();
        self.failed(id, fault);
        self.retry(id);
        Err(PlugError::Unfinished { id: id.clone(), whose, cause: message })
    }

    async fn detach_and_forget(&self, id: &Name, spec: &PlugSpec) -> Result<(), Fault> {
        let _held = self.steps.hold_devices(spec).await;
        self.steps.detach(id, spec, self.table.detached(id), &self.table.others(id)).await?;
        self.store.delete(id).await?;
        self.table.remove(id);
        Ok(())
    }

    fn unplugged(&self, id: &Name) {
        tracing::info!(plug = %id, "unplugged");
        self.events.publish(EventKind::Unplugged, Some(id.as_str()), "");
    }

    /// Notes why a plug is not finished, and tells once a reason, not once an attempt.
    fn failed(&self, id: &Name, fault: Fault) {
        let message = fault.message.clone();
        if self.table.failed(id, fault) {
            tracing::warn!(plug = %id, "{message}; will try again");
            self.events.publish(EventKind::Failed, Some(id.as_str()), message);
        }
    }
}
