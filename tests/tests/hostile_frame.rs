//! Virtio-net headers and frames that lie, contradict themselves or are merely odd.
#![allow(clippy::unwrap_used)]

use anyhow::{Context, Result, ensure};
use dataplane::DropReason::{self, BadOffload, GuestDescriptorInvalid, MtuExceeded, Runt};
use e2e::daemon::Daemon;
use e2e::hand::{BUFFERS, Hand, HandConfig, chained, readable};
use e2e::inproc::{Ledger, PortPlan, count};
use e2e::oracle::split_mix;
use e2e::peer::{MERGEABLE, MODERN, Peer, PeerConfig};
use e2e::stage::{HOSTILE, MTU, NEIGHBOUR, NETWORK, Stage, frame, plain};
use vring::{DESC_NEXT, HEAD_LEN, HEADER_LEN, features};
use wire::craft::{Craft, Tcp, leave_checksum, leave_segments};
use wire::vnet::{flag, gso};
use wire::{Ip, Mac, VnetHeader};

/// What a guest may ask for when it may ask for everything that is offered.
const SENDS: u64 = 1 << features::CSUM
    | 1 << features::HOST_TSO4
    | 1 << features::HOST_TSO6
    | 1 << features::HOST_ECN
    | 1 << features::HOST_USO;
/// What a guest takes when it takes everything that is offered.
const TAKES: u64 = 1 << features::GUEST_CSUM
    | 1 << features::GUEST_TSO4
    | 1 << features::GUEST_TSO6
    | 1 << features::GUEST_ECN
    | 1 << features::GUEST_USO4
    | 1 << features::GUEST_USO6;

fn v4() -> Craft {
    Craft::v4(Mac::new(HOSTILE), Mac::new(NEIGHBOUR), [10, 0, 0, 1].into(), [10, 0, 0, 2].into())
}

fn v6() -> Craft {
    let address = |n| std::net::Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, n);
    Craft::v6(Mac::new(HOSTILE), Mac::new(NEIGHBOUR), address(1), address(2))
}

/// A stage whose hostile guest negotiated `sends`, and its neighbour `takes`.
fn stage(sends: u64, takes: u64) -> Result<(Stage, Hand)> {
    let plan = PortPlan { mtu: MTU, ..PortPlan::new("hostile", NETWORK) };
    let neighbour = PeerConfig { ring_size: 256, features: MERGEABLE | takes, ..PeerConfig::default() };
    let stage = Stage::with(plan, neighbour)?;
    let hand = stage.connect(&HandConfig { features: MODERN | sends, ..HandConfig::default() })?;
    Ok((stage, hand))
}

fn end(stage: Stage, hand: Hand) -> Result<()> {
    drop(hand);
    stage.finish()
}

/// The frame is given up for `reason`, and the next one arrives.
fn dropped(
    stage: &mut Stage,
    hand: &mut Hand,
    header: VnetHeader,
    frame: &[u8],
    reason: DropReason,
) -> Result<()> {
    hand.send(1, &header.to_bytes(), frame)?;
    stage.drops(reason, 1);
    stage.settle().with_context(|| format!("{header:?}"))?;
    stage.good(hand)
}

/// The frame arrives, with a header that `is` right.
fn delivered(
    stage: &mut Stage,
    hand: &mut Hand,
    header: VnetHeader,
    frame: &[u8],
) -> Result<(VnetHeader, Vec<u8>)> {
    hand.send(1, &header.to_bytes(), frame)?;
    stage.book.rx += 1;
    let got = stage.neighbour.expect(0).with_context(|| format!("{header:?}"))?;
    stage.settle()?;
    Ok(got)
}

#[test]
fn n01_chains_shorter_than_header_and_ethernet_are_skipped() -> Result<()> {
    let (mut stage, mut hand) = stage(0, 0)?;
    for len in (1..12).chain(12..=25) {
        stage.expect_skip(&mut hand, &[(0, readable(BUFFERS, len))], Runt)?;
        let split = [(0, chained(BUFFERS, 1, DESC_NEXT, 1)), (1, readable(BUFFERS + 64, len - 1))];
        stage.expect_skip(&mut hand, &split, Runt)?;
    }
    end(stage, hand)
}

/// Sends the next frame with one descriptor for each of the first `singles` bytes, and one for the rest.
fn byte_by_byte(stage: &mut Stage, hand: &mut Hand, len: usize, singles: usize) -> Result<()> {
    let next = stage.next_frame(len);
    let whole = hand.put(BUFFERS, &plain(), &next);
    let bytes = hand.read(BUFFERS, whole.len as usize);
    let mut chain = Vec::new();
    for (i, byte) in bytes[..singles].iter().enumerate() {
        // Far apart, so that nobody gets the next byte by accident.
        let at = BUFFERS + 0x1_0000 + 64 * i;
        hand.memory().write(at, &[*byte]);
        let i = u16::try_from(i)?;
        let flags = if usize::from(i) + 1 == bytes.len() { 0 } else { DESC_NEXT };
        chain.push((i, chained(at, 1, flags, i + 1)));
    }
    if singles < bytes.len() {
        let rest = u32::try_from(bytes.len() - singles)?;
        chain.push((u16::try_from(singles)?, readable(BUFFERS + singles, rest)));
    }
    stage.expect_ok(hand, &chain)
}

#[test]
fn n02_header_in_twelve_descriptors_is_a_header() -> Result<()> {
    let (mut stage, mut hand) = stage(0, 0)?;
    byte_by_byte(&mut stage, &mut hand, 500, 12)?;
    byte_by_byte(&mut stage, &mut hand, 60, 11)?;
    end(stage, hand)
}

#[test]
fn n03_every_byte_in_a_descriptor_of_its_own() -> Result<()> {
    let mut stage = Stage::new()?;
    let mut hand = stage.connect(&HandConfig { size: 128, ..HandConfig::default() })?;
    byte_by_byte(&mut stage, &mut hand, 60, 72)?;
    // Header's end and frame's beginning in one.
    let next = stage.next_frame(60);
    let whole = hand.put(BUFFERS, &plain(), &next);
    let chain = [
        (0, chained(BUFFERS, 5, DESC_NEXT, 1)),
        (1, chained(BUFFERS + 5, 20, DESC_NEXT, 2)),
        (2, readable(BUFFERS + 25, whole.len - 25)),
    ];
    stage.expect_ok(&mut hand, &chain)?;
    end(stage, hand)
}

#[test]
fn n04_short_frames_arrive_with_their_own_length() -> Result<()> {
    let (mut stage, mut hand) = stage(0, 0)?;
    for payload in 0..46 {
        let sent = frame(NEIGHBOUR, HOSTILE, payload);
        let (header, got) = delivered(&mut stage, &mut hand, VnetHeader::PLAIN, &sent)?;
        ensure!(got == sent && header.is_plain(), "{payload} bytes of payload");
    }
    end(stage, hand)
}

/// Two networks with an uplink in one bridge of the host: what a guest of the one sends, a guest of the other gets as it
/// was on the host.
#[test]
fn n04_short_frames_are_padded_with_zeros_towards_the_host() -> Result<()> {
    let daemon = Daemon::start()?;
    for (plug, network) in [("sender", "left"), ("receiver", "right")] {
        let socket = daemon.socket(plug);
        daemon.run(&["plug", plug, "--listen", socket.to_str().context("path")?, "--network", network])?;
        daemon.run(&["plug", &format!("up-{network}"), "--network", network, "--to", "bridge:br0"])?;
    }
    let mut hand = Hand::connect(daemon.socket("sender"), &HandConfig::default())?;
    let mut receiver = Peer::connect(daemon.socket("receiver"), PeerConfig::default())?;
    receiver.offer_all();
    daemon.wait_for_forwarding(&["sender", "receiver", "up-left", "up-right"])?;
    // A long frame went before each, and behind it in the guest's memory lies what nobody may see.
    for len in (14..=62).flat_map(|len| [len, 1000, len]) {
        hand.poison(2048);
        let sent = [&NEIGHBOUR[..], &HOSTILE, &vec![0xa5; len - 12]].concat();
        hand.send(1, &plain(), &sent)?;
        let got = loop {
            let (_, got) = receiver.expect(0)?;
            // The host's own frames (MLD) are not what this is about.
            if got[6..12] == HOSTILE {
                break got;
            }
        };
        let padding = vec![0; 60_usize.saturating_sub(len)];
        ensure!(got == [sent, padding].concat(), "{len} bytes arrived as {got:02x?}");
    }
    Ok(())
}

#[test]
fn n05_unknown_and_foreign_gso_types_are_dropped() -> Result<()> {
    let (mut stage, mut hand) = stage(SENDS, TAKES)?;
    let mut tcp = v4().tcp(&Tcp::default(), &[7; 3000]);
    let honest = leave_segments(&mut tcp, 1000).unwrap();
    let known = [gso::NONE, gso::TCPV4, gso::TCPV4 | gso::ECN];
    for gso_type in (0..=255).filter(|kind| !known.contains(kind)) {
        dropped(&mut stage, &mut hand, VnetHeader { gso_type, ..honest }, &tcp, BadOffload)?;
    }
    end(stage, hand)?;
    // What was not negotiated, one feature at a time.
    let without = [
        (gso::TCPV4, SENDS & !(1 << features::HOST_TSO4)),
        (gso::TCPV4 | gso::ECN, SENDS & !(1 << features::HOST_ECN)),
        (gso::TCPV4, 0),
    ];
    for (gso_type, sends) in without {
        let (mut stage, mut hand) = self::stage(sends, TAKES)?;
        dropped(&mut stage, &mut hand, VnetHeader { gso_type, ..honest }, &tcp, BadOffload)?;
        end(stage, hand)?;
    }
    Ok(())
}

#[test]
fn n06_gso_sizes_that_cannot_be() -> Result<()> {
    let (mut stage, mut hand) = stage(SENDS, TAKES)?;
    let mut tcp = v4().tcp(&Tcp::default(), &[7; 60_000]);
    let honest = leave_segments(&mut tcp, 1000).unwrap();
    for gso_size in [0, 1, 2, 60_000 / 128 - 1] {
        dropped(&mut stage, &mut hand, VnetHeader { gso_size, ..honest }, &tcp, BadOffload)
            .with_context(|| format!("gso_size {gso_size}"))?;
    }
    for gso_size in [536, 1448, 9000] {
        let header = VnetHeader { gso_size, ..honest };
        let (got, bytes) = delivered(&mut stage, &mut hand, header, &tcp)?;
        ensure!(got.gso_size == gso_size && bytes == tcp, "{got:?}");
    }
    // One segment or less: an ordinary frame with a partial checksum, which has to fit the MTU.
    dropped(&mut stage, &mut hand, VnetHeader { gso_size: 60_000, ..honest }, &tcp, MtuExceeded)?;
    let mut tcp = v4().tcp(&Tcp::default(), &[7; 3000]);
    let honest = leave_segments(&mut tcp, 1000).unwrap();
    for gso_size in [3000, 65_535] {
        let (got, bytes) = delivered(&mut stage, &mut hand, VnetHeader { gso_size, ..honest }, &tcp)?;
        ensure!(!got.is_gso() && got.needs_csum() && bytes == tcp, "{got:?}");
    }
    end(stage, hand)
}

#[test]
fn n06_datagrams_that_cannot_be() -> Result<()> {
    let (mut stage, mut hand) = stage(SENDS, TAKES)?;
    for craft in [v4(), v6()] {
        let mut udp = craft.udp(5, 6, &[7; 60_000]);
        let honest = leave_segments(&mut udp, 1000).unwrap();
        let (l4, tcp) = (honest.csum_start, craft.tcp(&Tcp::default(), &[7; 60_000]));
        for (lie, frame) in [
            (VnetHeader { gso_size: 0, ..honest }, &udp),
            (VnetHeader { gso_size: 60_000 / 128 - 1, ..honest }, &udp),
            (VnetHeader { csum_start: l4 - 1, ..honest }, &udp),
            (VnetHeader { csum_start: l4 + 8, ..honest }, &udp),
            (VnetHeader { csum_start: 0xffff, ..honest }, &udp),
            (VnetHeader { csum_offset: 16, ..honest }, &udp),
            (VnetHeader { flags: 0, ..honest }, &udp),
            (VnetHeader { gso_type: gso::UDP, ..honest }, &udp),
            (VnetHeader { gso_type: gso::UDP_L4 | gso::ECN, ..honest }, &udp),
            (VnetHeader { gso_type: gso::TCPV4, csum_offset: 16, ..honest }, &udp),
            (honest, &tcp),
        ] {
            dropped(&mut stage, &mut hand, lie, frame, BadOffload)?;
        }
        let (got, bytes) = delivered(&mut stage, &mut hand, honest, &udp)?;
        ensure!(VnetHeader { num_buffers: 1, ..got } == honest && bytes == udp, "{got:?}");
    }
    end(stage, hand)
}

#[test]
fn n07_hdr_len_is_a_hint_that_nobody_takes() -> Result<()> {
    let (mut stage, mut hand) = stage(SENDS, TAKES)?;
    let mut tcp = v4().tcp(&Tcp::default(), &[7; 3000]);
    let honest = leave_segments(&mut tcp, 1000).unwrap();
    for hdr_len in [0, 1, 13, 53, 55, 3000, 3001, 0xffff] {
        let (got, bytes) = delivered(&mut stage, &mut hand, VnetHeader { hdr_len, ..honest }, &tcp)?;
        ensure!(got.hdr_len == honest.hdr_len && bytes == tcp, "{hdr_len}: {got:?}");
        let (got, _) = delivered(&mut stage, &mut hand, VnetHeader { hdr_len, ..VnetHeader::PLAIN }, &tcp)?;
        ensure!(got == VnetHeader { num_buffers: 2, ..VnetHeader::PLAIN }, "{hdr_len}: {got:?}");
    }
    end(stage, hand)
}

#[test]
fn n08_checksums_beyond_the_frame_are_dropped() -> Result<()> {
    let (mut stage, mut hand) = stage(SENDS, 0)?;
    let mut udp = v4().udp(5, 6, &[7; 100]);
    let honest = leave_checksum(&mut udp).unwrap();
    let len = u16::try_from(udp.len())?;
    let places = [
        (len, 0),
        (len - 1, 0),
        (len - 2, 1),
        (34, len - 34),
        (34, len - 35),
        (0xffff, 0),
        (0xffff, 0xffff),
        (34, 0xffff),
        (len + 1, 6),
    ];
    for (csum_start, csum_offset) in places {
        let header = VnetHeader { csum_start, csum_offset, ..honest };
        dropped(&mut stage, &mut hand, header, &udp, BadOffload)?;
    }
    end(stage, hand)
}

#[test]
fn n09_checksums_inside_the_headers_are_dropped() -> Result<()> {
    let (mut stage, mut hand) = stage(SENDS, 0)?;
    for craft in [v4(), v6(), v4().tag(0x8100, 5)] {
        let mut udp = craft.udp(5, 6, &[7; 100]);
        let honest = leave_checksum(&mut udp).unwrap();
        for csum_start in [0, 6, 13, 14, honest.csum_start - 1] {
            dropped(&mut stage, &mut hand, VnetHeader { csum_start, ..honest }, &udp, BadOffload)?;
        }
        // The place of TCP's checksum in a UDP datagram.
        dropped(&mut stage, &mut hand, VnetHeader { csum_offset: 16, ..honest }, &udp, BadOffload)?;
    }
    // Behind something that is not IP nobody can judge; it is completed as asked, inside the frame.
    let sent = frame(NEIGHBOUR, HOSTILE, 100);
    let header = VnetHeader { flags: flag::NEEDS_CSUM, csum_start: 14, csum_offset: 98, ..VnetHeader::PLAIN };
    let (got, bytes) = delivered(&mut stage, &mut hand, header, &sent)?;
    ensure!(got.is_plain() && bytes.len() == sent.len() && bytes[..112] == sent[..112], "{got:?}");
    end(stage, hand)
}

#[test]
fn n10_claims_that_were_not_negotiated_are_cleared() -> Result<()> {
    let udp = v4().udp(5, 6, &[7; 100]);
    let mut partial = udp.clone();
    let honest = leave_checksum(&mut partial).unwrap();
    // Without CSUM the bit means nothing, and the bytes are what the guest says they are.
    let (mut stage, mut hand) = stage(0, TAKES)?;
    let (got, bytes) = delivered(&mut stage, &mut hand, honest, &partial)?;
    ensure!(got == VnetHeader::PLAIN && bytes == partial, "{got:?}");
    end(stage, hand)?;
    // A guest's word that a checksum is right is no reason for another to believe it.
    let (mut stage, mut hand) = self::stage(SENDS, TAKES)?;
    for flags in [flag::DATA_VALID, flag::RSC_INFO, 0xf8, 0xfe] {
        let (got, bytes) = delivered(&mut stage, &mut hand, VnetHeader { flags, ..VnetHeader::PLAIN }, &udp)?;
        ensure!(got == VnetHeader::PLAIN && bytes == udp, "flags {flags:#x}: {got:?}");
    }
    let (got, bytes) = delivered(&mut stage, &mut hand, VnetHeader { flags: 0xff, ..honest }, &partial)?;
    ensure!(got.flags == flag::NEEDS_CSUM && bytes == partial, "{got:?}");
    end(stage, hand)
}

#[test]
fn n11_gso_over_odd_ip_headers_is_bounded() -> Result<()> {
    let (mut stage, mut hand) = stage(SENDS, TAKES)?;
    let gso = |craft: &Craft| {
        let mut tcp = craft.tcp(&Tcp::default(), &[7; 3000]);
        leave_segments(&mut tcp, 1000).map(|header| (header, tcp))
    };
    // IPv4 options of any length, and a short IPv6 extension header: as they are.
    for craft in [Craft { options_len: 40, ..v4() }, Craft { options_len: 8, ..v6() }] {
        let (header, tcp) = gso(&craft).unwrap();
        let (got, bytes) = delivered(&mut stage, &mut hand, header, &tcp)?;
        ensure!(got == VnetHeader { num_buffers: got.num_buffers, ..header } && bytes == tcp, "{got:?}");
    }
    // More than is looked at, and what is no TCP to be cut: never cut, never passed on as if it were.
    let (honest, _) = gso(&v6()).unwrap();
    let long = Craft { options_len: 2048, ..v6() }.tcp(&Tcp::default(), &[7; 3000]);
    let mut hundred = v6().tcp(&Tcp::default(), &[7; 3000]);
    hundred[20] = 60;
    for header in 0..100 {
        hundred.splice(54 + 8 * header..54 + 8 * header, [60, 0, 0, 0, 0, 0, 0, 0]);
    }
    let mut fragment = v4().tcp(&Tcp::default(), &[7; 3000]);
    fragment[20] = 0x20;
    let mut truncated = v6().tcp(&Tcp::default(), &[]);
    truncated[20] = 60;
    truncated.truncate(56);
    for (frame, gso_type) in
        [(&long, gso::TCPV6), (&hundred, gso::TCPV6), (&fragment, gso::TCPV4), (&truncated, gso::TCPV6)]
    {
        dropped(&mut stage, &mut hand, VnetHeader { gso_type, ..honest }, frame, BadOffload)?;
    }
    end(stage, hand)
}

/// Checks that `parts` are the segments of a TCP frame over `craft` with this payload, each complete in itself.
fn ensure_segments(
    parts: &[(VnetHeader, Vec<u8>)],
    craft: &Craft,
    payload: &[u8],
    size: usize,
) -> Result<()> {
    ensure!(parts.len() == payload.len().div_ceil(size), "{} segments", parts.len());
    for (i, ((header, bytes), piece)) in parts.iter().zip(payload.chunks(size)).enumerate() {
        ensure!(header.is_plain(), "segment {i}: {header:?}");
        let last = i + 1 == parts.len();
        let flags = if last { 0x18 } else { 0x10 };
        let sequence = 1 + u32::try_from(i * size)?;
        let mut wanted = craft.tcp(&Tcp { sequence, flags, ..Tcp::default() }, piece);
        if Ip::parse(&wanted, wanted.len()).unwrap().version == wire::ip::Version::V4 {
            // Each segment has an identification of its own, the first that of the frame.
            wanted[18..20].copy_from_slice(&u16::try_from(i)?.to_be_bytes());
            let checksum = wire::checksum::ipv4_header(&wanted[14..34]);
            wanted[24..26].copy_from_slice(&checksum.to_be_bytes());
        }
        ensure!(*bytes == wanted, "segment {i} of {}", parts.len());
    }
    Ok(())
}

#[test]
fn n12_frames_of_64_kib_are_segmented_exactly_for_who_takes_none() -> Result<()> {
    let payload: Vec<u8> = (0..65_000u32).map(|i| (i * 7 + (i >> 8)).to_le_bytes()[0]).collect();
    let (mut stage, mut hand) = stage(SENDS, 0)?;
    for (craft, size) in [(v4(), 1448), (v6(), 1428), (v4(), 8000), (v4(), 1000)] {
        let mut tcp = craft.tcp(&Tcp::default(), &payload);
        let header = leave_segments(&mut tcp, size).unwrap();
        hand.send(1, &header.to_bytes(), &tcp)?;
        stage.book.rx += 1;
        let count = payload.len().div_ceil(size.into());
        let parts = (0..count).map(|_| stage.neighbour.expect(0)).collect::<Result<Vec<_>>>()?;
        ensure_segments(&parts, &craft, &payload, size.into()).with_context(|| format!("size {size}"))?;
    }
    stage.settle()?;
    let sent = stage.plane().counters(stage.neighbour_port)?.tx_frames;
    ensure!(sent == 45 + 46 + 9 + 65, "every segment is a frame delivered: {sent}");
    end(stage, hand)
}

/// A sender may ask for segments that its own port allows and its receiver's does not.
#[test]
fn n12_segments_beyond_the_receivers_mtu_are_dropped() -> Result<()> {
    let (mut stage, mut hand) = stage(SENDS, 0)?;
    stage.neighbour.front().set_mtu(1500)?;
    let before = Ledger::from(&stage.plane().counters(stage.neighbour_port)?);
    // MTU, Ethernet and two tags, less the 54 bytes of a segment's headers.
    let largest = 1522 - 54;
    let mut wanted = before.clone();
    for (size, len, too_long) in
        [(largest, 20_000, 0), (largest + 1, 20_000, 13), (largest + 1, 2000, 1), (8000, 65_000, 8)]
    {
        let payload = vec![7; len];
        let mut tcp = v4().tcp(&Tcp::default(), &payload);
        let header = leave_segments(&mut tcp, u16::try_from(size)?).unwrap();
        hand.send(1, &header.to_bytes(), &tcp)?;
        stage.book.rx += 1;
        let lengths = payload.chunks(size).map(|piece| 54 + piece.len()).filter(|len| *len <= 1522);
        for len in lengths {
            let (header, got) = stage.neighbour.expect(0)?;
            ensure!(header.is_plain() && got.len() == len, "{} bytes for {len}", got.len());
            wanted.tx += 1;
        }
        wanted = wanted.drops(MtuExceeded, too_long);
        stage.plane().expect_counters(stage.neighbour_port, &wanted)?;
    }
    stage.good(&mut hand)?;
    stage.settle()?;
    end(stage, hand)
}

/// However many frames software could have made of it.
#[test]
fn n12_ring_that_breaks_under_software_offload_counts_what_it_lost() -> Result<()> {
    let (mut stage, mut hand) = stage(SENDS, 0)?;
    let before = Ledger::from(&stage.plane().counters(stage.neighbour_port)?);
    stage.neighbour.pairs[0].rx.ring.publish_avail(0x8000);
    let mut udp = v4().udp(1, 2, &[7; 100]);
    let header = leave_checksum(&mut udp).unwrap();
    hand.send(1, &header.to_bytes(), &udp)?;
    stage.book.rx += 1;
    let wanted = before.drops(GuestDescriptorInvalid, 1);
    stage.plane().expect_counters(stage.neighbour_port, &wanted)?;
    stage.settle()?;
    end(stage, hand)
}

#[test]
fn n13_num_buffers_of_a_sender_mean_nothing() -> Result<()> {
    let (mut stage, mut hand) = stage(0, 0)?;
    for num_buffers in [0, 2, 0x8000, 0xffff] {
        let sent = frame(NEIGHBOUR, HOSTILE, 100);
        let header = VnetHeader { num_buffers, ..VnetHeader::PLAIN };
        let (got, bytes) = delivered(&mut stage, &mut hand, header, &sent)?;
        ensure!(got.num_buffers == 1 && bytes == sent, "{got:?}");
    }
    end(stage, hand)
}

#[test]
fn n14_frames_beyond_the_mtu_are_dropped() -> Result<()> {
    let (mut stage, mut hand) = stage(SENDS, TAKES)?;
    // MTU, Ethernet and two tags.
    let longest = usize::from(MTU) + 8;
    let sent = frame(NEIGHBOUR, HOSTILE, longest);
    let (_, got) = delivered(&mut stage, &mut hand, VnetHeader::PLAIN, &sent)?;
    ensure!(got == sent);
    for payload in [longest + 1, 20_000, 65_543] {
        let sent = frame(NEIGHBOUR, HOSTILE, payload);
        dropped(&mut stage, &mut hand, VnetHeader::PLAIN, &sent, MtuExceeded)?;
    }
    // A partial checksum is no segmentation.
    let mut udp = v4().udp(1, 2, &vec![0; longest]);
    let header = leave_checksum(&mut udp).unwrap();
    dropped(&mut stage, &mut hand, header, &udp, MtuExceeded)?;
    hand.front().set_mtu(1500)?;
    let sent = frame(NEIGHBOUR, HOSTILE, 1509);
    dropped(&mut stage, &mut hand, VnetHeader::PLAIN, &sent, MtuExceeded)?;
    end(stage, hand)
}

#[test]
fn n15_vlan_tags_of_any_number_pass_untouched() -> Result<()> {
    let (mut stage, mut hand) = stage(SENDS, 0)?;
    for tags in 1..=8 {
        let craft = (0..tags).fold(v4(), |craft, n| craft.tag(if n == 0 { 0x88a8 } else { 0x8100 }, n));
        let sent = craft.udp(1, 2, &[9; 64]);
        let (_, got) = delivered(&mut stage, &mut hand, VnetHeader::PLAIN, &sent)?;
        ensure!(got == sent, "{tags} tags");
        // Cut anywhere from behind the addresses on.
        for len in 14..14 + 4 * usize::from(tags) + 4 {
            let (_, got) = delivered(&mut stage, &mut hand, VnetHeader::PLAIN, &sent[..len])?;
            ensure!(got == sent[..len], "{tags} tags cut to {len}");
        }
    }
    end(stage, hand)
}

/// Random frames behind random headers: each is delivered or counted, and what arrives has a header that is true.
#[test]
fn n16_random_headers_and_frames_are_delivered_or_counted() -> Result<()> {
    let plan = PortPlan { mtu: MTU, ..PortPlan::new("hostile", NETWORK) };
    let neighbour = PeerConfig { ring_size: 256, features: MERGEABLE | TAKES, ..PeerConfig::default() };
    let mut stage = Stage::with(plan, neighbour)?;
    let config = PeerConfig { features: MODERN | SENDS, ..PeerConfig::default() };
    let mut peer = stage.peer(config)?;
    let mut state = 16;
    let sample =
        [v4().tcp(&Tcp::default(), &[7; 600]), v6().udp(7, 8, &[7; 300]), v4().echo_request(1, 2, &[0; 30])];
    let rounds = count(20_000, 10_000_000) / 32;
    let mut delivered = 0;
    for _ in 0..rounds {
        for _ in 0..32 {
            let random = split_mix(&mut state);
            let mut frame = sample[usize::try_from(random % 3)?].clone();
            // A few bytes behind the addresses are anything.
            for byte in random.to_le_bytes().into_iter().skip(1).step_by(2) {
                let at = 12 + usize::from(byte) % 60;
                frame[at] = split_mix(&mut state).to_le_bytes()[0];
            }
            frame.truncate(14 + usize::try_from(split_mix(&mut state) % 700)?);
            let [flags, kind, size @ .., start, offset, _] = split_mix(&mut state).to_le_bytes();
            let header = VnetHeader {
                flags: flags & 7,
                gso_type: [0, 0, 0, 0, 1, 4, 0x81, kind][usize::from(kind & 7)],
                hdr_len: u16::from_le_bytes([size[0], 0]),
                gso_size: u16::from_le_bytes([size[1], size[2] & 1]),
                csum_start: [34, 54, u16::from(start)][usize::from(start % 3)],
                csum_offset: [16, 6, u16::from(offset)][usize::from(offset % 3)],
                num_buffers: 0,
            };
            ensure!(peer.send(0, &header.to_bytes(), &[&frame]), "32 of 64 buffers");
        }
        peer.flush(0);
        e2e::inproc::until("the frames", || peer.unused(0) == 0)?;
        while let Some((header, frame)) = stage.neighbour.receive(0) {
            // As far as anybody looks: what is behind that was judged by nobody.
            let prefix = &frame[..frame.len().min(HEAD_LEN - HEADER_LEN)];
            let checked = header.check(frame.len(), prefix, wire::Offloads::ALL);
            ensure!(checked == Ok(VnetHeader { num_buffers: 1, ..header }), "{header:?}: {checked:?}");
            delivered += 1;
        }
    }
    let have = Ledger::from(&stage.plane().counters(stage.port)?);
    ensure!(have.rx == rounds * 32 && have.rx == delivered + have.dropped() - 1, "{delivered} of {have:?}");
    ensure!(
        delivered > have.rx / 5 && have.dropped() > have.rx / 5,
        "neither all good nor all bad: {have:?}"
    );
    drop(peer);
    stage.finish()
}
