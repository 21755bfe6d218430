//! The device's side of the packed ring against the plain model: the same chains, the same bytes, the same memory
//! afterwards, and a call exactly when the driver asked for one.
#![allow(clippy::unwrap_used, reason = "a test stops where something fails")]

mod model;
#[path = "model/plan.rs"]
#[allow(dead_code, reason = "what only split rings need")]
mod plan;

use model::packed::{AVAIL, Packed, Place, USED};
use model::{Beside, noise, regions};
use plan::{BUFFERS, ChainPlan, IMAGE, Mutation, TABLES, buffers, frame_lens, frames, parts};
use proptest::prelude::*;
use vring::driver::{Buffer, DriverRing};
use vring::{
    ChainFault, DESC_INDIRECT, DESC_NEXT, DESC_WRITE, Descriptor, Frames, RingFault, TxRing, features,
};

const INDIRECT: u64 = 1 << features::INDIRECT_DESC;
const MODERN: u64 = INDIRECT | 1 << features::VERSION_1;

/// One ring, and chains offered in it round after round.
#[derive(Clone, Debug)]
struct RingPlan {
    size: u16,
    base: u16,
    features: u64,
    /// Lengths of the regions behind the first, and gaps before them.
    cuts: Vec<(usize, u64)>,
    rounds: Vec<Vec<ChainPlan>>,
    /// What the driver wants to hear of in each round: position (near by, or any) and flags.
    events: Vec<(i16, Option<u16>, u16)>,
    seed: u64,
}

fn ring() -> impl Strategy<Value = RingPlan> {
    let bits = [
        features::INDIRECT_DESC,
        features::MRG_RXBUF,
        features::VERSION_1,
        features::EVENT_IDX,
        features::IN_ORDER,
    ];
    let features = prop::sample::subsequence(bits.to_vec(), 0..=5)
        .prop_map(|bits| bits.into_iter().fold(0, |all, bit| all | 1u64 << bit));
    let size = prop_oneof![1..5u16, 1..130u16, (0..=10u32).prop_map(|log| 1 << log), 1..1025u16];
    let cut = (prop_oneof![1..64usize, 64..0x2_0000usize], prop_oneof![Just(0), Just(1), Just(0x1000u64)]);
    let rounds = prop::collection::vec(prop::collection::vec(plan::chain(), 0..80), 1..6);
    let event =
        (-2..130i16, prop::option::weighted(0.2, any::<u16>()), prop_oneof![3 => Just(2), 2 => any::<u16>()]);
    let events = prop::collection::vec(event, 6);
    (size, any::<u16>(), features, prop::collection::vec(cut, 0..4), rounds, events, any::<u64>()).prop_map(
        |(size, base, features, cuts, rounds, events, seed)| {
            // Often the wrap is near.
            let index = if seed & 1 == 0 { base & 0x7fff } else { size - 1 - base % size.min(8) };
            let base = base & 0x8000 | (index % size);
            RingPlan { size, base, features, cuts, rounds, events, seed }
        },
    )
}

impl RingPlan {
    /// Memory of noise, cut into regions, and an empty ring in it.
    fn packed(&self) -> Packed {
        let mut parts = vec![(BUFFERS, 0)];
        let mut left = IMAGE - BUFFERS;
        for (len, gap) in &self.cuts {
            parts.push(((*len).min(left / 2), *gap));
            left -= parts[parts.len() - 1].0;
        }
        parts.push((left, 0));
        Packed::new(noise(IMAGE, self.seed), regions(&parts), self.size, self.features, self.base)
    }
}

/// Writes chains the way a driver does.
struct Driver {
    avail: Place,
    /// Ids in a random order, taken in turn: chains come back in order.
    ids: Vec<u16>,
    count: usize,
    table: usize,
    buffer: usize,
    /// Where descriptors were written.
    slots: Vec<usize>,
}

impl Driver {
    fn new(packed: &Packed, seed: u64) -> Self {
        let mut ids: Vec<u16> = (0..packed.size()).collect();
        let order = noise(ids.len(), seed);
        ids.sort_by_key(|id| order[usize::from(*id)]);
        Self { avail: packed.next, ids, count: 0, table: TABLES, buffer: BUFFERS, slots: Vec::new() }
    }

    /// One round: offers the chains for which there is room, and says what it wants to hear of.
    fn offer_all(&mut self, packed: &mut Packed, plan: &RingPlan, round: usize, writable: bool) {
        let size = packed.size();
        let taken = (0..=size).find(|n| packed.next.after(*n, size) == self.avail).unwrap();
        let mut room = size - taken;
        if room == size {
            (self.table, self.buffer) = (TABLES, BUFFERS);
        }
        self.slots.clear();
        for chain in &plan.rounds[round] {
            room -= self.offer(packed, chain, room, writable).unwrap_or(0);
        }
        let (near, any, flags) = plan.events[round];
        let lap = 2 * i32::from(size);
        let near = u16::try_from(i32::from(near).rem_euclid(lap)).unwrap();
        packed.put_event(any.unwrap_or_else(|| packed.used.after(near, size).bits()), flags);
    }

    /// Offers a chain; returns how many descriptors of the ring it took, `None` if these or memory are used up.
    fn offer(&mut self, packed: &mut Packed, plan: &ChainPlan, room: u16, writable: bool) -> Option<u16> {
        let indirect = plan.table_after.is_some() && packed.rig.model.has(features::INDIRECT_DESC);
        let bytes: usize = plan.lens.iter().map(|len| *len as usize).sum();
        let count = u16::try_from(plan.lens.len()).unwrap();
        let slots = if indirect { 1 } else { count };
        if slots > room
            || count > packed.size()
            || self.table + 16 * plan.lens.len() > BUFFERS
            || self.buffer + bytes + 4 * 0x1000 > IMAGE
        {
            return None;
        }
        let mut list = buffers(&packed.rig.model, &mut self.buffer, plan, writable);
        if indirect {
            let addr = packed.rig.model.guest_addr(self.table);
            let len = 16 * u32::from(count);
            for (i, d) in list.iter().enumerate() {
                // Flags other than WRITE, and ids, mean nothing in a table.
                let flags = d.flags | DESC_NEXT | if plan.lens[0] & 1 != 0 { DESC_INDIRECT } else { 0 };
                let at = self.table + 16 * i;
                packed.put_descriptor(at, Descriptor { flags, next: 0xffff, ..*d });
                self.slots.push(at);
            }
            // Not all tables are aligned: nothing says that they must be.
            self.table += 16 * list.len() + usize::from(self.avail.index % 3);
            // WRITE means nothing in a descriptor that refers to a table.
            let flags = DESC_INDIRECT | if plan.lens[0] & 2 != 0 { DESC_WRITE } else { 0 };
            list = vec![Descriptor { addr, len, flags, next: 0 }];
        }
        let id = self.ids[self.count % self.ids.len()];
        self.count += 1;
        for (i, d) in (1..).zip(list) {
            let whose = if self.avail.wrap { AVAIL } else { USED };
            // The id is in the last one; the others may have anything (virtio 1.2, 2.8.6).
            let (next, id) = if i < slots { (DESC_NEXT, id ^ 0x8001) } else { (0, id) };
            let at = 16 * usize::from(self.avail.index);
            packed.put_descriptor(at, Descriptor { flags: d.flags | next | whose, next: id, ..d });
            self.slots.push(at);
            self.avail = self.avail.after(1, packed.size());
        }
        Some(slots)
    }

    /// Breaks something of what was offered.
    fn mutate(&self, packed: &mut Packed, mutation: &Mutation) {
        let Some(at) = slot_of(mutation).and_then(|slot| self.slots.get(slot % self.slots.len().max(1)))
        else {
            return;
        };
        let model = &packed.rig.model;
        let mut d = packed.descriptor(*at);
        match *mutation {
            Mutation::Edge { region, by, .. } => d.addr = plan::near_the_edge(model, region, d.len, by),
            Mutation::Table { by, .. } => {
                d.flags = d.flags & (AVAIL | USED) | DESC_INDIRECT;
                d.len = u32::try_from(16 * (i64::from(model.size) + by)).unwrap_or(0);
            }
            Mutation::Descriptor { field, value, .. } => {
                plan::set_field(&mut d, field, value, &[1, 2, 4, AVAIL, USED]);
            }
            Mutation::Entry { head, .. } => d.flags = d.flags & !(AVAIL | USED) | head & (AVAIL | USED),
            Mutation::Index(_) | Mutation::Jump(_) => {}
        }
        packed.put_descriptor(*at, d);
    }
}

/// Which of the descriptors that were written a mutation is for.
fn slot_of(mutation: &Mutation) -> Option<usize> {
    match *mutation {
        Mutation::Descriptor { slot, .. } | Mutation::Edge { slot, .. } | Mutation::Table { slot, .. } => {
            Some(slot)
        }
        Mutation::Entry { step, .. } => Some(step.into()),
        Mutation::Index(_) | Mutation::Jump(_) => None,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn tx_of_a_proper_driver(plan in ring()) {
        let mut packed = plan.packed();
        let mut driver = Driver::new(&packed, plan.seed);
        let mut ring = packed.start_tx();
        let mut room = Frames::default();
        for round in 0..plan.rounds.len() {
            driver.offer_all(&mut packed, &plan, round, false);
            packed.rig.load();
            let sent = packed.send(&mut ring, &mut room).unwrap();
            let of_length = |fault: &ChainFault| matches!(fault, ChainFault::Short | ChainFault::Long);
            prop_assert!(sent.faults.iter().all(of_length), "{:?}", sent.faults);
            prop_assert_eq!(packed.next, driver.avail, "all were taken");
        }
    }

    #[test]
    fn rx_of_a_proper_driver(plan in ring(), lens in frame_lens()) {
        let mut packed = plan.packed();
        let mut driver = Driver::new(&packed, plan.seed);
        let mut ring = packed.start_rx();
        let mut room = Frames::default();
        for round in 0..plan.rounds.len() {
            driver.offer_all(&mut packed, &plan, round, true);
            packed.rig.load();
            let frames = frames(&lens, plan.seed);
            let burst = room.load(frames.iter().map(|frame| parts(frame)));
            let done = packed.receive(&mut ring, &burst, &frames).expect("buffers do not overlap").unwrap();
            prop_assert_eq!((done.malformed, done.unmapped), (0, 0));
            // A ring that was stopped goes on where it was.
            if round % 2 == 1 {
                ring = packed.start_rx();
                packed.rig.check();
            }
        }
    }

    #[test]
    fn tx_of_a_broken_driver(
        plan in ring(),
        mutations in prop::collection::vec(plan::mutation(), 1..8),
    ) {
        let mut packed = plan.packed();
        let mut driver = Driver::new(&packed, plan.seed);
        driver.offer_all(&mut packed, &plan, 0, false);
        mutations.iter().for_each(|m| driver.mutate(&mut packed, m));
        packed.rig.load();
        let mut ring = packed.start_tx();
        packed.rig.load();
        let _ = packed.send(&mut ring, &mut Frames::default());
    }

    #[test]
    fn rx_of_a_broken_driver(
        plan in ring(),
        mutations in prop::collection::vec(plan::mutation(), 1..8),
        lens in frame_lens(),
    ) {
        let mut packed = plan.packed();
        let mut driver = Driver::new(&packed, plan.seed);
        driver.offer_all(&mut packed, &plan, 0, true);
        mutations.iter().for_each(|m| driver.mutate(&mut packed, m));
        let mut ring = packed.start_rx();
        packed.rig.load();
        let frames = frames(&lens, plan.seed);
        let mut room = Frames::default();
        let burst = room.load(frames.iter().map(|frame| parts(frame)));
        packed.receive(&mut ring, &burst, &frames);
    }
}

fn packed(size: u16, features: u64, base: u16) -> Packed {
    Packed::new(noise(IMAGE, 5), regions(&[(IMAGE, 0)]), size, features, base)
}

/// Writes descriptors one behind the other from index 0 on, and starts the ring there.
fn sent(size: u16, list: &[Descriptor]) -> Result<(Vec<ChainFault>, usize), RingFault> {
    let mut packed = packed(size, MODERN, 0x8000);
    for (i, d) in list.iter().enumerate() {
        packed.put_descriptor(16 * i, Descriptor { addr: d.addr.wrapping_add(GUEST), ..*d });
    }
    let mut ring = packed.start_tx();
    packed.rig.load();
    packed.send(&mut ring, &mut Frames::default()).map(|sent| (sent.faults, sent.frames.len()))
}

const GUEST: u64 = vring::driver::GUEST_BASE;

fn d(len: u32, flags: u16, id: u16) -> Descriptor {
    Descriptor { addr: BUFFERS as u64, len, flags, next: id }
}

/// The id is in the last descriptor of a chain: what the others have for it is nothing to break a ring for.
#[test]
fn ids_of_all_but_the_last_descriptor_mean_nothing() {
    let next = AVAIL | DESC_NEXT;
    assert_eq!(sent(8, &[d(40, next, 0xffff), d(40, next, 8), d(40, AVAIL, 7)]), Ok((vec![], 1)));
    let broken = |entry| Err(RingFault::Head { entry, size: 8 });
    assert_eq!(sent(8, &[d(40, next, 0), d(40, AVAIL, 8)]), broken(8));
    assert_eq!(sent(8, &[d(40, AVAIL, 0xffff)]), broken(0xffff));
    assert_eq!(sent(8, &[d(40, AVAIL, 1), d(40, AVAIL, 9)]), broken(9));
}

/// Whose a descriptor is: only both flags together say that it is available.
#[test]
fn flags_of_ownership() {
    for (flags, frames) in [(AVAIL, 1), (0, 0), (USED, 0), (AVAIL | USED, 0)] {
        assert_eq!(sent(4, &[d(100, flags, 0)]), Ok((vec![], frames)), "{flags:#x}");
    }
}

/// A chain that never ends takes the whole ring, once, and is given back; the next lap begins behind it.
#[test]
fn chain_longer_than_the_ring() {
    for size in [1, 3, 64, 1000] {
        let list: Vec<_> = (0..size).map(|id| d(1, AVAIL | DESC_NEXT, id)).collect();
        assert_eq!(sent(size, &list), Ok((vec![ChainFault::Malformed], 0)), "size {size}");
    }
}

#[test]
fn rings_of_any_size() {
    for size in [1, 2, 3, 5, 63, 64, 65, 1000, 1023, 32_768] {
        for wrap in [0, 0x8000] {
            let mut p =
                Packed::new(noise(0x10_0000, 5), regions(&[(0x10_0000, 0)]), size, MODERN, wrap | (size - 1));
            let addr = p.rig.model.guest_addr(0x9_0000);
            for slot in 0..size {
                let at = p.next.after(slot, size);
                let flags = if at.wrap { AVAIL } else { USED };
                p.put_descriptor(
                    16 * usize::from(at.index),
                    Descriptor { addr, len: 100, flags, next: slot },
                );
            }
            let mut ring = p.start_tx();
            p.rig.load();
            let mut frames = Frames::default();
            let mut count = 0;
            while count < usize::from(size) {
                let sent = p.send(&mut ring, &mut frames).unwrap();
                assert!(sent.faults.is_empty() && !sent.frames.is_empty());
                count += sent.frames.len();
            }
            assert_eq!((count, p.next.after(size, size)), (size.into(), Place::of(wrap | (size - 1))));
        }
    }
}

#[test]
fn bases_outside_of_the_ring_are_refused() {
    for size in [1, 3, 64, 32_768] {
        let mut packed = packed(size.min(1024), MODERN, 0);
        let size = packed.size();
        for base in [0, u32::from(size) - 1, 0x8000, 0x8000 | (u32::from(size) - 1), 0xffff_0000] {
            let setup = vring::RingSetup { base, ..packed.rig.setup(None) };
            assert!(TxRing::start(setup, &packed.rig.mapped).is_ok(), "{base:#x} of {size}");
        }
        for base in [size, size + 1, 0x7fff, 0x8000 | size, 0xffff] {
            let setup = vring::RingSetup { base: base.into(), ..packed.rig.setup(None) };
            let refused = TxRing::start(setup, &packed.rig.mapped).err();
            assert!(
                matches!(refused, Some(vring::RingError::Base(at)) if at == base.into()),
                "{base:#x} of {size}: {refused:?}"
            );
        }
        packed.model().size = 0;
        let setup = packed.rig.setup(None);
        assert!(matches!(TxRing::start(setup, &packed.rig.mapped), Err(vring::RingError::Size(0))));
    }
}

/// This crate's own driver, in one memory with device and model: lap after lap, chains of all kinds.
#[test]
fn our_own_driver() {
    for (size, more) in [(7, 0), (64, 1 << features::IN_ORDER), (100, 1 << features::EVENT_IDX)] {
        let features = MODERN | more | 1 << features::RING_PACKED;
        let mut packed = packed(size, features, 0x8000);
        let mut ours = DriverRing::new(&packed.rig.memory.clone(), 0, size, features);
        packed.rig.model.ring = ours.area_offsets();
        let mut ring = packed.start_tx();
        let buffer = |offset, len| Buffer { offset, len, writable: false };
        let mut frames = Frames::default();
        for round in 0..40 {
            let mut expected = 0;
            for i in 0..=usize::from(size) {
                let at = BUFFERS + 500 * (i % 64);
                let ok = match (i + round) % 3 {
                    0 => ours.offer(&[buffer(at, 300)]),
                    1 => ours.offer(&[buffer(at, 20), buffer(at + 20, 1), buffer(at + 300, 100)]),
                    _ => ours.offer_indirect(TABLES + 48 * (i % 64), &[buffer(at, 12), buffer(at + 40, 60)]),
                };
                expected += usize::from(ok.is_some());
            }
            ours.publish();
            if round % 2 == 0 {
                ours.want_no_call();
            } else {
                assert!(ours.want_call(), "nothing is used yet");
            }
            packed.rig.model.image = packed.rig.image();
            let sent = packed.send(&mut ring, &mut frames).unwrap();
            assert_eq!((sent.faults, sent.frames.len()), (vec![], expected), "round {round}");
            assert_eq!(std::iter::from_fn(|| ours.take_used()).count(), expected);
        }
    }
}
