//! The command line's end of the API: HTTP/1.1 over the daemon's UNIX socket.

use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::net::UnixStream;

use crate::problem::Problem;

/// An answer that takes longer than what was asked for, plus this, does not come any more.
const PATIENCE: Duration = Duration::from_secs(10);
/// Bytes of an answer: room for the statistics of every plug there can be.
const ANSWER_BYTES_MAX: usize = 256 << 20;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Somebody is there, but not for us.
    #[error(
        "user {uid} may not connect to the daemon at {path}: {cause}\n  hint: be root, or in the group that its configuration names (api.group)"
    )]
    Denied {
        /// The socket.
        path: PathBuf,
        /// Who we are.
        uid: u32,
        /// Why.
        cause: std::io::Error,
    },
    /// Nobody is there.
    #[error(
        "no daemon answers at {path}: {cause}\n  hint: is `vhostd serve` running? --api or VHOSTD_API says where"
    )]
    Unreachable {
        /// The socket.
        path: PathBuf,
        /// Why.
        cause: std::io::Error,
    },
    /// The daemon is there but went silent.
    #[error("the daemon at {0} did not answer in time")]
    Silent(PathBuf),
    /// The conversation broke.
    #[error("talking to the daemon at {path}: {cause}")]
    Broken {
        /// The socket.
        path: PathBuf,
        /// Why.
        cause: String,
    },
    /// The daemon said no.
    #[error("{0}")]
    Refused(Box<Problem>),
}

impl ClientError {
    /// What the command line exits with.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Denied { .. } | Self::Unreachable { .. } => 6,
            Self::Silent(_) => 5,
            Self::Broken { .. } => 1,
            Self::Refused(problem) => problem.kind.exit_code(),
        }
    }
}

/// A connection's worth of requests to one daemon.
pub struct Client {
    path: PathBuf,
}

impl Client {
    /// For the daemon at this socket.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// One request whose answer is read into a type.
    pub async fn json<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
        patience: Duration,
    ) -> Result<T, ClientError> {
        let body = body.map_or_else(Bytes::new, |value| value.to_string().into());
        let answer = self.bytes(method, path, body, patience).await?;
        serde_json::from_slice(&answer).map_err(|e| self.broken(&e))
    }

    /// One request, whole answer; `patience` is how long the request itself asks to wait.
    pub async fn bytes(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        patience: Duration,
    ) -> Result<Bytes, ClientError> {
        let exchange = async {
            let answer = self.send(method, path, body).await?;
            let status = answer.status();
            let body = Limited::new(answer.into_body(), ANSWER_BYTES_MAX).collect().await;
            let bytes = body.map_err(|e| self.broken(&e))?.to_bytes();
            if status.is_success() { Ok(bytes) } else { Err(self.refusal(&bytes)) }
        };
        let answer = tokio::time::timeout(patience + PATIENCE, exchange).await;
        answer.unwrap_or_else(|_| Err(ClientError::Silent(self.path.clone())))
    }

    /// A request whose answer never ends; each piece goes to `take` until it says stop.
    pub async fn stream(&self, path: &str, mut take: impl FnMut(&[u8]) -> bool) -> Result<(), ClientError> {
        let answer = self.send(Method::GET, path, Bytes::new()).await?;
        let status = answer.status();
        let mut body = answer.into_body();
        if !status.is_success() {
            let bytes = body.collect().await.map_err(|e| self.broken(&e))?.to_bytes();
            return Err(self.refusal(&bytes));
        }
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|e| self.broken(&e))?;
            if frame.data_ref().is_some_and(|data| !take(data)) {
                break;
            }
        }
        Ok(())
    }

    async fn send(&self, method: Method, path: &str, body: Bytes) -> Result<Response<Incoming>, ClientError> {
        let stream = UnixStream::connect(&self.path).await;
        let stream = stream.map_err(|cause| self.no_way_in(cause))?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(|e| self.broken(&e))?;
        // Ends with the last request or with the daemon; its errors reach the request.
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "vhostd")
            .header("content-type", "application/json")
            .body(Full::new(body))
            .map_err(|e| self.broken(&e))?;
        sender.send_request(request).await.map_err(|e| self.broken(&e))
    }

    fn no_way_in(&self, cause: std::io::Error) -> ClientError {
        let path = self.path.clone();
        if cause.kind() == std::io::ErrorKind::PermissionDenied {
            return ClientError::Denied { path, uid: rustix::process::geteuid().as_raw(), cause };
        }
        ClientError::Unreachable { path, cause }
    }

    fn broken(&self, cause: &impl ToString) -> ClientError {
        ClientError::Broken { path: self.path.clone(), cause: cause.to_string() }
    }

    fn refusal(&self, body: &[u8]) -> ClientError {
        match serde_json::from_slice(body) {
            Ok(problem) => ClientError::Refused(Box::new(problem)),
            Err(_) => {
                self.broken(&format!("its answer is no problem document: {}", String::from_utf8_lossy(body)))
            }
        }
    }
}
