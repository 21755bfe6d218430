//! The load of workers, made more equal by moving queues: when asked, and by the daemon itself every ten seconds.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Shared;
use super::extract::Params;
use crate::daemon::Daemon;
use crate::problem::Problem;

/// How long a request looks at the load.
const LOOK: Duration = Duration::from_secs(1);
/// How long the daemon itself does, before it moves anything.
const EVERY: Duration = Duration::from_secs(10);

/// A queue that is polled by another worker from now on, or should be.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
pub struct QueueMove {
    /// The port.
    pub port: String,
    /// Its queue pair.
    pub queue: u16,
    /// The worker that polled it.
    pub from: usize,
    /// The one that does now.
    pub to: usize,
    /// Share of a worker's time that goes with it, 0 to 1.
    pub share: f64,
}

/// Parameters of a rebalance.
#[derive(Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct RebalanceParams {
    /// Only say what would be moved.
    #[serde(default)]
    dry_run: bool,
}

/// Looks at the load for a second, and moves queues from busy workers to idle ones.
#[utoipa::path(post, path = "/v1/workers/rebalance", tag = "look", params(RebalanceParams),
    responses((status = 200, description = "What was moved", body = Vec<QueueMove>), Problem))]
pub(super) async fn rebalance(
    State(daemon): Shared,
    Params(params): Params<RebalanceParams>,
) -> Result<Json<Vec<QueueMove>>, Problem> {
    Ok(Json(look_and_move(&daemon, LOOK, params.dry_run).await))
}

/// Keeps the load of several workers equal, for ever.
pub async fn keep_balanced(daemon: Arc<Daemon>) {
    if daemon.dataplane.workers().len() < 2 {
        return;
    }
    loop {
        for QueueMove { port, queue, from, to, share } in look_and_move(&daemon, EVERY, false).await {
            tracing::info!(port, queue, from, to, share, "queue moved to a worker with less to do");
        }
    }
}

async fn look_and_move(daemon: &Daemon, look: Duration, dry_run: bool) -> Vec<QueueMove> {
    let before = daemon.dataplane.sample();
    tokio::time::sleep(look).await;
    let moves = dataplane::propose(&before, &daemon.dataplane.sample());
    let done = moves.into_iter().filter(|to| dry_run || daemon.dataplane.move_queue(to));
    done.map(|to| QueueMove {
        port: to.port_name,
        queue: to.queue,
        from: to.from,
        to: to.to,
        share: to.share,
    })
    .collect()
}
