//! The internet checksum (RFC 1071), and completing what a header left partial.

use crate::{HeaderFault, VnetHeader};

/// A running sum of 16-bit words, over any number of pieces of any length.
///
/// Kept in the machine's byte order, which the one's complement sum allows (RFC 1071, 2 B).
#[derive(Clone, Copy, Debug, Default)]
pub struct Sum {
    words: u64,
    /// Whether an odd number of bytes was added, so that the next one is the second of a word.
    odd: bool,
}

impl Sum {
    /// The sum of nothing.
    #[inline]
    pub const fn new() -> Sum {
        Sum { words: 0, odd: false }
    }

    /// Adds the next bytes of the message.
    #[inline]
    #[must_use]
    pub fn with(mut self, bytes: &[u8]) -> Sum {
        let piece = fold(sum_words(bytes));
        // RFC 1071, 2 B: a piece that starts in the middle of a word counts with its bytes swapped.
        let piece = if self.odd { piece.swap_bytes() } else { piece };
        self.words += u64::from(piece);
        self.odd ^= bytes.len() % 2 == 1;
        self
    }

    /// Adds one word, wherever in the message it stands.
    #[inline]
    #[must_use]
    pub fn with_word(mut self, word: u16) -> Sum {
        self.words += u64::from(word.to_be());
        self
    }

    /// The sum itself: what the checksum field holds while it is partial.
    #[inline]
    pub const fn partial(self) -> u16 {
        u16::from_be(fold(self.words))
    }

    /// The checksum: the complement of the sum.
    #[inline]
    pub const fn checksum(self) -> u16 {
        !self.partial()
    }
}

/// The plain sum of the machine's 32-bit words in `bytes`, the last filled up with zeros.
fn sum_words(bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks::<4>();
    let mut last = [0; 4];
    last[..rest.len()].copy_from_slice(rest);
    // Cannot wrap below 2³² words; without the check the compiler may add several at once.
    let add = |sum: u64, word: &[u8; 4]| sum.wrapping_add(u64::from(u32::from_ne_bytes(*word)));
    words.iter().fold(u64::from(u32::from_ne_bytes(last)), add)
}

/// `sum` modulo 2¹⁶ - 1; nonzero stays nonzero.
#[expect(clippy::cast_possible_truncation, reason = "the last two lines bring it below 2¹⁶")]
const fn fold(sum: u64) -> u16 {
    let sum = (sum >> 32) + (sum & 0xffff_ffff);
    let sum = (sum >> 32) + (sum & 0xffff_ffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    let sum = (sum >> 16) + (sum & 0xffff);
    sum as u16
}

/// The checksum of a whole message.
#[inline]
pub fn checksum(bytes: &[u8]) -> u16 {
    Sum::new().with(bytes).checksum()
}

/// `checksum` after one word of the message changed from `old` to `new` (RFC 1624, equation 3).
#[inline]
pub const fn update(checksum: u16, old: u16, new: u16) -> u16 {
    !fold(!checksum as u64 + !old as u64 + new as u64)
}

/// The checksum of an IPv4 header, options included; what its checksum field holds does not matter.
///
/// `header` has at least 12 bytes, or the answer is that of the bytes there.
#[inline]
pub fn ipv4_header(header: &[u8]) -> u16 {
    let (before, after) = header.split_at(header.len().min(10));
    Sum::new().with(before).with(after.get(2..).unwrap_or_default()).checksum()
}

/// The pseudo-header of an L4 message of `len` bytes over IPv4 (RFC 9293, 3.1). The length exceeds 16 bits
/// only before segmentation.
pub fn pseudo_v4(src: [u8; 4], dst: [u8; 4], protocol: u8, len: u32) -> Sum {
    Sum::new().with(&src).with(&dst).with_word(u16::from(protocol)).with(&len.to_be_bytes())
}

/// The pseudo-header of an L4 message of `len` bytes over IPv6 (RFC 8200, 8.1).
pub fn pseudo_v6(src: [u8; 16], dst: [u8; 16], protocol: u8, len: u32) -> Sum {
    Sum::new().with(&src).with(&dst).with_word(u16::from(protocol)).with(&len.to_be_bytes())
}

/// Does what [`NEEDS_CSUM`](crate::vnet::flag::NEEDS_CSUM) left to do, and nothing if that flag is not set.
///
/// The field holds the pseudo-header's sum; it gets the checksum from `csum_start` to the end of the frame
/// (virtio 1.2, 5.1.6.2). For frames that need no segmentation; those that do get their checksums from
/// [`segment`](crate::segment::segment). The header then asks for nothing more: send [`VnetHeader::PLAIN`].
pub fn complete(frame: &mut [u8], header: &VnetHeader) -> Result<(), HeaderFault> {
    if !header.needs_csum() {
        return Ok(());
    }
    let message = frame.get_mut(usize::from(header.csum_start)..).ok_or(HeaderFault::CsumBeyondFrame)?;
    let checksum = nonzero(checksum(message));
    let field = message.get_mut(usize::from(header.csum_offset)..).ok_or(HeaderFault::CsumBeyondFrame)?;
    *field.first_chunk_mut().ok_or(HeaderFault::CsumBeyondFrame)? = checksum.to_be_bytes();
    Ok(())
}

/// RFC 768: a UDP checksum of 0 says "none", so 0 is written as its equal 0xffff. To TCP both are the same.
#[inline]
pub(crate) const fn nonzero(checksum: u16) -> u16 {
    if checksum == 0 { 0xffff } else { checksum }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::craft::{self, Craft, Tcp};
    use crate::vnet::flag;
    use proptest::prelude::*;

    /// RFC 1071, 4.1, word by word.
    fn naive(bytes: &[u8]) -> u16 {
        let mut sum = 0u32;
        for pair in bytes.chunks(2) {
            sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
            sum = (sum & 0xffff) + (sum >> 16);
        }
        !u16::try_from(sum).unwrap()
    }

    #[test]
    fn example_of_the_rfc() {
        // RFC 1071, 3.
        let bytes = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(Sum::new().with(&bytes).partial(), 0xddf2);
        assert_eq!(checksum(&[]), 0xffff);
        assert_eq!(checksum(&[0; 64]), 0xffff);
        assert_eq!(checksum(&[0xff; 65535]), naive(&[0xff; 65535]));
    }

    #[test]
    fn update_example_of_the_rfc() {
        // RFC 1624, 4: the case that the older equation got wrong.
        assert_eq!(update(0xdd2f, 0x5555, 0x3285), 0x0000);
    }

    #[test]
    fn ipv4_header_ignores_its_old_checksum() {
        let header =
            [0x45, 0, 0, 0x73, 0, 0, 0x40, 0, 0x40, 0x11, 0xb8, 0x61, 192, 168, 0, 1, 192, 168, 0, 199];
        assert_eq!(ipv4_header(&header), 0xb861);
        for length in 0..12 {
            ipv4_header(&header[..length]);
        }
    }

    #[test]
    fn completion_restores_the_checksum() {
        for craft in [Craft::sample_v4(), Craft::sample_v6()] {
            for complete_frame in [craft.udp(7, 8, b"odd"), craft.tcp(&Tcp::default(), &[1; 1000])] {
                let mut frame = complete_frame.clone();
                let header = craft::leave_checksum(&mut frame).unwrap();
                assert_ne!(frame, complete_frame);
                complete(&mut frame, &header).unwrap();
                assert_eq!(frame, complete_frame);
            }
        }
    }

    #[test]
    fn a_checksum_of_zero_is_written_as_its_equal() {
        let mut frame = vec![0u8; 22];
        frame[14..16].copy_from_slice(&[0xff, 0xff]);
        let header =
            VnetHeader { flags: flag::NEEDS_CSUM, csum_start: 14, csum_offset: 6, ..VnetHeader::PLAIN };
        complete(&mut frame, &header).unwrap();
        assert_eq!(frame[20..], [0xff, 0xff]);
    }

    #[test]
    fn completion_stays_inside_the_frame() {
        let header = |csum_start, csum_offset| VnetHeader {
            flags: flag::NEEDS_CSUM,
            csum_start,
            csum_offset,
            ..VnetHeader::PLAIN
        };
        let frame = [7; 60];
        for (start, offset) in [(61, 0), (60, 0), (59, 0), (14, 45), (14, 46), (0xffff, 0xffff), (14, 0xffff)]
        {
            let mut after = frame;
            assert_eq!(complete(&mut after, &header(start, offset)), Err(HeaderFault::CsumBeyondFrame));
            assert_eq!(after, frame);
        }
        let mut after = frame;
        assert_eq!(complete(&mut after, &VnetHeader { flags: 0, ..header(0xffff, 0xffff) }), Ok(()));
        assert_eq!(after, frame);
    }

    proptest! {
        #[test]
        fn sum_is_the_naive_one_however_it_is_cut(
            bytes in prop::collection::vec(any::<u8>(), 0..300),
            cuts: [prop::sample::Index; 3],
        ) {
            prop_assert_eq!(checksum(&bytes), naive(&bytes));
            let mut cuts = cuts.map(|cut| cut.index(bytes.len() + 1));
            cuts.sort_unstable();
            let [a, b, c] = cuts;
            let sum = Sum::new().with(&bytes[..a]).with(&bytes[a..b]).with(&bytes[b..c]).with(&bytes[c..]);
            prop_assert_eq!(sum.checksum(), naive(&bytes));
        }

        #[test]
        fn update_is_a_sum_anew(mut words in prop::collection::vec(any::<[u8; 2]>(), 2..20), new: [u8; 2], at: prop::sample::Index) {
            let before = checksum(words.as_flattened());
            let at = at.index(words.len());
            let old = std::mem::replace(&mut words[at], new);
            let updated = update(before, u16::from_be_bytes(old), u16::from_be_bytes(new));
            // 0 and 0xffff are one number; which of them comes out depends on the way there.
            prop_assert_eq!(updated % 0xffff, checksum(words.as_flattened()) % 0xffff);
        }

        #[test]
        fn completion_makes_the_message_sum_to_nothing(
            mut frame in prop::collection::vec(any::<u8>(), 60..200),
            start in 14u16..40,
            offset in (0u16..9).prop_map(|n| n * 2),
        ) {
            let header = VnetHeader { flags: flag::NEEDS_CSUM, csum_start: start, csum_offset: offset, ..VnetHeader::PLAIN };
            let (start, at) = (usize::from(start), usize::from(start + offset));
            let partial = u16::from_be_bytes([frame[at], frame[at + 1]]);
            complete(&mut frame, &header).unwrap();
            // The pseudo-header's sum and the message with its checksum are 0xffff together (RFC 1071, 1).
            let with_pseudo = [&partial.to_be_bytes()[..], &frame[start..]].concat();
            prop_assert_eq!(naive(&with_pseudo), 0);
        }
    }
}
