//! Open vSwitch's database: a client of RFC 7047, and through it what a host needs of Open vSwitch.
//!
//! `ovsdb-server` keeps the tables that say which bridges and ports there are to be. `ovs-vswitchd` makes it so, and writes
//! what came of it into the same tables. So whoever adds a port writes two rows, and then waits for the other daemon:
//!
//! ```text
//! we              insert Port, Interface; Bridge.ports += Port; Open_vSwitch.next_cfg += 1     one transaction
//! ovs-vswitchd    opens the device, writes Interface.ofport or .error, then Open_vSwitch.cur_cfg = next_cfg
//! we              wait for cur_cfg ≥ our next_cfg, read ofport and error
//! ```
//!
//! A row that is written is no success: only a port number is. When the other daemon is dead, nobody moves `cur_cfg`, and
//! the wait ends with an error.
//!
//! The database is the only memory: each `ensure_…` reads what is there, writes what is missing in one transaction, and
//! touches nothing that is as it should be. Names are unique in the schema, so of two writers that add the same port one is
//! refused, and looks again. What we make bears a mark in its `external_ids`; a bridge or port without it is not ours to
//! remove.
//!
//! # In reading order
//!
//! [`frame`] messages out of a stream of bytes · [`value`] the notation of RFC 7047 for sets, maps and rows ·
//! [`Connection`](connection) · [`Client`] requests, many at a time · [`PortSpec`]
//! what to write for a port · [`Switch`] bridges and ports · [`Monitor`] and
//! [`View`] what becomes of them afterwards.
//!
//! Whoever answers at the socket may be broken: size, depth and time of everything it sends are bounded, and what makes no
//! sense ends the connection with an error. The next request makes a new one.
#![forbid(unsafe_code)]

pub mod client;
pub mod connection;
mod error;
pub mod frame;
mod monitor;
mod plan;
mod switch;
pub mod value;

pub use client::Client;
pub use connection::Address;
pub use error::Error;
pub use monitor::{Interface, Monitor, View};
pub use plan::{BRIDGE_MARK, DatapathType, Device, PORT_MARK, PortSpec};
pub use switch::{Switch, VHOST_USER};
