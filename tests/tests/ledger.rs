//! Conservation: every frame that enters leaves or counts one reason, exactly, whatever mixture it comes in.
//!
//! Frames of all fates are drawn at random, sent in bursts that mix them, over several ports and queues at once, and the
//! book that is kept of them must be the dataplane's to the last frame and byte.
#![allow(clippy::unwrap_used)]

use anyhow::{Context, Result, ensure};
use dataplane::DropReason::{
    self, BadOffload, BadSource, GuestBufferTooSmall, GuestRxRingDisabled, GuestRxRingFull, Hairpin,
    LinkLocal, MtuExceeded, NoDestination, PortDraining, Runt,
};
use dataplane::{PortId, PortReport};
use e2e::canary::Canary;
use e2e::inproc::{Ledger, Plane, PortPlan, count, until};
use e2e::oracle::split_mix;
use e2e::peer::{MERGEABLE, MODERN, Peer, PeerConfig, Shape};
use e2e::stage::{frame, plain};
use wire::VnetHeader;
use wire::vnet::flag;

const MTU: u16 = 1500;

/// Who is in the network.
const SENDER: usize = 0;
const OPEN: usize = 1;
const FULL: usize = 2;
const SMALL: usize = 3;
const OFF: usize = 4;
const GUESTS: [&str; 5] = ["sender", "open", "full", "small", "off"];

fn mac(n: usize) -> [u8; 6] {
    [2, 0, 0, 0, 2, u8::try_from(n).unwrap()]
}

/// What can become of a frame of the sender.
#[derive(Clone, Copy, Debug)]
enum Fate {
    /// To one guest, with so many bytes of payload.
    To(usize, usize),
    /// To all of them.
    Everybody(usize),
    /// To nobody, for a reason at the sender.
    Nowhere(DropReason),
}

impl Fate {
    fn draw(random: u64) -> Self {
        let [kind, length, ..] = random.to_le_bytes();
        let payload = 46 + usize::from(length);
        match kind % 16 {
            0..=4 => Self::To(OPEN, payload),
            5 => Self::To(FULL, payload),
            6 => Self::To(SMALL, payload),
            7 => Self::To(OFF, payload),
            8 | 9 => Self::Everybody(payload),
            10 => Self::Nowhere(Hairpin),
            11 => Self::Nowhere(LinkLocal),
            12 => Self::Nowhere(BadSource),
            13 => Self::Nowhere(MtuExceeded),
            14 => Self::Nowhere(BadOffload),
            _ => Self::Nowhere(Runt),
        }
    }

    /// A header and a frame that will have this fate.
    fn frame(self) -> (VnetHeader, Vec<u8>) {
        let me = mac(SENDER);
        let bytes = match self {
            Self::To(n, payload) => frame(mac(n), me, payload),
            Self::Everybody(payload) => frame([0xff; 6], me, payload),
            Self::Nowhere(Hairpin) => frame(me, me, 46),
            Self::Nowhere(LinkLocal) => frame([0x01, 0x80, 0xc2, 0, 0, 2], me, 46),
            Self::Nowhere(BadSource) => frame(mac(OPEN), [0; 6], 46),
            Self::Nowhere(MtuExceeded) => frame(mac(OPEN), me, usize::from(MTU) + 9),
            Self::Nowhere(Runt) => frame(mac(OPEN), me, 0)[..13].to_vec(),
            Self::Nowhere(_) => frame(mac(OPEN), me, 46),
        };
        let header = match self {
            Self::Nowhere(BadOffload) => {
                VnetHeader { flags: flag::NEEDS_CSUM, gso_type: 1, ..VnetHeader::PLAIN }
            }
            _ => VnetHeader::PLAIN,
        };
        (header, bytes)
    }
}

/// What each port must have counted: frames and bytes.
#[derive(Default)]
struct Book {
    frames: [Ledger; GUESTS.len()],
    bytes: [(u64, u64); GUESTS.len()],
}

impl Book {
    fn enter(&mut self, fate: Fate) {
        let len = fate.frame().1.len() as u64;
        self.frames[SENDER].rx += 1;
        match fate {
            Fate::Nowhere(reason) => self.give_up(SENDER, reason),
            Fate::To(n, _) => {
                self.bytes[SENDER].0 += len;
                self.arrive(n, len);
            }
            Fate::Everybody(_) => {
                self.bytes[SENDER].0 += len;
                (1..GUESTS.len()).for_each(|n| self.arrive(n, len));
            }
        }
    }

    fn arrive(&mut self, n: usize, len: u64) {
        match n {
            FULL => self.give_up(n, GuestRxRingFull),
            SMALL => self.give_up(n, GuestBufferTooSmall),
            OFF => self.give_up(n, GuestRxRingDisabled),
            _ => {
                self.frames[n].tx += 1;
                self.bytes[n].1 += len;
            }
        }
    }

    fn give_up(&mut self, n: usize, reason: DropReason) {
        self.frames[n] = std::mem::take(&mut self.frames[n]).drops(reason, 1);
    }
}

struct Net {
    canary: Canary,
    plane: Plane,
    ids: Vec<PortId>,
    peers: Vec<Peer>,
}

fn config(n: usize) -> PeerConfig {
    let base = PeerConfig { ring_size: 256, ..PeerConfig::default() };
    match n {
        OPEN => PeerConfig { features: MERGEABLE, shape: Shape::Indirect, ..base },
        // Too short for any frame; returned empty, so it never runs out of them.
        SMALL => PeerConfig { features: MODERN, rx_len: 40, ..base },
        _ => base,
    }
}

/// All guests, each known to the switch, in the state that its name says; counters as they were left by that.
fn net() -> Result<(Net, Book)> {
    let plane = Plane::start()?;
    let canary = Canary::start(&plane)?;
    let (mut ids, mut peers, mut book) = (Vec::new(), Vec::new(), Book::default());
    for (n, name) in GUESTS.into_iter().enumerate() {
        ids.push(plane.add(PortPlan { mtu: MTU, ..PortPlan::new(name, "ledger") })?);
        let path = plane.path(name);
        let mut peer = Peer::connect(path, config(n))?;
        ensure!(peer.send_now(0, &plain(), &frame([0x01, 0x80, 0xc2, 0, 0, 0], mac(n), 46)));
        until("the introduction", || peer.unused(0) == 0)?;
        book.frames[n].rx += 1;
        book.give_up(n, LinkLocal);
        if n == OPEN || n == SMALL {
            peer.offer_all();
        }
        peers.push(peer);
    }
    peers[OFF].front().enable(0, false)?;
    Ok((Net { canary, plane, ids, peers }, book))
}

/// The report adds up in itself: the rings' counters are the port's, and drops the sum of their reasons.
fn ensure_sums(report: &PortReport) -> Result<()> {
    let of_rings = |pick: fn(&dataplane::Counters) -> u64| {
        report.rings.iter().map(|ring| pick(&ring.counters)).sum::<u64>()
    };
    let whole = &report.counters;
    ensure!(of_rings(|c| c.rx_frames) == whole.rx_frames && of_rings(|c| c.tx_frames) == whole.tx_frames);
    ensure!(of_rings(|c| c.rx_bytes) == whole.rx_bytes && of_rings(|c| c.tx_bytes) == whole.tx_bytes);
    Ok(())
}

#[test]
fn every_frame_is_delivered_or_counted_once() -> Result<()> {
    let (Net { canary, plane, ids, mut peers }, mut book) = net()?;
    let mut state = 1;
    let mut frame = Vec::new();
    let mut arrived = 0;
    for _ in 0..count(50_000, 10_000_000) / 48 {
        for _ in 0..48 {
            let fate = Fate::draw(split_mix(&mut state));
            let (header, bytes) = fate.frame();
            ensure!(peers[SENDER].send(0, &header.to_bytes(), &[&bytes]), "48 of 256 buffers");
            book.enter(fate);
        }
        peers[SENDER].flush(0);
        let sender = &mut peers[SENDER];
        until("the burst", || sender.unused(0) == 0)?;
        while peers[OPEN].take(0, &mut frame).is_some() {
            arrived += 1;
        }
        peers[OPEN].give_back(0);
        // Buffers that were returned empty are offered again.
        peers[SMALL].reoffer(0);
    }
    for (n, id) in ids.iter().enumerate() {
        plane.expect_counters(*id, &book.frames[n]).context(GUESTS[n])?;
        let report = plane.port(*id)?;
        let counted = (report.counters.rx_bytes, report.counters.tx_bytes);
        ensure!(counted == book.bytes[n], "{}: {counted:?} bytes instead of {:?}", GUESTS[n], book.bytes[n]);
        ensure_sums(&report).context(GUESTS[n])?;
    }
    ensure!(arrived == book.frames[OPEN].tx, "{arrived} arrived of {}", book.frames[OPEN].tx);
    drop(peers);
    canary.finish(&plane)?;
    plane.finish()
}

#[test]
fn counters_outlive_the_front_end_and_its_rings() -> Result<()> {
    let (Net { canary, plane, ids, mut peers }, mut book) = net()?;
    for round in 0..5 {
        for _ in 0..100 {
            let fate = Fate::To(OPEN, 100);
            let (header, bytes) = fate.frame();
            ensure!(peers[SENDER].send_now(0, &header.to_bytes(), &bytes));
            book.enter(fate);
        }
        let sender = &mut peers[SENDER];
        until("the frames", || sender.unused(0) == 0)?;
        for n in [SENDER, OPEN] {
            plane.expect_counters(ids[n], &book.frames[n]).with_context(|| format!("round {round}"))?;
        }
        // The receiver comes back, and nothing of it is forgotten or counted again.
        drop(peers.remove(OPEN));
        plane.expect_alone(ids[OPEN])?;
        plane.expect_counters(ids[OPEN], &book.frames[OPEN])?;
        peers.insert(OPEN, plane.guest(GUESTS[OPEN], config(OPEN))?);
    }
    drop(peers);
    canary.finish(&plane)?;
    plane.finish()
}

/// Ports come and go in the middle of the traffic; what they cannot take any more is counted at its sender.
#[test]
fn frames_to_ports_that_go_are_counted() -> Result<()> {
    let (Net { canary, plane, ids, mut peers }, mut book) = net()?;
    let mut sent = 0;
    let mut gone = Vec::new();
    for round in 0..count(20, 1000) {
        let name = format!("guest-{round}");
        let id = plane.add(PortPlan { mtu: MTU, ..PortPlan::new(&name, "passing") })?;
        let other = plane.add(PortPlan { mtu: MTU, ..PortPlan::new("passer", "passing") })?;
        let mut target = plane.guest(&name, PeerConfig { ring_size: 256, ..PeerConfig::default() })?;
        let mut passer = plane.guest("passer", PeerConfig { ring_size: 256, ..PeerConfig::default() })?;
        ensure!(target.send_now(0, &plain(), &frame([0xff; 6], mac(9), 46)));
        passer.expect(0)?;
        for _ in 0..200 {
            ensure!(passer.send(0, &plain(), &[&frame(mac(9), mac(8), 46)]));
        }
        passer.flush(0);
        let taken = {
            // While the frames are on their way.
            ensure!(plane.dataplane().remove_port(id));
            let mut taken = 0;
            while target.receive(0).is_some() {
                taken += 1;
            }
            taken
        };
        until("the frames", || passer.unused(0) == 0)?;
        let report = plane.port(other)?;
        let have = Ledger::from(&report.counters);
        let known =
            [PortDraining, NoDestination].map(|reason| have.drops.get(reason.name()).copied().unwrap_or(0));
        // The rest was refused by the port that is gone, whose counters are gone with it.
        ensure!(have.rx == 200 && have.dropped() == known.iter().sum::<u64>(), "{have:?}");
        ensure!(taken + have.dropped() <= 200, "{taken} taken, {have:?}");
        sent += 200;
        drop((passer, target));
        ensure!(plane.dataplane().remove_port(other));
        gone.push(id);
    }
    ensure!(gone.iter().all(|id| plane.port(*id).is_err()) && sent > 0);
    // The others did not notice.
    let fate = Fate::To(OPEN, 100);
    let (header, bytes) = fate.frame();
    ensure!(peers[SENDER].send_now(0, &header.to_bytes(), &bytes));
    book.enter(fate);
    peers[OPEN].expect(0)?;
    for (id, frames) in ids.iter().zip(&book.frames) {
        plane.expect_counters(*id, frames)?;
    }
    drop(peers);
    canary.finish(&plane)?;
    plane.finish()
}
