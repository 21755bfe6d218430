//! RX rings of guests that give no buffers, odd ones or bad ones.
#![allow(clippy::unwrap_used)]

use anyhow::{Context, Result, ensure};
use dataplane::DropReason::{
    self, GuestBufferTooSmall, GuestDescriptorInvalid, GuestRxRingFull, GuestUnmappedAddress,
};
use e2e::hand::{BUFFERS, HandConfig, HandRing, MEMORY, POISON, chained, writable};
use e2e::inproc::{Ledger, PortPlan, count, until};
use e2e::oracle::{Checker, Flow, Oracle};
use e2e::peer::{MERGEABLE, MODERN, Peer, PeerConfig, Shape};
use e2e::stage::{HOSTILE, NEIGHBOUR, NETWORK, Stage, frame, plain, to_hostile};
use vring::driver::GUEST_BASE;
use vring::{DESC_INDIRECT, DESC_NEXT, DESC_WRITE, Descriptor, HEADER_LEN, features};

type Chain = Vec<(u16, Descriptor)>;

fn mergeable() -> HandConfig {
    HandConfig { features: MERGEABLE, ..HandConfig::default() }
}

/// The guest offers each chain in turn; the neighbour sends a frame that it cannot take, and then one that the next
/// buffer must take.
fn refused(reason: DropReason, cases: &[(&str, Chain)]) -> Result<()> {
    let regions = vec![(0, BUFFERS + 0x10_0000), (BUFFERS + 0x20_0000, MEMORY - BUFFERS - 0x20_0000)];
    let (mut stage, mut hand) = Stage::introduced(&HandConfig { regions, ..HandConfig::default() })?;
    for (what, chain) in cases {
        hand.poison(0x2000);
        let first = hand.rx().avail;
        for (index, descriptor) in chain {
            hand.rx().ring.set_descriptor(*index, *descriptor);
        }
        hand.rx().ring.set_descriptor(60, writable(BUFFERS + 0x1000, 2000));
        hand.rx().post_all(&[chain[0].0, 60]);
        stage.neighbour_sends(&plain(), &to_hostile(300))?;
        stage.refuses(reason, 1);
        stage.settle().with_context(|| (*what).to_owned())?;
        let used = hand.rx().ring.used_idx().wrapping_sub(first);
        ensure!(used == 1 && hand.rx().used(first) == (chain[0].0.into(), 0), "{what}: {used}");
        stage.neighbour_sends(&plain(), &to_hostile(400))?;
        stage.book.tx += 1;
        ensure!(hand.rx().expect_used()? == (60, 412), "{what}");
        ensure!(hand.read(BUFFERS + 0x1000 + HEADER_LEN, 400) == to_hostile(400), "{what}");
        hand.rx().ensure_whole()?;
        stage.settle()?;
    }
    stage.end(hand)
}

#[test]
fn r12_rx_buffers_outside_of_memory_are_skipped() -> Result<()> {
    let at = |addr| vec![(0, Descriptor { addr, len: 2000, flags: DESC_WRITE, next: 0 })];
    let hole = GUEST_BASE + BUFFERS as u64 + 0x10_0000;
    let behind = vec![
        (0, chained(BUFFERS, 100, DESC_WRITE | DESC_NEXT, 1)),
        (1, Descriptor { addr: hole, len: 2000, flags: DESC_WRITE, next: 0 }),
    ];
    let cases = [
        ("0", at(0)),
        ("past the last region", at(GUEST_BASE + MEMORY as u64)),
        ("in a hole", at(hole + 0x1000)),
        ("into a hole", at(hole - 100)),
        ("wraps", at(u64::MAX - 100)),
        ("second piece in a hole", behind),
    ];
    refused(GuestUnmappedAddress, &cases)
}

#[test]
fn r18_readable_buffers_on_an_rx_ring_are_skipped() -> Result<()> {
    let piece = |index, flags, next| (index, chained(BUFFERS, 100, flags, next));
    let cases = [
        ("alone", vec![piece(0, 0, 0)]),
        ("first", vec![piece(0, DESC_NEXT, 1), piece(1, DESC_WRITE, 0)]),
        ("last", vec![piece(0, DESC_WRITE | DESC_NEXT, 1), piece(1, 0, 0)]),
        ("loop", vec![piece(0, DESC_WRITE | DESC_NEXT, 0)]),
        ("next beyond the ring", vec![piece(0, DESC_WRITE | DESC_NEXT, 64)]),
        ("odd table", vec![piece(0, DESC_INDIRECT, 0)]),
    ];
    refused(GuestDescriptorInvalid, &cases)
}

#[test]
fn r05_rx_head_beyond_ring_stops_the_ring() -> Result<()> {
    let (mut stage, mut hand) = Stage::introduced(&HandConfig { queue_pairs: 2, ..HandConfig::default() })?;
    // One RX queue takes all, so that the bad head is looked at.
    hand.front().enable(2, false)?;
    for act in [
        |rx: &mut HandRing| rx.post(64),
        |rx: &mut HandRing| rx.ring.publish_avail(rx.avail.wrapping_add(65)),
        |rx: &mut HandRing| rx.ring.publish_avail(rx.avail.wrapping_add(0x8000)),
    ] {
        act(hand.rx());
        stage.neighbour_sends(&plain(), &to_hostile(300))?;
        stage.refuses(GuestDescriptorInvalid, 1);
        stage.expect_stop(&mut hand, 0)?;
        hand.poison(1000);
        hand.rx().ring.set_descriptor(3, writable(BUFFERS, 1000));
        hand.rx().post(3);
        stage.neighbour_sends(&plain(), &to_hostile(300))?;
        stage.book.tx += 1;
        ensure!(hand.rx().expect_used()? == (3, 312));
    }
    stage.end(hand)
}

#[test]
fn v01_no_buffers_is_counted_and_others_are_served() -> Result<()> {
    let (mut stage, mut hand) = Stage::introduced(&HandConfig::default())?;
    stage.plane().add(PortPlan::new("third", NETWORK))?;
    let mut third = stage.plane().guest("third", PeerConfig::default())?;
    for round in 1..=100 {
        let broadcast = frame([0xff; 6], NEIGHBOUR, 46 + round);
        stage.neighbour_sends(&plain(), &broadcast)?;
        ensure!(third.expect(0)?.1 == broadcast);
    }
    stage.refuses(GuestRxRingFull, 100);
    stage.settle()?;
    // What was never taken was never touched; the ring takes what comes when it has buffers.
    hand.rx().ring.set_descriptor(0, writable(BUFFERS, 2000));
    hand.rx().post(0);
    stage.neighbour_sends(&plain(), &to_hostile(100))?;
    stage.book.tx += 1;
    ensure!(hand.rx().expect_used()? == (0, 112));
    stage.settle()?;
    drop((third, hand));
    let id = stage.plane().dataplane().ports().into_iter().find(|port| port.name == "third").unwrap().id;
    stage.plane().dataplane().remove_port(id);
    stage.finish()
}

#[test]
fn v02_buffers_too_small_without_mergeable_are_returned_empty() -> Result<()> {
    let chain =
        vec![(0, chained(BUFFERS, 100, DESC_WRITE | DESC_NEXT, 1)), (1, writable(BUFFERS + 512, 211))];
    let single = [0, 1, 11, 12, 13, 100, 311].map(|len| ("one buffer", vec![(0, writable(BUFFERS, len))]));
    refused(GuestBufferTooSmall, &[&single[..], &[("a chain", chain)]].concat())
}

#[test]
fn v03_frame_that_needs_more_buffers_than_there_are_uses_none() -> Result<()> {
    let (mut stage, mut hand) = Stage::introduced(&mergeable())?;
    hand.poison(0x8000);
    for i in 0..8 {
        hand.rx().ring.set_descriptor(i, writable(BUFFERS + 1000 * usize::from(i), 1000));
    }
    hand.rx().post_all(&[0, 1, 2, 3, 4, 5, 6, 7]);
    stage.neighbour_sends(&plain(), &to_hostile(8000 - HEADER_LEN + 1))?;
    stage.refuses(GuestRxRingFull, 1);
    stage.settle()?;
    ensure!(hand.rx().ring.used_idx() == 0, "nothing is published");
    ensure!(hand.read(BUFFERS, 8000) == vec![POISON; 8000], "nothing is written");
    // The same buffers take what fits.
    stage.neighbour_sends(&plain(), &to_hostile(8000 - HEADER_LEN))?;
    stage.book.tx += 1;
    hand.rx().expect_used()?;
    ensure!((0..8).all(|i| hand.rx().used(i) == (i.into(), 1000)));
    ensure!(hand.read(BUFFERS + 10, 2) == [8, 0], "num_buffers");
    ensure!(hand.read(BUFFERS + HEADER_LEN, 8000 - HEADER_LEN) == to_hostile(8000 - HEADER_LEN));
    stage.end(hand)
}

#[test]
fn v04_buffers_of_one_byte_take_a_jumbo_frame() -> Result<()> {
    const FRAME: usize = 9000;
    let (mut stage, mut hand) = Stage::introduced(&HandConfig { size: 16_384, ..mergeable() })?;
    let needed = u16::try_from(FRAME + HEADER_LEN)?;
    for i in 0..needed {
        // Two apart, so that a byte too much would be seen.
        hand.rx().ring.set_descriptor(i, writable(BUFFERS + 2 * usize::from(i), 1));
    }
    hand.poison(2 * usize::from(needed));
    hand.rx().post_all(&(0..needed - 1).collect::<Vec<_>>());
    stage.neighbour_sends(&plain(), &to_hostile(FRAME))?;
    stage.refuses(GuestRxRingFull, 1);
    stage.settle().context("one buffer is missing")?;
    hand.rx().post(needed - 1);
    stage.neighbour_sends(&plain(), &to_hostile(FRAME))?;
    stage.book.tx += 1;
    hand.rx().expect_used()?;
    ensure!((0..needed).all(|i| hand.rx().used(i) == (i.into(), 1)));
    let bytes = hand.read(BUFFERS, 2 * usize::from(needed));
    let (got, between): (Vec<u8>, Vec<u8>) = bytes.chunks(2).map(|pair| (pair[0], pair[1])).unzip();
    ensure!(got[10..12] == needed.to_le_bytes(), "num_buffers");
    ensure!(got[..10] == [0; 10] && got[HEADER_LEN..] == to_hostile(FRAME));
    ensure!(between.iter().all(|byte| *byte == POISON), "nothing between the buffers is written");
    stage.end(hand)
}

#[test]
fn v05_header_alone_or_split_is_per_specification() -> Result<()> {
    // Pieces of chains, and whole buffers that are merged: the header may end anywhere in either.
    let cuts = [[12, 0, 0], [5, 7, 0], [1, 1, 10], [13, 40, 7]];
    let (mut stage, mut hand) = Stage::introduced(&HandConfig::default())?;
    for cuts in cuts {
        hand.poison(0x1000);
        let mut at = BUFFERS;
        for (i, len) in (0..).zip(cuts.into_iter().chain([400])) {
            let (flags, next) = if i == 3 { (DESC_WRITE, 0) } else { (DESC_WRITE | DESC_NEXT, i + 1) };
            hand.rx().ring.set_descriptor(i, chained(at, len, flags, next));
            at += len as usize;
        }
        hand.rx().post(0);
        stage.neighbour_sends(&plain(), &to_hostile(300))?;
        stage.book.tx += 1;
        ensure!(hand.rx().expect_used()? == (0, 312), "{cuts:?}");
        ensure!(hand.read(BUFFERS, 312) == [&plain()[..], &to_hostile(300)].concat(), "{cuts:?}");
    }
    stage.end(hand)?;
    let (mut stage, mut hand) = Stage::introduced(&mergeable())?;
    for cuts in cuts {
        hand.poison(0x1000);
        let lengths: Vec<u32> = cuts.into_iter().filter(|len| *len != 0).chain([400]).collect();
        let mut at = BUFFERS;
        for (i, len) in (0..).zip(&lengths) {
            hand.rx().ring.set_descriptor(i, writable(at, *len));
            at += *len as usize;
        }
        let first = hand.rx().avail;
        let heads: Vec<u16> = (0..u16::try_from(lengths.len())?).collect();
        hand.rx().post_all(&heads);
        stage.neighbour_sends(&plain(), &to_hostile(300))?;
        stage.book.tx += 1;
        hand.rx().expect_used()?;
        let used: u32 = heads.iter().map(|i| hand.rx().used(first.wrapping_add(*i)).1).sum();
        let mut header = plain();
        header[10] = u8::try_from(lengths.len())?;
        ensure!(
            used == 312 && hand.read(BUFFERS, 312) == [&header[..], &to_hostile(300)].concat(),
            "{cuts:?}"
        );
    }
    stage.end(hand)
}

#[test]
fn v06_used_lengths_and_num_buffers_are_exact() -> Result<()> {
    for features in [MODERN, MERGEABLE, 1 << features::INDIRECT_DESC] {
        let (mut stage, mut hand) = Stage::introduced(&HandConfig { features, ..HandConfig::default() })?;
        let header_len = u32::try_from(hand.header_len())?;
        for i in 0..64 {
            hand.rx().ring.set_descriptor(i, writable(BUFFERS + 2048 * usize::from(i), 2048));
        }
        hand.rx().post_all(&(0..64).collect::<Vec<_>>());
        // One at a time, and a burst.
        for len in 60..76 {
            stage.neighbour_sends(&plain(), &to_hostile(len))?;
        }
        for len in 76..124 {
            ensure!(stage.neighbour.send(0, &plain(), &[&to_hostile(len)]));
        }
        stage.neighbour.flush(0);
        stage.book.tx += 64;
        hand.rx().expect_used()?;
        for (i, len) in (0..64).zip(60..) {
            ensure!(hand.rx().used(i) == (i.into(), header_len + len), "frame of {len}");
            let at = BUFFERS + 2048 * usize::from(i);
            ensure!(hand.read(at, header_len as usize) == plain()[..header_len as usize]);
            let got = hand.read(at + header_len as usize, len as usize);
            ensure!(got == to_hostile(len as usize), "frame of {len}");
        }
        stage.end(hand)?;
    }
    Ok(())
}

/// Resident memory of this process, KiB.
fn resident() -> Result<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find(|line| line.starts_with("VmRSS")).context("VmRSS")?;
    line.split_whitespace().nth(1).context("a number")?.parse().context("a number")
}

#[test]
fn v07_guest_that_never_takes_frames_holds_nobody_up() -> Result<()> {
    let (mut stage, mut hand) = Stage::introduced(&HandConfig::default())?;
    stage.neighbour_sends(&plain(), &to_hostile(1000))?;
    let before = resident()?;
    let frames = count(20_000, 5_000_000);
    for _ in 0..frames / 50 {
        for _ in 0..50 {
            ensure!(stage.neighbour.send(0, &plain(), &[&to_hostile(1000)]), "50 of 64 buffers");
        }
        stage.neighbour.flush(0);
        until("the neighbour's frames", || stage.neighbour.unused(0) == 0)?;
    }
    stage.refuses(GuestRxRingFull, 1 + frames);
    let grown = resident()?.saturating_sub(before);
    ensure!(grown < 8192, "{grown} KiB for frames that nobody takes");
    stage.good(&mut hand)?;
    stage.end(hand)
}

#[test]
fn v08_guest_without_calls_gets_frames_and_no_calls() -> Result<()> {
    let (mut stage, mut hand) = Stage::introduced(&HandConfig::default())?;
    hand.rx().bells.call.read()?;
    hand.rx().ring.want_no_call();
    for i in 0..64 {
        hand.rx().ring.set_descriptor(i, writable(BUFFERS + 2048 * usize::from(i), 2048));
    }
    let heads: Vec<u16> = (0..64).collect();
    for _ in 0..20 {
        hand.rx().post_all(&heads);
        for _ in 0..64 {
            stage.neighbour_sends(&plain(), &to_hostile(100))?;
        }
        hand.rx().expect_used()?;
    }
    stage.book.tx += 20 * 64;
    stage.settle()?;
    ensure!(hand.rx().bells.call.read().is_err(), "a call that nobody wanted");
    hand.rx().ring.want_call();
    hand.rx().post(0);
    stage.neighbour_sends(&plain(), &to_hostile(100))?;
    stage.book.tx += 1;
    until("a call", || hand.rx().bells.call.read().is_ok())?;
    stage.end(hand)
}

#[test]
fn v09_broadcast_reaches_everybody_but_the_stuck() -> Result<()> {
    let (mut stage, hand) = Stage::introduced(&HandConfig::default())?;
    let ports = count(30, 255);
    let stuck = ports * 100 / 255;
    let frames = count(200, 2000);
    let mut guests = Vec::new();
    let mut ids = Vec::new();
    for n in 0..ports {
        let name = format!("guest-{n}");
        ids.push(stage.plane().add(PortPlan::new(&name, NETWORK))?);
        let config = PeerConfig { rx_len: 256, ..PeerConfig::default() };
        // The stuck ones offer no buffers.
        guests.push(if n < stuck {
            Peer::connect(stage.plane().path(&name), config)?
        } else {
            stage.plane().guest(&name, config)?
        });
    }
    let flow = Flow { id: 9, src: NEIGHBOUR, dst: [0xff; 6] };
    let oracle = Oracle::new(9);
    let mut checkers = vec![Checker::new(flow); guests.len()];
    for sequence in 0..frames {
        stage.neighbour_sends(&plain(), &oracle.frame(&flow, sequence, 60))?;
        for (guest, checker) in guests.iter_mut().zip(&mut checkers).skip(usize::try_from(stuck)?) {
            checker.check(&oracle, &guest.expect(0)?.1)?;
        }
    }
    for (n, id) in (0..).zip(&ids) {
        let wanted =
            if n < stuck { Ledger::default().drops(GuestRxRingFull, frames) } else { Ledger::new(0, frames) };
        stage.plane().expect_counters(*id, &wanted)?;
    }
    stage.refuses(GuestRxRingFull, frames);
    stage.settle()?;
    drop((guests, hand));
    for id in ids {
        stage.plane().dataplane().remove_port(id);
    }
    stage.finish()
}

/// Guests of other shapes get the same frames in the same bytes.
#[test]
fn v06_shapes_of_lawful_guests_make_no_difference() -> Result<()> {
    let mut stage = Stage::new()?;
    for shape in [Shape::Single, Shape::Chained, Shape::Indirect] {
        let mut peer = stage.peer(PeerConfig { shape, ..PeerConfig::default() })?;
        let hello = frame([0xff; 6], HOSTILE, 46);
        ensure!(peer.send_now(0, &plain(), &hello) && stage.neighbour.expect(0)?.1 == hello);
        stage.neighbour_sends(&plain(), &to_hostile(900))?;
        ensure!(peer.expect(0)?.1 == to_hostile(900), "{shape:?}");
        stage.book.rx += 1;
        stage.book.tx += 1;
        stage.settle()?;
        drop(peer);
        stage.expect_idle()?;
    }
    stage.finish()
}
