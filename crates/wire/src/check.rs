//! The gate for virtio-net headers from guests.
//!
//! Everything in such a header may be a lie. [`VnetHeader::check`] holds it against the frame and gives back
//! a header of which every field is true, or says why there is none. What passes may be delivered to any
//! receiver that accepts what the header [needs](VnetHeader::needs); what does not pass is a drop by the
//! guest's fault.

use core::fmt;

use crate::Offloads;
use crate::ethernet::{self, Ethernet};
use crate::ip::{self, Ip, IpFault, Prefix, Version, protocol};
use crate::vnet::{VnetHeader, flag, gso};

/// The longest frame: Ethernet with two tags, an IPv6 header and 65535 bytes behind it.
pub const FRAME_MAX: usize =
    ethernet::HEADER_LEN + ethernet::TAGS_MAX * ethernet::TAG_LEN + ip::V6_HEADER_LEN + 65535;
/// Into how many segments one frame may be cut: enough for 64 KiB by 536 bytes (RFC 9293, 3.7.1: the least
/// MSS that every host must take), and for what Linux sends by UDP_SEGMENT.
pub const SEGMENTS_MAX: usize = 128;

/// A TCP header without options.
const TCP_HEADER_LEN: usize = 20;
const UDP_HEADER_LEN: usize = 8;

/// What is wrong with a frame and its header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HeaderFault {
    /// The frame has no whole Ethernet header.
    Runt,
    /// The frame is longer than [`FRAME_MAX`].
    TooLong,
    /// The GSO type does not exist, or has the ECN bit beside a type that is not TCP.
    GsoUnknown,
    /// The GSO type's feature was not negotiated.
    GsoNotNegotiated,
    /// Segmentation asked for, checksum not (virtio 1.2, 5.1.6.2.1).
    GsoWithoutCsum,
    /// Segments of no bytes.
    GsoSizeZero,
    /// A segment would be longer than IP allows.
    GsoSizeTooLarge,
    /// More than [`SEGMENTS_MAX`] segments.
    GsoTooManySegments,
    /// The checksum lies outside of the frame.
    CsumBeyondFrame,
    /// The checksum starts inside the Ethernet or IP headers.
    CsumInsideHeaders,
    /// The frame's protocol is not the one that the header speaks of.
    ProtocolMismatch,
    /// An offload of a fragment.
    Fragment,
    /// The IP headers are malformed, or disagree with the length of the frame.
    IpMalformed,
    /// The TCP or UDP header is malformed.
    L4Malformed,
    /// The headers are longer than what is looked at.
    HeadersTooLong,
}

impl HeaderFault {
    /// A short, stable name for counters.
    pub const fn reason(self) -> &'static str {
        match self {
            HeaderFault::Runt => "runt",
            HeaderFault::TooLong => "frame_too_long",
            HeaderFault::GsoUnknown => "gso_unknown",
            HeaderFault::GsoNotNegotiated => "gso_not_negotiated",
            HeaderFault::GsoWithoutCsum => "gso_without_csum",
            HeaderFault::GsoSizeZero => "gso_size_zero",
            HeaderFault::GsoSizeTooLarge => "gso_size_too_large",
            HeaderFault::GsoTooManySegments => "gso_too_many_segments",
            HeaderFault::CsumBeyondFrame => "csum_beyond_frame",
            HeaderFault::CsumInsideHeaders => "csum_inside_headers",
            HeaderFault::ProtocolMismatch => "offload_protocol_mismatch",
            HeaderFault::Fragment => "offload_of_fragment",
            HeaderFault::IpMalformed => "ip_malformed",
            HeaderFault::L4Malformed => "l4_malformed",
            HeaderFault::HeadersTooLong => "headers_too_long",
        }
    }
}

impl fmt::Display for HeaderFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            HeaderFault::Runt => "the frame is shorter than an Ethernet header",
            HeaderFault::TooLong => "the frame is longer than any IP datagram in Ethernet",
            HeaderFault::GsoUnknown => "the virtio-net header's gso_type does not exist",
            HeaderFault::GsoNotNegotiated => "the virtio-net header's gso_type was not negotiated",
            HeaderFault::GsoWithoutCsum => "the virtio-net header asks for segmentation without NEEDS_CSUM",
            HeaderFault::GsoSizeZero => "the virtio-net header's gso_size is 0",
            HeaderFault::GsoSizeTooLarge => {
                "the virtio-net header's gso_size makes segments longer than IP allows"
            }
            HeaderFault::GsoTooManySegments => "the virtio-net header's gso_size makes too many segments",
            HeaderFault::CsumBeyondFrame => "the virtio-net header's checksum lies outside of the frame",
            HeaderFault::CsumInsideHeaders => {
                "the virtio-net header's csum_start lies inside the lower headers"
            }
            HeaderFault::ProtocolMismatch => {
                "the virtio-net header speaks of another protocol than the frame"
            }
            HeaderFault::Fragment => "the virtio-net header asks for an offload of an IP fragment",
            HeaderFault::IpMalformed => "the frame's IP headers contradict themselves or its length",
            HeaderFault::L4Malformed => {
                "the frame's TCP or UDP header contradicts itself or the frame's length"
            }
            HeaderFault::HeadersTooLong => "the frame's headers are longer than what is looked at",
        })
    }
}

impl core::error::Error for HeaderFault {}

impl From<IpFault> for HeaderFault {
    fn from(fault: IpFault) -> HeaderFault {
        match fault {
            IpFault::NotIp => HeaderFault::ProtocolMismatch,
            IpFault::NotInPrefix => HeaderFault::HeadersTooLong,
            IpFault::Malformed => HeaderFault::IpMalformed,
        }
    }
}

impl VnetHeader {
    /// Holds a guest's header against its frame of `frame_len` bytes (virtio-net header not counted).
    ///
    /// `prefix` is the frame's first bytes, in memory that the guest cannot change; 95 of them are enough
    /// for all but IPv6 with extension headers. `allowed` is what the guest may ask for.
    ///
    /// The header that comes back is true in every field: it asks for nothing that was not asked for, claims
    /// nothing (`DATA_VALID`, `RSC_INFO` are gone), has the right `hdr_len` if the frame is to be
    /// segmented, else 0, and 1 as `num_buffers`. A "GSO" frame of one segment becomes an ordinary one. A
    /// partial checksum without the feature for it is not believed in: such a frame is delivered with the
    /// bytes that it has. The MTU is the caller's to check.
    pub fn check(
        &self,
        frame_len: usize,
        prefix: &[u8],
        allowed: Offloads,
    ) -> Result<VnetHeader, HeaderFault> {
        if frame_len < ethernet::HEADER_LEN {
            return Err(HeaderFault::Runt);
        }
        if frame_len > FRAME_MAX {
            return Err(HeaderFault::TooLong);
        }
        if self.is_gso() {
            self.check_gso(frame_len, prefix, allowed)
        } else if self.needs_csum() && allowed.contains(Offloads::CSUM) {
            self.check_csum(frame_len, prefix)
        } else {
            Ok(VnetHeader::PLAIN)
        }
    }

    fn check_csum(&self, frame_len: usize, prefix: &[u8]) -> Result<VnetHeader, HeaderFault> {
        self.check_csum_range(frame_len)?;
        let start = usize::from(self.csum_start);
        match Ip::parse(prefix, frame_len) {
            Ok(ip) => {
                if start < ip.l4 {
                    return Err(HeaderFault::CsumInsideHeaders);
                }
                if ip.fragment {
                    return Err(HeaderFault::Fragment);
                }
                // Further in may be a tunnel's inner checksum, of which nothing is known.
                let field = csum_field(ip.protocol);
                if start == ip.l4 && field.is_some_and(|field| field != self.csum_offset) {
                    return Err(HeaderFault::ProtocolMismatch);
                }
            }
            Err(IpFault::Malformed) => return Err(HeaderFault::IpMalformed),
            Err(IpFault::NotIp | IpFault::NotInPrefix) => {
                let payload =
                    Ethernet::checked(prefix).map_or(ethernet::HEADER_LEN, |view| view.payload_offset());
                if start < payload {
                    return Err(HeaderFault::CsumInsideHeaders);
                }
            }
        }
        Ok(self.csum_only())
    }

    fn check_gso(
        &self,
        frame_len: usize,
        prefix: &[u8],
        allowed: Offloads,
    ) -> Result<VnetHeader, HeaderFault> {
        let needs = self.needs();
        if !Offloads::ALL.contains(needs) {
            return Err(HeaderFault::GsoUnknown);
        }
        if !allowed.contains(needs) {
            return Err(HeaderFault::GsoNotNegotiated);
        }
        if !self.needs_csum() {
            return Err(HeaderFault::GsoWithoutCsum);
        }
        if self.gso_size == 0 {
            return Err(HeaderFault::GsoSizeZero);
        }
        self.check_csum_range(frame_len)?;
        let ip = Ip::parse(prefix, frame_len)?;
        let headers = self.check_l4(&ip, Prefix::new(prefix, frame_len))?;
        self.check_segments(&ip, headers, frame_len)
    }

    fn check_csum_range(&self, frame_len: usize) -> Result<(), HeaderFault> {
        let end = usize::from(self.csum_start) + usize::from(self.csum_offset) + 2;
        if end > frame_len { Err(HeaderFault::CsumBeyondFrame) } else { Ok(()) }
    }

    /// The length of all headers, if the frame carries what `gso_type` says and the checksum is that of its
    /// L4 header.
    fn check_l4(&self, ip: &Ip, prefix: Prefix<'_>) -> Result<usize, HeaderFault> {
        let (protocol, version) = match self.gso_type & !gso::ECN {
            gso::TCPV4 => (protocol::TCP, Version::V4),
            gso::TCPV6 => (protocol::TCP, Version::V6),
            _ => (protocol::UDP, ip.version),
        };
        if ip.fragment {
            return Err(HeaderFault::Fragment);
        }
        if usize::from(self.csum_start) < ip.l4 {
            return Err(HeaderFault::CsumInsideHeaders);
        }
        let csum_at_l4 =
            usize::from(self.csum_start) == ip.l4 && csum_field(protocol) == Some(self.csum_offset);
        if (ip.protocol, ip.version) != (protocol, version) || !csum_at_l4 {
            return Err(HeaderFault::ProtocolMismatch);
        }
        let l4_len = if protocol == protocol::TCP {
            // RFC 9293, 3.1: the data offset, in units of 4 bytes.
            let [data_offset] = prefix.chunk(ip.l4 + 12)?;
            usize::from(data_offset >> 4) * 4
        } else {
            UDP_HEADER_LEN
        };
        let short = protocol == protocol::TCP && l4_len < TCP_HEADER_LEN;
        if short || ip.l4 + l4_len > ip.end { Err(HeaderFault::L4Malformed) } else { Ok(ip.l4 + l4_len) }
    }

    fn check_segments(&self, ip: &Ip, headers: usize, frame_len: usize) -> Result<VnetHeader, HeaderFault> {
        let size = usize::from(self.gso_size);
        let payload = ip.end - headers;
        if payload <= size {
            return Ok(self.csum_only());
        }
        // Receivers cut up the whole frame; padding would become payload.
        if ip.end != frame_len {
            return Err(HeaderFault::IpMalformed);
        }
        if headers - ip.l3 + size > usize::from(u16::MAX) {
            return Err(HeaderFault::GsoSizeTooLarge);
        }
        if payload.div_ceil(size) > SEGMENTS_MAX {
            return Err(HeaderFault::GsoTooManySegments);
        }
        let hdr_len = u16::try_from(headers).map_err(|_| HeaderFault::HeadersTooLong)?;
        Ok(VnetHeader { gso_type: self.gso_type, gso_size: self.gso_size, hdr_len, ..self.csum_only() })
    }

    /// This header's checksum request, and nothing else.
    fn csum_only(&self) -> VnetHeader {
        VnetHeader {
            flags: flag::NEEDS_CSUM,
            csum_start: self.csum_start,
            csum_offset: self.csum_offset,
            ..VnetHeader::PLAIN
        }
    }
}

/// Offset of the checksum in an L4 header.
pub(crate) const fn csum_field(protocol: u8) -> Option<u16> {
    match protocol {
        protocol::TCP => Some(16),
        protocol::UDP => Some(6),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::craft::{self, Craft, Tcp};
    use crate::ethernet::ethertype;

    /// A GSO frame of `payload` bytes and its honest header.
    fn tso(craft: &Craft, payload: usize, size: u16) -> (Vec<u8>, VnetHeader) {
        let mut frame = craft.tcp(&Tcp { options: vec![1; 12], ..Tcp::default() }, &vec![7; payload]);
        let header = craft::leave_segments(&mut frame, size).unwrap();
        (frame, header)
    }

    fn uso(payload: usize, size: u16) -> (Vec<u8>, VnetHeader) {
        let mut frame = Craft::sample_v4().udp(5, 6, &vec![7; payload]);
        let header = craft::leave_segments(&mut frame, size).unwrap();
        (frame, header)
    }

    fn udp_partial() -> (Vec<u8>, VnetHeader) {
        let mut frame = Craft::sample_v4().udp(5, 6, &[7; 40]);
        let header = craft::leave_checksum(&mut frame).unwrap();
        (frame, header)
    }

    fn check(frame: &[u8], header: VnetHeader) -> Result<VnetHeader, HeaderFault> {
        header.check(frame.len(), &frame[..frame.len().min(116)], Offloads::ALL)
    }

    #[test]
    fn honest_headers_pass_with_true_fields() {
        for (frame, header) in [
            tso(&Craft::sample_v4(), 64_000, 1448),
            tso(&Craft::sample_v6(), 64_000, 1428),
            tso(&Craft::sample_v4().tag(ethertype::SERVICE_VLAN, 1).tag(ethertype::VLAN, 2), 3000, 1448),
            uso(60_000, 1400),
            udp_partial(),
        ] {
            assert_eq!(check(&frame, header), Ok(header));
            let lying = VnetHeader { hdr_len: 0xffff, num_buffers: 77, flags: 0xff, ..header };
            assert_eq!(check(&frame, lying), Ok(header), "hints and claims are replaced");
            let lying = VnetHeader { hdr_len: 0, ..header };
            assert_eq!(check(&frame, lying), Ok(header));
        }
    }

    #[test]
    fn claims_alone_are_plain() {
        let (frame, _) = udp_partial();
        let claims = VnetHeader {
            flags: flag::DATA_VALID | flag::RSC_INFO | 0xf8,
            csum_start: 0xffff,
            num_buffers: 9,
            ..VnetHeader::PLAIN
        };
        assert_eq!(check(&frame, claims), Ok(VnetHeader::PLAIN));
        assert_eq!(
            check(&frame, VnetHeader { num_buffers: 0, hdr_len: 3, ..VnetHeader::PLAIN }),
            Ok(VnetHeader::PLAIN)
        );
    }

    #[test]
    fn length_of_the_frame() {
        let length = |length| VnetHeader::PLAIN.check(length, &[0; 64], Offloads::ALL);
        assert_eq!(length(0), Err(HeaderFault::Runt));
        assert_eq!(length(13), Err(HeaderFault::Runt));
        assert_eq!(length(14), Ok(VnetHeader::PLAIN));
        assert_eq!(length(FRAME_MAX), Ok(VnetHeader::PLAIN));
        assert_eq!(length(FRAME_MAX + 1), Err(HeaderFault::TooLong));
        assert_eq!(length(usize::MAX), Err(HeaderFault::TooLong));
    }

    #[test]
    fn unknown_gso_types() {
        let (frame, header) = tso(&Craft::sample_v4(), 3000, 1448);
        for gso_type in [2, 6, 0x40, 0x7f, 0x80, 0x83, 0x85, 0xff] {
            assert_eq!(
                check(&frame, VnetHeader { gso_type, ..header }),
                Err(HeaderFault::GsoUnknown),
                "{gso_type:#x}"
            );
        }
    }

    #[test]
    fn gso_needs_its_feature() {
        let fault = Err(HeaderFault::GsoNotNegotiated);
        let (frame, header) = tso(&Craft::sample_v4(), 3000, 1448);
        let with = |header: VnetHeader, allowed| header.check(frame.len(), &frame, allowed);
        let ecn = VnetHeader { gso_type: gso::TCPV4 | gso::ECN, ..header };
        assert_eq!(with(header, Offloads::NONE), fault);
        assert_eq!(with(header, Offloads::TSO4), fault);
        assert_eq!(with(header, Offloads::CSUM | Offloads::TSO6), fault);
        assert_eq!(with(header, Offloads::CSUM | Offloads::TSO4), Ok(header));
        assert_eq!(with(ecn, Offloads::CSUM | Offloads::TSO4), fault);
        assert_eq!(with(ecn, Offloads::CSUM | Offloads::TSO4 | Offloads::ECN), Ok(ecn));

        let (frame, header) = uso(3000, 1400);
        assert_eq!(header.check(frame.len(), &frame, Offloads::CSUM | Offloads::UFO), fault);
        let ufo = VnetHeader { gso_type: gso::UDP, ..header };
        assert_eq!(ufo.check(frame.len(), &frame, Offloads::CSUM | Offloads::USO), fault);
        assert_eq!(ufo.check(frame.len(), &frame, Offloads::CSUM | Offloads::UFO), Ok(ufo));
    }

    #[test]
    fn partial_checksum_without_the_feature_is_not_believed() {
        let (frame, header) = udp_partial();
        let allowed = Offloads::TSO4 | Offloads::TSO6;
        assert_eq!(header.check(frame.len(), &frame, allowed), Ok(VnetHeader::PLAIN));
    }

    #[test]
    fn gso_needs_a_checksum_and_a_size() {
        let (frame, header) = tso(&Craft::sample_v4(), 3000, 1448);
        let without = VnetHeader { flags: flag::DATA_VALID, ..header };
        assert_eq!(check(&frame, without), Err(HeaderFault::GsoWithoutCsum));
        assert_eq!(check(&frame, VnetHeader { gso_size: 0, ..header }), Err(HeaderFault::GsoSizeZero));
    }

    #[test]
    fn segments_are_counted() {
        let (frame, header) = tso(&Craft::sample_v4(), 64_000, 500);
        assert_eq!(check(&frame, header), Ok(header), "exactly {SEGMENTS_MAX}");
        for gso_size in [1, 499] {
            let header = VnetHeader { gso_size, ..header };
            assert_eq!(check(&frame, header), Err(HeaderFault::GsoTooManySegments));
        }
    }

    #[test]
    fn one_segment_is_no_segmentation() {
        for gso_size in [1000, 1001, 0xffff] {
            let (frame, header) = tso(&Craft::sample_v4(), 1000, gso_size);
            let single = VnetHeader { gso_type: gso::NONE, gso_size: 0, hdr_len: 0, ..header };
            assert_eq!(check(&frame, header), Ok(single));
        }
        let (frame, header) = tso(&Craft::sample_v6(), 0, 1);
        assert_eq!(check(&frame, header).unwrap().gso_type, gso::NONE);
    }

    #[test]
    fn a_segment_fits_into_ip() {
        // Only a length of 0 in the IP header lets a payload be that long.
        let (frame, header) = tso(&Craft::sample_v4(), 65_530, 65_500);
        assert_eq!(check(&frame, header), Err(HeaderFault::GsoSizeTooLarge));
        let fits = VnetHeader { gso_size: 65_535 - 52, ..header };
        assert_eq!(check(&frame, fits).map(|header| header.gso_size), Ok(65_535 - 52));
    }

    #[test]
    fn the_checksum_stays_inside_the_frame() {
        let (frame, header) = udp_partial();
        let len = u16::try_from(frame.len()).unwrap();
        for (csum_start, csum_offset) in
            [(len, 0), (len - 1, 0), (34, len - 35), (0xffff, 0xffff), (34, 0xffff), (0xffff, 0)]
        {
            let beyond = VnetHeader { csum_start, csum_offset, ..header };
            assert_eq!(check(&frame, beyond), Err(HeaderFault::CsumBeyondFrame));
            let (frame, header) = tso(&Craft::sample_v4(), 2000, 1448);
            let beyond = VnetHeader { csum_start: 0xffff, csum_offset, ..header };
            assert_eq!(check(&frame, beyond), Err(HeaderFault::CsumBeyondFrame));
        }
        let last = VnetHeader { csum_start: len - 2, csum_offset: 0, ..header };
        assert_eq!(check(&frame, last), Ok(last), "a tunnel's inner checksum may be anywhere behind");
    }

    #[test]
    fn the_checksum_starts_behind_the_headers() {
        let fault = Err(HeaderFault::CsumInsideHeaders);
        let (frame, header) = udp_partial();
        for csum_start in [0, 13, 14, 33] {
            assert_eq!(check(&frame, VnetHeader { csum_start, ..header }), fault);
        }
        let (frame, header) = tso(&Craft::sample_v6(), 3000, 1400);
        for csum_start in [0, 14, 53] {
            assert_eq!(check(&frame, VnetHeader { csum_start, ..header }), fault);
        }
        // Not IP, or not known whether: as much as is known.
        let (frame, header) = udp_partial();
        let opaque = [0xff; 60];
        assert_eq!(check(&opaque, VnetHeader { csum_start: 13, ..header }), fault);
        assert!(check(&opaque, VnetHeader { csum_start: 14, ..header }).is_ok());
        assert_eq!(
            VnetHeader { csum_start: 13, ..header }.check(frame.len(), &frame[..14], Offloads::ALL),
            fault
        );
        assert_eq!(VnetHeader { csum_start: 13, ..header }.check(frame.len(), &[], Offloads::ALL), fault);
        assert_eq!(header.check(frame.len(), &frame[..14], Offloads::ALL), Ok(header));
    }

    #[test]
    fn header_and_frame_speak_of_one_protocol() {
        let fault = Err(HeaderFault::ProtocolMismatch);
        let (v4, v4_header) = tso(&Craft::sample_v4(), 3000, 1400);
        let (v6, v6_header) = tso(&Craft::sample_v6(), 3000, 1400);
        let (udp, udp_header) = uso(3000, 1400);
        assert_eq!(check(&v4, VnetHeader { gso_type: gso::TCPV6, ..v4_header }), fault);
        assert_eq!(check(&v6, VnetHeader { gso_type: gso::TCPV4, ..v6_header }), fault);
        assert_eq!(check(&udp, VnetHeader { gso_type: gso::TCPV4, ..udp_header }), fault);
        assert_eq!(check(&v4, VnetHeader { gso_type: gso::UDP_L4, ..v4_header }), fault);
        assert_eq!(check(&v4, VnetHeader { csum_offset: 6, ..v4_header }), fault);
        assert_eq!(check(&v4, VnetHeader { csum_start: 35, ..v4_header }), fault);
        let mut arp = v4.clone();
        arp[13] = 0x06;
        assert_eq!(check(&arp, v4_header), fault);
        let (udp, udp_header) = udp_partial();
        assert_eq!(check(&udp, VnetHeader { csum_offset: 16, ..udp_header }), fault);
    }

    #[test]
    fn no_offload_of_fragments() {
        for (mut frame, header) in [tso(&Craft::sample_v4(), 3000, 1400), udp_partial()] {
            frame[20] = 0x20;
            assert_eq!(check(&frame, header), Err(HeaderFault::Fragment));
        }
    }

    #[test]
    fn malformed_headers() {
        for (mut frame, header) in [tso(&Craft::sample_v4(), 3000, 1400), udp_partial()] {
            frame[16] = 0xff;
            assert_eq!(check(&frame, header), Err(HeaderFault::IpMalformed));
        }
        let (mut frame, header) = tso(&Craft::sample_v4(), 3000, 1400);
        frame.push(0);
        assert_eq!(check(&frame, header), Err(HeaderFault::IpMalformed), "padding behind a GSO frame");
        let (mut frame, header) = tso(&Craft::sample_v4(), 3000, 1400);
        frame[34 + 12] = 0x4f;
        assert_eq!(check(&frame, header), Err(HeaderFault::L4Malformed), "TCP header of 16 bytes");
        let (mut frame, header) = tso(&Craft::sample_v4(), 0, 1);
        frame[34 + 12] = 0xf0;
        assert_eq!(check(&frame, header), Err(HeaderFault::L4Malformed), "TCP header beyond the datagram");
    }

    #[test]
    fn headers_behind_the_prefix() {
        let (frame, header) = tso(&Craft::sample_v4(), 3000, 1400);
        let with = |prefix: usize| header.check(frame.len(), &frame[..prefix], Offloads::ALL);
        for prefix in [0, 14, 33, 34, 46] {
            assert_eq!(with(prefix), Err(HeaderFault::HeadersTooLong));
        }
        assert_eq!(with(47), Ok(header));
    }

    #[test]
    fn reasons_are_distinct_words() {
        use HeaderFault::*;
        let all = [
            Runt,
            TooLong,
            GsoUnknown,
            GsoNotNegotiated,
            GsoWithoutCsum,
            GsoSizeZero,
            GsoSizeTooLarge,
            GsoTooManySegments,
            CsumBeyondFrame,
            CsumInsideHeaders,
            ProtocolMismatch,
            Fragment,
            IpMalformed,
            L4Malformed,
            HeadersTooLong,
        ];
        let reasons: std::collections::HashSet<_> = all.iter().map(|fault| fault.reason()).collect();
        assert_eq!(reasons.len(), all.len());
        assert!(
            reasons
                .iter()
                .all(|reason| reason.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'_')))
        );
        assert!(all.iter().all(|fault| !fault.to_string().is_empty()));
    }
}
