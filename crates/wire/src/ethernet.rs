//! The Ethernet header, with VLAN tags (IEEE 802.3, 802.1Q, 802.1ad).

use crate::Mac;

/// Destination, source and EtherType.
pub const HEADER_LEN: usize = 14;
/// The shortest frame on a wire, without frame check sequence; shorter ones are padded with zeros.
pub const MIN_FRAME: usize = 60;
/// One VLAN tag: protocol identifier and control information.
pub const TAG_LEN: usize = 4;
/// How many tags are looked through. Behind more, the frame is opaque.
pub const TAGS_MAX: usize = 2;

/// EtherTypes, as in the frame.
pub mod ethertype {
    /// IPv4, RFC 894.
    pub const IPV4: u16 = 0x0800;
    /// ARP, RFC 826.
    pub const ARP: u16 = 0x0806;
    /// Reverse ARP, RFC 903.
    pub const RARP: u16 = 0x8035;
    /// IEEE 802.1Q tag (customer VLAN).
    pub const VLAN: u16 = 0x8100;
    /// IPv6, RFC 2464.
    pub const IPV6: u16 = 0x86dd;
    /// IEEE 802.1ad tag (service VLAN).
    pub const SERVICE_VLAN: u16 = 0x88a8;
}

/// A frame, or the first bytes of one, that is known to hold an Ethernet header.
#[derive(Clone, Copy, Debug)]
pub struct Ethernet<'a> {
    header: &'a [u8; HEADER_LEN],
    rest: &'a [u8],
}

impl<'a> Ethernet<'a> {
    /// The view of `frame`, or `None` if it is a runt of less than [`HEADER_LEN`] bytes.
    #[inline]
    pub const fn checked(frame: &'a [u8]) -> Option<Ethernet<'a>> {
        match frame.split_first_chunk() {
            Some((header, rest)) => Some(Ethernet { header, rest }),
            None => None,
        }
    }

    /// Where the frame goes.
    #[inline]
    pub const fn dst(&self) -> Mac {
        let [a, b, c, d, e, f, ..] = *self.header;
        Mac::new([a, b, c, d, e, f])
    }

    /// Where the frame says it comes from.
    #[inline]
    pub const fn src(&self) -> Mac {
        let [_, _, _, _, _, _, a, b, c, d, e, f, ..] = *self.header;
        Mac::new([a, b, c, d, e, f])
    }

    /// The EtherType behind the VLAN tags. It is a tag's own, if that tag is cut short or the third.
    #[inline]
    pub fn ethertype(&self) -> u16 {
        self.past_tags().0
    }

    /// Offset of the first byte behind [`Ethernet::ethertype`]: 14, 18 or 22, never beyond the bytes given.
    #[inline]
    pub fn payload_offset(&self) -> usize {
        self.past_tags().1
    }

    /// The outermost tag's VLAN identifier (0: the tag carries a priority only), `None` if untagged or cut
    /// short.
    #[inline]
    pub fn vlan_id(&self) -> Option<u16> {
        if !is_tag(self.outer_ethertype()) {
            return None;
        }
        let tag: &[u8; TAG_LEN] = self.rest.first_chunk()?;
        Some(u16::from_be_bytes([tag[0], tag[1]]) & 0x0fff)
    }

    #[inline]
    const fn outer_ethertype(&self) -> u16 {
        u16::from_be_bytes([self.header[12], self.header[13]])
    }

    /// EtherType and payload offset behind the tags.
    #[inline]
    pub(crate) fn past_tags(&self) -> (u16, usize) {
        let mut ethertype = self.outer_ethertype();
        let mut offset = HEADER_LEN;
        for tag in self.rest.as_chunks::<TAG_LEN>().0.iter().take(TAGS_MAX) {
            if !is_tag(ethertype) {
                break;
            }
            ethertype = u16::from_be_bytes([tag[2], tag[3]]);
            offset += TAG_LEN;
        }
        (ethertype, offset)
    }
}

#[inline]
pub(crate) const fn is_tag(ethertype: u16) -> bool {
    matches!(ethertype, ethertype::VLAN | ethertype::SERVICE_VLAN)
}

/// Whether what stands for the EtherType, with the payload at `offset`, is a tag that would be looked through if it were there.
#[inline]
pub(crate) const fn is_cut_tag(ethertype: u16, offset: usize) -> bool {
    is_tag(ethertype) && offset < HEADER_LEN + TAGS_MAX * TAG_LEN
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An Ethernet header with these tags (protocol identifier, identifier) and EtherType.
    fn frame(tags: &[(u16, u16)], ethertype: u16) -> Vec<u8> {
        let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
        for (protocol, id) in tags {
            frame.extend(protocol.to_be_bytes());
            frame.extend((0xe000 | id).to_be_bytes());
        }
        frame.extend(ethertype.to_be_bytes());
        frame
    }

    #[test]
    fn untagged() {
        let bytes = frame(&[], ethertype::ARP);
        let view = Ethernet::checked(&bytes).unwrap();
        assert_eq!(view.dst().to_string(), "02:00:00:00:00:01");
        assert_eq!(view.src().to_string(), "02:00:00:00:00:02");
        assert_eq!((view.ethertype(), view.payload_offset(), view.vlan_id()), (ethertype::ARP, 14, None));
    }

    #[test]
    fn tags_are_looked_through_up_to_two() {
        use ethertype::{IPV4, SERVICE_VLAN, VLAN};
        for (tags, expected) in [
            (vec![(VLAN, 7)], (IPV4, 18, Some(7))),
            (vec![(VLAN, 0)], (IPV4, 18, Some(0))),
            (vec![(SERVICE_VLAN, 4095), (VLAN, 7)], (IPV4, 22, Some(4095))),
            (vec![(VLAN, 1), (VLAN, 2), (VLAN, 3)], (VLAN, 22, Some(1))),
            (vec![(VLAN, 1); 8], (VLAN, 22, Some(1))),
        ] {
            let bytes = frame(&tags, IPV4);
            let view = Ethernet::checked(&bytes).unwrap();
            assert_eq!((view.ethertype(), view.payload_offset(), view.vlan_id()), expected);
        }
    }

    #[test]
    fn a_frame_may_end_anywhere() {
        let bytes = frame(&[(ethertype::SERVICE_VLAN, 5), (ethertype::VLAN, 6)], ethertype::IPV6);
        for length in 0..=bytes.len() {
            let Some(view) = Ethernet::checked(&bytes[..length]) else {
                assert!(length < HEADER_LEN);
                continue;
            };
            assert!(view.payload_offset() <= length);
            let (ethertype, id) = match length {
                ..18 => (ethertype::SERVICE_VLAN, None),
                18..22 => (ethertype::VLAN, Some(5)),
                _ => (ethertype::IPV6, Some(5)),
            };
            assert_eq!((view.ethertype(), view.vlan_id()), (ethertype, id), "{length} bytes");
        }
    }
}
