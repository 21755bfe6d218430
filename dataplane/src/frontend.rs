//! The driver of a port that is a front end: what a guest does, for a back end. Runs on the threads of its
//! [`vhost_user::attachment`].
//!
//! One queue pair. RX buffers are merged, so that frames of 64 KiB that are yet to be segmented (GSO) pass whole, and
//! whatever a TAP can leave to its other side, both may.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::event::{EventfdFlags, eventfd};
use vhost_user::{Bells, Driver, FrontEndError, RingPlace, Started};
use vring::driver::{Area, DriverMemory, DriverRing, DriverRx, DriverTx};
use vring::features::*;

use crate::events::Events;
use crate::guest::OFFLOADS;
use crate::port::{Driven, FrontEnd, Port, PortLink, RingSlot, RingState};
use crate::report::EventKind;
use crate::worker::{Command, WorkerShared, key};

/// Features that are acknowledged if offered.
const WANTED: u64 = OFFLOADS
    | 1 << MRG_RXBUF
    | 1 << EVENT_IDX
    | 1 << PROTOCOL_FEATURES
    | 1 << VERSION_1
    | 1 << RING_PACKED
    | 1 << ORDER_PLATFORM;
/// Protocol features, by bit (vhost-user specification, "Protocol features"): REPLY_ACK, so that a refusal is heard of.
const WANTED_PROTOCOL: u64 = 1 << 3;

/// Descriptors of each ring.
const RING_SIZE: u16 = 256;
/// Bytes of each buffer: an ordinary frame in one, one of 64 KiB in 33.
const BUFFER_LEN: u32 = 2048;
/// What lies in the shared memory.
const RX: Area = Area { at: 0, size: RING_SIZE, buffer_len: BUFFER_LEN };

/// Drives a port's rings.
pub(crate) struct PortDriver {
    port: Arc<Port>,
    workers: Arc<[Arc<WorkerShared>]>,
    events: Arc<Events>,
}

/// Eventfds of a ring.
struct Fds {
    kick: OwnedFd,
    call: OwnedFd,
    err: OwnedFd,
}

impl PortDriver {
    pub(crate) fn new(port: Arc<Port>, workers: Arc<[Arc<WorkerShared>]>, events: Arc<Events>) -> Self {
        Self { port, workers, events }
    }

    fn front(&self) -> &FrontEnd {
        match &self.port.link {
            PortLink::FrontEnd(front) => front,
            _ => unreachable!("a PortDriver is made for ports that are front ends"),
        }
    }

    fn worker(&self) -> &Arc<WorkerShared> {
        &self.workers[self.front().rx.worker.load(Ordering::Relaxed) as usize % self.workers.len()]
    }

    /// Hands the rings to the workers.
    fn run(&self, rx: Driven<DriverRx>, tx: Driven<DriverTx>, features: u64) -> io::Result<()> {
        let front = self.front();
        front.set_features(features);
        self.worker().watch(rx.call.as_fd(), key(&self.port, 0))?;
        install(&front.tx, tx);
        install(&front.rx, rx);
        let (done, _) = std::sync::mpsc::channel();
        self.worker().send(Command::Add { port: self.port.clone(), queue: 0, done });
        front.linked.store(true, Ordering::Relaxed);
        self.events.tell(&self.port, EventKind::Linked);
        Ok(())
    }
}

impl Driver for PortDriver {
    fn start(&mut self, front: &mut vhost_user::FrontEnd) -> Result<Started, FrontEndError> {
        self.events.tell(&self.port, EventKind::Connected);
        let features = front.negotiate(WANTED, WANTED_PROTOCOL)?;
        for (bit, name) in [(VERSION_1, "VIRTIO_F_VERSION_1"), (MRG_RXBUF, "VIRTIO_NET_F_MRG_RXBUF")] {
            if features & (1 << bit) == 0 {
                return Err(FrontEndError::Lacks(name));
            }
        }
        let tx = Area { at: RX.bytes().next_multiple_of(64), ..RX };
        let memory = DriverMemory::huge(tx.at + tx.bytes())?;
        front.set_memory(&[(memory.region(), memory.fd())])?;
        let (rx, tx) = (DriverRx::new(&memory, RX, features), DriverTx::new(&memory, tx, features));
        let rx_fds = start_ring(front, 0, rx.ring())?;
        let tx_fds = start_ring(front, 1, tx.ring())?;
        front.enable(0, true)?;
        front.enable(1, true)?;
        let rx = Driven { ring: rx, kick: rx_fds.kick, call: rx_fds.call };
        let tx = Driven { ring: tx, kick: tx_fds.kick, call: tx_fds.call };
        self.run(rx, tx, features)?;
        Ok(Started {
            err: vec![rx_fds.err, tx_fds.err],
            ring_sizes: vec![RING_SIZE; 2],
            memory_bytes: memory.len() as u64,
        })
    }

    fn broken(&self) -> Option<String> {
        let front = self.front();
        let fault = front.rx.lock().broken;
        fault.or_else(|| front.tx.lock().broken).map(|fault| fault.to_string())
    }

    /// Why a ring broke stays to be seen until the next session.
    fn stop(&mut self) {
        let front = self.front();
        let rx = front.rx.lock().ring.take();
        if let Some(rx) = rx {
            self.worker().unwatch(rx.call.as_fd());
        }
        front.tx.lock().ring = None;
        front.set_features(0);
        if front.linked.swap(false, Ordering::Relaxed) {
            self.events.tell(&self.port, EventKind::Unlinked);
        }
        self.events.tell(&self.port, EventKind::Disconnected);
    }
}

fn install<R>(slot: &RingSlot<Driven<R>>, ring: Driven<R>) {
    *slot.lock() = RingState { ring: Some(Box::new(ring)), enabled: true, broken: None };
}

fn start_ring(front: &vhost_user::FrontEnd, index: u16, ring: &DriverRing) -> Result<Fds, FrontEndError> {
    let fd = || eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).map_err(io::Error::from);
    let fds = Fds { kick: fd()?, call: fd()?, err: fd()? };
    let adopt = |fd: &OwnedFd| fd.try_clone().map(sys::fd::adopt);
    let bells = Bells { kick: adopt(&fds.kick)?, call: adopt(&fds.call)?, err: adopt(&fds.err)? };
    let place = RingPlace { size: ring.size(), user_addrs: ring.user_addrs(), base: ring.start() };
    front.start_ring_with(index, place, &bells)?;
    Ok(fds)
}
