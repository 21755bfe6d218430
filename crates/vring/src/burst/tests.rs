//! What a burst writes to a descriptor that keeps frames apart, as a TAP does.

use super::*;

use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;

/// Header and frame of `len` bytes in all, as one piece or in pieces of these lengths, as they come out at the other end.
fn written(bytes: &[u8], pieces: &[usize]) -> Vec<u8> {
    let mut frames = Frames::default();
    if pieces.is_empty() {
        frames.push_single(bytes.as_ptr(), u32::try_from(bytes.len()).unwrap());
    } else {
        let (first, mut at) = (frames.begin_chain(), 0);
        for len in pieces {
            assert!(frames.push_piece(bytes[at..].as_ptr(), u32::try_from(*len).unwrap()));
            at += len;
        }
        assert_eq!(at, bytes.len());
        frames.end_chain(first, u32::try_from(at).unwrap());
    }
    // SAFETY: the pieces lie in `bytes`; a single is followed by HEAD_LEN more (`frame`).
    unsafe { frames.fetch_heads(HEADER_BYTES) };
    // SAFETY: `bytes` outlives the burst.
    let burst = unsafe { Burst::new(&mut frames) };
    let (ours, other) = UnixDatagram::pair().unwrap();
    let sent = burst.write_to(0, ours.as_fd(), &mut Vec::new()).unwrap();
    let mut room = vec![0; 70_000];
    assert_eq!(other.recv(&mut room).unwrap(), sent);
    room.truncate(sent);
    room
}

/// Room for `len` bytes, num_buffers being 1, with HEAD_LEN readable behind them.
fn frame(len: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0u8..=250).cycle().take(len + HEAD_LEN).collect();
    bytes[10..HEADER_LEN].copy_from_slice(&NUM_BUFFERS);
    bytes
}

#[test]
fn frames_of_any_length_and_any_number_of_pieces_are_written_whole() {
    for len in [26, 71, 72, 128, 129, 1526, HEAD_LEN + SHORT, HEAD_LEN + SHORT + 1, 65_000] {
        let room = frame(len);
        let mut wanted = room[..len].to_vec();
        wanted.resize(len.max(HEADER_LEN + FRAME_LEN_MIN), 0);
        assert_eq!(written(&room[..len], &[]), wanted, "{len}, one piece");
        for count in [1, 2, 3, 13, 64, 65, 66, 67, 200] {
            if count > len {
                continue;
            }
            let mut pieces = vec![len / count; count];
            pieces[count - 1] += len % count;
            assert_eq!(written(&room[..len], &pieces), wanted, "{len} in {count}");
        }
    }
}

#[test]
fn what_is_no_frame_is_not_written() {
    let mut frames = Frames::default();
    frames.push_fault(ChainFault::Unmapped);
    // SAFETY: nothing is pointed to.
    let burst = unsafe { Burst::new(&mut frames) };
    let (ours, _other) = UnixDatagram::pair().unwrap();
    for index in [0, 1] {
        let refused = burst.write_to(index, ours.as_fd(), &mut Vec::new()).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::InvalidInput);
    }
}
