//! `/v1/events`: server-sent events. A reader that was away gives its last event's id and gets what it missed, or one
//! `resync` event with everything as it is now.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::sse::{Event as SseEvent, KeepAlive, Sse};
use futures::Stream;
use serde::Deserialize;

use super::Shared;
use super::extract::Params;
use crate::daemon::Daemon;
use crate::events::{EventKind, Read};
use crate::problem::Problem;

/// A comment when nothing happens, so that a reader that is gone is noticed.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Parameters of events.
#[derive(Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct EventParams {
    /// Begin after this event; the header `Last-Event-ID` goes before it. Neither: begin now.
    since: Option<String>,
}

/// Events as they happen.
#[utoipa::path(get, path = "/v1/events", tag = "look",
    params(EventParams, ("Last-Event-ID" = Option<String>, Header, description = "Begin after this event")),
    responses((status = 200, description = "Server-sent events, each an Event in JSON; a resync carries all plugs",
        content_type = "text/event-stream", body = String), Problem))]
pub(super) async fn events(
    State(daemon): Shared,
    headers: HeaderMap,
    Params(params): Params<EventParams>,
) -> Sse<impl Stream<Item = Result<SseEvent, Infallible>>> {
    let header = headers.get("last-event-id").map(|id| String::from_utf8_lossy(id.as_bytes()).into_owned());
    let events = &daemon.events;
    let seen = match header.or(params.since) {
        Some(cursor) => events.position(&cursor),
        None => Some(events.revision()),
    };
    let reader = Reader { changes: events.subscribe(), pending: VecDeque::new(), seen, daemon };
    let stream = futures::stream::unfold(reader, |mut reader| async move {
        let event = reader.next().await;
        Some((Ok(event), reader))
    });
    Sse::new(stream).keep_alive(KeepAlive::new().interval(KEEP_ALIVE))
}

struct Reader {
    daemon: Arc<Daemon>,
    changes: tokio::sync::watch::Receiver<u64>,
    pending: VecDeque<SseEvent>,
    /// Revision up to which the reader knows everything; `None` if it knows nothing.
    seen: Option<u64>,
}

impl Reader {
    async fn next(&mut self) -> SseEvent {
        loop {
            if let Some(event) = self.pending.pop_front() {
                return event;
            }
            self.changes.mark_unchanged();
            match self.daemon.events.after(self.seen) {
                Read::Events(events) if events.is_empty() => {
                    // Fails only when the ring of events is gone, and the daemon with it.
                    let _ = self.changes.changed().await;
                }
                Read::Events(events) => {
                    self.seen = self.seen.map(|seen| seen + events.len() as u64);
                    self.pending = events.iter().map(|e| sse(&e.id, e.kind, e)).collect();
                }
                Read::Resync(revision) => {
                    self.seen = Some(revision);
                    let cursor = self.daemon.events.cursor(revision);
                    return sse(&cursor, EventKind::Resync, &self.daemon.plugs.list());
                }
            }
        }
    }
}

fn sse(cursor: &str, kind: EventKind, data: &impl serde::Serialize) -> SseEvent {
    let data = serde_json::to_string(data).expect("events and plugs are plain JSON");
    SseEvent::default().id(cursor).event(kind.name()).data(data)
}
