//! Counters of one ring or TAP queue. Written by workers, read by anybody at any time.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::drops::DropReason;
use crate::report::Counters;

/// A number that only grows. Relaxed: a reader may see it a moment late, but never torn.
#[derive(Debug, Default)]
pub(crate) struct Count(AtomicU64);

impl Count {
    #[inline]
    pub(crate) fn add(&self, n: u64) {
        if n != 0 {
            self.0.fetch_add(n, Ordering::Relaxed);
        }
    }

    /// As [`Self::add`] where only one thread at a time writes: no locked instruction.
    #[inline]
    pub(crate) fn add_alone(&self, n: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    pub(crate) fn read(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What happened on one ring. `frames` came from it (a TX ring) or went to it (an RX ring); a TAP queue has both kinds.
#[derive(Debug, Default)]
pub(crate) struct RingCounters {
    pub(crate) frames: Count,
    pub(crate) bytes: Count,
    pub(crate) gso_frames: Count,
    pub(crate) bursts: Count,
    pub(crate) kicks: Count,
    pub(crate) calls: Count,
    drops: [Count; DropReason::ALL.len()],
}

impl RingCounters {
    #[inline]
    pub(crate) fn burst(&self, frames: u64, bytes: u64, gso_frames: u64) {
        if frames != 0 {
            self.bursts.add(1);
            self.frames.add(frames);
            self.bytes.add(bytes);
            self.gso_frames.add(gso_frames);
        }
    }

    /// As [`Self::burst`], by whoever holds the ring's lock, or alone polls the queue.
    #[inline]
    pub(crate) fn burst_alone(&self, frames: u64, bytes: u64, gso_frames: u64) {
        if frames != 0 {
            self.bursts.add_alone(1);
            self.frames.add_alone(frames);
            self.bytes.add_alone(bytes);
            self.gso_frames.add_alone(gso_frames);
        }
    }

    #[inline]
    pub(crate) fn drop(&self, reason: DropReason, frames: u64) {
        self.drops[reason as usize].add(frames);
    }

    /// Adds what was counted here to `sum`; `from_port`: the frames came from the port.
    pub(crate) fn add_to(&self, sum: &mut Counters, from_port: bool) {
        let (frames, bytes) = if from_port {
            (&mut sum.rx_frames, &mut sum.rx_bytes)
        } else {
            (&mut sum.tx_frames, &mut sum.tx_bytes)
        };
        *frames += self.frames.read();
        *bytes += self.bytes.read();
        sum.gso_frames += self.gso_frames.read();
        for (reason, count) in DropReason::ALL.iter().zip(&self.drops) {
            let n = count.read();
            if n != 0 {
                sum.count_drop(*reason, n);
            }
        }
    }
}
