//! What a guest may say that it is.
//!
//! A guest with a policy sends from its own Ethernet address only, and claims only addresses that are its own: as the
//! source of its datagrams, and in ARP and neighbour discovery, by which it could otherwise draw a neighbour's frames to
//! itself ([`wire::Claims`] has the list). A frame that cannot be judged from its first bytes claims too much. Other
//! protocols than IP have no claims and pass.
//!
//! The stage runs before the FDB learns anything, and on the private copy that is delivered.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use wire::ethernet::ethertype;
use wire::{Claims, Ethernet, Mac};

use crate::drops::DropReason;

/// The addresses of one guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    mac: Mac,
    /// Network and mask, of the guest's own addresses; no networks at all: any address.
    v4: Vec<(u32, u32)>,
    v6: Vec<(u128, u128)>,
}

impl Policy {
    /// A guest with this Ethernet address, and these addresses and their prefix lengths (bits): of a longer prefix than
    /// addresses have, the whole address counts. Without any, the guest may have whatever address it likes.
    pub fn new(mac: [u8; 6], addresses: impl IntoIterator<Item = (IpAddr, u8)>) -> Self {
        let mut policy = Self { mac: Mac::new(mac), v4: Vec::new(), v6: Vec::new() };
        for (address, bits) in addresses {
            match address {
                IpAddr::V4(address) => {
                    let mask = !u32::MAX.checked_shr(bits.into()).unwrap_or(0);
                    policy.v4.push((address.to_bits() & mask, mask));
                }
                IpAddr::V6(address) => {
                    let mask = !u128::MAX.checked_shr(bits.into()).unwrap_or(0);
                    policy.v6.push((address.to_bits() & mask, mask));
                }
            }
        }
        if !policy.allows_any() {
            policy.v6.push((link_local(mac).to_bits(), u128::MAX));
        }
        policy
    }

    /// Judges a frame of `len` bytes that begins with `prefix`.
    #[inline]
    pub(crate) fn check(&self, prefix: &[u8], len: usize) -> Result<(), DropReason> {
        if Ethernet::checked(prefix).is_none_or(|ethernet| ethernet.src() != self.mac) {
            return Err(DropReason::SpoofedMac);
        }
        let claims = Claims::of(prefix, len).map_err(|_| DropReason::SpoofedAddress)?;
        if claims.link.is_some_and(|link| link != self.mac) {
            return Err(DropReason::SpoofedMac);
        }
        let own = |claim: Option<IpAddr>| claim.is_none_or(|address| self.is_own(address));
        if own(claims.source) && own(claims.target) { Ok(()) } else { Err(DropReason::SpoofedAddress) }
    }

    /// What decides about most frames: of two that the same station sends, with the same of these, both pass or none. `None`
    /// for a frame that has to be judged by itself.
    #[inline]
    pub(crate) fn gist(prefix: &[u8]) -> Option<[u8; 4]> {
        // Ethernet without tags, and the fixed part of an IPv4 header.
        let head: &[u8; 34] = prefix.first_chunk()?;
        let is_v4 = head[12..14] == ethertype::IPV4.to_be_bytes() && head[14] >> 4 == 4;
        is_v4.then_some([head[26], head[27], head[28], head[29]])
    }

    #[inline]
    fn is_own(&self, address: IpAddr) -> bool {
        let is_own = match address {
            IpAddr::V4(address) => has_v4(&self.v4, address),
            IpAddr::V6(address) => has_v6(&self.v6, address),
        };
        is_own || self.allows_any()
    }

    fn allows_any(&self) -> bool {
        self.v4.is_empty() && self.v6.is_empty()
    }
}

#[inline]
fn has_v4(own: &[(u32, u32)], address: Ipv4Addr) -> bool {
    own.iter().any(|(network, mask)| address.to_bits() & mask == *network)
}

#[inline]
fn has_v6(own: &[(u128, u128)], address: Ipv6Addr) -> bool {
    own.iter().any(|(network, mask)| address.to_bits() & mask == *network)
}

/// The address that a station makes of its Ethernet address (RFC 4291, 2.5.6 and appendix A), which nobody assigns.
fn link_local([a, b, c, d, e, f]: [u8; 6]) -> Ipv6Addr {
    Ipv6Addr::from([0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f])
}

#[cfg(test)]
mod tests {
    use super::*;
    use wire::arp::Arp;
    use wire::craft::Craft;

    const OWN: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];
    const OTHER: [u8; 6] = [0x52, 0x54, 0, 0, 0, 2];

    fn policy(addresses: &[(&str, u8)]) -> Policy {
        Policy::new(OWN, addresses.iter().map(|(address, bits)| (address.parse().unwrap(), *bits)))
    }

    fn from(mac: [u8; 6], source: &str) -> Vec<u8> {
        let [src, dst] = [mac, OTHER].map(Mac::new);
        let craft = match source.parse().unwrap() {
            IpAddr::V4(source) => Craft::v4(src, dst, source, [10, 0, 0, 9].into()),
            IpAddr::V6(source) => Craft::v6(src, dst, source, "2001:db8::9".parse().unwrap()),
        };
        craft.udp(68, 67, b"payload")
    }

    fn check(policy: &Policy, frame: &[u8]) -> Result<(), DropReason> {
        policy.check(frame, frame.len())
    }

    #[test]
    fn a_guest_sends_from_its_own_addresses_only() {
        let policy = policy(&[("10.0.0.1", 32), ("192.0.2.77", 24), ("2001:db8::1", 128)]);
        let link_local = "fe80::5054:ff:fe00:1";
        for own in ["10.0.0.1", "192.0.2.1", "2001:db8::1", link_local, "0.0.0.0", "::"] {
            assert_eq!(check(&policy, &from(OWN, own)), Ok(()), "{own}");
            assert_eq!(check(&policy, &from(OTHER, own)), Err(DropReason::SpoofedMac), "{own}");
        }
        for other in ["10.0.0.2", "192.0.3.1", "2001:db8::2", "fe80::1", "::ffff:10.0.0.1", "127.0.0.1"] {
            assert_eq!(check(&policy, &from(OWN, other)), Err(DropReason::SpoofedAddress), "{other}");
        }
    }

    #[test]
    fn a_guest_draws_no_frames_of_its_neighbours() {
        let policy = policy(&[("10.0.0.1", 32)]);
        let own = Arp::request(Mac::new(OWN), [10, 0, 0, 1], [10, 0, 0, 2]);
        assert_eq!(check(&policy, &own.frame(Mac::BROADCAST)), Ok(()));
        let answer_for_another = Arp::request(Mac::new(OTHER), [10, 0, 0, 2], [10, 0, 0, 3]);
        let answer = answer_for_another.reply(Mac::new(OWN)).frame(Mac::new(OTHER));
        assert_eq!(check(&policy, &answer), Err(DropReason::SpoofedAddress));
        let mut false_link = own.frame(Mac::BROADCAST);
        false_link[22..28].copy_from_slice(&OTHER);
        assert_eq!(check(&policy, &false_link), Err(DropReason::SpoofedMac));
        let probe = Arp::request(Mac::new(OWN), [0; 4], [10, 0, 0, 2]).frame(Mac::BROADCAST);
        assert_eq!(check(&policy, &probe), Err(DropReason::SpoofedAddress));
    }

    #[test]
    fn without_addresses_only_the_link_is_judged() {
        let policy = policy(&[]);
        for source in ["10.0.0.1", "fe80::1"] {
            assert_eq!(check(&policy, &from(OWN, source)), Ok(()));
            assert_eq!(check(&policy, &from(OTHER, source)), Err(DropReason::SpoofedMac));
        }
    }

    #[test]
    fn all_of_an_address_family_can_be_allowed() {
        let policy = policy(&[("0.0.0.0", 0)]);
        assert_eq!(check(&policy, &from(OWN, "203.0.113.5")), Ok(()));
        assert_eq!(check(&policy, &from(OWN, "2001:db8::1")), Err(DropReason::SpoofedAddress));
    }

    #[test]
    fn frames_of_one_gist_are_judged_alike() {
        let gist = |frame: &[u8]| Policy::gist(frame);
        let policy = policy(&[("10.0.0.1", 32)]);
        let (own, other) = (from(OWN, "10.0.0.1"), from(OWN, "10.0.0.2"));
        assert_eq!((gist(&own), gist(&other)), (Some([10, 0, 0, 1]), Some([10, 0, 0, 2])));
        assert_ne!(check(&policy, &own), check(&policy, &other));
        // Neither of these is judged by its source alone.
        let arp = Arp::request(Mac::new(OWN), [10, 0, 0, 1], [10, 0, 0, 2]).frame(Mac::BROADCAST);
        let mut not_v4 = own.clone();
        not_v4[14] = 0x55;
        for frame in [&arp[..], &from(OWN, "fe80::1"), &not_v4, &own[..33]] {
            assert_eq!(gist(frame), None);
        }
    }

    #[test]
    fn what_cannot_be_judged_does_not_pass() {
        let policy = policy(&[("10.0.0.1", 32)]);
        let frame = from(OWN, "10.0.0.1");
        assert_eq!(policy.check(&frame[..30], frame.len()), Err(DropReason::SpoofedAddress));
        assert_eq!(policy.check(&frame[..8], 8), Err(DropReason::SpoofedMac));
    }
}
