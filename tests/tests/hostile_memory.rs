//! Guest memory that goes, comes, moves or is shared, and call fds and enable flags that change, all under traffic.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, ensure};
use dataplane::EventKind;
use e2e::hand::{BUFFERS, Hand, HandConfig, MEMORY, writable};
use e2e::inproc::{Ledger, PortPlan, count, until};
use e2e::peer::{Peer, PeerConfig};
use e2e::stage::{HOSTILE, MTU, NEIGHBOUR, NETWORK, Stage, frame, plain};
use vhost::VhostBackend;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vring::RegionSpec;

/// A guest that can truncate its memory, with RX buffers offered and its address known.
fn truncatable(stage: &mut Stage) -> Result<Hand> {
    let mut hand = stage.connect(&HandConfig { unsealed: true, ..HandConfig::default() })?;
    stage.good(&mut hand)?;
    for i in 0..64 {
        hand.rx().ring.set_descriptor(i, writable(BUFFERS + 0x10_0000 + 2048 * usize::from(i), 2048));
    }
    hand.rx().post_all(&(0..64).collect::<Vec<_>>());
    Ok(hand)
}

/// The port is broken: some ring of it said so, and its next front end is served.
fn expect_broken_and_back(mut stage: Stage, hand: Hand) -> Result<()> {
    stage.plane().expect_event(stage.port, |kind| matches!(kind, EventKind::RingBroken { .. }))?;
    let broken = stage.plane().take_events();
    let broken = broken.iter().filter(|event| matches!(event.kind, EventKind::RingBroken { .. })).count();
    ensure!(broken <= 2, "{broken} events for two rings");
    drop(hand);
    stage.expect_idle()?;
    stage.forget()?;
    let mut hand = stage.connect(&HandConfig::default())?;
    stage.good(&mut hand).context("the port's next front end")?;
    drop(hand);
    stage.finish()
}

#[test]
fn m08_truncated_before_it_is_mapped_is_refused() -> Result<()> {
    let mut stage = Stage::new()?;
    let mut hand = truncatable(&mut stage)?;
    rustix::fs::ftruncate(hand.memory().fd(), u64::try_from(BUFFERS)?)?;
    let region =
        RegionSpec { guest_addr: 1 << 40, size: 4096, user_addr: 1 << 40, mmap_offset: BUFFERS as u64 };
    let memory = hand.memory().clone();
    ensure!(hand.front().add_memory(&region, memory.fd()).is_err(), "a region behind the file's end");
    drop(memory);
    // What was mapped before is lost to whoever touches it.
    hand.tx().ring.set_descriptor(0, e2e::hand::readable(BUFFERS, 100));
    hand.tx().post(0);
    expect_broken_and_back(stage, hand)
}

#[test]
fn m08_truncated_while_idle_breaks_only_the_port() -> Result<()> {
    let mut stage = Stage::new()?;
    let hand = truncatable(&mut stage)?;
    rustix::fs::ftruncate(hand.memory().fd(), 0)?;
    // Our own mapping of the rings is gone, too; only the eventfd is left to speak with.
    hand.rings[1].kick();
    expect_broken_and_back(stage, hand)
}

#[test]
fn m08_truncated_under_transmission_breaks_only_the_port() -> Result<()> {
    let mut stage = Stage::new()?;
    let mut hand = truncatable(&mut stage)?;
    let whole = hand.put(BUFFERS, &plain(), &frame(NEIGHBOUR, HOSTILE, 1000));
    hand.tx().ring.set_descriptor(0, whole);
    hand.tx().post_silently(&[0; 64]);
    // The rings stay, the frames go.
    hand.tx().kick();
    rustix::fs::ftruncate(hand.memory().fd(), u64::try_from(BUFFERS)?)?;
    while stage.neighbour.receive(0).is_some() {}
    let published = hand.tx().avail;
    until("all frames to be sent, or the ring to stop", || {
        while stage.neighbour.receive(0).is_some() {}
        hand.tx().ring.used_idx() == published || hand.tx().bells.err.read().is_ok()
    })?;
    // If all went out before: the next one cannot.
    hand.tx().post(0);
    expect_broken_and_back(stage, hand)
}

#[test]
fn m08_truncated_under_reception_breaks_only_the_port() -> Result<()> {
    let mut stage = Stage::new()?;
    let hand = truncatable(&mut stage)?;
    let to_hostile = frame(HOSTILE, NEIGHBOUR, 1000);
    for _ in 0..20 {
        stage.neighbour_sends(&plain(), &to_hostile)?;
    }
    rustix::fs::ftruncate(hand.memory().fd(), u64::try_from(BUFFERS)?)?;
    for _ in 0..20 {
        stage.neighbour_sends(&plain(), &to_hostile)?;
    }
    expect_broken_and_back(stage, hand)
}

#[test]
fn m09_punched_holes_are_zeros() -> Result<()> {
    let mut stage = Stage::new()?;
    let mut hand = stage.connect(&HandConfig::default())?;
    stage.good(&mut hand)?;
    let whole = hand.put(BUFFERS, &plain(), &frame(NEIGHBOUR, HOSTILE, 8000));
    hand.memory().write(BUFFERS + 26, &[0x55; 7000]);
    rustix::fs::fallocate(
        hand.memory().fd(),
        rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE,
        BUFFERS as u64 + 4096,
        4096,
    )?;
    hand.tx().ring.set_descriptor(0, whole);
    hand.tx().post(0);
    let (_, got) = stage.neighbour.expect(0)?;
    stage.book.rx += 1;
    let hole = 4096 - 12..8014;
    ensure!(got[14..hole.start].iter().all(|byte| *byte == 0x55) && got[hole].iter().all(|byte| *byte == 0));
    hand.tx().ensure_whole()?;
    stage.good(&mut hand)?;
    drop(hand);
    stage.settle()?;
    stage.finish()
}

#[test]
fn m10_file_that_grows_and_shrinks_raises_few_events() -> Result<()> {
    let mut stage = Stage::new()?;
    for _ in 0..count(10, 200) {
        let mut hand = truncatable(&mut stage)?;
        let file = hand.memory().fd().try_clone_to_owned()?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let flipper = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                for len in [BUFFERS, MEMORY] {
                    rustix::fs::ftruncate(&file, len as u64).unwrap();
                }
            }
        });
        // Our own writes would run into the hole: the ring's words below it are enough.
        hand.tx().ring.set_descriptor(0, e2e::hand::readable(BUFFERS, 100));
        until("the ring to break", || {
            hand.tx().post(0);
            while stage.neighbour.receive(0).is_some() {}
            hand.tx().bells.err.read().is_ok()
        })?;
        stop.store(true, Ordering::Relaxed);
        flipper.join().unwrap();
        let events = stage.plane().take_events();
        let broken = events.iter().filter(|e| matches!(e.kind, EventKind::RingBroken { .. })).count();
        ensure!((1..=2).contains(&broken), "{broken} events for two rings");
        drop(hand);
        stage.expect_idle()?;
        stage.forget()?;
    }
    stage.finish()
}

/// Frames move from a guest to its neighbour while something else happens to the guest.
fn under_traffic(times: u64, mut act: impl FnMut(u64, &mut Peer) -> Result<()>) -> Result<()> {
    let mut stage = Stage::new()?;
    let mut peer = stage.peer(PeerConfig::default())?;
    for round in 0..times {
        act(round, &mut peer).with_context(|| format!("round {round}"))?;
        stage.stream(&mut peer, 20, |sequence| 60 + usize::try_from(sequence % 1400).unwrap())?;
        act(round, &mut peer).with_context(|| format!("round {round}"))?;
    }
    stage.settle()?;
    drop(peer);
    stage.finish()
}

#[test]
fn m12_memory_table_replaced_under_load_loses_nothing() -> Result<()> {
    under_traffic(count(50, 10_000), |round, peer| {
        let memory = peer.memory().clone();
        // One region or two: never the same as before, so never the same mappings.
        let half = memory.len() / 2 / 4096 * 4096;
        let regions = match round % 2 {
            0 => vec![memory.region_of(0, half), memory.region_of(half, memory.len() - half)],
            _ => vec![memory.region()],
        };
        let files: Vec<_> = regions.iter().map(|region| (*region, memory.fd())).collect();
        Ok(peer.front().set_memory(&files)?)
    })
}

/// Frames are sent, the table changes, and only then is the kick given: the frames are in flight at the change.
#[test]
fn m12_table_without_the_ring_stops_it_first() -> Result<()> {
    let mut stage = Stage::new()?;
    let mut hand = stage.connect(&HandConfig::default())?;
    stage.good(&mut hand)?;
    let memory = hand.memory().clone();
    hand.front().set_memory(&[(memory.region_of(BUFFERS, MEMORY - BUFFERS), memory.fd())])?;
    for index in [0, 1] {
        hand.rings[index].expect_broken()?;
    }
    let used = hand.tx().ring.used_idx();
    hand.tx().post(0);
    hand.front().set_memory(&[(memory.region(), memory.fd())])?;
    ensure!(hand.tx().ring.used_idx() == used, "a stopped ring is left alone until it is set up again");
    for index in [0, 1] {
        hand.restart(index)?;
    }
    stage.good(&mut hand)?;
    drop((hand, memory));
    stage.finish()
}

#[test]
fn m16_two_ports_may_share_one_memory() -> Result<()> {
    let mut stage = Stage::new()?;
    let twin_port = stage.plane().add(PortPlan { mtu: MTU, ..PortPlan::new("twin", NETWORK) })?;
    let mut hand = stage.connect(&HandConfig { queue_pairs: 2, ..HandConfig::default() })?;
    stage.good(&mut hand)?;
    // A second front end with the same file: its ring is the first one's second pair.
    let mut twin = vhost_user::FrontEnd::connect(stage.plane().path("twin"))?;
    twin.negotiate(e2e::peer::MODERN | 1 << vring::features::PROTOCOL_FEATURES, e2e::peer::PROTOCOL)?;
    let memory = hand.memory().clone();
    twin.set_memory(&[(memory.region(), memory.fd())])?;
    hand.front().stop_ring(3)?;
    let user_addrs = hand.rings[3].ring.user_addrs();
    hand.rings[3].bells = twin.start_ring(1, vhost_user::RingPlace { size: 64, user_addrs, base: 0 })?;
    twin.enable(1, true)?;
    for _ in 0..20 {
        stage.good_on(&mut hand, 3)?;
        // That came from the twin.
        stage.book.rx -= 1;
        stage.good(&mut hand)?;
    }
    stage.settle()?;
    stage.plane().expect_counters(twin_port, &Ledger::new(20, 0))?;
    drop((twin, memory));
    stage.plane().expect_alone(twin_port)?;
    stage.good(&mut hand)?;
    stage.plane().dataplane().remove_port(twin_port);
    drop(hand);
    stage.finish()
}

#[test]
fn p22_call_fd_replaced_under_load_loses_no_call() -> Result<()> {
    let mut stage = Stage::new()?;
    let mut hand = stage.connect(&HandConfig::default())?;
    let before = std::fs::read_dir("/proc/self/fd")?.count();
    for round in 0..count(500, 100_000) {
        hand.tx().ring.want_call();
        let next = stage.next_frame(100);
        let whole = hand.put(BUFFERS, &plain(), &next);
        hand.tx().ring.set_descriptor(0, whole);
        hand.tx().post(0);
        // The frame is used before, while or after the fd is replaced: one of the two must have been signalled.
        let call = EventFd::new(EFD_NONBLOCK)?;
        hand.front().vhost().set_vring_call(1, &call)?;
        let old = std::mem::replace(&mut hand.tx().bells.call, call);
        stage.expect_next()?;
        hand.tx().expect_used()?;
        until("a call", || old.read().is_ok() || hand.tx().bells.call.read().is_ok())
            .with_context(|| format!("round {round}"))?;
    }
    until("old call fds to be closed", || {
        std::fs::read_dir("/proc/self/fd").is_ok_and(|list| list.count() <= before)
    })?;
    stage.settle()?;
    drop(hand);
    stage.finish()
}

#[test]
fn p25_rings_enabled_and_disabled_under_load() -> Result<()> {
    let mut stage = Stage::new()?;
    let mut peer = stage.peer(PeerConfig::default())?;
    stage.stream(&mut peer, 1, |_| 60)?;
    let to_hostile = frame(HOSTILE, NEIGHBOUR, 100);
    let lost = frame(NEIGHBOUR, HOSTILE, 100);
    for _ in 0..count(100, 100_000) {
        // A disabled RX ring gets nothing, a disabled TX ring is drained without effect.
        peer.front().enable(0, false)?;
        stage.neighbour_sends(&plain(), &to_hostile)?;
        stage.refuses(dataplane::DropReason::GuestRxRingDisabled, 1);
        ensure!(peer.receive(0).is_none());
        peer.front().enable(1, false)?;
        ensure!(peer.send_now(0, &plain(), &lost));
        until("the disabled ring to be drained", || peer.unused(0) == 0)?;
        stage.drops(dataplane::DropReason::GuestTxRingDisabled, 1);
        ensure!(stage.neighbour.receive(0).is_none());
        for index in [0, 1] {
            peer.front().enable(index, true)?;
        }
        stage.neighbour_sends(&plain(), &to_hostile)?;
        stage.book.tx += 1;
        ensure!(peer.expect(0)?.1 == to_hostile);
        stage.stream(&mut peer, 3, |_| 60)?;
    }
    stage.settle()?;
    drop(peer);
    stage.finish()
}

/// The same flags as fast as they can be sent, with frames on their way in both directions.
#[test]
fn p25_rings_enabled_and_disabled_as_fast_as_can_be() -> Result<()> {
    let mut stage = Stage::new()?;
    let mut peer = stage.peer(PeerConfig::default())?;
    stage.stream(&mut peer, 1, |_| 60)?;
    let there = frame(NEIGHBOUR, HOSTILE, 100);
    let back = frame(HOSTILE, NEIGHBOUR, 100);
    let (mut sent, mut answered) = (0, 0);
    for round in 0..count(1000, 100_000) {
        peer.front().enable(u16::try_from(round % 2)?, round % 4 < 2)?;
        sent += u64::from(peer.send_now(0, &plain(), &there));
        answered += u64::from(stage.neighbour.send_now(0, &plain(), &back));
        while stage.neighbour.receive(0).is_some() {}
        while peer.receive(0).is_some() {}
    }
    until("all frames", || peer.unused(0) == 0 && stage.neighbour.unused(0) == 0)?;
    let have = Ledger::from(&stage.plane().counters(stage.port)?);
    let got = Ledger::from(&stage.plane().counters(stage.neighbour_port)?);
    // Each direction adds up, the introduction and the first frame included.
    let drained = have.drops.get("guest_tx_ring_disabled").copied().unwrap_or_default();
    ensure!(have.rx == sent + 1 && got.tx + got.dropped() == have.rx - drained, "{have:?} {got:?}");
    ensure!(got.rx == answered + 1 && have.tx + have.dropped() - drained == got.rx, "{have:?} {got:?}");
    drop(peer);
    stage.finish()
}
