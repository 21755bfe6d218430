//! The learning switch of a network, and a burst's way through it.
//!
//! [`forward`] makes three short passes over a burst: classify every frame (header, addresses, FDB: all on private
//! bytes), then, for each destination, collect the frames that go there and deliver them at one go. Frames to one
//! destination keep their order, so a flow keeps its order. Flooding is a frame with every destination but its own.
//!
//! A guest's [`Policy`], if it has one, is asked first, frame by frame.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use vring::{BURST_MAX, Burst, ChainFault};
use wire::{Mac, Offloads, VnetHeader};

use crate::counters::RingCounters;
use crate::deliver::Deliverer;
use crate::drops::DropReason;
use crate::fdb::{Fdb, PORTS_MAX};
use crate::policy::Policy;
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

    /// Lets go of all ports, when nobody polls them any more.
    pub(crate) fn clear(&self) {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        self.replace(Vec::new());
    }

    fn replace(&self, table: PortTable) {
        *self.table.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(table);
        self.generation.fetch_add(1, Ordering::Release);
    }
}

/// Where a frame goes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum To {
    /// The port in this slot.
    Port(u16),
    /// Every port but the sender's.
    Flood,
}

/// What a frame's virtio-net header asks for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Plain,
    Checksum,
    /// To be segmented by whoever cannot take it whole.
    Gso,
}

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
    class.classify(burst);
    let frames = burst.len() as u64;
    ingress.counters.burst_alone(frames, class.bytes, class.gso_frames);
    deliverer.plain = class.offloads == 0;
    deliverer.longest = class.longest;
    if class.flooded == 0 {
        for (slot, select) in class.groups() {
            match ingress.table.get(usize::from(*slot)) {
                Some(Some(port)) => deliverer.deliver(port, burst, *select),
                // The port was removed after the look-up: its addresses are on their way out of the FDB.
                _ => ingress.counters.drop(DropReason::PortDraining, select.count_ones().into()),
            }
        }
    } else {
        flood(ingress, burst, &class, deliverer);
    }
    frames
}

/// At least one frame goes to every port: visits every port of the network, so that order holds between a flow's
/// flooded and its first unicast frames.
#[inline(never)]
fn flood(ingress: &Ingress<'_>, burst: &Burst<'_>, class: &Classifier<'_, '_>, deliverer: &mut Deliverer) {
    let mut others = false;
    for port in ingress.table.iter().flatten().filter(|port| port.slot != ingress.port.slot) {
        others = true;
        let own = class.groups().iter().find(|(slot, _)| *slot == port.slot);
        deliverer.deliver(port, burst, class.flooded | own.map_or(0, |(_, select)| *select));
    }
    if !others {
        ingress.counters.drop(DropReason::NoDestination, class.flooded.count_ones().into());
    }
}

/// Decides frame by frame. Frames come in flows: one with the header and the addresses of the frame before goes where that
/// went, and no more is asked. Sets of frames are words with a bit a frame.
struct Classifier<'a, 'b> {
    ingress: &'a Ingress<'b>,
    policy: Option<&'a Policy>,
    frame_max: u32,
    last_src: Mac,
    last_dst: Mac,
    last_to: To,
    bytes: u64,
    gso_frames: u64,
    /// Frames with a header that asks for something.
    offloads: u64,
    /// Longest frame that is not to be segmented, bytes.
    longest: u32,
    flooded: u64,
    /// Slots, and the frames that go there; the first `groups_len`.
    groups: [(u16, u64); BURST_MAX],
    groups_len: usize,
}

impl<'a, 'b> Classifier<'a, 'b> {
    fn new(ingress: &'a Ingress<'b>) -> Self {
        Self {
            ingress,
            policy: ingress.port.guest().and_then(|guest| guest.policy.as_ref()),
            frame_max: ingress.port.frame_max(),
            last_src: Mac::ZERO,
            // An address that is nobody's: a frame to it is flooded, as the initial `last_to` says.
            last_dst: Mac::ZERO,
            last_to: To::Flood,
            bytes: 0,
            gso_frames: 0,
            offloads: 0,
            longest: 0,
            flooded: 0,
            groups: [(0, 0); BURST_MAX],
            groups_len: 0,
        }
    }

    /// Destinations, and the frames that go there.
    fn groups(&self) -> &[(u16, u64)] {
        &self.groups[..self.groups_len.min(BURST_MAX)]
    }

    #[inline]
    fn classify(&mut self, burst: &mut Burst<'_>) {
        let mut left = burst.valid();
        if burst.len() != left.count_ones() as usize {
            self.count_faults(burst);
        }
        while left != 0 {
            let index = left.trailing_zeros() as usize % BURST_MAX;
            let len = burst.frame_len(index);
            match self.destination(burst, index, len) {
                Ok((to, plain)) => {
                    let (same, bytes) = match (plain, self.policy) {
                        (true, None) => self.like::<false>(burst, index, left),
                        (true, Some(_)) => self.like::<true>(burst, index, left),
                        (false, _) => (1 << index, 0),
                    };
                    self.bytes += u64::from(len) + bytes;
                    self.send(to, same);
                    left &= !same;
                }
                Err(reason) => {
                    self.ingress.counters.drop(reason, 1);
                    left &= left - 1;
                }
            }
        }
    }

    /// The frames of `left` from `first` on that need no decision of their own: header and addresses, and what a policy
    /// asks of most, are the same, and the first is plain and was accepted. Also gives the bytes of all but the first.
    #[inline]
    fn like<const POLICY: bool>(&mut self, burst: &Burst<'_>, first: usize, left: u64) -> (u64, u64) {
        let lead = burst.lead(first);
        let (mut same, mut bytes) = (1u64 << first, 0u64);
        let gist = if POLICY { Policy::gist(burst.prefix(first)) } else { None };
        if POLICY && gist.is_none() {
            return (same, bytes);
        }
        let (frame_max, mut longest) = (self.frame_max, self.longest);
        let mut rest = left & left.wrapping_sub(1);
        while rest != 0 {
            let index = rest.trailing_zeros() as usize % BURST_MAX;
            let len = burst.frame_len(index);
            if burst.lead(index) != lead || len > frame_max {
                break;
            }
            if POLICY && Policy::gist(burst.prefix(index)) != gist {
                break;
            }
            same |= 1 << index;
            bytes = bytes.wrapping_add(len.into());
            longest = longest.max(len);
            rest &= rest.wrapping_sub(1);
        }
        self.longest = longest;
        (same, bytes)
    }

    #[cold]
    fn count_faults(&self, burst: &Burst<'_>) {
        for fault in (0..burst.len()).filter_map(|index| burst.fault(index)) {
            self.ingress.counters.drop(reason_of(fault), 1);
        }
    }

    /// Adds frames to those that go there.
    #[inline]
    fn send(&mut self, to: To, frames: u64) {
        let To::Port(slot) = to else {
            self.flooded |= frames;
            return;
        };
        let known = self.groups().iter().position(|(have, _)| *have == slot);
        // There are no more groups than frames.
        let at = known.unwrap_or(self.groups_len) % BURST_MAX;
        self.groups_len = self.groups_len.max(at + 1);
        self.groups[at] = (slot, self.groups[at].1 | frames);
    }

    /// Where a frame goes, and whether it asks for no offload.
    #[inline]
    fn destination(
        &mut self,
        burst: &mut Burst<'_>,
        index: usize,
        len: u32,
    ) -> Result<(To, bool), DropReason> {
        if let Some(policy) = self.policy {
            policy.check(burst.prefix(index), len as usize)?;
        }
        let kind = self.check_header(burst, index)?;
        if kind != Kind::Gso {
            if len > self.frame_max {
                return Err(DropReason::MtuExceeded);
            }
            self.longest = self.longest.max(len);
        }
        let addresses = burst.addresses(index);
        let [dst, src] = [0, 6].map(|at| Mac::new(*addresses[at..].first_chunk().expect("12 bytes")));
        // Zero stands for "none yet", and is no station's address either: not to be skipped.
        if src != self.last_src || src.is_zero() {
            self.learn(src)?;
        }
        if dst != self.last_dst {
            self.last_to = self.look_up(dst)?;
            self.last_dst = dst;
        }
        if self.last_to == To::Port(self.ingress.port.slot) {
            return Err(DropReason::Hairpin);
        }
        Ok((self.last_to, kind == Kind::Plain))
    }

    /// Makes the header true.
    #[inline]
    fn check_header(&mut self, burst: &mut Burst<'_>, index: usize) -> Result<Kind, DropReason> {
        let bytes = burst.header(index);
        let header = VnetHeader::from_bytes(bytes);
        if header.is_plain() {
            // Fields that mean nothing without a flag are not passed on.
            if bytes[2..10] != [0; 8] {
                burst.set_header(index, &VnetHeader::PLAIN.to_bytes());
            }
            return Ok(Kind::Plain);
        }
        self.check_offload(burst, index, header)
    }

    #[inline(never)]
    fn check_offload(
        &mut self,
        burst: &mut Burst<'_>,
        index: usize,
        header: VnetHeader,
    ) -> Result<Kind, DropReason> {
        let len = burst.frame_len(index) as usize;
        let checked = header.check(len, burst.prefix(index), self.ingress.sends);
        let checked = checked.map_err(|_| DropReason::BadOffload)?;
        burst.set_header(index, &checked.to_bytes());
        self.offloads += u64::from(!checked.is_plain());
        self.gso_frames += u64::from(checked.is_gso());
        Ok(if checked.is_gso() { Kind::Gso } else { Kind::Checksum })
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
    fn look_up(&self, dst: Mac) -> Result<To, DropReason> {
        if dst.is_multicast() {
            // IEEE 802.1Q, 8.6.3: frames to these addresses are never relayed by a bridge.
            return if dst.is_link_local_group() { Err(DropReason::LinkLocal) } else { Ok(To::Flood) };
        }
        Ok(self.ingress.port.network.fdb.lookup(dst).map_or(To::Flood, To::Port))
    }
}

fn reason_of(fault: ChainFault) -> DropReason {
    match fault {
        ChainFault::Malformed => DropReason::GuestDescriptorInvalid,
        ChainFault::Unmapped => DropReason::GuestUnmappedAddress,
        ChainFault::Short => DropReason::Runt,
        ChainFault::Long => DropReason::MtuExceeded,
        ChainFault::Torn => DropReason::PeerFrameTorn,
    }
}
