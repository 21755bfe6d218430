//! Rings at the edges of what is allowed, and what a driver may do to cost the device time.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test stops where something fails"
)]

mod model;

use std::time::{Duration, Instant};

use model::{Beside, Model, Rig, noise, regions};
use vring::{
    Burst, ChainFault, DESC_INDIRECT, DESC_NEXT, DESC_WRITE, Descriptor, FRAME_LEN_MAX, Frames, features,
};

const INDIRECT: u64 = 1 << features::INDIRECT_DESC;
const MODERN: u64 = INDIRECT | 1 << features::VERSION_1;
const MERGEABLE: u64 = MODERN | 1 << features::MRG_RXBUF;
/// Rings of up to 1024 lie before.
const TABLE: usize = 0x8000;
const BUFFER: usize = 0x1_0000;

fn model(size: u16, features: u64) -> Model {
    Model::new(noise(0x10_0000, 5), regions(&[(0x10_0000, 0)]), size, features, 0)
}

/// Offers the chains that begin at these descriptors.
fn offer(model: &mut Model, heads: impl IntoIterator<Item = u16>) {
    let mut index = model.avail_idx();
    for head in heads {
        model.offer(index, head);
        index = index.wrapping_add(1);
    }
    model.publish(index);
}

/// What the device makes of the ring's content: faults and frames, all as the model has it.
fn sent(model: Model) -> (Vec<ChainFault>, usize) {
    let mut rig = Rig::new(model);
    let mut ring = rig.start_tx();
    let sent = rig.send(&mut ring, &mut Frames::default()).unwrap();
    (sent.faults, sent.frames.len())
}

fn copies<'m>(room: &'m mut Frames, frame: &'m [u8], count: usize) -> Burst<'m> {
    room.load((0..count).map(|_| frame.split_first_chunk().unwrap()))
}

#[test]
fn rings_of_every_size() {
    for log in 0..=15 {
        let size = 1u16 << log;
        let mut m = Model::new(noise(0x20_0000, 5), regions(&[(0x20_0000, 0)]), size, MODERN, 0xfff0);
        let at = m.guest_addr(0x10_0000);
        for i in 0..size {
            m.put_descriptor(16 * usize::from(i), Descriptor { addr: at + 7, len: 100, flags: 0, next: 0 });
        }
        offer(&mut m, (0..size).rev());
        assert_eq!(sent(m), (vec![], usize::from(size)), "size {size}");
    }
}

#[test]
fn indexes_inside_a_table_stay_in_it() {
    let cases = [
        ("its own entry again", 0, ChainFault::Malformed),
        ("as many as there are", 2, ChainFault::Malformed),
        ("far outside", 0xffff, ChainFault::Malformed),
    ];
    for (what, next, fault) in cases {
        let mut m = model(16, MODERN);
        let (table, addr) = (m.guest_addr(TABLE), m.guest_addr(BUFFER));
        m.put_descriptor(TABLE, Descriptor { addr, len: 50, flags: DESC_NEXT, next });
        // What follows the table would do as an entry.
        for entry in 1..4 {
            m.put_descriptor(TABLE + 16 * entry, Descriptor { addr, len: 50, flags: 0, next: 0 });
        }
        m.put_descriptor(0, Descriptor { addr: table, len: 32, flags: DESC_INDIRECT, next: 0 });
        offer(&mut m, [0]);
        assert_eq!(sent(m), (vec![fault], 0), "{what}");
    }
}

#[test]
fn tables_at_the_end_of_memory() {
    let end = 0x10_0000;
    for (at, faults) in
        [(end - 32, vec![]), (end - 31, vec![ChainFault::Unmapped]), (end, vec![ChainFault::Unmapped])]
    {
        let mut m = model(16, MODERN);
        let base = m.regions[0].guest;
        let addr = m.guest_addr(BUFFER);
        if at + 32 <= end {
            m.put_descriptor(at, Descriptor { addr, len: 50, flags: DESC_NEXT, next: 1 });
            m.put_descriptor(at + 16, Descriptor { addr, len: 50, flags: 0, next: 0 });
        } else if at + 16 <= end {
            m.put_descriptor(at, Descriptor { addr, len: 50, flags: DESC_NEXT, next: 1 });
        }
        m.put_descriptor(0, Descriptor { addr: base + at as u64, len: 32, flags: DESC_INDIRECT, next: 0 });
        offer(&mut m, [0]);
        assert_eq!(sent(m).0, faults, "table at {at:#x}");
    }
    // A table whose second entry would wrap around the address space.
    let mut m = model(16, MODERN);
    m.put_descriptor(0, Descriptor { addr: u64::MAX - 15, len: 32, flags: DESC_INDIRECT, next: 0 });
    offer(&mut m, [0]);
    assert_eq!(sent(m).0, [ChainFault::Unmapped]);
}

#[test]
fn the_longest_frame_in_one_buffer_and_in_two() {
    for (features, header_len) in [(MODERN, 12), (INDIRECT, 10)] {
        for (more, faults) in [(0, vec![]), (1, vec![ChainFault::Long; 2])] {
            let mut m = model(4, features);
            let addr = m.guest_addr(BUFFER);
            let len = FRAME_LEN_MAX + header_len + more;
            m.put_descriptor(0, Descriptor { addr, len, flags: 0, next: 0 });
            m.put_descriptor(16, Descriptor { addr, len: header_len, flags: DESC_NEXT, next: 2 });
            m.put_descriptor(32, Descriptor { addr, len: len - header_len, flags: 0, next: 0 });
            offer(&mut m, [0, 1]);
            assert_eq!(sent(m).0, faults, "header of {header_len}, {more} too long");
        }
    }
}

#[test]
fn buffers_up_to_the_last_byte_of_memory() {
    let end = 0x10_0000u64;
    for (beyond, tx, rx) in [(0, vec![], (1, 0)), (1, vec![ChainFault::Unmapped], (0, 1))] {
        let mut m = model(2, MODERN);
        let base = m.regions[0].guest;
        m.put_descriptor(0, Descriptor { addr: base + end - 100 + beyond, len: 100, flags: 0, next: 0 });
        offer(&mut m, [0]);
        assert_eq!(sent(m).0, tx);

        let mut m = model(2, MODERN);
        m.put_descriptor(
            0,
            Descriptor { addr: base + end - 100 + beyond, len: 100, flags: DESC_WRITE, next: 0 },
        );
        offer(&mut m, [0]);
        let mut rig = Rig::new(m);
        let mut ring = rig.start_rx();
        let frame = noise(100, 1);
        let mut room = Frames::default();
        let done = rig.receive(&mut ring, &copies(&mut room, &frame, 1), std::slice::from_ref(&frame));
        let done = done.unwrap().unwrap();
        assert_eq!((done.frames, done.unmapped), rx);
    }
}

/// Chains, burst after burst in one ring, so that all indices wrap: nothing adds up, nothing is lost.
#[test]
fn many_bursts_of_chains() {
    let (size, rounds) = (64, 5000);
    for writable in [false, true] {
        let image = noise(0x4000, 5);
        let mut m = Model::new(image, regions(&[(0x4000, 0)]), size, MERGEABLE, 0xfff0);
        let addr = m.guest_addr(0x2000);
        let flags = if writable { DESC_WRITE } else { 0 };
        for i in (0..size).step_by(2) {
            let at = addr + 128 * u64::from(i);
            let slot = 16 * usize::from(i);
            m.put_descriptor(slot, Descriptor { addr: at, len: 60, flags: flags | DESC_NEXT, next: i + 1 });
            m.put_descriptor(slot + 16, Descriptor { addr: at + 64, len: 60, flags, next: 0 });
        }
        let mut rig = Rig::new(m);
        let (mut tx, mut rx) = (rig.start_tx(), rig.start_rx());
        let mut room = Frames::default();
        let frame = noise(120, 1);
        for round in 0..rounds {
            offer(&mut rig.model, (0..size).step_by(8));
            rig.load();
            if writable {
                let burst = copies(&mut room, &frame, 8);
                let done = rig.receive(&mut rx, &burst, &vec![frame.clone(); 8]).unwrap().unwrap();
                assert_eq!(done.frames, 8, "round {round}");
            } else {
                assert_eq!(rig.send(&mut tx, &mut room).unwrap().frames.len(), 8, "round {round}");
            }
        }
    }
}

/// One entry over and over: every entry is a chain of its own.
#[test]
fn the_same_head_in_all_entries() {
    let mut m = model(256, MODERN);
    let addr = m.guest_addr(BUFFER);
    m.put_descriptor(0, Descriptor { addr, len: 100, flags: 0, next: 0 });
    offer(&mut m, [0; 256]);
    assert_eq!(sent(m), (vec![], 256));
}

/// A burst of chains of many pieces ends early, and the rest comes with the next one.
#[test]
fn bursts_of_many_pieces() {
    let mut m = model(1024, MODERN);
    let addr = m.guest_addr(BUFFER);
    for i in 0..1024 {
        let flags = if i < 1023 { DESC_NEXT } else { 0 };
        m.put_descriptor(16 * usize::from(i), Descriptor { addr, len: 1, flags, next: i + 1 });
    }
    offer(&mut m, [0; 1024]);
    assert_eq!(sent(m), (vec![], 1024));
}

/// Room for pieces is for one chain of the ring's size and some more. A frame cut into single bytes leaves too little of it
/// for one of which each piece lies across a seam besides: that is no frame.
#[test]
fn chains_of_more_pieces_than_a_burst_has_room_for() {
    let size = 32_768;
    let (table, seam) = (0x10_0000, 0x18_0000);
    let parts = regions(&[(seam, 0), (0x20_0000 - seam, 0)]);
    let mut m = Model::new(noise(0x20_0000, 5), parts, size, MODERN, 0);
    let addr = m.guest_addr(seam) - 1;
    for i in 0..size {
        let flags = if i + 1 < size { DESC_NEXT } else { 0 };
        m.put_descriptor(16 * usize::from(i), Descriptor { addr, len: 1, flags, next: i + 1 });
        m.put_descriptor(table + 16 * usize::from(i), Descriptor { addr, len: 2, flags, next: i + 1 });
    }
    let last = 16 * usize::from(size - 1);
    let (table, len) = (m.guest_addr(table), 16 * u32::from(size));
    m.put_descriptor(last, Descriptor { addr: table, len, flags: DESC_INDIRECT, next: 0 });
    m.put_descriptor(last - 16, Descriptor { addr, len: 1, flags: 0, next: 0 });
    offer(&mut m, [0, size - 1, size - 1]);
    let mut rig = Rig::new(m);
    let mut ring = rig.start_tx();
    let mut frames = Frames::default();
    let burst = ring.dequeue(&mut frames).unwrap().burst;
    assert_eq!((burst.fault(0), burst.frame_len(0)), (None, u32::from(size) - 1 - 12));
    assert_eq!((burst.len(), burst.fault(1)), (2, Some(ChainFault::Long)), "it ends behind the second");
}

/// How long a device is busy with one burst of a driver that makes every chain as long as can be, in empty buffers.
fn time_of_burst(size: u16, writable: bool) -> Duration {
    let mut m = Model::new(noise(0x20_0000, 5), regions(&[(0x20_0000, 0)]), size, MERGEABLE, 0);
    let addr = m.guest_addr(0x10_0000);
    for i in 0..size {
        let flags = if writable { DESC_WRITE } else { 0 } | if i + 1 < size { DESC_NEXT } else { 0 };
        m.put_descriptor(16 * usize::from(i), Descriptor { addr, len: 0, flags, next: i + 1 });
    }
    offer(&mut m, (0..size).map(|_| 0));
    let mut rig = Rig::new(m);
    let mut room = Frames::default();
    if writable {
        let mut ring = rig.start_rx();
        let frame = noise(200, 1);
        let burst = copies(&mut room, &frame, 64);
        let begun = Instant::now();
        let done = ring.enqueue(&burst, u64::MAX).unwrap();
        let took = begun.elapsed();
        assert_eq!((done.frames, done.full + done.malformed), (0, 64));
        assert!(ring.base() > 0, "such buffers are got rid of");
        took
    } else {
        let mut ring = rig.start_tx();
        let begun = Instant::now();
        let burst = ring.dequeue(&mut room).unwrap();
        let took = begun.elapsed();
        assert!(!burst.burst.is_empty());
        assert!((0..burst.burst.len()).all(|i| burst.burst.fault(i) == Some(ChainFault::Short)));
        took
    }
}

/// Without a bound on what a burst walks, the largest ring takes minutes here.
#[test]
fn long_chains_of_empty_buffers_cost_little() {
    for size in [256, 1024, 32_768] {
        for writable in [false, true] {
            // What else the machine does costs time too.
            let took = (0..5).map(|_| time_of_burst(size, writable)).min().unwrap();
            println!("{size} {writable}: {took:?}");
            assert!(took < Duration::from_millis(100), "{size} {writable}: {took:?}");
        }
    }
}
