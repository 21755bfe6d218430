//! Frames through real rings in shared memory: our driver side on one end, our device side on the other, each with its
//! own mapping of the same files.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test stops where something fails"
)]

use std::sync::Arc;

use vring::driver::{Buffer, DriverMemory, DriverRing, GUEST_BASE};
use vring::{
    ChainFault, DESC_NEXT, DESC_WRITE, Descriptor, Frames, GuestMemory, RingFault, RingSetup, RxRing, TxRing,
    features,
};

const MODERN: u64 = 1 << features::VERSION_1 | 1 << features::INDIRECT_DESC;
const MERGEABLE: u64 = MODERN | 1 << features::MRG_RXBUF;

/// Buffers begin here; rings before.
const BUFFERS: usize = 0x8_0000;

struct Guest {
    memory: Arc<DriverMemory>,
    mapped: Arc<GuestMemory>,
    tx: DriverRing,
    rx: DriverRing,
}

impl Guest {
    fn new(size: u16) -> Self {
        Self::with_regions(size, &[8 << 20])
    }

    /// Memory cut into regions of the given sizes: contiguous for the guest, separate mappings for the device.
    fn with_regions(size: u16, sizes: &[usize]) -> Self {
        let memory = DriverMemory::new(sizes.iter().sum()).unwrap();
        let mut at = 0;
        let regions: Vec<_> = sizes
            .iter()
            .map(|len| {
                let region = memory.region_of(at, *len);
                at += len;
                (region, memory.fd().try_clone_to_owned().unwrap())
            })
            .collect();
        let mapped = Arc::new(GuestMemory::map(&regions).unwrap());
        let tx = DriverRing::new(&memory, 0, size, 0);
        let rx = DriverRing::new(&memory, 0x4_0000, size, 0);
        Self { memory, mapped, tx, rx }
    }

    fn setup(ring: &DriverRing, features: u64) -> RingSetup {
        let [desc_user_addr, avail_user_addr, used_user_addr] = ring.user_addrs();
        RingSetup {
            size: ring.size(),
            desc_user_addr,
            avail_user_addr,
            used_user_addr,
            base: 0,
            features,
            kick: None,
            call: None,
            err: None,
            enabled: true,
        }
    }

    fn start_tx(&self, features: u64) -> TxRing {
        TxRing::start(Self::setup(&self.tx, features), &self.mapped).unwrap()
    }

    fn start_rx(&self, features: u64) -> RxRing {
        RxRing::start(Self::setup(&self.rx, features), &self.mapped).unwrap()
    }

    /// Sends header + frame cut into pieces of the given lengths (the last takes the rest).
    fn send(&mut self, at: usize, bytes: &[u8], cuts: &[usize]) {
        self.memory.write(at, bytes);
        let buffers = cut(at, bytes.len(), cuts, false);
        self.tx.offer(&buffers).unwrap();
        self.tx.publish();
    }

    fn received(&self, at: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read(at, &mut bytes);
        bytes
    }
}

fn cut(at: usize, len: usize, cuts: &[usize], writable: bool) -> Vec<Buffer> {
    let mut buffers = Vec::new();
    let mut done = 0;
    for cut in cuts.iter().copied().chain([usize::MAX]) {
        let part = cut.min(len - done);
        if part != 0 || cut == 0 {
            buffers.push(Buffer { offset: at + done, len: part.try_into().unwrap(), writable });
        }
        done += part;
    }
    buffers
}

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed)).collect()
}

/// A 12-byte header of zeros, and a frame.
fn with_header(frame: &[u8]) -> Vec<u8> {
    [&[0u8; 12][..], frame].concat()
}

/// Moves one burst from `a` to `b`; returns what the device said.
fn forward(tx: &mut TxRing, rx: &mut RxRing) -> vring::Enqueued {
    let mut frames = Frames::default();
    let burst = tx.dequeue(&mut frames).unwrap();
    let result = rx.enqueue(&burst.burst, u64::MAX).unwrap();
    burst.complete();
    result
}

#[test]
fn every_length_arrives_whole_however_it_is_cut() {
    let lengths = (14..300).chain([1514, 1518, 9014, 9216, 65_549]);
    for (i, len) in lengths.enumerate() {
        for cuts in [&[][..], &[12], &[1; 40], &[12, 14, 20], &[5, 0, 7, 3], &[130, 1]] {
            let (mut a, mut b) = (Guest::new(64), Guest::new(64));
            let (mut tx, mut rx) = (a.start_tx(MODERN), b.start_rx(MODERN));
            let frame = pattern(len, i as u8);
            a.send(BUFFERS, &with_header(&frame), cuts);
            b.memory.write(BUFFERS, &vec![0xee; len + 100]);
            b.rx.offer(&cut(BUFFERS, len + 50, &[], true)).unwrap();
            b.rx.publish();
            let result = forward(&mut tx, &mut rx);
            assert_eq!((result.frames, result.bytes), (1, len as u64), "{len} cut {cuts:?}");
            assert_eq!(b.rx.take_used().unwrap().1 as usize, len + 12);
            let got = b.received(BUFFERS, len + 100);
            assert_eq!(got[..12], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0], "header with num_buffers 1");
            assert!(got[12..12 + len] == frame, "content of {len} cut {cuts:?}");
            assert!(got[12 + len..].iter().all(|b| *b == 0xee), "nothing behind used.len is touched");
            assert_eq!(a.tx.take_used(), Some((0, 0)));
        }
    }
}

#[test]
fn legacy_header_of_ten_bytes() {
    let (mut a, mut b) = (Guest::new(8), Guest::new(8));
    let (mut tx, mut rx) = (a.start_tx(0), b.start_rx(MODERN));
    let frame = pattern(200, 3);
    a.send(BUFFERS, &[&[0u8; 10][..], &frame].concat(), &[10]);
    b.rx.offer(&cut(BUFFERS, 2000, &[], true)).unwrap();
    b.rx.publish();
    assert_eq!(forward(&mut tx, &mut rx).frames, 1);
    assert_eq!(b.received(BUFFERS + 12, 200), frame);
    // And back: 12 bytes in, 10 out.
    let (mut tx, mut rx) = (b.start_tx(MODERN), a.start_rx(0));
    b.send(BUFFERS + 4096, &with_header(&frame), &[]);
    a.rx.offer(
        &cut(BUFFERS + 4096, 10, &[], true)
            .into_iter()
            .chain(cut(BUFFERS + 8192, 300, &[], true))
            .collect::<Vec<_>>(),
    )
    .unwrap();
    a.rx.publish();
    assert_eq!(forward(&mut tx, &mut rx).frames, 1);
    assert_eq!(a.rx.take_used().unwrap().1, 210);
    assert_eq!(a.received(BUFFERS + 8192, 200), frame);
}

#[test]
fn merges_buffers_and_counts_them() {
    let (mut a, mut b) = (Guest::new(256), Guest::new(256));
    let (mut tx, mut rx) = (a.start_tx(MODERN), b.start_rx(MERGEABLE));
    let frame = pattern(9014, 9);
    a.send(BUFFERS, &with_header(&frame), &[]);
    for i in 0..12 {
        b.rx.offer(&cut(BUFFERS + 1000 * i, 1000, &[], true)).unwrap();
    }
    b.rx.publish();
    assert_eq!(forward(&mut tx, &mut rx).frames, 1);
    let used: Vec<u32> = std::iter::from_fn(|| b.rx.take_used()).map(|(_, len)| len).collect();
    assert_eq!(used, [1000, 1000, 1000, 1000, 1000, 1000, 1000, 1000, 1000, 26]);
    assert_eq!(b.received(BUFFERS + 10, 2), [10, 0], "num_buffers");
    assert_eq!(b.received(BUFFERS + 12, 9014), frame);
}

#[test]
fn a_frame_that_needs_more_buffers_than_there_are_uses_none() {
    let (mut a, mut b) = (Guest::new(16), Guest::new(16));
    let (mut tx, mut rx) = (a.start_tx(MODERN), b.start_rx(MERGEABLE));
    a.send(BUFFERS, &with_header(&pattern(1000, 0)), &[]);
    a.send(BUFFERS + 4096, &with_header(&pattern(80, 1)), &[]);
    b.rx.offer(&cut(BUFFERS, 500, &[], true)).unwrap();
    b.rx.publish();
    let result = forward(&mut tx, &mut rx);
    assert_eq!((result.full, result.frames), (1, 1), "the long one does not fit, the short one does");
    assert_eq!(b.received(BUFFERS + 12, 80), pattern(80, 1));
    assert_eq!(b.rx.take_used(), Some((0, 92)));
    assert_eq!(b.rx.take_used(), None);
}

#[test]
fn a_buffer_too_small_is_returned_empty_and_the_next_frame_arrives() {
    let (mut a, mut b) = (Guest::new(16), Guest::new(16));
    let (mut tx, mut rx) = (a.start_tx(MODERN), b.start_rx(MODERN));
    a.send(BUFFERS, &with_header(&pattern(1000, 0)), &[]);
    a.send(BUFFERS + 4096, &with_header(&pattern(80, 1)), &[]);
    b.rx.offer(&cut(BUFFERS, 500, &[], true)).unwrap();
    b.rx.offer(&cut(BUFFERS + 1024, 500, &[], true)).unwrap();
    b.rx.publish();
    let result = forward(&mut tx, &mut rx);
    assert_eq!((result.too_small, result.frames), (1, 1));
    assert_eq!(b.rx.take_used(), Some((0, 0)));
    assert_eq!(b.rx.take_used(), Some((1, 92)));
    assert_eq!(b.received(BUFFERS + 1024 + 12, 80), pattern(80, 1));
}

#[test]
fn a_buffer_across_two_regions() {
    // The seam is at BUFFERS + 0x1000.
    let mut a = Guest::with_regions(16, &[BUFFERS + 0x1000, 0x10_0000]);
    let mut b = Guest::with_regions(16, &[BUFFERS + 0x1000, 0x10_0000]);
    let (mut tx, mut rx) = (a.start_tx(MODERN), b.start_rx(MODERN));
    let frame = pattern(3000, 5);
    for offset in [1, 5, 12, 20, 140, 2000] {
        a.send(BUFFERS + 0x1000 - offset, &with_header(&frame), &[]);
        b.rx.offer(&cut(BUFFERS + 0x1000 - offset, 4000, &[], true)).unwrap();
        b.rx.publish();
        assert_eq!(forward(&mut tx, &mut rx).frames, 1);
        assert_eq!(b.received(BUFFERS + 0x1000 - offset + 12, 3000), frame);
    }
}

#[test]
fn indirect_tables_wherever_they_lie() {
    let mut a = Guest::with_regions(16, &[BUFFERS + 0x1000, 0x10_0000]);
    let mut b = Guest::new(16);
    let (mut tx, mut rx) = (a.start_tx(MODERN), b.start_rx(MODERN));
    let frame = pattern(600, 5);
    for table in [BUFFERS, BUFFERS + 0x1000 - 16, BUFFERS + 0x1000 - 24] {
        a.memory.write(BUFFERS + 0x4000, &with_header(&frame));
        a.tx.offer_indirect(table, &cut(BUFFERS + 0x4000, 612, &[12, 100, 200], false)).unwrap();
        a.tx.publish();
        b.rx.offer_indirect(BUFFERS, &cut(BUFFERS + 0x8000, 2000, &[12, 77], true)).unwrap();
        b.rx.publish();
        assert_eq!(forward(&mut tx, &mut rx).frames, 1);
        assert_eq!(b.received(BUFFERS + 0x8000 + 12, 600), frame);
    }
    // Without the feature the same is malformed.
    let mut tx = a.start_tx(1 << features::VERSION_1);
    a.tx.offer_indirect(BUFFERS, &cut(BUFFERS + 0x4000, 612, &[12], false)).unwrap();
    a.tx.publish();
    assert_eq!(faults(&mut tx).last(), Some(&Some(ChainFault::Malformed)));
}

/// Dequeues everything and returns what is wrong with each chain.
fn faults(tx: &mut TxRing) -> Vec<Option<ChainFault>> {
    let mut frames = Frames::default();
    let burst = tx.dequeue(&mut frames).unwrap();
    let faults = (0..burst.burst.len()).map(|i| burst.burst.fault(i)).collect();
    burst.complete();
    faults
}

/// A chain of the given descriptors in entry 0, taken by the device.
fn fault_of(descriptors: &[(u16, Descriptor)]) -> Option<ChainFault> {
    let a = Guest::new(16);
    let mut tx = a.start_tx(MODERN);
    for (i, descriptor) in descriptors {
        a.tx.set_descriptor(*i, *descriptor);
    }
    a.tx.set_avail(0, 0);
    a.tx.publish_avail(1);
    faults(&mut tx)[0]
}

fn descriptor(offset: u64, len: u32, flags: u16, next: u16) -> Descriptor {
    Descriptor { addr: GUEST_BASE + offset, len, flags, next }
}

#[test]
fn malformed_chains_are_returned_one_by_one() {
    let at = BUFFERS as u64;
    let indirect = vring::DESC_INDIRECT;
    #[allow(clippy::type_complexity)]
    let cases: &[(&str, &[(u16, Descriptor)], ChainFault)] = &[
        ("next is itself", &[(0, descriptor(at, 100, DESC_NEXT, 0))], ChainFault::Malformed),
        (
            "cycle of two",
            &[(0, descriptor(at, 100, DESC_NEXT, 1)), (1, descriptor(at, 100, DESC_NEXT, 0))],
            ChainFault::Malformed,
        ),
        ("next = size", &[(0, descriptor(at, 100, DESC_NEXT, 16))], ChainFault::Malformed),
        ("next = 0xffff", &[(0, descriptor(at, 100, DESC_NEXT, 0xffff))], ChainFault::Malformed),
        ("writable on TX", &[(0, descriptor(at, 100, DESC_WRITE, 0))], ChainFault::Malformed),
        (
            "mixed",
            &[(0, descriptor(at, 100, DESC_NEXT, 1)), (1, descriptor(at, 100, DESC_WRITE, 0))],
            ChainFault::Malformed,
        ),
        ("address 0", &[(0, Descriptor { addr: 0, len: 100, flags: 0, next: 0 })], ChainFault::Unmapped),
        ("behind the end", &[(0, descriptor(8 << 20, 100, 0, 0))], ChainFault::Unmapped),
        ("end behind the end", &[(0, descriptor((8 << 20) - 50, 100, 0, 0))], ChainFault::Unmapped),
        (
            "wraps",
            &[(0, Descriptor { addr: u64::MAX - 20, len: 100, flags: 0, next: 0 })],
            ChainFault::Unmapped,
        ),
        (
            "empty and unmapped",
            &[(0, descriptor(at, 100, DESC_NEXT, 1)), (1, Descriptor::default())],
            ChainFault::Unmapped,
        ),
        ("shorter than a header", &[(0, descriptor(at, 11, 0, 0))], ChainFault::Short),
        ("header alone", &[(0, descriptor(at, 12, 0, 0))], ChainFault::Short),
        ("13 bytes of frame", &[(0, descriptor(at, 25, 0, 0))], ChainFault::Short),
        ("too long", &[(0, descriptor(at, 65_570, 0, 0))], ChainFault::Long),
        ("4 GiB", &[(0, descriptor(at, u32::MAX, 0, 0))], ChainFault::Long),
        (
            "sum too long",
            &[(0, descriptor(at, 40_000, DESC_NEXT, 1)), (1, descriptor(at, 40_000, 0, 0))],
            ChainFault::Long,
        ),
        ("table empty", &[(0, descriptor(at, 0, indirect, 0))], ChainFault::Malformed),
        ("table of 8 bytes", &[(0, descriptor(at, 8, indirect, 0))], ChainFault::Malformed),
        ("table of 17 bytes", &[(0, descriptor(at, 17, indirect, 0))], ChainFault::Malformed),
        ("table longer than the ring", &[(0, descriptor(at, 16 * 17, indirect, 0))], ChainFault::Malformed),
        ("huge table", &[(0, descriptor(at, 0xffff_fff0, indirect, 0))], ChainFault::Malformed),
        ("INDIRECT and NEXT", &[(0, descriptor(at, 16, indirect | DESC_NEXT, 1))], ChainFault::Malformed),
        ("table unmapped", &[(0, descriptor(8 << 20, 16, indirect, 0))], ChainFault::Unmapped),
    ];
    for (what, descriptors, fault) in cases {
        assert_eq!(fault_of(descriptors), Some(*fault), "{what}");
    }
    assert_eq!(fault_of(&[(0, descriptor(at, 100, 0xfff8, 0))]), None, "undefined flags are ignored");
    assert_eq!(fault_of(&[(0, descriptor(at, 26, 0, 0))]), None, "a bare Ethernet header is a frame");
    let empty_piece = [(0, descriptor(at, 100, DESC_NEXT, 1)), (1, descriptor(at, 0, 0, 0))];
    assert_eq!(fault_of(&empty_piece), None, "an empty piece is ignored");
}

#[test]
fn a_chain_of_all_descriptors_is_legal_and_one_more_is_not() {
    let mut a = Guest::new(16);
    let mut tx = a.start_tx(MODERN);
    a.send(BUFFERS, &with_header(&pattern(100, 0)), &[4; 15]);
    assert_eq!(faults(&mut tx), [None]);
    let mut b = Guest::new(16);
    let mut tx = b.start_tx(MODERN);
    let buffers = cut(BUFFERS, 112, &[4; 15], false);
    assert_eq!(buffers.len(), 16);
    b.tx.offer_indirect(BUFFERS + 4096, &buffers).unwrap();
    b.tx.publish();
    assert_eq!(faults(&mut tx), [None]);
}

#[test]
fn broken_rings_stop() {
    let a = Guest::new(16);
    let mut frames = Frames::default();
    for to in [17u16, 0x8000, 0xffff] {
        let mut tx = a.start_tx(MODERN);
        a.tx.publish_avail(to);
        assert_eq!(tx.dequeue(&mut frames).err(), Some(RingFault::AvailIndex { from: 0, to, size: 16 }));
    }
    let mut tx = a.start_tx(MODERN);
    a.tx.set_avail(0, 16);
    a.tx.publish_avail(1);
    assert_eq!(tx.dequeue(&mut frames).err(), Some(RingFault::Head { entry: 16, size: 16 }));
}

#[test]
fn truncated_memory_breaks_the_ring_and_nothing_else() {
    let memory = DriverMemory::unsealed(1 << 20).unwrap();
    let fd = memory.fd().try_clone_to_owned().unwrap();
    let mapped = Arc::new(GuestMemory::map(&[(memory.region(), fd)]).unwrap());
    assert!(mapped.shrinkable());
    let mut ring = DriverRing::new(&memory, 0, 16, 0);
    let mut tx = TxRing::start(Guest::setup(&ring, MODERN), &mapped).unwrap();
    ring.offer(&cut(BUFFERS, 1000, &[], false)).unwrap();
    ring.publish();
    rustix::fs::ftruncate(memory.fd(), 0x1_0000).unwrap();
    let mut frames = Frames::default();
    assert_eq!(tx.dequeue(&mut frames).err(), Some(RingFault::Truncated));
    assert!(mapped.faulted());
    let (mut a, mut b) = (Guest::new(16), Guest::new(16));
    let (mut tx, mut rx) = (a.start_tx(MODERN), b.start_rx(MODERN));
    a.send(BUFFERS, &with_header(&pattern(100, 0)), &[]);
    b.rx.offer(&cut(BUFFERS, 2000, &[], true)).unwrap();
    b.rx.publish();
    assert_eq!(forward(&mut tx, &mut rx).frames, 1, "a neighbour goes on");
}
