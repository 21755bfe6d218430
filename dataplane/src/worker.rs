//! A worker: one thread that polls sources (TX rings of guests, RX rings of back ends, queues of TAPs) and takes their
//! frames through the switch.
//!
//! # Turns
//!
//! A *turn* is one pass over the active sources, at most one burst from each, so the work of a turn is bounded and no
//! source starves another. At a turn's beginning the worker looks at its mailbox; a command is done when its turn is.
//!
//! # Sleep
//!
//! ```text
//!            a burst had frames                     no frames for IDLE
//!          ┌───────────────────┐      ┌────────┐ ──────────────────────► ┌────────┐
//!          └──────────────────►│      │ active │                         │ armed  │
//!                                     └────────┘ ◄────────────────────── └────────┘
//!                                                 kick, ring start, TAP readable
//! ```
//!
//! A source without frames for [`IDLE`] is *armed*: its guest is asked for a kick, and it is not looked at any more until
//! the kick comes. Armed sources cost nothing, however many there are. A worker without active sources sleeps in epoll.
//! Kick fds are watched edge-triggered and never read: each write by the guest is an edge. Arming asks for kicks first
//! and looks at the ring afterwards, so that no frame falls between (the guest does it the other way round). A TAP is watched
//! only while it is armed: a watch costs its sender time for each frame.
//!
//! Commands come by the `mailbox`, which wakes a sleeping worker.
//!
//! With `Poll::Busy` a source is armed later, after [`IDLE_BUSY`], and the last active one never: the worker stays awake,
//! and looks for kicks between turns. A guest that gave no kick fd stays active for ever.

mod mailbox;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, epoll};
use vring::{Frames, HEADER_LEN, RingFault};
use wire::{Mac, Offloads, VnetHeader};

use crate::counters::RingCounters;
use crate::deliver::Deliverer;
use crate::drops::DropReason;
use crate::events::Events;
use crate::port::{Driven, FrontEnd, Guest, Port, PortLink, RingState, Tap};
use crate::spec::Poll;
use crate::switch::{Ingress, PortTable, forward};
use crate::tap::TapReader;
use mailbox::Mailbox;

/// How long a source is polled in vain before it is armed.
const IDLE: Duration = Duration::from_micros(50);
/// The same for `Poll::Busy`. A look in vain costs some 50 ns: idle ports by the hundred would take more of a turn than
/// the busy ones.
const IDLE_BUSY: Duration = Duration::from_millis(10);
/// Turns between two looks at epoll while other sources keep the worker busy.
const LOOK_TURNS: u64 = 32;
/// Events taken at one look.
const EVENTS_MAX: usize = 64;
/// How often the FDBs are swept.
const SWEEP: Duration = Duration::from_secs(10);
/// A RARP is sent so often, so far apart (the first at once).
const ANNOUNCE_TIMES: u8 = 3;
const ANNOUNCE_EVERY: Duration = Duration::from_millis(100);
/// Key of the wake-up eventfd among epoll's keys; sources have their own below it.
const WAKE: u64 = u64::MAX;

/// A source's name within a worker: port and queue.
pub(crate) fn key(port: &Port, queue: u16) -> u64 {
    u64::from(port.id.0) << 16 | u64::from(queue)
}

/// What others may ask of a worker.
pub(crate) enum Command {
    /// Poll queue pair or TAP queue `queue` of `port` from now on (or again); answered when it does.
    Add { port: Arc<Port>, queue: u16, done: Sender<()> },
    /// Forget every queue of `port`; answered when nothing of it is held any more.
    Remove { port: Arc<Port>, done: Sender<()> },
    /// Poll queue `queue` of `port` no more: another worker does.
    Forget { port: Arc<Port>, queue: u16 },
    /// Send RARPs for `mac` into the network of `port`, as if from it.
    Announce { port: Arc<Port>, mac: [u8; 6] },
    /// End.
    Stop,
}

/// The side of a worker that other threads see.
pub(crate) struct WorkerShared {
    pub(crate) index: u32,
    pub(crate) cpu: Option<usize>,
    /// NUMA node of that lcore.
    pub(crate) node: Option<u32>,
    /// Kick fds and TAPs. Rings register their kick fd when they start, on the session thread.
    epoll: OwnedFd,
    wake: OwnedFd,
    mailbox: Mailbox<Command>,
    pub(crate) stats: WorkerStats,
}

/// What a worker counts.
#[derive(Default)]
pub(crate) struct WorkerStats {
    pub(crate) turns: AtomicU64,
    pub(crate) bursts: AtomicU64,
    pub(crate) frames: AtomicU64,
    /// TSC cycles of turns that moved frames.
    pub(crate) busy_cycles: AtomicU64,
}

impl WorkerShared {
    pub(crate) fn new(index: u32, cpu: Option<usize>) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let edge = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&epoll, &wake, epoll::EventData::new_u64(WAKE), edge)?;
        let node = cpu.and_then(sys::numa::node_of_cpu);
        Ok(Self { index, cpu, node, epoll, wake, mailbox: Mailbox::new(), stats: WorkerStats::default() })
    }

    /// Puts a command into the mailbox and wakes the worker if it sleeps.
    pub(crate) fn send(&self, command: Command) {
        if self.mailbox.put(command) {
            // Full means: not even the first wake-up was looked at yet.
            let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        }
    }

    /// Watches a kick fd or a TAP for `key`.
    pub(crate) fn watch(&self, fd: BorrowedFd<'_>, key: u64) -> io::Result<()> {
        let edge = epoll::EventFlags::IN | epoll::EventFlags::ET;
        Ok(epoll::add(&self.epoll, fd, epoll::EventData::new_u64(key), edge)?)
    }

    /// Ends that. Needed before our copy of the descriptor is closed: the front end holds another one, so closing
    /// alone does not end the watch.
    pub(crate) fn unwatch(&self, fd: BorrowedFd<'_>) {
        let _ = epoll::delete(&self.epoll, fd);
    }

    /// Grows while the worker works, and while it sleeps because there is nothing to do.
    pub(crate) fn heartbeat(&self) -> u64 {
        if self.mailbox.is_asleep() {
            self.stats.turns.fetch_add(1, Ordering::Relaxed);
        }
        self.stats.turns.load(Ordering::Relaxed)
    }
}

/// Something to poll.
struct Source {
    key: u64,
    port: Arc<Port>,
    queue: u16,
    /// The network's ports as of `generation`.
    table: Arc<PortTable>,
    generation: u64,
    active: bool,
    /// When it last had frames.
    last: Instant,
}

/// What a look at a source found.
enum Found {
    Frames(u64),
    Nothing,
    /// There is no ring: it will be added again when it starts.
    NoRing,
}

/// RARPs still to be sent.
struct Announcement {
    port: Arc<Port>,
    mac: [u8; 6],
    left: u8,
    due: Instant,
}

/// The worker itself: plain data, owned by its thread.
pub(crate) struct Worker {
    shared: Arc<WorkerShared>,
    poll: Poll,
    ageing_s: u32,
    events: Arc<Events>,
    sources: Vec<Source>,
    /// Indices of the active ones.
    active: Vec<usize>,
    frames: Frames,
    tap_reader: TapReader,
    deliverer: Deliverer,
    announcements: Vec<Announcement>,
    started: Instant,
    now: Instant,
    swept: Instant,
    turns: u64,
    /// The source being polled at this moment.
    polling: Option<usize>,
    stopped: bool,
}

impl Worker {
    pub(crate) fn new(
        shared: Arc<WorkerShared>,
        poll: Poll,
        ageing: Duration,
        started: Instant,
        events: Arc<Events>,
    ) -> Self {
        let index = shared.index;
        Self {
            shared,
            poll,
            ageing_s: u32::try_from(ageing.as_secs()).unwrap_or(u32::MAX),
            events: events.clone(),
            sources: Vec::new(),
            active: Vec::new(),
            frames: Frames::default(),
            tap_reader: TapReader::default(),
            deliverer: Deliverer::new(index, events),
            announcements: Vec::new(),
            started,
            now: started,
            swept: started,
            turns: 0,
            polling: None,
            stopped: false,
        }
    }

    /// Whether no guest can make it wait.
    pub(crate) fn never_blocks(&self) -> bool {
        self.deliverer.caller.never_blocks()
    }

    /// Runs until [`Command::Stop`].
    pub(crate) fn run(mut self) {
        while !self.stopped {
            let turn = std::panic::AssertUnwindSafe(|| self.turn());
            if std::panic::catch_unwind(turn).is_err() {
                self.give_up_source();
            }
        }
    }

    /// A panic is a defect of ours, but whoever met it may know how to meet it again: the ring that was being polled is
    /// stopped, all others go on.
    #[cold]
    fn give_up_source(&mut self) {
        let Some(source) = self.polling.take().and_then(|index| self.sources.get_mut(index)) else { return };
        tracing::error!(
            port = source.port.name,
            queue = source.queue,
            "panic while polling: the queue is given up"
        );
        source.active = false;
        let (port, queue) = (source.port.clone(), source.queue);
        if let Some(pair) = port.guest().and_then(|g| g.pairs.get(usize::from(queue))) {
            let mut state = pair.tx.lock();
            if let Some(kick) = state.ring.as_ref().and_then(|ring| ring.kick_fd()) {
                self.shared.unwatch(kick);
            }
            state.ring = None;
            state.broken = Some(RingFault::Defect);
        }
        let mut index = 2 * queue + 1;
        if let Some(pair) = port.driven(queue) {
            index = 2 * queue;
            let mut state = pair.rx.lock();
            if let Some(rx) = state.ring.take() {
                self.shared.unwatch(rx.call.as_fd());
            }
            state.broken = Some(RingFault::Defect);
        }
        self.events.ring_broken(&port, index, RingFault::Defect);
        self.reindex();
    }

    fn turn(&mut self) {
        self.turns += 1;
        self.now = now();
        if self.shared.mailbox.has_mail() {
            self.read_mail();
        }
        if self.stopped {
            return;
        }
        if self.active.is_empty() {
            self.sleep();
        } else if self.turns.is_multiple_of(LOOK_TURNS) {
            self.look(Some(Duration::ZERO));
            self.tick();
        }
        let begun = sys::clock::cycles();
        let frames = self.poll_active();
        let stats = &self.shared.stats;
        stats.turns.fetch_add(1, Ordering::Relaxed);
        if frames != 0 {
            stats.frames.fetch_add(frames, Ordering::Relaxed);
            stats.busy_cycles.fetch_add(sys::clock::cycles().saturating_sub(begun), Ordering::Relaxed);
        }
    }

    /// One burst from each active source. Returns the frames moved.
    fn poll_active(&mut self) -> u64 {
        let mut frames = 0;
        let mut i = 0;
        while i < self.active.len() {
            let index = self.active[i];
            self.polling = Some(index);
            match self.poll_source(index) {
                Found::Frames(count) => {
                    frames += count;
                    self.sources[index].last = self.now;
                    self.shared.stats.bursts.fetch_add(1, Ordering::Relaxed);
                }
                Found::Nothing if !self.may_rest(index) => {}
                Found::Nothing | Found::NoRing => {
                    self.sources[index].active = false;
                    self.active.swap_remove(i);
                    continue;
                }
            }
            i += 1;
        }
        self.polling = None;
        frames
    }

    fn poll_source(&mut self, index: usize) -> Found {
        let source = &mut self.sources[index];
        let generation = source.port.network.generation();
        if source.generation != generation {
            source.table = source.port.network.table();
            source.generation = generation;
        }
        let port = source.port.clone();
        match &port.link {
            PortLink::Guest(guest) => self.poll_guest(index, &port, guest),
            PortLink::FrontEnd(front) => self.poll_front_end(index, &port, front),
            PortLink::Tap(tap) => self.poll_tap(index, &port, tap),
        }
    }

    fn poll_guest(&mut self, index: usize, port: &Arc<Port>, guest: &Guest) -> Found {
        let source = &self.sources[index];
        let Some(pair) = guest.pairs.get(usize::from(source.queue)) else { return Found::NoRing };
        let mut state = pair.tx.lock();
        let RingState { ring: slot, enabled, broken } = &mut *state;
        let Some(ring) = slot.as_mut() else { return Found::NoRing };
        if pair.tx.worker.load(Ordering::Relaxed) != self.shared.index {
            // It was moved to another worker, and we have not read of it yet.
            return Found::NoRing;
        }
        let counters = pair.tx.counters();
        let mut burst = match ring.dequeue(&mut self.frames) {
            Ok(burst) => burst,
            Err(fault) => {
                if let Some(kick) = ring.kick_fd() {
                    self.shared.unwatch(kick);
                }
                if let Some(err) = ring.err_fd() {
                    let _ = self.deliverer.caller.call(err);
                }
                *slot = None;
                *broken = Some(fault);
                drop(state);
                self.events.ring_broken(port, 2 * source.queue + 1, fault);
                return Found::NoRing;
            }
        };
        if burst.burst.is_empty() {
            return Found::Nothing;
        }
        let frames = if *enabled {
            let ingress = Ingress {
                port,
                table: &source.table,
                counters,
                sends: guest.sends(),
                now_s: seconds(self.now, self.started),
            };
            forward(&ingress, &mut burst.burst, &mut self.deliverer)
        } else {
            // A disabled TX ring is to be drained without effect (vhost-user specification, "Ring states").
            let frames = burst.burst.len() as u64;
            counters.burst_alone(frames, 0, 0);
            counters.drop(DropReason::GuestTxRingDisabled, frames);
            frames
        };
        if std::mem::take(&mut self.deliverer.source_fault) {
            burst.count_fault();
        }
        if burst.complete()
            && let Some(call) = ring.call_fd()
        {
            counters.calls.add(1);
            let _ = self.deliverer.caller.call(call);
        }
        Found::Frames(frames)
    }

    fn poll_front_end(&mut self, index: usize, port: &Arc<Port>, front: &FrontEnd) -> Found {
        let source = &self.sources[index];
        let Some(pair) = front.pairs.get(usize::from(source.queue)) else { return Found::NoRing };
        let mut state = pair.rx.lock();
        let RingState { ring: slot, broken, .. } = &mut *state;
        let Some(Driven { ring, kick, call }) = slot.as_deref_mut() else { return Found::NoRing };
        if pair.rx.worker.load(Ordering::Relaxed) != self.shared.index {
            // As with a guest's.
            return Found::NoRing;
        }
        let counters = pair.rx.counters();
        let mut burst = match ring.dequeue(&mut self.frames) {
            Ok(burst) => burst,
            Err(fault) => {
                self.shared.unwatch(call.as_fd());
                *slot = None;
                *broken = Some(fault);
                drop(state);
                self.events.ring_broken(port, 2 * source.queue, fault);
                return Found::NoRing;
            }
        };
        if burst.burst.is_empty() {
            return Found::Nothing;
        }
        let ingress = Ingress {
            port,
            table: &source.table,
            counters,
            sends: front.sends(),
            now_s: seconds(self.now, self.started),
        };
        let frames = forward(&ingress, &mut burst.burst, &mut self.deliverer);
        // Memory of ours that is gone is found at the next burst.
        self.deliverer.source_fault = false;
        if burst.complete() {
            counters.calls.add(1);
            let _ = self.deliverer.caller.call(kick.as_fd());
        }
        Found::Frames(frames)
    }

    fn poll_tap(&mut self, index: usize, port: &Arc<Port>, tap: &Tap) -> Found {
        let source = &self.sources[index];
        let Some(queue) = tap.queues.get(usize::from(source.queue)) else { return Found::NoRing };
        let Some(mut burst) = self.tap_reader.read(queue, &mut self.frames) else { return Found::Nothing };
        let ingress = Ingress {
            port,
            table: &source.table,
            counters: &queue.rx,
            sends: Offloads::ALL,
            now_s: seconds(self.now, self.started),
        };
        Found::Frames(forward(&ingress, &mut burst, &mut self.deliverer))
    }

    /// Whether a source without frames may be left alone until it is heard of.
    fn may_rest(&mut self, index: usize) -> bool {
        let idle = match self.poll {
            Poll::Adaptive => IDLE,
            Poll::Busy if self.active.len() > 1 => IDLE_BUSY,
            Poll::Busy => return false,
        };
        let source = &self.sources[index];
        if self.now.duration_since(source.last) < idle {
            return false;
        }
        match &source.port.link {
            // If frames came meanwhile, that is an event at once.
            PortLink::Tap(tap) => tap
                .queues
                .get(usize::from(source.queue))
                .is_none_or(|tap| self.shared.watch(tap.queue.as_fd(), source.key).is_ok()),
            PortLink::FrontEnd(_) => {
                let Some(pair) = source.port.driven(source.queue) else { return true };
                pair.rx.lock().ring.as_mut().is_none_or(|rx| rx.ring.arm())
            }
            PortLink::Guest(guest) => {
                let Some(pair) = guest.pairs.get(usize::from(source.queue)) else { return true };
                match pair.tx.lock().ring.as_mut() {
                    None => true,
                    Some(ring) => ring.kick_fd().is_some() && ring.arm(),
                }
            }
        }
    }

    /// A source is heard of.
    fn wake_source(&mut self, key: u64, kicked: bool) {
        let Ok(index) = self.sources.binary_search_by_key(&key, |s| s.key) else { return };
        let source = &mut self.sources[index];
        if let Some(pair) = source.port.guest().and_then(|g| g.pairs.get(usize::from(source.queue))) {
            if kicked {
                pair.tx.counters().kicks.add(1);
            }
            if !source.active
                && let Some(ring) = pair.tx.lock().ring.as_mut()
            {
                ring.disarm();
            }
        }
        if let Some(pair) = source.port.driven(source.queue) {
            if kicked {
                pair.rx.counters().kicks.add(1);
            }
            if !source.active
                && let Some(rx) = pair.rx.lock().ring.as_mut()
            {
                rx.ring.disarm();
            }
        }
        if let PortLink::Tap(tap) = &source.port.link
            && let Some(tap) = tap.queues.get(usize::from(source.queue))
        {
            // Until it rests again.
            self.shared.unwatch(tap.queue.as_fd());
        }
        source.last = self.now;
        if !source.active {
            source.active = true;
            self.active.push(index);
        }
    }

    /// Nothing is active: waits for a kick, a TAP, mail, or the next time something is due.
    fn sleep(&mut self) {
        // Mail that came before got no wake-up.
        let wait = if self.shared.mailbox.lie_down() { self.next_due() } else { Some(Duration::ZERO) };
        self.look(wait);
        self.shared.mailbox.get_up();
        self.now = now();
        self.tick();
        if self.shared.mailbox.has_mail() {
            self.read_mail();
        }
    }

    fn look(&mut self, wait: Option<Duration>) {
        let mut keys = [0u64; EVENTS_MAX];
        let mut buffer = [const { std::mem::MaybeUninit::uninit() }; EVENTS_MAX];
        let wait = wait.and_then(|wait| rustix::event::Timespec::try_from(wait).ok());
        // An interrupted wait found nothing; the next one will.
        let Ok((events, _)) = epoll::wait(&self.shared.epoll, &mut buffer, wait.as_ref()) else { return };
        let mut count = 0;
        for (key, event) in keys.iter_mut().zip(events) {
            *key = event.data.u64();
            count += 1;
        }
        for key in &keys[..count] {
            if *key != WAKE {
                self.wake_source(*key, true);
            }
        }
    }

    /// When the next thing is due that no event tells of.
    fn next_due(&self) -> Option<Duration> {
        let announcement = self.announcements.iter().map(|a| a.due.saturating_duration_since(self.now)).min();
        let sweep =
            (!self.sources.is_empty()).then(|| (self.swept + SWEEP).saturating_duration_since(self.now));
        announcement.into_iter().chain(sweep).min()
    }

    fn tick(&mut self) {
        if !self.announcements.is_empty() {
            self.announce();
        }
        if self.now.duration_since(self.swept) >= SWEEP {
            self.swept = self.now;
            self.sweep();
        }
    }

    /// Ages the FDBs of the networks in which this worker has sources. Two workers may do the same one: harmless.
    fn sweep(&self) {
        let mut swept: Vec<*const _> = Vec::new();
        for source in &self.sources {
            let network = Arc::as_ptr(&source.port.network);
            if !swept.contains(&network) {
                swept.push(network);
                source.port.network.fdb.sweep(seconds(self.now, self.started), self.ageing_s, |_| false);
            }
        }
    }

    fn announce(&mut self) {
        let mut announcements = std::mem::take(&mut self.announcements);
        for announcement in announcements.iter_mut().filter(|a| a.due <= self.now) {
            announcement.left -= 1;
            announcement.due += ANNOUNCE_EVERY;
            let frame = wire::rarp::announcement(Mac::new(announcement.mac));
            let header: [u8; HEADER_LEN] = VnetHeader::PLAIN.to_bytes();
            let mut burst = self.frames.load([(&header, &frame[..])]);
            let port = &announcement.port;
            let ingress = Ingress {
                port,
                table: &port.network.table(),
                counters: &RingCounters::default(),
                sends: Offloads::NONE,
                now_s: seconds(self.now, self.started),
            };
            forward(&ingress, &mut burst, &mut self.deliverer);
        }
        announcements.retain(|a| a.left != 0);
        announcements.append(&mut self.announcements);
        self.announcements = announcements;
    }

    fn read_mail(&mut self) {
        for command in self.shared.mailbox.take() {
            match command {
                Command::Add { port, queue, done } => {
                    self.add(port, queue);
                    let _ = done.send(());
                }
                Command::Remove { port, done } => {
                    self.remove(&port);
                    drop(port);
                    let _ = done.send(());
                }
                Command::Forget { port, queue } => self.forget(&port, queue),
                Command::Announce { port, mac } => {
                    self.announcements.push(Announcement { port, mac, left: ANNOUNCE_TIMES, due: self.now });
                    self.announce();
                }
                Command::Stop => self.stopped = true,
            }
        }
    }

    fn add(&mut self, port: Arc<Port>, queue: u16) {
        let key = key(&port, queue);
        let generation = port.network.generation();
        let table = port.network.table();
        let source = Source { key, port, queue, table, generation, active: false, last: self.now };
        if let Err(place) = self.sources.binary_search_by_key(&key, |s| s.key) {
            self.sources.insert(place, source);
            self.reindex();
        }
        self.wake_source(key, false);
    }

    fn remove(&mut self, port: &Arc<Port>) {
        if let PortLink::Tap(tap) = &port.link {
            for tap in &tap.queues {
                self.shared.unwatch(tap.queue.as_fd());
            }
        }
        self.announcements.retain(|a| a.port.id != port.id);
        self.sources.retain(|s| s.port.id != port.id);
        self.reindex();
    }

    fn forget(&mut self, port: &Port, queue: u16) {
        let key = key(port, queue);
        self.sources.retain(|s| s.key != key);
        self.reindex();
    }

    /// Indices moved.
    fn reindex(&mut self) {
        self.active = (0..self.sources.len()).filter(|i| self.sources[*i].active).collect();
    }
}

fn seconds(now: Instant, started: Instant) -> u32 {
    u32::try_from(now.duration_since(started).as_secs()).unwrap_or(u32::MAX)
}

/// The clock, read once a turn.
#[allow(clippy::disallowed_methods)]
fn now() -> Instant {
    Instant::now()
}
