//! Replies on their way out: never blocking, never more than one turn's worth.

use std::io;
use std::os::fd::AsFd;
use std::time::Instant;

use rustix::io::Errno;
use rustix::net::{SendFlags, send};

/// Bytes that the socket did not take yet.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    bytes: Vec<u8>,
    sent: usize,
    /// Since when the oldest byte waits.
    since: Option<Instant>,
}

impl Outbox {
    /// Where replies are appended.
    pub(crate) fn replies(&mut self) -> &mut Vec<u8> {
        &mut self.bytes
    }

    /// Since when the peer has not taken what it asked for.
    pub(crate) fn since(&self) -> Option<Instant> {
        self.since
    }

    /// Sends what the socket takes; true if all is out.
    pub(crate) fn flush(&mut self, socket: impl AsFd, now: Instant) -> io::Result<bool> {
        while self.sent < self.bytes.len() {
            match send(&socket, &self.bytes[self.sent..], SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(len) => self.sent += len,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    self.since.get_or_insert(now);
                    return Ok(false);
                }
                Err(e) => return Err(e.into()),
            }
        }
        self.bytes.clear();
        self.sent = 0;
        self.since = None;
        Ok(true)
    }
}
