//! Letting go of what a front end left behind, beside the session thread.
//!
//! Unmapping gigabytes takes long, and closing a foreign descriptor can take for ever (see [`crate::descriptor`]). Both
//! happen in a thread that lives as long as they take, one per endpoint at the most. Meanwhile the endpoint takes no
//! new connection, and reads no further once too much waits: a front end that sends poison stops its own port only.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread;

use vring::GuestMemory;

/// Things that may wait before the endpoint stops reading.
const WAITING_MAX: usize = 64;

/// What one endpoint has to let go of.
#[derive(Debug, Default)]
pub(crate) struct Burial {
    memory: Vec<Arc<GuestMemory>>,
    descriptors: Vec<OwnedFd>,
    /// Threads that have not unmapped everything yet.
    unmapping: usize,
    /// Threads that have not closed everything yet.
    closing: usize,
}

/// How far a thread is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// All of its memory is gone.
    Unmapped,
    /// Everything is gone.
    Closed,
}

impl Burial {
    pub(crate) fn add_memory(&mut self, memory: Vec<Arc<GuestMemory>>) {
        self.memory.extend(memory);
    }

    pub(crate) fn add(&mut self, descriptors: impl IntoIterator<Item = OwnedFd>) {
        self.descriptors.extend(descriptors);
    }

    /// Whether everything is gone.
    pub(crate) fn is_done(&self) -> bool {
        self.closing == 0 && self.is_unmapped() && self.descriptors.is_empty()
    }

    /// Whether all memory is gone.
    pub(crate) fn is_unmapped(&self) -> bool {
        self.unmapping == 0 && self.memory.is_empty()
    }

    /// Whether so much waits that no more should come.
    pub(crate) fn is_behind(&self) -> bool {
        self.closing > 0 && self.memory.len() + self.descriptors.len() > WAITING_MAX
    }

    /// Sets a thread to work, if there is anything to do and none is at it; or even if one is, for the `last` time.
    /// `tell` is called at each stage, whereupon [`Self::reached`] is due.
    pub(crate) fn start(&mut self, last: bool, tell: impl Fn(Stage) + Send + 'static) {
        let nothing = self.memory.is_empty() && self.descriptors.is_empty();
        if nothing || (self.closing > 0 && !last) {
            return;
        }
        let (memory, descriptors) = (std::mem::take(&mut self.memory), std::mem::take(&mut self.descriptors));
        let work = move || {
            // Memory first: whoever waits for it must not wait for a descriptor that never closes.
            drop(memory);
            tell(Stage::Unmapped);
            drop(descriptors);
            tell(Stage::Closed);
        };
        match thread::Builder::new().name("session-burial".into()).spawn(work) {
            Ok(_) => {
                self.unmapping += 1;
                self.closing += 1;
            }
            // The closure is dropped, and with it what it holds: slower for all, but nothing leaks.
            Err(error) => tracing::warn!(%error, "no thread to close descriptors in: closed in the loop"),
        }
    }

    /// A thread has come this far.
    pub(crate) fn reached(&mut self, stage: Stage) {
        match stage {
            Stage::Unmapped => self.unmapping -= 1,
            Stage::Closed => self.closing -= 1,
        }
    }
}
