//! What a device does with a ring, whichever of the two layouts it has: [`crate::split`] or [`crate::packed`].
//!
//! A device goes through a ring with a *position*: where the next chain is taken. Its used element is written at the same
//! position of a packed ring, and at one that is always so much ahead in a split one. Chains occupy *slots*: one each in a split ring, one a descriptor in a packed one. All code of bursts is
//! generic over [`Layout`] and compiled once for each, so that a frame never asks which one it is.

use std::sync::Arc;

use crate::RingError;
use crate::descriptor::{DESC_INDIRECT, DESC_NEXT, DESC_WRITE, Descriptor};
use crate::device::RingFault;
use crate::memory::GuestMemory;
use crate::notify::Words;
use crate::setup::RingSetup;

/// The words of a ring, and the rules by which a device reads and writes them.
pub(crate) trait Layout: Copy + Send {
    /// The first of a burst's used elements is written when the others are there: it alone makes them visible.
    const FIRST_LAST: bool;

    /// Translates the addresses of a set-up and checks them.
    fn new(setup: &RingSetup, memory: &Arc<GuestMemory>) -> Result<Self, RingError>;
    /// Number of descriptors.
    fn size(&self) -> u16;
    /// Position to begin at, and by how much used elements are ahead of the chains that they return: 0 in a packed ring.
    fn start(&self, base: u32) -> Result<[u16; 2], RingError>;
    /// What GET_VRING_BASE answers for a position where nothing is outstanding.
    fn base(next: u16) -> u32;
    /// The position one slot on.
    fn after(&self, at: u16) -> u16;
    /// The position so many slots on.
    fn advance(&self, at: u16, slots: u16) -> u16;
    /// How many chains may be looked for from `next` on, at least `wanted` if that many are there. `seen` is what was
    /// known before.
    fn available(&self, next: u16, seen: &mut u16, wanted: u16) -> Result<u16, RingFault>;
    /// For how many chains from `at` on [`Self::first`] may be asked, as far as is known.
    fn known(&self, at: u16, seen: u16) -> u16;
    /// Asks the cache for the first descriptors of `count` chains.
    fn prefetch(&self, at: u16, count: u16);
    /// The id and first descriptor of the chain at `at`, which was found available; `None` if it is not there after all.
    fn first(&self, at: u16) -> Result<Option<(u16, Descriptor)>, RingFault>;
    /// The same of a chain that is one buffer with exactly `flags`, of [`SINGLE`]: `None` if it is anything else, which
    /// [`Self::first`] then tells.
    fn single(&self, at: u16, flags: u16) -> Option<(u16, Descriptor)>;
    /// Moves on to the next descriptor of a chain in the ring. False if it names none.
    fn follow(&self, chain: &mut Chain) -> bool;
    /// Finds the end of a chain that was given up.
    fn end(&self, chain: &mut Chain);
    /// Entry `index` of an indirect table of `entries`, from its two words. It has NEXT if another one follows.
    fn table_entry(words: [u64; 2], index: u16, entries: u16) -> Descriptor;
    /// Writes the used element at a position.
    fn set_used(&self, at: u16, id: u16, len: u32);
    /// Makes the used elements from `old` up to before `new` visible; `first` is the one at `old`: (id, length).
    fn publish(&self, old: u16, new: u16, first: (u16, u32));
    /// The driver tells the device.
    fn kicks(&self, event_idx: bool) -> impl Words;
    /// The device tells the driver.
    fn calls(&self, event_idx: bool) -> impl Words;
}

/// The flags that tell a single buffer from other chains.
pub(crate) const SINGLE: u16 = DESC_NEXT | DESC_WRITE | DESC_INDIRECT;

/// A chain that is being walked.
#[derive(Clone, Copy)]
pub(crate) struct Chain {
    /// Its position.
    pub(crate) at: u16,
    /// What the driver calls it.
    pub(crate) id: u16,
    /// Slots it occupies, as far as it was walked.
    pub(crate) slots: u16,
    /// The descriptor last looked at.
    pub(crate) last: Descriptor,
}

/// The three areas of a ring, translated: each must lie in one region with its whole length, and be aligned there. Areas
/// are given as (name, length, alignment), in bytes.
pub(crate) fn translate_areas(
    setup: &RingSetup,
    memory: &Arc<GuestMemory>,
    areas: [(&'static str, u64, u64); 3],
) -> Result<[*mut u8; 3], RingError> {
    let addrs = [setup.desc_user_addr, setup.avail_user_addr, setup.used_user_addr];
    let mut host = [std::ptr::null_mut(); 3];
    for ((host, addr), (part, len, align)) in host.iter_mut().zip(addrs).zip(areas) {
        let at = memory.translate_user(addr, len).ok_or(RingError::Unmapped { part, addr, len })?;
        // The front end's alignment says nothing of ours: regions may be mapped from odd offsets.
        if addr % align != 0 || !(at as usize as u64).is_multiple_of(align) {
            return Err(RingError::Unaligned { part, addr, align });
        }
        *host = at;
    }
    Ok(host)
}
