//! A whole dataplane in this process: sessions, workers, networks, and what it says of itself.
//!
//! Threads, descriptors and mappings belong to the process, so one [`Plane`] at a time: [`Plane::start`] waits for
//! the one before it. [`Census`] counts what must be the same afterwards.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use dataplane::{
    Config, Counters, Dataplane, DropReason, Event, EventKind, Link, Policy, Poll, PortId, PortReport,
    PortSpec,
};
use tempfile::TempDir;
use vhost_user::Endpoint;

use crate::deadline::{wait_for, wait_for_some};
use crate::peer::{Peer, PeerConfig};

/// How long the dataplane has for what takes it microseconds: the machine may be busy.
pub const SOON: Duration = Duration::from_secs(20);
/// Addresses that a guest may teach.
pub const FDB_MAX: u32 = 256;

/// `part`, or `whole` when the environment has `VHOSTD_SOAK` (`make soak`).
pub fn count(part: u64, whole: u64) -> u64 {
    if std::env::var_os("VHOSTD_SOAK").is_some() { whole } else { part }
}

/// Between two looks of [`until`].
const LOOK: Duration = Duration::from_micros(100);

/// Waits until `condition` holds, as [`wait_for`] does, but looks often: what workers do takes microseconds.
pub fn until(what: &str, mut condition: impl FnMut() -> bool) -> Result<()> {
    let began = Instant::now();
    while began.elapsed() < SOON {
        if condition() {
            return Ok(());
        }
        std::thread::sleep(LOOK);
    }
    wait_for(what, Duration::ZERO, condition)
}

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// A running dataplane with its sockets in a directory of its own.
pub struct Plane {
    // In the order in which they go.
    dataplane: Dataplane,
    events: Arc<Mutex<Vec<Event>>>,
    dir: TempDir,
    /// Before it was there.
    before: Census,
    alone: MutexGuard<'static, ()>,
}

/// A port to be added.
#[derive(Clone, Copy, Debug)]
pub struct PortPlan<'a> {
    /// Its name, and its socket's.
    pub name: &'a str,
    /// The network it joins.
    pub network: &'a str,
    /// Largest payload of an Ethernet frame, bytes.
    pub mtu: u16,
    /// Queue pairs that may be used.
    pub queue_pairs: u16,
    /// The guest's address, if the port knows it.
    pub mac: Option<[u8; 6]>,
    /// What the guest may say that it is.
    pub policy: Option<&'a Policy>,
}

impl<'a> PortPlan<'a> {
    /// A port as most are.
    pub fn new(name: &'a str, network: &'a str) -> Self {
        Self { name, network, mtu: 1500, queue_pairs: 4, mac: None, policy: None }
    }
}

impl Plane {
    /// Starts two workers that sleep when there is nothing to do.
    pub fn start() -> Result<Self> {
        Self::with_poll(Poll::Adaptive)
    }

    /// Starts two workers.
    pub fn with_poll(poll: Poll) -> Result<Self> {
        // A test that failed leaves nothing behind that a later one could find.
        let alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let before = Census::take()?;
        let events: Arc<Mutex<Vec<Event>>> = Arc::default();
        let log = events.clone();
        let cpus = std::thread::available_parallelism()?.get().min(2);
        let dataplane = Dataplane::start(Config {
            cpus: (0..cpus).collect(),
            poll,
            ageing: Duration::from_secs(300),
            fdb_port_max: FDB_MAX,
            on_event: Box::new(move |event| {
                log.lock().unwrap_or_else(PoisonError::into_inner).push(event);
            }),
        })?;
        // A thread has its name, and what it opens, when it first runs: a census must not come before that.
        until("the threads", || {
            let named = Census::take().is_ok_and(|census| census.threads == cpus + 1);
            named && dataplane.heartbeats().iter().all(|beats| *beats != 0)
        })?;
        let dir = tempfile::tempdir().context("a directory for the sockets")?;
        Ok(Self { dataplane, events, dir, before, alone })
    }

    /// Ends it. Fails if anything is left behind in this process.
    pub fn finish(self) -> Result<()> {
        let Self { dataplane, events, dir, before, alone } = self;
        drop((dataplane, events, dir));
        let outcome = before.expect_back();
        drop(alone);
        outcome
    }

    /// The dataplane itself.
    pub fn dataplane(&self) -> &Dataplane {
        &self.dataplane
    }

    /// Where the socket of a port is.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Adds a port that listens.
    pub fn add(&self, plan: PortPlan<'_>) -> Result<PortId> {
        let endpoint = Endpoint::listen(self.path(plan.name));
        let PortPlan { mac, queue_pairs, policy, .. } = plan;
        let link = Link::VhostUser { endpoint, mac, queue_pairs, policy: policy.cloned() };
        let (name, network) = (plan.name.into(), plan.network.into());
        Ok(self.dataplane.add_port(PortSpec { name, network, mtu: plan.mtu, link })?)
    }

    /// Connects a guest to a port and offers its buffers. Its rings run when this returns.
    pub fn guest(&self, name: &str, config: PeerConfig) -> Result<Peer> {
        let mut peer = Peer::connect(self.path(name), config)?;
        peer.offer_all();
        Ok(peer)
    }

    /// What a port says now.
    pub fn port(&self, id: PortId) -> Result<PortReport> {
        self.dataplane.port(id).with_context(|| format!("port {} is gone", id.0))
    }

    /// Counters of a port.
    pub fn counters(&self, id: PortId) -> Result<Counters> {
        Ok(self.port(id)?.counters)
    }

    /// Waits until the counters of a port are these, drops in any order.
    pub fn expect_counters(&self, id: PortId, wanted: &Ledger) -> Result<()> {
        let mut have = Ledger::default();
        let waited = until("the counters", || {
            self.counters(id).is_ok_and(|counters| {
                have = Ledger::from(&counters);
                have == *wanted
            })
        });
        match waited {
            Ok(()) => Ok(()),
            Err(_) => bail!("port {}: counted {have:?}, expected {wanted:?}", self.port(id)?.name),
        }
    }

    /// Waits until a port has no front end any more and everything of the last one is gone.
    pub fn expect_alone(&self, id: PortId) -> Result<()> {
        wait_for("the session's end", SOON, || {
            self.port(id).is_ok_and(|port| port.session.is_some_and(|s| s.peer.is_none()))
        })
    }

    /// Waits for an event of a port that `wanted` picks, and returns it.
    pub fn expect_event(&self, id: PortId, wanted: impl Fn(&EventKind) -> bool) -> Result<EventKind> {
        wait_for_some("an event", SOON, || {
            let events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
            Ok(events.iter().find(|e| e.port == id && wanted(&e.kind)).map(|e| e.kind.clone()))
        })
    }

    /// All events since the last call, in order.
    pub fn take_events(&self) -> Vec<Event> {
        std::mem::take(&mut *self.events.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Frames and drops of a port, to be compared.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ledger {
    /// Frames that came from the port.
    pub rx: u64,
    /// Frames that went to it.
    pub tx: u64,
    /// Frames given up, by the reason's name.
    pub drops: BTreeMap<&'static str, u64>,
}

impl From<&Counters> for Ledger {
    fn from(counters: &Counters) -> Self {
        let drops = counters.drops.iter().map(|(reason, n)| (reason.name(), *n)).collect();
        Self { rx: counters.rx_frames, tx: counters.tx_frames, drops }
    }
}

impl Ledger {
    /// So many frames from the port and to it.
    pub fn new(rx: u64, tx: u64) -> Self {
        Self { rx, tx, drops: BTreeMap::new() }
    }

    /// And so many given up for a reason.
    #[must_use]
    pub fn drops(mut self, reason: DropReason, count: u64) -> Self {
        if count != 0 {
            *self.drops.entry(reason.name()).or_default() += count;
        }
        self
    }

    /// Frames given up in all.
    pub fn dropped(&self) -> u64 {
        self.drops.values().sum()
    }
}

/// What a process must not gather: open descriptors, mappings of shared memory, threads of the dataplane.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Census {
    descriptors: usize,
    shared_mappings: usize,
    threads: usize,
}

impl Census {
    /// Counts now.
    pub fn take() -> Result<Self> {
        // The descriptor that lists the directory is in the list.
        let descriptors = fs::read_dir("/proc/self/fd")?.count();
        let shared = |line: &&str| line.split_whitespace().nth(1).is_some_and(|mode| mode.ends_with('s'));
        let shared_mappings = fs::read_to_string("/proc/self/maps")?.lines().filter(shared).count();
        let mut threads = 0;
        for task in fs::read_dir("/proc/self/task")? {
            // A thread may end between the two looks.
            let name = fs::read_to_string(task?.path().join("comm")).unwrap_or_default();
            threads += usize::from(name.starts_with("worker-") || name.starts_with("session"));
        }
        Ok(Self { descriptors, shared_mappings, threads })
    }

    /// Waits until there is no more than there was.
    pub fn expect_back(&self) -> Result<()> {
        let mut now = self.clone();
        let waited = wait_for("the census", SOON, || {
            Self::take().is_ok_and(|taken| {
                now = taken;
                // What the session thread was about to close when this was taken is no loss.
                now.descriptors <= self.descriptors
                    && now.shared_mappings <= self.shared_mappings
                    && now.threads <= self.threads
            })
        });
        if waited.is_err() {
            bail!("left behind: {now:?}, before: {self:?}");
        }
        Ok(())
    }
}
