//! Reading a TAP: frames come from the host.
//!
//! A read is one frame, with its virtio-net header, into memory of the worker; the kernel gives no more at a time. Frames
//! of 64 KiB come whole when the host segments late (GSO), which is what makes a TAP fast.
//!
//! # Why one system call a frame
//!
//! The call is a small part of what a frame costs: the kernel makes or frees a socket buffer and takes it through its stack
//! within the call, whoever asks for it in whatever way. Batches of calls (io_uring) save less than a tenth of a write and a
//! seventh of a read. What passes by the TAP (a veth driven by AF_PACKET or AF_XDP) is up to two fifths slower, and AF_XDP
//! has no place for the virtio-net header, so that no frame of 64 KiB would go through whole.
//! Figures are in `docs/performance.md`, "To the host".

use std::os::fd::AsFd;

use vring::{Burst, FRAME_LEN_MAX, Frames, HEADER_LEN};

use crate::port::TapPort;

/// Frames in one burst from a TAP.
const BURST: usize = 32;
/// A burst ends when it has so many bytes: what was read is to be delivered out of the cache.
const BURST_BYTES: usize = 256 << 10;
/// Room for one frame.
const ROOM: usize = HEADER_LEN + FRAME_LEN_MAX as usize;

/// Room for one burst. Pages are used only as far as frames reach.
#[derive(Default)]
pub(crate) struct TapReader {
    bytes: Vec<u8>,
}

impl TapReader {
    /// Reads what is there, up to a burst. `None` if nothing is.
    pub(crate) fn read<'m>(&'m mut self, tap: &TapPort, frames: &'m mut Frames) -> Option<Burst<'m>> {
        if self.bytes.is_empty() {
            self.bytes = vec![0; ROOM * BURST];
        }
        let mut lengths = [0; BURST];
        let (mut count, mut bytes) = (0, 0);
        for (room, len) in self.bytes.chunks_exact_mut(ROOM).zip(&mut lengths) {
            // EAGAIN: no more. Another error (the TAP is gone or down) is found by whoever looks at the link.
            let Ok(read) = rustix::io::read(tap.queue.as_fd(), room) else { break };
            *len = read;
            count += 1;
            bytes += read;
            if bytes >= BURST_BYTES {
                break;
            }
        }
        let read = self.bytes.chunks_exact(ROOM).zip(&lengths[..count]);
        let parts = read.filter_map(|(room, len)| room[..*len].split_first_chunk::<HEADER_LEN>());
        (count != 0).then(|| frames.load(parts))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr, UnixDatagram};
    use std::sync::atomic::AtomicU32;

    use sys::tap::TapQueue;

    use crate::counters::RingCounters;

    #[test]
    fn a_burst_ends_with_what_is_there_or_with_its_bytes() {
        const LEN: usize = 60_000;
        let name = format!("vhostd-tap-reader-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(name).unwrap();
        let ours = UnixDatagram::bind_addr(&address).unwrap();
        ours.set_nonblocking(true).unwrap();
        let tap = TapPort {
            queue: TapQueue::from(std::os::fd::OwnedFd::from(ours)),
            worker: AtomicU32::new(0),
            rx: RingCounters::default(),
            tx: RingCounters::default(),
        };
        let (mut reader, mut frames) = (TapReader::default(), Frames::default());
        assert!(reader.read(&tap, &mut frames).is_none());
        // Each has room for one of these at least.
        for _ in 0..8 {
            let other = UnixDatagram::unbound().unwrap();
            other.send_to_addr(&[0; HEADER_LEN + LEN], &address).unwrap();
        }
        let mut bursts = [0; 3];
        for count in &mut bursts {
            let Some(burst) = reader.read(&tap, &mut frames) else { break };
            assert!((0..burst.len()).all(|frame| burst.frame_len(frame) as usize == LEN));
            *count = burst.len();
        }
        assert_eq!(bursts, [5, 3, 0]);
    }
}
