//! vhost-user protocol sessions, both ends.
#![forbid(unsafe_code)]
mod device;
pub use device::{Device, NetConfig, Offer, Peer, Refusal};
