//! What others undo of a plug is put right, and told. Whoever keeps undoing it is not raced: after a few times there is a pause
//! before each repair, twice as long each time, and a condition that says what is undone.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::steps::World;
use super::table::Fault;
use super::{Plugs, RETRY_FIRST, RETRY_LONGEST};
use crate::names::Name;
use crate::spec::PlugSpec;
use crate::status::Whose;
use crate::store::{Intent, Record};

/// Repairs of one plug without a pause.
const AT_ONCE: u32 = 3;
/// Time without a repair after which nobody keeps undoing anything.
const QUIET: Duration = Duration::from_secs(30);

/// The repairs of one plug that came one after the other.
#[derive(Debug, Default)]
pub(super) struct Repairs {
    count: u32,
    last: Option<Instant>,
}

impl Repairs {
    /// There was one.
    pub(super) fn add(&mut self, now: Instant) {
        if self.is_quiet(now) {
            self.count = 0;
        }
        self.count = self.count.saturating_add(1);
        self.last = Some(now);
    }

    /// The pause before the next, if there has to be one.
    pub(super) fn pause(&self, now: Instant) -> Option<Duration> {
        if self.count < AT_ONCE || self.is_quiet(now) {
            return None;
        }
        let doubled = 1_u32.checked_shl(self.count - AT_ONCE).unwrap_or(u32::MAX);
        Some(RETRY_FIRST.saturating_mul(doubled).min(RETRY_LONGEST))
    }

    fn is_quiet(&self, now: Instant) -> bool {
        self.last.is_none_or(|last| now.duration_since(last) > QUIET)
    }
}

impl Plugs {
    /// From the first plug on that others can take something away from, looks after all such plugs.
    pub(super) fn watch_over(self: &Arc<Self>, spec: &PlugSpec) {
        for (world, changes) in self.steps.changes(spec) {
            let plugs = self.clone();
            tokio::spawn(async move { plugs.steps.follow(world).await });
            if matches!(world, World::OpenVSwitch) {
                let (plugs, changes) = (self.clone(), changes.clone());
                tokio::spawn(async move { plugs.announce_arrivals(changes).await });
            }
            let plugs = self.clone();
            tokio::spawn(async move { plugs.look_after(changes).await });
        }
    }

    async fn look_after(self: Arc<Self>, mut changes: watch::Receiver<u64>) {
        while changes.changed().await.is_ok() {
            let plugs = &self;
            let repair = |id| async move { plugs.repair(&id).await };
            let amiss = self.table.settled_plugs(|id, spec| self.steps.is_amiss(id, spec));
            futures::future::join_all(amiss.into_iter().map(repair)).await;
        }
    }

    /// Takes the steps again that others can undo.
    async fn repair(self: &Arc<Self>, id: &Name) {
        let _turn = self.table.turn(id).await;
        // Whoever had the turn before may have been the one who changed it.
        let Some((Record { intent: Intent::Plugged, spec, .. }, Some(_), None)) = self.table.look(id) else {
            return;
        };
        let Ok(flaws) = self.steps.flaws(id, &spec).await else { return };
        if flaws.is_empty() {
            return;
        }
        if let Some(pause) = self.table.pause_before_repair(id) {
            let flaws = flaws.join("; ");
            let message = format!(
                "{flaws}: somebody else keeps undoing what vhostd does, which waits before it does it again"
            );
            self.failed(id, Fault { whose: Whose::Host, message });
            return self.retry_after(id, pause);
        }
        if let Err(error) = self.attach(id, &spec).await {
            self.failed(id, error.into());
            self.retry(id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repairs_wait_longer_each_time_until_it_is_quiet() {
        let mut repairs = Repairs::default();
        let mut now = Instant::now();
        let mut pauses = Vec::new();
        for _ in 0..40 {
            pauses.push(repairs.pause(now));
            now += repairs.pause(now).unwrap_or_default();
            repairs.add(now);
        }
        let millis = |pause: Option<Duration>| pause.map(|pause| pause.as_millis());
        let first: Vec<_> = pauses.iter().take(6).copied().map(millis).collect();
        assert_eq!(first, [None, None, None, Some(100), Some(200), Some(400)]);
        assert_eq!(pauses.last(), Some(&Some(RETRY_LONGEST)));
        now += QUIET + Duration::from_millis(1);
        assert_eq!(repairs.pause(now), None);
        repairs.add(now);
        assert_eq!(repairs.pause(now), None);
    }
}
