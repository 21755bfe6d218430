//! A guest that floods takes no more than its share of a worker: a neighbour that stays below its own loses nothing,
//! and waits no longer than the others' bursts of a turn or two.
//!
//! What is due to the neighbour is counted in frames of the flood, not in time, so that a busy machine makes no difference:
//! everybody stands still while it does something else.
#![allow(clippy::unwrap_used)]

use anyhow::{Result, ensure};
use dataplane::light::{LightConfig, LightGuest};
use dataplane::{Poll, PortId};
use e2e::inproc::{Ledger, Plane, PortPlan, count, until};
use e2e::oracle::{Checker, Flow, Oracle};
use e2e::peer::{Peer, PeerConfig};
use e2e::stage::{frame, plain};
use vring::BURST_MAX;

const NETWORK: &str = "fairness";
const FLOODER: [u8; 6] = [2, 0, 0, 0, 3, 1];
const SINK: [u8; 6] = [2, 0, 0, 0, 3, 2];
const MODEST: [u8; 6] = [2, 0, 0, 0, 3, 3];
const FRIEND: [u8; 6] = [2, 0, 0, 0, 3, 4];
/// The modest guest sends one frame for so many of the flood.
const PART: u64 = 10;
/// The flood's frames are long, so that the worker is what they wait for.
const FLOOD_LEN: usize = 1500;

/// A dataplane with ports of these names, all TX rings that matter on worker 0.
fn plane<const N: usize>(poll: Poll, senders: [&str; N]) -> Result<(Plane, Vec<PortId>)> {
    let plane = Plane::with_poll(poll)?;
    let workers = plane.dataplane().workers().len();
    let mut ids = Vec::new();
    for name in senders {
        ids.push(plane.add(PortPlan { queue_pairs: 1, ..PortPlan::new(name, NETWORK) })?);
        // Ports are placed on workers in turn; who receives only may be on any.
        for n in 1..workers {
            plane.add(PortPlan { queue_pairs: 1, ..PortPlan::new(&format!("{name}-{n}"), NETWORK) })?;
        }
    }
    Ok((plane, ids))
}

/// Both TX rings are polled by one worker.
fn ensure_neighbours(plane: &Plane, ids: &[PortId]) -> Result<()> {
    let worker = |id| Ok::<_, anyhow::Error>(plane.port(id)?.rings[1].worker);
    let workers = ids.iter().copied().map(worker).collect::<Result<Vec<_>>>()?;
    ensure!(workers.windows(2).all(|pair| pair[0] == pair[1]), "on workers {workers:?}");
    Ok(())
}

/// Lets the switch know where a guest is.
fn introduce(plane: &Plane, id: PortId, guest: &mut Peer, mac: [u8; 6]) -> Result<()> {
    ensure!(guest.send_now(0, &plain(), &frame([0xff; 6], mac, 46)));
    until("the introduction", || plane.counters(id).is_ok_and(|counters| counters.rx_frames == 1))
}

#[test]
fn a_tenth_of_a_flood_beside_it_loses_nothing() -> Result<()> {
    beside_a_flood(Poll::Busy)?;
    // A source that slept is found between turns of the flood.
    beside_a_flood(Poll::Adaptive)
}

fn beside_a_flood(poll: Poll) -> Result<()> {
    let (plane, ids) = plane(poll, ["flooder", "sink", "modest", "friend"])?;
    let [flooder_port, _, modest_port, friend_port] = ids[..] else { unreachable!("four were added") };
    let config = |ring_size| PeerConfig { ring_size, ..PeerConfig::default() };
    let mut friend = plane.guest("friend", config(1024))?;
    introduce(&plane, friend_port, &mut friend, FRIEND)?;
    let mut modest = Peer::connect(plane.path("modest"), config(256))?;
    let mut sink = LightGuest::connect(plane.path("sink"), &LightConfig::default())?;
    sink.load(&[frame(FLOODER, SINK, 46)]);
    // The first frames of the flood would go to everybody, were the sink not known.
    until("the sink's frames", || sink.pairs[0].tx.used_idx() == sink.pairs[0].tx.size())?;
    let mut flooder = LightGuest::connect(plane.path("flooder"), &LightConfig::default())?;
    flooder.load(&[frame(SINK, FLOODER, FLOOD_LEN - 14)]);
    ensure_neighbours(&plane, &[flooder_port, modest_port])?;

    let oracle = Oracle::new(std::process::id());
    let flow = Flow { id: 0, src: MODEST, dst: FRIEND };
    let mut checker = Checker::new(flow);
    while friend.receive(0).is_some() {}
    let before = Ledger::from(&plane.counters(modest_port)?);
    let total = count(100_000, 20_000_000);
    let (mut flood, mut sent, mut waiting, mut bytes) = (0, 0, 0u64, Vec::new());
    while flood < total {
        let frames = flooder.recycle().0;
        sink.pairs[0].rx.recycle();
        flood += frames;
        waiting += u64::from(frames < 256);
        while sent < flood / PART {
            let len = 60 + usize::try_from(sent * 37 % 1400)?;
            let (head, pattern) = oracle.parts(&flow, sent, len);
            // As many buffers as are due for 2560 frames of the flood: full means that the worker kept to the flood for
            // that long.
            ensure!(
                modest.send(0, &plain(), &[&head, pattern]),
                "no room after {sent} frames, {flood} of the flood"
            );
            sent += 1;
        }
        modest.flush(0);
        while friend.take(0, &mut bytes).is_some() {
            checker.check(&oracle, &bytes)?;
        }
        friend.give_back(0);
    }
    until("the last frame", || {
        while friend.take(0, &mut bytes).is_some() {
            if checker.check(&oracle, &bytes).is_err() {
                return false;
            }
        }
        friend.give_back(0);
        checker.seen() == sent
    })?;
    plane.expect_counters(modest_port, &Ledger { rx: sent, ..before })?;
    // It was a flood: more was waiting than the worker could take.
    ensure!(waiting > 0, "the worker always had taken everything");
    drop((flooder, sink, modest, friend));
    plane.finish()
}

/// A whole ring of one guest's frames is published, then one frame of another's: that one comes after a burst or two of
/// the first, or, if its guest was silent before, when its kick is seen; not after all of them.
#[test]
fn a_single_frame_waits_for_a_burst_of_each_neighbour() -> Result<()> {
    const RING: u16 = 4096;
    const FLOOD: usize = 4000;
    /// The burst on its way when the frame is there, and the one of the next turn.
    const POLLED: usize = 2 * BURST_MAX;
    /// Turns between two looks for kicks.
    const LOOK_TURNS: usize = 32;
    let (plane, ids) = plane(Poll::Busy, ["flooder", "modest", "friend"])?;
    let config = |ring_size| PeerConfig { ring_size, ..PeerConfig::default() };
    let mut friend = plane.guest("friend", config(RING))?;
    introduce(&plane, ids[2], &mut friend, FRIEND)?;
    let mut flooder = Peer::connect(plane.path("flooder"), config(RING))?;
    let mut modest = Peer::connect(plane.path("modest"), config(64))?;
    ensure_neighbours(&plane, &ids[..2])?;
    let (long, short) = (frame(FRIEND, FLOODER, FLOOD_LEN - 14), frame(FRIEND, MODEST, 46));
    let mut at_once = 0;
    for round in 0..count(40, 1000) {
        for _ in 0..FLOOD {
            ensure!(flooder.send(0, &plain(), &[&long]));
        }
        ensure!(modest.send(0, &plain(), &[&short]));
        flooder.flush(0);
        modest.flush(0);
        // Read afterwards, so that it may be more than had left when the frame was there, but never less.
        let left = FLOOD - flooder.unused(0);
        let (mut order, mut bytes) = (Vec::new(), Vec::new());
        until("all frames", || {
            while friend.take(0, &mut bytes).is_some() {
                order.push(bytes[6..12] == MODEST);
            }
            order.len() == FLOOD + 1
        })?;
        friend.give_back(0);
        let place = order.iter().position(|modest| *modest).unwrap();
        let latest = left + POLLED + LOOK_TURNS * BURST_MAX;
        ensure!(place <= latest, "round {round}: place {place}, {left} had left before");
        at_once += u64::from(place <= left + POLLED && place < FLOOD);
    }
    ensure!(at_once > 0, "a frame had to wait every time");
    drop((flooder, modest, friend));
    plane.finish()
}
