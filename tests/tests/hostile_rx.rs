//! RX rings of guests that give no buffers, odd ones or bad ones; and what must not be disclosed in them.
#![allow(clippy::unwrap_used)]

use anyhow::{Context, Result, ensure};
use dataplane::DropReason::{
    self, GuestBufferTooSmall, GuestDescriptorInvalid, GuestRxRingFull, GuestUnmappedAddress,
};
use e2e::hand::{BUFFERS, Hand, HandConfig, HandRing, MEMORY, chained, writable};
use e2e::inproc::{Ledger, PortPlan, count, until};
use e2e::oracle::{Checker, Flow, Oracle};
use e2e::peer::{MERGEABLE, MODERN, Peer, PeerConfig, Shape};
use e2e::stage::{HOSTILE, MTU, NEIGHBOUR, NETWORK, Stage, frame, plain};
use vring::driver::GUEST_BASE;
use vring::{DESC_INDIRECT, DESC_NEXT, DESC_WRITE, Descriptor, HEADER_LEN, features};
use wire::VnetHeader;
use wire::craft::{Craft, Tcp, leave_segments};

type Chain = Vec<(u16, Descriptor)>;

/// What RX buffers hold before the device writes them.
const POISON: u8 = 0xe7;

/// A stage whose hostile guest has said where it is.
fn stage(config: &HandConfig) -> Result<(Stage, Hand)> {
    let plan = PortPlan { mtu: MTU, ..PortPlan::new("hostile", NETWORK) };
    let neighbour = PeerConfig { features: MERGEABLE, tx_len: 70_000, ..PeerConfig::default() };
    let mut stage = Stage::with(plan, neighbour)?;
    let mut hand = stage.connect(config)?;
    stage.good(&mut hand)?;
    Ok((stage, hand))
}

fn end(stage: Stage, hand: Hand) -> Result<()> {
    stage.settle()?;
    drop(hand);
    stage.finish()
}

fn mergeable() -> HandConfig {
    HandConfig { features: MERGEABLE, ..HandConfig::default() }
}

/// A frame to the hostile guest of `len` bytes, none of them like its neighbour.
fn to_hostile(len: usize) -> Vec<u8> {
    let body = (0..len).map(|i| u8::try_from(i * 31 % 251).unwrap());
    [&HOSTILE[..], &NEIGHBOUR, &[0x88, 0xb5]].concat().into_iter().chain(body.skip(14)).collect()
}

fn poison(hand: &Hand, len: usize) {
    hand.memory().write(BUFFERS, &vec![POISON; len]);
}

/// The guest offers each chain in turn; the neighbour sends a frame that it cannot take, and then one that the next
/// buffer must take.
fn refused(reason: DropReason, cases: &[(&str, Chain)]) -> Result<()> {
    let regions = vec![(0, BUFFERS + 0x10_0000), (BUFFERS + 0x20_0000, MEMORY - BUFFERS - 0x20_0000)];
    let (mut stage, mut hand) = stage(&HandConfig { regions, ..HandConfig::default() })?;
    for (what, chain) in cases {
        poison(&hand, 0x2000);
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
    end(stage, hand)
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
    let (mut stage, mut hand) = stage(&HandConfig { queue_pairs: 2, ..HandConfig::default() })?;
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
        poison(&hand, 1000);
        hand.rx().ring.set_descriptor(3, writable(BUFFERS, 1000));
        hand.rx().post(3);
        stage.neighbour_sends(&plain(), &to_hostile(300))?;
        stage.book.tx += 1;
        ensure!(hand.rx().expect_used()? == (3, 312));
    }
    end(stage, hand)
}

#[test]
fn v01_no_buffers_is_counted_and_others_are_served() -> Result<()> {
    let (mut stage, mut hand) = stage(&HandConfig::default())?;
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
    let (mut stage, mut hand) = stage(&mergeable())?;
    poison(&hand, 0x8000);
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
    end(stage, hand)
}

#[test]
fn v04_buffers_of_one_byte_take_a_jumbo_frame() -> Result<()> {
    const FRAME: usize = 9000;
    let (mut stage, mut hand) = stage(&HandConfig { size: 16_384, ..mergeable() })?;
    let needed = u16::try_from(FRAME + HEADER_LEN)?;
    for i in 0..needed {
        // Two apart, so that a byte too much would be seen.
        hand.rx().ring.set_descriptor(i, writable(BUFFERS + 2 * usize::from(i), 1));
    }
    poison(&hand, 2 * usize::from(needed));
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
    end(stage, hand)
}

#[test]
fn v05_header_alone_or_split_is_per_specification() -> Result<()> {
    // Pieces of chains, and whole buffers that are merged: the header may end anywhere in either.
    let cuts = [[12, 0, 0], [5, 7, 0], [1, 1, 10], [13, 40, 7]];
    let (mut stage, mut hand) = stage(&HandConfig::default())?;
    for cuts in cuts {
        poison(&hand, 0x1000);
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
    end(stage, hand)?;
    let (mut stage, mut hand) = self::stage(&mergeable())?;
    for cuts in cuts {
        poison(&hand, 0x1000);
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
    end(stage, hand)
}

#[test]
fn v06_used_lengths_and_num_buffers_are_exact() -> Result<()> {
    for features in [MODERN, MERGEABLE, 1 << features::INDIRECT_DESC] {
        let (mut stage, mut hand) = stage(&HandConfig { features, ..HandConfig::default() })?;
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
        end(stage, hand)?;
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
    let (mut stage, mut hand) = stage(&HandConfig::default())?;
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
    end(stage, hand)
}

#[test]
fn v08_guest_without_calls_gets_frames_and_no_calls() -> Result<()> {
    let (mut stage, mut hand) = stage(&HandConfig::default())?;
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
    end(stage, hand)
}

#[test]
fn v09_broadcast_reaches_everybody_but_the_stuck() -> Result<()> {
    let (mut stage, hand) = stage(&HandConfig::default())?;
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

/// Every byte of the virtio-net header is written, whatever was in the buffer, on every way into it.
#[test]
fn x01_receive_headers_are_defined_to_the_last_byte() -> Result<()> {
    let takes = 1 << features::GUEST_CSUM | 1 << features::GUEST_TSO4;
    let plan = PortPlan { mtu: MTU, ..PortPlan::new("hostile", NETWORK) };
    let sends = 1 << features::CSUM | 1 << features::HOST_TSO4;
    let neighbour = PeerConfig { features: MERGEABLE | sends, tx_len: 70_000, ..PeerConfig::default() };
    let craft = Craft::v4(
        wire::Mac::new(NEIGHBOUR),
        wire::Mac::new(HOSTILE),
        [10, 0, 0, 2].into(),
        [10, 0, 0, 1].into(),
    );
    let mut tcp = craft.tcp(&Tcp::default(), &[7; 3000]);
    let gso = leave_segments(&mut tcp, 1000).unwrap();
    for features in [MODERN, MERGEABLE, MODERN | takes, MERGEABLE | takes, 0, takes] {
        let mut stage = Stage::with(plan, neighbour)?;
        let mut hand = stage.connect(&HandConfig { features, ..HandConfig::default() })?;
        let header_len = hand.header_len();
        stage.good(&mut hand)?;
        // Fresh and reused buffers, whole and chained, frames plain and to be segmented, one and many.
        hand.rx().ring.set_descriptor(0, writable(BUFFERS, 4000));
        hand.rx().ring.set_descriptor(1, chained(BUFFERS, 5, DESC_WRITE | DESC_NEXT, 2));
        hand.rx().ring.set_descriptor(2, writable(BUFFERS + 5, 4000));
        for (head, header, sent) in [
            (0, VnetHeader::PLAIN, to_hostile(500)),
            (1, VnetHeader::PLAIN, to_hostile(60)),
            (0, gso, tcp.clone()),
            (1, gso, tcp.clone()),
        ] {
            poison(&hand, 5000);
            // What nobody took is three segments.
            let whole = header.is_plain() || features & takes == takes;
            let frames: u16 = if whole { 1 } else { 3 };
            let at = hand.rx().avail;
            hand.rx().post_all(&vec![head; frames.into()]);
            stage.neighbour_sends(&header.to_bytes(), &sent)?;
            stage.book.tx += u64::from(frames);
            hand.rx().expect_used()?;
            let expected = if whole { header.to_bytes() } else { plain() };
            ensure!(hand.read(BUFFERS, header_len) == expected[..header_len], "{features:#x} {header:?}");
            let used = hand.rx().used(at.wrapping_add(frames - 1)).1 as usize;
            ensure!(whole == (used == header_len + sent.len()), "{used} bytes used");
        }
        drop(hand);
        stage.finish()?;
    }
    Ok(())
}

#[test]
fn x02_nothing_behind_the_used_length_is_touched() -> Result<()> {
    for features in [MODERN, MERGEABLE] {
        let (mut stage, mut hand) = stage(&HandConfig { features, ..HandConfig::default() })?;
        for (i, len) in (14..200).chain([1000, 1900, 4000]).enumerate() {
            poison(&hand, 8192);
            let index = hand.rx().avail;
            // One buffer with room behind the frame, then two that a frame of 4000 has to share if it may.
            let heads: &[u16] = if len < 2000 || features == MODERN { &[0] } else { &[1, 2] };
            hand.rx().ring.set_descriptor(0, writable(BUFFERS, 5000));
            hand.rx().ring.set_descriptor(1, writable(BUFFERS, 3000));
            hand.rx().ring.set_descriptor(2, writable(BUFFERS + 4096, 3000));
            hand.rx().post_all(heads);
            stage.neighbour_sends(&plain(), &to_hostile(len))?;
            stage.book.tx += 1;
            hand.rx().expect_used()?;
            let bytes = hand.read(BUFFERS, 8192);
            let mut written = vec![false; 8192];
            for (n, head) in (0..).zip(heads) {
                let used = hand.rx().used(index.wrapping_add(n)).1 as usize;
                let start = if *head == 2 { 4096 } else { 0 };
                written[start..start + used].fill(true);
            }
            let count = written.iter().filter(|written| **written).count();
            ensure!(count == len + HEADER_LEN, "frame {i}: {count} bytes used for {len}");
            ensure!(
                bytes.iter().zip(&written).all(|(byte, written)| *written || *byte == POISON),
                "a frame of {len} bytes wrote behind its used length"
            );
        }
        end(stage, hand)?;
    }
    Ok(())
}

#[test]
fn x03_short_frames_carry_nothing_of_earlier_ones() -> Result<()> {
    let (mut stage, mut hand) = stage(&HandConfig::default())?;
    let mut secret = to_hostile(1500);
    secret[14..].fill(0xaa);
    for len in 14..60 {
        hand.rx().ring.set_descriptor(0, writable(BUFFERS, 2000));
        hand.rx().ring.set_descriptor(1, writable(BUFFERS + 0x1000, 2000));
        hand.rx().post_all(&[1, 0]);
        poison(&hand, 2000);
        // Through the same worker, the same ring and the same private memory.
        stage.neighbour_sends(&plain(), &secret)?;
        stage.neighbour_sends(&plain(), &to_hostile(len))?;
        stage.book.tx += 2;
        ensure!(hand.rx().expect_used()? == (0, u32::try_from(HEADER_LEN + len)?));
        let bytes = hand.read(BUFFERS, 2000);
        ensure!(bytes[HEADER_LEN..HEADER_LEN + len] == to_hostile(len));
        ensure!(bytes[HEADER_LEN + len..].iter().all(|byte| *byte == POISON), "{len} bytes");
    }
    end(stage, hand)
}

#[test]
fn x04_configuration_space_has_no_stray_bytes() -> Result<()> {
    const CONFIG: u64 = 1 << 9;
    let stage = Stage::new()?;
    let mut front = vhost_user::FrontEnd::connect(stage.plane().path("hostile"))?;
    front.negotiate(MODERN | 1 << features::PROTOCOL_FEATURES, e2e::peer::PROTOCOL | CONFIG)?;
    let space = front.config(0, 256)?;
    // virtio 1.2, 5.1.4: no MAC, link up, pairs, MTU, speed and duplex unknown; the rest does not exist.
    let mtu = MTU.to_le_bytes();
    let expected = [0, 0, 0, 0, 0, 0, 1, 0, 4, 0, mtu[0], mtu[1], 0xff, 0xff, 0xff, 0xff, 0xff];
    ensure!(space[..17] == expected, "{space:?}");
    ensure!(space[17..].iter().all(|byte| *byte == 0), "{space:?}");
    drop(front);
    stage.finish()
}

/// Mappings of the hostile guest's memory file in this process: ours and the dataplane's. Their lines in `smaps`.
fn mappings(hand: &Hand) -> Result<Vec<String>> {
    let inode = rustix::fs::fstat(hand.memory().fd())?.st_ino.to_string();
    let smaps = std::fs::read_to_string("/proc/self/smaps")?;
    let mut found: Vec<String> = Vec::new();
    let mut ours = false;
    for line in smaps.lines() {
        // Each mapping begins with its address range.
        if line.split('-').next().is_some_and(|start| u64::from_str_radix(start, 16).is_ok()) {
            ours = line.split_whitespace().nth(4) == Some(&inode);
            if ours {
                found.push(String::new());
            }
        }
        if ours && let Some(lines) = found.last_mut() {
            lines.push_str(line);
            lines.push('\n');
        }
    }
    Ok(found)
}

#[test]
fn x06_memory_of_a_removed_port_is_unmapped() -> Result<()> {
    let mut stage = Stage::new()?;
    let mut hand = stage.connect(&HandConfig::default())?;
    stage.good(&mut hand)?;
    ensure!(mappings(&hand)?.len() == 2, "ours and the dataplane's");
    ensure!(stage.plane().dataplane().remove_port(stage.port));
    until("the dataplane's mapping to go", || mappings(&hand).is_ok_and(|found| found.len() == 1))?;
    // Whatever is in the rings now is nobody's business.
    let before = hand.read(0, 0x4000);
    hand.tx().post(0);
    ensure!(stage.plane().port(stage.port).is_err());
    let after = hand.read(0, 0x4000);
    let used = hand.tx().ring.area_offsets()[2];
    ensure!(before[used..] == after[used..], "the used ring is left alone");
    drop(hand);
    Ok(())
}

#[test]
fn x07_guest_memory_is_not_in_core_dumps() -> Result<()> {
    let mut stage = Stage::new()?;
    let regions = vec![(0, BUFFERS), (BUFFERS, MEMORY - BUFFERS)];
    let mut hand = stage.connect(&HandConfig { regions, ..HandConfig::default() })?;
    stage.good(&mut hand)?;
    let found = mappings(&hand)?;
    let excluded = |lines: &&String| {
        lines
            .lines()
            .any(|line| line.starts_with("VmFlags:") && line.split_whitespace().any(|flag| flag == "dd"))
    };
    // Ours is one mapping of the whole file, without the flag.
    let (dumped, kept_out) =
        (found.iter().filter(|f| !excluded(f)).count(), found.iter().filter(excluded).count());
    ensure!((dumped, kept_out) == (1, 2), "{found:#?}");
    drop(hand);
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
