//! What can be seen of an endpoint from outside.

use std::path::PathBuf;

use crate::device::Peer;

/// How far an endpoint has come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SessionState {
    /// The socket is there; no front end is.
    Listening,
    /// The front end's socket is being dialled.
    Dialling {
        /// How often without a session.
        attempts: u64,
        /// Why the last one failed.
        last_error: Option<String>,
    },
    /// A front end is connected; no ring runs enabled yet.
    Negotiating,
    /// At least one ring runs and is enabled: frames can pass.
    Linked,
}

/// One ring of the connected front end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingStatus {
    /// Vring index.
    pub index: u16,
    /// Descriptors; 0 if not told yet.
    pub size: u16,
    /// Whether the device was told to run it.
    pub started: bool,
    /// Whether frames may pass.
    pub enabled: bool,
}

/// An endpoint as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionStatus {
    /// Its socket.
    pub path: PathBuf,
    /// How far it has come.
    pub state: SessionState,
    /// The connected front end.
    pub peer: Option<Peer>,
    /// Acknowledged virtio features, once there are any.
    pub features: Option<u64>,
    /// Negotiated protocol features.
    pub protocol_features: u64,
    /// Regions of guest memory that are mapped.
    pub memory_regions: usize,
    /// Their length in bytes.
    pub memory_bytes: u64,
    /// Rings up to the highest that was talked about.
    pub rings: Vec<RingStatus>,
    /// What last went wrong, of this connection or an earlier one.
    pub last_error: Option<String>,
    /// Front ends that were connected so far.
    pub connections: u64,
    /// Connections that were turned away.
    pub rejected: u64,
    /// Messages of all connections.
    pub messages: u64,
    /// Refused ones among them.
    pub nacks: u64,
}
