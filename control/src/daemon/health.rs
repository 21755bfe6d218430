//! Whether the daemon does its work: not whether this thread is alive, but whether every worker ends its turns.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use dataplane::Dataplane;
use sd_notify::NotifyState;

use super::{Daemon, notify};

/// A worker that ended no turn for this long is stuck. A sleeping one counts on.
const STUCK_AFTER: Duration = Duration::from_secs(5);
/// How often the watchdog looks when the service manager does not say.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// What is known of the daemon's health.
pub struct Health {
    dataplane: Arc<Dataplane>,
    restored: AtomicBool,
    beats: Mutex<Beats>,
}

impl Health {
    pub(super) fn new(dataplane: Arc<Dataplane>) -> Self {
        let beats = Mutex::new(Beats::new(dataplane.heartbeats(), Instant::now()));
        Self { dataplane, restored: AtomicBool::new(false), beats }
    }

    pub(super) fn set_restored(&self) {
        self.restored.store(true, Ordering::Release);
    }

    /// Every stored plug has been tried.
    pub fn restored(&self) -> bool {
        self.restored.load(Ordering::Acquire)
    }

    /// No worker is stuck.
    pub fn workers_turn(&self) -> bool {
        let mut beats = self.beats.lock().expect("no holder of the beats' lock panics");
        beats.look(&self.dataplane.heartbeats(), Instant::now())
    }
}

/// The last reading of each worker's turns, and when it last moved.
struct Beats(Vec<(u64, Instant)>);

impl Beats {
    fn new(readings: Vec<u64>, now: Instant) -> Self {
        Self(readings.into_iter().map(|turns| (turns, now)).collect())
    }

    fn look(&mut self, readings: &[u64], now: Instant) -> bool {
        for (last, turns) in self.0.iter_mut().zip(readings) {
            if last.0 != *turns {
                *last = (*turns, now);
            }
        }
        self.0.iter().all(|(_, moved)| now.duration_since(*moved) < STUCK_AFTER)
    }
}

/// Feeds the service manager's watchdog while every worker turns, twice as often as it asks for.
pub(super) async fn feed_watchdog(daemon: Arc<Daemon>) {
    let asked = sd_notify::watchdog_enabled();
    let mut ticks = tokio::time::interval(asked.map_or(LOOK_EVERY, |limit| limit / 2));
    let mut well = true;
    loop {
        ticks.tick().await;
        let turns = daemon.health.workers_turn();
        if turns && asked.is_some() {
            notify(&[NotifyState::Watchdog]);
        }
        if well && !turns {
            tracing::error!(
                "a worker has not ended its turn for {STUCK_AFTER:?}; the watchdog is not fed any more"
            );
        }
        well = turns;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_stuck_worker_is_enough() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut beats = Beats::new(vec![10, 20], start);
        assert!(beats.look(&[11, 21], at(4)));
        assert!(beats.look(&[12, 21], at(8)));
        assert!(!beats.look(&[13, 21], at(9)));
        assert!(beats.look(&[14, 22], at(10)));
    }
}
