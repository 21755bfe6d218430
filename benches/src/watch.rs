//! Whether a measurement had the cores for itself.

use std::time::{Duration, Instant};

use anyhow::Result;

use crate::backend::Backend;

/// Part of a core that front ends and back end, who all poll, have at least when nobody disturbs them.
pub const BUSY: f64 = 0.95;
/// How often a figure is taken before a disturbed one will do.
pub const TRIES: u32 = 5;

/// A measurement in which this thread polls, and a back end.
pub struct Watch {
    start: Instant,
    front: Duration,
    back: Duration,
}

impl Watch {
    /// It begins.
    pub fn start(backend: &Backend) -> Self {
        Self { start: Instant::now(), front: thread_time(), back: backend.cpu_time() }
    }

    /// It ends: whether other programs took processor time from either. An error if the back end has ended.
    pub fn disturbed(&self, backend: &mut Backend) -> Result<bool> {
        let least = self.start.elapsed().mul_f64(BUSY);
        backend.check()?;
        let back = backend.polls() && backend.cpu_time() - self.back < least;
        Ok(back || thread_time() - self.front < least)
    }
}

/// Processor time of this thread.
fn thread_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::try_from(time).unwrap_or_default()
}
