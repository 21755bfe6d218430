//! Which work one side may leave to the other.
//!
//! The same set says three things: what a header *needs* of its receiver
//! ([`VnetHeader::needs`](crate::VnetHeader::needs)), what a guest may ask for on its TX ring, and what it
//! accepts on its RX ring. A frame passes untouched if the receiver's set contains what the header needs.

use core::ops::BitOr;

/// A set of offloads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct Offloads(u8);

impl Offloads {
    /// Nothing.
    pub const NONE: Offloads = Offloads(0);
    /// A checksum left partial.
    pub const CSUM: Offloads = Offloads(1 << 0);
    /// TCP over IPv4 to be segmented.
    pub const TSO4: Offloads = Offloads(1 << 1);
    /// TCP over IPv6 to be segmented.
    pub const TSO6: Offloads = Offloads(1 << 2);
    /// TCP with CWR set to be segmented (with TSO4 or TSO6).
    pub const ECN: Offloads = Offloads(1 << 3);
    /// UDP to be cut into IP fragments.
    pub const UFO: Offloads = Offloads(1 << 4);
    /// UDP to be cut into datagrams, over IPv4 and IPv6: a header does not say which.
    pub const USO: Offloads = Offloads(1 << 5);
    /// All of them.
    pub const ALL: Offloads = Offloads(0x3f);
    /// What nobody can do: the need of a header with a GSO type that does not exist.
    pub(crate) const IMPOSSIBLE: Offloads = Offloads(1 << 7);

    /// What a guest with these negotiated feature bits may ask for on its TX ring (virtio 1.2, 5.1.3).
    pub const fn from_driver_features(features: u64) -> Offloads {
        const CSUM: u32 = 0;
        // virtio 1.2, 5.1.3.2: legacy, "any GSO type"; drivers take it as TSO with ECN.
        const GSO: u32 = 6;
        const HOST_TSO4: u32 = 11;
        const HOST_TSO6: u32 = 12;
        const HOST_ECN: u32 = 13;
        const HOST_UFO: u32 = 14;
        const HOST_USO: u32 = 56;
        Offloads::CSUM
            .only_if(features, 1 << CSUM)
            .union(Offloads::TSO4.union(Offloads::TSO6).union(Offloads::ECN).only_if(features, 1 << GSO))
            .union(Offloads::TSO4.only_if(features, 1 << HOST_TSO4))
            .union(Offloads::TSO6.only_if(features, 1 << HOST_TSO6))
            .union(Offloads::ECN.only_if(features, 1 << HOST_ECN))
            .union(Offloads::UFO.only_if(features, 1 << HOST_UFO))
            .union(Offloads::USO.only_if(features, 1 << HOST_USO))
    }

    /// What a guest with these negotiated feature bits accepts on its RX ring (virtio 1.2, 5.1.3).
    pub const fn from_guest_features(features: u64) -> Offloads {
        const GUEST_CSUM: u32 = 1;
        const GUEST_TSO4: u32 = 7;
        const GUEST_TSO6: u32 = 8;
        const GUEST_ECN: u32 = 9;
        const GUEST_UFO: u32 = 10;
        const GUEST_USO4: u32 = 54;
        const GUEST_USO6: u32 = 55;
        Offloads::CSUM
            .only_if(features, 1 << GUEST_CSUM)
            .union(Offloads::TSO4.only_if(features, 1 << GUEST_TSO4))
            .union(Offloads::TSO6.only_if(features, 1 << GUEST_TSO6))
            .union(Offloads::ECN.only_if(features, 1 << GUEST_ECN))
            .union(Offloads::UFO.only_if(features, 1 << GUEST_UFO))
            .union(Offloads::USO.only_if(features, 1 << GUEST_USO4 | 1 << GUEST_USO6))
    }

    /// Whether every offload of `other` is in this set.
    #[inline]
    pub const fn contains(self, other: Offloads) -> bool {
        other.0 & !self.0 == 0
    }

    /// What is in either set.
    #[inline]
    pub const fn union(self, other: Offloads) -> Offloads {
        Offloads(self.0 | other.0)
    }

    /// What is in both sets.
    #[inline]
    pub const fn intersection(self, other: Offloads) -> Offloads {
        Offloads(self.0 & other.0)
    }

    /// Whether nothing is in the set.
    #[inline]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The set as a number, for keeping it in an atomic.
    #[inline]
    pub const fn bits(self) -> u8 {
        self.0
    }

    /// The set that [`bits`](Self::bits) gave; bits that mean nothing are left out.
    #[inline]
    pub const fn from_bits(bits: u8) -> Offloads {
        Offloads(bits & Offloads::ALL.0)
    }

    /// The set, if all of `bits` are in `features`, else nothing.
    const fn only_if(self, features: u64, bits: u64) -> Offloads {
        if features & bits == bits { self } else { Offloads::NONE }
    }
}

impl BitOr for Offloads {
    type Output = Offloads;

    #[inline]
    fn bitor(self, other: Offloads) -> Offloads {
        self.union(other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_driver_feature_allows_its_offload() {
        let set = Offloads::from_driver_features;
        assert_eq!(set(0), Offloads::NONE);
        assert_eq!(set(1 << 0), Offloads::CSUM);
        assert_eq!(set(1 << 6), Offloads::TSO4 | Offloads::TSO6 | Offloads::ECN);
        assert_eq!(set(1 << 11), Offloads::TSO4);
        assert_eq!(set(1 << 12), Offloads::TSO6);
        assert_eq!(set(1 << 13), Offloads::ECN);
        assert_eq!(set(1 << 14), Offloads::UFO);
        assert_eq!(set(1 << 56), Offloads::USO);
        let known = 1 | 1 << 6 | 0xf << 11 | 1 << 56;
        assert_eq!(set(!known), Offloads::NONE);
        assert_eq!(set(u64::MAX), Offloads::ALL);
    }

    #[test]
    fn each_guest_feature_accepts_its_offload() {
        let set = Offloads::from_guest_features;
        assert_eq!(set(1 << 1), Offloads::CSUM);
        assert_eq!(set(1 << 7), Offloads::TSO4);
        assert_eq!(set(1 << 8), Offloads::TSO6);
        assert_eq!(set(1 << 9), Offloads::ECN);
        assert_eq!(set(1 << 10), Offloads::UFO);
        assert_eq!(set(1 << 54), Offloads::NONE);
        assert_eq!(set(1 << 55), Offloads::NONE);
        assert_eq!(set(3 << 54), Offloads::USO);
        let known = 1 << 1 | 0xf << 7 | 3 << 54;
        assert_eq!(set(!known), Offloads::NONE);
        assert_eq!(set(u64::MAX), Offloads::ALL);
    }

    #[test]
    fn sets() {
        let both = Offloads::CSUM | Offloads::TSO4;
        assert!(
            both.contains(Offloads::CSUM) && both.contains(Offloads::NONE) && !both.contains(Offloads::ALL)
        );
        assert_eq!(both.intersection(Offloads::TSO4 | Offloads::USO), Offloads::TSO4);
        assert!(Offloads::NONE.is_empty() && !both.is_empty());
        assert!(!Offloads::ALL.contains(Offloads::IMPOSSIBLE));
        assert_eq!(Offloads::from_bits(both.bits()), both);
        assert_eq!(Offloads::from_bits(0xff), Offloads::ALL);
    }
}
