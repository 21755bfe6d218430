//! `/v1/os-vif`: plug and unplug as os-vif speaks of them.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::Deserialize;
use serde_json::Value;
use utoipa::ToSchema;

use super::Shared;
use super::extract::{Body, Params, PlugParams, UnplugParams};
use super::plugs::{Unplugged, ensure, remove};
use crate::osvif;
use crate::problem::Problem;
use crate::server::Caller;
use crate::spec::Socket;
use crate::status::Plug;

/// What os-vif hands to a plug-in: two versioned objects.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct OsVifRequest {
    /// A VIF of a class that is served.
    #[schema(value_type = Object)]
    vif: Value,
    /// An InstanceInfo.
    #[serde(default)]
    #[schema(value_type = Object, nullable)]
    instance_info: Value,
    /// A vhost-user socket to serve the guest by, instead of the TAP or macvtap that the VIF would be its card. Unplugging
    /// does not heed it.
    #[serde(default)]
    socket: Option<Socket>,
}

/// Plug a VIF. Its id names the plug.
#[utoipa::path(post, path = "/v1/os-vif/plug", tag = "os-vif", operation_id = "os_vif_plug", params(PlugParams),
    request_body = OsVifRequest,
    responses((status = 200, description = "It was there, just so", body = Plug),
        (status = 201, description = "It is new", body = Plug), Problem))]
pub(super) async fn plug(
    State(daemon): Shared,
    caller: Caller,
    Params(params): Params<PlugParams>,
    Body(request): Body<OsVifRequest>,
) -> Result<(StatusCode, Json<Plug>), Problem> {
    let asked = decoded(&request)?;
    let (id, spec) = osvif::plug_of(&asked, request.socket)?;
    ensure(&daemon, caller, id, spec, &params).await
}

/// Unplug a VIF. What was recorded at plug decides what is undone, whatever the VIF says now.
#[utoipa::path(post, path = "/v1/os-vif/unplug", tag = "os-vif", operation_id = "os_vif_unplug", params(UnplugParams),
    request_body = OsVifRequest,
    responses((status = 200, description = "It is gone", body = Unplugged), Problem))]
pub(super) async fn unplug(
    State(daemon): Shared,
    caller: Caller,
    Params(params): Params<UnplugParams>,
    Body(request): Body<OsVifRequest>,
) -> Result<Json<Unplugged>, Problem> {
    let id = osvif::id_of(&decoded(&request)?.vif)?;
    remove(&daemon, caller, id, &params).await
}

fn decoded(request: &OsVifRequest) -> Result<vif::Plug, Problem> {
    let document = serde_json::json!({ "vif": &request.vif, "instance_info": &request.instance_info });
    let plug = vif::Document::decode(&document).and_then(|document| document.plug());
    plug.map_err(|e| Problem::invalid(e.to_string()))
}
