//! The host's side against the kernel's own bridges and TAPs, each test in a network namespace of its own.
#![allow(clippy::unwrap_used, reason = "a test stops where something fails")]

mod association;
mod bridge;
mod interface;
mod macvtap;
mod namespace;
mod tap;
mod uplink;
mod veth;
mod vlan;
mod watch;
