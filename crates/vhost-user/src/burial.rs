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
    /// A thread is at work.
    busy: bool,
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
        !self.busy && self.memory.is_empty() && self.descriptors.is_empty()
    }

    /// Whether so much waits that no more should come.
    pub(crate) fn is_behind(&self) -> bool {
        self.busy && self.memory.len() + self.descriptors.len() > WAITING_MAX
    }

    /// Sets a thread to work, if there is anything to do and none is at it. `done` is called at its end, whereupon
    /// [`Self::finished`] is due.
    pub(crate) fn start(&mut self, done: impl FnOnce() + Send + 'static) {
        if self.busy || self.is_done() {
            return;
        }
        let (memory, descriptors) = (std::mem::take(&mut self.memory), std::mem::take(&mut self.descriptors));
        let work = move || {
            // Memory first: whoever waits for it must not wait for a descriptor that never closes.
            drop(memory);
            drop(descriptors);
            done();
        };
        // Without a thread the closure is dropped, and with it what it holds: slower for all, but nothing leaks.
        match thread::Builder::new().name("session-burial".into()).spawn(work) {
            Ok(_) => self.busy = true,
            Err(error) => tracing::warn!(%error, "no thread to close descriptors in: closed in the loop"),
        }
    }

    /// The thread has ended.
    pub(crate) fn finished(&mut self) {
        self.busy = false;
    }
}
