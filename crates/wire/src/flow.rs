//! The flow hash, by which a frame's receive queue is chosen.

use crate::ethernet::Ethernet;
use crate::ip::{Ip, Version, protocol};

/// A number that is the same for all frames of a flow, and in both of its directions (symmetric).
///
/// A flow is the pair of addresses with the pair of ports, where the protocol has ports. Fragments, the first
/// one included, count by addresses only, since the others carry no ports. Frames without readable IP headers
/// count by their pair of MAC addresses, runts as 0. VLAN tags do not matter. `prefix` is the frame or its
/// first bytes; 54 of them hold all that is needed of an untagged frame without IP options.
///
/// Not for tables that a guest must not be able to fill with collisions: there is no secret in it.
#[inline]
pub fn flow_hash(prefix: &[u8]) -> u32 {
    // Nothing here depends on lengths, so the end of the frame need not be known.
    let Ok(ip) = Ip::parse(prefix, usize::MAX) else {
        return mac_hash(prefix);
    };
    let ports = ports(prefix, &ip);
    match (ip.version, prefix.get(ip.l3..)) {
        (Version::V4, Some(header)) if header.len() >= 20 => {
            symmetric(word(header, 12) >> 32, word(header, 12) & 0xffff_ffff, ports)
        }
        (Version::V6, Some(header)) if header.len() >= 40 => {
            let network = symmetric(word(header, 8), word(header, 24), ports);
            symmetric(word(header, 16), word(header, 32), u64::from(network))
        }
        _ => mac_hash(prefix),
    }
}

#[cold]
fn mac_hash(prefix: &[u8]) -> u32 {
    match Ethernet::checked(prefix) {
        Some(ethernet) => symmetric(ethernet.src().to_u64(), ethernet.dst().to_u64(), 0),
        None => 0,
    }
}

/// Both ports in an order that does not depend on the direction, and a mark that there are ports.
#[inline]
fn ports(prefix: &[u8], ip: &Ip) -> u64 {
    use protocol::{DCCP, SCTP, TCP, UDP, UDP_LITE};
    if ip.fragment || !matches!(ip.protocol, TCP | UDP | SCTP | DCCP | UDP_LITE) {
        return 0;
    }
    match prefix.get(ip.l4..).and_then(|l4| l4.first_chunk()) {
        Some(&[a, b, c, d]) => {
            let (src, dst) = (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]));
            1 << 32 | u64::from(src.max(dst)) << 16 | u64::from(src.min(dst))
        }
        None => 0,
    }
}

#[inline]
fn word(bytes: &[u8], at: usize) -> u64 {
    bytes[at..].first_chunk().map_or(0, |word| u64::from_be_bytes(*word))
}

/// Two halves of what `a` and `b` are regardless of their order, multiplied and folded: every bit reaches
/// every bit.
#[inline]
#[expect(clippy::cast_possible_truncation, reason = "folding keeps the low halves on purpose")]
fn symmetric(a: u64, b: u64, salt: u64) -> u32 {
    const ODD: u64 = 0x9e37_79b9_7f4a_7c15;
    let difference = (a ^ b ^ ODD).wrapping_add(salt.wrapping_mul(ODD));
    let sum = a.wrapping_add(b) ^ 0xe703_7ed1_a0b4_28db;
    let product = u128::from(difference) * u128::from(sum);
    let folded = product as u64 ^ (product >> 64) as u64;
    // One more round, or low bits of sequential addresses stay sequential.
    let folded = u128::from(folded ^ ODD) * u128::from(ODD);
    ((folded >> 64) as u64 ^ folded as u64) as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Mac;
    use crate::craft::{Addresses, Craft, Tcp};
    use crate::ethernet::ethertype;
    use std::net::Ipv4Addr;

    #[test]
    fn payload_tags_and_prefix_do_not_change_a_flows_hash() {
        for craft in [Craft::sample_v4(), Craft::sample_v6()] {
            let first = flow_hash(&craft.udp(1000, 2000, b""));
            assert_eq!(first, flow_hash(&craft.udp(1000, 2000, &[7; 900])));
            assert_eq!(first, flow_hash(&craft.udp(1000, 2000, &[7; 900])[..64]));
            assert_eq!(first, flow_hash(&craft.clone().tag(ethertype::VLAN, 9).udp(1000, 2000, b"")));
            assert_ne!(first, flow_hash(&craft.udp(1001, 2000, b"")));
        }
    }

    #[test]
    fn both_directions_have_one_hash() {
        for craft in [Craft::sample_v4(), Craft::sample_v6()] {
            let there = craft.tcp(&Tcp { src_port: 40_000, dst_port: 80, ..Tcp::default() }, b"question");
            let back =
                craft.reversed().tcp(&Tcp { src_port: 80, dst_port: 40_000, ..Tcp::default() }, b"answer");
            assert_eq!(flow_hash(&there), flow_hash(&back));
        }
    }

    #[test]
    fn fragments_of_a_datagram_stay_together() {
        let mut first = Craft::sample_v4().udp(1000, 2000, &[0; 32]);
        first[20] = 0x20;
        let mut last = Craft::sample_v4().udp(9, 9, &[1; 64]);
        last[21] = 4;
        assert_eq!(flow_hash(&first), flow_hash(&last));
    }

    #[test]
    fn frames_without_ip_go_by_their_addresses() {
        let arp =
            crate::arp::Arp::request("02:00:00:00:00:01".parse().unwrap(), [10, 0, 0, 1], [10, 0, 0, 2]);
        assert_eq!(flow_hash(&arp.frame(Mac::BROADCAST)), flow_hash(&arp.frame(Mac::BROADCAST)[..14]));
        assert_ne!(flow_hash(&arp.frame(Mac::BROADCAST)), flow_hash(&arp.frame(Mac::ZERO)));
        assert_eq!(flow_hash(&[0xff; 13]), 0);
    }

    #[test]
    fn flows_spread_over_queues() {
        let hashes = (0..4096u16).map(|n| {
            let [high, low] = n.to_be_bytes();
            let (src, dst) = (Ipv4Addr::new(10, 0, high, low), Ipv4Addr::new(192, 0, 2, 1));
            flow_hash(
                &Craft { addresses: Addresses::V4 { src, dst }, ..Craft::sample_v4() }.udp(5000, 6000, b""),
            )
        });
        let mut queues = [0; 8];
        hashes.for_each(|hash| queues[hash as usize % 8] += 1);
        assert!(queues.iter().all(|count| (400..624).contains(count)), "{queues:?}");

        let mut queues = [0; 8];
        for port in 32_768..36_864 {
            queues[flow_hash(&Craft::sample_v6().udp(port, 80, b"")) as usize % 8] += 1;
        }
        assert!(queues.iter().all(|count| (400..624).contains(count)), "{queues:?}");
    }
}
