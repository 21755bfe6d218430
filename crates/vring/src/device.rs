//! What a TX ring and an RX ring have in common on the device side: position, memory, chain walking, notification.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use crate::burst::ChainFault;
use crate::descriptor::{DESC_INDIRECT, DESC_NEXT, DESC_WRITE, Descriptor};
use crate::layout::{Chain, Layout};
use crate::memory::{GuestMemory, Window};
use crate::packed::PackedRing;
use crate::setup::RingSetup;
use crate::split::SplitRing;
use crate::{RingError, features, notify};

/// Why a running ring was stopped: its content makes no sense as a whole, so going on could only do harm. The front
/// end must set it up again. The last three are of rings that we drive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingFault {
    /// The available index is more than the ring's size ahead.
    #[error("the available index jumped from {from} to {to} in a ring of {size}")]
    AvailIndex {
        /// Where we were.
        from: u16,
        /// Where it is.
        to: u16,
        /// Descriptors.
        size: u16,
    },
    /// An available entry names no descriptor, or a buffer's id (packed ring) is none.
    #[error("available entry {entry} of a ring of {size}")]
    Head {
        /// What it names.
        entry: u16,
        /// Descriptors.
        size: u16,
    },
    /// The front end truncated its memory file.
    #[error("the memory behind the ring was truncated by the front end")]
    Truncated,
    /// We panicked over it. Only this ring is given up.
    #[error("a defect in vhostd was met on this ring: please report it with the log")]
    Defect,
    /// A new memory table does not contain the ring.
    #[error("the new memory table does not contain the ring")]
    Unmapped,
    /// The device has used more chains than it had.
    #[error("the used index jumped from {from} to {to} with {out} chains on their way")]
    UsedIndex {
        /// Where we were.
        from: u16,
        /// Where it is.
        to: u16,
        /// Chains that the device had.
        out: u16,
    },
    /// The device returns a chain that it did not have.
    #[error("the device returns chain {id}, which was not on its way")]
    UsedId {
        /// What it calls it.
        id: u32,
    },
    /// The device claims to have written more than there was room for.
    #[error("the device says it has written {len} bytes into a buffer of {room}")]
    UsedLength {
        /// Bytes that it says.
        len: u32,
        /// Bytes of the buffer.
        room: u32,
    },
}

/// A ring of either layout.
pub(crate) enum AnyRing {
    Split(DeviceRing<SplitRing>),
    Packed(DeviceRing<PackedRing>),
}

/// Runs the same code on either; it is compiled for each.
macro_rules! either {
    ($any:expr, $ring:ident => $code:expr) => {
        match $any {
            crate::device::AnyRing::Split($ring) => $code,
            crate::device::AnyRing::Packed($ring) => $code,
        }
    };
}
pub(crate) use either;

impl AnyRing {
    pub(crate) fn start(setup: RingSetup, memory: &Arc<GuestMemory>) -> Result<Self, RingError> {
        Ok(if setup.features & (1 << features::RING_PACKED) == 0 {
            Self::Split(DeviceRing::start(setup, memory)?)
        } else {
            Self::Packed(DeviceRing::start(setup, memory)?)
        })
    }
}

/// State of one running ring. Between bursts nothing is outstanding: `next` is where to go on, and the whole truth.
pub(crate) struct DeviceRing<L> {
    pub(crate) layout: L,
    /// Keeps what `layout` points to mapped.
    pub(crate) memory: Arc<GuestMemory>,
    /// The region to look into: the one where the last buffer was.
    window: Window,
    /// Position of the next chain to take.
    pub(crate) next: u16,
    /// Available index as last seen (split ring).
    seen: u16,
    /// By how much used elements are ahead of the chains that they return: 0 in a packed ring.
    ahead: u16,
    /// The element of the chain at `next` while others behind it are there: (id, length). See [`Layout::FIRST_LAST`].
    pub(crate) first_used: (u16, u32),
    /// Bytes of virtio-net header in this ring: 12, or 10 (legacy without MRG_RXBUF).
    pub(crate) header_len: u32,
    pub(crate) mergeable: bool,
    /// Buffers are used in the order in which they were offered: one element may stand for many.
    pub(crate) in_order: bool,
    /// Descriptors walked in this burst.
    walked: u32,
    event_idx: bool,
    indirect: bool,
    setup: RingSetup,
}

impl<L: Layout> DeviceRing<L> {
    fn start(setup: RingSetup, memory: &Arc<GuestMemory>) -> Result<Self, RingError> {
        let layout = L::new(&setup, memory)?;
        let [next, ahead] = layout.start(setup.base)?;
        let has = |bit: u32| setup.features & (1 << bit) != 0;
        let mergeable = has(features::MRG_RXBUF);
        let ring = Self {
            layout,
            memory: memory.clone(),
            window: Window::EMPTY,
            next,
            seen: next,
            ahead,
            first_used: (0, 0),
            header_len: if mergeable || has(features::VERSION_1) { 12 } else { 10 },
            mergeable,
            in_order: has(features::IN_ORDER),
            walked: 0,
            event_idx: has(features::EVENT_IDX),
            indirect: has(features::INDIRECT_DESC),
            setup,
        };
        ring.disarm();
        Ok(ring)
    }

    /// What GET_VRING_BASE answers.
    pub(crate) fn base(&self) -> u32 {
        L::base(self.next)
    }

    /// Goes on in another memory table.
    pub(crate) fn remap(&mut self, memory: &Arc<GuestMemory>) -> Result<(), RingFault> {
        self.layout = L::new(&self.setup, memory).map_err(|_| RingFault::Unmapped)?;
        self.memory = memory.clone();
        self.window = Window::EMPTY;
        Ok(())
    }

    /// How many chains may be looked for, at least `wanted` if the driver has offered that many. One acquire load, and
    /// none if what was seen last suffices.
    #[inline]
    pub(crate) fn available(&mut self, wanted: u16) -> Result<u16, RingFault> {
        self.layout.available(self.next, &mut self.seen, wanted)
    }

    /// How many chains from `at` on need no further look whether they are available.
    #[inline]
    pub(crate) fn known(&self, at: u16) -> u16 {
        self.layout.known(at, self.seen)
    }

    /// The chain at position `at`, its id and first descriptor; `None` if none is available there.
    #[inline]
    pub(crate) fn chain(&mut self, at: u16) -> Result<Option<(u16, Descriptor)>, RingFault> {
        if self.known(at) == 0 {
            let before = at.wrapping_sub(self.next);
            if self.available(before.wrapping_add(1))? <= before {
                return Ok(None);
            }
        }
        self.layout.first(at)
    }

    /// By how much used elements are ahead of the chains that they return.
    #[inline]
    pub(crate) fn ahead(&self) -> u16 {
        self.ahead
    }

    /// The region to look into.
    #[inline]
    pub(crate) fn window(&self) -> Window {
        self.window
    }

    /// Looks into the region of `addr` from now on. False if it did already, or there is none.
    #[cold]
    pub(crate) fn look_at(&mut self, addr: u64) -> bool {
        let found = self.memory.window(addr).filter(|window| *window != self.window);
        self.window = found.unwrap_or(self.window);
        found.is_some()
    }

    /// Returns the chain at `at`; visible with the next [`Self::publish`].
    #[inline]
    pub(crate) fn set_used(&mut self, at: u16, id: u16, len: u32) {
        if L::FIRST_LAST && at == self.next {
            self.first_used = (id, len);
        } else {
            self.layout.set_used(at.wrapping_add(self.ahead), id, len);
        }
    }

    /// Every chain up to `next` is returned: makes that visible, and tells whether the driver wants to hear of it.
    #[inline]
    pub(crate) fn publish(&mut self, next: u16) -> bool {
        let old = std::mem::replace(&mut self.next, next).wrapping_add(self.ahead);
        let used = next.wrapping_add(self.ahead);
        self.layout.publish(old, used, self.first_used);
        self.setup.call.is_some() && notify::wanted(&self.layout.calls(self.event_idx), old, used)
    }

    /// Whether memory of this front end went away: what was copied may be zeros put in place of it.
    #[inline]
    pub(crate) fn check_memory(&self) -> Result<(), RingFault> {
        if self.memory.faulted() { Err(RingFault::Truncated) } else { Ok(()) }
    }

    /// Asks for a kick. False if frames came meanwhile: then no kick will come for them.
    pub(crate) fn arm(&mut self) -> bool {
        notify::arm(&self.layout.kicks(self.event_idx), self.next)
    }

    pub(crate) fn disarm(&self) {
        notify::disarm(&self.layout.kicks(self.event_idx));
    }

    pub(crate) fn size(&self) -> u16 {
        self.layout.size()
    }

    /// The NUMA node of its descriptors.
    pub(crate) fn node(&self) -> Option<u32> {
        sys::numa::node_of_page(self.memory.translate_user(self.setup.desc_user_addr, 1)?)
    }

    pub(crate) fn kick_fd(&self) -> Option<BorrowedFd<'_>> {
        self.setup.kick.as_ref().map(AsFd::as_fd)
    }

    pub(crate) fn call_fd(&self) -> Option<BorrowedFd<'_>> {
        self.setup.call.as_ref().map(AsFd::as_fd)
    }

    pub(crate) fn err_fd(&self) -> Option<BorrowedFd<'_>> {
        self.setup.err.as_ref().map(AsFd::as_fd)
    }

    pub(crate) fn set_call(&mut self, call: Option<OwnedFd>) {
        self.setup.call = call;
    }

    pub(crate) fn set_err(&mut self, err: Option<OwnedFd>) {
        self.setup.err = err;
    }

    /// A burst begins: its chains may be walked.
    #[inline]
    pub(crate) fn begin_burst(&mut self) {
        self.walked = 0;
    }

    /// Whether this burst has walked so many descriptors that no more chain may be begun. Each chain is bounded by the
    /// ring's size, and so would be their number: size² descriptors a frame, if nobody counted.
    #[inline]
    pub(crate) fn walked_enough(&self) -> bool {
        self.walked > u32::from(self.layout.size()) + WALK_MAX
    }

    /// A chain about to be walked.
    pub(crate) fn open(&self, at: u16, id: u16, first: Descriptor) -> Chain {
        Chain { at, id, slots: 1, last: first }
    }

    /// Its id and the slots it occupies, when it was walked or given up.
    pub(crate) fn close(&mut self, mut chain: Chain) -> Result<(u16, u16), RingFault> {
        let walked = chain.slots;
        self.layout.end(&mut chain);
        // Descriptors that are only passed are work, too.
        self.walked += u32::from(chain.slots - walked);
        let size = self.layout.size();
        if chain.id < size {
            Ok((chain.id, chain.slots))
        } else {
            Err(RingFault::Head { entry: chain.id, size })
        }
    }

    /// Visits the buffers of a chain, contiguous piece by contiguous piece, empty ones left out. `writable` says which
    /// direction every buffer must have. `visit` returns false to refuse a piece.
    ///
    /// Bounded: a chain has at most `size` descriptors, in the ring and in its indirect table together, because the
    /// specification allows no more (virtio 1.2, 2.7.5.3.1 and 2.8.5) and a loop would have.
    pub(crate) fn walk(
        &mut self,
        chain: &mut Chain,
        writable: bool,
        mut visit: impl FnMut(*mut u8, u32) -> bool,
    ) -> Result<(), ChainFault> {
        let mut budget = self.layout.size();
        let mut table = None;
        let mut descriptor = chain.last;
        loop {
            budget = budget.checked_sub(1).ok_or(ChainFault::Malformed)?;
            self.walked += 1;
            if descriptor.flags & DESC_INDIRECT != 0 {
                if table.is_some() {
                    return Err(ChainFault::Malformed);
                }
                let opened = self.open_table(descriptor)?;
                descriptor = self.table_entry(opened, 0)?;
                table = Some(opened);
                // The descriptor that refers to the table is no buffer and does not count.
                budget += 1;
                continue;
            }
            if (descriptor.flags & DESC_WRITE != 0) != writable {
                return Err(ChainFault::Malformed);
            }
            self.visit_buffer(descriptor, &mut visit)?;
            if descriptor.flags & DESC_NEXT == 0 {
                return Ok(());
            }
            descriptor = match table {
                Some(table) => self.table_entry(table, descriptor.next)?,
                None if self.layout.follow(chain) => chain.last,
                None => return Err(ChainFault::Malformed),
            };
        }
    }

    /// Checks a descriptor that refers to an indirect table; its WRITE flag means nothing (virtio 1.2, 2.7.5.3.2).
    fn open_table(&self, descriptor: Descriptor) -> Result<Table, ChainFault> {
        let entries = descriptor.len / ENTRY_LEN;
        let well_formed = self.indirect
            && descriptor.flags & DESC_NEXT == 0
            && descriptor.len.is_multiple_of(ENTRY_LEN)
            && (1..=u32::from(self.layout.size())).contains(&entries);
        if !well_formed {
            return Err(ChainFault::Malformed);
        }
        #[allow(clippy::cast_possible_truncation)]
        Ok(Table { addr: descriptor.addr, entries: entries as u16 })
    }

    /// One descriptor of an indirect table, fetched once. It may lie across two regions.
    fn table_entry(&self, table: Table, index: u16) -> Result<Descriptor, ChainFault> {
        if index >= table.entries {
            return Err(ChainFault::Malformed);
        }
        let offset = u64::from(ENTRY_LEN) * u64::from(index);
        let mut addr = table.addr.checked_add(offset).ok_or(ChainFault::Unmapped)?;
        let mut bytes = [0u8; ENTRY_LEN as usize];
        let mut filled = 0;
        while filled < bytes.len() {
            #[allow(clippy::cast_possible_truncation)]
            let left = (bytes.len() - filled) as u32;
            let (at, part) = self.memory.translate_part(addr, left).ok_or(ChainFault::Unmapped)?;
            // SAFETY: `part` ≤ `left` bytes are mapped at `at`, and `bytes` has `left` bytes from `filled` on. The
            // guest may write meanwhile: whatever is read is checked as if it were meant.
            unsafe { crate::copy::copy(at, bytes.as_mut_ptr().add(filled), part as usize) };
            filled += part as usize;
            addr = addr.wrapping_add(u64::from(part));
        }
        let [lo, hi] = [0, 8].map(|i| u64::from_ne_bytes(*bytes[i..].first_chunk().expect("16 bytes")));
        Ok(L::table_entry([lo, hi], index, table.entries))
    }

    fn visit_buffer(
        &self,
        descriptor: Descriptor,
        visit: &mut impl FnMut(*mut u8, u32) -> bool,
    ) -> Result<(), ChainFault> {
        let (mut addr, mut left) = (descriptor.addr, descriptor.len);
        if left == 0 {
            // Nothing to carry, but an address outside is still a driver's error.
            return self.memory.translate_part(addr, 0).map(|_| ()).ok_or(ChainFault::Unmapped);
        }
        if addr.checked_add(u64::from(left) - 1).is_none() {
            return Err(ChainFault::Unmapped);
        }
        while left != 0 {
            let (at, part) = self.memory.translate_part(addr, left).ok_or(ChainFault::Unmapped)?;
            if !visit(at, part) {
                return Err(ChainFault::Long);
            }
            addr = addr.wrapping_add(u64::from(part));
            left -= part;
        }
        Ok(())
    }
}

/// Descriptors that one burst may walk beyond the ring's size: a proper driver's burst has less, even if each of 64 frames
/// looks in vain at 64 buffers.
const WALK_MAX: u32 = 64 * 64;
/// Bytes of a descriptor.
const ENTRY_LEN: u32 = 16;

/// An indirect table that may be read.
#[derive(Clone, Copy)]
struct Table {
    addr: u64,
    entries: u16,
}

/// What the session may ask of a running ring, whichever way its frames go.
macro_rules! ring_handle {
    ($ring:ident) => {
        impl $ring {
            /// Where to go on: what GET_VRING_BASE answers. Split ring: the next available index. Packed ring: index and
            /// wrap counter, twice (vhost-user specification, "Virtqueue state").
            pub fn base(&self) -> u32 {
                crate::device::either!(&self.ring, ring => ring.base())
            }

            /// Number of descriptors.
            pub fn size(&self) -> u16 {
                crate::device::either!(&self.ring, ring => ring.size())
            }

            /// Goes on in another memory table; on an error the ring must not be used any more.
            pub fn set_memory(
                &mut self,
                memory: &std::sync::Arc<crate::GuestMemory>,
            ) -> Result<(), crate::RingFault> {
                crate::device::either!(&mut self.ring, ring => ring.remap(memory))
            }

            /// Us → guest.
            pub fn call_fd(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
                crate::device::either!(&self.ring, ring => ring.call_fd())
            }

            /// To be signalled when the ring breaks.
            pub fn err_fd(&self) -> Option<std::os::fd::BorrowedFd<'_>> {
                crate::device::either!(&self.ring, ring => ring.err_fd())
            }

            /// Replaces the call fd.
            pub fn set_call(&mut self, call: Option<std::os::fd::OwnedFd>) {
                crate::device::either!(&mut self.ring, ring => ring.set_call(call));
            }

            /// Replaces the error fd.
            pub fn set_err(&mut self, err: Option<std::os::fd::OwnedFd>) {
                crate::device::either!(&mut self.ring, ring => ring.set_err(err));
            }
        }
    };
}
pub(crate) use ring_handle;
