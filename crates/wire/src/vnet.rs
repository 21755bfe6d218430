//! The virtio-net header in front of every frame in a ring (virtio 1.2, 5.1.6).

use crate::Offloads;

/// Bytes of the header, with `num_buffers`.
pub const LEN: usize = 12;
/// Bytes of the header of a legacy guest without mergeable buffers, which has no `num_buffers` (virtio 1.2,
/// 5.1.6.1).
pub const LEGACY_LEN: usize = 10;

/// Bits of [`VnetHeader::flags`].
pub mod flag {
    /// The checksum at `csum_start + csum_offset` is left partial.
    pub const NEEDS_CSUM: u8 = 1;
    /// The checksum was verified.
    pub const DATA_VALID: u8 = 2;
    /// The `csum_` fields hold counts of coalesced segments.
    pub const RSC_INFO: u8 = 4;
}

/// Values of [`VnetHeader::gso_type`].
pub mod gso {
    /// Not to be segmented.
    pub const NONE: u8 = 0;
    /// TCP over IPv4.
    pub const TCPV4: u8 = 1;
    /// UDP, by IP fragmentation.
    pub const UDP: u8 = 3;
    /// TCP over IPv6.
    pub const TCPV6: u8 = 4;
    /// UDP, by cutting it into datagrams.
    pub const UDP_L4: u8 = 5;
    /// Bit beside a TCP type: the frame has CWR set.
    pub const ECN: u8 = 0x80;
}

/// The header, as read or to be written. Little-endian in memory; the numbers here are the host's.
///
/// One from a guest is hostile until [`VnetHeader::check`] has let it pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct VnetHeader {
    /// See [`flag`].
    pub flags: u8,
    /// See [`gso`].
    pub gso_type: u8,
    /// Bytes of all headers of the frame, up to the payload. A guest's is a hint at most.
    pub hdr_len: u16,
    /// Payload bytes per segment.
    pub gso_size: u16,
    /// Where the partial checksum starts, from the start of the frame.
    pub csum_start: u16,
    /// Where the checksum is stored, from `csum_start`.
    pub csum_offset: u16,
    /// How many buffers the frame was put into (guest's RX ring only).
    pub num_buffers: u16,
}

impl VnetHeader {
    /// Asks for nothing, in one buffer.
    // virtio 1.2, 5.1.6.4.1: without mergeable buffers num_buffers is 1.
    pub const PLAIN: VnetHeader = VnetHeader {
        flags: 0,
        gso_type: gso::NONE,
        hdr_len: 0,
        gso_size: 0,
        csum_start: 0,
        csum_offset: 0,
        num_buffers: 1,
    };

    /// Reads a header.
    #[inline]
    pub const fn from_bytes(bytes: &[u8; LEN]) -> VnetHeader {
        let [flags, gso_type, a, b, c, d, e, f, g, h, i, j] = *bytes;
        VnetHeader {
            flags,
            gso_type,
            hdr_len: u16::from_le_bytes([a, b]),
            gso_size: u16::from_le_bytes([c, d]),
            csum_start: u16::from_le_bytes([e, f]),
            csum_offset: u16::from_le_bytes([g, h]),
            num_buffers: u16::from_le_bytes([i, j]),
        }
    }

    /// Reads a legacy header; `num_buffers` becomes 1.
    #[inline]
    pub const fn from_legacy_bytes(bytes: &[u8; LEGACY_LEN]) -> VnetHeader {
        let [a, b, c, d, e, f, g, h, i, j] = *bytes;
        VnetHeader::from_bytes(&[a, b, c, d, e, f, g, h, i, j, 1, 0])
    }

    /// The header as bytes.
    #[inline]
    pub const fn to_bytes(self) -> [u8; LEN] {
        let [a, b] = self.hdr_len.to_le_bytes();
        let [c, d] = self.gso_size.to_le_bytes();
        let [e, f] = self.csum_start.to_le_bytes();
        let [g, h] = self.csum_offset.to_le_bytes();
        let [i, j] = self.num_buffers.to_le_bytes();
        [self.flags, self.gso_type, a, b, c, d, e, f, g, h, i, j]
    }

    /// The header as bytes, without `num_buffers`.
    #[inline]
    pub const fn to_legacy_bytes(self) -> [u8; LEGACY_LEN] {
        let [a, b, c, d, e, f, g, h, i, j, _, _] = self.to_bytes();
        [a, b, c, d, e, f, g, h, i, j]
    }

    /// Whether the header asks for nothing and claims nothing, so that [`VnetHeader::PLAIN`] stands for it.
    /// Most frames pass this one comparison and need no [`VnetHeader::check`].
    #[inline]
    pub const fn is_plain(&self) -> bool {
        self.flags | self.gso_type == 0
    }

    /// Whether the frame is to be segmented.
    #[inline]
    pub const fn is_gso(&self) -> bool {
        self.gso_type != gso::NONE
    }

    /// Whether the frame's checksum is left partial.
    #[inline]
    pub const fn needs_csum(&self) -> bool {
        self.flags & flag::NEEDS_CSUM != 0
    }

    /// What a receiver must be able to do to take the frame as it is.
    #[inline]
    pub const fn needs(&self) -> Offloads {
        const TSO4_ECN: u8 = gso::TCPV4 | gso::ECN;
        const TSO6_ECN: u8 = gso::TCPV6 | gso::ECN;
        let segmentation = match self.gso_type {
            gso::NONE => Offloads::NONE,
            gso::TCPV4 => Offloads::TSO4,
            gso::TCPV6 => Offloads::TSO6,
            TSO4_ECN => Offloads::TSO4.union(Offloads::ECN),
            TSO6_ECN => Offloads::TSO6.union(Offloads::ECN),
            gso::UDP => Offloads::UFO,
            gso::UDP_L4 => Offloads::USO,
            _ => Offloads::IMPOSSIBLE,
        };
        if self.needs_csum() { segmentation.union(Offloads::CSUM) } else { segmentation }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn layout_is_that_of_the_specification() {
        let bytes = [1, 0x81, 0x36, 0, 0xa8, 0x05, 0x22, 0, 0x10, 0, 2, 1];
        let header = VnetHeader {
            flags: flag::NEEDS_CSUM,
            gso_type: gso::TCPV4 | gso::ECN,
            hdr_len: 54,
            gso_size: 1448,
            csum_start: 34,
            csum_offset: 16,
            num_buffers: 0x102,
        };
        assert_eq!(VnetHeader::from_bytes(&bytes), header);
        assert_eq!(header.to_bytes(), bytes);
    }

    #[test]
    fn only_flags_and_gso_type_ask_for_something() {
        assert!(VnetHeader::PLAIN.is_plain());
        assert!(VnetHeader { hdr_len: 9, csum_start: 9, num_buffers: 9, ..VnetHeader::PLAIN }.is_plain());
        for bit in 0..8 {
            assert!(!VnetHeader { flags: 1 << bit, ..VnetHeader::PLAIN }.is_plain());
            assert!(!VnetHeader { gso_type: 1 << bit, ..VnetHeader::PLAIN }.is_plain());
        }
    }

    #[test]
    fn needs_of_each_type() {
        let needs = |flags, gso_type| VnetHeader { flags, gso_type, ..VnetHeader::PLAIN }.needs();
        assert_eq!(needs(0, 0), Offloads::NONE);
        assert_eq!(needs(flag::DATA_VALID | flag::RSC_INFO, 0), Offloads::NONE);
        assert_eq!(needs(1, 0), Offloads::CSUM);
        assert_eq!(needs(1, 1), Offloads::CSUM | Offloads::TSO4);
        assert_eq!(needs(1, 4), Offloads::CSUM | Offloads::TSO6);
        assert_eq!(needs(1, 0x81), Offloads::CSUM | Offloads::TSO4 | Offloads::ECN);
        assert_eq!(needs(1, 0x84), Offloads::CSUM | Offloads::TSO6 | Offloads::ECN);
        assert_eq!(needs(0, 3), Offloads::UFO);
        assert_eq!(needs(0, 5), Offloads::USO);
        for gso_type in 0..=255 {
            let known = matches!(gso_type, 0 | 1 | 3 | 4 | 5 | 0x81 | 0x84);
            assert_eq!(Offloads::ALL.contains(needs(1, gso_type)), known, "{gso_type:#x}");
        }
    }

    proptest! {
        #[test]
        fn bytes_come_back(bytes: [u8; LEN]) {
            let header = VnetHeader::from_bytes(&bytes);
            prop_assert_eq!(header.to_bytes(), bytes);
            let legacy = header.to_legacy_bytes();
            prop_assert_eq!(&legacy[..], &bytes[..LEGACY_LEN]);
            prop_assert_eq!(VnetHeader::from_legacy_bytes(&legacy), VnetHeader { num_buffers: 1, ..header });
        }
    }
}
