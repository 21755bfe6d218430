//! Random rings: what a driver offers, well-formed or not.
#![allow(unreachable_pub)]

use proptest::prelude::*;
use vring::{DESC_INDIRECT, DESC_NEXT, DESC_WRITE, Descriptor, HEADER_LEN, features};

use crate::model::{Model, noise, regions};

/// Rings before, indirect tables, then buffers.
pub const TABLES: usize = 0x8000;
pub const BUFFERS: usize = 0x1_8000;
pub const IMAGE: usize = 0x8_0000;

/// One chain.
#[derive(Clone, Debug)]
pub struct ChainPlan {
    /// Lengths of its buffers.
    pub lens: Vec<u32>,
    /// How many of them before an indirect table, which has the others.
    pub table_after: Option<usize>,
}

/// Something wrong with the ring.
#[derive(Clone, Debug)]
pub enum Mutation {
    /// In a descriptor, of the ring or of a table: field and value.
    Descriptor { slot: usize, field: u8, value: u64 },
    /// In a descriptor: it ends so far behind the end of a region, or before.
    Edge { slot: usize, region: usize, by: i64 },
    /// In a descriptor: it refers to a table of so many entries more than the ring has, or less.
    Table { slot: usize, by: i64 },
    /// An available entry.
    Entry { step: u16, head: u16 },
    /// The available index, any.
    Index(u16),
    /// The available index, so far beyond what a full ring has, or before it.
    Jump(i16),
}

/// One ring, and chains offered in it round after round.
#[derive(Clone, Debug)]
pub struct RingPlan {
    pub size: u16,
    pub base: u16,
    pub features: u64,
    /// Lengths of the regions behind the first, and gaps before them.
    pub cuts: Vec<(usize, u64)>,
    pub rounds: Vec<Vec<ChainPlan>>,
    /// The driver's used_event (and flags) in each round.
    pub events: Vec<u16>,
    pub seed: u64,
}

fn length() -> impl Strategy<Value = u32> {
    prop_oneof![3 => 0..4u32, 4 => 4..200u32, 3 => 200..2000u32, 1 => 2000..70_000u32]
}

pub fn chain() -> impl Strategy<Value = ChainPlan> {
    let lens = prop_oneof![
        4 => prop::collection::vec(length(), 1..4),
        2 => prop::collection::vec(length(), 1..20),
        1 => prop::collection::vec(0..4u32, 1..80),
    ];
    (lens, prop::option::of(0..4usize)).prop_map(|(lens, table_after)| ChainPlan {
        table_after: table_after.filter(|n| *n < lens.len()),
        lens,
    })
}

pub fn ring() -> impl Strategy<Value = RingPlan> {
    let base = prop_oneof![Just(0), any::<u16>(), 0xff80..=0xffffu16];
    let bits = [features::INDIRECT_DESC, features::MRG_RXBUF, features::VERSION_1, features::EVENT_IDX];
    let features = prop::sample::subsequence(bits.to_vec(), 0..=4)
        .prop_map(|bits| bits.into_iter().fold(0, |all, bit| all | 1u64 << bit));
    let cut = (prop_oneof![1..64usize, 64..0x2_0000usize], prop_oneof![Just(0), Just(1), Just(0x1000u64)]);
    let rounds = prop::collection::vec(prop::collection::vec(chain(), 0..80), 1..4);
    (
        (0..=10u32).prop_map(|log| 1u16 << log),
        base,
        features,
        prop::collection::vec(cut, 0..4),
        rounds,
        prop::collection::vec(any::<u16>(), 4),
        any::<u64>(),
    )
        .prop_map(|(size, base, features, cuts, rounds, events, seed)| RingPlan {
            size,
            base,
            features,
            cuts,
            rounds,
            events,
            seed,
        })
}

pub fn mutation() -> impl Strategy<Value = Mutation> {
    let value = prop_oneof![
        (0..2048u64),
        Just(0),
        any::<u64>(),
        Just(u64::MAX),
        Just(0x1_0000_0000u64),
        (0x1_0001_8000..0x1_0008_2000u64),
    ];
    prop_oneof![
        20 => (0..80usize, 0..5u8, value)
            .prop_map(|(slot, field, value)| Mutation::Descriptor { slot, field, value }),
        3 => (0..80usize, 0..8usize, -1..2i64)
            .prop_map(|(slot, region, by)| Mutation::Edge { slot, region, by }),
        1 => (0..80usize, -1..2i64).prop_map(|(slot, by)| Mutation::Table { slot, by }),
        1 => (0..80u16, any::<u16>()).prop_map(|(step, head)| Mutation::Entry { step, head }),
        2 => (0..80u16, 0..16u16).prop_map(|(step, head)| Mutation::Entry { step, head }),
        1 => any::<u16>().prop_map(Mutation::Index),
        1 => (-2..3i16).prop_map(Mutation::Jump),
    ]
}

impl RingPlan {
    /// Memory of noise, cut into regions, and an empty ring in it.
    pub fn model(&self) -> Model {
        let mut parts = vec![(BUFFERS, 0)];
        let mut left = IMAGE - BUFFERS;
        for (len, gap) in &self.cuts {
            parts.push(((*len).min(left / 2), *gap));
            left -= parts[parts.len() - 1].0;
        }
        parts.push((left, 0));
        Model::new(noise(IMAGE, self.seed), regions(&parts), self.size, self.features, self.base)
    }
}

/// Writes chains the way a driver does.
pub struct Writer {
    free: Vec<u16>,
    avail: u16,
    table: usize,
    buffer: usize,
    /// Where descriptors were written.
    pub slots: Vec<usize>,
}

impl Writer {
    /// For one round; all descriptors are free, in a random order.
    pub fn new(model: &Model, seed: u64) -> Self {
        let mut free: Vec<u16> = (0..model.size).collect();
        let order = noise(free.len(), seed);
        free.sort_by_key(|i| order[usize::from(*i)]);
        Self { free, avail: model.next, table: TABLES, buffer: BUFFERS, slots: Vec::new() }
    }

    /// Offers a chain; false if descriptors or memory are used up.
    pub fn offer(&mut self, model: &mut Model, plan: &ChainPlan, writable: bool) -> bool {
        let table_after = plan.table_after.filter(|_| model.has(features::INDIRECT_DESC));
        let direct = table_after.unwrap_or(plan.lens.len());
        let in_table = plan.lens.len() - direct;
        let bytes: usize = plan.lens.iter().map(|len| *len as usize).sum();
        if direct + 1 > self.free.len()
            || plan.lens.len() > usize::from(model.size)
            || self.table + 16 * in_table > BUFFERS
            || self.buffer + bytes > IMAGE
        {
            return false;
        }
        let mut descriptors = buffers(model, &mut self.buffer, plan, writable);
        let mut table = descriptors.split_off(direct);
        if in_table != 0 {
            let addr = model.guest_addr(self.table);
            let len = 16 * u32::try_from(in_table).unwrap();
            descriptors.push(Descriptor { addr, len, flags: DESC_INDIRECT, next: 0 });
            let places: Vec<u16> = (0..).take(in_table).collect();
            self.link(model, self.table, &mut table, &places);
            // Not all tables are aligned: nothing says that they must be.
            self.table += 16 * in_table + usize::from(self.avail % 3);
        }
        let places = self.free.split_off(self.free.len() - descriptors.len());
        self.link(model, 0, &mut descriptors, &places);
        model.offer(self.avail, places[0]);
        self.avail = self.avail.wrapping_add(1);
        true
    }

    /// Writes descriptors into places of the table at `at`, each referring to the next.
    fn link(&mut self, model: &mut Model, at: usize, descriptors: &mut [Descriptor], places: &[u16]) {
        let count = descriptors.len();
        for (i, descriptor) in descriptors.iter_mut().enumerate() {
            if i + 1 < count {
                descriptor.flags |= DESC_NEXT;
                descriptor.next = places[i + 1];
            }
            let slot = at + 16 * usize::from(places[i]);
            model.put_descriptor(slot, *descriptor);
            self.slots.push(slot);
        }
    }

    pub fn publish(&self, model: &mut Model) {
        model.publish(self.avail);
    }

    /// Breaks something of what was offered.
    pub fn mutate(&self, model: &mut Model, mutation: &Mutation) {
        match *mutation {
            Mutation::Descriptor { slot, field, value } if !self.slots.is_empty() => {
                let at = self.slots[slot % self.slots.len()];
                let mut d = model.descriptor(at);
                set_field(&mut d, field, value, &[1, 2, 4]);
                model.put_descriptor(at, d);
            }
            Mutation::Edge { slot, region, by } if !self.slots.is_empty() => {
                let at = self.slots[slot % self.slots.len()];
                let mut d = model.descriptor(at);
                d.addr = near_the_edge(model, region, d.len, by);
                model.put_descriptor(at, d);
            }
            Mutation::Table { slot, by } if !self.slots.is_empty() => {
                let at = self.slots[slot % self.slots.len()];
                let mut d = model.descriptor(at);
                d.flags = DESC_INDIRECT;
                d.len = u32::try_from(16 * (i64::from(model.size) + by)).unwrap_or(0);
                model.put_descriptor(at, d);
            }
            Mutation::Descriptor { .. } | Mutation::Edge { .. } | Mutation::Table { .. } => {}
            Mutation::Entry { step, head } => {
                let offered = self.avail.wrapping_sub(model.next);
                if offered != 0 {
                    model.offer(model.next.wrapping_add(step % offered), head);
                }
            }
            Mutation::Index(to) => model.publish(to),
            Mutation::Jump(by) => {
                let full = model.next.wrapping_add(model.size);
                model.publish(full.wrapping_add_signed(by));
            }
        }
    }
}

/// Buffers of a chain, one behind the other from `next` on, which moves on.
pub fn buffers(model: &Model, next: &mut usize, plan: &ChainPlan, writable: bool) -> Vec<Descriptor> {
    let flags = if writable { DESC_WRITE } else { 0 };
    let mut descriptors = Vec::new();
    for &len in &plan.lens {
        // A buffer does not lie across a hole, or it would not be well-formed.
        let mut at = *next;
        for edge in model.regions.windows(2) {
            let hole = edge[0].guest + edge[0].len as u64 != edge[1].guest;
            if hole && at < edge[1].offset && at + len as usize > edge[1].offset {
                at = edge[1].offset;
            }
        }
        let len = len.min(u32::try_from(IMAGE.saturating_sub(at)).unwrap());
        at = at.min(IMAGE - 1);
        descriptors.push(Descriptor { addr: model.guest_addr(at), len, flags, next: 0 });
        *next = (at + len as usize).max(*next);
    }
    descriptors
}

/// Another value in a descriptor; field 3 is one of the flags that are named.
pub fn set_field(d: &mut Descriptor, field: u8, value: u64, flags: &[u16]) {
    let bytes = value.to_le_bytes();
    let low = u16::from_le_bytes([bytes[0], bytes[1]]);
    match field {
        0 => d.addr = value,
        1 => d.len = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
        2 => d.flags = low,
        3 => d.flags ^= flags[usize::from(low) % flags.len()],
        _ => d.next = low,
    }
}

/// Where a buffer of `len` begins that ends so far behind the end of a region, or before.
pub fn near_the_edge(model: &Model, region: usize, len: u32, by: i64) -> u64 {
    let region = model.regions[region % model.regions.len()];
    (region.guest + region.len as u64 - u64::from(len)).wrapping_add_signed(by)
}

/// A burst of frames of all lengths, header in front.
pub fn frames(lens: &[usize], seed: u64) -> Vec<Vec<u8>> {
    let frame = |(i, len): (usize, &usize)| {
        let mut frame = noise(12 + len, seed.wrapping_add(i as u64));
        frame[10..12].copy_from_slice(&[1, 0]);
        frame
    };
    lens.iter().enumerate().map(frame).collect()
}

pub fn parts(frame: &[u8]) -> (&[u8; HEADER_LEN], &[u8]) {
    frame.split_first_chunk().unwrap()
}

pub fn frame_lens() -> impl Strategy<Value = Vec<usize>> {
    let len = prop_oneof![4 => 14..130usize, 3 => 130..2000usize, 1 => 2000..65_558usize];
    prop::collection::vec(len, 1..65)
}
