//! The few system calls that have no safe wrapper.
//!
//! - [`sigbus`]: survive a peer that truncates the memory it shares with us.
//! - [`tap`]: TAP devices with vnet headers.
//! - [`call`]: signal an eventfd that belongs to a hostile peer without ever blocking.
//! - [`numa`]: the node of a processor, and of a page.
//! - [`fd`]: descriptors for crates that know only raw ones.
//! - [`fail_point`]: die where a test says.
#![allow(unsafe_code)]

#[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
compile_error!("vhostd runs on 64-bit Linux only");

pub mod call;
pub mod clock;
pub mod fail_point;
pub mod fd;
pub mod numa;
pub mod sigbus;
pub mod tap;
