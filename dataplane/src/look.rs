//! What is told of a port's rings, read while workers go on.

use std::sync::atomic::{AtomicU32, Ordering};

use vring::{RxRing, TxRing};

use crate::counters::RingCounters;
use crate::placement::QueueSample;
use crate::port::{Port, PortLink, RingSlot, Tap, TapPort};
use crate::report::{Counters, RingReport};

/// Rings that ever ran, in vring order; of a TAP, its queues.
pub(crate) fn rings(port: &Port) -> Vec<RingReport> {
    let mut rings = Vec::new();
    match &port.link {
        PortLink::Guest(guest) => {
            for (n, pair) in (0u16..).zip(&guest.pairs) {
                let worker = &pair.tx.worker;
                rings.extend(ring(&pair.rx, RxRing::size, 2 * n, worker, false));
                rings.extend(ring(&pair.tx, TxRing::size, 2 * n + 1, worker, true));
            }
        }
        PortLink::FrontEnd(front) => {
            for (n, pair) in (0u16..).zip(&front.pairs) {
                let worker = &pair.rx.worker;
                rings.extend(ring(&pair.rx, |rx| rx.ring.ring().size(), 2 * n, worker, true));
                rings.extend(ring(&pair.tx, |tx| tx.ring.ring().size(), 2 * n + 1, worker, false));
            }
        }
        PortLink::Tap(tap) => rings.extend(tap_queues(tap)),
    }
    rings
}

/// One ring, if it ever ran. `worker` is the one of its pair.
fn ring<R>(
    slot: &RingSlot<R>,
    size: impl Fn(&R) -> u16,
    index: u16,
    worker: &AtomicU32,
    from_port: bool,
) -> Option<RingReport> {
    let counted = slot.counters_if_any();
    let state = slot.lock();
    let size = state.ring.as_deref().map(size);
    if size.is_none() && counted.is_none() {
        return None;
    }
    let mut counters = Counters::default();
    if let Some(counted) = counted {
        counted.add_to(&mut counters, from_port);
    }
    Some(RingReport {
        index,
        started: size.is_some(),
        enabled: state.enabled,
        broken: state.broken.map(|fault| fault.to_string()),
        size: size.unwrap_or(0),
        worker: worker.load(Ordering::Relaxed) as usize,
        counters,
        kicks: counted.map_or(0, |c| c.kicks.read()),
        calls: counted.map_or(0, |c| c.calls.read()),
        bursts: counted.map_or(0, |c| c.bursts.read()),
    })
}

fn tap_queues(tap: &Tap) -> impl Iterator<Item = RingReport> {
    let report = |(index, queue): (u16, &TapPort)| {
        let mut counters = Counters::default();
        queue.rx.add_to(&mut counters, true);
        queue.tx.add_to(&mut counters, false);
        RingReport {
            index,
            started: true,
            enabled: true,
            broken: None,
            size: 0,
            worker: queue.worker.load(Ordering::Relaxed) as usize,
            counters,
            kicks: 0,
            calls: 0,
            bursts: queue.rx.bursts.read() + queue.tx.bursts.read(),
        }
    };
    (0u16..).zip(&tap.queues).map(report)
}

/// A queue that frames come from, and one worker polls.
struct Polled<'a> {
    queue: u16,
    /// Of its vring; of a TAP, the queue again.
    index: u16,
    worker: u32,
    counters: Option<&'a RingCounters>,
    runs: bool,
    movable: bool,
    /// NUMA node of its memory.
    node: Option<u32>,
}

impl<'a> Polled<'a> {
    fn ring<R>(queue: u16, index: u16, slot: &'a RingSlot<R>, node: impl FnOnce(&R) -> Option<u32>) -> Self {
        let state = slot.lock();
        Self {
            queue,
            index,
            worker: slot.worker.load(Ordering::Relaxed),
            counters: slot.counters_if_any(),
            runs: state.ring.is_some(),
            movable: true,
            node: state.ring.as_deref().and_then(node),
        }
    }

    fn tap(queue: u16, tap: &'a TapPort) -> Self {
        let worker = tap.worker.load(Ordering::Relaxed);
        let counters = Some(&tap.rx);
        Self { queue, index: queue, worker, counters, runs: true, movable: false, node: None }
    }
}

/// `ask`: where a guest's memory is, which takes a system call.
fn polled(port: &Port, ask: bool) -> Vec<Polled<'_>> {
    let node = |ring: &TxRing| if ask { ring.node() } else { None };
    match &port.link {
        PortLink::Guest(guest) => {
            (0..).zip(&guest.pairs).map(|(n, pair)| Polled::ring(n, 2 * n + 1, &pair.tx, node)).collect()
        }
        PortLink::FrontEnd(front) => {
            (0..).zip(&front.pairs).map(|(n, pair)| Polled::ring(n, 2 * n, &pair.rx, |_| None)).collect()
        }
        PortLink::Tap(tap) => (0..).zip(&tap.queues).map(|(n, queue)| Polled::tap(n, queue)).collect(),
    }
}

/// How far the port's queues are. `ask`: where their memory is, too.
pub(crate) fn samples(port: &Port, ask: bool) -> impl Iterator<Item = QueueSample> {
    polled(port, ask).into_iter().map(|polled| QueueSample {
        port: port.id,
        name: port.name.clone(),
        queue: polled.queue,
        worker: polled.worker as usize,
        frames: polled.counters.map_or(0, |c| c.frames.read()),
        movable: polled.movable,
        node: polled.node,
    })
}

/// "port/index" of what a worker polls of a port.
pub(crate) fn polled_by(port: &Port, worker: u32) -> impl Iterator<Item = String> {
    let by_it = polled(port, false).into_iter().filter(move |polled| polled.runs && polled.worker == worker);
    by_it.map(|polled| format!("{}/{}", port.name, polled.index))
}
