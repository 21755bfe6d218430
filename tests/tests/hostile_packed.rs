//! Packed rings that no lawful driver would offer, and lawful ones of every size (virtio 1.2, 2.8). A bad chain is returned
//! and counted; a ring that makes no sense as a whole is stopped; set up again, it carries frames.
#![allow(clippy::unwrap_used)]

use anyhow::{Context, Result, ensure};
use dataplane::DropReason::{self, GuestDescriptorInvalid, GuestUnmappedAddress, LinkLocal};
use e2e::flipper::Flipper;
use e2e::hand::{
    BUFFERS, DESC_AVAIL, DESC_USED, Hand, HandConfig, MEMORY, WRAP, after, available, chained, readable,
};
use e2e::inproc::{Ledger, PortPlan, count, until};
use e2e::oracle::split_mix;
use e2e::peer::{MERGEABLE, MODERN, PeerConfig, Shape};
use e2e::stage::{HOSTILE, MTU, NEIGHBOUR, NETWORK, Stage, frame, plain};
use vhost_user::RingPlace;
use vring::driver::GUEST_BASE;
use vring::{DESC_INDIRECT, DESC_NEXT, DESC_WRITE, Descriptor, features};

const RING: u16 = 64;
const PACKED: u64 = MODERN | 1 << features::RING_PACKED;
/// Where tables lie.
const TABLE: usize = BUFFERS + 0x10_0000;

fn config() -> HandConfig {
    HandConfig { features: PACKED, ..HandConfig::default() }
}

/// Frames to an address that every bridge keeps to itself: counted, and seen by nobody.
fn lonely() -> Vec<u8> {
    frame([0x01, 0x80, 0xc2, 0, 0, 0], HOSTILE, 46)
}

/// The chain is returned unwritten and counted by `reason`; a lawful frame on the same ring arrives afterwards.
fn skipped(stage: &mut Stage, hand: &mut Hand, chain: &[Descriptor], reason: DropReason) -> Result<()> {
    let at = hand.tx().post_chain(9, chain);
    ensure!(hand.tx().expect_used_at(at)? == (9, 0));
    stage.drops(reason, 1);
    stage.good(hand)?;
    hand.tx().ensure_whole()?;
    stage.settle()
}

/// The chain is the frame that the stage expects next.
fn arrives(stage: &mut Stage, hand: &mut Hand, id: u16, chain: &[Descriptor]) -> Result<()> {
    let at = hand.tx().post_chain(id, chain);
    ensure!(hand.tx().expect_used_at(at)? == (id, 0));
    stage.expect_next()?;
    stage.settle()
}

/// What a hostile guest does, with a name.
type Act<'a> = (&'a str, &'a dyn Fn(&mut Hand));

/// Does something to the TX ring of a fresh guest that must stop it, while its second queue pair goes on.
fn stopped_by(cases: &[Act<'_>]) -> Result<()> {
    let mut stage = Stage::new()?;
    let mut hand = stage.connect(&HandConfig { queue_pairs: 2, ..config() })?;
    for (what, act) in cases {
        stage.good(&mut hand)?;
        act(&mut hand);
        hand.tx().kick();
        stage.expect_stop(&mut hand, 1).with_context(|| (*what).to_owned())?;
    }
    stage.end(hand)
}

/// Descriptors whose flags do not say "available" in this lap are none, whatever else they say.
#[test]
fn k01_flags_and_wrap_counter_that_disagree_offer_nothing() -> Result<()> {
    let mut stage = Stage::new()?;
    let mut hand = stage.connect(&config())?;
    let whole = hand.put(BUFFERS, &plain(), &lonely());
    for lap in 0..3 {
        let at = hand.tx().avail;
        let other_lap = available(at) ^ (DESC_AVAIL | DESC_USED);
        for flags in [0, DESC_AVAIL | DESC_USED, other_lap] {
            for slot in 0..RING {
                hand.tx().ring.set_packed(slot, Descriptor { flags, ..whole });
            }
            hand.tx().kick();
        }
        // Nothing was taken: the next lawful one is where it should be.
        let next = stage.next_frame(200);
        let whole = hand.put(BUFFERS + 4096, &plain(), &next);
        arrives(&mut stage, &mut hand, 3, &[whole]).with_context(|| format!("lap {lap}"))?;
        hand.restart(1)?;
    }
    // A front end that is wrong about the wrap counter at the start: the ring waits for the other lap.
    let user_addrs = hand.tx().ring.user_addrs();
    hand.front().stop_ring(1)?;
    hand.tx().bells = hand.front().start_ring(1, RingPlace { size: RING, user_addrs, base: 0 })?;
    let begin = hand.tx().avail;
    hand.tx().post_chain(0, &[whole]);
    stage.settle()?;
    ensure!(hand.tx().ring.packed(begin).flags == available(begin), "it was not touched");
    hand.restart(1)?;
    stage.good(&mut hand)?;
    stage.end(hand)
}

#[test]
fn k02_chain_longer_than_the_ring_is_skipped_and_the_ring_goes_on() -> Result<()> {
    let mut stage = Stage::new()?;
    let mut hand = stage.connect(&config())?;
    for begin in 0..5u16 {
        let chain = vec![chained(BUFFERS, 10, DESC_NEXT, 0); RING.into()];
        skipped(&mut stage, &mut hand, &chain, GuestDescriptorInvalid)
            .with_context(|| format!("from descriptor {begin}"))?;
    }
    // As long as the ring and no longer: a frame.
    let next = stage.next_frame(1000);
    let whole = hand.put(BUFFERS, &plain(), &next);
    let piece = |i: u32| {
        let len = if i < 63 { 10 } else { whole.len - 630 };
        readable(BUFFERS + 10 * i as usize, len)
    };
    let chain: Vec<_> = (0..64).map(piece).collect();
    arrives(&mut stage, &mut hand, 63, &chain)?;
    stage.end(hand)
}

#[test]
fn k03_id_beyond_the_ring_stops_it() -> Result<()> {
    let chain = |id: u16, len: usize| {
        move |hand: &mut Hand| {
            hand.tx().post_chain(id, &[readable(BUFFERS, 100); 3][..len]);
        }
    };
    stopped_by(&[("64", &chain(64, 1)), ("0xffff", &chain(0xffff, 1)), ("of a chain", &chain(RING, 3))])
}

/// Ids are only echoed, and nothing is held by id, so the device need not, and does not, look for a second one.
#[test]
fn k03_the_same_id_twice_is_two_frames() -> Result<()> {
    let mut stage = Stage::new()?;
    let mut hand = stage.connect(&config())?;
    let next = stage.next_frame(200);
    let whole = hand.put(BUFFERS, &plain(), &next);
    let at = hand.tx().post_chains_silently(&[(5, &[whole]), (5, &[whole])]);
    hand.tx().kick();
    for at in [at, after(at, 1, RING)] {
        ensure!(hand.tx().expect_used_at(at)? == (5, 0));
    }
    stage.expect_next()?;
    let (_, again) = stage.neighbour.expect(0)?;
    ensure!(again == next, "one buffer, two frames");
    stage.book.rx += 1;
    stage.end(hand)
}

/// The id of a chain is in its last descriptor; in the others it means nothing.
#[test]
fn k03_ids_before_the_last_descriptor_are_ignored() -> Result<()> {
    let mut stage = Stage::new()?;
    let mut hand = stage.connect(&config())?;
    let next = stage.next_frame(200);
    let whole = hand.put(BUFFERS, &plain(), &next);
    let begin = hand.tx().avail;
    let second = after(begin, 1, RING);
    let (head, tail) = (readable(BUFFERS, 12), readable(BUFFERS + 12, whole.len - 12));
    hand.tx().ring.set_packed(second, Descriptor { flags: available(second), next: 7, ..tail });
    hand.tx()
        .ring
        .set_packed(begin, Descriptor { flags: available(begin) | DESC_NEXT, next: 0xffff, ..head });
    hand.tx().avail = after(begin, 2, RING);
    hand.tx().kick();
    ensure!(hand.tx().expect_used_at(begin)? == (7, 0));
    stage.expect_next()?;
    stage.end(hand)
}

/// A descriptor of an indirect table: a packed ring's, in which flags other than WRITE mean nothing.
fn entry_bytes(d: Descriptor) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&d.addr.to_le_bytes());
    bytes[8..12].copy_from_slice(&d.len.to_le_bytes());
    bytes[12..14].copy_from_slice(&d.next.to_le_bytes());
    bytes[14..].copy_from_slice(&d.flags.to_le_bytes());
    bytes
}

/// Puts a table at [`TABLE`] and returns the descriptor that refers to it.
fn table(hand: &Hand, entries: &[Descriptor]) -> Descriptor {
    let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry_bytes(*entry)).collect();
    hand.memory().write(TABLE, &bytes);
    chained(TABLE, u32::try_from(bytes.len()).unwrap(), DESC_INDIRECT, 0)
}

#[test]
fn k04_indirect_tables_by_the_rules() -> Result<()> {
    let mut stage = Stage::new()?;
    let mut hand = stage.connect(&config())?;
    let next = stage.next_frame(200);
    let whole = hand.put(BUFFERS, &plain(), &next);
    // The end of a table is its length; NEXT, INDIRECT and ids in it mean nothing.
    let odd = DESC_NEXT | DESC_INDIRECT | DESC_AVAIL | DESC_USED;
    let mut entries = vec![chained(BUFFERS, 12, odd, 0xffff), chained(BUFFERS + 12, whole.len - 12, 0, 0)];
    entries.resize(RING.into(), chained(BUFFERS, 0, odd, 3));
    let full = table(&hand, &entries);
    arrives(&mut stage, &mut hand, 11, &[full]).context("as many entries as the ring")?;
    let next = stage.next_frame(200);
    hand.put(BUFFERS, &plain(), &next);
    let ignored = Descriptor { flags: DESC_INDIRECT | DESC_WRITE, ..full };
    arrives(&mut stage, &mut hand, 12, &[ignored]).context("WRITE beside INDIRECT")?;

    entries.push(readable(BUFFERS, 1));
    let long = table(&hand, &entries);
    let short = |len| Descriptor { len, ..full };
    let end = GUEST_BASE + MEMORY as u64;
    let cases: [(&str, &[Descriptor], DropReason); 8] = [
        ("one entry too many", &[long], GuestDescriptorInvalid),
        ("no entry", &[short(0)], GuestDescriptorInvalid),
        ("half an entry", &[short(24)], GuestDescriptorInvalid),
        ("NEXT beside INDIRECT", &[full, readable(BUFFERS, 10)], GuestDescriptorInvalid),
        ("more with the ring's", &[readable(BUFFERS, 10), full], GuestDescriptorInvalid),
        ("outside of memory", &[Descriptor { addr: end, ..short(32) }], GuestUnmappedAddress),
        ("half outside", &[Descriptor { addr: end - 16, ..short(32) }], GuestUnmappedAddress),
        (
            "around the address space",
            &[Descriptor { addr: u64::MAX - 15, ..short(32) }],
            GuestUnmappedAddress,
        ),
    ];
    for (what, chain, reason) in cases {
        skipped(&mut stage, &mut hand, chain, reason).with_context(|| what.to_owned())?;
    }
    hand.memory().write(TABLE, &entry_bytes(chained(BUFFERS, 100, DESC_WRITE, 0)));
    skipped(&mut stage, &mut hand, &[short(16)], GuestDescriptorInvalid).context("a buffer to be written")?;
    drop(hand);
    stage.expect_idle()?;

    let features = PACKED & !(1 << features::INDIRECT_DESC);
    let mut hand = stage.connect(&HandConfig { features, ..config() })?;
    skipped(&mut stage, &mut hand, &[full], GuestDescriptorInvalid).context("not negotiated")?;
    stage.end(hand)
}

fn calls(stage: &Stage) -> Result<u64> {
    let port = stage.plane().port(stage.port)?;
    Ok(port.rings.into_iter().find(|ring| ring.index == 1).context("the ring ran")?.calls)
}

/// Whether a driver that says this wants to be called for `batch` descriptors from `old` on (virtio 1.2, 2.8.14).
fn wished(event: u16, flags: u16, event_idx: bool, old: u16, batch: u16) -> bool {
    match flags & 3 {
        1 => false,
        2 if event_idx && event & !WRAP < RING => (0..batch).any(|slot| after(old, slot, RING) == event),
        _ => true,
    }
}

/// And R34: a wish that makes no sense is one for everything.
#[test]
fn k05_calls_are_made_exactly_when_the_event_says() -> Result<()> {
    for (event_idx, features) in [(true, PACKED | 1 << features::EVENT_IDX), (false, PACKED)] {
        let mut stage = Stage::new()?;
        let mut hand = stage.connect(&HandConfig { features, ..config() })?;
        let area = hand.tx().ring.area_offsets()[1];
        let whole = hand.put(BUFFERS, &plain(), &lonely());
        // A call fd is signalled once when it is set.
        hand.tx().bells.call.read()?;
        let (mut state, mut expected) = (34, 0);
        for round in 0..count(1500, 100_000) {
            let random = split_mix(&mut state);
            let [batch, near, flags, any, low, high, ..] = random.to_le_bytes();
            // All of it becomes visible at one go, and is less than a burst: so it is used at one go, too.
            let batch = 1 + u16::from(batch % 20);
            let old = hand.tx().avail;
            let event = match any % 3 {
                0 => u16::from_le_bytes([low, high]),
                _ => after(old, u16::from(near) % 32, RING) ^ if any % 16 == 1 { WRAP } else { 0 },
            };
            let flags = if flags & 8 == 0 { 2 } else { u16::from(flags) };
            hand.memory().write(area, &event.to_le_bytes());
            hand.memory().write(area + 2, &flags.to_le_bytes());
            let chains = vec![(0, std::slice::from_ref(&whole)); batch.into()];
            hand.tx().post_chains_silently(&chains);
            hand.tx().kick();
            hand.tx().expect_used_at(old)?;
            stage.drops(LinkLocal, batch.into());
            // The call follows what it is for, and is over before the next batch: so all but the last are surely counted.
            let last = u64::from(wished(event, flags, event_idx, old, batch));
            let have = calls(&stage)?;
            ensure!(
                (expected..=expected + last).contains(&have),
                "round {round}: {old:#x} + {batch}, event {event:#x} {flags:#x}: {have} calls, expected {expected} + {last}"
            );
            expected += last;
        }
        until("the last call", || calls(&stage).is_ok_and(|calls| calls == expected))?;
        ensure!(hand.tx().bells.call.read()? == expected, "every call was an increment of the eventfd");
        stage.end(hand)?;
    }
    Ok(())
}

/// SET_VRING_BASE may come before the ring's size is known; so it is the start that is refused, by the answer to the kick.
#[test]
fn k06_base_outside_of_the_ring_is_refused_at_the_start() -> Result<()> {
    let mut stage = Stage::new()?;
    let mut hand = stage.connect(&config())?;
    let user_addrs = hand.tx().ring.user_addrs();
    for base in [RING, RING | WRAP, 0x7fff, 0xffff] {
        hand.front().stop_ring(1)?;
        let refused = hand.front().start_ring(1, RingPlace { size: RING, user_addrs, base });
        ensure!(refused.is_err(), "{base:#x} was taken");
        hand.restart(1)?;
        stage.good(&mut hand).with_context(|| format!("after {base:#x}"))?;
    }
    stage.end(hand)
}

/// A stage whose hostile guest, of which a second thread writes to memory, kicks until that has done enough. A ring that
/// stopped is set up again; at the end the port's counters add up, and a lawful guest has its place. Returns how often it
/// stopped.
fn race(prepare: impl Fn(&mut Hand), flip: impl Fn(&mut Hand) -> Flipper) -> Result<u64> {
    let plan = PortPlan { mtu: MTU, ..PortPlan::new("hostile", NETWORK) };
    let neighbour = PeerConfig { ring_size: 512, features: MERGEABLE, ..PeerConfig::default() };
    let mut stage = Stage::with(plan, neighbour)?;
    let mut hand = stage.connect(&config())?;
    prepare(&mut hand);
    let flipper = flip(&mut hand);
    let (flips, mut stops) = (count(3_000_000, 100_000_000), 0);
    while flipper.flips() < flips {
        hand.tx().kick();
        if hand.tx().bells.err.read().is_ok() {
            stops += 1;
            hand.restart(1)?;
            prepare(&mut hand);
        }
        while stage.neighbour.receive(0).is_some() {}
    }
    drop(flipper);
    hand.restart(1)?;
    let have = Ledger::from(&stage.plane().counters(stage.port)?);
    let got = Ledger::from(&stage.plane().counters(stage.neighbour_port)?);
    // One drop is the introduction that nobody heard.
    let lost = have.dropped() - 1 + got.dropped();
    ensure!(have.rx == got.tx + lost, "{have:?} from the guest, {got:?} to its neighbour");
    ensure!(have.rx > 0, "nothing was offered");
    stage.forget()?;
    stage.good(&mut hand)?;
    stage.end(hand)?;
    Ok(stops)
}

/// And R30, R32: flags before the rest, all of it at any time, in both laps.
#[test]
fn k07_descriptors_written_in_any_order_are_any_lawful_outcome() -> Result<()> {
    let prepare = |hand: &mut Hand| {
        hand.put(BUFFERS, &plain(), &frame(NEIGHBOUR, HOSTILE, 2000));
    };
    let stops = race(prepare, |hand| {
        let ring = hand.tx().ring.area_offsets()[0];
        Flipper::start(hand, move |memory, random| {
            let [kind, place, low, high, ..] = random.to_le_bytes();
            let at = ring + 16 * usize::from(place % 64);
            let small = u32::from(low) * 8;
            match kind % 8 {
                0 => {
                    let addrs =
                        [GUEST_BASE + BUFFERS as u64, 0, u64::MAX - 100, GUEST_BASE + (16 << 20) - 50];
                    memory.write(at, &addrs[usize::from(high % 4)].to_le_bytes());
                }
                1 => memory.write(at + 8, &[small, u32::MAX, 0, 70_000][usize::from(high % 4)].to_le_bytes()),
                // Rarely an id that stops the ring.
                2 => memory.write(at + 12, &[low % 64, u8::from(place == 0xff)]),
                _ => {
                    let whose = [DESC_AVAIL, DESC_USED][usize::from(high >> 7)];
                    memory.write(at + 14, &(whose | u16::from(high & 7 & low)).to_le_bytes());
                }
            }
        })
    })?;
    println!("stopped {stops} times");
    Ok(())
}

/// R33.
#[test]
fn k08_indirect_table_that_changes_meanwhile_is_any_lawful_outcome() -> Result<()> {
    let prepare = |hand: &mut Hand| {
        hand.put(BUFFERS, &plain(), &frame(NEIGHBOUR, HOSTILE, 1000));
        let refer = chained(TABLE, 64, DESC_INDIRECT, 0);
        let chains = vec![(0, std::slice::from_ref(&refer)); RING.into()];
        hand.tx().post_chains_silently(&chains);
    };
    let entries = [
        chained(BUFFERS, 40, DESC_NEXT, 1),
        readable(BUFFERS + 40, 900),
        chained(BUFFERS, 100, DESC_WRITE, 1),
        chained(TABLE, 64, DESC_INDIRECT, 0xffff),
        Descriptor { addr: 0, len: 60_000, flags: DESC_NEXT, next: 2 },
    ];
    let stops = race(prepare, |hand| {
        let ring = hand.tx().ring.area_offsets()[0];
        Flipper::start(hand, move |memory, random| {
            let [place, kind, slot, lap, ..] = random.to_le_bytes();
            let entry = entries[usize::from(kind) % entries.len()];
            memory.write(TABLE + 16 * usize::from(place % 4), &entry_bytes(entry));
            // What was used is made available again.
            let flags = DESC_INDIRECT | [DESC_AVAIL, DESC_USED][usize::from(lap & 1)];
            let whole = Descriptor { flags, ..chained(TABLE, 64, 0, slot.into()) };
            memory.write(ring + 16 * usize::from(slot % 64), &entry_bytes(Descriptor { next: 1, ..whole }));
        })
    })?;
    ensure!(stops == 0, "a table is no reason to stop a ring: {stops}");
    Ok(())
}

/// R35.
#[test]
fn k08_frames_without_a_kick_come_with_the_next_kick() -> Result<()> {
    for features in [PACKED, PACKED | 1 << features::EVENT_IDX] {
        let mut stage = Stage::new()?;
        let mut hand = stage.connect(&HandConfig { features, ..config() })?;
        for _ in 0..100 {
            let next = stage.next_frame(200);
            let whole = hand.put(BUFFERS, &plain(), &next);
            hand.tx().post_chains_silently(&[(7, &[whole])]);
            let lost = hand.put(BUFFERS + 4096, &plain(), &lonely());
            let at = hand.tx().post_chain(8, &[lost]);
            ensure!(hand.tx().expect_used_at(at)? == (8, 0));
            stage.drops(LinkLocal, 1);
            stage.expect_next()?;
        }
        stage.end(hand)?;
    }
    Ok(())
}

/// R36.
#[test]
fn k08_stop_and_start_between_publish_and_kick_loses_nothing() -> Result<()> {
    let mut stage = Stage::new()?;
    let mut hand = stage.connect(&config())?;
    let user_addrs = hand.tx().ring.user_addrs();
    for round in 0..count(150, 100_000) {
        let next = stage.next_frame(200);
        let whole = hand.put(BUFFERS, &plain(), &next);
        let at = hand.tx().post_chains_silently(&[(0, &[whole])]);
        let base = hand.front().stop_ring(1)?;
        let position = u16::try_from(base & 0xffff)?;
        ensure!(base >> 16 == u32::from(position), "round {round}: nothing is outstanding: {base:#x}");
        // The worker may or may not have seen the frame; the base says which, and it must be the truth.
        let used = hand.tx().ring.packed(at).flags & (DESC_AVAIL | DESC_USED) != available(at);
        let avail = hand.tx().avail;
        ensure!(position == if used { avail } else { at }, "round {round}: base {base:#x}, used: {used}");
        hand.tx().bells = hand.front().start_ring(1, RingPlace { size: RING, user_addrs, base: position })?;
        hand.tx().kick();
        stage.expect_next().with_context(|| format!("round {round}"))?;
        hand.tx().expect_used_at(at)?;
    }
    stage.end(hand)
}

/// What RING_RESET (virtio 1.2, 2.6.1) means to a back end: one ring is stopped and set up again with another size, while its neighbours carry
/// frames.
#[test]
fn one_ring_is_reset_and_resized_while_the_others_run() -> Result<()> {
    for features in [PACKED, MODERN] {
        let mut stage = Stage::new()?;
        let config = HandConfig { queue_pairs: 2, features, ..HandConfig::default() };
        let mut hand = stage.connect(&config)?;
        for size in [128, 16, 64] {
            stage.good(&mut hand)?;
            hand.front().stop_ring(1)?;
            stage.good_on(&mut hand, 3).context("the other pair, meanwhile")?;
            hand.resize(1, size)?;
            for _ in 0..2 * size {
                stage.good(&mut hand).with_context(|| format!("with {size} descriptors"))?;
            }
            stage.good_on(&mut hand, 3).context("the other pair, afterwards")?;
        }
        stage.end(hand)?;
    }
    Ok(())
}

/// Moves `total` frames of 60 bytes through one TX ring of `size`, to a neighbour that checks each.
fn stream(total: u64, size: u16, features: u64, shape: Shape) -> Result<()> {
    let from = PeerConfig { ring_size: size, features, shape, ..PeerConfig::default() };
    let to = PeerConfig {
        ring_size: 333,
        features: MERGEABLE | 1 << features::RING_PACKED,
        ..PeerConfig::default()
    };
    Stage::short_frames(from, to, total)
}

/// R37, and sizes that are no powers of two.
#[test]
fn k08_smallest_largest_and_odd_rings() -> Result<()> {
    let events = PACKED | 1 << features::EVENT_IDX;
    stream(200, 1, PACKED, Shape::Single)?;
    stream(200, 2, events, Shape::Single)?;
    stream(500, 7, events | 1 << features::IN_ORDER, Shape::Chained)?;
    stream(500, 100, PACKED, Shape::Indirect)?;
    stream(70_000, 32_768, events, Shape::Single)
}

/// R38.
#[test]
fn k08_good_frames_arrive_among_a_thousand_malformed_ones() -> Result<()> {
    let mut stage = Stage::new()?;
    let mut hand = stage.connect(&HandConfig { size: 1100, ..config() })?;
    for round in 0..count(5, 100) {
        let next = stage.next_frame(200);
        let good = hand.put(BUFFERS + 4096, &plain(), &next);
        let bad = chained(BUFFERS, 100, DESC_WRITE, 0);
        let mut chains = vec![(1, std::slice::from_ref(&bad)); 1000];
        chains.push((2, std::slice::from_ref(&good)));
        let begin = hand.tx().post_chains_silently(&chains);
        hand.tx().kick();
        ensure!(hand.tx().expect_used_at(after(begin, 1000, 1100))? == (2, 0));
        stage.drops(GuestDescriptorInvalid, 1000);
        stage.expect_next().with_context(|| format!("round {round}"))?;
    }
    stage.end(hand)
}
