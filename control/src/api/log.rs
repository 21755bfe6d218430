//! `/v1/log`: which messages are logged, changeable while the daemon runs.

use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::Shared;
use super::extract::Body;
use crate::problem::Problem;
use crate::server::Caller;

/// What is logged.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Log {
    /// Levels by target: `info`, or `info,vhost_user=debug`.
    #[schema(example = "info,vhost_user=debug")]
    filter: String,
}

/// What is logged.
#[utoipa::path(get, path = "/v1/log", tag = "daemon", operation_id = "log", responses((status = 200, description = "The filter in force", body = Log)))]
pub(super) async fn show(State(daemon): Shared) -> Json<Log> {
    Json(Log { filter: daemon.log.filter() })
}

/// Change what is logged, until the daemon ends.
#[utoipa::path(put, path = "/v1/log", tag = "daemon", operation_id = "change_log", request_body = Log,
    responses((status = 200, description = "The filter in force", body = Log), Problem))]
pub(super) async fn change(
    State(daemon): Shared,
    caller: Caller,
    Body(log): Body<Log>,
) -> Result<Json<Log>, Problem> {
    daemon.log.change(&log.filter).map_err(|e| Problem::invalid(e.to_string()).field("filter"))?;
    tracing::info!(uid = caller.uid, pid = caller.pid, filter = log.filter, "log filter changed");
    Ok(Json(Log { filter: daemon.log.filter() }))
}
