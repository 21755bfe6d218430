//! A burst: up to [`BURST_MAX`] frames on their way from one source to any number of destinations.
//!
//! A frame stays where its sender put it; what is here is a *private copy of its first bytes* and a list of where the
//! rest lies. Every decision is made on the private copy, and the private copy is what is delivered, so a guest that
//! changes its memory meanwhile changes payload nobody looked at, and nothing else. Payload is copied once, from the
//! sender's memory into the receiver's.
//!
//! [`Frames`] is the room for one burst, allocated once per worker. [`Burst`] is a burst in it, with a lifetime that
//! keeps the sender's memory mapped: it borrows the ring (or the buffers) the frames came from.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::copy::{copy, copy_by_line, wide_registers};

/// Frames in a burst at the most.
pub const BURST_MAX: usize = 64;
/// The same as a ring position.
pub(crate) const BURST: u16 = 64;
/// Private bytes of a frame: the 12-byte virtio-net header, Ethernet with two VLAN tags, IPv6 or IPv4 with options and
/// the ports behind them. A multiple of a cache line.
pub const HEAD_LEN: usize = 128;
/// The header as it stands in [`Frames`], whatever length the ring uses (virtio 1.2, 5.1.6).
pub const HEADER_LEN: usize = 12;
/// The same as a 32-bit length, as descriptors have it.
pub(crate) const HEADER_BYTES: u32 = 12;
/// Virtio 1.2, 5.1.6.2.1: num_buffers means nothing on transmit; 5.1.6.4: a receiver finds 1 unless frames are merged.
const NUM_BUFFERS: [u8; 2] = 1u16.to_le_bytes();
/// Longest frame without its virtio-net header: a 64 KiB IP packet behind Ethernet and two VLAN tags.
pub const FRAME_LEN_MAX: u32 = 65_535 + 14 + 8;
/// Shortest frame of a wire, without its check sequence (IEEE 802.3, 3.2.8 and 4.4.2).
const FRAME_LEN_MIN: usize = 60;
/// What follows the head of a frame of usual length: a list of two pieces costs the kernel more than a copy of that costs us.
const SHORT: usize = 2048;
/// Pieces beyond the first that one burst may have in all. A burst ends early when half of it is used, so that the
/// longest legal chain always fits.
const PIECES_MAX: usize = 2 * crate::SIZE_MAX as usize + 2 * crate::memory::GuestMemory::REGIONS_MAX;

/// What is wrong with one descriptor chain. The chain is returned to the driver and the ring goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChainFault {
    /// Loop, index out of range, wrong direction, indirect table where it must not be.
    Malformed,
    /// A buffer is not in guest memory.
    Unmapped,
    /// Shorter than a virtio-net header and an Ethernet header.
    Short,
    /// Longer than a frame can be.
    Long,
    /// Buffers of a merged frame are missing (rings that we drive).
    Torn,
}

/// Contiguous bytes of a frame somewhere outside of [`Frames`].
#[derive(Clone, Copy)]
pub(crate) struct Piece {
    pub(crate) at: *const u8,
    pub(crate) len: u32,
}

impl Piece {
    const NONE: Self = Self { at: std::ptr::null(), len: 0 };
}

/// The chain that a frame came from.
#[derive(Clone, Copy, Default)]
pub(crate) struct Taken {
    /// What the driver calls it.
    pub(crate) id: u16,
    /// Slots of the ring that it takes.
    pub(crate) slots: u16,
}

/// A frame of several pieces.
#[derive(Clone, Copy)]
struct Chain {
    /// Bytes in the private head.
    head_len: u32,
    /// Where the rest lies: a range of the arena.
    first: u32,
    count: u32,
}

#[derive(Clone)]
#[repr(align(64))]
pub(crate) struct Head(pub(crate) [u8; HEAD_LEN]);

impl Head {
    /// Copies a frame's first bytes. Bytes behind a short frame come along, and are never looked at.
    ///
    /// # Safety
    /// [`HEAD_LEN`] bytes are readable there.
    #[inline(always)]
    unsafe fn fetch(&mut self, place: &Piece) {
        // SAFETY: the caller's promise, and a head has as many bytes.
        unsafe { std::ptr::copy_nonoverlapping(place.at, self.0.as_mut_ptr(), HEAD_LEN) };
        self.0[10..HEADER_LEN].copy_from_slice(&NUM_BUFFERS);
    }
}

/// Room for one burst. A bit of a 64-bit word stands for each frame: sets of frames are words.
pub struct Frames {
    heads: Box<[Head; BURST_MAX]>,
    /// First byte and length (header counted as [`HEADER_LEN`]) of each frame.
    places: Box<[Piece; BURST_MAX]>,
    /// Where each came from, if from a ring.
    taken: Box<[Taken; BURST_MAX]>,
    /// More of frames in `chained`.
    chains: Box<[Chain; BURST_MAX]>,
    /// Why frames in `faulty` are none.
    faults: [ChainFault; BURST_MAX],
    arena: Vec<Piece>,
    count: usize,
    chained: u64,
    faulty: u64,
}

// SAFETY: the pointers in `places` and `arena` are only followed through a `Burst`, whose lifetime keeps what they
// point to; between bursts they are leftovers that nobody follows.
unsafe impl Send for Frames {}

impl Default for Frames {
    fn default() -> Self {
        let chain = Chain { head_len: 0, first: 0, count: 0 };
        let heads = vec![Head([0; HEAD_LEN]); BURST_MAX].into_boxed_slice();
        Self {
            heads: heads.try_into().unwrap_or_else(|_| unreachable!("made with BURST_MAX elements")),
            places: Box::new([Piece::NONE; BURST_MAX]),
            taken: Box::new([Taken::default(); BURST_MAX]),
            chains: Box::new([chain; BURST_MAX]),
            faults: [ChainFault::Malformed; BURST_MAX],
            arena: Vec::new(),
            count: 0,
            chained: 0,
            faulty: 0,
        }
    }
}

/// The low six bits, so that the compiler sees an index below [`BURST_MAX`].
#[inline]
fn slot(index: usize) -> usize {
    index % BURST_MAX
}

/// The set of one frame.
#[inline]
fn bit(index: usize) -> u64 {
    1 << slot(index)
}

impl Frames {
    /// Makes a burst of frames in our own memory: received from a TAP, segmented, or made here. Takes up to
    /// [`BURST_MAX`]; a frame longer than [`FRAME_LEN_MAX`] or shorter than an Ethernet header becomes a fault.
    pub fn load<'m>(
        &'m mut self,
        frames: impl IntoIterator<Item = (&'m [u8; HEADER_LEN], &'m [u8])>,
    ) -> Burst<'m> {
        self.clear();
        for (header, frame) in frames.into_iter().take(BURST_MAX) {
            match u32::try_from(frame.len()).unwrap_or(u32::MAX) {
                0..14 => self.push_fault(ChainFault::Short),
                len @ 14..=FRAME_LEN_MAX => self.push_own(header, frame, len),
                _ => self.push_fault(ChainFault::Long),
            }
        }
        Burst { frames: self, source: PhantomData }
    }

    fn push_own(&mut self, header: &[u8; HEADER_LEN], frame: &[u8], len: u32) {
        let head = &mut self.heads[slot(self.count)].0;
        let private = frame.len().min(HEAD_LEN - HEADER_LEN);
        head[..HEADER_LEN].copy_from_slice(header);
        // As for a guest's frames: a TAP leaves num_buffers at 0.
        head[10..HEADER_LEN].copy_from_slice(&NUM_BUFFERS);
        head[HEADER_LEN..HEADER_LEN + private].copy_from_slice(&frame[..private]);
        // As if the header stood before the frame: what follows the head is found by adding to the first byte.
        let at = frame.as_ptr().wrapping_sub(HEADER_LEN);
        self.places[slot(self.count)] = Piece { at, len: len + HEADER_BYTES };
        self.count += 1;
    }

    #[inline]
    pub(crate) fn clear(&mut self) {
        self.count = 0;
        self.chained = 0;
        self.faulty = 0;
        self.arena.clear();
    }

    /// Whether another chain of any legal length still fits.
    pub(crate) fn has_room(&self) -> bool {
        self.count < BURST_MAX && self.arena.len() <= PIECES_MAX / 2
    }

    /// Room for frames of one piece, up to `limit` frames in all. What is put there becomes frames by
    /// [`Self::push_singles`].
    #[inline]
    pub(crate) fn singles(&mut self, limit: usize) -> impl Iterator<Item = (&mut Piece, &mut Taken)> {
        let range = self.count..limit.clamp(self.count, BURST_MAX);
        self.places[range.clone()].iter_mut().zip(&mut self.taken[range])
    }

    /// The chain that the next frame, or fault, comes from.
    pub(crate) fn note_taken(&mut self, taken: Taken) {
        self.taken[slot(self.count)] = taken;
    }

    /// Adds the first `count` of [`Self::singles`].
    #[inline]
    pub(crate) fn push_singles(&mut self, count: usize) {
        self.count = (self.count + count).min(BURST_MAX);
    }

    /// How many there are.
    #[inline]
    pub(crate) fn len(&self) -> usize {
        self.count
    }

    /// Adds a frame of one piece, which is its header and it.
    pub(crate) fn push_single(&mut self, at: *const u8, len: u32) {
        self.places[slot(self.count)] = Piece { at, len };
        self.count += 1;
    }

    /// Adds a chain that cannot be a frame.
    #[cold]
    pub(crate) fn push_fault(&mut self, fault: ChainFault) {
        self.faults[slot(self.count)] = fault;
        self.faulty |= bit(self.count);
        self.count += 1;
    }

    /// Begins a frame of several pieces.
    pub(crate) fn begin_chain(&self) -> usize {
        self.arena.len()
    }

    /// Adds a piece to the frame begun; false when there is no more room.
    pub(crate) fn push_piece(&mut self, at: *const u8, len: u32) -> bool {
        let room = self.arena.len() < PIECES_MAX;
        if room {
            self.arena.push(Piece { at, len });
        }
        room
    }

    /// Gives up the frame begun.
    pub(crate) fn abandon_chain(&mut self, first: usize, fault: ChainFault) {
        self.arena.truncate(first);
        self.push_fault(fault);
    }

    /// Ends the frame begun at `first`, `len` bytes in all.
    #[allow(clippy::cast_possible_truncation)]
    pub(crate) fn end_chain(&mut self, first: usize, len: u32) {
        let index = slot(self.count);
        let at = self.arena.get(first).map_or(std::ptr::null(), |piece| piece.at);
        self.places[index] = Piece { at, len };
        self.chains[index] =
            Chain { head_len: 0, first: first as u32, count: (self.arena.len() - first) as u32 };
        self.chained |= bit(index);
        self.count += 1;
    }

    /// Copies the first bytes of every frame into private memory; `header_len` of them are the ring's header.
    ///
    /// # Safety
    /// All pieces pushed are valid for reads, singles also of [`HEAD_LEN`] bytes. There are none with another header than
    /// [`HEADER_BYTES`].
    #[inline(always)]
    pub(crate) unsafe fn fetch_heads(&mut self, header_len: u32) {
        let count = self.count.min(BURST_MAX);
        let odd = self.chained | self.faulty;
        if odd != 0 {
            for index in 0..count {
                // SAFETY: the caller's promise.
                unsafe { self.fetch_any_head(index, header_len) };
            }
            return;
        }
        for (head, place) in self.heads[..count].iter_mut().zip(&self.places[..count]) {
            // SAFETY: the caller's promise.
            unsafe { head.fetch(place) };
        }
    }

    /// As [`Self::fetch_heads`] for a frame of a burst in which not all are of one piece.
    ///
    /// # Safety
    /// As there.
    #[inline(never)]
    unsafe fn fetch_any_head(&mut self, index: usize, header_len: u32) {
        if self.chained & bit(index) != 0 {
            // SAFETY: the caller's promise.
            unsafe { self.fetch_head(index, header_len) };
        } else if self.faulty & bit(index) == 0 {
            // SAFETY: the caller's promise.
            unsafe { self.heads[slot(index)].fetch(&self.places[slot(index)]) };
        }
    }

    /// As [`Self::fetch_heads`] for one frame of several pieces, and with the legacy header of 10 bytes spread to 12.
    ///
    /// # Safety
    /// All pieces pushed for this frame are valid for reads.
    unsafe fn fetch_head(&mut self, index: usize, header_len: u32) {
        let chain = &mut self.chains[index];
        let head = &mut self.heads[index].0;
        // Virtio 1.2, 5.1.6.1: without MRG_RXBUF and VERSION_1 the header ends before num_buffers.
        let (header_len, gap) = (header_len as usize, HEADER_LEN - header_len as usize);
        let mut filled = 0usize;
        while filled < HEAD_LEN && chain.count != 0 {
            let piece = &mut self.arena[chain.first as usize];
            // The header's bytes first, then a jump over the gap, then the frame's.
            let end = if filled < header_len { header_len } else { HEAD_LEN };
            let part = (piece.len as usize).min(end - filled);
            // SAFETY: `part` bytes are left in the piece (valid by contract) and in the head.
            unsafe { copy(piece.at, head.as_mut_ptr().add(filled), part) };
            filled += part;
            if filled == header_len && gap != 0 {
                head[filled..HEADER_LEN].fill(0);
                filled = HEADER_LEN;
            }
            #[allow(clippy::cast_possible_truncation)]
            let taken = part as u32;
            *piece = Piece { at: piece.at.wrapping_add(part), len: piece.len - taken };
            if piece.len == 0 {
                chain.first += 1;
                chain.count -= 1;
            }
        }
        head[10..HEADER_LEN].copy_from_slice(&NUM_BUFFERS);
        #[allow(clippy::cast_possible_truncation)]
        {
            chain.head_len = filled as u32;
            self.places[index].len += gap as u32;
        }
    }
}

/// Frames of one source, in the order in which they were sent.
pub struct Burst<'m> {
    frames: &'m mut Frames,
    source: PhantomData<&'m ()>,
}

impl<'m> Burst<'m> {
    /// A burst over what is in `frames`.
    ///
    /// # Safety
    /// Whatever the pieces in `frames` point to stays mapped for `'m`.
    pub(crate) unsafe fn new(frames: &'m mut Frames) -> Self {
        Self { frames, source: PhantomData }
    }

    /// How many chains it has, faulty ones included.
    #[inline]
    pub fn len(&self) -> usize {
        self.frames.count
    }

    /// Whether there is nothing in it.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.frames.count == 0
    }

    /// The set of chains that are frames.
    #[inline]
    pub fn valid(&self) -> u64 {
        let all = if self.frames.count == 0 {
            0
        } else {
            u64::MAX >> (BURST_MAX - self.frames.count.min(BURST_MAX))
        };
        all & !self.frames.faulty
    }

    /// What is wrong with chain `index`, if it is no frame.
    #[inline]
    pub fn fault(&self, index: usize) -> Option<ChainFault> {
        (self.frames.faulty & bit(index) != 0).then(|| self.frames.faults[slot(index)])
    }

    /// Length of frame `index` without its virtio-net header.
    #[inline]
    pub fn frame_len(&self, index: usize) -> u32 {
        self.frames.places[slot(index)].len.saturating_sub(HEADER_BYTES)
    }

    /// The virtio-net header, private.
    #[inline]
    pub fn header(&self, index: usize) -> &[u8; HEADER_LEN] {
        self.frames.heads[slot(index)].0.first_chunk().expect("a head is longer than a header")
    }

    /// Replaces the virtio-net header that receivers will see.
    #[inline]
    pub fn set_header(&mut self, index: usize, header: &[u8; HEADER_LEN]) {
        self.frames.heads[slot(index)].0[..HEADER_LEN].copy_from_slice(header);
    }

    /// Destination and source address, private.
    #[inline]
    pub fn addresses(&self, index: usize) -> &[u8; 12] {
        self.frames.heads[slot(index)].0[HEADER_LEN..].first_chunk().expect("a head holds an Ethernet header")
    }

    /// The virtio-net header and both addresses, private, as words: to see at once whether a frame is like another.
    #[inline]
    pub fn lead(&self, index: usize) -> [u64; 3] {
        let head = &self.frames.heads[slot(index)].0;
        [0, 8, 16].map(|at| u64::from_ne_bytes(*head[at..].first_chunk().expect("a head holds more")))
    }

    /// The frame's first bytes, private: all of it or [`HEAD_LEN`] − [`HEADER_LEN`].
    #[inline]
    pub fn prefix(&self, index: usize) -> &[u8] {
        self.head(index).get(HEADER_LEN..).unwrap_or(&[])
    }

    /// Copies the whole frame, without its header, to the end of `to`.
    pub fn gather(&self, index: usize, to: &mut Vec<u8>) {
        to.extend_from_slice(self.prefix(index));
        self.each_piece(index, |at, len| {
            to.reserve(len);
            // SAFETY: `len` bytes are reserved behind the end, and readable at `at` for the burst's lifetime. They are
            // initialised by the copy before the length covers them.
            unsafe {
                std::ptr::copy_nonoverlapping(at, to.as_mut_ptr().add(to.len()), len);
                to.set_len(to.len() + len);
            }
        });
    }

    /// Writes header and frame, padded with zeros to the 60 bytes of a wire's shortest, to `fd` by one system call;
    /// returns what the kernel took. A frame of usual length, and a chain of more pieces than a call takes, are gathered
    /// into `scratch` first.
    ///
    /// # Errors
    /// What the kernel says; `InvalidInput` if chain `index` is no frame.
    pub fn write_to(&self, index: usize, fd: BorrowedFd<'_>, scratch: &mut Vec<u8>) -> io::Result<usize> {
        const PADDING: &[u8; FRAME_LEN_MIN] = &[0; FRAME_LEN_MIN];
        if self.valid() & bit(index) == 0 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let head = self.head(index);
        let private = iovec(head.as_ptr(), head.len());
        let padding = FRAME_LEN_MIN.saturating_sub(self.frame_len(index) as usize);
        let padding = iovec(PADDING.as_ptr(), padding);
        // SAFETY: heads, zeros and `scratch` are ours; a tail is readable for the burst's lifetime.
        unsafe {
            match self.single_tail(index) {
                Some((_, 0)) if padding.iov_len == 0 => Ok(rustix::io::write(fd, head)?),
                Some((_, 0)) => writev(fd, &[private, padding]),
                Some((_, len)) if len <= SHORT => {
                    join(self, index, scratch);
                    Ok(rustix::io::write(fd, scratch)?)
                }
                Some((at, len)) => writev(fd, &[private, iovec(at, len)]),
                None => self.write_chain(index, fd, padding, scratch),
            }
        }
    }

    /// # Safety
    /// `padding` is readable.
    unsafe fn write_chain(
        &self,
        index: usize,
        fd: BorrowedFd<'_>,
        padding: libc::iovec,
        scratch: &mut Vec<u8>,
    ) -> io::Result<usize> {
        const PIECES: usize = 66;
        let head = self.head(index);
        let mut pieces = [iovec(head.as_ptr(), head.len()); PIECES];
        let mut count = 1;
        // One for the head, one for the padding.
        if self.pieces(index) <= PIECES - 2 {
            self.each_piece(index, |at, len| {
                pieces[count] = iovec(at, len);
                count += 1;
            });
        } else {
            scratch.clear();
            self.gather(index, scratch);
            pieces[0] = iovec(head.as_ptr(), HEADER_LEN);
            pieces[1] = iovec(scratch.as_ptr(), scratch.len());
            count = 2;
        }
        if padding.iov_len != 0 {
            pieces[count] = padding;
            count += 1;
        }
        // SAFETY: `count` entries are filled, with memory that is readable for the burst's lifetime, or is `scratch`, or
        // is the caller's.
        unsafe { writev(fd, &pieces[..count]) }
    }

    /// Bytes of header + frame, the header counted as [`HEADER_LEN`].
    #[inline]
    pub(crate) fn total_len(&self, index: usize) -> u32 {
        self.frames.places[slot(index)].len
    }

    #[inline]
    fn is_chained(&self, index: usize) -> bool {
        self.frames.chained & bit(index) != 0
    }

    /// The private head as it is delivered. Nothing for a faulty chain.
    #[inline]
    pub(crate) fn head(&self, index: usize) -> &[u8] {
        let head_len = if self.is_chained(index) {
            self.frames.chains[slot(index)].head_len
        } else {
            self.frames.places[slot(index)].len
        };
        &self.frames.heads[slot(index)].0[..(head_len as usize).min(HEAD_LEN)]
    }

    /// The chains that the frames came from, faulty ones included.
    #[inline]
    pub(crate) fn taken(&self) -> &[Taken] {
        &self.frames.taken[..self.frames.count.min(BURST_MAX)]
    }

    /// First byte and length, header counted as [`HEADER_LEN`], of every frame.
    #[inline]
    pub(crate) fn places(&self) -> &[Piece; BURST_MAX] {
        &self.frames.places
    }

    /// Heads and places of all frames, if each is one piece.
    #[inline]
    pub(crate) fn singles(&self) -> Option<(&[Head; BURST_MAX], &[Piece; BURST_MAX])> {
        (self.frames.chained == 0).then_some((&self.frames.heads, &self.frames.places))
    }

    /// What follows the head, if the frame is one piece (or all of it is in the head).
    #[inline]
    pub(crate) fn single_tail(&self, index: usize) -> Option<(*const u8, usize)> {
        let place = self.frames.places[slot(index)];
        let len = (place.len as usize).saturating_sub(HEAD_LEN);
        (!self.is_chained(index)).then_some((place.at.wrapping_add(HEAD_LEN), len))
    }

    /// How many pieces follow the head, at the most.
    fn pieces(&self, index: usize) -> usize {
        if self.is_chained(index) { self.frames.chains[slot(index)].count as usize } else { 1 }
    }

    /// All that follows the head, in order. Pieces are never empty. Nothing for a faulty chain.
    #[inline]
    pub(crate) fn each_piece(&self, index: usize, mut visit: impl FnMut(*const u8, usize)) {
        if self.valid() & bit(index) == 0 {
            return;
        }
        match self.single_tail(index) {
            Some((_, 0)) => {}
            Some((at, len)) => visit(at, len),
            None => {
                let chain = self.frames.chains[slot(index)];
                let range = chain.first as usize..(chain.first + chain.count) as usize;
                for piece in &self.frames.arena[range] {
                    visit(piece.at, piece.len as usize);
                }
            }
        }
    }
}

wide_registers! {
    /// Puts the head of a frame of usual length, and its tail, one behind the other.
    fn join(burst: &Burst<'_>, index: usize, to: &mut Vec<u8>) -> () {{
        let (at, len) = burst.single_tail(index).unwrap_or((std::ptr::null(), 0));
        let len = len.min(SHORT);
        to.clear();
        to.reserve(HEAD_LEN + SHORT);
        // SAFETY: there is room for a head and as many bytes as are copied behind it, which are readable for the burst's
        // lifetime. All of them are initialised when the length covers them.
        unsafe {
            copy_by_line(burst.frames.heads[slot(index)].0.as_ptr(), to.as_mut_ptr(), HEAD_LEN);
            copy_by_line(at, to.as_mut_ptr().add(HEAD_LEN), len);
            to.set_len(HEAD_LEN + len);
        }
    }}
}

fn iovec(at: *const u8, len: usize) -> libc::iovec {
    libc::iovec { iov_base: at.cast_mut().cast(), iov_len: len }
}

/// writev(2), but not libc's: that is a point of cancellation, which costs a sixth of the call when there are threads.
///
/// # Safety
/// All `pieces` are readable. Guests may change the bytes meanwhile, which the kernel tolerates.
unsafe fn writev(fd: BorrowedFd<'_>, pieces: &[libc::iovec]) -> io::Result<usize> {
    // SAFETY: the kernel only reads, from memory that the caller vouches for.
    let written = unsafe { libc::syscall(libc::SYS_writev, fd.as_raw_fd(), pieces.as_ptr(), pieces.len()) };
    usize::try_from(written).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
#[cfg(not(any(miri, loom)))]
mod tests;
