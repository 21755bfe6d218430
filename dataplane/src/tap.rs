//! Reading a TAP: frames come from the host.
//!
//! A read is one frame, with its virtio-net header, into memory of the worker; the kernel gives no more at a time. Frames
//! of 64 KiB come whole when the host segments late (GSO), which is what makes a TAP fast.

use std::os::fd::AsFd;

use vring::{Burst, FRAME_LEN_MAX, Frames, HEADER_LEN};

use crate::port::TapPort;

/// Frames in one burst from a TAP.
const BURST: usize = 32;
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
        let mut count = 0;
        for (room, len) in self.bytes.chunks_exact_mut(ROOM).zip(&mut lengths) {
            // EAGAIN: no more. Another error (the TAP is gone or down) is found by whoever looks at the link.
            let Ok(read) = rustix::io::read(tap.queue.as_fd(), room) else { break };
            *len = read;
            count += 1;
        }
        let read = self.bytes.chunks_exact(ROOM).zip(&lengths[..count]);
        let parts = read.filter_map(|(room, len)| room[..*len].split_first_chunk::<HEADER_LEN>());
        (count != 0).then(|| frames.load(parts))
    }
}
