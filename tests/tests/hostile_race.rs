//! A second thread of the guest changes what the dataplane looks at, while it looks.
//!
//! Whatever comes of it is lawful as long as only this port sees it: frames of it delivered, given up, its ring stopped.
#![allow(clippy::unwrap_used)]

use anyhow::{Context, Result, ensure};
use e2e::flipper::Flipper;
use e2e::hand::{BUFFERS, Hand, HandConfig, chained, descriptor_bytes, readable};
use e2e::inproc::{Ledger, PortPlan, count, until};
use e2e::peer::{MERGEABLE, MODERN, PeerConfig};
use e2e::stage::{HOSTILE, MTU, NEIGHBOUR, NETWORK, Stage, frame, plain};
use vring::driver::GUEST_BASE;
use vring::{DESC_INDIRECT, DESC_NEXT, DESC_WRITE, Descriptor, features};
use wire::craft::{Craft, Tcp, leave_checksum, leave_segments};
use wire::{Mac, VnetHeader};

/// Ring size.
const RING: u16 = 64;
/// Where an indirect table lies.
const TABLE: usize = BUFFERS + 0x10_0000;

/// Offers `head` again and again until enough was flipped under it. A ring that stopped is set up again. Returns how
/// often that was.
fn offer_under(
    flipper: &Flipper,
    stage: &mut Stage,
    hand: &mut Hand,
    head: u16,
    prepare: impl Fn(&mut Hand),
) -> Result<u64> {
    let mut stops = 0;
    prepare(hand);
    let flips = count(10_000_000, 100_000_000);
    while flipper.flips() < flips {
        hand.tx().post_all(&[head; 32]);
        let mut stopped = false;
        until("the ring to go on or to stop", || {
            stopped = hand.tx().bells.err.read().is_ok();
            stopped || hand.tx().ring.used_idx() == hand.tx().avail
        })?;
        if stopped {
            stops += 1;
            hand.restart(1)?;
            prepare(hand);
        }
        while stage.neighbour.receive(0).is_some() {}
    }
    Ok(stops)
}

/// Ends a race: the port's counters add up, and a lawful guest has its place.
fn over(mut stage: Stage, mut hand: Hand) -> Result<()> {
    hand.restart(1)?;
    let have = Ledger::from(&stage.plane().counters(stage.port)?);
    let got = Ledger::from(&stage.plane().counters(stage.neighbour_port)?);
    // One drop is the introduction that nobody heard.
    let lost = have.dropped() - 1 + got.dropped();
    ensure!(have.rx == got.tx + lost, "{have:?} from the guest, {got:?} to its neighbour");
    stage.forget()?;
    stage.good(&mut hand)?;
    drop(hand);
    stage.finish()
}

fn flood_proof() -> Result<Stage> {
    let plan = PortPlan { mtu: MTU, ..PortPlan::new("hostile", NETWORK) };
    Stage::with(plan, PeerConfig { ring_size: 512, features: MERGEABLE, ..PeerConfig::default() })
}

#[test]
fn r30_descriptors_that_change_meanwhile_are_any_lawful_outcome() -> Result<()> {
    let mut stage = flood_proof()?;
    let mut hand = stage.connect(&HandConfig::default())?;
    let table = hand.tx().ring.area_offsets()[0];
    let flipper = Flipper::start(&hand, move |memory, random| {
        let [kind, place, low, high, ..] = random.to_le_bytes();
        let at = table + 16 * usize::from(place % 4);
        let small = u32::from(low) * 8;
        match kind % 4 {
            0 => {
                let addrs = [GUEST_BASE + BUFFERS as u64, 0, u64::MAX - 100, GUEST_BASE + (16 << 20) - 50];
                memory.write(at, &addrs[usize::from(high % 4)].to_le_bytes());
            }
            1 => memory.write(at + 8, &[small, u32::MAX, 0, 70_000][usize::from(high % 4)].to_le_bytes()),
            2 => memory.write(at + 12, &[high & 7, 0]),
            _ => memory.write(at + 14, &[low % 5, 0]),
        }
    });
    hand.put(BUFFERS, &plain(), &frame(NEIGHBOUR, HOSTILE, 2000));
    offer_under(&flipper, &mut stage, &mut hand, 0, |_| {})?;
    drop(flipper);
    over(stage, hand)
}

#[test]
fn r31_header_and_addresses_that_change_meanwhile_are_decided_on_once() -> Result<()> {
    let plan = PortPlan { mtu: MTU, ..PortPlan::new("hostile", NETWORK) };
    let takes = 1 << features::GUEST_CSUM | 1 << features::GUEST_TSO4;
    let sends = 1 << features::CSUM | 1 << features::HOST_TSO4;
    let config = PeerConfig { ring_size: 512, features: MERGEABLE | takes, ..PeerConfig::default() };
    let mut stage = Stage::with(plan, config)?;
    const OTHER: [u8; 6] = [2, 0, 0, 0, 0, 3];
    let other_port = stage.plane().add(PortPlan { mtu: MTU, ..PortPlan::new("other", NETWORK) })?;
    let mut other = stage.plane().guest("other", config)?;
    ensure!(other.send_now(0, &plain(), &frame([0xff; 6], OTHER, 46)));
    stage.neighbour.expect(0)?;
    let mut hand = stage.connect(&HandConfig { features: MODERN | sends, ..HandConfig::default() })?;
    stage.refuses(dataplane::DropReason::GuestRxRingDisabled, 1);

    let craft = Craft::v4(Mac::new(HOSTILE), Mac::new(NEIGHBOUR), [10, 0, 0, 1].into(), [10, 0, 0, 2].into());
    let mut tcp = craft.tcp(&Tcp::default(), &[7; 1200]);
    let gso = leave_segments(&mut tcp, 500).unwrap();
    let partial = leave_checksum(&mut craft.tcp(&Tcp::default(), &[7; 1200])).unwrap();
    let headers = [VnetHeader::PLAIN, partial, gso];
    let whole = hand.put(BUFFERS, &plain(), &tcp);
    let flipper = Flipper::start(&hand, move |memory, random| {
        let [kind, low, high, ..] = random.to_le_bytes();
        match kind % 8 {
            0 => memory.write(BUFFERS + 12, &NEIGHBOUR),
            1 => memory.write(BUFFERS + 12, &OTHER),
            2 => memory.write(BUFFERS + usize::from(low % 12), &[high]),
            n => memory.write(BUFFERS, &headers[usize::from(n) % 3].to_bytes()),
        }
    });
    let mut seen = [0u64; 2];
    let flips = count(10_000_000, 100_000_000);
    while flipper.flips() < flips || seen.contains(&0) {
        hand.tx().ring.set_descriptor(0, whole);
        hand.tx().post_all(&[0; 32]);
        hand.tx().expect_used()?;
        for (n, (peer, address)) in
            [(&mut stage.neighbour, NEIGHBOUR), (&mut other, OTHER)].into_iter().enumerate()
        {
            while let Some((header, got)) = peer.receive(0) {
                // A torn address belongs to nobody and is flooded; a whole one is found at its owner only.
                let to: [u8; 6] = *got.first_chunk().unwrap();
                ensure!(
                    to == address || ![NEIGHBOUR, OTHER].contains(&to),
                    "a frame for {to:02x?} at {address:02x?}"
                );
                // What is said of the frame is true of this frame, whatever the guest says now.
                let prefix = &got[..got.len().min(116)];
                let checked = header.check(got.len(), prefix, wire::Offloads::ALL);
                ensure!(checked == Ok(VnetHeader { num_buffers: 1, ..header }), "{header:?}: {checked:?}");
                seen[n] += u64::from(to == address);
            }
        }
    }
    drop((flipper, other));
    stage.plane().expect_alone(other_port)?;
    stage.plane().dataplane().remove_port(other_port);
    stage.forget()?;
    drop(hand);
    stage.plane().expect_alone(stage.port)?;
    let mut hand = stage.connect(&HandConfig::default())?;
    stage.good(&mut hand)?;
    drop(hand);
    stage.finish()
}

#[test]
fn r32_available_index_that_wavers_stops_the_ring_at_worst() -> Result<()> {
    let mut stage = flood_proof()?;
    let mut hand = stage.connect(&HandConfig::default())?;
    let index = hand.tx().ring.area_offsets()[1] + 2;
    let flipper = Flipper::start(&hand, move |memory, random| {
        let mut bytes = [0; 2];
        memory.read(index, &mut bytes);
        let [step, ..] = random.to_le_bytes();
        let wavered = u16::from_le_bytes(bytes)
            .wrapping_add(u16::from(step & 1))
            .wrapping_sub(u16::from(step >> 1 & 1));
        memory.write(index, &wavered.to_le_bytes());
    });
    let whole = hand.put(BUFFERS, &plain(), &frame(NEIGHBOUR, HOSTILE, 100));
    let flips = count(10_000_000, 100_000_000);
    let mut stops = 0u64;
    while flipper.flips() < flips {
        for entry in 0..RING {
            hand.tx().ring.set_descriptor(entry, whole);
            hand.tx().ring.set_avail(entry, entry);
        }
        hand.tx().kick();
        while stage.neighbour.receive(0).is_some() {}
        if hand.tx().bells.err.read().is_ok() {
            stops += 1;
            hand.restart(1)?;
        }
    }
    drop(flipper);
    println!("stopped {stops} times");
    over(stage, hand)
}

#[test]
fn r33_indirect_table_that_changes_meanwhile_is_any_lawful_outcome() -> Result<()> {
    let mut stage = flood_proof()?;
    let mut hand = stage.connect(&HandConfig::default())?;
    hand.put(BUFFERS, &plain(), &frame(NEIGHBOUR, HOSTILE, 1000));
    let entries: [Descriptor; 6] = [
        chained(BUFFERS, 40, DESC_NEXT, 1),
        readable(BUFFERS + 40, 900),
        chained(BUFFERS, 100, DESC_NEXT, 0),
        chained(BUFFERS, 100, DESC_NEXT | DESC_WRITE, 1),
        chained(TABLE, 64, DESC_INDIRECT, 0),
        Descriptor { addr: 0, len: 60_000, flags: DESC_NEXT, next: 2 },
    ];
    let flipper = Flipper::start(&hand, move |memory, random| {
        let [place, kind, ..] = random.to_le_bytes();
        let entry = entries[usize::from(kind) % entries.len()];
        memory.write(TABLE + 16 * usize::from(place % 4), &descriptor_bytes(entry));
    });
    let prepare = |hand: &mut Hand| hand.tx().ring.set_descriptor(0, chained(TABLE, 64, DESC_INDIRECT, 0));
    let stops = offer_under(&flipper, &mut stage, &mut hand, 0, prepare)?;
    drop(flipper);
    ensure!(stops == 0, "a table is no reason to stop a ring: {stops}");
    over(stage, hand).context("afterwards")
}
