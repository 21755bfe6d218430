//! Segmentation in software, for a receiver that did not negotiate it.
//!
//! A segment is a head, made here, and a piece of the frame's payload, which is not copied.

use core::fmt;

use crate::checksum::{self, Sum};
use crate::ip::{Ip, V6_HEADER_LEN, Version, protocol};
use crate::vnet::{VnetHeader, gso};
use crate::{HeaderFault, Offloads};

/// The longest head: two VLAN tags, IPv4 with options and TCP with options are 142 bytes; the rest is for
/// IPv6 extension headers.
pub const HEAD_MAX: usize = 256;

/// Why a frame was not segmented.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SegmentFault {
    /// The header is not true.
    Header(HeaderFault),
    /// The header asks for no segmentation, or the frame is but one segment.
    NotGso,
    /// UDP fragmentation offload is not offered.
    Ufo,
    /// The frame's headers are longer than [`HEAD_MAX`].
    HeadTooLong,
}

impl fmt::Display for SegmentFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SegmentFault::Header(fault) => fault.fmt(f),
            SegmentFault::NotGso => f.write_str("the frame is not to be segmented"),
            SegmentFault::Ufo => f.write_str("UDP fragmentation is not offered"),
            SegmentFault::HeadTooLong => write!(f, "the frame's headers are longer than {HEAD_MAX} bytes"),
        }
    }
}

impl core::error::Error for SegmentFault {}

impl From<HeaderFault> for SegmentFault {
    fn from(fault: HeaderFault) -> SegmentFault {
        SegmentFault::Header(fault)
    }
}

/// Cuts a frame into segments of `gso_size` bytes of payload each, as its sender would have sent them, and
/// hands each to `out`: its virtio-net header, its head and its payload. Returns how many there were, at
/// least two and at most [`SEGMENTS_MAX`](crate::check::SEGMENTS_MAX).
///
/// `frame` is the whole frame, in memory that nobody else can change. `header` is checked once more. With
/// `with_checksum` every segment is complete and its header plain, else the checksum is left partial, for a
/// receiver that takes [`Offloads::CSUM`]. Segments shorter than an Ethernet frame's minimum are not padded.
pub fn segment(
    frame: &[u8],
    header: &VnetHeader,
    with_checksum: bool,
    mut out: impl FnMut(&VnetHeader, &[u8], &[u8]),
) -> Result<usize, SegmentFault> {
    let header = header.check(frame.len(), frame, Offloads::ALL)?;
    let cut = Cut::new(frame, &header)?;
    let segment_header = if with_checksum {
        VnetHeader::PLAIN
    } else {
        VnetHeader { gso_type: gso::NONE, gso_size: 0, hdr_len: 0, ..header }
    };
    let (template, payload) = frame.split_at(cut.head_len);
    let last = payload.len().div_ceil(cut.size) - 1;
    let mut head = [0; HEAD_MAX];
    let head = &mut head[..cut.head_len];
    for (index, piece) in payload.chunks(cut.size).enumerate() {
        head.copy_from_slice(template);
        cut.write_ip(head, index, piece.len());
        cut.write_l4(head, index, piece.len(), index == last);
        if with_checksum {
            cut.complete(head, piece);
        }
        out(&segment_header, head, piece);
    }
    Ok(last + 1)
}

/// How a frame is cut. The offsets are those of a checked header: they lie inside the head, and no length
/// that is written below exceeds 16 bits.
struct Cut {
    ip: Ip,
    head_len: usize,
    size: usize,
    /// Offset of the checksum in the head.
    csum_at: usize,
    /// RFC 3168: the sender reacts once to congestion, so CWR goes out once.
    ecn: bool,
    /// Length of the frame's L4 header and payload, as counted in its partial checksum.
    l4_len: usize,
}

impl Cut {
    /// `header` has been checked against `frame`.
    fn new(frame: &[u8], header: &VnetHeader) -> Result<Cut, SegmentFault> {
        match header.gso_type {
            gso::NONE => return Err(SegmentFault::NotGso),
            gso::UDP => return Err(SegmentFault::Ufo),
            _ => {}
        }
        let head_len = usize::from(header.hdr_len);
        if head_len > HEAD_MAX {
            return Err(SegmentFault::HeadTooLong);
        }
        let ip = Ip::parse(frame, frame.len()).map_err(HeaderFault::from)?;
        Ok(Cut {
            head_len,
            size: usize::from(header.gso_size),
            csum_at: usize::from(header.csum_start) + usize::from(header.csum_offset),
            ecn: header.gso_type & gso::ECN != 0,
            l4_len: frame.len() - ip.l4,
            ip,
        })
    }

    fn write_ip(&self, head: &mut [u8], index: usize, piece: usize) {
        let l3 = self.ip.l3;
        match self.ip.version {
            Version::V4 => {
                put(head, l3 + 2, low16(self.head_len - l3 + piece));
                // RFC 6864, 4: datagrams that may be fragmented need identifications of their own.
                put(head, l3 + 4, word(head, l3 + 4).wrapping_add(low16(index)));
                put(head, l3 + 10, checksum::ipv4_header(&head[l3..self.ip.l4]));
            }
            Version::V6 => put(head, l3 + 4, low16(self.head_len - l3 - V6_HEADER_LEN + piece)),
        }
    }

    fn write_l4(&self, head: &mut [u8], index: usize, piece: usize, last: bool) {
        let l4 = self.ip.l4;
        let l4_len = self.head_len - l4 + piece;
        if self.ip.protocol == protocol::TCP {
            self.write_tcp(head, index, last);
        } else {
            put(head, l4 + 4, low16(l4_len));
        }
        // The partial sum is the sender's: only he knows the final address behind a routing header. Just
        // the length in it changes (RFC 1624); the frame's may exceed 16 bits.
        let partial = Sum::new()
            .with_word(word(head, self.csum_at))
            .with_word(!Sum::new().with(&low32(self.l4_len).to_be_bytes()).partial())
            .with_word(low16(l4_len))
            .partial();
        put(head, self.csum_at, partial);
    }

    fn write_tcp(&self, head: &mut [u8], index: usize, last: bool) {
        const FIN: u8 = 0x01;
        const PSH: u8 = 0x08;
        const CWR: u8 = 0x80;
        let l4 = self.ip.l4;
        let sequence = u32::from_be_bytes([head[l4 + 4], head[l4 + 5], head[l4 + 6], head[l4 + 7]]);
        let sequence = sequence.wrapping_add(low32(index * self.size));
        head[l4 + 4..l4 + 8].copy_from_slice(&sequence.to_be_bytes());
        if !last {
            head[l4 + 13] &= !(FIN | PSH);
        }
        if index > 0 && self.ecn {
            head[l4 + 13] &= !CWR;
        }
    }

    fn complete(&self, head: &mut [u8], piece: &[u8]) {
        let sum = Sum::new().with(&head[self.ip.l4..]).with(piece);
        put(head, self.csum_at, checksum::nonzero(sum.checksum()));
    }
}

fn word(head: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([head[at], head[at + 1]])
}

fn put(head: &mut [u8], at: usize, value: u16) {
    head[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

/// The low 16 bits.
fn low16(value: usize) -> u16 {
    let [.., a, b] = value.to_be_bytes();
    u16::from_be_bytes([a, b])
}

/// The low 32 bits.
fn low32(value: usize) -> u32 {
    let [.., a, b, c, d] = value.to_be_bytes();
    u32::from_be_bytes([a, b, c, d])
}
