//! A guest that drives its rings by hand: descriptors, indices and memory as it likes, lawful or not.
//!
//! ```text
//! memory   ring 0 | ring 1 | ring 2 | ring 3 | ...   to BUFFERS: free for frames, tables and mischief
//! ```

use std::path::Path;
use std::sync::Arc;

use anyhow::{Result, ensure};
use vhost_user::{Bells, FrontEnd, FrontEndError, RingPlace};
use vring::driver::{DriverMemory, DriverRing, GUEST_BASE};
use vring::{DESC_NEXT, DESC_WRITE, Descriptor, HEADER_LEN, features};

use crate::inproc::until;
use crate::peer::{MODERN, PROTOCOL, header_len};

/// Where frames and tables lie: behind four rings of the largest size.
pub const BUFFERS: usize = 8 << 20;
/// Bytes of memory in all, usually.
pub const MEMORY: usize = 16 << 20;

/// What RX buffers hold before the device writes them: see [`Hand::poison`].
pub const POISON: u8 = 0xe7;

/// What a hand-driven guest looks like.
#[derive(Clone, Debug)]
pub struct HandConfig {
    /// Queue pairs.
    pub queue_pairs: u16,
    /// Descriptors of each ring.
    pub size: u16,
    /// Features to acknowledge if offered (PROTOCOL_FEATURES is added).
    pub features: u64,
    /// Bytes of memory.
    pub memory: usize,
    /// Parts of the memory that are regions: offset and length. What is in none is a hole.
    pub regions: Vec<(usize, usize)>,
    /// The file can be truncated.
    pub unsealed: bool,
}

impl Default for HandConfig {
    fn default() -> Self {
        let regions = vec![(0, MEMORY)];
        Self { queue_pairs: 1, size: 64, features: MODERN, memory: MEMORY, regions, unsealed: false }
    }
}

/// A connected guest. Its RX rings are empty.
pub struct Hand {
    front: FrontEnd,
    memory: Arc<DriverMemory>,
    header_len: usize,
    /// RX ring of pair 0, TX ring of pair 0, RX ring of pair 1, ...
    pub rings: Vec<HandRing>,
}

/// A ring and where its driver is.
pub struct HandRing {
    /// The words of the ring.
    pub ring: DriverRing,
    /// Its eventfds.
    pub bells: Bells,
    /// Vring index.
    pub index: u16,
    /// The next available entry to fill; of a packed ring the position of the next descriptor.
    pub avail: u16,
    packed: bool,
}

/// Flags of a descriptor in a packed ring (virtio 1.2, 2.8.1): whose it is, in comparison with a wrap counter.
pub const DESC_AVAIL: u16 = 1 << 7;
/// As [`DESC_AVAIL`].
pub const DESC_USED: u16 = 1 << 15;
/// Wrap counter in a position.
pub const WRAP: u16 = 1 << 15;

/// The position `slots` descriptors on in a packed ring of `size`.
pub fn after(at: u16, slots: u16, size: u16) -> u16 {
    let index = (at & !WRAP) + slots;
    if index < size { at & WRAP | index } else { (at & WRAP ^ WRAP) | (index - size) }
}

/// The flags that make the descriptor at a position available.
pub fn available(at: u16) -> u16 {
    if at & WRAP == 0 { DESC_USED } else { DESC_AVAIL }
}

/// A buffer that the device reads, by its offset in the memory.
pub fn readable(offset: usize, len: u32) -> Descriptor {
    Descriptor { addr: GUEST_BASE + offset as u64, len, flags: 0, next: 0 }
}

/// The same with flags and successor.
pub fn chained(offset: usize, len: u32, flags: u16, next: u16) -> Descriptor {
    Descriptor { flags, next, ..readable(offset, len) }
}

/// A buffer that the device writes.
pub fn writable(offset: usize, len: u32) -> Descriptor {
    Descriptor { flags: DESC_WRITE, ..readable(offset, len) }
}

/// A descriptor as it lies in memory (virtio 1.2, 2.7.5).
pub fn descriptor_bytes(d: Descriptor) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&d.addr.to_le_bytes());
    bytes[8..12].copy_from_slice(&d.len.to_le_bytes());
    bytes[12..14].copy_from_slice(&d.flags.to_le_bytes());
    bytes[14..].copy_from_slice(&d.next.to_le_bytes());
    bytes
}

impl Hand {
    /// Connects, starts and enables all rings.
    pub fn connect(path: impl AsRef<Path>, config: &HandConfig) -> Result<Self, FrontEndError> {
        let mut front = FrontEnd::connect(path)?;
        front.negotiate(config.features | 1 << features::PROTOCOL_FEATURES, PROTOCOL)?;
        let memory = if config.unsealed { DriverMemory::unsealed } else { DriverMemory::new }(config.memory)?;
        let regions: Vec<_> = config.regions.iter().map(|(at, len)| memory.region_of(*at, *len)).collect();
        front.set_memory(&regions.iter().map(|region| (*region, memory.fd())).collect::<Vec<_>>())?;
        let header_len = header_len(config.features);
        let mut hand = Self { front, memory, header_len, rings: Vec::new() };
        for index in 0..2 * config.queue_pairs {
            let ring = hand.start(index, config.size)?;
            hand.rings.push(ring);
        }
        for index in 0..2 * config.queue_pairs {
            hand.front.enable(index, true)?;
        }
        Ok(hand)
    }

    fn start(&mut self, index: u16, size: u16) -> Result<HandRing, FrontEndError> {
        let at = DriverRing::bytes(size).next_multiple_of(4096) * usize::from(index);
        // A ring starts from nothing, also if an earlier one lay here.
        self.memory.write(at, &vec![0; DriverRing::bytes(size)]);
        let mut ring = DriverRing::new(&self.memory, at, size, self.front.features());
        ring.want_no_call();
        let place = RingPlace { size, user_addrs: ring.user_addrs(), base: ring.start() };
        let bells = self.front.start_ring(index, place)?;
        let packed = self.front.features() & 1 << features::RING_PACKED != 0;
        Ok(HandRing { avail: ring.start(), ring, bells, index, packed })
    }

    /// Stops ring `index` and sets it up again, empty.
    pub fn restart(&mut self, index: u16) -> Result<(), FrontEndError> {
        self.resize(index, self.rings[usize::from(index)].ring.size())
    }

    /// The same with another size.
    pub fn resize(&mut self, index: u16, size: u16) -> Result<(), FrontEndError> {
        self.front.stop_ring(index)?;
        self.rings[usize::from(index)] = self.start(index, size)?;
        Ok(())
    }

    /// The protocol side.
    pub fn front(&mut self) -> &mut FrontEnd {
        &mut self.front
    }

    /// The memory it shares.
    pub fn memory(&self) -> &Arc<DriverMemory> {
        &self.memory
    }

    /// The TX ring of the first queue pair.
    pub fn tx(&mut self) -> &mut HandRing {
        &mut self.rings[1]
    }

    /// The RX ring of the first queue pair.
    pub fn rx(&mut self) -> &mut HandRing {
        &mut self.rings[0]
    }

    /// Bytes of its virtio-net headers.
    pub fn header_len(&self) -> usize {
        self.header_len
    }

    /// Writes header and frame to `offset`; returns the descriptor that covers them.
    pub fn put(&self, offset: usize, header: &[u8; HEADER_LEN], frame: &[u8]) -> Descriptor {
        self.memory.write(offset, &header[..self.header_len]);
        self.memory.write(offset + self.header_len, frame);
        readable(offset, u32::try_from(self.header_len + frame.len()).expect("frames are short"))
    }

    /// Sends header and frame by one descriptor on TX ring `index`, and waits until it is used.
    pub fn send(&mut self, index: u16, header: &[u8; HEADER_LEN], frame: &[u8]) -> Result<()> {
        let descriptor = self.put(BUFFERS, header, frame);
        let ring = &mut self.rings[usize::from(index)];
        if ring.packed {
            let at = ring.post_chain(0, &[descriptor]);
            ring.expect_used_at(at)?;
        } else {
            ring.ring.set_descriptor(0, descriptor);
            ring.post(0);
            ring.expect_used()?;
        }
        Ok(())
    }

    /// Fills `len` bytes from [`BUFFERS`] on with [`POISON`].
    pub fn poison(&self, len: usize) {
        self.memory.write(BUFFERS, &vec![POISON; len]);
    }

    /// Bytes of its memory.
    pub fn read(&self, offset: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read(offset, &mut bytes);
        bytes
    }
}

impl HandRing {
    /// Offers the chain that begins with `head`, and kicks.
    pub fn post(&mut self, head: u16) {
        self.post_all(&[head]);
    }

    /// Offers several chains at one go, and kicks.
    pub fn post_all(&mut self, heads: &[u16]) {
        self.post_silently(heads);
        self.kick();
    }

    /// Offers several chains at one go, and says nothing.
    pub fn post_silently(&mut self, heads: &[u16]) {
        for head in heads {
            self.ring.set_avail(self.avail, *head);
            self.avail = self.avail.wrapping_add(1);
        }
        self.ring.publish_avail(self.avail);
    }

    /// Kicks.
    pub fn kick(&self) {
        self.bells.kick.write(1).expect("a counter that we alone write to is not full");
    }

    /// Waits until everything offered is used; returns the last used element: (head, bytes written).
    pub fn expect_used(&self) -> Result<(u32, u32)> {
        until("the used ring", || self.ring.used_idx() == self.avail)?;
        Ok(self.used(self.avail.wrapping_sub(1)))
    }

    /// Used element number `index`.
    pub fn used(&self, index: u16) -> (u32, u32) {
        self.ring.used_before(index.wrapping_neg())
    }

    /// Packed ring: offers a chain with this id, and kicks; returns its position.
    pub fn post_chain(&mut self, id: u16, chain: &[Descriptor]) -> u16 {
        let at = self.post_chains_silently(&[(id, chain)]);
        self.kick();
        at
    }

    /// Packed ring: offers chains with these ids at one go, the first descriptor last, and says nothing. All but the last
    /// descriptor of each get NEXT. Returns the position of the first.
    pub fn post_chains_silently(&mut self, chains: &[(u16, &[Descriptor])]) -> u16 {
        let begin = self.avail;
        let mut first = None;
        for (id, chain) in chains {
            for (i, descriptor) in chain.iter().enumerate() {
                let next = if i + 1 < chain.len() { DESC_NEXT } else { 0 };
                let flags = descriptor.flags | next | available(self.avail);
                let descriptor = Descriptor { flags, next: *id, ..*descriptor };
                if first.is_none() {
                    first = Some(descriptor);
                } else {
                    self.ring.set_packed(self.avail, descriptor);
                }
                self.avail = after(self.avail, 1, self.ring.size());
            }
        }
        if let Some(first) = first {
            self.ring.set_packed(begin, first);
        }
        begin
    }

    /// Packed ring: waits until a descriptor is used; returns (id, bytes written).
    pub fn expect_used_at(&self, at: u16) -> Result<(u16, u32)> {
        let used = if at & WRAP == 0 { 0 } else { DESC_AVAIL | DESC_USED };
        let flags = || self.ring.packed(at).flags & (DESC_AVAIL | DESC_USED);
        until("the descriptor to be used", || flags() == used)?;
        let descriptor = self.ring.packed(at);
        Ok((descriptor.next, descriptor.len))
    }

    /// Waits for the signal that the ring broke.
    pub fn expect_broken(&self) -> Result<()> {
        until("the error eventfd", || self.bells.err.read().is_ok())
    }

    /// Fails if the signal that the ring broke was given.
    pub fn ensure_whole(&self) -> Result<()> {
        ensure!(self.bells.err.read().is_err(), "ring {} broke", self.index);
        Ok(())
    }
}
