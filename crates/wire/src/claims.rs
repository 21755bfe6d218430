//! Whom a frame says that it is from, above Ethernet.
//!
//! Neighbours believe three things of a frame: the source of its datagram; what an ARP packet says of its sender (RFC 826),
//! or, if it is a probe, of its target (RFC 5227, 1.1); and what neighbour discovery says of the link-layer address of the
//! sender, and of the target of an advertisement (RFC 4861, 4) or of a probe (RFC 4862, 5.4). An unspecified source says
//! nothing: so ask stations that have no address yet.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::arp::{self, Arp};
use crate::ethernet::{Ethernet, ethertype};
use crate::ip::{Ip, IpFault, Prefix, V4_HEADER_LEN, Version, protocol};
use crate::{Mac, ethernet};

/// Types of ICMPv6 messages, RFC 4861, 4.
mod icmpv6 {
    pub(super) const ROUTER_SOLICITATION: u8 = 133;
    pub(super) const ROUTER_ADVERTISEMENT: u8 = 134;
    pub(super) const NEIGHBOUR_SOLICITATION: u8 = 135;
    pub(super) const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
}

/// RFC 4861, 4.6.1: source and target link-layer address.
const LINK_LAYER_OPTIONS: [u8; 2] = [1, 2];
/// Units of an option's length (RFC 4861, 4.6), bytes.
const OPTION_UNIT: usize = 8;

/// What a frame claims for its sender. Without any, it is of another protocol, or the sender has no address yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Claims {
    /// The link-layer address said to be the sender's; the Ethernet header says it once more.
    pub link: Option<Mac>,
    /// The source of the datagram, or the sender of the ARP packet.
    pub source: Option<IpAddr>,
    /// The address that an advertisement or a probe says is the sender's.
    pub target: Option<IpAddr>,
}

impl Claims {
    /// Reads a frame of `frame_len` bytes which starts with `prefix`. What cannot be told from the prefix is a fault, not
    /// the absence of a claim.
    #[inline]
    pub fn of(prefix: &[u8], frame_len: usize) -> Result<Claims, IpFault> {
        let Some(ethernet) = Ethernet::checked(prefix) else {
            return Err(Prefix::new(prefix, frame_len).missing(ethernet::HEADER_LEN));
        };
        match ethernet.past_tags() {
            (ethertype::IPV4, l3) => v4(Prefix::new(prefix, frame_len), l3),
            (ethertype::IPV6, _) => v6(prefix, frame_len),
            (ethertype::ARP | ethertype::RARP, l3) => arp(Prefix::new(prefix, frame_len), l3),
            (tag, at) if ethernet::is_cut_tag(tag, at) => {
                Err(Prefix::new(prefix, frame_len).missing(at + ethernet::TAG_LEN))
            }
            _ => Ok(Claims::default()),
        }
    }
}

#[inline]
fn v4(prefix: Prefix<'_>, l3: usize) -> Result<Claims, IpFault> {
    let header: &[u8; V4_HEADER_LEN] = prefix.chunk(l3)?;
    if header[0] >> 4 != 4 {
        return Err(IpFault::Malformed);
    }
    let source = Ipv4Addr::new(header[12], header[13], header[14], header[15]);
    Ok(Claims { source: specified(source.into()), ..Claims::default() })
}

fn arp(prefix: Prefix<'_>, l3: usize) -> Result<Claims, IpFault> {
    let packet: &[u8; arp::LEN] = prefix.chunk(l3)?;
    let packet = Arp::parse(packet).ok_or(IpFault::Malformed)?;
    let [source, target] = [packet.sender_ip, packet.target_ip].map(|ip| specified(IpAddr::from(ip)));
    let is_probe = source.is_none() && packet.operation == arp::operation::REQUEST;
    Ok(Claims { link: Some(packet.sender_mac), source, target: target.filter(|_| is_probe) })
}

fn v6(bytes: &[u8], frame_len: usize) -> Result<Claims, IpFault> {
    let ip = Ip::parse(bytes, frame_len)?;
    debug_assert_eq!(ip.version, Version::V6);
    let prefix = Prefix::new(bytes, frame_len);
    let source: &[u8; 16] = prefix.chunk(ip.l3 + 8)?;
    let claims = Claims { source: specified(IpAddr::from(*source)), ..Claims::default() };
    // RFC 6980, 5: nobody takes neighbour discovery in fragments.
    if ip.protocol != protocol::ICMPV6 || ip.fragment {
        return Ok(claims);
    }
    neighbour_discovery(prefix, &ip, claims)
}

fn neighbour_discovery(prefix: Prefix<'_>, ip: &Ip, claims: Claims) -> Result<Claims, IpFault> {
    let [kind]: &[u8; 1] = prefix.chunk(ip.l4)?;
    let (options, says_target) = match *kind {
        icmpv6::ROUTER_SOLICITATION => (8, false),
        icmpv6::ROUTER_ADVERTISEMENT => (16, false),
        icmpv6::NEIGHBOUR_SOLICITATION => (24, claims.source.is_none()),
        icmpv6::NEIGHBOUR_ADVERTISEMENT => (24, true),
        _ => return Ok(claims),
    };
    let target = if says_target {
        let target: &[u8; 16] = prefix.chunk(ip.l4 + 8)?;
        specified(Ipv6Addr::from(*target).into())
    } else {
        None
    };
    Ok(Claims { link: link_layer_option(prefix, ip.l4 + options, ip.end)?, target, ..claims })
}

/// The link-layer address in the options from `at` to `end`; two that differ are a fault.
fn link_layer_option(prefix: Prefix<'_>, mut at: usize, end: usize) -> Result<Option<Mac>, IpFault> {
    let mut link = None;
    while at < end {
        let [kind, units]: &[u8; 2] = prefix.chunk(at)?;
        if LINK_LAYER_OPTIONS.contains(kind) {
            let octets: &[u8; 6] = prefix.chunk(at + 2)?;
            let found = Mac::new(*octets);
            if link.replace(found).is_some_and(|before| before != found) {
                return Err(IpFault::Malformed);
            }
        }
        if *units == 0 {
            return Err(IpFault::Malformed);
        }
        at += usize::from(*units) * OPTION_UNIT;
    }
    Ok(link)
}

fn specified(address: IpAddr) -> Option<IpAddr> {
    (!address.is_unspecified()).then_some(address)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::craft::Craft;

    const A: Mac = Mac::new([2, 0, 0, 0, 0, 1]);
    const B: Mac = Mac::new([2, 0, 0, 0, 0, 2]);
    const TARGET: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 9);

    fn of(frame: &[u8]) -> Result<Claims, IpFault> {
        Claims::of(frame, frame.len())
    }

    fn v4(source: [u8; 4]) -> Vec<u8> {
        Craft::v4(A, B, source.into(), [10, 0, 0, 2].into()).udp(68, 67, b"payload")
    }

    /// Neighbour discovery: the body behind the checksum.
    fn discovery(source: Ipv6Addr, kind: u8, body: &[u8]) -> Vec<u8> {
        let mut frame = Craft::v6(A, B, source, TARGET).udp(0, 0, &body[4..]);
        frame[20] = protocol::ICMPV6;
        frame[54] = kind;
        frame[58..62].copy_from_slice(&body[..4]);
        frame
    }

    fn body(target: Option<Ipv6Addr>, reserved: usize, options: &[&[u8]]) -> Vec<u8> {
        let mut body = vec![0; reserved];
        body.extend(target.iter().flat_map(|target| target.octets()));
        options.iter().for_each(|option| body.extend_from_slice(option));
        body
    }

    fn link_option(kind: u8, mac: Mac) -> Vec<u8> {
        [&[kind, 1][..], &mac.octets()].concat()
    }

    #[test]
    fn a_datagram_claims_its_source() {
        let source = Some(IpAddr::from([10, 0, 0, 1]));
        assert_eq!(of(&v4([10, 0, 0, 1])), Ok(Claims { source, ..Claims::default() }));
        assert_eq!(of(&v4([0; 4])), Ok(Claims::default()));
        let tagged = Craft::v4(A, B, [10, 0, 0, 1].into(), [10, 0, 0, 2].into()).tag(ethertype::VLAN, 7);
        assert_eq!(of(&tagged.udp(1, 2, b"")).unwrap().source, source);
        let v6 = Craft::sample_v6().udp(1, 2, b"payload");
        assert!(matches!(of(&v6).unwrap(), Claims { link: None, source: Some(IpAddr::V6(_)), target: None }));
    }

    #[test]
    fn arp_claims_its_sender_and_a_probe_its_target() {
        let ip = |last: u8| Some(IpAddr::from([10, 0, 0, last]));
        let request = Arp::request(A, [10, 0, 0, 1], [10, 0, 0, 2]);
        let expected = Claims { link: Some(A), source: ip(1), target: None };
        assert_eq!(of(&request.frame(Mac::BROADCAST)), Ok(expected));
        assert_eq!(of(&request.reply(B).frame(A)), Ok(Claims { link: Some(B), source: ip(2), target: None }));
        let probe = Arp::request(A, [0; 4], [10, 0, 0, 2]);
        let expected = Claims { link: Some(A), source: None, target: ip(2) };
        assert_eq!(of(&probe.frame(Mac::BROADCAST)), Ok(expected));
        let announced = of(&crate::rarp::announcement(A));
        assert_eq!(announced, Ok(Claims { link: Some(A), ..Claims::default() }));
        let mut odd = request.frame(Mac::BROADCAST);
        odd[15] = 6;
        assert_eq!(of(&odd), Err(IpFault::Malformed));
    }

    #[test]
    fn neighbour_discovery_claims_link_layer_addresses_and_targets() {
        use icmpv6::*;
        let source: Ipv6Addr = "fe80::1".parse().unwrap();
        let (own, other) = (link_option(1, A), link_option(2, B));
        let claims = |link, says_target: bool| Claims {
            link,
            source: Some(source.into()),
            target: says_target.then_some(TARGET.into()),
        };
        for (kind, body, expected) in [
            (NEIGHBOUR_SOLICITATION, body(Some(TARGET), 4, &[&own]), claims(Some(A), false)),
            (NEIGHBOUR_ADVERTISEMENT, body(Some(TARGET), 4, &[&other]), claims(Some(B), true)),
            (NEIGHBOUR_ADVERTISEMENT, body(Some(TARGET), 4, &[]), claims(None, true)),
            (ROUTER_SOLICITATION, body(None, 4, &[&own]), claims(Some(A), false)),
            (
                ROUTER_ADVERTISEMENT,
                body(None, 12, &[&[5, 1, 0, 0, 0, 0, 5, 220], &own]),
                claims(Some(A), false),
            ),
            (128, body(Some(TARGET), 4, &[&own]), claims(None, false)),
        ] {
            assert_eq!(of(&discovery(source, kind, &body)), Ok(expected), "{kind}");
        }
        let probe = discovery(Ipv6Addr::UNSPECIFIED, NEIGHBOUR_SOLICITATION, &body(Some(TARGET), 4, &[]));
        assert_eq!(of(&probe), Ok(Claims { target: Some(TARGET.into()), ..Claims::default() }));
    }

    #[test]
    fn lies_in_options_are_faults() {
        use icmpv6::*;
        let source: Ipv6Addr = "fe80::1".parse().unwrap();
        let said = |options: &[&[u8]]| {
            of(&discovery(source, NEIGHBOUR_ADVERTISEMENT, &body(Some(TARGET), 4, options)))
        };
        assert_eq!(said(&[&link_option(1, A), &link_option(2, B)]), Err(IpFault::Malformed));
        assert_eq!(said(&[&[9, 0, 0, 0, 0, 0, 0, 0]]), Err(IpFault::Malformed));
        assert_eq!(said(&[&[2, 1, 0]]), Err(IpFault::Malformed));
        let behind_options = discovery(source, NEIGHBOUR_ADVERTISEMENT, &body(Some(TARGET), 4, &[]));
        assert_eq!(Claims::of(&behind_options[..60], behind_options.len()), Err(IpFault::NotInPrefix));
    }

    #[test]
    fn a_frame_may_end_anywhere() {
        let own = link_option(1, A);
        let solicitation = discovery(
            "fe80::1".parse().unwrap(),
            icmpv6::NEIGHBOUR_SOLICITATION,
            &body(Some(TARGET), 4, &[&own]),
        );
        for frame in [v4([10, 0, 0, 1]), Arp::request(A, [1; 4], [2; 4]).frame(B).to_vec(), solicitation] {
            for length in 0..frame.len() {
                let cut = Claims::of(&frame[..length], length);
                let unknown = Claims::of(&frame[..length], frame.len());
                // Where one says something, the other says the same: what is there does not depend on what is not.
                assert!(cut.is_err() || cut == of(&frame), "{length}");
                assert!(unknown.is_err() || unknown == of(&frame), "{length}");
                assert_ne!(unknown, Err(IpFault::Malformed), "{length}");
            }
        }
    }
}
