//! The oracle: frames that say what they are, and a checker that believes no byte.
//!
//! ```text
//! destination 6 | source 6 | EtherType 0x88b5 | magic u32 | run u32 | flow u32 | sequence u64 | length u32 | pattern
//! ```
//!
//! The pattern is a window of a pseudo-random pool; where it begins follows from run, flow and sequence. So a byte
//! from any other place in this frame, from another frame or from another test is a wrong byte, and making and
//! checking a frame costs no more than copying and comparing it.

use std::fmt;

/// IEEE 802: local experimental EtherType 1.
const ETHERTYPE: [u8; 2] = [0x88, 0xb5];
const MAGIC: u32 = 0x5afe_c0de;
/// Bytes before the pattern.
const HEAD: usize = 14 + 24;
/// Where a pattern may begin.
const STARTS: usize = 1 << 16;
/// The longest frame.
pub const LEN_MAX: usize = 65_557;
/// The shortest: the minimum of Ethernet without its checksum.
pub const LEN_MIN: usize = 60;

/// Makes and knows the frames of one run.
pub struct Oracle {
    run: u32,
    pool: Vec<u8>,
}

/// One direction between two stations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// Its number in the run.
    pub id: u32,
    /// Destination address.
    pub dst: [u8; 6],
    /// Source address.
    pub src: [u8; 6],
}

/// What is wrong with a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wrong {
    /// Shorter than the shortest frame.
    Short(usize),
    /// Addresses, EtherType, magic, run or flow are not the expected ones.
    Foreign,
    /// The length differs from the one it was sent with.
    Length {
        /// As sent.
        sent: usize,
        /// As received.
        received: usize,
    },
    /// So many frames before it are missing.
    Lost(u64),
    /// It was there before, or comes after a later one.
    Repeated(u64),
    /// The first wrong byte.
    Byte(usize),
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Short(len) => write!(f, "a frame of {len} bytes"),
            Self::Foreign => f.write_str("a frame of another flow, run or program"),
            Self::Length { sent, received } => write!(f, "sent with {sent} bytes, received with {received}"),
            Self::Lost(count) => write!(f, "{count} frames are missing"),
            Self::Repeated(sequence) => write!(f, "frame {sequence} comes again, or late"),
            Self::Byte(at) => write!(f, "byte {at} is wrong"),
        }
    }
}

impl std::error::Error for Wrong {}

impl Oracle {
    /// An oracle for a run of its own.
    pub fn new(run: u32) -> Self {
        let mut state = u64::from(run);
        let words = (STARTS + LEN_MAX).div_ceil(8);
        Self { run, pool: (0..words).flat_map(|_| split_mix(&mut state).to_ne_bytes()).collect() }
    }

    /// The bytes before the pattern, and the pattern: frame `sequence` of a flow, `len` bytes long.
    ///
    /// # Panics
    /// If `len` is not in [`LEN_MIN`]`..=`[`LEN_MAX`].
    pub fn parts(&self, flow: &Flow, sequence: u64, len: usize) -> ([u8; HEAD], &[u8]) {
        assert!((LEN_MIN..=LEN_MAX).contains(&len), "a frame of {len} bytes");
        let mut head = [0; HEAD];
        head[..6].copy_from_slice(&flow.dst);
        head[6..12].copy_from_slice(&flow.src);
        head[12..14].copy_from_slice(&ETHERTYPE);
        head[14..18].copy_from_slice(&MAGIC.to_be_bytes());
        head[18..22].copy_from_slice(&self.run.to_be_bytes());
        head[22..26].copy_from_slice(&flow.id.to_be_bytes());
        head[26..34].copy_from_slice(&sequence.to_be_bytes());
        head[34..38].copy_from_slice(&u32::try_from(len).expect("checked above").to_be_bytes());
        (head, &self.pool[self.start(flow.id, sequence)..][..len - HEAD])
    }

    /// The same in one piece.
    pub fn frame(&self, flow: &Flow, sequence: u64, len: usize) -> Vec<u8> {
        let (head, pattern) = self.parts(flow, sequence, len);
        [&head[..], pattern].concat()
    }

    fn start(&self, flow: u32, sequence: u64) -> usize {
        let mut state = u64::from(self.run) << 32 ^ u64::from(flow) ^ sequence.rotate_left(17);
        usize::try_from(split_mix(&mut state) >> 48).expect("16 bits")
    }
}

/// What one flow's receiver has seen.
#[derive(Clone, Debug)]
pub struct Checker {
    flow: Flow,
    next: u64,
}

impl Checker {
    /// Expects frame 0 of the flow.
    pub fn new(flow: Flow) -> Self {
        Self { flow, next: 0 }
    }

    /// How many frames were right.
    pub fn seen(&self) -> u64 {
        self.next
    }

    /// Checks the next frame of the flow: the whole of it, and that it is the next one.
    pub fn check(&mut self, oracle: &Oracle, frame: &[u8]) -> Result<(), Wrong> {
        let Some(head) = frame.first_chunk::<HEAD>().filter(|_| frame.len() >= LEN_MIN) else {
            return Err(Wrong::Short(frame.len()));
        };
        let sequence = u64::from_be_bytes(*head[26..].first_chunk().expect("a head has 38 bytes"));
        let (_, sent) = head.split_at(34);
        let sent = u32::from_be_bytes(*sent.first_chunk().expect("4 bytes")) as usize;
        let (expected, _) = oracle.parts(&self.flow, sequence, frame.len().min(LEN_MAX));
        if head[..26] != expected[..26] {
            return Err(Wrong::Foreign);
        }
        if sent != frame.len() {
            return Err(Wrong::Length { sent, received: frame.len() });
        }
        if sequence > self.next {
            return Err(Wrong::Lost(sequence - self.next));
        }
        if sequence < self.next {
            return Err(Wrong::Repeated(sequence));
        }
        let (_, pattern) = oracle.parts(&self.flow, sequence, sent);
        if frame[HEAD..] != *pattern {
            let at = frame[HEAD..].iter().zip(pattern).position(|(a, b)| a != b).unwrap_or(0);
            return Err(Wrong::Byte(HEAD + at));
        }
        self.next += 1;
        Ok(())
    }
}

/// The next number of a sequence (splitmix64, public domain).
pub fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FLOW: Flow = Flow { id: 7, dst: [2, 0, 0, 0, 0, 2], src: [2, 0, 0, 0, 0, 1] };

    #[test]
    fn right_frames_in_order_are_right() {
        let oracle = Oracle::new(1);
        let mut checker = Checker::new(FLOW);
        for (sequence, len) in (0..).zip([60, 61, 127, 1514, 9216, LEN_MAX]) {
            assert_eq!(checker.check(&oracle, &oracle.frame(&FLOW, sequence, len)), Ok(()));
        }
        assert_eq!(checker.seen(), 6);
    }

    #[test]
    fn every_wrong_byte_is_found() {
        let oracle = Oracle::new(1);
        let right = oracle.frame(&FLOW, 0, 200);
        for at in 0..right.len() {
            let mut frame = right.clone();
            frame[at] ^= 1;
            assert!(Checker::new(FLOW).check(&oracle, &frame).is_err(), "byte {at}");
        }
        let swapped = [&right[..100], &right[150..], &right[100..150]].concat();
        assert_eq!(Checker::new(FLOW).check(&oracle, &swapped), Err(Wrong::Byte(100)));
    }

    #[test]
    fn lost_repeated_foreign_cut_and_grown_frames_are_found() {
        let oracle = Oracle::new(1);
        let frame = |sequence| oracle.frame(&FLOW, sequence, 100);
        let mut checker = Checker::new(FLOW);
        assert_eq!(checker.check(&oracle, &frame(2)), Err(Wrong::Lost(2)));
        assert_eq!(checker.check(&oracle, &frame(0)), Ok(()));
        assert_eq!(checker.check(&oracle, &frame(0)), Err(Wrong::Repeated(0)));
        let other = Flow { id: 8, ..FLOW };
        assert_eq!(checker.check(&oracle, &oracle.frame(&other, 1, 100)), Err(Wrong::Foreign));
        assert_eq!(checker.check(&oracle, &Oracle::new(2).frame(&FLOW, 1, 100)), Err(Wrong::Foreign));
        assert_eq!(checker.check(&oracle, &frame(1)[..59]), Err(Wrong::Short(59)));
        let length = |received| Err(Wrong::Length { sent: 100, received });
        assert_eq!(checker.check(&oracle, &frame(1)[..99]), length(99));
        assert_eq!(checker.check(&oracle, &[&frame(1)[..], &[0]].concat()), length(101));
    }
}
