//! Random and mutated bytes: nothing panics, no offset leaves the frame, and where an independent parser
//! understands a frame, ours finds the same.

use std::net::{Ipv4Addr, Ipv6Addr};

use etherparse::{LinkExtSlice, NetSlice, SlicedPacket};
use wire::craft::{self, Craft, Tcp};
use wire::ethernet::ethertype;
use wire::ip::Version;
use wire::vnet::{self, VnetHeader};
use wire::{Claims, Ethernet, Ip, IpFault, Mac, Offloads, arp::Arp, checksum, flow_hash, segment};

/// Rounds of each test; `WIRE_ROUNDS=10000000` runs them long.
fn rounds() -> u64 {
    std::env::var("WIRE_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(300_000)
}

/// SplitMix64, so that every round can be had again from its number.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % u64::try_from(bound).unwrap_or(1)).unwrap_or(0)
    }

    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    fn byte(&mut self) -> u8 {
        // Edges are likelier to matter than the middle.
        let [byte, choice, ..] = self.next().to_be_bytes();
        match choice % 4 {
            0 => [0, 1, 0x7f, 0x80, 0xfe, 0xff][usize::from(byte) % 6],
            _ => byte,
        }
    }

    fn word(&mut self) -> u16 {
        u16::from_be_bytes([self.byte(), self.byte()])
    }
}

/// A valid frame of any kind that can be made.
fn valid(random: &mut Random) -> Vec<u8> {
    let (src, dst) = (Mac::random_local(random.next()), Mac::random_local(random.next()));
    let mut craft = if random.one_in(2) {
        let words = [random.word(), random.word()].map(u16::to_be_bytes).concat();
        Craft::v4(
            src,
            dst,
            Ipv4Addr::new(10, words[0], words[1], words[2]),
            Ipv4Addr::new(192, 0, 2, words[3]),
        )
    } else {
        let address = Ipv6Addr::new(0xfe80, 0, 0, random.word(), random.word(), 0, 0, random.word());
        Craft::v6(src, dst, address, Ipv6Addr::LOCALHOST)
    };
    craft.options_len = if craft_is_v6(&craft) { random.below(4) * 8 } else { random.below(11) * 4 };
    for _ in 0..random.below(3) {
        craft = craft.tag([ethertype::VLAN, ethertype::SERVICE_VLAN][random.below(2)], random.word());
    }
    let payload: Vec<u8> = (0..random.below(200)).map(|_| random.byte()).collect();
    match random.below(3) {
        0 => craft.udp(random.word(), random.word(), &payload),
        1 => {
            let options = vec![1; random.below(11) * 4];
            craft.tcp(&Tcp { flags: random.byte(), options, ..Tcp::default() }, &payload)
        }
        _ => craft.echo_request(random.word(), random.word(), &payload),
    }
}

fn craft_is_v6(craft: &Craft) -> bool {
    matches!(craft.addresses, craft::Addresses::V6 { .. })
}

/// A frame with some bytes changed, cut or added; or noise.
fn mutated(random: &mut Random) -> Vec<u8> {
    if random.one_in(8) {
        return (0..random.below(160)).map(|_| random.byte()).collect();
    }
    let mut frame = valid(random);
    for _ in 0..random.below(6) {
        let at = random.below(frame.len().min(80));
        frame[at] = random.byte();
    }
    match random.below(6) {
        0 => frame.truncate(random.below(frame.len() + 1)),
        1 => frame.resize(frame.len() + random.below(40), random.byte()),
        _ => {}
    }
    frame
}

/// A header that is sometimes almost right for the frame.
fn hostile_header(random: &mut Random, frame: &mut [u8]) -> VnetHeader {
    let honest = craft::leave_segments(frame, 1 + random.word() % 64);
    let mut bytes = honest.unwrap_or_default().to_bytes();
    for _ in 0..random.below(4) {
        bytes[random.below(vnet::LEN)] = random.byte();
    }
    if random.one_in(8) {
        bytes.fill_with(|| random.byte());
    }
    VnetHeader::from_bytes(&bytes)
}

#[test]
fn offsets_stay_inside_any_frame() {
    for round in 0..rounds() {
        let mut random = Random(round);
        let frame = mutated(&mut random);
        let prefix = &frame[..random.below(frame.len() + 1)];
        for (bytes, len) in [(&frame[..], frame.len()), (prefix, frame.len()), (&frame[..], prefix.len())] {
            if let Some(view) = Ethernet::checked(bytes) {
                assert!(view.payload_offset() <= bytes.len(), "round {round}");
                let _ = (view.dst(), view.src(), view.ethertype(), view.vlan_id());
            }
            match Ip::parse(bytes, len) {
                Ok(ip) => {
                    assert!(
                        14 <= ip.l3 && ip.l3 < ip.l4 && ip.l4 <= ip.end && ip.end <= len,
                        "round {round}"
                    );
                }
                Err(IpFault::NotInPrefix) => assert!(bytes.len() < len, "round {round}"),
                Err(IpFault::NotIp | IpFault::Malformed) => {}
            }
            // What the first bytes tell is what the whole frame tells.
            if let Ok(claims) = Claims::of(bytes, len)
                && len == frame.len()
            {
                assert_eq!(Ok(claims), Claims::of(&frame, len), "round {round}");
            }
            flow_hash(bytes);
            Arp::parse(bytes);
        }
    }
}

#[test]
fn what_passes_the_check_is_true() {
    let mut passed = 0u32;
    let mut segmented = 0u32;
    for round in 0..rounds() {
        let mut random = Random(round ^ 1 << 32);
        let mut frame = mutated(&mut random);
        let header = hostile_header(&mut random, &mut frame);
        let allowed =
            if random.one_in(2) { Offloads::ALL } else { Offloads::from_driver_features(random.next()) };
        let prefix = &frame[..frame.len().min(116)];
        let Ok(checked) = header.check(frame.len(), prefix, allowed) else { continue };
        passed += u32::from(!checked.is_plain());
        assert!(allowed.contains(checked.needs()), "round {round}: {checked:?}");
        assert_eq!(checked.check(frame.len(), prefix, allowed), Ok(checked), "round {round}: once is enough");
        assert!(
            checked.flags <= 1 && checked.num_buffers == 1 && usize::from(checked.hdr_len) <= frame.len()
        );
        if checked.is_gso() {
            assert!(checked.needs_csum() && checked.gso_size > 0 && checked.hdr_len > checked.csum_start);
            let mut payload_len = 0;
            let outcome = segment(&frame, &checked, random.one_in(2), |_, head, payload| {
                assert_eq!(head.len(), usize::from(checked.hdr_len));
                assert!(!payload.is_empty() && payload.len() <= usize::from(checked.gso_size));
                payload_len += payload.len();
            });
            if outcome.is_ok() {
                assert_eq!(payload_len, frame.len() - usize::from(checked.hdr_len), "round {round}");
                segmented += 1;
            }
        } else {
            let before = frame.clone();
            assert_eq!(checksum::complete(&mut frame, &checked), Ok(()), "round {round}");
            let field = usize::from(checked.csum_start + checked.csum_offset);
            let same = |at: usize| {
                checked.needs_csum() && (at == field || at == field + 1) || frame[at] == before[at]
            };
            assert!((0..frame.len()).all(same), "round {round}: only the checksum changes");
        }
    }
    assert!(
        passed > 1000 && segmented > 1000,
        "{passed} passed, {segmented} segmented: the mutations are too wild"
    );
}

#[test]
fn unchecked_headers_do_not_panic_either() {
    for round in 0..rounds() / 4 {
        let mut random = Random(round ^ 2 << 32);
        let mut frame = mutated(&mut random);
        let header = hostile_header(&mut random, &mut frame);
        let _ = segment(&frame, &header, true, |_, _, _| ());
        let _ = checksum::complete(&mut frame, &header);
    }
}

/// The places of the headers, as the reference parser sees them. `None` if it does not take the frame.
fn reference(frame: &[u8]) -> Option<Result<Ip, IpFault>> {
    let packet = SlicedPacket::from_ethernet(frame).ok()?;
    // It knows a third tag, MACsec, and tags from before the standard; to us they are opaque.
    let vlan = |ext: &LinkExtSlice<'_>| matches!(ext, LinkExtSlice::Vlan(_));
    let old_tag = |at: &usize| frame.get(*at..*at + 2) == Some(&[0x91, 0]);
    if packet.link_exts.len() > 2 || !packet.link_exts.iter().all(vlan) || [12, 16, 20].iter().any(old_tag) {
        return None;
    }
    let (version, header, payload) = match &packet.net {
        // It takes an authentication header as part of IPv4; to us it is the payload.
        Some(NetSlice::Ipv4(ip)) if ip.extensions().auth.is_some() => return None,
        Some(NetSlice::Ipv4(ip)) => (Version::V4, ip.header().slice(), ip.payload()),
        Some(NetSlice::Ipv6(ip)) => (Version::V6, ip.header().slice(), ip.payload()),
        _ => return Some(Err(IpFault::NotIp)),
    };
    let offset = |part: &[u8]| part.as_ptr() as usize - frame.as_ptr() as usize;
    let l4 = offset(payload.payload);
    Some(Ok(Ip {
        version,
        l3: offset(header),
        l4,
        end: l4 + payload.payload.len(),
        protocol: payload.ip_number.0,
        fragment: payload.fragmented,
    }))
}

#[test]
fn the_parser_agrees_with_another_one() {
    let mut agreed = 0u64;
    for round in 0..rounds() {
        let mut random = Random(round ^ 3 << 32);
        let frame = if random.one_in(2) { valid(&mut random) } else { mutated(&mut random) };
        let Some(expected) = reference(&frame) else { continue };
        assert_eq!(Ip::parse(&frame, frame.len()), expected, "round {round}: {frame:02x?}");
        agreed += 1;
    }
    assert!(agreed > rounds() / 2, "only {agreed} frames compared");
}

#[test]
fn every_valid_frame_is_understood() {
    for round in 0..rounds() / 4 {
        let frame = valid(&mut Random(round ^ 4 << 32));
        assert!(reference(&frame).is_some_and(|expected| expected.is_ok()), "round {round}: {frame:02x?}");
        assert!(Ip::parse(&frame, frame.len()).is_ok(), "round {round}");
    }
}
