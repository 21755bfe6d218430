//! The epoll instance of the session thread.

use std::io;
use std::os::fd::RawFd;
use std::time::Duration;

use epoll::{ControlOptions, Event, Events};

/// Events taken in one turn; the rest come with the next.
const EVENTS_PER_TURN: usize = 64;

/// An epoll instance, closed when dropped.
#[derive(Debug)]
pub(crate) struct Poll(RawFd);

impl Poll {
    pub(crate) fn new() -> io::Result<Self> {
        epoll::create(true).map(Self)
    }

    /// Begins to watch `fd` (level-triggered); its events carry `token`.
    pub(crate) fn add(&self, fd: RawFd, token: u64, interest: Events) -> io::Result<()> {
        self.control(ControlOptions::EPOLL_CTL_ADD, fd, token, interest)
    }

    /// Changes what is watched for.
    pub(crate) fn modify(&self, fd: RawFd, token: u64, interest: Events) -> io::Result<()> {
        self.control(ControlOptions::EPOLL_CTL_MOD, fd, token, interest)
    }

    /// Ends watching. To be called before `fd` goes anywhere: an epoll instance follows the open file, not the number.
    pub(crate) fn delete(&self, fd: RawFd) -> io::Result<()> {
        self.control(ControlOptions::EPOLL_CTL_DEL, fd, 0, Events::empty())
    }

    /// Waits for events, at most `timeout` (for ever if `None`).
    pub(crate) fn wait(&self, timeout: Option<Duration>) -> io::Result<Vec<(u64, Events)>> {
        // Rounded up, or the last millisecond before a deadline would be spent spinning.
        let millis =
            timeout.map_or(-1, |t| i32::try_from(t.as_nanos().div_ceil(1_000_000)).unwrap_or(i32::MAX));
        let mut events = [Event::new(Events::empty(), 0); EVENTS_PER_TURN];
        match epoll::wait(self.0, millis, &mut events) {
            Ok(count) => Ok(events[..count]
                .iter()
                .map(|event| (event.data, Events::from_bits_truncate(event.events)))
                .collect()),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(Vec::new()),
            Err(e) => Err(e),
        }
    }

    fn control(&self, op: ControlOptions, fd: RawFd, token: u64, interest: Events) -> io::Result<()> {
        epoll::ctl(self.0, op, fd, Event::new(interest, token))
    }
}

impl Drop for Poll {
    fn drop(&mut self) {
        let _ = epoll::close(self.0);
    }
}
