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

use crate::copy::copy;

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
/// Longest frame without its virtio-net header: a 64 KiB IP packet behind Ethernet and two VLAN tags.
pub const FRAME_LEN_MAX: u32 = 65_535 + 14 + 8;
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
}

/// Contiguous bytes of a frame somewhere outside of [`Frames`].
#[derive(Clone, Copy)]
struct Piece {
    at: *const u8,
    len: u32,
}

impl Piece {
    const NONE: Self = Self { at: std::ptr::null(), len: 0 };
}

/// One frame's place and length.
#[derive(Clone, Copy)]
struct Place {
    /// Bytes of header + frame in all, as if the header always had [`HEADER_LEN`] bytes.
    len: u32,
    /// How many of them are in the private head.
    head_len: u32,
    /// What follows the head.
    tail: Piece,
    /// And behind that: a range of the arena.
    more_first: u32,
    more_count: u32,
    fault: Option<ChainFault>,
}

impl Place {
    const EMPTY: Self =
        Self { len: 0, head_len: 0, tail: Piece::NONE, more_first: 0, more_count: 0, fault: None };
}

#[derive(Clone)]
#[repr(align(64))]
struct Head([u8; HEAD_LEN]);

/// Room for one burst.
pub struct Frames {
    heads: Box<[Head]>,
    places: Box<[Place]>,
    arena: Vec<Piece>,
    count: usize,
}

// SAFETY: the pointers in `places` and `arena` are only followed through a `Burst`, whose lifetime keeps what they
// point to; between bursts they are leftovers that nobody follows.
unsafe impl Send for Frames {}

impl Default for Frames {
    fn default() -> Self {
        Self {
            heads: vec![Head([0; HEAD_LEN]); BURST_MAX].into_boxed_slice(),
            places: vec![Place::EMPTY; BURST_MAX].into_boxed_slice(),
            arena: Vec::new(),
            count: 0,
        }
    }
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
            let head = &mut self.heads[self.count].0;
            head[..HEADER_LEN].copy_from_slice(header);
            let private = frame.len().min(HEAD_LEN - HEADER_LEN);
            head[HEADER_LEN..HEADER_LEN + private].copy_from_slice(&frame[..private]);
            let rest = &frame[private..];
            let len = u32::try_from(frame.len()).unwrap_or(u32::MAX);
            let fault = match len {
                0..14 => Some(ChainFault::Short),
                14..=FRAME_LEN_MAX => None,
                _ => Some(ChainFault::Long),
            };
            #[allow(clippy::cast_possible_truncation)]
            let place = Place {
                len: len.saturating_add(HEADER_BYTES),
                head_len: (HEADER_LEN + private) as u32,
                tail: Piece { at: rest.as_ptr(), len: rest.len() as u32 },
                fault,
                ..Place::EMPTY
            };
            self.places[self.count] = place;
            self.count += 1;
        }
        Burst { frames: self, source: PhantomData }
    }

    pub(crate) fn clear(&mut self) {
        self.count = 0;
        self.arena.clear();
    }

    pub(crate) fn count(&self) -> usize {
        self.count
    }

    #[inline]
    pub(crate) fn is_fault(&self, index: usize) -> bool {
        self.places[index].fault.is_some()
    }

    /// Whether another chain of any legal length still fits.
    pub(crate) fn has_room(&self) -> bool {
        self.count < BURST_MAX && self.arena.len() <= PIECES_MAX / 2
    }

    /// Adds a frame of one piece, header included. Its head is fetched by [`Self::fetch_heads`].
    #[inline]
    pub(crate) fn push_single(&mut self, at: *const u8, len: u32) {
        self.places[self.count] = Place { len, tail: Piece { at, len }, ..Place::EMPTY };
        self.count += 1;
    }

    /// Adds a chain that cannot be a frame.
    #[cold]
    pub(crate) fn push_fault(&mut self, fault: ChainFault) {
        self.places[self.count] = Place { fault: Some(fault), ..Place::EMPTY };
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
        let tail = self.arena.get(first).copied().unwrap_or(Piece::NONE);
        let more_first = (first + 1).min(self.arena.len());
        self.places[self.count] = Place {
            len,
            tail,
            more_first: more_first as u32,
            more_count: (self.arena.len() - more_first) as u32,
            ..Place::EMPTY
        };
        self.count += 1;
    }

    /// Where the frame's first bytes are, for prefetching.
    #[inline]
    pub(crate) fn first_byte(&self, index: usize) -> *const u8 {
        self.places[index].tail.at
    }

    /// Copies the first bytes of frame `index` into private memory, `header_len` of them being the ring's header.
    ///
    /// # Safety
    /// All pieces pushed for this frame are valid for reads. `readable` bytes may be read from the first piece on.
    #[inline]
    #[allow(clippy::cast_possible_truncation)]
    pub(crate) unsafe fn fetch_head(&mut self, index: usize, header_len: u32, readable: usize) {
        let place = &mut self.places[index];
        let head = self.heads[index].0.as_mut_ptr();
        if header_len == HEADER_BYTES
            && readable >= HEAD_LEN
            && place.tail.len >= place.len.min(HEAD_LEN as u32)
        {
            let private = place.len.min(HEAD_LEN as u32);
            // SAFETY: 128 bytes are readable at the first piece, and a head has 128. Bytes behind a short frame may be
            // read (they are in the same region) but are never looked at: `head_len` ends before them.
            unsafe { std::ptr::copy_nonoverlapping(place.tail.at, head, HEAD_LEN) };
            place.head_len = private;
            place.tail =
                Piece { at: place.tail.at.wrapping_add(private as usize), len: place.tail.len - private };
        } else {
            // SAFETY: the caller's promise.
            unsafe { self.fetch_head_slow(index, header_len) };
        }
        // Virtio 1.2, 5.1.6.2.1: num_buffers means nothing on transmit; 5.1.6.4: a receiver finds 1 unless merged.
        self.heads[index].0[10..HEADER_LEN].copy_from_slice(&1u16.to_le_bytes());
    }

    /// As [`Self::fetch_head`], from any number of pieces, and with the legacy header of 10 bytes spread to 12.
    ///
    /// # Safety
    /// All pieces pushed for this frame are valid for reads.
    #[inline(never)]
    unsafe fn fetch_head_slow(&mut self, index: usize, header_len: u32) {
        let place = &mut self.places[index];
        let head = &mut self.heads[index].0;
        let mut filled = 0usize;
        // Virtio 1.2, 5.1.6.1: without MRG_RXBUF and VERSION_1 the header ends before num_buffers.
        let gap = HEADER_LEN - header_len as usize;
        while place.tail.len != 0 && filled < HEAD_LEN {
            // The header's bytes first, then a jump over the gap, then the frame's.
            let end = if filled < header_len as usize { header_len as usize } else { HEAD_LEN };
            let part = (place.tail.len as usize).min(end - filled);
            // SAFETY: `part` bytes are left in the piece (valid by contract) and in the head.
            unsafe { copy(place.tail.at, head.as_mut_ptr().add(filled), part) };
            filled += part;
            if filled == header_len as usize && gap != 0 {
                head[filled..HEADER_LEN].fill(0);
                filled = HEADER_LEN;
            }
            #[allow(clippy::cast_possible_truncation)]
            let taken = part as u32;
            place.tail = Piece { at: place.tail.at.wrapping_add(part), len: place.tail.len - taken };
            if place.tail.len == 0 && place.more_count != 0 {
                place.tail = self.arena[place.more_first as usize];
                place.more_first += 1;
                place.more_count -= 1;
            }
        }
        #[allow(clippy::cast_possible_truncation)]
        {
            place.head_len = filled as u32;
            place.len += gap as u32;
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

    /// What is wrong with chain `index`, if it is no frame.
    #[inline]
    pub fn fault(&self, index: usize) -> Option<ChainFault> {
        self.frames.places[index].fault
    }

    /// Length of frame `index` without its virtio-net header.
    #[inline]
    pub fn frame_len(&self, index: usize) -> u32 {
        self.frames.places[index].len.saturating_sub(HEADER_BYTES)
    }

    /// The virtio-net header, private.
    #[inline]
    pub fn header(&self, index: usize) -> &[u8; HEADER_LEN] {
        self.frames.heads[index].0.first_chunk().expect("a head is longer than a header")
    }

    /// Replaces the virtio-net header that receivers will see.
    #[inline]
    pub fn set_header(&mut self, index: usize, header: &[u8; HEADER_LEN]) {
        self.frames.heads[index].0[..HEADER_LEN].copy_from_slice(header);
    }

    /// The frame's first bytes, private: all of it or [`HEAD_LEN`] − [`HEADER_LEN`].
    #[inline]
    pub fn prefix(&self, index: usize) -> &[u8] {
        let end = (self.frames.places[index].head_len as usize).clamp(HEADER_LEN, HEAD_LEN);
        &self.frames.heads[index].0[HEADER_LEN..end]
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

    /// Writes header and frame to `fd` by one system call; returns what the kernel took. A chain of more pieces than
    /// a call takes is gathered into `scratch` first.
    pub fn write_to(&self, index: usize, fd: BorrowedFd<'_>, scratch: &mut Vec<u8>) -> io::Result<usize> {
        const PIECES: usize = 66;
        let place = &self.frames.places[index];
        let mut pieces = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; PIECES];
        let head = &self.frames.heads[index].0[..place.head_len as usize];
        pieces[0] = iovec(head.as_ptr(), head.len());
        let mut count: u8 = 1;
        if place.more_count as usize + 2 <= PIECES {
            self.each_piece(index, |at, len| {
                pieces[usize::from(count)] = iovec(at, len);
                count += 1;
            });
        } else {
            scratch.clear();
            self.gather(index, scratch);
            pieces[0] = iovec(head.as_ptr(), HEADER_LEN);
            pieces[1] = iovec(scratch.as_ptr(), scratch.len());
            count = 2;
        }
        // SAFETY: `count` entries are filled, each with memory that is readable for the burst's lifetime (or is
        // `scratch`); the kernel only reads them. Guests may change the bytes meanwhile, which the kernel tolerates.
        let written = unsafe { libc::writev(fd.as_raw_fd(), pieces.as_ptr(), count.into()) };
        usize::try_from(written).map_err(|_| io::Error::last_os_error())
    }

    /// Bytes of header + frame, the header counted as [`HEADER_LEN`].
    #[inline]
    pub(crate) fn total_len(&self, index: usize) -> u32 {
        self.frames.places[index].len
    }

    /// The private head as it is delivered.
    #[inline]
    pub(crate) fn head(&self, index: usize) -> &[u8] {
        &self.frames.heads[index].0[..(self.frames.places[index].head_len as usize).min(HEAD_LEN)]
    }

    /// What follows the head, if it is one piece (or nothing).
    #[inline]
    pub(crate) fn single_tail(&self, index: usize) -> Option<(*const u8, u32)> {
        let place = &self.frames.places[index];
        (place.more_count == 0).then_some((place.tail.at, place.tail.len))
    }

    /// All that follows the head, in order. Pieces are never empty.
    #[inline]
    pub(crate) fn each_piece(&self, index: usize, mut visit: impl FnMut(*const u8, usize)) {
        let place = &self.frames.places[index];
        if place.tail.len != 0 {
            visit(place.tail.at, place.tail.len as usize);
        }
        let more = place.more_first as usize..(place.more_first + place.more_count) as usize;
        for piece in &self.frames.arena[more] {
            visit(piece.at, piece.len as usize);
        }
    }
}

fn iovec(at: *const u8, len: usize) -> libc::iovec {
    libc::iovec { iov_base: at.cast_mut().cast(), iov_len: len }
}
