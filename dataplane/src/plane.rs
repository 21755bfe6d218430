//! The handle that control holds: threads, ports, networks.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use sys::call::Caller;
use sys::tap::{TUN_F_CSUM, TUN_F_TSO_ECN, TUN_F_TSO4, TUN_F_TSO6, TUN_F_USO4, TUN_F_USO6};
use vhost_user::{Attachment, Bell, Endpoint, EndpointError, EndpointId, Limits, SessionStatus, Sessions};
use wire::Offloads;

use crate::counters::RingCounters;
use crate::events::Events;
use crate::frontend::PortDriver;
use crate::guest::{GuestDevice, announce};
use crate::look;
use crate::placement::{Move, Sample};
use crate::port::{FrontEnd, Guest, Port, PortLink, QUEUE_PAIRS_MAX, Tap, TapPort};
use crate::report::{Counters, FdbEntry, PortId, PortKind, PortReport, WorkerReport};
use crate::spec::{Config, Link, PortSpec};
use crate::switch::Network;
use crate::worker::{Command, Worker, WorkerShared};
use crate::{MTU_MAX, MTU_MIN};

/// Addresses that a TAP or a back end may teach: a whole LAN may be behind it.
const LAN_FDB_MAX: u32 = 65_536;
/// What the kernel may leave to us on its way to guests: what they mostly accept, and we can do if they do not.
const TAP_OFFLOADS: u32 = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN | TUN_F_USO4 | TUN_F_USO6;
/// How long a worker may take to answer a command before we say so instead of waiting for ever.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(5);

/// Why a port cannot be added or the dataplane cannot start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A port of that name is there.
    #[error("port {0} exists already")]
    Exists(String),
    /// The socket cannot be served.
    #[error("port {name}: {cause}")]
    Endpoint {
        /// Port.
        name: String,
        /// Why.
        cause: EndpointError,
    },
    /// The system refused a thread or descriptor.
    #[error("{what}: {cause}")]
    System {
        /// What was tried.
        what: String,
        /// Why not.
        cause: io::Error,
    },
    /// Out of bounds.
    #[error("port {name}: {field} is {value}, it must be in {range}")]
    Bounds {
        /// Port.
        name: String,
        /// Which field.
        field: &'static str,
        /// Its value.
        value: u64,
        /// What is possible.
        range: &'static str,
    },
    /// No slot left.
    #[error("port {name}: network {network} is full; use another network")]
    NetworkFull {
        /// Port.
        name: String,
        /// Network.
        network: String,
    },
}

/// The running dataplane: workers, sessions, networks. Dropping it stops every ring and ends the threads.
pub struct Dataplane {
    // Dropped first: sessions stop rings while workers still run.
    sessions: Option<Sessions>,
    workers: Arc<[Arc<WorkerShared>]>,
    threads: Vec<JoinHandle<()>>,
    events: Arc<Events>,
    /// The session thread's.
    caller: Arc<Mutex<Caller>>,
    fdb_port_max: u32,
    started: Instant,
    started_cycles: u64,
    next_id: AtomicU32,
    next_worker: AtomicU32,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    ports: BTreeMap<PortId, Entry>,
    networks: HashMap<String, Arc<Network>>,
}

struct Entry {
    port: Arc<Port>,
    session: Option<Session>,
}

/// Who speaks for a port with a socket.
#[derive(Clone)]
enum Session {
    /// The session thread, with front ends.
    Served(EndpointId),
    /// A thread of its own, with a back end.
    Attached(Arc<Attachment>),
}

impl Dataplane {
    /// Starts the workers and the session thread.
    pub fn start(config: Config) -> Result<Self, Error> {
        let system = |what: &str, cause: io::Error| Error::System { what: what.into(), cause };
        let events = Arc::new(Events { sink: config.on_event });
        let started = now();
        let cpus: Vec<_> =
            if config.cpus.is_empty() { vec![None] } else { config.cpus.iter().copied().map(Some).collect() };
        let shared = (0..).zip(cpus).map(|(index, cpu)| WorkerShared::new(index, cpu).map(Arc::new));
        let workers: Arc<[_]> =
            shared.collect::<io::Result<_>>().map_err(|e| system("epoll of a worker", e))?;
        let caller = Caller::new();
        let mut never_blocks = caller.never_blocks();
        let mut plane = Self {
            sessions: None,
            workers: workers.clone(),
            threads: Vec::new(),
            events: events.clone(),
            caller: Arc::new(Mutex::new(caller)),
            fdb_port_max: config.fdb_port_max,
            started,
            started_cycles: sys::clock::cycles(),
            next_id: AtomicU32::new(1),
            next_worker: AtomicU32::new(0),
            state: Mutex::default(),
        };
        for shared in workers.iter() {
            let worker = Worker::new(shared.clone(), config.poll, config.ageing, started, events.clone());
            never_blocks &= worker.never_blocks();
            plane.threads.push(spawn(shared, worker)?);
        }
        if !never_blocks {
            tracing::warn!(
                "no asynchronous I/O here: a guest that keeps its call eventfd full can stop a worker; let this \
                 process use io_setup, or raise fs.aio-max-nr"
            );
        }
        let sessions = Sessions::start(Limits::default(), Box::new(|_, _| {}));
        plane.sessions = Some(sessions.map_err(|e| system("session thread", e))?);
        Ok(plane)
    }

    /// Adds a port; when it returns, its socket accepts or is being dialled, or its TAP is polled.
    pub fn add_port(&self, spec: PortSpec) -> Result<PortId, Error> {
        check_bounds(&spec)?;
        let id = PortId(self.next_id.fetch_add(1, Ordering::Relaxed));
        let (link, endpoint) = self.prepare(&spec.name, spec.link)?;
        let port = {
            let mut state = self.state();
            if state.ports.values().any(|e| e.port.name == spec.name) {
                return Err(Error::Exists(spec.name));
            }
            let network = state.networks.entry(spec.network.clone());
            let network = network.or_insert_with(|| Arc::new(Network::new(spec.network.clone()))).clone();
            let fdb_max = if matches!(link, PortLink::Guest(_)) { self.fdb_port_max } else { LAN_FDB_MAX };
            let port = network.clone().add(|slot| {
                Arc::new(Port {
                    id,
                    name: spec.name.clone(),
                    network,
                    slot,
                    mtu: AtomicU16::new(spec.mtu),
                    fdb_max,
                    counters: RingCounters::default(),
                    link,
                })
            });
            let port = port.ok_or(Error::NetworkFull { name: spec.name, network: spec.network })?;
            state.ports.insert(id, Entry { port: port.clone(), session: None });
            port
        };
        let started = match endpoint {
            Some(endpoint) => self.serve(&port, endpoint),
            None => self.poll_tap(&port),
        };
        if let Err(error) = started {
            self.remove_port(id);
            return Err(error);
        }
        Ok(id)
    }

    /// Removes a port: rings stopped, memory unmapped, socket file gone. False if there is none.
    pub fn remove_port(&self, id: PortId) -> bool {
        let Some(Entry { port, session }) = self.state().ports.remove(&id) else { return false };
        match (session, &self.sessions) {
            (Some(Session::Served(endpoint)), Some(sessions)) => sessions.remove(endpoint),
            (Some(Session::Attached(attachment)), _) => attachment.end(),
            _ => {}
        }
        let (done, dones) = mpsc::channel();
        for worker in self.workers.iter() {
            worker.send(Command::Remove { port: port.clone(), done: done.clone() });
        }
        for _ in self.workers.iter() {
            if dones.recv_timeout(COMMAND_TIMEOUT).is_err() {
                tracing::error!(port = port.name, "a worker does not answer: the port is removed without it");
            }
        }
        // Nobody polls the port any more, so nobody learns its addresses again after this.
        port.network.remove(port.slot);
        let mut state = self.state();
        if !state.ports.values().any(|e| Arc::ptr_eq(&e.port.network, &port.network)) {
            state.networks.remove(&port.network.name);
        }
        true
    }

    /// One port.
    pub fn port(&self, id: PortId) -> Option<PortReport> {
        let (port, session) = self.state().ports.get(&id).map(|e| (e.port.clone(), e.session.clone()))?;
        Some(self.report(&port, session.as_ref()))
    }

    /// All ports, by number.
    pub fn ports(&self) -> Vec<PortReport> {
        let ports: Vec<_> =
            self.state().ports.values().map(|e| (e.port.clone(), e.session.clone())).collect();
        ports.iter().map(|(port, session)| self.report(port, session.as_ref())).collect()
    }

    /// All workers.
    pub fn workers(&self) -> Vec<WorkerReport> {
        let ports: Vec<_> = self.state().ports.values().map(|e| e.port.clone()).collect();
        self.workers.iter().map(|worker| self.report_worker(worker, &ports)).collect()
    }

    /// A number per worker that grows as long as it works (or sleeps for want of work): a watchdog compares two readings.
    pub fn heartbeats(&self) -> Vec<u64> {
        self.workers.iter().map(|w| w.heartbeat()).collect()
    }

    /// How far workers and queues are: two of these some time apart tell who is busy (see [`crate::propose`]).
    pub fn sample(&self) -> Sample {
        let ports: Vec<_> = self.state().ports.values().map(|e| e.port.clone()).collect();
        let busy = self.workers.iter().map(|w| w.stats.busy_cycles.load(Ordering::Relaxed)).collect();
        let nodes: Vec<_> = self.workers.iter().map(|w| w.node).collect();
        // On most machines there is one, and no need to ask where memory is.
        let several = nodes.iter().any(|node| node.is_some() && *node != nodes[0]);
        let queues = ports.iter().flat_map(|port| look::samples(port, several)).collect();
        Sample { cycles: sys::clock::cycles(), busy, nodes, queues }
    }

    /// Announces the address of a port's guest to its network, as SEND_RARP does. False if there is no such port, or the address
    /// is not known.
    pub fn announce(&self, id: PortId) -> bool {
        let Some(port) = self.state().ports.get(&id).map(|entry| entry.port.clone()) else { return false };
        let Some(mac) = port.guest().and_then(|guest| guest.mac) else { return false };
        announce(&port, &self.workers, &self.events, mac);
        true
    }

    /// Whether checksums and segmentation may from now on be left to who takes frames from a TAP. The kernel does what is left
    /// to it; a program that reads packets from the device instead (AF_PACKET), as Open vSwitch's datapath in user space
    /// does, gets frames without their virtio-net header, so nothing may be missing in them. False if there is no such TAP.
    pub fn leave_offloads(&self, id: PortId, leave: bool) -> bool {
        let Some(port) = self.state().ports.get(&id).map(|entry| entry.port.clone()) else { return false };
        let PortLink::Tap(tap) = &port.link else { return false };
        tap.leave_offloads(leave);
        true
    }

    /// Lets another worker poll a queue of a guest or back end from now on; no frame is lost or overtaken. False if there is no
    /// such port, queue or worker, or it is there already.
    pub fn move_queue(&self, to: &Move) -> bool {
        // One at a time: the two workers hear of moves in the same order.
        let state = self.state();
        let Some(port) = state.ports.get(&to.port).map(|e| e.port.clone()) else { return false };
        let Some(there) = self.workers.get(to.to) else { return false };
        let queue = usize::from(to.queue);
        let moved = match &port.link {
            PortLink::Guest(guest) => {
                let pair = guest.pairs.get(queue);
                pair.is_some_and(|pair| pair.tx.move_to(&port, to.queue, &self.workers, there))
            }
            PortLink::FrontEnd(front) => {
                let pair = front.pairs.get(queue);
                pair.is_some_and(|pair| pair.rx.move_to(&port, to.queue, &self.workers, there))
            }
            PortLink::Tap(_) => false,
        };
        drop(state);
        moved
    }

    /// Learned addresses of all networks.
    pub fn fdb(&self) -> Vec<FdbEntry> {
        let networks: Vec<_> = self.state().networks.values().cloned().collect();
        let now_s = u32::try_from(now().duration_since(self.started).as_secs()).unwrap_or(u32::MAX);
        let mut all = Vec::new();
        for network in networks {
            let table = network.table();
            for (mac, slot, age_s) in network.fdb.entries(now_s) {
                let Some(Some(port)) = table.get(usize::from(slot)) else { continue };
                all.push(FdbEntry {
                    network: network.name.clone(),
                    mac: mac.octets(),
                    port: port.id,
                    port_name: port.name.clone(),
                    age_s,
                });
            }
        }
        all.sort_by(|a, b| (&a.network, a.mac).cmp(&(&b.network, b.mac)));
        all
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Places a link's queues on workers, in turn.
    fn prepare(&self, name: &str, link: Link) -> Result<(PortLink, Option<Endpoint>), Error> {
        let workers = u32::try_from(self.workers.len()).unwrap_or(1);
        let next = || self.next_worker.fetch_add(1, Ordering::Relaxed) % workers;
        // Ports with one queue, which are most, are dealt out in turn, too.
        let deal = |queues: &mut dyn Iterator<Item = &AtomicU32>| {
            let first = next();
            (first..).zip(queues).for_each(|(n, worker)| worker.store(n % workers, Ordering::Relaxed));
        };
        match link {
            Link::VhostUser { endpoint, mac, queue_pairs, policy } => {
                let guest = Guest::new(mac, queue_pairs, policy);
                deal(&mut guest.pairs.iter().map(|pair| &pair.tx.worker));
                Ok((PortLink::Guest(guest), Some(endpoint)))
            }
            Link::FrontEnd { endpoint, queue_pairs } => {
                let bell = Bell::new().map_err(|cause| Error::System {
                    what: format!("port {name}: eventfd of its session"),
                    cause,
                })?;
                let front = FrontEnd::new(queue_pairs, bell);
                deal(&mut front.pairs.iter().map(|pair| &pair.rx.worker));
                Ok((PortLink::FrontEnd(front), Some(endpoint)))
            }
            Link::Tap { queues, offloads: leave } => {
                let mut offloads = TAP_OFFLOADS;
                for queue in &queues {
                    offloads &= queue.set_offload(TAP_OFFLOADS).map_err(|cause| Error::System {
                        what: format!("port {name}: offloads of the TAP"),
                        cause: io::Error::other(cause),
                    })?;
                }
                let queue = |queue| TapPort {
                    queue,
                    worker: AtomicU32::new(next()),
                    rx: RingCounters::default(),
                    tx: RingCounters::default(),
                };
                let queues = queues.into_iter().map(queue).collect();
                Ok((PortLink::Tap(Tap::new(tap_accepts(offloads), leave, queues)), None))
            }
        }
    }

    fn serve(&self, port: &Arc<Port>, endpoint: Endpoint) -> Result<(), Error> {
        let Some(sessions) = &self.sessions else { return Ok(()) };
        let (workers, events) = (self.workers.clone(), self.events.clone());
        let session = if let PortLink::FrontEnd(front) = &port.link {
            let driver = PortDriver::new(port.clone(), workers, events);
            let attachment = Attachment::start(endpoint, Box::new(driver), front.bell.clone());
            attachment.map(|attachment| Session::Attached(Arc::new(attachment)))
        } else {
            let device = GuestDevice::new(port.clone(), workers, events, self.caller.clone());
            sessions.add(endpoint, Box::new(device)).map(Session::Served)
        };
        let session = session.map_err(|cause| Error::Endpoint { name: port.name.clone(), cause })?;
        if let Some(entry) = self.state().ports.get_mut(&port.id) {
            entry.session = Some(session);
        }
        Ok(())
    }

    fn poll_tap(&self, port: &Arc<Port>) -> Result<(), Error> {
        let PortLink::Tap(tap) = &port.link else { return Ok(()) };
        for (queue, tap) in (0u16..).zip(&tap.queues) {
            let (done, answer) = mpsc::channel();
            let worker = &self.workers[tap.worker.load(Ordering::Relaxed) as usize];
            worker.send(Command::Add { port: port.clone(), queue, done });
            answer.recv_timeout(COMMAND_TIMEOUT).map_err(|_| Error::System {
                what: format!("port {}: worker {} does not answer", port.name, worker.index),
                cause: io::ErrorKind::TimedOut.into(),
            })?;
        }
        Ok(())
    }

    fn status(&self, session: &Session) -> Option<SessionStatus> {
        match session {
            Session::Served(id) => self.sessions.as_ref()?.status(*id),
            Session::Attached(attachment) => Some(attachment.status()),
        }
    }

    fn report(&self, port: &Port, session: Option<&Session>) -> PortReport {
        let session = session.and_then(|session| self.status(session));
        let mut counters = Counters::default();
        port.counters.add_to(&mut counters, false);
        let kind = match &port.link {
            PortLink::Guest(_) => PortKind::VhostUser,
            PortLink::FrontEnd(_) => PortKind::FrontEnd,
            PortLink::Tap(_) => PortKind::Tap,
        };
        let rings = look::rings(port);
        for ring in &rings {
            counters.add(&ring.counters);
        }
        let linked = port.linked() && !rings.iter().all(|ring| ring.broken.is_some());
        PortReport {
            id: port.id,
            name: port.name.clone(),
            network: port.network.name.clone(),
            kind,
            mtu: port.mtu.load(Ordering::Relaxed),
            linked,
            forwarding: linked,
            session,
            counters,
            rings,
        }
    }

    fn report_worker(&self, worker: &WorkerShared, ports: &[Arc<Port>]) -> WorkerReport {
        let [turns, bursts, frames, busy] = {
            let stats = &worker.stats;
            [&stats.turns, &stats.bursts, &stats.frames, &stats.busy_cycles]
                .map(|n| n.load(Ordering::Relaxed))
        };
        let total = sys::clock::cycles().saturating_sub(self.started_cycles);
        WorkerReport {
            cpu: worker.cpu,
            node: worker.node,
            turns,
            busy_ratio: ratio(busy, total),
            frames,
            frames_per_burst: ratio(frames, bursts),
            cycles_per_frame: ratio(busy, frames),
            vrings: ports.iter().flat_map(|port| look::polled_by(port, worker.index)).collect(),
        }
    }
}

impl Drop for Dataplane {
    fn drop(&mut self) {
        self.sessions = None;
        for entry in std::mem::take(&mut self.state().ports).into_values() {
            if let Some(Session::Attached(attachment)) = entry.session {
                attachment.end();
            }
        }
        for worker in self.workers.iter() {
            worker.send(Command::Stop);
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        // A port holds its network, whose table holds the port: neither would ever go by itself.
        for network in self.state().networks.values() {
            network.clear();
        }
    }
}

/// Starts a worker's thread; when it returns, the worker is pinned. One that cannot be pinned as asked would run where
/// others do: that is an error.
fn spawn(shared: &WorkerShared, worker: Worker) -> Result<JoinHandle<()>, Error> {
    let error = |what: String, cause| Error::System { what, cause };
    let (index, cpu) = (shared.index, shared.cpu);
    let (tell, told) = mpsc::channel();
    let thread = std::thread::Builder::new().name(format!("worker-{index}")).spawn(move || {
        let pinned = cpu.map_or(Ok(()), pin);
        let run = pinned.is_ok();
        if tell.send(pinned).is_ok() && run {
            worker.run();
        }
    });
    let thread = thread.map_err(|e| error(format!("thread of worker {index}"), e))?;
    match told.recv() {
        Ok(Ok(())) => Ok(thread),
        Ok(Err(cause)) => Err(error(format!("pinning a worker to lcore {}", cpu.unwrap_or(0)), cause)),
        Err(_) => Err(error(format!("thread of worker {index}"), io::Error::other("it ended at once"))),
    }
}

fn pin(cpu: usize) -> io::Result<()> {
    if cpu >= rustix::thread::CpuSet::MAX_CPU {
        return Err(io::Error::other("there is no such lcore"));
    }
    let mut set = rustix::thread::CpuSet::new();
    set.set(cpu);
    Ok(rustix::thread::sched_setaffinity(None, &set)?)
}

/// What the kernel behind a TAP does for us if it can be told to leave `offloads` to us. Before 6.2 it does not know UDP
/// that is to be cut into datagrams, in either direction.
fn tap_accepts(offloads: u32) -> Offloads {
    let tcp = Offloads::CSUM | Offloads::TSO4 | Offloads::TSO6 | Offloads::ECN;
    if offloads & TUN_F_USO4 == 0 { tcp } else { tcp | Offloads::USO }
}

fn check_bounds(spec: &PortSpec) -> Result<(), Error> {
    let bounds = |field, value: u64, range| Error::Bounds { name: spec.name.clone(), field, value, range };
    if !(MTU_MIN..=MTU_MAX).contains(&spec.mtu) {
        return Err(bounds("mtu", spec.mtu.into(), "68..=9216"));
    }
    match &spec.link {
        Link::VhostUser { queue_pairs, .. } | Link::FrontEnd { queue_pairs, .. }
            if !(1..=QUEUE_PAIRS_MAX).contains(queue_pairs) =>
        {
            Err(bounds("queues", (*queue_pairs).into(), "1..=128"))
        }
        Link::Tap { queues, .. } if queues.is_empty() || queues.len() > usize::from(QUEUE_PAIRS_MAX) => {
            Err(bounds("queues", queues.len() as u64, "1..=128"))
        }
        _ => Ok(()),
    }
}

#[allow(clippy::cast_precision_loss)]
fn ratio(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

#[allow(clippy::disallowed_methods)]
fn now() -> Instant {
    Instant::now()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::Poll;

    #[test]
    fn ports_and_networks_go_with_the_dataplane() {
        let config = Config {
            cpus: Vec::new(),
            poll: Poll::Adaptive,
            ageing: Duration::from_secs(300),
            fdb_port_max: 1,
            on_event: Box::new(|_| {}),
        };
        let plane = Dataplane::start(config).unwrap();
        let dir = tempfile::tempdir().unwrap();
        for name in ["a", "b"] {
            let endpoint = Endpoint::listen(dir.path().join(name));
            let link = Link::VhostUser { endpoint, mac: None, queue_pairs: 1, policy: None };
            plane.add_port(PortSpec { name: name.into(), network: "net".into(), mtu: 1500, link }).unwrap();
        }
        let ports: Vec<_> = plane.state().ports.values().map(|entry| Arc::downgrade(&entry.port)).collect();
        let networks: Vec<_> = plane.state().networks.values().map(Arc::downgrade).collect();
        assert_eq!((ports.len(), networks.len()), (2, 1));
        drop(plane);
        assert!(ports.iter().all(|port| port.upgrade().is_none()));
        assert!(networks.iter().all(|network| network.upgrade().is_none()));
    }

    #[test]
    fn offloads_are_left_to_the_kernel_behind_a_tap_when_it_takes_the_frames() {
        let kernel = tap_accepts(TAP_OFFLOADS);
        let tap = Tap::new(kernel, false, Box::new([]));
        assert_eq!(tap.accepts(), Offloads::NONE);
        tap.leave_offloads(true);
        assert_eq!(tap.accepts(), kernel);
        tap.leave_offloads(false);
        assert_eq!(tap.accepts(), Offloads::NONE);
    }

    #[test]
    fn a_tap_without_uso_takes_the_rest() {
        let without = TAP_OFFLOADS & !(TUN_F_USO4 | TUN_F_USO6);
        assert!(tap_accepts(TAP_OFFLOADS).contains(Offloads::USO));
        assert_eq!(tap_accepts(without) | Offloads::USO, tap_accepts(TAP_OFFLOADS));
        assert_ne!(tap_accepts(without), tap_accepts(TAP_OFFLOADS));
    }
}
