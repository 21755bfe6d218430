//! The dataplane: workers that poll ports and switch their frames, without locks per frame, tokio or serde.
//!
//! # A frame's way
//!
//! 1. `worker`: a thread polls its sources, a burst from each a turn;
//! 2. `vring::TxRing::dequeue`: descriptors are fetched and checked, first bytes copied to private memory (a TAP's frames
//!    are read by `tap`);
//! 3. `switch`: every frame is classified on its private bytes: the sender's `policy`, header, addresses, `fdb`;
//! 4. `deliver`: the frames for one destination go into its RX ring or TAP, payload straight from guest to guest;
//! 5. back in the worker: the chains are returned to the sender, who is called if it wants that.
//!
//! A frame that is not delivered counts one of `drops`, on the port whose fault it is. Nothing outlives its burst.
//!
//! # Threads
//!
//! Workers, one per lcore; the session thread of `vhost_user`, which starts and stops rings through `guest`; and for each
//! port that is a front end the thread of its attachment, which does so through `frontend`. They share `port`: each ring behind
//! a lock of its own, taken once a burst. Control adds and removes ports by [`Dataplane`] and reads counters at any time.
#![forbid(unsafe_code)]

mod counters;
mod deliver;
mod drops;
mod events;
pub mod fdb;
mod frontend;
mod guest;
pub mod light;
mod look;
mod placement;
mod plane;
mod policy;
mod port;
mod report;
mod spec;
mod switch;
mod tap;
mod worker;

pub use drops::{DropReason, Who};
pub use placement::{Move, Sample, propose};
pub use plane::{Dataplane, Error};
pub use policy::Policy;
pub use report::{
    Counters, Event, EventKind, FdbEntry, PortId, PortKind, PortReport, RingReport, WorkerReport,
};
pub use spec::{Config, Link, Poll, PortSpec};

/// Smallest MTU (RFC 791).
pub const MTU_MIN: u16 = 68;
/// Largest MTU: jumbo frames.
pub const MTU_MAX: u16 = 9216;
