//! A guest without a kernel: its memory, its rings and its socket, in this process.
//!
//! A [`Peer`] sends and receives carefully: every buffer is used in turn, every byte goes in and out, in whatever
//! [`Shape`] drivers give their buffers. Its call eventfds ([`Bells`]) tell it when to look at its rings again, so that
//! waiting for frames is a test of notifications too.

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use vhost_user::{Bells, FrontEnd, FrontEndError, RingPlace};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;
use vring::driver::{Buffer, DriverMemory, DriverRing};
use vring::{HEADER_LEN, features};

/// How long a peer waits for a frame that must come.
pub const PATIENCE: Duration = Duration::from_secs(30);
/// MQ, RARP, REPLY_ACK, NET_MTU, CONFIGURE_MEM_SLOTS (vhost-user specification, "Protocol features").
pub const PROTOCOL: u64 = 1 << 0 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 15;
/// A modern guest's features.
pub const MODERN: u64 = 1 << features::VERSION_1 | 1 << features::INDIRECT_DESC;
/// The same with mergeable buffers.
pub const MERGEABLE: u64 = MODERN | 1 << features::MRG_RXBUF;

/// Bytes of the virtio-net header of a guest with these features (virtio 1.2, 5.1.6.1).
pub fn header_len(features: u64) -> usize {
    let long = 1 << features::VERSION_1 | 1 << features::MRG_RXBUF;
    if features & long != 0 { HEADER_LEN } else { HEADER_LEN - 2 }
}

/// Pieces of a buffer that is not in one.
const PIECES: usize = 4;
/// Bytes between two pieces, so that nobody can take them for one.
const GAP: usize = 32;
/// Bytes of an indirect table for one buffer.
const TABLE: usize = 16 * PIECES;

/// How the buffers of a guest lie in its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// One descriptor.
    Single,
    /// A chain: virtio-net header, a little, a little more, the rest.
    Chained,
    /// The same in an indirect table.
    Indirect,
}

/// What a peer looks like.
#[derive(Clone, Copy, Debug)]
pub struct PeerConfig {
    /// Queue pairs.
    pub queue_pairs: u16,
    /// Descriptors of each ring.
    pub ring_size: u16,
    /// Features to acknowledge if offered (PROTOCOL_FEATURES is added).
    pub features: u64,
    /// Shape of all its buffers.
    pub shape: Shape,
    /// Bytes of each TX buffer, virtio-net header included.
    pub tx_len: usize,
    /// Bytes of each RX buffer.
    pub rx_len: usize,
}

impl Default for PeerConfig {
    fn default() -> Self {
        Self {
            queue_pairs: 1,
            ring_size: 64,
            features: MODERN,
            shape: Shape::Single,
            tx_len: 2048,
            rx_len: 2048,
        }
    }
}

impl PeerConfig {
    /// Bytes of the virtio-net header.
    pub fn header_len(&self) -> usize {
        header_len(self.features)
    }

    /// Buffers that a ring has room for.
    pub fn buffers(&self) -> u16 {
        match self.shape {
            Shape::Chained => (self.ring_size / 4).max(1),
            Shape::Single | Shape::Indirect => self.ring_size,
        }
    }

    fn slot_len(&self) -> usize {
        (TABLE + self.tx_len.max(self.rx_len) + PIECES * GAP).next_multiple_of(64)
    }
}

/// A connected guest.
pub struct Peer {
    front: FrontEnd,
    memory: Arc<DriverMemory>,
    config: PeerConfig,
    /// Its queue pairs.
    pub pairs: Vec<Pair>,
}

/// Both rings of a queue pair.
pub struct Pair {
    /// Frames to the guest.
    pub rx: Ring,
    /// Frames from it.
    pub tx: Ring,
}

/// A ring and its buffers.
pub struct Ring {
    /// The driver's side.
    pub ring: DriverRing,
    /// Its eventfds.
    pub bells: Bells,
    slots: Slots,
    /// Buffers that are ours.
    free: Vec<u16>,
    /// Buffer behind each head.
    slot_of: Vec<u16>,
}

/// Where buffers are.
#[derive(Clone, Copy)]
struct Slots {
    at: usize,
    slot_len: usize,
    shape: Shape,
    header_len: usize,
}

impl Slots {
    fn table(&self, slot: u16) -> usize {
        self.at + usize::from(slot) * self.slot_len
    }

    /// The pieces of buffer `slot` that hold `len` bytes.
    fn pieces(&self, slot: u16, len: usize, writable: bool) -> ([Buffer; PIECES], usize) {
        let cuts = match self.shape {
            Shape::Single => [usize::MAX; PIECES],
            Shape::Chained | Shape::Indirect => [self.header_len, 40, 333, usize::MAX],
        };
        let mut pieces = [Buffer { offset: 0, len: 0, writable }; PIECES];
        let (mut offset, mut left, mut count) = (self.table(slot) + TABLE, len, 0);
        for (piece, cut) in pieces.iter_mut().zip(cuts) {
            let part = cut.min(left);
            if part == 0 {
                break;
            }
            *piece = Buffer { offset, len: u32::try_from(part).expect("buffers are short"), writable };
            offset += part + GAP;
            left -= part;
            count += 1;
        }
        (pieces, count)
    }
}

impl Ring {
    fn new(ring: DriverRing, bells: Bells, slots: Slots, buffers: u16) -> Self {
        let slot_of = vec![0; usize::from(ring.size())];
        Self { ring, bells, slots, free: (0..buffers).rev().collect(), slot_of }
    }

    fn offer(&mut self, slot: u16, len: usize, writable: bool) {
        let (pieces, count) = self.slots.pieces(slot, len, writable);
        let head = match self.slots.shape {
            Shape::Indirect => self.ring.offer_indirect(self.slots.table(slot), &pieces[..count]),
            _ => self.ring.offer(&pieces[..count]),
        };
        self.slot_of[usize::from(head.expect("as many descriptors as buffers need"))] = slot;
    }

    /// Takes back what the device has used. False if there is nothing.
    fn reclaim(&mut self) -> bool {
        let before = self.free.len();
        while let Some((head, _)) = self.ring.take_used() {
            self.free.push(self.slot_of[usize::from(head)]);
        }
        self.free.len() != before
    }

    /// Makes what was offered visible, and kicks if the device wants that.
    pub fn publish(&mut self) {
        if self.ring.publish() {
            self.bells.kick.write(1).expect("a counter that we alone write to is not full");
        }
    }
}

impl Peer {
    /// Connects to a listening back end, starts and enables all rings. No RX buffer is offered yet.
    pub fn connect(path: impl AsRef<Path>, config: PeerConfig) -> Result<Self, FrontEndError> {
        Self::start(FrontEnd::connect(path)?, config)
    }

    /// The same for a back end that connects to this socket.
    pub fn accept(listener: &UnixListener, config: PeerConfig) -> Result<Self, FrontEndError> {
        Self::start(FrontEnd::accept(listener)?, config)
    }

    fn start(mut front: FrontEnd, config: PeerConfig) -> Result<Self, FrontEndError> {
        front.negotiate(config.features | 1 << features::PROTOCOL_FEATURES, PROTOCOL)?;
        let ring_bytes = DriverRing::bytes(config.ring_size).next_multiple_of(4096);
        let half = (ring_bytes + usize::from(config.buffers()) * config.slot_len()).next_multiple_of(4096);
        let memory = DriverMemory::new(2 * half * usize::from(config.queue_pairs))?;
        front.set_memory(&[(memory.region(), memory.fd())])?;
        let mut peer = Self { front, memory, config, pairs: Vec::new() };
        for pair in 0..config.queue_pairs {
            let rx = peer.start_ring(2 * pair, 2 * half * usize::from(pair), ring_bytes)?;
            let tx = peer.start_ring(2 * pair + 1, half * (2 * usize::from(pair) + 1), ring_bytes)?;
            peer.pairs.push(Pair { rx, tx });
        }
        for index in 0..2 * config.queue_pairs {
            peer.front.enable(index, true)?;
        }
        Ok(peer)
    }

    fn start_ring(&mut self, index: u16, at: usize, ring_bytes: usize) -> Result<Ring, FrontEndError> {
        let size = self.config.ring_size;
        let mut ring = DriverRing::new(&self.memory, at, size, self.front.features());
        ring.want_no_call();
        let place = RingPlace { size, user_addrs: ring.user_addrs(), base: ring.start() };
        let bells = self.front.start_ring(index, place)?;
        let slots = Slots {
            at: at + ring_bytes,
            slot_len: self.config.slot_len(),
            shape: self.config.shape,
            header_len: self.config.header_len(),
        };
        Ok(Ring::new(ring, bells, slots, self.config.buffers()))
    }

    /// The protocol side.
    pub fn front(&mut self) -> &mut FrontEnd {
        &mut self.front
    }

    /// The memory it shares.
    pub fn memory(&self) -> &Arc<DriverMemory> {
        &self.memory
    }

    /// What it looks like.
    pub fn config(&self) -> &PeerConfig {
        &self.config
    }

    /// Offers all RX buffers that are ours, on every queue.
    pub fn offer_all(&mut self) {
        let len = self.config.rx_len;
        for Pair { rx, .. } in &mut self.pairs {
            while let Some(slot) = rx.free.pop() {
                rx.offer(slot, len, true);
            }
            rx.publish();
        }
    }

    /// Puts a frame, given in parts, into the TX ring; visible with the next [`Self::flush`]. False if every buffer is
    /// on its way.
    ///
    /// # Panics
    /// If header and frame are longer than a buffer.
    pub fn send(&mut self, queue: usize, header: &[u8; HEADER_LEN], parts: &[&[u8]]) -> bool {
        let header_len = self.config.header_len();
        let len = header_len + parts.iter().map(|part| part.len()).sum::<usize>();
        assert!(len <= self.config.tx_len, "{len} bytes in a buffer of {}", self.config.tx_len);
        let tx = &mut self.pairs[queue].tx;
        if tx.free.is_empty() {
            tx.reclaim();
        }
        let Some(slot) = tx.free.pop() else { return false };
        let (pieces, count) = tx.slots.pieces(slot, len, false);
        let mut to = pieces[..count].iter().map(|piece| (piece.offset, piece.len as usize));
        let (mut at, mut room) = to.next().unwrap_or_default();
        for mut part in [&header[..header_len]].into_iter().chain(parts.iter().copied()) {
            while !part.is_empty() {
                if room == 0 {
                    (at, room) = to.next().expect("the pieces hold all parts");
                }
                let (now, later) = part.split_at(part.len().min(room));
                self.memory.write(at, now);
                (at, room, part) = (at + now.len(), room - now.len(), later);
            }
        }
        tx.offer(slot, len, false);
        true
    }

    /// Makes what was sent visible.
    pub fn flush(&mut self, queue: usize) {
        self.pairs[queue].tx.publish();
    }

    /// Sends one frame at once.
    pub fn send_now(&mut self, queue: usize, header: &[u8; HEADER_LEN], frame: &[u8]) -> bool {
        let sent = self.send(queue, header, &[frame]);
        self.flush(queue);
        sent
    }

    /// Takes the next frame from queue `queue` and offers its buffers again; [`Self::give_back`] makes them visible.
    /// Its virtio-net header is returned (zeros for what a legacy header does not have).
    pub fn take(&mut self, queue: usize, frame: &mut Vec<u8>) -> Option<[u8; HEADER_LEN]> {
        frame.clear();
        let (header_len, rx_len) = (self.config.header_len(), self.config.rx_len);
        let rx = &mut self.pairs[queue].rx;
        let mut header = [0; HEADER_LEN];
        let (mut taken, mut buffers) = (0, 1);
        while taken < buffers {
            let Some((head, len)) = rx.ring.take_used() else {
                assert!(
                    taken == 0,
                    "a frame of {buffers} buffers is published as a whole, {taken} are there"
                );
                return None;
            };
            let slot = rx.slot_of[usize::from(head)];
            let (pieces, count) = rx.slots.pieces(slot, len as usize, true);
            for piece in &pieces[..count] {
                let at = frame.len();
                frame.resize(at + piece.len as usize, 0);
                self.memory.read(piece.offset, &mut frame[at..]);
            }
            if taken == 0 {
                assert!(frame.len() >= header_len, "{len} bytes used are no frame");
                header[..header_len].copy_from_slice(&frame[..header_len]);
                if self.config.features & 1 << features::MRG_RXBUF != 0 {
                    buffers = u16::from_le_bytes([header[10], header[11]]);
                }
            }
            rx.offer(slot, rx_len, true);
            taken += 1;
        }
        frame.drain(..header_len);
        Some(header)
    }

    /// Makes the buffers of taken frames visible to the device.
    pub fn give_back(&mut self, queue: usize) {
        self.pairs[queue].rx.publish();
    }

    /// Offers again what the device returned from queue `queue`, empty or not, unseen.
    pub fn reoffer(&mut self, queue: usize) {
        let rx = &mut self.pairs[queue].rx;
        rx.reclaim();
        self.offer_all();
    }

    /// The next frame on queue `queue`, if there is one, its buffers given back.
    pub fn receive(&mut self, queue: usize) -> Option<(wire::VnetHeader, Vec<u8>)> {
        let mut frame = Vec::new();
        let header = self.take(queue, &mut frame)?;
        self.give_back(queue);
        Some((wire::VnetHeader::from_bytes(&header), frame))
    }

    /// The next frame on queue `queue`, which must come.
    pub fn expect(&mut self, queue: usize) -> Result<(wire::VnetHeader, Vec<u8>)> {
        let ear = Ear::of([&*self])?;
        let mut got = None;
        ear.wait_until("a frame", &mut [self], |peers| {
            got = peers[0].receive(queue);
            got.is_some()
        })?;
        Ok(got.expect("waited for it"))
    }

    /// Frames of queue `queue` that the device has not yet returned.
    pub fn unused(&mut self, queue: usize) -> usize {
        let tx = &mut self.pairs[queue].tx;
        tx.reclaim();
        usize::from(self.config.buffers()) - tx.free.len()
    }

    /// Asks for calls on all rings. False if the device has used something already.
    fn want_calls(&mut self) -> bool {
        let mut none = true;
        for Pair { rx, tx } in &mut self.pairs {
            none &= rx.ring.want_call();
            none &= tx.ring.want_call();
            none &= !tx.reclaim();
        }
        none
    }

    fn want_no_calls(&mut self) {
        for Pair { rx, tx } in &mut self.pairs {
            rx.ring.want_no_call();
            tx.ring.want_no_call();
        }
    }
}

/// Hears the calls of some peers' rings.
pub struct Ear {
    epoll: Epoll,
}

impl Ear {
    /// Listens to all rings of `peers`. A ring that is set up again has a new call fd: listen anew.
    pub fn of<'a>(peers: impl IntoIterator<Item = &'a Peer>) -> Result<Self> {
        let epoll = Epoll::new()?;
        let pairs = peers.into_iter().flat_map(|peer| &peer.pairs);
        for ring in pairs.flat_map(|pair| [&pair.rx, &pair.tx]) {
            let call: &EventFd = &ring.bells.call;
            // Every call is an edge, so that nobody has to read the counter.
            let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, 0);
            epoll.ctl(ControlOperation::Add, call.as_raw_fd(), event)?;
        }
        Ok(Self { epoll })
    }

    /// Looks, and looks again at every call, until `done`. Fails after [`PATIENCE`] without progress: frames that come
    /// without a call are found by nobody, so a lost notification is a failure, too.
    pub fn wait_until(
        &self,
        what: &str,
        peers: &mut [&mut Peer],
        mut done: impl FnMut(&mut [&mut Peer]) -> bool,
    ) -> Result<()> {
        loop {
            if done(peers) {
                return Ok(());
            }
            let none_missed = peers.iter_mut().fold(true, |none, peer| peer.want_calls() & none);
            if none_missed && !self.hear()? {
                bail!("waited {PATIENCE:?} for {what}: no call came");
            }
            peers.iter_mut().for_each(|peer| peer.want_no_calls());
        }
    }

    /// False if nothing was heard.
    fn hear(&self) -> Result<bool> {
        let began = Instant::now();
        let mut events = [EpollEvent::default(); 8];
        while let Some(left) = PATIENCE.checked_sub(began.elapsed()) {
            let timeout = i32::try_from(left.as_millis())?.max(1);
            match self.epoll.wait(timeout, &mut events) {
                Ok(0) => {}
                Ok(_) => return Ok(true),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(false)
    }
}
