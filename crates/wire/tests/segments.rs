//! Segmentation: what comes out is what the sender would have sent by itself, byte for byte.
#![allow(clippy::unwrap_used, reason = "tests, also outside of test functions")]

use std::net::{Ipv4Addr, Ipv6Addr};

use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use proptest::prelude::*;
use wire::craft::{self, Craft, Tcp};
use wire::ethernet::ethertype;
use wire::vnet::{VnetHeader, flag, gso};
use wire::{HeaderFault, Mac, SegmentFault, checksum, segment};

const FIN: u8 = 0x01;
const PSH: u8 = 0x08;
const CWR: u8 = 0x80;

fn stations(v6: bool) -> Craft {
    let (src, dst) = (Mac::from_u64(0x0200_0000_0001), Mac::from_u64(0x0200_0000_0002));
    if v6 {
        let address = |n| Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0xffff, 0, n);
        Craft::v6(src, dst, address(1), address(2))
    } else {
        Craft::v4(src, dst, Ipv4Addr::new(192, 0, 2, 1), Ipv4Addr::new(198, 51, 100, 255))
    }
}

prop_compose! {
    fn any_craft()(v6: bool, tags in 0..=2usize, options in 0..=10usize) -> Craft {
        let mut craft = stations(v6);
        craft.options_len = if v6 { options / 2 * 8 } else { options * 4 };
        craft.tags = [(ethertype::SERVICE_VLAN, 0x6007), (ethertype::VLAN, 0x0fff)][..tags].to_vec();
        craft
    }
}

prop_compose! {
    fn any_tcp()(
        ports: (u16, u16),
        sequence in prop_oneof![any::<u32>(), Just(u32::MAX - 1000)],
        acknowledgement: u32,
        flags: u8,
        options in (0..=10usize).prop_flat_map(|words| prop::collection::vec(any::<u8>(), words * 4)),
    ) -> Tcp {
        Tcp { src_port: ports.0, dst_port: ports.1, sequence, acknowledgement, flags, options }
    }
}

/// Payload and segment size of between 1 and 128 segments.
fn any_load() -> impl Strategy<Value = (Vec<u8>, u16)> {
    (1..=128usize, 1..=1500u16, any::<prop::sample::Index>(), any::<u64>()).prop_map(
        |(count, size, last, seed)| {
            let size = size.min(u16::try_from(64_000 / count).unwrap());
            let len = (count - 1) * usize::from(size) + 1 + last.index(usize::from(size));
            let mut state = seed | 1;
            let payload = (0..len).map(|_| {
                state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
                state.to_be_bytes()[0]
            });
            (payload.collect(), size)
        },
    )
}

/// Sets the IPv4 identification of a frame, if it has one.
fn set_id(frame: &mut [u8], id: u16) {
    let ip = wire::Ip::parse(frame, frame.len()).unwrap();
    if ip.version == wire::ip::Version::V4 {
        let header = &mut frame[ip.l3..ip.l4.min(ip.l3 + 60)];
        header[4..6].copy_from_slice(&id.to_be_bytes());
        let checksum = checksum::ipv4_header(header);
        header[10..12].copy_from_slice(&checksum.to_be_bytes());
    }
}

/// The segments of a frame, each complete in the end, by whomever.
fn segments(frame: &[u8], header: &VnetHeader, with_checksum: bool) -> Result<Vec<Vec<u8>>, SegmentFault> {
    let mut segments = Vec::new();
    let count = segment(frame, header, with_checksum, |header, head, payload| {
        let mut segment = [head, payload].concat();
        assert_eq!(header.needs_csum(), !with_checksum);
        assert!(!header.is_gso());
        assert_eq!(header.num_buffers, 1);
        checksum::complete(&mut segment, header).unwrap();
        segments.push(segment);
    })?;
    assert_eq!(count, segments.len());
    Ok(segments)
}

/// One's complement has two zeros: whoever completes a checksum without asking for the protocol writes the one that UDP
/// needs (RFC 768), and a receiver of TCP takes either.
fn assert_same_sum(found: u16, expected: u16) {
    assert_eq!(found % 0xffff, expected % 0xffff);
}

/// Lengths and checksums are right in the eyes of an independent parser. Returns its view's payload.
fn assert_valid(frame: &[u8]) -> Vec<u8> {
    let packet = SlicedPacket::from_ethernet(frame).unwrap();
    let transport = packet.transport.unwrap();
    match (packet.net.unwrap(), &transport) {
        (NetSlice::Ipv4(ip), TransportSlice::Tcp(tcp)) => {
            assert_eq!(ip.header().header_checksum(), ip.header().to_header().calc_header_checksum());
            assert_same_sum(
                tcp.checksum(),
                tcp.calc_checksum_ipv4(ip.header().source(), ip.header().destination()).unwrap(),
            );
        }
        (NetSlice::Ipv4(ip), TransportSlice::Udp(udp)) => {
            assert_eq!(ip.header().header_checksum(), ip.header().to_header().calc_header_checksum());
            let expected =
                udp.to_header().calc_checksum_ipv4(&ip.header().to_header(), udp.payload()).unwrap();
            assert_eq!(udp.checksum(), expected);
        }
        (NetSlice::Ipv6(ip), TransportSlice::Tcp(tcp)) => {
            let (src, dst) = (ip.header().source(), ip.header().destination());
            assert_same_sum(tcp.checksum(), tcp.calc_checksum_ipv6(src, dst).unwrap());
        }
        (NetSlice::Ipv6(ip), TransportSlice::Udp(udp)) => {
            let header = ip.header().to_header();
            assert_eq!(udp.checksum(), udp.to_header().calc_checksum_ipv6(&header, udp.payload()).unwrap());
        }
        other => panic!("{other:?}"),
    }
    match transport {
        TransportSlice::Tcp(tcp) => tcp.payload().to_vec(),
        TransportSlice::Udp(udp) => udp.payload().to_vec(),
        other => panic!("{other:?}"),
    }
}

proptest! {
    #[test]
    fn tcp_segments_are_those_of_the_sender(
        craft in any_craft(),
        tcp in any_tcp(),
        (payload, size) in any_load(),
        with_checksum: bool,
        first_id: u16,
    ) {
        let mut frame = craft.tcp(&tcp, &payload);
        set_id(&mut frame, first_id);
        let header = craft::leave_segments(&mut frame, size).unwrap();
        let segments = match segments(&frame, &header, with_checksum) {
            Err(fault) => {
                prop_assert_eq!(fault, SegmentFault::NotGso);
                prop_assert!(payload.len() <= usize::from(size));
                return Ok(());
            }
            Ok(segments) => segments,
        };
        let pieces: Vec<_> = payload.chunks(usize::from(size)).collect();
        prop_assert_eq!(segments.len(), pieces.len());
        let mut sequence = tcp.sequence;
        for (index, (segment, piece)) in segments.iter().zip(&pieces).enumerate() {
            let mut flags = tcp.flags;
            if index + 1 < pieces.len() {
                flags &= !(FIN | PSH);
            }
            if index > 0 {
                flags &= !CWR;
            }
            let mut expected = craft.tcp(&Tcp { sequence, flags, ..tcp.clone() }, piece);
            set_id(&mut expected, first_id.wrapping_add(u16::try_from(index).unwrap()));
            prop_assert_eq!(segment, &expected);
            prop_assert_eq!(&assert_valid(segment), piece);
            sequence = sequence.wrapping_add(u32::from(size));
        }
    }

    #[test]
    fn udp_segments_are_those_of_the_sender(
        craft in any_craft(),
        ports: (u16, u16),
        (payload, size) in any_load(),
        with_checksum: bool,
        first_id: u16,
    ) {
        let mut frame = craft.udp(ports.0, ports.1, &payload);
        set_id(&mut frame, first_id);
        let header = craft::leave_segments(&mut frame, size).unwrap();
        let segments = match segments(&frame, &header, with_checksum) {
            Err(fault) => {
                prop_assert_eq!(fault, SegmentFault::NotGso);
                prop_assert!(payload.len() <= usize::from(size));
                return Ok(());
            }
            Ok(segments) => segments,
        };
        let pieces: Vec<_> = payload.chunks(usize::from(size)).collect();
        prop_assert_eq!(segments.len(), pieces.len());
        for (index, (segment, piece)) in segments.iter().zip(&pieces).enumerate() {
            let mut expected = craft.udp(ports.0, ports.1, piece);
            set_id(&mut expected, first_id.wrapping_add(u16::try_from(index).unwrap()));
            prop_assert_eq!(segment, &expected);
            prop_assert_eq!(&assert_valid(segment), piece);
        }
    }
}

fn tso() -> (Vec<u8>, VnetHeader) {
    let mut frame = stations(false).tcp(&Tcp { flags: 0x10 | CWR, ..Tcp::default() }, &[7; 3000]);
    let header = craft::leave_segments(&mut frame, 1000).unwrap();
    (frame, header)
}

#[test]
fn cwr_stays_everywhere_unless_the_header_says_ecn() {
    // RFC 3168 wants it once and says so by the ECN bit; accurate ECN uses the flag as part of a counter.
    let (frame, header) = tso();
    let cwr = |header: &VnetHeader| -> Vec<bool> {
        segments(&frame, header, true).unwrap().iter().map(|segment| segment[34 + 13] & CWR != 0).collect()
    };
    assert_eq!(header.gso_type, gso::TCPV4 | gso::ECN);
    assert_eq!(cwr(&header), [true, false, false]);
    assert_eq!(cwr(&VnetHeader { gso_type: gso::TCPV4, ..header }), [true, true, true]);
}

#[test]
fn a_length_left_to_the_device_is_filled_in() {
    let (mut frame, header) = tso();
    let expected = segments(&frame, &header, true).unwrap();
    frame[16..18].fill(0);
    assert_eq!(segments(&frame, &header, true).unwrap(), expected);
}

#[test]
fn the_longest_frames_are_cut_right() {
    for v6 in [false, true] {
        let mut frame = stations(v6).tcp(&Tcp::default(), &vec![0xa5; 65_500]);
        let header = craft::leave_segments(&mut frame, 1440).unwrap();
        let segments = segments(&frame, &header, true).unwrap();
        assert_eq!(segments.len(), 46);
        let payload: Vec<u8> = segments.iter().flat_map(|segment| assert_valid(segment)).collect();
        assert_eq!(payload, vec![0xa5; 65_500]);
    }
}

#[test]
fn refusals() {
    let (frame, header) = tso();
    let fault = |frame: &[u8], header: VnetHeader| segments(frame, &header, true).unwrap_err();
    assert_eq!(fault(&frame, VnetHeader::PLAIN), SegmentFault::NotGso);
    assert_eq!(fault(&frame, VnetHeader { gso_type: gso::NONE, ..header }), SegmentFault::NotGso);
    assert_eq!(fault(&frame, VnetHeader { gso_size: 3000, ..header }), SegmentFault::NotGso);
    assert_eq!(
        fault(&frame, VnetHeader { gso_size: 0, ..header }),
        SegmentFault::Header(HeaderFault::GsoSizeZero)
    );
    let without = VnetHeader { flags: flag::DATA_VALID, ..header };
    assert_eq!(fault(&frame, without), SegmentFault::Header(HeaderFault::GsoWithoutCsum));

    let mut udp = stations(false).udp(1, 2, &[7; 3000]);
    let uso = craft::leave_segments(&mut udp, 1000).unwrap();
    assert_eq!(fault(&udp, VnetHeader { gso_type: gso::UDP, ..uso }), SegmentFault::Ufo);

    let mut long = Craft { options_len: 200, ..stations(true) }.tcp(&Tcp::default(), &[7; 3000]);
    let header = craft::leave_segments(&mut long, 1000).unwrap();
    assert_eq!(fault(&long, header), SegmentFault::HeadTooLong);
    assert!(!SegmentFault::HeadTooLong.to_string().is_empty());
}
