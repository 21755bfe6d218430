//! Our driver's side of rings against our device's side, and against a device that lies: its words are written by hand.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test stops where something fails"
)]

use std::sync::Arc;

use rustix::event::{EventfdFlags, eventfd};
use vring::driver::{Area, Buffer, DriverMemory, DriverRing, DriverRx, DriverTx};
use vring::{BURST_MAX, ChainFault, FRAME_LEN_MAX, Frames, GuestMemory, HEADER_LEN, RingFault};
use vring::{RingSetup, RxRing, TxRing, features};

const SPLIT: u64 = 1 << features::VERSION_1 | 1 << features::MRG_RXBUF;
const PACKED: u64 = SPLIT | 1 << features::RING_PACKED;
const SIZE: u16 = 64;
const BUFFER_LEN: u32 = 2048;

fn area(at: usize) -> Area {
    Area { at, size: SIZE, buffer_len: BUFFER_LEN }
}

fn memory() -> Arc<DriverMemory> {
    DriverMemory::huge(area(0).bytes()).unwrap()
}

/// The device's mapping of it, and what its session would say of a ring.
fn device(ring: &DriverRing, features: u64) -> (RingSetup, Arc<GuestMemory>) {
    let memory = ring.memory();
    let mapped = GuestMemory::map(&[(memory.region(), memory.fd().try_clone_to_owned().unwrap())]).unwrap();
    let [desc_user_addr, avail_user_addr, used_user_addr] = ring.user_addrs();
    let base = u32::from(ring.start()) * 0x1_0001;
    let setup = RingSetup {
        size: ring.size(),
        desc_user_addr,
        avail_user_addr,
        used_user_addr,
        base,
        features,
        kick: None,
        call: Some(eventfd(0, EventfdFlags::NONBLOCK).unwrap()),
        err: None,
        enabled: true,
    };
    (setup, Arc::new(mapped))
}

fn rx_pair(features: u64) -> (DriverRx, RxRing) {
    let rx = DriverRx::new(&memory(), area(0), features);
    let (setup, mapped) = device(rx.ring(), features);
    let ring = RxRing::start(setup, &mapped).unwrap();
    (rx, ring)
}

fn tx_pair(features: u64) -> (DriverTx, TxRing) {
    let tx = DriverTx::new(&memory(), area(0), features);
    let (setup, mapped) = device(tx.ring(), features);
    let ring = TxRing::start(setup, &mapped).unwrap();
    (tx, ring)
}

fn frame(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|i| ((i + seed).wrapping_mul(131) >> 3) as u8).collect()
}

/// Lengths around everything that matters, a burst at a time.
fn lengths() -> Vec<usize> {
    let (head, buffer) = (vring::HEAD_LEN - HEADER_LEN, BUFFER_LEN as usize - HEADER_LEN);
    let mut lengths = vec![14, 60, head - 1, head, head + 1, buffer - 1, buffer, buffer + 1];
    lengths.extend([1514, 2 * BUFFER_LEN as usize - HEADER_LEN, 9014, FRAME_LEN_MAX as usize]);
    lengths
}

#[test]
fn what_the_device_puts_into_an_rx_ring_comes_out_whole() {
    for features in [SPLIT, PACKED] {
        let (mut rx, mut ring) = rx_pair(features);
        let (mut ours, mut theirs) = (Frames::default(), Frames::default());
        // Many times around the ring.
        for round in 0..20 {
            for len in lengths() {
                let sent = frame(len, round);
                let burst = theirs.load([(&[7; HEADER_LEN], &sent[..])]);
                assert_eq!(ring.enqueue(&burst, 1).unwrap().frames, 1);
                let got = rx.dequeue(&mut ours).unwrap();
                assert_eq!((got.burst.len(), got.burst.valid()), (1, 1), "{len}");
                let mut bytes = Vec::new();
                got.burst.gather(0, &mut bytes);
                assert_eq!(bytes, sent);
                assert_eq!(got.burst.header(0)[..10], [7; 10]);
                got.complete();
            }
        }
        assert!(rx.dequeue(&mut ours).unwrap().burst.is_empty());
    }
}

#[test]
fn what_goes_into_a_tx_ring_reaches_the_device_whole() {
    for features in [SPLIT, PACKED] {
        let (mut tx, mut ring) = tx_pair(features);
        let (mut ours, mut theirs) = (Frames::default(), Frames::default());
        for round in 0..20 {
            for len in lengths() {
                let sent = frame(len, round);
                let burst = ours.load([(&[7; HEADER_LEN], &sent[..])]);
                let done = tx.enqueue(&burst, 1).unwrap();
                assert_eq!((done.frames, done.bytes, done.full), (1, len as u64, 0));
                let got = ring.dequeue(&mut theirs).unwrap();
                let mut bytes = Vec::new();
                got.burst.gather(0, &mut bytes);
                assert_eq!(bytes, sent);
                assert_eq!(got.burst.header(0)[..10], [7; 10]);
                got.complete();
            }
        }
    }
}

#[test]
fn a_device_that_takes_nothing_fills_the_tx_ring_and_no_more() {
    for features in [SPLIT, PACKED] {
        let (mut tx, mut ring) = tx_pair(features);
        let (mut ours, mut theirs) = (Frames::default(), Frames::default());
        let sent = frame(3000, 0);
        let load = [0; HEADER_LEN];
        let burst = ours.load((0..BURST_MAX).map(|_| (&load, &sent[..])));
        let done = tx.enqueue(&burst, u64::MAX).unwrap();
        // Two buffers a frame.
        assert_eq!((done.frames, done.full), (u32::from(SIZE) / 2, u32::from(SIZE) / 2));
        assert_eq!(tx.enqueue(&burst, 1).unwrap().full, 1);
        ring.dequeue(&mut theirs).unwrap().complete();
        assert_eq!(tx.enqueue(&burst, 1).unwrap().frames, 1);
    }
}

#[test]
fn calls_and_kicks_are_asked_for() {
    let features = SPLIT | 1 << features::EVENT_IDX;
    let (mut rx, mut ring) = rx_pair(features);
    let mut frames = Frames::default();
    let sent = frame(60, 0);
    let burst = frames.load([(&[0; HEADER_LEN], &sent[..])]);
    assert!(rx.arm());
    assert!(ring.enqueue(&burst, 1).unwrap().call);
    assert!(!rx.arm(), "there is a frame");
    rx.disarm();
}

/// A split ring in which the device's words are written by hand: used element `index`, then the used index.
fn use_by_hand(ring: &DriverRing, index: u16, id: u32, len: u32, used_idx: u16) {
    let used = ring.area_offsets()[2];
    let element = used + 4 + 8 * usize::from(index % ring.size());
    ring.memory().write(element, &id.to_le_bytes());
    ring.memory().write(element + 4, &len.to_le_bytes());
    ring.memory().write(used + 2, &used_idx.to_le_bytes());
}

fn fault_by_hand(id: u32, len: u32, used_idx: u16) -> Option<RingFault> {
    let mut rx = DriverRx::new(&memory(), area(0), SPLIT);
    use_by_hand(rx.ring(), 0, id, len, used_idx);
    rx.dequeue(&mut Frames::default()).err()
}

#[test]
fn a_device_that_lies_breaks_the_ring() {
    assert_eq!(fault_by_hand(0, 100, 1), None);
    let jump = |to| Some(RingFault::UsedIndex { from: 0, to, out: SIZE });
    assert_eq!(fault_by_hand(0, 100, SIZE + 1), jump(SIZE + 1));
    assert_eq!(fault_by_hand(0, 100, u16::MAX), jump(u16::MAX));
    for id in [u32::from(SIZE), 0x1_0000, u32::MAX] {
        assert_eq!(fault_by_hand(id, 100, 1), Some(RingFault::UsedId { id }));
    }
    for len in [BUFFER_LEN + 1, u32::MAX] {
        assert_eq!(fault_by_hand(0, len, 1), Some(RingFault::UsedLength { len, room: BUFFER_LEN }));
    }
}

#[test]
fn a_buffer_returned_twice_breaks_the_ring() {
    let mut rx = DriverRx::new(&memory(), area(0), SPLIT);
    use_by_hand(rx.ring(), 0, 5, 100, 0);
    use_by_hand(rx.ring(), 1, 5, 100, 2);
    assert_eq!(rx.dequeue(&mut Frames::default()).err(), Some(RingFault::UsedId { id: 5 }));
    let mut tx = DriverTx::new(&memory(), area(0), SPLIT);
    use_by_hand(tx.ring(), 0, 0, 0, 1);
    let mut frames = Frames::default();
    let burst = frames.load([]);
    assert_eq!(tx.enqueue(&burst, 0).err(), Some(RingFault::UsedIndex { from: 0, to: 1, out: 0 }));
}

#[test]
fn a_packed_device_that_lies_breaks_the_ring() {
    // Used flags of the first lap (virtio 1.2, 2.8.1).
    let used = |id: u16, len: u32| u64::from(len) | u64::from(id) << 32 | 0x8080 << 48;
    let fault = |id, len| {
        let mut rx = DriverRx::new(&memory(), area(0), PACKED);
        let descriptors = rx.ring().area_offsets()[0];
        rx.ring().memory().write(descriptors + 8, &used(id, len).to_le_bytes());
        rx.dequeue(&mut Frames::default()).err()
    };
    assert_eq!(fault(0, 100), None);
    assert_eq!(fault(63, 100), None);
    assert_eq!(fault(64, 100), Some(RingFault::UsedId { id: 64 }));
    assert_eq!(fault(0, 2049), Some(RingFault::UsedLength { len: 2049, room: BUFFER_LEN }));
    let mut tx = DriverTx::new(&memory(), area(0), PACKED);
    let descriptors = tx.ring().area_offsets()[0];
    tx.ring().memory().write(descriptors + 8, &used(3, 0).to_le_bytes());
    let mut frames = Frames::default();
    let burst = frames.load([]);
    assert_eq!(tx.enqueue(&burst, 0).err(), Some(RingFault::UsedId { id: 3 }));
}

#[test]
fn an_in_order_device_that_lies_breaks_the_ring() {
    let in_order = 1 << features::IN_ORDER;
    for features in [SPLIT | in_order, PACKED | in_order] {
        let mut ring = DriverRing::new(&memory(), 0, 8, features);
        let buffer = |_, number: u16| Buffer { offset: 4096 * usize::from(number), len: 64, writable: true };
        for _ in 0..3 {
            ring.offer_numbered(1, buffer).unwrap();
        }
        ring.publish();
        if features & (1 << features::RING_PACKED) == 0 {
            use_by_hand(&ring, 0, 1, 64, 2);
            // One element for both, and then the index goes back behind them.
            assert_eq!(ring.try_take_used(), Ok(Some((0, 64))));
            use_by_hand(&ring, 0, 1, 64, 1);
            assert_eq!(ring.try_take_used(), Ok(Some((1, 64))));
            assert_eq!(ring.try_take_used(), Err(RingFault::UsedIndex { from: 2, to: 1, out: 1 }));
        } else {
            let word = 64u64 | 1 << 32 | 0x8080 << 48;
            ring.memory().write(ring.area_offsets()[0] + 8, &word.to_le_bytes());
            assert_eq!(ring.try_take_used(), Ok(Some((0, 64))));
            assert_eq!(ring.try_take_used(), Ok(Some((1, 64))));
            ring.memory().write(ring.area_offsets()[0] + 16 * 2 + 8, &word.to_le_bytes());
            assert_eq!(ring.try_take_used(), Err(RingFault::UsedId { id: 1 }));
        }
    }
}

/// Header with `num_buffers` in buffer 0, and so many buffers of `len` bytes used.
fn merged(num_buffers: u16, used: u16, len: u32) -> (usize, Option<ChainFault>) {
    let mut rx = DriverRx::new(&memory(), area(0), SPLIT);
    let first = area(0).bytes() - usize::from(SIZE) * (BUFFER_LEN as usize + 256);
    rx.ring().memory().write(first + 10, &num_buffers.to_le_bytes());
    for i in 0..used {
        use_by_hand(rx.ring(), i, i.into(), len, used);
    }
    let mut frames = Frames::default();
    let got = rx.dequeue(&mut frames).unwrap();
    let outcome = (got.burst.len(), got.burst.fault(0));
    got.complete();
    outcome
}

#[test]
fn a_frame_that_is_none_is_given_up_alone() {
    assert_eq!(merged(1, 1, 25), (1, Some(ChainFault::Short)));
    assert_eq!(merged(1, 1, 0), (1, Some(ChainFault::Short)));
    assert_eq!(merged(0, 1, 26), (1, None), "some devices leave it at 0");
    assert_eq!(merged(2, 2, 2048), (1, None));
    assert_eq!(merged(3, 2, 2048), (1, Some(ChainFault::Torn)), "a part is missing");
    assert_eq!(merged(u16::MAX, 5, 2048), (1, Some(ChainFault::Torn)));
    assert_eq!(merged(40, 40, 2048), (1, Some(ChainFault::Long)));
    assert_eq!(merged(2, 2, 12), (1, Some(ChainFault::Short)));
}
