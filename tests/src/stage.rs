//! The stage for a hostile guest: a port for it, a neighbour in the same network, and a canary pair in another.
//!
//! Whatever the guest does, [`Stage::good`] shows that its lawful frames arrive, [`Stage::settle`] that every frame was
//! counted once and with the right reason, and [`Stage::finish`] that the canaries lost nothing and nothing is left.

use anyhow::{Context, Result, ensure};
use dataplane::{DropReason, EventKind, PortId};
use vring::Descriptor;
use wire::VnetHeader;

use crate::canary::Canary;
use crate::hand::{Hand, HandConfig};
use crate::inproc::{Census, Ledger, Plane, PortPlan, until};
use crate::oracle::{Checker, Flow, Oracle};
use crate::peer::{Ear, MERGEABLE, Peer, PeerConfig};

/// Address of the hostile guest.
pub const HOSTILE: [u8; 6] = [2, 0xba, 0xd0, 0, 0, 1];
/// Address of its neighbour.
pub const NEIGHBOUR: [u8; 6] = [2, 0, 0, 0, 0, 2];
/// The hostile guest's network.
pub const NETWORK: &str = "hostile";
/// Largest payload in that network.
pub const MTU: u16 = 9216;

/// Header of a frame that asks for nothing.
pub fn plain() -> [u8; 12] {
    VnetHeader::PLAIN.to_bytes()
}

/// Everything around a hostile guest.
pub struct Stage {
    // Stopped first when a test fails, or it would wait for frames that nobody moves.
    canary: Canary,
    plane: Plane,
    /// With everybody there but the hostile guest.
    idle: Census,
    /// The hostile guest's port.
    pub port: PortId,
    /// Its neighbour's port.
    pub neighbour_port: PortId,
    /// Its neighbour, who takes frames of any size.
    pub neighbour: Peer,
    /// What the hostile port must have counted.
    pub book: Ledger,
    oracle: Oracle,
    flow: Flow,
    checker: Checker,
}

impl Stage {
    /// Sets it up; the hostile guest is not there yet.
    pub fn new() -> Result<Self> {
        Self::with_port(PortPlan { mtu: MTU, ..PortPlan::new("hostile", NETWORK) })
    }

    /// All of it: `total` frames of 60 bytes from one guest to the other, who checks each.
    pub fn short_frames(from: PeerConfig, to: PeerConfig, total: u64) -> Result<()> {
        let plan = PortPlan { mtu: MTU, ..PortPlan::new("hostile", NETWORK) };
        let mut stage = Self::with(plan, PeerConfig { rx_len: 256, ..to })?;
        let mut peer = stage.peer(PeerConfig { tx_len: 128, rx_len: 128, ..from })?;
        stage.stream(&mut peer, total, |_| 60)?;
        drop(peer);
        stage.settle()?;
        stage.finish()
    }

    /// The same with a special port for the hostile guest.
    pub fn with_port(plan: PortPlan<'_>) -> Result<Self> {
        Self::with(plan, PeerConfig { ring_size: 256, features: MERGEABLE, ..PeerConfig::default() })
    }

    /// The same with a special port and neighbour.
    pub fn with(plan: PortPlan<'_>, neighbour: PeerConfig) -> Result<Self> {
        let plane = Plane::start()?;
        let canary = Canary::start(&plane)?;
        let port = plane.add(plan)?;
        let neighbour_port = plane.add(PortPlan { mtu: MTU, ..PortPlan::new("neighbour", NETWORK) })?;
        let mut neighbour = plane.guest("neighbour", neighbour)?;
        // Tells the switch where it is; the hostile port has nobody to hear it.
        neighbour.send_now(0, &plain(), &frame([0xff; 6], NEIGHBOUR, 46));
        let book = Ledger::default().drops(DropReason::GuestRxRingDisabled, 1);
        plane.expect_counters(port, &book)?;
        let flow = Flow { id: 0, src: HOSTILE, dst: NEIGHBOUR };
        let oracle = Oracle::new(std::process::id());
        let checker = Checker::new(flow);
        let idle = Census::take()?;
        Ok(Self { plane, canary, idle, port, neighbour_port, neighbour, book, oracle, flow, checker })
    }

    /// The same with a hostile guest there that has sent a frame, so that the switch knows where it is; its neighbour
    /// can send frames of any length.
    pub fn introduced(config: &HandConfig) -> Result<(Self, Hand)> {
        let plan = PortPlan { mtu: MTU, ..PortPlan::new("hostile", NETWORK) };
        let neighbour = PeerConfig { features: MERGEABLE, tx_len: 70_000, ..PeerConfig::default() };
        let mut stage = Self::with(plan, neighbour)?;
        let mut hand = stage.connect(config)?;
        stage.good(&mut hand)?;
        Ok((stage, hand))
    }

    /// The dataplane.
    pub fn plane(&self) -> &Plane {
        &self.plane
    }

    /// Connects the hostile guest.
    pub fn connect(&self, config: &HandConfig) -> Result<Hand> {
        Hand::connect(self.plane.path("hostile"), config).context("the hostile guest connects")
    }

    /// A guest of the usual kind on the hostile port.
    pub fn peer(&self, config: PeerConfig) -> Result<Peer> {
        self.plane.guest("hostile", config)
    }

    /// The next lawful frame from the hostile guest to its neighbour.
    pub fn next_frame(&self, len: usize) -> Vec<u8> {
        self.oracle.frame(&self.flow, self.checker.seen(), len)
    }

    /// The neighbour must get the frame that [`Self::next_frame`] gave, byte for byte, and nothing before it.
    pub fn expect_next(&mut self) -> Result<()> {
        let (header, frame) = self.neighbour.expect(0)?;
        ensure!(header.is_plain(), "{header:?}");
        self.checker.check(&self.oracle, &frame)?;
        self.book.rx += 1;
        Ok(())
    }

    /// The hostile guest sends a lawful frame on its first queue pair, and it arrives.
    pub fn good(&mut self, hand: &mut Hand) -> Result<()> {
        self.good_on(hand, 1)
    }

    /// The same on TX ring `index`.
    pub fn good_on(&mut self, hand: &mut Hand, index: u16) -> Result<()> {
        let frame = self.next_frame(200);
        hand.send(index, &plain(), &frame).context("a lawful frame")?;
        self.expect_next().context("a lawful frame")
    }

    /// A guest on the hostile port sends `total` frames of `len(sequence)` bytes, never more at a time than the
    /// neighbour has buffers for; every one arrives, in order.
    pub fn stream(&mut self, from: &mut Peer, total: u64, len: impl Fn(u64) -> usize) -> Result<()> {
        let (first, window) = (self.checker.seen(), u64::from(self.neighbour.config().buffers()));
        let Self { oracle, checker, flow, neighbour, .. } = self;
        let (mut sent, mut bytes, mut wrong) = (first, Vec::new(), None);
        let ear = Ear::of([&*from, &*neighbour])?;
        ear.wait_until("the last frame", &mut [from, neighbour], |peers| {
            while peers[1].take(0, &mut bytes).is_some() {
                if let Err(fault) = checker.check(oracle, &bytes) {
                    wrong = Some(fault);
                    return true;
                }
            }
            peers[1].give_back(0);
            while sent < first + total && sent - checker.seen() < window {
                let (head, pattern) = oracle.parts(flow, sent, len(sent));
                if !peers[0].send(0, &plain(), &[&head, pattern]) {
                    break;
                }
                sent += 1;
            }
            peers[0].flush(0);
            checker.seen() == first + total
        })?;
        self.book.rx += total;
        wrong.map_or(Ok(()), |fault| Err(fault.into()))
    }

    /// The chain that begins with the first of `descriptors` is returned unwritten and counted by `reason`; a lawful
    /// frame on the same ring arrives afterwards.
    pub fn expect_skip(
        &mut self,
        hand: &mut Hand,
        descriptors: &[(u16, Descriptor)],
        reason: DropReason,
    ) -> Result<()> {
        let ring = hand.tx();
        for (index, descriptor) in descriptors {
            ring.ring.set_descriptor(*index, *descriptor);
        }
        let head = descriptors[0].0;
        ring.post(head);
        ensure!(ring.expect_used()? == (u32::from(head), 0), "returned as {:?}", ring.expect_used()?);
        self.drops(reason, 1);
        self.good(hand)?;
        hand.tx().ensure_whole()?;
        self.settle()
    }

    /// The chain that begins with the first of `descriptors` is a frame, and arrives as [`Self::next_frame`].
    pub fn expect_ok(&mut self, hand: &mut Hand, descriptors: &[(u16, Descriptor)]) -> Result<()> {
        let ring = hand.tx();
        for (index, descriptor) in descriptors {
            ring.ring.set_descriptor(*index, *descriptor);
        }
        let head = descriptors[0].0;
        ring.post(head);
        ensure!(ring.expect_used()? == (u32::from(head), 0));
        self.expect_next()?;
        self.settle()
    }

    /// Ring `index` was stopped: the error eventfd, an event and the report say so. The second queue pair, if there is
    /// one, goes on; after being set up again the ring carries frames, too.
    pub fn expect_stop(&mut self, hand: &mut Hand, index: u16) -> Result<()> {
        hand.rings[usize::from(index)].expect_broken()?;
        self.plane.expect_event(
            self.port,
            |kind| matches!(kind, EventKind::RingBroken { ring, .. } if *ring == index),
        )?;
        self.plane.take_events();
        let report = self.plane.port(self.port)?;
        let ring = report.rings.iter().find(|ring| ring.index == index).context("the ring ran")?;
        ensure!(!ring.started && ring.broken.is_some(), "{ring:?}");
        if hand.rings.len() > 2 {
            self.good_on(hand, 3).context("the other queue pair")?;
        }
        hand.restart(index)?;
        self.good_on(hand, index | 1).context("after being set up again")?;
        self.settle()
    }

    /// Frames that came from the hostile guest and were given up.
    pub fn drops(&mut self, reason: DropReason, count: u64) {
        self.book = std::mem::take(&mut self.book).drops(reason, count);
        self.book.rx += count;
    }

    /// Frames for the hostile guest that were given up at its port.
    pub fn refuses(&mut self, reason: DropReason, count: u64) {
        self.book = std::mem::take(&mut self.book).drops(reason, count);
    }

    /// The neighbour sends a frame; it is returned when the dataplane is done with it.
    pub fn neighbour_sends(&mut self, header: &[u8; 12], frame: &[u8]) -> Result<()> {
        until("room to send", || self.neighbour.send_now(0, header, frame))?;
        until("the neighbour's frame", || self.neighbour.unused(0) == 0)
    }

    /// Begins anew after mischief whose outcome is nobody's to foresee, with no ring of the hostile guest running:
    /// counters as they are, and frames that reached the neighbour thrown away.
    pub fn forget(&mut self) -> Result<()> {
        while self.neighbour.receive(0).is_some() {}
        self.book = Ledger::from(&self.plane.counters(self.port)?);
        Ok(())
    }

    /// The hostile port has counted exactly what the book says.
    pub fn settle(&self) -> Result<()> {
        self.plane.expect_counters(self.port, &self.book)
    }

    /// The hostile guest is gone, and everything of it.
    pub fn expect_idle(&self) -> Result<()> {
        self.plane.expect_alone(self.port)?;
        self.idle.expect_back().context("after the hostile guest left")
    }

    /// Everything is counted, the hostile guest leaves, and it all ends.
    pub fn end(self, hand: Hand) -> Result<()> {
        self.settle()?;
        drop(hand);
        self.finish()
    }

    /// Ends it all: the hostile guest must have left.
    pub fn finish(self) -> Result<()> {
        self.expect_idle()?;
        drop(self.neighbour);
        self.canary.finish(&self.plane)?;
        self.plane.finish()
    }
}

/// A frame of `len` bytes from the neighbour to the hostile guest; its bytes differ from place to place.
pub fn to_hostile(len: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..len).map(|i| (i * 31 % 251).to_le_bytes()[0]).collect();
    bytes[..14].copy_from_slice(&frame(HOSTILE, NEIGHBOUR, 0));
    bytes
}

/// A frame with `payload` zeros behind an experimental EtherType.
pub fn frame(dst: [u8; 6], src: [u8; 6], payload: usize) -> Vec<u8> {
    [&dst[..], &src, &[0x88, 0xb5], &vec![0; payload]].concat()
}
