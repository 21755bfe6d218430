//! Where the headers of an IPv4 or IPv6 frame lie (RFC 791, RFC 8200).
//!
//! The parser may be given less than the frame. It reads only what it was given, checks every length in it
//! against the length of the whole frame, and says which of the two ended first.

use core::fmt;

use crate::ethernet::{self, Ethernet, ethertype};

/// How many IPv6 extension headers are walked.
pub const EXTENSIONS_MAX: usize = 8;
/// An IPv4 header without options.
pub const V4_HEADER_LEN: usize = 20;
/// The fixed IPv6 header.
pub const V6_HEADER_LEN: usize = 40;

/// IP protocol numbers (IANA), IPv6 extension headers among them.
pub mod protocol {
    /// ICMP.
    pub const ICMP: u8 = 1;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// DCCP.
    pub const DCCP: u8 = 33;
    /// ICMPv6.
    pub const ICMPV6: u8 = 58;
    /// SCTP.
    pub const SCTP: u8 = 132;
    /// UDP-Lite.
    pub const UDP_LITE: u8 = 136;

    pub(super) const HOP_BY_HOP: u8 = 0;
    pub(super) const ROUTING: u8 = 43;
    pub(super) const FRAGMENT: u8 = 44;
    pub(super) const AUTHENTICATION: u8 = 51;
    pub(super) const DESTINATION: u8 = 60;
}

/// IPv4 or IPv6.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// RFC 791.
    V4,
    /// RFC 8200.
    V6,
}

/// The places of a frame's headers: `l3 < l4 <= end <= frame length`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ip {
    /// Which header starts at `l3`.
    pub version: Version,
    /// Offset of the IP header in the frame. Its fixed part is within the prefix that was parsed.
    pub l3: usize,
    /// Offset behind the IP header, its options and extension headers. It may lie behind the prefix.
    pub l4: usize,
    /// Offset behind the datagram; what follows in the frame is padding.
    pub end: usize,
    /// What starts at `l4`.
    pub protocol: u8,
    /// Whether the datagram is a fragment, the first one included.
    pub fragment: bool,
}

/// Why a frame's IP headers are not known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IpFault {
    /// Another EtherType, or more VLAN tags than are looked through.
    NotIp,
    /// The headers go on behind the prefix.
    NotInPrefix,
    /// The headers contradict themselves or the length of the frame, or there are more than
    /// [`EXTENSIONS_MAX`].
    Malformed,
}

impl fmt::Display for IpFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            IpFault::NotIp => "the frame is not IP",
            IpFault::NotInPrefix => "the IP headers are longer than the part of the frame that is looked at",
            IpFault::Malformed => "the IP headers contradict themselves or the length of the frame",
        })
    }
}

impl core::error::Error for IpFault {}

impl Ip {
    /// Finds the IP headers of a frame of `frame_len` bytes which starts with `prefix`.
    ///
    /// A length field of 0 stands for "up to the end of the frame": so say senders that leave the field to
    /// segmentation offload. With `usize::MAX` as the length, nothing is held against the end of the frame.
    #[inline]
    pub fn parse(prefix: &[u8], frame_len: usize) -> Result<Ip, IpFault> {
        let prefix = Prefix::new(prefix, frame_len);
        let Some(ethernet) = Ethernet::checked(prefix.bytes) else {
            return Err(prefix.missing(ethernet::HEADER_LEN));
        };
        let (ethertype, l3) = ethernet.past_tags();
        match ethertype {
            ethertype::IPV4 => v4(prefix, l3),
            ethertype::IPV6 => v6(prefix, l3),
            tag if ethernet::is_cut_tag(tag, l3) => Err(prefix.missing(l3 + ethernet::TAG_LEN)),
            _ => Err(IpFault::NotIp),
        }
    }
}

#[inline]
fn v4(prefix: Prefix<'_>, l3: usize) -> Result<Ip, IpFault> {
    let header: &[u8; V4_HEADER_LEN] = prefix.chunk(l3)?;
    let header_len = usize::from(header[0] & 0x0f) * 4;
    let total_len = usize::from(u16::from_be_bytes([header[2], header[3]]));
    let end = if total_len == 0 { prefix.frame_len } else { l3 + total_len };
    let l4 = l3 + header_len;
    if header[0] >> 4 != 4 || header_len < V4_HEADER_LEN || l4 > end || end > prefix.frame_len {
        return Err(IpFault::Malformed);
    }
    // RFC 791, 3.1: "more fragments", or a fragment offset.
    let fragment = u16::from_be_bytes([header[6], header[7]]) & 0x3fff != 0;
    Ok(Ip { version: Version::V4, l3, l4, end, protocol: header[9], fragment })
}

#[inline]
fn v6(prefix: Prefix<'_>, l3: usize) -> Result<Ip, IpFault> {
    let header: &[u8; V6_HEADER_LEN] = prefix.chunk(l3)?;
    let payload_len = usize::from(u16::from_be_bytes([header[4], header[5]]));
    let l4 = l3 + V6_HEADER_LEN;
    let end = if payload_len == 0 { prefix.frame_len } else { l4 + payload_len };
    if header[0] >> 4 != 6 || end > prefix.frame_len {
        return Err(IpFault::Malformed);
    }
    let ip = Ip { version: Version::V6, l3, l4, end, protocol: header[6], fragment: false };
    past_extensions(prefix, ip)
}

/// Moves `ip.l4` behind the extension headers (RFC 8200, 4). Each is 8 bytes at least.
#[inline]
fn past_extensions(prefix: Prefix<'_>, mut ip: Ip) -> Result<Ip, IpFault> {
    use protocol::{AUTHENTICATION, DESTINATION, FRAGMENT, HOP_BY_HOP, ROUTING};
    for _ in 0..=EXTENSIONS_MAX {
        let mut later_fragment = false;
        let (next, len) = match ip.protocol {
            HOP_BY_HOP | ROUTING | DESTINATION => {
                let header: &[u8; 8] = prefix.chunk(ip.l4)?;
                (header[0], usize::from(header[1]) * 8 + 8)
            }
            // RFC 4302, 2.2: in units of 4 bytes, less 2.
            AUTHENTICATION => {
                let header: &[u8; 8] = prefix.chunk(ip.l4)?;
                (header[0], usize::from(header[1]) * 4 + 8)
            }
            FRAGMENT => {
                let header: &[u8; 8] = prefix.chunk(ip.l4)?;
                let offset = u16::from_be_bytes([header[2], header[3]]);
                // RFC 6946: neither "more fragments" nor an offset is a whole datagram.
                ip.fragment |= offset & 0xfff9 != 0;
                later_fragment = offset & 0xfff8 != 0;
                (header[0], 8)
            }
            _ => return Ok(ip),
        };
        ip.protocol = next;
        ip.l4 += len;
        if ip.l4 > ip.end {
            return Err(IpFault::Malformed);
        }
        if later_fragment {
            return Ok(ip);
        }
    }
    Err(IpFault::Malformed)
}

/// The first bytes of a frame of known length.
#[derive(Clone, Copy)]
pub(crate) struct Prefix<'a> {
    bytes: &'a [u8],
    frame_len: usize,
}

impl<'a> Prefix<'a> {
    #[inline]
    pub(crate) fn new(bytes: &'a [u8], frame_len: usize) -> Prefix<'a> {
        Prefix { bytes: bytes.get(..frame_len).unwrap_or(bytes), frame_len }
    }

    /// The `N` bytes at `at`.
    #[inline]
    pub(crate) fn chunk<const N: usize>(&self, at: usize) -> Result<&'a [u8; N], IpFault> {
        match self.bytes.get(at..).and_then(|bytes| bytes.first_chunk()) {
            Some(chunk) => Ok(chunk),
            None => Err(self.missing(at + N)),
        }
    }

    /// Why the bytes up to `end` are not there.
    #[cold]
    pub(crate) fn missing(&self, end: usize) -> IpFault {
        if end > self.frame_len { IpFault::Malformed } else { IpFault::NotInPrefix }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::craft::Craft;

    fn v4_frame() -> Vec<u8> {
        Craft::sample_v4().udp(1000, 2000, b"payload of some bytes")
    }

    fn v6_frame(extensions: &[u8], first: u8) -> Vec<u8> {
        let mut frame = Craft::sample_v6().udp(1000, 2000, b"payload of some bytes");
        frame[20] = first;
        let payload_len =
            u16::from_be_bytes([frame[18], frame[19]]) + u16::try_from(extensions.len()).unwrap();
        frame[18..20].copy_from_slice(&payload_len.to_be_bytes());
        frame.splice(54..54, extensions.iter().copied());
        frame
    }

    #[test]
    fn v4_headers_are_found() {
        let frame = v4_frame();
        let ip = Ip::parse(&frame, frame.len()).unwrap();
        let expected = Ip {
            version: Version::V4,
            l3: 14,
            l4: 34,
            end: frame.len(),
            protocol: protocol::UDP,
            fragment: false,
        };
        assert_eq!(ip, expected);
        let mut padded = frame.clone();
        padded.extend([0; 9]);
        assert_eq!(Ip::parse(&padded, padded.len()), Ok(expected));
    }

    #[test]
    fn a_length_of_zero_is_the_frames_length() {
        let mut frame = v4_frame();
        frame[16..18].fill(0);
        assert_eq!(Ip::parse(&frame, frame.len()).unwrap().end, frame.len());
        let mut frame = v6_frame(&[], protocol::UDP);
        frame[18..20].fill(0);
        assert_eq!(Ip::parse(&frame, frame.len()).unwrap().end, frame.len());
    }

    #[test]
    fn v4_lies_are_malformed() {
        let lie = |at: usize, value: u8| {
            let mut frame = v4_frame();
            frame[at] = value;
            Ip::parse(&frame, frame.len())
        };
        assert_eq!(lie(14, 0x65), Err(IpFault::Malformed), "version");
        assert_eq!(lie(14, 0x44), Err(IpFault::Malformed), "header shorter than 20");
        assert_eq!(lie(17, 19), Err(IpFault::Malformed), "total length below header length");
        assert_eq!(lie(16, 1), Err(IpFault::Malformed), "total length beyond the frame");
        assert!(lie(14, 0x4f).is_err(), "60 bytes of header in 49 bytes of datagram");
        assert_eq!(lie(12, 0x09), Err(IpFault::NotIp));
    }

    #[test]
    fn v4_fragments() {
        for (field, fragment) in
            [(0x4000u16, false), (0x2000, true), (0x0001, true), (0x2001, true), (0x8000, false)]
        {
            let mut frame = v4_frame();
            frame[20..22].copy_from_slice(&field.to_be_bytes());
            assert_eq!(Ip::parse(&frame, frame.len()).unwrap().fragment, fragment, "{field:04x}");
        }
    }

    #[test]
    fn v6_extensions_are_walked() {
        let udp = protocol::UDP;
        let hop_then_destination =
            [60, 0, 1, 4, 0, 0, 0, 0, udp, 1, 1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let frame = v6_frame(&hop_then_destination, 0);
        let ip = Ip::parse(&frame, frame.len()).unwrap();
        assert_eq!((ip.l4, ip.protocol, ip.fragment, ip.end), (54 + 24, udp, false, frame.len()));

        let authentication = [udp, 4, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1];
        let frame = v6_frame(&authentication, 51);
        assert_eq!(Ip::parse(&frame, frame.len()).unwrap().l4, 54 + 24);
    }

    #[test]
    fn v6_fragments() {
        let udp = protocol::UDP;
        for (next, offset, expected) in [
            (udp, 0x0000u16, (udp, false)),
            (udp, 0x0001, (udp, true)),
            (udp, 0x0008, (udp, true)),
            // Behind a later fragment's header is data, whatever it looks like.
            (60, 0x0009, (60, true)),
        ] {
            let [high, low] = offset.to_be_bytes();
            let frame = v6_frame(&[next, 0, high, low, 0, 0, 0, 1], 44);
            let ip = Ip::parse(&frame, frame.len()).unwrap();
            assert_eq!((ip.protocol, ip.fragment, ip.l4), (expected.0, expected.1, 62));
        }
    }

    #[test]
    fn v6_lies_are_malformed() {
        let mut frame = v6_frame(&[], protocol::UDP);
        frame[14] = 0x45;
        assert_eq!(Ip::parse(&frame, frame.len()), Err(IpFault::Malformed), "version");
        let mut frame = v6_frame(&[], protocol::UDP);
        frame[18] = 9;
        assert_eq!(
            Ip::parse(&frame, frame.len()),
            Err(IpFault::Malformed),
            "payload length beyond the frame"
        );
        let frame = v6_frame(&[protocol::UDP, 200, 0, 0, 0, 0, 0, 0], 0);
        assert_eq!(Ip::parse(&frame, frame.len()), Err(IpFault::Malformed), "extension beyond the frame");
        let mut frame = v6_frame(&[], 0);
        frame.truncate(58);
        frame[18..20].copy_from_slice(&4u16.to_be_bytes());
        assert_eq!(
            Ip::parse(&frame, frame.len()),
            Err(IpFault::Malformed),
            "extension cut by the frame's end"
        );
    }

    #[test]
    fn extensions_are_bounded() {
        let chain = |count: usize| {
            let mut extensions = vec![[60, 0, 1, 4, 0, 0, 0, 0]; count];
            extensions[count - 1][0] = protocol::UDP;
            let frame = v6_frame(&extensions.concat(), 60);
            Ip::parse(&frame, frame.len())
        };
        assert_eq!(chain(EXTENSIONS_MAX).unwrap().l4, 54 + 8 * EXTENSIONS_MAX);
        assert_eq!(chain(EXTENSIONS_MAX + 1), Err(IpFault::Malformed));
        assert_eq!(chain(100), Err(IpFault::Malformed));
    }

    #[test]
    fn the_end_of_the_prefix_is_not_the_end_of_the_frame() {
        let tagged =
            Craft::sample_v4().tag(ethertype::SERVICE_VLAN, 1).tag(ethertype::VLAN, 2).udp(1, 2, b"x");
        let extended = v6_frame(&[protocol::UDP, 0, 1, 4, 0, 0, 0, 0], 60);
        for frame in [tagged, extended, v4_frame()] {
            let whole = Ip::parse(&frame, frame.len()).unwrap();
            for length in 0..frame.len() {
                match Ip::parse(&frame[..length], frame.len()) {
                    Ok(ip) => assert_eq!(ip, whole),
                    fault => assert_eq!(fault, Err(IpFault::NotInPrefix), "prefix of {length}"),
                }
                assert_eq!(Ip::parse(&frame[..length], length), Err(IpFault::Malformed), "frame of {length}");
                assert_eq!(Ip::parse(&frame, length), Err(IpFault::Malformed), "prefix longer than {length}");
            }
        }
    }
}
