//! What changed, in order, for those who watch. A bounded ring of events with a cursor: `epoch-revision`.
//!
//! The epoch is new with each start of the daemon, the revision counts its events. A reader that comes back with a
//! cursor of this epoch gets what it missed; with one of another epoch, or too old, it is told to read everything anew.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use utoipa::ToSchema;

use crate::names::mac_text;

/// Events kept for those who come back.
const KEPT_MAX: usize = 1024;

/// Something changed.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Event {
    /// Cursor of this event, `epoch-revision`.
    pub id: String,
    /// When, RFC 3339.
    pub time: String,
    /// What.
    pub kind: EventKind,
    /// The plug, if it is about one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plug: Option<String>,
    /// In words.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
}

/// Sorts of events.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum EventKind {
    /// A plug was made.
    Plugged,
    /// A plug was undone.
    Unplugged,
    /// A step of a stored plug, or of an unplug, failed for a new reason and will be tried again.
    Failed,
    /// Somebody else had undone a step of a plug; it was done again.
    Repaired,
    /// A front end connected.
    Connected,
    /// A front end went away.
    Disconnected,
    /// Rings run and are enabled.
    Linked,
    /// Not any more.
    Unlinked,
    /// A ring was stopped because of its content.
    RingBroken,
    /// A guest's address was announced to its network, by its front end or when a logical port came to forward.
    Announced,
    /// Events were missed: what follows describes everything anew.
    Resync,
}

impl EventKind {
    /// Stable name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Plugged => "plugged",
            Self::Unplugged => "unplugged",
            Self::Failed => "failed",
            Self::Repaired => "repaired",
            Self::Connected => "connected",
            Self::Disconnected => "disconnected",
            Self::Linked => "linked",
            Self::Unlinked => "unlinked",
            Self::RingBroken => "ring_broken",
            Self::Announced => "announced",
            Self::Resync => "resync",
        }
    }
}

/// The ring of events.
pub struct Events {
    epoch: u64,
    ring: Mutex<Ring>,
    revision: watch::Sender<u64>,
}

struct Ring {
    revision: u64,
    kept: VecDeque<Event>,
}

/// What a reader with a cursor gets.
#[derive(Debug)]
pub enum Read {
    /// These, in order; possibly none yet.
    Events(Vec<Event>),
    /// Its cursor is unknown or too old; it stands at this revision now.
    Resync(u64),
}

impl Default for Events {
    fn default() -> Self {
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self {
            epoch: u64::try_from(since_1970.as_micros()).unwrap_or(u64::MAX),
            ring: Mutex::new(Ring { revision: 0, kept: VecDeque::new() }),
            revision: watch::Sender::new(0),
        }
    }
}

impl Events {
    /// Distinguishes this run of the daemon from every other.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Appends an event. Holds a lock for a few moves only, so any thread may call it.
    pub fn publish(&self, kind: EventKind, plug: Option<&str>, message: impl Into<String>) {
        let time = jiff::Timestamp::now().to_string();
        let revision = {
            let mut ring = self.ring.lock().expect("no holder of the events' lock panics");
            ring.revision += 1;
            let id = self.cursor(ring.revision);
            if ring.kept.len() == KEPT_MAX {
                ring.kept.pop_front();
            }
            ring.kept.push_back(Event {
                id,
                time,
                kind,
                plug: plug.map(str::to_owned),
                message: message.into(),
            });
            ring.revision
        };
        self.revision.send_replace(revision);
    }

    /// An event of the dataplane, whose ports are named `PLUG` or `PLUG:tap`.
    pub fn publish_port(&self, event: &dataplane::Event) {
        use dataplane::EventKind as Port;
        let (kind, message) = match &event.kind {
            Port::Connected => (EventKind::Connected, String::new()),
            Port::Disconnected => (EventKind::Disconnected, String::new()),
            Port::Linked => (EventKind::Linked, String::new()),
            Port::Unlinked => (EventKind::Unlinked, String::new()),
            Port::RingBroken { ring, reason } => (EventKind::RingBroken, format!("ring {ring}: {reason}")),
            Port::Announced(mac) => (EventKind::Announced, mac_text(*mac)),
        };
        let plug = event.name.split(':').next();
        self.publish(kind, plug, message);
    }

    /// Wakes when the revision changes.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.revision.subscribe()
    }

    /// The newest revision.
    pub fn revision(&self) -> u64 {
        *self.revision.borrow()
    }

    /// A revision as cursor.
    pub fn cursor(&self, revision: u64) -> String {
        format!("{}-{revision}", self.epoch)
    }

    /// The revision in a cursor, if it is of this epoch.
    pub fn position(&self, cursor: &str) -> Option<u64> {
        let (epoch, revision) = cursor.split_once('-')?;
        let revision = revision.parse().ok()?;
        (epoch == self.epoch.to_string() && revision <= self.revision()).then_some(revision)
    }

    /// What came after a revision; `None` is a cursor that is not of this epoch.
    pub fn after(&self, position: Option<u64>) -> Read {
        let ring = self.ring.lock().expect("no holder of the events' lock panics");
        let Some(missed) = position.and_then(|seen| ring.revision.checked_sub(seen)) else {
            return Read::Resync(ring.revision);
        };
        let kept = ring.kept.len();
        match usize::try_from(missed) {
            Ok(missed) if missed <= kept => Read::Events(ring.kept.range(kept - missed..).cloned().collect()),
            _ => Read::Resync(ring.revision),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kinds(read: Read) -> Vec<EventKind> {
        match read {
            Read::Events(events) => events.iter().map(|e| e.kind).collect(),
            Read::Resync(at) => panic!("resync at {at}"),
        }
    }

    #[test]
    fn a_reader_gets_what_it_missed() {
        let events = Events::default();
        events.publish(EventKind::Plugged, Some("a"), "");
        events.publish(EventKind::Linked, Some("a"), "");
        events.publish(EventKind::Unplugged, Some("a"), "");
        assert_eq!(kinds(events.after(Some(1))), [EventKind::Linked, EventKind::Unplugged]);
        assert_eq!(kinds(events.after(Some(3))), []);
        assert_eq!(events.position(&events.cursor(2)), Some(2));
    }

    #[test]
    fn foreign_and_forgotten_cursors_ask_for_a_resync() {
        let events = Events::default();
        for _ in 0..=KEPT_MAX {
            events.publish(EventKind::Plugged, None, "");
        }
        assert_eq!(kinds(events.after(Some(1))).len(), KEPT_MAX);
        assert!(matches!(events.after(Some(0)), Read::Resync(at) if at == events.revision()));
        assert!(matches!(events.after(None), Read::Resync(_)));
        for foreign in
            ["", "x", "1-1", "-", &format!("{}-9999999", events.epoch()), &format!("{}-x", events.epoch())]
        {
            assert_eq!(events.position(foreign), None, "{foreign}");
        }
    }
}
