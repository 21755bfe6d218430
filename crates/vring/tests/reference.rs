//! The device's side of the split ring against two others: the plain model, and `virtio-queue`'s iteration of the same
//! memory. All three must find the same chains and the same bytes, and leave the same memory behind.
//!
//! Where this device is stricter than `virtio-queue`:
//! * INDIRECT without the feature, INDIRECT with NEXT, a table longer than the ring, and a chain of more buffers than the
//!   ring has descriptors, in ring and table together, are malformed (virtio 1.2, 2.7.5.3.1);
//! * an empty buffer must lie in guest memory like any other.
//!
//! Where `virtio-queue` is stricter: it ends a chain of writable buffers that are 4 GiB in all; here each must lie in
//! guest memory, and no more is used than a frame needs.
#![allow(clippy::unwrap_used, reason = "a test stops where something fails")]

mod model;
#[path = "model/plan.rs"]
mod plan;

use std::io::{Read as _, Write as _};
use std::sync::atomic::Ordering;

use model::{Beside, Model, Rig};
use plan::{RingPlan, Writer, frame_lens, frames, parts};
use proptest::prelude::*;
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor as ReferenceDescriptor;
use virtio_queue::mock::MockSplitQueue;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vring::driver::{Buffer, DriverRing, GUEST_BASE};
use vring::{ChainFault, DESC_INDIRECT, DESC_NEXT, Enqueued, Frames, features};

type Memory = GuestMemoryMmap<()>;
type Chain<'a> = DescriptorChain<&'a Memory>;

/// The reference device in a copy of the model's memory.
struct Reference {
    memory: Memory,
    queue: Queue,
}

impl Reference {
    fn new(model: &Model) -> Self {
        let ranges: Vec<_> = model.regions.iter().map(|r| (GuestAddress(r.guest), r.len)).collect();
        let memory = Memory::from_ranges(&ranges).unwrap();
        let mut queue = Queue::new(model.size).unwrap();
        let [desc, avail, used] = model.ring.map(|part| GuestAddress(model.guest_addr(part)));
        queue.try_set_desc_table_address(desc).unwrap();
        queue.try_set_avail_ring_address(avail).unwrap();
        queue.try_set_used_ring_address(used).unwrap();
        queue.set_event_idx(model.has(features::EVENT_IDX));
        queue.set_next_avail(model.next);
        queue.set_next_used(model.used);
        queue.set_ready(true);
        let mut reference = Self { memory, queue };
        assert!(reference.queue.is_valid(&reference.memory));
        reference.load(model);
        reference.queue.disable_notification(&reference.memory).unwrap();
        reference
    }

    fn load(&self, model: &Model) {
        for r in &model.regions {
            self.memory.write_slice(&model.image[r.offset..r.offset + r.len], GuestAddress(r.guest)).unwrap();
        }
    }

    /// The memory it leaves behind is the model's.
    fn check(&self, model: &Model) {
        for r in &model.regions {
            let mut image = vec![0; r.len];
            self.memory.read_slice(&mut image, GuestAddress(r.guest)).unwrap();
            assert!(image == model.image[r.offset..r.offset + r.len], "virtio-queue left {r:?} different");
        }
    }

    /// All chains that are available.
    fn chains(&mut self) -> Result<Vec<Chain<'_>>, virtio_queue::Error> {
        Ok(self.queue.iter(&self.memory)?.collect())
    }

    /// Whether the driver must be called. The reference knows no flags.
    fn needs_call(&mut self, model: &Model) -> bool {
        let flags: u16 =
            self.memory.load(GuestAddress(model.guest_addr(model.ring[1])), Ordering::Relaxed).unwrap();
        self.queue.needs_notification(&self.memory).unwrap()
            && (model.has(features::EVENT_IDX) || u16::from_le(flags) & 1 == 0)
    }

    /// Takes one TX chain after the other, as this crate's device would.
    fn send(&mut self, model: &Model) -> Vec<Vec<u8>> {
        let chains = self.chains().unwrap();
        let heads: Vec<u16> = chains.iter().map(Chain::head_index).collect();
        let sent = chains.iter().filter_map(readable).filter(|sent| is_frame(sent, model)).collect();
        for head in heads {
            self.queue.add_used(&self.memory, head, 0).unwrap();
        }
        sent
    }

    /// Delivers frames into well-formed buffers.
    fn deliver(&mut self, model: &Model, frames: &[Vec<u8>]) -> Enqueued {
        let (mut done, mut used) = (Enqueued::default(), Vec::new());
        let memory = &self.memory;
        let chains: Vec<_> = self.queue.iter(memory).unwrap().collect();
        let mut rest = &chains[..];
        let merge = model.has(features::MRG_RXBUF);
        for (i, frame) in frames.iter().enumerate() {
            if rest.is_empty() {
                done.full += u32::try_from(frames.len() - i).unwrap();
                break;
            }
            let header_len = model.header_len();
            let mut bytes = [&frame[..header_len], &frame[12..]].concat();
            let mut enough = 0;
            let mut room = 0;
            while room < bytes.len() && enough < rest.len() && (merge || enough == 0) {
                room += writer(memory, &rest[enough]).available_bytes();
                enough += 1;
            }
            if room < bytes.len() && merge {
                done.full += 1;
                continue;
            }
            if room < bytes.len() {
                done.too_small += 1;
                used.push((rest[0].head_index(), 0));
                rest = &rest[1..];
                continue;
            }
            if header_len == 12 {
                bytes[10..12].copy_from_slice(&u16::try_from(enough).unwrap().to_le_bytes());
            }
            let mut left = &bytes[..];
            for chain in &rest[..enough] {
                let mut to = writer(memory, chain);
                let part = left.len().min(to.available_bytes());
                to.write_all(&left[..part]).unwrap();
                left = &left[part..];
                used.push((chain.head_index(), u32::try_from(part).unwrap()));
            }
            rest = &rest[enough..];
            done.frames += 1;
            done.bytes += (bytes.len() - header_len) as u64;
        }
        for (head, len) in &used {
            self.queue.add_used(memory, *head, *len).unwrap();
        }
        done.call = !used.is_empty() && self.needs_call(model);
        // What was not used is still to be had.
        self.queue.set_next_avail(model.next.wrapping_add(u16::try_from(used.len()).unwrap()));
        done
    }
}

fn writer<'a>(memory: &'a Memory, chain: &Chain<'_>) -> virtio_queue::Writer<'a> {
    virtio_queue::Writer::new(memory, chain.clone()).unwrap()
}

/// A chain's descriptors, if they are a whole chain of one direction.
fn descriptors(chain: Chain<'_>, writable: bool) -> Option<Vec<ReferenceDescriptor>> {
    let all: Vec<_> = chain.collect();
    let whole = all.last().is_some_and(|last| !last.has_next());
    (whole && all.iter().all(|d| d.is_write_only() == writable)).then_some(all)
}

/// What a whole TX chain says.
fn readable(chain: &Chain<'_>) -> Option<Vec<u8>> {
    descriptors(chain.clone(), false)?;
    let mut reader = chain.clone().reader(chain.memory()).ok()?;
    let mut bytes = Vec::new();
    reader.read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

fn is_frame(bytes: &[u8], model: &Model) -> bool {
    let header_len = model.header_len();
    (header_len + 14..=header_len + vring::FRAME_LEN_MAX as usize).contains(&bytes.len())
}

/// The bytes as the device hands them on.
fn as_sent(bytes: &[u8], model: &Model) -> Vec<u8> {
    [&bytes[..10], &[1, 0], &bytes[model.header_len()..]].concat()
}

/// Whether a chain breaks one of the rules on which this device is stricter (see above).
fn breaks_our_rules(model: &Model, head: u16, taken: &[ReferenceDescriptor]) -> bool {
    let mut index = head;
    let mut stricter = taken.len() > usize::from(model.size);
    for _ in 0..model.size {
        let d = model.descriptor(16 * usize::from(index));
        if d.flags & DESC_INDIRECT != 0 {
            stricter |= !model.has(features::INDIRECT_DESC)
                || d.flags & DESC_NEXT != 0
                || d.len > 16 * u32::from(model.size);
            break;
        }
        if d.flags & DESC_NEXT == 0 {
            break;
        }
        index = d.next;
    }
    let mapped = |addr: u64| model.regions.iter().any(|r| addr >= r.guest && addr - r.guest < r.len as u64);
    stricter || taken.iter().any(|d| d.len() == 0 && !mapped(d.addr().raw_value()))
}

/// Offers the chains of one round that fit.
fn offer(model: &mut Model, plan: &RingPlan, round: usize, writable: bool) -> Writer {
    let mut driver = Writer::new(model, plan.seed ^ round as u64);
    for chain in &plan.rounds[round] {
        driver.offer(model, chain, writable);
    }
    driver.publish(model);
    // The driver wants to hear of something near by.
    let event = model.used.wrapping_add(plan.events[round] % 128).wrapping_sub(2);
    model.set_used_event(event);
    let flags = plan.events[round] & 1;
    model.put16(model.ring[1], flags);
    driver
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn tx_of_a_proper_driver(plan in plan::ring()) {
        let mut rig = Rig::new(plan.model());
        let mut reference = Reference::new(&rig.model);
        let mut ring = rig.start_tx();
        let mut room = Frames::default();
        for round in 0..plan.rounds.len() {
            offer(&mut rig.model, &plan, round, false);
            rig.load();
            reference.load(&rig.model);
            let theirs = reference.send(&rig.model);
            let ours = rig.send(&mut ring, &mut room).unwrap();
            let of_length = |fault: &ChainFault| matches!(fault, ChainFault::Short | ChainFault::Long);
            prop_assert!(ours.faults.iter().all(of_length), "{:?}", ours.faults);
            let theirs: Vec<_> = theirs.iter().map(|bytes| as_sent(bytes, &rig.model)).collect();
            prop_assert!(ours.frames == theirs, "other frames than virtio-queue");
            reference.check(&rig.model);
        }
    }

    #[test]
    fn rx_of_a_proper_driver(plan in plan::ring(), lens in frame_lens()) {
        let mut rig = Rig::new(plan.model());
        let mut reference = Reference::new(&rig.model);
        let mut ring = rig.start_rx();
        let mut room = Frames::default();
        for round in 0..plan.rounds.len() {
            // What is left from the round before is taken back, so that buffers never lie over each other.
            rig.model.publish(rig.model.next);
            offer(&mut rig.model, &plan, round, true);
            rig.load();
            reference.load(&rig.model);
            let frames = frames(&lens, plan.seed);
            let burst = room.load(frames.iter().map(|frame| parts(frame)));
            let theirs = reference.deliver(&rig.model, &frames);
            let ours = rig.receive(&mut ring, &burst, &frames).expect("buffers do not overlap").unwrap();
            prop_assert_eq!(ours, theirs);
            reference.check(&rig.model);
            // The device goes on where it was; a driver that takes buffers back says so by a restart.
            ring = rig.start_rx();
        }
    }

    #[test]
    fn tx_of_a_broken_driver(
        plan in plan::ring(),
        mutations in prop::collection::vec(plan::mutation(), 1..8),
    ) {
        let mut rig = Rig::new(plan.model());
        let driver = offer(&mut rig.model, &plan, 0, false);
        mutations.iter().for_each(|m| driver.mutate(&mut rig.model, m));
        rig.load();
        let mut reference = Reference::new(&rig.model);
        compare_chains(rig.model.clone(), &mut reference, false)?;
        // Ours against the model, in all detail.
        let mut ring = rig.start_tx();
        let _ = rig.send(&mut ring, &mut Frames::default());
    }

    #[test]
    fn rx_of_a_broken_driver(
        plan in plan::ring(),
        mutations in prop::collection::vec(plan::mutation(), 1..8),
        lens in frame_lens(),
    ) {
        let mut rig = Rig::new(plan.model());
        let driver = offer(&mut rig.model, &plan, 0, true);
        mutations.iter().for_each(|m| driver.mutate(&mut rig.model, m));
        rig.load();
        let mut reference = Reference::new(&rig.model);
        compare_chains(rig.model.clone(), &mut reference, true)?;
        let mut ring = rig.start_rx();
        let frames = frames(&lens, plan.seed);
        let mut room = Frames::default();
        let burst = room.load(frames.iter().map(|frame| parts(frame)));
        rig.receive(&mut ring, &burst, &frames);
    }
}

/// The model is never less strict than the reference, and stricter only where it says so.
fn compare_chains(mut model: Model, reference: &mut Reference, writable: bool) -> Result<(), TestCaseError> {
    let Ok(chains) = reference.chains() else {
        prop_assert!(model.available(1).is_err(), "virtio-queue finds the index wrong");
        return Ok(());
    };
    prop_assert_eq!(usize::from(model.available(1).unwrap()), chains.len());
    for (step, chain) in (0..).zip(chains) {
        let Ok(head) = model.head(step) else {
            prop_assert!(chain.head_index() >= model.size);
            continue;
        };
        prop_assert_eq!(chain.head_index(), head);
        let bytes = if writable {
            virtio_queue::Writer::new(chain.memory(), chain.clone()).ok().map(|w| w.available_bytes())
        } else {
            chain.clone().reader(chain.memory()).ok().map(|r| r.available_bytes())
        };
        let theirs = descriptors(chain, writable).zip(bytes);
        match (model.walk(head, writable, u64::MAX), theirs) {
            (Ok(ours), Some((_, bytes))) => {
                prop_assert_eq!(ours.iter().map(ExactSizeIterator::len).sum::<usize>(), bytes);
            }
            (Err(_), None) => {}
            (Ok(_), None) => prop_assert!(false, "chain {head}: virtio-queue is stricter"),
            (Err(fault), Some((taken, _))) => {
                prop_assert!(
                    breaks_our_rules(&model, head, &taken),
                    "chain {head}: {fault:?}, not so for virtio-queue"
                );
            }
        }
    }
    Ok(())
}

/// `virtio-queue`'s own driver, and this crate's, in one shared memory with the device.
#[test]
fn other_drivers() {
    const BUFFERS: u64 = 0x1_0000;
    let features = 1 << features::VERSION_1 | 1 << features::INDIRECT_DESC;
    for size in [8u16, 64, 1024] {
        let plan = RingPlan {
            size,
            base: 0,
            features,
            cuts: Vec::new(),
            rounds: Vec::new(),
            events: Vec::new(),
            seed: 7,
        };
        let mut rig = Rig::new(plan.model());
        let file = std::fs::File::from(rig.memory.fd().try_clone_to_owned().unwrap());
        let shared = (GuestAddress(GUEST_BASE), rig.memory.len(), Some(FileOffset::new(file, 0)));
        let memory = Memory::from_ranges_with_files([shared]).unwrap();
        let mock = MockSplitQueue::create(&memory, GuestAddress(GUEST_BASE), size);
        let places = [mock.desc_table_addr(), mock.avail_addr(), mock.used_addr()];
        rig.model.ring = places.map(|at| usize::try_from(at.0 - GUEST_BASE).unwrap());
        // Chains of one, two, three buffers ...
        let mut chain = Vec::new();
        for i in 0..u64::from(size) {
            let last = [0, 2, 5].contains(&(i % 6)) || i + 1 == u64::from(size);
            let flags = if last { 0 } else { DESC_NEXT };
            let next = u16::try_from(i).unwrap() + 1;
            let descriptor = ReferenceDescriptor::new(GUEST_BASE + BUFFERS + 100 * i, 100, flags, next);
            chain.push(RawDescriptor::from(descriptor));
        }
        mock.add_desc_chains(&chain, 0).unwrap();
        rig.model.image = rig.image();
        let mut ring = rig.start_tx();
        let sent = rig.send(&mut ring, &mut Frames::default()).unwrap();
        assert!(sent.faults.is_empty() && sent.frames.len() >= usize::from(size) / 3);
        for (i, frame) in sent.frames.iter().enumerate() {
            assert!(frame.len() % 100 == 0, "frame {i} has whole buffers");
        }

        let mut ours = DriverRing::new(&rig.memory, 0, size, 0);
        rig.model = Model::new(rig.image(), rig.model.regions.clone(), size, features, 0);
        rig.load();
        let offsets = ours.area_offsets();
        rig.model.ring = offsets;
        let buffer = |offset, writable| Buffer { offset, len: 300, writable };
        for at in (0x2_0000..).step_by(1000).take(usize::from(size) / 4) {
            ours.offer(&[buffer(at, false), buffer(at + 500, false)]).unwrap();
            ours.offer_indirect(at - 0x1_0000, &[buffer(at, false), buffer(at + 400, false)]).unwrap();
        }
        ours.publish();
        rig.model.image = rig.image();
        let mut ring = rig.start_tx();
        let sent = rig.send(&mut ring, &mut Frames::default()).unwrap();
        assert_eq!((sent.faults.len(), sent.frames.len()), (0, 2 * usize::from(size / 4)));
        while ours.take_used().is_some() {}

        for at in (0x2_0000..).step_by(1000).take(usize::from(size) / 4) {
            ours.offer(&[buffer(at, true), buffer(at + 500, true)]).unwrap();
        }
        ours.publish();
        rig.model.image = rig.image();
        let mut ring = rig.start_rx();
        let frames = frames(&[14, 300, 588, 589], 3);
        let mut room = Frames::default();
        let burst = room.load(frames.iter().map(|frame| parts(frame)));
        let done = rig.receive(&mut ring, &burst, &frames).unwrap().unwrap();
        let expected = if size == 8 { (2, 0) } else { (3, 1) };
        assert_eq!((done.frames, done.too_small), expected);
    }
}
