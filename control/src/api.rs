//! The API: HTTP/1.1 and JSON, one small file per resource, its OpenAPI document made from the same types.
//!
//! Rules for every resource: unknown members are refused, a body is at most 64 KiB and comes within five seconds, an error
//! is a problem document, a write can be repeated, `/v1` only grows.

mod balance;
mod events;
mod extract;
mod log;
mod look;
mod meta;
mod os_vif;
mod plugs;

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Router;
use axum::routing::{get, post, put};
use utoipa::openapi::{ContentBuilder, Ref, RefOr, Response, ResponseBuilder};
use utoipa::{IntoResponses, OpenApi};

use crate::daemon::Daemon;
use crate::problem::{CONTENT_TYPE, Kind, Problem};

pub use self::balance::{QueueMove, keep_balanced};
pub use self::look::{FdbRow, PortDrops, PortKind, PortStats, RingStats, Worker};
pub use self::meta::Info;
pub use self::plugs::Unplugged;

/// The state that every handler gets.
type Shared = axum::extract::State<Arc<Daemon>>;

/// All routes.
pub fn router(daemon: Arc<Daemon>) -> Router {
    Router::new()
        .route("/v1/info", get(meta::info))
        .route("/v1/plugs", get(plugs::list))
        .route("/v1/plugs/{id}", put(plugs::plug).get(plugs::show).delete(plugs::unplug))
        .route("/v1/os-vif/plug", post(os_vif::plug))
        .route("/v1/os-vif/unplug", post(os_vif::unplug))
        .route("/v1/networks", get(look::networks))
        .route("/v1/stats", get(look::stats))
        .route("/v1/drops", get(look::drops))
        .route("/v1/workers", get(look::workers))
        .route("/v1/workers/rebalance", post(balance::rebalance))
        .route("/v1/fdb", get(look::fdb))
        .route("/v1/events", get(events::events))
        .route("/v1/log", get(log::show).put(log::change))
        .route("/metrics", get(meta::metrics))
        .route("/healthz", get(meta::healthz))
        .route("/readyz", get(meta::readyz))
        .route("/openapi.json", get(meta::openapi))
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .with_state(daemon)
}

async fn not_found(request: axum::extract::Request) -> Problem {
    let detail = format!("there is no {:.128}", request.uri().path());
    Problem::new(Kind::NotFound, detail).hint("/openapi.json describes what there is")
}

async fn method_not_allowed(request: axum::extract::Request) -> Problem {
    let detail = format!("{} does not take {:.16}", request.uri().path(), request.method());
    Problem::new(Kind::MethodNotAllowed, detail).hint("/openapi.json describes what it takes")
}

/// The document that describes the API.
#[derive(OpenApi)]
#[openapi(
    info(title = "vhostd", description = "Plugs network cards of virtual machines and containers."),
    paths(
        meta::info,
        plugs::list,
        plugs::plug,
        plugs::show,
        plugs::unplug,
        os_vif::plug,
        os_vif::unplug,
        look::networks,
        look::stats,
        look::drops,
        look::workers,
        balance::rebalance,
        look::fdb,
        events::events,
        log::show,
        log::change,
        meta::metrics,
        meta::healthz,
        meta::readyz,
        meta::openapi
    ),
    components(schemas(Problem, crate::events::Event))
)]
pub struct Document;

/// Any status that a path does not describe may carry a problem.
impl IntoResponses for Problem {
    fn responses() -> BTreeMap<String, RefOr<Response>> {
        let content = ContentBuilder::new().schema(Some(Ref::from_schema_name("Problem"))).build();
        let response =
            ResponseBuilder::new().description("What went wrong").content(CONTENT_TYPE, content).build();
        BTreeMap::from([("default".into(), response.into())])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_api_changes_only_knowingly() {
        insta::assert_snapshot!("openapi", crate::table::json(&Document::openapi()));
    }

    #[test]
    fn every_answer_is_described() {
        // OpenAPI 3.1, 4.8.17: the description of a response is required.
        let document = serde_json::to_value(Document::openapi()).unwrap();
        for (path, methods) in document["paths"].as_object().unwrap() {
            for operation in methods.as_object().unwrap().values() {
                for (status, response) in operation["responses"].as_object().unwrap() {
                    assert!(response["description"].is_string(), "{path} {status}");
                }
            }
        }
    }
}
