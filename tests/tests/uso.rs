//! UDP that is to be cut into datagrams (USO), between a guest and sockets of the host: the kernel behind a TAP gets it
//! whole and cuts it only for a socket that wants it cut; what a socket sends goes whole to a guest that takes it, and
//! is cut for one that does not.
#![allow(clippy::unwrap_used)]

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use dataplane::{Link, PortSpec};
use e2e::inproc::{Plane, PortPlan};
use e2e::netns::inside;
use e2e::peer::{MERGEABLE, PATIENCE, Peer, PeerConfig};
use nix::sys::socket::{setsockopt, sockopt};
use sys::tap::{TUN_F_CSUM, TUN_F_USO4, TUN_F_USO6, TapQueue};
use vring::features::{CSUM, GUEST_CSUM, GUEST_USO4, GUEST_USO6, HOST_USO};
use wire::craft::{Craft, leave_checksum, leave_segments};
use wire::ip::Version;
use wire::vnet::gso;
use wire::{Ip, Mac, Offloads, VnetHeader, checksum};

const HOST: [u8; 6] = [2, 0, 0, 0, 0, 1];
const GUEST: [u8; 6] = [2, 0, 0, 0, 0, 2];
/// Bytes in one system call, and in a datagram: three full ones and a shorter one.
const WHOLE: usize = 5000;
const PIECE: u16 = 1300;
const GUEST_PORT: u16 = 9;

const TAKES: [u64; 3] = [0, 1 << GUEST_CSUM, 1 << GUEST_CSUM | 1 << GUEST_USO4 | 1 << GUEST_USO6];

#[test]
fn datagrams_of_guest_and_host_in_one_piece() -> Result<()> {
    if !inside("datagrams_of_guest_and_host_in_one_piece")? {
        return Ok(());
    }
    let plane = Plane::start()?;
    let kernel_cuts = add_tap(&plane)?;
    let guest_port = plane.add(PortPlan::new("guest", "uso"))?;
    for takes in TAKES {
        let features = MERGEABLE | 1 << CSUM | 1 << HOST_USO | takes;
        let config = PeerConfig { features, tx_len: 6000, ..PeerConfig::default() };
        let mut guest = plane.guest("guest", config)?;
        for (host, other) in [("10.0.0.1", "10.0.0.2"), ("fd00::1", "fd00::2")] {
            let (host, other) = (host.parse()?, other.parse()?);
            to_host(&mut guest, host, other, kernel_cuts)?;
            to_guest(&mut guest, host, other, Offloads::from_guest_features(takes), kernel_cuts)?;
        }
        drop(guest);
        plane.expect_alone(guest_port)?;
    }
    plane.finish()
}

/// Adds a TAP with addresses and neighbours. Returns whether its kernel knows the offload.
fn add_tap(plane: &Plane) -> Result<bool> {
    let queue = TapQueue::create("tap0", false)?;
    let offloads = queue.set_offload(TUN_F_CSUM | TUN_F_USO4 | TUN_F_USO6)?;
    let link = Link::Tap { queues: vec![queue], offloads: true };
    plane.dataplane().add_port(PortSpec { name: "tap0".into(), network: "uso".into(), mtu: 1500, link })?;
    let (host, guest) = (Mac::new(HOST), Mac::new(GUEST));
    let script = format!(
        "ip link set tap0 address {host} up
         ip addr add 10.0.0.1/24 dev tap0
         ip addr add fd00::1/64 dev tap0 nodad
         ip neigh add 10.0.0.2 lladdr {guest} dev tap0
         ip neigh add fd00::2 lladdr {guest} dev tap0"
    );
    ensure!(Command::new("sh").args(["-e", "-c", &script]).status()?.success());
    Ok(offloads & TUN_F_USO4 != 0)
}

fn to_host(guest: &mut Peer, host: IpAddr, other: IpAddr, kernel_cuts: bool) -> Result<()> {
    let payload = pattern();
    for gro in [false, true] {
        let socket = socket(host)?;
        if gro {
            setsockopt(&socket, sockopt::UdpGroSegment, &true)?;
        }
        let port = socket.local_addr()?.port();
        let mut frame = craft(GUEST, HOST, other, host).udp(GUEST_PORT, port, &payload);
        let header = leave_segments(&mut frame, PIECE).unwrap();
        ensure!(guest.send_now(0, &header.to_bytes(), &frame));
        let (mut bytes, mut lengths, mut room) = (Vec::new(), Vec::new(), vec![0; WHOLE + 1]);
        while bytes.len() < WHOLE {
            let (len, from) = socket.recv_from(&mut room)?;
            ensure!(from == SocketAddr::new(other, GUEST_PORT));
            bytes.extend_from_slice(&room[..len]);
            lengths.push(len);
        }
        ensure!(bytes == payload, "to {host}: other bytes");
        if !gro {
            ensure!(lengths == [1300, 1300, 1300, 1100], "to {host}: {lengths:?}");
        } else if kernel_cuts {
            ensure!(lengths == [WHOLE], "to {host}: {lengths:?}");
        }
    }
    Ok(())
}

fn to_guest(
    guest: &mut Peer,
    host: IpAddr,
    other: IpAddr,
    accepts: Offloads,
    kernel_leaves: bool,
) -> Result<()> {
    let payload = pattern();
    let socket = socket(host)?;
    setsockopt(&socket, sockopt::UdpGsoSegment, &i32::from(PIECE))?;
    let port = socket.local_addr()?.port();
    socket.send_to(&payload, (other, GUEST_PORT))?;
    let craft = craft(HOST, GUEST, host, other);
    if kernel_leaves && accepts.contains(Offloads::CSUM | Offloads::USO) {
        let (header, frame) = expect_udp(guest, port)?;
        let mut wanted = craft.udp(port, GUEST_PORT, &payload);
        let wanted_header = leave_segments(&mut wanted, PIECE).unwrap();
        ensure!(header.gso_type == gso::UDP_L4, "{header:?}");
        ensure!(VnetHeader { num_buffers: 1, ..header } == wanted_header, "{header:?}");
        return ensure_same(&frame, &wanted);
    }
    let mut ids = Vec::new();
    for piece in payload.chunks(PIECE.into()) {
        let (header, frame) = expect_udp(guest, port)?;
        let mut wanted = craft.udp(port, GUEST_PORT, piece);
        let partial = accepts.contains(Offloads::CSUM);
        let wanted_header = if partial { leave_checksum(&mut wanted).unwrap() } else { VnetHeader::PLAIN };
        ensure!(header == wanted_header, "{header:?}");
        ensure_same(&frame, &wanted)?;
        ids.push(u16::from_be_bytes([frame[18], frame[19]]));
    }
    // Each datagram has an identification of its own; IPv6 has none.
    ensure!(host.is_ipv6() || ids.windows(2).all(|pair| pair[0].wrapping_add(1) == pair[1]), "{ids:?}");
    Ok(())
}

/// The next frame with UDP from `port`. The host says other things, too.
fn expect_udp(guest: &mut Peer, port: u16) -> Result<(VnetHeader, Vec<u8>)> {
    loop {
        let (header, frame) = guest.expect(0)?;
        let udp = Ip::parse(&frame, frame.len()).is_ok_and(|ip| {
            ip.protocol == wire::ip::protocol::UDP && frame[ip.l4..ip.l4 + 2] == port.to_be_bytes()
        });
        if udp {
            return Ok((header, frame));
        }
    }
}

/// Lengths, addresses, ports, checksums and payload are the same: all but what a host's IP chooses by itself.
fn ensure_same(frame: &[u8], wanted: &[u8]) -> Result<()> {
    let (ip, wanted_ip) = (Ip::parse(frame, frame.len())?, Ip::parse(wanted, wanted.len())?);
    ensure!(ip == wanted_ip, "{ip:?} instead of {wanted_ip:?}");
    ensure!(frame[..ip.l3] == wanted[..ip.l3], "another Ethernet header");
    ensure!(frame[ip.l4..] == wanted[ip.l4..], "another datagram");
    if ip.version == Version::V4 {
        let header = &frame[ip.l3..ip.l4];
        ensure!(checksum::ipv4_header(header).to_be_bytes() == header[10..12], "the IP header's checksum");
    }
    Ok(())
}

fn craft(src_mac: [u8; 6], dst_mac: [u8; 6], src: IpAddr, dst: IpAddr) -> Craft {
    let (src_mac, dst_mac) = (Mac::new(src_mac), Mac::new(dst_mac));
    match (src, dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => Craft::v4(src_mac, dst_mac, src, dst),
        (IpAddr::V6(src), IpAddr::V6(dst)) => Craft::v6(src_mac, dst_mac, src, dst),
        _ => unreachable!("both are of one version"),
    }
}

fn socket(address: IpAddr) -> Result<UdpSocket> {
    let socket = UdpSocket::bind((address, 0))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.set_write_timeout(Some(Duration::from_secs(1)))?;
    Ok(socket)
}

fn pattern() -> Vec<u8> {
    (0..WHOLE).map(|i| (i * 31 % 251).to_le_bytes()[0]).collect()
}
