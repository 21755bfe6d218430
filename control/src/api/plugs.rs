//! `/v1/plugs`: make, undo, look at plugs.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use utoipa::ToSchema;

use super::Shared;
use super::extract::{Body, Id, Params, PlugParams, UnplugParams};
use crate::daemon::Daemon;
use crate::names::Name;
use crate::plug::{Outcome, PlugError};
use crate::problem::{Kind, Problem};
use crate::server::Caller;
use crate::spec::{PlugSpec, SpecError};
use crate::status::{Phase, Plug, Whose};

/// Body of a PUT.
#[derive(Debug, Deserialize, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PlugRequest {
    /// What the plug is asked to be.
    pub spec: PlugSpec,
}

/// Answer to a DELETE.
#[derive(Debug, Deserialize, Serialize, ToSchema)]
pub struct Unplugged {
    /// The plug.
    pub id: Name,
    /// False if there was none, which is as good.
    pub existed: bool,
}

/// All plugs, by id.
#[utoipa::path(get, path = "/v1/plugs", tag = "plugs", responses((status = 200, description = "All plugs", body = Vec<Plug>)))]
pub(super) async fn list(State(daemon): Shared) -> Json<Vec<Plug>> {
    Json(daemon.plugs.list())
}

/// One plug.
#[utoipa::path(get, path = "/v1/plugs/{id}", tag = "plugs", params(("id" = Name, Path)),
    responses((status = 200, description = "The plug", body = Plug), Problem))]
pub(super) async fn show(State(daemon): Shared, Id(id): Id) -> Result<Json<Plug>, Problem> {
    Ok(Json(daemon.plugs.show(&id)?))
}

/// Make a plug. The same again changes nothing; another spec under the same id is a conflict.
#[utoipa::path(put, path = "/v1/plugs/{id}", tag = "plugs", operation_id = "plug",
    params(("id" = Name, Path), PlugParams), request_body = PlugRequest,
    responses((status = 200, description = "It was there, just so", body = Plug),
        (status = 201, description = "It is new", body = Plug), Problem))]
pub(super) async fn plug(
    State(daemon): Shared,
    caller: Caller,
    Id(id): Id,
    Params(params): Params<PlugParams>,
    Body(request): Body<PlugRequest>,
) -> Result<(StatusCode, Json<Plug>), Problem> {
    ensure(&daemon, caller, id, request.spec, &params).await
}

/// Undo a plug. One that is not there is undone already.
#[utoipa::path(delete, path = "/v1/plugs/{id}", tag = "plugs", operation_id = "unplug",
    params(("id" = Name, Path), UnplugParams),
    responses((status = 200, description = "It is gone", body = Unplugged), Problem))]
pub(super) async fn unplug(
    State(daemon): Shared,
    caller: Caller,
    Id(id): Id,
    Params(params): Params<UnplugParams>,
) -> Result<Json<Unplugged>, Problem> {
    remove(&daemon, caller, id, &params).await
}

pub(super) async fn ensure(
    daemon: &Daemon,
    caller: Caller,
    id: Name,
    spec: PlugSpec,
    params: &PlugParams,
) -> Result<(StatusCode, Json<Plug>), Problem> {
    let timeout = params.timeout()?;
    let status_of = |outcome| if outcome == Outcome::Created { StatusCode::CREATED } else { StatusCode::OK };
    if params.dry_run {
        let (outcome, plug) = daemon.plugs.plug_dry(&id, spec).await?;
        return Ok((status_of(outcome), Json(plug)));
    }
    tracing::info!(plug = %id, uid = caller.uid, pid = caller.pid, "plug asked for");
    let asked = Instant::now();
    let outcome = daemon.plugs.plug(id.clone(), spec).await?;
    let plug = match params.wait {
        None | Some(Phase::Pending | Phase::Attached) => daemon.plugs.show(&id)?,
        Some(phase) => daemon.plugs.wait(&id, phase, timeout, asked).await?,
    };
    Ok((status_of(outcome), Json(plug)))
}

pub(super) async fn remove(
    daemon: &Daemon,
    caller: Caller,
    id: Name,
    params: &UnplugParams,
) -> Result<Json<Unplugged>, Problem> {
    let existed = if params.dry_run {
        daemon.plugs.show(&id).is_ok()
    } else {
        tracing::info!(plug = %id, uid = caller.uid, pid = caller.pid, "unplug asked for");
        daemon.plugs.unplug(id.clone()).await?
    };
    if params.must_exist && !existed {
        return Err(PlugError::NotFound(id).into());
    }
    Ok(Json(Unplugged { id, existed }))
}

impl From<PlugError> for Problem {
    fn from(error: PlugError) -> Self {
        let detail = error.to_string();
        match error {
            PlugError::Spec(spec) => {
                let hint = match spec {
                    SpecError::Empty => Some(
                        "spec.socket, spec.to or both; on the command line --listen, --connect, --frontend-listen, --frontend-connect, --to"
                            .to_owned(),
                    ),
                    _ => None,
                };
                Self { field: spec.field().map(str::to_owned), hint, ..Self::new(Kind::Invalid, detail) }
            }
            PlugError::Differs { id, fields } => {
                let field = fields.first().map(|field| format!("spec.{field}"));
                let hint = format!("`vhostd unplug {id}` first, or plug under another name");
                Self { field, ..Self::new(Kind::Conflict, detail).hint(hint) }
            }
            PlugError::Taken { field, owner, .. } => {
                let hint = format!("ask for another, or `vhostd unplug {owner}` first");
                Self::new(Kind::Conflict, detail).field(field).hint(hint)
            }
            PlugError::Full(_) => Self::new(Kind::Unavailable, detail),
            PlugError::Store(_) => Self::new(Kind::Internal, detail),
            PlugError::Step { cause, .. } if cause.is_conflict() => Self::new(Kind::Conflict, detail),
            PlugError::Step { cause, .. } => match cause.whose() {
                Whose::Vhostd => Self::new(Kind::Internal, detail),
                Whose::Host | Whose::FrontEnd => {
                    let hint = cause.hint().map(str::to_owned);
                    Self { hint, ..Self::new(Kind::Precondition, detail) }
                }
            },
            PlugError::Unfinished { id, whose, .. } => {
                let kind = if whose == Whose::Vhostd { Kind::Internal } else { Kind::Precondition };
                Self::new(kind, detail).hint(format!("`vhostd show {id}` says how it stands"))
            }
            PlugError::NotFound(_) => {
                Self::new(Kind::NotFound, detail).hint("`vhostd ls` shows which there are")
            }
            PlugError::Waiting { .. } => {
                Self::new(Kind::Timeout, detail).hint("the plug stays; wait for it again, or unplug it")
            }
        }
    }
}
