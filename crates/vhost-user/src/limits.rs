//! What bounds a session, each limit with a name.

use std::time::{Duration, Instant};

/// Limits of the session thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// A message must be complete this long after its first byte.
    pub message_deadline: Duration,
    /// A reply must be taken this long after it was made.
    pub reply_deadline: Duration,
    /// Messages handled for one endpoint before it is another's turn.
    pub messages_per_turn: usize,
    /// Pause after the first failed dial; doubles with each.
    pub dial_pause_min: Duration,
    /// Longest pause between dials.
    pub dial_pause_max: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            message_deadline: Duration::from_secs(5),
            reply_deadline: Duration::from_secs(5),
            messages_per_turn: 16,
            dial_pause_min: Duration::from_millis(10),
            dial_pause_max: Duration::from_secs(1),
        }
    }
}

/// Lines that an endpoint may log at once, and how long until one more is allowed.
const LOG_BURST: u32 = 10;
const LOG_INTERVAL: Duration = Duration::from_secs(1);

/// Keeps a peer from filling the log.
#[derive(Debug, Default)]
pub(crate) struct LogLimit {
    /// Lines used of the burst; recovers with time.
    used: u32,
    since: Option<Instant>,
    suppressed: u64,
}

impl LogLimit {
    /// If a line may be logged now: how many were suppressed before it.
    pub(crate) fn permit(&mut self, now: Instant) -> Option<u64> {
        let since = *self.since.get_or_insert(now);
        let recovered = now.saturating_duration_since(since).as_secs() / LOG_INTERVAL.as_secs();
        if recovered > 0 {
            self.used = self.used.saturating_sub(u32::try_from(recovered).unwrap_or(u32::MAX));
            self.since = Some(now);
        }
        if self.used >= LOG_BURST {
            self.suppressed += 1;
            return None;
        }
        self.used += 1;
        Some(std::mem::take(&mut self.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_cut_to_the_burst_and_counted() {
        let mut limit = LogLimit::default();
        let start = Instant::now();
        let logged = (0..1000).filter(|_| limit.permit(start).is_some()).count();
        assert_eq!(logged, LOG_BURST as usize);
        assert_eq!(limit.permit(start + LOG_INTERVAL), Some(1000 - u64::from(LOG_BURST)));
        assert_eq!(limit.permit(start + LOG_INTERVAL), None);
    }
}
