//! How a request's parts become values, and how they are refused.

use std::time::Duration;

use axum::body::to_bytes;
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::request::Parts;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::cli::duration;
use crate::json;
use crate::names::Name;
use crate::problem::{Kind, Problem};
use crate::server::Caller;
use crate::status::Phase;

/// For a body to arrive.
const BODY_TIME: Duration = Duration::from_secs(5);
/// Wait for a phase unless said otherwise.
const TIMEOUT_DEFAULT: Duration = Duration::from_secs(10);

/// A JSON body.
pub(super) struct Body<T>(pub(super) T);

impl<S: Sync, T: DeserializeOwned> FromRequest<S> for Body<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, _: &S) -> Result<Self, Problem> {
        let body = tokio::time::timeout(BODY_TIME, to_bytes(request.into_body(), json::BYTES_MAX)).await;
        let body = body.map_err(|_| Problem::invalid("the request's body did not arrive within 5 s"))?;
        let too_large = format!("the request's body is longer than {} bytes", json::BYTES_MAX);
        let bytes = body.map_err(|_| Problem::new(Kind::TooLarge, too_large))?;
        Ok(Self(json::read(&bytes)?))
    }
}

/// A query string; unknown parameters are refused by the type.
pub(super) struct Params<T>(pub(super) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Params<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let query = Query::<T>::from_request_parts(parts, state).await;
        query.map(|Query(params)| Self(params)).map_err(|e| Problem::invalid(e.body_text()))
    }
}

/// The `{id}` of a path.
pub(super) struct Id(pub(super) Name);

impl<S: Send + Sync> FromRequestParts<S> for Id {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let path = Path::<String>::from_request_parts(parts, state).await;
        let Path(id) = path.map_err(|e| Problem::invalid(e.body_text()))?;
        id.parse().map(Self).map_err(|e| Problem::invalid(format!("{e}")).field("id"))
    }
}

impl<S: Sync> FromRequestParts<S> for Caller {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Problem> {
        let caller = parts.extensions.get().copied();
        caller.ok_or_else(|| Problem::new(Kind::Denied, "the caller's credentials are not known"))
    }
}

/// Parameters of a plug.
#[derive(Default, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct PlugParams {
    /// Answer when the plug has come this far, or 504 naming what is missing.
    pub(super) wait: Option<Phase>,
    /// How long to wait: `10s`, `250ms`; 10 s if left out.
    timeout: Option<String>,
    /// Say what would happen, and do nothing.
    #[serde(default)]
    pub(super) dry_run: bool,
}

impl PlugParams {
    pub(super) fn timeout(&self) -> Result<Duration, Problem> {
        let parse = |text: &String| duration(text).map_err(|e| Problem::invalid(e).field("timeout"));
        self.timeout.as_ref().map_or(Ok(TIMEOUT_DEFAULT), parse)
    }
}

/// Parameters of an unplug.
#[derive(Default, Deserialize, utoipa::IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct UnplugParams {
    /// Answer 404 if there is no such plug; without, that is a success.
    #[serde(default)]
    pub(super) must_exist: bool,
    /// Say what would happen, and do nothing.
    #[serde(default)]
    pub(super) dry_run: bool,
}
