//! Frames to send: UDP, TCP and ICMP echo over IPv4 and IPv6, with every length and checksum right.
//!
//! For front ends that make traffic, and for tests. The only module of the crate that allocates. ARP is in
//! [`crate::arp`]. Frames are not padded to the minimum of a wire; neither do guests pad them.

use core::net::{Ipv4Addr, Ipv6Addr};

use crate::Mac;
use crate::check::csum_field;
use crate::checksum::{self, Sum};
use crate::ethernet::ethertype;
use crate::ip::{Ip, V4_HEADER_LEN, V6_HEADER_LEN, Version, protocol};
use crate::vnet::{VnetHeader, flag, gso};

const HOP_LIMIT: u8 = 64;
const IPV6_DESTINATION_OPTIONS: u8 = 60;

/// The addresses of a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "source and destination")]
pub enum Addresses {
    /// IPv4.
    V4 { src: Ipv4Addr, dst: Ipv4Addr },
    /// IPv6.
    V6 { src: Ipv6Addr, dst: Ipv6Addr },
}

/// The lower headers of the frames to be made.
#[derive(Clone, Debug)]
pub struct Craft {
    /// Ethernet source.
    pub src_mac: Mac,
    /// Ethernet destination.
    pub dst_mac: Mac,
    /// VLAN tags, the outermost first: protocol identifier and control information.
    pub tags: Vec<(u16, u16)>,
    /// IP source and destination.
    pub addresses: Addresses,
    /// Bytes of IPv4 options (a multiple of 4 up to 40), or of one IPv6 extension header (a multiple of 8 up
    /// to 2048), filled with padding.
    pub options_len: usize,
}

/// A TCP header.
#[derive(Clone, Debug)]
pub struct Tcp {
    /// Source port.
    pub src_port: u16,
    /// Destination port.
    pub dst_port: u16,
    /// Sequence number of the first payload byte.
    pub sequence: u32,
    /// Acknowledgement number.
    pub acknowledgement: u32,
    /// FIN 1, SYN 2, RST 4, PSH 8, ACK 16, URG 32, ECE 64, CWR 128.
    pub flags: u8,
    /// Options: a multiple of 4 bytes up to 40.
    pub options: Vec<u8>,
}

impl Default for Tcp {
    fn default() -> Tcp {
        Tcp {
            src_port: 40_000,
            dst_port: 80,
            sequence: 1,
            acknowledgement: 1,
            flags: 0x18,
            options: Vec::new(),
        }
    }
}

impl Craft {
    /// Untagged frames over IPv4.
    pub const fn v4(src_mac: Mac, dst_mac: Mac, src: Ipv4Addr, dst: Ipv4Addr) -> Craft {
        Craft { src_mac, dst_mac, tags: Vec::new(), addresses: Addresses::V4 { src, dst }, options_len: 0 }
    }

    /// Untagged frames over IPv6.
    pub const fn v6(src_mac: Mac, dst_mac: Mac, src: Ipv6Addr, dst: Ipv6Addr) -> Craft {
        Craft { src_mac, dst_mac, tags: Vec::new(), addresses: Addresses::V6 { src, dst }, options_len: 0 }
    }

    /// The same with one more VLAN tag, inside of those there.
    #[must_use]
    pub fn tag(mut self, protocol: u16, control: u16) -> Craft {
        self.tags.push((protocol, control));
        self
    }

    /// The same for the other direction.
    #[must_use]
    pub fn reversed(&self) -> Craft {
        let addresses = match self.addresses {
            Addresses::V4 { src, dst } => Addresses::V4 { src: dst, dst: src },
            Addresses::V6 { src, dst } => Addresses::V6 { src: dst, dst: src },
        };
        Craft { src_mac: self.dst_mac, dst_mac: self.src_mac, addresses, ..self.clone() }
    }

    /// A UDP datagram.
    pub fn udp(&self, src_port: u16, dst_port: u16, payload: &[u8]) -> Vec<u8> {
        let [a, b] = src_port.to_be_bytes();
        let [c, d] = dst_port.to_be_bytes();
        let [e, f] = length16(8 + payload.len()).to_be_bytes();
        self.frame(protocol::UDP, &[&[a, b, c, d, e, f, 0, 0], payload])
    }

    /// A TCP segment.
    pub fn tcp(&self, tcp: &Tcp, payload: &[u8]) -> Vec<u8> {
        let mut header = Vec::with_capacity(60);
        header.extend(tcp.src_port.to_be_bytes());
        header.extend(tcp.dst_port.to_be_bytes());
        header.extend(tcp.sequence.to_be_bytes());
        header.extend(tcp.acknowledgement.to_be_bytes());
        let words = u8::try_from(5 + tcp.options.len() / 4).unwrap_or(u8::MAX);
        header.extend([words << 4, tcp.flags, 0xff, 0xff, 0, 0, 0, 0]);
        self.frame(protocol::TCP, &[&header, &tcp.options, payload])
    }

    /// An ICMP or ICMPv6 echo request.
    pub fn echo_request(&self, id: u16, sequence: u16, payload: &[u8]) -> Vec<u8> {
        self.echo([8, 128], id, sequence, payload)
    }

    /// An ICMP or ICMPv6 echo reply.
    pub fn echo_reply(&self, id: u16, sequence: u16, payload: &[u8]) -> Vec<u8> {
        self.echo([0, 129], id, sequence, payload)
    }

    fn echo(&self, [v4, v6]: [u8; 2], id: u16, sequence: u16, payload: &[u8]) -> Vec<u8> {
        let (protocol, kind) = match self.addresses {
            Addresses::V4 { .. } => (protocol::ICMP, v4),
            Addresses::V6 { .. } => (protocol::ICMPV6, v6),
        };
        let [a, b] = id.to_be_bytes();
        let [c, d] = sequence.to_be_bytes();
        self.frame(protocol, &[&[kind, 0, 0, 0, a, b, c, d], payload])
    }

    /// A frame with these pieces as its L4 header and payload.
    fn frame(&self, protocol: u8, pieces: &[&[u8]]) -> Vec<u8> {
        let l4_len: usize = pieces.iter().map(|piece| piece.len()).sum();
        let mut frame = Vec::with_capacity(142 + l4_len);
        frame.extend(self.dst_mac.octets());
        frame.extend(self.src_mac.octets());
        for (protocol, control) in &self.tags {
            frame.extend(protocol.to_be_bytes());
            frame.extend(control.to_be_bytes());
        }
        match self.addresses {
            Addresses::V4 { src, dst } => self.v4_header(&mut frame, (src, dst), protocol, l4_len),
            Addresses::V6 { src, dst } => self.v6_header(&mut frame, (src, dst), protocol, l4_len),
        }
        let l4 = frame.len();
        pieces.iter().for_each(|piece| frame.extend_from_slice(piece));
        let csum_at = l4 + csum_field(protocol).map_or(2, usize::from);
        let sum = self.pseudo(protocol, l4_len).with(&frame[l4..]);
        put(&mut frame, csum_at, checksum::nonzero(sum.checksum()));
        frame
    }

    fn v4_header(&self, frame: &mut Vec<u8>, (src, dst): (Ipv4Addr, Ipv4Addr), protocol: u8, l4_len: usize) {
        const NO_OPERATION: u8 = 1;
        const DONT_FRAGMENT: u8 = 0x40;
        frame.extend(ethertype::IPV4.to_be_bytes());
        let l3 = frame.len();
        let header_len = V4_HEADER_LEN + self.options_len;
        frame.push(0x40 | u8::try_from(header_len / 4).unwrap_or(0x0f) & 0x0f);
        frame.push(0);
        frame.extend(length16(header_len + l4_len).to_be_bytes());
        frame.extend([0, 0, DONT_FRAGMENT, 0, HOP_LIMIT, protocol, 0, 0]);
        frame.extend(src.octets());
        frame.extend(dst.octets());
        frame.resize(l3 + header_len, NO_OPERATION);
        let checksum = checksum::ipv4_header(&frame[l3..]);
        put(frame, l3 + 10, checksum);
    }

    fn v6_header(&self, frame: &mut Vec<u8>, (src, dst): (Ipv6Addr, Ipv6Addr), protocol: u8, l4_len: usize) {
        frame.extend(ethertype::IPV6.to_be_bytes());
        let l3 = frame.len();
        frame.extend([0x60, 0, 0, 0]);
        frame.extend(length16(self.options_len + l4_len).to_be_bytes());
        frame.extend([if self.options_len > 0 { IPV6_DESTINATION_OPTIONS } else { protocol }, HOP_LIMIT]);
        frame.extend(src.octets());
        frame.extend(dst.octets());
        if self.options_len > 0 {
            frame.extend([protocol, u8::try_from(self.options_len / 8 - 1).unwrap_or(u8::MAX)]);
            // RFC 8200, 4.2: zeros are Pad1 options.
            frame.resize(l3 + V6_HEADER_LEN + self.options_len, 0);
        }
    }

    fn pseudo(&self, protocol: u8, l4_len: usize) -> Sum {
        let l4_len = u32::try_from(l4_len).unwrap_or(u32::MAX);
        match self.addresses {
            // RFC 792: without a pseudo-header.
            Addresses::V4 { .. } if protocol == protocol::ICMP => Sum::new(),
            Addresses::V4 { src, dst } => checksum::pseudo_v4(src.octets(), dst.octets(), protocol, l4_len),
            Addresses::V6 { src, dst } => checksum::pseudo_v6(src.octets(), dst.octets(), protocol, l4_len),
        }
    }
}

/// Undoes the checksum of a UDP or TCP frame, as a guest leaves it to the device, and returns the header that
/// asks for it. `None`, and nothing done, if the frame is another one, or a fragment.
pub fn leave_checksum(frame: &mut [u8]) -> Option<VnetHeader> {
    let ip = Ip::parse(frame, frame.len()).ok().filter(|ip| !ip.fragment)?;
    let csum_offset = csum_field(ip.protocol)?;
    let csum_at = ip.l4 + usize::from(csum_offset);
    let csum_start = u16::try_from(ip.l4).ok()?;
    if csum_at + 2 > ip.end {
        return None;
    }
    // Addresses, and nothing else, are the last bytes of both fixed headers.
    let addresses = match ip.version {
        Version::V4 => &frame[ip.l3 + 12..ip.l3 + V4_HEADER_LEN],
        Version::V6 => &frame[ip.l3 + 8..ip.l3 + V6_HEADER_LEN],
    };
    let l4_len = u32::try_from(ip.end - ip.l4).ok()?;
    let sum = Sum::new().with(addresses).with_word(u16::from(ip.protocol)).with(&l4_len.to_be_bytes());
    put(frame, csum_at, sum.partial());
    Some(VnetHeader { flags: flag::NEEDS_CSUM, csum_start, csum_offset, ..VnetHeader::PLAIN })
}

/// As [`leave_checksum`], and leaves the frame to be cut into segments of `gso_size` bytes of payload.
pub fn leave_segments(frame: &mut [u8], gso_size: u16) -> Option<VnetHeader> {
    let header = leave_checksum(frame)?;
    let ip = Ip::parse(frame, frame.len()).ok()?;
    let (gso_type, l4_len) = match (ip.protocol, ip.version) {
        (protocol::UDP, _) => (gso::UDP_L4, 8),
        (_, version) => {
            let kind = if version == Version::V4 { gso::TCPV4 } else { gso::TCPV6 };
            let ecn = if frame[ip.l4 + 13] & 0x80 != 0 { gso::ECN } else { 0 };
            (kind | ecn, usize::from(frame[ip.l4 + 12] >> 4) * 4)
        }
    };
    let hdr_len = u16::try_from(ip.l4 + l4_len).ok()?;
    Some(VnetHeader { gso_type, gso_size, hdr_len, ..header })
}

/// A length field; 0 if the length does not fit, as in frames that are to be segmented.
fn length16(length: usize) -> u16 {
    u16::try_from(length).unwrap_or(0)
}

fn put(frame: &mut [u8], at: usize, value: u16) {
    frame[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

#[cfg(test)]
impl Craft {
    /// Some stations and IPv4 addresses.
    pub(crate) fn sample_v4() -> Craft {
        let [src, dst] = [1, 2].map(|n| Ipv4Addr::new(192, 0, 2, n));
        Craft::v4(Mac::from_u64(0x0200_0000_0001), Mac::from_u64(0x0200_0000_0002), src, dst)
    }

    /// The same stations and IPv6 addresses.
    pub(crate) fn sample_v6() -> Craft {
        let [src, dst] = [1, 2].map(|n| Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, n));
        Craft::v6(Mac::from_u64(0x0200_0000_0001), Mac::from_u64(0x0200_0000_0002), src, dst)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_udp_and_tcp_can_be_left_unfinished() {
        let mut echo = Craft::sample_v4().echo_request(1, 2, b"x");
        let mut fragment = Craft::sample_v4().udp(1, 2, b"x");
        fragment[20] = 0x20;
        let mut cut = Craft::sample_v4().udp(1, 2, b"");
        cut[17] = 20;
        for frame in [&mut echo, &mut fragment, &mut cut] {
            let before = frame.clone();
            assert_eq!(leave_checksum(frame), None);
            assert_eq!(leave_segments(frame, 1000), None);
            assert_eq!(*frame, before);
        }
    }

    #[test]
    fn a_known_frame() {
        let frame = Craft::sample_v4().echo_request(1, 1, b"");
        let expected = [
            2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0, //
            0x45, 0, 0, 28, 0, 0, 0x40, 0, 64, 1, 0xb6, 0xdd, 192, 0, 2, 1, 192, 0, 2, 2, //
            8, 0, 0xf7, 0xfd, 0, 1, 0, 1,
        ];
        assert_eq!(frame, expected);
    }
}
