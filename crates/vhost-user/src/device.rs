//! The device behind a session: what the protocol may ask of the dataplane.
//!
//! A session decodes and checks messages and keeps the protocol's state; everything that touches rings happens behind
//! this trait. All calls come from the one session thread and must return within a turn of a worker (no waiting for a
//! front end, no file or network access).

use std::os::fd::OwnedFd;
use std::sync::Arc;

use vring::{GuestMemory, RingError, RingSetup};

/// What a port offers to every front end that connects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Virtio feature bits, VHOST_USER_F_PROTOCOL_FEATURES (30) included.
    pub features: u64,
    /// Protocol feature bits.
    pub protocol_features: u64,
    /// Answer to GET_QUEUE_NUM, in queue *pairs*.
    pub queue_pairs: u16,
}

/// The part of `struct virtio_net_config` that a back end knows (virtio 1.2, 5.1.4), read through GET_CONFIG.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetConfig {
    /// Valid if the port has a MAC of its own.
    pub mac: Option<[u8; 6]>,
    /// Link status, 1 = up.
    pub status: u16,
    /// Largest number of queue pairs.
    pub max_queue_pairs: u16,
    /// Largest payload of an Ethernet frame, bytes; `None` if the port does not say.
    pub mtu: Option<u16>,
}

/// The front end at the other end of the socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Peer {
    /// Process that connected or listens (SO_PEERCRED).
    pub pid: i32,
    /// Its user.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
}

/// Why a port refuses what a front end asked. Answered as NACK; the session goes on.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// NET_SET_MTU beyond what the port takes.
    #[error("MTU {asked} is outside {min}..={max}")]
    Mtu {
        /// What the front end wants.
        asked: u64,
        /// Smallest possible.
        min: u16,
        /// Largest possible on this port.
        max: u16,
    },
    /// SEND_RARP for an address that cannot be a guest's.
    #[error("{0:02x?} is not a unicast address")]
    Mac([u8; 6]),
}

/// The dataplane's side of a session. Ring indices are vring indices: queue pair `n` has RX ring `2n` and TX ring `2n+1`.
pub trait Device: Send {
    /// What to offer; asked once a connection.
    fn offer(&self) -> Offer;
    /// Present configuration space.
    fn config(&self) -> NetConfig;
    /// A front end is there; nothing is negotiated yet.
    fn connected(&mut self, peer: Peer);
    /// SET_FEATURES, already checked against the offer; never called while a ring runs.
    fn set_features(&mut self, features: u64);
    /// NET_SET_MTU.
    fn set_mtu(&mut self, mtu: u64) -> Result<(), Refusal>;
    /// SEND_RARP: announce `mac` to the network (three times).
    fn send_rarp(&mut self, mac: [u8; 6]) -> Result<(), Refusal>;
    /// Starts a ring: translates its addresses in `memory` and begins to poll it. On error the ring stays stopped.
    fn start_ring(
        &mut self,
        index: u16,
        setup: RingSetup,
        memory: &Arc<GuestMemory>,
    ) -> Result<(), RingError>;
    /// Stops a ring and returns where it was (see [`RingSetup::base`]). When this returns, nothing touches the ring's memory any
    /// more. `None` if it was not running (or broke and has no meaningful index: the session then answers with the
    /// base it knows).
    fn stop_ring(&mut self, index: u16) -> Option<u32>;
    /// SET_VRING_ENABLE on a running ring. Disabled RX: frames for it are dropped. Disabled TX: drained and dropped.
    fn enable_ring(&mut self, index: u16, enabled: bool);
    /// Replaces the call fd of a running ring and signals the new one once, so that no notification is lost.
    fn set_call(&mut self, index: u16, call: Option<OwnedFd>);
    /// Replaces the error fd of a running ring.
    fn set_err(&mut self, index: u16, err: Option<OwnedFd>);
    /// Replaces the memory of all running rings. Rings that do not lie in `memory` any more are stopped as broken.
    /// When this returns, the memory before it is not touched any more.
    fn set_memory(&mut self, memory: &Arc<GuestMemory>);
    /// The connection is over: every ring is stopped, nothing of the guest's memory is kept.
    fn disconnected(&mut self);
}
