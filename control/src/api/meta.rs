//! About the daemon itself: what it is, whether it is well, its metrics, its API's description.

use axum::Json;
use axum::extract::State;
use axum::http::header;
use axum::response::IntoResponse;
use serde::{Deserialize, Serialize};
use utoipa::{OpenApi, ToSchema};

use super::Shared;
use crate::cli::PollMode;
use crate::metrics;
use crate::problem::{Kind, Problem};

/// What runs here.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Info {
    /// Release.
    pub version: String,
    /// Versions of the API that it speaks.
    pub api: Vec<String>,
    /// What of the API will go, and when; empty if nothing.
    pub deprecations: Vec<String>,
    /// Distinguishes this run from every other; first part of an event's id.
    pub epoch: u64,
    /// Process.
    pub pid: u32,
    /// Since when, RFC 3339.
    pub started: String,
    /// Where plugs are recorded.
    pub state_dir: String,
    /// Lcores of the workers; empty: one worker, not pinned.
    pub cpus: Vec<usize>,
    /// How they wait for frames.
    pub poll: PollMode,
}

/// What runs here.
#[utoipa::path(get, path = "/v1/info", tag = "daemon", responses((status = 200, description = "This daemon", body = Info)))]
pub(super) async fn info(State(daemon): Shared) -> Json<Info> {
    Json(daemon.info.clone())
}

/// 200 while the daemon answers at all and its workers turn.
#[utoipa::path(get, path = "/healthz", tag = "daemon",
    responses((status = 200, description = "It is", body = String), Problem))]
pub(super) async fn healthz(State(daemon): Shared) -> Result<&'static str, Problem> {
    if daemon.health.workers_turn() {
        return Ok("ok\n");
    }
    Err(Problem::new(Kind::Unavailable, "a worker has not ended its turn for too long"))
}

/// 200 when every stored plug has been brought back, or tried.
#[utoipa::path(get, path = "/readyz", tag = "daemon",
    responses((status = 200, description = "It is", body = String), Problem))]
pub(super) async fn readyz(State(daemon): Shared) -> Result<&'static str, Problem> {
    if daemon.health.restored() {
        return Ok("ok\n");
    }
    Err(Problem::new(Kind::Unavailable, "stored plugs are being brought back"))
}

/// Metrics in OpenMetrics text.
#[utoipa::path(get, path = "/metrics", tag = "daemon",
    responses((status = 200, description = "All metrics", content_type = "application/openmetrics-text", body = String)))]
pub(super) async fn metrics(State(daemon): Shared) -> impl IntoResponse {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], metrics::text(&daemon))
}

/// This document.
#[utoipa::path(get, path = "/openapi.json", tag = "daemon", responses((status = 200, description = "OpenAPI 3.1", body = Object)))]
pub(super) async fn openapi() -> impl IntoResponse {
    Json(super::Document::openapi())
}
