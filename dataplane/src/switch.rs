//! The learning switch of a network, and a burst's way through it.
//!
//! [`forward`] makes three short passes over a burst: classify every frame (header, addresses, FDB: all on private
//! bytes), then, for each destination, collect the frames that go there and deliver them at one go. Frames to one
//! destination keep their order, so a flow keeps its order. Flooding is a frame with every destination but its own.
//!
//! Between classify and collect is the place for a policy stage, which is empty today.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use vring::{BURST_MAX, Burst, ChainFault};
use wire::{Mac, Offloads, VnetHeader};

use crate::counters::RingCounters;
use crate::deliver::Deliverer;
use crate::drops::DropReason;
use crate::fdb::{Fdb, PORTS_MAX};
use crate::port::Port;

/// Ports of a network by slot. A snapshot: changed by replacing it.
pub(crate) type PortTable = Vec<Option<Arc<Port>>>;

/// An L2 segment: ports that reach each other, and an FDB.
pub(crate) struct Network {
    pub(crate) name: String,
    pub(crate) fdb: Fdb,
    table: RwLock<Arc<PortTable>>,
    /// Grows with each change of `table`: workers compare it once a burst instead of taking the lock.
    generation: AtomicU64,
    /// Serialises changes.
    changing: Mutex<()>,
}

impl Network {
    pub(crate) fn new(name: String) -> Self {
        Self {
            name,
            fdb: Fdb::new(),
            table: RwLock::new(Arc::new(Vec::new())),
            generation: AtomicU64::new(1),
            changing: Mutex::new(()),
        }
    }

    #[inline]
    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    pub(crate) fn table(&self) -> Arc<PortTable> {
        self.table.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Puts the port that `make` makes for a free slot into the table. `None` if the network is full.
    pub(crate) fn add(&self, make: impl FnOnce(u16) -> Arc<Port>) -> Option<Arc<Port>> {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut table = PortTable::clone(&self.table());
        let slot = table.iter().position(Option::is_none).unwrap_or(table.len());
        let number = u16::try_from(slot).ok().filter(|_| slot < PORTS_MAX)?;
        if slot == table.len() {
            table.push(None);
        }
        let port = make(number);
        table[slot] = Some(port.clone());
        self.replace(table);
        Some(port)
    }

    /// Takes a port out, and its addresses out of the FDB.
    pub(crate) fn remove(&self, slot: u16) {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut table = PortTable::clone(&self.table());
        if let Some(place) = table.get_mut(usize::from(slot)) {
            *place = None;
        }
        self.replace(table);
        self.fdb.sweep(0, u32::MAX, |port| port == slot);
    }

    fn replace(&self, table: PortTable) {
        *self.table.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(table);
        self.generation.fetch_add(1, Ordering::Release);
    }
}

/// Where a frame goes, as a number: a slot, or one of these.
const FLOOD: u16 = u16::MAX;
const DROPPED: u16 = u16::MAX - 1;

/// Where the frames of a burst come from.
pub(crate) struct Ingress<'a> {
    pub(crate) port: &'a Arc<Port>,
    pub(crate) table: &'a PortTable,
    /// Counters of the ring they came from.
    pub(crate) counters: &'a RingCounters,
    /// Offloads that the sender may ask for.
    pub(crate) sends: Offloads,
    /// Coarse clock, seconds.
    pub(crate) now_s: u32,
}

/// Takes a burst through the switch: every frame is delivered, flooded or counted as dropped. Returns the number of
/// frames that entered.
#[inline]
pub(crate) fn forward(ingress: &Ingress<'_>, burst: &mut Burst<'_>, deliverer: &mut Deliverer) -> u64 {
    let mut class = Classifier::new(ingress);
    let mut to = [DROPPED; BURST_MAX];
    let count = burst.len();
    for (i, to) in to.iter_mut().enumerate().take(count) {
        *to = class.classify(burst, i);
    }
    let to = &to[..count];
    ingress.counters.burst(class.frames, class.bytes, class.gso_frames);
    deliverer.plain = class.offloads == 0;
    if class.flooded {
        flood(ingress, burst, to, deliverer);
    } else {
        unicast(ingress, burst, to, deliverer);
    }
    class.frames
}

/// No frame of the burst is flooded: visits each destination once.
#[inline]
fn unicast(ingress: &Ingress<'_>, burst: &Burst<'_>, to: &[u16], deliverer: &mut Deliverer) {
    // A bit for each frame that is still to be delivered.
    let mut left = to.iter().enumerate().fold(0u64, |bits, (i, to)| bits | u64::from(*to != DROPPED) << i);
    while left != 0 {
        let first = left.trailing_zeros() as usize;
        let slot = to[first];
        let mut select = [0u16; BURST_MAX];
        let mut selected = 0;
        for (i, to) in (0u16..).zip(to).skip(first) {
            if *to == slot {
                left &= !(1 << i);
                select[selected] = i;
                selected += 1;
            }
        }
        deliver_to(ingress, burst, slot, &select[..selected], deliverer);
    }
}

/// At least one frame goes to every port: visits every port of the network, so that order holds between a flow's
/// flooded and its first unicast frames.
#[inline(never)]
fn flood(ingress: &Ingress<'_>, burst: &Burst<'_>, to: &[u16], deliverer: &mut Deliverer) {
    let mut others = false;
    for port in ingress.table.iter().flatten() {
        if port.slot == ingress.port.slot {
            continue;
        }
        others = true;
        let mut select = [0u16; BURST_MAX];
        let mut selected = 0;
        for (i, to) in (0u16..).zip(to) {
            if *to == port.slot || *to == FLOOD {
                select[selected] = i;
                selected += 1;
            }
        }
        deliverer.deliver(port, burst, &select[..selected]);
    }
    if !others {
        let lonely = to.iter().filter(|to| **to == FLOOD).count() as u64;
        ingress.counters.drop(DropReason::NoDestination, lonely);
    }
}

#[inline]
fn deliver_to(
    ingress: &Ingress<'_>,
    burst: &Burst<'_>,
    slot: u16,
    select: &[u16],
    deliverer: &mut Deliverer,
) {
    match ingress.table.get(usize::from(slot)) {
        Some(Some(port)) => deliverer.deliver(port, burst, select),
        // The port was removed after the look-up: its addresses are on their way out of the FDB.
        _ => ingress.counters.drop(DropReason::PortDraining, select.len() as u64),
    }
}

/// Decides frame by frame; remembers the last pair of addresses, since frames come in flows.
struct Classifier<'a, 'b> {
    ingress: &'a Ingress<'b>,
    frame_max: u32,
    last_src: Mac,
    last_dst: Mac,
    last_to: u16,
    frames: u64,
    bytes: u64,
    gso_frames: u64,
    /// Frames with a header that asks for something.
    offloads: u64,
    flooded: bool,
}

impl<'a, 'b> Classifier<'a, 'b> {
    fn new(ingress: &'a Ingress<'b>) -> Self {
        Self {
            ingress,
            frame_max: ingress.port.frame_max(),
            last_src: Mac::ZERO,
            last_dst: Mac::ZERO,
            last_to: DROPPED,
            frames: 0,
            bytes: 0,
            gso_frames: 0,
            offloads: 0,
            flooded: false,
        }
    }

    #[inline]
    fn classify(&mut self, burst: &mut Burst<'_>, index: usize) -> u16 {
        self.frames += 1;
        match self.destination(burst, index) {
            Ok(to) => {
                self.bytes += u64::from(burst.frame_len(index));
                self.flooded |= to == FLOOD;
                to
            }
            Err(reason) => {
                self.ingress.counters.drop(reason, 1);
                DROPPED
            }
        }
    }

    #[inline]
    fn destination(&mut self, burst: &mut Burst<'_>, index: usize) -> Result<u16, DropReason> {
        if let Some(fault) = burst.fault(index) {
            return Err(reason_of(fault));
        }
        let gso = self.check_header(burst, index)?;
        if burst.frame_len(index) > self.frame_max && !gso {
            return Err(DropReason::MtuExceeded);
        }
        let Some(&addresses) = burst.prefix(index).first_chunk::<12>() else {
            return Err(DropReason::Runt);
        };
        let [dst, src] = [0, 6].map(|at| Mac::new(*addresses[at..].first_chunk().expect("12 bytes")));
        if src != self.last_src {
            self.learn(src)?;
        }
        if dst == self.last_dst && !self.last_dst.is_zero() {
            return self.hairpin_checked(self.last_to);
        }
        let to = self.look_up(dst)?;
        (self.last_dst, self.last_to) = (dst, to);
        self.hairpin_checked(to)
    }

    /// Makes the header true; returns whether the frame is to be segmented by whoever cannot take it whole.
    #[inline]
    fn check_header(&mut self, burst: &mut Burst<'_>, index: usize) -> Result<bool, DropReason> {
        let bytes = burst.header(index);
        let header = VnetHeader::from_bytes(bytes);
        if header.is_plain() {
            // Fields that mean nothing without a flag are not passed on.
            if bytes[2..10] != [0; 8] {
                burst.set_header(index, &VnetHeader::PLAIN.to_bytes());
            }
            return Ok(false);
        }
        self.check_offload(burst, index, header)
    }

    #[inline(never)]
    fn check_offload(
        &mut self,
        burst: &mut Burst<'_>,
        index: usize,
        header: VnetHeader,
    ) -> Result<bool, DropReason> {
        let len = burst.frame_len(index) as usize;
        let checked = header.check(len, burst.prefix(index), self.ingress.sends);
        let checked = checked.map_err(|_| DropReason::BadOffload)?;
        burst.set_header(index, &checked.to_bytes());
        self.offloads += u64::from(!checked.is_plain());
        self.gso_frames += u64::from(checked.is_gso());
        Ok(checked.is_gso())
    }

    /// A source address not seen in the frame before.
    #[inline]
    fn learn(&mut self, src: Mac) -> Result<(), DropReason> {
        if src.is_multicast() || src.is_zero() {
            return Err(DropReason::BadSource);
        }
        let port = self.ingress.port;
        port.network.fdb.learn(src, port.slot, self.ingress.now_s, port.fdb_max);
        self.last_src = src;
        Ok(())
    }

    #[inline]
    fn look_up(&self, dst: Mac) -> Result<u16, DropReason> {
        if dst.is_multicast() {
            // IEEE 802.1Q, 8.6.3: frames to these addresses are never relayed by a bridge.
            return if dst.is_link_local_group() { Err(DropReason::LinkLocal) } else { Ok(FLOOD) };
        }
        Ok(self.ingress.port.network.fdb.lookup(dst).unwrap_or(FLOOD))
    }

    #[inline]
    fn hairpin_checked(&self, to: u16) -> Result<u16, DropReason> {
        if to == self.ingress.port.slot { Err(DropReason::Hairpin) } else { Ok(to) }
    }
}

fn reason_of(fault: ChainFault) -> DropReason {
    match fault {
        ChainFault::Malformed => DropReason::GuestDescriptorInvalid,
        ChainFault::Unmapped => DropReason::GuestUnmappedAddress,
        ChainFault::Short => DropReason::Runt,
        ChainFault::Long => DropReason::MtuExceeded,
    }
}
