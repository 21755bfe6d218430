//! The rings on plain heap memory: what Miri can run, which knows no shared memory of files. It looks for accesses outside
//! of an allocation, unaligned ones, uninitialised bytes, and races between driver and device.
#![allow(
    clippy::cast_possible_truncation,
    clippy::unwrap_used,
    reason = "a test stops where something fails"
)]

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;

use crate::descriptor::{DESC_INDIRECT, DESC_NEXT, DESC_WRITE, Descriptor};
use crate::memory::RegionSpec;
use crate::packed::{PackedRing, WRAP, available_flags};
use crate::split::{SplitRing, areas};
use crate::{ChainFault, Frames, GuestMemory, RingFault, RingSetup, RxRing, TxRing, features};

const MODERN: u64 = 1 << features::VERSION_1 | 1 << features::INDIRECT_DESC;
const MERGEABLE: u64 = MODERN | 1 << features::MRG_RXBUF;
const GUEST: u64 = 0x1_0000_0000;
const USER: u64 = 0x7000_0000_0000;
const SIZE: u16 = 8;
/// Ring areas at 0, 256 and 512; buffers from here on, cut into two regions at [`SEAM`].
const BUFFERS: usize = 1024;
const SEAM: usize = 4096;
const LEN: usize = 8192;

#[derive(Clone, Copy)]
#[repr(align(64))]
#[allow(dead_code, reason = "gives the allocation its length and alignment")]
struct Line([u8; 64]);

/// A guest's memory, and its driver.
struct Guest {
    base: *mut u8,
    memory: Arc<GuestMemory>,
    driver: SplitRing,
    /// Next available entry, descriptor and used element.
    avail: u16,
    descriptor: u16,
    used: u16,
}

// SAFETY: the allocation is freed on drop only, and shared as a guest shares memory with a device: by the ring's rules.
unsafe impl Send for Guest {}

impl Drop for Guest {
    fn drop(&mut self) {
        let lines = std::ptr::slice_from_raw_parts_mut(self.base.cast::<Line>(), LEN / 64);
        // SAFETY: made by `Box::into_raw` of a boxed slice of that length.
        drop(unsafe { Box::from_raw(lines) });
    }
}

impl Guest {
    fn new() -> Self {
        let lines = vec![Line([0; 64]); LEN / 64].into_boxed_slice();
        let base: *mut u8 = Box::into_raw(lines).cast();
        let part = |offset: usize, len: usize| {
            let at = offset as u64;
            let spec = RegionSpec {
                guest_addr: GUEST + at,
                size: len as u64,
                user_addr: USER + at,
                mmap_offset: at,
            };
            (spec, base.wrapping_add(offset))
        };
        let memory = Arc::new(GuestMemory::of_heap(&[part(0, SEAM), part(SEAM, LEN - SEAM)]));
        let host = [0, 256, 512].map(|offset| base.wrapping_add(offset));
        // SAFETY: the areas of a ring of 8 have less than 256 bytes each, and lie in the allocation.
        let driver = unsafe { SplitRing::from_raw(host, SIZE) };
        assert!(areas(SIZE).iter().all(|(_, len, _)| *len <= 256));
        Self { base, memory, driver, avail: 0, descriptor: 0, used: 0 }
    }

    fn setup(features: u64) -> RingSetup {
        RingSetup {
            size: SIZE,
            desc_user_addr: USER,
            avail_user_addr: USER + 256,
            used_user_addr: USER + 512,
            base: 0,
            features,
            kick: None,
            call: None,
            err: None,
            enabled: true,
        }
    }

    fn tx(&self, features: u64) -> TxRing {
        TxRing::start(Self::setup(features), &self.memory).unwrap()
    }

    fn rx(&self, features: u64) -> RxRing {
        RxRing::start(Self::setup(features), &self.memory).unwrap()
    }

    fn write(&self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= LEN);
        // SAFETY: in bounds, and the device does not look at what was not offered.
        unsafe { self.base.add(offset).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    }

    fn read(&self, offset: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        assert!(offset + len <= LEN);
        // SAFETY: in bounds, and the device has used it.
        unsafe { self.base.add(offset).copy_to_nonoverlapping(bytes.as_mut_ptr(), len) };
        bytes
    }

    /// Offers a chain of buffers, given as offset and length.
    fn offer(&mut self, buffers: &[(usize, u32)], flags: u16) {
        let head = self.descriptor;
        for (i, (offset, len)) in (1..).zip(buffers) {
            let next = (head + i) % SIZE;
            let flags = if i < buffers.len() as u16 { flags | DESC_NEXT } else { flags };
            let descriptor = Descriptor { addr: GUEST + *offset as u64, len: *len, flags, next };
            self.driver.set_descriptor(self.descriptor, descriptor);
            self.descriptor = next;
        }
        self.driver.set_avail(self.avail, head);
        self.avail = self.avail.wrapping_add(1);
        self.driver.kicks(false).publish(self.avail);
    }

    fn take_used(&mut self) -> Option<(u32, u32)> {
        if self.driver.calls(false).index() == self.used {
            return None;
        }
        self.used = self.used.wrapping_add(1);
        Some(self.driver.used(self.used.wrapping_sub(1)))
    }

    fn wait_used(&mut self) -> (u32, u32) {
        loop {
            match self.take_used() {
                Some(used) => return used,
                None => thread::yield_now(),
            }
        }
    }
}

fn pattern(len: usize, seed: usize) -> Vec<u8> {
    (0..len).map(|i| (i.wrapping_mul(31).wrapping_add(seed) % 251) as u8).collect()
}

/// `len` bytes from `offset` on in parts of the given lengths, the last with the rest.
fn parts(offset: usize, len: usize, cuts: &[usize]) -> Vec<(usize, u32)> {
    let mut at = 0;
    let mut parts = Vec::new();
    for cut in cuts {
        parts.push((offset + at, *cut as u32));
        at += cut;
    }
    parts.push((offset + at, (len - at) as u32));
    parts
}

#[test]
fn frames_of_all_shapes() {
    // Miri is a thousand times slower.
    let lengths: &[usize] = if cfg!(miri) { &[14, 117, 200] } else { &[14, 52, 115, 116, 117, 200, 1500] };
    for (i, &len) in lengths.iter().enumerate() {
        for (cuts, features) in [
            (&[][..], MODERN),
            (&[12], MODERN),
            (&[1, 0, 3, 20], MODERN),
            (&[20], MERGEABLE),
            (&[], 0),
            (&[10], 0),
            (&[3, 9], 0),
        ] {
            // The last buffer crosses the seam of the regions now and then.
            let at = SEAM - [100, 13, 2, 1000][i % 4];
            let header_len = if features == 0 { 10 } else { 12 };
            let (mut a, mut b) = (Guest::new(), Guest::new());
            let (mut tx, mut rx) = (a.tx(features), b.rx(features));
            let frame = pattern(len, i);
            a.write(at, &[&vec![0; header_len][..], &frame].concat());
            a.offer(&parts(at, header_len + len, cuts), 0);
            b.write(at, &[0xee; 2000]);
            b.offer(&parts(at, header_len + len + 50, cuts), DESC_WRITE);
            let mut frames = Frames::default();
            let burst = tx.dequeue(&mut frames).unwrap();
            assert_eq!(rx.enqueue(&burst.burst, 1).unwrap().frames, 1, "{len} {cuts:?}");
            burst.complete();
            assert_eq!(a.take_used(), Some((0, 0)));
            assert_eq!(b.take_used(), Some((0, (header_len + len) as u32)));
            assert!(b.read(at + header_len, len) == frame, "{len} {cuts:?}");
            assert!(b.read(at + header_len + len, 100).iter().all(|byte| *byte == 0xee));
        }
    }
}

#[test]
fn merged_buffers_and_frames_of_our_own() {
    let mut guest = Guest::new();
    let mut rx = guest.rx(MERGEABLE);
    for i in 0..6 {
        guest.offer(&[(BUFFERS + 200 * i, 100)], DESC_WRITE);
    }
    let own = [pattern(300, 1), pattern(60, 2), pattern(300, 3)];
    let mut frames = Frames::default();
    let burst = frames.load(own.iter().map(|frame| (&[0; 12], &frame[..])));
    let done = rx.enqueue(&burst, u64::MAX).unwrap();
    assert_eq!((done.frames, done.full), (2, 1));
    let used: Vec<u32> = std::iter::from_fn(|| guest.take_used()).map(|(_, len)| len).collect();
    assert_eq!(used, [100, 100, 100, 12, 72]);
    let merged = (0..4).flat_map(|i| guest.read(BUFFERS + 200 * i, used[i] as usize)).skip(12);
    assert!(merged.eq(own[0].iter().copied()));
    assert!(guest.read(BUFFERS + 812, 60) == own[1]);
}

/// The device may copy more than a short frame has, but not beyond the memory.
#[test]
fn a_short_frame_at_the_end_of_memory() {
    let mut guest = Guest::new();
    let mut tx = guest.tx(MODERN);
    for (i, end) in [LEN, LEN - 1, SEAM].into_iter().enumerate() {
        let frame = pattern(60, i);
        guest.write(end - 72, &[&[0; 12][..], &frame].concat());
        guest.offer(&[(end - 72, 72)], 0);
        let mut frames = Frames::default();
        let burst = tx.dequeue(&mut frames).unwrap();
        let mut got = Vec::new();
        burst.burst.gather(0, &mut got);
        assert!(got == frame);
        burst.complete();
    }
}

#[test]
fn indirect_tables() {
    for table in [BUFFERS, SEAM - 16, SEAM - 24, SEAM - 7] {
        let mut guest = Guest::new();
        let mut tx = guest.tx(MODERN);
        let frame = pattern(200, 7);
        let at = BUFFERS + 512;
        guest.write(at, &[&[0; 12][..], &frame].concat());
        for (i, (offset, len)) in (0u16..).zip(parts(at, 212, &[12, 100])) {
            let flags = if i < 2 { DESC_NEXT } else { 0 };
            let words = Descriptor { addr: GUEST + offset as u64, len, flags, next: i + 1 }.to_words();
            guest.write(table + 16 * usize::from(i), &words.map(u64::to_ne_bytes).concat());
        }
        guest.offer(&[(table, 48)], DESC_INDIRECT);
        let mut frames = Frames::default();
        let burst = tx.dequeue(&mut frames).unwrap();
        let mut got = Vec::new();
        burst.burst.gather(0, &mut got);
        assert!(got == frame, "table at {table}");
    }
}

#[test]
fn malformed_chains() {
    let end = LEN as u64;
    let cases = [
        (Descriptor { addr: GUEST, len: 100, flags: DESC_NEXT, next: 0 }, ChainFault::Malformed),
        (Descriptor { addr: GUEST, len: 100, flags: DESC_NEXT, next: SIZE }, ChainFault::Malformed),
        (Descriptor { addr: GUEST, len: 100, flags: DESC_WRITE, next: 0 }, ChainFault::Malformed),
        (Descriptor { addr: GUEST, len: 24, flags: DESC_INDIRECT, next: 0 }, ChainFault::Malformed),
        (Descriptor { addr: GUEST + end - 8, len: 16, flags: DESC_INDIRECT, next: 0 }, ChainFault::Unmapped),
        (Descriptor { addr: GUEST + end - 99, len: 100, flags: 0, next: 0 }, ChainFault::Unmapped),
        (Descriptor { addr: GUEST + end, len: 0, flags: 0, next: 0 }, ChainFault::Unmapped),
        (Descriptor { addr: GUEST - 1, len: 100, flags: 0, next: 0 }, ChainFault::Unmapped),
        (Descriptor { addr: u64::MAX - 10, len: 100, flags: 0, next: 0 }, ChainFault::Unmapped),
        (Descriptor { addr: GUEST, len: 25, flags: 0, next: 0 }, ChainFault::Short),
    ];
    for (descriptor, fault) in cases {
        let guest = Guest::new();
        let mut tx = guest.tx(MODERN);
        guest.driver.set_descriptor(0, descriptor);
        guest.driver.set_avail(0, 0);
        guest.driver.kicks(false).publish(1);
        let mut frames = Frames::default();
        let burst = tx.dequeue(&mut frames).unwrap();
        assert_eq!(burst.burst.fault(0), Some(fault), "{descriptor:?}");
    }
    let guest = Guest::new();
    let mut tx = guest.tx(MODERN);
    guest.driver.set_avail(0, SIZE);
    guest.driver.kicks(false).publish(1);
    let mut frames = Frames::default();
    assert_eq!(tx.dequeue(&mut frames).err(), Some(RingFault::Head { entry: SIZE, size: SIZE }));
}

/// As many frames as wrap both rings some times.
const COUNT: usize = 20;

/// The device takes all frames there are, each time so many that belong together, or a multiple.
fn take(tx: &mut TxRing, batch: usize) {
    let mut frames = Frames::default();
    let mut taken = 0;
    while taken < COUNT {
        let burst = tx.dequeue(&mut frames).unwrap();
        assert!(burst.burst.len().is_multiple_of(batch), "part of a batch");
        for i in 0..burst.burst.len() {
            let mut got = Vec::new();
            burst.burst.gather(i, &mut got);
            assert!(got == pattern(188, taken), "frame {taken}");
            taken += 1;
        }
        burst.complete();
        thread::yield_now();
    }
}

/// The device delivers as many.
fn deliver(rx: &mut RxRing) {
    let mut frames = Frames::default();
    let mut delivered = 0;
    while delivered < COUNT {
        let frame = pattern(188, delivered);
        let burst = frames.load([(&[0; 12], &frame[..])]);
        delivered += rx.enqueue(&burst, 1).unwrap().frames as usize;
        thread::yield_now();
    }
}

#[test]
fn a_driver_sends_while_the_device_takes() {
    let mut guest = Guest::new();
    let mut tx = guest.tx(MODERN);
    let driver = thread::spawn(move || {
        for i in 0..COUNT {
            // Buffers are used again as soon as the device has returned them.
            let at = BUFFERS + 256 * (i % usize::from(SIZE));
            if i >= usize::from(SIZE) {
                guest.wait_used();
            }
            guest.write(at, &[&[0; 12][..], &pattern(188, i)].concat());
            guest.offer(&[(at, 200)], 0);
        }
        guest
    });
    take(&mut tx, 1);
    drop(driver.join().unwrap());
}

#[test]
fn a_driver_receives_while_the_device_delivers() {
    let mut guest = Guest::new();
    let mut rx = guest.rx(MODERN);
    let driver = thread::spawn(move || {
        let place = |i: usize| BUFFERS + 256 * (i % usize::from(SIZE));
        (0..usize::from(SIZE)).for_each(|i| guest.offer(&[(place(i), 256)], DESC_WRITE));
        for i in 0..COUNT {
            assert_eq!(guest.wait_used().1, 200);
            assert!(guest.read(place(i) + 12, 188) == pattern(188, i), "frame {i}");
            guest.offer(&[(place(i), 256)], DESC_WRITE);
        }
        guest
    });
    deliver(&mut rx);
    drop(driver.join().unwrap());
}

/// A driver of a packed ring in the same memory: descriptors from its beginning on, round after round.
struct PackedGuest {
    guest: Guest,
    ring: PackedRing,
    /// Positions of the next descriptor to write, and of the next used one.
    avail: u16,
    used: u16,
    /// Slots of each chain on its way, by id; ids are given in turn.
    slots: [u16; PACKED_SIZE as usize],
    id: u16,
}

/// No power of two, so that chains lie across the ring's end in many ways.
const PACKED_SIZE: u16 = 7;

// SAFETY: as for the guest.
unsafe impl Send for PackedGuest {}

impl PackedGuest {
    fn new() -> Self {
        let guest = Guest::new();
        let host = [0, 256, 512].map(|offset| guest.base.wrapping_add(offset));
        assert!(crate::packed::areas(PACKED_SIZE).iter().all(|(_, len, _)| *len <= 256));
        // SAFETY: the areas of a ring of 7 have less than 256 bytes each, and lie in the allocation.
        let ring = unsafe { PackedRing::from_raw(host, PACKED_SIZE) };
        Self { guest, ring, avail: WRAP, used: WRAP, slots: [0; PACKED_SIZE as usize], id: 0 }
    }

    fn setup(features: u64) -> RingSetup {
        let features = features | 1 << features::RING_PACKED;
        RingSetup { size: PACKED_SIZE, base: WRAP.into(), ..Guest::setup(features) }
    }

    fn tx(&self, features: u64) -> TxRing {
        TxRing::start(Self::setup(features), &self.guest.memory).unwrap()
    }

    fn rx(&self, features: u64) -> RxRing {
        RxRing::start(Self::setup(features), &self.guest.memory).unwrap()
    }

    /// Offers chains at one go, each given as offsets and lengths: the first descriptor is written last.
    fn offer(&mut self, chains: &[&[(usize, u32)]], flags: u16) {
        let begin = self.avail;
        let mut first = 0;
        for chain in chains {
            self.slots[usize::from(self.id)] = chain.len() as u16;
            for (i, (offset, len)) in (1..).zip(*chain) {
                let next = if i < chain.len() { DESC_NEXT } else { 0 };
                let flags = flags | next | available_flags(self.avail);
                let descriptor = Descriptor { addr: GUEST + *offset as u64, len: *len, flags, next: self.id };
                let [addr, rest] = descriptor.to_packed();
                self.ring.set_addr(self.avail, addr);
                if self.avail == begin {
                    first = rest;
                } else {
                    self.ring.set_rest(self.avail, rest, Ordering::Relaxed);
                }
                self.avail = self.ring.advance(self.avail, 1);
            }
            self.id = (self.id + 1) % PACKED_SIZE;
        }
        self.ring.set_rest(begin, first, Ordering::Release);
    }

    fn take_used(&mut self) -> Option<(u16, u32)> {
        if !self.ring.is_used(self.used) {
            return None;
        }
        let used = self.ring.descriptor(self.used);
        self.used = self.ring.advance(self.used, self.slots[usize::from(used.next)]);
        Some((used.next, used.len))
    }

    fn wait_used(&mut self) -> (u16, u32) {
        loop {
            match self.take_used() {
                Some(used) => return used,
                None => thread::yield_now(),
            }
        }
    }
}

/// Lap after lap: chains across the ring's end, several of them published at one go.
#[test]
fn packed_chains_of_all_shapes() {
    let frame = pattern(200, 3);
    let shapes: [&[usize]; 4] = [&[], &[12], &[1, 0, 3, 20], &[12, 7, 7, 7, 7, 7]];
    for (features, header_len) in [(MODERN, 12), (0, 10)] {
        let (mut a, mut b) = (PackedGuest::new(), PackedGuest::new());
        let (mut tx, mut rx) = (a.tx(features), b.rx(features));
        // Across the seam of the regions.
        let at = SEAM - 100;
        a.guest.write(at, &[&vec![0; header_len][..], &frame].concat());
        for (round, cuts) in shapes.iter().cycle().take(12).enumerate() {
            let chain = parts(at, header_len + 200, cuts);
            let single = parts(at, header_len + 200, &[]);
            // As many as fit.
            let chains: &[&[_]] = if chain.len() <= 5 { &[&chain, &single] } else { &[&chain] };
            a.offer(chains, 0);
            b.guest.write(at, &[0xee; 400]);
            b.offer(&[&parts(at, header_len + 250, cuts)], DESC_WRITE);
            let mut frames = Frames::default();
            let burst = tx.dequeue(&mut frames).unwrap();
            assert_eq!(burst.burst.len(), chains.len());
            assert_eq!(rx.enqueue(&burst.burst, 1).unwrap().frames, 1, "round {round}");
            burst.complete();
            assert_eq!(std::iter::from_fn(|| a.take_used()).count(), chains.len());
            assert_eq!(b.take_used().map(|(_, len)| len), Some((header_len + 200) as u32));
            assert!(b.guest.read(at + header_len, 200) == frame, "round {round}");
            assert!(b.guest.read(at + header_len + 200, 50).iter().all(|byte| *byte == 0xee));
        }
    }
}

/// Tables, unaligned and across the seam; malformed chains; a chain that takes the whole ring.
#[test]
fn packed_chains_that_are_odd() {
    let mut guest = PackedGuest::new();
    let mut tx = guest.tx(MODERN);
    let mut frames = Frames::default();
    let frame = pattern(100, 7);
    let at = BUFFERS + 512;
    guest.guest.write(at, &[&[0; 12][..], &frame].concat());
    for table in [BUFFERS, SEAM - 16, SEAM - 24, SEAM - 7] {
        for (i, (offset, len)) in parts(at, 112, &[12, 50]).into_iter().enumerate() {
            let entry = Descriptor { addr: GUEST + offset as u64, len, flags: DESC_NEXT, next: 0xffff };
            guest.guest.write(table + 16 * i, &entry.to_packed().map(u64::to_ne_bytes).concat());
        }
        guest.offer(&[&[(table, 48)]], DESC_INDIRECT);
        let burst = tx.dequeue(&mut frames).unwrap();
        let mut got = Vec::new();
        burst.burst.gather(0, &mut got);
        assert!(got == frame, "table at {table}");
        burst.complete();
        guest.take_used().unwrap();
    }
    let whole = [(at, 10); PACKED_SIZE as usize];
    for (chain, flags, fault) in [
        (&whole[..], DESC_NEXT, ChainFault::Malformed),
        (&[(at, 100)], DESC_WRITE, ChainFault::Malformed),
        (&[(LEN, 0)], 0, ChainFault::Unmapped),
        (&[(at, 10), (LEN - 99, 100), (at, 10)], 0, ChainFault::Unmapped),
        (&[(LEN - 8, 16)], DESC_INDIRECT, ChainFault::Unmapped),
        (&[(at, 25)], 0, ChainFault::Short),
    ] {
        guest.offer(&[chain], flags);
        let burst = tx.dequeue(&mut frames).unwrap();
        assert_eq!((burst.burst.len(), burst.burst.fault(0)), (1, Some(fault)), "{chain:?}");
        burst.complete();
        assert!(guest.take_used().is_some());
    }
}

/// Batches that become visible by their first descriptor while the device looks, and used ones the other way: Miri sees
/// whether a descriptor, or a buffer, is touched without being released.
#[test]
fn a_packed_driver_and_a_device_at_once() {
    for features in [MODERN, MODERN | 1 << features::IN_ORDER] {
        let mut guest = PackedGuest::new();
        let mut tx = guest.tx(features);
        let in_order = features != MODERN;
        let driver = thread::spawn(move || {
            for i in (0..COUNT).step_by(2) {
                let chains = [i, i + 1].map(|i| {
                    let at = BUFFERS + 256 * (i % 6);
                    guest.guest.write(at, &[&[0; 12][..], &pattern(188, i)].concat());
                    parts(at, 200, if i % 2 == 0 { &[12, 50] } else { &[] })
                });
                guest.offer(&[&chains[0], &chains[1]], 0);
                let (id, _) = guest.wait_used();
                // With IN_ORDER the second may stand for both.
                if in_order && id == (guest.id + PACKED_SIZE - 1) % PACKED_SIZE {
                    guest.used = guest.avail;
                } else {
                    guest.wait_used();
                }
            }
            guest
        });
        take(&mut tx, 2);
        drop(driver.join().unwrap());
    }
}

#[test]
fn a_packed_driver_receives_while_the_device_delivers() {
    let mut guest = PackedGuest::new();
    let mut rx = guest.rx(MERGEABLE);
    let driver = thread::spawn(move || {
        let place = |i: usize| BUFFERS + 256 * (i % usize::from(PACKED_SIZE));
        let buffers: Vec<_> = (0..usize::from(PACKED_SIZE)).map(|i| [(place(i), 150)]).collect();
        guest.offer(&buffers.iter().map(|buffer| &buffer[..]).collect::<Vec<_>>(), DESC_WRITE);
        // Each frame in two buffers, of which both are seen when the first is.
        for i in 0..COUNT {
            assert_eq!([guest.wait_used().1, guest.take_used().unwrap().1], [150, 50]);
            let [first, second] = [place(2 * i), place(2 * i + 1)];
            let got = [guest.guest.read(first + 12, 138), guest.guest.read(second, 50)].concat();
            assert!(got == pattern(188, i), "frame {i}");
            guest.offer(&[&[(first, 150)], &[(second, 150)]], DESC_WRITE);
        }
        guest
    });
    deliver(&mut rx);
    drop(driver.join().unwrap());
}
