//! Logs to standard error; what is logged can be changed while the daemon runs.

use std::io::stderr;

use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Registry, fmt, reload};

use crate::config::{LogConfig, LogFormat};

/// Why a filter is none.
#[derive(Debug, thiserror::Error)]
#[error("{filter:?} is not a log filter such as info or info,vhost_user=debug: {cause}")]
pub struct FilterError {
    filter: String,
    cause: String,
}

/// A hold on what is logged.
pub struct LogControl(reload::Handle<Targets, Registry>);

/// Starts logging.
pub fn start(config: &LogConfig) -> Result<LogControl, FilterError> {
    let (filter, handle) = reload::Layer::new(parse(&config.filter)?);
    let registry = tracing_subscriber::registry().with(filter);
    // A second start in one process (tests) keeps the first one's output.
    let _ = match config.format {
        LogFormat::Text => registry.with(fmt::layer().with_writer(stderr).with_ansi(false)).try_init(),
        LogFormat::Json => registry.with(fmt::layer().json().with_writer(stderr)).try_init(),
    };
    Ok(LogControl(handle))
}

impl LogControl {
    /// The present filter.
    pub fn filter(&self) -> String {
        self.0.with_current(ToString::to_string).unwrap_or_default()
    }

    /// Another filter from now on.
    pub fn change(&self, filter: &str) -> Result<(), FilterError> {
        let gone = |e: reload::Error| FilterError { filter: filter.into(), cause: e.to_string() };
        self.0.reload(parse(filter)?).map_err(gone)
    }
}

fn parse(filter: &str) -> Result<Targets, FilterError> {
    let bad = |cause: String| FilterError { filter: filter.chars().take(128).collect(), cause };
    if filter.trim().is_empty() {
        return Err(bad("it is empty; off turns logging off".into()));
    }
    filter.parse().map_err(|e: tracing_subscriber::filter::ParseError| bad(e.to_string()))
}
