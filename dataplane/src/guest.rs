//! The vhost-user device of a port: what its session asks of the rings. Runs on the session thread.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use sys::call::Caller;
use vhost_user::{Device, NetConfig, Offer, Peer, Refusal};
use vring::features::*;
use vring::{GuestMemory, RingError, RingFault, RingSetup, RxRing, TxRing};
use wire::Mac;

use crate::MTU_MIN;
use crate::events::Events;
use crate::port::{Guest, Port, QUEUE_PAIRS_MAX, QueuePair, RingState};
use crate::report::EventKind;
use crate::worker::{Command, WorkerShared};

/// What may be left to the other side, both ways: all that a TAP can leave to its own.
pub(crate) const OFFLOADS: u64 = 1 << CSUM
    | 1 << GUEST_CSUM
    | 1 << GUEST_TSO4
    | 1 << GUEST_TSO6
    | 1 << GUEST_ECN
    | 1 << HOST_TSO4
    | 1 << HOST_TSO6
    | 1 << HOST_ECN
    | 1 << GUEST_USO4
    | 1 << GUEST_USO6
    | 1 << HOST_USO;

/// Features that every vhost-user port offers. CTRL_VQ and what belongs to it is offered so that front ends may offer
/// it; they keep the queue to themselves.
///
/// RING_RESET is not among them, though one ring can be stopped and set up again at any time: QEMU 7.2 lets the guest reset
/// a ring and does not tell a vhost-user back end, which would go on in memory that the guest has given to others.
const OFFERED: u64 = OFFLOADS
    | 1 << MTU
    | 1 << MRG_RXBUF
    | 1 << STATUS
    | 1 << CTRL_VQ
    | 1 << CTRL_RX
    | 1 << GUEST_ANNOUNCE
    | 1 << MQ
    | 1 << ANY_LAYOUT
    | 1 << INDIRECT_DESC
    | 1 << EVENT_IDX
    | 1 << PROTOCOL_FEATURES
    | 1 << VERSION_1
    | 1 << RING_PACKED
    | 1 << IN_ORDER
    | 1 << ORDER_PLATFORM;

/// Protocol features, by bit (vhost-user specification, "Protocol features"): MQ, RARP, REPLY_ACK, NET_MTU, BACKEND_REQ,
/// CONFIG, RESET_DEVICE, CONFIGURE_MEM_SLOTS, STATUS.
const OFFERED_PROTOCOL: u64 =
    1 << 0 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 9 | 1 << 13 | 1 << 15 | 1 << 16;

/// Link is up (virtio 1.2, 5.1.4, VIRTIO_NET_S_LINK_UP).
const LINK_UP: u16 = 1;

/// The device.
pub(crate) struct GuestDevice {
    port: Arc<Port>,
    workers: Arc<[Arc<WorkerShared>]>,
    events: Arc<Events>,
    /// What the port was made with; a front end may ask for less.
    mtu_max: u16,
    caller: Arc<Mutex<Caller>>,
}

impl GuestDevice {
    /// `caller` is for the session thread, one for all ports: to end a context of asynchronous I/O takes the kernel tens
    /// of milliseconds.
    pub(crate) fn new(
        port: Arc<Port>,
        workers: Arc<[Arc<WorkerShared>]>,
        events: Arc<Events>,
        caller: Arc<Mutex<Caller>>,
    ) -> Self {
        let mtu_max = port.mtu.load(Ordering::Relaxed);
        Self { port, workers, events, mtu_max, caller }
    }

    /// Signals an eventfd of the front end.
    fn signal(&self, fd: BorrowedFd<'_>) {
        // What cannot be signalled is the front end's loss.
        let _ = self.caller.lock().unwrap_or_else(PoisonError::into_inner).call(fd);
    }

    fn guest(&self) -> &Guest {
        self.port.guest().expect("a GuestDevice is made for vhost-user ports")
    }

    /// The pair that a vring belongs to.
    fn pair(&self, index: u16) -> Option<&QueuePair> {
        self.guest().pairs.get(usize::from(index / 2))
    }

    fn worker(&self, pair: &QueuePair) -> &Arc<WorkerShared> {
        &self.workers[pair.tx.worker.load(Ordering::Relaxed) as usize % self.workers.len()]
    }

    fn start_rx(
        &self,
        pair: &QueuePair,
        setup: RingSetup,
        memory: &Arc<GuestMemory>,
    ) -> Result<(), RingError> {
        let enabled = setup.enabled;
        let ring = Box::new(RxRing::start(setup, memory)?);
        *pair.rx.lock() = RingState { ring: Some(ring), enabled, broken: None };
        Ok(())
    }

    fn start_tx(
        &self,
        queue: u16,
        pair: &QueuePair,
        setup: RingSetup,
        memory: &Arc<GuestMemory>,
    ) -> Result<(), RingError> {
        let enabled = setup.enabled;
        let ring = Box::new(TxRing::start(setup, memory)?);
        pair.tx.start(&self.port, queue, &self.workers, ring, enabled);
        Ok(())
    }

    /// Works out which RX queues take frames and whether the port is linked, and tells of a change.
    fn relink(&self) {
        let guest = self.guest();
        let runs = |(queue, pair): (u8, &QueuePair)| {
            let state = pair.rx.lock();
            (state.enabled && state.ring.is_some()).then_some(queue)
        };
        guest.set_active((0..).zip(&guest.pairs).filter_map(runs));
        let sends = guest.pairs.iter().any(|pair| {
            let state = pair.tx.lock();
            state.enabled && state.ring.is_some()
        });
        let linked = sends && guest.active() != 0;
        if guest.linked.swap(linked, Ordering::Relaxed) != linked {
            self.events.tell(&self.port, if linked { EventKind::Linked } else { EventKind::Unlinked });
        }
    }

    fn broke(&self, index: u16, err: Option<BorrowedFd<'_>>, fault: RingFault) {
        if let Some(err) = err {
            self.signal(err);
        }
        self.events.ring_broken(&self.port, index, fault);
    }
}

/// Has the worker of a guest's first queue pair send RARPs for `mac`.
pub(crate) fn announce(port: &Arc<Port>, workers: &[Arc<WorkerShared>], events: &Events, mac: [u8; 6]) {
    let first = port.guest().and_then(|guest| guest.pairs.first());
    let worker = first.map_or(0, |pair| pair.tx.worker.load(Ordering::Relaxed) as usize);
    workers[worker % workers.len()].send(Command::Announce { port: port.clone(), mac });
    events.tell(port, EventKind::Announced(mac));
}

impl Device for GuestDevice {
    fn offer(&self) -> Offer {
        let mac = u64::from(self.guest().mac.is_some()) << MAC;
        Offer { features: OFFERED | mac, protocol_features: OFFERED_PROTOCOL, queue_pairs: QUEUE_PAIRS_MAX }
    }

    fn config(&self) -> NetConfig {
        NetConfig {
            mac: self.guest().mac,
            status: LINK_UP,
            max_queue_pairs: u16::try_from(self.guest().pairs.len()).unwrap_or(QUEUE_PAIRS_MAX),
            mtu: Some(self.port.mtu.load(Ordering::Relaxed)),
        }
    }

    fn connected(&mut self, _peer: Peer) {
        self.port.mtu.store(self.mtu_max, Ordering::Relaxed);
        self.events.tell(&self.port, EventKind::Connected);
    }

    fn set_features(&mut self, features: u64) {
        self.guest().set_features(features);
    }

    fn set_mtu(&mut self, mtu: u64) -> Result<(), Refusal> {
        let refusal = Refusal::Mtu { asked: mtu, min: MTU_MIN, max: self.mtu_max };
        let possible = u16::try_from(mtu).ok().filter(|mtu| (MTU_MIN..=self.mtu_max).contains(mtu));
        self.port.mtu.store(possible.ok_or(refusal)?, Ordering::Relaxed);
        Ok(())
    }

    fn send_rarp(&mut self, mac: [u8; 6]) -> Result<(), Refusal> {
        let address = Mac::new(mac);
        if address.is_multicast() || address.is_zero() || self.guest().mac.is_some_and(|own| own != mac) {
            return Err(Refusal::Mac(mac));
        }
        announce(&self.port, &self.workers, &self.events, mac);
        Ok(())
    }

    fn start_ring(
        &mut self,
        index: u16,
        setup: RingSetup,
        memory: &Arc<GuestMemory>,
    ) -> Result<(), RingError> {
        let pair = self.pair(index).ok_or(RingError::Index(index))?;
        if index.is_multiple_of(2) {
            self.start_rx(pair, setup, memory)?;
        } else {
            self.start_tx(index / 2, pair, setup, memory)?;
        }
        self.relink();
        Ok(())
    }

    fn stop_ring(&mut self, index: u16) -> Option<u32> {
        let pair = self.pair(index)?;
        let base = if index.is_multiple_of(2) {
            let stopped = pair.rx.lock().ring.take();
            stopped.map(|ring| ring.base())
        } else {
            pair.tx.stop(&self.workers).map(|ring| ring.base())
        };
        self.relink();
        base
    }

    fn enable_ring(&mut self, index: u16, enabled: bool) {
        let Some(pair) = self.pair(index) else { return };
        if index.is_multiple_of(2) {
            pair.rx.lock().enabled = enabled;
        } else {
            pair.tx.lock().enabled = enabled;
        }
        self.relink();
    }

    fn set_call(&mut self, index: u16, call: Option<OwnedFd>) {
        let Some(pair) = self.pair(index) else { return };
        // What was used before may have been signalled on the old fd only: signal the new one once.
        if let Some(call) = &call {
            self.signal(call.as_fd());
        }
        if index.is_multiple_of(2) {
            if let Some(ring) = pair.rx.lock().ring.as_mut() {
                ring.set_call(call);
            }
        } else if let Some(ring) = pair.tx.lock().ring.as_mut() {
            ring.set_call(call);
        }
    }

    fn set_err(&mut self, index: u16, err: Option<OwnedFd>) {
        let Some(pair) = self.pair(index) else { return };
        if index.is_multiple_of(2) {
            if let Some(ring) = pair.rx.lock().ring.as_mut() {
                ring.set_err(err);
            }
        } else if let Some(ring) = pair.tx.lock().ring.as_mut() {
            ring.set_err(err);
        }
    }

    fn set_memory(&mut self, memory: &Arc<GuestMemory>) {
        for (queue, pair) in (0u16..).zip(&self.guest().pairs) {
            let mut rx = pair.rx.lock();
            if let Some(Err(fault)) = rx.ring.as_mut().map(|ring| ring.set_memory(memory)) {
                let ring = rx.ring.take();
                rx.broken = Some(fault);
                drop(rx);
                self.broke(2 * queue, ring.as_ref().and_then(|r| r.err_fd()), fault);
            } else {
                // Nobody takes a TX lock while holding an RX lock.
                drop(rx);
            }
            let mut tx = pair.tx.lock();
            if let Some(Err(fault)) = tx.ring.as_mut().map(|ring| ring.set_memory(memory)) {
                let ring = tx.ring.take();
                tx.broken = Some(fault);
                if let Some(kick) = ring.as_ref().and_then(|r| r.kick_fd()) {
                    self.worker(pair).unwatch(kick);
                }
                drop(tx);
                self.broke(2 * queue + 1, ring.as_ref().and_then(|r| r.err_fd()), fault);
            }
        }
        self.relink();
    }

    fn disconnected(&mut self) {
        for pair in &self.guest().pairs {
            *pair.rx.lock() = RingState { ring: None, enabled: false, broken: None };
            pair.tx.stop(&self.workers);
            *pair.tx.lock() = RingState { ring: None, enabled: false, broken: None };
        }
        self.guest().set_features(0);
        self.relink();
        self.events.tell(&self.port, EventKind::Disconnected);
    }
}
