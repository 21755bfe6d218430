//! The driver of a port that is a front end: what a guest does, for a back end. Runs on the threads of its
//! [`vhost_user::attachment`].
//!
//! As many queue pairs run as were asked for and the back end has. RX buffers are merged, so that frames of 64 KiB that are
//! yet to be segmented (GSO) pass whole, and whatever a TAP can leave to its other side, both may.
//!
//! # Memory
//!
//! Each session has memory of its own, made when a back end is there and given back when it goes. What nobody has touched
//! takes none, so a port that is connected and idle costs 55 KiB with its thread. The back end uses RX buffers one after the
//! other: traffic soon takes all of them, 2.3 MiB a queue pair. Of the TX buffers, as many again, it takes those that were
//! once on their way together. Two ports between which TCP had passed at 7 Gbit/s had 7.1 MiB.
//!
//! Fewer buffers at first, and more when many were found used at once, kept ports with little traffic at 0.2 MiB, at the same rate
//! of TCP. But whoever sends at once what the ring would have held loses frames then, just when the worker was away for a
//! moment: memory is cheaper.
//!
//! Pages are ordinary ones. Huge pages were measured, and gave nothing: 6.5 to 7.4 Gbit/s of TCP through OVS-DPDK with
//! them, 7.0 to 7.5 without; 143 cycles for a frame of 64 bytes from testpmd either way. An idle port would take 4 MiB
//! from a pool that guests were meant to have.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::event::{EventfdFlags, eventfd};
use vhost_user::{Bells, Driver, FrontEndError, RingPlace, Started};
use vring::driver::{Area, DriverMemory, DriverRing, DriverRx, DriverTx};
use vring::features::*;

use crate::events::Events;
use crate::guest::OFFLOADS;
use crate::port::{Driven, DrivenPair, FrontEnd, Port, PortLink, RingState};
use crate::report::EventKind;
use crate::worker::WorkerShared;

/// Features that are acknowledged if offered.
const WANTED: u64 = OFFLOADS
    | 1 << MRG_RXBUF
    | 1 << EVENT_IDX
    | 1 << PROTOCOL_FEATURES
    | 1 << VERSION_1
    | 1 << RING_PACKED
    | 1 << ORDER_PLATFORM;
/// Protocol features, by bit (vhost-user specification, "Protocol features"): MQ and CONFIG, to ask how many queue pairs
/// there are; REPLY_ACK, so that a refusal is heard of.
const PROTOCOL_MQ: u64 = 1 << 0;
const PROTOCOL_CONFIG: u64 = 1 << 9;
const WANTED_PROTOCOL: u64 = PROTOCOL_MQ | 1 << 3 | PROTOCOL_CONFIG;
/// Where max_virtqueue_pairs is in the configuration (virtio 1.2, 5.1.4).
const CONFIG_PAIRS_AT: u32 = 8;

/// Descriptors of each ring: for 31 frames of 64 KiB, as a TAP gives and another switch sends them in one burst.
const RING_SIZE: u16 = 1024;
/// The same for a back end that refuses so many.
const RING_SIZE_SMALL: u16 = 256;
/// Bytes of each buffer: an ordinary frame in one, one of 64 KiB in 33.
const BUFFER_LEN: u32 = 2048;

/// Drives a port's rings.
pub(crate) struct PortDriver {
    port: Arc<Port>,
    workers: Arc<[Arc<WorkerShared>]>,
    events: Arc<Events>,
    /// Of the next session.
    ring_size: u16,
}

/// A queue pair that the back end knows.
struct Pair {
    rx: Driven<DriverRx>,
    tx: Driven<DriverTx>,
    /// Signalled by the back end when one of its rings breaks.
    err: [OwnedFd; 2],
}

/// Eventfds of a ring.
struct Fds {
    kick: OwnedFd,
    call: OwnedFd,
    err: OwnedFd,
}

impl PortDriver {
    pub(crate) fn new(port: Arc<Port>, workers: Arc<[Arc<WorkerShared>]>, events: Arc<Events>) -> Self {
        Self { port, workers, events, ring_size: RING_SIZE }
    }

    fn front(&self) -> &FrontEnd {
        match &self.port.link {
            PortLink::FrontEnd(front) => front,
            _ => unreachable!("a PortDriver is made for ports that are front ends"),
        }
    }

    /// Hands the rings to the workers; the descriptors that say when one breaks.
    fn run(&self, pairs: Vec<Pair>, features: u64) -> Vec<OwnedFd> {
        let front = self.front();
        front.set_features(features);
        let mut err = Vec::new();
        let mut active = 0;
        for ((queue, slots), pair) in (0u16..).zip(&front.pairs).zip(pairs) {
            *slots.tx.lock() = RingState { ring: Some(Box::new(pair.tx)), enabled: true, broken: None };
            slots.rx.start(&self.port, queue, &self.workers, Box::new(pair.rx), true);
            err.extend(pair.err);
            active += 1;
        }
        front.set_active(active);
        front.linked.store(true, Ordering::Relaxed);
        self.events.tell(&self.port, EventKind::Linked);
        err
    }

    /// The whole handshake, with rings of `size`.
    fn shake_hands(&self, back: &mut vhost_user::FrontEnd, size: u16) -> Result<Started, FrontEndError> {
        let asked = self.front().pairs.len();
        let features = back.negotiate(WANTED | u64::from(asked > 1) << MQ, WANTED_PROTOCOL)?;
        for (bit, name) in [(VERSION_1, "VIRTIO_F_VERSION_1"), (MRG_RXBUF, "VIRTIO_NET_F_MRG_RXBUF")] {
            if features & (1 << bit) == 0 {
                return Err(FrontEndError::Lacks(name));
            }
        }
        let rings = 2 * asked.min(queue_pairs(back, features)?);
        let area = Area { at: 0, size, buffer_len: BUFFER_LEN };
        let stride = area.bytes().next_multiple_of(64);
        let memory = DriverMemory::new(rings * stride)?;
        back.set_memory(&[(memory.region(), memory.fd())])?;
        let mut pairs = Vec::new();
        let mut areas = (0..rings).map(|n| Area { at: n * stride, ..area });
        while let (Some(rx), Some(tx)) = (areas.next(), areas.next()) {
            let (rx, tx) = (DriverRx::new(&memory, rx, features), DriverTx::new(&memory, tx, features));
            let index = 2 * u16::try_from(pairs.len()).expect("no more than a port may have");
            let rx_fds = start_ring(back, index, rx.ring())?;
            let tx_fds = start_ring(back, index + 1, tx.ring())?;
            pairs.push(Pair {
                rx: Driven { ring: rx, kick: rx_fds.kick, call: rx_fds.call },
                tx: Driven { ring: tx, kick: tx_fds.kick, call: tx_fds.call },
                err: [rx_fds.err, tx_fds.err],
            });
        }
        // A back end takes the first rings that are ready for all that there are.
        for (index, _) in (0..).zip(0..rings) {
            back.enable(index, true)?;
        }
        let err = self.run(pairs, features);
        Ok(Started { err, ring_sizes: vec![size; rings], memory_bytes: memory.len() as u64 })
    }
}

impl Driver for PortDriver {
    fn start(&mut self, back: &mut vhost_user::FrontEnd) -> Result<Started, FrontEndError> {
        self.events.tell(&self.port, EventKind::Connected);
        let size = std::mem::replace(&mut self.ring_size, RING_SIZE);
        let started = self.shake_hands(back, size);
        if size == RING_SIZE && started.as_ref().is_err_and(FrontEndError::is_refusal) {
            self.ring_size = RING_SIZE_SMALL;
        }
        started
    }

    fn broken(&self) -> Option<String> {
        let faults = |pair: &DrivenPair| pair.rx.lock().broken.or_else(|| pair.tx.lock().broken);
        self.front().pairs.iter().find_map(faults).map(|fault| fault.to_string())
    }

    /// Why a ring broke stays to be seen until the next session.
    fn stop(&mut self) {
        let front = self.front();
        front.set_active(0);
        for pair in &front.pairs {
            pair.rx.stop(&self.workers);
            pair.tx.lock().ring = None;
        }
        front.set_features(0);
        if front.linked.swap(false, Ordering::Relaxed) {
            self.events.tell(&self.port, EventKind::Unlinked);
        }
        self.events.tell(&self.port, EventKind::Disconnected);
    }
}

/// Queue pairs that the back end has: those that its software can have, and those that this device of it has.
fn queue_pairs(back: &mut vhost_user::FrontEnd, features: u64) -> Result<usize, FrontEndError> {
    if features & 1 << MQ == 0 || back.protocol_features() & PROTOCOL_MQ == 0 {
        return Ok(1);
    }
    let mut pairs = back.queue_pairs()?;
    if back.protocol_features() & PROTOCOL_CONFIG != 0 {
        let told = back.config(CONFIG_PAIRS_AT, 2)?;
        pairs = pairs.min(told.try_into().map_or(1, u16::from_le_bytes).into());
    }
    Ok(usize::try_from(pairs).unwrap_or(usize::MAX).max(1))
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
