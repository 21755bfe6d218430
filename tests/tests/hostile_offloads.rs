//! Offloads: what a sender leaves to do is passed on to a receiver that takes it, done for one that does not, and refused
//! to a sender that must not ask. Every pair of negotiations is tried with every kind of frame.
#![allow(clippy::unwrap_used)]

use anyhow::{Context, Result, ensure};
use dataplane::DropReason::BadOffload;
use dataplane::PortId;
use e2e::canary::Canary;
use e2e::inproc::{Ledger, Plane, PortPlan, until};
use e2e::peer::{MERGEABLE, Peer, PeerConfig};
use e2e::stage::{MTU, frame, plain};
use vring::features::{
    CSUM, GUEST_CSUM, GUEST_ECN, GUEST_TSO4, GUEST_TSO6, GUEST_USO4, GUEST_USO6, HOST_ECN, HOST_TSO4,
    HOST_TSO6, HOST_USO,
};
use wire::checksum::complete;
use wire::craft::{Craft, Tcp, leave_checksum, leave_segments};
use wire::{Mac, Offloads, VnetHeader, segment};

const A: [u8; 6] = [2, 0, 0, 0, 0, 1];
const B: [u8; 6] = [2, 0, 0, 0, 0, 2];
const CWR: u8 = 0x80;

const fn bits<const N: usize>(bits: [u32; N]) -> u64 {
    let (mut set, mut i) = (0, 0);
    while i < N {
        set |= 1 << bits[i];
        i += 1;
    }
    set
}

/// What drivers acknowledge of what a device can do for them, and of what they can do themselves.
const SENDS: [u64; 6] = [
    0,
    bits([CSUM]),
    bits([CSUM, HOST_TSO4]),
    bits([CSUM, HOST_TSO4, HOST_TSO6]),
    bits([CSUM, HOST_TSO4, HOST_TSO6, HOST_ECN]),
    bits([CSUM, HOST_USO]),
];
const TAKES: [u64; 8] = [
    0,
    bits([GUEST_CSUM]),
    bits([GUEST_CSUM, GUEST_TSO4]),
    bits([GUEST_CSUM, GUEST_TSO6]),
    bits([GUEST_CSUM, GUEST_TSO4, GUEST_TSO6]),
    bits([GUEST_CSUM, GUEST_TSO4, GUEST_TSO6, GUEST_ECN]),
    bits([GUEST_CSUM, GUEST_USO4]),
    bits([GUEST_CSUM, GUEST_USO4, GUEST_USO6]),
];

/// Every kind of frame that a guest may send: what it is, the header and the bytes.
fn kinds(src: [u8; 6], dst: [u8; 6]) -> Vec<(&'static str, VnetHeader, Vec<u8>)> {
    let (src, dst) = (Mac::new(src), Mac::new(dst));
    let v4 = Craft::v4(src, dst, [10, 0, 0, 1].into(), [10, 0, 0, 2].into());
    let [one, two] = [1, 2].map(|n| std::net::Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, n));
    let v6 = Craft::v6(src, dst, one, two);
    let payload: Vec<u8> = (0..5000u16).map(|i| (i * 13).to_le_bytes()[0]).collect();
    let mut kinds = vec![("plain", VnetHeader::PLAIN, v4.udp(1, 2, &payload[..900]))];
    for (name, craft) in [("IPv4", &v4), ("IPv6", &v6), ("tagged IPv4", &v4.clone().tag(0x8100, 5))] {
        let mut udp = craft.udp(1, 2, &payload[..901]);
        let header = leave_checksum(&mut udp).unwrap();
        kinds.push((name, header, udp));
        let mut datagrams = craft.udp(1, 2, &payload);
        let header = leave_segments(&mut datagrams, 1300).unwrap();
        kinds.push((name, header, datagrams));
        for flags in [0x18, 0x18 | CWR] {
            let mut tcp = craft.tcp(&Tcp { flags, options: vec![1; 12], ..Tcp::default() }, &payload);
            let header = leave_segments(&mut tcp, 1300).unwrap();
            kinds.push((name, header, tcp));
        }
    }
    kinds
}

/// What a receiver that takes `accepts` must get of a frame.
fn expected(header: &VnetHeader, bytes: &[u8], accepts: Offloads) -> Vec<(VnetHeader, Vec<u8>)> {
    if accepts.contains(header.needs()) {
        return vec![(*header, bytes.to_vec())];
    }
    if header.is_gso() {
        let mut parts = Vec::new();
        let with_checksum = !accepts.contains(Offloads::CSUM);
        let cut = segment(bytes, header, with_checksum, |header, head, payload| {
            parts.push((*header, [head, payload].concat()));
        });
        assert_eq!(cut.unwrap(), parts.len());
        return parts;
    }
    let mut whole = bytes.to_vec();
    complete(&mut whole, header).unwrap();
    vec![(VnetHeader::PLAIN, whole)]
}

struct Pair {
    plane: Plane,
    ids: [PortId; 2],
}

impl Pair {
    fn guest(&self, n: usize, features: u64) -> Result<Peer> {
        let config = PeerConfig {
            features: MERGEABLE | features,
            tx_len: 6000,
            rx_len: 2048,
            ring_size: 128,
            ..PeerConfig::default()
        };
        self.plane.guest(["a", "b"][n], config)
    }
}

#[test]
fn every_negotiation_with_every_frame_in_both_directions() -> Result<()> {
    let plane = Plane::start()?;
    let canary = Canary::start(&plane)?;
    let add = |name| plane.add(PortPlan { mtu: MTU, ..PortPlan::new(name, "offloads") });
    let ids = [add("a")?, add("b")?];
    let pair = Pair { plane, ids };
    let mut books = [Ledger::default(), Ledger::default()];
    for sends in SENDS {
        for takes in TAKES {
            // The same on both sides, so that either direction is a case of its own.
            let mut peers = [pair.guest(0, sends | takes)?, pair.guest(1, sends | takes)?];
            introduce(&mut peers, &mut books)?;
            for (from, to, src, dst) in [(0, 1, A, B), (1, 0, B, A)] {
                for (name, header, bytes) in kinds(src, dst) {
                    let what = || format!("{name} {header:?} from {sends:#x} to {takes:#x}");
                    deliver(&mut peers, &mut books, (from, to), (sends, takes), &header, &bytes)
                        .with_context(what)?;
                }
            }
            for (id, book) in pair.ids.iter().zip(&books) {
                pair.plane.expect_counters(*id, book).with_context(|| format!("{sends:#x} {takes:#x}"))?;
            }
            drop(peers);
            for id in pair.ids {
                pair.plane.expect_alone(id)?;
            }
        }
    }
    let Pair { plane, .. } = pair;
    canary.finish(&plane)?;
    plane.finish()
}

/// Lets the switch know both.
fn introduce(peers: &mut [Peer; 2], books: &mut [Ledger; 2]) -> Result<()> {
    for (from, src) in [(0, A), (1, B)] {
        let hello = frame([0xff; 6], src, 46);
        ensure!(peers[from].send_now(0, &plain(), &hello));
        ensure!(peers[1 - from].expect(0)?.1 == hello);
        books[from].rx += 1;
        books[1 - from].tx += 1;
    }
    Ok(())
}

fn deliver(
    peers: &mut [Peer; 2],
    books: &mut [Ledger; 2],
    (from, to): (usize, usize),
    (sends, takes): (u64, u64),
    header: &VnetHeader,
    bytes: &[u8],
) -> Result<()> {
    let peer = &mut peers[from];
    ensure!(peer.send_now(0, &header.to_bytes(), bytes), "a free buffer");
    until("the frame to be used", || peer.unused(0) == 0)?;
    books[from].rx += 1;
    let may_send = Offloads::from_driver_features(sends).contains(header.needs());
    let header = match (may_send, header.is_gso()) {
        (true, _) => *header,
        (false, true) => {
            books[from] = std::mem::take(&mut books[from]).drops(BadOffload, 1);
            ensure!(peers[to].receive(0).is_none(), "an offload that was not negotiated");
            return Ok(());
        }
        // A partial checksum that was not negotiated is none: the bytes are what they are.
        (false, false) => VnetHeader::PLAIN,
    };
    for (i, (wanted, wanted_bytes)) in
        expected(&header, bytes, Offloads::from_guest_features(takes)).into_iter().enumerate()
    {
        let (got, got_bytes) = peers[to].expect(0)?;
        // How many buffers it took is the ring's affair.
        ensure!(VnetHeader { num_buffers: 1, ..got } == wanted, "part {i}: {got:?} instead of {wanted:?}");
        ensure!(got_bytes == wanted_bytes, "part {i} has other bytes");
        books[to].tx += 1;
    }
    ensure!(peers[to].receive(0).is_none(), "one part too many");
    Ok(())
}
