//! The same of a packed ring (virtio 1.2, 2.8), with the real device beside it in shared memory.

use std::ops::Range;

use vring::{
    BURST_MAX, Burst, ChainFault, DESC_INDIRECT, DESC_NEXT, DESC_WRITE, Descriptor, Enqueued, Frames,
    RingFault, RingSetup, RxRing, TxRing, features,
};

use super::{Beside, Model, Placed, Region, Rig, Sent, count, eventfd, frame_of, take, tangled};

/// Descriptor flags (virtio 1.2, 2.8.1).
pub const AVAIL: u16 = 1 << 7;
pub const USED: u16 = 1 << 15;

/// Bursts of one [`Packed::send`]: who writes nonsense may keep a device busy for ever.
const BURSTS: usize = 64;

/// A position: a descriptor and a wrap counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub index: u16,
    pub wrap: bool,
}

impl Place {
    /// As in SET_VRING_BASE and in the event words.
    pub fn of(bits: u16) -> Self {
        Self { index: bits & 0x7fff, wrap: bits & 0x8000 != 0 }
    }

    pub fn bits(self) -> u16 {
        self.index | u16::from(self.wrap) << 15
    }

    /// The position `slots` descriptors on in a ring of `size`, one step after the other.
    pub fn after(self, slots: u16, size: u16) -> Self {
        (0..slots).fold(self, |at, _| match at.index + 1 {
            end if end == size => Self { index: 0, wrap: !at.wrap },
            index => Self { index, ..at },
        })
    }
}

/// A chain that is given back: id, slots, length.
type Given = (u16, u16, u32);

/// A chain that was followed.
struct Chain {
    id: u16,
    slots: u16,
    buffers: Result<Vec<Range<usize>>, ChainFault>,
}

/// The image and the device's place in it. Of the split model it uses memory and buffers only.
pub struct Packed {
    pub rig: Rig,
    /// Of the next chain.
    pub next: Place,
    /// Of the next used element: the same between bursts, since nothing is outstanding.
    pub used: Place,
}

impl Packed {
    /// A ring at the image's beginning, without anything available.
    pub fn new(image: Vec<u8>, regions: Vec<Region>, size: u16, features: u64, base: u16) -> Self {
        let mut model = Model::new(image, regions, size, features | 1 << features::RING_PACKED, 0);
        let events = (16 * usize::from(size)).next_multiple_of(64);
        model.ring = [0, events, events + 64];
        Self { rig: Rig::new(model), next: Place::of(base), used: Place::of(base) }
    }

    pub fn model(&mut self) -> &mut Model {
        &mut self.rig.model
    }

    pub fn size(&self) -> u16 {
        self.rig.model.size
    }

    // --- the driver's part ---

    /// Of the ring or of a table (virtio 1.2, 2.8.13).
    pub fn put_descriptor(&mut self, at: usize, d: Descriptor) {
        // Id and flags have changed places with regard to a split ring.
        self.rig.model.put_descriptor(at, Descriptor { flags: d.next, next: d.flags, ..d });
    }

    pub fn descriptor(&self, at: usize) -> Descriptor {
        let d = self.rig.model.descriptor(at);
        Descriptor { flags: d.next, next: d.flags, ..d }
    }

    /// What the driver wants to be told of: position, flags (virtio 1.2, 2.8.14).
    pub fn put_event(&mut self, at: u16, flags: u16) {
        let events = self.rig.model.ring[1];
        self.rig.model.put16(events, at);
        self.rig.model.put16(events + 2, flags);
    }

    // --- the device's part ---

    /// The first descriptor of the chain at `at`, if it is available. The id is in the last one.
    fn first(&self, at: Place) -> Result<Option<Descriptor>, RingFault> {
        let d = self.descriptor(16 * usize::from(at.index));
        let available = (d.flags & AVAIL != 0) == at.wrap && (d.flags & USED != 0) != at.wrap;
        if available && d.flags & DESC_NEXT == 0 {
            self.check_id(d.next)?;
        }
        Ok(available.then_some(d))
    }

    fn check_id(&self, entry: u16) -> Result<u16, RingFault> {
        let size = self.size();
        if entry < size { Ok(entry) } else { Err(RingFault::Head { entry, size }) }
    }

    /// The chain at `at`, of at most `most` bytes; `read` gets the places of a table's descriptors.
    fn chain(
        &self,
        at: Place,
        writable: bool,
        most: u64,
        read: &mut Vec<Range<usize>>,
    ) -> Result<Chain, RingFault> {
        let mut list = Vec::new();
        let mut place = at;
        loop {
            let d = self.descriptor(16 * usize::from(place.index));
            list.push(d);
            place = place.after(1, self.size());
            if d.flags & DESC_NEXT == 0 || list.len() == usize::from(self.size()) {
                break;
            }
        }
        let id = self.check_id(list[list.len() - 1].next)?;
        let buffers = self.buffers(&list, writable, most, read);
        let slots = u16::try_from(list.len()).unwrap();
        // Descriptors that were only passed are work, too.
        self.rig.model.walked.update(|n| n + u32::from(slots));
        Ok(Chain { id, slots, buffers })
    }

    fn buffers(
        &self,
        list: &[Descriptor],
        writable: bool,
        most: u64,
        read: &mut Vec<Range<usize>>,
    ) -> Result<Vec<Range<usize>>, ChainFault> {
        let model = &self.rig.model;
        let (mut count, mut bytes, mut buffers) = (0, 0, Vec::new());
        let mut add = |d: Descriptor| {
            count += 1;
            if count > model.size {
                return Err(ChainFault::Malformed);
            }
            if (d.flags & DESC_WRITE != 0) != writable {
                return Err(ChainFault::Malformed);
            }
            model.buffer(d, most, &mut bytes, &mut buffers)
        };
        for d in list {
            if d.flags & DESC_INDIRECT == 0 {
                add(*d)?;
                continue;
            }
            let fits = d.len.is_multiple_of(16) && (1..=u32::from(model.size)).contains(&(d.len / 16));
            if !model.has(features::INDIRECT_DESC) || d.flags & DESC_NEXT != 0 || !fits {
                return Err(ChainFault::Malformed);
            }
            for entry in 0..u64::from(d.len / 16) {
                let addr = d.addr.checked_add(16 * entry).ok_or(ChainFault::Unmapped)?;
                let at = model.ranges(addr, 16)?;
                let entry = model.gathered(&at);
                read.extend(at);
                model.walked.update(|n| n + 1);
                // Of its flags WRITE alone means something, and the id nothing (virtio 1.2, 2.8.7).
                add(Descriptor { flags: entry.next & DESC_WRITE, ..entry })?;
            }
        }
        // The ring is at its end, and the chain is not.
        let endless = list[list.len() - 1].flags & DESC_NEXT != 0;
        if endless { Err(ChainFault::Malformed) } else { Ok(buffers) }
    }

    /// Writes one used element (virtio 1.2, 2.8.4 and 2.8.8): the address stays.
    fn set_used(&mut self, at: Place, id: u16, len: u32) {
        let slot = 16 * usize::from(at.index);
        let whose = if at.wrap { AVAIL | USED } else { 0 };
        let flags = whose | if len == 0 { 0 } else { DESC_WRITE };
        let addr = self.descriptor(slot).addr;
        self.put_descriptor(slot, Descriptor { addr, len, flags, next: id });
    }

    /// Gives chains back; whether the driver must be called for it.
    fn give_back(&mut self, chains: &[Given], as_one: bool) -> bool {
        let (mut at, size) = (self.used, self.size());
        let mut passed = Vec::new();
        for (i, &(id, slots, len)) in chains.iter().enumerate() {
            if !as_one {
                self.set_used(at, id, len);
            } else if i + 1 == chains.len() {
                self.set_used(self.used, id, len);
            }
            passed.extend((0..slots).map(|slot| at.after(slot, size)));
            at = at.after(slots, size);
        }
        (self.next, self.used) = (at, at);
        !chains.is_empty() && self.is_wanted(&passed)
    }

    /// Whether the driver wants to hear of one of these positions (virtio 1.2, 2.8.14).
    fn is_wanted(&self, passed: &[Place]) -> bool {
        let events = self.rig.model.ring[1];
        let event = Place::of(self.rig.model.get16(events));
        match self.rig.model.get16(events + 2) & 3 {
            1 => false,
            2 if self.rig.model.has(features::EVENT_IDX) && event.index < self.size() => {
                passed.contains(&event)
            }
            _ => true,
        }
    }

    /// Delivers frames, each with a 12-byte header, to an RX ring.
    fn deliver(&mut self, frames: &[Vec<u8>]) -> Placed {
        let before = (self.rig.model.image.clone(), self.next);
        let mut read = vec![0..self.rig.model.ring[2] + 4];
        let (mut used, mut written, mut done) = (Vec::new(), Vec::new(), Enqueued::default());
        self.rig.model.walked.set(0);
        let mut at = self.next;
        let mut outcome = Ok(());
        for (i, frame) in frames.iter().enumerate() {
            match self.place(frame, at, &mut done, &mut written, &mut read) {
                Ok(Some(taken)) => {
                    at = taken.iter().fold(at, |at, (_, slots, _)| at.after(*slots, self.size()));
                    used.extend(taken);
                }
                Ok(None) => {
                    done.full += u32::try_from(frames.len() - i).unwrap();
                    break;
                }
                Err(fault) => {
                    outcome = Err(fault);
                    break;
                }
            }
        }
        let result = outcome.map(|()| {
            done.call = self.give_back(&used, false);
            done
        });
        if result.is_err() {
            (self.rig.model.image, self.next) = before;
        }
        Placed { result, tangled: tangled(&written, &read), written }
    }

    /// Places one frame; returns the chains that it used up, or `None` if there is none at all.
    fn place(
        &mut self,
        frame: &[u8],
        at: Place,
        done: &mut Enqueued,
        written: &mut Vec<Range<usize>>,
        read: &mut Vec<Range<usize>>,
    ) -> Result<Option<Vec<Given>>, RingFault> {
        let (size, header_len) = (self.size(), self.rig.model.header_len());
        let mut bytes = [&frame[..header_len], &frame[12..]].concat();
        let Some(first) = self.first(at)? else { return Ok(None) };
        let (mut room, mut used) = (Vec::new(), Vec::new());
        let (mut left, mut fault, mut at) = (bytes.len(), None, at);
        if let Some(buffer) = self.rig.model.simple(first, left) {
            room.push(buffer);
            used.push((first.next, 1, u32::try_from(left).unwrap()));
            left = 0;
        }
        while left != 0 && fault.is_none() && (used.is_empty() || self.rig.model.has(features::MRG_RXBUF)) {
            if self.rig.model.walked.get() > u32::from(size) + 4096 {
                if used.is_empty() {
                    done.full += 1;
                    return Ok(Some(used));
                }
                fault = Some(ChainFault::Malformed);
                break;
            }
            if self.first(at)?.is_none() {
                done.full += 1;
                return Ok(Some(Vec::new()));
            }
            let chain = self.chain(at, true, u64::MAX, read)?;
            let before = left;
            match chain.buffers {
                Ok(buffers) => take(buffers, &mut left, &mut room),
                Err(why) => fault = Some(why),
            }
            used.push((chain.id, chain.slots, u32::try_from(before - left).unwrap()));
            at = at.after(chain.slots, size);
        }
        if left == 0 && fault.is_none() {
            self.rig.model.scatter(&mut bytes, used.len(), room, written, done);
            return Ok(Some(used));
        }
        count(fault, done);
        Ok(Some(used.into_iter().map(|(id, slots, _)| (id, slots, 0)).collect()))
    }

    // --- with the device ---

    fn setup(&mut self) -> RingSetup {
        // It polls: no kicks.
        let device = self.rig.model.ring[2];
        self.rig.model.put16(device, 0);
        self.rig.model.put16(device + 2, 1);
        let base = u32::from(self.next.bits()) | u32::from(self.next.bits()) << 16;
        RingSetup { base, ..self.rig.setup(Some(eventfd())) }
    }

    fn check_base(&self, base: u32) {
        let bits = u32::from(self.next.bits());
        assert_eq!(base, bits | bits << 16, "both halves, of {:?}", self.next);
    }

    /// What breaks the ring in the next burst.
    fn first_fault(&self, most: u64) -> Option<RingFault> {
        let mut at = self.next;
        for _ in 0..BURST_MAX {
            match self.first(at) {
                Err(fault) => return Some(fault),
                Ok(None) => return None,
                Ok(Some(_)) => match self.chain(at, false, most, &mut Vec::new()) {
                    Err(fault) => return Some(fault),
                    Ok(chain) => at = at.after(chain.slots, self.size()),
                },
            }
        }
        None
    }
}

impl Beside for Packed {
    fn load(&self) {
        self.rig.load();
    }

    fn start_tx(&mut self) -> TxRing {
        TxRing::start(self.setup(), &self.rig.mapped).unwrap()
    }

    fn start_rx(&mut self) -> RxRing {
        RxRing::start(self.setup(), &self.rig.mapped).unwrap()
    }

    fn send(&mut self, ring: &mut TxRing, frames: &mut Frames) -> Result<Sent, RingFault> {
        let mut sent = Sent::default();
        let most = self.rig.model.longest();
        for _ in 0..BURSTS {
            self.rig.model.walked.set(0);
            let burst = match ring.dequeue(frames) {
                Ok(burst) => burst,
                Err(fault) => {
                    assert_eq!(Some(fault), self.first_fault(most));
                    self.rig.check();
                    return Err(fault);
                }
            };
            let (mut at, mut used) = (self.next, Vec::new());
            for i in 0..burst.burst.len() {
                assert!(
                    self.first(at).expect("a ring in order").is_some(),
                    "chain {i} at {at:?} is not there"
                );
                let chain = self.chain(at, false, most, &mut Vec::new()).expect("a ring in order");
                let expected = chain.buffers.and_then(|buffers| self.rig.model.gather(buffers));
                assert_eq!(frame_of(&burst.burst, i), expected, "chain {i} at {at:?}");
                match expected {
                    Ok((header, frame)) => sent.frames.push([header, frame].concat()),
                    Err(fault) => sent.faults.push(fault),
                }
                at = at.after(chain.slots, self.size());
                used.push((chain.id, chain.slots, 0));
            }
            let more = used.len() < BURST_MAX && self.first(at) != Ok(None);
            assert!(!more || self.rig.model.walked.get() > 4096, "it left {at:?} behind");
            let (none, call) = (used.is_empty(), burst.complete());
            assert_eq!(call, self.give_back(&used, self.rig.model.has(features::IN_ORDER)), "call");
            self.check_base(ring.base());
            self.rig.check();
            if none {
                return Ok(sent);
            }
        }
        Ok(sent)
    }

    fn receive(
        &mut self,
        ring: &mut RxRing,
        burst: &Burst<'_>,
        frames: &[Vec<u8>],
    ) -> Option<Result<Enqueued, RingFault>> {
        let placed = self.deliver(frames);
        let result = ring.enqueue(burst, u64::MAX);
        if placed.tangled {
            return None;
        }
        assert_eq!(result, placed.result);
        if result.is_ok() {
            self.rig.check();
            self.check_base(ring.base());
        } else {
            // Buffers and all used elements but the first may have been written: of them the driver sees none.
            let mut written = placed.written;
            written.push(0..16 * usize::from(self.size()));
            self.rig.check_outside(&written);
            let first = 16 * usize::from(self.used.index);
            let now = &self.rig.image()[first..first + 16];
            assert_eq!(now, &self.rig.model.image[first..first + 16], "the element that makes all visible");
        }
        Some(result)
    }
}
