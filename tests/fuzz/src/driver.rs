//! A driver that does what an input says, with the device beside it.

use vring::{Descriptor, Frames, features};

use crate::Input;
use crate::model::packed::{AVAIL, Packed, Place, USED};
use crate::model::{Beside, Model, Region, Rig, noise, regions};

const TABLES: u64 = 0x800;
const BUFFERS: u64 = 0x1000;
const IMAGE: usize = 0x1_0000;

/// A driver of either layout, whose ring lies in three regions.
pub trait Driver {
    type Ring: Beside;

    fn new(input: &mut Input<'_>) -> Self;
    fn ring(&mut self) -> &mut Self::Ring;
    /// One step; false if it is the device's turn.
    fn step(&mut self, input: &mut Input<'_>) -> bool;
}

/// What it sends, chain by chain as the model has it.
pub fn tx<D: Driver>(bytes: &[u8]) {
    let mut input = Input(bytes);
    let mut driver = D::new(&mut input);
    let mut ring = driver.ring().start_tx();
    let mut frames = Frames::default();
    while !input.is_empty() {
        if driver.step(&mut input) {
            continue;
        }
        driver.ring().load();
        if driver.ring().send(&mut ring, &mut frames).is_err() {
            return;
        }
    }
}

/// What is delivered to it.
pub fn rx<D: Driver>(bytes: &[u8]) {
    let mut input = Input(bytes);
    let mut driver = D::new(&mut input);
    let mut ring = driver.ring().start_rx();
    let mut room = Frames::default();
    while !input.is_empty() {
        if driver.step(&mut input) {
            continue;
        }
        driver.ring().load();
        let frames: Vec<_> = (0..1 + input.byte() % 8)
            .map(|i| {
                let mut frame = noise(12 + 14 + usize::from(input.word() % 4096), i.into());
                frame[10..12].copy_from_slice(&[1, 0]);
                frame
            })
            .collect();
        let parts = frames.iter().filter_map(|frame| frame.split_first_chunk());
        let burst = room.load(parts);
        // Buffers over each other: anything may be in them.
        let Some(Ok(_)) = driver.ring().receive(&mut ring, &burst, &frames) else { return };
    }
}

/// Those of the features that the next byte names.
fn choice(input: &mut Input<'_>, known: &[u32]) -> u64 {
    let bits = input.byte();
    (0..).zip(known).filter(|(i, _)| bits >> i & 1 != 0).map(|(_, bit)| 1u64 << bit).sum()
}

/// Three regions, the first with ring and tables.
fn cut(input: &mut Input<'_>) -> Vec<Region> {
    let cut = 1 + usize::from(input.byte()) * 32;
    let gap = u64::from(input.byte() % 3);
    regions(&[(BUFFERS as usize, 0), (cut, gap), (IMAGE - BUFFERS as usize - cut, gap / 2)])
}

pub struct SplitDriver {
    rig: Rig,
    avail: u16,
}

impl Driver for SplitDriver {
    type Ring = Rig;

    fn new(input: &mut Input<'_>) -> Self {
        let size = 1 << (input.byte() % 6);
        let known = [features::INDIRECT_DESC, features::MRG_RXBUF, features::VERSION_1, features::EVENT_IDX];
        let features = choice(input, &known);
        let base = input.word();
        let rig = Rig::new(Model::new(noise(IMAGE, 1), cut(input), size, features, base));
        Self { rig, avail: base }
    }

    fn ring(&mut self) -> &mut Rig {
        &mut self.rig
    }

    fn step(&mut self, input: &mut Input<'_>) -> bool {
        let model = &mut self.rig.model;
        match input.byte() % 6 {
            0 => {
                let slot = u16::from(input.byte()) % model.size;
                let descriptor = descriptor(model, input);
                model.put_descriptor(16 * usize::from(slot), descriptor);
            }
            1 => {
                let slot = usize::from(input.byte());
                let descriptor = descriptor(model, input);
                // Tables are not always aligned.
                model.put_descriptor(TABLES as usize + 15 * (slot % 128), descriptor);
            }
            2 => {
                model.offer(self.avail, u16::from(input.byte()) % (model.size + 1));
                self.avail = self.avail.wrapping_add(1);
            }
            3 => {
                // Mostly what was offered.
                let by = input.byte();
                let by = if by < 240 { 0 } else { i16::from(by) - 248 };
                model.publish(self.avail.wrapping_add_signed(by));
            }
            4 => {
                let at = usize::from(input.word());
                model.image[at] = input.byte();
            }
            _ => return false,
        }
        true
    }
}

fn descriptor(model: &Model, input: &mut Input<'_>) -> Descriptor {
    let (kind, at, len) = (input.byte(), u64::from(input.word()), u32::from(input.word()));
    let flags = u16::from(input.byte());
    let next = u16::from(input.byte());
    let base = model.regions[0].guest;
    let edge = |region: usize| {
        let region = model.regions[region % model.regions.len()];
        region.guest + region.len as u64
    };
    let addr = match kind % 8 {
        0 => base + TABLES + at % (BUFFERS - TABLES),
        1 => base + at % TABLES,
        2 => edge(usize::from(kind >> 3)) - u64::from(len) + at % 3 - 1,
        3 => at.rotate_right(u32::from(kind >> 3)),
        _ => base + BUFFERS + at,
    };
    let len = if kind == 0xff { len.rotate_right(8) } else { len };
    Descriptor { addr, len, flags, next }
}

pub struct PackedDriver {
    packed: Packed,
    avail: Place,
}

impl Driver for PackedDriver {
    type Ring = Packed;

    fn new(input: &mut Input<'_>) -> Self {
        let size = 1 + u16::from(input.byte() % 40);
        let known = [
            features::INDIRECT_DESC,
            features::MRG_RXBUF,
            features::VERSION_1,
            features::EVENT_IDX,
            features::IN_ORDER,
        ];
        let features = choice(input, &known);
        let base = input.word();
        let avail = Place::of(base & 0x8000 | (base & 0x7fff) % size);
        Self { packed: Packed::new(noise(IMAGE, 1), cut(input), size, features, avail.bits()), avail }
    }

    fn ring(&mut self) -> &mut Packed {
        &mut self.packed
    }

    fn step(&mut self, input: &mut Input<'_>) -> bool {
        let size = self.packed.size();
        match input.byte() % 6 {
            // The next descriptor, mostly of this lap.
            0 | 1 => {
                let mut d = descriptor(&self.packed.rig.model, input);
                let whose = if self.avail.wrap { AVAIL } else { USED };
                d.flags = d.flags & 7 | if d.flags & 0xf0 == 0xf0 { AVAIL | USED } else { whose };
                // All ids there are, and one more.
                d.next %= size + 1;
                self.packed.put_descriptor(16 * usize::from(self.avail.index), d);
                self.avail = self.avail.after(1, size);
            }
            2 => {
                let slot = usize::from(input.byte());
                let d = descriptor(&self.packed.rig.model, input);
                self.packed.put_descriptor(TABLES as usize + 15 * (slot % 128), d);
            }
            3 => self.packed.put_event(input.word(), input.byte().into()),
            4 => {
                let at = usize::from(input.word());
                self.packed.rig.model.image[at] = input.byte();
            }
            _ => return false,
        }
        true
    }
}
