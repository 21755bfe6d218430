//! What can go wrong with Open vSwitch, in words for people.

use std::time::Duration;

use serde_json::Value;

/// Why Open vSwitch is not as asked. Each names the object, the cause and the way out. Cheap to clone: one broken connection
/// fails every request on it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The address is no address.
    #[error("Open vSwitch's database cannot be at {0:?}: give unix:PATH or tcp:HOST:PORT")]
    Address(String),
    /// Nobody answers there.
    #[error("cannot connect to Open vSwitch's database at {address}: {cause}; is ovsdb-server running?")]
    Connect {
        /// Where.
        address: String,
        /// Why.
        cause: String,
    },
    /// The connection broke.
    #[error("Open vSwitch's database at {address} ended the connection: {cause}")]
    Closed {
        /// Where.
        address: String,
        /// Why.
        cause: String,
    },
    /// What came is not RFC 7047.
    #[error("what answers at {address} does not speak OVSDB (RFC 7047): {cause}")]
    Protocol {
        /// Where.
        address: String,
        /// What is wrong.
        cause: String,
    },
    /// No answer in time.
    #[error("Open vSwitch's database at {address} does not answer within {} s; is ovsdb-server stuck?", limit.as_secs())]
    Silent {
        /// Where.
        address: String,
        /// For how long.
        limit: Duration,
    },
    /// The database refused a transaction.
    #[error("Open vSwitch's database refused the request: {error}: {details}")]
    Refused {
        /// RFC 7047 §3.1, `<error>`: `constraint violation`, `timed out` …
        error: String,
        /// In the server's words.
        details: String,
    },
    /// The switch did not take the configuration.
    #[error("ovs-vswitchd has not taken up {port} within {} s; is it running?", limit.as_secs())]
    Unapplied {
        /// The port or bridge.
        port: String,
        /// For how long.
        limit: Duration,
    },
    /// The switch could not open the port.
    #[error("ovs-vswitchd cannot use {port} in bridge {bridge}: {cause}")]
    Port {
        /// The port.
        port: String,
        /// Its bridge.
        bridge: String,
        /// The switch's words, or what is missing.
        cause: String,
    },
    /// The bridge has another datapath.
    #[error(
        "Open vSwitch bridge {bridge} has datapath_type {found}, not {wanted}: ask for {found}, or for another bridge"
    )]
    DatapathType {
        /// The bridge.
        bridge: String,
        /// What it has.
        found: String,
        /// What was asked for.
        wanted: String,
    },
    /// The port is somewhere else.
    #[error(
        "port {port} is in Open vSwitch bridge {found}, not in {wanted}: remove it there, or give another name"
    )]
    OtherBridge {
        /// The port.
        port: String,
        /// Where it is.
        found: String,
        /// Where it should be.
        wanted: String,
    },
    /// The port is somebody else's.
    #[error(
        "port {port} of Open vSwitch bridge {bridge} belongs to {owner}: give another name, or remove it first"
    )]
    OtherOwner {
        /// The port.
        port: String,
        /// Its bridge.
        bridge: String,
        /// Whose it is.
        owner: String,
    },
    /// The logical port is somebody else's.
    #[error(
        "logical port {iface_id} is port {port} already, which was not made by vhostd: remove that (ovs-vsctl del-port \
         {port}), or give another iface-id"
    )]
    LogicalPort {
        /// `external_ids:iface-id`.
        iface_id: String,
        /// The port that bears it.
        port: String,
    },
    /// Somebody else changes the same rows all the time.
    #[error(
        "{port} cannot be changed in Open vSwitch's database ({cause}): try again, if somebody else changes it, too"
    )]
    Raced {
        /// The port or bridge.
        port: String,
        /// The server's words at the last attempt.
        cause: String,
    },
}

impl Error {
    /// A request that was refused as a whole (RFC 7047 §4), in as many words as people read.
    pub(crate) fn of_request(error: Value) -> Self {
        const CHARS_MAX: usize = 256;
        let error = match error {
            Value::String(text) => text,
            other => other.to_string(),
        };
        Self::Refused { error: error.chars().take(CHARS_MAX).collect(), details: String::new() }
    }

    /// True if what was asked for belongs to somebody else, or is something else.
    pub fn is_conflict(&self) -> bool {
        matches!(
            self,
            Self::DatapathType { .. }
                | Self::OtherBridge { .. }
                | Self::OtherOwner { .. }
                | Self::LogicalPort { .. }
        )
    }
}
