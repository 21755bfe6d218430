//! One descriptor: where a buffer is and what may be done with it. Both layouts have the same four things in 16 bytes.

/// Descriptor flag: the chain goes on at `next` (virtio 1.2, 2.7.5).
pub const DESC_NEXT: u16 = 1;
/// Descriptor flag: the device may write the buffer, otherwise read it.
pub const DESC_WRITE: u16 = 2;
/// Descriptor flag: the buffer contains a table of descriptors.
pub const DESC_INDIRECT: u16 = 4;

/// One descriptor, copied out of shared memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// Guest physical address of the buffer.
    pub addr: u64,
    /// Its length in bytes.
    pub len: u32,
    /// `DESC_*`; undefined bits are ignored.
    pub flags: u16,
    /// Split ring: next descriptor, if `DESC_NEXT`. Packed ring: the buffer's id.
    pub next: u16,
}

impl Descriptor {
    /// Bytes of a descriptor in memory.
    pub const LEN: u64 = 16;

    /// From the two words as they lie in a split ring, little-endian (virtio 1.2, 2.7.5).
    #[inline]
    #[allow(clippy::cast_possible_truncation)]
    pub(crate) fn from_words(addr: u64, rest: u64) -> Self {
        let rest = u64::from_le(rest);
        Self {
            addr: u64::from_le(addr),
            len: rest as u32,
            flags: (rest >> 32) as u16,
            next: (rest >> 48) as u16,
        }
    }

    /// The two words as they lie in a split ring.
    #[inline]
    pub(crate) fn to_words(self) -> [u64; 2] {
        let rest = u64::from(self.len) | u64::from(self.flags) << 32 | u64::from(self.next) << 48;
        [self.addr.to_le(), rest.to_le()]
    }

    /// From the two words as they lie in a packed ring (virtio 1.2, 2.8.13): id and flags have changed places.
    #[inline]
    pub(crate) fn from_packed(addr: u64, rest: u64) -> Self {
        Self::from_words(addr, rest).exchanged()
    }

    /// The two words as they lie in a packed ring.
    #[inline]
    pub(crate) fn to_packed(self) -> [u64; 2] {
        self.exchanged().to_words()
    }

    #[inline]
    fn exchanged(self) -> Self {
        Self { flags: self.next, next: self.flags, ..self }
    }
}
