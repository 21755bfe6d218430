//! Delivery: frames of a burst that have one destination go into its RX ring or its TAP.
//!
//! The virtio-net header travels as it is when the destination takes what it asks for. When not, the frame is
//! gathered into private memory, its checksum completed or the frame segmented there, and the result delivered as a
//! burst of its own: slow, and only then.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use sys::call::Caller;
use vring::driver::DriverTx;
use vring::{BURST_MAX, Burst, Enqueued, Frames, HEADER_LEN, RingFault, RxRing};
use wire::{Offloads, VnetHeader, flow_hash};

use crate::counters::RingCounters;
use crate::drops::DropReason;
use crate::events::Events;
use crate::port::{Driven, FrontEnd, Guest, Port, PortLink, RingSlot, Tap, TapPort, share};

/// A ring that frames are delivered into.
trait Sink {
    /// Why frames are dropped: it has no room; it is not running; it makes no sense.
    const FULL: DropReason;
    const DOWN: DropReason;
    const BROKEN: DropReason;

    fn enqueue(&mut self, burst: &Burst<'_>, select: u64) -> Result<Enqueued, RingFault>;
    /// To be signalled when [`Enqueued::call`] says so.
    fn bell(&self) -> Option<BorrowedFd<'_>>;
    /// To be signalled when it breaks.
    fn err_fd(&self) -> Option<BorrowedFd<'_>>;
}

impl Sink for RxRing {
    const FULL: DropReason = DropReason::GuestRxRingFull;
    const DOWN: DropReason = DropReason::GuestRxRingDisabled;
    const BROKEN: DropReason = DropReason::GuestDescriptorInvalid;

    #[inline]
    fn enqueue(&mut self, burst: &Burst<'_>, select: u64) -> Result<Enqueued, RingFault> {
        self.enqueue(burst, select)
    }

    #[inline]
    fn bell(&self) -> Option<BorrowedFd<'_>> {
        self.call_fd()
    }

    fn err_fd(&self) -> Option<BorrowedFd<'_>> {
        self.err_fd()
    }
}

impl Sink for Driven<DriverTx> {
    const FULL: DropReason = DropReason::PeerRingFull;
    const DOWN: DropReason = DropReason::PeerDown;
    const BROKEN: DropReason = DropReason::PeerDown;

    fn enqueue(&mut self, burst: &Burst<'_>, select: u64) -> Result<Enqueued, RingFault> {
        self.ring.enqueue(burst, select)
    }

    fn bell(&self) -> Option<BorrowedFd<'_>> {
        Some(self.kick.as_fd())
    }

    fn err_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// What a worker needs to deliver. One per worker.
pub(crate) struct Deliverer {
    /// Index of the worker.
    worker: u32,
    pub(crate) caller: Caller,
    /// The burst at hand has no frame that asks for an offload.
    pub(crate) plain: bool,
    /// Its longest frame that nobody may segment, bytes.
    pub(crate) longest: u32,
    /// Memory of the burst at hand turned out to be gone (EFAULT).
    pub(crate) source_fault: bool,
    software: Software,
    /// For chains of more pieces than a system call takes.
    gathered: Vec<u8>,
    events: Arc<Events>,
}

impl Deliverer {
    pub(crate) fn new(worker: u32, events: Arc<Events>) -> Self {
        Self {
            worker,
            caller: Caller::new(),
            plain: true,
            longest: 0,
            source_fault: false,
            software: Software::default(),
            gathered: Vec::new(),
            events,
        }
    }

    /// Delivers the selected frames to `port`.
    #[inline]
    pub(crate) fn deliver(&mut self, port: &Port, burst: &Burst<'_>, select: u64) {
        if select == 0 {
            return;
        }
        let select = if self.longest > port.frame_max() { fitting(port, burst, select) } else { select };
        match &port.link {
            PortLink::Guest(guest) => self.guest(port, guest, burst, select),
            PortLink::FrontEnd(front) => self.front_end(port, front, burst, select),
            PortLink::Tap(tap) => self.tap(port, tap, burst, select),
        }
    }

    #[inline]
    fn guest(&mut self, port: &Port, guest: &Guest, burst: &Burst<'_>, select: u64) {
        match guest.active() {
            0 => port.counters.drop(DropReason::GuestRxRingDisabled, select.count_ones().into()),
            1 => self.queue(port, guest, guest.queue_for(0, 1), burst, select),
            active => {
                let queue_for = |hash| guest.queue_for(hash, active);
                self.spread(burst, select, queue_for, |own, queue, select| {
                    own.queue(port, guest, queue, burst, select);
                });
            }
        }
    }

    fn front_end(&mut self, port: &Port, front: &FrontEnd, burst: &Burst<'_>, select: u64) {
        let put = |own: &mut Self, queue: u16, select| {
            if let Some(pair) = front.pairs.get(usize::from(queue)) {
                own.ring(port, &pair.tx, 2 * queue + 1, front.accepts(), burst, select);
            }
        };
        match front.active() {
            0 => port.counters.drop(DropReason::PeerDown, select.count_ones().into()),
            1 => put(self, 0, select),
            active => self.spread(burst, select, |hash| share(hash, active), put),
        }
    }

    /// Several queues: a flow always goes to the same one, so that it keeps its order.
    fn spread(
        &mut self,
        burst: &Burst<'_>,
        select: u64,
        queue_for: impl Fn(u32) -> u16,
        put: impl Fn(&mut Self, u16, u64),
    ) {
        let mut queues = [0u16; BURST_MAX];
        for frame in each(select) {
            queues[frame] = queue_for(flow_hash(burst.prefix(frame)));
        }
        let mut left = select;
        while left != 0 {
            let queue = queues[left.trailing_zeros() as usize % BURST_MAX];
            let same =
                each(left).filter(|frame| queues[*frame] == queue).fold(0, |set, frame| set | 1 << frame);
            left &= !same;
            put(self, queue, same);
        }
    }

    #[inline]
    fn queue(&mut self, port: &Port, guest: &Guest, queue: u16, burst: &Burst<'_>, select: u64) {
        let Some(pair) = guest.pairs.get(usize::from(queue)) else { return };
        self.ring(port, &pair.rx, 2 * queue, guest.accepts(), burst, select);
    }

    /// Delivers into vring `index` of `port`, whose other side takes the offloads in `accepts`.
    #[inline]
    fn ring<R: Sink>(
        &mut self,
        port: &Port,
        slot: &RingSlot<R>,
        index: u16,
        accepts: Offloads,
        burst: &Burst<'_>,
        select: u64,
    ) {
        if self.plain {
            return self.enqueue(port, slot, index, burst, select);
        }
        self.offloaded(port, accepts, burst, select, |own, burst, select| {
            own.enqueue(port, slot, index, burst, select);
        });
    }

    /// Gives `put` what a receiver that takes `accepts` can have of the selected frames. Those that need no help go as
    /// they are, in runs between those that do, so that order is kept.
    #[inline(never)]
    fn offloaded(
        &mut self,
        port: &Port,
        accepts: Offloads,
        burst: &Burst<'_>,
        select: u64,
        put: impl Fn(&mut Self, &Burst<'_>, u64),
    ) {
        let mut run = 0;
        for frame in each(select) {
            if accepts.contains(VnetHeader::from_bytes(burst.header(frame)).needs()) {
                run |= 1 << frame;
                continue;
            }
            if run != 0 {
                put(self, burst, std::mem::take(&mut run));
            }
            self.help(port, accepts, burst, frame, &put);
        }
        if run != 0 {
            put(self, burst, run);
        }
    }

    /// Does for one frame what its receiver does not take. A segment is held against the receiver's MTU as if its
    /// sender had made it.
    #[inline(never)]
    fn help(
        &mut self,
        port: &Port,
        accepts: Offloads,
        burst: &Burst<'_>,
        frame: usize,
        put: impl Fn(&mut Self, &Burst<'_>, u64),
    ) {
        let mut software = std::mem::take(&mut self.software);
        if software.take(burst, frame, accepts) {
            for parts in software.parts.chunks(BURST_MAX) {
                let made = software
                    .frames
                    .load(parts.iter().map(|part| (&part.header, &software.bytes[part.start..part.end])));
                let select = fitting(port, &made, made.valid());
                put(self, &made, select);
            }
        } else {
            port.counters.drop(DropReason::GsoUnsupported, 1);
        }
        self.software = software;
    }

    #[inline]
    fn enqueue<R: Sink>(
        &mut self,
        port: &Port,
        slot: &RingSlot<R>,
        index: u16,
        burst: &Burst<'_>,
        select: u64,
    ) {
        let mut state = slot.lock();
        let enabled = state.enabled;
        let Some(ring) = state.ring.as_mut().filter(|_| enabled) else {
            return port.counters.drop(R::DOWN, select.count_ones().into());
        };
        let counters = slot.counters();
        match ring.enqueue(burst, select) {
            Ok(done) => {
                let gso = if self.plain { 0 } else { gso_frames(burst, select) };
                counters.burst_alone(done.frames.into(), done.bytes, gso.min(done.frames.into()));
                if done.full | done.too_small | done.malformed | done.unmapped != 0 {
                    counters.drop(R::FULL, done.full.into());
                    counters.drop(DropReason::GuestBufferTooSmall, done.too_small.into());
                    counters.drop(DropReason::GuestDescriptorInvalid, done.malformed.into());
                    counters.drop(DropReason::GuestUnmappedAddress, done.unmapped.into());
                }
                if done.call
                    && let Some(call) = ring.bell()
                {
                    counters.calls.add(1);
                    // What cannot be signalled is the other side's loss: its eventfd is no eventfd any more.
                    let _ = self.caller.call(call);
                }
            }
            Err(fault) => {
                counters.drop(R::BROKEN, select.count_ones().into());
                if let Some(err) = ring.err_fd() {
                    let _ = self.caller.call(err);
                }
                state.ring = None;
                state.broken = Some(fault);
                drop(state);
                self.events.ring_broken(port, index, fault);
            }
        }
    }

    fn tap(&mut self, port: &Port, tap: &Tap, burst: &Burst<'_>, select: u64) {
        let Some(queue) = tap.queues.get(self.worker as usize % tap.queues.len().max(1)) else { return };
        if self.plain {
            return self.write(queue, burst, select);
        }
        self.offloaded(port, tap.accepts(), burst, select, |own, burst, select| {
            own.write(queue, burst, select);
        });
    }

    fn write(&mut self, queue: &TapPort, burst: &Burst<'_>, select: u64) {
        let (mut sent, mut bytes) = (0u64, 0);
        for frame in each(select) {
            match burst.write_to(frame, queue.queue.as_fd(), &mut self.gathered) {
                Ok(_) => {
                    sent |= 1 << frame;
                    bytes += u64::from(burst.frame_len(frame));
                }
                Err(error) => self.tap_refused(&queue.tx, &error),
            }
        }
        let gso = if self.plain { 0 } else { gso_frames(burst, sent) };
        queue.tx.burst(sent.count_ones().into(), bytes, gso);
    }

    #[cold]
    fn tap_refused(&mut self, counters: &RingCounters, error: &std::io::Error) {
        let reason = match error.raw_os_error().map(rustix::io::Errno::from_raw_os_error) {
            Some(rustix::io::Errno::AGAIN | rustix::io::Errno::NOBUFS) => DropReason::TapQueueFull,
            // The kernel found guest memory missing, or could not make sense of the offload.
            Some(rustix::io::Errno::FAULT) => {
                self.source_fault = true;
                DropReason::GuestUnmappedAddress
            }
            Some(rustix::io::Errno::INVAL) => DropReason::BadOffload,
            _ => DropReason::TapError,
        };
        counters.drop(reason, 1);
    }
}

/// Those frames that the destination's MTU allows. A network whose ports differ in MTU is misconfigured.
#[cold]
fn fitting(port: &Port, burst: &Burst<'_>, select: u64) -> u64 {
    let max = port.frame_max();
    let fits = |frame: &usize| {
        burst.frame_len(*frame) <= max || VnetHeader::from_bytes(burst.header(*frame)).is_gso()
    };
    let fitting = each(select).filter(fits).fold(0, |set, frame| set | 1 << frame);
    port.counters.drop(DropReason::MtuExceeded, (select & !fitting).count_ones().into());
    fitting
}

fn gso_frames(burst: &Burst<'_>, select: u64) -> u64 {
    each(select).filter(|frame| VnetHeader::from_bytes(burst.header(*frame)).is_gso()).count() as u64
}

/// The frames of a set, in order.
#[inline]
fn each(mut set: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let frame = (set != 0).then(|| set.trailing_zeros() as usize % BURST_MAX)?;
        set &= set - 1;
        Some(frame)
    })
}

/// Room for what software makes of one frame.
#[derive(Default)]
struct Software {
    gathered: Vec<u8>,
    bytes: Vec<u8>,
    parts: Vec<Part>,
    frames: Frames,
}

/// One frame in [`Software::bytes`].
struct Part {
    header: [u8; HEADER_LEN],
    start: usize,
    end: usize,
}

impl Software {
    /// Makes of frame `frame` one or more frames that `accepts` suffices for. False if that cannot be done.
    fn take(&mut self, burst: &Burst<'_>, frame: usize, accepts: Offloads) -> bool {
        self.gathered.clear();
        self.bytes.clear();
        self.parts.clear();
        burst.gather(frame, &mut self.gathered);
        let header = VnetHeader::from_bytes(burst.header(frame));
        if header.is_gso() {
            let (bytes, parts) = (&mut self.bytes, &mut self.parts);
            let with_checksum = !accepts.contains(Offloads::CSUM);
            let cut = wire::segment(&self.gathered, &header, with_checksum, |header, head, payload| {
                let start = bytes.len();
                bytes.extend_from_slice(head);
                bytes.extend_from_slice(payload);
                parts.push(Part { header: header.to_bytes(), start, end: bytes.len() });
            });
            return cut.is_ok();
        }
        let completed = wire::checksum::complete(&mut self.gathered, &header);
        std::mem::swap(&mut self.bytes, &mut self.gathered);
        self.parts.push(Part { header: VnetHeader::PLAIN.to_bytes(), start: 0, end: self.bytes.len() });
        completed.is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::OwnedFd;
    use std::os::unix::net::UnixDatagram;
    use std::sync::atomic::{AtomicU16, AtomicU32};

    use sys::tap::TapQueue;
    use wire::craft::{Craft, leave_segments};
    use wire::{Mac, checksum};

    use crate::report::PortId;
    use crate::switch::Network;

    /// A port whose TAP is one end of a pair of sockets, which keep frames apart as a TAP does; and the other end.
    fn port(accepts: Offloads) -> (Port, UnixDatagram) {
        let (ours, other) = UnixDatagram::pair().unwrap();
        other.set_nonblocking(true).unwrap();
        let queue = TapPort {
            queue: TapQueue::from(OwnedFd::from(ours)),
            worker: AtomicU32::new(0),
            rx: RingCounters::default(),
            tx: RingCounters::default(),
        };
        let port = Port {
            id: PortId(1),
            name: "tap".into(),
            network: Arc::new(Network::new("net".into())),
            slot: 0,
            mtu: AtomicU16::new(1500),
            fdb_max: 1,
            counters: RingCounters::default(),
            link: PortLink::Tap(Tap::new(accepts, true, Box::new([queue]))),
        };
        (port, other)
    }

    /// What comes out at the other end of a frame, and a plain one before and behind it.
    fn through(
        accepts: Offloads,
        header: VnetHeader,
        frame: &[u8],
        plain: &[u8],
    ) -> Vec<(VnetHeader, Vec<u8>)> {
        let (port, other) = port(accepts);
        let mut deliverer = Deliverer::new(0, Arc::new(Events { sink: Box::new(|_| {}) }));
        let mut frames = Frames::default();
        let headers = [VnetHeader::PLAIN, header].map(VnetHeader::to_bytes);
        let [plain_header, header] = &headers;
        let burst = frames.load([(plain_header, plain), (header, frame), (plain_header, plain)]);
        (deliverer.plain, deliverer.longest) = (false, burst.frame_len(1));
        deliverer.deliver(&port, &burst, burst.valid());
        let mut room = vec![0; 70_000];
        std::iter::from_fn(|| {
            let len = other.recv(&mut room).ok()?;
            let (header, frame) = room[..len].split_first_chunk::<HEADER_LEN>()?;
            Some((VnetHeader::from_bytes(header), frame.to_vec()))
        })
        .collect()
    }

    #[test]
    fn a_tap_gets_frames_of_any_length_none_shorter_than_a_wire_has() {
        for len in [14, 59, 60, 116, 117, 1514] {
            let frame: Vec<u8> = (0u8..=255).cycle().take(len).collect();
            let mut padded = frame.clone();
            padded.resize(len.max(60), 0);
            let got = through(Offloads::NONE, VnetHeader::PLAIN, &frame, &frame);
            assert_eq!(got.len(), 3, "{len}");
            assert!(got.iter().all(|(_, bytes)| *bytes == padded), "{len}");
        }
    }

    #[test]
    fn what_a_tap_does_not_take_is_cut_for_it_in_its_place() {
        let [src, dst] = [1, 2].map(Mac::from_u64);
        let craft = Craft::v4(src, dst, [10, 0, 0, 1].into(), [10, 0, 0, 2].into());
        let payload: Vec<u8> = (0..5000u16).map(|i| i.to_le_bytes()[0]).collect();
        let plain = craft.udp(3, 4, &payload[..100]);
        let mut frame = craft.udp(1, 2, &payload);
        let header = leave_segments(&mut frame, 1300).unwrap();

        let whole = through(Offloads::CSUM | Offloads::USO, header, &frame, &plain);
        assert_eq!(whole.iter().map(|(_, frame)| frame).collect::<Vec<_>>(), [&plain, &frame, &plain]);
        assert_eq!(whole[1].0, header);

        let cut = through(Offloads::CSUM, header, &frame, &plain);
        let (first, pieces, last) = (&cut[0], &cut[1..cut.len() - 1], &cut[cut.len() - 1]);
        assert_eq!((&first.1, &last.1, pieces.len()), (&plain, &plain, 4));
        for ((header, bytes), (id, piece)) in pieces.iter().zip((0u16..).zip(payload.chunks(1300))) {
            let mut wanted = craft.udp(1, 2, piece);
            wanted[18..20].copy_from_slice(&id.to_be_bytes());
            let sum = checksum::ipv4_header(&wanted[14..34]);
            wanted[24..26].copy_from_slice(&sum.to_be_bytes());
            let mut bytes = bytes.clone();
            assert!(header.needs_csum() && !header.is_gso());
            checksum::complete(&mut bytes, header).unwrap();
            assert_eq!(bytes, wanted);
        }
    }
}
