//! vhost-user protocol sessions, both ends.
//!
//! A [`Sessions`] is one thread with one epoll loop that serves any number of endpoints: sockets on which front ends
//! (QEMU, Cloud Hypervisor, DPDK, ...) appear, to set up the virtio-net device of a guest. Behind each endpoint stands a
//! [`Device`], which is what the protocol may ask of the dataplane. No ring is touched here.
//!
//! In a message's order:
//!
//! 1. [`socket`]: publishing and dialling socket files;
//! 2. `sessions`: the thread, its loop, and the handle to it; `poll` is its epoll instance;
//! 3. `endpoint`: one socket with at most one connection, accepted or dialled, again and again;
//! 4. [`receive`]: messages put together from pieces, with the [`descriptor`]s that came along;
//! 5. [`message`]: the codec, a table of what each request looks like;
//! 6. [`session`]: the protocol's state, `ring` by ring, and the calls to the [`Device`];
//! 7. `outbox`: replies on their way out;
//! 8. `burial`: memory and descriptors let go.
//!
//! [`frontend`] is the other end, and [`attachment`] a session of ours on it.
//!
//! A front end is hostile: it may send anything, at any pace, with any descriptor, or nothing at all. What it does is
//! answered by the end of its own session at worst; it never makes the thread wait. [`receive`], [`message`] and
//! [`session`] need neither socket nor clock, so they can be fuzzed.
#![forbid(unsafe_code)]

pub mod attachment;
mod burial;
mod config;
pub mod descriptor;
mod device;
mod endpoint;
pub mod frontend;
mod limits;
pub mod message;
mod outbox;
mod poll;
pub mod receive;
mod ring;
pub mod session;
mod sessions;
pub mod socket;
mod status;

pub use attachment::{Attachment, Bell, Driver, Started};
pub use device::{Device, NetConfig, Offer, Peer, Refusal};
pub use endpoint::{Endpoint, Role};
pub use frontend::{Bells, FrontEnd, FrontEndError, RingPlace};
pub use limits::Limits;
pub use sessions::{EndpointId, OnChange, Sessions};
pub use socket::{Access, EndpointError, PATH_MAX, remove_stale};
pub use status::{RingStatus, SessionState, SessionStatus};
