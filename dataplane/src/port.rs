//! A port: what workers, the session thread and control share of it.
//!
//! Each ring stands behind a lock of its own. A worker takes the lock for one burst; the session thread takes it to
//! start, stop or change the ring. So when the session thread has stopped a ring, no worker touches it any more, and
//! nobody needs to be asked. Uncontended, the lock is two atomic operations a burst.
//!
//! A worker holds the lock of the TX ring it polls while it takes those of the RX rings it delivers to, one at a time.
//! Nobody takes a TX lock while holding an RX lock, so there is no cycle. With the rings of a back end, which we drive, it is
//! the same the other way round: frames come from RX and go to TX.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use sys::tap::TapQueue;
use vhost_user::Bell;
use vring::driver::{DriverRx, DriverTx};
use vring::{RingFault, RxRing, TxRing};
use wire::Offloads;

use crate::counters::RingCounters;
use crate::policy::Policy;
use crate::report::PortId;
use crate::switch::Network;
use crate::worker::{Command, WorkerShared, key};

/// Queue pairs of a port at the most.
pub(crate) const QUEUE_PAIRS_MAX: u16 = 128;

/// A port of a network.
pub(crate) struct Port {
    pub(crate) id: PortId,
    pub(crate) name: String,
    pub(crate) network: Arc<Network>,
    /// Its number within the network, for the FDB.
    pub(crate) slot: u16,
    /// Largest payload of an Ethernet frame, bytes. A front end may lower it (NET_SET_MTU).
    pub(crate) mtu: AtomicU16,
    /// Addresses it may teach.
    pub(crate) fdb_max: u32,
    /// Drops that belong to no ring.
    pub(crate) counters: RingCounters,
    pub(crate) link: PortLink,
}

/// What is behind it.
pub(crate) enum PortLink {
    Guest(Guest),
    FrontEnd(FrontEnd),
    Tap(Tap),
}

/// A guest's rings.
pub(crate) struct Guest {
    pub(crate) mac: Option<[u8; 6]>,
    /// What it may say that it is.
    pub(crate) policy: Option<Policy>,
    /// RX ring and TX ring of each queue pair.
    pub(crate) pairs: Box<[QueuePair]>,
    /// What the guest accepts on its RX rings, and may ask for on its TX rings.
    agreed: Agreed,
    /// RX queues that take frames: the first `rx_active_len` of `rx_active`.
    rx_active: Box<[AtomicU8]>,
    rx_active_len: AtomicU16,
    pub(crate) linked: AtomicBool,
}

/// Offloads as negotiated with the other end: bits of [`Offloads`].
#[derive(Default)]
struct Agreed {
    accepts: AtomicU8,
    sends: AtomicU8,
}

impl Agreed {
    fn set(&self, accepts: Offloads, sends: Offloads) {
        self.accepts.store(accepts.bits(), Ordering::Relaxed);
        self.sends.store(sends.bits(), Ordering::Relaxed);
    }

    #[inline]
    fn accepts(&self) -> Offloads {
        Offloads::from_bits(self.accepts.load(Ordering::Relaxed))
    }

    #[inline]
    fn sends(&self) -> Offloads {
        Offloads::from_bits(self.sends.load(Ordering::Relaxed))
    }
}

/// One queue pair.
#[derive(Default)]
pub(crate) struct QueuePair {
    pub(crate) rx: RingSlot<RxRing>,
    pub(crate) tx: RingSlot<TxRing>,
}

/// A ring that workers poll.
pub(crate) trait Source {
    /// Signalled by the other side when frames came, if it was asked to.
    fn bell(&self) -> Option<BorrowedFd<'_>>;
}

impl Source for TxRing {
    fn bell(&self) -> Option<BorrowedFd<'_>> {
        self.kick_fd()
    }
}

impl Source for Driven<DriverRx> {
    fn bell(&self) -> Option<BorrowedFd<'_>> {
        Some(self.call.as_fd())
    }
}

/// Where a ring runs, or does not.
pub(crate) struct RingSlot<R> {
    state: Mutex<RingState<R>>,
    /// Made when the ring first starts; kept for the life of the port.
    counters: OnceLock<Box<RingCounters>>,
    /// Worker that polls the queue pair. Changed under the lock of the one of its rings that is polled.
    pub(crate) worker: AtomicU32,
}

/// A ring and what the session says of it.
pub(crate) struct RingState<R> {
    pub(crate) ring: Option<Box<R>>,
    pub(crate) enabled: bool,
    /// Why it was stopped, if its content was to blame.
    pub(crate) broken: Option<RingFault>,
}

impl<R> Default for RingSlot<R> {
    fn default() -> Self {
        Self {
            state: Mutex::new(RingState { ring: None, enabled: false, broken: None }),
            counters: OnceLock::new(),
            worker: AtomicU32::new(0),
        }
    }
}

impl<R> RingSlot<R> {
    /// A worker that panicked over one ring must not take the others with it, so poison is ignored: the state is
    /// valid between any two statements.
    #[inline]
    pub(crate) fn lock(&self) -> MutexGuard<'_, RingState<R>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[inline]
    pub(crate) fn counters(&self) -> &RingCounters {
        self.counters.get_or_init(Box::default)
    }

    /// The counters, if the ring ever ran.
    pub(crate) fn counters_if_any(&self) -> Option<&RingCounters> {
        self.counters.get().map(|c| &**c)
    }
}

impl<R: Source> RingSlot<R> {
    /// Lets its worker poll `ring` from now on, as queue `queue` of `port`.
    pub(crate) fn start(
        &self,
        port: &Arc<Port>,
        queue: u16,
        workers: &[Arc<WorkerShared>],
        ring: Box<R>,
        enabled: bool,
    ) {
        // Under the lock, so that the queue stays with one worker meanwhile.
        let mut state = self.lock();
        let worker = self.worker_of(workers);
        if let Some(bell) = ring.bell()
            && let Err(error) = worker.watch(bell, key(port, queue))
        {
            tracing::warn!(port = port.name, queue, %error, "cannot watch a ring's eventfd: it starts late");
        }
        *state = RingState { ring: Some(ring), enabled, broken: None };
        drop(state);
        let (done, _) = std::sync::mpsc::channel();
        worker.send(Command::Add { port: port.clone(), queue, done });
    }

    /// Nobody polls it any more when this returns.
    pub(crate) fn stop(&self, workers: &[Arc<WorkerShared>]) -> Option<Box<R>> {
        let mut state = self.lock();
        let ring = state.ring.take()?;
        if let Some(bell) = ring.bell() {
            self.worker_of(workers).unwatch(bell);
        }
        Some(ring)
    }

    /// Gives it to the worker `there`. It runs on: whoever holds the lock for a burst finds it where the burst before left
    /// it. False if it was there already.
    pub(crate) fn move_to(
        &self,
        port: &Arc<Port>,
        queue: u16,
        workers: &[Arc<WorkerShared>],
        there: &WorkerShared,
    ) -> bool {
        let state = self.lock();
        let here = self.worker_of(workers);
        if here.index == there.index {
            return false;
        }
        self.worker.store(there.index, Ordering::Relaxed);
        if let Some(bell) = state.ring.as_ref().and_then(|ring| ring.bell()) {
            here.unwatch(bell);
            if let Err(error) = there.watch(bell, key(port, queue)) {
                tracing::warn!(port = port.name, queue, %error, "cannot watch a ring's eventfd: it may wait");
            }
        }
        let runs = state.ring.is_some();
        drop(state);
        here.send(Command::Forget { port: port.clone(), queue });
        if runs {
            let (done, _) = std::sync::mpsc::channel();
            there.send(Command::Add { port: port.clone(), queue, done });
        }
        true
    }

    fn worker_of<'w>(&self, workers: &'w [Arc<WorkerShared>]) -> &'w WorkerShared {
        &workers[self.worker.load(Ordering::Relaxed) as usize % workers.len()]
    }
}

impl Guest {
    pub(crate) fn new(mac: Option<[u8; 6]>, queue_pairs: u16, policy: Option<Policy>) -> Self {
        Self {
            mac,
            policy,
            pairs: (0..queue_pairs).map(|_| QueuePair::default()).collect(),
            agreed: Agreed::default(),
            rx_active: (0..queue_pairs).map(|_| AtomicU8::new(0)).collect(),
            rx_active_len: AtomicU16::new(0),
            linked: AtomicBool::new(false),
        }
    }

    pub(crate) fn set_features(&self, features: u64) {
        self.agreed.set(Offloads::from_guest_features(features), Offloads::from_driver_features(features));
    }

    /// What its RX rings take.
    #[inline]
    pub(crate) fn accepts(&self) -> Offloads {
        self.agreed.accepts()
    }

    /// What its TX rings may ask for.
    #[inline]
    pub(crate) fn sends(&self) -> Offloads {
        self.agreed.sends()
    }

    /// Notes which RX queues take frames. A worker that reads in the middle of it picks a queue that was or will be
    /// active: at worst its frame is dropped as for a ring that is disabled at this moment.
    pub(crate) fn set_active(&self, queues: impl Iterator<Item = u8>) {
        let mut len = 0;
        for (place, queue) in self.rx_active.iter().zip(queues) {
            place.store(queue, Ordering::Relaxed);
            len += 1;
        }
        self.rx_active_len.store(len, Ordering::Release);
    }

    /// How many RX queues take frames.
    #[inline]
    pub(crate) fn active(&self) -> u16 {
        self.rx_active_len.load(Ordering::Acquire)
    }

    /// The RX queue for a flow.
    #[inline]
    pub(crate) fn queue_for(&self, hash: u32, active: u16) -> u16 {
        let queue = self.rx_active.get(usize::from(share(hash, active)));
        queue.map_or(0, |q| q.load(Ordering::Relaxed)).into()
    }
}

/// Which of `count` queues a flow goes to, by its hash.
#[inline]
pub(crate) fn share(hash: u32, count: u16) -> u16 {
    u16::try_from((u64::from(hash) * u64::from(count)) >> 32).unwrap_or(0)
}

/// A back end's rings, which we drive.
pub(crate) struct FrontEnd {
    /// As many queue pairs as were asked for; the back end may have fewer.
    pub(crate) pairs: Box<[DrivenPair]>,
    /// What the back end takes, and may ask for.
    agreed: Agreed,
    /// Queue pairs that run: the first ones.
    active: AtomicU16,
    pub(crate) linked: AtomicBool,
    /// To be rung when a ring breaks.
    pub(crate) bell: Bell,
}

/// One queue pair that we drive.
#[derive(Default)]
pub(crate) struct DrivenPair {
    /// Frames from the back end.
    pub(crate) rx: RingSlot<Driven<DriverRx>>,
    /// Frames to it.
    pub(crate) tx: RingSlot<Driven<DriverTx>>,
}

/// A ring that we drive, and its eventfds. The back end holds them too.
pub(crate) struct Driven<R> {
    pub(crate) ring: R,
    /// Us → back end.
    pub(crate) kick: OwnedFd,
    /// Back end → us.
    pub(crate) call: OwnedFd,
}

impl FrontEnd {
    pub(crate) fn new(queue_pairs: u16, bell: Bell) -> Self {
        Self {
            pairs: (0..queue_pairs).map(|_| DrivenPair::default()).collect(),
            agreed: Agreed::default(),
            active: AtomicU16::new(0),
            linked: AtomicBool::new(false),
            bell,
        }
    }

    /// The back end is to us what a host is to a guest.
    pub(crate) fn set_features(&self, features: u64) {
        self.agreed.set(Offloads::from_driver_features(features), Offloads::from_guest_features(features));
    }

    /// What it takes.
    #[inline]
    pub(crate) fn accepts(&self) -> Offloads {
        self.agreed.accepts()
    }

    /// What it may ask for.
    #[inline]
    pub(crate) fn sends(&self) -> Offloads {
        self.agreed.sends()
    }

    /// Notes that the first `pairs` queue pairs run.
    pub(crate) fn set_active(&self, pairs: u16) {
        self.active.store(pairs, Ordering::Release);
    }

    /// How many queue pairs run.
    #[inline]
    pub(crate) fn active(&self) -> u16 {
        self.active.load(Ordering::Acquire)
    }
}

/// A TAP's queues. Reads and writes of one frame are atomic in the kernel, so queues need no lock.
pub(crate) struct Tap {
    /// What the kernel behind it can do for us.
    kernel: Offloads,
    /// What is left to it: bits of [`Offloads`].
    accepts: AtomicU8,
    pub(crate) queues: Box<[TapPort]>,
}

impl Tap {
    pub(crate) fn new(kernel: Offloads, offloads: bool, queues: Box<[TapPort]>) -> Self {
        let tap = Self { kernel, accepts: AtomicU8::default(), queues };
        tap.leave_offloads(offloads);
        tap
    }

    /// Leaves to the kernel what it can do, or nothing.
    pub(crate) fn leave_offloads(&self, leave: bool) {
        let accepts = if leave { self.kernel } else { Offloads::NONE };
        self.accepts.store(accepts.bits(), Ordering::Relaxed);
    }

    /// What frames may ask for.
    #[inline]
    pub(crate) fn accepts(&self) -> Offloads {
        Offloads::from_bits(self.accepts.load(Ordering::Relaxed))
    }
}

/// One queue of a TAP.
pub(crate) struct TapPort {
    pub(crate) queue: TapQueue,
    pub(crate) worker: AtomicU32,
    /// Frames from the host.
    pub(crate) rx: RingCounters,
    /// Frames to the host.
    pub(crate) tx: RingCounters,
}

impl Port {
    /// Its guest, if it is a vhost-user port.
    pub(crate) fn guest(&self) -> Option<&Guest> {
        match &self.link {
            PortLink::Guest(guest) => Some(guest),
            PortLink::FrontEnd(_) | PortLink::Tap(_) => None,
        }
    }

    /// A queue pair of the back end, if it is a front-end port.
    pub(crate) fn driven(&self, queue: u16) -> Option<&DrivenPair> {
        match &self.link {
            PortLink::FrontEnd(front) => front.pairs.get(usize::from(queue)),
            PortLink::Guest(_) | PortLink::Tap(_) => None,
        }
    }

    /// Longest frame that may pass, unless it is to be segmented: MTU, Ethernet and two VLAN tags.
    #[inline]
    pub(crate) fn frame_max(&self) -> u32 {
        u32::from(self.mtu.load(Ordering::Relaxed)) + 14 + 8
    }

    /// Whether frames can pass.
    pub(crate) fn linked(&self) -> bool {
        match &self.link {
            PortLink::Guest(guest) => guest.linked.load(Ordering::Relaxed),
            PortLink::FrontEnd(front) => front.linked.load(Ordering::Relaxed),
            PortLink::Tap(_) => true,
        }
    }
}
