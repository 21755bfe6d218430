//! ARP for IPv4 over Ethernet (RFC 826).

use crate::Mac;
use crate::ethernet::{HEADER_LEN, MIN_FRAME, ethertype};

/// Bytes of a packet.
pub const LEN: usize = 28;

/// Values of [`Arp::operation`].
pub mod operation {
    /// Who has the target address?
    pub const REQUEST: u16 = 1;
    /// The sender has.
    pub const REPLY: u16 = 2;
    /// What is my address? (RFC 903)
    pub const REVERSE_REQUEST: u16 = 3;
}

/// Ethernet, IPv4, and the lengths of their addresses.
const KIND: [u8; 6] = [0, 1, 0x08, 0x00, 6, 4];

/// An ARP or reverse ARP packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arp {
    /// See [`operation`].
    pub operation: u16,
    /// The sender's MAC address.
    pub sender_mac: Mac,
    /// The sender's IPv4 address.
    pub sender_ip: [u8; 4],
    /// The target's MAC address.
    pub target_mac: Mac,
    /// The target's IPv4 address.
    pub target_ip: [u8; 4],
}

impl Arp {
    /// The question who has `target_ip`.
    pub const fn request(sender_mac: Mac, sender_ip: [u8; 4], target_ip: [u8; 4]) -> Arp {
        Arp { operation: operation::REQUEST, sender_mac, sender_ip, target_mac: Mac::ZERO, target_ip }
    }

    /// The answer to a request, that `mac` has the address asked for.
    pub const fn reply(&self, mac: Mac) -> Arp {
        Arp {
            operation: operation::REPLY,
            sender_mac: mac,
            sender_ip: self.target_ip,
            target_mac: self.sender_mac,
            target_ip: self.sender_ip,
        }
    }

    /// Reads the packet behind an Ethernet header; `None` if it is cut short, or not of Ethernet and IPv4.
    pub fn parse(payload: &[u8]) -> Option<Arp> {
        let packet: &[u8; LEN] = payload.first_chunk()?;
        let mac = |at: usize| packet[at..].first_chunk().copied().map(Mac::new);
        let ip = |at: usize| packet[at..].first_chunk().copied();
        if packet[..6] != KIND {
            return None;
        }
        Some(Arp {
            operation: u16::from_be_bytes([packet[6], packet[7]]),
            sender_mac: mac(8)?,
            sender_ip: ip(14)?,
            target_mac: mac(18)?,
            target_ip: ip(24)?,
        })
    }

    /// The packet as bytes.
    pub fn to_bytes(&self) -> [u8; LEN] {
        let mut packet = [0; LEN];
        packet[..6].copy_from_slice(&KIND);
        packet[6..8].copy_from_slice(&self.operation.to_be_bytes());
        packet[8..14].copy_from_slice(&self.sender_mac.octets());
        packet[14..18].copy_from_slice(&self.sender_ip);
        packet[18..24].copy_from_slice(&self.target_mac.octets());
        packet[24..].copy_from_slice(&self.target_ip);
        packet
    }

    /// The packet in an untagged frame from its sender to `dst`, padded with zeros.
    pub fn frame(&self, dst: Mac) -> [u8; MIN_FRAME] {
        let reverse = self.operation == operation::REVERSE_REQUEST;
        let ethertype = if reverse { ethertype::RARP } else { ethertype::ARP };
        let mut frame = [0; MIN_FRAME];
        frame[..6].copy_from_slice(&dst.octets());
        frame[6..12].copy_from_slice(&self.sender_mac.octets());
        frame[12..HEADER_LEN].copy_from_slice(&ethertype.to_be_bytes());
        frame[HEADER_LEN..HEADER_LEN + LEN].copy_from_slice(&self.to_bytes());
        frame
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Ethernet;

    const A: Mac = Mac::new([2, 0, 0, 0, 0, 1]);
    const B: Mac = Mac::new([2, 0, 0, 0, 0, 2]);

    #[test]
    fn question_and_answer() {
        let request = Arp::request(A, [10, 0, 0, 1], [10, 0, 0, 2]);
        let frame = request.frame(Mac::BROADCAST);
        let view = Ethernet::checked(&frame).unwrap();
        assert_eq!((view.dst(), view.src(), view.ethertype()), (Mac::BROADCAST, A, ethertype::ARP));
        assert_eq!(frame[14..22], [0, 1, 8, 0, 6, 4, 0, 1]);
        assert!(frame[42..].iter().all(|byte| *byte == 0));
        assert_eq!(Arp::parse(&frame[14..]), Some(request));

        let reply = request.reply(B);
        assert_eq!((reply.operation, reply.sender_mac, reply.target_mac), (operation::REPLY, B, A));
        assert_eq!((reply.sender_ip, reply.target_ip), ([10, 0, 0, 2], [10, 0, 0, 1]));
        assert_eq!(Arp::parse(&reply.to_bytes()), Some(reply));
    }

    #[test]
    fn what_is_not_arp_of_ipv4_over_ethernet_is_refused() {
        let packet = Arp::request(A, [1; 4], [2; 4]).to_bytes();
        for length in 0..LEN {
            assert_eq!(Arp::parse(&packet[..length]), None);
        }
        for at in 0..6 {
            let mut other = packet;
            other[at] ^= 0x40;
            assert_eq!(Arp::parse(&other), None);
        }
    }
}
