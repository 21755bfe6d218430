//! Descriptor chains that no lawful driver would offer, and the odd ones that it might. A bad chain is returned and
//! counted; the ring, the neighbour and the canaries go on.
#![allow(clippy::unwrap_used)]

use anyhow::{Context, Result, ensure};
use dataplane::DropReason::{self, GuestDescriptorInvalid, GuestUnmappedAddress, MtuExceeded};
use e2e::hand::{BUFFERS, Hand, HandConfig, MEMORY, chained, descriptor_bytes, readable};
use e2e::stage::{NEIGHBOUR, Stage, frame, plain};
use vring::driver::GUEST_BASE;
use vring::{DESC_INDIRECT, DESC_NEXT, DESC_WRITE, Descriptor, features};

type Chain = Vec<(u16, Descriptor)>;

/// Offers each chain in turn; all of them must be returned for `reason`.
fn all_skipped(reason: DropReason, chains: &[(&str, Chain)]) -> Result<()> {
    skipped_with(&HandConfig::default(), reason, chains)
}

fn skipped_with(config: &HandConfig, reason: DropReason, chains: &[(&str, Chain)]) -> Result<()> {
    let mut stage = Stage::new()?;
    let mut hand = stage.connect(config)?;
    for (what, chain) in chains {
        stage.expect_skip(&mut hand, chain, reason).with_context(|| (*what).to_owned())?;
    }
    drop(hand);
    stage.finish()
}

/// Puts an indirect table at `offset` and returns the descriptor that refers to it.
fn table(hand: &Hand, offset: usize, entries: &[Descriptor]) -> Descriptor {
    let bytes: Vec<u8> = entries.iter().flat_map(|entry| descriptor_bytes(*entry)).collect();
    hand.memory().write(offset, &bytes);
    chained(offset, u32::try_from(bytes.len()).unwrap(), DESC_INDIRECT, 0)
}

/// Where tables lie.
const TABLE: usize = BUFFERS + 0x10_0000;

#[test]
fn r01_descriptor_that_follows_itself_is_skipped() -> Result<()> {
    all_skipped(GuestDescriptorInvalid, &[("itself", vec![(0, chained(BUFFERS, 100, DESC_NEXT, 0))])])
}

#[test]
fn r02_cycles_are_skipped() -> Result<()> {
    let cycle = |len: u16| -> Chain {
        (0..len).map(|i| (i, chained(BUFFERS, 10, DESC_NEXT, (i + 1) % len))).collect()
    };
    all_skipped(GuestDescriptorInvalid, &[("of two", cycle(2)), ("of all", cycle(64))])
}

#[test]
fn r03_next_beyond_the_ring_is_skipped() -> Result<()> {
    let next = |next| vec![(0, chained(BUFFERS, 100, DESC_NEXT, next))];
    all_skipped(GuestDescriptorInvalid, &[("64", next(64)), ("65", next(65)), ("0xffff", next(0xffff))])
}

#[test]
fn r04_chain_of_the_whole_ring_is_a_frame_and_one_more_is_not() -> Result<()> {
    let mut stage = Stage::new()?;
    let mut hand = stage.connect(&HandConfig::default())?;
    let pieces = |hand: &Hand, frame: &[u8], count: u16| -> Vec<Descriptor> {
        let whole = hand.put(BUFFERS, &plain(), frame);
        let part = whole.len / u32::from(count);
        let piece = |i: u16| {
            let last = i + 1 == count;
            let len = if last { whole.len - part * u32::from(i) } else { part };
            let flags = if last { 0 } else { DESC_NEXT };
            chained(BUFFERS + (part * u32::from(i)) as usize, len, flags, i + 1)
        };
        (0..count).map(piece).collect()
    };
    let next = stage.next_frame(1000);
    let chain = (0..).zip(pieces(&hand, &next, 64)).collect::<Vec<_>>();
    stage.expect_ok(&mut hand, &chain).context("64 in the ring")?;
    let next = stage.next_frame(1000);
    let reference = table(&hand, TABLE, &pieces(&hand, &next, 64));
    stage.expect_ok(&mut hand, &[(3, reference)]).context("64 in a table")?;
    let reference = table(&hand, TABLE, &pieces(&hand, &next, 65));
    stage.expect_skip(&mut hand, &[(3, reference)], GuestDescriptorInvalid).context("65 in a table")?;
    drop(hand);
    stage.finish()
}

#[test]
fn r12_addresses_outside_of_memory_are_skipped() -> Result<()> {
    let at = |addr| vec![(0, Descriptor { addr, len: 100, flags: 0, next: 0 })];
    let end = GUEST_BASE + MEMORY as u64;
    let hole = BUFFERS + 0x20_0000;
    let config = HandConfig {
        regions: vec![(0, hole), (hole + 0x1000, MEMORY - hole - 0x1000)],
        ..HandConfig::default()
    };
    let chains = [
        ("0", at(0)),
        ("just before the first region", at(GUEST_BASE - 1)),
        ("one past the last region", at(end)),
        ("the end past the last region", at(end - 99)),
        ("in a hole", at(GUEST_BASE + hole as u64 + 0x800)),
        ("the largest", at(u64::MAX - 200)),
    ];
    skipped_with(&config, GuestUnmappedAddress, &chains)
}

#[test]
fn r13_address_and_length_that_wrap_are_skipped() -> Result<()> {
    let at = |addr, len| vec![(0, Descriptor { addr, len, flags: 0, next: 0 })];
    let chains = [
        ("wraps by one", at(u64::MAX - 98, 100)),
        ("wraps into memory", at(u64::MAX, 1000)),
        ("wraps onto itself", at(u64::MAX - 0xffff, 0x1_0000)),
    ];
    all_skipped(GuestUnmappedAddress, &chains)
}

#[test]
fn r14_buffer_across_adjacent_regions_is_a_frame() -> Result<()> {
    let mut stage = Stage::new()?;
    let seam = BUFFERS + 0x1000;
    let regions = vec![(0, seam), (seam, 0x1000), (seam + 0x1000, MEMORY - seam - 0x1000)];
    let mut hand = stage.connect(&HandConfig { regions, ..HandConfig::default() })?;
    for before in [1, 11, 12, 13, 25, 26, 127, 128, 129, 1000] {
        let next = stage.next_frame(1500);
        let whole = hand.put(seam - before, &plain(), &next);
        stage
            .expect_ok(&mut hand, &[(0, whole)])
            .with_context(|| format!("{before} bytes before the seam"))?;
    }
    let next = stage.next_frame(9000);
    let whole = hand.put(seam - 100, &plain(), &next);
    stage.expect_ok(&mut hand, &[(0, whole)]).context("over two seams")?;
    drop(hand);
    stage.finish()
}

#[test]
fn r15_buffer_that_reaches_into_a_hole_is_skipped() -> Result<()> {
    let hole = BUFFERS + 0x1000;
    let config = HandConfig {
        regions: vec![(0, hole), (hole + 0x1000, MEMORY - hole - 0x1000)],
        ..HandConfig::default()
    };
    let chains = [1, 12, 26, 130, 1500].map(|n| ("reaches", vec![(0, readable(hole - n, 1501))]));
    let second = vec![(0, chained(BUFFERS, 100, DESC_NEXT, 1)), (1, readable(hole - 10, 20))];
    skipped_with(&config, GuestUnmappedAddress, &[&chains[..], &[("in the second piece", second)]].concat())
}

#[test]
fn r16_empty_pieces_are_ignored_unless_their_address_is_bad() -> Result<()> {
    let mut stage = Stage::new()?;
    let mut hand = stage.connect(&HandConfig::default())?;
    let next = stage.next_frame(300);
    let whole = hand.put(BUFFERS, &plain(), &next);
    let chain = [
        (0, chained(BUFFERS + 0x5000, 0, DESC_NEXT, 1)),
        (1, Descriptor { flags: DESC_NEXT, next: 2, ..whole }),
        (2, chained(BUFFERS + 0x6000, 0, 0, 0)),
    ];
    stage.expect_ok(&mut hand, &chain).context("empty pieces around a frame")?;
    let bad = [
        (0, Descriptor { flags: DESC_NEXT, next: 1, ..whole }),
        (1, Descriptor { addr: 0, len: 0, flags: 0, next: 0 }),
    ];
    stage.expect_skip(&mut hand, &bad, GuestUnmappedAddress).context("empty and outside")?;
    let nothing = [(0, readable(BUFFERS, 0))];
    stage.expect_skip(&mut hand, &nothing, DropReason::Runt).context("empty and alone")?;
    drop(hand);
    stage.finish()
}

#[test]
fn r17_lengths_beyond_any_frame_are_skipped() -> Result<()> {
    let long = |len| vec![(0, readable(BUFFERS, len))];
    let many = |count: u16, len| -> Chain {
        let flags = |i| if i + 1 == count { 0 } else { DESC_NEXT };
        (0..count).map(|i| (i, chained(BUFFERS, len, flags(i), i + 1))).collect()
    };
    let chains = [
        ("64 KiB and header and tags", long(65_557 + 12 + 1)),
        ("1 MiB", long(1 << 20)),
        ("all of memory", long(u32::try_from(MEMORY - BUFFERS).unwrap())),
        ("sum beyond a frame", many(2, 40_000)),
        ("sum beyond 4 GiB", many(2, u32::MAX)),
        ("4 GiB", long(u32::MAX)),
        ("2 GiB", long(1 << 31)),
    ];
    all_skipped(MtuExceeded, &chains)
}

#[test]
fn r18_writable_buffers_on_a_tx_ring_are_skipped() -> Result<()> {
    let piece = |index, flags, next| (index, chained(BUFFERS, 100, flags, next));
    let chains = [
        ("alone", vec![piece(0, DESC_WRITE, 0)]),
        ("first", vec![piece(0, DESC_WRITE | DESC_NEXT, 1), piece(1, 0, 0)]),
        ("last", vec![piece(0, DESC_NEXT, 1), piece(1, DESC_WRITE, 0)]),
        ("between", vec![piece(0, DESC_NEXT, 1), piece(1, DESC_WRITE | DESC_NEXT, 2), piece(2, 0, 0)]),
    ];
    all_skipped(GuestDescriptorInvalid, &chains)
}

#[test]
fn r19_indirect_without_the_feature_is_skipped() -> Result<()> {
    let config = HandConfig { features: 1 << features::VERSION_1, ..HandConfig::default() };
    let mut stage = Stage::new()?;
    let mut hand = stage.connect(&config)?;
    let whole = hand.put(BUFFERS, &plain(), &frame(NEIGHBOUR, e2e::stage::HOSTILE, 100));
    let reference = table(&hand, TABLE, &[whole]);
    stage.expect_skip(&mut hand, &[(0, reference)], GuestDescriptorInvalid)?;
    drop(hand);
    stage.finish()
}

#[test]
fn r20_indirect_tables_of_odd_lengths_are_skipped() -> Result<()> {
    let lengths = [0, 1, 8, 15, 17, 24, 16 * 64 + 8, 16 * 65, 16 * 0xffff, 0xffff_fff0, u32::MAX];
    let chains = lengths.map(|len| ("length", vec![(0, chained(TABLE, len, DESC_INDIRECT, 0))]));
    all_skipped(GuestDescriptorInvalid, &chains)
}

#[test]
fn r21_nested_and_chained_indirect_tables_are_skipped() -> Result<()> {
    let mut stage = Stage::new()?;
    let mut hand = stage.connect(&HandConfig::default())?;
    let next = stage.next_frame(300);
    let whole = hand.put(BUFFERS, &plain(), &next);
    let inner = table(&hand, TABLE + 0x1000, &[whole]);
    let nested = table(&hand, TABLE, &[inner]);
    stage.expect_skip(&mut hand, &[(0, nested)], GuestDescriptorInvalid).context("nested")?;
    let behind = table(&hand, TABLE, &[Descriptor { flags: DESC_NEXT, next: 1, len: 12, ..whole }, inner]);
    stage.expect_skip(&mut hand, &[(0, behind)], GuestDescriptorInvalid).context("nested behind a piece")?;
    let chained = Descriptor { flags: DESC_INDIRECT | DESC_NEXT, next: 1, ..inner };
    stage.expect_skip(&mut hand, &[(0, chained), (1, whole)], GuestDescriptorInvalid).context("with NEXT")?;
    // A table may come last in a chain (virtio 1.2, 2.7.5.3.1), and its own WRITE flag means nothing (2.7.5.3.2).
    let writable = Descriptor { flags: DESC_INDIRECT | DESC_WRITE, ..inner };
    let next = stage.next_frame(300);
    hand.put(BUFFERS, &plain(), &next);
    stage.expect_ok(&mut hand, &[(0, writable)]).context("with WRITE")?;
    drop(hand);
    stage.finish()
}

#[test]
fn r22_indirect_tables_in_odd_places() -> Result<()> {
    let seam = TABLE + 0x1000;
    let hole = seam + 0x1000;
    let regions = vec![(0, seam), (seam, 0x1000), (hole + 0x1000, MEMORY - hole - 0x1000)];
    let mut stage = Stage::new()?;
    let mut hand = stage.connect(&HandConfig { regions, ..HandConfig::default() })?;
    for before in [1, 8, 15, 16, 17, 31] {
        let next = stage.next_frame(500);
        let whole = hand.put(BUFFERS, &plain(), &next);
        let head = Descriptor { len: 100, flags: DESC_NEXT, next: 1, ..whole };
        let rest = Descriptor { addr: whole.addr + 100, len: whole.len - 100, ..whole };
        let across = table(&hand, seam - before, &[head, rest]);
        stage.expect_ok(&mut hand, &[(0, across)]).with_context(|| format!("{before} before the seam"))?;
    }
    let piece = Descriptor { flags: DESC_NEXT, next: 1, ..readable(BUFFERS, 100) };
    for before in [8, 16, 24] {
        let into = table(&hand, hole - before, &[piece, readable(BUFFERS, 100)]);
        stage.expect_skip(&mut hand, &[(0, into)], GuestUnmappedAddress).context("into a hole")?;
    }
    // Tables that are the ring itself: whatever it says there is taken for descriptors, and the ring goes on.
    let areas = hand.tx().ring.area_offsets();
    for (what, offset) in ["descriptors", "available ring", "used ring"].iter().zip(areas) {
        hand.tx().ring.set_descriptor(0, chained(offset, 16 * 8, DESC_INDIRECT, 0));
        hand.tx().post(0);
        ensure!(hand.tx().expect_used()? == (0, 0), "{what}");
    }
    let counted = stage.plane().counters(stage.port)?;
    let dropped: u64 = counted.drops.iter().map(|(_, n)| n).sum();
    ensure!(counted.rx_frames - stage.book.rx == 3 && dropped - stage.book.dropped() == 3, "{counted:?}");
    stage.book = e2e::inproc::Ledger::from(&counted);
    stage.good(&mut hand)?;
    drop(hand);
    stage.finish()
}

#[test]
fn r23_loops_inside_an_indirect_table_are_skipped() -> Result<()> {
    let mut stage = Stage::new()?;
    let mut hand = stage.connect(&HandConfig::default())?;
    let piece = |next| chained(BUFFERS, 20, DESC_NEXT, next);
    let tables = [
        ("itself", vec![piece(0)]),
        ("cycle of two", vec![piece(1), piece(0)]),
        ("next = entries", vec![piece(1), piece(2)]),
        ("next = 0xffff", vec![piece(0xffff)]),
        ("next in the ring but not in the table", vec![piece(5)]),
        ("writable inside", vec![piece(1), chained(BUFFERS, 20, DESC_WRITE, 0)]),
    ];
    for (what, entries) in tables {
        let reference = table(&hand, TABLE, &entries);
        stage.expect_skip(&mut hand, &[(0, reference)], GuestDescriptorInvalid).context(what)?;
    }
    drop(hand);
    stage.finish()
}

#[test]
fn r24_undefined_flags_are_ignored() -> Result<()> {
    let mut stage = Stage::new()?;
    let mut hand = stage.connect(&HandConfig::default())?;
    for bit in 3..16 {
        let next = stage.next_frame(200);
        let whole = hand.put(BUFFERS, &plain(), &next);
        stage.expect_ok(&mut hand, &[(0, Descriptor { flags: 1 << bit, next: 0xffff, ..whole })])?;
    }
    let next = stage.next_frame(200);
    let whole = hand.put(BUFFERS, &plain(), &next);
    let reference = table(&hand, TABLE, &[Descriptor { flags: 0xfff8, ..whole }]);
    stage.expect_ok(&mut hand, &[(0, Descriptor { flags: DESC_INDIRECT | 0xfff8, ..reference })])?;
    drop(hand);
    stage.finish()
}
