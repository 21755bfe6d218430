//! The guest's second thread: it changes what the dataplane looks at, while it looks.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use vring::driver::DriverMemory;

use crate::hand::Hand;
use crate::oracle::split_mix;

/// A thread that changes the guest's memory until it is dropped.
pub struct Flipper {
    stop: Arc<AtomicBool>,
    flips: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Flipper {
    /// `flip` gets a random number each time.
    pub fn start(hand: &Hand, flip: impl Fn(&DriverMemory, u64) + Send + 'static) -> Self {
        let (stop, flips) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (memory, stopped, count) = (hand.memory().clone(), stop.clone(), flips.clone());
        let thread = std::thread::spawn(move || {
            let mut state = 30;
            while !stopped.load(Ordering::Relaxed) {
                for _ in 0..100 {
                    flip(&memory, split_mix(&mut state));
                }
                count.fetch_add(100, Ordering::Relaxed);
            }
        });
        Self { stop, flips, thread: Some(thread) }
    }

    /// How often it did.
    pub fn flips(&self) -> u64 {
        self.flips.load(Ordering::Relaxed)
    }
}

impl Drop for Flipper {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It only writes to memory.
            let _ = thread.join();
        }
    }
}
