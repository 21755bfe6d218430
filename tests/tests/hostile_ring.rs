//! Rings whose indices, notifications or places make no sense, and lawful rings of every size. A ring that makes no
//! sense as a whole is stopped, its error eventfd signalled and an event raised; set up again, it carries frames.
#![allow(clippy::unwrap_used)]

use anyhow::{Context, Result, ensure};
use dataplane::DropReason::{GuestDescriptorInvalid, LinkLocal};
use dataplane::{EventKind, RingReport};
use e2e::hand::{BUFFERS, Hand, HandConfig, readable};
use e2e::inproc::{count, until};
use e2e::oracle::split_mix;
use e2e::peer::{MERGEABLE, MODERN, PeerConfig};
use e2e::stage::{HOSTILE, NEIGHBOUR, Stage, frame, plain};
use rustix::fs::MemfdFlags;
use vhost_user::RingPlace;
use vring::{DESC_NEXT, DESC_WRITE, Descriptor, RegionSpec, features};

const RING: u16 = 64;

/// Frames to an address that every bridge keeps to itself: counted, and seen by nobody.
fn lonely() -> Vec<u8> {
    frame([0x01, 0x80, 0xc2, 0, 0, 0], HOSTILE, 46)
}

/// What a hostile guest does, with a name.
type Act<'a> = (&'a str, &'a dyn Fn(&mut Hand));

/// Does something to the TX ring of a fresh guest that must stop it, while its second queue pair goes on.
fn stopped_by(cases: &[Act<'_>]) -> Result<()> {
    let mut stage = Stage::new()?;
    let mut hand = stage.connect(&HandConfig { queue_pairs: 2, ..HandConfig::default() })?;
    for (what, act) in cases {
        stage.good(&mut hand)?;
        act(&mut hand);
        hand.tx().kick();
        stage.expect_stop(&mut hand, 1).with_context(|| (*what).to_owned())?;
    }
    drop(hand);
    stage.finish()
}

#[test]
fn r05_head_beyond_ring_stops_the_ring() -> Result<()> {
    let head = |head: u16| move |hand: &mut Hand| hand.tx().post(head);
    stopped_by(&[("64", &head(64)), ("65", &head(65)), ("0xffff", &head(0xffff))])
}

#[test]
fn r06_available_index_that_jumps_stops_the_ring() -> Result<()> {
    let jump = |by: u16| {
        move |hand: &mut Hand| {
            let avail = hand.tx().avail;
            hand.tx().ring.publish_avail(avail.wrapping_add(by));
        }
    };
    stopped_by(&[("size + 1", &jump(RING + 1)), ("0x8000", &jump(0x8000)), ("0xfffe", &jump(0xfffe))])
}

#[test]
fn r07_available_index_that_goes_back_stops_the_ring() -> Result<()> {
    let back = |by: u16| {
        move |hand: &mut Hand| {
            let avail = hand.tx().avail;
            hand.tx().ring.publish_avail(avail.wrapping_sub(by));
        }
    };
    stopped_by(&[("by 1", &back(1)), ("by the size", &back(RING))])
}

/// Moves `total` frames of 60 bytes through one TX ring of `size`, to a neighbour that checks each.
fn stream(total: u64, size: u16, features: u64) -> Result<()> {
    let from = PeerConfig { ring_size: size, features, ..PeerConfig::default() };
    let to = PeerConfig { ring_size: 512, features: MERGEABLE, ..PeerConfig::default() };
    Stage::short_frames(from, to, total)
}

#[test]
fn r08_indices_wrap_without_loss() -> Result<()> {
    stream(count(140_000, 1_000_000), RING, MODERN)
}

#[test]
fn r09_head_offered_twice_is_two_frames() -> Result<()> {
    let mut stage = Stage::new()?;
    let mut hand = stage.connect(&HandConfig::default())?;
    let next = stage.next_frame(200);
    let whole = hand.put(BUFFERS, &plain(), &next);
    hand.tx().ring.set_descriptor(5, whole);
    hand.tx().post_all(&[5, 5]);
    ensure!(hand.tx().expect_used()? == (5, 0) && hand.tx().used(0) == (5, 0) && hand.tx().avail == 2);
    stage.expect_next()?;
    let (_, again) = stage.neighbour.expect(0)?;
    ensure!(again == next, "one buffer, two frames");
    stage.book.rx += 1;
    stage.settle()?;
    drop(hand);
    stage.finish()
}

#[test]
fn r10_one_head_in_all_entries_is_handled_once_an_entry() -> Result<()> {
    let mut stage = Stage::new()?;
    let mut hand = stage.connect(&HandConfig { size: 256, ..HandConfig::default() })?;
    let whole = hand.put(BUFFERS, &plain(), &lonely());
    hand.tx().ring.set_descriptor(9, whole);
    for round in 1..=3 {
        hand.tx().post_all(&[9; 256]);
        hand.tx().expect_used()?;
        stage.drops(LinkLocal, 256);
        stage.settle().with_context(|| format!("round {round}"))?;
    }
    stage.good(&mut hand)?;
    drop(hand);
    stage.finish()
}

#[test]
fn r11_kicks_without_buffers_cost_nobody_else() -> Result<()> {
    let mut stage = Stage::new()?;
    let mut hand = stage.connect(&HandConfig::default())?;
    for _ in 0..count(100_000, 1_000_000) {
        hand.tx().kick();
        hand.rx().kick();
    }
    stage.good(&mut hand)?;
    stage.settle()?;
    drop(hand);
    stage.finish()
}

#[test]
fn r25_used_ring_is_never_read_back() -> Result<()> {
    let mut stage = Stage::new()?;
    let mut hand = stage.connect(&HandConfig::default())?;
    let [_, _, used] = hand.tx().ring.area_offsets();
    for pattern in [0xff, 0x55, 0x00, 0x01] {
        hand.memory().write(used, &[pattern; 6 + 8 * RING as usize]);
        stage.good(&mut hand).with_context(|| format!("overwritten with {pattern:#x}"))?;
    }
    hand.tx().ensure_whole()?;
    stage.settle()?;
    drop(hand);
    stage.finish()
}

#[test]
fn r26_scribbled_notification_words_lose_no_frame() -> Result<()> {
    for features in [MODERN, MODERN | 1 << features::EVENT_IDX] {
        let mut stage = Stage::new()?;
        let mut hand = stage.connect(&HandConfig { features, ..HandConfig::default() })?;
        let [_, avail, _] = hand.tx().ring.area_offsets();
        let mut state = features;
        for _ in 0..50 {
            let noise = split_mix(&mut state).to_le_bytes();
            hand.memory().write(avail, &noise[..2]);
            hand.memory().write(avail + 4 + 2 * usize::from(RING), &noise[2..4]);
            stage.good(&mut hand)?;
        }
        stage.settle()?;
        drop(hand);
        stage.finish()?;
    }
    Ok(())
}

/// Where the three areas are, made of where they should be.
type Place = fn([u64; 3]) -> [u64; 3];

#[test]
fn r27_areas_that_overlap_harm_only_their_own_ring() -> Result<()> {
    let mut stage = Stage::new()?;
    let places: &[(&str, Place)] = &[
        ("all at one place", |[desc, _, _]| [desc, desc, desc]),
        ("used on available", |[desc, avail, _]| [desc, avail & !3, avail & !3]),
        ("used on descriptors", |[desc, avail, _]| [desc, avail, desc]),
        ("available on descriptors", |[desc, _, used]| [desc, desc, used]),
    ];
    for (what, place) in places {
        let mut hand = stage.connect(&HandConfig::default())?;
        let user_addrs = place(hand.tx().ring.user_addrs());
        hand.front().stop_ring(1)?;
        let bells = hand.front().start_ring(1, RingPlace { size: RING, user_addrs, base: 0 })?;
        hand.tx().bells = bells;
        let whole = hand.put(BUFFERS, &plain(), &lonely());
        for round in 0..4 {
            hand.tx().ring.set_descriptor(round, whole);
            hand.tx().post(round);
        }
        // The session still answers, and a lawful ring in the same place carries frames.
        hand.restart(1).with_context(|| (*what).to_owned())?;
        stage.forget()?;
        stage.good(&mut hand).with_context(|| (*what).to_owned())?;
        drop(hand);
        stage.expect_idle()?;
    }
    stage.finish()
}

/// The hostile guest offers RX buffers that lie on a ring, and its neighbour sends into them.
fn rx_buffer_on(places: &[(&str, usize, usize)]) -> Result<()> {
    let mut stage = Stage::new()?;
    for (what, ring, area) in places {
        let mut hand = stage.connect(&HandConfig { queue_pairs: 2, ..HandConfig::default() })?;
        stage.good(&mut hand)?;
        let offset = hand.rings[*ring].ring.area_offsets()[*area];
        let buffer = Descriptor { flags: DESC_WRITE, ..readable(offset, 500) };
        hand.rx().ring.set_descriptor(0, buffer);
        hand.rings[2].ring.set_descriptor(0, buffer);
        hand.rx().post_all(&[0; 8]);
        hand.rings[2].post_all(&[0; 8]);
        for _ in 0..16 {
            // Bytes that would be indices and descriptors.
            let noise = [&HOSTILE[..], &NEIGHBOUR, &[0x88, 0xb5], &[0x81; 400]].concat();
            until("room to send", || stage.neighbour.send_now(0, &plain(), &noise))?;
        }
        until("the neighbour's frames", || stage.neighbour.unused(0) == 0)?;
        // Whatever that made of the rings, they can be set up again.
        for index in 0..4 {
            hand.restart(index)?;
        }
        stage.forget()?;
        stage.good(&mut hand).with_context(|| (*what).to_owned())?;
        drop(hand);
        stage.expect_idle()?;
    }
    stage.finish()
}

#[test]
fn r27_rx_buffer_on_its_own_ring_harms_only_that() -> Result<()> {
    rx_buffer_on(&[("descriptors", 0, 0), ("available ring", 0, 1), ("used ring", 0, 2)])
}

#[test]
fn r28_rx_buffer_on_another_ring_harms_only_the_port() -> Result<()> {
    rx_buffer_on(&[
        ("descriptors of its TX ring", 1, 0),
        ("available ring of its TX ring", 1, 1),
        ("used ring of its TX ring", 1, 2),
        ("the other pair's RX ring", 2, 1),
        ("the other pair's TX ring", 3, 0),
    ])
}

#[test]
fn r29_huge_pages_that_are_not_there_break_only_the_ring() -> Result<()> {
    const PAGE: u64 = 2 << 20;
    let free = std::fs::read_to_string("/proc/meminfo")?;
    let free = free.lines().find(|line| line.starts_with("HugePages_Free")).unwrap_or("HugePages_Free: none");
    if !free.ends_with(" 0") {
        println!("not run: it needs a machine without free huge pages, here is {free}");
        return Ok(());
    }
    let mut stage = Stage::new()?;
    let mut hand = stage.connect(&HandConfig::default())?;
    let file = rustix::fs::memfd_create("huge", MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB)?;
    rustix::fs::ftruncate(&file, PAGE)?;
    // Never touched by us, so it needs no mapping of ours.
    let region = RegionSpec { guest_addr: 1 << 40, size: PAGE, user_addr: 1 << 40, mmap_offset: 0 };
    hand.front().add_memory(&region, std::os::fd::AsFd::as_fd(&file))?;
    hand.front().stop_ring(1)?;
    let user_addrs = [1 << 40, (1 << 40) + 0x1000, (1 << 40) + 0x2000];
    let bells = hand.front().start_ring(1, RingPlace { size: RING, user_addrs, base: 0 })?;
    hand.tx().bells = bells;
    hand.tx().kick();
    hand.tx().expect_broken()?;
    stage.plane().expect_event(stage.port, |kind| matches!(kind, EventKind::RingBroken { ring: 1, .. }))?;
    drop((hand, file));
    stage.expect_idle()?;
    let mut hand = stage.connect(&HandConfig::default())?;
    stage.good(&mut hand).context("the port's next front end")?;
    drop(hand);
    stage.finish()
}

fn ring_report(stage: &Stage, index: u16) -> Result<RingReport> {
    let port = stage.plane().port(stage.port)?;
    port.rings.into_iter().find(|ring| ring.index == index).context("the ring ran")
}

/// Whether an index that goes from `old` to `new` passes `event` (virtio 1.2, 2.7.7.2), one step after the other.
fn passes(event: u16, old: u16, new: u16) -> bool {
    (0..new.wrapping_sub(old)).any(|step| old.wrapping_add(step) == event)
}

#[test]
fn r34_calls_are_made_exactly_when_used_event_says() -> Result<()> {
    let mut stage = Stage::new()?;
    let features = MODERN | 1 << features::EVENT_IDX;
    let mut hand = stage.connect(&HandConfig { features, ..HandConfig::default() })?;
    let [_, avail, _] = hand.tx().ring.area_offsets();
    let used_event = avail + 4 + 2 * usize::from(RING);
    let whole = hand.put(BUFFERS, &plain(), &lonely());
    hand.tx().ring.set_descriptor(0, whole);
    let memory = hand.memory().clone();
    // A call fd is signalled once when it is set.
    hand.tx().bells.call.read()?;
    let (mut state, mut calls) = (34, 0);
    let soak = count(0, 1) == 1;
    let rounds = count(3000, 3 * 65_536);
    for round in 0..rounds {
        let random = split_mix(&mut state);
        // One index store publishes a whole batch, which is less than a burst: so it is used by one index store, too.
        let batch = 1 + u16::try_from(random % 20).unwrap();
        let old = hand.tx().avail;
        let event = match (soak, round % 2) {
            // Most events are near; the whole run has every value.
            (false, 0) => old.wrapping_add(u16::try_from(random >> 32 & 0x1f).unwrap()).wrapping_sub(4),
            (false, _) => u16::try_from(random >> 48).unwrap(),
            (true, _) => u16::try_from(round & 0xffff).unwrap(),
        };
        memory.write(used_event, &event.to_le_bytes());
        hand.tx().post_all(&vec![0; batch.into()]);
        hand.tx().expect_used()?;
        stage.drops(LinkLocal, batch.into());
        // The call follows the index, and is over before the next batch: so all but the last are surely counted.
        let last = u64::from(passes(event, old, hand.tx().avail));
        let have = ring_report(&stage, 1)?.calls;
        ensure!(
            (calls..=calls + last).contains(&have),
            "round {round}: {old} + {batch}, used_event {event}: {have} calls, expected {calls} + {last}"
        );
        calls += last;
    }
    until("the last call", || ring_report(&stage, 1).is_ok_and(|ring| ring.calls == calls))?;
    ensure!(hand.tx().bells.call.read()? == calls, "every call was an increment of the eventfd");
    stage.settle()?;
    drop((hand, memory));
    stage.finish()
}

#[test]
fn r35_frames_without_a_kick_come_with_the_next_kick() -> Result<()> {
    for features in [MODERN, MODERN | 1 << features::EVENT_IDX] {
        let mut stage = Stage::new()?;
        let mut hand = stage.connect(&HandConfig { features, ..HandConfig::default() })?;
        for _ in 0..20 {
            let next = stage.next_frame(200);
            let whole = hand.put(BUFFERS, &plain(), &next);
            hand.tx().ring.set_descriptor(7, whole);
            hand.tx().post_silently(&[7]);
            let lost = hand.put(BUFFERS + 4096, &plain(), &lonely());
            hand.tx().ring.set_descriptor(8, lost);
            hand.tx().post(8);
            hand.tx().expect_used()?;
            stage.drops(LinkLocal, 1);
            stage.expect_next()?;
        }
        stage.settle()?;
        drop(hand);
        stage.finish()?;
    }
    Ok(())
}

#[test]
fn r36_stop_and_start_between_publish_and_kick_loses_nothing() -> Result<()> {
    let mut stage = Stage::new()?;
    let mut hand = stage.connect(&HandConfig::default())?;
    let user_addrs = hand.tx().ring.user_addrs();
    for round in 0..count(60, 100_000) {
        let next = stage.next_frame(200);
        let whole = hand.put(BUFFERS, &plain(), &next);
        hand.tx().ring.set_descriptor(0, whole);
        hand.tx().post_silently(&[0]);
        let base = u16::try_from(hand.front().stop_ring(1)?)?;
        let avail = hand.tx().avail;
        // The worker may or may not have seen the frame; the base says which, and it must be the truth.
        ensure!(base == hand.tx().ring.used_idx(), "round {round}: base {base}");
        ensure!(base == avail || base == avail.wrapping_sub(1), "round {round}: base {base} of {avail}");
        let bells = hand.front().start_ring(1, RingPlace { size: RING, user_addrs, base })?;
        hand.tx().bells = bells;
        hand.tx().kick();
        stage.expect_next().with_context(|| format!("round {round}"))?;
        hand.tx().expect_used()?;
    }
    stage.settle()?;
    drop(hand);
    stage.finish()
}

#[test]
fn r37_smallest_and_largest_rings() -> Result<()> {
    stream(200, 1, MODERN)?;
    stream(200, 2, MODERN)?;
    stream(200, 1, MODERN | 1 << features::EVENT_IDX)?;
    stream(40_000, 32_768, MODERN | 1 << features::EVENT_IDX)
}

#[test]
fn r38_good_frames_arrive_among_a_thousand_malformed_ones() -> Result<()> {
    let mut stage = Stage::new()?;
    let mut hand = stage.connect(&HandConfig { size: 1024, ..HandConfig::default() })?;
    for round in 0..count(5, 100) {
        let next = stage.next_frame(200);
        let good = hand.put(BUFFERS, &plain(), &next);
        hand.tx().ring.set_descriptor(1000, good);
        for i in 0..1000 {
            let looped = Descriptor { flags: DESC_NEXT, next: i, ..readable(BUFFERS, 10) };
            hand.tx().ring.set_descriptor(i, looped);
        }
        hand.tx().post_all(&(0..=1000).collect::<Vec<_>>());
        hand.tx().expect_used()?;
        stage.drops(GuestDescriptorInvalid, 1000);
        stage.expect_next().with_context(|| format!("round {round}"))?;
    }
    stage.settle()?;
    drop(hand);
    stage.finish()
}
