//! The announcement of a moved guest.
//!
//! After a migration the network has to learn where the guest's MAC address is now. If the guest cannot
//! say it, somebody sends a reverse ARP request (RFC 903) in its name. Nobody answers it, every switch learns
//! from it.

use crate::Mac;
use crate::arp::{Arp, operation};
use crate::ethernet::MIN_FRAME;

/// The frame that announces `mac`: a broadcast, which asks for the IPv4 address of `mac` itself.
pub fn announcement(mac: Mac) -> [u8; MIN_FRAME] {
    let question = Arp {
        operation: operation::REVERSE_REQUEST,
        sender_mac: mac,
        sender_ip: [0; 4],
        target_mac: mac,
        target_ip: [0; 4],
    };
    question.frame(Mac::BROADCAST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn announcement_is_a_reverse_arp_broadcast() {
        let frame = announcement(Mac::new([0x52, 0x54, 0, 0xaa, 0xbb, 0xcc]));
        let expected = [
            0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x52, 0x54, 0, 0xaa, 0xbb, 0xcc, 0x80, 0x35, //
            0, 1, 8, 0, 6, 4, 0, 3, //
            0x52, 0x54, 0, 0xaa, 0xbb, 0xcc, 0, 0, 0, 0, //
            0x52, 0x54, 0, 0xaa, 0xbb, 0xcc, 0, 0, 0, 0,
        ];
        assert_eq!(frame[..42], expected);
        assert_eq!(frame[42..], [0; 18]);
    }
}
