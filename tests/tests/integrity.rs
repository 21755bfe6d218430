//! Integrity: every kind of sender to every kind of receiver, every byte checked. 0 wrong, 0 lost, 0 duplicated, in
//! order, and the dataplane counted exactly that.
//!
//! Nothing can be lost for want of room: a sender never has more on its way than its receiver has buffers for.
//!
//! `INTEGRITY_FRAMES` says how many frames (300,000 unless told; 10,000,000 with `VHOSTD_SOAK`).
#![allow(clippy::unwrap_used)]

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, ensure};
use dataplane::{Move, PortId};
use e2e::canary::Canary;
use e2e::inproc::{Ledger, Plane, PortPlan, count};
use e2e::oracle::{Checker, Flow, Oracle};
use e2e::peer::{Ear, MERGEABLE, MODERN, Peer, PeerConfig, Shape};
use vring::{HEADER_LEN, features};
use wire::craft::{Craft, Tcp, leave_segments};
use wire::{Mac, VnetHeader};

const FRAME_MIN: usize = 60;
const FRAME_MAX: usize = 9216;
const LENGTHS: u64 = 9216 - 60 + 1;
const TX_LEN: usize = HEADER_LEN + FRAME_MAX;
const MTU: u16 = 9216;

/// The address of guest `n`.
fn mac(n: usize) -> [u8; 6] {
    [2, 0, 0, 0, 0, u8::try_from(n).unwrap()]
}

/// Frames of the whole test.
fn frames() -> u64 {
    let asked = std::env::var("INTEGRITY_FRAMES").ok();
    asked.map_or_else(|| count(300_000, 10_000_000), |n| n.parse().expect("INTEGRITY_FRAMES is a number"))
}

/// Every kind of guest: shape of its buffers, mergeable or not, notification by index or by flags, header of 12 bytes
/// or of 10, split ring or packed.
fn kinds() -> Vec<PeerConfig> {
    let mut kinds = Vec::new();
    for shape in [Shape::Single, Shape::Chained, Shape::Indirect] {
        for event_idx in [0, 1 << features::EVENT_IDX] {
            let legacy = 1 << features::INDIRECT_DESC | event_idx;
            let modern = MODERN | event_idx;
            let mergeable = MERGEABLE | event_idx;
            let packed = mergeable | 1 << features::RING_PACKED;
            let in_order = packed | 1 << features::IN_ORDER;
            for features in [legacy, modern, mergeable, packed, in_order] {
                let rx_len = if features & 1 << features::MRG_RXBUF != 0 { 2048 } else { TX_LEN };
                kinds.push(PeerConfig {
                    queue_pairs: 1,
                    ring_size: 128,
                    features,
                    shape,
                    tx_len: TX_LEN,
                    rx_len,
                });
            }
        }
    }
    kinds
}

/// RX buffers that a frame of `len` bytes takes at a guest.
fn buffers_for(config: &PeerConfig, len: usize) -> usize {
    (HEADER_LEN + len).div_ceil(config.rx_len)
}

/// One direction: frames `0..end` of a flow between two of the peers, and how far they are.
struct Way {
    from: usize,
    to: usize,
    flow: Flow,
    sent: u64,
    end: u64,
    /// RX buffers of the receiver that no frame on its way can need.
    room: usize,
    checker: Checker,
}

impl Way {
    fn new(id: u32, from: usize, to: usize, end: u64, peers: &[Peer]) -> Self {
        let flow = Flow { id, src: mac(from), dst: mac(to) };
        let room = peers[to].config().buffers().into();
        Self { from, to, flow, sent: 0, end, room, checker: Checker::new(flow) }
    }

    /// The length of frame `sequence`: over all flows every length comes, neighbours far apart.
    fn len_of(&self, sequence: u64) -> usize {
        let number = u64::from(self.flow.id) * self.end + sequence;
        FRAME_MIN + usize::try_from(number * 4001 % LENGTHS).unwrap()
    }

    /// Sends what the receiver has room for.
    fn send(&mut self, oracle: &Oracle, peers: &mut [&mut Peer]) {
        let to = *peers[self.to].config();
        while self.sent < self.end {
            let len = self.len_of(self.sent);
            let need = buffers_for(&to, len);
            let (head, pattern) = oracle.parts(&self.flow, self.sent, len);
            let parts = [&head[..], pattern];
            if need > self.room || !peers[self.from].send(0, &VnetHeader::PLAIN.to_bytes(), &parts) {
                break;
            }
            self.room -= need;
            self.sent += 1;
        }
        peers[self.from].flush(0);
    }

    /// Checks all that came. True if nothing is missing any more.
    fn receive(&mut self, oracle: &Oracle, to: &mut Peer, frame: &mut Vec<u8>) -> Result<bool> {
        while let Some(header) = to.take(0, frame) {
            // num_buffers was needed to find the frame, and a legacy header has none.
            ensure!(header[..10] == [0; 10], "header {header:?}");
            self.checker.check(oracle, frame)?;
            self.room += buffers_for(to.config(), frame.len());
        }
        to.give_back(0);
        Ok(self.checker.seen() == self.end)
    }
}

/// Moves frames on all ways, of which no two have one receiver, until all have arrived.
fn exchange(oracle: &Oracle, ear: &Ear, peers: &mut [Peer], ways: &mut [Way]) -> Result<()> {
    let mut frame = Vec::new();
    let mut outcome = Ok(());
    let mut peers: Vec<&mut Peer> = peers.iter_mut().collect();
    ear.wait_until("the last frame", &mut peers, |peers| {
        let mut done = true;
        for way in &mut *ways {
            match way.receive(oracle, peers[way.to], &mut frame) {
                Ok(over) => done &= over,
                Err(error) => {
                    let kinds = [way.from, way.to].map(|n| *peers[n].config());
                    outcome = Err(error.context(format!("from and to {kinds:#?}")));
                    return true;
                }
            }
            // After it: what was received made the room that this may need.
            way.send(oracle, peers);
        }
        done
    })?;
    outcome
}

/// A port for each guest, and the guests.
fn guests(plane: &Plane, kinds: &[PeerConfig]) -> Result<(Vec<PortId>, Vec<Peer>)> {
    let mut ports = Vec::new();
    let mut peers = Vec::new();
    for (n, kind) in kinds.iter().enumerate() {
        let name = format!("guest-{n}");
        ports.push(plane.add(PortPlan { mtu: MTU, ..PortPlan::new(&name, "integrity") })?);
        peers.push(plane.guest(&name, *kind)?);
    }
    Ok((ports, peers))
}

/// Lets the switch learn where everybody is, so that no frame of the test is flooded. Everybody hears everybody else.
fn introduce(peers: &mut [Peer]) -> Result<()> {
    for from in 0..peers.len() {
        let frame = [&[0xff; 6], &mac(from)[..], &[0x88, 0xb5], &[0; 46]].concat();
        ensure!(peers[from].send_now(0, &VnetHeader::PLAIN.to_bytes(), &frame), "a fresh ring has room");
        for (to, peer) in peers.iter_mut().enumerate().filter(|(to, _)| *to != from) {
            let (_, heard) = peer.expect(0).with_context(|| format!("{from} introduces itself to {to}"))?;
            ensure!(heard == frame);
        }
    }
    Ok(())
}

#[test]
fn every_sender_to_every_receiver() -> Result<()> {
    let plane = Plane::start()?;
    let canary = Canary::start(&plane)?;
    // Two of each kind: one on either side.
    let side = kinds().len();
    let (ports, mut peers) = guests(&plane, &[kinds(), kinds()].concat())?;
    introduce(&mut peers)?;
    let oracle = Oracle::new(std::process::id());
    let ear = Ear::of(&peers)?;
    let ways_in_all = u64::try_from(2 * side * side)?;
    let share = frames().div_ceil(ways_in_all);
    let (mut id, mut total) = (0, 0);
    for shift in 0..side {
        let mut ways = Vec::new();
        for left in 0..side {
            let right = side + (left + shift) % side;
            ways.push(Way::new(id, left, right, share, &peers));
            ways.push(Way::new(id + 1, right, left, share, &peers));
            id += 2;
        }
        exchange(&oracle, &ear, &mut peers, &mut ways)?;
        total += share;
        for port in &ports {
            // Nothing dropped, nothing counted twice, and both directions exactly what was checked above.
            let introduced = u64::try_from(ports.len() - 1)?;
            plane.expect_counters(*port, &Ledger::new(1 + total, introduced + total))?;
        }
    }
    println!("{} frames, 0 wrong, 0 lost, 0 duplicated, in order", ways_in_all * share);
    drop((ear, peers));
    canary.finish(&plane)?;
    plane.finish()
}

/// Queues go from worker to worker all the time, and no frame is lost, doubled or overtaken.
#[test]
fn queues_change_workers_under_traffic() -> Result<()> {
    let plane = Plane::start()?;
    let canary = Canary::start(&plane)?;
    let features = MERGEABLE | 1 << features::EVENT_IDX;
    let split = PeerConfig { features, ring_size: 128, tx_len: TX_LEN, ..PeerConfig::default() };
    let packed = PeerConfig { features: split.features | 1 << features::RING_PACKED, ..split };
    let (ports, mut peers) = guests(&plane, &[split, packed, split, packed])?;
    introduce(&mut peers)?;
    let oracle = Oracle::new(std::process::id());
    let ear = Ear::of(&peers)?;
    let share = frames() / 8;
    let mut ways: Vec<_> = (0u32..)
        .zip([(0, 1), (1, 0), (2, 3), (3, 2)])
        .map(|(id, (from, to))| Way::new(id, from, to, share, &peers))
        .collect();
    let dataplane = plane.dataplane();
    let workers = dataplane.workers().len();
    let over = AtomicBool::new(false);
    let moves = std::thread::scope(|scope| {
        let mover = scope.spawn(|| {
            let (mut round, mut moves) = (0, 0u64);
            while !over.load(Ordering::Relaxed) {
                round += 1;
                for (n, port) in ports.iter().enumerate() {
                    let to = (round + n) % workers;
                    let place =
                        Move { port: *port, port_name: String::new(), queue: 0, from: 0, to, share: 0.0 };
                    moves += u64::from(dataplane.move_queue(&place));
                    std::thread::yield_now();
                }
            }
            moves
        });
        let outcome = exchange(&oracle, &ear, &mut peers, &mut ways);
        over.store(true, Ordering::Relaxed);
        outcome.map(|()| mover.join().unwrap())
    })?;
    ensure!(workers == 1 || moves > 100, "only {moves} moves");
    for port in &ports {
        plane.expect_counters(*port, &Ledger::new(1 + share, 3 + share))?;
    }
    println!("{} frames, {moves} moves, 0 wrong, 0 lost, in order", 4 * share);
    drop((ear, peers));
    canary.finish(&plane)?;
    plane.finish()
}

/// Frames of 64 KiB that receivers take whole, as they come from a guest's TCP: everything behind the header is the
/// sender's.
#[test]
fn tcp_frames_of_64_kib_pass_whole() -> Result<()> {
    const PAYLOAD: usize = 65_000;
    let offloads = 1 << features::CSUM
        | 1 << features::GUEST_CSUM
        | 1 << features::HOST_TSO4
        | 1 << features::GUEST_TSO4;
    let tx_len = HEADER_LEN + PAYLOAD + 100;
    let base = PeerConfig { tx_len, rx_len: tx_len, ..PeerConfig::default() };
    let kinds = [
        PeerConfig { features: MODERN | offloads, shape: Shape::Single, ..base },
        PeerConfig { features: MODERN | offloads, shape: Shape::Indirect, ..base },
        PeerConfig {
            features: MERGEABLE | offloads,
            shape: Shape::Chained,
            rx_len: 9000,
            ring_size: 128,
            ..base
        },
    ];
    let plane = Plane::start()?;
    let (ports, mut peers) = guests(&plane, &[kinds, kinds].concat())?;
    introduce(&mut peers)?;
    let oracle = Oracle::new(std::process::id());
    let side = kinds.len();
    let share = frames() / 300 / 9;
    let mut sent = vec![0; peers.len()];
    for (from, to) in (0..side).flat_map(|from| (side..2 * side).map(move |to| (from, to))) {
        let craft =
            Craft::v4(Mac::new(mac(from)), Mac::new(mac(to)), [10, 0, 0, 1].into(), [10, 0, 0, 2].into());
        let flow = Flow { id: u32::try_from(from * side + to)?, src: mac(from), dst: mac(to) };
        for sequence in 0..share {
            let tcp = Tcp { sequence: u32::try_from(sequence)?, ..Tcp::default() };
            let mut frame = craft.tcp(&tcp, &oracle.frame(&flow, sequence, PAYLOAD));
            let header = leave_segments(&mut frame, 1448).context("a TCP frame")?;
            ensure!(peers[from].send_now(0, &header.to_bytes(), &frame), "buffers come back");
            let (got, bytes) = peers[to].expect(0)?;
            ensure!(VnetHeader { num_buffers: 1, ..got } == header, "{got:?} instead of {header:?}");
            ensure!(bytes == frame, "frame {sequence} from {from} to {to}");
        }
        sent[from] += share;
        sent[to] += share;
    }
    for (n, port) in ports.iter().enumerate() {
        let (from, to) = if n < side { (sent[n], 0) } else { (0, sent[n]) };
        let introduced = u64::try_from(ports.len() - 1)?;
        plane.expect_counters(*port, &Ledger::new(1 + from, introduced + to))?;
        let gso = plane.counters(*port)?.gso_frames;
        ensure!(gso == sent[n], "{gso} of {} counted as GSO", sent[n]);
    }
    drop(peers);
    plane.finish()
}
