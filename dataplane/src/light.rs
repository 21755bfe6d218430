//! A light front end: memory, rings and a socket, but no guest. For tests, benches and the demo.
//!
//! It has two ways of moving frames. *Carefully*, [`LightGuest::send`] and [`LightGuest::receive`] carry bytes in and out
//! and use every buffer in turn. *Lightly*, after [`LightGuest::load`], [`LightGuest::recycle`] hands back whole bursts
//! without touching a payload: the front end then costs a few cycles a frame, so that a measurement shows the back end.
//! A guest does one or the other.

use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;

use vhost_user::frontend::{Bells, FrontEnd, FrontEndError, RingPlace};
use vring::driver::{Buffer, DriverMemory, DriverRing};
use vring::{HEADER_LEN, features};

/// What a light front end looks like.
#[derive(Clone, Debug)]
pub struct LightConfig {
    /// Queue pairs.
    pub queue_pairs: u16,
    /// Descriptors of each ring.
    pub ring_size: u16,
    /// Bytes of each buffer, virtio-net header included.
    pub buffer_len: u32,
    /// Bytes between two buffers. Without any, buffers of a power of two share few sets of a cache.
    pub buffer_gap: u32,
    /// If not 0: [`LightGuest::recycle`] numbers the frames that it sends, 0 up to this and again, in the last three
    /// bytes of both addresses, as if so many stations of each side talked in pairs. Split rings only.
    pub stations: u32,
    /// Features to acknowledge if offered (PROTOCOL_FEATURES is added).
    pub features: u64,
    /// Protocol features to acknowledge if offered.
    pub protocol_features: u64,
}

impl Default for LightConfig {
    fn default() -> Self {
        Self {
            queue_pairs: 1,
            ring_size: 256,
            buffer_len: 2048,
            // As DPDK's buffers lie.
            buffer_gap: 256,
            stations: 0,
            features: 1 << features::VERSION_1 | 1 << features::MRG_RXBUF | 1 << features::IN_ORDER,
            // MQ, REPLY_ACK, CONFIGURE_MEM_SLOTS.
            protocol_features: 1 << 0 | 1 << 3 | 1 << 15,
        }
    }
}

/// One queue pair of a light front end.
pub struct LightPair {
    /// Frames to it.
    pub rx: DriverRing,
    /// Frames from it.
    pub tx: DriverRing,
    /// Its eventfds.
    pub rx_bells: Bells,
    /// Its eventfds.
    pub tx_bells: Bells,
    /// Where buffer 0 of each ring is.
    rx_buffers: usize,
    tx_buffers: usize,
    /// The station whose frame is next, and the TX buffer it will be in.
    station: u32,
    station_buffer: u16,
    /// TX buffers that are not on their way.
    tx_free: Vec<u16>,
    /// Buffer behind each head.
    tx_buffer_of: Vec<u16>,
    rx_buffer_of: Vec<u16>,
}

/// A light front end, connected, its rings running.
pub struct LightGuest {
    front: FrontEnd,
    memory: Arc<DriverMemory>,
    buffer_len: u32,
    /// Bytes from one buffer to the next.
    stride: usize,
    stations: u32,
    /// Its queue pairs.
    pub pairs: Vec<LightPair>,
}

impl LightGuest {
    /// Connects to a listening back end and starts its rings.
    pub fn connect(path: impl AsRef<Path>, config: &LightConfig) -> Result<Self, FrontEndError> {
        Self::start(FrontEnd::connect(path)?, config)
    }

    /// Waits for a back end that connects to us, and starts its rings.
    pub fn accept(listener: &UnixListener, config: &LightConfig) -> Result<Self, FrontEndError> {
        Self::start(FrontEnd::accept(listener)?, config)
    }

    fn start(mut front: FrontEnd, config: &LightConfig) -> Result<Self, FrontEndError> {
        let features = config.features | 1 << features::PROTOCOL_FEATURES;
        let features = front.negotiate(features, config.protocol_features)?;
        let layout = Layout::new(config);
        let memory = DriverMemory::huge(layout.pair_bytes * usize::from(config.queue_pairs))?;
        front.set_memory(&[(memory.region(), memory.fd())])?;
        let mut guest = Self {
            front,
            memory,
            buffer_len: config.buffer_len,
            stride: layout.stride,
            stations: config.stations,
            pairs: Vec::new(),
        };
        for n in 0..config.queue_pairs {
            let pair = guest.start_pair(n, &layout, config.ring_size, features)?;
            guest.pairs.push(pair);
        }
        for index in 0..2 * config.queue_pairs {
            guest.front.enable(index, true)?;
        }
        Ok(guest)
    }

    fn start_pair(
        &mut self,
        n: u16,
        layout: &Layout,
        size: u16,
        features: u64,
    ) -> Result<LightPair, FrontEndError> {
        let at = layout.pair_bytes * usize::from(n);
        let mut rx = DriverRing::new(&self.memory, at, size, features);
        let mut tx = DriverRing::new(&self.memory, at + layout.ring_bytes, size, features);
        rx.want_no_call();
        tx.want_no_call();
        let place = |ring: &DriverRing| RingPlace { size, user_addrs: ring.user_addrs(), base: ring.start() };
        let rx_bells = self.front.start_ring(2 * n, place(&rx))?;
        let tx_bells = self.front.start_ring(2 * n + 1, place(&tx))?;
        let rx_buffers = at + 2 * layout.ring_bytes;
        Ok(LightPair {
            rx,
            tx,
            rx_bells,
            tx_bells,
            rx_buffers,
            tx_buffers: rx_buffers + layout.buffers_bytes,
            station: 0,
            station_buffer: 0,
            tx_free: (0..size).rev().collect(),
            tx_buffer_of: vec![0; usize::from(size)],
            rx_buffer_of: vec![0; usize::from(size)],
        })
    }

    /// The protocol side, for whatever else is to be said.
    pub fn front(&mut self) -> &mut FrontEnd {
        &mut self.front
    }

    /// The shared memory.
    pub fn memory(&self) -> &Arc<DriverMemory> {
        &self.memory
    }

    /// Offers every RX buffer of every pair.
    pub fn offer_all(&mut self) {
        for pair in &mut self.pairs {
            for i in 0..pair.rx.size() {
                pair.offer_rx(i, self.buffer_len, self.stride);
            }
            pair.publish_rx();
        }
    }

    /// Sends one frame on queue `queue`. False if every TX buffer is on its way.
    ///
    /// # Panics
    /// If header and frame are longer than a buffer.
    pub fn send(&mut self, queue: usize, header: &[u8; HEADER_LEN], frame: &[u8]) -> bool {
        let len = HEADER_LEN + frame.len();
        assert!(
            len <= self.buffer_len as usize,
            "a frame of {} in a buffer of {}",
            frame.len(),
            self.buffer_len
        );
        let pair = &mut self.pairs[queue];
        while let Some((head, _)) = pair.tx.take_used() {
            pair.tx_free.push(pair.tx_buffer_of[usize::from(head)]);
        }
        let Some(buffer) = pair.tx_free.pop() else { return false };
        let offset = pair.tx_buffers + usize::from(buffer) * self.stride;
        self.memory.write(offset, header);
        self.memory.write(offset + HEADER_LEN, frame);
        let len = u32::try_from(len).expect("checked against a 32-bit length above");
        let head = pair.tx.offer(&[Buffer { offset, len, writable: false }]);
        let head = head.expect("as many descriptors as buffers");
        pair.tx_buffer_of[usize::from(head)] = buffer;
        pair.publish_tx();
        true
    }

    /// Takes the next frame from queue `queue` into `bytes`, its virtio-net header before it, and gives the buffers
    /// back. False if there is none.
    pub fn receive(&mut self, queue: usize, bytes: &mut Vec<u8>) -> bool {
        bytes.clear();
        let (mut more, mut taken) = (1u16, 0);
        while more != 0 {
            let pair = &mut self.pairs[queue];
            let Some((head, len)) = pair.rx.take_used() else {
                assert!(taken == 0, "a merged frame is published as a whole");
                return false;
            };
            let buffer = pair.rx_buffer_of[usize::from(head)];
            let offset = pair.rx_buffers + usize::from(buffer) * self.stride;
            let at = bytes.len();
            bytes.resize(at + len as usize, 0);
            self.memory.read(offset, &mut bytes[at..]);
            pair.offer_rx(buffer, self.buffer_len, self.stride);
            if taken == 0 {
                let count = bytes.get(10..HEADER_LEN).map_or(1, |b| u16::from_le_bytes([b[0], b[1]]));
                more = count.max(1);
            }
            taken += 1;
            more -= 1;
        }
        self.pairs[queue].publish_rx();
        true
    }

    /// Fills every TX buffer with one of `frames` in turn, and offers all buffers of all rings: for [`Self::recycle`].
    /// Without frames it offers RX buffers only.
    pub fn load(&mut self, frames: &[Vec<u8>]) {
        let stride = self.stride;
        for pair in &mut self.pairs {
            let mut lengths = Vec::new();
            for (i, frame) in frames.iter().cycle().take(pair.tx.size().into()).enumerate() {
                let offset = pair.tx_buffers + i * stride;
                self.memory.write(offset, &[0; HEADER_LEN]);
                self.memory.write(offset + HEADER_LEN, frame);
                lengths.push(u32::try_from(HEADER_LEN + frame.len()).expect("frames are short"));
            }
            let (rx_buffers, tx_buffers) = (pair.rx_buffers, pair.tx_buffers);
            pair.rx.fill(self.buffer_len, true, |i| rx_buffers + usize::from(i) * stride);
            pair.publish_rx();
            if frames.is_empty() {
                continue;
            }
            pair.tx.fill_each(|i| Buffer {
                offset: tx_buffers + usize::from(i) * stride,
                len: lengths[usize::from(i)],
                writable: false,
            });
            pair.publish_tx();
        }
    }

    /// Gives back all that the back end has used. Returns (frames sent, buffers filled) since the last call.
    #[inline]
    pub fn recycle(&mut self) -> (u64, u64) {
        let (mut sent, mut filled) = (0, 0);
        for pair in &mut self.pairs {
            if self.stations != 0 {
                pair.number_frames(&self.memory, self.stride, self.stations);
            }
            let tx = pair.tx.recycle();
            if tx != 0 && pair.tx.kick_wanted_after(tx) {
                let _ = pair.tx_bells.kick.write(1);
            }
            sent += u64::from(tx);
            filled += u64::from(pair.rx.recycle());
        }
        (sent, filled)
    }
}

impl LightPair {
    fn offer_rx(&mut self, buffer: u16, buffer_len: u32, stride: usize) {
        let offset = self.rx_buffers + usize::from(buffer) * stride;
        let head = self.rx.offer(&[Buffer { offset, len: buffer_len, writable: true }]);
        let head = head.expect("as many descriptors as buffers");
        self.rx_buffer_of[usize::from(head)] = buffer;
    }

    /// Writes addresses into the frames that have come back. More may come back before they are sent again: those keep
    /// the addresses they had.
    fn number_frames(&mut self, memory: &DriverMemory, stride: usize, stations: u32) {
        let back = self.tx.used_idx();
        while self.station_buffer != back {
            // A split ring's size is a power of two.
            let buffer = usize::from(self.station_buffer & (self.tx.size() - 1));
            let frame = self.tx_buffers + buffer * stride + HEADER_LEN;
            let number = &self.station.to_be_bytes()[1..];
            memory.write(frame + 3, number);
            memory.write(frame + 9, number);
            self.station = if self.station + 1 < stations { self.station + 1 } else { 0 };
            self.station_buffer = self.station_buffer.wrapping_add(1);
        }
    }

    fn publish_rx(&mut self) {
        if self.rx.publish() {
            let _ = self.rx_bells.kick.write(1);
        }
    }

    fn publish_tx(&mut self) {
        if self.tx.publish() {
            let _ = self.tx_bells.kick.write(1);
        }
    }
}

/// How a light front end's memory is divided.
struct Layout {
    ring_bytes: usize,
    stride: usize,
    buffers_bytes: usize,
    pair_bytes: usize,
}

impl Layout {
    fn new(config: &LightConfig) -> Self {
        let ring_bytes = DriverRing::bytes(config.ring_size).next_multiple_of(4096);
        let stride = config.buffer_len as usize + config.buffer_gap as usize;
        let buffers_bytes = usize::from(config.ring_size) * stride;
        let pair_bytes = (2 * ring_bytes + 2 * buffers_bytes).next_multiple_of(4096);
        Self { ring_bytes, stride, buffers_bytes, pair_bytes }
    }
}
