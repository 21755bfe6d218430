//! What went wrong, for people and programs: an RFC 9457 problem, and the exit code that goes with it.

use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Media type of a problem (RFC 9457, 3).
pub const CONTENT_TYPE: &str = "application/problem+json";

/// An error of the API, sent as `application/problem+json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// Which sort of error; stable.
    #[serde(rename = "type")]
    pub kind: Kind,
    /// The sort in words.
    pub title: String,
    /// HTTP status.
    pub status: u16,
    /// What happened to which object, and why.
    pub detail: String,
    /// Member of the request that is at fault, as `spec.mtu`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
    /// The way out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// True if the same request may succeed later.
    pub retryable: bool,
}

/// Sorts of errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
#[schema(as = ProblemKind)]
pub enum Kind {
    /// The request is malformed or asks for the impossible.
    Invalid,
    /// The caller may not.
    Denied,
    /// No such object.
    NotFound,
    /// No such method on this path.
    MethodNotAllowed,
    /// It contradicts what is there.
    Conflict,
    /// More than 64 KiB.
    TooLarge,
    /// Something outside of the daemon must be put right first.
    Precondition,
    /// Understood, but not supported by this release.
    Unsupported,
    /// The awaited state did not come in time.
    Timeout,
    /// Not now: starting, or too busy.
    Unavailable,
    /// The daemon's own fault.
    Internal,
}

impl Kind {
    fn parts(self) -> (StatusCode, &'static str, bool) {
        match self {
            Self::Invalid => (StatusCode::BAD_REQUEST, "invalid request", false),
            Self::Denied => (StatusCode::FORBIDDEN, "denied", false),
            Self::NotFound => (StatusCode::NOT_FOUND, "not found", false),
            Self::MethodNotAllowed => (StatusCode::METHOD_NOT_ALLOWED, "method not allowed", false),
            Self::Conflict => (StatusCode::CONFLICT, "conflict", false),
            Self::TooLarge => (StatusCode::PAYLOAD_TOO_LARGE, "request too large", false),
            Self::Precondition => (StatusCode::FAILED_DEPENDENCY, "precondition failed", true),
            Self::Unsupported => (StatusCode::NOT_IMPLEMENTED, "not supported", false),
            Self::Timeout => (StatusCode::GATEWAY_TIMEOUT, "timed out", true),
            Self::Unavailable => (StatusCode::SERVICE_UNAVAILABLE, "unavailable", true),
            Self::Internal => (StatusCode::INTERNAL_SERVER_ERROR, "internal error", true),
        }
    }

    /// What the command line exits with.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Invalid | Self::TooLarge | Self::MethodNotAllowed => 2,
            Self::NotFound => 3,
            Self::Conflict => 4,
            Self::Timeout => 5,
            Self::Precondition | Self::Unsupported => 7,
            Self::Denied | Self::Unavailable | Self::Internal => 1,
        }
    }
}

impl Problem {
    /// A problem of a sort.
    pub fn new(kind: Kind, detail: impl Into<String>) -> Self {
        let (status, title, retryable) = kind.parts();
        let detail = detail.into();
        Self {
            kind,
            title: title.to_owned(),
            status: status.as_u16(),
            detail,
            field: None,
            hint: None,
            retryable,
        }
    }

    /// A malformed request.
    pub fn invalid(detail: impl Into<String>) -> Self {
        Self::new(Kind::Invalid, detail)
    }

    /// With the member at fault.
    pub fn field(self, field: impl Into<String>) -> Self {
        Self { field: Some(field.into()), ..self }
    }

    /// With the way out.
    pub fn hint(self, hint: impl Into<String>) -> Self {
        Self { hint: Some(hint.into()), ..self }
    }
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.detail)?;
        if let Some(hint) = &self.hint {
            write!(f, "\n  hint: {hint}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Problem {}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).expect("every kind has a valid status");
        let body = serde_json::to_vec(&self).expect("a problem is plain JSON");
        (status, [(header::CONTENT_TYPE, CONTENT_TYPE)], body).into_response()
    }
}
