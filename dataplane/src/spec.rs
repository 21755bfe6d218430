//! What control asks of the dataplane. It knows nothing of VIFs: a port is a socket or a TAP in a network.

use std::time::Duration;

use sys::tap::TapQueue;
use vhost_user::Endpoint;

use crate::policy::Policy;
use crate::report::Event;

/// How workers wait for frames.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Poll {
    /// Poll while there is work; after a while without, ask for kicks and sleep.
    #[default]
    Adaptive,
    /// Poll for ever, never sleep.
    Busy,
}

/// How the dataplane runs.
pub struct Config {
    /// One worker per entry, pinned to that lcore. Empty: one worker, not pinned.
    pub cpus: Vec<usize>,
    /// How workers wait.
    pub poll: Poll,
    /// How long an FDB entry lives without a frame from its address.
    pub ageing: Duration,
    /// Addresses one vhost-user port may teach the switch.
    pub fdb_port_max: u32,
    /// Called on a dataplane or session thread for each change; must not block.
    pub on_event: Box<dyn Fn(Event) + Send + Sync>,
}

/// A port to be added.
#[derive(Debug)]
pub struct PortSpec {
    /// Unique name, as people know it.
    pub name: String,
    /// The network it joins; made on first use, gone with its last port.
    pub network: String,
    /// Largest payload of an Ethernet frame, bytes: 68..=9216.
    pub mtu: u16,
    /// What is behind it.
    pub link: Link,
}

/// What is behind a port.
#[derive(Debug)]
pub enum Link {
    /// A guest on a vhost-user socket.
    VhostUser {
        /// Socket and role.
        endpoint: Endpoint,
        /// The guest's address, if known: told through GET_CONFIG and used for RARP.
        mac: Option<[u8; 6]>,
        /// Queue pairs that may be used, 1..=128.
        queue_pairs: u16,
        /// What it may say that it is; anything, if left out.
        policy: Option<Policy>,
    },
    /// A back end on a vhost-user socket, whose front end we are: another switch, which takes us for a guest.
    FrontEnd {
        /// Socket and role.
        endpoint: Endpoint,
        /// Queue pairs to be used if the back end has so many, 1..=128.
        queue_pairs: u16,
    },
    /// A TAP: the network's way to a Linux bridge, OVS or the host itself.
    Tap {
        /// Its queues, open and with a 12-byte vnet header.
        queues: Vec<TapQueue>,
        /// Whether checksums and segmentation may be left to who takes the frames; see
        /// [`Dataplane::leave_offloads`](crate::Dataplane::leave_offloads).
        offloads: bool,
    },
}
